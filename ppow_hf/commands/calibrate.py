"""`ppow calibrate`: fit a drafter's window rule to prompts of one's own and to this machine.

Knows arguments, files and messages; what is fitted, and how, is in measure/calibration.py.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.files import ensure_writable, write_whole
from ..data.models import load_drafter, resolve
from .options import add_models, add_number, add_prompts, check_drafts, check_options, load_pair
from .windows import read_prompts_to_fit, workload_prompts

if TYPE_CHECKING:
    from ..measure.draft_table import DraftTable
    from ..runtime.cost_model import CostModel


def register(subparsers: Any) -> None:
    """Add the parser of `ppow calibrate`."""
    parser = subparsers.add_parser(
        "calibrate",
        help="fit a drafter's window rule to your prompts and this machine",
        description="Fit what decides how far the drafter drafts: the acceptance it expects from its own distribution "
        "and from what the text repeats, at T = 0 and T = 1, and what a draft step and a verification cost here. For "
        "a drafter that was imported, or is to serve other texts or another machine than it was trained on. No "
        "weight changes, and no token that comes out.",
    )
    add_models(parser)
    parser.add_argument("--output-dir", required=True, metavar="FOLDER", help="where to write the drafter")
    add_prompts(parser, ", that the drafter was not trained on")
    add_number(parser, "--fit-prompts", 16, "prompts to fit on")
    add_number(parser, "--num-prompts", 8, "prompts after them to compare on")
    add_number(parser, "--max-new-tokens", 128, "tokens written after each")
    add_number(parser, "--seed", 0, "of the drafts at T = 1")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Fit, compare on the other prompts, write."""
    check_options(arguments, "num_prompts", "fit_prompts", "max_new_tokens")
    check_drafts(arguments.max_new_tokens)
    folder = ensure_writable(arguments.output_dir, "--output-dir")
    ((name, given),) = read_prompts_to_fit(arguments, [arguments.prompts]).items()
    target, tokenizer, drafter = load_pair(arguments)
    prompts = workload_prompts(name, arguments, given, tokenizer, target)
    from ..measure.calibration import calibrate
    from ..measure.draft_table import draft_tables
    from ..measure.window_report import calibration_curve, check_rounds
    from ..runtime.cost_model import CostModel

    fit_prompts, test_prompts = prompts[: arguments.fit_prompts], prompts[arguments.fit_prompts :]
    window = drafter.config.max_window
    tables = draft_tables(target, drafter, test_prompts, arguments.max_new_tokens, window)
    check_rounds(name, sum(table.tokens for table in tables))
    calibration = calibrate(
        target, drafter, [ids[0].tolist() for ids in fit_prompts], arguments.max_new_tokens, seed=arguments.seed
    )
    check_rounds("the prompts to fit on", calibration["greedy"]["observations"])
    costs = CostModel(**calibration["costs"], one_step=drafter.config.one_step)
    greedy = calibration["greedy"]
    print(
        f"{greedy['observations']} draft tokens seen at T = 0, {greedy['acceptance']:.0%} kept; "
        f"a draft step costs {costs.cost_ratio:.3f} of a target forward, a token to verify "
        f"{costs.verification_cost:.3f}."
    )
    print(describe_speed("before", drafter.config.calibration or {}, tables, window, costs))
    print(describe_speed("now", calibration, tables, window, costs))
    error = calibration_curve(greedy, tables)["expected_error"]
    print(f"Between expected and measured acceptance lie {error:.3f} on average.")
    write_calibration(arguments.drafter, calibration, tokenizer, folder)
    print(f"Written to {arguments.output_dir}.")
    return 0


def describe_speed(
    when: str, calibration: dict[str, Any], tables: "list[DraftTable]", window: int, costs: "CostModel"
) -> str:
    """One line: how fast the adaptive rule of this calibration is on the tables, and what it wastes."""
    from ..measure.window_report import run as replay_all
    from ..measure.window_report import speed
    from ..runtime.windowing import make_window_rule

    make_rule = partial(make_window_rule, "kl", window, calibration=calibration)
    speeds = speed(replay_all(make_rule, tables, costs, as_one=False), costs)
    return (
        f"{when}: {speeds['tokens_per_cost']:.3f} tokens per target forward's time on {len(tables)} other "
        f"prompts, mean window {speeds['mean_window']:.2f}, {speeds['wasted']:.0%} of the drafts wasted."
    )


def write_calibration(drafter_name: str, calibration: dict[str, Any], tokenizer: Any, folder: Path) -> None:
    """Save the drafter with this calibration in `folder`; its own folder gets a new configuration only."""
    source = Path(resolve(drafter_name))
    if source.is_dir() and source.resolve() == folder.resolve():
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | {"calibration": calibration}
        write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
        return
    drafter = load_drafter(drafter_name, "--drafter", "auto", "cpu")  # in the number format it is kept in
    drafter.config.calibration = calibration
    drafter.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
