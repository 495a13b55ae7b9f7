"""The cooperative kernels, natively or on a GPU: values, gradients, one launch a pass, and waiting in vain.

Their races are in `test_races.py`, the machine code in `test_machine_code.py`.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton  # noqa: E402

from checks import Case, assert_close, matrix, results, shaped  # noqa: E402
from lstm_triton import TritonLSTM, cells, kernels, launching, ops, planning, reference  # noqa: E402
from lstm_triton.cells.cell import Cell, Parameter, register  # noqa: E402
from lstm_triton.cells.jit import tanh, tl  # noqa: E402
from lstm_triton.cells.lstm import GATES, variant  # noqa: E402
from lstm_triton.cpu import build  # noqa: E402
from lstm_triton.kernels import barrier  # noqa: E402
from lstm_triton.recurrence import Layer, RecurrentDropout, Zoneout, present  # noqa: E402

pytestmark = [
    pytest.mark.skipif(kernels.INTERPRETED, reason="the interpreter runs no two programs at once"),
    pytest.mark.skipif(not torch.cuda.is_available() and not build.has_compiler(), reason="no C compiler"),
]

Launches = list[tuple[str, tuple[int, int, int]]]  # kernel and grid


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """What a test launches of the strategies' kernels."""
    found: Launches = []

    def record(module: ModuleType) -> None:
        start = module.start

        def recorded(kernel: Any, grid: Any, *args: Any, **own: Any) -> None:
            found.append((kernel.fn.__name__, grid))
            start(kernel, grid, *args, **own)

        monkeypatch.setattr(module, "start", recorded)

    for module in (kernels.cooperative, kernels.cooperative_backward, kernels.persistent, kernels.step):
        record(module)
    yield found


@pytest.fixture
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """At most so many share the hidden units on a CPU."""
    monkeypatch.setattr(planning, "COOPERATING", request.param)
    planning.choose_on_cpu.cache_clear()
    return int(request.param)


def compare(case: Case, device: torch.device, dtype: torch.dtype, **options: Any) -> None:
    reference, ours = case.modules(device, dtype, backend="triton", **options)
    inputs = case.inputs(device, dtype)
    assert_close(results(ours, case, inputs, dtype), results(reference, case, inputs, torch.float64), dtype)


@pytest.mark.parametrize("case", matrix()[::5], ids=str)
def test_float32(case: Case, device: torch.device, launches: Launches) -> None:
    with planning.force("cooperative"):
        compare(case, device, torch.float32)
    assert [name for name, _ in launches] == ["forward_kernel"] * case.num_layers + [
        "backward_kernel"
    ] * case.num_layers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=["fp16", "bf16", "fp64"])
@pytest.mark.parametrize("case", matrix()[1::29], ids=str)
def test_other_dtypes(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    with planning.force("cooperative"):
        compare(case, device, dtype)


@pytest.mark.parametrize("programs", [2, 4, 8], indirect=True)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(steps=1, batch=1, hidden_size=16),
        dict(steps=9, batch=1, hidden_size=33),
        dict(steps=5, batch=35, hidden_size=100, bidirectional=True),  # three tiles of the batch
        dict(steps=4, batch=3, hidden_size=128, num_layers=3),
        dict(steps=4, batch=19, hidden_size=61, num_layers=3, bidirectional=True, form="packed"),
        dict(steps=4, batch=17, hidden_size=77, proj_size=13, bidirectional=True, form="packed"),
    ],
    ids=str,
)
def test_sizes(sizes: dict[str, Any], programs: int, device: torch.device, launches: Launches) -> None:
    """On a CPU the hidden units are split over two to eight programs."""
    case = shaped(**sizes)
    with planning.force("cooperative"):
        compare(case, device, torch.float32)
    assert len(launches) == 2 * case.num_layers
    for _, grid in launches:
        assert (grid[1] > 1) == (case.batch > 16) and grid[2] == (2 if case.bidirectional else 1)
        if device.type == "cpu":
            assert 2 <= grid[0] <= programs


@pytest.mark.parametrize(
    "case",
    [
        shaped(num_layers=2, hidden_size=16),
        shaped(num_layers=3, hidden_size=33, batch=19, steps=9),
        shaped(num_layers=3, hidden_size=100, form="packed", batch=35, steps=7),
        shaped(num_layers=2, hidden_size=21, steps=1, batch=1, bias=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_wavefront(case: Case, dtype: torch.dtype, device: torch.device, launches: Launches) -> None:
    """All layers in one launch a pass."""
    with planning.force("wavefront"):
        compare(case, device, dtype)
    assert [(name, grid[2]) for name, grid in launches] == [
        ("forward_kernel", case.num_layers), ("backward_kernel", case.num_layers)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "case", [shaped(num_layers=2, bidirectional=True), shaped(num_layers=2, proj_size=3), shaped()], ids=str
)
def test_no_wavefront(case: Case, device: torch.device, launches: Launches) -> None:
    """Of both directions the layer above needs the whole sequence; a projection is no part of the kernel."""
    with planning.force("wavefront"):
        compare(case, device, torch.float32)
    assert len(launches) == 2 * case.num_layers


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["", "between"])
@pytest.mark.parametrize("mode", ["step", "sequence"])
def test_wavefront_drops_what_layers_one_by_one_do(
    mode: str, dropout: float, training: bool, device: torch.device, launches: Launches
) -> None:
    def run(strategy: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = TritonLSTM(
            5, 33, 3, dropout=dropout, recurrent_dropout=0.3, recurrent_dropout_mode=mode, backend="triton"
        ).to(device)
        x = torch.randn(7, 19, 5, device=device, requires_grad=True)
        with planning.force(strategy), torch.set_grad_enabled(training):
            y, (h, c) = module(x)
        if not training:
            return [y, h, c]
        return [y, h, c, *torch.autograd.grad([y, h, c], [x, *module.parameters()], [y * y, h, c])]

    for ours, expected in zip(run("wavefront"), run("step"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert launches[0][1][2] == 3


def test_wavefront_compiles(device: torch.device, launches: Launches) -> None:
    """As an operator, whose results share no memory."""
    case = shaped(num_layers=3, hidden_size=20)
    reference, ours = case.modules(device, torch.float32, backend="triton")
    inputs = case.inputs(device, torch.float32)
    with planning.force("wavefront"):
        found = results(torch.compile(ours, fullgraph=True), case, inputs, torch.float32)
    assert [name for name, _ in launches] == ["forward_kernel", "backward_kernel"]
    expected = results(reference, case, inputs, torch.float64)
    assert_close({name.replace("_orig_mod.", ""): t for name, t in found.items()}, expected, torch.float32)


@pytest.mark.parametrize("mode", ["step", "sequence"])
def test_recurrent_dropout(mode: str, device: torch.device, launches: Launches) -> None:
    case = shaped(bidirectional=True, form="packed", steps=6, batch=19, hidden_size=33)
    _, ours = case.modules(device, torch.float32, backend="triton", recurrent_dropout=0.4, recurrent_dropout_mode=mode)
    reference = TritonLSTM(
        **case.arguments, backend="eager", recurrent_dropout=0.4, recurrent_dropout_mode=mode, device=device,
        dtype=torch.float64,
    )  # type: ignore[arg-type]  # fmt: skip
    reference.load_state_dict(ours.state_dict())
    inputs = case.inputs(device, torch.float32)
    torch.manual_seed(3)
    with planning.force("cooperative"):
        found = results(ours, case, inputs, torch.float32)
    assert len(launches) == 2
    torch.manual_seed(3)
    assert_close(found, results(reference, case, inputs, torch.float64), torch.float32)


def test_projections_under_recurrent_dropout(device: torch.device, launches: Launches) -> None:
    """The mask lies between the two weights that would be folded: another strategy runs."""
    module = TritonLSTM(5, 20, proj_size=3, recurrent_dropout=0.4, backend="triton").to(device)
    with planning.force("cooperative"):
        module(torch.randn(4, 2, 5, device=device))
    assert len(launches) == 4  # one a step


@pytest.mark.parametrize("proj", [0, 7])
def test_recompute(proj: int, device: torch.device, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of steps, each with the states of the one before; ragged, so that rows begin and end in any of them.

    The inner dimension that a plan for a GPU has is the sum of two blocks, no power of two.
    """
    choose = launching.of
    monkeypatch.setattr(launching, "of", lambda layer: replace(choose(layer), block_k=48))
    case = shaped(bidirectional=True, form="packed", steps=9, batch=19, hidden_size=33, proj_size=proj)
    with planning.force("cooperative"):
        compare(case, device, torch.float32, recompute=4)
    assert [name for name, _ in launches] == ["forward_kernel"] * 3 + ["backward_kernel"] * 3


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_matrix_vector_form(
    dtype: torch.dtype, batch: int, device: torch.device, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = launching.of

    def chosen(layer: Layer) -> planning.Plan:
        assert not layer.records
        return replace(choose(layer), matvec=True, block_b=1 << (batch - 1).bit_length())

    monkeypatch.setattr(launching, "of", chosen)
    case = shaped(hidden_size=77, batch=batch, bidirectional=True, steps=5)
    reference, ours = case.modules(device, dtype, backend="triton")
    x, h, c = case.inputs(device, dtype)
    with torch.no_grad(), planning.force("cooperative"):
        y, (hn, cn) = ours(x, (h, c))
        expected, (hn64, cn64) = reference(x.double(), (h.double(), c.double()))
    assert [name for name, _ in launches] == ["forward_kernel"]
    found = {"y": y, "hn": hn, "cn": cn}
    assert_close(found, {"y": expected, "hn": hn64, "cn": cn64}, dtype)


@pytest.mark.parametrize("strategy", ["cooperative", "wavefront"])
@pytest.mark.parametrize(
    "options",
    [{"recurrent_dropout": 0.3}, {"dropout": 0.3}, {"peephole": True, "zoneout": (0.3, 0.2)}],
    ids=["recurrent", "between", "zoneout"],
)
def test_masks_without_gradients(
    options: dict[str, Any], strategy: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans for inference, which may have fewer units in a tile than masks are drawn for at a time."""
    choose = launching._chosen
    monkeypatch.setattr(launching, "_chosen", lambda *given: replace(choose(*given), matvec=True, block_b=1, block_h=4))
    ours = TritonLSTM(5, 33, 2, backend="triton", **options).to(device)
    eager = TritonLSTM(5, 33, 2, backend="eager", **options).to(device)
    eager.load_state_dict(ours.state_dict())
    x = torch.randn(7, 1, 5, device=device)
    found = []
    for module in (ours, eager):
        torch.manual_seed(3)
        with torch.no_grad(), planning.force(strategy):
            found.append(module(x)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_each_time(threads: int, device: torch.device) -> None:
    """Nothing depends on which program comes first: no atomics on floats."""
    torch.set_num_threads(threads)
    case = shaped(hidden_size=61, batch=19, steps=7, bidirectional=True)
    _, ours = case.modules(device, torch.float32, backend="triton")
    inputs = case.inputs(device, torch.float32)
    with planning.force("cooperative"):
        first, *others = (results(ours, case, inputs, torch.float32) for _ in range(10))
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_side_by_side(device: torch.device) -> None:
    """Launches of several threads at once have counters of their own."""
    case = shaped(hidden_size=61, batch=5, steps=7)
    reference, ours = case.modules(device, torch.float32, backend="triton")
    inputs = case.inputs(device, torch.float32)
    expected = results(reference, case, inputs, torch.float64)
    with planning.force("cooperative"), ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: results(ours, case, inputs, torch.float32), range(9)):
            assert_close(found, expected, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the error comes with a later launch")
@pytest.mark.parametrize("rounds", [0, 1])
def test_waiting_in_vain(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that names plan, grid and device; the counters are as good as before for the launches after it."""
    case = shaped(hidden_size=61, batch=19, steps=7)
    reference, ours = case.modules(torch.device("cpu"), torch.float32, backend="triton")
    inputs = case.inputs(torch.device("cpu"), torch.float32)
    expected = results(reference, case, inputs, torch.float64)
    failures = 0
    with planning.force("cooperative"):
        for _ in range(10):
            with monkeypatch.context() as patch:
                patch.setattr(barrier, "ROUNDS", rounds)
                try:
                    found = results(ours, case, inputs, torch.float32)
                    assert rounds == 1  # by chance all were there
                    assert_close(found, expected, torch.float32)
                except RuntimeError as error:
                    failures += 1
                    text = str(error)
                    for part in ("waited for each other in vain", "strategy='cooperative'", "grid (4, ", "on cpu"):
                        assert part in text
            assert_close(results(ours, case, inputs, torch.float32), expected, torch.float32)
    assert failures > 0


_arrive = barrier.arrive


@triton.jit
def arrive_of_one_more(counter_ptr, leads, programs):
    _arrive(counter_ptr, leads, programs + 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the error comes with a later launch")
@pytest.mark.parametrize("threads", [1, 2])
def test_barrier_that_nobody_completes(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program looks so many times, once; then the kernel ends."""
    torch.set_num_threads(threads)
    monkeypatch.setattr(barrier, "arrive", arrive_of_one_more)
    monkeypatch.setattr(barrier, "ROUNDS", 20_000)
    monkeypatch.setattr(kernels.cooperative.forward_kernel, "hash", None)  # of its source and what that calls
    monkeypatch.setattr(kernels.launch, "_prepared", {})
    found: list[BaseException] = []

    def forward() -> None:
        try:
            TritonLSTM(5, 61, backend="triton")(torch.randn(7, 19, 5))
        except RuntimeError as error:
            found.append(error)

    with planning.force("cooperative"):
        runner = threading.Thread(target=forward, daemon=True)
        runner.start()
        runner.join(60)  # milliseconds but for compilation
    assert not runner.is_alive(), "hangs"
    assert "waited for each other in vain" in str(found[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="reads tensors that an error leaves behind on a CPU")
def test_results_of_waiting_in_vain_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = []
    monkeypatch.setattr(barrier.Barriers, "check", lambda self: self.failed.zero_())
    monkeypatch.setattr(barrier, "ROUNDS", 0)
    module = TritonLSTM(5, 61, backend="triton")
    with planning.force("cooperative"), torch.no_grad():
        outputs = [*module(torch.randn(7, 19, 5))[1]]
    assert all(x.isnan().all() for x in outputs)


def test_barriers_of_threads_are_apart() -> None:
    device = torch.device("cpu")
    here = barrier.of(device)
    assert barrier.of(device) is here
    found = []
    thread = threading.Thread(target=lambda: found.append(barrier.of(device)))
    thread.start()
    thread.join()
    assert found[0] is not here


# ---- Other cells ----


@triton.jit
def mixed_forward(sums, c, parameters):
    a = sums[0] * parameters[0]
    for k in tl.static_range(1, len(sums)):
        a += sums[k] * parameters[k]
    t = tanh(a)
    c = 0.5 * c + t
    return sums + (t,), c, c * t


@triton.jit
def mixed_backward(saved, c, c_prev, dq, dc, parameters):
    t = saved[len(saved) - 1]
    dc += dq * t
    da = (dc + dq * c) * (1 - t * t)
    dsums = ()
    dparameters = ()
    for k in tl.static_range(len(saved) - 1):
        dsums += (da * parameters[k],)
        dparameters += (da * saved[k],)
    return dsums, 0.5 * dc, dparameters


def mixed_forward_torch(sums: Any, c: Tensor, parameters: Any) -> tuple[Any, Tensor, Tensor]:
    t = torch.tanh(sum(a * p for a, p in zip(sums, parameters, strict=True)))
    c = 0.5 * c + t
    return (*sums, t), c, c * t


def mixed_backward_torch(
    saved: Any, c: Tensor, c_prev: Tensor, dq: Tensor, dc: Tensor, parameters: Any
) -> tuple[Any, Tensor, Any]:
    t = saved[-1]
    dc = dc + dq * t
    da = (dc + dq * c) * (1 - t * t)
    return tuple(da * p for p in parameters), 0.5 * dc, tuple(da * a for a in saved[:-1])


# Sums with each combination of products and bias; five with a product with h, for which there are eight columns.
MIXED = register(
    Cell(
        "mixed, of test_cooperative",
        sums=8,
        inputs=4,
        recurrent=(0, 2, 4, 5, 6),
        biased=(1, 4, 7),
        saved=(*(f"a{k}" for k in range(8)), "t"),
        parameters=(Parameter("weight_a", 8, 0.3),),
        forward=mixed_forward,
        backward=mixed_backward,
        forward_torch=mixed_forward_torch,
        backward_torch=mixed_backward_torch,
    )  # fmt: skip
)
CELLS = [*(variant(kind, peephole) for kind in GATES for peephole in (False, True))]
CELLS += [cells.of("gru"), cells.of("rnn-tanh"), cells.of("rnn-relu"), MIXED]


@dataclass(frozen=True)
class Call:
    """A call of a stack of any cell's layers."""

    layers: int = 2
    directions: int = 2
    bias: bool = True
    features: int = 5
    hidden: int = 29  # four programs, of which the last has fewer units
    size: int = 0  # of projections
    batch: int = 19  # two tiles
    steps: int = 5
    packed: bool = False
    p: float = 0.0
    per_step: bool = True
    zoneout: tuple[float, float] | None = None
    draws: bool = False
    chunk: int = 0

    def weights(self, cell: Cell) -> list[Tensor]:
        size, found = self.size or self.hidden, []
        for k in range(self.layers):
            features = size * self.directions if k else self.features
            shapes = [(cell.inputs * self.hidden, features), (len(cell.recurrent) * self.hidden, size)]
            if self.bias:
                shapes += [(cell.inputs * self.hidden,), (len(cell.biases) * self.hidden,)]
            if self.size:
                shapes.append((size, self.hidden))
            shapes += [(p.vectors * self.hidden,) for p in present(cell, self.bias)]
            found += [
                (torch.rand(shape) * 2 - 1) / self.hidden**0.5 for _ in range(self.directions) for shape in shapes
            ]
        return found

    def compare(self, cell: Cell, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Outputs, states and all gradients with those of `reference.stack` in float64.

        Zoneout is left out for cells that don't carry c, which have none.
        """
        count = self.layers * self.directions
        rows = torch.tensor([self.batch] * 2 + [k * self.batch // self.steps for k in range(self.steps - 2, 0, -1)])
        sizes = rows[: self.steps] if self.packed else None
        total = self.batch * self.steps if sizes is None else int(sizes.sum())
        shape = (total,) if self.packed else (self.steps, self.batch)
        x, hx = torch.randn(*shape, self.features), torch.randn(count, self.batch, self.size or self.hidden)
        wanted = [x, hx, torch.randn(count, self.batch, self.hidden)] if cell.carries else [x, hx]
        wanted = [t.to(device, dtype) for t in (*wanted, *self.weights(cell))]
        seed = torch.tensor([7], device=device)
        zone = None
        if self.zoneout is not None and cell.carries:
            zone = Zoneout(*self.zoneout, seed if self.draws else None)
        mask = RecurrentDropout(None, seed if self.p > 0 else None, self.p, self.per_step)
        drawn = mask.drawn(self.steps, wanted[1].double())

        def ours(x: Tensor, hx: Tensor, cx: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            return ops.run(
                x, sizes, hx, cx, list(weights), self.layers, self.bias, 0.0, None, seed, self.p, self.per_step,
                "triton", self.chunk, True, cell.name, None if zone is None else list(zone[:2]), self.draws,
            )  # fmt: skip

        def plain(x: Tensor, hx: Tensor, cx: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            return reference.stack(
                cell, x, (hx, cx), list(weights), sizes, self.layers, self.bias, self.directions == 2, mask=drawn,
                zoneout=zone,
            )  # fmt: skip

        found, expected = (
            outputs_and_gradients(run, [t.to(kind) for t in wanted], cell)
            for run, kind in ((ours, dtype), (plain, torch.float64))
        )
        assert_close(found, expected, dtype)


def outputs_and_gradients(run: Any, given: list[Tensor], cell: Cell) -> dict[str, Tensor]:
    given = [t.clone().requires_grad_() for t in given]
    outputs = run(*given) if cell.carries else run(*given[:2], *given[1:])
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, given, weights)
    named = {f"output {k}": y for k, y in enumerate(outputs)} | {f"gradient {k}": g for k, g in enumerate(gradients)}
    return {name: t.detach() for name, t in named.items()}


EACH = {  # of each cell
    "dense": Call(),
    "all at once": Call(packed=True, p=0.4, zoneout=(0.3, 0.2), draws=True),
}
CALLS = {  # of some
    **EACH,
    "packed": Call(packed=True),
    "one step": Call(steps=1),
    "without biases": Call(bias=False),
    "a mask for all steps": Call(p=0.4, per_step=False),
    "zoneout, expected": Call(zoneout=(0.3, 0.2)),
    "rebuilt": Call(packed=True, chunk=2, zoneout=(0.3, 0.2), draws=True),
    "one block": Call(hidden=32, batch=3),  # the inner dimension, which has two else
}


@pytest.mark.parametrize(
    "cell,call",
    [
        pytest.param(cell, call, id=f"{cell.name}-{call}")
        for cell in CELLS
        for call in (CALLS if cell.name in ("gru", "lstm-peephole", MIXED.name) else EACH)
    ],
)
def test_cells(cell: Cell, call: str, device: torch.device, launches: Launches) -> None:
    with planning.force("cooperative"):
        CALLS[call].compare(cell, device)
    times = CALLS[call].layers * (3 if CALLS[call].chunk else 1)
    assert [name for name, _ in launches] == ["forward_kernel"] * times + ["backward_kernel"] * times
    if device.type == "cpu":
        assert {grid[0] for _, grid in launches} == {4}


@pytest.mark.parametrize(
    "name,dtype",
    [
        ("gru", torch.float16),
        ("lstm-peephole", torch.bfloat16),
        ("rnn-relu", torch.float16),
        (MIXED.name, torch.float64),
    ],
)
def test_cells_in_other_dtypes(name: str, dtype: torch.dtype, device: torch.device) -> None:
    with planning.force("cooperative"):
        Call(packed=True, layers=1, zoneout=(0.3, 0.2), draws=True).compare(cells.of(name), device, dtype)


@pytest.mark.parametrize(
    "name,chunk", [("lstm", 2), ("lstm-peephole", 0), ("lstm-coupled", 0), ("lstm-carousel-peephole", 0)]
)
def test_projections_of_cells(name: str, chunk: int, device: torch.device, launches: Launches) -> None:
    with planning.force("cooperative"):
        Call(packed=True, size=7, chunk=chunk).compare(cells.of(name), device)
    assert len(launches) == (12 if chunk else 4)


@pytest.mark.parametrize("call", [Call(), Call(layers=3, packed=True, hidden=13)], ids=["dense", "packed"])
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.is_plain], ids=lambda cell: cell.name)
def test_wavefronts_of_cells(cell: Cell, call: Call, device: torch.device, launches: Launches) -> None:
    with planning.force("wavefront"):
        replace(call, directions=1).compare(cell, device)
    assert [(name, grid[2]) for name, grid in launches] == [
        ("forward_kernel", call.layers), ("backward_kernel", call.layers)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name,call",
    [
        ("gru", Call(directions=1)),
        ("lstm-peephole", Call(directions=1)),
        ("lstm", Call(directions=1, zoneout=(0.3, 0.2))),
    ],
)
def test_no_wavefronts(name: str, call: Call, device: torch.device, launches: Launches) -> None:
    """Of sums that lack a product, of parameters, and of zoneout: the layers run one by one."""
    with planning.force("wavefront"):
        call.compare(cells.of(name), device)
    assert len(launches) == 2 * call.layers and {grid[2] for _, grid in launches} == {1}


@pytest.mark.parametrize("kind", GATES)
def test_whole_rows_run_step_by_step(kind: str, device: torch.device, launches: Launches) -> None:
    """Programs that have some of the units can't add up all of a row."""
    call = Call(layers=1, directions=1)
    for strategy in ("cooperative", "wavefront"):
        launches.clear()
        with planning.force(strategy):
            call.compare(variant(kind, layer_norm=True), device)
        assert len(launches) == 2 * call.steps + 1  # one a step; in backward one more, for the state before


def test_projections_with_sums_that_lack_an_input(device: torch.device, launches: Launches) -> None:
    """There is nothing to add the initial h's product to: another strategy runs."""
    call = Call(layers=1, directions=1, size=3)
    cx = torch.zeros(1, 2, call.hidden, device=device)
    weights = [w.to(device) for w in call.weights(MIXED)]
    with planning.force("cooperative"):
        ops.run(
            torch.zeros(4, 2, 5, device=device), None, cx[..., :3].contiguous(), cx, weights, 1, True, 0.0, None, None,
            0.0, True, "triton", 0, False, MIXED.name, None, False,
        )  # fmt: skip
    assert len(launches) == 4  # one a step
