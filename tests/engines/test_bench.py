"""`ppow bench --engine vllm`: both sides say the same and accept alike; the table is printed (`pytest -s`)."""

import argparse
import json

import pytest
import torch
from engine_helpers import NEW_TOKENS

from ppow_hf.serving import engine_bench

pytestmark = pytest.mark.engines


@pytest.mark.parametrize("name", ["eagle", "standalone"])
def test_engine_and_transformers_side_by_side(engine_python, target, ours, prompts, tmp_path, capsys, name):
    parser = argparse.ArgumentParser()
    engine_bench.add_arguments(parser)
    arguments = parser.parse_args(["--engine", "vllm", "--engine-python", engine_python, "--engine-tokens", "4"])
    arguments.target, arguments.max_new_tokens, arguments.json = "tiny", NEW_TOKENS, str(tmp_path / "bench.json")
    arguments.command = "ppow bench --engine vllm"
    some = [torch.tensor([prompt]) for prompt in prompts[:8]]
    assert engine_bench.run(arguments, target, ours.drafters[name], some) == 0
    printed = capsys.readouterr().out
    with capsys.disabled():
        print(f"\n{name}\n{printed}")
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["prompts"] == 8 and content["provenance"]["versions"]["torch"] == torch.__version__
    rows = {row["name"]: row for row in content["rows"]}
    assert all(row["different_prompts"] == 0 and row["tokens"] == 8 * NEW_TOKENS for row in rows.values())
    theirs, own = rows["vLLM, drafter, 4 tokens"], rows["transformers, drafter, 4 tokens"]
    assert theirs["acceptance_length"] == pytest.approx(own["acceptance_length"], rel=0.1)  # they differ at the ends
    assert rows["vLLM"]["drafted"] == rows["transformers"]["drafted"] == 0
