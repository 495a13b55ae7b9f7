"""The files of a run: gradients.csv, runs.csv, curves.csv, and run.json with settings and environments."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.files import write_atomically
from bench.longterm.gradients import Size
from bench.longterm.train import Job, Outcome, Row, Settings

GRADIENTS, RUNS, CURVES, ABOUT = "gradients.csv", "runs.csv", "curves.csv", "run.json"
_JOB = Job._fields
RUN_COLUMNS = (*_JOB, "met", "steps", "sequences", "error", "correct", "skipped", "seconds", "test_wrong", "test_error")
CURVE_COLUMNS = (*_JOB, "step", "error")
GRADIENT_COLUMNS = ("curve", "lag", "log10_mean", "log10_p10", "log10_p90")
_WORDS = {"problem", "cell", "curve"}
_WHOLE = {"length", "seed", "met", "steps", "sequences", "skipped", "test_wrong", "step", "lag"}


class RecordError(Exception):
    """The folder's files can't be read or gone on with; the message says why and what to do."""


@dataclass
class Records:
    """All that the folder has: rows of the CSV files, the settings, and environment and command of each session.

    `size` is of the gradients, `settings` of the jobs.
    """

    folder: Path
    size: Size
    settings: Settings
    sessions: list[dict[str, Any]]
    gradients: list[Row]
    runs: list[Row]
    curves: list[Row]

    @property
    def done(self) -> set[Job]:
        return {job_of(row) for row in self.runs}

    def add(self, outcome: Outcome) -> None:
        """Keeps a job's outcome and writes both files, the curve first: a line of runs.csv says that it is there."""
        job = job_of(outcome.run)
        self.curves = [row for row in self.curves if job_of(row) != job] + outcome.curve
        self.runs.append(outcome.run)
        write_csv(self.folder / CURVES, CURVE_COLUMNS, self.curves)
        write_csv(self.folder / RUNS, RUN_COLUMNS, self.runs)

    def add_gradients(self, rows: list[Row]) -> None:
        self.gradients += rows
        write_csv(self.folder / GRADIENTS, GRADIENT_COLUMNS, self.gradients)

    def begin(self, session: dict[str, Any]) -> None:
        """Notes what is run where, before anything is."""
        self.sessions.append(session)
        about = {"gradients": self.size._asdict(), "settings": asdict(self.settings), "sessions": self.sessions}
        write_atomically(self.folder / ABOUT, json.dumps(about, indent=2) + "\n")


def load(folder: Path) -> Records | None:
    """What the folder has; None where it has no run.

    Raises:
        RecordError: a file is damaged.
    """
    path = folder / ABOUT
    if not path.exists():
        return None
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        rows = [read_csv(folder / name) for name in (GRADIENTS, RUNS, CURVES)]
        return Records(folder, Size(**about["gradients"]), Settings(**about["settings"]), about["sessions"], *rows)
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{folder} has a damaged file ({error}): remove the folder or give another --out") from None


def load_or_new(folder: Path, size: Size, settings: Settings) -> Records:
    """What the folder has, to go on with.

    Raises:
        RecordError: a file is damaged or of other settings.
    """
    found = load(folder)
    if found is None:
        return Records(folder, size, settings, [], [], [], [])
    old, new = _flat(found.size, found.settings), _flat(size, settings)
    if old != new:
        differing = ", ".join(f"{name} {old[name]} (now {new[name]})" for name in old if old[name] != new[name])
        raise RecordError(f"{folder} has results of other settings: {differing}; remove it or give another --out")
    return found


def _flat(size: Size, settings: Settings) -> dict[str, Any]:
    return {f"gradients' {name}": value for name, value in size._asdict().items()} | asdict(settings)


def job_of(row: Row) -> Job:
    return Job(*(row[name] for name in _JOB))


def write_csv(path: Path, columns: Sequence[str], rows: list[Row]) -> None:
    """A field is empty where the row lacks the column."""
    lines = [",".join(columns), *(",".join(_text(row.get(name, "")) for name in columns) for row in rows)]
    write_atomically(path, "\n".join(lines) + "\n")


def read_csv(path: Path) -> list[Row]:
    """The rows, without the columns that are empty in them; [] where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: _value(name, text) for name, text in row.items() if text} for row in csv.DictReader(file)]


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(name: str, text: str) -> Any:
    if name in _WORDS:
        return text
    return int(text) if name in _WHOLE else float(text)
