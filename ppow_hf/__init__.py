"""PPOW: train drafters for speculative decoding by window-level reinforcement learning, and generate with them.

Importing this package registers `PPOWDrafter` with transformers' Auto classes and lets
`target.generate(**inputs, assistant_model=drafter)` take one. It needs torch, transformers and numpy only; what needs
more is imported when it is used.
"""

import sys
from importlib import import_module
from pathlib import Path

try:
    from .candidate_generator import KLAdaptiveCandidateGenerator
    from .hook import install_hook
except KeyboardInterrupt:  # seconds pass here before the command line could answer
    if Path(sys.argv[0]).name != "ppow":
        raise
    print("ppow: interrupted", file=sys.stderr)
    raise SystemExit(130) from None
from .runtime.configuration_ppow import PPOWDrafterConfig
from .runtime.modeling_ppow import PPOWDrafter
from .runtime.trace import GenerationTrace
from .version import __version__ as __version__

__all__ = [
    "GenerationTrace",
    "KLAdaptiveCandidateGenerator",
    "PPOWDrafter",
    "PPOWDrafterConfig",
    "PPOWTrainer",
    "PPOWTrainingArguments",
    "drafter_path",
    "export_drafter",
    "import_drafter",
]

_MODULES = {
    "PPOWTrainer": "training",
    "PPOWTrainingArguments": "training",
    "drafter_path": "tiny",
    "export_drafter": "export",
    "import_drafter": "export",
}


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _push_to_hub(drafter: PPOWDrafter, repo_id: str, **options):
    """Push to the Hub in one commit, with the code to run it and a card: see [`push_drafter`]."""
    from .publish.hub import push_drafter

    return push_drafter(drafter, repo_id, **options)


PPOWDrafter.push_to_hub = _push_to_hub  # a drafter that brought its own code keeps transformers' method
install_hook()
