"""GGUF files for llama.cpp: a causal language model, such as a standalone drafter or a target, or an EAGLE-3 drafter.

Knows names, shapes and number formats of GGUF, by the `gguf` package. Changes no weight but for its number format.
"""

from pathlib import Path
from typing import Any

import torch

from .formats import eagle3_tensors
from .gguf_tokenizer import GGUFVocabulary, gguf_vocabulary

# GGUF's name of each number format, by ours.
NUMBER_FORMATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
FAMILIES = ("llama", "qwen2", "qwen3")
# Rotary embeddings that differ from the plain ones by constant factors of their frequencies.
ROPE_TYPES = ("default", "linear", "llama3")
EAGLE3_NAMES = {
    "fc.weight": "fc.weight",
    "midlayer.input_layernorm.weight": "blk.0.attn_norm.weight",
    "midlayer.hidden_norm.weight": "blk.0.attn_norm_2.weight",
    "midlayer.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "midlayer.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "midlayer.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "midlayer.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "midlayer.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    "midlayer.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "midlayer.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "midlayer.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "embed_tokens.weight": "token_embd.weight",
}


def gguf_package() -> Any:
    """The `gguf` package. Raises `ImportError`, saying how to get it, if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError('format: "gguf" needs the gguf package; run `pip install "ppow-hf[gguf]"`.') from error
    return gguf


def gguf_name(number_format: str) -> str:
    """Name of an exported drafter's file."""
    return f"drafter-{NUMBER_FORMATS[number_format].lower()}.gguf"


def interleaved_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection `[heads * d, ...]` in the order of llama.cpp's Llama family.

    transformers turns number i of a head with number i + d/2, llama.cpp number 2i with 2i + 1.
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def rotary_factors(config: Any) -> torch.Tensor | None:
    """By what the plain rotary frequencies are divided, `[head_dim / 2]`; `None` if they are plain.

    Raises `ValueError` for a kind of rotary embedding that factors cannot express.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ValueError(f"model: rotary embeddings of type {kind!r}; GGUF is written for {', '.join(ROPE_TYPES)}.")
    if kind == "default":
        return None
    scaled = LlamaRotaryEmbedding(config).inv_freq
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(len(scaled)) / len(scaled))
    return plain / scaled


def write_causal_lm(
    path: str | Path, model: Any, tokenizer: Any, number_format: str = "float16"
) -> dict[str, torch.Tensor]:
    """Write a causal language model of the Llama, Qwen2 or Qwen3 family, with its tokenizer, as one GGUF file.

    Returns the tensors by their names in the file. Raises `ValueError` for other families, rotary embeddings or
    tokenizers.
    """
    gguf = gguf_package()
    config = model.config
    family = config.model_type
    if family not in FAMILIES or config.hidden_act != "silu":
        raise ValueError(f"model: a {family} model; GGUF is written for {', '.join(FAMILIES)}, with SiLU.")
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise ValueError("model: layers with a sliding window; llama.cpp's models of this family have none.")
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, family.upper()), config.num_hidden_layers)
    tied = config.tie_word_embeddings
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue  # llama.cpp takes the embeddings where the head is missing
        if family == "llama" and "q_proj." in name:
            tensor = interleaved_rotary(tensor, config.num_attention_heads)
        elif family == "llama" and "k_proj." in name:
            tensor = interleaved_rotary(tensor, config.num_key_value_heads)
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = tensor
    factors = rotary_factors(config)
    if factors is not None:
        if family != "llama":
            raise ValueError(f"model: a {family} model with scaled rotary embeddings; they are written for llama.")
        tensors["rope_freqs.weight"] = factors
    fields = layer_fields(config)
    return _write(path, family, fields, tensors, gguf_vocabulary(tokenizer, config.vocab_size), number_format)


def write_eagle3(
    path: str | Path, drafter: Any, tokenizer: Any, number_format: str = "float16", embeddings: bool = True
) -> dict[str, torch.Tensor]:
    """Write an eagle drafter as the GGUF file of an EAGLE-3 drafter, with its target's tokenizer.

    `embeddings`: whether to write them; without, llama.cpp drafts with the target's. Returns the tensors by their
    names in the file.
    """
    config, draft = drafter.config, drafter.config.draft_config
    found = eagle3_tensors(drafter, "midlayer.", embeddings=embeddings)
    found["midlayer.self_attn.q_proj.weight"] = interleaved_rotary(
        found["midlayer.self_attn.q_proj.weight"], draft.num_attention_heads
    )
    found["midlayer.self_attn.k_proj.weight"] = interleaved_rotary(
        found["midlayer.self_attn.k_proj.weight"], draft.num_key_value_heads
    )
    tensors = {EAGLE3_NAMES[name]: tensor for name, tensor in found.items() if name not in ("d2t", "t2d")}
    if drafter.d2t is not None:  # ids of the target, where safetensors hold offsets
        tensors["d2t"] = drafter.d2t.cpu() + torch.arange(len(drafter.d2t))
    factors = rotary_factors(draft)
    if factors is not None:
        tensors["rope_freqs.weight"] = factors
    fields = layer_fields(draft) | {
        "vocab_size": config.vocab_size,
        "target_layers": list(config.target_layer_ids),  # llama.cpp hands out a layer's input: as hidden_states count
        "target_hidden_size": config.target_hidden_size or draft.hidden_size,
        "norm_before_residual": False,
    }
    return _write(path, "eagle3", fields, tensors, gguf_vocabulary(tokenizer, config.vocab_size), number_format)


def layer_fields(config: Any) -> dict[str, Any]:
    """GGUF's fields of a Llama-like `config`, without the family's prefix."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }


def _write(
    path: str | Path,
    architecture: str,
    fields: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    vocabulary: GGUFVocabulary,
    number_format: str,
) -> dict[str, torch.Tensor]:
    """Write the file, read it back to compare, and return `tensors`."""
    gguf = gguf_package()
    if number_format not in NUMBER_FORMATS:
        raise ValueError(f"dtype: {number_format!r} given; GGUF is written in {', '.join(NUMBER_FORMATS)}.")
    wanted = NUMBER_FORMATS[number_format]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if wanted == "F32" else f"MOSTLY_{wanted}"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        add[type(value)](f"{architecture}.{name}", value)
    _add_vocabulary(writer, vocabulary)
    stored = {}
    for name, tensor in tensors.items():
        kind = _stored_format(gguf, tensor, wanted)
        values = tensor.detach().cpu().numpy() if kind.name == "I64" else tensor.detach().cpu().float().numpy()
        stored[name] = values if kind.name == "I64" else gguf.quants.quantize(values, kind)
        writer.add_tensor(name, stored[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    wrong = [name for name in stored if name not in found or found[name].tobytes() != stored[name].tobytes()]
    if wrong or found.keys() != stored.keys():
        raise ValueError(
            f"output_dir: {Path(path).name} reads back otherwise than it was written: {', '.join(wrong)}."
        )
    return tensors


def _stored_format(gguf: Any, tensor: torch.Tensor, wanted: str) -> Any:
    """Matrices in the format asked for, or float16 where q8_0's blocks of 32 do not fit; in float32 vectors, and
    matrices with numbers too small for float16, in which q8_0 keeps its scales."""
    if not tensor.is_floating_point():
        return gguf.GGMLQuantizationType.I64
    if tensor.ndim == 1 or (wanted in ("F16", "Q8_0") and _has_small_columns(tensor)):
        return gguf.GGMLQuantizationType.F32
    if wanted == "F16" and bool((tensor.detach().abs() > torch.finfo(torch.float16).max).any()):
        raise ValueError("dtype: the weights exceed float16; write bfloat16 or q8_0.")
    return gguf.GGMLQuantizationType["F16" if wanted == "Q8_0" and tensor.shape[-1] % 32 else wanted]


def _has_small_columns(matrix: torch.Tensor) -> bool:
    """Whether a column's mean size, but for one of zeros, is below float16's smallest normal number."""
    sizes = matrix.detach().float().abs().mean(0)
    return bool(((sizes > 0) & (sizes < torch.finfo(torch.float16).tiny)).any())


def _add_vocabulary(writer: Any, vocabulary: GGUFVocabulary) -> None:
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for kind, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if kind in vocabulary.special_ids:
            add(vocabulary.special_ids[kind])
    writer.add_add_bos_token(vocabulary.adds_bos)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)
