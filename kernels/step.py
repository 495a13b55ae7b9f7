"""`step`: one launch a time step; a program owns a tile of the batch and a tile of hidden units.

The products of all gates and the pointwise update are one kernel; the launch boundary is what makes
all of h_{t-1} known. For any hidden size. Both directions run in the same launches: at launch s,
direction 0 is at step s and direction 1 at step T - 1 - s, in backward the other way round.

Sizes: as in `persistent`. Projections are a GEMM of their own between the launches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lstm_triton.kernels import tiles
from lstm_triton.kernels.blocks import (
    cast,
    dot,
    mask_tile,
    passes_of_tile,
    row_of_step,
    rows_of_step,
    steps_of_window,
)
from lstm_triton.kernels.launch import RUN_TIME, Launch, start
from lstm_triton.kernels.pointwise import run_backward, run_forward, zoned
from lstm_triton.recurrence import Gradients, Pass, Saved, Window


@triton.jit(do_not_specialize=RUN_TIME)
def forward_kernel(
    gates_ptr,  # (D, n, WH) in: input products; out, where SAVE: what the cell keeps
    y_ptr,  # (N, D * K) out, unless HAS_HR
    c_ptr,  # (D, n, H) out, where SAVE
    h_ptr,  # (D, B, K) the state before this step
    h_out_ptr,  # (D, B, K) out: the state after it; where HAS_HR (D, B, H): o * tanh(c)
    c_state_ptr,  # (D, B, H) in and out
    w_hh_ptr,  # (D, RH, K)
    b_hh_ptr,  # (D, len(BIASED) * H) where BIAS
    parameters_ptr,  # (D, P, H)
    offsets_ptr,  # (T + 1 + B) where RAGGED, as in `persistent`
    mask_ptr,  # see mask_tile
    zoneout_ptr,  # one int64, the seed, where ZONEOUT is "drawn"
    s, T, first, last, B, n, mask_steps, threshold, scale, stream, threshold_h, p_h, threshold_c, p_c,
    D: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    SUMS: tl.constexpr, INPUTS: tl.constexpr, RECURRENT: tl.constexpr, BIASED: tl.constexpr, RUNS: tl.constexpr,
    SAVED: tl.constexpr, WIDTH: tl.constexpr, PARAMETERS: tl.constexpr, WHOLE_ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_HR: tl.constexpr, RAGGED: tl.constexpr, DROPOUT: tl.constexpr, PER_STEP: tl.constexpr,
    ZONEOUT: tl.constexpr, BIAS: tl.constexpr,
    SAVE: tl.constexpr, PRECISION: tl.constexpr, CELL: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(2)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    units = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    t = s if d == 0 else T - 1 - s
    low, high = steps_of_window(d, T, first, last)
    plane = d.to(tl.int64) * n - row_of_step(offsets_ptr, low, B, RAGGED)
    at, live = rows_of_step(offsets_ptr, t, low, high, B, rows, RAGGED)
    in_batch = (rows < B)[:, None] & (units < H)[None, :]
    cell_mask = live[:, None] & (units < H)[None, :]
    kept = c_state_ptr.dtype.element_ty
    g_at = gates_ptr + ((plane + at) * WIDTH * H)[:, None] + units[None, :]
    biases = tiles.biases(
        b_hh_ptr, b_hh_ptr + d * len(BIASED) * H, units, H, BLOCK_H, SUMS, INPUTS, BIASED, BIAS, False, kept
    )
    sums = tiles.begin(g_at, H, cell_mask, biases, INPUTS, BLOCK_B, BLOCK_H, kept)
    inner = K
    if RAGGED:  # a tile whose rows have ended, or not begun, has no product
        begin, end = passes_of_tile(offsets_ptr, d, T, s, s + 1, tl.program_id(0) * BLOCK_B, RAGGED)
        inner = tl.where(begin < end, K, 0)
    for k in range(0, inner, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        h_at = h_ptr + ((d * B + rows) * K)[:, None] + ks[None, :]
        h = tl.load(h_at, mask=live[:, None] & (ks < K)[None, :], other=0.0)
        if DROPOUT != "none":
            m = mask_tile(
                mask_ptr, d, t, mask_steps, B, rows, k, ks, live, threshold, scale, stream,
                K, DROPOUT, PER_STEP, BLOCK_B, BLOCK_K,
            )  # fmt: skip
            h = cast(h.to(kept) * m, h.dtype)
        w_at = w_hh_ptr + d * len(RECURRENT) * H * K + units[None, :] * K + ks[:, None]
        w = tiles.load(w_at, H * K, (ks < K)[:, None] & (units < H)[None, :], len(RECURRENT))
        sums = tiles.add_products(h, w, sums, RECURRENT, PRECISION)
    state_at = ((d * B + rows) * H)[:, None] + units[None, :]
    c_prev = tl.load(c_state_ptr + state_at, mask=cell_mask, other=0.0)
    unit_mask = (units < H)[None, :]
    parameters = tiles.load_as(parameters_ptr + d * PARAMETERS * H + units[None, :], H, unit_mask, PARAMETERS, kept)
    saved, c, q = run_forward(CELL, sums, c_prev, parameters, unit_mask, H, WHOLE_ROWS)
    if ZONEOUT != "none":
        saved += (c,)
        of_h, of_c = zoned(
            zoneout_ptr, d, t, rows, tl.program_id(1) * BLOCK_H, stream, threshold_h, p_h, threshold_c, p_c,
            BLOCK_B, BLOCK_H, ZONEOUT,
        )  # fmt: skip
        c += of_c * (c_prev - c)
        q += of_h * (tl.load(h_ptr + state_at, mask=cell_mask, other=0.0).to(kept) - q)
    tl.store(c_state_ptr + state_at, c, mask=cell_mask)
    if SAVE:
        tiles.store(g_at, H, saved, cell_mask)
        tl.store(c_ptr + ((plane + at) * H)[:, None] + units[None, :], c, mask=cell_mask)
    q = cast(q, h_out_ptr.dtype.element_ty)
    if not HAS_HR:
        tl.store(y_ptr + (at * D * K + d * K)[:, None] + units[None, :], q, mask=cell_mask)
        if RAGGED:  # rows without this step keep their state
            q = tl.where(live[:, None], q, tl.load(h_ptr + state_at, mask=in_batch, other=0.0))
    tl.store(h_out_ptr + state_at, q, mask=in_batch)


def forward(
    launch: Launch,
    window: Window,
    gates: Tensor,
    cells: Tensor | None,
    output: Tensor,
    hx: Tensor,
    cx: Tensor,
    save: bool,
) -> Pass:
    """Runs the recurrence over a window; arguments as of `lstm_triton.launching.Kernels.forward`."""
    projected = launch.projected
    result = launch.room(window, gates, cells, hx, cx, save)
    # The states go to and fro between two tensors each.
    h, c = hx.clone(), result.cn.copy_(cx)
    h_out = torch.empty_like(cx, dtype=hx.dtype) if projected else result.hn
    weight_hr = launch.w_hr.view(launch.D, launch.K, launch.H) if projected else launch.w_hr
    for s in range(window.first, window.last):
        start(
            forward_kernel, _grid(launch, launch.H), [
                gates, output, result.c, h, h_out, c, launch.w_hh, launch.b_hh, launch.parameters,
                launch.offsets, launch.mask, launch.zoneout, s, *launch.numbers(window),
            ], launch.constants, SAVE=save, CELL=launch.cell.forward,
        )  # fmt: skip
        if projected:
            for d, rows, at in _slices(launch, s):
                h[d, :rows] = h_out[d, :rows] @ weight_hr[d].t()
                output[at, d * launch.K : (d + 1) * launch.K] = h[d, :rows]
        else:
            h, h_out = h_out, h
    return result._replace(hn=h)


@triton.jit(do_not_specialize=RUN_TIME)
def backward_kernel(
    dy_ptr,  # (N, D * K)
    gates_ptr,  # (D, n, WH) what the cell kept
    c_ptr,  # (D, n, H)
    cx_ptr,  # (D, B, H) before the window
    dgates_ptr,  # (D, n, GH) out; in: that of the launch before
    dh_state_ptr,  # (D, B, K) in and out: the gradient of the state after this step; of what stays under zoneout
    dc_state_ptr,  # (D, B, H) in and out
    dh_ptr,  # (D, n, K) out, stage "state" with projections
    dq_ptr,  # (D, B, H) in, stage "cell"
    w_hh_ptr,  # (D, RH, K)
    parameters_ptr,  # (D, P, H)
    dparameters_ptr,  # (tiles of the batch, D, P, H) in and out
    offsets_ptr,  # (T + 1 + B) where RAGGED, as in `persistent`
    mask_ptr,  # see mask_tile
    zoneout_ptr,  # as in forward
    s, T, first, last, B, n, mask_steps, threshold, scale, stream, threshold_h, p_h, threshold_c, p_c,
    D: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    SUMS: tl.constexpr, INPUTS: tl.constexpr, RECURRENT: tl.constexpr, BIASED: tl.constexpr, RUNS: tl.constexpr,
    SAVED: tl.constexpr, WIDTH: tl.constexpr, PARAMETERS: tl.constexpr, WHOLE_ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_HR: tl.constexpr, RAGGED: tl.constexpr, DROPOUT: tl.constexpr, PER_STEP: tl.constexpr,
    ZONEOUT: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, CELL: tl.constexpr, STAGE: tl.constexpr,
):  # fmt: skip
    # STAGE "state": takes the gradient of h one step back, through the launch before. "cell": the
    # pointwise backward. "both": one after the other, where h needs no projection between them.
    d = tl.program_id(2)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    units = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    low, high = steps_of_window(d, T, first, last)
    plane = d.to(tl.int64) * n - row_of_step(offsets_ptr, low, B, RAGGED)
    kept = c_ptr.dtype.element_ty
    t = s if d == 0 else T - 1 - s
    toward = -1 if d == 0 else 1  # to the step whose state this one took
    if STAGE != "cell":
        unit_mask = (units < K)[None, :]
        state_at = ((d * B + rows) * K)[:, None] + units[None, :]
        state_mask = (rows < B)[:, None] & unit_mask
        dh = tl.load(dh_state_ptr + state_at, mask=state_mask, other=0.0)
        if s < last - 1:
            done = t - toward  # the step of the launch before
            at, live = rows_of_step(offsets_ptr, done, low, high, B, rows, RAGGED)
            acc = tl.zeros((BLOCK_B, BLOCK_H), kept)
            inner = H
            if RAGGED:  # as in forward
                begin, end = passes_of_tile(offsets_ptr, d, T, s + 1, s + 2, tl.program_id(0) * BLOCK_B, RAGGED)
                inner = tl.where(begin < end, inner, 0)
            for j in tl.static_range(len(RUNS)):  # sums that lie side by side, as their weights do
                for k in range(0, RUNS[j][2] * inner, BLOCK_K):
                    ks = k + tl.arange(0, BLOCK_K)
                    summed = ks < RUNS[j][2] * H
                    da_at = dgates_ptr + ((plane + at) * SUMS * H + RUNS[j][1] * H)[:, None] + ks[None, :]
                    da = tl.load(da_at, mask=live[:, None] & summed[None, :], other=0.0)
                    w_at = w_hh_ptr + (d * len(RECURRENT) + RUNS[j][0]) * H * K + ks[:, None] * K + units[None, :]
                    acc = dot(da, tl.load(w_at, mask=summed[:, None] & unit_mask, other=0.0), acc, PRECISION)
            if DROPOUT != "none":
                acc = acc * mask_tile(
                    mask_ptr, d, done, mask_steps, B, rows, tl.program_id(1) * BLOCK_H, units, live,
                    threshold, scale, stream, K, DROPOUT, PER_STEP, BLOCK_B, BLOCK_H,
                )  # fmt: skip
            if ZONEOUT != "none":
                acc += dh
            dh = tl.where(live[:, None], acc, dh)
            tl.store(dh_state_ptr + state_at, dh, mask=state_mask)
    if s >= first:
        at, live = rows_of_step(offsets_ptr, t, low, high, B, rows, RAGGED)
        if STAGE != "cell":
            dy_at = dy_ptr + (at * D * K + d * K)[:, None] + units[None, :]
            dq = dh + tl.load(dy_at, mask=live[:, None] & unit_mask, other=0.0).to(kept)
        else:
            dq_at = dq_ptr + ((d * B + rows) * H)[:, None] + units[None, :]
            dq = tl.load(dq_at, mask=live[:, None] & (units < H)[None, :], other=0.0).to(kept)
        if STAGE == "state":
            dh_at = dh_ptr + ((plane + at) * K)[:, None] + units[None, :]
            tl.store(dh_at, cast(dq, dh_ptr.dtype.element_ty), mask=live[:, None] & unit_mask)
        else:
            at_before, had = rows_of_step(offsets_ptr, t + toward, low, high, B, rows, RAGGED)
            had = had[:, None]
            cell_mask = live[:, None] & (units < H)[None, :]
            cell_at = ((d * B + rows) * H)[:, None] + units[None, :]
            c_prev = tl.load(cx_ptr + cell_at, mask=cell_mask, other=0.0)
            c_at = c_ptr + ((plane + at_before) * H)[:, None] + units[None, :]
            c_prev = tl.where(had, tl.load(c_at, mask=cell_mask & had, other=0.0), c_prev)
            g_at = gates_ptr + ((plane + at) * WIDTH * H)[:, None] + units[None, :]
            saved = tiles.load_as(g_at, H, cell_mask, SAVED, kept)
            dc = tl.load(dc_state_ptr + cell_at, mask=cell_mask, other=0.0)
            if ZONEOUT == "none":
                c = tl.load(c_ptr + ((plane + at) * H)[:, None] + units[None, :], mask=cell_mask, other=0.0)
            else:
                c = tl.load(g_at + SAVED * H, mask=cell_mask, other=0.0).to(kept)  # the cell's own
                of_h, of_c = zoned(
                    zoneout_ptr, d, t, rows, tl.program_id(1) * BLOCK_H, stream, threshold_h, p_h, threshold_c, p_c,
                    BLOCK_B, BLOCK_H, ZONEOUT,
                )  # fmt: skip
                tl.store(dh_state_ptr + cell_at, of_h * dq, mask=cell_mask)
                dc_stays = of_c * dc
                dq -= of_h * dq
                dc -= dc_stays
            hidden = (units < H)[None, :]
            at_vectors = parameters_ptr + d * PARAMETERS * H + units[None, :]
            parameters = tiles.load_as(at_vectors, H, hidden, PARAMETERS, kept)
            da, dc_prev, dparameters = run_backward(CELL, saved, c, c_prev, dq, dc, parameters, hidden, H, WHOLE_ROWS)
            if ZONEOUT != "none":
                dc_prev += dc_stays
            tiles.store(dgates_ptr + ((plane + at) * SUMS * H)[:, None] + units[None, :], H, da, cell_mask)
            tl.store(dc_state_ptr + cell_at, dc_prev, mask=cell_mask)
            at_vectors = dparameters_ptr + (tl.program_id(0) * D + d) * PARAMETERS * H + units
            dvectors = tiles.load(at_vectors, H, units < H, PARAMETERS)
            tiles.store(at_vectors, H, tiles.add_rows(dvectors, tiles.where(live, dparameters)), units < H)


def backward(
    launch: Launch,
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
    """The gradients of `forward`; arguments as of `lstm_triton.launching.Kernels.backward`."""
    found = launch.gradients(window, saved, dhn, dcn)
    found.dhx.copy_(dhn)
    found.dcx.copy_(dcn)
    vectors = found.dparameters
    if vectors is not None:
        vectors.zero_()
    projected = launch.projected
    dq = torch.empty_like(cx, dtype=hx.dtype) if projected else cx
    weight_hr = launch.w_hr.view(launch.D, launch.K, launch.H) if projected else launch.w_hr

    def run(s: int, stage: str, size: int) -> None:
        start(
            backward_kernel, _grid(launch, size), [
                doutput, saved.gates, saved.c, cx, found.dgates, found.dhx, found.dcx,
                dq if found.dh is None else found.dh, dq,
                launch.w_hh, launch.parameters, cx if vectors is None else vectors,
                launch.offsets, launch.mask, launch.zoneout, s, *launch.numbers(window),
            ], launch.constants, CELL=launch.cell.backward, STAGE=stage,
        )  # fmt: skip

    for s in range(window.last - 1, window.first - 1, -1):
        if projected:
            run(s, "state", launch.K)
            for d, rows, at in _slices(launch, s):
                at = slice(at.start - window.rows(d).start, at.stop - window.rows(d).start)
                assert found.dh is not None
                dq[d, :rows] = found.dh[d, at] @ weight_hr[d]
            run(s, "cell", launch.H)
        else:
            run(s, "both", launch.H)
    run(window.first - 1, "state", launch.K)
    return found if vectors is None else found._replace(dparameters=vectors.sum(0))


def _grid(launch: Launch, units: int) -> tuple[int, int, int]:
    return launch.grid[0], -(-units // launch.plan.block_h), launch.D


def _slices(launch: Launch, s: int) -> list[tuple[int, int, slice]]:
    """Direction, number of rows and place among the N of what forward's launch s works on."""
    times = [s, launch.T - 1 - s][: launch.D]
    starts, rows = launch.layout.starts, launch.layout.rows
    return [(d, rows[t], slice(starts[t], starts[t] + rows[t])) for d, t in enumerate(times)]
