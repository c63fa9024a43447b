"""`KLAdaptiveCandidateGenerator`: the windows of `generate(assistant_model=drafter)`, drafted and learned from.

Knows the contract of transformers' assisted loop; knows nothing of how that loop comes to call it, nor of training.
"""

import functools
import time
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import CandidateGenerator, LogitsProcessor

from .runtime.acceptance import pending_token_scores
from .runtime.configuration_ppow import call_settings
from .runtime.cost_model import make_costs
from .runtime.draft_session import UnreadTokens
from .runtime.draft_window import (
    Window,
    draw_tokens,
    known_length,
    learn_from_verdict,
    read_and_draft,
    record_costs,
    with_looked_up_scores,
)
from .runtime.generation import DrafterView, divergences
from .runtime.modeling_ppow import PPOWDrafter, collect_target_states
from .runtime.rows import MEMORYLESS, StopConditions, append_drafts
from .runtime.target_session import unread_prompt
from .runtime.trace import GenerationTrace, RoundTrace
from .runtime.windowing import rule_of_call


class KLAdaptiveCandidateGenerator(CandidateGenerator):
    """Drafts windows with a PPOWDrafter, as long as its window rule wants them.

    A draft ends before the first token that would satisfy a stopping criterion, so that this token comes as the
    target's own. When sampling, such a token was drawn and must be verified (Leviathan et al. 2023):
    [`PendingTokenVerifier`] does it where the target's own token is drawn.

    Args:
        drafter ([`PPOWDrafter`] or [`DrafterView`]): the drafter, with the window settings of this call.
        logits_processor, stopping_criteria, generation_config: the call's; draft logits are processed as the target's.
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
        self.model = drafter.drafter if isinstance(drafter, DrafterView) else drafter
        config = self.model.config
        settings = call_settings(config, drafter.settings if isinstance(drafter, DrafterView) else {})
        self.do_sample, self.logits_processor = bool(generation_config.do_sample), logits_processor
        self.conditions = StopConditions(stopping_criteria, generation_config, context_length)
        self.mask_length = getattr(generation_config, "_mask_length", None)  # where a mask of ones was left out
        self.session = self.model.start_session(target_width)
        # Eagle, medusa and block read states; a standalone drafter spares the target the trouble of returning them.
        self.target_kwargs = {"output_hidden_states": True} if config.target_layer_ids else {}
        self.model_kwargs_overrides: dict[str, Any] = self.target_kwargs  # what the loop adds to each target forward
        costs = make_costs(settings["cost_ratio"], settings["verification_cost"], config.calibration, config.one_step)
        self.rule = rule_of_call(config, settings, costs, self.do_sample)
        self.trace = GenerationTrace(window_rule=settings["window"])
        for holder in (drafter, self.model):
            holder.last_trace, holder.last_traces = self.trace, [self.trace]
        # The length of the text before a drawn token that ends it, the token, its distribution.
        self.pending: tuple[int, int, torch.Tensor] | None = None
        self._unread: UnreadTokens | None = None
        self._committed = 0  # tokens that the window rule has read, and the drafter has been told of
        self._draft_scores: torch.Tensor | None = None  # [1, W, V]
        self._round, self._drafted_at = RoundTrace(0, 0, []), 0.0

    def get_candidates(
        self,
        input_ids: torch.LongTensor,
        model_kwargs: dict[str, Any] | None = None,
        model_outputs: Any = None,
        is_first_iteration: bool = False,
        n_last_matches: int = 0,
        **kwargs,
    ) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """`[1, n]` -> `[1, n + W]` and the drafts' scores `[1, W, V]` (at T = 0 tokens from the text have none)."""
        started = time.perf_counter()
        self.pending = self._draft_scores = None
        self._round = RoundTrace(0, 0, [])
        unread = unread_prompt(input_ids, model_kwargs or {}, self.mask_length) if is_first_iteration else {}
        self.model_kwargs_overrides = self.target_kwargs | unread
        if not is_first_iteration:
            self._take_in(input_ids, model_outputs)
            self._draft(input_ids)
        self._drafted_at = time.perf_counter()
        self._round.draft_seconds = self._drafted_at - started
        return append_drafts(input_ids, self._round.draft_ids), self._draft_scores

    def _take_in(self, input_ids: torch.LongTensor, model_outputs: Any) -> None:
        """Let the rule read the tokens that were committed since the last call, and keep them for the drafter."""
        new_ids, self._committed = input_ids[:, self._committed :], input_ids.shape[1]
        self.rule.read(new_ids[0].tolist())
        states = collect_target_states(model_outputs.hidden_states, self.model.config.target_layer_ids)
        if self._unread is None:  # the prompt, as far as it was not in a cache; its last state is that of token n - 2
            start = 0 if states is None else input_ids.shape[1] - states.shape[1]
            self._unread = UnreadTokens(input_ids[:, start:], states, None, start)
        else:
            most = new_ids.shape[1] - 1
            self._unread.add(new_ids, states, torch.tensor([most]), most)

    def _draft(self, input_ids: torch.LongTensor) -> None:
        assert self._unread is not None  # what the prompt's forward left

        def process(logits, drafts):
            scores = logits.to(input_ids.device)
            scores = scores.clone() if self.logits_processor else scores  # a processor may write into what it is given
            return self.logits_processor(append_drafts(input_ids, drafts[0]), scores)

        length = input_ids.shape[1]
        room = self.conditions.room(self.rule.max_window, length, length)
        ends_text = functools.partial(self.conditions.met_by, input_ids)
        window = Window(self.rule, self._round, self.rule.start(room), ends_text, keeps_end=False)
        scores: list[torch.Tensor] = []
        if window.limit > 0:
            assert self._unread is not None
            draw = draw_tokens if self.do_sample else None
            memoryless = all(type(processor) in MEMORYLESS for processor in self.logits_processor)
            ahead = known_length([window]) if memoryless and not self.do_sample else 1
            drafted = read_and_draft(self._unread, self.session, [window], self.rule.costs, process, draw, ahead=ahead)
            scores = drafted.scores[: self._round.window]
            if window.end_token is not None:
                self.pending = (length + self._round.window, window.end_token, drafted.log_probs.exp())
        window.look_up(room)
        if self.do_sample:
            scores = with_looked_up_scores([window], scores, self.session.width, input_ids.device)
        self._draft_scores = torch.stack(scores, dim=1) if scores else None

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """Take the target's answer: `scores` `[1, W + 1, V]`, its processed logits; `num_matches` tokens were kept."""
        record = self._round
        kl: list[float] = []
        outside: list[float] = []
        record.accepted = accepted = min(int(num_matches), record.window)  # known when the device has finished
        record.verify_seconds = time.perf_counter() - self._drafted_at
        if self._draft_scores is not None:
            verified = min(accepted + 1, record.window - record.looked_up)
            draft_scores = self._draft_scores[0, :verified].to(scores.device)
            kl, outside = divergences(scores[0, :verified].float(), draft_scores)
        if self.trace.rounds:  # the prompt's forward is no round: it says nothing about costs and tokens of one
            self.rule.costs.observe_verification(record.window, record.verify_seconds)
            learn_from_verdict(self.rule, record, accepted, kl, outside)
        self.trace.rounds.append(record)
        record_costs(self.trace, self.rule)


class PendingTokenVerifier(LogitsProcessor):
    """Verifies a drawn token that ends the text where the target's own token is drawn; last of the processors."""

    def __init__(self, generator: KLAdaptiveCandidateGenerator):
        self.generator = generator

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        pending = self.generator.pending
        if pending is None or input_ids.shape[1] != pending[0]:
            return scores
        return pending_token_scores(scores, *pending[1:], torch.rand((), device=scores.device))
