"""Kernels as they run natively on a CPU, at the sizes that are used, against `nn.LSTM` in float64."""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch

from checks import Case, assert_close, forced, results
from lstm_triton import TritonLSTM
from lstm_triton.cpu import build, native

pytest.importorskip("triton")

from lstm_triton import kernels  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not build.has_compiler(), reason="no C compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux"),
    pytest.mark.skipif(kernels.INTERPRETED, reason="kernels are interpreted, not compiled"),
]

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Launched:
    """A kernel that ran."""

    way: str
    kernel: str
    grid: tuple[int, int, int]


class Launches(list[Launched]):
    """Those since the last look."""

    def take(self) -> list[Launched]:
        taken = list(self)
        self.clear()
        return taken


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """What a test launches; each launch has to be a native one."""
    found, ran = Launches(), []
    run = native.Prepared.run

    def record(module: ModuleType, strategy: str) -> None:
        start = module.start

        def recorded(kernel: Any, grid: Any, args: list[Any], shared: dict[str, Any], **own: Any) -> None:
            if native.records():
                start(kernel, grid, args, shared, **own)
                ran.pop()
                return
            way = "fused" if shared.get("FUSED", False) else strategy
            if module is not kernels.rebuild:
                found.append(Launched(way, kernel.fn.__name__, grid))
            start(kernel, grid, args, shared, **own)
            assert ran.pop() == grid

        monkeypatch.setattr(module, "start", recorded)

    def counted(self: native.Prepared, grid: Any, args: list[Any]) -> None:
        ran.append(grid)
        run(self, grid, args)

    replay = native.Replay.__call__

    def replayed(self: native.Replay, *given: Any) -> Any:
        found.append(Launched("fused", self.prepared.name, self.grid))
        return replay(self, *given)

    for strategy, module in {**kernels.STRATEGIES, "": kernels.rebuild}.items():
        record(module, strategy)
    monkeypatch.setattr(native.Replay, "__call__", replayed)
    monkeypatch.setattr(native.Prepared, "run", counted)
    yield found
    assert not ran


def assert_ran(launches: Launches, way: str, steps: int) -> None:
    """One layer's forward and backward ran this way: a launch a pass, or by "step" one a time step and a last one."""
    count = steps if way == "step" else 1
    taken = launches.take()
    assert {launched.way for launched in taken} == {way}
    kinds = Counter(launched.kernel for launched in taken)
    assert kinds["forward_kernel"] == count and kinds["backward_kernel"] in (count, count + (way == "step"))


def sized(hidden: int, batch: int, steps: int, **changes: Any) -> Case:
    return Case(hidden_size=hidden, batch=batch, steps=steps, input_size=24, **changes)


@pytest.mark.parametrize(
    "way,dtype,hidden,batch,steps",
    [
        ("fused", "fp32", 16, 32, 1000),
        ("fused", "fp32", 128, 3, 200),
        ("fused", "fp16", 100, 32, 50),
        ("fused", "bf16", 257, 1, 30),
        ("fused", "fp32", 512, 70, 4),
        ("persistent", "bf16", 16, 3, 1000),
        ("persistent", "fp32", 257, 3, 30),
        ("persistent", "fp16", 512, 1, 10),
        ("persistent", "fp32", 1024, 70, 2),
        ("step", "fp16", 16, 3, 1000),
        ("step", "fp32", 257, 3, 30),
        ("step", "fp32", 512, 70, 4),
        ("step", "bf16", 1024, 32, 2),
    ],
)
def test_values(way: str, dtype: str, hidden: int, batch: int, steps: int, launches: Launches) -> None:
    """Outputs and all gradients; a thousand steps are no further off than the few of `test_values.py` may be."""
    case, kind = sized(hidden, batch, steps), DTYPES[dtype]
    reference, ours = case.modules(CPU, kind, backend="triton")
    inputs = case.inputs(CPU, kind)
    with forced(way):
        found = results(ours, case, inputs, kind)
    assert_ran(launches, way, steps)
    assert_close(found, results(reference, case, inputs, torch.float64), kind)


@pytest.mark.parametrize("way,hidden,batch", [("fused", 16, 12), ("persistent", 128, 70), ("step", 128, 70)])
def test_threads(way: str, hidden: int, batch: int, launches: Launches) -> None:
    """On one, two and three threads right values, bit for bit the same in each run, from programs for all threads."""
    case, kind = sized(hidden, batch, 12), torch.float32
    reference, ours = case.modules(CPU, kind, backend="triton")
    inputs = case.inputs(CPU, kind)
    expected = results(reference, case, inputs, torch.float64)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs = []
        with forced(way):
            for _ in range(4):
                runs.append(results(ours, case, inputs, kind))
                grids = {launched.grid for launched in launches}
                assert_ran(launches, way, case.steps)
                assert all(x * y * z >= threads for x, y, z in grids)
        assert_close(runs[0], expected, kind)
        for other in runs[1:]:
            assert all(torch.equal(other[name], x) for name, x in runs[0].items())


@pytest.mark.parametrize("way,mode", [("fused", "step"), ("persistent", "sequence"), ("step", "step")])
def test_recurrent_dropout(way: str, mode: str, launches: Launches) -> None:
    """A seed's masks are those of backend "eager", here in float64; both directions, ragged lengths."""
    case = sized(100, 32, 20, bidirectional=True, form="packed")
    options = dict(recurrent_dropout=0.4, recurrent_dropout_mode=mode)
    _, ours = case.modules(CPU, torch.float32, backend="triton", **options)
    eager = TritonLSTM(**case.arguments, dtype=torch.float64, backend="eager", **options)  # type: ignore[arg-type]
    eager.load_state_dict(ours.state_dict())
    inputs = case.inputs(CPU, torch.float32)
    with forced(way):
        torch.manual_seed(11)
        found = results(ours, case, inputs, torch.float32)
        assert_ran(launches, way, case.steps)
        torch.manual_seed(11)
        assert_close(found, results(eager, case, inputs, torch.float64), torch.float32)
        torch.manual_seed(12)
        assert not torch.allclose(found["output"], results(ours, case, inputs, torch.float32)["output"], atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("way,hidden", [("fused", 128), ("persistent", 257), ("step", 257)])
def test_what_is_not_finite_stays_in_its_row(way: str, hidden: int, value: float, launches: Launches) -> None:
    """NaN and infinity in a row's input reach what they reach in `nn.LSTM`, and no other row of the batch."""
    case, kind, row = sized(hidden, 3, 6), torch.float32, 1
    reference, ours = case.modules(CPU, kind, backend="triton")
    inputs = case.inputs(CPU, kind)
    with forced(way):
        clean = results(ours, case, inputs, kind)
        inputs[0][2, row, 5] = value
        found = results(ours, case, inputs, kind)
    assert {launched.way for launched in launches} == {way}
    others = torch.arange(case.batch) != row
    for name in ("output", "hn", "cn", "dinput", "dh", "dc"):
        assert torch.equal(found[name][:, others], clean[name][:, others]), name
    assert torch.equal(found["output"][:2], clean["output"][:2])  # nor the steps before
    expected = results(reference, case, inputs, torch.float64)
    for name, x in expected.items():
        torch.testing.assert_close(found[name].double(), x, rtol=1e-3, atol=1e-4, equal_nan=True, msg=name)
    assert torch.isnan(found["output"][2:, row]).all() == (value != value)


def test_which_way_runs_by_default(launches: Launches) -> None:
    """Few weights are fused, many in a small batch aren't, nor are projections."""
    for case, way in (
        (sized(16, 3, 4), "fused"),
        (sized(1024, 1, 2), "persistent"),
        (sized(16, 3, 4, proj_size=5), "persistent"),
    ):
        reference, ours = case.modules(CPU, torch.float32, backend="triton")
        inputs = case.inputs(CPU, torch.float32)
        found = results(ours, case, inputs, torch.float32)
        assert_ran(launches, way, case.steps)
        assert_close(found, results(reference, case, inputs, torch.float64), torch.float32)
