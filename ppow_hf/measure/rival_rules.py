"""Window rules of others, to compare ours with: transformers' confidence threshold, and AdaEDL's entropy bound.

Knows numbers and costs; knows no tables.
"""

import math
from collections.abc import Sequence

import numpy

from ..runtime.cost_model import OnlineCosts
from ..runtime.windowing import FixedWindow


class ConfidenceStop(FixedWindow):
    """transformers' `assistant_confidence_threshold`: a draft ends with the first token drawn below the threshold.

    With `dynamic` the threshold follows the text as transformers' does: after each round the one of least
    (false positive rate + 3 x false negative rate) over all reached tokens so far, from their sixth on.
    """

    reads_distributions = True

    def __init__(self, max_window: int, costs: OnlineCosts, threshold: float = 0.4, dynamic: bool = False):
        super().__init__(max_window, costs)
        self.threshold, self.dynamic = threshold, dynamic
        self._seen: list[float] = []  # probabilities of this round's draft tokens
        self._probabilities: list[float] = []
        self._matches: list[int] = []

    def start(self, limit: int) -> int:
        self._seen = []
        return super().start(limit)

    def include(self, position: int, features: Sequence[float]) -> bool:
        self._seen.append(1 / (1 + math.exp(-features[0])))
        return True

    def outlook(self, position: int) -> tuple[float, float]:
        return self._seen[-1], self.threshold

    def update(self, window: int, draft_steps: int, accepted: int, kl: Sequence[float]) -> None:
        super().update(window, draft_steps, accepted, kl)
        reached = min(accepted + 1, window)
        self._probabilities += self._seen[:reached]
        self._matches += [1] * accepted + [0] * (reached - accepted)
        if self.dynamic and len(self._probabilities) > 5 and {0, 1} <= set(self._matches):
            self.threshold = least_cost_threshold(self._matches, self._probabilities)


def least_cost_threshold(matches: Sequence[int], probabilities: Sequence[float]) -> float:
    """The seen probability that, as a threshold, has the least false positive rate + 3 x false negative rate."""
    order = numpy.argsort(-numpy.asarray(probabilities), kind="stable")
    scores, kept = numpy.asarray(probabilities)[order], numpy.asarray(matches)[order]
    last = numpy.append(scores[1:] != scores[:-1], True)  # of each run of equal probabilities
    true_positive = numpy.cumsum(kept)[last] / kept.sum()
    false_positive = numpy.cumsum(1 - kept)[last] / (len(kept) - kept.sum())
    return float(scores[last][numpy.argmin(false_positive + 3 * (1 - true_positive))])


class EntropyStop(FixedWindow):
    """AdaEDL (arXiv 2410.18351): a draft ends with the first token drawn where 1 - sqrt(0.2 H) is below a threshold.

    The threshold follows the running acceptance: up by 0.001 a round while that is under 0.9, down otherwise.
    """

    reads_distributions = True

    def __init__(self, max_window: int, costs: OnlineCosts, threshold: float = 0.4):
        super().__init__(max_window, costs)
        self.threshold = threshold
        self._acceptance = 0.9
        self._bound = 1.0

    def include(self, position: int, features: Sequence[float]) -> bool:
        self._bound = 1 - math.sqrt(0.2 * features[1])
        return True

    def outlook(self, position: int) -> tuple[float, float]:
        return self._bound, self.threshold

    def update(self, window: int, draft_steps: int, accepted: int, kl: Sequence[float]) -> None:
        super().update(window, draft_steps, accepted, kl)
        if window > 0:
            self._acceptance = 0.5 * self._acceptance + 0.5 * accepted / window
            moved = self.threshold + (0.01 if self._acceptance < 0.9 else -0.01)
            self.threshold = 0.9 * self.threshold + 0.1 * moved
