"""Speculative decoding with this repository's drafter: `target.generate(**inputs, custom_generate="user/name")`.

Written with the drafter by ppow_hf. It is never told where it comes from, hence the two names below; it knows nothing
else: the drafter brings its own code. That code is run only as it was pushed with this file: a branch can move.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoModel
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

REPOSITORY = "user/name"
REVISION: str | None = None
CODE: dict[str, str] = {}  # SHA-256 of the drafter's modules; empty in a local folder

SETTINGS = (
    "window",
    "max_window",
    "cost_ratio",
    "verification_cost",
    "lookup",
    "tree_nodes",
    "tree_branches",
    "record",
)
_drafters: dict[tuple, Any] = {}


def pinned_commit(**hub_options: Any) -> str:
    """The commit (in a local folder the branch) whose code is what was pushed with this file.

    Raises `ValueError` where the code has changed since.
    """
    revision = REVISION or "main"
    for name, pushed in CODE.items():
        path = cached_file(REPOSITORY, name, revision=revision, **hub_options)
        if hashlib.sha256(Path(path).read_bytes()).hexdigest() != pushed:
            raise ValueError(
                f"custom_generate: {name} of {REPOSITORY} is not the one that was pushed with custom_generate/"
                f"generate.py, so nothing of it was run. Pass revision= with a commit that you trust, or push again."
            )
        revision = extract_commit_hash(path, None) or revision  # the other files, and the weights, from there too
    config = json.loads(Path(cached_file(REPOSITORY, "config.json", revision=revision, **hub_options)).read_text())
    if any("--" in str(module) for module in config["auto_map"].values()):
        raise ValueError(
            f"custom_generate: the config.json of {REPOSITORY} names code of another repository, so nothing was run. "
            "Pass revision= with a commit that you trust, or push again."
        )
    return revision


def load_drafter(model: Any, revision: str | None = None, **hub_options: Any) -> Any:
    """The drafter on the target's device and in its number format; loaded once. `revision` is the caller's own pin."""
    key = (revision, str(model.device), str(model.dtype))
    if key not in _drafters:
        commit = revision or pinned_commit(**hub_options)
        drafter = AutoModel.from_pretrained(
            REPOSITORY, trust_remote_code=True, revision=commit, dtype=model.dtype, **hub_options
        )
        _drafters[key] = drafter.to(model.device).eval()
    return _drafters[key]


def generate(model: Any, revision: str | None = None, **arguments: Any) -> Any:
    """As `model.generate(**arguments)`, and with the same output, drafted by this repository's drafter.

    Takes what `generate` takes, the drafter's window settings (`window`, `max_window`, ...) for this call, and
    `revision`, a commit, branch or tag of the repository to take the drafter from.
    """
    if arguments.pop("assistant_model", None) is not None:
        raise ValueError("assistant_model: this repository drafts with its own drafter. Leave assistant_model out.")
    hub_names = ("token", "cache_dir", "local_files_only", "force_download")
    hub_options = {name: arguments.pop(name) for name in hub_names if name in arguments}
    drafter = load_drafter(model, revision, **hub_options)
    options = {name: arguments.pop(name) for name in SETTINGS if name in arguments}
    for name in ("streamer", "tokenizer", "stop_strings"):  # generate does not hand these on
        value = arguments.pop(name, None)
        if value is not None:
            options[name] = value
    return model.generate(**arguments, custom_generate=drafter.generate_with(**options))
