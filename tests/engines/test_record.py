"""States that vLLM reads are transformers' own, and records of both train alike."""

import json

import pytest
from safetensors.torch import load_file

from ppow_hf import cli
from ppow_hf.data.models import load_tokenizer

pytestmark = pytest.mark.engines


@pytest.mark.parametrize("architecture", ["eagle", "standalone"])
def test_a_record_by_vllm_is_that_by_transformers(engine_python, prompts, architecture, tmp_path):
    tokenizer = load_tokenizer("tiny")
    rows = [{"text": tokenizer.decode(ids)} for ids in prompts[:12]]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["record", "--target", "tiny", "--data", str(tmp_path / "texts.jsonl"), "--max-length", "100"]
    command += ["--states-dtype", "float32", "--dtype", "float32", "--architecture", architecture]
    assert cli.main([*command, "--output-dir", str(tmp_path / "ours"), "--device", "cpu"]) == 0
    assert cli.main([*command, "--output-dir", str(tmp_path / "vllm"), "--engine", "vllm"]) == 0
    assert (tmp_path / "ours/record.json").read_text() == (tmp_path / "vllm/record.json").read_text()
    shards = sorted((tmp_path / "ours").glob("states-*"))
    assert shards
    for path in shards:
        expected, found = load_file(path), load_file(tmp_path / "vllm" / path.name)
        assert expected.keys() == found.keys() and expected["last"].shape[0] > 100
        for name in expected:
            assert (found[name] - expected[name]).abs().max() < 1e-3 * expected[name].abs().max(), name
