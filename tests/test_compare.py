"""The comparison of recipes: what it measures against real decoding, and that it runs, resumes and reports."""

import json
import math
import shutil
import time

import numpy
import pytest
import torch
from acceptance_references import greedy_accepted_group
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ppow_hf import PPOWDrafter, cli
from ppow_hf.data.sequences import SequenceDataset
from ppow_hf.measure.draft_table import draft_table
from ppow_hf.measure.evaluation import decode
from ppow_hf.measure.provenance import shortened
from ppow_hf.studies import compare
from ppow_hf.studies.compare import Comparison, curve_of, make_trainer, plateau_gain
from ppow_hf.studies.configuration import load_config, read_results, target_recipe
from ppow_hf.studies.evaluation import (
    EvaluationTexts,
    SampledText,
    _group_uniforms,
    evaluate_drafter,
    group_chains,
    quotient,
    sampled_chains,
    target_entropy,
    write_texts,
)
from ppow_hf.studies.report import Report, paired_gain, value, values_of
from ppow_hf.studies.texts import training_text
from ppow_hf.tiny.recipe import build_target
from ppow_hf.training import PPOWTrainingArguments
from ppow_hf.training.budget import Budget
from ppow_hf.training.recording import Recording
from ppow_hf.training.target import FrozenTarget

TEXT = "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n"
PROMPTS = [[5, 9, 2, 33], [1, 2, 3, 4, 5, 6], [40, 41], [60, 7, 7]]


def noisy_copy(target, noise: float = 0.05) -> PPOWDrafter:
    """A standalone drafter that is the target itself, disturbed: some of its drafts are kept."""
    drafter = PPOWDrafter.from_target(target, "standalone", num_hidden_layers=target.config.num_hidden_layers)
    drafter.draft_model.model.load_state_dict(target.state_dict())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(noise * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return drafter.eval()


@pytest.fixture(scope="module")
def target(make_target):
    return make_target("llama", initializer_range=0.3)


@pytest.fixture(scope="module")
def texts(target):
    return write_texts(target, PROMPTS, 26, seed=0)


# What is measured


def test_the_texts_are_the_targets_own(target, texts):
    for prompt, text, sampled in zip(PROMPTS, texts.greedy, texts.sampled, strict=True):
        ids = torch.tensor([prompt])
        plain = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=26, do_sample=False)
        assert text == plain[0, len(prompt) :].tolist()
        assert sampled.ids[: sampled.start] == prompt and len(sampled.ids) == len(sampled.uniforms) == len(prompt) + 26


def test_the_targets_entropy_is_that_of_its_sampled_texts(target, texts):
    entropies = []
    for text in texts.sampled:
        for place in range(text.start, len(text.ids)):
            p = target(torch.tensor([text.ids[:place]])).logits[0, -1].softmax(-1)
            entropies.append(-sum(x * numpy.log(x) for x in p.tolist() if x > 0))
    assert target_entropy(target, texts) == pytest.approx(numpy.mean(entropies), rel=1e-4)


@pytest.mark.parametrize("kind", ["copy", "eagle", "medusa"])
def test_greedy_chains_are_those_of_real_decoding(target, texts, kind):
    torch.manual_seed(0)
    drafter = noisy_copy(target, 0.03) if kind == "copy" else PPOWDrafter.from_target(target, kind).eval()
    found = evaluate_drafter(target, drafter, texts, groups=(), cost_ratios=())
    for window in (5, 10):
        _, traces = decode(target, drafter, PROMPTS, 26, window="fixed", max_window=window)
        for pair, trace in zip(found["per_prompt"][f"chain_t0_k{window}"], traces, strict=True):
            whole = [r for r in trace.rounds if r.window == window]
            assert pair == (sum(r.accepted + 1 for r in whole), len(whole)) and whole
    if kind == "copy":
        assert 1.5 < found["metrics"]["chain_t0_k10"] < 10
        assert found["position_acceptance"] == sorted(found["position_acceptance"], reverse=True)


def test_expected_speed_is_that_of_real_decoding_with_the_adaptive_window(target, texts):
    drafter = noisy_copy(target, 0.03)
    fit = evaluate_drafter(target, drafter, texts, groups=(), cost_ratios=())["fit"]
    drafter.config.calibration = {"greedy": fit}
    found = evaluate_drafter(target, drafter, texts, groups=(), cost_ratios=(0.3,), calibration=fit)
    _, traces = decode(target, drafter, PROMPTS, 26, window="kl", max_window=10, cost_ratio=0.3, verification_cost=0.0)
    for pair, trace in zip(found["per_prompt"]["speed_t0_0.3"], traces, strict=True):
        cost = sum(1 + 0.3 * r.draft_steps for r in trace.rounds[1:])
        assert pair == pytest.approx((sum(r.accepted + 1 for r in trace.rounds[1:]), cost))


def test_candidate_groups_are_those_verified_by_the_target_in_one_packed_pass(target, texts):
    drafter, window, seed = noisy_copy(target, 0.3), 4, 3
    tables = [
        draft_table(target, drafter, torch.tensor([prompt]), text, 26, depth=window)
        for prompt, text in zip(PROMPTS, texts.greedy, strict=True)
    ]
    longest = max(len(prompt) + 26 for prompt in PROMPTS)
    for count in (1, 3):
        found = group_chains(target, drafter, tables, count, window, seed)
        for number, (prompt, text) in enumerate(zip(PROMPTS, texts.greedy, strict=True)):
            ids, frozen = torch.tensor([prompt + text]), FrozenTarget(target, None)
            encoding = frozen.encode(ids, torch.ones_like(ids), with_cache=True)
            uniforms = _group_uniforms(seed, number, longest, count - 1, window)
            place, kept, rounds = len(prompt), 0, 0
            while place + window + 1 < ids.shape[1]:
                candidates = []
                for c in range(count):  # the last is the greedy one
                    session, drafted = drafter.start_session(), []
                    session.observe(ids[:, : place + 1], None, 0)
                    logits = session.first_logits()
                    for j in range(window):
                        cumulative = logits[0].double().softmax(-1).cumsum(0)
                        token = int(logits[0].argmax())
                        if c < count - 1:
                            token = int((cumulative > uniforms[place, c, j] * cumulative[-1]).nonzero()[0])
                        drafted.append(token)
                        logits = session.next_logits(torch.tensor([[token]]), j)
                    candidates.append(drafted)
                draft_ids = torch.tensor([candidates])
                sources = frozen.verify(encoding, torch.full((1, count), place), draft_ids)
                best = int(greedy_accepted_group(draft_ids, frozen.logits(sources).argmax(-1))[0])
                kept, rounds, place = kept + best + 1, rounds + 1, place + best + 1
            assert found[number] == (kept, rounds)
    many = quotient(group_chains(target, drafter, tables, 8, window, seed))
    assert many > quotient(group_chains(target, drafter, tables, 1, window, seed))


def test_sampled_chains_have_the_law_of_real_speculative_sampling(small_vocab_target):
    """Rounds of four tokens at T = 1: replayed on the target's own texts against decoded, many of each."""
    drafter = noisy_copy(small_vocab_target, 0.5)
    prompts = [[i % 6, (2 * i) % 6, (i // 6) % 6] for i in range(60)]
    texts = write_texts(small_vocab_target, prompts, 22, seed=0)
    found = sampled_chains(small_vocab_target, drafter, texts.sampled, 4)
    assert {name: len(pairs) for name, pairs in found.items()} == dict.fromkeys(found, len(texts.sampled))
    replayed = numpy.asarray(found["chain_t1_k4"])
    _, traces = decode(small_vocab_target, drafter, prompts, 22, 1.0, seed=1, window="fixed", max_window=4)
    # The stock loop ends a draft early nowhere here: no stopping token, and room for whole windows.
    decoded = [[r for r in trace.rounds if r.window == 4] for trace in traces]
    decoded = numpy.asarray([(sum(r.accepted + 1 for r in rounds), len(rounds)) for rounds in decoded])
    means = [pairs[:, 0].sum() / pairs[:, 1].sum() for pairs in (replayed, decoded)]
    errors = [(pairs[:, 0] - m * pairs[:, 1]).std() * len(pairs) ** 0.5 / pairs[:, 1].sum()
              for pairs, m in zip((replayed, decoded), means, strict=True)]  # fmt: skip
    assert abs(means[0] - means[1]) < 4 * sum(e**2 for e in errors) ** 0.5 < 0.6
    assert 1.5 < means[1] < 4.5


def test_texts_that_ended_at_once_count_nothing(target, texts):
    drafter = noisy_copy(target, 0.03)
    ended = EvaluationTexts(
        [*texts.prompts, texts.prompts[0]],
        [*texts.greedy, texts.greedy[0][:1]],
        [*texts.sampled, SampledText(texts.sampled[0].ids[: texts.sampled[0].start + 1], texts.sampled[0].start, [])],
        texts.max_new_tokens,
    )
    options = {"groups": (4,), "cost_ratios": (0.1,), "tree_nodes": (4,)}
    expected, found = (evaluate_drafter(target, drafter, these, **options) for these in (texts, ended))
    for name, pairs in found["per_prompt"].items():
        if not name.startswith("tree"):  # whose decoding does not know that the text is meant to end there
            assert pairs[:-1] == expected["per_prompt"][name] and pairs[-1][1] == 0, name


def test_a_perfect_drafter_has_every_token_kept(target, texts):
    drafter = noisy_copy(target, 0.0)
    found = evaluate_drafter(target, drafter, texts, groups=(4,), cost_ratios=(0.1,))["metrics"]
    for name in ("chain_t0_k10", "chain_t1_k10", "group_t0_c4"):
        assert found[name] == 11
    assert found["chain_t0_k5"] == found["chain_t1_k5"] == 6 and found["kl"] < 1e-4
    assert found["greedy_t1_k10"] < 11


# Kept encodings


def test_kept_encodings_are_the_targets_and_are_charged_as_if_it_had_read_them(target):
    frozen, plain = FrozenTarget(target, [1, 2, 3]), FrozenTarget(target, [1, 2, 3])
    frozen.keep_encodings(2**20)
    ids = torch.randint(1, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < torch.tensor([[12], [7], [9]])).long()
    forwards = []
    handle = target.register_forward_hook(lambda *_: forwards.append(1))
    for order in ([0, 1, 2], [2, 0, 1], [1]):
        length = int(mask[order].sum(1).max())
        part = ids[order][:, :length], mask[order][:, :length]
        found = frozen.encode(*part, with_cache=False)
        count = len(forwards)
        expected = plain.encode(*part, with_cache=False)
        assert len(forwards) == count + 1
        real = part[1].bool()
        torch.testing.assert_close(found.sources[real], expected.sources[real])
        torch.testing.assert_close(found.states[real], expected.states[real])
        assert frozen.forward_tokens == plain.forward_tokens
    handle.remove()
    assert len(forwards) == 4  # three of the plain one, one of the other
    small = FrozenTarget(target, None)
    small.keep_encodings(100)  # room for nothing
    for _ in range(2):
        small.encode(ids, mask, with_cache=False)
    assert small.forward_tokens == 2 * int(mask.sum())


# The comparison


@pytest.fixture(scope="module")
def cell(tmp_path_factory, make_target):
    """A saved random target with a tokenizer, a file of prompts and a small configuration."""
    folder = tmp_path_factory.mktemp("cell")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=64, special_tokens=["<pad>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer=trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    make_target("llama", initializer_range=0.3).save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    rows = [{"prompt": TEXT[start : start + 9]} for start in range(40)]
    for name, part in (("train.jsonl", rows[:20]), ("evaluation.jsonl", rows[20:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    config = {
        "target": str(folder / "target"),
        "architecture": "eagle",
        "workload": {"name": "snippets", "train": str(folder / "train.jsonl"),
                     "evaluation": str(folder / "evaluation.jsonl")},
        "data": {"train_sequences": 12, "prompt_tokens": 8, "completion_tokens": 24, "validation_prompts": 3,
                 "test_prompts": 4},
        "start": {"seconds": 0.8, "learning_rate": 1e-2},
        "budgets": {"tokens": 1500, "seconds": 0.2},
        "seeds": [0, 1],
        "learning_rates": [1e-3, 1e-2],
        "training": {"per_device_train_batch_size": 4, "num_prefixes": 2, "num_rollouts": 2, "unroll_steps": 2},
        "drafter_config": {"max_window": 10},
        "groups": [2, 3],
        "tree_nodes": [4],
        "slow_prompts": 3,
        "cost_ratios": [0.12],
        "curve_points": 2,
        "curve_prompts": 2,
        "baselines": ["cst", "lk"],
        "recipes": {"cst": {"objective": "supervised"}, "lk": {"objective": "lk", "learning_rates": [1e-3],
                                                              "regenerate_temperature": [0.0, 1.0]},
                    "ppow": {"objective": "ppow", "later": {"from": 0.5, "num_prefixes": 1}}},
    }  # fmt: skip
    (folder / "compare.yaml").write_text(json.dumps(config))  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def compared(cell, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    argv = ["compare", "--config", cell / "compare.yaml", "--output-dir", folder, "--device", "cpu"]
    assert cli.main(list(map(str, argv))) == 0
    return folder


def read(folder):
    """The whole lines; one that an interruption cut off may stand among them."""
    return read_results(folder / "results.jsonl")


def test_a_comparison_trains_chooses_and_tests_every_recipe(compared):
    lines = read(compared)
    keys = ["recipe", "seed", "target", "architecture", "workload", "budget", "learning_rate", "split", "metrics",
            "per_prompt", "provenance"]  # fmt: skip
    assert all(set(keys) <= set(line) for line in lines)
    names = [(x["recipe"], (x["budget"] or {}).get("kind"), x["seed"], x["learning_rate"], x["split"]) for x in lines]
    assert len(names) == len(set(names))
    validation = [name for name in names if name[-1] == "validation"]
    for kind in ("tokens", "seconds"):
        for recipe, rates in (("cst", 2), ("lk", 1), ("ppow", 2)):
            own = [name for name in validation if name[:2] == (recipe, kind)]
            assert sum(name[2] == 0 for name in own) == rates and sum(name[2] == 1 for name in own) == 1
            tested = [name for name in names if name[:2] == (recipe, kind) and name[-1] == "test"]
            assert sorted(name[2] for name in tested) == [0, 1] and len({name[3] for name in tested}) == 1
            scores = {x["learning_rate"]: x["metrics"]["chain_t0_k10"] for x in lines
                      if x["recipe"] == recipe and x["budget"]["kind"] == kind and x["seed"] == 0
                      and x["split"] == "validation"}  # fmt: skip
            assert scores[tested[0][3]] == max(scores.values())
    # The test split is read when nothing is left to choose.
    splits = [line["split"] for line in lines]
    assert splits == sorted(splits, reverse=True)
    for line in lines:
        own, tested = line["per_prompt"], line["split"] == "test"
        assert len(own["chain_t0_k10"]) == len(line["loops"]) == (4 if tested else 3) and len(own["group_t0_c3"]) == 3
        assert ("group_t0_c2" in own) == ("speed_t0_0.12" in own) == ("tree_t1_n4" in own) == tested and (
            not tested or len(own["tree_t0_n4"]) == 3
        )


def test_a_recipe_may_have_text_of_its_own_temperatures(compared):
    written = [json.loads(path.read_text()) for path in (compared / "data").glob("*.json")]
    facts = sorted((data["settings"]["temperature"], data["sequences"]) for data in written)
    assert facts == [(0.0, 6), (0.0, 12), (1.0, 6)]
    of_lk = [line for line in read(compared) if line["recipe"] == "lk" and "training" in line]
    assert of_lk and all(x["training"]["settings"]["regenerate_temperature"] == [0.0, 1.0] for x in of_lk)


def test_what_comes_later_in_a_recipe_comes_when_its_share_is_spent(target, tmp_path):
    seen = []

    def note():
        seen.append(trainer.args.unroll_steps)
        return {}

    budget = Budget("tokens", 4 * 2 * 16, points=4, at_points=note)
    settings = {"objective": "supervised", "unroll_steps": 1, "per_device_train_batch_size": 2,
                "later": {"from": 0.5, "unroll_steps": 2}}  # fmt: skip
    drafter = PPOWDrafter.from_target(target, "eagle")
    data = SequenceDataset([list(range(1, 17))] * 8, [[True] * 16] * 8)
    trainer = make_trainer(drafter, target, data, settings, budget, 1e-3, 0, tmp_path, 16)
    trainer.train()
    assert seen == [1, 1, 2, 2] and trainer.args.unroll_steps == 2
    with pytest.raises(ValueError, match="unroll_steps: 0 given"):
        make_trainer(drafter, target, data, {**settings, "later": {"from": 0.5, "unroll_steps": 0}}, budget, 1e-3, 0,
              tmp_path, 16, 0)  # fmt: skip


def test_every_recipe_gets_the_same_budget_and_its_curve(compared):
    largest_step = 4 * 32 + 4 * 2 * 2 * 10 + 4 * 2 * 9  # sequences, windows, greedy windows
    for line in read(compared):
        if "training" not in line:
            continue
        training = line["training"]
        if line["budget"]["kind"] == "tokens":
            assert 1500 <= training["target_forward_tokens"] < 1500 + largest_step
            assert [point[0] >= share * 1500 for share, point in zip((0.5, 1.0), training["curve"], strict=True)] == [
                True, True
            ]  # fmt: skip
        else:
            assert training["seconds"] >= 0.2
        assert training["steps"] >= 1 and len(training["curve"]) == 2


def test_the_report_says_what_the_lines_say(compared):
    report = Report(compared)
    section = (compared / "report.md").read_text()
    lines = [x for x in read(compared) if x["split"] == "test" and x["recipe"] == "ppow"
             and x["budget"]["kind"] == "tokens"]  # fmt: skip
    pairs = [pair for line in lines for pair in line["per_prompt"]["chain_t0_k10"]]
    expected = sum(pair[0] for pair in pairs) / sum(pair[1] for pair in pairs)
    row = next(row for row in report.table("tokens", ["chain_t0_k10"]).splitlines() if row.startswith("| ppow"))
    assert f"| 2 | {expected:.3f} (" in row and row in section.replace(" |\n", " |\n") or row.split(" (")[0] in section
    for line in report.begin + [x for x in report.lines if x["split"] == "test"]:
        line["loops"] = [1.0] * 4  # all of them loop: then there is nothing to say without them
    assert set(report.table("tokens", ["group_t0_c3"], True).split("\n")[-1].split(" | ")[3:]) == {"no such text |"}
    kept = numpy.mean([line["position_acceptance"] for line in lines], axis=0)
    row = next(row for row in report.positions_table("tokens").splitlines() if row.startswith("| ppow"))
    assert row in section and row.split(" | ")[1:] == [f"{share:.3f}" for share in kept[:-1]] + [f"{kept[-1]:.3f} |"]
    assert report.paper_tables("tokens") == []  # none of its recipes was among them
    assert "wanted +10%" in section and "Equal seconds: 0.2" in section and str(compared) not in section
    for name in ("config.json", "results.jsonl"):
        assert str(compared.parent) not in (compared / name).read_text()
    for name in ("start.png", "curves-tokens.png", "curves-seconds.png", "rewards-tokens.png"):
        assert (compared / name).read_bytes()[:4] == b"\x89PNG"


def test_tables_are_of_the_rate_that_validation_chose_where_another_was_tested_too(compared, tmp_path):
    folder = shutil.copytree(compared, tmp_path / "extended")
    report = Report(folder)
    table, chosen = report.table("tokens", report.headline()), report.runs("tokens")["cst"]
    other = ({1e-3, 1e-2} - {chosen[0]["learning_rate"]}).pop()
    with open(folder / "results.jsonl", "a") as file:
        file.writelines(json.dumps(line | {"learning_rate": other}) + "\n" for line in chosen)
    assert Report(folder).table("tokens", report.headline()) == table


def test_an_interrupted_comparison_goes_on_where_it_stopped(compared, cell, capsys):
    results = compared / "results.jsonl"
    before = results.read_text()
    kept = before.splitlines(keepends=True)
    results.write_text("".join(kept[:-2]) + kept[-2][:40])  # killed while it wrote
    argv = ["compare", "--config", cell / "compare.yaml", "--output-dir", compared, "--device", "cpu"]
    assert cli.main(list(map(str, argv))) == 0
    again = [line for line in results.read_text().splitlines(keepends=True) if line != kept[-2][:40] + "\n"]
    assert again[: len(kept) - 2] == kept[:-2] and len(again) == len(kept)
    for old, new in zip(kept[-2:], again[-2:], strict=True):
        assert json.loads(old)["per_prompt"] == json.loads(new)["per_prompt"]  # the same drafter on the same numbers
    assert cli.main(["compare", "--report-only", "--output-dir", str(compared)]) == 0
    assert "## Recipes compared" in capsys.readouterr().out


def test_a_run_that_was_interrupted_goes_on_from_its_last_point(target, tmp_path):
    data = SequenceDataset([list(range(1 + n, 17 + n)) for n in range(8)], [[True] * 16] * 8)
    settings = {"objective": "supervised", "unroll_steps": 2, "per_device_train_batch_size": 2}

    def train(folder, points_until_it_stops):
        def at_point():
            seen.append(budget.tokens)
            if len(seen) == points_until_it_stops:
                raise KeyboardInterrupt
            return {"acceptance_length": 1.0}

        seen = []
        budget = Budget("tokens", 12 * 2 * 16, points=4, at_points=at_point)
        torch.manual_seed(0)
        drafter = PPOWDrafter.from_target(target, "eagle")
        trainer = make_trainer(drafter, target, data, settings, budget, 1e-2, 0, folder, 16)
        try:
            trainer.train(resume_from_checkpoint=True)
        except KeyboardInterrupt:
            return drafter, seen, None
        return drafter, seen, curve_of(trainer.state)

    whole, seen, curve = train(tmp_path / "whole", None)
    assert seen == [96, 192, 288, 384] and [tokens for tokens, _, _ in curve] == seen
    _, before, _ = train(tmp_path / "cut", 3)
    resumed, after, found = train(tmp_path / "cut", None)
    assert (before, after) == ([96, 192, 288], [288, 384])  # the third point's own checkpoint was not written yet
    assert [tokens for tokens, _, _ in found] == seen and found[0][1] < found[1][1] < found[2][1]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


class Interrupted(Comparison):
    """A comparison that is interrupted at the third of the start's points."""

    calls = 0

    def _point(self, drafter):
        self.calls += 1
        if self.calls == 4:
            raise KeyboardInterrupt
        return super()._point(drafter)


def test_a_comparison_that_was_interrupted_in_its_start_goes_on_there(cell, tmp_path, target):
    config = load_config(cell / "compare.yaml")
    config.budgets, config.seeds, config.recipes = {"tokens": 500}, [0], {"cst": config.recipes["cst"]}
    config.learning_rates, config.groups, config.tree_nodes = [1e-3], [], []
    tokenizer = PreTrainedTokenizerFast.from_pretrained(cell / "target")
    with pytest.raises(KeyboardInterrupt):
        Interrupted(config, tmp_path, target, tokenizer).run()
    checkpoints = list((tmp_path / "start" / "training").glob("checkpoint-*"))
    assert len(checkpoints) == 1
    kept = json.loads((checkpoints[0] / "trainer_state.json").read_text())["log_history"]
    Comparison(config, tmp_path, target, tokenizer).run()
    curve = json.loads((tmp_path / "start.json").read_text())["curve"]
    assert len(curve) == 5 and curve[1:3] == [
        [row["spent_tokens"], round(row["spent_seconds"], 2), row["acceptance_length"]]
        for row in kept
        if "spent_tokens" in row
    ]
    assert curve[-1][1] == pytest.approx(0.8, abs=0.4)
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_a_start_whose_checkpoint_is_of_another_number_format_is_begun_anew(
    cell, tmp_path, target, monkeypatch, capsys
):
    """What a machine computes faster is measured anew by each process."""
    config = load_config(cell / "compare.yaml")
    config.budgets, config.seeds, config.recipes = {"tokens": 100}, [0], {"cst": config.recipes["cst"]}
    config.learning_rates, config.groups, config.tree_nodes = [1e-3], [], []
    tokenizer = PreTrainedTokenizerFast.from_pretrained(cell / "target")
    formats = iter([False])
    monkeypatch.setattr(compare, "bfloat16_pays", lambda device: next(formats, True))
    with pytest.raises(KeyboardInterrupt):
        Interrupted(config, tmp_path, target, tokenizer).run()
    Comparison(config, tmp_path, target, tokenizer).run()
    printed = capsys.readouterr().out
    assert "start: begun anew" in printed and "bf16 was False and is True" in printed
    assert len(json.loads((tmp_path / "start.json").read_text())["curve"]) == 5


def test_another_configuration_is_refused_in_the_same_folder_and_more_recipes_are_not(compared, cell, target):
    config = load_config(cell / "compare.yaml")
    config.recipes["tv"], config.baselines = {"objective": "tv"}, [*config.baselines, "tv"]
    Comparison(config, compared, target, None)
    written = json.loads((compared / "config.json").read_text())
    assert "tv" in written["recipes"] and "tv" in written["baselines"]
    config.groups = [3]
    with pytest.raises(ValueError, match=r"--output-dir: .* other settings \(groups\)"):
        Comparison(config, compared, target, None)
    config = load_config(cell / "compare.yaml")
    config.recipes["lk"] = {"objective": "tv"}
    with pytest.raises(ValueError, match=r"other settings \(recipes.lk\)"):
        Comparison(config, compared, target, None)


def test_the_shipped_configuration_is_whole(tmp_path):
    config = load_config(None)
    assert config.reference in config.recipes and set(config.baselines) <= set(config.recipes)
    assert len(config.learning_rates) >= 4 and len(config.seeds) == 3
    small = load_config(None, smoke=True, recipes=["cst", "ppow_literal"])
    assert list(small.recipes) == ["cst", "ppow_literal"] and small.budgets == {"tokens": 4000}
    assert small.data["prompt_tokens"] == config.data["prompt_tokens"]
    given = {**vars(config), "start": {**config.start, "core_seconds": config.start["seconds"]}}
    del given["start"]["seconds"]
    (tmp_path / "cores.yaml").write_text(json.dumps(given))
    assert load_config(tmp_path / "cores.yaml", smoke=True).start == small.start


def test_the_shipped_comparison_at_a_gpus_scale_trains_a_target_of_100_million(tmp_path):
    config = load_config("100m")
    assert config.reference in config.recipes and set(config.baselines) <= set(config.recipes)
    with torch.device("meta"):
        target = build_target(target_recipe(config.target), 0, 1)
    assert target.num_parameters() >= 100e6 and config.target_name == "llama-768x14"
    assert load_config("100m", smoke=True).target_name == "llama-128x2"


def test_the_shipped_comparison_of_a_real_target_trains_on_recorded_states_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evaluation.jsonl").write_text('{"prompt": "x"}\n' * 120)
    config = load_config("smollm2", target_states=["record"])
    assert config.reference in config.recipes and set(config.baselines) <= set(config.recipes)
    for settings in config.recipes.values():
        args = PPOWTrainingArguments("out", use_cpu=True, **{**config.training, **settings})
        assert args.proximity_weight == 0 or not any("ppow" in phase.weights for phase in args.phases)
        assert args.verify_with != "target" and args.target_temperature == 0


def test_a_comparison_trains_its_target_first_and_once(cell, tmp_path, capsys):
    rows = [{"question": f"How much is {i} and {i}?", "answer": f"{i}+{i}={2 * i}\n" * 4} for i in range(400)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = {"hidden_size": 128, "num_layers": 2, "max_steps": 2}
    config = json.loads((cell / "compare.yaml").read_text()) | {
        "target": {"texts": f"{tmp_path}/sums.jsonl:question,answer", **shape},
        "start": {"seconds": 0.1, "learning_rate": 1e-3},
        "budgets": {"tokens": 100},
        "seeds": [0],
        "recipes": {"cst": {"objective": "supervised", "learning_rates": [1e-3]}},
        "baselines": ["cst"],
    }  # fmt: skip
    (tmp_path / "compare.yaml").write_text(json.dumps(config))
    folder = tmp_path / "out"
    argv = ["compare", "--config", str(tmp_path / "compare.yaml"), "--output-dir", str(folder), "--device", "cpu"]
    assert cli.main(argv) == 0
    weights = folder / "llama-128x2" / "model.safetensors"
    assert AutoModelForCausalLM.from_pretrained(weights.parent).config.num_hidden_layers == 2
    assert {line["target"] for line in read(folder)} == {"llama-128x2"}
    assert json.loads((folder / "config.json").read_text())["target"]["texts"] == "sums.jsonl:question,answer"
    written, lines = weights.stat().st_mtime_ns, read(folder)
    assert cli.main(argv) == 0
    assert weights.stat().st_mtime_ns == written and read(folder) == lines
    config["target"]["num_layers"] = 3  # refused before it is trained
    (tmp_path / "compare.yaml").write_text(json.dumps(config))
    capsys.readouterr()
    assert cli.main(argv) == 2 and "with other settings (target)" in capsys.readouterr().err
    assert not (folder / "llama-128x3").exists()


def test_a_block_drafter_starts_with_the_most_frequent_tokens_of_the_training_texts(cell, tmp_path):
    config = json.loads((cell / "compare.yaml").read_text()) | {
        "architecture": "block",
        "drafter_config": {"block_size": 5, "markov_rank": 4, "draft_vocab_size": 24},
        "start": {"core_seconds": 0.5, "learning_rate": 1e-2},
        "budgets": {"core_seconds": 0.1},
        "seeds": [0],
        "recipes": {"ppow": {"objective": "ppow", "learning_rates": [1e-3]}},
        "select_by": ["chain_t0_k5"],
        "baselines": [],
    }
    (tmp_path / "compare.yaml").write_text(json.dumps(config))
    folder = tmp_path / "out"
    assert cli.main(["compare", "--config", str(tmp_path / "compare.yaml"), "--output-dir", str(folder)]) == 0
    drafter = PPOWDrafter.from_pretrained(folder / "start")
    target = AutoModelForCausalLM.from_pretrained(config["target"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(config["target"])
    texts = training_text(load_config(tmp_path / "compare.yaml"), folder, target, tokenizer)
    counts = torch.zeros(target.config.vocab_size)
    for sequence in texts:
        counts += torch.bincount(sequence["input_ids"], minlength=len(counts))
    kept = drafter.kept_tokens
    left_out = torch.ones_like(counts, dtype=torch.bool).index_fill(0, kept, False)
    assert len(kept) == 24 and counts[kept].min() >= counts[left_out].max()
    seconds = [point[1] for point in json.loads((folder / "start.json").read_text())["curve"]]
    assert seconds[-1] >= 0.5 and {line["recipe"] for line in read(folder)} == {"start", "ppow"}


@pytest.mark.slow
def test_recorded_states_give_the_results_of_training_with_the_target(cell, compared, tmp_path):
    given = json.loads((cell / "compare.yaml").read_text()) | {
        "drafter": str(compared / "start"), "drafter_config": {}, "budgets": {"tokens": 700}, "seeds": [0],
        "learning_rates": [1e-2], "baselines": ["cst"],
        "recipes": {"cst": {"objective": "supervised", "bf16": False}, "ppow": {"objective": "ppow", "bf16": False}},
    }  # fmt: skip
    (tmp_path / "with_target.yaml").write_text(json.dumps(given))
    config = load_config(tmp_path / "with_target.yaml")
    target = AutoModelForCausalLM.from_pretrained(config.target)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(config.target)
    texts = training_text(config, tmp_path / "with_target", target, tokenizer)
    layers = PPOWDrafter.from_pretrained(compared / "start").config.target_layer_ids
    recording, record = Recording(target, tokenizer, texts, layers, 32, torch.float32), tmp_path / "record"
    record.mkdir()
    recording.record(record, recording.open_folder(record), lambda tokens: None)
    del given["data"]["train_sequences"], given["workload"]["train"]
    (tmp_path / "recorded.yaml").write_text(json.dumps(given))
    lines = {}
    for name in ("with_target", "recorded"):
        argv = ["compare", "--config", tmp_path / f"{name}.yaml", "--output-dir", tmp_path / name, "--device", "cpu"]
        argv += ["--target_states", record] if name == "recorded" else []
        assert cli.main(list(map(str, argv))) == 0
        lines[name] = read(tmp_path / name)
    assert json.loads((tmp_path / "recorded" / "config.json").read_text())["target_states"] == ["record"]
    trained = [line for line in lines["recorded"] if "training" in line]
    assert {line["recipe"] for line in trained} == {"cst", "ppow"} and trained[0]["training"]["steps"] > 2
    for line, expected in zip(lines["recorded"], lines["with_target"], strict=True):
        assert line["recipe"] == expected["recipe"] and line["per_prompt"] == expected["per_prompt"]
        if "training" in line:
            assert line["training"]["target_forward_tokens"] == expected["training"]["target_forward_tokens"]
            losses, wanted = ([row["loss"] for row in x["training"]["log"]] for x in (line, expected))
            assert losses == pytest.approx(wanted, rel=1e-5)


def test_a_budget_of_core_seconds_counts_computing_and_not_waiting():
    budget = Budget("core_seconds", 0.2)
    budget.on_step_begin(None, None, None)
    time.sleep(0.3)
    assert budget.fraction < 1
    began = time.process_time()
    while time.process_time() - began < 0.2:
        pass
    assert budget.fraction == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_states": ["record"]}, "recipes.lk: regenerate_temperature is given, and with target_states"),
        ({"recipes": {"x": {"objective": "sft"}}}, "recipes.x: objective: 'sft'"),
        ({"recipes": {"x": {"speed": 1}}}, r"recipes.x: \['speed'\] are no training arguments"),
        ({"recipes": {"x": {"packing": False}}}, r"recipes.x: \['packing'\] are given, and the comparison's texts"),
        ({"training": {"regenerate_temperature": 1.0}}, "training: regenerate_temperature is given; it belongs to a"),
        ({"tree_nodes": [4, 0]}, r"tree_nodes: \[4, 0\] given; 1 or more"),
        ({"groups": [0]}, r"groups: \[0\] given; 1 or more"),
        ({"seeds": [0, -1]}, r"seeds: \[0, -1\] given; 0 or more"),
        ({"cost_ratios": [-0.1]}, r"cost_ratios: \[-0.1\] given; 0 or more"),
        ({"slow_prompts": 0}, "slow_prompts: 0 given; 1 or more"),
        ({"recipes": {"x": {"later": {"from": 0.5, "speed": 1}}}}, r"recipes.x: \['speed'\] are no"),
        ({"recipes": {"x": {"later": {"num_prefixes": 1}}}}, r"recipes.x: later is {'num_prefixes': 1}"),
        ({"recipes": {"x": {"later": 0.5}}}, "recipes.x: later is 0.5"),
        ({"recipes": {"x": {"later": {"from": 1.5}}}}, "recipes.x: later begins from 1.5"),
        ({"recipes": {"x": {"later": {"from": 0.5, "unroll_steps": 0}}}}, "recipes.x: unroll_steps: 0 given"),
        ({"recipes": {"x": None}}, "recipes: {'x': None} given"),
        ({"recipes": {"x": {}, "y": {"num_rollouts": 0}}}, "recipes.y: num_rollouts: 0 given; at least 1"),
        ({"recipes": {"x": {"num_rollouts": "many"}}}, "recipes.x: num_rollouts: 'many' given; .* int"),
        ({"recipes": {"x": {"kl_coef": "1e-1"}}}, "recipes.x: kl_coef: '1e-1' given; .* YAML reads 1e-3 as a text"),
        ({"recipes": {"x": {"learning_rates": []}}}, r"recipes.x: the learning rates \[\] given"),
        ({"recipes": {"x": {"objective": "ppow", "max_window": 40}}}, "recipes.x: max_length: 32 .* of data"),
        ({"recipes": {"x": {"objective": 5}}}, "recipes.x: "),
        ({"training": {"later": 1}}, "training: later is 1; give settings and from"),
        ({"training": {"typo": 1}}, r"training: \['typo'\] are no training arguments"),
        ({"recipes": {"x": {"learning_rate": 1e-3, "seed": 1}}}, r"recipes.x: \['learning_rate', 'seed'\] are given"),
        ({"recipes": {"x": {"later": {"from": 0.5, "learning_rate": 1e-3}}}}, r"recipes.x: \['learning_rate'\] are"),
        ({"training": {"max_steps": 5}}, r"training: \['max_steps'\] are given, which the comparison sets"),
        ({"training": {"num_rollouts": 0}}, "training: num_rollouts: 0 given"),
        (
            {
                "training": {},
                "data": {
                    "train_sequences": 2,
                    "prompt_tokens": 8,
                    "completion_tokens": 12,
                    "validation_prompts": 3,
                    "test_prompts": 4,
                },
            },
            r"data.train_sequences: 2 texts to train on do not fill .* per_device_train_batch_size \(8\)",
        ),
        (
            {"workload": {"name": "x", "train": "nofile.jsonl", "evaluation": "e.jsonl"}},
            "workload.evaluation: .*no file",
        ),
        ({"workload": {"name": "x", "train": "nofile.jsonl"}}, "workload: it needs evaluation and train"),
        ({"workload": {"train": "a.jsonl"}}, "workload: .* give a name"),
        ({"architecture": "eagel"}, "architecture: 'eagel'"),
        ({"dtype": "float99"}, "dtype: 'float99'"),
        ({"groups": 8}, r"groups: 8 given; it must be of the kind list\[int\]"),
        ({"budgets": {"steps": 5}}, "budgets: {'steps': 5}"),
        ({"budgets": {"tokens": 0}}, "budgets: {'tokens': 0}"),
        ({"seeds": []}, "recipes, seeds, learning_rates and select_by must"),
        ({"data": {"train_sequences": 3}}, "data: prompt_tokens is None"),
        ({"select_by": ["group_t0_c4"]}, "select_by: 'group_t0_c4' is not measured"),
        ({"start": {"seconds": 3}}, "start: {'seconds': 3} given; give one of seconds and core_seconds"),
        ({"start": {"seconds": 3, "core_seconds": 3, "learning_rate": 1e-3}}, "start: .* give one of seconds"),
        ({"start": {"seconds": "some", "learning_rate": 1e-3}}, "start: seconds: 'some' given"),
        ({"start": {"seconds": 3, "learning_rate": "fast"}}, r"start: the learning rates \['fast'\] given"),
        ({"start": {"seconds": 3, "learning_rate": 1e-3, "unroll": 3}}, r"start: \['unroll'\] are no"),
        ({"start": {"seconds": 3, "learning_rate": 1e-3, "unroll_steps": 0}}, "start: unroll_steps: 0 given"),
        ({"drafter": "tiny-eagle"}, "drafter_config: .* leave it out"),
        ({"target": None, "recipes": None}, ".* must each have something"),
        ({"target": {"layers": 3}}, r"target: \['layers'\] are not known"),
        ({"target": {"hidden_size": 100}}, "hidden_size: 100 given"),
        ({"target": {"family": "gpt2"}}, "family: 'gpt2'"),
        ({"target": {"max_steps": "many"}}, "target: max_steps is 'many'"),
    ],
)
def test_a_configuration_that_cannot_be_run_is_refused(cell, tmp_path, change, message):
    config = json.loads((cell / "compare.yaml").read_text()) | change
    path = tmp_path / "compare.yaml"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^--config: in compare.yaml, {message}"):
        load_config(path)


def test_a_workload_of_too_few_prompts_is_refused(cell, tmp_path):
    config = json.loads((cell / "compare.yaml").read_text())
    (tmp_path / "few.jsonl").write_text('{"prompt": "x"}\n' * 3)
    for split, message in (("evaluation", "workload.evaluation: it has 3 prompts"), ("train", "data.train_sequences")):
        given = config | {"workload": config["workload"] | {split: str(tmp_path / "few.jsonl")}}
        (tmp_path / "compare.yaml").write_text(json.dumps(given))
        with pytest.raises(ValueError, match=message):
            load_config(tmp_path / "compare.yaml")
    (tmp_path / "few.jsonl").write_text('{"question": "x"}\n' * 30)
    with pytest.raises(ValueError, match=r"workload.train: the dataset has the columns \['question'\]"):
        load_config(tmp_path / "compare.yaml")
    given["workload"]["train"] = str(tmp_path / "nofile.jsonl")
    (tmp_path / "compare.yaml").write_text(json.dumps(given))
    with pytest.raises(ValueError, match="^--config: in compare.yaml, workload.train: .*no file"):
        load_config(tmp_path / "compare.yaml")


TRAINED_FIRST = {"hidden_size": 128, "num_layers": 1, "max_steps": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "tinny"}, "target: there is no model 'tinny'"),
        ({"drafter_config": {"nonsense": 3}}, "drafter_config: nonsense: neither a field"),
        ({"target": TRAINED_FIRST, "drafter_config": {"nonsense": 3}}, "drafter_config: nonsense: neither a field"),
        ({"select_by": ["chain_t0_k7"]}, "select_by: 'chain_t0_k7' is not measured of this drafter"),
        (
            {"recipes": {"x": {"objective": "confidence"}}},
            "recipes.x: objective: 'confidence' trains a confidence head",
        ),
        ({"drafter_config": {"max_window": 40}, "recipes": {"x": {"objective": "ppow"}}}, "recipes.x: max_length: 32"),
        ({"drafter_config": {"intermediate_size": "wide"}}, "drafter_config: "),
        ({"architecture": "medusa", "recipes": {"x": {"max_window": 11}}}, "recipes.x: max_window: 11 given"),
        ({"target_states": ["nothing"], "recipes": {"x": {}}}, "target_states: 'nothing' has no record.json"),
        (
            {"workload": {"name": "x", "train": "columns.jsonl", "evaluation": "columns.jsonl"}},
            "workload.evaluation: ",
        ),
    ],
)
def test_what_a_target_tells_is_refused_before_anything_is_written(
    cell, tmp_path, monkeypatch, capsys, change, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "columns.jsonl").write_text('{"question": "x"}\n' * 20)
    (tmp_path / "compare.yaml").write_text(json.dumps(json.loads((cell / "compare.yaml").read_text()) | change))
    assert cli.main(["compare", "--config", "compare.yaml", "--output-dir", "out", "--device", "cpu"]) == 2
    assert f"ppow: error: --config: in compare.yaml, {message}" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_what_is_not_there_is_named(tmp_path, capsys):
    (tmp_path / "compare.yaml").write_text('{"recipe": {}}')
    assert cli.main(["compare", "--config", str(tmp_path / "compare.yaml"), "--output-dir", str(tmp_path)]) == 2
    assert "--config: ['recipe'] in compare.yaml is not known" in capsys.readouterr().err
    assert cli.main(["compare", "--config", str(tmp_path / "no.yaml"), "--output-dir", str(tmp_path)]) == 2
    assert "--config: there is no file" in capsys.readouterr().err
    assert cli.main(["compare", "--recipes", "nothing", "--output-dir", str(tmp_path)]) == 2
    assert "--recipes: ['nothing']" in capsys.readouterr().err
    assert cli.main(["compare", "--report-only", "--output-dir", str(tmp_path)]) == 2
    assert "holds no comparison" in capsys.readouterr().err


def test_the_mean_of_comparisons_weighs_them_alike(compared, tmp_path, capsys):
    """A second comparison whose windows of one recipe are a tenth longer: the mean gain grows by half of that."""
    other = tmp_path / "other"
    other.mkdir()
    lines = read(compared)
    for line in lines:
        if line["recipe"] == "ppow":
            for pairs in line["per_prompt"].values():
                pairs[:] = [[1.1 * above, below] for above, below in pairs]
    (other / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = json.loads((compared / "config.json").read_text())
    config["recipes"]["lk"]["unroll_decay"] = 0.5
    (other / "config.json").write_text(json.dumps(config))
    argv = ["compare", "--mean-of", f"{compared}, {other}", "--output-dir", str(tmp_path)]
    assert cli.main(argv) == 0
    text = (tmp_path / "mean.md").read_text()
    assert text in capsys.readouterr().out and "Equal seconds" in text and str(tmp_path) not in text
    assert "other settings in some of them: lk." in text
    report = Report(compared)
    runs = report.runs("tokens")
    pairs, against = (values_of(runs[name], "chain_t0_k10") for name in ("ppow", "cst"))
    gain = value(pairs) / value(against)
    expected = (gain + 1.1 * gain) / 2 - 1
    rows = [row.split(" | ") for row in text.split("Equal seconds")[0].splitlines() if row.startswith("| ")]
    header, cells = rows[0], next(row for row in rows if row[0] == "| ppow")
    assert header[1] == "chain K=10, T=0: over the reference" and cells[1].split(" (")[0] == f"{expected:+.1%}"
    assert cli.main(["compare", "--report-only", "--output-dir", str(other)]) == 2
    assert "has no start.json" in capsys.readouterr().err
    assert cli.main(["compare", "--mean-of", f"{other},{other}", "--output-dir", str(tmp_path)]) == 2
    assert "name a folder twice" in capsys.readouterr().err
    # Only what all of them have tested is compared.
    assert cli.main(["compare", "--mean-of", str(tmp_path), "--output-dir", str(tmp_path)]) == 2
    assert "holds no comparison" in capsys.readouterr().err
    (other / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines if x["recipe"] != "cst"))
    assert cli.main(argv) == 2
    assert "share no recipe" in capsys.readouterr().err


# Intervals


def test_a_constant_gain_has_an_interval_of_no_width_and_none_is_none():
    against = numpy.random.default_rng(0).uniform(1, 5, size=(2, 30, 2))
    better = against * numpy.array([1.1, 1.0])
    for part in paired_gain(against[:1], against[:1]):
        assert part == pytest.approx(0)
    assert paired_gain(better[:1], against[:1]) == pytest.approx((0.1, 0.1, 0.1))
    assert paired_gain(better, against)[0] == pytest.approx(value(better) / value(against) - 1)


def test_intervals_cover_the_truth_about_as_often_as_they_claim():
    """Two recipes whose prompts share their difficulty; the true gain is 5%."""
    random = numpy.random.default_rng(1)
    covered = 0
    for trial in range(100):
        difficulty = random.gamma(5, 1, size=60)
        rounds = numpy.full((1, 60), 10.0)
        against = numpy.stack([difficulty[None] * 10 + random.normal(0, 3, (1, 60)), rounds], axis=-1)
        pairs = numpy.stack([difficulty[None] * 10.5 + random.normal(0, 3, (1, 60)), rounds], axis=-1)
        _, low, high = paired_gain(pairs, against, resamples=200, seed=trial)
        covered += low <= 0.05 <= high
        assert high - low < 0.2  # unpaired it would be near 0.35
    assert 85 <= covered <= 100


def test_numbers_in_results_keep_six_digits():
    line = {"rate": 3e-05, "pairs": [(26.0, 1 / 3)], "amount": 123_456_789.0, "seed": 7, "name": "x", "none": None}
    kept = {"rate": 3e-05, "pairs": [[26, 0.333333]], "amount": 123_456_789, "seed": 7, "name": "x", "none": None}
    assert shortened(line) == kept and str(shortened(26.0)) == "26" and math.isnan(shortened(math.nan))


def test_the_plateau_is_read_off_the_last_quarter_of_the_curve():
    curve = [[0, 0, tau] for tau in (1.0, 2.0, 3.0, 3.5, 3.8, 4.0, 4.0, 4.1, 4.1)]
    assert plateau_gain(curve) == pytest.approx(4.1 / 4.0 - 1)
    assert plateau_gain(curve[:4]) is None
