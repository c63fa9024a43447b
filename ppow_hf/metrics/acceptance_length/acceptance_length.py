"""Acceptance length and its companions, from the drafted and accepted counts of speculative decoding's rounds.

Knows counts only: no models, no texts.
"""

from collections.abc import Sequence

import datasets
import evaluate

_DESCRIPTION = """
Speculative decoding drafts a window of tokens in each round, keeps the k that the target agrees with, and gets one
more token from the target itself. From the two counts of each round this metric computes what a drafter is worth.
"""

_KWARGS_DESCRIPTION = """
Args:
    drafted (`list[int]`): tokens drafted in each round, W; 0 where nothing was drafted.
    accepted (`list[int]`): those of them that were kept, k, from 0 to W.
    cost_ratio (`float`, *optional*): gamma, seconds of a draft step over seconds of a one-token target forward.
    verification_cost (`float`, *optional*, defaults to 0):
        How much each drafted token adds to the target's forward, in one-token forwards.

Returns:
    acceptance_length (`float`): mean of k + 1 over the rounds that drafted; 1.0 where none did.
    acceptance_by_position (`list[float]`):
        For position j, the share of the windows longer than j whose first j + 1 tokens were all kept.
    tokens_per_target_forward (`float`): mean of k + 1 over all rounds.
    wasted (`float`): (drafted - accepted) / drafted; 0.0 where nothing was drafted.
    drafted, accepted, rounds (`int`): totals.
    expected_speedup (`float`):
        Tokens per one-token target forward of time: sum of k + 1 over sum of 1 + W * (cost_ratio + verification_cost).
        Only with cost_ratio.

Examples:
    >>> metric = evaluate.load("acceptance_length")
    >>> result = metric.compute(drafted=[4, 4, 0], accepted=[4, 1, 0], cost_ratio=0.25)
    >>> result["acceptance_length"], result["wasted"], result["expected_speedup"]
    (3.5, 0.375, 1.6)
"""

_CITATION = """
@article{jiang2026ppow,
  title = {Performance-Driven Policy Optimization for Speculative Decoding with Adaptive Windowing},
  author = {Jiang and Sun},
  journal = {arXiv preprint arXiv:2605.14978},
  year = {2026}
}
"""


def summarize(
    drafted: Sequence[int],
    accepted: Sequence[int],
    cost_ratio: float | None = None,
    verification_cost: float = 0.0,
) -> dict:
    """The metric's numbers; raises `ValueError` for counts that no run can have had."""
    if len(drafted) != len(accepted):
        raise ValueError(f"accepted: {len(accepted)} rounds given, and {len(drafted)} in drafted. Give both for each.")
    if not len(drafted):
        raise ValueError("drafted: no rounds given; at least one is needed.")
    for number, (window, kept) in enumerate(zip(drafted, accepted, strict=True)):
        if not 0 <= kept <= window:
            raise ValueError(f"accepted: {kept} given for round {number}, in which {window} tokens were drafted.")
    for name, value in (("cost_ratio", cost_ratio or 0.0), ("verification_cost", verification_cost)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: {value} given; a finite number of at least 0 is needed.")
    rounds = list(zip(drafted, accepted, strict=True))
    drafting = [kept + 1 for window, kept in rounds if window > 0]
    positions = [[kept > j for window, kept in rounds if window > j] for j in range(max(drafted))]
    tokens, total, kept_total = sum(accepted) + len(rounds), sum(drafted), sum(accepted)
    result = {
        "acceptance_length": sum(drafting) / len(drafting) if drafting else 1.0,
        "acceptance_by_position": [sum(kept) / len(kept) for kept in positions],
        "tokens_per_target_forward": tokens / len(rounds),
        "wasted": (total - kept_total) / total if total else 0.0,
        "drafted": int(total),
        "accepted": int(kept_total),
        "rounds": len(rounds),
    }
    if cost_ratio is not None:
        result["expected_speedup"] = tokens / (len(rounds) + total * (cost_ratio + verification_cost))
    return result


class AcceptanceLength(evaluate.Metric):
    """`evaluate`'s face of [`summarize`]."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"drafted": datasets.Value("int64"), "accepted": datasets.Value("int64")}),
            reference_urls=["https://arxiv.org/abs/2605.14978"],
        )

    def _compute(self, drafted, accepted, cost_ratio=None, verification_cost=0.0) -> dict:
        return summarize(drafted, accepted, cost_ratio, verification_cost)
