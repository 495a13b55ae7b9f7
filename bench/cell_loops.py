"""Recurrent cells as a loop over the time steps in PyTorch, as one writes them: what `python -m bench.cells` compares.

Each step is two products, `F.linear` of the input and of h, and pointwise operations; autograd does the rest.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lstm_triton import TritonRNNBase

Step = Callable[["Loop", Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Loop(nn.Module):
    """One layer of a cell, step by step; its parameters are copies of those of a Triton module of one layer."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor
    gain_ih: Tensor
    gain_hh: Tensor
    gain_c: Tensor
    bias_c: Tensor
    weight_ch: Tensor
    w_hh: Tensor  # of a call

    def __init__(self, module: TritonRNNBase, step: Step) -> None:
        super().__init__()
        self.step, self.hidden = step, module.hidden_size
        for name, parameter in module.named_parameters():
            self.register_parameter(name.removesuffix("_l0"), nn.Parameter(parameter.detach().clone()))

    def forward(self, input: Tensor) -> Tensor:
        """The outputs (T, B, H) of an input (T, B, I), from zeros."""
        object.__setattr__(self, "w_hh", self.recurrent())  # no parameter of its own
        h = c = input.new_zeros(input.size(1), self.hidden)
        outputs = []
        for x in input.unbind(0):
            h, c = self.step(self, x, h, c)
            outputs.append(h)
        return torch.stack(outputs)

    def recurrent(self) -> Tensor:
        """The recurrent weights of a call."""
        return self.weight_hh

    def sums(self, x: Tensor, h: Tensor) -> Tensor:
        return F.linear(x, self.weight_ih, self.bias_ih) + F.linear(h, self.w_hh, self.bias_hh)


def lstm(self: Loop, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = self.sums(x, h).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def layer_norm(self: Loop, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    size = (4 * self.hidden,)
    a = F.layer_norm(F.linear(x, self.weight_ih), size, self.gain_ih, self.bias_ih)
    a = a + F.layer_norm(F.linear(h, self.w_hh), size, self.gain_hh, self.bias_hh)
    i, f, g, o = a.chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(F.layer_norm(c, (self.hidden,), self.gain_c, self.bias_c)), c


def peephole(self: Loop, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = self.sums(x, h).chunk(4, 1)
    w_i, w_f, w_o = self.weight_ch.chunk(3)
    c_new = torch.sigmoid(f + w_f * c) * c + torch.sigmoid(i + w_i * c) * torch.tanh(g)
    return torch.sigmoid(o + w_o * c_new) * torch.tanh(c_new), c_new


def coupled(self: Loop, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    f, g, o = self.sums(x, h).chunk(3, 1)
    c = torch.lerp(torch.tanh(g), c, torch.sigmoid(f))
    return torch.sigmoid(o) * torch.tanh(c), c


def carousel(self: Loop, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, g, o = self.sums(x, h).chunk(3, 1)
    c = c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


P_H, P_C, P_WEIGHT = 0.05, 0.5, 0.5  # zoneout's of the paper on words, and AWD-LSTM's


def zoneout(self: Loop, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    h_new, c_new = lstm(self, x, h, c)
    if not self.training:
        return torch.lerp(h_new, h, P_H), torch.lerp(c_new, c, P_C)
    return torch.where(torch.rand_like(h) < P_H, h, h_new), torch.where(torch.rand_like(c) < P_C, c, c_new)


class WeightDropped(Loop):
    """The LSTM whose recurrent weights are dropped, once for all steps of a call."""

    def recurrent(self) -> Tensor:
        return F.dropout(self.weight_hh, P_WEIGHT, self.training)


def gru(self: Loop, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    x_r, x_z, x_n = F.linear(x, self.weight_ih, self.bias_ih).chunk(3, 1)
    h_r, h_z, h_n = F.linear(h, self.w_hh, self.bias_hh).chunk(3, 1)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return torch.lerp(n, h, torch.sigmoid(x_z + h_z)), c


def rnn_tanh(self: Loop, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tanh(self.sums(x, h)), c


def rnn_relu(self: Loop, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return torch.relu(self.sums(x, h)), c


def minimal_gated_unit(self: Loop, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    x_f, x_n = F.linear(x, self.weight_ih, self.bias_ih).chunk(2, 1)
    h_f, h_n = F.linear(h, self.w_hh, self.bias_hh).chunk(2, 1)
    f = torch.sigmoid(x_f + h_f)
    return torch.lerp(h, torch.tanh(x_n + f * h_n), f), c
