"""Losses against slow references, along the text and along drafted windows; windows that the text verifies."""

import math

import pytest
import torch
from slow_training import (
    ARCHITECTURES,
    BLOCKS,
    LENGTHS,
    WINDOW,
    backward,
    batch_of,
    draft_logits_along,
    kept,
    kl,
    on_target_vocabulary,
    random_dataset,
    rollout_of,
    same_gradients,
    target_logits_along,
)

from ppow_hf.data.sequences import SequenceDataset
from ppow_hf.training.batch import Batch, keyed_uniforms
from ppow_hf.training.losses import visited_windows
from ppow_hf.training.rollout import written_prefixes


def naive_policy_loss(trainer, inputs):
    """REINFORCE with the rollouts' advantages, and both KL anchors, one window at a time."""
    args, drafter, model = trainer.args, trainer.model, trainer.target_model
    rollout = rollout_of(trainer, inputs)
    windows = rollout.prefixes.shape[1]
    total = torch.zeros(())
    values = {"kl": [], "entropy": [], "text_kl": []}
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        ids = ids[: int(inputs["attention_mask"][row].sum())]
        if not rollout.has_prefix[row]:
            continue
        for m, (prefix, drafted) in enumerate(
            zip(rollout.prefixes[row].tolist(), rollout.draft_ids[row].tolist(), strict=True)
        ):
            draft = draft_logits_along(drafter, model, ids, prefix, drafted)
            target = kept(drafter, target_logits_along(model, ids, prefix, drafted))
            policy = (on_target_vocabulary(drafter, draft) / args.rollout_temperature).log_softmax(-1)
            for j in range(min(int(rollout.accepted[row, m]) + 1, len(drafted))):
                divergence = kl(target[j], draft[j])
                values["kl"].append(divergence.item())
                probs = policy[j].exp()
                values["entropy"].append(-sum(p * math.log(p) for p in probs.tolist() if p > 0))
                gain = rollout.advantages[row, m] * policy[j, drafted[j]]
                total = total + (args.kl_coef * divergence - gain) / (windows * args.max_window)
        chosen = rollout.prefixes[row, :: args.num_rollouts].tolist()
        for prefix in chosen if args.text_kl_coef else []:
            text = ids[prefix + 1 : prefix + 1 + args.max_window]
            draft = draft_logits_along(drafter, model, ids, prefix, text)
            target = kept(drafter, target_logits_along(model, ids, prefix, text))
            for j in range(len(text)):
                if inputs["loss_mask"][row, prefix + 1 + j]:
                    divergence = kl(target[j], draft[j])
                    values["text_kl"] += [divergence.item()] if j == 0 else []  # as along the text: of first tokens
                    total = total + args.text_kl_coef * divergence / (len(chosen) * args.max_window)
    means = {name: sum(numbers) / len(numbers) for name, numbers in values.items() if numbers}
    return total / len(inputs["index"]), means


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_coef": 0.0, "text_kl_coef": 0.0},
        {"kl_coef": 0.7, "text_kl_coef": 0.4, "chunk_size": 5},
    ],
    ids=["policy", "policy and anchors, chunked"],
)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *BLOCKS])
def test_policy_gradient_equals_naive_reinforce(make_trainer, architecture, settings):
    masks = [[False] * 6 + [True] * 9 + [False] * 4, [True] * 11, [False] * 2 + [True] * 3 + [False] * 10]
    if architecture in BLOCKS:  # whose untrained windows are far from the target's
        settings = {**settings, "proximity_threshold": 13.0}
    trainer = make_trainer(architecture, dataset=random_dataset(loss_masks=masks), **settings)
    inputs = batch_of(trainer.train_dataset)
    trainer.model.train()
    _, found = backward(trainer, lambda: trainer.compute_loss(trainer.model, inputs))
    metrics = {name: values[0] for name, values in trainer._metrics.items()}
    _, expected = backward(trainer, lambda: naive_policy_loss(trainer, inputs)[0])
    same_gradients(found, expected)
    for name, value in naive_policy_loss(trainer, inputs)[1].items():
        assert metrics[name] == pytest.approx(value, rel=1e-4), name
    rollout = rollout_of(trainer, inputs)
    assert metrics["reward/mean"] == pytest.approx(rollout.rewards["total"].mean().item(), rel=1e-5)
    assert metrics["accepted_length"] == pytest.approx(rollout.accepted.float().mean().item() + 1, rel=1e-5)
    assert metrics["clip_fraction"] == 0


@pytest.mark.parametrize("architecture", ["eagle", "dspark"])
def test_policy_gradient_with_a_reduced_draft_vocabulary_equals_naive_reinforce(make_trainer, architecture):
    trainer = make_trainer(architecture, draft_vocab_size=24, kl_coef=0.7)
    inputs = batch_of(trainer.train_dataset)
    trainer.model.train()
    _, found = backward(trainer, lambda: trainer.compute_loss(trainer.model, inputs))
    same_gradients(found, backward(trainer, lambda: naive_policy_loss(trainer, inputs)[0])[1])


def test_a_sequence_without_anything_to_learn_has_no_gradient(make_trainer):
    """Neither of the policy nor of the text anchor, whose features would be those of no prefix at all."""
    masks = [[True] * 19, [False] * 11, [True, True] + [False] * 13]
    found = {}
    for count in (3, 1):
        trainer = make_trainer("eagle", dataset=random_dataset(LENGTHS[:count], loss_masks=masks[:count]),
                               per_device_train_batch_size=count)  # fmt: skip
        inputs = batch_of(trainer.train_dataset)
        trainer.model.train()
        found[count] = backward(trainer, lambda t=trainer, i=inputs: t.compute_loss(t.model, i))[1]
    same_gradients({name: 3 * value for name, value in found[3].items()}, found[1])


def naive_window_terms(trainer, inputs, weights) -> torch.Tensor:
    """Every term on drafted windows, and on the text after their prefixes, one token at a time."""
    args, drafter, model = trainer.args, trainer.model, trainer.target_model
    rollout, groups, window = rollout_of(trainer, inputs), args.num_rollouts, args.max_window
    count = rollout.prefixes.shape[1]
    accepts = keyed_uniforms(args.seed, 0, inputs["index"], (count, window), "accept")
    total = torch.zeros(())
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        ids = ids[: int(inputs["attention_mask"][row].sum())]
        along, verdicts = [], []
        for m in range(count):
            prefix, drafted = int(rollout.prefixes[row, m]), rollout.draft_ids[row, m].tolist()
            draft = draft_logits_along(drafter, model, ids, prefix, drafted)
            target = target_logits_along(model, ids, prefix, drafted)
            policy = (draft / args.rollout_temperature).log_softmax(-1)
            if args.target_temperature > 0:
                verifier = (target / args.target_temperature).softmax(-1)
            else:
                verifier = torch.nn.functional.one_hot(target.argmax(-1), target.shape[-1]).float()
            chances = [verifier[j, x] / policy[j, x].exp() for j, x in enumerate(drafted)]
            limit = accepts[row, m] if args.target_temperature > 0 else torch.zeros(window)
            verdicts.append([bool(u < chance) for u, chance in zip(limit, chances, strict=True)])
            along.append((drafted, draft, target, policy))
        kept = [next((j for j, verdict in enumerate(v) if not verdict), window) for v in verdicts]
        assert kept == rollout.accepted[row].tolist()
        for m, (drafted, draft, target, policy) in enumerate(along):
            group = [n for n in range(count) if n // groups == m // groups and n != m]
            for j in range(window):
                rivals = [n for n in group if j <= kept[n]]
                gains = {}
                agreed = [float(verdict[j]) for verdict in verdicts]
                mean = sum(agreed[n] for n in rivals) / max(len(rivals), 1)
                gains["token_rl"] = -(agreed[m] - mean) * policy[j, drafted[j]] if rivals else torch.zeros(())
                p, q = target[j].softmax(-1), draft[j].softmax(-1)
                gains["opd"] = (p * (p.log() - q.log())).sum()
                for name in set(weights) & set(gains) if j <= kept[m] else ():
                    total = total + weights[name] * gains[name] / (count * window)
        for prefix in rollout.prefixes[row, ::groups].tolist() if "tv" in weights else []:
            text = ids[prefix + 1 : prefix + 1 + window]
            draft = draft_logits_along(drafter, model, ids, prefix, text).softmax(-1)
            target = target_logits_along(model, ids, prefix, text).softmax(-1)
            for j in range(len(text)):
                variation = 0.5 * (draft[j] - target[j]).abs().sum()
                total = total + weights["tv"] * variation / (args.num_prefixes * window)
    return total / len(inputs["index"])


@pytest.mark.parametrize(
    ("weights", "settings"),
    [
        ({"opd": 0.5}, {"num_rollouts": 1}),
        ({"opd": 1.0, "tv": 0.4}, {"chunk_size": 7}),
        ({"token_rl": 0.3}, {"target_temperature": 1.0}),
        ({"token_rl": 1.0, "opd": 0.7}, {"target_temperature": 1.0, "rollout_temperature": 1.0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "dspark"])
def test_terms_on_drafted_windows_equal_a_loop_over_their_tokens(make_trainer, architecture, weights, settings):
    trainer = make_trainer(architecture, weights, **settings)
    inputs = batch_of(trainer.train_dataset)
    trainer.model.train()
    loss, found = backward(trainer, lambda: trainer.compute_loss(trainer.model, inputs))
    expected_loss, expected = backward(trainer, lambda: naive_window_terms(trainer, inputs, weights))
    same_gradients(found, expected)
    if "token_rl" not in weights:  # the value of a clipped policy loss is not that of REINFORCE
        assert loss == pytest.approx(expected_loss, rel=1e-4, abs=1e-5)


def sessions_supervised_loss(trainer, inputs, prefixes=None) -> float:
    """For every prefix, or each row's `prefixes`, drafted on the text's own tokens by the session of decoding."""
    args, drafter, model = trainer.args, trainer.model, trainer.target_model
    first = drafter.draft_model.first_prefix
    steps = WINDOW if drafter.config.one_step else args.unroll_steps if first else 1
    weights = [args.unroll_decay**j / sum(args.unroll_decay**i for i in range(steps)) for j in range(steps)]
    total, items = 0.0, 0
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        mask = inputs["loss_mask"][row].tolist()
        items += sum(mask)
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_hidden_states=True)
        target_logits = output.logits[0]
        states = None
        if first:
            states = torch.cat([output.hidden_states[layer] for layer in drafter.config.target_layer_ids], dim=-1)
        for prefix in range(first, len(ids) - 1) if prefixes is None else prefixes[row]:
            session = drafter.start_session()
            read = None if states is None else states[:, :prefix]
            session.observe(torch.tensor([ids[first : prefix + 1]]), read, first)
            logits = session.first_logits()
            for j, weight in enumerate(weights):
                place = prefix + j + 1
                if place >= len(ids):
                    break
                if mask[place]:
                    own = kept(drafter, logits[0])
                    total += weight * kl(kept(drafter, target_logits[place - 1]), own).item()
                    log_prob = logits[0].log_softmax(-1)[ids[place]].item()
                    total -= weight * args.weights_at(0)["ce"] * log_prob if math.isfinite(log_prob) else 0.0
                if j < steps - 1:
                    logits = session.next_logits(torch.tensor([[ids[place]]]), j)
    return total / items


@pytest.mark.parametrize(
    ("architecture", "draft_vocab_size"),
    [("eagle", None), ("eagle", 24), ("standalone", None), ("dflash", None), ("dspark", 24)],
)
@pytest.mark.parametrize("chunk_size", [1024, 7])
def test_supervised_loss_equals_drafting_behind_every_prefix(make_trainer, architecture, draft_vocab_size, chunk_size):
    masks = [[True] * 19, [False] * 4 + [True] * 4 + [False] * 2 + [True], [False] * 6 + [True] * 9]
    trainer = make_trainer(
        architecture, "0.3*ce + kl", dataset=random_dataset(loss_masks=masks), draft_vocab_size=draft_vocab_size,
        text_weighting="decay", unroll_steps=3, unroll_decay=0.7, chunk_size=chunk_size,
    )  # fmt: skip
    inputs = batch_of(trainer.train_dataset)
    trainer.model.train()
    found = trainer.compute_loss(trainer.model, inputs).item()
    trainer.model.eval()
    assert found == pytest.approx(sessions_supervised_loss(trainer, inputs), rel=1e-4)


def loss_of_rows(trainer, rows, step=4) -> float:
    """Loss of the rows in one batch, times their learned tokens."""
    inputs = batch_of(trainer.train_dataset, rows)
    trainer.state.max_steps, trainer.state.global_step = 10, step
    return trainer.compute_loss(trainer.model, inputs).item() * inputs["loss_mask"].sum().item()


@pytest.mark.parametrize("architecture", ["eagle", "dflash"])
def test_windows_drawn_from_a_text_stand_for_all_of_it(make_trainer, architecture):
    data = random_dataset([24, 24, 12], loss_masks=[[True] * length for length in (24, 24, 12)])
    settings = {"text_weighting": "decay", "unroll_steps": 3, "num_anchors": None}
    trainer = make_trainer(architecture, "supervised", dataset=data, **settings)
    inputs = batch_of(trainer.train_dataset)
    uniforms = keyed_uniforms(trainer.args.seed, 4, inputs["index"], (trainer.args.max_length,), "anchors")
    expected = 0.0
    for row, (windows, drawn) in enumerate([(22, 3), (22, 3), (10, 1)]):  # one for every ten
        prefixes = [(1 + uniforms[row, :windows].argsort()[:drawn]).tolist()]
        alone = batch_of(trainer.train_dataset, [row])
        slow = sessions_supervised_loss(trainer, alone, prefixes) * alone["loss_mask"].sum().item()
        expected += windows / drawn * slow
    trainer.model.train()
    assert loss_of_rows(trainer, [0, 1, 2]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("weighting", ["decay", "visited"])
@pytest.mark.parametrize("architecture", ["eagle", "dspark"])
def test_windows_drawn_from_a_text_do_not_depend_on_its_batch(make_trainer, architecture, weighting):
    data = random_dataset([30, 13, 22], loss_masks=[[True] * length for length in (30, 13, 22)])
    trainer = make_trainer(
        architecture, "supervised", dataset=data, text_weighting=weighting, unroll_steps=3, num_anchors=None
    )
    trainer.model.train()
    together = loss_of_rows(trainer, [0, 1, 2])
    assert together == pytest.approx(sum(loss_of_rows(trainer, [row]) for row in range(3)), rel=1e-5)
    trainer.args.num_anchors = 64
    assert together != pytest.approx(loss_of_rows(trainer, [0, 1, 2]), rel=1e-3)  # else nothing was left out


# Verified by the text


def written_dataset(target, prompt: int = 4, new_tokens: int = 15) -> SequenceDataset:
    """Texts that the target wrote at T = 0 after random prompts."""
    texts = [
        target.generate(
            item["input_ids"][None, :prompt], attention_mask=torch.ones(1, prompt), max_new_tokens=new_tokens,
            do_sample=False,
        )[0]
        for item in random_dataset()
    ]  # fmt: skip
    masks = [[False] * prompt + [True] * (len(text) - prompt) for text in texts]
    return SequenceDataset(texts, masks, masks)


@pytest.mark.parametrize("objective", ["ppow", "opd", "0.3*token_rl + 0.2*tv"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_text_of_the_target_verifies_as_the_target_does(make_trainer, make_target, architecture, objective):
    """The same windows, verdicts, rewards and gradients, and not one token of a window read by the target."""
    dataset = written_dataset(make_target("llama", initializer_range=0.3))
    inputs = batch_of(dataset)
    learner = make_trainer(architecture, "ce", dataset=dataset, unroll_steps=WINDOW)
    optimizer = torch.optim.AdamW(learner.model.parameters(), lr=1e-2)
    for _ in range(4):  # until its drafts agree with the target now and then
        backward(learner, lambda: learner.compute_loss(learner.model, inputs))
        optimizer.step()
    found = {}
    for way in ("target", "auto"):
        trainer = make_trainer(architecture, objective, dataset=dataset, proximity_weight=0.0, verify_with=way)
        trainer.model.load_state_dict(learner.model.state_dict())
        trainer.model.train()
        drafted = []

        def counted(tokens, *rest, advance=trainer.model.draft_model.advance, drafted=drafted):
            drafted.append(0 if torch.is_grad_enabled() else tokens.numel())
            return advance(tokens, *rest)

        trainer.model.draft_model.advance = counted
        result = backward(trainer, lambda t=trainer, i=inputs: t.compute_loss(t.model, i))
        found[way] = (*result, next(iter(trainer._rollouts.values())), trainer.target.forward_tokens, sum(drafted))
    loss, gradient, verified, tokens, drafted_whole = found["target"]
    loss_by_text, gradient_by_text, by_text, tokens_by_text, drafted_by_text = found["auto"]
    assert verified.accepted.sum() > 3
    if bool((verified.accepted < WINDOW - 1).any(1).all()):  # else a row's whole windows fill up the others'
        assert drafted_by_text < drafted_whole  # nothing is drafted after a rejected token
    assert torch.equal(verified.draft_ids[verified.learned], by_text.draft_ids[by_text.learned])
    for name in ("prefixes", "accepted", "advantages", "learned"):
        assert torch.equal(getattr(verified, name), getattr(by_text, name)), name
    assert loss_by_text == pytest.approx(loss, rel=1e-5)
    same_gradients(gradient_by_text, gradient)
    windows = verified.draft_ids[..., 1:].numel()
    assert tokens_by_text == 3 * 19 and tokens == tokens_by_text + windows


def test_windows_verified_by_the_text_lie_in_it_and_in_the_drafters_context():
    """Prefixes from a loop: some of the text is not the target's, some not learned, and the context ends."""
    draw = torch.Generator().manual_seed(0)
    learned, written = (torch.rand(8, 30, generator=draw) < 0.9 for _ in range(2))
    inputs = {"loss_mask": learned, "target_written": written}
    found = written_prefixes(inputs, 2, WINDOW, 24)
    for row in range(8):
        for prefix in range(30):
            behind = [learned[row, p] and written[row, p] for p in range(prefix + 1, min(prefix + 1 + WINDOW, 30))]
            expected = prefix >= 2 and prefix + WINDOW < 24 and len(behind) == WINDOW and all(behind)
            assert bool(found[row, prefix]) == expected
    assert found.any()


@pytest.mark.parametrize(
    ("objective", "settings", "written"),
    [
        ("ppow", {"proximity_weight": 0.5}, True),
        ("ppow", {"proximity_weight": 0.0, "target_temperature": 1.0}, True),
        ("opd", {}, False),
        ("opd", {"max_window": 18}, True),  # no window of that length is all the target's
    ],
)
def test_the_target_verifies_where_the_text_cannot(make_trainer, make_target, objective, settings, written):
    dataset = written_dataset(make_target("llama", initializer_range=0.3))
    if not written:
        items = [dataset[index] for index in range(len(dataset))]
        dataset = SequenceDataset([item["input_ids"] for item in items], [item["loss_mask"] for item in items])
    trainer = make_trainer("eagle", objective, dataset=dataset, **settings)
    trainer.compute_loss(trainer.model, batch_of(dataset))
    assert trainer.target.forward_tokens > 3 * 19 and trainer._metrics["verified_by_text"] == [0.0]


def naive_expected_length(trainer, inputs, prefixes, length: int) -> torch.Tensor:
    """Minus the mean share of the windows after `prefixes` (of each sequence) that is kept, drafted on the text."""
    args, drafter, total = trainer.args, trainer.model, torch.zeros(())
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        mask = inputs["loss_mask"][row].tolist()
        draft_temperature, target_temperature = args.rollout_temperature, args.target_temperature
        for prefix in prefixes[row]:
            window = ids[prefix + 1 : prefix + 1 + length]
            along = target_logits_along(trainer.target_model, ids, prefix, window)
            drafts = on_target_vocabulary(
                drafter, draft_logits_along(drafter, trainer.target_model, ids, prefix, window)
            )
            reached = torch.ones(())
            for j, token in enumerate(window):
                if not mask[prefix + 1 + j]:
                    break
                q = (drafts[j] / draft_temperature).softmax(-1)
                if target_temperature == 0:
                    choice = int(along[j].argmax())
                    total = total + reached * q[choice]
                    reached = reached * q[token] * (choice == token)
                else:
                    p = (along[j] / target_temperature).softmax(-1)
                    total = total + reached * torch.minimum(p, q).sum()
                    reached = reached * (q[token] / p[token]).clamp_max(1)
    return -total / length


@pytest.mark.parametrize(
    ("architecture", "draft_vocab_size"), [("eagle", None), ("eagle", 48), ("standalone", None), ("dspark", None)]
)
@pytest.mark.parametrize(("target_temperature", "chunk_size"), [(0.0, 7), (1.0, 1024)])
def test_expected_length_equals_drafting_on_the_text(
    make_trainer, make_target, architecture, draft_vocab_size, target_temperature, chunk_size
):
    """Text that the target wrote, so that windows are followed for a while; some of it is not to be learned."""
    if draft_vocab_size and target_temperature:
        pytest.skip("P is normalised over the draft vocabulary there, as in every term along the text")
    target = make_target("llama", initializer_range=0.3)
    texts = [item["input_ids"] for item in map(written_dataset(target).__getitem__, range(3))]
    begin = [not draft_vocab_size] * 4  # of the prompts: there a choice may be outside of the draft vocabulary
    masks = [begin + tail for tail in ([True] * 15, [True] * 8 + [False] * 2 + [True] * 5, [True] * 11 + [False] * 4)]
    trainer = make_trainer(
        architecture, "0.7*expected_length", dataset=SequenceDataset(texts, masks), chunk_size=chunk_size,
        draft_vocab_size=draft_vocab_size, target_temperature=target_temperature, unroll_steps=3, unroll_decay=0.7,
    )  # fmt: skip
    inputs = batch_of(trainer.train_dataset)
    trainer.model.eval()
    loss, found = backward(trainer, lambda: trainer.compute_loss(trainer.model, inputs))
    first = trainer.model.draft_model.first_prefix
    length = 3 if architecture == "eagle" else WINDOW
    prefixes = [range(first, len(text) - 1) for text in texts]
    items = inputs["loss_mask"][:, 1:].sum()
    expected_loss, expected = backward(
        trainer, lambda: 0.7 * naive_expected_length(trainer, inputs, prefixes, length) / items
    )  # fmt: skip
    same_gradients(found, expected)
    assert loss == pytest.approx(expected_loss, rel=1e-4)


@pytest.mark.parametrize("architecture", ["eagle", "medusa", "dspark"])
def test_expected_length_of_visited_windows_is_of_whole_ones(make_trainer, make_target, architecture):
    """Those after the prefixes where rounds of decoding begin, in tokens; the TV beside it is of what is visited."""
    target = make_target("llama", initializer_range=0.3)
    texts = [item["input_ids"] for item in map(written_dataset(target).__getitem__, range(3))]
    masks = [
        [True] * 4 + tail for tail in ([True] * 15, [True] * 8 + [False] * 2 + [True] * 5, [True] * 11 + [False] * 4)
    ]
    settings = {"text_weighting": "visited", "unroll_steps": WINDOW, "dataset": SequenceDataset(texts, masks)}
    trainer = make_trainer(architecture, "0.7*expected_length + 0.3*tv", **settings)
    inputs = batch_of(trainer.train_dataset)
    trainer.model.eval()
    encoding = trainer.target.encode(inputs["input_ids"], inputs["attention_mask"], with_cache=False)
    prefixes, visited = visited_windows(Batch(trainer.model, trainer.target, trainer.args, inputs, encoding), WINDOW)
    begun = [of_row[seen.any(-1)].tolist() for of_row, seen in zip(prefixes, visited, strict=True)]
    assert 5 < max(map(len, begun)) < 18
    both, _ = backward(trainer, lambda: trainer.compute_loss(trainer.model, inputs))
    trainer = make_trainer(architecture, "0.3*tv", **settings)
    trainer.model.eval()
    beside, of_beside = backward(trainer, lambda: trainer.compute_loss(trainer.model, inputs))
    trainer = make_trainer(architecture, "0.7*expected_length", **settings)
    trainer.model.eval()
    loss, found = backward(trainer, lambda: trainer.compute_loss(trainer.model, inputs))
    items = inputs["loss_mask"][:, 1:].sum()
    expected_loss, expected = backward(
        trainer, lambda: 0.7 * WINDOW * naive_expected_length(trainer, inputs, begun, WINDOW) / items
    )
    same_gradients(found, expected)
    assert loss == pytest.approx(expected_loss, rel=1e-4) and both == pytest.approx(loss + beside, rel=1e-4)


def sessions_visited_loss(trainer, inputs, steps: int) -> float:
    """The text decoded round by round by the session that decoding uses, which is given the text's own tokens."""
    args, drafter, model = trainer.args, trainer.model, trainer.target_model
    total, first = 0.0, drafter.draft_model.first_prefix
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        mask = inputs["loss_mask"][row].tolist()
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_hidden_states=True)
        states = torch.cat([output.hidden_states[layer] for layer in drafter.config.target_layer_ids], dim=-1)
        prefix = first
        while prefix < len(ids) - 1:
            session = drafter.start_session()
            session.observe(torch.tensor([ids[first : prefix + 1]]), states[:, :prefix], first)
            logits, accepted = session.first_logits(), 0
            while accepted < steps and prefix + accepted + 1 < len(ids) and mask[prefix + accepted + 1]:
                place = prefix + accepted + 1
                total += kl(output.logits[0, place - 1], logits[0]).item()
                total -= args.weights_at(0)["ce"] * logits[0].log_softmax(-1)[ids[place]].item()
                if int(logits[0].argmax()) != ids[place]:
                    break
                accepted += 1
                if accepted < steps:
                    logits = session.next_logits(torch.tensor([[ids[place]]]), accepted - 1)
            prefix += accepted + 1
    return total / int(inputs["loss_mask"][:, 1:].sum())


@pytest.mark.parametrize("chunk_size", [7, 1024])
@pytest.mark.parametrize(("architecture", "steps"), [("eagle", 3), ("medusa", WINDOW), ("dspark", WINDOW)])
def test_visited_windows_are_those_of_decoding_the_text(make_trainer, make_target, architecture, steps, chunk_size):
    target = make_target("llama", initializer_range=0.3)
    texts = [item["input_ids"] for item in map(written_dataset(target).__getitem__, range(3))]
    masks = [[True] * 4 + tail for tail in ([True] * 15, [True] * 8 + [False] * 2 + [True] * 5, [True] * 15)]
    settings = {"unroll_steps": 3, "chunk_size": chunk_size}
    dataset = SequenceDataset(texts, masks)
    learner = make_trainer(architecture, "0.3*ce + kl", dataset=dataset, text_weighting="decay", **settings)
    inputs = batch_of(dataset)
    optimizer = torch.optim.AdamW(learner.model.parameters(), lr=1e-2)
    for _ in range(25):  # until rounds keep tokens now and then
        backward(learner, lambda: learner.compute_loss(learner.model, inputs))
        optimizer.step()
    trainer = make_trainer(architecture, "0.3*ce + kl", dataset=dataset, text_weighting="visited", **settings)
    trainer.model.load_state_dict(learner.model.state_dict())
    trainer.model.eval()
    encoding = trainer.target.encode(inputs["input_ids"], inputs["attention_mask"], with_cache=False)
    prefixes, visited = visited_windows(Batch(trainer.model, trainer.target, trainer.args, inputs, encoding), steps)
    assert prefixes.shape[1] < 18 and visited[..., 1].sum() > 5 and visited[..., 2].any()
    found, _ = backward(trainer, lambda: trainer.compute_loss(trainer.model, inputs))
    assert found == pytest.approx(sessions_visited_loss(trainer, inputs, steps), rel=1e-4)


@pytest.mark.parametrize(
    ("objective", "begin", "end"),
    [
        ("supervised; 0.7: tv + 0.3*kl", (3, "decay"), (WINDOW, "visited")),
        ("kl; 0.7: ppow + kl", (3, "decay"), (WINDOW, "visited")),
        ("kl", (WINDOW, "visited"), (WINDOW, "visited")),
        ("expected_length; 0.7: kl + expected_length", (WINDOW, "decay"), (WINDOW, "decay")),
    ],
)
def test_each_phase_has_its_own_unrolled_steps_and_text_weighting(make_trainer, objective, begin, end):
    """Few steps first, what decoding visits in the last phase; what is given holds in all."""
    args = make_trainer("eagle", objective).args
    assert [args.unrolling_at(progress) for progress in (0.0, 0.69, 0.7, 1.0)] == [begin, begin, end, end]
    args = make_trainer("eagle", objective, unroll_steps=2, text_weighting="decay").args
    assert [args.unrolling_at(progress) for progress in (0.0, 0.7)] == [(2, "decay")] * 2


@pytest.mark.parametrize("architecture", ["eagle", "medusa", "dflash"])
def test_a_phase_is_trained_with_its_own_text_weighting(make_trainer, architecture):
    def loss_at(share, objective, **settings):
        trainer = make_trainer(architecture, objective, **settings)
        trainer.state.max_steps, trainer.state.global_step = 10, int(10 * share)
        trainer.model.eval()
        return trainer.compute_loss(trainer.model, batch_of(trainer.train_dataset)).item()

    first = loss_at(0.0, "tv", unroll_steps=3, text_weighting="decay")
    last = loss_at(0.0, "tv", unroll_steps=WINDOW, text_weighting="visited")
    assert [loss_at(share, "tv; 0.7: tv") for share in (0.0, 0.6, 0.7)] == [first, first, last]
    assert first != last == loss_at(0.0, "tv")


def test_windows_visited_at_a_temperature_go_on_as_often_as_tokens_are_kept(make_trainer):
    """min(1, Q/P) of the text's token, by the first round of one sequence over many steps."""
    settings = {"target_temperature": 1.0, "rollout_temperature": 1.0}
    trainer = make_trainer("eagle", "kl", text_weighting="visited", unroll_steps=3, **settings)
    inputs = batch_of(trainer.train_dataset)
    trainer.model.eval()
    encoding = trainer.target.encode(inputs["input_ids"], inputs["attention_mask"], with_cache=False)
    counts = torch.zeros(3)
    for step in range(400):
        batch = Batch(trainer.model, trainer.target, trainer.args, inputs, encoding, step)
        prefixes, visited = visited_windows(batch, 3)
        assert torch.equal(visited, visited_windows(batch, 3)[1])  # keyed by the step, whatever was drawn before
        counts += visited[0, prefixes[0] == 1].sum(0)  # the first round's
    ids = inputs["input_ids"][0].tolist()
    window = ids[2:5]
    along = target_logits_along(trainer.target_model, ids, 1, window).softmax(-1)
    drafts = draft_logits_along(trainer.model, trainer.target_model, ids, 1, window).softmax(-1)
    chances = [min(1.0, (drafts[j, token] / along[j, token]).item()) for j, token in enumerate(window)]
    assert counts[0] == 400 and 0.05 < chances[0] < 0.98
    for count, chance in ((counts[1], chances[0]), (counts[2], chances[0] * chances[1])):
        assert abs(count / 400 - chance) < 4 * math.sqrt(chance * (1 - chance) / 400)


def test_a_drafter_is_unrolled_as_deep_as_its_windows(make_trainer):
    losses = []
    for settings in ({}, {"unroll_steps": WINDOW}, {"unroll_steps": 2}):
        trainer = make_trainer("eagle", "supervised", text_weighting="decay", **settings)
        trainer.model.eval()
        losses.append(trainer.compute_loss(trainer.model, batch_of(trainer.train_dataset)).item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("objective", ["supervised", "ppow"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "dspark"])
def test_tokens_behind_the_loss_mask_have_no_effect(make_trainer, architecture, objective):
    masks = [[False] * 6 + [True] * 2 + [False] * 11, [False] * 3 + [True] * 4 + [False] * 4]
    results = []
    for seed in (7, 8):
        dataset = random_dataset(LENGTHS[:2], loss_masks=masks)
        other = random_dataset(LENGTHS[:2], seed=seed)
        sequences = [
            torch.cat([dataset[i]["input_ids"][:end], other[i]["input_ids"][end:]]) for i, end in ((0, 8), (1, 7))
        ]
        dataset = SequenceDataset(sequences, masks)
        trainer = make_trainer(architecture, objective, dataset=dataset, per_device_train_batch_size=2)
        trainer.model.train()
        inputs = batch_of(dataset)
        results.append(backward(trainer, lambda t=trainer, i=inputs: t.compute_loss(t.model, i)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    same_gradients(*(gradient for _, gradient in results))
