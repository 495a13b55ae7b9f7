"""The Triton kernels, each file with one strategy's pass and, under the kernel, its launcher.

Imported as `lstm_triton.kernels`, on first use only: `TRITON_INTERPRET` is read at that moment.
"""

from lstm_triton.kernels import cooperative, cooperative_backward, dropout, persistent, rebuild, step
from lstm_triton.kernels.blocks import INTERPRETED
from lstm_triton.kernels.launch import Front, Launch

STRATEGIES = {"persistent": persistent, "cooperative": cooperative, "step": step}

__all__ = [
    "INTERPRETED", "STRATEGIES", "Front", "Launch", "cooperative", "cooperative_backward", "dropout", "persistent",
    "rebuild", "step",
]  # fmt: skip
