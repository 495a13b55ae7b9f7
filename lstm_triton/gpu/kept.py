"""What was found out about a device, kept on disk: which kernels are right there, and which are fast.

A result is a file of JSON under a line with its checksum, `devices/{kind}-{device}-{key}.json` in the cache's folder
(`LSTM_TRITON_CACHE`). The key covers what the result is about and all that it depends on: the model of the device, the
driver, the versions and the library's own source. Results of other versions stay and are not looked at.
"""

import functools
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lstm_triton.cpu import build

REPORT = "please open an issue with the output of `python -m lstm_triton doctor`"
_DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")
_said: set[str] = set()


class Machine(NamedTuple):
    """What results hold for."""

    device: str  # its model
    driver: str  # of a GPU; the C compiler of a CPU
    torch: str
    triton: str
    lstm_triton: str
    source: str  # a hash of the library's files: kernels, plans and all


@functools.cache
def machine(device: torch.device) -> Machine:
    """What results on this device hold for; found once a process."""
    import lstm_triton

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, driver = f"{properties.name}, {properties.multi_processor_count} SMs", gpu_driver()
    else:
        flags = os.environ.get("LSTM_TRITON_CFLAGS", "")
        name, driver = cpu_name(), f"{build.compiler().version} {flags}".strip()
    return Machine(name, driver, torch.__version__, triton_version(), lstm_triton.__version__, _source())


def gpu_driver() -> str:
    """The version of the driver of GPUs, "unknown" where the system doesn't tell."""
    for path in _DRIVERS:
        try:
            found = re.search(r"\d+\.\d+(\.\d+)*", Path(path).read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue
        if found:
            return found[0]
    return "unknown"


def cpu_name() -> str:
    """The model of this machine's processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def triton_version() -> str:
    """Triton's version, and whether its interpreter is asked for; "none" where it isn't installed."""
    try:
        found = importlib.import_module("triton").__version__
    except ImportError:
        return "none"
    return f"{found}, interpreted" if os.environ.get("TRITON_INTERPRET", "0") == "1" else found


@functools.cache
def _source() -> str:
    digest = hashlib.sha256()
    for package in ("lstm_triton", "lstm_triton.kernels"):
        spec = importlib.util.find_spec(package)  # imports neither kernels nor Triton
        for folder in sorted(spec.submodule_search_locations or ()) if spec is not None else ():
            for path in sorted(Path(folder).rglob("*")):
                if path.suffix in (".py", ".c", ".h"):
                    digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def folder() -> Path:
    """Where results are."""
    return build.cache_folder() / "devices"


def read(kind: str, of: Machine, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of this kind that `write` kept; None where there is none, or none to be trusted."""
    path, key = _place(kind, of, about)
    if not os.path.exists(path):  # asked first: another process may be about to write it
        return None
    text = build.read_checked(path, key)  # of this key: what `write` wrote
    if text is None:
        warn("damaged", f"{path} is damaged or of another version; it is made anew")
        return None
    return json.loads(text)["result"]


def write(kind: str, of: Machine, about: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Keeps a result. Where the folder can't be written the process goes on with what it has in memory."""
    path, key = _place(kind, of, about)
    entry = {"machine": of._asdict(), "about": about, "result": result}
    build.write_checked(path, key, json.dumps(entry, indent=1, ensure_ascii=False) + "\n")
    if build.read_checked(path, key) is None:
        warn(
            "unwritable",
            f"can't keep what was found out about this device in {path.parent}: each process finds it out again. "
            "LSTM_TRITON_CACHE sets a folder",
        )


def entries(kind: str) -> Iterator[dict[str, Any]]:
    """All results of a kind that are on disk, of any machine and version, damaged ones left out."""
    for path in sorted(folder().glob(f"{kind}-*.json")):
        try:
            yield json.loads(path.read_text(encoding="utf-8").partition("\n")[2])
        except (OSError, ValueError):
            continue


def warn(what: str, message: str) -> None:
    """Warns, once a process for each `what`."""
    if what not in _said:
        _said.add(what)
        warnings.warn(f"lstm_triton: {message}", RuntimeWarning, stacklevel=2)


def summary(error: BaseException) -> str:
    """The type of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _place(kind: str, of: Machine, about: Mapping[str, Any]) -> tuple[Path, str]:
    key = hashlib.sha256(json.dumps([kind, of, about], sort_keys=True).encode()).hexdigest()
    device = re.sub(r"[^a-z0-9]+", "-", of.device.lower()).strip("-")[:40]
    return folder() / f"{kind}-{device}-{key[:16]}.json", key
