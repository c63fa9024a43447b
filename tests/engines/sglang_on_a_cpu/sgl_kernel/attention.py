"""Attention over a paged KV cache, registered as `torch.ops.sgl_kernel.{decode,extend}_attention_cpu`.

`req_to_token[r, i]` is the slot of request r's i-th token in `k_buffer` and `v_buffer` `[slots, KV heads, head size]`.
"""

import torch

_LIBRARY = torch.library.Library("sgl_kernel", "DEF")


def _refuse(**given) -> None:
    """Raise `NotImplementedError` for what no test serves, rather than compute something else."""
    if unknown := [name for name, value in given.items() if value]:
        raise NotImplementedError(f"sgl_kernel stand-in: {', '.join(unknown)} not supported")


def _attend(q, k_buffer, v_buffer, slots, seen, scaling):
    """q `[n, heads, D]` over the tokens in `slots` `[m]`, of which each query sees those in bool `seen` `[n, m]`."""
    groups = q.shape[1] // k_buffer.shape[1]
    k = k_buffer[slots].to(q.dtype).repeat_interleave(groups, dim=1)  # [m, heads, D]
    v = v_buffer[slots].to(q.dtype).repeat_interleave(groups, dim=1)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling)
    return attended[0].transpose(0, 1)


def decode_attention(
    q,
    k_buffer,
    v_buffer,
    k_scale,
    v_scale,
    output,
    key,
    value,
    loc,
    attn_logits,
    req_to_token,
    req_pool_indices,
    seq_lens,
    scaling,
    logit_cap,
    is_cross_attention,
    sliding_window,
    encoder_lens,
    sinks,
):
    """One query `[B, heads, D]` for each row, over its `seq_lens` tokens; writes `key` and `value` to `loc` first."""
    _refuse(logit_cap=logit_cap, is_cross_attention=is_cross_attention, sinks=sinks is not None)
    _refuse(sliding_window=sliding_window > 0, scales=(k_scale, v_scale) != (1.0, 1.0))
    if key is not None:
        k_buffer[loc] = key.view(-1, *k_buffer.shape[1:]).to(k_buffer.dtype)
        v_buffer[loc] = value.view(-1, *v_buffer.shape[1:]).to(v_buffer.dtype)
    for row, (request, length) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
        slots = req_to_token[request, :length].long()
        seen = torch.ones(1, length, dtype=torch.bool)
        output[row : row + 1] = _attend(q[row : row + 1], k_buffer, v_buffer, slots, seen, scaling)


def extend_attention(
    q_extend,
    k_extend,
    v_extend,
    o_extend,
    k_buffer,
    v_buffer,
    k_scale,
    v_scale,
    req_to_token,
    req_pool_indices,
    seq_lens,
    extend_seq_lens,
    extend_start_loc,
    max_len_extend,
    scaling,
    logit_cap,
    is_cross_attention,
    sliding_window,
    encoder_lens,
    sinks,
    custom_mask,
    is_causal,
):
    """The last `extend_seq_lens` of each request's `seq_lens` tokens, over all before and, among themselves, causally.

    With `custom_mask`, bool of `[B, n, n]` flattened, each of a row's n tokens sees those of them that it says. Keys
    and values of the new tokens lie in the buffers already.
    """
    _refuse(logit_cap=logit_cap, is_cross_attention=is_cross_attention, sinks=sinks is not None)
    _refuse(sliding_window=sliding_window > 0, scales=(k_scale, v_scale) != (1.0, 1.0), bidirectional=not is_causal)
    columns = (req_pool_indices, seq_lens, extend_seq_lens, extend_start_loc)
    mask_start = 0
    for request, length, new, start in zip(*(column.tolist() for column in columns), strict=True):
        seen = torch.ones(new, length, dtype=torch.bool)
        seen[:, length - new :] = torch.ones(new, new, dtype=torch.bool).tril()
        if custom_mask is not None:
            seen[:, length - new :] = custom_mask[mask_start : mask_start + new * new].view(new, new)
            mask_start += new * new
        slots = req_to_token[request, :length].long()
        queries = q_extend[start : start + new]
        o_extend[start : start + new] = _attend(queries, k_buffer, v_buffer, slots, seen, scaling)


_LIBRARY.define(
    "decode_attention_cpu(Tensor q, Tensor(a!) k_buffer, Tensor(b!) v_buffer, float k_scale, float v_scale, "
    "Tensor(c!) output, Tensor? key, Tensor? value, Tensor loc, Tensor attn_logits, Tensor req_to_token, "
    "Tensor req_pool_indices, Tensor seq_lens, float scaling, float logit_cap, bool is_cross_attention, "
    "int sliding_window, Tensor? encoder_lens, Tensor? sinks) -> ()"
)
_LIBRARY.define(
    "extend_attention_cpu(Tensor q_extend, Tensor? k_extend, Tensor? v_extend, Tensor(a!) o_extend, Tensor k_buffer, "
    "Tensor v_buffer, float k_scale, float v_scale, Tensor req_to_token, Tensor req_pool_indices, Tensor seq_lens, "
    "Tensor extend_seq_lens, Tensor extend_start_loc, int max_len_extend, float scaling, float logit_cap, "
    "bool is_cross_attention, int sliding_window, Tensor? encoder_lens, Tensor? sinks, Tensor? custom_mask, "
    "bool is_causal) -> ()"
)
_LIBRARY.impl("decode_attention_cpu", decode_attention, "CPU")
_LIBRARY.impl("extend_attention_cpu", extend_attention, "CPU")
