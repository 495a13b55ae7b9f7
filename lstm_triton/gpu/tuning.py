"""Which way to run a call is the fastest on this GPU: measured once for all calls alike, and kept on disk.

Calls are alike if they are in one `Bucket`. For the first of them the candidates, plans of kernels here and PyTorch's
operator, run that very call in turns. With `LSTM_TRITON_TUNE=0` nothing is timed, and predicted times decide.
"""

import os
import statistics
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lstm_triton.gpu import kept
from lstm_triton.planning import Plan
from lstm_triton.tolerances import precision

TORCH, EAGER = "PyTorch's operator", "PyTorch's operations"  # ways that have no plan
# How much faster than PyTorch's operator a candidate must be, and in how many of the rounds faster at all: noise of
# both taken off, `auto` must not lose.
MARGIN, MOST_OF_ROUNDS = 0.03, 0.75
# Seconds that the runs of all candidates may take, but for the first of each, which compiles; and rounds.
BUDGET, LEAST_ROUNDS, MOST_ROUNDS = 0.3, 3, 50
# A candidate of ours that takes so many times as long as another in each of so many rounds gets no further ones.
HOPELESS, HOPELESS_ROUNDS = 2.0, 2
# Upper ends of the buckets of T. Beyond the last times go with T, and a call of no more steps than these is timed.
STEPS = (1, 4, 16, 64, 256)
MOST_STEPS = 512

# Seconds that a run takes on the device.
Clock = Callable[[Callable[[], object]], float]


class Bucket(NamedTuple):
    """What calls that one measurement holds for have in common; sizes as of `lstm_triton.functional.lstm`."""

    precision: str  # a name in `lstm_triton.tolerances.DTYPES`
    hidden: int  # H
    size: int  # K
    features: int  # I
    directions: int  # D
    layers: int  # L
    batch: int  # the power of two that B was rounded up to
    steps: int  # the number in `STEPS` that T was rounded up to; 0: T is larger
    training: bool
    packed: bool
    drops: bool  # whether recurrent dropout is active
    recompute: bool
    cell: str = "lstm"  # its name
    zoneout: bool = False  # whether there is any

    def __str__(self) -> str:
        most = f"T≤{self.steps}" if self.steps else f"T>{STEPS[-1]}"
        sizes = f"I={self.features} H={self.hidden} K={self.size} L={self.layers} D={self.directions}"
        kind = ["training" if self.training else "inference", "packed" if self.packed else "dense"]
        kind += ["recurrent dropout"] * self.drops + ["recompute"] * self.recompute
        kind += ["zoneout"] * self.zoneout + [self.cell] * (self.cell != "lstm")
        return f"{self.precision}, {sizes} B≤{self.batch} {most}, {', '.join(kind)}"

    @classmethod
    def of(
        cls,
        dtype: torch.dtype,
        features: int,
        hx: Tensor,
        cx: Tensor,
        layers: int,
        steps: int,
        training: bool,
        packed: bool,
        drops: bool,
        recompute: bool,
        cell: str = "lstm",
        zoneout: bool = False,
    ) -> "Bucket":
        """That of a call.

        Args:
            dtype: that it runs in.
            features, layers: as of the fields.
            hx, cx: (L * D, B, K), (L * D, B, H).
            steps: T.
            training, packed, drops, recompute, cell, zoneout: as of the fields.
        """
        (count, batch, size), hidden = hx.shape, cx.size(2)
        end = STEPS[bisect_left(STEPS, steps)] if steps <= STEPS[-1] else 0
        return cls(
            precision(dtype, hx.device), hidden, size, features, count // layers, layers,
            1 << (batch - 1).bit_length(), end, training, packed, drops, training and recompute, cell, zoneout,
        )  # fmt: skip


class Candidate(NamedTuple):
    """A way to run a call."""

    name: str
    plan: Plan | None  # None: PyTorch's operator
    run: Callable[[], object]  # the call, its results; kernels in it run by the plan
    predicted: float | None = None  # seconds


@dataclass(frozen=True)
class Result:
    """Which candidate is taken for a bucket, and why."""

    winner: str
    plan: Plan | None
    why: str  # how it was found, in words
    seconds: dict[str, float] = field(default_factory=dict)  # of each candidate: the median, or what is predicted
    failed: dict[str, str] = field(default_factory=dict)
    where: str = ""

    def __str__(self) -> str:
        parts = [f"{name} {duration(s)}" for name, s in sorted(self.seconds.items(), key=lambda item: item[1])]
        parts += [f"{name} failed ({error})" for name, error in self.failed.items()]
        return self.why + (f": {', '.join(parts)}" if parts else "") + (f" ({self.where})" if self.where else "")


_results: dict[tuple[torch.device, Bucket], Result] = {}
_trials: dict[tuple[torch.device, Bucket], Plan] = {}  # those that are being timed
_tuning = threading.Lock()


def known(device: torch.device, bucket: Bucket) -> Result | None:
    """The result that this process has."""
    return _results.get((device, bucket))


def has_plans() -> bool:
    """Whether `plan_for` may know any: never where nothing was measured, as on a CPU."""
    return bool(_results or _trials)


def plan_for(device: torch.device, bucket: Bucket) -> Plan | None:
    """The plan of the layers of calls in this bucket; None where nothing is known of them."""
    key = device, bucket
    if key in _trials:
        return _trials[key]
    return _results[key].plan if key in _results else None


def remember(device: torch.device, bucket: Bucket, result: Result) -> Result:
    """Makes this the process's result."""
    _results[device, bucket] = result
    return result


def recall(device: torch.device, bucket: Bucket) -> Result | None:
    """The result that is on disk."""
    machine = kept.machine(device)
    found = kept.read("tuned", machine, bucket._asdict())
    if found is None:
        return None
    plan = None if found["plan"] is None else Plan(**found["plan"])
    seconds = {name: 1e-6 * x for name, x in found["microseconds"].items()}
    return Result(found["winner"], plan, "measured", seconds, found["failed"], f"{machine.device}, cached")


def enabled() -> bool:
    """Whether anything may be timed."""
    return os.environ.get("LSTM_TRITON_TUNE", "1") != "0"


def predicted(candidates: Sequence[Candidate]) -> Result:
    """What the predicted times say; without those, PyTorch's operator or, where it can't be, the first candidate."""
    seconds = {c.name: c.predicted for c in candidates if c.predicted is not None}
    by_name = {candidate.name: candidate for candidate in candidates}
    best = by_name.get(TORCH, candidates[0])
    if best.name in seconds:
        best = by_name[winner({name: [s] for name, s in seconds.items()})]
    return Result(best.name, best.plan, "the model's choice, LSTM_TRITON_TUNE=0", seconds)


def tune(
    device: torch.device,
    bucket: Bucket,
    candidates: Sequence[Candidate],
    timed: Clock,
    wrong: Callable[[Any], str] = lambda results: "",
) -> Result:
    """Times the candidates; the process has the result from then on and, where nothing was in the way, the disk.

    Args:
        device: where they run.
        bucket: of the call that they run.
        candidates: one at least, the one that should be the fastest first.
        timed: the device's `clock`.
        wrong: what is wrong with the results of a plan, which is not taken then, in words; "" if nothing is.
    """
    with _tuning:  # two threads would time each other's
        found = known(device, bucket)
        if found is not None:
            return found
        by_name = {candidate.name: candidate for candidate in candidates}
        try:
            running, failed = _right(device, bucket, candidates, wrong)
            rounds = _race(device, bucket, running, timed, failed)
        except torch.OutOfMemoryError as error:
            usual, why = by_name.get(TORCH, candidates[0]), "no memory to time kernels in"
            kept.warn("memory", f"{why}; such calls run by {usual.name} ({kept.summary(error)})")
            return remember(device, bucket, Result(usual.name, usual.plan, why))
        if TORCH in failed or not rounds:  # something is wrong with the call, and will be said where it runs
            name = TORCH if TORCH in failed else EAGER
            return remember(device, bucket, Result(name, None, "measured", failed=failed))
        best, machine = by_name[winner(rounds)], kept.machine(device)
        seconds = {name: statistics.median(times) for name, times in rounds.items()}
        entry = {
            "winner": best.name,
            "plan": None if best.plan is None else asdict(best.plan),
            "microseconds": {name: round(1e6 * s, 3) for name, s in seconds.items()},
            "rounds": {name: len(times) for name, times in rounds.items()},
            "failed": failed,
        }
        kept.write("tuned", machine, bucket._asdict(), entry)
        return remember(device, bucket, Result(best.name, best.plan, "measured", seconds, failed, machine.device))


def winner(rounds: Mapping[str, Sequence[float]]) -> str:
    """The name of the candidate to take, by the seconds of each in rounds; PyTorch's operator wins ties.

    Candidates that got fewer rounds than others were left behind in the first ones.
    """
    best = min(rounds, key=lambda name: statistics.median(rounds[name]))
    if best == TORCH or TORCH not in rounds:
        return best
    pairs = list(zip(rounds[best], rounds[TORCH], strict=False))
    faster = statistics.median(rounds[best]) <= (1 - MARGIN) * statistics.median(rounds[TORCH])
    return best if faster and sum(a < b for a, b in pairs) >= MOST_OF_ROUNDS * len(pairs) else TORCH


def _right(
    device: torch.device, bucket: Bucket, candidates: Sequence[Candidate], wrong: Callable[[Any], str]
) -> tuple[list[Candidate], dict[str, str]]:
    """Runs each candidate once, which compiles it; those that are right, and what is wrong with the others."""
    failed: dict[str, str] = {}
    for candidate in candidates:
        try:
            with _trial(device, bucket, candidate.plan):
                results = candidate.run()
            found = wrong(results) if candidate.plan is not None else ""
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            failed[candidate.name] = kept.summary(error)
            continue
        if found:
            failed[candidate.name] = found
            kept.warn(f"wrong {candidate.plan}", f"{candidate.name} is not taken for {bucket}: {found}; {kept.REPORT}")
    return [candidate for candidate in candidates if candidate.name not in failed], failed


def _race(
    device: torch.device, bucket: Bucket, running: list[Candidate], timed: Clock, failed: dict[str, str]
) -> dict[str, list[float]]:
    """The seconds of each candidate in each round; why one fails is added to `failed`."""
    rounds: dict[str, list[float]] = {candidate.name: [] for candidate in running}
    spent, count = 0.0, 0
    while running and (count < LEAST_ROUNDS or (len(running) > 1 and count < MOST_ROUNDS and spent < BUDGET)):
        for candidate in running if count % 2 else running[::-1]:
            try:
                with _trial(device, bucket, candidate.plan):
                    seconds = timed(candidate.run)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                failed[candidate.name] = kept.summary(error)
                continue
            rounds[candidate.name].append(seconds)
            spent += seconds
        count += 1
        running = [candidate for candidate in running if candidate.name not in failed]
        if count == HOPELESS_ROUNDS and running:
            limit = HOPELESS * min(min(rounds[candidate.name]) for candidate in running)
            running = [c for c in running if c.name == TORCH or min(rounds[c.name]) <= limit]
    return {name: times for name, times in rounds.items() if name not in failed}


@contextmanager
def _trial(device: torch.device, bucket: Bucket, plan: Plan | None) -> Iterator[None]:
    """Within this context layers of calls in the bucket run by the plan."""
    if plan is None:
        yield
        return
    _trials[device, bucket] = plan
    try:
        yield
    finally:
        del _trials[device, bucket]


def clock(device: torch.device) -> Clock:
    """Times runs on a GPU's current stream, from when all that was asked of it before is done."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed(run: Callable[[], object]) -> float:
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()
            start.record()
            run()
            end.record()
            end.synchronize()
        return 1e-3 * start.elapsed_time(end)

    return timed


def duration(seconds: float) -> str:
    """Microseconds or, from 1,000 of them on, milliseconds, to three digits."""
    return f"{1e6 * seconds:.3g} µs" if seconds < 1e-3 else f"{1e3 * seconds:.3g} ms"


def name_of(plan: Plan | None) -> str:
    """A plan in a few words: strategy, tiles of rows, units and the product's inner dimension, what isn't usual."""
    if plan is None:
        return TORCH
    tiles = ("strategy", "block_b", "block_h", "block_k")
    more = [
        f"{f.name}={getattr(plan, f.name)}" for f in fields(plan)
        if f.name not in tiles and getattr(plan, f.name) != f.default
    ]  # fmt: skip
    return " ".join([plan.strategy, f"{plan.block_b}×{plan.block_h}×{plan.block_k}", *more])
