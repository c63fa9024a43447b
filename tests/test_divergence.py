"""Divergence in half precision: against slow loops, and against text that is another target's."""

import copy

import pytest
import torch
from test_batches import noisy_copy
from transformers import DynamicCache

from ppow_hf.measure import divergence, evaluation
from ppow_hf.measure.divergence import measure_divergence
from ppow_hf.runtime.draft_session import cache_argument

PROMPTS = [[1 + (7 * seed + 3 * i * i) % 60 for i in range(3 + seed % 5)] for seed in range(12)]
NEW_TOKENS = 32
WINDOW = 5
SETTINGS = {"window": "fixed", "max_window": WINDOW}


def greedy(target, prompt, **options) -> list[int]:
    ids = torch.tensor([prompt])
    output = target.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, **options
    )
    return output[0, len(prompt) :].tolist()


@torch.no_grad()
def read_in_pieces(target, prompt, text, width) -> torch.Tensor:
    """Logits `[n, V]` of each token of `text`: the prompt is read at once, `text` in pieces of `width`."""
    cache = DynamicCache(config=target.config)
    logits, piece, rest = [], list(prompt), list(text[:-1])
    while piece:
        output = target(torch.tensor([piece]), use_cache=True, **{cache_argument(target): cache}).logits[0].float()
        logits += list(output) if logits else [output[-1]]
        piece, rest = rest[:width], rest[width:]
    return torch.stack(logits)


def pair(make_target, family, dtype):
    target = make_target(family, initializer_range=0.15)
    return copy.deepcopy(target).to(dtype), noisy_copy(target, 0.02).to(dtype)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rate_gaps_and_noise_equal_those_of_slow_loops(make_target, family):
    target, drafter = pair(make_target, family, torch.bfloat16)
    found = measure_divergence(target, drafter, PROMPTS, NEW_TOKENS, **SETTINGS)
    differences, noise = [], 0.0
    for place, prompt in enumerate(PROMPTS):
        plain = greedy(target, prompt)
        given = greedy(target, prompt, assistant_model=drafter.with_settings(**SETTINGS))
        one_by_one = read_in_pieces(target, prompt, plain, 1)
        in_windows = read_in_pieces(target, prompt, plain, WINDOW + 1)
        for single, window in zip(one_by_one, in_windows, strict=True):
            first, second = single.topk(2).indices.tolist()
            noise = max(noise, abs(float((single[first] - single[second]) - (window[first] - window[second]))))
        for token in range(NEW_TOKENS):
            if plain[token] != given[token]:
                ordered = sorted(one_by_one[token].tolist())
                differences.append({"prompt": place, "token": token, "gap": ordered[-1] - ordered[-2]})
                break
    assert found["prompts"] == len(PROMPTS) and found["dtype"] == "bfloat16"
    assert found["differing"] == len(differences)  # how many there are is the processor's doing
    assert found["first_differences"] == differences
    assert found["largest_gap"] == max((one["gap"] for one in differences), default=None)
    assert found["noise"] == pytest.approx(noise, rel=1e-5) and noise > 0
    assert found["near_ties"] == found["differing"], "more than rounding"


def test_nothing_differs_in_float32(make_target):
    target, drafter = pair(make_target, "llama", torch.float32)
    found = measure_divergence(target, drafter, PROMPTS, NEW_TOKENS, **SETTINGS)
    assert found["differing"] == found["near_ties"] == 0 and found["largest_gap"] is None
    assert found["first_differences"] == [] and found["noise"] < 1e-4


def test_text_of_another_target_is_not_taken_for_rounding(make_target, monkeypatch):
    target, drafter = pair(make_target, "llama", torch.bfloat16)
    other = copy.deepcopy(target)
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.roll(1, 0))
    monkeypatch.setattr(divergence, "decode", lambda _, *rest, **settings: evaluation.decode(other, *rest, **settings))
    found = measure_divergence(target, drafter, PROMPTS, NEW_TOKENS, **SETTINGS)
    assert found["near_ties"] < found["differing"] == len(PROMPTS) and found["largest_gap"] > found["noise"]
