"""Rows of a dataset, whatever it is in, and the values of their columns, checked.

Knows files and rows; knows nothing of tokens. The `datasets` package is needed for datasets by name alone: whatever
yields dicts will do.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .sources import FILES, dataset_rows, parse_source, rows_of_column

TEMPLATE_COLUMNS = ("messages", "tools", "documents", "chat_template_kwargs")  # what a chat template is given


def read_rows(source: Any, argument: str) -> list[dict]:
    """All rows of `source` as dicts.

    Args:
        source (`str`, `os.PathLike`, `datasets.Dataset` or iterable of `dict`): a path is to a `.jsonl` or `.jsonl.gz`
            file (one row per line; blank lines are skipped) or a `.txt` file (one `text` row, the whole file). A
            string may also be `FILE:COLUMN`, the `prompt` being in that column, or name a dataset in a folder or on
            the Hub: `NAME[/CONFIG][@SPLIT][:COLUMN]`.
        argument (`str`): name of the argument that the user passed `source` as, for the errors.

    Raises `FileNotFoundError` for a missing file, and `ValueError` for a damaged line (named by file and line), for
    anything that does not yield dicts, and for a source without rows.
    """
    if isinstance(source, (str, os.PathLike)):
        place = parse_source(os.fspath(source))
        if place.is_dataset:
            rows = [without_padding(row) for row in dataset_rows(place, argument)]
        else:
            rows = _read_file(Path(place.path), argument)
        if place.column is not None:
            rows = rows_of_column(rows, place.column, place.path, argument)
    elif isinstance(source, Mapping):
        raise ValueError(
            f"{argument}: a {type(source).__name__} with the keys {list(source)} was given. Pass one split of it, "
            "such as `dataset['train']`, or a list of dicts, one per row."
        )
    elif isinstance(source, Iterable) or callable(getattr(source, "__getitem__", None)):
        rows = list(rows_of_stream(source))
    else:
        raise ValueError(
            f"{argument}: {type(source).__name__} given. Pass a dataset, a list of dicts, or the path of a .jsonl, "
            ".jsonl.gz or .txt file."
        )
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{argument}: row {number} is a {type(row).__name__}. Every row is a dict, such as "
                '`{"text": "..."}` or `{"prompt": "...", "completion": "..."}`.'
            )
    if not rows:
        raise ValueError(f"{argument}: the dataset has no rows. Pass one with at least one row.")
    return [dict(row) for row in rows]


def is_stream(source: Any) -> bool:
    """Whether rows can only be read one after the other, possibly without end: what has no length."""
    return isinstance(source, Iterable) and not isinstance(source, os.PathLike) and not hasattr(source, "__len__")


def rows_of_stream(source: Any) -> Iterator[Any]:
    """Rows as they come; those of the `datasets` library without Arrow's nulls."""
    from_arrow = any(kind.__module__.startswith("datasets.") for kind in type(source).__mro__)
    if not isinstance(source, Iterable) and hasattr(source, "__len__"):
        source = map(source.__getitem__, range(len(source)))  # a torch Dataset need not raise IndexError at its end
    for row in source:
        yield without_padding(row) if from_arrow and isinstance(row, Mapping) else row


def _read_file(path: Path, argument: str) -> list[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: no file at {str(path)!r}. Pass the path of an existing file.")
    if not path.name.endswith(FILES):
        raise ValueError(
            f"{argument}: {path.name!r} is neither .jsonl, .jsonl.gz nor .txt. Convert it, or load it with "
            "`datasets.load_dataset` and pass the result."
        )
    if path.suffix == ".txt":
        try:
            return [{"text": path.read_text(encoding="utf-8-sig")}]
        except UnicodeDecodeError as error:
            raise ValueError(f"{argument}: {str(path)!r} is not UTF-8 text ({error}). Convert it to UTF-8.") from error
    rows = []
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_parse_line(line, f"{argument}: {str(path)!r}, line {number}"))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{argument}: {str(path)!r} is damaged after line {number} ({error}). Download or compress it again."
        ) from error
    return rows


def _parse_line(line: bytes, place: str) -> dict:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, and nested too deep
        raise ValueError(f"{place} is not JSON ({error}). Fix or remove the line.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} is a {type(row).__name__}. Every line is one JSON object, such as a `text` row.")
    return row


def find_columns(rows: list[dict], accepted: tuple[tuple[str, ...], ...], argument: str) -> tuple[str, ...]:
    """The first of `accepted` whose columns the rows have; raises `ValueError` where rows lack them."""
    for columns in accepted:
        if all(column in rows[0] for column in columns):
            break
    else:
        names = ", ".join(" + ".join(f"`{column}`" for column in columns) for columns in accepted)
        raise ValueError(f"{argument}: the dataset has the columns {sorted(rows[0])}. Rename them to one of: {names}.")
    for number, row in enumerate(rows):
        missing = [column for column in columns if column not in row]
        if missing:
            raise ValueError(
                f"{argument}: row {number} has the columns {sorted(row)}, and lacks {missing}, which row 0 has. Give "
                "all rows the same columns."
            )
    return columns


def strings(rows: list[dict], column: str, argument: str) -> list[str]:
    """A column's texts, empty for null; raises `ValueError`, naming the row, for anything else."""
    values = [row[column] if row[column] is not None else "" for row in rows]
    for number, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(
                f"{argument}: `{column}` of row {number} is a {type(value).__name__}. Give a string; a conversation "
                "goes into the column `messages`."
            )
        if has_lone_surrogate(value):
            raise ValueError(
                f"{argument}: `{column}` of row {number} holds half a character (a lone surrogate), which is no text. "
                "Remove it, or write the text again as UTF-8."
            )
    return values


def has_lone_surrogate(text: str) -> bool:
    """Whether a string holds half a character, which no tokenizer takes."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def integers(values: Any, column: str, number: int, argument: str) -> list[int]:
    """A row's token ids or mask, empty for null; raises `ValueError`, naming the row, for anything else."""
    try:
        tensor = torch.as_tensor([] if values is None else values)
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    if tensor is None or tensor.dim() != 1 or (tensor.is_floating_point() and len(tensor)):
        raise ValueError(f"{argument}: `{column}` of row {number} is not a flat list of integers. Tokenize it anew.")
    return tensor.long().tolist()


def token_ids_of(values: Any, column: str, number: int, argument: str) -> list[int]:
    """A row's [`integers`]; raises `ValueError`, naming the row, for one that no tokenizer gives."""
    ids = integers(values, column, number, argument)
    wrong = [value for value in (min(ids), max(ids)) if not 0 <= value < 2**31] if ids else []
    if wrong:
        raise ValueError(
            f"{argument}: `{column}` of row {number} has the token id {wrong[0]}, and ids are 0 to {2**31 - 1}. "
            "Tokenize it anew; of `input_ids` mark padding by an `attention_mask` of 0."
        )
    return ids


def without_padding(row: Mapping) -> dict:
    """A row without the nulls with which Arrow gives all dicts of a column the same keys, in what a template reads.

    A message's own `content` is kept: templates ask whether it is null.
    """
    cleaned = {name: _without_nulls(value) if name in TEMPLATE_COLUMNS else value for name, value in row.items()}
    for message, given in zip(cleaned.get("messages") or [], row.get("messages") or [], strict=True):
        if isinstance(given, Mapping) and "content" in given:
            message.setdefault("content", None)
    return cleaned


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(inner) for inner in value]
    return value
