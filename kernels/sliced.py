"""Products whose inner dimension is cut into slices, so that several warps share one of few rows and columns.

A warp adds up the products of a slice, one tensor-core instruction after the other, which wait for each other; that
many instructions are a slice's length / 16. With one slice all is as `tl.dot` has it. The inner dimension is covered
by two blocks of sizes that are powers of two, the second of which may be empty: 768 = 512 + 256.
"""

import triton
import triton.language as tl

from lstm_triton.kernels.blocks import dot


@triton.jit
def inner(first: tl.constexpr, SIZE: tl.constexpr, SLICES: tl.constexpr):
    """Indices first … first + SIZE - 1 of the inner dimension: (SIZE,) or (SLICES, SIZE // SLICES)."""
    if SLICES == 1:
        ks = first + tl.arange(0, SIZE)
    else:
        ks = first + tl.arange(0, SLICES)[:, None] * (SIZE // SLICES) + tl.arange(0, SIZE // SLICES)[None, :]
    return ks


@triton.jit
def load_left(ptr, at, ks, live, limit, SLICES: tl.constexpr):
    """Rows of a left factor, in which `ks` lie side by side: (rows, SIZE) or (SLICES, rows, SIZE // SLICES)."""
    if SLICES == 1:
        x = tl.load(ptr + at[:, None] + ks[None, :], mask=live[:, None] & (ks < limit)[None, :], other=0.0)
    else:
        mask = live[None, :, None] & (ks < limit)[:, None, :]
        x = tl.load(ptr + at[None, :, None] + ks[:, None, :], mask=mask, other=0.0)
    return x


@triton.jit
def load_right(ptr, at, ks, stride, live, limit, SLICES: tl.constexpr):
    """Columns of a right factor, in which `ks` lie `stride` apart; as of `load_left`, transposed."""
    if SLICES == 1:
        mask = (ks < limit)[:, None] & live[None, :]
        x = tl.load(ptr + ks[:, None] * stride + at[None, :], mask=mask, other=0.0)
    else:
        mask = (ks < limit)[:, :, None] & live[None, None, :]
        x = tl.load(ptr + ks[:, :, None] * stride + at[None, None, :], mask=mask, other=0.0)
    return x


@triton.jit
def load_lefts(ptr, at, ks, ks2, live, limit, K2: tl.constexpr, SLICES: tl.constexpr):
    """`load_left` of the blocks that there are."""
    blocks = (load_left(ptr, at, ks, live, limit, SLICES),)
    if K2 > 0:
        blocks += (load_left(ptr, at, ks2, live, limit, SLICES),)
    return blocks


@triton.jit
def load_rights(
    ptr, step, at, ks, ks2, stride, live, limit, COUNT: tl.constexpr, K2: tl.constexpr, SLICES: tl.constexpr
):
    """`load_right` of the blocks that there are of each of COUNT factors, which are `step` apart."""
    blocks = ()
    for k in tl.static_range(COUNT):
        blocks += (load_right(ptr + k * step, at, ks, stride, live, limit, SLICES),)
        if K2 > 0:
            blocks += (load_right(ptr + k * step, at, ks2, stride, live, limit, SLICES),)
    return blocks


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr, dtype: tl.constexpr):
    """Sums for `add`."""
    return tl.zeros((ROWS, COLUMNS), dtype) if SLICES == 1 else tl.zeros((SLICES, ROWS, COLUMNS), dtype)


@triton.jit
def add(left, right, acc, PRECISION: tl.constexpr, MATVEC: tl.constexpr = False):
    """acc + left @ right, slice by slice; with MATVEC row by row, without tensor cores and their sixteen rows."""
    if MATVEC:
        ROWS: tl.constexpr = left.shape[0]
        for r in tl.static_range(ROWS):
            chosen = tl.arange(0, ROWS)[:, None] == r
            row = tl.sum(tl.where(chosen, left, 0.0).to(acc.dtype), 0)
            acc += tl.where(chosen, tl.sum(row[:, None] * right.to(acc.dtype), 0)[None, :], 0.0)
    else:
        acc = dot(left, right, acc, PRECISION)
    return acc


@triton.jit
def add_all(lefts, rights, acc, PRECISION: tl.constexpr, MATVEC: tl.constexpr = False):
    """`add` of each block of the left factor with that of the right."""
    for k in tl.static_range(len(rights)):
        acc = add(lefts[k], rights[k], acc, PRECISION, MATVEC)
    return acc


@triton.jit
def total(acc, SLICES: tl.constexpr):
    """(rows, columns): the sum of the slices."""
    if SLICES > 1:
        acc = tl.sum(acc, 0)
    return acc
