"""The recurrence of one LSTM layer in PyTorch operations, forward and backward by hand.

No autograd node a step: forward keeps the activated gates and the cell states, backward turns
them into the local derivatives of all steps at once, so that only the two products with the
recurrent weights and a few pointwise operations remain inside the loops. Runs on any device.
"""

import torch
from torch import Tensor

from lstm_triton.recurrence import Gradients, Layer, Layout, Pass, Saved, Window, state_dtype


class Eager:
    """A layer's call in PyTorch operations; computes in float32 or float64, whatever the input's dtype."""

    def __init__(self, layer: Layer) -> None:
        self.dtype = state_dtype(layer.input.dtype)
        if layer.input.dtype != self.dtype:
            weights = [tuple(None if w is None else w.to(self.dtype) for w in d) for d in layer.directions]
            layer = layer._replace(directions=weights, hx=layer.hx.to(self.dtype))  # type: ignore[arg-type]
        self.layer = layer

    @property
    def window_length(self) -> int:
        """Steps to run at a time where nothing is kept; 0: all."""
        return self.layer.window_length()

    def forward(
        self, window: Window, output: Tensor, hx: Tensor, cx: Tensor, save: bool, room: Saved | None = None
    ) -> Pass:
        """Runs the recurrence over a window; as `lstm_triton.launching.Kernels.forward`."""
        gates = self.layer.products(window, None if room is None else room.gates)
        hx = hx.to(self.dtype)
        hn, cn = hx.clone(), cx.clone()
        c_all = cx.new_empty(*gates.shape[:2], cx.size(2)) if room is None else room.c
        for d, (_, w_hh, _, _, w_hr) in enumerate(self.layer.directions):
            part, at, columns = window.part(d), window.rows(d), self.layer.columns(d)
            y = output[at, columns]
            target = y if y.dtype == self.dtype else y.to(self.dtype)
            rows = slice(0, part.total)
            mask = self._mask(d, window)
            _forward(gates[d, rows], target, c_all[d, rows], hn[d], cn[d], w_hh, w_hr, part, d == 1, mask)
            if target is not y:
                y.copy_(target)
        return Pass(hn, cn, gates, c_all)

    def rebuild(self, window: Window, output: Tensor, hx: Tensor, cx: Tensor) -> Saved:
        """What `forward` would keep of a window, from the outputs; as `lstm_triton.launching.Kernels.rebuild`."""
        gates = self.layer.products(window)
        hidden = cx.size(2)
        c_all = cx.new_empty(*gates.shape[:2], hidden)
        h_prev = self._multiplied(window, output, hx)
        for d, (_, w_hh, *_) in enumerate(self.layer.directions):
            part, reverse = window.part(d), d == 1
            a, cells = gates[d, : part.total], c_all[d, : part.total]
            a.addmm_(h_prev[d, : part.total], w_hh.t())
            i, f, g, _ = a.unflatten(1, (4, hidden)).unbind(1)
            activated = torch.tanh(g)
            a.sigmoid_()
            g.copy_(activated)
            c = cx[d]
            added = torch.mul(i, g)
            views = [part.split(x, reverse) for x in (added, f, cells)]
            for added_t, f_t, c_t in zip(*views, strict=True):
                rows, known = c_t.size(0), c.size(0)
                if rows > known:
                    c = torch.cat([c, cx[d, known:rows]])
                torch.addcmul(added_t, f_t, c[:rows], out=c_t)
                c = c_t
        return Saved(gates, c_all, h_prev)

    def backward(
        self,
        window: Window,
        output: Tensor,
        doutput: Tensor,
        saved: Saved,
        hx: Tensor,
        cx: Tensor,
        dhn: Tensor,
        dcn: Tensor,
        *wanted: bool,
    ) -> Gradients:
        """The gradients of `forward`; as `lstm_triton.launching.Kernels.backward`."""
        dgates = torch.empty_like(saved.gates)
        h_prev = self._multiplied(window, output, hx) if saved.h_prev is None else saved.h_prev
        projected = self.layer.directions[0][4] is not None
        dh = torch.empty_like(h_prev) if projected else None
        found = Gradients(dhn.clone(), dcn.clone(), dgates, dh, h_prev)
        for d, (_, w_hh, _, _, w_hr) in enumerate(self.layer.directions):
            part, reverse = window.part(d), d == 1
            rows = slice(0, part.total)
            c = saved.c[d, rows]
            _backward(
                saved.gates[d, rows], c, part.previous(c, cx[d], reverse),
                doutput[window.rows(d), self.layer.columns(d)].to(self.dtype),
                found.dhx[d], found.dcx[d], dgates[d, rows], None if dh is None else dh[d, rows],
                w_hh, w_hr, part, reverse, self._mask(d, window),
            )  # fmt: skip
        return found

    def _mask(self, d: int, window: Window) -> Tensor | None:
        return self.layer.dropout.of_steps(d, *window.steps(d), self.layer.hx[d])

    def _multiplied(self, window: Window, output: Tensor, hx: Tensor) -> Tensor:
        """(D, n, K): the h, masked under recurrent dropout, that each step of the window multiplied with weight_hh."""
        directions, _, size = hx.shape
        h_prev = self.layer.hx.new_empty(directions, window.size(directions), size)
        for d in range(directions):
            part, reverse, mask = window.part(d), d == 1, self._mask(d, window)
            own = h_prev[d, : part.total]
            own.copy_(part.previous(output[window.rows(d), self.layer.columns(d)], hx[d].to(output.dtype), reverse))
            if mask is not None:
                own *= torch.cat(list(part.masks(mask, reverse=False)))
        return h_prev


def _forward(
    gates: Tensor,
    output: Tensor,
    c_all: Tensor,
    hn: Tensor,
    cn: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    layout: Layout,
    reverse: bool,
    mask: Tensor | None,
) -> None:
    """One direction of a window.

    Args:
        gates: (n, 4H) input products with biases; overwritten by the activated gates.
        output, c_all: (n, K), (n, H) to be written: h and c after each step.
        hn, cn: (B, K), (B, H) the states, overwritten by those after the window.
        weight_hh, weight_hr: (4H, K) and, with projections, (K, H).
        layout: where the steps' rows lie in n.
        mask: None or (steps or 1, B, K): what h is multiplied by before its product.
    """
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


def _backward(
    gates: Tensor,
    c: Tensor,
    c_prev: Tensor,
    doutput: Tensor,
    dh: Tensor,
    dc: Tensor,
    dgates: Tensor,
    dh_all: Tensor | None,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    layout: Layout,
    reverse: bool,
    mask: Tensor | None,
) -> None:
    """One direction of a window.

    Args:
        gates, c, c_prev: (n, 4H), (n, H) of forward; c_prev is c before each step.
        doutput: (n, K).
        dh, dc: (B, K), (B, H) the gradients of the states after the window, overwritten by those before it.
        dgates, dh_all: (n, 4H) and, with projections, (n, K) to be written: fields of `Gradients`.
        weight_hh, weight_hr, layout, mask: as of `_forward`.
    """
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
