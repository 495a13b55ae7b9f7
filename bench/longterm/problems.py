"""The adding problem and the temporal-order problem, experiments 4 and 6a of the LSTM paper.

Source: Hochreiter & Schmidhuber, "Long short-term memory", Neural Computation 9 (8), 1997.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

# The symbols of the temporal-order problem in the order of the input's units.
SYMBOLS = "EBabcdXY"
_START, _TRIGGER, _FIRST_NOISE, _LAST_NOISE, _X = 0, 1, 2, 5, 6


class Batch(NamedTuple):
    """Sequences drawn at random.

    Attributes:
        input: (S, B, inputs), float32; S is the longest length. Past a row's length it is noise that is not to be read.
        lengths: B lengths in time steps.
        target: (B, outputs), float32, of the last step of each row.
    """

    input: Tensor
    lengths: list[int]
    target: Tensor


class Published(NamedTuple):
    """The paper's result at a length: sequences until the criterion was met, and wrong ones of 2,560 fresh ones."""

    sequences: int
    wrong: int


@dataclass(frozen=True)
class Problem:
    """A problem with its criterion of success.

    Attributes:
        title: in the field's words.
        inputs, outputs: units.
        tolerance: a sequence is right if every output unit's absolute error at its end is below this.
        error_limit: the criterion's bound of the mean squared error, which is summed over output units.
        published: the paper's results by length.
        draw: `length`, batch size and generator to a batch. Lengths are uniform from `length` to 11 / 10 of it.
        guess: the mean squared error of the best answer that never looks at the sequence, by length.
    """

    title: str
    inputs: int
    outputs: int
    tolerance: float
    error_limit: float
    published: dict[int, Published]
    draw: Callable[[int, int, Generator], Batch]
    guess: Callable[[int], float]


def draw_adding(length: int, batch: int, generator: Generator) -> Batch:
    """Pairs of a value uniform in [-1, 1] and a marker; the target is 0.5 + (X1 + X2) / 4.

    Markers are 1 at two pairs, -1 at the first and the last, 0 elsewhere. The pair of X1 is one of the first ten,
    that of X2 another of the first `length` / 2 - 1. Where one of them is the first pair, its marker stays -1, and
    it counts as zero, which the paper says of X1.
    """
    lengths, rows, steps = _lengths(length, batch, generator)
    values = torch.rand(steps, batch, generator=generator) * 2 - 1
    first = torch.randint(10, (batch,), generator=generator)
    # Of one place fewer, then past the one that is taken.
    second = torch.randint(length // 2 - 2, (batch,), generator=generator)
    second += second >= first
    markers = torch.zeros(steps, batch)
    markers[first, rows] = 1
    markers[second, rows] = 1
    markers[0] = -1
    markers[lengths - 1, rows] = -1
    x1, x2 = (torch.where(place > 0, values[place, rows], 0.0) for place in (first, second))
    target = 0.5 + (x1 + x2) / 4
    return Batch(torch.stack([values, markers], 2), lengths.tolist(), target[:, None])


def guess_adding(length: int) -> float:
    """The variance of (X1 + X2) / 4: a value's is 1 / 3, but zero where its place is the first."""
    places = length // 2 - 1
    # The second is the first pair if that isn't taken, then one of the `places` - 1 that are left.
    second = 9 / 10 / (places - 1)
    return (1 - 1 / 10 + 1 - second) / 3 / 16


def draw_temporal_order(length: int, batch: int, generator: Generator) -> Batch:
    """Symbols, of which an X or Y each at two places tells the class: X, X; X, Y; Y, X; Y, Y.

    Each sequence starts with E, ends with B and is random a, b, c, d elsewhere. The first place is uniform from
    `length` / 10 to `length` / 5, the second from `length` / 2 to 3 / 5 of it: the paper's 10 to 20 and
    50 to 60 of 100. Symbols (`SYMBOLS`) and classes are one-hot.
    """
    lengths, rows, steps = _lengths(length, batch, generator)
    symbols = torch.randint(_FIRST_NOISE, _LAST_NOISE + 1, (steps, batch), generator=generator)
    kinds = torch.randint(2, (2, batch), generator=generator)
    for kind, low, high in ((kinds[0], length // 10, length // 5), (kinds[1], length // 2, 3 * length // 5)):
        places = torch.randint(low, high + 1, (batch,), generator=generator)
        symbols[places, rows] = _X + kind
    symbols[0] = _START
    symbols[lengths - 1, rows] = _TRIGGER
    target = nn.functional.one_hot(2 * kinds[0] + kinds[1], 4).float()
    return Batch(nn.functional.one_hot(symbols, len(SYMBOLS)).float(), lengths.tolist(), target)


def _lengths(length: int, batch: int, generator: Generator) -> tuple[Tensor, Tensor, int]:
    """Lengths (B,), the rows' numbers (B,) and the longest length."""
    lengths = torch.randint(length, length + length // 10 + 1, (batch,), generator=generator)
    return lengths, torch.arange(batch), int(lengths.max())


PROBLEMS = {
    "adding": Problem(
        "adding problem", 2, 1, 0.04, 0.01,
        {100: Published(74_000, 1), 500: Published(209_000, 0), 1000: Published(853_000, 1)},
        draw_adding, guess_adding,
    ),
    "temporal-order": Problem(
        "temporal-order problem", 8, 4, 0.3, 0.1, {100: Published(31_390, 1)}, draw_temporal_order,
        lambda length: 0.75,  # four outputs of 1 / 4: 3 (1 / 4)² + (3 / 4)²
    ),
}  # fmt: skip
SHORTEST = 22  # time steps: the ten places of the first marker are then among the `length` / 2 - 1 of the second
