"""What a training run leaves beside the drafter so that others can see how it came about: all JSON, nothing pickled.

Knows a trainer's arguments, log and data; names no user, host or folder, since it is pushed to the Hub.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import create_repo

from ..data.files import write_whole
from ..measure.provenance import describe, public_name
from ..measure.redaction import redact_record

PICKLED_ARGUMENTS = "training_args.bin"


def write_records(trainer: Any, folder: str | Path) -> None:
    """Write `training_arguments.json`, `training_log.json` and `provenance.json`, and drop the pickled arguments."""
    folder, args = Path(folder), trainer.args
    (folder / PICKLED_ARGUMENTS).unlink(missing_ok=True)
    config = trainer.accelerator.unwrap_model(trainer.model).config
    provenance = describe(
        args.device,
        seeds={"seed": args.seed, "data_seed": args.data_seed},
        data_fingerprint=trainer.train_dataset.fingerprint if trainer.train_dataset is not None else None,
        processes=args.world_size,
        target=public_name(config.target_name_or_path),
        target_revision=config.target_revision,
        target_vocabulary_fingerprint=config.target_vocabulary_fingerprint,
    )
    log = [{**row, "objective": args.objective} for row in trainer.state.log_history]
    for name, content in (
        ("training_arguments.json", arguments_as_json(args)),
        ("training_log.json", log),
        ("provenance.json", provenance),
    ):
        write_whole(folder / name, json.dumps(content, indent=1) + "\n")


def arguments_as_json(args: Any) -> dict[str, Any]:
    """All training arguments: without secrets, of paths only the last part."""
    without_tokens = {name: value for name, value in args.to_dict().items() if not name.endswith("_token")}
    return redact_record(json.loads(json.dumps(_without_paths(without_tokens), default=str)))


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_paths(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(one) for one in value]
    return public_name(value) if isinstance(value, str) and value else value


def check_hub_strategy(args: Any) -> None:
    """Raise `ValueError` for a strategy that uploads checkpoints, whose optimizer states are pickles."""
    if args.push_to_hub and args.hub_strategy in ("checkpoint", "all_checkpoints"):
        raise ValueError(
            f"hub_strategy: {str(args.hub_strategy.value)!r} uploads checkpoints, and their optimizer's state is a "
            "pickle, which is never pushed. Pass 'every_save' (the drafter at every save) or 'end'."
        )


def make_repository(args: Any) -> None:
    """Make the repository that a training pushes to, as Trainer does, which begins when the texts are written."""
    if args.push_to_hub and args.process_index == 0:
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        create_repo(name, token=args.hub_token, private=args.hub_private_repo, exist_ok=True)
