"""DSpark drafters in a real vLLM on a CPU, whose runner for them needs Triton: its kernels are interpreted.

A workaround, and slow: it says what is accepted, and nothing of speed. `triton_on_a_cpu` is what makes vLLM do it.
"""

import shutil
from pathlib import Path

import pytest
from engine_helpers import WINDOW, assert_same_acceptance, run_ours
from safetensors.torch import load_file, save_file
from test_dflash import trained_block

from ppow_hf import tiny
from ppow_hf.serving.vllm_runner import run_vllm

pytestmark = pytest.mark.engines

NEW_TOKENS = 24
INTERPRETED = {
    "PYTHONPATH": str(Path(__file__).with_name("triton_on_a_cpu")),
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
}


@pytest.fixture(scope="module")
def drafter(target, eagle, prompts):
    return trained_block(target, eagle, prompts, markov_rank=8, confidence_head=True)


def served_by_vllm(folder, prompts):
    speculative = {"method": "dspark", "model": str(folder), "num_speculative_tokens": WINDOW}
    return run_vllm(tiny.target_path(), prompts, NEW_TOKENS, speculative, environment=INTERPRETED)


@pytest.fixture(scope="module")
def ours(target, drafter, prompts):
    return run_ours(target, drafter, prompts[:6], new_tokens=NEW_TOKENS)


def test_dspark_export_is_served_with_our_acceptance(drafter, prompts, exported, ours):
    served = served_by_vllm(exported("dspark", drafter), prompts[:6])
    assert served.outputs == run_vllm(tiny.target_path(), prompts[:6], NEW_TOKENS).outputs
    assert_same_acceptance(served, ours)


def test_speculators_directory_is_served_by_itself(drafter, prompts, exported, ours):
    folder = exported("dspark-speculators", drafter, "speculators")
    served = run_vllm(folder, prompts[:6], NEW_TOKENS, environment=INTERPRETED)
    assert served.outputs == ours.outputs
    assert_same_acceptance(served, ours)


def test_acceptance_betrays_a_markov_head_of_zeros(drafter, prompts, exported, ours, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(exported("dspark", drafter), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["markov_head.markov_w2.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match="vLLM"):
        assert_same_acceptance(served_by_vllm(folder, prompts[:6]), ours)
