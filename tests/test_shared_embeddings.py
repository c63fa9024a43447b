"""An eagle drafter shares its target's token embeddings: read where they are, neither saved nor trained.

The reference is a drafter of the same weights with a copy of its own.
"""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file

from ppow_hf import PPOWDrafter, PPOWDrafterConfig, tiny
from ppow_hf.export import export_drafter
from ppow_hf.measure.costs import measure_costs
from ppow_hf.measure.draft_table import draft_tables
from ppow_hf.runtime.modeling_ppow import collect_target_states

EMBEDDINGS = "draft_model.embed_tokens.weight"


@pytest.fixture
def target(make_target):
    return make_target("llama", initializer_range=0.2)


def pair_of_drafters(target) -> tuple[PPOWDrafter, PPOWDrafter]:
    """One that shares its target's embeddings, and one of the same weights with a copy of its own."""
    drafters = []
    for shares in (True, False):
        options = {} if shares else {"shares_target_embeddings": False}
        drafters.append(PPOWDrafter.from_target(target, **options).eval())
    sharing, own = drafters
    own.load_state_dict(sharing.state_dict() | {EMBEDDINGS: target.get_input_embeddings().weight})
    return sharing, own


def drafted(target, drafter, own_loop: bool = False, **settings) -> tuple[list[int], list[list[int]]]:
    """A greedy text and what was drafted in each round."""
    prompt = torch.tensor([[5, 9, 2, 33, 7]])
    settings = {"window": "fixed", "max_window": 4} | settings
    view = drafter.generate_with(**settings) if own_loop else drafter.with_settings(**settings)
    way = {"custom_generate": view} if own_loop else {"assistant_model": view}
    output = target.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, **way)
    return output[0].tolist(), [r.draft_ids for r in view.last_trace.rounds]


@torch.no_grad()
def features_of(target, drafter) -> torch.Tensor:
    ids = torch.arange(2, 14)[None]
    states = target(ids, output_hidden_states=True).hidden_states
    return drafter(ids, collect_target_states(states, drafter.config.target_layer_ids)).features


def test_a_new_eagle_drafter_holds_no_embeddings_and_computes_what_one_with_a_copy_does(target):
    sharing, own = pair_of_drafters(target)
    assert sharing.config.shares_target_embeddings and not own.config.shares_target_embeddings
    assert sharing.get_input_embeddings() is target.get_input_embeddings()
    assert own.state_dict().keys() - sharing.state_dict().keys() == {EMBEDDINGS}
    assert own.num_parameters() - sharing.num_parameters() == target.get_input_embeddings().weight.numel()
    assert torch.equal(features_of(target, sharing), features_of(target, own))


@pytest.mark.parametrize(("own_loop", "settings"), [(False, {}), (True, {}), (True, {"tree_nodes": 6})])
def test_a_saved_drafter_is_smaller_and_drafts_as_before(target, tmp_path, own_loop, settings):
    sharing, own = pair_of_drafters(target)
    for name, drafter in (("sharing", sharing), ("own", own)):
        drafter.save_pretrained(tmp_path / name)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("sharing", "own")]
    assert sizes[1] - sizes[0] >= 4 * target.get_input_embeddings().weight.numel()
    assert EMBEDDINGS not in load_file(tmp_path / "sharing" / "model.safetensors")
    loaded, info = PPOWDrafter.from_pretrained(tmp_path / "sharing", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    found = drafted(target, loaded, own_loop, **settings)
    assert found == drafted(target, sharing, own_loop, **settings) == drafted(target, own, own_loop, **settings)
    plain = target.generate(torch.tensor([[5, 9, 2, 33, 7]]), max_new_tokens=24, do_sample=False)
    assert found[0] == plain[0].tolist()


def test_a_drafter_without_its_target_says_what_is_missing(target, make_target, tmp_path):
    sharing, _ = pair_of_drafters(target)
    sharing.save_pretrained(tmp_path)
    loaded = PPOWDrafter.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="shares its target's token embeddings .*attach_target"):
        features_of(target, loaded)
    with pytest.raises(ValueError, match="of width 32, and this target's are 16 wide"):
        loaded.attach_target(make_target("llama", hidden_size=16))
    with pytest.raises(ValueError, match="the drafter's vocabulary has 64 tokens and the target's 6"):
        loaded.attach_target(make_target("llama", vocab_size=6))
    for _ in range(2):
        loaded.attach_target(target)
    assert torch.equal(features_of(target, loaded), features_of(target, sharing))
    with pytest.raises(ValueError, match="only an eagle or block drafter can share them"):
        PPOWDrafterConfig(architecture="medusa", shares_target_embeddings=True)


def test_measurements_attach_the_target_themselves(target, tmp_path):
    sharing, own = pair_of_drafters(target)
    sharing.save_pretrained(tmp_path)
    prompt = torch.tensor([[5, 9, 2, 33]])
    (table,) = draft_tables(target, PPOWDrafter.from_pretrained(tmp_path), [prompt], 12, depth=4)
    (expected,) = draft_tables(target, own, [prompt], 12, depth=4)
    assert (table.draft_ids == expected.draft_ids).all() and len(table.draft_ids) == 11
    costs = measure_costs(target, PPOWDrafter.from_pretrained(tmp_path), prompt, max_window=2, repeats=1)
    assert costs.cost_ratio > 0


def test_copies_share_and_pickled_ones_wait_for_their_target(target):
    sharing, _ = pair_of_drafters(target)
    copied = copy.deepcopy(sharing)
    assert copied.get_input_embeddings() is target.get_input_embeddings()
    pickled = pickle.loads(pickle.dumps(sharing))
    assert pickled.get_input_embeddings() is None and sharing.get_input_embeddings() is not None
    pickled.attach_target(target)
    expected = features_of(target, sharing)
    assert torch.equal(features_of(target, copied), expected) and torch.equal(features_of(target, pickled), expected)


@pytest.mark.parametrize("formats", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_target_and_drafter_may_be_in_different_number_formats(target, formats):
    target = copy.deepcopy(target).to(formats[0])
    sharing, own = (drafter.to(formats[1]) for drafter in pair_of_drafters(target))
    sharing.attach_target(target)
    assert target.get_input_embeddings().weight.dtype == formats[0]
    assert torch.equal(features_of(target, sharing), features_of(target, own))


def test_no_gradient_reaches_the_target(target):
    target = copy.deepcopy(target).requires_grad_(True)
    sharing, _ = pair_of_drafters(target)
    ids = torch.arange(2, 14)[None]
    states = collect_target_states(target(ids, output_hidden_states=True).hidden_states, [1, 2, 3]).detach()
    sharing(ids, states).logits[:, 1:].square().sum().backward()
    assert target.get_input_embeddings().weight.grad is None and sharing.draft_model.fc.weight.grad is not None


def test_trained_embeddings_are_a_copy_that_is_saved(target, tmp_path):
    sharing, own = pair_of_drafters(target)
    sharing.train_embeddings(True)
    weight = sharing.get_input_embeddings().weight
    assert weight.requires_grad and not sharing.config.shares_target_embeddings
    assert torch.equal(weight, target.get_input_embeddings().weight)
    before = target.get_input_embeddings().weight.clone()
    with torch.no_grad():
        weight += 1.0
    assert torch.equal(target.get_input_embeddings().weight, before)
    sharing.save_pretrained(tmp_path)
    loaded = PPOWDrafter.from_pretrained(tmp_path)
    assert torch.equal(loaded.state_dict()[EMBEDDINGS], before + 1.0)
    own.train_embeddings(False)
    assert not own.get_input_embeddings().weight.requires_grad


def test_drafters_saved_before_keep_their_own(target, tmp_path):
    own = pair_of_drafters(target)[1]
    own.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("shares_target_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = PPOWDrafter.from_pretrained(tmp_path)
    assert torch.equal(features_of(target, loaded), features_of(target, own))
    shipped = PPOWDrafter.from_pretrained(tiny.drafter_path("tiny-eagle"))
    assert not shipped.config.shares_target_embeddings and shipped.get_input_embeddings() is not None


@pytest.mark.parametrize("format", ["vllm", "speculators"])
def test_exports_hold_the_targets_embeddings_or_leave_them_out(target, tmp_path, format):
    sharing, own = pair_of_drafters(target)
    sharing.save_pretrained(tmp_path / "drafter")
    options = {"target": target, "target_name": "someone/target"}
    loaded = PPOWDrafter.from_pretrained(tmp_path / "drafter")
    if format == "vllm":
        with pytest.raises(ValueError, match="target: the drafter shares its target's embeddings"):
            export_drafter(loaded, tmp_path / "none")
        export_drafter(loaded, tmp_path / "without", share_embeddings=True)
        assert "embed_tokens.weight" not in load_file(tmp_path / "without" / "model.safetensors")
    export_drafter(loaded, tmp_path / "given", format, **options)
    export_drafter(own, tmp_path / "wanted", format, **options)
    given, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("given", "wanted"))
    assert given.keys() == wanted.keys() and all(torch.equal(given[name], wanted[name]) for name in wanted)
    configs = [(tmp_path / name / "config.json").read_text() for name in ("given", "wanted")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("architecture", ["eagle", "standalone", "medusa", "block"])
def test_resizing_a_drafter_is_refused_and_changes_no_target(target, architecture):
    drafter = PPOWDrafter.from_target(target, architecture)
    drafter.attach_target(target)
    rows = len(target.get_input_embeddings().weight)
    with pytest.raises(ValueError, match=f"^new_num_tokens: {rows + 4} given"):
        drafter.resize_token_embeddings(rows + 4)
    assert drafter.resize_token_embeddings(rows) is drafter.get_input_embeddings()
    assert len(target.get_input_embeddings().weight) == rows


def test_a_peft_wrapped_target_is_attached_as_any_other(target):
    peft = pytest.importorskip("peft")
    sharing, own = pair_of_drafters(target)
    wrapped = peft.get_peft_model(copy.deepcopy(target), peft.LoraConfig(target_modules=["q_proj"]))
    sharing.attach_target(wrapped)
    assert torch.equal(features_of(target, sharing), features_of(target, own))
