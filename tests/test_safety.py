"""What must not happen in other people's hands: secrets published, damage served, results overwritten, tracebacks."""

import copy
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from slow_training import random_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from ppow_hf import PPOWDrafter, cli
from ppow_hf.commands.errors import explain
from ppow_hf.commands.parsing import spellings
from ppow_hf.commands.typed import Typed
from ppow_hf.export import export_drafter
from ppow_hf.measure.redaction import redact_command, redact_record, redact_text
from ppow_hf.publish.hub import repository_files, write_repository
from ppow_hf.publish.model_card import drafter_card
from ppow_hf.training import PPOWTrainer, PPOWTrainingArguments
from ppow_hf.training.checkpoints import check_complete, last_complete_checkpoint

TEXT = "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n"
SECRET = "hf_" + "AbCdEfGhIj" * 3 + "QqQq"


@pytest.fixture(scope="module")
def saved(make_target, tmp_path_factory):
    """Folders of a target with its tokenizer, of drafters for it, and a file of texts."""
    folder = tmp_path_factory.mktemp("models")
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=64, special_tokens=["<pad>", "<unk>"], show_progress=False)
    made.train_from_iterator([TEXT], trainer=trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")
    target = copy.deepcopy(make_target("llama"))
    target.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    torch.manual_seed(0)
    for architecture in ("eagle", "standalone", "medusa"):
        PPOWDrafter.from_target(target, architecture, max_window=4).save_pretrained(folder / architecture)
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(8)))
    return folder


def train_command(saved: Path, output: Path, *more) -> list[str]:
    words = ["train", "--target", saved / "target", "--train_data", saved / "data.jsonl", "--output_dir", output]
    words += [
        "--use_cpu",
        "--max_length",
        24,
        "--per_device_train_batch_size",
        2,
        "--report_to",
        "none",
        "--max_window",
        3,
    ]
    words += ["--disable_tqdm", "true", "--save_steps", 1, "--logging_steps", 1, "--objective", "ce", *more]
    return list(map(str, words))


def fails(capsys, *argv) -> str:
    """The one line on stderr of a command that ends with exit code 2."""
    capsys.readouterr()
    assert cli.main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("ppow: error:")]
    assert len(lines) == 1 and "Traceback" not in captured.err
    return lines[0]


def everything(files: dict) -> bytes:
    """All bytes that a push would send."""
    return b"\n".join(one if isinstance(one, bytes) else one.read_bytes() for one in files.values())


# -- secrets


@pytest.mark.parametrize(
    "words",
    [
        ["--hub_token", "X1y2z3"], ["--hub_token=X1y2z3"], ["--hub-token", "X1y2z3"], ["--hub_tok", "X1y2z3"],
        ["--api-key", "X1y2z3"], ["--apikey=X1y2z3"], ["--HUB_TOKEN", "X1y2z3"], ["--client.secret", "X1y2z3"],
        ["--password=X1y2z3"], ["--token-file=X1y2z3"], ["WANDB_API_KEY=X1y2z3"],
        ["https://ada:X1y2z3@example.org/data"], ["https://example.org/data?access_token=X1y2z3"],
    ],
)  # fmt: skip
def test_no_spelling_of_a_secret_stays_in_a_command(words):
    command = redact_command(shlex.join(["ppow", "train", "--seed", "1", *words, "--max_steps", "5"]))
    assert "X1y2z3" not in command
    assert command.startswith("ppow train --seed 1 ") and command.endswith("--max_steps 5")


@pytest.mark.parametrize("token", [SECRET, "sk-" + "a1" * 20, "ghp_" + "a1" * 18, "github_pat_" + "a1" * 20])
def test_what_looks_like_a_token_goes_from_any_text(token):
    assert redact_text(f"see {token}, and go") == "see REDACTED, and go"
    assert token not in json.dumps(redact_record({"note": [token, {"x": f"a {token}"}], token: 1}))


def test_what_is_no_secret_stays():
    command = (
        "ppow bench --max-new-tokens 64 --pad_token_id 0 --num_key_value_heads 4 --prompts keys.jsonl --target a/b"
    )
    assert redact_command(command) == command
    record = {"seed": 3, "include_num_input_tokens_seen": "no", "pad_token_id": 0, "hub_token": None, "monkey": "yes"}
    assert redact_record(record) == record


def test_a_push_after_a_training_with_a_token_holds_no_token(saved, tmp_path, monkeypatch):
    # Given as an argument, in an option that is no secret's, and in a record of an older version.
    folder = tmp_path / "out"
    command = train_command(saved, folder, "--max_steps", 1, "--hub_token", SECRET, "--run_name", f"run-{SECRET}")
    monkeypatch.setattr("sys.argv", ["ppow", *command])
    assert cli.main() == 0
    assert "--hub_token REDACTED" in json.loads((folder / "provenance.json").read_text())["command"]
    for name in ("provenance.json", "training_arguments.json", "training_log.json"):
        assert SECRET not in (folder / name).read_text()
    record = json.loads((folder / "provenance.json").read_text())
    record["command"] = f"ppow train --hub_token {SECRET} --api_key plain-secret"
    (folder / "provenance.json").write_text(json.dumps(record))
    arguments = json.loads((folder / "training_arguments.json").read_text())
    (folder / "training_arguments.json").write_text(json.dumps(arguments | {"wandb_key": "plain-secret"}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"target_name_or_path": f"https://ada:{SECRET}@host/m"}))
    sent = everything(repository_files(folder, "ada/x"))
    assert SECRET.encode() not in sent and b"plain-secret" not in sent
    assert b"ppow train --hub_token REDACTED --api_key REDACTED" in sent
    write_repository(folder, tmp_path / "written")
    assert not [p for p in (tmp_path / "written").rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


# -- what is pushed and exported


def test_a_link_out_of_the_folder_is_not_followed(saved, tmp_path):
    private = tmp_path / "private.json"
    private.write_text('{"command": "private"}')
    for name in ("provenance.json", "benchmark-2.json", "training.png", "README.md", "LICENSE"):
        folder = tmp_path / name.partition(".")[0]
        PPOWDrafter.from_pretrained(saved / "eagle").save_pretrained(folder)
        (folder / name).symlink_to(private)
        with pytest.raises(ValueError, match=f"folder: {name} in .* is a link to a file outside"):
            repository_files(folder, "ada/x")
    # The Hub's cache is made of links; they stay inside of the repository's own folder.
    blobs, snapshot = tmp_path / "models--ada--x" / "blobs", tmp_path / "models--ada--x" / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in (saved / "eagle").iterdir():
        (blobs / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert "model.safetensors" in repository_files(snapshot, "ada/y")


def test_a_write_that_fails_leaves_nothing_and_keeps_what_was_there(saved, tmp_path, monkeypatch, capsys):
    kept = tmp_path / "kept"
    write_repository(saved / "eagle", kept)
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    write, written = Path.write_bytes, []

    def full_disk(path: Path, data: bytes) -> int:
        written.append(path)
        if len(written) % 4 == 0:
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    for folder in (kept, tmp_path / "new"):
        assert "the disk is full" in fails(capsys, "push", saved / "standalone", "--write", folder)
    assert not (tmp_path / "new").exists()
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before


def test_names_and_commands_enter_the_card_as_text(saved, tmp_path):
    hostile = "a|b\n# <script>alert(1)</script> `x` [y](z)"
    config = json.loads((saved / "eagle" / "config.json").read_text())
    for path in (saved / "eagle").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"target_name_or_path": hostile}))
    machine = {"device": "cuda", "gpu": hostile}
    provenance = {
        "command": hostile,
        "git_revision": hostile,
        "seeds": {hostile: hostile},
        "versions": {hostile: hostile},
    }
    (tmp_path / "provenance.json").write_text(json.dumps(provenance | {"machine": machine}))
    row = {
        "workload": hostile, "temperature": 0.0, "window": hostile, "max_window": 4, "prompts": 3, "wasted": 0.1,
        "acceptance_length": 2.0, "tokens_per_target_forward": 2.0, "repeated_8grams": 0.0,
        "acceptance_by_position": [0.5],
    }  # fmt: skip
    measurement = {
        "target": hostile, "dtype": hostile, "max_new_tokens": 8, "seed": 0, "machine": machine, "rows": [row],
        "versions": {"torch": hostile}, "command": hostile,
    }  # fmt: skip
    (tmp_path / "acceptance.json").write_text(json.dumps(measurement))
    text = str(drafter_card(tmp_path, "ada/x", license=hostile))
    body = text.split("---\n", 2)[2]
    outside_code = re.sub(r"```.*?```|`[^`]*`", "", body, flags=re.DOTALL)
    assert "script" in body and "<script>" not in outside_code and "\n# <" not in body and "[y](z)" not in outside_code
    for line in body.splitlines():
        if line.startswith("| a") or line.startswith("| command"):
            columns = line.replace("\\|", "").count("|")
            assert columns in (3, 4, 5, 9), line


def test_a_record_of_another_shape_is_named(saved, tmp_path):
    for path in (saved / "eagle").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name in (
        "provenance.json",
        "training_log.json",
        "training_arguments.json",
        "acceptance.json",
        "benchmark.json",
    ):
        for content in ("[1, 2]", '"text"', "{", '{"rows": 3}', "[" * 100_000):
            (tmp_path / name).write_text(content)
            if name == "training_log.json" or content != '{"rows": 3}' or name[0] in "ab":
                with pytest.raises(ValueError, match=f"folder: {name} in "):
                    repository_files(tmp_path, "ada/x")
        (tmp_path / name).unlink()


# -- damaged drafters


def damaged(source: Path, folder: Path, change=None, **fields) -> Path:
    """A copy of the drafter in `source` with other tensors and fields of its configuration."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    tensors = load_file(source / "model.safetensors")
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def undefined(tensors: dict) -> None:
    tensors["draft_model.fc.weight"][0, 0] = torch.nan


DAMAGES = {
    "missing weights: draft_model.fc.weight": lambda tensors: tensors.pop("draft_model.fc.weight"),
    "weights of another model: draft_model.extra": lambda tensors: tensors.update(
        {"draft_model.extra": torch.ones(2)}
    ),
    "infinite or undefined numbers in draft_model.fc.weight": undefined,
    "draft_model.fc.weight": lambda tensors: tensors.update({"draft_model.fc.weight": torch.ones(2, 2)}),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_drafter_is_not_loaded_exported_or_pushed(saved, tmp_path, capsys, message):
    folder = damaged(saved / "eagle", tmp_path / "bad", DAMAGES[message])
    for load in (PPOWDrafter, AutoModel):
        with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
            load.from_pretrained(folder)
    pair = ["--target", saved / "target", "--drafter", folder]
    assert f"--drafter: {str(folder)!r}" in (said := fails(capsys, "generate", *pair, "--prompt", "a"))
    assert message in said and len(said) < 600
    assert message in fails(capsys, "export", folder, "--output-dir", tmp_path / "out")
    with pytest.raises(ValueError, match=re.escape(message)):
        repository_files(folder, "ada/x")


def test_a_drafter_broken_in_memory_is_not_trained_exported_or_pushed(saved, tmp_path, make_trainer):
    drafter = PPOWDrafter.from_pretrained(saved / "eagle")
    drafter.draft_model.fc.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="drafter: it cannot be exported: infinite"):
        export_drafter(drafter, tmp_path / "out")
    drafter.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="infinite or undefined numbers in draft_model.fc.weight"):
        repository_files(tmp_path / "saved", "ada/x")


@pytest.mark.parametrize(
    "fields", [{"model_type": "llama"}, {"target_layer_ids": [0, 1, -1]}, {"target_layer_ids": [1]}]
)
def test_another_kind_of_configuration_is_refused(saved, tmp_path, fields):
    folder = damaged(saved / "eagle", tmp_path / "bad", **fields)
    with pytest.raises(ValueError, match=next(iter(fields))):
        PPOWDrafter.from_pretrained(folder)


def test_layers_that_the_target_does_not_have_are_refused_wherever_both_meet(saved, tmp_path, capsys, make_target):
    folder = damaged(saved / "eagle", tmp_path / "bad", target_layer_ids=[0, 1, 99])
    pair = ["--target", saved / "target", "--drafter", folder]
    for command in (
        ["generate", *pair, "--prompt", "a"],
        ["measure", *pair, "--num-prompts", 1, "--json", tmp_path / "a.json"],
        ["bench", *pair, "--num-prompts", 1],
        train_command(saved, tmp_path / "out", "--drafter", folder, "--max_steps", 1),
        ["export", folder, "--output-dir", tmp_path / "exported", "--target", saved / "target"],
    ):
        assert "layers [0, 1, 99]" in fails(capsys, *command), command


# -- runs and their checkpoints


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_equal_commands_give_equal_weights_and_another_seed_gives_others(saved, tmp_path):
    found = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        torch.rand(7)  # whatever was drawn before in this process
        command = train_command(saved, tmp_path / name, "--seed", seed, "--max_steps", 2, "--max_length", 16)
        assert cli.main(command) == 0
        found.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(found[0]["draft_model.fc.weight"], found[2]["draft_model.fc.weight"])


def test_resuming_a_finished_run_says_so_and_changes_nothing(saved, tmp_path, caplog):
    folder = tmp_path / "run"
    command = train_command(saved, folder, "--max_steps", 2)
    assert cli.main(command) == 0
    before = content(folder)
    for again in (command, train_command(saved, folder, "--max_steps", 1)):
        caplog.clear()
        assert cli.main([*again, "--resume"]) == 0
        assert "is finished: 2 steps were taken, and nothing is changed" in caplog.text
        assert content(folder) == before
    # Killed after its last checkpoint, before the drafter was saved: no step is taken, and the drafter is saved.
    (folder / "model.safetensors").unlink()
    assert cli.main([*command, "--resume"]) == 0
    assert load_file(folder / "model.safetensors").keys()
    ours, theirs = load_file(folder / "model.safetensors"), load_file(folder / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (folder / "checkpoint-2" / "complete.json").read_bytes() == before["checkpoint-2/complete.json"]
    assert cli.main([*train_command(saved, folder, "--max_steps", 3), "--resume"]) == 0  # a longer one goes on
    assert (folder / "checkpoint-3").is_dir()


def test_a_run_finished_by_epochs_is_finished_too(make_trainer):
    settings = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 1}
    trainer = make_trainer("standalone", "ce", **settings)
    trainer.train()
    trainer.save_model()
    again = make_trainer("standalone", "ce", **settings)
    again.train(resume_from_checkpoint=True)
    assert again.already_finished and again.state.global_step == 3
    ours, theirs = again.model.state_dict(), trainer.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("option", "value"), [("--max_steps", 0), ("--num_train_epochs", 0)])
def test_a_training_without_steps_is_refused(saved, tmp_path, capsys, option, value):
    message = f"{option[2:]}: {value}"
    assert message in fails(capsys, *train_command(saved, tmp_path, option, value))


def test_what_a_resume_changes_is_named_and_refused(make_trainer):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = make_trainer("standalone", "ce", **settings)
    trainer.train()
    for changed in (
        {"objective": "kl"}, {"seed": 7}, {"learning_rate": 0.5}, {"max_length": 20}, {"max_window": 3},
        {"per_device_train_batch_size": 1}, {"dataset": random_dataset(seed=9)},
    ):  # fmt: skip
        given = {"objective": "ce", **settings, "max_steps": 3} | changed
        name = {"dataset": "train_dataset", "per_device_train_batch_size": "sequences of a step"}
        message = name.get(next(iter(changed)), next(iter(changed)))
        with pytest.raises(ValueError, match=rf"resume_from_checkpoint: .* was trained otherwise: {message}"):
            make_trainer("standalone", **given).train(resume_from_checkpoint=True)
    longer = make_trainer("standalone", "ce", **settings | {"max_steps": 3, "eval_prompts": 2, "chunk_size": 8})
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 3


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "ppow_state.json"])
def test_a_flipped_byte_falls_back_to_the_checkpoint_before_and_is_said(make_trainer, caplog, name):
    trainer = make_trainer("standalone", "ce", save_strategy="steps", save_steps=1, max_steps=3)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    data = bytearray((folder / "checkpoint-3" / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "checkpoint-3" / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} .* is damaged: it is other than when it was written"):
        check_complete(folder / "checkpoint-3")
    with caplog.at_level("WARNING"):
        assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2")
    assert f"checkpoint-3 is passed over: {name}" in caplog.text


def test_a_second_training_in_a_folder_is_refused_until_the_first_is_gone(make_trainer, tmp_path):
    trainer = make_trainer("standalone", "ce", max_steps=1)
    folder = Path(trainer.args.output_dir)
    holder = (
        "import sys, time; from ppow_hf.training.run_folder import lock_folder\n"
        "with lock_folder(sys.argv[1]): print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", holder, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"output_dir: process {process.pid} is training in .*\.training\.lock"):
            trainer.train()
    finally:
        process.kill()
        process.wait()
    assert (folder / ".training.lock").read_text() == f"process {process.pid}\n"  # stale, and taken over
    trainer.train()
    assert trainer.state.global_step == 1


# -- one sentence in place of a traceback


def copied(source: Path, folder: Path, name: str, data: bytes) -> Path:
    """A copy of a model's folder with one file replaced."""
    shutil.copytree(source, folder)
    (folder / name).write_bytes(data)
    return folder


BROKEN = {
    "model.safetensors is empty": ("model.safetensors", b""),
    "model.safetensors is a web page": ("model.safetensors", b"<!doctype html><html></html>"),
    "model.safetensors is a pointer of Git LFS": (
        "model.safetensors",
        b"version https://git-lfs.github.com/spec/v1\n",
    ),
    "model.safetensors is damaged": ("model.safetensors", b"\x02\0\0\0\0\0\0\0{a"),
    "config.json is empty": ("config.json", b""),
    "config.json is no JSON (Expecting property name": ("config.json", b"{a"),
    "config.json is nested too deep": ("config.json", b"[" * 200_000),
    "config.json holds a list": ("config.json", b"[1]"),
    "'utf-8' codec": ("config.json", b"\xff{}"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_file_is_named_with_its_argument(saved, tmp_path, capsys, message):
    name, data = BROKEN[message]
    drafter = copied(saved / "eagle", tmp_path / "drafter", name, data)
    target = copied(saved / "target", tmp_path / "target", name, data)
    for option, folder, pair in (
        ("--drafter", drafter, ["--target", saved / "target", "--drafter", drafter]),
        ("--target", target, ["--target", target, "--drafter", saved / "eagle"]),
    ):
        said = fails(capsys, "generate", *pair, "--prompt", "a")
        assert said.startswith(f"ppow: error: {option}: {str(folder)!r}") and message in said and len(said) < 500


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": "abc"}, {"vocab_size": "x"}, {"num_attention_heads": 0}, {"model_type": "zzz"},
        {"vocab_size": 0}, {"hidden_size": 48, "num_attention_heads": 4},
    ],
)  # fmt: skip
def test_a_wrong_configuration_of_a_target_is_one_line(saved, tmp_path, capsys, fields):
    folder = damaged(saved / "target", tmp_path / "target", **fields)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved / "target" / name, folder)
    pair = ["--target", folder, "--drafter", saved / "eagle"]
    said = fails(capsys, "generate", *pair, "--prompt", "a")
    assert said.startswith("ppow: error: --target: ") and len(said) < 600


@pytest.mark.parametrize(
    "fields",
    [
        {"calibration": [1]}, {"calibration": {"greedy": "x"}}, {"context_length": "x"}, {"draft_config": [1]},
        {"draft_config": {}}, {"draft_vocab_size": 0}, {"draft_vocab_size": 10**4}, {"target_hidden_size": "x"},
        {"vocab_size": None}, {"max_window": "a"}, {"architecture": None},
    ],
)  # fmt: skip
def test_a_wrong_field_of_a_drafter_is_named(saved, tmp_path, capsys, fields):
    folder = damaged(saved / "eagle", tmp_path / "bad", **fields)
    pair = ["--target", saved / "target", "--drafter", folder]
    assert f" {next(iter(fields))}: " in fails(capsys, "generate", *pair, "--prompt", "a")


def test_wrong_arguments_of_a_training_are_one_line_with_the_option_as_typed(saved, tmp_path, capsys):
    for message, words in {
        "--learning_rate: inf": ["--learning_rate", "inf"],
        "--per-device-train-batch-size: 0": ["--per-device-train-batch-size", 0],
        "--gradient_accumulation_steps: 0": ["--gradient_accumulation_steps", 0],
        "--draft_vocab_size: 0": ["--draft_vocab_size", 0],
        "--draft_vocab_size: 1000": ["--draft_vocab_size", 1000],
        "--lr_scheduler_kwargs: '{bad' is no JSON": ["--lr_scheduler_kwargs", "{bad"],
        "offline mode": ["--push_to_hub", "--hub_model_id", "ada/x"],
        "a library is missing: ": ["--optim", "adamw_8bit"],
    }.items():
        command = train_command(saved, tmp_path / "out", "--max_steps", 1, *words)
        assert message in fails(capsys, *command), words


@pytest.mark.parametrize("reduced", [[], ["--draft_vocab_size", 20]], ids=["whole", "reduced"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval_data", "foo.jsonl"], "--eval_data: the dataset has the columns ['foo']"),
        (["--eval_data", "code=foo.jsonl", "more=prompts.jsonl"], "--eval_data code=: the dataset has the columns"),
        (["--eval_strategy", "steps"], "--eval_strategy: 'steps' given without data to evaluate on. Pass --eval_data"),
        (["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint: 'nowhere' has no"),
        (["--objective", "ppow", "--num_iterations", 3, "--save_steps", 5], "--save_steps: 5 is no multiple of "),
        (["--report_to", "wandb"], "a library is missing"),
        (["--optim", "adamw_8bit", "--muon", 0], "a library is missing"),
        (["--push_to_hub", "--hub_model_id", "ada/x"], "offline mode"),
        (["--lr_scheduler_kwargs", "[1]"], "--lr_scheduler_kwargs: '[1]' given; pass a dictionary, or JSON of one."),
        (["--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"lr_end": 5e-4}', "--learning_rate", "1e-4"],
         "lr_end (0.0005) must be smaller than initial lr (0.0001)"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "--lr_scheduler_kwargs: None given for the schedule 'warm"),
        (["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"minlr": 1}'], "argument 'minlr'"),
        (["--init_layers", 99], "--init_layers: "),
        (["--eval_data", "prompts.jsonl", "--eval_strategy", "steps", "--metric_for_best_model", "eval_no_kl"],
         "--metric_for_best_model: 'eval_no_kl' given"),
        (["--eval_prompts", 0], "--eval_prompts: 0 given"),
        (["--seed", -1], "--seed: -1 given"),
        (["--drafter", "tiny-eagle", "--markov_rank", 3], "given, which is of a new drafter, and --drafter names one"),
        (["--drafter", "tiny-eagle", "--architecture", "eagle"], "--architecture: eagle given, which"),
    ],
)  # fmt: skip
def test_a_training_is_refused_before_the_target_writes_its_texts(
    saved, tmp_path, capsys, monkeypatch, words, message, reduced
):
    def wrote(*_, **__):
        raise AssertionError("the target wrote texts")

    monkeypatch.setattr("ppow_hf.training.preparation.regenerate", wrote)
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text(8 * '{"prompt": "a b c"}\n')
    Path("foo.jsonl").write_text('{"foo": "a"}\n')
    command = train_command(saved, tmp_path / "out", "--max_steps", 1, "--train_data", "prompts.jsonl")
    assert message in fails(capsys, *command, *words, *reduced)


def test_options_of_a_drafter_are_those_of_a_new_one(saved, tmp_path, capsys):
    command = train_command(saved, tmp_path / "out", "--max_steps", 1, "--architecture", "medusa")
    said = fails(capsys, *command, "--num_hidden_layers", 2)
    assert said.endswith(
        "--num_hidden_layers: a medusa drafter has heads and no transformer of its own. Leave it out."
    )
    assert cli.main([*command, "--max_window", "12"]) == 0
    assert PPOWDrafter.from_pretrained(tmp_path / "out").config.medusa_heads == 12


@pytest.mark.parametrize(
    ("argv", "sentence", "typed"),
    [
        ("train --train_data x", "train_dataset: of max_length=64. Raise max_length, or cut.",
         "--train_data: of --max_length 64. Raise --max_length, or cut."),
        ("train --target_states R --max-length 9", "train_dataset: 1 sequence, or max_length.",
         "--target_states: 1 sequence, or --max-length."),
        ("train", "eval_dataset['code']: no rows", "--eval_data code=: no rows"),
        ("train", "fp16: given. Pass bf16=True.", "--fp16: given. Pass --bf16 true."),
        ("train", 'x. Make one with architecture="block", or by objective="kl; 0.5: tv".',
         "x. Make one with --architecture block, or by --objective 'kl; 0.5: tv'."),
        ("train", "model: call from_target(max_window=3) on 'max_length/a' and `max_length`.",
         "--drafter: call from_target(max_window=3) on 'max_length/a' and `max_length`."),
        ("record", "target_layer_ids: [3] (regenerate=True, or not)", "--layers: [3] (--regenerate true, or not)"),
        ("generate", "assistant_model: pass assistant_model=drafter.with_settings(window=3)",
         "--drafter: pass assistant_model=drafter.with_settings(window=3)"),
        ("push d", "repo_id: bad, or git_tag", "USER/NAME: bad, or --tag"),
        ("", "model: bad", "model: bad"),
    ],
)  # fmt: skip
def test_sentences_name_arguments_as_they_are_typed(argv, sentence, typed):
    words = argv.split()
    assert Typed(words, lambda: spellings(words[0] if words else "", cli.COMMANDS)).sentence(sentence) == typed


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input_ids": [1, 2, 3, 99999, 4, 5, 6, 7, 8]}', "it holds the token id 99999"),
        ('{"text": "half \\ud800 a character"}', "`text` of row 0 holds half a character"),
        ("[" * 100_000, "line 1 is not JSON"),
    ],
    ids=["ids", "surrogate", "deep"],
)
def test_data_that_the_target_cannot_read_is_named(saved, tmp_path, capsys, line, message):
    (tmp_path / "bad.jsonl").write_text("\n".join([line] * 8))
    command = train_command(saved, tmp_path / "out", "--max_steps", 1, "--train_data", tmp_path / "bad.jsonl")
    said = fails(capsys, *command)
    assert message in said and "error: --train_data: " in said


def test_pickles_are_refused_in_an_import_and_never_run(saved, tmp_path, capsys):
    target = AutoModelForCausalLM.from_pretrained(saved / "target")
    drafter = PPOWDrafter.from_pretrained(saved / "eagle")
    export_drafter(drafter, tmp_path / "out", target=target, target_name=str(saved / "target"))
    (tmp_path / "out" / "model.safetensors").unlink()
    ran = tmp_path / "ran"
    for data in (pickle.dumps(Runs(str(ran))), b"garbage", pickle.dumps([1, 2])):
        (tmp_path / "out" / "pytorch_model.bin").write_bytes(data)
        said = fails(capsys, "import", tmp_path / "out", "--output-dir", tmp_path / "in", "--target", saved / "target")
        assert "pytorch_model.bin" in said and "never run" in said
    assert not ran.exists()


class Runs:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_words_and_numbers_that_are_none_are_refused(saved, capsys):
    pair = ["--target", saved / "target", "--drafter", saved / "eagle"]
    assert "not valid UTF-8" in fails(capsys, "generate", *pair, "--prompt", "a\udc80")
    assert "--temperature: inf given" in fails(capsys, "generate", *pair, "--prompt", "a", "--temperature", "inf")
    assert "--device: 'meta'" in fails(capsys, "generate", *pair, "--prompt", "a", "--device", "meta")


def test_a_misspelt_embedded_name_is_answered_at_once(saved, capsys):
    said = fails(capsys, "generate", "--target", "tiny-lama", "--drafter", "tiny-eagle", "--prompt", "a")
    assert said == "ppow: error: --target: there is no model 'tiny-lama'. Did you mean 'tiny-llama'?"
    said = fails(capsys, "export", "tiny-eagel", "--output-dir", "x")
    assert "DRAFTER: there is no model 'tiny-eagel'. Did you mean 'tiny-eagle'?" in said


def test_a_long_list_of_classes_is_left_out(saved, capsys):
    pair = ["--target", saved / "eagle", "--drafter", saved / "eagle"]
    assert len(fails(capsys, "generate", *pair, "--prompt", "a")) < 500


def test_a_bug_of_ours_keeps_its_traceback(saved, monkeypatch):
    for error in (TypeError("ours"), KeyError("ours"), AttributeError("ours"), RecursionError("ours")):
        assert explain(error, ["generate", "--target", str(saved / "target")], Typed([], dict)) is None
    disk = OSError(28, "No space left on device", "/somewhere/x")
    assert "the disk is full" in (explain(disk, [], Typed([], dict)) or "")


def test_calls_with_the_wrong_kind_of_object_are_refused_by_name(saved, make_trainer, tmp_path, make_target):
    target, drafter = make_target("llama"), PPOWDrafter.from_pretrained(saved / "eagle")
    with pytest.raises(ValueError, match="target: a PPOWDrafter given"):
        PPOWDrafter.from_target(drafter)
    with pytest.raises(ValueError, match="args: a TrainingArguments given"):
        PPOWTrainer(drafter, target, TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    args = PPOWTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="target_model: a PPOWDrafter given"):
        PPOWTrainer(drafter, drafter, args)


def test_an_interrupt_while_the_libraries_are_imported_is_one_line(tmp_path):
    script = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'transformers': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "sys.argv = [sys.argv[1]]\n"
        "from ppow_hf.cli import main\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    said = [
        subprocess.run([sys.executable, "-c", script, name], capture_output=True, text=True, env=environment)
        for name in ("/usr/bin/ppow", "notebook.py")
    ]
    assert (said[0].returncode, said[0].stderr) == (130, "ppow: interrupted\n")
    assert "Traceback" in said[1].stderr
