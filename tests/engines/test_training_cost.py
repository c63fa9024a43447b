"""Our trainer and those of speculators and SpecForge minimise the same: KL(P||Q) of each unrolled step."""

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


def our_sums(folder, drafter) -> torch.Tensor:
    """KL in nats of each unrolled step, summed over its tokens."""

    def of_windows(steps: int) -> float:
        """The sum over all tokens of windows of `steps` tokens."""
        trainer = Ours(folder, drafter, "float32", "adamw", "trained", steps)
        return steps * trainer.gradients()[0] * int((trainer.inputs["labels"] != -100).sum())

    return torch.tensor([0.0] + [of_windows(steps) for steps in range(1, STEPS + 1)]).diff()


def per_step(values: torch.Tensor) -> torch.Tensor:
    """Sums of one value for each token over the tokens of each unrolled step.

    The first prefix has two tokens: one whose state is read, and one after it.
    """
    return torch.stack([values[2 + step :].sum() for step in range(STEPS)])


def peer_losses(python, peer: str, folder) -> torch.Tensor:
    process = Peer(python, peer, str(folder), "float32", "adamw", "trained")
    losses = torch.tensor(process.step()["losses"])
    process.close()
    assert losses.unique().numel() == STEPS and losses.min() > 0.1
    return losses


def assert_same_losses(python, folder, drafter, learned) -> None:
    """Of `drafter` in our trainer and of the one in folder/speculators in theirs."""
    losses = peer_losses(python, "speculators", folder)
    torch.testing.assert_close(our_sums(folder, drafter) / per_step(learned), losses, rtol=1e-4, atol=1e-5)


def test_the_losses_are_those_of_speculators(engine_python, reduced_eagle, target, text, tmp_path):
    learned = torch.arange(len(text)) > 8
    write_states(tmp_path, target, reduced_eagle, SequenceDataset([text], [learned.tolist()]), "float32")
    assert_same_losses(engine_python, tmp_path, reduced_eagle, learned)


def test_the_losses_are_those_of_specforge_and_of_the_targets_entropy(
    engine_python, reduced_eagle, target, text, tmp_path
):
    """Its loss is the cross-entropy, a mean over all positions; it learns no token where the target's first choice is
    outside the draft vocabulary, so that both learn none of these here."""
    with torch.no_grad():
        logits = target(text[None]).logits[0].roll(1, 0)  # of each token, from the state before it
    learned = (torch.arange(len(text)) > 8) & reduced_eagle.t2d[logits.argmax(-1)]
    assert 8 < learned.sum() < len(text) - 9
    write_states(tmp_path, target, reduced_eagle, SequenceDataset([text], [learned.tolist()]), "float32")
    entropies = torch.distributions.Categorical(logits=logits[:, reduced_eagle.t2d]).entropy()
    sums = our_sums(tmp_path, reduced_eagle) + per_step(entropies * learned)
    losses = peer_losses(engine_python, "specforge", tmp_path)
    torch.testing.assert_close(sums / len(text), losses, rtol=1e-4, atol=1e-5)


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
