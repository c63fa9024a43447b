"""Muon for hidden matrices, AdamW for the rest, in one optimizer.

Knows parameters and their names; knows no drafter, no target and no loss.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments


class Muon(torch.optim.AdamW):
    """Muon (Jordan 2024) for parameter groups with `kind="muon"`, AdamW for the others.

    A matrix moves along its momentum (Nesterov's, 0.95), orthogonalised, so that all of its directions are learned at
    one speed. `torch.optim.Muon` computes the same; but it takes matrices only, where a Trainer wants one optimizer,
    and orthogonalises in bfloat16, which a processor without bfloat16 units does eight times slower than float32.

    Args:
        params (`Iterable[dict]`): parameter groups, those with `kind="muon"` of matrices only.
        lr, betas, eps, weight_decay: as AdamW's; `lr` and `weight_decay` (decoupled) of matrices too.
        momentum (`float`, *optional*, defaults to `0.95`): of matrices.
        scale (`str`, *optional*, defaults to `"rms"`):
            Size of a matrix's step: `"rms"`, that of AdamW's (0.2 of the learning rate per entry, Moonlight,
            2502.16982), so that one learning rate serves both; `"spectral"`, singular values of the learning rate
            times sqrt(max(1, rows / columns)), Jordan's.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): of the orthogonalisation's products.

    Raises `ValueError` for a parameter of `kind="muon"` that is no matrix, or an unknown `scale`.
    """

    param_groups: list[dict[str, Any]]

    def __init__(
        self,
        params: Iterable[dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        scale: str = "rms",
        dtype: torch.dtype = torch.float32,
    ):
        if scale not in ("rms", "spectral"):
            raise ValueError(f'scale: {scale!r} is not one of ["rms", "spectral"].')
        groups = [{"kind": "adamw", "momentum": momentum, "scale": scale, **group} for group in params]
        for group in groups:
            shapes = [tuple(parameter.shape) for parameter in group["params"] if parameter.ndim != 2]
            if group["kind"] == "muon" and shapes:
                raise ValueError(f"params: a parameter of kind 'muon' has shape {shapes[0]}; it takes matrices only.")
        self.dtype = dtype
        super().__init__([group for group in groups if group["params"]], lr, betas, eps, weight_decay)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; `ValueError` for a state of earlier versions, which gave norms `weight_decay` too."""
        if len(state_dict["param_groups"]) != len(self.param_groups):
            raise ValueError(
                "resume_from_checkpoint: it was trained by an earlier version, which applied weight_decay to norms. "
                "Start another training in another output_dir, with its drafter as the model."
            )
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure=None):
        every = self.param_groups
        self.param_groups = [group for group in every if group["kind"] != "muon"]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            if group["kind"] == "muon":
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for (rows, columns), parameters in by_shape.items():
            updates = []
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())  # what AdamW looks for when a state is loaded
                    state["momentum"] = torch.zeros_like(parameter)
                state["step"] += 1
                momentum = state["momentum"]
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                updates.append(parameter.grad.lerp(momentum, group["momentum"]))
            scale = 0.2 * max(rows, columns) ** 0.5 if group["scale"] == "rms" else max(1.0, rows / columns) ** 0.5
            orthogonal = orthogonalize(torch.stack(updates).to(self.dtype)).float() * scale
            for parameter, update in zip(parameters, orthogonal, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"])


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, by five Newton-Schulz steps; `[count, rows, columns]` in and out."""
    transposed = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if transposed else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if transposed else x


def muon_groups(model: nn.Module) -> list[dict]:
    """What of a model is trained, in two groups: hidden matrices for Muon; embeddings, vocabulary matrices, a
    confidence head and all that is no matrix for AdamW."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    others = ("lm_head", "embed_out", "markov_w2", "confidence_head")
    hidden = {
        name
        for name, parameter in named
        if parameter.ndim == 2 and id(parameter) not in tables and not any(other in name for other in others)
    }
    return [
        {"params": [parameter for name, parameter in named if name in hidden], "kind": "muon"},
        {"params": [parameter for name, parameter in named if name not in hidden], "kind": "adamw"},
    ]


def without_vector_decay(group: dict, weight_decay: float) -> list[dict]:
    """A group for AdamW, and where `weight_decay` is not 0 another of its norms and biases, which have none."""
    if not weight_decay:
        return [group]
    parts = [[p for p in group["params"] if (p.ndim > 1) == decayed] for decayed in (True, False)]
    return [{**group, "params": parts[0]}, {**group, "params": parts[1], "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, args: TrainingArguments, muon: float | None) -> torch.optim.Optimizer:
    """The optimizer of all that is trained in `model`, with the arguments' rates: AdamW, or with `muon` above 0
    [`Muon`], whose matrices' learning rate is that many times the others'."""
    settings = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }
    if not muon:
        group = {"params": [p for p in model.parameters() if p.requires_grad]}
        return torch.optim.AdamW(without_vector_decay(group, args.weight_decay), **settings)
    matrices, others = muon_groups(model)
    matrices["lr"] = muon * args.learning_rate
    groups = [matrices, *without_vector_decay(others, args.weight_decay)]
    return Muon(groups, dtype=torch.bfloat16 if args.bf16 else torch.float32, **settings)
