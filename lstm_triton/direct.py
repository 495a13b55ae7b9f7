"""Calls that are prepared once for their kind: else, what comes before and after the kernels of a small layer on a CPU
takes longer than they do.

A kind is all that a call's course depends on: options, shapes, dtypes, threads. Prepared are calls that run in fused
kernels, on dense batches and in one direction (the usual ones), and those that "auto" leaves to PyTorch's operator. All
others go through `lstm_triton.functional` and `lstm_triton.ops` anew each time.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lstm_triton import cells, dispatch, launching, ops, planning
from lstm_triton import dropout as masks
from lstm_triton.recurrence import LayerGradients, Saved, Window

if TYPE_CHECKING:
    from lstm_triton.functional import Options

Run = Callable[[Tensor, tuple[Tensor, Tensor], list[Tensor]], tuple[Tensor, Tensor, Tensor]]

KINDS = 256  # that are kept; then all are forgotten

_prepared: dict[tuple[Any, ...], Run | None] = {}


def of(
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: tuple[Tensor, Tensor],
    weights: list[Tensor],
    options: "Options",
    mask: Tensor | None,
) -> Run | None:
    """What runs a call, from its input, hx and weights; None where it isn't prepared.

    Args:
        input, batch_sizes, hx, weights, options, mask: as `lstm_triton.functional.run` takes them.
    """
    if torch.compiler.is_compiling() or batch_sizes is not None or mask is not None or type(input) is not Tensor:
        return None
    if not input.is_cpu or options.recompute or torch._C._is_any_autocast_enabled():
        return None
    if is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active():
        return None
    (h, c), dtype, records = hx, input.dtype, input.requires_grad
    for x in (h, c, *weights):
        if x.dtype is not dtype or not (x.is_cpu and x.is_contiguous()):
            return None
        if x.requires_grad:
            records = True
    records = records and torch.is_grad_enabled()
    kind = (options, dtype, input.shape, h.shape, c.shape, records, torch.get_num_threads(), planning.asked())
    if kind not in _prepared:
        if len(_prepared) >= KINDS:
            _prepared.clear()
        _prepared[kind] = _prepare(input, hx, weights, options, records)
    return _prepared[kind]


def forget() -> None:
    """Everything is prepared anew: for who changes what plans and choices depend on, as tests do."""
    _prepared.clear()


def _prepare(
    input: Tensor, hx: tuple[Tensor, Tensor], weights: list[Tensor], options: "Options", records: bool
) -> Run | None:
    drops = options.training and options.recurrent_dropout > 0
    if input.numel() == 0 or not dispatch.has_native():
        return None
    backend = options.backend
    if backend == "auto":
        call = dispatch.Call(input, None, hx, weights, options, drops, records)
        backend = dispatch.auto(call, _never)
        if backend == "torch":
            return lambda input, hx, weights: dispatch.torch_operator(input, None, hx, weights, options)
    elif backend == "triton":
        dispatch.check_triton(input.device)
    if backend != "triton" or options.bidirectional or options.zones or cells.of(options.cell).parameters:
        return None
    if hx[0].shape != hx[1].shape or input.dtype not in (torch.float32, torch.float64):  # in which states are kept, too
        return None
    p = options.recurrent_dropout if options.training else 0.0
    nothing = input.new_empty(0)
    steps, batch = input.shape[:2][:: -1 if options.batch_first else 1]
    stack = ops.Stack(
        input.detach().reshape(steps, batch, -1), None, *hx, weights, options.num_layers, options.bias, 0.0, None,
        nothing, p, options.recurrent_dropout_mode == "step", backend, options.cell, None, False, records,
    )  # fmt: skip
    if stack.wavefront() is not None:
        return None
    # Of a deeper layer's input sizes are all that is looked at here.
    inputs = [stack.input, *[stack.input[:1, :1].expand(steps * batch, hx[0].size(2))] * (options.num_layers - 1)]
    layers = [launching.Kernels(stack.layer(k, x)) for k, x in enumerate(inputs)]
    if not all(layer.plan.fused for layer in layers):
        return None
    each = len(weights) // options.num_layers
    return Direct([layer.on(nothing, [nothing] * each, nothing) for layer in layers], options, records, input.dtype)


def _never(*_: Any) -> Any:
    raise AssertionError("calls on a CPU are not timed")


class Direct:
    """A prepared call of layers that run in fused kernels."""

    def __init__(self, layers: list[launching.Kernels], options: "Options", records: bool, dtype: torch.dtype) -> None:
        first = layers[0].launch
        self.layers, self.options, self.records = layers, options, records
        self.window = Window(first.layout, 0, first.layout.steps)
        self.each = 4 if options.bias else 2
        self.dropout = options.dropout if options.training and len(layers) > 1 else 0.0
        self.p = options.recurrent_dropout if options.training else 0.0
        self.draws = self.p > 0 or self.dropout > 0
        with torch.inference_mode(False):
            self.zeros = torch.zeros(
                len(layers), first.B, first.H, dtype=dtype
            )  # in place of gradients that aren't there

    def __call__(
        self, input: Tensor, hx: tuple[Tensor, Tensor], weights: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        turned = self.options.batch_first
        x = (input.transpose(0, 1) if turned else input).contiguous()
        seed = torch.randint(2**63 - 1, (1,)) if self.draws else None
        if self.records:
            y, hn, cn = _apply(self, seed, x, *hx, *weights)
        else:
            y, hn, cn, _ = self.forward(seed, x, *hx, weights)
        return y.transpose(0, 1) if turned else y, hn, cn

    def forward(
        self, seed: Tensor | None, input: Tensor, hx: Tensor, cx: Tensor, weights: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Output, hn, cn and what backward needs: outputs of all layers but the last, then gates and c of each."""
        states, outputs, gates, carried, count = [], [], [], [], len(self.layers)
        x, width = input, hx.size(2)
        leading = input.shape[:2]
        for k, prepared in enumerate(self.layers):
            engine = prepared.on(x, weights[k * self.each : (k + 1) * self.each], seed)
            y = input.new_empty((*leading, width))
            h, c = (hx, cx) if count == 1 else (hx[k : k + 1], cx[k : k + 1])
            found = engine.forward(self.window, y, h, c, self.records)
            states.append(found[:2])
            gates.append(found.gates)
            carried.append(found.c)
            outputs.append(y)
            x = self.drop(y, seed, k)
        kept = [*outputs[:-1], *gates, *carried] if self.records else []
        hn, cn = states[0] if count == 1 else map(torch.cat, zip(*states, strict=True))
        return y, hn, cn, kept

    def backward(
        self,
        seed: Tensor | None,
        input: Tensor,
        hx: Tensor,
        cx: Tensor,
        output: Tensor,
        weights: Sequence[Tensor],
        kept: Sequence[Tensor],
        gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
        input_wanted: bool,
        weights_wanted: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor, list[Any]]:
        """The gradients of input, hx, cx and weights, from those of `forward`'s results."""
        count, single = len(self.layers), len(self.layers) == 1
        outputs, gates, carried = [*kept[: count - 1], output], kept[count - 1 : -count], kept[-count:]
        dy = torch.zeros_like(output) if gradients[0] is None else gradients[0].contiguous()
        dhn, dcn = (self.zeros if g is None else g.contiguous() for g in gradients[1:])
        states: list[tuple[Tensor, Tensor]] = []
        dweights: list[Any] = []
        for k in range(count - 1, -1, -1):
            x = self.drop(outputs[k - 1], seed, k - 1) if k else input
            engine = self.layers[k].on(x, weights[k * self.each : (k + 1) * self.each], seed)
            parts = (hx, cx, dhn, dcn) if single else (s[k : k + 1] for s in (hx, cx, dhn, dcn))
            saved = Saved(gates[k], carried[k])
            found = engine.backward(
                self.window, outputs[k], dy, saved, *parts, input_wanted or k > 0, weights_wanted
            )  # fmt: skip
            assert isinstance(found, LayerGradients)
            states.insert(0, found[:2])
            dweights = found.dweights + dweights
            if k:
                dy = self.drop(found.dinput[0], seed, k - 1)
        dh, dc = states[0] if single else map(torch.cat, zip(*states, strict=True))
        dinput = found.dinput[0].view(input.shape) if input_wanted else None  # type: ignore[union-attr]
        return dinput, dh, dc, dweights if weights_wanted else [None] * len(weights)

    def drop(self, x: Tensor, seed: Tensor | None, k: int) -> Tensor:
        """Dropout of layer k's output or, the same, of its gradient."""
        if seed is None or self.dropout == 0 or k == len(self.layers) - 1:
            return x
        return launching.drop(x.flatten(0, -2), seed, masks.BETWEEN + k, self.dropout)


class _Function(torch.autograd.Function):
    """`Direct` with gradients to any order."""

    @staticmethod
    def forward(ctx: Any, call: Direct, seed: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        input, hx, cx, *weights = tensors
        y, hn, cn, kept = call.forward(seed, input, hx, cx, weights)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(seed, y, *tensors, *kept)
        return y, hn, cn

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        call, (seed, y, input, hx, cx, *rest) = ctx.call, ctx.saved_tensors
        count = call.each * len(call.layers)
        weights, kept = rest[:count], rest[count:]
        if torch.is_grad_enabled():  # a graph of this backward is wanted
            o = call.options
            found = ops.differentiable(
                gradients, input, None, hx, cx, weights, o.num_layers, o.bias, call.dropout, None, seed, call.p,
                o.recurrent_dropout_mode == "step", o.cell,
            )  # fmt: skip
            return None, None, *found
        wanted = ctx.needs_input_grad[2], any(ctx.needs_input_grad[5:])
        dinput, dhx, dcx, dweights = call.backward(seed, input, hx, cx, y, weights, kept, gradients, *wanted)
        return None, None, dinput, dhx, dcx, *dweights


# Without what `torch.autograd.Function.apply` does for torch.func's transforms, whose calls aren't prepared.
_apply = super(torch.autograd.Function, _Function).apply
