"""Targets that carry generation settings of their own, and what measures or trains a drafter for them."""

import copy

import pytest
import torch
from transformers import GenerationConfig

from ppow_hf import PPOWDrafter
from ppow_hf.data.targets import plain_distribution
from ppow_hf.measure.calibration import calibrate
from ppow_hf.measure.draft_table import draft_tables
from ppow_hf.measure.evaluation import decode

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]
OWN = {"use_cache": False, "repetition_penalty": 1.7, "do_sample": True, "temperature": 0.3, "top_k": 2}


@pytest.fixture
def target(make_target):
    target = copy.deepcopy(make_target("llama", initializer_range=0.3))
    target.generation_config = GenerationConfig(eos_token_id=7, pad_token_id=0, **OWN)
    return target


def test_a_training_evaluates_a_target_without_a_cache(target, make_trainer):
    """TRL: training scripts switch a model's `use_cache` off."""
    trainer = make_trainer(
        "eagle", "kl", target=target, evaluate=[{"input_ids": list(range(1, 20))}], eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    assert len([row for row in trainer.state.log_history if "eval_kl" in row]) == 2
    assert target.generation_config.use_cache is False


def test_measurements_follow_the_plain_distribution(target, make_target):
    """transformers: instruct models come with penalties and temperatures of their own."""
    plain = copy.deepcopy(make_target("llama", initializer_range=0.3))
    plain.generation_config = GenerationConfig(eos_token_id=7, pad_token_id=0)
    drafter = PPOWDrafter.from_target(plain, "standalone", max_window=3).eval()
    ids = [torch.tensor([prompt]) for prompt in PROMPTS]
    wanted = [table.text.tolist() for table in draft_tables(plain, drafter, ids, 10)]
    assert [table.text.tolist() for table in draft_tables(target, drafter, ids, 10)] == wanted
    assert decode(target, drafter, PROMPTS, 10, batch_size=2)[0] == wanted
    sampled = [decode(model, drafter, PROMPTS, 10, 1.0, window="fixed", max_window=3)[0] for model in (target, plain)]
    assert sampled[0] == sampled[1]
    assert set(calibrate(target, drafter, PROMPTS, 8)) == {"greedy", "sampling", "costs"}


def test_a_peft_target_gets_its_settings_back(target):
    """PEFT: `generate` of a wrapper hands its generation settings to the model inside."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(target, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with plain_distribution(wrapped):
        wrapped.generate(input_ids=torch.tensor(PROMPTS[:1]), max_new_tokens=2)
    for model in (wrapped, wrapped.get_base_model()):
        assert {name: getattr(model.generation_config, name) for name in OWN} == OWN


def test_a_lora_target_is_given_back_trainable(target, make_trainer):
    """PEFT: the adapter goes on training after a drafter was trained for it."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(target, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).train()
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    drafter = PPOWDrafter.from_target(wrapped, "eagle", max_window=3)
    make_trainer("eagle", "kl", target=wrapped, drafter=drafter).train()
    assert wrapped.training and trained
    assert {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad} == trained
