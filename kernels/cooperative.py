"""`cooperative`: one launch a sequence; the hidden units are split over programs, which meet once a time step.

A program owns some units of a tile of the batch, and keeps their weights on its SM for the whole sequence. What the
others need of a step (forward: h, backward: the gates' gradients) goes through memory, with one barrier between the
programs of the same batch rows. Of one direction each program has all four gates, so that no other barrier is needed.
Both directions of a layer run in one launch, or several layers as a wavefront: layer l at step t beside layer l + 1
at step t - 1, whose product with its input is in the kernel.

Sizes: as in `persistent`; Z is the number of directions, or of layers in a wavefront, and a "plane" one of them.
Projections are folded: h is what `weight_hr` gets (`folded`), and H its size, too.
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
from lstm_triton.kernels.cooperative_backward import backward
from lstm_triton.kernels.launch import COOPERATIVE_RUN_TIME, Front, Launch, start
from lstm_triton.recurrence import Pass, Window

_SPACING = tl.constexpr(barrier.SPACING)


@triton.jit(do_not_specialize=COOPERATIVE_RUN_TIME)
def forward_kernel(
    gates_ptr,  # (Z, n, 4H) in: input products, of the first layer in a wavefront; out, where SAVE: activated gates
    y_ptr,  # (N, D * H) out; in a wavefront, where SAVE, (Z, N, H)
    c_ptr,  # (Z, n, H) out, where SAVE
    hx_ptr,  # (Z, B, H) before the window
    cx_ptr,  # (Z, B, H)
    hn_ptr,  # (Z, B, H) out, after it
    cn_ptr,  # (Z, B, H) out
    h_ptr,  # (2, Z, B, H) scratch: h as the next step multiplies it; a pass s reads s % 2 and writes the other
    below_ptr,  # (2, Z, B, H) the same, in a wavefront: h as the next layer has it as its input
    w_hh_ptr,  # (Z, 4H, H)
    w_ih_ptr,  # (Z - 1, 4H, H) in a wavefront: of all layers but the first
    bias_ptr,  # (Z - 1, 4H) in a wavefront: the sums of both biases
    offsets_ptr,  # (T + 1 + B) where RAGGED, as in `persistent`
    mask_ptr,  # see mask_tile
    seed_ptr,  # one int64, where BETWEEN: of the dropout between layers
    counter_ptr,  # a counter for each group of programs that meet, see `barrier`
    failed_ptr,  # one int32 out: the launch's number where its programs waited in vain
    T, first, last, B, n, mask_steps, threshold, scale, stream,
    rounds, launch, between_threshold, between_scale, between_stream,
    D: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, SLICES: tl.constexpr,
    K1: tl.constexpr, K2: tl.constexpr,
    RAGGED: tl.constexpr, DROPOUT: tl.constexpr, PER_STEP: tl.constexpr,
    PRECISION: tl.constexpr, BETWEEN: tl.constexpr, MATVEC: tl.constexpr, SAVE: tl.constexpr, CELL: tl.constexpr,
):  # fmt: skip
    z = tl.program_id(2)
    d = z if LAYERS == 1 else 0
    layer = z if LAYERS > 1 else 0
    rows = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    own = tl.program_id(0) * BLOCK_H
    units = own + tl.arange(0, BLOCK_H)
    # Column 4u + g is gate g of unit u, so that two splits take the gates apart.
    columns = tl.arange(0, 4 * BLOCK_H)
    column_live = own + columns // 4 < H
    summed_live = column_live  # where there are sums to begin with: in a wavefront in the first layer
    gate_at = (columns % 4) * H + own + columns // 4
    in_batch = rows < B
    ks = sliced.inner(0, K1, SLICES)
    ks2 = sliced.inner(K1, K2, SLICES) if K2 > 0 else ks
    w_at = w_hh_ptr + z * 4 * H * H
    w, w2 = sliced.load_rights(w_at, gate_at * H, ks, ks2, 1, column_live, H, K2, SLICES)
    if LAYERS > 1:
        # Masks by bounds: "&" of a block and a scalar is no mask in some interpreters.
        summed_live = own + columns // 4 < tl.where(layer == 0, H, 0)
        below = tl.where(layer > 0, H, 0)
        u_at = w_ih_ptr + (layer - 1) * 4 * H * H
        u_live = own + columns // 4 < below
        u, u2 = sliced.load_rights(u_at, gate_at * H, ks, ks2, 1, u_live, H, K2, SLICES)
        bias = tl.load(bias_ptr + (layer - 1) * 4 * H + gate_at, mask=u_live, other=0.0)
    # All programs of a tile of the batch meet: those of a direction, or those of all layers.
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
    left_at = (z * B + rows) * H
    slot = tl.num_programs(2).to(tl.int64) * B * H  # from one of the two to the other
    h = tl.load(hx_ptr + state_at, mask=state_mask, other=0.0)
    c = tl.load(cx_ptr + state_at, mask=state_mask, other=0.0)
    low, high = steps_of_window(d, T, first, last)
    plane = z.to(tl.int64) * n - row_of_step(offsets_ptr, low, B, RAGGED)
    begin, end = passes_of_tile(offsets_ptr, d, T, first, last, tl.program_id(1) * BLOCK_B, RAGGED)

    t = begin - layer if d == 0 else T - 1 - begin
    shared = as_multiplied(
        h, mask_ptr, z, t, T, mask_steps, B, rows, own, units, in_batch, threshold, scale, stream,
        H, DROPOUT, PER_STEP, BLOCK_B, BLOCK_H, c.dtype,
    )  # fmt: skip
    tl.store(h_ptr + (begin % 2) * slot + state_at, shared, mask=state_mask)
    barrier.arrive(counter_ptr, leads, programs)
    at, live = rows_of_step(offsets_ptr, t, low, high, B, rows, RAGGED)
    g_at = gates_ptr + ((plane + at) * 4 * H)[:, None] + gate_at[None, :]
    a = tl.load(g_at, mask=live[:, None] & summed_live[None, :], other=0.0).to(c.dtype)
    rounds = barrier.wait(counter_ptr, before, rounds)
    before = ~before
    c = tl.where(rounds > 0, c, float("nan"))
    for s in tl.range(begin, end + LAYERS - 1, num_stages=1):
        now, then = (s % 2) * slot, (1 - s % 2) * slot
        acc = sliced.zeros(BLOCK_B, 4 * BLOCK_H, SLICES, c.dtype)
        # All loads before the first product, not to wait for each.
        left = sliced.load_left(h_ptr + now, left_at, ks, live, H, SLICES)
        if K2 > 0:
            left2 = sliced.load_left(h_ptr + now, left_at, ks2, live, H, SLICES)
        if LAYERS > 1:
            x = sliced.load_left(below_ptr + now, left_at - B * H, ks, live, below, SLICES)
            if K2 > 0:
                x2 = sliced.load_left(below_ptr + now, left_at - B * H, ks2, live, below, SLICES)
        acc = sliced.add(left, w, acc, PRECISION, MATVEC)
        if K2 > 0:
            acc = sliced.add(left2, w2, acc, PRECISION, MATVEC)
        if LAYERS > 1:
            acc = sliced.add(x, u, acc, PRECISION, MATVEC)
            if K2 > 0:
                acc = sliced.add(x2, u2, acc, PRECISION, MATVEC)
            a += bias.to(c.dtype)[None, :]
        a += sliced.total(acc, SLICES)
        a_if, a_fo = tl.split(tl.reshape(a, (BLOCK_B, BLOCK_H, 2, 2)))
        a_i, a_g = tl.split(a_if)
        a_f, a_o = tl.split(a_fo)
        saved, c_new, q = CELL((a_i, a_f, a_g, a_o), c, ())
        i, f, g, o = saved
        q = cast(q, h.dtype)
        cell_mask = live[:, None] & (units < H)[None, :]
        h = tl.where(live[:, None], q, h)
        c = tl.where(live[:, None], c_new, c)

        # What others wait for goes first; the rest is written, and the next step's sums are read, while they come.
        following = t + 1 if d == 0 else t - 1
        shared = as_multiplied(
            h, mask_ptr, z, following, T, mask_steps, B, rows, own, units, in_batch, threshold, scale, stream,
            H, DROPOUT, PER_STEP, BLOCK_B, BLOCK_H, c.dtype,
        )  # fmt: skip
        tl.store(h_ptr + then + state_at, shared, mask=state_mask)
        if LAYERS > 1:
            if BETWEEN:
                between = drawn_mask(
                    tl.load(seed_ptr), between_stream + layer, 0, at, own, between_threshold, between_scale,
                    BLOCK_B, BLOCK_H,
                )  # fmt: skip
                shared = cast(q.to(c.dtype) * between, h.dtype)
            else:
                shared = q
            above = tl.where(layer < LAYERS - 1, H, 0)
            tl.store(below_ptr + then + state_at, shared, mask=live[:, None] & (units < above)[None, :])
        barrier.arrive(counter_ptr, leads, programs)
        if SAVE:
            gate = gates_ptr.dtype.element_ty
            save_at = gates_ptr + ((plane + at) * 4 * H)[:, None] + units[None, :]
            tl.store(save_at, cast(i, gate), mask=cell_mask)
            tl.store(save_at + H, cast(f, gate), mask=cell_mask)
            tl.store(save_at + 2 * H, cast(g, gate), mask=cell_mask)
            tl.store(save_at + 3 * H, cast(o, gate), mask=cell_mask)
            tl.store(c_ptr + ((plane + at) * H)[:, None] + units[None, :], c_new, mask=cell_mask)
        y_at = at * D * H + d * H
        y_mask = cell_mask
        if LAYERS > 1:
            if SAVE:
                y_at += z.to(tl.int64) * n * H
            else:
                y_mask = live[:, None] & (units < tl.where(layer == LAYERS - 1, H, 0))[None, :]
        tl.store(y_ptr + y_at[:, None] + units[None, :], q, mask=y_mask)
        t = following
        at, live = rows_of_step(offsets_ptr, t, low, high, B, rows, RAGGED)
        g_at = gates_ptr + ((plane + at) * 4 * H)[:, None] + gate_at[None, :]
        a = tl.load(g_at, mask=live[:, None] & summed_live[None, :], other=0.0).to(c.dtype)
        rounds = barrier.wait(counter_ptr, before, tl.where(rounds > 0, limit, 0))
        before = ~before
        c = tl.where(rounds > 0, c, float("nan"))
    h = cast(tl.where(rounds > 0, h.to(c.dtype), float("nan")), h.dtype)
    tl.store(hn_ptr + state_at, h, mask=state_mask)
    tl.store(cn_ptr + state_at, c, mask=state_mask)
    if rounds == 0:
        tl.atomic_xchg(failed_ptr, launch, sem="relaxed", scope="sys")


def run(
    launch: Launch,
    window: Window,
    front: Front,
    gates: Tensor,
    cells: Tensor | None,
    output: Tensor,
    hx: Tensor,
    cx: Tensor,
    save: bool,
) -> Pass:
    """A layer without projections, or the layers of a wavefront; arguments as of the kernel and of `forward`."""
    c = hx.new_empty(0, dtype=cx.dtype) if cells is None else cells
    hn, cn = torch.empty_like(hx), torch.empty_like(cx)
    h, below = hx.new_empty(2, *hx.shape), hx.new_empty((2, *hx.shape) if front.layers > 1 else 0)
    with launch.meeting(front.layers) as meeting:
        start(
            forward_kernel, launch.cooperative_grid(front.layers), [
                gates, output, c, hx, cx, hn, cn, h, below, front.w_hh, front.w_ih, front.bias,
                launch.offsets, launch.mask, front.seed, *meeting.tensors, *launch.numbers(window)[:9],
                *meeting.numbers, *front.between,
            ], launch.constants, BETWEEN=front.drops, MATVEC=launch.plan.matvec, SAVE=save, CELL=launch.cell.forward,
        )  # fmt: skip
    return Pass(hn, cn, gates, c)


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
    if save and cells is None:
        cells = cx.new_empty(launch.D, window.size(launch.D), launch.H)
    if launch.projected:
        return folded.forward(run, launch, window, gates, cells, output, hx, cx, save)
    return run(launch, window, Front.of(launch), gates, cells, output, hx, cx, save)


__all__ = ["backward", "forward", "run"]
