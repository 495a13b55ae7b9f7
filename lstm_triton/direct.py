"""Calls that are prepared once for their kind: else, what comes before and after the kernels of a small layer on a CPU
takes longer than they do.

A kind is all that a call's course depends on: options, shapes, dtypes, threads. Prepared are calls that run in fused
kernels, on dense batches and in one direction (the usual ones), and those that "auto" leaves to PyTorch's operator,
when one comes for the second time, as to prepare takes longer than a small layer's call. All others go through
`lstm_triton.functional` and `lstm_triton.ops` anew.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lstm_triton import cells, dispatch, launching, ops, planning
from lstm_triton import dropout as masks
from lstm_triton.cpu.native import Replay
from lstm_triton.recurrence import Window

if TYPE_CHECKING:
    from lstm_triton.functional import Options

Run = Callable[[Tensor, tuple[Tensor, Tensor], list[Tensor]], tuple[Tensor, Tensor, Tensor]]

KINDS = 256  # that are kept; then all are forgotten

_prepared: dict[tuple[Any, ...], Run | None] = {}
_seen: set[tuple[Any, ...]] = set()  # called once


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
    if kind in _prepared:
        return _prepared[kind]
    if kind not in _seen:
        _make_room(_seen)
        _seen.add(kind)
        return None
    _make_room(_prepared)
    found = _prepared[kind] = _prepare(input, hx, weights, options, records)
    return found


def _make_room(kinds: dict[Any, Any] | set[Any]) -> None:
    if len(kinds) >= KINDS:
        kinds.clear()


def forget() -> None:
    """Everything is prepared anew: for who changes what plans and choices depend on, as tests do."""
    _prepared.clear()
    _seen.clear()


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
    direct = Direct(input, hx, weights, options, records)
    return direct if direct.prepare() else None


def _never(*_: Any) -> Any:
    raise AssertionError("calls on a CPU are not timed")


class Direct:
    """A prepared call of layers that run in fused kernels; arguments as of `of`, of which only sizes are looked at."""

    def __init__(
        self, input: Tensor, hx: tuple[Tensor, Tensor], weights: list[Tensor], options: "Options", records: bool
    ) -> None:
        self.options, self.records, self.dtype, self.count = options, records, input.dtype, options.num_layers
        steps, batch = input.shape[:2][:: -1 if options.batch_first else 1]
        self.steps, self.batch, self.features, self.hidden = steps, batch, input.size(2), hx[0].size(2)
        self.shapes = [w.shape for w in weights]
        self.each = len(weights) // self.count
        self.dropout = options.dropout if options.training and self.count > 1 else 0.0
        self.p = options.recurrent_dropout if options.training else 0.0
        self.draws = self.p > 0 or self.dropout > 0
        self.plans: list[planning.Plan] = []  # of each layer, as the next two
        self.forwards: list[Replay] = []
        self.backwards: dict[tuple[bool, bool], list[Replay]] = {}  # by which gradients are wanted
        with torch.inference_mode(False):  # in place of gradients that aren't there
            self.zeros = torch.zeros(self.count, batch, self.hidden, dtype=input.dtype)

    def prepare(self) -> bool:
        """Prepares forward; False where the layers don't all run in fused kernels, a launch each."""
        engines = self._engines()
        self.plans = [engine.plan for engine in engines]
        if not all(plan.fused for plan in self.plans):
            return False
        try:
            for engine in engines:
                layer, y = engine.layer, self._empty(self.steps, self.batch, self.hidden)
                run = partial(engine.forward, self._window(engine), y, layer.hx, layer.cx, self.records)
                self.forwards.append(Replay(run, (*self._tensors(engine), y)))
        except ValueError:  # launched in another way
            return False
        return bool(engines)

    def _prepared_backward(self, wanted: tuple[bool, bool]) -> list[Replay]:
        """That of each layer; `wanted`: the gradients of the input, and of the weights."""
        found = []
        for k, engine in enumerate(self._engines()):
            layer, shape = engine.layer, (self.steps, self.batch, self.hidden)
            y, dy, dhn, dcn = self._empty(*shape), self._empty(*shape), *map(torch.empty_like, (layer.hx, layer.cx))
            saved = layer.room()
            run = partial(
                engine.backward, self._window(engine), y, dy, saved, layer.hx, layer.cx, dhn, dcn,
                wanted[0] or k > 0, wanted[1],
            )  # fmt: skip
            found.append(Replay(run, (*self._tensors(engine), y, dy, dhn, dcn, saved.gates, saved.c)))
        return found

    def _engines(self) -> list[launching.Kernels]:
        """A layer's each, on empty tensors; none where the layers run together."""
        o = self.options
        states = [self._empty(self.count, self.batch, self.hidden) for _ in range(2)]
        seed = torch.zeros(1, dtype=torch.int64)
        stack = ops.Stack(
            self._empty(self.steps, self.batch, self.features), None, states[0], states[1],
            [self._empty(*shape) for shape in self.shapes], self.count, o.bias, 0.0, None, seed, self.p,
            o.recurrent_dropout_mode == "step", "triton", o.cell, None, False, self.records,
        )  # fmt: skip
        if stack.wavefront() is not None:
            return []
        rows = self.steps * self.batch
        inputs = [stack.input, *(self._empty(rows, self.hidden) for _ in range(self.count - 1))]
        layers = [stack.layer(k, x) for k, x in enumerate(inputs)]
        if self.plans:  # backward's is forward's, whatever threads there are by then
            layers = [layer._replace(plan=plan) for layer, plan in zip(layers, self.plans, strict=True)]
        return [launching.Kernels(layer) for layer in layers]

    def _tensors(self, engine: launching.Kernels) -> tuple[Tensor, ...]:
        """A layer's input, states, seed and weights, as `forward` and `backward` give them to a `Replay`."""
        layer = engine.layer
        seed = torch.zeros(1, dtype=torch.int64) if layer.dropout.seed is None else layer.dropout.seed
        return layer.input, layer.hx, layer.cx, seed, *(w for w in layer.directions[0][:4] if w is not None)

    def _window(self, engine: launching.Kernels) -> Window:
        return Window(engine.layer.layout, 0, self.steps)

    def _empty(self, *shape: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=self.dtype)

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
        """Output, hn, cn and what backward needs: of each layer what it keeps, then outputs of all but the last."""
        states, outputs, kept, x = [], [], [], input
        for k, replay in enumerate(self.forwards):
            own = weights[k * self.each : (k + 1) * self.each]
            h, c = (hx, cx) if self.count == 1 else (hx[k : k + 1], cx[k : k + 1])
            y = torch.empty((self.steps, self.batch, self.hidden), dtype=self.dtype)
            *saved, hn, cn = replay(x, h, c, x if seed is None else seed, *own, y)
            kept += saved
            states.append((hn, cn))
            outputs.append(y)
            x = self.drop(y, seed, k)
        if self.count > 1:
            hn, cn = map(torch.cat, zip(*states, strict=True))
        return y, hn, cn, [*kept, *outputs[:-1]]

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
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor, Tensor, list[Any]]:
        """The gradients of input, hx, cx and weights, from those of `forward`'s results."""
        replays = self.backwards.get(wanted)
        if replays is None:
            replays = self.backwards[wanted] = self._prepared_backward(wanted)
        outputs = [*kept[2 * self.count :], output]
        dy = torch.zeros_like(output) if gradients[0] is None else gradients[0].contiguous()
        dhn, dcn = [self.zeros if g is None else g.contiguous() for g in gradients[1:]]
        states: list[tuple[Tensor, Tensor]] = []
        dweights: list[Any] = []
        dinput: list[Tensor] = []
        for k in range(self.count - 1, -1, -1):
            x = self.drop(outputs[k - 1], seed, k - 1) if k else input
            own = weights[k * self.each : (k + 1) * self.each]
            parts = (hx, cx, dhn, dcn)
            if self.count > 1:
                parts = tuple(s[k : k + 1] for s in parts)  # type: ignore[assignment]
            h, c, dh, dc = parts
            made = replays[k](
                x, h, c, x if seed is None else seed, *own, outputs[k], dy, dh, dc, *kept[2 * k : 2 * k + 2]
            )
            states.append((made[0], made[1]))
            if wanted[0] or k:
                dinput = made[2:3]
            if wanted[1]:
                found = made[-4:][: self.each]
                if found[0].dim() > own[0].dim():  # each tile of the batch has its own
                    found = [w.sum(0) for w in found]
                dweights = found + dweights
            if k:
                dy = self.drop(dinput[0], seed, k - 1)
        dh, dc = states[0]
        if self.count > 1:
            dh, dc = map(torch.cat, zip(*states[::-1], strict=True))
        return (
            dinput[0].view(input.shape) if wanted[0] else None,
            dh,
            dc,
            dweights if wanted[1] else [None] * len(weights),
        )

    def drop(self, x: Tensor, seed: Tensor | None, k: int) -> Tensor:
        """Dropout of layer k's output or, the same, of its gradient."""
        if seed is None or self.dropout == 0 or k == self.count - 1:
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
        count = len(call.shapes)
        weights, kept = rest[:count], rest[count:]
        if torch.is_grad_enabled():  # a graph of this backward is wanted
            o = call.options
            found = ops.differentiable(
                gradients, input, None, hx, cx, weights, o.num_layers, o.bias, call.dropout, None, seed, call.p,
                o.recurrent_dropout_mode == "step", o.cell,
            )  # fmt: skip
            return None, None, *found
        wanted = ctx.needs_input_grad[2], any(ctx.needs_input_grad[5:])
        dinput, dhx, dcx, dweights = call.backward(seed, input, hx, cx, y, weights, kept, gradients, wanted)
        return None, None, dinput, dhx, dcx, *dweights


# Without what `torch.autograd.Function.apply` does for torch.func's transforms, whose calls aren't prepared.
_apply = super(torch.autograd.Function, _Function).apply
