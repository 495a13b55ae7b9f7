"""What all launchers share: the arguments of a layer's kernels, laid out and allocated."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lstm_triton.cells.cell import Cell
from lstm_triton.cpu import native
from lstm_triton.dropout import PER_CALL, threshold_and_scale
from lstm_triton.kernels import barrier
from lstm_triton.kernels.blocks import INTERPRETED
from lstm_triton.planning import Plan, blocks_of
from lstm_triton.recurrence import Direction, Gradients, Layer, Layout, Pass, Saved, Window, rnn_precision, rounded

# Kernel arguments that vary from call to call and must not compile a kernel anew.
RUN_TIME = [
    "T", "first", "last", "B", "n", "s", "threshold", "stream", "mask_steps", "threshold_h", "threshold_c"
]  # fmt: skip

COOPERATIVE_RUN_TIME = [*RUN_TIME, "rounds", "launch", "between_threshold", "between_stream"]

REGISTERS = 65536  # of an SM, of each NVIDIA GPU since sm_35
# Hidden units of a program that rebuilds gates: none waits for the others', so that there may be many programs.
REBUILT_UNITS = 64

_prepared: dict[tuple[int, ...], tuple[Any, ...]] = {}


def start(kernel: Any, grid: tuple[int, int, int], args: list[Any], shared: dict[str, Any], **own: Any) -> None:
    """Launches a kernel where its tensors are: on a GPU, on the CPU, or there in Triton's interpreter.

    Args:
        kernel: a `triton.jit` function.
        grid: numbers of programs.
        args: its arguments that are no constants.
        shared: the constants of a `Launch`; the types of `args` follow from them.
        own: further constants, each one of a few objects that live on.
    """
    if INTERPRETED or args[0].is_cuda:
        kernel[grid](*args, **shared, **own)
        return
    # Found by identity, which is a good part faster than by value; the entry keeps alive what it is found by.
    key = (id(kernel), id(shared), *map(id, own.values()))
    entry = _prepared.get(key)
    if entry is None:
        entry = _prepared[key] = (native.Prepared(kernel, tuple(args), shared | own), kernel, shared, own)
    entry[0].run(grid, args)


@dataclass(slots=True)
class Launch:
    """One layer's call: its plan, sizes (`lstm_triton.recurrence`) and kernel arguments.

    Where a kernel has no use for a tensor, any other stands in.
    """

    plan: Plan
    layout: Layout
    D: int
    T: int
    B: int
    H: int
    K: int
    I: int
    projected: bool
    bias: bool
    cell: Cell
    x: Tensor  # (N, I)
    w_ih: Tensor  # (D, inputs * H, I), as of `lstm_triton.recurrence.Direction`
    w_hh: Tensor  # (D, R * H, K), R = len(cell.recurrent)
    b_ih: Tensor  # (D, inputs * H) where there are biases
    b_hh: Tensor  # (D, len(cell.biases) * H) where there are biases
    w_hr: Tensor  # (D, K, H) where projected
    gain: Tensor  # (D, inputs * H) where the input's products are normed
    parameters: Tensor  # (D, P, H) where the cell has some
    offsets: Tensor  # (T + 1 + B) int64 where ragged: the first rows of the steps and N, the lengths of the batch rows
    mask: Tensor  # (D, T or 1, B, K), or the seed
    mask_steps: int
    zoneout: Tensor  # the seed
    drop: tuple[int | float, ...]  # threshold, scale, stream of recurrent dropout; of zoneout threshold and p of h, c
    constants: dict[str, Any]
    rebuild: dict[str, Any]  # those of the kernels in rebuild.py

    @classmethod
    def of(cls, plan: Plan, layer: Layer) -> "Launch":
        input, layout, dropout, cell, zoneout = layer.input, layer.layout, layer.dropout, layer.cell, layer.zoneout
        (N, I), (_, B, K), H = input.shape, layer.hx.shape, layer.cx.size(2)
        D = len(layer.directions)
        w_ih, w_hh, b_ih, b_hh, w_hr = _stacked(layer.directions)
        parameters, gain = input, input
        if cell.vectors:
            parameters = torch.stack([d.vectors(cell, H) for d in layer.directions])
        if cell.input_norm is not None:
            gain = torch.stack([d.gain(cell) for d in layer.directions])
        ragged, projected, bias = not layout.is_dense, w_hr is not None, b_ih is not None
        offsets = torch.tensor([*layout.starts, N, *layout.lengths], device=input.device) if ragged else input
        mask, mask_steps, kind, per_step = input, 1, "none", dropout.per_step
        if dropout.mask is not None:
            mask, mask_steps, kind = dropout.mask.contiguous(), dropout.mask.size(1), "given"
            per_step = mask_steps > 1
        elif dropout.seed is not None:
            mask, kind = dropout.seed, "drawn"
        drop, seed, zone = (*threshold_and_scale(dropout.p), dropout.stream, 0, 0.0, 0, 0.0), input, "none"
        if zoneout is not None:
            of_h, of_c = ((threshold_and_scale(p)[0], rounded(p)) for p in (zoneout.p_h, zoneout.p_c))
            drop = (*drop[:2], zoneout.stream, *of_h, *of_c)
            seed, zone = (input, "expected") if zoneout.seed is None else (zoneout.seed, "drawn")
        return cls(
            plan, layout, D, layout.steps, B, H, K, I, projected, bias, cell, input, w_ih, w_hh,
            input if b_ih is None else b_ih, input if b_hh is None else b_hh, input if w_hr is None else w_hr,
            gain, parameters, offsets, mask, mask_steps, seed, drop,
            *_constants(
                cell, input.dtype, plan, D, H, K, I, projected, bias, ragged, kind, per_step, zone,
                rnn_precision(input.device),
            ),
        )  # fmt: skip

    @property
    def grid(self) -> tuple[int, int, int]:
        """That of kernels whose programs own a tile of the batch."""
        return -(-self.B // self.plan.block_b), self.D, 1

    def cooperative_grid(self, layers: int) -> tuple[int, int, int]:
        """That of kernels whose programs share the hidden units; `layers` of a wavefront, or 1."""
        return -(-self.H // self.plan.block_h), self.grid[0], self.D * layers

    @contextmanager
    def meeting(self, layers: int) -> Iterator["Meeting"]:
        """What programs that meet need; raises RuntimeError where they did so in vain: on a GPU of earlier launches."""
        device, grid = self.x.device, self.cooperative_grid(layers)
        barriers = barrier.of(device)
        counters, failed, number = barriers.begin(self.grid[0] * self.D, f"{self.plan}, grid {grid}, on {device}")
        rounds = barrier.INTERPRETED_ROUNDS if INTERPRETED else barrier.ROUNDS
        yield Meeting((counters, failed), (rounds, number))
        if device.type != "cuda":
            barriers.check()

    def numbers(self, window: Window) -> tuple[int | float, ...]:
        """The kernels' last arguments: T, first, last, B, n, mask_steps, those of dropout and zoneout."""
        return self.T, window.first, window.last, self.B, window.size(self.D), self.mask_steps, *self.drop

    def room(self, window: Window, gates: Tensor | None, c: Tensor | None, hx: Tensor, cx: Tensor, save: bool) -> Pass:
        """For what forward returns; `gates` are activated in place, None stands for new ones, of c as well."""
        if gates is None:
            gates = hx.new_empty((self.D, window.size(self.D), self.constants["WIDTH"] * self.H)) if save else hx
        if c is None:
            c = cx.new_empty((self.D, window.size(self.D), self.H)) if save else cx
        return Pass(torch.empty_like(hx), torch.empty_like(cx), gates, c)

    def gradients(self, window: Window, saved: Saved, dhn: Tensor, dcn: Tensor) -> Gradients:
        """Room for what backward returns."""
        D, H, n = self.D, self.H, window.size(self.D)
        dgates = saved.gates if self.plan.fused else saved.gates.new_empty(D, n, self.cell.sums * H)
        dh = dgates.new_empty(D, n, self.K) if self.projected else None
        vectors = dhn.new_empty(self.grid[0], D, self.cell.vectors, H) if self.cell.vectors else None
        return Gradients(torch.empty_like(dhn), torch.empty_like(dcn), dgates, dh, None, vectors)


class Meeting(NamedTuple):
    """Arguments of kernels whose programs meet."""

    tensors: tuple[Tensor, Tensor]  # counters and the flag
    numbers: tuple[int, int]  # rounds and the launch's number


class Front(NamedTuple):
    """What the kernels of `cooperative` multiply with: for a layer, or for the layers of a wavefront."""

    layers: int
    w_hh: Tensor  # (D or layers, RH, H)
    w_ih: Tensor  # (layers - 1, GH, H) of all but the first
    bias: Tensor  # (layers - 1, GH)
    seed: Tensor  # of the dropout between layers
    drops: bool  # whether there is any
    between: tuple[int, float, int]  # its threshold, scale and stream

    @classmethod
    def of(cls, launch: Launch) -> "Front":
        return cls(1, launch.w_hh, launch.x, launch.x, launch.x, False, (0, 1.0, 0))


@lru_cache(maxsize=256)
def _constants(
    cell: Cell,
    dtype: torch.dtype,
    plan: Plan,
    D: int,
    H: int,
    K: int,
    I: int,
    projected: bool,
    bias: bool,
    ragged: bool,
    dropout: str,
    per_step: bool,
    zoneout: str,
    precision: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two dictionaries for all launches of a kind, the strategy's and that of rebuild.py.

    With the dtype they say the types of the other arguments, too.
    """
    inputs = tuple(range(cell.inputs))
    constants = {
        "D": D, "H": H, "K": K, "SUMS": cell.sums, "INPUTS": inputs, "RECURRENT": cell.recurrent,
        "BIASED": cell.biases, "SAVED": len(cell.saved), "WIDTH": cell.width(zoneout != "none"),
        "PARAMETERS": cell.vectors, "WHOLE_ROWS": cell.whole_rows,
        "BLOCK_B": plan.block_b, "BLOCK_H": plan.block_h, "BLOCK_K": plan.block_k,
        "HAS_HR": projected, "RAGGED": ragged, "DROPOUT": dropout, "PER_STEP": per_step, "ZONEOUT": zoneout,
        "BIAS": bias and (plan.fused or cell.biases[-1] >= cell.inputs),
        "PRECISION": precision, "num_warps": plan.num_warps, "num_stages": plan.num_stages,
    }  # fmt: skip
    rebuild = constants | {} if cell.whole_rows else constants | {"BLOCK_H": min(plan.block_h, REBUILT_UNITS)}
    if plan.strategy != "step" and torch.version.hip is None:  # ptxas may spill some at half the registers there are
        constants["maxnreg"] = min(255, REGISTERS // (32 * plan.num_warps))
    if plan.strategy == "step":
        constants["RUNS"] = tuple((rows.start, sums.start, sums.stop - sums.start) for rows, sums in cell.runs())
    if plan.strategy == "persistent":
        # Of no use to a kernel that isn't fused: there the same for all layers, which share one kernel then.
        features = I if plan.fused else 1
        block_i = 1 << (features - 1).bit_length()
        norm = cell.input_norm or 0.0
        constants |= {"I": features, "BLOCK_I": block_i, "FUSED": plan.fused, "INPUT_NORM": norm if plan.fused else 0.0}
    if plan.strategy == "cooperative":
        for name in ("K", "BLOCK_K", "HAS_HR", "WHOLE_ROWS"):
            del constants[name]
        k1, k2 = blocks_of(H, plan.slices)
        constants |= {
            "OTHERS": tuple(k for k in inputs if k not in cell.recurrent),
            "COLUMNS": 1 << (len(cell.recurrent) - 1).bit_length(),
            "LAYERS": plan.layers, "SLICES": plan.slices, "K1": k1, "K2": k2, "launch_cooperative_grid": True,
        }  # fmt: skip
        units, inner = (max(PER_CALL, 1 << (n - 1).bit_length()) for n in (H, K))  # none waits for the others' there
        rebuild |= {
            "BLOCK_H": units if cell.whole_rows else min(units, REBUILT_UNITS),
            "BLOCK_K": min(inner, REBUILT_UNITS),
        }
    return constants, rebuild


def _stacked(directions: list[Direction]) -> tuple[Any, ...]:
    """The weights of the directions (D, ·, …), copied where there are two; where there is one, without that axis."""
    if len(directions) == 1:
        return tuple([x if x is None or x.is_contiguous() else x.contiguous() for x in directions[0][:5]])
    pairs = zip(*(d[:5] for d in directions), strict=True)
    return tuple([None if tensors[0] is None else torch.stack(tensors) for tensors in pairs])  # type: ignore[arg-type]
