"""Pieces that every kernel is made of: products, tanh, recurrent dropout, ragged rows."""

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import libdevice

from lstm_triton.dropout import ROUNDS

INTERPRETED = knobs.runtime.interpret

# Triton's interpreter multiplies the raw bits of bfloat16 operands, and cuts float32 off where it
# makes it bfloat16; `dot` and `cast` have it do as the hardware does.
_INTERPRETED = tl.constexpr(INTERPRETED)
_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in the accumulator's precision; `PRECISION` ("ieee" or "tf32") is for float32 operands."""
    if _INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in `dtype`, rounded to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def tanh(x):
    """tanh: that of the target's own library, and in the interpreter, which has none, to 1e-6 in float32."""
    if not _INTERPRETED:
        return libdevice.tanh(x)
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    y = tl.where(x < 0, -far, far)
    if x.dtype == tl.float32:
        # 1 - e loses digits near 0: the series there, whose next term is below 1e-8 of the result.
        s = x * x
        near = x * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
        y = tl.where(s < 0.0625, near, y)
    return y


@triton.jit
def drawn_mask(seed, stream, t, rows, first, threshold, scale, BLOCK_B: tl.constexpr, BLOCK: tl.constexpr):
    """The recurrent dropout mask of rows `rows` and units first … first + BLOCK - 1 (multiples of 8).

    Bit for bit that of `lstm_triton.dropout.masks`: a Philox call draws eight units.
    """
    zeros = tl.zeros((BLOCK_B, BLOCK // 8), tl.int32)
    calls = (first // 8 + tl.arange(0, BLOCK // 8))[None, :] + zeros
    row = rows[:, None].to(tl.int32) + zeros
    w0, w1, w2, w3 = tl.philox(seed, calls, row, zeros + t, zeros + stream, _ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK_B, BLOCK))
    return tl.where(halves.to(tl.int32) >= threshold, scale, 0.0)


@triton.jit
def mask_tile(
    mask_ptr,  # (D, T or 1, B, K) where DROPOUT is "given", else one int64, the seed
    d, t, steps, B, rows, first, units, live, threshold, scale, stream,
    K: tl.constexpr, DROPOUT: tl.constexpr, PER_STEP: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What h_{t-1} is multiplied by: rows `rows`, units first … of direction d."""
    which = t if PER_STEP else 0
    if DROPOUT == "given":
        at = (((d * steps + which).to(tl.int64) * B + rows) * K)[:, None] + units[None, :]
        return tl.load(mask_ptr + at, mask=live[:, None] & (units < K)[None, :], other=0.0)
    else:
        return drawn_mask(tl.load(mask_ptr), stream + d, which, rows, first, threshold, scale, BLOCK_B, BLOCK)


@triton.jit
def as_multiplied(
    h, mask_ptr, z, t, T, mask_steps, B, rows, first, units, live, threshold, scale, stream,
    H: tl.constexpr, DROPOUT: tl.constexpr, PER_STEP: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, kept: tl.constexpr,
):  # fmt: skip
    """h under the recurrent dropout of step t; of a step that isn't there, any."""
    if DROPOUT != "none":
        m = mask_tile(
            mask_ptr, z, tl.minimum(tl.maximum(t, 0), T - 1), mask_steps, B, rows, first, units, live,
            threshold, scale, stream, H, DROPOUT, PER_STEP, BLOCK_B, BLOCK_H,
        )  # fmt: skip
        h = cast(h.to(kept) * m, h.dtype)
    return h


@triton.jit
def rows_of_step(offsets_ptr, t, low, high, B, rows, RAGGED: tl.constexpr):
    """Where batch rows `rows` are among the N at step t, and which of them it has: none outside low … high - 1."""
    inside = (t >= low) & (t < high)
    t = tl.where(inside, t, low)
    start = row_of_step(offsets_ptr, t, B, RAGGED)
    count = tl.load(offsets_ptr + t + 1) - start if RAGGED else B
    return start + rows, rows < tl.where(inside, count, 0)


@triton.jit
def row_of_step(offsets_ptr, t, B, RAGGED: tl.constexpr):
    """The first row of step t among the N."""
    return tl.load(offsets_ptr + t) if RAGGED else t.to(tl.int64) * B


@triton.jit
def steps_of_window(d, T, first, last):
    """Direction d's steps low … high - 1 in the passes first … last - 1 (`lstm_triton.recurrence.Window`)."""
    return tl.where(d == 0, first, T - last), tl.where(d == 0, last, T - first)


@triton.jit
def passes_of_tile(offsets_ptr, d, T, first, last, row, RAGGED: tl.constexpr):
    """Of the passes first … last - 1 those in which batch row `row`, the longest of a tile, has a step."""
    begin, end = first, last
    if RAGGED:
        length = tl.load(offsets_ptr + T + 1 + row).to(tl.int32)
        begin = tl.where(d == 0, first, tl.maximum(first, T - length))
        end = tl.where(d == 0, tl.minimum(last, length), last)
    return begin, end
