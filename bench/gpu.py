"""`python -m bench.gpu`: all that a machine with a GPU can tell, within a given time.

Runs the tests on CUDA, checks the kernels as `"auto"` does, then the benchmarks, then draws the reports,
and prints one table last.
What the time does not allow is cut off or skipped, and said; the rest is still reported. Exits
with 0 where nothing failed, 1 where something did, 2 where there is no GPU.
"""

import argparse
import importlib.util
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch

from bench.environment import environment
from bench.providers import REFERENCE
from bench.results import Results, default_folder, read
from bench.tables import by_shape, labels, speedup, table

_ROOT = Path(__file__).resolve().parents[1]

GRACE = 15.0  # seconds that an interrupted stage has to write what it found
LEAST = 10.0  # a stage that would have less than this isn't started
SECONDS = 0.5  # for the pairs of a case of long sequences and ragged batches
NO_RESULT = "no result"

NO_GPU = """No GPU: PyTorch {torch} finds none (torch.cuda.is_available() is False).
Run this on a machine with a GPU and a CUDA or ROCm build of PyTorch; without network access there, install with
    pip install --no-deps --no-build-isolation -e .
On a CPU, `pytest` runs the tests and `pytest bench --benchmark-only` the benchmarks."""


@dataclass(frozen=True)
class Stage:
    """A part of the run, in a process of its own."""

    name: str
    share: float  # of the whole time; what earlier stages leave is added
    needs: tuple[str, ...]  # packages
    command: Callable[[float], list[str]]  # from the seconds that it has
    found: Callable[[], tuple[str, bool]]  # afterwards: its result in words, and whether something in it failed


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: "passed", "failed", "cut off" (by the time limit) or "skipped" (no time left)."""

    name: str
    status: str
    seconds: float
    detail: str


def plan(out: Path, shapes: str, scratch: Path) -> list[Stage]:
    """The stages, in order.

    Args:
        out: where the report goes.
        shapes: as `pytest bench --shapes` takes them.
        scratch: a folder for what nobody reads later.
    """
    python, junit, start = sys.executable, scratch / "tests.xml", time.time()
    files = [f"bench/test_{name}.py" for name in ("speed", "memory", "auto")]  # what matters first
    # Relative where it can be: the report shows the command.
    report = out.relative_to(_ROOT) if out.is_relative_to(_ROOT) else out
    return [
        Stage(
            "tests",
            0.35,
            ("pytest",),
            lambda seconds: [python, "-m", "pytest", "tests", "-q", f"--junitxml={junit}"],
            lambda: tests_found(junit),
        ),
        Stage(  # what no strategy is right in, "auto" doesn't run: the benchmarks show it
            "kernels checked",
            0.1,
            (),
            lambda seconds: [python, "-m", "lstm_triton", "doctor", "--qualify"],
            lambda: ("python -m lstm_triton doctor shows it", False),
        ),
        Stage(
            "benchmarks",
            0.3,
            ("pytest", "pytest_benchmark", "matplotlib"),
            lambda seconds: [
                python, "-m", "pytest", *files, "-q", "--benchmark-only", "--benchmark-columns=median,iqr,rounds",
                f"--shapes={shapes}", f"--report-dir={report}", f"--time-limit={max(seconds - 2 * GRACE, 1):.0f}",
            ],
            lambda: benchmarks_found(out),
        ),
        Stage(
            "long sequences",
            0.1,
            ("matplotlib", "rich"),
            lambda seconds: [
                python, "-m", "bench.long", "--device=cuda", f"--seconds={SECONDS}", f"--out={report}",
                f"--time-limit={max(seconds - 2 * GRACE, 1):.0f}",
            ],
            lambda: records_found(out / "long.json", start),
        ),
        Stage(
            "ragged batches",
            0.1,
            ("matplotlib", "rich"),
            lambda seconds: [
                python, "-m", "bench.ragged", "--device=cuda", f"--seconds={SECONDS}", f"--out={report}",
            ],
            lambda: records_found(out / "ragged.json", start),
        ),
        Stage(
            "reports",
            0.05,
            ("matplotlib",),
            lambda seconds: [python, "-m", "bench.report", str(out)],
            lambda: (str(out), False),
        ),
    ]  # fmt: skip


def run(stages: Sequence[Stage], seconds: float, execute: Callable[[list[str], float], str]) -> list[Outcome]:
    """Runs the stages, each until its share of the time and those before it are used up.

    Args:
        stages: in order.
        seconds: for all of them.
        execute: runs a command within some seconds and returns its status, as `run_process` does.
    """
    start, share = time.monotonic(), 0.0
    whole = sum(stage.share for stage in stages)
    outcomes = []
    for stage in stages:
        share += stage.share
        begun = time.monotonic()
        left = start + seconds * share / whole - begun
        missing = [name for name in stage.needs if importlib.util.find_spec(name) is None]
        if missing:
            outcomes.append(Outcome(stage.name, "failed", 0, f"not installed: {', '.join(missing)}"))
            continue
        if left < min(LEAST, seconds * stage.share / whole / 2):
            outcomes.append(Outcome(stage.name, "skipped", 0, "no time left"))
            continue
        print(f"\n== {stage.name}: at most {left:.0f} s", flush=True)
        status = execute(stage.command(left), left)
        detail, failed = stage.found()
        if failed:
            status = "failed"
        outcomes.append(Outcome(stage.name, status, time.monotonic() - begun, detail))
    return outcomes


def run_process(command: list[str], seconds: float, grace: float | None = None) -> str:
    """Runs a command, interrupts it in time for it to write what it has, and kills it at last: its status.

    Args:
        command: in the project's folder.
        seconds: that it has.
        grace: those of them that it has after the interrupt; None for `GRACE`, or less where it has few.
    """
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:  # as a shell's background job: the command would ignore it, too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            command, cwd=_ROOT, env={**kept, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    grace = min(GRACE, seconds / 4) if grace is None else grace
    try:
        return "passed" if process.wait(seconds - grace) == 0 else "failed"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    finally:
        if process.poll() is None:
            _wait_or_kill(process, grace)
    # Killed: it did not answer, as a kernel that hangs does not.
    return "failed" if process.returncode == -signal.SIGKILL else "cut off"


def _wait_or_kill(process: "subprocess.Popen[bytes]", grace: float) -> None:
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tests_found(junit: Path) -> tuple[str, bool]:
    """What pytest's JUnit file says, in words, and whether a test failed."""
    if not junit.exists():
        return NO_RESULT, True
    suite = next(ElementTree.parse(junit).getroot().iter("testsuite"))
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    return f"{passed} passed, {failed} failed, {count['skipped']} skipped", failed > 0


def benchmarks_found(out: Path) -> tuple[str, bool]:
    """How much was measured and how fast it is, in words, and whether a benchmark failed."""
    try:
        results = Results.read(out)
    except (FileNotFoundError, ValueError):
        return NO_RESULT, True
    failed = sum(x["outcome"] == "failed" for x in results.not_measured)
    skipped = len(results.not_measured) - failed
    detail = f"{len(results.records)} measured, {failed} failed, {skipped} skipped"
    records = results.group("training step")
    rows = by_shape(records).values()
    for provider, name in labels(records).items():
        ratios = [r for row in rows if (r := speedup(row, provider)) is not None]
        if provider != REFERENCE and ratios:
            detail += f"; {name} {statistics.median(ratios):.2f}×"
    return detail + (f" as fast as {REFERENCE} (training step, median)" if "×" in detail else ""), failed > 0


def records_found(path: Path, start: float) -> tuple[str, bool]:
    """How much a result written since `start` (of `time.time`) has, in words, and whether something failed."""
    try:
        if path.stat().st_mtime < start:
            return NO_RESULT, True
        content = read(path, ("records", "not_measured"), "python -m bench.gpu")
    except (OSError, ValueError):
        return NO_RESULT, True
    skipped = sum(x.get("outcome") == "skipped" for x in content["not_measured"])
    failed = len(content["not_measured"]) - skipped
    return f"{len(content['records'])} measured, {failed} failed, {skipped} skipped", failed > 0


def summary(outcomes: Sequence[Outcome]) -> str:
    rows = [(o.name, o.status, f"{o.seconds:.0f}", o.detail) for o in outcomes]
    return table(("stage", "outcome", "seconds", "result"), rows, 2)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[1])
    parser.add_argument("--minutes", type=float, default=9, help="for everything together (default: 9)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where the report goes (default: reports/<device>)")
    parser.add_argument("--shapes", default="gpu", help="as of pytest bench (default: gpu)")
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes should be above 0, got {options.minutes}")
    if not torch.cuda.is_available():
        print(NO_GPU.format(torch=torch.__version__))
        return 2
    out = (options.out or default_folder(environment())).resolve()
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = run(plan(out, options.shapes, Path(scratch)), options.minutes * 60, run_process)
    text = f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}\n\n{summary(outcomes)}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.md").write_text(text + "\n")
    print(f"\n{text}")
    return int(any(o.status == "failed" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
