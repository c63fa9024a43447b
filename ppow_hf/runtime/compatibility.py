"""Which targets, drafters, calls and logits processors go together; raises before anything is computed."""

import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.generation import logits_process as processors
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from .configuration_ppow import warn_of_other_target
from .target_weights import target_width

# Families with a preparation of inputs of their own that does to new tokens what it does to a whole text: phi3 and
# phimoe read the text again where the rotary embedding changes (see check_rotary_change), gemma3 and gemma4 give token
# types to the prompt only.
PREPARES_NEW_TOKENS = {"phi3", "phimoe", "gemma3", "gemma4"}
READS_ALL_AGAIN = {"cpmant", "flaubert", "xlm"}  # families that take the whole text at every step, cache or not
# Processors of encoder-decoder and audio models: they hold on to each call, or want scores of two batches in one.
STATEFUL_PROCESSORS = (
    processors.ClassifierFreeGuidanceLogitsProcessor,
    processors.DiaClassifierFreeGuidanceLogitsProcessor,
    processors.DiaEOSChannelFilterLogitsProcessor,
    processors.DiaEOSDelayPatternLogitsProcessor,
    processors.WhisperNoSpeechDetection,
)
# Settings of transformers' own assistants, and those of ours that stand in their place.
STOCK_SETTINGS = {
    "num_assistant_tokens": "max_window",
    "num_assistant_tokens_schedule": "window",
    "assistant_confidence_threshold": "window",
    "prompt_lookup_num_tokens": "lookup",
}
WITHOUT_WEIGHTS = ("sdpa", "flex_attention")  # and flash attention: kernels that return no attention weights
MODES = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION}


def check_width(draft_width: int, target_width: int) -> None:
    """Raise `ValueError` when two logit widths cannot be paddings of one vocabulary (more than 1% or 512 apart)."""
    difference = abs(draft_width - target_width)
    if difference > min(512, 0.01 * target_width):
        raise ValueError(
            f"assistant_model: the drafter's vocabulary has {draft_width} tokens and the target's {target_width}. "
            "They can differ by padding (at most 512 tokens and 1%), not by this much: use a drafter of this target."
        )


def check_inputs(input_ids: torch.Tensor, embeddings: torch.Tensor | None) -> None:
    """Raise `ValueError` for a prompt that is not given as tokens."""
    if embeddings is not None:
        raise ValueError(
            "inputs_embeds: a drafter reads tokens, so pass the prompt as input_ids, or generate without a drafter."
        )
    if input_ids.shape[1] == 0:
        raise ValueError(
            "input_ids: an empty prompt given; pass at least one token, such as the one that begins texts."
        )


def check_layers(layer_ids: Sequence[int] | None, num_layers: int, argument: str = "assistant_model") -> None:
    """Raise `ValueError` for states of layers that the target does not have."""
    if layer_ids and max(layer_ids) > num_layers:
        raise ValueError(
            f"{argument}: this drafter reads the target's layers {list(layer_ids)}, but the target has {num_layers}. "
            "Use a drafter trained for this target."
        )


def depth_field(text: Any) -> str:
    """Where a text configuration says how many layers write: of an encoder's beside it, `num_hidden_layers` tells."""
    names = ("decoder_layers", "num_decoder_layers")
    return next((name for name in names if getattr(text, name, None) is not None), "num_hidden_layers")


def num_layers(text: Any) -> int:
    """Layers of a target with this text configuration."""
    return getattr(text, depth_field(text))


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
        if isinstance(processor, STATEFUL_PROCESSORS):
            raise ValueError(
                f"logits_processor: a {type(processor).__name__} keeps a state of its own from call to call, or reads "
                "several rows as one, which drafts that are thrown away again would spoil. Leave it out, or generate "
                "without a drafter."
            )


def check_target(target: Any) -> None:
    """Raise `ValueError` for a model that a PPOWDrafter cannot draft for, however it is called or trained."""
    name = type(target).__name__
    if target.config.is_encoder_decoder:
        raise ValueError(
            f"target: a PPOWDrafter drafts for decoder-only targets; {name} has an encoder. Give a causal language "
            "model, or generate without a drafter."
        )
    if not target.can_generate():
        raise ValueError(f"target: {name} writes no text. Give a causal language model (AutoModelForCausalLM).")
    method = prompt_learning(target)
    if method is not None:
        raise ValueError(
            f"target: its adapter is of PEFT's kind {method}, which puts virtual tokens before the text that a "
            "drafter cannot read. Generate without a drafter, or tune the target's weights with an adapter (LoRA)."
        )
    kinds = set(getattr(target.config.get_text_config(), "layer_types", None) or ())
    recurrent = any("linear" in kind or kind in ("mamba", "recurrent", "conv", "hybrid") for kind in kinds)
    if recurrent or getattr(target, "_is_stateful", False):
        raise ValueError(
            f"{name} keeps a recurrent state, which cannot take back rejected draft tokens. Generate without a "
            "drafter."
        )
    reads_again = target.config.model_type in READS_ALL_AGAIN
    if reads_again or not target._supports_default_dynamic_cache() or not takes_cache(target):
        raise ValueError(
            f"target: {name} has no cache from which rejected draft tokens can be taken back. Generate without a "
            "drafter."
        )


def takes_cache(target: Any) -> bool:
    """Whether a target's forward takes a cache; `True` for a wrapper that hides what it takes."""
    parameters = inspect.signature(type(target).forward).parameters
    hidden = not isinstance(target, GenerationMixin)
    return hidden or "cache" in parameters or "past_key_values" in parameters


def prompt_learning(target: Any) -> str | None:
    """PEFT's name of an adapter that acts on the inputs (prompt, prefix or p-tuning), where `target` has one."""
    # While a PeftModel generates, its base model is the target and holds the PeftModel's way to prepare inputs.
    wrapper = getattr(target.prepare_inputs_for_generation, "__self__", target)
    for model in (target, wrapper):
        adapter = getattr(model, "active_peft_config", None)
        if adapter is not None and adapter.is_prompt_learning:
            return str(getattr(adapter.peft_type, "value", adapter.peft_type))
    return None


def check_preparation(target: Any, own_masks: bool, many: bool, tensors: Sequence[str]) -> None:
    """Raise `ValueError` where our loop cannot let the target prepare its inputs as plain `generate` does.

    Args:
        own_masks (`bool`): whether we make the attention masks (trees, batches with sliding windows).
        many (`bool`): whether rows are padded or several.
        tensors (`Sequence[str]`): names of the tensors that go along with the tokens (images and the like).
    """
    name = type(target).__name__
    advice = "Pass one prompt, without tree_nodes, with assistant_model=drafter; or generate without a drafter."
    if not prepares_new_tokens(target):
        raise ValueError(
            f"custom_generate: {name} prepares its inputs in a way of its own, which this loop does not know. {advice}"
        )
    makes_masks = getattr(target, "create_masks_for_generate", None) is not None
    if tensors and own_masks and makes_masks:
        raise ValueError(
            f"{tensors[0]}: {name} makes attention masks from it, and trees and batches with sliding windows take "
            f"masks of our own. {advice}"
        )
    once = (*MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL, "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    along = [key for key in tensors if key not in (*once, "token_type_ids", "mm_token_type_ids")]
    if along and many:
        raise ValueError(
            f"{along[0]}: it goes along with every token, which this loop does for one prompt only. {advice}"
        )


def prepares_new_tokens(target: Any) -> bool:
    """Whether a target prepares new tokens as it does a whole text, as far as we know."""
    prepare = target.prepare_inputs_for_generation
    stock = getattr(prepare, "__func__", prepare) is GenerationMixin.prepare_inputs_for_generation
    return stock or target.config.model_type in PREPARES_NEW_TOKENS


def check_rotary_change(target: Any, lengths: Sequence[int], new_tokens: int | None) -> None:
    """Raise `ValueError` where the target's rotary embedding changes between the first and the last token of a call.

    `longrope` has one set of frequencies up to a length and another beyond; `dynamic` new ones at each token beyond.
    All tokens of a forward get the same, so that windows across the change, or rows on both sides of it, would not get
    their own. A single row is never drafted beyond a `dynamic` embedding's length.

    Args:
        lengths (`Sequence[int]`): tokens of each prompt.
        new_tokens (`int`, *optional*): the most that each row can grow by; `None`: no limit.
    """
    kind, border = rotary_change(target)
    longest = max(lengths) + (math.inf if new_tokens is None else new_tokens) - 1  # the last token is not read
    crosses = min(lengths) <= border < longest if kind == "longrope" else len(lengths) > 1 and border < longest
    if kind is not None and crosses:
        raise ValueError(
            f"max_new_tokens: the rotary embedding ({kind}) of {type(target).__name__} changes after {border} "
            f"tokens, and this call can come from {min(lengths)} to {longest:.0f}. Lower max_new_tokens, "
            f"{'pass prompts one by one, ' if len(lengths) > 1 else ''}or generate without a drafter."
        )


def rotary_change(target: Any) -> tuple[str | None, int]:
    """Which of the kinds of [`check_rotary_change`] a target has, and the tokens up to which nothing changes."""
    text = target.config.get_text_config()
    given = getattr(text, "rope_parameters", None) or {}
    found: list[tuple[str, int]] = []
    for rope in (given, *(value for value in given.values() if isinstance(value, dict))):
        kind = rope.get("rope_type")
        if kind == "longrope":
            own = rope.get("original_max_position_embeddings")
            found.append((kind, own or getattr(text, "original_max_position_embeddings", None) or 0))
        elif kind == "dynamic":
            found.append((kind, text.max_position_embeddings))
    return min(found, key=lambda change: change[1], default=(None, 0))


def check_call(target: Any, drafter: Any, generation_config: GenerationConfig, tokenizer: Any = None) -> None:
    """Raise `ValueError` for a call that a PPOWDrafter cannot serve, before anything is computed.

    Warns of what changes nothing: settings of other assistants, a drafter of another target.
    """
    config = drafter.config
    text = target.config.get_text_config()
    check_target(target)
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(
            f"num_beams: {generation_config.num_beams} given, perhaps by the target's generation_config.json, but "
            "speculative decoding verifies one sequence. Set it to 1, or generate without a drafter."
        )
    mode = generation_config.get_generation_mode()
    if mode not in MODES:
        raise ValueError(
            f"assistant_model: speculative decoding works with greedy search and sampling, not with {mode.value}. "
            "Leave out the drafter, or the options that select that mode."
        )
    if generation_config.use_cache is False and target.generation_config.use_cache is not False:  # MPT's own is False
        raise ValueError(
            "use_cache: False given, but rejected draft tokens are taken back from the cache. Leave it out, or "
            "generate without a drafter."
        )
    if generation_config.assistant_ensemble_weight is not None:
        raise ValueError(
            "assistant_ensemble_weight: it changes the target's output, which a PPOWDrafter never does. Leave it out."
        )
    attention, asked = str(text._attn_implementation), generation_config.return_dict_in_generate
    if asked and generation_config.output_attentions and ("flash" in attention or attention in WITHOUT_WEIGHTS):
        raise ValueError(
            "output_attentions: True given, perhaps by the target's generation_config.json, and its attention "
            f'({attention}) returns none. Load the target with attn_implementation="eager", or set it to False.'
        )
    check_width(config.vocab_size, target_width(target))
    if config.target_layer_ids and config.target_hidden_size != text.hidden_size:
        raise ValueError(
            f"assistant_model: this {config.architecture} drafter reads hidden states of size "
            f"{config.target_hidden_size}, and the target's have {text.hidden_size}. Use a drafter trained for this "
            f"target{' (this one was for ' + config.target_name_or_path + ')' if config.target_name_or_path else ''}."
        )
    check_layers(config.target_layer_ids, num_layers(text))
    warn_of_stock_settings(generation_config)
    warn_of_other_target(config, target.config._name_or_path, tokenizer)


def warn_of_stock_settings(generation_config: GenerationConfig) -> None:
    """Warn of settings of transformers' own assistants that are not the default: a PPOWDrafter does not heed them."""
    defaults = GenerationConfig._get_default_generation_params()
    for name, ours in STOCK_SETTINGS.items():
        value = getattr(generation_config, name, None)
        if value is not None and value != defaults.get(name):
            warnings.warn(
                f"{name}: {value!r} given, perhaps by the target's generation_config.json, which a PPOWDrafter does "
                f"not heed. Set {ours} with drafter.with_settings() instead.",
                stacklevel=2,
            )


def common_context_length(target_config: Any, drafter_config: Any) -> int | None:
    """The longest sequence that both can read; beyond it nothing is drafted. `None` where neither has a limit."""
    lengths = (
        getattr(target_config.get_text_config(), "max_position_embeddings", None),
        getattr(drafter_config.draft_config, "max_position_embeddings", None),
        drafter_config.context_length,
    )
    return min((length for length in lengths if length), default=None)
