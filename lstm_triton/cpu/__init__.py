"""The project's Triton kernels, run natively on the CPU.

A kernel goes through Triton's own frontend to TTIR (`frontend`, `ir`), is rid of padding (`trim`), and goes from there
to C (`lower`, `operations`, `kernel.h`, `program.h`), through the system's C compiler (`build`) and onto threads
(`runtime`). Covers what the project's kernels use and says what it lacks: it is no general port of Triton.
"""

from lstm_triton.cpu.native import launch

__all__ = ["launch"]
