"""What every strategy of running the recurrence takes and returns.

Every recurrence here runs on flat data: the rows of all time steps, one step after the other,
as in `torch.nn.utils.rnn.PackedSequence.data`. A dense batch (T, B, ·) is the case in which
each step has B rows. N is the number of rows in all, D the number of directions, H the hidden
size and K the size of h: `proj_size` where there is one, else H.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lstm_triton import dropout

if TYPE_CHECKING:
    from lstm_triton.cells import Cell, Parameter


class Direction(NamedTuple):
    """The weights of a layer's direction; G, R and so on: `lstm_triton.cells.Cell`, of an LSTM all are 4."""

    w_ih: Tensor  # (inputs * H, I)
    w_hh: Tensor  # (len(recurrent) * H, K)
    b_ih: Tensor | None  # (inputs * H,)
    b_hh: Tensor | None  # (len(biases) * H,)
    w_hr: Tensor | None  # (K, H)
    extra: tuple[Tensor, ...] = ()  # the cell's parameters, those that are there

    def to(self, dtype: torch.dtype) -> "Direction":
        w_ih, w_hh, *others = self[:5]
        b_ih, b_hh, w_hr = (None if w is None else w.to(dtype) for w in others)
        return Direction(w_ih.to(dtype), w_hh.to(dtype), b_ih, b_hh, w_hr, tuple(w.to(dtype) for w in self.extra))

    def vectors(self, cell: "Cell", hidden: int) -> Tensor:
        """(P, H): the parameters that the cell's functions get; zeros stand for biases that aren't there."""
        if not cell.vectors:
            return self.w_hh.new_empty(0, hidden)
        given = dict(zip(present(cell, self.b_ih is not None), self.extra, strict=True))
        pieces = [given[p] if p in given else self.w_hh.new_zeros(p.vectors * hidden) for p in cell.own]
        return torch.cat(pieces).view(cell.vectors, hidden)

    def gain(self, cell: "Cell") -> Tensor:
        """(inputs * H,) of the layer norm of the input's product."""
        return next(x for p, x in zip(present(cell, self.b_ih is not None), self.extra, strict=True) if p.of_input)


def present(cell: "Cell", bias: bool) -> list["Parameter"]:
    """A cell's parameters in a layer with or without biases."""
    return [p for p in cell.parameters if bias or not p.bias]


def parameter_gradients(
    cell: "Cell", bias: bool, vectors: Tensor | None, dgain: Tensor | None, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """A direction's gradients of its parameters that are there.

    Args:
        vectors: (P, H) of what the cell's functions get.
        dgain: (inputs * H,) of the gain of the input's layer norm.
        dtype: of the result, where another is wanted.
    """
    pieces = [] if vectors is None else vectors.reshape(-1).split([p.vectors * vectors.size(1) for p in cell.own])
    of = dict(zip(cell.own, pieces, strict=True))
    found = [dgain if p.of_input else of[p].clone() for p in present(cell, bias)]  # operators return no views of one
    return [x if dtype is None else x.to(dtype) for x in found if x is not None]


class Zoneout(NamedTuple):
    """How much of h and c stays as it was (`lstm_triton.kernels.pointwise`)."""

    p_h: float
    p_c: float
    seed: Tensor | None = None  # one int64: masks are drawn in training; without, the probabilities are in their place
    stream: int = 0  # as of `RecurrentDropout`

    def of_steps(self, d: int, low: int, high: int, h: Tensor) -> tuple[Tensor, Tensor]:
        """Direction d's of h and c in steps low … high - 1, each (steps or 1, B, H); h is (B, H)."""
        if self.seed is None:
            return (h.new_full((1, *h.shape), rounded(self.p_h)), h.new_full((1, *h.shape), rounded(self.p_c)))
        found = []
        for p, first in ((self.p_h, dropout.ZONEOUT_H), (self.p_c, dropout.ZONEOUT_C)):
            stream = first + self.stream + d
            streams, steps = range(stream, stream + 1), range(low, high)
            mask = dropout.masks(self.seed, streams, steps, range(h.size(0)), h.size(1), p, h.dtype)[0]
            found.append((mask == 0).to(h.dtype))
        return found[0], found[1]


def rounded(p: float) -> float:
    """A probability as masks are drawn by: a multiple of 2⁻¹⁶, which float32 holds."""
    return round(p * 2**16) / 2**16


@dataclass(frozen=True)
class Layout:
    """Where each time step's rows are: step t holds batch rows 0 … rows[t]-1 at starts[t] …"""

    starts: Sequence[int]
    rows: Sequence[int]
    batch: int  # B: rows[0], the most of any step

    @staticmethod
    @lru_cache(maxsize=64)
    def dense(steps: int, batch: int) -> "Layout":
        return Layout(range(0, steps * batch, batch), [batch] * steps, batch)

    @classmethod
    def of(cls, total: int, batch: int, batch_sizes: Tensor | None) -> "Layout":
        """From N, B and, for a packed batch, the (T,) numbers of rows of the steps.

        Raises:
            ValueError: no packed batch has these numbers.
        """
        if batch_sizes is None:
            return cls.dense(total // batch, batch)
        rows = batch_sizes.tolist()
        starts = [0, *accumulate(rows)]
        # Kernels would read and write beyond their tensors.
        if starts.pop() != total or rows[0] != batch or rows[-1] < 1 or rows != sorted(rows, reverse=True):
            raise ValueError(
                f"batch_sizes should be positive numbers that never increase, begin with the batch size {batch} and "
                f"add up to the {total} rows of input, got {batch_sizes}"
            )
        return cls(starts, rows, batch)

    @cached_property
    def steps(self) -> int:
        return len(self.rows)

    @cached_property
    def total(self) -> int:
        return self.starts[-1] + self.rows[-1]

    @property
    def is_dense(self) -> bool:
        return self.rows[-1] == self.batch

    @cached_property
    def lengths(self) -> list[int]:
        """How many steps each batch row has, the longest first."""
        found: list[int] = []
        for t in range(self.steps - 1, -1, -1):
            found += [t + 1] * (self.rows[t] - len(found))
        return found

    def order(self, reverse: bool) -> range:
        """Time steps in the order in which a direction passes them."""
        return range(self.steps - 1, -1, -1) if reverse else range(self.steps)

    def part(self, low: int, high: int) -> "Layout":
        """The layout of steps low … high - 1 by themselves."""
        if low == 0 and high == self.steps:
            return self
        first = self.starts[low]
        return Layout([x - first for x in self.starts[low:high]], self.rows[low:high], self.rows[low])

    def split(self, flat: Tensor, reverse: bool) -> Sequence[Tensor]:
        """Views of the rows of each step in `flat` (N, ·), in the order of `reverse`."""
        dense = self.is_dense
        views = flat.unflatten(0, (self.steps, self.batch)).unbind(0) if dense else flat.split(list(self.rows))
        return views[::-1] if reverse else views

    def masks(self, mask: Tensor, reverse: bool) -> Sequence[Tensor]:
        """A direction's mask (T or 1, B, K) as one of the rows of each step, in the order of `reverse`."""
        views = mask.unbind(0) if mask.size(0) > 1 else [mask[0]] * self.steps
        if not self.is_dense or mask.size(1) > self.batch:
            views = [m[:rows] for m, rows in zip(views, self.rows, strict=True)]
        return views[::-1] if reverse else views

    def previous(self, flat: Tensor, initial: Tensor, reverse: bool) -> Tensor:
        """The state before each step, in the order of `reverse`.

        Args:
            flat: (N, ·) the state after each step.
            initial: (B, ·) the state before the first one.
        """
        pieces = []
        first = 0
        for rows, steps in groupby(self.rows):  # steps of as many rows lie as their predecessors do, but for one
            last = first + len(list(steps)) - 1
            skipped = rows if reverse else 0
            inner = flat[self.starts[first] + skipped : self.starts[last] + skipped]
            source = last + 1 if reverse else first - 1
            known = min(rows, self.rows[source]) if 0 <= source < self.steps else 0
            outer = [initial[known:rows]]
            if known:
                start = self.starts[source]
                outer.insert(0, flat[start : start + known])
            pieces += [inner, *outer] if reverse else [*outer, inner]
            first = last + 1
        return torch.cat(pieces)

    def reversal(self, device: torch.device) -> Tensor:
        """(N,) where each row's steps are when they are taken from its last to its first; its own inverse."""
        rows = torch.tensor(self.rows, device=device)
        starts = torch.tensor(self.starts, device=device)
        step = torch.repeat_interleave(torch.arange(self.steps, device=device), rows)
        row = torch.arange(self.total, device=device) - starts[step]
        return starts[torch.tensor(self.lengths, device=device)[row] - 1 - step] + row


class Window(NamedTuple):
    """Some steps of a layer: those that each direction's pass has at its places first … last - 1.

    Direction 0 has them counted from the sequence's start, direction 1 from its end. What belongs to a
    window alone, such as its gates, is (D, n, ·): n is the number of rows of the direction that has more.
    """

    layout: Layout
    first: int
    last: int

    @property
    def whole(self) -> bool:
        return self.last - self.first == self.layout.steps

    def steps(self, d: int) -> tuple[int, int]:
        """Direction d's first time step and the one after its last."""
        return (self.first, self.last) if d == 0 else (self.layout.steps - self.last, self.layout.steps - self.first)

    def rows(self, d: int) -> slice:
        """Direction d's rows among the N."""
        low, high = self.steps(d)
        layout = self.layout
        return slice(layout.starts[low], layout.starts[high - 1] + layout.rows[high - 1])

    def part(self, d: int) -> Layout:
        """The layout of direction d's steps."""
        return self.layout.part(*self.steps(d))

    def size(self, directions: int) -> int:
        """n."""
        if self.whole:
            return self.layout.total
        return max(rows.stop - rows.start for rows in map(self.rows, range(directions)))

    def state_before(self, output: Tensor, hx: Tensor) -> Tensor:
        """(D, B, K) what h was before the window, of rows that have a step in it: from output (N, D * K) and hx."""
        if self.first == 0:
            return hx
        state, size = hx.clone(), hx.size(2)
        for d in range(hx.size(0)):
            low, high = self.steps(d)
            t = low - 1 if d == 0 else high
            start, rows = self.layout.starts[t], self.layout.rows[t]
            state[d, :rows] = output[start : start + rows, d * size : (d + 1) * size]
        return state


def first_rows(window: Window, d: int, device: torch.device) -> Tensor:
    """(rows,) where, among a window's rows, direction d's first step of each batch row is that has any there."""
    part = window.part(d)
    if d == 0:
        return torch.arange(part.batch, device=device)
    return torch.tensor([part.starts[n - 1] + r for r, n in enumerate(part.lengths)], device=device)


def windows(layout: Layout, length: int) -> list[Window]:
    """A layer's steps, `length` at a time; 0: all at once."""
    steps = layout.steps
    if length <= 0 or length >= steps:
        return [Window(layout, 0, steps)]
    return [Window(layout, k, min(k + length, steps)) for k in range(0, steps, length)]


class RecurrentDropout(NamedTuple):
    """What h_{t-1} is multiplied by before its product: a mask given, or a seed to draw one from."""

    mask: Tensor | None = None  # (D, T or 1, B, K)
    seed: Tensor | None = None  # one int64 on the device
    p: float = 0.0
    per_step: bool = True  # a fresh mask each time step, else one for the sequence
    stream: int = 0  # that of direction 0; direction 1 has the next

    def drawn(self, steps: int, hx: Tensor) -> Tensor | None:
        """The mask as a tensor (D, T or 1, B, K) in the dtype of `hx`, (D, B, K); None without dropout."""
        if self.seed is None:
            return None if self.mask is None else self.mask.to(hx.dtype)
        directions, batch, size = hx.shape
        streams = range(self.stream, self.stream + directions)
        count = range(steps if self.per_step else 1)
        return dropout.masks(self.seed, streams, count, range(batch), size, self.p, hx.dtype)

    def of_steps(self, d: int, low: int, high: int, h: Tensor) -> Tensor | None:
        """Direction d's mask in steps low … high - 1, (steps or 1, B, K), for `h` (B, K); None without dropout."""
        if self.mask is not None:
            mask = self.mask[d].to(h.dtype)
            return mask[low:high] if mask.size(0) > 1 else mask
        if self.seed is None:
            return None
        streams, steps = range(self.stream + d, self.stream + d + 1), range(low, high) if self.per_step else range(1)
        return dropout.masks(self.seed, streams, steps, range(h.size(0)), h.size(1), self.p, h.dtype)[0]


class Saved(NamedTuple):
    """What backward needs of a window's forward, beside outputs and states."""

    gates: Tensor  # (D, n, WH) what the cell keeps, of an LSTM the activated gates; W tiles of H (`Layer.width`)
    c: Tensor  # (D, n, H) float32 or float64
    h_prev: Tensor | None = None  # (D, n, K) the masked h that each step multiplied, where it is known by then

    def rows(self, window: Window) -> "Saved":
        """A window's of the only direction."""
        own = window.rows(0)
        return Saved(self.gates[:, own], self.c[:, own])


class Layer(NamedTuple):
    """One layer's call: what every way of running it takes."""

    input: Tensor  # (N, I)
    hx: Tensor  # (D, B, K)
    cx: Tensor  # (D, B, H)
    directions: list[Direction]
    layout: Layout
    dropout: RecurrentDropout
    cell: "Cell"
    zoneout: Zoneout | None = None
    records: bool = True  # whether a backward may follow
    plan: Any = None  # the `planning.Plan` that was measured to be the fastest for the call, where one was

    def columns(self, d: int) -> slice:
        """Direction d's among the D * K of the output."""
        size = self.hx.size(2)
        return slice(d * size, (d + 1) * size)

    @property
    def width(self) -> int:
        """Tiles of H that a step has room for."""
        return self.cell.width(self.zoneout is not None)

    def window_length(self) -> int:
        """How many steps' products of the input, (D, n, WH), are made at a time where nothing is kept."""
        gates = self.width * len(self.directions) * self.cx.size(2)
        layout = self.layout
        return steps_within(gates * self.input.element_size(), layout.steps, layout.total, self.input.device)

    def room(self) -> Saved:
        """For gates and c of all steps."""
        directions, hidden, weight = len(self.directions), self.cx.size(2), self.directions[0][0]
        gates = self.input.new_empty(directions, self.layout.total, self.width * hidden, dtype=weight.dtype)
        return Saved(gates, gates.new_empty(*gates.shape[:2], hidden, dtype=state_dtype(weight.dtype)))

    def products(self, window: Window, out: Tensor | None = None) -> Tensor:
        """(D, n, WH): the sums that have them begin with the products of the window's input and biases.

        Written to `out` where it is given; the other columns are left as they are.
        """
        dtype, directions, hidden = self.directions[0].w_ih.dtype, len(self.directions), self.cx.size(2)
        gates = out
        if gates is None:
            gates = self.input.new_empty(directions, window.size(directions), self.width * hidden, dtype=dtype)
        for d, weights in enumerate(self.directions):
            rows = window.rows(d)
            x, own = self.input[rows].to(dtype), gates[d, : rows.stop - rows.start, : self.cell.inputs * hidden]
            bias = self.input_bias(d)
            if self.cell.input_norm is not None:
                product = torch.native_layer_norm(
                    x @ weights.w_ih.t(), [own.size(1)], weights.gain(self.cell), bias, self.cell.input_norm
                )
                own.copy_(product[0])
            elif bias is None:
                torch.mm(x, weights.w_ih.t(), out=own)
            else:
                torch.addmm(bias, x, weights.w_ih.t(), out=own)
        return gates

    def input_bias(self, d: int) -> Tensor | None:
        """(inputs * H,) what direction d's products with the input have added: of both biases what belongs there."""
        _, _, b_ih, b_hh, *_ = self.directions[d]
        if b_ih is None or b_hh is None:
            return None
        inputs, biases = self.cell.inputs, self.cell.biases
        if biases == tuple(range(inputs)):
            return b_ih + b_hh
        bias = b_ih.view(inputs, -1).clone()
        for k, row in zip(biases, b_hh.view(len(biases), -1), strict=True):
            if k < inputs:
                bias[k] += row
        return bias.view(-1)

    def add_products(self, d: int, h_prev: Tensor, gates: Tensor) -> None:
        """To direction d's sums (n, WH), as `products` left them, those of `h_prev` (n, K); all are there then."""
        hidden, w_hh = self.cx.size(2), self.directions[d].w_hh
        sums = gates.unflatten(1, (-1, hidden))
        begins = self.start(d)
        for k in range(self.cell.inputs, self.cell.sums):
            sums[:, k] = begins.get(k, 0.0)
        for rows, columns in self.cell.runs():
            sums[:, columns].flatten(1).addmm_(h_prev, w_hh[rows.start * hidden : rows.stop * hidden].t())

    def start(self, d: int) -> dict[int, Tensor]:
        """What direction d's other sums begin with, by their numbers: (H,) of bias_hh, where there are biases."""
        b_hh, biases = self.directions[d].b_hh, self.cell.biases
        if b_hh is None:
            return {}
        rows = b_hh.view(len(biases), -1)
        return {k: rows[r] for r, k in enumerate(biases) if k >= self.cell.inputs}


class Pass(NamedTuple):
    """What a window's forward returns."""

    hn: Tensor  # (D, B, K) the states after it
    cn: Tensor  # (D, B, H) float32 or float64
    gates: Tensor  # as of `Saved`; where nothing is saved any tensor, as is c
    c: Tensor


class Gradients(NamedTuple):
    """What a window's backward returns: all that the gradients of input and weights are products of."""

    dhx: Tensor  # (D, B, K) of the states before it, float32 or float64
    dcx: Tensor  # (D, B, H) the same
    dgates: Tensor  # (D, n, GH) with respect to the sums before activation
    dh: Tensor | None  # (D, n, K) with respect to each step's h, with projections
    h_prev: Tensor | None  # (D, n, K) the masked h that each step multiplied
    dparameters: Tensor | None = None  # (D, P, H) with respect to the vectors that the cell's functions get


class LayerGradients(NamedTuple):
    """What it returns where it goes through the weights and the input product, too."""

    dhx: Tensor  # (D, B, K)
    dcx: Tensor  # (D, B, H)
    dinput: list[Tensor]  # for each direction (n, I); none where they aren't wanted
    dweights: list[Tensor]  # one for each of a layer's weights; empty ones where they aren't wanted


# Bytes that a window's tensors may have. On a CPU measured (of 2 to 64 MiB, bench/long.py); on a GPU not yet.
WINDOW_BYTES = {"cpu": 16 * 2**20, "cuda": 64 * 2**20}
LEAST_STEPS = 8  # of a window: what each window costs once is then little of it


def steps_within(row_bytes: int, steps: int, rows: int, device: torch.device) -> int:
    """How many of a layer's `steps` with `rows` rows together take about `WINDOW_BYTES`, at `row_bytes` a row."""
    budget = WINDOW_BYTES.get(device.type, WINDOW_BYTES["cuda"])
    return max(LEAST_STEPS, budget * steps // (row_bytes * rows))


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and cell states are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rnn_precision(device: torch.device) -> str:
    """ "tf32" where PyTorch's setting for RNNs allows it on this device, which has it, else "ieee"."""
    if device.type != "cuda" or torch.version.hip is not None:  # Triton refuses "tf32" for gfx90a
        return "ieee"
    rnn: Any = torch.backends.cudnn.rnn  # its type has no word of the setting
    return "tf32" if rnn.fp32_precision == "tf32" else "ieee"
