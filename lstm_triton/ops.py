"""One LSTM layer, both directions, as PyTorch operators with gradients to any order.

The input product of all steps is one GEMM before the recurrence; the gradients of weights,
biases and input are GEMMs after it. Only the recurrence itself has several ways to run.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lstm_triton import eager, plan, reference
from lstm_triton.recurrence import (
    Gradients,
    LayerGradients,
    Layout,
    Recurrence,
    RecurrentDropout,
    rnn_precision,
    state_dtype,
)  # fmt: skip
from lstm_triton.reference import Direction, by_direction

_HALF = (torch.float16, torch.bfloat16)
_NOTHING = nullcontext()


def gemms_as_rnn(input: Tensor) -> AbstractContextManager[None]:
    """float32 GEMMs in the precision that PyTorch's setting for RNNs allows, as cuDNN's are."""
    if input.dtype != torch.float32 or not input.is_cuda:
        return _NOTHING
    return _matmul_precision(rnn_precision(input.device))


@contextmanager
def _matmul_precision(wanted: str) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    given = matmul.fp32_precision
    if (given == "tf32") == (wanted == "tf32"):
        yield
        return
    matmul.fp32_precision = wanted
    try:
        yield
    finally:
        matmul.fp32_precision = given


def forward(
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: Tensor,
    cx: Tensor,
    weights: list[Tensor],
    bias: bool,
    mask: Tensor | None,
    seed: Tensor | None,
    p: float,
    per_step: bool,
    stream: int,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs one layer.

    Args:
        input: (N, I) with the layout that `lstm_triton.recurrence` says, or dense as (T, B, I); contiguous.
        batch_sizes: None for a dense batch, else (T,) on the CPU.
        hx, cx: (D, B, K), (D, B, H).
        weights, bias: as `lstm_triton.reference.layer` takes them.
        mask, seed, p, per_step, stream: the fields of `RecurrentDropout`; "eager" takes masks only.
        backend: "eager" or "triton".
        save: whether gates and c are kept for backward.

    Returns:
        The fields of `Recurrence`; the output has the leading sizes of the input.
    """
    dtype, leading = input.dtype, input.shape[:-1]
    input = _flat(input)
    dropout = RecurrentDropout(mask, seed, p, per_step, stream)
    if backend == "eager" and dtype in _HALF:  # its cell state is then float32 as everywhere
        input, hx, cx, *weights = (x.float() for x in (input, hx, cx, *weights))
    layout = Layout.of(input.size(0), hx.size(1), batch_sizes)
    directions = by_direction(weights, bias, hx.size(2) != cx.size(2))
    with gemms_as_rnn(input):
        if backend == "eager":
            result = eager.forward(_input_product(input, directions), hx, cx, *_recurrent(directions), layout, mask)
        else:
            chosen = plan.of(input, hx, cx)
            products = None if chosen.fused else _input_product(input, directions)
            result = plan.forward(chosen, input, products, hx, cx, directions, layout, dropout, save)
    gates, c = (result.gates, result.c) if save else (result.gates.new_empty(0), result.c.new_empty(0))
    output = result.output if len(leading) == 1 else result.output.view(*leading, -1)
    if output.dtype == dtype:
        return output, result.hn, result.cn, gates, c
    return output.to(dtype), result.hn.to(dtype), result.cn.to(dtype), gates, c


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.view(-1, x.size(-1))


def _input_product(input: Tensor, directions: list[Direction]) -> Tensor:
    """(D, N, 4H): the input times weight_ih, with both biases."""
    gates = input.new_empty(len(directions), input.size(0), directions[0][0].size(0))
    for out, (w_ih, _, b_ih, b_hh, _) in zip(gates, directions, strict=True):
        if b_ih is None or b_hh is None:
            torch.mm(input, w_ih.t(), out=out)
        else:
            torch.addmm(b_ih + b_hh, input, w_ih.t(), out=out)
    return gates


def _recurrent(directions: list[Direction]) -> tuple[list[Tensor], list[Tensor]]:
    """weight_hh and (empty without projections) weight_hr of each direction."""
    return [d[1] for d in directions], [d[4] for d in directions if d[4] is not None]


layer = torch.library.custom_op("lstm_triton::layer", forward, mutates_args=())


@layer.register_fake
def _(input, batch_sizes, hx, cx, weights, bias, mask, seed, p, per_step, stream, backend, save):
    leading, (directions, batch, size), hidden = input.shape[:-1], hx.shape, cx.size(2)
    total = math.prod(leading)
    kept = state_dtype(input.dtype)
    gates = (directions, total, 4 * hidden) if save else (0,)
    return (
        input.new_empty(*leading, directions * size),
        input.new_empty(directions, batch, size),
        input.new_empty(directions, batch, hidden),
        input.new_empty(gates, dtype=kept if backend == "eager" else input.dtype),
        input.new_empty((directions, total, hidden) if save else (0,), dtype=kept),
    )


def backward(
    doutput: Tensor,
    dhn: Tensor,
    dcn: Tensor,
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: Tensor,
    cx: Tensor,
    weights: list[Tensor],
    bias: bool,
    mask: Tensor | None,
    seed: Tensor | None,
    p: float,
    per_step: bool,
    stream: int,
    backend: str,
    output: Tensor,
    gates: Tensor,
    c: Tensor,
    input_wanted: bool,
    weights_wanted: bool,
) -> list[Tensor]:
    """The gradients of `forward`: those of input, hx, cx and of each of `weights`.

    Those of the input and of the weights are empty where they aren't wanted.
    """
    dtype, shape = input.dtype, input.shape
    input, output, doutput = _flat(input), _flat(output), _flat(doutput)
    dropout = RecurrentDropout(mask, seed, p, per_step, stream)
    if backend == "eager" and dtype in _HALF:
        doutput, dhn, dcn, input, hx, cx, output, *weights = (
            x.float() for x in (doutput, dhn, dcn, input, hx, cx, output, *weights)
        )
    layout = Layout.of(input.size(0), hx.size(1), batch_sizes)
    directions = by_direction(weights, bias, hx.size(2) != cx.size(2))
    saved = Recurrence(output, dhn, dcn, gates, c)
    with gemms_as_rnn(input):
        if backend == "eager":
            found = eager.backward(doutput, dhn, dcn, saved, hx, cx, *_recurrent(directions), layout, mask)
        else:
            wanted = input_wanted, weights_wanted
            chosen = plan.of(input, hx, cx)
            whole = plan.backward(chosen, doutput, dhn, dcn, saved, input, hx, cx, directions, layout, dropout, wanted)
            if isinstance(whole, LayerGradients):
                dinput = whole.dinput.view(shape) if input_wanted else whole.dinput
                return [dinput, whole.dhx, whole.dcx, *whole.dweights]
            found = whole
        dinput = torch.empty_like(input) if input_wanted else input.new_empty(0)
        if input_wanted:
            for d, (w_ih, *_) in enumerate(directions):
                torch.addmm(dinput, found.dgates[d], w_ih, beta=int(d > 0), out=dinput)
        dweights = _weight_gradients(found, saved, input, bias) if weights_wanted else [w.new_empty(0) for w in weights]
    gradients = [dinput.view(shape) if input_wanted else dinput, found.dhx, found.dcx, *dweights]
    return [x if x.dtype == dtype else x.to(dtype) for x in gradients]


def _weight_gradients(found: Gradients, saved: Recurrence, input: Tensor, bias: bool) -> list[Tensor]:
    gradients = []
    hidden = saved.c.size(2)
    for d, da in enumerate(found.dgates):
        gradients += [da.t() @ input, da.t() @ found.h_prev[d]]
        if bias:
            db = da.sum(0)
            gradients += [db, db.clone()]  # operators may not return one tensor twice
        if found.dh.numel():
            q = (saved.gates[d, :, 3 * hidden :] * torch.tanh(saved.c[d])).to(da.dtype)
            gradients.append(found.dh[d].t() @ q)
    return gradients


layer_backward = torch.library.custom_op("lstm_triton::layer_backward", backward, mutates_args=())


@layer_backward.register_fake
def _(
    doutput, dhn, dcn, input, batch_sizes, hx, cx, weights, bias, mask, seed, p, per_step, stream, backend,
    output, gates, c, input_wanted, weights_wanted,
):  # fmt: skip
    return [
        input.new_empty(input.shape if input_wanted else 0),
        input.new_empty(hx.shape),
        input.new_empty(cx.shape),
        *(w.new_empty(w.shape if weights_wanted else 0) for w in weights),
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[3:])
    _save(ctx, inputs, output)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, batch_sizes, hx, cx, weights, ctx.bias, mask, seed, *ctx.options, _ = inputs
    y, _, _, gates, c = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, batch_sizes, hx, cx, mask, seed, y, gates, c, *weights)


def _gradients(run: Callable[..., list[Tensor]], ctx: Any, dy: Any, dhn: Any, dcn: Any, *_: None) -> tuple[Any, ...]:
    """The gradients of `forward`'s arguments; `run` is `backward`, as a function or an operator."""
    input, batch_sizes, hx, cx, mask, seed, y, gates, c, *weights = ctx.saved_tensors
    p, per_step, stream, backend = ctx.options
    dy = torch.zeros_like(y) if dy is None else dy.contiguous()
    dhn = torch.zeros_like(hx) if dhn is None else dhn.contiguous()
    dcn = torch.zeros_like(cx) if dcn is None else dcn.contiguous()
    input_wanted, weights_wanted = ctx.needs_input_grad[0], any([w.requires_grad for w in weights])
    if torch.is_grad_enabled():  # a graph of this backward is wanted: take the plainly written layer's
        steps = Layout.of(_flat(input).size(0), hx.size(1), batch_sizes).steps
        mask = RecurrentDropout(mask, seed, p, per_step, stream).drawn(steps, hx)

        def rerun(input: Tensor, hx: Tensor, cx: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            output, hn, cn = reference.layer(_flat(input), hx, cx, list(weights), ctx.bias, batch_sizes, mask)
            return output.view(y.shape), hn, cn

        gradients: Sequence[Tensor | None] = reference.differentiable_vjp(
            rerun, [input, hx, cx, *weights], [dy, dhn, dcn]
        )
    else:
        gradients = run(
            dy, dhn, dcn, input, batch_sizes, hx, cx, weights, ctx.bias, mask, seed, *ctx.options,
            y, gates, c, input_wanted, weights_wanted,
        )  # fmt: skip
    dinput, dhx, dcx, *dweights = gradients
    return (
        dinput if input_wanted else None,
        None,
        dhx,
        dcx,
        dweights if weights_wanted else [None] * len(weights),
        *[None] * 8,
    )


layer.register_autograd(partial(_gradients, layer_backward), setup_context=_setup_context)


class _Layer(torch.autograd.Function):
    """`layer` for calls that nothing traces, with a fraction of an operator's overhead.

    `save_for_backward` and the engine see tensors among the arguments only, not in lists: weights come last, unpacked.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        inputs = _packed(arguments)
        outputs = forward(*inputs)
        _save(ctx, inputs, outputs)
        return outputs[:3]  # what only backward wants is no output here

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        dinput, batch_sizes, dhx, dcx, dweights, *rest = _gradients(backward, ctx, *gradients)
        return dinput, batch_sizes, dhx, dcx, *rest, *dweights


class _TransformedLayer(_Layer):
    """The same in the form that `torch.func`'s transforms take, which costs a look at the signature in each call."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        return forward(*_packed(arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _setup_context(ctx, _packed(inputs), output)


def _packed(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of `_Layer` as `forward` takes them."""
    return *arguments[:4], list(arguments[12:]), *arguments[4:12]


def run(
    input: Tensor, batch_sizes: Tensor | None, hx: Tensor, cx: Tensor, weights: list[Tensor], *options: Any
) -> tuple[Tensor, ...]:
    """`forward` with gradients, in the way that suits the call; arguments and results as there."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return layer(input, batch_sizes, hx, cx, weights, *options)
    if torch._C._are_functorch_transforms_active():
        return _TransformedLayer.apply(input, batch_sizes, hx, cx, *options, *weights)
    if not options[-1]:  # nothing is kept for a backward, so there is none
        return forward(input, batch_sizes, hx, cx, weights, *options)
    return _Layer.apply(input, batch_sizes, hx, cx, *options, *weights)
