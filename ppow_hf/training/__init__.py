"""Training drafters: arguments, trainer, and the pure functions behind the objectives."""

from .arguments import PPOWTrainingArguments
from .trainer import PPOWTrainer

__all__ = ["PPOWTrainer", "PPOWTrainingArguments"]
