"""The recipes, and who writes their reports, by name."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.sarcasm import best, best_report, published, report

RECIPES: dict[str, ModuleType] = {published.NAME: published, best.NAME: best}
REPORTS: dict[str, Callable[[Path, dict[str, Any]], Path]] = {
    published.NAME: report.write,
    best.NAME: best_report.write,
}
