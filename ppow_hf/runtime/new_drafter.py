"""What a new drafter begins with: its configuration, its own transformer's, and which of the target's states it reads.

Knows configurations; makes no model.
"""

import copy
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from .compatibility import check_width, depth_field, num_layers
from .configuration_ppow import (
    SHAPE,
    PPOWDrafterConfig,
    check_whole,
    default_block_layers,
    default_target_layers,
    is_whole,
)
from .target_weights import embedding_matrix, target_width


def settable_fields() -> set[str]:
    """The fields of [`PPOWDrafterConfig`] that say what a drafter is or does, but for its kind and transformer."""
    return set(PPOWDrafterConfig().to_dict()) - {"draft_config", "architecture", "tie_word_embeddings"}


def config_for(
    target: PreTrainedModel, architecture: str, draft_vocab_size: int | None, overrides: dict[str, Any]
) -> PPOWDrafterConfig:
    """The configuration of a new drafter for `target`; `overrides` are fields of it, or of its own transformer's."""
    text, vocab_size = target.config.get_text_config(), target_width(target)
    if architecture != "standalone" and getattr(text, "altup_num_inputs", 1) > 1:
        raise ValueError(
            f"target: each layer of {type(target).__name__} has several states side by side (AltUp), which no "
            f'{architecture} drafter reads. Use architecture="standalone".'
        )
    config_fields = settable_fields()
    settings = {name: overrides.pop(name) for name in list(overrides) if name in config_fields}
    draft_config = draft_config_for(architecture, text, vocab_size, overrides)
    if architecture in ("eagle", "block") and "shares_target_embeddings" not in settings:
        source = embedding_matrix(target)
        same = source is not None and tuple(source.shape) == (vocab_size, draft_config.hidden_size)
        settings["shares_target_embeddings"] = same
    if architecture == "block":
        set_block_defaults(settings, target, draft_vocab_size, draft_config.hidden_size)
    longest = {"medusa": "medusa_heads", "block": "block_size"}.get(architecture)
    if longest is not None:
        settings.setdefault(longest, settings.get("max_window", PPOWDrafterConfig().max_window))
        settings.setdefault("max_window", settings[longest])
    layers = target_layers_for(architecture, settings.pop("target_layer_ids", None), num_layers(text))
    lengths = [getattr(c, "max_position_embeddings", None) for c in (text, draft_config)]
    of_target = {
        "target_name_or_path": target.config._name_or_path or None,
        "target_revision": getattr(target.config, "_commit_hash", None),
        "target_model_type": text.model_type,
        "context_length": min((length for length in lengths if length is not None), default=None),
        **{name: getattr(text, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    return PPOWDrafterConfig(
        architecture=architecture,
        draft_config=draft_config,
        vocab_size=vocab_size,
        draft_vocab_size=draft_vocab_size,
        target_hidden_size=text.hidden_size,
        target_layer_ids=layers,
        **of_target | settings,
    )


def draft_config_for(architecture: str, text_config, vocab_size: int, overrides: dict[str, Any]):
    """The configuration of a new drafter's own transformer, `overrides` being fields of it.

    A standalone drafter's is the target's with one layer, or the `draft_config` among the overrides.
    """
    for name in SHAPE:
        if overrides.get(name) is not None:
            check_whole(name, overrides[name])
    if architecture == "standalone":
        given = overrides.pop("draft_config", None)
        draft_config = copy.deepcopy(given if given is not None else text_config)
        draft_config._name_or_path = ""  # a new model: not what lies at the target's name or folder
        if given is None:
            overrides.setdefault(depth_field(text_config), overrides.pop("num_hidden_layers", 1))
            if getattr(draft_config, "num_kv_shared_layers", 0):  # of layers that are not there
                draft_config.num_kv_shared_layers = 0
            draft_config.vocab_size = vocab_size
        check_width(draft_config.vocab_size, vocab_size)
    else:
        if overrides.get("tie_word_embeddings"):
            raise ValueError("tie_word_embeddings: only a standalone drafter's embeddings can be tied.")
        check_layer_options(architecture, overrides)
        family, layers = ("qwen3", overrides.get("num_hidden_layers", 2)) if architecture == "block" else ("llama", 1)
        draft_config = layer_config(family, layers, text_config, vocab_size)
    for name, value in overrides.items():
        if not hasattr(draft_config, name):
            raise ValueError(
                f"{name}: neither a field of PPOWDrafterConfig nor of {type(draft_config).__name__}, the "
                "drafter's own transformer."
            )
        setattr(draft_config, name, value)
    if getattr(draft_config, "layer_types", None):
        draft_config.layer_types = draft_config.layer_types[: draft_config.num_hidden_layers]
    return draft_config


def set_block_defaults(settings: dict[str, Any], target: PreTrainedModel, draft_vocab_size: int | None, hidden: int):
    """What a new block drafter's `settings` leave out: DSpark's way of sampling with a Markov head, DFlash's without;
    the target's head where it can be shared; a mask token."""
    settings.setdefault("sample_from_anchor", settings.get("markov_rank", 0) > 0)
    head: Any = target.get_output_embeddings()
    whole = draft_vocab_size is None and getattr(head, "in_features", None) == hidden
    settings.setdefault("shares_target_head", whole and getattr(head, "bias", None) is None)
    if "mask_token_id" not in settings:
        source, last = embedding_matrix(target), target_width(target) - 1
        if source is not None:  # a padding token's row can be zeros, which tell a layer nothing
            last = min(last, int(source.abs().sum(1).nonzero()[-1]))
        settings["mask_token_id"] = last


def target_layers_for(architecture: str, given: list[int] | None, depth: int) -> list[int] | None:
    """The target's states that a new drafter reads, of a target with `depth` layers."""
    if architecture == "standalone":
        return None
    whole = isinstance(given, list | tuple) and all(map(is_whole, given))
    if given is not None and not (whole and given):
        raise ValueError(f"target_layer_ids: {given!r} given; pass a list of layers' numbers, or leave it out.")
    if architecture == "medusa":
        if given not in (None, [depth]):
            raise ValueError(
                f"target_layer_ids: {given} given, but medusa heads read the target's last state, [{depth}]. "
                "Leave it out."
            )
        return [depth]
    if architecture == "block":
        layers = given or default_block_layers(depth)
        if not 0 <= min(layers) <= max(layers) < depth:
            raise ValueError(
                f"target_layer_ids: {layers} must be ids from 0 to {depth - 1}, the states after so many of the "
                "target's layers. The last layer cannot be read: engines return its state before the final norm, "
                "transformers after it."
            )
        return list(layers)
    layers = given or default_target_layers(depth)
    if len(layers) != 3 or not 0 <= min(layers) <= max(layers) < depth:
        raise ValueError(
            f"target_layer_ids: {layers} must be three ids from 0 to {depth - 1}, the states after so many of "
            "the target's layers."
        )
    return list(layers)


def check_layer_options(architecture: str, options: dict[str, Any]) -> None:
    """Raise `ValueError` for options of a transformer that an eagle or medusa drafter's own does not have."""
    if architecture == "medusa":
        for name in options:
            raise ValueError(f"{name}: a medusa drafter has heads and no transformer of its own. Leave it out.")
    if architecture == "block":
        for name, value in {"attention_dropout": 0.0, "use_sliding_window": False}.items():
            if options.get(name, value) != value:
                raise ValueError(
                    f"{name}: {options[name]!r} given, but every layer of a block drafter sees all of the text and "
                    f"the block ({name}={value}). Leave it out."
                )
        kinds = options.get("layer_types")
        if kinds is not None and set(kinds) != {"full_attention"}:
            raise ValueError(
                f"layer_types: {kinds!r} given, but every layer of a block drafter sees all of the text and the "
                "block. Leave it out."
            )
        return
    fixed = {"num_hidden_layers": 1, "attention_bias": False, "attention_dropout": 0.0}
    for name, value in fixed.items():
        if options.get(name, value) != value:
            raise ValueError(
                f"{name}: {options[name]!r} given, but an eagle drafter has one layer, without bias or dropout in its "
                f'attention ({name}={value}). Leave it out, or use architecture="standalone".'
            )


def one_number(text_config: Any, name: str, default: float) -> Any:
    """A number of the target's configuration; `default` where it has none, or one for each layer."""
    try:
        value = getattr(text_config, name, None)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError, as of Gemma 4's head_dim
        return default
    return value if isinstance(value, int | float) and value else default


def layer_config(family: str, depth: int, text_config, vocab_size: int):
    """The configuration of an eagle (`"llama"`) or block (`"qwen3"`) drafter's layers: the target's shape where it has
    one."""
    hidden, heads = text_config.hidden_size, text_config.num_attention_heads
    parameters = getattr(text_config, "rope_parameters", None) or {}
    theta = parameters.get("rope_theta", 10000.0) if isinstance(parameters, dict) else 10000.0
    return AutoConfig.for_model(
        family,
        hidden_size=hidden,
        intermediate_size=one_number(text_config, "intermediate_size", 4 * hidden),
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=one_number(text_config, "num_key_value_heads", heads),
        head_dim=one_number(text_config, "head_dim", hidden // heads),
        vocab_size=vocab_size,
        max_position_embeddings=one_number(text_config, "max_position_embeddings", 2048),
        rms_norm_eps=one_number(text_config, "rms_norm_eps", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": theta or 10000.0},
        tie_word_embeddings=False,
        bos_token_id=getattr(text_config, "bos_token_id", None),
        eos_token_id=getattr(text_config, "eos_token_id", None),
        pad_token_id=getattr(text_config, "pad_token_id", None),
    )
