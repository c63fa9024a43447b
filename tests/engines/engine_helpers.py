"""Our side of a comparison with an engine, and the comparison of what both accepted."""

import os
from dataclasses import dataclass

import pytest

from ppow_hf.measure.evaluation import decode

PROMPTS = int(os.environ.get("PPOW_ENGINE_PROMPTS", "50"))
NEW_TOKENS = 64
WINDOW = 5


@dataclass
class OurRun:
    outputs: list[list[int]]
    drafts: int
    accepted_per_position: list[int]

    @property
    def acceptance_length(self) -> float:
        return 1 + sum(self.accepted_per_position) / self.drafts


def run_ours(target, drafter, prompts, window: int = WINDOW, new_tokens: int = NEW_TOKENS) -> OurRun:
    """Our own decoding with a fixed window, counted as an engine counts.

    An engine drafts whole windows up to the end and cuts the text afterwards, we draft no further than there is room.
    So ours runs on by a window, and the rounds count that began before the end.
    """
    outputs, traces = decode(target, drafter, prompts, new_tokens + window + 1, window="fixed", max_window=window)
    drafts, kept = 0, [0] * window
    for trace in traces:
        committed = trace.rounds[0].accepted + 1  # by the forward over the prompt
        for r in trace.rounds[1:]:
            if committed >= new_tokens:
                break
            assert r.window == window
            drafts += 1
            for position in range(r.accepted):
                kept[position] += 1
            committed += r.accepted + 1
    return OurRun([output[:new_tokens] for output in outputs], drafts, kept)


def assert_same_acceptance(engine, ours: OurRun) -> None:
    """Accepted tokens per position as ours, and enough of them that the comparison says something."""
    counts = f"vLLM {engine.drafts} {engine.accepted_per_position}, ours {ours.drafts} {ours.accepted_per_position}"
    print(f"acceptance length: vLLM {engine.acceptance_length:.4f}, ours {ours.acceptance_length:.4f}; {counts}")
    assert sum(ours.accepted_per_position) >= len(ours.outputs), counts
    assert engine.acceptance_length == pytest.approx(ours.acceptance_length, rel=0.01), counts
    assert engine.drafts == pytest.approx(ours.drafts, rel=0.01), counts
    for theirs, own in zip(engine.accepted_per_position, ours.accepted_per_position, strict=True):
        assert abs(theirs - own) <= max(2, 0.01 * ours.drafts), counts
