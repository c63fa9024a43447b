"""DFlash drafters in a real vLLM on a CPU, on its ordinary runner: the same text as without, our acceptance.

One layer: with more of them vLLM 0.32 on a CPU norms all layers' context keys by the first one's k_norm.
"""

import copy
import shutil

import pytest
import torch
from engine_helpers import NEW_TOKENS, WINDOW, assert_same_acceptance, run_ours
from safetensors.torch import load_file, save_file
from test_speculators import assert_same_tensors, with_speculators

from ppow_hf import PPOWDrafter, import_drafter, tiny
from ppow_hf.measure.evaluation import decode
from ppow_hf.runtime.modeling_ppow import collect_target_states
from ppow_hf.serving.vllm_runner import run_vllm

pytestmark = pytest.mark.engines

LEARNED, STEPS = 3, 200


@pytest.fixture(scope="module")
def block(target, eagle, prompts) -> PPOWDrafter:
    return trained_block(target, eagle, prompts)


def trained_block(target, eagle, prompts, **heads) -> PPOWDrafter:
    """Trained here for a minute, until it knows by heart what the target writes after the first prompts."""
    torch.manual_seed(0)
    drafter = PPOWDrafter.from_target(target, "block", block_size=WINDOW, num_hidden_layers=1, **heads)
    outputs, _ = decode(target, eagle, prompts[:LEARNED], NEW_TOKENS)
    texts = [torch.tensor([[*prompt, *output]]) for prompt, output in zip(prompts, outputs, strict=False)]
    with torch.no_grad():
        layers = drafter.config.target_layer_ids
        states = [collect_target_states(target(t, output_hidden_states=True).hidden_states, layers) for t in texts]
    optimizer = torch.optim.Adam(drafter.parameters(), lr=5e-3)
    for step in range(STEPS):
        text, state, start = texts[step % LEARNED], states[step % LEARNED], len(prompts[step % LEARNED])
        prefixes = torch.arange(start, text.shape[1] - WINDOW)[None]
        windows = text[:, prefixes[0][:, None] + 1 + torch.arange(WINDOW)]
        features = drafter(text, state, prefixes=prefixes, draft_ids=windows).window_features
        logits = drafter.draft_logits(features)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 2), windows.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimizer.step()
    print(f"loss {loss.item():.3f}, right {(logits.argmax(-1) == windows).float().mean((0, 1)).tolist()}")
    return drafter.eval()


@pytest.fixture(scope="module")
def reduced_block(block, target, prompts) -> PPOWDrafter:
    """The same with a head of its own for 1,000 tokens, and scales moved into the norms from after them."""
    outputs, _ = decode(target, block, prompts[:LEARNED], NEW_TOKENS)
    counts = torch.bincount(torch.tensor(outputs).flatten(), minlength=block.config.vocab_size).float()
    counts[::5] += 0.5
    kept = counts.topk(1000).indices.sort().values
    config = copy.deepcopy(block.config)
    config.draft_vocab_size, config.shares_target_head = len(kept), False
    drafter = PPOWDrafter(config)
    weights = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    scale = torch.logspace(-1, 1, config.draft_config.hidden_size)
    weights["draft_model.norm.weight"] *= scale
    weights["draft_model.lm_head.weight"] = target.get_output_embeddings().weight[kept] / scale
    for name in ("hidden_norm", "layers.0.input_layernorm"):
        weights[f"draft_model.{name}.weight"] *= scale
    for name in ("q", "k", "v"):
        weights[f"draft_model.layers.0.self_attn.{name}_proj.weight"] /= scale
    drafter.load_state_dict(weights, strict=False)
    drafter.set_draft_vocabulary(kept)
    drafter.attach_target(target)
    return drafter.eval()


@pytest.fixture(scope="module")
def our_runs(block, reduced_block, target, prompts):
    return {name: run_ours(target, drafter, prompts) for name, drafter in drafters(block, reduced_block).items()}


def drafters(block, reduced_block) -> dict[str, PPOWDrafter]:
    return {"block": block, "reduced-block": reduced_block}


def speculative(folder):
    return {"method": "dflash", "model": str(folder), "num_speculative_tokens": WINDOW}


@pytest.mark.parametrize("name", ["block", "reduced-block"])
def test_dflash_export_is_served_with_our_acceptance(name, block, reduced_block, exported, our_runs, plain, prompts):
    folder = exported(name, drafters(block, reduced_block)[name])
    served = run_vllm(tiny.target_path(), prompts, NEW_TOKENS, speculative(folder))
    assert served.outputs == plain.outputs
    assert served.outputs == our_runs[name].outputs
    assert_same_acceptance(served, our_runs[name])


def test_speculators_directory_is_served_by_itself(reduced_block, exported, our_runs, plain, prompts):
    folder = exported("reduced-block", reduced_block, "speculators")
    served = run_vllm(folder, prompts, NEW_TOKENS)
    assert served.outputs == plain.outputs
    assert_same_acceptance(served, our_runs["reduced-block"])


@pytest.mark.parametrize("damage", ["d2t", "norm.weight", "hidden_norm.weight"])
def test_acceptance_betrays_a_damaged_directory(damage, reduced_block, exported, our_runs, prompts, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(exported("reduced-block", reduced_block), folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[damage]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    try:
        served = run_vllm(tiny.target_path(), prompts, NEW_TOKENS, speculative(folder))
    except RuntimeError as error:  # a later vLLM may refuse it, which is better still
        assert damage in str(error) or "weights" in str(error)
        return
    with pytest.raises(AssertionError, match="vLLM"):
        assert_same_acceptance(served, our_runs["reduced-block"])


@pytest.mark.parametrize("heads", [{}, {"markov_rank": 8, "confidence_head": True}], ids=["dflash", "dspark"])
def test_speculators_own_classes_load_and_save_an_export(heads, target, engine_python, exported, tmp_path):
    name = "own-dspark" if heads else "own-dflash"
    kept = torch.arange(0, target.config.vocab_size, 2)
    counts = torch.zeros(target.config.vocab_size).index_fill(0, kept, 1.0)
    drafter = PPOWDrafter.from_target(
        target, "block", block_size=WINDOW, draft_vocab_size=len(kept), token_counts=counts, **heads
    )
    folder = exported(name, drafter, "speculators")
    resaved, printed = with_speculators(engine_python, "resave", folder, tmp_path / "resaved")
    assert ("DSpark" if heads else "DFlash") in printed
    assert_same_tensors(folder, resaved)
    found = import_drafter(resaved, target)
    same = ("block_size", "sample_from_anchor", "mask_token_id", "markov_rank", "confidence_head", "target_layer_ids")
    assert all(getattr(found.config, name) == getattr(drafter.config, name) for name in same)
