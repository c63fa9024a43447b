"""`target.generate(**inputs, assistant_model=drafter)`: lets `generate` accept a PPOWDrafter.

transformers has no public way for that, so three private methods of its `GenerationMixin` are wrapped. Knows which
calls are ours and which loop serves them; drafts nothing itself.
"""

import functools
import inspect
from typing import Any

import torch
import transformers
from transformers import GenerationMixin, LogitsProcessorList
from transformers.generation import LogitsProcessor
from transformers.generation.configuration_utils import GenerationMode

from .candidate_generator import KLAdaptiveCandidateGenerator
from .runtime.compatibility import check_call, check_processors, common_context_length, target_width
from .runtime.configuration_ppow import warn_of_other_target
from .runtime.generation import DrafterView, SpeculativeDecoding
from .runtime.modeling_ppow import PPOWDrafter

SUPPORTED = "transformers>=5.17,<6"


class PendingTokenVerifier(LogitsProcessor):
    """Verifies a drawn token that would end the generation, at the position where the target's own token is drawn.

    The token x was drawn from Q. With P now known, the draw there is made to be x with probability min(1, P(x)/Q(x))
    and a draw from norm(max(P - Q, 0)) otherwise, which together are distributed as P. Last of a call's processors.
    """

    def __init__(self, generator: KLAdaptiveCandidateGenerator):
        self.generator = generator

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        pending = self.generator.pending
        if pending is None or input_ids.shape[1] != pending[0]:
            return scores
        _, token, draft_probs = pending
        target_probs = scores.softmax(-1)
        draft_probs = draft_probs.to(target_probs)
        ratio = target_probs[0, token] / draft_probs[0, token]
        if bool(torch.rand((), device=scores.device) < ratio):
            decided = torch.full_like(scores, -torch.inf)
            decided[0, token] = 0.0
            return decided
        residual = (target_probs - draft_probs).clamp_min(0.0)
        return residual.log() if bool(residual.sum() > 0) else scores


def _is_ours(assistant: Any) -> bool:
    return isinstance(assistant, PPOWDrafter | DrafterView)


_ORIGINALS: dict[str, Any] = {}


def install_hook() -> None:
    """Let `generate(assistant_model=)` take a PPOWDrafter. Importing ppow_hf does it; doing it again changes nothing.

    Wraps three private methods of `GenerationMixin`; every other assistant passes through untouched. Raises
    `RuntimeError` when this transformers does not have them as expected.
    """
    if _ORIGINALS:
        return
    expected = {
        "_get_candidate_generator": {"generation_config", "input_ids", "logits_processor", "assistant_model"},
        "_assisted_decoding": {"input_ids", "logits_processor", "stopping_criteria", "generation_config"},
        "_validate_generation_mode": {"generation_mode", "generation_config", "generation_mode_kwargs"},
    }
    for name, parameters in expected.items():
        method = getattr(GenerationMixin, name, None)
        if method is None or not parameters <= set(inspect.signature(method).parameters):
            raise RuntimeError(
                f"transformers {transformers.__version__} has no GenerationMixin.{name} with {sorted(parameters)}, "
                f"which assisted generation with a PPOWDrafter builds on. Install {SUPPORTED}."
            )
    for name, wrap in (
        ("_get_candidate_generator", _wrap_get_candidate_generator),
        ("_assisted_decoding", _wrap_assisted_decoding),
        ("_validate_generation_mode", _wrap_validate_generation_mode),
    ):
        original = getattr(GenerationMixin, name)
        _ORIGINALS[name] = original
        setattr(GenerationMixin, name, wrap(original))


def remove_hook() -> None:
    """Undo [`install_hook`]: `GenerationMixin` gets its own methods back."""
    for name, original in _ORIGINALS.items():
        setattr(GenerationMixin, name, original)
    _ORIGINALS.clear()


def _wrap_get_candidate_generator(original):
    @functools.wraps(original)
    def _get_candidate_generator(self, *args, **kwargs):
        assistant = kwargs.get("assistant_model")
        if isinstance(assistant, KLAdaptiveCandidateGenerator):
            return assistant  # made by the wrapped _assisted_decoding, which knows the stopping criteria
        return original(self, *args, **kwargs)

    return _get_candidate_generator


def _wrap_assisted_decoding(original):
    signature = inspect.signature(original)

    @functools.wraps(original)
    def _assisted_decoding(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        call = bound.arguments
        drafter: Any = call.get("assistant_model")
        if not _is_ours(drafter):
            return original(self, *args, **kwargs)
        embeddings = call.get("model_kwargs", {}).get("inputs_embeds")
        if call["input_ids"].shape[1] == 0 or embeddings is not None:
            raise ValueError(
                "inputs_embeds: a drafter reads tokens, so pass the prompt as input_ids, or leave out assistant_model."
            )
        check_processors(call["logits_processor"])
        view = drafter if isinstance(drafter, DrafterView) else drafter.with_settings()
        # More than the stock loop can do; it also sends tokens to the model's `device`, whatever is offloaded:
        offloaded = self.device.type == "meta"
        if call["input_ids"].shape[0] > 1 or view.settings.get("tree_nodes") is not None or offloaded:
            parts = {name: call.get(name) for name in ("logits_processor", "stopping_criteria", "generation_config")}
            decoding = SpeculativeDecoding(view, streamer=None)
            decoding.view = view  # whose traces the caller will read
            return decoding(self, call["input_ids"], **parts, streamer=call.get("streamer"), **call["model_kwargs"])
        generator = KLAdaptiveCandidateGenerator(
            drafter,
            call["logits_processor"],
            call["stopping_criteria"],
            call["generation_config"],
            target_width(self),
            common_context_length(self.config, drafter.config),
        )
        if generator.do_sample:
            call["logits_processor"] = LogitsProcessorList(
                [*call["logits_processor"], PendingTokenVerifier(generator)]
            )
        call["assistant_model"] = generator
        return original(*bound.args, **bound.kwargs)

    return _assisted_decoding


def _wrap_validate_generation_mode(original):
    @functools.wraps(original)
    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        drafter = generation_mode_kwargs.get("assistant_model")
        if not _is_ours(drafter):
            return original(self, generation_mode, generation_config, generation_mode_kwargs)
        check_call(self, drafter, generation_config)
        warn_of_other_target(drafter.config, tokenizer=generation_mode_kwargs.get("tokenizer"))
        if generation_mode != GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "assistant_model: speculative decoding works with greedy search and sampling, not with "
                f"{generation_mode}. Leave out assistant_model, or the options that select that mode."
            )
        # The stock check compares configurations and refuses padded vocabularies; ours has been made.
        others = {name: value for name, value in generation_mode_kwargs.items() if name != "assistant_model"}
        return original(self, generation_mode, generation_config, others)

    return _validate_generation_mode
