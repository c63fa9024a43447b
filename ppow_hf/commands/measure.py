"""`ppow measure`: acceptance for each position and workload, which a drafter's card shows.

Knows arguments and files; the counting is in metrics/ and measure/divergence.py.
"""

import argparse
import json
from typing import Any

from ..data.files import ensure_file_writable
from ..data.models import STDLIB_PROMPT_TOKENS, load_drafter, load_prompts, load_target, read_workloads
from ..data.sources import DATA_HELP
from .options import add_chat, add_models, add_number, check_drafts, check_not_negative, check_options, load_pair

PRINTED = ("workload", "temperature", "window", "acceptance_length", "acceptance_length_interval")


def register(subparsers: Any) -> None:
    """Add the parser of `ppow measure`."""
    parser = subparsers.add_parser(
        "measure",
        help="measure acceptance per position and per workload for the card",
        description="Decode prompts and print the acceptance length by workload, window rule and temperature. --json "
        "writes it by position too; as acceptance.json in the drafter's folder the card shows it.",
    )
    add_models(parser)
    parser.add_argument(
        "--prompts",
        action="append",
        metavar="[NAME=]DATA",
        help=f"a workload, may be given several times: {DATA_HELP}; a .txt file; or stdlib for functions of the "
        f"standard library, cut to their last {STDLIB_PROMPT_TOKENS} tokens (default: stdlib)",
    )
    add_chat(parser)
    add_number(parser, "--num-prompts", 20, "prompts of each")
    add_number(parser, "--max-new-tokens", 64, "tokens after each")
    parser.add_argument("--temperature", default="0", help="temperatures, with commas between (default: %(default)s)")
    parser.add_argument(
        "--window", default="fixed,kl", help="window rules, with commas between (default: %(default)s)"
    )
    parser.add_argument("--max-window", type=int, metavar="N", help="longest window (default: the drafter's own)")
    add_number(parser, "--seed", 0, "seed of the sampling")
    parser.add_argument(
        "--half-precision",
        choices=["bfloat16", "float16"],
        help="also count greedy outputs that differ from plain generate's in this number format, and tell near-ties "
        "from errors (default: --dtype, where it is one of these)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write all of it, such as to DIR/acceptance.json")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Decode the prompts, print what was counted, and write all of it where a file is given."""
    check_options(arguments, "num_prompts", "max_new_tokens", "max_window")
    check_drafts(arguments.max_new_tokens)
    if arguments.json:
        ensure_file_writable(arguments.json, "--json")
    temperatures, windows = _temperatures(arguments.temperature), _windows(arguments.window)
    given_prompts = read_workloads(arguments.prompts or ["stdlib"], arguments.num_prompts)
    target, tokenizer, drafter = load_pair(arguments)
    workloads = {}
    for name, given in given_prompts.items():
        prompts = load_prompts(
            given, arguments.num_prompts, tokenizer, target, arguments.max_new_tokens, arguments.chat
        )
        workloads[name] = [ids[0].tolist() for ids in prompts]
    from ..measure.benchmark_report import write_benchmark
    from ..metrics import measure_acceptance

    result = measure_acceptance(
        target,
        drafter,
        workloads,
        temperatures=temperatures,
        windows=windows,
        max_window=arguments.max_window,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        target_name=arguments.target,
        command=arguments.command,
    )
    every_prompt = [prompt for prompts in workloads.values() for prompt in prompts]
    half_precision = _half_precision(arguments, target, drafter, every_prompt)
    if half_precision is not None:
        result["half_precision"] = half_precision
    if arguments.json:
        write_benchmark(result, arguments.json)
    for row in result["rows"]:
        print(json.dumps({name: row[name] for name in PRINTED}))
    if half_precision is not None:
        print(json.dumps({name: value for name, value in half_precision.items() if name != "first_differences"}))
    return 0


def _half_precision(
    arguments: argparse.Namespace, target: Any, drafter: Any, prompts: list[list[int]]
) -> dict[str, Any] | None:
    """[`measure_divergence`] of the pair, loaded again where it has another number format; `None` in float32."""
    from ..measure.divergence import HALF_PRECISION, measure_divergence

    if arguments.half_precision is None and target.dtype not in HALF_PRECISION:
        return None
    if arguments.half_precision not in (None, str(target.dtype).removeprefix("torch.")):
        target = load_target(arguments.target, "--target", arguments.half_precision, arguments.device)
        drafter = load_drafter(arguments.drafter, "--drafter", arguments.half_precision, arguments.device)
    settings = {"max_window": arguments.max_window} if arguments.max_window else {}
    return measure_divergence(target, drafter, prompts, arguments.max_new_tokens, **settings)


def _temperatures(text: str) -> list[float]:
    """`--temperature` as numbers."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--temperature: {text!r} given; pass numbers with commas between, such as 0,1.") from error
    check_not_negative("--temperature", values)
    return values


def _windows(text: str) -> list[str]:
    """`--window` as names of rules."""
    from ..runtime.configuration_ppow import WINDOWS

    names = text.split(",")
    for name in names:
        if name not in WINDOWS:
            raise ValueError(f"--window: {name!r} is not one of {list(WINDOWS)}. Pass them with commas between.")
    return names
