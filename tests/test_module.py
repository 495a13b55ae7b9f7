"""`TritonLSTM` as a module: what users do with an `nn.LSTM` beside calling it."""

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence

from checks import Case, assert_close, results, shaped
from lstm_triton import TritonLSTM, cells, convert, dispatch, functional, kernels, launching, ops, planning, revert
from lstm_triton.cpu import processor
from lstm_triton.recurrence import rnn_precision

BACKENDS = ["auto", "torch", "eager", "triton"]


def same(a: nn.Module, b: nn.Module, x: torch.Tensor) -> None:
    torch.testing.assert_close(a(x)[0], b(x)[0], rtol=1e-5, atol=1e-6)


def test_state_dict_both_ways(device: torch.device) -> None:
    arguments = (5, 7, 2, True, True, 0.0, True, 3)
    theirs, ours = nn.LSTM(*arguments, device=device), TritonLSTM(*arguments, device=device)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    x = torch.randn(3, 4, 5, device=device)
    ours.load_state_dict(theirs.state_dict())
    same(ours, theirs, x)
    again = nn.LSTM(*arguments, device=device)
    again.load_state_dict(ours.state_dict())
    same(ours, again, x)


def test_same_initial_weights() -> None:
    torch.manual_seed(1)
    theirs = nn.LSTM(5, 7, 2)
    torch.manual_seed(1)
    ours = TritonLSTM(5, 7, 2)
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))


def test_repr() -> None:
    assert repr(TritonLSTM(5, 7, 2, batch_first=True)) == "TritonLSTM(5, 7, num_layers=2, batch_first=True)"
    module = TritonLSTM(5, 7, recurrent_dropout=0.3, recurrent_dropout_mode="sequence", backend="eager")
    assert repr(module) == (
        "TritonLSTM(5, 7, recurrent_dropout=0.3, recurrent_dropout_mode='sequence', backend='eager')"
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies(backend: str, device: torch.device) -> None:
    module = TritonLSTM(5, 7, bidirectional=True, device=device, backend=backend)
    x = torch.randn(3, 2, 5, device=device)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    copies = [pickle.loads(pickle.dumps(module)), copy.deepcopy(module), torch.load(stream, weights_only=False)]
    for other in copies:
        assert repr(other) == repr(module)
        same(other, module, x)
        with torch.no_grad():
            other.weight_hh_l0.zero_()
        assert module.weight_hh_l0.abs().sum() > 0


def test_to_other_dtype(device: torch.device) -> None:
    module = TritonLSTM(5, 7, device=device).double()
    assert module(torch.randn(3, 2, 5, device=device, dtype=torch.float64))[0].dtype == torch.float64


@pytest.mark.parametrize("backend", ["torch", "eager", "triton"])
def test_weight_tying(backend: str, device: torch.device) -> None:
    """Two layers with the same parameters: gradients add up."""
    theirs = nn.LSTM(7, 7, 2, device=device, dtype=torch.float64)
    ours = TritonLSTM(7, 7, 2, device=device, dtype=torch.float64, backend=backend)
    for module in (theirs, ours):
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(module, f"{name}_l1", getattr(module, f"{name}_l0"))
    ours.load_state_dict(theirs.state_dict())
    assert len(list(ours.parameters())) == 4
    x = torch.randn(3, 2, 7, device=device, dtype=torch.float64)
    for module in (theirs, ours):
        module(x)[0].square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("backend", ["torch", "eager", "triton"])
@pytest.mark.parametrize("way", ["parametrization", "hook", "prune"])
def test_reparametrized_weights(way: str, backend: str, device: torch.device) -> None:
    def changed(module: nn.Module) -> nn.Module:
        if way == "parametrization":
            return parametrizations.weight_norm(module, "weight_hh_l0")
        if way == "hook":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                return nn.utils.weight_norm(module, "weight_hh_l0")
        prune.l1_unstructured(module, "weight_hh_l0", amount=0.5)
        return module

    theirs = nn.LSTM(5, 7, device=device, dtype=torch.float64)
    ours = TritonLSTM(5, 7, device=device, dtype=torch.float64, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 2, 5, device=device, dtype=torch.float64)
    theirs, ours = changed(theirs), changed(ours)
    for _ in range(2):
        for module in (theirs, ours):
            module.zero_grad()
            module(x)[0].square().sum().backward()
        for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert name == other
            torch.testing.assert_close(a.grad, b.grad)
            with torch.no_grad():
                a -= 0.1 * a.grad
                b -= 0.1 * b.grad


def test_functional_call(device: torch.device) -> None:
    module = TritonLSTM(5, 7, device=device, backend="eager")
    x = torch.randn(3, 2, 5, device=device)
    doubled = {name: 2 * p for name, p in module.named_parameters()}
    expected = copy.deepcopy(module)
    expected.load_state_dict(doubled)
    torch.testing.assert_close(torch.func.functional_call(module, doubled, (x,))[0], expected(x)[0])


@pytest.mark.parametrize("backend", ["torch", "eager", "triton"])
@pytest.mark.parametrize("proj_size", [0, 3])
@pytest.mark.parametrize("form", ["batched", "packed"])
def test_autocast(form: str, proj_size: int, backend: str, device: torch.device) -> None:
    """The dtypes of `nn.LSTM` under autocast, and its values to the lower precision."""
    case = Case(num_layers=2, bidirectional=True, proj_size=proj_size, form=form)
    _, ours = case.modules(device, torch.float32, backend=backend)
    theirs = nn.LSTM(**case.arguments, device=device)
    theirs.load_state_dict(ours.state_dict())
    x, h, c = case.inputs(device, torch.float32)
    found = []
    for module in (theirs, ours):
        leaf = x.clone().requires_grad_()
        with torch.autocast(device.type, torch.bfloat16):
            y, (hn, cn) = module(case.pack(leaf), (h, c))
        y = y.data if form == "packed" else y
        grads = torch.autograd.grad(y.float().square().sum(), [leaf, *module.parameters()])
        found.append([y, hn, cn, *grads])
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2)


def test_functional_is_the_module(device: torch.device) -> None:
    module = TritonLSTM(5, 7, 2, bidirectional=True, batch_first=True, device=device)
    x = torch.randn(3, 4, 5, device=device)
    zeros = torch.zeros(4, 3, 7, device=device)
    for backend in BACKENDS:
        y, hn, cn = functional.lstm(
            x, (zeros, zeros), list(module.parameters()), num_layers=2, bidirectional=True, batch_first=True,
            backend=backend,
        )  # fmt: skip
        expected, (h, c) = module(x)
        for a, b in ((y, expected), (hn, h), (cn, c)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_dropout_between_layers(device: torch.device) -> None:
    """Active in training only, on the outputs of all layers but the last."""
    for backend in ("eager", "triton"):
        module = TritonLSTM(5, 7, 2, dropout=1.0, device=device, backend=backend)
        x = torch.randn(3, 2, 5, device=device)
        silent = TritonLSTM(7, 7, device=device)
        silent.load_state_dict({k.replace("l1", "l0"): v for k, v in module.state_dict().items() if "l1" in k})
        torch.testing.assert_close(module(x)[0], silent(x.new_zeros(3, 2, 7))[0], rtol=1e-5, atol=1e-6)
        plain = TritonLSTM(5, 7, 2, device=device)
        plain.load_state_dict(module.state_dict())
        same(module.eval(), plain, x)


def test_long_inputs_of_packed_order(device: torch.device) -> None:
    """h_n comes back in the order in which the sequences were given."""
    module = TritonLSTM(5, 7, device=device, backend="eager")
    x = torch.randn(6, 4, 5, device=device)
    lengths = [2, 6, 1, 4]
    _, (hn, _) = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(hn[:, row], module(x[:length, row])[1][0])


# Each branch of the choice is shown to have run.


@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
def test_backend_runs(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def watch(owner: object, name: str, label: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: ran.append(label) or original(*a, **k))

    from lstm_triton import eager

    watch(eager.Eager, "forward", "eager")
    watch(dispatch, "_operator", "torch")
    watch(launching.Kernels, "forward", "triton")
    TritonLSTM(5, 7, device=device, backend=backend)(torch.randn(2, 1, 5, device=device))
    assert ran == [backend]


@pytest.mark.parametrize("hidden,strategy", [(64, "persistent"), (65, "step")])
def test_strategy_runs(hidden: int, strategy: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """By size: float32 weights of 64 units fit on an SM, of 65 (padded to 128) do not; a CPU has room for both."""
    if device.type == "cpu" and not kernels.INTERPRETED:
        strategy = "persistent"
    ran = []
    for name, module in kernels.STRATEGIES.items():
        for way in ("forward", "backward", "fused_backward"):
            original = getattr(module, way, None)
            if original is not None:
                kind = way.removeprefix("fused_")
                run = lambda *a, _k=(name, kind), _o=original: ran.append(_k) or _o(*a)  # noqa: E731
                monkeypatch.setattr(module, way, run)
    module = TritonLSTM(5, hidden, device=device, backend="triton")
    module(torch.randn(2, 1, 5, device=device))[0].sum().backward()
    assert ran == [(strategy, "forward"), (strategy, "backward")]


@pytest.fixture(params=[False, True], ids=["narrow products", "wide products"])
def wide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether the processor multiplies two vectors of 512 bits a cycle."""
    planned = (planning.choose_on_cpu, planning.pays_on_cpu)
    with monkeypatch.context() as patch:
        patch.setattr(processor, "multiplies_wide", lambda: request.param)
        for function in planned:
            function.cache_clear()
        yield request.param
    for function in planned:
        function.cache_clear()


@pytest.mark.parametrize("native", [False, True], ids=["without kernels", "with kernels"])
def test_auto_choices_on_a_cpu(native: bool, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_native", lambda: native)

    def choice(
        *shape: int, batch: int = 32, hidden: int = 16, dtype=torch.float32, drops=False, records=True, recompute=False
    ) -> str:
        states = (torch.zeros(1, batch, hidden),) * 2
        sizes = torch.ones(1, dtype=torch.int64) if len(shape) == 2 else None
        options = functional.Options(1, True, 0.0, True, False, False, 0.0, "step", "auto", recompute)
        call = dispatch.Call(torch.zeros(shape, dtype=dtype), sizes, states, [], options, drops, records)
        return dispatch.auto(call, functional.run)

    ours = "triton" if native else "eager"
    assert choice(20, 32, 16) == ("triton" if native else "torch")  # few weights, no padding
    assert choice(20, 32, 16, dtype=torch.float64) == "torch"
    assert choice(20, 1, 1024, batch=1, hidden=1024) == "torch"
    assert choice(20, 1, 1024, batch=1, hidden=1024, drops=True) == ours
    assert choice(20, 32, 16, drops=True) == ours
    rows = dispatch.PACKED_ROWS
    for count, records in ((rows, True), (rows - 1, True), (rows, False)):
        usual = "eager" if count == rows and records else "torch"
        assert choice(count, 1024, batch=1, hidden=1024, records=records) == usual
        assert choice(count, 16, records=records) == ("triton" if native else usual)
        assert choice(count, 500, hidden=500, records=records) == usual  # more weights than kernels pay for
    # Wide: not fused, in training, a few rows. Narrow: fused, for a row for each so many weights. Both: more of them
    # where PyTorch's operator would run forward again.
    for batch, records, recompute in ((8, True, False), (8, False, False), (32, True, True), (1, True, False)):
        ran = choice(20, batch, 256, batch=batch, hidden=256, records=records, recompute=recompute)
        pays = batch > 1 and (records or not wide)
        assert ran == ("triton" if native and pays else "torch")
    plan = planning.choose_on_cpu(cells.of("lstm"), 8, 256, 256, 256, 1, 1)
    assert plan.fused is not wide
    assert choice(20, 1, 64, batch=1, hidden=64) == ("triton" if native and not wide else "torch")


def test_strategy_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="strategy should be one of"), planning.force("fast"):
        pass


def test_tf32_where_the_setting_for_rnns_allows_it() -> None:
    """Kernels and GEMMs alike follow PyTorch's setting for RNNs, whatever that for other products is."""
    cuda = torch.device("cuda")
    single: Any = SimpleNamespace(dtype=torch.float32, device=cuda, is_cuda=True)
    matmul: Any = torch.backends.cuda.matmul
    given = matmul.fp32_precision
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            assert rnn_precision(cuda) == "tf32" and rnn_precision(torch.device("cpu")) == "ieee"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.version, "hip", "7.0")  # AMD's have none
                assert rnn_precision(cuda) == "ieee"
            with ops.gemms_as_rnn(single):
                assert matmul.fp32_precision == "tf32"
            with ops.gemms_as_rnn(torch.zeros(1)):
                assert matmul.fp32_precision == given
        assert matmul.fp32_precision == given
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            assert rnn_precision(cuda) == "ieee"
            matmul.fp32_precision = "tf32"
            with ops.gemms_as_rnn(single):
                assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = given


# Swapping in and out of models.


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 7, 2, batch_first=True)
        self.layers = nn.ModuleList([nn.LSTM(7, 7, proj_size=3), nn.Linear(3, 2)])
        self.again = self.layers[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.again(self.lstm(x)[0])[0])


def test_convert_and_revert() -> None:
    model = Model()
    x = torch.randn(3, 4, 5)
    expected, state, parameters = model(x), model.state_dict(), list(model.parameters())
    calls = []
    model.lstm.register_forward_hook(lambda *_: calls.append(1))
    assert convert(model, backend="eager") is model
    assert isinstance(model.lstm, TritonLSTM) and model.lstm.backend == "eager"
    assert model.again is model.layers[0] and isinstance(model.again, TritonLSTM)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    torch.testing.assert_close(model(x), expected)
    assert calls == [1]
    assert revert(model) is model
    assert type(model.lstm) is nn.LSTM and model.again is model.layers[0]
    assert list(model.state_dict()) == list(state)
    assert not hasattr(model.lstm, "backend")
    assert torch.equal(model(x), expected)
    copy.deepcopy(model), pickle.dumps(revert(nn.LSTM(2, 3)))


def test_convert_a_bare_lstm_and_leave_others() -> None:
    class Special(nn.LSTM):
        pass

    converted = convert(nn.LSTM(5, 7))
    assert type(converted) is TritonLSTM and type(revert(converted)) is nn.LSTM
    assert type(convert(Special(5, 7))) is Special
    assert type(convert(nn.GRUCell(5, 7))) is nn.GRUCell


@pytest.mark.parametrize("way", ["parametrization", "prune"])
def test_convert_reparametrized(way: str) -> None:
    model = nn.Sequential(nn.LSTM(5, 7))
    if way == "prune":
        prune.random_unstructured(model[0], "weight_hh_l0", amount=0.5)
    else:
        parametrizations.weight_norm(model[0], "weight_hh_l0")
    x = torch.randn(3, 2, 5)
    expected = model(x)[0]
    convert(model, backend="eager")
    assert isinstance(model[0], TritonLSTM)
    torch.testing.assert_close(model(x)[0], expected)
    names = [name for name, _ in model.named_parameters()]
    model(x)[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    revert(model)
    assert isinstance(model[0], nn.LSTM) and names == [name for name, _ in model.named_parameters()]
    torch.testing.assert_close(model(x)[0], expected)


def test_convert_refuses() -> None:
    with pytest.raises(TypeError, match="convert takes the options"):
        convert(nn.LSTM(5, 7), bias=False)
    with pytest.raises(ValueError, match="backend should be one of"):
        convert(nn.LSTM(5, 7), backend="fast")
    model = nn.Sequential(TritonLSTM(5, 7), TritonLSTM(7, 7, recurrent_dropout=0.5))
    with pytest.raises(ValueError, match="1 has recurrent_dropout=0.5"):
        revert(model)
    assert type(model[0]) is TritonLSTM


def test_optimizer_goes_on_after_convert(device: torch.device) -> None:
    case = shaped()
    theirs = nn.LSTM(**case.arguments, device=device, dtype=torch.float64)
    model = nn.Sequential(copy.deepcopy(theirs))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert(model, backend="eager")
    inputs = case.inputs(device, torch.float64)
    model[0](inputs[0])[0].sum().backward()
    optimizer.step()
    theirs(inputs[0])[0].sum().backward()
    torch.optim.SGD(theirs.parameters(), 0.1).step()
    assert_close(
        results(model[0], case, inputs, torch.float64), results(theirs, case, inputs, torch.float64), torch.float64
    )
