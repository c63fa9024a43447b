"""`ppow windows`: what each window rule is worth, on a table of drafts from every prefix of the target's text."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ..data.models import (
    add_models,
    check_positive,
    ensure_writable,
    load_pair,
    load_prompts,
    parse_workload,
)

PLOTTED_COST = "0.12"
MACHINE = "this machine"


def register(commands: Any) -> None:
    """Add the parser of `ppow windows`."""
    parser = commands.add_parser(
        "windows",
        help="compare window rules on drafts from every prefix of the target's text",
        description="Let the target write greedily, draft 16 tokens from every prefix of its text, and replay every "
        "window rule on that table at several costs: fixed windows of 0 to 16, transformers' rules, an entropy stop, "
        "the adaptive rule, and the clairvoyant that knows each verdict before. The adaptive rule's estimate is "
        "fitted on the first prompts of each workload; the numbers are from the others. Some prompts are decoded in "
        "earnest to check the replay.",
    )
    add_models(parser)
    parser.add_argument(
        "--prompts",
        nargs="+",
        default=["stdlib"],
        metavar="[NAME=]DATA",
        help="workloads, each data as for `ppow bench` (default: stdlib)",
    )
    parser.add_argument(
        "--num-prompts", type=int, default=20, help="prompts of each workload to compare on (default: %(default)s)"
    )
    parser.add_argument(
        "--fit-prompts", type=int, default=10, help="prompts of each workload to fit on (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, help="tokens written behind each prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--cost-ratios",
        type=float,
        nargs="+",
        default=[0.03, 0.12, 0.3],
        metavar="GAMMA",
        help="draft step over target forward, beside this machine's own costs (default: 0.03 0.12 0.3)",
    )
    parser.add_argument(
        "--segment-tokens",
        type=int,
        default=256,
        help="tokens after which the mixed stream changes workload (default: %(default)s)",
    )
    parser.add_argument(
        "--live", type=int, default=3, help="prompts of each workload decoded as a check (default: %(default)s)"
    )
    parser.add_argument("--output-dir", metavar="FOLDER", help="folder for windows.json and the plots")
    parser.set_defaults(run=windows)


def windows(arguments: argparse.Namespace) -> int:
    """`ppow windows`."""
    for name in ("num_prompts", "fit_prompts", "max_new_tokens", "segment_tokens"):
        check_positive(f"--{name.replace('_', '-')}", getattr(arguments, name))
    if arguments.output_dir:
        ensure_writable(arguments.output_dir, "--output-dir")
    if any(ratio < 0 for ratio in arguments.cost_ratios):
        raise ValueError(f"--cost-ratios: {arguments.cost_ratios} given; a cost is 0 or more.")
    workloads = dict(parse_workload(text) for text in arguments.prompts)
    target, tokenizer, drafter = load_pair(arguments)
    prompts = {
        name: workload_prompts(name, arguments, source, tokenizer, target) for name, source in workloads.items()
    }

    from ..measure import (
        provenance,
    )
    from ..measure.benchmark_report import (
        write_benchmark,
    )
    from ..measure.costs import (
        measure_costs,
    )
    from ..measure.evaluation import repeated_ngrams
    from ..measure.window_report import (
        OURS,
        calibration_curve,
        calibration_panels,
        format_study,
        live_check,
        speed_panels,
        study,
    )
    from ..measure.window_study import DEPTH, draft_tables
    from ..runtime.windowing import CostModel

    any_prompt = next(iter(prompts.values()))[0]
    measured = measure_costs(target, drafter, any_prompt, max_window=16)
    costs = {f"{ratio:g}": CostModel(ratio, 0.0) for ratio in arguments.cost_ratios}
    costs[MACHINE] = CostModel(measured.cost_ratio, measured.verification_cost)
    depth = min(DEPTH, drafter.config.longest_window or DEPTH)
    tables = {}
    for name, these in prompts.items():
        print(f"writing and drafting: {name}", file=sys.stderr)
        tables[name] = draft_tables(target, drafter, these, arguments.max_new_tokens, depth)
    fitting = {name: these[: arguments.fit_prompts] for name, these in tables.items()}
    testing = {name: these[arguments.fit_prompts :] for name, these in tables.items()}
    print("replaying", file=sys.stderr)
    found, calibration = study(fitting, testing, costs, arguments.segment_tokens)
    found["workloads"] = {
        name: {
            "prompts": len(these),
            "tokens": sum(table.tokens for table in these),
            "mean_accepted_of_16": sum(int(table.accepted.sum()) for table in these)
            / max(sum(table.tokens for table in these), 1),
            "repeated_8grams": repeated_ngrams([table.text.tolist() for table in these], 8),
        }
        for name, these in testing.items()
    }
    found["calibration"] = calibration
    found["calibration_curves"] = {
        name: calibration_curve(calibration["greedy"], these) for name, these in testing.items()
    }
    if arguments.live > 0:
        print("decoding in earnest", file=sys.stderr)
        checked = [table for these in testing.values() for table in these[: arguments.live]]
        found["live"] = live_check(target, drafter, checked, calibration["greedy"], CostModel(0.12, 0.0))
    found["costs"] = {"cost_ratio": measured.cost_ratio, "verification_cost": measured.verification_cost}
    found["provenance"] = provenance.describe(
        target.device,
        arguments.command,
        target=Path(arguments.target).name,
        drafter=Path(arguments.drafter).name,
    )
    print(format_study(found))
    for name, check in found.get("live", {}).items():
        print(
            f"live, {name}: text the same in {check['same_text']} of {check['texts']}, rounds the same in "
            f"{check['same_rounds']}; {check['live_tokens_per_cost']:.3f} tokens per cost, replayed "
            f"{check['replayed_tokens_per_cost']:.3f}"
        )
    if arguments.output_dir:
        from ..measure.plots import plot_curves

        folder = Path(arguments.output_dir)
        write_benchmark(found, folder / "windows.json")
        shown = PLOTTED_COST if PLOTTED_COST in costs else next(iter(costs))
        speeds = speed_panels(found, shown)
        plot_curves(
            *speeds.values(),
            folder / "windows.png",
            title=f"tokens per one-token target forward at cost ratio {shown}",
            x_label="fixed window",
            panel_titles=list(speeds),
        )
        curves = calibration_panels(found["calibration_curves"])
        plot_curves(
            *curves.values(),
            folder / "calibration.png",
            title=f"acceptance of reached draft tokens by position in the window, {OURS}",
            x_label="position in the window",
            panel_titles=list(curves),
        )
    return 0


def workload_prompts(name: str, arguments: argparse.Namespace, source: str, tokenizer: Any, target: Any) -> list[Any]:
    """Token ids `[1, n]` of the workload's first prompts: those to fit on, then those to compare on."""
    count = arguments.fit_prompts + arguments.num_prompts
    prompts = load_prompts(source, count, tokenizer, target, arguments.max_new_tokens)
    if len(prompts) <= arguments.fit_prompts:
        raise ValueError(
            f"--fit-prompts: {arguments.fit_prompts} of the {len(prompts)} prompts of {name} are to be fitted on, "
            "which leaves none to compare on. Pass fewer, or more prompts."
        )
    return prompts
