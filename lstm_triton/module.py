"""`TritonLSTM`, `TritonRNN`, `TritonGRU`: what `torch.nn` has, with more ways to run, dropouts and variants."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lstm_triton.base import TritonRNNBase
from lstm_triton.cells.cell import of


class TritonLSTM(TritonRNNBase):
    r"""A drop-in `torch.nn.LSTM`: same arguments, inputs, outputs, parameters and state_dict; and its variants.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device, dtype: as of `torch.nn.LSTM`.
        recurrent_dropout, recurrent_dropout_mode, zoneout, weight_dropout, backend, recompute: as of
            `TritonRNNBase`.
        layer_norm: over the products with input and h and over c before its tanh, with learned gains
            `gain_ih_l{l}`, `gain_hh_l{l}` (G * H,), `gain_c_l{l}` and `bias_c_l{l}` (H,), G the number of
            gates; the products' biases are bias_ih and bias_hh (Ba, Kiros & Hinton, "Layer
            normalization", 2016, equations 20 to 22). Not with `peephole`.
        peephole: the gates see c, by `weight_ch_l{l}` ((G - 1) * H,) in the order i, f, o of those that
            there are (Gers & Schmidhuber, "Recurrent nets that time and count", 2000).
        coupled_gates: :math:`i = 1 - f` (CIFG; Greff et al., "LSTM: a search space odyssey", 2015); the
            gates are f, g, o, in this order in weights and biases.
        forget_gate: False for the cell of 1997, whose c keeps all it holds; the gates are i, g, o. Not with
            `coupled_gates`.
        forget_bias: what the forget gate's biases, bias_ih and bias_hh together, begin with; None: as
            PyTorch draws them.

    Inputs: input, (h_0, c_0), lengths, and outputs: output, (h_n, c_n), as of `TritonRNNBase`.

    To carry the states from one part of a sequence to the next (streaming), pass (h_n, c_n) as the next
    (h_0, c_0): detached, gradients stop there (truncated backpropagation); as they are, they go on
    through all parts.

    Raises:
        TypeError, ValueError: an argument of the constructor, or `lengths`, has a wrong type or value.
        RuntimeError, ValueError: an input has a wrong shape, dtype or device, as of `torch.nn.LSTM`.

    Where it differs: `isinstance(module, torch.nn.LSTM)` is False, since `torch.compile` refuses
    every instance of that class. `lstm_triton.revert` makes the module a `torch.nn.LSTM`.

    Source: Hochreiter & Schmidhuber, "Long short-term memory", 1997; Sak et al. 2014 (projections).
    """

    _name = "LSTM"
    forget_bias: float | None

    def __init__(
        self,
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
        layer_norm: bool = False,
        peephole: bool = False,
        coupled_gates: bool = False,
        forget_gate: bool = True,
        zoneout: float | tuple[float, float] = 0.0,
        weight_dropout: float = 0.0,
        forget_bias: float | None = None,
        backend: str = "auto",
        recompute: bool | int = False,
    ) -> None:
        switches = (
            ("layer_norm", layer_norm), ("peephole", peephole), ("coupled_gates", coupled_gates),
            ("forget_gate", forget_gate),
        )  # fmt: skip
        for name, value in switches:
            if not isinstance(value, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
        if layer_norm and peephole:
            raise ValueError("layer_norm and peephole don't go together, got True for both")
        if coupled_gates and not forget_gate:
            raise ValueError("coupled_gates couples the input gate to the forget gate, got it with forget_gate=False")
        if forget_bias is not None:
            if isinstance(forget_bias, bool) or not isinstance(forget_bias, (int, float)):
                raise TypeError(f"forget_bias should be a number or None, got {forget_bias!r}")
            if not forget_gate or not bias:
                lacks = "biases, bias=False" if forget_gate else "forget gate, forget_gate=False"
                raise ValueError(f"forget_bias={forget_bias} is for a layer that has no {lacks}")
        self.forget_bias = forget_bias
        kind = "coupled" if coupled_gates else "full" if forget_gate else "carousel"
        from lstm_triton.cells.lstm import variant  # not before a module is made: it imports Triton

        super().__init__(
            variant(kind, peephole, layer_norm), input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, proj_size,
            device, dtype, recurrent_dropout=recurrent_dropout, recurrent_dropout_mode=recurrent_dropout_mode,
            zoneout=zoneout, weight_dropout=weight_dropout, backend=backend, recompute=recompute,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.forget_bias is None:
            return
        at = self.cell.saved.index("f") * self.hidden_size  # gates are kept in the order of the sums
        for name, bias in self.named_parameters(recurse=False):
            if name.startswith("bias_ih") or name.startswith("bias_hh"):
                value = self.forget_bias if name.startswith("bias_ih") else 0.0
                nn.init.constant_(bias[at : at + self.hidden_size], value)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for option in ("layer_norm", "peephole", "coupled_gates"):
            text += f", {option}=True" if getattr(self, option) else ""
        return text + (", forget_gate=False" if not self.forget_gate else "")

    @property
    def layer_norm(self) -> bool:
        return self.cell.input_norm is not None

    @property
    def peephole(self) -> bool:
        return any(p.name == "weight_ch" for p in self.cell.parameters)

    @property
    def forget_gate(self) -> bool:
        return "f" in self.cell.saved

    @property
    def coupled_gates(self) -> bool:
        return "i" not in self.cell.saved

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        return super().forward(input, hx, lengths)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"forget_bias": None} | state)


class TritonRNN(TritonRNNBase):
    r"""A drop-in `torch.nn.RNN`, :math:`h_t = \tanh` or relu :math:`(W_{ih} x_t + W_{hh} h_{t-1} + b)`.

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional,
            device, dtype: as of `torch.nn.RNN`.
        recurrent_dropout, recurrent_dropout_mode, weight_dropout, backend, recompute: as of `TritonRNNBase`.

    Inputs: input, h_0, lengths, outputs: output, h_n, and errors as of `TritonRNNBase`.

    Source: Elman, "Finding structure in time", 1990.
    """

    _name = "RNN"
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_mode: str = "step",
        weight_dropout: float = 0.0,
        backend: str = "auto",
        recompute: bool | int = False,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(
            of(f"rnn-{nonlinearity}"), input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            0, device, dtype, recurrent_dropout=recurrent_dropout, recurrent_dropout_mode=recurrent_dropout_mode,
            weight_dropout=weight_dropout, backend=backend, recompute=recompute,
        )  # fmt: skip

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        return super().forward(input, hx, lengths)


class TritonGRU(TritonRNNBase):
    r"""A drop-in `torch.nn.GRU`, whose reset gate is on the product with h, as cuDNN's.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as of
            `torch.nn.GRU`.
        recurrent_dropout, recurrent_dropout_mode, weight_dropout, backend, recompute: as of `TritonRNNBase`.

    Inputs: input, h_0, lengths, outputs: output, h_n, and errors as of `TritonRNNBase`.

    Source: Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014.
    """

    _name = "GRU"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_mode: str = "step",
        weight_dropout: float = 0.0,
        backend: str = "auto",
        recompute: bool | int = False,
    ) -> None:
        super().__init__(
            of("gru"), input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device,
            dtype, recurrent_dropout=recurrent_dropout, recurrent_dropout_mode=recurrent_dropout_mode,
            weight_dropout=weight_dropout, backend=backend, recompute=recompute,
        )  # fmt: skip

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        return super().forward(input, hx, lengths)
