"""One round's windows drafted: look at the drafter's distribution, ask the window rule, draw, stop.

The decoding loop, the candidate generator, the vLLM proposer, the demo and the window study all draft by
[`draft_windows`]. Knows rules, records and the drafter's distributions; knows no target and no caches.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from .acceptance import likeliest_tokens
from .cost_model import OnlineCosts
from .draft_session import DraftSession, UnreadTokens, now, to_device
from .trace import GenerationTrace, RoundTrace
from .windowing import KLAdaptiveWindow, WindowRule, batch_pays


class Distributions(Protocol):
    """Where the distributions along the windows of B rows come from, one position after the other."""

    def look(self, drafts: Sequence[list[int]]) -> Sequence[Sequence[float]] | None:
        """Of each row what [`likeliest_tokens`] says of the distribution after its draft tokens, and after that what
        a confidence head says, where there is one; `None`: unseen."""

    def draw(self) -> Sequence[int]:
        """A token of each row's distribution."""

    def advance(self) -> None:
        """Go on to the distributions after the drawn tokens."""


@dataclass(eq=False)
class Window:
    """One row's window while it is drafted.

    Args:
        rule ([`WindowRule`]): the row's.
        record ([`RoundTrace`]): the round's; gets the draft tokens, steps, features and estimates.
        limit (`int`): most tokens that are drafted; 0 for none.
        ends_text (`Callable`, *optional*): whether the last of a list of draft tokens ends the text. By default never.
        keeps_end (`bool`, *optional*, defaults to `True`):
            Whether a token that ends the text is the window's last; else the window ends before it.
        end_token (`int`, *optional*): the token that was drawn and left out because it ends the text.
    """

    rule: WindowRule
    record: RoundTrace
    limit: int
    ends_text: Callable[[list[int]], bool] = field(default=lambda draft_ids: False)
    keeps_end: bool = True
    end_token: int | None = None

    def __post_init__(self):
        self.drafting = self.limit > 0
        self.ended = False  # whether the text ends in this window, or right after it
        self._features: list[float] | None = None

    def consider(self, looked: Sequence[float] | None) -> None:
        """Ask the rule whether a token is drawn from the next distribution; where unseen (`None`), one is."""
        if not self.drafting:
            return
        if self.record.draft_steps == 0 or not self.rule.costs.one_step:
            self.record.draft_steps += 1
        if looked is None:
            return
        first, second, entropy, likeliest, *predicted = looked
        self._features = self.rule.describe(first, second, entropy, int(likeliest), self.record.draft_ids, *predicted)
        # NaN is not above 0: nothing can be drawn from such a distribution.
        self.drafting = first > 0 and self.rule.include(self.record.window, self._features)

    def take(self, token: int) -> None:
        """Append the token drawn there, and decide whether another one would be welcome to this row."""
        if not self.drafting:
            return
        record = self.record
        if not self._append(token):
            self.end_token, self.drafting = token, False
            return
        if self._features is not None:
            record.features.append(self._features)
            if isinstance(self.rule, KLAdaptiveWindow):
                record.acceptance_probabilities.append(self.rule.acceptance_probability(self._features))
        self.drafting = not self.ended and record.window < self.limit and not self.rule.prefers_text(record.draft_ids)

    def outlook(self) -> tuple[float, float]:
        """The rule's of another draft step, from which a row that drafts no more gains nothing."""
        gain, price = self.rule.outlook(self.record.window)
        return (gain if self.drafting else 0.0), price

    def look_up(self, room: int) -> None:
        """Append the tokens that the rule takes from the text, up to `room` tokens in the window; no draft steps.

        They follow from the tokens before them, so that nothing is drawn, and one that ends the text can be left out.
        """
        if self.ended:
            return
        for token in self.rule.look_up(self.record.draft_ids, room):
            if not self._append(token):
                return
            self.record.looked_up += 1
            if self.ended:
                return

    def _append(self, token: int) -> bool:
        """Whether `token` belongs to the window, which it is appended to then."""
        self.ended = self.ends_text([*self.record.draft_ids, token])
        if self.ended and not self.keeps_end:
            return False
        self.record.draft_ids.append(token)
        self.record.window += 1
        return True


def draft_windows(windows: Sequence[Window], distributions: Distributions) -> None:
    """Draft the windows of B rows side by side, until another token is not worth to them what it costs all."""
    while True:
        looked = distributions.look([window.record.draft_ids for window in windows])
        for row, window in enumerate(windows):
            window.consider(None if looked is None else looked[row])
        if not any(window.drafting for window in windows):
            return
        tokens = distributions.draw()
        for row, window in enumerate(windows):
            window.take(tokens[row])
        if not any(window.drafting for window in windows) or not batch_pays([w.outlook() for w in windows]):
            return
        distributions.advance()


def draw_tokens(log_probs: torch.Tensor) -> torch.Tensor:
    """A token of each row, drawn from `log_probs` `[B, V]`: `[B, 1]`; any token of a row that is NaN.

    What `torch.multinomial` draws, which waits for the device to check its input.
    """
    probs = log_probs.exp().nan_to_num(1.0)
    return (probs / torch.empty_like(probs).exponential_()).argmax(-1, keepdim=True)


def known_length(windows: Sequence[Window]) -> int:
    """Positions that the rules draft whatever is drawn; 1 with a rule that looks at each distribution."""
    if any(window.rule.reads_distributions for window in windows):
        return 1
    return max(window.limit for window in windows)


class Position(NamedTuple):
    """A position whose distributions were computed.

    Args:
        scores, log_probs (`[B, V]`): log-probabilities only where they are looked at.
        token (`[B, 1]`, *optional*): where it is known before the rules are asked.
        rows: of each row, on the host, what is looked at and the token, as far as there are any.
    """

    scores: torch.Tensor
    log_probs: torch.Tensor | None
    token: torch.Tensor | None
    rows: list[list[float]]


class DrafterDistributions:
    """The [`Distributions`] of a drafter after what its session has read.

    What the host needs of a position comes in one transfer, that of the first `ahead` positions together. What the
    rules then leave out is dropped.

    Args:
        session ([`DraftSession`]): has read everything committed.
        process (`Callable`): logits `[B, V]` in float32 and each row's draft tokens before them -> scores `[B, V]`.
        draw (`Callable`, *optional*): log-probabilities `[B, V]` -> tokens `[B, 1]`. The likeliest by default.
        looks (`bool`, *optional*, defaults to `True`): whether the distributions are looked at.
        draws_first (`bool`, *optional*, defaults to `False`):
            Whether a token is drawn for every row before the rules are asked, so that a device is waited for once.
        ahead (`int`, *optional*, defaults to 1):
            Positions computed before the host waits. More than 1 takes a `process` that heeds no draft tokens, and
            tokens that are drawn first.
    """

    def __init__(
        self,
        session: DraftSession,
        process: Callable[[torch.Tensor, Sequence[list[int]]], torch.Tensor],
        draw: Callable[[torch.Tensor], torch.Tensor] | None = None,
        looks: bool = True,
        draws_first: bool = False,
        ahead: int = 1,
    ):
        self.session, self.process, self._draw = session, process, draw
        self.looks, self.draws_first, self.ahead = looks, draws_first, ahead
        self.tokens: list[torch.Tensor] = []  # [B, 1] of each position that was drafted
        self.scores: list[torch.Tensor] = []  # [B, V] that they were drawn from
        self.log_probs: Any = None  # [B, V] of the position last looked at
        self.steps = 1
        self._logits = session.first_logits()
        self._looked = 4 + (session.confidence is not None)
        self._computed: list[Position] = []  # that were not looked at yet, the next one first

    def look(self, drafts: Sequence[list[int]]) -> Sequence[Sequence[float]] | None:
        if not self._computed:
            self._compute(drafts, 1 if self.tokens else self.ahead)
        self._position = self._computed.pop(0)
        self.log_probs = self._position.log_probs
        return [row[: self._looked] for row in self._position.rows] if self.looks else None

    def draw(self) -> Sequence[int]:
        scores, log_probs, token, rows = self._position
        if token is None:
            token = self._draw(scores.log_softmax(-1) if log_probs is None else log_probs)  # type: ignore[misc]
            rows = token.tolist()
        self.tokens.append(token)
        self.scores.append(scores)
        return [int(row[-1]) for row in rows]

    def advance(self) -> None:
        if not self._computed:
            self._step(self.tokens[-1], len(self.tokens) - 1)

    def _step(self, token: torch.Tensor, drafted: int) -> None:
        self._logits = self.session.next_logits(token.to(self._logits.device), drafted)
        self.steps += not self.session.one_step

    def _compute(self, drafts: Sequence[list[int]], count: int) -> None:
        """Compute the next `count` positions, and bring to the host what it needs of them."""
        positions: list[Any] = []
        shown = []
        for place in range(count):
            if place:
                self._step(positions[-1].token, place - 1)
            scores = self.process(self._logits.float(), drafts)
            log_probs = scores.log_softmax(-1) if self.looks else None
            parts = [] if log_probs is None else [self._look_at(log_probs)]  # [B, 4 or 5]
            if self._draw is None:
                token = parts[0][:, 3:4].long() if parts else scores.argmax(-1, keepdim=True)
            elif self.draws_first:
                token = self._draw(scores.log_softmax(-1) if log_probs is None else log_probs)
            else:
                token = None
            if token is not None:
                parts.append(token.to(parts[0]) if parts else token)
            positions.append(Position(scores, log_probs, token, []))
            shown.append(torch.cat(parts, dim=-1) if parts else scores.new_zeros(len(scores), 0))
        tables = torch.stack(shown).tolist() if shown[0].numel() else [[] for _ in shown]
        self._computed = [position._replace(rows=rows) for position, rows in zip(positions, tables, strict=True)]

    def _look_at(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[B, V]` -> what [`likeliest_tokens`] says, and a confidence head's log-odds: `[B, 5]`."""
        looked, confidence = likeliest_tokens(log_probs), self.session.confidence
        return looked if confidence is None else torch.cat([looked, confidence.to(looked)], dim=-1)


def read_and_draft(
    unread: UnreadTokens,
    session: DraftSession,
    windows: Sequence[Window],
    costs: OnlineCosts,
    *args: Any,
    **options: Any,
) -> DrafterDistributions:
    """Let the drafter read what was committed, draft `windows` and measure the draft step.

    Reading the prompt is no draft step; reading the last round's tokens makes the first one. `args` and `options` are
    those of [`DrafterDistributions`] after the session.
    """
    started = time.perf_counter()
    first_read = session.is_empty
    unread.read(session)
    if first_read:
        started = now(session.drafter.device)
    distributions = DrafterDistributions(session, *args, **options)
    draft_windows(windows, distributions)
    in_time = distributions.steps - (first_read and not session.one_step)  # a block's step comes after the reading
    costs.observe_drafting(in_time, time.perf_counter() - started)
    return distributions


def learn_from_verdict(
    rule: WindowRule,
    record: RoundTrace,
    accepted: int,
    kl: Sequence[float] = (),
    outside: Sequence[float] = (),
) -> None:
    """Tell a rule, and the round's record, that `accepted` of the window's tokens were kept.

    `kl` and `outside` hold, at the drafter's positions, KL(P||Q) in nats on the draft vocabulary and the mass of P
    outside it; those that were verified count.
    """
    drawn = record.window - record.looked_up
    drawn_accepted = min(accepted, drawn)
    record.accepted = accepted
    verified = min(accepted + 1, drawn)
    record.kl, record.outside = list(kl[:verified]), list(outside[:verified])
    rule.update(drawn, record.draft_steps, drawn_accepted, record.kl_with_outside)
    rule.update_looked_up(record.looked_up, accepted - drawn_accepted)


def record_costs(trace: GenerationTrace, rule: WindowRule) -> None:
    """Note in a call's trace what its rule takes drafting to cost, and whether it pays."""
    costs = rule.costs.model
    trace.speculation_pays = rule.pays
    trace.cost_ratio, trace.verification_cost = costs.cost_ratio, costs.verification_cost


# -- tokens looked up in the text, as drafts


def one_hot_scores(tokens: Sequence[int], width: int, device: torch.device) -> torch.Tensor:
    """Scores `[n, V]` of distributions that are certain of one token each: tokens looked up, not drawn."""
    scores = torch.full((len(tokens), width), -torch.inf, device=device)
    return scores.scatter(1, to_device(tokens, device)[:, None], 0.0)


def with_looked_up_scores(
    windows: Sequence[Window], drawn_scores: list[torch.Tensor], width: int, device: torch.device
) -> list[torch.Tensor]:
    """Scores of whole windows, W of `[B, V]`: the drafter's, and certainty of each token that was looked up.

    Whether a token is looked up follows from the tokens before it, so that output verified by these is distributed
    as P.
    """
    if not any(window.record.looked_up for window in windows):
        return drawn_scores
    length = max(window.record.window for window in windows)
    scores = [position_scores.clone() for position_scores in drawn_scores]
    scores += [torch.zeros(len(windows), width, device=device) for _ in range(length - len(scores))]
    for row, window in enumerate(windows):
        drawn = window.record.window - window.record.looked_up
        certain = one_hot_scores(window.record.draft_ids[drawn:], width, device)
        for position, row_scores in enumerate(certain, start=drawn):
            scores[position][row] = row_scores
    return scores


def padded_drafts(windows: Sequence[Window], device: torch.device) -> torch.Tensor:
    """Draft tokens `[B, W]`, zeros after a row's own."""
    longest = max(len(window.record.draft_ids) for window in windows)
    padded = [[*ids, *[0] * (longest - len(ids))] for ids in (window.record.draft_ids for window in windows)]
    return to_device(padded, device).view(len(windows), longest)
