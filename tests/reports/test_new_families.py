"""Families whose configurations or layers are of a kind of their own: drafted for, or refused by name."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ppow_hf import PPOWDrafter

COMMON = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SLIDING = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 3, "num_hidden_layers": 6}
PER_LAYER = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
FAMILIES = {
    # vLLM, unsloth: `head_dim` is another of each kind of layer, and cannot be read of the whole.
    "gemma4_text": SLIDING | PER_LAYER | {"global_head_dim": 16, "num_kv_shared_layers": 2},
    # NeMo AutoModel: several states side by side, and an `intermediate_size` of each layer.
    "gemma3n_text": SLIDING | PER_LAYER | {"num_kv_shared_layers": 2, "laurel_rank": 4,
                                           "activation_sparsity_pattern": [0.0] * 6},
    # `rms_norm_eps` is None.
    "cohere2_moe": SLIDING | {"num_experts": 4, "num_experts_per_tok": 2},
    # Its base model has a head.
    "llama4_text": {"num_hidden_layers": 4, "num_local_experts": 2, "intermediate_size_mlp": 48,
                    "layer_types": ["full_attention"] * 4, "no_rope_layers": [1] * 4},
}  # fmt: skip


def make(family: str):
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**COMMON | FAMILIES[family])).float().eval()
    for parameter in target.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    target.generation_config.eos_token_id = None
    return target


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        *(("gemma4_text", architecture) for architecture in ("eagle", "standalone", "medusa", "block")),
        ("gemma3n_text", "standalone"), ("cohere2_moe", "eagle"), ("cohere2_moe", "block"), ("llama4_text", "eagle"),
    ],
)  # fmt: skip
def test_text_is_the_targets_own(family, architecture):
    target = make(family)
    drafter = PPOWDrafter.from_target(target, architecture).eval()
    ids = torch.randint(1, 64, (1, 15), generator=torch.Generator().manual_seed(0))
    options = {"do_sample": False, "max_new_tokens": 24, "attention_mask": torch.ones_like(ids)}
    view = drafter.with_settings(window="fixed", max_window=4)
    assert torch.equal(target.generate(ids, assistant_model=view, **options), target.generate(ids, **options))
    assert view.last_trace.drafted > 0


@pytest.mark.parametrize(
    ("family", "architecture", "message"),
    [
        ("gemma3n_text", "eagle", "target: each layer of Gemma3nForCausalLM has several states side by side"),
        ("llama4_text", "standalone", "draft_config: a Llama4ForCausalLM cannot be a standalone drafter"),
    ],
)
def test_what_cannot_be_drafted_with_is_refused_when_it_is_made(family, architecture, message):
    with pytest.raises(ValueError, match=message):
        PPOWDrafter.from_target(make(family), architecture)
