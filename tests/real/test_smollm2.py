"""SmolLM2-135M-Instruct with its shipped drafter: lossless in float32, chats, training, exports.

`PPOW_REAL_TARGETS` names a folder with the target in `smollm2`. The reference is plain `generate`.
"""

import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ppow_hf
from ppow_hf import PPOWDrafter
from ppow_hf.cli import main
from ppow_hf.data.models import shipped_drafter
from ppow_hf.data.targets import left_padded, until_end

pytestmark = pytest.mark.real
NEW_TOKENS = 48
SUBJECTS = ["a lighthouse", "the number 7", "bread", "a fair coin", "rain", "a linked list", "Mars", "a chess game"]
REQUESTS = ["Tell me a story about {}.", "List five facts about {}.", "Write a Python class for {}."]
QUESTIONS = [request.format(subject) for request, subject in itertools.product(REQUESTS, SUBJECTS)][:20]


@pytest.fixture(scope="module")
def folder(real_targets):
    return real_targets / "smollm2"


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def target(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def drafter():
    return PPOWDrafter.from_pretrained(ppow_hf.drafter_path("smollm2-135m-eagle"), dtype=torch.float32).eval()


def encode(tokenizer, messages: list[dict]) -> torch.Tensor:
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return torch.tensor([ids])


def greedy(target, prompts: list[torch.Tensor], **way) -> list[list[int]]:
    ids, mask = left_padded([prompt[0].tolist() for prompt in prompts], target.config.pad_token_id or 0)
    output = target.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, **way)
    return [until_end(row, [target.config.eos_token_id]) for row in output[:, ids.shape[1] :].tolist()]


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [encode(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]


@pytest.fixture(scope="module")
def plain(target, prompts):
    return [greedy(target, [prompt])[0] for prompt in prompts]


@pytest.mark.parametrize("settings", [{}, {"lookup": True}, {"window": "fixed", "max_window": 8}], ids=str)
def test_chains_through_assistant_model_are_lossless(target, drafter, prompts, plain, settings):
    view = drafter.with_settings(**settings)
    kls, accepted = [], 0
    for prompt, expected in zip(prompts, plain, strict=True):
        assert greedy(target, [prompt], assistant_model=view)[0] == expected
        kls += [kl for one in view.last_trace.rounds for kl in one.kl]
        accepted += view.last_trace.accepted
    assert accepted > 100
    assert torch.tensor(kls).isfinite().all() and max(kls) > 2 * min(kls) > 0  # the gauge moves


def test_trees_are_lossless(target, drafter, prompts, plain):
    way = drafter.generate_with(tree_nodes=16)
    for prompt, expected in zip(prompts, plain, strict=True):
        assert greedy(target, [prompt], custom_generate=way)[0] == expected


@pytest.mark.parametrize("settings", [{}, {"lookup": True}, {"tree_nodes": 16}], ids=str)
def test_batches_are_lossless(target, drafter, prompts, settings):
    for start in range(0, len(prompts), 5):
        batch = prompts[start : start + 5]
        expected = [greedy(target, [prompt])[0] for prompt in batch]
        assert greedy(target, batch, custom_generate=drafter.generate_with(**settings)) == expected


def test_a_chat_of_three_turns_is_lossless(target, drafter, tokenizer):
    messages: list[dict] = []
    for question in ("Name three rivers.", "Which of them is the longest?", "Write a haiku about it."):
        messages.append({"role": "user", "content": question})
        prompt = encode(tokenizer, messages)
        expected = greedy(target, [prompt])[0]
        assert greedy(target, [prompt], assistant_model=drafter)[0] == expected
        messages.append({"role": "assistant", "content": tokenizer.decode(expected, skip_special_tokens=True)})


def test_train_save_load_generate_and_export(folder, target, drafter, tokenizer, tmp_path):
    """The whole way by the command line, with the target's embeddings shared until an export writes them."""
    rows = [{"messages": [{"role": "user", "content": question}]} for question in QUESTIONS[:8]]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts, trained = tmp_path / "texts.jsonl", tmp_path / "drafter"
    model = ["--target", str(folder)]
    assert main(["write", *model, "--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(texts),
                 "--max-new-tokens", "32", "--dtype", "bfloat16"]) == 0  # fmt: skip
    assert main(["train", *model, "--train_data", str(texts), "--output_dir", str(trained), "--max_steps", "4",
                 "--draft_vocab_size", "1024", "--max_length", "96", "--calibrate_at_end", "false"]) == 0  # fmt: skip
    assert sum(file.stat().st_size for file in trained.glob("*.safetensors")) < 30e6  # in float32, no embeddings
    loaded = PPOWDrafter.from_pretrained(trained, dtype=torch.float32).eval()
    prompt = encode(tokenizer, [{"role": "user", "content": QUESTIONS[0]}])
    expected = greedy(target, [prompt])[0]
    assert greedy(target, [prompt], assistant_model=loaded)[0] == expected
    for format in ("vllm", "speculators"):
        out = tmp_path / format
        assert main(["export", str(trained), *model, "--format", format, "--output-dir", str(out)]) == 0
        assert (out / "config.json").is_file()


def test_the_drafter_of_the_package_is_found_by_the_targets_tokenizer(tokenizer):
    assert shipped_drafter(tokenizer) == "smollm2-135m-eagle"
