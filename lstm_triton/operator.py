"""PyTorch's operators (cuDNN, MIOpen, oneDNN): of a stack of layers, and of one whose steps run again in backward.

The latter is for `recompute` alone: the operators tell no gates, so that they can't be rebuilt from the outputs.
"""

from typing import Any

import torch
from torch import _VF, Tensor

from lstm_triton.cells.cell import Cell
from lstm_triton.recurrence import Layer, LayerGradients, Pass, Saved, Window


def call(
    cell: Cell, input: Tensor, batch_sizes: Tensor | None, h: Tensor, c: Tensor, *arguments: Any, batch_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of layers: output, h and c, which is h of a cell that doesn't carry it.

    Args:
        cell: one that has an operator.
        input: (T, B, I), with `batch_first` (B, T, I), or (N, I) where there are `batch_sizes`.
        h, c: (L * D, B, K), (L * D, B, H).
        arguments: weights, bias, num_layers, dropout, training, bidirectional.
    """
    operator = getattr(_VF, cell.operator)  # type: ignore[arg-type]
    hx = (h, c) if cell.carries else h
    if batch_sizes is None:
        found = operator(input, hx, *arguments, batch_first)
    else:
        found = operator(input, batch_sizes, hx, *arguments)
    return found if cell.carries else (*found, found[1])


class Operator:
    """A layer's call by PyTorch's operator."""

    window_length = 0

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def forward(self, window: Window, output: Tensor, hx: Tensor, cx: Tensor, save: bool, room: None = None) -> Pass:
        """Runs the recurrence over a window; as `lstm_triton.launching.Kernels.forward`, but that nothing is kept."""
        hn, cn = hx.clone(), cx.clone()
        for d in range(len(self.layer.directions)):
            x, order, rows = self._input(window, d)
            y, h, c = self._run(window, d, x, hx[d : d + 1, :rows], cx[d : d + 1, :rows].to(x.dtype))
            output[window.rows(d), self.layer.columns(d)] = y if order is None else y[order]
            hn[d, :rows], cn[d, :rows] = h[0], c[0]
        nothing = output.new_empty(0)
        return Pass(hn, cn, nothing, nothing)

    def rebuild(self, window: Window, output: Tensor, hx: Tensor, cx: Tensor) -> Saved:
        """Nothing: `backward` runs the window again."""
        nothing = output.new_empty(0)
        return Saved(nothing, nothing)

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
        input_wanted: bool,
        weights_wanted: bool,
    ) -> LayerGradients:
        """The gradients of `forward`; as `lstm_triton.launching.Kernels.backward`."""
        layer, dtype = self.layer, output.dtype
        dhx, dcx = dhn.clone(), dcn.clone()
        directions = len(layer.directions)
        dinput: list[Tensor] = []
        dweights: list[Tensor] = []
        for d in range(directions):
            x, order, rows = self._input(window, d)
            dy = doutput[window.rows(d), self.layer.columns(d)]
            with torch.enable_grad():
                weights = [w.detach().requires_grad_(weights_wanted) for w in self._weights(d)]
                h, c = (s[d : d + 1, :rows].to(dtype).detach().requires_grad_() for s in (hx, cx))
                x = x.detach().requires_grad_(input_wanted)
                outputs = self._run(window, d, x, h, c, weights)
                wanted = [t for t in (x, h, c, *weights) if t.requires_grad]
                given = [dy if order is None else dy[order]]
                given += [g[d : d + 1, :rows].to(dtype) for g in (dhn, dcn)]
                if not layer.cell.carries:  # c is h, and has no gradient of its own
                    wanted = [t for t in wanted if t is not c]
                    outputs, given = outputs[:2], given[:2]  # type: ignore[assignment]
                found = list(torch.autograd.grad(outputs, wanted, given))
            if input_wanted:
                dx = found.pop(0)
                dinput.append(dx if order is None else dx[order])
            dhx[d, :rows] = found.pop(0)[0]
            dcx[d, :rows] = found.pop(0)[0] if layer.cell.carries else 0.0
            dweights += found
        return LayerGradients(dhx, dcx, dinput, dweights)

    def _weights(self, d: int) -> list[Tensor]:
        return [w for w in self.layer.directions[d][:5] if w is not None]

    def _input(self, window: Window, d: int) -> tuple[Tensor, Tensor | None, int]:
        """Direction d's rows in the order of its pass, what restores their order, and how many batch rows they have.

        A reverse pass is a forward one over rows that are reversed, each in its own length.
        """
        x, part = self.layer.input[window.rows(d)], window.part(d)
        if d == 0:
            return x, None, part.batch
        order = part.reversal(x.device)
        return x[order], order, part.batch

    def _run(
        self, window: Window, d: int, x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights, part = weights or self._weights(d), window.part(d)
        bias, training = self.layer.directions[d][2] is not None, torch.is_grad_enabled()
        common = (h.contiguous(), c.contiguous(), weights, bias, 1, 0.0, training, False)
        cell = self.layer.cell
        if part.is_dense:
            y, h, c = call(cell, x.view(part.steps, part.batch, -1), None, *common, batch_first=False)
            return y.flatten(0, 1), h, c
        return call(cell, x, torch.tensor(part.rows), *common, batch_first=False)
