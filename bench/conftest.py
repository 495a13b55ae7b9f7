"""What `pytest bench` needs: options, the machine's description, and a recorder that writes the report."""

import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import measure, providers, shapes
from bench.environment import environment
from bench.report import draw
from bench.results import Results, default_folder
from bench.shapes import Shape

RECORDER = "lstm-benchmark-recorder"
Add = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("LSTM benchmarks")
    group.addoption(
        "--shapes",
        help=f"a set of shapes ({', '.join(shapes.SETS)}) or shapes such as B32-T200-H128,B1-T20-H512-L2-D2-bf16; "
        "default: small, with --benchmark-disable smoke",
    )
    group.addoption(
        "--report-dir", type=Path, help="where the report goes, over what is there; default: reports/<device>"
    )
    group.addoption("--time-limit", type=float, help="seconds after which no further benchmark is started")


def pytest_configure(config: pytest.Config) -> None:
    try:
        shapes.for_run(config.getoption("shapes"), timed=True)
    except ValueError as error:
        raise pytest.UsageError(f"--shapes: {error}") from None
    if not config.getoption("benchmark_only", False) or config.getoption("benchmark_disable", False):
        return
    results = Results(environment())
    results.environment["command"] = " ".join(["pytest", *map(str, config.invocation_params.args)])
    config.pluginmanager.register(Recorder(config, results), RECORDER)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["lstm_triton"] = environment()


class Recorder:
    """Keeps what benchmarks measured, and reports it at the end of the run."""

    def __init__(self, config: pytest.Config, results: Results) -> None:
        self.results = results
        self.folder: Path = config.getoption("report_dir") or default_folder(results.environment)

    def add(self, record: dict[str, Any]) -> None:
        self.results.records.append(record)
        self.results.write(self.folder, finished=False)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        found = yield
        if "record" in getattr(item, "fixturenames", ()) and not found.passed:
            longrepr = found.longrepr
            text = longrepr[2] if isinstance(longrepr, tuple) else found.longreprtext
            errors = [line.removeprefix("E").strip() for line in text.splitlines() if line.startswith("E ")]
            why = (errors or [text])[0].removeprefix("Skipped: ")
            self.results.not_measured.append({"name": item.name, "outcome": found.outcome, "why": why[:300]})
        return found

    def pytest_sessionfinish(self) -> None:
        if self.results.records:
            self.results.write(self.folder)
            draw(self.folder)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.results.records:
            terminalreporter.write_line(f"{len(self.results.records)} results and plots are in {self.folder}")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return measure.default_device()


@pytest.fixture(scope="session")
def deadline(request: pytest.FixtureRequest) -> float:
    limit = request.config.getoption("time_limit")
    return float("inf") if limit is None else time.monotonic() + limit


@pytest.fixture(scope="session")
def machine() -> dict[str, Any]:
    return environment()


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any, deadline: float, machine: dict[str, Any]) -> Iterator[Add]:
    """`record(provider, shape, **values)` adds values to what pytest-benchmark keeps and to the report."""
    if time.monotonic() > deadline:
        pytest.skip("no time left (--time-limit)")

    def add(provider: str, shape: Shape, **values: Any) -> None:
        benchmark.extra_info.update(
            provider=provider,
            label=providers.label(provider, machine["device_type"], machine["hip"] is not None),
            shape=str(shape),
            **vars(shape),
            machine=machine["device"],
            **values,
        )

    yield add
    recorder = request.config.pluginmanager.get_plugin(RECORDER)
    if recorder is not None and benchmark.stats is not None and not benchmark.has_error:
        stats = benchmark.stats.stats
        timed = {
            "median_s": stats.median,
            "min_s": stats.min,
            "q1_s": stats.q1,
            "q3_s": stats.q3,
            "rounds": stats.rounds,
        }
        recorder.add({"group": benchmark.group, **timed, **benchmark.extra_info})
