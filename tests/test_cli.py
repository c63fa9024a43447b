"""The command line: what it runs, what it prints, and how it refuses."""

import copy
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ppow_hf import PPOWDrafter, cli, tiny
from ppow_hf.data import models as loading
from ppow_hf.data.files import ensure_writable
from ppow_hf.runtime.configuration_ppow import vocabulary_fingerprint

TEXT = "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n"


@pytest.fixture(scope="module")
def tokenizer():
    """64 tokens or fewer: the characters of a short text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=64, special_tokens=["<pad>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="module")
def saved(make_target, tokenizer, tmp_path_factory):
    """Folders of a target with its tokenizer, and of an eagle and a standalone drafter for it."""
    folder = tmp_path_factory.mktemp("models")
    target = copy.deepcopy(make_target("llama"))
    target.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    fingerprint = vocabulary_fingerprint(tokenizer)
    for architecture in ("eagle", "standalone"):
        drafter = PPOWDrafter.from_target(
            target, architecture, target_vocabulary_fingerprint=fingerprint, max_window=4
        )
        drafter.save_pretrained(folder / architecture)
    return folder


def fails(capsys, *argv):
    """The one line on stderr of a command that ends with exit code 2."""
    capsys.readouterr()
    assert cli.main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("ppow: error:")]
    assert len(lines) == 1 and "Traceback" not in captured.err and captured.out == ""
    return lines[0]


def test_generate_continues_the_prompt_as_plain_generation_does(saved, tokenizer, make_target, capsys):
    argv = ["generate", "--target", saved / "target", "--drafter", saved / "eagle", "--prompt", "def add(a"]
    argv += ["--max-new-tokens", 10, "--window", "fixed", "--max-window", 3]
    assert cli.main(list(map(str, argv))) == 0
    captured = capsys.readouterr()
    ids = tokenizer("def add(a", return_tensors="pt")["input_ids"]
    plain = make_target("llama").generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :]
    assert captured.out == "def add(a" + tokenizer.decode(plain, skip_special_tokens=True) + "\n"
    assert "10 new tokens" in captured.err and "window rule fixed" in captured.err


def test_generate_prints_json_and_reads_stdin(saved, capsys, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("def sub"))
    argv = ["generate", "--target", saved / "target", "--drafter", saved / "standalone", "--prompt", "-", "--json"]
    argv += ["--max-new-tokens", 8, "--temperature", 0.8, "--window", "fixed", "--max-window", 2]
    assert cli.main(list(map(str, argv))) == 0
    printed = json.loads(capsys.readouterr().out)
    trace = printed["trace"]
    assert printed["prompt"] == "def sub" and trace["new_tokens"] == 8 and trace["window"] == "fixed"
    assert sum(one["accepted"] + 1 for one in trace["rounds"]) == 8
    assert trace["drafted"] == sum(one["window"] for one in trace["rounds"]) > 0


def test_bench_writes_table_json_and_picture(saved, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def add(a, b):\n\ndef sub(a\nreturn a\n")
    argv = ["bench", "--target", saved / "target", "--drafter", saved / "eagle", "--standalone", saved / "standalone"]
    argv += ["--prompts", prompts, "--num-prompts", 2, "--max-new-tokens", 6]
    argv += ["--json", tmp_path / "new" / "out.json", "--plot", tmp_path / "new" / "windows.png"]
    assert cli.main(list(map(str, argv))) == 0
    result = json.loads((tmp_path / "new" / "out.json").read_text())
    assert result["prompts"] == 2 and len(result["rows"]) == 9
    assert str(tmp_path) not in json.dumps(result) and result["command"].startswith("ppow bench --target target")
    printed = capsys.readouterr().out
    assert all(row["name"] in printed for row in result["rows"])
    assert "peculation" in printed.splitlines()[-1]
    assert (tmp_path / "new" / "windows.png").stat().st_size > 1000


def test_bench_makes_a_table_for_each_batch_size_and_temperature(saved, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def add(a, b)\ndef sub\n")
    argv = ["bench", "--target", saved / "target", "--drafter", saved / "eagle", "--prompts", prompts]
    argv += ["--max-new-tokens", 4, "--batch-size", 1, 2, "--temperature", 0, 0.7, "--json", tmp_path / "b.json"]
    assert cli.main(list(map(str, argv))) == 0
    for batch_size in (1, 2):
        for temperature in ("0", "0.7"):
            result = json.loads((tmp_path / f"b-b{batch_size}-t{temperature}.json").read_text())
            assert result["batch_size"] == batch_size and result["temperature"] == float(temperature)
            identical = {row["identical_to_plain"] for row in result["rows"]}
            assert identical == ({True} if temperature == "0" else {None})
    assert capsys.readouterr().out.count("acceptance") == 4


def test_bench_reads_json_lines(saved, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def add(a, b):"}\n{"prompt": "return"}\n')
    argv = ["bench", "--target", saved / "target", "--drafter", saved / "standalone", "--prompts", prompts]
    assert cli.main([*map(str, argv), "--max-new-tokens", "3", "--num-prompts", "1"]) == 0
    assert "1 prompts" in capsys.readouterr().out
    prompts.write_text('{"question": "?"}\n')
    assert "--prompts" in fails(capsys, *argv, "--max-new-tokens", 3)


def test_stdlib_prompts_are_short_and_held_out(tokenizer, make_target, monkeypatch):
    from ppow_hf.tiny import corpus

    bodies = "".join(f"    x{number} = {number}\n" for number in range(9))
    files = [
        corpus.SourceFile("kept", "#" * 500 + f"\ndef kept():\n{bodies}", held_out=True),
        corpus.SourceFile("trained", f"def trained():\n{bodies}", held_out=False),
    ]
    monkeypatch.setattr(corpus, "standard_library", lambda: files)
    (prompt,) = loading.load_prompts("stdlib", 1, tokenizer, make_target("llama"), max_new_tokens=4)
    assert prompt.shape == (1, 128)
    (short,) = loading.load_prompts("stdlib", 1, tokenizer, make_target("llama"), max_new_tokens=200)
    assert short.shape == (1, 56)


def test_prompts_are_read_from_a_named_column(tmp_path, tokenizer, make_target):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "def add", "answer": "a"}\n{"question": "return", "answer": "b"}\n')
    prompts = loading.load_prompts(f"{file}:question", 5, tokenizer, make_target("llama"), max_new_tokens=4)
    assert [tokenizer.decode(ids[0]) for ids in prompts] == ["def add", "return"]
    with pytest.raises(ValueError, match=r"questions.jsonl has no column 'title'; it has \['answer', 'question'\]"):
        loading.load_prompts(f"{file}:title", 5, tokenizer, make_target("llama"), max_new_tokens=4)


def test_mistakes_end_with_one_line_that_names_the_argument(saved, tmp_path, capsys):
    pair = ["--target", saved / "target", "--drafter", saved / "eagle"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def add(a\n")
    cases = {
        "--target: there is no folder": ["generate", "--target", tmp_path / "no", *pair[2:], "--prompt", "a"],
        "--drafter: there is no folder": ["generate", *pair[:2], "--drafter", tmp_path / "no", "--prompt", "a"],
        "not a PPOWDrafter": ["generate", *pair[:2], "--drafter", saved / "target", "--prompt", "a"],
        "--prompt: it is empty": ["generate", *pair, "--prompt", ""],
        "context of 256": ["generate", *pair, "--prompt", "a", "--max-new-tokens", 256],
        "--max-new-tokens: 0 given": ["generate", *pair, "--prompt", "a", "--max-new-tokens", 0],
        "--temperature: -1.0": ["generate", *pair, "--prompt", "a", "--temperature", -1],
        "--max-window: 0": ["generate", *pair, "--prompt", "a", "--max-window", 0],
        "--prompts: there is no file": ["bench", *pair, "--prompts", tmp_path / "no.txt"],
        "--batch-size: 0 given": ["bench", *pair, "--batch-size", 2, 0],
        "--engine-python: ": ["bench", *pair, "--engine", "sglang", "--engine-python", tmp_path / "no"],
        "--temperature: 0.7 given": ["bench", *pair, "--engine", "vllm", "--temperature", 0.7],
        "--batch-size: 8 given; llama.cpp": ["bench", *pair, "--engine", "llamacpp", "--batch-size", 8],
        "--gguf-dtype: q8_0 given": ["bench", *pair, "--engine", "vllm", "--gguf-dtype", "q8_0"],
        "--repeats: given with --engine": ["bench", *pair, "--engine", "vllm", "--repeats", 3],
        "--thorough: given with --engine": ["bench", *pair, "--engine", "vllm", "--thorough"],
        "--plot: given with --engine": ["bench", *pair, "--engine", "vllm", "--plot", tmp_path / "w.png"],
        "--fit-prompts: 0 given": ["bench", "--windows", *pair, "--fit-prompts", 0],
        "--repeats: 0 given": ["bench", *pair, "--repeats", 0],
        "--json": ["bench", *pair, "--json", tmp_path],
        "--standalone": ["bench", *pair, "--standalone", saved / "target", "--prompts", prompts],
    }
    for message, argv in cases.items():
        assert message in fails(capsys, *argv), message
    assert "--target: " in fails(capsys, "generate", "--target", saved / "eagle", *pair[2:], "--prompt", "a")


def test_a_port_that_is_taken_is_refused_before_a_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port: {port} cannot be served on" in fails(capsys, "demo", "--target", "no/such", "--port", port)


PAIR = "--target tiny --drafter tiny-eagle"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"calibrate {PAIR} --output-dir out --max-new-tokens 2", "--max-new-tokens: 2 given, which leaves nothing"),
        (f"windows {PAIR} --max-new-tokens 1", "--max-new-tokens: 1 given, which leaves nothing to draft"),
        (f"measure {PAIR} --json a.json --max-new-tokens 1", "--max-new-tokens: 1 given, which leaves nothing"),
        (f"overhead {PAIR} --window 62", "--window: 62 given, and --max-new-tokens 64 leave no room"),
        (f"bench {PAIR} --temperature 0 -1", "--temperature: -1.0 given"),
        (f"bench {PAIR} --temperature nan", "--temperature: nan given"),
        (f"measure {PAIR} --json a.json --temperature 0,nan", "--temperature: nan given"),
        (f"windows {PAIR} --cost-ratios 0.1 nan", "--cost-ratios: nan given"),
        (f"windows {PAIR} --live -1", "--live: -1 given"),
        (f"bench {PAIR} --plot w.xyz", "--plot: 'w.xyz' given; the name of a .png file is needed"),
        (f"bench {PAIR} --engine-tokens 3 0", "--engine-tokens: 0 given"),
        (f"bench {PAIR} --engine-python python", "--engine-python: 'python' given without --engine"),
        (f"measure {PAIR} --json a.json --window fixed,foo", "--window: 'foo' is not one of ['kl', 'fixed', 'heur"),
        (f"measure {PAIR} --json a.json --max-window 0", "--max-window: 0 given"),
        (f"generate {PAIR} --prompt a --max-window 0", "--max-window: 0 given"),
        (f"generate {PAIR} --prompt a --seed -1", "--seed: -1 given"),
        (f"generate {PAIR} --prompt -", "--prompt: what stands on stdin is not UTF-8 text"),
        (f"bench {PAIR} --num-prompts 100000", "--num-prompts: 100000 prompts asked for"),
        (f"windows {PAIR} --fit-prompts 90000", "--fit-prompts and --num-prompts: 90020 prompts asked for"),
        ("quickstart --prompts 100000 --output-dir out", "--prompts: 100000 prompts asked for"),
        ("quickstart --prompts 0 --output-dir out", "--prompts: 0 given"),
        ("quickstart --seed -1 --output-dir out", "--seed: -1 given"),
        ("demo --target tiny --port 99999", "--port: 99999 given; a number from 1 to 65535 is needed"),
        (f"bench {PAIR} --prompts latin.txt", "--prompts: 'latin.txt' is not UTF-8 text"),
        (f"bench {PAIR} --prompts blank.txt", "--prompts: 'blank.txt' has no prompt"),
        (f"bench {PAIR} --prompts p.txt:foo", "--prompts: 'p.txt:foo' given, and each line of a .txt file"),
        (f"overhead {PAIR} --prompts rows.jsonl:foo", "--prompts: rows.jsonl has no column 'foo'"),
        (f"measure {PAIR} --json a.json --prompts p.txt --prompts d/p.txt", "--prompts: 'p.txt' and 'd/p.txt' are"),
        (f"windows {PAIR} --prompts a=p.txt a=d/p.txt", "are both called 'a'. Give each a name of its own"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(tmp_path, capsys, monkeypatch, line, message):
    import io

    from ppow_hf.tiny import corpus

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "_load", load)
    monkeypatch.setattr(corpus, "standard_library", list)
    monkeypatch.setattr(sys, "stdin", io.StringIO("def a\udcff"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    for name, content in {
        "p.txt": b"a\n",
        "d/p.txt": b"b\n",
        "blank.txt": b"\n \n",
        "latin.txt": b"caf\xe9\n",
        "rows.jsonl": b'{"text": "a"}\n',
    }.items():
        (tmp_path / name).write_bytes(content)
    assert message in fails(capsys, *line.split())


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_a_device_is_tried_before_a_model_is_loaded(capsys, monkeypatch, device):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    line = f"generate {PAIR} --prompt a --device {device}"
    assert f"--device: '{device}' cannot be used: " in fails(capsys, *line.split())


def test_quickstart_looks_at_its_comparison_before_it_trains(tmp_path, capsys, monkeypatch):
    from ppow_hf.commands import quickstart
    from ppow_hf.tiny import corpus

    def train(*_):
        raise AssertionError("it trained")

    function = "def f():\n" + "".join(f"    x{number} = {number}\n" for number in range(9))
    monkeypatch.setattr(corpus, "standard_library", lambda: [corpus.SourceFile("some", function, held_out=True)])
    monkeypatch.setattr(quickstart, "_train", train)
    argv = ["quickstart", "--prompts", 1, "--output-dir", tmp_path, "--max-new-tokens", 5000]
    assert "--max-new-tokens: 5000 leaves no room for a prompt in a context of 1024" in fails(capsys, *argv)


def test_a_target_that_ends_every_text_at_once_leaves_nothing_to_draft(tmp_path, capsys):
    shutil.copytree(tiny.target_path(), tmp_path / "target")
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    target.generation_config.eos_token_id = list(range(target.config.vocab_size))
    target.generation_config.save_pretrained(tmp_path / "target")
    prompts = tmp_path / "p.txt"
    prompts.write_text("import os\nimport sys\n")
    pair = ["--target", tmp_path / "target", "--drafter", "tiny-eagle", "--prompts", prompts, "--max-new-tokens", 8]
    for command in (
        ["calibrate", *pair, "--fit-prompts", 1, "--num-prompts", 1, "--output-dir", tmp_path / "out"],
        ["windows", *pair, "--fit-prompts", 1, "--num-prompts", 1],
        ["measure", *pair, "--json", tmp_path / "a.json"],
    ):
        assert "--prompts: the target ends every text of " in fails(capsys, *command)


def test_a_target_without_its_tokenizer_is_refused(saved, make_target, tmp_path, capsys):
    make_target("llama").save_pretrained(tmp_path / "bare")
    argv = ["generate", "--target", tmp_path / "bare", "--drafter", saved / "eagle", "--prompt", "a"]
    assert "--target: no tokenizer could be loaded" in fails(capsys, *argv)


def test_a_drafter_of_another_vocabulary_is_refused(saved, tmp_path, capsys):
    drafter = PPOWDrafter.from_pretrained(saved / "eagle")
    drafter.config.target_vocabulary_fingerprint = "0123456789abcdef"
    drafter.save_pretrained(tmp_path / "other")
    argv = ["generate", "--target", saved / "target", "--drafter", tmp_path / "other", "--prompt", "a"]
    assert "--drafter: it was trained for a target with another vocabulary" in fails(capsys, *argv)


def test_unwritable_folders_are_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for command in ("quickstart", "tiny-target"):
        assert "--output-dir: cannot write to" in fails(capsys, command, "--output-dir", tmp_path / "file" / "below")
    assert ensure_writable(tmp_path / "a" / "b", "--output-dir").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_debugging_shows_the_error_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("PPOW_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["bench", "--target", "tiny", "--drafter", "tiny-eagle", "--prompts", str(tmp_path / "no.txt")])


def test_usage_mistakes_and_help_have_argparse_exit_codes(capsys):
    assert cli.main([]) == 2
    assert cli.main(["generate", "--prompt", "a"]) == 2
    assert cli.main(["--help"]) == 0
    assert "quickstart" in capsys.readouterr().out
    for command in ("quickstart", "tiny-target", "generate", "bench"):
        assert cli.main([command, "--help"]) == 0
        assert "usage: ppow" in capsys.readouterr().out


@pytest.mark.slow
def test_tiny_target_makes_a_target_of_the_family_and_goes_on(tmp_path):
    from ppow_hf.tiny import target_path

    argv = ["tiny-target", "--output-dir", tmp_path, "--family", "qwen3", "--tokenizer", target_path()]
    for steps in (1, 2):  # the second call goes on from the first one's checkpoint
        assert cli.main([*map(str, argv), "--max-steps", str(steps)]) == 0
        assert json.loads((tmp_path / "recipe.json").read_text())["steps"] == steps
    assert (tmp_path / "checkpoints" / "checkpoint-1").is_dir()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.model_type == "qwen3"


def test_train_makes_a_drafter_goes_on_with_it_and_resumes(saved, tmp_path, tokenizer):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(8)))
    common = ["train", "--target", saved / "target", "--train_data", data, "--eval_data", data, "--use_cpu"]
    common += ["--max_length", 24, "--per_device_train_batch_size", 2, "--report_to", "none", "--disable_tqdm", "true"]
    common += ["--eval_prompts", 1, "--eval_prompt_length", 8, "--eval_new_tokens", 4, "--max_window", 3]
    common += ["--save_steps", 2, "--logging_steps", 1]

    first = [*common, "--output_dir", tmp_path / "a", "--objective", "supervised", "--draft_vocab_size", 16]
    assert cli.main([*map(str, first), "--max_steps", "2"]) == 0
    drafter = PPOWDrafter.from_pretrained(tmp_path / "a")
    assert drafter.config.architecture == "eagle" and drafter.config.draft_vocab_size == 16
    counts = torch.bincount(torch.tensor(tokenizer(TEXT)["input_ids"]), minlength=64)
    assert counts[drafter.kept_tokens].min() >= counts[~drafter.t2d].max()
    assert drafter.config.target_vocabulary_fingerprint == vocabulary_fingerprint(tokenizer)

    written = (tmp_path / "a" / "checkpoint-2" / "complete.json").stat().st_mtime_ns
    assert cli.main([*map(str, first), "--max_steps", "4", "--resume"]) == 0
    state = json.loads((tmp_path / "a" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4 and (tmp_path / "a" / "training.png").is_file()
    assert (tmp_path / "a" / "checkpoint-2" / "complete.json").stat().st_mtime_ns == written, "it went on from it"

    second = [*common, "--output_dir", tmp_path / "b", "--objective", "ppow", "--drafter", tmp_path / "a"]
    second += ["--max_steps", 1, "--num_prefixes", 2, "--num_rollouts", 2]
    before = drafter.state_dict()
    assert cli.main(list(map(str, second))) == 0
    after = PPOWDrafter.from_pretrained(tmp_path / "b").state_dict()
    assert before.keys() == after.keys() and torch.equal(before["d2t"], after["d2t"])
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_train_names_missing_data(saved, tmp_path, capsys):
    argv = ["train", "--target", saved / "target", "--train_data", tmp_path / "no.jsonl", "--output_dir", tmp_path]
    assert "--train_data: there is no file" in fails(capsys, *argv, "--use_cpu")


def test_embedded_names_resolve_to_folders_that_are_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "_ROOT", tmp_path)
    assert all(map(tiny.is_embedded, ("tiny", "tiny-llama", "tiny-eagle", "tiny-standalone")))
    assert not tiny.is_embedded("eagle") and not tiny.is_embedded("org/tiny")
    for name, remake in (
        ("tiny", "ppow tiny-target --family llama"),
        ("tiny-eagle", "ppow tiny-drafter --architecture"),
    ):
        with pytest.raises(FileNotFoundError, match=rf"{name}: .*config.json is missing.*{remake}"):
            loading.resolve(name)
    for folder in ("llama", "eagle", "standalone"):
        (tmp_path / folder).mkdir()
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            (tmp_path / folder / file).write_text("")
    assert tiny.target_path() == tiny.target_path("tiny") == tmp_path / "llama"
    assert tiny.drafter_path("eagle") == tiny.drafter_path("tiny-eagle") == tmp_path / "eagle"
    assert loading.resolve("tiny-llama") == str(tmp_path / "llama")
    assert loading.resolve("org/model") == "org/model" and loading.resolve("~/x") == os.path.expanduser("~/x")
    for function, name in ((tiny.target_path, "tiny-eagle"), (tiny.drafter_path, "tiny")):
        with pytest.raises(ValueError, match="name: "):
            function(name)


@pytest.mark.slow
def test_what_quotes_the_embedded_drafters_is_made_again_by_one_command(tmp_path, monkeypatch, capsys):
    for folder in ("llama", "standalone"):
        shutil.copytree(tiny.target_path().parent / folder, tmp_path / "tiny" / folder)
    monkeypatch.setattr(tiny, "_ROOT", tmp_path / "tiny")
    cards, folder = tmp_path / "cards", tmp_path / "tiny" / "standalone"
    arguments = ["tiny-results", "tiny-standalone", "--output-dir", str(cards), "--num-prompts", "1"]
    assert cli.main([*arguments, "--bench-prompts", "2"]) == 0
    acceptance, benchmark = (json.loads((folder / f"{name}.json").read_text()) for name in ("acceptance", "benchmark"))
    assert {row["prompts"] for row in acceptance["rows"]} == {1} and acceptance["half_precision"]["prompts"] == 1
    assert benchmark["command"].startswith("ppow bench --target tiny --drafter tiny-standalone")
    assert str(tmp_path) not in (folder / "acceptance.json").read_text() + (folder / "benchmark.json").read_text()
    card = (cards / "tiny-standalone.md").read_text()
    assert card == (folder / "README.md").read_text()
    row = next(row for row in benchmark["rows"] if row["name"] == "ppow_kl_lookup")
    assert f"| ppow_kl_lookup | {row['tokens_per_second']:.1f} |" in card
    assert "NAME: ['tiny-mamba'] are no embedded drafters" in fails(capsys, "tiny-results", "tiny-mamba")


def test_asking_for_help_imports_nothing_heavy():
    """Beyond what `import ppow_hf` imports, only the standard library and light modules of our own."""
    program = """
import sys
import ppow_hf
before = set(sys.modules)
from ppow_hf import cli
assert cli.main(["--help"]) == 0
assert cli.main(["bench", "--help"]) == 0
imported = {name for name in set(sys.modules) - before if name.split(".")[0] not in sys.stdlib_module_names}
heavy = {name for name in imported if not name.startswith("ppow_hf.")}
heavy |= {name for name in imported if name.startswith(("ppow_hf.measure", "ppow_hf.training", "ppow_hf.studies"))}
assert not heavy, sorted(heavy)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_prompts_are_asked_as_turns_of_a_chat(tmp_path):
    from transformers import AutoTokenizer

    from ppow_hf.data.models import load_prompts, load_target

    target, tokenizer = load_target("tiny"), AutoTokenizer.from_pretrained(tiny.target_path())
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<answer>"
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "def f"}\n{"question": "class A"}\n')
    prompts = load_prompts(f"{path}:question", 2, tokenizer, target, 8, chat=True)
    assert [tokenizer.decode(ids[0]) for ids in prompts] == ["<user>def f\n<answer>", "<user>class A\n<answer>"]
