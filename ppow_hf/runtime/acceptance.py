"""Acceptance of drafted tokens as pure functions on tensors: chains and trees, at T = 0 and at T > 0.

The same functions serve training, evaluation and decoding, so that what is measured is what is served. Knows token
ids, probabilities and uniform random numbers; knows nothing about models, caches, text or random generators: every
random number is an argument.

Shapes: `...` stands for any leading batch dimensions, W for the window, V for the vocabulary, N for the nodes of a
tree. P is the target's distribution, Q the drafter's: exactly the one that the draft
token was drawn from, after every logits processor. Half precision is computed in float32.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# How close two distributions are
# ---------------------------------------------------------------------------------------------------------------------


def total_variation(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """TV(P, Q) = half the sum of |P - Q|, in [0, 1]: the probability that a token drawn from Q is rejected.

    `[..., V]`, `[..., V]` -> `[...]`. Differentiable.
    """
    _require_shape("draft_probs", draft_probs, target_probs.shape, "the shape of target_probs")
    return 0.5 * (_at_least_float32(target_probs) - _at_least_float32(draft_probs)).abs().sum(-1)


def kl_divergence(target_log_probs: Tensor, draft_log_probs: Tensor) -> Tensor:
    """KL(P || Q) in nats, over the whole vocabulary, with 0 log 0 = 0.

    `[..., V]`, `[..., V]` -> `[...]`. Both must be normalised (log-softmax). +inf, never NaN, where Q = 0 < P; tokens
    with P = 0 count nothing and pass no gradient. Rounding can leave about -1e-7 where P = Q: clamp before a root.
    """
    _require_shape("draft_log_probs", draft_log_probs, target_log_probs.shape, "the shape of target_log_probs")
    target_log_probs, draft_log_probs = _at_least_float32(target_log_probs), _at_least_float32(draft_log_probs)
    # The support is where exp() is positive, not where the logarithm is finite: exp(-200) is 0 in float32, and
    # 0 * inf would be NaN. Replacing the rest before the product keeps NaN out of the gradient as well.
    support = target_log_probs.exp() > 0
    target_log_probs = target_log_probs.masked_fill(~support, 0.0)
    draft_log_probs = draft_log_probs.masked_fill(~support, 0.0)
    return (target_log_probs.exp() * (target_log_probs - draft_log_probs)).masked_fill(~support, 0.0).sum(-1)


def divergence_on_support(target_scores: Tensor, draft_scores: Tensor) -> tuple[Tensor, Tensor]:
    """KL(P_D || Q) in nats and m = P(not D), where D is the support of Q and P_D is P on it, renormalised.

    `[..., V]` scores (unnormalised), `[..., V]` -> `[...]`, `[...]`. D are the tokens whose draft score is not -inf,
    which a reduced draft vocabulary and truncating processors leave. KL(P_D || Q) - log(1 - m) is KL(P_D || Q) +
    KL(P_D || P); a token drawn from Q is accepted with probability sum min(P, Q) <= 1 - m. +inf where m = 1.
    """
    _require_shape("draft_scores", draft_scores, target_scores.shape, "the shape of target_scores")
    draft_log_probs = draft_scores.log_softmax(-1)
    excluded = draft_scores == -torch.inf
    if not bool(excluded.any()):
        divergence = kl_divergence(target_scores.log_softmax(-1), draft_log_probs)
        return divergence, torch.zeros_like(divergence)
    outside = target_scores.softmax(-1).masked_fill(~excluded, 0.0).sum(-1).clamp_max(1.0)
    restricted = target_scores.masked_fill(excluded, -torch.inf)
    nothing_left = (restricted == -torch.inf).all(-1)
    divergence = kl_divergence(restricted.log_softmax(-1), draft_log_probs)
    return divergence.masked_fill(nothing_left, torch.inf), outside.masked_fill(nothing_left, 1.0)


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats of normalised log-probabilities, with 0 log 0 = 0: `[..., V]` -> `[...]`."""
    log_probs = _at_least_float32(log_probs)
    log_probs = log_probs.masked_fill(log_probs.exp() == 0, 0.0)  # exp(0) * 0 = 0, and no NaN in the gradient
    return -(log_probs.exp() * log_probs).sum(-1)


def likeliest_tokens(log_probs: Tensor) -> Tensor:
    """What window rules look at: `[..., V]` -> `[..., 4]`.

    The probabilities of the two likeliest tokens, the entropy in nats, and the likeliest's id (exact below 2^24): one
    tensor, so that an accelerator is waited for once.
    """
    log_probs = _at_least_float32(log_probs)
    probs = log_probs.exp()
    top = probs.topk(2, dim=-1)
    return torch.cat([top.values, entropy(log_probs)[..., None], top.indices[..., :1].to(probs)], dim=-1)


def confidence(log_probs: Tensor) -> Tensor:
    """C(P) = 1 - H(P) / log |V|, in [0, 1]: 1 for a certain distribution, 0 for a uniform one; of at least two tokens.

    `[..., V]` -> `[...]`. Source: ADAW [paper, arXiv 2605.14978].
    """
    return (1 - entropy(log_probs) / math.log(log_probs.shape[-1])).clamp(0, 1)


def divergence_priority(target_log_probs: Tensor, draft_log_probs: Tensor) -> Tensor:
    """v = C(P) * KL(P || Q), large where a confident target is missed: `[..., V]`, `[..., V]` -> `[...]`.

    0 where P is uniform, +inf where Q = 0 < P otherwise. A window's priority is the mean over its positions. Source:
    ADAW [paper, arXiv 2605.14978].
    """
    certainty = confidence(target_log_probs)
    divergence = kl_divergence(target_log_probs, draft_log_probs)
    return certainty * divergence.masked_fill(certainty == 0, 0.0)  # 0 * inf would be NaN


# ---------------------------------------------------------------------------------------------------------------------
# Chains at T = 0
# ---------------------------------------------------------------------------------------------------------------------


def greedy_accepted_counts(draft_ids: Tensor, target_choices: Tensor, valid: Tensor | None = None) -> Tensor:
    """Number of leading draft tokens that are the target's own choice.

    Args:
        draft_ids (`[..., W]`): the drafted tokens; W may be 0.
        target_choices (`[..., W]`): the target's choice at each position, given the draft tokens before it. Not the
            W + 1st, which is the bonus token.
        valid (`[..., W]` bool, *optional*): False at positions beyond a row's own window, which count as rejected.

    Returns accepted counts k `[...]`, int64, 0 <= k <= W.
    """
    _require_shape(
        "target_choices", target_choices, draft_ids.shape, "the shape of draft_ids; leave the bonus position out"
    )
    return _leading_trues(draft_ids == target_choices, valid)


def first_rejection_mask(accepted_counts: Tensor, window: int) -> Tensor:
    """True at the positions whose verdict was reached: 0..k, the first rejected token included; all W when k = W.

    `accepted_counts` `[...]` -> bool `[..., window]`. Positions after the first rejection were conditioned on a token
    that the target did not keep, so they tell nothing about acceptance.
    """
    if window < 0:
        raise ValueError(f"window: {window} given. Pass the number of draft tokens per round, 0 or more.")
    return torch.arange(window, device=accepted_counts.device) <= accepted_counts.unsqueeze(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Chains at T > 0: rejection sampling
# ---------------------------------------------------------------------------------------------------------------------


def sample_from_uniform(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Token ids by the inverse distribution function: the first x with P(0) + ... + P(x) > u.

    Args:
        probs (`[..., V]`): non-negative, of positive sum; need not be normalised.
        uniforms (`[...]`, or `[..., C]` for C tokens of each row): random numbers in [0, 1). float32 numbers have
            steps of 6e-8, coarser than rare tokens of a large vocabulary: draw them in float64 where that matters.

    Returns ids of the shape of `uniforms`, int64; never a token of probability zero, whatever the rounding. Raises
    `ValueError` when a row has no mass or holds NaN (one wait for the device, far cheaper than a text of token 0).
    """
    many = uniforms if uniforms.ndim == probs.ndim else uniforms[..., None]
    _require_shape("uniforms", many[..., 0], probs.shape[:-1], "one number per row of probs")
    dtype = exact_dtype(probs.device)
    probs, many = probs.detach().to(dtype), many.to(dtype)
    # A parallel cumulative sum need not be monotonic in its last bit, so tokens of probability zero are taken out
    # explicitly, and the threshold is kept below the total: then some token of positive probability exceeds it.
    cumulative = probs.cumsum(-1).masked_fill(probs == 0, 0.0)
    total = cumulative.amax(-1, keepdim=True)
    threshold = torch.minimum(many * total, torch.nextafter(total, torch.zeros_like(total))).clamp(min=0)
    exceeds = cumulative[..., None, :] > threshold[..., None]
    if not bool(exceeds.any(-1).all()):
        rows = int((~exceeds.any(-1)).any(-1).sum())
        raise ValueError(
            f"probs: {rows} row(s) have no positive mass, or NaN in probs or uniforms. Pass probabilities with a "
            "positive, finite sum; NaN usually comes from a float16 overflow or a row of logits that are all -inf."
        )
    return exceeds.to(torch.uint8).argmax(-1).view(uniforms.shape)


def exact_dtype(device: torch.device) -> torch.dtype:
    """Of random numbers that tell rare tokens of a large vocabulary apart: float64, or on MPS float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def residual_distribution(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """What to draw from after a rejection: norm(max(P - Q, 0)), `[..., V]`, `[..., V]` -> `[..., V]`.

    Where the residual has no mass (P = Q up to rounding, where a rejection has probability zero) it is P itself.
    Source: Leviathan et al. 2211.17192, section 2.3.
    """
    _require_shape("draft_probs", draft_probs, target_probs.shape, "the shape of target_probs")
    target_probs = _at_least_float32(target_probs)
    excess = (target_probs - _at_least_float32(draft_probs)).clamp(min=0)
    mass = excess.sum(-1, keepdim=True)
    return torch.where(mass > 0, excess / mass.masked_fill(mass == 0, 1.0), target_probs)


def rejection_accepted_counts(
    draft_ids: Tensor,
    draft_token_probs: Tensor,
    target_token_probs: Tensor,
    uniforms: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """Number of leading draft tokens that rejection sampling keeps: x_j is kept if u_j < P(x_j) / Q(x_j).

    For training, where only the probabilities of the drafted tokens are at hand; same verdicts as
    `rejection_sample_chain`.

    Args:
        draft_ids (`[..., W]`): the drafted tokens; W may be 0. Only the shape is used.
        draft_token_probs (`[..., W]`): Q(x_j), of the distribution that x_j was drawn from.
        target_token_probs (`[..., W]`): P(x_j).
        uniforms (`[..., W]`): random numbers in [0, 1).
        valid (`[..., W]` bool, *optional*): False at positions beyond a row's own window, which count as rejected.

    Returns accepted counts k `[...]`, int64. Source: Leviathan et al. 2211.17192, algorithm 1.
    """
    _require_shape("draft_token_probs", draft_token_probs, draft_ids.shape, "the shape of draft_ids")
    _require_shape("target_token_probs", target_token_probs, draft_ids.shape, "the shape of draft_ids")
    _require_shape("uniforms", uniforms, draft_ids.shape, "the shape of draft_ids")
    return _leading_trues(_accepts(target_token_probs, draft_token_probs, uniforms), valid)


def rejection_sample_chain(
    draft_ids: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    uniforms: Tensor,
    next_uniforms: Tensor,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One round of lossless verification: the accepted prefix and the one token after it are distributed as P.

    Args:
        draft_ids (`[..., W]`): the drafted tokens, int64; W may be 0.
        draft_probs (`[..., W, V]`): the distribution Q that each was drawn from.
        target_probs (`[..., W + 1, V]`): P at each drafted position and at the one after the window.
        uniforms (`[..., W]`): random numbers in [0, 1), one verdict each.
        next_uniforms (`[...]`): random numbers in [0, 1) for the token after the accepted prefix.
        valid (`[..., W]` bool, *optional*): False at positions beyond a row's own window; nothing was drafted there,
            so a row that reaches its end draws the bonus token from P at that position.

    Returns accepted counts k `[...]` and next ids `[...]`: drawn from the residual at the first rejection, or from P
    after a window that was wholly kept. Source: Leviathan et al. 2211.17192, algorithm 1; `valid` [ours].
    """
    batch, window, vocabulary = draft_ids.shape[:-1], draft_ids.shape[-1], target_probs.shape[-1]
    _require_shape("draft_probs", draft_probs, (*batch, window, vocabulary), "[..., W, V]")
    _require_shape("target_probs", target_probs, (*batch, window + 1, vocabulary), "[..., W + 1, V]: one row more")
    draft_token_probs = draft_probs.gather(-1, draft_ids.unsqueeze(-1)).squeeze(-1)  # [..., W]
    target_token_probs = target_probs[..., :window, :].gather(-1, draft_ids.unsqueeze(-1)).squeeze(-1)  # [..., W]
    accepted_counts = rejection_accepted_counts(draft_ids, draft_token_probs, target_token_probs, uniforms, valid)

    next_probs = _row(target_probs, accepted_counts)  # [..., V]
    if window > 0:
        own_windows = _leading_trues(torch.ones_like(draft_ids, dtype=torch.bool), valid)
        rejected = (accepted_counts < own_windows).unsqueeze(-1)
        residual = residual_distribution(next_probs, _row(draft_probs, accepted_counts.clamp(max=window - 1)))
        next_probs = torch.where(rejected, residual, next_probs)
    return accepted_counts, sample_from_uniform(next_probs, next_uniforms)


def pending_token_scores(target_scores: Tensor, token: int, draft_probs: Tensor, uniform: Tensor) -> Tensor:
    """Scores `[1, V]` that a token drawn from Q is verified by where the target's own token is drawn.

    With probability min(1, P(x) / Q(x)) they are certain of the `token` x, else those of norm(max(P - Q, 0)): what is
    drawn from them is distributed as P.

    Args:
        target_scores (`[1, V]`): logarithms of P, up to a constant.
        draft_probs (`[1, V]`): Q.
        uniform (`[]`): random number in [0, 1).
    """
    target_probs = target_scores.softmax(-1)
    draft_probs = draft_probs.to(target_probs)
    if bool(uniform < target_probs[0, token] / draft_probs[0, token]):
        certain = torch.full_like(target_scores, -torch.inf)
        certain[0, token] = 0.0
        return certain
    residual = (target_probs - draft_probs).clamp_min(0.0)
    return residual.log() if bool(residual.sum() > 0) else target_scores


# ---------------------------------------------------------------------------------------------------------------------
# Trees: node i holds token_ids[i] and follows node parents[i], which comes before it; -1 is the context
# ---------------------------------------------------------------------------------------------------------------------


def greedy_accepted_path(
    token_ids: Tensor, parents: Tensor, root_choice: int | Tensor, node_choices: Tensor
) -> list[int]:
    """Nodes of the longest accepted path, from the context outwards, at T = 0.

    Args:
        token_ids (`[N]`): the drafted token of each node.
        parents (`[N]`): the node that each follows, -1 for the context.
        root_choice (`int`): the target's choice after the context.
        node_choices (`[N]`): the target's choice after each node.

    Returns node indices; empty when no child of the context is the target's choice. A node is accepted if its parent
    is and its token is the target's choice there; among paths of equal length (siblings with the same token) the one
    whose last node comes first. The token to append after the path is `node_choices[path[-1]]`, or `root_choice`.
    """
    _require_tree(parents)
    _require_shape("token_ids", token_ids, parents.shape, "the shape of parents")
    _require_shape("node_choices", node_choices, parents.shape, "the shape of parents")
    tokens, parent_of, choices = token_ids.tolist(), parents.tolist(), node_choices.tolist()
    accepted_lengths: list[int] = []  # of the path that ends at a node, 0 where it is rejected
    for token, parent in zip(tokens, parent_of, strict=True):
        if parent == -1:
            accepted_lengths.append(int(token == int(root_choice)))
        else:
            reached = accepted_lengths[parent] > 0 and token == choices[parent]
            accepted_lengths.append(accepted_lengths[parent] + 1 if reached else 0)
    if max(accepted_lengths, default=0) == 0:
        return []
    path = [accepted_lengths.index(max(accepted_lengths))]
    while parent_of[path[-1]] != -1:
        path.append(parent_of[path[-1]])
    return path[::-1]


def rejection_sample_distinct_trees(
    token_ids: Tensor,
    parents: Tensor,
    draft_scores: Sequence[Tensor],
    draft_places: Tensor,
    target_scores: Tensor,
    uniforms: Tensor,
    next_uniforms: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One round of lossless verification of trees whose siblings were drawn from one Q without replacement.

    At each node the children are tried in the order they were drawn. Child x is kept if u < P(x) / Q(x); after a
    rejection P becomes norm(max(P - Q, 0)) and Q loses x: norm(Q without x) is what the next sibling was drawn from,
    given those before it. Whatever x was, what follows its rejection is then distributed as the new P, so the whole is
    distributed as P. All rows take a step down, or try their next sibling, together; distributions are computed where
    a row comes by only, which is why they are given as scores.

    Args:
        token_ids (`[B, N]`): the drafted token of each node; siblings in the order they were drawn.
        parents (`[B, N]`): the node that each follows, -1 for the context; -2 where a row has fewer nodes.
        draft_scores (`D of [B, k, V]`): logarithms of the distributions Q, up to a constant each, that the children at
            depth 0, 1, ... were drawn from; k may differ.
        draft_places (`[B, N + 1]`): which of the k the children of the context, then of each node, were drawn from;
            any for a node without children. How many children a node has may hang on anything but their tokens.
        target_scores (`[B, N + 1, V]`): the same of P after the context, then after each node.
        uniforms (`[B, N]`): random numbers in [0, 1), one verdict each.
        next_uniforms (`[B]`): random numbers in [0, 1) for the tokens after the paths.

    Returns the paths' node indices from the context outwards `[B, D]`, -1 after their ends; their lengths `[B]`; and
    the next token ids `[B]`. Source: recursive rejection sampling without replacement, Jeon et al. 2402.14160; Yang et
    al. 2401.06706.
    """
    (batch, nodes), vocabulary, device = token_ids.shape, target_scores.shape[-1], target_scores.device
    token_ids, parents, draft_places = token_ids.to(device), parents.to(device), draft_places.to(device)
    _require_shape("parents", parents, (batch, nodes), "the shape of token_ids")
    _require_shape("draft_places", draft_places, (batch, nodes + 1), "[B, N + 1]")
    _require_shape("target_scores", target_scores, (batch, nodes + 1, vocabulary), "[B, N + 1, V]")
    _require_shape("uniforms", uniforms, (batch, nodes), "the shape of token_ids")
    _require_shape("next_uniforms", next_uniforms, (batch,), "one number per row")
    children = _children(parents)  # [B, N + 1, C]

    paths = token_ids.new_full((batch, len(draft_scores)), -1)
    at = token_ids.new_zeros(batch)  # 0 is the context, i + 1 is node i
    probs = _at_least_float32(target_scores[:, 0]).softmax(-1)  # [B, V] what each row's next token is drawn from
    walking = torch.arange(batch, device=device)  # rows [R] whose last token was kept
    for depth, scores in enumerate(draft_scores):
        siblings = children[walking, at[walking]]  # [R, C]
        has_children = (siblings >= 0).any(-1)
        walking, siblings = walking[has_children], siblings[has_children]
        if not len(walking):
            break
        wanted = probs[walking]  # [R, V]
        remaining = _at_least_float32(scores[walking, draft_places[walking, at[walking]]]).softmax(-1)  # [R, V]
        kept = torch.full_like(walking, -1)
        trying = torch.arange(len(walking), device=device)  # of the R: those that kept no sibling yet
        for tried, of_rows in enumerate(siblings.unbind(-1), start=1):
            trying = trying[of_rows[trying] >= 0]
            if not len(trying):
                break
            node = of_rows[trying]
            token = token_ids[walking[trying], node]
            keeps = _accepts(wanted[trying, token], remaining[trying, token], uniforms[walking[trying], node])
            kept[trying[keeps]] = node[keeps]
            trying, token = trying[~keeps], token[~keeps]
            left = remaining[trying]
            wanted[trying] = residual_distribution(wanted[trying], left)
            if tried < siblings.shape[-1]:
                left.scatter_(1, token[:, None], 0.0)
                remaining[trying] = left / left.sum(-1, keepdim=True).clamp_min(torch.finfo(left.dtype).tiny)
        probs[walking] = wanted
        walking, kept = walking[kept >= 0], kept[kept >= 0]
        probs[walking] = _at_least_float32(target_scores[walking, kept + 1]).softmax(-1)
        paths[walking, depth], at[walking] = kept, kept + 1
    return paths, (paths >= 0).sum(-1), sample_from_uniform(probs, next_uniforms)


def _children(parents: Tensor) -> Tensor:
    """Children of the context, then of each node, in the order of their indices; -1 where there are fewer.

    `[B, N]` (-2 where there is no node) -> `[B, N + 1, C]`.
    """
    batch, nodes = parents.shape
    order = torch.arange(nodes, device=parents.device)
    if bool(((parents < -2) | (parents >= order)).any()):
        raise ValueError(
            f"parents: {parents.tolist()} given. Pass one index per node, -1 for a child of the context, each parent "
            "before its children, and -2 where a row has fewer nodes."
        )
    before = (parents[:, :, None] == parents[:, None]).tril(-1).sum(-1) * (parents > -2)  # siblings before each node
    children = parents.new_full((batch, nodes + 1, int(before.max()) + 1 if nodes else 1), -1)
    row, node = (parents > -2).nonzero(as_tuple=True)
    children[row, parents[row, node] + 1, before[row, node]] = node
    return children


# ---------------------------------------------------------------------------------------------------------------------
# Shared
# ---------------------------------------------------------------------------------------------------------------------


def _accepts(target_token_probs: Tensor, draft_token_probs: Tensor, uniforms: Tensor) -> Tensor:
    # As a quotient: where P = Q is subnormal, u * Q can round up to Q and reject. 0 / 0 is NaN, hence False.
    return uniforms < _at_least_float32(target_token_probs) / _at_least_float32(draft_token_probs)


def _leading_trues(verdicts: Tensor, valid: Tensor | None) -> Tensor:
    if valid is not None:
        _require_shape("valid", valid, verdicts.shape, "the shape of draft_ids")
        verdicts = verdicts & valid
    return verdicts.long().cumprod(-1).sum(-1)


def _row(probs: Tensor, positions: Tensor) -> Tensor:
    index = positions[..., None, None].expand(*positions.shape, 1, probs.shape[-1])
    return probs.gather(-2, index).squeeze(-2)  # [..., W, V] at [...] -> [..., V]


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _require_shape(name: str, tensor: Tensor, shape: Sequence[int], meaning: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: shape {tuple(tensor.shape)} given, {tuple(shape)} expected ({meaning}).")


def _require_tree(parents: Tensor) -> None:
    order = torch.arange(parents.numel(), device=parents.device)
    if parents.dim() != 1 or bool(((parents < -1) | (parents >= order)).any()):
        raise ValueError(
            f"parents: {parents.tolist()} given. Pass one index per node, -1 for a child of the context, and each "
            "parent before its children."
        )
