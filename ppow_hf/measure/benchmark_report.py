"""How a benchmark is shown and kept: the table, the verdict, the JSON and the picture.

Knows the result's dictionary and traces; runs nothing.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..data.files import write_whole
from ..runtime.trace import GenerationTrace
from .plots import save_figure


def format_table(result: dict[str, Any]) -> str:
    """The rows of a benchmark as text columns of at most 100 characters."""
    headings = (
        ("", "method"),
        ("tokens", "per second"),
        ("ratio to", "plain"),
        ("acceptance", "length"),
        ("tokens per", "forward"),
        ("wasted", "drafts"),
        ("outputs", "identical"),
    )
    cells = [[_shortened(row["name"], 34), *_row_cells(row, result["prompts"])] for row in result["rows"]]
    widths = [
        max(len(text) for text in (*heading, *(line[column] for line in cells)))
        for column, heading in enumerate(headings)
    ]

    def line(texts: Iterable[str]) -> str:
        first, *others = (
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(texts, widths, strict=True))
        )
        return " ".join([first, *others]).rstrip()

    rule = "-" * (sum(widths) + len(widths) - 1)
    return "\n".join([line(top for top, _ in headings), line(name for _, name in headings), rule, *map(line, cells)])


def _row_cells(row: dict[str, Any], prompts: int) -> list[str]:
    drafts = row["drafted"] > 0
    return [
        f"{row['tokens_per_second']:.1f}",
        f"{row['ratio_to_plain']:.2f}x",
        f"{row['acceptance_length']:.2f}",
        f"{row['tokens_per_target_forward']:.2f}",
        f"{row['wasted']:.0%}" if drafts else "-",
        _identical_cell(row, prompts),
    ]


def _identical_cell(row: dict[str, Any], prompts: int) -> str:
    if row["identical_to_plain"] is None:
        return "sampled"
    return "yes" if row["identical_to_plain"] else f"no ({row['different_prompts']}/{prompts})"


def _shortened(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"


def verdict(result: dict[str, Any]) -> str:
    """One sentence: whether speculation with our drafter paid on this run, and how it compares with the best other.

    Undecided where the 95% interval of the ratio to plain holds 1.
    """
    plain = next(row for row in result["rows"] if row["name"] == "plain")
    ours = [row for row in result["rows"] if row["name"].startswith("ppow_")]
    if not ours:
        return "No row of ppow_hf was run, so this run does not say whether its speculation pays."
    others = [row for row in result["rows"] if row not in ours]
    best = max(ours, key=lambda row: row["tokens_per_second"])
    rival = max(others, key=lambda row: row["tokens_per_second"])
    ratio, interval = best["ratio_to_plain"], best.get("ratio_interval")
    spread = f" (95% interval {interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    if interval and interval[0] <= 1 <= interval[1]:
        opening = "Whether speculation paid is undecided on this run"
    elif ratio > 1:
        opening = "Speculation paid on this run"
    else:
        opening = "Speculation did not pay on this run"
    sentence = f"{opening}: {best['name']} ran at {ratio:.2f} times the speed of plain generation{spread}"
    if rival is not plain:
        gain = best["tokens_per_second"] / rival["tokens_per_second"] - 1
        direction = "faster" if gain >= 0 else "slower"
        sentence += (
            f", {abs(gain):.0%} {direction} than the best of the others, {rival['name']} "
            f"({rival['ratio_to_plain']:.2f} times)"
        )
    elif len(others) > 1:
        sentence += ", and none of the others was faster than plain"
    if result.get("temperature", 0) > 0:
        return f"{sentence}; texts were sampled at temperature {result['temperature']:g}."
    different = [row["name"] for row in result["rows"] if not row["identical_to_plain"]]
    if different:
        return f"{sentence}; but outputs were not identical to plain in {', '.join(different)}."
    return f"{sentence}; all outputs were identical to plain."


def write_benchmark(result: dict[str, Any], path: str | Path) -> Path:
    """Write `result` as JSON to `path`, whole or not at all."""
    return write_whole(path, json.dumps(result, indent=2, allow_nan=False) + "\n")


def plot_windows(traces: Sequence[GenerationTrace], path: str | Path, max_rounds: int = 150) -> Path:
    """Draw window and accepted tokens of each round, and the divergence of the verified positions below, as a PNG.

    Args:
        traces (`list[GenerationTrace]`): one per prompt, drawn one after the other.
        path (`str` or `Path`): the PNG.
        max_rounds (`int`, *optional*, defaults to `150`):
            Prompts are drawn as long as they stay within so many rounds; the first one always is.

    Raises:
        `ValueError`: if there is no round to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown: list[GenerationTrace] = []
    for trace in traces:
        if shown and sum(len(one.rounds) for one in shown) + len(trace.rounds) > max_rounds:
            break
        shown.append(trace)
    rounds = [one_round for trace in shown for one_round in trace.rounds]
    if not rounds:
        raise ValueError(
            "traces: there is no round in them to draw; pass the traces of calls that generated something."
        )
    numbers = range(1, len(rounds) + 1)
    figure, (windows, divergence) = pyplot.subplots(
        2, 1, figsize=(10, 5), sharex=True, layout="constrained", gridspec_kw={"height_ratios": [2, 1]}
    )
    windows.bar(numbers, [r.window for r in rounds], width=0.85, color="#c9d6ea", label="window W (drafted tokens)")
    windows.bar(numbers, [r.accepted for r in rounds], width=0.85, color="#2f5d9b", label="accepted k")
    longest = max(max(r.window for r in rounds), 1)
    windows.set_ylim(0, longest * 1.3)  # room for the legend above the bars
    windows.yaxis.get_major_locator().set_params(integer=True)
    windows.set_ylabel("tokens")
    windows.legend(frameon=False, fontsize=9, ncols=2, loc="upper right")
    with_kl = [(number, sum(r.kl) / len(r.kl)) for number, r in zip(numbers, rounds, strict=True) if r.kl]
    if with_kl:
        divergence.plot(
            *zip(*with_kl, strict=True),
            color="#b5482e",
            linewidth=1.2,
            marker=".",
            label="KL(P||Q), mean of the round's verified positions",
        )
        divergence.set_ylim(0, max(1.4 * max(value for _, value in with_kl), 1e-3))
        divergence.legend(frameon=False, fontsize=9, loc="upper right")
    divergence.set_ylabel("nats")
    divergence.set_xlabel("round")
    start = 0
    for number, trace in enumerate(shown):
        if number:
            for axis in (windows, divergence):
                axis.axvline(start + 0.5, color="0.6", linewidth=0.8, linestyle=":")
        start += len(trace.rounds)
    for axis in (windows, divergence):
        axis.grid(alpha=0.25, axis="y")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    together = GenerationTrace(rounds=rounds)
    which = "one prompt" if len(traces) == 1 else f"{len(shown)} of {len(traces)} prompts, one after the other"
    figure.suptitle(
        f"window of each round, {which}: acceptance length {together.acceptance_length:.2f}, "
        f"wasted drafts {together.wasted:.0%}",
        fontsize=11,
    )
    return save_figure(figure, path)
