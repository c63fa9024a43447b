"""A target's hidden states by vLLM, in an environment of its own, for `ppow record --engine vllm`.

Knows vLLM's process and its files of states; knows no folder of records.
"""

import os
import tempfile
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from ..runtime.compatibility import num_layers
from .vllm_process import VLLMProcess


class VLLMStates(VLLMProcess):
    """Reads token sequences with vLLM; a context manager.

    Args:
        target (`PreTrainedModel`): the target, which gives its final norm and its number format.
        model (`str`): its folder or name.
        layer_ids (`list[int]`): layers whose states are read beside the last ones, counted as in transformers.
        max_length (`int`): tokens of the longest sequence.
        python (`str`, *optional*): interpreter of vLLM's environment, see [`vllm_python`].
    """

    def __init__(
        self, target: PreTrainedModel, model: str, layer_ids: list[int], max_length: int, python: str | None = None
    ):
        self._norm = final_norm(target)
        self._num_layers = num_layers(target.config.get_text_config())
        self.layer_ids = layer_ids
        self._folder = tempfile.TemporaryDirectory(prefix="ppow-states-")
        engine = {
            "model": model,
            "dtype": str(target.dtype).removeprefix("torch."),
            "max_model_len": max_length + 2,  # a token is written after each sequence, and one drafted
            "disable_log_stats": True,
            "layer_ids": sorted({*layer_ids, self._num_layers}),
            "folder": self._folder.name,
        }
        super().__init__("vllm_states_job.py", engine, python)

    def __enter__(self) -> "VLLMStates":
        self._start()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._folder.cleanup()

    @torch.no_grad()
    def __call__(self, texts: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        """The states `[S, h]` of the chosen layers and the last ones, of each sequence `[S]`."""
        found = []
        for path, text in zip(self._ask([text.tolist() for text in texts]), texts, strict=True):
            read = load_file(path)["hidden_states"][: len(text)].unbind(1)
            os.unlink(path)
            states = dict(zip(self._engine["layer_ids"], read, strict=True))
            states[self._num_layers] = self._norm(states[self._num_layers])
            found.append([states[layer] for layer in (*self.layer_ids, self._num_layers)])
        return found


@torch.no_grad()
def final_norm(target: PreTrainedModel) -> nn.Module:
    """The module of the target whose output its head reads.

    Raises `ValueError` where there is none.
    """
    outputs: list[tuple[nn.Module, Any]] = []
    hooks = [
        module.register_forward_hook(lambda module, _, output: outputs.append((module, output)))
        for module in target.modules()
    ]
    try:
        ids = torch.tensor([[0, 1, 2]], device=target.device)
        last = target(ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
    finally:
        for hook in hooks:
            hook.remove()
    for module, output in outputs:
        if isinstance(output, torch.Tensor) and output.shape == last.shape and torch.equal(output, last):
            return module
    raise ValueError(f"--engine: {type(target).__name__} has no final norm that vLLM's states could be put through.")
