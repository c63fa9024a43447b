"""Block drafters in the formats of DFlash, DSpark and speculators, there and back, and what engines would not load."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_block import VARIANTS, K, make_drafter, states_of, tokens
from test_export import rewritten, saved, without

from ppow_hf.cli import main
from ppow_hf.export import export_drafter, import_drafter

FORMATS = ["vllm", "speculators"]


@pytest.fixture(scope="module")
def target(make_target):
    return make_target("llama", initializer_range=0.2)


def reduced(target, variant="dflash", **options):
    counts = torch.arange(64) % 7
    return make_drafter(target, variant, draft_vocab_size=24, token_counts=counts, **options)


# -- what is written


def test_a_dflash_directory_is_what_its_authors_publish(tmp_path, target):
    report = export_drafter(make_drafter(target), tmp_path, target=target, target_name="someone/target")
    config, weights = saved(tmp_path)
    assert report.layout == "dflash" and config["architectures"] == ["DFlashDraftModel"]
    assert config["model_type"] == "qwen3" and config["num_hidden_layers"] == 2 and config["num_target_layers"] == 4
    assert config["block_size"] == K + 1  # the anchor counts, and drafts nothing
    assert config["dflash_config"] == {"mask_token_id": 63, "target_layer_ids": [0, 1, 2]}
    assert (
        not {"embed_tokens.weight", "lm_head.weight", "d2t"} & weights.keys()
        and "layers.1.mlp.up_proj.weight" in weights
    )
    text = (tmp_path / "README.md").read_text()
    assert f'"method": "dflash", "model": "{tmp_path.name}", "num_speculative_tokens": {K}' in text
    assert "--speculative-algorithm DFLASH" in text and "k_norm" in text


def test_a_dspark_directory_is_what_its_authors_publish(tmp_path, target):
    report = export_drafter(make_drafter(target, "dspark"), tmp_path, target=target, target_name="someone/target")
    config, weights = saved(tmp_path)
    assert report.layout == "dspark" and config["architectures"] == ["Qwen3DSparkModel"]
    assert config["block_size"] == K and config["sample_from_anchor"] is True
    assert config["target_layer_ids"] == [0, 1, 2] and config["mask_token_id"] == 63
    heads = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
    assert [config[name] for name in heads] == [3, "vanilla", True, True]
    assert weights["markov_head.markov_w1.weight"].shape == (64, 3)
    assert weights["confidence_head.proj.weight"].shape == (1, 32 + 3)
    text = (tmp_path / "README.md").read_text()
    assert "with the GPU kernels for Markov heads interpreted" in text
    assert '"enable_adaptive_verification": true' in text and "Not tried: it needs CUDA graphs." in text


def test_a_speculators_directory_names_its_target_and_says_what_readers_disagree_on(tmp_path, target):
    for variant, algorithm in (("dflash", "dflash"), ("dspark", "dspark")):
        folder = tmp_path / variant
        export_drafter(reduced(target, variant), folder, "speculators", target=target, target_name="someone/target")
        config, weights = saved(folder)
        assert config["speculators_model_type"] == algorithm and config["draft_vocab_size"] == 24
        assert config["aux_hidden_state_layer_ids"] == [1, 2, 3] and config["sliding_window_non_causal"] is True
        assert config["sample_from_anchor"] is (variant == "dspark")
        assert config["speculators_config"]["verifier"]["name_or_path"] == "someone/target"
        assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == K
        assert config["transformer_layer_config"]["model_type"] == "qwen3"
        assert weights["lm_head.weight"].shape == (24, 32) and weights["d2t"].dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "format", "message"),
    [
        ({"target_layer_ids": [0, 2]}, "vllm", r"the target's embeddings \(0 of target_layer_ids\)"),
        ({"sample_from_anchor": True}, "vllm", "sample_from_anchor goes with a Markov head"),
        ({"confidence_head": True}, "speculators", "a confidence head goes with a Markov head"),
        ({"draft_vocab_size": 24, "token_counts": torch.arange(64)}, "sglang", "SGLang reads neither a head"),
        ({}, "standalone", "'standalone' is not for block drafters"),
    ],
)
def test_what_engines_would_not_load_is_refused(tmp_path, target, options, format, message):
    with pytest.raises(ValueError, match=message):
        export_drafter(make_drafter(target, **options), tmp_path, format, target=target, target_name="someone/target")
    assert not list(tmp_path.iterdir())


def test_the_targets_last_state_and_windows_beyond_the_block_are_refused(tmp_path, target):
    drafter = make_drafter(target)
    drafter.config.target_layer_ids = [1, 2, 4]
    with pytest.raises(
        ValueError, match="after the target's last layer, 4, which vLLM hands out before the final norm"
    ):
        export_drafter(drafter, tmp_path, target=target)
    with pytest.raises(ValueError, match=f"speculative_tokens: {K + 1} given; a window of 1 to {K}"):
        export_drafter(make_drafter(target), tmp_path, target=target, speculative_tokens=K + 1)


# -- there and back


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["shared", "reduced", "own embeddings"])
def test_round_trip_is_tensor_identical(tmp_path, target, format, variant, kind):
    options = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 123.0}}
    if kind == "own embeddings":
        options |= {"shares_target_embeddings": False, "attention_bias": True}
    drafter = (reduced if kind == "reduced" else make_drafter)(target, variant, **options).to(torch.bfloat16)
    first, second = tmp_path / "first", tmp_path / "second"
    export_drafter(drafter, first, format, target=target, target_name="someone/target")
    found = import_drafter(first, target)
    theirs, ours = found.state_dict(), drafter.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) and theirs[name].dtype == ours[name].dtype for name in ours)
    same = ("block_size", "sample_from_anchor", "mask_token_id", "markov_rank", "confidence_head", "draft_vocab_size")
    same += ("target_layer_ids", "target_hidden_size", "vocab_size", "shares_target_head", "shares_target_embeddings")
    assert all(getattr(found.config, name) == getattr(drafter.config, name) for name in same)
    assert found.config.draft_config.rope_parameters == drafter.config.draft_config.rope_parameters
    export_drafter(found, second, format, target=target, target_name="someone/target")
    (config, weights), (other_config, other_weights) = saved(first), saved(second)
    assert config == other_config and weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_an_imported_drafter_computes_what_the_exported_one_does(tmp_path, target):
    drafter, input_ids = make_drafter(target, "dspark"), tokens(1, 9)
    export_drafter(drafter, tmp_path, target=target)
    found, states = import_drafter(tmp_path, target), states_of(target, drafter, input_ids)
    given = {"prefixes": torch.tensor([[2, 7]]), "draft_ids": tokens(1, 2, K)}
    expected = drafter(input_ids, states, **given).window_features
    assert torch.equal(found(input_ids, states, **given).window_features, expected)
    draft = found.draft_model
    assert torch.equal(draft.confidence(expected), drafter.draft_model.confidence(expected))
    assert torch.equal(found.compute_logits(expected), drafter.compute_logits(expected))


def test_a_head_in_another_number_format_stays_in_it(tmp_path, target):
    export_drafter(make_drafter(target, "dspark").to(torch.bfloat16), tmp_path, target=target)
    weights = load_file(tmp_path / "model.safetensors")
    weights["confidence_head.proj.weight"] = weights["confidence_head.proj.weight"].float() + 1e-6
    save_file(weights, tmp_path / "model.safetensors")
    state = import_drafter(tmp_path, target).state_dict()
    assert torch.equal(state["draft_model.confidence_head.proj.weight"], weights["confidence_head.proj.weight"])
    assert state["draft_model.fc.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"markov_head_type": "gated"}, "markov_head_type: 'gated', a variant"),
        ({"markov_head_type": "rnn"}, "markov_head_type: 'rnn', a variant"),
        ({"confidence_head_with_markov": False}, "confidence_head_with_markov: not true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: .*'sliding_attention'"),
        ({"is_causal": True}, "is_causal: True, a variant"),
        ({"target_layer_ids": [2, 0]}, r"target_layer_ids: \[3, 1\] as hidden_states"),
        ({"target_layer_ids": [-1, 0, 1]}, r"target_layer_ids: \[0, 1, 2\] as hidden_states"),
        ({"target_layer_ids": [0, 1]}, "fc.weight: 96 columns, where 2 states of this target have 64"),
        ({"mask_token_id": 64}, "mask_token_id: 64, no token"),
        ({"block_size": 0}, "block_size: 0, of which no token is drafted"),
        ({"markov_rank": 5}, r"markov_head.markov_w1.weight: shape \(64, 3\) instead of \(64, 5\)"),
        ({"num_hidden_layers": 3}, "layers.2.self_attn.q_proj.weight: missing"),
    ],
)
def test_what_would_compute_something_else_is_refused(tmp_path, target, fields, message):
    export_drafter(make_drafter(target, "dspark"), tmp_path, target=target)
    with pytest.raises(ValueError, match=f"checkpoint: .*{message}"):
        import_drafter(rewritten(tmp_path, **fields), target)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": "4"}, "says block_size: '4', where a whole number is needed"),
        ({"mask_token_id": "7"}, "says mask_token_id: '7', where a whole number is needed"),
        ({"markov_rank": "x"}, "says markov_rank: 'x', where a whole number is needed"),
        ({"target_layer_ids": "x"}, "says target_layer_ids: 'x', where a list of whole numbers is needed"),
        ({"target_layer_ids": [1.5]}, r"says target_layer_ids: \[1.5\], where a list of whole numbers is needed"),
        ({"speculators_config": {"verifier": "x"}}, "says verifier: 'x', where an object is needed"),
        ({"dflash_config": [1]}, r"says dflash_config: \[1\], where an object is needed"),
        ({"dflash_config": {"block_size": "x"}}, "says block_size: 'x', where a whole number is needed"),
        (
            {"architectures": None},
            "by the architectures in config.json. Accepted are LlamaForCausalLMEagle3, .*DFlash",
        ),
    ],
)
def test_fields_of_another_kind_are_named(tmp_path, target, fields, message):
    export_drafter(make_drafter(target, "dspark"), tmp_path, target=target)
    with pytest.raises(ValueError, match=f"checkpoint: .*{message}"):
        import_drafter(rewritten(tmp_path, **fields), target)


def test_settings_and_targets_that_are_not_there_are_named(tmp_path, target):
    export_drafter(make_drafter(target), tmp_path, target=target)
    for name in ("foo", "architecture"):
        with pytest.raises(ValueError, match=f"{name}: not a field of PPOWDrafterConfig that an import can set"):
            import_drafter(tmp_path, target, **{name: "eagle"})
    with pytest.raises(FileNotFoundError, match="target: there is no folder '/nonexistent'"):
        import_drafter(tmp_path, "/nonexistent")


@pytest.mark.parametrize("name", ["norm.weight", "d2t", "lm_head.weight", "layers.1.self_attn.k_norm.weight"])
def test_a_missing_tensor_is_refused(tmp_path, target, name):
    export_drafter(reduced(target), tmp_path, target=target)
    with pytest.raises(ValueError, match=f"checkpoint: .*{name}: missing"):
        import_drafter(rewritten(tmp_path, without(name)(saved(tmp_path)[1])), target)


def test_a_tensor_that_no_block_drafter_has_is_refused(tmp_path, target):
    export_drafter(make_drafter(target), tmp_path, target=target)
    weights = saved(tmp_path)[1] | {"mask_embedding": torch.zeros(32)}
    with pytest.raises(ValueError, match="mask_embedding: not a tensor of DFlash or DSpark"):
        import_drafter(rewritten(tmp_path, weights))


def test_command_line_there_and_back(tmp_path, capsys):
    """`ppow export` and `ppow import` with the embedded target, whose embeddings and head stay its own."""
    from transformers import AutoModelForCausalLM

    from ppow_hf import PPOWDrafter
    from ppow_hf.tiny import target_path

    embedded = AutoModelForCausalLM.from_pretrained(target_path(), dtype=torch.bfloat16)
    drafter = PPOWDrafter.from_target(embedded, "block", block_size=K, num_hidden_layers=1, markov_rank=4)
    drafter.config.target_name_or_path = "tiny"
    drafter.save_pretrained(tmp_path / "drafter")
    exported, imported = str(tmp_path / "exported"), str(tmp_path / "imported")
    assert main(["export", str(tmp_path / "drafter"), "--output-dir", exported]) == 0
    assert main(["import", exported, "--target", "tiny", "--output-dir", imported]) == 0
    printed = capsys.readouterr().out
    assert "exported: dspark, " in printed and "imported: a block drafter with" in printed
    config = json.loads((tmp_path / "imported" / "config.json").read_text())
    assert config["block_size"] == K and config["markov_rank"] == 4
    ours, theirs = drafter.state_dict(), PPOWDrafter.from_pretrained(imported, dtype="auto").state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert main(["import", exported, "--target-layer-ids", "1,2,3", "--output-dir", imported]) == 2
    assert "--target-layer-ids: a DFlash or DSpark checkpoint names its own" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_say_where_its_tokens_stand_is_warned_of(tmp_path, target, monkeypatch, caplog):
    """vLLM, SGLang: speculators' earlier versions leave `sample_from_anchor` out, and mean false."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    drafter = make_drafter(target, "dspark", sample_from_anchor=False)
    export_drafter(drafter, tmp_path, "speculators", target=target, target_name="someone/target")
    assert import_drafter(tmp_path, target).config.sample_from_anchor is False
    assert "does not say sample_from_anchor" not in caplog.text
    assert import_drafter(rewritten(tmp_path, sample_from_anchor=None), target).config.sample_from_anchor is True
    assert "does not say sample_from_anchor" in caplog.text


def test_settings_of_dspark_are_read_where_specforge_writes_them(tmp_path, target):
    """SpecForge: all of them within `dflash_config`, with `projector_type`."""
    drafter = make_drafter(target, "dspark")
    export_drafter(drafter, tmp_path, target=target, target_name="someone/target")
    names = ("markov_rank", "enable_confidence_head", "confidence_head_with_markov", "sample_from_anchor",
             "mask_token_id", "target_layer_ids", "block_size")  # fmt: skip
    config, _ = saved(tmp_path)
    moved = {name: config[name] for name in names} | {"projector_type": "dspark"}
    rewritten(tmp_path, architectures=["DSparkDraftModel"], dflash_config=moved, **dict.fromkeys(names))
    found = import_drafter(tmp_path, target)
    assert found.config.to_dict() | {"target_name_or_path": None} == import_drafter(
        rewritten(tmp_path, dflash_config=None, **{name: config[name] for name in names}), target
    ).config.to_dict() | {"target_name_or_path": None}
    assert found.config.markov_rank == 3 and found.config.confidence_head
