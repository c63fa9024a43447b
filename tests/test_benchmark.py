"""The benchmark's numbers, against counts made another way; its table, verdict and picture."""

import copy
import json
import math
import shlex

import pytest
import torch

import ppow_hf
from ppow_hf.measure.benchmark import run_benchmark, trace_from_forwards
from ppow_hf.measure.benchmark_report import format_table, plot_windows, verdict, write_benchmark
from ppow_hf.measure.costs import measure_costs
from ppow_hf.measure.intervals import ratio_interval
from ppow_hf.measure.provenance import describe_machine, public_command
from ppow_hf.runtime.trace import GenerationTrace, RoundTrace

NEW_TOKENS = 12
ROW_KEYS = {
    "name",
    "tokens_per_second",
    "acceptance_length",
    "tokens_per_target_forward",
    "drafted",
    "accepted",
    "wasted",
    "ratio_to_plain",
    "identical_to_plain",
}


@pytest.fixture(scope="module")
def target(make_target):
    return copy.deepcopy(make_target("llama"))


@pytest.fixture(scope="module")
def standalone(target):
    """All of the target's layers: it agrees with the target everywhere."""
    drafter = ppow_hf.PPOWDrafter.from_target(target, "standalone", num_hidden_layers=4)
    drafter.draft_model.model.load_state_dict(target.state_dict())
    # transformers' default of 0.4 ends a draft at the first unsure token
    drafter.draft_model.model.generation_config.assistant_confidence_threshold = 0.0
    return drafter.eval()


@pytest.fixture(scope="module")
def eagle(target):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return ppow_hf.PPOWDrafter.from_target(target, "eagle").eval()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 64, (1, length), generator=generator) for length in (9, 5, 14, 1, 7)]


@pytest.fixture(scope="module")
def run(target, eagle, standalone, prompts):
    """One benchmark with every row, and how often the target's forward was called meanwhile."""
    calls = []
    hook = target.register_forward_hook(lambda *args: calls.append(1))
    traces: dict[str, list[GenerationTrace]] = {}
    result = run_benchmark(
        target,
        None,
        eagle,
        prompts,
        standalone=standalone,
        max_new_tokens=NEW_TOKENS,
        command="ppow bench --target /home/somebody/models/target --json=/tmp/out.json",
        traces=traces,
    )
    hook.remove()
    return result, traces, len(calls)


def rows_of(result):
    return {row["name"]: row for row in result["rows"]}


def test_result_has_the_shape_of_benchmark_json(run):
    result = run[0]
    assert {
        "machine",
        "versions",
        "command",
        "cost_ratio",
        "draft_step_seconds",
        "target_forward_seconds",
        "rows",
    } <= (result.keys())
    assert [row["name"] for row in result["rows"]] == [
        "plain",
        "prompt_lookup_10",
        "transformers_assisted_constant",
        "ppow_fixed_8",
        "ppow_kl",
        "ppow_kl_lookup",
        "ppow_standalone_fixed_8",
        "ppow_standalone_kl",
        "ppow_standalone_kl_lookup",
    ]
    assert all(row.keys() >= ROW_KEYS for row in result["rows"])
    assert result["versions"].keys() >= {"python", "torch", "transformers", "ppow_hf"}
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_command_and_machine_hold_no_path(run):
    text = json.dumps(run[0])
    assert "somebody" not in text and "/tmp" not in text
    assert run[0]["command"] == "ppow bench --target target --json=out.json"
    assert public_command("ppow bench --target org/model --prompts ./a/b.txt") == (
        "ppow bench --target org/model --prompts b.txt"
    )
    prompt = "and/or " * 2000  # longer than any path may be: the system refuses to look for it
    for given in (["ppow", "bench", prompt], ["ppow", "bench", f"--text={prompt}"]):
        assert public_command(shlex.join(given)) == shlex.join(given)
    assert public_command(f"ppow bench /{'a/' * 4000}b.txt") == "ppow bench b.txt"
    assert describe_machine(torch.device("cpu"))["cores"] >= 1


def test_every_row_writes_what_plain_generation_writes(run):
    for row in run[0]["rows"]:
        assert row["identical_to_plain"] is True and row["different_prompts"] == 0, row["name"]
        assert row["new_tokens"] == 5 * NEW_TOKENS


def test_thorough_runs_hold_every_schedule_and_both_loops(target, eagle, standalone, prompts):
    result = run_benchmark(
        target, None, eagle, prompts[:2], standalone=standalone, max_new_tokens=10, thorough=True, repeats=2
    )
    rows = rows_of(result)
    assert {
        "prompt_lookup_5",
        "prompt_lookup_10",
        *(f"transformers_assisted_{name}" for name in ("constant", "heuristic", "heuristic_transient", 3, 5, 8)),
        "ppow_loop_kl",
        "ppow_tree",
    } <= rows.keys()
    for name, row in rows.items():
        assert row["identical_to_plain"] is True, name
        low, high = row["tokens_per_second_range"]
        assert low <= row["tokens_per_second"] <= high
    # The assistant is the target: all is kept, so that lengths tell the schedule. 10 tokens: 3 + 1, 3 + 1, 1 + 1; and
    # 8 + 1, the last one without a draft.
    assert rows["transformers_assisted_3"]["acceptance_length"] == pytest.approx(10 / 3)
    assert rows["transformers_assisted_8"]["acceptance_length"] == pytest.approx(8 + 1)
    assert "ppow_tree" in format_table(result)


def test_batches_write_what_each_prompt_gets_alone(target, eagle, standalone, prompts):
    alone = run_benchmark(target, None, eagle, prompts, standalone=standalone, max_new_tokens=8, rows=["ppow_kl"])
    for size in (2, 5):
        result = run_benchmark(
            target, None, eagle, prompts, batch_size=size, standalone=standalone, max_new_tokens=8, thorough=True
        )
        rows = rows_of(result)
        assert result["batch_size"] == size and "prompt_lookup_10" in result["left_out"]
        assert {"plain", "ppow_fixed_8", "ppow_kl", "ppow_loop_kl", "ppow_tree"} <= rows.keys()
        for name, row in rows.items():
            assert row["identical_to_plain"] is True, name
            assert row["new_tokens"] == rows_of(alone)["plain"]["new_tokens"]
            if name.startswith("ppow"):  # every prompt is counted, also one that a call has to itself
                assert row["new_tokens"] == row["target_forwards"] + row["accepted"], name


def test_sampled_runs_do_not_ask_for_identical_text(target, eagle, prompts):
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    result = run_benchmark(target, None, eagle, prompts[:2], max_new_tokens=8, temperature=1.0, rows=["ppow_kl"])
    assert torch.equal(torch.rand(2), expected)  # the global random state is left alone
    assert all(row["identical_to_plain"] is None for row in result["rows"]) and result["temperature"] == 1.0
    assert "sampled" in format_table(result) and verdict(result).endswith("sampled at temperature 1.")


def test_changed_text_is_reported(target, eagle, prompts, monkeypatch):
    generate = type(target).generate

    def corrupted(self, *args, **kwargs):
        output = generate(self, *args, **kwargs)
        if "assistant_model" in kwargs and output.shape[1] == prompts[0].shape[1] + NEW_TOKENS:
            output[0, -1] += 1
        return output

    monkeypatch.setattr(type(target), "generate", corrupted)
    result = run_benchmark(target, None, eagle, prompts, max_new_tokens=NEW_TOKENS, rows=["ppow_kl"])
    row = rows_of(result)["ppow_kl"]
    assert row["identical_to_plain"] is False and row["different_prompts"] == 1
    assert "not identical to plain in ppow_kl" in verdict(result)
    assert "no (1/5)" in format_table(result)


def test_counts_agree_with_the_number_of_target_forwards(run, target, prompts):
    """Tokens per target forward from a hook of the test's own, for the methods of transformers and for ours."""
    result, traces, all_calls = run
    rows = rows_of(result)
    counted = 0
    for name, row in rows.items():
        forwards = len([one for trace in traces[name] for one in trace.rounds])
        assert row["tokens_per_target_forward"] == pytest.approx(5 * NEW_TOKENS / forwards)
        assert row["accepted"] == 5 * NEW_TOKENS - forwards
        counted += forwards + len(traces[name][0].rounds)  # the first prompt is also the warm-up
    cost_forwards = 1 + (20 + 2) * 4  # context, then windows 0, 2, 5 and 10
    kl_rounds_may_differ = 4 * NEW_TOKENS  # its windows follow measured costs, in the warm-up too
    assert abs(all_calls - cost_forwards - counted) <= kl_rounds_may_differ

    calls = []
    hook = target.register_forward_hook(lambda *args: calls.append(1))
    for prompt in prompts:
        target.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, prompt_lookup_num_tokens=10)
    hook.remove()
    assert rows["prompt_lookup_10"]["target_forwards"] == len(calls)


def test_plain_drafts_nothing(run):
    row = rows_of(run[0])["plain"]
    assert (row["drafted"], row["accepted"], row["wasted"]) == (0, 0, 0)
    assert row["acceptance_length"] == row["tokens_per_target_forward"] == row["ratio_to_plain"] == 1.0
    assert row["ratio_interval"] is None


def test_a_drafter_that_is_the_target_has_every_token_accepted(run):
    rows = rows_of(run[0])
    for name in ("ppow_standalone_fixed_8", "transformers_assisted_constant"):
        assert rows[name]["accepted"] == rows[name]["drafted"] > 0 and rows[name]["wasted"] == 0
    # 12 tokens: the prompt's forward gives 1, a window of 8 gives 9, the last round 2 (window 1)
    assert rows["ppow_standalone_fixed_8"]["acceptance_length"] == pytest.approx((9 + 2) / 2)
    # transformers drafts after the prompt at once: 11 tokens and one more in a single forward
    assert rows["transformers_assisted_constant"]["acceptance_length"] == pytest.approx(12)
    assert rows["transformers_assisted_constant"]["tokens_per_target_forward"] == pytest.approx(12)


def test_rounds_told_from_forwards_agree_with_the_trace(target, eagle, prompts):
    """The reading of transformers' methods, tried on our own, whose rounds are known."""
    for prompt in prompts:
        queries: list[list[int]] = []
        hook = target.register_forward_pre_hook(
            lambda module, args, kwargs, queries=queries: queries.append(kwargs["input_ids"][0].tolist()),
            with_kwargs=True,
        )
        view = eagle.with_settings(window="fixed", max_window=3)
        output = target.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=view)
        hook.remove()
        told = trace_from_forwards(queries, prompt.shape[1], output[0].tolist())
        known = view.last_trace
        assert [(r.window, r.accepted, r.draft_ids) for r in told.rounds] == [
            (r.window, r.accepted, r.draft_ids) for r in known.rounds
        ]


def test_rounds_told_from_forwards_by_hand():
    # prompt 1 2 3; a draft 4 5 after it of which 4 is kept and 9 comes instead of 5; then nothing; then 7 7 both kept
    queries = [[1, 2, 3, 4, 5], [9], [6, 7, 7]]
    trace = trace_from_forwards(queries, 3, [1, 2, 3, 4, 9, 6, 7, 7, 8])
    assert [(r.window, r.accepted) for r in trace.rounds] == [(2, 1), (0, 0), (2, 2)]
    assert trace.acceptance_length == pytest.approx((2 + 3) / 2)
    assert trace.tokens_per_target_forward == pytest.approx(6 / 3)


def test_repeats_are_summed_and_rows_can_be_chosen(target, standalone, prompts):
    once = run_benchmark(target, None, standalone, prompts[:2], max_new_tokens=6, rows=["ppow_fixed_8"])
    twice = run_benchmark(target, None, standalone, prompts[:2], max_new_tokens=6, rows=["ppow_fixed_8"], repeats=2)
    assert list(rows_of(once)) == list(rows_of(twice)) == ["plain", "ppow_fixed_8"]
    first, second = rows_of(once)["ppow_fixed_8"], rows_of(twice)["ppow_fixed_8"]
    assert second["drafted"] == 2 * first["drafted"] and second["acceptance_length"] == first["acceptance_length"]
    assert first["tokens_per_second"] == pytest.approx(first["new_tokens"] / first["seconds"])


def test_assistant_keeps_its_own_generation_config(target, standalone, prompts):
    assistant = standalone.draft_model.model
    assistant.generation_config.num_assistant_tokens_schedule = "heuristic"
    assistant.generation_config.num_assistant_tokens = 3
    try:
        name = "transformers_assisted_heuristic"
        result = run_benchmark(target, None, standalone, prompts[:2], max_new_tokens=10, rows=[name])
        # From 3 each time, all accepted: 3 + 1, then 5 + 1 tokens; carried over it would be all 9 + 1 at once.
        assert rows_of(result)[name]["acceptance_length"] == pytest.approx((4 + 6) / 2)
        assert assistant.generation_config.num_assistant_tokens == 3
    finally:
        assistant.generation_config.num_assistant_tokens_schedule = None
        assistant.generation_config.num_assistant_tokens = None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts: none given"),
        ({"prompts": [torch.ones(2, 3, dtype=torch.long)]}, r"prompts\[0\]: token ids of shape"),
        ({"prompts": [torch.ones(1, 250, dtype=torch.long)]}, r"prompts\[0\]: 250 tokens .* context of 256"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 given"),
        ({"repeats": 0}, "repeats: 0 given"),
        ({"batch_size": 0}, "batch_size: 0 given"),
        ({"temperature": -1.0}, "temperature: -1.0 given"),
        ({"rows": ["plain", "ppow_magic"]}, "rows: 'ppow_magic' is not one of"),
    ],
)
def test_mistakes_are_named(target, eagle, prompts, arguments, message):
    given = {"prompts": prompts, "max_new_tokens": NEW_TOKENS} | arguments
    with pytest.raises(ValueError, match=message):
        run_benchmark(target, None, eagle, **given)


def test_an_eagle_drafter_is_no_standalone_one(target, eagle, prompts):
    with pytest.raises(ValueError, match="standalone: its architecture is 'eagle'"):
        run_benchmark(target, None, eagle, prompts, standalone=eagle)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("architecture", ["eagle", "standalone"])
@pytest.mark.parametrize("length", [1, 20, 256])
def test_costs_are_measured_whatever_the_context(make_target, family, architecture, length):
    target = make_target(family)
    drafter = ppow_hf.PPOWDrafter.from_target(target, architecture).eval()
    costs = measure_costs(target, drafter, torch.ones(1, length, dtype=torch.long), repeats=2)
    assert costs.draft_step_seconds > 0 and costs.target_forward_seconds > 0
    assert costs.cost_ratio == costs.draft_step_seconds / costs.target_forward_seconds
    assert costs.verification_cost >= 0


def test_costs_follow_the_clock(target, standalone, monkeypatch):
    """With a clock that charges 1 s a forward and 0.1 s for each further token, the slope is 0.1."""
    clock = [0.0]
    advance = target.register_forward_pre_hook(
        lambda module, args, kwargs: clock.__setitem__(0, clock[0] + 0.9 + 0.1 * args[0].shape[1]), with_kwargs=True
    )
    step = standalone.draft_model.register_forward_pre_hook(lambda *args: None)
    monkeypatch.setattr("ppow_hf.measure.costs.now", lambda device: clock[0])
    advance_draft = standalone.draft_model.advance
    monkeypatch.setattr(
        standalone.draft_model,
        "advance",
        lambda *args: (clock.__setitem__(0, clock[0] + 0.25), advance_draft(*args))[1],
    )
    costs = measure_costs(target, standalone, torch.ones(1, 12, dtype=torch.long), repeats=3)
    advance.remove()
    step.remove()
    assert costs.target_forward_seconds == pytest.approx(1.0)
    assert costs.draft_step_seconds == pytest.approx(0.25) and costs.cost_ratio == pytest.approx(0.25)
    assert costs.verification_cost == pytest.approx(0.1)


def test_interval_is_narrow_for_prompts_alike_and_wide_otherwise():
    plain = ([10] * 6, [1.0] * 6)
    assert ratio_interval(([10] * 6, [0.5] * 6), plain) == pytest.approx([2.0, 2.0])
    low, high = ratio_interval(([10] * 6, [0.2, 2.0, 0.2, 2.0, 0.2, 2.0]), plain)
    assert low < 6 / 6.6 < high and high - low > 0.3
    assert ratio_interval(([10], [0.5]), ([10], [1.0])) is None


def made_up(**ratios):
    rows = [
        {
            "name": name,
            "tokens_per_second": 100 * ratio,
            "acceptance_length": 2.5,
            "tokens_per_target_forward": 2.0,
            "drafted": 0 if name == "plain" else 7,
            "accepted": 3,
            "wasted": 4 / 7,
            "ratio_to_plain": ratio,
            "identical_to_plain": True,
            "different_prompts": 0,
        }
        for name, ratio in ratios.items()
    ]
    return {"rows": rows, "prompts": 20}


def test_verdict_says_that_it_paid_and_by_how_much():
    sentence = verdict(made_up(plain=1.0, prompt_lookup_10=1.2, ppow_fixed_8=1.1, ppow_kl=1.5))
    assert sentence.startswith("Speculation paid on this run: ppow_kl ran at 1.50 times")
    assert "25% faster than the best of the others, prompt_lookup_10 (1.20 times)" in sentence
    assert sentence.endswith("all outputs were identical to plain.")


def test_verdict_says_that_it_did_not_pay():
    sentence = verdict(made_up(plain=1.0, prompt_lookup_10=0.9, ppow_fixed_8=0.5, ppow_kl=0.97))
    assert sentence.startswith("Speculation did not pay on this run: ppow_kl ran at 0.97 times")
    assert "none of the others was faster than plain" in sentence


def test_verdict_says_when_others_are_faster_and_when_it_is_undecided():
    result = made_up(plain=1.0, prompt_lookup_10=2.0, ppow_kl=1.5)
    assert "25% slower than the best of the others, prompt_lookup_10 (2.00 times)" in verdict(result)
    result["rows"][2]["ratio_interval"] = [0.9, 1.8]
    assert verdict(result).startswith("Whether speculation paid is undecided on this run")
    assert "(95% interval 0.90 to 1.80)" in verdict(result)


def test_table_holds_every_row_within_100_columns(run):
    table = format_table(run[0])
    lines = table.splitlines()
    assert all(len(line) <= 100 for line in lines)
    for row in run[0]["rows"]:
        line = next(line for line in lines if line.startswith(row["name"] + " "))
        assert f"{row['tokens_per_second']:.1f}" in line and line.endswith("yes")
    long = format_table(made_up(plain=1.0, transformers_assisted_heuristic_transient=123.4))
    assert all(len(line) <= 100 for line in long.splitlines())


def test_result_is_written_whole(run, tmp_path):
    path = write_benchmark(run[0], tmp_path / "made" / "benchmark.json")
    assert json.loads(path.read_text()) == run[0]
    with pytest.raises(ValueError):
        write_benchmark(run[0] | {"cost_ratio": math.nan}, path)
    assert json.loads(path.read_text()) == run[0] and list(path.parent.iterdir()) == [path]


def test_windows_are_drawn(run, tmp_path):
    picture = plot_windows(run[1]["ppow_kl"], tmp_path / "made" / "windows.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    # rounds without a divergence, and one trace longer than what is drawn
    plot_windows([GenerationTrace(rounds=[RoundTrace(0, 0, [])] * 300)], tmp_path / "plain.png", max_rounds=50)
    with pytest.raises(ValueError, match="traces"):
        plot_windows([], tmp_path / "none.png")
