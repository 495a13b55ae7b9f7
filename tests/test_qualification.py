"""Kernels that are right qualify, here natively on the CPU, and kernels that aren't don't."""

from typing import Any

import pytest
import torch

from lstm_triton import TritonLSTM, kernels, launching, planning
from lstm_triton.gpu import kept, qualification
from lstm_triton.recurrence import Gradients
from lstm_triton.tolerances import DTYPES, TOLERANCES

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="slow in Triton's interpreter")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process and a disk that know no results; compiled kernels stay."""
    kept_results: dict[str, Any] = {}
    monkeypatch.setattr(kept, "read", lambda kind, of, about: kept_results.get(f"{kind} {about}"))
    monkeypatch.setattr(kept, "write", lambda kind, of, about, result: kept_results.update({f"{kind} {about}": result}))
    monkeypatch.setattr(qualification, "_states", {})
    monkeypatch.setattr(kept, "_said", set())


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few layers to check: one of one step and one of several programs, ragged and with dropout."""
    cases = qualification.CASES
    monkeypatch.setattr(qualification, "CASES", (cases[0], cases[-1]))
    monkeypatch.setattr(qualification, "WIDE", ())


@pytest.mark.parametrize(
    "strategy,name,projected",
    [(strategy, "fp32", projected) for strategy in planning.STRATEGIES for projected in (False, True)]
    + [("persistent", "bf16", False), ("cooperative", "fp16", False), ("step", "fp64", False)],
)
def test_the_kernels_qualify(strategy: str, name: str, projected: bool) -> None:
    assert qualification.qualify(strategy, name, projected, CPU) == "passed"
    assert qualification.qualified(strategy, name, projected, CPU)


def test_wavefronts_qualify() -> None:
    assert qualification.qualify("wavefront", "fp32", False, CPU) == "passed"


@pytest.mark.parametrize(
    "cell,strategy,name,projected",
    [
        ("gru", "cooperative", "fp32", False),
        ("gru", "step", "bf16", False),
        ("rnn-tanh", "persistent", "fp32", False),
        ("rnn-relu", "step", "fp16", False),
        ("lstm-coupled", "persistent", "fp32", True),
        ("lstm-norm", "step", "fp32", False),
        ("lstm-peephole", "persistent", "fp32", False),
    ],
)
def test_cells_qualify(cell: str, strategy: str, name: str, projected: bool, two: None) -> None:
    assert qualification.qualify(strategy, name, projected, CPU, cell) == "passed"
    assert qualification.state(strategy, name, projected, CPU, cell) == "passed"
    assert qualification.state(strategy, name, projected, CPU) is None  # another cell's


def test_what_cells_do_not_have() -> None:
    def has(strategy: str, projected: bool, cell: str) -> bool:
        return bool(qualification.cases(strategy, projected, cell))

    assert not has("cooperative", False, "lstm-norm") and not has("wavefront", False, "lstm-norm")
    assert not has("step", True, "gru") and not has("wavefront", False, "gru")
    assert has("wavefront", False, "rnn-tanh") and has("step", True, "lstm-norm")
    assert qualification.qualify("wavefront", "fp32", False, CPU, "gru") == "no plan fits"
    for cell in ("lstm", "lstm-peephole", "gru"):
        zoned = any(case.zoneout for case in qualification.cases("step", False, cell))
        assert zoned == (cell != "gru")
    assert all(case.hidden > 1 for case in qualification.cases("step", False, "lstm-norm"))


@pytest.mark.parametrize("what", ["parameters", "zoneout"])
def test_broken_kernels_of_cells_fail(what: str, two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter's gradient that is off, and zoneout that isn't done."""
    if what == "zoneout":
        of = kernels.Launch.of
        monkeypatch.setattr(kernels.Launch, "of", lambda plan, layer: of(plan, layer._replace(zoneout=None)))
        with pytest.warns(RuntimeWarning, match="'step' in fp32 .* with zoneout: off by"):
            assert qualification.qualify("step", "fp32", False, CPU).startswith("failed: output of T=1…11")
        return

    def wrong_vectors(found: Gradients, *_: Any) -> Gradients:
        assert found.dparameters is not None
        return found._replace(dparameters=found.dparameters.roll(1, 2))

    broken("backward", wrong_vectors, monkeypatch)
    with pytest.warns(RuntimeWarning, match="'step' for the cell 'lstm-peephole' in fp32 are switched off"):
        state = qualification.qualify("step", "fp32", False, CPU, "lstm-peephole")
    assert state.startswith("failed: the gradient of weight 2 of T=1…11")
    assert qualification.state("step", "fp32", False, CPU) is None


def test_what_jumps_is_judged_by_its_mean() -> None:
    expected, apart = torch.ones(1000), torch.ones(1000)
    found = expected.clone()
    found[3] = 0
    assert qualification.error_of(found, expected, lambda: apart, 1e-3, 1e-3) == 1.0  # an error
    apart[7] = 0
    assert qualification.error_of(found, expected, lambda: apart, 1e-3, 1e-3) is None  # as what is expected does
    found[: 1000 // 9] = 0
    assert qualification.error_of(found, expected, lambda: apart, 1e-3, 1e-3) == 1.0
    found[0] = float("nan")
    error = qualification.error_of(found, expected, lambda: apart, 1e-3, 1e-3)
    assert error is not None and error != error


def test_the_strategy_asked_for_runs(two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: set[str] = set()
    choose = launching.of
    monkeypatch.setattr(launching, "of", lambda layer: ran.add(choose(layer).strategy) or choose(layer))
    for strategy in planning.STRATEGIES:
        ran.clear()
        qualification.qualify(strategy, "fp32", False, CPU)
        assert ran == {strategy}


def broken(way: str, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`step` with something wrong after its kernels have run."""
    original = getattr(kernels.step, way)
    monkeypatch.setattr(kernels.step, way, lambda *a, **k: change(original(*a, **k), *a))


def off_by_a_little(found: Any, launch: Any, window: Any, gates: Any, cells: Any, output: torch.Tensor, *_: Any) -> Any:
    output[-1] *= 1.001  # the last row's alone
    return found


def nan(found: Any, launch: Any, window: Any, gates: Any, cells: Any, output: torch.Tensor, *_: Any) -> Any:
    output[0, 0] = float("nan")
    return found


def wrong_gates(found: Gradients, *_: Any) -> Gradients:
    found.dgates[0, -1, -1] += found.dgates.abs().max() / 100
    return found


def wrong_c0(found: Gradients, *_: Any) -> Gradients:
    return found._replace(dcx=found.dcx.roll(1, 1))


@pytest.mark.parametrize(
    "way,change,said",
    [
        ("forward", off_by_a_little, "output of T=1 B=1 I=3 H=1 D=1: off by"),
        ("forward", nan, "output of T=1 B=1 I=3 H=1 D=1: off by nan"),
        ("backward", wrong_gates, "the input's gradient of T=1 B=1"),
        ("backward", wrong_c0, "c_0's gradient of T=1…11 B=18 I=5 H=32 D=2 with recurrent dropout"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_broken_kernels_fail(way: str, change: Any, said: str, two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(way, change, monkeypatch)
    with pytest.warns(
        RuntimeWarning, match="'step' in fp32 are switched off .* `python -m lstm_triton doctor`"
    ) as seen:
        assert not qualification.qualified("step", "fp32", False, CPU)
        assert not qualification.qualified("step", "fp32", False, CPU)
    assert len(seen) == 1 and said in str(seen[0].message)
    state = qualification.state("step", "fp32", False, CPU)
    assert state is not None and state.startswith(f"failed: {said}")
    assert qualification.state("persistent", "fp32", False, CPU) is None
    # Asked for, it runs.
    assert TritonLSTM(5, 7, backend="triton")(torch.randn(2, 3, 5))[0].shape == (2, 3, 7)


def test_an_exception_is_a_failure(two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nCompile with ...")

    broken("backward", fail, monkeypatch)
    with pytest.warns(RuntimeWarning, match="RuntimeError: CUDA error: an illegal memory access; please open an issue"):
        assert not qualification.qualified("step", "fp16", False, CPU)
    monkeypatch.setattr(qualification, "_states", {})
    assert (
        qualification.state("step", "fp16", False, CPU) == "failed: RuntimeError: CUDA error: an illegal memory access"
    )


def test_no_memory_says_nothing_about_the_kernels(two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next process looks again."""

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    broken("forward", fail, monkeypatch)
    with pytest.warns(RuntimeWarning, match="out of memory"):
        assert not qualification.qualified("step", "fp16", False, CPU)
    monkeypatch.setattr(qualification, "_states", {})
    assert qualification.state("step", "fp16", False, CPU) is None


def test_known_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    monkeypatch.setattr(qualification, "check", lambda case, strategy, *_: runs.append(strategy))
    for _ in range(2):
        assert qualification.qualified("step", "fp32", False, CPU)
        monkeypatch.setattr(qualification, "_states", {})
    assert len(runs) == len(qualification.cases("step", False))


def test_leaves_no_trace(two: None) -> None:
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    packed: list[torch.Tensor] = []
    with (
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(packed.append, lambda x: x),
    ):
        assert qualification.qualify("step", "fp64", False, CPU) == "passed"
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.randn(3), expected) and not packed
    assert planning.forced() is None


def test_every_precision_has_a_tolerance() -> None:
    assert DTYPES.keys() == TOLERANCES.keys()
