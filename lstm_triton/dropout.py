"""Recurrent dropout: masks on h_{t-1} from a counter-based generator.

Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with seven
rounds, the fewest that the authors found to pass every test of BigCrush. A mask element is a
function of (seed, stream, time step, batch row, unit) alone, so the Triton kernels draw the
same bits in registers (`kernels/blocks.py`) and nothing has to be stored for backward there.
"""

from functools import lru_cache

import torch
from torch import Tensor

ROUNDS = 7
# A call of the generator gives four words of 32 bits: eight mask elements of 16 bits.
PER_CALL = 8
_WORD = 0xFFFFFFFF


@lru_cache(maxsize=64)
def threshold_and_scale(p: float) -> tuple[int, float]:
    """The 16-bit number below which an element is dropped, and what kept elements are multiplied by.

    p is thereby rounded to 2⁻¹⁶; the scale is one over the exact probability of being kept, rounded
    to float32 as a kernel argument is, so that every backend has the same mask. Where nothing is kept,
    the scale is 0.
    """
    dropped = round(p * 2**16)
    scale = float(torch.tensor(1 / (1 - dropped / 2**16), dtype=torch.float32)) if dropped < 2**16 else 0.0
    return min(dropped, 2**16 - 1), scale


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> list[Tensor]:
    """Four 32-bit words, in the low halves of int64, for each counter (c0, c1, c2, c3); `seed` holds one int64."""
    rounds = torch.arange(ROUNDS, device=seed.device)
    k0 = (((seed & _WORD) + 0x9E3779B9 * rounds) & _WORD).unbind()
    k1 = (((seed >> 32 & _WORD) + 0xBB67AE85 * rounds) & _WORD).unbind()
    # The product of two 32-bit words wraps in int64, but its 64 bits are right. Its low word is only
    # xored next: what stands above it is cut off there.
    for r in range(ROUNDS):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = ((b >> 32) ^ (c1 ^ k0[r])).bitwise_and_(_WORD)
        c2 = ((a >> 32) ^ (c3 ^ k1[r])).bitwise_and_(_WORD)
        c1, c3 = b, a
    return [c0, c1, c2, c3]


# The streams of dropout between layers begin here, as does that of a layer; of zoneout here and there, with the numbers
# that a layer's direction has in recurrent dropout, whose streams begin with 0.
BETWEEN = 2**30
ZONEOUT_H, ZONEOUT_C = 2**28, 2**29
# Elements that `drop` draws at a time: the generator's words take some hundred bytes for each eight of them.
_AT_A_TIME = 2**20


def masks(seed: Tensor, streams: range, steps: range, rows: range, units: int, p: float, dtype: torch.dtype) -> Tensor:
    """The masks of some layers and directions.

    Args:
        seed: one int64, on the device where the masks are wanted.
        streams: those wanted; that of a layer's direction is ``layer * num_directions + direction``.
        steps: those wanted: of a fresh mask each time step, or ``range(1)`` for one mask for the sequence.
        rows: those of the batch.
        units: the size of h.
        p: probability of an element being zeroed, in [0, 1].
        dtype: of the result.

    Returns:
        (streams, steps, rows, units): 0 with probability p, else 1 / (1 - p).
    """
    threshold, scale = threshold_and_scale(p)
    calls = (units + PER_CALL - 1) // PER_CALL
    device = seed.device
    # Each counter has an axis of its own; they meet in the first rounds.
    c3 = torch.arange(streams.start, streams.stop, device=device).view(-1, 1, 1, 1)
    c2 = torch.arange(steps.start, steps.stop, device=device).view(-1, 1, 1)
    c1 = torch.arange(rows.start, rows.stop, device=device).view(-1, 1)
    c0 = torch.arange(calls, device=device)
    words = torch.stack(torch.broadcast_tensors(*philox(seed, c0, c1, c2, c3)), -1)
    # The 16-bit halves of the words, the lower one first; with the sign bit turned over, signed
    # numbers compare as unsigned ones do.
    halves = words.to(torch.int32).view(torch.int16).bitwise_xor_(-(2**15))
    elements = halves.view(len(streams), len(steps), len(rows), calls * PER_CALL)[..., :units]
    return (elements >= threshold - 2**15).to(dtype).mul_(scale)


def drop(x: Tensor, seed: Tensor, stream: int, p: float) -> Tensor:
    """Dropout of the rows between two layers.

    Args:
        x: (N, F), F the features of each row.
        seed, p: as of `masks`.
        stream: of the mask, whose rows are those of `x` as those of a batch at step 0.

    Returns:
        (N, F) elements of x, 0 with probability p, else divided by 1 - p.
    """
    total, features = x.shape
    kept = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty_like(x)
    each = max(1, _AT_A_TIME // features)
    for first in range(0, total, each):
        rows = range(first, min(first + each, total))
        mask = masks(seed, range(stream, stream + 1), range(1), rows, features, p, kept)[0, 0]
        torch.mul(x[rows.start : rows.stop], mask, out=mask)
        out[rows.start : rows.stop] = mask
    return out
