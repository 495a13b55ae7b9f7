"""`python -m bench.longterm`: gradients against the lag, and problems with long lags, by RNN, LSTM of 1997, LSTM, GRU.

Writes gradients.csv, runs.csv, curves.csv and run.json as results come in, then plots and README.md. The same
command goes on where an interrupted one stopped; other lengths, seeds and cells are added to what is there.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.environment import environment
from bench.longterm import gradients, report
from bench.longterm.cells import CELLS
from bench.longterm.problems import PROBLEMS, SHORTEST
from bench.longterm.records import RecordError, load, load_or_new
from bench.longterm.run import run_gradients, run_jobs
from bench.longterm.train import Job, Settings

LENGTHS, SEEDS = (100, 200, 400, 1000), (0, 1, 2)
FULL = Settings()
# Seconds instead of half an hour: shows that everything runs, says nothing about the cells.
QUICK = replace(FULL, hidden=8, batch=16, steps=30, window=64, tests=32, every=10)
QUICK_LENGTHS, QUICK_SEEDS = (24, 30), (0,)
QUICK_SIZE = gradients.Size(inputs=2, hidden=8, lags=20, warm_up=5, networks=2, batch=3)
INTERRUPTED = 130  # what a shell says of a command that Ctrl-C ended


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.longterm", description=__doc__)
    parser.add_argument("--problems", nargs="*", choices=PROBLEMS, default=list(PROBLEMS), help="default: all")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="default: all")
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=at_least(SHORTEST),
        metavar="T",
        help=f"shortest length in time steps, {SHORTEST} at least; default: {' '.join(map(str, LENGTHS))}",
    )
    seeds = " ".join(map(str, SEEDS))
    parser.add_argument("--seeds", nargs="+", type=at_least(0), metavar="S", help=f"default: {seeds}")
    parser.add_argument("--steps", type=at_least(1), help=f"most training steps of a job; default: {FULL.steps}")
    parser.add_argument("--rate", type=float, help=f"Adam's learning rate; default: {FULL.rate}")
    parser.add_argument("--workers", type=at_least(1), default=2, help="processes of a thread each; default: 2")
    parser.add_argument("--quick", action="store_true", help="a run of seconds that says nothing about the cells")
    parser.add_argument("--report", action="store_true", help="only write plots and README.md anew from the CSV files")
    parser.add_argument("--out", type=Path, help="default: reports/longterm, with --quick reports/longterm-quick")
    return parser


def at_least(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"should be at least {least}, got {value}")
        return value

    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code, 2 after an error that the user can mend."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = parser().parse_args(given)
    command = " ".join(["python -m bench.longterm", *given])
    out = args.out or Path("reports/longterm-quick" if args.quick else "reports/longterm")
    settings = QUICK if args.quick else FULL
    settings = replace(settings, steps=args.steps or settings.steps, rate=args.rate or settings.rate)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small: a second thread costs more than it brings
    try:
        if args.report:
            records = load(out)
            if records is None:
                raise RecordError(f"{out} has no run: run without --report first")
        else:
            records = load_or_new(out, QUICK_SIZE if args.quick else gradients.Size(), settings)
            lengths = args.lengths or (QUICK_LENGTHS if args.quick else LENGTHS)
            seeds = args.seeds or (QUICK_SEEDS if args.quick else SEEDS)
            wanted = itertools.starmap(Job, itertools.product(args.problems, lengths, args.cells, seeds))
            jobs = [job for job in dict.fromkeys(wanted) if job not in records.done]
            records.begin(
                environment() | {"command": command, "quick": args.quick, "workers": args.workers, "jobs": len(jobs)}
            )
            run_gradients(records)
            run_jobs(records, jobs, args.workers)
        print(report.write(records))
    except (RecordError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nInterrupted. The same command goes on after the last finished job: {command}", file=sys.stderr)
        return INTERRUPTED
    finally:
        torch.set_num_threads(threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
