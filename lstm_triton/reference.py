"""The LSTM layer written plainly: one PyTorch operation after another, differentiable to any order.

Backward of a backward runs through it, and tests and benchmarks compare with it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lstm_triton.recurrence import Direction, Layout


def layer(
    input: Tensor,
    hx: Tensor,
    cx: Tensor,
    weights: list[Tensor],
    bias: bool,
    batch_sizes: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, one or two directions.

    Args:
        input: (N, I) rows of all steps (`lstm_triton.recurrence`).
        hx: (D, B, K), cx: (D, B, H).
        weights: for each direction w_ih (4H, I), w_hh (4H, K), with `bias` b_ih and b_hh (4H,),
            with projections w_hr (K, H).
        batch_sizes: None for a dense batch, else (T,).
        mask: None or (D, T or 1, B, K), what h is multiplied by before its product.

    Returns:
        output (N, D * K), hn (D, B, K), cn (D, B, H).
    """
    layout = Layout.of(input.size(0), hx.size(1), batch_sizes)
    outputs, hn, cn = [], [], []
    for d, (w_ih, w_hh, b_ih, b_hh, w_hr) in enumerate(by_direction(weights, bias, hx.size(2) != cx.size(2))):
        h, c = hx[d], cx[d]
        y: list[Tensor] = [h] * layout.steps
        for t in layout.order(reverse=d == 1):
            rows = layout.rows[t]
            x = input[layout.starts[t] : layout.starts[t] + rows]
            h_t = h[:rows] if mask is None else h[:rows] * mask[d, t if mask.size(1) > 1 else 0, :rows]
            a = x @ w_ih.t() + h_t @ w_hh.t()
            if b_ih is not None and b_hh is not None:
                a = a + b_ih + b_hh
            i, f, g, o = a.chunk(4, 1)
            c_t = f.sigmoid() * c[:rows] + i.sigmoid() * g.tanh()
            y[t] = o.sigmoid() * c_t.tanh()
            if w_hr is not None:
                y[t] = y[t] @ w_hr.t()
            h, c = torch.cat([y[t], h[rows:]]), torch.cat([c_t, c[rows:]])
        outputs.append(torch.cat(y))
        hn.append(h)
        cn.append(c)
    return torch.cat(outputs, 1), torch.stack(hn), torch.stack(cn)


def by_direction(weights: list[Tensor], bias: bool, projected: bool) -> list[Direction]:
    """The flat list of a layer's weights as (w_ih, w_hh, b_ih, b_hh, w_hr) for each direction."""
    each = 2 + 2 * bias + projected
    return [
        (
            weights[k],
            weights[k + 1],
            weights[k + 2] if bias else None,
            weights[k + 3] if bias else None,
            weights[k + each - 1] if projected else None,
        )
        for k in range(0, len(weights), each)
    ]


def lstm(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of layers; arguments and results as of `lstm_triton.functional.lstm`.

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
        x, h, c = layer(x, hx[0][rows], hx[1][rows], layer_weights, bias, batch_sizes, layer_mask)
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
