"""`ppow write --engine vllm`: greedy rows are those that transformers writes."""

import json

import pytest

from ppow_hf import cli, tiny
from ppow_hf.data.models import load_tokenizer
from ppow_hf.data.writing import Request
from ppow_hf.serving.text_writers import VLLMWriter

pytestmark = pytest.mark.engines


def test_greedy_rows_are_those_of_transformers(engine_python, tmp_path):
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


def test_each_answer_is_told_before_the_chunk_is_done(engine_python):
    tokenizer = load_tokenizer("tiny")
    requests = [Request("", None, tokenizer(text)["input_ids"], 0.0, 0) for text in ("def mean(", "import", "class")]
    told = []
    with VLLMWriter(
        str(tiny.target_path()), tokenizer, [], 8, engine_python, lambda count, of: told.append((count, of)), "float32"
    ) as writer:
        answers = writer(requests)
    assert told == [(1, 3), (2, 3), (3, 3)] and all(len(answer.token_ids) == 8 for answer in answers)
