"""`cooperative`: one launch a sequence; the hidden units are split over programs, which meet once a time step.

A program owns some units of a tile of the batch, and keeps their weights on its SM for the whole sequence. What the
others need of a step (forward: h, backward: the sums' gradients) goes through memory, with one barrier between the
programs of the same batch rows. Of its units a program has all sums, so that no other barrier is needed; cells that
look at all units of a row would need more, and run by other strategies.
Both directions of a layer run in one launch, or several layers as a wavefront: layer l at step t beside layer l + 1
at step t - 1, whose product with its input is in the kernel.

Sizes: as in `persistent`; Z is the number of directions, or of layers in a wavefront, and a "plane" one of them. In a
wavefront each sum has both products, and its bias is in that with the input (`lstm_triton.launching.of_wavefront`).
Projections are folded: h is what `weight_hr` gets (`folded`), and H its size, too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lstm_triton.kernels import barrier, columns, folded, sliced, tiles
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
from lstm_triton.kernels.pointwise import zoned
from lstm_triton.recurrence import Pass, Window

_SPACING = tl.constexpr(barrier.SPACING)


@triton.jit(do_not_specialize=COOPERATIVE_RUN_TIME)
def forward_kernel(
    gates_ptr,  # (Z, n, WH) in: input products, of the first layer in a wavefront; out, where SAVE: what the cell keeps
    y_ptr,  # (N, D * H) out; in a wavefront, where SAVE, (Z, N, H)
    c_ptr,  # (Z, n, H) out, where SAVE
    hx_ptr,  # (Z, B, H) before the window
    cx_ptr,  # (Z, B, H)
    hn_ptr,  # (Z, B, H) out, after it
    cn_ptr,  # (Z, B, H) out
    h_ptr,  # (2, Z, B, H) scratch: h as the next step multiplies it; a pass s reads s % 2 and writes the other
    below_ptr,  # (2, Z, B, H) the same, in a wavefront: h as the next layer has it as its input
    w_hh_ptr,  # (Z, RH, H)
    w_ih_ptr,  # (Z - 1, GH, H) in a wavefront: of all layers but the first
    bias_ptr,  # (Z - 1, GH) in a wavefront: the sums of both biases
    b_hh_ptr,  # (D, len(BIASED) * H) where BIAS
    parameters_ptr,  # (D, P, H)
    offsets_ptr,  # (T + 1 + B) where RAGGED, as in `persistent`
    mask_ptr,  # see mask_tile
    zoneout_ptr,  # one int64, the seed, where ZONEOUT is "drawn"
    seed_ptr,  # the same, where BETWEEN: of the dropout between layers
    counter_ptr,  # a counter for each group of programs that meet, see `barrier`
    failed_ptr,  # one int32 out: the launch's number where its programs waited in vain
    T, first, last, B, n, mask_steps, threshold, scale, stream, threshold_h, p_h, threshold_c, p_c,
    rounds, launch, between_threshold, between_scale, between_stream,
    D: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr,
    SUMS: tl.constexpr, INPUTS: tl.constexpr, RECURRENT: tl.constexpr, OTHERS: tl.constexpr, BIASED: tl.constexpr,
    SAVED: tl.constexpr, WIDTH: tl.constexpr, PARAMETERS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr,
    K1: tl.constexpr, K2: tl.constexpr,
    RAGGED: tl.constexpr, DROPOUT: tl.constexpr, PER_STEP: tl.constexpr, ZONEOUT: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, BETWEEN: tl.constexpr, MATVEC: tl.constexpr, SAVE: tl.constexpr, CELL: tl.constexpr,
):  # fmt: skip
    z = tl.program_id(2)
    d = z if LAYERS == 1 else 0
    layer = z if LAYERS > 1 else 0
    rows = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    own = tl.program_id(0) * BLOCK_H
    units = own + tl.arange(0, BLOCK_H)
    row_at, column_live, sum_at, summed = columns.places(own, H, BLOCK_H, COLUMNS, RECURRENT, INPUTS)
    in_batch = rows < B
    ks = sliced.inner(0, K1, SLICES)
    ks2 = sliced.inner(K1, K2, SLICES) if K2 > 0 else ks
    w_at = w_hh_ptr + z * len(RECURRENT) * H * H
    w = sliced.load_rights(w_at, 0, row_at * H, ks, ks2, 1, column_live, H, 1, K2, SLICES)
    if LAYERS > 1:
        # Masks by bounds: "&" of a block and a scalar is no mask in some interpreters.
        of_unit = own + tl.arange(0, COLUMNS * BLOCK_H) // COLUMNS
        summed &= of_unit < tl.where(layer == 0, H, 0)
        below = tl.where(layer > 0, H, 0)
        u_at = w_ih_ptr + (layer - 1) * SUMS * H * H
        u_live = column_live & (of_unit < below)
        u = sliced.load_rights(u_at, 0, row_at * H, ks, ks2, 1, u_live, H, 1, K2, SLICES)
        bias = tl.load(bias_ptr + (layer - 1) * SUMS * H + row_at, mask=u_live, other=0.0)
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
    biases = tiles.biases(
        b_hh_ptr, b_hh_ptr + z * len(BIASED) * H, units, H, BLOCK_H, SUMS, INPUTS, BIASED, BIAS, False, c.dtype
    )
    at_vectors = parameters_ptr + z * PARAMETERS * H + units[None, :]
    parameters = tiles.load_as(at_vectors, H, (units < H)[None, :], PARAMETERS, c.dtype)
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
    a, others = columns.begin(gates_ptr, (plane + at) * WIDTH * H, live, sum_at, summed, units, H, OTHERS, c.dtype)
    rounds = barrier.wait(counter_ptr, before, rounds)
    before = ~before
    c = tl.where(rounds > 0, c, float("nan"))
    for s in tl.range(begin, end + LAYERS - 1, num_stages=1):
        now, then = (s % 2) * slot, (1 - s % 2) * slot
        acc = sliced.zeros(BLOCK_B, COLUMNS * BLOCK_H, SLICES, c.dtype)
        # All loads before the first product, not to wait for each.
        left = sliced.load_lefts(h_ptr + now, left_at, ks, ks2, live, H, K2, SLICES)
        if LAYERS > 1:
            x = sliced.load_lefts(below_ptr + now, left_at - B * H, ks, ks2, live, below, K2, SLICES)
        acc = sliced.add_all(left, w, acc, PRECISION, MATVEC)
        if LAYERS > 1:
            acc = sliced.add_all(x, u, acc, PRECISION, MATVEC)
            a += bias.to(c.dtype)[None, :]
        a += sliced.total(acc, SLICES)
        parts = columns.split(a, BLOCK_B, BLOCK_H, COLUMNS)
        sums = columns.sums(parts, others, biases, INPUTS, RECURRENT, OTHERS)
        saved, c_new, q = CELL(sums, c, parameters)
        if ZONEOUT != "none":
            saved += (c_new,)
            of_h, of_c = zoned(
                zoneout_ptr, d, t, rows, own, stream, threshold_h, p_h, threshold_c, p_c, BLOCK_B, BLOCK_H, ZONEOUT
            )
            c_new += of_c * (c - c_new)
            q += of_h * (h.to(c.dtype) - q)
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
            save_at = gates_ptr + ((plane + at) * WIDTH * H)[:, None] + units[None, :]
            tiles.store(save_at, H, saved, cell_mask)
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
        a, others = columns.begin(gates_ptr, (plane + at) * WIDTH * H, live, sum_at, summed, units, H, OTHERS, c.dtype)
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
                launch.b_hh, launch.parameters, launch.offsets, launch.mask, launch.zoneout, front.seed,
                *meeting.tensors, *launch.numbers(window), *meeting.numbers, *front.between,
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
