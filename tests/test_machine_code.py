"""The kernels as machine code for GPUs that need not be there: they compile and fit."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# TRITON_INTERPRET is read when kernels are defined, so the compiler runs in a process of its own.
PROGRAM = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lstm_triton import kernels, planning
from lstm_triton.kernels import cells, launch

# Arguments that are kept in float32 (float64 for float64) whatever the input's dtype.
STATES = {f"{name}_ptr" for name in "c cx cn dhn dcn dhx dcx c_state dh_state dc_state".split()}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}

def source(function, constants, element):
    state = "fp64" if element == "fp64" else "fp32"
    signature = {}
    for name in function.arg_names:
        if name in constants:
            kind = "constexpr"
        elif name in STATES:
            kind = "*" + state
        elif name == "offsets_ptr":
            kind = "*i64"
        elif name == "seed_ptr":
            kind = "*i64"
        elif name == "mask_ptr":
            kind = "*i64" if constants["DROPOUT"] == "drawn" else "*" + state
        elif name.endswith("_ptr"):
            kind = "*" + element
        else:
            kind = "fp32" if name == "scale" else "i32"
        signature[name] = kind
    aligned = {(k,): [["tt.divisibility", 16]] for k, n in enumerate(function.arg_names) if n.endswith("_ptr")}
    return ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)

for arch, shared, element, hidden, size, dropout, ragged in json.loads(sys.argv[1]):
    chosen = planning.choose(32, hidden, size, DTYPES[element], shared)
    strategy = kernels.STRATEGIES[chosen.strategy]
    assert not chosen.fused, "only the CPU's kernels are"
    # As a launch has them.
    constants, rebuilding = map(dict, launch._constants(
        DTYPES[element], chosen, 2, hidden, size, 50, hidden != size, True, ragged, dropout, True, "ieee"
    ))
    for name in ("num_warps", "num_stages"):
        rebuilding.pop(name)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    stages = [{"DX": False, "DW": False}]
    if chosen.strategy == "step":
        stages = [{"STAGE": stage} for stage in (("state", "cell") if hidden != size else ("both", "state"))]
    jobs = [(strategy.forward_kernel, constants | {"SAVE": True, "CELL": cells.lstm_forward})]
    jobs += [(strategy.backward_kernel, constants | {"CELL": cells.lstm_backward} | stage) for stage in stages]
    jobs += [
        (kernels.rebuild.multiplied_kernel, rebuilding),
        (kernels.rebuild.activate_kernel, rebuilding | {"CELL": cells.lstm_forward}),
    ]
    if dropout == "drawn":
        jobs.append((kernels.dropout.drop_kernel, {"F": size, "BLOCK_N": 16, "BLOCK_F": 64}))
    for function, given in jobs:
        target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch), 32)
        compiled = triton.compile(source(function, given, element), target=target, options=options)
        text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
        print(json.dumps({
            "case": [arch, element, hidden, size, dropout, function.__name__], "strategy": chosen.strategy,
            "shared": compiled.metadata.shared, "limit": shared, "tensor_cores": "mma.sync" in text or "mfma" in text,
            "float_atomics": "atom.global.add.f" in text or "red.global.add.f" in text,
        }), flush=True)
"""
KIB = 1024
CASES = [
    # arch, shared memory of a program, dtype, H, K, dropout, ragged
    ("80", 163 * KIB, "fp16", 128, 128, "drawn", False),
    ("80", 163 * KIB, "fp32", 64, 64, "given", True),
    ("80", 163 * KIB, "fp64", 40, 40, "none", False),
    ("86", 99 * KIB, "fp16", 128, 128, "none", False),
    ("86", 99 * KIB, "bf16", 64, 32, "drawn", True),
    ("90", 227 * KIB, "fp16", 128, 128, "drawn", True),
    ("90", 227 * KIB, "bf16", 300, 300, "drawn", False),
    ("90", 227 * KIB, "fp32", 512, 128, "none", False),
    ("100", 227 * KIB, "bf16", 128, 128, "none", False),
    ("120", 99 * KIB, "fp16", 100, 100, "drawn", False),
    ("gfx942", 64 * KIB, "fp16", 64, 64, "drawn", False),
]


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(CASES)],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_every_kernel_compiles(compiled: list[dict]) -> None:
    assert {tuple(k["case"][:4]) for k in compiled} == {(a, e, h, s) for a, _, e, h, s, *_ in CASES}
    assert {k["strategy"] for k in compiled} == {"persistent", "step"}


def test_fits_in_shared_memory(compiled: list[dict]) -> None:
    for kernel in compiled:
        assert kernel["shared"] <= kernel["limit"], kernel


def test_tensor_cores_and_no_float_atomics(compiled: list[dict]) -> None:
    for kernel in compiled:
        assert not kernel["float_atomics"], kernel
        if kernel["case"][1] in ("fp16", "bf16") and kernel["case"][5] in ("forward_kernel", "backward_kernel"):
            assert kernel["tensor_cores"], kernel
