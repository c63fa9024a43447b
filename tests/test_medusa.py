"""The medusa architecture: its heads against a slow reference, lossless decoding, training, saving, refusals."""

import pytest
import torch
from slow_training import batch_of, random_dataset

from ppow_hf import PPOWDrafter, PPOWDrafterConfig
from ppow_hf.measure.evaluation import decode
from ppow_hf.training import PPOWTrainer, PPOWTrainingArguments

HEADS = 4
PROMPTS = [[5, 9, 2, 33, 7], [1, 2, 3, 4, 5, 6, 60, 61], [40, 41]]


def make_medusa(target, seed: int = 1, **overrides) -> PPOWDrafter:
    """Heads disturbed so that none is the target's own any more."""
    drafter = PPOWDrafter.from_target(target, "medusa", **{"medusa_heads": HEADS, **overrides})
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
    return drafter.eval()


def slow_head(drafter, state: torch.Tensor, number: int) -> torch.Tensor:
    """Head `number` on one state `[h]`, from the weights by their published names."""
    weights = drafter.draft_model.state_dict()
    layer = 0
    while f"blocks.{number}.layers.{layer}.weight" in weights:
        x = weights[f"blocks.{number}.layers.{layer}.weight"] @ state + weights[f"blocks.{number}.layers.{layer}.bias"]
        state = state + x * torch.sigmoid(x)
        layer += 1
    assert layer == drafter.config.medusa_layers
    return weights[f"lm_heads.{number}.weight"] @ state


@torch.no_grad()
def slow_window_logits(drafter, target, ids: list[int], window: int) -> torch.Tensor:
    """`[K, V]` after `ids`: head i reads the state of token n - 2, after the final norm, and predicts token n + i.

    The final norm is undone of any doubt by asking the target's own head for its logits there.
    """
    output = target(torch.tensor([ids]), output_hidden_states=True)
    state = output.hidden_states[-1][0, -2]
    torch.testing.assert_close(target.get_output_embeddings()(state), output.logits[0, -2], atol=1e-5, rtol=1e-5)
    return torch.stack([slow_head(drafter, state, number) for number in range(window)])


@pytest.mark.parametrize("layers", [1, 2])
def test_a_session_and_whole_sequences_give_the_heads_own_logits(make_target, layers):
    target = make_target("llama", initializer_range=0.3)
    drafter = make_medusa(target, medusa_layers=layers)
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    states = target(ids, output_hidden_states=True).hidden_states[-1]
    prefixes = torch.tensor([[1, 6, 6], [8, 3, 1]])
    draft_ids = torch.randint(64, (2, 3, HEADS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = drafter(ids, target_states=states, prefixes=prefixes, draft_ids=draft_ids)
        logits = drafter.compute_logits(output.window_features)
    whole = drafter(ids, target_states=states).logits
    for row in range(2):
        for m, prefix in enumerate(prefixes[row].tolist()):
            read = ids[row, : prefix + 1].tolist()
            expected = slow_window_logits(drafter, target, read, HEADS)
            torch.testing.assert_close(logits[row, m], expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(whole[row, prefix], expected[0], atol=1e-4, rtol=1e-4)
            session = drafter.start_session()
            session.observe(ids[row : row + 1, 1 : prefix + 1], states[row : row + 1, :prefix], 1)
            found = [session.first_logits()[0]]
            for j in range(HEADS - 1):
                found.append(session.next_logits(draft_ids[row : row + 1, m, j : j + 1], j)[0])
            torch.testing.assert_close(torch.stack(found), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", ["fixed", "kl"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_text_is_that_of_plain_generation(make_target, family, window):
    target = make_target(family, initializer_range=0.3)
    drafter = make_medusa(target)
    outputs, traces = decode(target, drafter, PROMPTS, 20, window=window, cost_ratio=0.01, verification_cost=0.0)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = torch.tensor([prompt])
        plain = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        assert output == plain[0, len(prompt) :].tolist()
    assert sum(trace.drafted for trace in traces) > 10
    assert max(r.window for trace in traces for r in trace.rounds) <= HEADS


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_batch_of_ragged_prompts_is_decoded_as_each_alone(make_target, family):
    target = make_target(family, initializer_range=0.3)
    drafter = make_medusa(target)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    output = target.generate(
        ids, attention_mask=mask, max_new_tokens=16, do_sample=False,
        custom_generate=drafter.generate_with(window="fixed"),
    )  # fmt: skip
    for row, prompt in enumerate(PROMPTS):
        alone = torch.tensor([prompt])
        plain = target.generate(alone, attention_mask=torch.ones_like(alone), max_new_tokens=16, do_sample=False)
        assert output[row, longest:].tolist() == plain[0, len(prompt) :].tolist()
    assert sum(trace.drafted for trace in drafter.last_traces) > 20


def test_drafted_tokens_are_the_heads_and_accepted_ones_the_targets(make_target):
    target = make_target("llama", initializer_range=0.3)
    drafter = make_medusa(target)
    outputs, traces = decode(target, drafter, PROMPTS[:1], 12, window="fixed")
    ids, kept = list(PROMPTS[0]) + outputs[0][:1], outputs[0][1:]
    for one_round in traces[0].rounds[1:]:
        expected = slow_window_logits(drafter, target, ids, max(one_round.window, 1)).argmax(-1).tolist()
        assert one_round.draft_ids == expected[: one_round.window]
        count = 0
        while count < one_round.window and one_round.draft_ids[count] == kept[count]:
            count += 1
        assert one_round.accepted == count
        ids, kept = ids + kept[: count + 1], kept[count + 1 :]
    assert not kept


def test_a_new_drafters_heads_are_the_targets_own(make_target):
    target = make_target("qwen3", initializer_range=0.3)
    drafter = PPOWDrafter.from_target(target, "medusa")
    assert drafter.config.medusa_heads == drafter.config.max_window == 10
    assert drafter.config.target_layer_ids == [target.config.num_hidden_layers]
    ids = torch.tensor([[3, 9, 4, 1]])
    output = target(ids, output_hidden_states=True)
    logits = drafter(ids, target_states=output.hidden_states[-1]).logits
    torch.testing.assert_close(logits[0, 1:], output.logits[0, :-1], atol=1e-4, rtol=1e-4)
    few = PPOWDrafter.from_target(target, "medusa", max_window=3)
    assert few.config.medusa_heads == 3 and len(few.draft_model.lm_heads) == 3


def test_saved_and_loaded_it_is_the_same(make_target, tmp_path):
    drafter = make_medusa(make_target("llama", initializer_range=0.3), medusa_layers=2)
    drafter.save_pretrained(tmp_path)
    again = PPOWDrafter.from_pretrained(tmp_path)
    assert again.config.medusa_heads == HEADS and again.config.medusa_layers == 2
    expected = {f"draft_model.lm_heads.{i}.weight" for i in range(HEADS)}
    expected |= {
        f"draft_model.blocks.{i}.layers.{j}.{w}" for i in range(HEADS) for j in (0, 1) for w in ("weight", "bias")
    }
    assert set(again.state_dict()) == expected
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in drafter.state_dict().items())


def make_trainer(target, tmp_path, objective, drafter=None, **settings):
    defaults = {
        "max_length": 32, "max_window": HEADS, "num_anchors": 64, "num_prefixes": 4, "num_rollouts": 4,
        "rollout_temperature": 0.8, "cost_ratio": 0.15, "per_device_train_batch_size": 4, "logging_steps": 1,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "no", "disable_tqdm": True,
        "max_steps": 20, "eval_new_tokens": 8, "eval_prompts": 2, "eval_prompt_length": 5,
    }  # fmt: skip
    args = PPOWTrainingArguments(
        output_dir=str(tmp_path / "run"), objective=objective, use_cpu=True, report_to=[], **(defaults | settings)
    )
    return PPOWTrainer(
        drafter or make_medusa(target), target, args, train_dataset=random_dataset([24, 19, 22, 24] * 2),
        eval_dataset=random_dataset([9, 12]),
    )  # fmt: skip


def test_the_supervised_loss_of_every_window_is_that_of_every_head(make_target, tmp_path):
    target = make_target("llama", initializer_range=0.3)
    settings = {"text_weighting": "decay", "unroll_decay": 0.7}
    trainer = make_trainer(target, tmp_path, "0.3*ce + kl", **settings)
    inputs = batch_of(trainer.train_dataset, [0, 1])
    found = trainer.compute_loss(trainer.model, inputs).item()
    weights = [0.7**j / sum(0.7**i for i in range(HEADS)) for j in range(HEADS)]
    total, items = 0.0, 0
    for row in range(2):
        ids = inputs["input_ids"][row, : int(inputs["attention_mask"][row].sum())].tolist()
        items += int(inputs["loss_mask"][row].sum())
        target_log_probs = target(torch.tensor([ids])).logits[0].log_softmax(-1)
        for prefix in range(1, len(ids) - 1):
            heads = slow_window_logits(trainer.model, target, ids[: prefix + 1], HEADS).log_softmax(-1)
            for j in range(min(HEADS, len(ids) - 1 - prefix)):
                p = target_log_probs[prefix + j]
                total += weights[j] * ((p.exp() * (p - heads[j])).sum() - 0.3 * heads[j, ids[prefix + 1 + j]]).item()
    assert found == pytest.approx(total / items, rel=1e-4)


@pytest.mark.parametrize("objective", ["supervised", "ppow"])
def test_it_is_trained(make_target, tmp_path, objective):
    target = make_target("llama", initializer_range=0.3)
    settings = {} if objective == "supervised" else {
        "learning_rate": 3e-3, "kl_coef": 0.0, "text_kl_coef": 0.0, "proximity_weight": 0.0,
        "rollout_temperature": 1.0, "max_steps": 40, "num_prefixes": 8, "num_rollouts": 8, "adaw_start": 1.0,
    }  # fmt: skip
    trainer = make_trainer(target, tmp_path, objective, gradient_checkpointing=True, **settings)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    if objective == "supervised":
        assert sum(row["loss"] for row in rows[-4:]) < 0.8 * sum(row["loss"] for row in rows[:4])
        assert trainer.model.config.calibration["greedy"]["observations"] > 0
    else:
        assert sum(row["reward/mean"] for row in rows[-8:]) > 1.2 * sum(row["reward/mean"] for row in rows[:8])


def test_every_head_has_a_gradient_even_where_no_window_reached_it(make_target, tmp_path):
    trainer = make_trainer(make_target("llama", initializer_range=0.3), tmp_path, "ppow", text_kl_coef=0.0)
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch_of(trainer.train_dataset, [0, 1])).backward()
    assert all(parameter.grad is not None for parameter in trainer.model.parameters())


def test_what_cannot_be_is_refused(make_target, tmp_path):
    target = make_target("llama", initializer_range=0.3)
    drafter = make_medusa(target)
    with pytest.raises(ValueError, match="max_window: 5 given, but this medusa drafter has 4 heads"):
        drafter.with_settings(max_window=5)
    with pytest.raises(ValueError, match="max_window: 6 given, but this medusa drafter has 4 heads"):
        make_trainer(target, tmp_path, "ppow", max_window=6)
    with pytest.raises(ValueError, match="max_window: 10 given, but this medusa drafter has 4 heads"):
        PPOWDrafterConfig(architecture="medusa", medusa_heads=4, max_window=10)
    with pytest.raises(ValueError, match="medusa_heads: 0 is not"):
        PPOWDrafterConfig(architecture="medusa", medusa_heads=0)
    with pytest.raises(ValueError, match="draft_vocab_size: only an eagle or block drafter"):
        PPOWDrafter.from_target(target, "medusa", draft_vocab_size=16)
    with pytest.raises(ValueError, match=r"target_layer_ids: \[1, 2, 3\] given"):
        PPOWDrafter.from_target(target, "medusa", target_layer_ids=[1, 2, 3])
    with pytest.raises(ValueError, match="target_states: this medusa drafter reads"):
        drafter(torch.tensor([[1, 2, 3]]))
    other = make_target("llama", hidden_size=48)
    with pytest.raises(ValueError, match="reads hidden states of size 32"):
        other.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, assistant_model=drafter)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trees_of_its_drafts_leave_the_text_as_it_is(make_target, family):
    target = make_target(family, initializer_range=0.3)
    drafter = make_medusa(target)
    settings = {"tree_nodes": 10, "tree_branches": 3, "window": "fixed", "cost_ratio": 0.01, "verification_cost": 0.0}
    outputs, traces = decode(target, drafter, PROMPTS[:2], 16, **settings)
    for prompt, output in zip(PROMPTS[:2], outputs, strict=True):
        ids = torch.tensor([prompt])
        plain = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        assert output == plain[0, len(prompt) :].tolist()
    assert max(r.window for trace in traces for r in trace.rounds) > HEADS


@pytest.mark.parametrize(
    "sampling", [{"do_sample": False}, {"do_sample": True, "top_k": 1}], ids=["greedy", "top_k_1"]
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gpt2"])
def test_trees_in_padded_batches_are_what_each_prompt_gives_alone(make_target, family, sampling):
    target = make_target(family, initializer_range=0.3)
    drafter = make_medusa(target)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    tree = {"tree_nodes": 10, "tree_branches": 3, "window": "fixed", "cost_ratio": 0.01, "verification_cost": 0.0}
    output = target.generate(
        ids, attention_mask=mask, max_new_tokens=16, custom_generate=drafter.generate_with(**tree), **sampling
    )
    for row, prompt in enumerate(PROMPTS):
        alone = torch.tensor([prompt])
        plain = target.generate(alone, attention_mask=torch.ones_like(alone), max_new_tokens=16, do_sample=False)
        assert output[row, longest:].tolist() == plain[0, len(prompt) :].tolist()
    rounds = [r for trace in drafter.last_traces for r in trace.rounds if r.window]
    assert all(r.depth <= HEADS and r.window <= 10 for r in rounds)
    assert sampling["do_sample"] or any(r.window > r.depth for r in rounds)  # top_k=1 leaves one candidate


@pytest.mark.parametrize(("architecture", "size"), [("medusa", "medusa_heads"), ("block", "block_size")])
def test_a_shorter_window_leaves_the_heads_that_there_are(architecture, size):
    config = PPOWDrafterConfig(architecture=architecture, max_window=6, target_layer_ids=[2], target_hidden_size=32)
    config.max_window = 3  # as a calibration may find
    assert getattr(config, size) == config.longest_window == 6
    assert PPOWDrafterConfig.from_dict(config.to_dict()).longest_window == 6
