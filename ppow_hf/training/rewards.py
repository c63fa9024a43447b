"""Rewards of drafted windows and the advantages made of them. Pure tensors.

B sequences, N chosen prefixes of each, G rollouts from every prefix, W tokens in a window.
"""

import torch


def speedup_reward(accepted: torch.Tensor, cost_ratio: float) -> torch.Tensor:
    """R_speedup = k / (k * gamma + 1) [paper]: it charges accepted tokens only. Any shape."""
    accepted = accepted.float()
    return accepted / (accepted * cost_ratio + 1)


def throughput_reward(accepted: torch.Tensor, window: int, cost_ratio: float) -> torch.Tensor:
    """R_throughput = (k + 1) / (W * gamma + 1) [ours]: what a round yields per one-token target forward."""
    return (accepted.float() + 1) / (window * cost_ratio + 1)


def proximity_reward(
    accepted: torch.Tensor,
    greedy_log_prob: torch.Tensor,
    draft_log_prob: torch.Tensor,
    scale: float,
    threshold: float,
) -> torch.Tensor:
    """R_dist = eta * 1[Delta < epsilon] where k = 0, else 0 [paper].

    Delta = log P(target's own greedy window) - log P(drafted window), each summed over the window under the target.

    Args:
        accepted, draft_log_prob (`torch.Tensor` of shape `(..., G)`): k, and log P(drafted window) in nats.
        greedy_log_prob (`torch.Tensor` of shape `(...)`): log P of the greedy window of each prefix, in nats.
        scale, threshold (`float`): eta, and epsilon in nats.
    """
    near = (greedy_log_prob[..., None] - draft_log_prob) < threshold
    return scale * (near & (accepted == 0)).float()


def count_probabilities(acceptance: torch.Tensor) -> torch.Tensor:
    """Probabilities of k = 0..K accepted tokens `[..., K + 1]` from those of each token, given all before `[..., K]`.

    Rewards averaged with them stand in place of a sampled verdict (Rao-Blackwell) [ours].
    """
    ones = torch.ones_like(acceptance[..., :1])
    return torch.cat([ones, acceptance.cumprod(-1)], -1) * torch.cat([1 - acceptance, ones], -1)


def candidate_rewards(rewards: torch.Tensor, size: int, kind: str) -> torch.Tensor:
    """Rewards `[..., G]` of windows that are verified `size` at a time, the longest kept [ours].

    `"best"`: each window gets the best reward of its candidates; `"marginal"`: what its candidates would lose without
    it, 0 but for a best one that has no equal. Each `size` windows in a row are candidates of one round.
    """
    sets = rewards.unflatten(-1, (-1, size))
    best = sets.amax(-1, keepdim=True)
    if kind == "best":
        return best.expand_as(sets).flatten(-2)
    if kind != "marginal":
        raise ValueError(f"group_reward: {kind!r} is not one of ['own', 'best', 'marginal'].")
    if size == 1:
        return rewards
    without = torch.stack([sets[..., [i for i in range(size) if i != m]].amax(-1) for m in range(size)], dim=-1)
    return (best - without).flatten(-2)


def return_to_go(acceptance: torch.Tensor) -> torch.Tensor:
    """Tokens kept from each position on, given that it was reached: sum_{i>=j} prod_{l=j..i} a_l.

    `acceptance` `[..., K]` holds verdicts (0, 1) or probabilities of each token given all before it.
    """
    values = torch.zeros_like(acceptance)
    behind = torch.zeros_like(acceptance[..., 0])
    for j in reversed(range(acceptance.shape[-1])):
        behind = acceptance[..., j] * (1 + behind)
        values[..., j] = behind
    return values


def position_advantages(values: torch.Tensor, reached: torch.Tensor) -> torch.Tensor:
    """Values `[..., G, K]` minus the mean of the group's other windows that reached the position; 0 without any.

    `reached` `[..., G, K]` bool. The mean of the others is a baseline without bias (leave-one-out).
    """
    counted = values * reached
    others = (reached.sum(-2, keepdim=True) - reached.long()).to(values.dtype)
    baseline = (counted.sum(-2, keepdim=True) - counted) / others.clamp_min(1)
    return torch.where(reached & (others > 0), values - baseline, torch.zeros_like(values))


def group_advantages(rewards: torch.Tensor, kind: str = "standardized", epsilon: float = 1e-4) -> torch.Tensor:
    """Group-relative advantages `[..., G]` of rewards `[..., G]`; 0 in a group whose rewards are all equal.

    `"standardized"`: (r - mean) / (std + epsilon) [paper]; `"leave_one_out"`: r minus the mean of the others.
    """
    size = rewards.shape[-1]
    centred = rewards - rewards.mean(-1, keepdim=True)
    # The mean of equal numbers can be a rounding off, which a standard deviation near zero would blow up.
    centred = centred.masked_fill((rewards == rewards[..., :1]).all(-1, keepdim=True), 0.0)
    if kind == "standardized":
        return centred / (rewards.std(-1, keepdim=True, unbiased=False) + epsilon)
    if kind == "leave_one_out":
        return centred * size / (size - 1) if size > 1 else torch.zeros_like(rewards)
    raise ValueError(f"advantages: {kind!r} is not one of ['standardized', 'leave_one_out'].")


def groups_without_spread(rewards: torch.Tensor) -> torch.Tensor:
    """Share of groups whose rewards are all equal, which teach nothing. `[..., G]` -> scalar."""
    return (rewards.amax(-1) == rewards.amin(-1)).float().mean()
