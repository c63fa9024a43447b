"""What the engines cannot serve, or serve otherwise than one would think, said before anyone tries.

Facts about vLLM 0.32, SGLang 0.5.23 and llama.cpp, measured on a CPU, or read in their source where so said. Knows
configurations only.
"""

from typing import Any

VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
# Beginnings of the model types whose classes hand out their layers' states, by vLLM's source.
VLLM_EAGLE3_TARGETS = (
    *("llama", "mllama4", "mistral", "pixtral", "llava", "qwen2", "qwen3", "deepseek", "kimi_k", "gpt_oss", "gemma4"),
    *("granite", "minicpm", "minimax", "nemotron_h", "cohere2", "apertus", "afmoe", "mimo", "plamo3", "phi3", "step1"),
)
TESTED_FAMILIES = ("llama", "qwen3")


def serving_notes(
    drafter: Any, layout: str, target_config: Any = None, own_embeddings: bool | None = None
) -> list[str]:
    """Sentences about what this drafter will meet in the engines; empty if nothing is known to be in its way.

    `own_embeddings`: whether an eagle drafter's embeddings differ from the target's, where that is known.
    """
    if layout == "gguf":
        return gguf_notes(drafter, target_config)
    config, draft = drafter.config, drafter.config.draft_config
    text = None if target_config is None else target_config.get_text_config()
    notes = []
    sizes = {} if layout == "medusa" else {"drafter": _head_dim(draft)}
    sizes |= {} if text is None else {"target": _head_dim(text)}
    for whose, size in sizes.items():
        if size not in VLLM_CPU_HEAD_SIZES:
            notes.append(
                f"vLLM on a CPU does not start: the {whose}'s attention heads have {size} numbers, and its CPU build "
                f"takes {', '.join(map(str, VLLM_CPU_HEAD_SIZES))}. On a GPU other limits hold."
            )
    family = config.target_model_type or getattr(text, "model_type", None)
    if layout == "standalone":
        if draft.model_type not in TESTED_FAMILIES:
            notes.append(
                f"The drafter is a {draft.model_type} model; its export was tested in vLLM for "
                f"{' and '.join(TESTED_FAMILIES)}."
            )
        if getattr(draft, "sliding_window", None) is not None and getattr(draft, "use_sliding_window", True):
            notes.append(
                f"Engines honour the drafter's sliding window of {draft.sliding_window} tokens; it was trained "
                "without one, so that after longer contexts they may accept less than ppow_hf does."
            )
        return notes
    if layout == "medusa":
        heads = len(drafter.draft_model.lm_heads)
        return [*notes, f"vLLM drafts with all heads or none: num_speculative_tokens must be {heads}."]
    if config.architecture == "block":
        return notes + _block_notes(config, layout, family)
    if family is not None and not family.startswith(VLLM_EAGLE3_TARGETS):
        notes.append(f"vLLM 0.32 takes no EAGLE-3 drafter for a {family} target, by its source.")
    if family not in (None, *TESTED_FAMILIES):
        notes.append(f"The target is a {family} model; export was tested for {' and '.join(TESTED_FAMILIES)}.")
    if len(config.target_layer_ids) != 3:
        notes.append(f"The drafter reads {len(config.target_layer_ids)} states of the target; engines expect 3.")
    if text is not None and max(config.target_layer_ids) == text.num_hidden_layers:
        notes.append(
            f"It reads the state after the last layer, {text.num_hidden_layers}: transformers gives it after the "
            "final norm and vLLM before it, so that vLLM will accept little. SGLang has no such state, by its source."
        )
    if layout == "speculators" and config.target_hidden_size not in (None, draft.hidden_size):
        notes.append(
            f"speculators' own class needs the target's width in the drafter ({config.target_hidden_size} and "
            f"{draft.hidden_size} given), by its source."
        )
    same_width = config.target_hidden_size in (None, draft.hidden_size)
    if layout == "eagle3" and own_embeddings and same_width:
        notes.append(
            "SGLang drafts with the target's embeddings instead of the drafter's, which training changed "
            "(train_embeddings): it will accept less, by its source."
        )
    return notes


def _block_notes(config: Any, layout: str, family: str | None) -> list[str]:
    tokens = config.longest_window
    notes = [f"The block was trained to draft {tokens} tokens: num_speculative_tokens must be {tokens}."]
    if family not in (None, *TESTED_FAMILIES):
        notes.append(f"The target is a {family} model; vLLM 0.32 was tested for {' and '.join(TESTED_FAMILIES)}.")
    if layout.endswith("dspark"):
        notes.append("vLLM 0.32 drafts with a Markov head in its runner V2 only, which needs Triton and so a GPU.")
        if config.confidence_head:
            notes.append(
                'With `"enable_adaptive_verification": true` in the speculative configuration vLLM verifies as many '
                "tokens as the confidence head makes worth it. Not tried: it needs CUDA graphs."
            )
    if config.draft_config.num_hidden_layers > 1:
        notes.append(
            "vLLM 0.32 on a CPU norms every layer's context keys by the first layer's k_norm: it accepts less than "
            "ppow_hf does."
        )
    return notes


def gguf_notes(drafter: Any, target_config: Any = None) -> list[str]:
    """Sentences about what a drafter will meet in llama.cpp; empty if nothing is known to be in its way."""
    config = drafter.config
    text = None if target_config is None else target_config.get_text_config()
    family = config.target_model_type or getattr(text, "model_type", None)
    if config.architecture != "eagle":
        return []
    notes = []
    if family not in (None, *TESTED_FAMILIES):
        notes.append(
            f"The target is a {family} model; llama.cpp was tested with {' and '.join(TESTED_FAMILIES)}, and "
            "hands out its layers' states for some families only."
        )
    if text is not None and max(config.target_layer_ids) == text.num_hidden_layers:
        notes.append(f"It reads the state after the last layer, {text.num_hidden_layers}; not tried in llama.cpp.")
    return notes


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
