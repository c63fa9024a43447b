"""PPOW: train drafters for speculative decoding by window-level reinforcement learning, and generate with them.

Importing this package registers `PPOWDrafter` with transformers' Auto classes and lets
`target.generate(**inputs, assistant_model=drafter)` take one. It needs torch, transformers and numpy only.
"""

from .candidate_generator import KLAdaptiveCandidateGenerator, install_hook, remove_hook
from .configuration_ppow import PPOWDrafterConfig
from .modeling_ppow import DrafterView, PPOWDrafter, PPOWDrafterOutput
from .trace import GenerationTrace, RoundTrace

__version__ = "0.1.0"

_LAZY = {"PPOWTrainer": ".training", "PPOWTrainingArguments": ".training"}


def __getattr__(name: str):
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "DrafterView",
    "GenerationTrace",
    "KLAdaptiveCandidateGenerator",
    "PPOWDrafter",
    "PPOWDrafterConfig",
    "PPOWDrafterOutput",
    "PPOWTrainer",
    "PPOWTrainingArguments",
    "RoundTrace",
    "install_hook",
    "remove_hook",
]

install_hook()
