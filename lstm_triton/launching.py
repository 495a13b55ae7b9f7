"""A layer's call by Triton kernels: its plan and the way to the launchers."""

import importlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lstm_triton import dropout as masks
from lstm_triton import planning
from lstm_triton.gpu import gpus, tiling
from lstm_triton.gpu.model import Work, predict
from lstm_triton.planning import Plan
from lstm_triton.recurrence import (
    Gradients,
    Layer,
    LayerGradients,
    Pass,
    RecurrentDropout,
    Saved,
    Window,
    rnn_precision,
)

STEPS = 1024  # T that plans on a GPU are made for

_NOTHING = nullcontext()


@cache
def _kernels() -> Any:
    """The kernels, imported on first use: Triton may be missing, and `TRITON_INTERPRET` is read at that moment."""
    return importlib.import_module("lstm_triton.kernels")


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU: makes that the one where `x` is."""
    return torch.cuda.device_of(x) if x.is_cuda else _NOTHING


def _work(layer: Layer) -> Work:
    """What a layer is, as plans for a GPU are made for."""
    input, (_, batch, size), hidden = layer.input, layer.hx.shape, layer.cx.size(2)
    precision = rnn_precision(input.device) if input.dtype == torch.float32 else "ieee"
    # One T for all: what varies from call to call must not change the plan.
    sizes = batch, hidden, size, input.size(1), STEPS
    kind = layer.records, layer.cell, layer.zoneout is not None
    return Work(*sizes, input.dtype, len(layer.directions), precision, *kind)


def _chosen(layer: Layer, strategy: str | None) -> Plan:
    """The plan for the sizes of a layer's call; by `strategy`, where it is given."""
    input, (_, batch, size), hidden = layer.input, layer.hx.shape, layer.cx.size(2)
    if input.is_cuda:
        return tiling.choose(gpus.of(input.device), _work(layer), strategy=strategy)
    if _kernels().INTERPRETED:
        return planning.choose_interpreted(layer.cell, batch, hidden, size, input.dtype, strategy)
    lengths = None if layer.layout.is_dense else tuple(layer.layout.lengths)
    sizes = layer.cell, batch, input.size(1), hidden, size, len(layer.directions)
    return planning.choose_on_cpu(*sizes, torch.get_num_threads(), strategy, lengths)


def of(layer: Layer) -> Plan:
    """The plan for a layer's call.

    Where "cooperative" is forced, or the fastest as predicted, and can't run the layer, "step" is taken: for cells that
    look at whole rows, which programs that have some of the units can't without more barriers, and for projections that
    can't be folded.
    """
    if layer.plan is not None:
        return replace(layer.plan, layers=1)
    strategy = planning.forced()
    if strategy == "cooperative" and layer.cell.whole_rows:
        strategy = "step"
    plan = _chosen(layer, strategy)
    if plan.strategy == "cooperative" and not _folds(layer):
        return _chosen(layer, "step")
    draws = layer.dropout.seed is not None or (layer.zoneout is not None and layer.zoneout.seed is not None)
    return _for_masks(plan) if draws else plan


def _for_masks(plan: Plan) -> Plan:
    """A plan under which masks can be drawn, so many units at a time; tiles of one for inference may have fewer."""
    return replace(plan, block_h=max(plan.block_h, masks.PER_CALL))


def _folds(layer: Layer) -> bool:
    """Whether there is no projection, or one that can be folded into weight_hh (kernels/folded.py).

    Not with recurrent dropout, whose mask is between the two weights, nor with sums that lack a product with the input.
    """
    drops = layer.dropout.mask is not None or layer.dropout.seed is not None
    return layer.hx.size(2) == layer.cx.size(2) or not (drops or layer.cell.inputs < layer.cell.sums)


def of_wavefront(layer: Layer, layers: int) -> Plan | None:
    """The plan for all of a call's layers in one launch, from the first of them; None where they run one by one."""
    if len(layer.directions) > 1 or layer.hx.size(2) != layer.cx.size(2):
        return None
    if not layer.cell.is_plain or layer.cell.whole_rows or layer.zoneout is not None:
        return None
    if layer.plan is not None:
        return layer.plan if layer.plan.layers > 1 else None
    if planning.forces_wavefront():
        return replace(of(layer), layers=layers)
    if layer.input.is_cuda and planning.forced() is None:
        return tiling.wavefront(gpus.of(layer.input.device), _work(layer), layers)
    return None


def describe(layer: Layer, plan: Plan) -> str:
    """A plan for a layer's call, or for all layers of a wavefront from the first one's, in words."""
    layout, lengths = layer.layout, layer.layout.lengths[:: plan.block_b]  # a program's steps: its longest row's
    work = sum(lengths) * plan.block_b / layout.total
    units = 1 if plan.strategy == "persistent" else -(-layer.cx.size(2) // plan.block_h)
    words = plan.strategy
    words += ", the products with input and weights in it" if plan.fused else ""
    words += f", {units * plan.layers} programs meet once a step" if plan.strategy == "cooperative" else ""
    words += ", without tensor cores" if plan.matvec else ""
    words += f"; tiles of {plan.block_b} batch rows and {plan.block_h} units"
    words += f"; {len(lengths) * len(layer.directions) * units * plan.layers} programs"
    words += "" if layout.is_dense else f", which end after {lengths[-1]} to {lengths[0]} steps"
    words += f"; {work:.2f} rows run for each that is there"
    if layer.input.is_cuda:
        for backward in (False, True)[: 1 + layer.records]:
            found = predict(gpus.of(layer.input.device), plan, _work(layer), backward)
            name = "backward" if backward else "forward"
            words += f"; {name} predicted to take {found.total:.1f} µs a step, bound by {found.bound}"
    return words


def drop(x: Tensor, seed: Tensor, stream: int, p: float) -> Tensor:
    """`lstm_triton.dropout.drop` by a Triton kernel."""
    with _device_of(x):
        return _kernels().dropout.drop(x, seed, stream, p)


class Drops(NamedTuple):
    """What a call drops."""

    recurrent: RecurrentDropout
    seed: Tensor | None  # of the dropout between layers, where there is any
    p: float


class Kernels:
    """A layer's call by Triton kernels."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.plan = layer, of(layer)
        self.launch = _kernels().Launch.of(self.plan, layer)
        self.strategy = _kernels().STRATEGIES[self.plan.strategy]

    @property
    def window_length(self) -> int:
        """Steps to run at a time where nothing is kept; 0: all."""
        return 0 if self.plan.fused else self.layer.window_length()

    def forward(
        self, window: Window, output: Tensor, hx: Tensor, cx: Tensor, save: bool, room: Saved | None = None
    ) -> Pass:
        """Runs the recurrence over a window.

        Args:
            window: the steps.
            output: (N, D * K), of which the window's rows are written.
            hx: (D, B, K), cx: (D, B, H) in the state's dtype: before the window.
            save: whether gates and c are kept for backward.
            room: for these; None for new tensors.
        """
        gates, cells = (None, None) if room is None else room[:2]
        if not self.plan.fused:
            gates = self.layer.products(window, gates)
        with _device_of(output):
            return self.strategy.forward(self.launch, window, gates, cells, output, hx, cx, save)

    def rebuild(self, window: Window, output: Tensor, hx: Tensor, cx: Tensor) -> Saved:
        """What `forward` keeps of a window, from the outputs; hx, cx as there."""
        rebuild = _kernels().rebuild
        gates = self.layer.products(window)
        with _device_of(output):
            h_prev = rebuild.multiplied(self.launch, window, output, hx)
            for d in range(len(self.layer.directions)):
                self.layer.add_products(d, h_prev[d], gates[d])
            return Saved(gates, rebuild.activate(self.launch, window, gates, cx), h_prev)

    def backward(
        self,
        window: Window,
        output: Tensor,
        doutput: Tensor,
        saved: Saved,
        hx: Tensor,
        cx: Tensor,
        dhn: Tensor,
        dcn: Tensor,
        *wanted: bool,
    ) -> Gradients | LayerGradients:
        """The gradients of `forward`; where the plan is fused, all of the layer's.

        Args:
            window, output, hx, cx: as there.
            doutput: (N, D * K).
            saved: what forward kept of the window, or `rebuild` returned.
            dhn, dcn: (D, B, K), (D, B, H) in the state's dtype: of the states after the window.
            wanted: whether the gradients of the input and those of the weights are.
        """
        with _device_of(output):
            found = self.strategy.backward(
                self.launch, window, output, doutput, saved, hx, cx, dhn, dcn, *wanted
            )  # fmt: skip
            if isinstance(found, LayerGradients):
                return found
            h_prev = saved.h_prev
            if h_prev is None:
                h_prev = _kernels().rebuild.multiplied(self.launch, window, output, hx)
            return found._replace(h_prev=h_prev)


class Wavefront:
    """All layers of a call in one launch, each a step behind the one below it."""

    def __init__(self, plan: Plan, layers: list[Layer], hx: Tensor, cx: Tensor, drops: Drops) -> None:
        first = layers[0]
        if drops.seed is not None or drops.recurrent.seed is not None:
            plan = _for_masks(plan)
        self.hx, self.cx, self.layers = hx, cx, layers
        self.whole = first._replace(hx=hx, cx=cx, dropout=drops.recurrent)
        self.launch = _kernels().Launch.of(plan, self.whole)
        self.window = Window(first.layout, 0, first.layout.steps)
        w_ih, w_hh, b_ih, b_hh, *_ = zip(*(layer.directions[0] for layer in layers), strict=True)
        bias = torch.zeros_like(torch.stack(w_ih[1:])[..., 0])
        if b_ih[0] is not None:
            bias = torch.stack(b_ih[1:]) + torch.stack(b_hh[1:])
        seed = first.input if drops.seed is None else drops.seed
        between = (*masks.threshold_and_scale(drops.p), masks.BETWEEN)
        self.front = _kernels().Front(
            len(layers), torch.stack(w_hh), torch.stack(w_ih[1:]), bias, seed, drops.seed is not None, between
        )

    def forward(self, save: bool) -> tuple[Tensor, Pass]:
        """The outputs of all layers (L, N, H), without `save` of the last (N, H); the pass with gates (L, N, WH)."""
        count, N, H, input = len(self.layers), self.whole.input.size(0), self.cx.size(2), self.hx
        gates = input.new_empty(count if save else 1, N, self.whole.width * H)
        self.whole.products(self.window, gates)
        cells = self.cx.new_empty(count, N, H) if save else None
        output = input.new_empty((count, N, H) if save else (N, H))
        with _device_of(output):
            run = _kernels().cooperative.run
            return output, run(self.launch, self.window, self.front, gates, cells, output, self.hx, self.cx, save)

    def backward(
        self, doutput: Tensor, gates: list[Tensor], cells: list[Tensor], dhn: Tensor, dcn: Tensor
    ) -> Gradients:
        """From what `forward` kept of each layer: the gradients of all layers' sums (L, N, GH) and states."""
        saved = Saved(_joined(gates), _joined(cells))
        with _device_of(doutput):
            run = _kernels().cooperative_backward.run
            return run(self.launch, self.window, self.front, doutput, saved, self.cx, dhn, dcn)

    def multiplied(self, k: int, output: Tensor) -> Tensor:
        """(1, N, H) the h that layer k's steps multiplied, from its outputs (N, H)."""
        layer = self.layers[k]
        with _device_of(output):
            return _kernels().rebuild.multiplied(Kernels(layer).launch, self.window, output, layer.hx)


def _joined(pieces: list[Tensor]) -> Tensor:
    """(L, n, ·) from L tensors (1, n, ·): as they lie, where that is one after the other, else copied."""
    first = pieces[0]
    size = first.numel() * first.element_size()
    whole = first.untyped_storage().nbytes() == size * len(pieces) and first.storage_offset() == 0
    if whole and all(x.data_ptr() == first.data_ptr() + k * size for k, x in enumerate(pieces)):
        return first.as_strided((len(pieces), *first.shape[1:]), first.stride())
    return torch.cat(pieces)
