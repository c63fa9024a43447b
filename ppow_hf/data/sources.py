"""Where rows come from, by name: a file, or a dataset in a folder or on the Hub, with its split and a column.

Knows names and what they stand for; knows nothing of tokens.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

FILES = (".jsonl", ".jsonl.gz", ".txt")
NAME = re.compile(r"(?P<name>.+?)(?:@(?P<split>[^@:\[\]]+(?:\[[^\]]*\])?))?(?::(?P<column>[^:/@]+))?")
HUB_NAME = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?")

DATA_HELP = (
    "a .jsonl or .jsonl.gz file, or a dataset in a folder or on the Hub as NAME[/CONFIG][@SPLIT], with prompt, "
    "messages or text, or with :COLUMN after it"
)


class Source(NamedTuple):
    """What a name stands for.

    Args:
        path (`str`): a file, a folder, or a dataset on the Hub.
        is_dataset (`bool`): whether it is a folder or on the Hub, and no file.
        config, split (`str`, *optional*): of a dataset.
        column (`str`, *optional*): the column that the prompts are in.
    """

    path: str
    is_dataset: bool
    config: str | None = None
    split: str | None = None
    column: str | None = None

    @property
    def short_name(self) -> str:
        """Without folders, endings, split and column."""
        return Path(self.path).name.split(".")[0]


def parse_source(text: str) -> Source:
    """`FILE[:COLUMN]`, or `NAME[/CONFIG][@SPLIT][:COLUMN]` of a dataset, which `datasets.load_dataset` reads.

    `NAME` is a folder, or `owner/name` on the Hub; a split may be a part of one (`train[:1000]`).
    """
    path, _, column = text.rpartition(":")
    as_file = Source(path, False, column=column) if path else Source(text, False)
    if Path(text).is_file():
        return Source(text, False)
    found = NAME.fullmatch(text)
    if Path(path).is_file() or found is None:
        return as_file
    name = found["name"]
    if Path(name).is_dir():
        return Source(name, True, None, found["split"], found["column"])
    on_hub = HUB_NAME.fullmatch(name)
    if on_hub is None or name.endswith(FILES):
        return as_file
    return Source(on_hub["path"], True, on_hub["config"], found["split"], found["column"])


def split_column(text: str) -> tuple[str, str | None]:
    """What names a file or dataset without the column, and the column."""
    column = parse_source(text).column
    return (text, None) if column is None else (text.removesuffix(f":{column}"), column)


def check_source(text: str, argument: str) -> None:
    """Raise where there is no such file (`FileNotFoundError`), or no such split of such a dataset (`ValueError`),
    before anything is loaded."""
    source = parse_source(text)
    if source.is_dataset:
        _split_of(source, argument)
    elif not Path(source.path).is_file():
        raise FileNotFoundError(
            f"{argument}: there is no file {source.path!r}. Pass a .jsonl, .jsonl.gz or .txt file, or a dataset as "
            "NAME[/CONFIG][@SPLIT]; with :COLUMN after it where the prompt is in another column than messages, "
            "prompt or text."
        )


def dataset_rows(source: Source, argument: str) -> Any:
    """The rows of a dataset's split, all of its columns; raises `ValueError` where they cannot be loaded."""
    split = _split_of(source, argument)
    with _library(source, argument) as datasets:
        return datasets.load_dataset(source.path, source.config, split=split)


def rows_of_column(rows: list[Any], column: str, name: str, argument: str) -> list[dict]:
    """Prompts from a column of their own; raises `ValueError` where a row lacks it."""
    for row in rows:
        if column not in row:
            raise ValueError(f"{argument}: {Path(name).name} has no column {column!r}; it has {sorted(row)}.")
    return [{"prompt": row[column]} for row in rows]


def _split_of(source: Source, argument: str) -> str:
    with _library(source, argument) as datasets:
        splits = datasets.get_dataset_split_names(source.path, source.config)
    if source.split is None and len(splits) == 1:
        return splits[0]
    if source.split is None or source.split.partition("[")[0] not in splits:
        name = source.path if source.config is None else f"{source.path}/{source.config}"
        raise ValueError(
            f"{argument}: {name} has the splits {list(splits)}"
            + (f" and no {source.split!r}" if source.split else "")
            + f". Pass one of them, such as {name}@{splits[0]}."
        )
    return source.split


@contextmanager
def _library(source: Source, argument: str) -> Iterator[Any]:
    """The datasets library; what it raises becomes one error that names the argument and the dataset."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{argument}: reading a dataset by name takes `pip install datasets`.") from error
    try:
        yield datasets
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{argument}: the dataset {source.path!r} could not be loaded: {error}. If a file was meant, there is "
            "none of that name."
        ) from error
