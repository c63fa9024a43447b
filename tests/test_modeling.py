"""The drafter as a model: its features against slow references, and what transformers expects of a model.

References: a plain causal LM on concatenated sequences (standalone), and EAGLE-3 written token by token with loops.
"""

import copy

import pytest
import torch
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModel, LlamaConfig, MistralConfig

from ppow_hf import PPOWDrafter, PPOWDrafterConfig
from ppow_hf.runtime import draft_models
from ppow_hf.runtime.compatibility import check_width
from ppow_hf.runtime.configuration_ppow import EAGLE_NORMS, default_target_layers, vocabulary_fingerprint
from ppow_hf.runtime.draft_session import AHEAD, packed_allowed
from ppow_hf.runtime.modeling_ppow import collect_target_states, match_width

FAMILIES = ["llama", "qwen3", "gpt_neox", "gpt2"]
ARCHITECTURES = ["eagle", "standalone"]
B, S, M, K = 2, 11, 4, 5

both_architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def tokens(*shape: int, seed: int = 0, vocab_size: int = 64) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def perturbed(drafter: PPOWDrafter, std: float = 0.1) -> PPOWDrafter:
    """Weights away from their initial ones and zeros, so that no path of the computation is silent."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += std * torch.randn(parameter.shape, generator=random)
    return drafter.eval()


def make_drafter(target, architecture: str, **options) -> PPOWDrafter:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # With embeddings of its own, which the perturbation and the gradients reach as well.
        return perturbed(PPOWDrafter.from_target(target, architecture, shares_target_embeddings=False, **options))


@torch.no_grad()
def states_of(target, drafter, input_ids):
    hidden_states = target(input_ids, output_hidden_states=True).hidden_states
    return collect_target_states(hidden_states, drafter.config.target_layer_ids)


@pytest.fixture
def target(make_target):
    return make_target("llama")


def windows(seed: int = 1):
    """Prefixes `[B, M]`, one twice and the last possible one among them, and the windows' tokens `[B, M, K]`."""
    prefixes = torch.tensor([[1, 4, 4, S - 1], [2, 3, 7, 9]])
    return prefixes, tokens(B, M, K, seed=seed)


# -- the references


def slow_eagle_features(drafter: PPOWDrafter, states, sequence: list[int], drafted: list[int]) -> torch.Tensor:
    """EAGLE-3 for one sequence: features after every token from the second on, then after every drafted token.

    At position i the inputs are the embedding of token i + 1 and fc(states i); later draft steps are fed the layer's
    output before the norm in place of fc(states). With speculators' norms: the states are normalized before fc, the
    residual is the normalized state, draft steps are fed the output after the norm.
    """
    config, weights = drafter.draft_model.config, drafter.draft_model.state_dict()
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta, epsilon = config.rope_parameters["rope_theta"], config.rms_norm_eps

    def norm(x, name):
        return x / (x.pow(2).mean() + epsilon).sqrt() * weights[name]

    def rotate(x, position):  # [heads, size]
        angles = position * theta ** (-torch.arange(0, size, 2) / size)
        first, second = x[:, : size // 2], x[:, size // 2 :]
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=1
        )

    keys, values, features = [], [], []

    def read(token, hidden):
        position = len(keys)
        embedding = weights["embed_tokens.weight"][token]
        normed = norm(hidden, "midlayer.hidden_norm.weight")
        x = torch.cat([norm(embedding, "midlayer.input_layernorm.weight"), normed])
        hidden = normed if drafter.config.norm_before_residual else hidden
        query = rotate((weights["midlayer.self_attn.q_proj.weight"] @ x).view(heads, size), position)
        keys.append(rotate((weights["midlayer.self_attn.k_proj.weight"] @ x).view(groups, size), position))
        values.append((weights["midlayer.self_attn.v_proj.weight"] @ x).view(groups, size))
        attended = []
        for head in range(heads):
            group = head // (heads // groups)
            scores = torch.stack([query[head] @ key[group] for key in keys]) / size**0.5
            attended.append(sum(p * value[group] for p, value in zip(scores.softmax(0), values, strict=True)))
        hidden = hidden + weights["midlayer.self_attn.o_proj.weight"] @ torch.cat(attended)
        x = norm(hidden, "midlayer.post_attention_layernorm.weight")
        gate, up = weights["midlayer.mlp.gate_proj.weight"] @ x, weights["midlayer.mlp.up_proj.weight"] @ x
        output = hidden + weights["midlayer.mlp.down_proj.weight"] @ (silu(gate) * up)
        features.append(norm(output, "norm.weight") if drafter.config.norm_output else output)

    for i in range(len(sequence) - 1):
        state = norm(states[i], "input_norm.weight") if drafter.config.norm_before_fc else states[i]
        if (scales := drafter.config.state_scales) is not None:  # of the low, the middle and the high state
            state = torch.cat([part * scale for part, scale in zip(state.chunk(3), scales, strict=True)])
        read(sequence[i + 1], weights["fc.weight"] @ state)
    for token in drafted:
        read(token, features[-1])
    return torch.stack(features)


def slow_window_features(drafter, states, input_ids, prefixes, draft_ids) -> torch.Tensor:
    """`[B, M, K, h]`, one window at a time by separate forwards on prefix + draft."""
    result = []
    for b in range(input_ids.shape[0]):
        for m in range(prefixes.shape[1]):
            length, drafted = int(prefixes[b, m]) + 1, draft_ids[b, m, : K - 1]
            if drafter.config.architecture == "eagle":
                along = slow_eagle_features(drafter, states[b], input_ids[b, :length].tolist(), drafted.tolist())
            else:
                whole = torch.cat([input_ids[b, :length], drafted])[None]
                model = drafter.draft_model.model
                along = model(whole, output_hidden_states=True, use_cache=False).hidden_states[-1][0]
            result.append(along[-K:])
    return torch.stack(result).view(*prefixes.shape, K, -1)


# -- features


@pytest.mark.lowest
@both_architectures
@pytest.mark.parametrize("family", FAMILIES)
def test_window_features_equal_separate_forwards_on_prefix_and_draft(make_target, family, architecture):
    target = make_target(family)
    drafter = make_drafter(target, architecture)
    input_ids, (prefixes, draft_ids) = tokens(B, S), windows()
    states = states_of(target, drafter, input_ids)
    with torch.no_grad():
        output = drafter(input_ids, states, prefixes=prefixes, draft_ids=draft_ids)
        expected = slow_window_features(drafter, states, input_ids, prefixes, draft_ids)
    torch.testing.assert_close(output.window_features, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.lowest
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_windows_that_attend_in_blocks_have_the_same_features_and_gradients(make_target, monkeypatch, family):
    target = make_target(family)
    drafter = make_drafter(target, "eagle")
    input_ids, (prefixes, draft_ids) = tokens(B, S), windows()
    states = states_of(target, drafter, input_ids)
    features, gradients = [], []
    for most in (0, 10**6):
        monkeypatch.setattr(draft_models, "SCORES_AT_ONCE", most)
        monkeypatch.setattr(draft_models, "BLOCK_SCORES", 100)
        drafter.zero_grad()
        output = drafter(input_ids, states, prefixes=prefixes, draft_ids=draft_ids)
        (output.window_features * torch.linspace(-1, 1, K)[:, None]).square().sum().backward()
        features.append(output.window_features.detach())
        gradients.append([p.grad.clone() for p in drafter.parameters() if p.grad is not None])
    torch.testing.assert_close(*features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)
    expected = slow_window_features(drafter, states, input_ids, prefixes, draft_ids)
    torch.testing.assert_close(features[0], expected.detach(), atol=2e-4, rtol=2e-4)


def test_what_training_keeps_of_many_windows_grows_with_text_and_windows_not_their_product(monkeypatch, target):
    monkeypatch.setattr(draft_models, "SCORES_AT_ONCE", 2**12)
    monkeypatch.setattr(draft_models, "BLOCK_SCORES", 2**12)
    drafter = make_drafter(target, "eagle")
    kept_bytes = []
    for length in (60, 120, 240):
        kept: dict[int, int] = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        input_ids = tokens(1, length)
        prefixes = torch.arange(1, length - 1)[None]
        draft_ids = torch.zeros(1, length - 2, 3, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            drafter(input_ids, states_of(target, drafter, input_ids), prefixes=prefixes, draft_ids=draft_ids)
        kept_bytes.append(sum(kept.values()))
    first, second = kept_bytes[1] - kept_bytes[0], kept_bytes[2] - kept_bytes[1]
    assert second < 2.2 * first  # 4 where it grew with the product


@pytest.mark.parametrize("most", [0, 10**6])
@pytest.mark.parametrize("architecture", ["eagle", "medusa"])
def test_windows_that_end_early_have_the_features_and_gradients_of_their_beginnings(
    make_target, monkeypatch, architecture, most
):
    """Each window its own length, among them none and all of it."""
    monkeypatch.setattr(draft_models, "SCORES_AT_ONCE", most)
    monkeypatch.setattr(draft_models, "BLOCK_SCORES", 100)
    target = make_target("llama")
    drafter = make_drafter(target, architecture)
    input_ids, (prefixes, draft_ids) = tokens(B, S), windows()
    states = states_of(target, drafter, input_ids)
    lengths = torch.randint(0, K + 1, prefixes.shape, generator=torch.Generator().manual_seed(0))
    lengths[0, 0], lengths[0, 1] = 0, K
    reached = torch.arange(K) <= lengths[..., None]  # the distribution after the kept tokens is computed too
    features, gradients = [], []
    for goes_on in (None, lambda j, found, windows: lengths.gather(1, windows) > j):
        drafter.zero_grad()
        output = drafter(input_ids, states, prefixes=prefixes, draft_ids=draft_ids, goes_on=goes_on)
        features.append((output.window_features * reached[..., None]).detach())
        logits = drafter.draft_logits(output.window_features[reached])
        (logits * torch.linspace(-1, 1, K).expand(reached.shape)[reached][:, None]).square().sum().backward()
        gradients.append([p.grad.clone() for p in drafter.parameters() if p.grad is not None])
    torch.testing.assert_close(*features, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.lowest
def test_eagle_features_of_a_whole_sequence_equal_the_slow_reference(target):
    drafter = make_drafter(target, "eagle")
    input_ids = tokens(1, S)
    states = states_of(target, drafter, input_ids)
    with torch.no_grad():
        features = drafter(input_ids, states).features[0, 1:]
        expected = slow_eagle_features(drafter, states[0], input_ids[0].tolist(), [])
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("norm", EAGLE_NORMS)
def test_features_with_the_norms_of_speculators_equal_the_slow_reference(target, norm):
    drafter = make_drafter(target, "eagle", **{norm: True})
    input_ids, (prefixes, draft_ids) = tokens(B, S), windows()
    states = states_of(target, drafter, input_ids)
    with torch.no_grad():
        features = drafter(input_ids, states, prefixes=prefixes, draft_ids=draft_ids).window_features
        expected = slow_window_features(drafter, states, input_ids, prefixes, draft_ids)
    torch.testing.assert_close(features, expected, atol=2e-4, rtol=2e-4)
    check_session(drafter, input_ids[:1], states[:1])


def test_logits_are_read_off_features_that_are_behind_the_norm_already(target):
    drafter = make_drafter(target, "eagle", norm_output=True)
    features = torch.randn(3, drafter.draft_model.fc.out_features)
    torch.testing.assert_close(drafter.compute_logits(features), drafter.draft_model.lm_head(features))


@pytest.mark.parametrize("norm", EAGLE_NORMS)
def test_norms_of_an_eagle_drafter_are_refused_elsewhere(target, norm):
    with pytest.raises(ValueError, match=f"{norm}: only an eagle drafter has it, not a standalone one"):
        PPOWDrafter.from_target(target, "standalone", **{norm: True})
    with pytest.raises(ValueError, match=f"{norm}: 1 is not True or False"):
        PPOWDrafter.from_target(target, **{norm: 1})


@pytest.mark.lowest
@both_architectures
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_sequence_logits_equal_those_of_a_session_token_by_token(make_target, family, architecture):
    target = make_target(family)
    drafter = make_drafter(target, architecture)
    input_ids = tokens(1, S)
    check_session(drafter, input_ids, states_of(target, drafter, input_ids))


def test_a_session_of_long_texts_and_windows_equals_whole_sequence_logits(make_target):
    """Longer than the room that its cache begins with, and than the positions that are embedded at once."""
    target = make_target("llama")
    drafter, input_ids = make_drafter(target, "eagle"), tokens(2, 340)
    states = states_of(target, drafter, input_ids)
    drafted = tokens(2, AHEAD + 4, seed=4)
    session, start = drafter.start_session(), 1
    with torch.no_grad():
        for end in (40, 320, 340):
            session.observe(input_ids[:, start:end], states[:, start - 1 : end - 1], start)
            prefixes = torch.full((2, 1), end - 1)
            along = drafter(input_ids[:, :end], states[:, :end], prefixes=prefixes, draft_ids=drafted[:, None])
            expected = drafter.compute_logits(along.window_features)[:, 0]
            given = [session.first_logits()]
            given += [session.next_logits(drafted[:, j : j + 1], j) for j in range(AHEAD + 3)]
            torch.testing.assert_close(torch.stack(given, dim=1), expected, atol=2e-4, rtol=2e-4)
            start = end


@pytest.mark.lowest
def test_a_session_of_a_drafter_with_sliding_windows_equals_its_whole_sequence_logits(make_target):
    target = make_target("qwen3")
    config = MistralConfig(
        **{name: getattr(target.config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")},
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
    )
    check_session(make_drafter(target, "standalone", draft_config=config), tokens(1, S), None)


def check_session(drafter, input_ids, states):
    """A session that reads in pieces, with abandoned drafts between them as in decoding, against whole sequences."""
    drafted, start = tokens(1, 3, seed=4), drafter.draft_model.first_prefix
    with torch.no_grad():
        whole = drafter(input_ids, states).logits[0]
        session = drafter.start_session()
        for end in (4, 5, 8, 9, S):
            session.observe(input_ids[:, start:end], None if states is None else states[:, start - 1 : end - 1], start)
            torch.testing.assert_close(session.first_logits()[0], whole[end - 1], atol=2e-4, rtol=2e-4)
            along = drafter(
                input_ids[:, :end],
                None if states is None else states[:, :end],
                prefixes=torch.tensor([[end - 1]]),
                draft_ids=torch.cat([drafted, drafted[:, :1]], dim=1)[:, None],
            )
            expected = drafter.compute_logits(along.window_features)[0, 0]
            for j in range(3):
                given = session.next_logits(drafted[:, j : j + 1], j)[0]
                torch.testing.assert_close(given, expected[j + 1], atol=2e-4, rtol=2e-4)
            start = end


@both_architectures
def test_unrolled_choices_equal_features_along_the_same_windows(target, architecture):
    drafter = make_drafter(target, architecture)
    input_ids, (prefixes, draft_ids) = tokens(B, S), windows()
    states = states_of(target, drafter, input_ids)
    with torch.no_grad():
        features, cache = drafter.prefix_features(input_ids, states)
        unrolled = drafter.unroll(features, cache, prefixes, lambda j, _, windows: draft_ids[:, :, j], K)
        output = drafter(input_ids, states, prefixes=prefixes, draft_ids=draft_ids)
    torch.testing.assert_close(unrolled, output.window_features, atol=1e-4, rtol=1e-4)


@both_architectures
def test_unroll_shows_each_choice_the_features_it_is_drawn_from(target, architecture):
    drafter = make_drafter(target, architecture)
    input_ids, (prefixes, _) = tokens(B, S), windows()
    states = states_of(target, drafter, input_ids)
    seen = []

    def choose(j, features, windows):
        seen.append(features)
        return drafter.compute_logits(features).argmax(-1)

    with torch.no_grad():
        features, cache = drafter.prefix_features(input_ids, states)
        along = drafter.unroll(features, cache, prefixes, choose, K)
    assert len(seen) == K
    assert torch.equal(torch.stack(seen, dim=2), along)


@both_architectures
def test_a_window_of_one_token_is_the_prefixs_own_feature(target, architecture):
    drafter = make_drafter(target, architecture)
    input_ids, (prefixes, draft_ids) = tokens(B, S), windows()
    states, rows = states_of(target, drafter, input_ids), torch.arange(B)[:, None]
    along = drafter(input_ids, states, prefixes=prefixes, draft_ids=draft_ids[..., :1]).window_features
    torch.testing.assert_close(along[:, :, 0], drafter(input_ids, states).features[rows, prefixes])


@pytest.mark.lowest
@both_architectures
def test_gradients_along_windows_equal_those_of_separate_forwards(target, architecture):
    drafter = make_drafter(target, architecture)
    input_ids, (prefixes, draft_ids) = tokens(B, S), windows()
    states = states_of(target, drafter, input_ids)
    weights = torch.randn(B, M, K, 32, generator=torch.Generator().manual_seed(0))
    # The reference reads state_dict() tensors; give it ones that carry gradients.
    parameters = dict(drafter.draft_model.named_parameters())
    (drafter(input_ids, states, prefixes=prefixes, draft_ids=draft_ids).window_features * weights).sum().backward()
    given = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    drafter.zero_grad()
    drafter.draft_model.state_dict = lambda: parameters
    (slow_window_features(drafter, states, input_ids, prefixes, draft_ids) * weights).sum().backward()
    expected = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert given.keys() == expected.keys() and len(given) > 8
    for name, gradient in expected.items():
        scale = float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(given[name] / scale, gradient / scale, atol=2e-4, rtol=2e-4, msg=name)


@pytest.mark.lowest
@both_architectures
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_on_the_right_changes_no_feature(make_target, family, architecture):
    target = make_target(family)
    drafter = make_drafter(target, architecture)
    short, padding = tokens(1, 7), 4
    padded = torch.cat([short, torch.full((1, padding), 9)], dim=1)
    batch = torch.cat([padded, tokens(1, 11, seed=3)])
    mask = torch.ones_like(batch)
    mask[0, 7:] = 0
    prefixes, draft_ids = torch.tensor([[2, 6], [4, 10]]), tokens(2, 2, K, seed=6)
    states = states_of(target, drafter, batch)
    rows = {"together": (batch, states, mask), "alone": (short, None if states is None else states[:1, :7], None)}
    features, along = {}, {}
    with torch.no_grad():
        for name, (ids, state, seen) in rows.items():
            count = len(ids)
            given = {"prefixes": prefixes[:count], "draft_ids": draft_ids[:count]}
            features[name] = drafter(ids, state, seen).features
            along[name] = drafter(ids, state, seen, **given).window_features
    torch.testing.assert_close(features["together"][:1, :7], features["alone"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(along["together"][:1], along["alone"], atol=1e-4, rtol=1e-4)
    assert features["together"].isfinite().all() and along["together"].isfinite().all()


def test_packed_mask_equals_its_definition_written_as_loops():
    length, window = 5, 2
    prefixes = torch.tensor([[0, 3, 3]])
    allowed = packed_allowed(length, prefixes, window)[0, 0]
    owner = [(-1, i) for i in range(length)] + [(m, j) for m in range(3) for j in range(window)]
    for query, (own, place) in enumerate(owner):
        for key, (other, earlier) in enumerate(owner):
            if own == -1:
                expected = other == -1 and earlier <= place
            elif other == -1:
                expected = earlier <= int(prefixes[0, own])
            else:
                expected = own == other and earlier <= place
            assert bool(allowed[query, key]) == expected, (query, key)


@both_architectures
def test_loss_function_is_evaluated_inside_forward(target, architecture):
    drafter = make_drafter(target, architecture)
    input_ids = tokens(B, S)
    states = states_of(target, drafter, input_ids)
    output = drafter(input_ids, states, loss_function=lambda d, o: d.compute_logits(o.features).square().mean())
    assert output.logits is None
    expected = drafter(input_ids, states).logits.square().mean()
    torch.testing.assert_close(output.loss, expected)


def test_eagle_without_target_states_says_what_to_pass(target):
    with pytest.raises(ValueError, match="target_states: "):
        PPOWDrafter.from_target(target, "eagle")(tokens(1, 4))


# -- as a transformers model


@pytest.mark.lowest
@pytest.mark.parametrize(("architecture", "tied"), [("eagle", False), ("standalone", False), ("standalone", True)])
def test_a_saved_drafter_comes_back_the_same(target, tmp_path, architecture, tied):
    options = {"tie_word_embeddings": tied} if architecture == "standalone" else {}
    drafter = make_drafter(target, architecture, max_window=7, window="fixed", **options)
    drafter.save_pretrained(tmp_path)
    input_ids = tokens(B, S)
    states = states_of(target, drafter, input_ids)
    for loaded in (AutoModel.from_pretrained(tmp_path), PPOWDrafter.from_pretrained(tmp_path)):
        assert type(loaded) is PPOWDrafter and not loaded.training
        given, expected = loaded.state_dict(), drafter.state_dict()
        assert given.keys() == expected.keys()
        assert all(torch.equal(given[name], expected[name]) for name in expected)
        with torch.no_grad():
            assert torch.equal(loaded(input_ids, states).logits, drafter(input_ids, states).logits)
        assert (loaded.config.max_window, loaded.config.window) == (7, "fixed")
        if architecture == "standalone":
            model = loaded.draft_model.model
            assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert type(AutoConfig.from_pretrained(tmp_path)) is PPOWDrafterConfig


@pytest.mark.lowest
@both_architectures
def test_loading_reports_no_missing_or_unexpected_weights(target, tmp_path, architecture):
    make_drafter(target, architecture).save_pretrained(tmp_path)
    _, info = PPOWDrafter.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


@pytest.mark.lowest
@both_architectures
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_eager_and_sdpa_attention_agree(make_target, tmp_path, family, architecture):
    target = make_target(family)
    make_drafter(target, architecture).save_pretrained(tmp_path)
    input_ids, (prefixes, draft_ids) = tokens(B, S), windows()
    mask = torch.ones_like(input_ids)
    mask[1, 10:] = 0
    outputs, sessions = [], []
    for implementation in ("eager", "sdpa"):
        drafter = PPOWDrafter.from_pretrained(tmp_path, attn_implementation=implementation)
        assert drafter.config._attn_implementation == implementation
        assert drafter.draft_model.config._attn_implementation == implementation
        states = states_of(target, drafter, input_ids)
        with torch.no_grad():
            outputs.append(
                (
                    drafter(input_ids, states, mask).features,
                    drafter(input_ids, states, mask, prefixes, draft_ids).window_features,
                )
            )
        session, first = drafter.start_session(), drafter.draft_model.first_prefix
        session.observe(input_ids[:1, first:], None if states is None else states[:1, :-1], first)
        session.first_logits()
        sessions.append(session.next_logits(torch.tensor([[5]]), 0))
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(*sessions, atol=1e-4, rtol=1e-4)


@pytest.mark.lowest
@both_architectures
def test_gradient_checkpointing_leaves_gradients_alone(target, architecture):
    plain = make_drafter(target, architecture).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    assert checkpointed.is_gradient_checkpointing
    input_ids, (prefixes, draft_ids) = tokens(B, S), windows()
    states = states_of(target, plain, input_ids)
    for drafter in (plain, checkpointed):
        along = drafter(input_ids, states, prefixes=prefixes, draft_ids=draft_ids).window_features
        (along.square().mean() + drafter(input_ids, states).logits.square().mean()).backward()
    for (name, expected), given in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert expected.grad is not None, name
        torch.testing.assert_close(given.grad, expected.grad, msg=name)


@both_architectures
def test_a_drafter_loads_and_drafts_in_bfloat16(target, tmp_path, architecture):
    options = {"draft_vocab_size": 32, "token_counts": torch.arange(64)} if architecture == "eagle" else {}
    make_drafter(target, architecture, **options).save_pretrained(tmp_path)
    drafter = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in drafter.parameters()} == {torch.bfloat16}
    if architecture == "eagle":
        assert drafter.d2t.dtype == torch.long and drafter.t2d.dtype == torch.bool
    low = copy.deepcopy(target).to(torch.bfloat16)
    output = low.generate(
        tokens(1, 5), max_new_tokens=12, do_sample=False, assistant_model=drafter.with_settings(window="fixed")
    )
    assert output.shape == (1, 17)


@both_architectures
def test_a_drafter_takes_the_targets_dtype(target, architecture):
    low = copy.deepcopy(target).to(torch.bfloat16)
    drafter = PPOWDrafter.from_target(low, architecture)
    assert drafter.dtype == torch.bfloat16
    # Rotary frequencies stay as they are on loading: in bfloat16 a reloaded drafter would say something else.
    assert {b.dtype for name, b in drafter.named_buffers() if "inv_freq" in name} <= {torch.float32}


# -- vocabularies and widths


def test_a_reduced_vocabulary_maps_to_the_targets_ids(target):
    counts = torch.zeros(64, dtype=torch.long)
    frequent = torch.tensor([3, 17, 18, 40, 63])
    counts[frequent] = torch.tensor([9, 5, 7, 3, 8])
    drafter = PPOWDrafter.from_target(target, "eagle", draft_vocab_size=5, token_counts=counts)
    assert drafter.kept_tokens.tolist() == frequent.tolist()
    assert [i + int(drafter.d2t[i]) for i in range(5)] == frequent.tolist()
    assert drafter.t2d.nonzero()[:, 0].tolist() == frequent.tolist()
    features = torch.randn(2, 32)
    own, full = drafter.draft_logits(features), drafter.compute_logits(features)
    assert own.shape == (2, 5) and full.shape == (2, 64)
    assert torch.equal(full[:, frequent], own)
    assert bool((full[:, ~drafter.t2d] == -torch.inf).all())
    assert torch.equal(drafter.draft_model.lm_head.weight, target.lm_head.weight[frequent])


def test_a_reduced_vocabulary_needs_token_counts_and_an_eagle_drafter(target):
    with pytest.raises(ValueError, match="token_counts: "):
        PPOWDrafter.from_target(target, "eagle", draft_vocab_size=32)
    with pytest.raises(ValueError, match="token_counts: "):
        PPOWDrafter.from_target(target, "eagle", draft_vocab_size=32, token_counts=torch.arange(31))
    with pytest.raises(ValueError, match="draft_vocab_size: 1 is not a whole number of at least 2"):
        PPOWDrafter.from_target(target, "eagle", draft_vocab_size=1, token_counts=torch.arange(64))
    with pytest.raises(ValueError, match="draft_vocab_size: "):
        PPOWDrafter.from_target(target, "standalone", draft_vocab_size=32, token_counts=torch.arange(64))


def test_logits_are_cut_or_padded_to_the_targets_width():
    logits = torch.arange(6.0).view(1, 6)
    assert match_width(logits, 4).tolist() == [[0, 1, 2, 3]]
    assert match_width(logits, 8).tolist() == [[0, 1, 2, 3, 4, 5, -torch.inf, -torch.inf]]
    assert match_width(logits, 6) is logits


@pytest.mark.parametrize(
    ("draft", "target_width", "fits"),
    [(151936, 152064, True), (152064, 151936, True), (1000, 1010, True), (1000, 1020, False), (128256, 151936, False)],
)
def test_widths_may_differ_by_padding_only(draft, target_width, fits):
    if fits:
        check_width(draft, target_width)
    else:
        with pytest.raises(ValueError, match=f"{draft}.*{target_width}"):
            check_width(draft, target_width)


# -- making one


@both_architectures
def test_from_target_starts_from_the_targets_embeddings_and_head(target, architecture):
    drafter = PPOWDrafter.from_target(target, architecture)
    head = drafter.draft_model.lm_head if architecture == "eagle" else drafter.draft_model.model.lm_head
    assert torch.equal(drafter.get_input_embeddings().weight, target.get_input_embeddings().weight)
    assert torch.equal(head.weight, target.lm_head.weight)
    assert head.weight is not target.lm_head.weight
    assert all(p.requires_grad for p in drafter.parameters())


@pytest.mark.parametrize("architecture", ["eagle", "standalone", "block"])
def test_a_narrower_drafter_begins_with_the_best_of_the_targets_embeddings_and_head(make_target, architecture):
    target = make_target("llama")
    drafter = PPOWDrafter.from_target(
        target, architecture, hidden_size=16, num_attention_heads=2, num_key_value_heads=1,
        **({} if architecture == "standalone" else {"draft_vocab_size": 64, "token_counts": torch.arange(64.0)}),
    )  # fmt: skip
    largest = torch.linalg.svdvals(target.get_input_embeddings().weight.detach())[:16]
    torch.testing.assert_close(torch.linalg.svdvals(drafter.get_input_embeddings().weight.detach()), largest)
    if architecture != "eagle":  # a block drafter's head also gives how often each token occurs
        return
    # The last state goes through the drafter's fusion and head as through the target's head of its best rank 16.
    left, lengths, right = torch.linalg.svd(target.get_output_embeddings().weight.detach(), full_matrices=False)
    best = left[:, :16] * lengths[:16] @ right[:16]
    head, last = drafter.draft_model.lm_head.weight, drafter.draft_model.fc.weight[:, -32:]
    similarity = torch.cosine_similarity((head @ last).flatten(), best.flatten(), dim=0)
    assert similarity > 0.95


@pytest.mark.parametrize("family", FAMILIES)
def test_from_target_records_what_the_drafter_is_for(make_target, family):
    config = PPOWDrafter.from_target(make_target(family), "eagle").config
    assert config.target_model_type == family
    assert config.target_hidden_size == 32 and config.vocab_size == 64 and config.context_length == 256
    assert config.target_layer_ids == [1, 2, 3]


def test_from_target_names_an_unknown_or_impossible_argument(target):
    for options, message in (
        ({"number_of_layers": 2}, "number_of_layers: "),
        ({"target_layer_ids": [1, 2, 4]}, "target_layer_ids: "),
        ({"target_layer_ids": [1, 2]}, "target_layer_ids: "),
        ({"architecture": "lookahead"}, "architecture: 'lookahead'"),
        ({"max_window": 0}, "max_window: 0"),
    ):
        with pytest.raises(ValueError, match=message):
            PPOWDrafter.from_target(target, **options)
    with pytest.raises(ValueError, match=r"64.*100|100.*64"):
        PPOWDrafter.from_target(target, "standalone", draft_config=LlamaConfig(vocab_size=100))


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 6, 8, 32])
def test_default_target_layers_lie_below_the_last_state(layers):
    ids = default_target_layers(layers)
    assert len(ids) == 3 and ids == sorted(ids) and ids[0] >= 0 and ids[-1] < layers
    if layers >= 8:
        assert ids == [2, layers // 2, layers - 3]


def test_vocabulary_fingerprint_tells_vocabularies_apart():
    class Words:
        def __init__(self, words):
            self.words = words

        def get_vocab(self):
            return {word: i for i, word in enumerate(self.words)}

    assert vocabulary_fingerprint(Words("abc")) == vocabulary_fingerprint(Words("abc"))
    assert len({vocabulary_fingerprint(Words(w)) for w in ("abc", "acb", "abcd")}) == 3


# -- the size of the target's states


def test_a_new_eagle_drafter_brings_its_targets_states_to_one_size(make_target):
    target = copy.deepcopy(make_target("llama", initializer_range=0.2))
    with torch.no_grad():
        target.model.layers[2].mlp.down_proj.weight.mul_(20)
    drafter = PPOWDrafter.from_target(target, "eagle")
    ids = torch.randint(target.config.vocab_size, (1, 60))
    with torch.no_grad():
        states = target(ids, output_hidden_states=True).hidden_states
    sizes = [states[layer].pow(2).mean().sqrt().item() for layer in drafter.config.target_layer_ids]
    assert max(sizes) > 4 * min(sizes)  # otherwise there was nothing to bring to one size
    for size, scale in zip(sizes, drafter.config.state_scales, strict=True):
        assert 0.125 < scale * size < 0.5


def test_a_target_in_training_gives_the_same_drafter_and_stays_in_training(make_target):
    target = copy.deepcopy(make_target("gpt2"))
    drafters = []
    for mode in (False, True):
        target.train(mode)
        target.transformer.h[0].mlp.dropout.eval()
        torch.manual_seed(0)
        drafters.append(PPOWDrafter.from_target(target, "eagle"))
    assert target.training and target.transformer.drop.training and not target.transformer.h[0].mlp.dropout.training
    first, second = (drafter.state_dict() for drafter in drafters)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_target_that_cannot_be_measured_is_said_and_drafted_for_as_it_is(make_target, caplog, monkeypatch):
    target = make_target("llama")
    monkeypatch.setattr(target.model.layers[1], "forward", lambda *_, **__: 1 / 0)
    drafter = PPOWDrafter.from_target(target, "eagle")
    assert drafter.config.state_scales is None
    assert "the size of its states could not be measured (ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"architecture": "standalone", "state_scales": [1.0] * 3}, "only an eagle drafter .* not a standalone"),
        ({"norm_before_fc": True, "state_scales": [1.0] * 3}, "only an eagle .* not norm_before_fc"),
        ({"state_scales": [1.0, 2.0]}, r"\[1.0, 2.0\] given"),
        ({"state_scales": [1.0, 0.0, 1.0]}, r"\[1.0, 0.0, 1.0\] given"),
        ({"state_scales": "123"}, "'123' given"),
        ({"state_scales": [True, 1.0, 1.0]}, r"\[True, 1.0, 1.0\] given"),
    ],
)
def test_scales_that_no_drafter_can_have_are_refused(options, said):
    with pytest.raises(ValueError, match=f"^state_scales: {said}"):
        PPOWDrafterConfig(**options)


# -- layers taken from the target


def test_an_eagle_layer_begins_as_the_targets_on_states_alone(make_target):
    target = make_target("llama")
    drafter = PPOWDrafter.from_target(target, "eagle", init_layers=[1])
    layer, source = drafter.draft_model.midlayer, target.model.layers[1]
    states, embeddings = torch.randn(2, 1, 5, target.config.hidden_size).unbind(0)
    for name in ("q_proj", "k_proj", "v_proj"):
        own = getattr(layer.self_attn, name).weight[:, target.config.hidden_size :]
        inputs = layer.hidden_norm(states)
        assert torch.equal(inputs @ own.T, getattr(source.self_attn, name)(source.input_layernorm(states)))
    scale = drafter.config.state_scales[-1]
    assert scale != 1.0  # otherwise it is not seen whether what is added was scaled as well
    expected = scale * source.mlp(source.post_attention_layernorm(states))
    assert torch.equal(layer.mlp(layer.post_attention_layernorm(states)), expected)
    assert torch.equal(layer.self_attn.o_proj.weight, scale * source.self_attn.o_proj.weight)


def test_a_standalone_drafter_of_all_layers_is_its_target(make_target):
    target = make_target("llama")
    layers = list(range(target.config.num_hidden_layers))
    drafter = PPOWDrafter.from_target(target, "standalone", init_layers=layers).eval()
    ids = torch.randint(target.config.vocab_size, (2, 9))
    torch.testing.assert_close(drafter(ids).logits, target(ids).logits)


@pytest.mark.parametrize(
    ("architecture", "options", "said"),
    [
        ("eagle", {"init_layers": [0, 1]}, "one layer"),
        ("eagle", {"init_layers": [99]}, "99"),
        ("medusa", {"init_layers": [0]}, "medusa"),
        ("standalone", {"init_layers": [0], "num_hidden_layers": 2}, "drafter of 2"),
        ("eagle", {"init_layers": [0], "intermediate_size": 24}, "mlp"),
    ],
)
def test_init_layers_that_do_not_fit_are_refused(make_target, architecture, options, said):
    with pytest.raises(ValueError, match=r"^init_layers: ") as error:
        PPOWDrafter.from_target(make_target("llama"), architecture, **options)
    assert said in str(error.value)
