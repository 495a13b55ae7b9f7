"""`python -m bench.report [DIR]` redraws the tables and plots of a result of the benchmarks from its file."""

import argparse
import sys
from pathlib import Path

from bench import plots, tables
from bench.environment import environment
from bench.results import Results, default_folder


def draw(folder: Path) -> list[Path]:
    """Writes the report beside `benchmarks.json` and from nothing else; the files written.

    Raises:
        FileNotFoundError, ValueError: there is no result in `folder`, or not one of these.
    """
    results = Results.read(folder)
    results.write_csv(folder)
    made = plots.draw(results, folder)
    text = folder / "README.md"
    text.write_text(tables.markdown(results, made))
    return [text, *(folder / name for name, _ in made)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("folder", metavar="DIR", nargs="?", type=Path, help="default: that of this device in reports/")
    folder = parser.parse_args(arguments).folder or default_folder(environment())
    try:
        written = draw(folder)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
