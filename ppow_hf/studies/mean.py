"""What several comparisons say together: each recipe's mean gain over their workloads, with intervals.

Knows lines of results; loads no model.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy

from .configuration import BUDGET_UNITS
from .report import RESAMPLES, WANTED, Report, gain_samples, markdown, metric_title, value, values_of


def mean_gain(pairs: Sequence[numpy.ndarray], against: Sequence[numpy.ndarray]) -> tuple[float, float, float]:
    """Mean over comparisons of the relative gain of `pairs` over `against`, and its 95% interval.

    Each comparison weighs the same; its prompts and seeds are drawn by themselves, see [`paired_gain`].
    """
    both = list(zip(pairs, against, strict=True))
    drawn = [gain_samples(*part, RESAMPLES, number) for number, part in enumerate(both)]
    low, high = numpy.percentile(numpy.mean(drawn, axis=0), [2.5, 97.5])
    return float(numpy.mean([value(own) / value(other) - 1 for own, other in both])), float(low), float(high)


def mean_report(folders: Sequence[str | Path]) -> str:
    """For each budget that all comparisons have, a table of mean gains over each one's reference recipe, and over its
    best baseline, in Markdown.

    Compared are the recipes that all `folders` have tested. Raises `ValueError` where there are none beside the
    reference, or for a folder without results of the test split.
    """
    reports = {Path(folder).name: Report(Path(folder)) for folder in folders}
    if len(reports) < len(folders):
        raise ValueError(f"--mean-of: {[Path(f).name for f in folders]} name a folder twice; give each its own name.")
    untested = [name for name, report in reports.items() if report.split != "test"]
    if untested:
        raise ValueError(f"--mean-of: {untested} have no results of the test split; run these comparisons first.")
    parts = [f"# Mean gains over {len(reports)} comparisons\n"]
    for budget in BUDGET_UNITS:
        parts += _section(reports, budget)
    if len(parts) == 1:
        raise ValueError(
            f"--mean-of: {list(reports)} share no recipe beside the reference under the same kind of budget."
        )
    return "\n".join(parts)


def _section(reports: dict[str, Report], budget: str) -> list[str]:
    runs = {name: report.runs(budget) for name, report in reports.items()}
    references = {name: report.config["reference"] for name, report in reports.items()}
    if any(references[name] not in own for name, own in runs.items()):
        return []
    first = next(iter(reports.values()))
    recipes = [
        recipe for recipe in next(iter(runs.values()))
        if all(recipe in own for own in runs.values()) and set(references.values()) != {recipe}
    ]  # fmt: skip
    metrics = [metric for metric in first.headline() if all(metric in other.metrics for other in reports.values())]
    if not recipes or not metrics:
        return []
    best = {
        name: {metric: report.best_baseline(budget, metric) or references[name] for metric in metrics}
        for name, report in reports.items()
    }
    rows = []
    for recipe in recipes:
        cells = [recipe]
        for metric in metrics:
            own = [values_of(runs[name][recipe], metric) for name in reports]
            for rivals in (references, {name: best[name][metric] for name in reports}):
                gain, low, high = mean_gain(own, [values_of(runs[name][rivals[name]], metric) for name in reports])
                cells.append(f"{gain:+.1%} ({low:+.1%} to {high:+.1%})")
        rows.append(cells)
    header = ["recipe"]
    for metric in metrics:
        header += [f"{metric_title(metric)}: over the reference", "over the best baseline"]
    differing = [recipe for recipe in (*recipes, *set(references.values())) if _differs(reports, recipe)]
    notes = [f"\nUnder one name, but with other settings in some of them: {', '.join(sorted(differing))}."]
    return [
        f"## Equal {BUDGET_UNITS[budget]}\n",
        *(
            f"- {name}: workload {report.begin[0]['workload']}, target `{report.begin[0]['target']}`, "
            f"{report.config['architecture']} drafter, {report.config['budgets'][budget]:,} {BUDGET_UNITS[budget]} "
            f"a run; reference `{references[name]}`; best baselines on validation: "
            + ", ".join(f"`{best[name][metric]}` ({metric_title(metric)})" for metric in metrics)
            for name, report in reports.items()
        ),
        *(notes if differing else []),
        "\nIn brackets the 95% interval (paired bootstrap over prompts and seeds, each comparison by itself, all of "
        f"the same weight). Wanted: {WANTED['baseline']:+.0%} over the best baseline, {WANTED['reference']:+.0%} over "
        "the reference.\n",
        markdown(header, rows) + "\n",
    ]


def _differs(reports: dict[str, Report], recipe: str) -> bool:
    """Whether a recipe's settings, its rates aside, are not the same in all the comparisons that have it."""
    found = []
    for report in reports.values():
        own = report.config["recipes"].get(recipe)
        if own is not None:
            found.append({**report.config["training"], **own, "learning_rates": None})
    return any(settings != found[0] for settings in found)
