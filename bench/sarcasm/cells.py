"""The cells that the published recipe runs with, by the names of `--cell`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lstm_triton import TritonGRU, TritonLSTM, TritonRNN, TritonRNNBase

LSTM = "lstm"  # the recipe's own


@dataclass(frozen=True)
class Cell:
    """One line of the comparison.

    module: the class; options: its arguments beyond the recipe's.
    source: whose cell it is; note: what is other than in the published recipe.
    """

    module: Callable[..., TritonRNNBase]
    source: str
    note: str
    options: Mapping[str, Any] = field(default_factory=dict)


CELLS: dict[str, Cell] = {
    LSTM: Cell(TritonLSTM, "Gers et al. 2000", "the published recipe itself"),
    "rnn": Cell(TritonRNN, "Elman 1990", "tanh; no gates, and no c"),
    "gru": Cell(
        TritonGRU,
        "Cho et al. 2014",
        "the reset gate after the product, as PyTorch has it; no c: z carries h, which dropout leaves alone there",
    ),
    "lstm-1997": Cell(
        TritonLSTM, "Hochreiter & Schmidhuber 1997", "no forget gate: c keeps all it holds", {"forget_gate": False}
    ),
    "layer-norm": Cell(
        TritonLSTM,
        "Ba et al. 2016",
        "norms of both products and of c; the recipe has no gains: they begin at 1",
        {"layer_norm": True},
    ),
    "peephole": Cell(
        TritonLSTM,
        "Gers & Schmidhuber 2000",
        "the recipe has no peepholes: they begin as the module's, uniform within ± 1 / √32",
        {"peephole": True},
    ),
    "coupled": Cell(TritonLSTM, "Greff et al. 2015 (CIFG)", "no input gate: i = 1 − f", {"coupled_gates": True}),
    "zoneout": Cell(
        TritonLSTM,
        "Krueger et al. 2016",
        "0.05 of h and 0.5 of c, as the authors' code has it for Penn Treebank; beside the recipe's recurrent dropout",
        {"zoneout": (0.05, 0.5)},
    ),
    "weight-dropout": Cell(
        TritonLSTM,
        "Merity et al. 2017",
        "0.5 of `weight_hh`, a mask a batch; beside the recipe's recurrent dropout",
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
) -> TritonRNNBase:
    """The layers of a cell, batch first; arguments as of `TritonLSTM`.

    Raises:
        ValueError, RuntimeError: the module refuses the backend.
    """
    chosen = CELLS[cell]
    return chosen.module(
        input_size, hidden_size, num_layers, batch_first=True, recurrent_dropout=recurrent_dropout, backend=backend,
        **chosen.options,
    )  # fmt: skip
