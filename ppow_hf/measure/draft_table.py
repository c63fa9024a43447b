"""A table of drafts from every prefix of the target's text, on which any window rule can be replayed.

Runs target and drafter, and times nothing. At T = 0 a round that starts after a given prefix has the same drafts and
the same verdict whatever came before, so that one table answers for every rule.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from ..data.targets import complete_batch, eos_of, plain_distribution
from ..runtime.acceptance import divergence_on_support, likeliest_tokens
from ..runtime.draft_session import collect_target_states
from ..runtime.estimator import MAX_KL
from ..runtime.target_weights import input_device

DEPTH = 16
PREFIXES_AT_ONCE = 256
TEXTS_AT_ONCE = 16
# How far, in nats, a token that generate wrote may be behind another in a forward over the whole text.
NEAR_TIE, NEAR_TIE_IN_HALF_PRECISION = 1e-3, 0.3


@dataclass
class DraftTable:
    """Greedy drafts from every prefix of one text that the target wrote greedily.

    Row c - 1 of the arrays stands for the state with c tokens of the text committed, the target's first token being
    committed by its forward over the prompt; N is the text's length, K the depth.

    Args:
        prompt (`numpy.ndarray` of shape `(n,)`), text (`(N,)`): a prompt and the target's continuation of it.
        draft_ids (`numpy.ndarray` of shape `(N - 1, K)`): the drafter's most likely tokens, each after the last.
        max_probability, second_probability, entropy (`numpy.ndarray` of shape `(N - 1, K)`):
            Of the distributions they come from; nats.
        kl (`numpy.ndarray` of shape `(N - 1, K)`):
            KL(P_D||Q) in nats against the target's distribution there, at most MAX_KL; NaN after the first token that
            is rejected.
        outside (`numpy.ndarray` of shape `(N - 1, K)`): the target's mass outside the draft vocabulary there.
        accepted (`numpy.ndarray` of shape `(N - 1,)`): how many of a row's draft tokens the target keeps.
        predicted (`numpy.ndarray` of shape `(N - 1, K)`, *optional*): a confidence head's log-odds for each.
        max_new_tokens (`int`): where the call that the text stands for would have ended.
        eos_token_ids (`frozenset[int]`): tokens that end a text; a draft ends before one.
    """

    prompt: numpy.ndarray
    text: numpy.ndarray
    draft_ids: numpy.ndarray
    max_probability: numpy.ndarray
    second_probability: numpy.ndarray
    entropy: numpy.ndarray
    kl: numpy.ndarray
    outside: numpy.ndarray
    accepted: numpy.ndarray
    max_new_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    predicted: numpy.ndarray | None = None

    def looked_at(self, row: int, position: int) -> list[float]:
        """What a rule is told of a distribution, in the order of [`Distributions.look`]."""
        columns = [self.max_probability, self.second_probability, self.entropy, self.draft_ids]
        columns += [] if self.predicted is None else [self.predicted]
        return [column[row, position].item() for column in columns]

    @property
    def tokens(self) -> int:
        """Tokens that rounds commit: all but the first, which comes with the prompt."""
        return len(self.text) - 1

    def room(self, committed: int) -> int:
        """Longest window with `committed` tokens of the text there: its round commits one token more."""
        return max(self.max_new_tokens - committed - 1, 0)

    def useful(self, committed: int) -> int:
        """Draft tokens that a window can keep there: accepted ones before the end of the text and of the room."""
        return min(int(self.accepted[committed - 1]), self.room(committed))


# -- the table


def read_with_states(target: Any, drafter: Any, ids: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, Any]:
    """The target's logits `[B, S, V]` along `ids` `[B, S]`, and the states that the drafter reads, on its device."""
    drafter.attach_target(target)
    layers = drafter.config.target_layer_ids
    outputs = target(ids, output_hidden_states=bool(layers), **inputs)
    states = collect_target_states(outputs.hidden_states, layers)
    return outputs.logits, None if states is None else states.to(drafter.device)


@torch.inference_mode()
def draft_table(
    target: Any, drafter: Any, prompt: torch.Tensor, text: Sequence[int], max_new_tokens: int, depth: int = DEPTH
) -> DraftTable:
    """The table of one text `[N]` after `prompt` `[1, n]`: one target forward, then `depth` batched draft steps.

    Raises `ValueError` where the target would not have written `text`, by its forward over the whole.
    """
    if len(text) < 1:
        raise ValueError("text: it is empty; at least the target's first token is needed.")
    ids = torch.cat([prompt, torch.tensor([list(text)])], dim=1).to(input_device(target))
    logits, states = read_with_states(target, drafter, ids)
    target_logits = logits[0].float()
    place = _first_other(target_logits, ids, prompt.shape[1], target.dtype)
    if place is not None:
        raise ValueError(f"text: its token {place} is not the target's choice there; pass the target's greedy text.")
    columns = _draft_everywhere(drafter, ids, states, target_logits, prompt.shape[1], depth)
    continuation = numpy.asarray(text)
    padded = numpy.concatenate([continuation, numpy.full(depth, -1)])
    windows = numpy.lib.stride_tricks.sliding_window_view(padded[1:], depth)[: len(text) - 1]
    accepted = numpy.cumprod(columns["ids"] == windows, axis=1).sum(axis=1)
    verified = numpy.arange(depth) <= accepted[:, None]
    ends = eos_of(target)
    if text[-1] not in ends:  # what would come after it is not known
        max_new_tokens = min(max_new_tokens, len(text))
    return DraftTable(
        prompt[0].cpu().numpy(),
        continuation,
        columns["ids"],
        columns["max_probability"],
        columns["second_probability"],
        columns["entropy"],
        numpy.where(verified, columns["kl"], math.nan),
        numpy.where(verified, columns["outside"], math.nan),
        accepted,
        max_new_tokens,
        ends,
        columns.get("predicted"),
    )


def _first_other(target_logits: torch.Tensor, ids: torch.Tensor, before: int, dtype: torch.dtype) -> int | None:
    """Place after the first `before` tokens of `ids` `[1, n + N]` whose token is not the target's choice, if any."""
    target_logits = target_logits[before - 1 : -1]
    written = target_logits.gather(-1, ids[0, before:, None])[:, 0]
    tolerance = NEAR_TIE if dtype == torch.float32 else NEAR_TIE_IN_HALF_PRECISION
    other = (target_logits.amax(-1) - written > tolerance).nonzero()
    return int(other[0]) if len(other) else None


def _draft_everywhere(
    drafter: Any,
    ids: torch.Tensor,
    states: torch.Tensor | None,
    target_logits: torch.Tensor,
    before: int,
    depth: int,
) -> dict[str, numpy.ndarray]:
    """Greedy drafts of `depth` tokens from every prefix of `ids` `[1, n + N]` after the first `before` tokens.

    Columns `[N - 1, depth]` by name: the tokens, what [`likeliest_tokens`] says, what [`divergence_on_support`] says,
    and what a confidence head says.
    """
    length, width = ids.shape[1], target_logits.shape[-1]
    features, cache = drafter.prefix_features(ids.to(drafter.device), states)
    kept = drafter.kept_tokens
    if kept is not None:  # a reduced vocabulary is looked at alone: the same numbers, and a fraction of the work
        kept = kept.to(target_logits.device)
        mass_outside = target_logits.softmax(-1).index_fill(-1, kept, 0.0).sum(-1).clamp_max(1.0)
        target_logits = target_logits[:, kept]
    names = ["ids", "max_probability", "second_probability", "entropy", "kl", "outside"]
    confident = drafter.config.confidence_head
    names += ["predicted"] if confident else []
    chunks: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for start in range(before, length - 1, PREFIXES_AT_ONCE):
        prefixes = torch.arange(start, min(start + PREFIXES_AT_ONCE, length - 1), device=drafter.device)[None]
        steps: list[tuple[torch.Tensor, ...]] = []

        def look(j: int, draft_features: torch.Tensor, _, prefixes=prefixes, steps=steps) -> torch.Tensor:
            logits = drafter.proposable_logits(draft_features[0], width)
            places = (prefixes[0] + j).clamp_max(length - 1).to(target_logits.device)
            first, second, entropies, likeliest = likeliest_tokens(logits.log_softmax(-1)).unbind(-1)
            kl, outside = divergence_on_support(target_logits[places].to(logits.device), logits)
            tokens = likeliest.long()
            if kept is not None:
                tokens, outside = kept.to(tokens.device)[tokens], mass_outside[places].to(outside.device)
            predicted = (drafter.draft_model.confidence(draft_features[0]),) if confident else ()
            steps.append((tokens, first, second, entropies, kl.clamp(0.0, MAX_KL), outside, *predicted))
            return tokens[None]

        drafter.unroll(features, cache, prefixes, look, depth)
        cache = drafter.draft_model.cropped(cache, length - drafter.draft_model.first_prefix)
        for name, values in zip(names, zip(*steps, strict=True), strict=True):
            chunks[name].append(torch.stack(values, dim=1).cpu())
    return {name: torch.cat(values).numpy() if values else numpy.zeros((0, depth)) for name, values in chunks.items()}


def draft_tables(
    target: Any, drafter: Any, prompts: Sequence[torch.Tensor], max_new_tokens: int, depth: int = DEPTH
) -> list[DraftTable]:
    """Let the target write greedily after each prompt `[1, n]`, without a drafter, and tabulate the drafts."""
    texts = greedy_texts(target, [prompt[0].tolist() for prompt in prompts], max_new_tokens)
    return [
        draft_table(target, drafter, prompt, text, max_new_tokens, depth)
        for prompt, text in zip(prompts, texts, strict=True)
        if text
    ]


@torch.inference_mode()
def greedy_texts(target: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """The target's greedy continuation of each prompt, up to and with the token that ends it.

    Prompts are continued in batches, padded on the left; a text in which padding tipped a near-tie is written again,
    alone. It ends before a token that the target's forward over the whole would still not choose, as rounding can
    have it.
    """
    texts: list[list[int]] = []
    ends = sorted(eos_of(target))
    with plain_distribution(target):
        for start in range(0, len(prompts), TEXTS_AT_ONCE):
            batch = [list(prompt) for prompt in prompts[start : start + TEXTS_AT_ONCE]]
            written = complete_batch(target, batch, max_new_tokens, 0.0, 0, ends, 0)
            for prompt, text in zip(batch, written, strict=True):
                if _place_of_other(target, prompt, text) is not None:
                    (text,) = complete_batch(target, [prompt], max_new_tokens, 0.0, 0, ends, 0)
                    text = text[: _place_of_other(target, prompt, text)]
                texts.append(text)
    return texts


def _place_of_other(target: Any, prompt: list[int], text: list[int]) -> int | None:
    """Place of the first token of `text` that the target would not choose after `prompt` and those before it."""
    ids = torch.tensor([prompt + text], device=input_device(target))
    return _first_other(target(ids).logits[0].float(), ids, len(prompt), target.dtype)
