"""The folder of a training: one training in it at a time, what its checkpoints were trained with, and its end.

Knows files, settings and by what a target is recognised; computes nothing with models.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import logging

from ..data.targets import is_split
from ..runtime.configuration_ppow import PPOWDrafterConfig
from .checkpoints import STATE

try:
    import fcntl
except ImportError:  # Windows: trainings in one folder are not kept apart
    fcntl = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

LOCK = ".training.lock"
# Of the Trainer's own arguments those that decide what is learned; how long it goes on may change.
LEARNING = (
    "seed", "data_seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "bf16", "train_sampling_strategy", "lr_scheduler_kwargs",
    "optim_args", "optim_target_modules", "neftune_noise_alpha",
)  # fmt: skip
# Of PPOWTrainingArguments those that do not: they hold memory, measure, or are measured.
FREE = (
    "chunk_size", "verify_tokens", "eval_prompts", "eval_prompt_length", "eval_new_tokens", "calibrate_at_end",
    "cost_ratio", "regenerate_batch_size",
)  # fmt: skip

# Of a drafter's configuration those that decide what its weights are, and of its own transformer's.
SHAPE = (
    "architecture", "vocab_size", "draft_vocab_size", "target_hidden_size", "target_layer_ids", "norm_before_fc",
    "norm_before_residual", "norm_output", "medusa_heads", "medusa_layers", "block_size", "sample_from_anchor",
    "mask_token_id", "markov_rank", "confidence_head",
)  # fmt: skip
DRAFT_SHAPE = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip


@contextmanager
def lock_folder(output_dir: str | Path) -> Iterator[None]:
    """Keep other trainings out of `output_dir`; the lock of a process that died holds nobody back.

    Raises `ValueError` naming the lock's file and the process that holds it.
    """
    path = Path(output_dir) / LOCK
    with open(path, "a+", encoding="utf-8") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"output_dir: {file.read().strip() or 'another process'} is training in {str(output_dir)!r} and holds "
                f"{str(path)!r}. Wait until it ends, or pass another folder."
            ) from None
        except OSError as error:
            logger.warning(f"{path}: this file system has no locks ({error}); start no second training in its folder.")
        file.truncate(0)
        file.write(f"process {os.getpid()}\n")
        file.flush()
        yield
        file.truncate(0)


def run_record(args: Any, data_fingerprint: str, target: PreTrainedModel | None = None) -> dict[str, Any]:
    """What decides what a training learns: data, target, and the arguments that a resume must not change."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = [field.name for field in dataclasses.fields(args) if field.name not in inherited and field.name not in FREE]
    record = {name: getattr(args, name) for name in (*LEARNING, *own)}
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    record |= {"train_dataset (fingerprint)": data_fingerprint, "sequences of a step on all devices": batch}
    fingerprint = None if target is None else weights_fingerprint(target)
    if fingerprint is not None:
        record["target_model (fingerprint)"] = fingerprint
    return json.loads(json.dumps(record, default=str))


def weights_fingerprint(model: PreTrainedModel) -> str | None:
    """Hash of one number of each plain parameter, in bfloat16, whatever its name, dtype and device; `None` where some
    are offloaded or split over processes."""
    parameters = list(model.parameters())
    if is_split(model) or any(parameter.is_meta for parameter in parameters):
        return None
    plain = [p for p in parameters if type(p.data) is torch.Tensor and p.is_floating_point() and p.numel()]
    numbers = [p.detach()[(0,) * p.ndim].to(torch.bfloat16).item() for p in plain]
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16]


def check_same_run(checkpoint: str | Path, record: dict[str, Any]) -> None:
    """Raise `ValueError` where the [`run_record`] of a checkpoint differs, saying in what."""
    _check_same(checkpoint, json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8")).get("run", {}), record)


def check_same_drafter(checkpoint: str | Path, stored: PPOWDrafterConfig, given: PPOWDrafterConfig) -> None:
    """Raise `ValueError` where a checkpoint's drafter is of another architecture or size, saying in what."""
    _check_same(checkpoint, *map(_shape, (stored, given)))


def _shape(config: PPOWDrafterConfig) -> dict[str, Any]:
    draft = {f"draft_config.{name}": getattr(config.draft_config, name, None) for name in DRAFT_SHAPE}
    return {f"model.config.{name}": getattr(config, name) for name in SHAPE} | draft


def _check_same(checkpoint: str | Path, stored: dict[str, Any], given: dict[str, Any]) -> None:
    different = [
        f"{name} was {stored[name]!r} and is {given[name]!r}"
        for name in stored
        if name in given and stored[name] != given[name]
    ]
    if different:
        raise ValueError(
            f"resume_from_checkpoint: {str(checkpoint)!r} was trained otherwise: {'; '.join(different)}. Give what it "
            "was trained with, or start in another output_dir."
        )


def stopped_early(state: TrainerState, callbacks: Iterable[TrainerCallback]) -> bool:
    """Whether the patience of an [`EarlyStoppingCallback`] was at its end when `state` was saved."""
    saved = state.stateful_callbacks.get(EarlyStoppingCallback.__name__, [])
    own = [one for one in callbacks if isinstance(one, EarlyStoppingCallback)]
    return any(
        then["attributes"]["early_stopping_patience_counter"] >= now.early_stopping_patience
        for then, now in zip(saved if isinstance(saved, list) else [saved], own, strict=False)
    )


def best_checkpoint(state: TrainerState, last: str, args: TrainingArguments) -> str:
    """The best checkpoint where `load_best_model_at_end` asks for it, also in a folder that was moved; else `last`."""
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return last
    best = Path(state.best_model_checkpoint)
    for folder in (best, Path(last).parent / best.name):
        if folder.is_dir():
            return str(folder)
    logger.warning(f"load_best_model_at_end: the best checkpoint {str(best)!r} is gone; {last!r} is loaded.")
    return last


def is_saved(output_dir: str | Path, step: int) -> bool:
    """Whether the drafter of `step`, the last one, lies in `output_dir` with its log, as a finished run leaves it."""
    folder = Path(output_dir)
    try:
        log = json.loads((folder / "training_log.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return isinstance(config, dict) and log[-1]["step"] >= step and any(folder.glob("*.safetensors"))
    except (OSError, ValueError, LookupError, TypeError):
        return False
