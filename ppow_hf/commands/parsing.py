"""Turns a command line into the arguments that a command's `run` reads.

Knows argparse and the interface of a command's module; runs nothing.
"""

import argparse
import shlex
from collections.abc import Sequence
from types import ModuleType


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


def parse(argv: Sequence[str], commands: Sequence[ModuleType]) -> argparse.Namespace:
    """The arguments of `ppow ARGV`; `run` is the command's function, `command` the line as typed."""
    arguments = build_parser(commands).parse_args(argv)
    arguments.command = shlex.join(["ppow", *argv])
    return arguments
