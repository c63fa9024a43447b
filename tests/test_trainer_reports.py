"""What testers of the trainer reported: resumes of other trainings, arguments without effect, logs."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from slow_training import ARCHITECTURES, make_drafter, random_dataset
from transformers import EarlyStoppingCallback, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ppow_hf import PPOWDrafter
from ppow_hf.training import PPOWTrainer, PPOWTrainingArguments
from ppow_hf.training.optimizers import Muon, make_optimizer

SAVES = {"save_strategy": "steps", "save_steps": 2}
EVALUATES = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
REPEATED = {"objective": "ppow", "num_iterations": 2, "adaw_start": 1.0}


@pytest.fixture
def make(tmp_path, make_target):
    """`make(architecture, folder="run", target=None, drafter=None, train=None, evaluate=False, callbacks=None, ...)`:
    trainers that take four steps of two sequences; `evaluate` is data, or whether to have two prompts."""

    def make(
        architecture="eagle", folder="run", *, target=None, drafter=None, train=None, evaluate=False, callbacks=None,
        **settings,
    ):  # fmt: skip
        target = target or make_target("llama", initializer_range=0.3)
        defaults = {
            "objective": "kl", "max_length": 32, "max_window": 3, "unroll_steps": 2, "cost_ratio": 0.15,
            "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no",
            "eval_prompts": 2, "eval_new_tokens": 6, "eval_prompt_length": 5, "disable_tqdm": True,
            "calibrate_at_end": False, "report_to": [], "use_cpu": True,
        }  # fmt: skip
        return PPOWTrainer(
            drafter or make_drafter(target, architecture), target,
            PPOWTrainingArguments(str(tmp_path / folder), **(defaults | settings)),
            train_dataset=train or random_dataset([19, 11, 15, 17, 14, 13, 12, 18, 16, 20]),
            eval_dataset=random_dataset([12, 12], seed=3) if evaluate is True else evaluate or None,
            callbacks=callbacks,
        )  # fmt: skip

    return make


def moe_target() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3, pad_token_id=0,
        bos_token_id=None, eos_token_id=None, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        output_router_logits=True,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def used_rollouts(trainer, monkeypatch) -> list[tuple[int, list[int], int]]:
    """Of each micro-batch the step, its sequences, and the step at which its rollouts were made."""
    used: list = []
    made: dict[int, tuple] = {}
    next_rollout = trainer._next_rollout

    def noted(model, batch, *rest):
        rollout = next_rollout(model, batch, *rest)
        step, rows = trainer.state.global_step, batch.inputs["index"].tolist()
        _, of_step, of_rows = made.setdefault(id(rollout), (rollout, step, rows))  # kept, so that ids stay apart
        assert of_rows == rows
        used.append((step, rows, of_step))
        return rollout

    monkeypatch.setattr(trainer, "_next_rollout", noted)
    return used


# Rollouts for several gradient steps


def test_a_resume_between_two_steps_on_the_same_rollouts_goes_on_with_those_of_its_sequences(make, monkeypatch):
    make(max_steps=5, **REPEATED, **SAVES).train()
    resumed = make(max_steps=9, **REPEATED, **SAVES)
    used = used_rollouts(resumed, monkeypatch)
    resumed.train(resume_from_checkpoint=True)
    assert [(step, of_step) for step, _, of_step in used] == [(5, 5), (6, 6), (7, 6), (8, 8)]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_smaller_batches_after_a_lack_of_memory_have_their_own_rollouts(make, monkeypatch, failing):
    trainer = make(auto_find_batch_size=True, per_device_train_batch_size=4, **REPEATED)
    used = used_rollouts(trainer, monkeypatch)
    step, calls = trainer.training_step, []

    def training_step(*args, **kwargs):
        calls.append(1)
        if len(calls) == failing:
            raise RuntimeError("CUDA out of memory.")
        return step(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    after = used[failing - 1 :]
    assert [(step, of_step) for step, _, of_step in after] == [(0, 0), (1, 0), (2, 2), (3, 2)]
    assert {len(rows) for _, rows, _ in after} == {3}


def test_a_share_of_the_steps_is_a_place_for_checkpoints_between_rollouts(make):
    trainer = make(max_steps=8, save_strategy="steps", save_steps=0.25, **REPEATED)
    assert trainer.args.save_steps == 0.25
    make(max_steps=-1, num_train_epochs=1, save_strategy="steps", save_steps=0.25, **REPEATED)
    with pytest.raises(ValueError, match=r"save_steps: 0.25 \(3 of 10 steps\) is no multiple of num_iterations=2"):
        make(max_steps=10, save_strategy="steps", save_steps=0.25, **REPEATED)


# Resumes


def test_a_checkpoint_of_the_drafter_alone_is_not_gone_on_with(make):
    trainer = make(save_only_model=True, **SAVES)
    trainer.train()
    trainer.save_model()
    finished = make(save_only_model=True, **SAVES)
    finished.train(resume_from_checkpoint=True)
    assert finished.already_finished
    with pytest.raises(ValueError, match="resume_from_checkpoint: .*checkpoint-4' was written with save_only_model"):
        make(save_only_model=True, max_steps=6, **SAVES).train(resume_from_checkpoint=True)


def test_a_resume_with_another_target_is_refused(make, make_target):
    first = make(**SAVES)
    first.train()
    other = make_target("llama", initializer_range=0.3, seed=9)
    drafter = make_drafter(make_target("llama", initializer_range=0.3), "eagle")
    with pytest.raises(ValueError, match=r"trained otherwise: target_model \(fingerprint\) was"):
        make(target=other, drafter=drafter, max_steps=6, **SAVES).train(resume_from_checkpoint=True)
    del first._run_record["target_model (fingerprint)"]  # as earlier versions wrote it
    state = Path(first.args.output_dir, "checkpoint-4")
    first._save_checkpoint(first.model, None)
    assert "fingerprint)" not in (state / "ppow_state.json").read_text().replace("train_dataset (fingerprint)", "")
    resumed = make(max_steps=6, **SAVES)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


def test_a_target_is_recognised_in_another_number_format_and_inside_an_adapter(make_target):
    from ppow_hf.training.run_folder import weights_fingerprint

    target = make_target("llama", initializer_range=0.3)
    same = type(target)(target.config).to(torch.bfloat16)
    same.load_state_dict(target.state_dict())
    assert weights_fingerprint(target) == weights_fingerprint(same)
    with torch.device("meta"):
        assert weights_fingerprint(type(target)(target.config)) is None


@pytest.mark.parametrize(
    ("architecture", "named"), [("standalone", "model.config.architecture"), ("dspark", "model.config.architecture")]
)
def test_a_resume_with_another_drafter_is_refused(make, architecture, named):
    make("eagle", **SAVES).train()
    with pytest.raises(ValueError, match=f"resume_from_checkpoint: .* was trained otherwise: {named} was 'eagle'"):
        make(architecture, max_steps=6, **SAVES).train(resume_from_checkpoint=True)


def test_a_resume_with_a_drafter_of_another_size_is_refused(make, make_target):
    make("dflash", **SAVES).train()
    with pytest.raises(ValueError, match="trained otherwise: .*model.config.markov_rank was 0 and is 3"):
        make("dspark", max_steps=6, **SAVES).train(resume_from_checkpoint=True)
    target = make_target("llama", initializer_range=0.3)
    deeper = make_drafter(target, "standalone", num_hidden_layers=2)
    make("standalone", "other", **SAVES).train()
    with pytest.raises(ValueError, match="trained otherwise: draft_config.num_hidden_layers was . and is 2"):
        make(folder="other", drafter=deeper, max_steps=6, **SAVES).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kept", [True, False])
def test_the_best_checkpoint_of_a_finished_run_is_found_where_its_folder_was_moved(make, tmp_path, caplog, kept):
    settings = {**EVALUATES, "load_best_model_at_end": True, "evaluate": True, "metric_for_best_model": "kl"}
    trainer = make(**settings, max_steps=3, learning_rate=1.0, warmup_steps=0)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-3"
    expected = PPOWDrafter.from_pretrained(best if kept else best.parent / "checkpoint-3").state_dict()
    shutil.move(best.parent, tmp_path / "moved")
    if not kept:
        shutil.rmtree(tmp_path / "moved" / best.name)
    again = make(folder="moved", **settings, max_steps=3, learning_rate=1.0, warmup_steps=0)
    with caplog.at_level("WARNING"):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert ("load_best_model_at_end: the best checkpoint" in caplog.text) != kept
    for name, value in again.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_a_run_that_was_stopped_early_is_finished_until_its_patience_is_raised(make, caplog):
    settings = {**EVALUATES, "load_best_model_at_end": True, "evaluate": True, "max_steps": 4}
    stopped = make(**settings, callbacks=[EarlyStoppingCallback(1)])
    stopped.train()
    stopped.save_model()
    steps = stopped.state.global_step
    assert steps < 4
    again = make(**settings, callbacks=[EarlyStoppingCallback(1)])
    with caplog.at_level("WARNING"):
        again.train(resume_from_checkpoint=True)
    assert again.already_finished and again.state.global_step == steps
    assert "Raise early_stopping_patience to go on" in caplog.text
    for callbacks in ([EarlyStoppingCallback(2)], None):
        longer = make(**settings, callbacks=callbacks)
        longer.train(resume_from_checkpoint=True)
        assert longer.state.global_step > steps and not longer.already_finished
        shutil.rmtree(Path(longer.args.output_dir, f"checkpoint-{longer.state.global_step}"), ignore_errors=True)


# Targets that are mixtures of experts


def test_a_target_that_gives_its_routers_logits_trains_and_is_evaluated(make):
    """Its balancing loss is computed for whole batches, and would not fit windows after a cache."""
    target = moe_target()
    drafter = PPOWDrafter.from_target(target, "eagle").float()
    trainer = make(target=target, drafter=drafter, evaluate=True, objective="ppow", max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.evaluate()["eval_acceptance_length"] >= 1
    assert target.config.output_router_logits


@pytest.mark.parametrize("settings", [{}, {"tree_nodes": 6}], ids=["chains", "trees"])
def test_a_target_that_gives_its_routers_logits_generates_in_batches(settings):
    target = moe_target()
    view = PPOWDrafter.from_target(target, "eagle").eval().with_settings(window="fixed", max_window=3, **settings)
    prompts, options = torch.randint(1, 64, (2, 9)), {"do_sample": False, "max_new_tokens": 12}
    assert torch.equal(target.generate(prompts, assistant_model=view, **options), target.generate(prompts, **options))


# Arguments


@pytest.mark.parametrize(("architecture", "options"), [("eagle", {"shares_target_embeddings": True}), ("medusa", {})])
def test_noise_on_embeddings_that_a_drafter_does_not_have_is_refused(make, make_target, architecture, options):
    target = make_target("llama", initializer_range=0.3)

    def drafter():
        return make_drafter(target, architecture, **options)

    with pytest.raises(ValueError, match="neftune_noise_alpha: 5.0 given, .* no token embeddings of its own"):
        make(target=target, drafter=drafter(), neftune_noise_alpha=5.0)
    if architecture == "eagle":
        make(target=target, drafter=drafter(), neftune_noise_alpha=5.0, train_embeddings=True).train()


def test_a_loss_over_the_tokens_of_one_process_is_refused(make):
    with pytest.raises(ValueError, match="average_tokens_across_devices: False given, .* Leave it out"):
        make(average_tokens_across_devices=False)


def test_a_schedule_that_follows_a_metric_follows_acceptance(make):
    trainer = make(lr_scheduler_type="greedy", evaluate=True, eval_strategy="steps", eval_steps=2)
    assert trainer.args.metric_for_best_model == "eval_acceptance_length" and trainer.args.greater_is_better
    trainer.train()


def test_batches_can_be_made_in_processes_that_are_spawned(make):
    trainer = make()
    collator = pickle.loads(pickle.dumps(trainer.data_collator))
    item = trainer.train_dataset[0]
    assert torch.equal(collator([item])["input_ids"], trainer.data_collator([item])["input_ids"])


# Logs and evaluation


@pytest.mark.parametrize(("muon", "schedule"), [(2.0, "constant"), (2.0, "reduce_lr_on_plateau"), (0.0, "constant")])
def test_the_logged_learning_rate_is_the_given_one(make, muon, schedule):
    trainer = make(
        muon=muon, learning_rate=1e-3, lr_scheduler_type=schedule, warmup_steps=0, max_steps=2, evaluate=True,
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer.train()
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([1e-3, 1e-3])


def test_metrics_that_nothing_logs_are_not_kept(make):
    trainer = make(logging_strategy="no")
    trainer.train()
    assert not trainer._metrics


def test_evaluation_of_one_of_several_datasets_by_its_name(make):
    code, chat = random_dataset([12, 12], seed=3), random_dataset([9, 14], seed=4)
    trainer = make(evaluate={"code": code, "chat": chat})
    found, expected = trainer.evaluate("chat"), trainer.evaluate(chat)
    assert {k: v for k, v in found.items() if "runtime" not in k} == {
        k: v for k, v in expected.items() if "runtime" not in k
    }


def test_a_prediction_has_the_metrics_of_an_evaluation(make):
    trainer = make(evaluate=True)
    data = random_dataset([9, 14], seed=4)
    found, expected = trainer.predict(data), trainer.evaluate(data)
    assert found.predictions is None
    assert found.metrics["test_acceptance_length"] == expected["eval_acceptance_length"]
    assert all(name.startswith("test_") or name == "epoch" for name in found.metrics)


# Weight decay


@pytest.mark.parametrize("muon", [0.0, 2.0])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "medusa", "dspark"])
def test_what_decays_is_what_trainer_lets_decay(make, architecture, muon):
    trainer = make(architecture, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    optimizer = make_optimizer(trainer.model, trainer.args, muon)
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert decayed == trained & set(trainer.get_decay_parameter_names(trainer.model))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)


def test_an_optimizer_state_in_which_norms_decayed_is_refused():
    matrix, norm = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
    earlier = Muon([{"params": [matrix], "kind": "muon"}, {"params": [norm]}]).state_dict()
    both = torch.nn.Parameter(torch.zeros(3, 2))
    now = Muon([{"params": [matrix], "kind": "muon"}, {"params": [both]}, {"params": [norm]}])
    with pytest.raises(ValueError, match="resume_from_checkpoint: it was trained by an earlier version"):
        now.load_state_dict(earlier)
