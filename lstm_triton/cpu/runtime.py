"""Runs compiled kernels: every program instance of a grid, over PyTorch's threads. The work is in runtime.c."""

import ctypes
import errno
import functools
import os
from pathlib import Path
from typing import Any

import torch

from lstm_triton.cpu import build

_get_num_threads = torch.get_num_threads


class Kernel:
    """A compiled kernel, ready to run.

    library: exports `void kernel(const void *const *args, const int32_t *pid, const int32_t *grid, char *scratch)`
    and `const size_t scratch_bytes`, the memory that one program needs, in bytes.

    Raises AttributeError if `kernel` is missing, ValueError if `scratch_bytes` is, and what `build.load` raises.
    """

    __slots__ = ("address", "launch", "library", "scratch_bytes")

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        # Both are converted here, not in each call.
        self.address = ctypes.cast(library.kernel, ctypes.c_void_p)
        self.scratch_bytes = ctypes.c_size_t.in_dll(library, "scratch_bytes")
        self.launch = load().lstm_triton_run


def run(kernel: Kernel, args: bytes, grid: tuple[int, int, int], cooperative: bool = False) -> None:
    """Runs the kernel once for each program of the grid, on up to `torch.get_num_threads()` threads; without the GIL.

    args: the kernel's arguments in slots of 8 bytes; a pointer, an integer or a float is in the first bytes of its.
    grid: programs along x, y and z; they begin in order, x fastest.
    cooperative: programs wait for each other, so all run at once, each on a thread of its own.

    Each program has the kernel's scratch memory to itself, aligned to 64 bytes; what is in it at first is undefined.
    Raises MemoryError if there is no room for it, RuntimeError if a cooperative kernel can't have its threads.
    """
    code = kernel.launch(
        kernel.address, args, grid[0], grid[1], grid[2], _get_num_threads(), kernel.scratch_bytes, cooperative
    )
    if code == errno.ENOMEM:
        raise MemoryError(f"no room for a kernel's scratch memory: {kernel.scratch_bytes.value} bytes a thread")
    if code:
        raise RuntimeError(f"can't start the threads of a cooperative kernel with grid {grid}")


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled runtime.c; raises what `build.load` does."""
    library = build.load(Path(__file__).with_name("runtime.c").read_text(encoding="utf-8"), "runtime", ["-pthread"])
    # lstm_triton_run has no argtypes: ctypes takes int, bytes and the objects in Kernel as they are, which is faster.
    library.lstm_triton_use_openmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.lstm_triton_use_openmp.restype = None
    library.lstm_triton_use_openmp(*((None, None) if _forked else openmp()))
    return library


_forked = False


def _after_fork() -> None:
    """A child has none of the pool's threads, yet libgomp would wait for them."""
    global _forked
    _forked = True
    if load.cache_info().currsize:
        load().lstm_triton_use_openmp(None, None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def openmp() -> tuple[Any, Any]:
    """GOMP_parallel and omp_get_num_threads of the OpenMP runtime that PyTorch runs on, or None twice.

    Several may be loaded. PyTorch's is found as the dynamic linker finds it for PyTorch: first among the libraries
    that all share, then among those that PyTorch's own needs.
    """
    for name in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        try:
            library = ctypes.CDLL(name)
            parallel, team_size = library.GOMP_parallel, library.omp_get_num_threads
        except (OSError, AttributeError):
            continue
        return ctypes.cast(parallel, ctypes.c_void_p), ctypes.cast(team_size, ctypes.c_void_p)
    return None, None
