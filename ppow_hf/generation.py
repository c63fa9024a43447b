"""Our own draft-verify loop: batches of prompts, ragged acceptance, one trace a row.

`target.generate(**inputs, custom_generate=drafter.generate_with())` runs it; so does `assistant_model=drafter` with
more than one prompt, where transformers' assisted loop ends. Knows targets, drafters and their caches; trains nothing.

Rows of a batch share one cache. Draft tokens that were rejected stay in it unseen (attention_mask 0, explicit
position_ids) until they are too many, when the cache is compacted; rows that are finished leave the batch.
"""

import copy
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria
from transformers.generation import logits_process as processors

from .acceptance import greedy_accepted_counts, rejection_sample_chain
from .drafting import DrafterView, cache_argument, compacting_columns, gather_columns, rearrange_cache
from .modeling_ppow import collect_target_states
from .trace import GenerationTrace, RoundTrace
from .windowing import MAX_KL, AcceptanceEstimator, CostModel, FixedWindow, OnlineCosts, WindowRule, make_window_rule

# Processors that look at the scores alone: one call for all rows and positions.
MEMORYLESS = (
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
    processors.MinPLogitsWarper,
    processors.TypicalLogitsWarper,
    processors.EpsilonLogitsWarper,
    processors.EtaLogitsWarper,
    processors.SuppressTokensLogitsProcessor,
    processors.LogitNormalization,
    processors.InfNanRemoveLogitsProcessor,
)
# Processors that look at the length alone, which the caller gave for the padded prompt.
LENGTH_ONLY = (
    processors.MinLengthLogitsProcessor,
    processors.MinNewTokensLengthLogitsProcessor,
    processors.ForcedBOSTokenLogitsProcessor,
    processors.ForcedEOSTokenLogitsProcessor,
    processors.ExponentialDecayLengthPenalty,
    processors.SuppressTokensAtBeginLogitsProcessor,
)
COMPACT_AT = 0.25  # share of a cache's columns that no row can see


@dataclass
class Row:
    """One prompt of the batch on its way.

    Args:
        place (`int`): its row in the caller's batch.
        padding (`int`): columns of padding on the left of its prompt.
        ids (`list[int]`): its own tokens, prompt and continuation, without padding.
        rule ([`WindowRule`]), trace ([`GenerationTrace`]): its own.
        new_tokens (`int`): tokens generated.
        limit (`int`): longest window of this round.
    """

    place: int
    padding: int
    ids: list[int]
    rule: WindowRule
    trace: GenerationTrace
    new_tokens: int = 0
    limit: int = 0
    finished: bool = False
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


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
        settings: `window`, `max_window`, `cost_ratio`, `verification_cost`, see [`PPOWDrafter.with_settings`].
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


class SpeculativeCall:
    """One call of the loop: the rows, the target's cache, the drafter's session."""

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
        from .candidate_generator import check_call, common_context_length, target_width

        check_call(target, view, generation_config)
        self.target, self.view, self.config = target, view, view.drafter.config
        self.generation_config, self.streamer = generation_config, streamer
        self.do_sample = bool(generation_config.do_sample)
        self.processors = list(logits_processor)
        self._row_processors: dict[int, list[Any]] = {}
        self.memoryless = all(isinstance(p, MEMORYLESS) for p in self.processors)
        self.eos = {t for c in stopping_criteria if type(c) is EosTokenCriteria for t in c.eos_token_id.tolist()}
        self.other_criteria = [c for c in stopping_criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        limits = [c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria]
        self.max_length = min([limit for limit in (generation_config.max_length, *limits) if limit], default=None)
        self.context_length = common_context_length(target.config, self.config)

        batch, self.prompt_length = input_ids.shape
        if streamer is not None and batch > 1:
            raise ValueError(f"streamer: {batch} prompts given, but a streamer shows one. Pass one prompt.")
        mask = model_kwargs.pop("attention_mask", None)
        model_kwargs.pop("position_ids", None)
        cache = model_kwargs.pop("cache", None)
        old_name_cache = model_kwargs.pop("past_key_values", None)
        cache = old_name_cache if cache is None else cache
        self.visible = self._check_mask(input_ids, mask)  # [B, columns of the target's cache], bool
        self.positions = self.visible.sum(1)  # [B]: position of the token behind everything in the cache
        self.input_ids = input_ids
        self.ragged = batch > 1 or not bool(self.visible.all())
        past = cache.get_seq_length() if cache is not None else 0
        self._check_cache(cache, past, batch)
        self.past = past if 0 < past < self.prompt_length else 0
        self.cache: Any = cache if self.past or not self._needs_own_cache() else DynamicCache()
        if self.cache is None:
            self.cache = DynamicCache()
        if hasattr(self.cache, "activate_past_recording"):
            self.cache.activate_past_recording()
        self.extra_inputs = {
            name: value
            for name, value in model_kwargs.items()
            if value is not None and name not in ("use_cache", "cache_position", "logits_to_keep")
        }
        forward = inspect.signature(target.forward).parameters
        self.takes = {name: name in forward for name in ("position_ids", "logits_to_keep", "attention_mask")}
        self.session = view.drafter.start_session(target_width(target))
        self.rows = self._make_rows(input_ids)
        self.everyone = list(self.rows)
        view.last_traces = [row.trace for row in self.rows]
        view.last_trace = view.drafter.last_trace = view.last_traces[0]
        view.drafter.last_traces = view.last_traces

    # -- what is checked and set up before anything is computed

    def _check_mask(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        left_out = getattr(self.generation_config, "_mask_length", None)  # of a mask of ones, which generate drops
        if mask is None and left_out is not None and left_out != input_ids.shape[1]:
            raise ValueError(
                f"attention_mask: {left_out} entries given for {input_ids.shape[1]} tokens. Pass one for each token "
                "(with a cache, the whole sequence as input_ids: the drafter has not read the tokens in the cache)."
            )
        if mask is None:
            return torch.ones_like(input_ids, dtype=torch.bool)
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask: shape {tuple(mask.shape)} given for input_ids of shape {tuple(input_ids.shape)}. "
                "Pass a mask of 0 and 1 for each prompt token (and, with a cache, the whole sequence as input_ids)."
            )
        mask = mask.bool()
        if not bool(mask[:, -1].all()) or bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise ValueError(
                "attention_mask: a prompt is padded on the right, or has a hole. Pad prompts on the left "
                '(tokenizer.padding_side = "left").'
            )
        return mask

    def _check_cache(self, cache: Any, past: int, batch: int) -> None:
        text = self.target.config.get_text_config()
        kinds = set(getattr(text, "layer_types", None) or [])
        if any("linear" in kind or kind in ("mamba", "recurrent", "conv") for kind in kinds) or getattr(
            self.target, "_is_stateful", False
        ):
            raise ValueError(
                f"{type(self.target).__name__} keeps a recurrent state, which cannot take back rejected draft tokens. "
                "Generate without a drafter."
            )
        if past and batch > 1:
            raise ValueError("past_key_values: a filled cache can be gone on from with one prompt only, not a batch.")
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(
                f"cache_implementation: a {type(cache).__name__} was given, but rejected draft tokens are taken back "
                "from a dynamic cache. Leave out cache_implementation and past_key_values."
            )

    def _needs_own_cache(self) -> bool:
        """Layers that drop what slid out of their window count columns, holes too: keep all, and mask by position."""
        return self.ragged and self._sliding_window() is not None

    def _sliding_window(self) -> int | None:
        text = self.target.config.get_text_config()
        if getattr(text, "use_sliding_window", True) is False:
            return None
        kinds = getattr(text, "layer_types", None)
        if kinds is not None and not any("sliding" in kind for kind in kinds):
            return None
        return getattr(text, "sliding_window", None)

    def _make_rows(self, input_ids: torch.Tensor) -> list[Row]:
        settings = {
            name: self.view.settings.get(name, getattr(self.config, name))
            for name in ("window", "max_window", "cost_ratio", "verification_cost")
        }
        stored = (self.config.calibration or {}).get("costs") or {}
        prior = CostModel(stored.get("cost_ratio", 0.12), stored.get("verification_cost", 0.04))
        self.costs = OnlineCosts(settings["cost_ratio"], settings["verification_cost"], prior)
        rows = []
        for place, (ids, padding) in enumerate(zip(input_ids.tolist(), (~self.visible).sum(1).tolist(), strict=True)):
            rule = make_window_rule(
                settings["window"], settings["max_window"], self.costs, self.config.calibration, self.do_sample
            )
            rows.append(Row(place, padding, ids[padding:], rule, GenerationTrace(window_rule=settings["window"])))
        return rows

    # -- the loop

    def run(self):
        self._prefill()
        while self.rows:
            self._round()
        if self.streamer is not None:
            self.streamer.end()
        return self._result()

    def _prefill(self) -> None:
        """The target reads the prompts and gives each row its first token."""
        started = time.perf_counter()
        unread = self.input_ids[:, self.past :]
        logits, states = self._forward(unread, self.visible, self._prompt_positions(), only_last=True)
        scores = self._process(logits, [[] for _ in self.rows])
        tokens = self._choose(scores)
        seconds = time.perf_counter() - started
        visible = self.visible[:, self.past :]
        for row, token, row_logits, row_scores in zip(self.rows, tokens[:, 0].tolist(), logits, scores, strict=True):
            row.trace.rounds.append(RoundTrace(0, 0, [], verify_seconds=seconds))
            self._commit(row, [token], row_logits, row_scores)
        first = self.view.drafter.draft_model.first_prefix
        if first:  # eagle: the token behind each state; the row's own first token has no state before it
            read = torch.cat([unread, tokens], dim=1)[:, 1:]
            own = torch.cat([visible, visible.new_ones(len(self.rows), 1)], dim=1)[:, 1:] & visible
        else:
            read = torch.cat([self.input_ids, tokens], dim=1)
            own = torch.cat([self.visible, visible.new_ones(len(self.rows), 1)], dim=1)
        self._to_observe = (read, states, own if self.ragged else None, self.past + 1 if first else 0)
        self._drop_finished()

    def _round(self) -> None:
        started = time.perf_counter()
        batch = len(self.rows)
        longest = 0
        for row in self.rows:
            row.limit = row.rule.start(self._room(row))
            longest = max(longest, row.limit)
            row.trace.rounds.append(RoundTrace(0, 0, []))
        if longest:
            draft_ids, draft_scores, valid = self._draft(longest)
        else:
            draft_ids = self.input_ids.new_zeros(batch, 0)
            draft_scores, valid = None, torch.zeros(batch, 0, dtype=torch.bool, device=draft_ids.device)
        window = draft_ids.shape[1]
        drafted = time.perf_counter()

        last = torch.tensor([[row.ids[-1]] for row in self.rows], device=self.input_ids.device)
        tokens = torch.cat([last, draft_ids], dim=1)
        seen = torch.cat([self.visible, self.visible.new_ones(batch, 1), valid], dim=1)
        positions = self.positions[:, None] + torch.arange(window + 1, device=tokens.device)
        logits, states = self._forward(tokens, seen, positions)
        drafts = draft_ids.tolist()
        scores = self._process(logits, drafts)
        if self.do_sample:
            counts, following = self._verify_sampled(draft_ids, draft_scores, scores, valid)
        else:
            choices = scores.argmax(-1)
            counts = greedy_accepted_counts(draft_ids, choices[:, :window], valid)
            following = choices.gather(1, counts[:, None])[:, 0]
        divergences = self._divergences(scores, draft_scores)
        kept, nexts = counts.tolist(), following.tolist()
        verified = time.perf_counter()

        own_windows = valid.sum(1).tolist()
        for i, row in enumerate(self.rows):
            record = row.trace.rounds[-1]
            record.window, record.accepted, record.draft_ids = own_windows[i], kept[i], drafts[i][: own_windows[i]]
            record.draft_seconds, record.verify_seconds = drafted - started, verified - drafted
            if divergences is not None:
                record.kl = divergences[i][: min(kept[i] + 1, own_windows[i])]
            row.rule.update(record.window, record.draft_steps, record.accepted, record.kl)
            row.trace.speculation_pays = row.rule.pays
            self._commit(row, [*drafts[i][: kept[i]], nexts[i]], logits[i], scores[i])
        self.costs.observe_verification(window, verified - drafted)
        costs = self.costs.model
        for row in self.rows:
            row.trace.cost_ratio, row.trace.verification_cost = costs.cost_ratio, costs.verification_cost
        self._advance(tokens, states, counts, following)
        self._drop_finished()

    def _draft(self, longest: int) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Draft tokens `[B, W]`, their processed logits (W of `[B, V]`) and which are a row's own `[B, W]`."""
        read, states, own, start = self._to_observe
        started = time.perf_counter()
        first_read = self.session.is_empty
        self.session.observe(read, states, start, own)
        self._to_observe = (read[:, :0], None, None, start)
        if first_read:
            started = time.perf_counter()  # reading the prompt is no draft step
        logits = self.session.first_logits()
        looks = any(type(row.rule) is not FixedWindow for row in self.rows) or self.view.record
        batch, device = len(self.rows), self.input_ids.device
        active = [row.limit > 0 for row in self.rows]
        drawn: list[torch.Tensor] = []
        kept_scores: list[torch.Tensor] = []
        valid: list[list[bool]] = []
        drafts: list[list[int]] = [[] for _ in self.rows]
        steps = 1
        while True:
            position = len(drawn)
            scores = self._process(logits.float().to(device)[:, None], drafts)[:, 0]
            log_probs = scores.log_softmax(-1)
            token = (
                torch.multinomial(log_probs.exp().nan_to_num(1.0), 1) if self.do_sample else log_probs.argmax(-1, True)
            )
            if looks:
                entropy = -(log_probs.exp() * log_probs.clamp_min(-1e4)).sum(-1)
                looked = torch.stack(
                    [log_probs.amax(-1).exp().double(), entropy.double(), token[:, 0].double()]
                ).tolist()
            own_here = []
            for i, row in enumerate(self.rows):
                record = row.trace.rounds[-1]
                record.draft_steps = max(record.draft_steps, steps) if active[i] else record.draft_steps
                if active[i] and looks:
                    features = AcceptanceEstimator.features(looked[0][i], looked[1][i], row.rule.lagged_kl, position)
                    active[i] = looked[0][i] > 0 and row.rule.include(position, features)  # NaN: nothing to draw from
                    if active[i]:
                        record.features.append(features)
                        if hasattr(row.rule, "acceptance_probability"):
                            record.acceptance_probabilities.append(row.rule.acceptance_probability(features))
                own_here.append(active[i])
                if active[i] and looks:
                    drafts[i].append(int(looked[2][i]))
                    if drafts[i][-1] in self.eos:
                        active[i] = False
                if active[i] and (position + 1 >= row.limit or not row.rule.go_on(position + 1)):
                    active[i] = False
            if not any(own_here):
                break
            drawn.append(token)
            kept_scores.append(scores)
            valid.append(own_here)
            if not looks and not self.memoryless:
                for i, value in enumerate(token[:, 0].tolist()):
                    drafts[i].append(value)
            if not any(active):
                break
            logits = self.session.next_logits(token.to(logits.device), position)
            steps += 1
        if not first_read or steps > 1:
            self.costs.observe_drafting(steps - first_read, time.perf_counter() - started)
        if not drawn:
            return self.input_ids.new_zeros(batch, 0), [], torch.zeros(batch, 0, dtype=torch.bool, device=device)
        return torch.cat(drawn, dim=1), kept_scores, torch.tensor(valid, device=device).T

    # -- the target

    def _prompt_positions(self) -> torch.Tensor:
        return (self.visible.long().cumsum(1) - 1).clamp_min(0)[:, self.past :]

    def _forward(self, tokens, seen, positions, only_last: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits `[B, T, V]` in float32 and the drafter's states of new tokens behind the cache.

        `seen` `[B, columns]` tells which columns, the new ones included, are a row's own.
        """
        inputs = dict(self.extra_inputs)
        self.extra_inputs = {} if only_last else self.extra_inputs  # images and the like belong to the prompt
        window = self._sliding_window()
        if self.takes["attention_mask"]:
            if window is not None and self.ragged:
                inputs["attention_mask"] = self._masks(seen, positions, window)
            else:
                inputs["attention_mask"] = seen.long()
        if self.takes["position_ids"]:
            inputs["position_ids"] = positions
        if only_last and self.takes["logits_to_keep"]:
            inputs["logits_to_keep"] = 1
        layers = self.config.target_layer_ids
        outputs = self.target(
            input_ids=tokens,
            use_cache=True,
            return_dict=True,
            output_hidden_states=bool(layers),
            **{cache_argument(self.target): self.cache},
            **inputs,
        )
        logits = outputs.logits[:, -1:] if only_last else outputs.logits
        states = collect_target_states(outputs.hidden_states, layers)
        if states is not None:
            states = states.to(self.view.drafter.device)
        return logits.to(device=self.input_ids.device, dtype=torch.float32), states

    def _masks(self, seen: torch.Tensor, positions: torch.Tensor, window: int) -> Any:
        """Additive masks by position, where the target's own would count the columns of rejected tokens."""
        key_positions = (seen.long().cumsum(1) - 1)[:, None]  # [B, 1, columns]
        behind = torch.arange(seen.shape[1], device=seen.device) <= torch.arange(
            seen.shape[1] - positions.shape[1], seen.shape[1], device=seen.device
        ).unsqueeze(-1)
        full = behind[None] & seen[:, None]
        near = full & (positions[..., None] - key_positions < window)
        itself = torch.eye(positions.shape[1], seen.shape[1], dtype=torch.bool, device=seen.device).roll(
            seen.shape[1] - positions.shape[1], dims=1
        )

        def additive(allowed: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(allowed.shape, dtype=self.target.dtype, device=seen.device)
            return mask.masked_fill_(~(allowed | itself), torch.finfo(mask.dtype).min)[:, None]

        kinds = getattr(self.target.config.get_text_config(), "layer_types", None)
        if kinds is None or set(kinds) == {"sliding_attention"}:
            return additive(near)
        return {"full_attention": additive(full), "sliding_attention": additive(near)}

    def _advance(self, tokens, states, counts, following) -> None:
        """Caches and positions after a round: accepted tokens are seen, the others stay in the cache unseen."""
        width, most = tokens.shape[1], int(counts.max())
        if most + 1 < width:
            self.cache.crop(-(width - most - 1))
        elif hasattr(self.cache, "activate_past_recording"):
            self.cache.crop(0)
        arrived = torch.arange(most + 1, device=counts.device) <= counts[:, None]
        self.visible = torch.cat([self.visible, arrived], dim=1)
        self.positions = self.positions + counts + 1
        # What the drafter has not read: the accepted tokens and the one behind them, flush right.
        unread = torch.cat([tokens[:, 1:], following[:, None]], dim=1)  # the last is a place holder
        unread[torch.arange(len(counts), device=counts.device), counts] = following
        shift = torch.arange(most + 1, device=counts.device) - (most - counts)[:, None]  # [B, most + 1]
        own, source = shift >= 0, shift.clamp_min(0)
        read = unread.gather(1, source)
        if states is not None:
            source = source.to(states.device)
            states = states.gather(1, source[..., None].expand(-1, -1, states.shape[-1]))
        start: Any = self.positions - counts if self.ragged else int(self.positions[0] - counts[0])
        before, before_states, before_own, before_start = self._to_observe
        if before.shape[1]:  # rounds without a draft leave the drafter behind
            read, start = torch.cat([before, read], dim=1), before_start
            states = None if states is None else torch.cat([before_states, states], dim=1)
            own = torch.cat([before_own, own], dim=1) if self.ragged else own
        self._to_observe = (read, states, own if self.ragged else None, start)

    def _drop_finished(self) -> None:
        staying = [i for i, row in enumerate(self.rows) if not row.finished]
        if len(staying) < len(self.rows):
            self.rows = [self.rows[i] for i in staying]
            if not self.rows:
                return
            rows = torch.tensor(staying, device=self.input_ids.device)
            rearrange_cache(self.cache, lambda tensor: tensor[rows.to(tensor.device)])
            self.visible, self.positions = self.visible[rows], self.positions[rows]
            if not self.session.is_empty:
                self.session.keep_rows(rows.to(self.view.drafter.device))
            read, states, own, start = self._to_observe
            self._to_observe = (
                read[rows],
                None if states is None else states[rows.to(states.device)],
                None if own is None else own[rows],
                start if isinstance(start, int) else start[rows],
            )
        if self.ragged:
            if 1 - int(self.visible.sum(1).max()) / self.visible.shape[1] > COMPACT_AT:
                columns = compacting_columns(self.visible)
                rearrange_cache(self.cache, gather_columns(columns))
                self.visible = self.visible.gather(1, columns)
            if self.session.waste > COMPACT_AT:
                self.session.compact()

    # -- scores, verdicts, tokens

    def _process(self, logits: torch.Tensor, drafts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Processed scores of logits `[B, T, V]` that stand behind the rows and their drafts.

        With T = 1 the scores behind all of a row's draft; else behind its first 0, 1, ..., T - 1 tokens.
        """
        if not self.processors:
            return logits
        batch, length, width = logits.shape
        if self.memoryless:
            flat, ids = logits.reshape(-1, width), self.input_ids.new_zeros(batch * length, 1)
            for processor in self.processors:
                flat = processor(ids, flat)
            return flat.view(batch, length, width)
        scores = logits.clone()
        for i, row in enumerate(self.rows):
            drafted = [int(token) for token in drafts[i]]
            for t in range(length):
                behind = drafted if length == 1 else drafted[:t]
                own = torch.tensor([row.ids + behind], device=self.input_ids.device)
                padded = torch.cat([self.input_ids[row.place : row.place + 1, : row.padding], own], dim=1)
                here = scores[i, t : t + 1]
                for processor in self._processors_of(row):
                    here = processor(padded if isinstance(processor, LENGTH_ONLY) else own, here)
                scores[i, t] = here[0]
        return scores

    def _processors_of(self, row: Row) -> list[Any]:
        """The call's processors; one that was told of each row's padding gets a copy that knows of none."""
        if row.place not in self._row_processors:
            own = []
            for processor in self.processors:
                ignored = getattr(processor, "prompt_ignore_length", None)
                if isinstance(ignored, torch.Tensor):
                    processor = copy.copy(processor)
                    processor.prompt_ignore_length = (ignored[row.place : row.place + 1] - row.padding).clamp_min(0)
                own.append(processor)
            self._row_processors[row.place] = own
        return self._row_processors[row.place]

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
        uniforms = torch.rand(batch, window + 1, device=scores.device, dtype=torch.float64)
        return rejection_sample_chain(
            draft_ids, draft_probs, scores.softmax(-1), uniforms[:, :window], uniforms[:, window], valid
        )

    def _divergences(self, scores: torch.Tensor, draft_scores: list[torch.Tensor] | None) -> list[list[float]] | None:
        """KL(P||Q) in nats at each drafted position."""
        if not draft_scores or (not self.view.record and all(type(row.rule) is FixedWindow for row in self.rows)):
            return None
        target = scores[:, : len(draft_scores)].log_softmax(-1)
        draft = torch.stack(draft_scores, dim=1).log_softmax(-1)
        terms = (target.exp() * (target - draft)).masked_fill(target == -torch.inf, 0.0)
        return terms.sum(-1).nan_to_num(MAX_KL, MAX_KL, 0.0).clamp(0.0, MAX_KL).tolist()

    def _commit(self, row: Row, tokens: list[int], logits: torch.Tensor, scores: torch.Tensor) -> None:
        """Append tokens up to the first that ends the row. What is cut off was never given out, at T > 0 neither."""
        committed = 0
        for token in tokens:
            row.ids.append(token)
            row.new_tokens += 1
            committed += 1
            row.finished = token in self.eos or (
                self.max_length is not None and self.prompt_length + row.new_tokens >= self.max_length
            )
            if self.other_criteria:
                ids = torch.tensor([row.ids], device=self.input_ids.device)
                stops = [torch.as_tensor(criterion(ids, None)).any() for criterion in self.other_criteria]
                row.finished = row.finished or any(map(bool, stops))
            if row.finished:
                break
        if self.streamer is not None:
            self.streamer.put(torch.tensor(tokens[:committed]))
        record = row.trace.rounds[-1]
        record.accepted = min(record.accepted, committed)
        if self.generation_config.return_dict_in_generate:
            if self.generation_config.output_scores:
                row.scores += list(scores[:committed])
            if self.generation_config.output_logits:
                row.logits += list(logits[:committed])

    def _room(self, row: Row) -> int:
        """Longest window that fits: its round commits one token more, and the target must be able to read it."""
        room = row.rule.max_window
        if self.max_length is not None:
            room = min(room, self.max_length - self.prompt_length - row.new_tokens - 1)
        if self.context_length is not None:
            room = min(room, self.context_length - len(row.ids))
        return max(room, 0)

    def _result(self):
        longest = max(row.new_tokens for row in self.everyone)
        pad = getattr(self.generation_config, "_pad_token_tensor", None)
        pad_id = int(pad) if pad is not None else (self.generation_config.pad_token_id or 0)
        new = torch.full((len(self.everyone), longest), pad_id, dtype=self.input_ids.dtype)
        for row in self.everyone:
            new[row.place, : row.new_tokens] = torch.tensor(row.ids[len(row.ids) - row.new_tokens :])
        sequences = torch.cat([self.input_ids, new.to(self.input_ids.device)], dim=1)
        if not self.generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=self._by_token("scores", longest) if self.generation_config.output_scores else None,
            logits=self._by_token("logits", longest) if self.generation_config.output_logits else None,
        )

    def _by_token(self, name: str, longest: int) -> tuple[torch.Tensor, ...]:
        """A tensor `[B, V]` for each new token, as plain `generate` gives; zeros behind a row's end."""
        rows = [getattr(row, name) for row in sorted(self.everyone, key=lambda row: row.place)]
        nothing = torch.zeros_like(rows[0][0])
        return tuple(torch.stack([r[t] if t < len(r) else nothing for r in rows]) for t in range(longest))


def generate(
    target: Any, drafter: Any, input_ids: torch.Tensor, streamer=None, tokenizer=None, stop_strings=None, **kwargs
):
    """`target.generate(input_ids, custom_generate=drafter.generate_with(...), **kwargs)` as a function.

    `kwargs` are those of `generate`, and `window`, `max_window`, `cost_ratio`, `verification_cost`.
    """
    names = ("window", "max_window", "cost_ratio", "verification_cost")
    settings = {name: kwargs.pop(name) for name in names if name in kwargs}
    options = {"streamer": streamer, "tokenizer": tokenizer, "stop_strings": stop_strings}
    decoding = drafter.generate_with(**options, **settings)
    return target.generate(input_ids, custom_generate=decoding, **kwargs)


__all__ = ["SpeculativeDecoding", "generate"]
