"""The target writes completions anew, so that a drafter learns the target's own text; what it wrote is kept on disk.

Knows prompts, files and processes; how a target writes is in targets.py.
"""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers import __version__ as transformers_version

from .files import write_whole
from .sequences import SequenceDataset, extract_prompts
from .targets import complete_batch, end_token_ids, is_split, padding_token_id, plain_distribution, target_identity

logger = logging.getLogger(__name__)

CACHE_FORMAT_VERSION = 1

T = TypeVar("T")


def regenerate(
    source: Any,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_new_tokens: int,
    temperature: float | Sequence[float] = 0.0,
    batch_size: int = 8,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
    argument: str = "train_dataset",
    across_processes: bool = False,
) -> SequenceDataset:
    """The target writes a completion of every prompt; the prompts with their completions are the sequences.

    The target's plain distribution is followed: of its `generation_config` only the end-of-sequence tokens are used,
    not top-k, top-p or penalties, so that at T = 0 every completion token is the target's argmax. (In 16-bit precision
    a batch and a single prompt may round a near tie differently.) A completion goes through its first end-of-sequence
    token. The result is kept on disk under a hash of the prompts, the target and the settings, and read from there the
    next time; an interrupted call's batches too, so that the next one goes on after them. The target's mode and
    `generation_config`, and the global random state, are left as they were.

    Args:
        source: what [`extract_prompts`] reads.
        target (`PreTrainedModel`): the model that writes.
        tokenizer (`PreTrainedTokenizerBase`): the target's tokenizer.
        max_length (`int`): tokens in the longest sequence, prompt and completion together. Prompts are cut to the
            larger of `max_length - max_new_tokens` and half of `max_length`.
        max_new_tokens (`int`): tokens in the longest completion.
        temperature (`float` or `Sequence[float]`, *optional*, defaults to `0.0`):
            0 takes the most likely token, above 0 samples; of several, prompts take one after the other in turn.
        batch_size (`int`, *optional*, defaults to `8`): prompts that are completed at once.
        seed (`int`, *optional*, defaults to `0`): with a temperature, decides the samples, together with `batch_size`.
        cache_dir (`str` or `os.PathLike`, *optional*): folder of the results on disk; by default
            `$HF_HOME/ppow_hf/regenerated`, or `~/.cache/ppow_hf/regenerated` where `HF_HOME` is not set.
        argument (`str`, *optional*, defaults to `"train_dataset"`): name of the argument in errors and warnings.
        across_processes (`bool`, *optional*, defaults to `False`): whether every process of the default group makes
            this call, so that each one's target can write a share of the prompts; all return the whole. Targets that
            are split over processes (tensor parallel, FSDP, ZeRO-3) write it all together.

    Returns a [`SequenceDataset`] in the order of the prompts, with loss on the completions, marked as written by the
    target where T = 0.

    Raises `ValueError` for settings out of range, for a dataset without prompts, and for a prompt that fills the
    target's context.
    """
    if max_length < 2:
        raise ValueError(f"max_length: {max_length} given. A prompt and its completion take at least 2 tokens.")
    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name}: {value} given. Pass {least} or more.")
    temperatures = [float(temperature)] if isinstance(temperature, int | float) else [float(t) for t in temperature]
    if not temperatures or min(temperatures) < 0:
        raise ValueError(f"temperature: {temperature} given. Pass 0 for the most likely token, or more to sample.")

    prompts = extract_prompts(source, tokenizer, longest_prompt(max_length, max_new_tokens), argument)
    length_limit = _length_limit(prompts, target, tokenizer, max_length, argument)

    eos_token_ids = end_token_ids(target.generation_config, tokenizer)
    pad_token_id = padding_token_id(tokenizer, eos_token_ids)
    cache_folder = Path(cache_dir) if cache_dir is not None else _default_cache_folder()
    cache_folder.mkdir(parents=True, exist_ok=True)  # before hours of generation, not after
    processes = _Processes(across_processes and not is_split(target))
    parts = []
    for number, each in enumerate(temperatures[: len(prompts)]):
        own_prompts = prompts[number :: len(temperatures)]
        settings: dict[str, Any] = {
            "length_limit": length_limit,
            "max_new_tokens": max_new_tokens,
            "temperature": each,
            "eos_token_ids": eos_token_ids,
        }
        if each > 0:  # at T = 0 neither changes what is written
            settings |= {"seed": seed, "batch_size": batch_size}
        tensors_path = cache_folder / f"{_cache_key(own_prompts, target, settings)}.safetensors"
        dataset = _load_cached(tensors_path, own_prompts, each)
        cached_everywhere = all(processes.gather(dataset is not None))
        if dataset is None or not cached_everywhere:
            parts_on_disk = _PartsOnDisk(tensors_path)
            completions = _generate_completions(
                own_prompts, target, length_limit, max_new_tokens, each, batch_size, seed, eos_token_ids, pad_token_id,
                parts_on_disk, processes,
            )  # fmt: skip
            sequences = [prompt + completion for prompt, completion in zip(own_prompts, completions, strict=True)]
            dataset = _regenerated_dataset(sequences, own_prompts, each)
            if processes.keeps_files and _save_cached(tensors_path, dataset, target, settings):
                parts_on_disk.remove()
        parts.append(dataset)
    return parts[0] if len(parts) == 1 else _in_turn(parts)


def longest_prompt(max_length: int, max_new_tokens: int) -> int:
    """Tokens that a prompt keeps, so that it and its completion fit in `max_length`."""
    return max(max_length - max_new_tokens, max_length // 2)


def _in_turn(parts: list[SequenceDataset]) -> SequenceDataset:
    """One sequence of each part after the other."""
    items = [parts[n % len(parts)][n // len(parts)] for n in range(sum(map(len, parts)))]
    return SequenceDataset(*([item[name] for item in items] for name in ("input_ids", "loss_mask", "target_written")))


def _generate_completions(
    prompts: list[list[int]],
    target: PreTrainedModel,
    length_limit: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
    eos_token_ids: list[int],
    pad_token_id: int,
    on_disk: "_PartsOnDisk",
    processes: "_Processes",
) -> list[list[int]]:
    def room(number: int) -> int:
        return min(max_new_tokens, length_limit - len(prompts[number]))

    # Longest first, so that a lack of memory shows at once. A batch's prompts have the same room, so that no row of it
    # runs past the context while others still write.
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    groups = [list(group) for _, group in groupby(order, key=room)]
    batches = [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]

    completions: dict[int, list[int]] = {}
    for kept in processes.gather(on_disk.read(len(prompts))):
        completions |= kept
    left = [(n, batch) for n, batch in enumerate(batches) if any(number not in completions for number in batch)]
    own: dict[int, list[int]] = {}
    try:
        already = len(prompts) - sum(len(batch) for _, batch in left)
        bar = {"desc": "Target writes completions", "unit": "prompt", "disable": processes.rank > 0}
        with plain_distribution(target), tqdm(total=len(prompts), initial=already, **bar) as progress:
            for batch_number, batch in left[processes.rank :: processes.count]:
                written = complete_batch(
                    target,
                    [prompts[number] for number in batch],
                    room(batch[0]),
                    temperature,
                    _batch_seed(seed, batch_number),
                    eos_token_ids,
                    pad_token_id,
                )
                own |= dict(zip(batch, written, strict=True))
                on_disk.add({number: own[number] for number in batch})
                progress.update(min(len(batch) * processes.count, len(prompts) - progress.n))
    finally:
        on_disk.close()
    for each in processes.gather(own):
        completions |= each
    return [completions[number] for number in range(len(prompts))]


class _Processes:
    """This process's place among those that share the work, itself alone where it is not `shared`."""

    def __init__(self, shared: bool):
        shared = shared and torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank: int = torch.distributed.get_rank() if shared else 0
        self.count: int = torch.distributed.get_world_size() if shared else 1
        # A machine's processes have one disk.
        self.keeps_files = not shared or int(os.environ.get("LOCAL_RANK", self.rank)) == 0

    def gather(self, value: T) -> list[T]:
        """Every process's `value`, at every process."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values


def _batch_seed(seed: int, batch_number: int) -> int:
    """Seeds of different runs never meet, as `seed + batch_number` would."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{batch_number}".encode()).digest()[:7], "big")


def _regenerated_dataset(sequences: list[list[int]], prompts: list[list[int]], temperature: float) -> SequenceDataset:
    completion_masks = [
        [False] * len(prompt) + [True] * (len(sequence) - len(prompt))
        for sequence, prompt in zip(sequences, prompts, strict=True)
    ]
    return SequenceDataset(sequences, completion_masks, completion_masks if temperature == 0 else None)


def _length_limit(
    prompts: list[list[int]],
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    argument: str,
) -> int:
    """Most tokens of a sequence: `max_length` within the target's context; `ValueError` if a prompt fills it."""
    context_length = getattr(target.config.get_text_config(), "max_position_embeddings", None)
    longest = max(range(len(prompts)), key=lambda number: len(prompts[number]))
    if context_length is not None and len(prompts[longest]) >= context_length:
        raise ValueError(
            f"{argument}: prompt {longest} ({tokenizer.decode(prompts[longest][:12])!r}...) has "
            f"{len(prompts[longest])} tokens and leaves no room for a completion in the target's context of "
            f"{context_length} (max_position_embeddings). Lower max_length ({max_length}), which cuts the prompts, or "
            "shorten the prompt."
        )
    return max_length if context_length is None else min(max_length, context_length)


# The regenerated sequences on disk


def _default_cache_folder() -> Path:
    home = os.environ.get("HF_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache") / "ppow_hf" / "regenerated"


def _cache_key(prompts: list[list[int]], target: PreTrainedModel, settings: dict[str, Any]) -> str:
    content = {
        "format_version": CACHE_FORMAT_VERSION,
        "target": target_identity(target),
        "settings": settings,
        "prompts": prompts,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _load_cached(tensors_path: Path, prompts: list[list[int]], temperature: float) -> SequenceDataset | None:
    """The kept sequences, or `None` where there are none or they are damaged, in which case they are deleted."""
    metadata_path = tensors_path.with_suffix(".json")
    if not metadata_path.exists():  # written last: without it, the tensors may be missing or half a run's
        return None
    try:
        metadata = json.loads(metadata_path.read_text(encoding="utf-8"))
        tensors = load_tensors(tensors_path.read_bytes())
        sequences = [ids.tolist() for ids in tensors["token_ids"].split(tensors["lengths"].tolist())]
        if any(sequence[: len(prompt)] != prompt for sequence, prompt in zip(sequences, prompts, strict=True)):
            raise ValueError("the prompts in it are others")
        dataset = _regenerated_dataset(sequences, prompts, temperature)
        if dataset.token_fingerprint != metadata["fingerprint"]:
            raise ValueError("its fingerprint is not the recorded one")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        logger.warning("%s is damaged (%s): deleted, and written anew by the target.", tensors_path, error)
        tensors_path.unlink(missing_ok=True)
        metadata_path.unlink(missing_ok=True)
        return None
    return dataset


class _PartsOnDisk:
    """What a call has written so far: JSON Lines of a prompt's number and its completion, a file for each writer."""

    def __init__(self, tensors_path: Path):
        self._folder, self._key = tensors_path.parent, tensors_path.stem
        self._file: Any = None
        self._writes = True

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob(f"{self._key}.*.part.jsonl"))

    def read(self, prompts: int) -> dict[int, list[int]]:
        """Completions of earlier calls; a line that was cut off is left out."""
        completions: dict[int, list[int]] = {}
        for path in self._paths():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    number, completion = json.loads(line)
                except ValueError:
                    continue
                if 0 <= number < prompts:
                    completions[number] = completion
        return completions

    def add(self, completions: dict[int, list[int]]) -> None:
        if not self._writes:
            return
        try:
            if self._file is None:
                path = self._folder / f"{self._key}.{uuid.uuid4().hex}.part.jsonl"
                self._file = path.open("w", encoding="utf-8")
            self._file.write("".join(json.dumps(item) + "\n" for item in completions.items()))
            self._file.flush()
        except OSError as error:
            self._writes = False
            logger.warning("What the target writes could not be kept in %s (%s).", self._folder, error)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        for path in self._paths():
            path.unlink(missing_ok=True)


def _save_cached(
    tensors_path: Path, dataset: SequenceDataset, target: PreTrainedModel, settings: dict[str, Any]
) -> bool:
    """Whether it could be kept."""
    metadata = {
        "format_version": CACHE_FORMAT_VERSION,
        "fingerprint": dataset.token_fingerprint,
        "sequences": len(dataset),
        "tokens": len(dataset._token_ids),
        "target": target.config.name_or_path,
        "settings": settings,
        "versions": {"torch": str(torch.__version__), "transformers": transformers_version},
    }
    tensors = {"token_ids": dataset._token_ids, "lengths": dataset._ends.diff()}
    try:
        write_whole(tensors_path, save_tensors(tensors))
        write_whole(tensors_path.with_suffix(".json"), json.dumps(metadata, indent=2))
    except OSError as error:  # a full disk is no reason to lose what the target wrote
        logger.warning("The regenerated sequences could not be kept at %s (%s).", tensors_path, error)
        return False
    return True
