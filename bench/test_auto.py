"""What backend "auto" costs or brings: `TritonLSTM` and `nn.LSTM` called in turns; the ratio of their times.

The time that pytest-benchmark prints is that of all the calls together.
"""

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from bench import providers, shapes
from bench.measure import Call, clock, compare, gradient, interleave, median_ratio, once
from lstm_triton import convert

SECONDS = 1.5  # for the pairs of one benchmark, where they aren't too few then
LEAST, MOST = 15, 1000
PACKED = "packed training step"
PACKED_MOST = 128  # hidden units: nn.LSTM takes seconds for a packed batch of larger ones


class PackedCall(Call):
    """A training step on a packed batch: lengths evenly from a third of T to T, packing included."""

    def __init__(self, provider: str, shape: shapes.Shape, device: torch.device) -> None:
        super().__init__(provider, shape, "training step", device)
        self.lengths = torch.linspace(shape.steps, max(1, shape.steps / 3), shape.batch).long()

    def __call__(self) -> Tensor:
        packed = pack_padded_sequence(self.input, self.lengths)
        output = self.module(packed)[0].data
        output.backward(self.doutput.flatten(0, 1)[: output.size(0)])
        return output

    def check_against(self, other: Call) -> float:
        """Compares outputs and gradients, of the same parameters, as `check` does."""
        found = []
        for call in (self, other):
            call.clear()
            output = call().detach()
            found.append([output, *(gradient(p).clone() for p in (call.input, *call.module.parameters()))])
        return max(compare(f"{self.shape}", a, b, self._tolerance()) for a, b in zip(*found, strict=True))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    chosen = shapes.for_run(config.getoption("shapes"), timed=not config.getoption("benchmark_disable")).auto
    cases = [(step, s) for s in chosen for step in ("forward", "training step")]
    cases += [(PACKED, s) for s in chosen if s.batch > 1 and s.hidden <= PACKED_MOST]
    metafunc.parametrize(("step", "shape"), cases, ids=lambda value: str(value).replace(" ", "-"))


@pytest.mark.benchmark(group="auto", timer=clock)
def test_auto(step: str, shape: shapes.Shape, benchmark: Any, record: Any, device: torch.device) -> None:
    torch_lstm, ours = (
        PackedCall(name, shape, device) if step == PACKED else Call(name, shape, step, device)
        for name in (providers.REFERENCE, providers.AUTO)
    )
    # The same weights and data in the same memory: where they lie can cost more than what is compared.
    ours.module = convert(torch_lstm.module)
    ours.input, ours.doutput = torch_lstm.input, torch_lstm.doutput
    error = ours.check_against(torch_lstm) if isinstance(ours, PackedCall) else ours.check()
    once(torch_lstm)
    pairs = max(LEAST, min(MOST, round(SECONDS / (once(torch_lstm) + once(ours))))) if benchmark.enabled else 1
    times = benchmark.pedantic(interleave, args=(torch_lstm, ours, pairs), rounds=1)
    record(
        providers.AUTO, shape, error=error, step=step, pairs=pairs, ratio=median_ratio(*times),
        auto_median_s=statistics.median(times[1]), reference_median_s=statistics.median(times[0]),
    )  # fmt: skip
