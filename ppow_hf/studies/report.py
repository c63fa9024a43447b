"""What a comparison found, from its results file alone: tables with bootstrap intervals, curves, a card's section.

Knows lines of results; loads no model, so that a report can be made again anywhere.
"""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy

from ..measure.plots import plot_curves
from .configuration import BUDGET_UNITS, RESULTS, START, START_UNITS, read_results
from .evaluation import gain_over_start

LOOPING = 0.2  # share of repeated 8-grams from which on a text counts as looping
RESAMPLES = 2000
WANTED = {"baseline": 0.10, "reference": 0.20}  # of the project: gains over the best baseline, and over CST

# The paper's ablation (arXiv 2605.14978, Llama-3.1-8B, MT-Bench / GSM8K) by the names of the shipped recipes.
PAPER_ABLATION = {
    "ppow_literal": "5.47 / 6.50",
    "ppow_literal_no_proximity": "5.05 / 6.41",
    "ppow_literal_no_adaw": "4.82 / 6.35",
    "ppow_literal_neither": "4.38 / 6.05",
}
PAPER_GAIN = (
    "The paper's gain of PPOW over its supervised start (EAGLE-3, K = 10, trees at evaluation, T = 0): 6.09 to 6.40 "
    "(Llama-3.1-8B), 5.94 to 6.29 (Llama-3.3-70B), 6.16 to 6.52 (Qwen3-8B), 5.99 to 6.44 (Qwen3-32B)."
)

Line = dict[str, Any]


def values_of(lines: Sequence[Line], metric: str, without_looping: bool = False) -> numpy.ndarray:
    """Pairs of one recipe's runs `[seeds, prompts, 2]`; `without_looping` leaves out prompts with looping texts."""
    pairs = numpy.asarray([line["per_prompt"][metric] for line in lines], dtype=float)
    if without_looping:
        pairs = pairs[:, numpy.asarray(lines[0]["loops"])[: pairs.shape[1]] <= LOOPING]
    return pairs


def value(pairs: numpy.ndarray) -> float:
    """The metric: over all seeds and prompts, the sum of the first numbers over that of the second ones."""
    below = pairs[..., 1].sum()
    return float(pairs[..., 0].sum() / below) if below else 1.0


def paired_gain(
    pairs: numpy.ndarray, against: numpy.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """Relative gain of `pairs` `[seeds, prompts, 2]` over `against`, and its 95% interval (paired bootstrap)."""
    if pairs.shape[1] == 0:
        return 0.0, 0.0, 0.0
    low, high = numpy.percentile(gain_samples(pairs, against, resamples, seed), [2.5, 97.5])
    return value(pairs) / value(against) - 1, float(low), float(high)


def gain_samples(
    pairs: numpy.ndarray, against: numpy.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> numpy.ndarray:
    """The bootstrap's relative gains, `[resamples]`.

    Prompts are drawn for both alike; seeds of each by themselves, since seeds of two recipes share nothing but order.
    """
    random = numpy.random.default_rng(seed)
    prompts = pairs.shape[1]
    gains = []
    for _ in range(resamples):
        drawn = random.integers(prompts, size=prompts)
        parts = [part[random.integers(len(part), size=len(part))][:, drawn] for part in (pairs, against)]
        gains.append(value(parts[0]) / value(parts[1]) - 1)
    return numpy.asarray(gains)


class Report:
    """Tables, curves and the card's section of one comparison.

    Args:
        folder (`Path`): the comparison's folder.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.config = json.loads((self.folder / "config.json").read_text())
        self.lines = read_results(self.folder / RESULTS)
        self.split = "test" if any(line["split"] == "test" for line in self.lines) else "validation"
        self.begin = [line for line in self.lines if line["recipe"] == "start" and line["split"] == self.split]
        if not self.begin:
            raise ValueError(f"--output-dir: {self.folder.name!r} holds no results yet; run the comparison first.")
        self.metrics = list(self.begin[0]["per_prompt"])

    @cached_property
    def start(self) -> dict[str, Any]:
        """The start's curve, its gain at the end, and the target's entropy."""
        places = [path for path in (self.folder / START, self.folder / "start" / START) if path.is_file()]
        if not places:
            raise ValueError(f"--output-dir: {self.folder.name!r} has no {START}, which its report begins with.")
        return json.loads(places[0].read_text())

    def runs(self, budget: str) -> dict[str, list[Line]]:
        """The chosen runs of each recipe under one budget, a line each seed.

        They are those of the rate that the first seed chooses on validation, also where the test split was read for
        another one before more rates were tried.
        """
        of_recipe: dict[str, list[Line]] = {}
        for line in self._under(budget):
            of_recipe.setdefault(line["recipe"], []).append(line)
        found = {}
        for recipe, lines in of_recipe.items():
            ours = [line for line in lines if line["split"] == self.split]
            rates = {line["learning_rate"] for line in ours}
            first = [x for x in lines if x["split"] == "validation" and x["seed"] == self.config["seeds"][0]]
            tried = [line for line in first if line["learning_rate"] in rates]
            if len(rates) > 1 and tried:
                chosen = max(tried, key=self._gain)["learning_rate"]
                ours = [line for line in ours if line["learning_rate"] == chosen]
            if ours:
                found[recipe] = ours
        return found

    def _under(self, budget: str, split: str | None = None) -> list[Line]:
        """The lines of runs under one budget, those of one split where it is given."""
        runs = [line for line in self.lines if line["budget"] is not None and line["budget"]["kind"] == budget]
        return [line for line in runs if split in (None, line["split"])]

    def _gain(self, line: Line) -> float:
        start = next(x for x in self.lines if x["recipe"] == "start" and x["split"] == "validation")
        return gain_over_start(line, start, self.config["select_by"])

    def best_baseline(self, budget: str, metric: str) -> str | None:
        """The baseline that was best on validation; the test split has no part in the choice."""
        rates = {recipe: lines[0]["learning_rate"] for recipe, lines in self.runs(budget).items()}
        scores: dict[str, list[float]] = {}
        for line in self._under(budget, "validation"):
            recipe = line["recipe"]
            if recipe in self.config["baselines"] and line["learning_rate"] == rates.get(recipe):
                scores.setdefault(recipe, []).append(line["metrics"][metric])
        return max(scores, key=lambda recipe: numpy.mean(scores[recipe]), default=None)

    # -- tables

    def table(self, budget: str, metrics: Sequence[str], without_looping: bool = False) -> str:
        """A row each recipe: value, and gain over the reference with its 95% interval in brackets."""
        runs = self.runs(budget)
        reference = runs.get(self.config["reference"], self.begin)
        header = ["recipe", "learning rate", "seeds", *(metric_title(metric) for metric in metrics)]
        rows = []
        for recipe, lines in {"start": self.begin, **runs}.items():
            rate = lines[0]["learning_rate"]
            cells = [recipe, "" if rate is None else f"{rate:g}", str(len(lines)) if recipe != "start" else ""]
            for metric in metrics:
                pairs = values_of(lines, metric, without_looping)
                cell = f"{value(pairs):.3f}" if pairs.shape[1] else "no such text"
                if lines is not reference and pairs.shape[1]:
                    gain, low, high = paired_gain(pairs, values_of(reference, metric, without_looping))
                    cell += f" ({gain:+.1%}: {low:+.1%} to {high:+.1%})"
                cells.append(cell)
            rows.append(cells)
        return markdown(header, rows)

    def positions_table(self, budget: str) -> str:
        """Of the greedy chain's longest windows at T = 0, the share whose first j tokens were kept."""
        rows = []
        for recipe, lines in {"start": self.begin, **self.runs(budget)}.items():
            means = numpy.mean([line["position_acceptance"] for line in lines], axis=0)
            rows.append([recipe, *(f"{share:.3f}" for share in means)])
        return markdown(["first tokens kept", *(str(j + 1) for j in range(len(rows[0]) - 1))], rows)

    def costs_table(self, budget: str) -> str:
        """What each recipe's runs took, and what the target and the drafter are like there."""
        header = ["recipe", "target-forward tokens", "seconds", "steps", "drafter's entropy", "KL", "calibration"]
        rows = []
        training = {}
        for line in self._under(budget):
            if "training" in line:
                training[line["recipe"], line["learning_rate"], line["seed"]] = line["training"]
        for recipe, lines in {"start": self.begin, **self.runs(budget)}.items():
            spent = [training[recipe, x["learning_rate"], x["seed"]] for x in lines if x["budget"] is not None]
            means = [
                f"{numpy.mean([one[name] for one in spent]):,.0f}" if spent else ""
                for name in ("target_forward_tokens", "seconds", "steps")
            ]
            own = [
                f"{numpy.mean([x['metrics'][name] for x in lines]):.3f}"
                for name in ("entropy", "kl", "calibration_nats")
            ]
            rows.append([recipe, *means, *own])
        return markdown(header, rows)

    def paper_tables(self, budget: str) -> list[str]:
        """The literal recipe and its ablations beside the paper's numbers, which are of far larger models."""
        runs = self.runs(budget)
        named = [recipe for recipe in PAPER_ABLATION if recipe in runs]
        if not named:
            return []
        metric, rows = self.headline()[0], []
        for recipe in named:
            pairs = values_of(runs[recipe], metric)
            gain, low, high = paired_gain(pairs, values_of(self.begin, metric))
            ours = f"{value(pairs):.3f}", f"{gain:+.1%} ({low:+.1%} to {high:+.1%})"
            rows.append([recipe, *ours, PAPER_ABLATION[recipe]])
        header = ["recipe", f"here: {metric_title(metric)}", "gain over the start", "paper: MT-Bench / GSM8K"]
        return [PAPER_GAIN, markdown(header, rows)]

    def verdicts(self, budget: str) -> list[str]:
        """For the recipe that was chosen on validation: its gains over the best baseline and over the reference."""
        runs = self.runs(budget)
        others = [recipe for recipe in runs if recipe not in (*self.config["baselines"], self.config["reference"])]
        if not others:
            return []

        def score(recipe: str) -> float:
            rate = runs[recipe][0]["learning_rate"]
            lines = self._under(budget, "validation")
            own = [line for line in lines if line["recipe"] == recipe and line["learning_rate"] == rate]
            return float(numpy.mean([self._gain(line) for line in own]))

        winner = max(others, key=score)
        said = [f"Best on validation among the recipes that are no baselines: `{winner}`."]
        for metric in self.headline():
            for kind, rival in (
                ("baseline", self.best_baseline(budget, metric)), ("reference", self.config["reference"])
            ):  # fmt: skip
                if rival not in runs:
                    continue
                gain, low, high = paired_gain(values_of(runs[winner], metric), values_of(runs[rival], metric))
                wanted = WANTED[kind]
                reached = "reached" if gain >= wanted and low > 0 else "not reached"
                said.append(
                    f"{metric_title(metric)}: {gain:+.1%} over `{rival}` ({low:+.1%} to {high:+.1%}); "
                    f"wanted {wanted:+.0%}, {reached}."
                )
        return said

    def headline(self) -> list[str]:
        """The metrics of the first table: longest greedy chain, longest sampled chain, middle group."""

        def longest(prefix: str) -> list[str]:
            names = [name for name in self.metrics if name.startswith(prefix)]
            return names[-1:]

        groups = [name for name in self.metrics if name.startswith("group")]
        middle = groups[len(groups) // 2 : len(groups) // 2 + 1]
        return [*longest("chain_t0"), *longest("chain_t1"), *middle]

    # -- files

    def section(self) -> str:
        """The section of a model card: what was compared, the tables, what they say."""
        config, data = self.config, self.config["data"]
        gain = self.start["plateau_gain"]
        plateau = (
            f"({self.start['drafter'] or 'trained too briefly for a curve'}), of which it is not known whether it was "
            "at its plateau" if gain is None
            else f"that gained {gain:+.2%} over the last quarter of its training"
            + ("" if gain < 0.005 else ", so it was not at its plateau (0.5%)")
        )  # fmt: skip
        loops = self.begin[0]["loops"]
        parts = [
            "## Recipes compared",
            f"Target `{self.begin[0]['target']}`, {config['architecture']} drafter, workload "
            f"{config['workload']['name']}. All recipes start from one supervised checkpoint {plateau}. Learning "
            f"rates are chosen on {data['validation_prompts']} validation prompts by "
            f"{', '.join(config['select_by'])}; numbers are of {len(loops)} {self.split} prompts, "
            f"{data['completion_tokens']} tokens each. Acceptance "
            "lengths count the token that the target adds (k + 1), over rounds with room for a whole window; groups "
            f"and trees are measured on the first {config['slow_prompts']} prompts. In "
            f"brackets the gain over `{config['reference']}` with its 95% interval (paired bootstrap over prompts and "
            f"seeds). The target's entropy is {self.start['target_entropy']:.2f} nats per token at T = 1. Repeated "
            f"8-grams in the target's greedy texts: {numpy.mean(loops):.1%}; "
            f"{sum(share > LOOPING for share in loops)} texts loop (more than {LOOPING:.0%}).",
        ]
        for budget in config["budgets"]:
            if not self.runs(budget):
                continue
            title = f"### Equal {BUDGET_UNITS[budget]}: {config['budgets'][budget]:,}"
            parts += [title, self.table(budget, self.headline())]
            rest = [name for name in self.metrics if name not in self.headline()]
            parts += [
                *self.verdicts(budget),
                *self.paper_tables(budget),
                "More evaluations:",
                self.table(budget, rest),
            ]
            if any(share > LOOPING for share in loops) and not all(share > LOOPING for share in loops):
                greedy = [name for name in self.metrics if "_t0_" in name]
                parts += ["Without looping texts (T = 0):", self.table(budget, greedy, without_looping=True)]
            parts += ["Acceptance by position, greedy chain at T = 0:", self.positions_table(budget)]
            parts += ["What it took, and what the drafters are like:", self.costs_table(budget)]
        provenance = self.lines[-1]["provenance"]
        parts.append(
            f"Made with `{provenance['command']}`, "
            + ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
            + f", on {provenance['machine'].get('gpu') or provenance['machine'].get('processor')}."
        )
        return "\n\n".join(parts) + "\n"

    def draw(self) -> None:
        """`start.png`, and for each budget `curves-BUDGET.png` (as the paper's figure 3) and `rewards-BUDGET.png`."""
        if self.start["curve"]:
            points = [(seconds, tau) for _, seconds, tau in self.start["curve"]]
            unit = next((BUDGET_UNITS[unit] for unit in START_UNITS if unit in self.config["start"]), "seconds")
            plot_curves({"start": points}, self.folder / "start.png", title="supervised start", x_label=unit)
        for budget in self.config["budgets"]:
            trained = [
                line for line in self._under(budget)
                if "training" in line and line["seed"] == self.config["seeds"][0]
                and line["learning_rate"] == self.runs(budget).get(line["recipe"], [line])[0]["learning_rate"]
            ]  # fmt: skip
            place, begin = (0 if budget == "tokens" else 1), self.start["curve"][-1:]
            panel = {
                line["recipe"]: [(0.0, point[2]) for point in begin]
                + [(point[place], point[2]) for point in line["training"]["curve"]]
                for line in trained
            }
            if panel:
                plot_curves(
                    panel, self.folder / f"curves-{budget}.png", title="greedy chain, k + 1 (validation)",
                    x_label=BUDGET_UNITS[budget],
                )  # fmt: skip
            rewarded = [line for line in trained if any("reward/mean" in row for row in line["training"]["log"])]
            panels = [
                {line["recipe"]: [(row["step"], row[name]) for row in line["training"]["log"] if name in row]
                 for line in rewarded}
                for name in ("reward/mean", "kl", "accepted_length", "adaw")
            ]  # fmt: skip
            if rewarded:
                titles = ["reward", "KL(P||Q), nats", "rollouts: k + 1", "ADAW on"]
                plot_curves(*panels, self.folder / f"rewards-{budget}.png", panel_titles=titles)


def write_report(folder: Path) -> Path:
    """Write `report.md` and the curves from a comparison's results; returns the report's path."""
    report = Report(folder)
    path = Path(folder) / "report.md"
    path.write_text(report.section(), encoding="utf-8")
    report.draw()
    return path


def metric_title(metric: str) -> str:
    kind, temperature, rest = metric.split("_")
    names = {
        "tree": "tree",
        "chain": "chain",
        "greedy": "greedy drafts",
        "group": "group",
        "speed": "expected speed at",
    }
    of: Callable[[str], str] = {
        "k": lambda n: f"K={n}", "c": lambda n: f"C={n}", "n": lambda n: f"N={n}"
    }.get(rest[0], lambda n: f"cost ratio {rest}")  # fmt: skip
    return f"{names[kind]} {of(rest[1:])}, T={temperature[1:]}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)
