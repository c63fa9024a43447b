"""What a round of drafting and verifying costs, in one-token target forwards: given, or measured while decoding.

Words: gamma = draft step / one-token target forward; v(W) = (W+1)-token / one-token target forward; alpha =
probability that the next draft token is kept.
"""

import math
from dataclasses import dataclass, field

ENOUGH_FORWARDS = 3  # weight of the target forwards seen, older ones counting less, that measures verification
ENOUGH_SPREAD = 0.15  # variance of their windows that does


@dataclass(frozen=True)
class CostModel:
    """What a round costs, in one-token target forwards.

    Args:
        cost_ratio (`float`, *optional*, defaults to `0.12`): gamma [paper: 0.12].
        verification_cost (`float`, *optional*, defaults to `0.0`): slope of v(W) = 1 + slope * W.
        one_step (`bool`, *optional*, defaults to `False`): whether one draft step gives a whole window (block).
    """

    cost_ratio: float = 0.12
    verification_cost: float = 0.0
    one_step: bool = False

    def draft_steps(self, positions: float) -> float:
        """Draft steps that give the distributions of `positions` tokens of a window."""
        return min(positions, 1) if self.one_step else positions

    @property
    def start_cost(self) -> float:
        """What a window costs before its first token."""
        return self.cost_ratio if self.one_step else 0.0

    @property
    def token_cost(self) -> float:
        """What each token of a window costs: its verification, and its draft step if it has one of its own."""
        return self.verification_cost + (0.0 if self.one_step else self.cost_ratio)

    def round_cost(self, window: float, draft_steps: float | None = None) -> float:
        """Cost of drafting `window` tokens in `draft_steps` steps (default: as many as it takes) and verifying."""
        steps = self.draft_steps(window) if draft_steps is None else draft_steps
        return steps * self.cost_ratio + 1 + self.verification_cost * window

    def cost_per_accepted(self, window: float, accepted: float) -> float:
        """Target forwards per accepted draft token; infinite when none is accepted."""
        return self.round_cost(window) / accepted if accepted > 0 else math.inf

    def expected_tokens(self, acceptance: float, window: int) -> float:
        """E[tokens of a round] = (1 - alpha^(W+1)) / (1 - alpha), the bonus token counted (Leviathan et al. 2023)."""
        if acceptance >= 1:
            return window + 1.0
        return (1 - acceptance ** (window + 1)) / (1 - acceptance)

    def speedup(self, acceptance: float, window: int) -> float:
        """Expected tokens per one-token target forward."""
        return self.expected_tokens(acceptance, window) / self.round_cost(window)


@dataclass
class OnlineCosts:
    """Costs measured while decoding: running means of the draft step, and a fitted line of the verification.

    Prior values stand until enough rounds have been seen, so that one slow round (a page fault, another process)
    does not decide. Given values are never replaced.
    """

    given_cost_ratio: float | None = None
    given_verification_cost: float | None = None
    prior: CostModel = field(default_factory=lambda: CostModel(0.12, 0.04))
    decay: float = 0.95
    _proportion: float | None = None  # of the slope to the base, when windows last differed enough to tell it
    _step: tuple[float, float] = (0.0, 0.0)  # weight, weighted seconds
    _moments: list[float] = field(default_factory=lambda: [0.0] * 5)  # weight, W, W^2, seconds, W*seconds

    def observe_drafting(self, steps: int, seconds: float) -> None:
        """Record that `steps` draft steps took `seconds`."""
        if steps > 0 and seconds > 0:
            weight, total = self._step
            self._step = (weight * self.decay + steps, total * self.decay + seconds)

    def observe_verification(self, window: int, seconds: float) -> None:
        """Record that a target forward of `window` + 1 tokens took `seconds`."""
        if seconds > 0:
            update = (1.0, window, window * window, seconds, window * seconds)
            self._moments = [old * self.decay + new for old, new in zip(self._moments, update, strict=True)]
            self._fit_proportion()

    @property
    def one_step(self) -> bool:
        """See [`CostModel`]."""
        return self.prior.one_step

    @property
    def model(self) -> CostModel:
        """The cost model of now."""
        base = self._base_seconds
        weight, total = self._step
        gamma, per_token = self.prior.cost_ratio, self.proportion
        if base is not None and weight >= 3:
            gamma = min(total / weight / base, 10.0)
        if self.given_cost_ratio is not None:
            gamma = self.given_cost_ratio
        if self.given_verification_cost is not None:
            per_token = self.given_verification_cost
        return CostModel(gamma, per_token, self.one_step)

    @property
    def trial_window(self) -> float:
        """Longest window that is worth trying before costs are measured or given: none, then one token and two."""
        if self.given_verification_cost is not None or self._moments[0] >= ENOUGH_FORWARDS:
            return math.inf
        return int(self._moments[0])

    @property
    def proportion(self) -> float:
        """The measured slope of v(W), the prior's until windows have differed enough to tell it."""
        return self.prior.verification_cost if self._proportion is None else self._proportion

    @property
    def _base_seconds(self) -> float | None:
        """Seconds of a one-token target forward."""
        weight, window, _, seconds, _ = self._moments
        return None if weight < ENOUGH_FORWARDS else seconds / weight / (1 + self.proportion * window / weight)

    def _fit_proportion(self) -> None:
        """Fit the line seconds = base + slope * W, where it can be told."""
        weight, window, square, seconds, product = self._moments
        mean_window, mean_seconds = window / weight, seconds / weight
        spread = square / weight - mean_window**2
        if weight < ENOUGH_FORWARDS or spread < ENOUGH_SPREAD:
            return
        slope = max((product / weight - mean_window * mean_seconds) / spread, 0.0)
        base = max(mean_seconds - slope * mean_window, 0.2 * mean_seconds)
        self._proportion = min(slope / base, 1.0)


def make_costs(
    cost_ratio: float | None,
    verification_cost: float | None,
    calibration: dict | None = None,
    one_step: bool = False,
) -> OnlineCosts:
    """The costs of a call: the given ones, others measured; until then those of the machine that calibrated.

    `one_step` as of [`CostModel`]; a step is taken to cost three times as much then, until it is measured [ours].
    """
    stored = (calibration or {}).get("costs") or {}
    guess = 0.36 if one_step else 0.12
    prior = CostModel(stored.get("cost_ratio", guess), stored.get("verification_cost", 0.04), one_step)
    return OnlineCosts(cost_ratio, verification_cost, prior)
