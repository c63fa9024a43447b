"""SmolLM2-135M-Instruct and its eagle drafter in vLLM and llama.cpp, chats, in float32: what they accept is ours.

`PPOW_REAL_TARGETS` names a folder with the target in `smollm2`.
"""

import pytest
import torch
from engine_helpers import WINDOW, assert_same_acceptance, interpreter_or_skip, run_ours, smollm2_or_skip
from transformers import AutoModelForCausalLM, AutoTokenizer

import ppow_hf
from ppow_hf import PPOWDrafter
from ppow_hf.export import export_drafter, write_causal_lm
from ppow_hf.measure.evaluation import decode
from ppow_hf.serving.llamacpp_runner import PYTHON_VARIABLE, run_llamacpp
from ppow_hf.serving.vllm_runner import run_vllm

pytestmark = [pytest.mark.engines, pytest.mark.real]

TOKENS = 64
QUESTIONS = [
    "Tell me a story about a lighthouse.",
    "List five facts about bread.",
    "Write a Python class for a linked list.",
    "Why is the sky blue?",
    "How do I sort a list of names?",
]


@pytest.fixture(scope="module")
def folder():
    return smollm2_or_skip()


@pytest.fixture(scope="module")
def real_target(folder):
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    target.generation_config.eos_token_id = None
    return target


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def drafter(real_target):
    path = ppow_hf.drafter_path("smollm2-135m-eagle")
    drafter = PPOWDrafter.from_pretrained(path, dtype=torch.float32).eval()
    drafter.attach_target(real_target)
    return drafter


@pytest.fixture(scope="module")
def chats(tokenizer):
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False) for turn in turns]


def test_vllm_accepts_at_each_position_what_we_do(engine_python, folder, real_target, drafter, chats, tmp_path):
    export_drafter(drafter, tmp_path, target=real_target)
    plain = run_vllm(folder, chats, TOKENS)
    speculative = {"method": "eagle3", "model": str(tmp_path), "num_speculative_tokens": WINDOW}
    served = run_vllm(folder, chats, TOKENS, speculative)
    ours = run_ours(real_target, drafter, chats, new_tokens=TOKENS)
    assert served.outputs == plain.outputs == ours.outputs
    assert_same_acceptance(served, ours)


def test_llamacpp_accepts_as_many_as_we_do(real_target, tokenizer, drafter, chats, tmp_path):
    interpreter_or_skip("llama.cpp", PYTHON_VARIABLE, "make_llamacpp_environment.sh")
    write_causal_lm(tmp_path / "target.gguf", real_target, tokenizer, "float32")
    export_drafter(drafter, tmp_path, "gguf", target=real_target, tokenizer=tokenizer, gguf_dtype="float32")
    plain = run_llamacpp(tmp_path / "target.gguf", chats, TOKENS)
    served = run_llamacpp(tmp_path / "target.gguf", chats, TOKENS, "eagle3", tmp_path / "drafter-f32.gguf", WINDOW)
    outputs, traces = decode(real_target, drafter, chats, TOKENS, window="fixed", max_window=WINDOW)
    rounds = [r for trace in traces for r in trace.rounds[1:]]
    ours = len(rounds), sum(r.window for r in rounds), sum(r.accepted for r in rounds)
    print(f"rounds, drafted, accepted: llama.cpp {served.drafts} {served.drafted} {served.accepted}, ours {ours}")
    assert served.outputs == plain.outputs == outputs
    assert (served.drafts, served.drafted, served.accepted) == pytest.approx(ours, rel=0.01, abs=2)
