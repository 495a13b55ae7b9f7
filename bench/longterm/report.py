"""README.md and plots of a run, drawn from its files."""

import statistics
from pathlib import Path

import matplotlib

from bench.files import write_atomically
from bench.longterm import gradients, plots
from bench.longterm.cells import CELLS
from bench.longterm.problems import PROBLEMS
from bench.longterm.records import CURVES, GRADIENTS, RUNS, Records
from bench.longterm.train import Row
from bench.tables import table

matplotlib.use("Agg")

CLAIM_PROBLEM, CLAIM_LENGTH, CLAIM_SEEDS = "adding", 200, 3
IN_SHORT = ("rnn-0.5", "rnn-1.5", "lstm1997", "lstm", "lstm-5")  # curves that show all there is to see


def write(records: Records) -> Path:
    """Writes the plots and README.md into the records' folder; returns the path of the latter."""
    plots.draw(records)
    path = records.folder / "README.md"
    write_atomically(path, "\n\n".join(text(records)) + "\n")
    return path


def text(records: Records) -> list[str]:
    """The report's paragraphs."""
    parts = [
        "# Vanishing gradients and long lags",
        f"Drawn by `python -m bench.longterm --report` from [{GRADIENTS}]({GRADIENTS}), [{RUNS}]({RUNS}) and "
        f"[{CURVES}]({CURVES}), which `python -m bench.longterm` measures. Problems and criteria are those of "
        "Hochreiter & Schmidhuber, “Long short-term memory”, Neural Computation 9 (8), 1997; "
        "“LSTM of 1997” is `TritonLSTM(forget_gate=False)`.",
    ]
    if any(session["quick"] for session in records.sessions):
        parts.append("**A quick run**, which shows that everything works and says nothing about the cells.")
    parts.append("## In short")
    if records.gradients:
        parts.append(gradients_in_short(records.gradients))
    if records.runs:
        parts += [jobs_in_short(records.runs), claim(records)]
    if records.gradients:
        parts += ["## Gradient against the lag", *gradient_text(records)]
    if records.runs:
        parts += ["## Problems with long lags", f"![steps until the criterion is met]({plots.STEPS})"]
    for name in PROBLEMS:
        if any(row["problem"] == name for row in records.runs):
            parts += problem_text(records, name)
    if records.runs:
        parts += ["## How it was trained, and where that departs from the paper", *departures(records)]
    return [*parts, "## Run", sessions(records)]


def claim(records: Records) -> str:
    """Whether on the adding problem at T = 200 the LSTM meets the criterion with every seed and the RNN with none."""

    def of(cell: str) -> tuple[int, int]:
        rows = _rows(records, CLAIM_PROBLEM, CLAIM_LENGTH, cell)
        return sum(row["met"] for row in rows), len(rows)

    (lstm, lstm_of), (rnn, rnn_of) = of("lstm"), of("rnn")
    wanted = f"adding problem, T = {CLAIM_LENGTH}: the LSTM meets the criterion with every seed, the tanh RNN with none"
    if min(lstm_of, rnn_of) < CLAIM_SEEDS:
        return f"Claim: {wanted}. **Not measured** with {CLAIM_SEEDS} seeds."
    verdict = "Reached" if lstm == lstm_of and rnn == 0 else "Not reached"
    steps = f"{records.settings.steps:,} steps"
    return (
        f"Claim: {wanted}. **{verdict}**: within {steps} the LSTM met it with {lstm} of {lstm_of} seeds, "
        f"the tanh RNN with {rnn} of {rnn_of}."
    )


def gradients_in_short(rows: list[Row]) -> str:
    lag = min(100, max(row["lag"] for row in rows))
    at = {row["curve"]: f"{10 ** row['log10_mean']:.2g}" for row in rows if row["lag"] == lag}
    shown = "; ".join(f"{gradients.CURVES[name].label}: {at[name]}" for name in IN_SHORT if name in at)
    return f"The gradient {lag} steps back, relative to that at the last step, in networks not trained: {shown}."


def jobs_in_short(rows: list[Row]) -> str:
    counts = []
    for cell in dict.fromkeys(row["cell"] for row in rows):
        own = [row["met"] for row in rows if row["cell"] == cell]
        counts.append(f"{CELLS[cell].label}: {sum(own)} of {len(own)}")
    return f"Jobs (a problem, a length, a seed) that met the paper's criterion: {'; '.join(counts)}."


def gradient_text(records: Records) -> list[str]:
    rows, size = records.gradients, records.size
    lags = [lag for lag in (1, 10, 50, 100, 200) if lag <= max(row["lag"] for row in rows)]
    lines = []
    for name in dict.fromkeys(row["curve"] for row in rows):
        by_lag = {row["lag"]: row["log10_mean"] for row in rows if row["curve"] == name}
        lines.append([gradients.CURVES[name].label, *(f"{10 ** by_lag[lag]:.2g}" for lag in lags)])
    return [
        f"![norm of the gradient against the lag]({plots.GRADIENTS})",
        "How it is defined and computed: the module is called a time step at a time with the states passed on, "
        "h, or h and c; the loss is L = v · h_t, v a random unit vector. Autograd keeps the gradient of each state "
        "between two calls (`retain_grad`): ∂L/∂h_{t−k}, and for the LSTMs (∂L/∂h_{t−k}, ∂L/∂c_{t−k}) as one vector, "
        "as the error carousel runs through c. Shown is its Euclidean norm; at k = 0 it is that of v, 1. float64.",
        f"{size.networks} random networks of {size.hidden} units, not trained, × {size.batch} input sequences, "
        f"standard normal, of {size.inputs} units. Geometric mean over networks and inputs, the band from the 10th to "
        "the 90th percentile. The tanh RNN's recurrent matrix is a random orthogonal one times the radius, "
        "so that all its eigenvalues have this modulus; all else is as PyTorch initialises it, but for the biases "
        "that the legend names.",
        table(["gradient relative to lag 0, at lag", *map(str, lags)], lines),
    ]


def problem_text(records: Records, name: str) -> list[str]:
    problem = PROBLEMS[name]
    rows = [row for row in records.runs if row["problem"] == name]
    lengths = sorted({row["length"] for row in rows})
    cells = [cell for cell in CELLS if any(row["cell"] == cell for row in rows)]
    lines = [[CELLS[cell].label, *(_summary(_rows(records, name, t, cell)) for t in lengths)] for cell in cells]
    wrong = [[CELLS[cell].label, *(_wrong(_rows(records, name, t, cell)) for t in lengths)] for cell in cells]
    parts = [
        f"### {problem.title.capitalize()}",
        f"![training error]({plots.errors_name(name)})",
        "Seeds that met the criterion, the median of their numbers of training steps, lowest to highest "
        f"(sequences: times {records.settings.batch}; –: not run):",
        table(["", *(f"T = {t}" for t in lengths)], lines),
        f"Of {records.settings.tests:,} fresh sequences each network that met it then gets wrong:",
        table(["", *(f"T = {t}" for t in lengths)], wrong),
    ]
    published = ", ".join(
        f"T = {t}: {found.sequences:,} sequences, {found.wrong} of 2,560 wrong"
        for t, found in problem.published.items()
    )
    parts.append(f"The paper's own (its cell, 4 units, plain gradient descent): {published}.")
    return parts


def _summary(rows: list[Row]) -> str:
    met = [row for row in rows if row["met"]]
    if not rows:
        return "–"
    count = f"{len(met)} of {len(rows)}"
    if not met:
        return count
    steps = [row["steps"] for row in met]
    return f"{count}: {statistics.median(steps):,.0f} ({min(steps):,}–{max(steps):,})"


def _wrong(rows: list[Row]) -> str:
    return ", ".join(str(row["test_wrong"]) for row in rows if row["met"]) or "–"


def departures(records: Records) -> list[str]:
    s = records.settings
    skipped = sum(row["skipped"] for row in records.runs)
    return [
        f"The same for all cells: one layer of {s.hidden} units and sigmoid output units that read its h at each "
        f"sequence's last step; squared error; Adam, learning rate {s.rate:g}, constant; steps of {s.batch} "
        f"sequences, each seen once; the gradient's norm clipped to {s.clip:g}; at most {s.steps:,} steps. "
        "Of one seed all cells get the same sequences. Settings were chosen by the LSTM at T = 200, not for each cell.",
        f"The criterion is the paper's: over the {s.window:,} most recent sequences the average error is below the "
        "bound and every one is right, each judged before the update that it is part of. The error is the squared "
        "error summed over output units. Right are, on the adding problem, absolute errors below 0.04; on the "
        "temporal-order problem all four output units within 0.3 of their targets. "
        "The average error is over the same sequences (the paper doesn't say over which).",
        "Lengths are uniform in [T, 1.1 T]. Adding: the markers at both ends stay −1; where a marked pair is the "
        "first one, it counts as zero, which the paper says of X1. Temporal order: the paper has lengths from 100 "
        "to 110 alone; its places of the two symbols are scaled with T.",
        "Departures: the paper has 2 blocks of 2 cells whose outputs h and g have other ranges, updates after every "
        "sequence by plain gradient descent with a truncated gradient, weights uniform in ± 0.1 and input gates' "
        "biases of −3 and −6 (adding), −2 and −4 (temporal order). Here gradients are whole, cells and gates are "
        "those of `nn.LSTM`, weights are PyTorch's initial ones.",
        "Gates begin so that a unit keeps what it has for a time from 1 to T (Tallec & Ollivier, “Can recurrent neural "
        "networks warp time?”, 2018): the biases of forget gates, and of the GRU's update gates, are log u with u "
        "uniform in [1, T − 1], those of input gates −log u, also of the LSTM of 1997, as its paper's "
        "input gates begin almost closed. The tanh RNN has no gates; it and “LSTM, PyTorch's initialisation” begin as "
        "PyTorch makes them.",
        f"Updates skipped since the gradient overflowed: {skipped}.",
    ]


def sessions(records: Records) -> str:
    """What was run where."""
    names = ("command", "workers", "jobs", "device", "torch", "triton", "python", "commit", "date")
    first = ["command", "workers, a thread each", "jobs to do", *names[3:]]
    seconds = sum(row["seconds"] for row in records.runs)
    # The command as code, for Markdown makes one dash of two.
    cells = [{**session, "command": f"`{session['command']}`"} for session in records.sessions]
    columns = zip(*([str(session[name]) for name in names] for session in cells), strict=True)
    lines = [[name, *values] for name, values in zip(first, columns, strict=True)]
    spent = (
        f"{len(records.runs)} jobs of {seconds / 60:.0f} minutes in all by the clock, whatever else the machine did."
    )
    if len(records.sessions) > 1:
        spent += " What a session that was stopped early had left to do, the next did as far as it was asked to."
    return f"{spent}\n\n{table(['', *([''] * len(records.sessions))], lines)}"


def _rows(records: Records, problem: str, length: int, cell: str) -> list[Row]:
    key = (problem, length, cell)
    return [row for row in records.runs if (row["problem"], row["length"], row["cell"]) == key]
