"""`cooperative`, backward: as forward, but what the programs tell each other are the gates' gradients.

Each takes those of all units at the step after, for the gradient of h of its own units; sizes as in `cooperative`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lstm_triton.kernels import barrier, folded, sliced
from lstm_triton.kernels.blocks import (
    as_multiplied,
    cast,
    drawn_mask,
    passes_of_tile,
    row_of_step,
    rows_of_step,
    steps_of_window,
)
from lstm_triton.kernels.launch import COOPERATIVE_RUN_TIME, Front, Launch, start
from lstm_triton.recurrence import Gradients, Saved, Window

_SPACING = tl.constexpr(barrier.SPACING)


@triton.jit
def of_step(
    gates_ptr, c_ptr, cx, dy_ptr, offsets_ptr, t, toward, low, high, plane, d, layer, B, rows, units,
    D: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, RAGGED: tl.constexpr, kept: tl.constexpr,
):  # fmt: skip
    """What backward takes of step t: the gates i, f, g, o, c, the c before, the gradient of h from outside."""
    at, live = rows_of_step(offsets_ptr, t, low, high, B, rows, RAGGED)
    at_before, had = rows_of_step(offsets_ptr, t + toward, low, high, B, rows, RAGGED)
    mask = live[:, None] & (units < H)[None, :]
    g_at = gates_ptr + ((plane + at) * 4 * H)[:, None] + units[None, :]
    i = tl.load(g_at, mask=mask, other=0.0).to(kept)
    f = tl.load(g_at + H, mask=mask, other=0.0).to(kept)
    g = tl.load(g_at + 2 * H, mask=mask, other=0.0).to(kept)
    o = tl.load(g_at + 3 * H, mask=mask, other=0.0).to(kept)
    c = tl.load(c_ptr + ((plane + at) * H)[:, None] + units[None, :], mask=mask, other=0.0)
    before_at = c_ptr + ((plane + at_before) * H)[:, None] + units[None, :]
    c_prev = tl.where(had[:, None], tl.load(before_at, mask=mask & had[:, None], other=0.0), cx)
    dy_at = dy_ptr + (at * D * H + d * H)[:, None] + units[None, :]
    if LAYERS > 1:  # in a wavefront the last layer's alone
        mask = live[:, None] & (units < tl.where(layer == LAYERS - 1, H, 0))[None, :]
    dy = tl.load(dy_at, mask=mask, other=0.0).to(kept)
    return i, f, g, o, c, c_prev, dy


@triton.jit
def gates_product(
    dgates_ptr, at, live, ks, ks2, limit, w_i, v_i, w_f, v_f, w_g, v_g, w_o, v_o,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, H: tl.constexpr, K2: tl.constexpr, SLICES: tl.constexpr,
    PRECISION: tl.constexpr, kept: tl.constexpr,
):  # fmt: skip
    """(BLOCK_B, BLOCK_H): the gates' gradients in rows `at`, (·, 4H), times the weights of some units.

    Block by block, so that few of them are on their way through a program's shared memory and registers at a time;
    the next one is loaded before a product, not to wait for each.
    """
    at *= 4 * H
    f_ptr, g_ptr, o_ptr = dgates_ptr + H, dgates_ptr + 2 * H, dgates_ptr + 3 * H
    acc = sliced.zeros(BLOCK_B, BLOCK_H, SLICES, kept)
    x = sliced.load_left(dgates_ptr, at, ks, live, limit, SLICES)
    if K2 > 0:
        y = sliced.load_left(dgates_ptr, at, ks2, live, limit, SLICES)
        acc = sliced.add(x, w_i, acc, PRECISION)
        x = sliced.load_left(f_ptr, at, ks, live, limit, SLICES)
        acc = sliced.add(y, v_i, acc, PRECISION)
        y = sliced.load_left(f_ptr, at, ks2, live, limit, SLICES)
        acc = sliced.add(x, w_f, acc, PRECISION)
        x = sliced.load_left(g_ptr, at, ks, live, limit, SLICES)
        acc = sliced.add(y, v_f, acc, PRECISION)
        y = sliced.load_left(g_ptr, at, ks2, live, limit, SLICES)
        acc = sliced.add(x, w_g, acc, PRECISION)
        x = sliced.load_left(o_ptr, at, ks, live, limit, SLICES)
        acc = sliced.add(y, v_g, acc, PRECISION)
        y = sliced.load_left(o_ptr, at, ks2, live, limit, SLICES)
        acc = sliced.add(x, w_o, acc, PRECISION)
        acc = sliced.add(y, v_o, acc, PRECISION)
    else:
        y = sliced.load_left(f_ptr, at, ks, live, limit, SLICES)
        acc = sliced.add(x, w_i, acc, PRECISION)
        x = sliced.load_left(g_ptr, at, ks, live, limit, SLICES)
        acc = sliced.add(y, w_f, acc, PRECISION)
        y = sliced.load_left(o_ptr, at, ks, live, limit, SLICES)
        acc = sliced.add(x, w_g, acc, PRECISION)
        acc = sliced.add(y, w_o, acc, PRECISION)
    return sliced.total(acc, SLICES)


@triton.jit(do_not_specialize=COOPERATIVE_RUN_TIME)
def backward_kernel(
    dy_ptr,  # (N, D * H); in a wavefront the last layer's
    dhn_ptr,  # (Z, B, H)
    dcn_ptr,  # (Z, B, H)
    gates_ptr,  # (Z, n, 4H) activated
    c_ptr,  # (Z, n, H)
    cx_ptr,  # (Z, B, H) before the window
    dgates_ptr,  # (Z, n, 4H) out, and what the programs tell each other
    dhx_ptr,  # (Z, B, H) out
    dcx_ptr,  # (Z, B, H) out
    w_hh_ptr,  # (Z, 4H, H)
    w_ih_ptr,  # (Z - 1, 4H, H) in a wavefront: of all layers but the first
    offsets_ptr,  # (T + 1 + B) where RAGGED, as in `persistent`
    mask_ptr,  # see mask_tile
    seed_ptr,  # one int64, where BETWEEN
    counter_ptr,  # as in forward, as are the rest
    failed_ptr,
    T, first, last, B, n, mask_steps, threshold, scale, stream,
    rounds, launch, between_threshold, between_scale, between_stream,
    D: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, SLICES: tl.constexpr,
    K1: tl.constexpr, K2: tl.constexpr,
    RAGGED: tl.constexpr, DROPOUT: tl.constexpr, PER_STEP: tl.constexpr,
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
    w_at = w_hh_ptr + z * 4 * H * H
    w_i, v_i = sliced.load_rights(w_at, units, ks, ks2, H, units < H, H, K2, SLICES)
    w_f, v_f = sliced.load_rights(w_at + H * H, units, ks, ks2, H, units < H, H, K2, SLICES)
    w_g, v_g = sliced.load_rights(w_at + 2 * H * H, units, ks, ks2, H, units < H, H, K2, SLICES)
    w_o, v_o = sliced.load_rights(w_at + 3 * H * H, units, ks, ks2, H, units < H, H, K2, SLICES)
    if LAYERS > 1:
        above = tl.where(layer < LAYERS - 1, H, 0)
        u_at = w_ih_ptr + layer * 4 * H * H
        u_i, x_i = sliced.load_rights(u_at, units, ks, ks2, H, units < above, H, K2, SLICES)
        u_f, x_f = sliced.load_rights(u_at + H * H, units, ks, ks2, H, units < above, H, K2, SLICES)
        u_g, x_g = sliced.load_rights(u_at + 2 * H * H, units, ks, ks2, H, units < above, H, K2, SLICES)
        u_o, x_o = sliced.load_rights(u_at + 3 * H * H, units, ks, ks2, H, units < above, H, K2, SLICES)
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
    operand = dgates_ptr.dtype.element_ty
    low, high = steps_of_window(d, T, first, last)
    plane = z.to(tl.int64) * n - row_of_step(offsets_ptr, low, B, RAGGED)
    begin, end = passes_of_tile(offsets_ptr, d, T, first, last, tl.program_id(1) * BLOCK_B, RAGGED)
    toward = -1 if d == 0 else 1  # to the step whose state this one took

    # Of the first step that is passed, the last layer's; the others' steps come later.
    s = end - 1 + (LAYERS - 1 - layer)
    t = s if d == 0 else T - 1 - s
    i, f, g, o, c, c_prev, dy = of_step(
        gates_ptr, c_ptr, cx, dy_ptr, offsets_ptr, t, toward, low, high, plane, d, layer, B, rows, units,
        D, H, LAYERS, RAGGED, kept,
    )  # fmt: skip
    # The last pass has a product, the gradient of the state before the window, and no step.
    for _ in tl.range(begin, end + LAYERS, num_stages=1):
        at_done, was_live = rows_of_step(offsets_ptr, t - toward, low, high, B, rows, RAGGED)
        at, live = rows_of_step(offsets_ptr, t, low, high, B, rows, RAGGED)
        acc = gates_product(
            dgates_ptr, plane + at_done, was_live, ks, ks2, H, w_i, v_i, w_f, v_f, w_g, v_g, w_o, v_o,
            BLOCK_B, BLOCK_H, H, K2, SLICES, PRECISION, kept,
        )  # fmt: skip
        dh_prev = as_multiplied(
            acc, mask_ptr, z, t - toward, T, mask_steps, B, rows, own, units, in_batch,
            threshold, scale, stream, H, DROPOUT, PER_STEP, BLOCK_B, BLOCK_H, kept,
        )  # fmt: skip
        dh = tl.where(was_live[:, None], dh_prev, dh)
        dq = dh + dy
        if LAYERS > 1:
            dx = gates_product(
                dgates_ptr, plane + n + at, live, ks, ks2, above, u_i, x_i, u_f, x_f, u_g, x_g, u_o, x_o,
                BLOCK_B, BLOCK_H, H, K2, SLICES, PRECISION, kept,
            )  # fmt: skip
            if BETWEEN:
                dx *= drawn_mask(
                    tl.load(seed_ptr), between_stream + layer, 0, at, own, between_threshold, between_scale,
                    BLOCK_B, BLOCK_H,
                )  # fmt: skip
            dq += dx
        da, dc_prev, _ = CELL((i, f, g, o), c, c_prev, dq, dc, ())
        da_i, da_f, da_g, da_o = da
        cell_mask = live[:, None] & (units < H)[None, :]
        g_at = dgates_ptr + ((plane + at) * 4 * H)[:, None] + units[None, :]
        tl.store(g_at, cast(da_i, operand), mask=cell_mask)
        tl.store(g_at + H, cast(da_f, operand), mask=cell_mask)
        tl.store(g_at + 2 * H, cast(da_g, operand), mask=cell_mask)
        tl.store(g_at + 3 * H, cast(da_o, operand), mask=cell_mask)
        dc = tl.where(live[:, None], dc_prev, dc)
        barrier.arrive(counter_ptr, leads, programs)
        t += toward
        i, f, g, o, c, c_prev, dy = of_step(
            gates_ptr, c_ptr, cx, dy_ptr, offsets_ptr, t, toward, low, high, plane, d, layer, B, rows, units,
            D, H, LAYERS, RAGGED, kept,
        )  # fmt: skip
        rounds = barrier.wait(counter_ptr, before, tl.where(rounds > 0, limit, 0))
        before = ~before
        dc = tl.where(rounds > 0, dc, float("nan"))
    tl.store(dhx_ptr + state_at, tl.where(rounds > 0, dh, float("nan")), mask=state_mask)
    tl.store(dcx_ptr + state_at, dc, mask=state_mask)
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
    dgates = torch.empty_like(saved.gates)
    dhx, dcx = torch.empty_like(dhn), torch.empty_like(dcn)
    with launch.meeting(front.layers) as meeting:
        start(
            backward_kernel, launch.cooperative_grid(front.layers), [
                doutput, dhn, dcn, saved.gates, saved.c, cx, dgates, dhx, dcx, front.w_hh, front.w_ih,
                launch.offsets, launch.mask, front.seed, *meeting.tensors, *launch.numbers(window)[:9],
                *meeting.numbers, *front.between,
            ], launch.constants, BETWEEN=front.drops, CELL=launch.cell.backward,
        )  # fmt: skip
    return Gradients(dhx, dcx, dgates, None, None)


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
