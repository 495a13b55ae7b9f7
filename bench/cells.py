"""`python -m bench.cells`: a training step of each cell against the same cell as a loop over time steps in PyTorch.

All ways of a cell have the same weights and the same input, values and gradients are compared before, and they are
called in turns. Where PyTorch has an operator for the cell, its module is among them. Writes cells.json, cells.md and
cells.png.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from bench import cell_loops, cells_report, results
from bench.cell_loops import P_C, P_H, P_WEIGHT, Loop, Step, WeightDropped
from bench.cpu import chosen, numbers, quartiles
from bench.environment import cpu_name, environment
from bench.files import write_atomically
from bench.measure import compare, gradient, in_turns, once
from bench.own_cell import MinimalGatedUnit
from bench.results import Record, default_folder
from lstm_triton import TritonGRU, TritonLSTM, TritonRNN, dispatch, revert
from lstm_triton.tolerances import TOLERANCES

BATCH, STEPS, HIDDEN = 32, 100, 64
# Time steps after which values are compared: layer norm makes rounding errors grow from step to step.
COMPARED = 8
SECONDS, LEAST, MOST = 6.0, 9, 200  # of rounds of a cell


class Entry(NamedTuple):
    """A cell: our module, and the loop's step."""

    name: str
    make: Callable[..., Any]
    options: dict[str, Any]
    step: Step
    loop: type[Loop] = Loop


ENTRIES = (
    Entry("LSTM", TritonLSTM, {}, cell_loops.lstm),
    Entry("LSTM, layer norm", TritonLSTM, {"layer_norm": True}, cell_loops.layer_norm),
    Entry("LSTM, peepholes", TritonLSTM, {"peephole": True}, cell_loops.peephole),
    Entry("LSTM, coupled gates", TritonLSTM, {"coupled_gates": True}, cell_loops.coupled),
    Entry("LSTM of 1997", TritonLSTM, {"forget_gate": False}, cell_loops.carousel),
    Entry("LSTM, zoneout", TritonLSTM, {"zoneout": (P_H, P_C)}, cell_loops.zoneout),
    Entry("LSTM, weight dropout", TritonLSTM, {"weight_dropout": P_WEIGHT}, cell_loops.lstm, WeightDropped),
    Entry("GRU", TritonGRU, {}, cell_loops.gru),
    Entry("RNN, tanh", TritonRNN, {}, cell_loops.rnn_tanh),
    Entry("RNN, relu", TritonRNN, {"nonlinearity": "relu"}, cell_loops.rnn_relu),
    Entry("minimal gated unit", MinimalGatedUnit, {}, cell_loops.minimal_gated_unit),
)


class Training:
    """A training step of a module: forward, and backward with a given gradient of the output."""

    def __init__(self, module: nn.Module, input: Tensor, doutput: Tensor) -> None:
        self.module, self.input, self.doutput = module, input.detach().requires_grad_(), doutput

    def clear(self) -> None:
        self.input.grad = None
        self.module.zero_grad(set_to_none=True)

    def __call__(self, steps: int | None = None) -> Tensor:
        found = self.module(self.input[:steps])
        output = found[0] if isinstance(found, tuple) else found
        output.backward(self.doutput[:steps])
        return output

    def values(self) -> list[Tensor]:
        """The output and all gradients of the first steps, in evaluation, where nothing is drawn."""
        self.module.eval()
        self.clear()
        found = [self(COMPARED).detach(), gradient(self.input), *(gradient(p) for p in self.module.parameters())]
        self.clear()
        self.module.train()
        return found


def ways(entry: Entry, batch: int, steps: int, hidden: int) -> dict[str, Training]:
    """The cell as a loop, by backends "auto" and "eager" and, where PyTorch has it, by its module."""
    torch.manual_seed(0)
    x, dy = torch.randn(steps, batch, hidden), torch.randn(steps, batch, hidden)
    ours = entry.make(hidden, hidden, **entry.options)
    found = {"loop": Training(entry.loop(ours, entry.step), x, dy), "auto": Training(ours, x, dy)}
    eager = entry.make(hidden, hidden, **entry.options, backend="eager")
    eager.load_state_dict(ours.state_dict())
    found["eager"] = Training(eager, x, dy)
    if ours.cell.operator is not None and set(entry.options) <= {"nonlinearity"}:
        plain = entry.make(hidden, hidden, **entry.options)
        plain.load_state_dict(ours.state_dict())
        found["torch"] = Training(revert(plain), x, dy)
    return found


def measure(entry: Entry, threads: int, seconds: float, least: int, sizes: tuple[int, int, int]) -> Record:
    """The times of all ways of a cell, called in turns.

    Raises:
        AssertionError: values or gradients of two ways differ.
    """
    torch.set_num_threads(threads)
    found = ways(entry, *sizes)
    expected = found["loop"].values()
    limits = (10 * TOLERANCES["fp32"][0],) * 2  # both sides round in float32
    for name, call in found.items():
        for k, (a, b) in enumerate(zip(call.values(), expected, strict=True)):
            compare(f"{entry.name}, {name}, tensor {k}", a, b, limits)
    names, calls = list(found), list(found.values())
    for call in calls:
        once(call)
    rounds = max(least, min(MOST, int(seconds / sum(once(call) for call in calls))))
    times = dict(zip(names, in_turns(calls, rounds), strict=True))
    record: Record = {
        "cell": entry.name, "threads": threads, "rounds": rounds, "batch": sizes[0], "steps": sizes[1],
        "hidden": sizes[2], "chosen": chosen(found["auto"].module, found["auto"].input, "training step"),
    }  # fmt: skip
    for name, values in times.items():
        record[f"{name}_s"] = statistics.median(values)
        if name != "auto":
            q1, median, q3 = quartiles([a / b for a, b in zip(values, times["auto"], strict=True)])
            record |= {f"{name}_ratio_q1": q1, f"{name}_ratio": median, f"{name}_ratio_q3": q3}
    return record


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cells", description=__doc__.split("\n\n")[0].split(": ", 1)[1]
    )
    cores = os.cpu_count() or 1
    names = [entry.name for entry in ENTRIES]
    parser.add_argument("--threads", type=numbers, metavar="N,...", help="default: 1,2 (of as many cores)")
    parser.add_argument("--only", metavar="CELL;...", help=f"some of {'; '.join(names)}")
    parser.add_argument("--sizes", type=int, nargs=3, default=(BATCH, STEPS, HIDDEN), metavar=("B", "T", "H"))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for a cell's rounds (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=LEAST, help="the fewest of a cell (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default: reports/<device>)")
    parser.add_argument("--draw", action="store_true", help="draw the report from cells.json again, measuring nothing")
    options = parser.parse_args(arguments)
    folder = options.out or default_folder({"device": cpu_name()})
    if not options.draw:
        if dispatch.interpreting():
            parser.error(
                "TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, whose times say nothing; unset it"
            )
        wanted = names if options.only is None else [x.strip() for x in options.only.split(";")]
        if unknown := set(wanted) - set(names):
            parser.error(f"--only takes some of {'; '.join(names)}, got {'; '.join(sorted(unknown))}")
        threads = options.threads or [n for n in (1, 2) if n <= cores]
        cases = [(n, entry) for n in threads for entry in ENTRIES if entry.name in wanted]
        records, before = [], torch.get_num_threads()
        try:
            for n, entry in track(cases, "cells", console=Console(stderr=True), transient=True):
                records.append(measure(entry, n, options.seconds, options.rounds, tuple(options.sizes)))
        except KeyboardInterrupt:
            print("interrupted: nothing written", file=sys.stderr)
            return 130
        finally:
            torch.set_num_threads(before)
        command = f"python -m bench.cells --threads {','.join(map(str, threads))} --seconds {options.seconds:g}"
        command += (
            f" --sizes {' '.join(map(str, options.sizes))}" if tuple(options.sizes) != (BATCH, STEPS, HIDDEN) else ""
        )
        machine = environment() | {"device": cpu_name(), "device_type": "cpu"}
        machine |= {"threads": ", ".join(map(str, threads)), "command": command}
        write_atomically(
            folder / cells_report.JSON, json.dumps({"environment": machine, "records": records}, indent=1) + "\n"
        )
    content = results.read(folder / cells_report.JSON, ("environment", "records"), "python -m bench.cells")
    written = cells_report.write(content, folder)
    print(cells_report.tables(content["records"]))
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
