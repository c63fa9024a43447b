"""Turns a command line into the arguments that a command's `run` reads.

Knows argparse and the interface of a command's module; runs nothing.
"""

import argparse
import shlex
from collections.abc import Sequence
from types import ModuleType

from . import train
from .typed import plain


def build_parser(commands: Sequence[ModuleType]) -> argparse.ArgumentParser:
    """The `ppow` parser with these commands."""
    parser = argparse.ArgumentParser(
        prog="ppow",
        description="Train drafters for speculative decoding, generate with them, and measure what they gain.",
        epilog="Set PPOW_DEBUG=1 to see the traceback of an error.",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in commands:
        command.register(subparsers)
    return parser


def spellings(name: str, commands: Sequence[ModuleType]) -> dict[str, str]:
    """The arguments of the command `name` as its user types them, by what the library calls them (`max_length`)."""
    if name == "train":
        parser: argparse.ArgumentParser | None = train.build_parser()
    else:
        groups = (action.choices for action in build_parser(commands)._actions if isinstance(action.choices, dict))
        parser = next(groups).get(name)
    found: dict[str, str] = {}
    for action in [] if parser is None else parser._actions:
        shown = action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)
        found |= {plain(spelled): shown for spelled in action.option_strings or [action.dest]}
    return found


def parse(argv: Sequence[str], commands: Sequence[ModuleType]) -> argparse.Namespace:
    """The arguments of `ppow ARGV`; `run` is the command's function, `command` the line as typed."""
    arguments = build_parser(commands).parse_args(argv)
    arguments.command = shlex.join(["ppow", *argv])
    return arguments
