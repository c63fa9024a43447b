"""With a reduced draft vocabulary: divergences on the draft vocabulary, and the target's mass outside it beside them.

The reference is always ten lines of plain forwards.
"""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from ppow_hf import PPOWDrafter, tiny
from ppow_hf.measure.draft_table import draft_tables
from ppow_hf.measure.evaluation import decode, report
from ppow_hf.measure.replay import replay
from ppow_hf.runtime.acceptance import divergence_on_support, kl_divergence
from ppow_hf.runtime.cost_model import OnlineCosts
from ppow_hf.runtime.generation import divergences
from ppow_hf.runtime.modeling_ppow import collect_target_states
from ppow_hf.runtime.windowing import FixedWindow, KLAdaptiveWindow

SHARES = [0.1, 0.5]
COSTS = {"cost_ratio": 0.12, "verification_cost": 0.04}


def reduced_drafter(target, share: float) -> PPOWDrafter:
    """An untrained eagle drafter with `share` of the target's vocabulary."""
    vocab_size = target.get_output_embeddings().weight.shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        counts = torch.randperm(vocab_size)
        return PPOWDrafter.from_target(target, draft_vocab_size=int(share * vocab_size), token_counts=counts).eval()


@pytest.fixture(scope="module")
def target(make_target):
    return make_target("llama", initializer_range=0.2)


@pytest.fixture(scope="module", params=["random", "embedded"])
def any_target(request, target):
    if request.param == "random":
        return target
    return AutoModelForCausalLM.from_pretrained(tiny.target_path(), dtype="float32").eval()


@torch.no_grad()
def distributions(target, drafter, known: torch.Tensor, draft_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """P and Q at each of `draft_ids` after the tokens `known` `[1, n]`, `[W, V]` each, from plain forwards."""
    drafted = torch.cat([known, torch.tensor([draft_ids])], dim=1)
    target_probs = target(drafted).logits[0, known.shape[1] - 1 : -1].softmax(-1)
    states = collect_target_states(
        target(known, output_hidden_states=True).hidden_states, drafter.config.target_layer_ids
    )
    features = drafter(
        known, states, prefixes=torch.tensor([[known.shape[1] - 1]]), draft_ids=torch.tensor([[draft_ids]])
    ).window_features
    draft_probs = torch.zeros_like(target_probs)
    draft_probs[:, drafter.kept_tokens] = drafter.draft_logits(features)[0, 0].softmax(-1)
    return target_probs, draft_probs


def reference(target_probs: torch.Tensor, draft_probs: torch.Tensor) -> tuple[float, float]:
    """KL(P_D||Q) and m by a loop over tokens, `[V]` each."""
    inside = [(float(p), float(q)) for p, q in zip(target_probs, draft_probs, strict=True) if q > 0]
    mass = sum(p for p, _ in inside)
    return sum(p / mass * math.log(p / mass / q) for p, q in inside if p > 0), 1 - mass


@pytest.mark.parametrize("share", SHARES)
def test_divergence_and_mass_equal_a_loop_over_tokens(share):
    random = torch.Generator().manual_seed(1)
    target_scores, draft_scores = 3 * torch.randn(2, 5, 40, generator=random)
    draft_scores[:, int(share * 40) :] = -math.inf
    found, outside = divergence_on_support(target_scores, draft_scores)
    for row in range(5):
        kl, mass = reference(target_scores[row].softmax(-1), draft_scores[row].softmax(-1))
        assert found[row].item() == pytest.approx(kl, abs=1e-5) and outside[row].item() == pytest.approx(
            mass, abs=1e-5
        )
        target_probs, draft_probs = target_scores[row].softmax(-1), draft_scores[row].softmax(-1)
        inside = draft_probs > 0
        restricted = (target_probs * inside) / (target_probs * inside).sum()
        backward = (restricted * (restricted / target_probs).log())[inside].sum()  # KL(P_D||P)
        assert -math.log1p(-outside[row].item()) == pytest.approx(backward.item(), abs=1e-4)


def test_a_full_vocabulary_is_left_as_it_was_and_no_mass_inside_is_the_cap():
    scores = torch.randn(2, 3, 7, 30, generator=torch.Generator().manual_seed(2))
    found, outside = divergence_on_support(*scores)
    assert torch.equal(found, kl_divergence(scores[0].log_softmax(-1), scores[1].log_softmax(-1)))
    assert torch.equal(outside, torch.zeros(3, 7))
    apart = torch.tensor([[0.0, 0.0, -math.inf, -math.inf], [0.0, 0.0, -math.inf, 0.0]])
    kl, mass = divergences(apart, apart.flip(-1).masked_fill(torch.tensor([False, False, True, True]), -math.inf))
    assert kl[0] == 20.0 and mass[0] == 1.0 and kl[1] == 0.0 and mass[1] == pytest.approx(2 / 3)


@pytest.mark.parametrize("own_loop", [False, True])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("share", SHARES)
def test_traced_divergence_and_mass_are_those_of_plain_forwards(any_target, share, do_sample, own_loop):
    target, drafter = any_target, reduced_drafter(any_target, share)
    prompt = torch.tensor([[5, 9, 2, 33, 7, 1, 40, 3]])
    view = drafter.with_settings(window="fixed", max_window=3, **COSTS)
    way = {"custom_generate": (view := view.generate_with())} if own_loop else {"assistant_model": view}
    torch.manual_seed(4)
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0} if do_sample else {"do_sample": False}
    output = target.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, eos_token_id=None, **sampling, **way
    )
    place, lagged, checked = prompt.shape[1], 1.0, 0
    for r in view.last_trace.rounds:
        if r.window:
            lagged_features = [features[2] for features in r.features]
            assert lagged_features == pytest.approx([math.log(0.01 + lagged)] * len(r.features), abs=1e-2)
            target_probs, draft_probs = distributions(target, drafter, output[:, :place], r.draft_ids)
            assert len(r.kl) == len(r.outside) == min(r.accepted + 1, r.window)
            for position, (kl, mass) in enumerate(zip(r.kl, r.outside, strict=True)):
                expected = reference(target_probs[position], draft_probs[position])
                assert (kl, mass) == pytest.approx(expected, abs=2e-3) and 0 < mass < 1
                acceptance = torch.minimum(target_probs[position], draft_probs[position]).sum().item()
                assert acceptance <= 1 - mass + 1e-4
                accounted = min(expected[0] - math.log1p(-expected[1]), 20.0)
                assert r.kl_with_outside[position] == pytest.approx(kl - math.log1p(-mass))
                lagged = 0.7 * lagged + 0.3 * accounted
                checked += 1
        place += r.accepted + 1
    assert checked > 10 and lagged != 1.0


@pytest.mark.parametrize("share", SHARES)
def test_trees_and_reports_have_the_mass_too(target, share):
    drafter = reduced_drafter(target, share)
    prompts = [[5, 9, 2, 33], [7, 1, 40, 3]]
    outputs, traces = decode(
        target, drafter, prompts, 16, batch_size=2, window="fixed", max_window=3, tree_nodes=6, **COSTS
    )
    for prompt, output, trace in zip(prompts, outputs, traces, strict=True):
        place = 0
        for r in trace.rounds:
            if r.window:
                known = torch.tensor([prompt + output[:place]])
                expected = reference(*(probs[0] for probs in distributions(target, drafter, known, r.draft_ids[:1])))
                assert (r.kl[0], r.outside[0]) == pytest.approx(expected, abs=2e-3) and len(r.kl) == len(r.outside)
            place += r.accepted + 1
    found = report(outputs, traces)
    masses = [mass for trace in traces for r in trace.rounds for mass in r.outside]
    assert 0 < found.outside < 1 and found.outside == pytest.approx(sum(masses) / len(masses)) and found.kl < 20


def test_a_replayed_table_leaves_what_decoding_leaves(target):
    drafter, prompt = reduced_drafter(target, 0.5), [5, 9, 2, 33]
    (table,) = draft_tables(target, drafter, [torch.tensor([prompt])], max_new_tokens=20, depth=4)
    _, (decoded,) = decode(target, drafter, [prompt], 20, window="fixed", max_window=4, **COSTS)
    replayed = replay(FixedWindow(4, OnlineCosts(0.12, 0.04)), table, record=True)
    assert len(replayed.rounds) == len(decoded.rounds) > 3
    for ours, theirs in zip(replayed.rounds, decoded.rounds, strict=True):
        assert ours.kl == pytest.approx(theirs.kl, abs=1e-3)
        assert ours.outside == pytest.approx(theirs.outside, abs=1e-4)
        assert len(ours.features) == len(theirs.features)
        for one, other in zip(ours.features, theirs.features, strict=True):
            assert one == pytest.approx(other, abs=2e-2)


def test_more_mass_outside_means_more_doubt():
    estimates = []
    for mass in (0.0, 0.3, 0.9):
        rule = KLAdaptiveWindow(5, OnlineCosts(0.12, 0.04))
        rule.update(0, 0, 0, [0.1 - math.log1p(-mass)] * 5)
        estimates.append(rule.acceptance_probability(rule.describe(0.6, 0.2, 1.0, 3, [])))
    assert estimates[0] > estimates[1] > estimates[2]
