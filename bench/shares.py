"""`python -m bench.shares`: where the time of a training step through the native kernels goes.

Four parts: the products inside the kernels, all else inside them (gates, loads and stores), launching
them (packing arguments, handing programs to threads), and Python (the module, autograd, allocation).
The products' part is the difference to the same kernels compiled without them.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.environment import environment
from bench.files import write_atomically
from bench.measure import Call
from bench.results import default_folder
from bench.shapes import Shape
from bench.tables import table

CASES = ("B8-T20-H32", "B128-T100-H128")
STEPS = 200
JSON, TEXT = "shares.json", "shares.md"
WITHOUT = "-DLSTM_TRITON_WITHOUT_PRODUCTS"


def measure(shape: Shape, steps: int) -> dict[str, float]:
    """Medians over steps, in seconds: the step, what launching takes, kernels included, and the kernels alone."""
    from lstm_triton.cpu import native, runtime

    call = Call("TritonLSTM-triton", shape, "training step", torch.device("cpu"))
    spent = {"launch": 0.0, "kernel": 0.0}

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> None:
            start = time.perf_counter()
            function(*arguments)
            spent[part] += time.perf_counter() - start

        return run

    times: dict[str, list[float]] = {"step": [], "launch": [], "kernel": []}
    launch, kernel = timed("launch", native.Prepared.run_numbers), timed("kernel", runtime.run)
    with mock.patch.object(native.Prepared, "run_numbers", launch), mock.patch.object(runtime, "run", kernel):
        gc.disable()
        for k in range(steps + 10):
            call.clear()
            spent.update(launch=0.0, kernel=0.0)
            start = time.perf_counter()
            call()
            if k >= 10:  # the first ones compile and warm up
                times["step"].append(time.perf_counter() - start)
                times["launch"].append(spent["launch"])
                times["kernel"].append(spent["kernel"])
        gc.enable()
    return {part: statistics.median(values) for part, values in times.items()}


def shares(whole: dict[str, float], without: dict[str, float]) -> dict[str, float]:
    """Seconds of each part of a step, from `measure` with and without products."""
    products = max(0.0, whole["kernel"] - without["kernel"])
    return {
        "products": products,
        "elementwise": whole["kernel"] - products,
        "launch": whole["launch"] - whole["kernel"],
        "python": whole["step"] - whole["launch"],
    }


def markdown(content: dict[str, Any]) -> str:
    """shares.md."""
    rows = []
    for name, parts in content["cases"].items():
        total = sum(parts.values())
        cells = (f"{1e6 * s:,.0f} ({100 * s / total:.0f} %)" for s in parts.values())
        rows.append((name, f"{1e6 * total:,.0f}", *cells))
    head = ("case", "step, µs", "products", "elementwise", "launch", "Python and autograd")
    where = content["environment"]
    return (
        "# Where the time of a training step goes\n\n"
        f"Measured by `python -m bench.shares` on {where['device']} with {content['threads']} thread(s), float32, "
        "medians in µs. Elementwise: all in the kernels that is no product.\n\n" + table(head, rows, 1) + "\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.shares", description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder; default: reports/<device>")
    parser.add_argument("--measure", action="store_true", help="only print the times of the cases, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = [Shape.parse(text) for text in args.cases.split(",")]
    found = {str(shape): measure(shape, args.steps) for shape in cases}
    if args.measure:
        print(json.dumps(found))
        return 0
    flags = f"{os.environ.get('LSTM_TRITON_CFLAGS', '')} {WITHOUT}"
    command = [sys.executable, "-m", "bench.shares", *sys.argv[1:], "--measure"]
    answer = subprocess.run(
        command, env={**os.environ, "LSTM_TRITON_CFLAGS": flags}, check=True, stdout=subprocess.PIPE, text=True
    )
    without = json.loads(answer.stdout)
    content = {
        "environment": environment(),
        "threads": args.threads,
        "cases": {name: shares(times, without[name]) for name, times in found.items()},
    }
    folder = args.out or default_folder(content["environment"])
    write_atomically(folder / JSON, json.dumps(content, indent=1) + "\n")
    write_atomically(folder / TEXT, markdown(content))
    print((folder / TEXT).read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
