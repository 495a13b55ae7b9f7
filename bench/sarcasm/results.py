"""The files of a run: CSV of each seed, summary.json, and how they are written."""

import csv
import statistics
from pathlib import Path
from typing import Any

from bench.files import write_atomically
from bench.sarcasm import cells
from bench.sarcasm.data import SYNTHETIC
from lstm_triton import dispatch

Row = dict[str, float]


def write_csv(path: Path, rows: list[Row]) -> None:
    """One line an epoch; columns are the keys of the rows (losses in nats, accuracies in percent).

    A field is empty where the row lacks the key.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [",".join(columns), *(",".join(f"{row[key]:.8g}" if key in row else "" for key in columns) for row in rows)]
    write_atomically(path, "\n".join(lines) + "\n")


def read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def summarize(
    folder: Path, seeds: list[int], options: dict[str, Any], facts: dict[str, Any], machine: dict[str, Any]
) -> dict[str, Any]:
    """What summary.json holds: options, accuracies (percent) over the seeds, the data's facts, environment."""
    runs = [read_csv(folder / f"seed-{seed}.csv") for seed in seeds]
    tested = [[row for row in rows if "test_accuracy" in row] for rows in runs]
    tops = [max(rows, key=lambda row: row["test_accuracy"]) for rows in tested]
    best, last = [row["test_accuracy"] for row in tops], [rows[-1]["test_accuracy"] for rows in tested]
    return {
        **options,
        "seeds": seeds,
        "accuracy_unit": "percent",
        "best_accuracy": best,
        "best_epoch": [int(row["epoch"]) for row in tops],
        "last_accuracy": last,
        "mean_best_accuracy": statistics.mean(best),
        "sd_best_accuracy": deviation(best),
        "mean_last_accuracy": statistics.mean(last),
        "sd_last_accuracy": deviation(last),
        "seconds_per_epoch": statistics.mean(row["seconds"] for rows in runs for row in rows),
        **facts,
        "environment": {
            **machine,
            "triton_interpreted": dispatch.interpreting(),
            "command": command(options, seeds),
        },
    }


def deviation(values: list[float]) -> float | None:
    """The sample standard deviation; None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def command(options: dict[str, Any], seeds: list[int]) -> str:
    """The command line of these results, less where the data lies."""
    cell = f" --cell {options['cell']}" if options["cell"] != cells.LSTM else ""
    data = f" --data {SYNTHETIC}" if options["data"] == SYNTHETIC else ""
    return (
        f"python -m bench.sarcasm --recipe {options['recipe']}{cell} --backend {options['backend']} "
        f"--epochs {options['epochs']} --seeds {' '.join(map(str, seeds))}{data}"
    )
