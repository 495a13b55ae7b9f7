"""The cooperative kernels, natively or on a GPU: values, gradients, one launch a pass, and waiting in vain.

Their races are in `test_races.py`, the machine code in `test_machine_code.py`.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton  # noqa: E402

from checks import Case, assert_close, matrix, results, shaped  # noqa: E402
from lstm_triton import TritonLSTM, kernels, launching, planning  # noqa: E402
from lstm_triton.cpu import build  # noqa: E402
from lstm_triton.kernels import barrier  # noqa: E402
from lstm_triton.recurrence import Layer  # noqa: E402

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
