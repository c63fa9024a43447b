"""Decoding with block drafters: the target's own text and distribution, one draft step a window, what rules read."""

import functools
import itertools

import pytest
import torch
from scipy.stats import chisquare
from test_batches import COSTS, alone, assert_rows, ragged, sampled_rows_fit, together
from test_block import K, all_variants, logits_of, make_drafter, slow_logits, slow_states, states_of
from test_loop_options import tiny
from test_sampling import p_value

from ppow_hf import PPOWDrafter
from ppow_hf.measure.calibration import calibrate
from ppow_hf.measure.costs import measure_costs
from ppow_hf.measure.draft_table import draft_tables
from ppow_hf.measure.replay import replay
from ppow_hf.runtime.cost_model import CostModel, OnlineCosts
from ppow_hf.runtime.draft_window import DrafterDistributions, Window, draft_windows, draw_tokens
from ppow_hf.runtime.estimator import AcceptanceEstimator
from ppow_hf.runtime.trace import RoundTrace
from ppow_hf.runtime.windowing import FixedWindow, make_window_rule

LENGTHS = [7, 3, 11]
NEW_TOKENS = 24


@functools.cache
def gemma3():
    return tiny("Gemma3Text", sliding_window=9, initializer_range=0.3)


@functools.cache
def learned_drafter(target, variant: str, steps: int = 60) -> PPOWDrafter:
    """A drafter that has learned much of what the target writes after the tests' prompts."""
    drafter = make_drafter(target, variant, num_hidden_layers=1).train()
    prompts = ragged(LENGTHS)[0]
    texts = [
        torch.cat([p, torch.tensor([new])], dim=1) for p, new in zip(prompts, alone(target, prompts), strict=True)
    ]
    states = [states_of(target, drafter, text) for text in texts]
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    for step in range(steps):
        text, state = texts[step % len(texts)], states[step % len(texts)]
        prefixes = torch.arange(1, text.shape[1] - K)[None]
        windows = text[0, prefixes[..., None] + 1 + torch.arange(K)]
        features = drafter(text, state, prefixes=prefixes, draft_ids=windows).window_features
        logits = drafter.draft_logits(features)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 2), windows.flatten())
        if drafter.config.confidence_head:
            right = (logits.argmax(-1) == windows).float()
            confidence = drafter.draft_model.confidence(features)
            loss = loss + torch.nn.functional.binary_cross_entropy_with_logits(confidence, right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return drafter.eval()


# -- text at T = 0


@pytest.mark.lowest
@all_variants
@pytest.mark.parametrize("window", ["kl", "fixed"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_greedy_text_is_that_of_plain_generation(make_target, family, window, variant):
    target = gemma3() if family == "gemma3" else make_target(family)
    drafter = learned_drafter(target, variant)
    prompts, ids, mask = ragged(LENGTHS)
    expected = alone(target, prompts, max_new_tokens=NEW_TOKENS)
    view = drafter.with_settings(window=window, **COSTS)
    accepted = 0
    for prompt, wanted in zip(prompts, expected, strict=True):
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        output = target.generate(prompt, assistant_model=view, **options)
        assert output[0, prompt.shape[1] :].tolist() == wanted
        accepted += view.last_trace.accepted
        assert all(r.draft_steps == min(r.window, 1) or r.window == 0 for r in view.last_trace.rounds)
        given = together(
            target, drafter, prompt, torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, window=window, **COSTS
        )
        assert given == [wanted]
        mine = drafter.last_trace.rounds
        assert [r.draft_ids for r in mine] == [r.draft_ids for r in view.last_trace.rounds]
    assert accepted > 10
    rows = together(target, drafter, ids, mask, max_new_tokens=NEW_TOKENS, window=window, **COSTS)
    assert_rows(rows, expected)
    assert sum(trace.accepted for trace in drafter.last_traces) == accepted


@all_variants
def test_drafted_tokens_are_those_of_the_reference(make_target, variant):
    target = make_target("llama")
    drafter = learned_drafter(target, variant)
    prompt = ragged(LENGTHS)[0][0]
    new = together(target, drafter, prompt, torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, window="fixed")[0]
    text, committed = [*prompt[0].tolist(), *new], prompt.shape[1] + 1
    for one_round in drafter.last_trace.rounds[1:]:
        states = states_of(target, drafter, torch.tensor([text[:committed]]))[0, :-1]
        drafted: list[int] = []
        for j in range(one_round.window):
            filled = (drafted + [0] * K)[: K - 1]
            drafted.append(int(slow_logits(drafter, states, text[committed - 1], filled)[j].argmax()))
        assert one_round.draft_ids == drafted
        committed += one_round.accepted + 1
    assert committed == len(text)


@pytest.mark.parametrize("variant", ["dflash", "dspark"])
def test_a_reduced_vocabulary_and_a_wider_target_leave_the_text_alone(make_target, variant):
    target = make_target("llama")
    prompts, ids, mask = ragged(LENGTHS)
    expected = alone(target, prompts, max_new_tokens=NEW_TOKENS)
    counts = torch.bincount(torch.tensor(list(itertools.chain(*expected))), minlength=64)
    drafter = make_drafter(target, variant, draft_vocab_size=20, token_counts=counts)
    rows = together(target, drafter, ids, mask, max_new_tokens=NEW_TOKENS, window="fixed", **COSTS)
    assert_rows(rows, expected)
    drafted = {token for trace in drafter.last_traces for r in trace.rounds for token in r.draft_ids}
    assert drafted and drafted <= set(drafter.kept_tokens.tolist())


@all_variants
@pytest.mark.parametrize("window", ["kl", "fixed"])
def test_trees_leave_the_text_as_it_is_and_cost_one_step(make_target, variant, window):
    target = make_target("llama")
    drafter = learned_drafter(target, variant)
    prompts, ids, mask = ragged(LENGTHS)
    tree = {"tree_nodes": 10, "tree_branches": 3, "window": window, **COSTS}
    rows = together(target, drafter, ids, mask, max_new_tokens=NEW_TOKENS, **tree)
    assert_rows(rows, alone(target, prompts, max_new_tokens=NEW_TOKENS))
    rounds = [r for trace in drafter.last_traces for r in trace.rounds if r.window]
    assert any(r.window > r.depth for r in rounds) and any(r.accepted > 1 for r in rounds)
    assert all(r.draft_steps == 1 and r.depth <= K for r in rounds)


def test_look_up_goes_beside_it(make_target):
    target = make_target("llama", initializer_range=0.2)
    drafter = make_drafter(target, "dspark")
    prompt = ragged([6])[0][0].repeat(1, 4)
    wanted = alone(target, [prompt], max_new_tokens=40)
    view = drafter.with_settings(lookup=True, **COSTS)
    output = target.generate(
        prompt, assistant_model=view, max_new_tokens=40, do_sample=False, attention_mask=torch.ones_like(prompt)
    )
    assert [output[0, prompt.shape[1] :].tolist()] == wanted
    assert together(target, drafter, prompt, torch.ones_like(prompt), lookup=True, **COSTS) == wanted
    assert sum(r.looked_up for r in drafter.last_trace.rounds) > 0


# -- distributions at T > 0


@all_variants
def test_windows_are_drawn_from_the_products_of_the_references_distributions(small_vocab_target, variant):
    """With a Markov head q(x_1) q(x_2 | x_1) ...: 6,000 drawn windows against all 216, each with its own scores."""
    target, rows, window = small_vocab_target, 6000, 3
    drafter = make_drafter(target, variant, block_size=window)
    text = torch.tensor([[1, 4, 2, 5]])
    states = states_of(target, drafter, text)
    session = drafter.start_session()
    session.observe(text[:, 1:].expand(rows, -1), states[:, :-1].expand(rows, -1, -1), 1)
    torch.manual_seed(0)
    windows = [Window(FixedWindow(window, OnlineCosts()), RoundTrace(0, 0, []), window) for _ in range(rows)]
    distributions = DrafterDistributions(session, lambda logits, drafts: logits, draw_tokens, looks=False)
    draft_windows(windows, distributions)
    drawn = torch.tensor([one.record.draft_ids for one in windows])
    scores = torch.stack(distributions.scores, dim=1).log_softmax(-1)
    block, observed, expected = slow_states(drafter, states[0, :-1], 5), [], []
    for tokens in itertools.product(range(6), repeat=window):
        log_probs = logits_of(drafter, block, 5, list(tokens[:-1])).log_softmax(-1)
        expected.append(rows * log_probs[range(window), list(tokens)].sum().exp().item())
        same = (drawn == torch.tensor(tokens)).all(1)
        observed.append(int(same.sum()))
        if observed[-1]:
            torch.testing.assert_close(scores[same][0], log_probs, rtol=1e-4, atol=1e-4)
    large = [place for place, count in enumerate(expected) if count >= 5]
    pairs = [(observed[place], expected[place]) for place in large]
    pairs.append((rows - sum(o for o, _ in pairs), rows - sum(e for _, e in pairs)))
    counts, wanted = zip(*(pair for pair in pairs if pair[1] > 1), strict=True)
    assert chisquare(counts, [w * sum(counts) / sum(wanted) for w in wanted]).pvalue > 1e-4


@pytest.mark.parametrize(
    ("variant", "window", "ending"), [("dspark", "fixed", "none"), ("dspark", "kl", "eos"), ("dflash", "kl", "none")]
)
def test_sampled_text_is_distributed_as_the_targets(small_vocab_target, variant, window, ending):
    drafter = make_drafter(small_vocab_target, variant, block_size=3)
    view = drafter.with_settings(window=window, cost_ratio=0.02, verification_cost=0.01)
    traces: list = []
    assert p_value(small_vocab_target, view, 400, ending, traces) > 1e-4
    rounds = [r for trace in traces for r in trace.rounds]
    assert any(r.accepted > 0 for r in rounds) and any(r.accepted < r.window for r in rounds)


@pytest.mark.parametrize("trees", [False, True], ids=["chains", "trees"])
@pytest.mark.parametrize("window", ["kl", "fixed"])
@pytest.mark.parametrize("variant", ["dflash", "dspark"])
def test_rows_of_a_batch_are_sampled_from_the_targets_distribution(small_vocab_target, variant, window, trees):
    drafter = make_drafter(small_vocab_target, variant, block_size=3)
    settings = {"tree_nodes": 8, "tree_branches": 3} if trees else {}
    costs = {"cost_ratio": 0.02, "verification_cost": 0.01}
    assert sampled_rows_fit(small_vocab_target, drafter, copies=300, calls=2, window=window, **settings, **costs)
    assert sum(t.drafted - t.accepted for t in drafter.last_traces) > 0, "nothing was rejected"


# -- what a window costs, and the confidence head


def test_one_step_drafts_a_window_whatever_its_length():
    costs = CostModel(0.5, 0.1, one_step=True)
    assert [costs.round_cost(window) for window in (0, 1, 4)] == pytest.approx([1.0, 1.6, 1.9])
    assert costs.speedup(0.8, 4) == pytest.approx((1 - 0.8**5) / 0.2 / 1.9)
    # A step's price is that of a window: it pays for long ones where it does not for one token.
    speeds = [costs.speedup(0.8, window) for window in range(17)]
    assert speeds.index(max(speeds)) == 7  # 4.16 / 2.2
    by_token = [CostModel(0.5, 0.1).speedup(0.8, window) for window in range(17)]
    assert by_token.index(max(by_token)) == 1


@pytest.mark.parametrize(("gamma", "drafts"), [(0.3, True), (3.0, True), (8.0, False)])
def test_the_rule_begins_a_window_where_all_its_tokens_together_pay(gamma, drafts):
    for limit, pays in ((16, drafts), (2, gamma == 0.3)):
        rule = make_window_rule("kl", 16, OnlineCosts(gamma, 0.0, CostModel(gamma, 0.0, one_step=True)))
        rule._first_acceptance = rule._acceptance = 0.9  # 16 tokens of it are worth about 7.3, two of them 1.7
        assert rule.start(limit) == limit * pays


def test_a_given_confidence_decides_how_long_windows_are(make_target):
    target = make_target("llama")
    prompts, ids, mask = ragged(LENGTHS)
    expected = alone(target, prompts, max_new_tokens=NEW_TOKENS)
    drafter = learned_drafter(target, "dspark")
    head = drafter.draft_model.confidence_head.proj
    before = head.weight.detach().clone(), head.bias.detach().clone()
    lengths = []
    try:
        for log_odds in (-3.0, 6.0):
            with torch.no_grad():
                head.weight.zero_()
                head.bias.fill_(log_odds)
            costs = {"cost_ratio": 0.05, "verification_cost": 0.2}
            assert_rows(together(target, drafter, ids, mask, max_new_tokens=NEW_TOKENS, **costs), expected)
            rounds = [r for trace in drafter.last_traces for r in trace.rounds[1:6]]
            lengths.append(sum(r.window for r in rounds) / len(rounds))
            assert all(features[-1] == log_odds for r in rounds for features in r.features)
    finally:
        with torch.no_grad():
            head.weight.copy_(before[0])
            head.bias.copy_(before[1])
    assert lengths[0] <= 1 < 2 < lengths[1]


def test_calibration_weighs_the_confidence_head(make_target):
    target = make_target("llama")
    drafter = learned_drafter(target, "dspark")
    prompts = [prompt[0].tolist() for prompt in ragged(LENGTHS)[0]]
    calibration = calibrate(target, drafter, prompts, max_new_tokens=NEW_TOKENS)
    assert set(calibration) == {"greedy", "sampling", "costs"}
    for name in ("greedy", "sampling"):
        assert calibration[name]["weights"]["predicted"] != 0.0
    plain = calibrate(
        target, learned_drafter(target, "dflash"), prompts, max_new_tokens=NEW_TOKENS, temperatures=(0.0,)
    )
    assert plain["greedy"]["weights"]["predicted"] == 0.0


def test_an_estimate_that_nobody_fitted_is_the_heads_own():
    estimator = AcceptanceEstimator.default(confidence_head=True)
    features = AcceptanceEstimator.features(0.1, 3.0, 5.0, 2, second_probability=0.09, predicted=1.5)
    assert estimator.probability(features) == pytest.approx(1 / (1 + torch.tensor(-1.5).exp().item()))


@pytest.mark.parametrize("variant", ["dflash", "dspark"])
def test_a_table_of_drafts_replays_what_decoding_does(make_target, variant):
    target = make_target("llama")
    drafter = learned_drafter(target, variant)
    prompts = ragged(LENGTHS)[0]
    costs = CostModel(COSTS["cost_ratio"], COSTS["verification_cost"], one_step=True)
    for prompt, table in zip(prompts, draft_tables(target, drafter, prompts, NEW_TOKENS, K), strict=True):
        given = OnlineCosts(costs.cost_ratio, costs.verification_cost, costs)
        rule = make_window_rule("kl", K, given, confidence_head=drafter.config.confidence_head)
        together(target, drafter, prompt, torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, **COSTS)
        replayed, live = replay(rule, table).rounds[1:], drafter.last_trace.rounds[1:]
        assert [(r.window, r.draft_steps, r.accepted) for r in replayed] == [
            (r.window, r.draft_steps, r.accepted) for r in live
        ]


def test_measured_costs_are_those_of_a_whole_block(make_target):
    target = make_target("llama")
    costs = measure_costs(target, make_drafter(target, "dspark"), torch.tensor([[1, 2, 3]]), max_window=K, repeats=3)
    assert costs.draft_step_seconds > 0 and costs.cost_ratio > 0
