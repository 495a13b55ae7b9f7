"""README.md and plots of a run of the published recipe, drawn from its CSV files and its summary."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.files import write_atomically
from bench.sarcasm import review
from bench.sarcasm.data import SYNTHETIC
from bench.sarcasm.published import BATCH
from bench.sarcasm.results import Row, deviation, read_csv

matplotlib.use("Agg")

Runs = list[list[Row]]
TRAIN_COLOUR, TEST_COLOUR, REVIEW_COLOUR = "tab:gray", "tab:blue", "tab:orange"


def write(folder: Path, summary: dict[str, Any]) -> Path:
    """Writes README.md, accuracy.png and loss.png into `folder`; returns the path of the first."""
    runs = [read_csv(folder / f"seed-{seed}.csv") for seed in summary["seeds"]]
    synthetic = summary["data"] == SYNTHETIC
    note = "SYNTHETIC data, generated headlines" if synthetic else ""
    curve = {} if synthetic else dict(enumerate(review.TEST_ACCURACY, 1))
    # The review's log gives losses of few epochs here; in its unit, so about 32 (the batch size) times less.
    points = {} if synthetic else {k: loss * BATCH for k, loss in review.TEST_LOSS.items()}
    draw(folder / "accuracy.png", runs, "accuracy", "accuracy (%)", note, curve)
    draw(folder / "loss.png", runs, "loss", "mean cross entropy (nats)", note, points)
    path = folder / "README.md"
    write_atomically(path, markdown(runs, summary))
    return path


def mean_and_range(
    axes: Axes,
    epochs: Sequence[int],
    columns: Sequence[Sequence[float]],
    style: str,
    colour: str,
    alpha: float,
    what: str,
    note: str = "",
) -> None:
    """The mean over the seeds, and where there are several the range from the lowest to the highest.

    `columns` has the seeds' values for each epoch; `alpha` is the range's; `what` and `note` are for the legend.
    """
    count = len(columns[0])
    name = f"{what}, mean of {count} seeds" if count > 1 else f"{what}, one seed"
    axes.plot(epochs, [statistics.mean(column) for column in columns], style, color=colour, label=name + note)
    if count > 1:
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        axes.fill_between(epochs, low, high, color=colour, alpha=alpha, label=f"{what}, lowest to highest seed")


def draw(path: Path, runs: Runs, quantity: str, label: str, note: str, published: dict[int, float]) -> None:
    """One plot, 800 pixels wide, per epoch: mean over seeds, range from the lowest to the highest, the review's."""
    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    axes: Axes = figure.subplots()
    epochs = range(1, len(runs[0]) + 1)
    for split, colour in (("train", TRAIN_COLOUR), ("test", TEST_COLOUR)):
        columns = [[run[k][f"{split}_{quantity}"] for run in runs] for k in range(len(epochs))]
        style = "o-" if len(epochs) == 1 else "-"  # a line of one point is not seen
        mean_and_range(axes, epochs, columns, style, colour, 0.2, split, " (dropout on)" if split == "train" else "")
    shown = {epoch: value for epoch, value in published.items() if epoch <= len(epochs)}
    if shown:
        style = "--" if len(published) == review.EPOCHS else "D"
        name = "review, test (one run)" if style == "--" else "review, test (one run; the epochs it prints)"
        axes.plot(list(shown), list(shown.values()), style, color=REVIEW_COLOUR, label=name)
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.set_title(f"Sarcasm, published recipe: {quantity} per epoch" + (f"\n{note}" if note else ""))
    # Below the axes, where no curve can run under it.
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def markdown(runs: Runs, summary: dict[str, Any]) -> str:
    """The report's text."""
    synthetic = summary["data"] == SYNTHETIC
    epochs, count = summary["epochs"], len(runs)
    environment = summary["environment"]
    title = "# Sarcasm, published recipe" + (" (SYNTHETIC data)" if synthetic else "")
    parts = [title]
    if synthetic:
        parts.append(
            "**Trained on generated headlines.** The figures show that the pipeline runs; they say nothing about "
            "the real data set, and the review's figures stand beside them only to show the layout."
        )
    parts.append(
        f"{count} seed{'s' if count > 1 else ''} × {epochs} epochs through `TritonLSTM(backend={summary['backend']!r})`"
        f"{' (Triton interpreted)' if environment['triton_interpreted'] else ''}, "
        f"{summary['train_headlines']:,} training and {summary['test_headlines']:,} test headlines. "
        "The recipe is the review's: its tokens, vocabulary, split, batches, model and optimizer; only the seeds "
        "are fixed here. Values of several seeds are mean ± sample standard deviation."
    )
    if epochs != review.EPOCHS:
        parts.append(f"The review trained {review.EPOCHS} epochs, this run {epochs}: best and last are not comparable.")
    parts += ["## The review's tables and ours", tables(runs)]
    if not synthetic:
        parts.append(verdict(summary))
    parts += ["![accuracy per epoch](accuracy.png)", "![loss per epoch](loss.png)"]
    parts += ["## Per seed", per_seed(runs, summary["seeds"]), "## What to know of these figures", caveats(summary)]
    seconds = f"{summary['seconds_per_epoch']:.1f} (review: 19–20, Kaggle's P100)"
    parts += ["## Run", run_table(summary, ["seconds per epoch, training and test", seconds])]
    return "\n\n".join(parts) + "\n"


def tables(runs: Runs) -> str:
    """The three lines of the review beside ours, each seed taken at its own epoch."""
    choices: list[tuple[review.Figures, Callable[[list[Row]], Row]]] = [
        (review.LOWEST_LOSS, lambda rows: min(rows, key=lambda row: row["test_loss_review"])),
        (review.BEST, lambda rows: max(rows, key=lambda row: row["test_accuracy"])),
        (review.LAST, lambda rows: rows[-1]),
    ]
    lines = []
    for published, choose in choices:
        chosen = [choose(rows) for rows in runs]
        epochs = [f"{row['epoch']:.0f}" for row in chosen]
        ours = [", ".join(epochs) if len(set(epochs)) > 1 else epochs[0]]
        for name, digits in (("train_loss_review", 4), ("train_accuracy", 2), ("test_loss_review", 4)):
            ours.append(spread([row[name] for row in chosen], digits))
        ours.append(f"**{spread([row['test_accuracy'] for row in chosen], 2)}**")
        lines += [[f"{published.what}: review", *published[1:]], [f"{published.what}: ours", *ours]]
    header = ["", "epoch", "train loss", "train accuracy (%)", "test loss", "test accuracy (%)"]
    return table(header, lines) + (
        "\n\nLosses are in the review's unit: the sum over batches of the batch's mean cross entropy, divided by the "
        "number of *samples*; the mean cross entropy (in the plot and the CSV files) is about 32 times that. "
        "Training figures are those met during the epoch, with dropout on, as in the review."
        "\n\nThe review prints its lowest validation loss as that of epoch 13 (0.0119); "
        "its own log has the lowest at epoch 15 (0.0118)."
    )


def verdict(summary: dict[str, Any]) -> str:
    """How far our means are from the review's figures."""
    best, last = float(review.BEST.test_accuracy), float(review.LAST.test_accuracy)
    return (
        f"Difference of our means from the review's single run: best epoch "
        f"{summary['mean_best_accuracy'] - best:+.2f} points (review {best:.2f} %), "
        f"last epoch {summary['mean_last_accuracy'] - last:+.2f} points (review {last:.2f} %)."
    )


def per_seed(runs: Runs, seeds: list[int]) -> str:
    lines = []
    for seed, rows in zip(seeds, runs, strict=True):
        best = max(rows, key=lambda row: row["test_accuracy"])
        lowest = min(rows, key=lambda row: row["test_loss"])
        lines.append(
            [
                f"[{seed}](seed-{seed}.csv)",
                f"{best['test_accuracy']:.2f} ({best['epoch']:.0f})",
                f"{rows[-1]['test_accuracy']:.2f}",
                f"{lowest['test_loss']:.4f} ({lowest['epoch']:.0f})",
                f"{statistics.mean(row['seconds'] for row in rows):.1f}",
            ]
        )
    header = ["seed", "best test accuracy (%) (epoch)", "last (%)", "lowest test loss (nats) (epoch)", "seconds/epoch"]
    return table(header, lines)


def caveats(summary: dict[str, Any]) -> str:
    accuracy, count = summary["mean_best_accuracy"] / 100, summary["test_headlines"]
    error = 100 * math.sqrt(accuracy * (1 - accuracy) / count)
    seen = summary["test_headlines_also_in_train"]
    return "\n".join(
        [
            f"- The best epoch is chosen on the test split, out of {summary['epochs']}: it flatters. The review's "
            f"{review.BEST.test_accuracy} % is such a choice, too, in one run without a seed. The last epoch's "
            "accuracy is chosen by nothing.",
            f"- {count:,} test headlines alone give an accuracy a binomial standard error of {error:.2f} points.",
            f"- Always answering the more frequent label gives {summary['majority_baseline']:.1f} %.",
            f"- {seen} test headlines also occur in the training split, and the vocabulary "
            f"({summary['vocabulary']:,} entries) is built on all headlines, the test split's too. "
            "Both are the review's doing, reproduced here.",
            f"- {summary['unknown_tokens_percent']:.2f} % of all tokens are `<UNK>`, which is also the padding.",
            "- The label says which outlet printed a headline, The Onion or HuffPost, not whether a reader finds "
            "it sarcastic.",
        ]
    )


def run_table(summary: dict[str, Any], seconds: list[str]) -> str:
    """What was run where; `seconds` is the line of the time an epoch takes."""
    environment = summary["environment"]
    lines = [
        ["command", f"`{environment['command']}`"],
        ["data", f"{summary['data']}, sha256 of its content `{summary['data_sha256'][:12]}…`"],
        ["device", environment["device"] + (f", {environment['threads']} thread" if not environment["gpu"] else "")],
        seconds,
        *([name, str(environment[name])] for name in ("torch", "triton", "python", "commit", "date")),
    ]
    return table(["", ""], lines)


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation; the value alone where there is one."""
    sd = deviation(values)
    return f"{statistics.mean(values):.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
