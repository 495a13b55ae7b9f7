"""Memory: what forward keeps for backward, and the peak of a training step.

`python -m bench.memory PROVIDER SHAPE` prints the peak resident bytes of one training step, as
JSON: the high-water mark of a process cannot be told apart from what it did before, so each
measurement on a CPU has a process of its own.
"""

import contextlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import Call
from bench.shapes import Shape

_ROOT = Path(__file__).resolve().parents[1]
_STATUS = Path("/proc/self/status")


def saved_bytes(forward: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for backward, beyond the tensors `known` and the outputs.

    Every saved tensor passes autograd's hooks, those of C++ nodes, of `autograd.Function` and of
    custom operators alike. Whole storages are counted, each once: a view keeps all of its storage.

    Args:
        forward: returns the outputs, a tensor or nested tuples of them.
        known: inputs and parameters, which live on anyway.
    """
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        # Keeps the storage, so that its address stays its own. Detached, as holding an output
        # itself would make it keep the graph that keeps it.
        saved.append(x.detach())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = forward()
    kept = _storages(saved)
    for address in _storages([*known, *_flat(outputs)]):
        kept.pop(address, None)
    return sum(kept.values())


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    storages = (x.untyped_storage() for x in tensors)
    return {s.data_ptr(): s.nbytes() for s in storages}


def _flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [x for part in outputs for x in _flat(part)]


def kept_for_backward(call: Call) -> int:
    """`saved_bytes` of the call's module."""
    return saved_bytes(lambda: call.module(call.input), [call.input, *call.module.parameters()])


def peak_bytes(provider: str, shape: Shape, device: torch.device) -> tuple[int, str]:
    """The peak that a training step adds to what weights and data take, and of what: "allocated" or "resident"."""
    if device.type == "cuda":
        call = Call(provider, shape, "training step", device)
        call()  # once for what is allocated at the first call only, such as cuBLAS's workspace
        call.clear()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, "allocated"
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", provider, str(shape)],
        cwd=_ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed:\n{done.stderr}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"]), "resident"


def high_water() -> int:
    """The most bytes that were resident in this process at a time.

    On Linux from /proc: ru_maxrss starts there with that of the process that started this one.
    """
    if _STATUS.exists():
        line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_high_water() -> None:
    """Lets the high-water mark start anew from what is resident now, where the system has a way to."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def main(arguments: list[str]) -> None:
    provider, shape = arguments[0], Shape.parse(arguments[1])
    cpu = torch.device("cpu")
    Call(provider, replace(shape, steps=2), "training step", cpu)()  # loads libraries, starts threads
    call = Call(provider, shape, "training step", cpu)
    forget_high_water()
    before = high_water()
    call()
    print(json.dumps({"peak_bytes": high_water() - before}))


if __name__ == "__main__":
    main(sys.argv[1:])
