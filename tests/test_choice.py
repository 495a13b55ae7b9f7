"""`backend="auto"` as on a GPU, played on the CPU: its tensors, and a clock, plans and a machine that are given."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lstm_triton import TritonGRU, TritonLSTM, TritonRNN, cells, direct, dispatch, kernels, launching
from lstm_triton.base import TritonRNNBase
from lstm_triton.gpu import choice, gpus, kept, qualification, tuning
from lstm_triton.planning import Plan
from lstm_triton.recurrence import Layer

MACHINE = kept.Machine("Some GPU, 8 SMs", "1.2", "2.13", "3.7", "0.1", "cafe")
STEP, PERSISTENT = Plan("step", 16, 16, 16, 4), Plan("persistent", 16, 16, 16, 4)


class Gpu:
    """What is played: how long backends take, which strategies are right; and what was done."""

    def __init__(self) -> None:
        self.plans: list[tuple[Plan, float | None]] = [(PERSISTENT, None), (STEP, None)]
        self.torch_predicted: float | None = None
        self.seconds = {"persistent": 1e-3, "step": 2e-3, "torch": 3e-3}
        self.wrong: set[str] = set()
        self.timed: list[str] = []
        self.checked: list[str] = []


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    played = Gpu()
    monkeypatch.setattr(kept, "folder", lambda: tmp_path)  # compiled kernels stay where they are
    monkeypatch.delenv("LSTM_TRITON_TUNE", raising=False)
    monkeypatch.setattr(kept, "machine", lambda device: MACHINE)
    forget(monkeypatch)

    def proposals(bucket: tuning.Bucket, device: torch.device) -> list[tuple[Plan | None, float | None]]:
        lacks = bucket.drops or bucket.zoneout or cells.of(bucket.cell).operator is None
        return played.plans + [(None, played.torch_predicted)] * (not lacks)

    def clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
        def timed(run: Callable[[], object]) -> float:
            (trial,) = tuning._trials.values() or [None]
            run()
            played.timed.append(trial.strategy if trial else "torch")
            return played.seconds[played.timed[-1]]

        return timed

    def check(case: qualification.Case, strategy: str, name: str, device: object, cell: str) -> str | None:
        if case == qualification.cases(strategy, False, cell)[0]:
            played.checked.append(strategy if cell == "lstm" else f"{strategy} {cell}")
        return "h_n: off" if strategy in played.wrong else None

    monkeypatch.setattr(choice, "proposals", proposals)
    monkeypatch.setattr(tuning, "clock", clock)
    monkeypatch.setattr(qualification, "check", check)
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "auto", choice.choose)
    monkeypatch.setattr(direct, "of", lambda *_: None)  # nothing is prepared on a GPU
    monkeypatch.setattr(dispatch, "why_auto", choice.why)
    yield played


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_results", {})
    monkeypatch.setattr(qualification, "_states", {})
    monkeypatch.setattr(kept, "_said", set())


def backend(module: TritonRNNBase, x: torch.Tensor | PackedSequence) -> str:
    """That of a call, by what it says after it."""
    module(x)
    return explained(module, x)[0]


def explained(module: TritonRNNBase, x: torch.Tensor | PackedSequence) -> tuple[str, str]:
    line = module.explain(x).splitlines()[1]
    name, _, why = line.removeprefix("backend: ").partition(" ")
    return name, why[1:-1]


def test_the_winner_runs_and_is_not_timed_again(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = TritonLSTM(5, 7), torch.randn(9, 3, 5)
    assert backend(module, x) == "triton"
    assert set(gpu.timed) == {"persistent", "step", "torch"} and gpu.checked == ["persistent", "step"]
    said = "persistent 16×16×16 num_warps=4 1 ms, step 16×16×16 num_warps=4 2 ms, PyTorch's operator 3 ms"
    assert explained(module, x) == ("triton", f"measured: {said} (Some GPU, 8 SMs)")
    gpu.timed.clear()
    module(torch.randn(16, 4, 5))  # of the same bucket
    forget(monkeypatch)
    assert explained(module, x) == ("triton", f"measured: {said} (Some GPU, 8 SMs, cached)")
    module(x)
    assert not gpu.timed and gpu.checked == ["persistent", "step"]
    gpu.seconds["torch"] = 1e-4
    assert backend(module, torch.randn(17, 4, 5)) == "torch"
    assert gpu.timed


def test_plans_reach_the_layers_of_their_calls_alone(gpu: Gpu) -> None:
    module, x = TritonLSTM(5, 7), torch.randn(9, 3, 5)
    module(x)
    ((device, bucket),) = tuning._results
    assert tuning.plan_for(device, bucket) == PERSISTENT
    assert bucket == tuning.Bucket("fp32", 7, 7, 5, 1, 1, 4, 16, True, False, False, False)
    assert tuning.plan_for(device, bucket._replace(training=False)) is None


@pytest.mark.parametrize(
    "options,call,expected",
    [
        ({}, "no_grad", {"training": False}),
        ({"num_layers": 2, "bidirectional": True, "proj_size": 3}, "", {"layers": 2, "directions": 2, "size": 3}),
        ({"recompute": True}, "", {"recompute": True}),
        ({"recurrent_dropout": 0.5}, "", {"drops": True}),
        ({}, "packed", {"packed": True, "batch": 4, "steps": 16}),
        ({"batch_first": True}, "", {"batch": 16, "steps": 4}),
        ({}, "autocast", {"precision": "bf16"}),
        ({"zoneout": (0.1, 0.2)}, "", {"zoneout": True, "cell": "lstm"}),
        ({"peephole": True}, "", {"zoneout": False, "cell": "lstm-peephole"}),
    ],
)
def test_buckets(options: dict[str, Any], call: str, expected: dict[str, Any], gpu: Gpu) -> None:
    gpu.plans = [(STEP, None)]
    module, x = TritonLSTM(5, 7, **options), torch.randn(9, 3, 5)
    given = pack_padded_sequence(x, [9, 4, 1]) if call == "packed" else x
    with torch.set_grad_enabled(call != "no_grad"), torch.autocast("cpu", torch.bfloat16, call == "autocast"):
        module(given)
    ((_, bucket),) = tuning._results
    assert {name: getattr(bucket, name) for name in expected} == expected


def test_explaining_tries_nothing(gpu: Gpu, tmp_path: Path) -> None:
    module, x = TritonLSTM(5, 7), torch.randn(9, 3, 5)
    assert explained(module, x) == (
        "torch",
        "not measured yet: a call would check the kernels of persistent and step, then time persistent 16×16×16 "
        "num_warps=4 and step 16×16×16 num_warps=4 and PyTorch's operator",
    )
    assert not gpu.timed and not gpu.checked and not list(tmp_path.iterdir()) and not tuning._results


@pytest.mark.parametrize("name", ["h100", "rtx4090", "mi300x"])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_proposals(name: str, projected: bool, drops: bool, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few plans and PyTorch's operator, the fastest first; none that the call can't run by."""
    monkeypatch.setattr(gpus, "of", lambda device: gpus.named(name))
    bucket = tuning.Bucket("bf16", 256, 64 if projected else 256, 64, 1, 2, 32, 0, True, False, drops, recompute)
    found = choice.proposals(bucket, torch.device("cuda", 0))
    plans = [plan for plan, _ in found if plan is not None]
    times = [seconds for plan, seconds in found if plan is not None and seconds is not None]
    assert 1 <= len(plans) <= choice.MOST_PLANS and times == sorted(times) and times[0] > 0
    assert (None in [plan for plan, _ in found]) == (not drops)
    if projected and drops:
        assert "cooperative" not in [plan.strategy for plan in plans]
    if recompute:
        assert all(plan.layers == 1 for plan in plans)


@pytest.mark.parametrize("cell", ["gru", "rnn-relu", "lstm-peephole", "lstm-norm"])
@pytest.mark.parametrize("zoneout", [False, True])
def test_proposals_of_cells(cell: str, zoneout: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's operator where it has the cell, and never with zoneout; nothing where no kernel has room."""
    monkeypatch.setattr(gpus, "of", lambda device: gpus.named("h100"))
    bucket = tuning.Bucket("bf16", 128, 128, 64, 1, 1, 32, 0, True, False, False, False, cell, zoneout)
    plans = [plan for plan, _ in choice.proposals(bucket, torch.device("cuda", 0))]
    assert plans[0] is not None
    assert (None in plans) == (not zoneout and cells.of(cell).operator is not None)
    large = choice.proposals(bucket._replace(hidden=1024, size=1024), torch.device("cuda", 0))
    assert bool(large) == (cell != "lstm-norm")


CELLS: dict[str, Callable[..., TritonRNNBase]] = {
    "gru": TritonGRU, "rnn-tanh": TritonRNN, "lstm-peephole": lambda *a, **k: TritonLSTM(*a, peephole=True, **k),
    "lstm-norm": lambda *a, **k: TritonLSTM(*a, layer_norm=True, **k),
}  # fmt: skip


@pytest.mark.parametrize("cell", list(CELLS))
def test_cells_are_tried(cell: str, gpu: Gpu) -> None:
    """With PyTorch's operator, which may win, where it has the cell; their own kernels are checked."""
    module, x = CELLS[cell](5, 7), torch.randn(9, 3, 5)
    has = cells.of(cell).operator is not None
    assert explained(module, x)[0] == ("torch" if has else "eager")
    assert ("no cell" in explained(module, x)[1]) == (not has)
    assert backend(module, x) == "triton"
    assert set(gpu.timed) == {"persistent", "step", *(["torch"] if has else [])}
    assert gpu.checked == [f"persistent {cell}", f"step {cell}"]
    gpu.seconds["torch"] = 1e-4
    assert backend(module, torch.randn(17, 4, 5)) == ("torch" if has else "triton")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_zoneout_is_for_ours_alone(training: bool, grad: bool, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed as the call is, in training or not, with the masks that it draws; compared with PyTorch's operations."""
    module, x = TritonLSTM(5, 7, zoneout=(0.3, 0.4)).train(training), torch.randn(9, 3, 5)
    drawn: list[bool] = []
    launch = kernels.Launch.of

    def watch(plan: Plan, layer: Layer) -> Any:
        assert layer.zoneout is not None
        drawn.append(layer.zoneout.seed is not None)
        return launch(plan, layer)

    monkeypatch.setattr(kernels.Launch, "of", watch)
    with torch.set_grad_enabled(grad):
        name, why = explained(module, x)
        assert name == "eager" and why.startswith("PyTorch's operator has no zoneout; not measured yet")
        found = []
        for _ in range(2):  # measures, then knows
            torch.manual_seed(1)
            found.append(module(x)[0])
    assert set(gpu.timed) == {"persistent", "step"} and set(drawn) == {training}
    (((_, bucket), result),) = tuning._results.items()
    assert bucket.zoneout and not bucket.drops and result.plan == PERSISTENT and not result.failed
    assert torch.equal(*found)
    with torch.set_grad_enabled(grad):  # another bucket
        assert explained(TritonLSTM(5, 7).train(training), x)[1].startswith("not measured yet")


def test_cells_that_no_kernel_has_room_for(gpu: Gpu) -> None:
    gpu.plans = []
    x = torch.randn(9, 3, 5)
    normed = TritonLSTM(5, 7, layer_norm=True)
    assert explained(normed, x) == (
        "eager", "PyTorch's operator has no cell 'lstm-norm'; no kernel has room on this GPU"
    )  # fmt: skip
    assert backend(normed, x) == "eager" and backend(TritonGRU(5, 7), x) == "torch"
    assert not gpu.timed and not gpu.checked


@pytest.mark.parametrize("wrong", [False, True])
def test_relu_is_compared_in_half_precision(wrong: bool, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where relu bends a rounding turns a gradient on or off, of PyTorch's as of ours; a wrong one is seen."""
    gpu.plans = [(STEP, None)]
    backward = launching.Kernels.backward

    def changed(*arguments: Any) -> Any:
        found = backward(*arguments)
        return found._replace(dgates=found.dgates * 2) if wrong else found

    monkeypatch.setattr(launching.Kernels, "backward", changed)
    module, x = TritonRNN(5, 64, nonlinearity="relu", dtype=torch.bfloat16), torch.randn(40, 16, 5).bfloat16()
    if not wrong:
        assert backend(module, x) == "triton"
        return
    with pytest.warns(RuntimeWarning, match="is not taken for bf16, .* is off by"):
        module(x)


# What nothing may see of it


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_leaves_no_trace(form: str, gpu: Gpu) -> None:
    """Gradients, random numbers, modes and results are those of a call that nothing measured."""
    gpu.plans = [(STEP, None)]
    gpu.seconds["torch"] = 1e-4
    ours = TritonLSTM(5, 7, 2, dropout=0.5)
    theirs = nn.LSTM(5, 7, 2, dropout=0.5)
    theirs.load_state_dict(ours.state_dict())
    data, calls = torch.randn(9, 3, 5), []
    for module in (theirs, ours):
        torch.manual_seed(1)
        packed: list[torch.Tensor] = []

        def pack(t: torch.Tensor, packed: list[torch.Tensor] = packed) -> torch.Tensor:
            packed.append(t)
            return t

        module.weight_hh_l0.grad = torch.ones(28, 7)
        x = data.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = module(x if form == "dense" else pack_padded_sequence(x, [9, 4, 1]))[0]
        y = y if isinstance(y, torch.Tensor) else y.data
        before = len(packed)
        y.sum().backward()
        calls.append(
            (y, x.grad, [p.grad for p in module.parameters()], torch.randn(3), before, torch.is_grad_enabled())
        )
    assert gpu.timed
    for a, b in zip(*calls, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_recurrent_dropout_draws_what_it_would(gpu: Gpu) -> None:
    module, x = TritonLSTM(5, 7, recurrent_dropout=0.5), torch.randn(9, 3, 5)
    found = []
    for _ in range(2):  # measures, then knows
        torch.manual_seed(1)
        found.append(module(x)[0])
    torch.manual_seed(1)
    module.backend = "triton"
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], module(x)[0])


def test_in_inference_mode(gpu: Gpu) -> None:
    module, x = TritonLSTM(5, 7), torch.randn(9, 3, 5)
    with torch.inference_mode():
        assert backend(module, x) == "triton"
    module(x)[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_timed_as_the_call_is_but_for_many_steps(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "STEPS", (4,))
    monkeypatch.setattr(tuning, "MOST_STEPS", 6)
    seen: list[tuple[int, ...]] = []
    run = dispatch.torch_operator
    monkeypatch.setattr(dispatch, "torch_operator", lambda x, *a: seen.append(tuple(x.shape)) or run(x, *a))
    gpu.seconds["torch"] = 1e-4
    x = torch.randn(9, 3, 5)
    TritonLSTM(5, 7)(x)
    TritonLSTM(5, 8, batch_first=True)(x.transpose(0, 1))
    TritonLSTM(5, 9)(pack_padded_sequence(x, [9, 4, 1]))
    assert list(dict.fromkeys(seen)) == [(6, 3, 5), (9, 3, 5), (3, 6, 5), (3, 9, 5), (11, 5), (14, 5)]


# What is odd


def test_recurrent_dropout_is_for_ours_alone(gpu: Gpu) -> None:
    gpu.seconds |= {"persistent": 5e-3, "torch": 1e-6}
    module, x = TritonLSTM(5, 7, recurrent_dropout=0.5), torch.randn(9, 3, 5)
    assert explained(module, x)[0] == "eager"
    assert backend(module, x) == "triton"
    assert set(gpu.timed) == {"persistent", "step"}
    (result,) = tuning._results.values()
    assert result.plan == STEP


def test_dropout_where_nothing_is_tried(gpu: Gpu) -> None:
    """Kernels only if those that run without a measurement are known to be right; PyTorch's operations otherwise."""
    module, x = TritonLSTM(5, 7, recurrent_dropout=0.5), torch.randn(9, 3, 5)

    class Marked(torch.Tensor):
        pass

    def chosen() -> str:
        return explained(module, x.as_subclass(Marked))[0]

    assert chosen() == "eager"
    qualification.qualify("step", "fp32", False, x.device)
    assert chosen() == "eager"  # layers would run by the first plan, which isn't that
    qualification.qualify("persistent", "fp32", False, x.device)
    assert chosen() == "triton"
    assert not gpu.timed and not tuning._results


def test_wrong_kernels_are_not_taken(gpu: Gpu) -> None:
    gpu.wrong = {"persistent"}
    module, x = TritonLSTM(5, 7), torch.randn(9, 3, 5)
    with pytest.warns(RuntimeWarning, match="persistent.* switched off .* h_n: off"):
        module(x)
    assert set(gpu.timed) == {"step", "torch"}
    gpu.wrong = {"persistent", "step"}
    with pytest.warns(RuntimeWarning, match="switched off"):
        assert backend(module.double(), x.double()) == "torch"
    dropping = TritonLSTM(5, 7, recurrent_dropout=0.5, dtype=torch.float64)
    assert backend(dropping, x.double()) == "eager"


@pytest.mark.parametrize("wrong", ["output", "gradient", "nan", "nothing"])
def test_results_of_the_call_itself_are_compared(wrong: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers have shown the strategy to be right, but not with these tiles."""
    gpu.plans = [(STEP, None)]
    forward, backward = launching.Kernels.forward, launching.Kernels.backward

    def wrong_forward(self: Any, window: Any, output: torch.Tensor, *arguments: Any) -> Any:
        found = forward(self, window, output, *arguments)
        if wrong in ("output", "nan"):
            output[-1] += 0.1 if wrong == "output" else float("nan")
        return found

    def wrong_backward(*arguments: Any) -> Any:
        found = backward(*arguments)
        return found._replace(dhx=found.dhx + 0.1) if wrong == "gradient" else found

    monkeypatch.setattr(launching.Kernels, "forward", wrong_forward)
    monkeypatch.setattr(launching.Kernels, "backward", wrong_backward)
    module, x = TritonLSTM(5, 7), torch.randn(9, 3, 5)
    h = torch.zeros(1, 3, 7, requires_grad=True)
    if wrong == "nothing":
        assert backend(module, x) == "triton"
        assert backend(module, torch.full((9, 8, 5), float("nan"))) == "triton"  # nothing to compare with
        return
    with pytest.warns(RuntimeWarning, match="step 16×16×16 num_warps=4 is not taken for fp32, .* is off by"):
        module(x, (h, h))
    (result,) = tuning._results.values()
    assert result.winner == tuning.TORCH and "is off by" in result.failed[tuning.name_of(STEP)]


def test_a_winner_that_is_no_longer_right(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept on disk as the fastest, but not as right: it is checked again, and the rest is timed again."""
    module, x = TritonLSTM(5, 7), torch.randn(9, 3, 5)
    module(x)
    for path in tmp_path.glob("qualified-*.json"):
        path.unlink()
    forget(monkeypatch)
    gpu.wrong, gpu.timed = {"persistent"}, []
    with pytest.warns(RuntimeWarning, match="persistent"):
        module(x)
    assert set(gpu.timed) == {"step", "torch"}


def test_without_timing(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSTM_TRITON_TUNE", "0")
    module, x = TritonLSTM(5, 7), torch.randn(9, 3, 5)
    assert backend(module, x) == "torch"  # which nothing predicts to be slower
    gpu.plans, gpu.torch_predicted = [(STEP, 10e-6), (PERSISTENT, 30e-6)], 20e-6
    assert backend(module, torch.randn(9, 8, 5)) == "triton"
    (*_, result) = tuning._results.values()
    assert result.plan == STEP
    assert str(result) == (
        "the model's choice, LSTM_TRITON_TUNE=0: step 16×16×16 num_warps=4 10 µs, PyTorch's operator 20 µs, "
        "persistent 16×16×16 num_warps=4 30 µs"
    )
    gpu.torch_predicted = 9e-6
    assert backend(module, torch.randn(9, 16, 5)) == "torch"
    assert not gpu.timed and set(gpu.checked) == {"step", "persistent"}


def test_nothing_is_tried_in_transforms_captures_and_subclasses(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = TritonLSTM(5, 7), torch.randn(9, 3, 5)
    torch.func.grad(lambda x: module(x)[0].sum())(x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module(torch.empty(9, 3, 5))

    class Marked(torch.Tensor):
        pass

    module(x.as_subclass(Marked))
    assert not gpu.timed and not gpu.checked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    call = dispatch.Call(Cuda(), None, (x, x), [], None, False, False)  # type: ignore[arg-type]
    assert choice._untimable(call) == "a CUDA graph is being captured"


class Cuda:
    is_cuda = True


def test_an_error_of_the_call_is_the_users(gpu: Gpu) -> None:
    """Timing swallows it, the call does not."""
    module = TritonLSTM(5, 7)
    with pytest.raises(RuntimeError, match="data type"), warnings.catch_warnings():
        warnings.simplefilter("error")
        module(torch.randn(9, 3, 5), (torch.zeros(1, 3, 7, dtype=torch.float64),) * 2)


# That layers run by the plan that was measured, in backward as in forward.


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("form", ["dense", "packed", "autocast", "no_grad", "batch_first"])
@pytest.mark.parametrize("option", ["", "recurrent_dropout", "bidirectional", "recompute", "zoneout"])
def test_layers_run_by_the_plan(option: str, form: str, layers: int, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, dict[str, Any]] = {
        "": {}, "recurrent_dropout": {option: 0.5}, "bidirectional": {option: True, "proj_size": 3},
        "recompute": {option: 4}, "zoneout": {option: (0.2, 0.3)},
    }  # fmt: skip
    front = Plan("cooperative", 16, 8, 16, 4, layers=2)
    if layers == 2 and option in ("", "recurrent_dropout"):
        gpu.plans.append((front, None))
        gpu.seconds["cooperative"] = 1e-4
    ran: list[tuple[Plan | None, Plan]] = []  # the one that is timed, the one that launches
    launch = kernels.Launch.of

    def watch(plan: Plan, layer: Layer) -> Any:
        (trial,) = tuning._trials.values() or [None]
        ran.append((trial, plan))
        return launch(plan, layer)

    monkeypatch.setattr(kernels.Launch, "of", watch)
    module = TritonLSTM(5, 7, layers, batch_first=form == "batch_first", **given[option])
    x = torch.randn(9, 3, 5)

    def call() -> torch.Tensor:
        with torch.set_grad_enabled(form != "no_grad"), torch.autocast("cpu", torch.bfloat16, form == "autocast"):
            y = module(pack_padded_sequence(x, [9, 4, 1]) if form == "packed" else x)[0]
        return y.data if isinstance(y, PackedSequence) else y

    call()
    timed = [(trial, plan) for trial, plan in ran if trial is not None]
    assert {trial for trial, _ in timed} == {plan for plan, _ in gpu.plans}
    assert all(trial is not None and plan == replace(trial, layers=plan.layers) for trial, plan in timed)
    ran.clear()
    y = call()
    forward = len(ran)
    if form != "no_grad":
        y.float().sum().backward()
        assert len(ran) > forward
    (result,) = tuning._results.values()
    assert result.plan == (front if len(gpu.plans) > 2 else PERSISTENT)
    assert {replace(plan, layers=1) for _, plan in ran} == {replace(result.plan, layers=1)}
    assert result.plan in [plan for _, plan in ran]
