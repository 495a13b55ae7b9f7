"""`TritonRNNBase`: a module of recurrent layers of any cell, which the others and one's own derive from."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from lstm_triton import functional
from lstm_triton.cells.cell import Cell, of, register
from lstm_triton.dispatch import BACKENDS
from lstm_triton.functional import (
    Options,
    check_choice,
    check_lengths,
    check_probability,
    check_recompute,
    check_zoneout,
)
from lstm_triton.padding import pack, unpack
from lstm_triton.recurrence import present

States = Tensor | tuple[Tensor, Tensor]


class TritonRNNBase(nn.RNNBase):
    r"""Layers of a cell, as `torch.nn.RNNBase` has them of PyTorch's.

    For T time steps, batch size B, L layers, D directions, hidden size H and K = `proj_size` or H:

    Args:
        cell: what is done in a time step (`lstm_triton.cells.Cell`).
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device, dtype: as of `torch.nn.LSTM`. Not each cell has projections.
        recurrent_dropout: probability of an element of :math:`h_{t-1}` being zeroed before its
            product with `weight_hh`, in training; the h carried on is not dropped.
        recurrent_dropout_mode: "step", a fresh mask each time step, or "sequence", one for all
            time steps (Gal & Ghahramani, "A theoretically grounded application of dropout in
            recurrent neural networks", 2016).
        zoneout: probability of an element of h, and of c, staying what it was, one for both or a pair
            (of h, of c); in evaluation their expectation is taken (Krueger et al., "Zoneout", 2016).
            For cells that carry c, without projections.
        weight_dropout: probability of an element of `weight_hh` being zeroed, in training, for all time
            steps of a call (DropConnect; Merity et al., "Regularizing and optimizing LSTM language
            models", 2017).
        backend: "torch", PyTorch's own operator (cuDNN, oneDNN) where it has one; "eager", the
            recurrence in PyTorch operations with its backward by hand, on any device; "triton", our
            kernels; "auto", the best of them for the call.
        recompute: True, or a chunk length in time steps: training keeps inputs, outputs and the cell
            state at the chunks' borders, and rebuilds the gates in backward chunk by chunk, with the
            same dropout masks. True chooses a length whose gates take a few MiB (`explain` shows it);
            one longer than the sequence is all of it. By "torch" a chunk's forward is run again.

    Inputs: input, states, lengths
        - **input**: (T, B, input_size), with `batch_first` (B, T, input_size), unbatched
          (T, input_size), or a `torch.nn.utils.rnn.PackedSequence`; floating point.
        - **states**: h_0 (L * D, B, K), of a cell that carries c (h_0, c_0) with c_0 (L * D, B, H),
          unbatched without B. Default: zeros.
        - **lengths**: B integers from 1 to T in any order, as a list or a tensor on the CPU: how many time
          steps of a padded batch each row has. As if the batch was packed: outputs and gradients past a
          row's end are zero, the final states are those of its last step. Default: all have T.

    Outputs: output, states
        - **output**: as the input, with D * K in place of input_size.
        - **states**: the final ones, shaped as the initial ones.

    Parameters: for layer l, with the suffix _reverse for the second direction, `weight_ih_l{l}`
    (G_i H, input_size or D * K), `weight_hh_l{l}` (G_h H, K), with `bias` `bias_ih_l{l}` (G_i H) and
    `bias_hh_l{l}` (G_b H), with projections `weight_hr_l{l}` (K, H), and those of the cell.

    Raises:
        TypeError, ValueError: an argument of the constructor, or `lengths`, has a wrong type or value.
        RuntimeError, ValueError: an input has a wrong shape, dtype or device, as of `torch.nn.LSTM`.
    """

    __constants__ = [
        *nn.RNNBase.__constants__, "recurrent_dropout", "recurrent_dropout_mode", "zoneout", "weight_dropout",
        "backend", "recompute",
    ]  # fmt: skip

    cell: Cell
    recurrent_dropout: float
    recurrent_dropout_mode: str
    zoneout: tuple[float, float]
    weight_dropout: float
    backend: str
    recompute: bool | int
    _name = "RNN"  # in errors

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_mode: str = "step",
        zoneout: float | tuple[float, float] = 0.0,
        weight_dropout: float = 0.0,
        backend: str = "auto",
        recompute: bool | int = False,
    ) -> None:
        if not isinstance(cell, Cell):
            raise TypeError(f"cell should be a lstm_triton.cells.Cell, got {type(cell).__name__}")
        for name, value in (("num_layers", num_layers), ("proj_size", proj_size)):
            if not isinstance(value, int):
                raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
        check_probability("recurrent_dropout", recurrent_dropout)
        check_choice("recurrent_dropout_mode", recurrent_dropout_mode, functional.MODES)
        zones = check_zoneout(zoneout)
        check_probability("weight_dropout", weight_dropout)
        check_choice("backend", backend, BACKENDS)
        check_recompute(recompute)
        lacks = {
            "recurrent dropout": recurrent_dropout > 0, "zoneout": zones != (0.0, 0.0),
            f"cell {cell.name!r}": cell.operator is None,
        }  # fmt: skip
        for what, asked in lacks.items():
            if backend == "torch" and asked:
                raise ValueError(f"backend='torch' has no {what}; use 'auto', 'eager' or 'triton'")
        if proj_size and cell.output_torch is None:
            raise ValueError(f"cell {cell.name!r} has no projections, got proj_size={proj_size}")
        if zones != (0.0, 0.0) and not cell.carries:
            raise ValueError(f"zoneout goes with cells that carry c, got {zoneout} with {cell.name!r}")
        if proj_size and zones != (0.0, 0.0):
            raise ValueError(f"zoneout doesn't go with projections, got zoneout={zoneout} and proj_size={proj_size}")
        self.cell = register(cell)
        self.recurrent_dropout = float(recurrent_dropout)
        self.recurrent_dropout_mode = recurrent_dropout_mode
        self.zoneout = zones
        self.weight_dropout = float(weight_dropout)
        self.backend = backend
        self.recompute = recompute
        own = cell.operator is None  # parameters of other shapes than PyTorch knows
        super().__init__(
            "LSTM" if cell.operator is None else cell.operator.upper(), input_size, hidden_size, num_layers, bias,
            batch_first, dropout, bidirectional, proj_size, device="meta" if own else device, dtype=dtype,
        )  # fmt: skip
        if own:
            self.mode = cell.name
            self._make_parameters(device, dtype)

    def _make_parameters(self, device: Any, dtype: torch.dtype | None) -> None:
        """In place of an LSTM's those of the cell."""
        cell, H, given = self.cell, self.hidden_size, list(self._all_weights)
        rows = {
            "weight_ih": cell.inputs, "weight_hh": len(cell.recurrent), "bias_ih": cell.inputs,
            "bias_hh": len(cell.biases),
        }  # fmt: skip
        self._flat_weights_names, self._all_weights = [], []
        for names in given:
            suffix = names[0].removeprefix("weight_ih")
            shapes = {}
            for name in names:
                shape = list(self._parameters[name].shape)  # type: ignore[union-attr]
                shape[0] = rows.get(name.removesuffix(suffix), 0) * H or shape[0]
                shapes[name] = shape
            shapes |= {p.name + suffix: [p.vectors * H] for p in present(cell, self.bias)}
            for name, shape in shapes.items():
                self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
            self._flat_weights_names += shapes
            self._all_weights.append(list(shapes))
        self._init_flat_weights()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        initial = {p.name: p.initial for p in self.cell.parameters}
        for name, weight in self.named_parameters(recurse=False):
            value = initial.get(name.rsplit("_l", 1)[0])
            if value is not None:
                nn.init.constant_(weight, value)

    def flatten_parameters(self) -> None:
        if self.cell.operator is not None:
            super().flatten_parameters()

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.recurrent_dropout:
            text += f", recurrent_dropout={self.recurrent_dropout}"
            if self.recurrent_dropout_mode != "step":
                text += f", recurrent_dropout_mode={self.recurrent_dropout_mode!r}"
        if self.zoneout != (0.0, 0.0):
            text += f", zoneout={self.zoneout}"
        if self.weight_dropout:
            text += f", weight_dropout={self.weight_dropout}"
        if self.backend != "auto":
            text += f", backend={self.backend!r}"
        if self.recompute:
            text += f", recompute={self.recompute}"
        return text

    def _update_flat_weights(self) -> None:
        # As in RNNBase where a weight isn't the parameter that it was; that nothing has changed is seen faster here.
        parameters = self._parameters
        for name, weight in zip(self._flat_weights_names, self._flat_weights, strict=False):
            if parameters.get(name) is not weight:
                super()._update_flat_weights()
                return

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, Any]:
        self._update_flat_weights()
        if lengths is not None:
            packed, places = self._pack(input, lengths)
            output, states = self.forward(packed, hx)
            assert isinstance(input, Tensor)
            return unpack(output.data, places, input.shape[:2]), states
        given = self._states(hx)
        if isinstance(input, PackedSequence):
            data, batch_sizes, order, restore = input
            if given is not None and order is not None:
                given = [x.index_select(1, order) for x in given]
            output, *states = self._run(data, batch_sizes, given, int(batch_sizes[0]) if given is None else 0)
            if restore is not None:
                states = [x.index_select(1, restore) for x in states]
            return PackedSequence(output, batch_sizes, order, restore), self._joined(states)

        dims = input.dim()
        if dims not in (2, 3):
            kind = "" if self.cell.carries else " tensor" if self._name == "RNN" else ""
            raise ValueError(f"{self._name}: Expected input to be 2D or 3D, got {dims}D{kind} instead")
        if given is not None and any(x.dim() != dims for x in given):
            form = "batched 3-D" if dims == 3 else "unbatched 2-D"
            if self.cell.carries:
                found = f"hx and cx should also be {dims}-D but got ({given[0].dim()}-D, {given[1].dim()}-D) tensors"
            else:
                found = f"hx should also be {dims}-D but got {given[0].dim()}-D tensor"
            raise RuntimeError(f"For {form} input, {found}")
        batch_dim = 0 if self.batch_first else 1
        if dims == 3:
            output, *states = self._run(input, None, given, input.size(batch_dim))
            return output, self._joined(states)
        if given is not None:
            given = [x.unsqueeze(1) for x in given]
        output, *states = self._run(input.unsqueeze(batch_dim), None, given, 1)
        return output.squeeze(batch_dim), self._joined([x.squeeze(1) for x in states])

    def _states(self, hx: States | None) -> list[Tensor] | None:
        """The states that a call was given, one or two."""
        if hx is None:
            return None
        return [hx[0], hx[1]] if self.cell.carries else [hx]  # type: ignore[list-item]

    def _joined(self, states: list[Tensor]) -> Any:
        """The states as a call returns them."""
        return (states[0], states[1]) if self.cell.carries else states[0]

    def explain(self, input: Tensor | PackedSequence, lengths: Tensor | Sequence[int] | None = None) -> str:
        """How a call with this input would run here and now, and why: backend, plan and memory, in a few lines.

        Args:
            input, lengths: as of a call; nothing is computed. With gradients enabled it is taken for training.

        Raises:
            RuntimeError, ValueError: as of a call.
        """
        self._update_flat_weights()
        if lengths is not None:
            input, _ = self._pack(input, lengths)
        batch_sizes, dense = None, input
        if isinstance(input, PackedSequence):
            dense, batch_sizes = input.data, input.batch_sizes
            batch = int(batch_sizes[0])
        else:
            batch_dim = 0 if self.batch_first else 1
            dense = input if input.dim() == 3 else input.unsqueeze(batch_dim)
            batch = dense.size(batch_dim)
        self.check_input(dense, batch_sizes)
        count = self.num_layers * (2 if self.bidirectional else 1)
        hx = dense.new_empty(count, batch, self.proj_size or self.hidden_size)
        cx = dense.new_empty(count, batch, self.hidden_size)
        return functional.explain(dense, batch_sizes, (hx, cx), self._weights(), self._options())  # type: ignore[arg-type]

    def _pack(self, input: Tensor | PackedSequence, lengths: Tensor | Sequence[int]) -> tuple[PackedSequence, Tensor]:
        """A padded batch without its padding, and where its rows are."""
        if isinstance(input, PackedSequence) or input.dim() != 3:
            given = "a PackedSequence" if isinstance(input, PackedSequence) else f"{input.dim()}-D input"
            raise ValueError(f"lengths goes with a padded batch (3-D input), got it with {given}")
        batch, steps = input.shape[:2] if self.batch_first else (input.size(1), input.size(0))
        return pack(input, check_lengths(lengths, batch, steps), self.batch_first)

    def _weights(self) -> list[Tensor]:
        """The weights of a call, those of h with their dropout."""
        weights: list[Tensor] = self._flat_weights  # type: ignore[assignment]
        if self.weight_dropout == 0 or not self.training:
            return weights
        names = self._flat_weights_names
        return [
            F.dropout(w, self.weight_dropout) if name.startswith("weight_hh") else w
            for name, w in zip(names, weights, strict=True)
        ]

    def _options(self) -> Options:
        return Options(
            self.num_layers, self.bias, self.dropout, self.training, self.bidirectional, self.batch_first,
            self.recurrent_dropout, self.recurrent_dropout_mode, self.backend, self.recompute, self.cell.name,
            self.zoneout,
        )  # fmt: skip

    def _run(
        self, input: Tensor, batch_sizes: Tensor | None, hx: list[Tensor] | None, batch: int
    ) -> tuple[Tensor, ...]:
        """Output and final states of a batched input; `hx` None stands for zeros."""
        self.check_input(input, batch_sizes)
        if hx is None:
            count = self.num_layers * (2 if self.bidirectional else 1)
            c = input.new_zeros(count, batch, self.hidden_size)
            states = (input.new_zeros(count, batch, self.proj_size) if self.proj_size else c, c)
        else:
            states = (hx[0], hx[-1])
            if batch_sizes is None or not torch.compiler.is_compiling():  # a trace doesn't know a packed batch's B
                expected = self.get_expected_hidden_size(input, batch_sizes)
                if self.cell.carries:
                    self.check_hidden_size(hx[0], expected, "Expected hidden[0] size {}, got {}")
                    expected = (*expected[:2], self.hidden_size)
                    self.check_hidden_size(hx[1], expected, "Expected hidden[1] size {}, got {}")
                else:
                    self.check_hidden_size(hx[0], expected)
        found = functional.run(input, batch_sizes, states, self._weights(), self._options())
        return found if self.cell.carries else found[:2]

    def __setstate__(self, state: dict[str, Any]) -> None:
        defaults = {
            "recurrent_dropout": 0.0, "recurrent_dropout_mode": "step", "zoneout": (0.0, 0.0), "weight_dropout": 0.0,
            "backend": "auto", "recompute": False, "cell": of("lstm"),
        }  # fmt: skip
        super().__setstate__(defaults | state)
