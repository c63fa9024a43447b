"""The table of drafts and the rules replayed on it: against drafting token by token, brute force and real decoding."""

import itertools
import json
import math
import random

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppow_hf import PPOWDrafter, tiny
from ppow_hf.cli import main
from ppow_hf.data.models import parse_workload
from ppow_hf.measure import draft_table as tables_module
from ppow_hf.measure.benchmark import ForwardRecorder
from ppow_hf.measure.calibration import fit_on_tables
from ppow_hf.measure.draft_table import DraftTable, draft_table, draft_tables
from ppow_hf.measure.evaluation import decode
from ppow_hf.measure.replay import mixed_stream, oracle, replay
from ppow_hf.measure.rival_rules import ConfidenceStop, EntropyStop, least_cost_threshold
from ppow_hf.measure.window_report import (
    MIXED,
    OURS,
    WITH_LOOKUP,
    calibration_curve,
    format_study,
    live_check,
    speed,
    study,
)
from ppow_hf.runtime.cost_model import CostModel, OnlineCosts
from ppow_hf.runtime.estimator import AcceptanceEstimator
from ppow_hf.runtime.modeling_ppow import collect_target_states
from ppow_hf.runtime.windowing import FixedWindow, HeuristicWindow, batch_pays

GIVEN = OnlineCosts(0.12, 0.04)


def made_up_table(seed, length=40, depth=16, steady=False):
    """A table whose drafts are kept with the drafter's own confidence, each verdict its own."""
    draw = random.Random(seed)
    text = numpy.array([draw.randrange(8) for _ in range(length)])
    rows = length - 1
    probability = numpy.array([[draw.uniform(0.3, 0.98) for _ in range(depth)] for _ in range(rows)])
    if steady:
        probability[:] = 0.8
    accepted = []
    for row in range(rows):
        kept = 0
        while kept < min(depth, length - row - 1) and draw.random() < probability[row, kept]:
            kept += 1
        accepted.append(kept)
    ids = numpy.full((rows, depth), 9)
    for row, kept in enumerate(accepted):
        ids[row, :kept] = text[row + 1 : row + 1 + kept]
    kl, outside = numpy.full((rows, depth), 0.2), numpy.zeros((rows, depth))
    return DraftTable(
        numpy.array([1, 2]), text, ids, probability, (1 - probability) / 2, 1 - probability, kl, outside,
        numpy.array(accepted),
        max_new_tokens=length,
    )  # fmt: skip


@pytest.fixture(scope="module")
def target(make_target):
    return make_target("llama", initializer_range=0.2)


@pytest.fixture(scope="module", params=["eagle", "standalone", "medusa"])
def drafter(request, target):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PPOWDrafter.from_target(target, request.param).eval()


@pytest.fixture(scope="module")
def pair():
    target = AutoModelForCausalLM.from_pretrained(tiny.target_path(), dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny.target_path())
    drafter = PPOWDrafter.from_pretrained(tiny.drafter_path("tiny-standalone"), dtype="float32").eval()
    prompts = [
        tokenizer(text, return_tensors="pt")["input_ids"]
        for text in (
            "def read_lines(path):\n    with open(path) as",
            "class Queue:\n    def __init__(self, maxsize=0):\n",
        )
    ]
    return target, drafter, prompts, draft_tables(target, drafter, prompts, max_new_tokens=40)


# -- the table


@torch.no_grad()
def test_every_row_is_what_drafting_token_by_token_gives(target, drafter):
    prompt = torch.tensor([[5, 9, 2, 33]])
    (table,) = draft_tables(target, drafter, [prompt], max_new_tokens=12, depth=5)
    plain = target.generate(prompt, max_new_tokens=12, do_sample=False)
    assert table.text.tolist() == plain[0, 4:].tolist() and table.draft_ids.shape == (11, 5)
    outputs = target(plain, output_hidden_states=True)
    target_log_probs = outputs.logits[0].log_softmax(-1)
    first = drafter.draft_model.first_prefix
    for committed in range(1, 12):
        known = plain[:, : 4 + committed]
        states = collect_target_states(outputs.hidden_states, drafter.config.target_layer_ids)
        session = drafter.start_session()
        session.observe(known[:, first:], None if states is None else states[:, : known.shape[1] - 1], first)
        logits, kept, alive = session.first_logits(), 0, True
        for position in range(5):
            log_probs = logits[0].log_softmax(-1)
            top = log_probs.topk(2)
            row = committed - 1
            token = int(top.indices[0])
            assert table.draft_ids[row, position] == token
            assert table.max_probability[row, position] == pytest.approx(float(top.values[0].exp()), abs=1e-4)
            assert table.second_probability[row, position] == pytest.approx(float(top.values[1].exp()), abs=1e-4)
            assert table.entropy[row, position] == pytest.approx(float(-(log_probs.exp() * log_probs).sum()), abs=1e-3)
            if alive and 4 + committed + position <= plain.shape[1]:
                there = target_log_probs[known.shape[1] - 1 + position]
                expected = float((there.exp() * (there - log_probs)).sum())
                assert table.kl[row, position] == pytest.approx(expected, abs=1e-3)
            else:
                assert math.isnan(table.kl[row, position])
            place = 4 + committed + position
            alive = alive and place < plain.shape[1] and token == int(plain[0, place])
            kept += alive
            logits = session.next_logits(torch.tensor([[token]]), position)
        assert table.accepted[row] == kept


def test_long_texts_are_tabulated_in_parts(target, drafter, monkeypatch):
    prompt = torch.tensor([[5, 9, 2, 33]])
    (whole,) = draft_tables(target, drafter, [prompt], max_new_tokens=12, depth=4)
    monkeypatch.setattr("ppow_hf.measure.draft_table.PREFIXES_AT_ONCE", 3)
    (parts,) = draft_tables(target, drafter, [prompt], max_new_tokens=12, depth=4)
    assert numpy.array_equal(whole.draft_ids, parts.draft_ids) and numpy.array_equal(whole.accepted, parts.accepted)
    assert numpy.allclose(whole.entropy, parts.entropy, atol=1e-4)


def test_prompts_of_a_batch_are_continued_as_alone(target, drafter):
    prompts = [torch.tensor([[5, 9, 2]]), torch.tensor([[1, 2, 3, 4, 5, 6, 7]]), torch.tensor([[40]])]
    for prompt, table in zip(prompts, draft_tables(target, drafter, prompts, 10, depth=2), strict=True):
        plain = target.generate(prompt, max_new_tokens=10, do_sample=False)
        assert table.prompt.tolist() == prompt[0].tolist()
        assert table.text.tolist() == plain[0, prompt.shape[1] :].tolist()


def test_a_text_ends_where_rounding_would_have_the_target_choose_otherwise(target, drafter, monkeypatch):
    prompt = torch.tensor([[5, 9, 2, 33]])
    text = target.generate(prompt, max_new_tokens=10, do_sample=False)[0, 4:].tolist()
    for place in (6, 0):
        other = text[:place] + [(text[place] + 1) % 64] + text[place + 1 :]
        monkeypatch.setattr(tables_module, "complete_batch", lambda *args, other=other: [other])
        tables = draft_tables(target, drafter, [prompt], 10, depth=2)
        assert [table.text.tolist() for table in tables] == ([text[:place]] if place else [])


def test_a_text_that_is_not_the_targets_is_refused(target, drafter):
    prompt = torch.tensor([[5, 9, 2, 33]])
    text = target.generate(prompt, max_new_tokens=6, do_sample=False)[0, 4:].tolist()
    text[3] = (text[3] + 1) % 64
    with pytest.raises(ValueError, match="text: its token 3 is not the target's choice"):
        draft_table(target, drafter, prompt, text, 6)
    with pytest.raises(ValueError, match="text: it is empty"):
        draft_table(target, drafter, prompt, [], 6)


# -- the replay


def test_fixed_windows_are_replayed_as_counted_by_hand():
    table = made_up_table(0)
    for window in (0, 1, 5):
        committed, expected = 1, []
        while committed < 40:
            drafted = min(window, 40 - committed - 1)
            kept = min(int(table.accepted[committed - 1]), drafted)
            expected.append((drafted, kept))
            committed += kept + 1
        trace = replay(FixedWindow(window, GIVEN), table)
        assert [(r.window, r.accepted) for r in trace.rounds[1:]] == expected
        assert sum(r.accepted + 1 for r in trace.rounds[1:]) == table.tokens
        seen = replay(FixedWindow(window, GIVEN), table, record=True)
        assert [(r.window, r.accepted) for r in seen.rounds[1:]] == expected
        assert all(len(r.features) == r.window for r in seen.rounds)


def test_the_oracle_is_the_cheapest_of_all_sequences_of_windows():
    for seed, costs in itertools.product(range(5), (CostModel(0.12, 0.0), CostModel(0.4, 0.05), CostModel(0.01, 0.3))):
        table = made_up_table(seed, length=9)

        def cheapest(committed, table=table, costs=costs):
            if committed >= 9:
                return 0.0
            options = []
            for window in range(table.room(committed) + 1):
                kept = min(int(table.accepted[committed - 1]), window)
                options.append(costs.round_cost(window) + cheapest(committed + kept + 1))
            return min(options)

        trace = oracle(table, costs)
        assert sum(costs.round_cost(r.window) for r in trace.rounds[1:]) == pytest.approx(cheapest(1))
        assert sum(r.accepted + 1 for r in trace.rounds[1:]) == table.tokens


def test_nothing_beats_the_oracle():
    costs = CostModel(0.12, 0.02)
    tables = [made_up_table(seed) for seed in range(6)]
    limit = speed([oracle(table, costs) for table in tables], costs)
    for make in (
        lambda: FixedWindow(4, GIVEN),
        lambda: HeuristicWindow(16, GIVEN),
        lambda: ConfidenceStop(16, GIVEN, dynamic=True),
        lambda: EntropyStop(16, GIVEN),
    ):
        found = speed([replay(make(), table) for table in tables], costs)
        assert found["tokens_per_cost"] <= limit["tokens_per_cost"] and limit["wasted"] == 0


def test_a_draft_ends_before_a_token_that_ends_the_text():
    table = made_up_table(3, steady=True)
    table.eos_token_ids = frozenset([int(table.draft_ids[0, 2])])
    first = replay(FixedWindow(8, GIVEN), table).rounds[1]
    assert first.window == list(table.draft_ids[0]).index(table.draft_ids[0, 2]) and first.draft_steps > first.window


def test_threshold_is_the_one_of_least_cost_by_trying_all():
    draw = random.Random(0)
    for _ in range(50):
        probabilities = [round(draw.random(), 1) for _ in range(draw.randint(6, 30))]
        matches = [int(draw.random() < p) for p in probabilities]
        if len(set(matches)) < 2:
            continue

        def cost(threshold, matches=matches, probabilities=probabilities):
            wrong = sum(p >= threshold and not m for p, m in zip(probabilities, matches, strict=True))
            missed = sum(p < threshold and m for p, m in zip(probabilities, matches, strict=True))
            return wrong / matches.count(0) + 3 * missed / matches.count(1)

        found = least_cost_threshold(matches, probabilities)
        assert cost(found) == pytest.approx(min(map(cost, probabilities)))


def test_entropy_stop_ends_with_the_first_unsure_token_and_follows_acceptance():
    rule = EntropyStop(16, GIVEN, threshold=0.5)
    assert rule.start(100) == 16
    rule.include(0, AcceptanceEstimator.features(0.9, 0.5, 1.0, 0))  # 1 - sqrt(0.1) = 0.68
    assert batch_pays([rule.outlook(1)])
    rule.include(1, AcceptanceEstimator.features(0.3, 2.0, 1.0, 1))  # 1 - sqrt(0.4) = 0.37
    assert not batch_pays([rule.outlook(2)])
    rule.update(2, 2, 0, [1.0])
    assert rule.threshold == pytest.approx(0.501)
    for _ in range(20):
        rule.update(2, 2, 2, [0.1, 0.1])
    assert rule.threshold < 0.5


def test_confidence_stop_drafts_the_windows_of_transformers(pair):
    """transformers' assisted generation itself, begun where the table begins: after the target's first token."""
    target, drafter, prompts, tables = pair
    assistant = drafter.draft_model.model
    assistant.generation_config.num_assistant_tokens = 16
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.4
    for prompt, table in zip(prompts, tables, strict=True):
        begun = torch.cat([prompt, torch.tensor([[int(table.text[0])]])], dim=1)
        with ForwardRecorder(target) as recorder:
            output = target.generate(
                begun,
                attention_mask=torch.ones_like(begun),
                max_new_tokens=table.tokens,
                do_sample=False,
                assistant_model=assistant,
                pad_token_id=1,
            )
            theirs = recorder.trace(begun.shape[1], output[0])
        assert output[0, prompt.shape[1] :].tolist() == table.text.tolist()
        ours = replay(ConfidenceStop(16, GIVEN, threshold=0.4), table)
        assert [(r.window, r.accepted) for r in ours.rounds[1:]] == [(r.window, r.accepted) for r in theirs.rounds]


def test_live_decoding_takes_the_replayed_rounds(pair):
    target, drafter, prompts, tables = pair
    found = live_check(target, drafter, tables, fit_on_tables(tables), CostModel(0.12, 0.02))
    assert set(found) == {OURS, WITH_LOOKUP, "fixed 5", "transformers heuristic"}
    for check in found.values():
        assert check["same_text"] == check["same_rounds"] == check["texts"] == 2
        assert check["live_tokens_per_cost"] == pytest.approx(check["replayed_tokens_per_cost"])


def test_live_check_notices_another_text(pair):
    target, drafter, _, tables = pair
    changed = DraftTable(**(vars(tables[0]) | {"text": tables[0].text.copy(), "accepted": tables[0].accepted * 0}))
    changed.text[-1] += 1
    found = live_check(target, drafter, [changed], fit_on_tables(tables), CostModel(0.12, 0.0))
    assert found["fixed 5"]["same_text"] == 0 and found["fixed 5"]["same_rounds"] == 0


def test_estimate_from_tables_is_that_from_decoding(pair):
    """The features that a replayed fixed window leaves are those of decoding it."""
    target, drafter, prompts, tables = pair
    for prompt, table in zip(prompts, tables, strict=True):
        _, (live,) = decode(target, drafter, [prompt[0].tolist()], 40, window="fixed", max_window=6)
        replayed = replay(FixedWindow(6, GIVEN), table, record=True)
        for one, other in zip(live.rounds[1:], replayed.rounds[1:], strict=True):
            assert one.draft_ids == other.draft_ids and one.accepted == other.accepted
            assert numpy.allclose(one.features, other.features, atol=1e-2)


# -- the study


def test_mixed_stream_takes_turns_until_one_runs_out():
    a, b = [made_up_table(seed, length=11) for seed in range(6)], [made_up_table(9, length=31) for _ in range(2)]
    stream = mixed_stream({"a": a, "b": b}, segment_tokens=20)
    names = ["a" if any(table is one for one in a) else "b" for table in stream]
    assert names == ["a", "a", "b", "a", "a", "b", "a", "a"]


def test_study_compares_every_rule_with_the_fixed_windows_and_the_oracle():
    tables = {
        name: [made_up_table(seed, steady=name == "easy") for seed in range(start, start + 4)]
        for name, start in (("easy", 0), ("hard", 50))
    }
    costs = {"cheap": CostModel(0.03, 0.0), "dear": CostModel(0.3, 0.05)}
    found, calibration = study(tables, tables, costs, segment_tokens=30)
    assert [(one["workload"], one["cost"]) for one in found["results"]] == [
        (workload, cost) for workload in ("easy", "hard", MIXED) for cost in costs
    ]
    for result in found["results"]:
        speeds = [one["tokens_per_cost"] for one in result["fixed"]]
        assert len(speeds) == 17 and speeds[0] == pytest.approx(1.0)
        best, limit = max(speeds), result["oracle"]["tokens_per_cost"]
        assert speeds[result["best_fixed_window"]] == best <= limit
        for name, rule in result["rules"].items():
            assert (
                rule["tokens_per_cost"] <= limit + 1e-9 or name == WITH_LOOKUP
            )  # its tokens are not all the drafter's
            assert rule["over_best_fixed"] == pytest.approx(rule["tokens_per_cost"] / best - 1)
            assert rule["way_to_oracle"] == pytest.approx((rule["tokens_per_cost"] - best) / (limit - best))
    ours = [result["rules"][OURS]["over_best_fixed"] for result in found["results"]]
    assert found["summary"][OURS]["worst_over_best_fixed"] == min(ours)
    assert calibration["confidence_alone"]["weights"]["lookup"] == pytest.approx(0.0, abs=1e-9)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert len(format_study(found).splitlines()) == 1 + 6 + 2 + len(found["summary"]) + 2  # two notes
    for result in found["results"]:
        assert result["thrifty"]["tokens_per_cost"] >= min(
            result["fixed"][8]["tokens_per_cost"], result["rules"][OURS]["tokens_per_cost"]
        )
    assert 0 < found["waste_at_speed_of_fixed_8"]["mean"] <= found["waste_at_speed_of_fixed_8"]["worst"] < 1.2


def test_calibration_curve_of_a_true_estimate_is_the_diagonal():
    tables = [made_up_table(seed, length=120) for seed in range(30)]
    weights = dict.fromkeys(vars(AcceptanceEstimator()), 0.0)
    truth = {"weights": weights | {"confidence": 1.0}, "acceptance": 0.64}
    curve = calibration_curve(truth, tables)
    assert curve["expected_error"] < 0.03
    assert sum(one["count"] for one in curve["by_position"]) == sum(one["count"] for one in curve["by_estimate"])
    for one in curve["by_position"][:4]:
        assert one["predicted"] == pytest.approx(one["measured"], abs=0.05)
    too_sure = {"weights": weights | {"confidence": 3.0}, "acceptance": 0.64}
    assert calibration_curve(too_sure, tables)["expected_error"] > 2 * curve["expected_error"]


# -- the command


def test_command_writes_the_study_and_its_pictures(tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"question": f"def f{n}(x):\n    return x +"}) + "\n" for n in range(3)))
    code = main(
        ["windows", "--target", "tiny", "--drafter", "tiny-eagle", "--prompts", f"short={prompts}:question",
         "--num-prompts", "2", "--fit-prompts", "1", "--max-new-tokens", "16", "--live", "1", "--segment-tokens", "8",
         "--output-dir", str(tmp_path / "out")]
    )  # fmt: skip
    assert code == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "windows.json").read_text())
    assert found["workloads"]["short"]["prompts"] == 2 and found["live"][OURS]["same_rounds"] == 1
    assert str(tmp_path) not in json.dumps(found)
    for picture in ("windows.png", "calibration.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    assert "best fixed" in capsys.readouterr().out


def test_command_explains_its_mistakes(tmp_path, capsys):
    base = ["windows", "--target", "tiny", "--drafter", "tiny-eagle"]
    assert main([*base, "--prompts", "nothing.jsonl"]) == 2
    assert "--prompts: there is no file 'nothing.jsonl'" in capsys.readouterr().err
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "x = 1"}\n')
    assert main([*base, "--prompts", f"{file}:question"]) == 2
    assert "has no column 'question'" in capsys.readouterr().err
    assert main([*base, "--prompts", str(file)]) == 2
    assert "--fit-prompts: 10 of the 1 prompts" in capsys.readouterr().err
    assert parse_workload("stdlib") == ("stdlib", "stdlib")
    assert parse_workload(f"a={file}:q") == ("a", f"{file}:q") and parse_workload(str(file))[0] == "p"


@pytest.mark.slow
def test_bench_hands_its_options_to_the_study(capsys):
    argv = ["bench", "--windows", "--target", "tiny", "--drafter", "tiny-standalone", "--num-prompts", "1"]
    assert main([*argv, "--fit-prompts", "1", "--live", "1", "--max-new-tokens", "6"]) == 0
    assert "mixed stream" in capsys.readouterr().out
