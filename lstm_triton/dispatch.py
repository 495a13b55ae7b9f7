"""Which backend runs a call, and PyTorch's own operator as one of them.

(Not named backends: `torch.compile` skips every path with "triton/backends" in it.)
"""

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lstm_triton import cells, operator, planning, reference
from lstm_triton.cpu import build, runtime
from lstm_triton.gpu import choice

if TYPE_CHECKING:
    from lstm_triton.functional import Options

BACKENDS = ("auto", "triton", "eager", "torch")


# Rows of a packed batch from which on the backward by hand pays on a CPU without native kernels (bench/test_auto.py):
# 0.7 to 0.8 of the time of PyTorch's operator at 450 rows, 0.2 to 0.5 at 4,300.
PACKED_ROWS = 256


class Call(NamedTuple):
    """What `lstm_triton.functional.run` is asked for; arguments as there."""

    input: Tensor
    batch_sizes: Tensor | None
    hx: tuple[Tensor, Tensor]
    weights: list[Tensor]
    options: "Options"
    drops: bool  # whether recurrent dropout is active
    save: bool  # whether a backward may follow


def auto(call: Call, run: Callable[..., Any]) -> str:
    """The backend that "auto" stands for; `run` is `lstm_triton.functional.run`.

    On a GPU the first call of its kind is timed (`lstm_triton.gpu.tuning`), after the kernels that may run it are found
    right there (`lstm_triton.gpu.qualification`).
    """
    return choice.choose(call, run) if _is_timed(call) else _by_rule(call)[0]


def why_auto(call: Call) -> tuple[str, str]:
    """What `auto` would return and, in words, why. Times nothing, runs nothing."""
    return choice.why(call) if _is_timed(call) else _by_rule(call)


def _is_timed(call: Call) -> bool:
    return call.input.is_cuda and not torch.compiler.is_compiling() and has_triton()


def _by_rule(call: Call) -> tuple[str, str]:
    """PyTorch's operator wherever it does the job and nothing here is known to be faster."""
    input, packed, drops, options = call.input, call.batch_sizes is not None, call.drops, call.options
    compiling = torch.compiler.is_compiling()
    why = "torch.compile would unroll PyTorch's operator"
    lacks = "recurrent dropout" if drops else operator_lacks(options)
    if lacks:
        why = f"PyTorch's operator has no {lacks}"
    if input.is_cuda and compiling and has_triton() and not cells.of(options.cell).whole_rows:
        return "triton", why  # of cells that look at whole rows no plan may fit, which isn't looked for here
    on_cpu = input.device.type == "cpu"
    if on_cpu and not compiling and has_native():
        (_, batch, size), hidden, directions = call.hx[0].shape, call.hx[1].size(2), 1 + options.bidirectional
        features = max(input.size(-1), directions * size) if options.num_layers > 1 else input.size(-1)
        fast = input.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        sizes = cells.of(options.cell), batch, features, hidden, size, directions, torch.get_num_threads()
        if lacks:
            return "triton", why
        if fast and planning.pays_on_cpu(*sizes, packed, call.save, bool(options.recompute)):
            return "triton", "native kernels are faster than PyTorch's operator at this size"
    if lacks or compiling:
        return "eager", why
    if packed and call.save and on_cpu and input.size(0) >= PACKED_ROWS:
        return "eager", "PyTorch's operator keeps autograd nodes for each step of a packed batch"
    return "torch", "PyTorch's operator is the fastest at this size"


@cache
def has_native() -> bool:
    """Whether kernels can run natively on the CPU: Triton is installed, not interpreting, and a C compiler works."""
    if not has_triton() or interpreting() or not build.has_compiler():
        return False
    try:
        runtime.load()
    except (OSError, RuntimeError) as error:
        warnings.warn(f"backend='auto' goes on without native kernels: {error}", stacklevel=2)
        return False
    return True


def interpreting() -> bool:
    """Whether Triton's interpreter is asked for."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def check_triton(device: torch.device) -> None:
    """Raises RuntimeError where backend="triton" cannot run on `device`."""
    if not has_triton():
        raise RuntimeError(
            "backend='triton' needs the package triton, which is not installed; "
            "install it (pip install triton, Linux only) or use backend='eager' or 'torch'"
        )
    if device.type == "cpu" and not torch.compiler.is_compiling() and not interpreting():
        build.compiler()  # says what to install


def operator_lacks(options: "Options") -> str:
    """What PyTorch's operator lacks for these options, in words; empty if nothing: recurrent dropout apart."""
    if cells.of(options.cell).operator is None:
        return f"cell {options.cell!r}"
    return "zoneout" if options.zones else ""


def torch_operator(
    input: Tensor, batch_sizes: Tensor | None, hx: tuple[Tensor, Tensor], weights: list[Tensor], options: "Options"
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's operator: cuDNN, MIOpen, oneDNN or ATen."""
    outputs = _operator(input, batch_sizes, hx, weights, options)
    if input.is_cuda and outputs[0].requires_grad and not torch.compiler.is_compiling():
        dropped = options.training and options.dropout > 0 and options.num_layers > 1
        return outputs if dropped else _DoubleBackward.apply(batch_sizes, options, *outputs, input, *hx, *weights)
    return outputs


class _DoubleBackward(torch.autograd.Function):
    """cuDNN's operator has no double backward; this gives it one.

    An identity on the operator's outputs. A plain backward goes through it to the operator's own.
    Where a graph of the backward is wanted, gradients go past the operator, through the plainly
    written layers. (Masks that cuDNN draws between layers are not known here: not for `dropout`.)
    """

    @staticmethod
    def forward(ctx: Any, batch_sizes: Tensor | None, options: "Options", *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.batch_sizes, ctx.options = batch_sizes, options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[3:])
        return tuple(x.view_as(x) for x in tensors[:3])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return None, None, *gradients, *[None] * len(ctx.saved_tensors)
        o = ctx.options

        def rerun(input: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            return reference.stack(
                cells.of(o.cell), input, (h, c), list(weights), ctx.batch_sizes, o.num_layers, o.bias,
                o.bidirectional, o.batch_first,
            )  # fmt: skip

        found = reference.differentiable_vjp(rerun, list(ctx.saved_tensors), gradients)
        return None, None, None, None, None, *found


def _operator(
    input: Tensor, batch_sizes: Tensor | None, hx: tuple[Tensor, Tensor], weights: list[Tensor], options: "Options"
) -> tuple[Tensor, Tensor, Tensor]:
    o = options
    common = (*hx, weights, o.bias, o.num_layers, o.dropout, o.training, o.bidirectional)
    return operator.call(cells.of(o.cell), input, batch_sizes, *common, batch_first=o.batch_first)
