"""Training until target-forward tokens, seconds or core seconds are spent, instead of a number of steps.

Knows what a run has spent; knows nothing of recipes.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from .optimizers import make_optimizer
from .trainer import PPOWTrainer


class Budget(TrainerCallback):
    """Ends training when the budget is spent; evaluations on the way cost nothing.

    What is spent stands in the Trainer's log at each point, so that a training that is resumed goes on counting there.
    A checkpoint is written at each point but the last, unless `save_strategy` is `"no"`.

    Args:
        kind (`str`): `"tokens"`, `"seconds"`, or `"core_seconds"`, the processor time of this process, which other
            work on the machine does not change.
        amount (`float`): how many.
        points (`int`): equal shares of the budget, with a point at the end of each.
        at_points (`Callable`, *optional*): called at each point, in place of an evaluation by the trainer; the metrics
            that it returns are logged.
    """

    def __init__(
        self, kind: str, amount: float, points: int = 0, at_points: Callable[[], Mapping[str, float]] | None = None
    ):
        self.kind, self.amount = kind, amount
        self.points, self.at_points = points, at_points
        self.target: Any = None  # the trainer's FrozenTarget
        self.seconds = 0.0
        self._clock = time.process_time if kind == "core_seconds" else time.perf_counter
        self._tokens_before = 0
        self._since: float | None = None
        self._reached = 0

    def begin(self, target: Any) -> None:
        """Count from here on the tokens that the trainer's `target` reads."""
        self.target, self._tokens_before = target, target.forward_tokens

    @property
    def tokens(self) -> int:
        """Target-forward tokens spent; 0 before training."""
        return self.target.forward_tokens - self._tokens_before if self.target is not None else 0

    @property
    def fraction(self) -> float:
        """Share of the budget that is spent, 0 to 1."""
        running = 0.0 if self._since is None else self._clock() - self._since
        spent = self.tokens if self.kind == "tokens" else self.seconds + running
        return min(spent / self.amount, 1.0)

    def on_train_begin(self, args, state, control, **kwargs):
        spent = next((row for row in reversed(state.log_history) if "spent_seconds" in row), None)
        if spent is not None:
            self.seconds = spent["spent_seconds"]
            self._tokens_before -= spent["spent_tokens"]
            self._reached = self._points_reached()

    def on_step_begin(self, args, state, control, **kwargs):
        self._since = self._clock()

    def on_step_end(self, args, state, control, **kwargs):
        if self._since is not None:
            self.seconds += self._clock() - self._since
        self._since = None
        reached = self._points_reached()
        for _ in range(self._reached, reached):
            if self.at_points is None:
                control.should_evaluate = True
            spent = {"spent_tokens": self.tokens, "spent_seconds": self.seconds}
            found = {} if self.at_points is None else self.at_points()
            state.log_history.append({"step": state.global_step, **spent, **found})
        if reached > self._reached and self.fraction < 1:
            control.should_save = args.save_strategy != SaveStrategy.NO
        self._reached = reached
        if self.fraction >= 1:
            control.should_training_stop = True

    def _points_reached(self) -> int:
        return int(self.fraction * self.points + 1e-9)


class BudgetTrainer(PPOWTrainer):
    """[`PPOWTrainer`] whose progress is the share of a [`Budget`] that is spent; set `max_steps` out of reach.

    After ten steps of warm-up the learning rate falls linearly, to 0 after `decay` budgets; never below a twentieth.
    """

    def __init__(self, budget: Budget, decay: float = 1.0, callbacks: Sequence[TrainerCallback] = (), **kwargs: Any):
        self.budget, self.decay = budget, decay
        super().__init__(callbacks=[budget, *callbacks], **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any):
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, self.args, self.args.muon)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None):
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer,
            lambda step: min(1.0, (step + 1) / 10) * max(1 - self.budget.fraction / self.decay, 0.05),
        )
        return self.lr_scheduler

    @property
    def progress(self) -> float:
        return self.budget.fraction

    def train(self, *args: Any, **kwargs: Any):
        self.budget.begin(self.target)
        return super().train(*args, **kwargs)
