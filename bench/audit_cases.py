"""What `python -m bench.audit` compiles, and for which GPUs."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from lstm_triton import cells, launching
from lstm_triton.gpu import gpus, tiling
from lstm_triton.gpu.gpus import Gpu
from lstm_triton.gpu.model import Work
from lstm_triton.planning import Plan
from lstm_triton.recurrence import Direction, Layer, Layout, RecurrentDropout, Zoneout, present, state_dtype

# A GPU of each target.
GPUS = ("a100", "a10", "l4", "h100", "b200", "rtx5090", "mi250x", "mi300x")
# "tf32" is float32 as PyTorch's setting for RNNs has it by default, with TF32 where the GPU has that.
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
STEPS = 64
SAMPLED, APART = 17, 6  # of a sample: one case of so many for each GPU, and from one GPU's to the next one's


class Case(NamedTuple):
    """One pass over one layer, in the form "L2" over two, whose input is as wide as h."""

    run: str  # one of `lstm_triton.gpu.machine_code.PASSES`
    batch: int
    hidden: int
    dtype: str
    form: str = ""  # or "D2", "L2", "ragged", "dropout", "projection", "zoneout"
    cell: str = "lstm"
    strategy: str | None = None  # where it has room, else and for None the one that is chosen

    def __str__(self) -> str:
        parts = [f"{self.run} B{self.batch}", f"H{self.hidden}", self.dtype]
        parts += [self.form] * bool(self.form) + [self.cell] * (self.cell != "lstm")
        return "-".join([*parts, self.strategy] if self.strategy else parts)

    @property
    def of_cells(self) -> bool:
        """Whether it is of a cell other than the LSTM, or of zoneout."""
        return self.cell != "lstm" or self.form == "zoneout"

    @property
    def size(self) -> int:
        """K."""
        return self.hidden // 2 if self.form == "projection" else self.hidden

    @property
    def records(self) -> bool:
        """Whether it is a part of training."""
        return self.run != "inference"

    def layer(self) -> Layer:
        """The layer, without memory."""
        dtype, directions, h, k = DTYPES[self.dtype], 2 if self.form == "D2" else 1, self.hidden, self.size
        cell = cells.of(self.cell)
        layout = Layout.dense(STEPS, self.batch)
        if self.form == "ragged":
            layout = Layout.of(STEPS * self.batch - self.batch // 2, self.batch, batch_sizes(self.batch))

        def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        w_hr = tensor(k, h) if k != h else None
        inputs, recurrent, biased = cell.inputs * h, len(cell.recurrent) * h, len(cell.biases) * h
        extra = tuple(tensor(p.vectors * h) for p in present(cell, True))
        weights = Direction(tensor(inputs, h), tensor(recurrent, k), tensor(inputs), tensor(biased), w_hr, extra)
        seed = tensor(1, dtype=torch.int64) if self.form == "dropout" else None
        states = tensor(directions, self.batch, k), tensor(directions, self.batch, h, dtype=state_dtype(dtype))
        dropout = RecurrentDropout(seed=seed, p=0.25)
        zoneout = Zoneout(0.25, 0.25, tensor(1, dtype=torch.int64)) if self.form == "zoneout" else None
        x = tensor(layout.total, h)
        return Layer(x, *states, [weights] * directions, layout, dropout, cell, zoneout, self.records)


def batch_sizes(batch: int) -> torch.Tensor:
    """(STEPS,) of which the last is half of the others."""
    return torch.tensor([batch] * (STEPS - 1) + [batch - batch // 2])


def _cases() -> Iterator[Case]:
    sizes = (32, 64, 100, 128, 192, 256, 300, 384, 512, 650, 768, 1024, 1536, 2048, 4096)
    for hidden in sizes:
        for run in ("inference", "forward", "backward"):
            yield Case(run, 32, hidden, "fp16")
    for dtype in ("bf16", "tf32", "fp32"):
        for hidden in (64, 128, 300, 512, 1024):
            for run in ("forward", "backward"):
                yield Case(run, 32, hidden, dtype)
    for batch in (1, 8, 128, 1024):
        for hidden in (64, 256, 1024, 2048):
            for run in ("inference", "backward"):
                yield Case(run, batch, hidden, "fp16")
    for form in ("D2", "L2", "ragged", "dropout", "projection"):
        for hidden in (128, 650):
            for run in ("forward", "backward"):
                yield Case(run, 32, hidden, "bf16", form)
    for hidden in (64, 1024):
        for run in ("rebuild", "drop"):
            yield Case(run, 32, hidden, "fp16", "dropout")
    yield from _of_cells()


def _of_cells() -> Iterator[Case]:
    """Of cells other than the LSTM: one product, three, layer norm over whole rows, peepholes; and zoneout."""
    cells = ("gru", "rnn-tanh", "lstm-coupled", "lstm-peephole", "lstm-norm")
    for cell in cells:
        for run in ("forward", "backward"):
            yield Case(run, 32, 64, "fp16", "", cell, "persistent")
            yield Case(run, 32, 128 if cell == "lstm-norm" else 512, "bf16", "", cell, "step")
    for strategy, hidden in (("persistent", 100), ("step", 512)):
        for run in ("forward", "backward"):
            yield Case(run, 32, hidden, "fp16", "zoneout", "lstm", strategy)
    for cell in ("gru", "lstm-norm"):
        yield Case("forward", 32, 64, "tf32", "D2", cell)
        yield Case("backward", 32, 64, "fp32", "ragged", cell)
        yield Case("rebuild", 32, 64, "fp16", "", cell)
    for run in ("forward", "backward"):
        yield Case(run, 32, 256, "fp16", "", "rnn-relu")
        for cell in ("gru", "rnn-tanh", "lstm-coupled", "lstm-peephole"):
            yield Case(run, 32, 300, "fp16", "", cell, "cooperative")
        yield Case(run, 32, 1024, "bf16", "", "gru", "cooperative")
        yield Case(run, 32, 256, "fp16", "zoneout", "lstm", "cooperative")
    yield Case("inference", 1, 256, "fp32", "", "gru")


CASES = tuple(_cases())
Job = tuple[Case, Gpu]


def jobs_of(gpu_names: Sequence[str], only: str = "", sample: bool = False, cells: bool = False) -> list[Job]:
    """The cases whose name has `only` in it, on each of the GPUs; of a sample some of them on each.

    cells: those of cells other than the LSTM, and of zoneout, alone.
    """
    return [
        (case, gpus.named(name))
        for k, case in enumerate(CASES)
        for name in gpu_names
        if only in str(case)
        and case.of_cells >= cells
        and (not sample or (k + APART * GPUS.index(name)) % SAMPLED == 0)
    ]


def precision_of(case: Case, gpu: Gpu) -> str:
    """Of products: TF32 where it is allowed, on NVIDIA's GPUs; Triton refuses it for gfx90a, whatever the dtype."""
    return "ieee" if case.dtype == "fp32" or not gpu.is_nvidia else "tf32"


def work_of(case: Case, gpu: Gpu) -> Work:
    """What plans are made for."""
    dtype, directions = DTYPES[case.dtype], 2 if case.form == "D2" else 1
    sizes = case.batch, case.hidden, case.size, case.hidden, launching.STEPS
    precision = precision_of(case, gpu) if dtype == torch.float32 else "ieee"
    return Work(*sizes, dtype, directions, precision, case.records, cells.of(case.cell), case.form == "zoneout")


def plan_of(case: Case, gpu: Gpu) -> Plan:
    """What the library chooses there."""
    work = work_of(case, gpu)
    front = tiling.wavefront(gpu, work, 2) if case.form == "L2" else None
    strategy = case.strategy if case.strategy and tiling.candidates(gpu, work, 1, case.strategy) else None
    return front or tiling.choose(gpu, work, strategy=strategy)
