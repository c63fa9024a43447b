"""`ppow compare`: recipes of training against each other on equal terms.

Knows arguments and models; what is trained, measured and reported is in studies/.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.files import ensure_writable, write_whole
from ..data.models import check_tokenizer, load_drafter, load_target, load_tokenizer
from .options import add_device

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
    add_device(parser, "the models")
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
    from ..studies.compare import Comparison, rehearse
    from ..studies.configuration import load_config, named, where
    from ..studies.texts import check_prompts
    from ..training.recorded_states import StateRecord

    recipes = [name.strip() for name in arguments.recipes.split(",")] if arguments.recipes else None
    config = load_config(arguments.config, arguments.smoke, recipes, arguments.target_states)
    source, place = config.target, where(arguments.config)
    with named("" if arguments.target_states else place):
        record = None if config.target_states is None else StateRecord(*config.target_states)
    start = None
    if config.drafter is not None:
        start = load_drafter(config.drafter, f"{place}drafter", "float32", arguments.device)
    if isinstance(source, dict):
        source = _train_target(config, folder, arguments.device, place, record, start)
    target = load_target(source, f"{place}target", config.dtype, arguments.device)
    tokenizer = load_tokenizer(source, f"{place}target")
    if start is not None:
        check_tokenizer(start, tokenizer, f"{place}drafter")
    with named(place):
        check_prompts(config, tokenizer)
        rehearse(config, target, record, start)
    Comparison(config, folder, target, tokenizer, start, arguments.command).run()
    print((folder / "report.md").read_text(encoding="utf-8"))
    return 0


def _write_mean(folder: Path, compared: list[Path]) -> str:
    """Write mean.md, the mean gains over comparisons that are done, and return its text."""
    from ..studies.mean import mean_report

    for one in compared:
        _check_compared(one, "--mean-of")
    text = mean_report(compared)
    write_whole(folder / "mean.md", text)
    return text


def _train_target(config: "CompareConfig", folder: Path, device: str | None, place: str, *models: Any) -> str:
    """Train what a configuration's `target` describes, or go on with it; the folder that holds it then.

    `models` are the record and the start of [`rehearse`].
    """
    from ..studies.compare import claim_folder, rehearse
    from ..studies.configuration import named, target_recipe
    from ..tiny.recipe import build_target, make_target, texts_of_file

    assert isinstance(config.target, dict)
    recipe, texts, trained = target_recipe(config.target), None, folder / str(config.target_name)
    is_trained = (trained / "recipe.json").is_file()  # written when the weights are
    with named(place):
        if "texts" in config.target:
            texts = texts_of_file(config.target["texts"], "target: texts")
        if not is_trained:
            rehearse(config, build_target(recipe, 0, 1), *models)
    claim_folder(config, folder)  # refuses other settings before anything is trained
    if not is_trained:
        make_target(trained, recipe, device=device, texts=texts)
    return str(trained)


def _check_compared(folder: Path, argument: str) -> None:
    """Raise `ValueError` unless the folder holds the results of a comparison."""
    from ..studies.configuration import RESULTS

    if not (folder / RESULTS).is_file():
        raise ValueError(f"{argument}: {folder.name!r} holds no comparison; run it first.")
