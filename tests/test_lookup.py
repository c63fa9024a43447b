"""Drafts from the text itself: what is looked up, when it is drafted, and that no token and no probability changes."""

import functools
import itertools
import random
from collections import Counter

import pytest
import torch
from own_loop import generate_by_loop
from test_batches import alone, assert_rows, make_drafter, noisy_copy, ragged, together
from test_sampling import chi_square_p_value
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from ppow_hf import PPOWDrafter, PPOWDrafterConfig
from ppow_hf.runtime import acceptance, draft_window
from ppow_hf.runtime.cost_model import OnlineCosts
from ppow_hf.runtime.draft_session import DraftSession
from ppow_hf.runtime.estimator import AcceptanceEstimator
from ppow_hf.runtime.lookup import (
    DIFFERENT,
    LONGEST_MATCH,
    LOOKBACK,
    NEW,
    REPEATED,
    LookupAcceptance,
    LookupToken,
    TextMemory,
)
from ppow_hf.runtime.windowing import KLAdaptiveWindow, LookupWindow, make_window_rule
from ppow_hf.tiny import drafter_path, target_path

COSTS = {"cost_ratio": 0.1, "verification_cost": 0.02}  # given, so that nothing here depends on the clock
UNSURE = AcceptanceEstimator.features(0.3, 2.0, 1.0, 0)
both_architectures = pytest.mark.parametrize("architecture", ["eagle", "standalone"])


def looked_up(traces) -> tuple[int, int]:
    """How many tokens from the text were accepted, and how many rounds rejected one."""
    accepted = rejected = 0
    for one_round in (r for trace in traces for r in trace.rounds):
        kept = one_round.accepted - (one_round.window - one_round.looked_up)
        accepted += max(kept, 0)
        rejected += 0 <= kept < one_round.looked_up
    return accepted, rejected


# -- what a text suggests


def slow_look_up(text, drafted):
    """By scanning the text: the last places of the longest run, then how far back both sides are the same."""
    whole = text + drafted
    for length in range(min(LOOKBACK, len(whole)), 0, -1):
        run = whole[len(whole) - length :]
        places = [i for i in range(length, len(text)) if text[i - length : i] == run]
        if places:
            before = zip(reversed(text[: places[-1]]), reversed(whole), strict=False)
            match = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], before)))
            followed = [text[place] for place in places[-2:]]
            history = NEW if len(places) == 1 else REPEATED if followed[0] == followed[1] else DIFFERENT
            return LookupToken(followed[-1], min(match, LONGEST_MATCH), history)
    return None


def test_token_from_the_text_is_what_a_scan_of_the_text_finds():
    rng = random.Random(0)
    seen = set()
    for _ in range(150):
        text = [rng.randrange(3) for _ in range(rng.randint(0, 30))] * rng.randint(1, 3)
        memory, read = TextMemory(), 0
        while read < len(text):  # in pieces, as rounds commit it
            step = rng.randint(1, 6)
            memory.read(text[read : read + step])
            read += step
        for drafted in ([], [1], [2, 0], [rng.randrange(3) for _ in range(7)]):
            expected = slow_look_up(text, drafted)
            assert memory.look_up(drafted) == expected, (text, drafted)
            seen.add(expected and (expected.history, expected.match > LOOKBACK))
    assert len(seen) == 7  # every history with short and long matches, and nothing at all


def test_estimates_converge_to_what_is_seen_and_leave_others_alone():
    rng, estimate = random.Random(0), LookupAcceptance()
    often, other = LookupToken(5, 4, NEW), LookupToken(5, 4, REPEATED)
    untouched, values = estimate.probability(other), []
    for chance in (0.2, 0.9):
        for _ in range(1500):
            estimate.observe(often, 5 if rng.random() < chance else 6)
            values.append(estimate.probability(often))
        assert sum(values[-1000:]) / 1000 == pytest.approx(chance, abs=0.04)
    assert estimate.probability(other) == untouched
    assert estimate.probability(LookupToken(0, 5, NEW)) == estimate.probability(often)  # 4 and 5 are counted together


# -- the rule


def lookup_rule(**costs) -> LookupWindow:
    given = COSTS | costs
    rule = make_window_rule("kl", 10, OnlineCosts(given["cost_ratio"], given["verification_cost"]), lookup=True)
    assert isinstance(rule, LookupWindow)
    return rule


def test_rule_drafts_a_repeated_text_without_the_drafter_and_goes_on_round_the_loop():
    rule = lookup_rule()
    rule.read([1, 2, 3, 4, 5, 6] * 4)
    assert rule.start(100) == 0
    assert rule.look_up([], 100) == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4]  # max_window of them
    assert rule.look_up([1, 2], 5) == [3, 4, 5]
    assert rule.look_up([9], 100) == []
    assert rule.look_up([], 0) == [] and rule.start(0) == 0


def test_rule_leaves_a_new_text_to_the_drafter():
    rule, without = lookup_rule(), KLAdaptiveWindow(10, OnlineCosts(*COSTS.values()))
    for one in (rule, without):
        one.read(list(range(40)))
    assert rule.start(100) == without.start(100) == 10
    assert rule.look_up([], 100) == [] and not rule.prefers_text([])


def test_rule_stops_looking_up_where_the_text_turned_out_not_to_repeat_itself():
    rule, rng = lookup_rule(verification_cost=0.1), random.Random(0)
    lengths = []
    for _ in range(400):
        rule.start(100)
        lengths.append(len(rule.look_up([], 100)))
        rule.update(0, 0, 0, [])
        rule.update_looked_up(lengths[-1], 0)
        rule.read([rng.randrange(6)])
    # Right once in six times, at a price of a tenth and more: a token or so is still worth it, a chain is not.
    assert sum(lengths[:100]) / 100 > 2 and sum(lengths[-200:]) / 200 < 1.7
    repeating = lookup_rule(verification_cost=0.1)
    repeating.read([rng.randrange(6) for _ in range(100)] + [1, 2, 3, 4, 5, 0] * 20)
    assert len(repeating.look_up([], 100)) == 10


@pytest.mark.parametrize(("price", "length"), [(0.0, 10), (1e6, 0)])
def test_chain_from_the_text_is_as_long_as_its_verification_is_worth(price, length):
    rule = lookup_rule(verification_cost=price)
    rule.read([1, 2, 3] * 20)
    rule.start(100)
    assert len(rule.look_up([], 100)) == length


def test_rounds_from_the_text_say_nothing_about_the_drafter_but_let_it_have_a_try():
    rule = lookup_rule()
    rule.read([1, 2, 3] * 20)
    estimate, divergence, tries = rule.acceptance_probability(UNSURE), rule.lagged_kl, 0
    for _ in range(200):
        if rule.start(100):
            tries += 1
        tokens = rule.look_up([], 100)
        rule.update(0, 0, 0, [])
        rule.update_looked_up(len(tokens), len(tokens))
        rule.read([*tokens, *rule.look_up(tokens, len(tokens) + 1)])
    assert rule.acceptance_probability(UNSURE) == estimate and rule.lagged_kl == divergence
    assert 4 <= tries <= 20


# -- greedy output


def loops(lengths, repeats: int = 4, seed: int = 0):
    """Prompts that say the same few tokens again and again, padded: list of `[1, n]`, ids and mask."""
    prompts, _, _ = ragged(lengths, seed=seed)
    prompts = [prompt.repeat(1, repeats) for prompt in prompts]
    longest = max(prompt.shape[1] for prompt in prompts)
    pad = torch.nn.functional.pad
    ids = torch.cat([pad(prompt, (longest - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.cat([pad(torch.ones_like(prompt), (longest - prompt.shape[1], 0)) for prompt in prompts])
    return prompts, ids, mask


@pytest.mark.lowest
@both_architectures
def test_greedy_text_is_what_plain_generate_writes(make_target, architecture):
    target = make_target("llama", initializer_range=0.2)
    drafter = make_drafter(target, architecture)
    prompts, ids, mask = loops([6, 3, 4, 7])
    expected = alone(target, prompts)
    traces = []
    view = drafter.with_settings(lookup=True, **COSTS)
    for prompt, wanted in zip(prompts[:2], expected, strict=False):
        options = {"max_new_tokens": 40, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        one = target.generate(prompt, assistant_model=view, **options)
        assert one[0, prompt.shape[1] :].tolist() == wanted
        traces.append(view.last_trace)
        # Our own loop drafts the same for a prompt alone.
        assert together(target, drafter, prompt, torch.ones_like(prompt), lookup=True, **COSTS) == [wanted]
        mine = drafter.last_trace.rounds
        assert [(r.draft_ids, r.looked_up) for r in mine] == [(r.draft_ids, r.looked_up) for r in traces[-1].rounds]
    given = together(target, drafter, ids, mask, lookup=True, **COSTS)
    assert_rows(given, expected)
    traces += drafter.last_traces
    accepted, rejected = looked_up(traces)
    assert accepted and rejected
    for one_round in (r for trace in traces for r in trace.rounds):
        own = one_round.window - one_round.looked_up
        assert one_round.window == len(one_round.draft_ids) <= 10
        assert len(one_round.features) == len(one_round.acceptance_probabilities) == own
        assert len(one_round.kl) == min(one_round.accepted + 1, own)
        assert one_round.draft_steps == 0 or one_round.draft_steps >= own


def test_a_round_in_which_every_row_looks_up_takes_no_draft_step(make_target, monkeypatch):
    target = make_target("llama", initializer_range=0.2)
    drafter = make_drafter(target, "eagle")
    counts = Counter()
    for name in ("observe", "first_logits"):
        original = getattr(DraftSession, name)

        def counting(self, *args, _name=name, _original=original, **options):
            counts[_name] += 1
            return _original(self, *args, **options)

        monkeypatch.setattr(DraftSession, name, counting)
    _, ids, mask = loops([6, 6])
    together(target, drafter, ids, mask, lookup=True, **COSTS)
    by_round = list(itertools.zip_longest(*(trace.rounds for trace in drafter.last_traces)))
    drafting = [any(r is not None and r.draft_steps for r in rounds) for rounds in by_round]
    looking = [any(r is not None and r.looked_up for r in rounds) for rounds in by_round]
    mixed = [any(r is not None and r.looked_up and not r.draft_steps for r in rounds) for rounds in by_round]
    assert counts["observe"] == counts["first_logits"] == sum(drafting)
    assert any(look and not draft for look, draft in zip(looking, drafting, strict=True))
    assert any(mix and draft for mix, draft in zip(mixed, drafting, strict=True))


# -- the embedded pair, which copies what it has read


@functools.cache
def embedded():
    target = AutoModelForCausalLM.from_pretrained(target_path(), dtype=torch.float32).eval()
    return target, PPOWDrafter.from_pretrained(drafter_path("tiny-eagle"), dtype=torch.float32).eval()


@functools.cache
def repeating_code(count: int) -> list[torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(target_path())
    names = ["alpha", "width", "count"][:count]
    texts = ["".join(f"        self.{n}{i} = {n}{i}\n        self.check({n}{i})\n" for i in "123") for n in names]
    return [tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].long() for text in texts]


def copied_code() -> torch.Tensor:
    """A function twice, and the beginning of it a third time: the target goes on copying it."""
    function = (
        "def read(self, size=-1):\n    if size is None or size < 0:\n        return self.read_all()\n    data = b''\n"
    )
    function += "    while len(data) < size:\n        data += self.raw.read(size - len(data))\n    return data\n\n"
    ids = AutoTokenizer.from_pretrained(target_path())(2 * function + function[:60], add_special_tokens=False)
    return torch.tensor([ids["input_ids"]])


def test_embedded_pair_writes_what_plain_generate_writes():
    target, drafter = embedded()
    prompts = repeating_code(2)
    longest = max(prompt.shape[1] for prompt in prompts)
    padded = [torch.nn.functional.pad(prompt, (longest - prompt.shape[1], 0), value=1) for prompt in prompts]
    masks = [(torch.arange(longest) >= longest - prompt.shape[1]).long()[None] for prompt in prompts]
    options = {"max_new_tokens": 48, "pad_token_id": 1}
    expected = alone(target, prompts, **options)
    given = together(target, drafter, torch.cat(padded), torch.cat(masks), lookup=True, **COSTS, **options)
    assert_rows(given, expected, pad=1)
    assert looked_up(drafter.last_traces)[0]


class StopAfter(StoppingCriteria):
    """Stops at the first new token that is `token`."""

    def __init__(self, token: int, prompt_length: int):
        self.token, self.prompt_length = token, prompt_length

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, self.prompt_length :] == self.token).any(-1)


@pytest.mark.parametrize("stop", ["eos_token_id", "stopping_criteria"])
def test_text_ends_where_it_should_inside_tokens_from_the_text(stop):
    target, drafter = embedded()
    prompt = copied_code()
    options = {"do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 1, "max_new_tokens": 32}
    view = drafter.with_settings(lookup=True, **COSTS)
    written = target.generate(prompt, assistant_model=view, eos_token_id=-1, **options)[0, prompt.shape[1] :].tolist()
    inside, place = [], 0  # tokens that first came as the second or a later one of a chain from the text
    for r in view.last_trace.rounds:
        own = r.window - r.looked_up
        inside += [w for w in written[place + own + 1 : place + r.accepted] if w not in written[: place + own + 1]]
        place += r.accepted + 1
    assert inside
    end: dict = {"eos_token_id": inside[0]}
    if stop == "stopping_criteria":
        end = {"stopping_criteria": StoppingCriteriaList([StopAfter(inside[0], prompt.shape[1])]), "eos_token_id": -1}
    expected = target.generate(prompt, **options, **end)
    assert expected.shape[1] == prompt.shape[1] + written.index(inside[0]) + 1
    assert torch.equal(target.generate(prompt, assistant_model=view, **options, **end), expected)
    assert looked_up([view.last_trace])[0]
    assert torch.equal(generate_by_loop(target, drafter, prompt, lookup=True, **COSTS, **options, **end), expected)
    assert looked_up([drafter.last_trace])[0]


# -- sampled output: whole continuations against exact enumeration

PROMPT = torch.tensor([[1, 4, 2, 5, 1, 4, 2, 5, 1, 4]])
LENGTH, NEW_TOKENS, EOS = 4, 5, 3
RUNS, ALPHA = {True: 3000, False: 600}, 1e-4  # in our own loop, and with `assistant_model`
SAMPLED = {"lookup": True, "max_window": 3, "cost_ratio": 0.05, "verification_cost": 0.01}
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "max_new_tokens": NEW_TOKENS}


@torch.no_grad()
def exact_distribution(target) -> dict[tuple[int, ...], float]:
    """Probability of every continuation of `LENGTH` tokens, or fewer up to EOS."""
    distribution, beginnings = {}, {(): 1.0}
    for length in range(1, LENGTH + 1):
        ids = torch.tensor([[*PROMPT[0].tolist(), *beginning] for beginning in beginnings])
        probabilities = (target(ids).logits[:, -1].double() / SAMPLING["temperature"]).softmax(-1)
        following = {}
        for (beginning, weight), row in zip(beginnings.items(), probabilities.tolist(), strict=True):
            for token, probability in enumerate(row):
                ended = length == LENGTH or token == EOS
                (distribution if ended else following)[(*beginning, token)] = weight * probability
        beginnings = following
    return distribution


def until_eos(tokens: list[int]) -> tuple[int, ...]:
    return tuple(tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens)


def p_value(target, drafter, own_loop: bool, traces: list | None = None, runs: int | None = None) -> float:
    runs = RUNS[own_loop] if runs is None else runs
    counts: Counter = Counter()
    torch.manual_seed(0)
    options = SAMPLING | {"eos_token_id": EOS, "pad_token_id": 0}
    copies = runs // 10 if own_loop else 1
    ids = PROMPT.repeat(copies, 1)
    for _ in range(runs // copies):
        view = drafter.with_settings(**SAMPLED)
        way = {"custom_generate": view.generate_with()} if own_loop else {"assistant_model": view}
        output = target.generate(ids, attention_mask=torch.ones_like(ids), **way, **options)
        counts.update(until_eos(row)[:LENGTH] for row in output[:, ids.shape[1] :].tolist())
        if traces is not None:
            traces += way["custom_generate"].last_traces if own_loop else [view.last_trace]
    return chi_square_p_value(counts, exact_distribution(target))


@pytest.mark.parametrize("own_loop", [True, False], ids=["own loop", "assistant_model"])
def test_sampled_continuations_are_distributed_as_the_targets(small_vocab_target, own_loop):
    traces: list = []
    drafter = noisy_copy(small_vocab_target, 0.4)
    assert p_value(small_vocab_target, drafter, own_loop, traces=traces) > ALPHA
    accepted, rejected = looked_up(traces)
    assert min(accepted, rejected) > RUNS[own_loop] / 10
    rounds = [r for trace in traces for r in trace.rounds]
    assert any(0 < r.looked_up < r.window for r in rounds)  # after the drafter's own
    assert any(0 < r.looked_up == r.window for r in rounds)  # in its place


@pytest.mark.slow
@pytest.mark.parametrize("own_loop", [True, False], ids=["own loop", "assistant_model"])
def test_many_sampled_continuations_are_distributed_as_the_targets(small_vocab_target, own_loop):
    assert p_value(small_vocab_target, noisy_copy(small_vocab_target, 0.4), own_loop, runs=10_000) > ALPHA


@pytest.mark.slow
def test_keeping_tokens_from_the_text_as_if_drawn_evenly_fails_the_check(small_vocab_target, monkeypatch):
    even = lambda tokens, width, device: torch.zeros(len(tokens), width)  # noqa: E731
    monkeypatch.setattr(draft_window, "one_hot_scores", even)
    assert p_value(small_vocab_target, noisy_copy(small_vocab_target, 0.4), own_loop=True) < ALPHA
    assert p_value(small_vocab_target, noisy_copy(small_vocab_target, 0.4), own_loop=False) < ALPHA


def test_drawing_from_the_target_without_removing_a_rejected_token_fails_the_check(small_vocab_target, monkeypatch):
    monkeypatch.setattr(acceptance, "residual_distribution", lambda target_probs, draft_probs: target_probs)
    assert p_value(small_vocab_target, noisy_copy(small_vocab_target, 0.4), own_loop=True) < ALPHA


# -- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lookup": 1}, "lookup: 1 is not True or False"),
        ({"lookup": True, "window": "fixed"}, "lookup: .* window='fixed' was given"),
        ({"lookup": True, "tree_nodes": 8}, "lookup: .* tree_nodes=8 was given"),
    ],
)
def test_settings_that_do_not_go_together_raise_an_error(make_target, settings, message):
    drafter = make_drafter(make_target("llama"), "eagle")
    with pytest.raises(ValueError, match=message):
        drafter.with_settings(**settings)
    with pytest.raises(ValueError, match=message):
        drafter.generate_with(**settings)


def test_configuration_keeps_the_setting_and_other_calls_go_without(make_target, tmp_path):
    with pytest.raises(ValueError, match="lookup: .* window='heuristic' was given"):
        PPOWDrafterConfig(lookup=True, window="heuristic")
    target = make_target("llama", initializer_range=0.2)
    drafter = make_drafter(target, "eagle")
    drafter.config.lookup = True
    drafter.save_pretrained(tmp_path)
    loaded = PPOWDrafter.from_pretrained(tmp_path).eval()
    prompts, ids, mask = loops([5])
    expected = alone(target, prompts, max_new_tokens=12)
    found = {}
    for name, settings in {"own": {}, "fixed": {"window": "fixed"}, "tree": {"tree_nodes": 6}}.items():
        assert together(target, loaded, ids, mask, max_new_tokens=12, **COSTS, **settings) == expected
        found[name] = sum(r.looked_up for r in loaded.last_trace.rounds)
    assert found["own"] > 0 and found["fixed"] == found["tree"] == 0
