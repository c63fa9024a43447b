"""Whether a drafter, a target, a tokenizer and data belong together: clear errors before anything is computed."""

from typing import Any

from transformers import PreTrainedModel

from ..data.sequences import SequenceDataset
from ..runtime.compatibility import (
    check_target,
    check_width,
    rotary_change,
)
from ..runtime.configuration_ppow import has_vocabulary, vocabulary_fingerprint
from ..runtime.modeling_ppow import (
    PPOWDrafter,
)
from .arguments import PPOWTrainingArguments


def check_pair(drafter: Any, target: PreTrainedModel, tokenizer: Any, longest: int = 0) -> None:
    """Raise `ValueError` when drafter, target and tokenizer do not belong together.

    `longest`: tokens of the longest sequence with a window behind it.
    """
    if not isinstance(drafter, PPOWDrafter):
        raise ValueError(
            f"model: a {type(drafter).__name__} given; PPOWTrainer trains a PPOWDrafter. Make one with "
            "PPOWDrafter.from_target(target)."
        )
    check_target(target)
    config, text = drafter.config, target.config.get_text_config()
    width = target.get_output_embeddings().weight.shape[0]
    check_width(config.vocab_size, width)
    if config.target_layer_ids and config.target_hidden_size != text.hidden_size:
        raise ValueError(
            f"target_model: its hidden size is {text.hidden_size}, and this eagle drafter reads states of "
            f"{config.target_hidden_size}. Use the target it was made for, or make a drafter with from_target."
        )
    kind, border = rotary_change(target)
    if kind is not None and longest > border:
        raise ValueError(
            f"max_length: with max_window it gives {longest} tokens, and the target's rotary embedding ({kind}) "
            f"changes behind {border}, so that shorter texts would not have the states of decoding. Lower max_length."
        )
    if tokenizer is None:
        return
    if len(tokenizer) > width:
        raise ValueError(
            f"processing_class: the tokenizer has {len(tokenizer)} tokens and the target's logits only {width}. Pass "
            "the target's own tokenizer."
        )
    known = config.target_vocabulary_fingerprint
    if known and not has_vocabulary(tokenizer, known):
        raise ValueError(
            f"processing_class: its vocabulary ({vocabulary_fingerprint(tokenizer)}) is not the one that the drafter "
            f"was trained with ({known}). Pass the tokenizer of {config.target_name_or_path or 'its target'}."
        )


def check_lengths(sequences: SequenceDataset, args: PPOWTrainingArguments, context_length: int | None) -> None:
    """Raise `ValueError` when a training sequence is longer than `max_length` or than the models' context."""
    longest = max(len(sequences[index]["input_ids"]) for index in range(len(sequences)))
    if longest > args.max_length:
        raise ValueError(
            f"train_dataset: its longest sequence has {longest} tokens, more than max_length={args.max_length}. Raise "
            "max_length, or cut the sequences."
        )
    if context_length is not None and longest > context_length:
        raise ValueError(
            f"max_length: {args.max_length} given and a sequence of {longest} tokens found, but drafter and target "
            f"take {context_length} (max_position_embeddings). Lower max_length."
        )
