"""`ppow bench --engine`: both sides say the same and accept alike; the table is printed (`pytest -s`)."""

import argparse
import json

import pytest
import torch
from engine_helpers import NEW_TOKENS, interpreter_or_skip
from sglang_helpers import STAND_INS

from ppow_hf.data.models import load_tokenizer
from ppow_hf.serving import engine_bench, llamacpp_runner, sglang_runner

pytestmark = pytest.mark.engines


@pytest.fixture
def python(engine, request, monkeypatch):
    if engine == "vllm":
        return request.getfixturevalue("engine_python")
    if engine == "sglang":
        monkeypatch.setenv("PYTHONPATH", str(STAND_INS))  # of the engine's process
        return interpreter_or_skip("SGLang", sglang_runner.PYTHON_VARIABLE, "make_sglang_environment.sh")
    return interpreter_or_skip("llama.cpp", llamacpp_runner.PYTHON_VARIABLE, "make_llamacpp_environment.sh")


@pytest.mark.parametrize("name", ["eagle", "standalone"])
@pytest.mark.parametrize("engine", ["vllm", "sglang", "llamacpp"])
def test_engine_and_transformers_side_by_side(
    engine, name, python, target, eagle, standalone, prompts, tmp_path, capsys
):
    sizes = {"vllm": [1, 8], "sglang": [1], "llamacpp": [1]}[engine]
    parser = argparse.ArgumentParser()
    engine_bench.add_arguments(parser)
    arguments = parser.parse_args(["--engine", engine, "--engine-python", python, "--engine-tokens", "4"])
    arguments.target, arguments.max_new_tokens, arguments.json = "tiny", NEW_TOKENS, str(tmp_path / "bench.json")
    arguments.command, arguments.batch_size = "ppow bench --engine", sizes
    some = [torch.tensor([prompt]) for prompt in prompts[:8]]
    drafter = {"eagle": eagle, "standalone": standalone}[name]
    assert engine_bench.run(arguments, target, load_tokenizer("tiny"), drafter, some) == 0
    printed = capsys.readouterr().out
    with capsys.disabled():
        print(f"\n{name}\n{printed}")
    files = [f"bench-b{size}.json" for size in sizes] if len(sizes) > 1 else ["bench.json"]
    for file, size in zip(files, sizes, strict=True):
        content = json.loads((tmp_path / file).read_text())
        assert content["prompts"] == 8 and content["batch_size"] == size
        assert content["provenance"]["versions"]["torch"] == torch.__version__
        check_rows({row["name"]: row for row in content["rows"]}, engine_bench.ENGINES[engine], name)


def check_rows(rows, engine, name):
    assert all(row["different_prompts"] == 0 and row["tokens"] == 8 * NEW_TOKENS for row in rows.values())
    theirs, own = rows[f"{engine}, drafter, 4 tokens"], rows["transformers, drafter, 4 tokens"]
    assert theirs["acceptance_length"] == pytest.approx(own["acceptance_length"], rel=0.1)  # they differ at the ends
    for row in (theirs, own) if engine != "llama.cpp" else (own,):
        assert len(row["accepted_per_position"]) == 4 and sum(row["accepted_per_position"]) == row["accepted"]
    assert rows[engine]["drafted"] == rows["transformers"]["drafted"] == 0
    if engine != "SGLang":
        assert rows[f"{engine}, ngram, 4 tokens"]["accepted"] > 0
    assert ("vLLM, drafter, adaptive" in rows) == (engine == "vLLM" and name == "standalone")
