"""The directory formats of serving engines: names and shapes of tensors, and the fields of config.json.

Pure tables and conversions in both directions; reads and writes no files. The formats are those that vLLM, SGLang and
speculators load.

Words: *format A* is the one that the authors of EAGLE-3 publish (`LlamaForCausalLMEagle3`, layer called `midlayer`),
read by vLLM and SGLang; *format B* is speculators' (`Eagle3DraftModel`, layer called `layers.0`).
"""

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import torch

from ..runtime.configuration_ppow import EAGLE_NORMS
from ..runtime.draft_models import scaled_states

EAGLE3_ARCHITECTURE = "LlamaForCausalLMEagle3"
SPECULATORS_ARCHITECTURE = "Eagle3DraftModel"
SPECULATORS_VERSION = "0.9.0"  # the version whose classes and converter load what is written here
LAYER_FIELDS = (
    *("attention_bias", "head_dim", "hidden_act", "hidden_size", "initializer_range", "intermediate_size"),
    *("max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps"),
)
LAYER_NAMES = {"eagle3": "midlayer.", "speculators": "layers.0."}


def eagle3_shapes(
    fields: dict[str, Any], width: int, layer: str, norm_before_fc: bool = False
) -> dict[str, tuple[int | None, ...]]:
    """Name and shape of every tensor of an EAGLE-3 checkpoint; `None` stands for any size.

    Args:
        fields (`dict`): config.json's fields of the one layer.
        width (`int`): size of the draft vocabulary. `d2t` and `t2d` must be there for a reduced one only.
        layer (`str`): what the layer is called, one of `LAYER_NAMES`.
        norm_before_fc (`bool`): whether the target's states are normalized before `fc`.
    """
    hidden, inner, heads = fields["hidden_size"], fields["intermediate_size"], fields["num_attention_heads"]
    head_dim = fields.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, (fields.get("num_key_value_heads") or heads) * head_dim
    shapes: dict[str, tuple[int | None, ...]] = {
        "embed_tokens.weight": (fields["vocab_size"], hidden),
        "fc.weight": (hidden, None),  # as wide as the target's states together
        f"{layer}input_layernorm.weight": (hidden,),
        f"{layer}hidden_norm.weight": (hidden,),
        f"{layer}post_attention_layernorm.weight": (hidden,),
        f"{layer}self_attn.q_proj.weight": (queries, 2 * hidden),
        f"{layer}self_attn.k_proj.weight": (keys, 2 * hidden),
        f"{layer}self_attn.v_proj.weight": (keys, 2 * hidden),
        f"{layer}self_attn.o_proj.weight": (hidden, queries),
        f"{layer}mlp.gate_proj.weight": (inner, hidden),
        f"{layer}mlp.up_proj.weight": (inner, hidden),
        f"{layer}mlp.down_proj.weight": (hidden, inner),
        "norm.weight": (hidden,),
        "lm_head.weight": (width, hidden),
    }
    if width != fields["vocab_size"]:
        shapes |= {"d2t": (width,), "t2d": (fields["vocab_size"],)}
    if norm_before_fc:
        shapes["input_norm.weight"] = (None,)  # as wide as fc's input
    return shapes


def named_tensors(drafter: Any) -> dict[str, torch.Tensor]:
    """The drafter's tensors by the names of its inner model, on the CPU."""
    state = drafter.state_dict()
    return {name.removeprefix("draft_model."): tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def eagle3_tensors(
    drafter: Any, layer: str, embeddings: bool = True, translation: bool = False
) -> dict[str, torch.Tensor]:
    """The tensors of an eagle [`PPOWDrafter`] under an EAGLE-3 checkpoint's names, on the CPU.

    `fc` reads the target's states as they are: `state_scales` are multiplied into it.

    With `embeddings` those of a drafter that shares its target's too, which must have been attached. With
    `translation` `d2t` and `t2d` for a whole vocabulary too: OpenVINO's converter needs them, vLLM refuses them.
    """
    tensors = {}
    if drafter.config.shares_target_embeddings and embeddings:
        tokens = torch.arange(drafter.config.vocab_size)
        tensors["embed_tokens.weight"] = drafter.draft_model.target_embeddings.rows(tokens, drafter.dtype)
    for name, tensor in named_tensors(drafter).items():
        if name.startswith(LAYER_NAMES["eagle3"]):
            name = layer + name.removeprefix(LAYER_NAMES["eagle3"])
        tensors[name] = tensor
    if drafter.config.state_scales is not None:
        tensors["fc.weight"] = scaled_states(tensors["fc.weight"], drafter.config.state_scales)
    width, size = drafter.config.draft_vocab_size, drafter.config.vocab_size
    if width in (None, size):
        tensors = {name: tensor for name, tensor in tensors.items() if name not in ("d2t", "t2d")}
    if width in (None, size) and translation:
        tensors["d2t"] = torch.zeros(size, dtype=torch.int64)
        tensors["t2d"] = torch.ones(size, dtype=torch.bool)
    if not embeddings:
        tensors.pop("embed_tokens.weight", None)
    return tensors


def drafter_state(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The reverse of [`eagle3_tensors`]: an EAGLE-3 checkpoint's tensors, of either format, under our names."""
    state = {}
    for name, tensor in tensors.items():
        if name.startswith(LAYER_NAMES["speculators"]):
            name = LAYER_NAMES["eagle3"] + name.removeprefix(LAYER_NAMES["speculators"])
        state[name if name in ("d2t", "t2d") else f"draft_model.{name}"] = tensor
    return state


def portable_rope(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the rotary base where older readers look for it too.

    transformers 5 writes `rope_parameters`; a reader that knows only `rope_theta` and `rope_scaling` would fall back
    to a base of 10,000 without a word.
    """
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict) or "rope_theta" not in parameters:
        return config
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    scaled = scaling.get("rope_type", "default") != "default"
    return {**config, "rope_theta": parameters["rope_theta"]} | ({"rope_scaling": scaling} if scaled else {})


def layer_config(drafter: Any, own_names: Sequence[str]) -> dict[str, Any]:
    """config.json's fields of a drafter's layers, `own_names` being those of their family alone."""
    config, draft = drafter.config, drafter.config.draft_config
    fields = {name: getattr(draft, name) for name in (*LAYER_FIELDS, *own_names)}
    fields |= {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields |= {
        "model_type": draft.model_type,
        "rope_parameters": dict(draft.rope_parameters),
        "tie_word_embeddings": False,
        "torch_dtype": str(drafter.dtype).removeprefix("torch."),
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    return portable_rope(fields)


def eagle3_config(drafter: Any) -> dict[str, Any]:
    """config.json of format A.

    The target's layers stand in it twice: vLLM reads the outer ids, which count as transformers' `hidden_states` do,
    SGLang the inner ones, to which it adds one. Without either, vLLM would take three layers by its own rule.
    """
    config = drafter.config
    ids = list(config.target_layer_ids)
    return {
        "architectures": [EAGLE3_ARCHITECTURE],
        **layer_config(drafter, ["mlp_bias"]),
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "target_hidden_size": config.target_hidden_size or config.draft_config.hidden_size,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": ids,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in ids]},
    }


def speculators_config(
    drafter: Any, target_name: str, target_architectures: list[str], speculative_tokens: int
) -> dict[str, Any]:
    """config.json of format B; the verifier is the target, found by its name or folder."""
    config = drafter.config
    hidden = config.target_hidden_size or config.draft_config.hidden_size
    return {
        "architectures": [SPECULATORS_ARCHITECTURE],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "torch_dtype": str(drafter.dtype).removeprefix("torch."),
        "tie_word_embeddings": False,
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "target_hidden_size": None if hidden == config.draft_config.hidden_size else hidden,
        **{name: getattr(config, name) for name in EAGLE_NORMS},
        "eagle_aux_hidden_state_layer_ids": list(config.target_layer_ids),
        "transformer_layer_config": layer_config(drafter, ["mlp_bias"]),
        "speculators_config": proposal_config("eagle3", target_name, target_architectures, speculative_tokens),
    }


def proposal_config(
    algorithm: str, target_name: str, target_architectures: list[str], speculative_tokens: int
) -> dict[str, Any]:
    """How speculators' drafter is used, and of which target."""
    proposal = {"proposal_type": "greedy", "speculative_tokens": speculative_tokens}
    return {
        "algorithm": algorithm,
        "default_proposal_method": "greedy",
        "proposal_methods": [{**proposal, "verifier_accept_k": 1, "accept_tolerance": 0.0}],
        "verifier": {"name_or_path": target_name, "architectures": target_architectures},
    }


def medusa_shapes(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of vLLM's `MedusaModel`, by its config.json."""
    hidden: int = fields["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {}
    for head in range(fields["num_heads"]):
        shapes[f"lm_heads.{head}.weight"] = (fields["vocab_size"], hidden)
        for layer in range(fields["num_hidden_layers"]):
            shapes[f"blocks.{head}.layers.{layer}.weight"] = (hidden, hidden)
            shapes[f"blocks.{head}.layers.{layer}.bias"] = (hidden,)
    return shapes


def medusa_config(drafter: Any) -> dict[str, Any]:
    """config.json of vLLM's `MedusaModel`. Without `medusa_fc_bias` it would drop the biases without a word."""
    config, heads = drafter.config, drafter.draft_model.lm_heads
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": heads[0].in_features,
        "vocab_size": config.vocab_size,
        "num_heads": len(heads),
        "num_hidden_layers": config.medusa_layers,
        "medusa_fc_bias": True,
        "torch_dtype": str(drafter.dtype).removeprefix("torch."),
    }


def package_version() -> str:
    """Version of this package as installed."""
    return importlib.metadata.version("ppow-hf")
