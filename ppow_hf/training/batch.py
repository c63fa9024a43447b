"""A batch in a training step: its texts, what reads them, and the random numbers that belong to it.

All randomness is keyed by (seed, step, example): it is the same on one process, on several, and after a resume.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..runtime.modeling_ppow import PPOWDrafter
from .arguments import PPOWTrainingArguments
from .target import TargetEncoding, TrainingTarget


@dataclass(frozen=True)
class Batch:
    """A batch of texts, and what reads it in a training step.

    Args:
        drafter ([`PPOWDrafter`]), target ([`TrainingTarget`]), args ([`PPOWTrainingArguments`]): of the training.
        inputs (`Mapping[str, torch.Tensor]`): the texts, as of [`collate_sequences`]; B of them, S tokens long.
        encoding ([`TargetEncoding`]): what the target says along them.
        step (`int`): the training step, by which random numbers are keyed.
    """

    drafter: PPOWDrafter
    target: TrainingTarget
    args: PPOWTrainingArguments
    inputs: Mapping[str, torch.Tensor]
    encoding: TargetEncoding
    step: int = 0

    @property
    def prefixes(self) -> torch.Tensor:
        """All prefixes that something can be drafted after, `[B, S - 1 - first]`; in texts too short for one, the
        first of all, after which nothing is learned."""
        ids = self.inputs["input_ids"]
        first = self.drafter.draft_model.first_prefix
        return torch.arange(first, max(ids.shape[1] - 1, first + 1), device=ids.device).expand(len(ids), -1)

    def uniforms(self, shape: tuple[int, ...], purpose: str) -> torch.Tensor:
        """Uniform numbers in [0, 1) `[B, *shape]`, keyed by the seed, the step and each text."""
        return keyed_uniforms(self.args.seed, self.step, self.inputs["index"], shape, purpose)

    def logits(self, features: torch.Tensor, sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draft and target logits on what the drafter can propose, of draft features `[R, h]` and `sources` `[R', H]`;
        in float32."""
        return paired_logits(self.drafter, self.target, self.drafter.draft_logits(features).float(), sources)

    @property
    def temperatures(self) -> tuple[float, float]:
        return self.args.rollout_temperature, self.args.target_temperature


def keyed_uniforms(seed: int, step: int, indices: torch.Tensor, shape: tuple[int, ...], purpose: str) -> torch.Tensor:
    """Uniform numbers in [0, 1) `[B, *shape]`, each example's drawn from its own key; on the device of `indices`."""
    rows = []
    for index in indices.tolist():
        digest = hashlib.sha256(f"{seed}:{step}:{index}:{purpose}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        rows.append(torch.rand(shape, generator=generator))
    return torch.stack(rows).to(indices.device)


def paired_logits(drafter: PPOWDrafter, target: TrainingTarget, draft: torch.Tensor, sources):
    """Draft and target logits on what the drafter can propose, from draft logits `[R, DV]` and `sources` `[R', H]`."""
    target_logits = target.logits(sources, drafter.kept_tokens)
    width = min(draft.shape[-1], target_logits.shape[-1])
    return draft[..., :width], target_logits[..., :width]
