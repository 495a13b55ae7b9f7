"""`python -m bench.ragged`: ragged batches, `TritonLSTM` against `nn.LSTM` on packed and on padded ones.

The same rows in three forms, called in turns: a `PackedSequence`, a padded batch with `lengths=`, which
`nn.LSTM` lacks, and a padded batch that is run whole. Writes ragged.json, ragged.md and ragged.png;
Ctrl-C leaves those of the run before as they were.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from bench import memory, ragged_report
from bench.cpu import chosen, quartiles
from bench.environment import cpu_name, environment
from bench.files import write_atomically
from bench.long import device_of, whole
from bench.measure import compare, default_device, gradient, in_turns, once, without_tf32
from bench.results import Record, default_folder
from lstm_triton import convert
from lstm_triton.recurrence import rnn_precision
from lstm_triton.tolerances import TOLERANCES

GROUPS = ("training step", "inference")
THREADS = 2
SECONDS = 4.0  # for the rounds of one case
LEAST, MOST = 5, 100  # rounds
# What a case may fail with: other values, an error of a backend or for want of memory, a process that hangs.
_FAILURES = (AssertionError, RuntimeError, MemoryError, subprocess.SubprocessError)


@dataclass(frozen=True)
class Rows:
    """A batch of rows of different lengths, float32; one layer, one direction."""

    batch: int
    input: int
    hidden: int
    kind: str  # "uniform", in [longest / 2, longest], "log-normal", with a median of 10, or "one", among rows of 10
    longest: int  # time steps of one row at least

    def __str__(self) -> str:
        return f"B{self.batch}-I{self.input}-H{self.hidden}-{self.kind}-{self.longest}"

    def lengths(self) -> Tensor:
        """(B,) unsorted, the same for each call."""
        generator = torch.Generator().manual_seed(0)
        if self.kind == "uniform":
            found = torch.randint(self.longest // 2, self.longest + 1, (self.batch,), generator=generator)
        elif self.kind == "log-normal":
            found = torch.exp(torch.randn(self.batch, generator=generator) * 1.2).mul(10).long().clamp(1, self.longest)
        else:
            found = torch.full((self.batch,), min(10, self.longest))
        found[self.batch // 2] = self.longest
        return found


_SIZES = ((32, 64, 64), (64, 32, 32), (8, 128, 128))
CASES = [Rows(*size, *kind) for kind in (("uniform", 40), ("uniform", 1000), ("log-normal", 500)) for size in _SIZES]
# What padding makes a hundred times as large, for the memory that it takes.
ONE_LONG = Rows(64, 64, 64, "one", 20000)


class Call:
    """One call on the rows: in a form ("packed", "lengths" or "padded"), a training step or inference.

    A training step is forward and backward with the gradients of the input and of all parameters, from a given
    gradient of the output, which is zero past a row's end. Packing is not part of it.
    """

    def __init__(self, module: nn.Module, rows: Rows, form: str, group: str) -> None:
        self.module, self.form, self.group = module, form, group
        self.lengths = rows.lengths()
        steps, device = int(self.lengths.max()), next(module.parameters()).device
        generator = torch.Generator().manual_seed(1)
        x, dy = (torch.randn(steps, rows.batch, n, generator=generator) for n in (rows.input, rows.hidden))
        dy[torch.arange(steps).unsqueeze(1) >= self.lengths] = 0
        x, dy = x.to(device), dy.to(device)
        self.packed = pack_padded_sequence(x, self.lengths, enforce_sorted=False)
        data = self.packed.data if form == "packed" else x
        self.doutput = pack_padded_sequence(dy, self.lengths, enforce_sorted=False).data if form == "packed" else dy
        self.input = data.detach().requires_grad_(group == "training step")
        module.train(group == "training step")

    def clear(self) -> None:
        self.input.grad = None
        self.module.zero_grad(set_to_none=True)

    def __call__(self) -> Tensor:
        with torch.set_grad_enabled(self.group == "training step"):
            if self.form == "packed":
                output = self.module(self.packed._replace(data=self.input))[0].data
            elif self.form == "lengths":
                output = self.module(self.input, lengths=self.lengths)[0]
            else:
                output = self.module(self.input)[0]
        if self.group == "training step":
            output.backward(self.doutput)
        return output

    def results(self) -> list[Tensor]:
        """The output, packed, and all gradients."""
        self.clear()
        found = [self().detach()]
        if self.group == "training step":
            found += [gradient(self.input), *(gradient(p) for p in self.module.parameters())]
        if self.form != "packed":
            found[:2] = [self._pack(x) if x.dim() == 3 else x for x in found[:2]]
        return [x.clone() for x in found]

    def share(self, other: "Call") -> None:
        """Takes the data of another call of the same form: where it lies can cost more than what is compared."""
        self.packed, self.input, self.doutput = other.packed, other.input, other.doutput

    def _pack(self, x: Tensor) -> Tensor:
        packed: PackedSequence = pack_padded_sequence(x, self.lengths, enforce_sorted=False)
        if self.form == "lengths" and x.count_nonzero() > packed.data.count_nonzero():
            raise AssertionError(f"a tensor of shape {tuple(x.shape)} isn't zero past the end of each row")
        return packed.data


def measure(rows: Rows, group: str, device: torch.device, seconds: float, least: int) -> Record:
    """Times in turns: as many rounds as fit, but `least` at least.

    Raises:
        AssertionError: values or gradients are not those of `nn.LSTM` on the packed batch.
    """
    torch.manual_seed(0)
    reference = nn.LSTM(rows.input, rows.hidden, device=device)
    ours = convert(reference)  # with the same weights, in the same memory
    calls = {
        "reference": Call(reference, rows, "packed", group),
        "ours": Call(ours, rows, "packed", group),
        "padded": Call(reference, rows, "padded", group),
        "lengths": Call(ours, rows, "lengths", group),
    }
    calls["ours"].share(calls["reference"])
    calls["lengths"].share(calls["padded"])
    with without_tf32():
        expected = calls["reference"].results()
    tolerance = TOLERANCES["tf32" if rnn_precision(device) == "tf32" else "fp32"]
    error = max(
        compare(f"{rows}, {name}", a, b, tolerance)
        for name in ("ours", "lengths")
        for a, b in zip(calls[name].results(), expected, strict=True)
    )
    ran = chosen(ours, calls["ours"].packed, group)
    taken = sum(once(call) for call in calls.values())
    rounds = max(least, min(MOST, int(seconds / taken)))
    times = dict(zip(calls, in_turns(list(calls.values()), rounds), strict=True))
    lengths = calls["ours"].lengths
    with torch.set_grad_enabled(group == "training step"):
        explained = ours.explain(calls["ours"].packed)  # type: ignore[operator]
    record: Record = {"case": str(rows), **asdict(rows), "group": group, "chosen": ran, "error": error}
    record |= {"rows": int(lengths.sum()), "padded_rows": int(lengths.max()) * rows.batch, "rounds": rounds}
    record["explained"] = explained
    for name, values in times.items():
        record[f"{name}_s_q1"], record[f"{name}_s"], record[f"{name}_s_q3"] = quartiles(values)
    pairs = {"ratio": ("reference", "ours"), "of_padded": ("ours", "padded"), "lengths_ratio": ("reference", "lengths")}
    for name, (a, b) in pairs.items():
        ratios = [x / y for x, y in zip(times[a], times[b], strict=True)]
        record[f"{name}_q1"], record[name], record[f"{name}_q3"] = quartiles(ratios)
    return record


def memory_of(name: str, device: torch.device) -> Record:
    """The peak of a training step on `ONE_LONG`: "ours", packed, or "padded", by `nn.LSTM`."""
    torch.manual_seed(0)
    lstm: nn.Module = nn.LSTM(ONE_LONG.input, ONE_LONG.hidden, device=device)
    if name == "ours":
        lstm = convert(lstm)
    form = "packed" if name == "ours" else "padded"
    small = Rows(ONE_LONG.batch, ONE_LONG.input, ONE_LONG.hidden, "one", 12)
    Call(lstm, small, form, "training step")()  # loads libraries, starts threads
    lstm.zero_grad(set_to_none=True)
    return memory.one_call(Call(lstm, ONE_LONG, form, "training step"), device)


def run(cases: Sequence[Rows], device: torch.device, threads: int, seconds: float, least: int, large: bool) -> Record:
    """Measures everything, for `ragged_report.write`; what fails is kept beside, with the reason.

    large: whether the memory of `ONE_LONG` is measured.
    """
    before, records, failed = torch.get_num_threads(), [], []
    peaks: Record = {}
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    torch.set_num_threads(threads)
    try:
        machine = environment() | {"device_type": device.type}
        if device.type == "cpu":
            machine["device"] = cpu_name()  # also where there is a GPU
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=len(cases) * len(GROUPS) + 2 * large)
            for rows in cases:
                for group in GROUPS:
                    progress.update(task, description=f"{rows}, {group}")
                    try:
                        records.append(measure(rows, group, device, seconds, least))
                    except _FAILURES as error:
                        failed.append({"name": f"{rows}, {group}", "outcome": "failed", "why": str(error)[:300]})
                    progress.advance(task)
            for name in ("ours", "padded") if large else ():
                progress.update(task, description=f"memory of {ONE_LONG}, {name}")
                try:
                    peaks[name] = memory.in_process("bench.ragged", "--memory", name, "--device", device.type)
                except _FAILURES as error:
                    failed.append({"name": f"memory, {name}", "outcome": "failed", "why": str(error)[:300]})
                progress.advance(task)
    finally:
        torch.set_num_threads(before)
    return {"environment": machine, "records": records, "memory": peaks, "not_measured": failed}


def case_list(text: str) -> list[Rows]:
    known = {str(rows): rows for rows in CASES}
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"should be of {', '.join(known)}, got {', '.join(unknown)!r}")
    return [known[name] for name in dict.fromkeys(names)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ragged", description=__doc__.split("\n\n")[0].split(": ", 1)[1]
    )
    cores = os.cpu_count() or 1
    parser.add_argument("--only", type=case_list, metavar="CASE,...", help=f"of {', '.join(map(str, CASES))}")
    parser.add_argument("--device", type=device_of, default=default_device(), help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=whole, default=min(THREADS, cores), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for a case's rounds (default: %(default)s)")
    parser.add_argument("--rounds", type=whole, default=LEAST, help="the fewest of a case (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default: reports/<device>)")
    parser.add_argument("--draw", action="store_true", help="draw the report from ragged.json again, measuring nothing")
    parser.add_argument("--memory", choices=("ours", "padded"), help="print one training step's memory, as JSON")
    options = parser.parse_args(arguments)
    if options.memory:
        print(json.dumps(memory_of(options.memory, options.device)))
        return 0
    if options.seconds < 0:
        parser.error("--seconds should be at least 0")
    if options.threads > cores:
        parser.error(f"--threads should be at most {cores}, this machine's cores")
    cuda = options.device.type == "cuda"
    folder = options.out or default_folder({"device": torch.cuda.get_device_name() if cuda else cpu_name()})
    if not options.draw:
        try:
            content = run(
                options.only or CASES, options.device, options.threads, options.seconds, options.rounds,
                options.only is None,
            )  # fmt: skip
        except KeyboardInterrupt:
            print("interrupted: nothing written", file=sys.stderr)
            return 130
        # Less --out, which says nothing about the figures.
        command = f"python -m bench.ragged --device {options.device} --threads {options.threads}"
        command += f" --seconds {options.seconds:g} --rounds {options.rounds}"
        command += f" --only {','.join(map(str, options.only))}" if options.only else ""
        content["environment"]["command"] = command
        write_atomically(folder / ragged_report.JSON, json.dumps(content, indent=1) + "\n")
    try:
        content = ragged_report.read(folder)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    written = ragged_report.write(content, folder)
    print(ragged_report.summary(content))
    print("\n".join(map(str, written)))
    return int(bool(content["not_measured"]))


if __name__ == "__main__":
    sys.exit(main())
