"""What the tests of rollouts and of losses share: tiny pairs, and slow references of what they compute."""

import torch

from ppow_hf import PPOWDrafter
from ppow_hf.data.sequences import SequenceDataset, collate_sequences
from ppow_hf.training import PPOWTrainer, PPOWTrainingArguments
from ppow_hf.training.batch import Batch
from ppow_hf.training.rollout import collect_rollout

FAMILIES = ["llama", "qwen3", "gpt_neox", "gpt2"]
ARCHITECTURES = ["eagle", "standalone"]
LENGTHS = [19, 11, 15]
WINDOW = 4
BLOCKS = ["dflash", "dspark"]
BLOCK_OPTIONS = {"dflash": {}, "dspark": {"markov_rank": 3}, "confident": {"markov_rank": 3, "confidence_head": True}}


def random_dataset(lengths=LENGTHS, vocab_size=64, seed=0, loss_masks=None, written=None) -> SequenceDataset:
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]
    masks = loss_masks or [[True] * length for length in lengths]
    return SequenceDataset(sequences, masks, written)


def batch_of(dataset: SequenceDataset, indices=None) -> dict:
    return collate_sequences([dataset[i] for i in (range(len(dataset)) if indices is None else indices)], 0)


def make_drafter(target, architecture: str, seed: int = 1, **overrides) -> PPOWDrafter:
    """An untrained drafter, disturbed so that nothing in it is still the target's; `architecture` may be a kind of
    block drafter."""
    torch.manual_seed(seed)
    if architecture in BLOCK_OPTIONS:
        overrides = {"block_size": WINDOW, **BLOCK_OPTIONS[architecture], **overrides}
        architecture = "block"
    if overrides.get("draft_vocab_size"):
        overrides["token_counts"] = torch.rand(target.config.vocab_size)
    if architecture == "eagle" and not overrides.get("norm_before_fc"):
        # With those measured, a random drafter drafts nothing that is kept.
        overrides = {"state_scales": [0.5, 1.0, 1.0], **overrides}
    drafter = PPOWDrafter.from_target(target, architecture, **{"shares_target_embeddings": False, **overrides})
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return drafter


def trainer_maker(tmp_path, make_target):
    """What the fixture `make_trainer` gives: tiny pairs, windows of four tokens, every part of the reward on."""

    def make(
        architecture, objective="ppow", family="llama", dataset=None, draft_vocab_size=None, overrides=None, **settings
    ):
        target = make_target(family, initializer_range=0.3)
        reduced = {"draft_vocab_size": draft_vocab_size} if draft_vocab_size else {}
        drafter = make_drafter(target, architecture, **reduced, **(overrides or {}))
        defaults = {
            "max_length": 32,
            "max_window": WINDOW,
            "num_prefixes": 2,
            "num_anchors": 64,
            "num_rollouts": 4,
            "rollout_temperature": 0.8,
            "cost_ratio": 0.15,
            "per_device_train_batch_size": 3,
            "proximity_weight": 0.5,
        }
        args = PPOWTrainingArguments(
            output_dir=str(tmp_path / "run"), objective=objective, use_cpu=True, report_to=[], **(defaults | settings)
        )
        return PPOWTrainer(drafter, target, args, train_dataset=dataset or random_dataset())

    return make


# Slow references


@torch.no_grad()
def target_logits_along(target, ids: list[int], prefix: int, window: list[int]) -> torch.Tensor:
    """`[K, V]`: what the target says after the prefix and after each but the last token of the window."""
    return target(torch.tensor([ids[: prefix + 1] + window[:-1]]), use_cache=False).logits[0, prefix:]


def draft_logits_along(drafter, target, ids: list[int], prefix: int, window: list[int]) -> torch.Tensor:
    """`[K, DV]` on the drafter's own vocabulary, with gradients; one sequence, one token after another."""
    draft = drafter.draft_model
    if drafter.config.architecture == "block":
        return draft.logits(block_features_along(drafter, target, ids, prefix, window))
    if drafter.config.architecture == "standalone":
        return draft.model(torch.tensor([ids[: prefix + 1] + window[:-1]]), use_cache=False).logits[0, prefix:]
    with torch.no_grad():
        hidden = target(torch.tensor([ids[: prefix + 1]]), output_hidden_states=True).hidden_states
    states = torch.cat([hidden[layer] for layer in drafter.config.target_layer_ids], dim=-1)[:, :prefix]
    causal = torch.ones(prefix, prefix, dtype=torch.bool).tril()[None, None]
    features, cache = draft.encode(
        torch.tensor([ids[1 : prefix + 1]]), states, None, torch.arange(prefix)[None], causal
    )
    feature, logits = features[:, -1:], []
    for j, token in enumerate(window):
        logits.append(draft.logits(feature)[0, 0])
        place = draft.embed_positions(torch.tensor([[prefix + j]]))
        feature, cache = draft.advance(torch.tensor([[token]]), feature, cache, place, None)
    return torch.stack(logits)


def block_features_along(drafter, target, ids: list[int], prefix: int, window: list[int]) -> torch.Tensor:
    """`[len(window), h + r]`, with gradients: one block, which sees all of the text before it and itself."""
    draft = drafter.draft_model
    with torch.no_grad():
        hidden = target(torch.tensor([ids[: prefix + 1]]), output_hidden_states=True).hidden_states
    states = torch.cat([hidden[layer] for layer in drafter.config.target_layer_ids], dim=-1)[:, :prefix]
    _, context = draft.encode(torch.tensor([ids[1 : prefix + 1]]), states, None, torch.arange(prefix)[None], None)
    block = draft.block_states(torch.tensor([[ids[prefix]]]), torch.tensor([[prefix]]), context)[0, 0]
    return draft.features(block[: len(window)], torch.tensor([ids[prefix], *window[:-1]]))


def greedy_window_log_prob(target, ids: list[int], prefix: int, window: int) -> float:
    ids, total = ids[: prefix + 1], 0.0
    for _ in range(window):
        log_probs = target(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        total += log_probs.max().item()
        ids = ids + [int(log_probs.argmax())]
    return total


def on_target_vocabulary(drafter, logits: torch.Tensor) -> torch.Tensor:
    if drafter.d2t is None:
        return logits
    full = torch.full((len(logits), drafter.config.vocab_size), -torch.inf)
    for draft_id, offset in enumerate(drafter.d2t.tolist()):
        full[:, draft_id + offset] = logits[:, draft_id]
    return full


def kl(target_logits: torch.Tensor, draft_logits: torch.Tensor) -> torch.Tensor:
    p, q = target_logits.softmax(-1), draft_logits.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


def kept(drafter, target_logits: torch.Tensor) -> torch.Tensor:
    if drafter.d2t is None:
        return target_logits
    return target_logits[..., [i + offset for i, offset in enumerate(drafter.d2t.tolist())]]


def rollout_of(trainer, inputs, step=0, adaptive=False):
    encoding = trainer.target.encode(inputs["input_ids"], inputs["attention_mask"], with_cache=True)
    batch = Batch(trainer.model, trainer.target, trainer.args, inputs, encoding, step)
    return collect_rollout(batch, trainer.cost_ratio, adaptive)


def gradients(trainer) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }


def backward(trainer, compute):
    trainer.model.zero_grad(set_to_none=True)
    loss = compute()
    loss.backward()
    return loss.item(), gradients(trainer)


def same_gradients(found, expected):
    assert found.keys() == expected.keys() and any(value.abs().max() > 1e-3 for value in expected.values())
    for name in expected:
        difference = (found[name] - expected[name]).abs().max().item()
        assert difference < 1e-5 + 1e-4 * expected[name].abs().max().item(), name
