"""Gemma 3 270M: a vocabulary of 262,144, of which the drafter has 16,384, and layers that see 512 tokens.

`PPOW_REAL_TARGETS` names a folder with the target in `gemma3`. The reference is plain `generate`.
"""

import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppow_hf import PPOWDrafter, PPOWTrainer, PPOWTrainingArguments
from ppow_hf.data.targets import left_padded

pytestmark = pytest.mark.real
DRAFT_VOCABULARY = 16_384


@pytest.fixture(scope="module")
def pair(real_targets, tmp_path_factory):
    """The target and a drafter of a few steps on source code, which must have learned something."""
    target = AutoModelForCausalLM.from_pretrained(real_targets / "gemma3", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(real_targets / "gemma3")
    ids = tokenizer(inspect.getsource(torch.nn.Module))["input_ids"]
    counts = torch.bincount(torch.tensor(ids), minlength=target.config.vocab_size)
    drafter = PPOWDrafter.from_target(target, draft_vocab_size=DRAFT_VOCABULARY, token_counts=counts)
    rows = [{"input_ids": ids[start : start + 128]} for start in range(0, 1024, 128)]
    args = PPOWTrainingArguments(
        output_dir=str(tmp_path_factory.mktemp("gemma3")), max_steps=8, per_device_train_batch_size=2, max_length=128,
        logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", calibrate_at_end=False, bf16=False,
    )  # fmt: skip
    trainer = PPOWTrainer(drafter, target, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    return target, drafter.eval(), ids


def generate(target, prompts: list[list[int]], **way) -> list[list[int]]:
    ids, mask = left_padded(prompts, target.config.pad_token_id or 0)
    output = target.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, **way)
    return output[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("settings", [{"window": "fixed", "max_window": 5}, {"lookup": True}], ids=str)
def test_text_past_the_sliding_window_is_lossless(pair, settings):
    target, drafter, ids = pair
    assert target.config.get_text_config().sliding_window == 512
    for length in (500, 700):
        prompt = ids[:length]
        view = drafter.with_settings(**settings)
        assert generate(target, [prompt], assistant_model=view) == generate(target, [prompt])
        assert view.last_trace.drafted > 0


def test_a_batch_past_the_sliding_window_is_lossless(pair):
    target, drafter, ids = pair
    prompts = [ids[:520], ids[100:600], ids[:40]]
    alone = [generate(target, [prompt])[0] for prompt in prompts]
    assert generate(target, prompts, custom_generate=drafter.generate_with(window="fixed", max_window=5)) == alone


def test_the_drafters_logits_are_of_the_reduced_vocabulary(pair):
    target, drafter, _ = pair
    assert drafter.draft_model.lm_head.weight.shape == (DRAFT_VOCABULARY, target.config.hidden_size)
