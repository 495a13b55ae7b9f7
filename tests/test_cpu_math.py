"""lstm_triton/cpu/kernel.h: how exact its functions, conversions and matrix product are, for each kind of processor."""

import ctypes
import itertools
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the infinities and NaN that are meant

HEADER = Path(__file__).parents[1] / "lstm_triton" / "cpu" / "kernel.h"
FLAGS = "-std=gnu11 -Wall -Wextra -Werror -O3 -mprefer-vector-width=512 -fno-math-errno -fno-trapping-math"
COMPILER = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
X86 = platform.machine() in ("x86_64", "AMD64")

UNARY = [f"{name}_{kind}" for kind in ("f32", "f64") for name in ("exp", "exp2", "log", "log2", "tanh", "rsqrt")]
UNARY += ["round_f16", "round_bf16"]
CONVERSIONS = [(kind, small) for kind in ("f32", "f64") for small in ("f16", "bf16")]
BINARY = [f"{name}_{kind}" for kind in ("f32", "f64") for name in ("minnum", "maxnum", "minimum", "maximum")]
BINARY += ["mulhi_u32", "mulhi_u64"]
CONSTANT_SIZES = [(1, 32, 32), (1, 64, 128), (16, 16, 16), (32, 32, 32), (8, 64, 64), (4, 128, 32), (2, 8, 16)]
C_TYPES = {"f32": "float", "f64": "double", "f16": "uint16_t", "bf16": "uint16_t", "u32": "uint32_t", "u64": "uint64_t"}
TYPES: dict[str, type] = {"f32": np.float32, "f64": np.float64, "u32": np.uint32, "u64": np.uint64}


def source() -> str:
    def loop(name: str, result: str, argument: str, second: bool = False) -> str:
        more, call = (f"const {argument} *z, ", f"{name}(x[i], z[i])") if second else ("", f"{name}(x[i])")
        return (
            f"void all_{name}(const {argument} *x, {more}{result} *y, int n) "
            f"{{ IVDEP for (int i = 0; i < n; i++) y[i] = {call}; }}"
        )

    lines = [f'#include "{HEADER}"']
    for name in UNARY:
        kind = "float" if name.startswith("round") else C_TYPES[name.split("_")[1]]
        lines.append(loop(name, kind, kind))
    for kind, small in CONVERSIONS:
        lines.append(loop(f"{small}_of_{kind}", "uint16_t", C_TYPES[kind]))
        lines.append(loop(f"{kind}_of_{small}", C_TYPES[kind], "uint16_t"))
    for name in BINARY:
        kind = C_TYPES[name.split("_")[1]]
        lines.append(loop(name, kind, kind, second=True))
    lines.append("int panel_f32(void) { return PANEL_F32; }\nint panel_f64(void) { return PANEL_F64; }")
    for kind in ("f32", "f64"):
        t = C_TYPES[kind]
        pointers = f"const {t} *A, long sam, long sak, const {t} *B, long sbk, long sbp, {t} *C, long scm"
        lines.append(
            f"void any_{kind}({pointers}, int M, int N, int K) "
            f"{{ dot_{kind}(A, sam, sak, B, sbk, sbp, C, scm, M, N, K); }}"
        )
        for m, n, k in CONSTANT_SIZES:
            panel = f"({n} < PANEL_{kind.upper()} ? {n} : PANEL_{kind.upper()})"
            lines.append(
                f"void dot_{kind}_{m}_{n}_{k}(const {t} *A, const {t} *B, {t} *C) "
                f"{{ dot_{kind}(A, {k}, 1, B, {panel}, {k} * {panel}, C, {n}, {m}, {n}, {k}); }}"
            )
    return "\n".join(lines) + "\n"


def architectures() -> list[str]:
    if not X86:
        return ["native"]
    wide = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return ["native", *(["haswell"] if wide else []), "x86-64"]


@pytest.fixture(scope="module", params=architectures())
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "all.c").write_text(source())
    flags = [flag for flag in FLAGS.split() if X86 or flag != "-mprefer-vector-width=512"]
    command = [COMPILER, *flags, "-ffp-contract=fast", f"-march={request.param}", "-fPIC", "-shared", "all.c"]
    subprocess.run([*command, "-o", "all.so", "-lm"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "all.so"))


def run(library: ctypes.CDLL, name: str, dtype: type, *arguments: np.ndarray) -> np.ndarray:
    y = np.empty(len(arguments[0]), dtype)
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (*map(np.ascontiguousarray, arguments), y)]
    getattr(library, f"all_{name}")(*pointers, len(y))
    return y


def floats(kind: str) -> np.ndarray:
    """Numbers of every exponent, those that functions treat specially, and those where they differ most."""
    random = np.random.default_rng(0)
    if kind == "f32":
        every = np.arange(0, 2**32, 4093, dtype=np.uint64).astype(np.uint32).view(np.float32)
    else:
        every = random.integers(0, 2**64, 400_000, dtype=np.uint64).view(np.float64)
    ranges = [(-2, 2), (0.5, 2), (-105, 90), (-152, 129), (-747, 711), (-1077, 1025)]
    near = [random.uniform(low, high, 100_000) for low, high in ranges]
    special = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, -np.nan, 88.72283, 88.72284, -103.97, -103.98, -150.0]
    special += [-149.0, 128.0, 1024.0, -1074.0, -1075.0, 709.78, 709.79, -745.13, -745.14, 65504.0, 65520.0, 65519.99]
    special += [2.0**-24, 2.0**-25, 2.0**-25 * 1.0001, 2.0**-133, 2.0**-134, 2.0**-134 * 1.0001, 3.3961776e38]
    return np.concatenate([every, *near, special, np.nextafter(special, 0), np.arange(-200, 200)]).astype(TYPES[kind])


def ulps(y: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """How far y is from what is exact in a wider type, in units of y's last place; infinite where a NaN is amiss."""
    info = np.finfo(y.dtype)
    exponent = np.maximum(np.frexp(np.abs(exact))[1] - 1, info.minexp)
    error = np.abs(y.astype(exact.dtype) - exact) / np.ldexp(np.ones_like(exact), exponent - info.nmant)
    same = (y == exact.astype(y.dtype)) | (np.isnan(y) & np.isnan(exact))
    return np.where(np.isfinite(error), error, np.where(same, 0, np.inf))


@pytest.mark.parametrize("name", [name for name in UNARY if not name.startswith("round")])
def test_functions(library: ctypes.CDLL, name: str) -> None:
    short, kind = name.split("_")
    function: Callable = {"rsqrt": lambda x: 1 / np.sqrt(x)}.get(short) or getattr(np, short)
    x = floats(kind)
    y = run(library, name, TYPES[kind], x)
    exact = function(x.astype(np.float64 if kind == "f32" else np.longdouble))
    errors = ulps(y, exact)
    worst = np.argmax(errors)
    assert errors[worst] <= 2, f"{name}({x[worst]!r}) = {y[worst]!r} and not {exact[worst]!r}"
    if short == "tanh":
        zeros = x == 0
        assert np.array_equal(np.signbit(y[zeros]), np.signbit(x[zeros]))
    if short == "exp2":
        whole = (x == np.round(x)) & (np.abs(x) < 2000)
        assert np.array_equal(y[whole], exact[whole].astype(y.dtype))


@pytest.mark.parametrize("name", ["exp_f32", "exp_f64", "exp2_f32", "exp2_f64", "tanh_f32", "log_f32", "log_f64"])
def test_every_nan(library: ctypes.CDLL, name: str) -> None:
    kind = name.split("_")[1]
    bits, first, unsigned = (23, 0x7F800000, np.uint32) if kind == "f32" else (52, 0x7FF0000000000000, np.uint64)
    payloads = [1 << bit for bit in range(bits)] + [(1 << bits) - 1, 0x1FF, 0xFFF]
    x = np.array([first + payload for payload in payloads], unsigned)
    x = np.concatenate([x, x | unsigned(1 << (bits + (8 if kind == "f32" else 11)))]).view(TYPES[kind])
    assert np.isnan(run(library, name, TYPES[kind], x)).all()


def halves(kind: str) -> torch.Tensor:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    return every.view(torch.float16 if kind == "f16" else torch.bfloat16)


def same(y: np.ndarray, expected: np.ndarray, kind: str) -> bool:
    """Whether the same bits, but for those of a NaN."""
    infinity = 0x7C00 if kind == "f16" else 0x7F80
    nans = (y & 0x7FFF) > infinity
    return bool(np.array_equal(nans, (expected & 0x7FFF) > infinity) and np.array_equal(y[~nans], expected[~nans]))


@pytest.mark.parametrize("kind,small", CONVERSIONS)
def test_round_trip(library: ctypes.CDLL, kind: str, small: str) -> None:
    every = halves(small)
    bits = every.view(torch.int16).numpy().view(np.uint16)
    wide = run(library, f"{kind}_of_{small}", TYPES[kind], bits)
    assert np.array_equal(wide, every.to(torch.float32).numpy().astype(TYPES[kind]), equal_nan=True)
    assert np.array_equal(np.signbit(wide), bits >= 0x8000)
    assert same(run(library, f"{small}_of_{kind}", np.uint16, wide), bits, small)


def rounded(x: np.ndarray, small: str) -> np.ndarray:
    """x in the small format. NumPy rounds to float16 once, whatever x is; a double is first made odd for bfloat16."""
    if small == "f16":
        return x.astype(np.float16).view(np.uint16)
    single = x.astype(np.float32)
    toward = np.where(np.abs(single.astype(x.dtype)) > np.abs(x), np.nextafter(single, np.float32(0)), single)
    odd = toward.view(np.uint32) | ((toward.astype(x.dtype) != x) & ~np.isnan(x)).astype(np.uint32)
    number = torch.from_numpy(odd.view(np.float32))
    return number.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("kind,small", CONVERSIONS)
def test_rounding(library: ctypes.CDLL, kind: str, small: str) -> None:
    # Between each two neighbours: what lies in the middle, and what lies just off it.
    neighbours = halves(small).float().numpy().astype(TYPES[kind])
    middle = (neighbours[1:] / 2 + neighbours[:-1] / 2).astype(TYPES[kind])
    x = [floats(kind), middle, np.nextafter(middle, TYPES[kind](0)), np.nextafter(middle, 2 * middle)]
    tiny = [middle * TYPES[kind](1 + 2.0**-power) for power in (12, 22, 30, 50)]
    x = np.concatenate([*x, *tiny])
    expected = rounded(x, small)
    assert same(run(library, f"{small}_of_{kind}", np.uint16, x), expected, small)
    if kind == "f32":
        number = torch.from_numpy(x).to(halves(small).dtype)
        assert same(number.view(torch.int16).numpy().view(np.uint16), expected, small)
        y = run(library, f"round_{small}", np.float32, x)
        assert np.array_equal(y, number.float().numpy(), equal_nan=True)
        assert np.array_equal(np.signbit(y), np.signbit(x))


@pytest.mark.parametrize("name", BINARY)
def test_pairs(library: ctypes.CDLL, name: str) -> None:
    short, kind = name.split("_")
    if short == "mulhi":
        random = np.random.default_rng(1)
        bits = 32 if kind == "u32" else 64
        a, b = random.integers(0, 2**bits, (2, 5000), dtype=TYPES[kind])
        a[:3], b[:3] = 2**bits - 1, [2**bits - 1, 0, 1]
        expected = [int(x) * int(y) >> bits for x, y in zip(a, b, strict=True)]
        assert run(library, name, TYPES[kind], a, b).tolist() == expected
        return
    values = [-np.inf, -2.0, 0.0, 1.0, 1.5, np.inf, np.nan]
    a, b = (np.array(side, TYPES[kind]) for side in zip(*itertools.product(values, values), strict=True))
    reference = {"minnum": np.fmin, "maxnum": np.fmax, "minimum": np.minimum, "maximum": np.maximum}[short]
    assert np.array_equal(run(library, name, TYPES[kind], a, b), reference(a, b), equal_nan=True)


def packed(b: np.ndarray, panel: int) -> tuple[np.ndarray, int, int]:
    """b in panels, its row stride and the panels' own. What fills up the last panel must not be read: NaN."""
    depth, columns = b.shape
    width = min(columns, panel)
    count = -(-columns // width)
    filled = np.full((depth, count * width), np.nan, b.dtype)
    filled[:, :columns] = b
    panels = np.ascontiguousarray(filled.reshape(depth, count, width).transpose(1, 0, 2))
    return panels, width, depth * width


def factors(kind: str, m: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A, B, C, C + A B, and how much rounding may change each."""
    random = np.random.default_rng(m * 1000003 + n * 1009 + k)
    a, b, c = (random.standard_normal(shape).astype(TYPES[kind]) for shape in ((m, k), (k, n), (m, n)))
    wide = np.float64 if kind == "f32" else np.longdouble
    exact = c + a.astype(wide) @ b.astype(wide)
    return a, b, c, exact, (k + 1) * np.finfo(TYPES[kind]).eps * (np.abs(c) + np.abs(a) @ np.abs(b))


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_dot(library: ctypes.CDLL, kind: str) -> None:
    panel = getattr(library, f"panel_{kind}")()
    sizes = itertools.product([1, 2, 3, 7, 8, 13, 32], [1, 2, 3, 5, 8, 16, 31, 32, 64, 77], [1, 3, 8, 17, 64])
    for m, n, k in sizes:
        a, b, c, exact, bound = factors(kind, m, n, k)
        by_columns = np.asfortranarray(a)
        for matrix, sam, sak in ((a, k, 1), (by_columns, 1, m)):
            for other, sbk, sbp in ((b, n, panel), packed(b, panel)):
                # C is part of a wider matrix, whose other columns must stay.
                out = np.full((m, n + 3), 7, TYPES[kind])
                out[:, :n] = c
                pointers = [ctypes.c_void_p(x.ctypes.data) for x in (matrix, other, out)]
                strides = [ctypes.c_long(s) for s in (sam, sak, sbk, sbp, n + 3)]
                run_any = getattr(library, f"any_{kind}")
                run_any(pointers[0], *strides[:2], pointers[1], *strides[2:4], pointers[2], strides[4], m, n, k)
                assert (np.abs(out[:, :n] - exact) <= bound).all(), (m, n, k, sam, sak, sbk, sbp)
                assert (out[:, n:] == 7).all(), (m, n, k)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_dot_of_constant_size(library: ctypes.CDLL, kind: str) -> None:
    for m, n, k in CONSTANT_SIZES:
        a, b, c, exact, bound = factors(kind, m, n, k)
        panels, _, _ = packed(b, getattr(library, f"panel_{kind}")())
        getattr(library, f"dot_{kind}_{m}_{n}_{k}")(*(ctypes.c_void_p(x.ctypes.data) for x in (a, panels, c)))
        assert (np.abs(c - exact) <= bound).all(), (m, n, k)
