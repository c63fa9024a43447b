"""Exported drafters in a real SGLang on a CPU, greedy, in float32: the same text, and the same draft tokens as ours.

SGLang's scheduler, workers, loader, models and drafting are its own; its compiled CPU library, which no registry has,
is stood in for (sglang_on_a_cpu). An export that lost something still gives the same text and accepts much, so the
tokens are compared: in each round, SGLang's window beside the one that our decoding drafts from the same context with
a fixed window of the same length. Ours runs on after the last token, where it would draft shorter windows.
"""

import json
import shutil

import pytest
from engine_helpers import interpreter_or_skip, random_prompts, random_qwen3, run_ours, smollm2_or_skip, trained_eagle
from sglang_helpers import (
    assert_same_rounds,
    assert_same_trees,
    run_job,
    run_sglang,
    speculative,
    transformers_drafts,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppow_hf import tiny
from ppow_hf.export import export_drafter
from ppow_hf.runtime.trees import TreeRule
from ppow_hf.serving.sglang_runner import PYTHON_VARIABLE

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def python() -> str:
    return interpreter_or_skip("SGLang", PYTHON_VARIABLE, "make_sglang_environment.sh")


@pytest.fixture(scope="module")
def few_prompts(prompts):
    return prompts[:5]


@pytest.fixture(scope="module")
def plain_outputs(python, few_prompts, tmp_path_factory):
    """SGLang without a drafter."""
    return run_sglang(python, tmp_path_factory.mktemp("plain"), tiny.target_path(), few_prompts).outputs


def test_stand_ins_do_what_sglangs_triton_kernels_do(python, tmp_path):
    run_job(python, "sgl_kernel_checks.py", ["result.json"], tmp_path, TRITON_INTERPRET="1")
    found = json.loads((tmp_path / "result.json").read_text())
    assert len(found) == 12 and not any(found.values()), "\n".join(found.values())


def test_eagle_chain_with_a_reduced_vocabulary(
    python, exported, reduced_eagle, target, few_prompts, plain_outputs, tmp_path
):
    folder = exported("reduced-eagle", reduced_eagle, "sglang")
    served = run_sglang(python, tmp_path, tiny.target_path(), few_prompts, speculative("EAGLE3", folder))
    ours = run_ours(target, reduced_eagle, few_prompts)
    assert served.outputs == plain_outputs == ours.outputs
    assert_same_rounds(served, ours)


def test_comparing_tokens_betrays_shifted_layers(
    python, exported, reduced_eagle, target, few_prompts, plain_outputs, tmp_path
):
    """SGLang reads each state one layer too early: the same text, much accepted, other tokens."""
    folder = tmp_path / "shifted"
    shutil.copytree(exported("reduced-eagle", reduced_eagle, "sglang"), folder)
    config = json.loads((folder / "config.json").read_text())
    layers = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = [layer - 1 for layer in layers]
    (folder / "config.json").write_text(json.dumps(config))
    served = run_sglang(python, tmp_path, tiny.target_path(), few_prompts, speculative("EAGLE3", folder))
    ours = run_ours(target, reduced_eagle, few_prompts)
    assert served.outputs == plain_outputs
    assert served.acceptance_length > 0.5 * ours.acceptance_length
    with pytest.raises(AssertionError, match="SGLang drafts otherwise"):
        assert_same_rounds(served, ours)


def test_eagle_tree(python, exported, eagle, target, few_prompts, plain_outputs, tmp_path, monkeypatch):
    """SGLang's trees are EAGLE-2's, so ours take EAGLE-2's reach here: the product of the drafter's probabilities.

    From its third level on SGLang approximates: a branch that goes on below another branch's node keeps its own
    earlier keys and values. So a few nodes of little reach differ.
    """
    monkeypatch.setattr(TreeRule, "child_worth", lambda rule, probabilities, features: list(probabilities))
    folder, branches, nodes = exported("eagle", eagle, "sglang"), 3, 15
    arguments = speculative("EAGLE3", folder, branches, nodes)
    served = run_sglang(python, tmp_path, tiny.target_path(), few_prompts, arguments)
    ours = run_ours(target, eagle, few_prompts, tree_nodes=nodes, tree_branches=branches)
    assert served.outputs == plain_outputs == ours.outputs
    assert_same_trees(served, ours, most_different=0.1, most_nodes=2)


def test_standalone(python, exported, standalone, few_prompts, plain_outputs, tmp_path):
    """SGLang leaves out the prompt's first token for the drafter, as an EAGLE drafter reads each token one later.

    So its windows are compared with what transformers says from the export after the context without that token.
    """
    folder = exported("standalone", standalone, "sglang")
    served = run_sglang(python, tmp_path, tiny.target_path(), few_prompts, speculative("STANDALONE", folder))
    assert served.outputs == plain_outputs
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    for prompt, output, rounds in zip(few_prompts, served.outputs, served.rounds, strict=True):
        committed = 1
        for r in rounds:
            assert r.drafted == transformers_drafts(model, [*prompt[1:], *output[:committed]])
            committed += r.accepted + 1
    assert served.acceptance_length > 2


def test_qwen3_and_the_embeddings_as_a_state(python, tmp_path):
    """A whole draft vocabulary, and state 0 of the target, its embeddings: SGLang is told layer -1."""
    target, prompts = random_qwen3(), random_prompts()
    drafter = trained_eagle(target, prompts, target_layer_ids=[0, 2, 3])
    target.save_pretrained(tmp_path / "target")
    export_drafter(drafter, tmp_path / "drafter", "sglang", target=target)
    plain = run_sglang(python, tmp_path, tmp_path / "target", prompts)
    arguments = speculative("EAGLE3", tmp_path / "drafter")
    served = run_sglang(python, tmp_path, tmp_path / "target", prompts, arguments)
    ours = run_ours(target, drafter, prompts)
    assert served.outputs == plain.outputs == ours.outputs
    assert_same_rounds(served, ours)


@pytest.mark.real
def test_smollm2_with_a_reduced_vocabulary(python, tmp_path):
    """A real target, in the folder `smollm2` of the one that PPOW_REAL_TARGETS names, with a drafter trained here."""
    model = smollm2_or_skip()
    target = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval().requires_grad_(False)
    target.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(model)
    questions = (
        "Why is the sky blue?",
        "How do I boil an egg?",
        "Write a poem about rain.",
        "What is a prime number?",
    )
    chats = [[{"role": "user", "content": question}] for question in questions]
    chats = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    prompts = [chat[-min(map(len, chats)) :] for chat in chats]
    drafter = trained_eagle(target, prompts, steps=80, learning_rate=1e-3, draft_vocab_size=4096)
    export_drafter(drafter, tmp_path / "drafter", "sglang", target=target)
    plain = run_sglang(python, tmp_path, model, prompts)
    served = run_sglang(python, tmp_path, model, prompts, speculative("EAGLE3", tmp_path / "drafter"))
    ours = run_ours(target, drafter, prompts)
    assert served.outputs == plain.outputs == ours.outputs
    assert_same_rounds(served, ours)
    assert ours.acceptance_length > 1.5
