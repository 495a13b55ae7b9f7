"""What is compared: ways to run one and the same LSTM."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.shapes import Shape
from lstm_triton import TritonLSTM, dispatch

REFERENCE = "nn.LSTM"
LOOP = "loop"
AUTO = "TritonLSTM-auto"
RECOMPUTE = "TritonLSTM-recompute"
# What TritonLSTM is told.
OPTIONS: dict[str, dict[str, Any]] = {
    **{f"TritonLSTM-{backend}": {"backend": backend} for backend in ("auto", "torch", "eager", "triton")},
    RECOMPUTE: {"backend": "auto", "recompute": True},
}
# Those whose arithmetic is this project's.
OWN = ("TritonLSTM-eager", "TritonLSTM-triton")
# Where memory is compared, and where speed is: recomputing changes what is kept, at the price of some speed.
OF_MEMORY = (REFERENCE, *OPTIONS, LOOP)
PROVIDERS = tuple(name for name in OF_MEMORY if name != RECOMPUTE)


def available(device: torch.device, wanted: Sequence[str] = PROVIDERS) -> list[str]:
    """Those that run on `device`. Kernels in Triton's interpreter say nothing about speed: never timed."""
    triton_runs = dispatch.has_triton() if device.type == "cuda" else dispatch.has_native()
    return [name for name in wanted if name != "TritonLSTM-triton" or triton_runs]


def label(provider: str, device_type: str, hip: bool = False) -> str:
    """How plots and tables call a provider."""
    if provider == REFERENCE:
        library = ("MIOpen" if hip else "cuDNN") if device_type == "cuda" else "oneDNN"
        return f"nn.LSTM ({library})"
    if provider == LOOP:
        return "per-step loop"
    options = OPTIONS[provider]
    return f"TritonLSTM ({options['backend']}{', recompute' if options.get('recompute') else ''})"


class LoopLSTM(nn.Module):
    """The LSTM as users write it where `nn.LSTM` lacks something: an `nn.LSTMCell` called at each step."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.hidden_size, self.directions = lstm.hidden_size, 2 if lstm.bidirectional else 1
        self.cells = nn.ModuleList()
        for layer in range(lstm.num_layers):
            for suffix in ("", "_reverse")[: self.directions]:
                w_ih, w_hh, b_ih, b_hh = (
                    getattr(lstm, f"{kind}_l{layer}{suffix}").detach()
                    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                )
                cell = nn.LSTMCell(w_ih.size(1), w_hh.size(1), device=w_ih.device, dtype=w_ih.dtype)
                cell.load_state_dict({"weight_ih": w_ih, "weight_hh": w_hh, "bias_ih": b_ih, "bias_hh": b_hh})
                self.cells.append(cell)

    def forward(self, input: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        hn, cn = [], []
        for k in range(0, len(self.cells), self.directions):
            outputs = []
            for reverse, cell in enumerate(self.cells[k : k + self.directions]):
                h = c = input.new_zeros(input.size(1), self.hidden_size)
                steps = []
                for x in reversed(input) if reverse else input:
                    h, c = cell(x, (h, c))
                    steps.append(h)
                outputs.append(torch.stack(steps[::-1] if reverse else steps))
                hn.append(h)
                cn.append(c)
            input = torch.cat(outputs, -1)
        return input, (torch.stack(hn), torch.stack(cn))


def reference(shape: Shape, device: torch.device) -> nn.LSTM:
    """The `nn.LSTM` whose weights every provider takes; the same for each call with the same shape."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lstm = nn.LSTM(shape.hidden, shape.hidden, shape.layers, bidirectional=shape.directions == 2)
    return lstm.to(device, shape.torch_dtype)


def make(provider: str, lstm: nn.LSTM) -> nn.Module:
    """The provider's module with the weights of `lstm` (its own copy of them)."""
    if provider == LOOP:
        return LoopLSTM(lstm)
    weight = next(lstm.parameters())
    options: dict[str, Any] = {
        "input_size": lstm.input_size,
        "hidden_size": lstm.hidden_size,
        "num_layers": lstm.num_layers,
        "bidirectional": lstm.bidirectional,
        "device": weight.device,
        "dtype": weight.dtype,
    }
    module = nn.LSTM(**options) if provider == REFERENCE else TritonLSTM(**options, **OPTIONS[provider])
    module.load_state_dict(lstm.state_dict())
    return module
