"""`ppow tiny-drafter`: train an embedded drafter again for an embedded target.

Knows arguments and files; the recipe is in tiny/drafters.py.
"""

import argparse
from pathlib import Path
from typing import Any

from ..data.files import ensure_writable
from ..data.models import load_target, load_tokenizer
from ..tiny import is_embedded
from .options import MODEL_HELP, add_number, check_options


def register(subparsers: Any) -> None:
    """Add the parser of `ppow tiny-drafter`."""
    parser = subparsers.add_parser(
        "tiny-drafter",
        help="train an embedded drafter again for an embedded target",
        description="Let the target write text from excerpts of the standard library, then train a drafter on it: "
        "an eagle one supervised, a standalone one supervised and then with PPOW.",
    )
    parser.add_argument("--output-dir", required=True, help="folder for the drafter and its training log")
    parser.add_argument("--target", default="tiny", metavar="MODEL", help=f"the target: {MODEL_HELP}")
    parser.add_argument(
        "--architecture", choices=["eagle", "standalone"], default="eagle", help="architecture (default: %(default)s)"
    )
    add_number(parser, "--minutes", 60.0, "time for all training stages together")
    add_number(parser, "--sequences", 4000, "texts that the target writes first")
    parser.add_argument(
        "--start", metavar="FOLDER", help="go on with a drafter that this command made (its supervised stage, if kept)"
    )
    add_number(parser, "--seed", 0, "seed of data and training")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train the drafter for the given time."""
    check_options(arguments, "minutes", "sequences")
    for file in ("training_log.json", "config.json"):
        if arguments.start and not Path(arguments.start, file).is_file():
            raise FileNotFoundError(f"--start: {arguments.start!r} has no {file}; pass what `ppow tiny-drafter` made.")
    ensure_writable(arguments.output_dir, "--output-dir")
    target = load_target(arguments.target, "--target", None, None)
    tokenizer = load_tokenizer(arguments.target, "--target")
    from ..tiny.drafters import make_drafter

    make_drafter(
        arguments.output_dir,
        arguments.architecture,
        target,
        tokenizer,
        seconds=60 * arguments.minutes,
        sequences=arguments.sequences,
        seed=arguments.seed,
        target_name=arguments.target if is_embedded(arguments.target) else None,
        start=arguments.start,
        command=arguments.command,
    )
    return 0
