"""Fits the window rule to a pair: the acceptance estimate from drafted windows, and this machine's costs.

Knows traces, tables and clocks; trains nothing and writes no file.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..runtime.cost_model import OnlineCosts
from ..runtime.estimator import AcceptanceEstimator
from ..runtime.target_weights import input_device
from ..runtime.trace import GenerationTrace
from ..runtime.windowing import FixedWindow
from .costs import measure_costs
from .draft_table import DraftTable, draft_tables
from .evaluation import decode
from .replay import replay

FITTING_WINDOWS = (16, 8, 4, 2)


def calibrate(target, drafter, prompts, max_new_tokens=64, temperatures=(0.0, 1.0), seed=0) -> dict[str, Any]:
    """Fit the acceptance estimate and measure the costs: what belongs in `config.calibration`.

    At T = 0 the estimate is fitted on fixed windows of several lengths, replayed on a table of drafts; at T > 0 on
    decoded windows of the longest. Prompts should be ones the drafter was not trained on.
    """
    calibration: dict[str, Any] = {}
    window = drafter.config.max_window
    ids = [torch.tensor([list(prompt)]) for prompt in prompts]
    with drafter.evaluating():
        for temperature in temperatures:
            if temperature > 0:
                _, traces = decode(
                    target, drafter, prompts, max_new_tokens, temperature, seed, window="fixed", max_window=window
                )
                calibration["sampling"] = fit_estimator(traces)
            else:
                tables = draft_tables(target, drafter, ids, max_new_tokens, window)
                calibration["greedy"] = fit_on_tables(tables)
        costs = measure_costs(target, drafter, ids[0].to(input_device(target)), max_window=window)
    calibration["costs"] = {
        "cost_ratio": round(costs.cost_ratio, 4),
        "verification_cost": round(costs.verification_cost, 4),
    }
    return calibration


def fit_estimator(traces: Sequence[GenerationTrace]) -> dict[str, Any]:
    """Weights of the [`AcceptanceEstimator`] from traces of fixed windows.

    Every draft token that was reached (all before it kept) is one observation.
    """
    features, accepted = [], []
    for trace in traces:
        for r in trace.rounds:
            for position in range(min(r.accepted + 1, r.window)):
                features.append(r.features[position])
                accepted.append(position < r.accepted)
    share = sum(accepted) / len(accepted) if accepted else 0.5
    return {
        "weights": asdict(AcceptanceEstimator.fit(features, accepted)),
        "acceptance": round(share, 4),
        "observations": len(accepted),
    }


def fit_on_tables(tables: Sequence[DraftTable]) -> dict[str, Any]:
    """The estimate that `config.calibration["greedy"]` holds, from fixed windows replayed on texts of their own."""
    return fit_estimator(_fitting_traces(tables))


def without_look_up(tables: Sequence[DraftTable]) -> dict[str, Any]:
    """The same from confidence, entropy, divergence and position alone, the other weights being 0."""
    traces = _fitting_traces(tables)
    for trace in traces:
        for one_round in trace.rounds:
            one_round.features = [[*features[:4], 0.0, 0.0, 0.0, features[7]] for features in one_round.features]
    estimate = fit_estimator(traces)
    estimate["weights"] |= {"margin": 0.0, "lookup": 0.0, "conflict": 0.0}
    return estimate


def _fitting_traces(tables: Sequence[DraftTable]) -> list[GenerationTrace]:
    costs = OnlineCosts(0.0, 0.0)
    depth = min((table.draft_ids.shape[1] for table in tables), default=0)
    windows = dict.fromkeys(min(window, depth) for window in FITTING_WINDOWS)  # each once, in this order
    return [replay(FixedWindow(window, costs), table, record=True) for window in windows for table in tables]
