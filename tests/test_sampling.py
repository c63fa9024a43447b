"""Sampled output is distributed as the target's: counts of whole continuations against exact enumeration.

The reference applies temperature, top-k and top-p in a few lines of its own. Broken acceptance must fail the check.
"""

import copy
import functools
from collections import Counter

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import ppow_hf.hook as candidate_generator
from ppow_hf import PPOWDrafter
from ppow_hf.candidate_generator import KLAdaptiveCandidateGenerator, PendingTokenVerifier

VOCABULARY = 6
LENGTH = 4  # joint distribution of so many tokens
NEW_TOKENS = 5  # so that a window of 3 fits after the first one, which is never drafted
TEMPERATURE, TOP_K, TOP_P = 0.6, 5, 0.95
PROMPT = torch.tensor([[1, 4, 2, 5]])
ALPHA = 1e-4
RUNS = 500  # of each case that is not marked slow
COSTS = {"cost_ratio": 0.02, "verification_cost": 0.01}

both_architectures = pytest.mark.parametrize("architecture", ["eagle", "standalone"])


# -- the reference


def processed(logits: torch.Tensor) -> torch.Tensor:
    """Logits `[6]` -> probabilities after temperature, top-k and top-p, by the definitions."""
    probabilities = (logits.double() / TEMPERATURE).softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    kept = order[:TOP_K]
    total = sum(probabilities[token].item() for token in kept)
    nucleus, mass = [], 0.0
    for token in kept:
        if mass >= TOP_P:  # the tokens before it are enough
            break
        nucleus.append(token)
        mass += probabilities[token].item() / total
    result = torch.zeros(VOCABULARY, dtype=torch.double)
    result[nucleus] = probabilities[nucleus]
    return result / result.sum()


@torch.no_grad()
def exact_distribution(target, ends=lambda tokens: False) -> dict[tuple[int, ...], float]:
    """Probability of every continuation of up to `LENGTH` tokens; one ends early where `ends(tokens)`."""
    distribution, open_prefixes = {}, {(): 1.0}
    for length in range(1, LENGTH + 1):
        following = {}
        rows = torch.stack([torch.cat([PROMPT[0], torch.tensor(p, dtype=torch.long)]) for p in open_prefixes])
        for (prefix, weight), logits in zip(open_prefixes.items(), target(rows).logits[:, -1], strict=True):
            for token, probability in enumerate(processed(logits).tolist()):
                tokens = (*prefix, token)
                done = length == LENGTH or ends(tokens)
                (distribution if done else following)[tokens] = weight * probability
        open_prefixes = following
    return distribution


def chi_square_p_value(counts: Counter, distribution: dict[tuple[int, ...], float]) -> float:
    """Pearson's test; cells that expect fewer than 5 are pooled, smallest first."""
    runs = counts.total()
    if any(distribution.get(tokens, 0.0) == 0.0 for tokens in counts):
        return 0.0  # something the target never says
    cells, observed, expected = [], 0.0, 0.0
    for tokens, probability in sorted(distribution.items(), key=lambda item: item[1]):
        observed += counts[tokens]
        expected += probability * runs
        if expected >= 5:
            cells.append((observed, expected))
            observed, expected = 0.0, 0.0
    if expected:
        cells[-1] = (cells[-1][0] + observed, cells[-1][1] + expected)
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.double)
    return torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.double)).item()


# -- the drafters and the runs


@functools.cache
def drafter_for(target, architecture: str) -> PPOWDrafter:
    """A drafter whose distributions are near the target's, but not very."""
    own = {"draft_config": target.config} if architecture == "standalone" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drafter = PPOWDrafter.from_target(target, architecture, **own).eval()
    if architecture == "standalone":
        drafter.draft_model.model.load_state_dict(target.state_dict())
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.ndim > 1:
                parameter += 0.4 * parameter.std() * torch.randn(parameter.shape, generator=noise)
    return drafter


def sample(target, drafter, runs: int, seed: int = 0, traces: list | None = None, **options) -> Counter:
    """How often each continuation (its first `LENGTH` tokens) was generated."""
    options = {
        "do_sample": True,
        "temperature": TEMPERATURE,
        "top_k": TOP_K,
        "top_p": TOP_P,
        "max_new_tokens": NEW_TOKENS,
        "attention_mask": torch.ones_like(PROMPT),
        "assistant_model": drafter,
    } | options
    counts: Counter = Counter()
    torch.manual_seed(seed)
    for _ in range(runs):
        output = target.generate(PROMPT, **options)
        counts[tuple(output[0, PROMPT.shape[1] :][:LENGTH].tolist())] += 1
        if traces is not None:
            traces.append(drafter.last_trace)
    return counts


class StopAtSum(StoppingCriteria):
    """Stops where the last two generated tokens add up to 5."""

    def __call__(self, input_ids, scores, **kwargs):
        new = input_ids[:, PROMPT.shape[1] :]
        return (new[:, -2:].sum(-1) == 5) & torch.tensor(new.shape[1] >= 2)


EOS = 3
CRITERIA = StoppingCriteriaList([StopAtSum()])
ENDINGS = {
    "none": ({}, lambda tokens: False),
    "eos": ({"eos_token_id": EOS}, lambda tokens: tokens[-1] == EOS),
    "criterion": ({"stopping_criteria": CRITERIA}, lambda tokens: sum(tokens[-2:]) == 5 and len(tokens) > 1),
    "eos and criterion": (
        {"eos_token_id": EOS, "stopping_criteria": CRITERIA},
        lambda tokens: tokens[-1] == EOS or (sum(tokens[-2:]) == 5 and len(tokens) > 1),
    ),
}


def p_value(target, drafter, runs: int, ending: str = "none", traces: list | None = None) -> float:
    options, ends = ENDINGS[ending]
    return chi_square_p_value(
        sample(target, drafter, runs, traces=traces, **options), exact_distribution(target, ends)
    )


# -- the check itself


def test_chi_square_p_value_equals_the_closed_form_for_two_degrees_of_freedom():
    counts = Counter({(0,): 30, (1,): 50, (2,): 20})
    p = chi_square_p_value(counts, {(0,): 0.4, (1,): 0.4, (2,): 0.2})
    statistic = 100 / 40 + 100 / 40 + 0
    assert p == pytest.approx(torch.tensor(-statistic / 2).exp().item())


def test_chi_square_p_value_is_zero_where_the_impossible_happened():
    assert chi_square_p_value(Counter({(0,): 99, (2,): 1}), {(0,): 0.5, (1,): 0.5, (2,): 0.0}) == 0.0


def test_exact_probabilities_sum_to_one(small_vocab_target):
    for _, ends in ENDINGS.values():
        assert sum(exact_distribution(small_vocab_target, ends).values()) == pytest.approx(1.0)


# -- sampled output


@pytest.mark.parametrize(
    ("architecture", "window", "ending"),
    [
        ("eagle", "fixed", "none"),
        pytest.param("eagle", "kl", "eos", marks=pytest.mark.lowest),
        ("standalone", "fixed", "eos and criterion"),
        ("standalone", "kl", "none"),
    ],
)
def test_sampled_continuations_are_distributed_as_the_targets(small_vocab_target, architecture, window, ending):
    max_window = 2 if ending == "none" else 3  # with 2 the bonus token is among the four that are compared
    traces: list = []
    view = drafter_for(small_vocab_target, architecture).with_settings(window=window, max_window=max_window, **COSTS)
    assert p_value(small_vocab_target, view, RUNS, ending, traces) > ALPHA
    rounds = [r for trace in traces for r in trace.rounds]
    assert any(r.accepted > 0 for r in rounds)
    assert any(r.accepted < r.window for r in rounds)
    assert any(r.accepted == r.window >= 2 for r in rounds)


@pytest.mark.slow
@both_architectures
@pytest.mark.parametrize("window", ["kl", "fixed", "heuristic"])
@pytest.mark.parametrize("max_window", [2, 3])
@pytest.mark.parametrize("ending", list(ENDINGS))
def test_many_sampled_continuations_are_distributed_as_the_targets(
    small_vocab_target, architecture, window, max_window, ending
):
    view = drafter_for(small_vocab_target, architecture).with_settings(window=window, max_window=max_window, **COSTS)
    assert p_value(small_vocab_target, view, 50_000, ending) > ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("ending", list(ENDINGS))
def test_plain_sampling_passes_the_check(small_vocab_target, ending):
    assert p_value(small_vocab_target, None, 50_000, ending) > ALPHA


@pytest.mark.slow
def test_a_reduced_draft_vocabulary_leaves_the_distribution_alone(small_vocab_target):
    drafter = PPOWDrafter.from_target(
        small_vocab_target, "eagle", draft_vocab_size=3, token_counts=torch.tensor([5, 0, 3, 9, 1, 0])
    )
    view = drafter.eval().with_settings(window="fixed", max_window=3)
    assert p_value(small_vocab_target, view, 20_000, "eos") > ALPHA


@pytest.mark.lowest
@both_architectures
def test_a_seed_reproduces_sampled_output(small_vocab_target, architecture):
    view = drafter_for(small_vocab_target, architecture).with_settings(window="kl", max_window=3, **COSTS)
    first = sample(small_vocab_target, view, 5, seed=7, max_new_tokens=30)
    assert sample(small_vocab_target, view, 5, seed=7, max_new_tokens=30) == first


# -- the same check on acceptance that is broken on purpose


class RawProbabilities(KLAdaptiveCandidateGenerator):
    """Hands the loop the drafter's raw logits in place of the processed ones that the tokens were drawn from."""

    def get_candidates(self, input_ids, *args, **kwargs):
        raw, session = [], self.session
        for name in ("first_logits", "next_logits"):
            method = getattr(type(session), name)

            def recording(*a, _method=method):
                raw.append(_method(session, *a))
                return raw[-1]

            setattr(session, name, recording)
        candidates, logits = super().get_candidates(input_ids, *args, **kwargs)
        return candidates, None if logits is None else torch.stack(raw[: logits.shape[1]], dim=1)


@pytest.mark.slow
def test_raw_draft_probabilities_fail_the_check(small_vocab_target, monkeypatch):
    monkeypatch.setattr(candidate_generator, "KLAdaptiveCandidateGenerator", RawProbabilities)
    view = drafter_for(small_vocab_target, "standalone").with_settings(window="fixed", max_window=2)
    assert p_value(small_vocab_target, view, RUNS) < ALPHA


@pytest.mark.slow
def test_dropping_a_drawn_end_token_fails_the_check(small_vocab_target, monkeypatch):
    monkeypatch.setattr(PendingTokenVerifier, "__call__", lambda self, input_ids, scores: scores)
    view = drafter_for(small_vocab_target, "standalone").with_settings(window="fixed", max_window=2)
    assert p_value(small_vocab_target, view, RUNS, "eos") < ALPHA


# -- corners


@both_architectures
def test_a_drafter_with_overflowing_weights_still_gives_the_targets_tokens(small_vocab_target, architecture):
    drafter = copy.deepcopy(drafter_for(small_vocab_target, architecture))
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.fill_(torch.nan)
    common = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 8}
    expected = small_vocab_target.generate(PROMPT, do_sample=False, **common)
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 1}):  # both have one outcome
        assert torch.equal(small_vocab_target.generate(PROMPT, assistant_model=drafter, **options, **common), expected)
        assert not any(record.window for record in drafter.last_trace.rounds)  # nothing was drawn from NaN
