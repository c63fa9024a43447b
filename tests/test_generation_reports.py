"""Calls that a user of `generate` makes now and then: each goes as plain `generate` does, or is refused in a sentence.

The reference is plain `generate`.
"""

import copy
import warnings

import pytest
import torch
from test_batches import alone, assert_rows, make_drafter, noisy_copy, ragged, together
from test_loop_options import small_llama, tiny
from transformers import (
    BartConfig,
    BartForCausalLM,
    DynamicCache,
    GenerationConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MBartConfig,
    MBartForCausalLM,
    RoFormerConfig,
    RoFormerForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ppow_hf import PPOWDrafter

FIXED = {"window": "fixed", "max_window": 4}
WAYS = ["assistant_model", "custom_generate"]
IDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
DECODER = IDS | {
    "d_model": 32, "decoder_attention_heads": 4, "encoder_attention_heads": 4, "decoder_ffn_dim": 48,
    "max_position_embeddings": 256, "is_decoder": True, "is_encoder_decoder": False, "decoder_start_token_id": None,
    "forced_eos_token_id": None,
}  # fmt: skip


def peaked(model):
    """A model whose random weights write texts that do not repeat one token."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3, generator=generator)
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def given(drafter, way: str, **settings):
    settings = FIXED | settings
    if way == "custom_generate":
        return {way: drafter.generate_with(**settings)}
    return {way: drafter.with_settings(**settings)}


def write(target, ids, **options):
    options = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0} | options
    return target.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


# -- targets that tell places in other ways


def gpt_neo():
    config = GPTNeoConfig(
        hidden_size=32, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]], window_size=8,
        intermediate_size=64, max_position_embeddings=256, **IDS,
    )  # fmt: skip
    return peaked(GPTNeoForCausalLM(config))


def test_local_layers_see_as_far_in_a_batch_as_alone():
    target = gpt_neo()
    drafter = noisy_copy(target, 0.1)
    prompts, ids, mask = ragged([15, 4, 9])
    assert_rows(together(target, drafter, ids, mask, **FIXED), alone(target, prompts))
    assert len({trace.accepted for trace in drafter.last_traces}) > 1  # rows of different lengths leave holes
    with pytest.raises(ValueError, match="tree_nodes: GPTNeoForCausalLM places tokens by their order in the cache"):
        together(target, drafter, prompts[0], torch.ones_like(prompts[0]), tree_nodes=8)


def bart():
    return peaked(BartForCausalLM(BartConfig(decoder_layers=4, encoder_layers=4, encoder_ffn_dim=48, **DECODER)))


def roformer():
    config = RoFormerConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=256,
        is_decoder=True, **IDS,
    )  # fmt: skip
    return peaked(RoFormerForCausalLM(config))


@pytest.mark.parametrize("make", [bart, roformer])
def test_a_batch_without_position_ids_is_refused_and_one_prompt_is_not(make):
    target = make()
    drafter = PPOWDrafter.from_target(target, "eagle").eval()
    prompts, ids, mask = ragged([9, 4])
    for rows in ((ids, mask), (ids[1:], mask[1:]), (ids[:1].repeat(2, 1), mask[:1].repeat(2, 1))):
        with pytest.raises(ValueError, match="input_ids: .* takes no position_ids, so rows of a batch"):
            together(target, drafter, *rows, **FIXED)
    assert_rows(
        together(target, drafter, prompts[0], torch.ones_like(prompts[0]), **FIXED), alone(target, prompts[:1])
    )


def test_the_layers_of_a_decoder_alone_are_counted():
    target = peaked(MBartForCausalLM(MBartConfig(decoder_layers=2, encoder_layers=4, encoder_ffn_dim=48, **DECODER)))
    medusa = PPOWDrafter.from_target(target, "medusa").eval()
    assert medusa.config.target_layer_ids == [2]
    prompt = ragged([9])[0][0]
    for way in WAYS:
        assert torch.equal(write(target, prompt, **given(medusa, way)), write(target, prompt))
    standalone = PPOWDrafter.from_target(target, "standalone", init_layers=[1]).eval()
    assert len(standalone.draft_model.model.get_decoder().layers) == 1
    assert torch.equal(write(target, prompt, assistant_model=standalone), write(target, prompt))
    with pytest.raises(ValueError, match="init_layers: .* layers are 0 to 1"):
        PPOWDrafter.from_target(target, "standalone", init_layers=[2])


@pytest.mark.parametrize("name", ["Glm4Moe", "Dots1", "Apertus"])
def test_whole_layers_with_buffers_are_taken_over(name):
    experts = {
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "initializer_range": 0.3,
    }  # fmt: skip
    target = tiny(name, **(experts if name != "Apertus" else {}))
    buffers = [buffer for key, buffer in target.named_buffers() if key in target.state_dict()]
    assert buffers
    for buffer in buffers:
        buffer.add_(0.125)
    drafter = PPOWDrafter.from_target(target, "standalone", init_layers=[0, 1]).eval()
    own = drafter.draft_model.model.state_dict()
    taken = {key: value for key, value in target.state_dict().items() if key in own and ".layers." in key}
    assert taken and all(torch.equal(own[key], value) for key, value in taken.items())


# -- processors and criteria


class InPlace(LogitsProcessor):
    """Writes into the scores that it is given."""

    def __call__(self, input_ids, scores):
        scores[:, 5:20] = -float("inf")
        return scores


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ["eagle", "standalone"])
def test_a_processor_may_write_in_place(make_target, architecture, way):
    target = make_target("llama")
    drafter, prompt = make_drafter(target, architecture), ragged([9])[0][0]
    options = {"logits_processor": LogitsProcessorList([InPlace()])}
    assert torch.equal(write(target, prompt, **options, **given(drafter, way)), write(target, prompt, **options))


class Counter(StoppingCriteria):
    """Ends the text at the twelfth time of asking."""

    def __init__(self):
        self.asked = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.asked += 1
        return torch.full((len(input_ids),), self.asked >= 12)


class Doubtful(StoppingCriteria):
    """Ends the text after a token chosen from doubtful scores."""

    def __call__(self, input_ids, scores, **kwargs):
        return scores[-1].softmax(-1).amax(-1) < 0.3


@pytest.mark.parametrize("way", WAYS)
def test_a_criterion_of_ones_own_is_asked_once_a_token(make_target, way):
    target = make_target("llama")
    drafter, prompt = make_drafter(target, "standalone"), ragged([7])[0][0]
    for criterion in (Counter, Doubtful):
        texts = []
        for extra in ({}, given(drafter, way)):
            options = {"stopping_criteria": StoppingCriteriaList([criterion()]), "return_dict_in_generate": True}
            texts.append(write(target, prompt, output_scores=True, **options, **extra).sequences)
        assert torch.equal(*texts) and texts[0].shape[1] < 7 + 24


@pytest.mark.parametrize("way", WAYS)
def test_scores_of_sampled_tokens_are_the_targets(make_target, way):
    target = make_target("llama")
    drafter, prompt = make_drafter(target, "standalone"), ragged([9])[0][0]
    for seed in range(10):
        torch.manual_seed(seed)
        output = write(
            target, prompt, do_sample=True, top_k=0, eos_token_id=list(range(1, 30, 3)), output_scores=True,
            return_dict_in_generate=True, **given(drafter, way),
        )  # fmt: skip
        expected = target(output.sequences).logits[0, prompt.shape[1] - 1 : -1]
        torch.testing.assert_close(torch.cat(output.scores), expected, rtol=1e-3, atol=1e-3)


# -- PEFT


@pytest.mark.parametrize("architecture", ["eagle", "block"])
@pytest.mark.parametrize(
    "adapted",
    [{"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, {"trainable_token_indices": [1, 2]}],
    ids=["lora", "tokens"],
)
def test_adapted_embeddings_can_be_shared(make_target, adapted, architecture):
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj"], "r": 4, "init_lora_weights": False} | adapted
    target = peft.get_peft_model(copy.deepcopy(make_target("llama")), peft.LoraConfig(**options)).eval()
    drafter, prompt = PPOWDrafter.from_target(target, architecture, max_window=4).eval(), ragged([9])[0][0]
    assert drafter.config.shares_target_embeddings
    for way in WAYS:
        assert torch.equal(write(target, prompt, **given(drafter, way)), write(target, prompt))


def test_each_row_keeps_its_adapter_where_others_end(make_target):
    peft = pytest.importorskip("peft")
    base = make_target("llama")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    target = peft.get_peft_model(copy.deepcopy(base), lora)
    target.add_adapter("other", lora)
    target.eval()
    ids = torch.cat(ragged([9])[0] + ragged([9], seed=3)[0])
    names = ["default", "other"]
    end = int(write(target, ids, adapter_names=names)[0, 13])
    options = {"adapter_names": names, "eos_token_id": end}
    expected = write(target, ids, **options)
    assert (expected[0, -1] == 0) != (expected[1, -1] == 0)  # one ends before the other
    drafter = make_drafter(base, "eagle")
    for way in WAYS:
        assert torch.equal(write(target, ids, **options, **given(drafter, way)), expected)
    assert names == ["default", "other"]


# -- the cache


@pytest.mark.parametrize("more", [0, 3])
@pytest.mark.parametrize("settings", [{}, {"tree_nodes": 8}], ids=["chains", "trees"])
@pytest.mark.parametrize("way", WAYS)
def test_a_cache_that_leaves_nothing_to_read_is_refused(make_target, way, settings, more):
    target = make_target("llama")
    drafter, prompt = make_drafter(target, "eagle"), ragged([9])[0][0]
    cache = DynamicCache(config=target.config)
    target(ragged([9 + more])[0][0], past_key_values=cache)
    with pytest.raises(ValueError, match=f"past_key_values: the cache holds {9 + more} tokens and input_ids 9"):
        write(target, prompt, past_key_values=cache, **given(drafter, way, **settings))


@pytest.mark.parametrize("way", WAYS)
def test_a_call_without_a_cache_is_refused_and_a_target_whose_default_it_is_gets_one(make_target, way):
    target = copy.deepcopy(make_target("llama"))
    drafter, prompt = make_drafter(target, "eagle"), ragged([9])[0][0]
    with pytest.raises(ValueError, match="use_cache: False given.*Leave it out"):
        write(target, prompt, use_cache=False, **given(drafter, way))
    target.config.use_cache = False
    target.generation_config = GenerationConfig.from_model_config(target.config)
    assert torch.equal(write(target, prompt, **given(drafter, way)), write(target, prompt))


# -- settings of other assistants


@pytest.mark.parametrize("way", WAYS)
def test_settings_of_other_assistants_are_named(make_target, way):
    target = copy.deepcopy(make_target("llama"))
    drafter, prompt = small_llama(target), ragged([9])[0][0]
    for name, value, ours in (
        ("num_assistant_tokens", 1, "max_window"),
        ("num_assistant_tokens_schedule", "heuristic", "window"),
        ("assistant_confidence_threshold", 0.9, "window"),
        ("prompt_lookup_num_tokens", 3, "lookup"),
    ):
        with pytest.warns(UserWarning, match=f"{name}: {value!r} given.*Set {ours} with"):
            write(target, prompt, **{name: value}, **given(drafter, way))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*a PPOWDrafter does not heed")
        write(target, prompt, num_assistant_tokens=20, **given(drafter, way))
        target.generation_config.num_assistant_tokens = 5
        with pytest.raises(UserWarning, match="num_assistant_tokens: 5 given"):
            write(target, prompt, **given(drafter, way))
