"""The states of a target along texts, written to disk so that drafters train without it.

Every shard holds the states of consecutive sequences. Processes that record into one folder take shards in turn; a
shard appears whole or not at all. Knows files and the target's forward; knows no drafter.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel

from ..data.files import write_whole
from ..data.sequences import SequenceDataset
from ..data.targets import is_split, target_identity
from ..data.weights import brief
from ..runtime.compatibility import num_layers
from ..runtime.configuration_ppow import vocabulary_fingerprint
from ..runtime.target_weights import embedding_matrix, head_matrix
from .recorded_states import (
    CONFIG,
    DAMAGE,
    FORMAT,
    LAST,
    MANIFEST,
    SEQUENCE_TENSORS,
    SEQUENCES,
    WEIGHTS,
    layer_name,
    read_manifest,
    shard_name,
)
from .target import FrozenTarget

try:
    import fcntl
except ImportError:  # Windows: several processes would record the same shards
    fcntl = None  # type: ignore[assignment]

SHARD_BYTES = 2**28
TOKENS_PER_FORWARD = 2048
SHORTEST = 0.9  # of a forward's longest sequence, so that little is padding
OWN_BYTES = 6  # of a token: its id and its two masks


class Recording:
    """What is to be recorded, and how it is laid out on disk.

    Args:
        target (`PreTrainedModel`): the target.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        sequences ([`SequenceDataset`]): what it reads.
        layer_ids (`list[int]`): layers whose states are kept beside the last ones.
        max_length (`int`): what the sequences were cut to.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): number format of the states on disk.
        max_gigabytes (`float`, *optional*): most that the folder may take; sequences beyond it are left out.
        shard_bytes (`int`, *optional*, defaults to 2**28): most that a shard takes, one sequence at least.
        read (`Callable`, *optional*): `read(texts)` gives the states `[S, h]` of the layers and the last ones of each
            text `[S]`, in place of the target's forward; it takes a shard's texts at once.

    Raises `ValueError` for a target whose logits are more than its head on its last state, and where not one sequence
    fits in `max_gigabytes`.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        tokenizer: Any,
        sequences: SequenceDataset,
        layer_ids: list[int],
        max_length: int,
        dtype: torch.dtype = torch.bfloat16,
        max_gigabytes: float | None = None,
        shard_bytes: int = SHARD_BYTES,
        read: Callable[[list[torch.Tensor]], list[list[torch.Tensor]]] | None = None,
    ):
        text: Any = target.config.get_text_config()
        self.target, self.tokenizer, self.dtype = FrozenTarget(target, layer_ids or None), tokenizer, dtype
        if not self.target.head_is_plain:
            raise ValueError(
                f"--target: {type(target).__name__} scales or caps its logits after its head, so that its last "
                "states do not tell them. Train with the target itself."
            )
        self.is_split = is_split(target)
        self._read = read
        self.layer_names = [layer_name(layer, num_layers(text)) for layer in layer_ids]
        self.hidden_size: int = text.hidden_size
        self.bytes_per_token = (len(layer_ids) + 1) * self.hidden_size * dtype.itemsize + OWN_BYTES
        self.weights = target_tensors(target)
        self.weight_bytes = sum(tensor.nbytes for tensor in self.weights.values())
        lengths = sequences.lengths.tolist()
        self.left_out = 0
        if max_gigabytes is not None:
            kept = sequences_within(lengths, max_gigabytes * 1e9 - self.weight_bytes, self.bytes_per_token)
            if kept == 0:
                raise ValueError(
                    f"--max-gigabytes: {max_gigabytes} given, and the target's embeddings, its head and one sequence "
                    f"take {(self.weight_bytes + lengths[0] * self.bytes_per_token) / 1e9:.3g}. Raise it."
                )
            self.left_out, lengths = len(lengths) - kept, lengths[:kept]
            if self.left_out:
                items = [sequences[row] for row in range(kept)]
                sequences = SequenceDataset(*([item[name] for item in items] for name in SEQUENCE_TENSORS))
        self.sequences, self.lengths = sequences, lengths
        self.manifest = {
            "format": FORMAT,
            "target": target.config._name_or_path,
            "target_revision": getattr(target.config, "_commit_hash", None),
            "target_dtype": str(target.dtype).removeprefix("torch."),
            "target_fingerprint": target_identity(target)[:16],
            "vocabulary_fingerprint": vocabulary_fingerprint(tokenizer),
            "data_fingerprint": sequences.token_fingerprint,
            "sequences_fingerprint": sequences.fingerprint,
            "max_length": max_length,
            "layer_ids": list(layer_ids),
            "states_dtype": str(dtype).removeprefix("torch."),
            "sequences": len(lengths),
            "tokens": sum(lengths),
            "shard_starts": shard_starts(lengths, shard_bytes // self.bytes_per_token),
        }

    @property
    def total_bytes(self) -> int:
        """What the finished folder takes, small files aside."""
        return sum(self.lengths) * self.bytes_per_token + self.weight_bytes

    def open_folder(self, folder: Path) -> list[int]:
        """Write what is not in shards, once, and return the numbers of the shards that are missing.

        Raises `ValueError` for a folder with another record, and where the disk is too small for the rest.
        """
        path = folder / MANIFEST
        if path.is_file():
            check_same_record(folder, self.manifest)
        starts, missing = self.manifest["shard_starts"], self.missing_shards(folder)
        needed = sum(sum(self.lengths[starts[n] : starts[n + 1]]) for n in missing) * self.bytes_per_token
        if not path.is_file():
            needed += self.weight_bytes
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise ValueError(
                f"--output-dir: {needed / 1e9:.1f} GB are needed in {str(folder)!r} and {free / 1e9:.1f} GB are free. "
                "Pass --max-gigabytes, or a folder on another disk."
            )
        if not path.is_file():
            self._write_once(folder)
        return missing

    def missing_shards(self, folder: Path) -> list[int]:
        return [n for n in range(len(self.manifest["shard_starts"]) - 1) if not (folder / shard_name(n)).is_file()]

    def _write_once(self, folder: Path) -> None:
        items = [self.sequences[row] for row in range(len(self.sequences))]
        tensors = {name: torch.cat([item[name] for item in items]) for name in SEQUENCE_TENSORS}
        tensors["input_ids"] = tensors["input_ids"].int()
        write_whole(folder / SEQUENCES, save(tensors | {"lengths": torch.tensor(self.lengths)}))
        write_whole(folder / WEIGHTS, save(self.weights))
        self.tokenizer.save_pretrained(folder)
        config = self.target.model.config.to_dict()
        config.pop("quantization_config", None)  # the head and the embeddings are kept as plain numbers
        write_whole(folder / CONFIG, json.dumps(config, indent=1, default=str) + "\n")
        write_whole(folder / MANIFEST, json.dumps(self.manifest, indent=1) + "\n")

    def record(self, folder: Path, missing: list[int], progress: Callable[[int], None]) -> int:
        """Record the `missing` shards that no other process has taken; `progress` is told tokens. Returns tokens.

        Of a target that is split over processes the first one calls this, and the others [`follow`].
        """
        tokens = 0
        for number in missing:
            path = folder / shard_name(number)
            with claimed(path) as file:
                if file is None:
                    continue
                self._next_shard(number)
                rows = range(*self.manifest["shard_starts"][number : number + 2])
                file.write(save(self.shard(rows, progress)))
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
                tokens += sum(self.lengths[row] for row in rows)
        self._next_shard(None)
        return tokens

    def follow(self) -> None:
        """Take part in the forwards of the process that records, until it has recorded everything."""
        while (number := self._next_shard(None)) is not None:
            self.shard(range(*self.manifest["shard_starts"][number : number + 2]), lambda tokens: None)

    def _next_shard(self, number: int | None) -> int | None:
        """The first process's `number`, on all processes that the target is split over."""
        numbers = [number]
        if self.is_split:
            torch.distributed.broadcast_object_list(numbers)
        return numbers[0]

    def shard(self, rows: range, progress: Callable[[int], None]) -> dict[str, torch.Tensor]:
        """The states `[T, h]` of consecutive sequences, T tokens end to end, by the names of their layers."""
        starts = {}
        total = 0
        for row in rows:
            starts[row] = total
            total += self.lengths[row]
        names = [*self.layer_names, LAST]
        states = {name: torch.empty(total, self.hidden_size, dtype=self.dtype) for name in names}
        with self.target.frozen():
            batches = [list(rows)] if self._read else batches_by_length(rows, self.lengths, TOKENS_PER_FORWARD)
            for batch in batches:
                read = self._read or self._read_with_target
                found = read([self.sequences[row]["input_ids"] for row in batch])
                for row, parts in zip(batch, found, strict=True):
                    for name, part in zip(names, parts, strict=True):
                        states[name][starts[row] : starts[row] + self.lengths[row]] = part.to(self.dtype)
                progress(sum(self.lengths[row] for row in batch))
        return states

    def _read_with_target(self, texts: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        """The states `[S, h]` of the layers and the last ones, of each text `[S]`, by one forward."""
        pad = self.tokenizer.pad_token_id or 0
        input_ids = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=pad).to(self.target.device)
        lengths = torch.tensor([len(text) for text in texts], device=input_ids.device)
        mask = (torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]).long()
        encoding = self.target.encode(input_ids, mask, with_cache=False)
        parts = [] if encoding.states is None else encoding.states.split(self.hidden_size, dim=-1)
        every = [*parts, encoding.sources]
        return [[part[row, : len(text)] for part in every] for row, text in enumerate(texts)]


def target_tensors(target: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The target's embeddings and head as plain matrices, of tied ones the embeddings alone."""
    embeddings, head = embedding_matrix(target), head_matrix(target)
    if embeddings is None or head is None:
        raise ValueError("--target: its embeddings or its head cannot be read. Load it in another number format.")
    tensors = {"embeddings.weight": embeddings.cpu().contiguous()}
    if head.data_ptr() != embeddings.data_ptr() or head.shape != embeddings.shape:
        tensors["head.weight"] = head.cpu().contiguous()
    bias = getattr(target.get_output_embeddings(), "bias", None)
    if isinstance(bias, torch.Tensor):
        tensors["head.bias"] = bias.detach().cpu().contiguous()
    return tensors


def sequences_within(lengths: list[int], most_bytes: float, bytes_per_token: int) -> int:
    """How many of the first sequences fit in `most_bytes`."""
    total = 0
    for count, length in enumerate(lengths):
        total += length * bytes_per_token
        if total > most_bytes:
            return count
    return len(lengths)


def shard_starts(lengths: list[int], most_tokens: int) -> list[int]:
    """The first sequence of each shard of at most `most_tokens` tokens (or one sequence), and the end."""
    starts, tokens = [0], 0
    for row, length in enumerate(lengths):
        if tokens and tokens + length > most_tokens:
            starts.append(row)
            tokens = 0
        tokens += length
    return [*starts, len(lengths)]


def batches_by_length(rows: range, lengths: list[int], most_tokens: int) -> Iterator[list[int]]:
    """Rows of about the same length, together at most `most_tokens` tokens (or one row)."""
    batch: list[int] = []
    for row in sorted(rows, key=lambda row: -lengths[row]):
        longest = lengths[batch[0]] if batch else lengths[row]
        if batch and ((len(batch) + 1) * longest > most_tokens or lengths[row] < SHORTEST * longest):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def check_same_record(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise `ValueError` where the record in `folder` is of something else, saying in what."""
    try:
        stored = read_manifest(folder)
    except DAMAGE as error:
        raise ValueError(
            f"--output-dir: {MANIFEST} in {str(folder)!r} cannot be read ({brief(error)}). Pass another folder."
        ) from error
    named = {name: value for name, value in manifest.items() if name not in ("target", "shard_starts")}
    different = [
        f"{name} is {stored[name]!r} there and {value!r} here"
        for name, value in named.items()
        if name in stored and stored[name] != value  # earlier versions wrote no sequences_fingerprint
    ]
    if different or stored["shard_starts"] != manifest["shard_starts"]:
        raise ValueError(
            f"--output-dir: {str(folder)!r} holds another record: {'; '.join(different) or 'its shards differ'}. Give "
            "what it was recorded with, or another folder."
        )


@contextmanager
def claimed(path: Path) -> Iterator[Any]:
    """An empty file beside `path`, to be moved there, held by this process alone; `None` where another one has it.

    The claim of a process that died is free.
    """
    with open(path.with_name(f"{path.name}.part"), "ab") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        if path.exists():  # another process finished it meanwhile, and this may be its file
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                os.unlink(file.name)
            yield None
            return
        file.truncate(0)
        yield file
