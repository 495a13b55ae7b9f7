"""Calls that are timed, the clock, and the check that comes before it."""

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from bench import providers
from bench.shapes import Shape
from lstm_triton.recurrence import rnn_precision
from lstm_triton.tolerances import TOLERANCES

GROUPS = ("forward", "training step", "inference")


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clock() -> float:
    """Seconds, read when the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Repeated(Protocol):
    """What can be timed again and again, each time as if it were the first."""

    def clear(self) -> None: ...

    def __call__(self) -> Any: ...


class Call:
    """One call of a provider's module on one shape: what a benchmark repeats.

    "forward" records the graph as in training; "training step" is forward and backward with a given
    gradient of the output, all gradients gone before each; "inference" is forward without a graph.
    """

    def __init__(self, provider: str, shape: Shape, group: str, device: torch.device) -> None:
        if group not in GROUPS:
            raise ValueError(f"group should be one of {', '.join(GROUPS)}, got {group!r}")
        self.provider, self.shape, self.group = provider, shape, group
        self.module = providers.make(provider, providers.reference(shape, device))
        self.module.train(group != "inference")
        # detach: a tensor of its own, whose gradient no other call sees.
        self.input, self.doutput = (x.detach().to(device, shape.torch_dtype) for x in _data(shape))
        self.input.requires_grad_(group == "training step")

    def clear(self) -> None:
        """Drops all gradients, so that each round allocates and writes them instead of adding to them."""
        self.input.grad = None
        self.module.zero_grad(set_to_none=True)

    def __call__(self) -> Tensor:
        with torch.set_grad_enabled(self.group != "inference"):
            output = self.module(self.input)[0]
        if self.group == "training step":
            output.backward(self.doutput)
        return output

    def check(self) -> float:
        """Compares with `nn.LSTM`; the largest error, relative to each tensor's largest element.

        Raises:
            AssertionError: the output or a gradient is outside the tolerance of the dtype.
        """
        self.clear()
        found = {"output": self().detach()}
        if self.group == "training step":
            # Those of the loop's cells come in the same order as those of nn.LSTM.
            parameters = self.module.parameters()
            found["gradient of input"] = gradient(self.input)
            found |= {f"gradient of parameter {k}": gradient(p) for k, p in enumerate(parameters)}
        expected = _expected(self.shape, self.group == "training step", self.input.device)
        self.clear()
        limits = self._tolerance()
        return max(compare(f"{self.shape}: {name}", x, expected[name], limits) for name, x in found.items())

    def _tolerance(self) -> tuple[float, float]:
        name = self.shape.dtype
        if name == "fp32" and rnn_precision(self.input.device) == "tf32":
            name = "tf32"
        atol, rtol = TOLERANCES[name]
        if self.provider not in providers.OWN:
            # PyTorch may add up the weights' gradients of T steps in the dtype itself: a random walk of roundings.
            walk = torch.finfo(self.shape.torch_dtype).eps * self.shape.steps**0.5
            return max(atol, walk), max(rtol, walk)
        return atol, rtol


def compare(name: str, found: Tensor, expected: Tensor, tolerance: tuple[float, float]) -> float:
    """The largest error of `found`, relative to the largest element of `expected`.

    Raises:
        AssertionError: it is outside the tolerance (atol, rtol).
    """
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    a, b = found.to(expected.dtype) / scale, expected / scale
    atol, rtol = tolerance
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol, msg=lambda m: f"{name} differs from nn.LSTM's\n{m}")
    return float((a - b).abs().max())


def gradient(x: Tensor) -> Tensor:
    if x.grad is None:
        raise AssertionError(f"backward left a tensor of shape {tuple(x.shape)} without a gradient")
    return x.grad


@lru_cache(maxsize=2)
def _data(shape: Shape) -> tuple[Tensor, Tensor]:
    """The input (T, B, H) and the gradient of the output (T, B, D * H)."""
    generator = torch.Generator().manual_seed(1)
    size = (shape.steps, shape.batch, shape.hidden)
    return (
        torch.randn(*size, generator=generator),
        torch.randn(*size[:2], shape.directions * size[2], generator=generator),
    )


@lru_cache(maxsize=2)  # providers of one shape come one after the other
def _expected(shape: Shape, gradients: bool, device: torch.device) -> dict[str, Tensor]:
    """The output and gradients of `nn.LSTM`, in float32 or float64."""
    dtype = torch.float64 if shape.dtype == "fp64" else torch.float32
    lstm = providers.reference(shape, device).to(dtype)
    # Rounded as the providers' are, so that only the arithmetic differs.
    input, doutput = (x.detach().to(device, shape.torch_dtype).to(dtype) for x in _data(shape))
    input.requires_grad_(gradients)
    with without_tf32(), torch.set_grad_enabled(gradients):
        output = lstm(input)[0]
        if gradients:
            output.backward(doutput)
    expected = {"output": output.detach()}
    if gradients:
        expected["gradient of input"] = gradient(input)
        expected |= {f"gradient of parameter {k}": gradient(p) for k, p in enumerate(lstm.parameters())}
    return expected


@contextmanager
def without_tf32() -> Iterator[None]:
    """Lets cuDNN's recurrent layers compute in float32 as it is."""
    rnn: Any = torch.backends.cudnn.rnn
    given = rnn.fp32_precision
    rnn.fp32_precision = "ieee"
    try:
        yield
    finally:
        rnn.fp32_precision = given


def once(call: Repeated) -> float:
    """Seconds that one call takes."""
    call.clear()
    start = clock()
    call()
    return clock() - start


def rounds_within(seconds: float, call: Call, least: int, most: int) -> int:
    """How many rounds of `call` fit; calls it twice, which warms it up."""
    once(call)
    return max(least, min(most, round(seconds / once(call))))


def in_turns(calls: Sequence[Repeated], rounds: int) -> list[list[float]]:
    """Seconds of each of `calls` in each round, so that whatever else the machine does meets all alike."""
    times: list[list[float]] = [[] for _ in calls]
    enabled = gc.isenabled()
    gc.disable()
    try:
        for k in range(rounds):
            # Each is as often at each place of a round, and comes after each of its neighbours.
            order = [(i + k // 2) % len(calls) for i in range(len(calls))]
            for i in reversed(order) if k % 2 else order:
                times[i].append(once(calls[i]))
    finally:
        if enabled:
            gc.enable()
    return times


def interleave(a: Repeated, b: Repeated, pairs: int) -> tuple[list[float], list[float]]:
    """`in_turns` of two."""
    times_a, times_b = in_turns((a, b), pairs)
    return times_a, times_b


def median_ratio(times_a: list[float], times_b: list[float]) -> float:
    """The median over pairs of how many times as long `b` took as `a`."""
    return statistics.median(b / a for a, b in zip(times_a, times_b, strict=True))
