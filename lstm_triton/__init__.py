"""LSTMs for PyTorch: a drop-in `torch.nn.LSTM` on Triton kernels, with recurrent dropout."""

from lstm_triton import functional
from lstm_triton.gpu.report import plan
from lstm_triton.module import TritonLSTM
from lstm_triton.swap import convert, revert

__all__ = ["TritonLSTM", "convert", "functional", "plan", "revert"]
__version__ = "0.1.0"
