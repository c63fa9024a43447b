"""What lies in files of models, read without the weights: the header of safetensors, and what is damaged; and errors
of other libraries, in short."""

import json
import re
from pathlib import Path
from typing import Any

LONGEST = 400  # characters of another library's message


def safetensors_header(path: Path) -> dict[str, Any]:
    """`{"tensors": name -> {dtype, shape, data_offsets}, "bytes": length of the header}` of a safetensors file."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length < 100_000_000 else b""
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        whole = all(len(entry["shape"]) >= 0 and len(entry["data_offsets"]) == 2 for entry in entries.values())
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"folder: {path.name} is not a safetensors file, or is damaged. Save it again.")
    return {"tensors": entries, "bytes": 8 + length}


def folder_damage(folder: Path) -> str | None:
    """What is wrong with the first damaged file of a model's folder, and the fix; `None` where all can be read."""
    files = [path for pattern in ("config.json", "*.json", "*.safetensors") for path in sorted(folder.glob(pattern))]
    return next((found for path in files if (found := file_damage(path)) is not None), None)


def file_damage(path: Path) -> str | None:
    """What is wrong with a .json, .jsonl or .safetensors file, and the fix; `None` where nothing is, or is known."""
    with open(path, "rb") as file:
        start = file.read(64).lstrip()
    again = "save or download it again"
    if path.suffix not in (".json", ".jsonl", ".safetensors", ".bin"):
        return None
    if not start:
        return f"{path.name} is empty; {again}"
    if start.startswith(b"<"):
        return f"{path.name} is a web page; {again}"
    if start.startswith(b"version https://git-lfs"):
        return f"{path.name} is a pointer of Git LFS, not the file; run `git lfs pull`"
    if path.suffix == ".safetensors":
        return _weights_damage(path, again)
    return _json_damage(path) if path.suffix == ".json" else None


def _weights_damage(path: Path, again: str) -> str | None:
    try:
        header = safetensors_header(path)
    except ValueError:
        return f"{path.name} is damaged, or no safetensors file; {again}"
    ends = [entry["data_offsets"][1] for entry in header["tensors"].values()]
    announced, size = header["bytes"] + max(ends, default=0), path.stat().st_size
    return None if size == announced else f"{path.name} has {size} bytes where {announced} were written; {again}"


def _json_damage(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        return f"{path.name} is nested too deep to be read; write it again"
    except ValueError as error:
        return f"{path.name} is no JSON ({error}); write it again"
    wrong = path.name == "config.json" and not isinstance(content, dict)
    return f"config.json holds a {type(content).__name__}, not an object; write it again" if wrong else None


def error_chain(error: BaseException | None) -> list[BaseException]:
    """An error and those that it came from, the first cause last."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def brief(error: BaseException) -> str:
    """An error's message in one line and without lists of everything that would have been right."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"(Model type should be|should be|must be) one of (\S+, ){12,}[^.]*\.?", "", text).strip()
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rsplit(' ', 1)[0]} ..."
