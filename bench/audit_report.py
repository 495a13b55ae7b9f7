"""The report of `python -m bench.audit`: README.md and audit.png, beside audit.csv."""

import datetime
import importlib
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.environment import commit
from bench.files import replace, write_atomically
from bench.results import Record
from bench.tables import table

CSV, TEXT, PLOT = "audit.csv", "README.md", "audit.png"
# The most registers that a thread can have, of 32 bits; AMD's with the accumulators.
REGISTERS = {"NVIDIA": 255, "AMD": 512}
_DTYPE, _BATCH = "fp16", 32  # of the plot
_MARKERS = {"persistent": "o", "cooperative": "^", "step": "s"}
_COLOURS = dict(
    zip(
        ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942"),
        ("#0072B2", "#56B4E9", "#009E73", "#000000", "#CC79A7", "#999999", "#D55E00", "#E69F00"),
        strict=True,
    )
)  # Okabe and Ito's

matplotlib.rcParams.update({"font.size": 9, "axes.axisbelow": True})


def environment(command: str) -> Record:
    """The compilers, for the report to carry along."""
    nvidia = importlib.import_module("triton").knobs.nvidia
    return {
        "Triton": importlib.import_module("triton").__version__,
        "ptxas": _release(nvidia.ptxas.path),
        "ptxas, sm_100 and newer": _release(nvidia.ptxas_blackwell.path),
        "assembler for AMD": "LLVM, in Triton",
        "PyTorch": importlib.import_module("torch").__version__,
        "Python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }


def _release(tool: str) -> str:
    """The last word of what `tool --version` prints before its build: "V12.8.93"."""
    text = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    return next(line for line in text.splitlines() if "release" in line).rsplit(" ", 1)[-1]


def write(records: Sequence[Record], environment: Record, folder: Path) -> list[Path]:
    """Writes README.md and audit.png; the files written."""
    drawn = any(_shown(r) for r in records)
    if drawn:
        figure = draw(records)
        replace(folder / PLOT, lambda part: figure.savefig(part, dpi=150, format="png"))
    else:
        (folder / PLOT).unlink(missing_ok=True)  # one of an earlier run would be taken for this one's
    write_atomically(folder / TEXT, markdown(records, environment, drawn))
    return [folder / name for name in (TEXT, *([PLOT] if drawn else []))]


def broken(records: Iterable[Record]) -> list[tuple[str, str, str, str]]:
    """Case, target, kernel and rule of each violation."""
    return [(r["case"], r["target"], r["kernel"] or "–", why) for r in records for why in r["violations"]]


def summary(records: Sequence[Record]) -> str:
    """For a terminal."""
    lines = [f"{target} {case}: {kernel} {why}" for case, target, kernel, why in broken(records)]
    return "\n".join([*lines, _count(records)])


def _count(records: Sequence[Record]) -> str:
    cases, targets = {r["case"] for r in records}, {r["target"] for r in records}
    pairs = Counter(r["strategy"] for r in {(r["case"], r["target"]): r for r in records}.values())
    strategies = ", ".join(f"{n} {name}" for name, n in pairs.most_common())
    found = len(broken(records))
    return (
        f"{len(cases)} cases on {len(targets)} targets ({strategies}): {len(records)} kernels, "
        f"{found or 'no'} violation{'s' if found != 1 else ''}"
    )


# The text


def markdown(records: Sequence[Record], environment: Record, drawn: bool) -> str:
    """The whole report."""
    parts = [
        "# The kernels' machine code",
        _METHOD,
        table(("", ""), [(name, value) for name, value in environment.items() if value], 2),
        f"**{_count(records)}.** {_RULES}",
    ]
    if found := broken(records):
        rows = [(*row[:3], row[3].replace("|", "\\|")) for row in found]
        parts += ["## Violations", table(("case", "target", "kernel", "what"), rows, 4)]
    if drawn:
        parts += [f"![registers and shared memory against H]({PLOT})"]
    others = [r for r in records if r["cell"] != "lstm" or r["form"] == "zoneout"]
    if len(others) < len(records):
        parts += ["## What serves what", _SERVED]
    for dtype in dict.fromkeys(r["dtype"] for r in records):
        for name, passes in (("training", ("forward", "backward")), ("inference", ("inference",))):
            own = [r for r in records if r["dtype"] == dtype and r["pass"] in passes and not r["form"]]
            own = [r for r in own if r["cell"] == "lstm"]
            if own:
                parts += [f"### {dtype}, {name}", _strategies(own)]
    if others:
        parts += ["### Other cells, and zoneout", _OTHERS, _of_cells(others)]
    return "\n\n".join(parts) + "\n"


_METHOD = (
    "**Compiled for these GPUs, not run on them.** Each case is a pass over a layer of B batch rows and H hidden "
    "units: inference; training's forward, which keeps gates; backward; rebuild, which makes kept values anew; or "
    "drop, dropout between layers. What the library would launch for it on a GPU is compiled to that GPU's machine "
    f"code, with the launch's own types, constants and options, and disassembled. All numbers are in `{CSV}`, a row "
    "for each kernel. What is assumed, not taken from the library: products of float32 (*tf32*) are made as TF32 on "
    "NVIDIA's GPUs and in full on AMD's."
)

_RULES = (
    "Checked of each kernel: no registers spill; shared memory is within the chip's limit and, of a strategy's own "
    "kernels, no more than its plan says; kernels that run a whole sequence load no weights in their loop over time; "
    "in fp16 and bf16 products are on tensor cores (but for those that are row by row, `matvec`); no atomic additions "
    "of floats; programs that wait for each other fit on the GPU at a time."
)

_SERVED = (
    "`step` launches a kernel each time step; `persistent` runs a sequence in one launch, where one multiprocessor "
    "holds the weights; `cooperative` does so with weights spread over many. Behind it: batch rows × hidden units of a "
    "program. Cases with a form (two directions, ragged, dropout, projection) are in the file."
)


def _strategies(records: Sequence[Record]) -> str:
    """Rows by B and H, columns by target."""
    targets = [t for t in _COLOURS if any(r["target"] == t for r in records)]
    cells = {(r["B"], r["H"], r["target"]): f"{r['strategy']} {r['block_b']}×{r['block_h']}" for r in records}
    shapes = sorted({(r["B"], r["H"]) for r in records})
    rows = [(b, h, *(cells.get((b, h, t), "–") for t in targets)) for b, h in shapes]
    return table(("B", "H", *targets), rows, 0)


_OTHERS = (
    "Behind the strategy, rows and units: the most registers of a thread, and KiB of shared memory of a program, of "
    "that pass's kernels. A case may name a strategy; where that has no room, what is chosen runs."
)


def _of_cells(records: Sequence[Record]) -> str:
    """Rows by case, columns by target."""
    targets = [t for t in _COLOURS if any(r["target"] == t for r in records)]
    most: dict[tuple[str, str], Record] = {}
    for r in records:
        known = most.setdefault((r["case"], r["target"]), r)
        if r.get("registers", 0) > known.get("registers", 0):
            most[r["case"], r["target"]] = r
    rows = [
        (case, *(_short(most[case, t]) if (case, t) in most else "–" for t in targets))
        for case in dict.fromkeys(r["case"] for r in records)
    ]
    return table(("case", *targets), rows, 1)


def _short(r: Record) -> str:
    used = f", {r['registers']}, {r['shared_bytes'] / 1024:.0f}" if "registers" in r else ""
    return f"{r['strategy']} {r['block_b']}×{r['block_h']}{used}"


# The plot, 9 inches wide to be read at 900 pixels


def _shown(r: Record) -> bool:
    passes = r["pass"] in ("forward", "backward") and not r["form"] and r["cell"] == "lstm"
    return bool(passes and "registers" in r and r["own"] and r["dtype"] == _DTYPE and r["B"] == _BATCH)


def draw(records: Sequence[Record]) -> Figure:
    """Registers and shared memory of training's kernels against H, with what the chips have."""
    shown = [r for r in records if _shown(r)]
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="col")
    sizes = sorted({r["H"] for r in shown})
    for row, run in zip(panels, ("forward", "backward"), strict=True):
        own = [r for r in shown if r["pass"] == run]
        for panel, what, scale in zip(row, ("registers", "shared_bytes"), (1, 1024), strict=True):
            for target in dict.fromkeys(r["target"] for r in own):
                _line(panel, [r for r in own if r["target"] == target], what, scale)
            panel.set_xscale("log", base=2)
            panel.set_xticks(sizes, [str(h) for h in sizes], fontsize=7, rotation=90)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        row[0].set_ylabel(f"{run}\nregisters of a thread")
        row[1].set_ylabel("shared memory of a program, KiB")
    _limits(panels[:, 0], [(f"most there are, {name}", value) for name, value in REGISTERS.items()])
    limits: dict[float, list[str]] = {}
    for r in shown:
        names = limits.setdefault(r["shared_limit"] / 1024, [])
        if r["target"] not in names:
            names.append(r["target"])
    _limits(
        panels[:, 1],
        [("limit of " + ", ".join(t for t in _COLOURS if t in names), value) for value, names in limits.items()],
    )
    for panel in panels[1]:
        panel.set_xlabel("hidden size H")
    targets = [
        Line2D([], [], color=colour, lw=2, label=target)
        for target, colour in _COLOURS.items()
        if any(r["target"] == target for r in shown)
    ]
    strategies = [
        Line2D([], [], color="gray", marker=marker, ls="", label=name)
        for name, marker in _MARKERS.items()
        if any(_family(r) == name for r in shown)
    ]
    figure.legend(handles=targets + strategies, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(f"Machine code of training's kernels, {_DTYPE}, B = {_BATCH}: compiled for, not run", fontsize=11)
    return figure


def _family(r: Record) -> str:
    return r["strategy"].split()[0]


def _line(panel: Any, records: Sequence[Record], what: str, scale: int) -> None:
    """The most of each H's kernels."""
    most: dict[int, Record] = {}
    for r in records:
        if r["H"] not in most or r[what] > most[r["H"]][what]:
            most[r["H"]] = r
    points = sorted(most.items())
    colour = _COLOURS[records[0]["target"]]
    panel.plot([h for h, _ in points], [r[what] / scale for _, r in points], color=colour, lw=1)
    for h, r in points:
        panel.plot(h, r[what] / scale, color=colour, marker=_MARKERS[_family(r)], ms=4)


def _limits(panels: Sequence[Any], limits: Sequence[tuple[str, float]]) -> None:
    for panel in panels:
        for name, value in limits:
            panel.axhline(value, color="#444444", lw=1, ls=(0, (4, 3)))
            panel.annotate(
                f"{name}: {value:g}", (0.01, value), xycoords=("axes fraction", "data"), xytext=(0, 2),
                textcoords="offset points", fontsize=7, color="#444444", zorder=3,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            )  # fmt: skip
        panel.set_ylim(0, 1.1 * max(value for _, value in limits))
