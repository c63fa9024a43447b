"""Drafts windows, token by token: ask the rule, look at the distribution, draw, stop.

Everyone who drafts a chain calls [`draft_windows`]. Knows window rules, a source of distributions and the records of
rounds; knows nothing about targets and verification.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from .acceptance import likeliest_tokens
from .trace import RoundTrace
from .windowing import KLAdaptiveWindow, WindowRule


class Sight(NamedTuple):
    """What a rule sees of a distribution: its two largest probabilities, its entropy in nats, its likeliest token."""

    max_probability: float
    second_probability: float
    entropy: float
    likeliest: int


class DraftSource(Protocol):
    """Where the distributions of a round come from: a drafter's session, or a table of what one would say."""

    def look(self) -> list[Sight] | None:
        """Each row's distribution at the next position; `None` where no rule needs to see it."""

    def draw(self) -> list[int] | None:
        """Each row's token from the distribution last looked at; `None` where it stays on the device."""

    def keep(self) -> None:
        """The token last drawn became part of some row's window."""

    def advance(self) -> None:
        """Go on to the distribution behind the token last drawn: a draft step."""


@dataclass
class WindowDraft:
    """One row's window while it is drafted.

    Args:
        row (`int`): its place among the rows of the source.
        rule ([`WindowRule`]): decides how far it goes.
        limit (`int`): most tokens; 0 drafts nothing.
        record ([`RoundTrace`]): gets draft steps, tokens, features and estimated acceptances.
        length (`int`): tokens drafted; `record.draft_ids` may stay empty, where tokens stay on the device.
        ended (`bool`): whether the token drawn last ends the text.
    """

    row: int
    rule: WindowRule
    limit: int
    record: RoundTrace
    length: int = 0
    ended: bool = False
    features: list[float] | None = field(default=None, repr=False)

    def includes(self, sights: list[Sight] | None) -> bool:
        """Whether to draw at the next position. Nothing can be drawn from a distribution of NaN."""
        self.record.draft_steps += 1
        if sights is None:
            return True
        sight = sights[self.row]
        if not sight.max_probability > 0:
            return False
        self.features = self.rule.describe(*sight, self.record.draft_ids)
        return self.rule.include(self.length, self.features)

    def add(self, tokens: list[int] | None, ends: Callable[[int], bool], keeps_end: bool) -> bool:
        """Take the drawn token; `False` where it ends the text and is left out."""
        if tokens is not None:
            self.ended = ends(tokens[self.row])
            if self.ended and not keeps_end:
                return False
            self.record.draft_ids.append(tokens[self.row])
        if self.features is not None:
            self.record.features.append(self.features)
            if isinstance(self.rule, KLAdaptiveWindow):
                self.record.acceptance_probabilities.append(self.rule.acceptance_probability(self.features))
        self.length += 1
        return True

    def goes_on(self) -> bool:
        """Whether another draft step is worth its cost."""
        if self.ended or self.length >= self.limit or not self.rule.go_on(self.length):
            return False
        return not self.rule.prefers_text(self.record.draft_ids)


def draft_windows(
    windows: Sequence[WindowDraft], source: DraftSource, ends: Callable[[int], bool], keeps_end: bool = True
) -> None:
    """Draft each row's window until no rule wants another token.

    Args:
        windows (`Sequence[WindowDraft]`): the rows; those with a limit of 0 draft nothing.
        source ([`DraftSource`]): gives the distributions and draws from them.
        ends (`Callable`): whether a token ends the text.
        keeps_end (`bool`, *optional*, defaults to `True`): whether such a token is the window's last, or left out.
    """
    active = [window for window in windows if window.limit > 0]
    while active:
        sights = source.look()
        active = [window for window in active if window.includes(sights)]
        if not active:
            return
        tokens = source.draw()
        active = [window for window in active if window.add(tokens, ends, keeps_end)]
        if not active:
            return
        source.keep()
        active = [window for window in active if window.goes_on()]
        if active:
            source.advance()


class SessionSource:
    """The distributions of a drafter's session, behind everything that it has observed.

    Args:
        session ([`DraftSession`]): the drafter's side of the call.
        process (`Callable`): draft logits `[B, V]` in float32 -> the scores `[B, V]` that are drawn from.
        do_sample (`bool`): draw from the scores, or take their likeliest token.
        looks (`bool`, *optional*, defaults to `True`): whether any rule needs to see the distributions.
        reads_tokens (`bool`, *optional*, defaults to `True`): whether tokens come to the host without a look.
        draws_ahead (`bool`, *optional*, defaults to `False`):
            Draw before the rules are asked, so that one wait for the device brings both. [`draft_windows`] drops the
            token where a rule says no.

    Attributes:
        drawn, kept_scores (`list[torch.Tensor]`): of each position of the windows, `[B, 1]` and `[B, V]`.
        steps (`int`): distributions computed.
    """

    def __init__(
        self,
        session: Any,
        process: Callable[[torch.Tensor], torch.Tensor],
        do_sample: bool,
        looks: bool = True,
        reads_tokens: bool = True,
        draws_ahead: bool = False,
    ):
        self.session, self.process, self.do_sample = session, process, do_sample
        self.looks, self.reads_tokens, self.draws_ahead = looks, reads_tokens, draws_ahead
        self.drawn: list[torch.Tensor] = []
        self.kept_scores: list[torch.Tensor] = []
        self.steps = 1
        self._logits = session.first_logits()

    def look(self) -> list[Sight] | None:
        self.scores = self.process(self._logits.float())
        self.log_probs = self.scores.log_softmax(-1)
        self._looked = likeliest_tokens(self.log_probs) if self.looks else None
        self._tokens: list[int] | None = None
        if self._looked is None:
            return None
        if not self.draws_ahead:
            return [Sight(first, second, doubt, int(id)) for first, second, doubt, id in self._looked.tolist()]
        self.token = self._draw()
        rows = torch.cat([self._looked, self.token.to(self._looked)], dim=-1).tolist()
        self._tokens = [int(row[4]) for row in rows]
        return [Sight(first, second, doubt, int(id)) for first, second, doubt, id, _ in rows]

    def draw(self) -> list[int] | None:
        if self._tokens is None:
            self.token = self._draw()
            if self.looks or self.reads_tokens:
                self._tokens = self.token[:, 0].tolist()
        return self._tokens

    def keep(self) -> None:
        self.drawn.append(self.token)
        self.kept_scores.append(self.scores)

    def advance(self) -> None:
        token = self.token.to(self._logits.device)
        self._logits = self.session.next_logits(token, len(self.drawn) - 1)
        self.steps += 1

    def _draw(self) -> torch.Tensor:
        """Tokens `[B, 1]`."""
        if self.do_sample:
            return torch.multinomial(self.log_probs.exp().nan_to_num(1.0), 1)
        return self.scores.argmax(-1, True) if self._looked is None else self._looked[:, 3:].long()
