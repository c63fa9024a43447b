"""Our trainer and that of speculators minimise the same: KL(P||Q) of each unrolled step, on the same states."""

import argparse

import pytest
import torch
from peer_training import train_speculators
from training_cost import STEPS, Ours, Peer, write_states

from ppow_hf import PPOWDrafter
from ppow_hf.data.sequences import SequenceDataset

pytestmark = pytest.mark.engines


@pytest.fixture
def text(prompts) -> torch.Tensor:
    return torch.tensor(max(prompts, key=len))


def assert_same_losses(python, folder, drafter, learned) -> None:
    """KL in nats of each unrolled step, of `drafter` in our trainer and of the one in folder/speculators in theirs."""

    def ours(steps: int) -> float:
        """The sum over all tokens of windows of `steps` tokens."""
        trainer = Ours(folder, drafter, "float32", "adamw", "trained", steps)
        return steps * trainer.gradients()[0] * int((trainer.inputs["labels"] != -100).sum())

    sums = torch.tensor([0.0] + [ours(steps) for steps in range(1, STEPS + 1)]).diff()
    # The first prefix has two tokens: one whose state is read, and one behind it.
    counts = torch.tensor([int(learned[2 + step :].sum()) for step in range(STEPS)])
    peer = Peer(python, str(folder), "float32", "adamw", "trained", "sdpa")
    losses = torch.tensor(peer.step()["losses"])
    peer.close()
    assert losses.unique().numel() == STEPS and losses.min() > 0.1
    torch.testing.assert_close(sums / counts, losses, rtol=1e-4, atol=1e-5)


def test_the_losses_are_those_of_speculators(engine_python, reduced_eagle, target, text, tmp_path):
    learned = torch.arange(len(text)) > 8
    write_states(tmp_path, target, reduced_eagle, SequenceDataset([text], [learned.tolist()]), "float32")
    assert_same_losses(engine_python, tmp_path, reduced_eagle, learned)


def test_what_speculators_trained_by_its_recipe_is_imported_as_it_is(
    engine_python, reduced_eagle, target, text, tmp_path
):
    learned = torch.arange(len(text)) > 8
    write_states(tmp_path, target, reduced_eagle, SequenceDataset([text], [learned.tolist()]), "float32")
    given = argparse.Namespace(
        python=engine_python, target=str(tmp_path / "target"), target_states=[tmp_path / "record"], core_seconds=4.0,
        total_seq_len=64, seed=0, output_dir=tmp_path,
    )  # fmt: skip
    losses = train_speculators(given, reduced_eagle)["losses"]
    assert losses[-1] < 0.8 * losses[0]
    found = PPOWDrafter.from_pretrained(tmp_path / "speculators-imported", dtype="float32")
    assert found.config.norm_before_fc and found.config.norm_before_residual and found.config.norm_output
    assert_same_losses(engine_python, tmp_path, found, learned)
