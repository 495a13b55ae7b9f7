"""How the gradient at an earlier time step shrinks or grows with the lag, in networks that haven't been trained."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from bench.longterm.cells import set_bias, states
from lstm_triton import TritonGRU, TritonLSTM, TritonRNN

Row = dict[str, Any]


class Size(NamedTuple):
    """Of the measurement: input and hidden units, lags, steps before them, random networks, random inputs of each."""

    inputs: int = 8
    hidden: int = 64
    lags: int = 200
    warm_up: int = 50
    networks: int = 10
    batch: int = 16


class Curve(NamedTuple):
    """A kind of network: what the plot calls it, its colour and dashes, and how one is made."""

    label: str
    colour: str
    dashes: str
    make: Callable[[Size, Generator], nn.Module]


def tanh_rnn(radius: float) -> Callable[[Size, Generator], nn.Module]:
    """A tanh RNN whose recurrent matrix is `radius` times a random orthogonal one, the rest as PyTorch makes it.

    All its eigenvalues, and its singular values, have this modulus: the gradient shrinks at least by `radius` a step.
    """

    def make(size: Size, generator: Generator) -> nn.Module:
        module = TritonRNN(size.inputs, size.hidden, dtype=torch.float64)
        weight = module.get_parameter("weight_hh_l0")
        nn.init.orthogonal_(weight, gain=radius, generator=generator)
        return module

    return make


def lstm(forget_bias: float | None = None, forget_gate: bool = True) -> Callable[[Size, Generator], nn.Module]:
    return lambda size, generator: TritonLSTM(
        size.inputs, size.hidden, dtype=torch.float64, forget_bias=forget_bias, forget_gate=forget_gate
    )


def gru(update_bias: float | None = None) -> Callable[[Size, Generator], nn.Module]:
    """A GRU; `update_bias` is that of z, which keeps h, as the forget gate keeps an LSTM's c."""

    def make(size: Size, generator: Generator) -> nn.Module:
        module = TritonGRU(size.inputs, size.hidden, dtype=torch.float64)
        if update_bias is not None:
            set_bias(module, size.hidden, torch.full((size.hidden,), update_bias))  # rows are r, z, n
        return module

    return make


# Okabe and Ito's colours, which colour-blind readers tell apart.
CURVES = {
    "rnn-0.5": Curve("tanh RNN, radius 0.5", "#000000", ":", tanh_rnn(0.5)),
    "rnn-1.0": Curve("tanh RNN, radius 1", "#000000", "--", tanh_rnn(1.0)),
    "rnn-1.5": Curve("tanh RNN, radius 1.5", "#000000", "-", tanh_rnn(1.5)),
    "lstm1997": Curve("LSTM of 1997", "#009E73", "-", lstm(forget_gate=False)),
    "lstm": Curve("LSTM, forget bias about 0 (PyTorch's)", "#D55E00", ":", lstm()),
    "lstm-1": Curve("LSTM, forget bias 1", "#D55E00", "--", lstm(1.0)),
    "lstm-5": Curve("LSTM, forget bias 5", "#D55E00", "-", lstm(5.0)),
    "gru": Curve("GRU, update bias about 0 (PyTorch's)", "#0072B2", ":", gru()),
    "gru-5": Curve("GRU, update bias 5", "#0072B2", "-", gru(5.0)),
}


def norms(module: nn.Module, input: Tensor, direction: Tensor, lags: int) -> Tensor:
    """Norms of the gradient of `direction` · h_t at the states of the steps before.

    The module is called a step at a time with the states passed on, so that the states between steps are tensors
    whose gradient autograd keeps: the derivative by h_{t-k} (an LSTM's: by h_{t-k} and c_{t-k}, taken together as
    one vector), through everything that later steps make of it. Steps before the last `lags` run without gradients.

    Args:
        module: one layer, one direction.
        input: (T, B, input size), T > lags.
        direction: (B, H), the gradient of the loss at h_t.
        lags: the largest k.

    Returns:
        (lags + 1, B), for k from 0; k = 0 has the norms of `direction`.
    """
    before = len(input) - lags - 1
    hx = None
    if before:
        with torch.no_grad():
            _, hx = module(input[:before])
    kept: list[tuple[Tensor, ...]] = []
    for x in input[before:].split(1):
        _, hx = module(x, hx)
        kept.append(states(hx))
        for state in kept[-1]:
            state.retain_grad()
    # Rows don't meet, so the gradient of the sum has each row's own.
    (direction * kept[-1][0][0]).sum().backward()
    found = []
    for group in reversed(kept):
        # The loss doesn't depend on c_t itself: no gradient.
        squares = [state.grad[0].square().sum(1) for state in group if state.grad is not None]
        found.append(torch.stack(squares).sum(0).sqrt())
    return torch.stack(found)


def measure(name: str, size: Size, advance: Callable[[], None] = lambda: None) -> list[Row]:
    """A line of gradients.csv for each lag: geometric mean, 10th and 90th percentile over networks and inputs.

    Inputs are standard normal, the loss is a random unit vector times h_t: norms are relative to that of lag 0.
    """
    columns = []
    for seed in range(size.networks):
        torch.manual_seed(seed)
        generator = Generator().manual_seed(seed)
        module = CURVES[name].make(size, generator)
        steps = size.warm_up + size.lags + 1
        input = torch.randn(steps, size.batch, size.inputs, dtype=torch.float64, generator=generator)
        direction = torch.randn(size.batch, size.hidden, dtype=torch.float64, generator=generator)
        columns.append(norms(module, input, nn.functional.normalize(direction), size.lags))
        advance()
    logs = torch.cat(columns, 1).log10()
    low, high = torch.quantile(logs, torch.tensor([0.1, 0.9], dtype=logs.dtype), dim=1)
    found = zip(logs.mean(1).tolist(), low.tolist(), high.tolist(), strict=True)
    return [
        {"curve": name, "lag": lag, "log10_mean": mean, "log10_p10": p10, "log10_p90": p90}
        for lag, (mean, p10, p90) in enumerate(found)
    ]
