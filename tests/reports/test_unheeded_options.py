"""Options that were taken and not heeded: heeded now, or refused."""

import copy

import pytest
import transformers
from test_batches import make_drafter
from test_generation import character_tokenizer
from transformers import LlamaConfig, T5Config, T5ForConditionalGeneration

from ppow_hf import PPOWDrafter, PPOWDrafterConfig
from ppow_hf.data.models import check_tokenizer
from ppow_hf.runtime.configuration_ppow import MAX_APPENDED, vocabulary_fingerprint, warn_of_other_target
from ppow_hf.training import PPOWTrainingArguments
from ppow_hf.training.checks import check_pair

ARGUMENTS = PPOWTrainingArguments("unused", report_to=[])


@pytest.mark.parametrize(
    ("architecture", "option"),
    [
        ("eagle", {"num_hidden_layers": 2}),
        ("eagle", {"attention_bias": True}),
        ("eagle", {"attention_dropout": 0.1}),
        ("medusa", {"num_hidden_layers": 2}),
        ("medusa", {"intermediate_size": 64}),
    ],
    ids=str,
)
def test_a_layer_that_cannot_be_built_so_is_refused(make_target, architecture, option):
    """Asked for in sgl-project/SpecForge#261: an EAGLE drafter of several layers."""
    name = next(iter(option))
    with pytest.raises(ValueError, match=f"^{name}: "):
        PPOWDrafter.from_target(make_target("llama"), architecture, **option)


def test_options_that_say_what_is_built_are_taken(make_target):
    """One layer may be asked for, and what the layer heeds."""
    drafter = PPOWDrafter.from_target(make_target("llama"), "eagle", num_hidden_layers=1, intermediate_size=48)
    assert drafter.draft_model.midlayer.mlp.up_proj.out_features == 48
    two = PPOWDrafter.from_target(make_target("llama"), "standalone", num_hidden_layers=2)
    assert len(two.draft_model.model.model.layers) == 2


def test_an_eagle_configuration_of_two_layers_is_refused():
    """The same through the configuration."""
    layer = LlamaConfig(vocab_size=64, hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    with pytest.raises(ValueError, match="num_hidden_layers=2.*one layer"):
        PPOWDrafter(PPOWDrafterConfig("eagle", layer, vocab_size=64, target_hidden_size=32))


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def small(name: str, **options):
    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return getattr(transformers, f"{name}")(getattr(transformers, options.pop("config"))(**common, **options))


@pytest.mark.parametrize("architecture", ["eagle", "standalone", "medusa"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (t5, "has an encoder"),
        (lambda: small("BertForMaskedLM", config="BertConfig", intermediate_size=64), "writes no text"),
        (lambda: small("MambaForCausalLM", config="MambaConfig", state_size=4), "recurrent state"),
    ],
    ids=["t5", "bert", "mamba"],
)
def test_no_drafter_is_made_for_a_target_that_it_cannot_serve(make, message, architecture):
    """The kind of huggingface/transformers: a model of another kind where a causal one is wanted."""
    with pytest.raises(ValueError, match=message):
        PPOWDrafter.from_target(make(), architecture)


def test_appended_tokens_leave_a_vocabulary_known(make_target, recwarn):
    """The kind of huggingface/transformers: `add_tokens` on the target's own tokenizer."""
    target, tokenizer = make_target("llama", vocab_size=70), character_tokenizer()
    drafter = make_drafter(target, "standalone")
    drafter.config.target_vocabulary_fingerprint = vocabulary_fingerprint(tokenizer)
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(["<think>", "</think>"])
    longer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    for check in (lambda t: check_pair(drafter, target, t, ARGUMENTS), lambda t: check_tokenizer(drafter, t)):
        check(tokenizer)
        check(longer)
    warn_of_other_target(drafter.config, tokenizer=longer)
    assert not [w for w in recwarn if "fingerprint" in str(w.message)]


def test_another_vocabulary_is_still_another(make_target):
    """Fewer tokens than the drafter knows, others in their place, or more than can be looked through."""
    target, tokenizer = make_target("llama", vocab_size=200), character_tokenizer()
    drafter = make_drafter(target, "standalone")
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(["<think>"])
    far = copy.deepcopy(tokenizer)
    far.add_tokens([f"<{i}>" for i in range(MAX_APPENDED + 1)])
    for known, given in ((longer, tokenizer), (tokenizer, far)):
        drafter.config.target_vocabulary_fingerprint = vocabulary_fingerprint(known)
        with pytest.raises(ValueError, match="vocabulary"):
            check_pair(drafter, target, given, ARGUMENTS)
        with pytest.warns(UserWarning, match="fingerprint"):
            warn_of_other_target(drafter.config, tokenizer=given)
    drafter.config.target_vocabulary_fingerprint = vocabulary_fingerprint(longer)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<other>"])
    with pytest.raises(ValueError, match="vocabulary"):
        check_pair(drafter, target, other, ARGUMENTS)
