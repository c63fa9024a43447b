"""Acceptance measured by real decoding, with the very code that `generate(assistant_model=)` runs.

Knows how to decode prompts and add up their traces; trains nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data.targets import eos_of, left_padded, plain_distribution, random_state_kept, sampling_options, until_end
from ..runtime.target_weights import input_device
from ..runtime.trace import GenerationTrace
from .costs import with_progress

# What training evaluates, and whether more of it is better.
EVALUATION_METRICS = {
    "acceptance_length": True,
    "tokens_per_target_forward": True,
    "wasted": False,
    "kl": False,
    "repeated_8grams": False,
}


@dataclass
class AcceptanceReport:
    """Sums over the rounds of many calls.

    Args:
        acceptance_length (`float`): tau, mean of k + 1 over rounds that drafted (bonus or correction token counted).
        tokens_per_target_forward (`float`): committed tokens over target forwards, the prompt's not counted.
        wasted (`float`): (drafted - accepted) / drafted.
        kl (`float`): mean KL(P_D||Q) in nats at verified positions, see [`RoundTrace`].
        outside (`float`): mean mass of P there that the drafter cannot propose.
        repeated_8grams (`float`): share of 8-grams of the generated text that occurred before in it (looping).
        drafted, accepted, rounds, tokens (`int`): counts.
    """

    acceptance_length: float
    tokens_per_target_forward: float
    wasted: float
    kl: float
    outside: float
    repeated_8grams: float
    drafted: int
    accepted: int
    rounds: int
    tokens: int


def evaluation_metrics(found: AcceptanceReport, prefix: str) -> dict[str, float]:
    """What training logs of a report: "eval_acceptance_length" and the like."""
    return {f"{prefix}_{name}": float(getattr(found, name)) for name in EVALUATION_METRICS}


def decode(
    target: Any,
    drafter: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 1,
    progress: str | None = None,
    **settings: Any,
) -> tuple[list[list[int]], list[GenerationTrace]]:
    """Generate a continuation of each prompt with the drafter; new tokens and trace of each.

    Sampling is seeded for each batch by (seed, its first prompt's place), and the global random state is left as it
    was. Batches of several prompts take less time and have other random numbers. `progress` names a bar that a
    terminal is shown; `settings` are those of [`PPOWDrafter.with_settings`].
    """
    outputs: list[list[int]] = []
    traces: list[GenerationTrace] = []
    ends = eos_of(target)
    with drafter.evaluating(), random_state_kept(), torch.no_grad(), plain_distribution(target):
        places = range(0, len(prompts), batch_size)
        for place in places if progress is None else with_progress(places, progress):
            torch.manual_seed((seed * 1_000_003 + place) % 2**63)
            ids, mask = left_padded(prompts[place : place + batch_size], 0)
            view = drafter.with_settings(**settings)
            generated = target.generate(
                input_ids=ids.to(input_device(target)),
                attention_mask=mask.to(input_device(target)),
                max_new_tokens=max_new_tokens,
                assistant_model=view,
                pad_token_id=0,
                **sampling_options(temperature),
            )
            outputs += [until_end(row, ends) for row in generated[:, ids.shape[1] :].tolist()]
            traces += view.last_traces
    return outputs, traces


def report(outputs: Sequence[Sequence[int]], traces: Sequence[GenerationTrace]) -> AcceptanceReport:
    """Add up traces; the first round of each is the target's forward over the prompt and drafts nothing."""
    together = GenerationTrace([r for trace in traces for r in trace.rounds[1:]])
    kls = [value for r in together.rounds for value in r.kl]
    outside = [mass for r in together.rounds for mass in r.outside]
    return AcceptanceReport(
        acceptance_length=together.acceptance_length,
        tokens_per_target_forward=together.tokens_per_target_forward if together.rounds else 1.0,
        wasted=together.wasted,
        kl=sum(kls) / len(kls) if kls else 0.0,
        outside=sum(outside) / len(outside) if outside else 0.0,
        repeated_8grams=repeated_ngrams(outputs, 8),
        drafted=together.drafted,
        accepted=together.accepted,
        rounds=len(together.rounds),
        tokens=sum(map(len, outputs)),
    )


def repeated_ngrams(outputs: Sequence[Sequence[int]], n: int) -> float:
    """Share of n-grams that occurred earlier in the same output; a target that loops flatters acceptance."""
    total = repeated = 0
    for output in outputs:
        seen = set()
        for start in range(len(output) - n + 1):
            gram = tuple(output[start : start + n])
            total += 1
            repeated += gram in seen
            seen.add(gram)
    return repeated / total if total else 0.0
