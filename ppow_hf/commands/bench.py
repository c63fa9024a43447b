"""`ppow bench`: ways of generating side by side, at several batch sizes and temperatures, or in a serving engine.

Knows arguments, files and messages; what is run and measured is in measure/benchmark.py and serving/engine_bench.py.
"""

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.files import ensure_file_writable
from ..data.models import STDLIB_PROMPT_TOKENS, check_tokenizer, load_drafter, load_prompts, read_prompts
from ..data.sources import DATA_HELP
from ..serving import engine_bench
from .options import (
    MODEL_HELP,
    add_chat,
    add_models,
    add_number,
    check_needs,
    check_not_negative,
    check_options,
    load_pair,
)

if TYPE_CHECKING:
    from ..runtime.trace import GenerationTrace


def register(subparsers: Any) -> None:
    """Add the parser of `ppow bench`."""
    parser = subparsers.add_parser(
        "bench",
        help="compare ways of generating side by side",
        description="Generate from the same prompts in turns: plain, with prompt lookup, with transformers' own "
        "assisted generation (given a standalone drafter) and with the drafter; print a table.",
    )
    add_models(parser)
    parser.add_argument("--standalone", metavar="MODEL", help=f"a standalone drafter to compare with: {MODEL_HELP}")
    parser.add_argument(
        "--prompts",
        default="stdlib",
        metavar="DATA",
        help=f"{DATA_HELP}; a .txt file with one prompt a line; or stdlib for functions of the standard library, cut "
        f"to their last {STDLIB_PROMPT_TOKENS} tokens (default: %(default)s)",
    )
    add_chat(parser)
    add_number(parser, "--num-prompts", 20, "prompts taken, from the first on")
    add_number(parser, "--max-new-tokens", 64, "tokens generated from each prompt")
    add_number(parser, "--repeats", 1, "times everything is run; speeds are medians")
    parser.add_argument(
        "--thorough",
        action="store_true",
        help="also each of transformers' schedules with 3, 5 and 8 draft tokens, and our own loop, chains and trees",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        nargs="+",
        default=[0.0],
        help="0 takes the likeliest token, above it all ways sample; several make a table each (default: 0)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        nargs="+",
        default=[1],
        help="prompts generated together; several sizes make a table each (default: 1)",
    )
    parser.add_argument(
        "--windows",
        action="store_true",
        help="compare window rules instead: the same as `ppow windows`, whose other options go with it",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the result as JSON (several: FILE-b2-t1.json)")
    parser.add_argument("--plot", metavar="FILE", help="also draw the windows of the adaptive rule as a PNG")
    engine_bench.add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check, load, and run every combination of batch size and temperature."""
    check_options(arguments, "num_prompts", "max_new_tokens", "repeats", "batch_size", "engine_tokens")
    check_not_negative("--temperature", arguments.temperature)
    check_needs(arguments, "engine_python", "engine")
    for name, ending in (("json", ""), ("plot", ".png")):
        if getattr(arguments, name):
            ensure_file_writable(getattr(arguments, name), f"--{name}", ending)
    engine_bench.check(arguments)
    given_prompts = read_prompts(arguments.prompts, arguments.num_prompts)
    target, tokenizer, drafter = load_pair(arguments)
    standalone = None
    if arguments.standalone:
        standalone = load_drafter(arguments.standalone, "--standalone", arguments.dtype, arguments.device)
        check_tokenizer(standalone, tokenizer, "--standalone")
    prompts = load_prompts(
        given_prompts, arguments.num_prompts, tokenizer, target, arguments.max_new_tokens, arguments.chat
    )
    if arguments.engine:
        return engine_bench.run(arguments, target, tokenizer, drafter, prompts)

    from ..measure.benchmark import run_benchmark
    from ..measure.benchmark_report import format_table, plot_windows, verdict, write_benchmark

    several = len(arguments.batch_size) * len(arguments.temperature) > 1
    for batch_size, temperature in itertools.product(arguments.batch_size, arguments.temperature):
        traces: dict[str, list[GenerationTrace]] = {}
        result = run_benchmark(
            target,
            tokenizer,
            drafter,
            prompts,
            standalone=standalone,
            max_new_tokens=arguments.max_new_tokens,
            repeats=arguments.repeats,
            command=arguments.command,
            traces=traces,
            thorough=arguments.thorough,
            temperature=temperature,
            batch_size=batch_size,
        )
        print(format_table(result))
        print(describe(result))
        print(verdict(result) + ("\n" if several else ""))
        suffix = f"-b{batch_size}-t{temperature:g}" if several else ""
        if arguments.json:
            write_benchmark(result, _with_suffix(arguments.json, suffix))
        if arguments.plot:
            plot_windows(traces["ppow_kl"], _with_suffix(arguments.plot, suffix))
    return 0


def describe(result: dict[str, Any]) -> str:
    """What was run, and what a draft step and a target forward took."""
    machine = result["machine"]
    return (
        f"{result['prompts']} prompts, batches of {result['batch_size']}, {result['max_new_tokens']} new tokens each, "
        f"temperature {result['temperature']:g}, {result['dtype']}, on "
        f"{machine['gpu'] if machine['device'] == 'cuda' else machine['processor']}; draft step "
        f"{1e3 * result['draft_step_seconds']:.2f} ms, target forward "
        f"{1e3 * result['target_forward_seconds']:.2f} ms, cost ratio {result['cost_ratio']:.3f}"
    )


def _with_suffix(file: str, suffix: str) -> Path:
    path = Path(file)
    return path.with_name(f"{path.stem}{suffix}{path.suffix}")
