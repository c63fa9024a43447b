"""Losses of drafters, chunked over positions so that a vocabulary-wide tensor never spans a batch, and what an
`objective` is made of.

Pure functions of logits, of features and of what the target's logits are computed from. R rows are positions to be
learned, DV is the drafter's vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

TEXT_TERMS = ("ce", "kl", "tv", "lk", "expected_length", "confidence")
WINDOW_TERMS = ("ppow", "token_rl", "opd")
GROUP_TERMS = ("ppow", "token_rl")  # those that compare the windows of a group
NAMES = ("supervised", *TEXT_TERMS, *WINDOW_TERMS)
SUPERVISED = {"ce": 0.1, "kl": 1.0}  # [ours]


@dataclass(frozen=True)
class Phase:
    """What is minimised from a share of the training on: weights of terms, by their names."""

    start: float
    weights: Mapping[str, float]


def parse_objective(objective: str | Mapping[str, float]) -> tuple[Phase, ...]:
    """The phases of an `objective`, the first one starting at 0.

    A name, a weighted sum (`"0.3*kl + tv"` or `{"kl": 0.3, "tv": 1.0}`), or a schedule of them
    (`"kl; 0.5: 0.3*kl + tv"`: the second one from half of the training on). `"supervised"` stands for
    `"0.1*ce + kl"`. Raises `ValueError` for anything else, naming it.
    """
    if isinstance(objective, Mapping):
        objective = objective_text(objective)
    phases: list[Phase] = []
    for number, part in enumerate(objective.split(";")):
        share, colon, terms = part.rpartition(":")
        start = 0.0
        if colon:
            start = _number(share, objective)
        if bool(colon) != bool(number) or not (not phases or phases[-1].start < start < 1):
            raise ValueError(
                f"objective: {objective!r} is no schedule. Begin every phase but the first with the share of the "
                "training it starts at, ascending and below 1: 'kl; 0.5: 0.3*kl + tv'."
            )
        weights: dict[str, float] = {}
        for term in terms.split("+"):
            factor, star, name = term.rpartition("*")
            weight, name = _number(factor, objective) if star else 1.0, name.strip()
            if name not in NAMES:
                raise ValueError(f"objective: {name!r} is not one of {list(NAMES)}, nor a sum or schedule of them.")
            if not weight > 0:
                raise ValueError(f"objective: {name} has the weight {weight}; weights must be above 0.")
            expanded = SUPERVISED if name == "supervised" else {name: 1.0}
            for expanded_name, factor_of_name in expanded.items():
                weights[expanded_name] = weights.get(expanded_name, 0.0) + weight * factor_of_name
        phases.append(Phase(start, weights))
    return tuple(phases)


def objective_text(weights: Mapping[str, float]) -> str:
    """A dict of weights as the text that [`parse_objective`] reads."""
    return " + ".join(f"{weight}*{name}" for name, weight in weights.items())


def _number(text: str, objective: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"objective: {text.strip()!r} in {objective!r} is not a number; write '0.3*kl + tv'.")
    return number


def sum_over_chunks(
    function: Callable[..., torch.Tensor],
    chunk_size: int,
    parameters: Iterable[torch.Tensor],
    *rows: torch.Tensor | None,
) -> torch.Tensor:
    """Sum of `function(*chunk)` over chunks of at most `chunk_size` rows; without rows it is called on none.

    `function` returns a vector of sums, whose first entry is the loss: only that one has a gradient. The gradients of
    a chunk, by the rows and by the `parameters` that `function` uses, are taken as soon as the chunk is computed, so
    that nothing vocabulary-wide is kept for the backward pass or computed twice. Small chunks also stay in a
    processor's cache, where elementwise work is faster.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return _ChunkedSum.apply(function, chunk_size, len(rows), *rows, *trained)


class _ChunkedSum(torch.autograd.Function):
    """What [`sum_over_chunks`] returns, with the gradients that were taken on the way."""

    @staticmethod
    def forward(ctx, function, chunk_size, row_count, *tensors):
        rows, parameters = tensors[:row_count], tensors[row_count:]
        learned = [number for number, row in enumerate(rows) if row is not None and row.requires_grad]
        wanted = [tensor is not None and tensor.requires_grad for tensor in tensors]
        row_gradients: list[list[torch.Tensor]] = [[] for _ in learned]
        gradients: list[torch.Tensor | None] = [None] * len(parameters)
        length = len(next(row for row in rows if row is not None))
        total = None
        for start in range(0, max(length, 1), chunk_size):
            chunk = [None if row is None else row[start : start + chunk_size].detach() for row in rows]
            leaves = [row.requires_grad_() for number in learned if (row := chunk[number]) is not None]
            with torch.set_grad_enabled(any(wanted)):
                part = function(*chunk)
                loss = part[0]
            if loss.requires_grad:
                chunk_gradients = torch.autograd.grad(loss, [*leaves, *parameters], allow_unused=True)
                for parts, leaf, gradient in zip(row_gradients, leaves, chunk_gradients, strict=False):
                    parts.append(torch.zeros_like(leaf) if gradient is None else gradient)
                for number, gradient in enumerate(chunk_gradients[len(leaves) :]):
                    if gradient is not None:
                        before = gradients[number]
                        gradients[number] = gradient if before is None else before.add_(gradient)
            total = part.detach() if total is None else total + part.detach()
        of_rows = {number: torch.cat(parts) for number, parts in zip(learned, row_gradients, strict=True) if parts}
        ctx.gradients = [*(of_rows.get(number) for number in range(row_count)), *gradients]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, of_total):
        gradients, ctx.gradients = ctx.gradients, None  # once: they are as large as the parameters
        return None, None, None, *(None if gradient is None else gradient * of_total[0] for gradient in gradients)


class without_gradients(torch.no_grad):  # noqa: N801 (a context manager and decorator, as the one that it extends)
    """`torch.no_grad` for the drafter's own forwards inside autocast.

    Under torch 2.9 autocast keeps the casts of weights that were made here, and later forwards that take them get no
    gradients (pytorch #112583): they are forgotten at the end.
    """

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        torch.clear_autocast_cache()


def forward_kl(
    target_logits: torch.Tensor, draft_logits: torch.Tensor, target_rows: torch.Tensor | None = None
) -> torch.Tensor:
    """KL(P||Q) in nats, `[R]` from logits `[R, DV]` each; both are normalised over what the drafter can propose.

    The draft logits are finite; a target's token of -inf counts nothing. With `target_rows` `[R]` each row's target
    is `target_logits[target_rows]`, of which those that rows share are normalised once.
    """
    target, draft = target_logits.float().log_softmax(-1), draft_logits.float().log_softmax(-1)
    probs = target.exp()
    negative_entropy = (probs * target.clamp_min(torch.finfo(target.dtype).min)).sum(-1)
    if target_rows is not None:
        probs, negative_entropy = probs[target_rows], negative_entropy[target_rows]
    return negative_entropy - (probs * draft).sum(-1)


def total_variation(target_logits: torch.Tensor, draft_logits: torch.Tensor) -> torch.Tensor:
    """TV(P, Q) `[R]`: the probability that a token drawn from Q is rejected at T = 1 (Leviathan et al. 2211.17192)."""
    return 0.5 * (target_logits.float().softmax(-1) - draft_logits.float().softmax(-1)).abs().sum(-1)


def negative_log_acceptance(target_logits: torch.Tensor, draft_logits: torch.Tensor) -> torch.Tensor:
    """-log alpha `[R]`, alpha = sum_x min(P(x), Q(x)): the LK loss (2602.23881), TV's gradient divided by alpha."""
    alpha = torch.minimum(target_logits.float().softmax(-1), draft_logits.float().softmax(-1)).sum(-1)
    return -alpha.clamp_min(1e-12).log()


def acceptance(
    target_logits: torch.Tensor,
    draft_logits: torch.Tensor,
    temperature: float,
    kept_tokens: torch.Tensor | None = None,
    target_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Probability `[R]` that a drafted token is accepted, from logits `[R, V]` and `[R, DV]`.

    At `temperature` 0: 1 where both choose the same token, else 0 [ours]. Above: sum_x min(P, Q)(x), both at that
    temperature; DSpark's at 1. `kept_tokens` `[DV]` are the target's ids of a reduced draft vocabulary. With
    `target_rows` `[R]` each row's target is `target_logits[target_rows]`.
    """
    target, draft = target_logits.float(), draft_logits.float()
    rows = slice(None) if target_rows is None else target_rows
    if temperature == 0:
        choices = draft.argmax(-1)
        choices = choices if kept_tokens is None else kept_tokens[choices]
        return (choices == target.argmax(-1)[rows]).float()
    probs = (target / temperature).softmax(-1)
    probs = probs if kept_tokens is None else probs[..., kept_tokens]
    return torch.minimum(probs[rows], (draft / temperature).softmax(-1)).sum(-1).clamp_max(1.0)


def cross_entropy(draft_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log Q(label) in nats `[R]`; 0 where the label is negative (a token the drafter cannot propose)."""
    return torch.nn.functional.cross_entropy(draft_logits.float(), labels, ignore_index=-100, reduction="none")


def clipped_policy_loss(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped loss `[R]`, and whether the clip bound it `[R]` bool (Schulman et al. 2017) [paper]."""
    ratio = (log_probs - old_log_probs).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    return -torch.minimum(unclipped, clipped), clipped < unclipped


def keep_probabilities(
    target_logits: torch.Tensor,
    draft_logits: torch.Tensor,
    labels: torch.Tensor,
    draft_temperature: float,
    target_temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities `[R]` each that a token drafted after the text is kept, and that it is the text's own and kept.

    `draft_temperature` is that of the drafter. At `target_temperature` 0 a token is kept if it is the target's
    choice: Q(choice), and the same where the choice is the text's token, else 0. Above 0 it is kept by rejection
    sampling: sum_x min(P, Q)(x), and min(1, Q/P) of the text's token, which makes a mean over text that the target
    drew one over accepted drafts. After a negative label, a token that the drafter cannot propose, nothing is
    followed, and at T = 0 nothing is kept.
    """
    draft = (draft_logits.float() / draft_temperature).softmax(-1)
    known, labels = labels >= 0, labels.clamp_min(0)[:, None]
    label_probs = draft.gather(-1, labels)[:, 0]
    if target_temperature == 0:
        choices = target_logits.argmax(-1, keepdim=True)
        return draft.gather(-1, choices)[:, 0] * known, label_probs * (known & (choices == labels)[:, 0])
    goal = (target_logits.float() / target_temperature).softmax(-1)
    followed = (label_probs / goal.gather(-1, labels)[:, 0].clamp_min(1e-9)).clamp_max(1.0)
    return torch.minimum(goal, draft).sum(-1), followed * known


def expected_length(kept: torch.Tensor, followed: torch.Tensor) -> torch.Tensor:
    """Expected accepted tokens `[...]` of windows after the text, sum_j kept_j prod_{i<j} followed_i [ours].

    `kept`, `followed` `[..., K]` as of [`keep_probabilities`]. Exact, with no window drafted: a window is still on
    the text where it goes on, and the last token that is kept may leave it.
    """
    return (reach_probabilities(followed) * kept).sum(-1)


def expected_length_gradients(kept: torch.Tensor, followed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the sum of [`expected_length`] by `kept` and by `followed`, `[..., K]` each."""
    with torch.enable_grad():
        leaves = [part.detach().requires_grad_() for part in (kept, followed)]
        by_kept, by_followed = torch.autograd.grad(expected_length(*leaves).sum(), leaves, allow_unused=True)
    return by_kept, torch.zeros_like(followed) if by_followed is None else by_followed


def reach_probabilities(followed: torch.Tensor) -> torch.Tensor:
    """Probability `[..., K]` that a window is still on the text at each of its tokens, from `followed` `[..., K]`."""
    return torch.cat([torch.ones_like(followed[..., :1]), followed[..., :-1]], -1).cumprod(-1)


def visit_probabilities(followed: torch.Tensor) -> torch.Tensor:
    """Probability `[B, M, K]` that decoding the text drafts token j of the window after prefix m [ours].

    `followed` `[B, M, K]` as of [`keep_probabilities`], of windows after consecutive prefixes. The first one begins a
    round; a round that keeps k tokens commits one more, so that the next one begins k + 1 prefixes on.
    """
    _, count, window = followed.shape
    reached = reach_probabilities(followed)
    whole = reached[..., -1:] * followed[..., -1:]
    kept = torch.cat([reached * (1 - followed), whole], -1)  # [B, M, K + 1]: that exactly k tokens are kept
    begins = followed.new_zeros(len(followed), count + window + 1)
    begins[:, 0] = 1
    for prefix in range(count):
        begins[:, prefix + 1 : prefix + window + 2] += begins[:, prefix, None] * kept[:, prefix]
    return begins[:, :count, None] * reached
