"""Does backend "auto" cost anything? `TritonLSTM` and `nn.LSTM` called in turns; the ratio of their times.

The time that pytest-benchmark prints is that of all the calls together.
"""

import statistics
from typing import Any

import pytest
import torch

from bench import providers, shapes
from bench.measure import Call, clock, interleave, median_ratio, once
from lstm_triton import convert

SECONDS = 1.5  # for the pairs of one benchmark, where they aren't too few then
LEAST, MOST = 15, 1000


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    chosen = shapes.for_run(config.getoption("shapes"), timed=not config.getoption("benchmark_disable"))
    cases = [(step, s) for s in chosen.auto for step in ("forward", "training step")]
    metafunc.parametrize(("step", "shape"), cases, ids=lambda value: str(value).replace(" ", "-"))


@pytest.mark.benchmark(group="auto", timer=clock)
def test_auto(step: str, shape: shapes.Shape, benchmark: Any, record: Any, device: torch.device) -> None:
    torch_lstm, ours = (Call(name, shape, step, device) for name in (providers.REFERENCE, providers.AUTO))
    error = ours.check()
    # The same weights and data in the same memory: where they lie can cost more than what is compared.
    ours.module = convert(torch_lstm.module)
    ours.input, ours.doutput = torch_lstm.input, torch_lstm.doutput
    once(torch_lstm)
    pairs = max(LEAST, min(MOST, round(SECONDS / (once(torch_lstm) + once(ours))))) if benchmark.enabled else 1
    times = benchmark.pedantic(interleave, args=(torch_lstm, ours, pairs), rounds=1)
    record(
        providers.AUTO, shape, error=error, step=step, pairs=pairs, ratio=median_ratio(*times),
        auto_median_s=statistics.median(times[1]), reference_median_s=statistics.median(times[0]),
    )  # fmt: skip
