"""The files that a run of the benchmarks leaves: `benchmarks.json`, the source of all else, and `benchmarks.csv`."""

import csv
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.environment import slug

Record = dict[str, Any]

JSON, CSV = "benchmarks.json", "benchmarks.csv"
# Written after each benchmark, so that a run that is killed leaves what it had.
PART = "benchmarks.part.json"

_ROOT = Path(__file__).resolve().parents[1]


class Results:
    """What was measured, on what, and what was not."""

    def __init__(self, environment: dict[str, Any]) -> None:
        self.environment = environment
        self.records: list[Record] = []
        self.not_measured: list[dict[str, str]] = []

    @classmethod
    def read(cls, folder: Path) -> "Results":
        """From `folder`; a run that was killed there counts, as far as it came.

        Raises:
            FileNotFoundError, ValueError: there is no result, or not one of these.
        """
        if (folder / PART).exists():
            os.replace(folder / PART, folder / JSON)
        content = read(folder / JSON, ("environment", "records"), "pytest bench --benchmark-only")
        results = cls(content["environment"])
        results.records = content["records"]
        results.not_measured = content.get("not_measured", [])
        return results

    def write(self, folder: Path, finished: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"environment": self.environment, "records": self.records, "not_measured": self.not_measured}
        part = folder / PART
        part.write_text(json.dumps(content, indent=1) + "\n")
        if finished:
            os.replace(part, folder / JSON)
            self.write_csv(folder)

    def write_csv(self, folder: Path) -> None:
        columns = list(dict.fromkeys(key for record in self.records for key in record))
        with open(folder / CSV, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.records)

    def group(self, name: str) -> list[Record]:
        return [r for r in self.records if r["group"] == name]


def read(path: Path, keys: Iterable[str], command: str) -> dict[str, Any]:
    """What a result says that `command` has written.

    Raises:
        FileNotFoundError, ValueError: there is none, or it lacks one of the keys.
    """
    if not path.exists():
        raise FileNotFoundError(f"no {path.name} in {path.parent}; `{command}` makes one")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or not set(keys) <= set(content):
        raise ValueError(f"{path} is not a result of `{command}`: it lacks {' or '.join(keys)}")
    return content


def default_folder(environment: dict[str, Any]) -> Path:
    return _ROOT / "reports" / slug(environment["device"])
