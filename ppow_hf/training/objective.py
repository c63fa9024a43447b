"""What an `objective` says: phases, and weights of the terms that each minimises.

Knows texts and numbers; knows no tensors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

TEXT_TERMS = ("ce", "kl", "tv", "lk", "expected_length", "confidence")
WINDOW_TERMS = ("ppow", "token_rl", "opd")
GROUP_TERMS = ("ppow", "token_rl")  # those that compare the windows of a group
NAMES = ("supervised", *TEXT_TERMS, *WINDOW_TERMS)
SUPERVISED = {"ce": 0.1, "kl": 1.0}  # [ours]


@dataclass(frozen=True)
class Phase:
    """What is minimised from a share of the training on: weights of terms, by their names."""

    start: float
    weights: Mapping[str, float]


def parse_objective(objective: str | Mapping[str, float]) -> tuple[Phase, ...]:
    """The phases of an `objective`, the first one starting at 0.

    A name, a weighted sum (`"0.3*kl + tv"` or `{"kl": 0.3, "tv": 1.0}`), or a schedule of them
    (`"kl; 0.5: 0.3*kl + tv"`: the second one from half of the training on). `"supervised"` stands for
    `"0.1*ce + kl"`. Raises `ValueError` for anything else, naming it.
    """
    if isinstance(objective, Mapping):
        objective = objective_text(objective)
    phases: list[Phase] = []
    for number, part in enumerate(objective.split(";")):
        share, colon, terms = part.rpartition(":")
        start = 0.0
        if colon:
            start = _number(share, objective)
        if bool(colon) != bool(number) or not (not phases or phases[-1].start < start < 1):
            raise ValueError(
                f"objective: {objective!r} is no schedule. Begin every phase but the first with the share of the "
                "training it starts at, ascending and below 1: 'kl; 0.5: 0.3*kl + tv'."
            )
        weights: dict[str, float] = {}
        for term in terms.split("+"):
            factor, star, name = term.rpartition("*")
            weight, name = _number(factor, objective) if star else 1.0, name.strip()
            if name not in NAMES:
                raise ValueError(f"objective: {name!r} is not one of {list(NAMES)}, nor a sum or schedule of them.")
            if not weight > 0:
                raise ValueError(f"objective: {name} has the weight {weight}; weights must be above 0.")
            expanded = SUPERVISED if name == "supervised" else {name: 1.0}
            for expanded_name, factor_of_name in expanded.items():
                weights[expanded_name] = weights.get(expanded_name, 0.0) + weight * factor_of_name
        phases.append(Phase(start, weights))
    return tuple(phases)


def objective_text(weights: Mapping[str, float]) -> str:
    """A dict of weights as the text that [`parse_objective`] reads."""
    return " + ".join(f"{weight}*{name}" for name, weight in weights.items())


def _number(text: str, objective: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"objective: {text.strip()!r} in {objective!r} is not a number; write '0.3*kl + tv'.")
    return number
