"""`ppow write --engine vllm`: greedy rows are those that transformers writes."""

import json

import pytest

from ppow_hf import cli

pytestmark = pytest.mark.engines


def test_greedy_rows_are_those_of_transformers(engine_python, tmp_path, capsys):
    prompts = tmp_path / "p.jsonl"
    texts = ["def mean(values):", "import os\n", "class Point:\n    def __init__(self", "for line in"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    common = ["write", "--target", "tiny", "--dtype", "float32", "--prompts", prompts, "--max-new-tokens", 16]
    engine = ["--engine", "vllm", "--engine-python", engine_python]
    for name, options in (("own", []), ("vllm", engine)):
        assert cli.main([*map(str, [*common, *options, "--output", tmp_path / f"{name}.jsonl"])]) == 0
    own, theirs = (
        {row["id"]: row for row in map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines())}
        for name in ("own", "vllm")
    )
    assert own and own == theirs
    assert "4 of the next 4 answers" in capsys.readouterr().err  # long before a chunk of many is done
