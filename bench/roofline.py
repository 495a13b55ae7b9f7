"""`python -m bench.roofline`: what a time step is predicted to take on GPUs, which need not be there.

Beside the predictions of `lstm_triton.gpu.model` are what no kernel that divides the hidden units can be faster than,
figures that others have published, and what was measured by `pytest bench`, from the files in `reports/`. Writes
roofline.csv, roofline.md and two plots.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import roofline_report
from bench.providers import label
from bench.results import Results
from bench.shapes import DTYPES
from lstm_triton.gpu import gpus, others, report
from lstm_triton.gpu.gpus import Gpu
from lstm_triton.gpu.model import MEETINGS, SHARED_BYTES_PER_CLOCK, Work, family, flops_per_clock, l2_rate

REPORTS = Path(__file__).resolve().parents[1] / "reports"
FOLDER = REPORTS / "roofline"
PASSES = ("forward", "training step")  # the latter is forward and backward
HIDDEN = (32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 3072, 4096)
BATCHES = (1, 16, 64)
# The first is drawn by itself, with the floors.
NAMES = ("h100", "a100", "l4", "rtx4090", "rtx5090")
DTYPE, STEPS = "bf16", 1024


@dataclass(frozen=True)
class Point:
    """A time step's time in µs: in one of three columns, as predicted, published and measured are never mixed."""

    gpu: str
    dtype: str
    batch: int
    hidden: int
    steps: int
    run: str  # one of `PASSES`
    what: str  # the strategy, a floor, or what others have measured
    predicted_us: float | None = None
    published_us: float | None = None
    measured_us: float | None = None
    source: str = ""


def predictions(gpu: Gpu, batches: Sequence[int], hidden: Sequence[int], dtype: str) -> list[Point]:
    """Of the fastest plan for each size."""
    found = []
    for batch in batches:
        for size in hidden:
            planned = report.plan(gpu=gpu, batch=batch, hidden=size, dtype=dtype, steps=STEPS, tf32=True)
            assert planned.backward is not None
            forward = planned.forward.total
            times = zip(PASSES, (forward, forward + planned.backward.total), strict=True)
            found += [
                Point(
                    gpu.name, dtype, batch, size, STEPS, run, planned.plan.strategy, us, source="lstm_triton.gpu.model"
                )
                for run, us in times
            ]
    return found


def floors(gpu: Gpu, batch: int, hidden: Sequence[int], dtype: str) -> list[Point]:
    """What a step can't be faster than where the units are divided over all multiprocessors.

    arithmetic: all operations at once on all tensor cores. on chip: all weights read once from shared memory.
    L2: each multiprocessor reads what the others found, h or the gates' gradients. barrier: one a step.
    """
    found = []
    clock = gpu.clock_ghz * 1e3  # a µs
    meeting = MEETINGS[family(gpu)]
    for size in hidden:
        work = Work(batch, size, size, size, STEPS, DTYPES[dtype], precision="tf32")
        weights, item = 4 * size * size, work.dtype.itemsize
        forward = {
            "arithmetic": 2 * batch * weights / (flops_per_clock(gpu, work) * gpu.sms * clock),
            "on chip": weights * item / (SHARED_BYTES_PER_CLOCK * gpu.sms * clock),
            "L2": (gpu.l2.cycles + batch * size * item / l2_rate(gpu, gpu.sms)) / clock,
            "barrier": (meeting.barrier_ns + meeting.program_ns * gpu.sms) * 1e-3,
        }
        backward = dict(forward) | {
            "L2": (gpu.l2.cycles + 4 * batch * size * item / l2_rate(gpu, gpu.sms)) / clock,
        }
        for run, times in zip(PASSES, (forward, {k: forward[k] + backward[k] for k in forward}), strict=True):
            found += [
                Point(gpu.name, dtype, batch, size, STEPS, run, f"floor: {name}", us, source="lstm_triton.gpu.model")
                for name, us in times.items()
            ]
    return found


def published() -> list[Point]:
    """`others.PUBLISHED`, beside which is what the model says of the same."""
    found = []
    for entry in others.PUBLISHED:
        gpu = gpus.named(entry.gpu)
        predicted = [others.predict_published(entry, gpu, backward).total for backward in (False, True)]
        times = (entry.forward, predicted[0]), (entry.forward + entry.backward, sum(predicted))
        for run, (us, model) in zip(PASSES, times, strict=True):
            sizes = entry.gpu, entry.dtype, entry.batch, entry.hidden, entry.steps, run
            found.append(Point(*sizes, entry.name, published_us=us, source=entry.source))
            found.append(Point(*sizes, entry.name, predicted_us=model, source="lstm_triton.gpu.others"))
    return found


def measured(folders: Iterable[Path]) -> list[Point]:
    """Of results of `pytest bench` on GPUs of the table: one layer, one direction.

    Raises:
        ValueError: a file in one of the folders isn't such a result.
    """
    found = []
    for folder in folders:
        if not (folder / "benchmarks.json").exists():
            continue
        results = Results.read(folder)
        device = str(results.environment.get("device", ""))
        name = gpus.name_of(device) if results.environment.get("device_type") == "cuda" else None
        if name is None:
            continue
        for run in PASSES:
            for r in results.group(run):
                if r["layers"] == r["directions"] == 1 and r["provider"].startswith(("nn.LSTM", "TritonLSTM")):
                    what = label(r["provider"], "cuda")
                    us, sizes = 1e6 * r["median_s"] / r["steps"], (r["batch"], r["hidden"], r["steps"])
                    found.append(Point(name, r["dtype"], *sizes, run, what, measured_us=us, source=device))
    return found


def run(names: Sequence[str], batches: Sequence[int], dtype: str, folders: Iterable[Path]) -> list[Point]:
    """All points, of the GPUs `names`; measured ones from `folders`."""
    found = []
    for name in names:
        gpu = gpus.named(name)
        found += predictions(gpu, batches, HIDDEN, dtype)
        found += floors(gpu, 16, HIDDEN, dtype)
    return found + published() + measured(folders)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.roofline", description=str(__doc__).split("\n\n")[0].split(": ", 1)[1]
    )
    parser.add_argument("--gpus", default=",".join(NAMES), metavar="NAME,...", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default=DTYPE, help="default: %(default)s")
    parser.add_argument("--measured", type=Path, default=REPORTS, metavar="DIR", help="folders of results are in it")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="default: reports/roofline")
    options = parser.parse_args(arguments)
    names = options.gpus.split(",")
    try:
        points = run(names, BATCHES, options.dtype, sorted(p for p in options.measured.glob("*") if p.is_dir()))
    except ValueError as error:
        parser.error(str(error))
    command = "python -m bench.roofline" + (f" --gpus {options.gpus}" if names != list(NAMES) else "")
    command += f" --dtype {options.dtype}" if options.dtype != DTYPE else ""
    rows = [asdict(point) for point in points]
    for path in roofline_report.write(rows, names, command, options.out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
