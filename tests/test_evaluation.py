"""What is counted from decoding: by hand, on made-up traces, and against plain generation."""

import math
import random

import pytest
import torch

from ppow_hf import PPOWDrafter
from ppow_hf.measure.calibration import calibrate, fit_estimator
from ppow_hf.measure.evaluation import decode, repeated_ngrams, report
from ppow_hf.runtime.estimator import AcceptanceEstimator
from ppow_hf.runtime.trace import GenerationTrace, RoundTrace

PROMPTS = [[5, 9, 2], [1, 2, 3, 4, 5, 6], [40, 41]]
COSTS = {"cost_ratio": 0.1, "verification_cost": 0.02}


@pytest.fixture(scope="module")
def target(make_target):
    return make_target("llama", initializer_range=0.2)


@pytest.fixture(scope="module", params=["eagle", "standalone"])
def drafter(request, target):
    torch.manual_seed(0)
    return PPOWDrafter.from_target(target, request.param)


def made_up_round(window, accepted, kl=()):
    return RoundTrace(window=window, draft_steps=window, draft_ids=[0] * window, accepted=accepted, kl=list(kl))


def test_report_equals_a_hand_count():
    first = made_up_round(0, 0)  # the prompt's forward
    traces = [
        GenerationTrace(rounds=[first, made_up_round(4, 2, [0.1, 0.2, 0.6]), made_up_round(0, 0)]),
        GenerationTrace(rounds=[first, made_up_round(3, 3, [0.3, 0.3, 0.3]), made_up_round(5, 0, [1.2])]),
        GenerationTrace(rounds=[first]),
    ]
    outputs = [[1, 2, 3, 4], [5, 6, 7, 8, 9], [1]]
    found = report(outputs, traces)
    assert found.rounds == 4 and found.drafted == 12 and found.accepted == 5 and found.tokens == 10
    assert found.acceptance_length == pytest.approx((3 + 4 + 1) / 3)  # the round without a draft is not counted
    assert found.tokens_per_target_forward == pytest.approx((3 + 1 + 4 + 1) / 4)
    assert found.wasted == pytest.approx(7 / 12)
    assert found.kl == pytest.approx((0.1 + 0.2 + 0.6 + 0.3 * 3 + 1.2) / 7)
    assert found.repeated_8grams == 0


def test_report_of_nothing_is_that_of_plain_generation():
    for traces in ([], [GenerationTrace(rounds=[made_up_round(0, 0)])]):
        found = report([], traces)
        assert (found.acceptance_length, found.tokens_per_target_forward) == (1.0, 1.0)
        assert found.wasted == found.kl == found.repeated_8grams == found.rounds == found.drafted == 0


@pytest.mark.parametrize(
    ("outputs", "n", "expected"),
    [
        ([], 8, 0.0),
        ([[1, 2, 3]], 8, 0.0),
        ([[1, 2, 3, 4]], 2, 0.0),
        ([[1, 1, 1, 1]], 2, 2 / 3),
        ([[1, 2, 1, 2, 1]], 2, 2 / 4),
        ([[7] * 10], 8, 2 / 3),
        ([[1, 2, 3], [1, 2, 3]], 2, 0.0),  # each output on its own
        ([[1, 1, 1], [1, 2, 3]], 2, 1 / 4),
    ],
)
def test_repeated_ngrams_are_counted_in_each_output(outputs, n, expected):
    assert repeated_ngrams(outputs, n) == pytest.approx(expected)


def test_estimator_is_fitted_to_the_reached_positions_only():
    """Made-up acceptance: logistic in the confidence. What stands after a rejection is nonsense."""
    draw = random.Random(0)
    rounds, reached, kept = [], 0, 0
    for _ in range(3000):
        features, accepted, alive = [], 0, True
        for position in range(4):
            probability = draw.uniform(0.05, 0.95)
            if alive:
                features.append(AcceptanceEstimator.features(probability, 1.0, 0.1, position))
                reached += 1
                alive = draw.random() < probability  # kept with the drafter's own confidence
                accepted += alive
            else:
                features.append([50.0, 50.0, 50.0, 50.0])
        kept += accepted
        rounds.append(RoundTrace(window=4, draft_steps=4, draft_ids=[0] * 4, accepted=accepted, features=features))
    found = fit_estimator([GenerationTrace(rounds=rounds[:1000]), GenerationTrace(rounds=rounds[1000:])])
    assert found["observations"] == reached and found["acceptance"] == pytest.approx(kept / reached, abs=1e-4)
    estimator = AcceptanceEstimator(**found["weights"])
    assert estimator.confidence == pytest.approx(1.0, abs=0.1) and estimator.position == pytest.approx(0.0, abs=0.1)
    for probability in (0.1, 0.5, 0.9):
        features = AcceptanceEstimator.features(probability, 1.0, 0.1, 0)
        assert estimator.probability(features) == pytest.approx(probability, abs=0.05)


def test_estimator_of_no_traces_is_undecided():
    found = fit_estimator([])
    assert found["observations"] == 0 and found["acceptance"] == 0.5
    assert AcceptanceEstimator(**found["weights"]).probability([3.0, 1.0, 0.0, 2.0]) == pytest.approx(0.5)


@pytest.mark.parametrize("settings", [{"window": "fixed", "max_window": 4}, {"window": "kl", **COSTS}])
def test_greedy_decoding_writes_what_plain_generation_writes(target, drafter, settings):
    outputs, traces = decode(target, drafter, PROMPTS, 12, **settings)
    for prompt, output, trace in zip(PROMPTS, outputs, traces, strict=True):
        ids = torch.tensor([prompt])
        plain = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert output == plain[0, len(prompt) :].tolist()
        assert trace.window_rule == settings["window"]
        assert sum(r.accepted + 1 for r in trace.rounds) >= len(output)


@pytest.mark.parametrize("tree_nodes", [None, 6])
def test_prompts_decoded_together_have_the_rounds_they_have_alone(target, drafter, tree_nodes):
    settings = {"window": "fixed", "max_window": 4} | ({} if tree_nodes is None else {"tree_nodes": tree_nodes})
    alone, traces_alone = decode(target, drafter, PROMPTS, 12, **settings)
    together, traces = decode(target, drafter, PROMPTS, 12, batch_size=2, **settings)
    assert together == alone
    counted = [[[(r.window, r.accepted) for r in trace.rounds] for trace in some] for some in (traces_alone, traces)]
    assert counted[0] == counted[1]


def test_decoding_leaves_random_state_and_mode_alone(target, drafter):
    for training in (True, False):
        drafter.train(training)
        torch.manual_seed(123)
        expected = torch.rand(3)
        torch.manual_seed(123)
        decode(target, drafter, PROMPTS[:1], 6, temperature=1.0, window="fixed", max_window=3)
        assert torch.equal(torch.rand(3), expected) and drafter.training == training
    drafter.eval()


def test_sampled_decoding_is_reproduced_by_its_seed_when_costs_are_given(target, drafter):
    runs = [decode(target, drafter, PROMPTS[:2], 12, temperature=1.0, seed=seed, **COSTS)[0] for seed in (3, 4)]
    assert runs[0] != runs[1]
    torch.rand(17)  # whatever the global state
    assert decode(target, drafter, PROMPTS[:2], 12, temperature=1.0, seed=3, **COSTS)[0] == runs[0]


def test_a_report_adds_up_the_rounds_behind_the_prompt(target, drafter):
    outputs, traces = decode(target, drafter, PROMPTS, 10, window="fixed", max_window=3)
    added_up = report(outputs, traces)
    rounds = [r for trace in traces for r in trace.rounds[1:]]
    assert added_up.tokens == sum(map(len, outputs)) == 30
    assert added_up.rounds == len(rounds) and added_up.drafted == sum(len(r.draft_ids) for r in rounds)
    drafting = [r for r in rounds if r.draft_ids]
    assert added_up.acceptance_length == pytest.approx(sum(r.accepted + 1 for r in drafting) / len(drafting))


def test_calibration_holds_both_estimates_and_the_measured_costs(target, drafter):
    drafter.config.max_window = 3
    found = calibrate(target, drafter, PROMPTS, 10)
    assert set(found) == {"greedy", "sampling", "costs"}
    assert found["greedy"]["observations"] > 0 and 0 <= found["sampling"]["acceptance"] <= 1
    assert found["costs"]["cost_ratio"] > 0 and math.isfinite(found["costs"]["verification_cost"])
