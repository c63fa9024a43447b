"""Rollouts: windows drafted from chosen prefixes, verified by the target, and what they earned.

All randomness is keyed by (seed, step, example): it is the same on one process, on several, and after a resume.
"""

import hashlib
from dataclasses import dataclass

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
from ..runtime.modeling_ppow import PPOWDrafter
from .objectives import without_gradients
from .rewards import group_advantages, groups_without_spread, proximity_reward, speedup_reward, throughput_reward
from .target import TargetEncoding, TrainingTarget
from .window_sampling import choose_prefixes, eligible_prefixes, text_windows, window_priorities, within_windows


def keyed_uniforms(seed: int, step: int, indices: torch.Tensor, shape: tuple[int, ...], purpose: str) -> torch.Tensor:
    """Uniform numbers in [0, 1) `[B, *shape]`, each example's drawn from its own key; on the device of `indices`."""
    rows = []
    for index in indices.tolist():
        digest = hashlib.sha256(f"{seed}:{step}:{index}:{purpose}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        rows.append(torch.rand(shape, generator=generator))
    return torch.stack(rows).to(indices.device)


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


def paired_logits(drafter: PPOWDrafter, target: TrainingTarget, draft: torch.Tensor, sources):
    """Draft and target logits on what the drafter can propose, from draft logits `[R, DV]` and `sources` `[R', H]`."""
    goal = target.logits(sources, drafter.kept_tokens)
    width = min(draft.shape[-1], goal.shape[-1])
    return draft[..., :width], goal[..., :width]


@without_gradients()
def divergence_of_prefixes(
    drafter: PPOWDrafter,
    target: TrainingTarget,
    features: torch.Tensor,
    encoding: TargetEncoding,
    wanted: torch.Tensor,
    chunk_size: int,
) -> torch.Tensor:
    """v = C(P) KL(P||Q) after the `wanted` prefixes, bool `[B, S]`, and 0 after others, `[B, S]` [paper].

    P is the target on what the drafter can propose. Infinite divergences count as 20 nats.
    """
    flat, sources = features[wanted], encoding.sources[wanted]
    parts = [features.new_zeros(0, dtype=torch.float32)]
    for start in range(0, len(flat), chunk_size):
        chunk = slice(start, start + chunk_size)
        draft, goal = paired_logits(drafter, target, drafter.draft_logits(flat[chunk]).float(), sources[chunk])
        parts.append(divergence_priority(goal.log_softmax(-1), draft.log_softmax(-1)))
    found = torch.cat(parts).nan_to_num(20.0, 20.0, 0.0).clamp(0.0, 20.0)
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


def text_judges(args, weights, inputs, first_prefix: int, context_length: int | None) -> bool:
    """Whether the text says of every window what the target would [ours].

    Where the target wrote the text at T = 0, its choice after any part of it is the text's next token: a draft is
    kept as far as it is the text, and what the target says up to the first rejection is known from reading the text.
    So no window is read by the target, unless the proximity reward asks what it says beyond. Every sequence must have
    a whole window of such text after an eligible prefix.
    """
    if args.verify_with == "target" or args.target_temperature > 0:
        return False
    if "ppow" in weights and args.proximity_weight > 0:
        return False
    return bool(written_prefixes(inputs, first_prefix, args.max_window, context_length).any(-1).all())


def written_prefixes(inputs, first_prefix: int, window: int, context_length: int | None) -> torch.Tensor:
    """Of the eligible prefixes `[B, S]`, those with a whole window after them that the target wrote at T = 0."""
    written = inputs["loss_mask"] & inputs["target_written"]
    whole = torch.zeros_like(written)
    if written.shape[1] > window:
        whole[:, : written.shape[1] - window] = written.unfold(1, window, 1)[:, 1:].all(-1)
    return whole & eligible_prefixes(written, first_prefix, window, context_length)


@without_gradients()
def collect_rollout(
    drafter,
    target: TrainingTarget,
    encoding: TargetEncoding,
    inputs,
    args,
    *,
    step,
    cost_ratio,
    adaptive,
    by_text=False,
) -> Rollout:
    """Choose prefixes, draft G windows from each, and reward them: verified by the target in one packed forward, or
    `by_text` (see [`text_judges`]), from prefixes with text of the target's after them."""
    was_training = drafter.training
    drafter.eval()
    features, cache = drafter.prefix_features(inputs["input_ids"], encoding.states)
    chosen, has_prefix = choose_starts(
        drafter, target, features, cache, encoding, inputs, args, step, adaptive, by_text
    )
    prefixes = chosen.repeat_interleave(args.num_rollouts, dim=1)
    starts = chosen if by_text else prefixes
    paths = text_windows(inputs["input_ids"], chosen, args.max_window) if by_text else None
    draws = keyed_uniforms(args.seed, step, inputs["index"], (prefixes.shape[1], args.max_window), "draft")
    try:
        draft_ids, draft_probs = draft_windows(
            drafter,
            target.vocab_size,
            features,
            cache,
            starts,
            draws,
            args.rollout_temperature,
            args.chunk_size,
            paths,
        )
    except FloatingPointError as error:
        raise ValueError(
            f"model: the drafter's logits are not finite at step {step}. Lower learning_rate, or check its weights "
            "and dtype; the last checkpoint is untouched."
        ) from error
    if paths is not None:
        sources = text_sources(encoding, chosen, args.max_window)
        texts = paths.repeat_interleave(args.num_rollouts, dim=1)
        verdicts, log_probs = (draft_ids == texts).float(), torch.zeros(texts.shape, device=texts.device)
        accepted = greedy_accepted_counts(draft_ids, texts)
    else:
        paths = draft_ids
        sources = target.verify(encoding, prefixes, draft_ids, args.verify_tokens)
        choices, log_probs, verify_probs = judge(target, sources, draft_ids, args.target_temperature, args.chunk_size)
        if args.target_temperature > 0:
            accept = keyed_uniforms(args.seed, step, inputs["index"], tuple(draft_ids.shape[1:]), "accept")
            verdicts = (accept < verify_probs / draft_probs).float()
            accepted = rejection_accepted_counts(draft_ids, draft_probs, verify_probs, accept)
        else:
            verdicts, accepted = (draft_ids == choices).float(), greedy_accepted_counts(draft_ids, choices)
    by_group = accepted.unflatten(1, (-1, args.num_rollouts)), log_probs.unflatten(1, (-1, args.num_rollouts))
    rewards = window_rewards(
        target, encoding, inputs, chosen, *by_group, args, cost_ratio,
        proximity=not by_text, one_step=drafter.config.one_step,
    )  # fmt: skip
    advantages = group_advantages(rewards["total"]).flatten(1)
    learned = first_rejection_mask(accepted, args.max_window) & has_prefix[:, None, None]
    drafter.train(was_training)
    return Rollout(prefixes, draft_ids, accepted, advantages, learned, sources, rewards, has_prefix, verdicts, paths)


def choose_starts(drafter, target, features, cache, encoding, inputs, args, step, adaptive, by_text):
    """The prefixes `[B, N]` that windows start from, and whether each sequence has any `[B]` bool."""
    limits = drafter.draft_model.first_prefix, args.max_window, drafter.config.context_length
    eligible = written_prefixes(inputs, *limits) if by_text else eligible_prefixes(inputs["loss_mask"], *limits)
    priorities = None
    if adaptive:
        if isinstance(drafter.draft_model, BlockDrafter):
            features = features_along_blocks(drafter, features, cache, inputs["input_ids"])
        divergence = divergence_of_prefixes(
            drafter, target, features, encoding, within_windows(eligible, args.max_window), args.chunk_size
        )
        priorities = window_priorities(divergence, args.max_window, inputs["attention_mask"])
    # Drawn for the longest possible row, so that the numbers do not depend on how a batch was padded.
    uniforms = keyed_uniforms(args.seed, step, inputs["index"], (args.max_length,), "prefixes")
    return choose_prefixes(eligible, uniforms[:, : eligible.shape[1]], args.num_prefixes, priorities)


def draft_windows(
    drafter: PPOWDrafter,
    vocab_size: int,
    features: torch.Tensor,
    cache,
    prefixes: torch.Tensor,
    draws: torch.Tensor,
    temperature: float,
    chunk_size: int,
    texts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of M windows after P `prefixes` `[B, P]`, M / P from each, and their probabilities, `[B, M, K]` each.

    `draws` `[B, M, K]` in [0, 1) decide the tokens. With `texts` `[B, P, K]` a window ends with its first token that
    is not the text's, and zeros follow; without, M = P. Raises `FloatingPointError` where the drafter's logits are
    not finite.
    """
    draws = draws.unflatten(1, (prefixes.shape[1], -1)).transpose(2, 3)  # [B, P, K, C]
    draft_ids, draft_probs = torch.zeros_like(draws, dtype=torch.long), torch.ones_like(draws)
    drafting = torch.ones_like(draft_ids[:, :, 0], dtype=torch.bool)  # [B, P, C]: not yet ended

    def choose(j: int, current: torch.Tensor, paths: torch.Tensor) -> torch.Tensor:
        numbers = rows_at(draws[:, :, j], paths)  # [B, A, C]
        tokens, probs = [], []
        for rows, own in zip(*(part.flatten(0, 1).split(chunk_size) for part in (current, numbers)), strict=True):
            distribution = (drafter.proposable_logits(rows, vocab_size) / temperature).softmax(-1)
            if not bool(torch.isfinite(distribution).all()):
                raise FloatingPointError("the drafter's logits are not finite")
            drawn = sample_from_uniform(distribution, own)
            tokens.append(drawn if drafter.kept_tokens is None else drafter.kept_tokens[drawn])
            probs.append(distribution.gather(-1, drawn))
        tokens, probs = torch.cat(tokens).view(numbers.shape), torch.cat(probs).view(numbers.shape)
        ended = ~rows_at(drafting, paths)
        place = paths[..., None].expand_as(tokens)
        draft_ids[:, :, j].scatter_(1, place, tokens.masked_fill(ended, 0))
        draft_probs[:, :, j].scatter_(1, place, probs.masked_fill(ended, 1.0))
        if texts is None:
            return tokens[..., 0]
        drafting.logical_and_(draft_ids[:, :, j] == texts[:, :, j, None])
        return texts[:, :, j].gather(1, paths)

    def any_drafts(j: int, _, paths: torch.Tensor) -> torch.Tensor:
        return drafting.any(-1).gather(1, paths)

    drafter.unroll(features, cache, prefixes, choose, draws.shape[2], None if texts is None else any_drafts)
    return tuple(found.transpose(2, 3).flatten(1, 2) for found in (draft_ids, draft_probs))


def text_sources(encoding: TargetEncoding, prefixes: torch.Tensor, window: int) -> torch.Tensor:
    """What the target's logits along the text after `prefixes` `[B, M]` are computed from, `[B, M, K, H]`."""
    places = (prefixes[..., None] + torch.arange(window, device=prefixes.device)).flatten(1)
    sources = encoding.sources.gather(1, places[..., None].expand(-1, -1, encoding.sources.shape[-1]))
    return sources.unflatten(1, (prefixes.shape[1], window))


def judge(target: TrainingTarget, sources, draft_ids, temperature: float, chunk_size: int):
    """The target's choices, log P and (at T > 0) verification probability of drafted tokens, `[B, M, K]` each.

    Only these three numbers of each position are kept; the vocabulary-wide tensors are made chunk by chunk.
    """
    flat, tokens = sources.flatten(0, 2), draft_ids.flatten()
    choices, log_probs, probs = [], [], []
    for start in range(0, len(flat), chunk_size):
        chunk = slice(start, start + chunk_size)
        logits = target.logits(flat[chunk])
        token = tokens[chunk, None]
        choices.append(logits.argmax(-1))
        log_probs.append(logits.log_softmax(-1).gather(-1, token)[:, 0])
        scaled = logits / temperature if temperature > 0 else logits
        probs.append(scaled.softmax(-1).gather(-1, token)[:, 0])
    return tuple(torch.cat(parts).view(draft_ids.shape) for parts in (choices, log_probs, probs))


def window_rewards(
    target, encoding, inputs, chosen, accepted, log_probs, args, cost_ratio, proximity=True, one_step=False
):
    """Each weighted part of the reward and their `total`, `[B, N, G]`, from the accepted counts `[B, N, G]` and the
    target's log P of the drafted tokens `[B, N, G, K]`. Without `proximity` that part is 0; with `one_step` one draft
    step gives a window."""
    rewards = {
        "speedup": args.speedup_weight * speedup_reward(accepted, cost_ratio, one_step),
        "throughput": args.throughput_weight * throughput_reward(accepted, args.max_window, cost_ratio, one_step),
    }
    rewards["proximity"] = torch.zeros_like(rewards["speedup"])
    if proximity and args.proximity_weight > 0 and target.needed_anywhere(bool((accepted == 0).any())):
        greedy = greedy_log_probs(target, encoding, inputs, chosen, args.max_window, args.chunk_size)
        rewards["proximity"] = proximity_reward(
            accepted, greedy, log_probs.sum(-1), args.proximity_weight, args.proximity_threshold
        )
    rewards["total"] = rewards["speedup"] + rewards["throughput"] + rewards["proximity"]
    return rewards


def greedy_log_probs(target: TrainingTarget, encoding, inputs, chosen, window: int, chunk_size: int) -> torch.Tensor:
    """log P of the target's greedy window after each chosen prefix `[B, N]`.

    Read off the text where the target wrote it at T = 0, computed with further target forwards where it did not.
    """
    input_ids, written = inputs["input_ids"], inputs["target_written"]
    length = input_ids.shape[1]
    places = chosen[..., None] + 1 + torch.arange(window, device=chosen.device)  # [B, N, K]
    inside = (places < length).all(-1)
    clamped = places.clamp_max(length - 1).flatten(1)
    from_text = inside & written.gather(1, clamped).view(places.shape).all(-1)
    if target.needed_anywhere(not bool(from_text.all())):
        return target.greedy_window_log_probs(encoding, chosen, window)
    before = (clamped - 1)[..., None].expand(-1, -1, encoding.sources.shape[-1])
    rows = encoding.sources.gather(1, before).flatten(0, 1)
    tokens = input_ids.gather(1, clamped).flatten()
    parts = []
    for start in range(0, len(rows), chunk_size):
        chunk = slice(start, start + chunk_size)
        parts.append(target.logits(rows[chunk]).log_softmax(-1).gather(-1, tokens[chunk, None])[:, 0])
    return torch.cat(parts).view(places.shape).sum(-1)
