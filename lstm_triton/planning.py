"""Which Triton strategy runs a layer, with which tiles."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from lstm_triton.cells.cell import Cell
from lstm_triton.cpu import processor
from lstm_triton.cpu.trim import GRAIN
from lstm_triton.dropout import PER_CALL

STRATEGIES = ("persistent", "cooperative", "step")

# Bytes of recurrent weights of a layer that is interpreted as `persistent`.
PERSISTENT_BYTES = 128 * 1024
# Rows of the batch that a program on a CPU has at most.
CPU_ROWS = 64
# `Limits.program_rows` of programs with more weights.
PROGRAM_ROWS = (1, 2.0)
# Steps that take as long as what a program does once: loading the weights and, fused, storing their gradients.
PROGRAM_STEPS = 16
# A fused kernel on a CPU goes through all weights, and their gradients, in each step: up to so many cost nothing much.
FUSED_WEIGHTS = 32 * 1024
MOST_WEIGHTS = 576 * 1024  # beyond which no kernel pays: PyTorch's products of large matrices are as fast
# On a packed batch, rows that each of its programs wants, for which it adds up gradients of its own (bench/ragged.py).
FUSED_PROGRAM_ROWS = 256
# Numbers that the tiles of the batch may add up together, each its own gradients of the weights.
FUSED_MOST_SUMS = 4 * 1024 * 1024
# Programs on a CPU that share the hidden units, at most.
COOPERATING = 4
# How much may be lost to padding, in rows of the batch and in units together, on packed batches, where PyTorch's
# operator takes longer: of all, and in training (bench/ragged.py).
PACKED_SPARE, PACKED_TRAINING_SPARE = 1.3, 1.7
# And where gates are rebuilt in backward, for which PyTorch's operator has to run its forward again (bench/long.py).
RECOMPUTE_SPARE = 1.3
# PyTorch's operators that oneDNN runs on a CPU. The others are loops over time steps in ATen, which kernels beat up to
# so many weights, as far as was measured, at 1 to 300 units (bench/cells.py).
ONEDNN, MOST_LOOPED_WEIGHTS = ("lstm",), 2 * 1024 * 1024

# The largest block of a product's inner dimension that isn't cut in two.
MOST_INNER = 512

_forced: str | None = None


class Limits(NamedTuple):
    """Where native kernels pay on a CPU: the faster it multiplies, the more what they load and store weighs."""

    row_weights: int  # for each so many weights, beyond `FUSED_WEIGHTS`, a fused kernel wants a row of the batch
    # The others are for dense batches.
    inference_weights: int  # the most in inference
    training_weights: int  # the most in training, for each row of the batch
    unfused_rows: range  # for which a kernel that isn't fused pays in training
    # A program with at most `FUSED_WEIGHTS`: with fewer rows than the first it takes as long as with these, and beside
    # its rows' it takes the time of so many more.
    program_rows: tuple[int, float]
    row_spare: tuple[tuple[int, float], ...]  # weights up to a number, and how many times as many rows may be run
    unit_spare: float  # the same of weights, for the units that padding adds


# By whether a core multiplies two vectors of 512 bits a cycle: measured on an Intel Xeon and on an AMD EPYC of Zen 4
# (bench/cpu.py).
LIMITS = {
    True: Limits(
        8 * 1024, 128 * 1024, 16 * 1024, range(4, 9), PROGRAM_ROWS,
        ((8 * 1024, 1.3), (32 * 1024, 1.15), (MOST_WEIGHTS, 1.02)), 1.15,
    ),
    False: Limits(
        64 * 1024, MOST_WEIGHTS, 64 * 1024, range(0), (2, 0.5),
        ((FUSED_WEIGHTS, math.inf), (MOST_WEIGHTS, 1.02)), math.inf,
    ),
}  # fmt: skip


def limits() -> Limits:
    """Those of this machine's processor."""
    return LIMITS[processor.multiplies_wide()]


@dataclass(frozen=True)
class Plan:
    """How a layer's recurrence runs in Triton kernels."""

    strategy: str
    block_b: int  # batch rows of a program
    block_h: int  # hidden units of a program
    block_k: int  # of the product's inner dimension at a time
    num_warps: int
    num_stages: int = 1
    fused: bool = False  # whether the products with the input and the weights' gradients are in the kernel, too
    # Of `cooperative`:
    slices: int = 1  # parts of the product's inner dimension, each multiplied by other warps
    matvec: bool = False  # forward alone: row by row, without tensor cores
    layers: int = 1  # that run in one launch, as a wavefront


def asked() -> str | None:
    """What `force` was called with."""
    return _forced


def forced() -> str | None:
    """The strategy that `force` asks for."""
    return "cooperative" if forces_wavefront() else _forced


def forces_wavefront() -> bool:
    """Whether layers that can share a "cooperative" launch should."""
    return _forced == "wavefront"


@contextmanager
def force(strategy: str) -> Iterator[None]:
    """Within this context every layer on backend "triton" runs by `strategy`.

    Args:
        strategy: one of `STRATEGIES`, or "wavefront", by which layers that can share a "cooperative" launch do so.
    """
    global _forced
    if strategy not in (*STRATEGIES, "wavefront"):
        raise ValueError(f"strategy should be one of {', '.join((*STRATEGIES, 'wavefront'))}, got {strategy!r}")
    previous, _forced = _forced, strategy
    try:
        yield
    finally:
        _forced = previous


def choose_interpreted(
    cell: Cell, batch: int, hidden: int, size: int, dtype: torch.dtype, strategy: str | None = None
) -> Plan:
    """The plan for a layer in Triton's interpreter, which is fastest with few programs.

    Args:
        cell: what is done in a step.
        batch: B.
        hidden: H.
        size: K, the size of h: `proj_size` or H.
        dtype: of input and weights.
        strategy: the one to take.
    """
    block_b, block_h, block_k = min(tile(batch), 64), tile(hidden), tile(size)
    if strategy == "cooperative":  # of programs that wait for each other, which only a simulation of them runs
        return Plan("cooperative", min(block_b, 16), max(PER_CALL, block_h // COOPERATING), min(block_k, 64), 4)
    few = dtype.itemsize * len(cell.recurrent) * block_h * block_k <= PERSISTENT_BYTES
    if (strategy or ("persistent" if few else "step")) == "persistent":
        return Plan("persistent", block_b, block_h, block_k, 4)
    return Plan("step", block_b, block_h if cell.whole_rows else min(block_h, 32), min(block_k, 64), 4)


@lru_cache(maxsize=256)
def choose_on_cpu(
    cell: Cell,
    batch: int,
    features: int,
    hidden: int,
    size: int,
    directions: int,
    threads: int,
    forced: str | None = None,
    lengths: tuple[int, ...] | None = None,
) -> Plan:
    """The plan for a layer in native kernels on a CPU.

    Args:
        cell, batch, hidden, size: as of `choose_interpreted`.
        features: I, the size of the input.
        directions: D.
        threads: that run the programs, each of which has a direction of some rows of the batch.
        forced: the strategy to take.
        lengths: of a packed batch, how many steps each of its rows has, the longest first.
    """

    found, weights = limits(), _trimmed_weights(cell, hidden, size, features)
    least, more = found.program_rows if weights <= FUSED_WEIGHTS else PROGRAM_ROWS

    def cost(rows: int) -> float:
        # Of the busiest thread: its rows, those past the batch among them, and something for each program.
        program = max(rows, least) + more
        if lengths is None:
            programs = -(-batch // rows) * directions
            return -(-programs // threads) * program
        # A program ends with the longest of its rows; threads take one after the other.
        busy = [0.0] * threads
        for steps in lengths[::rows]:
            for _ in range(directions):
                busy[busy.index(min(busy))] += (steps + PROGRAM_STEPS) * program
        return max(busy)

    block_b = min((1 << k for k in range(CPU_ROWS.bit_length())), key=lambda rows: (cost(rows), -rows))
    block_h, block_k = max(PER_CALL, _power(hidden)), max(PER_CALL, _power(size))
    if forced == "step":
        return Plan("step", block_b, block_h if cell.whole_rows else min(block_h, 32), min(block_k, 64), 1)
    if forced == "cooperative":  # never chosen here: threads that wait for each other cost more than they save
        units = max(PER_CALL, block_h // COOPERATING)
        return Plan("cooperative", min(block_b, 16), units, min(block_k, 64), 1)
    tiles = -(-batch // block_b)
    few = weights <= max(FUSED_WEIGHTS, min(block_b * found.row_weights, MOST_WEIGHTS))
    if lengths is not None:
        few = few and sum(lengths) >= tiles * FUSED_PROGRAM_ROWS
    fused = size == hidden and few and tiles * weights <= FUSED_MOST_SUMS
    return Plan("persistent", block_b, block_h, block_k, 1, fused=fused)


@lru_cache(maxsize=256)
def pays_on_cpu(
    cell: Cell,
    batch: int,
    features: int,
    hidden: int,
    size: int,
    directions: int,
    threads: int,
    packed: bool,
    records: bool,
    recompute: bool,
) -> bool:
    """Whether native kernels take less time than PyTorch's operator, in float32.

    Measured by `python -m bench.cpu`, `bench.ragged`, `bench.long` and `bench.cells`.

    Args:
        cell, batch, features, hidden, size, directions, threads: as of `choose_on_cpu`.
        packed, records, recompute: as of `lstm_triton.dispatch.auto`.
    """
    plan = choose_on_cpu(cell, batch, features, hidden, size, directions, threads)
    weights = _trimmed_weights(cell, hidden, size, features)
    if size != hidden or weights > (MOST_WEIGHTS if cell.operator in ONEDNN else MOST_LOOPED_WEIGHTS):
        return False
    if cell.operator not in ONEDNN:
        return True
    rows = -(-batch // plan.block_b) * plan.block_b / batch
    units = weights / _weights(cell, hidden, size, features)
    padding = rows * units
    if packed and batch > 1:
        return padding <= (PACKED_TRAINING_SPARE if records else PACKED_SPARE)
    if recompute and records:
        return padding <= RECOMPUTE_SPARE
    found = limits()
    most = found.training_weights * batch if records else found.inference_weights
    if not (plan.fused and weights <= most) and not (records and batch in found.unfused_rows):
        return False
    return units <= found.unit_spare and rows <= next(spare for most, spare in found.row_spare if weights <= most)


def blocks_of(size: int, slices: int) -> tuple[int, int]:
    """Two powers of two, or one and 0, that cover an inner dimension and can be cut into slices.

    A block is on its way through shared memory at a time: none has more than `MOST_INNER`, if two of that are enough.
    """
    least = 16 * slices
    first = max(least, 1 << (size.bit_length() - 1))
    if first >= size:
        return (first // 2, first // 2) if first > max(least, MOST_INNER) else (first, 0)
    return first, max(least, 1 << (size - first - 1).bit_length())


def _weights(cell: Cell, hidden: int, size: int, features: int) -> int:
    """Of a layer's direction, with h and the input of so many features."""
    return hidden * (len(cell.recurrent) * size + cell.inputs * features)


def _trimmed_weights(cell: Cell, *sizes: int) -> int:
    """With what is left of the padding on a CPU."""
    return _weights(cell, *(min(_power(n), -(-n // GRAIN) * GRAIN) for n in sizes))


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def tile(n: int) -> int:
    """The smallest power of two that holds n and that `tl.dot` takes."""
    return max(16, 1 << (n - 1).bit_length())
