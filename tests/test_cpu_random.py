"""The CPU target against Triton's interpreter on random kernels, and what the target says of what it lacks.

The kernels are those of `random_kernels.py`; its command prints that of a seed. A process interprets them all, while
two threads of this one compile and run them, all but `OPTIMISED` of them with -O1 to save time. On two busy cores,
from an empty cache, that takes 70 seconds.

What the interpreter has wrong is compared with PyTorch: arithmetic and roundings of bfloat16, minima of NaN.
"""

import ast
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import random_kernels
import torch
import triton
import triton.language as tl

from lstm_triton import cpu
from lstm_triton.cpu import build, ir, native

KERNELS = 300
OPTIMISED = 75  # of them are compiled as the project's kernels are

pytestmark = [
    pytest.mark.skipif(not build.has_compiler(), reason="no C compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="would compare the interpreter with itself"),
]


def difference(program: random_kernels.Program, native: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """What is wrong with what a kernel wrote."""
    for name, actual in native.items():
        allowed = torch.zeros(len(actual), dtype=torch.float64)
        for region in program.regions:
            if region.output == name:
                allowed[region.start : region.end] = region.error
        wanted = expected[name]
        if actual.is_floating_point():
            # Equal first: the difference of infinities is NaN.
            same = (actual == wanted) | (actual.isnan() & wanted.isnan())
            near = (actual.double() - wanted.double()).abs() <= allowed
            wrong = ~(same | near)
        else:
            wrong = actual != wanted
        if wrong.any():
            k = int(wrong.nonzero()[0])
            return (
                f"{name}[{k}] and {int(wrong.sum()) - 1} more: {actual[k].item()!r}, in the interpreter "
                f"{wanted[k].item()!r}; allowed {allowed[k].item():.2g}"
            )
    return None


def run_natively(program: random_kernels.Program, module: Any) -> dict[str, Any] | str:
    """What a kernel writes, run by the CPU target; its error otherwise."""
    arguments, written = program.arguments()
    try:
        cpu.launch(getattr(module, program.name), program.grid, *arguments)
    except Exception as error:  # reported with the kernel
        return f"{type(error).__name__}: {error}"
    return written


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str | None]:
    """What is wrong with each kernel, by seed."""
    return compare(range(KERNELS), tmp_path_factory.mktemp("random"), OPTIMISED)


def compare(seeds: range, folder: Path, optimised: int) -> dict[int, str | None]:
    """What is wrong with each kernel, by seed; `optimised` of them are compiled with the usual flags."""
    programs = [random_kernels.draw(seed) for seed in seeds]
    path = folder / "kernels_under_test.py"
    path.write_text(random_kernels.HEADER + "".join("\n\n" + p.source for p in programs))
    out = folder / "interpreted.pt"
    command = [sys.executable, str(Path(random_kernels.__file__)), str(path), str(out), *map(str, seeds)]
    process = subprocess.Popen(command, env={**os.environ, "TRITON_INTERPRET": "1"})
    module = random_kernels.load_module(path)
    results: dict[int, dict[str, Any] | str] = {}
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        for some, flags in ((programs[:optimised], ""), (programs[optimised:], "-O1")):
            patch.setenv("LSTM_TRITON_CFLAGS", flags)
            found = pool.map(lambda p: run_natively(p, module), some)
            results.update(zip((p.seed for p in some), found, strict=True))
    assert process.wait() == 0
    interpreted = torch.load(out)
    wrong: dict[int, str | None] = {}
    for program in programs:
        ours, theirs = results[program.seed], interpreted[program.seed]
        if isinstance(ours, str) or isinstance(theirs, str):
            text: str | None = "\n".join(
                f"{who}: {what}" for who, what in (("native", ours), ("interpreter", theirs)) if isinstance(what, str)
            )
        else:
            text = difference(program, ours, theirs)
        setting = f"seed {program.seed}, grid {program.grid}, scalars {program.scalars}"
        wrong[program.seed] = f"{setting}: {text}\n\n{program.source}" if text else None
    return wrong


@pytest.mark.parametrize("seed", range(KERNELS))
def test_random_kernel(seed: int, outcomes: dict[int, str | None]) -> None:
    if outcomes[seed]:
        pytest.fail(str(outcomes[seed]), pytrace=False)


@triton.jit
def doubled(x_ptr):
    tl.store(x_ptr, 2 * tl.load(x_ptr))


def test_one_thread_at_a_time_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's parser fails now and then in two threads at once; Triton parses for a kernel's hash, too."""
    alone, parse = [], ast.parse

    def watched(*args: Any, **options: Any) -> ast.AST:
        alone.append(native._frontend.locked())
        return parse(*args, **options)

    monkeypatch.setattr(ast, "parse", watched)
    x = torch.tensor([3.0])
    cpu.launch(doubled, (1,), x)
    assert x.item() == 6
    assert alone and all(alone)


# What the interpreter has wrong


@triton.jit
def casts(source_ptr, target_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(target_ptr + i, tl.load(source_ptr + i).to(target_ptr.dtype.element_ty))


@triton.jit
def operations(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(a_ptr + i)
    b = tl.load(b_ptr + i)
    tl.store(out_ptr + i, a + b)
    tl.store(out_ptr + N + i, a - b)
    tl.store(out_ptr + 2 * N + i, a * b)
    tl.store(out_ptr + 3 * N + i, a * b + a)
    tl.store(out_ptr + 4 * N + i, a * 0.7 - 0.1)
    tl.store(out_ptr + 5 * N + i, tl.where(a < b, -a, tl.abs(b)))
    tl.store(out_ptr + 6 * N + i, tl.minimum(a, b))
    tl.store(out_ptr + 7 * N + i, tl.maximum(a, b))
    tl.store(out_ptr + 8 * N + i, tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out_ptr + 9 * N + i, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def products(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + k[:, None] * M + m[None, :])
    b = tl.load(b_ptr + n[:, None] * K + k[None, :])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(tl.trans(a), tl.trans(b)))


def numbers(dtype: torch.dtype, count: int) -> torch.Tensor:
    """Of all sizes, among them NaN, infinities, ties of the halves, and their largest and least."""
    special = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 65504.0, 65519.996, 65520.0, 65536.0, 2.0**-24]
    special += [2.0**-25, 2.0**-25 * 1.01, 6e-8, 3.3895e38, 3.4e38, 1e-40, 1 + 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-9]
    if dtype == torch.float64:  # a rounding to float32 first would make ties of them
        special += [1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-11 + 2.0**-40, 1 + 2.0**-11 - 2.0**-40, -1 - 2.0**-8 - 2.0**-50]
    rest = torch.randn(count - len(special), dtype=torch.float64) * 2.0 ** torch.randint(
        -30, 18, (count - len(special),)
    )
    return torch.cat([torch.tensor(special, dtype=torch.float64), rest]).to(dtype)


def once_rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in the dtype. PyTorch rounds float64 twice where it makes halves of it, first to float32."""
    if x.dtype != torch.float64 or dtype == torch.float32:
        return x.to(dtype)
    near = x.float()
    bits = near.view(torch.int32) - (near.double().abs() > x.abs()).int()  # towards zero
    odd = (bits | (near.double() != x).int()).view(torch.float32)  # no tie, unless x is one
    return torch.where(x.isnan(), near, odd).to(dtype)


@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32], ids=str)
def test_casts(source: torch.dtype, target: torch.dtype) -> None:
    x = torch.randint(-(2**31), 2**31, (1024,)).int() >> 8 if source == torch.int32 else numbers(source, 1024)
    out = torch.empty(1024, dtype=target)
    cpu.launch(casts, (1,), x, out, N=1024)
    torch.testing.assert_close(out, once_rounded(x, target), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_operations_of_halves(dtype: torch.dtype) -> None:
    """Each result is rounded, as one of PyTorch's is."""
    n = 512
    a, b = numbers(dtype, n), numbers(dtype, n)[torch.randperm(n)]
    out = torch.empty(10, n, dtype=dtype)
    cpu.launch(operations, (1,), a, b, out, N=n)
    constants = [torch.tensor(c, dtype=dtype) for c in (0.7, 0.1)]
    expected = [a + b, a - b, a * b, a * b + a, a * constants[0] - constants[1], torch.where(a < b, -a, b.abs())]
    expected += [torch.fmin(a, b), torch.fmax(a, b), torch.minimum(a, b), torch.maximum(a, b)]
    torch.testing.assert_close(out, torch.stack(expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 16, 4), (2, 64, 8), (4, 2, 32), (16, 32, 16), (64, 8, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_of_halves(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    m, n, k = sizes
    a, b, out = torch.randn(k, m).to(dtype), torch.randn(n, k).to(dtype), torch.empty(m, n)
    cpu.launch(products, (1,), a, b, out, M=m, N=n, K=k)
    torch.testing.assert_close(out.double(), a.T.double() @ b.T.double(), rtol=1e-5, atol=1e-5)


# Errors


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def scan(x_ptr):
    i = tl.arange(0, 8)
    x = tl.load(x_ptr + i)
    x = tl.associative_scan(x, 0, add)  # here
    tl.store(x_ptr + i, x)


@triton.jit
def cumsum(x_ptr):
    i = tl.arange(0, 8)
    tl.store(x_ptr + i, tl.cumsum(tl.load(x_ptr + i), 0))  # here


@triton.jit
def histogram(x_ptr):
    i = tl.arange(0, 8)
    x = tl.load(x_ptr + i).to(tl.int32)
    h = tl.histogram(x, 8)  # here
    tl.store(x_ptr + i, h.to(tl.float32))


@triton.jit
def gather(x_ptr):
    i = tl.arange(0, 8)
    x = tl.load(x_ptr + i)
    y = tl.gather(x, 7 - i, 0)  # here
    tl.store(x_ptr + i, y)


@triton.jit
def printing(x_ptr):
    i = tl.arange(0, 8)
    x = tl.load(x_ptr + i)
    tl.device_print("x", x)  # here
    tl.store(x_ptr + i, x)


@triton.jit
def argmax(x_ptr):
    i = tl.arange(0, 8)
    x = tl.load(x_ptr + i)
    k = tl.argmax(x, 0)  # here
    tl.store(x_ptr + i, x + k)


@triton.jit
def integer_product(x_ptr):
    i = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + i).to(tl.int8)
    y = tl.dot(x, x)  # here
    tl.store(x_ptr + i, y.to(tl.float32))


@triton.jit
def half_atomic(x_ptr):
    i = tl.arange(0, 8)
    p = x_ptr.to(tl.pointer_type(tl.float16), bitcast=True) + i
    tl.atomic_add(p, tl.zeros((8,), tl.float16))  # here


@triton.jit
def remainder(x_ptr):
    i = tl.arange(0, 8)
    x = tl.load(x_ptr + i)
    y = x % 2.0  # here
    tl.store(x_ptr + i, y)


UNSUPPORTED = {
    scan: "tt.scan", cumsum: "tt.scan", histogram: "tt.histogram", gather: "tt.gather", printing: "tt.print",
    argmax: "tt.reduce", integer_product: "tt.dot", half_atomic: "tt.atomic_rmw", remainder: "arith.remf",
}  # fmt: skip


@pytest.mark.parametrize("kernel,operation", UNSUPPORTED.items(), ids=lambda x: getattr(x, "__name__", x))
def test_unsupported(kernel: Any, operation: str) -> None:
    """The message says which operation, and where the kernel has it."""
    lines = Path(__file__).read_text().splitlines()
    start = lines.index(f"def {kernel.__name__}(x_ptr):")
    line = next(k for k, text in enumerate(lines, 1) if k > start and text.endswith("# here"))
    with pytest.raises(ir.Unsupported) as raised:
        cpu.launch(kernel, (1,), torch.zeros(256))
    assert f"{operation} at " in str(raised.value)
    assert f"{Path(__file__).name}:{line}" in str(raised.value)


WRONG_ARGUMENTS: list[tuple[list[Any], dict[str, int], str]] = [
    ([torch.zeros(8), torch.zeros(8)], {"N": 8, "M": 3}, "casts .*M"),
    ([torch.zeros(8), torch.zeros(8), 3], {"N": 8}, "casts takes 2 .* got 3"),
    ([torch.zeros(8)], {"N": 8}, "target_ptr"),
    ([torch.zeros(8), torch.zeros(8)], {}, "casts .*N"),
    ([torch.zeros(8), "x"], {"N": 8}, "got str"),
    ([torch.zeros(8), torch.zeros(8, dtype=torch.complex64)], {"N": 8}, "target_ptr.*complex64"),
]


@pytest.mark.parametrize("arguments,constants,message", WRONG_ARGUMENTS, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_arguments(arguments: list[Any], constants: dict[str, int], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        cpu.launch(casts, (1,), *arguments, **constants)
