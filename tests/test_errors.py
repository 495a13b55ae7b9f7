"""Bad input: the error is `nn.LSTM`'s or a clearer one, and names what is wrong."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lstm_triton import TritonLSTM, dispatch, functional
from lstm_triton.cpu import build

NAN = float("nan")


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        (dict(input_size=0), ValueError, "input_size must be greater than zero"),
        (dict(input_size=-1), ValueError, "input_size must be greater than zero"),
        (dict(hidden_size=0), ValueError, "hidden_size must be greater than zero"),
        (dict(input_size=NAN), TypeError, "input_size should be of type int, got: float"),
        (dict(hidden_size=NAN), TypeError, "hidden_size should be of type int, got: float"),
        (dict(num_layers=NAN), TypeError, "num_layers should be of type int, got: float"),
        (dict(num_layers=0), ValueError, "num_layers must be greater than zero"),
        (dict(proj_size=NAN), TypeError, "proj_size should be of type int, got: float"),
        (dict(proj_size=-1), ValueError, "proj_size should be a positive integer or zero"),
        (dict(proj_size=7), ValueError, "proj_size has to be smaller than hidden_size"),
        (dict(bias=1), TypeError, "bias should be of type bool"),
        (dict(batch_first=None), TypeError, "batch_first should be of type bool"),
        (dict(dropout=1.5), ValueError, r"dropout should be a number in range \[0, 1\]"),
        (dict(dropout=True), ValueError, r"dropout should be a number in range \[0, 1\]"),
        (dict(dropout=NAN), ValueError, r"dropout should be a number in range \[0, 1\]"),
        (
            dict(recurrent_dropout=-0.1),
            ValueError,
            r"recurrent_dropout should be a number in range \[0, 1\].* got -0.1",
        ),
        (dict(recurrent_dropout=NAN), ValueError, r"recurrent_dropout should be .* got nan"),
        (dict(recurrent_dropout="0.5"), ValueError, r"recurrent_dropout should be .* got '0.5'"),
        (dict(recurrent_dropout_mode="row"), ValueError, "recurrent_dropout_mode should be one of 'step', 'sequence'"),
        (dict(backend="cuda"), ValueError, "backend should be one of 'auto', 'triton', 'eager', 'torch', got 'cuda'"),
        (dict(backend="torch", recurrent_dropout=0.5), ValueError, "backend='torch' has no recurrent dropout"),
    ],
    ids=str,
)
def test_constructor(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TritonLSTM(**({"input_size": 5, "hidden_size": 7} | arguments))


def test_keyword_only() -> None:
    with pytest.raises(TypeError):
        TritonLSTM(5, 7, 1, True, False, 0.0, False, 0, None, None, 0.5)


def bad_inputs() -> dict[str, tuple[type[Exception], str, tuple]]:
    x = torch.randn(4, 3, 5)
    h = torch.zeros(1, 3, 7)
    packed = pack_padded_sequence(x, [4, 3, 1])
    return {
        "one dimension": (ValueError, "Expected input to be 2D or 3D, got 1D", (x[0, 0],)),
        "four dimensions": (ValueError, "Expected input to be 2D or 3D, got 4D", (x[None],)),
        "input size": (RuntimeError, r"input.size\(-1\) must be equal to input_size. Expected 5, got 4", (x[..., :4],)),
        "dtype": (ValueError, "RNN input dtype .* does not match weight dtype", (x.double(),)),
        "integers": (ValueError, "RNN input dtype .* does not match weight dtype", (x.long(),)),
        "layers of h": (
            RuntimeError,
            r"Expected hidden\[0\] size \(1, 3, 7\), got \[2, 3, 7\]",
            (x, (h.repeat(2, 1, 1), h)),
        ),
        "layers of c": (
            RuntimeError,
            r"Expected hidden\[1\] size \(1, 3, 7\), got \[2, 3, 7\]",
            (x, (h, h.repeat(2, 1, 1))),
        ),
        "batch of h": (RuntimeError, r"Expected hidden\[0\] size", (x, (h[:, :2], h))),
        "size of c": (RuntimeError, r"Expected hidden\[1\] size", (x, (h, h[..., :6]))),
        "unbatched h": (RuntimeError, "For batched 3-D input, hx and cx should also be 3-D", (x, (h[:, 0], h[:, 0]))),
        "batched h": (RuntimeError, "For unbatched 2-D input, hx and cx should also be 2-D", (x[:, 0], (h, h))),
        "packed batch of h": (RuntimeError, r"Expected hidden\[0\] size", (packed, (h[:, :2], h[:, :2]))),
        "no steps": (RuntimeError, "Expected sequence length to be larger than 0 in RNN", (x[:0],)),
        "no steps, unbatched": (RuntimeError, "Expected sequence length to be larger than 0 in RNN", (x[:0, 0],)),
        "dtype of h": (Exception, "dtype|type", (x, (h.double(), h.double()))),
        "other device": (RuntimeError, "device", (x.to("meta"),)),
        "h on another device": (RuntimeError, "device", (x, (h.to("meta"), h.to("meta")))),
    }


@pytest.mark.parametrize("backend", ["auto", "eager", "torch", "triton"])
@pytest.mark.parametrize("name", bad_inputs())
def test_input(name: str, backend: str) -> None:
    """An error of the type that `nn.LSTM` raises, on every backend; the module still works after it."""
    error, message, args = bad_inputs()[name]
    module = TritonLSTM(5, 7, backend=backend)
    with pytest.raises(error) as theirs:
        nn.LSTM(5, 7)(*args)
    with pytest.raises(error, match=message) as ours:
        module(*args)
    if error is not Exception:
        assert type(ours.value) is type(theirs.value) or isinstance(ours.value, type(theirs.value))
    if not (backend == "triton" and torch.cuda.is_available()):
        module(torch.randn(4, 3, 5))


@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
def test_empty_batch(backend: str, device: torch.device) -> None:
    """A batch of no rows gives empty outputs, as `nn.LSTM` does."""
    module = TritonLSTM(5, 7, 2, bidirectional=True, device=device, backend=backend)
    x = torch.zeros(4, 0, 5, device=device, requires_grad=True)
    y, (h, c) = module(x)
    assert y.shape == (4, 0, 14) and h.shape == c.shape == (4, 0, 7)
    y.sum().backward()
    assert module.weight_hh_l0.grad.eq(0).all()


def call(**changes: object) -> None:
    module = TritonLSTM(5, 7)
    zeros = torch.zeros(1, 3, 7)
    arguments = {"input": torch.randn(4, 3, 5), "hx": (zeros, zeros), "weights": list(module.parameters())}
    functional.lstm(**(arguments | changes))


@pytest.mark.parametrize(
    "changes,error,message",
    [
        (dict(num_layers=0), ValueError, "num_layers should be an integer of at least 1, got 0"),
        (dict(dropout=2), ValueError, r"dropout should be a number in range \[0, 1\].* got 2"),
        (dict(recurrent_dropout=2), ValueError, r"recurrent_dropout should be .* got 2"),
        (dict(recurrent_dropout_mode=""), ValueError, "recurrent_dropout_mode should be one of"),
        (dict(backend=None), ValueError, "backend should be one of"),
        (dict(input=torch.zeros(4, 3, 5, dtype=torch.long)), ValueError, "input should be of a floating point dtype"),
        (dict(input=torch.zeros(4, 5)), ValueError, "input should have 3 dimensions, got shape"),
        (dict(input=torch.zeros(0, 3, 5)), RuntimeError, "Expected sequence length to be larger than 0"),
        (dict(input=torch.zeros(4, 3, 6)), RuntimeError, r"weights\[0\] should have shape \(28, 6\), got \(28, 5\)"),
        (dict(input=torch.zeros(4, 3, 5).double()), ValueError, r"hx\[0\] should have the dtype of input"),
        (dict(hx=(torch.zeros(1, 3, 7),)), ValueError, "hx should be a pair"),
        (dict(hx=(torch.zeros(1, 2, 7),) * 2), RuntimeError, r"hx\[0\] should have shape \(1, 3, 7\)"),
        (dict(weights=[]), ValueError, "weights should be 4 tensors for each of 1 layers and directions, got 0"),
        (dict(bias=False), ValueError, "weights should be 2 tensors"),
        (dict(recurrent_dropout_mask=torch.ones(1, 2, 3, 7)), ValueError, "recurrent_dropout_mask should have shape"),
        (dict(recurrent_dropout=0.5, training=True, backend="torch"), ValueError, "has no recurrent dropout"),
        (dict(batch_sizes=torch.tensor([3])), ValueError, "input should have 2 dimensions"),
        (dict(batch_sizes=torch.tensor([3, 4]), input=torch.zeros(7, 5)), ValueError, "batch_sizes should"),
        (dict(batch_sizes=torch.tensor([3, 2]), input=torch.zeros(7, 5)), ValueError, "batch_sizes should"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_functional(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without a C compiler, on which nothing is compiled yet."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    caches = (build.compiler, dispatch.has_native)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_triton_on_a_cpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = TritonLSTM(5, 7, backend="triton"), torch.randn(4, 3, 5)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="on a CPU needs a C compiler: install gcc or clang .* no cc, gcc or clang"):
        module(x)
    monkeypatch.setenv("CC", "/nonexistent/cc -O1")
    with pytest.raises(RuntimeError, match="or set CC; CC=/nonexistent/cc -O1 doesn't run"):
        module(x)


@pytest.mark.usefixtures("no_compiler")
def test_the_interpreter_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    dispatch.check_triton(torch.device("cpu"))


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("recurrent_dropout", [0.0, 0.5])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_other_backends_need_no_compiler(backend: str, recurrent_dropout: float) -> None:
    module = TritonLSTM(5, 7, backend=backend, recurrent_dropout=recurrent_dropout)
    packed = pack_padded_sequence(torch.randn(4, 300, 5), torch.full((300,), 4))
    for x in (torch.randn(4, 3, 5), packed):
        _, (h, _) = module(x)
        h.sum().backward()


def test_triton_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    monkeypatch.setattr(dispatch, "has_native", lambda: False)  # which would be remembered
    with pytest.raises(RuntimeError, match="needs the package triton, which is not installed"):
        TritonLSTM(5, 7, backend="triton")(torch.randn(4, 3, 5))
