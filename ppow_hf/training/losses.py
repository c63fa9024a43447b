"""An objective's weighted terms on a batch: along the text, and along the windows that the drafter drafted.

Puts the pure functions of objectives.py and rewards.py on features and rollouts; returns a loss and what is logged.
Knows nothing about optimizers, steps or processes.
"""

import functools
from collections.abc import Mapping

import torch

from ..runtime.acceptance import entropy
from ..runtime.modeling_ppow import PPOWDrafter
from .arguments import PPOWTrainingArguments
from .objectives import (
    clipped_policy_loss,
    cross_entropy,
    expected_acceptance_loss,
    expected_length_gradients,
    forward_kl,
    keep_probabilities,
    lk_hybrid,
    negative_log_acceptance,
    reverse_kl,
    sum_over_chunks,
    total_variation,
    visit_probabilities,
)
from .rewards import position_advantages, return_to_go
from .rollout import Rollout, paired_logits
from .target import FrozenTarget, TargetEncoding
from .window_sampling import text_windows

Loss = tuple[torch.Tensor, dict[str, float]]


def draft_labels(drafter: PPOWDrafter, labels: torch.Tensor, width: int) -> torch.Tensor:
    """Token ids of the target as ids of the draft vocabulary; -100 where it has no such token."""
    kept = drafter.kept_tokens
    if kept is not None:
        places = torch.searchsorted(kept, labels).clamp_max(len(kept) - 1)
        return torch.where(kept[places] == labels, places, -100)
    return torch.where(labels < width, labels, -100)


def text_terms(
    names,
    draft: torch.Tensor,
    goal: torch.Tensor,
    labels: torch.Tensor,
    args: PPOWTrainingArguments,
    by_length: torch.Tensor | None = None,
    greedy: torch.Tensor | None = None,
    goal_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The terms `names` of each row, `[len(names), R]`, from draft and target logits and the text's tokens.

    With `goal_rows` `[R]` a row's target logits are `goal[goal_rows]`: rows may share them. `by_length` `[R, 2]`
    weighs what `expected_length` is made of, see [`length_weights`], and `greedy` is as in [`greedy_text`].
    """

    @functools.cache
    def goals() -> torch.Tensor:
        return goal if goal_rows is None else goal[goal_rows]

    def lengthening() -> torch.Tensor:
        assert by_length is not None
        temperatures = args.rollout_temperature, args.target_temperature
        kept, followed = keep_probabilities(goals(), draft, labels, *temperatures, greedy)
        # The second part has a gradient and no value: the first one, of all rows, is the expected length already.
        return -(by_length[:, 0] * kept + by_length[:, 1] * (followed - followed.detach()))

    functions = {
        "ce": lambda: cross_entropy(draft, labels),
        "kl": lambda: forward_kl(goal, draft, goal_rows),
        "tv": lambda: total_variation(goals(), draft),
        "lk": lambda: negative_log_acceptance(goals(), draft),
        "lk_hybrid": lambda: lk_hybrid(goals(), draft, args.lk_decay),
        "expected_length": lengthening,
    }
    return torch.stack([functions[name]() for name in names])


@torch.no_grad()
def length_weights(
    drafter: PPOWDrafter,
    target: FrozenTarget,
    args: PPOWTrainingArguments,
    learned: torch.Tensor,
    features: torch.Tensor,
    sources: torch.Tensor,
    labels: torch.Tensor,
    greedy: torch.Tensor | None,
    places: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights `[R, 2]` of each row's two keep probabilities: by them the rows' sum has the gradient of the mean share
    of a window that is kept, [`expected_length`] over its length.

    `learned` `[B, M, J]` is where the rows lie, in its order or in `order` of that; of features along the text (J = 1)
    every `max_window` in a row are a window. The other arguments are of the rows; with `places` `[R]`, ascending,
    their sources are `sources[places]`.
    """
    rows = []
    for start in range(0, len(features), args.chunk_size):
        part = slice(start, start + args.chunk_size)
        draft = drafter.draft_logits(features[part]).float()
        if places is None:
            draft, goal = paired_logits(drafter, target, draft, sources[part])
        else:  # rows of one place share its target logits
            own_places, goal_rows = torch.unique_consecutive(places[part], return_inverse=True)
            draft, goal = paired_logits(drafter, target, draft, sources[own_places])
            goal = goal[goal_rows]
        own = draft_labels(drafter, labels[part], draft.shape[-1])
        temperatures = args.rollout_temperature, args.target_temperature
        both = keep_probabilities(goal, draft, own, *temperatures, None if greedy is None else greedy[part])
        rows.append(torch.stack(both, -1))
    order = torch.arange(len(features), device=features.device) if order is None else order
    windows = torch.zeros(*learned.shape, 2, device=features.device)
    windows[learned] = torch.cat([windows[:0, 0, 0], *rows])[order.argsort()]
    window, count = learned.shape[2], learned.shape[1]
    if window > 1:
        weights = torch.stack(expected_length_gradients(*windows.unbind(-1)), -1)
    else:
        window = args.max_window
        along = torch.nn.functional.pad(windows[:, :, 0], (0, 0, 0, window - 1))
        by_window = torch.stack(expected_length_gradients(*along.unfold(1, window, 1).unbind(2)), -1)
        weights = torch.zeros_like(along)
        for offset in range(window):
            weights[:, offset : offset + count] += by_window[:, :, offset]
        weights = weights[:, :count, None]
    return weights[learned][order] / window


def learned_windows(inputs: Mapping[str, torch.Tensor], prefixes: torch.Tensor, steps: int) -> torch.Tensor:
    """Which of the text's `steps` tokens behind `prefixes` `[B, M]` are learned, `[B, M, steps]`."""
    length = inputs["input_ids"].shape[1]
    places = prefixes[..., None] + 1 + torch.arange(steps, device=prefixes.device)
    learned = inputs["loss_mask"].gather(1, places.clamp_max(length - 1).flatten(1)).view(places.shape)
    return learned & (places < length)


@torch.no_grad()
def visited_windows(
    drafter: PPOWDrafter,
    target: FrozenTarget,
    args: PPOWTrainingArguments,
    inputs: Mapping[str, torch.Tensor],
    encoding: TargetEncoding,
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows of `steps` tokens that decoding the text would draft: their prefixes `[B, M]`, and which of their
    tokens it would come to, `[B, M, steps]`. Rows with fewer windows have ones that nothing comes to [ours].

    Rounds begin at the first prefix and behind each other. At `target_temperature` 0, or of [`greedy_text`], a token
    is kept if it is the drafter's choice; else as rejection sampling keeps the text's token, by lot. Where nothing is
    learned, nothing is kept.
    """
    input_ids, first = inputs["input_ids"], drafter.draft_model.first_prefix
    prefixes = torch.arange(first, input_ids.shape[1] - 1, device=input_ids.device).expand(len(input_ids), -1)
    texts = text_windows(input_ids, prefixes, steps + 1)
    learned = learned_windows(inputs, prefixes, steps)
    kept = torch.zeros(learned.shape, device=input_ids.device)
    greedy, temperatures = greedy_text(inputs, args), (args.rollout_temperature, args.target_temperature)
    by_lot = args.target_temperature > 0 or greedy is not None
    if greedy is None:
        greedy = torch.full_like(inputs["loss_mask"], args.target_temperature == 0)
    else:
        temperatures = 1.0, 1.0

    def keeps(j: int, features: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        verdicts = torch.zeros_like(windows, dtype=torch.bool)
        asked = learned[:, :, j] & (kept[:, :, j - 1] > 0) if j else learned[:, :, 0]
        row, place = asked.gather(1, windows).nonzero(as_tuple=True)
        own = windows[row, place]
        for part in torch.arange(len(row), device=row.device).split(args.chunk_size):
            here = row[part], own[part]
            draft = drafter.draft_logits(features[row[part], place[part]]).float()
            ends = prefixes[here] + j
            labels = draft_labels(drafter, texts[:, :, j][here], draft.shape[-1])
            found = draft.argmax(-1) == labels
            if by_lot:
                drawn = ~greedy[row[part], ends + 1]
                draft, goal = paired_logits(drafter, target, draft, encoding.sources[row[part], ends])
                chances = keep_probabilities(goal, draft, labels, *temperatures)[1]
                found = torch.where(drawn, torch.rand_like(chances) < chances, found)
            verdicts[row[part], place[part]] = found
        kept[:, :, j].scatter_(1, windows, verdicts.to(kept))
        return verdicts

    features, cache = drafter.prefix_features(input_ids, encoding.states, inputs["attention_mask"])
    drafter.unroll(
        features, cache, prefixes, lambda j, _, windows: texts[:, :, j].gather(1, windows), steps + 1, keeps
    )
    visited = (visit_probabilities(kept) > 0) & learned
    begins = visited.any(-1)
    chosen = (~begins).long().argsort(dim=1, stable=True)[:, : int(begins.sum(1).max())]
    return prefixes.gather(1, chosen), visited.gather(1, chosen[..., None].expand(-1, -1, steps))


def greedy_text(inputs: Mapping[str, torch.Tensor], args: PPOWTrainingArguments) -> torch.Tensor | None:
    """Which tokens `[B, S]` are verified at T = 0, where texts are verified as they were written; else `None`."""
    return inputs["target_written"] if args.verify_text_as_written else None


def text_loss(
    drafter: PPOWDrafter,
    target: FrozenTarget,
    args: PPOWTrainingArguments,
    weights: Mapping[str, float],
    features: torch.Tensor,
    prefixes: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
    sources: torch.Tensor,
    visited: torch.Tensor | None = None,
) -> Loss:
    """Weighted sum over `features` `[B, M, J, h]` along the text behind `prefixes` `[B, M]`; steps j decay, or those
    that are `visited` `[B, M, J]` bool count alike and others nothing.

    `expected_length` is of whole windows: the share of them that is kept, or of those that anything of is visited the
    kept tokens, so that all terms of visited windows are sums over the text.
    """
    input_ids = inputs["input_ids"]
    steps = torch.arange(features.shape[2], device=input_ids.device)
    places = prefixes[..., None] + steps  # the prefix that ends where step j's distribution begins
    learned = learned_windows(inputs, prefixes, features.shape[2])
    names = list(weights)
    of_windows = "expected_length" in names
    whole = torch.tensor([name == "expected_length" for name in names], device=input_ids.device)
    of_steps = (args.unroll_decay**steps).expand(places.shape) / (args.unroll_decay**steps).sum()
    if visited is not None:
        learned, of_steps = learned & (visited.any(-1, keepdim=True) if of_windows else visited), visited.float()
    coefficients = torch.tensor(list(weights.values()), device=input_ids.device)
    # Steps of different prefixes that end at one place are learned together: they share the target's distribution.
    numbers = torch.arange(len(input_ids), device=input_ids.device)[:, None, None] * input_ids.shape[1] + places
    numbered = numbers[learned]
    order = numbered.argsort()
    flat_sources = sources.flatten(0, 1)
    of_rows = features[learned][order], numbered[order], input_ids.flatten()[numbered[order] + 1]
    greedy = greedy_text(inputs, args)
    greedy = None if greedy is None else greedy.flatten()[numbered[order] + 1]
    of_steps, by_length = of_steps[learned][order], None
    if of_windows:
        along, here, labels = of_rows[0].detach(), of_rows[1], of_rows[2]
        by_length = length_weights(drafter, target, args, learned, along, flat_sources, labels, greedy, here, order)
        by_length = by_length * (1 if visited is None else features.shape[2])

    def chunk(features, numbers, labels, of_steps, is_first, by_length, greedy):
        own_places, goal_rows = torch.unique_consecutive(numbers, return_inverse=True)
        draft = drafter.draft_logits(features).float()
        draft, goal = paired_logits(drafter, target, draft, flat_sources[own_places])
        labels = draft_labels(drafter, labels, draft.shape[-1])
        terms = text_terms(names, draft, goal, labels, args, by_length, greedy, goal_rows)
        loss = (coefficients[:, None] * terms * torch.where(whole[:, None], 1, of_steps)).sum()
        with torch.no_grad():
            draft, goal, noted = draft[is_first], goal[goal_rows[is_first]], terms[:, is_first]
            agreed = (draft.argmax(-1) == goal.argmax(-1)).to(loss)
            kl = noted[names.index("kl")] if "kl" in names else forward_kl(goal, draft)
            noted = torch.where(whole, terms.sum(-1), noted.sum(-1))
            sums = torch.stack([kl.sum(), agreed.sum(), is_first.sum().to(loss), *noted])
        return torch.cat([loss[None], sums])

    totals = sum_over_chunks(
        chunk,
        args.chunk_size,
        drafter.parameters(),
        *of_rows,
        of_steps,
        (learned.nonzero()[:, 2] == 0)[order],
        by_length,
        greedy,
    )
    kl, agreed, count, *values = totals[1:].detach().tolist()
    metrics = {"kl": kl, "agreement": agreed} | dict(zip(names, values, strict=True))
    return totals[0], {name: value / max(count, 1) for name, value in metrics.items()}


def window_text_loss(
    drafter: PPOWDrafter,
    target: FrozenTarget,
    args: PPOWTrainingArguments,
    weights: Mapping[str, float],
    features: torch.Tensor,
    chosen: torch.Tensor,
    has_prefix: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
    sources: torch.Tensor,
) -> Loss:
    """The text's terms along the learned text behind the prefixes `[B, N]`, divided by N * K; sum over sequences."""
    input_ids = inputs["input_ids"]
    length = input_ids.shape[1]
    places = chosen[..., None] + torch.arange(features.shape[2], device=chosen.device)
    next_places = (places + 1).clamp_max(length - 1)
    real = inputs["loss_mask"].gather(1, next_places.flatten(1)).view(places.shape)
    real = real & (places + 1 < length) & has_prefix[:, None, None]
    rows = torch.arange(len(chosen), device=chosen.device)[:, None, None].expand(places.shape)[real]
    names = list(weights)
    coefficients = torch.tensor(list(weights.values()), device=input_ids.device)
    of_rows = features[real], sources[rows, places[real]], input_ids[rows, next_places[real]]
    greedy, by_length = greedy_text(inputs, args), None
    greedy = None if greedy is None else greedy[rows, next_places[real]]
    if "expected_length" in names:  # divided by the window below, where the other terms are means over its tokens
        by_length = length_weights(drafter, target, args, real, of_rows[0].detach(), *of_rows[1:], greedy)
        by_length = by_length * features.shape[2]

    def chunk(features, sources, labels, by_length, greedy):
        draft, goal = paired_logits(drafter, target, drafter.draft_logits(features).float(), sources)
        labels = draft_labels(drafter, labels, draft.shape[-1])
        sums = text_terms(names, draft, goal, labels, args, by_length, greedy).sum(-1)
        return torch.cat([(coefficients * sums).sum()[None], sums.detach()])

    totals = sum_over_chunks(chunk, args.chunk_size, drafter.parameters(), *of_rows, by_length, greedy)
    count = max(int(real.sum()), 1)
    metrics = {f"text_{name}": value / count for name, value in zip(names, totals[1:].tolist(), strict=True)}
    return totals[0] / (chosen.shape[1] * features.shape[2]), metrics


def window_loss(
    drafter: PPOWDrafter,
    target: FrozenTarget,
    args: PPOWTrainingArguments,
    weights: Mapping[str, float],
    features: torch.Tensor,
    rollout: Rollout,
) -> Loss:
    """The terms on drafted windows, from `features` `[B, M, K, h]` along them; sum over sequences.

    Learned are tokens up to and including the first rejected one. Divided by N * G * K, so that every sequence weighs
    the same and long windows are not favoured. `ppow` brings KL(P||Q) by `kl_coef`.
    """
    reached = rollout.learned
    windows, window = rollout.draft_ids.shape[1:]
    distils = [name for name in ("opd", "opd_reverse") if name in weights]
    rows = reached
    if distils and args.on_policy_positions == "all":
        rows = rollout.has_prefix[:, None, None].expand(reached.shape)
    policies = [name for name in ("ppow", "token_rl", "reinforce") if name in weights]
    advantages = torch.stack([_advantages(name, rollout, args) for name in policies], -1) if policies else None
    kept = torch.arange(window, device=reached.device) < rollout.accepted[..., None]
    kept_after = torch.nn.functional.pad(return_to_go(rollout.acceptance)[..., 1:], (0, 1))
    old = None if rollout.old_log_probs is None else rollout.old_log_probs[rows]
    kept_log_probs: list[torch.Tensor] = []
    names = [*policies, *distils, *(["expected_acceptance"] if "expected_acceptance" in weights else [])]
    coefficients = torch.tensor([weights[name] for name in names], device=reached.device)

    def chunk(features, sources, tokens, reached, advantages, old, kept, kept_after, choices):
        own = drafter.draft_logits(features).float()
        logits = drafter.to_target_width(own, target.vocab_size)
        log_probs = (logits / args.rollout_temperature).log_softmax(-1)
        chosen = log_probs.gather(-1, tokens[:, None])[:, 0]
        if old is None:
            kept_log_probs.append(chosen.detach())
        before = chosen.detach() if old is None else old
        draft, goal = paired_logits(drafter, target, own, sources)
        kl = forward_kl(goal, draft)
        sums: list[torch.Tensor] = []
        clipped = torch.zeros_like(reached)
        for number, name in enumerate(policies):
            policy, here = clipped_policy_loss(chosen, before, advantages[:, number], args.clip_range)
            clipped = clipped | here
            extra = args.kl_coef * kl if name == "ppow" else 0.0
            sums.append(((policy + extra) * reached).sum())
        for name in distils:
            sums.append((kl if name == "opd" else reverse_kl(goal, draft)).sum())
        if "expected_acceptance" in weights:
            verifier = torch.nn.functional.one_hot(choices, log_probs.shape[-1]).to(log_probs)
            if args.target_temperature > 0:
                verifier = (target.logits(sources) / args.target_temperature).softmax(-1)
            loss = expected_acceptance_loss(verifier, log_probs, tokens, kept, kept_after)
            sums.append((loss * reached).sum())
        with torch.no_grad():
            noted = torch.stack([kl, clipped.float(), entropy(log_probs)]) * reached
        return torch.cat([(coefficients * torch.stack(sums)).sum()[None], noted.sum(-1)])

    totals = sum_over_chunks(
        chunk,
        args.chunk_size,
        drafter.parameters(),
        features[rows],
        rollout.target_sources[rows],
        rollout.draft_ids[rows],
        reached[rows],
        None if advantages is None else advantages[rows],
        old,
        kept[rows],
        kept_after[rows],
        rollout.target_choices[rows],
    )
    if rollout.old_log_probs is None and args.num_iterations > 1:
        rollout.old_log_probs = torch.zeros(reached.shape, device=reached.device)
        rollout.old_log_probs[rows] = torch.cat(kept_log_probs)[: int(rows.sum())]
    count = max(int(reached.sum()), 1)
    metrics = dict(zip(("kl", "clip_fraction", "entropy"), (totals[1:] / count).tolist(), strict=True))
    return totals[0] / (windows * window), metrics


def _advantages(name: str, rollout: Rollout, args: PPOWTrainingArguments) -> torch.Tensor:
    """What a term's policy gradient weighs each token with, `[B, M, K]`."""
    if name == "ppow":
        return rollout.advantages[..., None].expand(rollout.learned.shape)
    values = rollout.acceptance if name == "token_rl" else return_to_go(rollout.acceptance)
    by_group = (values.unflatten(1, (-1, args.num_rollouts)), rollout.learned.unflatten(1, (-1, args.num_rollouts)))
    return position_advantages(*by_group).flatten(1, 2)
