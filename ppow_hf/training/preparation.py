"""From a user's data to sequences to train on and prompts to evaluate on.

Knows rows, arguments and which of them the target completes; knows no drafter and no training step.
"""

import math
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.regeneration import longest_prompt, regenerate
from ..data.rows import is_stream, read_rows, rows_of_stream
from ..data.sequences import SequenceDataset, has_prompts_alone, prepare_prompts, prepare_sequences
from .arguments import EVAL_PROMPTS, PPOWTrainingArguments

logger = logging.get_logger(__name__)

FIRST_ROWS = 100  # of a stream, read to see how many sequences its rows give


def training_sequences(
    source: Any, target: PreTrainedModel, tokenizer: Any, args: PPOWTrainingArguments, argument: str = "train_dataset"
) -> SequenceDataset:
    """What `train_dataset` stands for: sequences as they are, or rows with completions of the target or their own.

    Of a stream, which has no length, as many rows are read as `max_steps` steps take, and shuffled as any dataset.
    """
    if isinstance(source, SequenceDataset):
        return _checked(source, argument)
    if is_stream(source):
        needed = sequences_of_training(args, argument)

        def sequences(rows: list[dict]) -> SequenceDataset:
            return training_sequences(rows, target, tokenizer, args, argument)

        return _read_as_needed(source, needed, lambda row: target_completes(row, args.regenerate), sequences, argument)
    rows = read_rows(source, argument)
    if not target_completes(rows[0], args.regenerate):
        return prepare_sequences(rows, tokenizer, args.max_length, packing=args.packing, argument=argument)
    if {"completion", "messages"} & set(rows[0]):
        logger.warning(
            f"{argument}: the target writes the completions; those in the data are not trained on. Pass "
            "regenerate=False to train on them."
        )
    return regenerate(
        rows,
        target,
        tokenizer,
        max_length=args.max_length,
        max_new_tokens=args.max_new_tokens,
        temperature=args.regenerate_temperature,
        batch_size=args.regenerate_batch_size,
        seed=args.seed,
        argument=argument,
        across_processes=args.world_size > 1,
    )


def evaluation_sequences(
    source: Any, tokenizer: Any, args: PPOWTrainingArguments
) -> SequenceDataset | dict[str, SequenceDataset] | None:
    """What `eval_dataset` stands for, one or several by name: sequences, or prompts alone where the target completes
    them or nothing follows them, since evaluation decodes."""
    if isinstance(source, Mapping):
        if not source or None in source.values():
            raise ValueError(f"eval_dataset: {source} given; pass data under each name.")
        return {name: _evaluated(part, tokenizer, args, f"eval_dataset[{name!r}]") for name, part in source.items()}
    return None if source is None else _evaluated(source, tokenizer, args, "eval_dataset")


def target_completes(row: Mapping[str, Any], regenerate: bool | None) -> bool:
    """Whether the target writes the completions: as `regenerate` says, by default of rows with prompts."""
    if regenerate is not None:
        return regenerate
    if "input_ids" in row or "completion_ids" in row:  # tokens, which `ppow write` had the target write
        return False
    return "messages" in row or ("prompt" in row and ("completion" in row or "text" not in row))


def sequences_of_training(args: PPOWTrainingArguments, argument: str = "train_dataset") -> int:
    """How many sequences all steps on all devices take; `ValueError` where `max_steps` does not tell."""
    if args.max_steps <= 0:
        raise ValueError(
            f"{argument}: a stream given, whose length is not known. Pass max_steps, which tells how much of it is "
            "read, or a list of its rows."
        )
    batches = args.max_steps * args.gradient_accumulation_steps
    if args.uses_rollouts:
        batches = math.ceil(batches / args.num_iterations)
    return batches * args.train_batch_size * args.world_size


def _read_as_needed(
    source: Any,
    needed: int,
    is_completed: Callable[[dict], bool],
    prepare: Callable[[list[dict]], SequenceDataset],
    argument: str,
) -> SequenceDataset:
    """Rows of a stream until they give `needed` sequences or it ends; one row each where the target completes them."""
    stream = rows_of_stream(source)
    rows = list(islice(stream, min(needed, FIRST_ROWS)))
    if rows and is_completed(rows[0]):
        return prepare([*rows, *islice(stream, needed - len(rows))])
    rows += islice(stream, FIRST_ROWS - len(rows))
    while True:
        sequences = prepare(read_rows(rows, argument))
        missing = needed - len(sequences)
        more = list(islice(stream, math.ceil(1.1 * missing * len(rows) / len(sequences)))) if missing > 0 else []
        if not more:
            return sequences
        rows += more


def _evaluated(source: Any, tokenizer: Any, args: PPOWTrainingArguments, argument: str) -> SequenceDataset:
    if isinstance(source, SequenceDataset):
        return _checked(source, argument)
    if is_stream(source):
        needed = EVAL_PROMPTS if args.eval_prompts is None else args.eval_prompts

        def prompts(rows: list[dict]) -> SequenceDataset:
            return _evaluated(rows, tokenizer, args, argument)

        return _read_as_needed(source, needed, lambda row: False, prompts, argument)
    rows = read_rows(source, argument)
    if target_completes(rows[0], args.regenerate) or has_prompts_alone(rows, argument):
        return prepare_prompts(rows, tokenizer, longest_prompt(args.max_length, args.max_new_tokens), argument)
    return prepare_sequences(rows, tokenizer, args.max_length, packing=args.packing, argument=argument)


def held_out_prompts(data: SequenceDataset, count: int, prompt_length: int) -> list[list[int]]:
    """The first `count` prompts: what stands before the first learned token, or the `prompt_length` first tokens."""
    prompts = []
    for index in range(min(count, len(data))):
        item = data[index]
        learned = item["loss_mask"].nonzero()[:, 0]
        start = int(learned[0]) if len(learned) else len(item["input_ids"])
        if len(learned) and start <= 1:
            start = max(min(prompt_length, len(item["input_ids"]) - 1), 1)
        prompts.append(item["input_ids"][:start].tolist())
    return prompts


def _checked(sequences: SequenceDataset, argument: str) -> SequenceDataset:
    if len(sequences) == 0:
        raise ValueError(f"{argument}: it holds no sequences. Pass data.")
    return sequences
