"""Exported directories and imported checkpoints: read back by other readers, and refused when something is wrong.

What the engines themselves do with them is tested in tests/engines.
"""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from ppow_hf import PPOWDrafter, cli, tiny
from ppow_hf.export import export_drafter, import_drafter
from ppow_hf.measure.evaluation import decode

PROMPTS = [[5, 9, 2], [1, 2, 3, 4, 5, 6], [40, 41, 7]]


@pytest.fixture(scope="module")
def target(make_target):
    return make_target("llama", initializer_range=0.2)


def eagle(target, reduced=True, **overrides):
    torch.manual_seed(0)
    counts = torch.arange(64) % 7  # keeps every other token or so, not the first ones
    if reduced:
        overrides |= {"draft_vocab_size": 24, "token_counts": counts}
    return PPOWDrafter.from_target(target, "eagle", target_layer_ids=[1, 2, 3], **overrides)


@pytest.fixture(scope="module")
def drafter(target):
    return eagle(target)


def saved(folder):
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def rewritten(folder, tensors=None, **fields):
    """The checkpoint of `folder` with other tensors or fields; `None` removes a field."""
    config, old = saved(folder)
    config = {name: value for name, value in (config | fields).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors if tensors is not None else old, folder / "model.safetensors")
    return folder


# -- what is written


@pytest.mark.parametrize("architecture", ["eagle", "standalone", "medusa", "block"])
def test_weights_can_be_read_by_whoever_reads_the_configuration(tmp_path, target, architecture):
    export_drafter(PPOWDrafter.from_target(target, architecture), tmp_path, target=target)
    modes = {(tmp_path / name).stat().st_mode & 0o777 for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


def test_the_name_of_a_drafter_in_its_place_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^drafter: a str given. Load it first"):
        export_drafter("tiny-eagle", tmp_path)


def eagle3_logits(config, weights, tokens, states):
    """EAGLE-3's first draft step, written from its paper and checkpoints: `[S]`, `[S, 3h]` -> logits `[S, V]`."""
    hidden, heads, size = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    groups = heads // config["num_key_value_heads"]

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weights[name]

    count = len(tokens)
    state = states @ weights["fc.weight"].T
    embedded = weights["embed_tokens.weight"][tokens]
    x = torch.cat([norm(embedded, "midlayer.input_layernorm.weight"), norm(state, "midlayer.hidden_norm.weight")], -1)
    q, k, v = (
        (x @ weights[f"midlayer.self_attn.{name}_proj.weight"].T).view(count, -1, size).transpose(0, 1)
        for name in "qkv"
    )
    angles = torch.arange(count)[:, None] * config["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    turn = torch.polar(torch.ones_like(angles), angles)
    q, k = (torch.complex(y[..., : size // 2], y[..., size // 2 :]) * turn for y in (q, k))
    q, k = (torch.cat([y.real, y.imag], -1) for y in (q, k))
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scores = q @ k.transpose(1, 2) / size**0.5
    scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), -torch.inf)
    mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(count, hidden)
    state = state + mixed @ weights["midlayer.self_attn.o_proj.weight"].T
    y = norm(state, "midlayer.post_attention_layernorm.weight")
    gate, up = y @ weights["midlayer.mlp.gate_proj.weight"].T, y @ weights["midlayer.mlp.up_proj.weight"].T
    state = state + (torch.nn.functional.silu(gate) * up) @ weights["midlayer.mlp.down_proj.weight"].T
    draft = norm(state, "norm.weight") @ weights["lm_head.weight"].T
    full = torch.full((count, config["vocab_size"]), -torch.inf)
    full[:, torch.arange(draft.shape[-1]) + weights["d2t"]] = draft
    return full


def test_written_eagle3_checkpoint_computes_what_the_drafter_does(tmp_path, target):
    drafter = eagle(target, rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rms_norm_eps=1e-3)
    report = export_drafter(drafter, tmp_path, target=target)
    config, weights = saved(tmp_path)
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["draft_vocab_size"] == 24
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert config["eagle_config"] == {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
    assert report.tensors == len(weights) == 16 and "config.json" in report.files
    tokens = torch.randint(0, 64, (1, 12))
    hidden = target(tokens, output_hidden_states=True).hidden_states
    states = torch.cat([hidden[layer] for layer in config["eagle_aux_hidden_state_layer_ids"]], -1)
    expected = drafter(tokens, target_states=states).logits[0, 1:]
    found = eagle3_logits(config, weights, tokens[0, 1:], states[0, :-1])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_full_vocabulary_is_translated_to_itself_and_shared_embeddings_are_left_out(tmp_path, target):
    full = eagle(target, reduced=False, shares_target_embeddings=False)
    export_drafter(full, tmp_path, target=target, share_embeddings=True)
    assert not {"d2t", "t2d"} & saved(tmp_path)[1].keys()  # vLLM refuses them
    export_drafter(full, tmp_path, "openvino", target=target, share_embeddings=True)
    config, weights = saved(tmp_path)
    assert config["draft_vocab_size"] == config["vocab_size"] == 64
    assert "embed_tokens.weight" not in weights
    assert torch.equal(weights["d2t"], torch.zeros(64, dtype=torch.int64)) and bool(weights["t2d"].all())
    with torch.no_grad():
        full.get_input_embeddings().weight[3, 0] += 0.1
    with pytest.raises(ValueError, match="share_embeddings: the drafter's embeddings are not the target's"):
        export_drafter(full, tmp_path, target=target, share_embeddings=True)
    assert "SGLang drafts with the target's embeddings" in " ".join(
        export_drafter(full, tmp_path, target=target).notes
    )


@pytest.mark.lowest
@pytest.mark.parametrize("tied", [False, True])
def test_standalone_directory_is_a_plain_causal_language_model(tmp_path, target, tied):
    theta = {"rope_type": "default", "rope_theta": 777.0}
    drafter = PPOWDrafter.from_target(target, "standalone", rope_parameters=theta, tie_word_embeddings=tied)
    drafter.save_pretrained(tmp_path / "ours")
    drafter = PPOWDrafter.from_pretrained(tmp_path / "ours", dtype="bfloat16")
    report = export_drafter(drafter, tmp_path, "standalone")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), drafter.parameters(), strict=True))
    tokens = torch.randint(0, 64, (2, 9))
    torch.testing.assert_close(model.float()(tokens).logits, drafter.float()(tokens).logits)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 777.0 and config["torch_dtype"] == "bfloat16"  # where older readers look
    assert report.parameters == sum(p.numel() for p in model.parameters())


def test_speculators_directory_names_its_target(tmp_path, target, drafter):
    target_folder = tmp_path / "target"
    copy.deepcopy(target).save_pretrained(target_folder)
    export_drafter(drafter, tmp_path / "out", "speculators", target_name=str(target_folder), speculative_tokens=7)
    config, weights = saved(tmp_path / "out")
    verifier = config["speculators_config"]["verifier"]
    assert verifier == {"name_or_path": "target", "architectures": ["LlamaForCausalLM"]}
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 7
    assert config["norm_before_residual"] is False and "layers.0.self_attn.q_proj.weight" in weights
    with pytest.raises(ValueError, match="target_name: None"):
        export_drafter(drafter, tmp_path / "other", "speculators")
    report = export_drafter(drafter, tmp_path / "far" / "out", "speculators", target_name=str(target_folder))
    written = [path.read_bytes() for path in (tmp_path / "far" / "out").iterdir()]
    assert not any(str(tmp_path).encode() in one for one in written) and "without its folder" in str(report.notes)


def test_medusa_directory_computes_what_the_heads_do(tmp_path, target):
    torch.manual_seed(0)
    drafter = PPOWDrafter.from_target(target, "medusa", medusa_heads=3, medusa_layers=2)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.normal_(std=0.3)
    report = export_drafter(drafter, tmp_path, target=target)
    config, weights = saved(tmp_path)
    assert config["architectures"] == ["MedusaModel"] and config["num_heads"] == 3 and config["medusa_fc_bias"] is True
    assert report.tensors == len(weights) == 3 + 3 * 2 * 2
    state = torch.randn(1, 2, 32)  # of tokens 0 and 1, where head i predicts tokens 2 + i and 3 + i
    features, _ = drafter.draft_model.encode(None, state, None, None, None)
    for head in range(3):
        x = state
        for layer in range(2):
            name = f"blocks.{head}.layers.{layer}"
            x = x + torch.nn.functional.silu(x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])
        torch.testing.assert_close(x @ weights[f"lm_heads.{head}.weight"].T, drafter.draft_model.logits(features))
        features, _ = drafter.draft_model.advance(None, features, (), None, None)
    text = (tmp_path / "README.md").read_text()
    assert '"method": "medusa"' in text and '"num_speculative_tokens": 3' in text and "SGLang" not in text
    with pytest.raises(ValueError, match="format: 'sglang' is not for medusa drafters"):
        export_drafter(drafter, tmp_path, "sglang")


def test_readme_holds_the_commands(tmp_path, target, drafter):
    folder = tmp_path / "my-drafter"
    export_drafter(drafter, folder, target_name="someone/target", speculative_tokens=3)
    text = (folder / "README.md").read_text()
    speculative = '{"method": "eagle3", "model": "my-drafter", "num_speculative_tokens": 3}'
    assert f"vllm serve someone/target --speculative-config '{speculative}'" in text
    assert json.loads(speculative)["num_speculative_tokens"] == 3
    assert "--speculative-algorithm EAGLE3" in text and "--speculative-num-draft-tokens 4" in text
    assert "Tested with SGLang 0.5.23 on a CPU, greedily" in text and str(tmp_path) not in text
    # OpenVINO GenAI counts the layers after which a state is taken from 0 on.
    assert '<hidden_layers_list value="0 1 2" />' in text and "ov-my-drafter" in text


def test_what_an_engine_cannot_serve_is_said(tmp_path, make_target, target, drafter):
    notes = " ".join(export_drafter(drafter, tmp_path, target=target).notes)
    assert "the drafter's attention heads have 8 numbers" in notes and "the target's attention heads" in notes
    assert "attention heads have 8 numbers" in (tmp_path / "README.md").read_text()
    neox = make_target("gpt_neox")
    notes = " ".join(export_drafter(PPOWDrafter.from_target(neox), tmp_path, target=neox).notes)
    assert "vLLM 0.32 takes no EAGLE-3 drafter for a gpt_neox target" in notes
    gpt2 = make_target("gpt2")
    notes = " ".join(export_drafter(PPOWDrafter.from_target(gpt2, "standalone"), tmp_path / "2", target=gpt2).notes)
    assert "The drafter is a gpt2 model" in notes
    embedded = PPOWDrafter.from_pretrained(tiny.drafter_path("tiny-eagle"))
    assert export_drafter(embedded, tmp_path / "3", target_name="tiny").notes == []


def test_wrong_requests_are_refused(tmp_path, make_target, target, drafter):
    with pytest.raises(ValueError, match="format: 'onnx' is not one of"):
        export_drafter(drafter, tmp_path, "onnx")
    with pytest.raises(ValueError, match="format: 'standalone' is not for eagle drafters"):
        export_drafter(drafter, tmp_path, "standalone")
    with pytest.raises(ValueError, match="format: 'speculators' is not for standalone drafters"):
        export_drafter(PPOWDrafter.from_target(target, "standalone"), tmp_path, "speculators")
    with pytest.raises(ValueError, match="speculative_tokens: 0 given"):
        export_drafter(drafter, tmp_path, speculative_tokens=0)
    with pytest.raises(ValueError, match="made for another one: .*a llama target where this is qwen3"):
        export_drafter(drafter, tmp_path, target=make_target("qwen3"))
    with pytest.raises(ValueError, match="64 tokens where the target has 32"):
        export_drafter(drafter, tmp_path, target=make_target("llama", vocab_size=32))
    assert not (tmp_path / "config.json").exists()  # nothing half written is left behind
    assert not list(tmp_path.iterdir())


def test_no_other_weights_are_lost_or_left_beside(tmp_path, drafter):
    drafter.save_pretrained(tmp_path / "drafter")
    with pytest.raises(ValueError, match="holds a PPOW drafter, which would be lost"):
        export_drafter(drafter, tmp_path / "drafter")
    assert PPOWDrafter.from_pretrained(tmp_path / "drafter").config.draft_vocab_size == 24
    export_drafter(drafter, tmp_path / "out")
    export_drafter(drafter, tmp_path / "out")  # an earlier export is replaced
    save_file({"a": torch.ones(1)}, tmp_path / "out" / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="holds other weights, model-00002-of-00002.safetensors"):
        export_drafter(drafter, tmp_path / "out")


# -- what is imported


def folded_state(drafter):
    """The drafter's tensors, with what it multiplies the target's states by in `fc`."""
    scales = drafter.config.state_scales
    assert scales != [1.0] * 3  # otherwise nothing is folded
    columns = torch.tensor(scales).repeat_interleave(drafter.config.target_hidden_size)
    state = drafter.state_dict()
    return {**state, "draft_model.fc.weight": state["draft_model.fc.weight"] * columns.to(drafter.dtype)}


@pytest.mark.lowest
@pytest.mark.parametrize("format", ["vllm", "speculators"])
@pytest.mark.parametrize("reduced", [True, False])
def test_round_trip_is_tensor_identical(tmp_path, target, format, reduced):
    drafter = eagle(target, reduced, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 123.0})
    drafter = drafter.to(torch.bfloat16)
    first, second = tmp_path / "first", tmp_path / "second"
    export_drafter(drafter, first, format, target=target, target_name="someone/target")
    found = import_drafter(first)
    embeddings = target.get_input_embeddings().weight.to(torch.bfloat16)
    theirs, ours = found.state_dict(), {**folded_state(drafter), "draft_model.embed_tokens.weight": embeddings}
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert all(theirs[name].dtype == ours[name].dtype for name in ours)
    assert found.draft_model.rotary_emb.inv_freq.dtype == torch.float32  # as in every model that was loaded
    assert found.config.draft_config.rope_parameters == drafter.config.draft_config.rope_parameters
    same = ("vocab_size", "draft_vocab_size", "target_layer_ids", "target_hidden_size", "eos_token_id")
    assert all(getattr(found.config, name) == getattr(drafter.config, name) for name in same)
    export_drafter(found, second, format, target=target, target_name="someone/target")
    (config, weights), (other_config, other_weights) = saved(first), saved(second)
    assert config == other_config and weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_imported_drafter_drafts_as_the_one_exported(tmp_path, target, drafter):
    export_drafter(drafter, tmp_path, target=target)
    found = import_drafter(tmp_path, target)
    outputs, traces = decode(target, drafter, PROMPTS, 24, window="fixed", max_window=4)
    again, other_traces = decode(target, found, PROMPTS, 24, window="fixed", max_window=4)
    assert again == outputs
    rounds = [[(r.draft_ids, r.accepted) for r in trace.rounds] for trace in traces]
    assert rounds == [[(r.draft_ids, r.accepted) for r in trace.rounds] for trace in other_traces]
    assert sum(trace.accepted for trace in traces) > 0  # otherwise nothing was compared


def test_published_layout_without_embeddings_layers_or_t2d(tmp_path, make_target):
    target = make_target("llama", num_layers=8, initializer_range=0.2)
    drafter = PPOWDrafter.from_target(target, draft_vocab_size=24, token_counts=torch.arange(64) % 7)
    assert drafter.config.target_layer_ids == [2, 4, 5]  # the engines' own rule for eight layers
    export_drafter(drafter, tmp_path)
    config, weights = saved(tmp_path)
    del weights["embed_tokens.weight"], weights["t2d"]
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    left_out = ("eagle_aux_hidden_state_layer_ids", "eagle_config", "norm_before_residual", "target_hidden_size")
    config = {name: value for name, value in config.items() if name not in (*left_out, "rope_parameters")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="target: .*does not say which of the target's layers"):
        import_drafter(tmp_path)
    with pytest.raises(ValueError, match="no embed_tokens.weight"):
        import_drafter(tmp_path, target_layer_ids=[2, 4, 5])
    found = import_drafter(tmp_path, target, max_window=6)
    assert found.config.target_layer_ids == [2, 4, 5] and found.config.max_window == 6
    ours, theirs = folded_state(drafter), found.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_the_norms_that_speculators_adds_are_written_and_read(tmp_path, target):
    norms = {"norm_before_fc": True, "norm_before_residual": True, "norm_output": True}
    drafter = PPOWDrafter.from_target(target, **norms)
    torch.nn.init.uniform_(drafter.draft_model.input_norm.weight)
    with pytest.raises(ValueError, match="format: 'vllm' given, and this drafter has norm_before_fc and"):
        export_drafter(drafter, tmp_path)
    export_drafter(drafter, tmp_path, "speculators", target=target, target_name="someone/target")
    found = import_drafter(tmp_path)
    assert {name: getattr(found.config, name) for name in norms} == norms
    ours, theirs = drafter.state_dict(), found.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_layers_counted_as_sglang_does(tmp_path, target, drafter):
    export_drafter(drafter, tmp_path)
    rewritten(tmp_path, eagle_aux_hidden_state_layer_ids=None)
    assert import_drafter(tmp_path).config.target_layer_ids == [1, 2, 3]


def without(*names):
    return lambda weights: {name: tensor for name, tensor in weights.items() if name not in names}


DAMAGE = {
    "d2t missing": (without("d2t"), {}, "d2t: missing"),
    "norm missing": (without("norm.weight"), {}, "norm.weight: missing"),
    "ids in place of offsets": (
        lambda w: w | {"d2t": w["d2t"] + torch.arange(len(w["d2t"]))},
        {},
        "d2t holds offsets|t2d: marks other tokens",
    ),
    "t2d of other tokens": (lambda w: w | {"t2d": ~w["t2d"]}, {}, "t2d: marks other tokens"),
    "d2t of another type": (lambda w: w | {"d2t": w["d2t"].int()}, {}, "d2t: torch.int32"),
    "a tensor too many": (lambda w: w | {"midlayer.self_attn.q_proj.bias": torch.ones(32)}, {}, "q_proj.bias: not a"),
    "a wrong shape": (lambda w: w | {"lm_head.weight": w["lm_head.weight"][:20].clone()}, {}, "lm_head.weight: shape"),
    "an undefined number": (lambda w: w | {"norm.weight": w["norm.weight"] * torch.nan}, {}, "norm.weight: holds"),
    "layers in another order": (without(), {"eagle_aux_hidden_state_layer_ids": [3, 2, 1]}, "ascending ids"),
    "inner and outer layers differ": (
        without(),
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}},
        "less one",
    ),
    "a norm for each state": (without(), {"fc_norm": True}, "fc_norm: a variant"),
    "a norm missing": (without(), {"norm_before_fc": True}, "input_norm.weight: missing"),
    "two layers": (without(), {"num_hidden_layers": 2}, "where EAGLE-3 has one layer"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_refused(tmp_path, drafter, damage):
    change, fields, message = DAMAGE[damage]
    export_drafter(drafter, tmp_path)
    rewritten(tmp_path, change(saved(tmp_path)[1]), **fields)
    with pytest.raises(ValueError, match=message):
        import_drafter(tmp_path)


def test_checkpoints_of_other_targets_and_kinds_are_refused(tmp_path, make_target, target, drafter):
    export_drafter(drafter, tmp_path / "a")
    with pytest.raises(ValueError, match="fc.weight: 96 columns, where 3 states of this target have 48"):
        import_drafter(tmp_path / "a", make_target("llama", hidden_size=16))
    with pytest.raises(ValueError, match="vocab_size: 64, and the target's is 32"):
        import_drafter(tmp_path / "a", make_target("llama", vocab_size=32))
    copy.deepcopy(target).save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="not an EAGLE-3, DFlash or DSpark drafter"):
        import_drafter(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        import_drafter(tmp_path / "nowhere")
    export_drafter(drafter, tmp_path / "c", "speculators", target=target, target_name="someone/target")
    rewritten(tmp_path / "c", norm_before_residual=None)
    with pytest.raises(ValueError, match="norm_before_residual: not given"):
        import_drafter(tmp_path / "c")


@pytest.mark.lowest
def test_older_rotary_fields_are_read(tmp_path, drafter):
    """As transformers before 5 wrote them: `rope_theta` and `rope_scaling`."""
    export_drafter(drafter, tmp_path)
    scaling = {"rope_type": "linear", "factor": 4.0}
    rewritten(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=scaling)
    found = import_drafter(tmp_path).config.draft_config.rope_parameters
    assert found == LlamaConfig(rope_parameters={"rope_theta": 500.0, **scaling}).rope_parameters


# -- the command line


def test_rotary_positions_of_vision_models_are_read_as_those_of_text(tmp_path, drafter):
    """SpecForge: Qwen2.5-VL's drafters name "mrope", whose three axes are one along text."""
    export_drafter(drafter, tmp_path)
    scaling = {"type": "mrope", "mrope_section": [2, 1, 1]}
    rewritten(tmp_path, rope_parameters=None, rope_theta=1e6, rope_scaling=scaling)
    found = import_drafter(tmp_path).config.draft_config.rope_parameters
    assert found["rope_type"] == "default" and found["rope_theta"] == 1e6
    rewritten(tmp_path, rope_scaling={"rope_type": "su", "factor": 2.0})
    with pytest.raises(ValueError, match="checkpoint: rope_scaling of config.json is of the type 'su'"):
        import_drafter(tmp_path)


def test_export_and_import_commands(tmp_path, capsys):
    exported, imported = tmp_path / "exported", tmp_path / "imported"
    assert cli.main(["export", "tiny-eagle", "--output-dir", str(exported), "--target", "tiny"]) == 0
    printed = capsys.readouterr().out
    assert "eagle3, 14 tensors" in printed and "README.md" in printed
    assert cli.main(["import", str(exported), "--output-dir", str(imported), "--target", "tiny"]) == 0
    assert "draft vocabulary 4096 of 4096" in capsys.readouterr().out
    again = PPOWDrafter.from_pretrained(imported)
    original = PPOWDrafter.from_pretrained(tiny.drafter_path("tiny-eagle"))
    assert again.config.target_vocabulary_fingerprint == original.config.target_vocabulary_fingerprint
    ours, theirs = original.state_dict(), again.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert cli.main(["export", "tiny-standalone", "--output-dir", str(tmp_path / "s"), "--format", "standalone"]) == 0
    assert (tmp_path / "s" / "tokenizer.json").is_file()
    assert cli.main(["export", "tiny-standalone", "--output-dir", str(tmp_path / "t"), "--format", "speculators"]) == 2
    assert "format: 'speculators' is not for standalone" in capsys.readouterr().err
    assert cli.main(["import", str(exported), "--output-dir", str(imported), "--target-layer-ids", "a"]) == 2
    assert "--target-layer-ids: 'a' given" in capsys.readouterr().err
    assert cli.main(["import", str(exported), "--output-dir", str(exported)]) == 2
    assert "own folder, which would be overwritten" in capsys.readouterr().err
