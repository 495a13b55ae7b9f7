"""A recurrent layer written plainly: one PyTorch operation after another, differentiable to any order.

Backward of a backward runs through it, and tests and benchmarks compare with it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lstm_triton.cells.cell import Cell
from lstm_triton.recurrence import Direction, Layout, Zoneout, present


def layer(
    cell: Cell,
    input: Tensor,
    hx: Tensor,
    cx: Tensor,
    weights: list[Tensor],
    bias: bool,
    batch_sizes: Tensor | None = None,
    mask: Tensor | None = None,
    zoneout: Zoneout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, one or two directions.

    Args:
        cell: what is done in a step.
        input: (N, I) rows of all steps (`lstm_triton.recurrence`).
        hx: (D, B, K), cx: (D, B, H).
        weights: for each direction those of `lstm_triton.recurrence.Direction` that are there.
        batch_sizes: None for a dense batch, else (T,).
        mask: None or (D, T or 1, B, K), what h is multiplied by before its product.
        zoneout: as of `lstm_triton.recurrence.Layer`.

    Returns:
        output (N, D * K), hn (D, B, K), cn (D, B, H).
    """
    layout, hidden = Layout.of(input.size(0), hx.size(1), batch_sizes), cx.size(2)
    outputs, hn, cn = [], [], []
    for d, own in enumerate(by_direction(cell, weights, bias, hx.size(2) != hidden)):
        h, c = hx[d], cx[d]
        parameters = own.vectors(cell, hidden).unbind(0)
        zones = None if zoneout is None else zoneout.of_steps(d, 0, layout.steps, h)
        y: list[Tensor] = [h] * layout.steps
        for t in layout.order(reverse=d == 1):
            rows = layout.rows[t]
            x = input[layout.starts[t] : layout.starts[t] + rows]
            h_t = h[:rows] if mask is None else h[:rows] * mask[d, t if mask.size(1) > 1 else 0, :rows]
            saved, c_t, q = cell.forward_torch(_sums(cell, own, x, h_t, hidden), c[:rows], parameters)
            if zones is not None:
                of_h, of_c = (z[t if z.size(0) > 1 else 0, :rows] for z in zones)
                q, c_t = q + of_h * (h[:rows] - q), c_t + of_c * (c[:rows] - c_t)
            y[t] = q if own.w_hr is None else q @ own.w_hr.t()
            h, c = torch.cat([y[t], h[rows:]]), torch.cat([c_t, c[rows:]])
        outputs.append(torch.cat(y))
        hn.append(h)
        cn.append(c)
    return torch.cat(outputs, 1), torch.stack(hn), torch.stack(cn)


def _sums(cell: Cell, own: Direction, x: Tensor, h: Tensor, hidden: int) -> tuple[Tensor, ...]:
    """A step's sums, each (rows, H)."""
    of_x, of_h = x @ own.w_ih.t(), h @ own.w_hh.t()
    if cell.input_norm is not None:
        of_x = torch.nn.functional.layer_norm(of_x, [of_x.size(1)], own.gain(cell), None, cell.input_norm)
    if own.b_ih is not None:
        of_x = of_x + own.b_ih
    sums: list[Any] = [0.0] * cell.sums
    sums[: cell.inputs] = of_x.split(hidden, 1)
    for k, a in zip(cell.recurrent, of_h.split(hidden, 1), strict=True):
        sums[k] = sums[k] + a
    if own.b_hh is not None:
        for k, b in zip(cell.biases, own.b_hh.split(hidden), strict=True):
            sums[k] = sums[k] + b
    return tuple(sums)


def by_direction(cell: Cell, weights: list[Tensor], bias: bool, projected: bool) -> list[Direction]:
    """The flat list of a layer's weights for each direction."""
    extra = len(present(cell, bias))
    each = 2 + 2 * bias + projected + extra
    return [
        Direction(
            weights[k],
            weights[k + 1],
            weights[k + 2] if bias else None,
            weights[k + 3] if bias else None,
            weights[k + 2 + 2 * bias] if projected else None,
            tuple(weights[k + each - extra : k + each]),
        )
        for k in range(0, len(weights), each)
    ]


def stack(
    cell: Cell,
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: list[Tensor],
    batch_sizes: Tensor | None = None,
    num_layers: int = 1,
    bias: bool = True,
    bidirectional: bool = False,
    batch_first: bool = False,
    mask: Tensor | None = None,
    between: Callable[[Tensor, int], Tensor] | None = None,
    zoneout: Zoneout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of layers; arguments and results as of `lstm_triton.functional.recurrent`.

    between: what is done with a layer's output (N, D * K), given its number, before the next layer.
    """
    directions = 2 if bidirectional else 1
    if batch_first and batch_sizes is None:
        input = input.transpose(0, 1)
    x = input if batch_sizes is not None else input.flatten(0, 1)
    each = len(weights) // num_layers
    hn, cn = [], []
    for k in range(num_layers):
        rows = slice(k * directions, (k + 1) * directions)
        layer_mask = None if mask is None else mask[rows]
        layer_weights = weights[k * each : (k + 1) * each]
        zone = None if zoneout is None else zoneout._replace(stream=rows.start)
        x, h, c = layer(cell, x, hx[0][rows], hx[1][rows], layer_weights, bias, batch_sizes, layer_mask, zone)
        if between is not None and k < num_layers - 1:
            x = between(x, k)
        hn.append(h)
        cn.append(c)
    if batch_sizes is None:
        x = x.view(*input.shape[:2], -1)
        if batch_first:
            x = x.transpose(0, 1)
    return x, torch.cat(hn), torch.cat(cn)


def differentiable_vjp(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of `function` at `inputs`, as part of the graph that these and `gradients` belong to."""
    # Views stand in for the inputs: the gradients stop there, the inputs' own history is kept.
    with torch.enable_grad():
        views = [x.view_as(x) if x.requires_grad else x for x in inputs]
        outputs = function(*views)
        wanted = [x for x in views if x.requires_grad]
        pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if g is not None and y.requires_grad]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
            )
        )
    return [next(found) if x.requires_grad else None for x in views]
