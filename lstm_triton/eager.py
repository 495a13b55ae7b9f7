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
    states = []
    for d in range(directions):
        w_hh = weight_hh[d].t()
        w_hr = weight_hr[d].t() if weight_hr else None
        # Views of every step, made at once: cheaper than slicing inside the loop.
        a, y, c_out = (x.split(layout.rows) for x in (gates[d], output[:, d * size : (d + 1) * size], c_all[d]))
        i_f, g, o, i, f = (
            x.split(layout.rows)
            for x in (
                gates[d, :, : 2 * hidden],
                gates[d, :, 2 * hidden : 3 * hidden],
                gates[d, :, 3 * hidden :],
                gates[d, :, :hidden],
                gates[d, :, hidden : 2 * hidden],
            )
        )
        masks = None if mask is None else mask[d].unbind(0)
        h, c = hx[d], cx[d]
        for t in layout.order(reverse=d == 1):
            rows = layout.rows[t]
            h_t, c_t = (h, c) if rows == layout.batch else (h[:rows], c[:rows])
            if masks is not None:
                h_t = h_t * masks[t if len(masks) > 1 else 0][:rows]
            a[t].addmm_(h_t, w_hh)
            i_f[t].sigmoid_()
            g[t].tanh_()
            o[t].sigmoid_()
            torch.mul(f[t], c_t, out=c_out[t]).addcmul_(i[t], g[t])
            q = torch.tanh(c_out[t])
            if w_hr is None:
                torch.mul(q, o[t], out=y[t])
            else:
                torch.mm(q.mul_(o[t]), w_hr, out=y[t])
            if rows == layout.batch:
                h, c = y[t], c_out[t]
            else:  # rows that have ended, or (in reverse) not begun, keep their state
                h, c = torch.cat([y[t], h[rows:]]), torch.cat([c_out[t], c[rows:]])
        states.append((h, c))
    hn, cn = (torch.stack(x) for x in zip(*states, strict=True))
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
    states = []
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
            h_prev[d] *= flat_mask(mask[d], layout)

        da, dc_factor, do_factor, dy, h_to_c_t, f_t = (
            x.split(layout.rows) for x in (dgates[d], factors[:, :3], factors[:, 3], doutput[:, columns], h_to_c, f)
        )
        dh_out = dh_all[d].split(layout.rows) if weight_hr else None
        masks = None if mask is None else mask[d].unbind(0)
        dh, dc = dhn[d], dcn[d]
        for t in layout.order(not reverse):
            rows = layout.rows[t]
            whole = rows == layout.batch
            dh_t = dy[t] + (dh if whole else dh[:rows])
            if dh_out is not None:
                dh_out[t].copy_(dh_t)
                dh_t = dh_t @ weight_hr[d]
            dc_t = torch.addcmul(dc if whole else dc[:rows], dh_t, h_to_c_t[t])
            dc_factor[t].mul_(dc_t.unsqueeze(1))
            do_factor[t].mul_(dh_t)
            dh_t = da[t] @ weight_hh[d]
            if masks is not None:
                dh_t.mul_(masks[t if len(masks) > 1 else 0][:rows])
            dc_t.mul_(f_t[t])
            dh = dh_t if whole else torch.cat([dh_t, dh[rows:]])
            dc = dc_t if whole else torch.cat([dc_t, dc[rows:]])
        states.append((dh, dc))
    dhx, dcx = (torch.stack(x) for x in zip(*states, strict=True))
    return Gradients(dgates, dhx, dcx, h_prev, dh_all)


def flat_mask(mask: Tensor, layout: Layout) -> Tensor:
    """A direction's mask (T or 1, B, K) as the (N, K) factors of the flat rows."""
    mask = mask.expand(layout.steps, -1, -1)
    if layout.is_dense:
        return mask.reshape(-1, mask.size(-1))
    return torch.cat([mask[t, :rows] for t, rows in enumerate(layout.rows)])
