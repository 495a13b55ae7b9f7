"""Which plans fit a GPU for a layer, and which of them is predicted to be the fastest.

A plan fits if a program's tiles fit its shared memory and its threads' registers and, where programs wait for each
other, if the GPU holds all of them at a time. What is compiled uses what is computed here: `tests/test_plan.py` and
the audit of the machine code compare them.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import torch

from lstm_triton.gpu.gpus import KIB, Gpu
from lstm_triton.gpu.model import Work, predict, step_bytes
from lstm_triton.planning import MOST_INNER, PERSISTENT_BYTES, STRATEGIES, Plan, blocks_of, tile

# The tiles of `cooperative`: slices and warps, and the rows and units that a program may have with them, each for inner
# dimensions of up to so many. Beyond these the compiler spills registers in the loop of one of the passes (sm_80 to
# sm_120, Triton 3.7 and 3.9): with 64 rows it always does, with 32 rows of 16 units in forward. Eight units are the
# fewest that NVIDIA's tensor cores multiply at once; those of AMD take 16.
COOPERATIVE = {
    (4, 4): ((16, 8, 2048), (16, 16, 512)),  # least to add up, and two programs may share a multiprocessor
    (4, 8): ((16, 8, 2048), (16, 16, 2048), (32, 8, 2048)),  # more rows to a thread's registers
    (8, 8): ((16, 8, 2048), (16, 16, 2048), (32, 8, 2048)),  # half the chain of instructions that wait for each other
}
# Whose compiler spills in backward where rows aren't whole vectors of 16 bytes, which takes a register for each piece,
# and the inner dimension is larger than `MOST_INNER`.
WHOLE_VECTORS = ("sm_100", "sm_120")
# Of a thread's registers, what the rows that a product takes at a time may fill; more spills.
OPERAND_SHARE = 0.51

# The tiles of `step`: rows, units, inner dimension, warps, stages of loads. 128 rows, or 64 of 64 units, spill.
STEP = (
    (16, 32, 64, 4, 2),  # few rows: many programs, whose loads hide each other's latency
    (16, 16, 64, 4, 4),  # twice as many, which load three tiles ahead
    (16, 16, 128, 4, 3),  # half as many loads that wait for each other
    (64, 32, 64, 8, 2),  # many rows: each tile of weights is read for four times as many
    (16, 32, 32, 4, 2),  # where shared memory is small or numbers are large
    (16, 16, 16, 4, 2),
)

# The same of cells that look at whole rows: inner dimensions. Tiles have all units, and the fewest rows that products
# take.
WHOLE_STEP = (64, 32, 16)
WHOLE_THREADS = 256  # of a program: twice as many spill on AMD, half as many sooner everywhere
# Registers of a thread for what isn't tiles in such a kernel, as compiled (sm_90).
OTHER_REGISTERS = 64
# The most that a thread can have, AMD's with the accumulators.
NVIDIA_REGISTERS, AMD_REGISTERS = 255, 512

# Without tensor cores: rows, of which each is a product of its own, and bytes of weights in registers, as float32.
MATVEC_BYTES = {1: 96 * KIB, 2: 96 * KIB, 4: 96 * KIB, 8: 64 * KIB}


def programs(plan: Plan, work: Work) -> tuple[int, int, int]:
    """The grid: tiles of units, of the batch, and directions or a wavefront's layers."""
    units = 1 if plan.strategy == "persistent" else -(-work.hidden // plan.block_h)
    return units, -(-work.batch // plan.block_b), work.directions * plan.layers


def shared_bytes(plan: Plan, work: Work, backward: bool = False) -> int:
    """Shared memory of a program, at most."""
    item, rows, units = work.dtype.itemsize, plan.block_b, plan.block_h
    if plan.strategy == "step":
        return step_bytes(plan, work) + 128  # and sm_100's barriers
    if plan.strategy == "persistent":
        folded = units * plan.block_k if work.size != work.hidden else 0
        # Beside the weights the compiled backward holds the operand tiles of the batch, one for each and one more.
        moving = (work.products + 1) * rows * max(units, plan.block_k)
        return item * (work.products * units * plan.block_k + folded + moving)
    if plan.matvec:
        return 4 * (rows + 2) * plan.block_k + 4 * work.columns * units * plan.num_warps
    sums = 4 * plan.slices * rows * (units if backward else work.columns * units)
    moving = item * rows * sum(_moving(plan, work, backward))
    return weight_bytes(plan, work, backward) + max(moving, sums if plan.slices > 1 else 0)


def _moving(plan: Plan, work: Work, backward: bool) -> tuple[int, ...]:
    """The blocks of a product's inner dimension that are between memory and tensor cores at a time."""
    first, second = blocks_of(work.hidden, plan.slices)
    if backward:  # block by block, of one product after the other
        return first, second or first
    return (first, second) * (1 if plan.layers == 1 else 2)


def weight_bytes(plan: Plan, work: Work, backward: bool = False) -> int:
    """Of the recurrent weights that a program keeps on its multiprocessor, padding among them."""
    if plan.strategy == "step":
        return 0
    products = work.columns if plan.strategy == "cooperative" and not backward else work.products
    return work.dtype.itemsize * products * plan.block_h * plan.block_k * (1 if plan.layers == 1 else 2)


def held(gpu: Gpu, plan: Plan, work: Work) -> int:
    """How many of a plan's programs a GPU holds at a time, whatever registers their threads turn out to have."""
    passes = (False, True) if work.training else (False,)
    shared = max(shared_bytes(plan, work, backward) for backward in passes)
    if shared > gpu.limits.shared_per_program:
        return 0
    threads = plan.num_warps * gpu.limits.warp
    return gpu.sms * gpu.programs_per_sm(shared, plan.num_warps, min(255, gpu.limits.registers // threads))


def operand_registers(plan: Plan, work: Work, backward: bool) -> float:
    """Registers of a thread for the rows that a product takes at a time, between memory and shared memory."""
    inner = sum(_moving(plan, work, backward))
    return plan.block_b * inner * work.dtype.itemsize / 4 / (32 * plan.num_warps)


def row_registers(gpu: Gpu, plan: Plan, work: Work) -> float:
    """Registers of a thread where a cell looks at whole rows, which all its tiles of a row have to be there for.

    About as compiled, for sm_90: 204 and 317 for an LSTM with layer norm in backward, 8 and 16 elements of a tile a
    thread, here 192 and 320; 254 in inference with 16, here 240.
    """
    tiles = work.cell.sums + (work.kept if work.training else 3)
    size = plan.block_b * plan.block_h / (gpu.limits.warp * plan.num_warps) * max(1, work.dtype.itemsize / 4)
    return tiles * size + OTHER_REGISTERS


def misfit(gpu: Gpu, plan: Plan, work: Work) -> str:
    """Why a plan's programs have no room on a GPU, all at a time where they wait for each other; "" where they have."""
    room = held(gpu, plan, work)
    if room == 0:
        shared = max(shared_bytes(plan, work), shared_bytes(plan, work, work.training)) / KIB
        limit = gpu.limits.shared_per_program / KIB
        return f"{shared:,.0f} KiB of shared memory wanted for a program, {limit:.0f} there"
    if plan.strategy == "persistent" and weight_bytes(plan, work) > PERSISTENT_BYTES:
        return f"{weight_bytes(plan, work) / KIB:,.0f} KiB of weights, a program keeps {PERSISTENT_BYTES // KIB}"
    if work.cell.whole_rows:
        threads, least = plan.num_warps * gpu.limits.warp, NVIDIA_REGISTERS if gpu.is_nvidia else AMD_REGISTERS
        there, registers = min(least, gpu.limits.registers // threads), row_registers(gpu, plan, work)
        if registers > there:
            return f"{registers:.0f} registers of a thread wanted for whole rows of units, {there} there"
    if plan.strategy == "cooperative":
        most = OPERAND_SHARE * min(256, gpu.limits.registers // (plan.num_warps * gpu.limits.warp))
        wanted = max(operand_registers(plan, work, backward) for backward in {False, work.training})
        parts = work.hidden * work.dtype.itemsize % 16 != 0 and plan.block_k > MOST_INNER
        if parts and gpu.target in WHOLE_VECTORS and not plan.matvec:
            return "rows that aren't whole vectors of 16 bytes take more registers than there are"
        if not plan.matvec and wanted > most:
            return f"{wanted:.0f} registers of a thread for the rows of a product, {most:.0f} free"
        count = _count(plan, work)
        if count > room:
            return f"{count:,} programs should run at a time, {room} have room"
    return ""


def candidates(gpu: Gpu, work: Work, layers: int = 1, strategy: str | None = None) -> list[Plan]:
    """The plans that fit, those of one strategy where it is given.

    Args:
        gpu: where.
        work: what.
        layers: more than one: that run as a wavefront, in a "cooperative" launch.
        strategy: one of `planning.STRATEGIES`, for any operands that it takes; else those that pay.
    """
    found = []
    for name in STRATEGIES if strategy is None else (strategy,):
        ways = {"persistent": _persistent, "cooperative": _cooperative, "step": _step}[name]
        for plan in ways(gpu, work, layers, strategy is not None):
            if plan.layers == layers and not misfit(gpu, plan, work):
                found.append(plan)
    return found


def why_not(gpu: Gpu, work: Work, layers: int, strategy: str) -> str:
    """Why no plan of a strategy fits, in words: of the one that is nearest to it; arguments as of `candidates`."""
    if layers > 1 and strategy != "cooperative":
        return "several layers share a launch by the strategy 'cooperative' alone"
    ways = {"persistent": _persistent, "cooperative": _cooperative, "step": _step}[strategy]
    if strategy == "cooperative" and work.cell.whole_rows:
        return "programs that divide the hidden units have no whole rows of them"
    if strategy == "cooperative" and not _folds(work):
        return "projections of cells whose sums don't all have a product with the input"
    plans = list(ways(gpu, work, layers, False))
    if not plans:
        return "float32 and float64 products without TF32 take no tensor cores"
    return misfit(gpu, max(plans, key=lambda plan: held(gpu, plan, work) / _count(plan, work)), work)


def _count(plan: Plan, work: Work) -> int:
    units, tiles, planes = programs(plan, work)
    return units * tiles * planes


def _persistent(gpu: Gpu, work: Work, layers: int, forced: bool) -> Iterator[Plan]:
    plan = Plan("persistent", 16, tile(work.hidden), tile(work.size), 4)
    # tl.dot takes 16 rows or more; more programs with few rows each hide latency better.
    warps = 4 if weight_bytes(plan, work) <= 32 * KIB else 8
    yield replace(plan, num_warps=WHOLE_THREADS // gpu.limits.warp if work.cell.whole_rows else warps)


def _folds(work: Work) -> bool:
    """Whether there is no projection, or one that can be folded (`lstm_triton.launching`)."""
    return work.size == work.hidden or work.cell.inputs == work.cell.sums


def _cooperative(gpu: Gpu, work: Work, layers: int, forced: bool) -> Iterator[Plan]:
    hidden, least, columns = work.hidden, 8 if gpu.is_nvidia else 16, work.columns
    if work.cell.whole_rows or not _folds(work):
        return
    if work.tensor_cores or forced:
        for (slices, warps), tiles in COOPERATIVE.items():
            inner = sum(blocks_of(hidden, slices))
            if slices > 4 and inner > sum(blocks_of(hidden, 4)):
                continue  # slices of padding
            for rows, units, most in tiles:
                if inner <= most and rows <= tile(work.batch) and least <= units < max(2 * hidden, least + 1):
                    yield Plan("cooperative", rows, units, inner, warps, slices=slices, layers=layers)
    rows = 1 << (work.batch - 1).bit_length()
    if rows in MATVEC_BYTES and not work.training and work.dtype != torch.float64:
        inner = sum(blocks_of(hidden, 1))
        for units in (4, 8, 16):
            if 4 * columns * units * inner <= MATVEC_BYTES[rows]:
                yield Plan("cooperative", rows, units, inner, 8, matvec=True, layers=layers)


def _step(gpu: Gpu, work: Work, layers: int, forced: bool) -> Iterator[Plan]:
    if work.cell.whole_rows:
        for inner in WHOLE_STEP:
            warps = WHOLE_THREADS // gpu.limits.warp
            yield Plan("step", 16, tile(work.hidden), min(tile(work.size), inner), warps, num_stages=2)
        return
    for rows, units, inner, warps, stages in STEP:
        if rows > tile(work.batch) or (rows > 16 and not gpu.is_nvidia and work.dtype.itemsize > 2):
            continue  # in float32 it spills on AMD
        if gpu.target == "sm_100" and (rows, units) == (16, 32) and not work.cell.is_plain:
            continue  # in backward it spills there
        units, inner = min(tile(work.hidden), units), min(tile(work.size), inner)
        yield Plan("step", rows, units, inner, warps, num_stages=stages)


@lru_cache(maxsize=1024)
def choose(gpu: Gpu, work: Work, layers: int = 1, strategy: str | None = None) -> Plan:
    """The plan of `candidates` with the least predicted time of a step: forward and, in training, backward.

    Raises:
        ValueError: no plan of the strategy fits.
    """
    found = candidates(gpu, work, layers, strategy)
    if not found:
        raise ValueError(f"no plan with strategy {strategy!r} and {layers} layers a launch fits {gpu.name} for {work}")
    return min(found, key=lambda plan: step_time(gpu, plan, work))


def wavefront(gpu: Gpu, work: Work, layers: int) -> Plan | None:
    """The plan for several layers of one direction in one launch; None where they are slower so, or don't fit."""
    cell = work.cell
    if work.directions > 1 or work.size != work.hidden or work.zoneout or cell.whole_rows or not cell.is_plain:
        return None
    found = candidates(gpu, work, layers, "cooperative") if work.tensor_cores else []
    best = min(found, key=lambda plan: step_time(gpu, plan, work), default=None)
    one_by_one = layers * step_time(gpu, choose(gpu, work), work)
    return best if best is not None and step_time(gpu, best, work) < one_by_one else None


def proposals(gpu: Gpu, work: Work, layers: int = 1) -> list[tuple[Plan, float]]:
    """The best plan of each strategy that fits and pays, the fastest first, and µs of a step of all layers, predicted.

    Args:
        gpu: where.
        work: what each of the layers is; in training the times are of forward and backward.
        layers: that run one after the other or, where a plan has as many, as a wavefront.
    """
    found = []
    for strategy in STRATEGIES:
        plans = [plan for plan in candidates(gpu, work) if plan.strategy == strategy]
        if plans:
            best = min(plans, key=lambda plan: step_time(gpu, plan, work))
            found.append((best, layers * step_time(gpu, best, work)))
    front = wavefront(gpu, work, layers) if layers > 1 else None
    if front is not None:
        found.append((front, step_time(gpu, front, work)))
    return sorted(found, key=lambda pair: pair[1])


def step_time(gpu: Gpu, plan: Plan, work: Work) -> float:
    """µs, predicted: of forward and, in training, backward."""
    passes = (False, True) if work.training else (False,)
    return sum(predict(gpu, plan, work, backward).total for backward in passes)
