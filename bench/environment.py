"""What a result was measured on."""

import datetime
import importlib
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).resolve().parents[1]

# Words of a device's name that do not tell one from another here.
_NOISE = r"\((r|tm|c)\)|@.*|\bcpu\b|\bprocessor\b|\b\d+-core\b|\bwith\b.*|\b\d+ ?gb\b|\bhbm\w*|\bpcie\b|\bsxm\d*\b"


def environment() -> dict[str, Any]:
    """The device, the software, the commit and the time, for results to carry along."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "device_type": "cuda" if cuda else "cpu",
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": driver() if cuda else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "onednn": onednn(),
        "torch": torch.__version__,
        "triton": triton(),
        "python": platform.python_version(),
        "os": platform.platform(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def slug(name: str) -> str:
    """A device's name as that of a folder: "NVIDIA H100 80GB HBM3" is nvidia-h100."""
    name = re.sub(_NOISE, " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "unknown"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader,nounits", "--id=0")


def onednn() -> str | None:
    found = re.search(r"(?:MKL-DNN|oneDNN) v([\d.]+)", torch.__config__.show())
    return found[1] if found else None


def triton() -> str | None:
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return None


def commit() -> str | None:
    """The commit, with "+changes" where files other than reports differ from it; None outside a checkout."""
    known = _output("git", "rev-parse", "--short=12", "HEAD")
    if known is None:
        return None
    return known + ("+changes" if _output("git", "status", "--porcelain", "--", ".", ":!reports") else "")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
