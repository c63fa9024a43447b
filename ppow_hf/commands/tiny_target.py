"""`ppow tiny-target`: train an embedded target again, or a small one on other texts.

Knows arguments and files; the recipe is in tiny/recipe.py.
"""

import argparse
from typing import Any

from ..data.files import ensure_writable
from ..data.models import load_tokenizer
from .options import check_options


def register(subparsers: Any) -> None:
    """Add the parser of `ppow tiny-target`."""
    parser = subparsers.add_parser(
        "tiny-target",
        help="train an embedded target again from the Python standard library, or a small one on other texts",
        description="Train a small target on the source of the running Python's standard library, or on a file of "
        "texts. Run again with the same folder, it goes on from its last checkpoint.",
    )
    parser.add_argument("--output-dir", required=True, help="folder for the target, its tokenizer and its report")
    parser.add_argument(
        "--family", choices=["llama", "qwen3"], default="llama", help="architecture (default: %(default)s)"
    )
    parser.add_argument(
        "--texts",
        metavar="FILE[:COLUMNS]",
        help="a .jsonl or .jsonl.gz file with a text in each row, and its columns with commas between "
        "(default column: text), in place of the standard library",
    )
    parser.add_argument("--layers", type=int, help="decoder layers (default: those of the recipe)")
    parser.add_argument(
        "--hidden-size",
        type=int,
        help="width, a multiple of 128, by which heads and feed-forward layers grow (default: that of the recipe); "
        "768 with 14 layers are 100 million parameters, for a GPU",
    )
    parser.add_argument("--max-steps", type=int, help="optimizer steps (default: those of the recipe)")
    parser.add_argument("--tokenizer", help="folder of a tokenizer to use instead of training one")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train the target, or go on with it."""
    check_options(arguments, "max_steps", "layers")
    ensure_writable(arguments.output_dir, "--output-dir")
    tokenizer = load_tokenizer(arguments.tokenizer, "--tokenizer") if arguments.tokenizer else None
    from ..tiny.recipe import make_target, recipe_of, texts_of_file

    recipe = recipe_of(
        arguments.family,
        max_steps=arguments.max_steps,
        hidden_size=arguments.hidden_size,
        num_layers=arguments.layers,
    )
    texts = None if arguments.texts is None else texts_of_file(arguments.texts, "--texts")
    make_target(arguments.output_dir, recipe, tokenizer=tokenizer, texts=texts)
    return 0
