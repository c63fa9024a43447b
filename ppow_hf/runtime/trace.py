"""The record of a generation call: what each round drafted, what was kept, how long it took.

The demo, the benchmark and the tests read this one record. Pure data: knows no models.
"""

import math
from dataclasses import dataclass, field


@dataclass
class RoundTrace:
    """One round: a window drafted and verified.

    Args:
        window (`int`): draft tokens that the target verified, W; of a tree its nodes.
        draft_steps (`int`): distributions that the drafter computed for it; one more than its tokens where it stopped
            by doubt. Of a block drafter its forwards: 1.
        draft_ids (`list[int]`): the drafted tokens.
        looked_up (`int`): how many of them, the last ones, came from the text instead of from the drafter.
        parents (`list[int]`): of a tree, the node that each token follows (-1: the context); empty for a chain.
        accepted (`int`): draft tokens kept, k. The round committed k + 1 tokens.
        kl (`list[float]`):
            KL(P_D||Q) in nats at each verified position of the drafter's own up to the first rejection. P_D is P on
            Q's support (the draft vocabulary), renormalised; it is P where Q is positive everywhere.
        outside (`list[float]`): the mass m of P outside that support, at the same positions.
        acceptance_probabilities (`list[float]`): what the window rule estimated for each token of the drafter's.
        features (`list[list[float]]`): what it estimated them from, see [`AcceptanceEstimator`].
        draft_seconds, verify_seconds (`float`): time of drafting, and of the target's forward with the bookkeeping.
        seconds (`float`): of the whole round, caches and rows brought up to date (our own loop's rounds only).
    """

    window: int
    draft_steps: int
    draft_ids: list[int]
    accepted: int = 0
    kl: list[float] = field(default_factory=list)
    acceptance_probabilities: list[float] = field(default_factory=list)
    features: list[list[float]] = field(default_factory=list)
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    seconds: float = 0.0
    parents: list[int] = field(default_factory=list)
    looked_up: int = 0
    outside: list[float] = field(default_factory=list)

    @property
    def kl_with_outside(self) -> list[float]:
        """KL(P_D||Q) - log(1 - m) at each of these positions, infinite at m = 1: what window rules look at [ours]."""
        return [
            value - math.log1p(-mass) if mass < 1 else math.inf
            for value, mass in zip(self.kl, self.outside, strict=True)
        ]

    @property
    def depth(self) -> int:
        """The longest path that could have been kept: W, or the depth of a tree."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return max(depths, default=self.window)


@dataclass
class GenerationTrace:
    """All rounds of one generation call, the first being the target's forward over the prompt."""

    rounds: list[RoundTrace] = field(default_factory=list)
    window_rule: str = ""
    speculation_pays: bool = True
    cost_ratio: float = 0.0
    verification_cost: float = 0.0

    @property
    def drafted(self) -> int:
        return sum(r.window for r in self.rounds)

    @property
    def accepted(self) -> int:
        return sum(r.accepted for r in self.rounds)

    @property
    def acceptance_length(self) -> float:
        """tau: mean of k + 1 over the rounds that drafted something (the bonus or correction token counted)."""
        drafting = [r for r in self.rounds if r.window > 0]
        return sum(r.accepted + 1 for r in drafting) / len(drafting) if drafting else 1.0

    @property
    def tokens_per_target_forward(self) -> float:
        """Committed tokens over target forwards, a round each: that over the prompt is the first of a call's."""
        return sum(r.accepted + 1 for r in self.rounds) / len(self.rounds) if self.rounds else 0.0

    @property
    def wasted(self) -> float:
        """(drafted - accepted) / drafted; 0 when nothing was drafted."""
        return (self.drafted - self.accepted) / self.drafted if self.drafted else 0.0

    def acceptance_by_position(self) -> list[float]:
        """Share of windows long enough for position j whose first j + 1 tokens were all kept."""
        longest = max((r.depth for r in self.rounds), default=0)
        shares = []
        for position in range(longest):
            long_enough = [r for r in self.rounds if r.depth > position]
            shares.append(sum(r.accepted > position for r in long_enough) / len(long_enough))
        return shares
