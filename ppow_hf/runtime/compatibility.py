"""Which targets, drafters, calls and logits processors go together; raises before anything is computed."""

from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig
from transformers.generation import (
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from .configuration_ppow import warn_of_other_target
from .target_weights import target_width


def check_width(draft_width: int, target_width: int) -> None:
    """Raise `ValueError` when two logit widths cannot be paddings of one vocabulary (more than 1% or 512 apart)."""
    difference = abs(draft_width - target_width)
    if difference > min(512, 0.01 * target_width):
        raise ValueError(
            f"assistant_model: the drafter's vocabulary has {draft_width} tokens and the target's {target_width}. "
            "They can differ by padding (at most 512 tokens and 1%), not by this much: use a drafter of this target."
        )


def check_layers(layer_ids: Sequence[int] | None, num_layers: int, argument: str = "assistant_model") -> None:
    """Raise `ValueError` for states of layers that the target does not have."""
    if layer_ids and max(layer_ids) > num_layers:
        raise ValueError(
            f"{argument}: this drafter reads the target's layers {list(layer_ids)}, but the target has {num_layers}. "
            "Use a drafter trained for this target."
        )


def check_processors(logits_processor: Sequence[Any]) -> None:
    """Raise `ValueError` for a logits processor that counts its calls as tokens of the output."""
    for processor in logits_processor:
        for kind, argument, what in (
            (UnbatchedClassifierFreeGuidanceLogitsProcessor, "guidance_scale", "classifier-free guidance"),
            (SynthIDTextWatermarkLogitsProcessor, "watermarking_config", "a SynthID watermark"),
        ):
            if isinstance(processor, kind):
                raise ValueError(
                    f"{argument}: {what} remembers each position that it was asked about, and speculative decoding "
                    "asks about draft tokens that are thrown away again, so the output would not be the target's own. "
                    f"Leave out {argument}, or generate without a drafter."
                )


def check_call(target: Any, drafter: Any, generation_config: GenerationConfig) -> None:
    """Raise `ValueError` for a call that a PPOWDrafter cannot serve, before anything is computed."""
    config = drafter.config
    text = target.config.get_text_config()
    if target.config.is_encoder_decoder:
        raise ValueError(
            f"assistant_model: a PPOWDrafter drafts for decoder-only targets; {type(target).__name__} has an encoder."
        )
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(
            f"num_beams: {generation_config.num_beams} beams given, but speculative decoding verifies one sequence. "
            "Pass num_beams=1, or leave out assistant_model."
        )
    if generation_config.assistant_ensemble_weight is not None:
        raise ValueError(
            "assistant_ensemble_weight: it changes the target's output, which a PPOWDrafter never does. Leave it out."
        )
    check_width(config.vocab_size, target_width(target))
    if config.target_layer_ids and config.target_hidden_size != text.hidden_size:
        raise ValueError(
            f"assistant_model: this eagle drafter reads hidden states of size {config.target_hidden_size}, and the "
            f"target's have {text.hidden_size}. Use a drafter trained for this target"
            f"{' (this one was for ' + config.target_name_or_path + ')' if config.target_name_or_path else ''}."
        )
    check_layers(config.target_layer_ids, text.num_hidden_layers)
    warn_of_other_target(config, target.config._name_or_path)


def common_context_length(target_config: Any, drafter_config: Any) -> int | None:
    """The longest sequence that both can read; beyond it nothing is drafted. `None` where neither has a limit."""
    lengths = (
        getattr(target_config.get_text_config(), "max_position_embeddings", None),
        getattr(drafter_config.draft_config, "max_position_embeddings", None),
        drafter_config.context_length,
    )
    return min((length for length in lengths if length), default=None)
