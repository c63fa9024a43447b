"""Trees of draft tokens: text and distribution are the target's own, and the tree is what the search says it is."""

import functools
import itertools

import pytest
import torch
from acceptance_references import rejection_sample_tree
from test_batches import (
    ARCHITECTURES,
    COSTS,
    FAMILIES,
    alone,
    assert_rows,
    make_drafter,
    noisy_copy,
    ragged,
    sampled_rows_fit,
    together,
)
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3Config

from ppow_hf import PPOWDrafter
from ppow_hf.runtime import generation as loop
from ppow_hf.runtime import target_session as verifying
from ppow_hf.runtime import trees
from ppow_hf.runtime.acceptance import (
    rejection_sample_chain,
    rejection_sample_distinct_trees,
    residual_distribution,
    sample_from_uniform,
)
from ppow_hf.runtime.trees import CONTEXT, DraftTree, lay_out, least_reach

TREE = {"tree_nodes": 12, "tree_branches": 3, "max_window": 5, **COSTS}
SAMPLED_TREE = {"tree_nodes": 8, "tree_branches": 3, "max_window": 3, "cost_ratio": 0.02, "verification_cost": 0.01}
SAMPLED_TREE |= {"copies": 300, "calls": 3}
NOISY = functools.partial(noisy_copy, noise=1.0)


# -- text at T = 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("family", "window"),
    [
        *((family, "kl") for family in FAMILIES),
        ("llama", "fixed"),
        ("gpt2", "heuristic"),
        *(pytest.param(family, "fixed", marks=pytest.mark.slow) for family in FAMILIES if family != "llama"),
        *(pytest.param(family, "heuristic", marks=pytest.mark.slow) for family in FAMILIES if family != "gpt2"),
    ],
)
def test_each_row_is_what_its_prompt_gives_alone(make_target, family, architecture, window):
    target = make_target(family)
    drafter = make_drafter(target, architecture)
    for lengths in ([7], [8, 3, 14, 1]):
        prompts, ids, mask = ragged(lengths)
        assert_rows(together(target, drafter, ids, mask, window=window, **TREE), alone(target, prompts))
        for trace in drafter.last_traces:
            assert sum(r.accepted + 1 for r in trace.rounds) == 40
    rounds = [r for trace in drafter.last_traces for r in trace.rounds if r.window]
    assert all(len(r.parents) == len(r.draft_ids) == r.window <= 12 and r.depth <= 5 for r in rounds)
    if architecture == "standalone":
        assert any(sum(parent == CONTEXT for parent in r.parents) > 1 for r in rounds)
        assert sum(r.accepted for r in rounds) > 0


def test_branches_without_trees_are_refused(make_target):
    target = make_target("llama")
    drafter = make_drafter(target, "eagle")
    with pytest.raises(ValueError, match="^tree_branches: 2 given without tree_nodes"):
        target.generate(torch.tensor([[1, 2, 3]]), assistant_model=drafter.with_settings(tree_branches=2))
    with pytest.raises(ValueError, match="^tree_branches: 2 given without tree_nodes"):
        drafter.generate_with(tree_branches=2)(target, torch.tensor([[1, 2, 3]]))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_two_hundred_prompts_in_batches_with_and_without_trees(make_target, family, architecture):
    target = make_target(family)
    drafter = make_drafter(target, architecture)
    lengths = torch.randint(1, 40, (200,), generator=torch.Generator().manual_seed(3)).tolist()
    prompts, ids, mask = ragged(lengths)
    expected = alone(target, prompts, max_new_tokens=64)
    for settings in ({"max_window": 6, **COSTS}, TREE):
        for start in range(0, 200, 50):
            rows = slice(start, start + 50)
            given = together(target, drafter, ids[rows], mask[rows], max_new_tokens=64, **settings)
            assert_rows(given, expected[rows])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tree_needs_fewer_target_forwards_than_its_main_chain_alone(make_target, family):
    target = make_target(family)
    drafter = noisy_copy(target, 0.1)
    prompts, ids, mask = ragged([8, 3, 14, 1])
    rounds = []
    for branches in (1, 4):
        together(target, drafter, ids, mask, window="fixed", max_window=4, tree_nodes=40, tree_branches=branches)
        rounds.append(sum(len(trace.rounds) for trace in drafter.last_traces))
    together(target, drafter, ids, mask, window="fixed", max_window=4)
    chain = sum(len(trace.rounds) for trace in drafter.last_traces)
    assert rounds[0] == chain and rounds[1] < 0.9 * chain


def test_one_branch_is_the_chain(make_target):
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    prompts, ids, mask = ragged([6, 11])
    drafts = []
    for tree in ({"tree_nodes": 9, "tree_branches": 1}, {}):
        together(target, drafter, ids, mask, window="fixed", max_window=4, **tree)
        drafts.append([[r.draft_ids for r in trace.rounds] for trace in drafter.last_traces])
        assert all(r.parents in ([], list(range(-1, r.window - 1))) for t in drafter.last_traces for r in t.rounds)
    assert drafts[0] == drafts[1]


def test_costs_decide_the_shape(make_target):
    """Nodes that cost nothing to verify are many; where each costs much, the tree shrinks to a short chain."""
    target = make_target("gpt_neox")
    drafter = noisy_copy(target, 0.05)
    prompts, ids, mask = ragged([8])
    nodes, depths = [], []
    for verification_cost, cost_ratio in ((0.0, 0.02), (0.3, 0.02), (0.0, 1.0)):
        costs = {"verification_cost": verification_cost, "cost_ratio": cost_ratio}
        together(target, drafter, ids, mask, window="kl", max_window=6, tree_nodes=40, max_new_tokens=60, **costs)
        rounds = [r for r in drafter.last_trace.rounds if r.window]
        nodes.append(sum(r.window for r in rounds) / len(rounds))
        depths.append(sum(r.depth for r in rounds) / len(rounds))
    assert nodes[0] > 2 * nodes[1] and depths[0] > depths[2]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("config_class", [MistralConfig, Qwen3Config])
def test_trees_of_targets_with_sliding_windows(architecture, config_class):
    torch.manual_seed(0)
    mixed = {"use_sliding_window": True, "max_window_layers": 1} if config_class is Qwen3Config else {}
    config = config_class(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=9, initializer_range=0.5, pad_token_id=0, bos_token_id=None,
        eos_token_id=None, **mixed,
    )  # fmt: skip
    target = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    drafter = make_drafter(target, architecture)
    for lengths in ([12], [3, 15]):
        prompts, ids, mask = ragged(lengths)
        given = together(target, drafter, ids, mask, window="fixed", max_new_tokens=24, **TREE)
        assert_rows(given, alone(target, prompts, max_new_tokens=24))


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"eos_token_id": list(range(1, 12))},
        {"min_new_tokens": 12, "eos_token_id": list(range(1, 40))},
        {"temperature": 0.7, "do_sample": True, "top_k": 1},
        {"max_new_tokens": 2},
    ],
    ids=str,
)
def test_options_of_generate(make_target, options):
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    prompts, ids, mask = ragged([7, 2, 12])
    options = {"max_new_tokens": 24, "pad_token_id": 0} | options
    given = together(target, drafter, ids, mask, window="fixed", **TREE, **options)
    assert_rows(given, alone(target, prompts, **options))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compacting_caches_changes_nothing(make_target, architecture, monkeypatch):
    target = make_target("gpt_neox")
    drafter = make_drafter(target, architecture)
    prompts, ids, mask = ragged([5, 17, 2, 9])
    for module in (loop, verifying):
        monkeypatch.setattr(module, "COMPACT_AT", 0.0)
    given = together(target, drafter, ids, mask, window="fixed", max_new_tokens=60, **TREE)
    assert_rows(given, alone(target, prompts, max_new_tokens=60))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_assistant_model_takes_tree_settings(make_target, architecture):
    target = make_target("qwen3")
    view = make_drafter(target, architecture).with_settings(tree_nodes=8)
    prompts, ids, mask = ragged([6])
    output = target.generate(ids, attention_mask=mask, assistant_model=view, do_sample=False, max_new_tokens=30)
    assert output[0, 6:].tolist() == alone(target, prompts, max_new_tokens=30)[0]
    assert any(len(r.parents) > 1 for r in view.last_trace.rounds)


def test_a_reduced_draft_vocabulary(make_target):
    target = make_target("llama")
    drafter = PPOWDrafter.from_target(target, "eagle", draft_vocab_size=3, token_counts=torch.arange(64)).eval()
    prompts, ids, mask = ragged([6, 9])
    for sampling in ({}, {"do_sample": True, "top_k": 1}):
        given = together(target, drafter, ids, mask, window="fixed", **TREE | {"tree_branches": 5}, **sampling)
        assert_rows(given, alone(target, prompts))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tree_nodes": 0}, "tree_nodes: 0"),
        ({"tree_branches": 1.5}, "tree_branches: 1.5"),
        ({"tree": 3}, "tree_nodes"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(make_target, settings, message):
    with pytest.raises(ValueError, match=message):
        make_drafter(make_target("llama"), "standalone").with_settings(**settings)


# -- distribution at T > 0


@pytest.mark.parametrize(("architecture", "window"), [("eagle", "kl"), ("standalone", "fixed")])
def test_rows_are_sampled_from_the_targets_distribution(small_vocab_target, architecture, window):
    drafter = make_drafter(small_vocab_target, "eagle") if architecture == "eagle" else NOISY(small_vocab_target)
    assert sampled_rows_fit(small_vocab_target, drafter, window=window, **SAMPLED_TREE)
    assert sum(t.drafted - t.accepted for t in drafter.last_traces) > 0, "nothing was rejected"
    rounds = [r for trace in drafter.last_traces for r in trace.rounds]
    assert any(r.window > r.depth and r.accepted > 0 for r in rounds)


@pytest.mark.slow
@pytest.mark.parametrize("branches", [1, 2, 5])
@pytest.mark.parametrize("window", ["kl", "fixed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_many_rows_are_sampled_from_the_targets_distribution(small_vocab_target, architecture, window, branches):
    drafter = make_drafter(small_vocab_target, "eagle") if architecture == "eagle" else NOISY(small_vocab_target)
    settings = SAMPLED_TREE | {"copies": 750, "calls": 20, "tree_branches": branches}
    assert sampled_rows_fit(small_vocab_target, drafter, window=window, **settings)
    assert sum(t.drafted - t.accepted for t in drafter.last_traces) > 0, "nothing was rejected"


def test_taking_siblings_for_draws_with_replacement_is_noticed(small_vocab_target, monkeypatch):
    def with_replacement(tokens, parents, draft_scores, places, target_scores, uniforms, next_uniforms):
        found = [
            slow_path(
                row, tokens, parents, draft_scores, places, target_scores, uniforms, next_uniforms, distinct=False
            )
            for row in range(len(tokens))
        ]
        paths = [path + [-1] * (len(draft_scores) - len(path)) for path, _ in found]
        lengths, following = [len(path) for path, _ in found], [token for _, token in found]
        return torch.tensor(paths), torch.tensor(lengths), torch.tensor(following)

    monkeypatch.setattr(trees, "rejection_sample_distinct_trees", with_replacement)
    assert not sampled_rows_fit(small_vocab_target, NOISY(small_vocab_target), window="fixed", **SAMPLED_TREE)


def test_pruning_drawn_nodes_by_their_probability_is_noticed(small_vocab_target, monkeypatch):
    original = trees.grow_trees

    def pruned(session, rules, limits, process, end_tokens):
        grown = original(session, rules, limits, process, end_tokens)
        for i, tree in enumerate(grown.trees):
            for node, token in enumerate(tree.tokens):
                probs = grown.draft_scores(i, [tree.parents[node]])[0].softmax(-1)
                tree.reach[node] = float(probs[token]) * (tree.reach[p] if (p := tree.parents[node]) >= 0 else 1.0)
            grown.trees[i] = tree.pruned(2)
        return grown

    monkeypatch.setattr(loop, "grow_trees", pruned)
    assert not sampled_rows_fit(
        small_vocab_target, noisy_copy(small_vocab_target, 0.3), window="fixed", **SAMPLED_TREE
    )


# -- the rule for siblings drawn without replacement, by itself


def slow_path(row, tokens, parents, draft_scores, places, target_scores, uniforms, next_uniforms, distinct=True):
    """One row of `rejection_sample_distinct_trees`, node by node; `distinct=False` forgets what was drawn before."""
    path, at = [], CONTEXT
    probs = target_scores[row, 0].softmax(-1)
    while True:
        siblings = [node for node in range(tokens.shape[1]) if parents[row, node] == at]
        draft = draft_scores[len(path)][row, places[row, at + 1]].softmax(-1) if siblings else None
        for node in siblings:
            token = int(tokens[row, node])
            if uniforms[row, node] < probs[token] / draft[token]:
                break
            probs = residual_distribution(probs, draft)
            if distinct:
                draft = torch.cat([draft[:token], torch.zeros_like(draft[:1]), draft[token + 1 :]])
                draft = draft / draft.sum().clamp_min(1e-30)
        else:
            return path, int(sample_from_uniform(probs, next_uniforms[row]))
        path.append(node)
        probs, at = target_scores[row, node + 1].softmax(-1), node


def random_trees(batch: int, nodes: int, vocabulary: int, depth: int, seed: int):
    """Arguments of `rejection_sample_distinct_trees`: ragged trees with tokens drawn without replacement."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(1, generator=generator).item() * 3
    draft_scores = [scale * torch.randn(batch, k, vocabulary, generator=generator) for k in (1, 2, 3, 3)[:depth]]
    target_scores = scale * torch.randn(batch, nodes + 1, vocabulary, generator=generator)
    if seed % 2:  # top-k: impossible tokens on both sides
        for scores in (*draft_scores, target_scores):
            scores.masked_fill_(scores < scores.topk(5).values[..., -1:], -torch.inf)
    tokens, parents = torch.zeros(batch, nodes, dtype=torch.long), torch.full((batch, nodes), -2)
    places = torch.zeros(batch, nodes + 1, dtype=torch.long)
    for row in range(batch):
        level, size = [CONTEXT], 0
        for scores in draft_scores:
            following = []
            for place, parent in enumerate(level[: scores.shape[1]]):
                count = min(int(torch.randint(4, (), generator=generator)), nodes - size)
                places[row, parent + 1] = place
                if count:
                    drawn = torch.multinomial(scores[row, place].softmax(-1), count, generator=generator)
                    tokens[row, size : size + count], parents[row, size : size + count] = drawn, parent
                    following += range(size, size + count)
                    size += count
            level = following
    uniforms = torch.rand(batch, nodes + 1, generator=generator, dtype=torch.float64)
    return tokens, parents, draft_scores, places, target_scores, uniforms[:, 1:], uniforms[:, 0]


@pytest.mark.parametrize("seed", range(12))
def test_a_batch_of_trees_is_verified_as_each_node_by_node(seed):
    given = random_trees(batch=16, nodes=10, vocabulary=9, depth=1 + seed % 4, seed=seed)
    paths, lengths, following = rejection_sample_distinct_trees(*given)
    expected = [slow_path(row, *given) for row in range(16)]
    rows = list(zip(paths.tolist(), lengths.tolist(), following.tolist(), strict=True))
    assert [(path[:length], token) for path, length, token in rows] == expected
    assert all(set(path[length:]) <= {-1} for path, length, _ in rows)
    assert seed < 2 or (0 < lengths.sum() < 16 * len(given[2]))


def test_a_batch_in_which_a_row_has_no_tree():
    tokens, parents, draft_scores, places, target_scores, uniforms, next_uniforms = random_trees(3, 6, 7, 2, seed=4)
    parents[1] = -2
    given = (tokens, parents, draft_scores, places, target_scores, uniforms, next_uniforms)
    paths, lengths, following = rejection_sample_distinct_trees(*given)
    assert lengths[1] == 0 and following[1] == sample_from_uniform(target_scores[1, 0].softmax(-1), next_uniforms[1])
    with pytest.raises(ValueError, match="parents: .*Pass one index per node"):
        rejection_sample_distinct_trees(tokens, parents.fill_(6), *given[2:])


def exact_law(siblings: int, verify) -> torch.Tensor:
    """Law of the first token, every ordered draw without replacement and every verdict enumerated.

    With this P and Q every threshold is a multiple of 1/4, so that middles of quarters integrate uniforms exactly.
    """
    law = torch.zeros(4, dtype=torch.float64)
    for tokens in itertools.permutations((0, 1, 2), siblings):
        weight, left = 1.0, 1.0
        for token in tokens:
            weight, left = weight * DRAFT[token].item() / left, left - DRAFT[token].item()
        for quarters in itertools.product((0.125, 0.375, 0.625, 0.875), repeat=siblings + 1):
            path, following = verify(
                torch.tensor(tokens), torch.full((siblings,), -1), torch.tensor(quarters, dtype=torch.float64)
            )
            law[tokens[path[0]] if path else following] += weight / 4 ** (siblings + 1)
    return law


DRAFT = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)
WANTED = torch.tensor([0.25, 0.5, 0.0, 0.25], dtype=torch.float64)


@pytest.mark.parametrize("siblings", [1, 2, 3])
def test_distinct_siblings_reproduce_the_target_exactly(siblings):
    anything = torch.full((siblings, 4), 0.25, dtype=torch.float64)

    def verify(tokens, parents, uniforms):
        target_scores = torch.cat([WANTED[None], anything]).log()
        paths, lengths, following = rejection_sample_distinct_trees(
            tokens[None],
            parents[None],
            [DRAFT.log()[None, None]],
            torch.zeros(1, siblings + 1, dtype=torch.long),
            target_scores[None],
            uniforms[None, :-1],
            uniforms[-1:],
        )
        return paths[0, : lengths[0]].tolist(), int(following)

    def verify_with_replacement(tokens, parents, uniforms):
        return rejection_sample_tree(
            tokens, parents, DRAFT.expand(siblings, 4), WANTED, anything, uniforms[:-1], uniforms[-1]
        )

    torch.testing.assert_close(exact_law(siblings, verify), WANTED, rtol=0, atol=1e-12)
    assert siblings == 1 or (exact_law(siblings, verify_with_replacement) - WANTED).abs().max() > 0.02


def test_a_distinct_tree_that_is_a_chain_equals_the_chain():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        draft_probs, target_probs = (torch.rand(n, 5, generator=generator).softmax(-1) for n in (3, 4))
        tokens, uniforms = torch.multinomial(draft_probs, 1, generator=generator)[:, 0], torch.rand(4).double()
        count, following = rejection_sample_chain(tokens, draft_probs, target_probs, uniforms[:3], uniforms[3])
        paths, lengths, token = rejection_sample_distinct_trees(
            tokens[None], torch.arange(-1, 2)[None], draft_probs.log()[:, None, None],
            torch.zeros(1, 4, dtype=torch.long), target_probs.log()[None], uniforms[None, :3], uniforms[3:],
        )  # fmt: skip
        assert paths[0, : lengths[0]].tolist() == list(range(int(count))) and token == following


# -- the tree itself


def test_pruning_keeps_the_most_probable_nodes_with_their_parents_depth_first():
    tree = DraftTree()
    for token, parent, reach in [(1, -1, 0.6), (2, -1, 0.3), (3, 0, 0.5), (4, 1, 0.3), (5, 0, 0.05), (6, 2, 0.4)]:
        tree.add(token, parent, reach)
    pruned = tree.pruned(5)
    assert (
        pruned.tokens == [1, 3, 6, 2, 4] and pruned.parents == [-1, 0, 1, -1, 3] and pruned.depths == [0, 1, 2, 0, 1]
    )
    assert [pruned.tokens[node] for node in pruned.main_chain()] == [1, 3, 6]
    assert tree.pruned(2).tokens == [1, 3]


def test_a_node_sees_its_ancestors_itself_and_the_last_committed_token():
    wide, narrow = DraftTree(), DraftTree()
    for token, parent in [(7, -1), (8, 0), (9, -1), (10, 1)]:
        wide.add(token, parent, 1.0)
    narrow.add(3, -1, 1.0)
    tokens, depths, seen = lay_out([wide, narrow], [5, 6], torch.device("cpu"))
    assert tokens[0].tolist() == [5, 7, 8, 9, 10] and depths[0].tolist() == [0, 1, 2, 1, 3]
    assert [row.nonzero().flatten().tolist() for row in seen[0]] == [[0], [0, 1], [0, 1, 2], [0, 3], [0, 1, 2, 4]]
    assert tokens[1, :2].tolist() == [6, 3] and seen[1, 1].tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(("alpha", "nodes", "depth", "branches"), [(0.7, 9, 4, 3), (0.3, 12, 2, 4), (0.9, 5, 9, 2)])
def test_least_reach_is_that_of_the_last_node_of_all_sorted(alpha, nodes, depth, branches):
    level, reaches = [1.0], []
    for _ in range(depth):
        level = [reach * alpha * (1 - alpha) ** j for reach in level for j in range(branches)]
        reaches += level
    assert least_reach(alpha, nodes, depth, branches) == pytest.approx(sorted(reaches)[-nodes], rel=1e-6)
