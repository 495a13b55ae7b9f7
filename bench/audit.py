"""`python -m bench.audit`: the kernels compiled for GPUs that need not be there, and what their machine code uses.

Each case is a pass over a layer of some sizes. For each GPU the plan that the library chooses there is compiled as a
launch compiles it, and checked: nothing spills, shared memory fits, weights stay on the chip, half precision runs on
tensor cores. Nothing is run. Writes audit.csv, README.md and audit.png; exits 1 where a rule is broken.
"""

import argparse
import contextlib
import csv
import io
import multiprocessing
import os
import queue
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench import audit_report
from bench.audit_cases import CASES, GPUS, SAMPLED, Case, Job, jobs_of, plan_of, precision_of, work_of
from bench.files import write_atomically
from bench.results import Record
from lstm_triton.gpu import gpus, tiling
from lstm_triton.gpu.gpus import Gpu

FOLDER = Path(__file__).resolve().parents[1] / "reports" / "audit"
LIMIT = 120.0  # seconds


def audit(case: Case, gpu: Gpu) -> list[Record]:
    """Compiles what the case launches on the GPU: a record for each kernel, with the rules it breaks."""
    from lstm_triton.gpu import machine_code

    found, plan = [], plan_of(case, gpu)
    for call in machine_code.calls(plan, case.layer(), case.run, gpu.target, precision_of(case, gpu)):
        stage = call.constants.get("STAGE")
        record = _named(case, gpu) | {
            "kernel": call.kernel.__name__ + (f" ({stage})" if stage else ""),
            "own": call.is_own,
            "launches": call.times,
            "programs": call.grid[0] * call.grid[1] * call.grid[2],
            "cooperative": call.constants.get("launch_cooperative_grid", False),
        }
        try:
            usage = machine_code.usage(call)
        except Exception as error:  # of the compiler, which raises many kinds
            found.append(record | {"violations": [f"does not compile: {_last_line(error)}"]})
            continue
        record |= asdict(usage) | {
            "shared_limit": gpu.limits.shared_per_program,
            "shared_computed": tiling.shared_bytes(plan, work_of(case, gpu), case.run == "backward"),
            "programs_per_sm": gpu.programs_per_sm(usage.shared_bytes, usage.warps, usage.registers),
            "sms": gpu.sms,
        }
        found.append(record | {"violations": violations(record)})
    return found


def _last_line(error: BaseException) -> str:
    """What is wrong: said last by what came first, where Triton's errors follow from one another."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _named(case: Case, gpu: Gpu) -> Record:
    plan = plan_of(case, gpu)
    tiles = {"block_b": plan.block_b, "block_h": plan.block_h, "block_k": plan.block_k, "slices": plan.slices}
    strategy = plan.strategy + (" wavefront" if plan.layers > 1 else "") + (" matvec" if plan.matvec else "")
    named: Record = {"case": str(case), "pass": case.run, "cell": case.cell}
    named |= {"B": case.batch, "H": case.hidden, "K": case.size}
    return named | {
        "dtype": case.dtype, "form": case.form, "gpu": gpu.name, "target": gpu.target, "strategy": strategy, **tiles,
        "num_stages": plan.num_stages,
    }  # fmt: skip


def violations(record: Record) -> list[str]:
    """The rules that a kernel breaks, in words."""
    found = []
    if record["spills"] or record["spill_bytes"]:
        found.append(
            f"spills {record['spill_bytes']} bytes of each thread's registers: {record['spills']} instructions, "
            f"{record['spills_in_loops']} in loops"
        )
    if record["shared_bytes"] > record["shared_limit"]:
        found.append(f"needs {record['shared_bytes']} bytes of shared memory, of {record['shared_limit']} there are")
    if record["own"] and record["shared_bytes"] > record["shared_computed"]:
        found.append(f"needs {record['shared_bytes']} bytes of shared memory, the plan has {record['shared_computed']}")
    if record["strategy"] != "step" and record["weight_bytes_in_loops"]:
        found.append(f"loads {record['weight_bytes_in_loops']} bytes of weights in the time loop")
    half = record["dtype"] in ("fp16", "bf16") and not record["strategy"].endswith("matvec")
    if half and record["own"] and record["weight_bytes"] and not record["tensor_core_ops"]:
        found.append("has no tensor-core instructions")
    if record["float_atomics"]:
        found.append(f"has {record['float_atomics']} atomic additions of floats, whose order no run repeats")
    room = record["programs_per_sm"] * record["sms"]
    if record["cooperative"] and record["programs"] > room:
        found.append(f"has {record['programs']} programs that wait for each other, where {room} run at a time")
    return found


def run(jobs: Sequence[Job], workers: int, limit: float) -> list[Record]:
    """The records of all jobs, in order; of one that fails or takes longer than `limit` seconds one that says so."""
    pool: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for _ in range(workers):
        pool.put(_Worker())

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(jobs))

        def one(job: Job) -> list[Record]:
            worker = pool.get()
            progress.update(task, description=f"{job[0]} on {job[1].name}")
            try:
                return worker.call(audit, job, limit)
            except (RuntimeError, TimeoutError) as error:
                return [_named(*job) | {"kernel": "", "violations": [f"does not compile: {_last_line(error)}"]}]
            finally:
                pool.put(worker)
                progress.advance(task)

        with ThreadPoolExecutor(workers) as threads:
            return [record for found in threads.map(one, jobs) for record in found]


class _Worker:
    """A process that calls functions, and is replaced by a new one where a call takes too long or ends it."""

    def __init__(self) -> None:
        self.process: Any = None

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...], limit: float) -> Any:
        """Its result; raises what the function raises, and TimeoutError after `limit` seconds."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.pipe.send((function, arguments))
            if not self.pipe.poll(limit):
                raise TimeoutError(f"takes more than {limit:g} seconds")
            error, result = self.pipe.recv()
        except (TimeoutError, EOFError, OSError) as broken:
            self._end()
            raise broken if isinstance(broken, TimeoutError) else RuntimeError("the compiler crashed") from broken
        if error is not None:
            raise RuntimeError(error)
        return result

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with the assembler that it may be waiting for
        self.process.join()
        self.process = None


def _serve(pipe: Any) -> None:
    os.setpgrp()
    os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are imported, which is later
    with contextlib.suppress(EOFError, BrokenPipeError):  # until the command ends
        while True:
            function, arguments = pipe.recv()
            answer: tuple[str | None, Any]
            try:
                answer = None, function(*arguments)
            except Exception as error:
                answer = f"{type(error).__name__}: {error}", None
            pipe.send(answer)


def write(records: Sequence[Record], environment: Record, folder: Path) -> list[Path]:
    """Writes audit.csv, README.md and audit.png; the files written."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for r in records for key in r)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(r | {"violations": "; ".join(r["violations"])} for r in records)
    write_atomically(folder / audit_report.CSV, text.getvalue())
    return [folder / audit_report.CSV, *audit_report.write(records, environment, folder)]


def positive(text: str) -> float:
    if not text.replace(".", "", 1).isdecimal() or not float(text) > 0:
        raise argparse.ArgumentTypeError(f"should be a positive number, got {text!r}")
    return float(text)


def targets_list(text: str) -> list[str]:
    """GPUs by their targets: names in `GPUS`."""
    known = {gpus.named(name).target: name for name in GPUS}
    for target in text.split(","):
        if target not in known:
            raise argparse.ArgumentTypeError(f"should be of {', '.join(known)}, got {target!r}")
    return [known[target] for target in dict.fromkeys(text.split(","))]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.audit", description=__doc__.split("\n\n")[0].split(": ", 1)[1]
    )
    cores = os.cpu_count() or 1
    parser.add_argument("--only", default="", metavar="TEXT", help="the cases that have it in their name")
    parser.add_argument("--targets", type=targets_list, default=list(GPUS), metavar="sm_80,...", help="default: all")
    parser.add_argument("--cells", action="store_true", help="the cases of other cells than the LSTM, and of zoneout")
    parser.add_argument("--sample", action="store_true", help=f"one case of {SAMPLED} for each target")
    parser.add_argument("--jobs", type=int, default=cores, help="processes (default: %(default)s)")
    parser.add_argument("--time-limit", type=positive, default=LIMIT, help="seconds for a case (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default: {FOLDER.name} in reports, if all is audited")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error("--jobs should be at least 1")
    jobs = jobs_of(options.targets, options.only, options.sample, options.cells)
    if not jobs:
        parser.error(f"no case has {options.only!r} in its name; one is {CASES[0]}")
    try:
        records = run(jobs, options.jobs, options.time_limit)
    except KeyboardInterrupt:
        print("interrupted: nothing written", file=sys.stderr)
        return 130
    whole = options.targets == list(GPUS) and not options.only and not options.sample
    folder = options.out or ((FOLDER / "cells" if options.cells else FOLDER) if whole else None)
    print(audit_report.summary(records))
    if folder is not None:
        environment = audit_report.environment("python -m bench.audit" + _selection(options))
        print("\n".join(map(str, write(records, environment, folder))))
    return int(any(r["violations"] for r in records))


def _selection(options: argparse.Namespace) -> str:
    targets = ",".join(gpus.named(name).target for name in options.targets)
    parts = [f" --targets {targets}" if options.targets != list(GPUS) else ""]
    parts += [f" --only '{options.only}'" if options.only else "", " --sample" if options.sample else ""]
    parts += [" --cells" if options.cells else ""]
    return "".join(parts)


if __name__ == "__main__":
    sys.exit(main())
