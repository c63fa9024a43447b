"""What a drafter is worth on texts that its target wrote: acceptance of greedy chains, sampled drafts and candidate
groups, and expected speed, without decoding anew for each drafter.

At T = 0 the target's text is the same whatever the drafter, so that a draft token is kept if it is the text's. At
T = 1 a text drawn from the target is distributed as speculative decoding's own output; there a token y of it, given
all before it, was drafted and kept with probability min(P, Q)(y) / P(y) = min(1, Q(y) / P(y)). Both are exact, and
need no target forward for a drafted token. Knows drafters and texts; knows nothing about recipes or files.

A metric's values are pairs, one for each text: sums whose quotient over texts is the metric (accepted + 1 and rounds,
tokens and cost). Rounds without room for a whole window are left out: how a text ends is not the drafter's doing.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data.targets import complete_batch, eos_of, plain_distribution
from ..measure.calibration import fit_estimator
from ..measure.draft_table import TEXTS_AT_ONCE, DraftTable, draft_table, greedy_texts, read_with_states
from ..measure.evaluation import decode, repeated_ngrams
from ..measure.replay import replay
from ..runtime.acceptance import entropy, sample_from_uniform
from ..runtime.cost_model import CostModel, OnlineCosts
from ..runtime.estimator import AcceptanceEstimator
from ..runtime.modeling_ppow import PPOWDrafter
from ..runtime.target_weights import input_device
from ..runtime.trace import GenerationTrace
from ..runtime.windowing import FixedWindow, make_window_rule

Pairs = list[tuple[float, float]]
LONGEST_WINDOW = 10


@dataclass
class SampledText:
    """A text drawn from the target at T = 1: `ids` are prompt and continuation, the first `start` of them the prompt.

    `uniforms` `[n]` are one verdict's random number for each token, the same for every drafter.
    """

    ids: list[int]
    start: int
    uniforms: list[float]


@dataclass
class EvaluationTexts:
    """The texts of one split: prompts with the target's greedy continuations, and continuations drawn at T = 1."""

    prompts: list[list[int]]
    greedy: list[list[int]]
    sampled: list[SampledText]
    max_new_tokens: int

    def first(self, count: int) -> "EvaluationTexts":
        return EvaluationTexts(
            self.prompts[:count], self.greedy[:count], self.sampled[:count], self.max_new_tokens
        )  # fmt: skip


def write_texts(target: Any, prompts: list[list[int]], max_new_tokens: int, seed: int) -> EvaluationTexts:
    """Let the target write after each prompt, greedily and once at T = 1, without a drafter."""
    ends, sampled = sorted(eos_of(target)), []
    with plain_distribution(target):
        for start in range(0, len(prompts), TEXTS_AT_ONCE):
            batch = prompts[start : start + TEXTS_AT_ONCE]
            drawn = _seed(seed, start, "text")
            sampled += complete_batch(target, batch, max_new_tokens, 1.0, drawn, ends, 0)
    greedy = greedy_texts(target, prompts, max_new_tokens)
    drawn_texts = [
        SampledText(prompt + text, len(prompt), _verdicts(seed, place, len(prompt + text)))
        for place, (prompt, text) in enumerate(zip(prompts, sampled, strict=True))
    ]
    kept = [place for place, text in enumerate(greedy) if text]  # of some rounding may leave nothing
    return EvaluationTexts(
        [prompts[place] for place in kept],
        [greedy[place] for place in kept],
        [drawn_texts[place] for place in kept],
        max_new_tokens,
    )


def _verdicts(seed: int, place: int, count: int) -> list[float]:
    """Uniform numbers in [0, 1) of a text, one for each of its tokens."""
    draw = torch.Generator().manual_seed(_seed(seed, place, "verdicts"))
    return torch.rand(count, generator=draw).tolist()


def _seed(seed: int, place: int, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{place}:{purpose}".encode()).digest()[:8], "big") >> 1


@torch.no_grad()
def evaluate_drafter(
    target: Any,
    drafter: PPOWDrafter,
    texts: EvaluationTexts,
    groups: Sequence[int] = (4, 8, 16),
    cost_ratios: Sequence[float] = (0.05, 0.12, 0.3),
    tree_nodes: Sequence[int] = (),
    slow_texts: int | None = None,
    verification_cost: float = 0.0,
    calibration: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Every metric of a drafter on `texts`.

    Args:
        groups (`Sequence[int]`): candidates C: the greedy window and C - 1 drawn at T = 1, the longest kept.
        tree_nodes (`Sequence[int]`): budgets N of drafted trees, at T = 0 and at T = 1, by real decoding.
        slow_texts (`int`, *optional*): groups and trees are measured on the first so many texts; `None`: on all.
        cost_ratios (`Sequence[float]`), verification_cost (`float`): of the expected speed with the adaptive window.
        calibration (`dict`, *optional*): `fit` of another split; `None` fits the acceptance estimate on this one.

    Returns `per_prompt` (name -> pairs), `metrics` (name -> number), `fit`, and `position_acceptance` (T = 0: of the
    windows of ten tokens, the share whose first j + 1 were kept).
    """
    window, one_step = longest_window(drafter), drafter.config.one_step
    with drafter.evaluating():
        tables = [
            draft_table(target, drafter, torch.tensor([prompt]), text, texts.max_new_tokens, depth=window)
            for prompt, text in zip(texts.prompts, texts.greedy, strict=True)
        ]
        costs = OnlineCosts(0.12, verification_cost)
        chains = {
            length: [replay(FixedWindow(length, costs), table, record=True) for table in tables]
            for length in chain_lengths(window)
        }
        traces = chains[window]
        fit = calibration or fit_estimator(traces)
        per_prompt: dict[str, Pairs] = {
            f"chain_t0_k{length}": [_kept(trace, length) for trace in own] for length, own in chains.items()
        }
        per_prompt |= sampled_chains(target, drafter, texts.sampled, window)
        for count in groups:
            per_prompt[f"group_t0_c{count}"] = group_chains(
                target, drafter, tables[:slow_texts], count, window, seed=0
            )
        for ratio in cost_ratios:
            model = CostModel(ratio, verification_cost, one_step)
            per_prompt[f"speed_t0_{ratio:g}"] = [_speed(table, window, model, {"greedy": fit}) for table in tables]
        for count in tree_nodes:
            per_prompt |= tree_rounds(target, drafter, texts, slow_texts, count, window)
    reached = [(table, row, int(table.accepted[row])) for table in tables for row in range(len(table.accepted))]
    loops = [repeated_ngrams([text], 8) for text in texts.greedy]
    return {
        "per_prompt": per_prompt,
        "metrics": {name: quotient(pairs) for name, pairs in per_prompt.items()}
        | {
            "entropy": _mean([table.entropy[row, : kept + 1].mean() for table, row, kept in reached]),
            "kl": _mean([table.kl[row, : min(kept + 1, window)].mean() for table, row, kept in reached]),
            "calibration_nats": _log_loss(fit, traces),
            "repeated_8grams": _mean(loops),
        },
        "loops": loops,
        "fit": fit,
        "position_acceptance": _by_position(traces, window),
    }


def tree_rounds(
    target: Any, drafter: PPOWDrafter, texts: EvaluationTexts, count: int | None, nodes: int, window: int
) -> dict[str, Pairs]:
    """Tokens and rounds of each of the first `count` texts, decoded with trees of `nodes` at T = 0 and at T = 1."""
    found = {}
    for temperature in (0.0, 1.0):
        _, traces = decode(
            target, drafter, texts.prompts[:count], texts.max_new_tokens, temperature, batch_size=8, window="fixed",
            max_window=window, tree_nodes=nodes,
        )  # fmt: skip
        found[f"tree_t{temperature:g}_n{nodes}"] = [
            (float(sum(r.accepted + 1 for r in trace.rounds[1:])), float(len(trace.rounds) - 1)) for trace in traces
        ]
    return found


def quotient(pairs: Sequence[Sequence[float]]) -> float:
    """Sum of the first numbers over that of the second ones; 1 where nothing was counted (plain decoding)."""
    below = sum(pair[1] for pair in pairs)
    return sum(pair[0] for pair in pairs) / below if below else 1.0


def longest_window(drafter: PPOWDrafter) -> int:
    """Tokens of the longest chain that is measured."""
    return min(LONGEST_WINDOW, drafter.config.longest_window or LONGEST_WINDOW)


def chain_lengths(window: int) -> list[int]:
    """The lengths of chains that are measured of a drafter whose longest is `window`."""
    return sorted({min(5, window), window})


def chain_names(window: int) -> list[str]:
    """The metrics of chains of a drafter whose longest is `window`."""
    return [f"chain_t{t}_k{length}" for t in (0, 1) for length in chain_lengths(window)] + [f"greedy_t1_k{window}"]


def gain_over_start(line: Mapping[str, Any], start: Mapping[str, Any], names: Sequence[str]) -> float:
    """Mean over the metrics `names` of a line's value over the start's: by this a learning rate is chosen."""
    return sum(line["metrics"][name] / start["metrics"][name] for name in names) / len(names)


def _kept(trace: GenerationTrace, window: int) -> tuple[float, float]:
    whole = [r for r in trace.rounds if r.window == window]
    return float(sum(r.accepted + 1 for r in whole)), float(len(whole))


def _speed(table: DraftTable, window: int, costs: CostModel, calibration: dict[str, Any]) -> tuple[float, float]:
    """Tokens committed and what they cost in one-token target forwards, with the adaptive window."""
    rule = make_window_rule("kl", window, OnlineCosts(costs.cost_ratio, costs.verification_cost, costs), calibration)
    rounds = replay(rule, table).rounds[1:]
    return (
        float(sum(r.accepted + 1 for r in rounds)),
        float(sum(costs.round_cost(r.window, r.draft_steps) for r in rounds)),
    )


def _by_position(traces: Sequence[GenerationTrace], window: int) -> list[float]:
    whole = [r for trace in traces for r in trace.rounds if r.window == window]
    return [sum(r.accepted > position for r in whole) / max(len(whole), 1) for position in range(window)]


def _log_loss(fit: dict[str, Any], traces: Sequence[GenerationTrace]) -> float:
    """Mean -log of the probability that the acceptance estimate gave to what came out, over reached tokens."""
    estimator = AcceptanceEstimator.from_weights(fit["weights"])
    losses = []
    for trace in traces:
        for r in trace.rounds:
            for position in range(min(r.accepted + 1, r.window)):
                probability = estimator.probability(r.features[position])
                losses.append(-math.log(max(probability if position < r.accepted else 1 - probability, 1e-12)))
    return _mean(losses)


def _mean(values: Sequence[float]) -> float:
    kept = [float(value) for value in values if not math.isnan(value)]
    return sum(kept) / len(kept) if kept else 0.0


@torch.no_grad()
def target_entropy(target: Any, texts: EvaluationTexts) -> float:
    """The target's mean entropy in nats per token of its texts drawn at T = 1: a too random target misleads."""
    total, count = 0.0, 0
    for text in texts.sampled:
        logits = target(torch.tensor([text.ids], device=input_device(target))).logits[0, text.start - 1 : -1]
        total += float(entropy(logits.float().log_softmax(-1)).sum())
        count += len(logits)
    return total / max(count, 1)


# -- T = 1


@torch.no_grad()
def sampled_chains(target: Any, drafter: PPOWDrafter, texts: Sequence[SampledText], window: int) -> dict[str, Pairs]:
    """Rounds of drafts at T = 1 on texts drawn from the target: sampled ones (`chain_t1_k5`, `_k10`), and greedy
    ones, which are kept where they are the text's token (`greedy_t1_k10`)."""
    names = [f"chain_t1_k{length}" for length in chain_lengths(window)] + [f"greedy_t1_k{window}"]
    pairs: dict[str, Pairs] = {}
    for text in texts:
        if len(text.ids) - text.start < 2:  # it ended at once: there was nothing to draft
            for name in names:
                pairs.setdefault(name, []).append((0.0, 0.0))
            continue
        ids = torch.tensor([text.ids], device=input_device(target))
        logits, states = read_with_states(target, drafter, ids)
        ids, length = ids.to(drafter.device), ids.shape[1]
        target_probs = logits[0].float().softmax(-1).to(drafter.device)
        prefixes = torch.arange(text.start, length - 1, device=drafter.device)
        places = (prefixes[:, None] + 1 + torch.arange(window, device=drafter.device)).clamp_max(length - 1)
        tokens = ids[0, places]  # [M, K]
        along = drafter.window_features(ids, states, None, prefixes[None], tokens[None])
        draft_probs = [
            drafter.compute_logits(along[0, :, j], target_probs.shape[-1]).float().softmax(-1) for j in range(window)
        ]
        own = torch.stack([q.gather(-1, tokens[:, j, None])[:, 0] for j, q in enumerate(draft_probs)], dim=1)
        ratio = own / target_probs[places - 1].gather(-1, tokens[..., None])[..., 0]
        sampled = torch.tensor(text.uniforms, device=ratio.device)[places] < ratio
        greedy = torch.stack([q.argmax(-1) == tokens[:, j] for j, q in enumerate(draft_probs)], dim=1)
        chains = [(f"chain_t1_k{longest}", sampled, longest) for longest in chain_lengths(window)]
        for name, verdicts, longest in [*chains, (f"greedy_t1_k{window}", greedy, window)]:
            counts = verdicts[:, :longest].long().cumprod(-1).sum(-1).tolist()
            kept, rounds, place = 0, 0, 0
            while text.start + place + longest + 1 < length:
                kept, rounds, place = kept + counts[place] + 1, rounds + 1, place + counts[place] + 1
            pairs.setdefault(name, []).append((float(kept), float(rounds)))
    return pairs


# -- candidate groups


@torch.no_grad()
def group_chains(
    target: Any, drafter: PPOWDrafter, tables: Sequence[DraftTable], count: int, window: int, seed: int = 0
) -> Pairs:
    """Rounds at T = 0 of `count` candidates, the longest kept: the greedy window and `count` - 1 drawn at T = 1.

    What is drawn at a place of a text hangs on (seed, text, place, candidate) alone: groups are nested, and drafters
    are compared on the same numbers.
    """
    pairs: Pairs = []
    for start in range(0, len(tables), TEXTS_AT_ONCE):
        part = tables[start : start + TEXTS_AT_ONCE]
        pairs += _group_chains(target, drafter, part, start, count, window, seed)
    return pairs


def _group_chains(target, drafter, tables, number, count, window, seed) -> Pairs:
    device = drafter.device
    sequences = [torch.tensor([*table.prompt, *table.text]) for table in tables]
    starts = [len(table.prompt) for table in tables]
    longest = max(map(len, sequences))
    ids = torch.stack([torch.nn.functional.pad(s, (0, longest - len(s))) for s in sequences]).to(device)
    lengths = torch.tensor([len(s) for s in sequences], device=device)
    mask = (torch.arange(longest, device=device) < lengths[:, None]).long()
    place = input_device(target)
    logits, states = read_with_states(target, drafter, ids.to(place), attention_mask=mask.to(place))
    width, drawn = logits.shape[-1], count - 1
    kept_tokens = drafter.kept_tokens
    features, cache = drafter.prefix_features(ids, states)
    committed = longest - drafter.draft_model.first_prefix
    uniforms = torch.stack([_group_uniforms(seed, number + row, longest, drawn, window) for row in range(len(tables))])
    uniforms = uniforms.to(device)
    rows = torch.arange(len(tables), device=device)
    places = torch.tensor(starts, device=device)  # the last committed token of each text
    kept, rounds = torch.zeros(len(tables)), torch.zeros(len(tables))
    while bool((active := places + window + 1 < lengths).any()):
        here = places.clamp_max(longest - window - 2)
        behind = ids.gather(1, here[:, None] + 1 + torch.arange(window, device=device))  # the text's own tokens
        greedy = torch.tensor(
            [int(table.accepted[min(int(p) - s, len(table.accepted) - 1)]) if len(table.accepted) else 0
             for table, p, s in zip(tables, here, starts, strict=True)], device=device,
        )  # fmt: skip
        best = greedy.clamp_max(window)
        if drawn:
            numbers = uniforms[rows, here]  # [B, C - 1, K]
            drafted: list[torch.Tensor] = []

            def choose(j: int, current: torch.Tensor, _, numbers=numbers, drafted=drafted) -> torch.Tensor:
                probs = drafter.proposable_logits(current, width).softmax(-1)
                tokens = sample_from_uniform(probs, numbers[:, :, j])
                drafted.append(tokens if kept_tokens is None else kept_tokens[tokens])
                return drafted[-1]

            drafter.unroll(features, cache, here[:, None].expand(-1, drawn), choose, window)
            cache = drafter.draft_model.cropped(cache, committed)
            agreed = torch.stack(drafted, dim=-1) == behind[:, None]  # [B, C - 1, K]
            best = torch.maximum(best, agreed.long().cumprod(-1).sum(-1).amax(-1))
        kept += ((best + 1) * active).cpu()
        rounds += active.cpu()
        places = torch.where(active, places + best + 1, places)
    return list(zip(kept.tolist(), rounds.tolist(), strict=True))


def _group_uniforms(seed: int, number: int, length: int, drawn: int, window: int) -> torch.Tensor:
    """`[length, drawn, window]`; a larger group begins with the numbers of a smaller one."""
    generators = [torch.Generator().manual_seed(_seed(seed, number, f"candidate {c}")) for c in range(drawn)]
    if not generators:
        return torch.zeros(length, 0, window)
    return torch.stack([torch.rand(length, window, generator=generator) for generator in generators], dim=1)
