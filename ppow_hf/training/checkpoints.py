"""Checkpoints that are whole or not there, and how the last whole one is found.

Knows folders and files; knows nothing about models.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

MANIFEST = "complete.json"
STATE = "ppow_state.json"


def check_writable(output_dir: str | Path) -> None:
    """Raise `ValueError` when nothing can be written to `output_dir`, before any work is lost."""
    path = Path(output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".writable"):  # several processes check at once
            pass
    except OSError as error:
        raise ValueError(
            f"output_dir: cannot write to {str(path)!r} ({error.strerror}). Name a folder that can be written."
        ) from error


def seal_checkpoint(staged: Path, final: Path) -> None:
    """Write the list of a staged checkpoint's files, make all of it safe on disk, and put it in its place."""
    files = {str(p.relative_to(staged)): p.stat().st_size for p in staged.rglob("*") if p.is_file()}
    (staged / MANIFEST).write_text(json.dumps(files, indent=1))
    for path in staged.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    os.replace(staged, final)


def check_complete(checkpoint: str | Path) -> None:
    """Raise `ValueError` when a checkpoint's files are missing or of another size than when it was written."""
    folder = Path(checkpoint)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ValueError(
            f"resume_from_checkpoint: {str(folder)!r} has no {MANIFEST}, so it is not a checkpoint that was written "
            "to its end. Pass another, or True to take the last complete one."
        )
    try:
        sizes = dict(json.loads(manifest.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"resume_from_checkpoint: {MANIFEST} in {str(folder)!r} is damaged ({error}). Pass another checkpoint, or "
            "True to take the last complete one."
        ) from error
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
            raise ValueError(
                f"resume_from_checkpoint: {name} in {str(folder)!r} is damaged ({found}, {size} bytes written). Pass "
                "another checkpoint, or True to take the last complete one."
            )


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The complete checkpoint with the highest step in `output_dir`, or `None`."""
    folders = [p for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.split("-")[-1].isdigit()]
    for folder in sorted(folders, key=lambda p: int(p.name.split("-")[-1]), reverse=True):
        try:
            check_complete(folder)
        except ValueError:
            continue
        return str(folder)
    return None
