"""`persistent`: one launch a sequence; a program owns a tile of the batch and all hidden units.

Its weights are loaded once and the states stay in registers, so that no program waits for another.
For hidden sizes whose recurrent weights one SM holds. Both directions run in the same launch.

Sizes: T steps, B batch, D directions, N rows of all steps, n of the window that is run
(`lstm_triton.recurrence`), H hidden units, K the size of h (that of the projection where HAS_HR,
else H).
"""

import triton
import triton.language as tl
from torch import Tensor

from lstm_triton.kernels.blocks import (
    cast,
    dot,
    mask_tile,
    passes_of_tile,
    row_of_step,
    rows_of_step,
    steps_of_window,
)
from lstm_triton.kernels.cells import lstm_backward, lstm_forward
from lstm_triton.kernels.launch import RUN_TIME, Launch, start
from lstm_triton.recurrence import Gradients, LayerGradients, Pass, Saved, Window


@triton.jit
def biases(
    b_ih_ptr, b_hh_ptr, hs, H: tl.constexpr, BLOCK_H: tl.constexpr, dtype: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """The sums of both biases of the four gates; zeros without."""
    b_i = tl.zeros((BLOCK_H,), dtype)
    b_f, b_g, b_o = b_i, b_i, b_i
    if BIAS:
        live = hs < H
        b_i = tl.load(b_ih_ptr + hs, mask=live, other=0.0).to(dtype) + tl.load(b_hh_ptr + hs, mask=live, other=0.0)
        at = hs + H
        b_f = tl.load(b_ih_ptr + at, mask=live, other=0.0).to(dtype) + tl.load(b_hh_ptr + at, mask=live, other=0.0)
        at = hs + 2 * H
        b_g = tl.load(b_ih_ptr + at, mask=live, other=0.0).to(dtype) + tl.load(b_hh_ptr + at, mask=live, other=0.0)
        at = hs + 3 * H
        b_o = tl.load(b_ih_ptr + at, mask=live, other=0.0).to(dtype) + tl.load(b_hh_ptr + at, mask=live, other=0.0)
    return b_i, b_f, b_g, b_o


@triton.jit(do_not_specialize=RUN_TIME)
def forward_kernel(
    gates_ptr,  # (D, n, 4H) in, unless FUSED: input products; out, where SAVE: activated gates
    x_ptr,  # (N, I) where FUSED
    y_ptr,  # (N, D * K)
    c_ptr,  # (D, n, H) where SAVE
    hx_ptr,  # (D, B, K) before the window
    cx_ptr,  # (D, B, H)
    hn_ptr,  # (D, B, K) after it
    cn_ptr,  # (D, B, H)
    w_hh_ptr,  # (D, 4H, K)
    w_hr_ptr,  # (D, K, H) where HAS_HR
    w_ih_ptr,  # (D, 4H, I) where FUSED
    b_ih_ptr,  # (D, 4H) where FUSED and BIAS
    b_hh_ptr,  # (D, 4H) where FUSED and BIAS
    offsets_ptr,  # (T + 1 + B) where RAGGED: the steps' first rows, the batch rows' lengths
    mask_ptr,  # see mask_tile
    T, first, last, B, n, mask_steps, threshold, scale, stream,
    D: tl.constexpr, H: tl.constexpr, K: tl.constexpr, I: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_I: tl.constexpr,
    HAS_HR: tl.constexpr, RAGGED: tl.constexpr, DROPOUT: tl.constexpr, PER_STEP: tl.constexpr,
    FUSED: tl.constexpr, BIAS: tl.constexpr,
    SAVE: tl.constexpr, PRECISION: tl.constexpr, CELL: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    hs = tl.arange(0, BLOCK_H)
    ks = tl.arange(0, BLOCK_K)
    in_batch = rows < B
    weight_mask = (ks < K)[:, None] & (hs < H)[None, :]
    w_at = w_hh_ptr + d * 4 * H * K + hs[None, :] * K + ks[:, None]  # (K, H): transposed on the way in
    w_i = tl.load(w_at, mask=weight_mask, other=0.0)
    w_f = tl.load(w_at + H * K, mask=weight_mask, other=0.0)
    w_g = tl.load(w_at + 2 * H * K, mask=weight_mask, other=0.0)
    w_o = tl.load(w_at + 3 * H * K, mask=weight_mask, other=0.0)
    if HAS_HR:
        hr_mask = (hs < H)[:, None] & (ks < K)[None, :]
        w_r = tl.load(w_hr_ptr + d * K * H + ks[None, :] * H + hs[:, None], mask=hr_mask, other=0.0)
    if FUSED:
        xs = tl.arange(0, BLOCK_I)
        u_mask = (xs < I)[:, None] & (hs < H)[None, :]
        u_at = w_ih_ptr + d * 4 * H * I + hs[None, :] * I + xs[:, None]  # (I, H)
        u_i = tl.load(u_at, mask=u_mask, other=0.0)
        u_f = tl.load(u_at + H * I, mask=u_mask, other=0.0)
        u_g = tl.load(u_at + 2 * H * I, mask=u_mask, other=0.0)
        u_o = tl.load(u_at + 3 * H * I, mask=u_mask, other=0.0)
        b_i, b_f, b_g, b_o = biases(
            b_ih_ptr + d * 4 * H, b_hh_ptr + d * 4 * H, hs, H, BLOCK_H, c_ptr.dtype.element_ty, BIAS
        )
    state_h = ((d * B + rows) * K)[:, None] + ks[None, :]
    state_c = ((d * B + rows) * H)[:, None] + hs[None, :]
    mask_h = in_batch[:, None] & (ks < K)[None, :]
    mask_c = in_batch[:, None] & (hs < H)[None, :]
    h = tl.load(hx_ptr + state_h, mask=mask_h, other=0.0)
    c = tl.load(cx_ptr + state_c, mask=mask_c, other=0.0)
    low, high = steps_of_window(d, T, first, last)
    plane = d.to(tl.int64) * n - row_of_step(offsets_ptr, low, B, RAGGED)
    begin, end = passes_of_tile(offsets_ptr, d, T, first, last, tl.program_id(0) * BLOCK_B, RAGGED)
    for s in range(begin, end):
        t = s if d == 0 else T - 1 - s
        at, live = rows_of_step(offsets_ptr, t, low, high, B, rows, RAGGED)
        cell_mask = live[:, None] & (hs < H)[None, :]
        g_at = gates_ptr + ((plane + at) * 4 * H)[:, None] + hs[None, :]
        if FUSED:
            x = tl.load(x_ptr + (at * I)[:, None] + xs[None, :], mask=live[:, None] & (xs < I)[None, :], other=0.0)
            a_i = dot(x, u_i, tl.broadcast_to(b_i[None, :], (BLOCK_B, BLOCK_H)), PRECISION)
            a_f = dot(x, u_f, tl.broadcast_to(b_f[None, :], (BLOCK_B, BLOCK_H)), PRECISION)
            a_g = dot(x, u_g, tl.broadcast_to(b_g[None, :], (BLOCK_B, BLOCK_H)), PRECISION)
            a_o = dot(x, u_o, tl.broadcast_to(b_o[None, :], (BLOCK_B, BLOCK_H)), PRECISION)
        else:
            a_i = tl.load(g_at, mask=cell_mask, other=0.0).to(c.dtype)
            a_f = tl.load(g_at + H, mask=cell_mask, other=0.0).to(c.dtype)
            a_g = tl.load(g_at + 2 * H, mask=cell_mask, other=0.0).to(c.dtype)
            a_o = tl.load(g_at + 3 * H, mask=cell_mask, other=0.0).to(c.dtype)
        h_in = h
        if DROPOUT != "none":
            m = mask_tile(
                mask_ptr, d, t, mask_steps, B, rows, 0, ks, live, threshold, scale, stream,
                K, DROPOUT, PER_STEP, BLOCK_B, BLOCK_K,
            )  # fmt: skip
            h_in = cast(h.to(c.dtype) * m, h.dtype)
        a_i = dot(h_in, w_i, a_i, PRECISION)
        a_f = dot(h_in, w_f, a_f, PRECISION)
        a_g = dot(h_in, w_g, a_g, PRECISION)
        a_o = dot(h_in, w_o, a_o, PRECISION)
        i, f, g, o, c_new, q = CELL(a_i, a_f, a_g, a_o, c)
        if HAS_HR:
            q = dot(cast(q, h.dtype), w_r, tl.zeros((BLOCK_B, BLOCK_K), c.dtype), PRECISION)
        if SAVE:
            gate = gates_ptr.dtype.element_ty
            tl.store(g_at, cast(i, gate), mask=cell_mask)
            tl.store(g_at + H, cast(f, gate), mask=cell_mask)
            tl.store(g_at + 2 * H, cast(g, gate), mask=cell_mask)
            tl.store(g_at + 3 * H, cast(o, gate), mask=cell_mask)
            tl.store(c_ptr + ((plane + at) * H)[:, None] + hs[None, :], c_new, mask=cell_mask)
        y_at = y_ptr + (at * D * K + d * K)[:, None] + ks[None, :]
        tl.store(y_at, cast(q, h.dtype), mask=live[:, None] & (ks < K)[None, :])
        h = tl.where(live[:, None], cast(q, h.dtype), h)
        c = tl.where(live[:, None], c_new, c)
    tl.store(hn_ptr + state_h, h, mask=mask_h)
    tl.store(cn_ptr + state_c, c, mask=mask_c)


def forward(
    launch: Launch,
    window: Window,
    gates: Tensor | None,
    cells: Tensor | None,
    output: Tensor,
    hx: Tensor,
    cx: Tensor,
    save: bool,
) -> Pass:
    """Runs the recurrence over a window; arguments as of `lstm_triton.launching.Kernels.forward`."""
    result = launch.room(window, gates, cells, hx, cx, save)
    start(
        forward_kernel, launch.grid, [
            result.gates, launch.x, output, result.c, hx, cx, result.hn, result.cn,
            launch.w_hh, launch.w_hr, launch.w_ih, launch.b_ih, launch.b_hh, launch.offsets, launch.mask,
            *launch.numbers(window),
        ], launch.constants, SAVE=save, CELL=lstm_forward,
    )  # fmt: skip
    return result


@triton.jit(do_not_specialize=RUN_TIME)
def backward_kernel(
    dy_ptr,  # (N, D * K)
    dhn_ptr,  # (D, B, K)
    dcn_ptr,  # (D, B, H)
    gates_ptr,  # (D, n, 4H) activated
    c_ptr,  # (D, n, H)
    y_ptr,  # (N, D * K)
    hx_ptr,  # (D, B, K) before the window
    cx_ptr,  # (D, B, H)
    dgates_ptr,  # (D, n, 4H) out, unless FUSED
    dh_ptr,  # (D, n, K) out, where HAS_HR
    dhx_ptr,  # (D, B, K) out
    dcx_ptr,  # (D, B, H) out
    w_hh_ptr,  # (D, 4H, K)
    w_hr_ptr,  # (D, K, H) where HAS_HR
    x_ptr,  # (N, I) where FUSED
    w_ih_ptr,  # (D, 4H, I) where FUSED
    dx_ptr,  # (D, n, I) out, where FUSED and DX
    dw_ih_ptr,  # (P, D, 4H, I) out, where FUSED and DW, as the two below; P tiles of the batch
    dw_hh_ptr,  # (P, D, 4H, K)
    db_ih_ptr,  # (P, D, 4H)
    db_hh_ptr,  # (P, D, 4H) the same: PyTorch has two biases
    offsets_ptr,  # (T + 1 + B) where RAGGED: the steps' first rows, the batch rows' lengths
    mask_ptr,  # see mask_tile
    T, first, last, B, n, mask_steps, threshold, scale, stream,
    D: tl.constexpr, H: tl.constexpr, K: tl.constexpr, I: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_I: tl.constexpr,
    HAS_HR: tl.constexpr, RAGGED: tl.constexpr, DROPOUT: tl.constexpr, PER_STEP: tl.constexpr,
    FUSED: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, CELL: tl.constexpr, DX: tl.constexpr, DW: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    hs = tl.arange(0, BLOCK_H)
    ks = tl.arange(0, BLOCK_K)
    in_batch = rows < B
    weight_mask = (hs < H)[:, None] & (ks < K)[None, :]
    w_at = w_hh_ptr + d * 4 * H * K + hs[:, None] * K + ks[None, :]  # (H, K)
    w_i = tl.load(w_at, mask=weight_mask, other=0.0)
    w_f = tl.load(w_at + H * K, mask=weight_mask, other=0.0)
    w_g = tl.load(w_at + 2 * H * K, mask=weight_mask, other=0.0)
    w_o = tl.load(w_at + 3 * H * K, mask=weight_mask, other=0.0)
    if HAS_HR:
        hr_mask = (ks < K)[:, None] & (hs < H)[None, :]
        w_r = tl.load(w_hr_ptr + d * K * H + ks[:, None] * H + hs[None, :], mask=hr_mask, other=0.0)
    state_h = ((d * B + rows) * K)[:, None] + ks[None, :]
    state_c = ((d * B + rows) * H)[:, None] + hs[None, :]
    mask_h = in_batch[:, None] & (ks < K)[None, :]
    mask_c = in_batch[:, None] & (hs < H)[None, :]
    kept = c_ptr.dtype.element_ty
    operand = dgates_ptr.dtype.element_ty
    dh = tl.load(dhn_ptr + state_h, mask=mask_h, other=0.0)
    dc = tl.load(dcn_ptr + state_c, mask=mask_c, other=0.0)
    cx = tl.load(cx_ptr + state_c, mask=mask_c, other=0.0)
    low, high = steps_of_window(d, T, first, last)
    plane = d.to(tl.int64) * n - row_of_step(offsets_ptr, low, B, RAGGED)
    if FUSED:
        xs = tl.arange(0, BLOCK_I)
        u_mask = (hs < H)[:, None] & (xs < I)[None, :]
        if DX:
            u_at = w_ih_ptr + d * 4 * H * I + hs[:, None] * I + xs[None, :]  # (H, I)
            u_i = tl.load(u_at, mask=u_mask, other=0.0)
            u_f = tl.load(u_at + H * I, mask=u_mask, other=0.0)
            u_g = tl.load(u_at + 2 * H * I, mask=u_mask, other=0.0)
            u_o = tl.load(u_at + 3 * H * I, mask=u_mask, other=0.0)
        if DW:
            hx = tl.load(hx_ptr + state_h, mask=mask_h, other=0.0)
            du_i = tl.zeros((BLOCK_H, BLOCK_I), kept)
            du_f, du_g, du_o = du_i, du_i, du_i
            dw_i = tl.zeros((BLOCK_H, BLOCK_K), kept)
            dw_f, dw_g, dw_o = dw_i, dw_i, dw_i
            db_i = tl.zeros((BLOCK_H,), kept)
            db_f, db_g, db_o = db_i, db_i, db_i
    begin, end = passes_of_tile(offsets_ptr, d, T, first, last, tl.program_id(0) * BLOCK_B, RAGGED)
    for back in range(begin, end):
        s = begin + end - 1 - back
        t = s if d == 0 else T - 1 - s
        before = t - 1 if d == 0 else t + 1  # the step whose state this one took
        at, live = rows_of_step(offsets_ptr, t, low, high, B, rows, RAGGED)
        at_before, had = rows_of_step(offsets_ptr, before, low, high, B, rows, RAGGED)
        cell_mask = live[:, None] & (hs < H)[None, :]
        h_mask = live[:, None] & (ks < K)[None, :]

        had = had[:, None]
        c_at = c_ptr + ((plane + at_before) * H)[:, None] + hs[None, :]
        c_prev = tl.where(had, tl.load(c_at, mask=cell_mask & had, other=0.0), cx)
        if DROPOUT != "none":
            m = mask_tile(
                mask_ptr, d, t, mask_steps, B, rows, 0, ks, live, threshold, scale, stream,
                K, DROPOUT, PER_STEP, BLOCK_B, BLOCK_K,
            )  # fmt: skip

        dh_t = dh + tl.load(dy_ptr + (at * D * K + d * K)[:, None] + ks[None, :], mask=h_mask, other=0.0).to(kept)
        if HAS_HR:
            tl.store(dh_ptr + ((plane + at) * K)[:, None] + ks[None, :], cast(dh_t, operand), mask=h_mask)
            dq = dot(cast(dh_t, operand), w_r, tl.zeros((BLOCK_B, BLOCK_H), kept), PRECISION)
        else:
            dq = dh_t
        g_at = ((plane + at) * 4 * H)[:, None] + hs[None, :]
        i = tl.load(gates_ptr + g_at, mask=cell_mask, other=0.0).to(kept)
        f = tl.load(gates_ptr + g_at + H, mask=cell_mask, other=0.0).to(kept)
        g = tl.load(gates_ptr + g_at + 2 * H, mask=cell_mask, other=0.0).to(kept)
        o = tl.load(gates_ptr + g_at + 3 * H, mask=cell_mask, other=0.0).to(kept)
        c = tl.load(c_ptr + ((plane + at) * H)[:, None] + hs[None, :], mask=cell_mask, other=0.0)
        da_i, da_f, da_g, da_o, dc_prev = CELL(i, f, g, o, c, c_prev, dq, dc)
        da_i = cast(da_i, operand)
        da_f = cast(da_f, operand)
        da_g = cast(da_g, operand)
        da_o = cast(da_o, operand)
        if FUSED:
            x_mask = live[:, None] & (xs < I)[None, :]
            if DW:
                y_at = y_ptr + (at_before * D * K + d * K)[:, None] + ks[None, :]
                h_prev = tl.where(had, tl.load(y_at, mask=h_mask & had, other=0.0), hx)
                if DROPOUT != "none":
                    h_prev = cast(h_prev.to(kept) * m, h_prev.dtype)
                x = tl.load(x_ptr + (at * I)[:, None] + xs[None, :], mask=x_mask, other=0.0)
                du_i = dot(tl.trans(da_i), x, du_i, PRECISION)
                du_f = dot(tl.trans(da_f), x, du_f, PRECISION)
                du_g = dot(tl.trans(da_g), x, du_g, PRECISION)
                du_o = dot(tl.trans(da_o), x, du_o, PRECISION)
                dw_i = dot(tl.trans(da_i), h_prev, dw_i, PRECISION)
                dw_f = dot(tl.trans(da_f), h_prev, dw_f, PRECISION)
                dw_g = dot(tl.trans(da_g), h_prev, dw_g, PRECISION)
                dw_o = dot(tl.trans(da_o), h_prev, dw_o, PRECISION)
                db_i += tl.sum(da_i.to(kept), 0)
                db_f += tl.sum(da_f.to(kept), 0)
                db_g += tl.sum(da_g.to(kept), 0)
                db_o += tl.sum(da_o.to(kept), 0)
            if DX:
                dx = dot(da_i, u_i, tl.zeros((BLOCK_B, BLOCK_I), kept), PRECISION)
                dx = dot(da_f, u_f, dx, PRECISION)
                dx = dot(da_g, u_g, dx, PRECISION)
                dx = dot(da_o, u_o, dx, PRECISION)
                tl.store(dx_ptr + ((plane + at) * I)[:, None] + xs[None, :], cast(dx, operand), mask=x_mask)
        else:
            tl.store(dgates_ptr + g_at, da_i, mask=cell_mask)
            tl.store(dgates_ptr + g_at + H, da_f, mask=cell_mask)
            tl.store(dgates_ptr + g_at + 2 * H, da_g, mask=cell_mask)
            tl.store(dgates_ptr + g_at + 3 * H, da_o, mask=cell_mask)
        dh_prev = dot(da_i, w_i, tl.zeros((BLOCK_B, BLOCK_K), kept), PRECISION)
        dh_prev = dot(da_f, w_f, dh_prev, PRECISION)
        dh_prev = dot(da_g, w_g, dh_prev, PRECISION)
        dh_prev = dot(da_o, w_o, dh_prev, PRECISION)
        if DROPOUT != "none":
            dh_prev = dh_prev * m
        dh = tl.where(live[:, None], dh_prev, dh)
        dc = tl.where(live[:, None], dc_prev, dc)
    tl.store(dhx_ptr + state_h, dh, mask=mask_h)
    tl.store(dcx_ptr + state_c, dc, mask=mask_c)
    if FUSED and DW:
        tile = (tl.program_id(0) * tl.num_programs(1) + d) * 4 * H
        du_at = dw_ih_ptr + (tile + hs)[:, None] * I + xs[None, :]
        tl.store(du_at, du_i, mask=u_mask)
        tl.store(du_at + H * I, du_f, mask=u_mask)
        tl.store(du_at + 2 * H * I, du_g, mask=u_mask)
        tl.store(du_at + 3 * H * I, du_o, mask=u_mask)
        dw_at = dw_hh_ptr + (tile + hs)[:, None] * K + ks[None, :]
        tl.store(dw_at, dw_i, mask=weight_mask)
        tl.store(dw_at + H * K, dw_f, mask=weight_mask)
        tl.store(dw_at + 2 * H * K, dw_g, mask=weight_mask)
        tl.store(dw_at + 3 * H * K, dw_o, mask=weight_mask)
        b_mask = hs < H
        b_at = tile + hs
        tl.store(db_ih_ptr + b_at, db_i, mask=b_mask)
        tl.store(db_ih_ptr + b_at + H, db_f, mask=b_mask)
        tl.store(db_ih_ptr + b_at + 2 * H, db_g, mask=b_mask)
        tl.store(db_ih_ptr + b_at + 3 * H, db_o, mask=b_mask)
        tl.store(db_hh_ptr + b_at, db_i, mask=b_mask)
        tl.store(db_hh_ptr + b_at + H, db_f, mask=b_mask)
        tl.store(db_hh_ptr + b_at + 2 * H, db_g, mask=b_mask)
        tl.store(db_hh_ptr + b_at + 3 * H, db_o, mask=b_mask)


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
    input_wanted: bool,
    weights_wanted: bool,
) -> Gradients | LayerGradients:
    """The gradients of `forward`; where the plan is fused, those of the whole layer in this window.

    Arguments as of `lstm_triton.launching.Kernels.backward`; input_wanted, weights_wanted: whether the gradients
    of the input and those of the weights are, where the plan is fused.
    """
    found = launch.gradients(window, saved, dhn, dcn)
    D, G, I, K = launch.D, 4 * launch.H, launch.I, launch.K
    fused, single = launch.plan.fused, True
    dx, dw = hx, [hx] * 4
    if fused:
        # Each tile of the batch adds up its own; where there is but one, these are the gradients themselves.
        tiles = launch.grid[0]
        single = tiles == D == 1
        size = window.size(D)
        dx = hx.new_empty(((D, size, I) if D > 1 else (size, I)) if input_wanted else (0,))
        shapes = ((G, I), (G, K), (G,), (G,)) if weights_wanted else ((0,), (0,), (0,), (0,))
        dw = [hx.new_empty(shape if single else (tiles, D, *shape)) for shape in shapes]
    start(
        backward_kernel, launch.grid, [
            doutput, dhn, dcn, saved.gates, saved.c, output, hx, cx,
            found.dgates, hx if found.dh is None else found.dh, found.dhx, found.dcx,
            launch.w_hh, launch.w_hr, launch.x, launch.w_ih, dx, *dw, launch.offsets, launch.mask,
            *launch.numbers(window),
        ], launch.constants, CELL=lstm_backward, DX=fused and input_wanted, DW=fused and weights_wanted,
    )  # fmt: skip
    if not fused:
        return found
    each = dw if launch.bias else dw[:2]
    if not single:
        each = [x[:, d].sum(0) for d in range(D) for x in each]
    pieces = [] if not input_wanted else [dx] if D == 1 else list(dx)
    return LayerGradients(found.dhx, found.dcx, pieces, each)
