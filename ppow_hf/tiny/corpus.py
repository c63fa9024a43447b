"""Texts to train a small target on: Python's own standard library or a file of rows, split in held in and held out.

Knows files, modules and rows; knows nothing about models or training.
"""

import ast
import functools
import hashlib
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Generated tables (code pages, documentation topics, build configuration) and third-party packages are not code that
# a person wrote in the style of the rest, and would be a tenth of the corpus.
EXCLUDED_PARTS = {"site-packages", "__pycache__", "encodings", "pydoc_data", "lib2to3", "turtledemo"}
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")
HELD_OUT_SHARE = 10  # one module in ten


@dataclass(frozen=True)
class SourceFile:
    """One module of the standard library: its dotted name, its text, and the side of the split it is on."""

    name: str
    text: str
    held_out: bool


def is_held_out(dotted_name: str) -> bool:
    """Whether a module is kept for evaluation: SHA-256 of its last name, without `test_`, modulo ten equals zero.

    `test.test_textwrap` falls on the side of `textwrap`, so that a held-out module's tests are held out with it.
    """
    parts = dotted_name.split(".")
    key = parts[-2] if parts[-1] == "__init__" and len(parts) > 1 else parts[-1]
    key = key.removeprefix("test_").strip("_")
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % HELD_OUT_SHARE == 0


def standard_library() -> list[SourceFile]:
    """All modules of the running Python's standard library, in order of their names.

    Raises `FileNotFoundError` where it has no source, as in a Python that ships only bytecode.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if EXCLUDED_PARTS.intersection(parts) or any(part.startswith(EXCLUDED_PREFIXES) for part in parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a handful of test files are in other encodings on purpose
        name = ".".join(parts)
        if text.strip():
            files.append(SourceFile(name, text, is_held_out(name)))
    if not files:
        raise FileNotFoundError(
            f"no Python source found under {str(root)!r}. Install a Python that ships its standard library as source."
        )
    return files


def held_in_and_out(files: list[SourceFile]) -> tuple[list[SourceFile], list[SourceFile]]:
    """Both sides of the split: files to train on, and files to evaluate on."""
    return [file for file in files if not file.held_out], [file for file in files if file.held_out]


def texts_of_rows(rows: list[dict], columns: list[str], source: str) -> list[SourceFile]:
    """One text of each row: its `columns`, a line each. One row in ten, by a hash of the text, is held out.

    Raises `ValueError` naming `source` and the column that a row lacks, and if there is nothing on one of the sides.
    """
    files = []
    for number, row in enumerate(rows):
        for column in columns:
            if not isinstance(row.get(column), str):
                raise ValueError(f"{source}: row {number} has no text in {column!r}; it has {sorted(row)}.")
        text = "\n".join(row[column] for column in columns)
        digest = hashlib.sha256(text.encode()).digest()
        files.append(SourceFile(str(number), text, int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0))
    if len({file.held_out for file in files}) < 2:
        raise ValueError(f"{source}: {len(files)} rows are too few to hold some of them out; pass at least a hundred.")
    return files


def openings(files: list[SourceFile], count: int) -> list[str]:
    """The first line of `count` texts, with its line break."""
    return [file.text.splitlines(keepends=True)[0] for file in files if file.text.strip()][:count]


def excerpts(files: list[SourceFile], tokenizer: Any, count: int, length: int, seed: int) -> list[dict[str, str]]:
    """`count` excerpts of `length` tokens from files chosen at random, as rows of text.

    Only what is chosen is encoded, beside files that may be too short.
    """

    @functools.cache
    def encoded(place: int) -> list[int]:
        return tokenizer(files[place].text, add_special_tokens=False, verbose=False)["input_ids"]

    surely_longer = length * max(map(len, tokenizer.get_vocab()))
    places = [n for n, file in enumerate(files) if len(file.text) > surely_longer or len(encoded(n)) > length]
    chooser, rows = random.Random(seed), []
    for _ in range(count):
        tokens = encoded(chooser.choice(places))
        start = chooser.randrange(len(tokens) - length)
        rows.append({"text": tokenizer.decode(tokens[start : start + length])})
    return rows


def corpus_fingerprint(files: list[SourceFile]) -> str:
    """Short hash of the names and texts, for the provenance record."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.text.encode() + b"\0")
    return digest.hexdigest()[:16]


def function_prompts(
    files: list[SourceFile],
    count: int,
    seed: int = 0,
    prompt_lines: int = 12,
    choices: int = 1,
    argument: str = "count",
) -> list[str]:
    """`choices` times `count` prompts, each the beginning of a function with the lines before it.

    A prompt ends after the function's signature and docstring, so that what follows is its body. Raises `ValueError`
    naming `argument`, as which the count was given, where the files hold too few functions.
    """
    candidates: list[str] = []
    for file in files:
        try:
            tree = ast.parse(file.text)
        except (SyntaxError, ValueError):
            continue
        lines = file.text.splitlines(keepends=True)
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        functions = [node for node in functions if (node.end_lineno or 0) - node.lineno >= 6]
        random.Random(f"{seed}:{file.name}").shuffle(functions)
        for node in functions[:4]:
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            first_body_line = body[0].lineno - 1
            start = max(0, min(node.lineno - 1, first_body_line) - prompt_lines)
            candidates.append("".join(lines[start:first_body_line]))
    random.Random(seed).shuffle(candidates)
    most = len(candidates) // choices
    if most < count:
        raise ValueError(
            f"{argument}: {count} prompts asked for, but the modules have functions for {most} only. Ask for fewer."
        )
    return candidates[: choices * count]
