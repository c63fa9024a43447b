"""What testers reported of data: other libraries' columns, datasets and processors, and damaged records."""

import json
import shutil

import pytest
import torch
from slow_training import make_drafter, random_dataset
from test_data import build_tokenizer
from test_recorded_states import LAYERS
from transformers import ProcessorMixin

from ppow_hf.data.rows import read_rows
from ppow_hf.data.sequences import SequenceDataset, prepare_sequences
from ppow_hf.training import PPOWTrainer, PPOWTrainingArguments
from ppow_hf.training.checks import check_lengths
from ppow_hf.training.recorded_states import RecordFolder, StateRecord, shard_name
from ppow_hf.training.recording import Recording


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


# Token ids

IDS = [5, 6, 7, 8, 9, 10]
ANSWER = [False, False, False, True, True, True]


@pytest.mark.parametrize(
    "columns",
    [
        {"loss_mask": [0, 0, 0, 1, 1, 1], "labels": [-100, *IDS[1:]]},
        {"labels": [-100, -100, -100, 8, 9, 10]},
        {"labels": torch.tensor([-100, -100, -100, 8, 9, 10]), "loss_mask": None},
        {"completion_mask": [0, 0, 0, 1, 1, 1]},
        {"assistant_masks": [0, 0, 0, 1, 1, 1]},
        {"completion_mask": [0, 0, 1, 1, 1, 1], "assistant_masks": [1, 1, 0, 1, 1, 1]},
    ],
    ids=lambda columns: " ".join(columns),
)
def test_tokens_are_learned_as_other_libraries_mark_them(tokenizer, columns):
    item = prepare_sequences([{"input_ids": IDS, **columns}], tokenizer, 32)[0]
    assert item["input_ids"].tolist() == IDS and item["loss_mask"].tolist() == ANSWER


@pytest.mark.parametrize("padding", [0, -100])
@pytest.mark.parametrize("left", [0, 3])
def test_padding_is_dropped_on_either_side(tokenizer, padding, left):
    def padded(values, with_what):
        return [with_what] * left + values + [with_what] * (4 - left)

    row = {
        "input_ids": padded(IDS, padding), "attention_mask": padded([1] * 6, 0), "labels": padded([-100, *IDS[1:]], 0),
        "target_written": padded([0, 1, 0, 1, 0, 1], 1),
    }  # fmt: skip
    item = prepare_sequences([row], tokenizer, 6)[0]
    assert item["input_ids"].tolist() == IDS and item["loss_mask"].tolist() == [False] + [True] * 5
    assert item["target_written"].tolist() == [False, True] * 3


@pytest.mark.parametrize("wrong", [-1, 2**31, 2**40])
def test_ids_that_no_tokenizer_gives_name_the_row(tokenizer, wrong):
    for columns in ({"input_ids": [4, wrong]}, {"prompt_ids": [4, wrong], "completion_ids": [5]}):
        good = {name: [4, 5] for name in columns}
        with pytest.raises(ValueError, match=f"^eval_dataset: .*of row 1 has the token id {wrong}, .*Tokenize it"):
            prepare_sequences([good, columns], tokenizer, 32, argument="eval_dataset")


# Datasets


class Wrapped(torch.utils.data.Dataset):
    """A length and a `__getitem__` that never raises an IndexError."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        return self.rows[number % len(self.rows)]


class Keyed(Wrapped):
    """The same, with a KeyError after the last row."""

    def __getitem__(self, number):
        return dict(enumerate(self.rows))[number]


@pytest.mark.parametrize("kind", [Wrapped, Keyed])
def test_a_torch_dataset_is_read_to_its_length(kind):
    rows = [{"text": "a"}, {"text": "b"}, {"text": "c"}]
    assert read_rows(kind(rows), "train_dataset") == rows


def test_lengths_are_checked_without_reading_the_sequences(monkeypatch, tmp_path):
    data = random_dataset([9, 20, 11])
    monkeypatch.setattr(SequenceDataset, "__getitem__", None)
    args = PPOWTrainingArguments(str(tmp_path), max_length=20, use_cpu=True, report_to=[])
    check_lengths(data, args, 20)
    with pytest.raises(ValueError, match="^max_length: 20 given and a sequence of 20 tokens found"):
        check_lengths(data, args, 19)
    with pytest.raises(ValueError, match="train_dataset: sequence 1 has 1 tokens, so that none follows another"):
        check_lengths(random_dataset([5, 1]), args, 20)


def test_a_resume_with_other_masks_is_refused(tmp_path, make_target):
    target = make_target("llama", initializer_range=0.3)
    lengths = [12, 11, 10, 13]

    def train(resume=False, **masks):
        args = PPOWTrainingArguments(
            str(tmp_path), objective="kl", max_steps=1, max_length=16, save_strategy="steps", save_steps=1,
            per_device_train_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True,
        )  # fmt: skip
        data = random_dataset(lengths, **masks)
        PPOWTrainer(make_drafter(target, "medusa"), target, args, data).train(resume_from_checkpoint=resume)

    train()
    train(resume=True)
    for masks in ("loss_masks", "written"):
        half = [[place > length // 2 for place in range(length)] for length in lengths]
        with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*train_dataset \(fingerprint\) was"):
            train(resume=True, **{masks: half})


# Drafters, targets and tokenizers


class Processor(ProcessorMixin):
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


@pytest.mark.parametrize(
    ("given", "mend"), [(Processor(None), "processor.tokenizer"), ("gpt2", r"AutoTokenizer.from_pretrained\(...\)")]
)
def test_what_is_no_tokenizer_is_refused(make_target, tmp_path, given, mend):
    target = make_target("llama")
    args = PPOWTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match=f"^processing_class: a .* given, .*Pass processing_class={mend}.$"):
        PPOWTrainer(make_drafter(target, "eagle"), target, args, random_dataset(), processing_class=given)


def test_a_drafter_of_another_target_is_called_what_it_is(make_target, tmp_path):
    drafter = make_drafter(make_target("llama"), "block")
    other = make_target("llama", hidden_size=64)
    args = PPOWTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="^target_model: its hidden size is 64, and this block drafter reads"):
        PPOWTrainer(drafter, other, args, random_dataset())


# Records


@pytest.fixture
def make_record(tmp_path, make_target, tokenizer):
    """`make(name, data)`: the folder of a finished record, with shards of about 40 tokens."""
    target = make_target("llama", initializer_range=0.3, vocab_size=len(tokenizer))

    def make(name, data, **target_options):
        of = make_target("llama", vocab_size=len(tokenizer), **target_options) if target_options else target
        (tmp_path / name).mkdir(exist_ok=True)
        recording = Recording(of, tokenizer, data, LAYERS, 32, torch.float32, shard_bytes=40 * 512)
        recording.record(tmp_path / name, recording.open_folder(tmp_path / name), lambda tokens: None)
        return tmp_path / name

    return make


DATA = random_dataset([19, 11, 15, 17, 9, 20, 13], vocab_size=30)


def changed(**values):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("record.json", lambda path: path.write_text("[]"), "it holds a list"),
        ("record.json", lambda path: path.write_text("{"), "Expecting"),
        ("record.json", changed(format=2), "its format is 2, and this version of ppow_hf reads 1"),
        ("record.json", changed(shard_starts=None), "its shard_starts is None"),
        ("record.json", changed(shard_starts=[]), "list index"),
        ("record.json", changed(shard_starts=[0, 5]), "do not go from 0 to its 7 sequences"),
        ("record.json", changed(layer_ids=None), "its layer_ids is None"),
        ("record.json", changed(target_dtype=None), "its target_dtype is None"),
        ("record.json", changed(target_dtype="float31"), "its target_dtype is 'float31'"),
        ("config.json", lambda path: path.unlink(), None),
        ("config.json", lambda path: path.write_text("[]"), ""),
        ("config.json", lambda path: path.write_text("{}"), "Unrecognized model"),
        ("sequences.safetensors", lambda path: path.unlink(), None),
        ("sequences.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-9]), ""),
        ("target.safetensors", lambda path: path.unlink(), None),
        ("target.safetensors", lambda path: path.write_bytes(path.read_bytes()[:900]), ""),
    ],
)
def test_a_damaged_record_names_the_file(make_record, name, damage, message):
    folder = make_record("record", DATA)
    damage(folder / name)
    expected = f"has no {name}" if message is None else rf"{name} in .* cannot be read \(.*{message}.*\)\. Record"
    with pytest.raises(ValueError, match=f"^target_states: .*{expected}") as caught:
        StateRecord(folder)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("damage", [changed(shard_starts=None), lambda path: path.write_text("[]")])
def test_a_record_is_not_gone_on_from_a_damaged_one(make_record, damage):
    damage(make_record("record", DATA) / "record.json")
    with pytest.raises(ValueError, match=r"^--output-dir: record.json in .* cannot be read .*Pass another folder.$"):
        make_record("record", DATA)


def test_files_of_another_record_are_refused(make_record, tmp_path):
    others = {
        "tokens": make_record("longer", random_dataset([20] * 7, vocab_size=30)),
        "width": make_record("wider", DATA, hidden_size=64),
    }
    for kind, name in (("tokens", "sequences.safetensors"), ("width", "target.safetensors")):
        folder = make_record(kind, DATA)
        shutil.copy(others[kind] / name, folder / name)
        with pytest.raises(ValueError, match=f"^target_states: {name} in .* cannot be read .it holds"):
            StateRecord(folder)
    for kind, other in others.items():
        folder = make_record(f"shard of other {kind}", DATA)
        shutil.copy(other / shard_name(0), folder / shard_name(0))
        with pytest.raises(ValueError, match=f"^target_states: .*{shard_name(0)}.*of the shape .*Delete it"):
            StateRecord(folder).read(0, ["last"])


def test_a_record_is_gone_on_from_with_the_same_masks_alone(make_record):
    folder = make_record("record", DATA)
    names = ("input_ids", "loss_mask", "target_written")
    items = [DATA[row] for row in range(len(DATA))]
    tensors = [[item[name] for item in items] for name in names]
    other = SequenceDataset(tensors[0], [torch.arange(len(mask)) > 4 for mask in tensors[1]])
    with pytest.raises(ValueError, match="holds another record: sequences_fingerprint is"):
        make_record("record", other)
    manifest = json.loads((folder / "record.json").read_text())
    assert manifest.pop("sequences_fingerprint") != manifest["data_fingerprint"]
    (folder / "record.json").write_text(json.dumps(manifest))  # as earlier versions wrote it
    (folder / shard_name(0)).unlink()
    assert len(RecordFolder(make_record("record", DATA))) == len(DATA)
