"""Trees of drafted tokens: how one grows to a node budget, how it is laid out for the target, which path of it stays.

Knows the drafter's session, distributions and costs; knows nothing about the target's forward and its cache.

What a node is worth is the estimated probability that it is reached and kept (`reach`). At T = 0 a tree grows as in
EAGLE-2 (Li et al. 2406.16858): level by level the nodes of most reach are expanded, and those of most reach of all are
verified. EAGLE-2's reach is the product of the drafter's probabilities. A drafter that learned the target's
distribution at T = 1 gives its likeliest token less than the probability that it is the target's likeliest too, and
such trees are too wide; the estimated acceptance takes its place [ours]. At T > 0 a node's children are drawn from the
drafter's distribution without replacement, and how many there are is settled before they are drawn: from the
distributions, never from the tokens. With an adaptive window rule a node is drafted and verified while that is worth
its cost [ours].
"""

import functools
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .acceptance import entropy, exact_dtype, greedy_accepted_path, rejection_sample_distinct_trees
from .cost_model import OnlineCosts
from .draft_session import to_device
from .windowing import KLAdaptiveWindow, WindowRule

CONTEXT = -1  # the parent of nodes that follow the context
NO_NODE = -2  # in a batch, the parent of what fills up rows with fewer nodes


@dataclass
class DraftTree:
    """One row's tree; node i follows node `parents[i]`, which comes before it.

    Args:
        tokens, parents, depths (`list[int]`): of each node; -1 is the context's place, 0 the depth of its children.
        reach (`list[float]`): estimated probability that the node is reached and kept.
        expanded (`dict[int, tuple[int, int]]`): level and place of the distribution that a node's children come from.
        features (`dict[int, list[float]]`): what that distribution's acceptance is estimated from.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    reach: list[float] = field(default_factory=list)
    expanded: dict[int, tuple[int, int]] = field(default_factory=dict)
    features: dict[int, list[float]] = field(default_factory=dict)

    def add(self, token: int, parent: int, reach: float) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(0 if parent == CONTEXT else self.depths[parent] + 1)
        self.reach.append(reach)
        return len(self.tokens) - 1

    def path(self, node: int) -> list[int]:
        """The nodes from the context's child down to `node`."""
        nodes = []
        while node != CONTEXT:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def path_tokens(self, node: int) -> list[int]:
        return [self.tokens[i] for i in self.path(node)]

    def main_chain(self) -> list[int]:
        """The context's first child, its first child, and so on."""
        chain: list[int] = []
        for node, parent in enumerate(self.parents):
            if parent == (chain[-1] if chain else CONTEXT):
                chain.append(node)
        return chain

    def pruned(self, nodes: int) -> "DraftTree":
        """The `nodes` nodes of most reach, depth first, so that the main chain comes first in the target's cache.

        A child's reach is at most its parent's, so that parents stay.
        """
        best = sorted(range(len(self.tokens)), key=lambda i: (-self.reach[i], self.depths[i], i))[:nodes]
        children: dict[int, list[int]] = {}
        for node in sorted(best, reverse=True):
            children.setdefault(self.parents[node], []).append(node)
        tree, place = DraftTree(), {CONTEXT: CONTEXT}
        waiting = list(children.get(CONTEXT, []))
        while waiting:
            node = waiting.pop()
            place[node] = tree.add(self.tokens[node], place[self.parents[node]], self.reach[node])
            waiting += children.get(node, [])
        for node in (CONTEXT, *best):
            if node in self.expanded:
                tree.expanded[place[node]] = self.expanded[node]
                tree.features[place[node]] = self.features[node]
        return tree


class TreeRule:
    """How far a row's tree grows: by its budget alone, or, with an adaptive window rule, by what it is worth [ours].

    Renewal-reward as for windows: with lambda the tokens per unit of cost reached so far, a node is verified while its
    reach is at least lambda * slope of the verification cost, and a level is drafted while what its nodes are worth
    beyond that is at least lambda * gamma. One branch makes it a chain. `estimates` says how likely a child is kept:
    the window's `rule` itself where that is adaptive.
    """

    def __init__(
        self,
        rule: WindowRule,
        estimates: KLAdaptiveWindow,
        costs: OnlineCosts,
        nodes: int,
        branches: int,
        sampling: bool,
    ):
        self.rule, self.estimates, self.costs, self.nodes, self.branches = rule, estimates, costs, nodes, branches
        self.sampling, self.adaptive = sampling, rule is estimates
        self._acceptance, self._evidence = 0.7, 4.0  # running share of reached levels at which a child was kept
        self._tokens, self._cost = 0.0, 0.0

    def start(self, limit: int) -> None:
        """Before a tree of at most `limit` levels grows."""
        if not self.adaptive:
            self.estimates.start(limit)
        self._model = self.costs.model
        speed = (self._tokens + 4 * self._model.speedup(0.7, 4)) / (self._cost + 4)
        level_cost = 0.0 if self._model.one_step else self._model.cost_ratio
        self._level_worth = speed * level_cost if self.adaptive else 0.0
        self._node_worth = speed * self._model.verification_cost if self.adaptive else 0.0
        self._least = self._node_worth
        if self.sampling and limit:  # drawn nodes cannot be pruned, so the budget is shared out beforehand
            alpha = min(max(round(self._acceptance, 2), 0.02), 0.98)
            self._least = max(self._least, least_reach(alpha, self.nodes, limit, self.branches))

    def child_worth(self, probabilities: Sequence[float], features: Sequence[float]) -> list[float]:
        """Probability that each child is kept where its parent is, the most probable (or first drawn) first.

        `probabilities` are the drafter's of them; at T > 0 only how many they are is looked at.
        """
        by_budget = self.sampling and not self.adaptive  # its size was settled by the running acceptance
        alpha = self._acceptance if by_budget else self.estimates.acceptance_probability(features)
        if self.sampling:
            return [alpha * (1 - alpha) ** j for j in range(len(probabilities))]
        others = (1 - alpha) / max(1 - probabilities[0], 1e-6)
        return [alpha, *(min(p * others, alpha) for p in probabilities[1:])]

    def worth_a_node(self, reach: float) -> bool:
        return reach >= self._least

    def worth_a_level(self, reaches: Sequence[float]) -> bool:
        """Whether expanding nodes of these reaches pays for the drafter's step."""
        gain = sum(max(reach * self._acceptance - self._node_worth, 0.0) for reach in reaches)
        return bool(reaches) and gain >= self._level_worth

    def update(self, levels: int, nodes: int, accepted: int) -> None:
        """Learn from a round: levels drafted, nodes verified, length of the accepted path."""
        decay = 0.97
        self._tokens = decay * self._tokens + accepted + 1
        self._cost = decay * self._cost + self._model.round_cost(nodes, self._model.draft_steps(levels))
        reached = accepted + (accepted < levels)
        if levels and reached:
            self._evidence = min(self._evidence + reached, 40.0)
            self._acceptance += (accepted / reached - self._acceptance) * reached / self._evidence


@functools.lru_cache(1024)
def least_reach(alpha: float, nodes: int, depth: int, branches: int) -> float:
    """Reach of the last node of the best tree of `nodes` nodes, where a node's first child is kept with probability
    `alpha`, its second with `alpha` once the first was rejected, and so on (cf. Sequoia, Chen et al. 2402.12374).
    """
    heap = [(-alpha, 1, 0)]  # reach, depth, how many siblings came before
    reach = 0.0
    for _ in range(nodes):
        if not heap:
            return 0.0
        negative, level, before = heapq.heappop(heap)
        reach = -negative
        if level < depth:
            heapq.heappush(heap, (-reach * alpha, level + 1, 0))
        if before + 1 < branches:
            heapq.heappush(heap, (-reach * (1 - alpha), level, before + 1))
    return reach * (1 - 1e-9)  # rounding must not leave the last node out


@dataclass
class GrownTrees:
    """The trees of a batch, and the drafter's processed scores `[B, k, V]` of each level."""

    trees: list[DraftTree]
    level_scores: list[torch.Tensor]

    def draft_scores(self, row: int, nodes: Sequence[int]) -> torch.Tensor:
        """`[M, V]`: the processed scores that the children of these nodes come from."""
        places = [self.trees[row].expanded[node] for node in nodes]
        scores = [self.level_scores[level][row, place] for level, place in places]
        return torch.stack(scores) if scores else self.level_scores[0].new_zeros(0, self.level_scores[0].shape[-1])


@dataclass
class LevelCandidates:
    """What the distributions of a level offer, as nested lists.

    Args:
        looked (`[B, k, 4 or 5]`): the two highest probabilities, the entropy in nats, the likeliest token; after
            them a confidence head's log-odds.
        tokens, probabilities (`[B, k, b]`): b candidates: the most probable ones, or drawn without replacement, in
            the order of drawing.
    """

    looked: list
    tokens: list
    probabilities: list


class GrowingTrees:
    """The trees of a batch while they grow, level by level.

    `frontiers` holds each row's nodes that are expanded next, and `columns` those of the drafter's cache (after what
    was committed) that a node follows.
    """

    def __init__(self, rules: Sequence[TreeRule], limits: Sequence[int], end_tokens: set[int]):
        self.rules, self.limits, self.end_tokens = rules, limits, end_tokens
        self.trees = [DraftTree() for _ in rules]
        self.frontiers = [[CONTEXT] if limit else [] for limit in limits]
        self.columns: list[dict[int, list[int]]] = [{CONTEXT: []} for _ in rules]
        self.level = self.past = 0  # levels, and columns of the trees so far

    def paths(self) -> list[list[list[int]]]:
        """The draft tokens before each distribution of this level."""
        return [
            [tree.path_tokens(node) for node in nodes] for tree, nodes in zip(self.trees, self.frontiers, strict=True)
        ]

    def expand(self, row: int, candidates: LevelCandidates) -> list[int]:
        """Add the children of a row's frontier that are worth a node; returns the row's next frontier."""
        tree, rule = self.trees[row], self.rules[row]
        offers: list[tuple[float, int, int, int]] = []  # minus the reach, place among siblings, place, parent
        for place, node in enumerate(self.frontiers[row]):
            first, second, entropy_, likeliest, *predicted = candidates.looked[row][place]
            if not first > 0:  # NaN: nothing to draw from
                continue
            features = rule.rule.describe(first, second, entropy_, int(likeliest), tree.path_tokens(node), *predicted)
            tree.expanded[node], tree.features[node] = (self.level, place), features
            reach = 1.0 if node == CONTEXT else tree.reach[node]
            probabilities = candidates.probabilities[row][place]
            worths = rule.child_worth(probabilities, features)
            for sibling, (probability, worth) in enumerate(zip(probabilities, worths, strict=True)):
                if probability > 0 and rule.worth_a_node(reach * worth):
                    offers.append((-reach * worth, sibling, place, node))
        offers.sort()
        if rule.sampling:  # siblings come in the order they were drawn, since their worth falls in it
            offers = offers[: rule.nodes - len(tree.tokens)]
        tokens = candidates.tokens[row]
        added = [tree.add(tokens[place][sibling], node, -negative) for negative, sibling, place, node in offers]
        best = [node for node in added if tree.tokens[node] not in self.end_tokens][: rule.branches]
        goes_on = self.level + 1 < self.limits[row] and not (rule.sampling and len(tree.tokens) >= rule.nodes)
        return best if goes_on and rule.worth_a_level([tree.reach[node] for node in best]) else []

    def next_level(self, frontiers: list[list[int]]) -> tuple[list[list[int]], list[list[int]], torch.Tensor]:
        """Go on to the given frontiers, of at most k nodes.

        Returns their tokens and their parents' places in the level before, `[B, k]` with 0 where a row has fewer, and
        which of the trees' columns, theirs included, each one follows, bool `[B, k, n + k]`.
        """
        width = max(map(len, frontiers))
        tokens, parents = [], []
        seen = torch.zeros(len(self.trees), width, self.past + width, dtype=torch.bool)
        seen[:, :, self.past :] = torch.eye(width, dtype=torch.bool)
        for row, (tree, frontier) in enumerate(zip(self.trees, frontiers, strict=True)):
            place_before = {node: place for place, node in enumerate(self.frontiers[row])}
            blanks = [0] * (width - len(frontier))
            tokens.append([tree.tokens[node] for node in frontier] + blanks)
            parents.append([place_before[tree.parents[node]] for node in frontier] + blanks)
            for place, node in enumerate(frontier):
                columns_before = self.columns[row][tree.parents[node]]
                seen[row, place, columns_before] = True
                self.columns[row][node] = [*columns_before, self.past + place]
        self.frontiers, self.past, self.level = frontiers, self.past + width, self.level + 1
        return tokens, parents, seen


def grow_trees(
    session: Any,
    rules: Sequence[TreeRule],
    limits: Sequence[int],
    process: Callable[[torch.Tensor, list[list[list[int]]]], torch.Tensor],
    end_tokens: set[int],
) -> GrownTrees:
    """Grow a tree for each row after what the drafter's session has read.

    Args:
        session ([`DraftSession`]): has observed everything committed.
        rules (`Sequence[TreeRule]`), limits (`Sequence[int]`): each row's rule and greatest depth (0: no tree).
        process (`Callable`): logits `[B, k, V]` and the draft tokens that stand before them, for each row and place
            (fewer than k places in rows with a narrower tree) -> scores.
        end_tokens (`set[int]`): tokens after which nothing is drafted.
    """
    for rule, limit in zip(rules, limits, strict=True):
        rule.start(limit)
    growing = GrowingTrees(rules, limits, end_tokens)
    level_scores = []
    logits = session.first_logits()[:, None]
    while True:
        scores = process(logits.float(), growing.paths())
        level_scores.append(scores)
        candidates = _candidates(scores, rules[0].branches, rules[0].sampling, session.confidence)
        frontiers = [growing.expand(row, candidates) for row in range(len(rules))]
        if not any(frontiers):
            break
        depth = growing.level
        tokens, parents, seen = growing.next_level(frontiers)
        on_device = [to_device(values, logits.device) for values in (tokens, parents)]
        logits = session.tree_logits(*on_device, seen.to(logits.device, non_blocking=True), depth)
    return GrownTrees([tree.pruned(rule.nodes) for tree, rule in zip(growing.trees, rules, strict=True)], level_scores)


def _candidates(
    scores: torch.Tensor, branches: int, sampling: bool, confidence: torch.Tensor | None
) -> LevelCandidates:
    """The candidates of scores `[B, k, V]`, at most `branches` of each distribution, in one transfer.

    `confidence` `[B, k]` is what a confidence head says of each.
    """
    log_probs = scores.log_softmax(-1)
    probs = log_probs.exp()
    count = min(branches, probs.shape[-1])
    top = probs.topk(max(count, 2))
    looked = torch.cat([top.values[..., :2], entropy(log_probs)[..., None], top.indices[..., :1].to(probs)], dim=-1)
    if confidence is not None:
        looked = torch.cat([looked, confidence[..., None].to(looked)], dim=-1)
    split = looked.shape[-1]
    drawn, drawn_probs = top.indices[..., :count], top.values[..., :count]
    if sampling:
        # The order of p / Exp(1) is that of draws one by one without replacement; impossible tokens come last.
        race = probs.nan_to_num(0.0) / torch.empty_like(probs).exponential_()
        drawn = race.topk(count).indices
        drawn_probs = probs.gather(-1, drawn)
    table = torch.cat([looked, drawn.to(probs), drawn_probs], dim=-1).tolist()  # token ids are exact below 2^24
    return LevelCandidates(
        [[found[:split] for found in row] for row in table],
        [[[int(token) for token in found[split : split + count]] for found in row] for row in table],
        [[found[split + count :] for found in row] for row in table],
    )


def lay_out(trees: Sequence[DraftTree], last_tokens: Sequence[int], device: torch.device):
    """Tokens and depths `[B, N + 1]` and mask `[B, N + 1, N + 1]` of the last committed tokens and the trees.

    Rows with fewer nodes are filled up with tokens that see themselves alone.
    """
    size = max(len(tree.tokens) for tree in trees) + 1
    blanks = [size - 1 - len(tree.tokens) for tree in trees]
    tokens = [
        [last, *tree.tokens] + [last] * blank for last, tree, blank in zip(last_tokens, trees, blanks, strict=True)
    ]
    depths = [
        [0, *(depth + 1 for depth in tree.depths)] + [0] * blank for tree, blank in zip(trees, blanks, strict=True)
    ]
    seen = torch.eye(size, dtype=torch.bool).repeat(len(trees), 1, 1)
    for i, tree in enumerate(trees):
        for node, parent in enumerate(tree.parents):
            seen[i, node + 1] |= seen[i, parent + 1]
    seen[:, :, 0] |= (torch.arange(size) == 0) | (torch.tensor(depths) > 0)
    return to_device(tokens, device), to_device(depths, device), seen.to(device, non_blocking=True)


def greedy_path(tree: DraftTree, tokens: torch.Tensor, choices: torch.Tensor) -> tuple[list[int], int]:
    """Accepted path of a tree at T = 0 and the token after it.

    `tokens`, `choices` `[N + 1 or more]` begin with the context's.
    """
    nodes = len(tree.tokens)
    parents = torch.tensor(tree.parents, dtype=torch.long)
    path = greedy_accepted_path(tokens[1 : nodes + 1], parents, choices[0], choices[1 : nodes + 1])
    return path, int(choices[path[-1] + 1 if path else 0])


def sampled_paths(grown: GrownTrees, tokens: torch.Tensor, scores: torch.Tensor) -> list[tuple[list[int], int]]:
    """Accepted path of each tree at T > 0 and the token after it.

    `tokens` `[B, N + 1]` and the target's processed scores `[B, N + 1, V]` begin with the context's.
    """
    (batch, size), device = tokens.shape, scores.device
    parents, places = [], []
    for tree in grown.trees:
        parents.append(tree.parents + [NO_NODE] * (size - 1 - len(tree.parents)))
        places.append([tree.expanded.get(node, (0, 0))[1] for node in range(CONTEXT, size - 1)])
    uniforms = torch.rand(batch, size, device=device, dtype=exact_dtype(device))
    paths, counts, following = rejection_sample_distinct_trees(
        tokens[:, 1:],
        to_device(parents, device).view(batch, size - 1),
        grown.level_scores,
        to_device(places, device),
        scores,
        uniforms[:, 1:],
        uniforms[:, 0],
    )
    ends = zip(paths.tolist(), counts.tolist(), following.tolist(), strict=True)
    return [(path[:count], token) for path, count, token in ends]
