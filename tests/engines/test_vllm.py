"""Exported drafters in a real vLLM on a CPU, in float32: the same text as without them, the same acceptance as ours.

That a directory loads proves little: an export that lost something loads as well and drafts badly. So acceptance is
compared position by position, and damaged exports are shown to fail that comparison.
"""

import shutil

import pytest
import torch
from engine_helpers import NEW_TOKENS, WINDOW, assert_same_acceptance
from safetensors.torch import load_file, save_file

from ppow_hf import tiny
from ppow_hf.serving.vllm_runner import run_vllm

pytestmark = pytest.mark.engines

METHODS = {"eagle": "eagle3", "reduced-eagle": "eagle3", "standalone": "draft_model", "medusa": "medusa"}


def speculative(name, folder, window=WINDOW):
    return {"method": METHODS[name], "model": str(folder), "num_speculative_tokens": window}


def test_vllm_without_speculation_says_what_transformers_says(plain, target, prompts):
    for output, prompt in zip(plain.outputs, prompts, strict=True):
        ids = torch.tensor([prompt])
        generated = target.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        assert output == generated[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", METHODS)
def test_export_is_served_with_our_acceptance(name, exported, ours, plain, prompts):
    folder = exported(name, ours.drafters[name])
    served = run_vllm(tiny.target_path(), prompts, NEW_TOKENS, speculative(name, folder))
    assert served.outputs == plain.outputs
    assert served.outputs == ours(name).outputs
    assert_same_acceptance(served, ours(name))


@pytest.mark.parametrize("name", ["reduced-eagle", "eagle-with-norms"])
def test_speculators_directory_is_served_by_itself(name, exported, ours, plain, prompts):
    folder = exported(name, ours.drafters[name], "speculators")
    served = run_vllm(folder, prompts, NEW_TOKENS)  # its own five tokens a round
    assert served.outputs == plain.outputs
    assert_same_acceptance(served, ours(name))


@pytest.mark.parametrize("tensor", ["d2t", "norm.weight"])
def test_acceptance_betrays_a_missing_tensor(tensor, exported, ours, prompts, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(exported("reduced-eagle", ours.drafters["reduced-eagle"]), folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[tensor]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    try:
        served = run_vllm(tiny.target_path(), prompts, NEW_TOKENS, speculative("reduced-eagle", folder))
    except RuntimeError as error:  # a later vLLM may refuse it, which is better still
        assert tensor in str(error) or "weights" in str(error)
        return
    with pytest.raises(AssertionError, match="vLLM"):
        assert_same_acceptance(served, ours("reduced-eagle"))
