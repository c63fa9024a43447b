"""Files that are written whole or not at all, and whether a folder can be written to."""

import json
import os
import tempfile
import uuid
from pathlib import Path
from typing import Any


def write_whole(path: str | Path, content: str | bytes) -> Path:
    """Write `content` to `path`: readers see the old file or the new one, never a part, and two writers do not mix."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def read_json(path: Path) -> Any:
    """The content of a file of a drafter's folder; raises `ValueError` naming it where it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"folder: {path.name} in {str(path.parent)!r} is no JSON ({error}). Write it again, or remove it."
        ) from error


def ensure_writable(folder: str | Path, argument: str) -> Path:
    """Make `folder` if need be and try to write in it, before any work is done.

    Raises `ValueError` naming `argument` if that is not possible.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{argument}: cannot write to {str(folder)!r} ({error.strerror or error}). Pass a folder that can be "
            "written to."
        ) from error
    return folder


def ensure_file_writable(path: str, argument: str, ending: str = "") -> None:
    """[`ensure_writable`] of the file's folder; `ValueError` if `path` is a folder itself, or has another ending."""
    if Path(path).is_dir():
        raise ValueError(f"{argument}: {path!r} is a folder; pass the name of a file.")
    if not path.endswith(ending):
        raise ValueError(f"{argument}: {path!r} given; the name of a {ending} file is needed.")
    ensure_writable(Path(path).parent, argument)
