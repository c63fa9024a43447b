"""Greedy output is plain `generate`'s, or the call is refused before anything is computed: 300 random combinations.

Each combination is drawn from its own seed, which a failure prints. The reference is plain `generate` of each prompt
alone.
"""

import random
import re

import pytest
import torch
from test_batches import make_drafter
from test_families import CONFIGS, family_target  # noqa: F401

from ppow_hf import PPOWDrafter

pytestmark = pytest.mark.slow

COMBINATIONS, AT_ONCE = 300, 15
STOCK = ("llama", "qwen3", "gpt_neox", "gpt2")
REFUSAL = re.compile(r"^[\w.\[\]' ]+: .+|.+\. Generate .+", re.DOTALL)  # names what was given, or says what to do
COSTS = [{}, {"cost_ratio": 0.02, "verification_cost": 0.01}, {"cost_ratio": 0.5, "verification_cost": 0.2}]
PROCESSORS = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 3},
    {"bad_words_ids": [[5], [7, 9]]},
    {"suppress_tokens": [3, 8, 11]},
    {"begin_suppress_tokens": [4, 6]},
    {"sequence_bias": [[[12], -4.0]]},
    {"encoder_repetition_penalty": 1.4},
    {"encoder_no_repeat_ngram_size": 2},
    {"prefix_allowed_tokens_fn": lambda row, ids: list(range(1 + (row + len(ids)) % 3, 60))},
    {"guidance_scale": 1.5},
    {"renormalize_logits": True},
    {"exponential_decay_length_penalty": (5, 1.2)},
]


def draw(seed: int) -> dict:
    """A call: target, drafter, prompts, window settings and options of `generate`."""
    dice = random.Random(seed)
    architecture = dice.choice(["standalone", "eagle", "eagle", "medusa"])
    options: dict = {"max_new_tokens": dice.choice([1, 2, 7, 24, 40])}
    if dice.random() < 0.4:
        options["eos_token_id"] = dice.sample(range(1, 64), 4)
        if dice.random() < 0.5:
            options["min_new_tokens"] = dice.randint(1, options["max_new_tokens"])
    for chosen in dice.sample(PROCESSORS, dice.choice([0, 0, 1, 1, 2])):
        options |= chosen
    if "eos_token_id" not in options:
        options.pop("exponential_decay_length_penalty", None)  # which plain generate does not take without
    settings = {"window": dice.choice(["kl", "fixed", "heuristic"]), "max_window": dice.randint(1, 9)}
    settings |= dice.choice(COSTS)
    if dice.random() < 0.3:
        settings |= {"window": "kl", "lookup": True}
    if dice.random() < 0.25:
        settings |= {"tree_nodes": dice.randint(2, 16), "tree_branches": dice.randint(1, 4)}
    return {
        "family": dice.choice([*STOCK, *CONFIGS]),
        "architecture": architecture,
        "lengths": [dice.randint(1, 20) for _ in range(dice.choice([1, 1, 2, 3]))],
        "path": dice.choice(["assistant_model", "custom_generate"]),
        "settings": settings,
        "options": options,
    }


def new_tokens(row: torch.Tensor, start: int, ends: list[int]) -> list[int]:
    """A row's continuation up to and with the token that ends it."""
    tokens = row[start:].tolist()
    stops = [place for place, token in enumerate(tokens) if token in ends]
    return tokens[: stops[0] + 1] if stops else tokens


def check(call: dict, target, drafter) -> bool:
    """Whether the call was served; raises where its output is another, or a refusal came late or said nothing."""
    generator = torch.Generator().manual_seed(sum(call["lengths"]))
    prompts = [torch.randint(1, 64, (n,), generator=generator) for n in call["lengths"]]
    longest, options = max(call["lengths"]), {"do_sample": False, "pad_token_id": 0, **call["options"]}
    ids = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (longest - len(p), 0)) for p in prompts])
    forwards = []
    hook = target.register_forward_hook(lambda *_: forwards.append(1))
    try:
        view = drafter.with_settings(**call["settings"])
        way = view if call["path"] == "assistant_model" else view.generate_with()
        output = target.generate(ids, attention_mask=mask, **{call["path"]: way}, **options)
    except ValueError as refusal:
        assert not forwards, f"refused after {len(forwards)} forwards: {refusal}"
        assert REFUSAL.match(str(refusal)), str(refusal)
        return False
    finally:
        hook.remove()
    ends = options.get("eos_token_id", [])
    allowed = options.get("prefix_allowed_tokens_fn")
    for number, prompt in enumerate(prompts):
        if allowed is not None:  # alone, a row would be row 0
            options["prefix_allowed_tokens_fn"] = lambda _, row_ids, number=number: allowed(number, row_ids)
        plain = target.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], **options)
        expected = new_tokens(plain[0], len(prompt), ends)
        assert new_tokens(output[number], longest, ends)[: len(expected)] == expected, f"row {number}"
    return True


@pytest.mark.parametrize("first", range(0, COMBINATIONS, AT_ONCE))
def test_greedy_output_is_plain_generates_or_the_call_is_refused(make_target, family_target, first):  # noqa: F811
    served = 0
    for seed in range(first, first + AT_ONCE):
        call = draw(seed)
        family = call["family"]
        target = make_target(family) if family in STOCK else family_target(family)
        try:
            if call["architecture"] == "medusa":
                torch.manual_seed(seed)
                drafter = PPOWDrafter.from_target(target, "medusa", medusa_heads=9).eval()
            else:
                drafter = make_drafter(target, call["architecture"], seed)
            served += check(call, target, drafter)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {call}: {type(error).__name__}: {error}") from error
    assert served >= AT_ONCE // 3  # refusals are the exception
