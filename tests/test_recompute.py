"""Training that rebuilds gates chunk by chunk: the same outputs, gradients and masks, and next to nothing kept."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.memory import saved_bytes
from checks import WAYS, Case, assert_close, cases_by_way, forced, matrix, results
from lstm_triton import TritonLSTM, convert, functional, kernels, launching, revert
from lstm_triton.cells.lstm import LSTM
from lstm_triton.cpu import native
from lstm_triton.dropout import BETWEEN, drop
from lstm_triton.eager import Eager
from lstm_triton.recurrence import (
    LEAST_STEPS,
    WINDOW_BYTES,
    Layer,
    LayerGradients,
    Layout,
    RecurrentDropout,
    Saved,
    Window,
)
from lstm_triton.reference import by_direction

# Every axis of the matrix, in sequences of several chunks.
CASES = [replace(case, steps=7, batch=1 if case.form == "unbatched" else 5) for case in matrix()[::5]]


def compare(
    case: Case, device: torch.device, dtype: torch.dtype, backend: str, chunk: bool | int, **options: Any
) -> None:
    reference, ours = case.modules(device, dtype, backend=backend, recompute=chunk, **options)
    inputs = case.inputs(device, dtype)
    assert_close(results(ours, case, inputs, dtype), results(reference, case, inputs, torch.float64), dtype)


@pytest.mark.parametrize("backend", ["eager", "torch", "auto"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64(case: Case, backend: str, device: torch.device) -> None:
    compare(case, device, torch.float64, backend, 3)


@pytest.mark.parametrize("case,way", cases_by_way(CASES, interpreted=9))
def test_kernels(case: Case, way: str, device: torch.device) -> None:
    with forced(way):
        compare(case, device, torch.float32, "triton", 3)


@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
@pytest.mark.parametrize("chunk", [1, 2, 6, 7, 100, True])
def test_chunk_lengths(chunk: bool | int, backend: str, device: torch.device) -> None:
    """One longer than the sequence is all of it."""
    case = Case(num_layers=2, bidirectional=True, form="packed", steps=7, batch=5)
    compare(case, device, torch.float32 if backend == "triton" else torch.float64, backend, chunk)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("way", ["eager", "torch", *WAYS])
def test_half(way: str, dtype: torch.dtype, device: torch.device) -> None:
    """Weights' gradients of many chunks are added up in float32."""
    case = Case(num_layers=2, bidirectional=True, steps=40, batch=4)
    backend = "triton" if way in WAYS else way
    with forced(way if way in WAYS else "step"):
        compare(case, device, dtype, backend, 2)


@pytest.mark.parametrize(
    "mode,form",
    [
        ("step", "batched"),
        pytest.param("step", "packed", marks=pytest.mark.interpreted),
        ("sequence", "batched"),
        ("sequence", "packed"),
    ],
)
@pytest.mark.parametrize("way", ["eager", *WAYS])
def test_masks_are_the_same(way: str, mode: str, form: str, device: torch.device) -> None:
    """Both kinds of dropout, with a seed: what another mask gives is far beyond rounding.

    Outputs are the same bit for bit where kernels make all products; those of a library may depend on how many rows
    it gets at a time.
    """
    case = Case(num_layers=2, bidirectional=True, form=form, steps=9, batch=5, input_size=14)
    options = dict(recurrent_dropout=0.3, recurrent_dropout_mode=mode)
    backend = "eager" if way == "eager" else "triton"
    _, ours = case.modules(device, torch.float32, backend=backend, **options)
    ours.dropout = 0.4
    inputs, found = case.inputs(device, torch.float32), []
    with forced("step" if way == "eager" else way):
        for ours.recompute in (False, 2, True):
            torch.manual_seed(3)
            found.append(results(ours, case, inputs, torch.float32))
    for other in found[1:]:
        if way == "fused":
            assert torch.equal(other["output"], found[0]["output"])
        assert_close(other, {name: x.double() for name, x in found[0].items()}, torch.float32)


@pytest.mark.interpreted
def test_dropout_between_layers_is_every_backends(device: torch.device) -> None:
    x, seed = torch.randn(37, 19, device=device), torch.tensor([5], device=device)
    ours = launching.drop(x, seed, BETWEEN + 1, 0.3)
    torch.testing.assert_close(ours, drop(x, seed, BETWEEN + 1, 0.3), rtol=1e-6, atol=0)
    assert not torch.equal(ours, launching.drop(x, seed, BETWEEN, 0.3))
    assert 0.2 < ours.eq(0).float().mean().item() < 0.4


def test_drop_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn a few rows at a time, the mask is the same."""
    x, seed = torch.randn(40, 9, dtype=torch.float64), torch.tensor([5])
    whole = drop(x, seed, BETWEEN, 0.5)
    monkeypatch.setattr("lstm_triton.dropout._AT_A_TIME", 30)
    assert torch.equal(drop(x, seed, BETWEEN, 0.5), whole)


@pytest.mark.parametrize("layers,share", [(1, 100), (2, 25)])
@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
def test_what_is_kept(backend: str, layers: int, share: int) -> None:
    """Next to nothing: for one layer c at the chunks' borders, for two the output between them as well."""
    x = torch.randn(1000, 4, 32)
    ours = TritonLSTM(32, 32, layers, backend=backend, recompute=True)
    plain = TritonLSTM(32, 32, layers, backend="eager")
    kept, usual, pytorch = (
        saved_bytes(lambda m=module: m(x), [x, *module.parameters()])  # type: ignore[misc]
        for module in (ours, plain, nn.LSTM(32, 32, layers))
    )
    assert kept <= pytorch / share
    assert usual <= pytorch / 2


def test_dropout_keeps_no_masks(device: torch.device) -> None:
    x = torch.randn(100, 4, 32, device=device)
    sizes = []
    for p in (0.0, 0.5):
        for backend in ("eager", "triton"):
            module = TritonLSTM(32, 32, 2, dropout=p, recurrent_dropout=p, backend=backend, recompute=20, device=device)
            sizes.append(saved_bytes(lambda m=module: m(x), [x, *module.parameters()]))  # type: ignore[misc]
    assert max(sizes) <= min(sizes) + 64  # a seed


def test_gradients_of_gradients(device: torch.device) -> None:
    module = TritonLSTM(
        2, 3, 2, proj_size=2, bidirectional=True, dropout=0.3, device=device, dtype=torch.float64, backend="eager",
        recurrent_dropout=0.5, recompute=2,
    )  # fmt: skip
    x = torch.randn(3, 2, 2, device=device, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        y, (h, c) = module(x)
        return y, h, c

    torch.autograd.gradcheck(function, (x,))
    torch.autograd.gradgradcheck(function, (x,))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_compile(backend: str, device: torch.device) -> None:
    module = TritonLSTM(5, 7, 2, dropout=0.2, recurrent_dropout=0.2, backend=backend, recompute=2, device=device)
    x = torch.randn(5, 3, 5, device=device)
    torch._dynamo.reset()
    found = []
    for run in (torch.compile(module, fullgraph=True, backend="aot_eager"), module):
        torch.manual_seed(0)
        y, _ = run(x)
        found.append([y, *torch.autograd.grad(y.sum(), list(module.parameters()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_autocast(device: torch.device) -> None:
    module = TritonLSTM(5, 7, 2, recompute=2, backend="triton", device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y, _ = module(torch.randn(5, 3, 5, device=device))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("form", ["batched", "packed"])
@pytest.mark.parametrize("way", ["eager", "persistent", "step"])
def test_inference_in_windows(way: str, form: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of the input, four times as wide as h, exist for a few steps at a time, if nothing is kept."""
    case = Case(num_layers=2, bidirectional=True, form=form, steps=100, batch=5)
    reference, ours = case.modules(device, torch.float32, backend="eager" if way == "eager" else "triton")
    x, *states = case.inputs(device, torch.float32)
    made, products = [], Layer.products

    def watched(self: Layer, *arguments: Any) -> Tensor:
        made.append(products(self, *arguments))
        return made[-1]

    monkeypatch.setattr(Layer, "products", watched)
    monkeypatch.setitem(WINDOW_BYTES, device.type, 4096)
    with torch.no_grad(), forced("step" if way == "eager" else way):
        y, hc = ours(case.pack(x), states)
        expected, expected_hc = reference(case.pack(x.double()), [s.double() for s in states])
    pairs = zip((getattr(y, "data", y), *hc), (getattr(expected, "data", expected), *expected_hc), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    assert len(made) > 10 and max(a.size(1) for a in made) <= LEAST_STEPS * case.batch


@pytest.mark.parametrize("chunk", [False, 3])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_backward_that_fails_changes_nothing(
    backend: str, chunk: bool | int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in the lower layer, when the upper one's gradients are known: parameters and gradients stay."""
    engine: Any = {"eager": Eager, "triton": launching.Kernels}[backend]
    way = "backward"
    if backend == "triton" and not chunk and device.type == "cpu" and not kernels.INTERPRETED:
        engine, way = native.Replay, "__call__"  # by then backward is prepared
    module = TritonLSTM(5, 7, 2, backend=backend, recompute=chunk, device=device)
    x = torch.randn(8, 3, 5, device=device, requires_grad=True)
    module(x)[0].sum().backward()
    tensors = [x, *module.parameters()]
    values, gradients = [t.detach().clone() for t in tensors], [t.grad.clone() for t in tensors]
    backward, calls = getattr(engine, way), []
    last = 2 if chunk is False else 5  # in the lower layer's second chunk

    def fails(self: object, *arguments: object) -> object:
        calls.append(1)
        if len(calls) == last:
            raise MemoryError("no room")
        return backward(self, *arguments)

    y = module(x)[0]
    with monkeypatch.context() as patch:
        patch.setattr(engine, way, fails)
        with pytest.raises(MemoryError, match="no room"):
            y.sum().backward()
    assert len(calls) == last
    for t, value, gradient in zip(tensors, values, gradients, strict=True):
        assert torch.equal(t, value) and torch.equal(t.grad, gradient)
    module(x)[0].sum().backward()
    for t, gradient in zip(tensors, gradients, strict=True):
        torch.testing.assert_close(t.grad, 2 * gradient)


@pytest.mark.parametrize("backend", ["auto", "eager", "triton"])
def test_streaming(backend: str, device: torch.device) -> None:
    """States carried from call to call: the whole sequence's results, and its gradients unless they are detached."""
    module = TritonLSTM(5, 7, 2, backend=backend, recompute=3, device=device, dtype=torch.float32)
    x = torch.randn(12, 3, 5, device=device, requires_grad=True)
    whole, states = module(x)
    gradients = torch.autograd.grad(whole[8:].sum(), [x, *module.parameters()])
    for detached in (False, True):
        outputs, carried = [], None
        for part in x.split(4):
            if detached and carried is not None:
                carried = tuple(s.detach() for s in carried)
            y, carried = module(part, carried)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs), whole)
        torch.testing.assert_close(carried, states)
        found = torch.autograd.grad(outputs[-1].sum(), [x, *module.parameters()])
        if detached:
            assert found[0][:8].eq(0).all() and found[0][8:].ne(0).any()
        else:
            torch.testing.assert_close(found, gradients)


@pytest.mark.parametrize("value", [0, -1, 2.5, "yes", None], ids=repr)
def test_wrong_chunk_lengths(value: object) -> None:
    with pytest.raises(ValueError, match="recompute should be True, False or a chunk length of at least 1 time step"):
        TritonLSTM(5, 7, recompute=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="recompute should be"):
        functional.lstm(torch.zeros(1, 1, 1), (torch.zeros(1, 1, 1),) * 2, [], recompute=value)  # type: ignore[arg-type]


def test_repr_state_and_convert() -> None:
    lstm = convert(nn.LSTM(5, 7), recompute=16)
    assert repr(lstm) == "TritonLSTM(5, 7, recompute=16)"
    assert pickle.loads(pickle.dumps(lstm)).recompute == 16
    assert revert(lstm).__class__ is nn.LSTM


@pytest.mark.parametrize("way", WAYS)
def test_offsets_beyond_32_bits(way: str, tmp_path: Path) -> None:
    """Steps that lie so far apart, in sparse files, that gates and their gradients reach beyond element 2 ** 31."""
    steps, batch, hidden, far = 3, 4, 8, 2**25 + 8
    rows = [batch, batch, batch - 1]
    found = []
    torch.manual_seed(0)
    weights = [torch.randn(4 * hidden, hidden), torch.randn(4 * hidden, hidden), *torch.randn(2, 4 * hidden)]
    x, dy = torch.randn(2, sum(rows), hidden)
    h, c, dh, dc = torch.randn(4, 1, batch, hidden)
    for starts in ([0, batch, 2 * batch], [0, far, 2 * far]):
        layout = Layout(starts, rows, batch)
        at = torch.cat([torch.arange(n) + s for n, s in zip(rows, starts, strict=True)])

        def room(width: int, values: Tensor | None = None, at: Tensor = at, total: int = layout.total) -> Tensor:
            path = tmp_path / "tensor"
            tensor = torch.from_file(str(path), shared=True, size=total * width).view(total, width)
            path.unlink()  # its pages, as far as they are written, live as long as the tensor
            if values is not None:
                tensor[at] = values
            return tensor

        layer = Layer(room(hidden, x), h, c, by_direction(LSTM, weights, True, False), layout, RecurrentDropout(), LSTM)
        window = Window(layout, 0, steps)
        with forced(way):
            run = launching.Kernels(layer)
            fused = run.plan.fused
            assert fused == (way == "fused")
            products = x @ weights[0].t() + weights[2] + weights[3]
            gates = room(4 * hidden, products)[None]
            y = room(hidden)
            done = run.strategy.forward(run.launch, window, None if fused else gates, None, y, h, c, True)
            gates, cells = done.gates, done.c
            assert gates.numel() > 2**31 or starts[1] == batch
            back = run.strategy.backward(
                run.launch, window, y, room(hidden, dy), Saved(gates, cells), h, c, dh, dc, True, True
            )  # fmt: skip
        found.append([y[at], done.hn, done.cn, gates[0, at], cells[0, at], back.dhx, back.dcx])
        found[-1] += [back.dinput[0][at], *back.dweights] if isinstance(back, LayerGradients) else [back.dgates[0, at]]
    for near, apart in zip(*found, strict=True):
        assert torch.equal(near, apart)
