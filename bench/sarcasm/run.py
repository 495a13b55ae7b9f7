"""Seeds and epochs of a recipe, with checkpoints and the files that are written.

A recipe is a module with NAME, EPOCHS (default number), `Corpus(headlines)` with `facts`, and
`Training(corpus, seed, backend, device, epochs, cell)` with `total_epochs` (more than `epochs` where there
is pre-training), `batches_per_epoch`, `epoch(advance)`, `state_dict`, `load_state_dict`.
"""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.environment import environment
from bench.files import replace, write_atomically
from bench.sarcasm import cells
from bench.sarcasm.data import SYNTHETIC, Headlines
from bench.sarcasm.results import Row, summarize, write_csv

OPTIONS = ("recipe", "backend", "epochs", "data", "data_sha256", "device", "cell")
UNSAID = {"cell": cells.LSTM}  # what results mean that don't name the option


class RunError(Exception):
    """The run cannot start or go on; the message says why and what to do."""


def run(
    recipe: ModuleType,
    headlines: Headlines,
    backend: str,
    epochs: int,
    seeds: Sequence[int],
    folder: Path,
    cell: str = cells.LSTM,
) -> dict[str, Any]:
    """Trains each seed that `folder` has no results of yet, and writes the CSV files and the summary.

    Args:
        recipe: one of `bench.sarcasm.RECIPES`.
        headlines: the data set.
        backend: the layers'.
        epochs: of each seed, as the recipe counts them.
        seeds: may name seeds finished before: these are not trained again.
        folder: of the results, created where it isn't there.
        cell: of `bench.sarcasm.cells`.

    Returns:
        The summary over all seeds in the folder, as in summary.json.

    Raises:
        RunError: the folder holds results or checkpoints of other options, or the backend cannot run.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values = (recipe.NAME, backend, epochs, headlines.name, headlines.fingerprint, device.type, cell)
    options = dict(zip(OPTIONS, values, strict=True))
    summary = finished(folder, options)
    corpus = recipe.Corpus(headlines)
    check_backend(recipe, corpus, backend, device, cell)
    machine = environment()  # now: the commit may be another when the run ends
    if headlines.synthetic:
        print("Synthetic data: generated headlines, the figures say nothing about the real data set.")
    for seed in seeds:
        if seed in summary.get("seeds", []):
            print(f"seed {seed}: finished before")
            continue
        rows = train_seed(recipe, corpus, seed, options, device, folder)
        write_csv(folder / f"seed-{seed}.csv", rows)
        done = sorted({seed, *summary.get("seeds", [])})
        summary = summarize(folder, done, options, corpus.facts, machine)
        write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        remove_checkpoint(folder, seed)
    return summary


def check_backend(recipe: ModuleType, corpus: Any, backend: str, device: torch.device, cell: str) -> None:
    """Raises RunError where the recipe cannot run with the cell, or through the backend, here."""
    try:
        recipe.Training(corpus, 0, backend, device, cell=cell)
        cells.build(cell, 1, 1, backend=backend).to(device)(torch.zeros(1, 1, 1, device=device))
    except (ValueError, RuntimeError) as error:
        raise RunError(f"{error} (recipe {recipe.NAME!r})") from None


def finished(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The summary in the folder, {} where there is none; RunError where it is of other options."""
    path = folder / "summary.json"
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise RunError(f"{path} is damaged: remove it or give another --out") from None
    refuse_others(f"{folder} holds results", summary, options)
    return summary


def refuse_others(what: str, found: dict[str, Any], options: dict[str, Any]) -> None:
    """RunError where `found` is of other options, so that no run overwrites another's results."""
    known = UNSAID | found
    differing = [f"{k} {known.get(k)} (now {options[k]})" for k in OPTIONS if known.get(k) != options[k]]
    if differing:
        raise RunError(f"{what} of other options: {', '.join(differing)}; remove it or give another --out")


def train_seed(
    recipe: ModuleType, corpus: Any, seed: int, options: dict[str, Any], device: torch.device, folder: Path
) -> list[Row]:
    """One row of results for each epoch; goes on from the seed's checkpoint where there is one."""
    training = recipe.Training(corpus, seed, options["backend"], device, options["epochs"], options["cell"])
    total = training.total_epochs
    rows: list[Row] = []
    path = checkpoint_path(folder, seed)
    if path.exists():
        checkpoint = load_checkpoint(path)
        refuse_others(f"{path} is a checkpoint", checkpoint["options"], options)
        training.load_state_dict(checkpoint["training"])
        set_generators(checkpoint["generators"], device)
        rows = checkpoint["rows"]
        print(f"seed {seed}: goes on after epoch {len(rows)}")
    with EpochProgress(seed, total, len(rows), training.batches_per_epoch, options["data"]) as progress:
        for epoch in range(len(rows) + 1, total + 1):
            rows.append({"epoch": epoch} | training.epoch(progress.advance))
            state = {"training": training.state_dict(), "generators": generators(device)}
            save_checkpoint(path, {"options": options, "rows": rows, **state})
            progress.finish(rows[-1])
    return rows


def generators(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's generators that training draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


class EpochProgress:
    """Bars for epochs and batches on a terminal, elsewhere a line an epoch alone."""

    def __init__(self, seed: int, epochs: int, done: int, batches: int, data: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, disable=not Console().is_terminal, transient=True)
        label = f"seed {seed}" + (f" ({SYNTHETIC} data)" if data == SYNTHETIC else "")
        self.epochs = self.progress.add_task(f"{label}, epochs", total=epochs, completed=done)
        self.batches = self.progress.add_task("batches", total=batches)
        self.label, self.count = label, epochs

    def __enter__(self) -> "EpochProgress":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def advance(self) -> None:
        self.progress.advance(self.batches)

    def finish(self, row: Row) -> None:
        self.progress.advance(self.epochs)
        self.progress.reset(self.batches)
        line = f"{self.label}, epoch {row['epoch']:.0f}/{self.count}: {figures(row)}"
        if self.progress.disable:
            print(line, flush=True)
        else:
            self.progress.console.print(line, highlight=False)


def figures(row: Row) -> str:
    """What a row says of each split, for the screen."""
    parts = []
    for split in ("train", "test"):
        forms = ((f"{split}_loss", "{:.4f}"), (f"{split}_accuracy", "{:.2f} %"))
        values = [form.format(row[name]) for name, form in forms if name in row]
        if values:
            parts.append(" ".join([split, *values]))
    return ", ".join([*parts, f"{row['seconds']:.1f} s"])


def checkpoint_path(folder: Path, seed: int) -> Path:
    return folder / ".checkpoints" / f"seed-{seed}.pt"


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / ".gitignore").write_text("*\n")
    replace(path, lambda part: torch.save(checkpoint, part))


def load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        raise RunError(f"{path} is damaged: remove it or give another --out") from None


def remove_checkpoint(folder: Path, seed: int) -> None:
    """Removes the seed's checkpoint, and the folder with the last one."""
    path = checkpoint_path(folder, seed)
    path.unlink(missing_ok=True)
    if path.parent.exists() and not list(path.parent.glob("*.pt")):
        (path.parent / ".gitignore").unlink(missing_ok=True)
        path.parent.rmdir()
