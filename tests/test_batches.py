"""Our own loop: batches of ragged prompts, row by row what plain `generate` writes for each prompt alone."""

import itertools

import pytest
import torch
from own_loop import generate_by_loop
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, MistralConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ppow_hf import PPOWDrafter
from ppow_hf.runtime import generation as loop
from ppow_hf.runtime import target_session as verifying

FAMILIES = ["llama", "qwen3", "gpt_neox", "gpt2"]
ARCHITECTURES = ["eagle", "standalone"]
WINDOWS = ["kl", "fixed", "heuristic"]
COSTS = {"cost_ratio": 0.12, "verification_cost": 0.04}  # given, so that nothing here depends on the clock


def noisy_copy(target, noise: float) -> PPOWDrafter:
    """A standalone drafter that is the target itself with `noise` (of each parameter's deviation) added."""
    drafter = PPOWDrafter.from_target(target, "standalone", draft_config=target.config).eval()
    drafter.draft_model.model.load_state_dict(target.state_dict())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.numel() > 1:
                parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return drafter


def make_drafter(target, architecture: str, seed: int = 0) -> PPOWDrafter:
    """Standalone: the target with noise, which is right about half of the time. Eagle: from the target, untrained."""
    if architecture == "standalone":
        return noisy_copy(target, 0.05)
    torch.manual_seed(seed)
    return PPOWDrafter.from_target(target, "eagle").eval()


def ragged(lengths, vocab_size: int = 64, seed: int = 0):
    """Prompts of these lengths, and the same padded on the left: list of `[1, n]`, ids `[B, N]`, mask `[B, N]`."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(1, vocab_size, (1, n), generator=generator) for n in lengths]
    longest = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(p, (longest - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (longest - p.shape[1], 0)) for p in prompts])
    return prompts, ids, mask


def alone(target, prompts, **options) -> list[list[int]]:
    """New tokens of each prompt by plain generate."""
    options = {"do_sample": False, "max_new_tokens": 40} | options
    outputs = []
    for p in prompts:
        output = target.generate(p, attention_mask=torch.ones_like(p), **options)
        outputs.append(output[0, p.shape[1] :].tolist())
    return outputs


def together(target, drafter, ids, mask, **options) -> list[list[int]]:
    options = {"do_sample": False, "max_new_tokens": 40} | options
    output = generate_by_loop(target, drafter, ids, attention_mask=mask, **options)
    return output[:, ids.shape[1] :].tolist()


def assert_rows(given: list[list[int]], expected: list[list[int]], pad: int = 0) -> None:
    for row, wanted in zip(given, expected, strict=True):
        assert row[: len(wanted)] == wanted
        assert set(row[len(wanted) :]) <= {pad}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_what_its_prompt_gives_alone(make_target, family, architecture, window):
    target = make_target(family)
    drafter = make_drafter(target, architecture)
    prompts, ids, mask = ragged([8, 3, 14, 1, 8, 20])
    given = together(target, drafter, ids, mask, window=window, max_window=6, **COSTS)
    assert_rows(given, alone(target, prompts))
    traces = drafter.last_traces
    assert len(traces) == 6
    for trace in traces:
        assert sum(r.accepted + 1 for r in trace.rounds) == 40
    accepted = sum(trace.accepted for trace in traces)
    if architecture == "standalone":
        assert 0 < accepted < sum(trace.drafted for trace in traces)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("threshold", [0.0, 0.1, 2.0])
def test_compacting_caches_changes_nothing(make_target, architecture, threshold, monkeypatch):
    target = make_target("llama")
    drafter = make_drafter(target, architecture)
    prompts, ids, mask = ragged([5, 17, 2, 9])
    compactions = []
    original = verifying.compacting_columns
    monkeypatch.setattr(verifying, "compacting_columns", lambda seen: compactions.append(1) or original(seen))
    monkeypatch.setattr(loop, "COMPACT_AT", threshold)
    monkeypatch.setattr(verifying, "COMPACT_AT", threshold)
    given = together(target, drafter, ids, mask, window="fixed", max_window=5, max_new_tokens=60, **COSTS)
    assert_rows(given, alone(target, prompts, max_new_tokens=60))
    if architecture == "standalone":  # an untrained eagle's drafts are rejected alike, which leaves no holes
        assert bool(compactions) == (threshold < 1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_assistant_model_takes_a_batch(make_target, architecture):
    target = make_target("qwen3")
    drafter = make_drafter(target, architecture)
    prompts, ids, mask = ragged([4, 11])
    view = drafter.with_settings(window="fixed", max_window=4)
    output = target.generate(ids, attention_mask=mask, assistant_model=view, do_sample=False, max_new_tokens=30)
    assert_rows(output[:, ids.shape[1] :].tolist(), alone(target, prompts, max_new_tokens=30))
    assert len(view.last_traces) == 2 and view.last_trace is view.last_traces[0]


class Contains(StoppingCriteria):
    """Stops a row when a token stands among those generated after its own prompt of `lengths` tokens."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] == self.token) | torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 12, "eos_token_id": list(range(1, 40))},
        {"eos_token_id": list(range(1, 12))},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"temperature": 0.7, "do_sample": True, "top_k": 1},
        {"suppress_tokens": list(range(20, 30))},
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_options_of_generate(make_target, architecture, options):
    target = make_target("llama")
    drafter = make_drafter(target, architecture)
    prompts, ids, mask = ragged([7, 2, 12])
    given = together(target, drafter, ids, mask, window="fixed", max_window=5, pad_token_id=0, **options)
    assert_rows(given, alone(target, prompts, pad_token_id=0, **options))


@pytest.mark.parametrize("token", range(1, 64, 3))
def test_a_custom_criterion_ends_a_row_where_it_ends_alone(make_target, token):
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    prompts, ids, mask = ragged([7, 2, 12, 5])
    criteria = StoppingCriteriaList([Contains(token)])
    given = together(target, drafter, ids, mask, stopping_criteria=criteria, pad_token_id=0, max_window=6, **COSTS)
    expected = alone(target, prompts, stopping_criteria=criteria, pad_token_id=0)
    assert_rows(given, expected)
    assert any(len(row) < 40 for row in expected) or token not in itertools.chain(*expected)


@pytest.mark.parametrize("options", [{}, {"tree_nodes": 8}], ids=["chains", "trees"])
@pytest.mark.parametrize("eos", range(1, 64, 9))
def test_rounds_count_no_token_after_the_end(make_target, eos, options):
    target = make_target("llama")
    prompts, ids, mask = ragged([7, 2, 12])
    drafter = noisy_copy(target, 0.0)
    expected = alone(target, prompts, eos_token_id=eos, pad_token_id=0)
    together(target, drafter, ids, mask, eos_token_id=eos, pad_token_id=0, window="fixed", max_window=5, **options)
    counted = [sum(r.accepted + 1 for r in trace.rounds) for trace in drafter.last_traces]
    assert counted == [len(row) for row in expected]


def test_the_context_ends(make_target):
    target = make_target("llama", max_position_embeddings=32)
    drafter = make_drafter(target, "standalone")
    prompts, ids, mask = ragged([20, 10])
    given = together(target, drafter, ids, mask, max_new_tokens=12, window="fixed", max_window=8)
    assert_rows(given, alone(target, prompts, max_new_tokens=12))


def test_sliding_windows_in_batches():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=9, initializer_range=0.5, pad_token_id=0, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    target = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    drafter = make_drafter(target, "standalone")
    for lengths in ([6], [6, 3, 15]):
        prompts, ids, mask = ragged(lengths)
        given = together(target, drafter, ids, mask, window="fixed", max_window=5)
        assert_rows(given, alone(target, prompts))
        assert sum(trace.accepted for trace in drafter.last_traces) > 0


def test_scores_are_those_of_plain_generate(make_target):
    target = make_target("gpt_neox")
    drafter = make_drafter(target, "standalone")
    prompts, ids, mask = ragged([5])
    options = {"do_sample": False, "max_new_tokens": 20, "return_dict_in_generate": True, "output_scores": True}
    options |= {"output_logits": True, "attention_mask": mask, "repetition_penalty": 1.2}
    plain = target.generate(ids, **options)
    ours = generate_by_loop(target, drafter, ids, window="fixed", max_window=4, **options)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert len(ours.scores) == len(plain.scores) == len(ours.logits) == 20
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(getattr(ours, name)), torch.stack(getattr(plain, name)))


class Listener(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_a_streamer_hears_the_prompt_and_every_token(make_target):
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    prompts, ids, mask = ragged([5])
    listener = Listener()
    output = generate_by_loop(target, drafter, ids, attention_mask=mask, streamer=listener, max_new_tokens=25, **COSTS)
    assert listener.ended and listener.pieces[0] == ids[0].tolist()
    assert list(itertools.chain(*listener.pieces)) == output[0].tolist()
    assert max(map(len, listener.pieces[1:])) > 1


def test_a_cache_is_gone_on_from(make_target):
    target = make_target("llama")
    for architecture in ARCHITECTURES:
        drafter = make_drafter(target, architecture)
        prompts, ids, mask = ragged([9])
        cache = target(ids[:, :6], use_cache=True).past_key_values
        given = generate_by_loop(
            target,
            drafter,
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=20,
            do_sample=False,
            **COSTS,
        )
        assert given[0, 9:].tolist() == alone(target, prompts, max_new_tokens=20)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}, "padded on the right"),
        ({"attention_mask": torch.ones(2, 2, dtype=torch.long)}, "attention_mask"),
        ({"streamer": Listener()}, "streamer"),
        ({"stop_strings": "x"}, "tokenizer"),
        ({"num_beams": 2}, "num_beams"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"window": "wide"}, "window"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_done_is_said(make_target, arguments, message):
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ValueError, match=message):
        generate_by_loop(
            target, drafter, ids, **({"attention_mask": torch.ones_like(ids), "max_new_tokens": 4} | arguments)
        )


def exact_joint(target, prompt: torch.Tensor, length: int, temperature: float) -> dict[tuple[int, ...], float]:
    """Probability of every continuation of `length` tokens, token by token from plain forwards."""
    joint = {(): 1.0}
    for _ in range(length):
        longer = {}
        for tokens, probability in joint.items():
            ids = torch.cat([prompt, torch.tensor([tokens], dtype=torch.long)], dim=1)
            following = (target(ids).logits[0, -1].double() / temperature).softmax(-1).tolist()
            longer.update({(*tokens, t): probability * p for t, p in enumerate(following)})
        joint = longer
    return joint


def sampled_rows_fit(target, drafter, copies: int = 750, calls: int = 4, **settings) -> bool:
    """Whether `calls` batches of two prompts, `copies` times each, give tokens distributed as the target's own."""
    temperature, length = 0.8, 3
    prompts, ids, mask = ragged([4, 2], vocab_size=6)
    ids, mask = ids.repeat(copies, 1), mask.repeat(copies, 1)
    counts: list[dict] = [{}, {}]
    torch.manual_seed(5)
    for _ in range(calls):
        output = generate_by_loop(
            target, drafter, ids, attention_mask=mask, do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
            max_new_tokens=length + 3, **settings,
        )  # fmt: skip
        for i, tokens in enumerate(output[:, ids.shape[1] : ids.shape[1] + length].tolist()):
            counts[i % 2][tuple(tokens)] = counts[i % 2].get(tuple(tokens), 0) + 1
    traces = drafter.last_traces
    assert sum(t.accepted for t in traces) > 0
    for prompt, seen in zip(prompts, counts, strict=True):
        joint = exact_joint(target, prompt, length, temperature)
        total = sum(seen.values())
        common = [tokens for tokens, p in joint.items() if p * total >= 5]
        observed = [seen.get(tokens, 0) for tokens in common]
        expected = [joint[tokens] * total for tokens in common]
        observed.append(total - sum(observed))
        expected.append(total - sum(expected))
        if expected[-1] < 1:
            observed, expected = observed[:-1], [e * sum(observed[:-1]) / sum(expected[:-1]) for e in expected[:-1]]
        if chisquare(observed, expected).pvalue < 1e-4:
            return False
    return True


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_are_sampled_from_the_targets_distribution(small_vocab_target, architecture, window):
    target = small_vocab_target
    drafter = noisy_copy(target, 0.3) if architecture == "standalone" else make_drafter(target, "eagle")
    assert sampled_rows_fit(target, drafter, window=window, max_window=3, **COSTS)
    assert sum(t.drafted - t.accepted for t in drafter.last_traces) > 0, "nothing was rejected"


def test_a_broken_acceptance_is_noticed(small_vocab_target, monkeypatch):
    """The same test must fail when every drafted token is kept."""
    from ppow_hf.runtime import acceptance

    def keeps_everything(draft_ids, draft_probs, target_probs, uniforms, next_uniforms, valid=None):
        return acceptance.rejection_sample_chain(
            draft_ids, draft_probs, target_probs, torch.zeros_like(uniforms), next_uniforms, valid
        )

    monkeypatch.setattr(loop, "rejection_sample_chain", keeps_everything)
    drafter = noisy_copy(small_vocab_target, 0.3)
    assert not sampled_rows_fit(small_vocab_target, drafter, window="fixed", max_window=3, **COSTS)
