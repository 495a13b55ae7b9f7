"""The LSTM and its variants.

Kinds of gates, in the order of the rows of weight_ih and weight_hh:
"full": i, f, g, o, as `torch.nn.LSTM` (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000).
"coupled": f, g, o with i = 1 - f (CIFG: Greff et al., "LSTM: a search space odyssey", 2015).
"carousel": i, g, o with f = 1, the cell of 1997: what c holds stays (constant error carousel).

Each may have peepholes (Gers & Schmidhuber, "Recurrent nets that time and count", 2000): the input and forget gates
see c_{t-1}, the output gate c_t, elementwise. Or layer norm (Ba, Kiros & Hinton 2016, equations 20 to 22):

    sums = LN(W_hh h) + LN(W_ih x) + b        h = o ⊙ tanh(LN(c))

each norm over all units (of all gates) with a learned gain; the products' biases are bias_ih and bias_hh.
"""

from functools import partial

import torch
from torch import Tensor

from lstm_triton.cells import lstm_loops
from lstm_triton.cells.cell import Cell, Parameter, of, register
from lstm_triton.cells.jit import normalized, tanh, through_norm, tl, triton

Tensors = tuple[Tensor, ...]

GATES = {"full": ("i", "f", "g", "o"), "coupled": ("f", "g", "o"), "carousel": ("i", "g", "o")}
EPSILON = 1e-5
_EPSILON = tl.constexpr(EPSILON)


@triton.jit
def state(sums, c, peepholes, KIND: tl.constexpr):
    """All gates but o, activated, and the new c."""
    if KIND == "full":
        a_i, a_f, a_g, _ = sums
        if len(peepholes) > 0:
            a_i += peepholes[0] * c
            a_f += peepholes[1] * c
        i = tl.sigmoid(a_i)
        f = tl.sigmoid(a_f)
        g = tanh(a_g)
        gates = (i, f, g)
        c = f * c + i * g
    elif KIND == "coupled":
        a_f, a_g, _ = sums
        if len(peepholes) > 0:
            a_f += peepholes[0] * c
        f = tl.sigmoid(a_f)
        g = tanh(a_g)
        gates = (f, g)
        c = g + f * (c - g)
    else:
        a_i, a_g, _ = sums
        if len(peepholes) > 0:
            a_i += peepholes[0] * c
        i = tl.sigmoid(a_i)
        g = tanh(a_g)
        gates = (i, g)
        c += i * g
    return gates, c


@triton.jit
def state_backward(gates, c_prev, dc, peepholes, KIND: tl.constexpr):
    """From the gradient of c: those of all sums but o's, of c_prev, and of the peepholes but o's."""
    dpeepholes = ()
    if KIND == "full":
        i, f, g, _ = gates
        da_i = dc * g * i * (1 - i)
        da_f = dc * c_prev * f * (1 - f)
        sums = (da_i, da_f, dc * i * (1 - g * g))
        dc_prev = dc * f
        if len(peepholes) > 0:
            dc_prev += da_i * peepholes[0] + da_f * peepholes[1]
            dpeepholes = (da_i * c_prev, da_f * c_prev)
    elif KIND == "coupled":
        f, g, _ = gates
        da_f = dc * (c_prev - g) * f * (1 - f)
        sums = (da_f, dc * (1 - f) * (1 - g * g))
        dc_prev = dc * f
        if len(peepholes) > 0:
            dc_prev += da_f * peepholes[0]
            dpeepholes = (da_f * c_prev,)
    else:
        i, g, _ = gates
        da_i = dc * g * i * (1 - i)
        sums = (da_i, dc * i * (1 - g * g))
        dc_prev = dc
        if len(peepholes) > 0:
            dc_prev += da_i * peepholes[0]
            dpeepholes = (da_i * c_prev,)
    return sums, dc_prev, dpeepholes


@triton.jit
def forward(sums, c, peepholes, KIND: tl.constexpr):
    gates, c = state(sums, c, peepholes, KIND)
    a_o = sums[len(gates)]
    if len(peepholes) > 0:
        a_o += peepholes[len(peepholes) - 1] * c
    o = tl.sigmoid(a_o)
    return gates + (o,), c, o * tanh(c)


@triton.jit
def backward(gates, c, c_prev, dq, dc, peepholes, KIND: tl.constexpr):
    o = gates[len(gates) - 1]
    tanh_c = tanh(c)
    da_o = dq * tanh_c * o * (1 - o)
    dc += dq * o * (1 - tanh_c * tanh_c)
    if len(peepholes) > 0:
        dc += da_o * peepholes[len(peepholes) - 1]
    sums, dc_prev, dpeepholes = state_backward(gates, c_prev, dc, peepholes, KIND)
    if len(peepholes) > 0:
        dpeepholes += (da_o * c,)
    return sums + (da_o,), dc_prev, dpeepholes


@triton.jit
def norm_forward(sums, c, parameters, units, KIND: tl.constexpr):
    # The products with h come after those with x.
    COUNT: tl.constexpr = len(sums) // 2
    r = sums[COUNT:]
    n, _ = normalized(r, units, _EPSILON)
    normed = ()
    for k in tl.static_range(COUNT):
        normed += (sums[k] + n[k] * parameters[k],)
    gates, c = state(normed, c, (), KIND)
    o = tl.sigmoid(normed[COUNT - 1])
    n, _ = normalized((c,), units, _EPSILON)
    q = o * tanh(n[0] * parameters[COUNT] + parameters[COUNT + 1])
    return gates + (o,) + r, c, q


@triton.jit
def norm_backward(saved, c, c_prev, dq, dc, parameters, units, KIND: tl.constexpr):
    COUNT: tl.constexpr = len(saved) // 2
    gates = saved[:COUNT]
    o = gates[COUNT - 1]
    n, factor = normalized((c,), units, _EPSILON)
    tanh_c = tanh(n[0] * parameters[COUNT] + parameters[COUNT + 1])
    dn = dq * o * (1 - tanh_c * tanh_c)
    dc += through_norm((dn * parameters[COUNT],), n, factor, units)[0]
    of_c = (dn * n[0], dn)
    sums, dc_prev, _ = state_backward(gates, c_prev, dc, (), KIND)
    sums += (dq * tanh_c * o * (1 - o),)
    n, factor = normalized(saved[COUNT:], units, _EPSILON)
    dn_r = ()
    gains = ()
    for k in tl.static_range(COUNT):
        dn_r += (sums[k] * parameters[k],)
        gains += (sums[k] * n[k],)
    return sums + through_norm(dn_r, n, factor, units), dc_prev, gains + of_c


@triton.jit
def full_forward(sums, c, parameters):
    return forward(sums, c, parameters, "full")


@triton.jit
def full_backward(saved, c, c_prev, dq, dc, parameters):
    return backward(saved, c, c_prev, dq, dc, parameters, "full")


@triton.jit
def coupled_forward(sums, c, parameters):
    return forward(sums, c, parameters, "coupled")


@triton.jit
def coupled_backward(saved, c, c_prev, dq, dc, parameters):
    return backward(saved, c, c_prev, dq, dc, parameters, "coupled")


@triton.jit
def carousel_forward(sums, c, parameters):
    return forward(sums, c, parameters, "carousel")


@triton.jit
def carousel_backward(saved, c, c_prev, dq, dc, parameters):
    return backward(saved, c, c_prev, dq, dc, parameters, "carousel")


@triton.jit
def full_norm_forward(sums, c, parameters, units):
    return norm_forward(sums, c, parameters, units, "full")


@triton.jit
def full_norm_backward(saved, c, c_prev, dq, dc, parameters, units):
    return norm_backward(saved, c, c_prev, dq, dc, parameters, units, "full")


@triton.jit
def coupled_norm_forward(sums, c, parameters, units):
    return norm_forward(sums, c, parameters, units, "coupled")


@triton.jit
def coupled_norm_backward(saved, c, c_prev, dq, dc, parameters, units):
    return norm_backward(saved, c, c_prev, dq, dc, parameters, units, "coupled")


@triton.jit
def carousel_norm_forward(sums, c, parameters, units):
    return norm_forward(sums, c, parameters, units, "carousel")


@triton.jit
def carousel_norm_backward(saved, c, c_prev, dq, dc, parameters, units):
    return norm_backward(saved, c, c_prev, dq, dc, parameters, units, "carousel")


def state_torch(sums: Tensors, c: Tensor, peepholes: Tensors, kind: str) -> tuple[Tensors, Tensor]:
    """`state` in PyTorch operations."""
    seen = [p * c for p in peepholes[:-1]]
    sums = tuple(a + seen[k] if k < len(seen) else a for k, a in enumerate(sums))
    if kind == "full":
        i, f, g = sums[0].sigmoid(), sums[1].sigmoid(), sums[2].tanh()
        return (i, f, g), f * c + i * g
    first, g = sums[0].sigmoid(), sums[1].tanh()
    return (first, g), g + first * (c - g) if kind == "coupled" else c + first * g


def state_backward_torch(
    gates: Tensors, c_prev: Tensor, dc: Tensor, peepholes: Tensors, kind: str
) -> tuple[Tensors, Tensor, Tensors]:
    """`state_backward` in PyTorch operations."""
    if kind == "full":
        i, f, g, _ = gates
        sums = (dc * g * i * (1 - i), dc * c_prev * f * (1 - f), dc * i * (1 - g * g))
        dc_prev = dc * f
    elif kind == "coupled":
        f, g, _ = gates
        sums = (dc * (c_prev - g) * f * (1 - f), dc * (1 - f) * (1 - g * g))
        dc_prev = dc * f
    else:
        i, g, _ = gates
        sums = (dc * g * i * (1 - i), dc * i * (1 - g * g))
        dc_prev = dc
    for da, p in zip(sums, peepholes[:-1], strict=False):  # that of g is the last and has none
        dc_prev = dc_prev + da * p
    return sums, dc_prev, tuple(da * c_prev for da in sums[: len(peepholes[:-1])])


def forward_torch(sums: Tensors, c: Tensor, peepholes: Tensors, kind: str = "full") -> tuple[Tensors, Tensor, Tensor]:
    gates, c = state_torch(sums, c, peepholes, kind)
    o = (sums[-1] + peepholes[-1] * c if peepholes else sums[-1]).sigmoid()
    return (*gates, o), c, o * c.tanh()


def backward_torch(
    gates: Tensors, c: Tensor, c_prev: Tensor, dq: Tensor, dc: Tensor, peepholes: Tensors, kind: str = "full"
) -> tuple[Tensors, Tensor, Tensors]:
    o, tanh_c = gates[-1], c.tanh()
    da_o = dq * tanh_c * o * (1 - o)
    dc = dc + dq * o * (1 - tanh_c * tanh_c)
    if peepholes:
        dc = dc + da_o * peepholes[-1]
    sums, dc_prev, dpeepholes = state_backward_torch(gates, c_prev, dc, peepholes, kind)
    return (*sums, da_o), dc_prev, (*dpeepholes, da_o * c) if peepholes else ()


def norm_torch(tiles: Tensors) -> tuple[Tensors, Tensor]:
    """`normalized` in PyTorch operations: as if the tiles lay side by side."""
    x = torch.cat(tiles, 1)
    variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
    factor = (variance + EPSILON).rsqrt()
    return ((x - mean) * factor).chunk(len(tiles), 1), factor


def through_norm_torch(gradients: Tensors, tiles: Tensors, factor: Tensor) -> Tensors:
    """`through_norm` in PyTorch operations."""
    d, x = torch.cat(gradients, 1), torch.cat(tiles, 1)
    d = factor * (d - d.mean(1, keepdim=True) - x * (d * x).mean(1, keepdim=True))
    return d.chunk(len(tiles), 1)


def norm_forward_torch(sums: Tensors, c: Tensor, parameters: Tensors, kind: str) -> tuple[Tensors, Tensor, Tensor]:
    count = len(sums) // 2
    n, _ = norm_torch(sums[count:])
    normed = tuple(x + r * gain for x, r, gain in zip(sums, n, parameters, strict=False))
    gates, c = state_torch(normed, c, (), kind)
    o, ((n_c,), _) = normed[-1].sigmoid(), norm_torch((c,))
    return (*gates, o, *sums[count:]), c, o * (n_c * parameters[-2] + parameters[-1]).tanh()


def norm_backward_torch(
    saved: Tensors, c: Tensor, c_prev: Tensor, dq: Tensor, dc: Tensor, parameters: Tensors, kind: str
) -> tuple[Tensors, Tensor, Tensors]:
    count = len(saved) // 2
    gates, o, ((n_c,), factor) = saved[:count], saved[count - 1], norm_torch((c,))
    tanh_c = (n_c * parameters[-2] + parameters[-1]).tanh()
    dn = dq * o * (1 - tanh_c * tanh_c)
    dc = dc + through_norm_torch((dn * parameters[-2],), (n_c,), factor)[0]
    sums, dc_prev, _ = state_backward_torch(gates, c_prev, dc, (), kind)
    sums = (*sums, dq * tanh_c * o * (1 - o))
    n, factor = norm_torch(saved[count:])
    dn_r = tuple(da * gain for da, gain in zip(sums, parameters, strict=False))
    gains = tuple(da * x for da, x in zip(sums, n, strict=True))
    return (*sums, *through_norm_torch(dn_r, n, factor)), dc_prev, (*gains, dn * n_c, dn)


def output_torch(gates: Tensors, c: Tensor, peepholes: Tensors) -> Tensor:
    return gates[-1] * c.tanh()


def norm_output_torch(saved: Tensors, c: Tensor, parameters: Tensors) -> Tensor:
    (n,), _ = norm_torch((c,))
    return saved[len(saved) // 2 - 1] * (n * parameters[-2] + parameters[-1]).tanh()


_KERNELS = {
    ("full", False): (full_forward, full_backward),
    ("full", True): (full_norm_forward, full_norm_backward),
    ("coupled", False): (coupled_forward, coupled_backward),
    ("coupled", True): (coupled_norm_forward, coupled_norm_backward),
    ("carousel", False): (carousel_forward, carousel_backward),
    ("carousel", True): (carousel_norm_forward, carousel_norm_backward),
}


def variant(kind: str = "full", peephole: bool = False, layer_norm: bool = False) -> Cell:
    """An LSTM of a kind, with peepholes or layer norm.

    Raises:
        ValueError: there is none with both.
    """
    if peephole and layer_norm:
        raise ValueError("an LSTM has peepholes or layer norm, not both")
    return of(_name(kind, peephole, layer_norm))


def _name(kind: str, peephole: bool, layer_norm: bool) -> str:
    return "lstm" + ("" if kind == "full" else f"-{kind}") + "-peephole" * peephole + "-norm" * layer_norm


def _plain(kind: str, peephole: bool) -> Cell:
    gates, (forward, backward) = GATES[kind], _KERNELS[kind, False]
    count = len(gates)
    return Cell(
        _name(kind, peephole, False), count, count, tuple(range(count)), gates, forward, backward,
        partial(forward_torch, kind=kind), partial(backward_torch, kind=kind),
        parameters=(Parameter("weight_ch", count - 1),) if peephole else (), output_torch=output_torch,
        operator="lstm" if kind == "full" and not peephole else None,
        loops=(lstm_loops.forward, lstm_loops.backward) if kind == "full" and not peephole else None,
    )  # fmt: skip


def _normed(kind: str) -> Cell:
    gates, (forward, backward) = GATES[kind], _KERNELS[kind, True]
    count = len(gates)
    return Cell(
        _name(kind, False, True), 2 * count, count, tuple(range(count, 2 * count)),
        (*gates, *(f"r_{gate}" for gate in gates)), forward, backward,
        partial(norm_forward_torch, kind=kind), partial(norm_backward_torch, kind=kind),
        parameters=(
            Parameter("gain_ih", count, 1.0, of_input=True), Parameter("gain_hh", count, 1.0),
            Parameter("gain_c", 1, 1.0), Parameter("bias_c", 1, 0.0, bias=True),
        ),
        biased=tuple(range(count)), whole_rows=True, input_norm=EPSILON, output_torch=norm_output_torch,
    )  # fmt: skip


for _kind in GATES:
    for _cell in (_plain(_kind, False), _plain(_kind, True), _normed(_kind)):
        register(_cell)
LSTM = variant()
