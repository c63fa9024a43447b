"""The window study: every rule at every cost on every workload, with the fixed windows and the oracle around it.

Knows tables and rules (draft_table.py, replay.py) and what the numbers are for; reads no files and loads no models.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from ..runtime.cost_model import CostModel, OnlineCosts
from ..runtime.estimator import AcceptanceEstimator
from ..runtime.trace import GenerationTrace
from ..runtime.windowing import FixedWindow, HeuristicWindow, KLAdaptiveWindow, WindowRule, make_window_rule
from .calibration import fit_on_tables, without_look_up
from .draft_table import DEPTH, DraftTable
from .evaluation import decode, repeated_ngrams
from .replay import mixed_stream, oracle, replay
from .rival_rules import ConfidenceStop, EntropyStop

MIXED = "mixed stream"
OURS, CONFIDENCE_ONLY, WITH_LOOKUP = "ppow kl", "ppow kl, confidence alone", "ppow kl with look-up"
ENTROPY_THRESHOLDS = (0.3, 0.5, 0.7)
# Times the true costs: told to the rule to make it draft less.
THRIFT = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0)
COMPARED_FIXED = 8

MakeRule = Callable[[OnlineCosts], WindowRule]
Tables = Mapping[str, Sequence[DraftTable]]


def speed(traces: Sequence[GenerationTrace], costs: CostModel) -> dict[str, float]:
    """Tokens per one-token target forward, and what was drafted for them; the prompts' forwards are not counted."""
    together = GenerationTrace([one_round for trace in traces for one_round in trace.rounds[1:]])
    rounds, count = together.rounds, len(together.rounds)
    return {
        "tokens_per_cost": (together.accepted + count)
        / sum(costs.round_cost(r.window, r.draft_steps) for r in rounds),
        "wasted": together.wasted,
        "mean_window": together.drafted / count,
        "rounds": count,
        "drafted": together.drafted,
        "draft_steps": sum(r.draft_steps for r in rounds),
        "accepted": together.accepted,
    }


def check_rounds(workload: str, tokens: int) -> None:
    """Raise `ValueError` where the texts of a workload have no `tokens` beside those that come with their prompts."""
    if tokens < 1:
        raise ValueError(
            f"prompts: the target ends every text of {workload} with its first token, so that nothing is drafted. "
            "Pass other prompts."
        )


def run(make_rule: MakeRule, tables: Sequence[DraftTable], costs: CostModel, as_one: bool) -> list[GenerationTrace]:
    """Replay on each table, with a new rule for each as in a call of its own, or `as_one` text with one rule."""
    given = OnlineCosts(costs.cost_ratio, costs.verification_cost, costs)
    if as_one:
        rule = make_rule(given)
        return [replay(rule, table) for table in tables]
    return [replay(make_rule(given), table) for table in tables]


UNPRICED: dict[str, MakeRule] = {  # rules that do not ask what drafting costs
    **{f"fixed {window}": partial(FixedWindow, window) for window in range(DEPTH + 1)},
    **{
        f"entropy stop from {threshold}": partial(EntropyStop, DEPTH, threshold=threshold)
        for threshold in ENTROPY_THRESHOLDS
    },
    "transformers heuristic": partial(HeuristicWindow, DEPTH),
    "transformers confidence 0.4": partial(ConfidenceStop, DEPTH),
    "transformers dynamic confidence": partial(ConfidenceStop, DEPTH, dynamic=True),
}


def study(
    fitting: Tables, tables: Tables, costs: Mapping[str, CostModel], segment_tokens: int = 256
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Replay every rule on every workload and on a stream that changes workload every `segment_tokens` tokens.

    Args:
        fitting (`dict`): workload -> tables of the texts that the estimate and thresholds are fitted on.
        tables (`dict`): workload -> tables of other texts, which the numbers are from.
        costs (`dict`): name -> the costs of a machine.
        segment_tokens (`int`, *optional*, defaults to `256`): least length of the mixed stream's segments.

    Returns:
        `dict`: results, one entry for each workload and cost, with a `summary`; and the calibrations that were fitted.
    """
    fit_tables = [table for workload in fitting.values() for table in workload]
    check_rounds("the prompts to fit on", sum(table.tokens for table in fit_tables))
    for workload, texts in tables.items():
        check_rounds(workload, sum(table.tokens for table in texts))
    unasked = CostModel(one_step=any(cost.one_step for cost in costs.values()))  # of rules that do not ask
    calibrations = {OURS: fit_on_tables(fit_tables), CONFIDENCE_ONLY: without_look_up(fit_tables)}
    entropy_traces = {
        threshold: run(UNPRICED[f"entropy stop from {threshold}"], fit_tables, unasked, False)
        for threshold in ENTROPY_THRESHOLDS
    }
    results = []
    for workload, texts in {**tables, MIXED: mixed_stream(tables, segment_tokens)}.items():
        as_one = workload == MIXED
        unpriced = {name: run(maker, texts, unasked, as_one) for name, maker in UNPRICED.items()}
        for cost_name, cost in costs.items():
            speeds = {name: speed(traces, cost) for name, traces in unpriced.items()}
            fit_speeds = {value: speed(traces, cost)["tokens_per_cost"] for value, traces in entropy_traces.items()}
            threshold = max(fit_speeds, key=fit_speeds.__getitem__)
            rules = {name: speeds[name] for name in UNPRICED if name.startswith("transformers")}
            rules["entropy stop (AdaEDL)"] = speeds[f"entropy stop from {threshold}"]
            for name in (CONFIDENCE_ONLY, OURS, WITH_LOOKUP):
                rules[name] = speed(run(adaptive_rule(name, calibrations), texts, cost, as_one), cost)
            fixed = [speeds[f"fixed {window}"] for window in range(DEPTH + 1)]
            least_speed = fixed[COMPARED_FIXED]["tokens_per_cost"]
            thrifty = most_thrifty(adaptive_rule(OURS, calibrations), rules[OURS], texts, cost, as_one, least_speed)
            limit = speed([oracle(table, cost) for table in texts], cost)
            results.append(
                describe_result(workload, cost_name, cost, fixed, rules, limit)
                | {"thrifty": thrifty, "entropy_stop_threshold": threshold}
            )
    calibration = {"greedy": calibrations[OURS], "confidence_alone": calibrations[CONFIDENCE_ONLY]}
    summary = {"summary": summarise(results), "waste_at_speed_of_fixed_8": waste_at_speed(results)}
    return {"results": results, **summary}, calibration


def adaptive_rule(name: str, calibrations: Mapping[str, dict[str, Any]]) -> MakeRule:
    """The adaptive rule called `name`; look-up is beyond the oracle, which has the drafter's tokens alone."""
    lookup = name == WITH_LOOKUP
    calibration = {"greedy": calibrations[OURS if lookup else name]}
    return partial(make_window_rule, "kl", DEPTH, calibration=calibration, lookup=lookup)


def most_thrifty(
    make_rule: MakeRule,
    as_told: dict[str, float],
    tables: Sequence[DraftTable],
    cost: CostModel,
    as_one: bool,
    least_speed: float,
) -> dict[str, float]:
    """The speed with the least waste among true costs (`as_told`) and higher ones, while it is `least_speed`."""
    thrifty = as_told | {"told_costs_times": 1.0}
    for factor in THRIFT:
        told = replace(cost, cost_ratio=cost.cost_ratio * factor, verification_cost=cost.verification_cost * factor)
        slower = speed(run(make_rule, tables, told, as_one), cost)
        if slower["tokens_per_cost"] < least_speed:
            break
        if slower["wasted"] < thrifty["wasted"]:
            thrifty = slower | {"told_costs_times": factor}
    return thrifty


def describe_workload(tables: Sequence[DraftTable]) -> dict[str, Any]:
    """What the texts of a workload are like: their size, how well they are drafted, how much they repeat."""
    tokens = sum(table.tokens for table in tables)
    return {
        "prompts": len(tables),
        "tokens": tokens,
        "mean_accepted_of_16": sum(int(table.accepted.sum()) for table in tables) / max(tokens, 1),
        "repeated_8grams": repeated_ngrams([table.text.tolist() for table in tables], 8),
    }


def describe_result(
    workload: str,
    cost_name: str,
    cost: CostModel,
    fixed: list[dict[str, float]],
    rules: dict[str, dict[str, float]],
    limit: dict[str, float],
) -> dict[str, Any]:
    """One workload at one cost: every rule beside the best fixed window and the oracle."""
    speeds = [one["tokens_per_cost"] for one in fixed]
    best = max(speeds)
    described = {}
    for name, rule_speed in rules.items():
        gain = rule_speed["tokens_per_cost"] - best
        way = gain / (limit["tokens_per_cost"] - best) if limit["tokens_per_cost"] > best else 0.0
        described[name] = rule_speed | {"over_best_fixed": gain / best, "way_to_oracle": way}
    return {
        "workload": workload,
        "cost": cost_name,
        **asdict(cost),
        "fixed": fixed,
        "best_fixed_window": speeds.index(best),
        "best_fixed_tokens_per_cost": best,
        "rules": described,
        "oracle": limit,
    }


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers that say whether adaptivity pays: of each rule its worst, mean and mixed-stream gains."""
    summary: dict[str, Any] = {}
    for name in results[0]["rules"]:
        ours = [result["rules"][name] for result in results]
        mixed = [result["rules"][name]["over_best_fixed"] for result in results if result["workload"] == MIXED]
        worst = min(range(len(results)), key=lambda place: ours[place]["over_best_fixed"])
        summary[name] = {
            "worst_over_best_fixed": ours[worst]["over_best_fixed"],
            "worst_at": f"{results[worst]['workload']}, {results[worst]['cost']}",
            "mean_over_best_fixed": sum(one["over_best_fixed"] for one in ours) / len(ours),
            "mixed_over_best_single_fixed": mixed,
            "mean_way_to_oracle": sum(one["way_to_oracle"] for one in ours) / len(ours),
            "least_way_to_oracle": min(one["way_to_oracle"] for one in ours),
        }
    return summary


def waste_at_speed(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Our wasted drafts over those of fixed windows of 8, told the costs at which we waste least and are no slower."""
    ratios = [
        result["thrifty"]["wasted"] / result["fixed"][COMPARED_FIXED]["wasted"]
        for result in results
        if result["fixed"][COMPARED_FIXED]["wasted"] > 0
    ]
    return {"mean": sum(ratios) / max(len(ratios), 1), "worst": max(ratios, default=0.0)}


# -- is the estimate right, and is the replay


class _WatchedWindow(KLAdaptiveWindow):
    """Estimates and learns as the adaptive rule does, but always drafts all there is room for."""

    def start(self, limit: int, pays: bool | None = None) -> int:
        super().start(limit, pays)
        return min(self.max_window, limit)

    def include(self, position: int, features: Sequence[float]) -> bool:
        self._estimates.append(self.acceptance_probability(features))
        return True

    def outlook(self, position: int) -> tuple[float, float]:
        return 1.0, 0.0


def calibration_curve(calibration: dict[str, Any], tables: Sequence[DraftTable]) -> dict[str, Any]:
    """Predicted against measured acceptance of reached draft tokens, by position and by predicted probability.

    The estimates are those that the rule would have had in decoding, its shift included, in windows of full depth.
    """
    estimator = AcceptanceEstimator.from_weights(calibration["weights"])
    pairs = []
    for table in tables:
        rule = _WatchedWindow(DEPTH, OnlineCosts(0.0, 0.0), estimator, calibration["acceptance"])
        for one_round in replay(rule, table).rounds:
            for position in range(min(one_round.accepted + 1, one_round.window)):
                estimate = one_round.acceptance_probabilities[position]
                pairs.append((position, estimate, position < one_round.accepted))

    def means(chosen: list[tuple[int, float, bool]]) -> dict[str, float]:
        count = len(chosen)
        return {
            "predicted": sum(pair[1] for pair in chosen) / count,
            "measured": sum(pair[2] for pair in chosen) / count,
            "count": count,
        }

    by_position = [[pair for pair in pairs if pair[0] == position] for position in range(DEPTH)]
    by_estimate = [[pair for pair in pairs if int(min(pair[1], 0.999999) * 10) == place] for place in range(10)]
    return {
        "by_position": [{"position": place, **means(group)} for place, group in enumerate(by_position) if group],
        "by_estimate": [means(group) for group in by_estimate if group],
        "expected_error": sum(
            len(group) * abs(means(group)["predicted"] - means(group)["measured"]) for group in by_estimate if group
        )
        / max(len(pairs), 1),
    }


def live_check(
    target: Any,
    drafter: Any,
    tables: Sequence[DraftTable],
    calibration: dict[str, Any],
    costs: CostModel,
) -> dict[str, Any]:
    """Decode the tables' prompts, with given costs, and compare text and rounds with the replay's: by our rule without
    and with look-up, a fixed window and transformers' heuristic."""
    depth = tables[0].draft_ids.shape[1]
    settings: dict[str, dict[str, Any]] = {
        OURS: {"window": "kl", "max_window": depth},
        WITH_LOOKUP: {"window": "kl", "max_window": depth, "lookup": True},
        "fixed 5": {"window": "fixed", "max_window": min(5, depth)},
        "transformers heuristic": {"window": "heuristic", "max_window": depth},
    }
    stored = drafter.config.calibration
    drafter.config.calibration = {"greedy": calibration}
    given: dict[str, Any] = {"cost_ratio": costs.cost_ratio, "verification_cost": costs.verification_cost}
    checks: dict[str, Any] = {}
    try:
        for name, chosen in settings.items():
            same_text = same_rounds = 0
            all_replayed, all_live = [], []
            for table in tables:
                outputs, traces = decode(
                    target, drafter, [table.prompt.tolist()], table.max_new_tokens, **chosen, **given
                )
                rule = make_window_rule(
                    chosen["window"],
                    chosen["max_window"],
                    OnlineCosts(costs.cost_ratio, costs.verification_cost, costs),
                    drafter.config.calibration,
                    lookup=chosen.get("lookup", False),
                )
                replayed = replay(rule, table)
                same_text += outputs[0] == table.text.tolist()
                same_rounds += _rounds(traces[0]) == _rounds(replayed)
                all_replayed.append(replayed)
                all_live.append(traces[0])
            checks[name] = {
                "texts": len(tables),
                "same_text": same_text,
                "same_rounds": same_rounds,
                "replayed_tokens_per_cost": speed(all_replayed, costs)["tokens_per_cost"],
                "live_tokens_per_cost": speed(all_live, costs)["tokens_per_cost"],
            }
    finally:
        drafter.config.calibration = stored
    return checks


def _rounds(trace: GenerationTrace) -> list[tuple[int, int, int, list[int]]]:
    return [(r.window, r.draft_steps, r.accepted, r.draft_ids) for r in trace.rounds[1:]]


# -- how it is shown


def format_study(findings: dict[str, Any]) -> str:
    """A line for each workload and cost, and what they come to."""
    lines = [
        f"{'workload':<14} {'costs':<12} {'best fixed':>11} {'fixed 8':>8} {'ours':>6} {'gain':>7} {'oracle':>8} "
        f"{'of the way':>10} {'waste':>6} {'fixed 8':>8}"
    ]
    for result in findings["results"]:
        ours, eight = result["rules"][OURS], result["fixed"][COMPARED_FIXED]
        best = f"{result['best_fixed_tokens_per_cost']:.2f} ({result['best_fixed_window']})"
        lines.append(
            f"{result['workload'][:14]:<14} {result['cost'][:12]:<12} {best:>11} {eight['tokens_per_cost']:>8.2f} "
            f"{ours['tokens_per_cost']:>6.2f} {ours['over_best_fixed']:>+7.1%} "
            f"{result['oracle']['tokens_per_cost']:>8.2f} {ours['way_to_oracle']:>10.0%} "
            f"{ours['wasted']:>6.0%} {eight['wasted']:>8.0%}"
        )
    lines.append("")
    lines.append(f"{'rule':<34} {'worst':>8} {'mean':>7} {'mixed, each cost':>28} {'of the way':>11}")
    for name, total in findings["summary"].items():
        mixed = " ".join(f"{gain:+.1%}" for gain in total["mixed_over_best_single_fixed"])
        lines.append(
            f"{name:<34} {total['worst_over_best_fixed']:>+8.1%} {total['mean_over_best_fixed']:>+7.1%} {mixed:>28} "
            f"{total['mean_way_to_oracle']:>11.0%}"
        )
    if WITH_LOOKUP in findings["summary"]:
        lines.append(
            "With look-up the text's own tokens are drafted too, which fixed windows and the oracle do without: "
            "they cost no draft step, and nothing at all where verification is free."
        )
    waste = findings["waste_at_speed_of_fixed_8"]
    lines.append(
        f"wasted drafts over those of fixed 8, at no less than its speed: {waste['mean']:.2f} in the mean, "
        f"{waste['worst']:.2f} at worst"
    )
    return "\n".join(lines)


def speed_panels(findings: dict[str, Any], cost_name: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """For [`plot_curves`]: tokens per cost over the fixed window, with the rules as level lines."""
    panels = {}
    for result in findings["results"]:
        if result["cost"] != cost_name:
            continue
        ends = (0.0, float(DEPTH))
        panel = {"fixed": [(float(w), one["tokens_per_cost"]) for w, one in enumerate(result["fixed"])]}
        for name in ("transformers dynamic confidence", OURS):
            panel[name] = [(x, result["rules"][name]["tokens_per_cost"]) for x in ends]
        panel["oracle"] = [(x, result["oracle"]["tokens_per_cost"]) for x in ends]
        panels[result["workload"]] = panel
    return panels


def calibration_panels(curves: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """For [`plot_curves`]: predicted and measured acceptance over the position, for each workload."""
    return {
        workload: {
            kind: [(one["position"] + 1.0, one[kind]) for one in curve["by_position"]]
            for kind in ("predicted", "measured")
        }
        for workload, curve in curves.items()
    }
