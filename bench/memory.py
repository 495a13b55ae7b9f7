"""Memory: what forward keeps for backward, and the peak of a training step.

`python -m bench.memory PROVIDER SHAPE [DEVICE]` prints what `training_step` finds, as JSON: the
high-water mark of a process cannot be told apart from what it did before, so each measurement on a
CPU has a process of its own.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import Call, clock, gradient
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
    on_gpu = device.type == "cuda"
    found = training_step(provider, shape, device) if on_gpu else alone(provider, shape, device)
    return found["peak_bytes"], found["peak_kind"]


def alone(provider: str, shape: Shape, device: torch.device) -> dict[str, Any]:
    """What `training_step` finds in a process of its own."""
    return in_process("bench.memory", provider, str(shape), device.type)


def in_process(*arguments: str) -> dict[str, Any]:
    """The JSON that `python -m` with these arguments prints last, on as many threads as this process has.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", *arguments], env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        cwd=_ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def training_step(provider: str, shape: Shape, device: torch.device) -> dict[str, Any]:
    """What one training step takes, and whether its gradients are finite."""
    # Loads libraries, starts threads; on a GPU also for what is allocated at the first call only.
    Call(provider, shape if device.type == "cuda" else replace(shape, steps=2), "training step", device)()
    call = Call(provider, shape, "training step", device)
    found = one_call(call, device)
    gradients = [gradient(x) for x in (call.input, *call.module.parameters())]
    return found | {"finite": all(bool(x.isfinite().all()) for x in gradients)}


def one_call(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Seconds of a call, and the most bytes that it adds to those that were "allocated" or "resident" before."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        forget_high_water()
        before = high_water()
    start = clock()
    call()
    seconds = clock() - start
    most = torch.cuda.max_memory_allocated() if on_gpu else high_water()
    return {"seconds": seconds, "peak_bytes": most - before, "peak_kind": "allocated" if on_gpu else "resident"}


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
    device = torch.device(arguments[2] if len(arguments) > 2 else "cpu")
    print(json.dumps(training_step(provider, shape, device)))


if __name__ == "__main__":
    main(sys.argv[1:])
