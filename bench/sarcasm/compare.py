"""The published recipe with other cells: trained one after another, timed in turns, one table and one plot."""

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import track

from bench.environment import environment
from bench.files import write_atomically
from bench.sarcasm import published
from bench.sarcasm.cells import CELLS, LSTM
from bench.sarcasm.data import SYNTHETIC, Headlines
from bench.sarcasm.published import Corpus, Training
from bench.sarcasm.report import Runs, caveats, spread, table
from bench.sarcasm.results import read_csv
from bench.sarcasm.run import check_backend, run
from bench.sarcasm.step_time import timed

matplotlib.use("Agg")

BATCHES = 200  # timed of each cell
WARM_UP = 10
# Points of accuracy below the best that a plot shows: a cell that learns nothing would squeeze the others.
POINTS_SPAN, CURVES_SPAN = 3.0, 12.0


def compare(
    names: Sequence[str], headlines: Headlines, backend: str, epochs: int, seeds: Sequence[int], folder: Path
) -> Path:
    """Times and trains the cells, each seed's results and the report written as soon as they are there.

    Args:
        names: of `CELLS`.
        headlines, backend, epochs, seeds: as of `run`; seeds finished before are not trained again.
        folder: of the report, with a folder for each cell.

    Returns:
        The path of the report, over all cells that the folder has results of.

    Raises:
        RunError: as of `run`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus = Corpus(headlines)
    for name in names:
        check_backend(published, corpus, backend, device, name)
    shown = [name for name in CELLS if name in names or (folder / name / "summary.json").exists()]
    times = step_times(shown, corpus, backend, device) | {"environment": environment()}
    write_atomically(folder / "step_time.json", json.dumps(times, indent=2) + "\n")
    for name in names:
        print(f"cell {name}")
        run(published, headlines, backend, epochs, seeds, folder / name, name)
        path = write(folder)
    return path


def step_times(names: Sequence[str], corpus: Corpus, backend: str, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a training step of each cell, on the same batches in turns; parameters; which backend ran.

    Forward, loss, backward and the optimizer's step together, as `bench.sarcasm.step_time`.
    """
    trainings = [(name, Training(corpus, 0, backend, device, cell=name)) for name in names]
    order = [corpus.train[k] for k in torch.randperm(len(corpus.train), generator=torch.Generator().manual_seed(0))]
    prepared = [(t.to(device), y.to(device)) for (t, y), _ in zip(corpus.batches(order), range(BATCHES), strict=False)]
    steps = [*prepared[:WARM_UP], *prepared]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for k, (tokens, labels) in enumerate(track(steps, "training steps, timed", disable=not Console().is_terminal)):
        first = k % len(trainings)
        for name, training in trainings[first:] + trainings[:first]:
            elapsed = timed(training, tokens, labels)
            if k >= len(steps) - len(prepared):
                seconds[name].append(elapsed)
    cells = {}
    for name, training in trainings:
        model, values = training.model, seconds[name]
        fifths = [1000 * value for value in statistics.quantiles(values, n=5)]
        cells[name] = {
            "ms": {"p20": fifths[0], "median": 1000 * statistics.median(values), "p80": fifths[3]},
            "parameters": sum(p.numel() for p in model.parameters()),
            "backend": ran_by(model, prepared[0][0]),
        }
    return {"batches": len(prepared), "cells": cells}


def ran_by(model: published.Classifier, tokens: torch.Tensor) -> str:
    """The backend of the layers in a training step."""
    found = re.search(r"^backend: (\w+)", model.train().rnn.explain(model.embedding(tokens)), re.MULTILINE)
    assert found
    return found[1]


def write(folder: Path) -> Path:
    """README.md and accuracy.png from what the folder has of each cell; returns the path of the first."""
    summaries, runs = {}, {}
    for name in CELLS:
        path = folder / name / "summary.json"
        if path.exists():
            summaries[name] = json.loads(path.read_text(encoding="utf-8"))
            runs[name] = [read_csv(folder / name / f"seed-{seed}.csv") for seed in summaries[name]["seeds"]]
    times = json.loads((folder / "step_time.json").read_text(encoding="utf-8"))
    draw(folder / "accuracy.png", runs, next(iter(summaries.values()))["data"] == SYNTHETIC)
    path = folder / "README.md"
    write_atomically(path, markdown(summaries, runs, times))
    return path


def best(rows: list[dict[str, float]]) -> dict[str, float]:
    return max(rows, key=lambda row: row["test_accuracy"])


def last(rows: list[dict[str, float]]) -> dict[str, float]:
    return rows[-1]


def draw(path: Path, runs: dict[str, Runs], synthetic: bool) -> None:
    """900 pixels wide: every seed's best and last accuracy beside its cell; the mean curves over the epochs."""
    figure = Figure(figsize=(9, 8.5), dpi=100, layout="constrained")
    points, curves = figure.subplots(2, 1, height_ratios=(1, 1.1))
    points.set_title("Sarcasm, published recipe with other cells" + (" (SYNTHETIC data)" if synthetic else ""))
    draw_points(points, runs)
    draw_curves(curves, runs)
    for axes in (points, curves):
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path)


def draw_points(axes: Axes, runs: dict[str, Runs]) -> None:
    """A line a cell; what is more than POINTS_SPAN below the highest is written."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for label, choose, colour, offset in (("best epoch", best, "C0", -0.16), ("last epoch", last, "C1", 0.16)):
        for k, name in enumerate(runs):
            values = [choose(rows)["test_accuracy"] for rows in runs[name]]
            found[name] += values
            once = label if k == 0 else None
            axes.plot(values, [k + offset] * len(values), "o", color=colour, alpha=0.6, label=once)
            axes.plot([statistics.mean(values)], [k + offset], "|", color=colour, markersize=13, markeredgewidth=2.5)
    highest = max(max(values) for values in found.values())
    lowest = highest - POINTS_SPAN
    for k, values in enumerate(found.values()):
        below = [value for value in values if value < lowest]
        if below:
            text = f"← {len(below)} of {len(values)} points at {min(below):.1f} to {max(below):.1f} %"
            axes.annotate(text, (lowest, k), (5, 0), textcoords="offset points", va="center")
    axes.set_xlim(lowest, highest + 0.1)
    axes.set_xlabel("test accuracy (%): points are seeds, bars their mean")
    axes.set_yticks(range(len(found)), found)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")


def draw_curves(axes: Axes, runs: dict[str, Runs]) -> None:
    """Test accuracy per epoch, the mean over a cell's seeds, down to CURVES_SPAN below the highest."""
    highest = 0.0
    for k, (name, seeds) in enumerate(runs.items()):
        means = [statistics.mean(row["test_accuracy"] for row in rows) for rows in zip(*seeds, strict=True)]
        highest = max(highest, *means)
        style = "o" if len(means) == 1 else ("-", "--", ":")[k % 3]
        colour, width = ("black", 2.2) if name == LSTM else (f"C{k}", 1.5)
        axes.plot(range(1, len(means) + 1), means, style, color=colour, linewidth=width, label=name)
    axes.set_ylim(highest - CURVES_SPAN, highest + 0.5)
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy (%), mean of the seeds")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def markdown(summaries: dict[str, dict[str, Any]], runs: dict[str, Runs], times: dict[str, Any]) -> str:
    """The report's text."""
    first = next(iter(summaries.values()))
    synthetic = first["data"] == SYNTHETIC
    parts = ["# Sarcasm, published recipe with other cells" + (" (SYNTHETIC data)" if synthetic else "")]
    if synthetic:
        parts.append("**Trained on generated headlines**: the figures say nothing about the real data set.")
    parts.append(
        "The recipe is [published](../published/README.md)'s (tokens, split, batches, two layers of 32 units, "
        f"recurrent dropout 0.5, Adam 1e-3, {first['epochs']} epochs) with another cell in its layers. It was made "
        "for the LSTM and nothing was tuned for a cell: this compares cells under one recipe, not cells at their best. "
        "Matrices begin Xavier-uniform, whose bound depends on how many gates are stacked in a matrix, and biases "
        "at zero, the forget gate's too."
    )
    parts += [results(summaries, runs, times), "![accuracy of each cell](accuracy.png)"]
    parts.append(
        "Accuracies are mean ± sample standard deviation over the seeds; in brackets the epochs that were best. "
        f"A training step is the median of {times['batches']} batches (20th to 80th percentile), the cells in turns "
        "in one process. Seconds an epoch, training and test, are the median over all epochs, one cell after another: "
        "they say what else the machine did at the time, too."
    )
    parts.append("## The cells")
    parts.append("Recurrent dropout and the two biases, as the recipe has them, all cells have.")
    notes = [[name, CELLS[name].source, CELLS[name].note] for name in summaries]
    parts.append(table(["cell", "source", "what is other than in the published recipe"], notes))
    parts += ["## What to know of these figures", caveats(first)]
    parts += ["## Run", run_table(summaries, times)]
    return "\n\n".join(parts) + "\n"


def results(summaries: dict[str, dict[str, Any]], runs: dict[str, Runs], times: dict[str, Any]) -> str:
    lines = []
    lstm = times["cells"].get(LSTM)
    for name, summary in summaries.items():
        timed_cell, tops = times["cells"][name], [best(rows) for rows in runs[name]]
        ms, epochs = timed_cell["ms"], [f"{row['epoch']:.0f}" for row in tops]
        lines.append(
            [
                f"[{name}]({name}/)",
                f"{timed_cell['parameters']:,}",
                str(len(summary["seeds"])),
                f"{spread([row['test_accuracy'] for row in tops], 2)} ({', '.join(epochs)})",
                spread([last(rows)["test_accuracy"] for rows in runs[name]], 2),
                f"{ms['median']:.2f} ({ms['p20']:.2f}–{ms['p80']:.2f})",
                f"{ms['median'] / lstm['ms']['median']:.2f}" if lstm else "–",
                f"{statistics.median(row['seconds'] for rows in runs[name] for row in rows):.1f}",
                timed_cell["backend"],
            ]
        )
    header = ["cell", "parameters", "seeds", "best epoch (%)", "last epoch (%)", "training step (ms)", "of lstm's"]
    return table([*header, "seconds an epoch", "backend"], lines)


def run_table(summaries: dict[str, dict[str, Any]], times: dict[str, Any]) -> str:
    """What was run where: a value that all cells and the timing share once, else all of them."""
    environments = [*(summary["environment"] for summary in summaries.values()), times["environment"]]
    first = next(iter(summaries.values()))
    seeds = sorted({seed for summary in summaries.values() for seed in summary["seeds"]})
    data = f" --data {SYNTHETIC}" if first["data"] == SYNTHETIC else ""
    command = (
        f"python -m bench.sarcasm --recipe {first['recipe']} --cell {' '.join(summaries)} --backend "
        f"{first['backend']} --epochs {first['epochs']} --seeds {' '.join(map(str, seeds))}{data}"
    )
    lines = [["command", f"`{command}`"], ["data", f"{first['data']}, sha256 `{first['data_sha256'][:12]}…`"]]
    for key in ("device", "threads", "torch", "triton", "python", "commit"):
        lines.append([key, ", ".join(dict.fromkeys(str(environment[key]) for environment in environments))])
    dates = sorted(environment["date"] for environment in environments)
    lines.append(["dates", f"{dates[0]} to {dates[-1]}"])
    return table(["", ""], lines)
