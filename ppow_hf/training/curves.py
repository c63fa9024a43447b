"""The plot of a training: loss, reward, KL and acceptance length over its steps."""

from pathlib import Path

from transformers import TrainerCallback

from ..measure.plots import plot_curves

# Of each panel the names in the log, and what the legend calls them where that is another word.
PANELS = (
    {"loss": "loss"},
    {"reward/mean": "reward/mean", "reward/speedup": "reward/speedup", "reward/proximity": "reward/proximity"},
    {"kl": "kl", "text_kl": "text_kl", "entropy": "entropy"},
    {"accepted_length": "rollouts: k + 1", "eval_acceptance_length": "held-out decoding: k + 1"},
)


class CurvesCallback(TrainerCallback):
    """Draws `training.png` beside the checkpoints at every save and at the end."""

    def on_save(self, args, state, control, **kwargs):
        self._draw(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._draw(args, state)

    @staticmethod
    def _draw(args, state) -> None:
        if state.is_world_process_zero:
            path = Path(args.output_dir) / "training.png"
            draw_curves(state.log_history, path, title=f"objective: {args.objective}")


def draw_curves(log_history: list[dict], path: Path, title: str = "") -> Path | None:
    """Loss, reward, KL and acceptance length of a run's log, as far as it has them; `None` where it has nothing."""
    panels = []
    for labels in PANELS:
        lines = {
            label: [(row["step"], row[name]) for row in log_history if name in row] for name, label in labels.items()
        }
        panels.append({label: points for label, points in lines.items() if points})
    return plot_curves(*filter(None, panels), path, title=title) if any(panels) else None
