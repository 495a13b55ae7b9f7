"""Recurrent dropout: masks on h_{t-1} from a counter-based generator.

Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with seven
rounds, the fewest that the authors found to pass every test of BigCrush. A mask element is a
function of (seed, stream, time step, batch row, unit) alone, so the Triton kernels draw the
same bits in registers (`kernels/blocks.py`) and nothing has to be stored for backward there.
"""

import torch
from torch import Tensor

ROUNDS = 7
_WORD = 0xFFFFFFFF


def threshold_and_scale(p: float) -> tuple[int, float]:
    """The 31-bit number below which an element is dropped, and what kept elements are multiplied by.

    The scale is rounded to float32, as a kernel argument is, so that every backend has the same mask.
    """
    scale = 0.0 if p >= 1 else float(torch.tensor(1 / (1 - p), dtype=torch.float32))
    return min(round(p * 2**31), 2**31 - 1), scale


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: int) -> tuple[Tensor, ...]:
    """Four 32-bit words, as int64 tensors, for each counter (c0, c1, c2, c3); `seed` holds one int64."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    w0, w1, w2, w3 = c0, c1, c2, torch.full_like(c0, c3)
    for _ in range(ROUNDS):
        # The product of two 32-bit words wraps in int64, but its 64 bits are right.
        a, b = w0 * 0xD2511F53, w2 * 0xCD9E8D57
        w0, w1 = (b >> 32) & _WORD ^ w1 ^ k0, b & _WORD
        w2, w3 = (a >> 32) & _WORD ^ w3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return w0, w1, w2, w3


def recurrent_mask(
    seed: Tensor, steps: int, batch: int, units: int, p: float, stream: int, dtype: torch.dtype
) -> Tensor:
    """The mask of one direction of one layer.

    Args:
        seed: one int64, on the device where the mask is wanted.
        steps: masks drawn: T (a fresh one each time step) or 1 (the same for the sequence).
        batch, units: B and the size of h.
        p: probability of an element being zeroed, in [0, 1].
        stream: tells layers and directions apart: ``layer * num_directions + direction``.
        dtype: of the result.

    Returns:
        (steps, batch, units): 0 with probability p, else 1 / (1 - p).
    """
    threshold, scale = threshold_and_scale(p)
    quads = (units + 3) // 4
    shape = (steps, batch, quads)
    index = [torch.arange(n, device=seed.device) for n in shape]
    c2, c1, c0 = (i.view([-1 if d == k else 1 for k in range(3)]).expand(shape) for d, i in enumerate(index))
    words = torch.stack(philox(seed, c0, c1, c2, stream), -1).view(steps, batch, 4 * quads)[..., :units]
    return ((words >> 1) >= threshold).to(dtype) * scale
