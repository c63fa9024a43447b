"""Acceptance against slow references: plain loops, closed forms, exact enumeration and chi-square tests."""

import math
import random
from collections.abc import Callable
from fractions import Fraction
from itertools import product

import pytest
import torch
from acceptance_references import greedy_accepted_group
from torch import Tensor

from ppow_hf.runtime.acceptance import (
    confidence,
    divergence_priority,
    entropy,
    first_rejection_mask,
    greedy_accepted_counts,
    greedy_accepted_path,
    kl_divergence,
    likeliest_tokens,
    pending_token_scores,
    rejection_accepted_counts,
    rejection_sample_chain,
    residual_distribution,
    sample_from_uniform,
    total_variation,
)

LARGEST_FLOAT32_BELOW_ONE = 1 - 2**-24


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_probs(*shape: int, seed: int, sharpness: float = 1.5, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*shape, generator=generator(seed), dtype=torch.float64) * sharpness).softmax(-1).to(dtype)


def fits(counts: list[int], probs: list[float]) -> bool:
    """Chi-square test at p = 1e-4, critical value by the Wilson-Hilferty approximation."""
    total = sum(counts)
    assert all(probability * total > 5 for probability in probs), "too few samples for a chi-square test"
    statistic = sum((count - total * p) ** 2 / (total * p) for count, p in zip(counts, probs, strict=True))
    freedom = len(probs) - 1
    return statistic < freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3


# ---------------------------------------------------------------------------------------------------------------------
# How close two distributions are
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_window_rules_look_at(dtype):
    """Ids that bfloat16 could not hold, and tokens that a processor has made impossible."""
    logits = torch.randn(2, 3, 5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[..., ::2], logits[..., 4097] = -torch.inf, 9.0
    found = likeliest_tokens(logits.log_softmax(-1))
    for row, given in zip(logits.flatten(0, 1), found.flatten(0, 1), strict=True):
        probs = sorted(row.log_softmax(-1).double().exp().tolist(), reverse=True)
        doubt = -sum(p * math.log(p) for p in probs if p > 0)
        assert given.tolist() == pytest.approx([*probs[:2], doubt, 4097.0], rel=2e-5)


def test_divergences_equal_plain_loops():
    target, draft = random_probs(3, 2, 7, seed=0), random_probs(3, 2, 7, seed=1)
    variations = total_variation(target, draft)
    divergences, entropies = kl_divergence(target.log(), draft.log()), entropy(target.log())
    for i, j in product(range(3), range(2)):
        p, q = target[i, j].tolist(), draft[i, j].tolist()
        assert variations[i, j].item() == pytest.approx(1 - math.fsum(map(min, p, q)))
        assert divergences[i, j].item() == pytest.approx(
            math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        )
        assert entropies[i, j].item() == pytest.approx(-math.fsum(a * math.log(a) for a in p))


def test_pinsker_bounds_acceptance_from_below():
    for sharpness in (0.01, 0.3, 1.0, 5.0):
        target, draft = (random_probs(400, 6, seed=seed, sharpness=sharpness) for seed in (2, 3))
        bound = 1 - (kl_divergence(target.log(), draft.log()).clamp(min=0) / 2).sqrt()
        assert (1 - total_variation(target, draft) >= bound - 1e-12).all()


def test_divergences_of_equal_and_of_disjoint_distributions():
    probs = random_probs(5, 9, seed=4)
    assert kl_divergence(probs.log(), probs.log()).eq(0).all() and total_variation(probs, probs).eq(0).all()
    left, right = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    assert total_variation(left, right) == 1
    assert kl_divergence(left.log(), right.log()) == math.inf


def test_kl_counts_impossible_target_tokens_as_zero():
    target = torch.tensor([0.25, 0.75, 0.0, 0.0])
    draft = torch.tensor([0.5, 0.25, 0.25, 0.0])
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(3)
    assert kl_divergence(target.log(), draft.log()).item() == pytest.approx(expected)
    # exp(-200) is 0 in float32: finite logarithm, no mass.
    assert kl_divergence(torch.tensor([0.0, -200.0]), torch.tensor([0.0, -math.inf])) == 0


def test_all_logits_but_one_masked_gives_no_nan_and_no_nan_gradient():
    target_logits = torch.tensor([[-math.inf, 3.0, -math.inf], [0.5, 1.0, -math.inf]], requires_grad=True)
    draft_logits = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.1, -math.inf]], requires_grad=True)
    target, draft = target_logits.log_softmax(-1), draft_logits.log_softmax(-1)
    values = torch.stack([kl_divergence(target, draft), divergence_priority(target, draft), entropy(target)])
    assert values.isfinite().all() and entropy(target)[0] == 0 and confidence(target)[0] == 1
    values.sum().backward()
    assert target_logits.grad is not None and target_logits.grad.isfinite().all()
    assert draft_logits.grad is not None and draft_logits.grad.isfinite().all()


def test_gradient_of_kl_with_respect_to_draft_logits_is_q_minus_p():
    target = torch.tensor([0.7, 0.3, 0.0], dtype=torch.float64)
    logits = torch.tensor([0.2, -0.4, 1.0], dtype=torch.float64, requires_grad=True)
    kl_divergence(target.log(), logits.log_softmax(-1)).backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - target)


def test_missed_target_token_gives_infinite_kl_and_finite_draft_gradient():
    draft = torch.tensor([0.0, -math.inf], requires_grad=True)
    divergence = kl_divergence(torch.tensor([0.5, 0.5]).log(), draft)
    divergence.backward()
    assert divergence == math.inf and draft.grad is not None and draft.grad.isfinite().all()


def test_confidence_is_one_for_certain_and_zero_for_uniform():
    uniform, certain = torch.full((8,), 1 / 8).log(), torch.tensor([1.0] + [0.0] * 7).log()
    assert confidence(uniform).item() == pytest.approx(0, abs=1e-6) and confidence(certain) == 1
    half = torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0]).log()
    assert confidence(half).item() == pytest.approx(1 - 1 / 3)


def test_divergence_priority_is_confidence_times_kl():
    target, draft = random_probs(4, 6, seed=5), random_probs(4, 6, seed=6)
    for row, priority in enumerate(divergence_priority(target.log(), draft.log()).tolist()):
        p, q = target[row].tolist(), draft[row].tolist()
        certainty = 1 + sum(a * math.log(a) for a in p) / math.log(6)
        assert priority == pytest.approx(certainty * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    uniform = torch.full((4,), 0.25)
    missed = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert divergence_priority(uniform.log(), missed.log()) == 0
    assert divergence_priority(missed.log(), missed.flip(0).log()) == math.inf


def test_half_precision_is_computed_in_float32():
    target, draft = random_probs(32, 500, seed=7).bfloat16(), random_probs(32, 500, seed=8).bfloat16()
    variations = total_variation(target, draft)
    assert variations.dtype == torch.float32
    torch.testing.assert_close(variations.double(), (target.double() - draft.double()).abs().sum(-1) / 2)


# ---------------------------------------------------------------------------------------------------------------------
# Chains and groups at T = 0
# ---------------------------------------------------------------------------------------------------------------------


def slow_leading_agreements(drafted: list[int], chosen: list[int]) -> int:
    count = 0
    for left, right in zip(drafted, chosen, strict=True):
        if left != right:
            break
        count += 1
    return count


def test_greedy_counts_equal_a_loop():
    drafted = torch.randint(2, (5, 40, 6), generator=generator(13))
    chosen = torch.randint(2, (5, 40, 6), generator=generator(14))
    own_windows = torch.randint(7, (5, 40), generator=generator(15))
    valid = torch.arange(6) < own_windows[..., None]
    counts, valid_counts = greedy_accepted_counts(drafted, chosen), greedy_accepted_counts(drafted, chosen, valid)
    assert counts.dtype == torch.int64
    for i, j in product(range(5), range(40)):
        window = int(own_windows[i, j])
        assert counts[i, j] == slow_leading_agreements(drafted[i, j].tolist(), chosen[i, j].tolist())
        assert valid_counts[i, j] == slow_leading_agreements(
            drafted[i, j, :window].tolist(), chosen[i, j, :window].tolist()
        )


def test_empty_windows_are_accepted_with_zero_tokens():
    empty = torch.zeros(3, 0, dtype=torch.long)
    assert greedy_accepted_counts(empty, empty).tolist() == [0, 0, 0]
    assert rejection_accepted_counts(empty, empty.float(), empty.float(), empty.float()).tolist() == [0, 0, 0]
    assert first_rejection_mask(torch.zeros(3, dtype=torch.long), 0).shape == (3, 0)
    target_probs = torch.eye(4)[:3, None]  # [3, 1, 4], each certain of token 0, 1, 2
    counts, next_ids = rejection_sample_chain(
        empty, torch.zeros(3, 0, 4), target_probs, empty.float(), torch.tensor([0.0, 0.5, LARGEST_FLOAT32_BELOW_ONE])
    )
    assert counts.tolist() == [0, 0, 0] and next_ids.tolist() == [0, 1, 2]


def test_greedy_counts_refuse_the_bonus_position():
    with pytest.raises(ValueError, match="target_choices: shape .*bonus"):
        greedy_accepted_counts(torch.zeros(2, 3), torch.zeros(2, 4))


def test_first_rejection_mask_includes_the_first_rejected_token():
    assert first_rejection_mask(torch.tensor([[0, 1], [2, 3]]), 3).tolist() == [
        [[True, False, False], [True, True, False]],
        [[True, True, True], [True, True, True]],
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Drawing by inverse distribution function
# ---------------------------------------------------------------------------------------------------------------------


def test_sample_from_uniform_equals_exact_arithmetic_on_a_large_vocabulary():
    weights = torch.randint(8, (128_256,), generator=generator(18)).tolist()  # an eighth of the tokens is impossible
    total, reached, checked = sum(weights), 0, random.Random(19).sample(range(len(weights)), 40)
    middles = {}  # the middle of each token's own interval, exactly
    for token, weight in enumerate(weights):
        middles[token] = Fraction(2 * reached + weight, 2 * total)
        reached += weight
    checked = [token for token in checked if weights[token] > 0]
    probs = (torch.tensor(weights, dtype=torch.float64) / total).float()
    uniforms = torch.tensor([float(middles[token]) for token in checked], dtype=torch.float64)
    assert sample_from_uniform(probs.expand(len(checked), -1), uniforms).tolist() == checked


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sample_from_uniform_never_returns_an_impossible_token(dtype: torch.dtype):
    probs = random_probs(3, 128_000, seed=20, dtype=dtype)
    probs[:, :50], probs[:, -50:], probs[:, 1000:90_000] = 0, 0, 0
    for uniform in (0.0, 2**-149, 0.3, 0.999999, LARGEST_FLOAT32_BELOW_ONE, 1 - 2**-53, 1.0):
        ids = sample_from_uniform(probs, torch.full((3,), uniform, dtype=torch.float64))
        assert (probs.gather(-1, ids[:, None]) > 0).all()
    assert sample_from_uniform(probs, torch.zeros(3)).tolist() == [50] * 3


def test_sample_from_uniform_draws_several_tokens_of_a_row():
    probs, uniforms = random_probs(2, 3, 50, seed=23), torch.rand(2, 3, 7, generator=generator(24))
    probs[..., ::3] = 0
    found = sample_from_uniform(probs, uniforms)
    assert all(torch.equal(found[..., c], sample_from_uniform(probs, uniforms[..., c])) for c in range(7))


def test_sample_from_uniform_of_certain_distributions():
    for uniform in (0.0, 0.5, LARGEST_FLOAT32_BELOW_ONE):
        assert sample_from_uniform(torch.eye(5), torch.full((5,), uniform)).tolist() == list(range(5))


def test_sample_from_uniform_refuses_rows_without_mass_or_with_nan():
    probs = torch.full((3, 4), 0.25)
    probs[0], probs[1, 2] = 0, math.nan
    with pytest.raises(ValueError, match=r"probs: 2 row\(s\)"):
        sample_from_uniform(probs, torch.full((3,), 0.5))
    with pytest.raises(ValueError, match="uniforms: shape"):
        sample_from_uniform(probs, torch.full((2,), 0.5))


# ---------------------------------------------------------------------------------------------------------------------
# Chains at T > 0
# ---------------------------------------------------------------------------------------------------------------------


def test_residual_equals_a_loop_and_is_p_where_p_equals_q():
    target, draft = random_probs(6, 5, seed=21), random_probs(6, 5, seed=22)
    residuals = residual_distribution(target, draft)
    for row in range(6):
        excess = [max(p - q, 0) for p, q in zip(target[row].tolist(), draft[row].tolist(), strict=True)]
        assert residuals[row].tolist() == pytest.approx([value / sum(excess) for value in excess])
    assert residual_distribution(target, target).equal(target)
    certain = torch.tensor([0.0, 1.0, 0.0])
    assert residual_distribution(certain, torch.tensor([0.5, 0.2, 0.3])).equal(certain)


def test_equal_probabilities_are_accepted_up_to_the_largest_uniform():
    probs = random_probs(1000, 3, seed=23, dtype=torch.float32)
    probs[0], probs[1] = 2**-149, 1.0  # the smallest and the largest that float32 holds
    uniforms = torch.full((1000, 3), LARGEST_FLOAT32_BELOW_ONE)
    ids = torch.zeros(1000, 3, dtype=torch.long)
    assert (rejection_accepted_counts(ids, probs, probs, uniforms) == 3).all()


def test_impossible_target_tokens_are_rejected_even_at_uniform_zero():
    counts = rejection_accepted_counts(
        torch.zeros(1, 1), torch.tensor([[0.5]]), torch.tensor([[0.0]]), torch.tensor([[0.0]])
    )
    assert counts.tolist() == [0]


def sixths(*shape: int, seed: int, positive: bool = False) -> Tensor:
    """Random probabilities over three tokens in sixths."""
    choices = [(1, 2, 3), (2, 2, 2), (3, 2, 1), (2, 3, 1), (1, 1, 4)]
    choices = [row for row in choices if max(row) <= 3] if positive else [*choices, (0, 3, 3), (6, 0, 0), (0, 1, 5)]
    rows = torch.randint(len(choices), shape, generator=generator(seed))
    return torch.tensor(choices, dtype=torch.float64)[rows] / 6


def exact_chain_law(claimed_draft: Callable[[Tensor], Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """Law of three tokens after one round of window 2, every draft and verdict enumerated, and the target's own law.

    With all probabilities in sixths and Q <= 3/6, every threshold of a verdict or a draw is a multiple of 1/6, so the
    six cell middles integrate each uniform exactly.
    """
    p1, p2, p3 = sixths(seed=seed), sixths(3, seed=seed + 1), sixths(3, 3, seed=seed + 2)
    q1, q2 = sixths(seed=seed + 3, positive=True), sixths(3, seed=seed + 4, positive=True)
    cases = torch.tensor(list(product(range(3), range(3), *[range(6)] * 3)))  # x_1, x_2 and three uniforms
    x1, x2 = cases[:, 0], cases[:, 1]
    uniforms = (cases[:, 2:] + 0.5) / 6
    counts, next_ids = rejection_sample_chain(
        cases[:, :2],
        claimed_draft(torch.stack([q1.expand(len(cases), 3), q2[x1]], dim=1)),
        torch.stack([p1.expand(len(cases), 3), p2[x1], p3[x1, x2]], dim=1),
        uniforms[:, :2],
        uniforms[:, 2],
    )
    law = torch.zeros(3, 3, 3, dtype=torch.float64)
    for (a, b), k, y, weight in zip(
        cases[:, :2].tolist(), counts.tolist(), next_ids.tolist(), (q1[x1] * q2[x1, x2] / 6**3).tolist(), strict=True
    ):
        if k == 0:  # what is not yet generated is completed by the target
            law[y] += weight * p2[y][:, None] * p3[y]
        elif k == 1:
            law[a, y] += weight * p3[a, y]
        else:
            law[a, b, y] += weight
    return law, p1[:, None, None] * p2[:, :, None] * p3


@pytest.mark.parametrize("seed", range(100, 130, 5))
def test_chain_reproduces_the_target_exactly(seed: int):
    law, target_law = exact_chain_law(lambda draft_probs: draft_probs, seed)
    torch.testing.assert_close(law, target_law, rtol=0, atol=1e-12)


def test_chain_with_a_wrong_draft_distribution_does_not_reproduce_the_target():
    errors = []
    for seed in range(100, 130, 5):
        law, target_law = exact_chain_law(lambda draft_probs: draft_probs.roll(1, dims=-1), seed)
        errors.append((law - target_law).abs().max().item())
    assert max(errors) > 0.02


def sampled_chain_fits(wrong_draft_probs: bool) -> bool:
    """Chi-square test of the first two tokens of 50,000 rounds (V = 3, W = 2, float32) against P."""
    samples, dtype = 50_000, torch.float32
    p1, p2, p3 = (random_probs(*shape, 3, seed=30 + len(shape), dtype=dtype) for shape in ((), (3,), (3, 3)))
    q1, q2 = (random_probs(*shape, 3, seed=40 + len(shape), dtype=dtype) for shape in ((), (3,)))
    draws = torch.rand(samples, 6, generator=generator(50))
    x1 = sample_from_uniform(q1.expand(samples, 3), draws[:, 0])
    x2 = sample_from_uniform(q2[x1], draws[:, 1])
    draft_probs = torch.stack([q1.expand(samples, 3), q2[x1]], dim=1)
    counts, next_ids = rejection_sample_chain(
        torch.stack([x1, x2], dim=1),
        draft_probs.sqrt() / draft_probs.sqrt().sum(-1, keepdim=True) if wrong_draft_probs else draft_probs,
        torch.stack([p1.expand(samples, 3), p2[x1], p3[x1, x2]], dim=1),
        draws[:, 2:4],
        draws[:, 4],
    )
    first = torch.where(counts == 0, next_ids, x1)
    completed = sample_from_uniform(p2[first], draws[:, 5])
    second = torch.where(counts == 0, completed, torch.where(counts == 1, next_ids, x2))
    return fits(torch.bincount(first * 3 + second, minlength=9).tolist(), (p1[:, None] * p2).flatten().tolist())


def test_sampled_chain_follows_the_target_and_a_tempered_draft_distribution_does_not():
    assert sampled_chain_fits(wrong_draft_probs=False)
    assert not sampled_chain_fits(wrong_draft_probs=True)


def test_chain_equals_a_loop_in_float32_for_any_batch_shape():
    batch, window, vocabulary = (3, 20), 4, 6
    draft_probs = random_probs(*batch, window, vocabulary, seed=60, dtype=torch.float32)
    target_probs = random_probs(*batch, window + 1, vocabulary, seed=61, dtype=torch.float32)
    draft_ids = torch.randint(vocabulary, (*batch, window), generator=generator(62))
    uniforms = torch.rand(*batch, window, generator=generator(63))
    next_uniforms = torch.rand(*batch, generator=generator(64))
    own_windows = torch.randint(window + 1, batch, generator=generator(65))
    valid = torch.arange(window) < own_windows[..., None]
    counts, next_ids = rejection_sample_chain(draft_ids, draft_probs, target_probs, uniforms, next_uniforms, valid)
    for row in product(*map(range, batch)):
        k, rest = 0, None
        while k < own_windows[row]:
            token = int(draft_ids[row][k])
            p, q = target_probs[row][k].tolist(), draft_probs[row][k].tolist()
            if uniforms[row][k].item() >= p[token] / q[token]:
                rest = [max(a - b, 0) for a, b in zip(p, q, strict=True)]
                break
            k += 1
        rest = target_probs[row][k].tolist() if rest is None else rest
        threshold, token = next_uniforms[row].item() * sum(rest), 0
        while sum(rest[: token + 1]) <= threshold:
            token += 1
        assert (int(counts[row]), int(next_ids[row])) == (k, token)


def test_rejection_counts_equal_the_chains_counts():
    draft_probs, target_probs = random_probs(200, 3, 4, seed=66), random_probs(200, 4, 4, seed=67)
    draft_ids = torch.randint(4, (200, 3), generator=generator(68))
    uniforms = torch.rand(200, 3, generator=generator(69))
    chain_counts, _ = rejection_sample_chain(draft_ids, draft_probs, target_probs, uniforms, uniforms[:, 0])
    q = draft_probs.gather(-1, draft_ids[..., None])[..., 0]
    p = target_probs[:, :3].gather(-1, draft_ids[..., None])[..., 0]
    assert rejection_accepted_counts(draft_ids, q, p, uniforms).equal(chain_counts)


def test_certain_target_makes_rejection_sampling_greedy():
    choices = torch.randint(3, (300, 4), generator=generator(70))
    draft_probs = random_probs(300, 3, 3, seed=71, dtype=torch.float32)
    draft_ids = torch.randint(3, (300, 3), generator=generator(72))
    uniforms = torch.rand(300, 4, generator=generator(73))
    counts, next_ids = rejection_sample_chain(
        draft_ids, draft_probs, torch.eye(3)[choices], uniforms[:, :3], uniforms[:, 3]
    )
    assert counts.equal(greedy_accepted_counts(draft_ids, choices[:, :3]))
    assert next_ids.equal(choices.gather(1, counts[:, None])[:, 0])


def test_a_pending_token_and_what_replaces_it_are_distributed_as_the_target():
    draft_probs, target_probs = random_probs(6, seed=60), random_probs(6, seed=61)
    law = torch.zeros(6, dtype=torch.float64)
    for token in range(6):
        kept = (target_probs[token] / draft_probs[token]).clamp(max=1)
        for uniform, weight in ((kept - 1e-9, kept), (kept + 1e-9, 1 - kept)):
            scores = pending_token_scores(target_probs.log()[None], token, draft_probs[None], uniform)
            law += draft_probs[token] * weight * scores[0].softmax(-1)
    torch.testing.assert_close(law, target_probs)


def test_chain_names_the_missing_bonus_row():
    with pytest.raises(ValueError, match="target_probs: shape .*one row more"):
        rejection_sample_chain(
            torch.zeros(1, 2).long(), torch.ones(1, 2, 3), torch.ones(1, 2, 3), torch.zeros(1, 2), torch.zeros(1)
        )


# ---------------------------------------------------------------------------------------------------------------------
# Trees
# ---------------------------------------------------------------------------------------------------------------------


def random_parents(nodes: int, seed: int) -> list[int]:
    return [random.Random(f"{seed}:{node}").randrange(-1, node) for node in range(nodes)]


def slow_ancestors(node: int, parents: list[int]) -> list[int]:
    return [] if parents[node] == -1 else [*slow_ancestors(parents[node], parents), parents[node]]


def test_greedy_path_is_the_longest_of_all_paths():
    lengths = []
    for seed in range(200):
        parents, draw = random_parents(12, seed), random.Random(seed)
        tokens, choices = ([draw.randrange(2) for _ in range(12)] for _ in range(2))
        root_choice = draw.randrange(2)
        accepted = []  # every path from the context that agrees throughout
        for node in range(12):
            path = [*slow_ancestors(node, parents), node]
            wanted = [root_choice, *(choices[before] for before in path[:-1])]
            if [tokens[step] for step in path] == wanted:
                accepted.append(path)
        expected = max(accepted, key=len, default=[])  # the first of the longest
        found = greedy_accepted_path(torch.tensor(tokens), torch.tensor(parents), root_choice, torch.tensor(choices))
        assert found == expected
        lengths.append(len(found))
    assert min(lengths) == 0 and max(lengths) >= 4


def test_greedy_path_prefers_the_longer_of_duplicate_siblings():
    path = greedy_accepted_path(
        torch.tensor([7, 7, 3]), torch.tensor([-1, -1, 1]), torch.tensor(7), torch.tensor([3, 3, 9])
    )
    assert path == [1, 2]
    empty = torch.tensor([], dtype=torch.long)
    assert greedy_accepted_path(empty, empty, 7, empty) == []


def test_parents_after_their_children_are_refused():
    for parents in ([0], [-1, 2, 0], [-2]):
        nodes = torch.zeros(len(parents), dtype=torch.long)
        with pytest.raises(ValueError, match="parents: .*before its children"):
            greedy_accepted_path(nodes, torch.tensor(parents), 0, nodes)


def test_greedy_path_of_a_group_is_the_greedy_group():
    drafted = torch.randint(2, (30, 3, 4), generator=generator(80))
    chosen = torch.randint(2, (30, 3, 4), generator=generator(81))
    chosen[:, :, 0] = chosen[:, :1, 0]  # after the context the target has one choice
    counts, index = greedy_accepted_group(drafted, chosen)
    parents = torch.tensor([-1, 0, 1, 2, -1, 4, 5, 6, -1, 8, 9, 10])  # three chains side by side
    for row in range(30):
        node_choices = chosen[row].roll(-1, dims=-1).flatten()  # a node's choice is the next position's
        path = greedy_accepted_path(drafted[row].flatten(), parents, int(chosen[row, 0, 0]), node_choices)
        assert path == [int(index[row]) * 4 + step for step in range(int(counts[row]))]
