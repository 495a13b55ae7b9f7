"""The jobs in worker processes, with progress bars; each result is written as it comes in."""

import multiprocessing
import signal
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bench.longterm import gradients
from bench.longterm.records import Records
from bench.longterm.train import Job, Outcome, Settings, train

# Set in each worker: the steps each job has done, and whether to stop.
_steps: Any = None
_stop: Any = None


class Stopped(Exception):
    """The command was interrupted; the job gives no outcome."""


def run_gradients(records: Records) -> None:
    """Measures the curves that aren't there yet."""
    missing = [name for name in gradients.CURVES if name not in {row["curve"] for row in records.gradients}]
    with _progress() as progress:
        for name in missing:
            task = progress.add_task(f"gradients, {gradients.CURVES[name].label}", total=records.size.networks)
            records.add_gradients(gradients.measure(name, records.size, lambda task=task: progress.advance(task)))  # type: ignore[misc]


def run_jobs(records: Records, jobs: Sequence[Job], workers: int) -> None:
    """Trains the jobs, the longest sequences first so that no worker is left with one at the end.

    Raises:
        KeyboardInterrupt: all workers have stopped; what they had not finished is lost.
    """
    if not jobs:
        return
    jobs = sorted(jobs, key=lambda job: -job.length)
    context = multiprocessing.get_context("spawn")
    steps = context.Array("q", len(jobs), lock=False)
    stop = context.Value("b", 0, lock=False)
    arguments = (steps, stop)
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _begin, arguments) as pool, _progress() as progress:
        waiting = {pool.submit(_work, k, job, records.settings): k for k, job in enumerate(jobs)}
        bars = Bars(progress, jobs, records.settings.steps)
        try:
            while waiting:
                finished, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in finished:
                    outcome = future.result()
                    records.add(outcome)
                    bars.finish(waiting.pop(future), outcome)
                bars.show(steps)
        finally:
            stop.value = 1
            _cancel(waiting)


def _cancel(futures: dict[Future[Outcome], int]) -> None:
    for future in futures:
        future.cancel()


def _begin(steps: Any, stop: Any) -> None:
    """Once in each worker. Ctrl-C reaches it, too, but it is the main process that says when to stop."""
    global _steps, _stop
    _steps, _stop = steps, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _work(index: int, job: Job, settings: Settings) -> Outcome:
    def advance(step: int) -> None:
        if _stop.value:
            raise Stopped
        _steps[index] = step

    advance(0)
    return train(job, settings, advance)


class Bars:
    """A bar for all jobs and one for each that runs; elsewhere than on a terminal a line for each finished job."""

    def __init__(self, progress: Progress, jobs: Sequence[Job], limit: int) -> None:
        self.progress, self.jobs, self.limit = progress, jobs, limit
        self.all = progress.add_task("jobs", total=len(jobs))
        self.running: dict[int, TaskID] = {}
        self.finished: set[int] = set()

    def show(self, steps: Sequence[int]) -> None:
        for index, done in enumerate(steps):
            if done and index not in self.running and index not in self.finished:
                self.running[index] = self.progress.add_task(str(self.jobs[index]), total=self.limit)
            if index in self.running:
                self.progress.update(self.running[index], completed=done)

    def finish(self, index: int, outcome: Outcome) -> None:
        self.finished.add(index)
        if index in self.running:
            self.progress.remove_task(self.running.pop(index))
        self.progress.advance(self.all)
        run = outcome.run
        how = "met after" if run["met"] else "not met within"
        line = f"{self.jobs[index]}: {how} {run['steps']:,} steps, error {run['error']:.4f}, {run['seconds']:.0f} s"
        if self.progress.disable:
            print(f"{len(self.finished)}/{len(self.jobs)} {line}", flush=True)
        else:
            self.progress.console.print(line, highlight=False)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, disable=not Console().is_terminal, transient=True)
