"""A layer's kernels compiled for GPUs that need not be there, and what their machine code uses.

`calls` says what a plan launches, from the launchers themselves; `compiled` compiles one of these for its GPU;
`usage` finds registers, spills, shared memory, tensor-core instructions and loads of weights inside loops.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
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

from lstm_triton import kernels, launching
from lstm_triton.kernels import launch
from lstm_triton.planning import Plan
from lstm_triton.recurrence import Layer, Window, state_dtype

PASSES = ("inference", "forward", "backward", "rebuild")  # forward keeps what backward wants; rebuild: `recompute`


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
        return self.kernel.__module__ in {module.__name__ for module in kernels.STRATEGIES.values()}


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
    with _recorded(plan, layer, arch, precision) as found:
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
def _recorded(plan: Plan, layer: Layer, arch: str, precision: str) -> Iterator[list[Call]]:
    """Within this context what `layer` launches by `plan` is listed instead; all other layers run."""
    found: dict[Any, Call] = {}
    start, choose = launch.start, launching.of

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
        patches.enter_context(mock.patch.object(launching, "of", lambda x: plan if x is layer else choose(x)))
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
    for name, in_loop, size in loads(asm["ttgir"], arguments):
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
    return {
        "registers": found["vgpr_count"],  # accumulator registers among them
        "spill_bytes": found["private_segment_fixed_size"],
        "spills": max(spills, found["vgpr_spill_count"] + found["sgpr_spill_count"]),
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


_LOCATION = re.compile(r"\s+loc\(.*$")
_NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
_LOAD = re.compile(r"\w*\.(?!local_)\w*(?:load|copy_global_to_local|gather|atomic)")


@dataclass
class _Region:
    op: str
    results: list[str]
    carried: list[str]  # arguments of a loop's body
    passed: list[str]  # of scf.while: what its condition hands on


def loads(ttgir: str, arguments: Sequence[str]) -> list[tuple[str, bool, int]]:
    """The loads of a kernel from global memory: from which argument, whether in a loop, how many bytes.

    A load's pointers are followed back to the kernel's arguments, through loops and branches. Bytes are those of a
    program's tile, masked elements among them; a load in a loop counts once.

    Args:
        ttgir: the kernel in Triton's GPU dialect.
        arguments: names of its arguments, in order.

    Raises:
        NotImplementedError: there are loops that aren't structured.
    """
    lines = [_LOCATION.sub("", line).strip() for line in ttgir.splitlines()]
    head = next(k for k, line in enumerate(lines) if line.startswith("tt.func"))
    origins = {value: {name} for value, name in zip(_NAME.findall(_head(ttgir)), arguments, strict=True)}
    while True:
        known = sum(map(len, origins.values()))
        found = _loads(lines[head + 1 :], origins)
        if sum(map(len, origins.values())) == known:  # a loop may carry what its end only says
            return found


def _head(ttgir: str) -> str:
    """The kernel's arguments, each followed by its location."""
    line = next(line for line in ttgir.splitlines() if line.lstrip().startswith("tt.func"))
    return re.sub(r'"[^"]*"', "", line)


def _loads(lines: Sequence[str], origins: dict[str, set[str]]) -> list[tuple[str, bool, int]]:
    """One pass over a kernel's operations, which adds to `origins`: from which arguments each value derives."""
    found = []
    regions: list[_Region] = []
    labels = set()

    def derive(values: Sequence[str], sources: Sequence[str]) -> None:
        for value, source in zip(values, sources, strict=False):
            if source in origins:
                origins.setdefault(value, set()).update(origins[source])

    for line in lines:
        if line.startswith("}"):
            if not regions:
                break
            if not line.endswith("{"):  # else the other branch, or a loop's body behind its condition
                regions.pop()
            continue
        if line.startswith("^"):
            labels.add(line[1:].split("(")[0].rstrip(":"))
            if regions and regions[-1].op == "scf.while":
                derive(_NAME.findall(line), regions[-1].passed)
            continue
        left, _, text = line.partition(" = ") if line.startswith("%") else ("", "", line)
        named = re.match(r'"?([\w.]+)', text)
        if not named:
            continue
        op, operands, results = named[1], _NAME.findall(text), _results(left)
        if op in ("cf.br", "cf.cond_br") and labels & set(re.findall(r"\^(\w+)", text)):
            raise NotImplementedError(f"a loop that isn't structured: {line}")
        if op == "scf.yield":
            region = regions[-1]
            derive(region.carried, operands)
            if region.op != "scf.while":
                derive(region.results, operands)
        elif op == "scf.condition":
            regions[-1].passed = operands[1:]
            derive(regions[-1].results, operands[1:])
        elif op in ("scf.for", "scf.while", "scf.if") or text.endswith("{"):
            pairs = re.findall(r"(%[\w$.-]+) = (%[\w$.#-]+)", text)[op == "scf.for" :]  # the first is its variable
            carried, starts = [a for a, _ in pairs], [b for _, b in pairs]
            derive(carried, starts)
            if op == "scf.for":
                derive(results, starts)
            regions.append(_Region(op, results, carried, []))
        elif _LOAD.match(op):
            in_loop = any(region.op in ("scf.for", "scf.while") for region in regions)
            sources = set().union(*(origins.get(operand, set()) for operand in operands))
            found += [(name, in_loop, _bytes(text)) for name in sorted(sources)]
        else:
            for operand in operands:
                derive(results, [operand] * len(results))
    return found


def _results(left: str) -> list[str]:
    """The names of an operation's results: "%x", "%x, %y" or "%x:2"."""
    if ":" in left:
        name, count = left.split(":")
        return [f"{name}#{k}" for k in range(int(count))]
    return _NAME.findall(left)


def _bytes(text: str) -> int:
    """Of the tile that a load takes, from its types."""
    types = Counter[int]()
    for shape, bits in re.findall(r"<((?:\d+x)*)(?:!tt\.ptr<)?[a-z]+(\d+)\b", text.rsplit(" : ", 1)[-1]):
        size = int(bits) // 8
        for extent in shape.split("x")[:-1]:
            size *= int(extent)
        types[size] += 1
    return max(types, default=0)
