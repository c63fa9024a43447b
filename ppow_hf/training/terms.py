"""The terms of objectives, as pure functions of logits.

R rows are positions to be learned, DV is the drafter's vocabulary.
"""

import torch


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
    target = (target_logits.float() / target_temperature).softmax(-1)
    followed = (label_probs / target.gather(-1, labels)[:, 0].clamp_min(1e-9)).clamp_max(1.0)
    return torch.minimum(target, draft).sum(-1), followed * known


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
