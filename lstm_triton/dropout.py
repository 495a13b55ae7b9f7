"""Recurrent dropout: masks on h_{t-1} from a counter-based generator.

Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with seven
rounds, the fewest that the authors found to pass every test of BigCrush. A mask element is a
function of (seed, stream, time step, batch row, unit) alone, so the Triton kernels draw the
same bits in registers (`kernels/blocks.py`) and nothing has to be stored for backward there.
"""

import torch
from torch import Tensor

ROUNDS = 7
# A call of the generator gives four words of 32 bits: eight mask elements of 16 bits.
PER_CALL = 8
_WORD = 0xFFFFFFFF


def threshold_and_scale(p: float) -> tuple[int, float]:
    """The 16-bit number below which an element is dropped, and what kept elements are multiplied by.

    p is thereby rounded to 2⁻¹⁶; the scale is one over the exact probability of being kept, rounded
    to float32 as a kernel argument is, so that every backend has the same mask.
    """
    threshold = round(p * 2**16)
    kept = 1 - threshold / 2**16
    return threshold, float(torch.tensor(1 / kept, dtype=torch.float32)) if kept else 0.0


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, ...]:
    """Four 32-bit words, as int64 tensors, for each counter (c0, c1, c2, c3); `seed` holds one int64."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    w0, w1, w2, w3 = c0, c1, c2, c3
    for _ in range(ROUNDS):
        # The product of two 32-bit words wraps in int64, but its 64 bits are right.
        a, b = w0 * 0xD2511F53, w2 * 0xCD9E8D57
        w0, w1 = ((b >> 32) & _WORD) ^ (w1 ^ k0), b & _WORD
        w2, w3 = ((a >> 32) & _WORD) ^ (w3 ^ k1), a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return w0, w1, w2, w3


def recurrent_masks(
    seed: Tensor, streams: range, steps: int, batch: int, units: int, p: float, dtype: torch.dtype
) -> Tensor:
    """The masks of some layers and directions.

    Args:
        seed: one int64, on the device where the masks are wanted.
        streams: those wanted; that of a layer's direction is ``layer * num_directions + direction``.
        steps: masks drawn: T (a fresh one each time step) or 1 (the same for the sequence).
        batch, units: B and the size of h.
        p: probability of an element being zeroed, in [0, 1].
        dtype: of the result.

    Returns:
        (streams, steps, batch, units): 0 with probability p, else 1 / (1 - p).
    """
    threshold, scale = threshold_and_scale(p)
    calls = (units + PER_CALL - 1) // PER_CALL
    device = seed.device
    # Each counter has an axis of its own; they meet in the first rounds.
    c3 = torch.arange(streams.start, streams.stop, device=device).view(-1, 1, 1, 1)
    c2 = torch.arange(steps, device=device).view(-1, 1, 1)
    c1 = torch.arange(batch, device=device).view(-1, 1)
    c0 = torch.arange(calls, device=device)
    words = torch.stack(torch.broadcast_tensors(*philox(seed, c0, c1, c2, c3)), -1)
    halves = torch.stack([words & 0xFFFF, words >> 16], -1)
    elements = halves.view(len(streams), steps, batch, calls * PER_CALL)[..., :units]
    return (elements >= threshold).to(dtype) * scale
