"""Exports through speculators' own classes and converter: the same tensors, and the same acceptance in vLLM."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from engine_helpers import NEW_TOKENS, WINDOW, assert_same_acceptance
from safetensors.torch import load_file

from ppow_hf import import_drafter, tiny
from ppow_hf.serving.vllm_runner import run_vllm

pytestmark = pytest.mark.engines


def with_speculators(python, action, folder, output):
    job = Path(__file__).with_name("speculators_job.py")
    finished = subprocess.run(
        [python, str(job), action, str(folder), str(output), str(tiny.target_path())],
        cwd=output.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return output, finished.stdout


def assert_same_tensors(folder, other, optional=()):
    ours, theirs = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert theirs.keys() ^ ours.keys() <= set(optional)
    assert all(torch.equal(theirs[name], ours[name]) for name in ours.keys() & theirs.keys())


@pytest.mark.parametrize("name", ["eagle", "reduced-eagle"])
def test_speculators_loads_and_saves_an_export(name, engine_python, exported, ours, plain, prompts, tmp_path):
    folder = exported(name, ours.drafters[name], "speculators")
    resaved, printed = with_speculators(engine_python, "resave", folder, tmp_path / "resaved")
    assert "Eagle3DraftModel" in printed
    # Loading makes tables for the whole vocabulary where the drafter has no reduced one.
    assert_same_tensors(folder, resaved, optional=("d2t", "t2d") if name == "eagle" else ())
    found = import_drafter(resaved)
    assert found.config.target_layer_ids == ours.drafters[name].config.target_layer_ids
    if name == "reduced-eagle":
        served = run_vllm(resaved, prompts, NEW_TOKENS)
        assert served.outputs == plain.outputs
        assert_same_acceptance(served, ours(name))


def test_speculators_converts_an_export(engine_python, exported, ours, plain, prompts, tmp_path):
    drafter = ours.drafters["reduced-eagle"]
    folder = exported("reduced-eagle", drafter)
    converted, _ = with_speculators(engine_python, "convert", folder, tmp_path / "converted")
    assert json.loads((converted / "config.json").read_text())["speculators_model_type"] == "eagle3"
    # The converter writes three tokens a round; ours were five.
    speculative = {"method": "eagle3", "model": str(converted), "num_speculative_tokens": WINDOW}
    served = run_vllm(tiny.target_path(), prompts, NEW_TOKENS, speculative)
    assert served.outputs == plain.outputs
    assert_same_acceptance(served, ours("reduced-eagle"))
