"""Checks the stand-in for `sgl_kernel` in SGLang's environment: `TRITON_INTERPRET=1 sgl_kernel_checks.py OUT`.

What SGLang also has as a Triton kernel must write the same numbers as that kernel, which Triton interprets; attention
is checked against a slow reference. Writes `{name of the check: traceback or ""}`.
"""

import json
import math
import sys
import traceback
from functools import partial
from pathlib import Path

import sgl_kernel
import torch
from sgl_kernel.trees import verify_tree_greedy_cpu
from sglang.kernels.ops.kvcache.cache_move import copy_all_layer_kv_cache_tiled
from sglang.kernels.ops.speculative.cache_locs import (
    assign_draft_cache_locs_contiguous,
    assign_extend_cache_locs,
    generate_draft_decode_kv_indices,
)
from sglang.kernels.ops.speculative.eagle import fill_accept_out_cache_loc, fill_bonus_tokens
from sglang.kernels.ops.speculative.multi_layer_eagle import rotate_input_ids_kernel
from sglang.kernels.ops.speculative.spec_tree import (
    TreeMaskMode,
    sgl_build_tree_kernel_triton,
    verify_tree_greedy_triton,
)
from sglang.srt.mem_cache.allocation import assign_req_to_token_pool
from sglang.srt.speculative.eagle_utils import organize_draft_results
from sglang.srt.speculative.spec_utils import select_top_k_tokens

BATCH, POOL, TOPK, STEPS, NODES, VOCABULARY = 3, 64, 3, 4, 10, 50
REQUESTS = torch.tensor([4, 0, 2])
LENGTHS = torch.tensor([7, 1, 30])


def slot_table():
    """req_to_token of five requests, every slot once."""
    return torch.randperm(5 * POOL).view(5, POOL).int()


def assert_same_writes(ours, theirs, made, before=(), after=(), launch=None):
    """Both functions write the same numbers into copies of what SGLang makes for them, `made`.

    `before` and `after` are the arguments around these; `launch` those of the kernel in place of `after`.
    """
    own, their = ([tensor.clone() for tensor in made] for _ in range(2))
    ours(*before, *own, *after)
    theirs(*before, *their, *(after if launch is None else launch))
    for number, (one, other) in enumerate(zip(own, their, strict=True)):
        assert torch.equal(one, other), f"output {number}: {one.tolist()} instead of {other.tolist()}"
    assert any(not torch.equal(one, unwritten) for one, unwritten in zip(own, made, strict=True))
    return own


def random_tree():
    """A tree by SGLang's own selection from random distributions: parent list, chosen candidates, draft tokens."""
    scores, hidden = None, torch.zeros(BATCH, 1)
    picked = []
    for step in range(STEPS):
        rows = BATCH if step == 0 else BATCH * TOPK
        probabilities, tokens = (3 * torch.randn(rows, VOCABULARY)).softmax(-1).topk(TOPK)
        _, hidden, scores, found = select_top_k_tokens(step, probabilities, tokens, hidden, scores, TOPK)
        picked.append(found)
    return organize_draft_results(*(list(part) for part in zip(*picked, strict=True)), NODES)


def empty_tree():
    mask = torch.ones(BATCH * NODES * NODES, dtype=torch.bool)
    return [mask, torch.zeros(BATCH * NODES, dtype=torch.long), *torch.full((3, BATCH, NODES), -1)]


def build_tree():
    """A tree's draft tokens, and mask, positions and links as both write them."""
    parents, chosen, drafted = random_tree()
    made = [
        torch.ones(BATCH * NODES * NODES, dtype=torch.bool),
        torch.zeros(BATCH * NODES, dtype=torch.long),
        *torch.full((3, BATCH, NODES), -1),
    ]
    before, after = (parents, chosen, LENGTHS), (TOPK, STEPS, NODES, TreeMaskMode.QLEN_ONLY)
    ours, theirs = sgl_kernel.build_tree_kernel_efficient_cpu, sgl_build_tree_kernel_triton
    return drafted, assert_same_writes(ours, theirs, made, before, after)


def check_build_tree():
    for _ in range(5):
        build_tree()


def choices_along(candidates, children, siblings):
    """Target's choices `[B, n]` that are often one of a node's children, so that paths of all lengths are accepted."""
    choices = torch.randint(VOCABULARY, candidates.shape)
    for row in range(BATCH):
        for node in range(NODES):
            child = int(children[row, node])
            while child != -1 and siblings[row, child] != -1 and torch.rand(()) < 0.3:
                child = int(siblings[row, child])
            if child != -1 and torch.rand(()) < 0.8:
                choices[row, node] = candidates[row, child]
    return choices


def check_verify_tree_greedy():
    lengths = set()
    for _ in range(20):
        drafted, (_, _, index, children, siblings) = build_tree()
        candidates = torch.cat([torch.zeros(BATCH, 1, dtype=torch.long), drafted], dim=1)
        arguments = (candidates, index, children, siblings, choices_along(candidates, children, siblings))
        made = [
            torch.zeros(BATCH * NODES, dtype=torch.int32),
            torch.full((BATCH, STEPS + 1), -1, dtype=torch.int32),
            torch.zeros(BATCH, dtype=torch.int32),
        ]
        written = assert_same_writes(verify_tree_greedy_cpu, verify_tree_greedy_triton, made, after=arguments)
        lengths |= set(written[2].tolist())
    assert lengths == set(range(STEPS + 1)), lengths


def check_fill_bonus_tokens():
    tokens = torch.randint(1, VOCABULARY, (BATCH * (STEPS + 1),), dtype=torch.int32)
    before = (tokens, torch.tensor([1, STEPS + 1, 2], dtype=torch.int32))
    made = [torch.zeros(BATCH, dtype=torch.int32)]
    ours, theirs = sgl_kernel.fill_bonus_tokens_cpu, fill_bonus_tokens[(BATCH,)]
    assert_same_writes(ours, theirs, made, before, after=(STEPS + 1,))


def check_fill_accept_out_cache_loc():
    kept = torch.tensor([[0, 2, -1], [3, -1, -1], [6, 7, 8]], dtype=torch.int32)
    made, before = [torch.zeros(kept.numel(), dtype=torch.long)], (kept, torch.randint(1, 99, (9,)))
    ours, theirs = sgl_kernel.fill_accept_out_cache_loc_cpu, fill_accept_out_cache_loc[(kept.numel(),)]
    assert_same_writes(ours, theirs, made, before, launch=(16,))


def check_rotate_input_ids():
    made = [torch.randint(10, VOCABULARY, (9,))]
    for chosen in (None, torch.tensor([2, 5, 7])):
        after = (torch.tensor([0, 5, 6]), torch.tensor([5, 1, 3]), torch.arange(3), chosen)
        ours, theirs = sgl_kernel.rotate_input_ids_cpu, rotate_input_ids_kernel[(BATCH,)]
        assert_same_writes(ours, theirs, made, after=after, launch=(*after, 8))


def check_assign_req_to_token_pool():
    ends = LENGTHS + torch.tensor([3, 33, 1])
    after = (LENGTHS, ends, torch.randint(1, 999, (int((ends - LENGTHS).sum()),)), POOL)
    ours, theirs = sgl_kernel.assign_req_to_token_pool_cpu, assign_req_to_token_pool[(BATCH,)]
    assert_same_writes(ours, theirs, [slot_table()], (REQUESTS,), after, launch=(*after, 4))


def check_assign_extend_cache_locs():
    ends = LENGTHS + torch.tensor([3, 33, 1])
    made = [torch.zeros(int((ends - LENGTHS).sum()), dtype=torch.long)]
    before, after = (REQUESTS, slot_table(), LENGTHS, ends), (POOL,)
    ours, theirs = sgl_kernel.assign_extend_cache_locs_cpu, assign_extend_cache_locs[(BATCH,)]
    assert_same_writes(ours, theirs, made, before, after, launch=(POOL, 4))


def check_assign_draft_cache_locs_contiguous():
    made = [torch.zeros(BATCH * TOPK * STEPS, dtype=torch.long)]
    before, after = (REQUESTS, slot_table(), LENGTHS), (POOL, TOPK, STEPS)
    ours = sgl_kernel.assign_draft_cache_locs_contiguous_cpu
    assert_same_writes(ours, assign_draft_cache_locs_contiguous[(BATCH,)], made, before, after)


def check_build_draft_decode_metadata():
    """A branch's row begins with the slots that SGLang's kernel lists for it at each step."""
    table = slot_table()
    rows = sgl_kernel.build_draft_decode_metadata_cpu(table, REQUESTS, LENGTHS, TOPK, STEPS, POOL)
    indices = torch.zeros(STEPS, 512, dtype=torch.int32)
    starts = torch.zeros(STEPS, BATCH * TOPK + 1, dtype=torch.int32)
    positions = LENGTHS.repeat_interleave(TOPK)
    strides = (POOL, indices.stride(0), starts.stride(0))
    generate_draft_decode_kv_indices[(STEPS, BATCH, TOPK)](
        REQUESTS, table, LENGTHS, indices, starts, positions, *strides, 4, 4, 16, 1
    )
    for step in range(STEPS):
        listed = [indices[step, a:b].tolist() for a, b in zip(starts[step], starts[step, 1:], strict=False)]
        own = [row[: length + step + 1].tolist() for row, length in zip(rows, positions.tolist(), strict=True)]
        assert own == listed, step


def copy_with_triton(*buffers, targets, sources):
    strides = torch.tensor([buffer[0].nbytes for buffer in buffers])
    grid = (len(buffers), 1)
    copy_all_layer_kv_cache_tiled[grid](
        addresses(buffers), strides, targets, sources, len(targets), 4, BYTES_PER_TILE=128
    )


def copy_with_standin(*buffers, targets, sources):
    strides = torch.tensor([buffer[0].nbytes for buffer in buffers])
    sgl_kernel.copy_all_layer_kv_cache_cpu(addresses(buffers), strides, targets, sources)


def addresses(buffers):
    return torch.tensor([buffer.data_ptr() for buffer in buffers], dtype=torch.uint64)


def check_copy_all_layer_kv_cache():
    made = [torch.rand(20, 2, 4), torch.rand(20, 2, 4), torch.rand(20, 2).bfloat16()]
    slots = {"targets": torch.tensor([3, 4, 5, 0]), "sources": torch.tensor([4, 9, 19, 0])}  # 4 is read and written
    assert_same_writes(partial(copy_with_standin, **slots), partial(copy_with_triton, **slots), made)


def slow_attention(query, keys, values, scaling):
    """One head: query `[D]`, keys and values `[m, D]`."""
    weights = [math.exp(float(query @ key) * scaling) for key in keys]
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


def attention_inputs(queries):
    """Four query heads over two of the cache: queries, keys and values of all slots."""
    return torch.randn(queries, 4, 8), torch.randn(5 * POOL, 2, 8), torch.randn(5 * POOL, 2, 8)


def check_decode_attention():
    table, (q, k_buffer, v_buffer) = slot_table(), attention_inputs(BATCH)
    new_keys, new_values, output = torch.randn(BATCH, 2, 8), torch.randn(BATCH, 2, 8), torch.zeros(BATCH, 4, 8)
    places = torch.stack([table[r, n - 1] for r, n in zip(REQUESTS, LENGTHS, strict=True)]).long()
    torch.ops.sgl_kernel.decode_attention_cpu(
        *(q, k_buffer, v_buffer, 1.0, 1.0, output, new_keys, new_values, places, torch.zeros(0)),
        *(table, REQUESTS, LENGTHS, 0.3, 0.0, False, 0, None, None),
    )
    assert torch.equal(k_buffer[places], new_keys) and torch.equal(v_buffer[places], new_values)
    for row, (request, length) in enumerate(zip(REQUESTS, LENGTHS, strict=True)):
        slots = table[request, :length].long()
        for head in range(4):
            expected = slow_attention(q[row, head], k_buffer[slots, head // 2], v_buffer[slots, head // 2], 0.3)
            torch.testing.assert_close(output[row, head], expected)


def check_extend_attention():
    """Causal, and with each row's tree: its tokens see the context and what the mask says."""
    new, lengths = torch.tensor([4, 4, 4]), LENGTHS + 4
    table, (q, k_buffer, v_buffer) = slot_table(), attention_inputs(12)
    tree = (torch.rand(BATCH, 4, 4) < 0.5) | torch.eye(4, dtype=torch.bool)
    for mask in (None, tree):
        output = torch.zeros(12, 4, 8)
        torch.ops.sgl_kernel.extend_attention_cpu(
            *(q, None, None, output, k_buffer, v_buffer, 1.0, 1.0, table, REQUESTS, lengths, new, 4 * torch.arange(3)),
            *(4, 0.3, 0.0, False, 0, None, None, None if mask is None else mask.flatten(), True),
        )
        seen = torch.ones(BATCH, 4, 4).tril().bool() if mask is None else mask
        for row, (request, length) in enumerate(zip(REQUESTS, LENGTHS, strict=True)):
            for node in range(4):
                places = [*range(length), *(length + other for other in range(4) if seen[row, node, other])]
                slots = table[request, places].long()
                for head in range(4):
                    keys, values = k_buffer[slots, head // 2], v_buffer[slots, head // 2]
                    expected = slow_attention(q[4 * row + node, head], keys, values, 0.3)
                    torch.testing.assert_close(output[4 * row + node, head], expected)


def main(result_path):
    found = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            torch.manual_seed(0)
            try:
                check()
                found[name] = ""
            except Exception:
                found[name] = traceback.format_exc()
    Path(result_path).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
