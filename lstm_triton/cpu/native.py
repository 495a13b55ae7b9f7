"""Launches a `triton.jit` function on CPU tensors: compiles it for their types on first use, then runs it."""

import functools
import hashlib
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lstm_triton.cpu import build, runtime

_POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.bool: "*i1", torch.int8: "*i8", torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip
_SLOTS = {"i32": "i4x", "i64": "q", "fp32": "f4x", "*": "P"}  # `struct` formats, each of 8 bytes
# What a launch takes beside the kernel's own parameters; the first three are for GPUs.
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_cooperative_grid")


# Triton's frontend and its cache keys parse Python, whose parser fails now and then in two threads at once (3.11).
_frontend = threading.Lock()


class Prepared:
    """A kernel compiled for arguments of certain types."""

    def __init__(self, kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        self.name = kernel.fn.__name__
        values = iter(args)
        signature, wanted = {}, {}
        for parameter in kernel.params:
            if not parameter.is_constexpr:
                signature[parameter.name] = _kind(next(values, None), parameter.name)
            elif parameter.name in constants:
                signature[parameter.name], wanted[parameter.name] = "constexpr", constants[parameter.name]
            else:
                raise TypeError(f"{kernel.fn.__name__} lacks its constant {parameter.name}")
        kinds = [kind for kind in signature.values() if kind != "constexpr"]
        if len(kinds) != len(args):
            raise TypeError(f"{kernel.fn.__name__} takes {len(kinds)} arguments beside its constants, got {len(args)}")
        unknown = constants.keys() - wanted.keys() - set(_OPTIONS)
        if unknown:
            raise TypeError(f"{kernel.fn.__name__} has no constants {', '.join(sorted(unknown))}")
        self.cooperative = constants.get("launch_cooperative_grid", False)
        self.pointers = [k for k, kind in enumerate(kinds) if kind[0] == "*"]
        self.slots = struct.Struct("".join(_SLOTS["*" if kind[0] == "*" else kind] for kind in kinds))
        self.kernel = runtime.Kernel(build.load(source(kernel, signature, wanted), kernel.fn.__name__))

    def run(self, grid: tuple[int, int, int], args: list[Any]) -> None:
        """Runs the kernel over a grid; `args` are those of `launch`, and are overwritten."""
        if records():
            _recording.launches.append((self, grid, args))
            return
        for k in self.pointers:
            args[k] = args[k].data_ptr()
        self.run_numbers(grid, args)

    def run_numbers(self, grid: tuple[int, int, int], args: list[int | float]) -> None:
        """The same with the addresses of tensors."""
        runtime.run(self.kernel, self.slots.pack(*args), grid, self.cooperative)


_recording = threading.local()


def records() -> bool:
    """Whether launches of this thread are being recorded, not run."""
    return getattr(_recording, "launches", None) is not None


class Replay:
    """A launch that is repeated: the same kernel, grid and numbers on other tensors of the same shapes.

    Args:
        launch: calls a launcher, which allocates what the kernel writes and launches it once.
        given: the tensors that it has besides, no two of them one; their contents don't matter, nor does how many axes
            the first one has.

    Raises:
        ValueError: it launches nothing, more than one kernel, or not natively.
    """

    def __init__(self, launch: Callable[[], Any], given: Sequence[Tensor]) -> None:
        _recording.launches = []
        try:
            launch()
            if len(_recording.launches) != 1:
                raise ValueError(f"the call makes {len(_recording.launches)} native launches, not one")
            self.prepared, self.grid, args = _recording.launches[0]
        finally:
            del _recording.launches
        tensors = list(given)
        self.places: list[tuple[int, int]] = []  # of a tensor's address among the arguments, and which tensor
        for k in self.prepared.pointers:
            if not any(args[k] is x for x in tensors):
                tensors.append(args[k])
            self.places.append((k, next(n for n, x in enumerate(tensors) if x is args[k])))
        self.args = [0 if isinstance(x, Tensor) else x for x in args]
        # What is allocated, where there is one like a given tensor, which PyTorch allocates faster.
        self.made: list[tuple[int, torch.Size, torch.dtype]] = []
        for x in tensors[len(given) :]:
            like = [k for k, g in enumerate(given) if g.shape == x.shape and g.dtype == x.dtype]
            self.made.append((max(like, default=-1), x.shape, x.dtype))  # the first one if it's the only one

    def __call__(self, *given: Tensor) -> list[Tensor]:
        """Launches it on `given`, contiguous and in the order from before.

        Returns what is allocated, in the order of the arguments; with the axes of the first one what no other is like.
        """
        made = [
            torch.empty(shape, dtype=dtype) if like < 0 else torch.empty_like(given[like])
            for like, shape, dtype in self.made
        ]
        addresses = [x.data_ptr() for x in (*given, *made)]
        args = self.args.copy()
        for place, k in self.places:
            args[place] = addresses[k]
        self.prepared.run_numbers(self.grid, args)
        return made


_prepared: dict[Any, Prepared] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Tensor | int | float, **constants: Any) -> None:
    """Runs `kernel` once for each program of the grid, over `torch.get_num_threads()` threads.

    Args:
        kernel: a `triton.jit` function.
        grid: one to three numbers of programs.
        args: its parameters that are no constants, in order; tensors on the CPU. Integers are 32 bits wide
            where they fit, else 64.
        constants: its `tl.constexpr` parameters, and options of the launch: `launch_cooperative_grid` where programs
            wait for each other, so that each has a thread; the others say nothing here.

    Raises:
        Unsupported: the kernel has an operation that the target lacks.
        TypeError: arguments are missing, unknown or of a type that kernels don't take.
        RuntimeError: there is no C compiler, or it failed.
    """
    key = (kernel, *(a.dtype if isinstance(a, Tensor) else _kind(a, "") for a in args), *constants.items())
    with _frontend:  # Triton hashes a kernel by its cache key
        prepared = _prepared.get(key)
    if prepared is None:
        prepared = _prepared[key] = Prepared(kernel, args, constants)
    x, y, z = (*grid, 1, 1)[:3]
    prepared.run((x, y, z), list(args))


def _kind(value: Any, name: str) -> str:
    """The type of an argument, as Triton writes it."""
    if isinstance(value, Tensor):
        if value.dtype in _POINTERS:
            return _POINTERS[value.dtype]
    elif isinstance(value, float):
        return "fp32"
    elif isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    given = value.dtype if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(
        f"argument {name or value!r} should be a tensor of a dtype that kernels take, or a number, got {given}"
    )


def source(kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> str:
    """The C of a kernel, kept beside the libraries: Triton's frontend takes longer than all that comes after it."""
    with _frontend:
        values = {k: v.cache_key if hasattr(v, "cache_key") else v for k, v in constants.items()}
        key = hashlib.sha256(repr((kernel.cache_key, _own(), signature, values)).encode()).hexdigest()
        path = build.cache_folder() / f"{kernel.fn.__name__}-{key[:16]}.lowered.c"
        text = build.read_checked(path, key)
        if text is None:
            # Not before: a process that finds all in the cache doesn't load Triton's compiler.
            from lstm_triton.cpu import frontend, ir, lower, trim

            function = ir.parse(frontend.ttir(kernel, signature, constants))
            trim.trim(function)
            text = lower.Lowering(function).write()
            build.write_checked(path, key, text)
        return text


@functools.cache
def _own() -> str:
    """What the C depends on beside the kernel: Triton's version and the files here."""
    import triton

    digest = hashlib.sha256(triton.__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
