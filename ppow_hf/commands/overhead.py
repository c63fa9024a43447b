"""`ppow overhead`: what the draft-verify loop costs beyond the two models' own forwards, on this machine.

Knows arguments and messages; the clocks are in measure/overhead.py.
"""

import argparse
import json
from typing import Any

from ..data.files import ensure_file_writable, write_whole
from ..data.models import load_prompts, read_prompts
from .options import add_models, add_number, add_prompts, check_fits, check_options, load_pair

UNTIMED = 3  # tokens beside a timed round's drafts: one of each round that reads the prompt, and its own last


def register(subparsers: Any) -> None:
    """Add the parser of `ppow overhead`."""
    parser = subparsers.add_parser(
        "overhead",
        help="measure what the loop costs beyond the models",
        description="Time rounds of the draft-verify loop (fixed windows, T = 0) and, in turns with them, the bare "
        "draft steps and target forwards that such a round is made of; print the ratio.",
    )
    add_models(parser)
    add_prompts(parser)
    add_number(parser, "--num-prompts", 4, "prompts taken")
    add_number(parser, "--max-new-tokens", 64, "tokens generated from each")
    add_number(parser, "--window", 5, "draft tokens a round")
    parser.add_argument("--record", action="store_true", help="with divergences and features in the trace")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to FILE")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    check_options(arguments, "num_prompts", "max_new_tokens", "window")
    if arguments.max_new_tokens < arguments.window + UNTIMED:
        raise ValueError(
            f"--window: {arguments.window} given, and --max-new-tokens {arguments.max_new_tokens} leave no room for "
            f"rounds of it. Pass {arguments.window + UNTIMED} tokens or more, or a shorter window."
        )
    if arguments.json:
        ensure_file_writable(arguments.json, "--json")
    given_prompts = read_prompts(arguments.prompts, arguments.num_prompts)
    target, tokenizer, drafter = load_pair(arguments)
    prompts = load_prompts(
        given_prompts, arguments.num_prompts, tokenizer, target, arguments.max_new_tokens, arguments.chat
    )
    for prompt in prompts:
        check_fits("--prompts", prompt.shape[1], arguments.max_new_tokens, target)
    from ..measure.overhead import measure_overhead

    measured = measure_overhead(
        target, drafter, prompts, arguments.window, arguments.max_new_tokens, record=arguments.record
    )
    print(
        f"round {measured.round_seconds * 1e3:.2f} ms = {measured.ratio:.3f} x ({measured.draft_steps} x draft step "
        f"{measured.draft_step_seconds * 1e3:.2f} ms + target forward {measured.target_seconds * 1e3:.2f} ms); "
        f"medians of {measured.rounds} rounds of {measured.window} draft tokens, acceptance length "
        f"{measured.acceptance_length:.2f}"
    )
    if arguments.json:
        write_whole(arguments.json, json.dumps(measured.to_dict(), indent=2) + "\n")
    return 0
