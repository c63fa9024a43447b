"""Window rules and their cost model: closed forms, synthetic data with known answers, and hostile inputs."""

import itertools
import math
import random

import pytest

from ppow_hf.runtime.cost_model import CostModel, OnlineCosts
from ppow_hf.runtime.draft_window import Window, draft_windows
from ppow_hf.runtime.estimator import MAX_KL, AcceptanceEstimator, decayed_kl
from ppow_hf.runtime.lookup import NEW, LookupAcceptance, TextMemory
from ppow_hf.runtime.trace import RoundTrace
from ppow_hf.runtime.windowing import (
    FixedWindow,
    HeuristicWindow,
    KLAdaptiveWindow,
    batch_pays,
    make_window_rule,
    start_windows,
)

GIVEN = OnlineCosts(given_cost_ratio=0.12, given_verification_cost=0.04)
CONFIDENT = AcceptanceEstimator.features(0.99, 0.05, 0.05, 0)
DOUBTFUL = AcceptanceEstimator.features(0.05, 3.5, 8.0, 0)


def play_round(rule, kept_chance, features, rng, limit=100, kl=None):
    """One round as the generation loop drives it, a draft token kept with `kept_chance`; returns (W, steps, k)."""
    longest = rule.start(limit)
    window, steps = 0, 0
    while longest > 0:
        steps += 1
        if not rule.include(window, features):
            break
        window += 1
        if window >= longest or not batch_pays([rule.outlook(window)]):
            break
    accepted = 0
    while accepted < window and rng.random() < kept_chance:
        accepted += 1
    value = kl if kl is not None else (0.05 if kept_chance > 0.5 else 5.0)
    rule.update(window, steps, accepted, [value] * min(accepted + 1, window))
    return window, steps, accepted


# -- the cost model


def best_window(costs: CostModel, acceptance: float, longest: int) -> int:
    """The fastest window, the shorter one on a tie."""
    return max(range(longest + 1), key=lambda window: (costs.speedup(acceptance, window), -window))


@pytest.mark.parametrize(("acceptance", "window"), [(0.6, 3), (0.7, 4), (0.8, 5), (0.9, 9)])
def test_best_window_at_cost_ratio_0_12_is_the_published_one(acceptance, window):
    assert best_window(CostModel(cost_ratio=0.12, verification_cost=0.0), acceptance, 40) == window


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("window", [0, 1, 4])
def test_expected_tokens_equal_the_sum_over_every_outcome(acceptance, window):
    expected = 0.0
    for kept in itertools.product([True, False], repeat=window):
        probability = math.prod(acceptance if k else 1 - acceptance for k in kept)
        accepted = next((i for i, k in enumerate(kept) if not k), window)
        expected += probability * (accepted + 1)
    assert CostModel().expected_tokens(acceptance, window) == pytest.approx(expected)


def test_cost_per_accepted_token_reproduces_the_explainers_milliseconds():
    costs = CostModel(cost_ratio=30 / 150)
    assert 150 * costs.cost_per_accepted(window=8, accepted=3) == pytest.approx(130)
    assert 150 * costs.cost_per_accepted(window=6.5, accepted=6.5) == pytest.approx(53, abs=0.1)


def test_a_round_without_accepted_tokens_costs_infinitely_much_per_accepted_token():
    assert CostModel().cost_per_accepted(window=4, accepted=0) == math.inf


def test_the_best_window_is_empty_when_acceptance_is_below_the_cost_of_a_draft_token():
    for acceptance in (0.0, 0.05, 0.11):
        assert best_window(CostModel(cost_ratio=0.12), acceptance, 10) == 0
    assert best_window(CostModel(cost_ratio=0.12), 0.14, 10) >= 1
    assert best_window(CostModel(cost_ratio=0.12, verification_cost=0.05), 0.15, 10) == 0


def test_an_early_end_of_drafting_pays_for_every_distribution_computed():
    costs = CostModel(cost_ratio=0.1, verification_cost=0.05)
    assert costs.round_cost(window=2, draft_steps=3) == pytest.approx(3 * 0.1 + 1 + 2 * 0.05)


# -- costs measured while decoding


def test_measured_costs_recover_a_synthetic_line():
    costs = OnlineCosts()
    rng = random.Random(0)
    for _ in range(200):
        window = rng.randint(0, 8)
        costs.observe_verification(window, 0.020 * (1 + 0.05 * window))
        costs.observe_drafting(window, 0.003 * window)
    assert costs.model.verification_cost == pytest.approx(0.05, rel=1e-6)
    assert costs.model.cost_ratio == pytest.approx(0.15, rel=1e-6)


def test_measured_costs_recover_a_noisy_line():
    costs = OnlineCosts(decay=0.99)
    rng = random.Random(0)
    for _ in range(1000):
        window = rng.randint(0, 8)
        costs.observe_verification(window, 0.020 * (1 + 0.05 * window) * rng.uniform(0.9, 1.1))
        costs.observe_drafting(window, 0.003 * window * rng.uniform(0.9, 1.1))
    assert costs.model.verification_cost == pytest.approx(0.05, abs=0.01)
    assert costs.model.cost_ratio == pytest.approx(0.15, rel=0.05)


def test_given_costs_are_never_replaced_by_measured_ones():
    costs = OnlineCosts(given_cost_ratio=0.3, given_verification_cost=0.0)
    for window in range(20):
        costs.observe_verification(window % 5, 1.0 + window % 5)
        costs.observe_drafting(2, 5.0)
    assert costs.model == CostModel(0.3, 0.0)


def test_prior_costs_stand_until_three_rounds_were_measured():
    costs = OnlineCosts(prior=CostModel(0.2, 0.1))
    costs.observe_verification(4, 9.0)
    costs.observe_drafting(4, 9.0)
    assert costs.model == CostModel(0.2, 0.1)


def test_equal_windows_leave_the_slope_at_its_prior():
    costs = OnlineCosts(prior=CostModel(0.12, 0.04))
    for _ in range(50):
        costs.observe_verification(5, 0.020 * 1.2)
        costs.observe_drafting(5, 0.010)
    assert costs.model.verification_cost == pytest.approx(0.04)
    assert costs.model.cost_ratio == pytest.approx(0.002 / 0.020)


def test_zero_and_decreasing_times_give_finite_costs():
    costs = OnlineCosts()
    for window in (0, 3, 6, 1, 0, 9):
        costs.observe_verification(window, 0.0)
        costs.observe_verification(window, 1.0 / (1 + window))
        costs.observe_drafting(0, 1.0)
        costs.observe_drafting(3, 0.0)
    assert 0 <= costs.model.verification_cost <= 1 and math.isfinite(costs.model.cost_ratio)


# -- the acceptance estimate


def test_fit_recovers_a_known_logistic():
    rng = random.Random(0)
    truth = AcceptanceEstimator(bias=0.4, confidence=0.9, entropy=-0.5, divergence=-0.3, position=-0.1)
    features, accepted = [], []
    for _ in range(20000):
        values = AcceptanceEstimator.features(
            rng.uniform(0.05, 0.99), rng.uniform(0, 3), math.exp(rng.uniform(-4, 2)), rng.randint(0, 9)
        )
        features.append(values)
        accepted.append(rng.random() < truth.probability(values))
    fitted = AcceptanceEstimator.fit(features, accepted)
    for name in ("bias", "confidence", "entropy", "divergence", "position"):
        assert getattr(fitted, name) == pytest.approx(getattr(truth, name), abs=0.1), name


def test_fit_on_separable_pairs_stays_finite():
    features = [AcceptanceEstimator.features(p, 1.0, 1.0, 0) for p in (0.1, 0.9) for _ in range(20)]
    fitted = AcceptanceEstimator.fit(features, [f[0] > 0 for f in features])
    assert fitted.probability(features[-1]) > 0.8 > 0.2 > fitted.probability(features[0])
    assert all(math.isfinite(w) for w in vars(fitted).values())


@pytest.mark.parametrize(("kept", "count"), [(3, 5), (30, 30), (0, 30), (0, 0)])
def test_fit_on_few_or_uniform_pairs_is_laplaces_constant(kept, count):
    features = [CONFIDENT, DOUBTFUL] * count
    fitted = AcceptanceEstimator.fit(features[:count], [True] * kept + [False] * (count - kept))
    assert fitted.probability(CONFIDENT) == pytest.approx((kept + 1) / (count + 2))
    assert fitted.probability(DOUBTFUL) == pytest.approx((kept + 1) / (count + 2))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 0.0, 1.0, 1e300])
def test_features_and_probability_are_finite_for_any_number(value):
    features = AcceptanceEstimator.features(value, value, value, 3)
    assert all(math.isfinite(f) for f in features)
    assert 0 < AcceptanceEstimator().probability(features) < 1


def test_higher_confidence_and_lower_divergence_raise_the_estimate():
    estimate = AcceptanceEstimator()
    confidence = [estimate.probability(AcceptanceEstimator.features(p, 1.0, 1.0, 0)) for p in (0.1, 0.5, 0.9)]
    divergence = [estimate.probability(AcceptanceEstimator.features(0.5, 1.0, kl, 0)) for kl in (5.0, 1.0, 0.01)]
    assert confidence == sorted(confidence) and divergence == sorted(divergence)


# -- the text so far


def test_memory_of_nothing_says_nothing():
    assert TextMemory().look_up([1, 2]) is None


def test_a_repeated_text_raises_the_estimate_and_another_token_lowers_it():
    rule = KLAdaptiveWindow(10, GIVEN, AcceptanceEstimator())
    rule.read([1, 2, 3, 4, 5, 1, 2, 3])
    unsure = (0.5, 0.3, 1.0)
    repeated, other, new = rule.describe(*unsure, 4, []), rule.describe(*unsure, 9, []), rule.describe(*unsure, 4, [9])
    prior = LookupAcceptance.PRIORS[NEW][2]  # three tokens are the same, seen once
    log_odds = pytest.approx(math.log(prior / (1 - prior)))
    assert repeated[5:7] == [log_odds, 0.0] and [-other[5], other[6]] == [log_odds, 1.0] and new[5:7] == [0.0, 0.0]
    assert rule.describe(*unsure, 5, [4])[5] > repeated[5]  # four
    estimates = [rule.acceptance_probability(features) for features in (repeated, new, other)]
    assert estimates == sorted(estimates, reverse=True) and estimates[0] - estimates[2] > 0.2


def test_a_text_that_goes_on_otherwise_makes_what_it_suggests_less_likely():
    rng = random.Random(0)
    rules = [KLAdaptiveWindow(10, GIVEN, AcceptanceEstimator()) for _ in range(2)]
    for rule, committed in zip(rules, ([1, 2, 3] * 40, [rng.randrange(3) for _ in range(120)]), strict=True):
        rule.read([1, 2, 3, 1, 2, 3])
        for token in committed:
            rule.read([token])
    repeating, random_ones = (rule.memory.look_up() for rule in rules)
    assert repeating is not None and random_ones is not None
    assert rules[0].memory.acceptance.probability(repeating) > 0.95
    assert rules[1].memory.acceptance.probability(random_ones) < 0.6


def test_what_follows_a_run_in_the_prompt_alone_is_no_evidence_of_what_is_kept():
    memory = TextMemory()
    memory.read([1, 2, 3] * 40)
    found = memory.look_up()
    assert found is not None
    assert memory.acceptance.probability(found) == LookupAcceptance().probability(found)
    memory.read([found.token])
    assert memory.acceptance.probability(found) > LookupAcceptance().probability(found)


def test_weights_of_a_drafter_that_was_fitted_to_other_features_are_left_aside():
    stored = {"greedy": {"weights": {"bias": 3.0, "agreement": 0.5}, "acceptance": 0.4}}
    rule = make_window_rule("kl", 10, GIVEN, stored)
    assert isinstance(rule, KLAdaptiveWindow) and rule.estimator == AcceptanceEstimator()
    kept = {"greedy": {"weights": {"bias": 3.0, "lookup": 0.5}, "acceptance": 0.4}}
    rule = make_window_rule("kl", 10, GIVEN, kept)
    assert isinstance(rule, KLAdaptiveWindow) and rule.estimator == AcceptanceEstimator(bias=3.0, lookup=0.5)


# -- the rules


def test_decayed_kl_is_the_exponentially_weighted_mean():
    values = [0.3, 2.0, 1.0]
    assert decayed_kl(1.0, values) == pytest.approx(0.7**3 + 0.3 * (0.7**2 * 0.3 + 0.7 * 2.0 + 1.0))


def test_decayed_kl_is_bounded_for_hostile_values():
    assert 0 <= decayed_kl(1.0, [math.nan, math.inf, -5.0, 0.0]) <= MAX_KL


def test_fixed_window_is_always_the_maximum_or_what_fits():
    rule = FixedWindow(4, GIVEN)
    for accepted in (0, 4, 2, 0):
        assert rule.start(100) == 4
        rule.update(4, 4, accepted, [1.0])
    assert rule.start(2) == 2 and rule.start(0) == 0


def test_heuristic_window_grows_by_two_and_shrinks_by_one():
    rule = HeuristicWindow(8, GIVEN)
    seen = []
    for kept_all in (True, True, False, False, True):
        window = rule.start(100)
        seen.append(window)
        rule.update(window, window, window if kept_all else 0, [1.0])
    assert seen == [5, 7, 8, 7, 6]
    for _ in range(20):
        rule.update(3, 3, 0, [1.0])
    assert rule.start(100) == 1


def test_make_window_rule_gives_each_rule_and_refuses_others():
    assert type(make_window_rule("kl", 5, GIVEN)) is KLAdaptiveWindow
    assert type(make_window_rule("fixed", 5, GIVEN)) is FixedWindow
    assert type(make_window_rule("heuristic", 5, GIVEN)) is HeuristicWindow
    with pytest.raises(ValueError, match="window: 'x'"):
        make_window_rule("x", 5, GIVEN)


def test_make_window_rule_takes_the_calibration_of_the_decoding_mode():
    calibration = {
        "greedy": {"weights": {"bias": 2.0}, "acceptance": 0.9},
        "sampling": {"weights": {"bias": -2.0}, "acceptance": 0.4},
    }
    assert make_window_rule("kl", 5, GIVEN, calibration, sampling=False).estimator.bias == 2.0
    assert make_window_rule("kl", 5, GIVEN, calibration, sampling=True).estimator.bias == -2.0


def test_adaptive_window_grows_with_agreement_and_shrinks_with_divergence():
    rule, rng = KLAdaptiveWindow(10, GIVEN), random.Random(0)
    agreeing = [play_round(rule, 0.98, CONFIDENT, rng)[0] for _ in range(40)]
    diverging = [play_round(rule, 0.1, DOUBTFUL, rng)[0] for _ in range(40)]
    recovering = [play_round(rule, 0.98, CONFIDENT, rng)[0] for _ in range(200)]
    assert sum(agreeing[20:]) / 20 > 7
    assert sum(diverging[20:]) / 20 < 1
    assert sum(recovering[-20:]) / 20 > 7


@pytest.mark.parametrize("features", [CONFIDENT, DOUBTFUL])
def test_adaptive_window_spends_next_to_nothing_on_a_drafter_that_is_never_right(features):
    rule, rng = KLAdaptiveWindow(10, GIVEN), random.Random(0)
    steps = [play_round(rule, 0.0, features, rng)[1] for _ in range(200)]
    assert sum(steps) * 0.12 <= 0.05 * len(steps)
    assert not rule.pays


def test_adaptive_window_keeps_probing_at_least_every_64_rounds():
    rule, rng = KLAdaptiveWindow(10, GIVEN), random.Random(0)
    windows = [play_round(rule, 0.0, DOUBTFUL, rng)[0] for _ in range(1000)]
    probes = [i for i, window in enumerate(windows) if window > 0]
    assert probes[-1] > 900
    assert max(b - a for a, b in itertools.pairwise(probes)) <= 65


def test_adaptive_window_beats_or_equals_not_drafting_and_tracks_the_best_fixed_window():
    """Tokens per cost unit in a simulation where the estimate is calibrated, over a range of drafters."""
    for kept_chance in (0.3, 0.6, 0.8, 0.95):
        rule, rng = KLAdaptiveWindow(10, GIVEN), random.Random(0)
        rule.estimator = AcceptanceEstimator(math.log(kept_chance / (1 - kept_chance)), 0.0, 0.0, 0.0, 0.0)
        tokens = cost = 0.0
        for _ in range(2000):
            window, steps, accepted = play_round(rule, kept_chance, CONFIDENT, rng)
            tokens += accepted + 1
            cost += GIVEN.model.round_cost(window, steps)
        best = max(GIVEN.model.speedup(kept_chance, window) for window in range(11))
        assert tokens / cost > 0.93 * best, kept_chance


@pytest.mark.parametrize("window", ["kl", "fixed", "heuristic"])
@pytest.mark.parametrize("costs", [(0.12, 0.04), (0.0, 0.0), (1e6, 1e6), (None, None)])
def test_every_rule_stays_within_its_bounds_for_hostile_numbers(window, costs):
    rng = random.Random(0)
    hostile = [0.0, math.inf, math.nan, -1.0, 3.0, 1e300]
    for max_window in (1, 3, 10):
        rule = make_window_rule(window, max_window, OnlineCosts(*costs))
        for _ in range(300):
            features = AcceptanceEstimator.features(*(rng.choice(hostile) for _ in range(3)), 0)
            limit = rng.choice([0, 1, 5, 10**9])
            drafted, _, _ = play_round(rule, rng.choice([0.0, 0.5, 1.0]), features, rng, limit, rng.choice(hostile))
            assert 0 <= drafted <= min(max_window, limit)
            assert 0 <= rule.lagged_kl <= MAX_KL
            rule.costs.observe_verification(drafted, rng.choice([0.0, 1e-9, 1e9]))
            rule.costs.observe_drafting(drafted, rng.choice([0.0, 1e-9, 1e9]))


def test_the_cost_of_verification_is_kept_while_windows_are_alike():
    """Seconds of a target whose forward of W + 1 tokens takes 1 + 0.3 W; the calibration said 0.03."""
    costs = OnlineCosts(prior=CostModel(0.05, 0.03))
    for window in (0, 1, 1, 2):
        costs.observe_verification(window, 1 + 0.3 * window)
    for _ in range(200):
        costs.observe_verification(1, 1.3)
    costs.observe_drafting(10, 2.0)
    assert costs.model.verification_cost == pytest.approx(0.3)
    assert costs.model.cost_ratio == pytest.approx(0.2)


def test_a_batch_tries_short_windows_before_it_knows_its_costs():
    costs = OnlineCosts(prior=CostModel(0.05, 0.0))
    rules = [KLAdaptiveWindow(8, costs, prior_acceptance=0.9) for _ in range(4)]
    begun = []
    for _ in range(6):
        limits = start_windows(rules, [100] * 4)
        begun.append(max(limits))
        costs.observe_verification(begun[-1], 1.0)
    assert begun == [0, 1, 1, 2, 8, 8]


# -- batches


class SameEverywhere:
    """[`Distributions`] that look the same at every position of each row: what a row's rule estimates is its own."""

    def __init__(self, rows: int):
        self.rows = rows

    def look(self, drafts):
        return [[0.5, 0.2, 1.0, 0]] * self.rows

    def draw(self):
        return [0] * self.rows

    def advance(self):
        pass


def batch_speed(acceptances, costs, rounds, rng) -> float:
    """Tokens of each row for each one-token target forward, of rows whose drafts are kept with these probabilities."""
    zeros = [0.0] * len(AcceptanceEstimator().weights)
    rules = [
        KLAdaptiveWindow(8, costs, AcceptanceEstimator(math.log(a / (1 - a)), *zeros), prior_acceptance=a)
        for a in acceptances
    ]
    tokens = cost = 0.0
    for _ in range(rounds):
        limits = start_windows(rules, [100] * len(rules))
        windows = [Window(rule, RoundTrace(0, 0, []), limit) for rule, limit in zip(rules, limits, strict=True)]
        if any(limits):
            draft_windows(windows, SameEverywhere(len(rules)))
        for window, acceptance in zip(windows, acceptances, strict=True):
            accepted = next(
                (j for j in range(window.record.window) if rng.random() >= acceptance), window.record.window
            )
            tokens += accepted + 1
            window.rule.update(window.record.window, window.record.draft_steps, accepted, [])
        steps = max(window.record.draft_steps for window in windows)
        cost += costs.model.round_cost(max(window.record.window for window in windows), steps)
    return tokens / cost / len(rules)


@pytest.mark.parametrize(
    "acceptances",
    [[0.9] + [0.1] * 7, [0.9, 0.9] + [0.2] * 6, [0.7] * 8, [0.05] * 8],
    ids=["one good row", "two", "all", "none"],
)
def test_rows_of_a_batch_draft_while_all_together_gain(acceptances):
    """As fast as the best common window, whose speed is known in closed form."""
    costs = OnlineCosts(given_cost_ratio=0.1, given_verification_cost=0.1)
    speeds = [
        sum(costs.model.speedup(acceptance, window) for acceptance in acceptances) / len(acceptances)
        for window in range(9)
    ]
    assert batch_speed(acceptances, costs, 600, random.Random(3)) > 0.95 * max(speeds)


def test_a_batch_rests_and_probes_together():
    costs = OnlineCosts(given_cost_ratio=0.6, given_verification_cost=0.4)
    rules = [KLAdaptiveWindow(8, costs, prior_acceptance=acceptance) for acceptance in (0.99, 0.1, 0.1, 0.1)]
    begun = []
    for _ in range(12):
        limits = start_windows(rules, [100] * 4)
        assert len(set(limits)) == 1
        begun.append(limits[0])
    assert begun == [0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0]
    assert KLAdaptiveWindow(8, OnlineCosts(0.2, 0.1), prior_acceptance=0.99).start(100) == 8
