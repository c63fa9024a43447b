"""A Qwen3 target, whose heads are wider than its hidden size divided by their number, with a drafter trained here."""

import pytest
import torch
from engine_helpers import NEW_TOKENS, WINDOW, assert_same_acceptance, run_ours
from transformers import Qwen3Config, Qwen3ForCausalLM

from ppow_hf import PPOWDrafter
from ppow_hf.export import export_drafter
from ppow_hf.serving.vllm_runner import run_vllm

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def qwen3():
    """Random weights: its greedy text runs into loops, which a drafter learns in seconds."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen3ForCausalLM(config).float().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 256, (8, 12), generator=generator).tolist()


@pytest.fixture(scope="module")
def drafter(qwen3, prompts):
    torch.manual_seed(0)
    drafter = PPOWDrafter.from_target(qwen3, "eagle")
    ids = torch.tensor(prompts)
    text = qwen3.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    hidden = qwen3(text, output_hidden_states=True).hidden_states
    states = torch.cat([hidden[layer] for layer in drafter.config.target_layer_ids], dim=-1)
    optimizer = torch.optim.Adam(drafter.parameters(), lr=3e-3)
    for _ in range(60):
        logits = drafter(text, target_states=states).logits[:, 1:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return drafter.eval()


def test_eagle_export_for_qwen3(engine_python, qwen3, drafter, prompts, tmp_path):
    qwen3.save_pretrained(tmp_path / "target")
    export_drafter(drafter, tmp_path / "drafter", target=qwen3, share_embeddings=False)
    options = {"skip_tokenizer_init": True}
    plain = run_vllm(tmp_path / "target", prompts, NEW_TOKENS, **options)
    speculative = {"method": "eagle3", "model": str(tmp_path / "drafter"), "num_speculative_tokens": WINDOW}
    served = run_vllm(tmp_path / "target", prompts, NEW_TOKENS, speculative, **options)
    ours = run_ours(qwen3, drafter, prompts)
    assert served.outputs == plain.outputs == ours.outputs
    assert_same_acceptance(served, ours)
