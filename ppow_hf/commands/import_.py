"""`ppow import`: a published EAGLE-3, DFlash or DSpark drafter as one that PPOW can train on.

Knows arguments and messages; the checkpoint's format is in export/importing.py.
"""

import argparse
from pathlib import Path
from typing import Any

from ..data.files import ensure_writable
from ..data.models import load_tokenizer, resolve
from .options import MODEL_HELP


def register(subparsers: Any) -> None:
    """Add the parser of `ppow import`."""
    parser = subparsers.add_parser(
        "import",
        help="turn a published EAGLE-3, DFlash or DSpark drafter into one that ppow train can go on with",
        description="Read an EAGLE-3, DFlash or DSpark checkpoint, as its authors or speculators publish them, check "
        "it, and save it as a drafter for ppow train --drafter, ppow bench and ppow export.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder or a name on the Hub")
    parser.add_argument("--output-dir", required=True, help="folder for the drafter")
    parser.add_argument(
        "--target",
        metavar="MODEL",
        help=f"its target: {MODEL_HELP}; needed where the checkpoint has no embeddings or names no layers",
    )
    parser.add_argument(
        "--target-layer-ids",
        metavar="I,J,K",
        help="target states an EAGLE-3 drafter reads, counted as transformers' hidden_states (default: as the "
        "checkpoint says)",
    )
    parser.add_argument("--revision", help="revision of a checkpoint on the Hub")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Import, save, and say what was imported."""
    ensure_writable(arguments.output_dir, "--output-dir")
    layers = _layers(arguments.target_layer_ids)
    from ..export import import_drafter
    from ..runtime.configuration_ppow import vocabulary_fingerprint

    settings = {}
    tokenizer = None
    if arguments.target is not None:
        tokenizer = load_tokenizer(arguments.target, "--target")
        settings["target_vocabulary_fingerprint"] = vocabulary_fingerprint(tokenizer)
    checkpoint = arguments.checkpoint
    if Path(resolve(checkpoint)).is_dir():
        checkpoint = Path(resolve(checkpoint))
        if checkpoint.resolve() == Path(arguments.output_dir).resolve():
            raise ValueError("--output-dir: it is the checkpoint's own folder, which would be overwritten.")
    drafter = import_drafter(
        checkpoint, arguments.target, target_layer_ids=layers, revision=arguments.revision, **settings
    )
    drafter.save_pretrained(arguments.output_dir)
    if tokenizer is not None:
        tokenizer.save_pretrained(arguments.output_dir)
    config = drafter.config
    kind = {"eagle": "an eagle", "block": "a block"}[config.architecture]
    print(
        f"{arguments.output_dir}: {kind} drafter with "
        f"{sum(p.numel() for p in drafter.parameters()) / 1e6:.2f} "
        f"million parameters in {str(drafter.dtype).removeprefix('torch.')}, draft vocabulary "
        f"{config.draft_vocab_size or config.vocab_size} of {config.vocab_size}, reading the target's states "
        f"{config.target_layer_ids}."
    )
    return 0


def _layers(text: str | None) -> list[int] | None:
    """`--target-layer-ids` as numbers."""
    try:
        return None if text is None else [int(layer) for layer in text.split(",")]
    except ValueError:
        raise ValueError(f"--target-layer-ids: {text!r} given; write whole numbers with commas: 2,16,29.") from None
