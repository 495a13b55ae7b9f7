"""What a time step takes on a GPU, predicted: latencies and bytes of a plan, added up.

A recurrence is a chain: within a step nothing starts before what it needs has come, so that a step's time is a sum of
latencies and of bytes over bandwidths, and hardly ever one of operations. `predict` says that sum, term by term, for
the plans of this project, `predict_operator` for PyTorch's own operator. **No number here is a measurement of this
project's kernels**; those are in `reports/`.

How far off it is, against what others have measured on an H100 at B = 16, T = 1024, H = 768 (`others.PUBLISHED`). The
constants below were not adjusted to these. It takes cuDNN's kernel, which works as ours does, for a quarter slower than
it is, and misses what launches cost Haste by more than half:

| µs a step, forward / backward | measured | predicted |
|---|---|---|
| nn.LSTM (cuDNN), fp16, persistent | 2.0 / 3.1 | 2.5 / 3.8 |
| FlashRNN, fused, bf16, two barriers a step | 4.8 / 8.5 | 4.0 / 5.4 |
| Haste, fp32, two launches a step | 18 / 25 | 7.2 / 10.0 |
"""

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from lstm_triton import cells
from lstm_triton.cells import Cell
from lstm_triton.gpu.gpus import Gpu
from lstm_triton.planning import MOST_INNER

if TYPE_CHECKING:
    from lstm_triton.planning import Plan


class Meeting(NamedTuple):
    """What programs, and launches, that come one after the other cost by themselves."""

    barrier_ns: float  # of all programs, each of which arrives and sees that all have
    program_ns: float  # more for each program
    relaunch_ns: float  # from one launch to the next, where none waits for the CPU


# The one table of constants; no entry is from this project's kernels. Repositories on GitHub whose measurements are
# taken: revollllt/flash-vla (.claude/skills/hardware-unit-test), lblommesteyn/3080lab, Quitetall/tritium,
# AFDEAPAC/aiter. Barriers are `this_grid().sync()` of cooperative groups, which does what ours does, of programs that
# arrive together: what waiting for the slowest adds is not in it.
MEETINGS = {
    "sm_80": Meeting(1490, 0.3, 1400),  # assumed, as of 2026: sm_90's in cycles
    "sm_86": Meeting(930, 1.4, 1000),  # 3080lab (RTX 3080): 1.0 µs for 68 to 136 programs, 1.3 for 272
    "sm_89": Meeting(640, 2.6, 1000),  # tritium (RTX 4090): 0.64 to 0.98 µs; a graph's node 0.77 to 1.22
    "sm_90": Meeting(1058, 0.24, 1400),  # flash-vla (H100): 1066 ns for 32 programs, 1089 for 132
    "sm_100": Meeting(1058, 0.24, 1400),  # assumed, as of 2026: as sm_90
    "sm_120": Meeting(575, 0.16, 837),  # flash-vla (RTX 5090): 583 ns for 32 programs, 599 for 132
    "gfx90a": Meeting(1520, 92, 5000),  # assumed as gfx950, aiter (MI355X): 7.4 µs for 64 programs, 25 for 256
    "gfx942": Meeting(1520, 92, 5000),
}
MMA_CYCLES = {
    # From one m16n8k16 to the next that needs its sums.
    "sm_80": 25,  # assumed, as of 2026: as sm_90
    "sm_86": 35,  # assumed: as sm_120
    "sm_89": 35,  # assumed: as sm_120
    "sm_90": 25,  # flash-vla (H100), bfloat16: 25.1
    "sm_100": 21,  # assumed, as of 2026: 20.8 are reported of B300
    "sm_120": 35,  # assumed, as of 2026: 35 are reported of it
    "gfx90a": 32,  # AMD CDNA 2 instruction set: v_mfma_f32_16x16x16, 8 passes of 4 cycles
    "gfx942": 32,  # assumed: as gfx90a
}
SHARED_BYTES_PER_CLOCK = 128  # CUDA C++ Programming Guide: 32 banks of 4 bytes
SHARED_CYCLES = 29  # Luo et al. 2025 (arXiv 2501.12084): H800
L2_BYTES_PER_CLOCK = 64  # most that a multiprocessor takes: assumed, as of 2026
MEMORY_CYCLES = 656  # Luo et al. 2025: H800, a load from memory
SPECIAL_PER_CLOCK = 16  # exponentials and reciprocals of a multiprocessor: CUDA C++ Programming Guide
FMA_PER_CLOCK = 128  # float32, of a multiprocessor: CUDA C++ Programming Guide, sm_86 and newer; sm_80 half of it
SYNC_CYCLES = 30  # all warps of a program meet: assumed, as of 2026
CELL_CYCLES = {"forward": 250, "backward": 200}  # latency of a cell's chain of operations: assumed, as of 2026
FUNCTION_SPECIALS = 2  # of sigmoid or tanh: an exponential and a reciprocal
ROW_SUMS = 4  # of a cell that looks at whole rows, one after the other: those of two layer norms, mean and variance
LAUNCH_US = 20  # of Triton's launcher, in Python: assumed, as of 2026
OPERATOR_LAUNCH_US = 2.5  # of a kernel by cuDNN, in C++: assumed, as of 2026
GEMM_EFFICIENCY = 0.8  # of what `Gpu.tensor_flops` allows: assumed, as of 2026

# Each term and what it stands for among what can bound a step.
BOUNDS = {
    "barrier": "barrier",  # all programs of a tile of the batch arrive, and see that all have
    "publish": "barrier",  # until what a program has stored is where others see it
    "h from L2": "L2",  # what the others have stored: h, in backward the gates' gradients
    "weights": "on chip",  # reading weights and h from shared memory takes longer than multiplying
    "weights from L2": "L2",
    "input": "memory",  # the input's products, where nothing hides how long they take to come
    "arithmetic": "arithmetic",  # products, by tensor cores or not
    "slices": "arithmetic",  # adding up the slices of the product
    "pointwise": "arithmetic",
    "GEMMs": "arithmetic",  # before and after the loop: the input's product, gradients of input and weights
    "memory": "memory",  # what all of it reads and writes takes longer than the rest
    "launches": "launches",
}


@dataclass(frozen=True)
class Work:
    """A layer's call, or that of a stack of equal layers in a wavefront."""

    batch: int  # B
    hidden: int  # H
    size: int  # K, that of h: `proj_size` or H
    features: int  # I
    steps: int  # T
    dtype: torch.dtype
    directions: int = 1
    precision: str = "ieee"  # of float32 products: "tf32" or "ieee"
    training: bool = True  # whether forward keeps what backward needs
    cell: Cell = field(default_factory=partial(cells.of, "lstm"))
    zoneout: bool = False  # whether there is any

    @property
    def tensor_cores(self) -> bool:
        return self.dtype.itemsize == 2 or (self.dtype == torch.float32 and self.precision == "tf32")

    @property
    def has_operator(self) -> bool:
        """Whether PyTorch has one for such layers."""
        return self.cell.operator is not None and not self.zoneout

    @property
    def products(self) -> int:
        """Of h, in a step: matrices (H, K) of weights, an LSTM's four gates."""
        return len(self.cell.recurrent)

    @property
    def columns(self) -> int:
        """Of a product for each hidden unit in `cooperative`, which lie side by side: a power of two."""
        return 1 << (self.products - 1).bit_length()

    @property
    def kept(self) -> int:
        """Tiles of H that a step keeps for backward, beside c."""
        return len(self.cell.saved) + self.zoneout

    def specials(self, backward: bool) -> int:
        """Exponentials and reciprocals for a unit, assumed: a function of each sum that the input is in, and of c."""
        of_c = int(self.cell.carries)
        return FUNCTION_SPECIALS * (of_c if backward else self.cell.inputs + of_c)

    def row_sums(self) -> int:
        """Cycles of the cell's sums over all units of a row: in a warp, through shared memory, in a warp again."""
        return ROW_SUMS * (2 * SHARED_CYCLES + SYNC_CYCLES) if self.cell.whole_rows else 0


@dataclass(frozen=True)
class Prediction:
    """A time step's time in µs, *predicted*."""

    terms: dict[str, float]  # of `BOUNDS`

    @property
    def total(self) -> float:
        return sum(self.terms.values())

    @property
    def bound(self) -> str:
        """What most of it is: "barrier", "L2", "on chip", "arithmetic", "memory" or "launches"."""
        sums: dict[str, float] = {}
        for name, value in self.terms.items():
            sums[BOUNDS[name]] = sums.get(BOUNDS[name], 0.0) + value
        return max(sums, key=lambda name: sums[name])


def predict(gpu: Gpu, plan: "Plan", work: Work, backward: bool = False) -> Prediction:
    """What a time step of a pass takes by a plan.

    Args:
        gpu: where.
        plan: how.
        work: what; `plan.layers` layers of it where they are a wavefront.
        backward: which pass.
    """
    cycles = {"persistent": _persistent, "cooperative": _cooperative, "step": _step}[plan.strategy](
        gpu, plan, work, backward
    )
    terms = {name: value / gpu.clock_ghz * 1e-3 for name, value in cycles.items() if value > 0}
    meeting = MEETINGS[family(gpu)]
    if plan.strategy == "cooperative":
        together = -(-work.hidden // plan.block_h) * plan.layers
        terms = {"barrier": (meeting.barrier_ns + meeting.program_ns * together) * 1e-3} | terms
    if plan.strategy == "step":
        terms["launches"] = between_launches(gpu, 1 if work.size == work.hidden else 3, LAUNCH_US, sum(terms.values()))
    else:
        terms["launches"] = LAUNCH_US / work.steps
    if plan.layers > 1:  # the pipeline fills and empties
        terms = {name: value * (work.steps + plan.layers - 1) / work.steps for name, value in terms.items()}
    return Prediction(with_surroundings(gpu, terms, work, backward, plan.layers))


def between_launches(gpu: Gpu, count: int, each_us: float, work_us: float) -> float:
    """µs of so many launches a step beyond what they do: from one to the next, or until the CPU has made them.

    Args:
        gpu: where.
        count: launches a step.
        each_us: that the CPU takes for one.
        work_us: of all of them, on the GPU.
    """
    return max(count * MEETINGS[family(gpu)].relaunch_ns * 1e-3, count * each_us - work_us)


def family(gpu: Gpu) -> str:
    """The target whose constants a GPU has: its own or, of an unknown one, that of its table entry's kind."""
    if gpu.target in MEETINGS:
        return gpu.target
    if not gpu.is_nvidia:
        return "gfx942"
    return {"8": "sm_86", "9": "sm_90", "10": "sm_100"}.get(gpu.target[3:-1], "sm_120")


def with_surroundings(gpu: Gpu, terms: dict[str, float], work: Work, backward: bool, layers: int) -> dict[str, float]:
    """The terms with the GEMMs around the loop, and the time that memory takes beyond all of them."""
    cell, units, item = work.cell, work.batch * work.hidden * work.directions, work.dtype.itemsize
    products = cell.inputs * work.features  # of a unit; forward multiplies a wavefront's inner inputs in the loop
    if backward:  # gradients of input, weight_ih and weight_hh
        products = (2 * products + work.products * work.size) * layers
    peak = flops_per_clock(gpu, work) * gpu.sms * gpu.clock_ghz * 1e3 * GEMM_EFFICIENCY  # a µs
    terms["GEMMs"] = 2 * units * products / peak
    # Forward: the input's products in, h out, what is kept and c.
    numbers = (cell.inputs + 1) * item + (work.kept * item + 4 if work.training else 0)
    if backward:  # what was kept, the sums' gradients out, c, the output's gradient, h
        numbers = (work.kept + cell.sums) * item + 4 + 2 * item
    memory = units * layers * numbers / (gpu.memory_gbs * 1e3)
    terms["memory"] = max(0.0, memory - sum(terms.values()))
    return {name: value for name, value in terms.items() if value > 0}


def flops_per_clock(gpu: Gpu, work: Work) -> float:
    """Of a multiprocessor, by tensor cores where they are allowed."""
    if work.dtype.itemsize == 2:
        return gpu.tensor_flops
    if work.tensor_cores:
        return gpu.tensor_flops / 2
    fma = FMA_PER_CLOCK / (2 if gpu.target == "sm_80" else 1)
    return 2 * fma / (1 if work.dtype == torch.float32 else 32)  # float64 as most have it, at 1/64 to 1/2


def l2_rate(gpu: Gpu, programs: int) -> float:
    """Bytes a clock that a multiprocessor gets where so many programs load."""
    active = min(gpu.sms, programs)
    return min(L2_BYTES_PER_CLOCK, gpu.l2.bytes_per_clock * gpu.sms / active)


def product_cycles(gpu: Gpu, work: Work, rows: int, inner: int, columns: int, slices: int, warps: int) -> float:
    """Cycles of a product (rows, inner) · (inner, columns) of one program by tensor cores, or else by FMAs.

    Tensor cores: a slice's instructions wait for each other, and a quarter of a multiprocessor runs one at a time.
    """
    flops = 2 * rows * inner * columns
    issue = flops / flops_per_clock(gpu, work)
    if not work.tensor_cores:
        return issue + SHARED_CYCLES
    used = min(4, max(slices, min(warps, slices * max(1, columns // 8) * max(1, rows // 16))))
    depth = 16 if work.dtype.itemsize == 2 else 8
    return max(issue * 4 / used, inner / slices / depth * MMA_CYCLES[family(gpu)])


def _cooperative(gpu: Gpu, plan: "Plan", work: Work, backward: bool) -> dict[str, float]:
    """Cycles of a step's terms, but for the barrier."""
    item, rows = work.dtype.itemsize, plan.block_b
    products = work.products
    inner, columns, padded = work.hidden, work.columns * plan.block_h, plan.block_k
    if backward:
        inner, columns, padded = products * work.hidden, plan.block_h, products * plan.block_k
    sources = 1 if plan.layers == 1 else 2  # h and, in a wavefront, what the layer before has of it
    programs = -(-work.hidden // plan.block_h) * -(-work.batch // rows) * work.directions * plan.layers
    crowd = -(-programs // gpu.sms)  # programs of a multiprocessor, which share its paths
    live = min(rows, work.batch)
    left, right = live * inner * item * sources, columns * padded * item * sources
    cells = rows * plan.block_h * crowd
    terms = {
        "publish": gpu.l2.cycles,
        "h from L2": gpu.l2.cycles + crowd * left / l2_rate(gpu, programs),
        "pointwise": _pointwise(work, backward, cells),
    }
    if plan.matvec:
        # Weights are in registers; each row is brought to all warps, and what they have of the sum is added up.
        row = inner * columns / FMA_PER_CLOCK + 2 * (SYNC_CYCLES + SHARED_CYCLES) + 100
        return terms | {"arithmetic": rows * sources * crowd * row}
    # In backward the rows go through shared memory product by product, block by block.
    blocks = products * (1 if plan.block_k <= MOST_INNER else 2) * sources if backward else 1
    groups = max(1, min(plan.num_warps // plan.slices, columns // 8))  # of warps, each of which reads all rows
    reads = (rows * padded * item * sources * groups + right * max(1, rows // 64)) * crowd / SHARED_BYTES_PER_CLOCK
    arithmetic = sources * crowd * product_cycles(gpu, work, rows, padded, columns, plan.slices, plan.num_warps)
    terms["arithmetic"] = arithmetic + blocks * (SHARED_CYCLES + SYNC_CYCLES)
    terms["weights"] = max(0.0, reads - arithmetic)
    if plan.slices > 1:
        sums = 4 * plan.slices * rows * columns * sources * crowd
        terms["slices"] = 2 * sums / SHARED_BYTES_PER_CLOCK + SHARED_CYCLES + 2 * SYNC_CYCLES
    return terms


def _persistent(gpu: Gpu, plan: "Plan", work: Work, backward: bool) -> dict[str, float]:
    item, rows = work.dtype.itemsize, plan.block_b
    programs = -(-work.batch // rows) * work.directions
    crowd = -(-programs // gpu.sms)
    summed = work.products * plan.block_h
    left = rows * (summed if backward else plan.block_k) * item
    if backward:
        product = product_cycles(gpu, work, rows, summed, plan.block_k, 1, plan.num_warps)
    else:
        product = product_cycles(gpu, work, rows, plan.block_k, summed, 1, plan.num_warps)
    if work.size != work.hidden:
        product += product_cycles(gpu, work, rows, plan.block_h, plan.block_k, 1, plan.num_warps)
    weights = 0 if item == 2 else summed * plan.block_k * item  # of 16 bits they are in registers
    reads = (left * (1 + plan.num_warps) + weights) / SHARED_BYTES_PER_CLOCK
    return {
        "input": MEMORY_CYCLES,
        "arithmetic": crowd * product + 2 * (SHARED_CYCLES + SYNC_CYCLES),
        "weights": max(0.0, crowd * (reads - product)),
        "pointwise": _pointwise(work, backward, crowd * rows * plan.block_h),
    }


def _step(gpu: Gpu, plan: "Plan", work: Work, backward: bool) -> dict[str, float]:
    """A launch's: tiles of all weights from L2, or memory where they don't fit there."""
    item, rows = work.dtype.itemsize, plan.block_b
    products = work.products
    inner, columns, units = (products * work.hidden, plan.block_h, work.size) if backward else (
        work.size, products * plan.block_h, work.hidden
    )  # fmt: skip
    programs = -(-work.batch // rows) * -(-units // plan.block_h) * work.directions
    crowd, rounds = -(-programs // gpu.sms), -(-inner // plan.block_k)
    held = min(crowd, max(1, gpu.programs_per_sm(step_bytes(plan, work), plan.num_warps, 128)))
    loaded = (rows + columns) * rounds * plan.block_k * item
    waves = -(-crowd // held)
    weights = products * work.hidden * work.size * item * work.directions
    l2 = waves * rounds * gpu.l2.cycles / (plan.num_stages - 1) + crowd * loaded / l2_rate(gpu, programs)
    if weights > gpu.l2_mib * 2**20:
        l2 = max(l2, weights / (gpu.memory_gbs / gpu.clock_ghz))
    product = crowd * product_cycles(gpu, work, rows, rounds * plan.block_k, columns, 1, plan.num_warps)
    return {
        "weights from L2": l2,
        "arithmetic": max(0.0, product - l2) + SHARED_CYCLES + SYNC_CYCLES,
        "pointwise": _pointwise(work, backward, crowd * rows * plan.block_h),
        "input": waves * MEMORY_CYCLES,
    }


def step_bytes(plan: "Plan", work: Work) -> int:
    """Shared memory of a program of `step`: its operands, as many times as there are stages."""
    rows = plan.block_b + work.products * plan.block_h
    return plan.num_stages * rows * plan.block_k * work.dtype.itemsize


def _pointwise(work: Work, backward: bool, count: int) -> float:
    """Cycles of a cell's operations on so many hidden units of rows."""
    latency = CELL_CYCLES["backward" if backward else "forward"] + work.row_sums()
    return latency + count * work.specials(backward) / SPECIAL_PER_CLOCK
