"""`cooperative`, backward: as forward, but what the programs tell each other are the sums' gradients.

Each takes those of all units at the step after, for the gradient of h of its own units; sizes as in `cooperative`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lstm_triton.kernels import barrier, folded, sliced, tiles
from lstm_triton.kernels.blocks import (
    as_multiplied,
    drawn_mask,
    passes_of_tile,
    row_of_step,
    rows_of_step,
    steps_of_window,
)
from lstm_triton.kernels.launch import COOPERATIVE_RUN_TIME, Front, Launch, start
from lstm_triton.kernels.pointwise import zoned
from lstm_triton.recurrence import Gradients, Saved, Window

_SPACING = tl.constexpr(barrier.SPACING)


@triton.jit
def of_step(
    gates_ptr, c_ptr, cx, dy_ptr, offsets_ptr, t, toward, low, high, plane, d, layer, B, rows, units,
    D: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, SAVED: tl.constexpr, WIDTH: tl.constexpr,
    ZONEOUT: tl.constexpr, RAGGED: tl.constexpr, kept: tl.constexpr,
):  # fmt: skip
    """What backward takes of step t: what the cell kept, its c, the c before, the gradient of h from outside."""
    at, live = rows_of_step(offsets_ptr, t, low, high, B, rows, RAGGED)
    at_before, had = rows_of_step(offsets_ptr, t + toward, low, high, B, rows, RAGGED)
    mask = live[:, None] & (units < H)[None, :]
    g_at = gates_ptr + ((plane + at) * WIDTH * H)[:, None] + units[None, :]
    saved = tiles.load_as(g_at, H, mask, SAVED, kept)
    if ZONEOUT == "none":
        c = tl.load(c_ptr + ((plane + at) * H)[:, None] + units[None, :], mask=mask, other=0.0)
    else:
        c = tl.load(g_at + SAVED * H, mask=mask, other=0.0).to(kept)  # the cell's own
    before_at = c_ptr + ((plane + at_before) * H)[:, None] + units[None, :]
    c_prev = tl.where(had[:, None], tl.load(before_at, mask=mask & had[:, None], other=0.0), cx)
    dy_at = dy_ptr + (at * D * H + d * H)[:, None] + units[None, :]
    if LAYERS > 1:  # in a wavefront the last layer's alone
        mask = live[:, None] & (units < tl.where(layer == LAYERS - 1, H, 0))[None, :]
    dy = tl.load(dy_at, mask=mask, other=0.0).to(kept)
    return saved, c, c_prev, dy


@triton.jit
def product(
    dgates_ptr, at, live, ks, ks2, limit, weights,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, H: tl.constexpr, SUMS: tl.constexpr, OF: tl.constexpr,
    K2: tl.constexpr, SLICES: tl.constexpr, PRECISION: tl.constexpr, kept: tl.constexpr,
):  # fmt: skip
    """(BLOCK_B, BLOCK_H): the gradients in rows `at`, (·, GH), of the sums OF, times the weights of some units.

    Block by block, so that few of them are on their way through a program's shared memory and registers at a time;
    the next one is loaded before a product, not to wait for each.
    """
    BLOCKS: tl.constexpr = 2 if K2 > 0 else 1  # of each factor
    at *= SUMS * H
    acc = sliced.zeros(BLOCK_B, BLOCK_H, SLICES, kept)
    lefts = (sliced.load_left(dgates_ptr + OF[0] * H, at, ks, live, limit, SLICES),)
    for k in tl.static_range(1, len(weights)):
        of_sum = dgates_ptr + OF[k // BLOCKS] * H
        lefts += (sliced.load_left(of_sum, at, ks if k % BLOCKS == 0 else ks2, live, limit, SLICES),)
        acc = sliced.add(lefts[k - 1], weights[k - 1], acc, PRECISION)
    acc = sliced.add(lefts[len(weights) - 1], weights[len(weights) - 1], acc, PRECISION)
    return sliced.total(acc, SLICES)


@triton.jit(do_not_specialize=COOPERATIVE_RUN_TIME)
def backward_kernel(
    dy_ptr,  # (N, D * H); in a wavefront the last layer's
    dhn_ptr,  # (Z, B, H)
    dcn_ptr,  # (Z, B, H)
    gates_ptr,  # (Z, n, WH) what the cell kept
    c_ptr,  # (Z, n, H)
    cx_ptr,  # (Z, B, H) before the window
    dgates_ptr,  # (Z, n, GH) out, and what the programs tell each other
    dhx_ptr,  # (Z, B, H) out
    dcx_ptr,  # (Z, B, H) out
    w_hh_ptr,  # (Z, RH, H)
    w_ih_ptr,  # (Z - 1, GH, H) in a wavefront: of all layers but the first
    parameters_ptr,  # (D, P, H)
    dparameters_ptr,  # (tiles of the batch, D, P, H) out
    offsets_ptr,  # (T + 1 + B) where RAGGED, as in `persistent`
    mask_ptr,  # see mask_tile
    zoneout_ptr,  # as in forward
    seed_ptr,  # one int64, where BETWEEN
    counter_ptr,  # as in forward, as are the rest
    failed_ptr,
    T, first, last, B, n, mask_steps, threshold, scale, stream, threshold_h, p_h, threshold_c, p_c,
    rounds, launch, between_threshold, between_scale, between_stream,
    D: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr,
    SUMS: tl.constexpr, INPUTS: tl.constexpr, RECURRENT: tl.constexpr, OTHERS: tl.constexpr, BIASED: tl.constexpr,
    SAVED: tl.constexpr, WIDTH: tl.constexpr, PARAMETERS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr,
    K1: tl.constexpr, K2: tl.constexpr,
    RAGGED: tl.constexpr, DROPOUT: tl.constexpr, PER_STEP: tl.constexpr, ZONEOUT: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, BETWEEN: tl.constexpr, CELL: tl.constexpr,
):  # fmt: skip
    z = tl.program_id(2)
    d = z if LAYERS == 1 else 0
    layer = z if LAYERS > 1 else 0
    rows = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    own = tl.program_id(0) * BLOCK_H
    units = own + tl.arange(0, BLOCK_H)
    in_batch = rows < B
    ks = sliced.inner(0, K1, SLICES)
    ks2 = sliced.inner(K1, K2, SLICES) if K2 > 0 else ks
    w_at = w_hh_ptr + z * len(RECURRENT) * H * H
    w = sliced.load_rights(w_at, H * H, units, ks, ks2, H, units < H, H, len(RECURRENT), K2, SLICES)
    if LAYERS > 1:
        above = tl.where(layer < LAYERS - 1, H, 0)
        u_at = w_ih_ptr + layer * SUMS * H * H
        u = sliced.load_rights(u_at, H * H, units, ks, ks2, H, units < above, H, SUMS, K2, SLICES)
    programs = tl.num_programs(0)
    leads = tl.program_id(0) == 0
    if LAYERS > 1:
        programs *= LAYERS
        leads = leads & (layer == 0)
    counter_ptr += (tl.program_id(1) * D + d) * _SPACING
    before = barrier.before(counter_ptr)
    limit = rounds

    state_at = ((z * B + rows) * H)[:, None] + units[None, :]
    state_mask = in_batch[:, None] & (units < H)[None, :]
    dh = tl.load(dhn_ptr + state_at, mask=state_mask, other=0.0)
    dc = tl.load(dcn_ptr + state_at, mask=state_mask, other=0.0)
    cx = tl.load(cx_ptr + state_at, mask=state_mask, other=0.0)
    kept = c_ptr.dtype.element_ty
    at_vectors = parameters_ptr + z * PARAMETERS * H + units[None, :]
    parameters = tiles.load_as(at_vectors, H, (units < H)[None, :], PARAMETERS, kept)
    dvectors = tiles.zeros(PARAMETERS, (BLOCK_H,), kept)
    if ZONEOUT != "none":
        dh_stays = tl.zeros((BLOCK_B, BLOCK_H), kept)  # of the step that is done
    low, high = steps_of_window(d, T, first, last)
    plane = z.to(tl.int64) * n - row_of_step(offsets_ptr, low, B, RAGGED)
    begin, end = passes_of_tile(offsets_ptr, d, T, first, last, tl.program_id(1) * BLOCK_B, RAGGED)
    toward = -1 if d == 0 else 1  # to the step whose state this one took

    # Of the first step that is passed, the last layer's; the others' steps come later.
    s = end - 1 + (LAYERS - 1 - layer)
    t = s if d == 0 else T - 1 - s
    saved, c, c_prev, dy = of_step(
        gates_ptr, c_ptr, cx, dy_ptr, offsets_ptr, t, toward, low, high, plane, d, layer, B, rows, units,
        D, H, LAYERS, SAVED, WIDTH, ZONEOUT, RAGGED, kept,
    )  # fmt: skip
    # The last pass has a product, the gradient of the state before the window, and no step.
    for _ in tl.range(begin, end + LAYERS, num_stages=1):
        at_done, was_live = rows_of_step(offsets_ptr, t - toward, low, high, B, rows, RAGGED)
        at, live = rows_of_step(offsets_ptr, t, low, high, B, rows, RAGGED)
        acc = product(
            dgates_ptr, plane + at_done, was_live, ks, ks2, H, w,
            BLOCK_B, BLOCK_H, H, SUMS, RECURRENT, K2, SLICES, PRECISION, kept,
        )  # fmt: skip
        dh_prev = as_multiplied(
            acc, mask_ptr, z, t - toward, T, mask_steps, B, rows, own, units, in_batch,
            threshold, scale, stream, H, DROPOUT, PER_STEP, BLOCK_B, BLOCK_H, kept,
        )  # fmt: skip
        if ZONEOUT != "none":
            dh_prev += dh_stays
        dh = tl.where(was_live[:, None], dh_prev, dh)
        dq = dh + dy
        if LAYERS > 1:
            dx = product(
                dgates_ptr, plane + n + at, live, ks, ks2, above, u,
                BLOCK_B, BLOCK_H, H, SUMS, INPUTS, K2, SLICES, PRECISION, kept,
            )  # fmt: skip
            if BETWEEN:
                dx *= drawn_mask(
                    tl.load(seed_ptr), between_stream + layer, 0, at, own, between_threshold, between_scale,
                    BLOCK_B, BLOCK_H,
                )  # fmt: skip
            dq += dx
        dc_t = dc
        if ZONEOUT != "none":
            of_h, of_c = zoned(
                zoneout_ptr, d, t, rows, own, stream, threshold_h, p_h, threshold_c, p_c, BLOCK_B, BLOCK_H, ZONEOUT
            )
            dh_stays = of_h * dq
            dc_stays = of_c * dc
            dq -= dh_stays
            dc_t -= dc_stays
        da, dc_prev, dparameters = CELL(saved, c, c_prev, dq, dc_t, parameters)
        if ZONEOUT != "none":
            dc_prev += dc_stays
        cell_mask = live[:, None] & (units < H)[None, :]
        g_at = dgates_ptr + ((plane + at) * SUMS * H)[:, None] + units[None, :]
        tiles.store(g_at, H, da, cell_mask)
        dc = tl.where(live[:, None], dc_prev, dc)
        barrier.arrive(counter_ptr, leads, programs)
        # Rows without this step have gradients, but no part in sums over rows.
        dvectors = tiles.add_rows(dvectors, tiles.where(live, dparameters))
        t += toward
        saved, c, c_prev, dy = of_step(
            gates_ptr, c_ptr, cx, dy_ptr, offsets_ptr, t, toward, low, high, plane, d, layer, B, rows, units,
            D, H, LAYERS, SAVED, WIDTH, ZONEOUT, RAGGED, kept,
        )  # fmt: skip
        rounds = barrier.wait(counter_ptr, before, tl.where(rounds > 0, limit, 0))
        before = ~before
        dc = tl.where(rounds > 0, dc, float("nan"))
    tl.store(dhx_ptr + state_at, tl.where(rounds > 0, dh, float("nan")), mask=state_mask)
    tl.store(dcx_ptr + state_at, dc, mask=state_mask)
    at_vectors = dparameters_ptr + (tl.program_id(1) * D + d) * PARAMETERS * H + units
    for k in tl.static_range(PARAMETERS):
        tl.store(at_vectors + k * H, tl.where(rounds > 0, dvectors[k], float("nan")), mask=units < H)
    if rounds == 0:
        tl.atomic_xchg(failed_ptr, launch, sem="relaxed", scope="sys")


def run(
    launch: Launch,
    window: Window,
    front: Front,
    doutput: Tensor,
    saved: Saved,
    cx: Tensor,
    dhn: Tensor,
    dcn: Tensor,
) -> Gradients:
    """A layer without projections, or the layers of a wavefront; arguments as of the kernel and of `backward`."""
    cell, (planes, n, _) = launch.cell, saved.gates.shape
    dgates = saved.gates.new_empty(planes, n, cell.sums * launch.H)
    dhx, dcx = torch.empty_like(dhn), torch.empty_like(dcn)
    vectors = dhn.new_empty(launch.grid[0], planes, cell.vectors, launch.H) if cell.vectors else None
    with launch.meeting(front.layers) as meeting:
        start(
            backward_kernel, launch.cooperative_grid(front.layers), [
                doutput, dhn, dcn, saved.gates, saved.c, cx, dgates, dhx, dcx, front.w_hh, front.w_ih,
                launch.parameters, dcx if vectors is None else vectors,
                launch.offsets, launch.mask, launch.zoneout, front.seed,
                *meeting.tensors, *launch.numbers(window), *meeting.numbers, *front.between,
            ], launch.constants, BETWEEN=front.drops, CELL=cell.backward,
        )  # fmt: skip
    return Gradients(dhx, dcx, dgates, None, None, None if vectors is None else vectors.sum(0))


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
    if launch.projected:
        return folded.backward(run, launch, window, doutput, saved, cx, dhn, dcn)
    return run(launch, window, Front.of(launch), doutput, saved, cx, dhn, dcn)
