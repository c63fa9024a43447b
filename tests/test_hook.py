"""What the hook does to transformers: it serves a PPOWDrafter, leaves other assistants alone, and can be undone."""

import functools
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import GenerationMixin
from transformers.generation.candidate_generator import AssistedCandidateGenerator, PromptLookupCandidateGenerator

import ppow_hf
from ppow_hf import PPOWDrafter
from ppow_hf.hook import install_hook, remove_hook

METHODS = ("_get_candidate_generator", "_assisted_decoding", "_validate_generation_mode")


def current_methods() -> dict:
    return {name: getattr(GenerationMixin, name) for name in METHODS}


def prompt(seed: int = 0, length: int = 8) -> torch.Tensor:
    return torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(seed))


def greedy(target, input_ids, **options):
    options = {"do_sample": False, "max_new_tokens": 16, "attention_mask": torch.ones_like(input_ids)} | options
    return target.generate(input_ids, **options)


@pytest.fixture(autouse=True)
def hook_installed_again_afterwards():
    install_hook()
    yield
    install_hook()


@pytest.fixture
def target(make_target):
    return make_target("llama")


@pytest.fixture
def calls_of(monkeypatch):
    """`calls_of(cls)` -> a list that grows by one with each call of the class's own `get_candidates`."""

    def count(cls):
        calls, original = [], cls.get_candidates

        @functools.wraps(original)
        def get_candidates(self, *args, **kwargs):
            calls.append(type(self))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, "get_candidates", get_candidates)
        return calls

    return count


@pytest.mark.lowest
def test_a_plain_assistant_gets_transformers_own_generator(make_target, target, calls_of):
    calls = calls_of(AssistedCandidateGenerator)
    assistant = make_target("llama", num_layers=1, seed=1)
    assert torch.equal(greedy(target, prompt(), assistant_model=assistant), greedy(target, prompt()))
    assert set(calls) == {AssistedCandidateGenerator}


@pytest.mark.lowest
def test_prompt_lookup_works_as_before(target, calls_of):
    calls = calls_of(PromptLookupCandidateGenerator)
    ids = prompt().repeat(1, 3)
    assert torch.equal(greedy(target, ids, prompt_lookup_num_tokens=3), greedy(target, ids))
    assert set(calls) == {PromptLookupCandidateGenerator}


@pytest.mark.lowest
def test_a_ppow_drafter_gets_none_of_transformers_generators(target, calls_of):
    calls = calls_of(AssistedCandidateGenerator)
    drafter = PPOWDrafter.from_target(target, "standalone").eval()
    greedy(target, prompt(), assistant_model=drafter)
    assert drafter.last_trace.rounds and not calls


def test_stock_checks_of_other_assistants_stay(make_target, target):
    with pytest.raises(ValueError, match="tokenizer"):
        greedy(target, prompt(), assistant_model=make_target("llama", vocab_size=100))


@pytest.mark.lowest
def test_removing_the_hook_restores_the_original_methods():
    hooked = current_methods()
    remove_hook()
    restored = current_methods()
    for name in METHODS:
        assert hooked[name] is not restored[name]
        assert hooked[name].__wrapped__ is restored[name]
        assert restored[name].__module__ == "transformers.generation.utils"
        assert not hasattr(restored[name], "__wrapped__")
    remove_hook()
    assert current_methods() == restored


@pytest.mark.lowest
def test_installing_twice_changes_nothing():
    once = current_methods()
    install_hook()
    assert current_methods() == once
    remove_hook()
    assert all(once[name].__wrapped__ is method for name, method in current_methods().items())


@pytest.mark.lowest
def test_the_hook_can_be_installed_again(target):
    drafter = PPOWDrafter.from_target(target, "eagle").eval()
    expected = greedy(target, prompt())
    remove_hook()
    install_hook()
    assert torch.equal(greedy(target, prompt(), assistant_model=drafter), expected)
    assert drafter.last_trace.drafted > 0


@pytest.mark.parametrize("name", METHODS)
def test_without_a_needed_method_a_drafter_is_refused_and_plain_generate_works(monkeypatch, target, name):
    drafter = PPOWDrafter.from_target(target, "standalone").eval()
    expected = greedy(target, prompt())
    remove_hook()
    with monkeypatch.context() as changed:
        changed.delattr(GenerationMixin, name)
        install_hook()
        for assistant in (drafter, drafter.with_settings(window="fixed")):
            with pytest.raises(RuntimeError, match=rf"{transformers.__version__}.*{name}.*transformers>=5\.17,<6"):
                greedy(target, prompt(), assistant_model=assistant)
        remove_hook()
    install_hook()
    assert torch.equal(greedy(target, prompt(), assistant_model=drafter), expected)


def test_with_other_parameters_a_drafter_is_refused(monkeypatch, target):
    drafter = PPOWDrafter.from_target(target, "standalone").eval()
    remove_hook()
    with monkeypatch.context() as changed:
        changed.setattr(GenerationMixin, "_assisted_decoding", lambda self, input_ids: None)
        install_hook()
        with pytest.raises(RuntimeError, match="_assisted_decoding.*stopping_criteria"):
            greedy(target, prompt(), assistant_model=drafter)
        remove_hook()


WITHOUT = """
import pytest, torch
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM
del GenerationMixin.{name}
import ppow_hf
from ppow_hf import PPOWDrafter, PPOWTrainer, PPOWTrainingArguments
config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2)
target = LlamaForCausalLM(config).eval()
drafter = PPOWDrafter.from_target(target).eval()
ids = torch.ones(1, 4, dtype=torch.long)
with pytest.raises(RuntimeError, match="{name}.*Install transformers>="):
    target.generate(ids, assistant_model=drafter, max_new_tokens=4)
"""


@pytest.mark.parametrize("name", [METHODS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS[1:])])
def test_a_transformers_without_a_needed_method_can_import_and_train(name):
    run = subprocess.run([sys.executable, "-c", WITHOUT.format(name=name)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_importing_the_package_installs_the_hook():
    assert all(hasattr(method, "__wrapped__") for method in current_methods().values())
    assert ppow_hf.install_hook is install_hook
