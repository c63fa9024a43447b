"""The embedded pair: its corpus, its recipe, its weights, and the quickstart that uses them."""

import dataclasses
import json
import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppow_hf import PPOWDrafter
from ppow_hf.cli import main
from ppow_hf.measure.evaluation import decode
from ppow_hf.runtime.trees import TreeRule
from ppow_hf.tiny import drafter_path, drafters, target_path
from ppow_hf.tiny.corpus import SourceFile, excerpts, function_prompts, is_held_out, standard_library
from ppow_hf.tiny.drafters import default_stages, make_drafter
from ppow_hf.tiny.recipe import (
    QWEN3_RECIPE,
    StepBatches,
    TargetRecipe,
    bits_per_byte,
    build_target,
    make_target,
    recipe_of,
    token_stream,
)
from ppow_hf.training import PPOWTrainingArguments


@pytest.fixture(scope="module")
def files():
    return standard_library()


@pytest.fixture(scope="module")
def pair():
    target = AutoModelForCausalLM.from_pretrained(target_path(), dtype=torch.float32).eval()
    return target, AutoTokenizer.from_pretrained(target_path())


def test_excerpts_are_those_of_files_that_are_all_encoded(files, pair):
    tokenizer, length = pair[1], 64
    short = [SourceFile(f"short.{n}", "x = 1\n" * n, True) for n in range(1, 40)]
    some = [file for file in files if file.held_out][:30] + short
    ids = [tokenizer(file.text, add_special_tokens=False)["input_ids"] for file in some]
    long_enough = [tokens for tokens in ids if len(tokens) > length]
    assert 30 < len(long_enough) < len(some)
    chooser, expected = random.Random(5), []
    for _ in range(40):
        tokens = chooser.choice(long_enough)
        start = chooser.randrange(len(tokens) - length)
        expected.append({"text": tokenizer.decode(tokens[start : start + length])})
    assert excerpts(some, tokenizer, 40, length, 5) == expected


def held_out_prompts(files, tokenizer, count):
    texts = function_prompts([file for file in files if file.held_out], count)
    return [tokenizer(t, return_tensors="pt", add_special_tokens=False)["input_ids"][:, -96:].long() for t in texts]


def test_about_a_tenth_of_the_modules_is_held_out_with_their_tests(files):
    share = sum(file.held_out for file in files) / len(files)
    assert 0.05 < share < 0.15
    for name in ("textwrap", "json.decoder", "collections.__init__"):
        assert is_held_out(name) == is_held_out("test.test_" + name.removesuffix(".__init__").split(".")[-1])


def test_a_prompt_ends_where_a_function_body_begins(files):
    prompts = function_prompts([file for file in files if file.held_out], 10)
    assert len(set(prompts)) == 10
    assert all("def " in prompt and prompt.endswith("\n") for prompt in prompts)
    assert prompts == function_prompts([file for file in files if file.held_out], 10)


def test_step_batches_are_a_function_of_the_step_alone_and_cover_every_chunk():
    recipe = TargetRecipe(max_steps=8, tokens_per_step=2048, long_share=0.25)
    stream = torch.arange(16 * 1024, dtype=torch.int32)
    batches = StepBatches(stream, recipe)
    assert batches[0]["input_ids"].shape == (8, 256) and batches[7]["input_ids"].shape == (2, 1024)
    assert torch.equal(batches[3]["input_ids"], StepBatches(stream, recipe)[3]["input_ids"])
    seen = torch.cat([batches[step]["input_ids"].flatten() for step in range(8)])
    assert torch.equal(seen.sort().values, stream.long())


def test_the_embedded_target_is_of_the_promised_shape_and_better_than_chance(pair, files):
    target, tokenizer = pair
    config = target.config
    assert config.num_hidden_layers >= 12 and config.hidden_size >= 256 and config.head_dim in (32, 64)
    assert config.max_position_embeddings == 1024 and len(tokenizer) == 4096
    assert (target_path() / "model.safetensors").stat().st_size <= 24e6
    text = next(file.text for file in files if file.held_out and len(file.text) > 20_000)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    rows = token_stream([file for file in files if file.held_out][:12], tokenizer)[: 2 * 1024].view(2, 1024).long()
    with torch.no_grad():
        loss = target(input_ids=rows, labels=rows).loss.item()
    assert loss < 0.6 * math.log(4096)


@pytest.mark.parametrize("architecture", ["eagle", "standalone", "medusa"])
def test_a_drafter_changes_no_token_of_a_target_of_another_family(architecture, qwen3_pair):
    target, tokenizer = qwen3_pair
    drafter = PPOWDrafter.from_target(target, architecture).eval()
    ids = tokenizer("def read_lines(path):\n", return_tensors="pt")["input_ids"]
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "do_sample": False}
    assert torch.equal(target.generate(ids, assistant_model=drafter, **settings), target.generate(ids, **settings))


@pytest.mark.slow
def test_reported_bits_per_byte_are_those_of_the_shipped_weights(pair, files):
    target, tokenizer = pair
    report = json.loads((target_path() / "recipe.json").read_text())
    measured = bits_per_byte(target, tokenizer, [file for file in files if file.held_out], max_chunks=16)
    assert measured == pytest.approx(report["held_out_bits_per_byte"], rel=0.15)  # 16 of its 200 rows


@pytest.mark.parametrize("name", ["tiny-eagle", "tiny-standalone"])
def test_embedded_drafters_change_no_token_and_save_forwards(name, pair, files):
    check_identity(name, pair, held_out_prompts(files, pair[1], 8), 32)


@pytest.mark.parametrize("name", ["tiny-eagle", "tiny-standalone"])
def test_embedded_drafters_say_that_they_are_stored_in_bfloat16(name):
    assert PPOWDrafter.from_pretrained(drafter_path(name), dtype="auto").dtype == torch.bfloat16
    assert PPOWDrafter.from_pretrained(drafter_path(name), dtype="float32").dtype == torch.float32


@pytest.mark.slow
def test_trees_of_a_fixed_budget_grow_by_estimated_acceptance(pair, files, monkeypatch):
    """EAGLE-2's product of probabilities, which a drafter of the target's distribution at T = 1 has too small."""
    target, tokenizer = pair
    drafter = PPOWDrafter.from_pretrained(drafter_path("tiny-eagle"), dtype=torch.float32).eval()
    rows = excerpts([file for file in files if file.held_out], tokenizer, 24, 64, seed=1)
    prompts = [tokenizer(row["text"])["input_ids"] for row in rows]

    def rounds(**settings) -> int:
        _, traces = decode(target, drafter, prompts, 64, batch_size=8, window="fixed", max_window=10, **settings)
        return sum(len(trace.rounds) - 1 for trace in traces)

    chain, tree = rounds(), rounds(tree_nodes=32)
    drafter.config.calibration = None  # what the text itself shows is enough
    uncalibrated = rounds(tree_nodes=32)
    monkeypatch.setattr(TreeRule, "child_worth", lambda self, probabilities, features: list(probabilities))
    by_probability = rounds(tree_nodes=32)
    assert tree < 0.95 * by_probability and uncalibrated < by_probability and tree < chain


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-eagle", "tiny-standalone"])
def test_embedded_drafters_change_no_token_on_200_prompts(name, pair, files):
    check_identity(name, pair, held_out_prompts(files, pair[1], 200), 64)


def check_identity(name, pair, prompts, max_new_tokens):
    target, _ = pair
    drafter = PPOWDrafter.from_pretrained(drafter_path(name), dtype=torch.float32).eval()
    rounds = tokens = 0
    for ids in prompts:
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": max_new_tokens, "do_sample": False}
        plain = target.generate(ids, **settings)
        assert torch.equal(target.generate(ids, assistant_model=drafter, **settings), plain)
        rounds += len(drafter.last_trace.rounds)
        tokens += plain.shape[1] - ids.shape[1]
    assert tokens / rounds > 1.2


def test_a_target_is_made_and_resumed_from_its_last_checkpoint(tmp_path, pair, monkeypatch):
    recipe = TargetRecipe(
        hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2, num_key_value_heads=1, head_dim=16,
        max_steps=50, tokens_per_step=1024, warmup_steps=2,
    )  # fmt: skip
    monkeypatch.setattr("ppow_hf.tiny.recipe.standard_library", lambda: standard_library()[:60])
    make_target(tmp_path, recipe, tokenizer=pair[1])
    first = json.loads((tmp_path / "recipe.json").read_text())
    assert first["steps"] == 50 and (tmp_path / "loss.png").stat().st_size > 1000
    recipe.max_steps = 60
    make_target(tmp_path, recipe, tokenizer=pair[1])
    log = json.loads((tmp_path / "training_log.json").read_text())
    assert log[-1]["step"] == 60 and min(row["step"] for row in log) == 10
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.use_cache


def test_a_target_of_other_texts_is_made_by_the_command(tmp_path, capsys):
    rows = [
        {"question": f"How much is {i} and {i + 1}?", "answer": f"{i}+{i + 1}={2 * i + 1}\n" * 4} for i in range(400)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "target"
    argv = ["tiny-target", "--layers", "1", "--max-steps", "2", "--output-dir", str(folder), "--texts"]
    assert main([*argv, f"{tmp_path}/sums.jsonl:question,reply"]) == 2
    assert "row 0 has no text in 'reply'" in capsys.readouterr().err
    assert main([*argv, f"{tmp_path}/sums.jsonl:question,answer"]) == 0
    report = json.loads((folder / "recipe.json").read_text())
    assert report["corpus"] == "texts" and report["recipe"]["num_layers"] == 1 and report["steps"] == 2
    card = (folder / "README.md").read_text()
    assert "How much is" in card and "Python" not in card and "--texts FILE --layers 1" in card
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 1


def test_a_drafter_is_made_in_stages_and_gone_on_with(tmp_path, monkeypatch, files, qwen3_pair):
    """With the real trainer, on a small target and a part of the corpus, for seconds: what is written, and where a
    second run begins."""
    monkeypatch.setattr(drafters, "standard_library", lambda: files[::20])
    assert {file.held_out for file in files[::20]} == {True, False}
    target, tokenizer = qwen3_pair
    small: dict = {"seconds": 3.0, "sequences": 8, "eval_prompts": 1, "eval_new_tokens": 8, "target_name": None}
    small["calibrate_at_end"] = False
    make_drafter(tmp_path / "new", "standalone", target, tokenizer, **small)
    log = json.loads((tmp_path / "new" / "training_log.json").read_text())
    assert list(dict.fromkeys(row["objective"] for row in log)) == ["supervised", "ppow"]
    assert [row["step"] for row in log] == sorted(row["step"] for row in log)
    assert {"supervised", "README.md", "provenance.json", "training.png", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "new").iterdir()
    }
    make_drafter(tmp_path / "again", "standalone", target, tokenizer, seed=1, start=tmp_path / "new", **small)
    supervised = [row for row in log if row["objective"] == "supervised"]
    longer = json.loads((tmp_path / "again" / "training_log.json").read_text())
    assert longer[: len(supervised)] == supervised
    # Begun where the supervised stage ended: its first evaluation is that of the same drafter, stored in bfloat16.
    first, last = longer[len(supervised)], [row for row in supervised if "eval_acceptance_length" in row][-1]
    assert first["step"] == supervised[-1]["step"]
    assert first["eval_kl"] == pytest.approx(last["eval_kl"], rel=0.02)


def test_an_eagle_drafter_reads_sampled_texts_too(tmp_path, monkeypatch, files, qwen3_pair):
    """Every other text differs from what the target writes at T = 0, in the data and in what is said of it."""
    monkeypatch.setattr(drafters, "standard_library", lambda: files[::20])
    target, tokenizer = qwen3_pair
    train = [file for file in files[::20] if not file.held_out]
    greedy, mixed = (
        drafters.target_text(target, tokenizer, train, 8, 0, temperature=drafters.text_temperatures(architecture))
        for architecture in ("standalone", "eagle")
    )
    texts = [{tuple(data[i]["input_ids"].tolist()) for i in range(len(data))} for data in (greedy, mixed)]
    assert [len(these) for these in texts] == [8, 8] and len(texts[0] & texts[1]) == 4
    small: dict = {"seconds": 2.0, "sequences": 8, "eval_prompts": 1, "eval_new_tokens": 8, "calibrate_at_end": False}
    make_drafter(tmp_path, "eagle", target, tokenizer, target_name=None, **small)
    assert json.loads((tmp_path / "provenance.json").read_text())["text_temperatures"] == [0.0, 1.0]
    log = json.loads((tmp_path / "training_log.json").read_text())
    assert {row["objective"] for row in log} == {"supervised; 0.7: tv + 0.3*kl"}


def test_an_eagle_drafter_is_trained_with_the_trainers_defaults_and_others_in_two_stages():
    (stage,) = default_stages(100.0, "eagle", decay=0.75)
    defaults = PPOWTrainingArguments(output_dir="unused", use_cpu=True, report_to=[])
    assert (stage.objective, stage.learning_rate) == (defaults.objective, defaults.learning_rate)
    assert stage.settings == {} and stage.kind == "supervised"
    assert stage.decay == pytest.approx(0.7 + 0.3 * 0.75)  # the rate falls for three quarters of the last phase
    assert defaults.muon == 2.0 and defaults.regenerate_temperature == drafters.text_temperatures("eagle")
    others = default_stages(100.0, "standalone")
    assert [s.objective for s in others] == ["supervised", "ppow"]
    assert [s.objective for s in default_stages(100.0, "standalone", started=True)] == ["supervised"]
    assert all(sum(s.seconds for s in stages) == pytest.approx(100) for stages in ([stage], others))


def test_quickstart_fast_writes_what_it_promises(tmp_path, capsys):
    argv = ["quickstart", "--fast", "--output-dir", str(tmp_path), "--prompts", "2", "--max-new-tokens", "12"]
    assert main(argv) == 0
    result = json.loads((tmp_path / "benchmark.json").read_text())
    assert result["command"].startswith("ppow quickstart --fast") and result["prompts"] == 2
    names = [row["name"] for row in result["rows"]]
    assert {"plain", "prompt_lookup_10", "ppow_fixed_8", "ppow_kl"} <= set(names)
    assert any(name.startswith("transformers_assisted_") for name in names)
    assert all(row["identical_to_plain"] for row in result["rows"])
    assert (tmp_path / "windows.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "PPOWDrafter.from_pretrained" in printed and "ppow_kl" in printed


def test_recipe_of_a_family():
    assert recipe_of("llama") == TargetRecipe() and recipe_of("qwen3") == QWEN3_RECIPE
    assert recipe_of("qwen3", max_steps=7, num_layers=None) == dataclasses.replace(QWEN3_RECIPE, max_steps=7)
    assert recipe_of("llama", hidden_size=256) == TargetRecipe()
    with torch.device("meta"):
        wide = build_target(recipe_of("llama", hidden_size=768, num_layers=14), 0, 1)
    assert 95e6 < sum(parameter.numel() for parameter in wide.parameters()) < 110e6
    assert wide.config.num_attention_heads == 12 and wide.config.intermediate_size == 3 * 768
    for size in (0, 100, 192):
        with pytest.raises(ValueError, match=f"hidden_size: {size} given; it must be a multiple of 128"):
            recipe_of("llama", hidden_size=size)
