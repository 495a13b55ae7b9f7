"""A stack of recurrent layers as a PyTorch operator with gradients to any order.

The input product of all steps is a GEMM before the recurrence; the gradients of weights, biases
and input are GEMMs after it. Only the recurrence itself has several ways to run, the engines
`Eager`, `Kernels` and `Operator`. All run windows of a layer's steps one after the other: one
window where all fits and is kept, more where memory is to be saved.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lstm_triton import cells, launching, planning, reference
from lstm_triton import dropout as masks
from lstm_triton.cells.cell import Cell
from lstm_triton.eager import Eager
from lstm_triton.gpu import tuning
from lstm_triton.operator import Operator
from lstm_triton.planning import Plan
from lstm_triton.recurrence import (
    Gradients,
    Layer,
    LayerGradients,
    Layout,
    RecurrentDropout,
    Saved,
    Window,
    Zoneout,
    parameter_gradients,
    rnn_precision,
    state_dtype,
    windows,
)  # fmt: skip
from lstm_triton.reference import by_direction

_NOTHING = nullcontext()
_ENGINES: dict[str, Any] = {"eager": Eager, "triton": launching.Kernels, "torch": Operator}


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


class Stack:
    """The layers of a call, made one by one: arguments as of `forward`."""

    def __init__(
        self,
        input: Tensor,
        batch_sizes: Tensor | None,
        hx: Tensor,
        cx: Tensor,
        weights: list[Tensor],
        num_layers: int,
        bias: bool,
        dropout: float,
        mask: Tensor | None,
        seed: Tensor | None,
        p: float,
        per_step: bool,
        backend: str,
        cell: str,
        zoneout: list[float] | None,
        draws: bool,
        records: bool = True,
        recompute: bool = False,
    ) -> None:
        self.records, self.cell = records, cells.of(cell)
        self.zoneout = None if zoneout is None else Zoneout(zoneout[0], zoneout[1], seed if draws else None)
        self.input, self.hx, self.cx, self.weights = _flat(input), hx, cx, weights
        self.layers, self.bias, self.backend = num_layers, bias, backend
        self.dropout, self.mask, self.seed, self.p, self.per_step = dropout, mask, seed, p, per_step
        self.layout = Layout.of(self.input.size(0), hx.size(1), batch_sizes)
        self.directions = hx.size(0) // num_layers
        self.dtype, self.kept = input.dtype, state_dtype(input.dtype)
        self.plan = None
        if backend == "triton" and tuning.has_plans() and planning.forced() is None:
            kind = records, batch_sizes is not None, mask is not None or p > 0, recompute
            sizes = input.size(-1), hx, cx, num_layers, self.layout.steps
            bucket = tuning.Bucket.of(input.dtype, *sizes, *kind, cell, zoneout is not None)
            self.plan = tuning.plan_for(input.device, bucket)

    def rows(self, k: int) -> slice:
        """Layer k's among the L * D."""
        return slice(k * self.directions, (k + 1) * self.directions)

    def weights_of(self, k: int) -> slice:
        """Layer k's among the weights."""
        each = len(self.weights) // self.layers
        return slice(k * each, (k + 1) * each)

    def layer(self, k: int, input: Tensor) -> Layer:
        rows = self.rows(k)
        hx, cx = (self.hx, self.cx) if self.layers == 1 else (self.hx[rows], self.cx[rows])
        mask = None if self.mask is None else self.mask[rows]
        # Without a probability the seed is that of dropout between layers alone.
        seed = self.seed if self.p > 0 else None
        drops = RecurrentDropout(mask, seed, self.p, self.per_step, rows.start)
        zoneout = None if self.zoneout is None else self.zoneout._replace(stream=rows.start)
        directions = by_direction(self.cell, self.weights[self.weights_of(k)], self.bias, hx.size(2) != cx.size(2))
        return Layer(input, hx, cx, directions, self.layout, drops, self.cell, zoneout, self.records, self.plan)

    def length(self, engine: Any, keep: bool) -> int:
        """Steps of a window where nothing is rebuilt; 0: all.

        Few, so that what is as wide as the gates stays in caches, or small where it isn't kept. Where gates
        are kept, one direction's are views of the whole.
        """
        return 0 if keep and self.directions > 1 else engine.window_length

    def wavefront(self) -> Plan | None:
        """The plan for all layers in one launch; None where they run one by one."""
        if self.backend != "triton" or self.layers == 1:
            return None
        return launching.of_wavefront(self.layer(0, self.input), self.layers)

    def front(self, plan: Plan, inputs: list[Tensor]) -> launching.Wavefront:
        """All layers as one launch.

        Args:
            plan: that for it.
            inputs: of each layer, (N, I) and (N, D * K); in forward the first stands for all.
        """
        layers = [self.layer(k, inputs[min(k, len(inputs) - 1)]) for k in range(self.layers)]
        recurrent = RecurrentDropout(self.mask, self.seed if self.p > 0 else None, self.p, self.per_step)
        drops = launching.Drops(recurrent, self.seed if self.dropout > 0 else None, self.dropout)
        cx = self.cx if self.kept == self.dtype else self.cx.to(self.kept)
        return launching.Wavefront(plan, layers, self.hx, cx, drops)

    def drop(self, x: Tensor, k: int) -> Tensor:
        """Dropout of layer k's output or, the same, of its gradient."""
        if self.seed is None or self.dropout == 0 or k == self.layers - 1:
            return x
        draw = launching.drop if self.backend == "triton" else masks.drop
        return draw(x, self.seed, masks.BETWEEN + k, self.dropout)


def describe(
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: Tensor,
    cx: Tensor,
    weights: list[Tensor],
    num_layers: int,
    bias: bool,
    seed: Tensor | None,
    p: float,
    backend: str,
    chunk: int,
    save: bool,
    cell: str,
    zoneout: list[float] | None,
) -> list[str]:
    """How the layers would run, in words, a line for each that runs by itself; arguments as of `forward`."""
    if backend != "triton":
        how = "PyTorch's operator, chunk by chunk" if backend == "torch" else "PyTorch operations, step by step"
        return [f"layer {k}: {how}" for k in range(num_layers)]
    stack = Stack(
        input, batch_sizes, hx, cx, weights, num_layers, bias, 0.0, None, seed, p, True, backend, cell, zoneout, False,
        save, chunk > 0,
    )  # fmt: skip
    first, front = stack.layer(0, stack.input), None if chunk and save else stack.wavefront()
    if front is not None:
        return [f"layers 0 to {num_layers - 1}, a step apart: {launching.describe(first, front)}"]
    rows = stack.input[:1, :1]
    outputs = rows.expand(stack.layout.total, stack.directions * hx.size(2))
    layers = [first, *(stack.layer(k, outputs) for k in range(1, num_layers))]
    return [f"layer {k}: {launching.describe(layer, launching.of(layer))}" for k, layer in enumerate(layers)]


def forward(
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: Tensor,
    cx: Tensor,
    weights: list[Tensor],
    num_layers: int,
    bias: bool,
    dropout: float,
    mask: Tensor | None,
    seed: Tensor | None,
    p: float,
    per_step: bool,
    backend: str,
    chunk: int,
    save: bool,
    cell: str,
    zoneout: list[float] | None,
    draws: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Runs all layers.

    Args:
        input: (N, I) with the layout that `lstm_triton.recurrence` says, or dense as (T, B, I); contiguous.
        batch_sizes: None for a dense batch, else (T,) on the CPU.
        hx, cx: (L * D, B, K), (L * D, B, H).
        weights, num_layers, bias: as `lstm_triton.functional.recurrent` takes them.
        dropout: between layers, where there is a seed.
        mask: None or (L * D, T or 1, B, K), what h is multiplied by before its product.
        seed, p, per_step: fields of `RecurrentDropout`.
        backend: "eager", "triton" or, with `chunk` alone, "torch".
        chunk: steps whose gates are rebuilt at a time in backward; 0: all gates are kept.
        save: whether a backward may follow.
        cell: name of a `lstm_triton.cells.Cell`; of one that doesn't carry c, cx is hx, and so is cn hn.
        zoneout: None, or the probabilities of h and c to stay.
        draws: whether masks of zoneout are drawn from the seed; else the probabilities are in their place.

    Returns:
        output, with the leading sizes of the input; hn, cn as hx, cx; and what backward needs, nothing
        without `save`: (N, D * K) outputs of all layers but the last, for each layer what its cell keeps, of an
        LSTM the activated gates, (D, N, WH), for each c (D, N, H). With `chunk` the gates are empty and c is that
        before each window but the first, (windows - 1, D, B, H).
    """
    stack = Stack(
        input, batch_sizes, hx, cx, weights, num_layers, bias, dropout, mask, seed, p, per_step, backend, cell,
        zoneout, draws, save, save and chunk > 0,
    )  # fmt: skip
    recompute, same = save and chunk > 0, stack.kept == stack.dtype
    x = stack.input
    width = stack.directions * hx.size(2)
    hn, cn, outputs, gates, carried = [], [], [], [], []
    with gemms_as_rnn(x):
        plan = None if recompute else stack.wavefront()
        if plan is not None:
            y, found = stack.front(plan, [x]).forward(save)
            output = (y[-1] if save else y).view(*input.shape[:-1], width)
            kept = [*y[:-1], *found.gates.split(1), *found.c.split(1)] if save else []
            return output, found.hn, found.cn if same else found.cn.to(stack.dtype), kept
        for k in range(num_layers):
            layer = stack.layer(k, x)
            engine = _ENGINES[backend](layer)
            y = x.new_empty(x.size(0), width)
            h, c, borders = layer.hx, layer.cx if same else layer.cx.to(stack.kept), []
            keep, room = save and not recompute, None
            parts = windows(layer.layout, chunk if recompute else stack.length(engine, save))
            if keep and len(parts) > 1:
                room = engine.layer.room()
            for window in parts:
                if recompute and window.first > 0:
                    borders.append(c)
                own = None if room is None else room.rows(window)
                h, c, kept_gates, kept_c = engine.forward(window, y, h, c, keep, own)
            if room is not None:
                kept_gates, kept_c = room[:2]
            hn.append(h if same else h.to(stack.dtype))
            cn.append(c if same else c.to(stack.dtype))
            if recompute:
                kept_gates = y.new_empty(0)
                kept_c = torch.stack(borders) if borders else c.new_empty(0, *c.shape)
            outputs.append(y)
            gates.append(kept_gates)
            carried.append(kept_c)
            x = stack.drop(y, k)
    output = x if input.dim() == 2 else x.view(*input.shape[:-1], width)
    kept = [*outputs[:-1], *gates, *carried] if save else []
    if num_layers == 1:
        return output, hn[0], cn[0], kept
    return output, torch.cat(hn), torch.cat(cn), kept


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.view(-1, x.size(-1))


@wraps(forward)
def _apart(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """`forward`, all of whose results have memory of their own, as an operator's should."""
    output, hn, cn, kept = forward(*arguments, **named)
    kept = [x if x.untyped_storage().nbytes() == x.numel() * x.element_size() else x.clone() for x in kept]
    return output, hn, cn, kept


lstm = torch.library.custom_op("lstm_triton::lstm", _apart, mutates_args=())


@lstm.register_fake
def _(
    input, batch_sizes, hx, cx, weights, num_layers, bias, dropout, mask, seed, p, per_step, backend, chunk, save,
    cell, zoneout, draws,
):  # fmt: skip
    width = cells.of(cell).width(zoneout is not None)
    leading, (count, batch, size), hidden = input.shape[:-1], hx.shape, cx.size(2)
    directions, total = count // num_layers, math.prod(leading)
    kept, states = [], state_dtype(input.dtype)
    if save:
        kept = [input.new_empty(total, directions * size) for _ in range(num_layers - 1)]
        gates: tuple[int, ...] = (directions, total, width * hidden)
        carried: tuple[int, ...] = (directions, total, hidden)
        if chunk > 0:
            steps = total // batch if batch_sizes is None else batch_sizes.size(0)
            gates, carried = (0,), ((steps + chunk - 1) // chunk - 1, directions, batch, hidden)
        dtype = states if backend == "eager" and not chunk else input.dtype
        kept += [input.new_empty(gates, dtype=dtype) for _ in range(num_layers)]
        kept += [input.new_empty(carried, dtype=states) for _ in range(num_layers)]
    return (
        input.new_empty(*leading, directions * size),
        input.new_empty(hx.shape),
        input.new_empty(cx.shape),
        kept,
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
    num_layers: int,
    bias: bool,
    dropout: float,
    mask: Tensor | None,
    seed: Tensor | None,
    p: float,
    per_step: bool,
    backend: str,
    chunk: int,
    output: Tensor,
    kept: list[Tensor],
    input_wanted: bool,
    weights_wanted: bool,
    cell: str,
    zoneout: list[float] | None,
    draws: bool,
) -> list[Tensor]:
    """The gradients of `forward`: those of input, hx, cx and of each of `weights`.

    Those of the input and of the weights are empty where they aren't wanted.
    """
    stack = Stack(
        input, batch_sizes, hx, cx, weights, num_layers, bias, dropout, mask, seed, p, per_step, backend, cell,
        zoneout, draws, True, chunk > 0,
    )  # fmt: skip
    outputs = [*kept[: num_layers - 1], _flat(output)]
    gates, carried = kept[num_layers - 1 : 2 * num_layers - 1], kept[2 * num_layers - 1 :]
    dy = _flat(doutput)
    wanted = input_wanted, weights_wanted
    with gemms_as_rnn(stack.input):
        plan = None if chunk else stack.wavefront()
        if plan is not None:
            inputs = [stack.input, *(stack.drop(y, k) for k, y in enumerate(outputs[:-1]))]
            front = stack.front(plan, inputs)
            dinput, dh, dc, dweights = _front_gradients(
                stack, front, outputs, dy, dhn, dcn, gates, carried, *wanted
            )  # fmt: skip
        elif num_layers == 1:
            dinput, dh, dc, dweights = _layer_gradients(
                stack, 0, stack.input, outputs[0], dy, dhn, dcn, gates[0], carried[0], chunk, *wanted
            )
        else:
            dhx, dcx, dweights = [dhn] * num_layers, [dcn] * num_layers, []
            for k in range(num_layers - 1, -1, -1):
                rows = stack.rows(k)
                x = stack.drop(outputs[k - 1], k - 1) if k else stack.input
                dinput, dhx[k], dcx[k], found = _layer_gradients(
                    stack, k, x, outputs[k], dy, dhn[rows], dcn[rows], gates[k], carried[k], chunk,
                    input_wanted or k > 0, weights_wanted,
                )  # fmt: skip
                dweights = found + dweights
                if k:
                    dy = stack.drop(dinput, k - 1)
            dh, dc = torch.cat(dhx), torch.cat(dcx)
    if stack.kept != stack.dtype:
        dh, dc = dh.to(stack.dtype), dc.to(stack.dtype)
    if not weights_wanted:
        dweights = [w.new_empty(0) for w in weights]
    return [dinput.view(input.shape) if input_wanted else input.new_empty(0), dh, dc, *dweights]


def _front_gradients(
    stack: Stack,
    front: launching.Wavefront,
    outputs: list[Tensor],
    doutput: Tensor,
    dhn: Tensor,
    dcn: Tensor,
    gates: list[Tensor],
    carried: list[Tensor],
    input_wanted: bool,
    weights_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Those of layers that run as a wavefront: of the input (N, ·), hx, cx and weights; arguments as of `backward`."""
    found = front.backward(doutput, gates, carried, dhn.to(stack.kept), dcn.to(stack.kept))
    dinput, dweights = stack.input, []
    for k, layer in enumerate(front.layers):
        own = slice(k, k + 1)
        h_prev = front.multiplied(k, outputs[k]) if weights_wanted else None
        part = Gradients(found.dhx[own], found.dcx[own], found.dgates[own], None, h_prev)
        saved, first = Saved(gates[k], carried[k]), input_wanted and k == 0
        dx, each = _products(stack, layer, front.window, saved, part, first, weights_wanted)
        dweights += each
        if first:
            dinput = dx[0]
    return dinput, found.dhx, found.dcx, dweights


def _layer_gradients(
    stack: Stack,
    k: int,
    input: Tensor,
    output: Tensor,
    doutput: Tensor,
    dhn: Tensor,
    dcn: Tensor,
    gates: Tensor,
    carried: Tensor,
    chunk: int,
    input_wanted: bool,
    weights_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Those of layer k: of its input (N, ·), hx, cx and weights; arguments as of `backward`."""
    layer = stack.layer(k, input)
    engine = _ENGINES[stack.backend](layer)
    parts = windows(stack.layout, chunk or stack.length(engine, True))
    dh, dc, cx = dhn, dcn, layer.cx
    if stack.kept != stack.dtype:
        dh, dc, cx = (x.to(stack.kept) for x in (dhn, dcn, cx))
    if len(parts) == 1 and not chunk:
        window, saved = parts[0], Saved(gates, carried)
        found = engine.backward(window, output, doutput, saved, layer.hx, cx, dh, dc, input_wanted, weights_wanted)
        dx, dweights = _products(stack, layer, window, saved, found, input_wanted, weights_wanted)
        if stack.directions == 2 and input_wanted:
            dx[0].add_(dx[1])
        dtype = stack.dtype
        if weights_wanted and dweights[0].dtype != dtype:
            dx, dweights = [x.to(dtype) for x in dx], [x.to(dtype) for x in dweights]
        return dx[0] if input_wanted else input, found.dhx, found.dcx, dweights
    dinput = torch.zeros_like(input) if input_wanted else input
    sums: list[Tensor] = []
    for index in range(len(parts) - 1, -1, -1):
        window = parts[index]
        h = window.state_before(output, layer.hx)
        if chunk:
            c = carried[index - 1] if index else cx
            saved = engine.rebuild(window, output, h, c)
        else:
            c, saved = window.state_before(carried[0], cx), Saved(gates, carried).rows(window)
        found = engine.backward(window, output, doutput, saved, h, c, dh, dc, input_wanted, weights_wanted)
        dh, dc = found.dhx, found.dcx
        dx, dweights = _products(stack, layer, window, saved, found, input_wanted, weights_wanted)
        for d, x in enumerate(dx):
            dinput[window.rows(d)] += x  # the windows of two directions overlap
        if not sums:  # in the dtype that states are kept in, so that half precision rounds them once
            sums = [x.to(stack.kept) for x in dweights]
        else:
            for total, x in zip(sums, dweights, strict=True):
                total += x
    return dinput, dh, dc, [x.to(stack.dtype) for x in sums]


def _products(
    stack: Stack,
    layer: Layer,
    window: Window,
    saved: Saved,
    found: Gradients | LayerGradients,
    input_wanted: bool,
    weights_wanted: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of a window's input, by each direction (rows, ·), and of the weights."""
    if isinstance(found, LayerGradients):
        if window.whole or not input_wanted:
            return found.dinput, found.dweights
        return [x[: window.part(d).total] for d, x in enumerate(found.dinput)], found.dweights
    dx, dweights = [], []
    hidden, cell = saved.c.size(2), layer.cell
    for d, weights in enumerate(layer.directions):
        rows = window.rows(d)
        own = slice(0, rows.stop - rows.start)
        da = found.dgates[d, own]
        of_input, dgain = da[:, : cell.inputs * hidden], None
        if cell.input_norm is not None:
            of_input, dgain = _through_input_norm(layer, d, layer.input[rows], of_input)
        if input_wanted:
            dx.append(of_input @ weights.w_ih.to(da.dtype))
        if weights_wanted:
            assert found.h_prev is not None
            h_prev = found.h_prev[d, own]
            dweights += [of_input.t() @ layer.input[rows].to(da.dtype), _of_sums(cell, da, h_prev, hidden)]
            if weights.b_ih is not None:
                db = da.sum(0)
                dweights += [db[: cell.inputs * hidden].clone(), _rows(db, cell.biases, hidden)]
            if found.dh is not None:
                assert cell.output_torch is not None
                parameters = weights.vectors(cell, hidden).to(saved.c.dtype).unbind(0)
                tiles = saved.gates[d, own].to(saved.c.dtype).unflatten(1, (-1, hidden))[:, : len(cell.saved)]
                q = cell.output_torch(tiles.unbind(1), saved.c[d, own], parameters)
                dweights.append(found.dh[d, own].t() @ q.to(da.dtype))
            if cell.parameters:
                vectors = None if found.dparameters is None else found.dparameters[d]
                dweights += parameter_gradients(cell, stack.bias, vectors, dgain, da.dtype)
    return dx, dweights


def _of_sums(cell: Cell, da: Tensor, h_prev: Tensor, hidden: int) -> Tensor:
    """(R * H, K): the gradient of weight_hh, from those of the sums (n, GH) and h_prev (n, K)."""
    pieces = [da[:, sums.start * hidden : sums.stop * hidden].t() @ h_prev for _, sums in cell.runs()]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _rows(vector: Tensor, of: tuple[int, ...], hidden: int) -> Tensor:
    """Of a vector (GH,) the pieces of H with these numbers."""
    if of == tuple(range(vector.size(0) // hidden)):
        return vector.clone()  # operators may not return one tensor twice
    return torch.cat([vector[k * hidden : (k + 1) * hidden] for k in of])


def _through_input_norm(layer: Layer, d: int, x: Tensor, da: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the products with the input (n, inputs * H), and of the gain, from those of the sums."""
    weights, cell = layer.directions[d], layer.cell
    dtype, size = da.dtype, [da.size(1)]
    product, gain = x.to(dtype) @ weights.w_ih.to(dtype).t(), weights.gain(cell).to(dtype)  # not kept: made again
    assert cell.input_norm is not None
    _, mean, factor = torch.native_layer_norm(product, size, gain, None, cell.input_norm)
    dproduct, dgain, _ = torch.ops.aten.native_layer_norm_backward(
        da.contiguous(), product, size, mean, factor, gain, None, [True, True, False]
    )
    return dproduct, dgain


lstm_backward = torch.library.custom_op("lstm_triton::lstm_backward", backward, mutates_args=())


@lstm_backward.register_fake
def _(
    doutput, dhn, dcn, input, batch_sizes, hx, cx, weights, num_layers, bias, dropout, mask, seed, p, per_step,
    backend, chunk, output, kept, input_wanted, weights_wanted, cell, zoneout, draws,
):  # fmt: skip
    return [
        input.new_empty(input.shape if input_wanted else 0),
        input.new_empty(hx.shape),
        input.new_empty(cx.shape),
        *(w.new_empty(w.shape if weights_wanted else 0) for w in weights),
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.mark_non_differentiable(*output[3])
    _save(ctx, inputs, output)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    input, batch_sizes, hx, cx, weights, ctx.layers, ctx.bias, ctx.dropout, mask, seed, *options = inputs
    ctx.options, ctx.cell = options[:4], options[5:]
    y, _, _, kept = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, batch_sizes, hx, cx, mask, seed, y, *weights, *kept)
    ctx.count = len(weights)


def differentiable(
    gradients: Sequence[Tensor | None],
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: Tensor,
    cx: Tensor,
    weights: list[Tensor],
    num_layers: int,
    bias: bool,
    dropout: float,
    mask: Tensor | None,
    seed: Tensor | None,
    p: float,
    per_step: bool,
    cell: str,
    zoneout: list[float] | None = None,
    draws: bool = False,
) -> list[Tensor | None]:
    """The gradients of input, hx, cx and weights as a graph of their own: by the plainly written layers.

    Args:
        gradients: those of output, hn and cn.
        input, …: as of `forward`.
    """
    known = cells.of(cell)
    zone = None if zoneout is None else Zoneout(zoneout[0], zoneout[1], seed if draws else None)
    steps = Layout.of(_flat(input).size(0), hx.size(1), batch_sizes).steps
    mask = RecurrentDropout(mask, seed if p > 0 else None, p, per_step).drawn(steps, hx)
    bidirectional = hx.size(0) == 2 * num_layers

    def between(x: Tensor, k: int) -> Tensor:
        if seed is None or dropout == 0:
            return x
        return x * masks.drop(torch.ones_like(x, requires_grad=False), seed, masks.BETWEEN + k, dropout)

    def rerun(input: Tensor, hx: Tensor, cx: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return reference.stack(
            known, input, (hx, cx), list(weights), batch_sizes, num_layers, bias, bidirectional, False, mask, between,
            zone,
        )  # fmt: skip

    return reference.differentiable_vjp(rerun, [input, hx, cx, *weights], gradients)


def _gradients(run: Callable[..., list[Tensor]], ctx: Any, dy: Any, dhn: Any, dcn: Any, *_: Any) -> tuple[Any, ...]:
    """The gradients of `forward`'s arguments; `run` is `backward`, as a function or an operator."""
    input, batch_sizes, hx, cx, mask, seed, y, *rest = ctx.saved_tensors
    weights, kept = rest[: ctx.count], rest[ctx.count :]
    p, per_step, *_ = ctx.options
    dy = torch.zeros_like(y) if dy is None else dy.contiguous()
    dhn = torch.zeros_like(hx) if dhn is None else dhn.contiguous()
    dcn = torch.zeros_like(cx) if dcn is None else dcn.contiguous()
    input_wanted, weights_wanted = ctx.needs_input_grad[0], any([w.requires_grad for w in weights])
    if torch.is_grad_enabled():  # a graph of this backward is wanted
        gradients: Sequence[Tensor | None] = differentiable(
            (dy, dhn, dcn), input, batch_sizes, hx, cx, weights, ctx.layers, ctx.bias, ctx.dropout, mask, seed, p,
            per_step, *ctx.cell,
        )  # fmt: skip
    else:
        gradients = run(
            dy, dhn, dcn, input, batch_sizes, hx, cx, weights, ctx.layers, ctx.bias, ctx.dropout, mask, seed,
            *ctx.options, y, kept, input_wanted, weights_wanted, *ctx.cell,
        )  # fmt: skip
    dinput, dhx, dcx, *dweights = gradients
    return (
        dinput if input_wanted else None,
        None,
        dhx,
        dcx,
        dweights if weights_wanted else [None] * len(weights),
        *[None] * _OPTIONS,
    )


_OPTIONS = 13  # of `forward`, behind the weights
lstm.register_autograd(partial(_gradients, lstm_backward), setup_context=_setup_context)


class _Function(torch.autograd.Function):
    """`lstm` for calls that nothing traces, with a fraction of an operator's overhead.

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


class _Transformed(_Function):
    """The same in the form that `torch.func`'s transforms take, which costs a look at the signature in each call."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        output, hn, cn, kept = forward(*_packed(arguments))
        return output, hn, cn, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _setup_context(ctx, _packed(inputs), (*output[:3], list(output[3:])))


def _packed(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of `_Function` as `forward` takes them."""
    return *arguments[:4], list(arguments[4 + _OPTIONS :]), *arguments[4 : 4 + _OPTIONS]


def run(
    input: Tensor, batch_sizes: Tensor | None, hx: Tensor, cx: Tensor, weights: list[Tensor], *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` with gradients, in the way that suits the call; arguments and results as there, but for the last.

    All that forward takes is given.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return lstm(input, batch_sizes, hx, cx, weights, *options)[:3]
    if torch._C._are_functorch_transforms_active():
        return _Transformed.apply(input, batch_sizes, hx, cx, *options, *weights)[:3]
    if not options[9]:  # nothing is kept for a backward, so there is none
        return forward(input, batch_sizes, hx, cx, weights, *options)[:3]
    return _Function.apply(input, batch_sizes, hx, cx, *options, *weights)
