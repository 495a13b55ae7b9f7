"""Recurrent networks for PyTorch on Triton kernels: drop-in LSTM, GRU and RNN, variants, and cells of one's own."""

from lstm_triton import functional
from lstm_triton.base import TritonRNNBase
from lstm_triton.gpu.report import plan
from lstm_triton.module import TritonGRU, TritonLSTM, TritonRNN
from lstm_triton.swap import convert, revert

__all__ = ["TritonGRU", "TritonLSTM", "TritonRNN", "TritonRNNBase", "convert", "functional", "plan", "revert"]
__version__ = "0.1.0"
