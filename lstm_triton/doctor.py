"""`python -m lstm_triton doctor`: what this machine has, and whether what should work here does.

Its output belongs into every report of a problem.
"""

import argparse
import os
import platform
import shlex
from collections.abc import Iterator, Sequence

import torch
from torch import nn

import lstm_triton
from lstm_triton import TritonLSTM, cells, dispatch, planning
from lstm_triton.cpu import build
from lstm_triton.gpu import kept, qualification, tuning
from lstm_triton.tolerances import DTYPES, TOLERANCES, precision

CPU = torch.device("cpu")
# Strategies, and whether of layers with projections, which have kernels of their own.
WAYS = [(name, projected) for name in planning.STRATEGIES for projected in (False, True)] + [("wavefront", False)]


def main(argv: Sequence[str]) -> int:
    """Prints what there is and whether it works.

    Args:
        argv: "--qualify" to check all kernels now, "--cells" with the names of cells, "--help".

    Returns:
        0 if all that should work here does, else 1.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lstm_triton doctor",
        description="What this machine has, and whether what should work here does: exit status 0 if so, else 1.",
    )
    parser.add_argument(
        "--qualify",
        action="store_true",
        help="check the kernels of all strategies and dtypes against float64, on each GPU or, where there is none, "
        "natively on the CPU: minutes, as they compile",
    )
    parser.add_argument(
        "--cells",
        type=_cells,
        default=["lstm"],
        metavar="NAMES",
        help="whose kernels are listed and checked, such as gru,rnn-tanh,lstm-norm (default: lstm)",
    )
    options = parser.parse_args(argv)
    devices = [torch.device("cuda", k) for k in range(torch.cuda.device_count())] or [CPU]
    _print("versions", _versions())
    _print("devices", _devices(devices))
    _print("C compiler, for kernels on the CPU", _compiler())
    works = [_backends(device) for device in dict.fromkeys([*devices, CPU])]
    works += [_kernels(device, cell, options.qualify) for device in devices for cell in options.cells]
    _print("cache", _cache(devices))
    print("\nall that should work here does" if all(works) else "\nnot all that should work here does")
    return 0 if all(works) else 1


def _cells(text: str) -> list[str]:
    """Names of cells, with commas between."""
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        try:
            cells.of(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return names


def _print(title: str, lines: Iterator[str]) -> None:
    """As they come: some take a while."""
    print(f"\n{title}", flush=True)
    for line in lines:
        print(f"  {line}", flush=True)


def _versions() -> Iterator[str]:
    yield f"lstm_triton {lstm_triton.__version__}"
    kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda or 'none'}"
    yield f"torch {torch.__version__} ({kind}, cuDNN {torch.backends.cudnn.version() or 'none'})"
    yield f"triton {kept.triton_version()} (TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET', 'not set')})"
    yield f"Python {platform.python_version()}, {platform.platform()}"


def _devices(devices: list[torch.device]) -> Iterator[str]:
    for device in devices:
        if device.type == "cuda":
            p = torch.cuda.get_device_properties(device)
            sizes = f"{p.total_memory / 2**30:.1f} GiB, {p.multi_processor_count} SMs"
            kind = getattr(p, "gcnArchName", "") or f"sm_{p.major}{p.minor}"
            yield f"{device}: {p.name}, {sizes}, {kind}, driver {kept.gpu_driver()}"
    if CPU in devices:
        yield "no GPU that PyTorch can use"
    yield f"cpu: {kept.cpu_name()}, {torch.get_num_threads()} threads"


def _compiler() -> Iterator[str]:
    try:
        found = build.compiler()
    except RuntimeError as error:
        yield str(error)
        return
    yield f"{shlex.join([found.path, *found.options])}: {found.version}"
    yield f"flags: {shlex.join(build._flags())}"


def _backends(device: torch.device) -> bool:
    """Runs a small layer by each backend; whether those run that should."""
    print(f"\nbackends on {device}", flush=True)
    errors = {backend: _error(backend, device) for backend in ("torch", "eager", "triton")}
    for backend, error in errors.items():
        how = " (in Triton's interpreter)" if backend == "triton" and dispatch.interpreting() else ""
        print(f"  {backend}: {error or 'works'}{how}", flush=True)
    explained = TritonLSTM(5, 7, device=device).explain(torch.zeros(3, 2, 5, device=device))
    chosen, _, why = explained.splitlines()[1].removeprefix("backend: ").partition(" ")
    print(f"  auto: {errors[chosen] or 'works'}, a small layer by {chosen} {why}", flush=True)
    # Kernels on the CPU of a machine with a GPU are an extra.
    extra = device == CPU and torch.cuda.is_available() and not build.has_compiler()
    return not any(error for backend, error in errors.items() if backend != "triton" or not extra)


def _error(backend: str, device: torch.device) -> str:
    """What is wrong with a small layer's training step by a backend, in words; empty if nothing is."""
    try:
        theirs, ours = nn.LSTM(5, 7, dtype=torch.float64), TritonLSTM(5, 7, device=device, backend=backend)
        with torch.no_grad():
            for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
                a.copy_(torch.linspace(-0.5, 0.5, a.numel()).view_as(a))
                b.copy_(a)
        x = torch.linspace(-1, 1, 30).view(3, 2, 5)
        results = []
        for module, input in ((theirs, x.double()), (ours, x.to(device))):
            output = module(input)[0]
            gradients = torch.autograd.grad(output.square().sum(), list(module.parameters()))
            results.append([t.detach().to("cpu", torch.float64) for t in (output, *gradients)])
        atol, rtol = TOLERANCES[precision(torch.float32, device)]
        for expected, found in zip(*results, strict=True):
            scale = expected.abs().max()
            if not torch.allclose(found / scale, expected / scale, atol=atol, rtol=rtol):
                return "runs, but its results are not those of nn.LSTM"
    except Exception as error:  # whatever it is, it is said
        return f"does not work: {kept.summary(error)}"
    return ""


def _kernels(device: torch.device, cell: str, qualify: bool) -> bool:
    """Prints which of a cell's kernels were checked; whether none failed."""
    of = "" if cell == "lstm" else f" for {cell}"
    print(f"\nkernels on {device}{of}, checked against float64" + ("" if qualify else " (--qualify checks them now)"))
    if not dispatch.has_triton() or (device == CPU and not build.has_compiler()):
        print("  none can run")
        return True
    names = [name for name in DTYPES if name != "tf32" or device.type == "cuda"]
    print(f"  {'':22}" + "".join(f"{name:>14}" for name in names))
    reasons = []
    for strategy, projected in WAYS:
        if not qualification.cases(strategy, projected, cell):
            continue  # it has no such kernels
        title = f"{strategy}, projected" if projected else strategy
        print(f"  {title:22}", end="", flush=True)
        for name in names:
            about = strategy, name, projected, device, cell
            state = qualification.qualify(*about) if qualify else qualification.state(*about) or "not run"
            print(f"{state.partition(':')[0]:>14}", end="", flush=True)
            if state.startswith("failed"):
                reasons.append(f"{title} in {name} {state}")
        print()
    for reason in reasons:
        print(f"  {reason}")
    return not reasons


def _cache(devices: list[torch.device]) -> Iterator[str]:
    folder = build.cache_folder()
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    yield f"{folder}: {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB"
    setting = f"LSTM_TRITON_TUNE={os.environ.get('LSTM_TRITON_TUNE', 'not set')}"
    yield f"calls on a GPU are {'timed' if tuning.enabled() else 'not timed'} ({setting})"
    machines = [kept.machine(device)._asdict() for device in devices if device.type == "cuda"]
    entries = list(kept.entries("tuned"))
    own = [entry for entry in entries if entry["machine"] in machines]
    yield f"kinds of calls that were timed: {len(own)} here, {len(entries) - len(own)} elsewhere or by other versions"
    for entry in own:
        about, result = entry["about"], entry["result"]
        times = ", ".join(f"{name} {tuning.duration(1e-6 * us)}" for name, us in result["microseconds"].items())
        yield f"{tuning.Bucket(**about)}: {result['winner']} ({times})"
