"""`python -m lstm_triton plan` and `python -m lstm_triton doctor`."""

import argparse
import importlib
import sys
from typing import NoReturn

from lstm_triton.gpu import gpus, report

_USAGE = """usage: python -m lstm_triton COMMAND [OPTIONS]

commands:
  plan    how a layer would run on a GPU, which need not be there, and what a time step is predicted to take
  doctor  what this machine has, and whether the kernels are right on it

`python -m lstm_triton COMMAND --help` tells more."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def plan(arguments: list[str]) -> int:
    """`python -m lstm_triton plan`."""
    parser = _Parser(
        prog="python -m lstm_triton plan",
        description="How an LSTM, or another cell, would run on a GPU, which need not be there, by the kernels of "
        "lstm_triton, and what a time step is predicted to take, term by term. Nothing is measured.",
        epilog="example: python -m lstm_triton plan --gpu h100 --hidden 1024 --batch 32 --dtype bf16",
    )
    parser.add_argument("--gpu", metavar="NAME", help=f"one of {', '.join(gpus.GPUS)} (default: the one that is there)")
    parser.add_argument("--cell", default="lstm", metavar="NAME", help="such as gru, lstm-norm (default: %(default)s)")
    parser.add_argument("--hidden", type=int, required=True, metavar="H", help="hidden_size")
    parser.add_argument("--batch", type=int, required=True, metavar="B")
    parser.add_argument("--input", type=int, metavar="I", help="input_size (default: H)")
    parser.add_argument("--steps", type=int, default=1024, metavar="T", help="time steps (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=1, metavar="L", help="num_layers (default: %(default)s)")
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--proj", type=int, default=0, metavar="K", help="proj_size (default: none)")
    parser.add_argument("--dtype", default="fp32", help=f"{', '.join(report.DTYPES)} (default: %(default)s)")
    parser.add_argument("--inference", action="store_true", help="forward alone, which keeps nothing for backward")
    tf32 = parser.add_mutually_exclusive_group()
    tf32.add_argument("--tf32", dest="tf32", action="store_true", default=None, help="products of fp32 as TF32")
    tf32.add_argument("--no-tf32", dest="tf32", action="store_false", help="not (default: as PyTorch's setting is)")
    given = vars(parser.parse_args(arguments))
    training = not given.pop("inference")
    try:
        print(report.plan(**given, training=training))
    except (TypeError, ValueError, RuntimeError) as error:
        parser.error(str(error))
    return 0


def main(arguments: list[str] | None = None) -> int:
    command, *rest = sys.argv[1:] if arguments is None else arguments or [""]
    if command == "plan":
        return plan(rest)
    if command == "doctor":
        return importlib.import_module("lstm_triton.doctor").main(rest)
    if command in ("-h", "--help"):
        print(_USAGE)
        return 0
    print(f"python -m lstm_triton: the command should be plan or doctor, got {command!r}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
