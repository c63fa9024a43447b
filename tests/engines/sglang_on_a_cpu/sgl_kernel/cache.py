"""Where tokens lie in the KV cache: tables of slots, read, written and copied.

`req_to_token[r, i]` is the slot of request r's i-th token. Functions write into the argument that SGLang made for it.
"""

import ctypes

import torch


def _rows(*columns):
    return zip(*(column.tolist() for column in columns), strict=True)


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len):
    """Write each request's slots, one request after the other in `out_cache_loc`, to its places start to end."""
    taken = 0
    for request, start, end in _rows(req_pool_indices, start_offset, end_offset):
        req_to_token[request, start:end] = out_cache_loc[taken : taken + end - start].to(req_to_token.dtype)
        taken += end - start


def assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len):
    """The reverse: read the slots of each request's places start to end into `out_cache_loc`."""
    filled = 0
    for request, start, end in _rows(req_pool_indices, start_offset, end_offset):
        out_cache_loc[filled : filled + end - start] = req_to_token[request, start:end].to(out_cache_loc.dtype)
        filled += end - start


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices, req_to_token, seq_lens, out_cache_loc, pool_len, topk, num_steps
):
    """The slots of the `topk * num_steps` draft tokens after each request's context."""
    ends = seq_lens + topk * num_steps
    assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, seq_lens, ends, out_cache_loc, pool_len)


def build_draft_decode_metadata_cpu(req_to_token, req_pool_indices, seq_lens, topk, num_steps, pool_len):
    """A row for each branch of each request, `[B * topk, pool_len]`: the context's slots, then the branch's own."""
    table = req_to_token.new_zeros(len(seq_lens) * topk, pool_len)
    for row, (request, length) in enumerate(_rows(req_pool_indices, seq_lens)):
        for branch in range(topk):
            own = length + branch * num_steps
            table[row * topk + branch, :length] = req_to_token[request, :length]
            table[row * topk + branch, length : length + num_steps] = req_to_token[request, own : own + num_steps]
    return table


def copy_all_layer_kv_cache_cpu(data_ptrs, strides, tgt_loc, src_loc):
    """Copy slots within every buffer, given by its address and the bytes of one slot."""
    if not len(tgt_loc):
        return
    slots = int(torch.cat([tgt_loc, src_loc]).max()) + 1
    for address, slot_bytes in _rows(data_ptrs, strides):
        memory = (ctypes.c_uint8 * (slots * slot_bytes)).from_address(address)
        buffer = torch.frombuffer(memory, dtype=torch.uint8).view(slots, slot_bytes)
        buffer[tgt_loc] = buffer[src_loc].clone()


def fill_accept_out_cache_loc_cpu(accept_index, out_cache_loc, accept_out_cache_loc):
    """The slots of the accepted tokens (those that are not -1), without gaps."""
    kept = accept_index.flatten()
    kept = kept[kept > -1].long()
    accept_out_cache_loc[: len(kept)] = out_cache_loc[kept]
