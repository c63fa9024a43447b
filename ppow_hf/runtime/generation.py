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

from .acceptance import divergence_on_support, exact_dtype, greedy_accepted_counts, rejection_sample_chain
from .compatibility import (
    check_call,
    check_inputs,
    check_processors,
    check_rotary_change,
    common_context_length,
    target_width,
)
from .configuration_ppow import call_settings, check_settings, warn_of_other_target
from .cost_model import make_costs
from .draft_session import UnreadTokens, now, to_device
from .draft_window import (
    Window,
    draw_tokens,
    known_length,
    learn_from_verdict,
    padded_drafts,
    read_and_draft,
    record_costs,
    with_looked_up_scores,
)
from .estimator import MAX_KL
from .rows import Endings, Row, ScoreProcessing, visible_tokens
from .target_session import COMPACT_AT, TargetSession
from .trace import GenerationTrace, RoundTrace
from .trees import CONTEXT, DraftTree, GrownTrees, TreeRule, greedy_path, grow_trees, lay_out, sampled_paths
from .windowing import KLAdaptiveWindow, WindowRule, make_window_rule, rule_of_call, start_windows, text_limit

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
        if name.startswith("__") or "drafter" not in self.__dict__:  # asked by copy or pickle, of a half-built view
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.__dict__["drafter"], name)


class SpeculativeDecoding:
    """What [`PPOWDrafter.generate_with`] returns: a callable for `generate(custom_generate=...)`.

    At T = 0 each row's text is, in float32, what plain `generate` writes for that prompt alone; at T > 0 it has the
    same distribution. Logits processors and stopping criteria see a row as they would see it alone (`[1, n]`, without
    padding), processors of length only the padded row. The record of a call is `last_traces` (a row each) and
    `last_trace` (the first's).

    Args:
        drafter ([`DrafterView`]): the drafter, with the window settings of its calls.
        streamer (`BaseStreamer`, *optional*): one prompt only. May be given to `generate` instead.
        tokenizer (*optional*), stop_strings (`str` or `list[str]`, *optional*):
            texts that end a row. May be given to `generate` instead.
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
        self.streamer, self.tokenizer = streamer, tokenizer
        self.criteria = [] if stop_strings is None else [StopStringCriteria(tokenizer, stop_strings)]

    def with_given(self, given: dict[str, Any]) -> dict[str, Any]:
        """What `generate` was given for its decoding loop, with what was given here; raises where both were."""
        if self.streamer is not None and given.get("streamer") is not None:
            raise ValueError("streamer: given to generate and to generate_with. Give it to one of them.")
        if given.get("tokenizer") is None:
            return given | {"tokenizer": self.tokenizer}
        warn_of_other_target(self.view.drafter.config, tokenizer=given["tokenizer"])
        return given

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
        if model_kwargs.pop("synced_gpus", None):
            raise ValueError(
                "synced_gpus: the target is sharded over several processes (FSDP or DeepSpeed ZeRO-3), whose forwards "
                "must go in step, and this loop's number of them depends on the text. Generate without a drafter."
            )
        model_kwargs.pop("tokenizer", None)  # for stop strings, of which generate has made a criterion
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
class DraftedChains:
    """The chains of a round.

    Args:
        draft_ids (`[B, W]`): the draft tokens, those from the text included.
        valid (`[B, W]` bool): which of them belong to a row's window; the others fill it up.
        scores: W of `[B, V]` that they are verified by (where sampling).
        drawn_scores: of `[B, V]`, the drafter's alone.
    """

    draft_ids: torch.Tensor
    valid: torch.Tensor
    scores: list[torch.Tensor]
    drawn_scores: list[torch.Tensor]


@dataclass
class Verdict:
    """What a round's target forward said, row by row, as chains: a tree's accepted path stands for its row.

    Args:
        drafts (`list[list[int]]`): the draft tokens, of which the first `accepted_counts` were accepted.
        states (`[B, T, 3*h]`, *optional*): the target's, of the last committed token and the draft tokens after it.
        columns (`int`): columns that the forward added to the target's cache, the accepted ones in front.
        accepted_counts (`list[int]`), next_ids (`list[int]`): accepted tokens, and the token after them.
        logits, scores: of each row, `[at least accepted + 1, V]`.
    """

    drafts: list[list[int]]
    states: torch.Tensor | None
    columns: int
    accepted_counts: list[int]
    next_ids: list[int]
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
        view.drafter.attach_target(target)
        check_processors(logits_processor)
        check_outputs(generation_config)
        check_inputs(input_ids, model_kwargs.pop("inputs_embeds", None))
        if streamer is not None and len(input_ids) > 1:
            raise ValueError(f"streamer: {len(input_ids)} prompts given, but a streamer shows one. Pass one prompt.")
        self.view, self.config = view, view.drafter.config
        self.input_ids, self.device, self.streamer = input_ids, input_ids.device, streamer
        self.do_sample = bool(generation_config.do_sample)
        self.process = ScoreProcessing(logits_processor, input_ids)
        context_length = common_context_length(target.config, self.config)
        self.endings = Endings(stopping_criteria, generation_config, input_ids, context_length)

        settings = call_settings(self.config, view.settings)
        self.costs = make_costs(
            settings["cost_ratio"], settings["verification_cost"], self.config.calibration, self.config.one_step
        )
        self.lookup, self.trees = settings["lookup"], view.settings.get("tree_nodes") is not None
        self.target = self._open_target(target, generation_config, model_kwargs)
        self.session = view.drafter.start_session(target_width(target))
        self.rows = self._make_rows(settings)
        self.tree_rules = {row.place: self._tree_rule(row.rule) for row in self.rows} if self.trees else {}
        # Whether the rules, or the trace, look at the drafter's distributions.
        self.looks = view.record or any(row.rule.reads_distributions for row in self.rows)
        self.everyone = list(self.rows)
        view.last_traces = [row.trace for row in self.rows]
        view.last_trace = view.drafter.last_trace = view.last_traces[0]
        view.drafter.last_traces = view.last_traces

    def _open_target(self, target: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> TargetSession:
        mask = model_kwargs.pop("attention_mask", None)
        position_ids = model_kwargs.pop("position_ids", None)
        cache = model_kwargs.pop("cache", None)
        old_name_cache = model_kwargs.pop("past_key_values", None)
        extra_inputs = {
            name: value
            for name, value in model_kwargs.items()
            if value is not None and name not in ("use_cache", "cache_position", "logits_to_keep")
        }
        visible = visible_tokens(self.input_ids, mask, getattr(generation_config, "_mask_length", None))
        new_tokens = self.endings.max_length and self.endings.max_length - self.input_ids.shape[1]
        check_rotary_change(target, visible.sum(1).tolist(), new_tokens)
        return TargetSession(
            target,
            self.config.target_layer_ids,
            self.input_ids,
            visible,
            old_name_cache if cache is None else cache,
            extra_inputs,
            self.trees,
            position_ids,
        )

    def _make_rows(self, settings: dict[str, Any]) -> list[Row]:
        rows = []
        paddings = (~self.target.visible).sum(1).tolist()
        for place, (ids, padding) in enumerate(zip(self.input_ids.tolist(), paddings, strict=True)):
            rule = rule_of_call(self.config, settings, self.costs, self.do_sample)
            rows.append(Row(place, padding, ids[padding:], rule, GenerationTrace(window_rule=settings["window"])))
        return rows

    def _tree_rule(self, rule: WindowRule) -> TreeRule:
        nodes = self.view.settings["tree_nodes"]
        branches = self.view.settings.get("tree_branches", TREE_BRANCHES)
        estimates: Any = rule
        if not isinstance(rule, KLAdaptiveWindow):
            estimates = make_window_rule(
                "kl",
                rule.max_window,
                self.costs,
                self.config.calibration,
                self.do_sample,
                confidence_head=self.config.confidence_head,
            )
        return TreeRule(rule, estimates, self.costs, nodes, branches, self.do_sample)

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
        first_ids = tokens[:, 0].tolist()
        seconds = time.perf_counter() - started  # the tokens are here: the device has finished
        for i, (row, token) in enumerate(zip(self.rows, first_ids, strict=True)):
            row.trace.rounds.append(RoundTrace(0, 0, [], verify_seconds=seconds))
            self._commit(row, [token], logits[i], scores[i])
        first, past = self.view.drafter.draft_model.first_prefix, self.target.past
        if first:  # eagle: the token after each state; the row's own first token has no state before it
            unread_ids = torch.cat([self.input_ids[:, past:], tokens], dim=1)[:, 1:]
            visible = visible[:, past:]
            readable = torch.cat([visible, visible.new_ones(len(self.rows), 1)], dim=1)[:, 1:] & visible
        else:
            unread_ids = torch.cat([self.input_ids, tokens], dim=1)
            readable = torch.cat([visible, visible.new_ones(len(self.rows), 1)], dim=1)
        self.unread = UnreadTokens(
            unread_ids, states, readable if self.target.ragged else None, past + 1 if first else 0
        )
        self._drop_finished()

    def _round(self) -> None:
        """Draft for each row, verify all in one target forward, commit what was accepted and one token more."""
        started = time.perf_counter()
        for row in self.rows:
            row.rule.read(row.ids[row.read :])
            row.read = len(row.ids)
            row.room = self.endings.room_of(row)
            row.trace.rounds.append(RoundTrace(0, 0, []))
        limits = start_windows([row.rule for row in self.rows], [row.room for row in self.rows])
        for row, limit in zip(self.rows, limits, strict=True):
            row.limit = limit
        drafts_trees = self.trees and any(row.limit for row in self.rows)
        verdict = self._tree_round(started) if drafts_trees else self._chain_round(started)
        self._keep(verdict, self._commit_rows(verdict))
        records = [row.trace.rounds[-1] for row in self.rows]
        self._drop_finished()
        seconds = time.perf_counter() - started
        for record in records:
            record.seconds = seconds

    def _commit_rows(self, verdict: Verdict) -> list[list[int]]:
        """Each row's committed tokens; after a row's end nothing is read any more, its last token included."""
        committed = []
        for i, (row, accepted) in enumerate(zip(self.rows, verdict.accepted_counts, strict=True)):
            record_costs(row.trace, row.rule)
            tokens = [*verdict.drafts[i][:accepted], verdict.next_ids[i]]
            count = self._commit(row, tokens, verdict.logits[i], verdict.scores[i])
            committed.append(tokens[:count])
        return committed

    def _commit(self, row: Row, tokens: list[int], logits: torch.Tensor, scores: torch.Tensor) -> int:
        committed = self.endings.commit(row, tokens, logits, scores)
        if self.streamer is not None:
            self.streamer.put(torch.tensor(tokens[:committed]))
        record = row.trace.rounds[-1]
        record.accepted = min(record.accepted, committed - 1)
        return committed

    def _keep(self, verdict: Verdict, committed: list[list[int]]) -> None:
        """Leave in the target's cache what was committed, and let the drafter read it before it drafts next."""
        most = max(map(len, committed)) - 1
        counts = to_device([len(tokens) - 1 for tokens in committed], self.device)
        self.target.keep(verdict.columns, counts, most)
        padded = [tokens + [0] * (most + 1 - len(tokens)) for tokens in committed]
        self.unread.add(to_device(padded, self.device), verdict.states, counts, most)

    def _drop_finished(self) -> None:
        staying = [i for i, row in enumerate(self.rows) if not row.finished]
        if not staying:
            self.rows = []
            return
        if len(staying) < len(self.rows):
            self.rows = [self.rows[i] for i in staying]
            rows = to_device(staying, self.device)
            self.target.keep_rows(rows)
            if not self.session.is_empty:
                self.session.keep_rows(rows.to(self.view.drafter.device))
            self.unread.keep_rows(rows)
        self.target.compact()
        if self.session.waste > COMPACT_AT:
            self.session.compact()

    # -- a round that drafts chains

    def _chain_round(self, started: float) -> Verdict:
        chains = self._draft_chains()
        window = chains.draft_ids.shape[1]
        drafted = time.perf_counter()

        last_ids = to_device([[row.ids[-1]] for row in self.rows], self.device)
        logits, states = self.target.read_window(torch.cat([last_ids, chains.draft_ids], dim=1), chains.valid)
        drafts = [row.trace.rounds[-1].draft_ids for row in self.rows]
        scores = self.process(logits, self.rows, lambda i, t: drafts[i][:t])
        if self.do_sample:
            counts, next_ids = self._verify_sampled(chains, scores)
        else:
            choices = scores.argmax(-1)
            counts = greedy_accepted_counts(chains.draft_ids, choices[:, :window], chains.valid)
            next_ids = choices.gather(1, counts[:, None])[:, 0]
        kls, outsides = self._chain_divergences(chains, scores)
        accepted_counts, following = torch.stack([counts, next_ids]).tolist()
        verified = time.perf_counter()

        for row, accepted, row_kls, row_outsides in zip(self.rows, accepted_counts, kls, outsides, strict=True):
            record = row.trace.rounds[-1]
            record.draft_seconds, record.verify_seconds = drafted - started, verified - drafted
            learn_from_verdict(row.rule, record, accepted, row_kls, row_outsides)
        self.costs.observe_verification(window, verified - drafted)
        return Verdict(drafts, states, window + 1, accepted_counts, following, logits, scores)

    def _draft_chains(self) -> DraftedChains:
        """Each row's window from the drafter, and after it from the text where look-up is on."""
        eos = self.endings.eos if self.looks else set()  # unseen, a chain ends by its length alone
        windows = [
            Window(row.rule, row.trace.rounds[-1], row.limit, lambda draft_ids: draft_ids[-1] in eos)
            for row in self.rows
        ]
        tokens, drawn_scores = [self.input_ids.new_zeros(len(self.rows), 0)], []
        if any(row.limit for row in self.rows):
            distributions = read_and_draft(
                self.unread,
                self.session,
                windows,
                self.costs,
                lambda logits, drafts: self.process.process_after(logits, self.rows, drafts),
                draw_tokens if self.do_sample else None,
                self.looks,
                draws_first=True,
                # Drawn ahead of an end of text, random numbers would be others than those drawn token by token.
                ahead=known_length(windows) if self.process.memoryless and not (eos and self.do_sample) else 1,
            )
            tokens, drawn_scores = tokens + distributions.tokens, distributions.scores
        draft_ids, scores = torch.cat(tokens, dim=1), drawn_scores
        if self.lookup:
            rooms = [row.room for row in self.rows]
            longest = text_limit([row.rule for row in self.rows], [w.record.draft_ids for w in windows], rooms)
            for window, room in zip(windows, rooms, strict=True):
                window.look_up(min(room, longest))
            if any(window.record.looked_up for window in windows):
                draft_ids = padded_drafts(windows, self.device)
                if self.do_sample:
                    scores = with_looked_up_scores(windows, drawn_scores, self.session.width, self.device)
        lengths = to_device([window.record.window for window in windows], self.device)
        valid = torch.arange(draft_ids.shape[1], device=self.device) < lengths[:, None]
        return DraftedChains(draft_ids, valid, scores, drawn_scores)

    def _choose(self, scores: torch.Tensor) -> torch.Tensor:
        """`[B, 1, V]` -> `[B, 1]`."""
        if self.do_sample:
            return torch.multinomial(scores[:, 0].softmax(-1), 1)
        return scores[:, 0].argmax(-1, keepdim=True)

    def _verify_sampled(self, chains: DraftedChains, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, window = chains.draft_ids.shape
        if window:
            draft_probs = torch.stack(chains.scores, dim=1).softmax(-1)
        else:
            draft_probs = scores.new_zeros(batch, 0, scores.shape[-1])
        uniforms = torch.rand(batch, window + 1, device=scores.device, dtype=exact_dtype(scores.device))
        return rejection_sample_chain(
            chains.draft_ids, draft_probs, scores.softmax(-1), uniforms[:, :window], uniforms[:, window], chains.valid
        )

    def _chain_divergences(
        self, chains: DraftedChains, scores: torch.Tensor
    ) -> tuple[list[list[float]], list[list[float]]]:
        """What [`divergences`] says of each row's drafted positions; nothing where nothing looks at them."""
        if not chains.drawn_scores or not self.looks:
            return [[] for _ in self.rows], [[] for _ in self.rows]
        draft_scores = torch.stack(chains.drawn_scores, dim=1)
        return divergences(scores[:, : len(chains.drawn_scores)], draft_scores)

    # -- a round that drafts trees

    def _tree_round(self, started: float) -> Verdict:
        grown = self._grow_trees(started)
        trees = grown.trees
        drafted = time.perf_counter()

        tokens, depths, seen = lay_out(trees, [row.ids[-1] for row in self.rows], self.device)
        logits, states = self.target.read_tree(tokens, depths, seen)
        scores = self.process(
            logits, self.rows, lambda i, t: trees[i].path_tokens(t - 1) if 0 < t <= len(trees[i].tokens) else []
        )
        if self.do_sample:
            ends = sampled_paths(grown, tokens, scores)
        else:
            found = torch.stack([tokens, scores.argmax(-1)]).cpu()  # one wait, and the paths on the host
            ends = [greedy_path(tree, found[0, i], found[1, i]) for i, tree in enumerate(trees)]
        paths, next_ids = [path for path, _ in ends], [token for _, token in ends]
        path_divergences = [self._path_divergences(grown, i, path, scores[i]) for i, path in enumerate(paths)]
        verified = time.perf_counter()

        for row, tree, path, row_divergences in zip(self.rows, trees, paths, path_divergences, strict=True):
            record, rule = row.trace.rounds[-1], self.tree_rules[row.place]
            record.window, record.accepted, record.draft_ids = len(tree.tokens), len(path), tree.tokens
            record.parents, (record.kl, record.outside) = tree.parents, row_divergences
            levels = max((level + 1 for level, _ in tree.expanded.values()), default=0)
            record.draft_steps = int(self.costs.model.draft_steps(levels))
            record.draft_seconds, record.verify_seconds = drafted - started, verified - drafted
            rule.update(levels, record.window, record.accepted)
            update_window_rule(row.rule, tree, path, record)
            if rule.estimates is not row.rule:
                update_window_rule(rule.estimates, tree, path, record)
        self.costs.observe_verification(tokens.shape[1] - 1, verified - drafted)
        return self._as_chains(trees, paths, next_ids, logits, scores, states)

    def _grow_trees(self, started: float) -> GrownTrees:
        first_read = self.session.is_empty
        self.unread.read(self.session)
        begun = now(self.view.drafter.device) if first_read else started  # reading the prompt is no draft step
        grown = grow_trees(
            self.session,
            [self.tree_rules[row.place] for row in self.rows],
            [row.limit for row in self.rows],
            lambda logits, paths: self.process(
                logits.to(self.device), self.rows, lambda i, t: paths[i][t] if t < len(paths[i]) else []
            ),
            self.endings.eos,
        )
        steps = 1 if self.session.one_step else len(grown.level_scores) - first_read
        self.costs.observe_drafting(steps, time.perf_counter() - begun)
        return grown

    def _as_chains(
        self,
        trees: list[DraftTree],
        paths: list[list[int]],
        next_ids: list[int],
        logits: torch.Tensor,
        scores: torch.Tensor,
        states: torch.Tensor | None,
    ) -> Verdict:
        """The accepted path of each tree stands for its row, in the target's cache too."""
        most = max(map(len, paths))
        padded = [[*path, *range(len(path), most)] for path in paths]
        nodes = to_device(padded, self.device).view(len(trees), most)
        columns = scores.shape[1]
        self.target.gather_paths(columns - 1, nodes)
        order = torch.nn.functional.pad(nodes + 1, (1, 0))  # [B, most + 1], the last committed token first
        if states is not None:
            index = order.to(states.device)[..., None].expand(-1, -1, states.shape[-1])
            states = states.gather(1, index)
        records = self.endings.records
        return Verdict(
            drafts=[[tree.tokens[node] for node in path] for tree, path in zip(trees, paths, strict=True)],
            states=states,
            columns=columns,
            accepted_counts=[len(path) for path in paths],
            next_ids=next_ids,
            logits=[logits[i, order[i]] for i in range(len(trees))] if records else logits,
            scores=[scores[i, order[i]] for i in range(len(trees))] if records else scores,
        )

    def _path_divergences(
        self, grown: GrownTrees, i: int, path: list[int], scores: torch.Tensor
    ) -> tuple[list[float], list[float]]:
        """What [`divergences`] says after the context and the accepted nodes, where the drafter was asked."""
        nodes = [node for node in (CONTEXT, *path) if node in grown.trees[i].expanded]
        if not nodes:
            return [], []
        return divergences(scores[[node + 1 for node in nodes]], grown.draft_scores(i, nodes))


def check_outputs(generation_config: GenerationConfig) -> None:
    """Raise `ValueError` where a call wants something back that this loop does not keep."""
    for name in ("output_hidden_states", "output_attentions"):
        if generation_config.return_dict_in_generate and getattr(generation_config, name):
            raise ValueError(
                f"{name}: this loop returns scores and logits, but neither hidden states nor attentions. Leave it "
                "out, or generate without a drafter."
            )


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
    rule.update(window, record.draft_steps, accepted, record.kl_with_outside)


def divergences(target_scores: torch.Tensor, draft_scores: torch.Tensor) -> tuple[Any, Any]:
    """KL(P_D||Q) in nats, brought into [0, MAX_KL], and the mass of P outside D, see [`divergence_on_support`].

    Scores `[..., V]` each -> lists of the shape `[...]`.
    """
    nats, outside = divergence_on_support(target_scores, draft_scores)
    nats = nats.nan_to_num(MAX_KL, MAX_KL, 0.0).clamp(0.0, MAX_KL)
    found = torch.stack([nats, outside.to(nats)]).tolist()
    return found[0], found[1]


__all__ = ["SpeculativeDecoding"]
