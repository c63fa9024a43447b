"""Shared by the tests of what users of other libraries reported: tiny trainers for targets of every kind."""

import pytest


@pytest.fixture
def make_trainer(tmp_path, make_target):
    """`make(architecture, objective, target=None, drafter=None, train=None, evaluate=None, **arguments)`."""
    from slow_training import make_drafter, random_dataset

    from ppow_hf.training import PPOWTrainer, PPOWTrainingArguments

    def make(
        architecture="eagle", objective="kl", *, target=None, drafter=None, train=None, evaluate=None, tokenizer=None,
        trainer_options=None, **settings,
    ):  # fmt: skip
        target = target or make_target("llama", initializer_range=0.3)
        drafter = drafter or make_drafter(target, architecture)
        defaults = {
            "max_length": 32, "max_window": 3, "unroll_steps": 2, "cost_ratio": 0.15, "max_steps": 2,
            "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no", "eval_prompts": 2,
            "eval_new_tokens": 6, "eval_prompt_length": 5, "disable_tqdm": True, "calibrate_at_end": False,
            "report_to": [], "use_cpu": True,
        }  # fmt: skip
        args = PPOWTrainingArguments(str(tmp_path / "run"), objective=objective, **(defaults | settings))
        return PPOWTrainer(
            drafter, target, args, train_dataset=random_dataset([19, 11, 15, 17]) if train is None else train,
            eval_dataset=evaluate, processing_class=tokenizer, **(trainer_options or {}),
        )  # fmt: skip

    return make
