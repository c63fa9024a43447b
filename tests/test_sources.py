"""What a name of data stands for: files, datasets in folders and datasets on the Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Blob, hub_server

from ppow_hf.commands.train import evaluation_sources
from ppow_hf.data.rows import read_rows
from ppow_hf.data.sources import Source, check_source, parse_source, split_column

ROWS = {
    "train": [{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": "4"}],
    "test": [{"question": "3 + 3?", "answer": "6"}],
}


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A dataset with two splits, as `datasets` finds them by their files' names."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "sums"
    folder.mkdir()
    for split, rows in ROWS.items():
        (folder / f"{split}.jsonl").write_text(lines(rows))
    return folder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompts.jsonl", Source("prompts.jsonl", False)),
        ("data/prompts.jsonl.gz:question", Source("data/prompts.jsonl.gz", False, column="question")),
        ("data/prompts.jsonl", Source("data/prompts.jsonl", False)),
        ("openai/gsm8k", Source("openai/gsm8k", True)),
        ("openai/gsm8k:question", Source("openai/gsm8k", True, column="question")),
        ("openai/gsm8k/main@test:question", Source("openai/gsm8k", True, "main", "test", "question")),
        ("a/b.c-d@train[:100]", Source("a/b.c-d", True, None, "train[:100]")),
        ("a/b@train[10%:20%]:the text", Source("a/b", True, None, "train[10%:20%]", "the text")),
        ("/no/such/folder/x", Source("/no/such/folder/x", False)),
        ("stories", Source("stories", False)),
    ],
)
def test_names(text, expected):
    assert parse_source(text) == expected
    name, column = split_column(text)
    assert column == expected.column and parse_source(name) == expected._replace(column=None)


def test_a_file_is_a_file_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    for name in ("a/b", "a@b.jsonl", "c:d.jsonl"):
        Path(name).write_text("")
        assert parse_source(name) == Source(name, False)
    assert parse_source("a@b.jsonl:text") == Source("a@b.jsonl", False, column="text")


def test_a_folder_is_read_split_by_split(folder):
    assert read_rows(f"{folder}@train", "train_dataset") == ROWS["train"]
    assert read_rows(f"{folder}@test:question", "train_dataset") == [{"prompt": "3 + 3?"}]
    assert read_rows(f"{folder}@train[1:]", "train_dataset") == ROWS["train"][1:]
    for name, message in (
        (
            str(folder),
            r"--train_data: .*sums has the splits \['train', 'test'\]. Pass one of them, such as .*sums@train",
        ),
        (f"{folder}@dev", r"--train_data: .*\['train', 'test'\] and no 'dev'"),
    ):
        with pytest.raises(ValueError, match=message):
            check_source(name, "--train_data")
    with pytest.raises(ValueError, match=r"--train_data: sums has no column 'title'; it has \['answer', 'question'\]"):
        read_rows(f"{folder}@test:title", "--train_data")
    (folder / "test.jsonl").unlink()
    assert read_rows(str(folder), "train_dataset") == ROWS["train"]  # the only split


def test_a_folder_without_data_and_a_missing_file_are_said(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="--prompts: the dataset .*empty.* could not be loaded"):
        check_source(str(tmp_path / "empty"), "--prompts")
    with pytest.raises(FileNotFoundError, match="--prompts: there is no file 'none.jsonl'"):
        check_source("none.jsonl:question", "--prompts")


def test_a_dataset_on_the_hub(tmp_path):
    script = (
        "import json, sys; from ppow_hf.data.rows import read_rows\n"
        "print(json.dumps(read_rows('me/sums@train:question', 'train_dataset')))\n"
        "try: read_rows('me/none', 'train_dataset')\n"
        "except ValueError as error: print(error)"
    )
    with hub_server() as server:
        repository = server.create("dataset", "me/sums")
        files = {f"{split}.jsonl": Blob(lines(rows).encode(), False) for split, rows in ROWS.items()}
        server.commit(repository, "refs/heads/main", "data", "", files)
        environment = os.environ | {
            "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr[-3000:]
    found, refused = done.stdout.splitlines()[:2]
    assert json.loads(found) == [{"prompt": "1 + 1?"}, {"prompt": "2 + 2?"}]
    assert refused.startswith("train_dataset: the dataset 'me/none' could not be loaded")


def test_evaluation_data_on_the_command_line(folder):
    file = str(folder / "test.jsonl")
    assert evaluation_sources([]) is None
    assert evaluation_sources([file]) == file
    assert evaluation_sources([f"sums={file}", f"more={folder}@train"]) == {"sums": file, "more": f"{folder}@train"}
    assert evaluation_sources([f"sums={file}"]) == {"sums": file}
    for given in ([file, f"more={file}"], [f"a={file}", f"a={file}"]):
        with pytest.raises(ValueError, match="--eval_data: .*has no name of its own"):
            evaluation_sources(given)
    with pytest.raises(FileNotFoundError, match="--eval_data"):
        evaluation_sources(["none.jsonl"])
