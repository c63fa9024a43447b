"""Slow or simple references of acceptance that several tests check against."""

import torch
from torch import Tensor

from ppow_hf.runtime.acceptance import greedy_accepted_counts, residual_distribution, sample_from_uniform


def greedy_accepted_group(draft_ids: Tensor, target_choices: Tensor) -> tuple[Tensor, Tensor]:
    """The longest accepted prefix of C candidates `[..., C, W]` and the first candidate that has it, `[...]` each."""
    counts = greedy_accepted_counts(draft_ids, target_choices)
    best = counts.argmax(-1)  # the first of equal maxima
    return counts.gather(-1, best[..., None])[..., 0], best


def rejection_sample_tree(
    token_ids: Tensor,
    parents: Tensor,
    draft_probs: Tensor,
    root_target_probs: Tensor,
    node_target_probs: Tensor,
    uniforms: Tensor,
    next_uniform: Tensor,
) -> tuple[list[int], int]:
    """Verification of a tree whose siblings were drawn with replacement (SpecInfer 2305.09781, section 4.3).

    `token_ids`, `parents`, `uniforms` `[N]`, `draft_probs`, `node_target_probs` `[N, V]`, `root_target_probs` `[V]`.
    Returns the accepted path's nodes and the next token.
    """
    path: list[int] = []
    probs, last = root_target_probs, -1
    while True:
        for node in (parents == last).nonzero()[:, 0].tolist():
            token = token_ids[node]
            if uniforms[node] < probs[token] / draft_probs[node, token]:
                path.append(node)
                probs, last = node_target_probs[node], node
                break
            probs = residual_distribution(probs, draft_probs[node])
        else:
            return path, int(sample_from_uniform(probs, torch.as_tensor(next_uniform, dtype=uniforms.dtype)))
