"""Families that attend their own way: without sdpa, or with linear biases (ALiBi) in place of positions."""

import pytest
import torch
from test_batches import alone, assert_rows, noisy_copy, ragged, together
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    MptConfig,
)

from ppow_hf import PPOWDrafter

COMMON = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "use_cache": True}
CONFIGS = {
    "gemma2": lambda: Gemma2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=256, sliding_window=128, **COMMON,
    ),
    "mpt": lambda: MptConfig(d_model=32, n_heads=4, n_layers=3, max_seq_len=256, **COMMON),
    "bloom": lambda: BloomConfig(hidden_size=32, n_head=4, n_layer=3, **COMMON),
    "falcon": lambda: FalconConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=3, alibi=True, **COMMON),
}  # fmt: skip
WITHOUT_SDPA = ["gemma2", "mpt", "bloom"]
ALIBI = ["mpt", "bloom", "falcon"]


@pytest.fixture(scope="module")
def family_target():
    made = {}

    def make(family: str):
        if family not in made:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval().requires_grad_(False)
                for parameter in model.parameters():  # whatever the family's own way of beginning: peaked texts
                    if parameter.ndim > 1:
                        torch.nn.init.normal_(parameter, std=0.3)
            made[family] = model
        return made[family]

    return make


def assisted(target, drafter, prompt, **settings):
    view = drafter.with_settings(**settings)
    output = target.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=40, assistant_model=view
    )
    return output[0, prompt.shape[1] :].tolist(), view.last_trace


@pytest.mark.parametrize("family", [*WITHOUT_SDPA, "falcon"])
def test_a_standalone_drafter_attends_as_its_family_can(family_target, family, tmp_path):
    target = family_target(family)
    prompts, _, _ = ragged([9, 1, 14])
    copy, noisy = noisy_copy(target, 0.0), noisy_copy(target, 0.1)
    assert copy.draft_model.model.config._attn_implementation == ("sdpa" if family == "falcon" else "eager")
    noisy.save_pretrained(tmp_path)
    for prompt, expected in zip(prompts, alone(target, prompts), strict=True):
        text, trace = assisted(target, copy, prompt, window="fixed", max_window=4)
        assert text == expected and trace.accepted == trace.drafted > 20, "a copy of the target must be right"
        for drafter in (noisy, PPOWDrafter.from_pretrained(tmp_path)):
            text, trace = assisted(target, drafter, prompt, window="fixed", max_window=4)
            assert text == expected and trace.drafted > 20
    one_layer = PPOWDrafter.from_target(target, "standalone").eval()
    assert one_layer.draft_model.model.config.num_hidden_layers == 1
    assert assisted(target, one_layer, prompts[0])[0] == alone(target, prompts)[0]


@pytest.mark.parametrize("architecture", ["standalone", "eagle", "medusa"])
@pytest.mark.parametrize("family", ALIBI)
def test_rows_of_a_padded_batch_with_linear_biases_are_what_each_prompt_gives_alone(
    family_target, family, architecture
):
    target = family_target(family)
    if architecture == "standalone":
        drafter = noisy_copy(target, 0.1)
    else:
        torch.manual_seed(0)
        drafter = PPOWDrafter.from_target(target, architecture, max_window=4).eval()
    prompts, ids, mask = ragged([7, 2, 16, 1, 9])
    given = together(target, drafter, ids, mask, window="fixed", max_window=4)
    assert_rows(given, alone(target, prompts))
    accepted = [trace.accepted for trace in drafter.last_traces]
    if architecture == "standalone":  # rows accept different lengths, which leaves holes
        assert len(set(accepted)) > 1 and 0 < sum(accepted) < sum(trace.drafted for trace in drafter.last_traces)


@pytest.mark.parametrize("family", ALIBI)
def test_trees_with_linear_biases_are_refused(family_target, make_target, family):
    target = family_target(family)
    prompts, ids, mask = ragged([5])
    with pytest.raises(
        ValueError, match="tree_nodes: .* places tokens by their order in the cache.*Leave out tree_nodes"
    ):
        together(target, PPOWDrafter.from_target(target, "eagle").eval(), ids, mask, tree_nodes=6)
    other = make_target("llama")
    drafter = PPOWDrafter.from_target(other, "standalone", draft_config=target.config).eval()
    with pytest.raises(ValueError, match="draft_config: .* Leave out tree_nodes"):
        together(other, drafter, ids, mask, window="fixed", tree_nodes=12, max_window=4)
    with pytest.raises(ValueError, match='draft_config: .* to train one, use architecture="eagle"'):
        drafter(ids, prefixes=torch.tensor([[1, 3]]), draft_ids=torch.ones(1, 2, 3, dtype=torch.long))
    given = together(other, drafter, ids, mask, window="fixed", max_window=4)
    assert_rows(given, alone(other, prompts))
