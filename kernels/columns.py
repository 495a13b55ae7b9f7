"""A step's products with h as one, whose columns the sums of a unit are side by side, for splits to take apart.

Column C u + r is the r-th of the sums that have such a product, of unit u. C is the least power of two that is enough:
with three sums a quarter of the columns is dead.
"""

import triton
import triton.language as tl


@triton.jit
def places(
    first, H: tl.constexpr, BLOCK_H: tl.constexpr, COLUMNS: tl.constexpr, RECURRENT: tl.constexpr, INPUTS: tl.constexpr
):
    """Of each column of units first … first + BLOCK_H - 1, vectors: two numbers, and whether they are.

    Returns:
        its row in weight_hh, whether there is one, its place among a row's sums, whether that has an input's product.
    """
    columns = tl.arange(0, COLUMNS * BLOCK_H)
    units, r = first + columns // COLUMNS, columns % COLUMNS
    bound = tl.where(r < len(RECURRENT), H, 0)
    k = r
    for j in tl.static_range(len(RECURRENT)):
        if RECURRENT[j] != j:
            k = tl.where(r == j, RECURRENT[j], k)
    return r * H + units, units < bound, k * H + units, units < tl.where(k < len(INPUTS), bound, 0)


@triton.jit
def begin(ptr, at, live, places, summed, units, H: tl.constexpr, OTHERS: tl.constexpr, dtype: tl.constexpr):
    """The input's products of a step: (rows, C * BLOCK_H) those of the columns, and a tile for each of the others.

    Args:
        ptr, at, live: (rows,) where the rows' sums are, and which rows there are.
        places, summed: the last two that `places` returned.
        units: (BLOCK_H,).
        OTHERS: the sums that have a product with the input, but none with h.
    """
    a = tl.load(ptr + at[:, None] + places[None, :], mask=live[:, None] & summed[None, :], other=0.0).to(dtype)
    others = ()
    for j in tl.static_range(len(OTHERS)):
        of_units = ptr + OTHERS[j] * H + at[:, None] + units[None, :]
        others += (tl.load(of_units, mask=live[:, None] & (units < H)[None, :], other=0.0).to(dtype),)
    return a, others


@triton.jit
def split(a, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, COLUMNS: tl.constexpr):
    """(BLOCK_B, C * BLOCK_H) as C tiles (BLOCK_B, BLOCK_H)."""
    found = (a,)
    # Each split is by the lowest bit of the columns' numbers in a tile: tile j has those that end in the bits of j.
    for level in tl.static_range(COLUMNS):
        if COLUMNS >> level > 1:
            even = ()
            odd = ()
            for j in tl.static_range(len(found)):
                x, y = tl.split(tl.reshape(found[j], (BLOCK_B, BLOCK_H * (COLUMNS >> (level + 1)), 2)))
                even += (x,)
                odd += (y,)
            found = even + odd
    return found


@triton.jit
def sums(parts, others, biases, INPUTS: tl.constexpr, RECURRENT: tl.constexpr, OTHERS: tl.constexpr):
    """All sums of a step in their order, from those of the columns, the others, and what those without input have.

    Args:
        parts: what `split` returned.
        others: as of `begin`.
        biases: for each sum a vector over the units.
    """
    found = ()
    for k in tl.static_range(len(biases)):
        a = tl.zeros_like(parts[0])
        for j in tl.static_range(len(OTHERS)):
            if OTHERS[j] == k:
                a = others[j]
        for r in tl.static_range(len(RECURRENT)):
            if RECURRENT[r] == k:
                a = parts[r]
        if k >= len(INPUTS):
            a += biases[k][None, :]
        found += (a,)
    return found
