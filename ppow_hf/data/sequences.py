"""Prompts, texts and chats become the token sequences that the trainer reads.

Knows tokenizers; knows nothing about models. The `datasets` package is needed for datasets by name alone: whatever
yields dicts will do.
"""

import gzip
import hashlib
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from .sources import FILES, dataset_rows, parse_source, rows_of_column

logger = logging.getLogger(__name__)

# The first entry whose columns a dataset has decides how its rows are read; its other columns are ignored.
SEQUENCE_COLUMNS = (
    ("input_ids",),
    ("prompt_ids", "completion_ids"),
    ("messages",),
    ("prompt", "completion"),
    ("text",),
    ("prompt",),
)
TEMPLATE_COLUMNS = ("messages", "tools", "documents", "chat_template_kwargs")  # what a chat template is given
PROMPT_COLUMNS = (("messages",), ("prompt",), ("text",))
TEXTS_PER_TOKENIZER_CALL = 1000


class SequenceDataset(Dataset):
    """Token sequences, and which of their tokens are learned and which the target wrote.

    Item `i` is `{"input_ids": LongTensor [S], "loss_mask": BoolTensor [S], "target_written": BoolTensor [S],
    "index": i}`. `loss_mask[t]` is true where token `t` is to be learned, hence never at `t = 0`, which nothing
    precedes. `target_written[t]` is true where the target itself wrote token `t` greedily (T = 0).

    Args:
        sequences (`list[list[int]]` or `list[torch.Tensor]`): token ids of each sequence.
        loss_masks (`list[list[bool]]` or `list[torch.Tensor]`): of the same lengths.
        target_written (`list[list[bool]]` or `list[torch.Tensor]`, *optional*): of the same lengths; by default the
            target wrote nothing.
    """

    def __init__(self, sequences: list, loss_masks: list, target_written: list | None = None):
        lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.long)
        self._ends = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])  # [N + 1]
        self._token_ids = _flatten(sequences, torch.int32)  # [T], all sequences end to end
        self._loss_mask = _flatten(loss_masks, torch.bool)
        if target_written is None:
            self._target_written = torch.zeros_like(self._loss_mask)
        else:
            self._target_written = _flatten(target_written, torch.bool)
        if not len(self._token_ids) == len(self._loss_mask) == len(self._target_written):
            raise ValueError(
                f"loss_masks, target_written: {len(self._loss_mask)} and {len(self._target_written)} entries given "
                f"for {len(self._token_ids)} tokens. Give one entry per token."
            )
        self._loss_mask[self._ends[:-1][lengths > 0]] = False

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: {index} given, but the dataset holds {len(self)} sequences.")
        index %= len(self)
        span = slice(int(self._ends[index]), int(self._ends[index + 1]))
        return {
            "input_ids": self._token_ids[span].long(),
            "loss_mask": self._loss_mask[span].clone(),
            "target_written": self._target_written[span].clone(),
            "index": index,
        }

    def count_tokens(self, vocab_size: int) -> torch.Tensor:
        """How often each token occurs, learned or not: `[vocab_size]`, by which a reduced vocabulary is chosen."""
        return torch.bincount(self._token_ids.long(), minlength=vocab_size)

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each sequence, `[N]`."""
        return self._ends.diff()

    @property
    def largest_token_id(self) -> int:
        return int(self._token_ids.max())

    @property
    def fingerprint(self) -> str:
        """Short hash of the token ids and of where sequences end, for the provenance record."""
        digest = hashlib.sha256(self._ends.numpy().astype("<i8").tobytes())
        digest.update(self._token_ids.numpy().astype("<i4").tobytes())
        return digest.hexdigest()[:16]


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
    for row in source:
        yield without_padding(row) if from_arrow and isinstance(row, Mapping) else row


def prepare_sequences(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    packing: bool = True,
    min_length: int = 8,
    argument: str = "train_dataset",
) -> SequenceDataset:
    """Token sequences of at most `max_length` tokens from a dataset of texts, completions, chats or token ids.

    Columns, the first of these that the dataset has:

    - `input_ids`, with optional `loss_mask` and `target_written`: taken as they are.
    - `prompt_ids` and `completion_ids`, as `ppow write` makes them: loss on the completion, which the target wrote
      greedily where `temperature` is 0. A row whose prompt begins with all of the row before it is that chat's next
      turn; both make one sequence.
    - `messages`: through the chat template, with `tools`, `documents` and `chat_template_kwargs` of the same row;
      loss on the assistant's turns only. Contents are strings or lists of text parts.
    - `prompt` and `completion`: loss on the completion and the end-of-sequence token after it.
    - `text`: loss on every token but an opening `bos_token` that is not also the `eos_token`.

    A text is opened by the `bos_token`, or closed by the `eos_token` where the tokenizer has no bos. Only texts are
    packed; other rows are cut at the right, and dropped with one warning where no learned token is left.

    Args:
        source: what [`read_rows`] reads.
        tokenizer (`PreTrainedTokenizerBase`): the target's tokenizer.
        max_length (`int`): tokens in the longest sequence.
        packing (`bool`, *optional*, defaults to `True`): whether texts are joined end to end and cut into sequences of
            exactly `max_length` tokens. Otherwise each text is a sequence of its own, cut at `max_length`.
        min_length (`int`, *optional*, defaults to `8`): with packing, the last sequence is kept if it is this long.
        argument (`str`, *optional*, defaults to `"train_dataset"`): name of the argument in errors and warnings.

    Raises `ValueError`, naming `argument` and the row, for columns or values that it cannot read, and where no
    sequence with a token to learn is left.
    """
    if max_length < 2:
        raise ValueError(f"max_length: {max_length} given. Nothing can be learned from fewer than 2 tokens.")
    rows = read_rows(source, argument)
    columns = _find_columns(rows, SEQUENCE_COLUMNS, argument)
    if columns == ("prompt",):
        raise ValueError(
            f"{argument}: the rows have a `prompt` but no `completion` (columns: {sorted(rows[0])}), so there is "
            "nothing to learn. Let the target write the completions (regenerate=True, or `ppow write`), give a "
            "`completion` column, or name the column `text` if the prompts themselves are to be learned."
        )
    if columns == ("text",):
        token_ids, loss_masks = _text_sequences(rows, tokenizer, max_length, packing, min_length, argument)
        return _keep_learnable(token_ids, loss_masks, None, argument, f"at least {min_length} tokens")

    target_written: list | None = None
    if columns == ("input_ids",):
        token_ids, loss_masks, target_written = _tokenized_sequences(rows, argument)
        target_written = [mask[:max_length] for mask in target_written]
    elif columns == ("prompt_ids", "completion_ids"):
        token_ids, loss_masks, target_written = _written_sequences(rows, argument)
        target_written = [mask[:max_length] for mask in target_written]
    elif columns == ("messages",):
        token_ids, loss_masks = _chat_sequences(rows, tokenizer, argument)
    else:
        token_ids, loss_masks = _completion_sequences(rows, tokenizer, argument)
    token_ids = [ids[:max_length] for ids in token_ids]
    loss_masks = [mask[:max_length] for mask in loss_masks]
    requirement = f"a token to learn among its first max_length={max_length} tokens"
    return _keep_learnable(token_ids, loss_masks, target_written, argument, requirement)


def collate_sequences(items: list[dict[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch of [`SequenceDataset`] items, padded on the right.

    Returns `input_ids`, `attention_mask` and `labels` (long), `loss_mask` and `target_written` (bool), all `[B, S]`,
    and `index` `[B]`. `labels` is aligned with `input_ids`, as causal models in transformers take it (they shift it
    themselves); it is -100 at position 0 and wherever `loss_mask` is false.
    """
    lengths = torch.tensor([len(item["input_ids"]) for item in items])

    def pad(name: str, value: int | bool) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([item[name] for item in items], batch_first=True, padding_value=value)

    input_ids, loss_mask = pad("input_ids", pad_token_id), pad("loss_mask", False)
    labels = input_ids.masked_fill(~loss_mask, -100)
    labels[:, 0] = -100
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        "loss_mask": loss_mask,
        "target_written": pad("target_written", False),
        "labels": labels,
        "index": torch.tensor([item["index"] for item in items], dtype=torch.long),
    }


def padded_to(batch: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """A batch of [`collate_sequences`], padded further on the right, to `length` tokens."""
    return {
        name: torch.nn.functional.pad(value, (0, length - value.shape[1]), value=-100 if name == "labels" else 0)
        if value.ndim == 2
        else value
        for name, value in batch.items()
    }


def extract_prompts(
    source: Any, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int, argument: str = "train_dataset"
) -> list[list[int]]:
    """Prompts as token ids, in the order of the rows; rows without a prompt are skipped.

    Columns, the first of these that the dataset has: `messages` (up to the last user turn, with the template's
    generation prompt), `prompt` (opened as the tokenizer opens a text), or `text` (its first `max_prompt_length`
    tokens). A longer `messages` or `prompt` keeps its last tokens, and an opening `bos_token`; one warning says how
    many were cut.

    Raises `ValueError`, naming `argument` and the row, for columns or values that it cannot read, and where no prompt
    is left.
    """
    if max_prompt_length < 1:
        raise ValueError(f"max_prompt_length: {max_prompt_length} given. A prompt has at least 1 token.")
    rows = read_rows(source, argument)
    columns = _find_columns(rows, PROMPT_COLUMNS, argument)
    if columns == ("messages",):
        prompts = _chat_prompts(rows, tokenizer, argument)
    elif columns == ("prompt",):
        prompts = open_prompts(_strings(rows, "prompt", argument), tokenizer)
    else:
        opened = _open_texts(_strings(rows, "text", argument), tokenizer)
        prompts = [ids[:max_prompt_length] for ids in opened]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(
            f"{argument}: none of the {len(rows)} rows has a prompt. Give at least one that is not empty."
        )
    too_long = sum(len(prompt) > max_prompt_length for prompt in prompts)
    if too_long:
        logger.warning(
            "%s: %d of %d prompts are longer than %d tokens; their beginnings were cut off.",
            argument,
            too_long,
            len(prompts),
            max_prompt_length,
        )
    return [_keep_end(prompt, max_prompt_length, tokenizer.bos_token_id) for prompt in prompts]


def has_prompts_alone(rows: list[dict], argument: str) -> bool:
    """Whether nothing follows the prompts: rows of `prompt` without `completion`, or chats without an assistant."""
    columns = _find_columns(rows, SEQUENCE_COLUMNS, argument)
    if columns == ("messages",):
        chats = _chats(rows, argument)
        return not any(message["role"] == "assistant" for chat in chats for message in chat.messages)
    return columns == ("prompt",)


def prepare_prompts(
    source: Any, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int, argument: str = "eval_dataset"
) -> SequenceDataset:
    """What [`extract_prompts`] finds, as sequences without a token to learn."""
    prompts = extract_prompts(source, tokenizer, max_prompt_length, argument)
    return SequenceDataset(prompts, [[False] * len(prompt) for prompt in prompts])


def all_positions(data: SequenceDataset) -> SequenceDataset:
    """The same sequences with every token learned: the target's distribution teaches on its prompts too."""
    items = [data[index] for index in range(len(data))]
    return SequenceDataset(
        [item["input_ids"] for item in items],
        [torch.ones_like(item["loss_mask"]) for item in items],
        [item["target_written"] for item in items],
    )


# Rows and columns


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
        raise ValueError(f"{place} is not JSON ({error}). Mend or remove the line.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} is a {type(row).__name__}. Every line is one JSON object, such as a `text` row.")
    return row


def _find_columns(rows: list[dict], accepted: tuple[tuple[str, ...], ...], argument: str) -> tuple[str, ...]:
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


def _strings(rows: list[dict], column: str, argument: str) -> list[str]:
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


# Text to tokens


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    for start in range(0, len(texts), TEXTS_PER_TOKENIZER_CALL):
        chunk = texts[start : start + TEXTS_PER_TOKENIZER_CALL]
        yield from tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]


def _open_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Each text's tokens after the bos token, if there is one; nothing for an empty text."""
    opening = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for ids in _tokenize(texts, tokenizer):
        yield ids if not ids or ids[: len(opening)] == opening else opening + ids


def open_prompts(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Each prompt's tokens as `tokenizer(prompt)` opens them, but never opened twice and never closed."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    opened = tokenizer("a")["input_ids"]
    starts = [start for start in range(len(opened)) if opened[start : start + len(plain)] == plain]
    opening = opened[: starts[0]] if starts else []
    return [ids if ids[: len(opening)] == opening else opening + ids for ids in _tokenize(prompts, tokenizer)]


def _text_sequences(
    rows: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    packing: bool,
    min_length: int,
    argument: str,
) -> tuple[list, list]:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    closing = [eos] if bos is None and eos is not None else []
    texts = [text for text in _strings(rows, "text", argument) if text]
    pieces = [torch.tensor(ids + closing, dtype=torch.int32) for ids in _open_texts(texts, tokenizer) if ids]
    if packing and pieces:
        packed = torch.cat(pieces).split(max_length)
        pieces = [sequence for sequence in packed if len(sequence) >= min(min_length, max_length)]
    else:
        pieces = [piece[:max_length] for piece in pieces]
    unlearned = bos if bos is not None and bos != eos else -1
    return pieces, [piece != unlearned for piece in pieces]


def _completion_sequences(rows: list[dict], tokenizer: PreTrainedTokenizerBase, argument: str) -> tuple[list, list]:
    eos = tokenizer.eos_token_id
    prompts = open_prompts(_strings(rows, "prompt", argument), tokenizer)
    completions = _tokenize(_strings(rows, "completion", argument), tokenizer)
    token_ids, loss_masks = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        if not completion:
            continue
        if eos is not None and completion[-1] != eos:
            completion = [*completion, eos]
        token_ids.append(prompt + completion)
        loss_masks.append([False] * len(prompt) + [True] * len(completion))
    return token_ids, loss_masks


def _tokenized_sequences(rows: list[dict], argument: str) -> tuple[list, list, list]:
    token_ids, loss_masks, target_written = [], [], []
    for number, row in enumerate(rows):
        ids = _integers(row["input_ids"], "input_ids", number, argument)
        if not ids:
            continue
        if min(ids) < 0:
            raise ValueError(
                f"{argument}: `input_ids` of row {number} has the negative id {min(ids)}. Remove padding."
            )
        masks = {}
        for column, default in (("loss_mask", 1), ("target_written", 0)):
            given = row.get(column)
            masks[column] = [default] * len(ids) if given is None else _integers(given, column, number, argument)
            if len(masks[column]) != len(ids):
                raise ValueError(
                    f"{argument}: `{column}` of row {number} has {len(masks[column])} entries for {len(ids)} "
                    "`input_ids`. Give one per token."
                )
        token_ids.append(ids)
        loss_masks.append([value != 0 for value in masks["loss_mask"]])
        target_written.append([value != 0 for value in masks["target_written"]])
    return token_ids, loss_masks, target_written


def _written_sequences(rows: list[dict], argument: str) -> tuple[list, list, list]:
    token_ids: list[list[int]] = []
    loss_masks: list[list[bool]] = []
    target_written: list[list[bool]] = []
    for number, row in enumerate(rows):
        prompt = _integers(row["prompt_ids"], "prompt_ids", number, argument)
        completion = _integers(row["completion_ids"], "completion_ids", number, argument)
        if not token_ids or prompt[: len(token_ids[-1])] != token_ids[-1]:
            token_ids.append([])
            loss_masks.append([])
            target_written.append([])
        unlearned = [False] * (len(prompt) - len(token_ids[-1]))
        token_ids[-1] = prompt + completion
        loss_masks[-1] += unlearned + [True] * len(completion)
        target_written[-1] += unlearned + [row.get("temperature") == 0] * len(completion)
    return token_ids, loss_masks, target_written


def _integers(values: Any, column: str, number: int, argument: str) -> list[int]:
    try:
        tensor = torch.as_tensor([] if values is None else values)
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    if tensor is None or tensor.dim() != 1 or (tensor.is_floating_point() and len(tensor)):
        raise ValueError(f"{argument}: `{column}` of row {number} is not a flat list of integers. Tokenize it anew.")
    return tensor.long().tolist()


# Chats to tokens


@dataclass
class Chat:
    """A row's chat as its template takes it.

    Args:
        messages (`list[dict]`): its messages.
        inputs (`dict`): what else the row gives the template: `tools`, `documents` and `chat_template_kwargs`.
        number (`int`): the row's place in the data, for errors.
    """

    messages: list[dict]
    inputs: dict[str, Any]
    number: int


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


def _chats(rows: list[dict], argument: str) -> list[Chat]:
    return [chat_of(row, number, argument) for number, row in enumerate(rows)]


def chat_of(row: Mapping, number: int, argument: str) -> Chat:
    """The chat of row `number`; raises `ValueError`, naming `argument` and the row, for what no template can write."""
    place = f"{argument}: `messages` of row {number}"
    messages = [] if row["messages"] is None else row["messages"]
    is_list = isinstance(messages, list | tuple)
    if not is_list or not all(isinstance(message, Mapping) and "role" in message for message in messages):
        raise ValueError(f"{place} is not a list of messages. Every message is a dict with `role` and `content`.")
    for turn, message in enumerate(messages):
        content = message.get("content")
        parts = content if isinstance(content, list | tuple) else [] if content is None else [content]
        kinds = {"text" if isinstance(part, str) else _kind_of_part(part) for part in parts}
        if kinds - {"text"}:
            raise ValueError(
                f"{place} has, in message {turn}, a content of the kind {sorted(kinds - {'text'})[0]!r}. A drafter "
                "reads text: give a string, or a list of parts such as {'type': 'text', 'text': '...'}."
            )
    inputs = dict(_parsed(row.get("chat_template_kwargs"), dict, "chat_template_kwargs", number, argument) or {})
    for name in ("tools", "documents"):
        given = _parsed(row.get(name), list, name, number, argument)
        if given:
            inputs[name] = [
                _parsed(one, dict, name, number, argument) if isinstance(one, str) else one for one in given
            ]
    half = next((text for text in _texts_in([messages, inputs]) if has_lone_surrogate(text)), None)
    if half is not None:
        raise ValueError(
            f"{place} or what stands beside it holds half a character (a lone surrogate), which is no text. Remove "
            "it, or write the text again as UTF-8."
        )
    return Chat([dict(message) for message in messages], inputs, number)


def _kind_of_part(part: Any) -> str:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part.get("type", "text"))
    return str(part.get("type", "dict")) if isinstance(part, Mapping) else type(part).__name__


def _parsed(value: Any, kind: type, name: str, number: int, argument: str) -> Any:
    """What a template is given as a list or dict, which some datasets hold as JSON; `None` where there is none."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise ValueError(f"{argument}: `{name}` of row {number} is not JSON ({error}). Mend the row.") from error
    if value is not None and not isinstance(value, kind):
        raise ValueError(
            f"{argument}: `{name}` of row {number} is a {type(value).__name__}. Give a {kind.__name__}, also as JSON."
        )
    return value


def _texts_in(value: Any) -> Iterator[str]:
    """All strings in lists and dicts, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts_in(key)
            yield from _texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts_in(inner)


def _apply_template(chat: Chat, tokenizer: PreTrainedTokenizerBase, argument: str, **options: Any) -> Any:
    messages = chat.messages
    has_parts = any(isinstance(message.get("content"), list | tuple) for message in messages)
    if has_parts and not _takes_parts(tokenizer, tokenizer.get_chat_template()):
        messages = [_with_joined_parts(message) for message in messages]
    try:
        return tokenizer.apply_chat_template(messages, **chat.inputs, **options)
    except Exception as error:  # whatever a template's own code raises for the values of a row
        raise ValueError(
            f"{argument}: the tokenizer's chat template refuses row {chat.number} ({error}). Its messages have the "
            f"roles {[message['role'] for message in messages]}; mend the row or pass another chat template."
        ) from error


def _with_joined_parts(message: dict) -> dict:
    """The message with a content of text parts as one string, for templates that add strings."""
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return message
    return {**message, "content": "".join(part if isinstance(part, str) else part["text"] for part in content)}


@lru_cache(maxsize=16)
def _takes_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a chat template writes the text of a content's parts, rather than fail or print the list."""
    probe = [{"role": "user", "content": [{"type": "text", "text": "ppow"}]}]
    try:
        written = tokenizer.apply_chat_template(probe, chat_template=template, tokenize=False)
    except Exception:  # as above
        return False
    return "ppow" in written and "'text'" not in written and '"text"' not in written


def _render(chat: Chat, tokenizer: PreTrainedTokenizerBase, argument: str, add_generation_prompt: bool = False) -> str:
    options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    return _apply_template(chat, tokenizer, argument, **options)


def chat_template_of(tokenizer: PreTrainedTokenizerBase, argument: str) -> str:
    """Raises `ValueError`, naming `argument`, where there is none."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{argument}: the rows have `messages`, but the tokenizer has no chat template. Set "
            "`tokenizer.chat_template`, or give `text` or `prompt` + `completion` columns."
        )
    return tokenizer.get_chat_template()


def _chat_sequences(rows: list[dict], tokenizer: PreTrainedTokenizerBase, argument: str) -> tuple[list, list]:
    marks_generation = re.search(r"\{%-?\s*generation\s*-?%\}", chat_template_of(tokenizer, argument)) is not None
    if not tokenizer.is_fast:
        raise ValueError(
            f"{argument}: the rows have `messages`, and finding the assistant's tokens takes a fast tokenizer; "
            f"{type(tokenizer).__name__} is a slow one. Pass a fast one, or `input_ids` with a `loss_mask`."
        )
    token_ids, loss_masks = [], []
    for chat in _chats(rows, argument):
        if not chat.messages:
            continue
        if marks_generation:
            encoded = _apply_template(
                chat,
                tokenizer,
                argument,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},
            )
            ids, mask = encoded["input_ids"], [value != 0 for value in encoded["assistant_masks"]]
        else:
            ids, mask = _mask_by_prefixes(chat, tokenizer, argument)
        token_ids.append(ids)
        loss_masks.append(mask)
    return token_ids, loss_masks


def _mask_by_prefixes(chat: Chat, tokenizer: PreTrainedTokenizerBase, argument: str) -> tuple[list[int], list[bool]]:
    """Tokens of a chat, and which belong to the assistant: those between the generation prompt and the turn's end.

    The prefixes are compared as text and found among the tokens by their offsets, since a token may straddle the end
    of a prefix, and some tokenizers put a space before a text that they are given on its own.
    """
    messages, number = chat.messages, chat.number
    whole = _render(chat, tokenizer, argument)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    mask = [False] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if turn == 0:
            raise ValueError(
                f"{argument}: row {number} begins with an assistant's message, so that its chat template does not "
                "tell where it starts. Put a user's message before it, or use a template with {% generation %}."
            )
        asked, answered = (replace(chat, messages=messages[:count]) for count in (turn, turn + 1))
        before = _render(asked, tokenizer, argument, add_generation_prompt=True)
        through = whole if turn == len(messages) - 1 else _render(answered, tokenizer, argument)
        if not (whole.startswith(through) and through.startswith(before)):
            raise ValueError(
                f"{argument}: the tokenizer's chat template writes message {turn} of row {number} differently when it "
                "is the last one than when others follow, or than its generation prompt begins it, so that the "
                "assistant's tokens cannot be told. Use a template with {% generation %}, keep one assistant message "
                "per row (the last), or pass `input_ids` with a `loss_mask`."
            )
        inside = [i for i, (start, _) in enumerate(encoded["offset_mapping"]) if len(before) <= start < len(through)]
        # What the template puts after the end token (a line feed, mostly) is not the assistant's: it has stopped.
        ends = [position for position, i in enumerate(inside, start=1) if ids[i] == tokenizer.eos_token_id]
        for i in inside[: ends[-1]] if ends else inside:
            mask[i] = True
    return ids, mask


def _chat_prompts(rows: list[dict], tokenizer: PreTrainedTokenizerBase, argument: str) -> list[list[int]]:
    chat_template_of(tokenizer, argument)
    texts = []
    for chat in _chats(rows, argument):
        user_turns = [turn for turn, message in enumerate(chat.messages) if message["role"] == "user"]
        if user_turns:
            asked = replace(chat, messages=chat.messages[: user_turns[-1] + 1])
            texts.append(_render(asked, tokenizer, argument, add_generation_prompt=True))
    return list(_tokenize(texts, tokenizer))


def encode_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase, argument: str) -> list[int]:
    """Token ids of a chat through its template, with the opening of the assistant's turn.

    Raises `ValueError`, naming `argument` and the row, where the template refuses the messages.
    """
    text = _render(chat, tokenizer, argument, add_generation_prompt=True)
    return next(_tokenize([text], tokenizer))


def _keep_end(prompt: list[int], length: int, bos_token_id: int | None) -> list[int]:
    if len(prompt) <= length:
        return prompt
    opening = prompt[:1] if length > 1 and prompt[0] == bos_token_id else []
    return opening + prompt[len(prompt) - length + len(opening) :]


# Tensors


def _flatten(rows: list, dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([torch.zeros(0, dtype=dtype), *(torch.as_tensor(row, dtype=dtype) for row in rows)])


def _keep_learnable(
    token_ids: list, loss_masks: list, target_written: list | None, argument: str, requirement: str
) -> SequenceDataset:
    kept = [number for number, mask in enumerate(loss_masks) if any(mask[1:])]
    if not kept:
        raise ValueError(f"{argument}: no row gives a sequence with {requirement}. Give longer rows or other limits.")
    if len(kept) < len(loss_masks):
        dropped = len(loss_masks) - len(kept)
        logger.warning("%s: %d of %d rows dropped: no token to learn is left.", argument, dropped, len(loss_masks))
    return SequenceDataset(
        [token_ids[number] for number in kept],
        [loss_masks[number] for number in kept],
        None if target_written is None else [target_written[number] for number in kept],
    )
