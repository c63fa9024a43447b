"""The demo's pure parts and its runs: frames and drawings against hand-made traces, runs against plain generation."""

import json
import math
import re
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from ppow_hf import PPOWDrafter
from ppow_hf.demo import drawing, frames, running, settings
from ppow_hf.demo.running import FixedShadow, Run, RunResult, RunRound, RunSettings, ShadowRound
from ppow_hf.runtime.modeling_ppow import collect_target_states
from ppow_hf.runtime.trace import RoundTrace


def make_drafter(target, architecture):
    torch.manual_seed(1)
    return PPOWDrafter.from_target(target, architecture).eval()


@pytest.fixture(scope="module", params=["eagle", "standalone", "medusa"])
def pair(request, make_target):
    """A drafter that agrees with the target now and then: a standalone one is the target with a little noise."""
    target = make_target("llama", vocab_size=12, hidden_size=16, num_layers=2, initializer_range=0.4)
    if request.param != "standalone":
        return target, make_drafter(target, request.param)
    drafter = PPOWDrafter.from_target(target, "standalone", num_hidden_layers=2).eval()
    drafter.draft_model.model.load_state_dict(target.state_dict())
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.08 * torch.randn_like(parameter))
    return target, drafter


def draft_slowly(target, drafter, ids, window):
    """The greedy draft from a prefix, by a drafter and a target that remember nothing between tokens."""
    first, drafts = drafter.draft_model.first_prefix, []
    hidden = target(torch.tensor([ids]), output_hidden_states=True).hidden_states
    states = collect_target_states(hidden, drafter.config.target_layer_ids)
    session = drafter.start_session()
    session.observe(torch.tensor([ids[first:]]), None if states is None else states[:, : len(ids) - first], first)
    logits = session.first_logits()
    for place in range(window):
        drafts.append(int(logits.argmax()))
        logits = session.next_logits(torch.tensor([drafts[-1:]]), place)
    return drafts


@torch.inference_mode()
def test_fixed_row_is_what_a_window_of_eight_gets_from_each_prefix(pair):
    target, drafter = pair
    prompt = [3, 1, 4, 1, 5]
    run = Run(target, drafter, prompt, RunSettings("fixed", 3, max_new_tokens=24))
    ids, kept = list(prompt), 0
    for place, round_ in enumerate(run):
        if place:
            room = 24 - (len(ids) - len(prompt)) - 1
            drafts = draft_slowly(target, drafter, ids, min(8, room))
            choices = target(torch.tensor([ids + drafts])).logits[0, len(ids) - 1 :].argmax(-1).tolist()
            accepted = 0
            while accepted < len(drafts) and drafts[accepted] == choices[accepted]:
                accepted += 1
            assert round_.shadow == ShadowRound(drafts, accepted)
            kept += accepted
        ids += round_.committed
    assert kept > 0  # the pair agrees now and then, or nothing was tested


def test_rounds_add_up_to_what_plain_generate_writes(pair):
    target, drafter = pair
    prompt = [2, 7, 1, 8]
    run = Run(target, drafter, prompt, RunSettings(max_new_tokens=30))
    rounds = list(run)
    plain = target.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0, 4:].tolist()
    assert [token for round_ in rounds for token in round_.committed] == plain == run.result.new_ids
    assert run.result.identical and run.result.plain_ids == plain and not run.result.stopped
    assert [round_.trace for round_ in rounds] == run.result.trace.rounds
    assert run.result.ratio == pytest.approx(run.result.plain_seconds / run.result.seconds)


def test_sampled_fixed_row_keeps_a_draft_with_probability_sum_min_p_q(pair):
    target, drafter = pair
    ids = [3, 1, 4, 1, 5, 9]
    with torch.inference_mode():
        hidden = target(torch.tensor([ids]), output_hidden_states=True)
        first = drafter.draft_model.first_prefix
        states = collect_target_states(hidden.hidden_states, drafter.config.target_layer_ids)
        session = drafter.start_session()
        session.observe(torch.tensor([ids[first:]]), None if states is None else states[:, : len(ids) - first], first)
        alpha = torch.minimum(hidden.logits[0, -1].softmax(-1), session.first_logits()[0].softmax(-1)).sum()
    runs = 400
    kept = sum(FixedShadow(target, drafter, ids, do_sample=True, seed=seed).round(1).accepted for seed in range(runs))
    assert abs(kept / runs - float(alpha)) < 4 * math.sqrt(float(alpha * (1 - alpha)) / runs) + 1e-6


def test_time_of_the_fixed_row_and_of_the_reader_is_not_counted(pair, monkeypatch):
    target, drafter = pair
    real_round = FixedShadow.round

    def slow_round(self, room):
        time.sleep(0.05)
        return real_round(self, room)

    monkeypatch.setattr(FixedShadow, "round", slow_round)
    started = time.perf_counter()
    run = Run(target, drafter, [1, 2, 3], RunSettings("fixed", 2, max_new_tokens=12))
    rounds = 0
    for _ in run:
        time.sleep(0.05)
        rounds += 1
    wall = time.perf_counter() - started
    assert run.result.seconds + run.result.plain_seconds < wall - 0.1 * (rounds - 1) + 0.02


def test_two_runs_at_once_do_not_meet(pair):
    target, drafter = pair
    prompts = [[1, 2, 3], [9, 8, 7, 6]]
    runs = [Run(target, drafter, prompt, RunSettings(max_new_tokens=24)) for prompt in prompts]
    threads = [threading.Thread(target=list, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run, prompt in zip(runs, prompts, strict=True):
        plain = target.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
        assert run.result.new_ids == plain[0, len(prompt) :].tolist()
        assert run.result.trace is not None and sum(r.accepted + 1 for r in run.result.trace.rounds) == 24


def test_a_visitor_who_leaves_stops_the_models(pair):
    target, drafter = pair
    before = threading.active_count()
    rounds = iter(Run(target, drafter, [1, 2, 3], RunSettings(max_new_tokens=200)))
    next(rounds)
    assert threading.active_count() == before + 1
    rounds.close()
    deadline = time.time() + 10
    while threading.active_count() > before and time.time() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_the_time_limit_ends_the_text_and_says_so(pair):
    target, drafter = pair
    run = Run(target, drafter, [1, 2, 3], RunSettings(max_new_tokens=200, seconds=0.5))
    for _ in run:
        time.sleep(0.05)
    assert run.result.stopped and 0 < len(run.result.new_ids) < 200
    assert frames.outcome(run.result, greedy=True)["same"] in ("identical", "–")


def test_a_failure_of_the_models_reaches_the_reader(make_target):
    target = make_target("llama", vocab_size=12, hidden_size=16, num_layers=2, initializer_range=0.4)
    other = make_target("llama", vocab_size=2000, hidden_size=16, num_layers=2)
    with pytest.raises(ValueError, match="vocabulary"):
        list(Run(target, make_drafter(other, "standalone"), [1, 2, 3], RunSettings()))


# -- frames


def round_of(draft_ids, accepted, committed, kl=(), p=(), fixed=None, seconds=1.0):
    trace = RoundTrace(len(draft_ids), len(draft_ids), list(draft_ids), accepted, list(kl), list(p))
    return RunRound(trace, list(committed), fixed, seconds)


def decode(ids):
    return "".join(chr(ord("a") + token) for token in ids)


def test_a_frame_shows_its_round_in_words_and_numbers():
    maker = frames.FrameMaker(lambda token: decode([token]), decode)
    first = maker.frame(round_of([], 0, [0], seconds=0.5))
    assert (first["kl"], first["angle"], first["move"]) == (1.0, 0.0, "no evidence yet")
    frame = maker.frame(round_of([1, 2, 3], 1, [1, 9], [0.5, 2.0], [0.9, 0.8, 0.5], ShadowRound(list(range(1, 9)), 1)))
    kl = 0.7 * (0.7 * 1.0 + 0.3 * 0.5) + 0.3 * 2.0
    assert frame["kl"] == pytest.approx(kl, abs=1e-4)
    assert frame["angle"] == pytest.approx(180 * kl / (1 + kl) - 90, abs=0.06)
    assert frame["head"] == "Adaptive window: 3 drafted, 1 kept, 1 from the target"
    assert [cell[:3] for cell in frame["cells"]] == [
        ["b", "kept", "✓ .90"],
        ["c", "rejected", "✗ .80"],
        ["d", "unread", "unused"],
        ["j", "target", "◆ target"],
    ]
    assert [cell[1] for cell in frame["fixed"]] == ["kept", "rejected"] + 6 * ["unread"]
    assert frame["fixed_note"] == "7 wasted here, 7 so far"
    assert frame["text"] == ["b", "j"] and frame["p"] == "0.90"
    longer = maker.frame(round_of([1, 2, 3, 4, 5], 5, [1, 2, 3, 4, 5, 6], 5 * [0.0], seconds=2.0))
    assert longer["move"] == "↗ stretches 3 → 5"
    counters = longer["counters"]
    assert (counters["rounds"], counters["tau"], counters["wasted"]) == ("3", "4.00", "25%")  # (6 + 2) / 2, 2 of 8
    assert counters["speed"] == "4.5"  # 9 tokens in 2 s
    rest = maker.frame(round_of([], 0, [7], fixed=ShadowRound([1], 0)))
    assert rest["move"].startswith("– rests") and rest["angle"] == longer["angle"]


def test_the_gauge_shows_the_mass_outside_a_reduced_vocabulary():
    maker = frames.FrameMaker(lambda token: decode([token]), decode)
    assert maker.frame(round_of([], 0, [0]))["outside"] == ""
    round_ = round_of([1, 2], 1, [1, 9], [0.5, 2.0])
    round_.trace.outside = [0.2, 0.3]
    frame = maker.frame(round_)
    assert frame["outside"] == f"outside the draft vocabulary: {0.7 * 0.2 + 0.3 * 0.3:.1%}"
    assert frame["kl"] == pytest.approx(0.7 * (0.7 * 1.0 + 0.3 * 0.5) + 0.3 * 2.0, abs=1e-4)


def test_a_text_that_ends_inside_the_window_has_no_token_of_the_target():
    frame = frames.FrameMaker(lambda token: decode([token]), decode).frame(round_of([1, 2, 3], 3, [1, 2]))
    assert [cell[1] for cell in frame["cells"]] == ["kept", "kept", "unread"]


@pytest.mark.parametrize(("kl", "angle"), [(0, -90), (1 / 3, -45), (1, 0), (3, 45), (20, 81.4)])
def test_the_pointer_sweeps_from_low_to_high(kl, angle):
    assert frames.gauge_angle(kl) == pytest.approx(angle, abs=0.05)


def test_pieces_of_text_never_break_a_character_and_lose_nothing():
    data = "naïve 🎯 → dé".encode()
    pieces = frames.TextPieces(lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    parts = [pieces.push([byte]) for byte in data]
    assert "".join(parts) == data.decode() and "�" not in "".join(parts)
    assert pieces.push([0xC3]) == ""


@pytest.mark.parametrize(
    ("token", "shown"),
    [(" self", " self"), ("\n    ", "⏎ ␣×4"), ("   ", "␣×3"), ("a\tb", "a⇥b"), ("\x07", "�"), ("", "∅")],
)
def test_cells_make_space_visible(token, shown):
    assert frames.visible_token(token) == shown


def test_the_explainers_sum_is_130_against_53_ms():
    fixed, adaptive = frames.cost_sums(0.2)
    assert fixed.per_token_ms == pytest.approx((30 * 8 + 150) / 3) and fixed.result == "130 ms"
    assert adaptive.per_token_ms == pytest.approx((30 * 6.5 + 150) / 6.5) and adaptive.result == "53 ms"
    assert fixed.per_text_token_ms == pytest.approx(390 / 4)
    totals = frames.Totals(drafting_rounds=2, drafted=6, kept=4, fixed_rounds=2, fixed_drafted=16, fixed_kept=0)
    _, _, own_fixed, own = frames.cost_sums(0.1, totals)
    assert own.per_token_ms == pytest.approx((15 * 3 + 150) / 2) and own_fixed.result == "∞"


def test_outcome_tells_identical_from_different_and_from_not_compared():
    same = RunResult([1, 2], 1.0, [1, 2], 2.0, plain_finished=True)
    assert frames.outcome(same, True)["same"] == "identical" and frames.outcome(same, True)["ratio"] == "2.00×"
    other = RunResult([1, 2], 1.0, [1, 3], 2.0, plain_finished=True)
    assert frames.outcome(other, True)["same"] == "different" and frames.outcome(other, False)["same"] == "sampled"
    assert frames.outcome(RunResult([1, 2], 1.0), True)["ratio"] == "–"


# -- drawings


def test_the_skeleton_has_a_place_for_everything_and_nothing_that_a_template_would_read():
    html = drawing.stage("stage", "watch", "a <label>")
    assert html.count('class="pw-cell off"') == drawing.MAX_WINDOW + 1 + running.FIXED_WINDOW
    assert "<label>" not in html and "<script" not in html
    for read_by_gradio in ("`", "${", "{{", "\\"):
        assert read_by_gradio not in html


def test_whatever_is_drawn_is_escaped():
    attack = "<img src=x onerror=alert(1)>"
    row = {"name": attack, "tokens_per_second": 1.0, "ratio_to_plain": 1.0, "acceptance_length": 1.0}
    row |= {"wasted": 0.5, "drafted": 2, "identical_to_plain": True, "different_prompts": 0}
    result = {"rows": [row], "machine": {"processor": attack, "cores": 2}, "command": attack, "prompts": 1}
    result |= {"versions": {"torch": attack, "transformers": "5"}, "cost_ratio": 0.1}
    result |= {"max_new_tokens": 4, "dtype": "float32"}
    drawn = [
        drawing.stage("stage", "watch", attack, attack),
        drawing.comparison([{"name": attack, "tau": attack}]),
        drawing.line_chart(attack, {attack: [(0, 1), (1, 2)]}),
        drawing.benchmark(result),
    ]
    assert all("<img" not in html and "&lt;img" in html for html in drawn)


def test_a_chart_puts_its_points_where_its_scale_says():
    svg = drawing.line_chart("loss", {"a": [(0, 0.0), (5, 5.0), (10, 10.0)]}, width=100, height=100)
    points = [tuple(map(float, pair)) for pair in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.06) and y1 == pytest.approx((y0 + y2) / 2, abs=0.06)
    assert x0 < x2 and y0 > y2


def test_training_curves_tell_the_two_stages_apart():
    log = [{"objective": "supervised", "step": 1, "kl": 2.0}, {"objective": "ppow", "step": 2, "kl": 1.0}]
    html = drawing.curves([*log, {"objective": "ppow", "step": 3, "reward/mean": float("nan")}])
    assert ">supervised<" in html and ">PPOW<" in html and html.count("<figure>") == 1
    assert drawing.curves([]) == ""


# -- settings


def test_settings_come_from_the_environment_and_mistakes_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # nothing was downloaded
    given = settings.DemoSettings.from_environment({"PPOW_DEMO_DRAFTER": "user/drafter", "PPOW_DEMO_QUEUE": "5"})
    assert (given.drafter, given.queue, given.compare, given.target) == ("user/drafter", 5, "", "tiny")
    assert settings.DemoSettings.from_environment({}).compare == "tiny-standalone"
    with pytest.raises(ValueError, match="PPOW_DEMO_SECONDS: 'soon'"):
        settings.DemoSettings.from_environment({"PPOW_DEMO_SECONDS": "soon"})


def test_the_pair_is_a_real_one_where_its_target_was_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert settings.DemoSettings.from_environment({}).target == "tiny"
    cached = tmp_path / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    for file, text in (("refs/main", "0" * 40), (f"snapshots/{'0' * 40}/model.safetensors", "")):
        path = cached / file
        path.parent.mkdir(parents=True)
        path.write_text(text)
    found = settings.DemoSettings.from_environment({})
    assert (found.target, found.drafter) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-eagle")
    assert found.compare == ""
    assert settings.DemoSettings.from_environment({"PPOW_DEMO_TARGET": "tiny"}).drafter == "tiny-eagle"


def test_a_target_alone_needs_a_drafter_that_comes_with_the_package(qwen3_pair, tmp_path):
    target, tokenizer = qwen3_pair
    target.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    named = settings.DemoSettings.from_environment({"PPOW_DEMO_TARGET": str(tmp_path)})
    with pytest.raises(ValueError, match=r"^--drafter \(PPOW_DEMO_DRAFTER\): a target was named without one"):
        settings.load_models(named)


def test_labels_show_no_path_and_tell_the_stage(tmp_path):
    folder = tmp_path / "my-drafter"
    folder.mkdir()
    (folder / "training_log.json").write_text(json.dumps([{"objective": "supervised", "step": 1}]))
    log = settings.training_log(str(folder))
    assert settings.drafter_label(str(folder), "eagle", log) == "my-drafter (eagle, supervised only)"
    log.append({"objective": "tv + 0.3*kl"})
    assert settings.drafter_label(str(folder), "eagle", log) == "my-drafter (eagle, tv + 0.3*kl)"
    assert settings.short_name("user/name") == "user/name"


def test_stored_benchmarks_are_found_and_other_files_left(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "benchmark.json").write_text(json.dumps({"rows": [], "machine": {}, "versions": {}}))
    (tmp_path / "benchmark.json").write_text("{}")
    assert [name for name, _ in settings.stored_benchmarks(str(tmp_path))] == ["one"]


# -- what a visitor may ask for


@pytest.fixture(scope="module")
def demo(make_target):
    app = pytest.importorskip("ppow_hf.demo.app")
    from transformers import AutoTokenizer

    from ppow_hf import tiny

    tokenizer = AutoTokenizer.from_pretrained(tiny.target_path())
    target = make_target("llama", vocab_size=len(tokenizer), hidden_size=16, num_layers=2, initializer_range=0.4)
    shown = settings.ShownDrafter(make_drafter(target, "standalone"), "a drafter")
    models = settings.Models(target, tokenizer, shown, shown, "a target", settings.CODE_EXAMPLES, [])
    return SimpleNamespace(app=app, demo=app.Demo(settings.DemoSettings(), models))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, "empty"),
        ({"prompt": None}, "empty"),
        ({"prompt": "x" * 2001}, "2,001 characters"),
        ({"window": "../../etc"}, "window rule"),
        ({"max_window": 17}, "Longest window"),
        ({"temperature": -1}, "Temperature"),
        ({"temperature": float("nan")}, "Temperature"),
        ({"new_tokens": 513}, "New tokens"),
        ({"new_tokens": True}, "New tokens"),
        ({"prompt": "é" * 2000}, "context of 256"),
    ],
)
def test_what_is_not_possible_is_refused_in_plain_words(demo, changes, message):
    asked = {"prompt": "def f():", "window": "kl", "max_window": 10, "temperature": 0, "new_tokens": 64} | changes
    with pytest.raises(demo.app.Refused, match=message):
        demo.demo.checked(**asked, seconds=60)


def test_a_run_is_cut_to_what_the_context_holds(demo):
    ids, run_settings = demo.demo.checked("def f():\n" * 40, "kl", 10, 0, 512, 60)
    assert len(ids) + run_settings.max_new_tokens == 256


def test_rounds_are_streamed_one_after_the_other_and_the_page_opens_with_a_run(demo):
    progress = list(demo.demo.rounds(demo.demo.models.drafter, "x", [1, 2, 3], RunSettings(max_new_tokens=12)))
    counts = [len(now.value["rounds"]) for now in progress]
    assert counts == [*range(counts[-1] + 1), counts[-1]]  # none, one more each round, and the end
    assert [now.value["status"] for now in progress] == (len(progress) - 1) * ["running"] + ["done"]
    assert progress[2].value["rounds"][:1] == progress[1].value["rounds"]  # what was sent is not changed later
    demo.demo.record_opening(new_tokens=8)
    kept = [json.loads(frame)["kept"] for frame in demo.demo.opening["rounds"]]
    assert kept[demo.demo.opening["show"]] == max(kept)


def test_the_cost_slider_takes_any_number_that_is_sent(demo):
    assert "130 ms" in demo.demo.cost(0.2, None)
    assert demo.demo.cost(1e9, None) == demo.demo.cost(1.0, None)
    assert demo.demo.cost("<b>", None) == demo.demo.cost(0.2, None)


def test_the_page_can_be_built_and_names_no_folder_of_this_machine(demo):
    from pathlib import Path

    page = json.dumps(demo.demo.blocks().get_config_file(), default=str)
    assert "pw-needle" in page and str(Path(__file__).parents[1]) not in page


@pytest.fixture
def served(demo):
    """The page on a port of its own, where an answer never ends by itself."""
    import httpx

    ended = threading.Event()

    class Waiting(demo.app.Demo):
        def answer(self, prompt, window, max_window, temperature, new_tokens, cost_ratio):
            ended.wait(60)
            yield None, None, ""

    page = Waiting(demo.demo.settings, demo.demo.models).blocks()
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, state_session_capacity=demo.app.SESSIONS)
    number = next(number for number, function in page.fns.items() if function.api_name == "answer")

    def ask(session: str, client: str):
        body = {"data": ["x", "kl", 5, 0, 16, 0.1], "fn_index": number, "session_hash": session}
        return httpx.post(f"{url}gradio_api/queue/join", json=body, headers={"x-forwarded-for": client}, timeout=30)

    yield SimpleNamespace(page=page, ask=ask, ended=ended, app=demo.app)
    ended.set()
    page.close()


def test_requests_that_nobody_reads_hold_a_few_places_of_the_queue_and_little_memory(served):
    each, queue = served.app.REQUESTS_EACH, served.page._queue
    answers = [served.ask(f"session-{number}", "10.0.0.1, 192.0.2.1") for number in range(each + 2)]
    assert [answer.status_code for answer in answers] == each * [200] + 2 * [503]
    assert f"{each} of your requests" in answers[-1].text
    assert served.ask("other", "192.0.2.2").status_code == 200  # somebody else's turn comes
    served.ended.set()
    deadline = time.time() + 60
    while queue.event_ids_to_events and time.time() < deadline:
        time.sleep(0.05)
    for number in range(served.app.SESSIONS + 5):
        assert served.ask(f"later-{number}", f"198.51.100.{number}").status_code in (200, 503)
    assert len(queue.pending_messages_per_session) <= served.app.SESSIONS
    for _ in range(served.app.UNREAD_MESSAGES + 1):
        queue.pending_messages_per_session["later-68"].put_nowait(None)
    assert "not read" in served.ask("later-68", "192.0.2.3").text


def test_the_command_names_what_cannot_be_loaded(capsys):
    pytest.importorskip("gradio")
    from ppow_hf.cli import main

    assert main(["demo", "--target", "./nowhere", "--drafter", "tiny-eagle"]) == 2
    assert "--target (PPOW_DEMO_TARGET): there is no folder './nowhere'" in capsys.readouterr().err
