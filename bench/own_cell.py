"""A cell of one's own, as the README shows it: the minimal gated unit (Zhou et al. 2016), f on the product with h."""

from typing import Any

from lstm_triton import TritonRNNBase
from lstm_triton.cells import Cell
from lstm_triton.cells.jit import tanh, tl, triton


@triton.jit
def forward(sums, h, parameters):
    a_f, x_n, h_n = sums
    f = tl.sigmoid(a_f)
    n = tanh(x_n + f * h_n)
    h_new = h + f * (n - h)
    return (f, n, h_n), h_new, h_new  # what backward wants, the state, the output


def forward_torch(sums, h, parameters):
    a_f, x_n, h_n = sums
    f = a_f.sigmoid()
    n = (x_n + f * h_n).tanh()
    h_new = h + f * (n - h)
    return (f, n, h_n), h_new, h_new


def backward(saved, h_new, h, dq, dc, parameters):  # arithmetic alone: the same in kernels and in PyTorch
    f, n, h_n = saved
    dn = (dq + dc) * f * (1 - n * n)
    df = ((dq + dc) * (n - h) + dn * h_n) * f * (1 - f)
    return (df, dn, dn * f), (dq + dc) * (1 - f), ()


# Of the sums f and n have a product with the input, f and h_n one with h.
MGU = Cell(
    "mgu", sums=3, inputs=2, recurrent=(0, 2), saved=("f", "n", "h_n"), carries=False,
    forward=forward, backward=triton.jit(backward), forward_torch=forward_torch, backward_torch=backward,
)  # fmt: skip


class MinimalGatedUnit(TritonRNNBase):
    def __init__(self, input_size: int, hidden_size: int, **options: Any) -> None:
        super().__init__(MGU, input_size, hidden_size, **options)
