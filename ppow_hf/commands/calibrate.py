"""`ppow calibrate`: fit a drafter's window rule to prompts of one's own and to this machine."""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from ..data.models import (
    add_models,
    check_positive,
    ensure_writable,
    load_drafter,
    load_pair,
    parse_workload,
    resolve,
)
from .windows import workload_prompts


def register(commands: Any) -> None:
    """Add the parser of `ppow calibrate`."""
    parser = commands.add_parser(
        "calibrate",
        help="fit a drafter's window rule to your prompts and this machine",
        description="Fit what decides how far the drafter drafts: the acceptance it expects from its own distribution "
        "and from what the text repeats, at T = 0 and T = 1, and what a draft step and a verification cost here. For "
        "a drafter that was imported, or is to serve other texts or another machine than it was trained on. No "
        "weight changes, and no token that comes out.",
    )
    add_models(parser)
    parser.add_argument("--output-dir", required=True, metavar="FOLDER", help="where to write the drafter")
    parser.add_argument(
        "--prompts",
        default="stdlib",
        metavar="DATA",
        help="prompts as for `ppow bench`, that the drafter was not trained on (default: %(default)s)",
    )
    parser.add_argument("--fit-prompts", type=int, default=16, help="prompts to fit on (default: %(default)s)")
    parser.add_argument(
        "--num-prompts", type=int, default=8, help="prompts behind them to compare on (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, help="tokens written behind each (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the drafts at T = 1 (default: %(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Fit, compare on the other prompts, write."""
    for name in ("num_prompts", "fit_prompts", "max_new_tokens"):
        check_positive(f"--{name.replace('_', '-')}", getattr(arguments, name))
    name, source = parse_workload(arguments.prompts)
    folder = ensure_writable(arguments.output_dir, "--output-dir")
    target, tokenizer, drafter = load_pair(arguments)
    prompts = workload_prompts(name, arguments, source, tokenizer, target)
    from ..measure.calibration import (
        calibrate,
    )
    from ..measure.window_report import calibration_curve, run, speed
    from ..measure.window_study import draft_tables
    from ..runtime.windowing import CostModel, make_window_rule
    from ..studies.configuration import write_whole

    fitted, checked = prompts[: arguments.fit_prompts], prompts[arguments.fit_prompts :]
    before = drafter.config.calibration or {}
    found = calibrate(
        target, drafter, [ids[0].tolist() for ids in fitted], arguments.max_new_tokens, seed=arguments.seed
    )
    window = drafter.config.max_window
    tables = draft_tables(target, drafter, checked, arguments.max_new_tokens, window)
    costs = CostModel(**found["costs"])
    print(
        f"{found['greedy']['observations']} draft tokens seen at T = 0, {found['greedy']['acceptance']:.0%} kept; "
        f"a draft step costs {costs.cost_ratio:.3f} of a target forward, a token to verify "
        f"{costs.verification_cost:.3f}."
    )
    for when, calibration in (("before", before), ("now", found)):
        make_rule = partial(make_window_rule, "kl", window, calibration=calibration)
        traces = run(make_rule, tables, costs, as_one=False)
        speeds = speed(traces, costs)
        print(
            f"{when}: {speeds['tokens_per_cost']:.3f} tokens per target forward's time on {len(checked)} other "
            f"prompts, mean window {speeds['mean_window']:.2f}, {speeds['wasted']:.0%} of the drafts wasted."
        )
    error = calibration_curve(found["greedy"], tables)["expected_error"]
    print(f"Between expected and measured acceptance lie {error:.3f} on average.")
    own = Path(resolve(arguments.drafter))
    if own.is_dir() and own.resolve() == folder.resolve():
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | {"calibration": found}
        write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    else:
        written = load_drafter(arguments.drafter, "--drafter", "auto", "cpu")  # in the number format it is kept in
        written.config.calibration = found
        written.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"Written to {arguments.output_dir}.")
    return 0
