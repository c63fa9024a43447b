"""Training on a target's recorded states is training with the target, without it."""

import copy
import json
import logging
import math
import shutil
import threading

import pytest
import torch
from slow_training import make_drafter, random_dataset
from test_data import build_tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback

from ppow_hf import PPOWDrafter, cli
from ppow_hf.data.sequences import SequenceDataset
from ppow_hf.runtime.target_weights import embedding_matrix, head_matrix
from ppow_hf.training import PPOWTrainer, PPOWTrainingArguments
from ppow_hf.training.recorded_states import StateRecord, shard_name
from ppow_hf.training.recording import Recording, batches_by_length, shard_starts

LAYERS = [1, 2, 3]
LENGTHS = [19, 11, 15, 17, 9, 20, 13]
WRITTEN = [[False] * 3 + [True] * (length - 3) for length in LENGTHS]
DATA = random_dataset(LENGTHS, vocab_size=30, written=WRITTEN)


def part_of(data, rows):
    names = ("input_ids", "loss_mask", "target_written")
    return SequenceDataset(*([data[row][name] for row in rows] for name in names))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def target(make_target, tokenizer):
    return make_target("llama", initializer_range=0.3, vocab_size=len(tokenizer))


@pytest.fixture
def make_record(tmp_path, target, tokenizer):
    """`make(name, layers, dtype, ...)`: the folder of a finished record of DATA, or of its `rows`, with shards of
    about 40 tokens."""

    def make(name="record", layers=LAYERS, dtype=torch.float32, of=target, rows=None, **options):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        options = {"shard_bytes": 40 * 512 * dtype.itemsize // 4} | options
        data = DATA if rows is None else part_of(DATA, rows)
        recording = Recording(of, tokenizer, data, layers, 32, dtype, **options)
        recording.record(folder, recording.open_folder(folder), lambda tokens: None)
        return folder

    return make


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


@pytest.fixture
def losses(tmp_path, target):
    """`losses(architecture, target_states=..., ...)`: the losses of a few steps, with the target or with a record."""

    def train(architecture, target_states=None, drafter=None, target=target, resume=False, stop=None, **settings):
        defaults = {
            "objective": "supervised", "max_length": 32, "max_window": 4, "num_prefixes": 3, "num_rollouts": 4,
            "rollout_temperature": 0.8, "unroll_steps": 3, "num_anchors": 64, "cost_ratio": 0.15,
            "per_device_train_batch_size": 3,
            "max_steps": 5, "logging_steps": 1, "learning_rate": 1e-3, "save_strategy": "no", "disable_tqdm": True,
        }  # fmt: skip
        args = PPOWTrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to=[], **(defaults | settings))
        drafter = drafter or make_drafter(target, architecture)
        if target_states is None:
            trainer = PPOWTrainer(drafter, target, args, DATA)
        else:
            trainer = PPOWTrainer(drafter, args=args, target_states=target_states)
        trainer.add_callback(StopAfter(stop))
        trainer.train(resume_from_checkpoint=resume)
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    return train


@pytest.mark.parametrize("architecture", ["eagle", "standalone", "medusa", "confident"])
@pytest.mark.parametrize("objective", ["supervised", "tv; 0.5: 0.3*kl + lk", "expected_length", "ppow"])
def test_the_losses_are_those_of_training_with_the_target(make_record, losses, architecture, objective):
    record = make_record(layers=LAYERS if architecture in ("eagle", "confident") else [])
    expected = losses(architecture, objective=objective)
    assert len(expected) == 5 and len(set(expected)) == 5
    assert losses(architecture, record, objective=objective) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("objective", ["tv", "ppow"])
def test_records_of_the_texts_parts_train_as_one_of_all(make_record, losses, tmp_path, objective):
    settings = {"objective": objective, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    parts = [make_record("first", rows=range(3)), make_record("second", rows=range(3, len(DATA)))]
    assert [len(list(part.glob("states-*"))) for part in parts] == [2, 2]
    together = losses("eagle", make_record(), **settings)
    assert len(set(together)) == 6
    shutil.rmtree(tmp_path / "run")
    assert losses("eagle", parts, stop=3, **settings) == together[:3]
    assert losses("eagle", parts, resume=True, **settings) == pytest.approx(together, abs=1e-6)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*train_dataset \(fingerprint\) was"):
        losses("eagle", parts[0], resume=True, **settings)


def test_records_that_do_not_go_together_are_refused(make_record, make_target, tokenizer):
    first = make_record("first", rows=range(3))
    other = make_target("llama", initializer_range=0.3, vocab_size=len(tokenizer), seed=1)
    for name, options in {
        "layer_ids": {"layers": [1, 2]}, "states_dtype": {"dtype": torch.bfloat16}, "target_fingerprint": {"of": other}
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"target_states: {name} is .*Give folders recorded with the same target"):
            StateRecord(first, make_record(name, **options))


def test_states_in_bfloat16_give_nearly_the_losses(make_record, losses):
    record = make_record(dtype=torch.bfloat16)
    found, expected = losses("eagle", record), losses("eagle")
    assert found != expected and found == pytest.approx(expected, rel=1e-2)


def test_a_target_in_bfloat16_gives_the_same_losses_from_states_in_bfloat16(make_record, losses, target):
    half = AutoModelForCausalLM.from_config(copy.deepcopy(target.config), dtype=torch.bfloat16)
    half.load_state_dict(target.state_dict())
    record = make_record(of=half, dtype=torch.bfloat16)
    drafters = [make_drafter(target, "eagle") for _ in range(2)]
    expected = losses("eagle", drafter=drafters[0], target=half)
    assert losses("eagle", record, drafter=drafters[1]) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("architecture", ["eagle", "standalone", "medusa", "block"])
def test_a_drafter_starts_from_the_record_as_from_the_target(make_record, target, architecture):
    reads_layers = architecture in ("eagle", "block")
    record = StateRecord(make_record(layers=LAYERS if reads_layers else []))
    layers = {"target_layer_ids": LAYERS} if reads_layers else {}
    drafters = []
    if architecture == "eagle":
        layers["state_scales"] = record.state_scales()
    for pattern in (target, record.target):
        torch.manual_seed(0)
        drafters.append(PPOWDrafter.from_target(pattern, architecture, **layers))
    expected, found = (drafter.state_dict() for drafter in drafters)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    expected, found = (drafter.config.to_dict() for drafter in drafters)
    for config in (expected, found):  # the target was built, not loaded, so that its configuration names no dtype
        config["draft_config"].pop("dtype", None)
    assert expected == found


def test_scales_bring_the_recorded_states_near_one(make_record, target):
    record = StateRecord(make_record(layers=LAYERS))
    sequence = record.sequences[0]["input_ids"]
    with torch.no_grad():
        states = target(sequence[None], output_hidden_states=True).hidden_states
    for layer, scale in zip(LAYERS, record.state_scales(), strict=True):
        assert math.log2(scale).is_integer()
        assert 0.125 < scale * states[layer].pow(2).mean().sqrt() < 0.5
    assert len(set(record.state_scales())) > 1  # otherwise order was not tested


def test_tied_weights_are_kept_once(make_record, make_target, tokenizer):
    config = copy.deepcopy(make_target("llama", vocab_size=len(tokenizer)).config)
    config.tie_word_embeddings = True
    tied = AutoModelForCausalLM.from_config(config)
    folder = make_record(of=tied, layers=[])
    record = StateRecord(folder)
    assert torch.equal(head_matrix(record.target), tied.lm_head.weight)
    assert torch.equal(embedding_matrix(record.target), tied.lm_head.weight)
    assert (folder / "target.safetensors").stat().st_size < 1.5 * tied.lm_head.weight.nbytes


def test_an_offloaded_target_is_recorded_as_a_whole_one(make_record, target, tmp_path):
    target.save_pretrained(tmp_path / "target")
    places = dict.fromkeys(["model.norm", "model.rotary_emb", "model.layers.0", "model.layers.1"], "cpu")
    places |= dict.fromkeys(["model.embed_tokens", "model.layers.2", "model.layers.3", "lm_head"], "disk")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "target", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert offloaded.lm_head.weight.is_meta
    whole, placed = make_record("whole"), make_record("placed", of=offloaded.eval())
    for path in sorted(whole.glob("*.safetensors")):
        assert path.read_bytes() == (placed / path.name).read_bytes()


def test_a_record_goes_on_where_it_was_and_refuses_another(make_record, make_target, tokenizer):
    folder = make_record()
    shards = sorted(folder.glob("states-*"))
    assert len(shards) > 2 and not list(folder.glob("*.part"))
    kept, lost = shards[0].stat(), shards[1].read_bytes()
    shards[1].unlink()
    make_record()
    assert shards[0].stat().st_mtime_ns == kept.st_mtime_ns and shards[1].read_bytes() == lost
    with pytest.raises(ValueError, match="--output-dir: .* holds another record: layer_ids is"):
        make_record(layers=[0, 1, 2])
    other = make_target("llama", initializer_range=0.3, vocab_size=len(tokenizer), seed=1)
    with pytest.raises(ValueError, match="holds another record: target_fingerprint is"):
        make_record(of=other)


def test_an_unfinished_record_trains_on_what_is_there(make_record, losses, target, tmp_path):
    folder = make_record()
    starts = json.loads((folder / "record.json").read_text())["shard_starts"]
    (folder / shard_name(1)).unlink()
    record = StateRecord(folder)
    rows = [row for row in range(len(DATA)) if not starts[1] <= row < starts[2]]
    assert len(record.sequences) == len(rows) < len(DATA)
    for index, row in enumerate(rows):
        assert torch.equal(record.sequences[index]["input_ids"], DATA[row]["input_ids"])
        assert torch.equal(record.sequences[index]["target_written"], DATA[row]["target_written"])
        states = target(DATA[row]["input_ids"][None], output_hidden_states=True).hidden_states
        for found, layer in zip(record.read(index, ["layer.1", "layer.3", "last"]), (1, 3, 4), strict=True):
            torch.testing.assert_close(found, states[layer][0], atol=1e-5, rtol=1e-4)
    assert all(loss > 0 for loss in losses("eagle", record, per_device_train_batch_size=2))


def test_processes_that_record_together_share_the_shards(tmp_path, target, tokenizer):
    folder = tmp_path / "shared"
    folder.mkdir()
    recordings = [Recording(target, tokenizer, DATA, LAYERS, 32, torch.float32, shard_bytes=2048) for _ in range(2)]
    counts: list[int] = []

    def work(recording):
        counts.append(recording.record(folder, recording.open_folder(folder), lambda tokens: None))

    threads = [threading.Thread(target=work, args=(recording,)) for recording in recordings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) == sum(LENGTHS) and recordings[0].missing_shards(folder) == []


def test_a_limit_on_the_disk_is_kept(make_record, target):
    folder = make_record("limited", max_gigabytes=110_000 / 1e9)
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < 110_000 + 4096
    assert 0 < len(StateRecord(folder).sequences) < len(DATA)
    with pytest.raises(ValueError, match="--max-gigabytes: 1e-06 given"):
        make_record("none", max_gigabytes=1e-6)


def test_what_needs_a_forward_of_the_target_is_refused_by_name(make_record, losses, target, tmp_path):
    record = make_record()
    for name, value in (("verify_with", "target"), ("target_temperature", 1.0), ("proximity_weight", 0.5)):
        with pytest.raises(ValueError, match=f"objective: ppow with {name}=.*new forwards of the target"):
            losses("eagle", record, objective="ppow", **{name: value})
    with pytest.raises(ValueError, match="cost_ratio: None given"):
        losses("eagle", record, objective="supervised; 0.5: ppow", cost_ratio=None)
    assert losses("eagle", record, cost_ratio=None)
    with pytest.raises(ValueError, match=r"target_states: the states after the layers \[0\]"):
        losses("eagle", record, drafter=make_drafter(target, "eagle", target_layer_ids=[0, 1, 2]))
    with pytest.raises(ValueError, match="metric_for_best_model: 'eval_kl'"):
        losses("eagle", record, metric_for_best_model="eval_kl")
    args = PPOWTrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to=[], max_length=32)
    with pytest.raises(ValueError, match="train_dataset: recorded states come with the texts"):
        PPOWTrainer(make_drafter(target, "eagle"), args=args, train_dataset=DATA, target_states=record)
    with pytest.raises(ValueError, match="target_states: .*holds no recorded states"):
        StateRecord(tmp_path)


def test_texts_that_do_not_verify_windows_are_refused(make_record, losses, monkeypatch):
    monkeypatch.setattr("test_recorded_states.DATA", random_dataset(LENGTHS, vocab_size=30))
    with pytest.raises(ValueError, match="objective: opd with no sequence that holds a window"):
        losses("eagle", make_record(), objective="opd")


@pytest.mark.parametrize(("count", "said"), [(1, "14.3% of the sequences hold one"), (3, None)])
def test_few_texts_of_greedy_decoding_are_warned_of(make_record, losses, monkeypatch, caplog, count, said):
    written = [row if place < count else [False] * len(row) for place, row in enumerate(WRITTEN)]
    monkeypatch.setattr("test_recorded_states.DATA", random_dataset(LENGTHS, vocab_size=30, written=written))
    monkeypatch.setattr(logging.getLogger("ppow_hf.training.checks"), "handlers", [caplog.handler])
    losses("eagle", make_record(), objective="ppow", max_steps=1)
    assert said in caplog.text if said else "of the sequences hold one" not in caplog.text


@pytest.mark.parametrize("objective", ["ppow", "opd", "ppow + tv"])
def test_only_texts_of_greedy_decoding_give_windows(make_record, losses, monkeypatch, objective):
    sampled = [[False] * length for length in LENGTHS]
    mixed = [row if place % 2 else none for place, (row, none) in enumerate(zip(WRITTEN, sampled, strict=True))]
    settings = {"objective": objective, "per_device_train_batch_size": 1, "max_steps": 7, "learning_rate": 0.0}

    monkeypatch.setattr("test_recorded_states.DATA", random_dataset(LENGTHS, vocab_size=30, written=mixed))
    found = losses("eagle", make_record("mixed"), **settings)
    monkeypatch.setattr("test_recorded_states.DATA", random_dataset(LENGTHS, vocab_size=30, written=WRITTEN))
    whole = losses("eagle", make_record("whole"), **settings)
    same = [a == pytest.approx(b, abs=1e-6) for a, b in zip(found, whole, strict=True)]
    assert sum(same) == 3  # the texts written at T = 0, one a batch: the same windows
    assert [loss for loss, alike in zip(found, same, strict=True) if not alike] == [0.0] * 4


def test_the_target_may_be_there_to_evaluate(make_record, target, tmp_path, caplog):
    record = make_record()
    args = PPOWTrainingArguments(
        str(tmp_path / "run"), use_cpu=True, report_to=[], max_length=32, max_window=4, max_steps=2, eval_steps=2,
        eval_strategy="steps", eval_prompts=2, eval_new_tokens=6, per_device_train_batch_size=2, disable_tqdm=True,
    )  # fmt: skip
    held_out = random_dataset([9, 12], vocab_size=30, seed=3)
    for evaluator in (target, None):
        trainer = PPOWTrainer(
            make_drafter(target, "eagle"), evaluator, args, eval_dataset=held_out, target_states=record
        )
        trainer.train()
        evaluated = [row for row in trainer.state.log_history if "eval_acceptance_length" in row]
        assert len(evaluated) == (1 if evaluator is target else 0)
    with pytest.raises(ValueError, match="target_model: None given"):
        trainer.evaluate()


def test_the_commands_record_and_train(tmp_path, target, tokenizer, capsys):
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    rows = [
        {"prompt_ids": ids[:3].tolist(), "completion_ids": ids[3:].tolist(), "temperature": 0.0}
        for ids in (DATA[row]["input_ids"] for row in range(len(DATA)))
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder, options = str(tmp_path / "record"), ["--states-dtype", "float32", "--dtype", "float32", "--device", "cpu"]
    command = ["record", "--target", str(tmp_path / "target"), "--data", str(tmp_path / "texts.jsonl")]
    assert cli.main([*command, "--output-dir", folder, "--max-length", "18", *options]) == 0
    printed = capsys.readouterr().out
    assert "7 sequences of 101 tokens: 518 bytes a token" in printed and "tokens/s" in printed
    placed = [*command, "--output-dir", str(tmp_path / "placed"), "--max-length", "18", *options[:4]]
    assert cli.main([*placed, "--device-map", "auto"]) == 0
    for path in (tmp_path / "record").glob("states-*"):
        assert path.read_bytes() == (tmp_path / "placed" / path.name).read_bytes()
    assert cli.main([*placed, "--device-map", "auto", "--device", "cpu"]) == 2
    assert "--device-map: --device and --device-map given. Pass one of them." in capsys.readouterr().err
    settings = ["--max_steps", "3", "--per_device_train_batch_size", "2", "--max_window", "4"]
    settings += ["--report_to", "none", "--use_cpu", "true"]
    settings += ["--target_dtype", "float32", "--bf16", "false", "--logging_steps", "1", "--save_strategy", "no"]
    runs = {
        "with": [*command[1:3], "--train_data", str(tmp_path / "texts.jsonl"), "--max_length", "18"],
        "without": ["--target_states", folder],
    }
    losses = {}
    for name, words in runs.items():
        assert cli.main(["train", *words, *settings, "--output_dir", str(tmp_path / name)]) == 0
        log = json.loads((tmp_path / name / "training_log.json").read_text())
        losses[name] = [row["loss"] for row in log if "loss" in row]
    assert losses["without"] == pytest.approx(losses["with"], abs=1e-6)
    again = ["--drafter", str(tmp_path / "without"), "--output_dir", str(tmp_path / "again")]
    assert cli.main(["train", "--target_states", folder, *again, *settings]) == 0
    more = ["--target_states", folder, folder, "--output_dir", str(tmp_path / "both"), "--architecture", "standalone"]
    assert cli.main(["train", *more, *settings]) == 0
    assert cli.main(["train", "--target", "tiny-target", "--output_dir", str(tmp_path / "none")]) == 2
    assert "required: --train_data" in capsys.readouterr().err


@pytest.mark.parametrize("given", [[], ["--regenerate", "true"], ["--regenerate", "false"]])
def test_completions_of_the_data_are_recorded_where_that_is_asked_for(tmp_path, target, tokenizer, capsys, given):
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    row = {"prompt": "def read(self):", "completion": " return self.file"}
    (tmp_path / "texts.jsonl").write_text(json.dumps(row) + "\n")
    command = ["record", "--target", str(tmp_path / "target"), "--data", str(tmp_path / "texts.jsonl")]
    assert cli.main([*command, "--output-dir", str(tmp_path / "record"), "--device", "cpu", *given]) == 0
    kept = StateRecord(str(tmp_path / "record")).sequences[0]
    keeps = given == ["--regenerate", "false"]
    theirs = tokenizer.decode(kept["input_ids"], skip_special_tokens=True)
    assert (theirs == row["prompt"] + row["completion"]) == keeps
    assert bool(kept["target_written"].any()) == (not keeps)
    assert ("Pass --regenerate false to train on them" in capsys.readouterr().err) == (not keeps)


def test_shards_and_batches_are_filled():
    assert shard_starts([5, 5, 5, 30, 1], 10) == [0, 2, 3, 4, 5]
    lengths = [10, 3, 9, 10, 3, 10]
    assert list(batches_by_length(range(6), lengths, 30)) == [[0, 3, 5], [2], [1, 4]]
