"""What a recurrent cell is: the pointwise part of a time step, and how it hangs together with the products.

Everything that runs a recurrence (kernels, PyTorch operations, plans, checks) works from such a description and knows
no cell by name. To describe a new one takes one file: `lstm_triton/cells/gru.py` is a short example.

Of one direction, H the number of hidden units, a step is

    sums[k] = (x W_ihᵀ)[k] for the first `inputs` k, + (m ⊙ h W_hhᵀ)[r] where k is recurrent[r], + biases
    saved, c, q = forward(sums, c, parameters)
    h = q, or its projection

with each sum (rows, H). m is recurrent dropout. A cell without a state c of its own, `carries` False, has its h there:
what forward gets as c is the h before the step, in full precision, and what it returns is q.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple


class Parameter(NamedTuple):
    """Learned numbers of a layer's direction beyond weights and biases, elementwise over the hidden units."""

    name: str  # "weight_ch" is weight_ch_l0, weight_ch_l0_reverse, … of a module
    vectors: int  # of H numbers each: the shape is (vectors * H,)
    initial: float | None = None  # None: drawn as weights are, uniform within ± 1 / √H
    of_input: bool = False  # the gain of the layer norm on the input's product, which the cell's functions don't see
    bias: bool = False  # whether it is there with bias=True alone; zeros stand for it else


@dataclass(frozen=True, eq=False, repr=False)
class Cell:
    """A recurrent cell as a value.

    The functions get and return tuples of tiles: `forward` and `backward` blocks (rows, units) in a kernel, those in
    PyTorch operations tensors (rows, H), all in float32 or float64; parameters are vectors over the units.

    Attributes:
        name: unique; modules are pickled, and operators called, with it.
        sums: how many there are before activation.
        inputs: the first so many of them have a product with the input: weight_ih is (inputs * H, I).
        recurrent: those that have one with h, in the order of the rows of weight_hh, (len(recurrent) * H, K).
        saved: names of what forward keeps of a step for backward.
        forward: a `triton.jit` function (sums, c, parameters) -> (saved, c, q).
        backward: a `triton.jit` function (saved, c, c_prev, dq, dc, parameters) -> (dsums, dc_prev, dparameters):
            from the gradients of q and of c after the step, which is `c`; `c_prev` is that before it. Linear in them.
        forward_torch, backward_torch: the same in PyTorch operations; the former is differentiable to any order.
        parameters: learned numbers that the functions get, one vector of H after the other.
        biased: the sums that bias_hh is added to, in the order of its rows; None stands for `recurrent`.
        carries: whether c is a state of its own, as an LSTM's; else it is h.
        whole_rows: whether the cell looks at all hidden units of a row, as layer norm does: `forward` and `backward`
            get one argument more, `units`, for `lstm_triton.kernels.units.total`.
        input_norm: None, or the ε of a layer norm over the products with the input, before biases are added.
        output_torch: None, or (saved, c, parameters) -> q in PyTorch operations, which cells with projections want for
            the gradient of weight_hr.
        operator: the name of PyTorch's own operator for a stack of such layers in `torch._VF`, if there is one.
        loops: None, or a pair of functions that are what `lstm_triton.eager` has for all, in fewer operations.
    """

    name: str
    sums: int
    inputs: int
    recurrent: tuple[int, ...]
    saved: tuple[str, ...]
    forward: Any
    backward: Any
    forward_torch: Callable[..., Any]
    backward_torch: Callable[..., Any]
    parameters: tuple[Parameter, ...] = ()
    biased: tuple[int, ...] | None = None
    carries: bool = True
    whole_rows: bool = False
    input_norm: float | None = None
    output_torch: Callable[..., Any] | None = None
    operator: str | None = None
    loops: tuple[Callable[..., None], Callable[..., None]] | None = None

    def __post_init__(self) -> None:
        accepted = range(self.sums)
        for field, found in (("recurrent", self.recurrent), ("biased", self.biases)):
            if sorted(set(found)) != list(found) or not set(found) <= set(accepted):
                raise ValueError(
                    f"{field} of cell {self.name!r} should be ascending numbers below {self.sums}, got {found}"
                )
        if not 0 < self.inputs <= self.sums:
            raise ValueError(f"inputs of cell {self.name!r} should be from 1 to sums, {self.sums}, got {self.inputs}")
        if not self.recurrent:
            raise ValueError(f"recurrent of cell {self.name!r} should name at least one sum, got none")

    def __repr__(self) -> str:
        return f"Cell({self.name!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return of, (self.name,)

    @cached_property
    def biases(self) -> tuple[int, ...]:
        return self.recurrent if self.biased is None else self.biased

    def width(self, zoned: bool) -> int:
        """Tiles of H that a step has room for: its sums or, later, what it keeps; under zoneout its own c, too."""
        return max(self.sums, len(self.saved) + zoned)

    @cached_property
    def own(self) -> tuple[Parameter, ...]:
        """The parameters that the cell's functions get."""
        return tuple(p for p in self.parameters if not p.of_input)

    @cached_property
    def vectors(self) -> int:
        """Of H numbers, that the cell's functions get."""
        return sum(p.vectors for p in self.own)

    @cached_property
    def is_plain(self) -> bool:
        """Whether each sum has a product with the input and one with h, and there is nothing more than weights."""
        all_sums = tuple(range(self.sums))
        return self.inputs == self.sums and self.recurrent == self.biases == all_sums and not self.parameters

    def runs(self) -> Iterator[tuple[slice, slice]]:
        """For neighbours among `recurrent`: where they are in the rows of weight_hh and in the sums, in units of H."""
        start = 0
        for r, k in enumerate(self.recurrent):
            if r + 1 == len(self.recurrent) or self.recurrent[r + 1] != k + 1:
                first = self.recurrent[start]
                yield slice(start, r + 1), slice(first, k + 1)
                start = r + 1


_cells: dict[str, Cell] = {}
_OWN = ("lstm", "gru", "rnn")  # the modules of the cells that come along, which import Triton


def register(cell: Cell) -> Cell:
    """Makes a cell known by its name, as modules do with those that they get.

    Raises:
        ValueError: another cell has the name.
    """
    if cell.forward is None or cell.forward.__module__ not in {f"{__package__}.{module}" for module in _OWN}:
        _load()  # these have their names first
    if _cells.setdefault(cell.name, cell) is not cell:
        raise ValueError(f"another cell is called {cell.name!r}: a cell's name should be its own")
    return cell


def of(name: str) -> Cell:
    """The cell of a name.

    Raises:
        ValueError: none is registered.
    """
    if name not in _cells:
        _load()
    if name not in _cells:
        raise ValueError(f"no cell is registered as {name!r}; known: {', '.join(sorted(_cells))}")
    return _cells[name]


@cache
def _load() -> None:
    """Makes the cells that come along."""
    for module in _OWN:
        importlib.import_module(f"{__package__}.{module}")
