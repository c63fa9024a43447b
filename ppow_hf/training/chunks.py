"""Sums over chunks of positions, so that a vocabulary-wide tensor never spans a batch, and forwards without gradients.

Knows functions of rows and their gradients; knows no losses.
"""

from collections.abc import Callable, Iterable

import torch
from torch.autograd.function import once_differentiable


def sum_over_chunks(
    function: Callable[..., torch.Tensor],
    chunk_size: int,
    parameters: Iterable[torch.Tensor],
    *rows: torch.Tensor | None,
) -> torch.Tensor:
    """Sum of `function(*chunk)` over chunks of at most `chunk_size` rows; without rows it is called on none.

    `function` returns a vector of sums, whose first entry is the loss: only that one has a gradient. The gradients of
    a chunk, by the rows and by the `parameters` that `function` uses, are taken as soon as the chunk is computed, so
    that nothing vocabulary-wide is kept for the backward pass or computed twice. Small chunks also stay in a
    processor's cache, where elementwise work is faster.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return _ChunkedSum.apply(function, chunk_size, len(rows), *rows, *trained)


class _ChunkedSum(torch.autograd.Function):
    """What [`sum_over_chunks`] returns, with the gradients that were taken on the way."""

    @staticmethod
    def forward(ctx, function, chunk_size, row_count, *tensors):
        rows, parameters = tensors[:row_count], tensors[row_count:]
        learned = [number for number, row in enumerate(rows) if row is not None and row.requires_grad]
        wanted = [tensor is not None and tensor.requires_grad for tensor in tensors]
        row_gradients: list[list[torch.Tensor]] = [[] for _ in learned]
        gradients: list[torch.Tensor | None] = [None] * len(parameters)
        length = len(next(row for row in rows if row is not None))
        total = None
        for start in range(0, max(length, 1), chunk_size):
            chunk = [None if row is None else row[start : start + chunk_size].detach() for row in rows]
            leaves = [row.requires_grad_() for number in learned if (row := chunk[number]) is not None]
            with torch.set_grad_enabled(any(wanted)):
                part = function(*chunk)
                loss = part[0]
            if loss.requires_grad:
                chunk_gradients = torch.autograd.grad(loss, [*leaves, *parameters], allow_unused=True)
                for parts, leaf, gradient in zip(row_gradients, leaves, chunk_gradients, strict=False):
                    parts.append(torch.zeros_like(leaf) if gradient is None else gradient)
                for number, gradient in enumerate(chunk_gradients[len(leaves) :]):
                    if gradient is not None:
                        before = gradients[number]
                        gradients[number] = gradient if before is None else before.add_(gradient)
            total = part.detach() if total is None else total + part.detach()
        of_rows = {number: torch.cat(parts) for number, parts in zip(learned, row_gradients, strict=True) if parts}
        ctx.gradients = [*(of_rows.get(number) for number in range(row_count)), *gradients]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, of_total):
        gradients, ctx.gradients = ctx.gradients, None  # once: they are as large as the parameters
        return None, None, None, *(None if gradient is None else gradient * of_total[0] for gradient in gradients)


class without_gradients(torch.no_grad):  # noqa: N801 (a context manager and decorator, as the one that it extends)
    """`torch.no_grad` for the drafter's own forwards inside autocast.

    Under torch 2.9 autocast keeps the casts of weights that were made here, and later forwards that take them get no
    gradients (pytorch #112583): they are forgotten at the end.
    """

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        torch.clear_autocast_cache()
