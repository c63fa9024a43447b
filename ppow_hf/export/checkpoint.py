"""A published checkpoint on disk, an EAGLE-3 one of either format, and everything that can be wrong with it.

The one reader behind both the export, which checks what it wrote, and the import of what others published. Knows
files and formats; knows nothing about drafters.
"""

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.weights import folder_damage
from ..runtime.configuration_ppow import EAGLE_NORMS, is_whole
from .block_formats import DFLASH, DSPARK, SPECULATORS_DSPARK
from .formats import EAGLE3_ARCHITECTURE, LAYER_NAMES, SPECULATORS_ARCHITECTURE, eagle3_shapes

OPTIONAL_TENSORS = ("embed_tokens.weight", "t2d")  # absent: the target's embeddings; t2d follows from d2t
# Variants that compute something else than EAGLE-3 does, by the config field that turns them on.
UNKNOWN_VARIANTS = ("fc_norm", "attention_bias", "mlp_bias")
ACCEPTED = (EAGLE3_ARCHITECTURE, SPECULATORS_ARCHITECTURE, DFLASH, DSPARK, SPECULATORS_DSPARK)
# What stands in the fields of a config.json, wherever they are.
KINDS = {
    "a whole number": ("block_size", "mask_token_id", "markov_rank", "draft_vocab_size"),
    "a list of whole numbers": (
        "target_layer_ids",
        "aux_hidden_state_layer_ids",
        "eagle_aux_hidden_state_layer_ids",
    ),
    "an object": ("dflash_config", "eagle_config", "transformer_layer_config", "speculators_config", "verifier"),
    "a list": ("architectures", "layer_types"),
}


@dataclass
class Checkpoint:
    """What published checkpoints have in common.

    Args:
        config (`dict`): config.json as it stands.
        fields (`dict`): its part about the layers.
        tensors (`dict[str, torch.Tensor]`): all tensors by the names in the files.
        layer_ids (`list[int]`, *optional*): the target's states read, counted as transformers' `hidden_states`.
        target_name (`str`, *optional*): the target it names.
    """

    config: dict[str, Any]
    fields: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    layer_ids: list[int] | None
    target_name: str | None

    @property
    def vocab_size(self) -> int:
        return self.fields["vocab_size"]

    @property
    def draft_vocab_size(self) -> int:
        return self.config.get("draft_vocab_size") or self.vocab_size

    def tensor_problems(
        self, expected: dict[str, tuple[int | None, ...]], optional: tuple[str, ...], kind: str
    ) -> list[str]:
        """What is wrong with the tensors, of which the `expected` names and shapes are needed but for `optional`."""
        whole = self.draft_vocab_size == self.vocab_size
        found = tensor_problems(self.tensors, expected, optional, kind, whole)
        states = self.tensors.get("fc.weight")
        if self.layer_ids and states is not None and states.shape[-1] % len(self.layer_ids):
            found.append(f"fc.weight: {states.shape[-1]} columns for the states of {len(self.layer_ids)} layers")
        return found + vocabulary_problems(self.tensors, self.vocab_size)


@dataclass
class Eagle3Checkpoint(Checkpoint):
    """What [`read_eagle3`] found: `format` is `"eagle3"` (format A) or `"speculators"` (format B)."""

    format: str

    @property
    def norms(self) -> dict[str, bool]:
        """Which of speculators' norms it has."""
        places = (self.config, self.fields, self.config.get("eagle_config") or {})
        return {name: any(place.get(name) for place in places) for name in EAGLE_NORMS}

    def problems(self) -> list[str]:
        """Each way in which this is not an EAGLE-3 checkpoint that engines serve as it was trained; empty if none."""
        layer = LAYER_NAMES[self.format]
        expected = eagle3_shapes(self.fields, self.draft_vocab_size, layer, self.norms["norm_before_fc"])
        return [*self._config_problems(), *self.tensor_problems(expected, OPTIONAL_TENSORS, "EAGLE-3")]

    def _config_problems(self) -> list[str]:
        found = []
        if self.fields.get("num_hidden_layers", 1) != 1:
            found.append(f"num_hidden_layers: {self.fields['num_hidden_layers']}, where EAGLE-3 has one layer")
        for name in UNKNOWN_VARIANTS:
            if self.config.get(name) or self.fields.get(name):
                found.append(f"{name}: a variant whose computation differs from EAGLE-3's")
        if self.format == "speculators" and "norm_before_residual" not in self.config:
            found.append("norm_before_residual: not given, and readers disagree about what that means")
        ids = self.layer_ids
        if ids is not None:
            if list(ids) != sorted(set(ids)) or min(ids, default=-1) < 0:
                found.append(f"eagle_aux_hidden_state_layer_ids: {ids}, where ascending ids from 0 on are needed")
            inner = (self.config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
            outer = self.config.get("eagle_aux_hidden_state_layer_ids")
            if inner is not None and outer is not None and list(inner) != [layer - 1 for layer in outer]:
                found.append(f"eagle_config: its layer ids {inner} are not the outer ones {outer} less one")
        return found


def tensor_problems(
    tensors: dict[str, torch.Tensor],
    expected: dict[str, tuple[int | None, ...]],
    optional: tuple[str, ...],
    kind: str,
    whole_vocabulary: bool,
) -> list[str]:
    """What is missing of the `expected` names and shapes, of another kind or shape, not finite, or too much."""
    found = []
    for name, shape in expected.items():
        if name not in tensors:
            if name not in optional:
                found.append(f"{name}: missing")
            continue
        given = tuple(tensors[name].shape)
        if len(given) != len(shape) or any(want not in (None, have) for want, have in zip(shape, given, strict=True)):
            wanted = tuple("any" if size is None else size for size in shape)
            found.append(f"{name}: shape {given} instead of {wanted}")
    for name, tensor in tensors.items():
        if name not in expected:
            # A full draft vocabulary may still come with its translation, which changes nothing.
            if name in ("d2t", "t2d") and whole_vocabulary:
                continue
            found.append(f"{name}: not a tensor of {kind}")
        elif name not in ("d2t", "t2d") and not tensor.is_floating_point():
            found.append(f"{name}: {tensor.dtype} instead of a floating-point format")
        elif tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            found.append(f"{name}: holds infinite or undefined numbers")
    return found


def vocabulary_problems(tensors: dict[str, torch.Tensor], vocab_size: int) -> list[str]:
    """What is wrong with `d2t` and `t2d`."""
    offsets = tensors.get("d2t")
    if offsets is None or offsets.ndim != 1:
        return []
    found = []
    if offsets.dtype != torch.int64:
        found.append(f"d2t: {offsets.dtype} instead of torch.int64")
    ids = offsets.long() + torch.arange(len(offsets))
    if not bool((ids[1:] > ids[:-1]).all()) or int(ids[0]) < 0 or int(ids[-1]) >= vocab_size:
        found.append(
            "d2t: the target ids i + d2t[i] do not ascend within the target's vocabulary (d2t holds offsets, not ids)"
        )
        return found
    flags = tensors.get("t2d")
    if flags is not None:
        if flags.dtype != torch.bool:
            found.append(f"t2d: {flags.dtype} instead of torch.bool")
        elif flags.shape == (vocab_size,) and flags.nonzero().flatten().tolist() != ids.tolist():
            found.append("t2d: marks other tokens than d2t names")
    return found


def read_config(folder: Path, argument: str) -> dict[str, Any]:
    """The config.json of a checkpoint's folder; raises naming `argument` where there is none, or a file is damaged."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: {str(folder)!r} has no config.json. Pass the folder of a drafter.")
    damage = folder_damage(folder)
    if damage is not None:
        raise ValueError(f"{argument}: {str(folder)!r} cannot be read: {damage}.")
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{argument}: config.json of {str(folder)!r} holds no object. Download it again.")
    check_kinds(config, str(folder), argument)
    return config


def check_kinds(fields: dict[str, Any], folder: str, argument: str) -> None:
    """Raise `ValueError` naming `argument` for fields of a config.json that hold something else than they should."""
    for kind, names in KINDS.items():
        for name in names:
            value = fields.get(name)
            if value is None:
                continue
            if not _is_of_kind(value, kind):
                raise ValueError(
                    f"{argument}: config.json of {folder!r} says {name}: {value!r}, where {kind} is needed. Download "
                    "it again, or mend it."
                )
            if kind == "an object":
                check_kinds(value, folder, argument)


def _is_of_kind(value: Any, kind: str) -> bool:
    if kind == "an object":
        return isinstance(value, dict)
    if kind == "a whole number":
        return is_whole(value)
    return isinstance(value, list) and (kind == "a list" or all(map(is_whole, value)))


def check_fields(folder: Path, fields: dict[str, Any], needed: Sequence[str], argument: str) -> None:
    """Raise `ValueError` naming `argument` where one of the `needed` numbers is not in config.json."""
    missing = [name for name in needed if not isinstance(fields.get(name), int)]
    if missing:
        raise ValueError(f"{argument}: config.json of {str(folder)!r} lacks {', '.join(missing)}.")


def named_target(config: dict[str, Any]) -> str | None:
    """The target that a config.json of speculators names."""
    return ((config.get("speculators_config") or {}).get("verifier") or {}).get("name_or_path")


def read_eagle3(folder: str | Path, argument: str = "checkpoint") -> Eagle3Checkpoint:
    """Read config.json and all tensors of an EAGLE-3 checkpoint of either format.

    Raises `FileNotFoundError` or `ValueError` naming `argument` if `folder` holds no such checkpoint.
    """
    folder = Path(folder)
    config = read_config(folder, argument)
    architectures = config.get("architectures") or []
    if EAGLE3_ARCHITECTURE in architectures:
        kind, fields = "eagle3", config
    elif SPECULATORS_ARCHITECTURE in architectures or config.get("speculators_model_type") == "eagle3":
        kind, fields = "speculators", config.get("transformer_layer_config") or {}
    else:
        raise ValueError(
            f"{argument}: {str(folder)!r} is a {architectures or config.get('model_type')}, not an EAGLE-3, DFlash or "
            f"DSpark drafter, by the architectures in config.json. Accepted are {', '.join(ACCEPTED)}."
        )
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    check_fields(folder, fields, needed, argument)
    ids = config.get("eagle_aux_hidden_state_layer_ids")
    inner = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if ids is None and inner is not None:  # SGLang's way to count: the layer after whose output a state is taken
        ids = [layer + 1 for layer in inner]
    return Eagle3Checkpoint(
        format=kind,
        config=config,
        fields=fields,
        tensors=read_tensors(folder, argument),
        layer_ids=None if ids is None else [int(layer) for layer in ids],
        target_name=named_target(config),
    )


def _read_pickle(file: Path, argument: str) -> dict[str, torch.Tensor]:
    """The tensors of a `pytorch_model.bin`, of which nothing but tensors is read."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
        if isinstance(found, dict) and all(isinstance(one, torch.Tensor) for one in found.values()):
            return found
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        pass
    raise ValueError(
        f"{argument}: {file.name} in {str(file.parent)!r} holds something else than tensors, or is damaged; pickled "
        "objects are never run. Convert it to safetensors where you trust it."
    )


def read_tensors(folder: Path, argument: str) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's folder, by their names."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        tensors |= load_file(file)
    if not files:
        files = sorted(folder.glob("pytorch_model*.bin"))
        for file in files:
            tensors |= _read_pickle(file, argument)
    if not files:
        raise FileNotFoundError(f"{argument}: {str(folder)!r} has neither *.safetensors nor pytorch_model.bin.")
    return tensors
