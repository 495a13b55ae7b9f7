"""The gated recurrent unit as `torch.nn.GRU` has it (Cho et al. 2014, the reset gate on the product as cuDNN does):

    r = σ(x_r + h_r), z = σ(x_z + h_z), n = tanh(x_n + r ⊙ h_n), h = (1 - z) ⊙ n + z ⊙ h

where x_ and h_ are products with input and h, each with its bias.
"""

from torch import Tensor

from lstm_triton.cells.cell import Cell, register
from lstm_triton.cells.jit import tanh, tl, triton

Tensors = tuple[Tensor, ...]


@triton.jit
def forward(sums, c, parameters):
    a_r, a_z, x_n, h_n = sums
    r = tl.sigmoid(a_r)
    z = tl.sigmoid(a_z)
    n = tanh(x_n + r * h_n)
    h = n + z * (c - n)
    return (r, z, n, h_n), h, h


@triton.jit
def backward(saved, c, c_prev, dq, dc, parameters):
    r, z, n, h_n = saved
    dh = dq + dc
    da_n = dh * (1 - z) * (1 - n * n)
    da_r = da_n * h_n * r * (1 - r)
    da_z = dh * (c_prev - n) * z * (1 - z)
    return (da_r, da_z, da_n, da_n * r), dh * z, ()


def forward_torch(sums: Tensors, c: Tensor, parameters: Tensors) -> tuple[Tensors, Tensor, Tensor]:
    a_r, a_z, x_n, h_n = sums
    r, z = a_r.sigmoid(), a_z.sigmoid()
    n = (x_n + r * h_n).tanh()
    h = n + z * (c - n)
    return (r, z, n, h_n), h, h


def backward_torch(
    saved: Tensors, c: Tensor, c_prev: Tensor, dq: Tensor, dc: Tensor, parameters: Tensors
) -> tuple[Tensors, Tensor, Tensors]:
    r, z, n, h_n = saved
    dh = dq + dc
    da_n = dh * (1 - z) * (1 - n * n)
    da_r = da_n * h_n * r * (1 - r)
    da_z = dh * (c_prev - n) * z * (1 - z)
    return (da_r, da_z, da_n, da_n * r), dh * z, ()


GRU = register(
    Cell(
        "gru",
        sums=4,
        inputs=3,
        recurrent=(0, 1, 3),
        saved=("r", "z", "n", "h_n"),
        carries=False,
        operator="gru",
        forward=forward,
        backward=backward,
        forward_torch=forward_torch,
        backward_torch=backward_torch,
    )  # fmt: skip
)
