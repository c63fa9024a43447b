"""Our own draft-verify loop: batches of prompts, ragged acceptance, chains and trees, one trace a row.

`target.generate(**inputs, custom_generate=drafter.generate_with())` runs it; so does `assistant_model=drafter` where
transformers' assisted loop ends: with more than one prompt, or with trees. Puts the target's side
([`TargetSession`]), the drafter's ([`DraftSession`]), the window rules and the
acceptance together; trains nothing.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria

from .acceptance import (
    exact_dtype,
    greedy_accepted_counts,
    greedy_accepted_path,
    kl_divergence,
    rejection_sample_chain,
)
from .compatibility import check_call, check_processors, common_context_length, target_width
from .configuration_ppow import call_settings, check_settings, warn_of_other_target
from .draft_session import UnreadTokens, now, to_device
from .draft_window import SessionSource, WindowDraft, draft_windows, known_length
from .rows import Endings, Row, ScoreProcessing, append_looked_up, visible_tokens
from .target_session import COMPACT_AT, TargetSession
from .trace import GenerationTrace, RoundTrace
from .trees import CONTEXT, DraftTree, GrownTrees, TreeRule, grow_trees, lay_out, sampled_paths
from .windowing import (
    MAX_KL,
    FixedWindow,
    KLAdaptiveWindow,
    OnlineCosts,
    WindowRule,
    make_adaptive_rule,
    make_window_rule,
    stored_costs,
)

TREE_BRANCHES = 4  # a node's children, and the nodes expanded in a level, where the call does not say


class DrafterView:
    """A drafter with window settings of its own; made by [`PPOWDrafter.with_settings`]."""

    def __init__(self, drafter: Any, settings: dict[str, Any]):
        for name, value in settings.items():
            if name == "architecture":
                raise ValueError("architecture: a drafter's architecture cannot be changed for a call.")
            check_settings(**{name: value})
            if name == "max_window":
                drafter.config.check_window(value)
        call_settings(drafter.config, settings)  # raises where two of them do not go together
        self.drafter = drafter
        self.settings = settings
        self.last_trace: Any = None
        self.last_traces: list[Any] = []
        self.record = True

    def generate_with(self, **options):
        """See [`PPOWDrafter.generate_with`]."""
        return SpeculativeDecoding(self, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["drafter"], name)


class SpeculativeDecoding:
    """What [`PPOWDrafter.generate_with`] returns: a callable for `generate(custom_generate=...)`.

    At T = 0 each row's text is, in float32, what plain `generate` writes for that prompt alone; at T > 0 it has the
    same distribution. Logits processors and stopping criteria see a row as they would see it alone (`[1, n]`, without
    padding), processors of length only the padded row. The record of a call is `last_traces` (a row each) and
    `last_trace` (the first's).

    Args:
        drafter ([`DrafterView`]): the drafter, with the window settings of its calls.
        streamer (`BaseStreamer`, *optional*): one prompt only. Given here, since `generate` does not hand it on.
        tokenizer (*optional*), stop_strings (`str` or `list[str]`, *optional*):
            texts that end a row. Given here, since `generate` does not hand the tokenizer on.
        record (`bool`, *optional*, defaults to `True`):
            whether fixed windows, whose rule needs no look at the distributions, leave divergences and features in the
            trace too.
        settings: `window`, `max_window`, `cost_ratio`, `verification_cost`, `lookup`, `tree_nodes`, `tree_branches`,
            see [`PPOWDrafter.with_settings`].
    """

    def __init__(
        self,
        drafter: DrafterView,
        streamer: Any = None,
        tokenizer: Any = None,
        stop_strings: str | list[str] | None = None,
        record: bool = True,
        **settings: Any,
    ):
        if stop_strings is not None and tokenizer is None:
            raise ValueError("tokenizer: stop_strings are found in text, so pass the target's tokenizer with them.")
        self.view = DrafterView(drafter.drafter, {**drafter.settings, **settings})
        self.view.record = record
        warn_of_other_target(drafter.config, tokenizer=tokenizer)
        self.streamer = streamer
        self.criteria = [] if stop_strings is None else [StopStringCriteria(tokenizer, stop_strings)]

    @property
    def last_trace(self) -> GenerationTrace | None:
        return self.view.last_trace

    @property
    def last_traces(self) -> list[GenerationTrace]:
        return self.view.last_traces

    def __call__(
        self,
        model: Any,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        **model_kwargs: Any,
    ):
        """What `generate` calls with everything prepared: `[B, n]`, padded on the left -> `[B, n + new]`."""
        model_kwargs.pop("synced_gpus", None)
        streamer = model_kwargs.pop("streamer", None) or self.streamer
        call = SpeculativeCall(
            model,
            self.view,
            input_ids,
            LogitsProcessorList(logits_processor or []),
            StoppingCriteriaList([*(stopping_criteria or []), *self.criteria]),
            generation_config if generation_config is not None else model.generation_config,
            streamer,
            model_kwargs,
        )
        if self.streamer is not None and streamer is self.streamer:
            streamer.put(input_ids.cpu())  # generate does this for a streamer that it knows
        return call.run()


@dataclass
class Verdict:
    """What a round's target forward said, row by row, as chains: a tree's accepted path stands for its row.

    Args:
        drafts (`list[list[int]]`): the drafted tokens, of which the first `kept` were accepted.
        states (`[B, T, 3*h]`, *optional*): the target's, of the last committed token and the drafted ones behind it.
        columns (`int`): columns that the forward added to the target's cache, the kept ones in front.
        kept (`list[int]`), following (`list[int]`): accepted tokens, and the token behind them.
        logits, scores: of each row, `[at least kept + 1, V]`.
    """

    drafts: list[list[int]]
    states: torch.Tensor | None
    columns: int
    kept: list[int]
    following: list[int]
    logits: Any
    scores: Any


class SpeculativeCall:
    """One call of the loop: the rows, the target's session, the drafter's session."""

    def __init__(
        self,
        target: Any,
        view: DrafterView,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: Any,
        model_kwargs: dict[str, Any],
    ):
        check_call(target, view, generation_config)
        check_processors(logits_processor)
        if model_kwargs.pop("inputs_embeds", None) is not None:
            raise ValueError("inputs_embeds: a drafter reads tokens, so pass the prompt as input_ids instead.")
        if streamer is not None and len(input_ids) > 1:
            raise ValueError(f"streamer: {len(input_ids)} prompts given, but a streamer shows one. Pass one prompt.")
        for name in ("output_hidden_states", "output_attentions"):
            if generation_config.return_dict_in_generate and getattr(generation_config, name):
                raise ValueError(
                    f"{name}: this loop returns scores and logits, but neither hidden states nor attentions. Leave it "
                    "out, or generate without a drafter."
                )
        self.view, self.config = view, view.drafter.config
        self.input_ids, self.streamer = input_ids, streamer
        self.do_sample = bool(generation_config.do_sample)
        self.process = ScoreProcessing(logits_processor, input_ids)
        context_length = common_context_length(target.config, self.config)
        self.endings = Endings(stopping_criteria, generation_config, input_ids, context_length)

        mask = model_kwargs.pop("attention_mask", None)
        model_kwargs.pop("position_ids", None)
        cache = model_kwargs.pop("cache", None)
        old_name_cache = model_kwargs.pop("past_key_values", None)
        extra_inputs = {
            name: value
            for name, value in model_kwargs.items()
            if value is not None and name not in ("use_cache", "cache_position", "logits_to_keep")
        }
        settings = self._settings()
        self.trees, self.lookup = settings["tree_nodes"] is not None, settings["lookup"]
        self.target = TargetSession(
            target,
            self.config.target_layer_ids,
            input_ids,
            visible_tokens(input_ids, mask, getattr(generation_config, "_mask_length", None)),
            old_name_cache if cache is None else cache,
            extra_inputs,
            self.trees,
        )
        self.ragged = self.target.ragged
        self.session = view.drafter.start_session(target_width(target))
        self.rows = self._make_rows(settings)
        self.everyone = list(self.rows)
        view.last_traces = [row.trace for row in self.rows]
        view.last_trace = view.drafter.last_trace = view.last_traces[0]
        view.drafter.last_traces = view.last_traces

    def _settings(self) -> dict[str, Any]:
        given = self.view.settings
        branches = given.get("tree_branches", TREE_BRANCHES)
        trees = {"tree_nodes": given.get("tree_nodes"), "tree_branches": branches}
        return call_settings(self.config, given) | trees

    def _make_rows(self, settings: dict[str, Any]) -> list[Row]:
        prior = stored_costs(self.config.calibration)
        self.costs = OnlineCosts(settings["cost_ratio"], settings["verification_cost"], prior)
        self.tree_rules: dict[int, TreeRule] = {}
        rows = []
        paddings = (~self.target.visible).sum(1).tolist()
        for place, (ids, padding) in enumerate(zip(self.input_ids.tolist(), paddings, strict=True)):
            rule = make_window_rule(
                settings["window"],
                settings["max_window"],
                self.costs,
                self.config.calibration,
                self.do_sample,
                self.lookup,
            )
            rows.append(Row(place, padding, ids[padding:], rule, GenerationTrace(window_rule=settings["window"])))
            if self.trees:
                nodes, branches = settings["tree_nodes"], settings["tree_branches"]
                estimates = (
                    rule
                    if isinstance(rule, KLAdaptiveWindow)
                    else make_adaptive_rule(rule.max_window, self.costs, self.config.calibration, self.do_sample)
                )
                self.tree_rules[place] = TreeRule(rule, estimates, self.costs, nodes, branches, self.do_sample)
        return rows

    # -- the loop

    def run(self):
        self._prefill()
        while self.rows:
            self._round()
        if self.streamer is not None:
            self.streamer.end()
        cache = self.target.finished_cache(len(self.everyone[0].ids)) if self.endings.records else None
        return self.endings.result(self.everyone, self.input_ids, cache)

    def _prefill(self) -> None:
        """The target reads the prompts and gives each row its first token."""
        started = time.perf_counter()
        visible = self.target.visible
        logits, states = self.target.read_prompt(self.input_ids)
        scores = self.process(logits, self.rows, lambda i, t: [])
        tokens = self._choose(scores)
        first_tokens = tokens[:, 0].tolist()
        seconds = time.perf_counter() - started  # read when the device has finished, here as behind a window
        for i, (row, token) in enumerate(zip(self.rows, first_tokens, strict=True)):
            row.trace.rounds.append(RoundTrace(0, 0, [], verify_seconds=seconds))
            self._commit(row, [token], logits[i], scores[i])
        first, past = self.view.drafter.draft_model.first_prefix, self.target.past
        if first:  # eagle: the token behind each state; the row's own first token has no state before it
            read = torch.cat([self.input_ids[:, past:], tokens], dim=1)[:, 1:]
            visible = visible[:, past:]
            own = torch.cat([visible, visible.new_ones(len(self.rows), 1)], dim=1)[:, 1:] & visible
        else:
            read = torch.cat([self.input_ids, tokens], dim=1)
            own = torch.cat([visible, visible.new_ones(len(self.rows), 1)], dim=1)
        self.unread = UnreadTokens(read, states, own if self.ragged else None, past + 1 if first else 0)
        self._drop_finished()

    def _round(self) -> None:
        started = time.perf_counter()
        longest = 0
        for row in self.rows:
            row.rule.read(row.ids[row.read :])
            row.read = len(row.ids)
            row.room = self.endings.room(row)
            row.limit = row.rule.start(row.room)
            longest = max(longest, row.limit)
            row.trace.rounds.append(RoundTrace(0, 0, []))
        verdict = self._tree(started) if self.trees and longest else self._chain(longest, started)
        costs = self.costs.model
        kept, committed = verdict.kept, []
        for i, row in enumerate(self.rows):
            row.trace.speculation_pays = row.rule.pays
            row.trace.cost_ratio, row.trace.verification_cost = costs.cost_ratio, costs.verification_cost
            tokens = [*verdict.drafts[i][: kept[i]], verdict.following[i]]
            count = self._commit(row, tokens, verdict.logits[i], verdict.scores[i])
            kept[i] = min(kept[i], count - 1)  # behind a row's end nothing is read any more
            committed.append(tokens[: kept[i] + 1])
        most = max(kept)
        counts = to_device(kept, self.input_ids.device)
        self.target.keep(verdict.columns, counts, most)
        read = [tokens + [0] * (most + 1 - len(tokens)) for tokens in committed]
        self.unread.add(to_device(read, self.input_ids.device), verdict.states, counts, most)
        records = [row.trace.rounds[-1] for row in self.rows]
        self._drop_finished()
        seconds = time.perf_counter() - started
        for record in records:
            record.seconds = seconds

    def _commit(self, row: Row, tokens: list[int], logits: torch.Tensor, scores: torch.Tensor) -> int:
        committed = self.endings.commit(row, tokens, logits, scores)
        if self.streamer is not None:
            self.streamer.put(torch.tensor(tokens[:committed]))
        record = row.trace.rounds[-1]
        record.accepted = min(record.accepted, committed)
        return committed

    def _drop_finished(self) -> None:
        staying = [i for i, row in enumerate(self.rows) if not row.finished]
        if not staying:
            self.rows = []
            return
        if len(staying) < len(self.rows):
            self.rows = [self.rows[i] for i in staying]
            rows = to_device(staying, self.input_ids.device)
            self.target.keep_rows(rows)
            if not self.session.is_empty:
                self.session.keep_rows(rows.to(self.view.drafter.device))
            self.unread.keep_rows(rows)
        self.target.compact()
        if self.session.waste > COMPACT_AT:
            self.session.compact()

    # -- a round that drafts chains

    def _chain(self, longest: int, started: float) -> Verdict:
        batch, device = len(self.rows), self.input_ids.device
        if longest:
            draft_ids, draft_scores, valid = self._draft()
        else:
            draft_ids = self.input_ids.new_zeros(batch, 0)
            draft_scores, valid = [], torch.zeros(batch, 0, dtype=torch.bool, device=device)
        own_scores = draft_scores
        if self.lookup:
            width = self.session.width if self.do_sample else None
            draft_ids, draft_scores, valid = append_looked_up(
                self.rows, draft_ids, draft_scores, valid, self.endings.eos, width
            )
        window = draft_ids.shape[1]
        drafted = time.perf_counter()

        last = to_device([[row.ids[-1]] for row in self.rows], device)
        logits, states = self.target.read_window(torch.cat([last, draft_ids], dim=1), valid)
        drafts = [row.trace.rounds[-1].draft_ids for row in self.rows]
        scores = self.process(logits, self.rows, lambda i, t: drafts[i][:t])
        if self.do_sample:
            counts, following = self._verify_sampled(draft_ids, draft_scores, scores, valid)
        else:
            choices = scores.argmax(-1)
            counts = greedy_accepted_counts(draft_ids, choices[:, :window], valid)
            following = choices.gather(1, counts[:, None])[:, 0]
        divergences = self._divergences(scores, own_scores)
        kept, nexts = torch.stack([counts, following]).tolist()
        verified = time.perf_counter()

        for i, row in enumerate(self.rows):
            record = row.trace.rounds[-1]
            record.window, record.accepted = len(drafts[i]), kept[i]
            record.draft_seconds, record.verify_seconds = drafted - started, verified - drafted
            own_tokens = record.window - record.looked_up
            own_kept = min(kept[i], own_tokens)
            if divergences is not None:
                record.kl = divergences[i][: min(kept[i] + 1, own_tokens)]
            row.rule.update(own_tokens, record.draft_steps, own_kept, record.kl)
            row.rule.update_looked_up(record.looked_up, kept[i] - own_kept)
        self.costs.observe_verification(window, verified - drafted)
        return Verdict(drafts, states, window + 1, kept, nexts, logits, scores)

    def _draft(self) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Draft tokens `[B, W]`, their processed logits (W of `[B, V]`) and which are a row's own `[B, W]`."""
        started = time.perf_counter()
        first_read = self.session.is_empty
        self.unread.read(self.session)
        if first_read:
            started = now(self.view.drafter.device)  # reading the prompt is no draft step
        batch, device = len(self.rows), self.input_ids.device
        records = [row.trace.rounds[-1] for row in self.rows]
        windows = [WindowDraft(i, row.rule, row.limit, records[i]) for i, row in enumerate(self.rows)]
        source = SessionSource(
            self.session,
            lambda logits: self.process(logits.to(device)[:, None], self.rows, lambda i, t: records[i].draft_ids)[
                :, 0
            ],
            self.do_sample,
            looks=any(type(row.rule) is not FixedWindow for row in self.rows) or self.view.record,
            ahead=known_length(windows) if self.process.memoryless else 1,
        )
        draft_windows(windows, source, self.endings.eos.__contains__)
        if not first_read or source.steps > 1:
            self.costs.observe_drafting(source.steps - first_read, time.perf_counter() - started)
        if not source.drawn:
            return self.input_ids.new_zeros(batch, 0), [], torch.zeros(batch, 0, dtype=torch.bool, device=device)
        lengths = to_device([window.length for window in windows], device)
        valid = torch.arange(len(source.drawn), device=device) < lengths[:, None]
        return torch.cat(source.drawn, dim=1), source.kept_scores, valid

    def _choose(self, scores: torch.Tensor) -> torch.Tensor:
        """`[B, 1, V]` -> `[B, 1]`."""
        if self.do_sample:
            return torch.multinomial(scores[:, 0].softmax(-1), 1)
        return scores[:, 0].argmax(-1, keepdim=True)

    def _verify_sampled(self, draft_ids, draft_scores, scores, valid) -> tuple[torch.Tensor, torch.Tensor]:
        batch, window = draft_ids.shape
        draft_probs = (
            torch.stack(draft_scores, dim=1).softmax(-1) if window else scores.new_zeros(batch, 0, scores.shape[-1])
        )
        uniforms = torch.rand(batch, window + 1, device=scores.device, dtype=exact_dtype(scores.device))
        return rejection_sample_chain(
            draft_ids, draft_probs, scores.softmax(-1), uniforms[:, :window], uniforms[:, window], valid
        )

    def _divergences(self, scores: torch.Tensor, draft_scores: list[torch.Tensor]) -> list[list[float]] | None:
        """KL(P||Q) in nats at each drafted position."""
        if not draft_scores or (not self.view.record and all(type(row.rule) is FixedWindow for row in self.rows)):
            return None
        return divergences(scores[:, : len(draft_scores)], torch.stack(draft_scores, dim=1)).tolist()

    # -- a round that drafts trees

    def _tree(self, started: float) -> Verdict:
        rules = [self.tree_rules[row.place] for row in self.rows]
        device = self.input_ids.device
        first_read = self.session.is_empty
        self.unread.read(self.session)
        begun = now(self.view.drafter.device) if first_read else started  # reading the prompt is no draft step
        grown = grow_trees(
            self.session,
            rules,
            [row.limit for row in self.rows],
            lambda logits, paths: self.process(
                logits.to(device), self.rows, lambda i, t: paths[i][t] if t < len(paths[i]) else []
            ),
            self.endings.eos,
        )
        trees, levels = grown.trees, len(grown.level_scores)
        drafted = time.perf_counter()
        self.costs.observe_drafting(levels - first_read, drafted - begun)

        tokens, depths, seen = lay_out(trees, [row.ids[-1] for row in self.rows], device)
        logits, states = self.target.read_tree(tokens, depths, seen)
        scores = self.process(
            logits, self.rows, lambda i, t: trees[i].path_tokens(t - 1) if 0 < t <= len(trees[i].tokens) else []
        )
        if self.do_sample:
            verdicts = sampled_paths(grown, tokens, scores)
        else:
            found = torch.stack([tokens, scores.argmax(-1)]).cpu()  # one wait, and the paths on the host
            verdicts = [greedy_path(tree, found[0, i], found[1, i]) for i, tree in enumerate(trees)]
        kls = [self._path_divergences(grown, i, path, scores[i]) for i, (path, _) in enumerate(verdicts)]
        verified = time.perf_counter()

        for i, (row, tree, rule) in enumerate(zip(self.rows, trees, rules, strict=True)):
            path, record = verdicts[i][0], row.trace.rounds[-1]
            record.window, record.accepted, record.draft_ids = len(tree.tokens), len(path), tree.tokens
            record.parents, record.kl = tree.parents, kls[i]
            record.draft_steps = max((level + 1 for level, _ in tree.expanded.values()), default=0)
            record.draft_seconds, record.verify_seconds = drafted - started, verified - drafted
            rule.update(record.draft_steps, record.window, record.accepted)
            update_window_rule(row.rule, tree, path, record)
            if rule.estimates is not row.rule:
                update_window_rule(rule.estimates, tree, path, record)
        self.costs.observe_verification(tokens.shape[1] - 1, verified - drafted)

        # As chains: the accepted path stands for its row, in the caches too.
        most = max(len(path) for path, _ in verdicts)
        padded = [[*path, *range(len(path), most)] for path, _ in verdicts]
        paths = to_device(padded, device).view(len(trees), most)
        self.target.gather_paths(tokens.shape[1] - 1, paths)
        order = torch.nn.functional.pad(paths + 1, (1, 0))  # [B, most + 1], the last committed token first
        if states is not None:
            index = order.to(states.device)[..., None].expand(-1, -1, states.shape[-1])
            states = states.gather(1, index)
        return Verdict(
            drafts=[[tree.tokens[node] for node in path] for tree, (path, _) in zip(trees, verdicts, strict=True)],
            states=states,
            columns=tokens.shape[1],
            kept=[len(path) for path, _ in verdicts],
            following=[following for _, following in verdicts],
            logits=[logits[i, order[i]] for i in range(len(trees))] if self.endings.records else logits,
            scores=[scores[i, order[i]] for i in range(len(trees))] if self.endings.records else scores,
        )

    def _path_divergences(self, grown: GrownTrees, i: int, path: list[int], scores: torch.Tensor) -> list[float]:
        """KL(P||Q) in nats behind the context and the accepted nodes, where the drafter was asked."""
        nodes = [node for node in (CONTEXT, *path) if node in grown.trees[i].expanded]
        if not nodes:
            return []
        return divergences(scores[[node + 1 for node in nodes]], grown.draft_scores(i, nodes)).tolist()


def greedy_path(tree: DraftTree, tokens: torch.Tensor, choices: torch.Tensor) -> tuple[list[int], int]:
    """Accepted path of a tree at T = 0 and the token behind it.

    `tokens`, `choices` `[N + 1 or more]` begin with the context's.
    """
    nodes = len(tree.tokens)
    parents = torch.tensor(tree.parents, dtype=torch.long)
    path = greedy_accepted_path(tokens[1 : nodes + 1], parents, choices[0], choices[1 : nodes + 1])
    return path, int(choices[path[-1] + 1 if path else 0])


def update_window_rule(rule: WindowRule, tree: DraftTree, path: list[int], record: RoundTrace) -> None:
    """Tell a window rule what became of the tree's main chain, the window that it would have drafted alone."""
    window = 0
    for position, node in enumerate(chain := tree.main_chain()):
        if not rule.include(position, tree.features[tree.parents[node]]):
            break
        window += 1
    accepted = 0
    while accepted < min(window, len(path)) and path[accepted] == chain[accepted]:
        accepted += 1
    rule.update(window, record.draft_steps, accepted, record.kl)


def divergences(target_scores: torch.Tensor, draft_scores: torch.Tensor) -> torch.Tensor:
    """KL(P||Q) in nats of scores `[..., V]` each: `[...]`, brought into [0, MAX_KL]."""
    found = kl_divergence(target_scores.log_softmax(-1), draft_scores.log_softmax(-1))
    return found.nan_to_num(MAX_KL, MAX_KL, 0.0).clamp(0.0, MAX_KL)


SETTINGS = ("window", "max_window", "cost_ratio", "verification_cost", "lookup", "tree_nodes", "tree_branches")


def generate(
    target: Any, drafter: Any, input_ids: torch.Tensor, streamer=None, tokenizer=None, stop_strings=None, **kwargs
):
    """`target.generate(input_ids, custom_generate=drafter.generate_with(...), **kwargs)` as a function.

    `kwargs` are those of `generate`, and the settings of a call: `window`, `max_window`, `cost_ratio`,
    `verification_cost`, `lookup`, `tree_nodes`, `tree_branches`.
    """
    settings = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
    options = {"streamer": streamer, "tokenizer": tokenizer, "stop_strings": stop_strings}
    decoding = drafter.generate_with(**options, **settings)
    return target.generate(input_ids, custom_generate=decoding, **kwargs)


__all__ = ["SpeculativeDecoding", "generate"]
