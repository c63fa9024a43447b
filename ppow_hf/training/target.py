"""The frozen target in training: states and logits of sequences, and verification of many windows in one forward.

Knows transformers' causal language models, caches and masks; knows nothing about drafters or rewards.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ..data.targets import whole_tensor, without_router_logits
from ..runtime.draft_session import additive_mask, cache_argument
from ..runtime.modeling_ppow import collect_target_states
from ..runtime.target_session import sliding_window
from ..runtime.target_weights import input_device, target_width


@dataclass
class TargetEncoding:
    """What the target knows of a batch of sequences.

    Args:
        sources (`torch.Tensor` of shape `(B, S, H)`): what the logits after every prefix are computed from.
        states (`torch.Tensor` of shape `(B, S, 3*h)`, *optional*): states of the chosen layers.
        cache: the target's keys and values of the sequences.
        attention_mask (`torch.Tensor` of shape `(B, S)`): 0 at padding.
    """

    sources: torch.Tensor
    states: torch.Tensor | None
    cache: Any
    attention_mask: torch.Tensor

    @property
    def length(self) -> int:
        return self.sources.shape[1]


class TrainingTarget(ABC):
    """What training asks of a target: [`FrozenTarget`] computes it, `RecordedTarget` reads it.

    Args:
        head (`torch.nn.Module`, *optional*): the target's output head.
        head_is_plain (`bool`): whether the head gives the target's own logits from its last state; else `sources` are
            the logits themselves.

    Attributes:
        vocab_size (`int`): width of the logits, V.
        is_tensor_parallel (`bool`): whether all processes compute each forward together. Their batches must then have
            one length.
        forward_tokens (`int`): read by the target, or charged as such where a kept encoding spared the forward.
        verifies (`bool`): whether it reads drafted windows; else the text alone verifies them.
    """

    vocab_size: int
    is_tensor_parallel = False
    verifies = True

    def __init__(self, head: Any, head_is_plain: bool):
        self.head, self.head_is_plain = head, head_is_plain
        self.forward_tokens = 0
        self._kept_rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None

    @abstractmethod
    def frozen(self) -> AbstractContextManager[None]:
        """Until its end the target is in eval mode and takes no gradients."""

    @abstractmethod
    def encode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, with_cache: bool, rows: torch.Tensor | None = None
    ) -> TargetEncoding:
        """What it knows of right-padded sequences `[B, S]`, the `rows` `[B]` of the training data."""

    @abstractmethod
    def keep_encodings(self, max_bytes: int) -> None:
        """Keep what it knows of sequences in memory, up to `max_bytes`."""

    @abstractmethod
    def verify(
        self, encoding: TargetEncoding, prefixes: torch.Tensor, draft_ids: torch.Tensor, max_tokens: int = 4096
    ) -> torch.Tensor:
        """What its logits along drafted windows `[B, M, K]` are computed from, `[B, M, K, H]`."""

    @abstractmethod
    def greedy_window_log_probs(self, encoding: TargetEncoding, prefixes: torch.Tensor, window: int) -> torch.Tensor:
        """log P of its own greedy window after each prefix, `[B, N]` in nats."""

    def needed_anywhere(self, here: bool) -> bool:
        """Whether a forward is to be computed: `here`, or on a process whose forwards are computed together."""
        if not self.is_tensor_parallel:
            return here
        return bool(rows_of_all(torch.tensor([here], dtype=torch.int, device=self.head.weight.device)).any())

    def logits(self, sources: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Sources `[..., H]` -> logits `[..., V]` in float32, on the sources' device; those of tokens `kept` alone."""
        if kept is not None:
            return self._kept_logits(sources, kept)
        return (self.head(sources).to(sources.device) if self.head_is_plain else sources).float()

    def _kept_logits(self, sources: torch.Tensor, kept_tokens: torch.Tensor) -> torch.Tensor:
        """Logits `[..., DV]` of the tokens `kept_tokens` `[DV]` alone, in float32 [ours].

        Where the head is an ordinary matrix its rows are taken once, and the other tokens' logits are never computed.
        """
        if not self._head_has_rows:
            return self.logits(sources)[..., kept_tokens]
        if self._kept_rows is None or not torch.equal(self._kept_rows[0], kept_tokens):
            rows = kept_tokens.to(self.head.weight.device)
            bias = None if self.head.bias is None else self.head.bias.detach()[rows].to(sources.device)
            self._kept_rows = (kept_tokens, self.head.weight.detach()[rows].to(sources.device), bias)
        return torch.nn.functional.linear(sources, *self._kept_rows[1:]).float()

    @property
    def _head_has_rows(self) -> bool:
        """Whether the head's rows can be read: it is not adapted, quantised, split over processes or offloaded."""
        if not self.head_is_plain or type(self.head) is not torch.nn.Linear or self.head.weight.is_meta:
            return False
        return type(self.head.weight.data) is torch.Tensor and self.head.weight.is_floating_point()


class FrozenTarget(TrainingTarget):
    """A target that is read and never trained. It may be quantised, sharded over devices or PEFT-wrapped.

    Within [`frozen`] it is in eval mode and takes no gradients; after it the model is as it was.

    Logits are computed in chunks from the last hidden state, where the target's own head gives the target's own logits
    from it (checked at the start); a target that scales or caps them has its full logits kept instead.
    """

    def __init__(self, model: PreTrainedModel, layer_ids: list[int] | None):
        super().__init__(model.get_output_embeddings(), head_is_plain=False)  # until it is checked below
        self.model = model
        self.is_tensor_parallel = is_tensor_parallel(model)
        if self.is_tensor_parallel:
            make_ends_whole(model)
            self.head = model.get_output_embeddings()
        self._is_frozen = False
        self.layer_ids = layer_ids
        self.keeps = "logits_to_keep" in inspect.signature(_inner(model).forward).parameters
        self._kept: dict[bytes, tuple[torch.Tensor, torch.Tensor | None]] | None = None
        self._bytes_left = 0
        with self.frozen():
            self.head_is_plain = self._head_is_plain()
        text = model.config.get_text_config()
        self.vocab_size = target_width(model)
        self.sliding_window = sliding_window(text)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The model in eval mode and without gradients until the end; it may be entered again inside."""
        if self._is_frozen:
            yield
            return
        modes = [(module, module.training) for module in self.model.modules()]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._is_frozen = True
        try:
            self.model.eval()
            for parameter in trained:
                parameter.requires_grad_(False)
            with without_router_logits(self.model):
                yield
        finally:
            self._is_frozen = False
            for parameter in trained:
                parameter.requires_grad_(True)
            for module, training in modes:
                module.training = training

    @torch.no_grad()
    def _head_is_plain(self) -> bool:
        if self.head is None:
            return False
        ids = torch.tensor([[0, 1, 2]], device=self.device) % self.model.config.get_text_config().vocab_size
        outputs = self.model(input_ids=ids, output_hidden_states=True, use_cache=False)
        own = self.head(outputs.hidden_states[-1]).to(outputs.logits.device)  # a sharded target's head lies elsewhere
        if not torch.isfinite(outputs.logits).all():
            raise ValueError(
                "target_model: its logits are not finite on the tokens 0, 1, 2. Check that its weights are whole, and "
                "that its dtype suits this device."
            )
        return own.shape == outputs.logits.shape and torch.allclose(own.float(), outputs.logits.float(), atol=1e-3)

    @property
    def device(self) -> torch.device:
        return input_device(self.model)

    def _logits_to_keep(self) -> dict[str, Any]:
        """The argument by which a forward computes as few logits as it can: those wanted are taken from the states."""
        if not (self.keeps and self.head_is_plain):
            return {}
        none = torch.empty(0, dtype=torch.long, device=self.device)
        return {"logits_to_keep": none if self._head_has_rows else 1}  # packed kernels may refuse to compute nothing

    def keep_encodings(self, max_bytes: int) -> None:
        """Keep sources and states of sequences in memory, up to `max_bytes`, for encodings without a cache.

        A sequence seen again is then not read again; its tokens are charged to `forward_tokens` all the same.
        """
        self._kept, self._bytes_left = {}, max_bytes

    @torch.no_grad()
    def encode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, with_cache: bool, rows: torch.Tensor | None = None
    ) -> TargetEncoding:
        """One forward over right-padded sequences `[B, S]`; `rows` `[B]`, their numbers in the data, go unread."""
        lengths = attention_mask.sum(1).tolist()
        keys = []
        if self._kept is not None and not with_cache:
            tokens = input_ids.cpu()
            keys = [row[:length].numpy().tobytes() for row, length in zip(tokens, lengths, strict=True)]
            if all(key in self._kept for key in keys):
                self.forward_tokens += sum(lengths)
                return self._from_kept(keys, attention_mask)
        cache = DynamicCache() if with_cache else None
        outputs = self._forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=with_cache,
            output_hidden_states=True,
            **{cache_argument(self.model): cache},
            **self._logits_to_keep(),
        )
        self.forward_tokens += int(attention_mask.sum())
        sources = outputs.hidden_states[-1] if self.head_is_plain else outputs.logits
        states = collect_target_states(outputs.hidden_states, self.layer_ids)
        for row, (key, length) in enumerate(zip(keys, lengths, strict=False)):
            self._keep(key, sources[row, :length], None if states is None else states[row, :length])
        return TargetEncoding(sources, states, cache, attention_mask)

    def _forward(self, **inputs) -> Any:
        """The target's forward; one split by tensor parallelism reads the rows of all processes at once."""
        if not self.is_tensor_parallel:
            return self.model(**inputs)
        rows = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
        outputs = self.model(**inputs | {name: rows_of_all(value) for name, value in rows.items()})
        count = len(inputs["input_ids"])
        own = slice(torch.distributed.get_rank() * count, (torch.distributed.get_rank() + 1) * count)
        outputs.hidden_states = tuple(states[own] for states in outputs.hidden_states)
        outputs.logits = outputs.logits[own]
        return outputs

    def _keep(self, key: bytes, sources: torch.Tensor, states: torch.Tensor | None) -> None:
        assert self._kept is not None
        size = sum(part.numel() * part.element_size() for part in (sources, states) if part is not None)
        if key not in self._kept and size <= self._bytes_left:
            self._bytes_left -= size
            self._kept[key] = (sources.clone(), None if states is None else states.clone())

    def _from_kept(self, keys: list[bytes], attention_mask: torch.Tensor) -> TargetEncoding:
        assert self._kept is not None
        length = attention_mask.shape[1]

        def batch(parts: list[Any]) -> torch.Tensor:  # what stands at padding is never looked at
            return torch.stack([torch.nn.functional.pad(part, (0, 0, 0, length - len(part))) for part in parts])

        sources, states = zip(*(self._kept[key] for key in keys), strict=True)
        return TargetEncoding(
            batch(list(sources)), None if states[0] is None else batch(list(states)), None, attention_mask
        )

    @torch.no_grad()
    def verify(
        self, encoding: TargetEncoding, prefixes: torch.Tensor, draft_ids: torch.Tensor, max_tokens: int = 4096
    ) -> torch.Tensor:
        """What the target's logits along drafted windows are computed from, `[B, M, K, H]`: entry j judges token j.

        All windows `[B, M, K]` of a sequence, each after its prefix `[B, M]`, go through one forward over the shared
        cache under a tree mask (several when they are more than `max_tokens` tokens).
        """
        count, window = draft_ids.shape[1:]
        starts = encoding.sources.gather(1, prefixes[..., None].expand(-1, -1, encoding.sources.shape[-1]))
        if window == 1:
            return starts[:, :, None]
        per_forward = max(max_tokens // (window - 1), 1)
        along = []
        for first in range(0, count, per_forward):
            part = slice(first, first + per_forward)
            along.append(self._packed(encoding, prefixes[:, part], draft_ids[:, part, : window - 1]))
        return torch.cat([starts[:, :, None], torch.cat(along, dim=1)], dim=2)

    def _packed(self, encoding: TargetEncoding, prefixes: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Sources after each of the windows' tokens `[B, M, L, H]`; the cache is left as it was."""
        batch, count, length = tokens.shape
        device = tokens.device
        step = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        own = torch.block_diag(*[step] * count).expand(batch, -1, -1)
        shared = torch.arange(encoding.length, device=device) <= prefixes[..., None]
        allowed = torch.cat([shared.repeat_interleave(length, dim=1), own], dim=-1)[:, None]
        positions = prefixes[..., None] + 1 + torch.arange(length, device=device)
        sources = self._forward_behind(encoding, tokens.flatten(1), allowed, positions.flatten(1))
        encoding.cache.crop(-count * length)
        return sources.unflatten(1, (count, length))

    def _forward_behind(self, encoding, tokens, allowed, positions) -> torch.Tensor:
        outputs = self._forward(
            input_ids=tokens,
            attention_mask=additive_mask(allowed, self.model.dtype),
            position_ids=positions,
            use_cache=True,
            output_hidden_states=True,
            **{cache_argument(self.model): encoding.cache},
            **self._logits_to_keep(),
        )
        self.forward_tokens += tokens.numel()
        return outputs.hidden_states[-1] if self.head_is_plain else outputs.logits

    @torch.no_grad()
    def greedy_window_log_probs(self, encoding: TargetEncoding, prefixes: torch.Tensor, window: int) -> torch.Tensor:
        """log P of the target's own greedy window after each prefix, summed over its tokens, `[B, N]` in nats.

        Takes `window` - 1 further forwards of N tokens for each sequence, all prefixes at once.
        """
        (batch, count), device = prefixes.shape, prefixes.device
        sources = encoding.sources.gather(1, prefixes[..., None].expand(-1, -1, encoding.sources.shape[-1]))
        allowed = (torch.arange(encoding.length, device=device) <= prefixes[..., None])[:, None]
        own = torch.eye(count, dtype=torch.bool, device=device).expand(batch, 1, -1, -1)
        total = torch.zeros(batch, count, device=device)
        for j in range(window):
            best = self.logits(sources).log_softmax(-1).max(-1)
            total = total + best.values
            if j == window - 1:
                break
            allowed = torch.cat([allowed, own], dim=-1)
            sources = self._forward_behind(encoding, best.indices, allowed, prefixes + 1 + j)
        if window > 1:
            encoding.cache.crop(-count * (window - 1))
        return total


def is_tensor_parallel(model: Any) -> bool:
    """Whether a `tp_plan` has split the model's layers over processes, which then compute every forward together."""
    return (getattr(_inner(model), "tp_size", None) or 1) > 1


def make_ends_whole(model: Any) -> None:
    """Put a tensor-parallel model's whole embeddings and head on every process: what reads them reads its own rows.

    Raises `ValueError` where there are more processes than the model is split over, or its embeddings or its head are
    of a kind of their own.
    """
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if _inner(model).tp_size != torch.distributed.get_world_size():
        raise ValueError(
            f"target_model: split over {_inner(model).tp_size} of {torch.distributed.get_world_size()} processes. "
            "Start as many as it is split over, or train with target_states of `ppow record --tp-plan auto`."
        )
    if type(ends[0]) is not torch.nn.Embedding or type(ends[1]) is not torch.nn.Linear or ends[1].bias is not None:
        raise ValueError(
            f"target_model: tensor parallel, with {type(ends[0]).__name__} and {type(ends[1]).__name__} as embeddings "
            "and head, which are not put together here. Train with target_states of `ppow record --tp-plan auto`."
        )
    embeddings, head = (whole_tensor(end.weight.detach()) for end in ends)
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(embeddings))
    whole_head = torch.nn.Linear(head.shape[1], head.shape[0], bias=False, device="meta")
    whole_head.weight = torch.nn.Parameter(head, requires_grad=False)
    model.set_output_embeddings(whole_head)


def rows_of_all(tensor: torch.Tensor) -> torch.Tensor:
    """`[B, ...]` of every process, in their order: `[processes * B, ...]`."""
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def _inner(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, whose forward has the real signature."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
