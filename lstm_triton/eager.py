"""The recurrence of one layer in PyTorch operations, forward and backward by hand.

No autograd node a step: forward keeps what the cell wants for backward and the states, and all products but those with
the recurrent weights are made outside the loops. Runs on any device.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lstm_triton.cells.cell import Cell
from lstm_triton.recurrence import Gradients, Layer, Layout, Pass, Saved, Window, state_dtype


class Loop(NamedTuple):
    """What the loops over the steps of one direction of a window are given, beside what they read and write.

    `lstm_triton.cells.Cell.loops` are such loops of one cell.
    """

    cell: Cell
    weight_hh: Tensor  # (R * H, K)
    weight_hr: Tensor | None  # (K, H) with projections
    parameters: tuple[Tensor, ...]  # vectors (H,) of the cell
    start: dict[int, Tensor]  # (H,) what the sums without a product with the input begin with, where not 0
    layout: Layout  # where the steps' rows lie in n
    reverse: bool
    mask: Tensor | None  # (steps or 1, B, K): what h is multiplied by before its product
    zone: tuple[Tensor, Tensor] | None  # of h and c, each (steps or 1, B, H): what share stays

    def zones(self, backward: bool = False) -> Sequence[Any]:
        """Of each step in the order of the loop (h, c), each (rows, H); None without zoneout."""
        if self.zone is None:
            return [None] * self.layout.steps
        reverse = self.reverse != backward
        return list(zip(*(self.layout.masks(z, reverse) for z in self.zone), strict=True))

    def masks(self, backward: bool = False) -> Sequence[Any]:
        """Of each step in the order of the loop the mask (rows, K); None without recurrent dropout."""
        reverse = self.reverse != backward
        return [None] * self.layout.steps if self.mask is None else self.layout.masks(self.mask, reverse)


def keep(room: Tensor, saved: Sequence[Tensor], c_new: Tensor, c: Tensor, zone: Any) -> Tensor:
    """Writes what a step keeps to its room (rows, W, H); c after the step, under zoneout if there is any."""
    for k, x in enumerate(saved):
        room[:, k] = x
    if zone is None:
        return c_new
    room[:, len(saved)] = c_new
    return torch.lerp(c_new, c, zone[1])


def forward_loop(loop: Loop, gates: Tensor, output: Tensor, c_all: Tensor, hn: Tensor, cn: Tensor) -> None:
    """One direction of a window, for any cell.

    Args:
        gates: (n, WH) input products with biases; overwritten by what the cell keeps.
        output, c_all: (n, K), (n, H) to be written: h and c after each step.
        hn, cn: (B, K), (B, H) the states, overwritten by those after the window.
    """
    cell, weight_hr, start = loop.cell, loop.weight_hr, loop.start
    hidden, w_hh = c_all.size(1), loop.weight_hh.t()
    order = {k: r for r, k in enumerate(cell.recurrent)}
    views = [loop.layout.split(x, loop.reverse) for x in (gates.unflatten(1, (-1, hidden)), c_all, output)]
    h, c = hn, cn
    for room, c_t, y_t, m_t, z_t in zip(*views, loop.masks(), loop.zones(), strict=True):
        rows, known = c_t.size(0), c.size(0)
        if rows < known:
            if h is not hn:  # rows that end here keep their state
                hn[rows:known], cn[rows:known] = h[rows:], c[rows:]
            h, c = h[:rows], c[:rows]
        elif rows > known:  # in reverse rows begin
            h, c = torch.cat([h, hn[known:rows]]), torch.cat([c, cn[known:rows]])
        products = torch.mm(h if m_t is None else h * m_t, w_hh).view(rows, -1, hidden)
        sums = []
        for k in range(cell.sums):
            if k in order:
                begin = room[:, k] if k < cell.inputs else start.get(k)
                product = products[:, order[k]]
                sums.append(product if begin is None else product + begin)
            else:
                sums.append(room[:, k])
        saved, c_new, q = cell.forward_torch(tuple(sums), c, loop.parameters)
        c_new = keep(room, saved, c_new, c, z_t)
        if z_t is not None:
            q = torch.lerp(q, h, z_t[0])
        y_t.copy_(q if weight_hr is None else q @ weight_hr.t())
        c_t.copy_(c_new)
        h, c = y_t, c_t
    hn[: h.size(0)], cn[: c.size(0)] = h, c


def backward_loop(
    loop: Loop, gates: Tensor, c: Tensor, c_prev: Tensor, doutput: Tensor, dh: Tensor, dc: Tensor,
    dgates: Tensor, dh_all: Tensor | None, dvectors: Tensor | None,
) -> None:  # fmt: skip
    """One direction of a window, for any cell.

    Args:
        gates, c, c_prev: (n, WH), (n, H) of forward; c_prev is c before each step.
        doutput: (n, K).
        dh, dc: (B, K), (B, H) the gradients of the states after the window, overwritten by those before it.
        dgates, dh_all, dvectors: (n, GH), with projections (n, K), with parameters (P, H) to be written (the last one
            to be added to): fields of `Gradients`.
    """
    cell, layout, reverse, weight_hr = loop.cell, loop.layout, loop.reverse, loop.weight_hr
    hidden, count = c.size(1), len(cell.saved)
    recurrent = torch.tensor(cell.recurrent, device=c.device)
    all_sums = cell.recurrent == tuple(range(cell.sums))
    saved = gates.unflatten(1, (-1, hidden))
    own = c if loop.zone is None else saved[:, count]  # the cell's own c
    out = dgates.unflatten(1, (-1, hidden))
    views = [layout.split(x, not reverse) for x in (saved, own, c_prev, doutput, out)]
    dh_out = None if dh_all is None else layout.split(dh_all, not reverse)
    for s, (step, m_t, z_t) in enumerate(
        zip(zip(*views, strict=True), loop.masks(True), loop.zones(True), strict=True)
    ):
        saved_t, c_t, c_prev_t, dy_t, da_t = step
        rows = c_t.size(0)
        dq = dh[:rows] + dy_t
        if dh_out is not None and weight_hr is not None:
            dh_out[s].copy_(dq)
            dq = dq @ weight_hr
        dc_t = dc[:rows]
        if z_t is not None:
            dh_stays, dc_stays = z_t[0] * dq, z_t[1] * dc_t
            dq, dc_t = dq - dh_stays, dc_t - dc_stays
        dsums, dc_prev, dparameters = cell.backward_torch(
            saved_t[:, :count].unbind(1), c_t, c_prev_t, dq, dc_t, loop.parameters
        )
        for k, x in enumerate(dsums):
            da_t[:, k] = x
        if dvectors is not None:
            for k, x in enumerate(dparameters):
                dvectors[k] += x.sum(0)
        da = da_t if all_sums else da_t.index_select(1, recurrent)
        dh_prev = da.flatten(1) @ loop.weight_hh
        if m_t is not None:
            dh_prev *= m_t
        if z_t is not None:
            dh_prev += dh_stays
            dc_prev = dc_prev + dc_stays
        dh[:rows], dc[:rows] = dh_prev, dc_prev


class Eager:
    """A layer's call in PyTorch operations; computes in float32 or float64, whatever the input's dtype."""

    def __init__(self, layer: Layer) -> None:
        self.dtype = state_dtype(layer.input.dtype)
        if layer.input.dtype != self.dtype:
            weights = [d.to(self.dtype) for d in layer.directions]
            layer = layer._replace(directions=weights, hx=layer.hx.to(self.dtype))
        self.layer = layer
        quick = layer.cell.loops is not None and layer.zoneout is None
        self.loops: Any = layer.cell.loops if quick else (forward_loop, backward_loop)

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
        for d in range(len(self.layer.directions)):
            part, at, columns = window.part(d), window.rows(d), self.layer.columns(d)
            y = output[at, columns]
            target = y if y.dtype == self.dtype else y.to(self.dtype)
            rows = slice(0, part.total)
            self.loops[0](self._common(d, window), gates[d, rows], target, c_all[d, rows], hn[d], cn[d])
            if target is not y:
                y.copy_(target)
        return Pass(hn, cn, gates, c_all)

    def rebuild(self, window: Window, output: Tensor, hx: Tensor, cx: Tensor) -> Saved:
        """What `forward` would keep of a window, from the outputs; as `lstm_triton.launching.Kernels.rebuild`."""
        gates = self.layer.products(window)
        hidden = cx.size(2)
        c_all = cx.new_empty(*gates.shape[:2], hidden)
        h_prev = self._multiplied(window, output, hx)
        cell = self.layer.cell
        for d in range(len(self.layer.directions)):
            loop = self._common(d, window)
            part, reverse = loop.layout, loop.reverse
            self.layer.add_products(d, h_prev[d, : part.total], gates[d, : part.total])
            a, cells = gates[d, : part.total].unflatten(1, (-1, hidden)), c_all[d, : part.total]
            c = cx[d]
            for a_t, c_t, z_t in zip(part.split(a, reverse), part.split(cells, reverse), loop.zones(), strict=True):
                rows, known = c_t.size(0), c.size(0)
                if rows > known:
                    c = torch.cat([c, cx[d, known:rows]])
                saved, c_new, _ = cell.forward_torch(a_t[:, : cell.sums].unbind(1), c[:rows], loop.parameters)
                c = keep(a_t, saved, c_new, c[:rows], z_t)
                c_t.copy_(c)
        return Saved(gates, c_all, h_prev)

    def _common(self, d: int, window: Window) -> "Loop":
        """What both loops of direction d get."""
        layer, part = self.layer, window.part(d)
        hidden, (_, w_hh, _, _, w_hr, _) = layer.cx.size(2), layer.directions[d]
        parameters = layer.directions[d].vectors(layer.cell, hidden).unbind(0)
        zone = None if layer.zoneout is None else layer.zoneout.of_steps(d, *window.steps(d), layer.hx[d])
        return Loop(layer.cell, w_hh, w_hr, parameters, layer.start(d), part, d == 1, self._mask(d, window), zone)

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
        layer, (D, n, hidden) = self.layer, saved.c.shape
        cell = layer.cell
        dgates = saved.gates.new_empty(D, n, cell.sums * hidden)
        h_prev = self._multiplied(window, output, hx) if saved.h_prev is None else saved.h_prev
        projected = layer.directions[0].w_hr is not None
        dh = torch.empty_like(h_prev) if projected else None
        vectors = dgates.new_zeros(D, cell.vectors, hidden) if cell.vectors else None
        found = Gradients(dhn.clone(), dcn.clone(), dgates, dh, h_prev, vectors)
        for d in range(D):
            loop = self._common(d, window)
            rows = slice(0, loop.layout.total)
            c = saved.c[d, rows]
            self.loops[1](
                loop, saved.gates[d, rows], c, loop.layout.previous(c, cx[d], loop.reverse),
                doutput[window.rows(d), layer.columns(d)].to(self.dtype), found.dhx[d], found.dcx[d],
                dgates[d, rows], None if dh is None else dh[d, rows], None if vectors is None else vectors[d],
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
