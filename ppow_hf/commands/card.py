"""`ppow card`: a drafter's card from its measurements.

Knows arguments and files; the text is in publish/model_card.py.
"""

import argparse
from typing import Any

from ..data.files import ensure_file_writable
from ..data.models import resolve
from ..tiny import is_embedded


def register(subparsers: Any) -> None:
    """Add the parser of `ppow card`."""
    parser = subparsers.add_parser(
        "card",
        help="write a drafter's card from its measurements",
        description="Write the card of a drafter from the measurements in its folder, and from nothing else.",
    )
    parser.add_argument("folder", metavar="DIR", help="the drafter's folder, or an embedded drafter")
    parser.add_argument("--repository", metavar="USER/NAME", help="the name that the card's examples load")
    parser.add_argument("--output", metavar="FILE", help="the card (default: print it)")
    add_facts(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the card, or write it."""
    from ..publish.model_card import drafter_card

    repository = arguments.repository or (arguments.folder if is_embedded(arguments.folder) else None)
    if arguments.output:
        ensure_file_writable(arguments.output, "--output")
    text = str(drafter_card(resolve(arguments.folder), repository, **facts(arguments)))
    if arguments.output is None:
        print(text)
        return 0
    with open(arguments.output, "w", encoding="utf-8") as file:
        file.write(text)
    return 0


def add_facts(parser: argparse.ArgumentParser) -> None:
    """The arguments for what no measurement says: licence, language, data sets, tags."""
    parser.add_argument("--license", metavar="ID", help="the weights' licence, such as apache-2.0")
    parser.add_argument("--language", metavar="CODE", help="language of the training text, such as en or code")
    parser.add_argument("--dataset", action="append", metavar="NAME", help="a training data set on the Hub")
    parser.add_argument("--card-tag", action="append", default=[], metavar="TAG", help="a further tag of the card")


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of [`add_facts`] as [`drafter_card`] takes them."""
    return {
        "license": arguments.license,
        "language": arguments.language,
        "datasets": arguments.dataset,
        "tags": arguments.card_tag,
    }
