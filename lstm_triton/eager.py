"""The recurrence of one LSTM layer in PyTorch operations, forward and backward by hand.

No autograd node a step: forward keeps the activated gates and the cell states, backward turns
them into the local derivatives of all steps at once, so that only the two products with the
recurrent weights and a few pointwise operations remain inside the loops. Runs on any device.
"""

import torch
from torch import Tensor

from lstm_triton.recurrence import Gradients, Layout, Recurrence


def forward(
    gates: Tensor,
    hx: Tensor,
    cx: Tensor,
    weight_hh: list[Tensor],
    weight_hr: list[Tensor],
    layout: Layout,
    mask: Tensor | None,
) -> Recurrence:
    """Runs the recurrence over all steps.

    Args:
        gates: (D, N, 4H) input products with biases; overwritten by the activated gates.
        hx: (D, B, K), cx: (D, B, H) initial states.
        weight_hh: for each direction (4H, K).
        weight_hr: for each direction (K, H); empty without projections.
        layout: where the steps' rows lie in N.
        mask: None or (D, T or 1, B, K): what h is multiplied by before its product.
    """
    directions, total, _ = gates.shape
    hidden, size = cx.size(2), hx.size(2)
    output = hx.new_empty(total, directions * size)
    c_all = cx.new_empty(directions, total, hidden)
    g_all = cx.new_empty(total, hidden)
    hn, cn = torch.empty_like(hx), torch.empty_like(cx)
    steps = layout.split
    for d in range(directions):
        reverse = d == 1
        w_hh = weight_hh[d].t()
        w_hr = weight_hr[d].t() if weight_hr else None
        a = gates[d]
        i, f, a_g, o = a.unflatten(1, (4, hidden)).unbind(1)
        # Views of every step, made at once and in the order of the loop: cheaper than slicing in it.
        views = [steps(x, reverse) for x in (a, a_g, g_all, i, f, o, c_all[d])]
        y_views = steps(output[:, d * size : (d + 1) * size], reverse)
        masks = [None] * layout.steps if mask is None else layout.masks(mask[d], reverse)
        h, c = hx[d], cx[d]
        for gate_views, y_t, m_t in zip(zip(*views, strict=True), y_views, masks, strict=True):
            a_t, ag_t, g_t, i_t, f_t, o_t, c_t = gate_views
            rows = a_t.size(0)
            whole = rows == layout.batch
            h_prev, c_prev = (h, c) if whole else (h[:rows], c[:rows])
            a_t.addmm_(h_prev if m_t is None else h_prev * m_t, w_hh)
            torch.tanh(ag_t, out=g_t)
            a_t.sigmoid_()  # of all four gates in one go; that of g is replaced below
            torch.mul(f_t, c_prev, out=c_t).addcmul_(i_t, g_t)
            if w_hr is None:
                torch.mul(torch.tanh(c_t), o_t, out=y_t)
            else:
                torch.mm(torch.tanh(c_t).mul_(o_t), w_hr, out=y_t)
            if whole:
                h, c = y_t, c_t
            else:  # rows that have ended, or (in reverse) not begun, keep their state
                h, c = torch.cat([y_t, h[rows:]]), torch.cat([c_t, c[rows:]])
        a_g.copy_(g_all)
        hn[d], cn[d] = h, c
    return Recurrence(output, hn, cn, gates, c_all)


def backward(
    doutput: Tensor,
    dhn: Tensor,
    dcn: Tensor,
    saved: Recurrence,
    hx: Tensor,
    cx: Tensor,
    weight_hh: list[Tensor],
    weight_hr: list[Tensor],
    layout: Layout,
    mask: Tensor | None,
) -> Gradients:
    """The gradients of `forward`, from those of its outputs (shapes as there)."""
    directions, total, _ = saved.gates.shape
    hidden, size = cx.size(2), hx.size(2)
    dgates = torch.empty_like(saved.gates)
    h_prev = hx.new_empty(directions, total, size)
    dh_all = hx.new_empty(directions, total, size) if weight_hr else hx.new_empty(0)
    dhx, dcx = dhn.clone(), dcn.clone()
    steps = layout.split
    for d in range(directions):
        reverse = d == 1
        columns = slice(d * size, (d + 1) * size)
        i, f, g, o = saved.gates[d].view(total, 4, hidden).unbind(1)
        factors = dgates[d].view(total, 4, hidden)
        q = torch.tanh(saved.c[d])
        # d(gate before activation) / dc for i, f, g and / d(o * tanh(c)) for o.
        torch.mul(i * g, 1 - i, out=factors[:, 0])
        torch.mul(layout.previous(saved.c[d], cx[d], reverse) * f, 1 - f, out=factors[:, 1])
        torch.mul(i, 1 - g * g, out=factors[:, 2])
        torch.mul(q * o, 1 - o, out=factors[:, 3])
        h_to_c = o * (1 - q * q)
        h_prev[d] = layout.previous(saved.output[:, columns], hx[d], reverse)
        if mask is not None:
            h_prev[d] *= torch.cat(list(layout.masks(mask[d], reverse=False)))

        # The states' gradients, taken back in place: a step's rows are the first of them.
        dh, dc = dhx[d], dcx[d]
        views = [steps(x, not reverse) for x in (dgates[d], factors[:, :3], factors[:, 3], h_to_c, f)]
        views.append(steps(doutput[:, columns], not reverse))
        dh_out = steps(dh_all[d], not reverse) if weight_hr else None
        masks = [None] * layout.steps if mask is None else layout.masks(mask[d], not reverse)
        w_hh = weight_hh[d]
        for s, (step, m_t) in enumerate(zip(zip(*views, strict=True), masks, strict=True)):
            da_t, factors_t, do_t, h_to_c_t, f_t, dy_t = step
            rows = da_t.size(0)
            dh_t, dc_t = (dh, dc) if rows == layout.batch else (dh[:rows], dc[:rows])
            dh_t.add_(dy_t)
            dq_t = dh_t
            if dh_out is not None:
                dh_out[s].copy_(dh_t)
                dq_t = dh_t @ weight_hr[d]
            dc_t.addcmul_(dq_t, h_to_c_t)
            factors_t.mul_(dc_t.unsqueeze(1))
            do_t.mul_(dq_t)
            torch.mm(da_t, w_hh, out=dh_t)
            if m_t is not None:
                dh_t.mul_(m_t)
            dc_t.mul_(f_t)
    return Gradients(dgates, dhx, dcx, h_prev, dh_all)
