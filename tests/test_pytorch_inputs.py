"""PyTorch's own test inputs for `nn.LSTM`, seven checks of each: 224, of which `nn.LSTM` passes 192."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import ModuleInput, module_inputs_torch_nn_LSTM

from lstm_triton import TritonLSTM

INPUTS = 32


def sample(index: int, device: torch.device) -> ModuleInput:
    """float64, with tensors that require gradients."""
    torch.manual_seed(index)
    inputs = module_inputs_torch_nn_LSTM(None, device, torch.float64, requires_grad=True, training=True)
    assert len(inputs) == INPUTS
    return inputs[index]


def built(index: int, device: torch.device, backend: str) -> tuple[nn.Module, nn.LSTM, tuple]:
    """Our module, PyTorch's with the same weights, and the input: (x,) or (x, (h, c))."""
    given = sample(index, device)
    arguments = given.constructor_input.kwargs
    theirs = nn.LSTM(**arguments, device=device, dtype=torch.float64)
    ours = TritonLSTM(**arguments, device=device, dtype=torch.float64, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, given.forward_input.args


def flat(outputs: tuple) -> tuple[torch.Tensor, ...]:
    y, (h, c) = outputs
    return y, h, c


def leaves(args: tuple) -> list[torch.Tensor]:
    x, *rest = args
    return [x, *(rest[0] if rest else ())]


def with_gradients(module: nn.Module, args: tuple) -> list[torch.Tensor]:
    outputs = flat(module(*args))
    loss = sum((t * torch.arange(1, t.numel() + 1, device=t.device).view(t.shape).cos()).sum() for t in outputs)
    return [*outputs, *torch.autograd.grad(loss, [*leaves(args), *module.parameters()])]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def function_of(module: nn.Module, args: tuple):
    """The module as a function of all its input tensors and parameters, for gradcheck."""
    names = [name for name, _ in module.named_parameters()]
    parameters = [p.detach().requires_grad_() for p in module.parameters()]
    inputs = leaves(args)

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, *hx = tensors[: len(inputs)]
        named = dict(zip(names, tensors[len(inputs) :], strict=True))
        return flat(torch.func.functional_call(module, named, (x, tuple(hx)) if hx else (x,)))

    return function, [*inputs, *parameters]


def check_value(ours, theirs, args) -> None:
    assert_equal(list(flat(ours(*args))), list(flat(theirs(*args))))


def check_gradients(ours, theirs, args) -> None:
    assert_equal(with_gradients(ours, args), with_gradients(theirs, args))


def check_strided(ours, theirs, args) -> None:
    """Input and states as every other element of larger tensors, transposed."""

    def strided(t: torch.Tensor) -> torch.Tensor:
        wide = torch.stack([t, torch.full_like(t, float("nan"))], -1).transpose(0, 1).contiguous().transpose(0, 1)
        return wide[..., 0]

    x, *rest = args
    other = (strided(x), *[tuple(map(strided, hx)) for hx in rest])
    assert not other[0].is_contiguous()
    assert_equal(with_gradients(ours, other), with_gradients(theirs, other))


def check_gradcheck(ours, theirs, args) -> None:
    function, tensors = function_of(ours, args)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


def check_gradgradcheck(ours, theirs, args) -> None:
    function, tensors = function_of(ours, args)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def check_pickling(ours, theirs, args) -> None:
    again = pickle.loads(pickle.dumps(ours))
    assert_equal(list(flat(again(*args))), list(flat(ours(*args))))


def check_compile(ours, theirs, args) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True)
    assert_equal(list(flat(compiled(*args))), list(flat(theirs(*args))))


CHECKS = {
    name.removeprefix("check_"): function for name, function in list(globals().items()) if name.startswith("check_")
}


@pytest.mark.parametrize("index", range(INPUTS))
@pytest.mark.parametrize("check", CHECKS)
def test_auto(check: str, index: int, device: torch.device) -> None:
    CHECKS[check](*built(index, device, "auto"))


# The same for each backend by itself. Compilation of the others is in test_compile.py.
@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
@pytest.mark.parametrize("check", [name for name in CHECKS if name != "compile"])
def test_backends(check: str, backend: str, device: torch.device) -> None:
    every = 8 if backend == "triton" and device.type == "cpu" else 1  # interpreted kernels are slow
    for index in range(0, INPUTS, every):
        CHECKS[check](*built(index, device, backend))


def test_nn_lstm_passes_all_but_compile(device: torch.device) -> None:
    """What the figure of 192 says: `torch.compile(fullgraph=True)` refuses `nn.LSTM`."""
    _, theirs, args = built(0, device, "auto")
    for name, check in CHECKS.items():
        if name == "gradgradcheck" and device.type == "cuda":
            continue  # cuDNN has none
        if name == "compile":
            with pytest.raises(torch._dynamo.exc.Unsupported), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(theirs, theirs, args)
        else:
            check(theirs, theirs, args)
