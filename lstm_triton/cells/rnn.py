"""The simple recurrent cell of `torch.nn.RNN`, h = tanh or relu (x W_ihᵀ + h W_hhᵀ + b) (Elman 1990)."""

from typing import Any

from torch import Tensor

from lstm_triton.cells.cell import Cell, register
from lstm_triton.cells.jit import tanh, tl, triton

Tensors = tuple[Tensor, ...]


@triton.jit
def tanh_forward(sums, c, parameters):
    h = tanh(sums[0])
    return (), h, h


@triton.jit
def tanh_backward(saved, c, c_prev, dq, dc, parameters):
    da = (dq + dc) * (1 - c * c)
    return (da,), tl.zeros_like(dc), ()


def tanh_forward_torch(sums: Tensors, c: Tensor, parameters: Tensors) -> tuple[Tensors, Tensor, Tensor]:
    h = sums[0].tanh()
    return (), h, h


def tanh_backward_torch(
    saved: Tensors, c: Tensor, c_prev: Tensor, dq: Tensor, dc: Tensor, parameters: Tensors
) -> tuple[Tensors, Tensor, Tensors]:
    return ((dq + dc) * (1 - c * c),), dc.new_zeros(dc.shape), ()


@triton.jit
def relu_forward(sums, c, parameters):
    h = tl.where(sums[0] < 0, 0.0, sums[0])  # NaN stays
    return (), h, h


@triton.jit
def relu_backward(saved, c, c_prev, dq, dc, parameters):
    da = tl.where(c > 0, dq + dc, 0.0)
    return (da,), tl.zeros_like(dc), ()


def relu_forward_torch(sums: Tensors, c: Tensor, parameters: Tensors) -> tuple[Tensors, Tensor, Tensor]:
    h = sums[0].relu()
    return (), h, h


def relu_backward_torch(
    saved: Tensors, c: Tensor, c_prev: Tensor, dq: Tensor, dc: Tensor, parameters: Tensors
) -> tuple[Tensors, Tensor, Tensors]:
    return ((dq + dc) * (c > 0),), dc.new_zeros(dc.shape), ()


_SHAPE: dict[str, Any] = dict(sums=1, inputs=1, recurrent=(0,), saved=(), carries=False)

TANH = register(
    Cell("rnn-tanh", **_SHAPE, operator="rnn_tanh", forward=tanh_forward, backward=tanh_backward,
         forward_torch=tanh_forward_torch, backward_torch=tanh_backward_torch)
)  # fmt: skip
RELU = register(
    Cell("rnn-relu", **_SHAPE, operator="rnn_relu", forward=relu_forward, backward=relu_backward,
         forward_torch=relu_forward_torch, backward_torch=relu_backward_torch)
)  # fmt: skip
