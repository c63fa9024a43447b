"""Losses of drafters, chunked over positions so that a vocabulary-wide tensor never spans a batch.

Pure functions of features and of what the target's logits are computed from. R rows are positions to be learned, DV
is the drafter's vocabulary.
"""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


def sum_over_chunks(
    function: Callable[..., torch.Tensor], chunk_size: int, *rows: torch.Tensor | None
) -> torch.Tensor:
    """Sum of `function(*chunk)` over chunks of at most `chunk_size` rows, each chunk's inner tensors being recomputed
    in the backward pass instead of kept. `function` returns a vector of sums; without rows it is called on none.
    """
    present = next(row for row in rows if row is not None)
    total = None
    for start in range(0, max(len(present), 1), chunk_size):
        chunk = [None if row is None else row[start : start + chunk_size] for row in rows]
        if torch.is_grad_enabled() and len(present) > chunk_size:
            part = checkpoint(function, *chunk, use_reentrant=False)
        else:
            part = function(*chunk)
        total = part if total is None else total + part
    assert total is not None
    return total


def forward_kl(target_logits: torch.Tensor, draft_logits: torch.Tensor) -> torch.Tensor:
    """KL(P||Q) in nats, `[R]` from logits `[R, DV]` each; both are normalised over what the drafter can propose."""
    target, draft = target_logits.float().log_softmax(-1), draft_logits.float().log_softmax(-1)
    return (target.exp() * (target - draft)).masked_fill(target == -torch.inf, 0.0).sum(-1)


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
