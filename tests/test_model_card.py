"""Cards: what they say is what the measurements' files say, and nothing that no file says."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from ppow_hf import PPOWDrafter, tiny
from ppow_hf.cli import main
from ppow_hf.publish.model_card import drafter_card, write_drafter_card

ROOT = Path(__file__).parents[1]
MACHINE = {"processor": "A Chip", "cores": 4, "threads": 2, "memory_gib": 8.0, "device": "cpu", "gpu": None}
VERSIONS = {"python": "3.11.1", "torch": "2.13.0"}
ARCHITECTURES = ("eagle", "standalone", "medusa")


def bench_row(name: str, **fields) -> dict:
    return {
        "name": name, "tokens_per_second": 50.0, "ratio_to_plain": 1.0, "ratio_interval": None,
        "acceptance_length": 1.0, "tokens_per_target_forward": 1.0, "drafted": 0, "accepted": 0, "wasted": 0.0,
        "identical_to_plain": True, "different_prompts": 0, **fields,
    }  # fmt: skip


BENCHMARK = {
    "machine": MACHINE, "versions": VERSIONS, "command": "ppow bench --prompts code.jsonl", "cost_ratio": 0.125,
    "draft_step_seconds": 0.002, "target_forward_seconds": 0.016, "verification_cost": 0.05, "prompts": 7,
    "max_new_tokens": 32, "repeats": 1, "dtype": "float32",
    "rows": [
        bench_row("plain"),
        bench_row("transformers_assisted_constant", tokens_per_second=61.0, ratio_to_plain=1.22, drafted=10),
        bench_row("ppow_kl", tokens_per_second=93.7, ratio_to_plain=1.874, ratio_interval=[1.51, 2.03], drafted=40,
                  acceptance_length=3.217, tokens_per_target_forward=2.911, wasted=0.31),
    ],
}  # fmt: skip
ACCEPTANCE = {
    "command": "ppow measure --prompts chat=chat.jsonl", "machine": MACHINE, "versions": VERSIONS,
    "target": "ada/base", "dtype": "float32", "max_new_tokens": 32, "seed": 3,
    "rows": [
        {"workload": "chat", "temperature": 0.0, "window": "fixed", "max_window": 3, "prompts": 9, "wasted": 0.25,
         "acceptance_length": 2.345, "acceptance_length_interval": [2.1, 2.61],
         "acceptance_by_position": [0.81, 0.52, 0.33], "tokens_per_target_forward": 2.2,
         "repeated_8grams": 0.07, "drafted": 30, "accepted": 22, "rounds": 10},
        {"workload": "chat", "temperature": 1.0, "window": "kl", "max_window": 3, "prompts": 9, "wasted": 0.5,
         "acceptance_length": 1.789, "acceptance_by_position": [0.44], "tokens_per_target_forward": 1.5,
         "repeated_8grams": 0.01, "drafted": 20, "accepted": 10, "rounds": 10},
    ],
}  # fmt: skip
LOG = [
    {"step": 0, "eval_acceptance_length": 1.04, "eval_wasted": 0.99, "eval_repeated_8grams": 0.2,
     "objective": "supervised"},
    {"step": 40, "eval_acceptance_length": 2.52, "eval_wasted": 0.61, "eval_repeated_8grams": 0.2,
     "objective": "supervised"},
    {"step": 60, "loss": 1.0, "adaw": 1.0, "objective": "ppow"},
    {"step": 60, "eval_acceptance_length": 2.77, "eval_wasted": 0.58, "eval_repeated_8grams": 0.2,
     "objective": "ppow"},
]  # fmt: skip
PROVENANCE = {
    "command": "ppow train --target ada/base", "versions": VERSIONS, "git_revision": "0123abc", "machine": MACHINE,
    "seeds": {"seed": 42}, "data_fingerprint": "feedbeef", "target_revision": "cafe01",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, make_target):
    drafter = PPOWDrafter.from_target(make_target("llama"), "eagle", target_name_or_path="ada/base", max_window=3)
    drafter.save_pretrained(tmp_path / "drafter")
    return tmp_path / "drafter"


def measured(folder: Path) -> Path:
    for name, content in (
        ("benchmark.json", BENCHMARK),
        ("acceptance.json", ACCEPTANCE),
        ("training_log.json", LOG),
        ("provenance.json", PROVENANCE),
        ("training_arguments.json", {"eval_prompts": 16, "eval_new_tokens": 48, "max_window": 3}),
    ):
        (folder / name).write_text(json.dumps(content))
    (folder / "training.png").write_bytes(b"png")
    return folder


def cells(text: str, first: str) -> list[list[str]]:
    """Cells of the table rows that begin with `first`."""
    rows = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_front_matter(folder):
    card = drafter_card(
        measured(folder), "ada/drafter", license="mit", language="en", datasets=["ada/texts"], tags=["mine"]
    )
    data = yaml.safe_load(str(card).split("---")[1])
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert data["base_model"] == "ada/base" and "base_model_relation" not in data
    assert data["license"] == "mit" and data["language"] == "en" and data["datasets"] == ["ada/texts"]
    wanted = {"speculative-decoding", "draft-model", "ppow", "eagle", "arxiv:2605.14978", "custom_generate", "mine"}
    assert wanted == set(data["tags"])
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"]["name"] == "chat"
    assert [metric["value"] for metric in result["metrics"]] == [2.345, 1.789]
    assert result["metrics"][0]["args"]["target"] == "ada/base"
    loaded = ModelCard(str(card))  # as the Hub's client reads it
    assert loaded.data.base_model == "ada/base" and len(loaded.data.eval_results) == 2


def test_the_gain_of_the_last_quarter_is_said_where_it_was_measured(folder):
    measured(folder)
    assert "In the last" not in str(drafter_card(folder))
    steps = [(0, 1.0), (10, 1.5), (20, 2.0), (31, 2.5), (40, 2.6)]
    log = [{"step": step, "eval_acceptance_length": value, "objective": "supervised"} for step, value in steps]
    (folder / "training_log.json").write_text(json.dumps([*log, *LOG[2:]]))
    text = " ".join(str(drafter_card(folder)).split())
    assert "In the last 22% of the steps of the supervised stage it went from 2.50 to 2.60 (+4.0%)." in text


def test_a_stage_that_comes_back_is_a_stage_of_its_own(folder):
    measured(folder)
    steps = [(60, 2.8), (70, 2.9), (80, 3.0), (90, 3.1), (100, 3.2)]
    again = [{"step": step, "eval_acceptance_length": value, "objective": "supervised"} for step, value in steps]
    (folder / "training_log.json").write_text(json.dumps([*LOG, *again]))
    text = " ".join(str(drafter_card(folder)).split())
    assert "40 supervised, 20 ppow, 40 supervised" in text
    stages = "supervised on text that the target wrote and with PPOW in turns, the last of them `supervised`"
    assert f"Trained in 3 stages, {stages} ([arXiv" in text
    assert [row[1] for row in cells(str(drafter_card(folder)), "after supervised")] == ["2.52", "3.20"]
    assert "In the last 25% of the steps of the supervised stage it went from 3.10 to 3.20" in text


def test_every_measured_number_stands_in_a_table(folder):
    text = str(drafter_card(measured(folder), "ada/drafter"))
    assert cells(text, "ppow_kl") == [
        ["ppow_kl", "93.7", "1.87", "1.51 to 2.03", "3.22", "2.91", "31%", "yes"]
    ]  # fmt: skip
    assert cells(text, "transformers_assisted_constant")[0][1:3] == ["61.0", "1.22"]
    assert cells(text, "chat") == [
        ["chat", "0", "fixed 3", "9", "2.35 (2.10 to 2.61)", "2.20", "25%", "7%"],
        ["chat", "1", "kl, at most 3", "9", "1.79", "1.50", "50%", "1%"],
        ["chat", "0", "fixed 3", "0.81", "0.52", "0.33"],
        ["chat", "1", "kl, at most 3", "0.44", "", ""],
    ]
    for stage, length in (("untrained", "1.04"), ("after supervised", "2.52"), ("after ppow", "2.77")):
        assert cells(text, stage)[0][1] == length
    assert "changed it by +0.25" in text and "16 prompts, 48 tokens each" in text
    for said in (
        "Target `ada/base` in float32", "A Chip, 2 of 4 cores, 8 GiB", "python 3.11.1, torch 2.13.0",
        "`ppow train --target ada/base`", "`feedbeef`", "`0123abc`", "`cafe01`", "seed 42", "40 supervised, 20 ppow",
        "Cost ratio 0.125 (draft step 2.00 ms, target forward 16.00 ms)", "7 prompts, 32 tokens each, greedy",
        "![training](training.png)", "Speculation paid on this run", "@article{",
    ):  # fmt: skip
        assert said in text, said


def test_markdown_tables_are_whole(folder):
    lines = str(drafter_card(measured(folder), "ada/drafter")).splitlines()
    for number, line in enumerate(lines):
        if re.fullmatch(r"\|(---\|)+", line):
            width = line.count("|")
            assert lines[number - 1].count("|") == width and lines[number + 1].count("|") == width
            assert lines[number - 1].startswith("|") and not lines[number - 2].startswith("|")


def test_what_was_not_measured_is_said_to_be_missing(folder):
    text = str(drafter_card(folder))
    for said in ("No record of its training", "Not measured outside training", "Not measured. `ppow bench"):
        assert said in text
    assert "training.png" not in text and "model-index" not in text and "tokens/s" not in text
    assert "license" not in text.split("---")[1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_are_counted_and_code_in_the_card_is_code(tmp_path, make_target, architecture):
    drafter = PPOWDrafter.from_target(make_target("llama"), architecture, target_name_or_path="ada/base")
    drafter.save_pretrained(tmp_path)
    saved = {p.data_ptr(): p.numel() for p in drafter.parameters()}
    text = str(drafter_card(tmp_path, "ada/drafter"))
    assert f"{sum(saved.values()):,} parameters" in text
    assert 'custom_generate="ada/drafter"' in text and "vllm serve ada/base" in text
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "card", "exec")


def test_a_sweep_of_benchmarks_is_a_table_each(folder):
    sampled = {**BENCHMARK, "temperature": 1.0, "batch_size": 4, "workload": "chat"}
    sampled["rows"] = [{**row, "identical_to_plain": None} for row in BENCHMARK["rows"]]
    (folder / "benchmark.json").write_text(json.dumps([BENCHMARK, sampled]))
    text = str(drafter_card(folder))
    assert [row[-1] for row in cells(text, "ppow_kl")] == ["yes", "sampled"]
    assert "chat, target `ada/base`" in text and "T = 1, batches of 4" in text


def test_a_card_that_is_written_again_stays_the_same(folder):
    first = write_drafter_card(measured(folder), "ada/drafter", license="mit", language="en").read_text()
    assert write_drafter_card(folder, "ada/drafter").read_text() == first  # licence and language are taken over


def test_the_private_place_of_a_target_is_not_named(tmp_path, make_target):
    drafter = PPOWDrafter.from_target(make_target("llama"), "standalone", target_name_or_path="/home/ada/secret/base")
    drafter.save_pretrained(tmp_path)
    text = str(drafter_card(tmp_path))
    assert "/home/ada" not in text and "`base`" in text and "base_model" not in text


@pytest.mark.parametrize("name", [*tiny.EMBEDDED_DRAFTERS, *tiny.REAL_DRAFTERS])
def test_the_shipped_card_is_what_the_generator_makes(name):
    card = ROOT / "model_cards" / f"{name}.md"
    folder = tiny.drafter_path(name)
    assert card.read_text() == str(drafter_card(folder, name)), f"make it again: ppow card {name} --output {card}"
    config = PPOWDrafter.from_pretrained(folder, dtype=torch.bfloat16).config
    assert config.architecture in card.read_text()


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (
            {"differing": 3, "near_ties": 3, "largest_gap": 0.0203, "noise": 0.0625},
            "In bfloat16 3 of 50 greedy outputs differ from plain `generate`'s, each first at a near-tie (largest "
            "top-2 gap 0.02, noise 0.062).",
        ),
        (
            {"differing": 1, "near_ties": 1, "largest_gap": 0.0, "noise": 0.125},
            "In bfloat16 1 of 50 greedy outputs differs from plain `generate`'s, first at a near-tie (largest top-2 "
            "gap 0, noise 0.12).",
        ),
        (
            {"differing": 4, "near_ties": 2, "largest_gap": 3.5, "noise": 0.05},
            "In bfloat16 4 of 50 greedy outputs differ from plain `generate`'s, of which 2 first at a near-tie: the "
            "rest is more than rounding (largest top-2 gap 3.5, noise 0.05).",
        ),
        (
            {"differing": 0, "near_ties": 0, "largest_gap": None, "noise": 0.05},
            "In bfloat16 none of 50 greedy outputs differs from plain `generate`'s.",
        ),
    ],
)
def test_half_precision_is_one_sentence_where_it_was_measured(folder, found, sentence):
    without = str(drafter_card(measured(folder)))
    assert "greedy outputs" not in without
    divergence = {"dtype": "bfloat16", "prompts": 50, "max_new_tokens": 64, "first_differences": [], **found}
    (folder / "acceptance.json").write_text(json.dumps({**ACCEPTANCE, "half_precision": divergence}))
    text = str(drafter_card(folder))
    assert text.count(f"\n\n{sentence}\n\n") == 1
    assert text.replace(f"{sentence}\n\n", "") == without


def test_measure_and_card_from_the_command_line(tmp_path, capsys):
    shutil.copytree(tiny.drafter_path("tiny-standalone"), tmp_path / "drafter")
    found = tmp_path / "drafter" / "acceptance.json"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def add(a, b):\nimport os\n")
    arguments = ["--num-prompts", "2", "--max-new-tokens", "8", "--temperature", "0", "--window", "fixed"]
    command = [
        "measure",
        "--target",
        "tiny",
        "--drafter",
        "tiny-standalone",
        "--prompts",
        f"lines={prompts}",
        *arguments,
    ]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert main([*command, "--half-precision", "bfloat16", "--json", str(found)]) == 0
    measurement = json.loads(found.read_text())
    (row,) = measurement["rows"]
    assert row["workload"] == "lines" and row["prompts"] == 2 and 1 <= row["acceptance_length"] <= 9
    assert row["acceptance_length"] == printed["acceptance_length"]
    assert str(tmp_path) not in found.read_text()
    card = tmp_path / "card.md"
    assert main(["card", str(tmp_path / "drafter"), "--output", str(card)]) == 0
    assert cells(card.read_text(), "lines")[0][4] == f"{row['acceptance_length']:.2f}"
    half_precision = measurement["half_precision"]
    assert (
        half_precision["dtype"] == "bfloat16" and half_precision["prompts"] == 2 and measurement["dtype"] == "float32"
    )
    assert re.search(r"In bfloat16 (none|\d+) of 2 greedy outputs differs? from plain", card.read_text())
    assert main(["push", str(tmp_path / "drafter"), "--write", str(tmp_path / "written")]) == 0
    assert (tmp_path / "written" / "custom_generate" / "generate.py").is_file()
    assert main(["push", str(tmp_path / "drafter")]) == 2
    assert "give either a repository to push to, or --write FOLDER" in capsys.readouterr().err
