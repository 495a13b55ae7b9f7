"""`python -m bench.sarcasm`: trains a recipe over several seeds and writes its report."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.sarcasm import data, published
from bench.sarcasm.cells import CELLS, LSTM
from bench.sarcasm.compare import compare
from bench.sarcasm.recipes import RECIPES, REPORTS
from bench.sarcasm.run import RunError, run

BACKENDS = ("auto", "eager", "triton", "torch")
ALL = "all"
INTERRUPTED = 130  # what a shell says of a command that Ctrl-C ended


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.sarcasm", description=__doc__)
    parser.add_argument(
        "--data",
        metavar="PATH|synthetic",
        help="the data set (JSON array, JSON lines, CSV, each maybe gzipped), or generated headlines; "
        "default: the file that LSTM_TRITON_DATA names, else a download kept in the cache folder",
    )
    parser.add_argument("--recipe", choices=RECIPES, default="published", help="default: %(default)s")
    parser.add_argument(
        "--cell",
        choices=(*CELLS, ALL),
        nargs="+",
        default=[LSTM],
        metavar="CELL",
        help=f"of the recipe's layers: {', '.join(CELLS)}, or {ALL}; default: {LSTM}. Others, or several, are compared "
        "in one report, in the sub-folder cells",
    )
    parser.add_argument(
        "--epochs",
        type=positive,
        metavar="N",
        help="default: the recipe's own number; of best, these are the epochs of classification, "
        "which come after a fixed number of epochs as a language model",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="S", help="default: 0 1 2 3 4, where cells are compared 0 1 2"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="the layers'; default: %(default)s")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the results, in a sub-folder by recipe; "
        "default: reports/sarcasm, for generated headlines reports/sarcasm-synthetic",
    )
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"should be at least 1, got {value}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code, 2 after an error that the user can mend."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = parser().parse_args(given)
    # The tensors are so small that a second thread costs more than it brings, and with one the
    # results do not depend on the number of cores.
    torch.set_num_threads(1)
    try:
        recipe = RECIPES[args.recipe]
        headlines = data.load(args.data)
        out = args.out or data.default_out(headlines)
        epochs = args.epochs or recipe.EPOCHS
        if args.cell == [LSTM]:
            folder = out / recipe.NAME
            summary = run(recipe, headlines, args.backend, epochs, args.seeds or range(5), folder)
            print(REPORTS[recipe.NAME](folder, summary))
        elif recipe is not published:
            raise RunError(f"the recipe {recipe.NAME!r} has no other cell than {LSTM!r}")
        else:
            names = [name for name in CELLS if name in args.cell or ALL in args.cell]
            print(compare(names, headlines, args.backend, epochs, args.seeds or range(3), out / "cells"))
    except (data.DataError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        command = " ".join(["python -m bench.sarcasm", *given])
        print(f"\nInterrupted. The same command goes on after the last finished epoch: {command}", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
