"""Options of transformers' Trainer that drafters' training would take and ignore: refused by name."""

import dataclasses
import logging

import pytest
from slow_training import random_dataset
from transformers import EarlyStoppingCallback

from ppow_hf.training import PPOWTrainingArguments
from ppow_hf.training.launch import check_launch


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing_factor", 0.1), ("torch_compile", True), ("torch_compile_backend", "eager"),
        ("prediction_loss_only", True), ("include_for_metrics", ["loss"]), ("batch_eval_metrics", True),
        ("eval_accumulation_steps", 2), ("bf16_full_eval", True), ("label_names", ["labels"]),
        ("use_liger_kernel", True), ("debug", "underflow_overflow"),
    ],
)  # fmt: skip
def test_an_argument_without_effect_is_refused(tmp_path, name, value):
    """transformers: a trainer of its own loss and evaluation passes these by."""
    with pytest.raises(ValueError, match=f"^{name}: .*Leave it out"):
        PPOWTrainingArguments(str(tmp_path), use_cpu=True, **{name: value})


def test_arguments_are_made_again_from_others(tmp_path):
    """transformers: what `dataclasses.replace` and a saved record of arguments do."""
    args = PPOWTrainingArguments(str(tmp_path), use_cpu=True, objective="tv")
    assert dataclasses.replace(args, learning_rate=1e-4).objective == "tv"


def test_a_sampler_of_whole_steps_beside_steps_that_share_sequences_is_refused(tmp_path):
    options = {"objective": "ppow", "num_iterations": 2, "train_sampling_strategy": "batch_rebalance"}
    with pytest.raises(ValueError, match="^train_sampling_strategy: 'batch_rebalance' gives each step"):
        PPOWTrainingArguments(str(tmp_path), use_cpu=True, **options)


def test_compilation_by_the_launcher_is_refused(tmp_path, monkeypatch):
    """accelerate: `--dynamo_backend` compiles every model that is prepared."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    with pytest.raises(ValueError, match="^--dynamo_backend: 'inductor' given"):
        PPOWTrainingArguments(str(tmp_path), use_cpu=True)


@pytest.mark.parametrize("name", ["compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"])
def test_a_function_that_would_never_be_called_is_refused(make_trainer, name):
    """TRL: metrics of one's own."""
    with pytest.raises(ValueError, match=f"^{name}: .*Leave it out"):
        make_trainer(trainer_options={name: lambda *_: {}})


@pytest.mark.parametrize(
    ("callback", "message"),
    [("early", "'early' is no TrainerCallback"), (EarlyStoppingCallback, "an EarlyStoppingCallback given without")],
)
def test_callbacks_that_cannot_work_are_refused_at_once(make_trainer, callback, message):
    """Axolotl: an early stop without a metric or evaluations, noticed when training begins."""
    with pytest.raises(ValueError, match=f"^callbacks: {message}"):
        make_trainer(trainer_options={"callbacks": [callback]})


def test_an_early_stop_is_by_acceptance_length_where_no_metric_was_given(make_trainer):
    options = {"callbacks": [EarlyStoppingCallback(early_stopping_patience=1)]}
    trainer = make_trainer(
        evaluate=random_dataset([9, 12], seed=4), trainer_options=options, eval_strategy="steps", eval_steps=1,
        max_steps=9, learning_rate=0.0,
    )  # fmt: skip
    trainer.train()
    assert trainer.args.metric_for_best_model == "eval_acceptance_length" and trainer.args.greater_is_better
    assert trainer.state.global_step == 2  # nothing is learned, so that the second evaluation is no better


@pytest.mark.parametrize("started", [None, "2"])
def test_one_process_of_several_that_were_asked_for_is_said(monkeypatch, caplog, started):
    """accelerate: on a machine without several GPUs `--num_processes 2` starts one process."""
    for name, value in (("ACCELERATE_USE_CPU", "False"), ("MASTER_PORT", "29500"), ("OMPI_COMM_WORLD_SIZE", started)):
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    check_launch(fp16=False)
    assert ("one was started" in caplog.text) == (started is None)
