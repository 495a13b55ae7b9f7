"""The report's tables, as Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

from bench.measure import GROUPS
from bench.providers import REFERENCE
from bench.results import Record, Results

ENVIRONMENT = {
    "device": "device",
    "driver": "driver",
    "cpu": "CPU",
    "threads": "threads",
    "torch": "PyTorch",
    "triton": "Triton",
    "cuda": "CUDA",
    "hip": "HIP",
    "cudnn": "cuDNN",
    "onednn": "oneDNN",
    "python": "Python",
    "os": "system",
    "commit": "commit",
    "date": "date",
    "command": "command",
}


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], texts: int = 1) -> str:
    """A Markdown table that also reads well as text: the first `texts` columns to the left, numbers to the right."""
    cells = [[str(x) for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = [x.ljust(w) if k < texts else x.rjust(w) for k, (x, w) in enumerate(zip(row, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if k < texts else "-" * (w - 1) + ":" for k, w in enumerate(widths)]
    return "\n".join(line(row) for row in (list(head), rule, *cells))


def labels(records: Iterable[Record]) -> dict[str, str]:
    """Provider to label, in the order of the records."""
    return {r["provider"]: r["label"] for r in records}


def by_shape(records: Iterable[Record]) -> dict[str, dict[str, Record]]:
    """Shape, then provider, to record."""
    found: dict[str, dict[str, Record]] = {}
    for r in records:
        found.setdefault(r["shape"], {})[r["provider"]] = r
    return found


def speedup(row: dict[str, Record], provider: str) -> float | None:
    """How many times as fast as `nn.LSTM` a provider is, from the records of one shape; None where unknown."""
    if provider not in row or REFERENCE not in row:
        return None
    return row[REFERENCE]["median_s"] / row[provider]["median_s"]


def markdown(results: Results, plots: Sequence[tuple[str, str]]) -> str:
    """The whole report.

    Args:
        results: what it tells.
        plots: file names and what each shows.
    """
    environment = results.environment
    parts = [
        f"# Benchmarks on {environment['device']}",
        "Drawn from `benchmarks.json` by `python -m bench.report`; all numbers are there and in `benchmarks.csv`. "
        "In a shape, B is the batch, T the time steps, H the hidden size (and the input's), L the layers, "
        "D the directions. Times are medians.",
        table(("", ""), [(name, environment[key]) for key, name in ENVIRONMENT.items() if environment.get(key)], 2),
    ]
    parts += [f"![{text}]({name})" for name, text in plots]
    for group in GROUPS:
        if records := results.group(group):
            unit = f"Milliseconds (and times as fast as `{REFERENCE}`)."
            parts += [f"## {group.capitalize()}", unit, _times(records)]
    if records := results.group("auto"):
        parts += ["## Backend auto against nn.LSTM", _AUTO, _auto(records)]
    if records := results.group("memory"):
        parts += ["## Memory of a training step", _MEMORY, _memory(records)]
    if results.not_measured:
        rows = [(x["name"], x["outcome"], x["why"].replace("|", "\\|")) for x in results.not_measured]
        parts += ["## Not measured", table(("benchmark", "outcome", "why"), rows, 3)]
    return "\n\n".join(parts) + "\n"


_AUTO = (
    '`nn.LSTM` and `TritonLSTM` with backend "auto" called in turns. The ratio is the median over pairs of '
    "calls of the time of `TritonLSTM` over that of `nn.LSTM`: below 1 `TritonLSTM` is faster."
)

_MEMORY = (
    "Kept: what autograd keeps for backward beyond input, parameters and output, in MiB and in hidden vectors "
    "for each time step, batch row, layer and direction. Peak: the most that a training step adds to what "
    "weights and data take. On a CPU that is resident memory, of which what is kept may be more: oneDNN "
    "allocates workspaces that it does not fill."
)


def _times(records: list[Record]) -> str:
    providers = labels(records)

    def cell(row: dict[str, Record], provider: str) -> str:
        if provider not in row:
            return "–"
        ratio = speedup(row, provider)
        time = f"{row[provider]['median_s'] * 1e3:.3g}"
        return time if provider == REFERENCE or ratio is None else f"{time} ({ratio:.2f}×)"

    rows = [(shape, *(cell(row, p) for p in providers)) for shape, row in by_shape(records).items()]
    return table(("shape", *providers.values()), rows)


def _auto(records: list[Record]) -> str:
    rows = [
        (
            r["shape"],
            r["step"],
            f"{r['reference_median_s'] * 1e3:.3g}",
            f"{r['auto_median_s'] * 1e3:.3g}",
            f"{r['ratio']:.3f}",
            r["pairs"],
        )
        for r in records
    ]
    return table(("shape", "call", "nn.LSTM, ms", "auto, ms", "ratio", "pairs"), rows, 2)


def _memory(records: list[Record]) -> str:
    rows = [
        (
            r["shape"],
            r["label"],
            f"{r['kept_bytes'] / 2**20:.1f}",
            f"{r['kept_hidden_vectors']:.1f}",
            f"{r['peak_bytes'] / 2**20:.1f}",
        )
        for r in records
    ]
    kind = records[0]["peak_kind"]
    return table(("shape", "provider", "kept, MiB", "kept, vectors of H", f"peak {kind}, MiB"), rows, 2)
