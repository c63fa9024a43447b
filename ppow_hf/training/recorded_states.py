"""A target's states on disk, and training from them without the target.

Knows the folder that recording.py writes: its sequences, the states of every token in shards, and the target's head,
embeddings and configuration. Knows nothing about drafters' weights, rewards or optimizers.
"""

import bisect
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from ..data.sequences import SequenceDataset
from ..data.weights import brief
from ..runtime.compatibility import num_layers
from ..runtime.start_weights import state_scale
from .target import TargetEncoding, TrainingTarget

logger = logging.get_logger(__name__)

FORMAT = 1
MANIFEST, SEQUENCES, WEIGHTS, CONFIG = "record.json", "sequences.safetensors", "target.safetensors", "config.json"
MANIFEST_KINDS = {
    "target": str,
    "target_dtype": str,
    "target_fingerprint": str,
    "vocabulary_fingerprint": str,
    "data_fingerprint": str,
    "max_length": int,
    "layer_ids": list,
    "states_dtype": str,
    "sequences": int,
    "tokens": int,
    "shard_starts": list,
}
LAST = "last"  # the state after the final norm, which the head reads
NO_FORWARD = "target_states: recorded states cannot verify drafted windows; train with the target itself."
MEASURED_SEQUENCES = 4
SEQUENCE_TENSORS = ("input_ids", "loss_mask", "target_written")
# What reading a file raises that is damaged, or not of this record.
DAMAGE = (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError)


def shard_name(number: int) -> str:
    return f"states-{number:05d}.safetensors"


def layer_name(layer: int, num_layers: int) -> str:
    """The tensor of a shard that holds the states after `layer` of a target's `num_layers` layers."""
    return LAST if layer == num_layers else f"layer.{layer}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The MANIFEST of a folder; raises one of DAMAGE, which says what is wrong, for one that `ppow record` did not
    write."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict):
        raise ValueError(f"it holds a {type(manifest).__name__}, not an object")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"its format is {manifest.get('format')!r}, and this version of ppow_hf reads {FORMAT}")
    for name, kind in MANIFEST_KINDS.items():
        if not isinstance(manifest.get(name), kind):
            raise ValueError(f"its {name} is {manifest.get(name)!r}")
    if not isinstance(getattr(torch, manifest["target_dtype"], None), torch.dtype):
        raise ValueError(f"its target_dtype is {manifest['target_dtype']!r}")
    starts = manifest["shard_starts"]
    if starts != sorted(starts) or (starts[0], starts[-1]) != (0, manifest["sequences"]):
        raise ValueError(f"its shard_starts do not go from 0 to its {manifest['sequences']} sequences")
    return manifest


class RecordFolder:
    """What `ppow record` left in one folder. States are read from the disk when they are asked for.

    Args:
        folder (`str` or `os.PathLike`): the folder.

    Attributes:
        manifest (`dict`): what was recorded, of which target, in which shards.
        tensors (`dict[str, list[torch.Tensor]]`): of each of SEQUENCE_TENSORS, that of every recorded sequence.

    Raises `ValueError` for a folder without a record, or with a damaged one.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder).expanduser()
        with self._reading(MANIFEST):
            self.manifest = read_manifest(self.folder)
        self._starts: list[int] = self.manifest["shard_starts"]  # first sequence of each shard, and the end
        with self._reading(CONFIG):
            (self.folder / CONFIG).stat()  # where it is missing, transformers would look on the Hub
            self.config = AutoConfig.from_pretrained(self.folder)
        with self._reading(SEQUENCES):
            tensors = load_file(self.folder / SEQUENCES)
            lengths = tensors["lengths"]
            if (len(lengths), int(lengths.sum())) != (self.manifest["sequences"], self.manifest["tokens"]):
                raise ValueError(f"it holds other sequences than {MANIFEST} says")
            parts = {name: tensors[name].split(lengths.tolist()) for name in SEQUENCE_TENSORS}
        self._ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).tolist()
        self._rows = self._recorded_rows()
        self.tensors = {name: [parts[name][row] for row in self._rows] for name in SEQUENCE_TENSORS}

    def __len__(self) -> int:
        return len(self._rows)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Raise errors of the file `name` with what to do about them."""
        try:
            yield
        except FileNotFoundError as error:
            raise ValueError(
                f"target_states: {str(self.folder)!r} has no {name}, so that it holds no recorded states. Write "
                "them with ppow record."
            ) from error
        except DAMAGE as error:
            raise ValueError(
                f"target_states: {name} in {str(self.folder)!r} cannot be read ({brief(error)}). Record the states "
                "again."
            ) from error

    def _recorded_rows(self) -> list[int]:
        """The numbers of the sequences whose shards are there."""
        shards = range(len(self._starts) - 1)
        found = [shard for shard in shards if (self.folder / shard_name(shard)).is_file()]
        rows = [row for shard in found for row in range(self._starts[shard], self._starts[shard + 1])]
        if not rows:
            raise ValueError(f"target_states: {str(self.folder)!r} holds no shard yet. Run ppow record to its end.")
        if len(found) < len(shards):
            logger.warning(
                f"target_states: {len(found)} of {len(shards)} shards are recorded in {str(self.folder)!r}; "
                f"{self._starts[-1] - len(rows)} sequences of the others are left out. Run ppow record again for the "
                "rest."
            )
        return rows

    def target(self) -> Any:
        """The target's configuration, token embeddings and head; its layers have no weights."""
        with self._reading(CONFIG), torch.device("meta"):
            target = AutoModelForCausalLM.from_config(self.config, dtype=getattr(torch, self.manifest["target_dtype"]))
        target.config._name_or_path = self.manifest["target"]
        target.config._commit_hash = self.manifest.get("target_revision")
        embeddings: Any = target.get_input_embeddings()
        head: Any = target.get_output_embeddings()
        with self._reading(WEIGHTS):
            weights = load_file(self.folder / WEIGHTS)
            matrix = weights["embeddings.weight"]
            for module, weight in ((embeddings, matrix), (head, weights.get("head.weight", matrix))):
                check_shape(weight.shape, module.weight.shape)
                module.weight = nn.Parameter(weight, requires_grad=False)
        bias = weights.get("head.bias")
        head.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return target.requires_grad_(False).eval()

    def read(self, index: int, names: list[str]) -> list[torch.Tensor]:
        """The recorded states `[S, h]` of the folder's sequence `index`, one tensor for each of `names`."""
        row = self._rows[index]
        shard = bisect.bisect_right(self._starts, row) - 1
        first = self._ends[self._starts[shard]]
        span = slice(self._ends[row] - first, self._ends[row + 1] - first)
        path = self.folder / shard_name(shard)
        shape = [self._ends[self._starts[shard + 1]] - first, self.config.get_text_config().hidden_size]
        try:
            with safe_open(path, framework="pt") as file:
                slices = [file.get_slice(name) for name in names]
                for part in slices:
                    check_shape(part.get_shape(), shape)
                return [part[span] for part in slices]
        except DAMAGE as error:
            raise ValueError(
                f"target_states: {str(path)!r} cannot be read ({error}). Delete it and run ppow record again."
            ) from error


def check_shape(found: Sequence[int], expected: Sequence[int]) -> None:
    """Raise `ValueError` for a tensor that is not this record's."""
    if list(found) != list(expected):
        raise ValueError(f"it holds a tensor of the shape {list(found)}, and this record's has {list(expected)}")


class StateRecord:
    """The recorded states of one target: those of one folder of `ppow record`, or of several end to end.

    Args:
        folders (`str` or `os.PathLike`): the folders.

    Attributes:
        sequences ([`SequenceDataset`]): those whose states are recorded, in the order of the data.
        target (`PreTrainedModel`): the target's configuration, token embeddings and head; its layers have no weights.
        manifest (`dict`): that of the first folder, which the others have in common but for their sequences.

    Raises `ValueError` for folders without a record, with a damaged one, or with records that do not go together.
    """

    def __init__(self, *folders: str | os.PathLike):
        if not folders:
            raise ValueError("target_states: no folder given. Name one or several of `ppow record`.")
        self._parts = [RecordFolder(folder) for folder in folders]
        for part in self._parts[1:]:
            check_joinable(self._parts[0], part)
        self._ends = list(itertools.accumulate(len(part) for part in self._parts))
        tensors = ([one for part in self._parts for one in part.tensors[name]] for name in SEQUENCE_TENSORS)
        self.sequences = SequenceDataset(*tensors)
        self.manifest = self._parts[0].manifest
        self.target = self._parts[0].target()

    @property
    def layer_ids(self) -> list[int]:
        """The layers whose states are recorded beside the last ones."""
        return self.manifest["layer_ids"]

    @property
    def max_length(self) -> int:
        """What the longest sequences were cut to."""
        return max(part.manifest["max_length"] for part in self._parts)

    def state_scales(self) -> list[float]:
        """The `state_scales` of an eagle drafter that reads `layer_ids`, by the first sequences."""
        count = num_layers(self.target.config.get_text_config())
        names = [layer_name(layer, count) for layer in self.layer_ids]
        rows = [self.read(index, names) for index in range(min(len(self.sequences), MEASURED_SEQUENCES))]
        return [state_scale(torch.cat(parts)) for parts in zip(*rows, strict=True)]

    def read(self, index: int, names: list[str]) -> list[torch.Tensor]:
        """The recorded states `[S, h]` of sequence `index`, one tensor for each of `names`."""
        number = bisect.bisect_right(self._ends, index)
        part = self._parts[number]
        return part.read(index - self._ends[number] + len(part), names)


def open_record(given: str | os.PathLike | Sequence[str | os.PathLike] | StateRecord | None) -> StateRecord | None:
    """The record that `target_states` stands for: a folder's, that of several, or one that is open."""
    if isinstance(given, str | os.PathLike):
        return StateRecord(given)
    return StateRecord(*given) if isinstance(given, Sequence) else given


def check_joinable(first: RecordFolder, other: RecordFolder) -> None:
    """Raise `ValueError` where two folders hold the states of different targets, layers or number formats."""
    for name in ("target_fingerprint", "vocabulary_fingerprint", "layer_ids", "states_dtype"):
        if first.manifest[name] != other.manifest[name]:
            raise ValueError(
                f"target_states: {name} is {first.manifest[name]!r} in {str(first.folder)!r} and "
                f"{other.manifest[name]!r} in {str(other.folder)!r}. Give folders recorded with the same target, "
                "--layers, --states-dtype and --dtype."
            )


class RecordedTarget(TrainingTarget):
    """A target of which recorded states are read, in place of a [`FrozenTarget`].

    Args:
        record ([`StateRecord`]): what was recorded.
        layer_ids (`list[int]`, *optional*): states that the drafter reads.
        device (`torch.device`): where batches are.
    """

    verifies = False

    def __init__(self, record: StateRecord, layer_ids: list[int] | None, device: torch.device):
        head = record.target.get_output_embeddings().to(device)
        super().__init__(head, head_is_plain=True)
        record.target.get_input_embeddings().to(device)
        self.record, self.layer_ids, self.device = record, layer_ids, device
        self.vocab_size = head.out_features
        count = num_layers(record.target.config.get_text_config())
        missing = sorted(set(layer_ids or ()) - {*record.layer_ids, count})
        if missing:
            raise ValueError(
                f"target_states: the states after the layers {missing}, which the drafter reads, are not recorded; "
                f"those after {[*record.layer_ids, count]} are. Record them, or make a drafter with "
                "target_layer_ids of the record."
            )
        self._names = [layer_name(layer, count) for layer in layer_ids or ()]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Nothing of the target is trained."""
        yield

    def encode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, with_cache: bool, rows: torch.Tensor | None = None
    ) -> TargetEncoding:
        """What was recorded of right-padded sequences `[B, S]`, which are the record's `rows` `[B]`."""
        assert rows is not None
        if with_cache:
            raise ValueError(NO_FORWARD)
        self.forward_tokens += int(attention_mask.sum())  # charged, as for an encoding that is kept in memory
        length = input_ids.shape[1]
        names = [LAST, *(name for name in dict.fromkeys(self._names) if name != LAST)]
        batches: dict[str, Any] = {name: [] for name in names}
        for row in rows.tolist():
            for name, part in zip(names, self.record.read(row, names), strict=True):
                batches[name].append(nn.functional.pad(part, (0, 0, 0, length - len(part))))
        found = {name: torch.stack(parts).to(self.device) for name, parts in batches.items()}
        states = torch.cat([found[name] for name in self._names], dim=-1) if self._names else None
        return TargetEncoding(found[LAST].to(self.head.weight.dtype), states, None, attention_mask)

    def keep_encodings(self, max_bytes: int) -> None:
        """They are kept on the disk already."""

    def verify(
        self, encoding: TargetEncoding, prefixes: torch.Tensor, draft_ids: torch.Tensor, max_tokens: int = 4096
    ) -> torch.Tensor:
        raise ValueError(NO_FORWARD)

    def greedy_window_log_probs(self, encoding: TargetEncoding, prefixes: torch.Tensor, window: int) -> torch.Tensor:
        raise ValueError(NO_FORWARD)
