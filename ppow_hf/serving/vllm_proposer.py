"""The window rule inside vLLM: a proposer whose windows change from step to step, as long as a batch gains [ours].

Experimental, as vLLM's interface for it is (`"method": "custom_class"`). vLLM hands a proposer tokens and no hidden
states, so that it drafts with standalone drafters only. This package must be installed in vLLM's environment:

    LLM(
        model=TARGET,
        speculative_config={
            "method": "custom_class",
            "model": "ppow_hf.serving.vllm_proposer.KLAdaptiveProposer",
            "num_speculative_tokens": 8,  # the longest window
        },
        additional_config={"ppow": {"drafter": DRAFTER}},  # and window settings, such as "window": "fixed"
    )

[`BatchDrafter`] knows drafters, rules and rows of tokens; only [`KLAdaptiveProposer`] knows vLLM, and imports none of
it. A rule learns from what was accepted and from a stand-in for the divergence: vLLM shows no target distributions
here, so the divergence at a position is -log Q of the token that the target took, the KL from a target sure of it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import nn

from ..runtime.cost_model import OnlineCosts, make_costs
from ..runtime.draft_session import DraftSession
from ..runtime.draft_window import DrafterDistributions, Window, draft_windows
from ..runtime.modeling_ppow import PPOWDrafter
from ..runtime.trace import RoundTrace
from ..runtime.windowing import WindowRule, make_window_rule, start_windows

COMPACT_AT = 0.25  # share of the cache's columns that no request needs any more


class GrowingSession(DraftSession):
    """A [`DraftSession`] of a standalone drafter that further rows can join while it goes on."""

    @torch.inference_mode()
    def join(self, other: "GrowingSession") -> None:
        """Add the rows of `other` after one's own; between a window's verification and the next `observe`."""
        draft = self.drafter.draft_model
        ours, theirs = draft.cropped(self._cache, self._committed), draft.cropped(other._cache, other._committed)
        columns = max(self._committed, other._committed)

        def widened(tensor: torch.Tensor) -> torch.Tensor:  # [B, heads, L, d], empty columns on the left
            return nn.functional.pad(tensor, (0, 0, columns - tensor.shape[2], 0))

        for layer, added in zip(ours.layers, theirs.layers, strict=True):
            layer.keys = torch.cat([widened(layer.keys), widened(added.keys)])
            layer.values = torch.cat([widened(layer.values), widened(added.values)])
        self._visible = torch.cat([session._columns_seen(columns) for session in (self, other)])
        self._position = torch.cat([session._positions() for session in (self, other)])
        self._feature = torch.cat([self._feature, other._feature])  # type: ignore[list-item]
        self._cache, self._committed, self._places = ours, columns, None

    @property
    def _rows(self) -> int:
        return self._feature.shape[0]  # type: ignore[union-attr]

    def _columns_seen(self, columns: int) -> torch.Tensor:
        seen = self._visible
        if seen is None:
            seen = torch.ones(self._rows, self._committed, dtype=torch.bool, device=self._feature.device)  # type: ignore[union-attr]
        return nn.functional.pad(seen, (columns - self._committed, 0), value=False)

    def _positions(self) -> torch.Tensor:
        if isinstance(self._position, int):
            return torch.full((self._rows,), self._position, device=self._feature.device)  # type: ignore[union-attr]
        return self._position


@dataclass(eq=False)
class DraftedRequest:
    """A request as the drafter knows it.

    Args:
        tokens (`numpy.ndarray`): its tokens when it was last drafted for.
        rule ([`WindowRule`]): its own.
        read (`int`): how many of the tokens are in the drafter's cache; 0 before it has joined.
        limit (`int`): longest window that the rule wants.
        round ([`RoundTrace`]): the last window proposed.
        row (`int`): its row of `BatchDrafter`'s draft distributions.
    """

    tokens: numpy.ndarray
    rule: WindowRule
    read: int = 0
    limit: int = 0
    round: RoundTrace = field(default_factory=lambda: RoundTrace(0, 0, []))
    row: int = 0


class BatchDrafter:
    """Drafts for a changing batch of requests, of which it is told the tokens and nothing else.

    Who is who is found by the tokens themselves: a request goes on where one that was known left off. What it drafts
    is the drafter's greedy continuation, so that any rule of verification that takes a draft for certain is exact.

    Args:
        drafter ([`PPOWDrafter`]): a standalone drafter.
        make_rule (`Callable`): a new [`WindowRule`] for a request, given the costs that all share.
        costs ([`OnlineCosts`]): measured here, for the batch as a whole.
        max_tokens (`int`): longest sequence that the engine takes.
    """

    def __init__(
        self, drafter: PPOWDrafter, make_rule: Callable[[OnlineCosts], WindowRule], costs: OnlineCosts, max_tokens: int
    ):
        if drafter.config.architecture != "standalone":
            raise ValueError(
                f"drafter: {drafter.config.architecture} drafters read the target's hidden states, which vLLM shows "
                "to no proposer. Take a standalone drafter, or serve this one with `ppow export --format vllm`."
            )
        self.drafter, self.make_rule, self.costs, self.max_tokens = drafter, make_rule, costs, max_tokens
        self.requests: list[DraftedRequest] = []
        self._in_session: list[DraftedRequest] = []  # in the order of the session's rows
        self._session: GrowingSession | None = None
        self._draft_scores: list[torch.Tensor] = []  # [rows, V] for each position of the last windows
        self._drafted_at: float | None = None

    def propose(self, rows: Sequence[numpy.ndarray | None]) -> list[list[int]]:
        """The next window of each row's request; `None` stands for a row to draft nothing for.

        Every row but those must have grown since it was last seen.
        """
        started = time.perf_counter()
        known, current = list(self.requests), []
        joined = False
        for tokens in rows:
            request = None if tokens is None else _continued(known, tokens)
            if tokens is not None and request is None:
                request, joined = DraftedRequest(tokens, self.make_rule(self.costs)), True
                request.rule.read(tokens.tolist())
            elif request is not None and tokens is not None:
                known.remove(request)
                self._learn(request, tokens)
            current.append(request)
        self.requests = [request for request in current if request is not None]
        if self._drafted_at is not None and not joined and self.requests:
            window = sum(request.round.window for request in self.requests) / len(self.requests)
            self.costs.observe_verification(window, started - self._drafted_at)  # type: ignore[arg-type]
        rooms = [max(self.max_tokens - len(request.tokens) - 1, 0) for request in self.requests]
        limits = start_windows([request.rule for request in self.requests], rooms)
        for request, limit in zip(self.requests, limits, strict=True):
            request.round, request.limit = RoundTrace(0, 0, []), limit
        if any(request.limit for request in self.requests):
            before = time.perf_counter()
            first_reading = any(request.read == 0 for request in self.requests)
            self._read()
            if first_reading:  # reading a prompt is no draft step; reading the last round's tokens makes the first one
                before = time.perf_counter()
            steps = self._draft()
            self.costs.observe_drafting(steps - first_reading, time.perf_counter() - before)
        self._drafted_at = time.perf_counter()
        return [[] if request is None else list(request.round.draft_ids) for request in current]

    def _learn(self, request: DraftedRequest, tokens: numpy.ndarray) -> None:
        """What became of the request's last window, told from the tokens that it has now."""
        new = tokens[len(request.tokens) :].tolist()
        draft, accepted = request.round.draft_ids, len(new) - 1
        # A draft token that reappears last was accepted by a target that saw no draft after it: the engine had cut
        # the window. Otherwise the last new token is the target's own.
        verified = accepted if accepted < len(draft) and new[-1] == draft[accepted] else len(draft)
        if new[:accepted] == draft[:accepted]:
            kl = [
                -float(self._draft_scores[position][request.row].log_softmax(-1)[new[position]])
                for position in range(min(accepted + 1, verified))
            ]
            request.rule.update(verified, request.round.draft_steps, min(accepted, verified), kl)
        request.rule.read(new)
        request.tokens = tokens

    # -- the drafter's cache

    def _read(self) -> None:
        """Let the drafter read what it has not read of every request, and forget the requests that are gone."""
        here = {id(request) for request in self.requests}
        kept = [row for row, request in enumerate(self._in_session) if id(request) in here]
        old = [self._in_session[row] for row in kept]
        if not old:
            self._session = None
        elif self._session is not None:
            if len(kept) < len(self._in_session):
                self._session.keep_rows(torch.tensor(kept, device=self.drafter.device))
            if self._session.waste > COMPACT_AT:
                self._session.compact()
            self._observe(self._session, old)
        new = [request for request in self.requests if request.read == 0]
        if new:
            session = GrowingSession(self.drafter)
            self._observe(session, new)
            if self._session is None:
                self._session = session
            else:
                self._session.join(session)
        self._in_session = old + new

    def _observe(self, session: GrowingSession, requests: list[DraftedRequest]) -> None:
        device = self.drafter.device
        unread = [request.tokens[request.read :] for request in requests]
        longest = max(map(len, unread))
        tokens = numpy.zeros((len(unread), longest), dtype=numpy.int64)
        own = numpy.zeros((len(unread), longest), dtype=bool)
        for row, ids in enumerate(unread):
            tokens[row, longest - len(ids) :], own[row, longest - len(ids) :] = ids, True
        starts = torch.tensor([request.read for request in requests], device=device)
        session.observe(torch.from_numpy(tokens).to(device), None, starts, torch.from_numpy(own).to(device))
        for request in requests:
            request.read = len(request.tokens)

    # -- the windows

    def _draft(self) -> int:
        """Draft each request's window; returns the draft steps taken."""
        assert self._session is not None
        windows = []
        for row, request in enumerate(self._in_session):
            request.row = row
            windows.append(Window(request.rule, request.round, request.limit))
        distributions = DrafterDistributions(self._session, lambda logits, drafts: logits)
        draft_windows(windows, distributions)
        self._draft_scores = distributions.scores
        return distributions.steps


def _continued(known: list[DraftedRequest], tokens: numpy.ndarray) -> DraftedRequest | None:
    """The one of `known` that `tokens` go on from; the longest where several do."""
    found = [
        request
        for request in known
        if len(request.tokens) < len(tokens) and numpy.array_equal(request.tokens, tokens[: len(request.tokens)])
    ]
    return max(found, key=lambda request: len(request.tokens), default=None)


class KLAdaptiveProposer:
    """What vLLM makes of `"method": "custom_class"`; see the module for how to ask for it.

    Args:
        vllm_config: vLLM's `VllmConfig`. `additional_config["ppow"]` holds `drafter` (folder, Hub name or embedded
            name) and, if wanted, `window`, `cost_ratio` and `verification_cost`; `num_speculative_tokens` is the
            longest window.
    """

    def __init__(self, vllm_config: Any):
        settings = dict((vllm_config.additional_config or {}).get("ppow") or {})
        name = settings.pop("drafter", None)
        if name is None:
            raise ValueError('additional_config: pass {"ppow": {"drafter": DRAFTER}}, the drafter to draft with.')
        from ..data.models import resolve

        dtype = vllm_config.model_config.dtype
        drafter = PPOWDrafter.from_pretrained(resolve(name), dtype=dtype).to(vllm_config.device_config.device).eval()
        self.batch = make_batch_drafter(
            drafter,
            max_window=vllm_config.speculative_config.num_speculative_tokens,
            max_tokens=vllm_config.model_config.max_model_len,
            **settings,
        )

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the drafter was loaded with the proposer."""

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: numpy.ndarray,
        token_ids_cpu: numpy.ndarray,
        slot_mappings: Any = None,
        **_: Any,
    ) -> list[list[int]]:
        """The next window of each request of the batch, empty where none is worth it.

        `sampled_token_ids` holds what each row's request has just got (nothing while its prompt is being read),
        `token_ids_cpu` `[rows, max_model_len]` all of its tokens, the first `num_tokens_no_spec` of which count.
        """
        rows = [
            token_ids_cpu[row, : num_tokens_no_spec[row]].astype(numpy.int64) if sampled else None
            for row, sampled in enumerate(sampled_token_ids)
        ]
        return self.batch.propose(rows)


def make_batch_drafter(
    drafter: PPOWDrafter,
    max_window: int,
    max_tokens: int,
    window: str | None = None,
    cost_ratio: float | None = None,
    verification_cost: float | None = None,
) -> BatchDrafter:
    """A [`BatchDrafter`] with the drafter's own window settings where none are given."""
    config = drafter.config
    costs = make_costs(
        cost_ratio if cost_ratio is not None else config.cost_ratio,
        verification_cost if verification_cost is not None else config.verification_cost,
        config.calibration,
    )

    def make_rule(shared: OnlineCosts) -> WindowRule:
        return make_window_rule(window or config.window, max_window, shared, config.calibration)

    return BatchDrafter(drafter, make_rule, costs, max_tokens)
