"""Our own loop with what users of `generate` expect, and with targets that are out of the ordinary.

The reference is plain `generate`, prompt by prompt.
"""

import copy
import json

import pytest
import torch
import transformers
from own_loop import generate_by_loop
from test_batches import ARCHITECTURES, COSTS, alone, assert_rows, make_drafter, noisy_copy, ragged, together
from test_generation import CHARACTERS, character_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput

from ppow_hf import PPOWDrafter

WAYS = [{}, {"tree_nodes": 10, "tree_branches": 3}]  # chains, trees
ways = pytest.mark.parametrize("way", WAYS, ids=["chains", "trees"])


def tiny(name: str, **options):
    """A target of another family: its configuration and causal class by name, two to four small layers."""
    torch.manual_seed(0)
    common = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**(common | options))
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def small_llama(target) -> PPOWDrafter:
    """A standalone drafter of another family than its target's, untrained."""
    own = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    return PPOWDrafter.from_target(target, "standalone", draft_config=own).eval()


# -- what users of generate expect


def test_sixty_four_prompts_at_once(make_target):
    target = make_target("qwen3")
    lengths = torch.randint(1, 30, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts, ids, mask = ragged(lengths)
    options = {"eos_token_id": list(range(1, 5)), "pad_token_id": 0, "max_new_tokens": 16}  # rows end at many places
    expected = alone(target, prompts, **options)
    assert len(set(map(len, expected))) > 3
    for architecture, way in (("eagle", WAYS[0]), ("standalone", WAYS[1])):
        drafter = make_drafter(target, architecture)
        given = together(target, drafter, ids, mask, window="fixed", max_window=4, **way, **options)
        assert_rows(given, expected)


@ways
def test_scores_of_a_batch_are_those_of_each_prompt_alone(make_target, way):
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    prompts, ids, mask = ragged([7, 2, 12])
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": 20}
    options |= {"do_sample": False, "repetition_penalty": 1.3, "eos_token_id": list(range(1, 6)), "pad_token_id": 0}
    ours = generate_by_loop(target, drafter, ids, attention_mask=mask, window="fixed", max_window=4, **way, **options)
    assert isinstance(ours, GenerateDecoderOnlyOutput)
    for i, prompt in enumerate(prompts):
        plain = target.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        for name in ("scores", "logits"):
            expected = torch.cat(getattr(plain, name))
            own = torch.stack([step[i] for step in getattr(ours, name)])
            torch.testing.assert_close(own[: len(expected)], expected, rtol=1e-4, atol=1e-4)
            assert not own[len(expected) :].any()


@ways
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_returned_cache_is_gone_on_from(make_target, architecture, way):
    """Cut inside a window by an end-of-sequence token, it holds all tokens but the last, as plain generate's."""
    target = make_target("gpt_neox")
    drafter = noisy_copy(target, 0.02) if architecture == "standalone" else make_drafter(target, architecture)
    prompts, ids, mask = ragged([9])
    everything = alone(target, prompts, max_new_tokens=30)[0]
    for end in sorted(set(everything))[::3]:
        options = {"return_dict_in_generate": True, "eos_token_id": end, "pad_token_id": 0, "do_sample": False}
        ours = generate_by_loop(
            target,
            drafter,
            ids,
            attention_mask=mask,
            window="fixed",
            max_window=6,
            max_new_tokens=30,
            **way,
            **options,
        )
        cache, length = ours.get("cache", ours.get("past_key_values")), ours.sequences.shape[1]
        assert cache.get_seq_length() == length - 1
        name = "cache" if "cache" in ours else "past_key_values"
        more = target.generate(
            ours.sequences, attention_mask=torch.ones_like(ours.sequences), max_new_tokens=10, do_sample=False,
            **{name: cache},
        )  # fmt: skip
        assert more[0, length:].tolist() == alone(target, [ours.sequences], max_new_tokens=10)[0]


@ways
def test_a_generation_config_is_obeyed(make_target, way):
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    prompts, ids, mask = ragged([7, 4])
    config = GenerationConfig(max_new_tokens=13, repetition_penalty=1.4, do_sample=False, pad_token_id=0)
    output = generate_by_loop(target, drafter, ids, attention_mask=mask, generation_config=config, **way)
    expected = [
        target.generate(p, attention_mask=torch.ones_like(p), generation_config=config)[0, p.shape[1] :].tolist()
        for p in prompts
    ]
    assert output[:, ids.shape[1] :].tolist() == expected


class Banned(LogitsProcessor):
    """Forbids a token after an even one: looks at the row's own last token."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[input_ids[:, -1] % 2 == 0, 20:40] = -torch.inf
        return scores


@ways
def test_a_custom_logits_processor_sees_each_row_as_alone(make_target, way):
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    prompts, ids, mask = ragged([7, 4, 13])
    given = LogitsProcessorList([Banned()])
    options = {"logits_processor": given, "max_new_tokens": 24}
    rows = together(target, drafter, ids, mask, window="fixed", max_window=5, **way, **options)
    expected = alone(target, prompts, **options)
    assert_rows(rows, expected)
    assert expected != alone(target, prompts, max_new_tokens=24)


class Unlikely(StoppingCriteria):
    """Stops after a token that was chosen from doubtful scores: reads the scores that output_scores asks for."""

    def __call__(self, input_ids, scores, **kwargs):
        return scores[-1].softmax(-1).amax(-1) < 0.3


@ways
def test_a_criterion_that_reads_scores(make_target, way):
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    prompts, ids, mask = ragged([7])
    options = {"stopping_criteria": StoppingCriteriaList([Unlikely()]), "return_dict_in_generate": True}
    options |= {"output_scores": True, "do_sample": False, "max_new_tokens": 30, "attention_mask": mask}
    plain = target.generate(ids, **options)
    ours = generate_by_loop(target, drafter, ids, window="fixed", max_window=4, **way, **options)
    assert ours.sequences.tolist() == plain.sequences.tolist() and plain.sequences.shape[1] < ids.shape[1] + 30


@ways
def test_stop_strings_end_rows_where_they_end_alone(make_target, way):
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    prompts, ids, mask = ragged([7, 2, 12])
    tokenizer = character_tokenizer()
    emitted = alone(target, prompts, max_new_tokens=24)
    for row, place in ((0, 3), (1, 8), (2, 5)):
        stop = "".join(CHARACTERS[token] for token in emitted[row][place : place + 2])
        options = {"stop_strings": [stop], "tokenizer": tokenizer, "max_new_tokens": 24, "pad_token_id": 0}
        given = together(target, drafter, ids, mask, window="fixed", max_window=6, **way, **options)
        assert_rows(given, alone(target, prompts, **options))


@ways
def test_max_time_ends_every_row(make_target, way):
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    prompts, ids, mask = ragged([7, 4])
    assert [len(row) for row in together(target, drafter, ids, mask, max_time=0.0, **way)] == [1, 1]
    rows = together(target, drafter, ids, mask, max_time=3600.0, max_new_tokens=9, **way)
    assert_rows(rows, alone(target, prompts, max_new_tokens=9))


def test_several_sequences_of_each_prompt(make_target):
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    prompts, ids, mask = ragged([7, 4])
    torch.manual_seed(0)
    output = generate_by_loop(
        target, drafter, ids, attention_mask=mask, num_return_sequences=3, do_sample=True, max_new_tokens=12, **COSTS
    )
    assert output.shape == (6, ids.shape[1] + 12)
    assert torch.equal(output[:, : ids.shape[1]], ids.repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in output.tolist()}) > 3


@ways
def test_a_seed_reproduces_sampled_batches(make_target, way):
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    prompts, ids, mask = ragged([7, 4])
    texts = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        texts.append(together(target, drafter, ids, mask, do_sample=True, top_k=0, max_new_tokens=20, **COSTS, **way))
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_what_this_loop_does_not_return_is_said(make_target, name):
    target = copy.deepcopy(make_target("llama"))  # its attention is changed
    target.set_attn_implementation("eager")
    drafter = make_drafter(target, "standalone")
    with pytest.raises(ValueError, match=f"{name}: this loop returns"):
        generate_by_loop(
            target, drafter, torch.tensor([[1, 2]]), attention_mask=torch.ones(1, 2, dtype=torch.long),
            max_new_tokens=2, return_dict_in_generate=True, **{name: True},
        )  # fmt: skip


# -- targets out of the ordinary


@ways
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Mistral", {"sliding_window": 7, "initializer_range": 0.5}),
        ("Qwen3", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 2, "initializer_range": 0.5}),
        ("Gemma2", {"sliding_window": 7, "initializer_range": 0.3}),
        ("Gemma3Text", {"sliding_window": 7, "initializer_range": 0.3}),
    ],
    ids=["all-slide", "some-slide", "gemma2", "gemma3"],
)
def test_layers_with_sliding_windows(name, options, architecture, way):
    target = tiny(name, **options)
    if architecture == "standalone":
        drafter = small_llama(target) if name == "Gemma2" else noisy_copy(target, 0.02)
    else:
        drafter = make_drafter(target, "eagle")
    for lengths in ([10], [3, 15]):  # a cache that forgets, where the call allows it; masks by position
        prompts, ids, mask = ragged(lengths)
        given = together(target, drafter, ids, mask, window="fixed", max_window=4, max_new_tokens=24, **way)
        assert_rows(given, alone(target, prompts, max_new_tokens=24))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Mamba", {"state_size": 8}),
        ("Mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1}),
        ("RecurrentGemma", {"lru_width": 32, "attention_window_size": 8}),
        ("Bamba", {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}),
        ("Qwen3Next", {"num_experts": 2, "num_experts_per_tok": 1, "linear_num_value_heads": 2}),
        ("Lfm2", {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_recurrent_targets_are_refused(make_target, name, options):
    target = tiny(name, **options)
    drafter = small_llama(make_target("llama"))
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="recurrent state"):
        small_llama(target)
    with pytest.raises(ValueError, match="recurrent state.*Generate without a drafter"):
        generate_by_loop(target, drafter, ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)


def test_a_target_without_positions_verifies_chains_and_no_trees():
    target = tiny("Mpt", d_model=32, n_heads=4, n_layers=2)
    drafter = small_llama(target)
    prompts, ids, mask = ragged([5])
    given = together(target, drafter, ids, mask, window="fixed", max_window=4)
    assert_rows(given, alone(target, prompts))
    with pytest.raises(ValueError, match="tree_nodes: MptForCausalLM places tokens by their order"):
        together(target, drafter, ids, mask, tree_nodes=4)


@ways
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_quantised_target_writes_what_it_writes_alone(make_target, architecture, way, tmp_path):
    """Ternary weights and activations in 8 bits (BitNet, which transformers brings along), in the target alone.

    In float64: a last bit that differs between a window and single tokens, as some processors' float32 products do,
    would be another step of an activation's 255 now and then.
    """
    original = make_target("llama", hidden_size=64)
    original.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    config["quantization_config"]["quantization_mode"] = "online"
    (tmp_path / "config.json").write_text(json.dumps(config))
    target = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float64").eval()
    drafter = make_drafter(original, architecture)
    prompts, ids, mask = ragged([7, 3])
    expected = alone(target, prompts)
    assert expected != alone(original, prompts) and len(set(expected[0])) > 10  # quantised indeed, and no loop
    assert_rows(together(target, drafter, ids, mask, window="fixed", max_window=4, **way), expected)
