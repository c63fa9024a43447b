"""`ppow export`: a drafter as a directory or GGUF file that serving engines load as it is.

Knows arguments and messages; names, shapes and checks are in export/.
"""

import argparse
from pathlib import Path
from typing import Any

from ..data.files import ensure_writable
from ..data.models import load_drafter, load_target, load_tokenizer, resolve
from .options import MODEL_HELP


def register(subparsers: Any) -> None:
    """Add the parser of `ppow export`."""
    parser = subparsers.add_parser(
        "export",
        help="write a drafter for vLLM, SGLang, OpenVINO GenAI, speculators or llama.cpp",
        description="Write a drafter as a directory that a serving engine loads as it is, check it, and say what an "
        "engine cannot serve. The directory's README holds the commands that serve it.",
    )
    parser.add_argument("drafter", metavar="DRAFTER", help=f"the drafter: {MODEL_HELP}")
    parser.add_argument(
        "--format",
        choices=["vllm", "sglang", "speculators", "standalone", "gguf", "openvino"],
        default="vllm",
        help="what it is for; vllm and sglang are the same directory; gguf is for llama.cpp (default: %(default)s)",
    )
    parser.add_argument("--output-dir", required=True, help="folder of the directory's files")
    parser.add_argument(
        "--target",
        metavar="MODEL",
        help=f"the target, for the commands and the checks: {MODEL_HELP} (default: the one it was trained for)",
    )
    parser.add_argument(
        "--share-embeddings",
        action="store_true",
        help="leave out a drafter's embeddings where they are the target's (compared, unless it shares them)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "q8_0"],
        help="number format of the weights; q8_0 for gguf only (default: the drafter's own; float16 for gguf)",
    )
    parser.add_argument(
        "--speculative-tokens",
        type=int,
        metavar="N",
        help="draft tokens a round in the commands (default: 5; of a block drafter its block)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the directory and say what is in it."""
    ensure_writable(arguments.output_dir, "--output-dir")
    gguf = arguments.format == "gguf"
    if arguments.dtype == "q8_0" and not gguf:
        raise ValueError(f"--dtype: q8_0 is for --format gguf; {arguments.format} takes float32, bfloat16 or float16.")
    drafter = load_drafter(arguments.drafter, "DRAFTER", "auto" if gguf else arguments.dtype or "auto", "cpu")
    name = _needed_target(arguments, drafter)
    target = None if name is None else load_target(name, "--target", "auto", "cpu")
    tokenizer = _needed_tokenizer(arguments, drafter)
    from ..export import export_drafter

    report = export_drafter(
        drafter,
        arguments.output_dir,
        arguments.format,
        target=target,
        target_name=arguments.target,
        tokenizer=tokenizer,
        share_embeddings=arguments.share_embeddings,
        speculative_tokens=arguments.speculative_tokens,
        gguf_dtype=arguments.dtype or "float16",
    )
    print(
        f"{report.folder}: {report.layout}, {report.tensors} tensors, {report.parameters / 1e6:.2f} million "
        f"parameters; names, shapes and numbers checked. Files: {', '.join(report.files)}"
    )
    for note in report.notes:
        print(f"note: {note}")
    print(f"The commands that serve it are in {report.folder / 'README.md'}")
    return 0


def _needed_tokenizer(arguments: argparse.Namespace, drafter: Any) -> Any:
    """The tokenizer to write: of a standalone drafter where it has one, for GGUF at least its target's."""
    gguf = arguments.format == "gguf"
    own = Path(resolve(arguments.drafter), "tokenizer_config.json").is_file()
    if own and (gguf or drafter.config.architecture == "standalone"):
        return load_tokenizer(arguments.drafter, "DRAFTER")
    name = arguments.target or drafter.config.target_name_or_path
    if gguf and name is None:
        raise ValueError("--target: a GGUF file holds its tokenizer and the drafter has none; name the target.")
    return load_tokenizer(name, "--target") if gguf else None


def _needed_target(arguments: argparse.Namespace, drafter: Any) -> str | None:
    """The target to load, for its embeddings; `None` where they are not needed, `ValueError` where it is not named."""
    shares = drafter.config.shares_target_embeddings
    if drafter.config.architecture == "block" and not arguments.share_embeddings:
        return None  # engines take what it shares from the target
    if arguments.share_embeddings == shares:
        return None
    name = arguments.target or (drafter.config.target_name_or_path if shares else None)
    if name is None and shares:
        raise ValueError(
            "--target: the drafter shares its target's embeddings, which belong into the export; name the target, or "
            "pass --share-embeddings to leave them out."
        )
    if name is None:
        raise ValueError("--share-embeddings: pass --target too, whose embeddings are compared with the drafter's.")
    return name
