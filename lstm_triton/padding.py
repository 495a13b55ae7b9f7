"""Padded batches as packed ones and back, for `lengths=`.

As `torch.nn.utils.rnn` has it, but that rows are gathered and scattered at once, and their gradients too:
there the backward of packing goes over the time steps.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def pack(input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[PackedSequence, Tensor]:
    """The rows that there are, and where: what `unpack` takes.

    Args:
        input: (T, B, F) or, with `batch_first`, (B, T, F).
        lengths: (B,) from 1 to T, on the CPU.

    Returns:
        A `PackedSequence` of N rows, and the (N,) places of these among the T * B of `input`.
    """
    steps = int(lengths.max())
    ordered, order = lengths.sort(descending=True, stable=True)
    restore = torch.empty_like(order)
    restore[order] = torch.arange(order.numel())
    live = torch.arange(steps).unsqueeze(1) < ordered
    row, step = (input.size(1), 1) if batch_first else (1, input.size(1))
    places = (torch.arange(steps).unsqueeze(1) * step + order * row)[live].to(input.device)
    data = _Pick.apply(input.reshape(-1, input.size(2)), places)
    return PackedSequence(data, live.sum(1), order.to(input.device), restore.to(input.device)), places


def unpack(data: Tensor, places: Tensor, leading: torch.Size) -> Tensor:
    """Rows (N, F) at their places in zeros (*leading, F), the leading sizes of the padded batch."""
    return _Place.apply(data, places, leading[0] * leading[1]).view(*leading, -1)


class _Pick(torch.autograd.Function):
    """The rows at `places`, each of them once: its backward has nothing to add up, as that of `index_select` has."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, places: Tensor) -> Tensor:
        return x.index_select(0, places)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, places = inputs
        ctx.rows = x.size(0)
        ctx.save_for_backward(places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Place.apply(gradient, *ctx.saved_tensors, ctx.rows), None


class _Place(torch.autograd.Function):
    """The inverse: rows at `places` among so many, the others zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, places: Tensor, rows: int) -> Tensor:
        return x.new_zeros(rows, x.size(1)).index_copy_(0, places, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _Pick.apply(gradient.contiguous(), *ctx.saved_tensors), None, None
