"""`persistent`: one launch a sequence; a program owns all hidden units of a tile of the batch.

The recurrent weights are loaded once and stay on chip: for layers whose W_hh fits there. Where the
plan is fused, so do the other weights: the products with the input and, in backward, the gradients
of the input and of the weights are part of the kernel, and nothing as wide as the gates leaves it.

Sizes: N rows in all steps together, D directions, T steps, B batch rows, H hidden units, K size of
h (with projections not H), I features of the input; G sums of the cell, W tiles of H that each row
has room for, P vectors of parameters. A launch passes the steps of a window (`steps_of_window`), of
which each direction has at most n rows.
"""

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
from lstm_triton.kernels.units import normalized, through_norm
from lstm_triton.recurrence import Gradients, LayerGradients, Pass, Saved, Window, parameter_gradients


@triton.jit(do_not_specialize=RUN_TIME)
def forward_kernel(
    gates_ptr,  # (D, n, WH) in, unless FUSED: input products; out, where SAVE: what the cell keeps
    x_ptr,  # (N, I) where FUSED
    y_ptr,  # (N, D * K)
    c_ptr,  # (D, n, H) where SAVE
    hx_ptr,  # (D, B, K) before the window
    cx_ptr,  # (D, B, H)
    hn_ptr,  # (D, B, K) after it
    cn_ptr,  # (D, B, H)
    w_hh_ptr,  # (D, RH, K), R = len(RECURRENT)
    w_hr_ptr,  # (D, K, H) where HAS_HR
    w_ih_ptr,  # (D, len(INPUTS) * H, I) where FUSED
    b_ih_ptr,  # (D, len(INPUTS) * H) where FUSED and BIAS
    b_hh_ptr,  # (D, len(BIASED) * H) where BIAS
    gain_ptr,  # (D, len(INPUTS) * H) where FUSED and INPUT_NORM
    parameters_ptr,  # (D, P, H)
    offsets_ptr,  # (T + 1 + B) where RAGGED: the steps' first rows, the batch rows' lengths
    mask_ptr,  # see mask_tile
    zoneout_ptr,  # one int64, the seed, where ZONEOUT is "drawn"
    T, first, last, B, n, mask_steps, threshold, scale, stream, threshold_h, p_h, threshold_c, p_c,
    D: tl.constexpr, H: tl.constexpr, K: tl.constexpr, I: tl.constexpr,
    SUMS: tl.constexpr, INPUTS: tl.constexpr, RECURRENT: tl.constexpr, BIASED: tl.constexpr,
    SAVED: tl.constexpr, WIDTH: tl.constexpr, PARAMETERS: tl.constexpr, WHOLE_ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_I: tl.constexpr,
    HAS_HR: tl.constexpr, RAGGED: tl.constexpr, DROPOUT: tl.constexpr, PER_STEP: tl.constexpr,
    ZONEOUT: tl.constexpr, FUSED: tl.constexpr, BIAS: tl.constexpr, INPUT_NORM: tl.constexpr,
    SAVE: tl.constexpr, PRECISION: tl.constexpr, CELL: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    hs = tl.arange(0, BLOCK_H)
    ks = tl.arange(0, BLOCK_K)
    in_batch = rows < B
    weight_mask = (ks < K)[:, None] & (hs < H)[None, :]
    w_at = w_hh_ptr + d * len(RECURRENT) * H * K + hs[None, :] * K + ks[:, None]  # (K, H): transposed on the way in
    w = tiles.load(w_at, H * K, weight_mask, len(RECURRENT))
    if HAS_HR:
        hr_mask = (hs < H)[:, None] & (ks < K)[None, :]
        w_r = tl.load(w_hr_ptr + d * K * H + ks[None, :] * H + hs[:, None], mask=hr_mask, other=0.0)
    if FUSED:
        xs = tl.arange(0, BLOCK_I)
        u_mask = (xs < I)[:, None] & (hs < H)[None, :]
        u = tiles.load(
            w_ih_ptr + d * len(INPUTS) * H * I + hs[None, :] * I + xs[:, None], H * I, u_mask, len(INPUTS)
        )  # (I, H)
    unit_mask = (hs < H)[None, :]
    kept = c_ptr.dtype.element_ty
    biases = tiles.biases(
        b_ih_ptr + d * len(INPUTS) * H, b_hh_ptr + d * len(BIASED) * H, hs, H, BLOCK_H,
        SUMS, INPUTS, BIASED, BIAS, FUSED, kept,
    )  # fmt: skip
    if FUSED and INPUT_NORM > 0:
        gains = tiles.load_as(gain_ptr + d * len(INPUTS) * H + hs[None, :], H, unit_mask, len(INPUTS), kept)
    at_vectors = parameters_ptr + d * PARAMETERS * H + hs[None, :]
    parameters = tiles.load_as(at_vectors, H, unit_mask, PARAMETERS, kept)
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
        g_at = gates_ptr + ((plane + at) * WIDTH * H)[:, None] + hs[None, :]
        if FUSED:
            x = tl.load(x_ptr + (at * I)[:, None] + xs[None, :], mask=live[:, None] & (xs < I)[None, :], other=0.0)
            sums = tiles.zeros(len(INPUTS), (BLOCK_B, BLOCK_H), kept)
            sums = tiles.add_products(x, u, sums, INPUTS, PRECISION)
            if INPUT_NORM > 0:
                sums, _ = normalized(sums, (unit_mask, H), INPUT_NORM)
                sums = tiles.times(sums, gains)
            sums = tiles.add_biases(sums, biases, BLOCK_B, BLOCK_H)
        else:
            sums = tiles.begin(g_at, H, cell_mask, biases, INPUTS, BLOCK_B, BLOCK_H, kept)
        h_in = h
        if DROPOUT != "none":
            m = mask_tile(
                mask_ptr, d, t, mask_steps, B, rows, 0, ks, live, threshold, scale, stream,
                K, DROPOUT, PER_STEP, BLOCK_B, BLOCK_K,
            )  # fmt: skip
            h_in = cast(h.to(c.dtype) * m, h.dtype)
        sums = tiles.add_products(h_in, w, sums, RECURRENT, PRECISION)
        saved, c_new, q = run_forward(CELL, sums, c, parameters, unit_mask, H, WHOLE_ROWS)
        if ZONEOUT != "none":
            saved += (c_new,)
            of_h, of_c = zoned(
                zoneout_ptr, d, t, rows, 0, stream, threshold_h, p_h, threshold_c, p_c, BLOCK_B, BLOCK_H, ZONEOUT
            )
            c_new += of_c * (c - c_new)
            q += of_h * (h.to(c.dtype) - q)
        if HAS_HR:
            q = dot(cast(q, h.dtype), w_r, tl.zeros((BLOCK_B, BLOCK_K), c.dtype), PRECISION)
        if SAVE:
            tiles.store(g_at, H, saved, cell_mask)
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
            launch.w_hh, launch.w_hr, launch.w_ih, launch.b_ih, launch.b_hh, launch.gain, launch.parameters,
            launch.offsets, launch.mask, launch.zoneout, *launch.numbers(window),
        ], launch.constants, SAVE=save, CELL=launch.cell.forward,
    )  # fmt: skip
    return result


@triton.jit(do_not_specialize=RUN_TIME)
def backward_kernel(
    dy_ptr,  # (N, D * K)
    dhn_ptr,  # (D, B, K)
    dcn_ptr,  # (D, B, H)
    gates_ptr,  # (D, n, WH) what the cell kept
    c_ptr,  # (D, n, H)
    y_ptr,  # (N, D * K)
    hx_ptr,  # (D, B, K) before the window
    cx_ptr,  # (D, B, H)
    dgates_ptr,  # (D, n, GH) out, unless FUSED
    dh_ptr,  # (D, n, K) out, where HAS_HR
    dhx_ptr,  # (D, B, K) out
    dcx_ptr,  # (D, B, H) out
    w_hh_ptr,  # (D, RH, K), R = len(RECURRENT)
    w_hr_ptr,  # (D, K, H) where HAS_HR
    parameters_ptr,  # (D, P, H)
    x_ptr,  # (N, I) where FUSED
    w_ih_ptr,  # (D, len(INPUTS) * H, I) where FUSED
    gain_ptr,  # (D, len(INPUTS) * H) where FUSED and INPUT_NORM
    dx_ptr,  # (D, n, I) out, where FUSED and DX
    dw_ih_ptr,  # (tiles of the batch, D, INPUTS * H, I) out, where FUSED and DW, as the two below
    dw_hh_ptr,  # (tiles, D, RH, K)
    db_ih_ptr,  # (tiles, D, INPUTS * H)
    db_hh_ptr,  # (tiles, D, len(BIASED) * H)
    dgain_ptr,  # (tiles, D, len(INPUTS) * H) where INPUT_NORM
    dparameters_ptr,  # (tiles, D, P, H) out
    offsets_ptr,  # (T + 1 + B) where RAGGED: the steps' first rows, the batch rows' lengths
    mask_ptr,  # see mask_tile
    zoneout_ptr,  # as in forward
    T, first, last, B, n, mask_steps, threshold, scale, stream, threshold_h, p_h, threshold_c, p_c,
    D: tl.constexpr, H: tl.constexpr, K: tl.constexpr, I: tl.constexpr,
    SUMS: tl.constexpr, INPUTS: tl.constexpr, RECURRENT: tl.constexpr, BIASED: tl.constexpr,
    SAVED: tl.constexpr, WIDTH: tl.constexpr, PARAMETERS: tl.constexpr, WHOLE_ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_I: tl.constexpr,
    HAS_HR: tl.constexpr, RAGGED: tl.constexpr, DROPOUT: tl.constexpr, PER_STEP: tl.constexpr,
    ZONEOUT: tl.constexpr, FUSED: tl.constexpr, BIAS: tl.constexpr, INPUT_NORM: tl.constexpr,
    PRECISION: tl.constexpr, CELL: tl.constexpr, DX: tl.constexpr, DW: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    hs = tl.arange(0, BLOCK_H)
    ks = tl.arange(0, BLOCK_K)
    in_batch = rows < B
    weight_mask = (hs < H)[:, None] & (ks < K)[None, :]
    w_at = w_hh_ptr + d * len(RECURRENT) * H * K + hs[:, None] * K + ks[None, :]  # (H, K)
    w = tiles.load(w_at, H * K, weight_mask, len(RECURRENT))
    if HAS_HR:
        hr_mask = (ks < K)[:, None] & (hs < H)[None, :]
        w_r = tl.load(w_hr_ptr + d * K * H + ks[:, None] * H + hs[None, :], mask=hr_mask, other=0.0)
    state_h = ((d * B + rows) * K)[:, None] + ks[None, :]
    state_c = ((d * B + rows) * H)[:, None] + hs[None, :]
    mask_h = in_batch[:, None] & (ks < K)[None, :]
    mask_c = in_batch[:, None] & (hs < H)[None, :]
    kept = c_ptr.dtype.element_ty
    operand = dy_ptr.dtype.element_ty
    dh = tl.load(dhn_ptr + state_h, mask=mask_h, other=0.0)
    dc = tl.load(dcn_ptr + state_c, mask=mask_c, other=0.0)
    cx = tl.load(cx_ptr + state_c, mask=mask_c, other=0.0)
    at_vectors = parameters_ptr + d * PARAMETERS * H + hs[None, :]
    unit_mask = (hs < H)[None, :]
    parameters = tiles.load_as(at_vectors, H, unit_mask, PARAMETERS, kept)
    dvectors = tiles.zeros(PARAMETERS, (BLOCK_H,), kept)
    low, high = steps_of_window(d, T, first, last)
    plane = d.to(tl.int64) * n - row_of_step(offsets_ptr, low, B, RAGGED)
    if FUSED:
        xs = tl.arange(0, BLOCK_I)
        u_mask = (hs < H)[:, None] & (xs < I)[None, :]
        if DX or INPUT_NORM > 0:
            u = tiles.load(
                w_ih_ptr + d * len(INPUTS) * H * I + hs[:, None] * I + xs[None, :], H * I, u_mask, len(INPUTS)
            )
        if INPUT_NORM > 0:
            gains = tiles.load_as(gain_ptr + d * len(INPUTS) * H + hs[None, :], H, unit_mask, len(INPUTS), kept)
            dgains = tiles.zeros(len(INPUTS), (BLOCK_H,), kept)
        if DW:
            hx = tl.load(hx_ptr + state_h, mask=mask_h, other=0.0)
            du = tiles.zeros(len(INPUTS), (BLOCK_H, BLOCK_I), kept)
            dw = tiles.zeros(len(RECURRENT), (BLOCK_H, BLOCK_K), kept)
            db = tiles.zeros(SUMS, (BLOCK_H,), kept)
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
        g_at = gates_ptr + ((plane + at) * WIDTH * H)[:, None] + hs[None, :]
        saved = tiles.load_as(g_at, H, cell_mask, SAVED, kept)
        dc_t = dc
        if ZONEOUT == "none":
            c = tl.load(c_ptr + ((plane + at) * H)[:, None] + hs[None, :], mask=cell_mask, other=0.0)
        else:
            c = tl.load(g_at + SAVED * H, mask=cell_mask, other=0.0).to(kept)  # the cell's own
            of_h, of_c = zoned(
                zoneout_ptr, d, t, rows, 0, stream, threshold_h, p_h, threshold_c, p_c, BLOCK_B, BLOCK_H, ZONEOUT
            )
            dh_stays = of_h * dq
            dc_stays = of_c * dc
            dq -= dh_stays
            dc_t -= dc_stays
        da, dc_prev, dparameters = run_backward(CELL, saved, c, c_prev, dq, dc_t, parameters, unit_mask, H, WHOLE_ROWS)
        if ZONEOUT != "none":
            dc_prev += dc_stays
        # Rows without this step have gradients, but no part in sums over rows.
        dvectors = tiles.add_rows(dvectors, tiles.where(live, dparameters))
        da = tiles.where(live, da)
        if FUSED:
            x_mask = live[:, None] & (xs < I)[None, :]
            if DW or INPUT_NORM > 0:
                x = tl.load(x_ptr + (at * I)[:, None] + xs[None, :], mask=x_mask, other=0.0)
            of_input = da
            if INPUT_NORM > 0:  # whose products aren't kept, but made again
                products = tiles.zeros(len(INPUTS), (BLOCK_B, BLOCK_H), kept)
                products = tiles.add_products_of_rows(x, u, products, PRECISION)
                normed, factor = normalized(products, (unit_mask, H), INPUT_NORM)
                dgains = tiles.add_rows(dgains, tiles.times(normed, da))
                of_input = through_norm(tiles.times(gains, da), normed, factor, (unit_mask, H))
            of_input = tiles.cast_all(of_input, operand)
        da = tiles.cast_all(da, operand)
        if FUSED:
            if DW:
                y_at = y_ptr + (at_before * D * K + d * K)[:, None] + ks[None, :]
                h_prev = tl.where(had, tl.load(y_at, mask=h_mask & had, other=0.0), hx)
                if DROPOUT != "none":
                    h_prev = cast(h_prev.to(kept) * m, h_prev.dtype)
                du = tiles.add_transposed(of_input, x, du, INPUTS, PRECISION)
                dw = tiles.add_transposed(da, h_prev, dw, RECURRENT, PRECISION)
                db = tiles.add_rows(db, tiles.cast_all(da, kept))
            if DX:
                dx = tiles.product_of_all(of_input, u, tl.zeros((BLOCK_B, BLOCK_I), kept), INPUTS, PRECISION)
                tl.store(dx_ptr + ((plane + at) * I)[:, None] + xs[None, :], cast(dx, operand), mask=x_mask)
        else:
            tiles.store(dgates_ptr + ((plane + at) * SUMS * H)[:, None] + hs[None, :], H, da, cell_mask)
        dh_prev = tiles.product_of_all(da, w, tl.zeros((BLOCK_B, BLOCK_K), kept), RECURRENT, PRECISION)
        if DROPOUT != "none":
            dh_prev = dh_prev * m
        if ZONEOUT != "none":
            dh_prev += dh_stays
        dh = tl.where(live[:, None], dh_prev, dh)
        dc = tl.where(live[:, None], dc_prev, dc)
    tl.store(dhx_ptr + state_h, dh, mask=mask_h)
    tl.store(dcx_ptr + state_c, dc, mask=mask_c)
    tile = tl.program_id(0) * D + d
    tiles.store(dparameters_ptr + tile * PARAMETERS * H + hs, H, dvectors, hs < H)
    if FUSED and DW:
        u_mask = (hs < H)[:, None] & (xs < I)[None, :]
        tiles.store(dw_ih_ptr + tile * len(INPUTS) * H * I + hs[:, None] * I + xs[None, :], H * I, du, u_mask)
        at_w = dw_hh_ptr + tile * len(RECURRENT) * H * K + hs[:, None] * K + ks[None, :]
        tiles.store(at_w, H * K, dw, weight_mask)
        if INPUT_NORM > 0:
            tiles.store(dgain_ptr + tile * len(INPUTS) * H + hs, H, dgains, hs < H)
        tiles.store_some(db_ih_ptr + tile * len(INPUTS) * H + hs, H, db, hs < H, INPUTS)
        tiles.store_some(db_hh_ptr + tile * len(BIASED) * H + hs, H, db, hs < H, BIASED)


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
    D, H, I, K, cell = launch.D, launch.H, launch.I, launch.K, launch.cell
    fused, single, dx, dw, vectors = launch.plan.fused, True, hx, [], found.dparameters
    if fused:
        # Each tile of the batch adds up its own; where there is but one, these are the gradients themselves.
        count, size = launch.grid[0], window.size(D)
        single = count == D == 1
        tiles_of = () if single else (count,) if D == 1 else (count, D)
        if input_wanted:
            dx = hx.new_empty((D, size, I) if D > 1 else (size, I))
        if weights_wanted:
            inputs, recurrent, biased = (n * H for n in (cell.inputs, len(cell.recurrent), len(cell.biases)))
            shapes = [(inputs, I), (recurrent, K), (inputs,), (biased,)]
            shapes += [(inputs,)] if cell.input_norm is not None else []
            dw = [hx.new_empty((*tiles_of, *shape)) for shape in shapes]
    start(
        backward_kernel, launch.grid, [
            doutput, dhn, dcn, saved.gates, saved.c, output, hx, cx,
            found.dgates, hx if found.dh is None else found.dh, found.dhx, found.dcx,
            launch.w_hh, launch.w_hr, launch.parameters, launch.x, launch.w_ih, launch.gain,
            dx, *dw, *[hx] * (5 - len(dw)), hx if vectors is None else vectors,
            launch.offsets, launch.mask, launch.zoneout, *launch.numbers(window),
        ], launch.constants, CELL=cell.backward, DX=fused and input_wanted, DW=fused and weights_wanted,
    )  # fmt: skip
    if vectors is not None:
        vectors = vectors.sum(0)
    if not fused:
        return found._replace(dparameters=vectors)
    each: list[Tensor] = []
    for d in range(D if weights_wanted else 0):
        own = dw if single else [x.sum(0) if D == 1 else x[:, d].sum(0) for x in dw]
        each += own[: 4 if launch.bias else 2]
        if cell.parameters:
            dgain = None if cell.input_norm is None else own[4]
            each += parameter_gradients(cell, launch.bias, None if vectors is None else vectors[d], dgain)
    pieces = [] if not input_wanted else [dx] if D == 1 else list(dx)
    return LayerGradients(found.dhx, found.dcx, pieces, each)
