"""Which Triton strategy runs a layer, with which tiles, and the way to its launcher."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lstm_triton.recurrence import Gradients, Layout, Recurrence, RecurrentDropout, rnn_precision

STRATEGIES = ("persistent", "step")

# Bytes of recurrent weights that `persistent` may keep on chip: an SM of sm_80 and newer has 256 KiB
# of registers, of which the states and gates of a batch tile need the other half.
PERSISTENT_BYTES = 128 * 1024

_forced: str | None = None


@dataclass(frozen=True)
class Plan:
    """How a layer's recurrence runs on a GPU."""

    strategy: str
    block_b: int  # batch rows of a program
    block_h: int  # hidden units of a program
    block_k: int  # of the product's inner dimension at a time
    num_warps: int
    num_stages: int = 1


@contextmanager
def force(strategy: str) -> Iterator[None]:
    """Within this context every layer on backend "triton" runs by `strategy`, "step" or "persistent"."""
    global _forced
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy should be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    previous, _forced = _forced, strategy
    try:
        yield
    finally:
        _forced = previous


def choose(batch: int, hidden: int, size: int, dtype: torch.dtype, interpreted: bool = False) -> Plan:
    """The plan for a layer.

    Args:
        batch: B.
        hidden: H.
        size: K, the size of h: `proj_size` or H.
        dtype: of input and weights.
        interpreted: whether the kernels run in Triton's interpreter, which is fastest with few programs.
    """
    block_h, block_k = tile(hidden), tile(size)
    weights = 4 * block_h * block_k + (block_h * block_k if size != hidden else 0)
    fits = weights * dtype.itemsize <= PERSISTENT_BYTES
    # tl.dot takes 16 rows or more; more programs with few rows each hide latency better.
    block_b = min(tile(batch), 64) if interpreted else 16
    if (_forced or ("persistent" if fits else "step")) == "persistent":
        return Plan("persistent", block_b, block_h, block_k, num_warps=4 if max(block_h, block_k) <= 64 else 8)
    return Plan("step", block_b, min(block_h, 32), min(block_k, 64), num_warps=4, num_stages=2)


def tile(n: int) -> int:
    """The smallest power of two that holds n and that `tl.dot` takes."""
    return max(16, 1 << (n - 1).bit_length())


def forward(
    gates: Tensor,
    hx: Tensor,
    cx: Tensor,
    weight_hh: list[Tensor],
    weight_hr: list[Tensor],
    layout: Layout,
    dropout: RecurrentDropout,
    save: bool,
) -> Recurrence:
    """`lstm_triton.eager.forward` by Triton kernels."""
    from lstm_triton import kernels

    launch = kernels.Launch.of(
        choose(layout.batch, cx.size(2), hx.size(2), gates.dtype, kernels.INTERPRETED),
        gates, hx, cx, weight_hh, weight_hr, layout, dropout, rnn_precision(gates.device),
    )  # fmt: skip
    return kernels.STRATEGIES[launch.plan.strategy].forward(launch, gates, hx.contiguous(), cx.contiguous(), save)


def backward(
    doutput: Tensor,
    dhn: Tensor,
    dcn: Tensor,
    saved: Recurrence,
    hx: Tensor,
    cx: Tensor,
    weight_hh: list[Tensor],
    weight_hr: list[Tensor],
    layout: Layout,
    dropout: RecurrentDropout,
) -> Gradients:
    """`lstm_triton.eager.backward` by Triton kernels."""
    from lstm_triton import kernels

    launch = kernels.Launch.of(
        choose(layout.batch, cx.size(2), hx.size(2), saved.gates.dtype, kernels.INTERPRETED),
        saved.gates, hx, cx, weight_hh, weight_hr, layout, dropout, rnn_precision(hx.device),
    )  # fmt: skip
    strategy = kernels.STRATEGIES[launch.plan.strategy]
    return strategy.backward(launch, doutput, dhn, dcn, saved, hx.contiguous(), cx.contiguous())
