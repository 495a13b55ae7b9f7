"""The report of `python -m bench.cpu`, drawn from cpu.json: cpu.md and two plots for each backend."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench import results
from bench.files import replace, write_atomically
from bench.providers import REFERENCE
from bench.results import Record
from bench.tables import ENVIRONMENT, table

GROUPS = ("inference", "training step")
JSON, TEXT = "cpu.json", "cpu.md"
SMALL = 64  # hidden units, where training on a CPU is most common
NOISY = 0.1  # of the ratio: a wider interquartile range is pointed out
KEYS = 7  # of a legend in a row

# Okabe and Ito's colours and markers of their own, in the order of batches.
_STYLES = (("#0072B2", "o"), ("#E69F00", "s"), ("#009E73", "^"), ("#D55E00", "D"), ("#CC79A7", "v"), ("#56B4E9", "P"))
_DRAWN_BATCHES = (1, 32, 128)  # of the times: more would be too many lines


def read(folder: Path) -> Record:
    """What cpu.json says.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is not one.
    """
    return results.read(folder / JSON, ("environment", "rates", "records", "not_measured"), "python -m bench.cpu")


def write(content: Record, folder: Path) -> list[Path]:
    """Writes cpu.md and the plots, and removes plots of backends that were not measured; the files written."""
    made: dict[Path, None] = {}
    for backend, records in by(content["records"], "backend").items():
        for what, draw in (("ratio", ratios), ("time", times)):
            path = folder / f"cpu-{what}-{backend}.png"
            figure = draw(records, backend, content["environment"]["device"])
            replace(path, lambda part, f=figure: f.savefig(part, dpi=150, format="png"))  # type: ignore[misc]
            made[path] = None
    for old in {*folder.glob("cpu-ratio-*.png"), *folder.glob("cpu-time-*.png")} - set(made):
        old.unlink()
    write_atomically(folder / TEXT, markdown(content))
    return [folder / JSON, folder / TEXT, *made]


def by(records: Iterable[Record], *keys: str) -> dict[Any, list[Record]]:
    """The records by the value of a key, or by the tuple of several keys' values, in their order."""
    found: dict[Any, list[Record]] = {}
    for r in records:
        found.setdefault(r[keys[0]] if len(keys) == 1 else tuple(r[k] for k in keys), []).append(r)
    return found


def values(records: Iterable[Record], key: str) -> list[Any]:
    return sorted({r[key] for r in records})


def threads_text(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


# The text


def markdown(content: Record) -> str:
    """The whole report."""
    environment = content["environment"]
    parts = [
        f"# {REFERENCE} and TritonLSTM on {environment['device']}",
        f"Drawn from `{JSON}`, which has all numbers, by `python -m bench.cpu --draw`. {_METHOD}",
        table(("", ""), [(name, environment[key]) for key, name in ENVIRONMENT.items() if environment.get(key)], 2),
        "## What the machine can do",
        _rates(content["rates"]),
        _FLOOR,
    ]
    for backend, records in by(content["records"], "backend").items():
        parts += [f'## Backend "{backend}"', summary(records), noise(records)]
        parts += [f"![ratio against hidden size](cpu-ratio-{backend}.png)"]
        parts += [f"![time of a step against hidden size](cpu-time-{backend}.png)"]
        for threads, own in by(records, "threads").items():
            parts += [f"### {threads_text(threads).capitalize()}: ratio in inference / training", _ratios(own)]
        parts += ["### Backend that ran", _chosen(records)]
    if content["not_measured"]:
        rows = [(x["name"], " ".join(x["why"].split()).replace("|", "\\|")) for x in content["not_measured"]]
        parts += ["## Not measured", table(("case", "why"), rows, 2)]
    return "\n\n".join(part for part in parts if part) + "\n"


_METHOD = (
    "One layer, float32, the input as wide as h; B is the batch, T the time steps, H the hidden size. *Inference* is "
    "forward without a graph, *training* is a training step: forward and backward with the gradients of the input and "
    f"of all parameters. `{REFERENCE}` and `TritonLSTM` share weights and input and are called in turns. **The ratio "
    f"is the time of `{REFERENCE}` over that of `TritonLSTM`, above 1 `TritonLSTM` is faster**: the median over pairs "
    "of calls. Values and gradients are compared before. A case whose pairs differ much (below) is measured twice, of "
    "which the calmer counts."
)

_FLOOR = (
    "Rates: the fastest of several float32 `torch.mm`, and of `copy_` and `add` on tensors larger than the caches "
    "(bytes read and written), several times in the run. The floor of a time step is *derived* from these measured "
    "rates: the longer of operations / product rate and bytes / bandwidth. Operations: 16 B H² in inference (the "
    "products of input and of h with their 4H × H weights), three times that in training. Bytes, 4 for each number: "
    "inference reads x and writes y, 2 B H; training also writes and reads back the gates and c that backward needs "
    "(5 B H), reads x, y and the gradient of y and writes that of x, 16 B H together; of the 8 H² + 8 H weights and "
    "biases a T-th, in training thrice (read, read, gradient written). The bandwidth is the main memory's: where that "
    "term decides (small B, few steps), data that stays in the caches can be faster."
)


def _rates(rates: dict[str, Any]) -> str:
    rows = [(n, f"{r['flops'] / 1e9:.0f}", r["product"], f"{r['bandwidth'] / 1e9:.1f}") for n, r in rates.items()]
    return table(("threads", "products, GFLOP/s", "fastest", "memory, GB/s"), rows)


def summaries(content: Record) -> str:
    """Every backend's summary, for a terminal."""
    found = by(content["records"], "backend")
    parts = [f'TritonLSTM(backend="{name}"), times as fast as {REFERENCE}\n\n{summary(r)}' for name, r in found.items()]
    parts += [noise(records) for records in found.values()]
    parts += [f"not measured: {x['name']}: {x['why']}" for x in content["not_measured"]]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(records: Sequence[Record]) -> str:
    """Geometric means and lowest ratios of the sets that matter."""
    sets: list[tuple[str, Callable[[Record], bool]]] = [("all", lambda r: True)]
    sets += [(group, lambda r, g=group: r["group"] == g) for group in GROUPS]  # type: ignore[misc]
    sets += [
        (threads_text(n), lambda r, n=n: r["threads"] == n)  # type: ignore[misc]
        for n in values(records, "threads")
    ]
    sets += [(f"training step, H ≤ {SMALL}", lambda r: r["group"] == "training step" and r["hidden"] <= SMALL)]
    rows = []
    for name, belongs in sets:
        if own := [r for r in records if belongs(r)]:
            mean, low = statistics.geometric_mean(r["ratio"] for r in own), min(own, key=lambda r: r["ratio"])
            rows.append((name, len(own), f"{mean:.3f}", ratio_text(low, 3), case_text(low)))
    return table(("cases", "number", "geometric mean", "lowest ratio", "where"), rows)


def case_text(r: Record) -> str:
    return f"{r['shape']}, {r['group']}, {threads_text(r['threads'])}"


def spread(r: Record) -> float:
    """The interquartile range of the ratio over pairs, relative to their median."""
    return (r["ratio_q3"] - r["ratio_q1"]) / r["ratio"]


def ratio_text(r: Record, digits: int) -> str:
    return f"{r['ratio']:.{digits}f}{'~' if spread(r) > NOISY else ''}"


def noise(records: Sequence[Record]) -> str:
    """How far the ratios of a case's pairs are apart, with a warning where that is far."""
    noisy = sorted((r for r in records if spread(r) > NOISY), key=spread, reverse=True)
    typical = f"The interquartile range of a case's ratio is {statistics.median(map(spread, records)):.1%} (median)."
    if not noisy:
        return f"{typical} It is nowhere above {NOISY:.0%}."
    named = "; ".join(f"{case_text(r)} ({spread(r):.0%})" for r in noisy[:8])
    rest = f"; and {len(noisy) - 8} more" if len(noisy) > 8 else ""
    return (
        f"{typical} **Warning: it is above {NOISY:.0%} in {len(noisy)} of {len(records)} cases**, marked ~ in the "
        f"tables, whose ratios are less sure: {named}{rest}."
    )


def _ratios(records: Sequence[Record]) -> str:
    return grid(records, lambda r: ratio_text(r, 2))


def _chosen(records: Sequence[Record]) -> str:
    if len(found := values(records, "chosen")) == 1:
        return f"`{found[0]}` in every case."
    parts = []
    for threads, own in by(records, "threads").items():
        parts += [f"{threads_text(threads).capitalize()}, inference / training:", grid(own, lambda r: r["chosen"])]
    return "\n\n".join(parts)


def grid(records: Sequence[Record], cell: Callable[[Record], str]) -> str:
    """A table of B and T by H with `cell` of each group's record, which it holds one of at most."""
    found = {(r["batch"], r["steps"], r["hidden"], r["group"]): r for r in records}
    rows = []
    for b, t in sorted(by(records, "batch", "steps")):
        row = [b, t]
        for h in values(records, "hidden"):
            cells = [cell(found[b, t, h, g]) if (b, t, h, g) in found else "–" for g in GROUPS]
            row.append(" / ".join(cells) if set(cells) != {"–"} else "–")
        rows.append(row)
    return table(("B", "T", *(f"H = {h}" for h in values(records, "hidden"))), rows, 0)


# The plots, 9 inches wide to be read at 900 pixels


def _panels(records: Sequence[Record]) -> tuple[Figure, list[tuple[Any, list[Record]]]]:
    """A figure with a row for each group and a column for each number of threads, and what each panel shows."""
    groups, threads = [g for g in GROUPS if by(records, "group").get(g)], values(records, "threads")
    figure = Figure(figsize=(9, 1.6 + 3 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), len(threads), sharex=True, sharey="row", squeeze=False)
    found = []
    for row, group in zip(panels, groups, strict=True):
        for panel, count in zip(row, threads, strict=True):
            panel.set_title(f"{group}, {threads_text(count)}", fontsize=10)
            panel.set_xscale("log", base=2)
            panel.set_xticks(values(records, "hidden"), [str(h) for h in values(records, "hidden")])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            found.append((panel, [r for r in records if (r["group"], r["threads"]) == (group, count)]))
    for panel in panels[-1]:
        panel.set_xlabel("hidden size H")
    return figure, found


def _styles(records: Sequence[Record]) -> dict[int, tuple[str, str]]:
    """Colour and marker of each B."""
    batches = values(records, "batch")
    return dict(zip(batches, _STYLES * len(batches), strict=False))


def _line(records: Iterable[Record], value: Callable[[Record], float]) -> tuple[list[int], list[float]]:
    points = sorted((r["hidden"], value(r)) for r in records)
    return [h for h, _ in points], [v for _, v in points]


def ratios(records: Sequence[Record], backend: str, device: str) -> Figure:
    """The ratio against H, a line for each B and T; hollow where "auto" took PyTorch's operator."""
    figure, panels = _panels(records)
    batches, steps = values(records, "batch"), values(records, "steps")
    styles = _styles(records)
    for panel, own in panels:
        panel.axhline(1, color="black", lw=1.2)
        for (b, t), line in by(own, "batch", "steps").items():
            (colour, marker), long = styles[b], t == steps[-1]
            x, y = _line(line, lambda r: r["ratio"])
            panel.plot(x, y, color=colour, lw=1.6 if long else 0.9, ls="-" if long else "--")
            for ran, points in by(line, "chosen").items():
                fill = "white" if ran == "torch" else colour
                x, y = _line(points, lambda r: r["ratio"])
                panel.plot(x, y, marker, color=colour, ms=5 if long else 3.5, mfc=fill)
        panel.set_yscale("log", base=2)
    found = [r["ratio"] for r in records]
    low, high = min(0.9, *found), max(1.1, *found)
    low, high = low * (low / high) ** 0.05, high * (high / low) ** 0.05
    near, far = (0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 1.75, 2), [2.0**k * x for k in range(-9, 9) for x in (1, 1.5)]
    ticks = [t for t in (near if high / low < 2.5 else far) if low <= t <= high]
    for panel, _ in panels:
        panel.set_ylim(low, high)
        panel.set_yticks(ticks, [f"{t:.3g}" for t in ticks])
        panel.minorticks_off()
        if panel.get_subplotspec().is_first_col():
            panel.set_ylabel(f"time of {REFERENCE} / time of ours")
    keys = [Line2D([], [], color=styles[b][0], marker=styles[b][1], ms=5, label=f"B = {b}") for b in batches]
    for t in reversed(steps):
        dashes, width = ("-", 1.6) if t == steps[-1] else ("--", 0.9)
        keys.append(Line2D([], [], color="gray", ls=dashes, lw=width, label=f"T = {t}"))
    if backend == "auto":
        keys.append(Line2D([], [], color="gray", marker="o", ls="", mfc="white", label="PyTorch's operator ran"))
    figure.legend(handles=keys, loc="outside lower center", ncols=min(len(keys), KEYS), frameon=False, fontsize=9)
    figure.suptitle(f'TritonLSTM(backend="{backend}"), times as fast as {REFERENCE}, {device}', fontsize=12)
    return figure


def times(records: Sequence[Record], backend: str, device: str) -> Figure:
    """Microseconds of a time step against H, at the largest T: `nn.LSTM`, ours and the floor."""
    steps = values(records, "steps")[-1]
    shown = [r for r in records if r["steps"] == steps]
    if chosen := [r for r in shown if r["batch"] in _DRAWN_BATCHES]:
        shown = chosen
    figure, panels = _panels(shown)
    batches, styles = values(shown, "batch"), _styles(records)
    sides: tuple[tuple[str, dict[str, Any], Callable[[Record], float]], ...] = (
        (REFERENCE, {"marker": "o", "ms": 7, "mfc": "none", "ls": "-"}, lambda r: r["reference_s"] / steps),
        (f"TritonLSTM ({backend})", {"marker": "D", "ms": 3, "ls": "--"}, lambda r: r["ours_s"] / steps),
        ("floor (derived from measured rates)", {"marker": ".", "ms": 3, "ls": ":"}, lambda r: r["floor_s_a_step"]),
    )
    for panel, own in panels:
        for b, line in by(own, "batch").items():
            for _, style, seconds in sides:
                x, y = _line(line, seconds)
                panel.plot(x, [1e6 * v for v in y], color=styles[b][0], lw=1.3, **style)
        panel.set_yscale("log")
        if panel.get_subplotspec().is_first_col():
            panel.set_ylabel("µs a time step")
    keys = [Line2D([], [], color=styles[b][0], lw=3, label=f"B = {b}") for b in batches]
    keys += [Line2D([], [], color="gray", label=name, **style) for name, style, _ in sides]
    figure.legend(handles=keys, loc="outside lower center", ncols=min(len(keys), KEYS), frameon=False, fontsize=9)
    figure.suptitle(f"Time of a step at T = {steps}, {device}", fontsize=12)
    return figure
