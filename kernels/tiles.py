"""Tuples of tiles: those of a cell's sums, of what it keeps, and of its weights, one for each gate."""

import triton
import triton.language as tl

from lstm_triton.kernels.blocks import cast, dot


@triton.jit
def load(ptr, step, mask, COUNT: tl.constexpr):
    """COUNT tiles at `ptr`, `step` numbers apart."""
    tiles = ()
    for k in tl.static_range(COUNT):
        tiles += (tl.load(ptr + k * step, mask=mask, other=0.0),)
    return tiles


@triton.jit
def load_as(ptr, step, mask, COUNT: tl.constexpr, dtype: tl.constexpr):
    """`load` in a dtype."""
    tiles = ()
    for k in tl.static_range(COUNT):
        tiles += (tl.load(ptr + k * step, mask=mask, other=0.0).to(dtype),)
    return tiles


@triton.jit
def store(ptr, step, tiles, mask):
    """Tiles, `step` numbers apart, in the dtype that is there."""
    for k in tl.static_range(len(tiles)):
        tl.store(ptr + k * step, cast(tiles[k], ptr.dtype.element_ty), mask=mask)


@triton.jit
def cast_all(tiles, dtype: tl.constexpr):
    found = ()
    for k in tl.static_range(len(tiles)):
        found += (cast(tiles[k], dtype),)
    return found


@triton.jit
def where(live, tiles):
    """Tiles whose rows that aren't live are 0."""
    found = ()
    for k in tl.static_range(len(tiles)):
        found += (tl.where(live[:, None], tiles[k], 0.0),)
    return found


@triton.jit
def zeros(COUNT: tl.constexpr, shape: tl.constexpr, dtype: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles += (tl.zeros(shape, dtype),)
    return tiles


@triton.jit
def add_rows(vectors, tiles):
    """To each vector the sum of a tile's rows."""
    found = ()
    for k in tl.static_range(len(vectors)):
        found += (vectors[k] + tl.sum(tiles[k], 0),)
    return found


@triton.jit
def add_products(left, rights, sums, RECURRENT: tl.constexpr, PRECISION: tl.constexpr):
    """Sums, those of RECURRENT with a product left @ rights[r] added."""
    found = ()
    for k in tl.static_range(len(sums)):
        a = sums[k]
        for r in tl.static_range(len(RECURRENT)):
            if RECURRENT[r] == k:
                a = dot(left, rights[r], a, PRECISION)
        found += (a,)
    return found


@triton.jit
def add_transposed(lefts, right, sums, OF: tl.constexpr, PRECISION: tl.constexpr):
    """Sums with lefts[OF[r]]ᵀ @ right added: gradients of weights."""
    found = ()
    for r in tl.static_range(len(OF)):
        found += (dot(tl.trans(lefts[OF[r]]), right, sums[r], PRECISION),)
    return found


@triton.jit
def product_of_all(lefts, rights, acc, OF: tl.constexpr, PRECISION: tl.constexpr):
    """acc + the sum of lefts[OF[r]] @ rights[r]."""
    for r in tl.static_range(len(OF)):
        acc = dot(lefts[OF[r]], rights[r], acc, PRECISION)
    return acc


@triton.jit
def biases(
    b_ih_ptr, b_hh_ptr, units, H: tl.constexpr, BLOCK_H: tl.constexpr, SUMS: tl.constexpr, INPUTS: tl.constexpr,
    BIASED: tl.constexpr, BIAS: tl.constexpr, FUSED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """What the sums begin with, vectors over the units: biases, where the input's products don't have them already."""
    live = units < H
    found = ()
    for k in tl.static_range(SUMS):
        b = tl.zeros((BLOCK_H,), dtype)
        if BIAS and (FUSED or k >= len(INPUTS)):
            if k < len(INPUTS):
                b += tl.load(b_ih_ptr + k * H + units, mask=live, other=0.0).to(dtype)
            for r in tl.static_range(len(BIASED)):
                if BIASED[r] == k:
                    b += tl.load(b_hh_ptr + r * H + units, mask=live, other=0.0).to(dtype)
        found += (b,)
    return found


@triton.jit
def store_some(ptr, step, tiles, mask, OF: tl.constexpr):
    """The tiles whose numbers are in OF, one after the other."""
    for r in tl.static_range(len(OF)):
        tl.store(ptr + r * step, cast(tiles[OF[r]], ptr.dtype.element_ty), mask=mask)


@triton.jit
def begin(
    ptr, step, mask, biases, INPUTS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, dtype: tl.constexpr
):
    """A step's sums before its product with h: the input's products from memory, of the others the biases."""
    found = ()
    for k in tl.static_range(len(biases)):
        if k < len(INPUTS):
            found += (tl.load(ptr + k * step, mask=mask, other=0.0).to(dtype),)
        else:
            found += (tl.broadcast_to(biases[k][None, :], (BLOCK_B, BLOCK_H)),)
    return found


@triton.jit
def add_biases(tiles, biases, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """A step's sums from the input's products: with biases, and the other sums, which are biases alone."""
    found = ()
    for k in tl.static_range(len(biases)):
        b = tl.broadcast_to(biases[k][None, :], (BLOCK_B, BLOCK_H))
        found += (tiles[k] + b if k < len(tiles) else b,)
    return found


@triton.jit
def times(tiles, factors):
    """As many products as there are `tiles`."""
    found = ()
    for k in tl.static_range(len(tiles)):
        found += (tiles[k] * factors[k],)
    return found


@triton.jit
def add_products_of_rows(left, rights, sums, PRECISION: tl.constexpr):
    """Sums with left @ rights[k]ᵀ added."""
    found = ()
    for k in tl.static_range(len(sums)):
        found += (dot(left, tl.trans(rights[k]), sums[k], PRECISION),)
    return found
