"""From a user's data to sequences to train on and prompts to evaluate on.

Knows rows, arguments and which of them the target completes; knows no drafter and no training step.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.regeneration import longest_prompt, regenerate
from ..data.sequences import SequenceDataset, has_prompts_alone, prepare_prompts, prepare_sequences, read_rows
from .arguments import PPOWTrainingArguments

logger = logging.get_logger(__name__)


def training_sequences(
    source: Any, target: PreTrainedModel, tokenizer: Any, args: PPOWTrainingArguments, argument: str = "train_dataset"
) -> SequenceDataset:
    """What `train_dataset` stands for: sequences as they are, or rows with completions of the target or their own."""
    if isinstance(source, SequenceDataset):
        return _checked(source, argument)
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


def _evaluated(source: Any, tokenizer: Any, args: PPOWTrainingArguments, argument: str) -> SequenceDataset:
    if isinstance(source, SequenceDataset):
        return _checked(source, argument)
    rows = read_rows(source, argument)
    if target_completes(rows[0], args.regenerate) or has_prompts_alone(rows, argument):
        return prepare_prompts(rows, tokenizer, longest_prompt(args.max_length, args.max_new_tokens), argument)
    return prepare_sequences(rows, tokenizer, args.max_length, packing=args.packing, argument=argument)


def _checked(sequences: SequenceDataset, argument: str) -> SequenceDataset:
    if len(sequences) == 0:
        raise ValueError(f"{argument}: it holds no sequences. Pass data.")
    return sequences
