"""What a new drafter's weights begin with: its target's embeddings, head and, where wanted, layers.

Knows both models' modules; knows nothing about training.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .block_model import BlockDrafter, MarkovHead
from .draft_models import EagleDrafter, MedusaDrafter, StandaloneDrafter
from .target_weights import embedding_matrix, head_matrix, input_device

logger = logging.getLogger(__name__)

# Where an eagle layer's weights lie in a decoder layer of the Llama kind; its attention reads [embedding, state].
EAGLE_LAYER = {
    "hidden_norm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "self_attn.o_proj.weight": "self_attn.o_proj.weight",
    **{f"mlp.{name}_proj.weight": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
}
EAGLE_ATTENTION = tuple(f"self_attn.{name}_proj.weight" for name in ("q", "k", "v"))


@torch.no_grad()
def start_from_target(
    drafter: Any, target: Any, token_counts: torch.Tensor | None, init_layers: Sequence[int] | None
) -> None:
    """Give an untrained `drafter` what it can take over from `target`; arguments are those of `from_target`."""
    draft = drafter.draft_model
    head = head_matrix(target)
    if isinstance(draft, MedusaDrafter):
        _start_medusa(draft, head)
        return
    drafter.attach_target(target)
    embeddings, source = drafter.get_input_embeddings().weight, embedding_matrix(target)
    if not drafter.config.shares_target_embeddings and source is not None:
        rows = min(len(source), len(embeddings))
        if source.shape[1] > embeddings.shape[1]:
            source = source[:rows].float() @ main_directions(source, embeddings.shape[1])
        if source.shape[1] == embeddings.shape[1]:
            embeddings[:rows] = source[:rows].to(embeddings)
    if isinstance(draft, StandaloneDrafter):
        draft_head = draft.model.get_output_embeddings().weight
        if head is not None and draft_head is not embeddings and draft_head.shape == head.shape:
            draft_head.copy_(head.to(draft_head))
        if init_layers is not None:
            _start_standalone_layers(draft.model, target, init_layers)
        return
    _start_states_and_head(drafter, target, head, token_counts)
    if init_layers is not None:
        _start_eagle_layer(draft, decoder_layers(target)[init_layers[0]])


def _start_medusa(draft: MedusaDrafter, head: torch.Tensor | None) -> None:
    """Each head begins as the target's own, for the token that it knows."""
    for parameter in draft.blocks.parameters():
        parameter.zero_()
    if head is not None:
        for draft_head in draft.lm_heads:
            draft_head.weight.copy_(head.to(draft_head.weight))


def _start_states_and_head(
    drafter: Any, target: Any, head: torch.Tensor | None, token_counts: torch.Tensor | None
) -> None:
    """Of an eagle or block drafter: the draft vocabulary of the most frequent tokens, the head's rows of them, states
    let through."""
    draft: EagleDrafter | BlockDrafter = drafter.draft_model
    kept, kept_counts = torch.arange(drafter.config.vocab_size), None
    if drafter.d2t is not None:
        if token_counts is None or not len(drafter.d2t) <= len(token_counts) <= drafter.config.vocab_size:
            raise ValueError(
                "token_counts: a reduced draft vocabulary keeps the most frequent tokens, so pass how often each "
                f"of the target's {drafter.config.vocab_size} tokens occurs in the training data; given was "
                f"{None if token_counts is None else tuple(token_counts.shape)}."
            )
        kept = token_counts.topk(len(drafter.d2t)).indices.sort().values
        kept_counts = token_counts[kept]
        drafter.set_draft_vocabulary(kept)
    hidden = draft.fc.out_features
    through = torch.eye(drafter.config.target_hidden_size)  # how the highest state enters the drafter
    if head is not None and head.shape[1] > hidden:
        through = main_directions(head, hidden)
        head = head.float() @ through
    if draft.lm_head is not None and head is not None and head.shape[1] == hidden:
        draft.lm_head.weight.copy_(head[kept.to(head.device)].to(draft.lm_head.weight))
    if isinstance(draft, BlockDrafter):
        _start_block(drafter, head, kept_counts)
        if draft.markov_head is not None:
            _start_markov_head(draft.markov_head, embedding_matrix(target), kept)
    if through.shape[1] == hidden:
        # The highest of the target's states passes through at the start: what the target's own head reads is near.
        draft.fc.weight.mul_(0.1)
        draft.fc.weight[:, -len(through) :] += through.T.to(draft.fc.weight)


def main_directions(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Orthonormal directions `[D, count]` that keep most of the squared length of `rows` `[V, D]`, the greatest
    first: a drafter narrower than its target begins with what they hold of its embeddings and head [ours]."""
    rows = rows.float()
    return torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)[:, :count]


def _start_block(drafter: Any, head: torch.Tensor | None, kept_counts: torch.Tensor | None) -> None:
    """Let a block drafter with a reduced head begin with how often each token occurs [ours].

    The layers add nothing yet. What is left, a token's own embedding, the target's head reads as that token: the norm
    keeps its logit near log DV, and a change of the head by a matrix of rank one lets the mask token's embedding give
    the logarithms of `kept_counts` `[DV]`. A drafter with a whole head begins at random.
    """
    draft: BlockDrafter = drafter.draft_model
    if kept_counts is None or head is None or head.shape[1] != draft.config.hidden_size:
        return
    for layer in draft.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    rows = draft.lm_head.weight  # type: ignore[union-attr]
    largest = rows.norm(dim=1).mean().item() * rows.shape[1] ** 0.5
    draft.norm.weight.fill_(math.log(len(rows)) / max(largest, math.log(len(rows))))
    mask = torch.tensor([drafter.config.mask_token_id], device=rows.device)
    state = draft.norm(draft.embeddings(mask)[0])
    frequencies = kept_counts.to(state) + 1.0
    wanted = (frequencies / frequencies.sum()).log()
    rows += torch.outer(wanted - rows @ state, state) / state.dot(state)


def _start_markov_head(head: MarkovHead, embeddings: torch.Tensor | None, kept: torch.Tensor) -> None:
    """Let a Markov head add nothing yet, and know a token by where its embedding lies along the main directions of
    those that are `kept` `[DV]`: like tokens then share what is learned after one of them [ours]."""
    head.markov_w2.weight.zero_()
    if embeddings is None:
        return
    embeddings = embeddings[: head.markov_w1.num_embeddings].float()
    kept = kept[kept < len(embeddings)].to(embeddings.device)
    centre = embeddings[kept].mean(0)
    known = embeddings[kept] - centre
    directions = main_directions(known, head.markov_w1.embedding_dim)
    places = (embeddings - centre) @ (directions / (known @ directions).std(0).clamp_min(1e-6))
    head.markov_w1.weight[: len(places), : places.shape[1]] = places.clamp(-4, 4).to(head.markov_w1.weight)


# -- the target's states

MEASURED_TOKENS = 128
STATE_SIZE = 0.25  # the root mean square that scaled states have: small beside what the layer learns to add


def measured_state_scales(target: Any, layer_ids: Sequence[int]) -> list[float] | None:
    """The `state_scales` of a drafter that reads the states `layer_ids`, by one forward of `target` [ours].

    The forward is of tokens from all over the vocabulary. `None` where the target's layers have no weights, or, with a
    warning, where it fails.
    """
    hooked = any(hasattr(module, "_hf_hook") for module in target.modules())  # accelerate's, which load weights
    if not hooked and any(parameter.is_meta for parameter in target.parameters()):
        return None
    try:
        states = _measured_states(target)
        return [state_scale(states[layer][0]) for layer in layer_ids]
    except Exception as error:  # whatever a family's forward or the library that stores the weights raises
        logger.warning(
            "target: the size of its states could not be measured (%s: %s). The drafter reads them as they are, and "
            "may learn more slowly. Pass state_scales to from_target to set it.",
            type(error).__name__,
            error,
        )
        return None


@torch.no_grad()
def _measured_states(target: Any) -> tuple[torch.Tensor, ...]:
    """All states `[1, L, h]` of tokens from all over the vocabulary; the target's dropout is off."""
    text, embeddings = target.config.get_text_config(), target.get_input_embeddings()
    count = min(MEASURED_TOKENS, getattr(text, "max_position_embeddings", None) or MEASURED_TOKENS)
    width = min(text.vocab_size, getattr(embeddings, "num_embeddings", text.vocab_size))
    tokens = (torch.arange(count, device=input_device(target)) * width // count)[None]
    training = [module for module in target.modules() if module.training]
    target.eval()
    try:
        return target(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            output_hidden_states=True,
            use_cache=False,
            return_dict=True,
        ).hidden_states
    finally:
        for module in training:
            module.training = True


def state_scale(states: torch.Tensor) -> float:
    """The power of two that brings states `[L, h]` closest to a root mean square of [`STATE_SIZE`].

    Of the tokens' the median counts: the first token's states can be a hundred times as large. In float32 and bfloat16
    a power of two loses nothing where an export multiplies weights by it.
    """
    size = states.float().pow(2).mean(-1).median().sqrt().item()
    return 2.0 ** round(math.log2(STATE_SIZE / size)) if 0 < size < math.inf else 1.0


# -- the target's layers


def check_init_layers(architecture: str, init_layers: Sequence[int], num_layers: int) -> None:
    """Raise `ValueError` for layers that a target of `num_layers` lacks, or that a drafter has no place for."""
    if architecture not in ("eagle", "standalone"):
        raise ValueError(
            f"init_layers: a drafter of architecture {architecture!r} begins without layers of its target."
        )
    if not init_layers or not all(0 <= layer < num_layers for layer in init_layers):
        raise ValueError(f"init_layers: {list(init_layers)} given; the target's layers are 0 to {num_layers - 1}.")
    if architecture == "eagle" and len(init_layers) != 1:
        raise ValueError(f"init_layers: {list(init_layers)} given, but an eagle drafter has one layer; name one.")


def decoder_layers(target: Any) -> nn.ModuleList:
    """The target's decoder layers; `ValueError` where they are no list called `layers`."""
    layers = getattr(target.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"init_layers: the layers of a {type(target).__name__} could not be found. Leave it out for this target."
        )
    return layers


def _start_standalone_layers(model: Any, target: Any, init_layers: Sequence[int]) -> None:
    """Copy whole layers, and the norm after the last one."""
    layers, sources = decoder_layers(model), decoder_layers(target)
    if len(layers) != len(init_layers):
        raise ValueError(f"init_layers: {len(init_layers)} layers given for a drafter of {len(layers)}.")
    for layer, number in zip(layers, init_layers, strict=True):
        _copy_module(layer, sources[number])
    norm, source = (getattr(one.get_decoder(), "norm", None) for one in (model, target))
    if norm is not None and source is not None:
        _copy_module(norm, source)


def _start_eagle_layer(draft: EagleDrafter, source: nn.Module) -> None:
    """Copy a layer of the Llama kind; of the attention's inputs its weights read the state, and not the embedding.

    What it adds to the state is as much smaller as `state_scales` make the state.
    """
    weights, layer = dict(source.named_parameters()), draft.midlayer
    hidden = draft.fc.out_features
    for name, place in EAGLE_LAYER.items():
        _copy_into(layer.get_parameter(name), weights.get(place), place)
    for name in EAGLE_ATTENTION:
        _copy_into(layer.get_parameter(name)[:, hidden:], weights.get(name), name)
    if (scales := draft.drafter_config.state_scales) is not None:
        for added in (layer.self_attn.o_proj, layer.mlp.down_proj):
            added.weight.mul_(scales[-1])


def _copy_module(module: nn.Module, source: nn.Module) -> None:
    """Set all that is saved of a module, buffers too, from another of its kind."""
    weights = dict(source.named_parameters()) | dict(source.named_buffers())
    for name, own in module.state_dict().items():
        _copy_into(own, weights.get(name), name)


def _copy_into(own: torch.Tensor, weight: torch.Tensor | None, name: str) -> None:
    numbers = weight is not None and not weight.is_meta and weight.is_floating_point() == own.is_floating_point()
    if weight is None or not numbers or weight.shape != own.shape:
        given = "none in plain numbers" if weight is None or weight.is_meta else f"{weight.dtype} {list(weight.shape)}"
        raise ValueError(
            f"init_layers: the drafter's layer needs {name} of shape {list(own.shape)}, and the target's has {given}. "
            "Leave init_layers out, or the options that change the drafter's shape."
        )
    own.copy_(weight)
