"""Rollouts against slow references: one plain forward per window, one Python loop per token."""

import hashlib
import math

import pytest
import torch
from slow_training import (
    ARCHITECTURES,
    BLOCKS,
    FAMILIES,
    LENGTHS,
    WINDOW,
    batch_of,
    draft_logits_along,
    greedy_window_log_prob,
    on_target_vocabulary,
    random_dataset,
    rollout_of,
    target_logits_along,
)
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig

from ppow_hf.data.sequences import SequenceDataset
from ppow_hf.training.batch import Batch, keyed_uniforms
from ppow_hf.training.rollout import (
    collect_rollout,
    divergence_of_prefixes,
    features_along_blocks,
)
from ppow_hf.training.target import FrozenTarget

# The frozen target


def plain_verification(model, inputs, prefixes, draft_ids):
    rows = []
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        along = [
            target_logits_along(model, ids, prefix, window)
            for prefix, window in zip(prefixes[row].tolist(), draft_ids[row].tolist(), strict=True)
        ]
        rows.append(torch.stack(along))
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_verification_equals_plain_forwards_over_prefix_and_window(make_target, family):
    model = make_target(family, initializer_range=0.2)
    target = FrozenTarget(model, None)
    assert target.head_is_plain
    inputs = batch_of(random_dataset())
    encoding = target.encode(inputs["input_ids"], inputs["attention_mask"], with_cache=True)
    prefixes = torch.tensor([[0, 7, 7, 18, 3], [10, 0, 2, 5, 5], [14, 1, 13, 14, 6]])
    draft_ids = torch.randint(64, (3, 5, WINDOW), generator=torch.Generator().manual_seed(2))
    expected = plain_verification(model, inputs, prefixes, draft_ids)
    # All at once; then again, over the same cache, in two forwards, and in one per window.
    for max_tokens in (4096, 3 * (WINDOW - 1), 1):
        before = target.forward_tokens
        found = target.logits(target.verify(encoding, prefixes, draft_ids, max_tokens))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert target.forward_tokens - before == 3 * 5 * (WINDOW - 1)
        assert encoding.cache.get_seq_length() == max(LENGTHS)


@pytest.mark.parametrize("window", [1, 2])
def test_verification_of_the_shortest_windows(make_target, window):
    model = make_target("llama", initializer_range=0.2)
    target, inputs = FrozenTarget(model, None), batch_of(random_dataset())
    encoding = target.encode(inputs["input_ids"], inputs["attention_mask"], with_cache=True)
    prefixes, draft_ids = torch.tensor([[4, 18], [10, 1], [0, 14]]), torch.full((3, 2, window), 5)
    found = target.logits(target.verify(encoding, prefixes, draft_ids))
    torch.testing.assert_close(found, plain_verification(model, inputs, prefixes, draft_ids), atol=1e-4, rtol=1e-4)
    expected = greedy_window_log_prob(model, inputs["input_ids"][1].tolist(), 10, window)
    assert target.greedy_window_log_probs(encoding, prefixes, window)[1, 0].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probability_of_the_greedy_window_equals_a_greedy_loop(make_target, family):
    model = make_target(family, initializer_range=0.3)
    target, inputs = FrozenTarget(model, None), batch_of(random_dataset())
    encoding = target.encode(inputs["input_ids"], inputs["attention_mask"], with_cache=True)
    prefixes = torch.tensor([[0, 9, 18], [10, 2, 2], [14, 5, 1]])
    found = target.greedy_window_log_probs(encoding, prefixes, WINDOW)
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        expected = [greedy_window_log_prob(model, ids, prefix, WINDOW) for prefix in prefixes[row].tolist()]
        assert found[row].tolist() == pytest.approx(expected, abs=1e-3)
    assert encoding.cache.get_seq_length() == max(LENGTHS)
    torch.testing.assert_close(target.greedy_window_log_probs(encoding, prefixes, WINDOW), found)


@pytest.mark.parametrize("scaled", ["granite", "cohere"])
def test_a_target_that_scales_its_logits_has_them_kept_whole(scaled):
    sizes = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    config = GraniteConfig(logits_scaling=5.0, **sizes) if scaled == "granite" else CohereConfig(**sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    target = FrozenTarget(model, [0, 1, 1])
    assert not target.head_is_plain
    inputs = batch_of(random_dataset(vocab_size=32))
    encoding = target.encode(inputs["input_ids"], inputs["attention_mask"], with_cache=True)
    prefixes, draft_ids = torch.tensor([[3, 12], [10, 0], [14, 7]]), torch.arange(18).view(3, 2, 3)
    expected = plain_verification(model, inputs, prefixes, draft_ids)
    torch.testing.assert_close(
        target.logits(target.verify(encoding, prefixes, draft_ids)), expected, atol=1e-4, rtol=1e-4
    )
    plain = model(inputs["input_ids"][1:2, :11]).logits
    torch.testing.assert_close(target.logits(encoding.sources[1:2, :11]), plain, atol=1e-4, rtol=1e-4)


def test_a_target_with_broken_weights_is_refused(make_target):
    import copy

    model = copy.deepcopy(make_target("llama"))
    model.model.layers[1].mlp.up_proj.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="target_model: its logits are not finite"):
        FrozenTarget(model, None)


# Rollouts


def test_random_numbers_depend_on_seed_step_example_and_purpose_only():
    indices = torch.tensor([3, 8, 5])
    numbers = keyed_uniforms(0, 4, indices, (2, 3), "draft")
    assert numbers.shape == (3, 2, 3) and numbers.min() >= 0 and numbers.max() < 1
    torch.testing.assert_close(keyed_uniforms(0, 4, torch.tensor([5, 3]), (2, 3), "draft"), numbers[[2, 0]])
    for other in ((1, 4, "draft"), (0, 5, "draft"), (0, 4, "accept")):
        assert not torch.equal(keyed_uniforms(*other[:2], indices, (2, 3), other[2]), numbers)
    digest = hashlib.sha256(b"0:4:8:draft").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") // 2)
    torch.testing.assert_close(torch.rand((2, 3), generator=generator), numbers[1])


def check_rollout_slowly(trainer, inputs, rollout, step=0):
    """Drafts, accepted counts, rewards and advantages of `rollout`, each window on its own."""
    drafter, model, args = trainer.model, trainer.target_model, trainer.args
    groups, window = args.num_rollouts, args.max_window
    drafter.eval()  # no dropout
    shape = (args.num_prefixes * groups, window)
    draws = keyed_uniforms(args.seed, step, inputs["index"], shape, "draft")
    accepts = keyed_uniforms(args.seed, step, inputs["index"], shape, "accept")
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        rewards = []
        for m, (prefix, drafted) in enumerate(
            zip(rollout.prefixes[row].tolist(), rollout.draft_ids[row].tolist(), strict=True)
        ):
            with torch.no_grad():
                logits = on_target_vocabulary(drafter, draft_logits_along(drafter, model, ids, prefix, drafted))
            q = (logits / args.rollout_temperature).softmax(-1).double()
            for j, token in enumerate(drafted):  # the first token whose cumulative probability exceeds the number
                cumulative = q[j].cumsum(0)
                assert token == int((cumulative > draws[row, m, j] * cumulative[-1]).nonzero()[0])
            logits = target_logits_along(model, ids, prefix, drafted)
            log_prob = sum(logits.log_softmax(-1)[j, token].item() for j, token in enumerate(drafted))
            accepted = 0
            for j, token in enumerate(drafted):
                if args.target_temperature == 0:
                    keep = int(logits[j].argmax()) == token
                else:
                    p = (logits[j] / args.target_temperature).softmax(-1)[token]
                    keep = bool(accepts[row, m, j] < p / q[j, token])
                if not keep:
                    break
                accepted += 1
            assert rollout.accepted[row, m] == accepted
            assert rollout.learned[row, m].tolist() == [j <= accepted for j in range(window)]
            steps = (1, 1) if drafter.config.one_step else (accepted, window)
            reward = args.speedup_weight * accepted / (steps[0] * trainer.cost_ratio + 1)
            reward += args.throughput_weight * (accepted + 1) / (steps[1] * trainer.cost_ratio + 1)
            if accepted == 0:
                delta = greedy_window_log_prob(model, ids, prefix, window) - log_prob
                reward += args.proximity_weight * (delta < args.proximity_threshold)
            rewards.append(reward)
        torch.testing.assert_close(rollout.rewards["total"][row].flatten(), torch.tensor(rewards))
        for first in range(0, len(rewards), groups):
            group = torch.tensor(rewards[first : first + groups])
            expected = (group - group.mean()) / (group.std(unbiased=False) + 1e-4)
            found = rollout.advantages[row, first : first + groups]
            torch.testing.assert_close(found, expected * (group.max() > group.min()), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *BLOCKS])
def test_rollouts_equal_a_check_of_every_window_on_its_own(make_trainer, architecture, temperature):
    trainer = make_trainer(
        architecture,
        target_temperature=temperature,
        throughput_weight=0.3,
        proximity_threshold=20.0,
    )
    inputs = batch_of(trainer.train_dataset)
    rollout = rollout_of(trainer, inputs)
    check_rollout_slowly(trainer, inputs, rollout)
    assert rollout.has_prefix.all() and rollout.accepted.float().mean() < WINDOW
    if architecture == "standalone" or temperature > 0:  # other untrained drafters seldom meet the target's choice
        assert rollout.accepted.float().mean() > 0
        assert rollout.rewards["proximity"].unique().tolist() == [0.0, 0.5]


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rollouts_work_for_every_family(make_trainer, architecture, family):
    trainer = make_trainer(architecture, family=family, num_rollouts=2)
    inputs = batch_of(trainer.train_dataset, [0, 1])
    check_rollout_slowly(trainer, inputs, rollout_of(trainer, inputs))


@pytest.mark.parametrize("architecture", ["eagle", "dspark"])
def test_rollouts_with_a_reduced_draft_vocabulary(make_trainer, architecture):
    trainer = make_trainer(architecture, draft_vocab_size=24, target_temperature=1.0)
    inputs = batch_of(trainer.train_dataset)
    rollout = rollout_of(trainer, inputs, adaptive=True)
    assert set(rollout.draft_ids.unique().tolist()) <= set(trainer.model.kept_tokens.tolist())
    check_rollout_slowly(trainer, inputs, rollout)


def test_rollouts_with_windows_of_one_token(make_trainer):
    for architecture in [*ARCHITECTURES, "dspark"]:
        trainer = make_trainer(architecture, max_window=1)
        inputs = batch_of(trainer.train_dataset)
        check_rollout_slowly(trainer, inputs, rollout_of(trainer, inputs))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "dspark"])
def test_divergences_of_prefixes_equal_slow_ones(make_trainer, architecture):
    """After a block drafter's prefix that of the block around it: blocks follow each other along the text."""
    trainer = make_trainer(architecture)
    drafter, inputs = trainer.model.eval(), batch_of(trainer.train_dataset)
    encoding = trainer.target.encode(inputs["input_ids"], inputs["attention_mask"], with_cache=True)
    features, cache = drafter.prefix_features(inputs["input_ids"], encoding.states)
    first, size = drafter.draft_model.first_prefix, getattr(drafter.draft_model, "block_size", 1)
    if architecture == "dspark":
        features = features_along_blocks(drafter, features, cache, inputs["input_ids"])
    wanted = inputs["attention_mask"].bool() & (torch.arange(max(LENGTHS)) % 4 > 0)
    wanted[:, :first] = False
    trainer.args.chunk_size = 7
    batch = Batch(drafter, trainer.target, trainer.args, inputs, encoding)
    found = divergence_of_prefixes(batch, features, wanted)
    assert not found[~wanted].any()
    for row, place in wanted.nonzero().tolist():
        ids, start = inputs["input_ids"][row].tolist(), place - (place - first) % size
        window = [*ids[start + 1 : place + 1], 0]
        target_logits = target_logits_along(trainer.target_model, ids, place, [0])[0]
        draft = draft_logits_along(drafter, trainer.target_model, ids, start, window)[-1].log_softmax(-1)
        p, log_p = target_logits.softmax(-1), target_logits.log_softmax(-1)
        certainty = 1 + (p * log_p).sum() / math.log(len(p))
        assert found[row, place].item() == pytest.approx((certainty * (p * (log_p - draft)).sum()).item(), abs=1e-4)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "dspark"])
def test_windows_that_the_text_verifies_are_drawn_along_it_once(make_trainer, make_target, architecture):
    """A window of a group is drawn from its own numbers: what is kept, and the token after that, as if drawn alone."""
    model = make_target("llama", initializer_range=0.3)
    prompts = torch.randint(64, (2, 4), generator=torch.Generator().manual_seed(5))
    texts = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=14, do_sample=False)
    written = [[False] * 4 + [True] * 14] * 2
    data = SequenceDataset(texts.tolist(), written, written)
    trainer = make_trainer(
        architecture, dataset=data, num_rollouts=64, rollout_temperature=8.0, per_device_train_batch_size=2
    )
    drafter, args, inputs = trainer.model.eval(), trainer.args, batch_of(trainer.train_dataset)
    encoding = trainer.target.encode(inputs["input_ids"], inputs["attention_mask"], with_cache=True)
    batch = Batch(drafter, trainer.target, args, inputs, encoding)
    rollout = collect_rollout(batch, cost_ratio=0.1, adaptive=False, by_text=True)
    assert rollout.paths.shape == (2, 2, WINDOW) and rollout.draft_ids.shape == (2, 128, WINDOW)
    draws = keyed_uniforms(args.seed, 0, inputs["index"], (128, WINDOW), "draft")
    for row, ids in enumerate(texts.tolist()):
        for m, prefix in enumerate(rollout.prefixes[row].tolist()):
            if m % 64 == 0:
                window = ids[prefix + 1 : prefix + 1 + WINDOW]
                logits = draft_logits_along(drafter, model, ids, prefix, window)
                probs = (logits / args.rollout_temperature).softmax(-1)
            drawn = [int((probs[j].double().cumsum(0) > draws[row, m, j]).nonzero()[0]) for j in range(WINDOW)]
            kept = next((j for j in range(WINDOW) if drawn[j] != window[j]), WINDOW)
            assert rollout.accepted[row, m] == kept
            assert rollout.draft_ids[row, m].tolist()[: kept + 1] == drawn[: kept + 1]
            assert not rollout.draft_ids[row, m, kept + 1 :].any()
    assert rollout.accepted.unique().numel() > 1


def test_greedy_windows_are_read_off_the_text_where_the_target_wrote_it(make_trainer, make_target):
    model = make_target("llama", initializer_range=0.3)
    prompts = torch.randint(64, (2, 4), generator=torch.Generator().manual_seed(5))
    texts = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=14, do_sample=False)
    written = [[False] * 4 + [True] * 14] * 2
    counts = []
    for marked in (written, None):
        dataset = SequenceDataset(texts.tolist(), written, marked)
        trainer = make_trainer("standalone", dataset=dataset, per_device_train_batch_size=2)
        inputs = batch_of(dataset)
        before = trainer.target.forward_tokens
        rollout = rollout_of(trainer, inputs)
        counts.append(trainer.target.forward_tokens - before)
        assert bool((rollout.accepted == 0).any())
        check_rollout_slowly(trainer, inputs, rollout)
    assert counts[1] - counts[0] == 2 * 2 * (WINDOW - 1)  # B * N * (K - 1) tokens of greedy windows


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "dspark"])
def test_a_sequences_rollouts_do_not_depend_on_its_batch_or_padding(make_trainer, architecture, adaptive):
    # The last sequence is shorter than a window: none of its windows ends inside it.
    trainer = make_trainer(architecture, dataset=random_dataset([19, 11, 25, 4]), target_temperature=1.0)
    whole = rollout_of(trainer, batch_of(trainer.train_dataset), adaptive=adaptive)
    for indices in ([0], [3], [2, 1], [1, 0]):
        part = rollout_of(trainer, batch_of(trainer.train_dataset, indices), adaptive=adaptive)
        for name in ("prefixes", "draft_ids", "accepted", "learned"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[indices]), name
        torch.testing.assert_close(part.advantages, whole.advantages[indices], atol=1e-3, rtol=1e-3)


def test_rollouts_of_a_step_repeat_and_those_of_another_step_differ(make_trainer):
    trainer = make_trainer("eagle")
    inputs = batch_of(trainer.train_dataset)
    first, again, later = (rollout_of(trainer, inputs, step) for step in (0, 0, 1))
    torch.manual_seed(99)
    assert torch.equal(first.draft_ids, again.draft_ids) and torch.equal(first.prefixes, again.prefixes)
    assert not torch.equal(first.prefixes, later.prefixes) and not torch.equal(first.draft_ids, later.draft_ids)


def test_rollouts_leave_the_drafters_mode_and_the_random_state_alone(make_trainer):
    trainer = make_trainer("standalone")
    inputs = batch_of(trainer.train_dataset)
    for training in (True, False):
        trainer.model.train(training)
        before = torch.get_rng_state()
        rollout_of(trainer, inputs)
        assert torch.equal(torch.get_rng_state(), before) and trainer.model.training == training


def test_windows_that_would_leave_the_context_are_not_drafted(make_trainer):
    trainer = make_trainer("standalone", family="gpt2", dataset=random_dataset([5]), per_device_train_batch_size=1)
    trainer.model.config.context_length = 8
    rollout = rollout_of(trainer, batch_of(trainer.train_dataset))
    assert rollout.has_prefix.all() and int(rollout.prefixes.max()) + WINDOW < 8


def test_a_sequence_without_anything_to_learn_takes_no_part(make_trainer):
    masks = [[True] * 19, [False] * 11, [False] * 2 + [True] * 13]
    trainer = make_trainer("eagle", dataset=random_dataset(loss_masks=masks))
    rollout = rollout_of(trainer, batch_of(trainer.train_dataset))
    assert rollout.has_prefix.tolist() == [True, False, True]
    assert not rollout.learned[1].any() and rollout.learned[0].any()
