"""Targets whose own preparation of inputs changes what they read: `generate` asks it at every step, and so do we.

Greedy output is plain `generate`'s, or the call is refused before anything is computed.
"""

import copy

import peft
import pytest
import torch
import transformers
from own_loop import generate_by_loop
from test_batches import COSTS, alone, assert_rows, make_drafter, noisy_copy, ragged, together
from test_loop_options import small_llama, tiny
from transformers import GPT2Config, GPT2LMHeadModel

from ppow_hf import PPOWDrafter, PPOWTrainer, PPOWTrainingArguments

IMAGE, FIXED = 60, {"window": "fixed", "max_window": 4}
SETTINGS = [FIXED, {"lookup": True, **COSTS}]  # drafts that are mostly rejected, and some that are accepted
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip


def both_paths(target, drafter, inputs, settings, **options):
    """Output by our own loop and by transformers' assisted loop."""
    options = {"do_sample": False, "max_new_tokens": 24} | options
    yield target.generate(**inputs, custom_generate=drafter.generate_with(**settings), **options)
    yield target.generate(**inputs, assistant_model=drafter.with_settings(**settings), **options)


def refused_alike(target, drafter, inputs, message, **options):
    """Both paths refuse the call, and none runs the target."""
    ran = []
    handle = target.get_input_embeddings().register_forward_hook(lambda *_: ran.append(1))
    for way in ({"custom_generate": drafter.generate_with()}, {"assistant_model": drafter}):
        with pytest.raises(ValueError, match=message):
            target.generate(**inputs, **way, do_sample=False, **({"max_new_tokens": 8} | options))
    handle.remove()
    assert not ran


# -- adapters that act on the inputs


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_virtual_tokens_are_refused_everywhere(make_target, tmp_path, kind):
    """Reported of huggingface/peft#2123: prompt tuning without effect on what is generated."""

    base = copy.deepcopy(make_target("llama"))
    drafter = PPOWDrafter.from_target(base, "eagle").eval()
    tuned = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=6)).eval()
    refused_alike(
        tuned, drafter, {"input_ids": torch.tensor([[1, 2, 3]])}, "virtual tokens.*Generate without a drafter"
    )
    with pytest.raises(ValueError, match="virtual tokens"):
        PPOWDrafter.from_target(tuned, "eagle")
    with pytest.raises(ValueError, match="virtual tokens"):
        PPOWTrainer(drafter, tuned, PPOWTrainingArguments(str(tmp_path), max_length=16, use_cpu=True))
    plain = base.generate(torch.tensor([[1, 2, 3]]), custom_generate=drafter.generate_with(), max_new_tokens=4)
    assert plain.shape == (1, 7)  # the model underneath, asked alone, is as it was


def test_an_adapter_of_weights_is_drafted_for(make_target):
    """The other side of huggingface/peft#2123: LoRA changes weights, and its text is the tuned model's."""

    base = copy.deepcopy(make_target("llama"))
    drafter = make_drafter(base, "standalone")
    ids = torch.tensor([[1, 2, 3, 4]])
    untuned = base.generate(ids, do_sample=False, max_new_tokens=24)
    torch.manual_seed(0)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    tuned = peft.get_peft_model(base, lora).eval()
    expected = tuned.generate(input_ids=ids, do_sample=False, max_new_tokens=24)
    assert not torch.equal(expected, untuned)
    for output in both_paths(tuned, drafter, {"input_ids": ids}, FIXED):
        assert torch.equal(output, expected)


# -- positions and token types along with the tokens


def qwen_vl(family: str):
    """A tiny Qwen2-VL or Qwen2.5-VL."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text = {name: value for name, value in TEXT.items() if name != "head_dim"} | {"rope_parameters": rope}
    vision = {"depth": 1, "num_heads": 2, "patch_size": 4, "in_channels": 3, "initializer_range": 0.3}
    vision |= {"embed_dim": 16, "hidden_size": 32} if family == "Qwen2VL" else {
        "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "fullatt_block_indexes": [0],
        "window_size": 16,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config" if family == "Qwen2VL" else "Qwen2_5_VLConfig")(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=61, vision_start_token_id=62
    )
    name = "Qwen2VLForConditionalGeneration" if family == "Qwen2VL" else "Qwen2_5_VLForConditionalGeneration"
    return getattr(transformers, name)(config).eval().requires_grad_(False)


def with_image(before: list[int], behind: list[int], seed: int) -> dict[str, torch.Tensor]:
    """A prompt with an image of 4 x 8 patches, which are 8 tokens."""
    ids = torch.tensor([[*before, 62, *[IMAGE] * 8, *behind]])
    pixels = torch.randn(32, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(seed))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 8]]),
    }


@pytest.mark.parametrize("settings", SETTINGS, ids=["fixed", "lookup"])
@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen2_5VL"])
def test_an_image_with_positions_along_three_axes(family, settings):
    """Reported of vllm-project/vllm#10350: Qwen-VL writes another text with speculative decoding."""
    target = qwen_vl(family)
    drafter = PPOWDrafter.from_target(target, "eagle").eval()
    first = with_image([1, 2], [3, 4, 5], seed=0)
    expected = target.generate(**first, do_sample=False, max_new_tokens=24)
    blind = {name: value for name, value in first.items() if name in ("input_ids", "attention_mask")}
    assert not torch.equal(target.generate(**blind, do_sample=False, max_new_tokens=24), expected)
    for output in both_paths(target, drafter, first, settings):
        assert torch.equal(output, expected)

    second = with_image([1, 2, 7, 8, 9], [3, 4, 5], seed=1)
    other = target.generate(**second, do_sample=False, max_new_tokens=24)
    rows = {name: torch.cat([first[name], second[name]]) for name in ("pixel_values", "image_grid_thw")}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        rows[name] = torch.cat([torch.nn.functional.pad(first[name], (3, 0)), second[name]])
    for output in both_paths(target, drafter, rows, settings):
        assert output[0, 3:].tolist() == expected[0].tolist()
        assert output[1].tolist() == other[0].tolist()
    if settings is FIXED:  # trees take their places after the image too
        output = generate_by_loop(
            target, drafter, **first, do_sample=False, max_new_tokens=24, tree_nodes=6, tree_branches=2, **COSTS
        )
        assert torch.equal(output, expected)


def test_positions_given_by_the_caller(make_target):
    """Another of the kind of vllm-project/vllm#10350: `position_ids` given to generate."""
    target = make_target("gpt2")  # learned positions: a shift changes the text
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.tensor([[9, 10, 12, 3, 40]]),
    }
    expected = target.generate(**inputs, do_sample=False, max_new_tokens=24)
    assert not torch.equal(expected, target.generate(ids, do_sample=False, max_new_tokens=24))
    for output in both_paths(target, make_drafter(target, "standalone"), inputs, FIXED):
        assert torch.equal(output, expected)


def test_token_types_go_on_behind_the_prompt():
    """Another of the kind: `token_type_ids`, which generate repeats for each new token."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5, bos_token_id=None, eos_token_id=None
    )
    target = GPT2LMHeadModel(config).eval().requires_grad_(False)
    drafter = make_drafter(target, "standalone")
    prompts, ids, mask = ragged([4, 7])
    for row, own in enumerate(prompts):
        types = torch.full_like(own, 5 + row)
        inputs = {"input_ids": own, "attention_mask": torch.ones_like(own), "token_type_ids": types}
        expected = target.generate(**inputs, do_sample=False, max_new_tokens=24, pad_token_id=0)
        assert expected[0, own.shape[1] :].tolist() != alone(target, [own], max_new_tokens=24, pad_token_id=0)[0]
        for output in both_paths(target, drafter, inputs, FIXED, pad_token_id=0):
            assert torch.equal(output, expected)
        types = torch.tensor([[5], [6]]).expand(-1, ids.shape[1]).contiguous()
        given = together(target, drafter, ids, mask, token_type_ids=types, max_new_tokens=24, pad_token_id=0, **FIXED)
        assert given[row] == expected[0, own.shape[1] :].tolist()


def gemma3():
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=TEXT | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 8, "patch_size": 2,
        },
        mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=61, eoi_token_index=62,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config).eval().requires_grad_(False)


def test_an_image_that_is_seen_both_ways():
    """Another of the kind: Gemma 3 gives token types to the prompt only, and lets an image's tokens see each other."""
    target = gemma3()
    drafter = PPOWDrafter.from_target(target, "eagle").eval()
    ids = torch.tensor([[1, 2, 61, *[IMAGE] * 4, 62, 3, 4, 5]])
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    }  # fmt: skip
    expected = target.generate(**inputs, do_sample=False, max_new_tokens=24)
    for output in both_paths(target, drafter, inputs, FIXED):
        assert torch.equal(output, expected)
    with pytest.raises(ValueError, match="token_type_ids: .*attention masks.*assistant_model=drafter"):
        generate_by_loop(target, drafter, **inputs, max_new_tokens=4, tree_nodes=4)
    prompts, texts, mask = ragged([5, 12], vocab_size=50)
    assert_rows(
        together(target, drafter, texts, mask, max_new_tokens=24, **FIXED), alone(target, prompts, max_new_tokens=24)
    )


# -- rotary embeddings that change with the length


def phi3(kind: str = "longrope", border: int = 16):
    torch.manual_seed(0)
    factors = {
        "short_factor": [1.0] * 4,
        "long_factor": [3.0, 5.0, 7.0, 9.0],
        "original_max_position_embeddings": border,
    }
    rope = {"rope_type": kind, "rope_theta": 10000.0, **factors}
    options = {"rope_parameters": rope, "original_max_position_embeddings": border, "max_position_embeddings": 128}
    return tiny("Phi3", initializer_range=0.4, sliding_window=None, **options)


def test_a_text_that_crosses_a_longrope_border_is_refused():
    """Reported of unslothai/unsloth#1193: Phi-3 beyond its original length."""
    target = phi3()
    drafter = small_llama(target)
    prompts, ids, mask = ragged([10])
    refused_alike(
        target,
        drafter,
        {"input_ids": ids},
        r"max_new_tokens: the rotary embedding \(longrope\).*after 16",
        max_new_tokens=24,
    )
    for length, new in ((10, 7), (17, 24), (30, 24)):  # up to the border, and from after it
        prompts, ids, mask = ragged([length])
        expected = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new)
        for output in both_paths(
            target, drafter, {"input_ids": ids, "attention_mask": mask}, FIXED, max_new_tokens=new
        ):
            assert torch.equal(output, expected)
    prompts, ids, mask = ragged([17, 25])
    assert_rows(together(target, drafter, ids, mask, **FIXED), alone(target, prompts))
    prompts, ids, mask = ragged([10, 25])  # on both sides
    refused_alike(target, drafter, {"input_ids": ids, "attention_mask": mask}, "pass prompts one by one")


@pytest.mark.parametrize("architecture", ["eagle", "standalone"])
def test_a_cache_that_is_begun_anew_on_the_way(architecture):
    """The kind of unslothai/unsloth#1193 without new frequencies: Phi-3 still reads the text again at its border."""
    torch.manual_seed(0)
    target = tiny("Phi3", initializer_range=0.4, sliding_window=None, original_max_position_embeddings=16)
    drafter = PPOWDrafter.from_target(target, "eagle").eval() if architecture == "eagle" else noisy_copy(target, 0.05)
    prompts, ids, mask = ragged([10])
    expected = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24)
    for output in both_paths(target, drafter, {"input_ids": ids, "attention_mask": mask}, FIXED):
        assert torch.equal(output, expected)


def test_training_stays_below_a_longrope_border(tmp_path):
    """Training's side of unslothai/unsloth#1193."""
    target = phi3()
    with pytest.raises(ValueError, match="max_length: .*longrope.*Lower max_length"):
        PPOWTrainer(small_llama(target), target, PPOWTrainingArguments(str(tmp_path), max_length=40, use_cpu=True))


def test_dynamic_rotary_embeddings():
    """The kind of unslothai/unsloth#1193 where frequencies change at each token."""
    target = tiny(
        "Llama", initializer_range=0.4, max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    )  # fmt: skip
    drafter = small_llama(target)
    prompts, ids, mask = ragged([6])
    expected = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20)
    for output in both_paths(target, drafter, {"input_ids": ids, "attention_mask": mask}, FIXED, max_new_tokens=20):
        assert torch.equal(output, expected)
    prompts, ids, mask = ragged([6, 9])
    assert_rows(
        together(target, drafter, ids, mask, max_new_tokens=8, **FIXED), alone(target, prompts, max_new_tokens=8)
    )
    refused_alike(target, drafter, {"input_ids": ids, "attention_mask": mask}, "dynamic", max_new_tokens=20)


# -- families whose preparation is not known


@pytest.mark.parametrize("name", ["OpenAIGPT", "XLNet", "XLM", "CpmAnt"])
def test_families_without_a_cache_to_take_back_from(make_target, name):
    """Another of the kind: families that read their whole text at every step, with tokens of their own in it."""
    kinds = {"OpenAIGPT": "OpenAIGPTLMHeadModel", "XLNet": "XLNetLMHeadModel", "XLM": "XLMWithLMHeadModel"}
    sizes = {
        "OpenAIGPT": {"n_embd": 32, "n_layer": 2, "n_head": 4},
        "XLNet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
        "XLM": {"emb_dim": 32, "n_layers": 2, "n_heads": 4},
        "CpmAnt": {"hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 64, "num_hidden_layers": 2},
    }
    config = getattr(transformers, f"{name}Config")(vocab_size=64, **sizes[name])
    target = getattr(transformers, kinds.get(name, "CpmAntForCausalLM"))(config).eval()
    drafter = small_llama(make_target("llama"))
    refused_alike(target, drafter, {"input_ids": torch.tensor([[1, 2, 3]])}, "has no cache from which")


def test_an_unknown_preparation_is_left_to_the_assisted_loop(make_target):
    """The kind as a whole: a target that prepares its inputs in a way of its own."""

    class Shifted(type(make_target("gpt2"))):
        def prepare_inputs_for_generation(self, input_ids, **kwargs):
            inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
            inputs["position_ids"] = inputs["position_ids"] + 7
            return inputs

    target = copy.deepcopy(make_target("gpt2"))
    plain = target.generate(torch.tensor([[1, 2, 3]]), do_sample=False, max_new_tokens=24)
    target.__class__ = Shifted
    drafter = make_drafter(target, "standalone")
    ids = torch.tensor([[1, 2, 3]])
    expected = target.generate(ids, do_sample=False, max_new_tokens=24)
    assert not torch.equal(plain, expected)
    given = target.generate(ids, assistant_model=drafter, do_sample=False, max_new_tokens=24)
    assert torch.equal(given, expected)
    for call in (
        {"custom_generate": drafter.generate_with()},
        {"assistant_model": drafter.with_settings(tree_nodes=4)},
    ):
        with pytest.raises(ValueError, match="prepares its inputs in a way of its own.*assistant_model=drafter"):
            target.generate(ids, **call, max_new_tokens=4)
