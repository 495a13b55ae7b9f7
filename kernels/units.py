"""What cells that look at all hidden units of a row use: layer norm over tiles of them, forward and backward.

`units` is what a driver gives a cell: a mask (1, BLOCK_H) of the tile's units that there are, and their number H.
"""

import triton
import triton.language as tl


@triton.jit
def total(x, units):
    """(rows, 1): the sums over all hidden units."""
    return tl.sum(tl.where(units[0], x, 0.0), 1)[:, None]


@triton.jit
def normalized(tiles, units, EPSILON: tl.constexpr):
    """Tiles of one vector a row as (x - mean) / √(variance + ε) of the whole vector, and the factor that is divided by.

    Source: Ba, Kiros & Hinton, "Layer normalization", 2016.
    """
    count = len(tiles) * units[1]
    along = tiles[0]  # tiles are added up before their units are: one reduction in place of several
    for k in tl.static_range(1, len(tiles)):
        along += tiles[k]
    mean = total(along, units) / count
    apart = ()
    for k in tl.static_range(len(tiles)):
        apart += (tiles[k] - mean,)
    squares = apart[0] * apart[0]
    for k in tl.static_range(1, len(tiles)):
        squares += apart[k] * apart[k]
    factor = 1 / tl.sqrt(total(squares, units) / count + EPSILON)
    found = ()
    for k in tl.static_range(len(tiles)):
        found += (apart[k] * factor,)
    return found, factor


@triton.jit
def through_norm(gradients, tiles, factor, units):
    """The gradients of what `normalized` got, from those of what it returned, `tiles` and `factor`."""
    count = len(tiles) * units[1]
    mean = gradients[0]
    along = gradients[0] * tiles[0]
    for k in tl.static_range(1, len(tiles)):
        mean += gradients[k]
        along += gradients[k] * tiles[k]
    mean = total(mean, units) / count
    along = total(along, units) / count
    found = ()
    for k in tl.static_range(len(tiles)):
        found += (factor * (gradients[k] - mean - tiles[k] * along),)
    return found
