"""Tiny random target models for the tests: CPU, float32, built in milliseconds, no download.

Knows nothing about drafters; what a test needs of those it builds itself.
"""

import functools
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

torch.set_num_threads(1)

HEAD_SIZE = 8


@functools.cache
def build_target(
    family: str,
    *,
    vocab_size: int = 64,
    hidden_size: int = 32,
    num_layers: int = 4,
    seed: int = 0,
    max_position_embeddings: int = 256,
    eos_token_id: int | None = None,
    initializer_range: float = 0.5,
) -> PreTrainedModel:
    """
    A causal language model with random float32 weights, in eval mode. The same arguments give the same object: a test
    that changes the model (weights, config, generation_config) must work on a `copy.deepcopy`.

    Args:
        family (`str`):
            `"llama"` and `"qwen3"` (grouped-query attention, rotary positions), `"gpt_neox"` (parallel residual,
            partly rotary positions) or `"gpt2"` (learned positions, fused projections).
        eos_token_id (`int`, *optional*):
            None by default, so that generation ends at its token limit only.
        initializer_range (`float`, *optional*, defaults to `0.5`):
            Standard deviation of the weights. The usual 0.02 makes nearly uniform distributions whose argmax hangs on
            rounding; larger values make sharper ones.
    """
    num_heads = max(hidden_size // HEAD_SIZE, 1)
    common = {
        "vocab_size": vocab_size,
        "initializer_range": initializer_range,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": 0,
    }
    decoder = common | {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "max_position_embeddings": max_position_embeddings,
    }
    num_key_value_heads = max(num_heads // 2, 1)
    if family == "llama":
        model_class, config = LlamaForCausalLM, LlamaConfig(**decoder, num_key_value_heads=num_key_value_heads)
    elif family == "qwen3":
        model_class = Qwen3ForCausalLM
        config = Qwen3Config(**decoder, num_key_value_heads=num_key_value_heads, head_dim=hidden_size // num_heads)
    elif family == "gpt_neox":
        model_class, config = GPTNeoXForCausalLM, GPTNeoXConfig(**decoder)
    elif family == "gpt2":
        model_class = GPT2LMHeadModel
        config = GPT2Config(
            **common, n_embd=hidden_size, n_layer=num_layers, n_head=num_heads, n_positions=max_position_embeddings
        )
    else:
        raise ValueError(f"family must be 'llama', 'qwen3', 'gpt_neox' or 'gpt2', got {family!r}")

    # The process's random state is put back: building a target must not change what a test samples.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(torch.float32).eval()
    return model.requires_grad_(False)


@pytest.fixture(scope="session")
def make_target():
    """The function `build_target(family, *, vocab_size=64, hidden_size=32, num_layers=4, seed=0, ...)`."""
    return build_target


@pytest.fixture(scope="session")
def qwen3_pair():
    """A random Qwen3 target with the embedded target's tokenizer: another family that reads and writes text."""
    from transformers import AutoTokenizer

    from ppow_hf.tiny import target_path

    tokenizer = AutoTokenizer.from_pretrained(target_path())
    target = build_target("qwen3", vocab_size=len(tokenizer), hidden_size=64, max_position_embeddings=1024)
    return target, tokenizer


@pytest.fixture(scope="session")
def small_vocab_target() -> PreTrainedModel:
    """Six tokens, about one nat of entropy per token: small enough to enumerate every continuation exactly."""
    return build_target("llama", vocab_size=6, hidden_size=16, num_layers=2, initializer_range=0.4)


@pytest.fixture
def make_trainer(tmp_path, make_target):
    """Trainers on tiny pairs, see [`slow_training.trainer_maker`]."""
    from slow_training import trainer_maker

    return trainer_maker(tmp_path, make_target)
