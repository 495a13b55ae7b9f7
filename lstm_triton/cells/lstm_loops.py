"""The plain LSTM's loops in PyTorch operations, as `lstm_triton.eager` has them for any cell, in fewer of these.

Backward turns what forward kept into the local derivatives of all steps at once, so that only the two products with
the recurrent weights and a few pointwise operations remain inside the loops; all states are written in place.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lstm_triton.eager import Loop


def forward(loop: "Loop", gates: Tensor, output: Tensor, c_all: Tensor, hn: Tensor, cn: Tensor) -> None:
    """One direction of a window.

    Args:
        gates: (n, 4H) input products with biases; overwritten by the activated gates.
        output, c_all: (n, K), (n, H) to be written: h and c after each step.
        hn, cn: (B, K), (B, H) the states, overwritten by those after the window.
    """
    _, weight_hh, weight_hr, _, _, layout, reverse, mask, _ = loop
    total, hidden = c_all.shape
    w_hh, w_hr = weight_hh.t(), None if weight_hr is None else weight_hr.t()
    g_all = torch.empty_like(c_all)
    i, f, a_g, o = gates.unflatten(1, (4, hidden)).unbind(1)
    # Views of every step, made at once and in the order of the loop: cheaper than slicing in it.
    views = [layout.split(x, reverse) for x in (gates, a_g, g_all, i, f, o, c_all, output)]
    masks = [None] * layout.steps if mask is None else layout.masks(mask, reverse)
    h, c = hn, cn
    for step, m_t in zip(zip(*views, strict=True), masks, strict=True):
        a_t, ag_t, g_t, i_t, f_t, o_t, c_t, y_t = step
        rows, known = a_t.size(0), h.size(0)
        if rows < known:
            if h is not hn:  # rows that end here keep their state
                hn[rows:known], cn[rows:known] = h[rows:], c[rows:]
            h, c = h[:rows], c[:rows]
        elif rows > known:  # in reverse rows begin
            h, c = torch.cat([h, hn[known:rows]]), torch.cat([c, cn[known:rows]])
        a_t.addmm_(h if m_t is None else h * m_t, w_hh)
        torch.tanh(ag_t, out=g_t)
        a_t.sigmoid_()  # of all four gates in one go; that of g is replaced below
        torch.mul(f_t, c, out=c_t).addcmul_(i_t, g_t)
        if w_hr is None:
            torch.mul(torch.tanh(c_t), o_t, out=y_t)
        else:
            torch.mm(torch.tanh(c_t).mul_(o_t), w_hr, out=y_t)
        h, c = y_t, c_t
    a_g.copy_(g_all)
    hn[: h.size(0)], cn[: c.size(0)] = h, c


def backward(
    loop: "Loop", gates: Tensor, c: Tensor, c_prev: Tensor, doutput: Tensor, dh: Tensor, dc: Tensor,
    dgates: Tensor, dh_all: Tensor | None, dvectors: None,
) -> None:  # fmt: skip
    """One direction of a window.

    Args:
        gates, c, c_prev: (n, 4H), (n, H) of forward; c_prev is c before each step.
        doutput: (n, K).
        dh, dc: (B, K), (B, H) the gradients of the states after the window, overwritten by those before it.
        dgates, dh_all: (n, 4H) and, with projections, (n, K) to be written: fields of `Gradients`.
    """
    _, weight_hh, weight_hr, _, _, layout, reverse, mask, _ = loop
    total, hidden = c.shape
    i, f, g, o = gates.view(total, 4, hidden).unbind(1)
    factors = dgates.view(total, 4, hidden)
    q = torch.tanh(c)
    # d(gate before activation) / dc for i, f, g and / d(o * tanh(c)) for o.
    torch.mul(i * g, 1 - i, out=factors[:, 0])
    torch.mul(c_prev * f, 1 - f, out=factors[:, 1])
    torch.mul(i, 1 - g * g, out=factors[:, 2])
    torch.mul(q * o, 1 - o, out=factors[:, 3])
    h_to_c = o * (1 - q * q)

    # The states' gradients, taken back in place: a step's rows are the first of them.
    batch = dh.size(0)
    views = [layout.split(x, not reverse) for x in (dgates, factors[:, :3], factors[:, 3], h_to_c, f, doutput)]
    dh_out = None if dh_all is None else layout.split(dh_all, not reverse)
    masks = [None] * layout.steps if mask is None else layout.masks(mask, not reverse)
    for s, (step, m_t) in enumerate(zip(zip(*views, strict=True), masks, strict=True)):
        da_t, factors_t, do_t, h_to_c_t, f_t, dy_t = step
        rows = da_t.size(0)
        dh_t, dc_t = (dh, dc) if rows == batch else (dh[:rows], dc[:rows])
        dh_t.add_(dy_t)
        dq_t = dh_t
        if dh_out is not None and weight_hr is not None:
            dh_out[s].copy_(dh_t)
            dq_t = dh_t @ weight_hr
        dc_t.addcmul_(dq_t, h_to_c_t)
        factors_t.mul_(dc_t.unsqueeze(1))
        do_t.mul_(dq_t)
        torch.mm(da_t, weight_hh, out=dh_t)
        if m_t is not None:
            dh_t.mul_(m_t)
        dc_t.mul_(f_t)
