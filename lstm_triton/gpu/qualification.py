"""Whether a strategy's kernels are right on a device: small layers, forward and backward, against float64 on the CPU.

`backend="auto"` takes a strategy on a GPU only after that. What was found is kept on disk for that model of GPU, its
driver, the versions and the library's source; `python -m lstm_triton doctor` shows it.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lstm_triton import cells, launching, planning, reference
from lstm_triton.gpu import gpus, kept, tiling
from lstm_triton.gpu.model import Work
from lstm_triton.tolerances import DTYPES, TOLERANCES, excess, precision

logger = logging.getLogger("lstm_triton")

PASSED, NO_PLAN = "passed", "no plan fits"


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

    def __str__(self) -> str:
        steps, shortest = self.lengths[0], self.lengths[-1]
        span = f"T={steps}" if steps == shortest else f"T={shortest}…{steps}"
        words = f"{span} B={len(self.lengths)} I={self.features} H={self.hidden} D={self.directions}"
        more = [f"K={self.size}"] * (self.size > 0) + [f"L={self.layers}"] * (self.layers > 1)
        return " ".join([words, *more, *["with recurrent dropout"] * self.drops])


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
# Layers that run as one launch.
FRONTS = (Case([7] * 19, 13, 29, layers=3), Case(RAGGED, 5, 130, layers=2, bias=False, drops=True))

_states: dict[tuple[torch.device, str, str, bool], str] = {}
_qualifying = threading.Lock()


def state(strategy: str, name: str, projected: bool, device: torch.device) -> str | None:
    """What was found of a strategy: "passed", "no plan fits" or "failed: …"; None where it wasn't run yet.

    Args:
        strategy: as `planning.force` takes it.
        name: a precision, of `lstm_triton.tolerances.DTYPES`.
        projected: whether of layers with projections.
        device: where.
    """
    key = device, strategy, name, projected
    if key not in _states:
        found = kept.read("qualified", kept.machine(device), _about(strategy, name, projected))
        if found is None:
            return None
        _states[key] = found["state"]
    return _states[key]


def qualified(strategy: str, name: str, projected: bool, device: torch.device) -> bool:
    """Whether a strategy is right, arguments as of `state`. Runs it where that isn't known; warns if it isn't right."""
    with _qualifying:
        known = state(strategy, name, projected, device)
        if known is None:
            logger.warning(  # because someone waits
                "lstm_triton: checking the kernels of %s in %s on %s, once (up to a minute, they compile); kept in %s",
                *(repr(strategy), name, kept.machine(device).device, kept.folder()),
            )
            known = qualify(strategy, name, projected, device)
        return known == PASSED


def qualify(strategy: str, name: str, projected: bool, device: torch.device) -> str:
    """Runs a strategy, arguments as of `state`; keeps and returns what is found, as there."""
    wrong, lasting = None, True
    layers = [case for case in cases(strategy, projected) if _fits(case, strategy, name, device)]
    try:
        for case in layers:
            wrong = wrong or check(case, strategy, name, device)
    except torch.OutOfMemoryError as error:
        wrong, lasting = kept.summary(error), False
    except Exception as error:
        wrong = kept.summary(error)
    found = f"failed: {wrong}" if wrong else PASSED if layers else NO_PLAN
    _states[device, strategy, name, projected] = found
    machine, about = kept.machine(device), _about(strategy, name, projected)
    if wrong:
        what = f"{strategy!r} in {name}{' with projections' if projected else ''}"
        kept.warn(
            f"{about}", f"kernels of the strategy {what} are switched off on {machine.device}: {wrong}; {kept.REPORT}"
        )
    if lasting:
        kept.write("qualified", machine, about, {"state": found})
    return found


def check(case: Case, strategy: str, name: str, device: torch.device) -> str | None:
    """What is wrong with a strategy on a layer, in words; None if nothing is. Arguments as of `state`."""
    atol, rtol = TOLERANCES[name]
    with _undisturbed(name, device), planning.force(strategy):
        pairs = _both(case, DTYPES[name], device)
    for what, (found, expected) in pairs.items():
        error = excess(found, expected, atol, rtol)
        if error is not None:
            return f"{what} of {case}: off by {error:.1e} of its largest element, tolerance {atol:.0e}"
    return None


def _fits(case: Case, strategy: str, name: str, device: torch.device) -> bool:
    """Whether a GPU has room for any plan by which the strategy runs a layer."""
    if device.type != "cuda":
        return True
    sizes = len(case.lengths), case.hidden, case.size or case.hidden, case.features
    work = Work(*sizes, launching.STEPS, DTYPES[name], case.directions, "tf32" if name == "tf32" else "ieee")
    kind = "cooperative" if strategy == "wavefront" else strategy
    return bool(tiling.candidates(gpus.of(device), work, case.layers, kind))


def cases(strategy: str, projected: bool) -> tuple[Case, ...]:
    """The layers that a strategy is run on."""
    if strategy == "wavefront":
        return FRONTS
    if projected:
        return PROJECTED
    return CASES if strategy == "persistent" else CASES + WIDE


def _both(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Outputs in training and in inference, and gradients, of a layer: ours and in float64 on the CPU."""
    # Not at the top: what this is imported by is imported there.
    from lstm_triton import functional

    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return x.to(dtype)

    lengths, hidden, directions = case.lengths, case.hidden, case.directions
    steps, batch, size = lengths[0], len(lengths), case.size or hidden
    rows = [sum(length > t for length in lengths) for t in range(steps)]
    ragged = rows[-1] < batch
    batch_sizes = torch.tensor(rows, dtype=torch.int64, device="cpu") if ragged else None
    input = random(sum(rows), case.features) if ragged else random(steps, batch, case.features)
    count, width = case.layers * directions, directions * size
    hx, cx = random(count, batch, size), random(count, batch, hidden)
    others = [(4 * hidden, size)] + [(4 * hidden,)] * 2 * case.bias + [(size, hidden)] * (case.size > 0)
    inputs = [case.features] + [width] * (case.layers - 1)
    shapes = [shape for each in inputs for shape in [(4 * hidden, each), *others] * directions]
    weights = [random(*shape).div(hidden**0.5) for shape in shapes]
    mask = 2.0 * (random(count, steps, batch, size) > 0) if case.drops else None
    doutputs = random(*input.shape[:-1], width), random(*hx.shape), random(*cx.shape)
    names = ["output", "h_n", "c_n", "the input's gradient", "h_0's gradient", "c_0's gradient"]
    names += [f"the gradient of weight {k}" for k in range(len(weights))]

    def run(ours: bool, training: bool) -> list[Tensor]:
        place, kind = (device, dtype) if ours else (torch.device("cpu"), torch.float64)
        x, h, c, *w = (t.to(place, kind).requires_grad_(training) for t in (input, hx, cx, *weights))
        m = None if mask is None else mask.to(place, kind)
        two, layers = directions == 2, case.layers
        if ours:
            outputs = functional.lstm(
                x, (h, c), w, batch_sizes=batch_sizes, num_layers=layers, bias=case.bias, bidirectional=two,
                recurrent_dropout_mask=m, backend="triton",
            )  # fmt: skip
        else:
            outputs = reference.stack(cells.of("lstm"), x, (h, c), w, batch_sizes, layers, case.bias, two, mask=m)
        if not training:
            return list(outputs)
        gradients = torch.autograd.grad(outputs, [x, h, c, *w], [d.to(place, kind) for d in doutputs])
        return [t.detach() for t in (*outputs, *gradients)]

    expected = run(False, True)
    pairs = dict(zip(names, zip(run(True, True), expected, strict=True), strict=True))
    inference = zip(names[:3], run(True, False), expected[:3], strict=True)
    return pairs | {f"{name} in inference": (found, right) for name, found, right in inference}


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


def _about(strategy: str, name: str, projected: bool) -> dict[str, Any]:
    return {"strategy": strategy, "precision": name, "projected": projected}
