"""LSTMs for PyTorch: a drop-in `torch.nn.LSTM` on Triton kernels, with recurrent dropout."""

from lstm_triton import functional
from lstm_triton.module import TritonLSTM
from lstm_triton.swap import convert, revert

__all__ = ["TritonLSTM", "convert", "functional", "revert"]
__version__ = "0.1.0"
