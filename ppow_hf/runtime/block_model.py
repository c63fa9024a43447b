"""The computation of a block drafter: a whole window in one forward over the target's states.

DFlash (2602.06036): a block of an anchor, the newest token, and mask tokens, which see each other and the target's
states of all tokens before the anchor. DSpark (2607.05147) adds a Markov head, which brings back that a token depends
on the one before it, and a confidence head. Parameter names are those of the published checkpoints. Knows nothing
about window rules, verification or training.

Words: a block's *states* `[B, M, K, h]` are its outputs, one for each drafted token, of M blocks that share a text. A
token's *feature* `[..., h + r]` is its state and the Markov embedding of the token before it; logits and confidence
are functions of the feature. `r` is 0 without a Markov head.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from .configuration_ppow import PPOWDrafterConfig
from .draft_models import DraftAttention, DraftNorm, GrowingKeys, TargetEmbeddings, rotated
from .draft_session import DraftSession, KeysValues, additive_mask, still_drafted

Context = list[KeysValues] | list[GrowingKeys]  # keys and values of the text's states, of each layer


def blocks_allowed(to_text: torch.Tensor, size: int) -> torch.Tensor:
    """Mask `[B, 1, M*n, S + M*n]` of M blocks of `size` n tokens: the text that each sees, and its own block.

    `to_text` bool `[B, 1, M, S]` says which of the text's states each block sees.
    """
    count, device = to_text.shape[2], to_text.device
    own = torch.eye(count, dtype=torch.bool, device=device).repeat_interleave(size, 0).repeat_interleave(size, 1)
    text = to_text.repeat_interleave(size, dim=2)
    return torch.cat([text, own.expand(len(text), 1, -1, -1)], dim=-1)


class BlockAttention(DraftAttention):
    """Qwen3's attention without causality, over keys and values of the target's states and of the block itself."""

    def __init__(self, config):
        super().__init__(config, config.hidden_size, config.attention_bias)
        self.q_norm = DraftNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = DraftNorm(self.head_dim, eps=config.rms_norm_eps)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, L, H*d] -> [B, H, L, d]

    def keys_values(self, x: torch.Tensor, angles: torch.Tensor) -> KeysValues:
        """Keys and values `[B, heads, L, d]` of `x` `[B, L, h]`."""
        keys = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        return rotated(keys, angles), self._heads(self.v_proj(x))

    def forward(self, x, angles, mask, context: KeysValues | GrowingKeys):
        queries = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        queries = rotated(queries, angles)
        own = self.keys_values(x, angles)
        if isinstance(context, GrowingKeys):
            keys, values = context.extended(*own)
            context.length -= x.shape[1]  # the block is not committed; what comes next is written over it
        else:
            keys, values = (torch.cat([text, block], dim=2) for text, block in zip(context, own, strict=True))
        return self.attend(queries, keys, values, mask)


class BlockLayer(GradientCheckpointingLayer):
    """A Qwen3 layer over a block; the target's states come as keys and values, without `input_layernorm`."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = BlockAttention(config)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = DraftNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DraftNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x, angles, mask=None, context: KeysValues | GrowingKeys | None = None):
        """A block's `x` after a text's keys and values; without these `x` are the target's states of a text, whose
        keys and values come back (through forward, so that a sharded layer's weights are there)."""
        if context is None:
            return self.self_attn.keys_values(x, angles)
        x = x + self.self_attn(self.input_layernorm(x), angles, mask, context)
        return x + self.mlp(self.post_attention_layernorm(x))


class TargetHead(TargetEmbeddings):
    """The target's output head, held by reference as [`TargetEmbeddings`] are."""

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """States `[..., h]` -> logits `[..., V]`, with gradients to the states alone.

        Raises `ValueError` before a target was attached.
        """
        if self.module is None:
            raise ValueError(
                "target: this drafter shares its target's output head and has none of its own; generate with its "
                "target, or call drafter.attach_target(target) first."
            )
        weight = self.module.weight
        if weight.is_meta or not weight.is_floating_point():  # offloaded or quantised: the module multiplies
            return self.module(states if weight.is_meta else states.to(weight.device)).to(states.device)
        return nn.functional.linear(states, weight.detach().to(states.device, states.dtype))


class MarkovHead(nn.Module):
    """DSpark's vanilla Markov head: a bias of low rank on a token's logits, from the token before it."""

    def __init__(self, vocab_size: int, width: int, rank: int):
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, width, bias=False)


class ConfidenceHead(nn.Module):
    """DSpark's confidence head: log-odds that a token is accepted, from its feature and before it is drawn."""

    def __init__(self, features: int):
        super().__init__()
        self.proj = nn.Linear(features, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features `[..., h + r]` -> log-odds `[...]`, in float32."""
        weight, bias = self.proj.weight.float(), self.proj.bias.float()
        return nn.functional.linear(features.float(), weight, bias).squeeze(-1)


class BlockDrafter(nn.Module):
    """DFlash's computation; with `markov_rank` and `confidence_head` DSpark's.

    The block is the anchor and K mask tokens, the states of which draft; with `sample_from_anchor` it is the anchor
    and K - 1 masks, and the anchor's own state drafts the first token. K is `block_size`.
    """

    first_prefix = 1

    def __init__(self, config: PPOWDrafterConfig):
        super().__init__()
        draft = config.draft_config
        self.config = draft
        self.block_size: int = config.longest_window  # type: ignore[assignment]
        self.mask_token_id, self.sample_from_anchor = config.mask_token_id, config.sample_from_anchor
        hidden, width = draft.hidden_size, config.draft_vocab_size or config.vocab_size
        states = len(config.target_layer_ids or [0]) * (config.target_hidden_size or hidden)
        shared = config.shares_target_embeddings
        self.embed_tokens = None if shared else nn.Embedding(config.vocab_size, hidden)
        self.target_embeddings, self.target_head = TargetEmbeddings(), TargetHead()
        self.fc = nn.Linear(states, hidden, bias=False)
        self.hidden_norm = DraftNorm(hidden, eps=draft.rms_norm_eps)
        self.layers = nn.ModuleList([BlockLayer(draft) for _ in range(draft.num_hidden_layers)])
        self.norm = DraftNorm(hidden, eps=draft.rms_norm_eps)
        self.lm_head = None if config.shares_target_head else nn.Linear(hidden, width, bias=False)
        rank = config.markov_rank
        self.markov_head = MarkovHead(config.vocab_size, width, rank) if rank else None
        self.confidence_head = ConfidenceHead(hidden + rank) if config.confidence_head else None
        self.rotary_emb = LlamaRotaryEmbedding(draft)

    # -- the text

    def encode(self, tokens, states, cache: Context | None, positions, allowed):
        """Take in the target's states of tokens p - 1, `[B, L, A*h_target]` at `positions` `[B, L]`.

        Returns the tokens p `[B, L, 1]`, each the anchor of the block after it, and the keys and values.
        """
        context = self.hidden_norm(self.fc(states.to(self.fc.weight.dtype)))
        angles = self.embed_positions(positions)
        known = [layer(context, angles) for layer in self.layers]
        if cache is None:
            return tokens[..., None], known
        for layer, keys_values in zip(cache, known, strict=True):
            layer.extended(*keys_values)  # type: ignore[attr-defined]
        return tokens[..., None], cache

    def embed_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions `[B, L]` as cosines and sines `[B, L, 2, d]`."""
        return torch.stack(self.rotary_emb(self.fc.weight, positions), dim=2)

    # -- blocks after it

    def block_states(
        self, anchors: torch.Tensor, positions: torch.Tensor, context: Context, to_text: torch.Tensor | None = None
    ) -> torch.Tensor:
        """States `[B, M, K, h]` of the blocks after `anchors` `[B, M]`, which stand at `positions` `[B, M]`.

        `to_text` bool `[B, 1, M, S]` says which of the text's states each block sees; `None`: one block, which sees
        all. No block sees another.
        """
        batch, count = anchors.shape
        size = self.block_size + (not self.sample_from_anchor)
        tokens = anchors[..., None].expand(-1, -1, size).clone()
        tokens[..., 1:] = self.mask_token_id
        steps = torch.arange(size, device=anchors.device)
        angles = self.embed_positions((positions[..., None] + steps).flatten(1))
        x = self.embeddings(tokens.flatten(1))
        mask = None if to_text is None else blocks_allowed(to_text, size)
        if mask is not None and self.config._attn_implementation == "eager":
            mask = additive_mask(mask, x.dtype)
        for layer, keys_values in zip(self.layers, context, strict=True):
            x = layer(x, angles, mask, keys_values)
        return self.norm(x).view(batch, count, size, -1)[:, :, size - self.block_size :]

    def embeddings(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids `[...]` -> the embeddings that a block reads `[..., h]`."""
        if self.embed_tokens is None:
            return self.target_embeddings.rows(tokens, self.fc.weight.dtype)
        return self.embed_tokens(tokens)

    def along(
        self,
        states: torch.Tensor,
        anchors: torch.Tensor,
        choose: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
        window: int,
        goes_on: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Windows `[B, A]` that come to each of `window` tokens, and their features `[B, A, h + r]` there.

        `states` `[B, M, K, h]` are those of the blocks after `anchors` `[B, M]`; `choose` and `goes_on` as of
        [`PPOWDrafter.unroll`].
        """
        windows = torch.arange(anchors.shape[1], device=anchors.device).expand(len(anchors), -1)
        alive, tokens = torch.ones_like(windows, dtype=torch.bool), anchors
        along: list[tuple[torch.Tensor, torch.Tensor]] = []
        for j in range(window):
            place = windows[..., None].expand(-1, -1, states.shape[-1])
            features = self.features(states[:, :, j].gather(1, place), tokens)
            along.append((windows, features))
            tokens = choose(j, features, windows)
            if goes_on is None or j == window - 1:
                continue
            alive = alive & goes_on(j, features, windows)
            order = still_drafted(alive)
            if order.shape[1] == 0:
                break
            windows, alive, tokens = (x.gather(1, order) for x in (windows, alive, tokens))
        return along

    # -- from states to logits

    def features(self, states: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """States `[..., h]` and the token before each `[...]` -> features `[..., h + r]`."""
        if self.markov_head is None:
            return states
        return torch.cat([states, self.markov_head.markov_w1(previous)], dim=-1)

    def logits(self, features: torch.Tensor, place: int | None = None) -> torch.Tensor:
        """Features `[..., h + r]` -> logits `[..., DV]`."""
        if self.markov_head is None:
            return self.state_logits(features)
        hidden = self.config.hidden_size
        return self.state_logits(features[..., :hidden]) + self.markov_head.markov_w2(features[..., hidden:])

    def state_logits(self, states: torch.Tensor) -> torch.Tensor:
        """States `[..., h]` -> logits `[..., DV]` before the Markov head's bias."""
        return self.target_head.logits(states) if self.lm_head is None else self.lm_head(states)

    def markov_bias(self, previous: torch.Tensor) -> torch.Tensor | float:
        """What tokens `[...]` add to the logits `[..., DV]` of the tokens after them; 0 without a Markov head."""
        head = self.markov_head
        return 0.0 if head is None else head.markov_w2(head.markov_w1(previous))

    def confidence(self, features: torch.Tensor) -> torch.Tensor | None:
        """Log-odds `[...]` that the token of each feature `[..., h + r]` is accepted; `None` without the head."""
        return None if self.confidence_head is None else self.confidence_head(features)

    # -- the cache of decoding

    def decoding_cache(self) -> list[GrowingKeys]:
        return [GrowingKeys() for _ in self.layers]

    @staticmethod
    def cropped(cache: Context, length: int) -> Context:
        """The first `length` states of the text; keys and values that no block writes after stay as they are."""
        for layer in cache:
            if isinstance(layer, GrowingKeys):
                layer.length = min(layer.length, length)
        return cache

    @staticmethod
    def rearranged(cache: list[GrowingKeys], change: Callable[[torch.Tensor], torch.Tensor]) -> list[GrowingKeys]:
        """`change` applied to keys and values `[B, heads, L, d]`."""
        return [GrowingKeys(*map(change, layer.held)) for layer in cache]


class BlockSession(DraftSession):
    """A block drafter's side of a generation call: one forward for all distributions of a window.

    With a Markov head the distribution after a token is the block's, with that token's bias: `next_logits` and
    `tree_logits` give exactly what a token is drawn from.
    """

    one_step = True

    def __init__(self, drafter: Any, width: int | None = None):
        super().__init__(drafter, width)
        self._states: Any = None  # [B, K, h] of the window's block
        self._state_logits: Any = None  # [B, K, DV]
        self._confidence: torch.Tensor | None = None

    @torch.inference_mode()
    def first_logits(self) -> torch.Tensor:
        draft, anchors = self.drafter.draft_model, self._feature[:, :, 0]  # type: ignore[index]
        if isinstance(self._position, int):
            positions = torch.full_like(anchors, self._position - 1)
        else:
            positions = self._position[:, None] - 1
        self._cache = draft.cropped(self._cache, self._committed)
        seen = None if self._visible is None else self._visible[:, None, None]
        self._states = draft.block_states(anchors, positions, self._cache, seen)[:, 0]
        self._state_logits = draft.state_logits(self._states)
        return self._logits(0, anchors)[:, 0]

    @torch.inference_mode()
    def next_logits(self, token: torch.Tensor, drafted: int) -> torch.Tensor:
        return self._logits(drafted + 1, self._readable(token))[:, 0]

    @torch.inference_mode()
    def tree_logits(self, tokens: torch.Tensor, parents: torch.Tensor, seen: torch.Tensor, depth: int) -> torch.Tensor:
        return self._logits(depth + 1, self._readable(tokens))

    def _logits(self, place: int, previous: torch.Tensor) -> torch.Tensor:
        """Logits `[B, k, V]` of the window's token at `place` after each of the tokens `previous` `[B, k]`."""
        draft = self.drafter.draft_model
        if draft.confidence_head is not None:
            states = self._states[:, place, None].expand(-1, previous.shape[1], -1)
            self._confidence = draft.confidence(draft.features(states, previous))
        logits = self._state_logits[:, place, None] + draft.markov_bias(previous)
        return self.drafter.to_target_width(logits.expand(-1, previous.shape[1], -1), self.width)

    @property
    def confidence(self) -> torch.Tensor | None:
        return self._confidence


__all__ = ["BlockDrafter", "BlockSession"]
