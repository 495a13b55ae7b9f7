"""`python -m bench.sarcasm.gates`: what the gates of the upper LSTM layer do over the tokens of a headline.

Trains the published recipe with one seed, chooses a headline by the rule of `choose`, and draws gates.png:
the gates i, f and o, the candidate g and the cell state c of each unit at each token.
Prints the probability of sarcasm after each token.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bench.files import replace
from bench.sarcasm import data, published
from bench.sarcasm.__main__ import BACKENDS, positive
from bench.sarcasm.published import UNKNOWN, Classifier, Corpus, Training
from bench.sarcasm.run import EpochProgress, RunError
from lstm_triton import inspect

matplotlib.use("Agg")

EPOCHS = 15  # where the review's log has its lowest test loss
SHORTEST, LONGEST = 8, 14  # tokens of a headline that is drawn
UNKNOWN_SHARE = 0.1
CONFIDENT = 0.95
PANELS = {
    "i": "i, input gate",
    "f": "f, forget gate",
    "o": "o, output gate",
    "g": "g, candidate",
    "c": "c, cell state",
}


@dataclass(frozen=True)
class Headline:
    """A headline as it is drawn.

    words: its tokens, those in brackets that the model only sees as <UNK>; row: (T,) their indices.
    course: (T,) the probability of sarcasm by the model after each token.
    """

    words: list[str]
    row: Tensor
    course: Tensor


def trained(corpus: Corpus, seed: int, epochs: int, backend: str, name: str) -> Classifier:
    """The published recipe's model after so many epochs, for evaluation, on the CPU."""
    training = Training(corpus, seed, backend, torch.device("cpu"), epochs)
    with EpochProgress(seed, epochs, 0, training.batches_per_epoch, name) as progress:
        for epoch in range(1, epochs + 1):
            progress.finish({"epoch": epoch} | training.epoch(progress.advance))
    return training.model.eval()


@torch.no_grad()
def course(model: Classifier, rows: Sequence[Tensor]) -> list[Tensor]:
    """The probability of sarcasm after each token, (length,), of each row of token indices, (length,), unpadded."""
    found = [torch.empty(0)] * len(rows)
    for length in {len(row) for row in rows}:
        places = [k for k, row in enumerate(rows) if len(row) == length]
        output, _ = model.rnn(model.embedding(torch.stack([rows[k] for k in places])))
        for k, logits in zip(places, model.linear(output), strict=True):
            found[k] = logits.softmax(1)[:, 1]
    return found


def choose(model: Classifier, corpus: Corpus, headlines: data.Headlines) -> str:
    """Of the sarcastic test headlines that the model is sure of in the end, the one it was the surest not to be.

    Looked at are those of 8 to 14 tokens of which at most UNKNOWN_SHARE are unknown. Sure is a probability of sarcasm
    of at least CONFIDENT after the last token; chosen is the lowest probability after any token, and of equals the
    first of the data set.

    Raises:
        RunError: there is none.
    """
    places = [
        k
        for k in sorted(corpus.test)
        if headlines.labels[k] == 1
        and SHORTEST <= len(corpus.rows[k]) <= LONGEST
        and (corpus.rows[k] == UNKNOWN).double().mean() <= UNKNOWN_SHARE
    ]
    courses = course(model, [corpus.rows[k] for k in places])
    sure = [(float(p.min()), k) for k, p in zip(places, courses, strict=True) if p[-1] >= CONFIDENT]
    if not sure:
        raise RunError(f"no sarcastic test headline has a probability of {CONFIDENT}: train more epochs, or --headline")
    return headlines.texts[min(sure)[1]]


def read(model: Classifier, corpus: Corpus, text: str) -> Headline:
    """A headline by its text; RunError where it has no tokens."""
    tokens = published.tokenize(text)
    if not tokens:
        raise RunError(f"the headline {text!r} has no tokens")
    words = [token if token in corpus.vocabulary else f"({token})" for token in tokens]
    row = torch.tensor([corpus.vocabulary.get(token, UNKNOWN) for token in tokens])
    return Headline(words, row, course(model, [row])[0])


@torch.no_grad()
def picture(model: Classifier, headline: Headline) -> Figure:
    """Five heat maps and the probability after each token, 900 pixels wide.

    Units are sorted by what they add to the logit of sarcasm, less that of the other label, after the last token.
    """
    values = inspect.trace(model.rnn, model.embedding(headline.row))[-1]  # (T, H) each
    output = model.linear.weight[1] - model.linear.weight[0]
    order = (output * values["h"][-1]).argsort(descending=True)
    figure = Figure(figsize=(9, 10.5), dpi=100, layout="constrained")
    *panels, last = figure.subplots(3, 2).flat
    largest = float(values["c"].abs().max())
    for axes, (name, title) in zip(panels, PANELS.items(), strict=True):
        low, high, colours = (0.0, 1.0, "viridis") if name in "ifo" else (-1.0, 1.0, "RdBu_r")
        if name == "c":
            low, high = -largest, largest
        grid = np.asarray(values[name][:, order].t())
        image = axes.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        figure.colorbar(image, ax=axes)
        axes.set_title(title)
        axes.set_yticks([])
        axes.set_ylabel("units: least … most for sarcasm")
        label_tokens(axes, headline)
    last.bar(range(len(headline.course)), headline.course.tolist(), color="tab:gray")
    last.axhline(0.5, color="black", linewidth=0.8, linestyle="--")
    last.set_ylim(0, 1)
    last.set_title("probability of sarcasm after each token")
    label_tokens(last, headline)
    figure.suptitle(f"Upper layer over a headline; probability of sarcasm in the end {headline.course[-1]:.3f}")
    return figure


def label_tokens(axes: Axes, headline: Headline) -> None:
    axes.set_xlim(-0.5, len(headline.words) - 0.5)
    axes.set_xticks(range(len(headline.words)), headline.words, rotation=50, ha="right", rotation_mode="anchor")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code, 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m bench.sarcasm.gates", description=__doc__)
    parser.add_argument("--data", metavar="PATH|synthetic", help="as of python -m bench.sarcasm")
    parser.add_argument("--epochs", type=positive, default=EPOCHS, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="the layers'; default: %(default)s")
    parser.add_argument("--headline", metavar="TEXT", help="default: chosen from the test split")
    parser.add_argument("--out", type=Path, help="folder of gates.png; default: as of python -m bench.sarcasm")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        headlines = data.load(args.data)
        corpus = Corpus(headlines)
        model = trained(corpus, args.seed, args.epochs, args.backend, headlines.name)
        headline = read(model, corpus, args.headline or choose(model, corpus, headlines))
        path = (args.out or data.default_out(headlines)) / "gates.png"
        figure = picture(model, headline)
        replace(path, lambda part: figure.savefig(part, format="png"))
    except (data.DataError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for word, probability in zip(headline.words, headline.course, strict=True):
        print(f"{word:>20} {probability:.4f}")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
