"""`generate(assistant_model=drafter)` gives what `generate` gives, whatever the call asks for; and its record is true.

The reference is always plain `generate` of the same target, or a plain forward of it.
"""

import copy
import functools
import itertools
import string
import threading

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import nn
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)
from transformers import pipeline as make_pipeline
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.models.llama.modeling_llama import eager_attention_forward

from ppow_hf import PPOWDrafter
from ppow_hf.runtime.modeling_ppow import collect_target_states

FAMILIES = ["llama", "qwen3", "gpt_neox", "gpt2"]
ARCHITECTURES = ["eagle", "standalone"]
WINDOWS = ["kl", "fixed", "heuristic"]
CHARACTERS = string.ascii_letters + string.digits + "+-"
COSTS = {"cost_ratio": 0.12, "verification_cost": 0.04}  # given, so that nothing here depends on the clock

both_architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def prompt(seed: int, length: int = 8, vocab_size: int = 64) -> torch.Tensor:
    return torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))


def generate(target, input_ids, drafter=None, **options):
    """Plain greedy generation, or the same with `drafter`."""
    options = {"do_sample": False, "max_new_tokens": 40, "attention_mask": torch.ones_like(input_ids)} | options
    if drafter is not None:
        options["assistant_model"] = drafter
    return target.generate(input_ids, **options)


def noisy_copy(target, noise: float) -> PPOWDrafter:
    """A standalone drafter that is the target itself with `noise` (of each parameter's deviation) added."""
    drafter = PPOWDrafter.from_target(target, "standalone", draft_config=target.config).eval()
    drafter.draft_model.model.load_state_dict(target.state_dict())
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.ndim > 1:
                parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=random)
    return drafter


def trained_eagle(target, steps: int = 60, **options) -> PPOWDrafter:
    """An eagle drafter after a few supervised steps on the target's own greedy text: right now and then."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prompts = torch.randint(0, target.config.vocab_size, (24, 4))
        text = target.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=28, min_new_tokens=28
        )
        drafter = PPOWDrafter.from_target(target, "eagle", **options)
        hidden_states = target(text, output_hidden_states=True).hidden_states
        states = collect_target_states(hidden_states, drafter.config.target_layer_ids)
        optimizer = torch.optim.Adam(drafter.parameters(), lr=3e-3)
        for _ in range(steps):
            logits = drafter(text, states).logits[:, 1:-1].flatten(0, 1).clamp_min(-1e4)
            loss = nn.functional.cross_entropy(logits, text[:, 2:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return drafter.eval()


@functools.cache
def drafter_for(target, architecture: str) -> PPOWDrafter:
    return trained_eagle(target) if architecture == "eagle" else noisy_copy(target, 0.005)


@functools.cache
def random_drafter(target, architecture: str, std: float) -> PPOWDrafter:
    """A drafter that knows nothing: flat distributions with a small `std`, wrong with confidence with a large one."""
    drafter = PPOWDrafter.from_target(target, architecture).eval()
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.ndim > 1:
                parameter.copy_(std * torch.randn(parameter.shape, generator=random))
    return drafter


@functools.cache
def character_tokenizer() -> PreTrainedTokenizerFast:
    """Sixty-four characters, one per token id."""
    tokenizer = Tokenizer(WordLevel({character: i for i, character in enumerate(CHARACTERS)}, unk_token="a"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="a", unk_token="a")


@functools.cache
def varied_prompt(target, at_least: int = 10) -> torch.Tensor:
    """A prompt whose greedy continuation of 24 tokens has many different tokens."""
    for seed in range(200):
        ids = prompt(seed)
        if len(set(generate(target, ids, max_new_tokens=24)[0, 8:].tolist())) >= at_least:
            return ids
    raise AssertionError("this target's greedy text always falls into a short loop")


@pytest.fixture(scope="module")
def target(make_target):
    return make_target("llama")


class CollectingStreamer(BaseStreamer):
    def __init__(self):
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value):
        self.tokens += torch.as_tensor(value).flatten().tolist()

    def end(self):
        self.ended = True


class StopAtLength(StoppingCriteria):
    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length, dtype=torch.bool)


class StopAtContent(StoppingCriteria):
    """Stops as soon as the last two tokens are `pair`."""

    def __init__(self, pair: tuple[int, int]):
        self.pair = torch.tensor(pair)

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -2:] == self.pair).all(-1)


# -- greedy output


@pytest.mark.lowest
@both_architectures
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_equals_plain_generate(make_target, family, architecture):
    target = make_target(family)
    drafter = drafter_for(target, architecture)
    accepted = rejected = 0
    for seed in range(3):
        ids = prompt(seed, length=3 + 4 * seed)
        expected = generate(target, ids)
        for window in WINDOWS:
            view = drafter.with_settings(window=window, max_window=6, **COSTS)
            assert torch.equal(generate(target, ids, view), expected), (seed, window)
            accepted += view.last_trace.accepted
            rejected += view.last_trace.drafted - view.last_trace.accepted
    assert accepted > 0 and rejected > 0


@pytest.mark.slow
@both_architectures
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_equals_plain_generate_on_many_prompts(make_target, family, architecture):
    target = make_target(family)
    drafter = drafter_for(target, architecture)
    for seed in range(25):
        ids = prompt(1000 + seed, length=1 + seed)
        expected = generate(target, ids, max_new_tokens=64)
        for window in WINDOWS:
            view = drafter.with_settings(window=window, max_window=10)
            assert torch.equal(generate(target, ids, view, max_new_tokens=64), expected), (seed, window)


@pytest.mark.slow
@both_architectures
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_output_first_differs_at_a_near_tie(make_target, family, architecture):
    target = copy.deepcopy(make_target(family)).to(torch.bfloat16)
    drafter = copy.deepcopy(drafter_for(make_target(family), architecture)).to(torch.bfloat16)
    differing, gaps, noises = 0, [], []
    for seed in range(25):
        ids = prompt(seed)
        expected = generate(target, ids, max_new_tokens=48)[0]
        given = generate(target, ids, drafter.with_settings(window="fixed", max_window=6), max_new_tokens=48)[0]
        with torch.no_grad():
            whole = target(expected[None]).logits[0].float()
            one_by_one, cache = [], DynamicCache(config=target.config)
            for token in expected:
                one_by_one.append(target(token[None, None], past_key_values=cache).logits[0, 0].float())
        noise = (whole - torch.stack(one_by_one)).abs().max().item()
        noises.append(noise)
        if not torch.equal(given, expected):
            differing += 1
            first = int((given != expected).nonzero()[0])
            top = one_by_one[first - 1].topk(2).values
            gaps.append((top[0] - top[1]).item())
            assert gaps[-1] <= 2 * noise, f"gap {gaps[-1]}, noise of bfloat16 logits {noise}"
    print(f"{family} {architecture}: {differing} of 25 differ, gaps {gaps}, noise up to {max(noises):.3f}")


@pytest.mark.lowest
@both_architectures
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [7, 9]]},
        {"max_length": 21},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"max_new_tokens": 3},
        {"max_new_tokens": 4},
        {"max_new_tokens": 5},
    ],
    ids=str,
)
def test_options_of_generate_change_both_alike(target, architecture, options):
    drafter = drafter_for(target, architecture)
    if "max_length" in options:
        options = options | {"max_new_tokens": None}
    for seed in range(3):
        expected = generate(target, prompt(seed), **options)
        for window in ("kl", "fixed"):
            view = drafter.with_settings(window=window, max_window=6, **COSTS)
            assert torch.equal(generate(target, prompt(seed), view, **options), expected), (seed, window)


@pytest.mark.lowest
@both_architectures
@pytest.mark.parametrize("window", ["kl", "fixed"])
def test_output_ends_at_an_end_of_sequence_token_wherever_it_falls(target, architecture, window):
    ids = varied_prompt(target)
    view = drafter_for(target, architecture).with_settings(window=window, max_window=6, **COSTS)
    emitted = generate(target, ids, max_new_tokens=24)[0, ids.shape[1] :].tolist()
    firsts = list(dict.fromkeys(emitted))
    for eos in firsts:
        expected = generate(target, ids, eos_token_id=eos)
        assert expected.shape[1] == ids.shape[1] + emitted.index(eos) + 1
        assert torch.equal(generate(target, ids, view, eos_token_id=eos), expected)
    several = [firsts[-1], firsts[len(firsts) // 2], 63]
    assert torch.equal(generate(target, ids, view, eos_token_id=several), generate(target, ids, eos_token_id=several))


@both_architectures
def test_min_new_tokens_holds_an_end_of_sequence_token_back(target, architecture):
    ids = varied_prompt(target)
    view = drafter_for(target, architecture).with_settings(window="fixed", max_window=6)
    eos = int(generate(target, ids)[0, ids.shape[1] + 4])
    for least in (1, 7, 20):
        options = {"eos_token_id": eos, "min_new_tokens": least}
        assert torch.equal(generate(target, ids, view, **options), generate(target, ids, **options))


@pytest.mark.lowest
@both_architectures
def test_output_ends_at_a_stop_string(target, architecture):
    ids, tokenizer = varied_prompt(target), character_tokenizer()
    view = drafter_for(target, architecture).with_settings(window="fixed", max_window=6)
    emitted = generate(target, ids, max_new_tokens=24)[0, ids.shape[1] :].tolist()
    shorter = 0
    for first, second in itertools.pairwise(emitted[:9]):
        for stop in (CHARACTERS[first], CHARACTERS[first] + CHARACTERS[second]):
            options = {"stop_strings": [stop, "++++"], "tokenizer": tokenizer}
            expected = generate(target, ids, **options)
            assert torch.equal(generate(target, ids, view, **options), expected), stop
            shorter += expected.shape[1] < ids.shape[1] + 40
    assert shorter > 5


@pytest.mark.lowest
@both_architectures
@pytest.mark.parametrize("window", ["kl", "fixed"])
def test_output_ends_where_a_custom_criterion_is_met_at_every_offset(target, architecture, window):
    ids = varied_prompt(target)
    start = ids.shape[1]
    view = drafter_for(target, architecture).with_settings(window=window, max_window=6, **COSTS)
    emitted = generate(target, ids, max_new_tokens=16)[0]
    for count in range(1, 16):
        criteria = StoppingCriteriaList([StopAtLength(start + count)])
        given = generate(target, ids, view, stopping_criteria=criteria)
        assert torch.equal(given[0], emitted[: start + count]), count
    for position in range(start, start + 16):
        pair = (int(emitted[position - 1]), int(emitted[position]))
        criteria = StoppingCriteriaList([StopAtContent(pair)])
        expected = generate(target, ids, stopping_criteria=criteria)
        assert torch.equal(generate(target, ids, view, stopping_criteria=criteria), expected), pair


@both_architectures
def test_criteria_of_transformers_own_classes_handed_in_are_obeyed(target, architecture):
    ids = varied_prompt(target)
    view = drafter_for(target, architecture).with_settings(window="fixed", max_window=6)
    for offset in range(4, 14):
        eos = int(generate(target, ids)[0, ids.shape[1] + offset])
        for criterion in (EosTokenCriteria(eos), MaxLengthCriteria(ids.shape[1] + offset)):
            criteria = StoppingCriteriaList([criterion])
            expected = generate(target, ids, stopping_criteria=criteria)
            assert torch.equal(generate(target, ids, view, stopping_criteria=criteria), expected), criterion


@pytest.mark.lowest
@both_architectures
def test_streamed_tokens_are_the_returned_tokens(target, architecture):
    streamer = CollectingStreamer()
    ids = prompt(0)
    drafter = drafter_for(target, architecture)
    returned = generate(target, ids, drafter, streamer=streamer)
    assert streamer.tokens == returned[0].tolist() == generate(target, ids)[0].tolist()
    assert streamer.ended


@pytest.mark.lowest
@both_architectures
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_one_token_is_enough(make_target, family, architecture):
    target = make_target(family)
    view = drafter_for(target, architecture).with_settings(window="fixed", max_window=5)
    for seed in range(3):
        ids = prompt(seed, length=1)
        assert torch.equal(generate(target, ids, view, max_new_tokens=12), generate(target, ids, max_new_tokens=12))


@both_architectures
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_reaches_the_very_end_of_the_context(make_target, family, architecture):
    target = make_target(family, max_position_embeddings=48)
    view = drafter_for(target, architecture).with_settings(window="fixed", max_window=6)
    for length in (47, 46, 45, 30):
        options = {"max_new_tokens": 49 - length}  # the last token is only written, never read
        assert torch.equal(
            generate(target, prompt(0, length), view, **options), generate(target, prompt(0, length), **options)
        )


def test_a_drafter_with_a_shorter_context_stops_drafting_at_its_end(make_target):
    target = make_target("gpt2")
    short = copy.deepcopy(target.config)
    short.n_positions = 24
    drafter = PPOWDrafter.from_target(target, "standalone", draft_config=short).eval()
    view = drafter.with_settings(window="fixed", max_window=6)
    assert torch.equal(generate(target, prompt(0), view), generate(target, prompt(0)))
    assert view.last_trace.drafted > 0
    assert torch.equal(generate(target, prompt(0, 30), view), generate(target, prompt(0, 30)))
    assert view.last_trace.drafted == 0


@pytest.mark.lowest
@both_architectures
@pytest.mark.parametrize("config_class", [MistralConfig, Qwen3Config])
def test_output_is_the_same_beyond_a_sliding_window(target, architecture, config_class):
    sizes = {name: getattr(target.config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    options = {"use_sliding_window": True, "max_window_layers": 2} if config_class is Qwen3Config else {}
    config = config_class(
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=12,
        initializer_range=0.5,
        max_position_embeddings=256,
        eos_token_id=None,
        pad_token_id=0,
        **sizes,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sliding = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    drafter = noisy_copy(sliding, 0.0) if architecture == "standalone" else trained_eagle(sliding)
    view = drafter.with_settings(window="fixed", max_window=6)
    for seed, length in ((0, 5), (1, 11), (2, 30)):
        ids = prompt(seed, length)
        assert torch.equal(generate(sliding, ids, view), generate(sliding, ids))
        assert view.last_trace.drafted > 0


@both_architectures
def test_padding_on_the_left_changes_nothing(target, architecture):
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt(0)], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    view = drafter_for(target, architecture).with_settings(window="fixed", max_window=6)
    assert torch.equal(generate(target, ids, view, attention_mask=mask), generate(target, ids, attention_mask=mask))


@pytest.mark.lowest
@both_architectures
def test_scores_equal_those_of_plain_generate(target, architecture):
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = generate(target, prompt(0), repetition_penalty=1.2, **options)
    view = drafter_for(target, architecture).with_settings(window="fixed", max_window=6)
    given = generate(target, prompt(0), view, repetition_penalty=1.2, **options)
    assert torch.equal(given.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert len(given[name]) == len(expected[name]) == 40
        torch.testing.assert_close(torch.cat(given[name]), torch.cat(expected[name]), atol=1e-4, rtol=1e-4)


@both_architectures
def test_hidden_states_asked_for_are_returned_for_every_token(target, architecture):
    options = {"return_dict_in_generate": True, "output_hidden_states": True, "max_new_tokens": 12}
    expected = generate(target, prompt(0), **options)
    view = drafter_for(target, architecture).with_settings(window="fixed", max_window=4)
    given = generate(target, prompt(0), view, **options)
    last_layer = [torch.cat([step[-1] for step in out.hidden_states], dim=1) for out in (given, expected)]
    assert last_layer[0].shape[1] >= last_layer[1].shape[1] - 1
    torch.testing.assert_close(
        last_layer[0][:, : last_layer[1].shape[1]], last_layer[1][:, : last_layer[0].shape[1]], atol=1e-4, rtol=1e-4
    )


@pytest.mark.lowest
@both_architectures
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_chat_goes_on_from_the_cache_of_the_turn_before(make_target, family, architecture):
    target = make_target(family)
    view = drafter_for(target, architecture).with_settings(window="fixed", max_window=6)
    first = generate(target, prompt(0), view, return_dict_in_generate=True, max_new_tokens=15)
    second_turn = torch.cat([first.sequences, prompt(1, 5)], dim=1)
    expected = generate(target, second_turn, max_new_tokens=20)
    plainly_cached = DynamicCache(config=target.config)
    with torch.no_grad():
        target(first.sequences[:, :-1], past_key_values=plainly_cached)
    for cache in (first.past_key_values, plainly_cached):
        given = generate(target, second_turn, view, past_key_values=copy.deepcopy(cache), max_new_tokens=20)
        assert torch.equal(given, expected)
        assert view.last_trace.drafted > 0
        plain = generate(target, second_turn, past_key_values=copy.deepcopy(cache), max_new_tokens=20)
        assert torch.equal(plain, expected)


@both_architectures
def test_pipeline_gives_the_same_text_with_an_assistant(target, architecture):
    tokenizer, drafter = character_tokenizer(), drafter_for(target, architecture)
    options = {"do_sample": False, "max_new_tokens": 20}
    text = "dLo4h"
    plain = make_pipeline("text-generation", model=target, tokenizer=tokenizer)(text, **options)
    assisted = make_pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=drafter)
    drafter.last_trace = None
    assert assisted(text, **options) == plain
    assert drafter.last_trace.drafted > 0


# -- vocabularies


@pytest.mark.lowest
@both_architectures
@pytest.mark.parametrize(("drafter_width", "target_width"), [(1000, 1008), (1008, 1000)])
def test_vocabularies_padded_differently_work_together(make_target, architecture, drafter_width, target_width):
    target = make_target("llama", vocab_size=target_width)
    other = make_target("llama", vocab_size=drafter_width)
    view = PPOWDrafter.from_target(other, architecture).eval().with_settings(window="fixed", max_window=4)
    for seed in range(3):
        ids = prompt(seed, vocab_size=1000)
        assert torch.equal(generate(target, ids, view), generate(target, ids))
        assert view.last_trace.drafted > 0
        sampled = generate(target, ids, view, do_sample=True, max_new_tokens=10)
        assert sampled.shape[1] == ids.shape[1] + 10


@both_architectures
def test_tokens_outside_the_drafters_vocabulary_may_stand_in_the_prompt(make_target, architecture):
    target, narrower = make_target("llama", vocab_size=1008), make_target("llama", vocab_size=1000)
    view = PPOWDrafter.from_target(narrower, architecture).eval().with_settings(window="fixed", max_window=4)
    ids = torch.tensor([[3, 1004, 7, 1007, 1000]])
    assert torch.equal(generate(target, ids, view), generate(target, ids))


@both_architectures
def test_another_vocabulary_is_refused_with_both_sizes(make_target, architecture):
    drafter = PPOWDrafter.from_target(make_target("llama", vocab_size=1000), architecture)
    with pytest.raises(ValueError, match=r"assistant_model.*1000.*1100"):
        generate(make_target("llama", vocab_size=1100), prompt(0), drafter)


@pytest.mark.lowest
def test_a_reduced_draft_vocabulary_leaves_greedy_output_alone(target, tmp_path):
    counts = torch.bincount(generate(target, torch.cat([prompt(s) for s in range(8)])).flatten(), minlength=64)
    drafter = trained_eagle(target, draft_vocab_size=32, token_counts=counts)
    view = drafter.with_settings(window="fixed", max_window=4)
    accepted = 0
    for seed in range(5):
        assert torch.equal(generate(target, prompt(seed), view), generate(target, prompt(seed)))
        accepted += view.last_trace.accepted
        drafted = {token for r in view.last_trace.rounds for token in r.draft_ids}
        assert drafted <= set(drafter.kept_tokens.tolist())
    assert accepted > 0
    assert set(drafter.kept_tokens.tolist()) == set(counts.topk(32).indices.tolist())

    drafter.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.d2t, drafter.d2t) and torch.equal(loaded.t2d, drafter.t2d)
    assert loaded.t2d.sum() == 32 and torch.equal(loaded.t2d.nonzero()[:, 0], loaded.kept_tokens)
    loaded_view = loaded.with_settings(window="fixed", max_window=4)
    generate(target, prompt(4), loaded_view)
    assert [r.draft_ids for r in loaded_view.last_trace.rounds] == [r.draft_ids for r in view.last_trace.rounds]


# -- the record


@pytest.mark.lowest
@both_architectures
@pytest.mark.parametrize("window", WINDOWS)
def test_trace_accounts_for_every_token(target, architecture, window):
    view = drafter_for(target, architecture).with_settings(window=window, max_window=5, **COSTS)
    for seed in range(3):
        output = generate(target, prompt(seed), view)
        trace = view.last_trace
        assert sum(r.accepted + 1 for r in trace.rounds) == output.shape[1] - 8
        assert trace.rounds[0].window == 0
        position = 8
        for r in trace.rounds:
            assert 0 <= r.accepted <= r.window <= 5
            assert r.window == len(r.draft_ids) == len(r.features)
            assert r.window <= r.draft_steps <= r.window + 1
            assert len(r.kl) == min(r.accepted + 1, r.window)
            assert all(0 <= value < float("inf") for value in r.kl)
            kept = output[0, position : position + r.accepted].tolist()
            assert kept == r.draft_ids[: r.accepted]
            position += r.accepted + 1
        assert trace.window_rule == window


@pytest.mark.lowest
@both_architectures
def test_traced_kl_equals_that_of_plain_forwards(target, architecture):
    drafter = drafter_for(target, architecture)
    view = drafter.with_settings(window="fixed", max_window=4)
    output = generate(target, prompt(0), view)
    position, checked = 8, 0
    for r in view.last_trace.rounds:
        if r.window:
            committed = output[:, :position]
            with torch.no_grad():
                drafted = torch.cat([committed, torch.tensor([r.draft_ids])], dim=1)
                target_log_probs = target(drafted).logits[0, position - 1 : -1].log_softmax(-1)
                states = target(committed, output_hidden_states=True).hidden_states
                features = drafter(
                    committed,
                    collect_target_states(states, drafter.config.target_layer_ids),
                    prefixes=torch.tensor([[position - 1]]),
                    draft_ids=torch.tensor([[r.draft_ids]]),
                ).window_features
                draft_log_probs = drafter.compute_logits(features)[0, 0].log_softmax(-1)
            kl = (target_log_probs.exp() * (target_log_probs - draft_log_probs)).sum(-1).clamp(0.0, 20.0)
            assert r.kl == pytest.approx(kl[: len(r.kl)].tolist(), abs=1e-3)
            checked += len(r.kl)
        position += r.accepted + 1
    assert checked > 10


def test_calls_at_once_keep_their_own_traces(target):
    drafter = drafter_for(target, "standalone")
    alone, together, failures = {}, {}, []

    def call(seed: int, traces: dict):
        try:
            view = drafter.with_settings(window="fixed", max_window=2 + seed % 4)
            output = generate(target, prompt(seed), view)
            traces[seed] = (output[0].tolist(), [(r.draft_ids, r.accepted) for r in view.last_trace.rounds])
        except Exception as error:
            failures.append(error)

    def calls(seeds):
        for seed in seeds:
            call(seed, together)

    for seed in range(8):
        call(seed, alone)
    threads = [threading.Thread(target=calls, args=(range(first, 8, 2),)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert together == alone


# -- the window settings


@pytest.mark.parametrize(
    ("architecture", "std"),
    [
        ("eagle", 0.02),
        ("standalone", 0.5),
        pytest.param("eagle", 0.5, marks=pytest.mark.slow),
        pytest.param("standalone", 0.02, marks=pytest.mark.slow),
    ],
)
def test_adaptive_window_hardly_drafts_with_a_drafter_that_knows_nothing(target, architecture, std):
    view = random_drafter(target, architecture, std).with_settings(window="kl", **COSTS)
    steps = forwards = 0
    for seed in range(3):
        ids = prompt(seed)
        assert torch.equal(generate(target, ids, view, max_new_tokens=200), generate(target, ids, max_new_tokens=200))
        trace = view.last_trace
        steps += sum(r.draft_steps for r in trace.rounds)
        forwards += len(trace.rounds)
        assert not trace.speculation_pays
    assert steps * COSTS["cost_ratio"] <= 0.05 * forwards, (steps, forwards)


def test_adaptive_window_drafts_far_with_a_drafter_that_agrees(target):
    view = noisy_copy(target, 1e-5).with_settings(window="kl", **COSTS)
    generate(target, prompt(0), view, max_new_tokens=200)
    windows = [r.window for r in view.last_trace.rounds]
    assert sum(windows[5:-1]) / len(windows[5:-1]) > 6
    assert view.last_trace.tokens_per_target_forward > 4
    assert view.last_trace.speculation_pays


def test_settings_of_a_view_do_not_reach_the_drafter(target):
    drafter = drafter_for(target, "standalone")
    before = drafter.config.to_dict()
    view = drafter.with_settings(window="fixed", max_window=2, cost_ratio=0.5, verification_cost=0.1)
    generate(target, prompt(0), view)
    assert drafter.config.to_dict() == before
    assert max(r.window for r in view.last_trace.rounds) == 2
    assert (view.last_trace.cost_ratio, view.last_trace.verification_cost) == (0.5, 0.1)


# -- mistakes


@both_architectures
def test_new_tokens_alone_behind_a_cache_are_refused(target, architecture):
    first = generate(target, prompt(0), return_dict_in_generate=True)
    mask = torch.ones(1, first.sequences.shape[1] + 5, dtype=torch.long)
    with pytest.raises(ValueError, match="input_ids: 5 tokens .* past_key_values"):
        generate(
            target,
            prompt(1, 5),
            drafter_for(target, architecture),
            past_key_values=first.past_key_values,
            attention_mask=mask,
        )


@both_architectures
def test_beams_are_refused(target, architecture):
    with pytest.raises(ValueError, match="num_beams: 2"):
        generate(target, prompt(0), drafter_for(target, architecture), num_beams=2)


@both_architectures
def test_embeddings_in_place_of_tokens_are_refused(target, architecture):
    drafter = drafter_for(target, architecture)
    options = {"inputs_embeds": target.get_input_embeddings()(prompt(0)), "max_new_tokens": 4}
    for tokens in ([], [prompt(0)]):
        for how in ({"assistant_model": drafter}, {"custom_generate": drafter.generate_with()}):
            with pytest.raises(ValueError, match="inputs_embeds"):
                target.generate(*tokens, **options, **how)


@both_architectures
def test_an_empty_prompt_is_said_to_be_one(target, architecture):
    drafter, nothing = drafter_for(target, architecture), torch.zeros(1, 0, dtype=torch.long)
    for how in ({"assistant_model": drafter}, {"custom_generate": drafter.generate_with()}):
        with pytest.raises(ValueError, match="^input_ids: an empty prompt"):
            target.generate(nothing, max_new_tokens=4, **how)


def test_a_compiled_drafter_and_attentions_that_are_not_there_are_refused(make_target):
    target = copy.deepcopy(make_target("llama"))  # its attention is changed
    drafter = drafter_for(target, "eagle")
    with pytest.raises(ValueError, match="^assistant_model: a compiled drafter"):
        generate(target, prompt(0), torch.compile(drafter), max_new_tokens=4)
    options = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 4}
    with pytest.raises(ValueError, match="^output_attentions: .* its attention .sdpa. returns none"):
        generate(target, prompt(0), drafter, **options)
    AttentionInterface.register("own", eager_attention_forward)
    target.set_attn_implementation("own")
    assert len(generate(target, prompt(0), drafter, **options).attentions)
    target.set_attn_implementation("eager")
    found = generate(target, prompt(0), drafter, **options)
    assert torch.equal(found.sequences, generate(target, prompt(0), max_new_tokens=4))


@both_architectures
@pytest.mark.parametrize("loop", ["assistant_model", "custom_generate"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance_scale", 1.5),
        (
            "watermarking_config",
            SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3], context_history_size=8, sampling_table_size=64),
        ),
    ],
)
def test_processors_that_count_their_calls_are_refused(target, architecture, loop, name, value):
    drafter = drafter_for(target, architecture)
    how = {loop: drafter if loop == "assistant_model" else drafter.generate_with()}
    with pytest.raises(ValueError, match=f"{name}: .*Leave out {name}"):
        target.generate(prompt(0), max_new_tokens=4, **how, **{name: value})


@both_architectures
def test_a_watermark_of_green_tokens_is_the_targets_own(target, architecture):
    drafter, ids = drafter_for(target, architecture), prompt(0)
    options = {"max_new_tokens": 24, "attention_mask": torch.ones_like(ids)}
    plain = target.generate(ids, **options)
    options["watermarking_config"] = WatermarkingConfig(greenlist_ratio=0.3, bias=1.5)
    expected = target.generate(ids, **options)
    assert not torch.equal(expected, plain)  # the watermark tells
    assert torch.equal(target.generate(ids, assistant_model=drafter, **options), expected)
    assert torch.equal(target.generate(ids, custom_generate=drafter.generate_with(), **options), expected)


def test_an_eagle_drafter_of_another_target_is_refused(make_target, target):
    wider = PPOWDrafter.from_target(make_target("llama", hidden_size=48), "eagle")
    with pytest.raises(ValueError, match=r"assistant_model.*48.*32"):
        generate(target, prompt(0), wider)
    deeper = PPOWDrafter.from_target(make_target("llama", num_layers=8), "eagle")
    with pytest.raises(ValueError, match=r"assistant_model.*layers"):
        generate(target, prompt(0), deeper)


def test_unknown_and_impossible_settings_are_refused(target):
    drafter = drafter_for(target, "standalone")
    for settings, message in (
        ({"windows": "kl"}, "windows: not a setting"),
        ({"window": "x"}, "window: 'x' is not one of"),
        ({"max_window": 0}, "max_window: 0"),
        ({"max_window": 2.5}, "max_window: 2.5"),
        ({"max_window": None}, "max_window: None"),
        ({"cost_ratio": -1.0}, "cost_ratio: -1.0"),
        ({"cost_ratio": float("nan")}, "cost_ratio: nan"),
        ({"cost_ratio": "fast"}, "cost_ratio: 'fast'"),
        ({"verification_cost": float("inf")}, "verification_cost: inf"),
        ({"architecture": "eagle"}, "architecture: "),
    ):
        with pytest.raises(ValueError, match=message):
            drafter.with_settings(**settings)


def test_missing_and_damaged_weights_are_reported(target, tmp_path):
    PPOWDrafter.from_target(target, "eagle").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception, match="(?i)safetensors|deserializ|incomplete"):
        AutoModel.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        AutoModel.from_pretrained(tmp_path)
