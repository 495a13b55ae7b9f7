"""Dropout of the rows between two layers; as of everything random here, the mask is drawn again, not kept."""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lstm_triton.dropout import PER_CALL, threshold_and_scale
from lstm_triton.kernels.blocks import cast, drawn_mask
from lstm_triton.kernels.launch import start


@triton.jit(do_not_specialize=["N", "threshold", "stream"])
def drop_kernel(
    x_ptr,  # (N, F)
    out_ptr,  # (N, F)
    seed_ptr,  # one int64
    N, threshold, scale, stream,
    F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # A program owns a tile of rows and of features.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_F
    units = first + tl.arange(0, BLOCK_F)
    at = (rows * F)[:, None] + units[None, :]
    mask = (rows < N)[:, None] & (units < F)[None, :]
    m = drawn_mask(tl.load(seed_ptr), stream, 0, rows, first, threshold, scale, BLOCK_N, BLOCK_F)
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    tl.store(out_ptr + at, cast(x * m, x.dtype), mask=mask)


@lru_cache(maxsize=64)
def _constants(features: int, dtype: torch.dtype) -> dict[str, Any]:
    """One dictionary for all calls of a kind, as `start` wants it."""
    block = min(64, max(PER_CALL, triton.next_power_of_2(features)))
    return {"F": features, "BLOCK_N": 16, "BLOCK_F": block, "num_warps": 4, "num_stages": 1}


def drop(x: Tensor, seed: Tensor, stream: int, p: float) -> Tensor:
    """x (N, F) under the mask of `lstm_triton.dropout.drop`, which says what the arguments are."""
    constants, out = _constants(x.size(1), x.dtype), torch.empty_like(x)
    grid = -(-x.size(0) // constants["BLOCK_N"]), -(-x.size(1) // constants["BLOCK_F"]), 1
    start(drop_kernel, grid, [x, out, seed, x.size(0), *threshold_and_scale(p), stream], constants)
    return out
