"""`python -m bench.cpu`: `TritonLSTM` against `nn.LSTM` on a CPU, over batches, time steps, hidden sizes and threads.

Both have the same weights, read the same input from the same memory and are called in turns; the
values and gradients are compared before. What the machine can do at most is measured in the same
run. Writes cpu.json, cpu.md and plots; Ctrl-C leaves those of the run before as they were.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from bench import cpu_report, providers
from bench.environment import cpu_name, environment
from bench.files import write_atomically
from bench.measure import Call, interleave, once
from bench.results import Record, default_folder
from bench.shapes import Shape
from lstm_triton import TritonLSTM, convert, dispatch

SHAPES = [Shape(b, t, h) for b in (1, 8, 32, 128) for t in (20, 100) for h in (16, 32, 64, 128, 256, 512)]
THREADS = (1, 2)
SECONDS = 2.5  # for the pairs of one case: with all shapes and two threads some ten minutes together
LEAST, MOST = 7, 1000  # pairs
CPU = torch.device("cpu")

# Large ones, and those of a time step with many and few rows.
_PRODUCTS = ((1024, 1024, 1024), (512, 2048, 512), (2048, 512, 2048), (128, 512, 2048), (32, 512, 2048))
_COPIED = 2**27  # bytes: more than caches hold
RATE_SECONDS = 0.2  # for each product and each copy, of which the fastest counts


@dataclass(frozen=True)
class Rates:
    """The most that was measured of the machine: float32 products, and bytes read plus bytes written."""

    flops: float  # a second
    bandwidth: float  # bytes a second
    product: str  # the sizes of the fastest product

    @classmethod
    def measure(cls, seconds: float = RATE_SECONDS, copied: int = _COPIED) -> "Rates":
        """Of `torch.mm`, of sizes large and as a time step has them, and of `copy_` and `add` on large tensors."""
        found = []
        for m, k, n in _PRODUCTS:
            a, b, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
            taken = _fastest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), seconds)  # type: ignore[misc]
            found.append((2 * m * k * n / taken, f"({m}, {k}) × ({k}, {n})"))
        flops, product = max(found)
        x, y, z = (torch.ones(copied // 4) for _ in range(3))
        copy = 2 * copied / _fastest(lambda: y.copy_(x), seconds)
        add = 3 * copied / _fastest(lambda: torch.add(x, y, out=z), seconds)
        return cls(flops, max(copy, add), product)

    def or_faster(self, other: "Rates") -> "Rates":
        """The faster products and the faster memory of the two."""
        products = max(self, other, key=lambda rates: rates.flops)
        return Rates(products.flops, max(self.bandwidth, other.bandwidth), products.product)

    def floor(self, shape: Shape, group: str) -> float:
        """Seconds that a time step takes at least, where these rates are the most: the longer of the two."""
        flops, moved = work(shape, group)
        return max(flops / self.flops, moved / self.bandwidth)


def _fastest(run: Callable[[], Any], seconds: float) -> float:
    """Seconds of the fastest of at least four calls."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 4 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def work(shape: Shape, group: str) -> tuple[float, float]:
    """Floating point operations and compulsory bytes of a time step of one float32 layer, input as wide as h.

    Operations: 16 B H² for the products of input and of h with their (4H, H) weights; in training
    three times that. Bytes: 4 for each number. Inference reads x and writes y, 2 B H. Training also
    writes and reads back what backward needs, the four gates and c: 5 B H; reads x, y and the
    gradient of y, and writes that of x: together 16 B H. The 8 H² + 8 H weights and biases are read
    once a call, so one T-th of them counts; in training they are read twice and their gradients
    written. Initial and final states are left out.
    """
    b, h = shape.batch, shape.hidden
    weights = 8 * h * (h + 1) / shape.steps
    if group == "inference":
        return 16 * b * h * h, 4 * (2 * b * h + weights)
    return 48 * b * h * h, 4 * (16 * b * h + 3 * weights)


class Case(NamedTuple):
    """What is timed: a call of one layer, on so many threads."""

    threads: int
    group: str
    shape: Shape
    backend: str

    def __str__(self) -> str:
        return f"{self.shape}, {self.group}, {self.backend}, {cpu_report.threads_text(self.threads)}"


def chosen(module: Any, input: Any, group: str) -> str:
    """The backend that "auto" is for such a call."""
    with torch.set_grad_enabled(group != "inference"):
        lines = module.explain(input).splitlines()
    return next(line for line in lines if line.startswith("backend: ")).split(" ")[1]


def measure(case: Case, seconds: float, least: int) -> Record:
    """Times of `nn.LSTM` and of `TritonLSTM` in turns: as many pairs as fit into the seconds, but `least` at least.

    Raises:
        AssertionError: values or gradients are not those of `nn.LSTM`.
        RuntimeError: the backend does not run that.
    """
    torch.set_num_threads(case.threads)
    torch_lstm, ours = (Call(name, case.shape, case.group, CPU) for name in (providers.REFERENCE, providers.AUTO))
    # The same weights and data in the same memory: where they lie can cost more than what is compared.
    ours.module = convert(torch_lstm.module, backend=case.backend)
    ours.input, ours.doutput = torch_lstm.input, torch_lstm.doutput
    error = ours.check()
    ran = chosen(ours.module, ours.input, case.group) if case.backend == "auto" else case.backend
    once(torch_lstm)
    pairs = max(least, min(MOST, int(seconds / (once(torch_lstm) + once(ours)))))
    reference, own = interleave(torch_lstm, ours, pairs)
    record = case._asdict() | asdict(case.shape) | {"shape": str(case.shape), "chosen": ran}
    record |= {"error": error, "pairs": pairs}
    ratios = [a / b for a, b in zip(reference, own, strict=True)]
    for name, values in (("reference_s", reference), ("ours_s", own), ("ratio", ratios)):
        record[f"{name}_q1"], record[name], record[f"{name}_q3"] = quartiles(values)
    return record


def quartiles(values: Sequence[float]) -> list[float]:
    """First quartile, median and third; of one value that value."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def run(shapes: Sequence[Shape], threads: Sequence[int], backends: Sequence[str], seconds: float, least: int) -> Record:
    """Measures everything, for `cpu_report.write`; a case that fails is kept beside, with the reason.

    Where the ratios of a case's pairs are far apart it is measured again at the end, when whatever
    disturbed it may be over; that of the two with the smaller spread counts.
    """
    machine = environment() | {"device": cpu_name(), "device_type": "cpu"}  # also where there is a GPU
    cases = [Case(*x) for x in itertools.product(threads, cpu_report.GROUPS, shapes, backends)]
    measured: dict[Case, Record] = {}
    failed: dict[Case, str] = {}
    rates = dict.fromkeys(threads, Rates(0, 0, ""))
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    before = torch.get_num_threads()
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=None)
            # A core's clock varies: the rates are measured several times, and the fastest count.
            for _, part in itertools.groupby(cases, lambda case: (case.threads, case.group)):
                progress.update(task, description="what the machine can do")
                for count in threads:
                    torch.set_num_threads(count)
                    rates[count] = rates[count].or_faster(Rates.measure(min(seconds, RATE_SECONDS)))
                progress.update(task, total=sum(_expected(case, rates, seconds, least) for case in cases))
                for case in part:
                    progress.update(task, description=str(case))
                    try:
                        measured[case] = measure(case, seconds, least)
                    except (AssertionError, RuntimeError) as error:
                        failed[case] = str(error)[:300]
                    progress.update(task, completed=sum(_expected(x, rates, seconds, least) for x in measured | failed))
            for case in [x for x, record in measured.items() if cpu_report.spread(record) > cpu_report.NOISY]:
                progress.update(task, description=f"again, ratios were far apart: {case}")
                try:
                    measured[case] = min(measured[case], measure(case, seconds, least), key=cpu_report.spread)
                except (AssertionError, RuntimeError) as error:
                    failed[case] = str(error)[:300]
                    del measured[case]
    finally:
        torch.set_num_threads(before)
    for case, record in measured.items():
        record["floor_s_a_step"] = rates[case.threads].floor(case.shape, case.group)
    return {
        "environment": machine,
        "rates": {str(count): asdict(found) for count, found in rates.items()},
        "records": list(measured.values()),
        "not_measured": [{"name": str(case), "why": why} for case, why in failed.items()],
    }


def _expected(case: Case, rates: Mapping[int, Rates], seconds: float, least: int) -> float:
    """Seconds for the progress bar: those given, or the fewest pairs at half of the machine's rates."""
    floor = case.shape.steps * rates[case.threads].floor(case.shape, case.group)
    return max(seconds, 4 * least * floor)


def obstacle(backend: str) -> str | None:
    """Why the backend cannot be timed here; None where it can."""
    if backend == "triton" and dispatch.interpreting():
        return "TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, whose times say nothing; unset it"
    try:
        TritonLSTM(1, 1, backend=backend)(torch.zeros(1, 1, 1))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


def numbers(text: str) -> list[int]:
    """Numbers of threads, from "1,2"."""
    found = [int(x) if x.strip().isdecimal() else 0 for x in text.split(",")]
    most = os.cpu_count() or 1
    if not all(1 <= n <= most for n in found):
        raise argparse.ArgumentTypeError(f"should be numbers from 1 to {most} (this machine's cores), got {text!r}")
    return list(dict.fromkeys(found))


def shape_list(text: str) -> list[Shape]:
    try:
        found = [Shape.parse(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    for s in found:
        if s != Shape(s.batch, s.steps, s.hidden):
            raise argparse.ArgumentTypeError(f"{s}: one layer, one direction and fp32 are all that is measured here")
    return list(dict.fromkeys(found))


def backend_list(text: str) -> list[str]:
    found = [name.strip() for name in text.split(",")]
    if unknown := [name for name in found if name not in dispatch.BACKENDS]:
        raise argparse.ArgumentTypeError(f"should be of {', '.join(dispatch.BACKENDS)}, got {', '.join(unknown)!r}")
    for name in found:
        if why := obstacle(name):
            raise argparse.ArgumentTypeError(f"{name!r} cannot be timed here: {why}")
    return list(dict.fromkeys(found))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__.split("\n\n")[0].split(": ", 1)[1])
    cores = os.cpu_count() or 1
    parser.add_argument("--threads", type=numbers, metavar="N,...", help="default: 1,2 (of as many cores)")
    parser.add_argument("--backends", type=backend_list, default=["auto"], metavar="NAME,...", help="default: auto")
    parser.add_argument("--only", type=shape_list, metavar="SHAPE,...", help="these shapes, such as B32-T20-H64")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for a case's pairs (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=LEAST, help="the fewest of a case (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default: reports/<device>)")
    parser.add_argument("--draw", action="store_true", help="draw the report from cpu.json again, measuring nothing")
    options = parser.parse_args(arguments)
    if options.seconds < 0 or options.pairs < 1:
        parser.error("--seconds should be at least 0 and --pairs at least 1")
    threads = options.threads or [n for n in THREADS if n <= cores]
    folder = options.out or default_folder({"device": cpu_name()})
    if not options.draw:
        try:
            content = run(options.only or SHAPES, threads, options.backends, options.seconds, options.pairs)
        except KeyboardInterrupt:
            print("interrupted: nothing written", file=sys.stderr)
            return 130
        # Less --out, which says nothing about the figures.
        command = f"python -m bench.cpu --threads {','.join(map(str, threads))} --backends {','.join(options.backends)}"
        command += f" --seconds {options.seconds:g} --pairs {options.pairs}"
        command += f" --only {','.join(map(str, options.only))}" if options.only else ""
        content["environment"] |= {"threads": ", ".join(map(str, threads)), "command": command}
        write_atomically(folder / cpu_report.JSON, json.dumps(content, indent=1) + "\n")
    try:
        content = cpu_report.read(folder)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    written = cpu_report.write(content, folder)
    print(cpu_report.summaries(content))
    print("\n".join(map(str, written)))
    return int(bool(content["not_measured"]))


if __name__ == "__main__":
    sys.exit(main())
