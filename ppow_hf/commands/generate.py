"""`ppow generate`: continue a prompt with a target and a drafter.

Knows arguments and how a call's trace is told; the drafting is `generate`'s own.
"""

import argparse
import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from .options import add_models, add_number, check_fits, check_not_negative, check_options, check_seed, load_pair

if TYPE_CHECKING:
    from ..runtime.trace import GenerationTrace


def register(subparsers: Any) -> None:
    """Add the parser of `ppow generate`."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt with a target and a drafter",
        description="Continue a prompt. The text goes to stdout, a summary of the drafting to stderr.",
    )
    add_models(parser)
    parser.add_argument("--prompt", required=True, help="the text to continue, or - to read it from stdin")
    add_number(parser, "--max-new-tokens", 128, "most tokens to generate")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0 takes the likeliest token each time; above, sample (default: 0)",
    )
    add_number(parser, "--seed", 0, "seed of the sampling")
    parser.add_argument(
        "--window", choices=["kl", "fixed", "heuristic"], help="rule for the window (default: the drafter's own)"
    )
    parser.add_argument(
        "--max-window", type=int, metavar="N", help="longest window in tokens (default: the drafter's own)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with the text and the trace")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Continue the prompt and print the text."""
    check_options(arguments, "max_new_tokens", "max_window")
    check_not_negative("--temperature", [arguments.temperature])
    check_seed(arguments.seed)
    prompt = read_stdin() if arguments.prompt == "-" else arguments.prompt
    target, tokenizer, drafter = load_pair(arguments)
    input_ids = tokenizer(prompt, return_tensors="pt")["input_ids"].long()
    check_fits("--prompt", input_ids.shape[1], arguments.max_new_tokens, target)
    settings = {
        name: getattr(arguments, name) for name in ("window", "max_window") if getattr(arguments, name) is not None
    }
    assistant = drafter.with_settings(**settings)
    sampling: dict[str, Any] = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature}
        from transformers import set_seed

        set_seed(arguments.seed)
    started = time.perf_counter()
    output = target.generate(
        input_ids.to(target.device),
        attention_mask=input_ids.new_ones(input_ids.shape).to(target.device),
        max_new_tokens=arguments.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        assistant_model=assistant,
        **sampling,
    )
    new_ids = output[0, input_ids.shape[1] :].tolist()
    seconds = time.perf_counter() - started  # the tokens are here: the device has finished
    text = tokenizer.decode(new_ids, skip_special_tokens=True)
    summary = summarize_trace(assistant.last_trace, len(new_ids), seconds)
    if arguments.json:
        rounds = [dataclasses.asdict(one_round) for one_round in assistant.last_trace.rounds]
        print(json.dumps({"prompt": prompt, "text": text, "trace": {**summary, "rounds": rounds}}))
        return 0
    print(prompt + text)
    print(format_summary(summary), file=sys.stderr)
    return 0


def read_stdin() -> str:
    """What stands on stdin; `ValueError` unless it is text."""
    try:
        text = sys.stdin.read()
        text.encode()  # where stdin lets bytes through that are no text
    except UnicodeError as error:
        raise ValueError("--prompt: what stands on stdin is not UTF-8 text. Convert it to UTF-8.") from error
    return text


def summarize_trace(trace: "GenerationTrace", new_tokens: int, seconds: float) -> dict[str, Any]:
    """The numbers of a call's trace that a person wants to see."""
    return {
        "new_tokens": new_tokens,
        "seconds": seconds,
        "tokens_per_second": new_tokens / seconds,
        "window": trace.window_rule,
        "target_forwards": len(trace.rounds),
        "tokens_per_target_forward": trace.tokens_per_target_forward,
        "acceptance_length": trace.acceptance_length,
        "drafted": trace.drafted,
        "accepted": trace.accepted,
        "wasted": trace.wasted,
        "cost_ratio": trace.cost_ratio,
        "verification_cost": trace.verification_cost,
        "speculation_pays": trace.speculation_pays,
    }


def format_summary(summary: dict[str, Any]) -> str:
    """[`summarize_trace`]'s numbers as three lines of text."""
    pays = "" if summary["speculation_pays"] else "\nspeculation does not pay here: the window rule stopped drafting"
    return (
        f"{summary['new_tokens']} new tokens in {summary['seconds']:.2f} s "
        f"({summary['tokens_per_second']:.1f} tokens/s), {summary['target_forwards']} target forwards "
        f"({summary['tokens_per_target_forward']:.2f} tokens each)\n"
        f"window rule {summary['window']}: {summary['drafted']} tokens drafted, {summary['accepted']} accepted, "
        f"{summary['wasted']:.0%} wasted; acceptance length {summary['acceptance_length']:.2f} (the target's own "
        f"token counted); cost ratio {summary['cost_ratio']:.3f}{pays}"
    )
