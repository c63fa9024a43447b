"""The trainer as a user meets it: it trains, logs, evaluates, saves, resumes, and refuses what cannot work."""

import copy
import json
import math
import threading
from pathlib import Path

import pytest
import torch
from slow_training import (
    ARCHITECTURES,
    BLOCKS,
    WINDOW,
    batch_of,
    draft_logits_along,
    make_drafter,
    random_dataset,
    rollout_of,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from ppow_hf import PPOWDrafter
from ppow_hf.data.files import ensure_writable
from ppow_hf.data.sequences import SequenceDataset
from ppow_hf.measure.evaluation import EVALUATION_METRICS
from ppow_hf.training import PPOWTrainer, PPOWTrainingArguments, preparation
from ppow_hf.training.batch_order import GroupedByLength, RepeatedBlocks
from ppow_hf.training.checkpoints import check_complete, last_complete_checkpoint

OBJECTIVES = ["supervised", "ppow"]
EVERY_KIND = [(kind, objective) for kind in [*ARCHITECTURES, "confident"] for objective in OBJECTIVES]
TEXT = "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n"


@pytest.fixture(scope="module")
def tokenizer():
    """64 tokens or fewer: the characters of a short text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=64, special_tokens=["<pad>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


@pytest.fixture
def make_trainer(tmp_path, make_target):
    """`make(architecture, objective, folder="run", ...)`: the same drafter, target and data at each call."""

    def make(
        architecture="eagle", objective="ppow", folder="run", *, target=None, drafter=None, train=None, evaluate=None,
        tokenizer=None, callbacks=None, **settings,
    ):  # fmt: skip
        target = target or make_target("llama", initializer_range=0.3)
        drafter = drafter or make_drafter(target, architecture)
        defaults = {
            "max_length": 32, "max_window": WINDOW, "num_prefixes": 3, "num_rollouts": 4, "rollout_temperature": 0.8,
            "unroll_steps": 3, "num_anchors": 64, "cost_ratio": 0.15, "per_device_train_batch_size": 2, "max_steps": 2,
            "logging_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "save_strategy": "no",
            "eval_prompts": 3, "eval_new_tokens": 8, "eval_prompt_length": 5, "disable_tqdm": True,
        }  # fmt: skip
        args = PPOWTrainingArguments(
            output_dir=str(tmp_path / folder), objective=objective, use_cpu=True, report_to=[], **(defaults | settings)
        )
        train = random_dataset([19, 11, 15, 17]) if train is None else train
        return PPOWTrainer(
            drafter, target, args, train_dataset=train, eval_dataset=evaluate, processing_class=tokenizer,
            callbacks=callbacks,
        )  # fmt: skip

    return make


def logged(trainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same_weights(found, expected, tolerance=1e-5):
    for name in expected:
        assert (found[name] - expected[name]).abs().max().item() <= tolerance, name


# What a run does


@pytest.mark.parametrize(("architecture", "objective"), EVERY_KIND)
def test_a_run_trains_logs_evaluates_and_keeps_the_best(make_trainer, architecture, objective):
    trainer = make_trainer(
        architecture, objective, evaluate=random_dataset([12, 9, 14], seed=3), max_steps=6, logging_steps=2,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_acceptance_length", save_total_limit=2, learning_rate=1e-2, adaw_start=0.4,
        eval_prompts=2, eval_new_tokens=6, calibrate_at_end=objective == "ppow",
    )  # fmt: skip
    before = weights(trainer)
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())

    rows = [row for row in trainer.state.log_history if "loss" in row]
    names = {"loss", "grad_norm", "kl"}
    if objective == "ppow":
        names |= {
            "reward/mean", "reward/speedup", "reward/proximity", "reward/throughput", "accepted_length", "entropy",
            "clip_fraction", "groups_without_spread", "verified_tokens_per_second", "text_kl", "target_forward_tokens",
        }  # fmt: skip
        assert logged(trainer, "adaw") == [0.0, 0.5, 1.0]  # uniform in the first 0.4 * 6 steps
    for row in rows:
        assert names <= row.keys() and all(math.isfinite(row[name]) for name in names)
    assert len(rows) == 3

    folder = Path(trainer.args.output_dir)
    lengths = dict(zip([2, 4, 6], logged(trainer, "eval_acceptance_length"), strict=True))
    best = max(lengths, key=lengths.get)
    assert trainer.state.best_model_checkpoint == str(folder / f"checkpoint-{best}")
    assert trainer.state.best_metric == lengths[best]
    kept = {path.name for path in folder.glob("checkpoint-*")}
    assert len(kept) == 2 and f"checkpoint-{best}" in kept and not (folder / ".staging").exists()
    for name in kept:
        check_complete(folder / name)
        state = json.loads((folder / name / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] is None or ".staging" not in state["best_model_checkpoint"]
    saved = PPOWDrafter.from_pretrained(folder / f"checkpoint-{best}")
    assert_same_weights(saved.state_dict(), trainer.model.state_dict(), 0.0)
    assert (folder / "training.png").stat().st_size > 1000 and (folder / "training.png").read_bytes()[:4] == b"\x89PNG"
    if objective == "supervised":
        assert trainer.model.config.calibration is None
        return
    # The window rule was fitted at the end, and travels with the drafter.
    assert set(trainer.model.config.calibration) == {"greedy", "sampling", "costs"}
    trainer.save_model(str(folder / "final"))
    again = PPOWDrafter.from_pretrained(folder / "final")
    assert again.config.calibration == trainer.model.config.calibration and again.config.max_window == WINDOW


@pytest.mark.parametrize("objective", ["tv", "0.3*kl + lk", "opd", "token_rl + 0.5*kl"])
def test_every_kind_of_objective_trains_and_is_logged(make_trainer, objective):
    trainer = make_trainer("eagle", objective, max_steps=12, learning_rate=3e-3, train=random_dataset([24] * 4))
    before = weights(trainer)
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in weights(trainer).items())
    for name in ("tv", "lk"):
        if name == objective.split(" + ")[-1]:
            assert sum(logged(trainer, name)[-3:]) < sum(logged(trainer, name)[:3])
    assert bool(logged(trainer, "accepted_length")) == ("opd" in objective or "token_rl" in objective)
    assert bool(logged(trainer, "text_kl")) == ("token_rl" in objective)


def test_an_objective_follows_its_schedule_and_goes_on_with_it_after_a_resume(make_trainer):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    trainer = make_trainer("standalone", "kl; 0.5: 0.3*kl + ppow", **settings)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows if "reward/mean" in row] == [3, 4]
    expected = weights(trainer)
    resumed = make_trainer("standalone", "kl; 0.5: 0.3*kl + ppow", **settings)
    resumed.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-2"))
    assert_same_weights(weights(resumed), expected)
    other = make_trainer("standalone", "kl", **settings)
    other.train()
    assert any((other.model.state_dict()[name] - value).abs().max() > 1e-4 for name, value in expected.items())


def test_a_resumed_drafter_reads_the_states_as_large_as_it_did(make_trainer, make_target):
    target = make_target("llama", initializer_range=0.3)
    plain, scaled = (make_drafter(target, "eagle", state_scales=scales) for scales in (None, [8.0, 4.0, 0.5]))
    settings = {"target": target, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    trainer = make_trainer("eagle", "supervised", drafter=plain, **settings)
    trainer.train()
    expected = weights(trainer)
    resumed = make_trainer("eagle", "supervised", drafter=scaled, **settings)
    resumed.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-2"))
    assert resumed.model.config.state_scales is None
    assert_same_weights(weights(resumed), expected)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *BLOCKS])
def test_supervised_loss_falls(make_trainer, architecture):
    train = random_dataset([24] * 8)
    trainer = make_trainer(
        architecture, "supervised", train=train, max_steps=30, per_device_train_batch_size=4, learning_rate=1e-2
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert len(losses) == 30 and sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_ppow_raises_the_reward_of_a_drafter_that_only_has_to_choose(make_trainer):
    """Two chosen windows per prefix, no anchors: the accepted length of the very sequences trained on must rise."""
    trainer = make_trainer(
        "standalone", train=random_dataset([16] * 4), per_device_train_batch_size=4, max_steps=40, learning_rate=1e-2,
        num_prefixes=8, num_rollouts=8, kl_coef=0.0, text_kl_coef=0.0, rollout_temperature=1.0, adaw_start=1.0,
        proximity_weight=0.0, max_window=2,
    )  # fmt: skip
    trainer.train()
    rewards = logged(trainer, "reward/mean")
    assert sum(rewards[-8:]) > 1.3 * sum(rewards[:8])


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "dspark"])
def test_evaluated_acceptance_length_is_that_of_generate(make_trainer, make_target, architecture):
    evaluation = SequenceDataset([list(range(1, 13)), list(range(20, 35))], [[False] * 4 + [True] * 8, [True] * 15])
    trainer = make_trainer(architecture, evaluate=evaluation, eval_prompt_length=6, eval_new_tokens=10)
    found = trainer.evaluate()
    target, rounds = make_target("llama", initializer_range=0.3), []
    # The prompt is what stands before the first learned token, or else the beginning of the text.
    for prompt in (list(range(1, 5)), list(range(20, 26))):
        ids = torch.tensor([prompt])
        drafter = trainer.model.eval().with_settings(window="fixed", max_window=WINDOW)
        output = target.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, assistant_model=drafter
        )
        assert output.shape[1] == len(prompt) + 10
        rounds += drafter.last_trace.rounds[1:]
    drafting = [r for r in rounds if r.window]
    assert found["eval_acceptance_length"] == pytest.approx(sum(r.accepted + 1 for r in drafting) / len(drafting))
    assert found["eval_wasted"] == pytest.approx(
        sum(r.window - r.accepted for r in rounds) / sum(r.window for r in rounds)
    )
    other = trainer.evaluate(random_dataset([9], seed=9), metric_key_prefix="test")
    assert {"test_acceptance_length", "test_kl", "test_tokens_per_target_forward"} <= other.keys()
    assert trainer.evaluate()["eval_acceptance_length"] == found["eval_acceptance_length"]  # of its own data again


def test_several_evaluation_datasets_by_name(make_trainer):
    """Each one's numbers are those of it alone, and the common ones of all the prompts in one dataset."""
    few, more = random_dataset([9, 12], seed=3), random_dataset([14, 8, 11], seed=4)
    items = [data[i] for data in (few, more) for i in range(len(data))]
    both = SequenceDataset(*([item[name].tolist() for item in items] for name in ("input_ids", "loss_mask")))
    settings = {
        "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_more_kl", "eval_prompts": 5,
    }  # fmt: skip
    trainer = make_trainer("eagle", "supervised", evaluate={"few": few, "more": more}, **settings)
    trainer.train()
    assert trainer.state.best_metric == min(logged(trainer, "eval_more_kl"))
    assert trainer.model.config.calibration
    found = trainer.evaluate()
    for name in EVALUATION_METRICS:
        assert found[f"eval_few_{name}"] == pytest.approx(trainer.evaluate(few)[f"eval_{name}"])
        assert found[f"eval_more_{name}"] == pytest.approx(trainer.evaluate(more)[f"eval_{name}"])
        if name != "repeated_8grams":
            assert found[f"eval_{name}"] == pytest.approx(trainer.evaluate({"both": both})[f"eval_{name}"], abs=1e-3)


@pytest.mark.parametrize("empty", [{}, {"code": None}])
def test_evaluation_data_without_data_is_refused(make_trainer, empty):
    with pytest.raises(ValueError, match="eval_dataset: .*pass data under each name"):
        make_trainer("eagle", "supervised", evaluate=empty)


@pytest.mark.parametrize(("architecture", "objective"), [("eagle", "supervised"), ("standalone", "ppow")])
def test_gradient_accumulation_equals_a_larger_batch(make_trainer, architecture, objective):
    runs = []
    for batch, accumulation in ((4, 1), (2, 2)):
        trainer = make_trainer(
            architecture, objective, f"batch{batch}", train=random_dataset([19, 11, 15, 17, 9, 13, 21, 12]),
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=3, optim="sgd",
            learning_rate=0.1,
        )  # fmt: skip
        trainer.train()
        runs.append(trainer)
    assert logged(runs[1], "loss") == pytest.approx(logged(runs[0], "loss"), abs=2e-4)
    assert logged(runs[1], "grad_norm") == pytest.approx(logged(runs[0], "grad_norm"), rel=1e-3)
    assert_same_weights(weights(runs[1]), weights(runs[0]))
    for name in ("reward/mean", "accepted_length") if objective == "ppow" else ():
        assert logged(runs[1], name) == pytest.approx(logged(runs[0], name), rel=1e-5)


class Snapshots(TrainerCallback):
    """The drafter after every step, and how often each event came."""

    def __init__(self):
        self.models, self.events = [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append("train_begin")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.events.append("step_end")
        self.models.append(copy.deepcopy(model).eval())

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events.append("log" if "loss" in logs else "other_log")

    def on_save(self, args, state, control, **kwargs):
        self.events.append("save")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        assert "eval_acceptance_length" in metrics
        self.events.append("evaluate")


def test_callbacks_are_called_as_in_any_trainer(make_trainer):
    snapshots = Snapshots()
    trainer = make_trainer(
        callbacks=[snapshots], evaluate=random_dataset([9]), eval_strategy="steps", eval_steps=2, save_steps=2,
        save_strategy="steps", max_steps=4, calibrate_at_end=False,
    )  # fmt: skip
    trainer.train()
    counts = {name: snapshots.events.count(name) for name in set(snapshots.events)}
    assert counts == {"train_begin": 1, "step_end": 4, "log": 4, "other_log": 3, "save": 2, "evaluate": 2}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_second_iteration_takes_the_clipped_step_on_the_same_rollouts(make_trainer, architecture):
    snapshots = Snapshots()
    trainer = make_trainer(
        architecture, callbacks=[snapshots], train=random_dataset([19, 11]), num_iterations=2, max_steps=4,
        learning_rate=0.05, optim="sgd", max_grad_norm=0.0, kl_coef=0.0, text_kl_coef=0.0, clip_range=0.1,
    )  # fmt: skip
    first = copy.deepcopy(trainer.model).eval()
    inputs, args = batch_of(trainer.train_dataset), trainer.args
    rollout = rollout_of(trainer, inputs, step=0)
    trainer.train()

    def log_probs(drafter, row, m):
        ids, drafted = inputs["input_ids"][row].tolist(), rollout.draft_ids[row, m].tolist()
        with torch.no_grad():
            logits = draft_logits_along(drafter, trainer.target_model, ids, int(rollout.prefixes[row, m]), drafted)
        return (logits / args.rollout_temperature).log_softmax(-1)[range(len(drafted)), drafted].tolist()

    windows, total, clipped, count = rollout.prefixes.shape[1], 0.0, 0, 0
    for row in range(2):
        for m in range(windows):
            advantage = rollout.advantages[row, m].item()
            old, new = log_probs(first, row, m), log_probs(snapshots.models[0], row, m)
            for j in range(min(int(rollout.accepted[row, m]) + 1, WINDOW)):
                ratio = math.exp(new[j] - old[j])
                bounded = min(max(ratio, 0.9), 1.1)
                total -= min(ratio * advantage, bounded * advantage) / (windows * WINDOW) / 2
                clipped += bounded * advantage < ratio * advantage
                count += 1
    assert logged(trainer, "loss")[1] == pytest.approx(total, abs=1e-4)
    assert logged(trainer, "clip_fraction")[1] == pytest.approx(clipped / count, abs=1e-4) and clipped
    # New rollouts in every second step only; where they are new, nothing is clipped.
    assert [row["step"] for row in trainer.state.log_history if "reward/mean" in row] == [1, 3]
    assert logged(trainer, "clip_fraction")[::2] == [0.0, 0.0]


def test_repeated_blocks_repeat_whole_blocks_in_an_order_of_seed_and_epoch():
    source = torch.utils.data.RandomSampler(range(11))
    sampler = RepeatedBlocks(source, block=3, times=2, seed=5)
    torch.manual_seed(0)
    orders = []
    for epoch in (0, 1, 0):
        torch.rand(epoch + 1)  # whatever the global state
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == len(sampler) == 18
        for start in range(0, 18, 6):
            assert order[start : start + 3] == order[start + 3 : start + 6]
        assert sorted(set(order)) == sorted(order[::6] + order[1::6] + order[2::6]) and len(set(order)) == 9
        orders.append(order)
    assert orders[0] == orders[2] != orders[1]


def test_batches_of_similar_lengths_hold_every_sequence_once_in_an_order_of_seed_and_epoch():
    lengths = torch.randint(20, 500, (163,), generator=torch.Generator().manual_seed(0))
    sampler = GroupedByLength(lengths, batch=4, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        torch.rand(epoch + 1)  # whatever the global state
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(163)) and len(sampler) == 163
    assert orders[0] == orders[2] != orders[1] != list(GroupedByLength(lengths, batch=4, seed=9))

    def padding(order):
        batches = lengths[order[:160]].view(40, 4)
        return 1 - float(batches.sum() / (4 * batches.max(1).values.sum()))

    assert padding(orders[0]) < 0.15 < 0.25 < padding(torch.randperm(163, generator=torch.Generator().manual_seed(1)))
    longest = lengths[orders[0][:160]].view(40, 4).max(1).values.float()
    assert abs(torch.corrcoef(torch.stack([longest, torch.arange(40.0)]))[0, 1]) < 0.4  # no run from short to long


def test_the_trainer_reads_batches_of_similar_lengths_and_other_ones_in_the_next_epoch(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=2)
    loader = trainer.get_train_dataloader()
    expected = GroupedByLength(trainer.train_dataset.lengths, 2, trainer.args.seed)
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        expected.set_epoch(epoch)
        read = [index for batch in loader for index in batch["index"].tolist()]
        assert read == list(expected)[: len(read)] and len(read) > 2


def test_training_twice_with_one_trainer_starts_on_new_rollouts(make_trainer):
    trainer = make_trainer(num_iterations=2, max_steps=3)
    trainer.train()
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "reward/mean" in row] == [1, 3]


@pytest.mark.parametrize(("architecture", "objective"), EVERY_KIND)
def test_gradient_checkpointing_changes_no_loss(make_trainer, architecture, objective):
    runs = []
    for checkpointing in (False, True):
        trainer = make_trainer(architecture, objective, gradient_checkpointing=checkpointing, max_steps=3)
        trainer.train()
        runs.append(trainer)
    assert logged(runs[1], "loss") == pytest.approx(logged(runs[0], "loss"), abs=1e-5)
    assert logged(runs[1], "grad_norm") == pytest.approx(logged(runs[0], "grad_norm"), rel=1e-4)


@pytest.mark.parametrize(("architecture", "objective"), EVERY_KIND)
def test_bf16_autocast_trains_close_to_float32(make_trainer, architecture, objective):
    runs = [make_trainer(architecture, objective, bf16=bf16, max_steps=2) for bf16 in (False, True)]
    for trainer in runs:
        trainer.train()
        assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    name = "text_kl" if objective == "ppow" else "loss"
    assert logged(runs[1], name)[0] != logged(runs[0], name)[0]
    if objective == "supervised":
        assert logged(runs[1], name) == pytest.approx(logged(runs[0], name), rel=0.05)


def test_embeddings_of_an_eagle_drafter_are_trained_only_on_request(make_trainer, make_target):
    for train_embeddings in (False, True):
        drafter = PPOWDrafter.from_target(make_target("llama", initializer_range=0.3))
        trainer = make_trainer("eagle", "supervised", drafter=drafter, train_embeddings=train_embeddings)
        theirs = trainer.target_model.get_input_embeddings().weight
        before = theirs.clone()
        assert trainer.model.config.shares_target_embeddings != train_embeddings
        assert ("draft_model.embed_tokens.weight" in weights(trainer)) == train_embeddings
        assert torch.equal(trainer.model.get_input_embeddings().weight, before)
        trainer.train()
        assert torch.equal(before, trainer.model.get_input_embeddings().weight) != train_embeddings
        assert torch.equal(before, theirs)


def test_the_target_is_frozen_and_given_back_as_it_was(make_trainer, make_target):
    target = copy.deepcopy(make_target("llama", initializer_range=0.3)).requires_grad_(True).train()
    target.model.norm.eval()
    target.lm_head.requires_grad_(False)
    before = copy.deepcopy(target.state_dict())
    make_trainer("standalone", "ppow", target=target).train()
    assert [name for name, module in target.named_modules() if not module.training] == ["model.norm"]
    assert [name for name, parameter in target.named_parameters() if not parameter.requires_grad] == ["lm_head.weight"]
    assert all(parameter.grad is None for parameter in target.parameters())
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


# The cost ratio


def test_a_given_cost_ratio_is_used_and_stored(make_trainer):
    trainer = make_trainer(cost_ratio=0.25, save_strategy="steps", save_steps=1, max_steps=1)
    expected = rollout_of(trainer, batch_of(trainer.train_dataset, [0, 1]))
    accepted = expected.accepted.float().unflatten(1, (3, 4))
    torch.testing.assert_close(expected.rewards["speedup"], accepted / (accepted * 0.25 + 1))
    trainer.train()
    assert trainer.cost_ratio == 0.25
    stored = json.loads((Path(trainer.args.output_dir) / "checkpoint-1/ppow_state.json").read_text())
    assert stored["cost_ratio"] == 0.25


def test_a_measured_cost_ratio_is_stored_and_taken_over_on_resume_unless_one_is_given(make_trainer):
    settings = {"save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(cost_ratio=None, max_steps=1, **settings)
    trainer.train()
    stored = json.loads((Path(trainer.args.output_dir) / "checkpoint-1/ppow_state.json").read_text())["cost_ratio"]
    assert stored == trainer.cost_ratio > 0
    for given, expected in ((None, stored), (0.5, 0.5)):
        trainer = make_trainer(cost_ratio=given, max_steps=2, **settings)
        trainer.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-1"))
        assert trainer.cost_ratio == expected and trainer.state.global_step == 2


# Data


def test_the_target_writes_its_own_text_for_prompts_from_a_file(
    make_trainer, make_target, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    prompts = ["def add", "def sub(a", "return a"]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    trainer = make_trainer(
        "standalone", train=str(path), evaluate=str(path), tokenizer=tokenizer, max_new_tokens=12,
        regenerate_temperature=0.0,
    )  # fmt: skip
    target = make_target("llama", initializer_range=0.3)
    for prompt, item in zip(prompts, trainer.train_dataset, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        plain = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert item["input_ids"].tolist() == plain[0].tolist()
        own = [False] * ids.shape[1] + [True] * 12
        assert item["loss_mask"].tolist() == own and item["target_written"].tolist() == own
    trainer.train()
    assert trainer.evaluate()["eval_acceptance_length"] >= 1
    assert list((tmp_path / "home").rglob("*.safetensors"))
    # Evaluation decodes the prompts, so the target writes nothing for them.
    assert [item["input_ids"].tolist() for item in trainer.eval_dataset] == tokenizer(prompts)["input_ids"]


def test_the_targets_completions_take_the_place_of_those_in_the_data_unless_they_are_asked_for(
    make_trainer, make_target, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    warnings = []
    monkeypatch.setattr(preparation.logger, "warning", warnings.append)
    rows = [{"prompt": "def add", "completion": "(a, b)"}, {"prompt": "return", "completion": " a"}]
    settings = {"train": rows, "tokenizer": tokenizer, "max_new_tokens": 6}
    given = tokenizer([row["prompt"] + row["completion"] for row in rows])["input_ids"]
    found = [item["input_ids"].tolist() for item in make_trainer("eagle", **settings, regenerate=False).train_dataset]
    assert found == given and not warnings
    target = make_target("llama", initializer_range=0.3)
    dataset = make_trainer("eagle", **settings).train_dataset
    assert "regenerate=False to train on them" in warnings[0] and len(warnings) == 1
    # Every other text is sampled.
    ids = tokenizer(rows[0]["prompt"], return_tensors="pt")["input_ids"]
    plain = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert dataset[0]["input_ids"].tolist() == plain[0].tolist() and dataset[0]["target_written"].any()
    assert not dataset[1]["target_written"].any()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a"}, True),
        ({"prompt": "a", "completion": "b"}, True),
        ({"messages": []}, True),
        ({"text": "a"}, False),
        ({"text": "a", "prompt": "b"}, False),
        ({"input_ids": [1], "prompt": "b"}, False),
    ],
)
def test_the_target_completes_rows_with_prompts(row, expected):
    assert preparation.target_completes(row, None) == expected
    assert preparation.target_completes(row, True) and not preparation.target_completes(row, False)


@pytest.mark.parametrize("kind", ["text", "prompt and completion", "datasets"])
def test_rows_of_text_and_of_completions_are_trained_on(make_trainer, tokenizer, kind):
    rows = [{"text": TEXT}] * 4
    if kind == "prompt and completion":
        rows = [{"prompt": "def add", "completion": "(a, b):\n"}] * 4
    elif kind == "datasets":
        import datasets

        rows = datasets.Dataset.from_list(rows)
    trainer = make_trainer(
        "eagle", "supervised", train=rows, evaluate=rows, tokenizer=tokenizer, regenerate=False
    )  # fmt: skip
    trainer.train()
    assert trainer.model.config.target_vocabulary_fingerprint
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


def test_a_known_vocabulary_survives_training_without_a_tokenizer(make_trainer, make_target):
    drafter = make_drafter(make_target("llama", initializer_range=0.3), "eagle")
    drafter.config.target_vocabulary_fingerprint = "0123456789abcdef"
    make_trainer("eagle", "supervised", drafter=drafter).train()
    assert drafter.config.target_vocabulary_fingerprint == "0123456789abcdef"


# Checkpoints


@pytest.fixture
def finished(make_trainer):
    trainer = make_trainer("standalone", "supervised", save_strategy="steps", save_steps=1, max_steps=3)
    trainer.train()
    return Path(trainer.args.output_dir)


def damage(folder: Path, name: str, how: str) -> None:
    path = folder / name
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "how"),
    [("model.safetensors", "truncated"), ("optimizer.pt", "missing"), ("trainer_state.json", "empty"),
     ("complete.json", "missing"), ("complete.json", "truncated"), ("complete.json", "empty"),
     ("ppow_state.json", "missing")],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused_by_name_and_passed_over_by_true(make_trainer, finished, name, how):
    damage(finished / "checkpoint-3", name, how)
    trainer = make_trainer("standalone", "supervised", max_steps=4)
    with pytest.raises(ValueError, match=f"resume_from_checkpoint: .*{name}"):
        trainer.train(resume_from_checkpoint=str(finished / "checkpoint-3"))
    assert last_complete_checkpoint(finished) == str(finished / "checkpoint-2")
    trainer.train(resume_from_checkpoint=True)
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [1, 2, 3, 4]


def test_what_a_killed_save_left_behind_is_never_taken(make_trainer, finished):
    (finished / ".staging").mkdir()
    (finished / "checkpoint-3").rename(finished / ".staging" / "checkpoint-9")  # complete, but not in its place
    (finished / "checkpoint-7").mkdir()  # nothing in it
    (finished / "checkpoint-final").mkdir()
    assert last_complete_checkpoint(finished) == str(finished / "checkpoint-2")
    trainer = make_trainer("standalone", "supervised", max_steps=4, save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert last_complete_checkpoint(finished) == str(finished / "checkpoint-4")
    assert not (finished / ".staging").exists()


def test_resuming_without_any_checkpoint_starts(make_trainer):
    trainer = make_trainer("eagle", "supervised")
    assert last_complete_checkpoint(trainer.args.output_dir) is None
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


def test_a_checkpoint_that_is_not_there_is_refused(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="resume_from_checkpoint: .*nowhere"):
        make_trainer("eagle", "supervised").train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_saving_ratios_and_epochs_are_accepted_and_a_save_between_iterations_is_not(make_trainer):
    make_trainer(save_strategy="steps", save_steps=0.5).train()
    make_trainer(save_strategy="epoch", num_iterations=3, max_steps=3).train()
    with pytest.raises(ValueError, match="save_steps: 3 .* num_iterations=2"):
        make_trainer(save_strategy="steps", save_steps=3, num_iterations=2).train()


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_window": 0}, "max_window: 0 given"),
        ({"num_rollouts": 0}, "num_rollouts: 0 given"),
        ({"num_rollouts": 1}, "num_rollouts: 1 given"),
        ({"num_prefixes": 0}, "num_prefixes: 0 given"),
        ({"objective": "sft"}, "objective: 'sft'"),
        ({"verify_with": "text"}, "verify_with: 'text'"),
        ({"unroll_steps": 0}, "unroll_steps: 0 given"),
        ({"objective": "kl + opd", "max_length": 10, "max_window": 10}, "max_length: 10"),
        ({"rollout_temperature": 0.0}, "rollout_temperature: 0.0"),
        ({"target_temperature": -1.0}, "target_temperature: -1.0"),
        ({"regenerate_temperature": -1.0}, r"regenerate_temperature: \[-1.0\]"),
        ({"regenerate_temperature": []}, "regenerate_temperature"),
        ({"text_weighting": "all"}, "text_weighting: 'all'"),
        ({"muon": -1.0}, "muon: -1.0 given"),
        ({"cost_ratio": math.nan}, "cost_ratio: nan"),
        ({"metric_for_best_model": "eval_loss"}, r"metric_for_best_model: 'eval_loss' .*acceptance_length"),
        ({"max_length": 10, "max_window": 10}, "max_length: 10 .* max_window=10"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        PPOWTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **{"objective": "ppow"} | settings)


@pytest.mark.parametrize(
    ("settings", "metric", "greater"),
    [
        ({"load_best_model_at_end": True}, "eval_acceptance_length", True),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "eval_acceptance_length", True),
        ({"save_strategy": "best"}, "eval_acceptance_length", True),
        ({"metric_for_best_model": "kl"}, "kl", False),
        ({"metric_for_best_model": "eval_wasted"}, "eval_wasted", False),
    ],
)
def test_the_best_model_accepts_the_most_where_nothing_else_is_asked(tmp_path, settings, metric, greater):
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    args = PPOWTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **steps | settings)
    assert (args.metric_for_best_model, args.greater_is_better) == (metric, greater)


@pytest.mark.parametrize(
    ("train", "error", "message"),
    [
        ([], ValueError, "train_dataset: .* no rows"),
        (SequenceDataset([], []), ValueError, "train_dataset: .* no sequences"),
        ([{"question": "?"}], ValueError, r"train_dataset: .*\['question'\]"),
        ("nowhere.jsonl", FileNotFoundError, "train_dataset: no file"),
        (random_dataset([9]), ValueError, "train_dataset: 1 sequences .* batch of 2"),
        (random_dataset([9, 40]), ValueError, "train_dataset: .* 40 tokens, more than max_length=32"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(make_trainer, tokenizer, train, error, message):
    with pytest.raises(error, match=message):
        make_trainer(train=train, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("architecture", "objective"),
    [("eagle", "supervised"), ("confident", "supervised"), ("eagle", "kl"), ("eagle", "tv"), ("standalone", "tv"),
     ("eagle", "ppow"), ("standalone", "ppow")],
)  # fmt: skip
def test_texts_too_short_for_a_window_end_no_training(make_trainer, architecture, objective):
    masks = [[True] * length for length in (2, 12, 3, 12)]
    masks[2] = [False, True, False]
    trainer = make_trainer(
        architecture, objective, train=random_dataset([2, 12, 3, 12], loss_masks=masks), max_steps=4,
        per_device_train_batch_size=1, unroll_steps=1 if objective == "kl" else 3,
    )  # fmt: skip
    before = weights(trainer)
    trainer.train()
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
    assert any(not torch.equal(before[name], value) for name, value in weights(trainer).items())


def test_a_drafter_keeps_the_window_that_it_was_trained_with(make_trainer):
    trainer = make_trainer("eagle", "supervised", max_window=3, max_steps=1, cost_ratio=None)
    trainer.train()
    assert trainer.model.config.max_window == 3
    assert trainer.cost_ratio is None  # no reward asks for it, so that nothing is measured


def test_more_refusals_of_data(make_trainer):
    with pytest.raises(ValueError, match="train_dataset: 2 sequences .* batch of 4"):
        make_trainer(train=random_dataset([9, 9]), num_iterations=2, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="max_length: 300 given .* 300 tokens .* 256"):
        make_trainer(train=random_dataset([300, 9]), max_length=300)
    with pytest.raises(ValueError, match="train_dataset: no sequence has a token to learn after its first 2"):
        make_trainer(train=random_dataset([3, 3], loss_masks=[[True, True, False]] * 2))
    trainer = make_trainer()
    trainer.train_dataset = None
    with pytest.raises(ValueError, match="train_dataset: None"):
        trainer.train()
    with pytest.raises(ValueError, match="eval_dataset: None"):
        trainer.evaluate()


def test_a_tokenizer_of_another_target_is_refused(make_trainer, make_target, tokenizer):
    target = make_target("llama", initializer_range=0.3)
    drafter = PPOWDrafter.from_target(target, "eagle", target_vocabulary_fingerprint="0" * 16)
    with pytest.raises(ValueError, match="processing_class: its vocabulary"):
        make_trainer(drafter=drafter, tokenizer=tokenizer)
    small = make_target("llama", vocab_size=8)
    with pytest.raises(ValueError, match="processing_class: the tokenizer has .* only 8"):
        make_trainer(target=small, drafter=PPOWDrafter.from_target(small, "eagle"), tokenizer=tokenizer)


def test_a_drafter_of_another_target_is_refused(make_trainer, make_target):
    target = make_target("llama", initializer_range=0.3)
    wide, large = make_target("llama", hidden_size=48), make_target("llama", vocab_size=100)
    with pytest.raises(ValueError, match="target_model: its hidden size is 32.* of 48"):
        make_trainer(target=target, drafter=PPOWDrafter.from_target(wide, "eagle"))
    with pytest.raises(ValueError, match="100 tokens and the target's 64"):
        make_trainer(target=target, drafter=PPOWDrafter.from_target(large, "standalone"))
    with pytest.raises(ValueError, match="model: a LlamaForCausalLM given"):
        make_trainer(target=target, drafter=wide)


def test_an_output_directory_that_cannot_be_written_is_refused_before_anything_is_done(make_trainer, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ValueError, match="output_dir: cannot write to .*taken"):
        make_trainer(folder="taken")
    with pytest.raises(ValueError, match="output_dir: cannot write to .*below"):
        make_trainer(folder="taken/below")


def test_processes_that_check_one_output_directory_at_once_do_not_disturb_each_other(tmp_path):
    failures = []

    def check():
        try:
            for _ in range(50):
                ensure_writable(tmp_path, "output_dir")
        except ValueError as error:
            failures.append(error)

    threads = [threading.Thread(target=check) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and not list(tmp_path.iterdir())


def test_a_target_without_finite_logits_is_refused(make_trainer, make_target):
    target = copy.deepcopy(make_target("llama", initializer_range=0.3))
    target.lm_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="target_model: its logits are not finite"):
        make_trainer(target=target, drafter=make_drafter(make_target("llama", initializer_range=0.3), "eagle"))


@pytest.mark.parametrize(("architecture", "objective"), EVERY_KIND)
def test_a_drafter_without_finite_logits_stops_the_run(make_trainer, architecture, objective):
    trainer = make_trainer(architecture, objective)
    with torch.no_grad():
        next(p for name, p in trainer.model.named_parameters() if name.endswith("norm.weight")).fill_(math.nan)
    with pytest.raises(ValueError, match="^model: .* at step 0"):
        trainer.train()
