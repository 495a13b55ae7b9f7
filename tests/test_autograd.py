"""The operators as PyTorch sees them: opcheck, gradients to second order, compilation."""

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from torch._subclasses import FakeTensorMode

from checks import Case, shaped
from lstm_triton import TritonLSTM, dispatch, functional, planning


def layer_arguments(device: torch.device, backend: str, dropout: str, packed: bool, chunk: int = 0) -> tuple:
    steps, batch, size, hidden, wide, directions = 3, 2, 3, 6, 5, 2

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, requires_grad=True)

    weights = []
    for _ in range(directions):
        weights += [random(4 * hidden, wide), random(4 * hidden, size), random(4 * hidden), random(4 * hidden)]
        weights += [random(size, hidden)]
    sizes = torch.tensor([2, 2, 1]) if packed else None
    mask = torch.rand(directions, steps, batch, size, device=device) if dropout == "given" else None
    seed = torch.tensor([5], device=device) if dropout == "drawn" else None
    states = random(directions, batch, size), random(directions, batch, hidden)
    rows = 5 if packed else steps * batch
    return (
        random(rows, wide),
        sizes,
        *states,
        weights,
        1,
        True,
        0.0,
        mask,
        seed,
        0.5,
        True,
        backend,
        chunk,
        True,
        "lstm",
        None,
        False,
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("backend,dropout", [("eager", "none"), ("eager", "given"), ("triton", "drawn")])
def test_opcheck(backend: str, dropout: str, chunk: int, packed: bool, device: torch.device) -> None:
    arguments = layer_arguments(device, backend, dropout, packed, chunk)
    torch.library.opcheck(torch.ops.lstm_triton.lstm, arguments)


@pytest.mark.parametrize("backend,dropout", [("eager", "given"), ("triton", "drawn")])
@pytest.mark.parametrize("wanted,chunk", [(True, 0), (False, 0), (True, 2)])
def test_opcheck_backward(wanted: bool, chunk: int, backend: str, dropout: str, device: torch.device) -> None:
    arguments = layer_arguments(device, backend, dropout, False, chunk)
    with torch.no_grad():
        y, hn, cn, kept = torch.ops.lstm_triton.lstm(*arguments)
    plain = torch.utils._pytree.tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, arguments)
    backward = (
        torch.ones_like(y),
        torch.ones_like(hn),
        torch.ones_like(cn),
        *plain[:-4],
        y,
        kept,
        wanted,
        wanted,
        *plain[-3:],
    )
    torch.library.opcheck(torch.ops.lstm_triton.lstm_backward, backward)


@pytest.mark.parametrize("way", ["eager", *planning.STRATEGIES])
@pytest.mark.parametrize("mode", functional.MODES)
def test_gradients_of_gradients_under_dropout(mode: str, way: str, device: torch.device) -> None:
    """gradcheck and gradgradcheck, masks drawn anew from the same seed, to the full numerical Jacobian."""
    backend = "eager" if way == "eager" else "triton"
    module = TritonLSTM(
        2, 3, proj_size=2, bidirectional=True, device=device, dtype=torch.float64, backend=backend,
        recurrent_dropout=0.5, recurrent_dropout_mode=mode,
    )  # fmt: skip
    x = torch.randn(3, 2, 2, device=device, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]
    weights = [p.detach().requires_grad_() for p in module.parameters()]

    def function(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))[0]

    with planning.force("step" if way == "eager" else way):
        assert torch.autograd.gradcheck(function, (x, *weights), fast_mode=way != "eager")
        assert torch.autograd.gradgradcheck(function, (x, *weights), fast_mode=True)


@pytest.mark.parametrize("backend", ["auto", "eager", "torch", "triton"])
def test_gradient_penalty_of_a_packed_batch(backend: str, device: torch.device) -> None:
    """Double backward on every backend, for every form of input."""
    case = Case(num_layers=2, bidirectional=True, form="packed")
    reference, ours = case.modules(device, torch.float64, backend=backend)
    if device.type == "cuda":
        reference, ours = reference.cpu(), ours
    x, _, _ = case.inputs(device, torch.float64)
    found = []
    for module in (reference, ours):
        leaf = x.to(next(module.parameters()).device).requires_grad_()
        (gradient,) = torch.autograd.grad(module(case.pack(leaf))[0].data.sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
        found.append([gradient.detach().cpu(), *(p.grad.cpu() for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_double_backward_past_an_operator_without_one(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What gives cuDNN's operator its double backward, on any device: an identity in a plain backward."""
    case = Case(num_layers=2, bidirectional=True, proj_size=3)
    _, ours = case.modules(torch.device("cpu"), torch.float64, backend="eager")
    x, h, c = (t.requires_grad_() for t in case.inputs(torch.device("cpu"), torch.float64))
    weights = list(ours.parameters())
    options = functional.Options(2, True, 0.0, True, True, False, 0.0, "step", "torch")
    outputs = dispatch._operator(x, None, (h, c), weights, options)
    wrapped = dispatch._DoubleBackward.apply(None, options, *outputs, x, h, c, *weights)
    expected_outputs = ours(x, (h, c))
    expected = [expected_outputs[0], *expected_outputs[1]]
    found = []
    for results in (wrapped, expected):
        plain = torch.autograd.grad(results[0].square().sum(), [x, *weights], retain_graph=True)
        once = torch.autograd.grad(results[0].square().sum() + results[2].sum(), [x, h, *weights], create_graph=True)
        twice = torch.autograd.grad(sum(g.square().sum() for g in once), [x, c, *weights])
        found.append([*results, *plain, *once, *twice])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["auto", "eager", "torch", "triton"])
def test_compile(backend: str, device: torch.device) -> None:
    """torch.compile(fullgraph=True), forward and backward."""
    case = shaped(num_layers=2, bidirectional=True, batch_first=True)
    _, ours = case.modules(device, torch.float32, backend=backend)
    x, h, c = case.inputs(device, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True)
    found = []
    for function in (compiled, ours):
        leaf = x.clone().requires_grad_()
        y, (hn, cn) = function(leaf, (h, c))
        found.append([y, hn, cn, *torch.autograd.grad(y.square().sum() + cn.sum(), [leaf, *ours.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compile_stays_one_graph_as_lengths_vary(device: torch.device) -> None:
    """T and B are run-time sizes: nothing is compiled anew for other lengths."""
    module = TritonLSTM(5, 7, device=device, recurrent_dropout=0.2)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for steps, batch in ((3, 2), (4, 2), (7, 5), (11, 3)):
        y, _ = compiled(torch.randn(steps, batch, 5, device=device))
        y.sum().backward()
        assert y.shape == (steps, batch, 7)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


@pytest.mark.parametrize("given", [False, True])
def test_compile_packed(given: bool, device: torch.device) -> None:
    case = Case(num_layers=2, bidirectional=True, form="packed")
    _, ours = case.modules(device, torch.float32, backend="auto")
    x, h, c = case.inputs(device, torch.float32)
    hx = (h, c) if given else None
    torch._dynamo.reset()
    y, (hn, cn) = torch.compile(ours, fullgraph=True, backend="aot_eager")(case.pack(x), hx)
    expected, (he, ce) = ours(case.pack(x), hx)
    for a, b in ((y.data, expected.data), (hn, he), (cn, ce)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_saved_gradients_can_be_taken_twice(device: torch.device) -> None:
    """Backward changes nothing that it needs again."""
    for backend in ("eager", "triton"):
        _, ours = Case(num_layers=2).modules(device, torch.float32, backend=backend)
        loss = ours(torch.randn(3, 2, 5, device=device))[0].square().sum()
        first = torch.autograd.grad(loss, list(ours.parameters()), retain_graph=True)
        second = torch.autograd.grad(loss, list(ours.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
def test_function_transforms_and_checkpoints(backend: str, device: torch.device) -> None:
    """torch.func.grad, activation checkpoints and fake tensors, as with `nn.LSTM`."""
    _, ours = Case(num_layers=2).modules(device, torch.float32, backend=backend)
    x = torch.randn(3, 2, 5, device=device)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(ours, parameters, (x,))[0].square().sum()

    found = torch.func.grad(loss)(parameters)
    ours(x)[0].square().sum().backward()
    expected = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    leaf = x.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(lambda x: ours(x)[0], leaf, use_reentrant=False).square().sum().backward()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(found[name], expected[name])
        torch.testing.assert_close(p.grad, expected[name])
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert ours(torch.empty(6, 4, 5, device=device))[0].shape == (6, 4, 7)
