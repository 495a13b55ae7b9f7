"""`TritonLSTM`: what `torch.nn.LSTM` is, with more ways to run and recurrent dropout."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lstm_triton import functional
from lstm_triton.dispatch import BACKENDS
from lstm_triton.functional import Options, check_choice, check_lengths, check_probability, check_recompute
from lstm_triton.padding import pack, unpack


class TritonLSTM(nn.RNNBase):
    r"""A drop-in `torch.nn.LSTM`: same arguments, inputs, outputs, parameters and state_dict.

    For T time steps, batch size B, L layers, D directions, hidden size H and K = `proj_size` or H:

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device, dtype: as of `torch.nn.LSTM`.
        recurrent_dropout: probability of an element of :math:`h_{t-1}` being zeroed before its
            product with `weight_hh`, in training; the h carried on is not dropped.
        recurrent_dropout_mode: "step", a fresh mask each time step, or "sequence", one for all
            time steps (Gal & Ghahramani, "A theoretically grounded application of dropout in
            recurrent neural networks", 2016).
        backend: "torch", PyTorch's own operator (cuDNN, oneDNN); "eager", the recurrence in
            PyTorch operations with its backward by hand, on any device; "triton", our kernels;
            "auto", the best of them for the call.
        recompute: True, or a chunk length in time steps: training keeps inputs, outputs and the cell
            state at the chunks' borders, and rebuilds the gates in backward chunk by chunk, with the
            same dropout masks. True chooses a length whose gates take a few MiB (`explain` shows it);
            one longer than the sequence is all of it. By "torch" a chunk's forward is run again.

    Inputs: input, (h_0, c_0), lengths
        - **input**: (T, B, input_size), with `batch_first` (B, T, input_size), unbatched
          (T, input_size), or a `torch.nn.utils.rnn.PackedSequence`; floating point.
        - **h_0**: (L * D, B, K) and **c_0**: (L * D, B, H), unbatched without B. Default: zeros.
        - **lengths**: B integers from 1 to T in any order, as a list or a tensor on the CPU: how many time
          steps of a padded batch each row has. As if the batch was packed: outputs and gradients past a
          row's end are zero, h_n and c_n are those of its last step. Default: all have T.

    Outputs: output, (h_n, c_n)
        - **output**: as the input, with D * K in place of input_size.
        - **h_n**, **c_n**: shaped as h_0 and c_0.

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

    __constants__ = [*nn.RNNBase.__constants__, "recurrent_dropout", "recurrent_dropout_mode", "backend", "recompute"]

    recurrent_dropout: float
    recurrent_dropout_mode: str
    backend: str
    recompute: bool | int

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
        backend: str = "auto",
        recompute: bool | int = False,
    ) -> None:
        for name, value in (("num_layers", num_layers), ("proj_size", proj_size)):
            if not isinstance(value, int):
                raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
        check_probability("recurrent_dropout", recurrent_dropout)
        check_choice("recurrent_dropout_mode", recurrent_dropout_mode, functional.MODES)
        check_choice("backend", backend, BACKENDS)
        check_recompute(recompute)
        if backend == "torch" and recurrent_dropout > 0:
            raise ValueError("backend='torch' has no recurrent dropout; use 'auto', 'eager' or 'triton'")
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.recurrent_dropout = float(recurrent_dropout)
        self.recurrent_dropout_mode = recurrent_dropout_mode
        self.backend = backend
        self.recompute = recompute

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.recurrent_dropout:
            text += f", recurrent_dropout={self.recurrent_dropout}"
            if self.recurrent_dropout_mode != "step":
                text += f", recurrent_dropout_mode={self.recurrent_dropout_mode!r}"
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
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        self._update_flat_weights()
        if lengths is not None:
            packed, places = self._pack(input, lengths)
            output, states = self.forward(packed, hx)
            assert isinstance(input, Tensor)
            return unpack(output.data, places, input.shape[:2]), states
        if isinstance(input, PackedSequence):
            data, batch_sizes, order, restore = input
            if hx is not None and order is not None:
                hx = (hx[0].index_select(1, order), hx[1].index_select(1, order))
            output, hn, cn = self._run(data, batch_sizes, hx, int(batch_sizes[0]) if hx is None else 0)
            if restore is not None:
                hn, cn = hn.index_select(1, restore), cn.index_select(1, restore)
            return PackedSequence(output, batch_sizes, order, restore), (hn, cn)

        dims = input.dim()
        if dims not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {dims}D instead")
        if hx is not None and (hx[0].dim() != dims or hx[1].dim() != dims):
            raise RuntimeError(
                f"For {'batched 3-D' if dims == 3 else 'unbatched 2-D'} input, hx and cx should also be {dims}-D "
                f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )
        batch_dim = 0 if self.batch_first else 1
        if dims == 3:
            output, hn, cn = self._run(input, None, hx, input.size(batch_dim))
            return output, (hn, cn)
        if hx is not None:
            hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        output, hn, cn = self._run(input.unsqueeze(batch_dim), None, hx, 1)
        return output.squeeze(batch_dim), (hn.squeeze(1), cn.squeeze(1))

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
        return functional.explain(dense, batch_sizes, (hx, cx), self._flat_weights, self._options())  # type: ignore[arg-type]

    def _pack(self, input: Tensor | PackedSequence, lengths: Tensor | Sequence[int]) -> tuple[PackedSequence, Tensor]:
        """A padded batch without its padding, and where its rows are."""
        if isinstance(input, PackedSequence) or input.dim() != 3:
            given = "a PackedSequence" if isinstance(input, PackedSequence) else f"{input.dim()}-D input"
            raise ValueError(f"lengths goes with a padded batch (3-D input), got it with {given}")
        batch, steps = input.shape[:2] if self.batch_first else (input.size(1), input.size(0))
        return pack(input, check_lengths(lengths, batch, steps), self.batch_first)

    def _options(self) -> Options:
        return Options(
            self.num_layers, self.bias, self.dropout, self.training, self.bidirectional, self.batch_first,
            self.recurrent_dropout, self.recurrent_dropout_mode, self.backend, self.recompute,
        )  # fmt: skip

    def _run(
        self, input: Tensor, batch_sizes: Tensor | None, hx: tuple[Tensor, Tensor] | None, batch: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output and final states of a batched input; `hx` None stands for zeros."""
        self.check_input(input, batch_sizes)
        if hx is None:
            count = self.num_layers * (2 if self.bidirectional else 1)
            c = input.new_zeros(count, batch, self.hidden_size)
            hx = (input.new_zeros(count, batch, self.proj_size) if self.proj_size else c, c)
        elif batch_sizes is None or not torch.compiler.is_compiling():  # a trace doesn't know a packed batch's B
            expected = self.get_expected_hidden_size(input, batch_sizes)
            self.check_hidden_size(hx[0], expected, "Expected hidden[0] size {}, got {}")
            expected = (*expected[:2], self.hidden_size)
            self.check_hidden_size(hx[1], expected, "Expected hidden[1] size {}, got {}")
        return functional.run(input, batch_sizes, hx, self._flat_weights, self._options())  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        defaults = {"recurrent_dropout": 0.0, "recurrent_dropout_mode": "step", "backend": "auto", "recompute": False}
        super().__setstate__(defaults | state)
