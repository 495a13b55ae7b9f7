"""The functional forms: `lstm` takes what `torch.lstm` takes, and what it lacks; `recurrent` is that for any cell."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lstm_triton import cells, direct, dispatch, ops
from lstm_triton.cells import Cell, register
from lstm_triton.recurrence import Layout, RecurrentDropout, present, state_dtype, steps_within

MODES = ("step", "sequence")


class Options(NamedTuple):
    """What an LSTM is, apart from its weights."""

    num_layers: int
    bias: bool
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool
    recurrent_dropout: float
    recurrent_dropout_mode: str
    backend: str
    recompute: bool | int = False
    cell: str = "lstm"  # the name of a `lstm_triton.cells.Cell`
    zoneout: tuple[float, float] = (0.0, 0.0)

    @property
    def zones(self) -> bool:
        return self.zoneout != (0.0, 0.0)


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: list[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    num_layers: int = 1,
    bias: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    recurrent_dropout: float = 0.0,
    recurrent_dropout_mode: str = "step",
    recurrent_dropout_mask: Tensor | None = None,
    backend: str = "auto",
    recompute: bool | int = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of LSTM layers (Hochreiter & Schmidhuber 1997, as `torch.nn.LSTM` defines it).

    L is `num_layers`, D the number of directions, H the hidden size, K the size of h: that of the
    projection where there is one (weight_hr), else H.

    Args:
        input: (T, B, I), with `batch_first` (B, T, I), or with `batch_sizes` the (N, I) data of a
            `PackedSequence`; floating point.
        hx: initial states h (L * D, B, K) and c (L * D, B, H), in the order of layers, then directions.
        weights: for each layer and direction weight_ih (4H, I or D * K), weight_hh (4H, K), with `bias`
            bias_ih and bias_hh (4H,), with projections weight_hr (K, H); gates in the order i, f, g, o.
        batch_sizes: (T,) int64 on the CPU: how many rows each time step has, never increasing.
        dropout: probability of an element of a layer's output (not the last's) being zeroed, in [0, 1].
        training: whether the dropouts are active.
        recurrent_dropout: probability of an element of h_{t-1} being zeroed before its product with
            weight_hh, in [0, 1]; the h carried on is not dropped.
        recurrent_dropout_mode: "step", a fresh mask each time step, or "sequence", one for all of
            them (Gal & Ghahramani 2016).
        recurrent_dropout_mask: (L * D, T or 1, B, K), used as given in place of drawn masks, whether
            `training` or not.
        backend: "auto", "triton", "eager" or "torch".
        recompute: as of `lstm_triton.TritonLSTM`.

    Returns:
        The output, shaped as the input with D * K in place of I, and the final h and c, shaped as `hx`.

    Raises:
        TypeError, ValueError, RuntimeError: an argument has the wrong type, value or shape; the
            message names it, what was given and what is accepted.
    """
    options = Options(
        num_layers, bias, dropout, training, bidirectional, batch_first,
        recurrent_dropout, recurrent_dropout_mode, backend, recompute,
    )  # fmt: skip
    return _checked(input, hx, weights, batch_sizes, options, recurrent_dropout_mask)


def recurrent(
    cell: Cell,
    input: Tensor,
    hx: tuple[Tensor, ...],
    weights: list[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    num_layers: int = 1,
    bias: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    recurrent_dropout: float = 0.0,
    recurrent_dropout_mode: str = "step",
    recurrent_dropout_mask: Tensor | None = None,
    zoneout: tuple[float, float] = (0.0, 0.0),
    backend: str = "auto",
    recompute: bool | int = False,
) -> tuple[Tensor, ...]:
    """A stack of layers of any cell; arguments, results and errors as of `lstm`, but:

    Args:
        cell: what is done in a time step.
        hx: (h, c), or (h,) of a cell that doesn't carry c.
        weights: for each layer and direction weight_ih (G_i H, I or D * K), weight_hh (G_h H, K), with `bias`
            bias_ih (G_i H,) and bias_hh (G_b H,), with projections weight_hr (K, H), then the cell's parameters, each
            (vectors * H,), those for biases alone with `bias`. G_i is `cell.inputs`, G_h and G_b are how many numbers
            `cell.recurrent` and `cell.biases` have.
        zoneout: probabilities of an element of h and of c staying what it was; in evaluation the expectation is taken.

    Returns:
        The output, and the final states, as many as in `hx`.
    """
    register(cell)
    if len(hx) != 1 + cell.carries:
        raise ValueError(f"hx should be {1 + cell.carries} tensors for the cell {cell.name!r}, got {len(hx)}")
    options = Options(
        num_layers, bias, dropout, training, bidirectional, batch_first,
        recurrent_dropout, recurrent_dropout_mode, backend, recompute, cell.name, zoneout,
    )  # fmt: skip
    found = _checked(input, (hx[0], hx[-1]), weights, batch_sizes, options, recurrent_dropout_mask)
    return found if cell.carries else found[:2]


def _checked(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    options: Options,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_options(options)
    check_tensors(input, hx, weights, batch_sizes, options)
    check_mask(mask, input, hx, batch_sizes, options)
    return run(input, batch_sizes, hx, weights, options, mask)


def run(
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: tuple[Tensor, Tensor],
    weights: list[Tensor],
    options: Options,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lstm` without its checks of shapes and options."""
    prepared = direct.of(input, batch_sizes, hx, weights, options, mask)
    if prepared is not None:
        return prepared(input, hx, weights)
    drops = mask is not None or (options.training and options.recurrent_dropout > 0)
    backend = options.backend
    if batch_sizes is None and input.numel() == 0:
        if input.size(1 if options.batch_first else 0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        return _without_rows(input, hx, weights, options)
    save = torch.is_grad_enabled() and any([x.requires_grad for x in (input, *hx, *weights)])
    if backend == "auto":
        backend = dispatch.auto(dispatch.Call(input, batch_sizes, hx, weights, options, drops, save), run)
    if backend == "torch":
        lacks = "recurrent dropout" if drops else dispatch.operator_lacks(options)
        if lacks:
            raise ValueError(f"backend='torch' has no {lacks}; use 'auto', 'eager' or 'triton'")
    if backend == "torch" and not options.recompute:
        return dispatch.torch_operator(input, batch_sizes, hx, weights, options)
    if backend == "torch" and not save:
        return dispatch.torch_operator(input, batch_sizes, hx, weights, options)
    check_devices(input, hx, weights)
    if backend == "triton":
        dispatch.check_triton(input.device)
    device = input.device.type
    if not torch.is_autocast_enabled(device):
        return _stack(input, batch_sizes, hx, weights, options, backend, mask, drops, save)
    # What PyTorch's own RNN operators do: the lower precision throughout.
    low, states = torch.get_autocast_dtype(device), hx[1].dtype
    input, *rest = (x.to(low) if x.dtype == torch.float32 else x for x in (input, *hx, *weights))
    with torch.autocast(device, enabled=False):
        y, h, c = _stack(input, batch_sizes, (rest[0], rest[1]), rest[2:], options, backend, mask, drops, save)
    projected = h.size(2) != c.size(2)
    operator = cells.of(options.cell).operator or "lstm"
    keeps = operator == "gru" or (operator == "lstm" and (projected or batch_sizes is not None))
    if device == "cpu" and keeps:  # where it is not oneDNN's, c keeps its dtype; nn.RNN returns the lower precision
        return (y, h, c.to(states)) if projected else (y.to(states), h.to(states), c.to(states))
    return y, h, c


def _stack(
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: tuple[Tensor, Tensor],
    weights: list[Tensor],
    options: Options,
    backend: str,
    mask: Tensor | None,
    drops: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All layers through our operator."""
    dtype = input.dtype
    for name, tensors in (("hx", hx), ("weights", weights)):
        for k, x in enumerate(tensors):
            if x.dtype != dtype:  # kernels would read it as if it had the other's
                raise ValueError(f"{name}[{k}] should have the dtype of input, {dtype}, got {x.dtype}")
    h0, c0 = (x.contiguous() for x in hx)
    dense = batch_sizes is None
    if dense and options.batch_first:
        input = input.transpose(0, 1)
    x = input.contiguous()
    steps = x.size(0) if batch_sizes is None else batch_sizes.size(0)
    chunk = chunk_length(options, steps, x, h0, c0) if save and options.recompute else 0
    between = options.dropout if options.training and options.num_layers > 1 else 0.0
    p, per_step = options.recurrent_dropout, options.recurrent_dropout_mode == "step"
    if mask is not None or not drops:
        p = 0.0
    draws = options.zones and options.training
    seed = torch.randint(2**63 - 1, (1,), device=x.device) if p > 0 or between > 0 or draws else None
    if p > 0 and backend == "eager" and not chunk and not torch.compiler.is_compiling():
        # All layers' at once, which takes fewer operations; kernels draw theirs as they go.
        like = h0.to(state_dtype(x.dtype))
        mask, p = RecurrentDropout(None, seed, p, per_step, 0).drawn(steps, like), 0.0
    if mask is not None:
        mask = mask.to(state_dtype(x.dtype))
    y, hn, cn = ops.run(
        x, batch_sizes, h0, c0, weights, options.num_layers, options.bias, between, mask, seed, p, per_step,
        backend, chunk, save, options.cell, list(options.zoneout) if options.zones else None, draws,
    )  # fmt: skip
    return y.transpose(0, 1) if dense and options.batch_first else y, hn, cn


def _without_rows(
    input: Tensor, hx: tuple[Tensor, Tensor], weights: list[Tensor], options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs where the batch is empty: nothing to run or drop."""
    if not dispatch.operator_lacks(options):
        return dispatch.torch_operator(input, None, hx, weights, options)
    width = hx[0].size(2) * (1 + options.bidirectional)
    total = sum(x.sum() for x in (input, *hx, *weights))  # all have a gradient, of zeros
    return input.new_zeros(*input.shape[:2], width) + total, hx[0] + total, hx[1] + total


def chunk_length(options: Options, steps: int, x: Tensor, h: Tensor, c: Tensor) -> int:
    """How many of the time steps backward rebuilds at a time."""
    if options.recompute is not True:
        return min(int(options.recompute), steps)
    # A step's rows have gates, their gradients, c and the h before it.
    cell = cells.of(options.cell)
    numbers = ((width(options) + cell.sums + 1) * c.size(2) + h.size(2)) * (2 if options.bidirectional else 1)
    return min(steps, steps_within(numbers * x.element_size(), steps, x.numel() // x.size(-1), x.device))


def width(options: Options) -> int:
    """Tiles of H that a step's row has room for (`lstm_triton.recurrence.Layer.width`)."""
    return cells.of(options.cell).width(options.zones)


def explain(
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: tuple[Tensor, Tensor],
    weights: list[Tensor],
    options: Options,
) -> str:
    """How `run` would run a call, in words; arguments as there, computes nothing."""
    drops = options.training and options.recurrent_dropout > 0
    save = torch.is_grad_enabled() and any([x.requires_grad for x in (input, *weights)])
    batch = hx[0].size(1)
    layout = Layout.of(input.numel() // input.size(-1), batch, batch_sizes)
    padded = layout.steps * batch
    form = "dense batch" if batch_sizes is None else "packed batch"
    share = "" if layout.is_dense else f", {layout.total / padded:.0%} of the padded batch's"
    kind = "training" if save else "inference"
    lines = [
        f"call: {kind}, {form} of {batch} rows and {layout.steps} time steps, {layout.total} rows in all{share}; "
        f"{input.dtype} on {input.device}"
    ]
    backend, why = options.backend, "asked for"
    if backend == "auto":
        backend, why = dispatch.why_auto(dispatch.Call(input, batch_sizes, hx, weights, options, drops, save))
    lines.append(f"backend: {backend} ({why})")
    recompute = save and bool(options.recompute)
    chunk = chunk_length(options, layout.steps, input, *hx) if recompute else 0
    if backend == "torch" and not recompute:
        return "\n".join(lines)
    x = input.transpose(0, 1) if options.batch_first and batch_sizes is None else input
    seed = torch.zeros(1, dtype=torch.int64, device=input.device) if drops else None
    lines += ops.describe(
        x.contiguous(), batch_sizes, *hx, weights, options.num_layers, options.bias, seed,
        options.recurrent_dropout, backend, chunk, save, options.cell, list(options.zoneout) if options.zones else None,
    )  # fmt: skip
    if save:
        lines.append(f"kept for backward: {_kept(layout, hx, options, chunk, input.dtype, backend)}")
    return "\n".join(lines)


def _kept(
    layout: Layout, hx: tuple[Tensor, Tensor], options: Options, chunk: int, dtype: torch.dtype, backend: str
) -> str:
    (count, batch, size), hidden = hx[0].shape, hx[1].size(2)
    state = state_dtype(dtype).itemsize
    between = (options.num_layers - 1) * layout.total * (1 + options.bidirectional) * size * dtype.itemsize
    if chunk:
        parts = -(-layout.steps // chunk)
        kept = (parts - 1) * count * batch * hidden * state
        what = f"c at the borders of {parts} chunks of {chunk} steps"
    else:
        gate = state if backend == "eager" else dtype.itemsize
        kept, what = count * layout.total * hidden * (width(options) * gate + state), "gates and c of every step"
    outputs = ", and outputs between layers" if between else ""
    return f"{(kept + between) / 2**20:.1f} MiB beside input and output: {what}{outputs}"


def check_probability(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(
            f"{name} should be a number in range [0, 1] representing the probability of an element "
            f"being zeroed, got {value!r}"
        )


def check_zoneout(value: object) -> tuple[float, float]:
    """A pair of probabilities, one number standing for both."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"zoneout should be a number or a pair (of h, of c), got {value!r}")
    for name, p in zip(("zoneout of h", "zoneout of c"), pair, strict=True):
        check_probability(name, p)
    return float(pair[0]), float(pair[1])


def check_recompute(value: object) -> None:
    if not isinstance(value, (bool, int)) or (value is not False and value < 1):
        raise ValueError(f"recompute should be True, False or a chunk length of at least 1 time step, got {value!r}")


def check_lengths(lengths: object, batch: int, steps: int) -> Tensor:
    """`lengths` as a tensor (B,).

    Raises:
        TypeError, ValueError: they are no B integers from 1 to T on the CPU.
    """
    wanted = f"lengths should be {batch} integers from 1 to {steps} (the rows and time steps of input), on the CPU"
    if isinstance(lengths, Tensor):
        found = lengths
    elif isinstance(lengths, Sequence) and all(isinstance(n, int) for n in lengths):
        found = torch.tensor(lengths, dtype=torch.int64)
    else:
        raise TypeError(f"{wanted}, got {lengths!r}")
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"{wanted}, got the dtype {found.dtype}")
    if found.device.type != "cpu":
        raise ValueError(f"{wanted}, got them on {found.device}")
    if found.shape != (batch,):
        raise ValueError(f"{wanted}, got the shape {tuple(found.shape)}")
    wrong = [n for n in found.tolist() if not 1 <= n <= steps]
    if wrong:
        raise ValueError(f"{wanted}, got {', '.join(map(str, wrong[:3]))}")
    return found.to(torch.int64)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} should be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_options(options: Options) -> None:
    """Raises where an option has the wrong type or value."""
    check_probability("dropout", options.dropout)
    check_probability("recurrent_dropout", options.recurrent_dropout)
    check_choice("recurrent_dropout_mode", options.recurrent_dropout_mode, MODES)
    check_choice("backend", options.backend, dispatch.BACKENDS)
    check_recompute(options.recompute)
    check_zoneout(options.zoneout)
    if isinstance(options.num_layers, bool) or not isinstance(options.num_layers, int) or options.num_layers < 1:
        raise ValueError(f"num_layers should be an integer of at least 1, got {options.num_layers!r}")


def check_devices(input: Tensor, hx: tuple[Tensor, Tensor], weights: list[Tensor]) -> None:
    """Raises where tensors lie on several devices, as PyTorch's operator does."""
    device = input.device
    for name, tensors in (("hx", hx), ("weights", weights)):
        for x in tensors:
            if x.device != device:
                raise RuntimeError(
                    f"input, hx and weights should be on one device: input is on {input.device}, "
                    f"found {name} on {x.device}"
                )


def check_tensors(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    options: Options,
) -> None:
    """Raises where a tensor has the wrong shape, dtype or device."""
    if not input.is_floating_point():
        raise ValueError(f"input should be of a floating point dtype, got {input.dtype}")
    if len(hx) != 2:
        raise ValueError(f"hx should be a pair (h, c), got {len(hx)} tensors")
    expected = 3 if batch_sizes is None else 2
    if input.dim() != expected:
        raise ValueError(f"input should have {expected} dimensions, got shape {tuple(input.shape)}")
    if batch_sizes is not None:
        sizes = batch_sizes.tolist() if batch_sizes.dim() == 1 else []
        if not sizes or sum(sizes) != input.size(0) or sizes != sorted(sizes, reverse=True) or sizes[-1] < 1:
            raise ValueError(
                f"batch_sizes should be (T,) positive numbers that never increase and add up to the {input.size(0)} "
                f"rows of input, got {batch_sizes}"
            )
    _, batch = batch_of(input, batch_sizes, options.batch_first)
    count = options.num_layers * (2 if options.bidirectional else 1)
    (h, c), hidden, cell = hx, hx[1].size(-1), cells.of(options.cell)
    size = h.size(-1)
    if options.zones and not cell.carries:
        raise ValueError(f"zoneout goes with cells that carry c, got zoneout={options.zoneout} with {cell.name!r}")
    if size != hidden and (cell.output_torch is None or options.zones):
        what = "zoneout" if options.zones else f"cell {cell.name!r}"
        raise ValueError(f"{what} has no projections: hx[0] and hx[1] should have one size, got {size} and {hidden}")
    extra = present(cell, options.bias)
    each = 2 + 2 * options.bias + (size != hidden) + len(extra)
    if len(weights) != count * each:
        raise ValueError(
            f"weights should be {each} tensors for each of {count} layers and directions, got {len(weights)}"
        )
    for name, state, wide in (("hx[0]", h, size), ("hx[1]", c, hidden)):
        if tuple(state.shape) != (count, batch, wide):
            raise RuntimeError(f"{name} should have shape {(count, batch, wide)}, got {tuple(state.shape)}")
    inputs, recurrent, biased = cell.inputs * hidden, len(cell.recurrent) * hidden, len(cell.biases) * hidden
    for k, w in enumerate(weights):
        deep = k // each >= (2 if options.bidirectional else 1)
        features = size * (2 if options.bidirectional else 1) if deep else input.size(-1)
        shapes: list[tuple[int, ...]] = [(inputs, features), (recurrent, size)]
        shapes += [(inputs,), (biased,)] if options.bias else []
        shapes += [(size, hidden)] if size != hidden else []
        shapes += [(p.vectors * hidden,) for p in extra]
        if tuple(w.shape) != shapes[k % each]:
            raise RuntimeError(f"weights[{k}] should have shape {shapes[k % each]}, got {tuple(w.shape)}")
    if not torch._C._is_any_autocast_enabled():
        for name, x in [("hx[0]", h), ("hx[1]", c), *((f"weights[{k}]", w) for k, w in enumerate(weights))]:
            if x.dtype != input.dtype:
                raise ValueError(f"{name} should have the dtype of input, {input.dtype}, got {x.dtype}")
    check_devices(input, hx, weights)


def check_mask(
    mask: Tensor | None, input: Tensor, hx: tuple[Tensor, Tensor], batch_sizes: Tensor | None, options: Options
) -> None:
    """Raises where a given recurrent dropout mask has the wrong shape or device."""
    if mask is None:
        return
    steps, _ = batch_of(input, batch_sizes, options.batch_first)
    count, batch, size = hx[0].shape
    accepted = [(count, steps, batch, size), (count, 1, batch, size)]
    if tuple(mask.shape) not in accepted or mask.device != input.device:
        raise ValueError(
            f"recurrent_dropout_mask should have shape {accepted[0]} or {accepted[1]} and be on {input.device}, "
            f"got shape {tuple(mask.shape)} on {mask.device}"
        )


def batch_of(input: Tensor, batch_sizes: Tensor | None, batch_first: bool) -> tuple[int, int]:
    """Time steps T and batch B of an input."""
    if batch_sizes is not None:
        return batch_sizes.size(0), int(batch_sizes[0])
    steps, batch = input.shape[:2]
    return (batch, steps) if batch_first else (steps, batch)
