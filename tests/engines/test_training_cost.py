"""Our trainer and that of speculators minimise the same: KL(P||Q) of each unrolled step, on the same states."""

import pytest
import torch
from training_cost import STEPS, Ours, Peer, write_states

from ppow_hf.data.sequences import SequenceDataset

pytestmark = pytest.mark.engines


def test_the_losses_are_those_of_speculators(engine_python, reduced_eagle, target, prompts, tmp_path):
    text = torch.tensor(max(prompts, key=len))
    learned = torch.arange(len(text)) > 8
    write_states(tmp_path, target, reduced_eagle, SequenceDataset([text], [learned.tolist()]), "float32")

    def ours(steps: int) -> float:
        """KL in nats, the sum over all tokens of windows of `steps` tokens."""
        trainer = Ours(tmp_path, reduced_eagle, "float32", "adamw", "trained", steps)
        return steps * trainer.gradients()[0] * int((trainer.inputs["labels"] != -100).sum())

    sums = torch.tensor([0.0] + [ours(steps) for steps in range(1, STEPS + 1)]).diff()
    # The first prefix has two tokens: one whose state is read, and one behind it.
    counts = torch.tensor([int(learned[2 + step :].sum()) for step in range(STEPS)])
    peer = Peer(engine_python, str(tmp_path), "float32", "adamw", "trained", "sdpa")
    losses = torch.tensor(peer.step()["losses"])
    peer.close()
    assert losses.unique().numel() == STEPS and losses.min() > 0.1
    torch.testing.assert_close(sums / counts, losses, rtol=1e-4, atol=1e-5)
