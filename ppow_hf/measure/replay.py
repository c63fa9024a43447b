"""Window rules replayed on a table of drafts, and the least cost that any rule could have.

Knows tables, rules and costs; runs no model.
"""

import itertools
from collections.abc import Mapping, Sequence

from ..runtime.cost_model import CostModel
from ..runtime.draft_window import Window, draft_windows, learn_from_verdict
from ..runtime.trace import GenerationTrace, RoundTrace
from ..runtime.windowing import KLAdaptiveWindow, WindowRule
from .draft_table import DraftTable


class RecordedDistributions:
    """What a table knows of the distributions after one of its prefixes, for [`draft_windows`]."""

    def __init__(self, table: DraftTable, committed: int, looks: bool):
        self.table, self.row, self.looks, self.position = table, committed - 1, looks, 0

    def look(self, drafts: Sequence[list[int]]) -> Sequence[Sequence[float]] | None:
        if not self.looks:
            return None
        return [self.table.looked_at(self.row, self.position)]

    def draw(self) -> Sequence[int]:
        return [self.table.draft_ids[self.row, self.position].item()]

    def advance(self) -> None:
        self.position += 1


def replay(rule: WindowRule, table: DraftTable, record: bool = False) -> GenerationTrace:
    """The rounds that decoding with `rule` would take, driven through the rule's own interface; none has a time.

    With `record` a fixed window, which needs no look at the distributions, leaves features and divergences too.
    """
    looks = record or rule.reads_distributions
    reads = record or isinstance(rule, KLAdaptiveWindow)
    trace = GenerationTrace(rounds=[RoundTrace(0, 0, [])])  # the target's forward over the prompt
    committed, read = 1, 0
    tokens = [*table.prompt.tolist(), *table.text.tolist()]
    while committed < len(table.text):
        if reads:
            rule.read(tokens[read : len(table.prompt) + committed])
            read = len(table.prompt) + committed
        one_round = _replay_round(rule, table, committed, looks)
        trace.rounds.append(one_round)
        committed += one_round.accepted + 1
    return trace


def _replay_round(rule: WindowRule, table: DraftTable, committed: int, looks: bool) -> RoundTrace:
    one_round, room = RoundTrace(0, 0, []), table.room(committed)
    limit = min(rule.start(room), table.draft_ids.shape[1])
    window = Window(rule, one_round, limit, lambda draft_ids: draft_ids[-1] in table.eos_token_ids, keeps_end=False)
    if limit > 0:
        draft_windows([window], RecordedDistributions(table, committed, looks))
    drawn = one_round.window
    window.look_up(room)
    accepted = min(int(table.accepted[committed - 1]), drawn)
    if accepted == drawn:
        following = zip(one_round.draft_ids[drawn:], table.text[committed + drawn :].tolist(), strict=False)
        accepted += sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], following))
    row = committed - 1
    kl, outside = (table.kl[row].tolist(), table.outside[row].tolist()) if looks else ([], [])
    learn_from_verdict(rule, one_round, accepted, kl, outside)
    return one_round


def oracle(table: DraftTable, costs: CostModel) -> GenerationTrace:
    """The rounds that commit the text at the least cost, had every verdict been known before [ours].

    Exact, by dynamic programming over the committed tokens: V(c) = min over W of cost(W) + V(c + W + 1), W up to what
    the target keeps there. A window beyond that costs more and commits nothing more.
    """
    end = len(table.text)
    value, best = [0.0] * (end + 1), [0] * (end + 1)
    for committed in range(end - 1, 0, -1):
        choices = [
            (costs.round_cost(window) + value[min(committed + window + 1, end)], window)
            for window in range(table.useful(committed) + 1)
        ]
        value[committed], best[committed] = min(choices)
    trace, committed = GenerationTrace(rounds=[RoundTrace(0, 0, [])]), 1
    while committed < end:
        window = best[committed]
        steps = int(costs.draft_steps(window))
        trace.rounds.append(RoundTrace(window, steps, table.draft_ids[committed - 1, :window].tolist(), window))
        committed += window + 1
    return trace


def mixed_stream(workloads: Mapping[str, Sequence[DraftTable]], segment_tokens: int) -> list[DraftTable]:
    """Texts of all workloads in turns, each turn going on until `segment_tokens` tokens were committed.

    Ends when a workload has no text left, so that all have a like share.
    """
    remaining = {name: list(tables) for name, tables in workloads.items()}
    stream: list[DraftTable] = []
    while True:
        for tables in remaining.values():
            tokens = 0
            while tokens < segment_tokens:
                if not tables:
                    return stream
                stream.append(tables.pop(0))
                tokens += stream[-1].tokens
