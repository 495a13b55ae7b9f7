"""C source to a loaded shared library: compiled by the system's compiler, kept in a cache on disk.

An entry of the cache is one file, `{name}-{key}.so`, with its source beside it. The key covers all that the machine
code depends on: source, header, compiler, flags and CPU. The file ends in a checksum, which the loader of shared
libraries ignores: a truncated library doesn't fail to load, it can kill the process when it is used.

Environment: `CC` the compiler, `LSTM_TRITON_CFLAGS` flags added to its command line, `LSTM_TRITON_CACHE` the folder.
"""

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lstm_triton.cpu import processor

logger = logging.getLogger("lstm_triton")

HEADERS = Path(__file__).parent  # what sources may include
NO_COMPILER = (
    "backend='triton' on a CPU needs a C compiler: install gcc or clang (e.g. apt install gcc), or set CC; {found}"
)
# No -ffast-math: kernels are compared with float64, and NaN and infinity must pass through them.
# -z defs: a function that nothing defines fails here, with the compiler's message, not when the library is loaded.
FLAGS = (
    *(
        "-std=gnu11",
        "-O3",
        "-fno-strict-aliasing",
        "-fopenmp-simd",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=fast",
    ),
    *("-fPIC", "-shared", "-w", "-Wl,-z,defs"),
)
ERROR_LINES = 12  # of a compiler that fails


class Compiler(NamedTuple):
    """A C compiler: its full path, what `CC` puts after it, and the first line of what it says of its version."""

    path: str
    options: tuple[str, ...]
    version: str


@functools.cache
def compiler() -> Compiler:
    """The C compiler: `CC` if it is set, else the first of cc, gcc and clang on PATH; looked for once a process.

    Raises RuntimeError if there is none, saying what to install.
    """
    asked = shlex.split(os.environ.get("CC", ""))
    for command in [asked] if asked else [["cc"], ["gcc"], ["clang"]]:
        path = shutil.which(command[0])
        if path is not None:
            try:
                answer = _run([path, *command[1:], "--version"])
            except OSError:
                continue
            if answer.returncode == 0 and answer.stdout:
                return Compiler(path, tuple(command[1:]), answer.stdout.splitlines()[0])
    found = f"CC={shlex.join(asked)} doesn't run" if asked else "there is no cc, gcc or clang on PATH"
    raise RuntimeError(NO_COMPILER.format(found=found))


def has_compiler() -> bool:
    """Whether `compiler` finds one."""
    try:
        compiler()
    except RuntimeError:
        return False
    return True


def cache_folder() -> Path:
    """Where libraries are kept: `LSTM_TRITON_CACHE`, else lstm_triton in `XDG_CACHE_HOME`, else in ~/.cache."""
    chosen = os.environ.get("LSTM_TRITON_CACHE")
    if chosen:
        return Path(chosen).absolute()
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(folder):  # which the XDG specification says to ignore
        folder = os.path.join(os.path.expanduser("~"), ".cache")
    # A user without a home has ~ left in the path.
    return Path(folder, "lstm_triton") if os.path.isabs(folder) else _private_folder()


def load(source: str, name: str, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The shared library that C `source` compiles to; compiled only where neither process nor disk has it.

    source: a translation unit; it may include the headers beside this file.
    name: what the library's file is called, before the key.
    flags: for the compiler, after the usual ones.

    Safe from several threads and processes. Where the cache's folder can't be used, libraries go into a folder that
    goes with the process, and a warning says so. Raises RuntimeError if there is no compiler or it fails; the message
    has its first lines and where the source is.
    """
    command = [*_flags(), *flags, *shlex.split(os.environ.get("LSTM_TRITON_CFLAGS", ""))]
    key = _key(source, name, command)
    with _guard:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        if key not in _libraries:
            _libraries[key] = _load(source, f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[:100]}-{key[:16]}", key, command)
        return _libraries[key]


_libraries: dict[str, ctypes.CDLL] = {}  # by key, each under its lock
_locks: dict[str, threading.Lock] = {}
_said: set[str] = set()
_guard = threading.Lock()  # of the two above


def _after_fork() -> None:
    """A child has none of the threads that may hold a lock."""
    global _guard
    _guard = threading.Lock()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _load(source: str, stem: str, key: str, flags: list[str]) -> ctypes.CDLL:
    folder = cache_folder()
    try:
        return _open(folder, source, stem, key, flags)
    except OSError as error:  # can't be written, or holds no programs that may run
        private = _private_folder()
        if folder == private:
            raise
        _warn_once(
            "can't keep compiled kernels in %s (%s); each process compiles its own. LSTM_TRITON_CACHE sets a folder",
            folder,
            error,
        )
        return _open(private, source, stem, key, flags)


def _open(folder: Path, source: str, stem: str, key: str, flags: list[str]) -> ctypes.CDLL:
    path = folder / f"{stem}.so"
    if not _is_valid(path, key):
        _build(path, source, key, flags)
    return ctypes.CDLL(str(path))


def _build(path: Path, source: str, key: str, flags: list[str]) -> None:
    """Writes the library and its source. Both appear whole, by a rename: whoever comes second replaces like by like."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    kept = path.with_suffix(".c")
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as work:
        unit, library = Path(work, "source.c"), Path(work, "library.so")
        unit.write_text(source, encoding="utf-8")
        os.replace(unit, kept)
        # A warning, because logging shows no less by default, and someone waits.
        _warn_once("compiling kernels for this CPU, once (a few seconds each); cached in %s", path.parent)
        began = time.perf_counter()
        _compile(kept, library, flags)
        logger.info("compiled %s in %.2f s", path, time.perf_counter() - began)
        checksum = _checksum(key, library.read_bytes())
        with library.open("ab") as file:
            file.write(checksum)
        os.replace(library, path)


def _compile(source: Path, library: Path, flags: list[str]) -> None:
    cc = compiler()
    command = [cc.path, *cc.options, *flags, "-I", str(HEADERS), "-o", str(library), str(source), "-lm"]
    try:
        answer = _run(command)
    except OSError as error:
        raise RuntimeError(f"can't run {cc.path}: {error}") from error
    if answer.returncode != 0 or not library.exists():
        lines = "\n".join(answer.stderr.splitlines()[:ERROR_LINES])
        raise RuntimeError(f"{cc.path} ({cc.version}) failed to compile {source}:\n{lines}\n{shlex.join(command)}")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C"},  # a version in the user's language would be another key
    )


def _flags() -> tuple[str, ...]:
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return (*FLAGS, "-march=native", "-mprefer-vector-width=512")
    if machine in ("aarch64", "arm64"):
        return (*FLAGS, "-mcpu=native")
    return FLAGS


def _key(source: str, name: str, flags: list[str]) -> str:
    headers = [path.read_text(encoding="utf-8") for path in sorted(HEADERS.glob("*.h"))]
    digest = hashlib.sha256()
    cc = compiler()
    for part in (source, name, *headers, cc.path, *cc.options, cc.version, *flags, processor.text()):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)  # with its length: parts can't run into each other
    return digest.hexdigest()


def _checksum(key: str, library: bytes) -> bytes:
    return hashlib.sha256(key.encode() + library).digest()


def _is_valid(path: Path, key: str) -> bool:
    try:
        data = path.read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return data[-size:] == _checksum(key, data[:-size])


@functools.cache
def _private_folder() -> Path:
    """A folder for this process, removed when it ends."""
    folder, owner = tempfile.mkdtemp(prefix="lstm_triton-"), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # a fork's end must not take it from the process that made it
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder)


def _warn_once(message: str, *args: object) -> None:
    with _guard:
        if message in _said:
            return
        _said.add(message)
    logger.warning(f"lstm_triton: {message}", *args)


def read_checked(path: Path, key: str) -> str | None:
    """A text that `write_checked` wrote under this key; None where there is none, or it is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    head, _, text = data.partition(b"\n")
    return text.decode() if head.decode(errors="replace") == f"// {_checksum(key, text).hex()}" else None


def write_checked(path: Path, key: str, text: str) -> None:
    """Keeps a text, whole or not at all; where the folder can't be written it isn't kept."""
    data = text.encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            file.write(f"// {_checksum(key, data).hex()}\n".encode() + data)
        os.replace(file.name, path)
    except OSError:
        pass
