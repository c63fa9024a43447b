"""The target's embeddings and head as matrices, and where its inputs go, however its weights are stored.

Weights may be quantised (packed, or no tensor at all) or kept off the device by accelerate. Only a plain float matrix
is read as it lies; any other is asked of the module's own forward, which unpacks and loads it.
"""

import itertools
import logging
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROWS_AT_ONCE = 256


def target_width(target: Any) -> int:
    """Width of the target's logits, V, which may be padded beyond its tokenizer."""
    head = target.get_output_embeddings()
    if head is not None and getattr(head, "out_features", None):
        return head.out_features
    return target.config.get_text_config().vocab_size


def embedding_matrix(target: Any) -> torch.Tensor | None:
    """The token embeddings `[V, H]` in floats; `None`, with a warning, where they cannot be had.

    Raises `ValueError` where they were never loaded.
    """
    module = target.get_input_embeddings()
    if (plain := _plain_matrix(module)) is not None:
        return plain
    rows = getattr(module, "num_embeddings", None) or target.config.get_text_config().vocab_size
    ids = torch.arange(rows, device=input_device(module))
    matrix = _asked(module, "token embeddings", ids.split(ROWS_AT_ONCE))
    scale = getattr(module, "embed_scale", None)  # of families whose forward multiplies by it
    return matrix if matrix is None or scale is None else matrix / torch.as_tensor(scale).to(matrix)


def head_matrix(target: Any) -> torch.Tensor | None:
    """The head's weights `[V, H]` in floats, without its bias; `None`, with a warning, where they cannot be had.

    Raises `ValueError` where they were never loaded.
    """
    module = target.get_output_embeddings()
    if module is None:
        return None
    if (plain := _plain_matrix(module)) is not None:
        return plain
    hidden = getattr(module, "in_features", None) or target.config.get_text_config().hidden_size
    inputs = torch.cat([torch.eye(hidden), torch.zeros(1, hidden)])  # the last gives the bias
    inputs = inputs.to(device=input_device(module), dtype=target.dtype)
    outputs = _asked(module, "output head", inputs.split(ROWS_AT_ONCE))
    return None if outputs is None else (outputs[:-1] - outputs[-1:]).T


def _plain_matrix(module: Any) -> torch.Tensor | None:
    """The module's `weight` if it is a loaded float matrix; kinds of tensors that only look like one are not."""
    weight: Any = getattr(module, "weight", None)
    if type(weight) not in (torch.Tensor, nn.Parameter) or weight.is_meta:
        return None
    return weight.detach() if weight.ndim == 2 and weight.dtype in PLAIN_DTYPES else None


@torch.no_grad()
def _asked(module: nn.Module, what: str, parts: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    """The module's outputs for `parts` `[N, ...]`, together."""
    if not hasattr(module, "_hf_hook") and any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(f"target: the weights of its {what} are on the meta device, without numbers. Load it whole.")
    try:
        return torch.cat([module(part) for part in parts])
    except Exception as error:  # whatever the library that stores the weights raises
        logger.warning(
            "target: the weights of its %s (%s) could not be read (%s). The drafter's own begin at random.",
            what,
            type(module).__name__,
            error,
        )
        return None


def input_device(module: nn.Module) -> torch.device:
    """Where inputs go: the device of the first weight that is loaded, a CPU where there is none (accelerate moves
    inputs from there). A model's own `device` is `meta` where its first weight is kept on a disk."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))
