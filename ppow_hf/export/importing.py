"""A published checkpoint as a PPOWDrafter, so that a drafter already in service can be trained on with PPOW.

Knows checkpoints, their targets' configurations and the Hub; trains nothing and changes no weight.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, LlamaConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..data.models import load_config, resolve
from ..data.weights import brief
from ..runtime.configuration_ppow import PPOWDrafterConfig
from ..runtime.modeling_ppow import PPOWDrafter
from ..runtime.new_drafter import settable_fields
from .block_checkpoint import BlockCheckpoint, is_block_config, read_block
from .checkpoint import Eagle3Checkpoint, read_config, read_eagle3
from .formats import drafter_state

CHECKPOINT_FILES = ["config.json", "*.safetensors", "pytorch_model*.bin"]


def import_drafter(
    checkpoint: str | Path,
    target: Any = None,
    *,
    target_layer_ids: list[int] | None = None,
    revision: str | None = None,
    **settings: Any,
) -> PPOWDrafter:
    """The EAGLE-3, DFlash or DSpark drafter of `checkpoint` as a [`PPOWDrafter`], tensor for tensor.

    Args:
        checkpoint (`str` or `Path`):
            Folder or Hub name of a checkpoint as its authors publish them (`LlamaForCausalLMEagle3`,
            `DFlashDraftModel`, `Qwen3DSparkModel`), or in the format of speculators.
        target (`PreTrainedModel` or `str`, *optional*):
            The target, or its folder or name. Needed where an EAGLE-3 checkpoint leaves out the embeddings (the
            target's are used then; a name makes the target load) or says nothing about the layers it reads. A DFlash
            or DSpark checkpoint without embeddings or head shares its target's.
        target_layer_ids (`list[int]`, *optional*):
            The target's states that an EAGLE-3 drafter reads, counted as transformers' `hidden_states`. By default
            those of the checkpoint, or else engines' own rule (2, N // 2, N - 3) for N layers.
        revision (`str`, *optional*): of a checkpoint on the Hub.
        settings: further fields of [`PPOWDrafterConfig`], such as `max_window`.

    Raises:
        `ValueError`: if the checkpoint computes something else, lacks a tensor, or does not fit the target, with
            everything that is wrong; `FileNotFoundError` if it is not there.
    """
    for name in sorted(set(settings) - settable_fields()):
        raise ValueError(f"{name}: not a field of PPOWDrafterConfig that an import can set. Leave it out.")
    folder = _local(checkpoint, revision)
    if not is_block_config(read_config(folder, "checkpoint")):
        return _import_eagle3(folder, target, target_layer_ids, settings)
    if target_layer_ids is not None:
        raise ValueError("target_layer_ids: a DFlash or DSpark checkpoint names its own. Leave it out.")
    return _import_block(folder, target, settings)


def _import_block(checkpoint: Path, target: Any, settings: dict[str, Any]) -> PPOWDrafter:
    found, target_config = read_block(checkpoint), _target_config(target)
    problems = found.problems() + _misfits(found, target_config)
    if problems:
        raise ValueError(f"checkpoint: {str(checkpoint)!r} cannot be used as it is: {'; '.join(problems)}.")
    config = _block_config(found, target, target_config, settings)
    drafter = AutoModel.from_config(config, dtype=found.tensors["fc.weight"].dtype)
    tables = ("d2t", "t2d")
    state = {f"draft_model.{name}": tensor for name, tensor in found.tensors.items() if name not in tables}
    if config.draft_vocab_size is not None:
        drafter.set_draft_vocabulary(found.tensors["d2t"] + torch.arange(len(found.tensors["d2t"])))
        state |= {name: tensor for name, tensor in found.tensors.items() if name in tables}
        state.setdefault("t2d", drafter.t2d)
    # Assigned, since a confidence head may be kept in another number format than the rest.
    drafter.load_state_dict(state, strict=True, assign=True)
    if target is not None and not isinstance(target, str | Path):
        drafter.attach_target(target)
    return drafter.eval()


def _import_eagle3(
    checkpoint: Path, target: Any, target_layer_ids: list[int] | None, settings: dict[str, Any]
) -> PPOWDrafter:
    found = read_eagle3(checkpoint)
    target_config = _target_config(target)
    layers = target_layer_ids or found.layer_ids
    if layers is None and target_config is not None:
        count = target_config.num_hidden_layers
        layers = [2, count // 2, count - 3]
    if layers is None:
        raise ValueError(
            f"target: {str(checkpoint)!r} does not say which of the target's layers it reads; pass the target, for "
            "the rule that engines use, or target_layer_ids."
        )
    found.layer_ids = list(layers)
    problems = found.problems() + _misfits(found, target_config)
    if problems:
        raise ValueError(f"checkpoint: {str(checkpoint)!r} cannot be used as it is: {'; '.join(problems)}.")
    tensors = dict(found.tensors)
    if "embed_tokens.weight" not in tensors:
        tensors["embed_tokens.weight"] = _target_embeddings(target, found)
    config = _drafter_config(found, target, target_config, settings)
    # Not made and then cast: that would round the rotary frequencies, which stay float32 in every number format.
    drafter = AutoModel.from_config(config, dtype=tensors["fc.weight"].dtype)
    state = drafter_state(tensors)
    if config.draft_vocab_size is None:
        state = {name: tensor for name, tensor in state.items() if name not in ("d2t", "t2d")}
    else:
        drafter.set_draft_vocabulary(tensors["d2t"] + torch.arange(len(tensors["d2t"])))
        state.setdefault("t2d", drafter.t2d)
    drafter.load_state_dict(state, strict=True)
    return drafter.eval()


def _local(checkpoint: str | Path, revision: str | None) -> Path:
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(checkpoint, Path) or checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") != 1:
        raise FileNotFoundError(f"checkpoint: there is no folder {str(checkpoint)!r}.")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(checkpoint, revision=revision, allow_patterns=CHECKPOINT_FILES))


def _target_config(target: Any) -> Any:
    if target is None:
        return None
    if isinstance(target, str | Path):
        return load_config(str(target), "target")[0].get_text_config()
    return target.config.get_text_config()


def _misfits(found: Eagle3Checkpoint | BlockCheckpoint, target_config: Any) -> list[str]:
    if target_config is None:
        return []
    problems = []
    width = found.tensors["fc.weight"].shape[-1] if "fc.weight" in found.tensors else None
    layers: list[int] = found.layer_ids or []
    if width is not None and width != len(layers) * target_config.hidden_size:
        problems.append(
            f"fc.weight: {width} columns, where {len(layers)} states of this target have "
            f"{len(layers) * target_config.hidden_size}"
        )
    if max(layers, default=0) > target_config.num_hidden_layers:
        problems.append(f"target_layer_ids: {layers} of a target with {target_config.num_hidden_layers} layers")
    if found.vocab_size != target_config.vocab_size:
        problems.append(f"vocab_size: {found.vocab_size}, and the target's is {target_config.vocab_size}")
    return problems


def _target_embeddings(target: Any, found: Eagle3Checkpoint) -> torch.Tensor:
    if target is None:
        raise ValueError(
            "target: the checkpoint has no embed_tokens.weight, so that the target's embeddings belong to it; pass "
            "the target, or its folder or name."
        )
    if isinstance(target, str | Path):
        from transformers import AutoModelForCausalLM

        name = str(target)
        try:
            target = AutoModelForCausalLM.from_pretrained(resolve(name), dtype="auto")
        except ValueError as error:
            raise ValueError(
                f"target: {name!r} is not loaded as a causal language model ({brief(error)}). Load it with a class of "
                "its own, and pass the model."
            ) from error
    weight = target.get_input_embeddings().weight.detach().cpu()
    wanted = (found.vocab_size, found.fields["hidden_size"])
    if tuple(weight.shape) != wanted:
        raise ValueError(
            f"target: its embeddings are {tuple(weight.shape)} and the drafter needs {wanted}: it is another target."
        )
    return weight.to(found.tensors["fc.weight"].dtype)


# Fields of config.json that are not of the drafter's layers.
NOT_OF_LAYERS = (
    *("architectures", "model_type", "transformers_version", "auto_map", "torch_dtype", "dtype", "block_size"),
    *("draft_vocab_size", "target_hidden_size", "num_target_layers", "mask_token_id", "target_layer_ids"),
    *("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov"),
    "sample_from_anchor",
)


def _drafter_config(found, target, target_config, settings) -> PPOWDrafterConfig:
    not_for_llama = ("architectures", "model_type", "transformers_version", "auto_map", "eagle_config", "torch_dtype")
    fields = {
        name: value
        for name, value in found.fields.items()
        if name not in not_for_llama and not name.startswith(("eagle_", "draft_", "norm_", "target_"))
    }
    try:
        draft = LlamaConfig(**{**fields, "num_hidden_layers": 1, "tie_word_embeddings": False})
    except Exception as error:  # transformers checks fields by classes of its own
        raise ValueError(f"checkpoint: config.json is not a Llama layer's: {brief(error)}") from error
    take_plain_rope(draft)
    return PPOWDrafterConfig(
        architecture="eagle",
        draft_config=draft,
        vocab_size=found.vocab_size,
        draft_vocab_size=None if found.draft_vocab_size == found.vocab_size else found.draft_vocab_size,
        target_layer_ids=found.layer_ids,
        **{**found.norms, **_described(found, draft, target, target_config), **settings},
    )


def _block_config(found: BlockCheckpoint, target: Any, target_config: Any, settings: dict) -> PPOWDrafterConfig:
    names = ("dflash_config", "speculators_config", "transformer_layer_config", *NOT_OF_LAYERS)
    fields = {name: value for name, value in found.fields.items() if name not in names}
    try:
        draft = Qwen3Config(**{**fields, "tie_word_embeddings": False})
    except Exception as error:  # transformers checks fields by classes of its own
        raise ValueError(f"checkpoint: config.json is not of Qwen3 layers: {brief(error)}") from error
    take_plain_rope(draft)
    whole = found.draft_vocab_size == found.vocab_size
    return PPOWDrafterConfig(
        architecture="block",
        draft_config=draft,
        vocab_size=found.vocab_size,
        draft_vocab_size=None if whole else found.draft_vocab_size,
        target_layer_ids=found.layer_ids,
        shares_target_embeddings="embed_tokens.weight" not in found.tensors,
        shares_target_head="lm_head.weight" not in found.tensors,
        block_size=found.drafted,
        sample_from_anchor=found.sample_from_anchor,
        mask_token_id=found.mask_token_id or 0,  # `problems` has looked that there is one
        markov_rank=found.markov_rank,
        confidence_head=found.confidence_head,
        **{"max_window": found.drafted, **_described(found, draft, target, target_config), **settings},
    )


def take_plain_rope(draft: Any) -> None:
    """Read "mrope" of a vision model's drafter, whose positions along three axes are one for text, as plain rope.

    Raises `ValueError` for a type that transformers does not know.
    """
    given = dict(draft.rope_parameters)
    kind = given.get("rope_type", "default")
    if kind == "mrope":
        draft.rope_parameters = {"rope_type": "default", "rope_theta": given.get("rope_theta", 10000.0)}
    elif kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        raise ValueError(
            f"checkpoint: rope_scaling of config.json is of the type {kind!r}, which transformers does not know; it "
            f"knows {', '.join(sorted(ROPE_INIT_FUNCTIONS))}."
        )


def _described(
    found: Eagle3Checkpoint | BlockCheckpoint, draft: Any, target: Any, target_config: Any
) -> dict[str, Any]:
    """What a drafter's configuration says about its target."""
    name = str(target) if isinstance(target, str | Path) else None
    if name is None and target is not None:
        name = target.config._name_or_path or None
    described: dict[str, Any] = {
        "target_name_or_path": name or found.target_name,
        "target_hidden_size": found.tensors["fc.weight"].shape[-1] // len(found.layer_ids or [0]),
        "target_model_type": getattr(target_config, "model_type", None),
        # Rotary positions have no end of their own: where the target is known its context is the limit.
        "context_length": getattr(target_config or draft, "max_position_embeddings", None),
    }
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = found.fields.get(token)
        described[token] = given if given is not None else getattr(target_config, token, None)
    return described
