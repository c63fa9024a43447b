"""`ppow compare`: recipes of training against each other on equal terms.

Knows arguments and models; what is trained, measured and reported is in studies/.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.models import check_tokenizer, ensure_writable, load_drafter, load_target, load_tokenizer

if TYPE_CHECKING:
    from ..studies.configuration import CompareConfig


def register(subparsers: Any) -> None:
    """Add the parser of `ppow compare`."""
    parser = subparsers.add_parser(
        "compare",
        help="compare recipes of training on equal terms",
        description="From one supervised drafter, train every recipe of a configuration for the same number of "
        "target-forward tokens, and for the same time; choose learning rates on a validation split, measure on a test "
        "split that is read once; write results.jsonl, tables with intervals, and curves. The same command goes on "
        "where it was interrupted.",
    )
    parser.add_argument(
        "--config",
        metavar="FILE_OR_NAME",
        help="a YAML file, or one that is here: default (the embedded pair; hours of a core), 100m (a target of 100 "
        "million parameters, trained first, and the recipes that matter most; minutes of a GPU) or smollm2 (from the "
        "drafter of SmolLM2-135M-Instruct; give its --target_states)",
    )
    parser.add_argument(
        "--target_states",
        "--target-states",
        nargs="+",
        metavar="FOLDER",
        help="folders of ppow record, whose texts and states train every recipe",
    )
    parser.add_argument("--output-dir", required=True, metavar="FOLDER", help="folder for everything it makes")
    parser.add_argument("--recipes", metavar="NAMES", help="only these of the configuration's, with commas between")
    parser.add_argument("--smoke", action="store_true", help="make everything small, to see that it runs (minutes)")
    parser.add_argument(
        "--mean-of",
        metavar="FOLDERS",
        help="only write mean.md: mean gains over these comparisons that are done, with commas between",
    )
    parser.add_argument("--report-only", action="store_true", help="only write the report from what is there")
    parser.add_argument("--device", help="device of the models (default: cuda where there is one, else cpu)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the comparison, or only write a report of one that is done."""
    folder = ensure_writable(arguments.output_dir, "--output-dir")
    if arguments.mean_of:
        print(_write_mean(folder, [Path(name.strip()) for name in arguments.mean_of.split(",")]))
        return 0
    if arguments.report_only:
        from ..studies.report import write_report

        _check_compared(folder, "--output-dir")
        print(write_report(folder).read_text(encoding="utf-8"))
        return 0
    from ..studies.compare import Comparison
    from ..studies.configuration import load_config

    recipes = [name.strip() for name in arguments.recipes.split(",")] if arguments.recipes else None
    config = load_config(arguments.config, arguments.smoke, recipes, arguments.target_states)
    source = config.target
    if isinstance(source, dict):
        source = _train_target(config, source, folder, arguments.device)
    target = load_target(source, "target", config.dtype, arguments.device)
    tokenizer = load_tokenizer(source, "target")
    start = None
    if config.drafter is not None:
        start = load_drafter(config.drafter, "drafter", "float32", arguments.device)
        check_tokenizer(start, tokenizer, "drafter")
    Comparison(config, folder, target, tokenizer, start, arguments.command).run()
    print((folder / "report.md").read_text(encoding="utf-8"))
    return 0


def _write_mean(folder: Path, compared: list[Path]) -> str:
    """Write mean.md, the mean gains over comparisons that are done, and return its text."""
    from ..studies.configuration import write_whole
    from ..studies.mean import mean_report

    for one in compared:
        _check_compared(one, "--mean-of")
    text = mean_report(compared)
    write_whole(folder / "mean.md", text)
    return text


def _train_target(config: "CompareConfig", settings: dict[str, Any], folder: Path, device: str | None) -> str:
    """Train what a configuration's `target` describes, or go on with it; the folder that holds it then."""
    from ..data.sequences import read_rows
    from ..data.sources import split_column
    from ..studies.compare import claim_folder
    from ..studies.configuration import target_recipe
    from ..tiny.corpus import texts_of_rows
    from ..tiny.recipe import make_target

    texts = None
    if "texts" in settings:
        file, columns = split_column(settings["texts"])
        texts = texts_of_rows(read_rows(file, "target: texts"), (columns or "text").split(","), "target: texts")
    claim_folder(config, folder)  # refuses other settings before anything is trained
    target_folder = folder / str(config.target_name)
    if not (target_folder / "recipe.json").is_file():  # written when the weights are
        make_target(target_folder, target_recipe(settings), device=device, texts=texts)
    return str(target_folder)


def _check_compared(folder: Path, argument: str) -> None:
    """Raise `ValueError` unless the folder holds the results of a comparison."""
    from ..studies.configuration import RESULTS

    if not (folder / RESULTS).is_file():
        raise ValueError(f"{argument}: {folder.name!r} holds no comparison; run it first.")
