"""Muon beside AdamW: against torch's own optimizers, over the architectures' parameters, in the trainer."""

from pathlib import Path

import pytest
import torch
from slow_training import ARCHITECTURES, make_drafter, random_dataset
from torch import nn

from ppow_hf import PPOWDrafter
from ppow_hf.training import PPOWTrainingArguments, arguments
from ppow_hf.training.optimizers import Muon, make_optimizer, muon_groups, orthogonalize


def test_orthogonalized_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    matrices = torch.randn(3, 16, 48)
    for shape in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalize(shape))
        assert values.min() > 0.5 and values.max() < 1.3


@pytest.mark.parametrize(("scale", "torchs"), [("rms", "match_rms_adamw"), ("spectral", "original")])
def test_steps_are_those_of_torchs_muon_and_adamw(scale, torchs):
    torch.manual_seed(0)
    shapes = [(24, 8), (8, 24), (8, 24), (12, 12)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes], [nn.Parameter(torch.randn(9, 4))]
    theirs = [[nn.Parameter(p.detach().clone()) for p in part] for part in ours]
    start = [p.detach().clone() for part in ours for p in part]
    settings = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = [
        Muon(
            [{"params": ours[0], "kind": "muon"}, {"params": ours[1]}], scale=scale, dtype=torch.bfloat16, **settings
        ),
        torch.optim.Muon(theirs[0], adjust_lr_fn=torchs, **settings),
        torch.optim.AdamW(theirs[1], betas=(0.9, 0.95), **settings),
    ]
    for _ in range(5):
        for mine, other in zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for before, mine, other in zip(start, (*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True):
        moved = (other - before).norm()
        assert moved > 0.05 and (mine - other).norm() < 0.05 * moved  # bfloat16 products, in another order


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "medusa"])
def test_hidden_matrices_are_muons_and_vocabularies_are_not(make_target, architecture):
    drafter = make_drafter(make_target("llama"), architecture)
    names = {id(parameter): name for name, parameter in drafter.named_parameters()}
    matrices, others = ([names[id(p)] for p in group["params"]] for group in muon_groups(drafter))
    assert sorted(matrices + others) == sorted(names.values())
    assert {name for name in names.values() if "proj" in name} <= set(matrices)
    vocabulary = {name for name in names.values() if "lm_head" in name or "embed_tokens" in name}
    assert vocabulary and vocabulary <= set(others)
    assert all("norm" not in name for name in matrices)


def test_what_is_frozen_is_in_no_group(make_target):
    drafter = PPOWDrafter.from_target(make_target("llama"), shares_target_embeddings=False)
    drafter.train_embeddings(False)
    args = PPOWTrainingArguments(output_dir="unused", use_cpu=True, report_to=[])
    for muon in (0.0, 2.0):
        groups = make_optimizer(drafter, args, muon).param_groups
        assert id(drafter.draft_model.embed_tokens.weight) not in {id(p) for g in groups for p in g["params"]}


@pytest.mark.parametrize("objective", ["supervised", "ppow"])
def test_training_with_muon_goes_on_after_a_resume_as_if_it_had_not_stopped(make_trainer, objective):
    settings = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "muon": 2.0,
        "lr_scheduler_type": "constant", "dataset": random_dataset([24] * 4),
    }  # fmt: skip
    trainer = make_trainer("eagle", objective, **settings)
    trainer.train()
    found = {type(trainer.optimizer.optimizer), *(group["kind"] for group in trainer.optimizer.param_groups)}
    assert found == {Muon, "muon", "adamw"}
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [2e-2, 1e-2]
    expected = trainer.model.state_dict()
    resumed = make_trainer("eagle", objective, **settings)
    resumed.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-2"))
    for name, value in resumed.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_muon_learns_what_adamw_learns(make_trainer):
    losses = {}
    for muon in (0.0, 1.0):
        trainer = make_trainer(
            "eagle", "supervised", dataset=random_dataset([24] * 8), max_steps=30, per_device_train_batch_size=4,
            learning_rate=1e-2, muon=muon, logging_steps=1,
        )  # fmt: skip
        trainer.train()
        losses[muon] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[1.0] != losses[0.0]
    assert sum(losses[1.0][-5:]) < 0.7 * sum(losses[1.0][:5])


def test_what_muon_cannot_train_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"shape \(3,\); it takes matrices only"):
        Muon([{"params": [nn.Parameter(torch.zeros(3))], "kind": "muon"}])
    with pytest.raises(ValueError, match="scale: 'none'"):
        Muon([{"params": [nn.Parameter(torch.zeros(3))]}], scale="none")
    common = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": []}
    with pytest.raises(ValueError, match="muon: 1.0 given, .* optim='sgd'"):
        PPOWTrainingArguments(muon=1.0, optim="sgd", **common)


@pytest.mark.parametrize("how", ["fsdp", "ACCELERATE_USE_FSDP", "optim"])
def test_muon_steps_back_where_it_cannot_be_used_and_is_refused_where_it_is_asked_for(tmp_path, monkeypatch, how):
    """By the argument, or as `accelerate launch --use_fsdp` says it."""
    common = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": []}
    assert PPOWTrainingArguments(**common).muon == 2.0
    settings = {"fsdp": {"fsdp": "full_shard"}, "optim": {"optim": "sgd"}}.get(how, {})
    if how.isupper():
        monkeypatch.setenv(how, "true")
    warnings = []
    monkeypatch.setattr(arguments.logger, "warning", warnings.append)
    assert PPOWTrainingArguments(muon=0.0, **common, **settings).muon == 0 and not warnings
    assert PPOWTrainingArguments(**common, **settings).muon == 0
    obstacle = "optim='sgd'" if how == "optim" else "FSDP or DeepSpeed"
    assert len(warnings) == 1 and warnings[0].startswith("muon: not used") and obstacle in warnings[0]
    with pytest.raises(ValueError, match=f"muon: 1.0 given, and it cannot be combined with {obstacle}"):
        PPOWTrainingArguments(muon=1.0, **common, **settings)
