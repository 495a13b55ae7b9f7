"""What backward rebuilds of a window's forward: parallel over time, but for the scan of c.

Neither is a pass over the sequence like forward: the h that each step multiplied comes from the
outputs, the sums are then a GEMM of all steps, and only c, pointwise, is sequential.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lstm_triton.kernels import tiles
from lstm_triton.kernels.blocks import (
    cast,
    mask_tile,
    passes_of_tile,
    row_of_step,
    rows_of_step,
    steps_of_window,
)
from lstm_triton.kernels.launch import RUN_TIME, Launch, start
from lstm_triton.kernels.pointwise import run_forward, zoned
from lstm_triton.recurrence import Window


@triton.jit(do_not_specialize=RUN_TIME)
def multiplied_kernel(
    y_ptr,  # (N, D * K)
    hx_ptr,  # (D, B, K) before the window
    h_prev_ptr,  # (D, n, K) out
    offsets_ptr,  # (T + 1 + B) where RAGGED, as in `persistent`
    mask_ptr,  # see mask_tile
    T, first, last, B, n, mask_steps, threshold, scale, stream, threshold_h, p_h, threshold_c, p_c,
    D: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    SUMS: tl.constexpr, INPUTS: tl.constexpr, RECURRENT: tl.constexpr, BIASED: tl.constexpr,
    SAVED: tl.constexpr, WIDTH: tl.constexpr, PARAMETERS: tl.constexpr, WHOLE_ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_HR: tl.constexpr, RAGGED: tl.constexpr, DROPOUT: tl.constexpr, PER_STEP: tl.constexpr,
    ZONEOUT: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # A program owns a tile of the batch at one step.
    d = tl.program_id(2)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    low, high = steps_of_window(d, T, first, last)
    plane = d.to(tl.int64) * n - row_of_step(offsets_ptr, low, B, RAGGED)
    t = low + tl.program_id(1)
    before = t - 1 if d == 0 else t + 1
    at, live = rows_of_step(offsets_ptr, t, low, high, B, rows, RAGGED)
    at_before, had = rows_of_step(offsets_ptr, before, low, high, B, rows, RAGGED)
    had = had[:, None]
    for k in range(0, K, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        h_mask = live[:, None] & (ks < K)[None, :]
        initial = tl.load(hx_ptr + ((d * B + rows) * K)[:, None] + ks[None, :], mask=h_mask, other=0.0)
        y_at = y_ptr + (at_before * D * K + d * K)[:, None] + ks[None, :]
        h = tl.where(had, tl.load(y_at, mask=h_mask & had, other=0.0), initial)
        if DROPOUT != "none":
            m = mask_tile(
                mask_ptr, d, t, mask_steps, B, rows, k, ks, live, threshold, scale, stream,
                K, DROPOUT, PER_STEP, BLOCK_B, BLOCK_K,
            )  # fmt: skip
            h = cast(h * m, h.dtype)
        tl.store(h_prev_ptr + ((plane + at) * K)[:, None] + ks[None, :], h, mask=h_mask)


def multiplied(launch: Launch, window: Window, output: Tensor, hx: Tensor) -> Tensor:
    """(D, n, K): the h, masked under recurrent dropout, that each step of the window multiplied with weight_hh."""
    h_prev = hx.new_empty(launch.D, window.size(launch.D), launch.K)
    grid = launch.grid[0], window.last - window.first, launch.D
    arguments = [output, hx, h_prev, launch.offsets, launch.mask, *launch.numbers(window)]
    start(multiplied_kernel, grid, arguments, launch.rebuild)
    return h_prev


@triton.jit(do_not_specialize=RUN_TIME)
def activate_kernel(
    gates_ptr,  # (D, n, WH) in: the sums; out: what the cell keeps
    c_ptr,  # (D, n, H) out
    cx_ptr,  # (D, B, H) before the window
    parameters_ptr,  # (D, P, H)
    zoneout_ptr,  # one int64, the seed, where ZONEOUT is "drawn"
    offsets_ptr,  # (T + 1 + B) where RAGGED, as in `persistent`
    T, first, last, B, n, mask_steps, threshold, scale, stream, threshold_h, p_h, threshold_c, p_c,
    D: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    SUMS: tl.constexpr, INPUTS: tl.constexpr, RECURRENT: tl.constexpr, BIASED: tl.constexpr,
    SAVED: tl.constexpr, WIDTH: tl.constexpr, PARAMETERS: tl.constexpr, WHOLE_ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_HR: tl.constexpr, RAGGED: tl.constexpr, DROPOUT: tl.constexpr, PER_STEP: tl.constexpr,
    ZONEOUT: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, CELL: tl.constexpr,
):  # fmt: skip
    # A program owns a tile of the batch and some hidden units, which need nothing of the others.
    d = tl.program_id(2)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    units = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    low, high = steps_of_window(d, T, first, last)
    plane = d.to(tl.int64) * n - row_of_step(offsets_ptr, low, B, RAGGED)
    in_batch = (rows < B)[:, None] & (units < H)[None, :]
    c = tl.load(cx_ptr + ((d * B + rows) * H)[:, None] + units[None, :], mask=in_batch, other=0.0)
    unit_mask = (units < H)[None, :]
    at_vectors = parameters_ptr + d * PARAMETERS * H + units[None, :]
    parameters = tiles.load_as(at_vectors, H, unit_mask, PARAMETERS, c.dtype)
    begin, end = passes_of_tile(offsets_ptr, d, T, first, last, tl.program_id(0) * BLOCK_B, RAGGED)
    for s in range(begin, end):
        t = s if d == 0 else T - 1 - s
        at, live = rows_of_step(offsets_ptr, t, low, high, B, rows, RAGGED)
        mask = live[:, None] & unit_mask
        g_at = gates_ptr + ((plane + at) * WIDTH * H)[:, None] + units[None, :]
        sums = tiles.load_as(g_at, H, mask, SUMS, c.dtype)
        saved, c_new, _ = run_forward(CELL, sums, c, parameters, unit_mask, H, WHOLE_ROWS)
        if ZONEOUT != "none":
            saved += (c_new,)
            _, of_c = zoned(
                zoneout_ptr, d, t, rows, tl.program_id(1) * BLOCK_H, stream, threshold_h, p_h, threshold_c, p_c,
                BLOCK_B, BLOCK_H, ZONEOUT,
            )  # fmt: skip
            c_new += of_c * (c - c_new)
        tiles.store(g_at, H, saved, mask)
        tl.store(c_ptr + ((plane + at) * H)[:, None] + units[None, :], c_new, mask=mask)
        c = tl.where(live[:, None], c_new, c)


def activate(launch: Launch, window: Window, gates: Tensor, cx: Tensor) -> Tensor:
    """What the cell keeps in place of the sums in `gates` (D, n, WH); c after each step (D, n, H)."""
    c = torch.empty(*gates.shape[:2], launch.H, dtype=cx.dtype, device=cx.device)
    constants = launch.rebuild
    grid = launch.grid[0], -(-launch.H // constants["BLOCK_H"]), launch.D
    arguments = [gates, c, cx, launch.parameters, launch.zoneout, launch.offsets, *launch.numbers(window)]
    start(activate_kernel, grid, arguments, constants, CELL=launch.cell.forward)
    return c
