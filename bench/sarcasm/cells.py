"""The cells that the published recipe runs with, by the names of `--cell`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import lstm_triton

LSTM = "lstm"  # the recipe's own


@dataclass(frozen=True)
class Cell:
    """One line of the comparison.

    module: the class of `lstm_triton`; options: its arguments beyond the recipe's.
    source: whose cell it is; note: what is other than in the published recipe.
    """

    module: str
    source: str
    note: str
    options: Mapping[str, Any] = field(default_factory=dict)


CELLS: dict[str, Cell] = {
    LSTM: Cell("TritonLSTM", "Gers et al. 2000", "the published recipe itself"),
    "rnn": Cell(
        "TritonRNN",
        "Elman 1990",
        "tanh; no gates and no cell state, the rest of the recipe (two biases, dropout on h) as it is",
    ),
    "gru": Cell(
        "TritonGRU",
        "Cho et al. 2014",
        "PyTorch's form, with the reset gate after the product; no cell state; dropout on h before its product, "
        "while the update gate carries h undropped",
    ),
    "lstm-1997": Cell(
        "TritonLSTM", "Hochreiter & Schmidhuber 1997", "no forget gate: c only adds up", {"forget_gate": False}
    ),
    "layer-norm": Cell(
        "TritonLSTM",
        "Ba et al. 2016",
        "the recipe says nothing of the norms' gains: they begin as the module has them, at 1",
        {"layer_norm": True},
    ),
    "peephole": Cell(
        "TritonLSTM",
        "Gers & Schmidhuber 2000",
        "the recipe says nothing of the peepholes, which are vectors: they begin as the module has them",
        {"peephole": True},
    ),
    "coupled": Cell("TritonLSTM", "Greff et al. 2017 (CIFG)", "i = 1 − f", {"coupled_gates": True}),
    "zoneout": Cell(
        "TritonLSTM",
        "Krueger et al. 2016",
        "p_h = 0.05, p_c = 0.5, as the authors' code has it for words; on top of the recipe's recurrent dropout",
        {"zoneout": (0.05, 0.5)},
    ),
    "weight-dropout": Cell(
        "TritonLSTM",
        "Merity et al. 2018",
        "0.5 of `weight_hh`; on top of the recipe's recurrent dropout",
        {"weight_dropout": 0.5},
    ),
}


def build(
    cell: str,
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    *,
    recurrent_dropout: float = 0.0,
    backend: str = "auto",
) -> nn.RNNBase:
    """The layers of a cell, batch first; arguments as of `TritonLSTM`.

    Raises:
        ValueError, RuntimeError: the module refuses the backend.
    """
    chosen = CELLS[cell]
    return getattr(lstm_triton, chosen.module)(
        input_size, hidden_size, num_layers, batch_first=True, recurrent_dropout=recurrent_dropout, backend=backend,
        **chosen.options,
    )  # fmt: skip
