"""What every strategy of running the recurrence takes and returns.

Every recurrence here runs on flat data: the rows of all time steps, one step after the other,
as in `torch.nn.utils.rnn.PackedSequence.data`. A dense batch (T, B, ·) is the case in which
each step has B rows. N is the number of rows in all, D the number of directions, H the hidden
size and K the size of h: `proj_size` where there is one, else H.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lstm_triton import dropout


@dataclass(frozen=True)
class Layout:
    """Where each time step's rows are: step t holds batch rows 0 … rows[t]-1 at starts[t] …"""

    starts: list[int]
    rows: list[int]
    batch: int  # B: rows[0], the most of any step

    @staticmethod
    @lru_cache(maxsize=64)
    def dense(steps: int, batch: int) -> "Layout":
        return Layout([t * batch for t in range(steps)], [batch] * steps, batch)

    @classmethod
    def of(cls, total: int, batch: int, batch_sizes: Tensor | None) -> "Layout":
        """From N, B and, for a packed batch, the (T,) numbers of rows of the steps."""
        if batch_sizes is None:
            return cls.dense(total // batch, batch)
        rows = batch_sizes.tolist()
        starts = [0] * len(rows)
        for t in range(1, len(rows)):
            starts[t] = starts[t - 1] + rows[t - 1]
        return cls(starts, rows, batch)

    @property
    def steps(self) -> int:
        return len(self.rows)

    @property
    def total(self) -> int:
        return self.starts[-1] + self.rows[-1]

    @property
    def is_dense(self) -> bool:
        return self.rows[-1] == self.batch

    def order(self, reverse: bool) -> range:
        """Time steps in the order in which a direction passes them."""
        return range(self.steps - 1, -1, -1) if reverse else range(self.steps)

    def split(self, flat: Tensor, reverse: bool) -> Sequence[Tensor]:
        """Views of the rows of each step in `flat` (N, ·), in the order of `reverse`."""
        views = flat.unflatten(0, (self.steps, self.batch)).unbind(0) if self.is_dense else flat.split(self.rows)
        return views[::-1] if reverse else views

    def masks(self, mask: Tensor, reverse: bool) -> Sequence[Tensor]:
        """A direction's mask (T or 1, B, K) as one of the rows of each step, in the order of `reverse`."""
        views = mask.unbind(0) if mask.size(0) > 1 else [mask[0]] * self.steps
        if not self.is_dense:
            views = [m[:rows] for m, rows in zip(views, self.rows, strict=True)]
        return views[::-1] if reverse else views

    def previous(self, flat: Tensor, initial: Tensor, reverse: bool) -> Tensor:
        """The state before each step, in the order of `reverse`.

        Args:
            flat: (N, ·) the state after each step.
            initial: (B, ·) the state before the first one.
        """
        if self.is_dense:
            if reverse:
                return torch.cat([flat[self.batch :], initial])
            return torch.cat([initial, flat[: -self.batch]])
        pieces = []
        for t in range(self.steps):
            source, rows = (t + 1, self.rows[t]) if reverse else (t - 1, self.rows[t])
            known = min(rows, self.rows[source]) if 0 <= source < self.steps else 0
            if known:
                pieces.append(flat[self.starts[source] : self.starts[source] + known])
            if known < rows:
                pieces.append(initial[known:rows])
        return torch.cat(pieces)


class RecurrentDropout(NamedTuple):
    """What h_{t-1} is multiplied by before its product: a mask given, or a seed to draw one from."""

    mask: Tensor | None = None  # (D, T or 1, B, K)
    seed: Tensor | None = None  # one int64 on the device
    p: float = 0.0
    per_step: bool = True  # a fresh mask each time step, else one for the sequence
    stream: int = 0  # that of direction 0; direction 1 has the next

    def drawn(self, steps: int, hx: Tensor) -> Tensor | None:
        """The mask as a tensor (D, T or 1, B, K) in the dtype of `hx`, (D, B, K); None without dropout."""
        if self.seed is None:
            return None if self.mask is None else self.mask.to(hx.dtype)
        directions, batch, size = hx.shape
        streams = range(self.stream, self.stream + directions)
        count = steps if self.per_step else 1
        return dropout.recurrent_masks(self.seed, streams, count, batch, size, self.p, hx.dtype)


class Recurrence(NamedTuple):
    """What forward returns."""

    output: Tensor  # (N, D * K)
    hn: Tensor  # (D, B, K)
    cn: Tensor  # (D, B, H)
    gates: Tensor  # (D, N, 4H) activated i, f, g, o; empty where nothing is saved
    c: Tensor  # (D, N, H) float32 or float64; empty where nothing is saved


class Gradients(NamedTuple):
    """What backward returns: all that the weight gradients are products of."""

    dgates: Tensor  # (D, N, 4H) with respect to the gates before activation
    dhx: Tensor  # (D, B, K)
    dcx: Tensor  # (D, B, H)
    h_prev: Tensor  # (D, N, K) the masked h that each step multiplied
    dh: Tensor  # (D, N, K) with respect to each step's h; empty without projections


class LayerGradients(NamedTuple):
    """What backward returns where it goes through the weights and the input product, too."""

    dinput: Tensor  # (N, I); empty where it isn't wanted
    dhx: Tensor  # (D, B, K)
    dcx: Tensor  # (D, B, H)
    dweights: list[Tensor]  # one for each of a layer's weights; empty ones where they aren't wanted


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and cell states are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rnn_precision(device: torch.device) -> str:
    """ "tf32" where PyTorch's setting for RNNs allows it on this device, else "ieee"."""
    if device.type != "cuda":
        return "ieee"
    rnn: Any = torch.backends.cudnn.rnn  # its type has no word of the setting
    return "tf32" if rnn.fp32_precision == "tf32" else "ieee"
