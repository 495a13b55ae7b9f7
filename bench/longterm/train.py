"""Training one network on one problem until the paper's criterion is met."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from bench.longterm.cells import CELLS, Cell, states
from bench.longterm.problems import PROBLEMS, Batch, Problem

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What all jobs have in common.

    Attributes:
        hidden: units of the layer.
        batch: sequences of a step.
        rate: Adam's learning rate.
        clip: bound of the gradient's norm over all parameters.
        steps: after which a job that hasn't met the criterion ends.
        window: sequences that the criterion looks back on.
        tests: fresh sequences that a network which met it is tested on.
        every: steps that a point of the training-error curve is the mean of.
    """

    hidden: int = 32
    batch: int = 32
    rate: float = 0.01
    clip: float = 1.0
    steps: int = 4000
    window: int = 2000
    tests: int = 2560
    every: int = 50


class Job(NamedTuple):
    """One training: keys of `PROBLEMS` and `CELLS`, the shortest length in time steps, and the seed."""

    problem: str
    length: int
    cell: str
    seed: int

    def __str__(self) -> str:
        return f"{self.problem}, T = {self.length}, {self.cell}, seed {self.seed}"


class Network(nn.Module):
    """A recurrent layer, and sigmoid output units that read its h at each row's last step."""

    def __init__(self, cell: Cell, problem: Problem, hidden: int) -> None:
        super().__init__()
        self.layer = cell.make(problem.inputs, hidden)
        self.output = nn.Linear(hidden, problem.outputs)

    def forward(self, batch: Batch) -> Tensor:
        """(B, outputs), in (0, 1)."""
        _, hx = self.layer(batch.input, None, batch.lengths)
        return self.output(states(hx)[0][0]).sigmoid()


class Criterion:
    """The paper's: over the most recent sequences the mean error is below the limit and every one is right.

    Args:
        problem: has the limit and the tolerance.
        window: how many sequences, fewer of which never meet it.
    """

    def __init__(self, problem: Problem, window: int) -> None:
        self.problem, self.window = problem, window
        self.errors, self.right = torch.empty(0), torch.empty(0, dtype=torch.bool)

    def add(self, output: Tensor, target: Tensor) -> float:
        """Counts these sequences, (B, outputs) each, as the most recent; returns their mean squared error."""
        difference = (output - target).detach()
        errors = difference.square().sum(1)
        self.errors = torch.cat([self.errors, errors])[-self.window :]
        self.right = torch.cat([self.right, difference.abs().amax(1) < self.problem.tolerance])[-self.window :]
        return errors.mean().item()

    @property
    def error(self) -> float:
        return self.errors.mean().item()

    @property
    def correct(self) -> float:
        """The part of the most recent sequences that is right."""
        return self.right.float().mean().item()

    @property
    def met(self) -> bool:
        full = len(self.right) == self.window
        return full and bool(self.right.all()) and self.error < self.problem.error_limit


class Outcome(NamedTuple):
    """What a job gives: a line of runs.csv, and those of curves.csv."""

    run: Row
    curve: list[Row]


def train(job: Job, settings: Settings, advance: Callable[[int], None] = lambda step: None) -> Outcome:
    """Trains until the criterion is met or the steps are used up; `advance` hears of each step.

    Every sequence is seen once, before the update that it is part of. The seed gives weights and sequences: of one
    seed, all cells get the same sequences.
    """
    problem, cell = PROBLEMS[job.problem], CELLS[job.cell]
    torch.manual_seed(job.seed)
    network = Network(cell, problem, settings.hidden)
    cell.begin(network.layer, job.length, Generator().manual_seed(job.seed))
    generator = Generator().manual_seed(1 + job.seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.rate)
    criterion = Criterion(problem, settings.window)
    curve, recent, skipped = list[Row](), list[float](), 0
    start = time.perf_counter()
    for step in range(1, settings.steps + 1):
        batch = problem.draw(job.length, settings.batch, generator)
        output = network(batch)
        recent.append(criterion.add(output, batch.target))
        if len(recent) == settings.every or step == settings.steps or criterion.met:
            curve.append({**job._asdict(), "step": step, "error": sum(recent) / len(recent)})
            recent.clear()
        if criterion.met:
            break
        optimizer.zero_grad()
        (output - batch.target).square().sum(1).mean().backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), settings.clip)
        if norm.isfinite():
            optimizer.step()
        else:
            skipped += 1  # a gradient that overflowed has no direction
        advance(step)
    seconds = time.perf_counter() - start
    run = {
        **job._asdict(),
        "met": int(criterion.met),
        "steps": step,
        "sequences": step * settings.batch,
        "error": criterion.error,
        "correct": criterion.correct,
        "skipped": skipped,
        "seconds": seconds,
    }
    if criterion.met:
        run |= on_fresh(network, job, settings)
    return Outcome(run, curve)


@torch.no_grad()
def on_fresh(network: Network, job: Job, settings: Settings) -> Row:
    """How many of the fresh sequences are wrong, and their mean squared error."""
    problem = PROBLEMS[job.problem]
    generator = Generator().manual_seed(10**6 + job.seed)
    result = Criterion(problem, settings.tests)
    for first in range(0, settings.tests, settings.batch):
        batch = problem.draw(job.length, min(settings.batch, settings.tests - first), generator)
        result.add(network(batch), batch.target)
    return {"test_wrong": int((~result.right).sum()), "test_error": result.error}
