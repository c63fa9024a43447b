"""Losses, rewards, advantages and the choice of windows: each against a closed form or a few slow lines."""

import itertools
import math

import pytest
import torch

from ppow_hf.training.chunks import sum_over_chunks
from ppow_hf.training.objective import parse_objective
from ppow_hf.training.rewards import (
    group_advantages,
    groups_without_spread,
    position_advantages,
    proximity_reward,
    speedup_reward,
    throughput_reward,
)
from ppow_hf.training.terms import (
    clipped_policy_loss,
    cross_entropy,
    expected_length,
    expected_length_gradients,
    forward_kl,
    keep_probabilities,
    negative_log_acceptance,
    total_variation,
    visit_probabilities,
)
from ppow_hf.training.window_sampling import choose_prefixes, eligible_prefixes, window_priorities, within_windows

INFINITE = float("inf")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def chi_square_p(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """p-value of Pearson's test: the upper regularised incomplete gamma function."""
    statistic = ((counts - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2), statistic / 2).item()


# Losses


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 8, 100])
def test_chunked_loss_and_gradients_equal_the_unchunked_ones(chunk_size):
    features = torch.randn(7, 5, dtype=torch.float64)
    sources = torch.randn(7, 11, dtype=torch.float64)
    weight = torch.randn(11, 5, dtype=torch.float64)

    def losses_and_gradients(compute):
        leaves = features.clone().requires_grad_(), weight.clone().requires_grad_()
        sums = compute(*leaves)
        (-0.3 * sums[0]).backward()
        return sums.detach(), leaves[0].grad, leaves[1].grad

    def function(weight, x, y, nothing):
        assert nothing is None
        scores = x @ weight.T
        return torch.stack([forward_kl(y, scores).sum(), scores.square().sum()])

    plain = losses_and_gradients(lambda x, w: function(w, x, sources, None))
    chunked = losses_and_gradients(
        lambda x, w: sum_over_chunks(lambda *rows: function(w, *rows), chunk_size, [w], x, sources, None)
    )
    for expected, found in zip(plain, chunked, strict=True):
        torch.testing.assert_close(found, expected)


def test_chunks_hold_at_most_chunk_size_rows_and_no_rows_are_one_empty_chunk():
    seen = []

    def count(rows):
        seen.append(len(rows))
        return rows.sum()[None]

    assert sum_over_chunks(count, 3, [], torch.ones(8)).item() == 8 and seen == [3, 3, 2]
    seen.clear()
    assert sum_over_chunks(count, 3, [], torch.ones(0)).item() == 0 and seen == [0]


def test_chunks_without_rows_still_give_zero_gradients():
    features, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    sum_over_chunks(lambda x: (x @ weight).sum()[None], 2, [weight], features)[0].backward()
    assert weight.grad.tolist() == [0.0] * 4


def test_forward_kl_equals_torchs():
    target, draft = torch.randn(6, 9), torch.randn(6, 9)
    expected = torch.nn.functional.kl_div(
        draft.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(forward_kl(target, draft), expected)
    assert forward_kl(target, target).abs().max() < 1e-6


def test_forward_kl_of_tokens_the_target_never_takes_is_finite_and_differentiable():
    target = torch.tensor([[0.0, math.log(3), -INFINITE]])
    draft = torch.zeros(1, 3, requires_grad=True)
    kl = forward_kl(target, draft)
    kl.sum().backward()
    assert kl.item() == pytest.approx(0.25 * math.log(0.25 * 3) + 0.75 * math.log(0.75 * 3))
    # d KL / d logits = Q - P
    torch.testing.assert_close(draft.grad, torch.tensor([[1 / 3 - 0.25, 1 / 3 - 0.75, 1 / 3]]))


def test_forward_kl_is_computed_in_float32():
    target, draft = torch.randn(4, 50).bfloat16(), torch.randn(4, 50).bfloat16()
    assert forward_kl(target, draft).dtype == torch.float32
    torch.testing.assert_close(forward_kl(target, draft), forward_kl(target.float(), draft.float()))


def test_cross_entropy_equals_the_log_probability_and_is_zero_without_a_label():
    draft, labels = torch.randn(5, 7, requires_grad=True), torch.tensor([3, -100, 0, 6, -100])
    losses = cross_entropy(draft, labels)
    losses.sum().backward()
    for row, label in enumerate(labels.tolist()):
        if label < 0:
            assert losses[row] == 0 and draft.grad[row].abs().sum() == 0
        else:
            assert losses[row].item() == pytest.approx(-draft.detach()[row].softmax(-1)[label].log().item(), abs=1e-6)


def test_losses_of_acceptance_equal_a_loop_over_tokens():
    target, draft = torch.randn(5, 7), torch.randn(5, 7)
    found = [loss(target, draft) for loss in (total_variation, negative_log_acceptance)]
    for row, (p, q) in enumerate(zip(target.softmax(-1).tolist(), draft.softmax(-1).tolist(), strict=True)):
        alpha = sum(min(a, b) for a, b in zip(p, q, strict=True))
        assert [loss[row].item() for loss in found] == pytest.approx([1 - alpha, -math.log(alpha)], rel=1e-4)


def test_lk_has_the_gradient_of_tv_over_alpha():
    target, draft = torch.randn(4, 9), torch.randn(4, 9, requires_grad=True)

    def gradient(loss):
        (result,) = torch.autograd.grad(loss.sum(), draft)
        return result

    alpha = 1 - total_variation(target, draft).detach()
    variation = gradient(total_variation(target, draft))
    torch.testing.assert_close(gradient(negative_log_acceptance(target, draft)), variation / alpha[:, None])


def test_losses_stay_finite_where_the_target_has_impossible_tokens_or_nothing_is_shared():
    target = torch.tensor([[0.0, 0.0, -INFINITE], [200.0, 0.0, -INFINITE]])
    draft = torch.tensor([[0.0, 1.0, 2.0], [0.0, 300.0, 0.0]], requires_grad=True)
    for loss in (total_variation, negative_log_acceptance):
        value = loss(target, draft)
        (gradient,) = torch.autograd.grad(value.sum(), draft)
        assert torch.isfinite(value).all() and torch.isfinite(gradient).all()


def one_after_another(length, logits):
    """Every window of `length` tokens, with the rows of logits after it: the next token hangs on the last one."""
    for window in itertools.product(range(logits.shape[-1]), repeat=length):
        yield window, torch.stack([logits[previous] for previous in (0, *window[:-1])])


def test_expected_length_over_the_targets_texts_is_the_expected_count_of_drafts_kept():
    """T = 1: the mean over all texts, by their probability, against all windows of the drafter and all verdicts."""
    size, length = 3, 3
    draw = torch.Generator().manual_seed(5)
    draft, goal = (2 * torch.randn(size, size, generator=draw, dtype=torch.float64) for _ in range(2))
    found, exact = 0.0, 0.0
    for text, rows in one_after_another(length, goal):
        chance = math.prod(row.softmax(-1)[token].item() for row, token in zip(rows, text, strict=True))
        drafts = torch.stack([draft[previous] for previous in (0, *text[:-1])])
        both = keep_probabilities(rows, drafts, torch.tensor(text), 1.0, 1.0)
        found += chance * expected_length(*(part.double() for part in both)).item()
    for window, rows in one_after_another(length, draft):
        chance, reached = 1.0, 1.0
        for place, (row, token) in enumerate(zip(rows, window, strict=True)):
            q, p = row.softmax(-1)[token].item(), goal[(0, *window)[place]].softmax(-1)[token].item()
            chance *= q
            reached *= min(1.0, p / q)
            # A token's verdict counts once for each window that begins with what is before it, so for all after.
            behind = math.prod(
                draft[(0, *window)[i]].softmax(-1)[window[i]].item() for i in range(place + 1, length)
            )  # fmt: skip
            exact += chance * behind * reached
    assert found == pytest.approx(exact, rel=1e-5) and 0.5 < exact < 2.5


def test_keep_probabilities_at_t0_are_of_the_targets_choice():
    goal = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0], [0.0, 0.0, 4.0]])
    draft = torch.tensor([[0.2, 0.4, 0.1], [0.0, 1.0, 0.0], [1.0, 2.0, 0.0]])
    sharp = (draft / 0.5).softmax(-1)
    kept, followed = keep_probabilities(goal, draft, torch.tensor([1, 2, -100]), 0.5, 0.0)
    torch.testing.assert_close(kept, torch.stack([sharp[0, 1], sharp[1, 0], torch.tensor(0.0)]))
    torch.testing.assert_close(followed, torch.stack([sharp[0, 1], torch.tensor(0.0), torch.tensor(0.0)]))


def test_gradients_of_the_expected_length_equal_finite_differences():
    kept, followed = torch.rand(2, 4, dtype=torch.float64), torch.rand(2, 4, dtype=torch.float64)
    for number, gradient in enumerate(expected_length_gradients(kept, followed)):
        for place in itertools.product(range(2), range(4)):
            moved = [kept.clone(), followed.clone()]
            moved[number][place] += 1e-6
            slope = (expected_length(*moved).sum() - expected_length(kept, followed).sum()) / 1e-6
            assert gradient[place].item() == pytest.approx(slope.item(), abs=1e-5)
    one = torch.rand(3, 1)
    assert [part.tolist() for part in expected_length_gradients(one, one)] == [[[1.0]] * 3, [[0.0]] * 3]


# What an objective is made of


def test_objectives_are_names_sums_and_schedules():
    def phases(objective):
        return [(phase.start, dict(phase.weights)) for phase in parse_objective(objective)]

    assert phases("ppow") == [(0.0, {"ppow": 1.0})]
    assert phases("supervised") == [(0.0, {"ce": 0.1, "kl": 1.0})]
    assert phases("0.3*kl+tv") == phases({"kl": 0.3, "tv": 1.0}) == [(0.0, {"kl": 0.3, "tv": 1.0})]
    assert phases("2 * supervised + 0.5*kl") == [(0.0, {"ce": 0.2, "kl": 2.5})]
    assert phases("kl; 0.25: kl + 2*ppow ;0.5: opd") == [
        (0.0, {"kl": 1.0}), (0.25, {"kl": 1.0, "ppow": 2.0}), (0.5, {"opd": 1.0})
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("", "objective: ''"),
        ("sft", "'sft' is not one of"),
        ("x*kl", "'x' in 'x[*]kl' is not a number"),
        ("-1*kl", "kl has the weight -1.0"),
        ("nan*kl", "is not a number"),
        ("0.5: kl", "is no schedule"),
        ("kl; tv", "is no schedule"),
        ("kl; 0.5: tv; 0.5: lk", "is no schedule"),
        ("kl; 1: tv", "is no schedule"),
        ({}, "objective: ''"),
    ],
)
def test_what_is_no_objective_is_refused(objective, message):
    with pytest.raises(ValueError, match=message):
        parse_objective(objective)


def test_clipped_loss_equals_a_scalar_loop():
    log_probs, old = torch.randn(200) * 0.4, torch.randn(200) * 0.4
    advantages = torch.randn(200)
    losses, clipped = clipped_policy_loss(log_probs, old, advantages, 0.2)
    for new, before, advantage, loss, was_clipped in zip(
        log_probs.tolist(), old.tolist(), advantages.tolist(), losses.tolist(), clipped.tolist(), strict=True
    ):
        ratio = math.exp(new - before)
        if advantage >= 0:
            gain, bound = min(ratio, 1.2) * advantage, ratio > 1.2
        else:
            gain, bound = max(ratio, 0.8) * advantage, ratio < 0.8
        assert loss == pytest.approx(-gain, rel=1e-4, abs=1e-6) and was_clipped == bound
    assert 0 < clipped.float().mean() < 1


def test_clipped_loss_teaches_nothing_where_the_clip_binds():
    log_probs = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0], requires_grad=True)
    losses, clipped = clipped_policy_loss(log_probs, torch.zeros(5), torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0]), 0.2)
    losses.sum().backward()
    assert clipped.tolist() == [True, False, False, True, False]
    ratio = [math.e, math.e, 1 / math.e, 1 / math.e, 1.0]
    expected = [0.0, ratio[1], -ratio[2], 0.0, -2.0]
    torch.testing.assert_close(log_probs.grad, torch.tensor(expected))


# Rewards


def test_rewards_have_the_papers_values():
    accepted = torch.tensor([[0, 1, 10]])
    torch.testing.assert_close(speedup_reward(accepted, 0.12), torch.tensor([[0.0, 1 / 1.12, 10 / 2.2]]))
    torch.testing.assert_close(throughput_reward(accepted, 10, 0.12), torch.tensor([[1 / 2.2, 2 / 2.2, 11 / 2.2]]))
    torch.testing.assert_close(speedup_reward(accepted, 0.0), accepted.float())


def test_proximity_is_rewarded_only_where_nothing_was_accepted_and_the_window_is_near():
    accepted = torch.tensor([[0, 0, 1, 0]])
    greedy = torch.tensor([-2.0])
    draft = torch.tensor([[-6.0, -7.1, -6.0, -7.0]])  # Delta = 4, 5.1, 4, 5
    assert proximity_reward(accepted, greedy, draft, 0.5, 5.0).tolist() == [[0.5, 0.0, 0.0, 0.0]]
    # An impossible window is infinitely far; one that beats the greedy window is near.
    draft = torch.tensor([[-INFINITE, -1.0, -1.0, 0.0]])
    assert proximity_reward(accepted, greedy, draft, 0.5, 5.0).tolist() == [[0.0, 0.5, 0.0, 0.5]]


def test_standardised_advantages_equal_a_loop_over_groups():
    rewards = torch.rand(3, 4, 5)
    found = group_advantages(rewards, epsilon=1e-4)
    for group, advantages in zip(rewards.flatten(0, 1).tolist(), found.flatten(0, 1).tolist(), strict=True):
        mean = sum(group) / 5
        deviation = math.sqrt(sum((reward - mean) ** 2 for reward in group) / 5)
        assert advantages == pytest.approx([(reward - mean) / (deviation + 1e-4) for reward in group], abs=1e-4)


@pytest.mark.parametrize("size", [2, 3, 5, 7, 8])
def test_a_group_without_spread_has_no_advantages_at_all(size):
    # 0.1, 0.7, ...: their mean is not always the number itself.
    rewards = torch.tensor([0.1, 0.7, 1.1, 5 / 1.6, 1e4 / 3])[:, None].expand(-1, size).contiguous()
    assert group_advantages(rewards).tolist() == torch.zeros(5, size).tolist()
    assert groups_without_spread(rewards) == 1


def test_groups_without_spread_are_counted():
    rewards = torch.tensor([[[1.0, 1.0], [1.0, 2.0]], [[0.0, 0.0], [3.0, 3.0]]])
    assert groups_without_spread(rewards).item() == 0.75


def test_positions_are_compared_with_the_groups_other_windows_that_reached_them():
    values, reached = torch.rand(2, 3, 5, 4), torch.rand(2, 3, 5, 4) < 0.4
    found = position_advantages(values, reached)
    for place in itertools.product(range(2), range(3), range(5), range(4)):
        b, n, g, j = place
        others = [values[b, n, h, j].item() for h in range(5) if h != g and reached[b, n, h, j]]
        expected = values[place].item() - sum(others) / len(others) if reached[place] and others else 0.0
        assert found[place].item() == pytest.approx(expected, abs=1e-6)


# The choice of windows


def eligible_slowly(mask: list[bool], first: int, window: int, context: int | None) -> list[bool]:
    length = len(mask)
    starts = [
        p >= first and p + 1 < length and mask[p + 1] and (context is None or p + window < context)
        for p in range(length)
    ]
    inside = [starts[p] and p + window < length and mask[p + window] for p in range(length)]
    return inside if any(inside) else starts


@pytest.mark.parametrize(("first", "window", "context"), [(0, 3, None), (1, 4, 9), (1, 12, None), (0, 1, 5)])
def test_eligible_prefixes_equal_a_loop(first, window, context):
    masks = torch.rand(20, 11) < torch.rand(20, 1)
    masks[0], masks[1] = False, True
    found = eligible_prefixes(masks, first, window, context)
    for mask, row in zip(masks.tolist(), found.tolist(), strict=True):
        assert row == eligible_slowly(mask, first, window, context)


@pytest.mark.parametrize("window", [1, 3, 20])
def test_window_priorities_equal_a_loop_and_ignore_padding(window):
    divergence, lengths = torch.rand(4, 10) * 20, [10, 7, 1, 4]
    mask = torch.arange(10) < torch.tensor(lengths)[:, None]
    found = window_priorities(divergence, window, mask.long())
    for row, length in enumerate(lengths):
        values = divergence[row, :length].tolist()
        for prefix in range(length):
            part = values[prefix : prefix + window]
            assert found[row, prefix].item() == pytest.approx(sum(part) / len(part), rel=1e-5)
    torch.testing.assert_close(window_priorities(divergence[:1], window), found[:1])


@pytest.mark.parametrize("window", [1, 3, 20])
def test_positions_within_windows_equal_a_loop(window):
    eligible = torch.rand(4, 10, generator=torch.Generator().manual_seed(0)) < 0.2
    for row, found in zip(eligible.tolist(), within_windows(eligible, window).tolist(), strict=True):
        assert found == [any(row[max(place - window + 1, 0) : place + 1]) for place in range(10)]


def test_window_priorities_stay_exact_behind_large_divergences():
    divergence = torch.cat([torch.full((1, 4000), 20.0), torch.full((1, 50), 1e-3)], dim=1)
    torch.testing.assert_close(window_priorities(divergence, 10)[0, 4000:], torch.full((50,), 1e-3))


@pytest.mark.parametrize("weighted", [False, True])
def test_chosen_prefixes_are_eligible_ascending_and_without_replacement(weighted):
    eligible = torch.rand(60, 12) < torch.linspace(0, 1, 60)[:, None]
    eligible[0], eligible[-1] = False, True
    priorities = torch.rand(60, 12) * 3 if weighted else None
    chosen, has_any = choose_prefixes(eligible, torch.rand(60, 12), 5, priorities)
    assert has_any.tolist() == eligible.any(-1).tolist() and not has_any.all()
    for row, prefixes in enumerate(chosen.tolist()):
        allowed = eligible[row].nonzero()[:, 0].tolist()
        if not allowed:
            assert prefixes == [0] * 5
            continue
        assert prefixes == sorted(prefixes) and set(prefixes) <= set(allowed)
        assert len(set(prefixes)) == min(5, len(allowed))
        counts = [prefixes.count(prefix) for prefix in set(prefixes)]
        assert max(counts) - min(counts) <= 1  # too few: repeated evenly


def test_a_single_draw_is_proportional_to_priority():
    priorities = torch.tensor([0.5, 2.0, 0.1, 9.9, 1.0, 1.5])
    eligible = torch.tensor([True, True, True, False, True, True])
    runs = 20_000
    uniforms = torch.rand(runs, 6, generator=torch.Generator().manual_seed(1))
    chosen, _ = choose_prefixes(eligible.expand(runs, -1), uniforms, 1, priorities.expand(runs, -1))
    kept = priorities[eligible]
    counts = chosen[:, 0].bincount(minlength=6)[eligible].double()
    assert counts.sum() == runs
    assert chi_square_p(counts, (runs * kept / kept.sum()).double()) > 1e-4


def test_two_draws_follow_successive_sampling_without_replacement():
    weights = [1.0, 2.0, 5.0]
    runs = 20_000
    uniforms = torch.rand(runs, 3, generator=torch.Generator().manual_seed(2))
    chosen, _ = choose_prefixes(
        torch.ones(runs, 3, dtype=torch.bool), uniforms, 2, torch.tensor(weights).expand(runs, -1)
    )
    left_out = 3 - chosen.sum(-1)  # of 0 + 1 + 2
    expected = []
    for out in range(3):
        a, b = (weights[i] for i in range(3) if i != out)
        expected.append(a / 8 * b / (8 - a) + b / 8 * a / (8 - b))
    assert sum(expected) == pytest.approx(1)
    assert chi_square_p(left_out.bincount(minlength=3).double(), runs * torch.tensor(expected).double()) > 1e-4


def test_uniform_choice_takes_every_prefix_alike():
    runs = 10_000
    uniforms = torch.rand(runs, 5, generator=torch.Generator().manual_seed(3))
    chosen, _ = choose_prefixes(torch.ones(runs, 5, dtype=torch.bool), uniforms, 2, None)
    counts = chosen.flatten().bincount(minlength=5).double()
    assert ((counts / (2 * runs) - 0.2).abs() < 0.01).all()


@pytest.mark.parametrize("uniform", [0.0, 1.0])
def test_extreme_random_numbers_and_zero_priorities_choose_only_eligible_prefixes(uniform):
    eligible = torch.tensor([[False, True, False, True]])
    chosen, has_any = choose_prefixes(eligible, torch.full((1, 4), uniform), 2, torch.zeros(1, 4))
    assert chosen.tolist() == [[1, 3]] and has_any.all()


def test_visits_are_those_of_decoding_the_text():
    """With verdicts that are certain, one decoding; with others, the mean over all verdicts that could come."""
    count, window = 5, 2

    def decode(verdicts) -> torch.Tensor:
        visits, prefix = torch.zeros(count, window), 0
        while prefix < count:
            kept = 0
            while kept < window:
                visits[prefix, kept] += 1
                if not verdicts[prefix][kept]:
                    break
                kept += 1
            prefix += kept + 1
        return visits

    chances = torch.rand(1, count, window, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(count, window)
    for bits in itertools.product((False, True), repeat=count * window):
        verdicts = torch.tensor(bits).view(count, window)
        certain = verdicts[None].float()
        assert torch.equal(visit_probabilities(certain)[0], decode(verdicts.tolist()))
        expected += torch.where(verdicts, chances[0], 1 - chances[0]).prod() * decode(verdicts.tolist())
    torch.testing.assert_close(visit_probabilities(chances)[0], expected)
