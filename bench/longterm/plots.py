"""The plots, 9 inches wide to be read at 900 pixels."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.files import replace
from bench.longterm import gradients
from bench.longterm.cells import CELLS
from bench.longterm.problems import PROBLEMS
from bench.longterm.records import Records, job_of
from bench.longterm.train import Row

GRADIENTS, STEPS = "gradients.png", "steps.png"
LEAST = -20  # the gradients' plot ends at 10 to this: what is below is zero to any training


def errors_name(problem: str) -> str:
    return f"errors-{problem}.png"


def draw(records: Records) -> None:
    """Writes the plots that the records allow into their folder."""
    if records.gradients:
        _save(gradient_plot(records.gradients), records.folder / GRADIENTS)
    if records.runs:
        _save(steps_plot(records), records.folder / STEPS)
    for problem in PROBLEMS:
        if any(row["problem"] == problem for row in records.runs):
            _save(error_plot(records, problem), records.folder / errors_name(problem))


def gradient_plot(rows: Sequence[Row]) -> Figure:
    """The gradient's norm against the lag: the geometric mean, and a band from the 10th to the 90th percentile."""
    figure = Figure(figsize=(9, 5.2), dpi=100, layout="constrained")
    axes: Axes = figure.subplots()
    for name in dict.fromkeys(row["curve"] for row in rows):
        curve = gradients.CURVES[name]
        own = [row for row in rows if row["curve"] == name]
        lags = [row["lag"] for row in own]
        mean, low, high = ([row[f"log10_{what}"] for row in own] for what in ("mean", "p10", "p90"))
        axes.plot(lags, mean, curve.dashes, color=curve.colour, label=curve.label, lw=1.8)
        axes.fill_between(lags, low, high, color=curve.colour, alpha=0.15, lw=0)
    top = max(row["log10_p90"] for row in rows)
    lowest = min(row["log10_p10"] for row in rows)
    axes.set_ylim(max(LEAST, lowest) - 0.5, top + 0.5)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"$10^{{{value:g}}}$"))
    axes.set_xlabel("lag k (time steps)")
    axes.set_ylabel("norm of the gradient at step t − k,\nrelative to that at step t")
    axes.set_title("Gradient against the lag, untrained networks: geometric mean, 10th to 90th percentile", fontsize=11)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def steps_plot(records: Records) -> Figure:
    """Training steps until the criterion was met, a mark a seed; hollow marks at the limit where it wasn't."""
    problems = [name for name in PROBLEMS if any(row["problem"] == name for row in records.runs)]
    cells = _cells(records.runs)
    figure = Figure(figsize=(9, 4.6), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(problems), sharey=True, squeeze=False)[0]
    limit = records.settings.steps
    for panel, problem in zip(panels, problems, strict=True):
        own = [row for row in records.runs if row["problem"] == problem]
        lengths = sorted({row["length"] for row in own})
        for k, cell in enumerate(cells):
            shift = 0.16 * (k - (len(cells) - 1) / 2)
            for x, length in enumerate(lengths):
                _marks(panel, [r for r in own if (r["cell"], r["length"]) == (cell, length)], x + shift, cell)
        for x in range(len(lengths) - 1):
            panel.axvline(x + 0.5, color="#cccccc", lw=0.8)
        panel.axhline(limit, color="#777777", ls="--", lw=1)
        panel.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        panel.set_xlim(-0.5, len(lengths) - 0.5)
        panel.set_yscale("log")
        panel.set_xlabel("shortest length T (time steps)")
        panel.set_title(PROBLEMS[problem].title, fontsize=10)
        panel.grid(axis="y", alpha=0.3)
    ticks = [t * 10**d for d in range(6) for t in (1, 2, 5) if t * 10**d <= limit]
    panels[0].set_yticks(ticks, [f"{t:,}" for t in ticks])
    panels[0].yaxis.set_minor_locator(NullLocator())
    panels[0].set_ylim(0.6 * min(row["steps"] for row in records.runs), 1.5 * limit)
    panels[0].set_ylabel(f"training steps of {records.settings.batch} sequences")
    handles = [_handle(cell, marker=CELLS[cell].marker, ls="") for cell in cells]
    hollow: dict[str, Any] = {"marker": "o", "ls": "", "mfc": "none", "color": "#555555"}
    handles.append(Line2D([], [], label=f"hollow: number of seeds not there in {limit:,} steps", **hollow))
    figure.suptitle("Training steps until the criterion is met, a mark a seed", fontsize=11)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _marks(panel: Axes, rows: Sequence[Row], x: float, cell: str) -> None:
    """A mark for each seed that met the criterion, a hollow one with their number for those that didn't."""
    style: dict[str, Any] = {"color": CELLS[cell].colour, "marker": CELLS[cell].marker, "ls": "", "ms": 6}
    met = [row["steps"] for row in rows if row["met"]]
    panel.plot([x] * len(met), met, alpha=0.85, **style)
    missed = [row["steps"] for row in rows if not row["met"]]
    if missed:
        panel.plot(x, missed[0], mfc="white", mew=1.2, **style)
        place = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
        panel.annotate(str(len(missed)), (x, missed[0]), color=CELLS[cell].colour, fontsize=8, **place)  # type: ignore[arg-type]


def error_plot(records: Records, problem: str) -> Figure:
    """The training error against training steps, a panel a length and a line a seed."""
    rows = [row for row in records.curves if row["problem"] == problem]
    lengths = sorted({row["length"] for row in rows})
    cells = _cells(rows)
    columns = min(2, len(lengths))
    lines = math.ceil(len(lengths) / columns)
    figure = Figure(figsize=(9, 1.2 + 2.6 * lines), dpi=100, layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    met = {job_of(row) for row in records.runs if row["met"]}
    limit = PROBLEMS[problem].error_limit
    for panel, length in zip(panels.flat, lengths, strict=False):
        for cell in cells:
            for seed in sorted({row["seed"] for row in rows}):
                own = [r for r in rows if (r["length"], r["cell"], r["seed"]) == (length, cell, seed)]
                if not own:
                    continue
                steps, errors = [row["step"] for row in own], [row["error"] for row in own]
                panel.plot(steps, errors, CELLS[cell].dashes, color=CELLS[cell].colour, lw=1, alpha=0.8)
                if job_of(own[0]) in met:
                    panel.plot(steps[-1], errors[-1], CELLS[cell].marker, color=CELLS[cell].colour, ms=6)
        panel.axhline(limit, color="#777777", ls="--", lw=1)
        panel.axhline(PROBLEMS[problem].guess(length), color="#777777", ls=":", lw=1.4)
        panel.set_yscale("log")
        panel.set_title(f"T = {length}", fontsize=10)
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(lengths) :]:
        panel.set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel("training steps")
    handles = [_handle(cell, marker=CELLS[cell].marker, ls=CELLS[cell].dashes) for cell in cells]
    handles.append(Line2D([], [], color="#777777", ls="--", label=f"criterion's bound of the error, {limit:g}"))
    handles.append(Line2D([], [], color="#777777", ls=":", lw=1.4, label="best answer without looking"))
    figure.supylabel("mean squared error", fontsize=10)
    figure.suptitle(
        f"Training error, {PROBLEMS[problem].title}: a line a seed, a mark where it met the criterion", fontsize=11
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _cells(rows: Sequence[Row]) -> list[str]:
    found = {row["cell"] for row in rows}
    return [cell for cell in CELLS if cell in found]


def _handle(cell: str, **style: Any) -> Line2D:
    return Line2D([], [], color=CELLS[cell].colour, label=CELLS[cell].label, **style)


def _save(figure: Figure, path: Path) -> None:
    replace(path, lambda part: figure.savefig(part, format="png"))
