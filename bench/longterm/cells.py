"""The recurrent layers that are trained, and how their gates begin."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from lstm_triton import TritonGRU, TritonLSTM, TritonRNN


class Cell(NamedTuple):
    """A layer under test: its name in plots and tables, its colours and marks, how it is made, how its gates begin."""

    label: str
    colour: str  # Okabe and Ito's, which colour-blind readers tell apart
    marker: str
    make: Callable[[int, int], nn.Module]  # of input size and hidden size
    begin: Callable[[nn.Module, int, Generator], None]  # the module, the longest lag in time steps
    dashes: str = "-"


def states(hx: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The layer's states as a tuple: (h,) or (h, c)."""
    return hx if isinstance(hx, tuple) else (hx,)


def as_made(module: nn.Module, longest: int, generator: Generator) -> None:
    """PyTorch's initialisation: everything uniform in ± 1 / sqrt(hidden size)."""


def chrono_lstm(module: nn.Module, longest: int, generator: Generator) -> None:
    """Forget gates' biases log(u), u uniform in [1, longest - 1], for each unit; input gates' the same negated.

    Source: Tallec & Ollivier, "Can recurrent neural networks warp time?", 2018. A unit then forgets, and lets in,
    at a rate of about 1 / u. Input gates that begin almost closed are the 1997 paper's own, against states that drift.
    """
    bias = _log_uniform(module, longest, generator)
    hidden = len(bias)
    set_bias(module, 0, -bias)
    if _rows(module) == 4 * hidden:  # not the cell of 1997, which has no forget gate
        set_bias(module, hidden, bias)


def chrono_gru(module: nn.Module, longest: int, generator: Generator) -> None:
    """Update gates' biases log(u): z keeps, 1 - z lets in (Tallec & Ollivier 2018)."""
    bias = _log_uniform(module, longest, generator)
    set_bias(module, len(bias), bias)  # rows are r, z, n


def _log_uniform(module: nn.Module, longest: int, generator: Generator) -> Tensor:
    return torch.empty(int(module.hidden_size)).uniform_(1, longest - 1, generator=generator).log()  # type: ignore[arg-type]


def _rows(module: nn.Module) -> int:
    return module.get_parameter("bias_ih_l0").numel()


@torch.no_grad()
def set_bias(module: nn.Module, first: int, bias: Tensor) -> None:
    """Makes `bias` the sum of the two biases from row `first` on."""
    rows = slice(first, first + len(bias))
    module.get_parameter("bias_ih_l0")[rows] = bias
    module.get_parameter("bias_hh_l0")[rows] = 0


CELLS = {
    "rnn": Cell("tanh RNN", "#000000", "o", TritonRNN, as_made),
    "lstm1997": Cell("LSTM of 1997", "#009E73", "^", lambda i, h: TritonLSTM(i, h, forget_gate=False), chrono_lstm),
    "lstm": Cell("LSTM", "#D55E00", "s", TritonLSTM, chrono_lstm),
    "gru": Cell("GRU", "#0072B2", "D", TritonGRU, chrono_gru),
    "lstm-plain": Cell("LSTM, PyTorch's initialisation", "#CC79A7", "v", TritonLSTM, as_made, "--"),
}
