"""The report of `python -m bench.ragged`, drawn from ragged.json: ragged.md and ragged.png."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench import results
from bench.cpu_report import NOISY, ratio_text
from bench.files import replace, write_atomically
from bench.providers import REFERENCE
from bench.results import Record
from bench.tables import ENVIRONMENT, table

JSON, TEXT, PLOT = "ragged.json", "ragged.md", "ragged.png"
_COLOURS = {"training step": "#0072B2", "inference": "#E69F00"}


class Aim(NamedTuple):
    """How many times as fast as `nn.LSTM` on the same packed batch ours should be at least."""

    group: str
    kind: str
    longest: int
    least: float
    hidden: int | None = None  # any


AIMS = (
    Aim("training step", "uniform", 1000, 20, 64),
    Aim("training step", "uniform", 1000, 20, 32),
    Aim("training step", "uniform", 1000, 40, 128),
    Aim("training step", "uniform", 40, 1.3),
    Aim("inference", "uniform", 1000, 2),
    Aim("training step", "log-normal", 500, 1),
    Aim("inference", "log-normal", 500, 1),
)
OF_PADDED = 1.15  # the time of ours, packed, over that of nn.LSTM on the padded batch, in training: at most
MEMORY = 2.0  # the same of its peak memory


def read(folder: Path) -> Record:
    """What ragged.json says.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is not one.
    """
    return results.read(folder / JSON, ("environment", "records", "memory", "not_measured"), "python -m bench.ragged")


def write(content: Record, folder: Path) -> list[Path]:
    """Writes ragged.md and ragged.png; the files written."""
    drawn = bool(content["records"])
    if drawn:
        figure = draw(content)
        replace(folder / PLOT, lambda part: figure.savefig(part, dpi=150, format="png"))
    else:
        (folder / PLOT).unlink(missing_ok=True)  # one of an earlier run would be taken for this one's
    write_atomically(folder / TEXT, markdown(content))
    return [folder / name for name in (JSON, TEXT, *([PLOT] if drawn else []))]


def aim(r: Record) -> float | None:
    """The least ratio that a record should have; None where there is no such aim."""
    for x in AIMS:
        if (x.group, x.kind, x.longest) == (r["group"], r["kind"], r["longest"]) and x.hidden in (None, r["hidden"]):
            return x.least
    return None


def _reached(r: Record) -> str:
    least = aim(r)
    return "–" if least is None else f"≥ {least:g}: {'reached' if r['ratio'] >= least else 'missed'}"


def _of_padded(r: Record) -> str:
    if r["group"] != "training step" or r["kind"] != "uniform":
        return f"{r['of_padded']:.2f}"
    return f"{r['of_padded']:.2f} (≤ {OF_PADDED}: {'reached' if r['of_padded'] <= OF_PADDED else 'missed'})"


def summary(content: Record) -> str:
    """Every case, for a terminal."""
    parts = [cases(content["records"])] if content["records"] else []
    parts += [_memory(content["memory"])] if len(content["memory"]) == 2 else []
    parts += [f"not measured: {x['name']}: {x['why']}" for x in content["not_measured"]]
    return "\n\n".join(parts) + "\n"


def cases(records: Sequence[Record]) -> str:
    head = (
        "case", "call", f"{REFERENCE}, ms", "ours, ms", "times as fast", "aim", "ours `lengths=`, ms",
        f"{REFERENCE} padded, ms", "ours / padded", "backend",
    )  # fmt: skip
    rows = [
        (
            r["case"], r["group"], _ms(r["reference_s"]), _ms(r["ours_s"]), ratio_text(r, 2), _reached(r),
            _ms(r["lengths_s"]), _ms(r["padded_s"]), _of_padded(r), r["chosen"],
        )
        for r in records
    ]  # fmt: skip
    return table(head, rows, 2)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _memory(peaks: dict[str, Any]) -> str:
    ours, padded = (peaks[name]["peak_bytes"] for name in ("ours", "padded"))
    verdict = "reached" if ours <= MEMORY * padded else "missed"
    return (
        f"One row of 20,000 steps and 63 of 10 (I = H = 64), peak {peaks['ours']['peak_kind']} memory that a training "
        f"step adds, each in a process of its own: ours on the packed batch {ours / 2**20:.1f} MiB, `{REFERENCE}` on "
        f"the padded batch {padded / 2**20:.0f} MiB, {ours / padded:.3f} of it (aim: at most {MEMORY:g}: {verdict})."
    )


def markdown(content: Record) -> str:
    """The whole report."""
    environment, records = content["environment"], content["records"]
    parts = [
        f"# Ragged batches on {environment['device']}",
        f"Drawn from `{JSON}`, which has all numbers, by `python -m bench.ragged --draw`. {_METHOD}",
        table(("", ""), [(name, environment[key]) for key, name in ENVIRONMENT.items() if environment.get(key)], 2),
    ]
    if records:
        parts += [f"![times as fast as {REFERENCE} on the same packed batch]({PLOT})", cases(records)]
    if len(content["memory"]) == 2:
        parts += ["## Memory", _memory(content["memory"])]
    if explained := {r["case"]: r["explained"] for r in records if r["group"] == "training step"}:
        parts += ["## How the training steps ran", "By `TritonLSTM.explain`."]
        parts += [f"{name}\n```\n{text}\n```" for name, text in explained.items()]
    if content["not_measured"]:
        rows = [(x["name"], " ".join(x["why"].split()).replace("|", "\\|")) for x in content["not_measured"]]
        parts += ["## Not measured", table(("case", "why"), rows, 2)]
    return "\n\n".join(parts) + "\n"


_METHOD = (
    "One layer, float32. A case's name has its batch size B, input size I, hidden size H, and how the rows' lengths "
    "are spread: *uniform* in [L / 2, L], or *log-normal* with a median of 10, the longest row having L steps, the "
    "last number. A training step is forward and backward with the gradients of the input and of all parameters. "
    f"`{REFERENCE}` and `TritonLSTM` (backend auto) share weights and rows and are called in turns, on the "
    f"`PackedSequence`, on the padded batch (`{REFERENCE}`, which runs the padding, too) and on the padded batch with "
    "`lengths=` (ours). **Times as fast: the time of "
    f"`{REFERENCE}` over ours, both packed**, the median over rounds; ~ marks an interquartile range above "
    f"{NOISY:.0%}. Values and gradients are compared before."
)


def draw(content: Record) -> Figure:
    """Bars of how many times as fast ours is, and the aims, 9 inches wide to be read at 900 pixels."""
    records = content["records"]
    names = list(dict.fromkeys(r["case"] for r in records))
    figure = Figure(figsize=(9, 1.7 + 0.55 * len(names)), layout="constrained")
    axes = figure.subplots()
    for k, group in enumerate(_COLOURS):
        own = [r for r in records if r["group"] == group]
        places = [names.index(r["case"]) + 0.4 * k - 0.2 for r in own]
        axes.barh(places, [r["ratio"] for r in own], 0.36, color=_COLOURS[group])
        for place, r in zip(places, own, strict=True):
            if (least := aim(r)) is not None:
                axes.plot([least, least], [place - 0.18, place + 0.18], color="black", lw=2)
            # Right of the bar and of the aim, where that is missed, and of the line at 1.
            at = (max(1, r["ratio"], least or 0), place)
            text = f"{r['ratio']:.3g}"
            axes.annotate(text, at, (5, 0), textcoords="offset points", va="center_baseline", fontsize=8)
    axes.set_xscale("log")
    low, high = min(0.9, *(r["ratio"] for r in records)), max(max(r["ratio"], aim(r) or 1) for r in records)
    axes.set_xlim(0.9 * low, 2 * high)
    ticks = [t for t in (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if 0.9 * low <= t <= 2 * high]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="gray", lw=1, ls=":")
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    axes.set_xlabel(f"times as fast as {REFERENCE} on the same packed batch")
    axes.set_ylabel("rows: batch, sizes, lengths")
    keys: list[Any] = [Patch(color=colour, label=group) for group, colour in _COLOURS.items()]
    keys.append(Line2D([], [], color="black", lw=2, label="aim, at least"))
    figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    environment = content["environment"]
    figure.suptitle(f"Ragged batches, TritonLSTM (auto), {environment['device']}", fontsize=12)
    return figure
