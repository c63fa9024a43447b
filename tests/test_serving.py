"""Drafting for an engine's changing batch: what is proposed, and what is learnt of it, against slow references.

The engine here verifies by plain forwards of the target, one request at a time; vLLM itself is in tests/engines.
"""

import sys

import numpy
import pytest
import torch

from ppow_hf import PPOWDrafter
from ppow_hf.runtime.cost_model import OnlineCosts
from ppow_hf.runtime.windowing import FixedWindow
from ppow_hf.serving.engine_bench import Comparison, EngineRow, format_rows, own_row
from ppow_hf.serving.llamacpp_runner import llamacpp_python, run_llamacpp
from ppow_hf.serving.sglang_job import counts
from ppow_hf.serving.sglang_runner import run_sglang, sglang_python
from ppow_hf.serving.vllm_proposer import BatchDrafter, make_batch_drafter
from ppow_hf.serving.vllm_runner import run_vllm, vllm_python

PROMPTS = [[5, 9, 2], [1, 2, 3, 4, 5, 6, 7, 8, 9], [40, 41], [5, 9, 2], [33], [60, 1, 60, 1, 60]]


class RecordingWindow(FixedWindow):
    """A fixed window that keeps what it is told."""

    def __init__(self, max_window, costs, told):
        super().__init__(max_window, costs)
        self.told, self.text = told, []

    def read(self, tokens):
        super().read(tokens)
        self.text += tokens

    def update(self, window, draft_steps, accepted, kl):
        super().update(window, draft_steps, accepted, kl)
        self.told.append((window, accepted, list(kl)))


@pytest.fixture(scope="module")
def target(make_target):
    return make_target("llama", initializer_range=0.2)


@pytest.fixture(scope="module")
def drafter(target):
    """Half of the target's layers, so that some of what it drafts is right."""
    torch.manual_seed(0)
    drafter = PPOWDrafter.from_target(target, "standalone", num_hidden_layers=3)
    theirs = target.state_dict()
    with torch.no_grad():
        for name, parameter in drafter.draft_model.model.named_parameters():
            parameter.copy_(theirs[name])
    return drafter.eval()


@torch.no_grad()
def greedy(model, ids, count):
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


@torch.no_grad()
def predictions(model, ids, draft):
    """What `model` says after `ids` and after each token of `draft` after them."""
    return model(torch.tensor([[*ids, *draft]])).logits[0, len(ids) - 1 :].argmax(-1).tolist()


class SlowEngine:
    """At most `seats` requests at once; a free seat goes to the next one, and the last seat's request fills a gap."""

    def __init__(self, target, prompts, new_tokens, seats=3, cut=lambda step: None):
        self.target, self.seats, self.new_tokens, self.cut = target, seats, new_tokens, cut
        self.waiting, self.running, self.done = [(list(p), len(p)) for p in prompts], [], []
        self.steps, self.rounds = 0, []  # accepted tokens of each drafted window, and whether those were all of it

    def run(self, batch: BatchDrafter, check=lambda tokens, draft: None):
        drafts = {}
        while self.waiting or self.running:
            while self.waiting and len(self.running) < self.seats:
                self.running.append(self.waiting.pop(0))
            for ids, _ in self.running:
                whole = drafts.get(id(ids), [])
                draft = whole[: self.cut(self.steps)]
                truth = predictions(self.target, ids, draft)
                kept = next((i for i, token in enumerate(draft) if token != truth[i]), len(draft))
                if whole:
                    # A token that was drafted and cut off is seen to be right or wrong by what the target says there.
                    goes_on = truth[kept] in whole[kept : kept + 1]
                    self.rounds.append((kept, kept == len(draft) and (goes_on or kept == len(whole))))
                ids += truth[: kept + 1]
            for seat in reversed(range(len(self.running))):
                ids, start = self.running[seat]
                if len(ids) - start >= self.new_tokens:
                    self.done.append(ids[: start + self.new_tokens])
                    last = self.running.pop()
                    if seat < len(self.running):
                        self.running[seat] = last
            proposed = batch.propose([numpy.array(ids) for ids, _ in self.running])
            drafts = {id(ids): draft for (ids, _), draft in zip(self.running, proposed, strict=True)}
            for (ids, _), draft in zip(self.running, proposed, strict=True):
                check(ids, draft)
            self.steps += 1
        return self.done


@pytest.mark.lowest
@pytest.mark.parametrize("window", ["fixed", "kl"])
def test_proposes_the_drafters_own_continuation_of_each_request(target, drafter, window):
    lengths = []

    def check(ids, draft):
        lengths.append(len(draft))
        assert draft == predictions(drafter, ids, draft)[: len(draft)]

    batch = make_batch_drafter(drafter, 5, 256, window, cost_ratio=0.02, verification_cost=0.01)
    done = SlowEngine(target, PROMPTS, 20).run(batch, check)
    assert sorted(done) == sorted(greedy(target, prompt, 20) for prompt in PROMPTS)
    if window == "fixed":
        assert set(lengths) == {5}
    else:
        assert len(set(lengths)) > 2  # different ones from step to step; rows share their draft steps


def test_learns_what_the_engine_accepted(target, drafter):
    told, rules = [], []

    def make_rule(shared):
        rules.append(RecordingWindow(4, shared, told))
        return rules[-1]

    batch = BatchDrafter(drafter, make_rule, OnlineCosts(0.1, 0.05), 256)
    engine = SlowEngine(target, PROMPTS, 16, cut=lambda step: 1 if step % 3 == 2 else None)  # some windows are cut
    done = engine.run(batch)
    assert len(rules) == len(PROMPTS)
    # Each rule has read the text of its request, up to the last time that the request was seen.
    assert all(any(rule.text == ids[: len(rule.text)] for ids in done) for rule in rules)
    assert min(len(rule.text) for rule in rules) > 10
    expected = list(engine.rounds)
    for window, kept, kl in told:
        expected.remove((kept, kept == window))
        assert len(kl) == min(kept + 1, window) and all(value >= 0 for value in kl)
    assert len(expected) == len(PROMPTS)  # a request that ends is not seen again: nothing is learnt of its last round
    assert {window for window, _, _ in told} == {1, 4} and len({kept for _, kept, _ in told}) > 2


def test_costs_are_measured_with_windows_of_one_token_too(target, drafter):
    costs = OnlineCosts()
    assumed = costs.model.cost_ratio
    SlowEngine(target, PROMPTS[:2], 8).run(BatchDrafter(drafter, lambda shared: FixedWindow(1, shared), costs, 256))
    assert costs.model.cost_ratio != assumed and 0 < costs.model.cost_ratio <= 10


def test_divergence_is_what_the_drafter_gave_the_targets_token(drafter):
    told = []
    batch = BatchDrafter(drafter, lambda shared: RecordingWindow(3, shared, told), OnlineCosts(), 256)
    (draft,) = batch.propose([numpy.array([5, 9, 2])])
    other = (draft[1] + 1) % 64  # the target's own token where it rejects the second one
    batch.propose([numpy.array([5, 9, 2, draft[0], other])])
    with torch.no_grad():
        log_probs = drafter(torch.tensor([[5, 9, 2, draft[0]]])).logits[0].log_softmax(-1)
    ((window, accepted, kl),) = told
    assert (window, accepted) == (3, 1)
    assert kl == pytest.approx([-float(log_probs[2, draft[0]]), -float(log_probs[3, other])], rel=1e-4)


def test_stays_within_the_engines_longest_sequence(drafter):
    batch = make_batch_drafter(drafter, 5, 10, "fixed")
    proposed = batch.propose([numpy.arange(1, 1 + length) for length in (4, 7, 8, 9, 10)] + [None])
    assert [len(draft) for draft in proposed] == [5, 2, 1, 0, 0, 0]


def test_other_drafters_are_refused(target):
    with pytest.raises(ValueError, match="drafter: eagle drafters read the target's hidden states"):
        make_batch_drafter(PPOWDrafter.from_target(target, "eagle"), 5, 256)


# -- running an engine in another environment


def test_rows_are_compared_with_their_own_side():
    rows = [
        EngineRow("vLLM", tokens=100, seconds=1.0),
        EngineRow("vLLM, drafter, 5 tokens", 100, 0.5, 40, 200, 60, [24, 16, 12, 6, 2]),
        EngineRow("transformers", 100, 4.0),
        EngineRow("transformers, drafter, adaptive", 100, 2.5, 50, 100, 50, [30, 20], different_prompts=2),
    ]
    lines = [line.split() for line in format_rows(rows).splitlines()]
    assert lines[2][-10:] == ["200.0", "2.00x", "2.50", "70%", "yes", "60", "40", "30", "15", "5"]  # 1 + 60 / 40
    assert lines[3][-6:] == ["25.0", "1.00x", "1.00", "-", "yes", "-"]
    assert lines[4][-8:] == ["40.0", "1.60x", "2.00", "50%", "no", "(2)", "60", "40"]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_our_row_counts_what_the_drafter_got_right(target, drafter, batch_size):
    prompts = [torch.tensor([prompt]) for prompt in PROMPTS]
    comparison = Comparison("vllm", "python", "target", target, None, drafter, prompts, 12, [2], batch_size)
    row, outputs = own_row("ours", comparison, drafter.with_settings(window="fixed", max_window=2))
    windows = []  # accepted tokens of each
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        text = [*prompt, *output]
        assert text == greedy(target, prompt, 12)
        place = len(prompt) + 1
        while len(text) - place > 1:  # the last token is the target's own
            drafted = greedy(drafter.draft_model.model, text[:place], min(2, len(text) - place - 1))[place:]
            right = [token == text[place + i] for i, token in enumerate(drafted)]
            windows.append((len(right), (right + [False]).index(False)))
            place += windows[-1][1] + 1
    assert (row.tokens, row.drafts, row.drafted) == (72, len(windows), sum(window for window, _ in windows))
    assert row.accepted_per_position == [sum(kept > position for _, kept in windows) for position in range(2)]
    assert row.accepted == sum(row.accepted_per_position) > 0


def test_sglangs_histograms_add_up_to_positions():
    """Each ends at the most that a window of its prompt kept; the positions after are told all the same."""
    one = {"spec_verify_ct": 3, "spec_num_proposed_drafts": 12, "spec_num_correct_drafts": 4}
    other = {"spec_verify_ct": 2, "spec_num_proposed_drafts": 8, "spec_num_correct_drafts": 0}
    one["spec_correct_drafts_histogram"] = [1, 0, 2]  # one window kept nothing, two kept two tokens
    other["spec_correct_drafts_histogram"] = [2]
    found = counts([one, other], 4)
    assert found == {"drafts": 5, "drafted": 20, "accepted": 4, "accepted_per_position": [2, 2, 0, 0]}
    assert counts([{}], 0)["accepted_per_position"] == []  # without a drafter


def test_missing_environment_is_explained(monkeypatch):
    monkeypatch.delenv("PPOW_VLLM_PYTHON", raising=False)
    with pytest.raises(FileNotFoundError, match="PPOW_VLLM_PYTHON: None is no interpreter.*make_environment.sh"):
        vllm_python()
    monkeypatch.delenv("PPOW_LLAMACPP_PYTHON", raising=False)
    with pytest.raises(FileNotFoundError, match="PPOW_LLAMACPP_PYTHON: None .*make_llamacpp_environment.sh"):
        llamacpp_python()
    monkeypatch.delenv("PPOW_SGLANG_PYTHON", raising=False)
    with pytest.raises(FileNotFoundError, match="PPOW_SGLANG_PYTHON: None .*install sglang in a new one"):
        sglang_python()


def test_an_engine_that_fails_says_why():
    with pytest.raises(RuntimeError, match="No module named 'vllm'|exit code"):
        run_vllm("nowhere", [[1, 2]], 4, python=sys.executable, timeout_seconds=120)
    with pytest.raises(RuntimeError, match="llama.cpp ended with exit code 1:(.|\n)*No module named 'xllamacpp'"):
        run_llamacpp("nowhere.gguf", [[1, 2]], 4, python=sys.executable)
    with pytest.raises(RuntimeError, match="SGLang ended with exit code 1:(.|\n)*No module named 'sglang'"):
        run_sglang("nowhere", [[1, 2]], 4, python=sys.executable)
