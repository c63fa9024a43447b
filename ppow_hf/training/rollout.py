"""Rollouts: windows drafted from chosen prefixes, verified by the target, and what they earned."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..runtime.acceptance import (
    divergence_priority,
    first_rejection_mask,
    greedy_accepted_counts,
    rejection_accepted_counts,
    sample_from_uniform,
)
from ..runtime.block_model import BlockDrafter
from ..runtime.draft_models import rows_at
from ..runtime.estimator import MAX_KL
from ..runtime.modeling_ppow import PPOWDrafter
from .batch import Batch
from .chunks import without_gradients
from .rewards import group_advantages, groups_without_spread, proximity_reward, speedup_reward, throughput_reward
from .window_sampling import choose_prefixes, eligible_prefixes, text_windows, window_priorities, within_windows


@dataclass
class Rollout:
    """Windows of a batch; N prefixes, G windows from each, K tokens in each, side by side as M = N * G.

    The drafter is asked along paths. Where the text verifies, it says the same to the G windows of a prefix as far as
    they are kept: P = N paths along the text, C = G windows each. Else each window is a path: P = M, C = 1.

    Args:
        prefixes (`torch.LongTensor` of shape `(B, M)`), draft_ids (`(B, M, K)`): the windows.
        accepted (`torch.LongTensor` of shape `(B, M)`): draft tokens that the target kept, k.
        advantages (`torch.Tensor` of shape `(B, M)`): group-relative.
        learned (`torch.BoolTensor` of shape `(B, M, K)`): tokens up to and including the first rejected one.
        target_sources (`torch.Tensor` of shape `(B, P, K, H)`): what its logits along paths are computed from.
        rewards (`dict[str, torch.Tensor]`): each part and `total`, `(B, N, G)`.
        has_prefix (`torch.BoolTensor` of shape `(B,)`): false for sequences without anything to learn.
        verdicts (`torch.Tensor` of shape `(B, M, K)`): 1 where a token is kept given all before it, else 0.
        paths (`torch.LongTensor` of shape `(B, P, K)`): the tokens of each path.
        old_log_probs (`torch.Tensor` of shape `(R, C)`, *optional*): of the policy that drafted, at the places
            `[B, P, K]` that a window learns from.
    """

    prefixes: torch.Tensor
    draft_ids: torch.Tensor
    accepted: torch.Tensor
    advantages: torch.Tensor
    learned: torch.Tensor
    target_sources: torch.Tensor
    rewards: dict[str, torch.Tensor]
    has_prefix: torch.Tensor
    verdicts: torch.Tensor
    paths: torch.Tensor
    old_log_probs: torch.Tensor | None = None

    @property
    def path_prefixes(self) -> torch.Tensor:
        """The prefix `[B, P]` that each path starts from."""
        return self.prefixes[:, :: self.prefixes.shape[1] // self.paths.shape[1]]

    def along_paths(self, windows: torch.Tensor) -> torch.Tensor:
        """What windows `[B, M, K]` have at each place of the paths, `[B, P, K, C]`."""
        return windows.unflatten(1, (self.paths.shape[1], -1)).transpose(2, 3)

    def metrics(self) -> dict[str, float]:
        """Mean rewards and accepted length of the sequences that gave windows."""
        rewards = {name: values[self.has_prefix] for name, values in self.rewards.items()}
        total = rewards["total"]
        return {
            **{f"reward/{name}": rewards[name].mean().item() for name in ("speedup", "throughput", "proximity")},
            "reward/mean": total.mean().item(),
            "reward/std": total.std(unbiased=False).item(),
            "accepted_length": self.accepted[self.has_prefix].float().mean().item() + 1,
            "groups_without_spread": groups_without_spread(total).item(),
        }


@without_gradients()
def collect_rollout(batch: Batch, cost_ratio: float, adaptive: bool, by_text: bool = False) -> Rollout:
    """Choose prefixes, draft G windows from each, have them verified, and reward them.

    They are verified by the target in one packed forward or `by_text` (see [`text_can_verify`]), and then drafted from
    prefixes with text of the target's after them.
    """
    args = batch.args
    with batch.drafter.evaluating():
        features, cache = batch.drafter.prefix_features(batch.inputs["input_ids"], batch.encoding.states)
        chosen, has_prefix = choose_starts(batch, features, cache, adaptive, by_text)
        texts = text_windows(batch.inputs["input_ids"], chosen, args.max_window) if by_text else None
        drafts = draft_windows(batch, features, cache, chosen, texts)
    verdict = verify_by_target(batch, drafts) if texts is None else verify_by_text(batch, drafts, chosen, texts)
    rewards = window_rewards(batch, chosen, verdict, cost_ratio, proximity=not by_text)
    return Rollout(
        drafts.prefixes,
        drafts.ids,
        verdict.accepted,
        group_advantages(rewards["total"]).flatten(1),
        first_rejection_mask(verdict.accepted, args.max_window) & has_prefix[:, None, None],
        verdict.sources,
        rewards,
        has_prefix,
        verdict.kept,
        verdict.paths,
    )


# -- where windows start


def text_can_verify(args, weights, inputs, first_prefix: int, context_length: int | None) -> bool:
    """Whether the text says of every window what the target would [ours].

    Where the target wrote the text at T = 0, its choice after any part of it is the text's next token: a draft is
    kept as far as it is the text, and what the target says up to the first rejection is known from reading the text.
    So no window is read by the target, unless the proximity reward asks what it says beyond. Every sequence must have
    a whole window of such text after an eligible prefix.
    """
    if args.obstacle_to_text_verification(weights) is not None:
        return False
    return bool(written_prefixes(inputs, first_prefix, args.max_window, context_length).any(-1).all())


def written_prefixes(inputs, first_prefix: int, window: int, context_length: int | None) -> torch.Tensor:
    """Of the eligible prefixes `[B, S]`, those with a whole window after them that the target wrote at T = 0."""
    written = inputs["loss_mask"] & inputs["target_written"]
    whole = torch.zeros_like(written)
    if written.shape[1] > window:
        whole[:, : written.shape[1] - window] = written.unfold(1, window, 1)[:, 1:].all(-1)
    return whole & eligible_prefixes(written, first_prefix, window, context_length)


def choose_starts(
    batch: Batch, features: torch.Tensor, cache, adaptive: bool, by_text: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The prefixes `[B, N]` that windows start from, and whether each sequence has any `[B]` bool."""
    drafter, args, inputs = batch.drafter, batch.args, batch.inputs
    limits = drafter.draft_model.first_prefix, args.max_window, drafter.config.context_length
    eligible = written_prefixes(inputs, *limits) if by_text else eligible_prefixes(inputs["loss_mask"], *limits)
    priorities = None
    if adaptive:
        if isinstance(drafter.draft_model, BlockDrafter):
            features = features_along_blocks(drafter, features, cache, inputs["input_ids"])
        divergence = divergence_of_prefixes(batch, features, within_windows(eligible, args.max_window))
        priorities = window_priorities(divergence, args.max_window, inputs["attention_mask"])
    # Drawn for the longest possible row, so that the numbers do not depend on how a batch was padded.
    uniforms = batch.uniforms((args.max_length,), "prefixes")[:, : eligible.shape[1]]
    return choose_prefixes(eligible, uniforms, args.num_prefixes, priorities)


@without_gradients()
def divergence_of_prefixes(batch: Batch, features: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """v = C(P) KL(P||Q) after the `wanted` prefixes, bool `[B, S]`, and 0 after others, `[B, S]` [paper].

    P is the target on what the drafter can propose. Infinite divergences count as MAX_KL.
    """
    flat, sources, size = features[wanted], batch.encoding.sources[wanted], batch.args.chunk_size
    parts = [features.new_zeros(0, dtype=torch.float32)]
    for own, target_sources in zip(flat.split(size), sources.split(size), strict=True):
        if not len(own):  # of no rows split makes one chunk
            break
        draft, target_logits = batch.logits(own, target_sources)
        parts.append(divergence_priority(target_logits.log_softmax(-1), draft.log_softmax(-1)))
    found = torch.cat(parts).nan_to_num(MAX_KL, MAX_KL, 0.0).clamp(0.0, MAX_KL)
    return found.new_zeros(wanted.shape).masked_scatter(wanted, found)


def features_along_blocks(
    drafter: PPOWDrafter, features: torch.Tensor, cache, input_ids: torch.Tensor
) -> torch.Tensor:
    """Features `[B, S, h]` of a block drafter, whose blocks follow each other along the text [ours].

    The distribution after a prefix is that of the block around it, so many tokens on as it stands in the block: a
    block for each prefix would cost K times as much. K neighbours, a window, have each place of a block once.
    """
    first, length, size = drafter.draft_model.first_prefix, features.shape[1], drafter.draft_model.block_size
    starts = torch.arange(first, length, size, device=features.device).expand(len(features), -1)
    texts = text_windows(input_ids, starts, size)
    along = drafter.unroll(features, cache, starts, lambda j, *_: texts[:, :, j], size).flatten(1, 2)
    return torch.cat([along.new_zeros(len(along), first, along.shape[-1]), along], dim=1)[:, :length]


# -- drafting


class Drafts(NamedTuple):
    """Drafted windows, M = N * G.

    Args:
        prefixes (`torch.LongTensor` of shape `(B, M)`): what they follow.
        ids (`torch.LongTensor` of shape `(B, M, K)`), probs (`torch.Tensor` of shape `(B, M, K)`): their tokens, and
            the probability that the drafter drew each with.
    """

    prefixes: torch.Tensor
    ids: torch.Tensor
    probs: torch.Tensor


def draft_windows(
    batch: Batch, features: torch.Tensor, cache, chosen: torch.Tensor, texts: torch.Tensor | None
) -> Drafts:
    """G windows after each of the `chosen` prefixes `[B, N]`, drawn at `rollout_temperature`.

    Without `texts` each window is drafted by itself, P = M paths. With `texts` `[B, N, K]`, what the text goes on
    with, the G of a prefix are drawn along it, P = N paths: a window ends with its first token that is not the
    text's, and zeros follow. Raises `ValueError` where the drafter's logits are not finite.
    """
    args = batch.args
    prefixes = chosen.repeat_interleave(args.num_rollouts, dim=1)
    starts = prefixes if texts is None else chosen
    draws = batch.uniforms((prefixes.shape[1], args.max_window), "draft")
    draws = draws.unflatten(1, (starts.shape[1], -1)).transpose(2, 3)  # [B, P, K, C]
    ids, probs = torch.zeros_like(draws, dtype=torch.long), torch.ones_like(draws)
    drafting = torch.ones_like(ids[:, :, 0], dtype=torch.bool)  # [B, P, C]: not yet ended

    def choose(j: int, current: torch.Tensor, paths: torch.Tensor) -> torch.Tensor:
        tokens, own_probs = draw_tokens(batch, current, rows_at(draws[:, :, j], paths))
        ended = ~rows_at(drafting, paths)
        place = paths[..., None].expand_as(tokens)
        ids[:, :, j].scatter_(1, place, tokens.masked_fill(ended, 0))
        probs[:, :, j].scatter_(1, place, own_probs.masked_fill(ended, 1.0))
        if texts is None:
            return tokens[..., 0]
        drafting.logical_and_(ids[:, :, j] == texts[:, :, j, None])
        return texts[:, :, j].gather(1, paths)

    def any_drafts(j: int, _, paths: torch.Tensor) -> torch.Tensor:
        return drafting.any(-1).gather(1, paths)

    goes_on = None if texts is None else any_drafts
    batch.drafter.unroll(features, cache, starts, choose, args.max_window, goes_on)
    return Drafts(prefixes, *(found.transpose(2, 3).flatten(1, 2) for found in (ids, probs)))


def draw_tokens(batch: Batch, features: torch.Tensor, draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that `draws` `[B, A, C]` in [0, 1) decide after `features` `[B, A, h]`, and their probabilities,
    `[B, A, C]` each. Raises `ValueError` where the drafter's logits are not finite."""
    drafter, size = batch.drafter, batch.args.chunk_size
    tokens, probs = [], []
    for rows, numbers in zip(features.flatten(0, 1).split(size), draws.flatten(0, 1).split(size), strict=True):
        logits = drafter.proposable_logits(rows, batch.target.vocab_size)
        distribution = (logits / batch.args.rollout_temperature).softmax(-1)
        if not bool(torch.isfinite(distribution).all()):
            raise ValueError(
                f"model: the drafter's logits are not finite at step {batch.step}. Lower learning_rate, or check its "
                "weights and dtype; the last checkpoint is untouched."
            )
        drawn = sample_from_uniform(distribution, numbers)
        tokens.append(drawn if drafter.kept_tokens is None else drafter.kept_tokens[drawn])
        probs.append(distribution.gather(-1, drawn))
    return torch.cat(tokens).view(draws.shape), torch.cat(probs).view(draws.shape)


# -- verification


class Verdict(NamedTuple):
    """What the target says of drafted windows; P paths as of [`Rollout`].

    Args:
        accepted (`torch.LongTensor` of shape `(B, M)`): draft tokens that are kept, k.
        kept (`torch.Tensor` of shape `(B, M, K)`): 1 where a token is kept given all before it, else 0.
        log_probs (`torch.Tensor` of shape `(B, M, K)`): the target's log P of each; 0 where the text verifies.
        sources (`torch.Tensor` of shape `(B, P, K, H)`): what its logits along the paths are computed from.
        paths (`torch.LongTensor` of shape `(B, P, K)`): the tokens of each path.
    """

    accepted: torch.Tensor
    kept: torch.Tensor
    log_probs: torch.Tensor
    sources: torch.Tensor
    paths: torch.Tensor


def verify_by_text(batch: Batch, drafts: Drafts, chosen: torch.Tensor, texts: torch.Tensor) -> Verdict:
    """A draft is kept as far as it is the text `[B, N, K]` after its chosen prefix `[B, N]`."""
    per_window = texts.repeat_interleave(batch.args.num_rollouts, dim=1)
    kept = (drafts.ids == per_window).float()
    places = chosen[..., None] + torch.arange(texts.shape[2], device=chosen.device)
    sources = rows_at(batch.encoding.sources, places.flatten(1)).unflatten(1, texts.shape[1:])
    return Verdict(greedy_accepted_counts(drafts.ids, per_window), kept, torch.zeros_like(kept), sources, texts)


def verify_by_target(batch: Batch, drafts: Drafts) -> Verdict:
    """The target reads all windows in packed forwards; rejection sampling where `target_temperature` is above 0."""
    args = batch.args
    sources = batch.target.verify(batch.encoding, drafts.prefixes, drafts.ids, args.verify_tokens)
    choices, log_probs, probs = score_tokens(batch, sources, drafts.ids)
    if args.target_temperature > 0:
        uniforms = batch.uniforms(tuple(drafts.ids.shape[1:]), "accept")
        kept = uniforms < probs / drafts.probs
        accepted = rejection_accepted_counts(drafts.ids, drafts.probs, probs, uniforms)
    else:
        kept, accepted = drafts.ids == choices, greedy_accepted_counts(drafts.ids, choices)
    return Verdict(accepted, kept.float(), log_probs, sources, drafts.ids)


def score_tokens(batch: Batch, sources: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The target's choices, log P and (at T > 0) verification probability of `tokens` `[B, M, K]`, of that shape each.

    Only these three numbers of each position are kept; the vocabulary-wide tensors are made chunk by chunk.
    """
    temperature, size = batch.args.target_temperature, batch.args.chunk_size
    choices, log_probs, probs = [], [], []
    for rows, own in zip(sources.flatten(0, 2).split(size), tokens.flatten()[:, None].split(size), strict=True):
        logits = batch.target.logits(rows)
        choices.append(logits.argmax(-1))
        log_probs.append(logits.log_softmax(-1).gather(-1, own)[:, 0])
        scaled = logits / temperature if temperature > 0 else logits
        probs.append(scaled.softmax(-1).gather(-1, own)[:, 0])
    return tuple(torch.cat(parts).view(tokens.shape) for parts in (choices, log_probs, probs))


# -- rewards


def window_rewards(
    batch: Batch, chosen: torch.Tensor, verdict: Verdict, cost_ratio: float, proximity: bool
) -> dict[str, torch.Tensor]:
    """Each weighted part of the reward of the windows from the `chosen` prefixes `[B, N]`, and their `total`,
    `[B, N, G]`. Without `proximity` that part is 0."""
    args, one_step = batch.args, batch.drafter.config.one_step
    accepted, log_probs = (
        part.unflatten(1, (-1, args.num_rollouts)) for part in (verdict.accepted, verdict.log_probs)
    )
    rewards = {
        "speedup": args.speedup_weight * speedup_reward(accepted, cost_ratio, one_step),
        "throughput": args.throughput_weight * throughput_reward(accepted, args.max_window, cost_ratio, one_step),
    }
    rewards["proximity"] = torch.zeros_like(rewards["speedup"])
    if proximity and args.proximity_weight > 0 and batch.target.needed_anywhere(bool((accepted == 0).any())):
        greedy = greedy_log_probs(batch, chosen)
        rewards["proximity"] = proximity_reward(
            accepted, greedy, log_probs.sum(-1), args.proximity_weight, args.proximity_threshold
        )
    rewards["total"] = rewards["speedup"] + rewards["throughput"] + rewards["proximity"]
    return rewards


def greedy_log_probs(batch: Batch, chosen: torch.Tensor) -> torch.Tensor:
    """log P of the target's greedy window after each chosen prefix `[B, N]`.

    Read off the text where the target wrote it at T = 0, computed with further target forwards where it did not.
    """
    input_ids, written, window = batch.inputs["input_ids"], batch.inputs["target_written"], batch.args.max_window
    length = input_ids.shape[1]
    places = chosen[..., None] + 1 + torch.arange(window, device=chosen.device)  # [B, N, K]
    inside = (places < length).all(-1)
    clamped = places.clamp_max(length - 1).flatten(1)
    from_text = inside & written.gather(1, clamped).view(places.shape).all(-1)
    if batch.target.needed_anywhere(not bool(from_text.all())):
        return batch.target.greedy_window_log_probs(batch.encoding, chosen, window)
    rows, tokens = rows_at(batch.encoding.sources, clamped - 1).flatten(0, 1), input_ids.gather(1, clamped).flatten()
    size = batch.args.chunk_size
    parts = [
        batch.target.logits(own).log_softmax(-1).gather(-1, token)[:, 0]
        for own, token in zip(rows.split(size), tokens[:, None].split(size), strict=True)
    ]
    return torch.cat(parts).view(places.shape).sum(-1)
