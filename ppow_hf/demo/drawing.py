"""The page's HTML and SVG: the stage's fixed skeleton, the explainer's sum, training curves, the benchmark's table.

Pure: numbers and text in, markup out, every text escaped. The skeleton has one element for each place, whatever the
run does; stage.js only changes their text, classes and lengths. Knows no models and no Gradio.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .frames import CostSum, Totals, cost_sums
from .running import FIXED_WINDOW

MAX_WINDOW = 16
Points = Sequence[tuple[float, float]]

_CARDS = (
    ("rounds", "rounds", "rounds_note", "rounds"),
    ("tau", "acceptance length", None, "kept + 1, over rounds that drafted"),
    ("wasted", "drafts wasted", None, ""),
    ("speed", "tokens/s", None, "drafting and verifying, this machine"),
    ("ratio", "speed over plain", "ratio_note", "measured when the text is done"),
    ("same", "the text", "same_note", "compared when the text is done"),
)


def stage(name: str, tab: str, label: str, who: str = "") -> str:
    """The skeleton of one run: gauge, two rows of cells, player, cards, text.

    `name` is the page's own for this stage, `tab` that of the part of the page whose stop button ends its run; `label`
    is read aloud, and `who` names the drafter above it.
    """
    title = f'<p class="pw-who">{escape(who)}</p>' if who else ""
    adaptive = "".join('<li class="pw-cell off"><b></b><i></i></li>' for _ in range(MAX_WINDOW + 1))
    fixed = "".join('<li class="pw-cell off"><b></b><i></i></li>' for _ in range(FIXED_WINDOW))
    return f"""<section class="pw-stage" data-tab="{tab}" aria-label="{escape(label)}">{title}
<div class="pw-board">
<div class="pw-gauge">{_gauge(name)}
<strong class="pw-kl">KL –</strong>
<small>nats, recent verified tokens</small>
<small class="pw-outside"></small>
<small class="pw-p">&nbsp;</small></div>
<div class="pw-rows">
<div class="pw-head"><h3 class="pw-title">Adaptive window</h3><span class="pw-where"></span></div>
<p class="pw-move">&nbsp;</p>
<ol class="pw-cells" aria-label="adaptive window">{adaptive}</ol>
<div class="pw-ghost">
<div class="pw-head"><h3 class="pw-fixed-title">Fixed window of {FIXED_WINDOW}</h3>
<span class="pw-fixed-note"></span></div>
<ol class="pw-cells" aria-label="fixed window of {FIXED_WINDOW}">{fixed}</ol>
</div>
{_player()}
</div></div>
{_cards()}
<div class="pw-text" tabindex="0" role="region" aria-label="the text, coloured by round"><span
class="pw-prompt"></span></div>
<p class="pw-legend"><span class="k1">one tint a round</span><span class="kt">the target&#39;s own token</span></p>
<p class="pw-said" role="status" aria-live="polite"></p>
</section>"""


def _gauge(name: str) -> str:
    """Half circle of radius 96 about (120, 124); ticks at 0, 1/3, 1, 3 nats and beyond (kl / (1 + kl))."""
    marks = []
    for fraction, text in ((0.0, "0"), (0.25, "⅓"), (0.5, "1"), (0.75, "3"), (1.0, "∞")):
        angle = math.pi * (1 - fraction)
        x, y = math.cos(angle), -math.sin(angle)
        marks.append(f'<path d="M{120 + 82 * x:.1f} {124 + 82 * y:.1f}L{120 + 75 * x:.1f} {124 + 75 * y:.1f}"/>')
        marks.append(f'<text x="{120 + 64 * x:.1f}" y="{124 + 64 * y + 3.5:.1f}">{text}</text>')
    arc = "M24 124A96 96 0 0 1 216 124"
    return f"""<svg viewBox="0 0 240 152" role="img" aria-label="KL gauge">
<defs><linearGradient id="{name}-scale"><stop offset="0" class="g-lo"/><stop offset=".5" class="g-mid"/>
<stop offset="1" class="g-hi"/></linearGradient></defs><path class="rim" d="{arc}"/>
<path class="arc" stroke="url(#{name}-scale)" d="{arc}"/><g class="ticks">{"".join(marks)}</g>
<g class="pw-needle" style="transform:rotate(-90deg)"><path d="M115.5 124L120 44L124.5 124Z"/></g>
<circle class="hub" cx="120" cy="124" r="7.5"/>
<text class="end" x="24" y="147">in step</text><text class="end" x="216" y="147">apart</text></svg>"""


def _player() -> str:
    buttons = (
        ("first", "|◀", "first round"),
        ("back", "◀", "one round back"),
        ("play", "▶ play", "play or pause"),
        ("step", "step ▶", "one round on"),
    )
    made = "".join(
        f'<button type="button" class="pw-{name}" aria-label="{label}" disabled>{text}</button>'
        for name, text, label in buttons
    )
    return f"""<div class="pw-player" role="group" aria-label="play the recorded rounds">
<div class="pw-buttons">{made}</div>
<div class="pw-track"><svg class="pw-time" viewBox="0 0 1 {MAX_WINDOW}" preserveAspectRatio="none" aria-hidden="true">
<rect class="cursor" x="0" y="0" width="1" height="{MAX_WINDOW}"/><path class="drafted" d=""/>
<path class="kept" d=""/></svg>
<input class="pw-seek" type="range" min="0" max="0" value="0" step="1" aria-label="round" disabled>
<small>window per round: <span class="key kept"></span>kept <span class="key drafted"></span>not kept</small>
</div></div>"""


def _cards() -> str:
    cards = []
    for name, label, note, text in _CARDS:
        if name == "wasted":
            below = (
                '<span class="pw-bars"><em>adaptive</em><s><u class="bar-a"></u></s><em class="pw-wasted-too">–</em>'
                '<em>fixed 8</em><s><u class="bar-f"></u></s><em class="pw-fixed">–</em></span>'
            )
        else:
            below = f'<span class="{"pw-" + note if note else "note"}">{escape(text)}</span>'
        cards.append(f'<div class="pw-num"><i>{escape(label)}</i><b class="pw-{name}">–</b>{below}</div>')
    return f'<div class="pw-nums">{"".join(cards)}</div>'


# -- the explainer's sum


def cost_panel(cost_ratio: float, totals: Totals | None = None) -> str:
    """The sum (T_draft x window + T_target) / accepted for the explainer's windows and this run's, as bars.

    Beside it the same round's time over accepted + 1: what a token of text costs, the target's own counted.
    """
    sums = cost_sums(cost_ratio, totals)
    while len(sums) < 4:  # the same number of elements before the first run
        name = "This run, fixed 8" if len(sums) == 2 else "This run, adaptive"
        sums.append(CostSum(name, 0, 0, sums[0].target_ms, sums[0].draft_ms))
    longest = max((s.per_token_ms for s in sums if math.isfinite(s.per_token_ms)), default=1.0)
    rows = "".join(_cost_row(s, longest) for s in sums)
    target, draft = sums[0].target_ms, sums[0].draft_ms
    return f"""<div class="pw-cost"><p>At {target:.0f} ms a target pass and <b>{draft:.0f} ms</b> a draft step, a kept
draft token costs (T<sub>draft</sub> × window + T<sub>target</sub>) / kept:</p><table><thead><tr>
<th>window</th><th class="sum">sum</th><th class="bar"></th><th class="ms">per kept draft</th>
<th class="all">per token of text</th></tr></thead>
<tbody>{rows}</tbody></table></div>"""


def _cost_row(line: CostSum, longest: float) -> str:
    finite = math.isfinite(line.per_token_ms)
    width = 100 * line.per_token_ms / longest if finite else 100
    kind = "adaptive" if "adaptive" in line.name else "fixed"
    unknown = line.window == 0
    formula, result = ("after the first run", "–") if unknown else (line.formula, line.result)
    every = "–" if unknown else f"{line.per_text_token_ms:.0f} ms"
    return (
        f'<tr class="{kind}"><th scope="row">{escape(line.name)}</th><td class="sum">{escape(formula)}</td>'
        f'<td class="bar"><u style="width:{0 if unknown else width:.1f}%"></u></td><td class="ms">{result}</td>'
        f'<td class="all">{every}</td></tr>'
    )


# -- comparison


def comparison(rows: Sequence[Mapping[str, str]]) -> str:
    """What two runs of one prompt came to, one line a drafter; values are shown as text."""
    columns = (
        ("name", "drafter"),
        ("tau", "acceptance length"),
        ("wasted", "wasted"),
        ("fixed", "wasted, fixed 8"),
        ("rounds", "rounds"),
        ("speed", "tokens/s"),
        ("ratio", "over plain"),
        ("same", "text"),
    )
    head = "".join(f'<th scope="col">{label}</th>' for _, label in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(row.get(key, '–')))}</td>" for key, _ in columns) + "</tr>" for row in rows
    )
    table = f'<table class="pw-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="pw-scroll">{table}</div>'


# -- training curves and the benchmark


def curves(log: Sequence[Mapping[str, Any]]) -> str:
    """A trainer's log as three small charts: acceptance length, divergence, rewards. Empty text without entries."""
    panels = []
    for title, names in (
        ("acceptance length, held-out prompts", ("eval_acceptance_length",)),
        ("divergence KL(P‖Q), nats", ("kl",)),
        ("mean reward of a window", ("reward/mean",)),
    ):
        series: dict[str, list[tuple[float, float]]] = {}
        for entry in log:
            for name in names:
                if isinstance(entry.get(name), int | float) and math.isfinite(entry[name]):
                    stage_name = "PPOW" if entry.get("objective") == "ppow" else "supervised"
                    label = stage_name if len(names) == 1 else name.removeprefix("reward/")
                    series.setdefault(label, []).append((float(entry["step"]), float(entry[name])))
        if series:
            panels.append(line_chart(title, series))
    return f'<div class="pw-charts">{"".join(panels)}</div>' if panels else ""


def line_chart(title: str, series: Mapping[str, Points], width: int = 360, height: int = 210) -> str:
    """Lines over training steps as an SVG; told apart by dash and by a label at their end, not by colour alone."""
    points = [point for line in series.values() for point in line]
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(y for _, y in points), max(y for _, y in points)
    margin = 0.08 * (y_high - y_low) or 0.5
    y_low, y_high = max(y_low - margin, 0.0) if y_low >= 0 else y_low - margin, y_high + margin
    left, right, top, bottom = 44, width - 12, 34, height - 30

    def at(point: tuple[float, float]) -> tuple[float, float]:
        x = left + (point[0] - x_low) / ((x_high - x_low) or 1) * (right - left)
        return x, bottom - (point[1] - y_low) / (y_high - y_low) * (bottom - top)

    parts = []
    for step in range(4):
        value = y_low + (y_high - y_low) * step / 3
        y = at((x_low, value))[1]
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(f'<text class="y" x="{left - 6}" y="{y + 3.5:.1f}">{value:.3g}</text>')
    for value, anchor in ((x_low, "start"), (x_high, "end")):
        x = at((value, y_low))[0]
        parts.append(f'<text x="{x:.1f}" y="{height - 12}" text-anchor="{anchor}">step {value:.0f}</text>')
    legend_x = left
    for number, (name, line) in enumerate(series.items(), start=int(next(iter(series)) == "PPOW")):
        places = [at(point) for point in sorted(line)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="line l{number % 3}" d="{path}"/>')
        if len(places) < 30:
            parts += [f'<circle class="dot l{number % 3}" cx="{x:.1f}" cy="{y:.1f}" r="2.8"/>' for x, y in places]
        parts.append(f'<path class="line l{number % 3}" d="M{legend_x} 26h20"/>')
        parts.append(f'<text x="{legend_x + 25}" y="29.5">{escape(name)}</text>')
        legend_x += 44 + 7 * len(name)
    text = ", ".join(f"{name}: {sorted(line)[0][1]:.3g} to {sorted(line)[-1][1]:.3g}" for name, line in series.items())
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}; {escape(text)}">'
        f'<text class="title" x="0" y="12">{escape(title)}</text>{"".join(parts)}</svg></figure>'
    )


def benchmark(result: Mapping[str, Any]) -> str:
    """A stored result of `ppow bench` or `ppow quickstart` as a table with bars."""
    rows = result["rows"]
    fastest = max(row["tokens_per_second"] for row in rows)
    lines = []
    for row in rows:
        interval = row.get("ratio_interval")
        spread = f" ({interval[0]:.2f}–{interval[1]:.2f})" if interval else ""
        wasted = f"{row['wasted']:.0%}" if row["drafted"] else "–"
        same = "yes" if row["identical_to_plain"] else f"{row['different_prompts']} prompts differ"
        lines.append(
            f'<tr class="{"own" if str(row["name"]).startswith("ppow") else ""}">'
            f'<th scope="row">{escape(str(row["name"]).replace("_", " "))}</th>'
            f'<td class="bar"><u style="width:{100 * row["tokens_per_second"] / fastest:.1f}%"></u></td>'
            f"<td>{row['tokens_per_second']:.1f}</td><td>{row['ratio_to_plain']:.2f}×{spread}</td>"
            f"<td>{row['acceptance_length']:.2f}</td><td>{wasted}</td><td>{same}</td></tr>"
        )
    machine, versions = result["machine"], result["versions"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores"
    about = (
        f"{result['command']}: {result['prompts']} prompts, {result['max_new_tokens']} tokens each, "
        f"{result['dtype']}, on {where}; torch {versions['torch']}, transformers {versions['transformers']}; "
        f"cost ratio {result['cost_ratio']:.3f}"
    )
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("way of generating", "", "tokens/s", "over plain", "acceptance length", "wasted", "identical")
    )
    return (
        f'<div class="pw-scroll"><table class="pw-table pw-bench"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div><p class='pw-soft'>{escape(about)}</p>"
    )
