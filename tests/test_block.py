"""Block drafters: DFlash's and DSpark's computation against a slow reference, decoding, saving, errors.

The reference computes each window alone, from the weights, with loops over layers, heads and positions.
"""

import copy
import math

import pytest
import torch
from torch.nn.functional import silu

from ppow_hf import PPOWDrafter, PPOWDrafterConfig
from ppow_hf.runtime.modeling_ppow import collect_target_states

B, S, M, K = 2, 11, 5, 4
VARIANTS = {
    "dflash": {},
    "dspark": {"markov_rank": 3, "confidence_head": True},
    "markov-after-anchor": {"markov_rank": 3, "sample_from_anchor": False},
}
all_variants = pytest.mark.parametrize("variant", VARIANTS)


def tokens(*shape: int, seed: int = 0, vocab_size: int = 64) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def make_drafter(target, variant: str = "dflash", seed: int = 0, **options) -> PPOWDrafter:
    """A drafter whose weights are away from their initial ones and zeros, so that no path is silent."""
    random = torch.Generator().manual_seed(seed + 5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"block_size": K, **VARIANTS[variant], **options}
        drafter = PPOWDrafter.from_target(target, "block", **options)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=random)
    return drafter.eval()


@torch.no_grad()
def states_of(target, drafter, input_ids):
    hidden_states = target(input_ids, output_hidden_states=True).hidden_states
    return collect_target_states(hidden_states, drafter.config.target_layer_ids)


@pytest.fixture
def target(make_target):
    return make_target("llama")


# -- the reference


def slow_states(drafter: PPOWDrafter, states: torch.Tensor, anchor: int) -> torch.Tensor:
    """`[K, h]` of one block after `anchor`, where the target's `states` `[n, A*h]` are those of the tokens before."""
    draft, config, target = drafter.draft_model, drafter.config.draft_config, drafter.draft_model.target_embeddings
    weights, n = draft.state_dict(), len(states)
    size, epsilon, theta = config.head_dim, config.rms_norm_eps, config.rope_parameters["rope_theta"]
    groups = config.num_attention_heads // config.num_key_value_heads

    def norm(x, name):
        return x / (x.pow(2).mean() + epsilon).sqrt() * weights[name]

    def rotate(x, position):  # [d]
        angles = position * theta ** (-torch.arange(0, size, 2) / size)
        first, second = x[: size // 2], x[size // 2 :]
        return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()])

    def key_value(x, layer, position, head):
        name = f"layers.{layer}.self_attn."
        rows = slice(head * size, (head + 1) * size)
        key = rotate(norm(weights[name + "k_proj.weight"][rows] @ x, name + "k_norm.weight"), position)
        return key, weights[name + "v_proj.weight"][rows] @ x

    context = [norm(weights["fc.weight"] @ state, "hidden_norm.weight") for state in states]
    drafted = drafter.config.block_size
    masks = drafted - 1 if drafter.config.sample_from_anchor else drafted
    block = [target.module.weight[token] for token in [anchor] + [drafter.config.mask_token_id] * masks]
    for layer in range(config.num_hidden_layers):
        name = f"layers.{layer}."
        read = [norm(x, name + "input_layernorm.weight") for x in block]
        attended = []
        for i, x in enumerate(read):
            heads = []
            for head in range(config.num_attention_heads):
                query = weights[name + "self_attn.q_proj.weight"][head * size : (head + 1) * size] @ x
                query = rotate(norm(query, name + "self_attn.q_norm.weight"), n + i)
                pairs = [key_value(c, layer, position, head // groups) for position, c in enumerate(context)]
                pairs += [key_value(other, layer, n + j, head // groups) for j, other in enumerate(read)]
                scores = torch.stack([query @ key for key, _ in pairs]) / size**0.5
                heads.append(scores.softmax(0) @ torch.stack([value for _, value in pairs]))
            attended.append(weights[name + "self_attn.o_proj.weight"] @ torch.cat(heads))
        block = [x + out for x, out in zip(block, attended, strict=True)]
        for i, x in enumerate(block):
            inner = norm(x, name + "post_attention_layernorm.weight")
            gate = silu(weights[name + "mlp.gate_proj.weight"] @ inner)
            up = weights[name + "mlp.up_proj.weight"] @ inner
            block[i] = x + weights[name + "mlp.down_proj.weight"] @ (gate * up)
    return torch.stack([norm(x, "norm.weight") for x in block])[len(block) - drafted :]


def slow_logits(drafter: PPOWDrafter, states: torch.Tensor, anchor: int, drafted: list[int]) -> torch.Tensor:
    """Logits `[K, V]` of a window, `drafted` its first K - 1 tokens."""
    return logits_of(drafter, slow_states(drafter, states, anchor), anchor, drafted)


def logits_of(drafter: PPOWDrafter, block: torch.Tensor, anchor: int, drafted: list[int]) -> torch.Tensor:
    """The same from the block's outputs `[K, h]`."""
    weights = drafter.draft_model.state_dict()
    logits = block @ drafter.draft_model.target_head.module.weight.T
    if drafter.config.markov_rank:
        before = weights["markov_head.markov_w1.weight"][torch.tensor([anchor, *drafted])]
        logits = logits + before @ weights["markov_head.markov_w2.weight"].T
    return logits


# -- the model


def prefixes_and_windows():
    """Prefixes `[B, M]`, one twice, the first and the last possible one among them, and windows `[B, M, K]`."""
    return torch.tensor([[1, 4, 4, 7, S - 1], [2, 3, 9, 7, 5]]), tokens(B, M, K, seed=3)


@all_variants
def test_many_blocks_of_one_text_equal_each_alone(target, variant):
    drafter, input_ids = make_drafter(target, variant), tokens(B, S)
    states, (prefixes, windows) = states_of(target, drafter, input_ids), prefixes_and_windows()
    with torch.no_grad():
        output = drafter(input_ids, states, prefixes=prefixes, draft_ids=windows)
        logits = drafter.compute_logits(output.window_features)
        for b in range(B):
            for m in range(M):
                p = int(prefixes[b, m])
                expected = slow_logits(drafter, states[b, :p], int(input_ids[b, p]), windows[b, m, : K - 1].tolist())
                torch.testing.assert_close(logits[b, m], expected, rtol=1e-4, atol=1e-4)


@all_variants
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decoding_equals_the_packed_forward(target, variant, attention):
    drafter, input_ids = make_drafter(target, variant), tokens(B, S)
    drafter.config.draft_config._attn_implementation = attention
    states, (prefixes, windows) = states_of(target, drafter, input_ids), prefixes_and_windows()
    with torch.no_grad():
        along = drafter(input_ids, states, prefixes=prefixes, draft_ids=windows).window_features
    expected = drafter.compute_logits(along)
    session = drafter.start_session()
    read = 1
    for prefix, m in sorted((int(p), m) for m, p in enumerate(prefixes[0])):
        if prefix + 1 > read:
            session.observe(input_ids[:1, read : prefix + 1], states[:1, read - 1 : prefix], read)
            read = prefix + 1
        found = [session.first_logits()]
        for j in range(K - 1):
            found.append(session.next_logits(windows[:1, m, j : j + 1], j))
        torch.testing.assert_close(torch.stack(found, dim=1)[0], expected[0, m], rtol=1e-4, atol=1e-4)


def test_a_shorter_window_is_the_beginning_of_the_block(target):
    drafter, input_ids = make_drafter(target, "dspark"), tokens(B, S)
    states, (prefixes, windows) = states_of(target, drafter, input_ids), prefixes_and_windows()
    with torch.no_grad():
        whole = drafter(input_ids, states, prefixes=prefixes, draft_ids=windows).window_features
        shorter = drafter(input_ids, states, prefixes=prefixes, draft_ids=windows[..., :2]).window_features
    torch.testing.assert_close(shorter, whole[:, :, :2])


def test_states_without_windows_give_the_same_features(target):
    drafter, input_ids = make_drafter(target, "dspark"), tokens(B, S)
    states, (prefixes, windows) = states_of(target, drafter, input_ids), prefixes_and_windows()
    with torch.no_grad():
        along = drafter(input_ids, states, prefixes=prefixes, draft_ids=windows).window_features
        block = drafter(input_ids, states, prefixes=prefixes).block_states
        before = torch.cat([input_ids.gather(1, prefixes)[..., None], windows[..., :-1]], dim=-1)
        draft = drafter.draft_model
        torch.testing.assert_close(draft.features(block, before), along)
        torch.testing.assert_close(draft.state_logits(block) + draft.markov_bias(before), draft.logits(along))


def test_gradients_of_packed_blocks_are_the_sum_of_each_alone(target):
    input_ids, (prefixes, windows) = tokens(B, S), prefixes_and_windows()
    packed, alone = (make_drafter(target, "dspark").double() for _ in range(2))
    for drafter in (packed, alone):
        drafter.attach_target(copy.deepcopy(target).double())
    states = states_of(target, packed, input_ids).double()

    def loss(drafter, b, m):
        features = drafter(input_ids[b], states[b], prefixes=prefixes[b][:, m], draft_ids=windows[b][:, m])
        features = features.window_features
        log_probs = drafter.compute_logits(features).log_softmax(-1)
        confidence = drafter.draft_model.confidence(features)
        return -log_probs.gather(-1, windows[b][:, m][..., None]).sum() + confidence.sigmoid().sum()

    loss(packed, slice(0, B), slice(0, M)).backward()
    for b in range(B):
        for m in range(M):
            loss(alone, slice(b, b + 1), slice(m, m + 1)).backward()
    for (name, one), other in zip(packed.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6, msg=name)
        assert bool(one.grad.abs().sum() > 0), name


def test_padding_on_the_right_changes_no_block(target):
    drafter, input_ids = make_drafter(target), tokens(B, S)
    states, (prefixes, windows) = states_of(target, drafter, input_ids), prefixes_and_windows()
    prefixes = prefixes.clamp_max(6)
    mask = torch.ones_like(input_ids)
    mask[:, 7:] = 0
    changed_ids, changed_states = input_ids.clone(), states.clone()
    changed_ids[:, 7:], changed_states[:, 7:] = 0, 1e3
    with torch.no_grad():
        expected = drafter(input_ids, states, prefixes=prefixes, draft_ids=windows).window_features
        found = drafter(changed_ids, changed_states, mask, prefixes=prefixes, draft_ids=windows).window_features
    torch.testing.assert_close(found, expected)


def test_a_shared_head_and_embeddings_are_not_saved(target, tmp_path):
    drafter = make_drafter(target, "dspark")
    assert drafter.config.shares_target_embeddings and drafter.config.shares_target_head
    drafter.save_pretrained(tmp_path)
    loaded = PPOWDrafter.from_pretrained(tmp_path)
    assert not any("embed" in name or "lm_head" in name for name in loaded.state_dict())
    for (name, one), other in zip(drafter.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(ValueError, match="call drafter.attach_target"):
        loaded.draft_model.state_logits(torch.zeros(1, 32))


def test_a_copy_shares_the_same_head_and_embeddings_and_pickles_without(target, tmp_path):
    drafter = make_drafter(target)
    twin, states = copy.deepcopy(drafter), torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    assert twin.draft_model.target_head.module is drafter.draft_model.target_head.module is target.lm_head
    assert torch.equal(twin.draft_model.state_logits(states), drafter.draft_model.state_logits(states))
    torch.save(drafter, tmp_path / "pickled")
    pickled = torch.load(tmp_path / "pickled", weights_only=False)
    assert pickled.draft_model.target_head.module is pickled.draft_model.target_embeddings.module is None


def test_state_names_are_those_of_published_checkpoints(target):
    counts = torch.arange(64).flip(0)
    drafter = make_drafter(target, "dspark", draft_vocab_size=48, token_counts=counts, shares_target_embeddings=False)
    names = {name.removeprefix("draft_model.") for name in drafter.state_dict()}
    layer = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
    layer |= {"input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    expected = {f"layers.{i}.{name}.weight" for i in range(2) for name in layer}
    expected |= {f"{name}.weight" for name in ("fc", "hidden_norm", "norm", "embed_tokens", "lm_head")}
    expected |= {f"markov_head.{name}.weight" for name in ("markov_w1", "markov_w2")}
    assert names == expected | {"confidence_head.proj.weight", "confidence_head.proj.bias", "d2t", "t2d"}


# -- made from a target


def test_a_new_drafter_begins_with_what_its_target_gives(make_target):
    target = make_target("qwen3", num_layers=12)
    drafter = PPOWDrafter.from_target(target, "block")
    config = drafter.config
    assert config.block_size == config.max_window == 10 and config.draft_config.num_hidden_layers == 2
    assert config.target_layer_ids == [2, 6, 9] and config.draft_config.model_type == "qwen3"
    assert not config.sample_from_anchor and config.markov_rank == 0 and not config.confidence_head
    assert PPOWDrafter.from_target(target, "block", max_window=6).config.block_size == 6
    dspark = PPOWDrafter.from_target(target, "block", markov_rank=4, confidence_head=True)
    assert dspark.config.sample_from_anchor
    assert not dspark.draft_model.markov_head.markov_w2.weight.any()  # at the start it is DFlash
    two = PPOWDrafter.from_target(make_target("llama", num_layers=2), "block")
    assert two.config.target_layer_ids == [1]


@pytest.mark.parametrize("variant", ["dflash", "dspark"])
def test_a_reduced_head_begins_with_the_tokens_frequencies(make_target, variant):
    """And the anchor's own state, however large the target's embeddings and head are, is sure of nothing."""
    target, input_ids, (prefixes, windows) = copy.deepcopy(make_target("llama")), tokens(B, S), prefixes_and_windows()
    with torch.no_grad():
        for module in (target.get_input_embeddings(), target.get_output_embeddings()):
            module.weight.mul_(20)
    width, counts = 48, torch.arange(64, 0, -1) ** 2
    options = {"block_size": K, "draft_vocab_size": width, "token_counts": counts, **VARIANTS[variant]}
    drafter = PPOWDrafter.from_target(target, "block", **options)
    with torch.no_grad():
        states = states_of(target, drafter, input_ids)
        features = drafter(input_ids, states, prefixes=prefixes, draft_ids=windows).window_features
        log_probs = drafter.draft_logits(features).log_softmax(-1)
    assert -log_probs.mean(-1).max() < 1.5 * math.log(width)
    frequencies = (counts[:width] + 1.0) / (counts[:width] + 1.0).sum()
    behind_masks = log_probs[:, :, int(drafter.config.sample_from_anchor) :].exp()
    torch.testing.assert_close(behind_masks, frequencies.expand(behind_masks.shape), rtol=1e-3, atol=1e-5)


def test_a_markov_head_begins_with_what_tells_embeddings_apart(target):
    drafter = PPOWDrafter.from_target(target, "block", markov_rank=5)
    places = drafter.draft_model.markov_head.markov_w1.weight.detach()
    embeddings = target.get_input_embeddings().weight.detach()
    main = torch.linalg.svd(embeddings - embeddings.mean(0))[0][:, :5] * 64**0.5
    close = places.abs() < 3.9  # larger ones are cut
    torch.testing.assert_close(places.abs()[close], main.abs()[close], rtol=0.02, atol=1e-3)
    assert close.float().mean() > 0.9


def test_the_mask_token_has_an_embedding(make_target):
    """A padding token's row can be zeros, which tell a layer nothing."""
    target = copy.deepcopy(make_target("llama"))
    assert PPOWDrafter.from_target(target, "block").config.mask_token_id == 63
    with torch.no_grad():
        target.get_input_embeddings().weight[60:] = 0.0
    assert PPOWDrafter.from_target(target, "block").config.mask_token_id == 59
    assert PPOWDrafter.from_target(target, "block", mask_token_id=7).config.mask_token_id == 7


def test_a_target_of_another_width_gives_neither_embeddings_nor_head(make_target):
    target = make_target("llama")
    drafter = PPOWDrafter.from_target(target, "block", hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    assert not drafter.config.shares_target_embeddings and not drafter.config.shares_target_head
    assert drafter.draft_model.lm_head.weight.shape == (64, 16) and drafter.draft_model.fc.weight.shape == (16, 96)
    with pytest.raises(ValueError, match="shares its target's output head, 64 tokens from 32 numbers, and this"):
        make_drafter(target).attach_target(make_target("llama", hidden_size=16))


def test_train_embeddings_makes_a_copy_that_is_trained(target):
    drafter, input_ids = make_drafter(target), tokens(B, S)
    states, (prefixes, windows) = states_of(target, drafter, input_ids), prefixes_and_windows()
    expected = drafter(input_ids, states, prefixes=prefixes, draft_ids=windows).window_features
    drafter.train_embeddings(True)
    features = drafter(input_ids, states, prefixes=prefixes, draft_ids=windows).window_features
    assert torch.equal(features, expected) and not drafter.config.shares_target_embeddings
    features.sum().backward()
    assert drafter.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_window": 5, "block_size": 4}, "max_window: 5 given, but this block drafter drafts 4 tokens"),
        ({"block_size": 0, "max_window": 2}, "block_size: 0 is not a whole number"),
        ({"markov_rank": -1}, "markov_rank: -1 is not a whole number of at least 0"),
        ({"confidence_head": 1}, "confidence_head: 1 is not True or False"),
        ({"mask_token_id": 64}, "mask_token_id: 64 given; it is one of the target's 64 tokens"),
        ({"target_layer_ids": [2, 1]}, r"target_layer_ids: \[2, 1\] given; a block drafter reads one or more"),
        ({"target_layer_ids": [1, 4]}, r"target_layer_ids: \[1, 4\] must be ids from 0 to 3"),
        ({"shares_target_head": True, "draft_vocab_size": 8}, "shares_target_head: the target's head gives all 64"),
        ({"draft_vocab_size": 8}, "token_counts: a reduced draft vocabulary keeps the most frequent"),
        ({"attention_dropout": 0.1}, "attention_dropout: 0.1 given, but every layer of a block drafter"),
        ({"use_sliding_window": True}, "use_sliding_window: True given, but every layer of a block drafter"),
        ({"init_layers": [1]}, "init_layers: a drafter of architecture 'block'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: only a standalone drafter's"),
        ({"block_size": 0}, "block_size: 0 is not a whole number"),
        ({"block_size": 5000}, "block_size: 5000 given; at most 1024 are drafted"),
        ({"medusa_heads": 3}, "medusa_heads: only a medusa drafter has it"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0 is not a whole number of at least 1"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers: 1.5 is not a whole number"),
        ({"intermediate_size": -3}, "intermediate_size: -3 is not a whole number"),
        ({"hidden_size": 0}, "hidden_size: 0 is not a whole number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 given; num_attention_heads, 4, must be a multiple"),
        ({"head_dim": 7}, "head_dim: 7 given; rotary positions need an even number"),
        ({"hidden_act": "nope"}, "hidden_act: 'nope' given, which transformers does not know"),
        ({"target_layer_ids": 3}, "target_layer_ids: 3 given; pass a list of layers' numbers"),
        ({"target_layer_ids": ["a"]}, r"target_layer_ids: \['a'\] given; pass a list"),
        ({"target_layer_ids": []}, r"target_layer_ids: \[\] given; pass a list"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types: .* every layer of a block drafter sees all"),
    ],
)
def test_what_cannot_be_is_refused(target, options, message):
    with pytest.raises(ValueError, match=message):
        PPOWDrafter.from_target(target, "block", **options)


@pytest.mark.parametrize("name", ["markov_rank", "confidence_head", "sample_from_anchor", "shares_target_head"])
def test_fields_of_a_block_drafter_are_refused_in_another(name):
    with pytest.raises(ValueError, match=f"{name}: only a block drafter has it, not a standalone one"):
        PPOWDrafterConfig(architecture="standalone", **{name: True if name != "markov_rank" else 2})


def test_states_are_asked_for_and_windows_beyond_the_block_are_not_drafted(target):
    drafter = make_drafter(target)
    with pytest.raises(ValueError, match="target_states: this block drafter reads the target's hidden states"):
        drafter(torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match=f"max_window: {K + 1} given, but this block drafter drafts {K} tokens"):
        drafter.with_settings(max_window=K + 1)
