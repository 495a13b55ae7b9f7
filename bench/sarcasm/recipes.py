"""The recipes by name."""

from types import ModuleType

from bench.sarcasm import published

# What --recipe takes; a name without a module in RECIPES is announced, but not written yet.
CHOICES = ("published", "best")
RECIPES: dict[str, ModuleType] = {published.NAME: published}
