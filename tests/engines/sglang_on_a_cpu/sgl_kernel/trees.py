"""Trees of draft tokens: their layout for the target, and their verification at T = 0.

A row's node 0 is the last committed token, nodes 1 to n - 1 are the draft's. A tree is given by each node's first
child (`next_token`) and next sibling, -1 where there is none.
"""

QLEN_ONLY = 1  # of SGLang's mask modes, the one it asks for on a CPU: [B, n, n], the context left out


def link_children(parents, first_children, next_siblings) -> None:
    """Write first children and next siblings `[n]` of a tree whose node i + 1 follows node `parents[i]`."""
    for node in range(len(parents), 0, -1):
        parent = parents[node - 1]
        next_siblings[node] = first_children[parent]
        first_children[parent] = node


def build_tree_kernel_efficient_cpu(
    parent_list,
    selected_index,
    verified_seq_len,
    tree_mask,
    positions,
    retrieve_index,
    retrieve_next_token,
    retrieve_next_sibling,
    topk,
    depth,
    draft_token_num,
    tree_mask_mode,
):
    """Mask, positions and links of each row's tree.

    `selected_index` `[B, n - 1]` numbers the chosen candidates: `topk` of the context, then `topk` of each expanded
    node. `parent_list[:, e]` is the candidate that the e-th expanded node is.
    """
    if int(tree_mask_mode) != QLEN_ONLY:
        raise NotImplementedError(f"sgl_kernel stand-in: tree mask mode {tree_mask_mode} not supported")
    for row, (selected, length) in enumerate(zip(selected_index.tolist(), verified_seq_len.tolist(), strict=True)):
        expanded = [candidate // topk for candidate in selected]
        parents = [0 if e == 0 else selected.index(int(parent_list[row, e])) + 1 for e in expanded]
        link_children(parents, retrieve_next_token[row], retrieve_next_sibling[row])
        first = row * draft_token_num
        mask = tree_mask[first * draft_token_num : (first + draft_token_num) * draft_token_num]
        mask = mask.view(draft_token_num, draft_token_num)
        mask.fill_(0)
        mask[0, 0], positions[first], retrieve_index[row, 0] = 1, length, first
        for node, parent in enumerate(parents, start=1):
            mask[node] = mask[parent]
            mask[node, node] = 1
            positions[first + node] = positions[first + parent] + 1
            retrieve_index[row, node] = first + node


def verify_tree_greedy_cpu(
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    target_predict,
):
    """Walk down each row's tree as long as a child is the target's choice.

    `accept_index` `[B, depth + 1]` gets the nodes walked, node 0 first, `accept_token_num` how many were draft tokens,
    and `predicts` the target's choice after each of them.
    """
    flat_choices = target_predict.flatten()
    for row in range(len(candidates)):
        node, accepted = 0, 0
        place = int(retrive_index[row, 0])
        accept_index[row, 0] = place
        while accepted + 1 < accept_index.shape[1]:
            choice = int(flat_choices[place])
            node = int(retrive_next_token[row, node])
            while node != -1 and int(candidates[row, node]) != choice:
                node = int(retrive_next_sibling[row, node])
            if node == -1:
                break
            predicts[place] = choice
            place = int(retrive_index[row, node])
            accepted += 1
            accept_index[row, accepted] = place
        accept_token_num[row] = accepted
        predicts[place] = flat_choices[place]


def fill_bonus_tokens_cpu(accept_tokens, accept_lens, bonus_tokens, accept_stride):
    """Each row's last accepted token; rows of `accept_tokens` are `accept_stride` wide."""
    for row, length in enumerate(accept_lens.tolist()):
        bonus_tokens[row] = accept_tokens.flatten()[row * accept_stride + length - 1]


def rotate_input_ids_cpu(input_ids, extend_start_loc, extend_seq_lens, topk_index, select_index):
    """Shift each request's tokens left by one and put its new token after them, or at `select_index`."""
    for row, (start, length) in enumerate(zip(extend_start_loc.tolist(), extend_seq_lens.tolist(), strict=True)):
        if length:
            end = start + length
            input_ids[start : end - 1] = input_ids[start + 1 : end].clone()
            input_ids[end - 1 if select_index is None else int(select_index[row])] = topk_index.flatten()[row]
