"""`ppow tiny-results`: everything that quotes the embedded drafters, measured again from their weights.

Knows which commands with which arguments make it, and calls them; measures nothing itself.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from ..data.files import ensure_writable
from ..tiny import EMBEDDED_DRAFTERS, drafter_path
from . import bench, card, measure, windows
from .options import add_number, check_options
from .parsing import parse


def register(subparsers: Any) -> None:
    """Add the parser of `ppow tiny-results`."""
    parser = subparsers.add_parser(
        "tiny-results",
        help="measure the embedded drafters again and write what quotes them",
        description="For each embedded drafter run `ppow measure` and `ppow bench` in its folder and write its card; "
        "then run `ppow windows` with tiny-eagle. To be run on a quiet machine whenever weights have changed.",
    )
    parser.add_argument(
        "drafters", nargs="*", metavar="NAME", help=f"drafters (default: {' '.join(EMBEDDED_DRAFTERS)})"
    )
    parser.add_argument(
        "--output-dir", default="model_cards", help="folder of the cards and of results/windows (default: %(default)s)"
    )
    parser.add_argument(
        "--workloads",
        nargs="+",
        default=[],
        metavar="NAME=DATA",
        help="workloads of the window study beside stdlib; without any the study is left as it is",
    )
    add_number(parser, "--num-prompts", 50, "prompts that acceptance is measured on")
    add_number(parser, "--bench-prompts", 20, "prompts that speed is measured on")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the commands one after the other; the first that fails ends it."""
    check_options(arguments, "num_prompts", "bench_prompts")
    names = arguments.drafters or list(EMBEDDED_DRAFTERS)
    unknown = sorted(set(names) - set(EMBEDDED_DRAFTERS))
    if unknown:
        raise ValueError(f"NAME: {unknown} are no embedded drafters; there are {list(EMBEDDED_DRAFTERS)}.")
    cards = Path(arguments.output_dir)
    ensure_writable(str(cards), "--output-dir")
    for name in names:
        ensure_writable(str(drafter_path(name)), f"the folder of {name}")
    for argv in command_lines(arguments, names, cards):
        print("ppow", *argv[:5], "...", flush=True)
        command = parse(argv, (bench, card, measure, windows))
        command.run(command)
    for name in names:
        shutil.copyfile(drafter_path(name) / "README.md", cards / f"{name}.md")
    return 0


def command_lines(arguments: argparse.Namespace, names: list[str], cards: Path) -> list[list[str]]:
    """The words after `ppow` of every command to run: those that measure a drafter before its card."""
    lines: list[list[str]] = []
    for name in names:
        folder = drafter_path(name)
        pair = ["--target", "tiny", "--drafter", name]
        lines += [
            ["measure", *pair, "--prompts", "stdlib", "--num-prompts", str(arguments.num_prompts), "--temperature",
             "0,1", "--half-precision", "bfloat16", "--json", str(folder / "acceptance.json")],
            ["bench", *pair, "--standalone", "tiny-standalone", "--num-prompts", str(arguments.bench_prompts),
             "--json", str(folder / "benchmark.json"), "--plot", str(folder / "windows.png")],
            ["card", name, "--output", str(folder / "README.md")],
        ]  # fmt: skip
    if arguments.workloads:
        lines.append(
            ["windows", "--target", "tiny", "--drafter", "tiny-eagle", "--prompts", "stdlib", *arguments.workloads,
             "--output-dir", str(cards / "results" / "windows")]
        )  # fmt: skip
    return lines
