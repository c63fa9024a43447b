"""Prompts, texts and chats become the token sequences that the trainer reads.

Knows tokenizers; knows nothing about models.
"""

import hashlib
import logging
from itertools import compress
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from .chats import chat_prompts, chat_sequences, chats_of
from .rows import find_columns, integers, read_rows, strings, token_ids_of
from .tokens import open_prompts, open_texts, opened, tokenize_pairs

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
PROMPT_COLUMNS = (("messages",), ("prompt",), ("text",))
# The first entry of which a row has a column decides which of its `input_ids` are learned.
LOSS_COLUMNS = (("loss_mask",), ("labels",), ("completion_mask", "assistant_masks"))


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
        """Short hash of the tokens, of where sequences end and of both masks: of all that is trained on."""
        digest = self._token_digest()
        digest.update(self._loss_mask.numpy().tobytes())
        digest.update(self._target_written.numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def token_fingerprint(self) -> str:
        """Short hash of the tokens and of where sequences end, without the masks."""
        return self._token_digest().hexdigest()[:16]

    def _token_digest(self) -> Any:
        digest = hashlib.sha256(self._ends.numpy().astype("<i8").tobytes())
        digest.update(self._token_ids.numpy().astype("<i4").tobytes())
        return digest


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

    - `input_ids`, with optional `target_written`: without the padding (`attention_mask` 0); loss by `loss_mask`, else
      by `labels` that are not -100, else by `completion_mask` and `assistant_masks`, else on every token.
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
    columns = find_columns(rows, SEQUENCE_COLUMNS, argument)
    if columns == ("prompt",):
        raise ValueError(
            f"{argument}: the rows have a `prompt` but no `completion` (columns: {sorted(rows[0])}), so there is "
            "nothing to learn. Let the target write the completions (regenerate=True, or `ppow write`), give a "
            "`completion` column, or name the column `text` if the prompts themselves are to be learned."
        )
    if columns == ("text",):
        token_ids, loss_masks = _text_sequences(rows, tokenizer, max_length, packing, min_length, argument)
        requirement = f"at least {min_length} tokens" if packing else "a token to learn"
        return _keep_learnable(token_ids, loss_masks, None, argument, requirement)

    target_written: list | None = None
    if columns == ("input_ids",):
        token_ids, loss_masks, target_written = _tokenized_sequences(rows, argument)
        target_written = [mask[:max_length] for mask in target_written]
    elif columns == ("prompt_ids", "completion_ids"):
        token_ids, loss_masks, target_written = _written_sequences(rows, argument)
        target_written = [mask[:max_length] for mask in target_written]
    elif columns == ("messages",):
        token_ids, loss_masks = chat_sequences(rows, tokenizer, argument)
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
    columns = find_columns(rows, PROMPT_COLUMNS, argument)
    if columns == ("messages",):
        prompts = chat_prompts(rows, tokenizer, argument)
    elif columns == ("prompt",):
        prompts = open_prompts(strings(rows, "prompt", argument), tokenizer)
    else:
        opened = open_texts(strings(rows, "text", argument), tokenizer)
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
    columns = find_columns(rows, SEQUENCE_COLUMNS, argument)
    if columns == ("messages",):
        chats = chats_of(rows, argument)
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


# Rows to tokens


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
    texts = [text for text in strings(rows, "text", argument) if text]
    pieces = [torch.tensor(ids + closing, dtype=torch.int32) for ids in open_texts(texts, tokenizer) if ids]
    if packing and pieces:
        packed = torch.cat(pieces).split(max_length)
        pieces = [sequence for sequence in packed if len(sequence) >= min(min_length, max_length)]
    else:
        pieces = [piece[:max_length] for piece in pieces]
    unlearned = bos if bos is not None and bos != eos else -1
    return pieces, [piece != unlearned for piece in pieces]


def _completion_sequences(rows: list[dict], tokenizer: PreTrainedTokenizerBase, argument: str) -> tuple[list, list]:
    eos = tokenizer.eos_token_id
    prompts, completions = (strings(rows, name, argument) for name in ("prompt", "completion"))
    pairs = list(tokenize_pairs(prompts, completions, tokenizer))
    token_ids, loss_masks = [], []
    for before, (_, completion) in zip(opened((ids for ids, _ in pairs), tokenizer), pairs, strict=True):
        if not completion:
            continue
        if eos is not None and completion[-1] != eos:
            completion = [*completion, eos]
        token_ids.append(before + completion)
        loss_masks.append([False] * len(before) + [True] * len(completion))
    return token_ids, loss_masks


def _tokenized_sequences(rows: list[dict], argument: str) -> tuple[list, list, list]:
    token_ids, loss_masks, target_written = [], [], []
    for number, row in enumerate(rows):
        padded = integers(row["input_ids"], "input_ids", number, argument)
        is_text = _mask_of(row, ("attention_mask",), len(padded), number, argument) or [True] * len(padded)
        ids = token_ids_of(list(compress(padded, is_text)), "input_ids", number, argument)
        if not ids:
            continue
        by_loss = (_mask_of(row, columns, len(padded), number, argument) for columns in LOSS_COLUMNS)
        learned = next(filter(None, by_loss), is_text)
        written = _mask_of(row, ("target_written",), len(padded), number, argument) or [False] * len(padded)
        token_ids.append(ids)
        loss_masks.append(list(compress(learned, is_text)))
        target_written.append(list(compress(written, is_text)))
    return token_ids, loss_masks, target_written


def _mask_of(row: dict, columns: tuple[str, ...], length: int, number: int, argument: str) -> list[bool]:
    """Where all of those `columns` that the row has are not 0, and `labels` not -100; empty where it has none."""
    masks = []
    for column in columns:
        if row.get(column) is None:
            continue
        values = integers(row[column], column, number, argument)
        if len(values) != length:
            raise ValueError(
                f"{argument}: `{column}` of row {number} has {len(values)} entries for {length} `input_ids`. Give one "
                "per token."
            )
        masks.append([value != (-100 if column == "labels" else 0) for value in values])
    return [all(values) for values in zip(*masks, strict=True)]


def _written_sequences(rows: list[dict], argument: str) -> tuple[list, list, list]:
    token_ids: list[list[int]] = []
    loss_masks: list[list[bool]] = []
    target_written: list[list[bool]] = []
    for number, row in enumerate(rows):
        prompt = token_ids_of(row["prompt_ids"], "prompt_ids", number, argument)
        completion = token_ids_of(row["completion_ids"], "completion_ids", number, argument)
        if not token_ids or prompt[: len(token_ids[-1])] != token_ids[-1]:
            token_ids.append([])
            loss_masks.append([])
            target_written.append([])
        unlearned = [False] * (len(prompt) - len(token_ids[-1]))
        token_ids[-1] = prompt + completion
        loss_masks[-1] += unlearned + [True] * len(completion)
        target_written[-1] += unlearned + [row.get("temperature") == 0] * len(completion)
    return token_ids, loss_masks, target_written


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
