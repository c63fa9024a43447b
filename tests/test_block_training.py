"""Training block drafters: losses, confidence and groups of windows, against windows computed one by one."""

import json
import logging
from pathlib import Path

import pytest
import torch
from slow_training import (
    LENGTHS,
    WINDOW,
    backward,
    batch_of,
    block_features_along,
    kept,
    kl,
    make_drafter,
    random_dataset,
    rollout_of,
    same_gradients,
    target_logits_along,
    trainer_maker,
)
from test_data import build_tokenizer
from test_losses import written_dataset

from ppow_hf import PPOWDrafter, PPOWTrainer, PPOWTrainingArguments, cli
from ppow_hf.training.batch import keyed_uniforms
from ppow_hf.training.losses import chosen_windows
from ppow_hf.training.terms import acceptance

MASKS = [[True] * 19, [False] * 4 + [True] * 4 + [False] * 2 + [True], [False] * 6 + [True] * 9]


@pytest.fixture
def make_trainer(tmp_path, make_target):
    return trainer_maker(tmp_path, make_target)


def measured_acceptance(p: torch.Tensor, q: torch.Tensor, tokens: list[int], temperature: float) -> float:
    """From logits `p` `[V]` and `q` `[DV]`, `tokens` the ids of the draft vocabulary; token by token."""
    if temperature == 0:
        return float(tokens[int(q.argmax())] == int(p.argmax()))
    p, q = ((logits.double() / temperature).softmax(-1).tolist() for logits in (p, q))
    return sum(min(p[token], q[place]) for place, token in enumerate(tokens))


def naive_text_terms(trainer, inputs, weights, prefixes=None) -> torch.Tensor:
    """Sum of the terms of windows along the text, one window and one token at a time, per learned token."""
    args, drafter, model = trainer.args, trainer.model, trainer.target_model
    tokens = list(range(64)) if drafter.d2t is None else drafter.kept_tokens.tolist()
    total = torch.zeros(())
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        ids = ids[: int(inputs["attention_mask"][row].sum())]
        for prefix in range(1, len(ids) - 1) if prefixes is None else prefixes[row]:
            text = ids[prefix + 1 : prefix + 1 + WINDOW]
            features = block_features_along(drafter, model, ids, prefix, text)
            along, draft = target_logits_along(model, ids, prefix, text), drafter.draft_model.logits(features)
            for j, token in enumerate(text):
                if not inputs["loss_mask"][row, prefix + 1 + j]:
                    continue
                p, q = kept(drafter, along[j]).softmax(-1), draft[j].softmax(-1)
                terms = {
                    "ce": -q[tokens.index(token)].log() if token in tokens else 0.0,
                    "kl": kl(kept(drafter, along[j]), draft[j]),
                    "tv": 0.5 * (p - q).abs().sum(),
                    "lk": -torch.minimum(p, q).sum().log(),
                }
                if "confidence" in weights:
                    accepted = measured_acceptance(along[j], draft[j].detach(), tokens, args.target_temperature)
                    estimate = drafter.draft_model.confidence(features[j].detach()).sigmoid()
                    terms["confidence"] = -accepted * estimate.log() - (1 - accepted) * (1 - estimate).log()
                decay = args.unroll_decay**j / sum(args.unroll_decay**i for i in range(WINDOW))
                total = total + decay * sum(weight * terms[name] for name, weight in weights.items())
    return total / inputs["loss_mask"][:, 1:].sum()


@pytest.mark.parametrize(
    ("architecture", "weights", "settings"),
    [
        ("dflash", {"ce": 1.0}, {"chunk_size": 7}),
        ("dspark", {"kl": 0.5, "lk": 1.0}, {}),
        ("confident", {"ce": 0.1, "tv": 0.9, "confidence": 1.0}, {"target_temperature": 1.0, "chunk_size": 11}),
        ("confident", {"ce": 0.1, "tv": 0.9, "confidence": 0.7}, {"draft_vocab_size": 24, "target_temperature": 0.7}),
        ("confident", {"kl": 1.0, "confidence": 0.5}, {"draft_vocab_size": 40}),
    ],
    ids=str,
)
def test_losses_along_the_text_equal_windows_one_by_one(make_trainer, architecture, weights, settings):
    trainer = make_trainer(
        architecture, weights, dataset=random_dataset(loss_masks=MASKS), text_weighting="decay", unroll_decay=0.8,
        **settings,
    )  # fmt: skip
    inputs = batch_of(trainer.train_dataset)
    trainer.model.train()
    loss, found = backward(trainer, lambda: trainer.compute_loss(trainer.model, inputs))
    expected_loss, expected = backward(trainer, lambda: naive_text_terms(trainer, inputs, weights))
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    same_gradients(found, expected)


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_acceptance_equals_a_loop_over_tokens(temperature):
    generator = torch.Generator().manual_seed(0)
    target, draft = 3 * torch.randn(40, 9, generator=generator), 3 * torch.randn(40, 5, generator=generator)
    tokens, rows = [0, 2, 3, 5, 8], torch.arange(40) // 2
    found = acceptance(target, draft, temperature, torch.tensor(tokens), rows)
    expected = [measured_acceptance(target[row], q, tokens, temperature) for row, q in zip(rows, draft, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6) and 0 < sum(expected) < 40


@pytest.mark.parametrize("objective", ["confidence", "ppow"])
def test_only_the_head_learns_from_confidence(make_trainer, objective):
    trainer = make_trainer("confident", objective, kl_coef=0.0, text_kl_coef=0.0, speedup_weight=0.0,
                           proximity_weight=0.0)  # fmt: skip
    inputs = batch_of(trainer.train_dataset)
    trainer.model.train()
    _, found = backward(trainer, lambda: trainer.compute_loss(trainer.model, inputs))
    moved = {name for name, gradient in found.items() if bool(gradient.abs().sum() > 0)}
    assert moved == {f"draft_model.confidence_head.proj.{name}" for name in ("weight", "bias")}


def test_a_confidence_head_learns_where_the_objective_does_not_name_it(make_trainer):
    losses = []
    for objective in ("tv", "tv + confidence", "tv + 0.5*confidence"):
        trainer = make_trainer("confident", objective)
        losses.append(trainer.compute_loss(trainer.model.eval(), batch_of(trainer.train_dataset)).item())
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(ValueError, match="objective: 'tv \\+ confidence' trains a confidence head"):
        make_trainer("dspark", "tv + confidence")


def test_windows_drawn_along_the_text_stand_for_all():
    """Each begun window as often as any other, and their scaled sum that of all on average."""
    begun = torch.tensor([[True, False, True, True, True, False], [False, True, False, False, True, False]])
    values = torch.tensor([1.0, 50.0, 2.0, 3.0, 7.0, 50.0])
    uniforms = torch.rand(3000, 2, 6, generator=torch.Generator().manual_seed(0))
    sums, counts = torch.zeros(3000, 2), torch.zeros(2, 6)
    for draw, numbers in enumerate(uniforms):
        places, kept, scales = chosen_windows(begun, numbers, torch.tensor([2, 2]))
        assert places.shape == (2, 2) and bool((places[:, 0] < places[:, 1]).all()) and bool(kept.all())
        counts.scatter_add_(1, places, torch.ones(2, 2))
        sums[draw] = scales * values[places].sum(1)
    assert counts[1].tolist() == [0, 3000, 0, 0, 3000, 0] and sums[:, 1].unique().tolist() == [57.0]
    assert counts[0, [1, 5]].tolist() == [0, 0]
    assert (counts[0, [0, 2, 3, 4]] / 3000 - 0.5).abs().max() < 4 * 0.5 / 3000**0.5
    assert abs(sums[:, 0].mean() - 13.0) < 4 * sums[:, 0].std() / 3000**0.5


@pytest.mark.parametrize("step", [0, 3])
def test_no_more_windows_than_num_anchors_are_learned(make_trainer, step):
    trainer = make_trainer("dspark", "tv", dataset=random_dataset([19, 19, 19], loss_masks=[[True] * 19] * 3),
                           text_weighting="decay", num_anchors=5)  # fmt: skip
    inputs = batch_of(trainer.train_dataset)
    trainer.state.max_steps, trainer.state.global_step = 10, step
    loss, found = backward(trainer, lambda: trainer.compute_loss(trainer.model, inputs))
    uniforms = keyed_uniforms(trainer.args.seed, step, inputs["index"], (trainer.args.max_length,), "anchors")
    prefixes = [(1 + row[:17].argsort()[:5]).tolist() for row in uniforms]
    expected_loss, expected = backward(
        trainer, lambda: 17 / 5 * naive_text_terms(trainer, inputs, {"tv": 1.0}, prefixes)
    )
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    same_gradients(found, expected)


def test_a_group_of_windows_is_drawn_from_one_block(make_trainer):
    trainer = make_trainer("dspark", num_prefixes=2, num_rollouts=4)
    inputs, computed = batch_of(trainer.train_dataset), []

    def counted(anchors, *rest, block_states=trainer.model.draft_model.block_states):
        computed.append(anchors.numel())
        return block_states(anchors, *rest)

    trainer.model.draft_model.block_states = counted
    rollout = rollout_of(trainer, inputs)
    assert sum(computed) == len(LENGTHS) * 2 and rollout.draft_ids.shape == (3, 8, WINDOW)
    assert len({tuple(window) for window in rollout.draft_ids[0, :4].tolist()}) > 1
    computed.clear()
    trainer.compute_loss(trainer.model, inputs)
    assert sum(computed) == 2 * len(LENGTHS) * 2  # to draw them, and to learn from them and the text


@pytest.mark.parametrize("objective", ["ppow", "opd + 0.3*tv"])
def test_text_of_the_target_verifies_as_the_target_does(make_trainer, make_target, objective):
    dataset = written_dataset(make_target("llama", initializer_range=0.3))
    inputs = batch_of(dataset)
    learner = make_trainer("dspark", "ce", dataset=dataset)
    optimizer = torch.optim.AdamW(learner.model.parameters(), lr=1e-2)
    for _ in range(25):  # until its drafts agree with the target now and then
        backward(learner, lambda: learner.compute_loss(learner.model, inputs))
        optimizer.step()
    found = {}
    for way in ("target", "auto"):
        trainer = make_trainer("dspark", objective, dataset=dataset, proximity_weight=0.0, verify_with=way)
        trainer.model.load_state_dict(learner.model.state_dict())
        result = backward(trainer, lambda t=trainer: t.compute_loss(t.model, inputs))
        found[way] = (*result, next(iter(trainer._rollouts.values())), trainer.target.forward_tokens)
    (loss, gradient, verified, tokens), (loss_by_text, gradient_by_text, by_text, tokens_by_text) = found.values()
    assert verified.accepted.sum() > 3 and tokens_by_text < tokens
    assert torch.equal(verified.draft_ids[verified.learned], by_text.draft_ids[by_text.learned])
    for name in ("prefixes", "accepted", "advantages", "learned"):
        assert torch.equal(getattr(verified, name), getattr(by_text, name)), name
    assert loss_by_text == pytest.approx(loss, rel=1e-5)
    same_gradients(gradient_by_text, gradient)


def test_a_resumed_training_draws_the_same_windows(make_trainer):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "num_anchors": 4,
                "logging_steps": 1, "disable_tqdm": True}  # fmt: skip
    logs = []
    for resume in (None, "checkpoint-2"):
        trainer = make_trainer("confident", "supervised; 0.6: ppow", **settings)
        trainer.train(resume_from_checkpoint=resume and str(Path(trainer.args.output_dir) / resume))
        rows = [row for row in trainer.state.log_history if "loss" in row]
        logs.append([(row["loss"], row["kl"], row.get("confidence", row.get("text_confidence"))) for row in rows])
    assert len(logs[0]) == 4 and logs[1] == logs[0]
    assert len(set(logs[0])) == 4


def test_the_commands_record_and_train_block_drafters(tmp_path, make_target):
    tokenizer = build_tokenizer()
    target = make_target("llama", initializer_range=0.3, vocab_size=len(tokenizer))
    for part in (target, tokenizer):
        part.save_pretrained(tmp_path / "target")
    rows = [
        {"prompt_ids": ids[:3].tolist(), "completion_ids": ids[3:].tolist(), "temperature": 0.0}
        for ids in (item["input_ids"] for item in map(random_dataset(vocab_size=30).__getitem__, range(3)))
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = str(tmp_path / "record")
    options = ["--states-dtype", "float32", "--dtype", "float32", "--device", "cpu", "--max-length", "20"]
    command = ["record", "--target", str(tmp_path / "target"), "--data", str(tmp_path / "texts.jsonl")]
    assert cli.main([*command, "--output-dir", folder, *options, "--architecture", "block", "--layers", "1", "3"]) == 0
    words = ["train", "--target_states", folder, "--output_dir", str(tmp_path / "out"), "--architecture", "block"]
    words += ["--max_window", "5", "--num_hidden_layers", "1", "--markov_rank", "3", "--confidence_head", "true"]
    words += ["--max_steps", "2", "--per_device_train_batch_size", "2", "--report_to", "none", "--use_cpu", "true"]
    assert cli.main([*words, "--bf16", "false", "--save_strategy", "no", "--draft_vocab_size", "24"]) == 0
    drafter = PPOWDrafter.from_pretrained(tmp_path / "out")
    config = drafter.config
    assert (config.block_size, config.markov_rank, config.draft_vocab_size) == (5, 3, 24)
    assert config.target_layer_ids == [1, 3] and config.draft_config.num_hidden_layers == 1
    assert config.confidence_head and config.sample_from_anchor
    ids = random_dataset(vocab_size=30)[0]["input_ids"][None, :6]
    output = target.generate(ids, assistant_model=drafter, max_new_tokens=8, do_sample=False)
    assert torch.equal(output, target.generate(ids, max_new_tokens=8, do_sample=False))


def test_the_window_is_the_block_where_none_is_given(make_target, tmp_path):
    target, data = make_target("llama", initializer_range=0.3), random_dataset([19, 15])
    args = PPOWTrainingArguments(
        str(tmp_path), max_length=32, max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        save_strategy="no",
    )  # fmt: skip
    for architecture, options, expected in (
        ("block", {"block_size": 4}, 4), ("block", {"block_size": 16}, 16), ("medusa", {"max_window": 3}, 3),
        ("eagle", {"max_window": 5}, 10),
    ):  # fmt: skip
        drafter = PPOWDrafter.from_target(target, architecture, **options)
        PPOWTrainer(drafter, target, args, train_dataset=data).train()
        assert args.max_window == drafter.config.max_window == expected


@pytest.mark.parametrize(("options", "warned"), [({}, True), ({"markov_rank": 3}, False)])
def test_a_confidence_head_that_no_engine_takes_is_warned_of(make_trainer, monkeypatch, caplog, options, warned):
    monkeypatch.setattr(logging.getLogger("ppow_hf.training.checks"), "handlers", [caplog.handler])
    make_trainer("block", "supervised", overrides={"confidence_head": True} | options)
    assert ("no engine serves one without a Markov head" in caplog.text) is warned


@pytest.mark.parametrize("architecture", ["dspark", "eagle"])
@pytest.mark.parametrize("objective", ["supervised", "ppow"])
def test_a_batch_without_a_learned_token_changes_nothing(make_trainer, architecture, objective):
    masks = [[row == 0] * length for row, length in enumerate((19, 11, 15, 30, 6, 4))]
    trainer = make_trainer(
        architecture, objective, dataset=random_dataset([19, 11, 15, 30, 6, 4], loss_masks=masks), muon=0.0,
        max_steps=4, train_sampling_strategy="sequential", logging_steps=1, save_strategy="no",
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] != 0 and losses[1] == 0


def test_embeddings_are_trained_only_on_request(make_target):
    drafter = make_drafter(make_target("llama", initializer_range=0.3), "dspark", shares_target_embeddings=True)
    drafter.train_embeddings(False)
    assert drafter.config.shares_target_embeddings
    drafter.train_embeddings(True)
    assert drafter.draft_model.embed_tokens.weight.requires_grad and not drafter.config.shares_target_embeddings
