"""Memory of a training step, for every provider; its time is that of one step, for what it's worth."""

from typing import Any

import pytest
import torch

from bench import providers, shapes
from bench.measure import Call, clock, default_device
from bench.memory import kept_for_backward, peak_bytes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    chosen = shapes.for_run(config.getoption("shapes"), timed=not config.getoption("benchmark_disable"))
    cases = [(s, p) for s in chosen.memory for p in providers.available(default_device(), providers.OF_MEMORY)]
    metafunc.parametrize(("shape", "provider"), cases, ids=str)


@pytest.mark.benchmark(group="memory", timer=clock)
def test_memory(shape: shapes.Shape, provider: str, benchmark: Any, record: Any, device: torch.device) -> None:
    call = Call(provider, shape, "training step", device)
    error = call.check()
    kept = kept_for_backward(call)
    peak, kind = peak_bytes(provider, shape, device)
    benchmark.pedantic(call, setup=call.clear, rounds=1)
    # What a step, batch row, layer and direction keeps, in units of one hidden vector.
    vectors = shape.steps * shape.batch * shape.layers * shape.directions
    per_vector = kept / (vectors * shape.hidden * shape.torch_dtype.itemsize)
    record(
        provider, shape, error=error, kept_bytes=kept, kept_hidden_vectors=per_vector, peak_bytes=peak, peak_kind=kind
    )
