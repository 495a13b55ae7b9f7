"""The report of `python -m bench.cells`, drawn from cells.json: cells.md and cells.png."""

from pathlib import Path

from matplotlib.figure import Figure

from bench.cpu_report import by
from bench.files import replace, write_atomically
from bench.results import Record
from bench.tables import ENVIRONMENT, table

JSON, TEXT, PLOT = "cells.json", "cells.md", "cells.png"
_WAYS = {"loop": "the loop", "torch": "PyTorch's module", "eager": 'backend="eager"'}
# Okabe and Ito's colours.
_COLOURS = {"loop": "#CC79A7", "torch": "#000000", "eager": "#009E73"}


def write(content: Record, folder: Path) -> list[Path]:
    """Writes cells.md and cells.png; the files written."""
    figure = plot(content["records"], content["environment"]["device"])
    replace(folder / PLOT, lambda part: figure.savefig(part, dpi=150, format="png"))
    write_atomically(folder / TEXT, markdown(content))
    return [folder / JSON, folder / TEXT, folder / PLOT]


def tables(records: list[Record]) -> str:
    """A table for each number of threads: milliseconds of each way, and how many times as long as "auto" it takes."""
    parts = []
    for threads, own in by(records, "threads").items():
        first = own[0]
        head = ["cell", "auto runs", "auto, ms", *(f"{words}, ms" for words in _WAYS.values())]
        head += [f"{words} / auto" for words in _WAYS.values()] + ["rounds"]
        rows = []
        for r in own:
            times = [f"{1e3 * r[f'{way}_s']:.2f}" if f"{way}_s" in r else "–" for way in ("auto", *_WAYS)]
            ratios = [f"{r[f'{way}_ratio']:.1f}" if f"{way}_ratio" in r else "–" for way in _WAYS]
            rows.append((r["cell"], r["chosen"], *times, *ratios, r["rounds"]))
        size = f"B = {first['batch']}, T = {first['steps']}, H = {first['hidden']}"
        words = "one thread" if threads == 1 else f"{threads} threads"
        parts.append(f"Training step, {size}, float32, {words}:\n\n{table(head, rows, texts=2)}")
    return "\n\n".join(parts)


def markdown(content: Record) -> str:
    machine = content["environment"]
    rows = [(words, machine[key]) for key, words in ENVIRONMENT.items() if machine.get(key) is not None]
    return f"""# Cells against the same cells as loops

Measured by `{machine["command"]}`. A training step of one layer, the input as wide as h: forward, and backward from a
given gradient of the output to the input and all parameters. "The loop" is the cell written step by step in PyTorch
(`bench/cell_loops.py`): two products and pointwise operations a step, with autograd. "auto" is the module as it comes.
All ways of a cell have the same weights and input, give the same values and gradients (compared before, in
evaluation), and are called in turns; times are medians, ratios medians over rounds.

{tables(content["records"])}

![How many times as long each way takes as backend="auto"]({PLOT})

{table(("measured on", ""), rows, texts=2)}
"""


def plot(records: list[Record], device: str) -> Figure:
    """Bars of each cell: how many times as long the other ways take as "auto", with the quartiles over rounds."""
    groups = by(records, "threads")
    cells = list(dict.fromkeys(r["cell"] for r in records))
    figure = Figure(figsize=(8, 1.4 + 0.42 * len(cells)), layout="constrained")
    axes = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axis, (threads, own) in zip(axes, groups.items(), strict=True):
        for k, way in enumerate(_WAYS):
            there = [(cells.index(r["cell"]), r) for r in own if f"{way}_ratio" in r]
            places = [at + 0.27 * (k - 1) for at, _ in there]
            values = [r[f"{way}_ratio"] for _, r in there]
            spread = [[v - r[f"{way}_ratio_q1"] for (_, r), v in zip(there, values, strict=True)],
                      [r[f"{way}_ratio_q3"] - v for (_, r), v in zip(there, values, strict=True)]]  # fmt: skip
            axis.barh(
                places, values, 0.25, color=_COLOURS[way], label=_WAYS[way],
                xerr=spread, error_kw={"lw": 0.8, "ecolor": "#666666"},
            )  # fmt: skip
            for place, value, (_, r) in zip(places, values, there, strict=True):
                axis.text(r[f"{way}_ratio_q3"] * 1.05, place, f"{value:.1f}", va="center", fontsize=7)
        axis.axvline(1, color="#0072B2", lw=1.2)
        axis.set_xscale("log")
        axis.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axis.set_xlim(0.6, 2.2 * max(r.get("loop_ratio", 1) for r in records))
        axis.minorticks_off()
        axis.set_title("one thread" if threads == 1 else f"{threads} threads", fontsize=9)
    figure.supxlabel('time of a training step, in those of backend="auto"', fontsize=9)
    axes[0].set_yticks(range(len(cells)), cells)
    axes[0].invert_yaxis()
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=8)  # above and below are titles
    first = records[0]
    figure.suptitle(f"Cells, B = {first['batch']}, T = {first['steps']}, H = {first['hidden']}, {device}", fontsize=10)
    return figure
