"""The acceptance_length metric through `evaluate`, and acceptance measured by real decoding with it."""

import random
import shutil
from pathlib import Path

import evaluate
import numpy
import pytest
import torch
from transformers.dynamic_module_utils import get_imports

from ppow_hf import PPOWDrafter, metrics
from ppow_hf.measure.intervals import ratio_interval
from ppow_hf.runtime.trace import GenerationTrace, RoundTrace


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    """Loaded from a copy in another folder, which has nothing of the package beside it."""
    folder = tmp_path_factory.mktemp("elsewhere") / "acceptance_length"
    shutil.copytree(metrics.path("acceptance_length"), folder)
    return evaluate.load(str(folder))


def test_hand_worked_example(metric):
    result = metric.compute(drafted=[4, 4, 0, 2], accepted=[4, 1, 0, 0], cost_ratio=0.25, verification_cost=0.05)
    assert result["acceptance_length"] == pytest.approx((5 + 2 + 1) / 3)
    assert result["acceptance_by_position"] == pytest.approx([2 / 3, 1 / 3, 1 / 2, 1 / 2])
    assert result["tokens_per_target_forward"] == pytest.approx(9 / 4)
    assert result["wasted"] == pytest.approx(5 / 10)
    assert result["expected_speedup"] == pytest.approx(9 / (4 + 10 * 0.3))


def test_it_agrees_with_what_a_trace_says_of_the_same_rounds(metric):
    chooser = random.Random(0)
    windows = [chooser.randint(0, 8) for _ in range(200)]
    kept = [chooser.randint(0, window) for window in windows]
    trace = GenerationTrace(rounds=[RoundTrace(w, w, [0] * w, k) for w, k in zip(windows, kept, strict=True)])
    result = metric.compute(drafted=windows, accepted=kept)
    assert result["acceptance_length"] == pytest.approx(trace.acceptance_length)
    assert result["tokens_per_target_forward"] == pytest.approx(trace.tokens_per_target_forward)
    assert result["wasted"] == pytest.approx(trace.wasted)
    assert result["acceptance_by_position"] == pytest.approx(trace.acceptance_by_position())
    assert "expected_speedup" not in result


def test_the_explainers_cost_example(metric):
    """T_target 150 ms, T_draft 30 ms: fixed 8 with 3 tokens costs 130 ms each, 6.5 tokens fully accepted 53 ms."""
    fixed = metric.compute(drafted=[8], accepted=[2], cost_ratio=30 / 150)
    assert 150 / fixed["expected_speedup"] == pytest.approx((30 * 8 + 150) / 3)
    adaptive = metric.compute(drafted=[6, 7], accepted=[5, 6], cost_ratio=30 / 150)
    assert 150 / adaptive["expected_speedup"] == pytest.approx((30 * 6.5 + 150) / 6.5)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"drafted": [2], "accepted": [3]}, "accepted: 3 given for round 0"),
        ({"drafted": [2], "accepted": [-1]}, "accepted: -1"),
        ({"drafted": [2], "accepted": [1], "cost_ratio": -1.0}, "cost_ratio: -1.0"),
    ],
)
def test_impossible_counts_are_named(metric, counts, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(**counts)


def test_an_unknown_metric_is_named():
    with pytest.raises(ValueError, match="'bleu' is not a metric"):
        metrics.path("bleu")


def test_the_metric_imports_nothing_of_the_package():
    imports = get_imports(Path(metrics.path("acceptance_length")) / "acceptance_length.py")
    assert set(imports) <= {"collections", "datasets", "evaluate"}


def test_acceptance_is_measured_by_real_decoding(make_target):
    target = make_target("llama", initializer_range=0.3)
    drafter = PPOWDrafter.from_target(target, "standalone", num_hidden_layers=4, max_window=4)
    drafter.draft_model.model.load_state_dict(target.state_dict())  # the target itself: everything is accepted
    prompts = [[5, 9, 17], [3, 8, 2, 40]]
    result = metrics.measure_acceptance(
        target, drafter, {"twin": prompts}, windows=("fixed",), max_new_tokens=20, target_name="/home/someone/twin"
    )
    (row,) = result["rows"]
    assert row["acceptance_by_position"] == [1.0] * 4 and row["wasted"] == 0.0
    assert row["drafted"] == row["accepted"] and row["prompts"] == 2
    # 20 tokens: the prompt's forward gives 1, then rounds of 5, the last one cut to what is left
    assert row["rounds"] == 2 * 4 and row["acceptance_length"] == pytest.approx(19 / 4)
    assert row["acceptance_length_interval"] is None  # of two prompts
    assert result["target"] == "twin" and result["versions"]["torch"] == torch.__version__


def test_a_longest_window_of_no_tokens_is_refused(make_target):
    target = make_target("llama")
    drafter = PPOWDrafter.from_target(target, "standalone", num_hidden_layers=1)
    with pytest.raises(ValueError, match="max_window: 0"):
        metrics.measure_acceptance(target, drafter, {"some": [[5, 9]]}, windows=("fixed",), max_window=0)


def test_the_interval_of_a_mean_over_prompts_is_that_of_the_ratio_of_sums():
    generator = numpy.random.default_rng(1)
    rounds = generator.integers(5, 40, size=200)
    kept = rounds * generator.normal(2.0, 0.4, size=200)
    low, high = ratio_interval((kept, rounds))
    ratio = kept.sum() / rounds.sum()
    error = 1.96 * ((kept - ratio * rounds) ** 2).sum() ** 0.5 / rounds.sum()  # the delta method's
    assert [low, high] == pytest.approx([ratio - error, ratio + error], rel=0.01)
    assert ratio_interval((kept[:4], rounds[:4])) is None
    assert ratio_interval(([0] * 5, [0] * 5)) is None  # nothing was drafted


def test_a_measured_row_has_the_interval_over_its_prompts(make_target):
    target = make_target("llama", initializer_range=0.3)
    drafter = PPOWDrafter.from_target(target, "standalone", num_hidden_layers=1, max_window=4)
    prompts = [[5, 9, 17 + place] for place in range(6)]
    result = metrics.measure_acceptance(target, drafter, {"some": prompts}, windows=("fixed",), max_new_tokens=20)
    (row,) = result["rows"]
    low, high = row["acceptance_length_interval"]
    assert 1 <= low <= row["acceptance_length"] <= high <= 5 and low < high
