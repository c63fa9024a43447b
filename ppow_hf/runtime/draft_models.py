"""The computations that a PPOWDrafter can have inside: eagle, standalone and medusa behind one interface.

Each turns known tokens (and the target's states) into features (`encode`), features and one more token into the next
features (`advance`), and features into logits on its own vocabulary (`logits`). Knows nothing about window
rules, verification or training. `first_prefix` is the shortest prefix that has a feature.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    eager_attention_forward,
    rotate_half,
)

from .configuration_ppow import PPOWDrafterConfig
from .draft_session import KeysValues, additive_mask, cache_argument, causal_allowed, rearrange_cache

# Attention scores of a draft step (batch * heads * windows * text) that are held at once, of 14 bytes each. Of more,
# blocks of windows attend one after the other, and the backward pass computes each block's again.
SCORES_AT_ONCE = 2**24
BLOCK_SCORES = 2**22


@dataclass
class WindowKeys:
    """Keys and values after M windows that share a text and see nothing of each other.

    Args:
        text (`[B, heads, S, d]` each): the text's.
        ends (`[B, M]`): the last of the text's keys that each window sees.
        own (`[B, heads, M, j, d]` each, *optional*): of the j tokens that each window has.
    """

    text: KeysValues
    ends: torch.Tensor
    own: KeysValues | None = None

    def extended(self, keys: torch.Tensor, values: torch.Tensor) -> "WindowKeys":
        """With one more token of each window, `[B, heads, M, d]` each."""
        own = keys[:, :, :, None], values[:, :, :, None]
        if self.own is not None:
            own = torch.cat([self.own[0], own[0]], dim=3), torch.cat([self.own[1], own[1]], dim=3)
        return WindowKeys(self.text, self.ends, own)

    def of_windows(self, order: torch.Tensor) -> "WindowKeys":
        """Those of the windows `order` `[B, A]` alone."""
        ends = self.ends.gather(1, order)
        if self.own is None:
            return WindowKeys(self.text, ends)
        index = order[:, None, :, None, None].expand(-1, self.own[0].shape[1], -1, *self.own[0].shape[3:])
        return WindowKeys(self.text, ends, (self.own[0].gather(2, index), self.own[1].gather(2, index)))

    def attend(self, queries: torch.Tensor, scaling: float) -> torch.Tensor:
        """What queries `[B, q_heads, M, d]` see of the text and of their own window: `[B, M, q_heads * d]`.

        Memory grows with text and windows: no more than [`SCORES_AT_ONCE`] of their product are held.
        """
        assert self.own is not None
        scores = queries[..., 0].numel() * self.text[0].shape[2]
        if scores <= SCORES_AT_ONCE:
            return attend_windows(queries, *self.own, self.ends, *self.text, scaling)
        blocks = -(-scores // BLOCK_SCORES)
        parts = (
            tensor.tensor_split(blocks, dim)
            for tensor, dim in ((queries, 2), *((x, 2) for x in self.own), (self.ends, 1))
        )
        seen = [
            checkpoint(attend_windows, *block, *self.text, scaling, use_reentrant=False, preserve_rng_state=False)
            for block in zip(*parts, strict=True)
        ]
        return torch.cat(seen, dim=1)


def attend_windows(
    queries: torch.Tensor,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    ends: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attention of windows' newest tokens, `[B, M, q_heads * d]`; shapes as of [`WindowKeys`].

    A window's own tokens are few: one product each, where a mask over all windows' tokens would be M times as wide.
    """
    batch, heads, count, width = own_keys.shape[0], own_keys.shape[1], queries.shape[2], queries.shape[3]
    grouped = queries.reshape(batch, heads, -1, count, width)
    to_text = (grouped.flatten(2, 3) @ keys.transpose(2, 3)).unflatten(2, grouped.shape[2:4])
    beyond = torch.arange(keys.shape[2], device=ends.device) > ends[..., None]  # [B, M, S]
    to_text = to_text.masked_fill(beyond[:, None, None], -torch.inf)
    to_own = (grouped[:, :, :, :, None] * own_keys[:, :, None]).sum(-1)
    weights = (torch.cat([to_text.float(), to_own.float()], dim=-1) * scaling).softmax(-1).to(values.dtype)
    of_text, of_own = weights.split([keys.shape[2], own_keys.shape[3]], dim=-1)
    seen = (of_text.flatten(2, 3) @ values).view(grouped.shape)
    seen = seen + (of_own[..., None] * own_values[:, :, None]).sum(-2)
    return seen.flatten(1, 2).transpose(1, 2).flatten(2)


class GrowingKeys:
    """Keys and values of decoding, with room after them: one more token does not copy all that came before.

    Without gradients only. What was cropped is overwritten by what comes next.
    """

    def __init__(self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None):
        self.length = 0 if keys is None else keys.shape[2]
        self._room = (keys, values)  # [B, heads, length and more, d] each

    @property
    def held(self) -> KeysValues:
        """`[B, heads, length, d]` each."""
        keys, values = self._room
        return keys[:, :, : self.length], values[:, :, : self.length]  # type: ignore[index]

    def extended(self, *more: torch.Tensor) -> KeysValues:
        """Write `more` keys and values `[B, heads, n, d]` after those held, and return them all."""
        before, self.length = self.length, self.length + more[0].shape[2]
        if self._room[0] is None or self._room[0].shape[2] < self.length:
            size = self.length + max(self.length // 2, 256)
            grown = [new.new_empty(*new.shape[:2], size, new.shape[3]) for new in more]
            for old, new in zip(self._room, grown, strict=True):
                if old is not None:
                    new[:, :, :before] = old[:, :, :before]
            self._room = (grown[0], grown[1])
        for room, new in zip(self._room, more, strict=True):
            room[:, :, before : self.length] = new  # type: ignore[index]
        return self.held


EagleCache = KeysValues | WindowKeys | GrowingKeys | None


class DraftNorm(LlamaRMSNorm):
    """The same norm in one operation where types allow: a draft step is short, and takes as long to call as to do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.weight.dtype:  # under autocast
            return super().forward(x)
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


def rotated(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Queries and keys `[B, H, L, d]` turned by their positions' cosines and sines `[B, L, 2, d]`.

    Llama's `apply_rotary_pos_emb` turns queries and keys one by one; here they are side by side.
    """
    cosines, sines = angles[:, None].unbind(3)
    return heads * cosines + rotate_half(heads) * sines


def rows_at(whole: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rows `[B, M, ...]` of `whole` `[B, L, ...]` at `places` `[B, M]`."""
    return whole[torch.arange(len(places), device=places.device)[:, None], places]


class DraftAttention(nn.Module):
    """The projections of grouped-query attention from `width` numbers, and the attention that the config names."""

    def __init__(self, config, width: int, bias: bool):
        super().__init__()
        self.config = config
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False  # unless a call says so
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=bias)

    def attend(self, queries, keys, values, mask, is_causal: bool = False) -> torch.Tensor:
        """Heads `[B, H, L, d]` -> `[B, L, h]`."""
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        options = {"dropout": 0.0, "scaling": self.scaling, "is_causal": is_causal}
        output, _ = attention(self, queries, keys, values, mask, **options)
        return self.o_proj(output.flatten(2))


class EagleAttention(DraftAttention):
    """Llama attention over [embedding, state], twice as wide at its input, with keys and values handed in and out."""

    def __init__(self, config):
        super().__init__(config, 2 * config.hidden_size, bias=False)

    def heads(self, projection: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """`[B, heads, L, d]` from `x` `[B, L, 2*h]`."""
        return projection(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def keys_values(self, x: torch.Tensor, angles: torch.Tensor) -> KeysValues:
        """Keys and values alone, of tokens that others see."""
        return rotated(self.heads(self.k_proj, x), angles), self.heads(self.v_proj, x)

    def forward(self, x, angles, mask, past: EagleCache):
        queries, keys, values = (self.heads(projection, x) for projection in (self.q_proj, self.k_proj, self.v_proj))
        turned = rotated(torch.cat([queries, keys], dim=1), angles)
        queries, keys = turned.split([queries.shape[1], keys.shape[1]], dim=1)
        if isinstance(past, WindowKeys):
            past = past.extended(keys, values)
            return self.o_proj(past.attend(queries, self.scaling)), past
        if isinstance(past, GrowingKeys):
            keys, values = past.extended(keys, values)
        elif past is not None:
            keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        output = self.attend(queries, keys, values, mask, is_causal=mask is None and past is None)
        return output, past if isinstance(past, GrowingKeys) else (keys, values)


class EagleDecoderLayer(GradientCheckpointingLayer):
    """EAGLE-3's one layer: attention over [norm(embedding), norm(state)]; the residual is the state.

    With `norm_before_residual` it is norm(state) [speculators].
    """

    def __init__(self, config, norm_before_residual: bool):
        super().__init__()
        self.norm_before_residual = norm_before_residual
        self.self_attn = EagleAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = DraftNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = DraftNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DraftNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, embeddings, states, angles, mask, past: EagleCache, places: torch.Tensor | None = None):
        """States `[B, L, h]` and the cache; with `places` `[B, M]` those of these tokens alone, `[B, M, h]`, as of
        windows that begin with them: of the others only keys and values are computed."""
        normed = self.hidden_norm(states)
        x = torch.cat([self.input_layernorm(embeddings), normed], dim=-1)
        if places is not None:
            past = WindowKeys(self.self_attn.keys_values(x, angles), places - 1)
            x, normed, states, angles = (rows_at(whole, places) for whole in (x, normed, states, angles))
        attended, keys_values = self.self_attn(x, angles, mask, past)
        states = (normed if self.norm_before_residual else states) + attended
        return states + self.mlp(self.post_attention_layernorm(states)), keys_values


class TargetEmbeddings:
    """The target's own token embeddings, held by reference: no part of the drafter that is saved, counted or moved.

    A copy of the drafter refers to the same ones, a pickled drafter to none.
    """

    def __init__(self, module: Any = None):
        self.module = module

    def __deepcopy__(self, memo: dict) -> "TargetEmbeddings":
        return type(self)(self.module)

    def __getstate__(self) -> dict[str, Any]:
        return {"module": None}

    def rows(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Their weights at `tokens` `[B, L]`, `[B, L, h]`, on the tokens' device and without a gradient.

        Raises `ValueError` before a target was attached.
        """
        if self.module is None:
            raise ValueError(
                "target: this drafter shares its target's token embeddings and has none of its own; generate with its "
                "target, or call drafter.attach_target(target) first."
            )
        weight = self.module.weight
        if weight.is_meta or not weight.is_floating_point():  # offloaded or quantised: the module knows how to look up
            found = self.module(tokens if weight.is_meta else tokens.to(weight.device))
        else:  # not the module, which scales them in some families: engines read the weights as well
            found = nn.functional.embedding(tokens.to(weight.device), weight)
        return found.detach().to(tokens.device, dtype)


def scaled_states(states: torch.Tensor, scales: list[float]) -> torch.Tensor:
    """Each of the states that lie side by side in the last dimension, times its number of `scales`."""
    return torch.cat([part * scale for part, scale in zip(states.chunk(len(scales), -1), scales, strict=True)], dim=-1)


class EagleDrafter(nn.Module):
    """The EAGLE-3 computation; parameter names are those of the published checkpoints.

    A feature is what later draft steps are fed: the layer's output before the final norm, or after it with
    `norm_output` [speculators].
    """

    first_prefix = 1

    def __init__(self, config: PPOWDrafterConfig):
        super().__init__()
        draft = config.draft_config
        if draft.num_hidden_layers != 1:
            raise ValueError(
                f"draft_config: num_hidden_layers={draft.num_hidden_layers} given, but an eagle drafter has one "
                "layer. Set it to 1."
            )
        self.config, self.drafter_config = draft, config
        width = config.draft_vocab_size or config.vocab_size
        fused = len(config.target_layer_ids or [0, 0, 0]) * (config.target_hidden_size or draft.hidden_size)
        shared = config.shares_target_embeddings
        self.embed_tokens = None if shared else nn.Embedding(config.vocab_size, draft.hidden_size)
        self.target_embeddings = TargetEmbeddings()
        self.input_norm = DraftNorm(fused, eps=draft.rms_norm_eps) if config.norm_before_fc else None
        self.fc = nn.Linear(fused, draft.hidden_size, bias=False)
        self.midlayer = EagleDecoderLayer(draft, config.norm_before_residual)
        self.norm_output = config.norm_output
        self.norm = DraftNorm(draft.hidden_size, eps=draft.rms_norm_eps)
        self.lm_head = nn.Linear(draft.hidden_size, width, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(draft)

    def encode(self, tokens, states, cache, positions, allowed, places=None):
        """Tokens p with the target's states of tokens p - 1, `[B, L]` and `[B, L, 3*h_target]` -> features, cache.

        Without a cache, `allowed` may be `None`: each token sees those before it. With `places` `[B, M]` features are
        of these tokens alone, `[B, M, h]`, and the cache is [`WindowKeys`] of windows that begin with them.
        """
        states = states.to(self.fc.weight.dtype)
        if self.input_norm is not None:
            states = self.input_norm(states)
        elif self.drafter_config.state_scales is not None:
            states = scaled_states(states, self.drafter_config.state_scales)
        features = self.fc(states)
        return self.advance(tokens, features, cache, self.embed_positions(positions), allowed, places)

    def embed_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions `[B, L]` as `advance` takes them: cosines and sines `[B, L, 2, d]`."""
        return torch.stack(self.rotary_emb(self.fc.weight, positions), dim=2)

    def advance(self, tokens, features, cache, angles, allowed, places=None):
        """One more token after each feature: `[B, L]`, `[B, L, h]` -> features `[B, L, h]`, cache."""
        own = self.embed_tokens
        embeddings = self.target_embeddings.rows(tokens, self.fc.weight.dtype) if own is None else own(tokens)
        mask = allowed
        if self.config._attn_implementation == "eager" and places is None and not isinstance(cache, WindowKeys):
            if mask is None and cache is None:
                mask = causal_allowed(tokens.shape[1], 0, tokens.device)
            mask = None if mask is None else additive_mask(mask, embeddings.dtype)
        features, cache = self.midlayer(embeddings, features, angles, mask, cache, places)
        return (self.norm(features) if self.norm_output else features), cache

    def logits(self, features: torch.Tensor, place: int | None = None) -> torch.Tensor:
        return self.lm_head(features if self.norm_output else self.norm(features))

    @staticmethod
    def decoding_cache() -> GrowingKeys:
        """An empty cache for a generation call."""
        return GrowingKeys()

    @staticmethod
    def cropped(cache: Any, length: int) -> Any:
        if isinstance(cache, GrowingKeys):
            cache.length = min(cache.length, length)
            return cache
        return cache[0][:, :, :length], cache[1][:, :, :length]

    @staticmethod
    def rearranged(cache: GrowingKeys, change: Callable[[torch.Tensor], torch.Tensor]) -> GrowingKeys:
        """`change` applied to keys and values `[B, heads, L, d]`."""
        return GrowingKeys(*map(change, cache.held))


class StandaloneDrafter(nn.Module):
    """Any causal language model of transformers as a drafter. A feature is its last hidden state (after the norm).

    Sliding windows are not honoured: in training the masks of packed windows cannot express them, and in decoding a
    cache that forgets cannot be rolled back. Every layer sees the whole prefix in both. Families with linear biases
    (ALiBi) place tokens by the mask of tokens seen or by their columns, so that they read chains only.
    """

    first_prefix = 0

    def __init__(self, config: PPOWDrafterConfig):
        super().__init__()
        self.config = config.draft_config
        if self.config._attn_implementation == "sdpa":  # the default: left open, a family without it takes eager
            self.config._attn_implementation = None
        self.model = AutoModelForCausalLM.from_config(config.draft_config)
        self.takes_positions = "position_ids" in inspect.signature(self.model.base_model.forward).parameters
        self.reads_chains_only = not self.takes_positions or getattr(config.draft_config, "alibi", False)
        self.slides = getattr(config.draft_config, "sliding_window", None) is not None

    def encode(self, tokens, states, cache, positions, allowed):
        """Tokens p `[B, L]` -> features `[B, L, h]`, cache; the target's states are not read."""
        return self.advance(tokens, None, cache, positions, allowed)

    def embed_positions(self, positions: torch.Tensor) -> torch.Tensor:
        return positions  # the model embeds them itself

    def advance(self, tokens, features, cache, positions, allowed):
        if allowed is None and self.slides:  # left to itself the model would make sliding masks
            allowed = causal_allowed(tokens.shape[1], self.cache_length(cache), tokens.device)
        mask = None
        if allowed is not None:
            if self.reads_chains_only:
                mask = self._chain_mask(allowed).expand(len(tokens), -1)
            else:
                mask = additive_mask(allowed, self.model.dtype)
        if cache is None and not torch.is_grad_enabled():
            cache = DynamicCache()
        outputs = self.model.base_model(
            input_ids=tokens,
            attention_mask=mask,
            use_cache=cache is not None,
            **({"position_ids": positions} if self.takes_positions else {}),
            **{cache_argument(self.model.base_model): cache},
        )
        return outputs.last_hidden_state, cache

    def check_runs(self) -> None:
        """Raise `ValueError` for a family that does not draft token by token here; tried on three tokens."""
        device = next(self.parameters()).device
        tokens, places = torch.zeros(1, 3, dtype=torch.long, device=device), torch.arange(3, device=device)[None]
        try:
            with torch.no_grad():
                features, cache = self.encode(tokens[:, :2], None, None, places[:, :2], None)
                self.advance(tokens[:, 2:], features[:, -1:], cache, places[:, 2:], None)
                self.cropped(cache, 2)
        except Exception as error:  # whatever a family's own code raises
            raise ValueError(
                f"draft_config: a {type(self.model).__name__} cannot be a standalone drafter ({error}). Pass a "
                'draft_config of another family, such as llama, or use architecture="eagle".'
            ) from error

    def _chain_mask(self, allowed: torch.Tensor) -> torch.Tensor:
        """The tokens seen `[B, keys]` (B may be 1), where `allowed` `[B, 1, L, keys]` is the causal mask of them."""
        length, keys = allowed.shape[-2:]
        seen = allowed[:, 0, -1]
        itself = torch.eye(length, keys, dtype=torch.bool, device=allowed.device).roll(keys - length, dims=1)
        chain = (causal_allowed(length, keys - length, allowed.device) & seen[:, None, None]) | itself
        if not torch.equal(chain, allowed):
            raise ValueError(
                f"draft_config: a standalone drafter of the class {type(self.model).__name__} places tokens by what "
                "they see (ALiBi), so it reads neither trees of drafted tokens nor the packed windows of training. "
                'Leave out tree_nodes; to train one, use architecture="eagle" or a draft_config of a family that '
                "takes position_ids, such as llama."
            )
        return seen.long()

    def logits(self, features: torch.Tensor, place: int | None = None) -> torch.Tensor:
        return self.model.get_output_embeddings()(features)

    @staticmethod
    def cache_length(cache: DynamicCache | None) -> int:
        return 0 if cache is None else cache.get_seq_length()

    @staticmethod
    def decoding_cache() -> DynamicCache:
        return DynamicCache()

    @staticmethod
    def cropped(cache: DynamicCache, length: int) -> DynamicCache:
        surplus = cache.get_seq_length() - length
        if surplus > 0:
            cache.crop(-surplus)
        return cache

    @staticmethod
    def rearranged(cache: DynamicCache, change: Callable[[torch.Tensor], torch.Tensor]) -> DynamicCache:
        return rearrange_cache(cache, change)


class MedusaBlock(GradientCheckpointingLayer):
    """Residual layers of one head: x + silu(W x + b), `num_layers` times."""

    def __init__(self, hidden_size: int, num_layers: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(hidden_size, hidden_size) for _ in range(num_layers)])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            states = states + nn.functional.silu(layer(states))
        return states


class MedusaDrafter(nn.Module):
    """Medusa (2401.10774): head i reads the target's state of token p, after its final norm, and predicts token p+2+i.

    Parameter names are those of vLLM's MedusaModel. No head reads another's token: a whole window hangs on the one
    state that the target's last forward left, and drafting needs no cache. A feature is that state with the number of
    the next head in a last channel, so that `logits` knows which head to ask; heads are computed when they are asked
    for, so that a window which stops early pays for its own tokens only.
    """

    first_prefix = 1

    def __init__(self, config: PPOWDrafterConfig):
        super().__init__()
        self.config = config.draft_config
        hidden = config.target_hidden_size or config.draft_config.hidden_size
        heads = range(config.longest_window)  # type: ignore[arg-type]
        self.blocks = nn.ModuleList([MedusaBlock(hidden, config.medusa_layers) for _ in heads])
        self.lm_heads = nn.ModuleList([nn.Linear(hidden, config.vocab_size, bias=False) for _ in heads])

    def encode(self, tokens, states, cache, positions, allowed):
        """The target's states of tokens p - 1 `[B, L, h]` -> features of prefixes p `[B, L, h + 1]`, no cache."""
        states = states.to(self.lm_heads[0].weight.dtype)
        return nn.functional.pad(states, (0, 1)), ()

    def embed_positions(self, positions: torch.Tensor) -> torch.Tensor:
        return positions  # not read

    def advance(self, tokens, features, cache, positions, allowed):
        """The next head's turn, whatever `tokens` were drafted; the last head stays the last."""
        states, head = features[..., :-1], features[..., -1:]
        return torch.cat([states, (head + 1).clamp_max(len(self.blocks) - 1)], dim=-1), cache

    def logits(self, features: torch.Tensor, place: int | None = None) -> torch.Tensor:
        states, head = features[..., :-1], features[..., -1].long()
        # With gradients every head takes part, if only with no rows: DDP waits for each parameter's gradient.
        if torch.is_grad_enabled():
            used = list(range(len(self.blocks)))
        else:
            used = head.unique().tolist() if place is None else [min(place, len(self.blocks) - 1)]
        if len(used) == 1:
            return self.lm_heads[used[0]](self.blocks[used[0]](states))
        logits = states.new_zeros(*head.shape, self.lm_heads[0].out_features)
        for number in used:
            rows = head == number
            logits = logits.index_put((rows,), self.lm_heads[number](self.blocks[number](states[rows])).to(logits))
        return logits

    @staticmethod
    def decoding_cache() -> tuple:
        return ()

    @staticmethod
    def cropped(cache: tuple, length: int) -> tuple:
        return cache

    @staticmethod
    def rearranged(cache: tuple, change: Callable[[torch.Tensor], torch.Tensor]) -> tuple:
        return cache
