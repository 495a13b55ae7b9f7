"""The report's plots, 8 inches wide to be read at 800 pixels."""

from collections import defaultdict
from collections.abc import Callable
from math import log2, nan
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator

from bench.measure import GROUPS
from bench.providers import REFERENCE
from bench.results import Record, Results
from bench.tables import by_shape, labels, speedup

matplotlib.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})

# Okabe and Ito's colours, which colour-blind readers tell apart; markers and dashes for print.
_STYLES = {
    REFERENCE: ("#000000", "o", "-"),
    "TritonLSTM-auto": ("#0072B2", "s", "--"),
    "TritonLSTM-torch": ("#56B4E9", "x", ":"),
    "TritonLSTM-eager": ("#009E73", "^", "-"),
    "TritonLSTM-triton": ("#D55E00", "D", "-"),
    "loop": ("#CC79A7", "v", "-"),
}
_OTHER = ("#999999", "*", "-")


def draw(results: Results, folder: Path) -> list[tuple[str, str]]:
    """Writes the plots that the results allow; their file names and what each shows."""
    device = results.environment["device"]
    wanted: list[tuple[str, str, Callable[[Results], Figure | None]]] = [
        ("throughput-hidden.png", "Throughput against hidden size", lambda r: throughput(r, "hidden", "hidden size H")),
        ("throughput-steps.png", "Throughput against time steps", lambda r: throughput(r, "steps", "time steps T")),
        ("speedup.png", f"Speed relative to {REFERENCE}", speedups),
        ("memory.png", "Memory of a training step", memory),
    ]
    made = []
    for name, title, plot in wanted:
        figure = plot(results)
        if figure is None:
            (folder / name).unlink(missing_ok=True)  # one of an earlier run would be taken for this one's
            continue
        figure.suptitle(f"{title}, {device}", fontsize=11)
        figure.savefig(folder / name, dpi=150)
        made.append((name, title))
    return made


def _figure(height: float) -> Figure:
    return Figure(figsize=(8, height), layout="constrained")


def throughput(results: Results, axis: str, axis_label: str) -> Figure | None:
    """Time steps times batch rows a second, along `axis`: of the shapes that differ in nothing else."""
    groups = {g: _longest_series(results.group(g), axis) for g in ("forward", "training step")}
    groups = {g: series for g, series in groups.items() if len({r[axis] for r in series}) > 1}
    if not groups:
        return None
    figure = _figure(3.8)
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for panel, (group, series) in zip(panels, groups.items(), strict=True):
        for provider, label in labels(series).items():
            own = [r for r in series if r["provider"] == provider]
            points = sorted((r[axis], r["batch"] * r["steps"] / r["median_s"]) for r in own)
            colour, marker, dashes = _STYLES.get(provider, _OTHER)
            panel.plot(*zip(*points, strict=True), color=colour, marker=marker, ls=dashes, ms=5, label=label)
        values = sorted({r[axis] for r in series})
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(values, [str(v) for v in values])
        # Half a decade may be all there is: a tick at each power of ten alone would be one or none.
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(EngFormatter(sep=""))
        panel.minorticks_off()
        panel.set_title(f"{group} ({_rest(series[0], axis)})", fontsize=9)
        panel.set_xlabel(axis_label)
    panels[0].set_ylabel("time steps × batch rows / s")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _longest_series(records: list[Record], axis: str) -> list[Record]:
    """The records that differ in `axis` and provider alone: of such sets the one with most values of `axis`."""
    sets: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    fields = [f for f in ("batch", "steps", "hidden", "layers", "directions", "dtype") if f != axis]
    for r in records:
        sets[tuple(r[f] for f in fields)].append(r)
    return max(sets.values(), key=lambda s: (len({r[axis] for r in s}), s[0]["batch"] * s[0]["steps"]), default=[])


def _rest(record: Record, axis: str) -> str:
    skipped = {"hidden": "H", "steps": "T"}[axis]
    return " ".join(part for part in record["shape"].split("-") if part[0] != skipped)


def speedups(results: Results) -> Figure | None:
    """A map of how many times as fast as `nn.LSTM` each provider is on each shape."""
    groups = {g: by_shape(results.group(g)) for g in GROUPS}
    groups = {g: rows for g, rows in groups.items() if any(REFERENCE in row and len(row) > 1 for row in rows.values())}
    if not groups:
        return None
    heights = [len(rows) for rows in groups.values()]
    figure = _figure(1.6 + 0.28 * sum(heights) + 0.55 * len(groups))
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (group, rows) in zip(panels, groups.items(), strict=True):
        names = {p: label for p, label in labels(results.group(group)).items() if p != REFERENCE}
        image = _speedup_map(panel, rows, names)
        panel.set_ylabel(group)
    figure.align_ylabels(panels)
    bar = figure.colorbar(image, ax=list(panels), location="bottom", shrink=0.6, aspect=40, pad=0.02)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼ or less", "½", "1", "2", "4 or more"])
    bar.set_label(f"times as fast as {REFERENCE}")
    return figure


def _speedup_map(panel: Axes, rows: dict[str, dict[str, Record]], names: dict[str, str]) -> Any:
    values = [[speedup(row, p) for p in names] for row in rows.values()]
    logs = [[nan if v is None else log2(v) for v in line] for line in values]
    image = panel.imshow(logs, cmap="PuOr", norm=TwoSlopeNorm(0, -2, 2), aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            dark = value is not None and abs(log2(value)) > 1.4
            text = "–" if value is None else f"{value:.2f}"
            panel.text(x, y, text, ha="center", va="center", color="white" if dark else "black", fontsize=8)
    panel.set_xticks(range(len(names)), list(names.values()), fontsize=8)
    panel.set_yticks(range(len(rows)), list(rows), fontsize=8)
    panel.tick_params(length=0)
    panel.grid(False)
    return image


def memory(results: Results) -> Figure | None:
    """Bars of what is kept for backward and of the peak, a panel for each shape."""
    shapes = by_shape(results.group("memory"))
    if not shapes:
        return None
    bars = max(len(row) for row in shapes.values())
    figure = _figure(0.9 + len(shapes) * (0.6 + 0.4 * bars))
    panels = figure.subplots(len(shapes), 1, squeeze=False)[:, 0]
    for panel, (shape, row) in zip(panels, shapes.items(), strict=True):
        records = list(row.values())
        kind = records[0]["peak_kind"]
        series = (
            ("kept_bytes", "kept for backward, beyond input, weights and output", "#0072B2", -0.2),
            ("peak_bytes", f"peak {kind}, above weights and data", "#E69F00", 0.2),
        )
        for key, name, colour, offset in series:
            sizes = [r[key] / 2**20 for r in records]
            drawn = panel.barh([k + offset for k in range(len(records))], sizes, 0.38, color=colour, label=name)
            panel.bar_label(drawn, [f"{s:.1f}" for s in sizes], padding=3, fontsize=8)
        panel.set_yticks(range(len(records)), [r["label"] for r in records], fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.12)
        panel.set_title(shape.replace("-", " "), fontsize=9)
        panel.grid(False, axis="y")
    panels[-1].set_xlabel("MiB")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure
