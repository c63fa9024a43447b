"""The drafter's side of a generation call, for one sequence or a batch of them, and the masks and caches it needs.

Knows features, caches and attention masks; knows nothing about window rules, verification or training.
"""

import functools
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

KeysValues = tuple[torch.Tensor, torch.Tensor]
AHEAD = 16  # tokens of a window whose positions are embedded at once


def to_device(values: Sequence, device: torch.device) -> torch.Tensor:
    """Whole numbers of the host as a tensor on `device`, without waiting for what runs there."""
    return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)


def now(device: torch.device) -> float:
    """The host's clock in seconds, once the device has finished what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def collect_target_states(
    hidden_states: Sequence[torch.Tensor], layer_ids: Sequence[int] | None
) -> torch.Tensor | None:
    """The states that a drafter reads, side by side: `[B, S, n*h]` from transformers' `hidden_states` tuple; `None`
    for one that reads none."""
    return torch.cat([hidden_states[layer] for layer in layer_ids], dim=-1) if layer_ids else None


def additive_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`allowed` bool `[..., queries, keys]` as the float mask that transformers' attention implementations add."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
        ~allowed, torch.finfo(dtype).min
    )


def causal_allowed(query_count: int, past_count: int, device: torch.device) -> torch.Tensor:
    """Causal mask `[1, 1, queries, past + queries]` for new tokens after `past_count` cached ones."""
    queries = torch.arange(past_count, past_count + query_count, device=device)
    return (torch.arange(past_count + query_count, device=device) <= queries[:, None])[None, None]


def packed_allowed(length: int, prefixes: torch.Tensor, window: int) -> torch.Tensor:
    """Tree mask `[B, 1, S + M*K, S + M*K]` of a sequence with M windows of K tokens after it.

    The sequence is causal; a window's token sees its prefix and the window's own earlier tokens and itself.
    """
    batch, count = prefixes.shape
    device = prefixes.device
    total = length + count * window
    allowed = torch.zeros(batch, total, total, dtype=torch.bool, device=device)
    allowed[:, :length, :length] = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    to_prefix = torch.arange(length, device=device) <= prefixes[..., None]  # [B, M, S]
    allowed[:, length:, :length] = to_prefix.repeat_interleave(window, dim=1)
    step = torch.ones(window, window, dtype=torch.bool, device=device).tril()
    allowed[:, length:, length:] = torch.block_diag(*[step] * count) if window else False
    return allowed[:, None]


def still_drafted(alive: torch.Tensor) -> torch.Tensor:
    """Places `[B, A']` of the windows that are `alive` `[B, A]` bool; shorter rows are filled up with others."""
    return (~alive).long().argsort(dim=1, stable=True)[:, : int(alive.sum(1).max())]


def cache_argument(model: nn.Module) -> str:
    """What this model's forward calls its cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    parameters = _forward_parameters(model.__class__)
    if "cache" in parameters or "past_key_values" in parameters:
        return "cache" if "cache" in parameters else "past_key_values"
    from transformers import LlamaForCausalLM  # a wrapper that hides the signature: what this transformers does

    return "cache" if "cache" in _forward_parameters(LlamaForCausalLM) else "past_key_values"


@functools.cache
def _forward_parameters(model_class: Any) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


def rearrange_cache(cache: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`change` applied to every layer's keys and values `[B, heads, L, d]`, in place."""
    for layer in cache.layers:
        if layer.keys is not None and layer.keys.numel():
            layer.keys, layer.values = change(layer.keys), change(layer.values)
    return cache


def gather_columns(columns: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The change of a cache `[B, heads, L, d]` that keeps `columns` `[B, kept]` of each row, in that order."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        index = columns[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
        return tensor.gather(2, index.to(tensor.device))

    return change


def compacting_columns(visible: torch.Tensor) -> torch.Tensor:
    """Columns `[B, kept]` of a cache with holes, `visible` `[B, L]` bool, in which only left padding remains."""
    kept = int(visible.sum(1).max())
    return visible.long().argsort(dim=1, stable=True)[:, visible.shape[1] - kept :]


class DraftSession:
    """The drafter's side of one generation call: its cache, what it has read, and the window it is drafting.

    `observe` reads committed tokens; `first_logits` gives the distribution after them; `next_logits(token)` the one
    after a drafted token. A drafter that proposes a whole window from one state (medusa) answers `next_logits` from
    the state that `first_logits` had. Rows of a batch end at the same column: what is not a row's own is padding on
    the left of what was observed, never seen again (`visible` False).
    """

    one_step = False  # whether `first_logits` computes what all of a window's distributions need

    def __init__(self, drafter: Any, width: int | None = None):
        self.drafter = drafter
        self.width = width or drafter.config.vocab_size
        self._cache: Any = drafter.draft_model.decoding_cache()
        self._committed = 0  # columns of committed tokens that the cache holds
        self._visible: torch.Tensor | None = None  # [B, columns] of them; None while every one is some row's token
        self._feature: torch.Tensor | None = None
        self._drafting: torch.Tensor | None = None
        self._position: int | torch.Tensor = 0  # of the token after everything observed
        self._places: torch.Tensor | None = None  # [B, AHEAD, ...] of the window's tokens from `_places_from` on
        self._places_from = 0
        embeddings = drafter.get_input_embeddings()
        self._known = self.width if embeddings is None else min(self.width, len(embeddings.weight))

    @property
    def confidence(self) -> torch.Tensor | None:
        """Log-odds `[B, k]` of a confidence head for the logits that were computed last; `None` without one."""
        return None

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been observed yet."""
        return self._committed == 0

    def _readable(self, tokens: torch.Tensor) -> torch.Tensor:
        """A target padded wider than the drafter may hold tokens that the drafter has no embedding of."""
        return tokens if self._known == self.width else tokens.clamp_max(self._known - 1)

    def _places_of(self, drafted: int, count: int) -> torch.Tensor:
        """Places `[B, count, ...]` of `count` tokens that each are the window's `drafted`-th, embedded ahead."""
        if self._places is None or not 0 <= drafted - self._places_from < AHEAD:
            draft, feature = self.drafter.draft_model, self._feature
            assert feature is not None
            ahead = torch.arange(drafted, drafted + AHEAD, device=feature.device) - draft.first_prefix
            start = self._position if isinstance(self._position, int) else self._position[:, None]
            positions = (ahead + start).expand(len(feature), -1)
            self._places, self._places_from = draft.embed_positions(positions), drafted
        place = self._places[:, drafted - self._places_from :][:, :1]
        return place if count == 1 else place.expand(-1, count, *place.shape[2:])

    @torch.inference_mode()
    def observe(
        self,
        tokens: torch.Tensor,
        target_states: torch.Tensor | None,
        first_position: int | torch.Tensor,
        visible: torch.Tensor | None = None,
    ) -> None:
        """Read committed tokens `[B, L]`, whose first one stands at `first_position` of the sequence.

        For eagle `target_states` `[B, L, 3*h]` holds the states of the tokens one position earlier each. Rows of
        different lengths are padded on the left, `visible` `[B, L]` False there, and `first_position` `[B]` is that
        of each row's first own token.
        """
        draft = self.drafter.draft_model
        self._cache = draft.cropped(self._cache, self._committed)
        (batch, length), past, device = tokens.shape, self._committed, tokens.device
        if visible is not None and self._visible is None and bool(visible.all()):
            visible = None
        allowed: torch.Tensor | None
        if visible is None and self._visible is None:
            allowed = causal_allowed(length, past, device) if length > 1 else None
            steps = torch.arange(length, device=device)[None].expand(batch, -1)  # [B, L] from a row's first token
        else:
            visible = torch.ones_like(tokens, dtype=torch.bool) if visible is None else visible
            seen = visible.new_ones(batch, past) if self._visible is None else self._visible
            self._visible = torch.cat([seen, visible], dim=1)
            itself = torch.eye(length, past + length, dtype=torch.bool, device=device).roll(past, dims=1)
            allowed = (causal_allowed(length, past, device) & self._visible[:, None, None]) | itself
            steps = (visible.long().cumsum(1) - 1).clamp_min(0)
        start = first_position if isinstance(first_position, int) else first_position[:, None]
        positions = (steps + start - draft.first_prefix).clamp_min(0)
        features, self._cache = draft.encode(self._readable(tokens), target_states, self._cache, positions, allowed)
        self._committed += length
        self._feature, self._places = features[:, -1:], None
        if isinstance(first_position, int) and visible is None:
            self._position = first_position + length
        else:
            self._position = positions[:, -1] + 1 + draft.first_prefix

    @torch.inference_mode()
    def first_logits(self) -> torch.Tensor:
        """Logits `[B, V]` of the token after everything observed."""
        self._drafting = self._feature
        return self.drafter.compute_logits(self._feature[:, 0], self.width, place=0)  # type: ignore[index]

    @torch.inference_mode()
    def next_logits(self, token: torch.Tensor, drafted: int) -> torch.Tensor:
        """Logits `[B, V]` after the drafted `token` `[B, 1]`, the window's `drafted`-th (counted from 0)."""
        draft = self.drafter.draft_model
        allowed = None
        if self._visible is not None:
            allowed = nn.functional.pad(self._visible, (0, drafted + 1), value=True)[:, None, None]
        self._drafting, self._cache = draft.advance(
            self._readable(token), self._drafting, self._cache, self._places_of(drafted, 1), allowed
        )
        return self.drafter.compute_logits(self._drafting[:, 0], self.width, drafted + 1)  # type: ignore[index]

    @torch.inference_mode()
    def tree_logits(self, tokens: torch.Tensor, parents: torch.Tensor, seen: torch.Tensor, depth: int) -> torch.Tensor:
        """Logits `[B, k, V]` after the k tokens of a tree's level.

        Args:
            tokens (`[B, k]`): the level's tokens.
            parents (`[B, k]`): the place of each one's parent in the level before; 0 in the first level.
            seen (`[B, k, n + k]` bool): which of the n tokens of earlier levels and of these each one follows.
            depth (`int`): the level, counted from 0.
        """
        draft = self.drafter.draft_model
        features: Any = self._drafting
        features = features.gather(1, parents[..., None].expand(-1, -1, features.shape[-1]))
        batch, count = tokens.shape
        committed = seen.new_ones(batch, self._committed) if self._visible is None else self._visible
        allowed = torch.cat([committed[:, None].expand(-1, count, -1), seen], dim=-1)[:, None]
        self._drafting, self._cache = draft.advance(
            self._readable(tokens), features, self._cache, self._places_of(depth, count), allowed
        )
        return self.drafter.compute_logits(self._drafting, self.width, depth + 1)

    @torch.inference_mode()
    def keep_rows(self, rows: torch.Tensor) -> None:
        """Go on with these rows `[B']` of the batch alone; between a window's verification and the next `observe`."""
        draft = self.drafter.draft_model
        self._cache = draft.rearranged(draft.cropped(self._cache, self._committed), lambda t: t[rows])
        self._feature = self._feature[rows]  # type: ignore[index]
        self._visible = None if self._visible is None else self._visible[rows]
        self._position = self._position if isinstance(self._position, int) else self._position[rows]
        self._places = None

    @torch.inference_mode()
    def compact(self) -> None:
        """Forget the columns that no row can see; between a window's verification and the next `observe`."""
        if self._visible is None:
            return
        draft, columns = self.drafter.draft_model, compacting_columns(self._visible)
        self._cache = draft.rearranged(draft.cropped(self._cache, self._committed), gather_columns(columns))
        self._visible = self._visible.gather(1, columns)
        self._committed = columns.shape[1]

    @property
    def waste(self) -> float:
        """Share of the cache's columns that compacting would free."""
        if self._visible is None or not self._committed:
            return 0.0
        return 1 - int(self._visible.sum(1).max()) / self._committed


class UnreadTokens:
    """Committed tokens that the drafter has not read, flush right, with the states of the tokens before them.

    Rounds without a draft leave the drafter behind; the next draft begins by reading all of it.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        states: torch.Tensor | None,
        visible: torch.Tensor | None,
        start: int | torch.Tensor,
    ):
        self.tokens, self.states = tokens, states  # [B, L], [B, L, 3*h]
        self.visible = visible  # [B, L] False at padding; None where there is none
        self.start = start  # position of the first token, one for all rows where visible is None

    def add(self, tokens: torch.Tensor, states: torch.Tensor | None, counts: torch.Tensor, most: int) -> None:
        """The `counts` `[B]` + 1 (at most `most` + 1) first of each row of `tokens` were committed."""
        if self.visible is not None:
            shift = torch.arange(most + 1, device=counts.device) - (most - counts)[:, None]  # [B, most + 1]
            visible, source = shift >= 0, shift.clamp_min(0)
            tokens = tokens.gather(1, source)
            if states is not None:
                source = source.to(states.device)
                states = states.gather(1, source[..., None].expand(-1, -1, states.shape[-1]))
            self.visible = torch.cat([self.visible, visible], dim=1)
        else:
            tokens = tokens[:, : most + 1]
            states = None if states is None else states[:, : most + 1]
        if self.tokens.shape[1]:
            tokens = torch.cat([self.tokens, tokens], dim=1)
            states = states if states is None or self.states is None else torch.cat([self.states, states], dim=1)
        self.tokens, self.states = tokens, states

    def read(self, session: DraftSession) -> None:
        """Let the drafter read it all."""
        device = session.drafter.device
        states = None if self.states is None else self.states.to(device)
        visible = None if self.visible is None else self.visible.to(device)
        start = self.start if isinstance(self.start, int) else self.start.to(device)
        session.observe(self.tokens.to(device), states, start, visible)
        read = self.tokens.shape[1] if self.visible is None else self.visible.sum(1)
        self.start = self.start + read
        self.tokens, self.states = self.tokens[:, :0], None
        self.visible = None if self.visible is None else self.visible[:, :0]

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Go on with these rows `[B']` alone."""
        self.tokens = self.tokens[rows]
        self.states = None if self.states is None else self.states[rows.to(self.states.device)]
        self.visible = None if self.visible is None else self.visible[rows]
        self.start = self.start if isinstance(self.start, int) else self.start[rows]
