"""What a safetensors file holds, read from its header without the weights."""

import json
from pathlib import Path
from typing import Any


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
