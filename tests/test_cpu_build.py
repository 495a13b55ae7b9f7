"""The C compiler's cache (`lstm_triton.cpu.build`) and the runs of its kernels (`lstm_triton.cpu.runtime`)."""

import ctypes
import logging
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lstm_triton.cpu import build, processor, runtime

pytestmark = [
    pytest.mark.skipif(not build.has_compiler(), reason="no C compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux"),
]

ANSWER = "int answer(void) { return 42; }"
# A process that has build.py alone: neither PyTorch's start nor this process's libraries.
PROCESS = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("build", sys.argv[1])
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
build.compiler()
began = time.perf_counter()
library = build.load(sys.argv[2], "probe")
print(library.answer(), time.perf_counter() - began)
"""

KERNEL = """
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#define SCRATCH {scratch}
const size_t scratch_bytes = SCRATCH;
void kernel(const void *const *args, const int32_t *pid, const int32_t *grid, char *scratch) {{
    int64_t index = pid[0] + (int64_t)grid[0] * (pid[1] + (int64_t)grid[1] * pid[2]);
    int64_t programs = (int64_t)grid[0] * grid[1] * grid[2];
    (void)index, (void)programs;
    {body}
}}
"""
COUNT = "((_Atomic int32_t *)args[0])[index]++;"
# Slot 0: programs in the order in which they begin. Slot 1: how many began.
ORDER = "((int64_t *)args[0])[(*(_Atomic int64_t *)args[1])++] = index;"
# Slot 0: arrivals.
WAIT = "_Atomic int64_t *arrived = (void *)args[0]; (*arrived)++; while (*arrived < programs) sched_yield();"
# Slot 0: programs that had aligned memory, which no other wrote to.
SCRATCH = """
    int good = (uintptr_t)scratch % 64 == 0;
    memset(scratch, (int)index + 1, SCRATCH);
    for (int i = 0; i < 20; i++) {
        sched_yield();
        for (size_t j = 0; j < SCRATCH; j++) good &= scratch[j] == (char)(index + 1);
    }
    *(_Atomic int32_t *)args[0] += good;
"""


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LSTM_TRITON_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, for a process that seems to have loaded nothing."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LSTM_TRITON_CACHE", str(folder))
    monkeypatch.setattr(build, "_libraries", {})
    monkeypatch.setattr(build, "_said", set())
    compiler = build.compiler  # a test may replace it
    compiler.cache_clear()
    yield folder
    compiler.cache_clear()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Sources that were compiled."""
    sources: list[Path] = []
    compile_ = build._compile

    def count(source: Path, library: Path, flags: list[str]) -> None:
        sources.append(source)
        compile_(source, library, flags)

    monkeypatch.setattr(build, "_compile", count)
    return sources


def start(source: str = ANSWER) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(build.__file__), source]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[bool, float]:
    """Whether the process compiled, and how long its load took, in seconds; it must have the answer."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    answer, seconds = out.split()
    assert answer == "42"
    return "compiling kernels" in err, float(seconds)


def kernel(body: str, scratch: str = "0") -> runtime.Kernel:
    return runtime.Kernel(build.load(KERNEL.format(body=body, scratch=scratch), "test"))


def pointers(*tensors: torch.Tensor) -> bytes:
    return struct.pack(f"={len(tensors)}Q", *(tensor.data_ptr() for tensor in tensors))


def in_child(work: Callable[[], None]) -> None:
    """Runs `work` in a child of fork; it must end without an exception, in 20 s."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that hangs dies
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


# The cache


def test_hit_and_miss(fresh: Path, compiled: list[Path]) -> None:
    first = build.load(ANSWER, "a/name")
    assert first.answer() == 42
    assert build.load(ANSWER, "a/name") is first
    assert len(compiled) == 1
    build._libraries.clear()
    assert build.load(ANSWER, "a/name").answer() == 42
    assert len(compiled) == 1
    assert build.load(ANSWER.replace("42", "43"), "a/name").answer() == 43
    assert len(compiled) == 2
    names = sorted(path.name for path in fresh.iterdir())
    assert len(names) == 4 and all(name.startswith("a_name-") for name in names)
    assert [Path(name).suffix for name in names] == [".c", ".so"] * 2


def test_second_process_starts_from_cache(fresh: Path) -> None:
    compiled, cold = finish(start())
    assert compiled
    compiled, warm = finish(start())
    assert not compiled
    print(f"compiled and loaded in {cold * 1e3:.1f} ms, loaded from the cache in {warm * 1e3:.1f} ms")


@pytest.mark.parametrize("damage", ["empty", "truncated", "changed", "garbage", "of another key"])
def test_damaged_entry_is_rebuilt(fresh: Path, damage: str) -> None:
    finish(start())
    (entry,) = fresh.glob("*.so")
    good = entry.read_bytes()
    if damage == "of another key":
        entry.unlink()
        finish(start(ANSWER + "\nint other;"))
        (other,) = fresh.glob("*.so")
        other.rename(entry)
    else:
        middle = len(good) // 2
        changed = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
        bad = {"empty": b"", "truncated": good[:middle], "changed": changed, "garbage": b"garbage" * 1000}
        entry.write_bytes(bad[damage])
    assert finish(start())[0]
    assert entry.read_bytes() == good
    assert not finish(start())[0]


def test_processes_build_at_once(fresh: Path) -> None:
    for process in [start() for _ in range(3)]:
        finish(process)
    assert sorted(path.suffix for path in fresh.iterdir()) == [".c", ".so"]


def test_threads_compile_once(fresh: Path, compiled: list[Path]) -> None:
    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(lambda _: build.load(ANSWER, "once"), range(8)))
    assert len(compiled) == 1
    assert all(library is libraries[0] for library in libraries)


def test_unwritable_folder(
    fresh: Path, compiled: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.write_text("a file, so nothing can be in it, whoever asks")
    monkeypatch.setenv("LSTM_TRITON_CACHE", str(fresh / "folder"))
    assert build.load(ANSWER, "private").answer() == 42
    assert build.load(ANSWER + "\n", "private").answer() == 42
    assert [
        record.message for record in caplog.records if "can't keep" in record.message and str(fresh) in record.message
    ]
    assert sum("can't keep" in record.message for record in caplog.records) == 1
    private = compiled[0].parent
    assert private.stat().st_mode & 0o077 == 0


def test_announced_once(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(2):
        build.load(f"{ANSWER} int i{i};", "announced")
    (record,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert record.name == "lstm_triton"
    assert "once" in record.message and str(fresh) in record.message


def test_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LSTM_TRITON_CACHE", "here")
    assert build.cache_folder() == Path.cwd() / "here"
    monkeypatch.delenv("LSTM_TRITON_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / "lstm_triton"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert build.cache_folder() == tmp_path / "home" / ".cache" / "lstm_triton"


# The compiler


def test_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert not build.has_compiler()
    with pytest.raises(RuntimeError, match="install gcc or clang.*no cc, gcc or clang on PATH"):
        build.load(ANSWER, "none")
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    with pytest.raises(RuntimeError, match="install gcc or clang.*CC=no-such-compiler -O1"):
        build.compiler()


def test_chosen_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    usual = build.compiler()
    assert usual.version
    monkeypatch.setenv("CC", f"{usual.path} -DANSWER=7")
    assert build.compiler() is usual  # looked for once
    build.compiler.cache_clear()
    assert build.compiler() == (usual.path, ("-DANSWER=7",), usual.version)
    assert build.load("int answer(void) { return ANSWER; }", "chosen").answer() == 7


@pytest.mark.parametrize(
    "source", ["int answer(void) { return nothing; }", "int f(void); int answer(void) { return f(); }"]
)
def test_bad_source(fresh: Path, source: str) -> None:
    with pytest.raises(RuntimeError, match="failed to compile") as caught:
        build.load(source, "bad")
    assert "nothing" in str(caught.value) or "undefined" in str(caught.value)
    (kept,) = fresh.iterdir()
    assert str(kept) in str(caught.value)
    assert kept.read_text() == source


def test_key(fresh: Path, compiled: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What changes the machine code changes the key."""
    header = tmp_path / "include" / "kernel.h"
    header.parent.mkdir()
    header.write_text("#define ANSWER 1\n")
    monkeypatch.setattr(build, "HEADERS", header.parent)
    source = '#include "kernel.h"\nint answer(void) { return ANSWER; }'
    assert build.load(source, "key").answer() == 1
    header.write_text("#define ANSWER 2\n")
    assert build.load(source, "key").answer() == 2
    asked = "#ifdef FLAG\nint answer(void) { return FLAG; }\n#else\nint answer(void) { return 0; }\n#endif"
    assert build.load(asked, "key").answer() == 0
    assert build.load(asked, "key", ["-DFLAG=1"]).answer() == 1
    monkeypatch.setenv("LSTM_TRITON_CFLAGS", "-O1 '-DFLAG=(1 + 1)'")
    assert build.load(asked, "key").answer() == 2
    monkeypatch.setattr(processor, "text", lambda: "another")
    build.load(asked, "key")
    another = build.compiler()._replace(version="another")
    monkeypatch.setattr(build, "compiler", lambda: another)
    build.load(asked, "key")
    assert len(set(compiled)) == len(compiled) == 7


# Runs


@pytest.mark.parametrize("cooperative", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_each_program_runs_once(threads: int, cooperative: bool) -> None:
    torch.set_num_threads(threads)
    count = kernel(COUNT)
    for grid in [(1, 1, 1), (2, 1, 1), (1, 1, 3), (5, 3, 2), (1, 7, 1)]:
        ran = torch.zeros(grid[0] * grid[1] * grid[2] + 1, dtype=torch.int32)
        for _ in range(20):
            runtime.run(count, pointers(ran), grid, cooperative)
        assert ran[:-1].eq(20).all() and ran[-1] == 0
    ran = torch.zeros(1, dtype=torch.int32)
    runtime.run(count, pointers(ran), (3, 0, 1), cooperative)
    assert ran[0] == 0


def test_order() -> None:
    torch.set_num_threads(1)
    order, began = torch.full((30,), -1), torch.zeros(1, dtype=torch.int64)
    runtime.run(kernel(ORDER), pointers(order, began), (5, 3, 2))
    assert order.tolist() == list(range(30))


def test_arguments() -> None:
    total = kernel("*(double *)args[0] = *(int32_t *)&args[1] + *(int64_t *)&args[2] + (double)*(float *)&args[3];")
    out = torch.zeros(1, dtype=torch.float64)
    runtime.run(total, struct.pack("=Qi4xqf4x", out.data_ptr(), -3, 1 << 40, 0.25), (1, 1, 1))
    assert out.item() == (1 << 40) - 3 + 0.25


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_cooperative_programs_wait_for_each_other(threads: int, pool: bool) -> None:
    torch.set_num_threads(threads)
    wait = kernel(WAIT)
    if not pool:
        runtime.load().lstm_triton_use_openmp(None, None)
    try:
        for programs in (2, 3, 9):
            for _ in range(20):
                arrived = torch.zeros(1, dtype=torch.int64)
                runtime.run(wait, pointers(arrived), (programs, 1, 1), cooperative=True)
                assert arrived.item() == programs
    finally:
        runtime.load().lstm_triton_use_openmp(*runtime.openmp())


def test_inside_a_parallel_region() -> None:
    """Where the pool has no threads left, cooperative programs have threads of their own, and others the one."""
    parallel = runtime.openmp()[0]
    if parallel is None:
        pytest.skip("PyTorch isn't on OpenMP")
    wait, count = kernel(WAIT), kernel(COUNT)
    results: list[tuple[int, bool]] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def region(_: int) -> None:
        torch.set_num_threads(3)
        arrived, ran = torch.zeros(1, dtype=torch.int64), torch.zeros(5, dtype=torch.int32)
        runtime.run(wait, pointers(arrived), (4, 1, 1), cooperative=True)
        runtime.run(count, pointers(ran), (5, 1, 1))
        results.append((int(arrived), bool(ran.eq(1).all())))

    start_region = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(
        parallel.value
    )
    start_region(ctypes.cast(region, ctypes.c_void_p), None, 2, 0)
    assert results == [(4, True)] * 2


def test_thread_limit() -> None:
    """An OpenMP runtime that gives fewer threads than asked for."""
    script = """
import struct, sys, torch
from lstm_triton.cpu import build, runtime
torch.set_num_threads(4)
arrived = torch.zeros(1, dtype=torch.int64)
kernel = runtime.Kernel(build.load(sys.argv[1], "test"))
runtime.run(kernel, struct.pack("=Q", arrived.data_ptr()), (4, 1, 1), cooperative=True)
assert arrived.item() == 4
"""
    command = [sys.executable, "-c", script, KERNEL.format(body=WAIT, scratch="0")]
    root = Path(__file__).parents[1]
    subprocess.run(command, env={**os.environ, "OMP_THREAD_LIMIT": "2"}, cwd=root, check=True, timeout=60)


@pytest.mark.parametrize("cooperative", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_scratch(threads: int, cooperative: bool) -> None:
    """Aligned and a program's own, in sizes that grow and shrink from call to call."""
    torch.set_num_threads(threads)
    for size in (100, 5000, 64, 100_000, 1):
        good = torch.zeros(1, dtype=torch.int32)
        runtime.run(kernel(SCRATCH, str(size)), pointers(good), (7, 1, 1), cooperative)
        assert good.item() == 7


def test_memory_is_given_back() -> None:
    """A leak would be of 1.2 GB: scratch of threads that end, and of a thread that asks again."""
    torch.set_num_threads(2)
    touch = kernel("memset(scratch, 1, SCRATCH);", "1 << 20")

    def resident() -> int:  # bytes
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def repeat() -> None:
        for _ in range(300):
            runtime.run(touch, b"", (4, 1, 1), cooperative=True)
        for _ in range(3):
            thread = threading.Thread(target=runtime.run, args=(touch, b"", (1, 1, 1)))
            thread.start()
            thread.join()

    repeat()
    before = resident()
    repeat()
    assert resident() - before < 50 << 20


@pytest.mark.parametrize("threads", [1, 2])
def test_no_memory(threads: int) -> None:
    torch.set_num_threads(threads)
    huge = kernel("", "(size_t)1 << 62")
    for grid, cooperative in [((1, 1, 1), False), ((4, 1, 1), False), ((4, 1, 1), True)]:
        with pytest.raises(MemoryError, match="bytes a thread"):
            runtime.run(huge, b"", grid, cooperative)
    good = torch.zeros(1, dtype=torch.int32)
    runtime.run(kernel(SCRATCH, "100"), pointers(good), (4, 1, 1), cooperative=True)
    assert good.item() == 4


def test_no_threads() -> None:
    """Cooperative programs whose threads can't all start don't wait for them."""
    wait = kernel(WAIT)
    arrived = torch.zeros(1, dtype=torch.int64)

    def work() -> None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), resource.RLIM_INFINITY))  # room for few stacks
        with pytest.raises(RuntimeError, match="can't start the threads"):
            runtime.run(wait, pointers(arrived), (256, 1, 1), cooperative=True)
        assert arrived.item() == 0

    in_child(work)


def test_called_from_several_threads() -> None:
    count, wait, scratch = kernel(COUNT), kernel(WAIT), kernel(SCRATCH, "1000")

    def work(_: int) -> bool:
        torch.set_num_threads(2)
        ran, good = torch.zeros(30, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        for _ in range(20):
            runtime.run(count, pointers(ran), (5, 3, 2))
            runtime.run(scratch, pointers(good), (3, 1, 1))
            arrived = torch.zeros(1, dtype=torch.int64)
            runtime.run(wait, pointers(arrived), (3, 1, 1), cooperative=True)
        return bool(ran.eq(20).all()) and good.item() == 60

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_without_the_gil() -> None:
    """Other Python threads go on while a kernel runs: here it waits for one."""
    wait = kernel("while (!*(_Atomic int64_t *)args[0]) sched_yield();")
    flag = torch.zeros(1, dtype=torch.int64)

    def work() -> None:
        thread = threading.Thread(target=runtime.run, args=(wait, pointers(flag), (1, 1, 1)))
        thread.start()
        time.sleep(0.01)
        flag.fill_(1)
        thread.join()

    in_child(work)  # which is ended if it hangs


def test_after_fork() -> None:
    """A child runs kernels though the pool's threads stayed with its parent, and so does the parent after it."""
    torch.set_num_threads(2)
    count, wait = kernel(COUNT), kernel(WAIT)
    ran, arrived = torch.zeros(30, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)

    def work() -> None:
        runtime.run(count, pointers(ran), (5, 3, 2))
        assert ran.eq(2).all()
        runtime.run(wait, pointers(arrived), (3, 1, 1), cooperative=True)
        assert build.load(f"{ANSWER} int child;", "child").answer() == 42

    runtime.run(count, pointers(ran), (5, 3, 2))
    in_child(work)
    runtime.run(count, pointers(ran), (5, 3, 2))
    assert ran.eq(2).all()


def test_fork_before_the_first_run() -> None:
    torch.set_num_threads(2)
    count = KERNEL.format(body=COUNT, scratch="0")
    torch.ones(1_000_000).add_(1)  # starts the pool's threads

    def work() -> None:
        runtime.load.cache_clear()
        ran = torch.zeros(30, dtype=torch.int32)
        runtime.run(runtime.Kernel(build.load(count, "test")), pointers(ran), (5, 3, 2))
        assert ran.eq(1).all()

    in_child(work)


@pytest.mark.parametrize(
    "vendor,family,flags,wide",
    [
        ("GenuineIntel", 6, "avx2 avx512f", True),
        ("GenuineIntel", 6, "avx2", False),
        ("AuthenticAMD", 25, "avx2 avx512f", False),  # Zen 4
        ("AuthenticAMD", 26, "avx512f avx2", True),
        ("AuthenticAMD", "?", "avx512f", False),
    ],
)
def test_processors_that_multiply_wide_vectors(vendor: str, family: object, flags: str, wide: bool) -> None:
    text = f"x86_64\ncpu family\t: {family}\nflags\t\t: {flags}\nmodel name\t: Xeon: x\nvendor_id\t: {vendor}"
    assert processor.is_wide(text) is wide
    assert not processor.is_wide("aarch64\nCPU implementer\t: 0x41\nFeatures\t: fp asimd")
