"""Drafting inside transformers' assisted generation: what its loop asks for candidates.

Knows the stock loop's contract; knows nothing about training.
"""

import time
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.candidate_generator import CandidateGenerator

from .runtime.configuration_ppow import call_settings
from .runtime.draft_session import now, to_device
from .runtime.draft_window import SessionSource, WindowDraft, draft_windows, known_length
from .runtime.generation import DrafterView, divergences
from .runtime.modeling_ppow import PPOWDrafter, collect_target_states
from .runtime.rows import one_hot_scores
from .runtime.trace import GenerationTrace, RoundTrace
from .runtime.windowing import OnlineCosts, make_window_rule, stored_costs


class KLAdaptiveCandidateGenerator(CandidateGenerator):
    """Drafts windows with a PPOWDrafter, as long as its window rule wants them.

    Drafting loops directly over the drafter with its own cache. A draft ends before the first token that would
    satisfy a stopping criterion, so that this token comes as the target's own and output never runs on. When sampling,
    dropping such a token after it was drawn would bias the output (Leviathan et al. 2023 need every drawn token
    verified): it is verified as the target's own token instead, by the hook's [`PendingTokenVerifier`].

    Args:
        drafter ([`PPOWDrafter`] or [`DrafterView`]): the drafter, with the window settings of this call.
        logits_processor (`LogitsProcessorList`): the call's processors, applied to draft logits as to target logits.
        stopping_criteria (`StoppingCriteriaList`): the call's criteria.
        generation_config (`GenerationConfig`): the call's configuration.
        target_width (`int`): width of the target's logits.
        context_length (`int`, *optional*): longest sequence that target and drafter can both take.
    """

    requires_model_outputs = True

    def __init__(
        self,
        drafter: PPOWDrafter | DrafterView,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        target_width: int,
        context_length: int | None = None,
    ):
        settings = dict(drafter.settings) if isinstance(drafter, DrafterView) else {}
        self.model = drafter.drafter if isinstance(drafter, DrafterView) else drafter
        config = self.model.config
        settings = call_settings(config, settings)
        self.do_sample = bool(generation_config.do_sample)
        self.logits_processor = logits_processor
        # Length and EOS are foreseen without asking; anything else is asked after each drafted token. They are read
        # from the criteria, since a caller's own ones take the place of the configuration's.
        self.eos_token_ids = {
            token for c in stopping_criteria if type(c) is EosTokenCriteria for token in c.eos_token_id.tolist()
        }
        self.other_criteria = [c for c in stopping_criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        limits = [c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria]
        self.max_length = min([limit for limit in (generation_config.max_length, *limits) if limit], default=None)
        self.context_length = context_length
        self.mask_length = getattr(generation_config, "_mask_length", None)  # where a mask of ones was left out
        self.session = self.model.start_session(target_width)
        # Eagle and medusa read states; a standalone drafter spares the target the trouble of returning them.
        self.target_kwargs = {"output_hidden_states": True} if config.target_layer_ids else {}
        self.model_kwargs_overrides: dict[str, Any] = self.target_kwargs  # what the loop adds to each target forward
        costs = OnlineCosts(settings["cost_ratio"], settings["verification_cost"], stored_costs(config.calibration))
        self.rule = make_window_rule(
            settings["window"],
            settings["max_window"],
            costs,
            config.calibration,
            self.do_sample,
            settings["lookup"],
        )
        self.trace = GenerationTrace(window_rule=settings["window"])
        drafter.last_trace = self.trace
        # Of a drafted token that would have ended the text: the sequence's length, the token, its distribution.
        self.pending: tuple[int, int, torch.Tensor] | None = None
        self._unread_states: list[torch.Tensor] = []
        self._unread_from: int | None = None  # position of the first committed token the drafter has not read
        self._rule_read = 0  # tokens that the window rule has read
        self._draft_logits: torch.Tensor | None = None
        self._prefilled = False
        self._round: RoundTrace | None = None
        self._verify_from = 0.0

    def get_candidates(
        self,
        input_ids: torch.LongTensor,
        model_kwargs: dict[str, Any] | None = None,
        model_outputs: Any = None,
        is_first_iteration: bool = False,
        n_last_matches: int = 0,
        **kwargs,
    ) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """`[1, n]` -> `[1, n + W]` and the processed draft logits `[1, W, V]` (`None` for an empty window).

        At T = 0, where nobody needs them, tokens from the text have none.
        """
        started = time.perf_counter()
        self.pending = None
        self._draft_logits = None
        self._round = RoundTrace(0, 0, [])
        if not is_first_iteration:
            self._take_states(input_ids, model_outputs, int(n_last_matches))
        unread = self._unread_inputs(input_ids, model_kwargs or {}) if is_first_iteration else {}
        self.model_kwargs_overrides = self.target_kwargs | unread
        candidates = input_ids
        if not is_first_iteration:
            self.rule.read(input_ids[0, self._rule_read :].tolist())
            self._rule_read = input_ids.shape[1]
            room = self._room(input_ids.shape[1])
            longest = self.rule.start(room)
            if longest > 0:
                candidates = self._draft(input_ids, longest, self._round)
            if self.pending is None:
                candidates = self._look_up(candidates, room, self._round)
        self._verify_from = time.perf_counter()
        self._round.draft_seconds = self._verify_from - started
        return candidates, self._draft_logits

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """Take the target's answer: `scores` `[1, W + 1, V]`, its processed logits; `num_matches` tokens were kept."""
        this_round = self._round
        assert this_round is not None
        this_round.accepted = min(int(num_matches), this_round.window)  # the device has finished when this is known
        this_round.verify_seconds = time.perf_counter() - self._verify_from
        if self._draft_logits is not None:
            verified = min(this_round.accepted + 1, this_round.window - this_round.looked_up)
            own = self._draft_logits[0, :verified].to(scores.device)
            this_round.kl = divergences(scores[0, :verified].float(), own).tolist()
        if self._prefilled:  # the prompt's forward is no round: it says nothing about costs and tokens of one
            self.rule.costs.observe_verification(this_round.window, this_round.verify_seconds)
            drafted = this_round.window - this_round.looked_up
            accepted = min(this_round.accepted, drafted)
            self.rule.update(drafted, this_round.draft_steps, accepted, this_round.kl)
            self.rule.update_looked_up(this_round.looked_up, this_round.accepted - accepted)
        self._prefilled = True
        self.trace.rounds.append(this_round)
        self.trace.speculation_pays = self.rule.pays
        costs = self.rule.costs.model
        self.trace.cost_ratio, self.trace.verification_cost = costs.cost_ratio, costs.verification_cost

    def _unread_inputs(self, input_ids: torch.LongTensor, model_kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The prompt's part that a cache handed to `generate` does not hold, as inputs of the target's first forward.

        Plain decoding cuts the prompt like this; the assisted loop of transformers (5.17 to 5.23) feeds it all again.
        """
        cache, length = model_kwargs.get("cache", model_kwargs.get("past_key_values")), input_ids.shape[1]
        mask = model_kwargs.get("attention_mask")
        mask_length = mask.shape[-1] if mask is not None else self.mask_length or length
        if mask_length != length:
            raise ValueError(
                f"input_ids: {length} tokens given with an attention_mask of {mask_length}. With past_key_values, "
                "pass the whole sequence as input_ids, tokens in the cache included: the drafter has not read them."
            )
        past = cache.get_seq_length() if cache is not None else 0
        if not 0 < past < length:
            return {}
        along = ("position_ids", "token_type_ids", "mm_token_type_ids", "cache_position")
        parts = {name: model_kwargs[name] for name in along if model_kwargs.get(name) is not None}
        parts = {name: value[..., past:] for name, value in parts.items() if value.shape[-1] == length}
        return {"input_ids": input_ids[:, past:]} | parts

    def _room(self, length: int) -> int:
        """Longest window that fits: its round commits one token more, and the target must be able to read it."""
        room = self.max_length - length - 1 if self.max_length is not None else self.rule.max_window
        if self.context_length is not None:
            room = min(room, self.context_length - length)
        return max(room, 0)

    def _take_states(self, input_ids: torch.Tensor, model_outputs: Any, n_last_matches: int) -> None:
        """Keep the target's states of the tokens committed by the last forward, until the drafter reads them."""
        layers = self.model.config.target_layer_ids
        if layers is None:
            if self._unread_from is None:
                self._unread_from = 0
            return
        states: Any = collect_target_states(model_outputs.hidden_states, layers)
        if self._unread_from is None:
            # All of the prompt, or what was not in a cache handed to generate; its last state is that of token n - 2.
            self._unread_from = input_ids.shape[1] - states.shape[1]
        else:
            states = states[:, : n_last_matches + 1]
        self._unread_states.append(states.to(self.model.device))

    def _draft(self, input_ids: torch.LongTensor, longest: int, this_round: RoundTrace) -> torch.LongTensor:
        states = torch.cat(self._unread_states, dim=1) if self._unread_states else None
        first_read = not self.trace.rounds or self.session.is_empty
        unread = input_ids[:, self._unread_from :].to(self.model.device)
        started = time.perf_counter()
        self.session.observe(unread, states, self._unread_from)
        self._unread_states, self._unread_from = [], input_ids.shape[1]
        if first_read:
            started = now(self.model.device)  # reading the prompt is no draft step
        window = WindowDraft(0, self.rule, longest, this_round)
        source = SessionSource(
            self.session,
            lambda logits: self.logits_processor(
                torch.cat([input_ids, *source.computed], dim=1), logits.to(input_ids.device)
            ),
            self.do_sample,
            ahead=known_length([window]),
        )

        def ends(token: int) -> bool:
            if token in self.eos_token_ids or not self.other_criteria:
                return token in self.eos_token_ids
            return self._meets_criteria(torch.cat([input_ids, *source.drawn, source.token], dim=1))

        draft_windows([window], source, ends, keeps_end=False)
        if window.ended:
            self.pending = (input_ids.shape[1] + window.length, source.draw()[0], source.log_probs.exp())
        if not first_read or source.steps > 1:
            self.rule.costs.observe_drafting(source.steps - first_read, time.perf_counter() - started)
        this_round.window = window.length
        if source.kept_scores:
            self._draft_logits = torch.stack(source.kept_scores, dim=1)
        return torch.cat([input_ids, *source.drawn], dim=1)

    def _look_up(self, ids: torch.LongTensor, room: int, this_round: RoundTrace) -> torch.LongTensor:
        """Append what the window rule draws from the text to `ids` `[1, n]`, the drafter's tokens at their end.

        A token that would end the text is left out, as at T = 0. When sampling too: it was not drawn but follows from
        the tokens before it, and so does the end of the window, where the target's own token is then drawn from P.
        """
        tokens = self.rule.look_up(this_round.draft_ids, room)
        for count, token in enumerate(tokens):
            extended = [tokens[: count + 1]]
            if token in self.eos_token_ids or (
                self.other_criteria and self._meets_criteria(torch.cat([ids, to_device(extended, ids.device)], dim=1))
            ):
                tokens = tokens[:count]
                break
        if tokens and self.do_sample:
            looked_up = one_hot_scores(tokens, self.session.width, ids.device)[None]
            drafted = [] if self._draft_logits is None else [self._draft_logits]
            self._draft_logits = torch.cat([*drafted, looked_up], dim=1)
        this_round.draft_ids += tokens
        this_round.window += len(tokens)
        this_round.looked_up = len(tokens)
        return torch.cat([ids, to_device([tokens], ids.device)], dim=1) if tokens else ids

    def _meets_criteria(self, ids: torch.Tensor) -> bool:
        """Whether any criterion but length and EOS would end the text `[1, n]`."""
        return any(bool(torch.as_tensor(criterion(ids, None)).any()) for criterion in self.other_criteria)
