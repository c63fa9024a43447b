"""The probability that a draft token is kept, estimated before it is drawn: features and a logistic regression.

Pure numbers: knows no models, tokens or caches.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

MAX_KL = 20.0  # nats; a saturated softmax, or a target with all its mass outside the draft vocabulary, gives more
KL_DECAY = 0.7  # of the running divergence, at each verified position


@dataclass(frozen=True)
class AcceptanceEstimator:
    """Probability that a draft token is kept, from what is known before it is drawn [ours].

    Logistic in the [`features`]. Fitted by [`fit`] at the end of training; the default weights are for a drafter that
    nobody fitted them to.

    Args:
        bias (`float`): log-odds where every feature is 0.
        confidence (`float`): weight of the logit of the drafter's highest probability.
        entropy (`float`): of its distribution's entropy, nats.
        divergence (`float`): of the logarithm of the lagged KL(P||Q).
        position (`float`): of the number of draft tokens before it in the window.
        margin (`float`): of the logarithm of the highest probability over the second.
        lookup (`float`):
            Of the log-odds that the text's own repetitions give to the token that they suggest ([`TextMemory`]), where
            that is the likeliest token; taken negative where it is another.
        conflict (`float`): of whether it is another.
        predicted (`float`): of the log-odds that the drafter's confidence head gives.
    """

    bias: float = 0.0
    confidence: float = 0.7
    entropy: float = 0.0
    divergence: float = -0.15
    position: float = 0.0
    margin: float = 0.4
    lookup: float = 0.7
    conflict: float = -0.5
    predicted: float = 0.0

    @classmethod
    def default(cls, confidence_head: bool = False) -> "AcceptanceEstimator":
        """The weights for a drafter that nobody fitted them to: a confidence head's estimate in place of the drafter's
        probabilities."""
        if not confidence_head:
            return cls()
        return cls(confidence=0.0, divergence=0.0, margin=0.0, predicted=1.0)

    @classmethod
    def from_weights(cls, weights: dict[str, float]) -> "AcceptanceEstimator":
        """The estimator of these weights by name; `foretold` is what earlier versions called `lookup`."""
        return cls(**{"lookup" if name == "foretold" else name: weight for name, weight in weights.items()})

    @staticmethod
    def features(
        max_probability: float,
        entropy: float,
        lagged_kl: float,
        position: int,
        second_probability: float | None = None,
        lookup_probability: float | None = None,
        lookup_agrees: bool = True,
        predicted: float | None = None,
    ) -> list[float]:
        """The eight features, each finite whatever the inputs (NaN counts as the most doubtful value).

        `second_probability` left out leaves the margin at 0. `lookup_probability` is that of the token which the text
        suggests, `None` where it suggests none; `lookup_agrees` whether that is the likeliest token. `predicted` is
        what the confidence head gives, log-odds, `None` without one.
        """
        probability = min(max(_finite(max_probability, 0.0), 1e-4), 1 - 1e-4)
        second = probability if second_probability is None else _finite(second_probability, 1.0)
        return [
            math.log(probability / (1 - probability)),
            min(max(_finite(entropy, 10.0), 0.0), 15.0),
            math.log(0.01 + min(max(_finite(lagged_kl, MAX_KL), 0.0), MAX_KL)),
            float(position),
            math.log(probability / min(max(second, 1e-4), probability)),
            0.0 if lookup_probability is None else _log_odds(lookup_probability) * (1.0 if lookup_agrees else -1.0),
            float(lookup_probability is not None and not lookup_agrees),
            0.0 if predicted is None else min(max(_finite(predicted, -15.0), -15.0), 15.0),
        ]

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights in the order of the features."""
        return (
            self.confidence,
            self.entropy,
            self.divergence,
            self.position,
            self.margin,
            self.lookup,
            self.conflict,
            self.predicted,
        )

    def probability(self, features: Sequence[float], shift: float = 0.0) -> float:
        """alpha in (0, 1) from the features; `shift` is added to its log-odds."""
        score = self.bias + shift + sum(map(operator.mul, self.weights, features))
        return 1 / (1 + math.exp(-min(max(score, -30.0), 30.0)))

    @classmethod
    def fit(
        cls,
        features: Sequence[Sequence[float]],
        accepted: Sequence[bool],
        ridge: float = 30.0,
    ) -> "AcceptanceEstimator":
        """Logistic regression by Newton's method on observed (features, accepted) pairs of reached positions.

        `ridge` pulls the weights towards the default ones (those of a confidence head where the features have its
        estimates), and a thirtieth of it the bias, so that a few hundred pairs
        do no harm. Fewer than 20 pairs, or pairs of one kind only, give a constant estimate (Laplace's rule).
        """
        import numpy

        kept = sum(map(bool, accepted))
        if len(accepted) < 20 or kept in (0, len(accepted)):
            share = (kept + 1) / (len(accepted) + 2)
            return cls(math.log(share / (1 - share)), *[0.0] * 8)
        x = numpy.column_stack([numpy.ones(len(accepted)), numpy.asarray(features, dtype=float)])
        y = numpy.asarray(accepted, dtype=float)
        penalty = numpy.diag([ridge / 30] + [ridge] * (x.shape[1] - 1))
        start = cls.default(confidence_head=bool(x[:, -1].any()))
        default = numpy.asarray([start.bias, *start.weights])
        weights = default.copy()
        for _ in range(50):
            p = 1 / (1 + numpy.exp(-numpy.clip(x @ weights, -30, 30)))
            gradient = x.T @ (p - y) + penalty @ (weights - default)
            hessian = (x * (p * (1 - p))[:, None]).T @ x + penalty
            step = numpy.linalg.solve(hessian, gradient)
            step *= min(1.0, 4.0 / max(float(numpy.abs(step).max()), 1e-12))
            weights -= step
            if numpy.abs(step).max() < 1e-8:
                break
        return cls(*(round(float(weight), 5) for weight in weights))


def _log_odds(probability: float) -> float:
    bounded = min(max(probability, 1e-3), 1 - 1e-3)
    return math.log(bounded / (1 - bounded))


def _finite(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else min(max(value, -1e30), 1e30)


def decayed_kl(running: float, kl: Sequence[float]) -> float:
    """Exponentially weighted mean of divergences, each brought into [0, MAX_KL] (NaN counts as MAX_KL)."""
    for value in kl:
        bounded = min(max(_finite(value, MAX_KL), 0.0), MAX_KL)
        running = KL_DECAY * running + (1 - KL_DECAY) * bounded
    return running
