"""Number formats on a CPU, and what evaluation costs by default."""

import pytest
import torch

from ppow_hf.commands import train as train_command
from ppow_hf.training import PPOWTrainingArguments
from ppow_hf.training.arguments import EVAL_PROMPTS

WORDS = ["--target", "tiny", "--train_data", "none.jsonl", "--output_dir", "out"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_bfloat16_on_a_cpu_needs_no_other_argument(make_trainer):
    """transformers: `bf16=True` without `use_cpu` is refused there."""
    trainer = make_trainer("eagle", "kl", bf16=True, use_cpu=False)
    trainer.train()
    assert trainer.args.use_cpu and trainer.state.log_history[-1]["train_loss"] > 0
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("pays", [True, False])
def test_ppow_train_follows_the_machine_unless_told(monkeypatch, tmp_path, pays):
    """TRL: on a CPU with bfloat16 instructions float32 is the slower choice; it stays where it is asked for."""
    monkeypatch.setattr("ppow_hf.measure.costs.bfloat16_pays", lambda device: pays)
    words = [*WORDS[:-1], str(tmp_path)]
    assert train_command.parse(words).training.bf16 is pays
    assert train_command.parse([*words, "--bf16", "false"]).training.bf16 is False
    assert train_command.parse([*words, "--target_dtype", "float32"]).training.bf16 is False
    assert PPOWTrainingArguments(str(tmp_path), use_cpu=True).bf16 is False  # the Python interface is as it was


def test_evaluation_takes_a_tenth_of_the_time_by_default(make_trainer):
    """SpecForge: evaluations took longer than the training between them."""
    rows = [{"input_ids": [1 + number, *range(2, 20)]} for number in range(40)]
    settings = {"evaluate": rows, "per_device_eval_batch_size": 2, "eval_prompts": None}
    trainer = make_trainer("eagle", "kl", eval_strategy="steps", eval_steps=1, max_steps=3, **settings)
    assert len(trainer._eval_prompts(trainer.eval_dataset)) == EVAL_PROMPTS
    trainer.train()  # steps so quick that a tenth of their time holds no evaluation: one batch is decoded all the same
    assert trainer.eval_prompts == len(trainer._eval_prompts(trainer.eval_dataset)) == 2
    assert len([row for row in trainer.state.log_history if "eval_kl" in row]) == 3


def test_after_a_long_training_all_prompts_are_decoded(make_trainer):
    """The same, with time enough."""
    rows = [{"input_ids": [1 + number, *range(2, 20)]} for number in range(40)]
    trainer = make_trainer("eagle", "kl", evaluate=rows, per_device_eval_batch_size=2, eval_prompts=None)
    trainer._train_began -= 1e6
    trainer._choose_eval_prompts({"": trainer.eval_dataset})
    assert trainer.eval_prompts == EVAL_PROMPTS
