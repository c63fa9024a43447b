"""Checkpoints that are whole or not there, and how the last whole one is found.

Knows folders and files; knows nothing about models.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

logger = logging.get_logger(__name__)

MANIFEST = "complete.json"
STATE = "ppow_state.json"


def seal_checkpoint(staged: Path, final: Path) -> None:
    """Write the hashes of a staged checkpoint's files, make all of it safe on disk, and put it in its place."""
    files = {str(p.relative_to(staged)): file_hash(p) for p in staged.rglob("*") if p.is_file()}
    (staged / MANIFEST).write_text(json.dumps(files, indent=1))
    for path in staged.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    os.replace(staged, final)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_complete(checkpoint: str | Path) -> None:
    """Raise `ValueError` when a checkpoint's files are missing or other than when it was written."""
    folder = Path(checkpoint)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ValueError(
            f"resume_from_checkpoint: {str(folder)!r} has no {MANIFEST}, so it is not a checkpoint that was written "
            "to its end. Pass another, or True to take the last complete one."
        )
    try:
        hashes = dict(json.loads(manifest.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"resume_from_checkpoint: {MANIFEST} in {str(folder)!r} is damaged ({error}). Pass another checkpoint, or "
            "True to take the last complete one."
        ) from error
    for name, written in hashes.items():
        path = folder / name
        found: str | None
        if not path.is_file():
            found = "missing"
        elif isinstance(written, int):  # the size alone, as earlier versions wrote
            found = None if path.stat().st_size == written else "of another size than when it was written"
        else:
            found = None if file_hash(path) == written else "other than when it was written"
        if found is not None:
            raise ValueError(
                f"resume_from_checkpoint: {name} in {str(folder)!r} is damaged: it is {found}. Pass another "
                "checkpoint, or True to take the last complete one."
            )


def check_resumable(checkpoint: str | Path) -> None:
    """Raise `ValueError` when a checkpoint holds the drafter alone, without what its training goes on with."""
    if not any(Path(checkpoint).glob("rng_state*")):
        raise ValueError(
            f"resume_from_checkpoint: {str(checkpoint)!r} was written with save_only_model=True and has no optimizer "
            "to go on with. Start another training in another output_dir, with its drafter as the model."
        )


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The complete checkpoint with the highest step in `output_dir`, or `None`; a warning for each passed over."""
    folders = [p for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.split("-")[-1].isdigit()]
    for folder in sorted(folders, key=lambda p: int(p.name.split("-")[-1]), reverse=True):
        try:
            check_complete(folder)
        except (ValueError, OSError) as error:
            reason = str(error).removeprefix("resume_from_checkpoint: ").partition(" Pass another")[0]
            logger.warning(f"{folder.name} is passed over: {reason}")
            continue
        return str(folder)
    return None
