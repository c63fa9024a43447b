"""`ppow write`: the target writes the texts that its drafter will be trained on."""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..data.files import ensure_file_writable
from ..data.models import check_device, default_device, load_config, load_target, load_tokenizer, resolve
from ..data.sources import DATA_HELP, check_source
from ..serving.vllm_runner import vllm_python
from .options import (
    add_chat,
    add_device,
    add_engine_python,
    add_number,
    add_target,
    add_target_dtype,
    check_needs,
    check_not_negative,
    check_options,
)


def register(commands: Any) -> None:
    """Add the parser of `ppow write`."""
    parser = commands.add_parser(
        "write",
        help="have the target write training texts",
        description="The target completes prompts, or answers chats turn by turn; the rows are training data as they "
        "are. Run again with the same file, it goes on where it was.",
    )
    add_target(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompts",
        metavar="DATA",
        help=f"{DATA_HELP}; or a .txt file with one prompt a line. Of messages all the user's turns are asked",
    )
    prompts.add_argument(
        "--self-prompted", type=int, metavar="N", help="an instruct target writes the user's turns of N chats too"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="the .jsonl file to write or to go on with")
    add_chat(parser)
    parser.add_argument("--num-prompts", type=int, help="prompts taken, from the first on (default: all)")
    parser.add_argument(
        "--temperature",
        type=float,
        nargs="+",
        default=[0.0],
        help="0 takes the likeliest token, above it samples; of several, prompts take them in turn (default: 0)",
    )
    add_number(parser, "--max-new-tokens", 512, "tokens of the longest answer")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="prompts of a batch, or requests to a server at once (default: 8)"
    )
    add_number(parser, "--seed", 0, "seed of the samples")
    add_target_dtype(parser)
    add_device(parser, "the target")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--engine", choices=["vllm"], help="write with this engine, in an environment of its own")
    where.add_argument(
        "--server", metavar="URL", help="write with an OpenAI-compatible server; its key is read from OPENAI_API_KEY"
    )
    add_engine_python(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """`ppow write`."""
    _check(arguments)
    from tqdm.auto import tqdm

    from ..data.chats import chat_template_of
    from ..data.writing import read_conversations, self_prompted, write_texts

    tokenizer = load_tokenizer(arguments.target, "--target")
    if arguments.self_prompted:
        conversations = self_prompted(arguments.self_prompted, arguments.temperature, tokenizer, arguments.seed)
    else:
        conversations, duplicates = read_conversations(
            arguments.prompts, arguments.temperature, chat=arguments.chat, count=arguments.num_prompts
        )
        if duplicates:
            print(f"{duplicates} prompts left out: repeated or empty", file=sys.stderr)
        if any(one.pending for one in conversations):
            chat_template_of(tokenizer, "--prompts")
    file = _open_file(arguments)
    left = [one for one in conversations if one.key not in file.done]
    if len(left) < len(conversations):
        print(f"{len(conversations) - len(left)} of {len(conversations)} are written already", file=sys.stderr)
    if not left:
        return 0
    bar = tqdm(total=len(conversations), miniters=0, mininterval=1)
    with bar, _writer(arguments, tokenizer, len(file.done), bar) as writer:
        bar.unpause()  # the engine has started
        written = write_texts(conversations, writer, tokenizer, file, arguments.seed, bar.update)
    print(describe(written, file))
    return 0


def describe(written: Any, file: Any) -> str:
    """What was kept, what was dropped and why, and the speed."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in written.dropped.most_common())
    dropped = f"; dropped: {reasons} ({file.dropped_path.name})" if reasons else "; none dropped"
    return (
        f"{written.rows} rows from {written.conversations} prompts{dropped}; {written.tokens} tokens in "
        f"{written.seconds:.1f} s ({written.tokens_per_second:.1f} tokens/s); {file.path} now has {file.rows} rows"
    )


def _check(arguments: argparse.Namespace) -> None:
    check_options(arguments, "num_prompts", "self_prompted", "max_new_tokens", "batch_size")
    check_not_negative("--temperature", arguments.temperature)
    check_needs(arguments, "engine_python", "engine")
    check_needs(arguments, "num_prompts", "prompts")
    ensure_file_writable(arguments.output, "--output", ".jsonl")
    if arguments.device is not None:
        check_device(arguments.device)
    if arguments.prompts is not None:
        check_source(arguments.prompts, "--prompts")
    if arguments.engine:
        vllm_python(arguments.engine_python)


def _open_file(arguments: argparse.Namespace) -> Any:
    import torch

    from ..data.writing import TextFile
    from ..measure.provenance import describe, public_name

    settings = {
        "target": public_name(arguments.target),
        "self_prompted": arguments.self_prompted is not None,
        "temperature": arguments.temperature,
        "max_new_tokens": arguments.max_new_tokens,
        "seed": arguments.seed,
        "writer": "server" if arguments.server else arguments.engine or "transformers",
    }
    device = torch.device(arguments.device or default_device())
    return TextFile(Path(arguments.output), settings, describe(device, arguments.command))


def _show(bar: Any, count: int, of: int) -> None:
    """Say on `bar` how many of a chunk's requests are answered, as often as it may be drawn."""
    bar.set_postfix_str("" if count == of else f"{count} of the next {of} answers", refresh=False)
    bar.update(0)


def _writer(arguments: argparse.Namespace, tokenizer: Any, done: int, bar: Any) -> Any:
    """A context manager of what writes; vLLM's answers show on `bar` before their chunk is done."""
    from ..data.targets import end_token_ids
    from ..measure.costs import faster_dtype
    from ..serving import text_writers

    if arguments.engine is None and arguments.server is None:
        device = arguments.device or default_device()
        target = load_target(arguments.target, "--target", arguments.dtype or faster_dtype(device), device)
        return nullcontext(
            text_writers.TransformersWriter(target, tokenizer, arguments.max_new_tokens, arguments.batch_size)
        )
    config, generation_config = load_config(arguments.target, "--target")
    context_length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if arguments.server is not None:
        return nullcontext(
            text_writers.ServerWriter(
                arguments.server,
                arguments.target,
                tokenizer,
                arguments.max_new_tokens,
                context_length,
                arguments.batch_size,
            )
        )
    return text_writers.VLLMWriter(
        resolve(arguments.target),
        tokenizer,
        end_token_ids(generation_config or config.get_text_config(), tokenizer),
        arguments.max_new_tokens,
        arguments.engine_python,
        lambda count, of: _show(bar, count, of),
        dtype=arguments.dtype or "auto",
        cpu_dtype=arguments.dtype or faster_dtype("cpu") or "float32",
        seed=arguments.seed + done,  # the engine's, which begins anew: else it would write again what it wrote before
    )
