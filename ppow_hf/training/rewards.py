"""Rewards of drafted windows and the advantages made of them. Pure tensors.

B sequences, N chosen prefixes of each, G rollouts from every prefix, W tokens in a window.
"""

import torch


def speedup_reward(accepted: torch.Tensor, cost_ratio: float, one_step: bool = False) -> torch.Tensor:
    """R_speedup = k / (k * gamma + 1) [paper]: it charges accepted tokens only. Any shape.

    With `one_step`, where one draft step gives a whole window, k / (gamma + 1) [ours].
    """
    accepted = accepted.float()
    return accepted / ((1 if one_step else accepted) * cost_ratio + 1)


def throughput_reward(accepted: torch.Tensor, window: int, cost_ratio: float, one_step: bool = False) -> torch.Tensor:
    """R_throughput = (k + 1) / (W * gamma + 1) [ours]: what a round yields per one-token target forward.

    With `one_step`, where one draft step gives a whole window, (k + 1) / (gamma + 1).
    """
    return (accepted.float() + 1) / ((1 if one_step else window) * cost_ratio + 1)


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


def position_advantages(values: torch.Tensor, reached: torch.Tensor) -> torch.Tensor:
    """Values `[..., G, K]` minus the mean of the group's other windows that reached the position; 0 without any.

    `reached` `[..., G, K]` bool. The mean of the others is a baseline without bias (leave-one-out).
    """
    counted = values * reached
    others = (reached.sum(-2, keepdim=True) - reached.long()).to(values.dtype)
    baseline = (counted.sum(-2, keepdim=True) - counted) / others.clamp_min(1)
    return torch.where(reached & (others > 0), values - baseline, torch.zeros_like(values))


def group_advantages(rewards: torch.Tensor, epsilon: float = 1e-4) -> torch.Tensor:
    """Group-relative advantages (r - mean) / (std + epsilon) `[..., G]` of rewards `[..., G]` [paper].

    They are 0 in a group whose rewards are all equal.
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    # The mean of equal numbers can be a rounding off, which a standard deviation near zero would blow up.
    centred = centred.masked_fill((rewards == rewards[..., :1]).all(-1, keepdim=True), 0.0)
    return centred / (rewards.std(-1, keepdim=True, unbiased=False) + epsilon)


def groups_without_spread(rewards: torch.Tensor) -> torch.Tensor:
    """Share of groups whose rewards are all equal, which teach nothing. `[..., G]` -> scalar."""
    return (rewards.amax(-1) == rewards.amin(-1)).float().mean()
