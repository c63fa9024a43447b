"""`target.generate(**inputs, assistant_model=drafter)`: drafting inside transformers' assisted generation.

`KLAdaptiveCandidateGenerator` drafts each round's window; `install_hook` lets `generate` accept a PPOWDrafter. Knows
the stock loop's contract; knows nothing about training.
"""

import functools
import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import CandidateGenerator, LogitsProcessor

from .runtime import compatibility, draft_window
from .runtime.acceptance import pending_token_scores
from .runtime.configuration_ppow import call_settings
from .runtime.draft_session import UnreadTokens
from .runtime.generation import DrafterView, SpeculativeDecoding, divergences
from .runtime.modeling_ppow import PPOWDrafter, collect_target_states
from .runtime.rows import StopConditions, behind
from .runtime.target_session import unread_prompt
from .runtime.trace import GenerationTrace, RoundTrace
from .runtime.windowing import make_costs, make_window_rule

OURS = (PPOWDrafter, DrafterView)


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
        # Eagle and medusa read states; a standalone drafter spares the target the trouble of returning them.
        self.target_kwargs = {"output_hidden_states": True} if config.target_layer_ids else {}
        self.model_kwargs_overrides: dict[str, Any] = self.target_kwargs  # what the loop adds to each target forward
        costs = make_costs(settings["cost_ratio"], settings["verification_cost"], config.calibration)
        self.rule = make_window_rule(
            settings["window"], settings["max_window"], costs, config.calibration, self.do_sample, settings["lookup"]
        )
        drafter.last_trace = self.trace = GenerationTrace(window_rule=settings["window"])
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
        return behind(input_ids, self._round.draft_ids), self._draft_scores

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
        def process(logits, drafts):
            return self.logits_processor(behind(input_ids, drafts[0]), logits.to(input_ids.device))

        length = input_ids.shape[1]
        room = self.conditions.room(self.rule.max_window, length, length)
        ends_text = functools.partial(self.conditions.met_by, input_ids)
        window = draft_window.Window(self.rule, self._round, self.rule.start(room), ends_text, keeps_end=False)
        scores: list[torch.Tensor] = []
        if window.limit > 0:
            draw = draft_window.draw_tokens if self.do_sample else None
            drafted = draft_window.read_and_draft(self._unread, self.session, [window], self.rule.costs, process, draw)
            scores = drafted.scores[: self._round.window]
            if window.end_token is not None:
                self.pending = (length + self._round.window, window.end_token, drafted.log_probs.exp())
        window.look_up(room)
        if self.do_sample:
            scores = draft_window.with_looked_up_scores([window], scores, self.session.width, input_ids.device)
        self._draft_scores = torch.stack(scores, dim=1) if scores else None

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """Take the target's answer: `scores` `[1, W + 1, V]`, its processed logits; `num_matches` tokens were kept."""
        record, kl = self._round, []
        record.accepted = accepted = min(int(num_matches), record.window)
        record.verify_seconds = time.perf_counter() - self._drafted_at
        if self._draft_scores is not None:
            verified = min(accepted + 1, record.window - record.looked_up)
            kl = divergences(scores[0, :verified].float(), self._draft_scores[0, :verified].to(scores.device)).tolist()
        if self.trace.rounds:  # the prompt's forward is no round: it says nothing about costs and tokens of one
            self.rule.costs.observe_verification(record.window, record.verify_seconds)
            draft_window.learn_from_verdict(self.rule, record, accepted, kl)
        self.trace.rounds.append(record)
        draft_window.record_costs(self.trace, self.rule)


class PendingTokenVerifier(LogitsProcessor):
    """Verifies a drawn token that ends the text where the target's own token is drawn; last of the processors."""

    def __init__(self, generator: KLAdaptiveCandidateGenerator):
        self.generator = generator

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        pending = self.generator.pending
        if pending is None or input_ids.shape[1] != pending[0]:
            return scores
        return pending_token_scores(scores, *pending[1:], torch.rand((), device=scores.device))


def _get_candidate_generator(original, self, *args, **kwargs):
    assistant = kwargs.get("assistant_model")
    # Ours was made by the wrapped _assisted_decoding, which knows the stopping criteria.
    return assistant if isinstance(assistant, KLAdaptiveCandidateGenerator) else original(self, *args, **kwargs)


def _assisted_decoding(original, self, *args, **kwargs):
    bound = inspect.signature(original).bind(self, *args, **kwargs)
    call = bound.arguments
    drafter = call.get("assistant_model")
    if not isinstance(drafter, OURS):
        return original(self, *args, **kwargs)
    compatibility.check_inputs(call["input_ids"], call.get("model_kwargs", {}).get("inputs_embeds"))
    compatibility.check_processors(call["logits_processor"])
    view = drafter if isinstance(drafter, DrafterView) else drafter.with_settings()
    parts = [call[name] for name in ("logits_processor", "stopping_criteria", "generation_config")]
    if call["input_ids"].shape[0] > 1 or view.settings.get("tree_nodes") is not None:  # not for the stock loop
        decoding = SpeculativeDecoding(view)
        decoding.view = view  # whose traces the caller will read
        return decoding(self, call["input_ids"], *parts, streamer=call.get("streamer"), **call["model_kwargs"])
    context_length = compatibility.common_context_length(self.config, drafter.config)
    generator = KLAdaptiveCandidateGenerator(drafter, *parts, compatibility.target_width(self), context_length)
    if generator.do_sample:
        call["logits_processor"] = LogitsProcessorList([*parts[0], PendingTokenVerifier(generator)])
    call["assistant_model"] = generator
    return original(*bound.args, **bound.kwargs)


def _validate_generation_mode(original, self, generation_mode, generation_config, generation_mode_kwargs):
    drafter = generation_mode_kwargs.get("assistant_model")
    if not isinstance(drafter, OURS):
        return original(self, generation_mode, generation_config, generation_mode_kwargs)
    compatibility.check_call(self, drafter, generation_config, generation_mode_kwargs.get("tokenizer"))
    compatibility.check_mode(generation_mode)
    # The stock check compares configurations and refuses padded vocabularies; ours has been made.
    others = {name: value for name, value in generation_mode_kwargs.items() if name != "assistant_model"}
    return original(self, generation_mode, generation_config, others)


def _generate(message, original, self, *args, **kwargs):
    if any(isinstance(argument, OURS) for argument in (*args, *kwargs.values())):
        raise RuntimeError(message)
    return original(self, *args, **kwargs)


# What replaces a private method of GenerationMixin of the same name, and the parameters it needs.
_REPLACEMENTS: dict[Callable, str] = {
    _get_candidate_generator: "assistant_model, generation_config, input_ids, logits_processor",
    _assisted_decoding: "generation_config, input_ids, logits_processor, stopping_criteria",
    _validate_generation_mode: "generation_config, generation_mode, generation_mode_kwargs",
}
_ORIGINALS: dict[str, Any] = {}


def install_hook() -> None:
    """Let `generate(assistant_model=)` take a PPOWDrafter. Importing ppow_hf does it; doing it again changes nothing.

    Wraps three private methods of `GenerationMixin`; other assistants pass through untouched. Where this transformers
    has other methods, `generate` raises a `RuntimeError` for a PPOWDrafter instead.
    """
    if _ORIGINALS:
        return
    replacements: dict[str, Callable] = {function.__name__: function for function in _REPLACEMENTS}
    for function, parameters in _REPLACEMENTS.items():
        method = getattr(GenerationMixin, function.__name__, None)
        if method is None or not set(parameters.split(", ")) <= set(inspect.signature(method).parameters):
            message = (
                f"transformers {transformers.__version__} has no GenerationMixin.{function.__name__} with "
                f"{parameters}, which a drafter as assistant_model needs. Install transformers>=5.17,<6."
            )
            replacements = {"generate": functools.partial(_generate, message)}
    for name, replacement in replacements.items():
        _ORIGINALS[name] = original = getattr(GenerationMixin, name)
        setattr(GenerationMixin, name, _wrapping(original, replacement))


def _wrapping(original: Callable, replacement: Callable) -> Callable:
    @functools.wraps(original)
    def method(self, *args, **kwargs):
        return replacement(original, self, *args, **kwargs)

    return method


def remove_hook() -> None:
    """Undo [`install_hook`]: `GenerationMixin` gets its own methods back."""
    for name, original in _ORIGINALS.items():
        setattr(GenerationMixin, name, original)
    _ORIGINALS.clear()
