"""The pointwise part of a step, whatever the cell, and zoneout around it.

Zoneout (Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations", 2016): with the masks
d of a step, c = d_c ⊙ c_prev + (1 - d_c) ⊙ c̃ and h = d_h ⊙ h_prev + (1 - d_h) ⊙ h̃, where c̃ and h̃ are the cell's; in
evaluation the probabilities are in the masks' place.
"""

import triton
import triton.language as tl

from lstm_triton.dropout import ZONEOUT_C, ZONEOUT_H
from lstm_triton.kernels.blocks import drawn_mask

_ZONEOUT_H = tl.constexpr(ZONEOUT_H)
_ZONEOUT_C = tl.constexpr(ZONEOUT_C)


@triton.jit
def run_forward(CELL: tl.constexpr, sums, c, parameters, live, H: tl.constexpr, WHOLE_ROWS: tl.constexpr):
    """What a cell keeps, c and q; `live` (1, BLOCK_H) says which units there are."""
    if WHOLE_ROWS:
        saved, c, q = CELL(sums, c, parameters, (live, H))
    else:
        saved, c, q = CELL(sums, c, parameters)
    return saved, c, q


@triton.jit
def run_backward(
    CELL: tl.constexpr, saved, c, c_prev, dq, dc, parameters, live, H: tl.constexpr, WHOLE_ROWS: tl.constexpr
):
    """The gradients of the sums, of c_prev and of the parameters."""
    if WHOLE_ROWS:
        dsums, dc_prev, dparameters = CELL(saved, c, c_prev, dq, dc, parameters, (live, H))
    else:
        dsums, dc_prev, dparameters = CELL(saved, c, c_prev, dq, dc, parameters)
    return dsums, dc_prev, dparameters


@triton.jit
def zoned(
    seed_ptr, d, t, rows, first, stream, threshold_h, p_h, threshold_c, p_c,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, ZONEOUT: tl.constexpr,
):  # fmt: skip
    """How much of h and c stays at step t: 0 or 1, where ZONEOUT is "drawn", else the probabilities."""
    if ZONEOUT == "drawn":
        seed = tl.load(seed_ptr)
        of_h = 1 - drawn_mask(seed, _ZONEOUT_H + stream + d, t, rows, first, threshold_h, 1.0, BLOCK_B, BLOCK_H)
        of_c = 1 - drawn_mask(seed, _ZONEOUT_C + stream + d, t, rows, first, threshold_c, 1.0, BLOCK_B, BLOCK_H)
    else:
        of_h = tl.zeros((BLOCK_B, BLOCK_H), tl.float32) + p_h
        of_c = tl.zeros((BLOCK_B, BLOCK_H), tl.float32) + p_c
    return of_h, of_c
