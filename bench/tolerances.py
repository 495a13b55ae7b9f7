"""The library's own table, by which it qualifies kernels on a GPU."""

from lstm_triton.tolerances import TOLERANCES

__all__ = ["TOLERANCES"]
