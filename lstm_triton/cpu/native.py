"""Launches a `triton.jit` function on CPU tensors: compiles it for their types on first use, then runs it."""

import functools
import hashlib
import struct
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
# What a launch takes beside the kernel's own parameters; the first two are for GPUs.
_OPTIONS = ("num_warps", "num_stages", "launch_cooperative_grid")

_compiled: dict[Any, tuple[runtime.Kernel, struct.Struct]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Tensor | int | float, **constants: Any) -> None:
    """Runs `kernel` once for each program of the grid, over `torch.get_num_threads()` threads.

    Args:
        kernel: a `triton.jit` function.
        grid: one to three numbers of programs.
        args: its parameters that are no constants, in order; tensors on the CPU. Integers are 32 bits wide
            where they fit, else 64.
        constants: its `tl.constexpr` parameters, and options of the launch: `launch_cooperative_grid` where programs
            wait for each other, so that each has a thread; `num_warps` and `num_stages` say nothing here.

    Raises:
        Unsupported: the kernel has an operation that the target lacks.
        RuntimeError: there is no C compiler, or it failed.
    """
    key = (kernel, *(a.dtype if isinstance(a, Tensor) else _scalar(a) for a in args), *constants.items())
    entry = _compiled.get(key)
    if entry is None:
        entry = _compiled[key] = _compile(kernel, args, constants)
    compiled, slots = entry
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in args]
    x, y, z = (*grid, 1, 1)[:3]
    runtime.run(compiled, slots.pack(*values), (x, y, z), constants.get("launch_cooperative_grid", False))


def _scalar(value: int | float) -> str:
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _compile(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[runtime.Kernel, struct.Struct]:
    names = iter(args)
    signature, wanted = {}, {}
    for parameter in kernel.params:
        if parameter.is_constexpr:
            signature[parameter.name], wanted[parameter.name] = "constexpr", constants[parameter.name]
        else:
            value = next(names)
            signature[parameter.name] = _POINTERS[value.dtype] if isinstance(value, Tensor) else _scalar(value)
    kinds = [kind for kind in signature.values() if kind != "constexpr"]
    if len(kinds) != len(args):
        raise TypeError(f"{kernel.fn.__name__} takes {len(kinds)} arguments beside its constants, got {len(args)}")
    unknown = constants.keys() - wanted.keys() - set(_OPTIONS)
    if unknown:
        raise TypeError(f"{kernel.fn.__name__} has no parameters {', '.join(sorted(unknown))}")
    name = kernel.fn.__name__
    library = build.load(source(kernel, signature, wanted), name)
    return runtime.Kernel(library), struct.Struct("".join(_SLOTS["*" if k[0] == "*" else k] for k in kinds))


def source(kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> str:
    """The C of a kernel, kept beside the libraries: Triton's frontend takes longer than all that comes after it."""
    values = {k: v.cache_key if hasattr(v, "cache_key") else v for k, v in constants.items()}
    key = hashlib.sha256(repr((kernel.cache_key, _own(), signature, values)).encode()).hexdigest()
    path = build.cache_folder() / f"{kernel.fn.__name__}-{key[:16]}.lowered.c"
    text = build.read_checked(path, key)
    if text is None:
        # Not before: a process that finds all in the cache doesn't load Triton's compiler.
        from lstm_triton.cpu import frontend, ir, lower

        text = lower.Lowering(ir.parse(frontend.ttir(kernel, signature, constants))).write()
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
