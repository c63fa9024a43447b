"""What accelerators meet first, as far as a machine without one can show it; the rest is in tests/gpu."""

import copy
from types import SimpleNamespace

import pytest
import torch
from slow_training import gradients, make_drafter, random_dataset, rollout_of

from ppow_hf import PPOWDrafter
from ppow_hf.training import PPOWTrainer, PPOWTrainingArguments
from ppow_hf.training.checks import check_masks
from ppow_hf.training.losses import paired_logits
from ppow_hf.training.target import FrozenTarget

# -- training


def test_of_several_visible_gpus_training_uses_one_and_says_so(tmp_path, make_target, caplog):
    target = make_target("llama")
    args = PPOWTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_length=32, max_steps=1,
                                 per_device_train_batch_size=3, cost_ratio=0.1)  # fmt: skip
    args._n_gpu = 2  # what transformers counts where two are visible to one process
    trainer = PPOWTrainer(make_drafter(target, "eagle"), target, args, train_dataset=random_dataset())
    assert args.n_gpu == 1 and args.train_batch_size == 3
    trainer.train()
    assert isinstance(trainer.model_wrapped, PPOWDrafter)  # no DataParallel around it


@pytest.mark.parametrize("launched", [False, True])
def test_fp16_is_refused_by_name(tmp_path, monkeypatch, launched):
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match=("--mixed_precision" if launched else "fp16") + ": .*bf16=True"):
        PPOWTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], fp16=not launched)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_windows_are_not_trained_through_attention_that_takes_no_masks(tmp_path, attention):
    target = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(_attn_implementation=attention)))
    common = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": []}
    with pytest.raises(ValueError, match='attn_implementation="sdpa"'):
        check_masks(target, PPOWTrainingArguments(objective="ppow", **common))
    check_masks(target, PPOWTrainingArguments(objective="supervised", **common))  # reads the text alone


@pytest.mark.parametrize("architecture", ["eagle", "standalone"])
@pytest.mark.parametrize("objective", ["supervised", "ppow", "tv + 0.3*kl", "expected_length"])
def test_bf16_gives_every_parameter_the_gradient_that_float32_gives(make_trainer, architecture, objective):
    found = {}
    for bf16 in (False, True):
        trainer = make_trainer(architecture, objective, bf16=bf16, text_weighting="visited", verify_with="target",
                               proximity_weight=0.0, adaw_start=0.0, seed=3)  # fmt: skip
        if objective == "ppow":  # the same windows for both: drafts of bfloat16 would be others
            inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
            found.setdefault("rollout", rollout_of(trainer, inputs, adaptive=True))
            trainer._next_rollout = lambda *given, rollout=found["rollout"]: rollout
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
        trainer.model.train()
        trainer.compute_loss(trainer.model, inputs).backward()
        found[bf16] = gradients(trainer)
    for name, expected in found[False].items():
        close = torch.nn.functional.cosine_similarity(expected.flatten(), found[True][name].flatten(), dim=0)
        assert expected.abs().max() > 0 and close > 0.9, name


def test_a_head_that_lies_on_the_disk_gives_the_logits_of_one_in_memory(make_target, tmp_path):
    target = make_target("llama")
    target.save_pretrained(tmp_path / "target")
    sharded = type(target).from_pretrained(
        tmp_path / "target", device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=str(tmp_path / "offload")
    )
    frozen, sources = FrozenTarget(sharded, None), torch.randn(5, 32)
    kept = torch.tensor([1, 5, 40])
    torch.testing.assert_close(frozen.logits(sources), target.lm_head(sources))
    torch.testing.assert_close(frozen.kept_logits(sources, kept), target.lm_head(sources)[:, kept])


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_logits_of_the_draft_vocabulary_are_those_of_the_whole(make_target, family):
    target = copy.deepcopy(make_target(family))
    drafter = make_drafter(target, "eagle", draft_vocab_size=16)
    frozen, sources, draft = FrozenTarget(target, None), torch.randn(7, 32), torch.randn(7, 16)
    for _ in range(2):  # another vocabulary is not taken for the first
        found = paired_logits(drafter, frozen, draft, sources)
        torch.testing.assert_close(found[1], frozen.logits(sources)[:, drafter.kept_tokens], atol=1e-6, rtol=1e-6)
        drafter.set_draft_vocabulary(torch.arange(3, 51, 3))
    whole = make_drafter(target, "eagle")
    assert torch.equal(paired_logits(whole, frozen, draft, sources)[1], frozen.logits(sources)[:, :16])
