"""Cells: the pointwise part of one time step, forward and backward.

A driver (`step`, `persistent`) takes a pair of them as `tl.constexpr` arguments. All blocks are
(rows, units) in the dtype that states are kept in.
"""

import triton
import triton.language as tl

from lstm_triton.kernels.blocks import tanh


@triton.jit
def lstm_forward(a_i, a_f, a_g, a_o, c_prev):
    """From the four sums before activation: the activated gates, c and o * tanh(c)."""
    i = tl.sigmoid(a_i)
    f = tl.sigmoid(a_f)
    g = tanh(a_g)
    o = tl.sigmoid(a_o)
    c = f * c_prev + i * g
    return i, f, g, o, c, o * tanh(c)


@triton.jit
def lstm_backward(i, f, g, o, c, c_prev, dq, dc):
    """From the gradients of o * tanh(c) and c: those of the four sums and of c_prev."""
    tanh_c = tanh(c)
    dc = dc + dq * o * (1 - tanh_c * tanh_c)
    da_i = dc * g * i * (1 - i)
    da_f = dc * c_prev * f * (1 - f)
    da_g = dc * i * (1 - g * g)
    da_o = dq * tanh_c * o * (1 - o)
    return da_i, da_f, da_g, da_o, dc * f
