"""An objective's weighted terms on a batch: along the text, and along the windows that the drafter drafted.

A training step reads from top to bottom: the drafter's forward over a batch, the loss on its features, and what that
is made of. Puts the pure functions of terms.py and rewards.py on features and rollouts; returns a loss and what
is logged. Knows nothing about optimizers, steps or processes.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from ..runtime.acceptance import entropy
from ..runtime.modeling_ppow import PPOWDrafter, PPOWDrafterOutput
from .batch import Batch, paired_logits
from .chunks import sum_over_chunks, without_gradients
from .rewards import position_advantages
from .rollout import Rollout
from .terms import (
    acceptance,
    clipped_policy_loss,
    cross_entropy,
    expected_length_gradients,
    forward_kl,
    keep_probabilities,
    negative_log_acceptance,
    total_variation,
    visit_probabilities,
)
from .window_sampling import text_windows

Loss = tuple[torch.Tensor, dict[str, float]]


# -- along the text


class TextWindows(NamedTuple):
    """Windows along the text that are learned, M of each row.

    Args:
        prefixes (`torch.LongTensor` of shape `(B, M)`): the prefixes that they follow.
        visited (`torch.BoolTensor` of shape `(B, M, K)`, *optional*): the only tokens that are learned.
        scales (`torch.Tensor` of shape `(B,)`, *optional*): by what a row's sum is multiplied.
    """

    prefixes: torch.Tensor
    visited: torch.Tensor | None = None
    scales: torch.Tensor | None = None


def text_objective(model: Any, batch: Batch, weights: Mapping[str, float], steps: int, weighting: str) -> Loss:
    """Sum over the text's tokens of the weighted terms, of windows of `steps` tokens (see `text_weighting`).

    `model` is the drafter, perhaps wrapped for several processes.
    """
    input_ids, first = batch.inputs["input_ids"], batch.drafter.draft_model.first_prefix
    windows, window_inputs = TextWindows(batch.prefixes), {}
    if steps > 1 or batch.drafter.config.one_step:
        windows = choose_text_windows(model, batch, steps, weighting)
        window_inputs = {"prefixes": windows.prefixes, "draft_ids": text_windows(input_ids, windows.prefixes, steps)}
        if windows.visited is not None and "expected_length" not in weights:  # which is of whole windows
            window_inputs["goes_on"] = goes_on_within(windows.visited)

    def loss_of(output: PPOWDrafterOutput) -> Loss:
        along = slice(first, first + windows.prefixes.shape[1])
        features = output.window_features if window_inputs else output.features[:, along, None]  # type: ignore[index]
        return text_loss(batch, weights, features, windows)

    return inside_forward(model, batch, loss_of, **window_inputs)


def goes_on_within(reached: torch.Tensor) -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]:
    """`goes_on` of [`PPOWDrafter.unroll`] for windows that are drafted as far as `reached` `[B, M, K]` bool."""
    return lambda j, _, windows: reached[:, :, j + 1].gather(1, windows)


def choose_text_windows(model: Any, batch: Batch, steps: int, weighting: str) -> TextWindows:
    """The windows of `steps` tokens that are learned in this training step: all, or as many as `num_anchors` says."""
    args, inputs, prefixes, visited = batch.args, batch.inputs, batch.prefixes, None
    if weighting == "visited":
        with torch.no_grad():  # without gradients DDP does not wait for a backward pass
            prefixes, visited = model(inside=lambda _: visited_windows(batch, steps))
    counts = args.windows_learned(inputs["attention_mask"].sum(1) - 1 - batch.drafter.draft_model.first_prefix)
    begun = (learned_windows(inputs, prefixes, steps) if visited is None else visited).any(-1)
    if not bool((begun.sum(1) > counts).any()):
        return TextWindows(prefixes, visited)
    uniforms = batch.uniforms((args.max_length,), "anchors")
    chosen, kept, scales = chosen_windows(begun, uniforms[:, : begun.shape[1]], counts)
    nothing = inputs["input_ids"].shape[1] - 2  # a prefix after which a shorter row has nothing to learn
    if visited is not None:
        visited = visited.gather(1, chosen[..., None].expand(-1, -1, steps)) & kept[..., None]
    return TextWindows(prefixes.gather(1, chosen).masked_fill(~kept, nothing), visited, scales)


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
def visited_windows(batch: Batch, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows of `steps` tokens that decoding the text would draft: their prefixes `[B, M]`, and which of their
    tokens would be drafted, `[B, M, steps]`. Rows with fewer windows have others, of which nothing is drafted [ours].

    The first round starts at the first prefix, each further one after the last committed token. At
    `target_temperature` 0 a token is kept if it is the drafter's choice; above 0 as rejection sampling keeps the
    text's token, at random. Where nothing is learned, nothing is kept.
    """
    args, inputs, prefixes = batch.args, batch.inputs, batch.prefixes
    texts = text_windows(inputs["input_ids"], prefixes, steps)
    learned = learned_windows(inputs, prefixes, steps)
    kept = torch.zeros(learned.shape, device=prefixes.device)
    uniforms = None
    if args.target_temperature > 0:
        uniforms = batch.uniforms((args.max_length, steps), "visited")[:, : prefixes.shape[1]]

    def follow(j: int, features: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        verdicts = torch.zeros_like(windows, dtype=torch.bool)
        asked = learned[:, :, j] & (kept[:, :, j - 1] > 0) if j else learned[:, :, 0]
        rows, columns = asked.gather(1, windows).nonzero(as_tuple=True)
        for part in torch.arange(len(rows), device=rows.device).split(args.chunk_size):
            row, column = rows[part], columns[part]
            window = windows[row, column]
            sources = batch.encoding.sources[row, prefixes[row, window] + j]
            numbers = None if uniforms is None else uniforms[row, window, j]
            verdicts[row, column] = text_kept(batch, features[row, column], sources, texts[row, window, j], numbers)
        kept[:, :, j].scatter_(1, windows, verdicts.to(kept))
        return texts[:, :, j].gather(1, windows)

    def keeps(j: int, _, windows: torch.Tensor) -> torch.Tensor:
        return kept[:, :, j].gather(1, windows) > 0

    features, cache = batch.drafter.prefix_features(inputs["input_ids"], batch.encoding.states)
    batch.drafter.unroll(features, cache, prefixes, follow, steps, keeps)
    visited = (visit_probabilities(kept) > 0) & learned
    begins = visited.any(-1)
    chosen = (~begins).long().argsort(dim=1, stable=True)[:, : max(int(begins.sum(1).max()), 1)]
    return prefixes.gather(1, chosen), visited.gather(1, chosen[..., None].expand(-1, -1, steps))


def text_kept(
    batch: Batch,
    features: torch.Tensor,
    sources: torch.Tensor,
    tokens: torch.Tensor,
    uniforms: torch.Tensor | None,
) -> torch.Tensor:
    """Whether the text's `tokens` `[R]` are drafted and kept, `[R]` bool; above T = 0 by `uniforms` `[R]`."""
    draft = batch.drafter.draft_logits(features).float()
    labels = draft_labels(batch.drafter, tokens, draft.shape[-1])
    if uniforms is None:
        return draft.argmax(-1) == labels
    draft, target_logits = paired_logits(batch.drafter, batch.target, draft, sources)
    return uniforms < keep_probabilities(target_logits, draft, labels, *batch.temperatures)[1]


def text_loss(batch: Batch, weights: Mapping[str, float], features: torch.Tensor, windows: TextWindows) -> Loss:
    """Weighted sum over `features` `[B, M, K, h]` along the text of `windows`; steps decay, or those that are visited
    count alike and others nothing.

    `expected_length` is of whole windows: the accepted share of each, or the accepted tokens of every window with a
    visited token, so that all terms of visited windows are sums over the text.
    """
    drafter, names = batch.drafter, list(weights)
    all_sources = batch.encoding.sources.flatten(0, 1)
    of_windows = torch.tensor([name == "expected_length" for name in names], device=features.device)
    coefficients = torch.tensor(list(weights.values()), device=features.device)

    def chunk(features, places, labels, step_weights, is_first, by_length, scales):
        source_places, target_rows = torch.unique_consecutive(places, return_inverse=True)
        sources = all_sources[source_places]
        draft, target_logits = batch.logits(features, sources)
        labels = draft_labels(drafter, labels, draft.shape[-1])
        confidence = None
        if "confidence" in names:
            confidence = confidence_loss(batch, features, draft, target_logits, sources, target_rows)
        terms = text_terms(names, draft, target_logits, labels, batch.temperatures, by_length, target_rows, confidence)
        weighted = coefficients[:, None] * terms * torch.where(of_windows[:, None], 1, step_weights)
        loss = (weighted if scales is None else weighted * scales).sum()
        with torch.no_grad():
            draft, target_logits = draft[is_first], target_logits[target_rows[is_first]]
            first_terms = terms[:, is_first]
            agreed = (draft.argmax(-1) == target_logits.argmax(-1)).to(loss)
            kl = first_terms[names.index("kl")] if "kl" in names else forward_kl(target_logits, draft)
            sums = torch.where(of_windows, terms.sum(-1), first_terms.sum(-1))
            sums = torch.stack([kl.sum(), agreed.sum(), is_first.sum().to(loss), *sums])
        return torch.cat([loss[None], sums])

    rows = text_rows(batch, weights, features, windows)
    totals = sum_over_chunks(chunk, batch.args.chunk_size, drafter.parameters(), *rows)
    kl, agreed, count, *sums = totals[1:].detach().tolist()
    metrics = {"kl": kl, "agreement": agreed} | dict(zip(names, sums, strict=True))
    return totals[0], {name: value / max(count, 1) for name, value in metrics.items()}


class TextRows(NamedTuple):
    """The R learned steps of windows along the text, in the order of their places in the batch.

    Args:
        features (`torch.Tensor` of shape `(R, h)`), places, labels (`torch.LongTensor` of shape `(R,)`):
            The drafter's features, the place among the batch's B * S tokens, and the text's next token.
        step_weights (`torch.Tensor` of shape `(R,)`), is_first (`torch.BoolTensor` of shape `(R,)`):
            The weight of each, and whether it is a window's first.
        by_length (`torch.Tensor` of shape `(R, 2)`, *optional*): [`length_weights`].
        scales (`torch.Tensor` of shape `(R,)`, *optional*): those of [`TextWindows`].
    """

    features: torch.Tensor
    places: torch.Tensor
    labels: torch.Tensor
    step_weights: torch.Tensor
    is_first: torch.Tensor
    by_length: torch.Tensor | None
    scales: torch.Tensor | None


def text_rows(batch: Batch, weights: Mapping[str, float], features: torch.Tensor, windows: TextWindows) -> TextRows:
    """The rows of [`text_loss`]."""
    args, steps, (prefixes, visited, scales) = batch.args, features.shape[2], windows
    learned = learned_windows(batch.inputs, prefixes, steps)
    decays = args.unroll_decay ** torch.arange(steps, device=features.device)
    step_weights = decays.expand(learned.shape) / decays.sum()
    if visited is not None:
        learned = learned & (visited.any(-1, keepdim=True) if "expected_length" in weights else visited)
        step_weights = visited.float()
    places, order = places_in_batch(batch.inputs["input_ids"], prefixes, learned)
    labels = batch.inputs["input_ids"].flatten()[places + 1]
    features, step_weights = features[learned][order], step_weights[learned][order]
    scales = scales if scales is None else scales[learned.nonzero()[:, 0]][order]
    is_first = (learned.nonzero()[:, 2] == 0)[order]
    by_length = None
    if "expected_length" in weights:
        kept = keep_rows(batch, features.detach(), labels, places)
        by_length = length_weights(kept, learned, args.max_window, order) * (1 if visited is None else steps)
    return TextRows(features, places, labels, step_weights, is_first, by_length, scales)


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
    target_logits: torch.Tensor,
    labels: torch.Tensor,
    temperatures: tuple[float, float] = (1.0, 0.0),
    by_length: torch.Tensor | None = None,
    target_rows: torch.Tensor | None = None,
    confidence: torch.Tensor | None = None,
) -> torch.Tensor:
    """The terms `names` of each row, `[len(names), R]`, from draft and target logits and the text's tokens.

    With `target_rows` `[R]` a row's target logits are `target_logits[target_rows]`: rows may share them. `by_length`
    `[R, 2]` weighs what `expected_length` is made of, see [`length_weights`], at the `temperatures` of drafter and
    target; `confidence` `[R]` is that term.
    """
    by_row = target_logits
    if target_rows is not None and {"tv", "lk", "expected_length"} & set(names):
        by_row = target_logits[target_rows]
    terms = []
    for name in names:
        if name == "ce":
            terms.append(cross_entropy(draft, labels))
        elif name == "kl":
            terms.append(forward_kl(target_logits, draft, target_rows))
        elif name == "tv":
            terms.append(total_variation(by_row, draft))
        elif name == "lk":
            terms.append(negative_log_acceptance(by_row, draft))
        elif name == "confidence":
            assert confidence is not None
            terms.append(confidence)
        else:
            assert by_length is not None
            kept, followed = keep_probabilities(by_row, draft, labels, *temperatures)
            # The second part has a gradient and no value: the first one, of all rows, is the expected length already.
            terms.append(-(by_length[:, 0] * kept + by_length[:, 1] * (followed - followed.detach())))
    return torch.stack(terms)


def confidence_loss(
    batch: Batch,
    features: torch.Tensor,
    draft: torch.Tensor,
    target_logits: torch.Tensor,
    sources: torch.Tensor,
    target_rows: torch.Tensor,
) -> torch.Tensor:
    """Binary cross-entropy `[R]` of a block drafter's confidence head against measured [`acceptance`] [DSpark].

    `features` `[R, h + r]` and `draft` `[R, DV]` are of the rows; `target_logits` `[R', DV]`, `sources` `[R', H]` and
    `target_rows` as of [`text_terms`]. Only the head learns from it: the features take no gradient [ours].
    """
    kept = batch.drafter.kept_tokens
    with torch.no_grad():
        # What the drafter cannot propose is rejected.
        whole = target_logits if kept is None else batch.target.logits(sources)
        accepted = acceptance(whole, draft, batch.args.target_temperature, kept, target_rows)
    log_odds = batch.drafter.draft_model.confidence(features.detach())
    return torch.nn.functional.binary_cross_entropy_with_logits(log_odds, accepted, reduction="none")


@without_gradients()
def keep_rows(batch: Batch, features: torch.Tensor, labels: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[`keep_probabilities`] of each row, `[R, 2]`; `places` `[R]` as of [`TextRows`]."""
    sources, size = batch.encoding.sources.flatten(0, 1), batch.args.chunk_size
    rows = [torch.zeros(0, 2, device=features.device)]
    for start in range(0, len(features), size):
        part = slice(start, start + size)
        # Rows of one place share its target logits.
        source_places, target_rows = torch.unique_consecutive(places[part], return_inverse=True)
        draft, target_logits = batch.logits(features[part], sources[source_places])
        part_labels = draft_labels(batch.drafter, labels[part], draft.shape[-1])
        kept = keep_probabilities(target_logits[target_rows], draft, part_labels, *batch.temperatures)
        rows.append(torch.stack(kept, -1))
    return torch.cat(rows)


@torch.no_grad()
def length_weights(kept: torch.Tensor, learned: torch.Tensor, max_window: int, order: torch.Tensor) -> torch.Tensor:
    """Weights `[R, 2]` of each row's two keep probabilities: by them the rows' sum has the gradient of the mean share
    of a window that is kept, [`expected_length`] over its length.

    `kept` `[R, 2]` as of [`keep_rows`]. `learned` `[B, M, J]` is where the rows lie, in the `order` `[R]` of its
    places; of features along the text (J = 1) every `max_window` in a row are a window.
    """
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


def window_objective(model: Any, batch: Batch, weights: Mapping[str, float], rollout: Rollout) -> Loss:
    """Sum over the batch's sequences of the weighted terms, each averaged over the sequence's windows.

    `model` is the drafter, perhaps wrapped for several processes.
    """
    args, input_ids, count = batch.args, batch.inputs["input_ids"], rollout.paths.shape[1]
    chosen = rollout.prefixes[:, :: args.num_rollouts]
    prefixes, paths, text_weights = rollout.path_prefixes, rollout.paths, args.anchors(weights)
    reached = rollout.along_paths(rollout.learned).any(-1)  # nothing is learned after a first rejected token
    if text_weights:  # the same forward follows the text after the chosen prefixes too, where paths do not
        texts = text_windows(input_ids, chosen, args.max_window)
        whole = torch.ones_like(texts, dtype=torch.bool)
        if torch.equal(paths, texts):
            reached = whole
        else:
            prefixes, paths = torch.cat([prefixes, chosen], dim=1), torch.cat([paths, texts], dim=1)
            reached = torch.cat([reached, whole], dim=1)

    def loss_of(output: PPOWDrafterOutput) -> Loss:
        features = output.window_features
        assert features is not None
        loss, metrics = window_loss(batch, weights, features[:, :count], rollout)
        if text_weights:
            learned = rollout.has_prefix[:, None, None].expand(*chosen.shape, args.max_window)
            along_text, text_metrics = text_loss(
                batch, text_weights, features[:, -chosen.shape[1] :], TextWindows(chosen, learned)
            )
            metrics.update({f"text_{name}": text_metrics[name] for name in text_weights})
            loss = loss + along_text / learned[0].numel()
        return loss, metrics

    return inside_forward(model, batch, loss_of, prefixes=prefixes, draft_ids=paths, goes_on=goes_on_within(reached))


def window_loss(batch: Batch, weights: Mapping[str, float], features: torch.Tensor, rollout: Rollout) -> Loss:
    """The terms on drafted windows, from `features` `[B, P, K, h]` along their paths; sum over sequences.

    Learned are tokens up to and including the first rejected one. Divided by N * G * K, so that every sequence weighs
    the same and long windows are not favoured. `ppow` brings KL(P||Q) by `kl_coef`.
    """
    drafter, args, learned = batch.drafter, batch.args, rollout.along_paths(rollout.learned)
    places = learned.any(-1)
    policies = [name for name in ("ppow", "token_rl") if name in weights]
    names = [*policies, *(["opd"] if "opd" in weights else [])]
    coefficients = torch.tensor([weights[name] for name in names], device=learned.device)
    advantages = [rollout.along_paths(token_advantages(name, rollout, args.num_rollouts))[places] for name in policies]
    new_log_probs: list[torch.Tensor] = []

    def chunk(features, sources, tokens, learned, old_log_probs, advantages):
        draft, target_logits = batch.logits(features, sources)
        log_probs = (draft / args.rollout_temperature).log_softmax(-1)
        tokens = draft_labels(drafter, tokens, draft.shape[-1]).clamp_min(0)  # the drafter has all that are learned
        token_log_probs = log_probs.gather(-1, tokens)
        if old_log_probs is None:
            old_log_probs = token_log_probs.detach()
            new_log_probs.append(old_log_probs)
        token_log_probs, old_log_probs = token_log_probs[learned], old_log_probs[learned]
        windows = learned.sum(-1)  # that learn from this place
        kl = (windows * forward_kl(target_logits, draft)).sum()
        sums, clipped = [], torch.zeros_like(old_log_probs, dtype=torch.bool)
        for number, name in enumerate(policies):
            policy, policy_clipped = clipped_policy_loss(
                token_log_probs, old_log_probs, advantages[learned][:, number], args.clip_range
            )
            clipped = clipped | policy_clipped
            sums.append(policy.sum() + (args.kl_coef * kl if name == "ppow" else 0.0))
        if "opd" in weights:
            sums.append(kl)
        with torch.no_grad():
            logged = torch.stack([kl, clipped.float().sum(), (windows * entropy(log_probs)).sum()])
        return torch.cat([(coefficients * torch.stack(sums)).sum()[None], logged])

    totals = sum_over_chunks(
        chunk,
        args.chunk_size,
        drafter.parameters(),
        features[places],
        rollout.target_sources[places],
        rollout.along_paths(rollout.draft_ids)[places],
        learned[places],
        rollout.old_log_probs,
        torch.stack(advantages, -1) if advantages else None,
    )
    if rollout.old_log_probs is None and args.num_iterations > 1:
        rollout.old_log_probs = torch.cat(new_log_probs)
    count = max(int(learned.sum()), 1)
    metrics = dict(zip(("kl", "clip_fraction", "entropy"), (totals[1:] / count).tolist(), strict=True))
    return totals[0] / learned[0].numel(), metrics


def token_advantages(name: str, rollout: Rollout, num_rollouts: int) -> torch.Tensor:
    """What a term's policy gradient weighs each token with, `[B, M, K]`."""
    if name == "ppow":
        return rollout.advantages[..., None].expand(rollout.learned.shape)
    groups = (part.unflatten(1, (-1, num_rollouts)) for part in (rollout.verdicts, rollout.learned))
    return position_advantages(*groups).flatten(1, 2)


# -- what both share


def inside_forward(model: Any, batch: Batch, loss_of: Callable[[PPOWDrafterOutput], Loss], **windows: Any) -> Loss:
    """`loss_of` the drafter's output for a batch, evaluated inside its forward; `windows` as of that."""
    metrics: dict[str, float] = {}

    def loss_function(_, output: PPOWDrafterOutput) -> torch.Tensor:
        loss, found = loss_of(output)
        metrics.update(found)
        return loss

    output = model(
        input_ids=batch.inputs["input_ids"],
        target_states=batch.encoding.states,
        attention_mask=batch.inputs["attention_mask"],
        loss_function=loss_function,
        **windows,
    )
    return output.loss, metrics


def learned_windows(inputs: Mapping[str, torch.Tensor], prefixes: torch.Tensor, steps: int) -> torch.Tensor:
    """Which of the text's `steps` tokens after `prefixes` `[B, M]` are learned, `[B, M, steps]`."""
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
