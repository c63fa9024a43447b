"""What `ppow plan` computes from a configuration: parameters, memory by part, disk and speed."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config

from ppow_hf import PPOWDrafter, cli
from ppow_hf.training.plan import LONGEST_COUNTED, WAYS, LiveBytes, Machine, Shape, make_plan, through_points
from ppow_hf.training.plan_benchmark import SHAPES, compare

MACHINE = Machine(flops=1e14, bandwidth=1e12)
SMALL = LlamaConfig(
    vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False, dtype="float32",
)  # fmt: skip
LLAMA = {"vocab_size": 128_256, "num_key_value_heads": 8, "tie_word_embeddings": False, "dtype": "bfloat16"}
LLAMA_8B = LlamaConfig(
    **LLAMA, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32
)  # fmt: skip
LLAMA_70B = LlamaConfig(
    **LLAMA, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64
)  # fmt: skip
QWEN3_32B = Qwen3Config(
    vocab_size=151_936, hidden_size=5120, intermediate_size=25_600, num_hidden_layers=64, num_attention_heads=64,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=False, dtype="bfloat16",
)  # fmt: skip


@pytest.mark.parametrize("architecture", ["eagle", "standalone"])
def test_parameters_and_states_are_those_of_the_real_models(architecture):
    plan = make_plan(SMALL, Shape(architecture, 64, batch=2, mixed=False), MACHINE)
    target = LlamaForCausalLM(SMALL)
    drafter = PPOWDrafter.from_target(target, architecture)
    assert plan.target_parameters == target.num_parameters() and plan.target == 4 * plan.target_parameters
    assert plan.drafter_parameters == sum(p.numel() for p in drafter.parameters())
    assert plan.head == 2 * 1000 * 64 * 4
    layers = len(drafter.config.target_layer_ids or [])
    assert plan.states == 2 * 64 * (layers + 1) * 64 * 4
    assert plan.recorded_token == (4 if architecture == "eagle" else 1) * 64 * 2 + 6
    assert plan.weights == plan.gradients == 4 * plan.drafter_parameters


def test_the_optimizer_keeps_two_numbers_of_a_parameter_and_muon_one():
    adamw = make_plan(SMALL, Shape("eagle", 64, muon=0.0, mixed=False), MACHINE)
    assert adamw.optimizer == pytest.approx(2 * adamw.weights, rel=1e-2)
    muon = make_plan(SMALL, Shape("eagle", 64, mixed=False), MACHINE)
    head = 1000 * 64 * 4
    assert muon.optimizer == pytest.approx(muon.weights + head, rel=1e-2)


def test_live_bytes_are_those_of_storages_and_seconds_those_of_products():
    with LiveBytes(Machine(1e9, 1e15)) as live:
        x = torch.empty(10, 20, device="meta")
        y = x @ torch.empty(20, 30, device="meta")
        view = y.view(300)
        assert live.now == 4 * (200 + 300) and live.peak == 4 * (200 + 600 + 300)
        assert live.seconds == pytest.approx(2 * 10 * 20 * 30 / 1e9, rel=1e-3)
        del y
        assert live.now == 4 * (200 + 300)
        del view
        assert live.now == 4 * 200


@pytest.fixture
def small_blocks(monkeypatch):
    """Windows attend in blocks at the lengths of these tests too."""
    monkeypatch.setattr("ppow_hf.runtime.draft_models.SCORES_AT_ONCE", 2**12)
    monkeypatch.setattr("ppow_hf.runtime.draft_models.BLOCK_SCORES", 2**15)


@pytest.mark.parametrize("mixed", [True, False])
def test_no_part_is_negative_where_the_gradients_are_the_largest(mixed):
    plan = make_plan(SMALL, Shape("eagle", 16, mixed=mixed), MACHINE)
    assert plan.activations >= 0 and plan.logits_chunk >= 0


def test_memory_of_a_step_grows_with_the_length_and_the_chunk_only_with_its_size(small_blocks):
    shape = Shape("eagle", 128, draft_vocab_size=500, chunk_size=64)
    plans = [make_plan(SMALL, replace(shape, length=length), MACHINE) for length in (256, 512, 1024)]
    growth = [after.activations - before.activations for before, after in zip(plans, plans[1:], strict=False)]
    assert 1.7 < growth[1] / growth[0] < 2.3
    assert plans[0].logits_chunk == plans[2].logits_chunk
    larger = make_plan(SMALL, replace(shape, length=1024, chunk_size=128), MACHINE)
    assert larger.logits_chunk == pytest.approx(2 * plans[2].logits_chunk, rel=0.2)


def test_longer_sequences_follow_the_counted_ones(monkeypatch, small_blocks):
    assert through_points([1, 2, 4], [1 + 2 + 3, 1 + 4 + 12, 1 + 8 + 48], 10) == pytest.approx(1 + 20 + 300)
    shape = Shape("eagle", 1024, draft_vocab_size=500, chunk_size=64)
    counted = make_plan(SMALL, shape, MACHINE)
    monkeypatch.setattr("ppow_hf.training.plan.LONGEST_COUNTED", 512)
    followed = make_plan(SMALL, shape, MACHINE)
    for way in WAYS:
        assert followed.peak(way) == pytest.approx(counted.peak(way), rel=0.05)
    assert followed.drafter_seconds == pytest.approx(counted.drafter_seconds, rel=0.1)
    assert LONGEST_COUNTED == 4096


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "billions"), [(LLAMA_8B, 8.03), (LLAMA_70B, 70.55), (QWEN3_32B, 32.76)], ids=["8B", "70B", "32B"]
)
@pytest.mark.parametrize("length", [4096, 32_768])
def test_targets_of_real_shapes(config, billions, length):
    plan = make_plan(config, Shape("eagle", length, draft_vocab_size=32_000), Machine(4e14, 3e12))
    assert plan.target_parameters / 1e9 == pytest.approx(billions, abs=0.01)
    assert plan.recorded_token == 4 * config.hidden_size * 2 + 6
    assert plan.peak("recorded") < 80e9  # each of these trains from recorded states
    assert (plan.peak("whole") < 78e9) == (billions < 30)  # of 80, the GPU's own context takes some
    assert plan.peak("recorded", 8, sharded=True) < plan.peak("recorded", 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SHAPES))
def test_the_planned_peak_is_the_measured_one(name):
    found = compare(name)
    assert found["planned"] == pytest.approx(found["measured"], rel=0.1)


def test_the_command_prints_what_fits(tmp_path, capsys):
    SMALL.save_pretrained(tmp_path)
    command = ["plan", "--target", str(tmp_path), "--max-length", "128", "--teraflops", "100", "--bandwidth", "1000"]
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == 64
    assert cli.main([*command, "--gpus", "2", "--gpu-gigabytes", "1"]) == 0
    printed = capsys.readouterr().out
    assert "0.00 billion parameters" in printed and "GB of each of 2 GPUs, 1 x 128 tokens" in printed
    assert printed.count(" fits") == 5 and "518 bytes a token" in printed
    assert cli.main([*command, "--gpu-gigabytes", "0.001"]) == 0
    assert capsys.readouterr().out.count("too large") == 5
    assert cli.main([*command, "--architecture", "standalone", "--draft-vocab-size", "10"]) == 2
    assert "--draft-vocab-size: a standalone drafter" in capsys.readouterr().err
    assert cli.main([*command, "--max-length", "2"]) == 2
    assert "--max-length: 2 given; at least 4 tokens are needed" in capsys.readouterr().err
