"""The kernels under gcc's and clang's sanitizers.

A kernel's C is compiled into a program of its own, with a `main` that takes a launch's arguments from a file and runs
the program instances: each on a thread, for ThreadSanitizer, or one after the other, for AddressSanitizer and
UndefinedBehaviorSanitizer. Every tensor has memory of exactly its size there. Put in the place of
`lstm_triton.kernels.launch.start`, it runs whole layers, whose values are compared as well.
"""

import functools
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import barrier_mutants  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from checks import WAYS, assert_close, forced  # noqa: E402
from lstm_triton import functional, kernels, launching, planning, recurrence  # noqa: E402
from lstm_triton.cpu import build, native  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not build.has_compiler(), reason="no C compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux"),
    pytest.mark.skipif(kernels.INTERPRETED, reason="kernels are interpreted, not compiled"),
]

EXIT = 66  # of a program whose sanitizer reports


# ---- Kernels in programs of their own ----

# The file: for a launch its grid, whether each program instance has a thread, how often it runs, and how many pieces
# of memory and arguments there are; the pieces' sizes and bytes; for each argument its piece or -1, and its place there
# or itself. What the pieces hold afterwards goes into a second file.
MAIN = r"""
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sanitizer/asan_interface.h>

static const size_t ends[] = {%(ends)s};  // of the gaps between buffers
#define GAP 64
static const void **args;
static int32_t grid[3];

static void *run(void *place) {
    int index = (int)(intptr_t)place;
    int32_t pid[3] = {index %% grid[0], index / grid[0] %% grid[1], index / grid[0] / grid[1]};
    char *scratch = aligned_alloc(64, scratch_bytes ? scratch_bytes : 64);
    memset(scratch, 0xff, scratch_bytes);  // a NaN in each dtype: what is read before it is written is seen
    for (size_t k = 0; k < sizeof ends / sizeof *ends; k++)
        if (ends[k]) ASAN_POISON_MEMORY_REGION(scratch + ends[k] - GAP, GAP);
    kernel(args, pid, grid, scratch);
    free(scratch);
    return NULL;
}

static void need(int fine) {
    if (!fine) fprintf(stderr, "harness: bad file\n"), exit(3);
}

int main(int argc, char **argv) {
    FILE *file = fopen(argv[1], "rb");
    int32_t head[7];
    need(file && fread(head, sizeof head, 1, file) == 1);
    memcpy(grid, head, sizeof grid);
    int threaded = head[3], repeats = head[4], pieces = head[5], count = head[6];
    int programs = grid[0] * grid[1] * grid[2];
    char **piece = calloc(pieces + 1, sizeof *piece);
    int64_t *bytes = calloc(pieces + 1, sizeof *bytes);
    for (int k = 0; k < pieces; k++) {
        need(fread(&bytes[k], 8, 1, file) == 1);
        need((piece[k] = malloc(bytes[k])) && fread(piece[k], 1, bytes[k], file) == bytes[k]);
    }
    args = calloc(count, sizeof *args);
    for (int k = 0; k < count; k++) {
        int64_t argument[2];
        need(fread(argument, sizeof argument, 1, file) == 1);
        if (argument[0] >= 0)
            args[k] = piece[argument[0]] + argument[1];
        else
            memcpy(&args[k], &argument[1], 8);
    }
    fclose(file);
    pthread_t *threads = calloc(programs * repeats, sizeof *threads);
    for (int k = 0; k < programs * repeats; k++) {
        void *place = (void *)(intptr_t)(k %% programs);
        if (!threaded)
            run(place);
        else if (pthread_create(&threads[k], NULL, run, place))
            return 3;
    }
    for (int k = 0; threaded && k < programs * repeats; k++) pthread_join(threads[k], NULL);
    file = fopen(argv[2], "wb");
    for (int k = 0; k < pieces; k++) fwrite(piece[k], 1, bytes[k], file), free(piece[k]);
    fclose(file), free(piece), free(bytes), free(args), free(threads);
    return 0;
}
"""

THREAD = ("-fsanitize=thread",)
# What the two left out see is an error of addresses, too; without them and with line numbers alone to debug by, gcc
# takes a quarter of the time.
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize=null,object-size", "-fno-sanitize-recover=all")
# As kernels are compiled, but with less effort. `NATIVE` has the widest vectors; without it there are narrow ones.
FLAGS = (*(f for f in build.FLAGS if f[:2] not in ("-O", "-W") and f not in ("-fPIC", "-shared")), "-O1", "-g1")
NATIVE = tuple(f for f in build._flags() if f.startswith("-m"))
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
    "ASAN_OPTIONS": f"exitcode={EXIT}:detect_leaks=0",
    "UBSAN_OPTIONS": f"exitcode={EXIT}:print_stacktrace=1",
    "TSAN_OPTIONS": f"exitcode={EXIT}",
}
REPORT = re.compile(r"ERROR: AddressSanitizer: ([\w-]+)|(runtime error: .*)|WARNING: ThreadSanitizer: ([\w ]+)")


class Reported(Exception):
    """What a sanitizer said."""


def _compile(source: str, path: Path, flags: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    unit = path.with_suffix(".c")
    unit.write_text(source, encoding="utf-8")
    cc = build.compiler()
    command = [cc.path, *cc.options, *FLAGS, *flags, "-I", str(build.HEADERS), "-o", str(path), str(unit)]
    return subprocess.run([*command, "-lm", "-pthread"], capture_output=True, text=True)


def _start(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a program, without random addresses if ThreadSanitizer can't do with them."""
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    if done.returncode and "unexpected memory mapping" in done.stderr and shutil.which("setarch"):
        return subprocess.run(["setarch", "-R", *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    return done


@functools.cache
def lacks(sanitizer: tuple[str, ...], folder: Path) -> str:
    """Why there is no such sanitizer here; "" where there is."""
    path = folder / f"probe{len(sanitizer)}"
    answer = _compile("#include <sanitizer/asan_interface.h>\nint main(void) { return 0; }", path, sanitizer)
    if answer.returncode == 0:
        answer = _start([str(path)])
    return f"{sanitizer[0]} doesn't work here: {answer.stderr.strip()[:300]}" if answer.returncode else ""


@dataclass
class Sanitized:
    """Launches kernels as `lstm_triton.cpu.launch` does, in programs with a sanitizer."""

    sanitizer: tuple[str, ...]
    folder: Path
    flags: tuple[str, ...] = ()
    change: Callable[[str], str] = str  # of the C
    repeats: int = 1  # of each program instance, more than one is a race
    launches: int = 0
    programs: dict[Any, Path] = field(default_factory=dict)

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Raises Reported where the sanitizer has something to say."""
        self.launches += 1
        at = self.folder / f"launch{self.launches}"
        pieces = _pieces([a for a in args if isinstance(a, Tensor)])
        threaded = self.sanitizer == THREAD or constants.get("launch_cooperative_grid", False)
        with at.open("wb") as file:
            file.write(struct.pack("7i", *(*grid, 1, 1)[:3], threaded, self.repeats, len(pieces), len(args)))
            for piece in pieces:
                data = piece.view(torch.uint8).numpy().tobytes()
                file.write(struct.pack("q", len(data)) + data)
            for a in args:
                file.write(_argument(a, pieces))
        program, after = self.program(kernel, args, constants), at.with_suffix(".after")
        done = _start([str(program), str(at), str(after)])
        report = REPORT.search(done.stderr)
        if report:
            assert done.returncode != 0
            raise Reported(next(x for x in report.groups() if x), done.stderr[:6000])
        assert (done.returncode, done.stderr) == (0, "")
        data = after.read_bytes()
        for piece in pieces:
            piece.view(torch.uint8).copy_(torch.frombuffer(bytearray(data[: piece.nbytes]), dtype=torch.uint8))
            data = data[piece.nbytes :]
        assert not data

    def program(self, kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> Path:
        kinds = [native._POINTERS[a.dtype] if isinstance(a, Tensor) else native._kind(a, "") for a in args]
        key = (kernel, *kinds, *constants.items())
        if key not in self.programs:
            left = iter(kinds)
            signature = {p.name: "constexpr" if p.is_constexpr else next(left) for p in kernel.params}
            wanted = {name: constants[name] for name, kind in signature.items() if kind == "constexpr"}
            source = self.change(native.source(kernel, signature, wanted))
            path = self.folder / f"{kernel.fn.__name__}{len(self.programs)}"
            done = _compile(source + MAIN % {"ends": _gaps(source)}, path, (*self.sanitizer, *self.flags))
            assert done.returncode == 0, done.stderr[:3000]
            self.programs[key] = path
        return self.programs[key]


def _gaps(source: str) -> str:
    """Where the gaps between the buffers of a kernel's scratch memory end, the last one's included."""
    starts = [int(n) for n in re.findall(r"\(scratch \+ (\d+)\);", source)]
    size = re.search(r"scratch_bytes = (\d+);", source)
    assert size and len(set(starts)) == len(starts)
    return ", ".join(str(n) for n in sorted([*starts, int(size[1])]))


def _pieces(tensors: list[Tensor]) -> list[Tensor]:
    """The memory behind tensors, flat: one piece for each, or for all that are the same memory."""
    pieces: dict[int, Tensor] = {}
    for tensor in tensors:
        assert tensor.is_contiguous()
        flat = tensor.detach().view(-1)
        if flat.numel() and (flat.data_ptr() not in pieces or pieces[flat.data_ptr()].nbytes < flat.nbytes):
            pieces[flat.data_ptr()] = flat
    ends = sorted((at, at + p.nbytes) for at, p in pieces.items())
    assert all(end <= start for (_, end), (start, _) in zip(ends, ends[1:], strict=False)), "tensors overlap"
    return list(pieces.values())


def _argument(value: Tensor | int | float, pieces: list[Tensor]) -> bytes:
    if isinstance(value, Tensor):
        if value.numel() == 0:
            return struct.pack("qq", -1, 0)  # PyTorch has no memory for it
        return struct.pack("qq", [p.data_ptr() for p in pieces].index(value.data_ptr()), 0)
    return struct.pack("q", -1) + struct.pack("f4x" if isinstance(value, float) else "q", value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sanitized")


@pytest.fixture
def sanitized(folder: Path, tmp_path: Path) -> Callable[..., Sanitized]:
    def make(sanitizer: tuple[str, ...], **options: Any) -> Sanitized:
        reason = lacks(sanitizer, folder)
        if reason:
            pytest.skip(reason)
        return Sanitized(sanitizer, tmp_path, **options)

    return make


# ---- The project's kernels ----


@dataclass(frozen=True)
class Layer:
    """One layer's call by Triton kernels."""

    dtype: torch.dtype
    steps: int
    batch: int
    hidden: int
    size: int = 0  # of projections
    bidirectional: bool = False
    ragged: bool = False
    dropout: str = ""  # "step" or "sequence": a mask drawn; "given": one for each step; "given once"
    trains: bool = True

    def run(self, backend: str) -> dict[str, Tensor]:
        """Outputs and gradients; backend "eager" in float64 is the reference."""
        torch.manual_seed(0)
        directions, k = 1 + self.bidirectional, self.size or self.hidden
        names, shapes = ["ih", "hh", "b_ih", "b_hh"], [(4 * self.hidden, 3), (4 * self.hidden, k)]
        shapes += [(4 * self.hidden,), (4 * self.hidden,)]
        if self.size:
            names, shapes = [*names, "hr"], [*shapes, (k, self.hidden)]
        sizes = torch.arange(self.steps, 0, -1).mul(self.batch).div(self.steps).ceil().long() if self.ragged else None
        rows = (int(sizes.sum()),) if sizes is not None else (self.steps, self.batch)
        tensors = {
            "input": torch.randn(*rows, 3),
            "h": torch.randn(directions, self.batch, k),
            "c": torch.randn(directions, self.batch, self.hidden),
            **{f"{n}{d}": 0.3 * torch.randn(s) for d in range(directions) for n, s in zip(names, shapes, strict=True)},
        }
        mask = None
        if self.dropout.startswith("given"):
            count = 1 if self.dropout == "given once" else self.steps
            mask = torch.randint(0, 2, (directions, count, self.batch, k)) * 2.0
        dtype = torch.float64 if backend == "eager" else self.dtype
        leaves = {n: t.to(self.dtype).to(dtype).requires_grad_(self.trains) for n, t in tensors.items()}
        x, h, c, *weights = leaves.values()
        torch.manual_seed(1)  # what a drawn mask follows from
        outputs = functional.lstm(
            x, (h, c), weights, batch_sizes=sizes, bidirectional=self.bidirectional, training=True,
            recurrent_dropout=0.0 if mask is not None or not self.dropout else 0.4,
            recurrent_dropout_mode=self.dropout if self.dropout in functional.MODES else "step",
            recurrent_dropout_mask=None if mask is None else mask.to(dtype), backend=backend,
        )  # fmt: skip
        named = dict(zip(("output", "hn", "cn"), outputs, strict=True))
        if self.trains:
            gradients = torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(y) for y in outputs])
            named |= {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
        return {name: t.detach() for name, t in named.items()}

    def check(self, launcher: Sanitized, way: str, monkeypatch: pytest.MonkeyPatch, small: bool = True) -> None:
        """Compares what comes of the launcher's launches; small: tiles of which a batch and H take several."""

        def start(kernel: Any, grid: Any, args: list[Any], shared: dict[str, Any], **own: Any) -> None:
            launcher.launch(kernel, grid, *args, **shared, **own)

        for module in (*kernels.STRATEGIES.values(), kernels.cooperative_backward, kernels.rebuild):
            monkeypatch.setattr(module, "start", start)
        choose = launching.of

        def chosen(layer: recurrence.Layer) -> planning.Plan:
            found = choose(layer)
            if way == "step":
                return replace(found, block_b=4, block_h=16, block_k=16)
            return replace(found, block_b=4)

        with monkeypatch.context() as patch:
            if small:
                patch.setattr(launching, "of", chosen)
            with forced(way):
                ours = self.run("triton")
        assert launcher.launches > 0
        assert_close(ours, self.run("eager"), self.dtype)


LAYERS = [
    Layer(torch.float32, 3, 5, 17, bidirectional=True, ragged=True, dropout="step"),
    Layer(torch.float32, 4, 6, 18, size=5, bidirectional=True, dropout="given once"),
    Layer(torch.float16, 3, 7, 9, size=3, ragged=True, dropout="given"),
    Layer(torch.bfloat16, 1, 1, 33),
    Layer(torch.float64, 4, 5, 7, size=2, ragged=True, dropout="sequence"),
    Layer(torch.float32, 2, 9, 20, size=6, trains=False),
]


def _name(layer: Layer) -> str:
    words = [str(layer.dtype).removeprefix("torch."), layer.dropout]
    words += [name for name in ("size", "bidirectional", "ragged") if getattr(layer, name)]
    return " ".join(word for word in words if word) + ("" if layer.trains else " alone")


def _ways(layers: list[Layer]) -> list[Any]:
    """Each layer in all ways; one with projections can't be fused, and one of those that can is enough."""
    return [
        pytest.param(layer, way, id=f"{_name(layer)} {way}")
        for layer in layers
        for way in (*WAYS, "cooperative")
        if way != "fused" or layer is LAYERS[0]
    ]


@pytest.mark.parametrize("layer,way", _ways(LAYERS[:2]))
def test_races(sanitized: Callable[..., Sanitized], monkeypatch: pytest.MonkeyPatch, layer: Layer, way: str) -> None:
    """No program reads or writes what another one writes, unless a barrier orders them."""
    layer.check(sanitized(THREAD), way, monkeypatch)


# Wrong whichever program comes first; that on the CPU a program is one thread, so that all it wrote is in order, is why
# the mutant is left out whose stores come too late.
@pytest.mark.parametrize("mutant", ["relaxed arrival", "relaxed wait", "no wait", "one arrival short"])
def test_wrong_barriers(sanitized: Callable[..., Sanitized], monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    """ThreadSanitizer sees that nothing orders what the programs of the cooperative kernels tell each other."""
    barrier_mutants.put_in(mutant, monkeypatch)
    for kernel in (kernels.cooperative.forward_kernel, kernels.cooperative_backward.backward_kernel):
        monkeypatch.setattr(kernel, "hash", None)  # of its source and what that calls
    with pytest.raises(Reported, match="data race"):
        replace(LAYERS[0], steps=9).check(sanitized(THREAD), "cooperative", monkeypatch)


def test_program_that_runs_twice(sanitized: Callable[..., Sanitized], monkeypatch: pytest.MonkeyPatch) -> None:
    """ThreadSanitizer does see what these programs write."""
    with pytest.raises(Reported, match="data race"):
        LAYERS[3].check(sanitized(THREAD, repeats=2), "persistent", monkeypatch)


@pytest.mark.parametrize("layer,way", _ways(LAYERS))
def test_memory_and_arithmetic(
    sanitized: Callable[..., Sanitized], monkeypatch: pytest.MonkeyPatch, layer: Layer, way: str
) -> None:
    """Within all bounds, nothing that C leaves undefined, and no value from memory that wasn't written."""
    layer.check(sanitized(ADDRESS, flags=NATIVE), way, monkeypatch)


@pytest.mark.parametrize("way", WAYS)
def test_memory_and_arithmetic_with_narrow_vectors(
    sanitized: Callable[..., Sanitized], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The same on the plan's own tiles, with the vectors that every processor of the architecture has."""
    replace(LAYERS[0], hidden=7).check(sanitized(ADDRESS), way, monkeypatch, small=False)


# ---- What the sanitizers see ----


@triton.jit
def sums_kernel(x_ptr, y_ptr, n, divisor, OFF_BY_ONE: tl.constexpr):
    """y[i] = sum of x[i] / divisor, for x of up to 4 rows of 16."""
    rows = tl.arange(0, 4)
    at = rows[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + at, mask=at <= n if OFF_BY_ONE else at < n, other=0)
    tl.store(y_ptr + rows, tl.sum(x, 1) // divisor)


def test_what_the_sanitizers_see(sanitized: Callable[..., Sanitized]) -> None:
    """One element beyond a tensor; one beyond a buffer of scratch memory, or one not written; a division by zero."""
    n = 61  # with a whole number of lines there might be a gap by chance
    x = torch.randint(100, (n,), dtype=torch.int32)
    expected = torch.cat([x, x.new_zeros(64 - n)]).view(4, 16).sum(1) // 3

    def run(divisor: int = 3, wrong: bool = False, **options: Any) -> Tensor:
        y = torch.empty(4, dtype=torch.int32)
        sanitized(ADDRESS, **options).launch(sums_kernel, (1,), x, y, n, divisor, OFF_BY_ONE=wrong)
        return y

    def shifted(source: str) -> str:
        """All but the last element of the first buffer stay in it."""
        moved = source.replace("(scratch + 0);", "(scratch + 4);")
        assert moved != source
        return moved

    def unwritten(source: str) -> str:
        """The first buffer keeps what was in it."""
        cut = re.sub(r"\bm\d+\[.*\] = \w+;", ";", source, count=1)
        assert cut != source
        return cut

    assert torch.equal(run(), expected)
    assert not torch.equal(run(change=unwritten), expected)
    with pytest.raises(Reported, match="heap-buffer-overflow"):
        run(wrong=True)
    with pytest.raises(Reported, match="use-after-poison"):
        run(change=shifted)
    with pytest.raises(Reported, match="division by zero"):
        run(divisor=0)


@triton.jit
def integers_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """y[0 … 3] = x + x, x * x, x << 7 and -x, each wrapped around."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0)
    tl.store(y_ptr + at, x + x, mask=at < n)
    tl.store(y_ptr + n + at, x * x, mask=at < n)
    tl.store(y_ptr + 2 * n + at, x << 7, mask=at < n)
    tl.store(y_ptr + 3 * n + at, -x, mask=at < n)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=lambda d: str(d)[6:])
def test_integers_wrap_around(sanitized: Callable[..., Sanitized], dtype: torch.dtype) -> None:
    """In C an overflow is undefined; in Triton it isn't."""
    limits = torch.iinfo(dtype)
    x = torch.tensor([limits.min, limits.min + 1, -1, 0, 1, limits.max - 1, limits.max], dtype=dtype)
    y = torch.empty(4, len(x), dtype=dtype)
    sanitized(ADDRESS).launch(integers_kernel, (1,), x, y, len(x), BLOCK=8)
    assert torch.equal(y, torch.stack([x + x, x * x, x << 7, -x]))
