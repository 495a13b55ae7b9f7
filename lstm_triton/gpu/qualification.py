"""Whether a strategy's kernels are right on a device: small layers, forward and backward, against float64 on the CPU.

`backend="auto"` takes a strategy on a GPU only after that. What was found is kept on disk for that model of GPU, its
driver, the versions and the library's source; `python -m lstm_triton doctor` shows it.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lstm_triton import cells, launching, planning, reference
from lstm_triton.gpu import gpus, kept, tiling
from lstm_triton.gpu.model import Work
from lstm_triton.recurrence import Zoneout, present
from lstm_triton.tolerances import DTYPES, TOLERANCES, excess, precision

logger = logging.getLogger("lstm_triton")

PASSED, NO_PLAN = "passed", "no plan fits"
# What rounds numbers, of a tolerance; and how far off results may be in the mean where they jump at such a difference.
NOISE, MEAN_ERROR = 0.25, 0.1


class Case(NamedTuple):
    """A layer and an input for it."""

    lengths: Sequence[int]  # steps of each row, the longest first
    features: int
    hidden: int
    directions: int = 1
    size: int = 0  # K where h is projected
    bias: bool = True
    drops: bool = False
    layers: int = 1
    zoneout: tuple[float, float] | None = None  # as expected, of h and of c

    def __str__(self) -> str:
        steps, shortest = self.lengths[0], self.lengths[-1]
        span = f"T={steps}" if steps == shortest else f"T={shortest}…{steps}"
        words = f"{span} B={len(self.lengths)} I={self.features} H={self.hidden} D={self.directions}"
        more = [f"K={self.size}"] * (self.size > 0) + [f"L={self.layers}"] * (self.layers > 1)
        return " ".join(
            [words, *more, *["with recurrent dropout"] * self.drops, *["with zoneout"] * bool(self.zoneout)]
        )


RAGGED = [11, 11, 10, 8, 7, 7, 7, 6, 6, 5, 4, 4, 4, 3, 2, 2, 1, 1]
# One step of one row; more rows than a program's 16, sizes that no tile is full with.
CASES = (
    Case([1], 3, 1),
    Case([9] * 19, 13, 29, directions=2),
    Case(RAGGED, 5, 32, directions=2, bias=False, drops=True),
)
# For strategies that divide the units among programs.
WIDE = (Case([6] * 17, 20, 150), Case([5, 5, 3, 1], 6, 130, directions=2, drops=True))
PROJECTED = (Case([6] * 17, 5, 31, directions=2, size=11, drops=True), Case([5, 3, 3, 1], 5, 32, size=16))
# For cells that have a state of their own.
ZONED = (Case(RAGGED, 5, 31, directions=2, zoneout=(0.25, 0.5)),)
# Layers that run as one launch.
FRONTS = (Case([7] * 19, 13, 29, layers=3), Case(RAGGED, 5, 130, layers=2, bias=False, drops=True))

_states: dict[tuple[torch.device, str, str, bool, str], str] = {}
_qualifying = threading.Lock()


def state(strategy: str, name: str, projected: bool, device: torch.device, cell: str = "lstm") -> str | None:
    """What was found of a strategy: "passed", "no plan fits" or "failed: …"; None where it wasn't run yet.

    Args:
        strategy: as `planning.force` takes it.
        name: a precision, of `lstm_triton.tolerances.DTYPES`.
        projected: whether of layers with projections.
        device: where.
        cell: the name of what the layers do in a step.
    """
    key = device, strategy, name, projected, cell
    if key not in _states:
        found = kept.read("qualified", kept.machine(device), _about(strategy, name, projected, cell))
        if found is None:
            return None
        _states[key] = found["state"]
    return _states[key]


def qualified(strategy: str, name: str, projected: bool, device: torch.device, cell: str = "lstm") -> bool:
    """Whether a strategy is right, arguments as of `state`. Runs it where that isn't known; warns if it isn't right."""
    with _qualifying:
        known = state(strategy, name, projected, device, cell)
        if known is None:
            logger.warning(  # because someone waits
                "lstm_triton: checking the kernels of %s in %s on %s, once (up to a minute, they compile); kept in %s",
                *(_named(strategy, cell), name, kept.machine(device).device, kept.folder()),
            )
            known = qualify(strategy, name, projected, device, cell)
        return known == PASSED


def qualify(strategy: str, name: str, projected: bool, device: torch.device, cell: str = "lstm") -> str:
    """Runs a strategy, arguments as of `state`; keeps and returns what is found, as there."""
    wrong, lasting = None, True
    layers = [case for case in cases(strategy, projected, cell) if _fits(case, strategy, name, device, cell)]
    try:
        for case in layers:
            wrong = wrong or check(case, strategy, name, device, cell)
    except torch.OutOfMemoryError as error:
        wrong, lasting = kept.summary(error), False
    except Exception as error:
        wrong = kept.summary(error)
    found = f"failed: {wrong}" if wrong else PASSED if layers else NO_PLAN
    _states[device, strategy, name, projected, cell] = found
    machine, about = kept.machine(device), _about(strategy, name, projected, cell)
    if wrong:
        what = f"{_named(strategy, cell)} in {name}{' with projections' if projected else ''}"
        kept.warn(
            f"{about}", f"kernels of the strategy {what} are switched off on {machine.device}: {wrong}; {kept.REPORT}"
        )
    if lasting:
        kept.write("qualified", machine, about, {"state": found})
    return found


def check(case: Case, strategy: str, name: str, device: torch.device, cell: str = "lstm") -> str | None:
    """What is wrong with a strategy on a layer, in words; None if nothing is. Arguments as of `state`."""
    atol, rtol = TOLERANCES[name]
    with _undisturbed(name, device), planning.force(strategy):
        compared = _Compared(case, DTYPES[name], device, cells.of(cell))
        pairs = compared.both()
        for what, (found, expected) in pairs.items():
            error = error_of(found, expected, partial(compared.apart, NOISE * atol, what), atol, rtol)
            if error is not None:
                return f"{what} of {case}: off by {error:.1e} of its largest element, tolerance {atol:.0e}"
    return None


def error_of(found: Tensor, expected: Tensor, apart: Callable[[], Tensor], atol: float, rtol: float) -> float | None:
    """How far off a result is, as `excess` has it; None where that is tolerated.

    Some results jump: a gradient where relu bends, and a sum that is rounded to the other side is no error. So where
    what is expected is itself that far from what is expected `apart`, with numbers a rounding away, the mean decides.
    """
    error = excess(found, expected, atol, rtol)
    if error is None or excess(apart(), expected, atol, rtol) is None:
        return error
    mean = (found.to(expected) - expected).norm() / expected.norm()
    return None if mean <= MEAN_ERROR else error


def nearby(x: Tensor, noise: float) -> Tensor:
    """x, each of its numbers off by about so much of itself; x itself without noise."""
    return x if noise == 0 else x * (1 + noise * torch.randn_like(x, dtype=torch.float32).to(x.dtype))


def _named(strategy: str, cell: str) -> str:
    return repr(strategy) if cell == "lstm" else f"{strategy!r} for the cell {cell!r}"


def _fits(case: Case, strategy: str, name: str, device: torch.device, cell: str) -> bool:
    """Whether a GPU has room for any plan by which the strategy runs a layer."""
    if device.type != "cuda":
        return True
    sizes = len(case.lengths), case.hidden, case.size or case.hidden, case.features
    precision, zoned = "tf32" if name == "tf32" else "ieee", case.zoneout is not None
    work = Work(*sizes, launching.STEPS, DTYPES[name], case.directions, precision, cell=cells.of(cell), zoneout=zoned)
    kind = "cooperative" if strategy == "wavefront" else strategy
    return bool(tiling.candidates(gpus.of(device), work, case.layers, kind))


def cases(strategy: str, projected: bool, cell: str = "lstm") -> tuple[Case, ...]:
    """The layers of a cell that a strategy is run on; none where it doesn't run them."""
    of = cells.of(cell)
    if strategy == "wavefront":
        return FRONTS if of.is_plain and not of.whole_rows else ()
    if strategy == "cooperative" and (of.whole_rows or (projected and of.inputs < of.sums)):
        return ()
    if projected:
        return PROJECTED if of.carries else ()
    found = CASES + (WIDE if strategy != "persistent" else ()) + (ZONED if of.carries else ())
    # A row of one unit has nothing to be normed with: its gradients are what rounding leaves of zero.
    return tuple(case._replace(hidden=max(case.hidden, 5)) for case in found) if of.whole_rows else found


class _Compared:
    """Outputs in training and in inference, and gradients, of a layer: ours and in float64 on the CPU."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device, cell: cells.Cell) -> None:
        generator = torch.Generator("cpu").manual_seed(0)

        def random(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
            return x.to(dtype)

        lengths, hidden, directions = case.lengths, case.hidden, case.directions
        steps, batch, size = lengths[0], len(lengths), case.size or hidden
        rows = [sum(length > t for length in lengths) for t in range(steps)]
        ragged = rows[-1] < batch
        self.case, self.dtype, self.device, self.cell = case, dtype, device, cell
        self.batch_sizes = torch.tensor(rows, dtype=torch.int64, device="cpu") if ragged else None
        input = random(sum(rows), case.features) if ragged else random(steps, batch, case.features)
        count, width = case.layers * directions, directions * size
        states = [random(count, batch, size), random(count, batch, hidden)][: 1 + cell.carries]
        inputs, recurrent, biased = (n * hidden for n in (cell.inputs, len(cell.recurrent), len(cell.biases)))
        others = [(recurrent, size)] + [(inputs,), (biased,)] * case.bias + [(size, hidden)] * (case.size > 0)
        features = [case.features] + [width] * (case.layers - 1)
        shapes = [shape for each in features for shape in [(inputs, each), *others] * directions]
        self.inputs = [input, *states]
        scale = (3 * hidden) ** 0.5  # as PyTorch's: functions that are saturated leave no digits for their derivatives
        self.weights = [random(*shape).div(scale) for shape in shapes]
        # Each direction's parameters of the cell follow its weights.
        each = len(others) + 1
        for k in range(count, 0, -1):
            extra = [random(p.vectors * hidden).div(scale) + (p.initial or 0.0) for p in present(cell, case.bias)]
            self.weights[k * each : k * each] = extra
        self.mask = 2.0 * (random(count, steps, batch, size) > 0) if case.drops else None
        outputs = [(*input.shape[:-1], width), *(tuple(x.shape) for x in states)]
        self.doutputs = [random(*shape) for shape in outputs]
        names = ["h", "c"][: len(states)]
        self.outputs = ["output", *(f"{name}_n" for name in names)]
        self.names = [*self.outputs, "the input's gradient", *(f"{name}_0's gradient" for name in names)]
        self.names += [f"the gradient of weight {k}" for k in range(len(self.weights))]

    def both(self) -> dict[str, tuple[Tensor, Tensor]]:
        """What is found and what is expected, by name."""
        self.expected = self._expected([*self.inputs, *self.weights])
        pairs = dict(zip(self.names, zip(self._ours(True), self.expected, strict=True), strict=True))
        inference = zip(self.outputs, self._ours(False), self.expected, strict=False)
        return pairs | {f"{name} in inference": (found, right) for name, found, right in inference}

    def apart(self, noise: float, name: str) -> Tensor:
        """What is expected where all numbers that go in are off by about so much of themselves."""
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            given = [nearby(x.double(), noise) for x in (*self.inputs, *self.weights)]
        return self._expected(given)[self.names.index(name.removesuffix(" in inference"))]

    def _expected(self, tensors: list[Tensor]) -> list[Tensor]:
        case, count = self.case, len(self.inputs)
        leaves = [x.double().requires_grad_() for x in tensors]
        mask = None if self.mask is None else self.mask.double()
        zoneout = None if case.zoneout is None else Zoneout(*case.zoneout)
        found = reference.stack(
            self.cell, leaves[0], (leaves[1], leaves[count - 1]), leaves[count:], self.batch_sizes, case.layers,
            case.bias, case.directions == 2, mask=mask, zoneout=zoneout,
        )  # fmt: skip
        return self._with_gradients(found[:count], leaves)

    def _ours(self, training: bool) -> list[Tensor]:
        # Not at the top: what this is imported by is imported there.
        from lstm_triton import functional

        case, count = self.case, len(self.inputs)
        leaves = [x.to(self.device, self.dtype).requires_grad_(training) for x in (*self.inputs, *self.weights)]
        mask = None if self.mask is None else self.mask.to(self.device, self.dtype)
        found = functional.recurrent(
            self.cell, leaves[0], tuple(leaves[1:count]), leaves[count:], batch_sizes=self.batch_sizes,
            num_layers=case.layers, bias=case.bias, bidirectional=case.directions == 2, recurrent_dropout_mask=mask,
            zoneout=case.zoneout or (0.0, 0.0), backend="triton",
        )  # fmt: skip
        return self._with_gradients(found, leaves) if training else list(found)

    def _with_gradients(self, outputs: Sequence[Tensor], leaves: list[Tensor]) -> list[Tensor]:
        gradients = torch.autograd.grad(outputs, leaves, [d.to(outputs[0]) for d in self.doutputs])
        return [x.detach() for x in (*outputs, *gradients)]


@contextmanager
def _undisturbed(name: str, device: torch.device) -> Iterator[None]:
    """Within this context gradients are recorded and products are made in precision `name`, whatever the user set."""
    rnn: Any = torch.backends.cudnn.rnn  # its type has no word of the setting
    given = rnn.fp32_precision
    if device.type == "cuda" and DTYPES[name] == torch.float32 and precision(torch.float32, device) != name:
        rnn.fp32_precision = "tf32" if name == "tf32" else "ieee"
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            plain_hooks(),
        ):
            yield
    finally:
        if rnn.fp32_precision != given:
            rnn.fp32_precision = given


def plain_hooks() -> AbstractContextManager[None]:
    """Within this context the user's hooks on tensors saved for backward see none of ours."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def _about(strategy: str, name: str, projected: bool, cell: str) -> dict[str, Any]:
    return {"strategy": strategy, "precision": name, "projected": projected, "cell": cell}
