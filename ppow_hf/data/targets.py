"""A target as it writes and as it is recognised: its plain distribution, batches of completions, its identity.

Knows of the target only its `generate`, its configuration and its parameters; knows nothing about drafters.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..runtime.target_weights import input_device

ELEMENTS_PER_PARAMETER = 32  # sampled to recognise a target by its weights


# -- how it writes


@contextmanager
def without_router_logits(target: PreTrainedModel) -> Iterator[None]:
    """A mixture of experts without `output_router_logits` until the end: its loss is not for windows after a cache."""
    configs = [target.config, target.config.get_text_config()]
    asked = [config for config in configs if getattr(config, "output_router_logits", False)]
    try:
        for config in asked:
            config.output_router_logits = False
        yield
    finally:
        for config in asked:
            config.output_router_logits = True


@contextmanager
def plain_distribution(target: PreTrainedModel) -> Iterator[None]:
    """The target in eval mode and without its own generation settings (top-k, penalties, `use_cache`), until the end.

    Of its `generation_config` only the eos, pad and bos tokens remain. `generate` fills in from there whatever a call
    leaves open, so that a configuration passed to it would not do.
    """
    modes = [(module, module.training) for module in target.modules()]
    inside_peft = [target.get_base_model()] if hasattr(target, "get_base_model") else []  # which hands its own down
    own = [(model, model.generation_config) for model in (target, *inside_peft)]
    tokens = {f"{name}_token_id": getattr(own[0][1], f"{name}_token_id", None) for name in ("eos", "pad", "bos")}
    try:
        target.eval()
        target.generation_config = GenerationConfig(**tokens)
        with without_router_logits(target):
            yield
    finally:
        for model, generation_config in own:
            model.generation_config = generation_config
        for module, training in modes:
            module.training = training


def complete_batch(
    target: PreTrainedModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stop_token_ids: list[int],
    pad_token_id: int,
) -> list[list[int]]:
    """New token ids of each prompt, through the first of `stop_token_ids`; the global random state is left as it was.

    To be called within [`plain_distribution`].
    """
    input_ids, attention_mask = left_padded(prompts, pad_token_id)
    generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_token_ids or None,
        pad_token_id=pad_token_id,
        use_cache=True,
        **sampling_options(temperature),
    )
    with random_state_kept():
        torch.manual_seed(seed)
        written = target.generate(
            input_ids.to(input_device(target)),
            attention_mask=attention_mask.to(input_device(target)),
            generation_config=generation_config,
        )
    return [until_end(ids, stop_token_ids) for ids in written[:, input_ids.shape[1] :].tolist()]


def sampling_options(temperature: float) -> dict[str, Any]:
    """Options of `generate` that take the likeliest token at T = 0, and above it draw from the whole distribution."""
    if temperature > 0:
        return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    return {"do_sample": False}


def random_state_kept() -> AbstractContextManager[None]:
    """Until its end random numbers may be drawn and seeded; then the process's are as they were, on all devices."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


def left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as one batch `[B, longest]`, and its attention mask."""
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1
    return input_ids, attention_mask


def until_end(tokens: list[int], end_ids: Collection[int]) -> list[int]:
    """`tokens` up to and with the first that ends a text: what is after it in a batch is padding."""
    ends = [place for place, token in enumerate(tokens, start=1) if token in end_ids]
    return tokens[: ends[0]] if ends else tokens


def eos_of(target: Any) -> frozenset[int]:
    """The tokens that end a text of this target's `generate`."""
    eos = target.generation_config.eos_token_id
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def end_token_ids(generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end-of-sequence tokens of the target's `generation_config` (may be `None`) and of its tokenizer."""
    configured = generation_config.eos_token_id if generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in (*ids, tokenizer.eos_token_id) if token is not None})


def padding_token_id(tokenizer: PreTrainedTokenizerBase, eos_token_ids: list[int]) -> int:
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return eos_token_ids[0] if eos_token_ids else 0  # any token: the attention mask hides it


# -- what it is


def is_split(target: PreTrainedModel) -> bool:
    """Whether a forward of the target needs every process: tensor parallel, FSDP or ZeRO-3."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    return any(isinstance(module, FullyShardedDataParallel) for module in target.modules()) or any(
        isinstance(parameter.data, DTensor) or hasattr(parameter, "ds_id") for parameter in target.parameters()
    )


def target_identity(target: PreTrainedModel) -> str:
    """Hash of the target's configuration and of a few elements of every parameter, whatever device it is on."""
    config = json.loads(target.config.to_json_string())
    # Another release, folder or number of processes is not another target.
    for name in ("transformers_version", "_name_or_path", "distributed_config"):
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, parameter in target.named_parameters():
        digest.update(f"{name}:{tuple(parameter.shape)}:{parameter.dtype}".encode())
        if not parameter.is_meta and parameter.numel():
            flat = whole_tensor(parameter.detach()).reshape(-1)
            sample = flat[:: max(1, len(flat) // ELEMENTS_PER_PARAMETER)].contiguous().cpu()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is split over processes, gathered by all of them; any other as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
