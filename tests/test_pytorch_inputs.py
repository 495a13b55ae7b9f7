"""PyTorch's own test inputs for `nn.LSTM`, seven checks of each: 224, of which `nn.LSTM` passes 192.

And those for `nn.GRU` and `nn.RNN`: 112 and 224.
"""

import copy
import pickle
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import (
    ModuleInput,
    module_inputs_torch_nn_LSTM,
    module_inputs_torch_nn_RNN_GRU,
)

from lstm_triton import TritonGRU, TritonLSTM, TritonRNN

# Ours, PyTorch's, what makes the inputs, and how many there are.
KINDS: dict[str, tuple[Any, Any, Any, int]] = {
    "lstm": (TritonLSTM, nn.LSTM, module_inputs_torch_nn_LSTM, 32),
    "gru": (TritonGRU, nn.GRU, partial(module_inputs_torch_nn_RNN_GRU, is_rnn=False), 16),
    "rnn": (TritonRNN, nn.RNN, partial(module_inputs_torch_nn_RNN_GRU, is_rnn=True), 32),
}
INPUTS = [(kind, index) for kind, (*_, count) in KINDS.items() for index in range(count)]


def sample(kind: str, index: int, device: torch.device) -> ModuleInput:
    """float64, with tensors that require gradients."""
    *_, make, count = KINDS[kind]
    torch.manual_seed(index)
    inputs = make(None, device, torch.float64, requires_grad=True, training=True)
    assert len(inputs) == count
    return inputs[index]


def built(kind: str, index: int, device: torch.device, backend: str) -> tuple[nn.Module, nn.Module, tuple]:
    """Our module, PyTorch's with the same weights, and the input: (x,), (x, h) or of an LSTM (x, (h, c))."""
    given, (ours, theirs, *_) = sample(kind, index, device), KINDS[kind]
    arguments = given.constructor_input.kwargs
    theirs = theirs(**arguments, device=device, dtype=torch.float64)
    ours = ours(**arguments, device=device, dtype=torch.float64, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, given.forward_input.args


def several(states: Any) -> tuple[torch.Tensor, ...]:
    return states if isinstance(states, tuple) else (states,)


def flat(outputs: tuple) -> tuple[torch.Tensor, ...]:
    return outputs[0], *several(outputs[1])


def leaves(args: tuple) -> list[torch.Tensor]:
    x, *rest = args
    return [x, *(several(rest[0]) if rest else ())]


def joined(states: list[torch.Tensor]) -> tuple:
    """What a call gets behind the input: nothing, h or (h, c)."""
    return () if not states else (states[0] if len(states) == 1 else tuple(states),)


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
        return flat(torch.func.functional_call(module, named, (x, *joined(hx))))

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

    x, *states = map(strided, leaves(args))
    other = (x, *joined(states))
    assert not x.is_contiguous()
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


@pytest.mark.parametrize("kind,index", INPUTS)
@pytest.mark.parametrize("check", CHECKS)
def test_auto(check: str, kind: str, index: int, device: torch.device) -> None:
    CHECKS[check](*built(kind, index, device, "auto"))


# The same for each backend by itself. Compilation of the others is in test_compile.py.
@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
@pytest.mark.parametrize("check", [name for name in CHECKS if name != "compile"])
def test_backends(check: str, backend: str, device: torch.device) -> None:
    every = 8 if backend == "triton" and device.type == "cpu" else 1  # interpreted kernels are slow
    for kind, index in INPUTS[::every]:
        CHECKS[check](*built(kind, index, device, backend))


def test_nn_lstm_passes_all_but_compile(device: torch.device) -> None:
    """What the figure of 192 says: `torch.compile(fullgraph=True)` refuses `nn.LSTM`."""
    _, theirs, args = built("lstm", 0, device, "auto")
    for name, check in CHECKS.items():
        if name == "gradgradcheck" and device.type == "cuda":
            continue  # cuDNN has none
        if name == "compile":
            with pytest.raises(torch._dynamo.exc.Unsupported), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(theirs, theirs, args)
        else:
            check(theirs, theirs, args)
