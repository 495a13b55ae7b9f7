"""A layer's kernels compiled for GPUs that need not be there, and what their machine code uses.

`calls` says what a plan launches, from the launchers themselves; `compiled` compiles one of these for its GPU;
`usage` finds registers, spills, shared memory, tensor-core instructions and loads of weights inside loops.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from lstm_triton import dropout as masks
from lstm_triton import kernels, launching
from lstm_triton.gpu import ttgir
from lstm_triton.kernels import launch
from lstm_triton.planning import Plan
from lstm_triton.recurrence import Layer, Window, state_dtype

# Forward keeps what backward wants; "rebuild" is of `recompute`, "drop" dropout between layers.
PASSES = ("inference", "forward", "backward", "rebuild", "drop")


@dataclass
class Call:
    """A kernel as `kernels.launch.start` is given it."""

    kernel: Any
    grid: tuple[int, int, int]
    args: list[Any]
    constants: dict[str, Any]
    arch: str  # of the GPU: "sm_90", "gfx942"
    times: int = 1  # how often it is launched

    @property
    def is_own(self) -> bool:
        """Whether it is the strategy's own kernel, not one of those that all strategies share."""
        return self.kernel.__module__ not in (kernels.rebuild.__name__, kernels.dropout.__name__)


def calls(plan: Plan, layer: Layer, run: str, arch: str, precision: str = "ieee") -> list[Call]:
    """What one pass over a layer launches on a GPU, each kernel once for each set of constants.

    The launchers run, on tensors without memory, but launch nothing.

    Args:
        plan: how the layer runs.
        layer: of tensors on ``torch.device("meta")``; in a wavefront all layers are like it.
        run: one of `PASSES`.
        arch: of the GPU, such as "sm_90" or "gfx942".
        precision: of float32 products, "ieee" or "tf32".
    """
    if run not in PASSES:
        raise ValueError(f"run should be one of {', '.join(PASSES)}, got {run!r}")
    if not layer.input.is_meta:
        raise ValueError(f'the layer should be on torch.device("meta"), got {layer.input.device}')
    window, hx = Window(layer.layout, 0, layer.layout.steps), layer.hx
    kept = state_dtype(layer.input.dtype)
    output = layer.input.new_empty(layer.layout.total, hx.size(0) * hx.size(2))
    layer = layer._replace(plan=plan)
    with _recorded(arch, precision) as found:
        if run == "drop":
            launching.drop(layer.input, torch.empty(1, dtype=torch.int64, device="meta"), masks.BETWEEN, 0.5)
            return found
        if plan.layers > 1:
            _run_wavefront(plan, layer, run, output)
            return found
        engine = launching.Kernels(layer)
        if run == "backward":
            dhn, dcn = hx.to(kept), layer.cx.to(kept)
            engine.backward(window, output, output, layer.room(), hx, dcn, dhn, dcn, True, True)
        elif run == "rebuild":
            engine.rebuild(window, output, hx, layer.cx.to(kept))
        else:
            engine.forward(window, output, hx, layer.cx.to(kept), run == "forward")
    return found


def _run_wavefront(plan: Plan, layer: Layer, run: str, output: Tensor) -> None:
    kept, layers = state_dtype(layer.input.dtype), plan.layers
    hx, cx = layer.hx.repeat(layers, 1, 1), layer.cx.to(kept).repeat(layers, 1, 1)
    front = launching.Wavefront(plan, [layer] * layers, hx, cx, launching.Drops(layer.dropout, None, 0.0))
    if run == "backward":
        room = layer.room()
        front.backward(output, [room.gates] * layers, [room.c] * layers, hx.to(kept), cx)
        front.multiplied(0, output)
    else:
        front.forward(run == "forward")


@contextmanager
def _recorded(arch: str, precision: str) -> Iterator[list[Call]]:
    """Within this context what is launched on tensors without memory is listed; all else runs."""
    found: dict[Any, Call] = {}
    start = launch.start

    def record(kernel: Any, grid: tuple[int, int, int], args: list[Any], shared: dict[str, Any], **own: Any) -> None:
        if not args[0].is_meta:
            return start(kernel, grid, args, shared, **own)
        call = Call(kernel, grid, args, shared | own, arch)
        known = found.setdefault((kernel, tuple(call.constants.items())), call)
        known.times += known is not call
        return None

    calls: list[Call] = []
    with ExitStack() as patches:
        for module in vars(kernels).values():
            if isinstance(module, ModuleType) and getattr(module, "start", None) is start:
                patches.enter_context(mock.patch.object(module, "start", record))
        patches.enter_context(mock.patch.object(launch, "rnn_precision", lambda device: precision))
        # Launches ask for AMD's PyTorch; constants that are kept for one are none for the other.
        patches.enter_context(mock.patch.object(torch.version, "hip", "any" if arch.startswith("gfx") else None))
        patches.enter_context(mock.patch.object(launch, "_constants", launch._constants.__wrapped__))
        yield calls
    calls += found.values()


def _target(arch: str) -> GPUTarget:
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def compiled(call: Call) -> "Compiled":
    """Compiles a call's kernel as a launch of it on that GPU does; Triton keeps the result in its cache.

    Raises:
        triton.CompilationError, RuntimeError: it doesn't compile.
    """
    gpu = _target(call.arch)
    backend = make_backend(gpu)
    bind = create_function_from_signature(call.kernel.signature, call.kernel.params, backend)
    bound, specialization, options = bind(*call.args, **call.constants)
    options, signature, constants, attributes = call.kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(call.kernel, signature, constants, attributes)
    kernel = triton.compile(source, target=gpu, options=options.__dict__)
    return Compiled(kernel, [name for name, kind in signature.items() if kind != "constexpr"])


class Compiled(NamedTuple):
    """A kernel in machine code."""

    kernel: Any  # Triton's, with `asm` and `metadata`
    arguments: list[str]  # names of those that are no constants


@dataclass(frozen=True)
class Usage:
    """What a kernel's machine code uses."""

    warps: int  # of a program
    registers: int  # of a thread
    spill_bytes: int  # memory of a thread for registers that are spilled
    spills: int  # instructions that spill or reload
    spills_in_loops: int  # of these
    shared_bytes: int  # of a program
    tensor_core_ops: int  # instructions that run on tensor cores (AMD: matrix cores)
    float_atomics: int
    weight_bytes: int  # of the weights' tiles that a program loads, a tile in a loop counted once
    weight_bytes_in_loops: int  # of those in loops


def usage(call: Call) -> Usage:
    """What a call's machine code uses; that of NVIDIA GPUs is disassembled by tools that come with Triton.

    Raises: as of `compiled`.
    """
    kernel, arguments = compiled(call)
    asm, metadata = kernel.asm, kernel.metadata
    measured = _read_amdgcn(asm["amdgcn"]) if "amdgcn" in asm else _read_cubin(asm["cubin"])
    loaded = {False: 0, True: 0}
    for name, in_loop, size in ttgir.loads(asm["ttgir"], arguments):
        if re.fullmatch(r"w_(\w+_)?ptr", name):
            loaded[in_loop] += size
    return Usage(
        warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        float_atomics=len(re.findall(r"atomic_rmw fadd|atomic_cas\b.*\bb?f\d+\b", asm["ttgir"])),
        weight_bytes=sum(loaded.values()),
        weight_bytes_in_loops=loaded[True],
        **measured,
    )


def _read_cubin(cubin: bytes) -> dict[str, int]:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tools / tool[0], *tool[1:], file.name], check=True, capture_output=True, text=True).stdout
            for tool in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    spills, in_loops = _count(sass, r"\*/.*\b(?:LDL|STL)\b", r"^(\.\w+):", r"\bBRA\b.*`\((\.\w+)\)")
    return {
        "registers": found["REG"],
        "spill_bytes": found["STACK"] + found["LOCAL"] if spills else 0,  # calls have a stack, too
        "spills": spills,
        "spills_in_loops": in_loops,
        "tensor_core_ops": len(re.findall(r"\*/\s+(?:@!?U?P\w+ +)?\w*MMA\b", sass)),
    }


def _read_amdgcn(text: str) -> dict[str, int]:
    found = {name: int(number) for name, number in re.findall(r"^\s+(?:- )?\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    marks = r"Folded (?:Spill|Reload)"
    spills, in_loops = _count(text, marks, r"^(\.LBB\w+):", r"\bs_c?branch\w*\s+(\.LBB\w+)")
    if found["private_segment_fixed_size"] == found["vgpr_spill_count"] == 0:
        spills = in_loops = 0  # of scalar registers into lanes of vector registers, not into memory
    return {
        "registers": found["vgpr_count"],  # accumulator registers among them
        "spill_bytes": found["private_segment_fixed_size"],
        "spills": max(spills, found["vgpr_spill_count"]),
        "spills_in_loops": in_loops,
        "tensor_core_ops": len(re.findall(r"^\s+v_\w*(?:mfma|wmma)\w*", text, re.MULTILINE)),
    }


def _count(code: str, wanted: str, label: str, branch: str) -> tuple[int, int]:
    """How many lines match `wanted`, and how many of these a branch back to a label leads past again."""
    labels: dict[str, int] = {}
    loops, places = [], []
    for k, line in enumerate(code.splitlines()):
        if found := re.search(label, line):
            labels[found[1]] = k
        elif (found := re.search(branch, line)) and found[1] in labels:
            loops.append(range(labels[found[1]], k))
        elif re.search(wanted, line):
            places.append(k)
    return len(places), sum(any(k in loop for loop in loops) for k in places)
