"""Projections folded into the recurrent weights, so that a step has one product: W_hh (W_hr q) = (W_hh W_hr) q.

The recurrence runs on q, of an LSTM o * tanh(c), of H units; the projections of all steps are a GEMM after it. What a
row begins with is an h that is no projection of a q: its product with W_hh is added to the sums of the row's first
step, which here all have a product with the input. With recurrent dropout, whose mask lies between the two weights,
nothing can be folded.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lstm_triton.kernels.launch import Front, Launch
from lstm_triton.recurrence import Gradients, Pass, Saved, Window, first_rows


def _front(launch: Launch) -> tuple[Front, Tensor]:
    """What the kernels multiply with, and W_hr (D, K, H)."""
    w_hr = launch.w_hr.view(launch.D, launch.K, launch.H)
    return Front.of(launch)._replace(w_hh=_w_hh(launch) @ w_hr), w_hr


def _w_hh(launch: Launch) -> Tensor:
    """(D, RH, K)."""
    return launch.w_hh.view(launch.D, len(launch.cell.recurrent) * launch.H, launch.K)


def _runs(launch: Launch) -> list[tuple[slice, slice]]:
    """Where sums that lie side by side are, among the rows of W_hh and among the columns of all sums."""
    return [
        (slice(rows.start * launch.H, rows.stop * launch.H), slice(sums.start * launch.H, sums.stop * launch.H))
        for rows, sums in launch.cell.runs()
    ]


def forward(
    run: Callable[..., Pass],
    launch: Launch,
    window: Window,
    gates: Tensor,
    cells: Tensor | None,
    output: Tensor,
    hx: Tensor,
    cx: Tensor,
    save: bool,
) -> Pass:
    """As of `cooperative.forward`, by its `run`."""
    front, w_hr = _front(launch)
    D, K, w_hh = launch.D, launch.K, _w_hh(launch)
    for d in range(D):
        at = first_rows(window, d, hx.device)
        for rows, sums in _runs(launch):
            gates[d][:, sums].index_add_(0, at, hx[d, : len(at)] @ w_hh[d, rows].t())
    q = output.new_empty(output.size(0), D * launch.H)
    found = run(launch, window, front, gates, cells, q, torch.zeros_like(cx, dtype=hx.dtype), cx, save)
    hn = hx.clone()
    for d in range(D):
        own, live = window.rows(d), window.part(d).batch
        output[own, d * K : (d + 1) * K] = q[own, d * launch.H : (d + 1) * launch.H] @ w_hr[d].t()
        hn[d, :live] = found.hn[d, :live] @ w_hr[d].t()
    return found._replace(hn=hn)


def backward(
    run: Callable[..., Gradients],
    launch: Launch,
    window: Window,
    doutput: Tensor,
    saved: Saved,
    cx: Tensor,
    dhn: Tensor,
    dcn: Tensor,
) -> Gradients:
    """As of `cooperative_backward.backward`, by its `run`."""
    front, w_hr = _front(launch)
    D, K, w_hh = launch.D, launch.K, _w_hh(launch)
    dq = doutput.new_empty(doutput.size(0), D * launch.H)
    for d in range(D):
        rows = window.rows(d)
        dq[rows, d * launch.H : (d + 1) * launch.H] = doutput[rows, d * K : (d + 1) * K] @ w_hr[d]
    found = run(launch, window, front, dq, saved, cx, dhn @ w_hr.to(dhn.dtype), dcn)
    dhx, dh = dhn.clone(), doutput.new_empty(D, saved.gates.size(1), K)
    for d in range(D):
        part = window.part(d)
        own = part.total
        # Of the h that each step multiplied.
        back = doutput.new_zeros(own, K)
        for rows, sums in _runs(launch):
            back += found.dgates[d, :own, sums] @ w_hh[d, rows]
        at = first_rows(window, d, dhn.device)
        dhx[d, : len(at)] = back[at].to(dhn.dtype)
        # A step's h was multiplied by the step that a pass in the other direction comes from.
        after = part.previous(back, dhn[d].to(back.dtype), d == 0)
        dh[d, :own] = doutput[window.rows(d), d * K : (d + 1) * K] + after
    return found._replace(dhx=dhx, dh=dh)
