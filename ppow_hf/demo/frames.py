"""A run's rounds as what the page shows of each: plain words and numbers, ready to be put into fixed places.

Pure: takes trace records and text, gives dictionaries. Knows no models, no HTML and no page; the page puts every
string in as text, never as markup.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..runtime.cost_model import CostModel
from ..runtime.estimator import decayed_kl
from .running import FIXED_WINDOW, RunResult, RunRound

NO_EVIDENCE_KL = 1.0  # what the window rules hold before the first verified token
EXPLAINER_TARGET_MS = 150.0
EXPLAINER_COST_RATIO = 0.2  # 30 ms / 150 ms


def gauge_fraction(kl: float) -> float:
    """Where on the half circle, 0 (left) to 1 (right), a divergence in nats stands: kl / (1 + kl)."""
    return kl / (1 + kl)


def gauge_angle(kl: float) -> float:
    """Degrees by which the upright pointer is turned: -90 at 0 nats, 0 at 1, towards 90."""
    return round(180 * gauge_fraction(kl) - 90, 1)


def visible_token(text: str) -> str:
    """A token as a cell shows it: line ends, tabs and pure space are made visible."""
    if text and not text.strip(" "):
        return "␣" if len(text) == 1 else f"␣×{len(text)}"
    shown = text.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")
    if "⏎" in shown and not shown.replace("⏎", "").strip(" "):
        spaces = shown.count(" ")
        shown = shown.replace(" ", "") + (f" ␣×{spaces}" if spaces else "")
    return "".join(c if c.isprintable() else "�" for c in shown) or "∅"


def short_probability(value: float) -> str:
    """0.934 -> ".93"; never 1.00 for what is not certain."""
    return f"{min(max(value, 0.0), 0.99):.2f}"[1:]


class TextPieces:
    """New tokens turned to text bit by bit; a character that is not complete yet waits for the next token."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self.decode = decode
        self.ids: list[int] = []
        self.given = ""

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` add; of a character that is never completed, nothing."""
        self.ids += ids
        text = self.decode(self.ids)
        while text.endswith("�"):
            text = text[:-1]
        if not text.startswith(self.given):  # a tokenizer that rewrites what stands before: begin after the same part
            self.given = self.given[: _common_length(text, self.given)]
        new, self.given = text[len(self.given) :], max(self.given, text, key=len)
        return new


def _common_length(one: str, other: str) -> int:
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length


@dataclass
class Totals:
    """Running sums over rounds, from which every counter is computed.

    Args:
        rounds (`int`): target forwards, the prompt's included.
        tokens (`int`): tokens of text.
        drafting_rounds, drafted, kept (`int`): rounds that drafted, their draft tokens, those that were kept.
        fixed_rounds, fixed_drafted, fixed_kept (`int`): the same of the fixed window.
        seconds (`float`): time of the speculative decoding.
    """

    rounds: int = 0
    tokens: int = 0
    drafting_rounds: int = 0
    drafted: int = 0
    kept: int = 0
    fixed_rounds: int = 0
    fixed_drafted: int = 0
    fixed_kept: int = 0
    seconds: float = 0.0

    def add(self, round_: RunRound) -> None:
        self.rounds += 1
        self.tokens += len(round_.committed)
        self.seconds = round_.seconds
        if round_.trace.window:
            self.drafting_rounds += 1
            self.drafted += round_.trace.window
            self.kept += round_.kept
        if round_.shadow is not None and round_.shadow.draft_ids:
            self.fixed_rounds += 1
            self.fixed_drafted += len(round_.shadow.draft_ids)
            self.fixed_kept += round_.shadow.accepted

    @property
    def acceptance_length(self) -> float | None:
        """Mean of kept + 1 over the rounds that drafted; `None` while there is none."""
        return (self.kept + self.drafting_rounds) / self.drafting_rounds if self.drafting_rounds else None

    @property
    def wasted(self) -> float | None:
        return 1 - self.kept / self.drafted if self.drafted else None

    @property
    def fixed_wasted(self) -> float | None:
        return 1 - self.fixed_kept / self.fixed_drafted if self.fixed_drafted else None

    def counters(self) -> dict[str, str]:
        """The numbers of the cards, as text."""
        per_second = self.tokens / self.seconds if self.seconds else None
        return {
            "rounds": str(self.rounds),
            "rounds_note": f"target passes for {self.tokens} token{'' if self.tokens == 1 else 's'}",
            "tau": _number(self.acceptance_length, ".2f"),
            "wasted": _number(self.wasted, ".0%"),
            "wasted_bar": f"{100 * (self.wasted or 0):.1f}",
            "fixed": _number(self.fixed_wasted, ".0%"),
            "fixed_bar": f"{100 * (self.fixed_wasted or 0):.1f}",
            "speed": _number(per_second, ".1f" if per_second and per_second < 100 else ".0f"),
        }


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, form)


@dataclass
class FrameMaker:
    """Makes a round's frame, one after the other.

    Args:
        token_text (`Callable`): a token's id -> its text, for the cells.
        decode (`Callable`): token ids -> text, for the answer.
    """

    token_text: Callable[[int], str]
    decode: Callable[[list[int]], str]
    totals: Totals = field(default_factory=Totals)
    kl: float = NO_EVIDENCE_KL
    outside: float | None = None
    last_window: int | None = None

    def __post_init__(self) -> None:
        self.pieces = TextPieces(self.decode)

    def frame(self, round_: RunRound) -> dict[str, Any]:
        """What the page shows of `round_`, the rounds before it having been given already."""
        trace, kept = round_.trace, round_.kept
        self.totals.add(round_)
        self.kl = decayed_kl(self.kl, trace.kl)
        for mass in trace.outside:
            self.outside = mass if self.outside is None else 0.7 * self.outside + 0.3 * mass
        estimates = trace.acceptance_probabilities
        frame = {
            "n": self.totals.rounds,
            "kl": round(self.kl, 4),
            "angle": gauge_angle(self.kl),
            "outside": f"outside the draft vocabulary: {self.outside:.1%}" if self.outside else "",
            "p": f"{estimates[0]:.2f}" if estimates else "",
            "window": trace.window,
            "kept": kept,
            "head": self._headline(round_),
            "move": self._move(trace.window, round_),
            "cells": self._cells(round_),
            **self._fixed_row(round_),
            "text": [self.pieces.push(round_.committed[:kept]), self.pieces.push(round_.committed[kept:])],
            "counters": self.totals.counters(),
        }
        if self.totals.rounds > 1:
            self.last_window = trace.window
        return frame

    def _headline(self, round_: RunRound) -> str:
        own = len(round_.committed) - round_.kept
        target = f"{own} from the target" if own else "the text ends within it"
        if self.totals.rounds == 1:
            return "The target reads the prompt and gives the first token"
        if not round_.trace.window:
            return f"Adaptive window: nothing drafted, {target}"
        return f"Adaptive window: {round_.trace.window} drafted, {round_.kept} kept, {target}"

    def _move(self, window: int, round_: RunRound) -> str:
        before = self.last_window
        if self.totals.rounds == 1:
            return "no evidence yet"
        if window == 0 and (round_.shadow is None or not round_.shadow.draft_ids):
            return "no room is left for a draft"
        if window == 0:
            return "– rests: drafting would cost more than it brings"
        if before is None or before == window:
            return f"→ window of {window}"
        return f"↗ stretches {before} → {window}" if window > before else f"↘ pulls back {before} → {window}"

    def _cells(self, round_: RunRound) -> list[list[str]]:
        """Text, kind, note and spoken label of each cell."""
        trace, kept = round_.trace, round_.kept
        cells = []
        for place, token in enumerate(trace.draft_ids[: trace.window]):
            estimate = trace.acceptance_probabilities[place : place + 1]
            p = f" {short_probability(estimate[0])}" if estimate else ""
            text = visible_token(self.token_text(token))
            if place < kept:
                cells.append([text, "kept", f"✓{p}", f"{text}: kept"])
            elif place == kept and len(round_.committed) > kept:
                cells.append([text, "rejected", f"✗{p}", f"{text}: rejected"])
            else:
                cells.append([text, "unread", "unused", f"{text}: drafted but not reached"])
        for token in round_.committed[kept:]:
            text = visible_token(self.token_text(token))
            cells.append([text, "target", "◆ target", f"{text}: the target's own token"])
        return cells

    def _fixed_row(self, round_: RunRound) -> dict[str, Any]:
        shadow = round_.shadow
        if shadow is None or not shadow.draft_ids:
            head = f"Fixed window of {FIXED_WINDOW}: nothing to draft here"
            return {"fixed": [], "fixed_head": head, "fixed_note": ""}
        cells = []
        for place, token in enumerate(shadow.draft_ids):
            text = visible_token(self.token_text(token))
            kind = "kept" if place < shadow.accepted else "rejected" if place == shadow.accepted else "unread"
            said = {"kept": "kept", "rejected": "rejected", "unread": "unused"}[kind]
            cells.append([text, kind, "", f"{text}: {said}"])
        drafted = len(shadow.draft_ids)
        wasted, so_far = drafted - shadow.accepted, self.totals.fixed_drafted - self.totals.fixed_kept
        return {
            "fixed": cells,
            "fixed_head": f"Fixed window of {FIXED_WINDOW}, same prefix: {drafted} drafted, {shadow.accepted} kept",
            "fixed_note": f"{wasted} wasted here, {so_far} so far",
        }


def outcome(result: RunResult, greedy: bool) -> dict[str, str]:
    """The two cards that compare with plain generation, at the end of a run."""
    speed = result.tokens_per_second
    cards = {"speed": _number(speed, ".1f" if speed < 100 else ".0f"), "ratio": "–", "same": "–"}
    if result.ratio is None:
        cards["ratio_note"] = cards["same_note"] = "no time was left for plain generate"
        return cards
    cards["ratio"] = f"{result.ratio:.2f}×"
    cards["ratio_note"] = f"plain generate: {result.plain_tokens_per_second:.1f} tokens/s, same prompt, same machine"
    if not greedy:
        cards["same"], cards["same_note"] = "sampled", "same distribution as plain generate, other random numbers"
    elif result.identical:
        cards["same"] = "identical"
        cards["same_note"] = "to plain generate, token by token"
        if result.stopped or not result.plain_finished:
            cards["same_note"] = "to plain generate as far as both got in the time limit"
    else:
        cards["same"], cards["same_note"] = "different", "from plain generate: a near-tie in this number format"
    return cards


# -- the explainer's sum


@dataclass(frozen=True)
class CostSum:
    """One line of the explainer's sum: a round of `window` drafts of which `accepted` are kept, in milliseconds."""

    name: str
    window: float
    accepted: float
    target_ms: float
    draft_ms: float

    @property
    def per_token_ms(self) -> float:
        model = CostModel(self.draft_ms / self.target_ms)
        return model.cost_per_accepted(self.window, self.accepted) * self.target_ms

    @property
    def per_text_token_ms(self) -> float:
        """The same round over all the text it gives, the target's own token counted."""
        return CostModel(self.draft_ms / self.target_ms).round_cost(self.window) * self.target_ms / (self.accepted + 1)

    @property
    def formula(self) -> str:
        return (
            f"({self.draft_ms:.0f} × {self.window:.3g} + {self.target_ms:.0f}) / {self.accepted:.3g}"
            if self.accepted > 0
            else "no draft kept"
        )

    @property
    def result(self) -> str:
        return f"{self.per_token_ms:.0f} ms" if math.isfinite(self.per_token_ms) else "∞"


def cost_sums(cost_ratio: float, totals: Totals | None = None) -> list[CostSum]:
    """The explainer's two windows, and this run's two rows where there are any, at a cost ratio.

    (T_draft x window + T_target) / accepted, with T_target = 150 ms and T_draft = cost_ratio x 150 ms.
    """
    target, draft = EXPLAINER_TARGET_MS, cost_ratio * EXPLAINER_TARGET_MS
    sums = [
        CostSum("Explainer, fixed 8", 8, 3, target, draft),
        CostSum("Explainer, adaptive", 6.5, 6.5, target, draft),
    ]
    if totals is not None and totals.fixed_rounds:
        rounds = totals.fixed_rounds
        sums.append(
            CostSum("This run, fixed 8", totals.fixed_drafted / rounds, totals.fixed_kept / rounds, target, draft)
        )
    if totals is not None and totals.drafting_rounds:
        rounds = totals.drafting_rounds
        sums.append(CostSum("This run, adaptive", totals.drafted / rounds, totals.kept / rounds, target, draft))
    return sums
