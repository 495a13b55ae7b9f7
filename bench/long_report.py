"""The report of `python -m bench.long`, drawn from long.json: long.md and long.png."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from bench import results
from bench.cpu_report import by, ratio_text, values
from bench.files import replace, write_atomically
from bench.providers import AUTO, RECOMPUTE, REFERENCE
from bench.results import Record
from bench.tables import ENVIRONMENT, table

JSON, TEXT, PLOT = "long.json", "long.md", "long.png"
PROVIDERS = (REFERENCE, AUTO, RECOMPUTE)
OURS = (AUTO, RECOMPUTE)


class Aim(NamedTuple):
    """What a provider takes at most, relative to `nn.LSTM`."""

    provider: str
    what: str
    layers: int
    most: float


AIM_STEPS = 4096
AIMS = (
    Aim(RECOMPUTE, "kept_bytes", 1, 1 / 100),
    Aim(RECOMPUTE, "kept_bytes", 2, 1 / 25),
    Aim(RECOMPUTE, "peak_bytes", 1, 1 / 2),
    Aim(RECOMPUTE, "peak_bytes", 2, 1 / 2),
    Aim(RECOMPUTE, "ratio", 1, 1.35),
    Aim(RECOMPUTE, "ratio", 2, 1.35),
    Aim(AUTO, "kept_bytes", 1, 1 / 2),
    Aim(AUTO, "kept_bytes", 2, 1 / 2),
)
_WORDS = {"kept_bytes": "kept", "peak_bytes": "peak", "ratio": "time"}

# Okabe and Ito's colours; nn.LSTM's marks are large and hollow, as those of "auto" may lie on them.
_STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    REFERENCE: ("#000000", {"ms": 8, "mfc": "none"}),
    AUTO: ("#0072B2", {"ms": 5}),
    RECOMPUTE: ("#D55E00", {"ms": 5}),
}
_NAMES = {REFERENCE: REFERENCE, AUTO: "auto", RECOMPUTE: "auto, recompute=True"}
_KINDS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("kept_bytes", "kept", {"marker": "o", "ls": "-"}),
    ("peak_bytes", "peak", {"marker": "^", "ls": ":"}),
)
_LAYERS: tuple[dict[str, Any], ...] = ({"marker": "s", "ls": "-"}, {"marker": "D", "ls": "--"})
_AIM: dict[str, Any] = {"color": _STYLES[RECOMPUTE][0], "lw": 1.2, "ls": (0, (1, 3))}
_PREDICTED: dict[str, Any] = {"color": "#000000", "marker": "x", "ms": 8, "mew": 2, "ls": ""}


def read(folder: Path) -> Record:
    """What long.json says.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is not one.
    """
    return results.read(folder / JSON, ("environment", "records", "longest", "not_measured"), "python -m bench.long")


def write(content: Record, folder: Path) -> list[Path]:
    """Writes long.md and long.png; the files written."""
    drawn = bool(content["records"])
    if drawn:
        figure = draw(content)
        replace(folder / PLOT, lambda part: figure.savefig(part, dpi=150, format="png"))
    else:
        (folder / PLOT).unlink(missing_ok=True)  # one of an earlier run would be taken for this one's
    write_atomically(folder / TEXT, markdown(content))
    return [folder / name for name in (JSON, TEXT, *([PLOT] if drawn else []))]


def failed(content: Record) -> bool:
    """Whether something went wrong, beyond there being no time for it."""
    longest = content["longest"]
    return any(x["outcome"] == "failed" for x in content["not_measured"]) or bool(longest and not longest["finite"])


def relative(records: Iterable[Record], r: Record, what: str) -> float | None:
    """A record's time or bytes over those of `nn.LSTM` on the same shape; None where those are unknown."""
    if what == "ratio":
        return r.get("ratio")
    other = [x for x in records if (x["shape"], x["provider"]) == (r["shape"], REFERENCE)]
    return r[what] / other[0][what] if other and other[0][what] > 0 else None


# The text


def markdown(content: Record) -> str:
    """The whole report."""
    environment, records = content["environment"], content["records"]
    parts = [
        f"# Training on long sequences on {environment['device']}",
        f"Drawn from `{JSON}`, which has all numbers, by `python -m bench.long --draw`. {_METHOD}",
        table(("", ""), [(name, environment[key]) for key, name in ENVIRONMENT.items() if environment.get(key)], 2),
        "## Aims",
        f"At T = {AIM_STEPS:,}: what a training step takes at most, relative to `{REFERENCE}`.",
        aims(content),
    ]
    if records:
        parts += [f"![memory and time against time steps]({PLOT})", "## Memory", _MEMORY, _memory(records)]
    if any("ratio" in r for r in records):
        parts += ["## Time of a training step", _TIME, _times(records)]
    if content["longest"]:
        parts += ["## A longer sequence", *_longest(content["longest"])]
    if content["not_measured"]:
        rows = [
            (x["name"], x["outcome"], " ".join(x["why"].split()).replace("|", "\\|")) for x in content["not_measured"]
        ]
        parts += ["## Not measured", table(("case", "outcome", "why"), rows, 3)]
    return "\n\n".join(parts) + "\n"


_METHOD = (
    "float32, the input as wide as h; B is the batch, T the time steps, H the hidden size. A training step is forward "
    f'and backward with the gradients of the input and of all parameters. *auto* is `TritonLSTM(backend="auto")`, '
    "*auto, recompute=True* the same without kept gates: backward rebuilds them, a chunk of time steps at a time. "
    f"Values and gradients are compared with those of `{REFERENCE}` before."
)

_MEMORY = (
    "Kept: what autograd keeps from forward to backward, beyond input, parameters and output. Peak: the most that a "
    "training step adds to what weights, input and the gradient of the output take; the output and the gradients, "
    "which each of them needs, are in it. On a CPU that is resident memory, measured in a process of its own for each, "
    "and what is kept may be more: oneDNN allocates workspaces that it does not fill."
)

_TIME = (
    f"`{REFERENCE}` and ours share weights and input and are called in turns. **Relative: the time of ours over that "
    f"of `{REFERENCE}`, below 1 ours is faster**: the median over pairs of calls, between the quartiles; ~ marks a "
    "wide range of them. Error: the largest of the output and of each gradient, relative to its largest element."
)


def _size(shape: Record) -> tuple[str, int]:
    return f"{shape['steps']:,}", shape["layers"]


def _mib(count: int) -> str:
    size = count / 2**20
    return f"{size:,.1f}" if size >= 10 else f"{size:.3g}"


def _of(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _memory(records: list[Record]) -> str:
    rows = []
    for r in records:
        cells = [x for what in ("kept_bytes", "peak_bytes") for x in (_mib(r[what]), _of(relative(records, r, what)))]
        rows.append((_NAMES[r["provider"]], *_size(r), *cells))
    kind = records[0]["peak_kind"]
    return table(("", "T", "layers", "kept, MiB", "relative", f"peak {kind}, MiB", "relative"), rows)


def _times(records: list[Record]) -> str:
    rows = [
        (
            _NAMES[r["provider"]],
            r["chosen"],
            *_size(r),
            f"{1e3 * r['reference_s']:,.1f}",
            f"{1e3 * r['ours_s']:,.1f}",
            f"{1e6 * r['ours_s'] / r['steps']:,.1f}",
            ratio_text(r, 3),
            f"{r['ratio_q1']:.3f} – {r['ratio_q3']:.3f}",
            r["pairs"],
            f"{r['error']:.1g}",
        )
        for r in records
        if "ratio" in r
    ]
    times = (f"{REFERENCE}, ms", "ours, ms", "ours, µs a time step")
    head = ("", "backend that ran", "T", "layers", *times, "relative", "quartiles", "pairs", "error")
    return table(head, rows, 2)


def _longest(found: Record) -> list[str]:
    """One training step, measured, beside what `nn.LSTM` would keep."""
    predicted = found["predicted_reference"]
    text = f"One training step of one layer, in a fresh process. `{REFERENCE}` was not run there"
    if predicted:
        times = f"{found['steps'] / predicted['from_steps']:.3g} times what it keeps at T = {predicted['from_steps']:,}"
        text += f"; what it would keep is *predicted*: {times}"
    head = (
        "", "T", "step, s", "µs a time step", f"peak {found['peak_kind']}, MiB", "kept, MiB", "gradients",
        f"{REFERENCE} would keep, MiB (*predicted*)",
    )  # fmt: skip
    row = (
        _NAMES[found["provider"]],
        f"{found['steps']:,}",
        f"{found['seconds']:.3g}",
        f"{1e6 * found['seconds'] / found['steps']:,.1f}",
        _mib(found["peak_bytes"]),
        _mib(found["kept_bytes"]),
        "finite" if found["finite"] else "**not finite**",
        _mib(predicted["kept_bytes"]) if predicted else "–",
    )
    return [f"{text}.", table(head, [row])]


def reached(content: Record) -> list[tuple[Aim, float | None]]:
    """Each aim and what was measured; None where it wasn't."""
    records, found = content["records"], []
    for aim in AIMS:
        own = [r for r in records if (r["steps"], r["layers"], r["provider"]) == (AIM_STEPS, aim.layers, aim.provider)]
        found.append((aim, relative(records, own[0], aim.what) if own else None))
    return found


def aims(content: Record) -> str:
    """The aims as a table: which are reached."""
    rows = []
    for aim, value in reached(content):
        verdict = "not measured" if value is None else "yes" if value <= aim.most else "**no**"
        rows.append((_NAMES[aim.provider], _WORDS[aim.what], aim.layers, _of(aim.most), _of(value), verdict))
    longest = content["longest"]
    verdict = "not measured" if longest is None else "yes" if longest["finite"] else "**no**"
    steps = f"T = {longest['steps']:,}" if longest else "a longer sequence"
    rows.append((_NAMES[RECOMPUTE], f"{steps} trains", 1, "–", "–", verdict))
    return table(("", "what", "layers", "at most", "measured", "reached"), rows, 2)


def summary(content: Record) -> str:
    """For a terminal."""
    parts = [f"Relative to {REFERENCE} at T = {AIM_STEPS:,}, {content['environment']['device']}", aims(content)]
    parts += ["\n\n".join(_longest(content["longest"]))] if content["longest"] else []
    parts += [f"not measured: {x['name']}: {x['why']}" for x in content["not_measured"]]
    return "\n\n".join(parts) + "\n"


# The plot, 9 inches wide to be read at 900 pixels


def draw(content: Record) -> Figure:
    """Memory against T, and the time of a training step relative to `nn.LSTM`."""
    records, longest = content["records"], content["longest"]
    figure = Figure(figsize=(9, 5), layout="constrained")
    memory, time = figure.subplots(1, 2)
    keys = {memory: _draw_memory(memory, records, longest), time: _draw_times(time, records)}
    for panel in keys:
        steps = sorted(set(values(records, "steps")) | ({longest["steps"]} if longest and panel is memory else set()))
        panel.set_xscale("log", base=2)
        panel.set_xticks(steps, [f"{t:,}" for t in steps], fontsize=9)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
        panel.set_xlabel("time steps T")
    providers = [p for p in PROVIDERS if any(r["provider"] == p for r in records)]
    own = [Line2D([], [], color=_STYLES[p][0], lw=3, label=_NAMES[p]) for p in providers]
    figure.legend(handles=own, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    for panel, handles in keys.items():
        panel.legend(
            handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False, fontsize=9,
            handlelength=2.4, handletextpad=0.5, columnspacing=1.2,
        )  # fmt: skip
    b, h = records[0]["batch"], records[0]["hidden"]
    figure.suptitle(f"Training on long sequences, B = {b}, H = {h}, {content['environment']['device']}", fontsize=12)
    return figure


def _line(records: Iterable[Record], value: Callable[[Record], float]) -> tuple[list[int], list[float]]:
    points = sorted((r["steps"], value(r)) for r in records)
    return [t for t, _ in points], [v for _, v in points]


def _draw_memory(panel: Any, records: list[Record], longest: Record | None) -> list[Line2D]:
    """Kept and peak of the fewest layers, and what `nn.LSTM` is predicted to keep; the keys."""
    fewest = values(records, "layers")[0]
    shown = [r for r in (*records, *([longest] if longest else ())) if r["layers"] == fewest]
    for provider, line in by(shown, "provider").items():
        colour, marks = _STYLES[provider]
        for what, _, style in _KINDS:
            x, y = _line((r for r in line if r[what] > 0), lambda r, what=what: r[what] / 2**20)  # type: ignore[misc]
            panel.plot(x, y, color=colour, lw=1.4, **style, **marks)
    keys = [Line2D([], [], color="gray", ms=5, label=name, **style) for _, name, style in _KINDS]
    if longest and longest["predicted_reference"]:
        panel.plot(longest["steps"], longest["predicted_reference"]["kept_bytes"] / 2**20, **_PREDICTED)
        keys.append(Line2D([], [], label=f"{REFERENCE} kept, predicted", **_PREDICTED))
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.6g}"))
    panel.set_ylabel("MiB")
    panel.set_title(f"memory of a training step, {fewest} layer{'s' if fewest > 1 else ''}", fontsize=10)
    return keys


def _draw_times(panel: Any, records: list[Record]) -> list[Line2D]:
    """The ratios with their quartiles, beside `nn.LSTM` and the aim; the keys."""
    most = max(aim.most for aim in AIMS if aim.what == "ratio")
    timed = [r for r in records if "ratio" in r]
    panel.axhline(1, color=_STYLES[REFERENCE][0], lw=1.4)
    panel.axhline(most, **_AIM)
    styles = dict(zip(values(records, "layers"), _LAYERS, strict=False))
    for (provider, layers), line in by(timed, "provider", "layers").items():
        colour, marks = _STYLES[provider]
        x, y = _line(line, lambda r: r["ratio"])
        low = _line(line, lambda r: r["ratio"] - r["ratio_q1"])[1]
        high = _line(line, lambda r: r["ratio_q3"] - r["ratio"])[1]
        panel.errorbar(x, y, (low, high), color=colour, lw=1.4, elinewidth=1, capsize=3, **styles[layers], **marks)
    bottom, top = min([0.9, *(r["ratio_q1"] for r in timed)]), max([most, *(r["ratio_q3"] for r in timed)])
    panel.set_ylim(bottom - 0.1 * (top - bottom), top + 0.1 * (top - bottom))
    panel.set_ylabel(f"time of a step / that of {REFERENCE}")
    panel.set_title("time of a training step, relative", fontsize=10)
    keys = [
        Line2D([], [], color="gray", ms=5, label=f"{n} layer{'s' if n > 1 else ''}", **s) for n, s in styles.items()
    ]
    return [*keys, Line2D([], [], label=f"aim at T = {AIM_STEPS:,}: {most:g}", **_AIM)]
