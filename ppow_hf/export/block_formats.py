"""The directory formats of block drafters, DFlash and DSpark: names and shapes of tensors, and fields of config.json.

Pure tables and conversions in both directions; reads and writes no files. The *native* formats are those that their
authors publish (`DFlashDraftModel`, `Qwen3DSparkModel`), read by vLLM and SGLang; speculators has its own config.json
around the same tensors. A drafter with a Markov head is written as DSpark, one without as DFlash.

The published `block_size` counts the block's tokens. Ours counts those that it drafts: one fewer where the anchor
drafts nothing. The native `target_layer_ids` number layers, one less than transformers' `hidden_states`.
"""

from typing import Any

import torch

from .formats import SPECULATORS_VERSION, layer_config, named_tensors, proposal_config

DFLASH, DSPARK = "DFlashDraftModel", "Qwen3DSparkModel"
SPECULATORS_DSPARK = "DSparkDraftModel"  # speculators calls its DFlash class as its authors do
QWEN3_FIELDS = ("attention_dropout", "layer_types", "sliding_window", "use_sliding_window")


def is_dspark(drafter: Any) -> bool:
    return drafter.config.markov_rank > 0


def published_block_size(drafter: Any) -> int:
    """Tokens of the block: the anchor counts where it drafts nothing."""
    config = drafter.config
    return config.longest_window + (not config.sample_from_anchor)


def block_shapes(
    fields: dict[str, Any], width: int, markov_rank: int, confidence_head: bool
) -> dict[str, tuple[int | None, ...]]:
    """Name and shape of every tensor of a DFlash or DSpark checkpoint; `None` stands for any size.

    Args:
        fields (`dict`): config.json's Qwen3 fields.
        width (`int`): size of the draft vocabulary.
        markov_rank (`int`), confidence_head (`bool`): DSpark's heads; 0 and `False` for DFlash.
    """
    hidden, inner, heads = fields["hidden_size"], fields["intermediate_size"], fields["num_attention_heads"]
    size, vocabulary = fields.get("head_dim") or hidden // heads, fields["vocab_size"]
    queries, keys = heads * size, (fields.get("num_key_value_heads") or heads) * size
    shapes: dict[str, tuple[int | None, ...]] = {
        "embed_tokens.weight": (vocabulary, hidden),
        "fc.weight": (hidden, None),  # as wide as the target's states together
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
        "lm_head.weight": (width, hidden),
    }
    for number in range(fields["num_hidden_layers"]):
        layer = f"layers.{number}."
        projections = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
        for name, shape in projections.items():
            shapes[f"{layer}self_attn.{name}_proj.weight"] = shape
            if fields.get("attention_bias"):
                shapes[f"{layer}self_attn.{name}_proj.bias"] = shape[:1]
        shapes |= {f"{layer}self_attn.{name}_norm.weight": (size,) for name in ("q", "k")}
        shapes |= {f"{layer}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, inner)
    if markov_rank:
        shapes["markov_head.markov_w1.weight"] = (vocabulary, markov_rank)
        shapes["markov_head.markov_w2.weight"] = (width, markov_rank)
    if confidence_head:
        shapes["confidence_head.proj.weight"] = (1, hidden + markov_rank)
        shapes["confidence_head.proj.bias"] = (1,)
    if width != vocabulary:
        shapes |= {"d2t": (width,), "t2d": (vocabulary,)}
    return shapes


def block_tensors(drafter: Any, embeddings: bool = True) -> dict[str, torch.Tensor]:
    """The tensors of a block [`PPOWDrafter`] under their published names, on the CPU; shared ones are left out."""
    tensors = named_tensors(drafter)
    if drafter.config.draft_vocab_size == drafter.config.vocab_size:  # a permutation of nothing
        tensors = {name: tensor for name, tensor in tensors.items() if name not in ("d2t", "t2d")}
    if not embeddings:
        tensors.pop("embed_tokens.weight", None)
    return tensors


def dspark_fields(drafter: Any) -> dict[str, Any]:
    """The fields of DSpark's heads, as both formats hold them."""
    config = drafter.config
    return {
        "markov_rank": config.markov_rank,
        "markov_head_type": "vanilla",
        "enable_confidence_head": config.confidence_head,
        "confidence_head_with_markov": config.confidence_head,
        "sample_from_anchor": config.sample_from_anchor,
    }


def native_config(drafter: Any, target_config: Any = None) -> dict[str, Any]:
    """config.json of the native format; the target's number of layers stands in it where that is known."""
    config = drafter.config
    block = {"mask_token_id": config.mask_token_id, "target_layer_ids": [i - 1 for i in config.target_layer_ids]}
    fields = {
        **layer_config(drafter, QWEN3_FIELDS),
        "architectures": [DSPARK if is_dspark(drafter) else DFLASH],
        "block_size": published_block_size(drafter),
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "target_hidden_size": config.target_hidden_size or config.draft_config.hidden_size,
    }
    if target_config is not None:
        fields["num_target_layers"] = target_config.get_text_config().num_hidden_layers
    return fields | (block | dspark_fields(drafter) if is_dspark(drafter) else {"dflash_config": block})


def speculators_block_config(
    drafter: Any, target_name: str, target_architectures: list[str], speculative_tokens: int
) -> dict[str, Any]:
    """config.json of speculators; the verifier is the target, found by its name or folder."""
    config = drafter.config
    hidden, algorithm = config.target_hidden_size, "dspark" if is_dspark(drafter) else "dflash"
    return {
        "architectures": [SPECULATORS_DSPARK if is_dspark(drafter) else DFLASH],
        "speculators_model_type": algorithm,
        "speculators_version": SPECULATORS_VERSION,
        "torch_dtype": str(drafter.dtype).removeprefix("torch."),
        "aux_hidden_state_layer_ids": list(config.target_layer_ids),
        "block_size": published_block_size(drafter),
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.sample_from_anchor,
        "sliding_window_non_causal": True,  # vLLM 0.32 makes every layer causal otherwise
        "target_hidden_size": None if hidden in (None, config.draft_config.hidden_size) else hidden,
        "tie_word_embeddings": False,
        "transformer_layer_config": layer_config(drafter, QWEN3_FIELDS),
        **(dspark_fields(drafter) if is_dspark(drafter) else {}),
        "speculators_config": proposal_config(algorithm, target_name, target_architectures, speculative_tokens),
    }
