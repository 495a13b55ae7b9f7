"""The report of `python -m bench.roofline`: roofline.csv, roofline.md and two plots."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from bench.files import replace, write_atomically
from bench.results import Record
from bench.tables import table
from lstm_triton.gpu import gpus
from lstm_triton.gpu.model import LAUNCH_US

CSV, TEXT, PLOT, PLOT_GPUS = "roofline.csv", "roofline.md", "roofline.png", "roofline-gpus.png"
PASSES = ("forward", "training step")
BATCH = 16  # that of the floors, of the table and of the plot of several GPUs

# Okabe and Ito's colours.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_FLOORS = {
    "floor: barrier": (0, (6, 2)),
    "floor: L2": (0, (3, 1, 1, 1)),
    "floor: on chip": (0, (1, 1)),
    "floor: arithmetic": (0, (4, 2, 1, 2, 1, 2)),
}
# Marks of what was measured are large and hollow; what is predicted has lines, with a dot where there is a kernel.
_STRATEGIES = {"persistent": "s", "cooperative": "o", "step": "^"}
_PUBLISHED = {"nn.LSTM (cuDNN)": "*", "FlashRNN, fused": "P", "Haste": "X"}
_MEASURED = {"nn.LSTM": "D", "TritonLSTM": "v"}


def write(rows: list[Record], names: Sequence[str], command: str, folder: Path) -> list[Path]:
    """Writes all files; their paths.

    Args:
        rows: fields of `bench.roofline.Point`.
        names: of the GPUs, the one to be drawn with floors first.
        command: that made the rows.
        folder: where they go.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_atomically(folder / CSV, text.getvalue())
    write_atomically(folder / TEXT, markdown(rows, names, command))
    for name, figure in ((PLOT, draw(rows, names[0])), (PLOT_GPUS, draw_gpus(rows, names))):
        replace(folder / name, lambda part, figure=figure: figure.savefig(part, dpi=150, format="png"))  # type: ignore[misc]
    return [folder / name for name in (CSV, TEXT, PLOT, PLOT_GPUS)]


def markdown(rows: list[Record], names: Sequence[str], command: str) -> str:
    """The whole report."""
    dtype = next(r["dtype"] for r in rows)
    parts = [
        "# What a time step is predicted to take",
        f"All of it is drawn from `{CSV}`, which `{command}` writes. **What is called predicted was not measured**: "
        "it is what `lstm_triton.gpu.model` adds up from latencies and bandwidths that others have measured; "
        "`python -m lstm_triton plan` shows the terms for one size. A training step is forward and backward. "
        f"One layer, one direction, {dtype}, T = {rows[0]['steps']:,}, the input as wide as h; products with the input "
        "and gradients of weights, which are GEMMs before and after the loop, are in the times.",
        f"![predicted time of a time step against hidden size]({PLOT})",
        "Lines that aren't dashed are predicted, with the strategy's mark; dashed ones are floors, of kernels that "
        f"divide the hidden units over all multiprocessors, at B = {BATCH}: one barrier a step, reading what the "
        "others found from L2, reading the weights from shared memory, all operations on all tensor cores. Where one "
        f"program has all units (`persistent`) there is no barrier. By `step` it is mostly {LAUNCH_US} µs a launch, "
        "which is assumed of a launcher in Python.",
        f"![the same on several GPUs]({PLOT_GPUS})",
        f"## Predicted, µs a time step, B = {BATCH}",
        _predicted(rows, names),
        "## Published, and predicted for the same",
        "How far the model is off, where others have measured.",
        _published(rows),
        "## Measured",
        _measured(rows),
    ]
    return "\n\n".join(parts) + "\n"


def _predicted(rows: list[Record], names: Sequence[str]) -> str:
    sizes = sorted({r["hidden"] for r in rows if _is_plan(r)})

    def cell(name: str, hidden: int) -> str:
        found = [r for r in rows if _is_plan(r) and (r["gpu"], r["batch"], r["hidden"]) == (name, BATCH, hidden)]
        return " / ".join(f"{r['predicted_us']:.3g}" for r in found) + f" {found[0]['what']}"

    head = ("H", *(f"{name}, forward / training step" for name in names))
    return table(head, [(str(h), *(cell(name, h) for name in names)) for h in sizes])


def _published(rows: list[Record]) -> str:
    lines = []
    for r in rows:
        if r["published_us"] is None:
            continue
        same = next(p for p in rows if _key(p) == _key(r) and p["predicted_us"] is not None)
        size = f"{r['gpu']}, B={r['batch']}, T={r['steps']}, H={r['hidden']}, {r['dtype']}"
        ratio = f"{same['predicted_us'] / r['published_us']:.2f}"
        us = f"{r['published_us']:.3g}", f"{same['predicted_us']:.3g}"
        lines.append((r["what"], size, r["run"], *us, ratio, r["source"]))
    head = ("", "size", "pass", "published, µs", "predicted, µs", "predicted / published", "source")
    return table(head, lines, 3)


def _measured(rows: list[Record]) -> str:
    found = [r for r in rows if r["measured_us"] is not None]
    if not found:
        return (
            "Nothing yet: `python -m bench.gpu` on a machine with a GPU of the table measures, and this report has it."
        )
    head = ("", "GPU", "dtype", "B", "T", "H", "pass", "measured, µs")
    keys = ("what", "gpu", "dtype", "batch", "steps", "hidden", "run")
    return table(head, [(*(r[k] for k in keys), f"{r['measured_us']:.3g}") for r in found], 3)


def _key(r: Record) -> tuple[Any, ...]:
    return tuple(r[k] for k in ("gpu", "dtype", "batch", "hidden", "run", "what"))


def _is_plan(r: Record) -> bool:
    return r["what"] in _STRATEGIES


def draw(rows: list[Record], name: str) -> Figure:
    """One GPU: predictions for each B, floors, published and measured points."""
    figure, panels = _figure()
    own = [r for r in rows if r["gpu"] == name]
    batches = sorted({r["batch"] for r in own if _is_plan(r)})
    colours = dict(zip(batches, _COLOURS, strict=False))
    for panel, run in zip(panels, PASSES, strict=True):
        shown = [r for r in own if r["run"] == run]
        for floor, dashes in _FLOORS.items():
            _line(panel, [r for r in shown if r["what"] == floor], color="#777777", ls=dashes, lw=1)
        for batch, colour in colours.items():
            _plans(panel, [r for r in shown if r["batch"] == batch], colour)
        for r in shown:
            if r["published_us"] is not None:
                _mark(panel, r["hidden"], r["published_us"], _PUBLISHED[r["what"]])
            if r["measured_us"] is not None:
                mark = next(m for start, m in _MEASURED.items() if r["what"].startswith(start))
                _mark(panel, r["hidden"], r["measured_us"], mark, mec=colours.get(r["batch"], "#000000"))
        _finish(panel, run)
    panels[0].set_ylim(bottom=0.1)  # far below it no floor matters
    panels[0].set_ylabel("µs a time step")
    keys = [Line2D([], [], color=c, lw=1.6, label=f"predicted, B = {b}") for b, c in colours.items()]
    keys += _strategy_keys()
    keys += [Line2D([], [], color="#777777", ls=d, lw=1, label=f"{n}, B = {BATCH}") for n, d in _FLOORS.items()]
    published = dict.fromkeys((r["what"], r["dtype"]) for r in own if r["published_us"] is not None)
    keys += [_point_key(_PUBLISHED[n], f"published: {n}, {dtype}, B = {BATCH}") for n, dtype in published]
    measured = {m for r in own if r["measured_us"] is not None for s, m in _MEASURED.items() if r["what"].startswith(s)}
    keys += [_point_key(m, f"measured: {n}") for n, m in _MEASURED.items() if m in measured]
    _legend(figure, keys)
    dtype = next(r["dtype"] for r in own if _is_plan(r))
    figure.suptitle(f"Predicted time of a time step, {name.upper()}, {dtype}, one layer", fontsize=12)
    return figure


def draw_gpus(rows: list[Record], names: Sequence[str]) -> Figure:
    """Several GPUs at one B."""
    figure, panels = _figure()
    colours = dict(zip(names, _COLOURS, strict=False))
    for panel, run in zip(panels, PASSES, strict=True):
        for name, colour in colours.items():
            _plans(panel, [r for r in rows if (r["gpu"], r["batch"], r["run"]) == (name, BATCH, run)], colour)
        _finish(panel, run)
    panels[0].set_ylabel("µs a time step")
    keys = [Line2D([], [], color=c, lw=1.6, label=f"{n} ({gpus.named(n).target})") for n, c in colours.items()]
    _legend(figure, [*keys, *_strategy_keys()])
    dtype = next(r["dtype"] for r in rows if _is_plan(r))
    figure.suptitle(f"Predicted time of a time step, B = {BATCH}, {dtype}, one layer", fontsize=12)
    return figure


def _figure() -> tuple[Figure, Any]:
    """Two panels, 9 inches wide to be read at 900 pixels."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    return figure, figure.subplots(1, 2, sharey=True)


def _plans(panel: Axes, rows: list[Record], colour: str) -> None:
    plans = [r for r in rows if _is_plan(r)]
    _line(panel, plans, color=colour, lw=1.6)
    for strategy, mark in _STRATEGIES.items():
        _line(panel, [r for r in plans if r["what"] == strategy], color=colour, ls="", marker=mark, ms=4)


def _line(panel: Axes, rows: list[Record], **style: Any) -> None:
    points = sorted((r["hidden"], r["predicted_us"]) for r in rows)
    panel.plot([h for h, _ in points], [us for _, us in points], **style)


def _mark(panel: Axes, hidden: int, us: float, mark: str, mec: str = "#000000") -> None:
    panel.plot(hidden, us, ls="", marker=mark, ms=10, mfc="none", mec=mec, mew=1.4, zorder=5)


def _strategy_keys() -> list[Line2D]:
    return [Line2D([], [], color="#555555", ls="", marker=m, ms=5, label=f"by {n}") for n, m in _STRATEGIES.items()]


def _point_key(mark: str, text: str) -> Line2D:
    return Line2D([], [], ls="", marker=mark, ms=9, mfc="none", mec="#000000", mew=1.4, label=text)


def _legend(figure: Figure, keys: list[Line2D]) -> None:
    figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _finish(panel: Axes, run: str) -> None:
    ticks = (32, 64, 128, 256, 512, 1024, 2048, 4096)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(ticks, [str(h) for h in ticks], fontsize=9)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    panel.minorticks_off()
    panel.set_xlabel("hidden size H")
    panel.set_title(run, fontsize=10)
    panel.grid(alpha=0.3)
    panel.set_axisbelow(True)
