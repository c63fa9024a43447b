"""Stands in for SGLang's compiled CPU library of this name, which no registry has: the same functions in plain torch.

Only what SGLang 0.5.23 calls to serve Llama and Qwen3 models with chains and trees of draft tokens, written from its
call sites, names of arguments included. Correct and slow; tested in sgl_kernel_checks.py. `convert_weight_packed` is
missing on purpose: SGLang asks for it to find out whether the library computes its layers too, and uses its own torch
code where it does not.
"""

from . import attention as _attention  # noqa: F401  (registers torch.ops.sgl_kernel)
from .cache import (
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
    build_draft_decode_metadata_cpu,
    copy_all_layer_kv_cache_cpu,
    fill_accept_out_cache_loc_cpu,
)
from .trees import (
    build_tree_kernel_efficient_cpu,
    fill_bonus_tokens_cpu,
    rotate_input_ids_cpu,
    verify_tree_greedy_cpu,
)

__all__ = [
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_draft_decode_metadata_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
]
