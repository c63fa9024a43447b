"""The loop's overhead, measured where the models' own time is known."""

import json
import time

import pytest
import torch
from test_batches import noisy_copy

from ppow_hf import PPOWDrafter, cli
from ppow_hf.measure.overhead import measure_overhead


def test_with_slow_models_the_loop_costs_next_to_nothing(make_target):
    """Forwards that sleep take a known time, and what the loop does besides vanishes beside it."""
    target = make_target("llama", num_layers=1)
    drafter = noisy_copy(target, 0.05)
    hooks = [
        target.register_forward_pre_hook(lambda *_: time.sleep(0.1)),
        drafter.draft_model.model.base_model.register_forward_pre_hook(lambda *_: time.sleep(0.02)),
    ]
    try:
        measured = measure_overhead(target, drafter, [torch.tensor([[3, 1, 4]])], 4, max_new_tokens=16, repeats=2)
    finally:
        for hook in hooks:
            hook.remove()
    assert 0.1 < measured.target_seconds < 0.15 and 0.02 < measured.draft_step_seconds < 0.03
    assert measured.round_seconds > 0.18 and measured.ratio == pytest.approx(1.0, abs=0.15)
    assert measured.new_tokens == 16 and 1 <= measured.acceptance_length <= 5


def test_a_block_drafters_round_has_one_step(make_target):
    target = make_target("llama")
    drafter = PPOWDrafter.from_target(target, "block", block_size=4)
    hooks = [
        target.register_forward_pre_hook(lambda *_: time.sleep(0.1)),
        drafter.draft_model.norm.register_forward_pre_hook(lambda *_: time.sleep(0.05)),  # once in a block
    ]
    try:
        measured = measure_overhead(target, drafter, [torch.tensor([[3, 1, 4]])], 4, max_new_tokens=16, repeats=2)
    finally:
        for hook in hooks:
            hook.remove()
    assert measured.draft_steps == 1 and 0.05 < measured.draft_step_seconds < 0.08
    assert measured.round_seconds > 0.15 and measured.ratio == pytest.approx(1.0, abs=0.2)


def test_no_room_for_a_round_is_said(make_target):
    target = make_target("llama", num_layers=1)
    with pytest.raises(ValueError, match="max_new_tokens: 3 leave no room for rounds of 4"):
        measure_overhead(target, noisy_copy(target, 0.05), [torch.tensor([[3, 1, 4]])], 4, max_new_tokens=3)


def test_the_command_prints_and_writes_the_ratio(tmp_path, capsys):
    file = tmp_path / "overhead.json"
    arguments = [
        "overhead",
        "--target",
        "tiny",
        "--drafter",
        "tiny-eagle",
        "--num-prompts",
        "1",
        "--max-new-tokens",
        "32",
    ]
    cli.main([*arguments, "--max-new-tokens", "32", "--window", "2", "--json", str(file)])
    numbers = json.loads(file.read_text())
    parts = numbers["window"] * numbers["draft_step_seconds"] + numbers["target_seconds"]
    assert numbers["ratio"] == pytest.approx(numbers["round_seconds"] / parts)
    assert f"{numbers['ratio']:.3f} x (2 x draft step" in capsys.readouterr().out
