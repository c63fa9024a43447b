"""Where something came from: the command, the versions, the source revision, the machine, seeds and data.

Written beside every trained drafter and measurement, and pushed with them: so it names no user, host or folder, and
holds no secret.
"""

import math
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..version import __version__
from .redaction import redact_command, redact_record, redact_text

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
LONGEST_WORD = 200  # characters of an argument that is recorded whole; no path is longer than the system's limit


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what computes."""
    found = {"python": platform.python_version(), "ppow_hf": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """The commit of the checkout that this package runs from, `-modified` after it if tracked files were changed.

    `None` where the package is installed as a copy: a repository that merely lies around its folder says nothing.
    """
    folder = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            return None
        changed = "-modified" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(device: Any, command: str | None = None, **facts: Any) -> dict[str, Any]:
    """The content of `provenance.json`: command, time, versions, source revision, machine, and `facts`.

    Args:
        device (`torch.device`): what was computed on.
        command (`str`, *optional*): by default the process's own; see [`public_command`].
        facts: whatever else is known (`seeds`, `data_fingerprint`, ...).
    """
    words = [Path(sys.argv[0]).name, *sys.argv[1:]] if command is None else shlex.split(command)
    return {
        "command": public_command(shlex.join(word if len(word) <= LONGEST_WORD else "..." for word in words)),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "git_revision": git_revision(),
        "machine": describe_machine(device),
        **redact_record(facts),
    }


def public_name(name: str | None) -> str | None:
    """A model's name as it may be published: a name on the Hub as it is, of a path no more than its last part.

    The folder of a snapshot in the Hub's cache becomes the name of its repository.
    """
    if not name:
        return None
    name = redact_text(name)
    if len(name) > LONGEST_WORD:
        return "..."
    path = Path(name)
    for part in path.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    is_path = path.is_absolute() or name.startswith(("~", ".")) or path.exists() or name.count("/") > 1
    return path.name if is_path else name


def is_hub_name(name: str | None) -> bool:
    """Whether `name` can be that of a repository on the Hub, `namespace/name`."""
    return name is not None and HUB_NAME.fullmatch(name) is not None and public_name(name) == name


def shortened(value: Any) -> Any:
    """The same with numbers of six digits, whole ones as integers: hundreds of them stand in a line."""
    if isinstance(value, dict):
        return {name: shortened(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [shortened(part) for part in value]
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() else float(f"{value:.6g}")
    return value


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads, memory and GPU; nothing that names a user, a host or a folder."""
    import psutil

    machine = {
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(),
        "device": device.type,
        "gpu": None,
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name(device if device.type == "cuda" else None)
    return machine


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def public_command(command: str) -> str:
    """`command` as it may be published: paths cut to their last part, and without secrets."""
    command = redact_command(command)
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    return shlex.join(_without_path(word) for word in words)


def _without_path(word: str) -> str:
    option, equals, value = word.rpartition("=")
    is_path = value.startswith(("/", "~", "./", "../")) or (os.sep in value and _exists(value))
    return f"{option}{equals}{Path(value).name or '/'}" if is_path else word


def _exists(word: str) -> bool:
    try:
        return Path(word).exists()
    except OSError:  # longer than any path: a prompt, say
        return False
