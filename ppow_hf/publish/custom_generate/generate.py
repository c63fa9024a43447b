"""Speculative decoding with this repository's drafter: `target.generate(**inputs, custom_generate="user/name")`.

Written with the drafter by ppow_hf. It is never told where it comes from, hence the two names below; it knows nothing
else: the drafter brings its own code.
"""

from typing import Any

from transformers import AutoModel

REPOSITORY = "user/name"
REVISION: str | None = None

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


def load_drafter(model: Any, revision: str | None = None, **hub_options: Any) -> Any:
    """The drafter on the target's device and in its number format; loaded once."""
    key = (revision, str(model.device), str(model.dtype))
    if key not in _drafters:
        drafter = AutoModel.from_pretrained(
            REPOSITORY, trust_remote_code=True, revision=revision or "main", dtype=model.dtype, **hub_options
        )
        _drafters[key] = drafter.to(model.device).eval()
    return _drafters[key]


def generate(model: Any, revision: str | None = None, **arguments: Any) -> Any:
    """As `model.generate(**arguments)`, and with the same output, drafted by this repository's drafter.

    Takes what `generate` takes, and the drafter's window settings (`window`, `max_window`, ...) for this call.
    """
    if arguments.pop("assistant_model", None) is not None:
        raise ValueError("assistant_model: this repository drafts with its own drafter. Leave assistant_model out.")
    hub_names = ("token", "cache_dir", "local_files_only", "force_download")
    hub_options = {name: arguments.pop(name) for name in hub_names if name in arguments}
    drafter = load_drafter(model, revision or REVISION, **hub_options)
    options = {name: arguments.pop(name) for name in SETTINGS if name in arguments}
    for name in ("streamer", "tokenizer", "stop_strings"):  # generate does not hand these on
        value = arguments.pop(name, None)
        if value is not None:
            options[name] = value
    return model.generate(**arguments, custom_generate=drafter.generate_with(**options))
