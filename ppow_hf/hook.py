"""`target.generate(**inputs, assistant_model=drafter)`: lets `generate` accept a PPOWDrafter.

transformers has no public way for that, so four private methods of its `GenerationMixin` are wrapped; one hands
streamer and tokenizer on to `custom_generate=drafter.generate_with()`. Knows which calls are ours and which loop
serves them; drafts nothing itself.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import transformers
from transformers import GenerationMixin, LogitsProcessorList, StoppingCriteriaList

from .candidate_generator import KLAdaptiveCandidateGenerator, PendingTokenVerifier
from .runtime.compatibility import (
    check_call,
    check_inputs,
    check_processors,
    check_rotary_change,
    common_context_length,
    prepares_new_tokens,
    target_width,
)
from .runtime.generation import DrafterView, SpeculativeDecoding
from .runtime.modeling_ppow import PPOWDrafter

SUPPORTED = "transformers>=5.17,<6"


OURS = (PPOWDrafter, DrafterView)


def _get_candidate_generator(original, self, *args, **kwargs):
    assistant = kwargs.get("assistant_model")
    if isinstance(assistant, KLAdaptiveCandidateGenerator):
        return assistant  # made by the wrapped _assisted_decoding, which knows the stopping criteria
    return original(self, *args, **kwargs)


def needs_our_loop(target: Any, view: DrafterView, call: dict[str, Any]) -> bool:
    """Whether a call is more than the stock loop can do; that one also sends tokens to the model's `device`, whatever
    is offloaded."""
    return len(call["input_ids"]) > 1 or view.settings.get("tree_nodes") is not None or target.device.type == "meta"


def would_differ(call: dict[str, Any]) -> bool:
    """Whether the stock loop would not do as plain `generate`.

    It asks a caller's own stopping criterion about drafts and rounds, not token by token; where it samples it returns
    as scores what is left of them after a rejected token; and it fails where the target's configuration has no cache.
    """
    config, criteria = call["generation_config"], call["stopping_criteria"]
    own_criteria = any(type(one).__module__ != StoppingCriteriaList.__module__ for one in criteria)
    returns_drawn = config.do_sample and config.return_dict_in_generate and config.output_scores
    return own_criteria or returns_drawn or config.use_cache is False


def our_loop_serves(target: Any, call: dict[str, Any]) -> bool:
    """Whether our own loop can take over a call of one prompt."""
    config = call["generation_config"]
    returns_states = config.return_dict_in_generate and (config.output_hidden_states or config.output_attentions)
    return prepares_new_tokens(target) and not returns_states and not call.get("synced_gpus")


def _assisted_decoding(original, self, *args, **kwargs):
    bound = inspect.signature(original).bind(self, *args, **kwargs)
    call = bound.arguments
    drafter: Any = call.get("assistant_model")
    if not isinstance(drafter, OURS):
        return original(self, *args, **kwargs)
    check_inputs(call["input_ids"], call.get("model_kwargs", {}).get("inputs_embeds"))
    check_processors(call["logits_processor"])
    view = drafter if isinstance(drafter, DrafterView) else drafter.with_settings()
    parts = (call["logits_processor"], call["stopping_criteria"], call["generation_config"])
    if needs_our_loop(self, view, call) or (would_differ(call) and our_loop_serves(self, call)):
        decoding = SpeculativeDecoding(view)
        decoding.view = view  # whose traces the caller will read
        given: dict[str, Any] = {name: call.get(name) for name in ("streamer", "synced_gpus")}
        return decoding(self, call["input_ids"], *parts, **given | call["model_kwargs"])
    length, limit = call["input_ids"].shape[1], call["generation_config"].max_length
    check_rotary_change(self, [length], limit and limit - length)
    view.drafter.attach_target(self)
    context_length = common_context_length(self.config, drafter.config)
    generator = KLAdaptiveCandidateGenerator(drafter, *parts, target_width(self), context_length)
    if generator.do_sample:
        call["logits_processor"] = LogitsProcessorList([*parts[0], PendingTokenVerifier(generator)])
    call["assistant_model"] = generator
    return original(*bound.args, **bound.kwargs)


def _validate_generation_mode(original, self, generation_mode, generation_config, generation_mode_kwargs):
    drafter = generation_mode_kwargs.get("assistant_model")
    if isinstance(getattr(drafter, "_orig_mod", None), OURS):
        raise ValueError(
            "assistant_model: a compiled drafter given; windows change shape in every round, so that compiling takes "
            "longer than it saves. Pass the drafter itself."
        )
    if not isinstance(drafter, OURS):
        return original(self, generation_mode, generation_config, generation_mode_kwargs)
    check_call(self, drafter, generation_config, generation_mode_kwargs.get("tokenizer"))
    # The stock check compares configurations and refuses padded vocabularies; ours has been made. It refuses several
    # sequences of a prompt too, which our own loop writes.
    others = {name: value for name, value in generation_mode_kwargs.items() if name != "assistant_model"}
    generation_config = copy.copy(generation_config)
    generation_config.num_return_sequences = 1
    return original(self, generation_mode, generation_config, others)


def _extract_generation_mode_kwargs(original, self, *args, **kwargs):
    bound = inspect.signature(original).bind(self, *args, **kwargs)
    decoding: Any = bound.arguments["custom_generate"]
    if not isinstance(decoding, SpeculativeDecoding):
        return original(self, *args, **kwargs)
    # From a callable transformers withholds streamer, tokenizer and synced_gpus; stop strings need the tokenizer.
    bound.arguments["custom_generate"] = None
    given = original(*bound.args, **bound.kwargs)
    for name in ("assistant_model", "assistant_tokenizer"):
        if given.get(name) is not None:
            raise ValueError(
                f"{name}: custom_generate=drafter.generate_with() brings its own drafter. Leave out one of them."
            )
    return decoding.with_given(given)


def _refuse(message: str, original, self, *args, **kwargs):
    """`generate` of a transformers whose private methods are others: only a PPOWDrafter is refused."""
    if any(isinstance(argument, OURS) for argument in (*args, *kwargs.values())):
        raise RuntimeError(message)
    return original(self, *args, **kwargs)


# What replaces the private method of GenerationMixin of the same name, and the parameters that it needs.
_REPLACEMENTS: dict[Callable, tuple[str, ...]] = {
    _get_candidate_generator: ("assistant_model", "generation_config", "input_ids", "logits_processor"),
    _assisted_decoding: ("generation_config", "input_ids", "logits_processor", "stopping_criteria"),
    _validate_generation_mode: ("generation_config", "generation_mode", "generation_mode_kwargs"),
    _extract_generation_mode_kwargs: ("custom_generate", "kwargs", "synced_gpus", "assistant_model", "streamer"),
}
_ORIGINALS: dict[str, Any] = {}


def install_hook() -> None:
    """Let `generate(assistant_model=)` take a PPOWDrafter. Importing ppow_hf does it; doing it again changes nothing.

    Wraps four private methods of `GenerationMixin`; every other assistant passes through untouched. Where this
    transformers does not have them as expected, `generate` raises a `RuntimeError` for a PPOWDrafter instead.
    """
    if _ORIGINALS:
        return
    replacements: dict[str, Callable] = {function.__name__: function for function in _REPLACEMENTS}
    for function, parameters in _REPLACEMENTS.items():
        method = getattr(GenerationMixin, function.__name__, None)
        if method is None or not set(parameters) <= set(inspect.signature(method).parameters):
            message = (
                f"transformers {transformers.__version__} has no GenerationMixin.{function.__name__} with "
                f"{list(parameters)}, which assisted generation with a PPOWDrafter builds on. Install {SUPPORTED}."
            )
            replacements = {"generate": functools.partial(_refuse, message)}
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
