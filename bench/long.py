"""`python -m bench.long`: memory and time of training on long sequences, with and without recomputing.

`nn.LSTM`, `TritonLSTM` with backend "auto", and that with `recompute=True`, whose backward rebuilds
the gates instead of keeping them. One training step of a much longer sequence is run, too, and what
`nn.LSTM` would keep there is predicted. Writes long.json, long.md and long.png; Ctrl-C leaves those
of the run before as they were.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from bench import long_report, memory, providers
from bench.cpu import chosen, quartiles
from bench.environment import cpu_name, environment
from bench.files import write_atomically
from bench.measure import Call, default_device, interleave, once
from bench.results import Record, default_folder
from bench.shapes import Shape
from lstm_triton import convert

BATCH, HIDDEN = 8, 256
STEPS = (256, 1024, 4096, 16384)
LAYERS = (1, 2)
DEEP = 4096  # the most time steps of more than one layer
LONGEST = 65536
THREADS = 2
SECONDS = 5.0  # for the pairs of one case
LEAST, MOST = 5, 100  # pairs

# What a case may fail with: another value, an error of a backend or for want of memory, a process that hangs.
_FAILURES = (AssertionError, RuntimeError, MemoryError, subprocess.SubprocessError)


class Case(NamedTuple):
    """A provider's training step on one shape."""

    shape: Shape
    provider: str

    def __str__(self) -> str:
        return f"{self.shape}, {self.provider}"


def cases(steps: Sequence[int]) -> list[Case]:
    """Those of the numbers of time steps, the shortest first."""
    shapes = [Shape(BATCH, t, HIDDEN, layers) for t in sorted(steps) for layers in LAYERS if layers == 1 or t <= DEEP]
    return [Case(shape, provider) for shape in shapes for provider in long_report.PROVIDERS]


def measure(case: Case, device: torch.device, seconds: float, least: int) -> Record:
    """Memory, and of ours the times in turns with `nn.LSTM`: as many pairs as fit, but `least` at least.

    Raises:
        AssertionError: values or gradients are not those of `nn.LSTM`.
        RuntimeError: it does not run, such as for want of memory.
    """
    shape, provider = case
    call = Call(provider, shape, "training step", device)
    record = _named(case, device)
    if provider != providers.REFERENCE:
        record |= _timed(call, seconds, least)
        call.clear()
    record["kept_bytes"] = memory.kept_for_backward(call)
    record["peak_bytes"], record["peak_kind"] = memory.peak_bytes(provider, shape, device)
    return record


def _named(case: Case, device: torch.device) -> Record:
    label = providers.label(case.provider, device.type, torch.version.hip is not None)
    return {"shape": str(case.shape), **asdict(case.shape), "provider": case.provider, "label": label}


def _timed(ours: Call, seconds: float, least: int) -> Record:
    """The largest error, the backend that ran, and times beside those of `nn.LSTM`."""
    reference = Call(providers.REFERENCE, ours.shape, ours.group, ours.input.device)
    # The same weights and data in the same memory: where they lie can cost more than what is compared.
    ours.module = convert(reference.module, **providers.OPTIONS[ours.provider])
    ours.input, ours.doutput = reference.input, reference.doutput
    record: Record = {"error": ours.check(), "chosen": chosen(ours.module, ours.input, ours.group)}
    once(reference)
    pairs = max(least, min(MOST, int(seconds / (once(reference) + once(ours)))))
    times, own = interleave(reference, ours, pairs)
    ratios = [b / a for a, b in zip(times, own, strict=True)]
    for name, values in (("reference_s", times), ("ours_s", own), ("ratio", ratios)):
        record[f"{name}_q1"], record[name], record[f"{name}_q3"] = quartiles(values)
    return record | {"pairs": pairs}


def train_longest(steps: int, device: torch.device, records: Sequence[Record]) -> Record:
    """A training step with recomputing, in a fresh process, and what `nn.LSTM` would keep of as many time steps.

    That is in proportion to the longest of `records`, as each time step keeps the same.
    """
    case = Case(Shape(BATCH, steps, HIDDEN), providers.RECOMPUTE)
    found = memory.alone(case.provider, case.shape, device)
    kept = memory.kept_for_backward(Call(case.provider, case.shape, "training step", device))
    known = [r for r in records if r["provider"] == providers.REFERENCE and r["layers"] == 1]
    predicted = None
    if known:
        last = max(known, key=lambda r: r["steps"])
        predicted = {"kept_bytes": round(last["kept_bytes"] * steps / last["steps"]), "from_steps": last["steps"]}
    return _named(case, device) | found | {"kept_bytes": kept, "predicted_reference": predicted}


def run(
    steps: Sequence[int], longest: int, device: torch.device, threads: int, seconds: float, least: int, limit: float
) -> Record:
    """Measures everything, for `long_report.write`; what fails is kept beside, with the reason.

    Args:
        steps: the numbers of time steps.
        longest: that of the one training step; 0 for none.
        device: where.
        threads: PyTorch's, on a CPU.
        seconds: for a case's pairs.
        least: pairs of a case.
        limit: seconds after which nothing more is started.
    """
    end, before = time.monotonic() + limit, torch.get_num_threads()
    wanted, records, failed = cases(steps), [], []
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    torch.set_num_threads(threads)
    try:
        machine = environment() | {"device_type": device.type}
        if device.type == "cpu":
            machine["device"] = cpu_name()  # also where there is a GPU
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=longest + sum(_expected(case) for case in wanted))
            for case in wanted:
                progress.update(task, description=str(case))
                try:
                    _check_time(end)
                    records.append(measure(case, device, seconds, least))
                except (*_FAILURES, TimeoutError) as error:
                    failed.append(_not_measured(str(case), error))
                progress.advance(task, _expected(case))
            found = None
            if longest:
                name = f"T = {longest:,} with recompute"
                progress.update(task, description=name)
                try:
                    _check_time(end)
                    found = train_longest(longest, device, records)
                except (*_FAILURES, TimeoutError) as error:
                    failed.append(_not_measured(name, error))
    finally:
        torch.set_num_threads(before)
    return {"environment": machine, "records": records, "longest": found, "not_measured": failed}


def _expected(case: Case) -> float:
    """Time steps for the progress bar: ours are called in pairs, and checked before."""
    calls = 2 if case.provider == providers.REFERENCE else 2 * LEAST + 5
    return case.shape.steps * case.shape.layers * calls


def _check_time(end: float) -> None:
    if time.monotonic() > end:
        raise TimeoutError("no time left (--time-limit)")


def _not_measured(name: str, error: BaseException) -> dict[str, str]:
    outcome = "skipped" if isinstance(error, TimeoutError) else "failed"
    return {"name": name, "outcome": outcome, "why": (str(error) or type(error).__name__)[:300]}


def whole(text: str) -> int:
    """Of one thing or more."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be a whole number of at least 1, got {text!r}")
    return int(text)


def steps_list(text: str) -> list[int]:
    return list(dict.fromkeys(whole(part) for part in text.split(",")))


def device_of(text: str) -> torch.device:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"should be cpu or cuda, got {text!r}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("PyTorch finds no GPU here (torch.cuda.is_available() is False)")
    return torch.device(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.long", description=__doc__.split("\n\n")[0].split(": ", 1)[1]
    )
    cores = os.cpu_count() or 1
    default = ",".join(map(str, STEPS))
    parser.add_argument("--only", type=steps_list, metavar="T,...", help=f"these numbers of time steps, of {default}")
    parser.add_argument("--longest", type=int, default=LONGEST, metavar="T", help="0: none (default: %(default)s)")
    parser.add_argument("--device", type=device_of, default=default_device(), help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=whole, default=min(THREADS, cores), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for a case's pairs (default: %(default)s)")
    parser.add_argument("--pairs", type=whole, default=LEAST, help="the fewest of a case (default: %(default)s)")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds after which nothing is started")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default: reports/<device>)")
    parser.add_argument("--draw", action="store_true", help="draw the report from long.json again, measuring nothing")
    options = parser.parse_args(arguments)
    if options.seconds < 0 or options.longest < 0:
        parser.error("--seconds and --longest should be at least 0")
    if options.threads > cores:
        parser.error(f"--threads should be at most {cores}, this machine's cores")
    cuda = options.device.type == "cuda"
    folder = options.out or default_folder({"device": torch.cuda.get_device_name() if cuda else cpu_name()})
    if not options.draw:
        try:
            content = run(
                options.only or STEPS, options.longest, options.device, options.threads, options.seconds,
                options.pairs, options.time_limit,
            )  # fmt: skip
        except KeyboardInterrupt:
            print("interrupted: nothing written", file=sys.stderr)
            return 130
        # Less --out and --time-limit, which say nothing about the figures.
        command = f"python -m bench.long --device {options.device} --threads {options.threads}"
        command += f" --seconds {options.seconds:g} --pairs {options.pairs} --longest {options.longest}"
        command += f" --only {','.join(map(str, options.only))}" if options.only else ""
        content["environment"]["command"] = command
        write_atomically(folder / long_report.JSON, json.dumps(content, indent=1) + "\n")
    try:
        content = long_report.read(folder)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    written = long_report.write(content, folder)
    print(long_report.summary(content))
    print("\n".join(map(str, written)))
    return int(long_report.failed(content))


if __name__ == "__main__":
    sys.exit(main())
