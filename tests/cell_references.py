"""Recurrent cells as their papers' formulas have them: plain loops over time steps under autograd.

What tests compare with; none of it is made of lstm_triton's code. A step gets the products with input and h, without
biases, and the states before it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

Weights = dict[str, Tensor]  # of a layer's direction, by names without suffixes


def lstm(w: Weights, of_x: Tensor, of_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000."""
    i, f, g, o = (of_x + of_h + biases(w)).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def lstm_peephole(w: Weights, of_x: Tensor, of_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Gers & Schmidhuber 2000: input and forget gates see the old c, the output gate the new one."""
    i, f, g, o = (of_x + of_h + biases(w)).chunk(4, 1)
    of_i, of_f, of_o = w["weight_ch"].chunk(3)
    c_new = torch.sigmoid(f + of_f * c) * c + torch.sigmoid(i + of_i * c) * torch.tanh(g)
    return torch.sigmoid(o + of_o * c_new) * torch.tanh(c_new), c_new


def lstm_norm(w: Weights, of_x: Tensor, of_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Ba, Kiros & Hinton 2016, equations 20 to 22."""
    i, f, g, o = normed_sums(w, of_x, of_h).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(norm(c, w["gain_c"]) + w.get("bias_c", 0.0)), c


def coupled(w: Weights, of_x: Tensor, of_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """CIFG (Greff et al. 2015): the input gate is one minus the forget gate."""
    f, g, o = (of_x + of_h + biases(w)).chunk(3, 1)
    f = torch.sigmoid(f)
    c = f * c + (1 - f) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def coupled_peephole(w: Weights, of_x: Tensor, of_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    f, g, o = (of_x + of_h + biases(w)).chunk(3, 1)
    of_f, of_o = w["weight_ch"].chunk(2)
    f = torch.sigmoid(f + of_f * c)
    c = f * c + (1 - f) * torch.tanh(g)
    return torch.sigmoid(o + of_o * c) * torch.tanh(c), c


def coupled_norm(w: Weights, of_x: Tensor, of_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    f, g, o = normed_sums(w, of_x, of_h).chunk(3, 1)
    f = torch.sigmoid(f)
    c = f * c + (1 - f) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(norm(c, w["gain_c"]) + w.get("bias_c", 0.0)), c


def carousel(w: Weights, of_x: Tensor, of_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Hochreiter & Schmidhuber 1997: no forget gate."""
    i, g, o = (of_x + of_h + biases(w)).chunk(3, 1)
    c = c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def carousel_peephole(w: Weights, of_x: Tensor, of_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, g, o = (of_x + of_h + biases(w)).chunk(3, 1)
    of_i, of_o = w["weight_ch"].chunk(2)
    c = c + torch.sigmoid(i + of_i * c) * torch.tanh(g)
    return torch.sigmoid(o + of_o * c) * torch.tanh(c), c


def carousel_norm(w: Weights, of_x: Tensor, of_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, g, o = normed_sums(w, of_x, of_h).chunk(3, 1)
    c = c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(norm(c, w["gain_c"]) + w.get("bias_c", 0.0)), c


def gru(w: Weights, of_x: Tensor, of_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Cho et al. 2014 as `nn.GRU` has it: the reset gate on the product, with its bias."""
    x_r, x_z, x_n = (of_x + w.get("bias_ih", 0.0)).chunk(3, 1)
    h_r, h_z, h_n = (of_h + w.get("bias_hh", 0.0)).chunk(3, 1)
    z = torch.sigmoid(x_z + h_z)
    h = (1 - z) * torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n) + z * h
    return h, h


def rnn_tanh(w: Weights, of_x: Tensor, of_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Elman 1990."""
    h = torch.tanh(of_x + of_h + biases(w))
    return h, h


def rnn_relu(w: Weights, of_x: Tensor, of_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.relu(of_x + of_h + biases(w))
    return h, h


def biases(w: Weights) -> Any:
    return w["bias_ih"] + w["bias_hh"] if "bias_ih" in w else 0.0


def norm(x: Tensor, gain: Tensor) -> Tensor:
    """Layer norm over a row."""
    apart = x - x.mean(1, keepdim=True)
    return gain * apart / torch.sqrt((apart * apart).mean(1, keepdim=True) + 1e-5)


def normed_sums(w: Weights, of_x: Tensor, of_h: Tensor) -> Tensor:
    return norm(of_h, w["gain_hh"]) + norm(of_x, w["gain_ih"]) + biases(w)


Step = Callable[[Weights, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Reference(nn.Module):
    """Layers of a cell, called as a module of lstm_triton is.

    Args:
        step: one of the functions above.
        like: a module of lstm_triton, whose sizes this one has, and whose parameters in float64.
        carries: whether states are pairs (h, c).
        dropped: (L * D, T or 1, B, K) what h is multiplied by before its product.
        stays: of h and of c the share that zoneout lets stay, each (L * D, T or 1, B, H) or a number.
    """

    def __init__(
        self,
        step: Step,
        like: nn.Module,
        carries: bool,
        dropped: Tensor | None = None,
        stays: tuple[Tensor | float, Tensor | float] | None = None,
    ) -> None:
        super().__init__()
        self.step, self.carries, self.dropped, self.stays = step, carries, dropped, stays
        self.layers, self.directions, self.batch_first = like.num_layers, 1 + like.bidirectional, like.batch_first
        self.hidden, self.size = like.hidden_size, like.proj_size or like.hidden_size
        for name, parameter in like.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach().double().clone()))

    def weights(self, k: int) -> Weights:
        """Of layer and direction number k."""
        suffix = f"_l{k // self.directions}" + "_reverse" * (k % self.directions)
        named = dict(self.named_parameters())
        return {name.removesuffix(suffix): w for name, w in named.items() if name.endswith(suffix)}

    def forward(self, x: Any, hx: Any = None) -> tuple[Any, Any]:
        order, packed = None, isinstance(x, PackedSequence)
        if packed:
            order, restore, sizes = x.sorted_indices, x.unsorted_indices, x.batch_sizes
            data, lengths = pad_packed_sequence(PackedSequence(x.data, sizes))
        else:
            unbatched = x.dim() == 2
            data = x.unsqueeze(1) if unbatched else x.transpose(0, 1) if self.batch_first else x
            lengths = torch.full((data.size(1),), data.size(0))
        if hx is None:
            count = self.layers * self.directions
            states = [data.new_zeros(count, data.size(1), n) for n in (self.size, self.hidden)]
        else:
            states = list(hx) if self.carries else [hx, hx]
            if not packed and unbatched:
                states = [s.unsqueeze(1) for s in states]
            if order is not None:
                states = [s[:, order] for s in states]
        y, *states = self.run(data, states[0], states[1], lengths.to(data.device))
        if packed:
            y = PackedSequence(pack_padded_sequence(y, lengths).data, sizes, order, restore)
            states = states if order is None else [s[:, restore] for s in states]
        elif unbatched:
            y, states = y.squeeze(1), [s.squeeze(1) for s in states]
        elif self.batch_first:
            y = y.transpose(0, 1)
        return y, tuple(states) if self.carries else states[0]

    def run(self, x: Tensor, h0: Tensor, c0: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input (T, B, I); a row has so many steps, and zeros behind them in the output."""
        hn, cn = [], []
        for layer in range(self.layers):
            outputs = []
            for d in range(self.directions):
                k = layer * self.directions + d
                w, h, c = self.weights(k), h0[k], c0[k]
                y: list[Any] = [None] * x.size(0)
                for t in range(x.size(0))[:: -1 if d else 1]:
                    of_h = (h if self.dropped is None else h * self.at(self.dropped, k, t)) @ w["weight_hh"].T
                    q, c_new = self.step(w, x[t] @ w["weight_ih"].T, of_h, h, c)
                    if self.stays is not None:
                        of_state, of_c = (s if isinstance(s, float) else self.at(s, k, t) for s in self.stays)
                        q, c_new = of_state * h + (1 - of_state) * q, of_c * c + (1 - of_c) * c_new
                    h_new = q @ w["weight_hr"].T if "weight_hr" in w else q
                    live = (t < lengths)[:, None]
                    y[t] = torch.where(live, h_new, 0.0)
                    h, c = torch.where(live, h_new, h), torch.where(live, c_new, c)
                outputs.append(torch.stack(y))
                hn.append(h)
                cn.append(c)
            x = torch.cat(outputs, 2)
        return x, torch.stack(hn), torch.stack(cn)

    @staticmethod
    def at(mask: Tensor, k: int, t: int) -> Tensor:
        return mask[k, t if mask.size(1) > 1 else 0].double()
