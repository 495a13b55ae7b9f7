"""`lstm_triton.plan`: how a layer would run on a GPU, which need not be there, and what it is predicted to take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lstm_triton import cells
from lstm_triton.gpu import gpus, others, tiling
from lstm_triton.gpu.gpus import KIB, Gpu
from lstm_triton.gpu.model import Prediction, Work, predict
from lstm_triton.planning import STRATEGIES, Plan
from lstm_triton.recurrence import rnn_precision

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
_LAUNCHES = {"persistent": "one launch a sequence", "cooperative": "one launch a sequence", "step": "one launch a step"}


@dataclass(frozen=True)
class Alternative:
    """Another way to run the call, or the one that was chosen."""

    name: str
    plan: Plan | None = None  # None: PyTorch's operator
    forward: Prediction | None = None  # µs a step of all layers; None where it can't run
    backward: Prediction | None = None
    why_not: str = ""

    @property
    def total(self) -> float:
        """µs a step, predicted: of forward and, in training, backward."""
        return sum(p.total for p in (self.forward, self.backward) if p is not None)


@dataclass(frozen=True)
class Planned:
    """How a call would run on a GPU. All times are *predicted*, by `lstm_triton.gpu.model`; `str` is a table."""

    gpu: Gpu
    work: Work  # the first layer's
    layers: int
    plan: Plan
    grid: tuple[int, int, int]  # programs: tiles of units, of the batch, directions or layers
    weight_bytes: int  # of a program's recurrent weights that stay on its multiprocessor
    shared_bytes: tuple[int, int]  # of a program's shared memory, forward and backward
    forward: Prediction  # µs a step of all layers
    backward: Prediction | None  # None for inference
    alternatives: list[Alternative]  # the fastest first; those that can't run last

    @property
    def programs(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def __str__(self) -> str:
        return "\n".join([*self._call(), *self._plan(), "", *self._terms(), "", *self._alternatives()])

    def _call(self) -> list[str]:
        work, gpu = self.work, self.gpu
        name = next(name for name, dtype in DTYPES.items() if dtype == work.dtype)
        tf32 = f" ({'TF32' if work.precision == 'tf32' else 'no TF32'})" if name == "fp32" else ""
        sizes = [f"cell {work.cell.name}"] * (work.cell is not cells.of("lstm"))
        sizes += [f"H={work.hidden}", f"I={work.features}", f"B={work.batch}", f"T={work.steps}", f"{name}{tf32}"]
        sizes += [f"K={work.size}"] if work.size != work.hidden else []
        sizes += [f"{self.layers} layers"] if self.layers > 1 else []
        sizes += ["bidirectional"] if work.directions == 2 else []
        sizes += ["training" if work.training else "inference"]
        return [f"call: {', '.join(sizes)}", f"GPU:  {gpu.name}, {gpu.target}, {gpu.sms} multiprocessors"]

    def _plan(self) -> list[str]:
        plan, (units, tiles, planes) = self.plan, self.grid
        parts = [plan.strategy, _LAUNCHES[plan.strategy]]
        parts += [f"all {plan.layers} layers as a wavefront"] if plan.layers > 1 else []
        own = f"{plan.block_b} rows and {plan.block_h} units, {plan.num_warps} warps"
        own += f", products in {plan.slices} slices" if plan.slices > 1 else ""
        own += ", no tensor cores" if plan.matvec else ""
        planes_are = "layers" if plan.layers > 1 else "directions"
        lines = [
            f"plan: {', '.join(parts)}",
            f"      {self.programs:,} programs ({units} of units x {tiles} of rows x {planes} {planes_are}) of {own}",
        ]
        forward, backward = (f"{n / KIB:,.0f}" for n in self.shared_bytes)
        shared = f"{forward} KiB forward" + (f", {backward} backward" if self.backward else "")
        limit = f"{self.gpu.limits.shared_per_program / KIB:.0f}"
        kept = f"{self.weight_bytes / KIB:,.0f} KiB of weights stay on chip" if self.weight_bytes else "no weights stay"
        return [*lines, f"      a program: {kept}; shared memory at most {shared}, of {limit}"]

    def _terms(self) -> list[str]:
        passes = [self.forward] + ([self.backward] if self.backward else [])
        names = list(dict.fromkeys(name for prediction in passes for name in prediction.terms))
        rows = [(name, *(_number(p.terms.get(name)) for p in passes)) for name in names]
        rows += [("total", *(_number(p.total) for p in passes)), ("bound by", *(p.bound for p in passes))]
        return _table(("predicted, µs a step", "forward", "backward")[: len(passes) + 1], rows)

    def _alternatives(self) -> list[str]:
        head = ("alternatives, predicted, µs a step", "forward", "backward")[: 2 + (self.backward is not None)]
        rows = []
        for way in self.alternatives:
            chosen = " <-" if way.plan == self.plan else ""
            cells = [_number(p.total) if p else "-" for p in (way.forward, way.backward)][: len(head) - 1]
            rows.append((way.name + chosen, *cells))
        notes = [f"{way.name}: {way.why_not}" for way in self.alternatives if way.why_not]
        return [*_table(head, rows), *notes]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(max(w, 9)) for x, w in zip(row[1:], widths[1:], strict=True))])
        for row in (head, *rows)
    ]


def plan(
    *,
    batch: int,
    hidden: int,
    input: int | None = None,
    layers: int = 1,
    bidirectional: bool = False,
    proj: int = 0,
    dtype: torch.dtype | str = torch.float32,
    gpu: str | Gpu | None = None,
    steps: int = 1024,
    training: bool = True,
    tf32: bool | None = None,
    cell: str = "lstm",
) -> Planned:
    """How an LSTM, or layers of another cell, run on a GPU by this project's kernels, and what a time step is predicted
    to take.

    Args:
        batch: B.
        hidden: H, `hidden_size`.
        input: I, `input_size`; None: H.
        layers: `num_layers`.
        bidirectional: whether there are two directions.
        proj: K, `proj_size`; 0: none.
        dtype: of input and weights: float32, float16, bfloat16 or float64, or "fp32", "fp16", "bf16", "fp64".
        gpu: a name in `lstm_triton.gpu.gpus.GPUS`, such as "h100"; None: the current GPU.
        steps: T.
        training: whether backward follows.
        tf32: whether products of float32 may be made as TF32; None: as PyTorch's setting for RNNs has it.
        cell: the name of a `lstm_triton.cells.Cell`, such as "gru", "rnn-tanh" or "lstm-norm".

    Raises:
        TypeError, ValueError, RuntimeError: an argument has the wrong type or value, there is no GPU, or no kernel has
            room there; the message names it, what was given and what is accepted.
    """
    for name, value in (("batch", batch), ("hidden", hidden), ("layers", layers), ("steps", steps)):
        _check_count(name, value, 1)
    if input is not None:
        _check_count("input", input, 1)
    _check_count("proj", proj, 0)
    if proj >= hidden:
        raise ValueError(f"proj should be an integer from 0 to {hidden - 1}, below hidden, got {proj}")
    for name, flag in (("bidirectional", bidirectional), ("training", training)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} should be True or False, got {flag!r}")
    if tf32 is not None and not isinstance(tf32, bool):
        raise TypeError(f"tf32 should be True, False or None, got {tf32!r}")
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ValueError(f"dtype should be one of {', '.join(DTYPES)} or such a torch.dtype, got {dtype!r}")
    found = cells.of(cell)
    if proj and not found.carries:
        raise ValueError(f"proj should be 0 for the cell {cell!r}, which has no state but h, got {proj}")
    precision = rnn_precision(torch.device("cuda")) if tf32 is None else "tf32" if tf32 else "ieee"
    work = Work(
        batch, hidden, proj or hidden, input or hidden, steps, chosen, 1 + bidirectional,
        precision if chosen == torch.float32 else "ieee", training, found,
    )  # fmt: skip
    return _planned(_gpu(gpu), work, layers)


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} should be an integer of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} should be an integer of at least {least}, got {value}")


def _gpu(gpu: str | Gpu | None) -> Gpu:
    if isinstance(gpu, Gpu):
        return gpu
    if gpu is not None:
        return gpus.named(gpu)
    if not torch.cuda.is_available():
        raise RuntimeError(f"gpu should be named where PyTorch finds none: one of {', '.join(gpus.GPUS)}")
    return gpus.of()


def alternatives(gpu: Gpu, work: Work, layers: int) -> list[Alternative]:
    """The ways to run so many layers, the fastest first, those that can't run last; arguments as of `Planned`."""
    inner = replace(work, features=work.directions * work.size)  # the layers above the first
    ways = []
    for best, _ in tiling.proposals(gpu, work, layers):
        name = f"{best.strategy}, wavefront" if best.layers > 1 else best.strategy
        ways.append(_predicted(name, gpu, best, work, inner, layers // best.layers))
    missing = [name for name in STRATEGIES if name not in [way.name for way in ways]]
    if work.has_operator:
        ways.append(_operator(gpu, work, inner, layers))
    ways += [Alternative(name, why_not=tiling.why_not(gpu, work, 1, name)) for name in missing]
    return sorted(ways, key=lambda way: (way.forward is None, way.total))


def _planned(gpu: Gpu, work: Work, layers: int) -> Planned:
    ways = alternatives(gpu, work, layers)
    first = next((way for way in ways if way.plan is not None), None)
    if first is None:
        why = "; ".join(f"{way.name}: {way.why_not}" for way in ways if way.plan is None and way.forward is None)
        raise ValueError(
            f"no kernel for the cell {work.cell.name!r} has room on {gpu.name} with H={work.hidden}: {why}"
        )
    assert first.plan is not None and first.forward is not None
    shared = tiling.shared_bytes(first.plan, work), tiling.shared_bytes(first.plan, work, True)
    return Planned(
        gpu, work, layers, first.plan, tiling.programs(first.plan, work), tiling.weight_bytes(first.plan, work),
        shared, first.forward, first.backward, ways,
    )  # fmt: skip


def _predicted(name: str, gpu: Gpu, plan: Plan, work: Work, inner: Work, layers: int) -> Alternative:
    """A plan's prediction for so many layers, one after the other."""

    def of(backward: bool) -> Prediction:
        return _sum([predict(gpu, plan, work if k == 0 else inner, backward) for k in range(layers)])

    return Alternative(name, plan, of(False), of(True) if work.training else None)


def _operator(gpu: Gpu, work: Work, inner: Work, layers: int) -> Alternative:
    module = f"nn.{str(work.cell.operator).partition('_')[0].upper()}"
    algorithm, forward = others.predict_operator(gpu, work, layers)
    if forward is None:
        return Alternative(module, why_not="no prediction for MIOpen")
    rest = (others.predict_operator(gpu, inner, layers)[1] for _ in range(layers - 1))
    both = _sum([forward, *(p for p in rest if p is not None)])
    name = f"{module} (cuDNN, {algorithm})"
    if not work.training:
        return Alternative(name, None, both)
    each = (others.predict_operator(gpu, work if k == 0 else inner, layers, True)[1] for k in range(layers))
    return Alternative(name, None, both, _sum([p for p in each if p is not None]))


def _sum(predictions: Sequence[Prediction]) -> Prediction:
    terms: dict[str, float] = {}
    for prediction in predictions:
        for name, value in prediction.terms.items():
            terms[name] = terms.get(name, 0.0) + value
    return Prediction(terms)
