"""`ppow windows`: what each window rule is worth, on a table of drafts from every prefix of the target's text.

Knows arguments, files and messages; tables are in measure/draft_table.py, the study in measure/window_report.py.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.files import ensure_writable
from ..data.models import load_prompts, read_workloads
from .options import add_chat, add_models, add_number, check_drafts, check_not_negative, check_options, load_pair

if TYPE_CHECKING:
    import torch

    from ..data.models import Prompts
    from ..runtime.modeling_ppow import PPOWDrafter

PLOTTED_COST = "0.12"
MACHINE = "this machine"


def register(subparsers: Any) -> None:
    """Add the parser of `ppow windows`."""
    parser = subparsers.add_parser(
        "windows",
        help="compare window rules on drafts from every prefix of the target's text",
        description="Let the target write greedily, draft 16 tokens from every prefix of its text, and replay every "
        "window rule on that table at several costs: fixed windows of 0 to 16, transformers' rules, an entropy stop, "
        "the adaptive rule, and the oracle that knows each verdict before. The adaptive rule's estimate is "
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
    add_chat(parser)
    add_number(parser, "--num-prompts", 20, "prompts of each workload to compare on")
    add_number(parser, "--fit-prompts", 10, "prompts of each workload to fit on")
    add_number(parser, "--max-new-tokens", 128, "tokens written after each prompt")
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
    add_number(parser, "--live", 3, "prompts of each workload decoded as a check")
    parser.add_argument("--output-dir", metavar="FOLDER", help="folder for windows.json and the plots")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check, load, study, print, write."""
    check_options(arguments, "num_prompts", "fit_prompts", "max_new_tokens", "segment_tokens")
    check_drafts(arguments.max_new_tokens)
    check_not_negative("--cost-ratios", arguments.cost_ratios)
    check_not_negative("--live", [arguments.live])
    if arguments.output_dir:
        ensure_writable(arguments.output_dir, "--output-dir")
    workloads = read_prompts_to_fit(arguments, arguments.prompts)
    target, tokenizer, drafter = load_pair(arguments)
    prompts = {name: workload_prompts(name, arguments, given, tokenizer, target) for name, given in workloads.items()}
    from ..measure.window_report import format_study

    result = study_windows(arguments, target, drafter, prompts)
    print(format_study(result))
    for name, check in result.get("live", {}).items():
        print(
            f"live, {name}: text the same in {check['same_text']} of {check['texts']}, rounds the same in "
            f"{check['same_rounds']}; {check['live_tokens_per_cost']:.3f} tokens per cost, replayed "
            f"{check['replayed_tokens_per_cost']:.3f}"
        )
    if arguments.output_dir:
        write_study(result, Path(arguments.output_dir))
    return 0


def study_windows(
    arguments: argparse.Namespace, target: Any, drafter: "PPOWDrafter", prompts: "dict[str, list[torch.Tensor]]"
) -> dict[str, Any]:
    """The content of windows.json: the study on the prompts after those to fit on, by workload."""
    from ..measure import provenance
    from ..measure.costs import measure_costs
    from ..measure.draft_table import DEPTH, draft_tables
    from ..measure.window_report import calibration_curve, describe_workload, live_check, study
    from ..runtime.cost_model import CostModel

    any_prompt = next(iter(prompts.values()))[0]
    measured = measure_costs(target, drafter, any_prompt, max_window=16)
    one_step = drafter.config.one_step
    costs = {f"{ratio:g}": CostModel(ratio, 0.0, one_step) for ratio in arguments.cost_ratios}
    costs[MACHINE] = CostModel(measured.cost_ratio, measured.verification_cost, one_step)
    depth = min(DEPTH, drafter.config.longest_window or DEPTH)
    fit_tables, test_tables = {}, {}
    for name, workload in prompts.items():
        print(f"writing and drafting: {name}", file=sys.stderr)
        tables = draft_tables(target, drafter, workload, arguments.max_new_tokens, depth)
        fit_tables[name], test_tables[name] = tables[: arguments.fit_prompts], tables[arguments.fit_prompts :]
    print("replaying", file=sys.stderr)
    result, calibration = study(fit_tables, test_tables, costs, arguments.segment_tokens)
    result["workloads"] = {name: describe_workload(tables) for name, tables in test_tables.items()}
    result["calibration"] = calibration
    result["calibration_curves"] = {
        name: calibration_curve(calibration["greedy"], tables) for name, tables in test_tables.items()
    }
    if arguments.live > 0:
        print("decoding in earnest", file=sys.stderr)
        checked = [table for tables in test_tables.values() for table in tables[: arguments.live]]
        result["live"] = live_check(target, drafter, checked, calibration["greedy"], CostModel(0.12, 0.0, one_step))
    result["costs"] = {"cost_ratio": measured.cost_ratio, "verification_cost": measured.verification_cost}
    result["provenance"] = provenance.describe(
        target.device,
        arguments.command,
        target=Path(arguments.target).name,
        drafter=Path(arguments.drafter).name,
    )
    return result


def write_study(result: dict[str, Any], folder: Path) -> None:
    """Write windows.json, and draw windows.png and calibration.png."""
    from ..measure.benchmark_report import write_benchmark
    from ..measure.plots import plot_curves
    from ..measure.window_report import OURS, calibration_panels, speed_panels

    write_benchmark(result, folder / "windows.json")
    cost_names = [one["cost"] for one in result["results"]]
    plotted = PLOTTED_COST if PLOTTED_COST in cost_names else cost_names[0]
    speeds = speed_panels(result, plotted)
    plot_curves(
        *speeds.values(),
        folder / "windows.png",
        title=f"tokens per one-token target forward at cost ratio {plotted}",
        x_label="fixed window",
        panel_titles=list(speeds),
    )
    curves = calibration_panels(result["calibration_curves"])
    plot_curves(
        *curves.values(),
        folder / "calibration.png",
        title=f"acceptance of reached draft tokens by position in the window, {OURS}",
        x_label="position in the window",
        panel_titles=list(curves),
    )


def read_prompts_to_fit(arguments: argparse.Namespace, texts: list[str]) -> "dict[str, Prompts]":
    """The prompts of each workload, before anything is loaded: to fit on and to compare on."""
    count = arguments.fit_prompts + arguments.num_prompts
    return read_workloads(texts, count, "--fit-prompts and --num-prompts")


def workload_prompts(
    name: str, arguments: argparse.Namespace, given: "Prompts", tokenizer: Any, target: Any
) -> list[Any]:
    """Token ids `[1, n]` of the workload's first prompts: those to fit on, then those to compare on."""
    count = arguments.fit_prompts + arguments.num_prompts
    prompts = load_prompts(given, count, tokenizer, target, arguments.max_new_tokens, arguments.chat)
    if len(prompts) <= arguments.fit_prompts:
        raise ValueError(
            f"--fit-prompts: {arguments.fit_prompts} of the {len(prompts)} prompts of {name} are to be fitted on, "
            "which leaves none to compare on. Pass fewer, or more prompts."
        )
    return prompts
