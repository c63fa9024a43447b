"""vLLM's hidden-states connector where there is no CUDA: its own copies states by CUDA streams.

Loaded by vLLM inside its own environment, so it imports vLLM, torch and safetensors only.
"""

import os

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    extract_from_kv_cache,
)


class Written:
    """In place of a CUDA event: the file is there."""

    def query(self):
        return True


class CPUHiddenStatesConnector(ExampleHiddenStatesConnector):
    """Writes a request's states once it has finished."""

    def _submit_async_write(self, pending):
        places = torch.arange(self._block_size)
        slots = (torch.tensor(pending.block_ids)[:, None] * self._block_size + places).flatten()
        states = extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids)).contiguous()
        save_file({"hidden_states": states, "token_ids": pending.token_ids.clone()}, pending.filename)
        self._req_copy_events[pending.req_id] = Written()
        lock = self._lock_fds.pop(pending.req_id, None)
        if lock is not None:
            os.close(lock)
