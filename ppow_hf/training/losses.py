"""An objective's weighted terms on a batch: along the text, and along the windows that the drafter drafted.

A training step reads from top to bottom: the drafter's forward over a batch, the loss on its features, and what that
is made of. Puts the pure functions of objectives.py and rewards.py on features and rollouts; returns a loss and what
is logged. Knows nothing about optimizers, steps or processes.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ..runtime.acceptance import entropy
from ..runtime.modeling_ppow import PPOWDrafter, PPOWDrafterOutput
from .arguments import PPOWTrainingArguments
from .objectives import (
    acceptance,
    clipped_policy_loss,
    cross_entropy,
    expected_length_gradients,
    forward_kl,
    keep_probabilities,
    negative_log_acceptance,
    sum_over_chunks,
    total_variation,
    visit_probabilities,
    without_gradients,
)
from .rewards import position_advantages
from .rollout import Rollout, keyed_uniforms, paired_logits
from .target import TargetEncoding, TrainingTarget
from .window_sampling import text_windows

Loss = tuple[torch.Tensor, dict[str, float]]


# -- along the text


def text_objective(
    model: Any,
    drafter: PPOWDrafter,
    target: TrainingTarget,
    args: PPOWTrainingArguments,
    weights: Mapping[str, float],
    inputs: Mapping[str, torch.Tensor],
    encoding: TargetEncoding,
    steps: int,
    weighting: str,
    step: int = 0,
) -> Loss:
    """Sum over the text's tokens of the weighted terms, of windows of `steps` tokens (see `text_weighting`).

    `model` is the `drafter`, perhaps wrapped for several processes. The training `step` keys random numbers.
    """
    input_ids, first = inputs["input_ids"], drafter.draft_model.first_prefix
    prefixes = torch.arange(first, input_ids.shape[1] - 1, device=input_ids.device).expand(len(input_ids), -1)
    windows: dict[str, Any] = {}
    visited: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    if steps > 1 or drafter.config.one_step:
        if weighting == "visited":
            with torch.no_grad():  # what DDP looks at, to expect no backward pass
                prefixes, visited = model(
                    inside=lambda drafter: visited_windows(drafter, target, args, inputs, encoding, steps)
                )
        counts = args.windows_learned(inputs["attention_mask"].sum(1) - 1 - first)
        prefixes, visited, scales = drawn_windows(args, inputs, prefixes, visited, steps, counts, step)
        if visited is not None and "expected_length" not in weights:  # which is of whole windows
            windows["goes_on"] = goes_on_within(visited)
        windows |= {"prefixes": prefixes, "draft_ids": text_windows(input_ids, prefixes, steps)}
    metrics: dict[str, float] = {}

    def loss_function(drafter: PPOWDrafter, output: PPOWDrafterOutput) -> torch.Tensor:
        features = output.window_features if windows else output.features[:, first:-1, None]  # type: ignore[index]
        loss, text_metrics = text_loss(
            drafter, target, args, weights, features, prefixes, inputs, encoding.sources, visited, scales
        )
        metrics.update(text_metrics)
        return loss

    output = model(
        input_ids=input_ids,
        target_states=encoding.states,
        attention_mask=inputs["attention_mask"],
        loss_function=loss_function,
        **windows,
    )
    return output.loss, metrics


def goes_on_within(followed: torch.Tensor) -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]:
    """`goes_on` of [`PPOWDrafter.unroll`] for windows that are drafted as far as `followed` `[B, M, K]` bool."""
    return lambda j, _, windows: followed[:, :, j + 1].gather(1, windows)


def drawn_windows(
    args: PPOWTrainingArguments,
    inputs: Mapping[str, torch.Tensor],
    prefixes: torch.Tensor,
    visited: torch.Tensor | None,
    steps: int,
    counts: torch.Tensor,
    step: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """What is left of `prefixes` `[B, M]` and of `visited` `[B, M, steps]` where `counts` `[B]` windows are learned,
    and by what a row's sum is multiplied, `[B]`. All of them, and `None`, where no row has more.
    """
    begun = (learned_windows(inputs, prefixes, steps) if visited is None else visited).any(-1)
    if not bool((begun.sum(1) > counts).any()):
        return prefixes, visited, None
    uniforms = keyed_uniforms(args.seed, step, inputs["index"], (args.max_length,), "anchors")
    chosen, kept, scales = chosen_windows(begun, uniforms[:, : begun.shape[1]], counts)
    nothing = inputs["input_ids"].shape[1] - 2  # a prefix behind which a shorter row has nothing to learn
    if visited is not None:
        visited = visited.gather(1, chosen[..., None].expand(-1, -1, steps)) & kept[..., None]
    return prefixes.gather(1, chosen).masked_fill(~kept, nothing), visited, scales


def chosen_windows(
    begun: torch.Tensor, uniforms: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Places `[B, W]`, ascending, of `counts` `[B]` windows drawn from those that are `begun` `[B, M]` bool, without
    replacement, by `uniforms` `[B, M]`; which of them are a row's, `[B, W]` bool, W being the most of a row; and by
    what a sum over them is multiplied, `[B]`, to be that over all on average.

    Rows in which fewer are begun are filled up with others.
    """
    width = begun.shape[1]
    order = uniforms.masked_fill(~begun, 2.0).argsort(dim=1)[:, : int(counts.max())]
    surplus = torch.arange(order.shape[1], device=order.device) >= counts[:, None]
    places = order.masked_fill(surplus, width).sort(dim=1).values
    return places.clamp_max(width - 1), places < width, (begun.sum(1) / counts).clamp_min(1.0)


@without_gradients()
def visited_windows(
    drafter: PPOWDrafter,
    target: TrainingTarget,
    args: PPOWTrainingArguments,
    inputs: Mapping[str, torch.Tensor],
    encoding: TargetEncoding,
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows of `steps` tokens that decoding the text would draft: their prefixes `[B, M]`, and which of their
    tokens it would come to, `[B, M, steps]`. Rows with fewer windows have ones that nothing comes to [ours].

    Rounds begin at the first prefix and behind each other. At `target_temperature` 0 a token is kept if it is the
    drafter's choice; above 0 as rejection sampling keeps the text's token, by lot. Where nothing is learned, nothing
    is kept.
    """
    input_ids, first = inputs["input_ids"], drafter.draft_model.first_prefix
    prefixes = torch.arange(first, input_ids.shape[1] - 1, device=input_ids.device).expand(len(input_ids), -1)
    texts = text_windows(input_ids, prefixes, steps)
    learned = learned_windows(inputs, prefixes, steps)
    kept = torch.zeros(learned.shape, device=input_ids.device)

    def follow(j: int, features: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        verdicts = torch.zeros_like(windows, dtype=torch.bool)
        asked = learned[:, :, j] & (kept[:, :, j - 1] > 0) if j else learned[:, :, 0]
        rows, columns = asked.gather(1, windows).nonzero(as_tuple=True)
        for part in torch.arange(len(rows), device=rows.device).split(args.chunk_size):
            row, column = rows[part], columns[part]
            window = windows[row, column]
            sources = encoding.sources[row, prefixes[row, window] + j]
            verdicts[row, column] = text_kept(
                drafter, target, args, features[row, column], sources, texts[row, window, j]
            )
        kept[:, :, j].scatter_(1, windows, verdicts.to(kept))
        return texts[:, :, j].gather(1, windows)

    def keeps(j: int, _, windows: torch.Tensor) -> torch.Tensor:
        return kept[:, :, j].gather(1, windows) > 0

    features, cache = drafter.prefix_features(input_ids, encoding.states)
    drafter.unroll(features, cache, prefixes, follow, steps, keeps)
    visited = (visit_probabilities(kept) > 0) & learned
    begins = visited.any(-1)
    chosen = (~begins).long().argsort(dim=1, stable=True)[:, : int(begins.sum(1).max())]
    return prefixes.gather(1, chosen), visited.gather(1, chosen[..., None].expand(-1, -1, steps))


def text_kept(
    drafter: PPOWDrafter,
    target: TrainingTarget,
    args: PPOWTrainingArguments,
    features: torch.Tensor,
    sources: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """Whether the text's `tokens` `[R]` are drafted and kept, `[R]` bool; above T = 0 by lot."""
    draft = drafter.draft_logits(features).float()
    labels = draft_labels(drafter, tokens, draft.shape[-1])
    if args.target_temperature == 0:
        return draft.argmax(-1) == labels
    draft, goal = paired_logits(drafter, target, draft, sources)
    followed = keep_probabilities(goal, draft, labels, args.rollout_temperature, args.target_temperature)[1]
    return torch.rand_like(followed) < followed


def text_loss(
    drafter: PPOWDrafter,
    target: TrainingTarget,
    args: PPOWTrainingArguments,
    weights: Mapping[str, float],
    features: torch.Tensor,
    prefixes: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
    sources: torch.Tensor,
    visited: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> Loss:
    """Weighted sum over `features` `[B, M, J, h]` along the text behind `prefixes` `[B, M]`; steps j decay, or those
    that are `visited` `[B, M, J]` bool count alike and others nothing. `scales` `[B]` multiply a sequence's sum.

    `expected_length` is of whole windows: the share of them that is kept, or of those that anything of is visited the
    kept tokens, so that all terms of visited windows are sums over the text.
    """
    names, flat_sources = list(weights), sources.flatten(0, 1)
    of_windows = torch.tensor([name == "expected_length" for name in names], device=features.device)
    coefficients = torch.tensor(list(weights.values()), device=features.device)
    rows = text_rows(drafter, target, args, weights, features, prefixes, inputs, flat_sources, visited, scales)

    def chunk(features, places, labels, step_weights, is_first, by_length, scales):
        source_places, goal_rows = torch.unique_consecutive(places, return_inverse=True)
        draft, chunk_sources = drafter.draft_logits(features).float(), flat_sources[source_places]
        draft, goal = paired_logits(drafter, target, draft, chunk_sources)
        labels = draft_labels(drafter, labels, draft.shape[-1])
        confidence = None
        if "confidence" in names:
            confidence = confidence_loss(drafter, target, args, features, draft, goal, chunk_sources, goal_rows)
        terms = text_terms(names, draft, goal, labels, args, by_length, goal_rows, confidence)
        weighted = coefficients[:, None] * terms * torch.where(of_windows[:, None], 1, step_weights)
        loss = (weighted if scales is None else weighted * scales).sum()
        with torch.no_grad():
            draft, goal, first_terms = draft[is_first], goal[goal_rows[is_first]], terms[:, is_first]
            agreed = (draft.argmax(-1) == goal.argmax(-1)).to(loss)
            kl = first_terms[names.index("kl")] if "kl" in names else forward_kl(goal, draft)
            sums = torch.where(of_windows, terms.sum(-1), first_terms.sum(-1))
            sums = torch.stack([kl.sum(), agreed.sum(), is_first.sum().to(loss), *sums])
        return torch.cat([loss[None], sums])

    totals = sum_over_chunks(chunk, args.chunk_size, drafter.parameters(), *rows)
    kl, agreed, count, *sums = totals[1:].detach().tolist()
    metrics = {"kl": kl, "agreement": agreed} | dict(zip(names, sums, strict=True))
    return totals[0], {name: value / max(count, 1) for name, value in metrics.items()}


def text_rows(
    drafter: PPOWDrafter,
    target: TrainingTarget,
    args: PPOWTrainingArguments,
    weights: Mapping[str, float],
    features: torch.Tensor,
    prefixes: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
    sources: torch.Tensor,
    visited: torch.Tensor | None,
    scales: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """The learned steps of [`text_loss`], R in all, in the order of their places in the batch: features `[R, h]`,
    places, the text's tokens, weights, which of them are a window's first, [`length_weights`] and `scales`.

    `sources` `[B * S, H]` are those of all places.
    """
    steps = features.shape[2]
    learned = learned_windows(inputs, prefixes, steps)
    decays = args.unroll_decay ** torch.arange(steps, device=features.device)
    step_weights = decays.expand(learned.shape) / decays.sum()
    if visited is not None:
        learned = learned & (visited.any(-1, keepdim=True) if "expected_length" in weights else visited)
        step_weights = visited.float()
    places, order = places_in_batch(inputs["input_ids"], prefixes, learned)
    labels = inputs["input_ids"].flatten()[places + 1]
    features, step_weights = features[learned][order], step_weights[learned][order]
    scales = scales if scales is None else scales[learned.nonzero()[:, 0]][order]
    is_first = (learned.nonzero()[:, 2] == 0)[order]
    by_length = None
    if "expected_length" in weights:
        kept = keep_rows(drafter, target, args, features.detach(), sources, labels, places)
        by_length = length_weights(kept, learned, args.max_window, order) * (1 if visited is None else steps)
    return features, places, labels, step_weights, is_first, by_length, scales


def places_in_batch(
    input_ids: torch.Tensor, prefixes: torch.Tensor, learned: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places `[R]` among the batch's B * S tokens of the prefixes that `learned` `[B, M, J]` steps extend, ascending,
    and their order `[R]` among the learned steps.

    Steps of different windows that end at one place lie side by side: they share the target's distribution.
    """
    steps = torch.arange(learned.shape[2], device=input_ids.device)
    starts = torch.arange(len(input_ids), device=input_ids.device)[:, None, None] * input_ids.shape[1]
    places = (starts + (prefixes[..., None] + steps))[learned]
    order = places.argsort()
    return places[order], order


def text_terms(
    names: Iterable[str],
    draft: torch.Tensor,
    goal: torch.Tensor,
    labels: torch.Tensor,
    args: PPOWTrainingArguments,
    by_length: torch.Tensor | None = None,
    goal_rows: torch.Tensor | None = None,
    confidence: torch.Tensor | None = None,
) -> torch.Tensor:
    """The terms `names` of each row, `[len(names), R]`, from draft and target logits and the text's tokens.

    With `goal_rows` `[R]` a row's target logits are `goal[goal_rows]`: rows may share them. `by_length` `[R, 2]`
    weighs what `expected_length` is made of, see [`length_weights`]; `confidence` `[R]` is that term.
    """
    row_goal = goal
    if goal_rows is not None and {"tv", "lk", "expected_length"} & set(names):
        row_goal = goal[goal_rows]
    terms = []
    for name in names:
        if name == "ce":
            terms.append(cross_entropy(draft, labels))
        elif name == "kl":
            terms.append(forward_kl(goal, draft, goal_rows))
        elif name == "tv":
            terms.append(total_variation(row_goal, draft))
        elif name == "lk":
            terms.append(negative_log_acceptance(row_goal, draft))
        elif name == "confidence":
            assert confidence is not None
            terms.append(confidence)
        else:
            assert by_length is not None
            temperatures = args.rollout_temperature, args.target_temperature
            kept, followed = keep_probabilities(row_goal, draft, labels, *temperatures)
            # The second part has a gradient and no value: the first one, of all rows, is the expected length already.
            terms.append(-(by_length[:, 0] * kept + by_length[:, 1] * (followed - followed.detach())))
    return torch.stack(terms)


def confidence_loss(
    drafter: PPOWDrafter,
    target: TrainingTarget,
    args: PPOWTrainingArguments,
    features: torch.Tensor,
    draft: torch.Tensor,
    goal: torch.Tensor,
    sources: torch.Tensor,
    goal_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Binary cross-entropy `[R]` of a block drafter's confidence head against measured [`acceptance`] [DSpark].

    `features` `[R, h + r]` and `draft` `[R, DV]` are of the rows; `goal` `[R', DV]`, `sources` `[R', H]` and
    `goal_rows` as of [`text_terms`]. Only the head learns from it: the features take no gradient [ours].
    """
    with torch.no_grad():
        kept = drafter.kept_tokens
        whole = goal if kept is None else target.logits(sources)  # what the drafter cannot propose is rejected
        accepted = acceptance(whole, draft, args.target_temperature, kept, goal_rows)
    log_odds = drafter.draft_model.confidence(features.detach())
    return torch.nn.functional.binary_cross_entropy_with_logits(log_odds, accepted, reduction="none")


@without_gradients()
def keep_rows(
    drafter: PPOWDrafter,
    target: TrainingTarget,
    args: PPOWTrainingArguments,
    features: torch.Tensor,
    sources: torch.Tensor,
    labels: torch.Tensor,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """[`keep_probabilities`] of each row, `[R, 2]`; with `places` `[R]`, ascending, sources are `sources[places]`."""
    rows = [torch.zeros(0, 2, device=features.device)]
    for start in range(0, len(features), args.chunk_size):
        part = slice(start, start + args.chunk_size)
        draft = drafter.draft_logits(features[part]).float()
        if places is None:
            draft, goal = paired_logits(drafter, target, draft, sources[part])
        else:  # rows of one place share its target logits
            source_places, goal_rows = torch.unique_consecutive(places[part], return_inverse=True)
            draft, goal = paired_logits(drafter, target, draft, sources[source_places])
            goal = goal[goal_rows]
        part_labels = draft_labels(drafter, labels[part], draft.shape[-1])
        temperatures = args.rollout_temperature, args.target_temperature
        rows.append(torch.stack(keep_probabilities(goal, draft, part_labels, *temperatures), -1))
    return torch.cat(rows)


@torch.no_grad()
def length_weights(
    kept: torch.Tensor, learned: torch.Tensor, max_window: int, order: torch.Tensor | None = None
) -> torch.Tensor:
    """Weights `[R, 2]` of each row's two keep probabilities: by them the rows' sum has the gradient of the mean share
    of a window that is kept, [`expected_length`] over its length.

    `kept` `[R, 2]` as of [`keep_rows`]. `learned` `[B, M, J]` is where the rows lie, in its order or in `order` of
    that; of features along the text (J = 1) every `max_window` in a row are a window.
    """
    order = torch.arange(len(kept), device=kept.device) if order is None else order
    windows = torch.zeros(*learned.shape, 2, device=kept.device)
    windows[learned] = kept[order.argsort()]
    window, count = learned.shape[2], learned.shape[1]
    if window > 1:
        weights = torch.stack(expected_length_gradients(*windows.unbind(-1)), -1)
    else:
        window = max_window
        along = torch.nn.functional.pad(windows[:, :, 0], (0, 0, 0, window - 1))
        by_window = torch.stack(expected_length_gradients(*along.unfold(1, window, 1).unbind(2)), -1)
        weights = torch.zeros_like(along)
        for offset in range(window):
            weights[:, offset : offset + count] += by_window[:, :, offset]
        weights = weights[:, :count, None]
    return weights[learned][order] / window


# -- along drafted windows


def window_objective(
    model: Any,
    drafter: PPOWDrafter,
    target: TrainingTarget,
    args: PPOWTrainingArguments,
    weights: Mapping[str, float],
    inputs: Mapping[str, torch.Tensor],
    encoding: TargetEncoding,
    rollout: Rollout,
) -> Loss:
    """Sum over the batch's sequences of the weighted terms, each averaged over the sequence's windows.

    `model` is the `drafter`, perhaps wrapped for several processes.
    """
    count = rollout.prefixes.shape[1]
    chosen = rollout.prefixes[:, :: args.num_rollouts]
    prefixes, draft_ids, anchors = rollout.prefixes, rollout.draft_ids, args.anchors(weights)
    if anchors:  # the same forward follows the text behind the chosen prefixes too
        prefixes = torch.cat([prefixes, chosen], dim=1)
        texts = text_windows(inputs["input_ids"], chosen, args.max_window)
        draft_ids = torch.cat([draft_ids, texts], dim=1)
    followed = torch.ones_like(draft_ids, dtype=torch.bool)
    followed[:, :count] = rollout.learned  # nothing is learned behind a window's first rejected token
    metrics: dict[str, float] = {}

    def loss_function(drafter: PPOWDrafter, output: PPOWDrafterOutput) -> torch.Tensor:
        features = output.window_features
        assert features is not None
        loss, window_metrics = window_loss(drafter, target, args, weights, features[:, :count], rollout)
        metrics.update(window_metrics)
        if anchors:
            anchor, text_metrics = window_text_loss(
                drafter, target, args, anchors, features[:, count:], chosen, rollout.has_prefix, inputs,
                encoding.sources,
            )  # fmt: skip
            metrics.update(text_metrics)
            loss = loss + anchor
        return loss

    output = model(
        input_ids=inputs["input_ids"],
        target_states=encoding.states,
        attention_mask=inputs["attention_mask"],
        prefixes=prefixes,
        draft_ids=draft_ids,
        loss_function=loss_function,
        goes_on=goes_on_within(followed),
    )
    return output.loss, metrics


def window_loss(
    drafter: PPOWDrafter,
    target: TrainingTarget,
    args: PPOWTrainingArguments,
    weights: Mapping[str, float],
    features: torch.Tensor,
    rollout: Rollout,
) -> Loss:
    """The terms on drafted windows, from `features` `[B, M, K, h]` along them; sum over sequences.

    Learned are tokens up to and including the first rejected one. Divided by N * G * K, so that every sequence weighs
    the same and long windows are not favoured. `ppow` brings KL(P||Q) by `kl_coef`.
    """
    learned, (windows, window) = rollout.learned, rollout.draft_ids.shape[1:]
    policies = [name for name in ("ppow", "token_rl") if name in weights]
    names = [*policies, *(["opd"] if "opd" in weights else [])]
    coefficients = torch.tensor([weights[name] for name in names], device=learned.device)
    advantages = [token_advantages(name, rollout, args.num_rollouts)[learned] for name in policies]
    old_log_probs = None if rollout.old_log_probs is None else rollout.old_log_probs[learned]
    new_log_probs: list[torch.Tensor] = []

    def chunk(features, sources, tokens, old_log_probs, advantages):
        draft = drafter.draft_logits(features).float()
        logits = drafter.to_target_width(draft, target.vocab_size)
        log_probs = (logits / args.rollout_temperature).log_softmax(-1)
        token_log_probs = log_probs.gather(-1, tokens[:, None])[:, 0]
        if old_log_probs is None:
            old_log_probs = token_log_probs.detach()
            new_log_probs.append(old_log_probs)
        draft, goal = paired_logits(drafter, target, draft, sources)
        kl = forward_kl(goal, draft)
        sums, clipped = [], torch.zeros_like(tokens, dtype=torch.bool)
        for number, name in enumerate(policies):
            policy, policy_clipped = clipped_policy_loss(
                token_log_probs, old_log_probs, advantages[:, number], args.clip_range
            )
            clipped = clipped | policy_clipped
            sums.append((policy + (args.kl_coef * kl if name == "ppow" else 0.0)).sum())
        if "opd" in weights:
            sums.append(kl.sum())
        with torch.no_grad():
            logged = torch.stack([kl, clipped.float(), entropy(log_probs)])
        return torch.cat([(coefficients * torch.stack(sums)).sum()[None], logged.sum(-1)])

    totals = sum_over_chunks(
        chunk,
        args.chunk_size,
        drafter.parameters(),
        features[learned],
        rollout.target_sources[learned],
        rollout.draft_ids[learned],
        old_log_probs,
        torch.stack(advantages, -1) if advantages else None,
    )
    if rollout.old_log_probs is None and args.num_iterations > 1:
        rollout.old_log_probs = torch.zeros(learned.shape, device=learned.device)
        rollout.old_log_probs[learned] = torch.cat(new_log_probs)[: int(learned.sum())]
    count = max(int(learned.sum()), 1)
    metrics = dict(zip(("kl", "clip_fraction", "entropy"), (totals[1:] / count).tolist(), strict=True))
    return totals[0] / (windows * window), metrics


def token_advantages(name: str, rollout: Rollout, num_rollouts: int) -> torch.Tensor:
    """What a term's policy gradient weighs each token with, `[B, M, K]`."""
    if name == "ppow":
        return rollout.advantages[..., None].expand(rollout.learned.shape)
    groups = (part.unflatten(1, (-1, num_rollouts)) for part in (rollout.verdicts, rollout.learned))
    return position_advantages(*groups).flatten(1, 2)


def window_text_loss(
    drafter: PPOWDrafter,
    target: TrainingTarget,
    args: PPOWTrainingArguments,
    weights: Mapping[str, float],
    features: torch.Tensor,
    chosen: torch.Tensor,
    has_prefix: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
    sources: torch.Tensor,
) -> Loss:
    """The text's terms along the learned text behind the prefixes `[B, N]`, divided by N * K; sum over sequences."""
    count, window = chosen.shape[1], features.shape[2]
    learned = learned_windows(inputs, chosen, window) & has_prefix[:, None, None]
    places = (chosen[..., None] + torch.arange(window, device=chosen.device))[learned]
    rows = torch.arange(len(chosen), device=chosen.device)[:, None, None].expand(learned.shape)[learned]
    features, sources, labels = features[learned], sources[rows, places], inputs["input_ids"][rows, places + 1]
    names = list(weights)
    coefficients = torch.tensor(list(weights.values()), device=chosen.device)
    by_length = None
    if "expected_length" in names:  # divided by the window below, where the other terms are means over its tokens
        kept = keep_rows(drafter, target, args, features.detach(), sources, labels)
        by_length = length_weights(kept, learned, args.max_window) * window

    def chunk(features, sources, labels, by_length):
        draft, goal = paired_logits(drafter, target, drafter.draft_logits(features).float(), sources)
        labels = draft_labels(drafter, labels, draft.shape[-1])
        confidence = None
        if "confidence" in names:
            confidence = confidence_loss(drafter, target, args, features, draft, goal, sources)
        sums = text_terms(names, draft, goal, labels, args, by_length, confidence=confidence).sum(-1)
        return torch.cat([(coefficients * sums).sum()[None], sums.detach()])

    rows_of_chunks = features, sources, labels, by_length
    totals = sum_over_chunks(chunk, args.chunk_size, drafter.parameters(), *rows_of_chunks)
    tokens = max(int(learned.sum()), 1)
    metrics = {f"text_{name}": total / tokens for name, total in zip(names, totals[1:].tolist(), strict=True)}
    return totals[0] / (count * window), metrics


# -- what both share


def learned_windows(inputs: Mapping[str, torch.Tensor], prefixes: torch.Tensor, steps: int) -> torch.Tensor:
    """Which of the text's `steps` tokens behind `prefixes` `[B, M]` are learned, `[B, M, steps]`."""
    length = inputs["input_ids"].shape[1]
    places = prefixes[..., None] + 1 + torch.arange(steps, device=prefixes.device)
    learned = inputs["loss_mask"].gather(1, places.clamp_max(length - 1).flatten(1)).view(places.shape)
    return learned & (places < length)


def draft_labels(drafter: PPOWDrafter, labels: torch.Tensor, width: int) -> torch.Tensor:
    """Token ids of the target as ids of the draft vocabulary; -100 where it has no such token."""
    kept = drafter.kept_tokens
    if kept is not None:
        places = torch.searchsorted(kept, labels).clamp_max(len(kept) - 1)
        return torch.where(kept[places] == labels, places, -100)
    return torch.where(labels < width, labels, -100)
