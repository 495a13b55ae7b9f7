"""Time of forward, of a training step, and of inference on one sequence, for every provider."""

from typing import Any

import pytest
import torch

from bench import providers, shapes
from bench.measure import Call, clock, default_device, rounds_within

SECONDS = 0.3  # for the rounds of one benchmark, where they aren't too few then
LEAST, MOST = 5, 300


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    chosen = shapes.for_run(config.getoption("shapes"), timed=not config.getoption("benchmark_disable"))
    pairs = [(group, s) for s in chosen.speed for group in ("forward", "training step")]
    pairs += [("inference", s) for s in chosen.inference]
    cases = [(*pair, p) for pair in pairs for p in providers.available(default_device())]
    metafunc.parametrize(("group", "shape", "provider"), cases, ids=lambda value: str(value).replace(" ", "-"))


@pytest.mark.benchmark(timer=clock)
def test_speed(
    group: str, shape: shapes.Shape, provider: str, benchmark: Any, record: Any, device: torch.device
) -> None:
    call = Call(provider, shape, group, device)
    error = call.check()
    rounds = rounds_within(SECONDS, call, LEAST, MOST) if benchmark.enabled else 1
    benchmark.group = group
    benchmark.pedantic(call, setup=call.clear, rounds=rounds, warmup_rounds=1)
    record(provider, shape, error=error)
