"""The cooperative kernels in `grid_simulator`: no races and right values in many orders; each mutant has a race.

Layers are small: two or three programs share the hidden units, the last has fewer, and the batch has two tiles.
"""

import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from barrier_mutants import MUTANTS, ONE_TOO_MANY, put_in  # noqa: E402
from grid_simulator import Deadlock, Race, Run, simulated  # noqa: E402

from checks import Case, assert_close, results, shaped  # noqa: E402
from lstm_triton import TritonGRU, TritonLSTM, TritonRNN, functional, kernels, launching, planning  # noqa: E402
from lstm_triton.kernels import barrier  # noqa: E402
from lstm_triton.recurrence import Layer  # noqa: E402

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(not kernels.INTERPRETED, reason="it simulates interpreted kernels"),
]

CPU = torch.device("cpu")


class Masked(nn.Module):
    """A layer with a mask that is given."""

    def __init__(self, module: TritonLSTM, mask: Tensor) -> None:
        super().__init__()
        self.module, self.mask = module, mask

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        module = self.module
        y, h, c = functional.lstm(
            x, hx, module._flat_weights, bidirectional=module.bidirectional, recurrent_dropout_mask=self.mask.to(x),
            backend=module.backend,
        )  # fmt: skip
        return y, (h, c)


class WithoutC(nn.Module):
    """A module that has no c, called as one that has."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, h = self.module(x, hx[0])
        return y, (h, hx[1].clone())


@dataclass(frozen=True)
class Example:
    """A call of the cooperative kernels."""

    case: Case
    options: dict[str, Any] = field(default_factory=dict)  # of the module
    plan: dict[str, Any] = field(default_factory=dict)
    given: int = 0  # steps of a mask that is given
    trains: bool = True
    kind: Any = TritonLSTM

    @property
    def programs(self) -> int:
        """In a launch."""
        planes = 2 if self.case.bidirectional else self.case.num_layers
        return (2 if self.case.hidden_size == 13 else 3) * 2 * planes

    def modules(self) -> tuple[nn.Module, nn.Module]:
        """The reference in float64, nn.LSTM unless it knows no such cell or dropout, and ours."""
        if self.kind is TritonLSTM and not self.given and self.options.keys() <= {"recompute"}:
            return self.case.modules(CPU, torch.float32, backend="triton", **self.options)
        given = {k: v for k, v in self.case.arguments.items() if self.kind is TritonLSTM or k != "proj_size"}
        ours = self.kind(**given, backend="triton", **self.options)
        reference = self.kind(**given, backend="eager", dtype=torch.float64, **self.options)
        reference.load_state_dict(ours.state_dict())
        if self.kind is not TritonLSTM:
            return WithoutC(reference), WithoutC(ours)
        if self.given:
            directions = 2 if self.case.bidirectional else 1
            mask = torch.randint(2, (directions, self.given, self.case.batch, self.case.hidden_size)) * 2.0
            return Masked(reference, mask), Masked(ours, mask)
        return reference, ours

    def results(
        self, module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        torch.manual_seed(1)  # what masks follow from
        if self.trains:
            return results(module, self.case, inputs, dtype)
        x, h, c = (t.to(dtype) for t in inputs)
        with torch.no_grad():
            y, (hn, cn) = module(x, (h, c))
        return {"output": y, "hn": hn, "cn": cn}

    @contextmanager
    def planned(self) -> Iterator[None]:
        """Layers run by cooperative kernels, with this plan."""
        choose = launching.of

        def chosen(layer: Layer) -> planning.Plan:
            return replace(choose(layer), **{"block_b": 2, **self.plan})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launching, "of", chosen)
            with planning.force("wavefront" if self.case.num_layers > 1 else "cooperative"):
                yield


THREE = dict(hidden_size=20, batch=3)  # programs that share the hidden units
TWO = dict(hidden_size=13, batch=3)
EXAMPLES = {
    "dense": Example(shaped(**THREE, steps=4)),
    "both directions, ragged": Example(shaped(**TWO, bidirectional=True, form="packed")),
    "inner dimension in two blocks and slices": Example(shaped(hidden_size=40, batch=3), plan={"slices": 2}),
    "matrix-vector": Example(shaped(**TWO, bidirectional=True), plan={"matvec": True}, trains=False),
    "projection": Example(shaped(**THREE, proj_size=5, form="packed")),
    "masks drawn each step": Example(shaped(**THREE, form="packed"), {"recurrent_dropout": 0.4}),
    "masks drawn once": Example(
        shaped(**TWO, bidirectional=True), {"recurrent_dropout": 0.4, "recurrent_dropout_mode": "sequence"}
    ),
    "mask given": Example(shaped(**TWO, bidirectional=True), given=3),
    "mask given for all steps": Example(shaped(**THREE), given=1),
    "rebuilt in backward": Example(shaped(**THREE, form="packed"), {"recompute": 2}),
    "wavefront": Example(shaped(**TWO, num_layers=3)),
    "wavefront, inference": Example(shaped(**THREE, num_layers=2), trains=False),
    "wavefront, ragged, all dropouts": Example(
        shaped(**TWO, num_layers=2, form="packed"), {"dropout": 0.3, "recurrent_dropout": 0.4}
    ),
    "parameters and zoneout": Example(
        shaped(**TWO, bidirectional=True, form="packed"), {"peephole": True, "zoneout": (0.3, 0.2)}
    ),
    "GRU": Example(shaped(**THREE, form="packed"), kind=TritonGRU),
    "wavefront of one sum": Example(shaped(**TWO, num_layers=2, form="packed"), kind=TritonRNN),
}


@pytest.fixture(autouse=True)
def _counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that ends in the middle of a launch leaves none of its counters to the next."""
    monkeypatch.setattr(barrier, "_barriers", {})


def compare(example: Example, **options: Any) -> list[Run]:
    """Values and gradients of one order, against the reference; the launches."""
    reference, ours = example.modules()
    inputs = example.case.inputs(CPU, torch.float32)
    with example.planned(), simulated(cooperative=True, **options) as runs:
        found = example.results(ours, inputs, torch.float32)
    assert_close(found, example.results(reference, inputs, torch.float64), torch.float32)
    assert {run.kernel for run in runs} == {"forward_kernel"} | ({"backward_kernel"} if example.trains else set())
    assert {run.programs for run in runs} == {example.programs}
    return runs


@pytest.mark.parametrize("name", EXAMPLES)
def test_orders(name: str) -> None:
    for seed in range(2):
        compare(EXAMPLES[name], seed=seed, preempt=seed % 2 > 0)


@pytest.mark.parametrize("name,starve", [("dense", (0, 0, 0)), ("dense", (2, 1, 0)), ("wavefront", (1, 0, 1))])
def test_starved_program(name: str, starve: tuple[int, int, int]) -> None:
    compare(EXAMPLES[name], starve=starve)


# ---- Mutants ----

MUTATED = {
    "dense": Example(shaped(**TWO)),
    "both directions": Example(shaped(**TWO, bidirectional=True)),
    "wavefront": Example(shaped(**TWO, num_layers=2)),
}


def fail(example: Example, backward: bool, mutate: Callable[[], None], seed: int = 0) -> None:
    """Runs one pass, in backward after a right forward, with a mutant."""
    _, ours = example.modules()
    x, h, c = example.case.inputs(CPU, torch.float32)
    with example.planned(), simulated(seed, cooperative=True):
        if not backward:
            mutate()
        y, _ = ours(example.case.pack(x.requires_grad_()), (h, c))
        if backward:
            mutate()
            torch.autograd.grad(y.sum(), x)


@pytest.mark.parametrize("layers", ["dense", "wavefront"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_of_the_barrier(mutant: str, backward: bool, layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is seen in one of a few orders, nearly all in the first: one arrival short may come in time by chance."""
    for seed in range(8):
        with monkeypatch.context() as patch:
            patch.setattr(barrier, "_barriers", {})  # a mutant leaves the counters anyhow
            try:
                fail(MUTATED[layers], backward, lambda: put_in(mutant, patch), seed)
            except Race as race:
                assert re.search(r" dgates_ptr" if backward else r" h_ptr| below_ptr", str(race))
                return
    pytest.fail("no race seen")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_deadlock(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Deadlock, match=r"(program \(\d, \d, 0\) waits for counter_ptr\[\d+\] at barrier.*?){4}"):
        fail(MUTATED["dense"], backward, lambda: put_in(ONE_TOO_MANY, monkeypatch))


FIRST_WAIT = "    rounds = barrier.wait(counter_ptr, before, rounds)\n    before = ~before\n"
ARRIVAL = "        barrier.arrive(counter_ptr, leads, programs)\n"
COUNTER = "(tl.program_id(1) * D + d) * _SPACING"
STORE = "        tl.store(h_ptr + then + state_at, shared, mask=state_mask)\n"
GRADIENTS = "        tiles.store(g_at, H, da, cell_mask)\n"
# An example, the pass, and what is replaced in the kernel's file.
KERNEL_MUTANTS = {
    "one buffer": ("dense", False, {"(s % 2) * slot, (1 - s % 2) * slot": "0 * slot, 0 * slot"}),
    "one buffer between layers": ("wavefront", False, {"below_ptr + then": "below_ptr + now"}),
    "no first wait": ("dense", False, {FIRST_WAIT: ""}),
    "early arrival": ("dense", False, {f"{ARRIVAL}        if SAVE": "        if SAVE", STORE: ARRIVAL + STORE}),
    "a counter for both directions": ("both directions", False, {COUNTER: "tl.program_id(1) * _SPACING"}),
    "layers that don't meet": ("wavefront", False, {"programs *= LAYERS": "programs *= 1"}),
    "early arrival, backward": ("dense", True, {ARRIVAL: "", GRADIENTS: ARRIVAL + GRADIENTS}),
    "a counter for both directions, backward": ("both directions", True, {COUNTER: "tl.program_id(1) * _SPACING"}),
    "layers that don't meet, backward": ("wavefront", True, {"programs *= LAYERS": "programs *= 1"}),
}


@pytest.mark.parametrize("mutant", KERNEL_MUTANTS)
def test_mutants_of_the_kernels(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, backward, replaced = KERNEL_MUTANTS[mutant]
    module = kernels.cooperative_backward if backward else kernels.cooperative
    text = Path(module.__file__).read_text()
    for old, new in replaced.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = tmp_path / "mutant.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None and spec.loader is not None
    mutated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutated)
    kernel = "backward_kernel" if backward else "forward_kernel"
    with pytest.raises(Race, match=r"mutant\.py"):
        fail(MUTATED[layers], backward, lambda: monkeypatch.setattr(module, kernel, getattr(mutated, kernel)))


def test_giving_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that look once are told so where one is late; the counters then are as good as before."""
    example = EXAMPLES["dense"]
    with monkeypatch.context() as patch:
        patch.setattr(barrier, "INTERPRETED_ROUNDS", 1)
        with pytest.raises(RuntimeError, match="waited for each other in vain"):
            compare(example, starve=0, races=False)
    compare(example)
