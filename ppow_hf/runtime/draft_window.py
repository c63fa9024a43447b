"""Drafts windows, token by token: ask the rule, look at the distribution, draw, stop.

Everyone who drafts a chain calls [`draft_windows`]. Knows window rules, a source of distributions and the records of
rounds; knows nothing about targets and verification.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from .acceptance import draw_tokens, likeliest_tokens
from .trace import RoundTrace
from .windowing import FixedWindow, KLAdaptiveWindow, WindowRule


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

    def draw(self) -> list[int]:
        """Each row's token from the distribution last looked at."""

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
        length (`int`): tokens drafted.
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

    def add(self, tokens: list[int], ends: Callable[[int], bool], keeps_end: bool) -> bool:
        """Take the drawn token; `False` where it ends the text and is left out."""
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


def known_length(windows: Sequence[WindowDraft]) -> int:
    """Positions that will be drafted whatever is drawn: the longest window of fixed rules, 1 with any other rule."""
    fixed = all(isinstance(w.rule, FixedWindow) and not isinstance(w.rule, KLAdaptiveWindow) for w in windows)
    return max(window.limit for window in windows) if fixed else 1


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

    Each position is drawn from as it is computed, and what the host needs of it comes in one transfer: one wait for
    the device a token, or one for the first `ahead` tokens. [`draft_windows`] drops what the rules do not take.

    Args:
        session ([`DraftSession`]): the drafter's side of the call.
        process (`Callable`): draft logits `[B, V]` in float32 -> the scores `[B, V]` that are drawn from.
        do_sample (`bool`): draw from the scores, or take their likeliest token.
        looks (`bool`, *optional*, defaults to `True`): whether any rule needs to see the distributions.
        ahead (`int`, *optional*, defaults to 1):
            Positions computed before the host waits: the window, where its length does not hang on what is drawn.

    Attributes:
        computed (`list[torch.Tensor]`): tokens `[B, 1]` of the positions so far, the current one too once it is drawn.
        drawn, kept_scores (`list[torch.Tensor]`): of each position of the windows, `[B, 1]` and `[B, V]`.
        token, scores, log_probs (`torch.Tensor`): of the position last looked at, `[B, 1]`, `[B, V]` and `[B, V]`.
    """

    def __init__(
        self,
        session: Any,
        process: Callable[[torch.Tensor], torch.Tensor],
        do_sample: bool,
        looks: bool = True,
        ahead: int = 1,
    ):
        self.session, self.process, self.do_sample, self.looks, self.ahead = session, process, do_sample, looks, ahead
        self.computed: list[torch.Tensor] = []
        self.drawn: list[torch.Tensor] = []
        self.kept_scores: list[torch.Tensor] = []
        self._logits = session.first_logits()
        self._scores: list[tuple[torch.Tensor, torch.Tensor]] = []  # and log_probs, of each computed position
        self._seen: list[list[list[float]]] = []  # of each: its rows' sights, if looked at, and tokens
        self._place = 0

    @property
    def steps(self) -> int:
        """Distributions computed."""
        return len(self.computed)

    def look(self) -> list[Sight] | None:
        if self._place == len(self._seen):
            self._compute(1 if self._seen else self.ahead)
        self.token, (self.scores, self.log_probs) = self.computed[self._place], self._scores[self._place]
        if not self.looks:
            return None
        rows = self._seen[self._place]
        return [Sight(first, second, doubt, int(id)) for first, second, doubt, id, _ in rows]

    def draw(self) -> list[int]:
        return [int(row[-1]) for row in self._seen[self._place]]

    def keep(self) -> None:
        self.drawn.append(self.token)
        self.kept_scores.append(self.scores)

    def advance(self) -> None:
        self._place += 1

    def _compute(self, count: int) -> None:
        """The next `count` positions."""
        shown = []
        for _ in range(count):
            if self.computed:
                token = self.computed[-1].to(self._logits.device)
                self._logits = self.session.next_logits(token, len(self.computed) - 1)
            scores = self.process(self._logits.float())
            log_probs = scores.log_softmax(-1)
            looked = likeliest_tokens(log_probs) if self.looks else None
            token = self._draw(scores, log_probs, looked)
            shown.append(token if looked is None else torch.cat([looked, token.to(looked)], dim=-1))
            self.computed.append(token)
            self._scores.append((scores, log_probs))
        self._seen += torch.stack(shown).tolist()

    def _draw(self, scores: torch.Tensor, log_probs: torch.Tensor, looked: torch.Tensor | None) -> torch.Tensor:
        """Tokens `[B, 1]`."""
        if self.do_sample:
            return draw_tokens(log_probs.exp().nan_to_num(1.0))
        return scores.argmax(-1, True) if looked is None else looked[:, 3:].long()
