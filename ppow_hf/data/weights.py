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
        entries = json.loads(text)
    except ValueError as error:
        raise ValueError(f"folder: {path.name} is not a safetensors file, or is damaged. Save it again.") from error
    return {"tensors": {k: v for k, v in entries.items() if k != "__metadata__"}, "bytes": 8 + length}
