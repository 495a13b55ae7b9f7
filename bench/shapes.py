"""The shapes that benchmarks run on, and their short names such as `B32-T200-H128-L2-D2-bf16`."""

import re
from dataclasses import dataclass, field, replace

import torch

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "fp16": torch.float16, "bf16": torch.bfloat16}

_NUMBERS = {"B": "batch", "T": "steps", "H": "hidden", "L": "layers", "D": "directions"}


@dataclass(frozen=True, order=True)
class Shape:
    """An LSTM and the dense batch that it is called on; the input has as many features as h."""

    batch: int
    steps: int
    hidden: int
    layers: int = 1
    directions: int = 1
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        if min(self.batch, self.steps, self.hidden, self.layers) < 1:
            raise ValueError(f"{self}: sizes should be at least 1")
        if self.directions not in (1, 2):
            raise ValueError(f"{self}: directions should be 1 or 2")
        if self.dtype not in DTYPES:
            raise ValueError(f"{self}: the dtype should be one of {', '.join(DTYPES)}")

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """The shape that `str` gives this name; B, T and H are needed, the rest has defaults."""
        fields: dict[str, int | str] = {}
        for part in text.strip().split("-"):
            number = re.fullmatch(r"([BTHLD])(\d+)", part)
            name, value = (_NUMBERS[number[1]], int(number[2])) if number else ("dtype", part)
            if name in fields:
                raise ValueError(f"{text!r} gives {name} twice")
            fields[name] = value
        missing = [letter for letter, name in _NUMBERS.items() if letter in "BTH" and name not in fields]
        if missing:
            raise ValueError(f"{text!r} lacks {', '.join(missing)}; a shape reads like B32-T200-H128-L2-D2-bf16")
        return cls(**fields)  # type: ignore[arg-type]

    def __str__(self) -> str:
        text = f"B{self.batch}-T{self.steps}-H{self.hidden}"
        text += f"-L{self.layers}" if self.layers > 1 else ""
        text += f"-D{self.directions}" if self.directions > 1 else ""
        return text + (f"-{self.dtype}" if self.dtype != "fp32" else "")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Shapes:
    """The shapes of each kind of benchmark."""

    speed: list[Shape]
    inference: list[Shape]
    memory: list[Shape]
    auto: list[Shape] = field(default_factory=list)


def _shapes(text: str) -> list[Shape]:
    return [Shape.parse(part) for part in text.replace(",", " ").split()]


_AUTO = [Shape(b, t, h) for b in (1, 32) for t in (20, 200) for h in (32, 128, 512)]

# A training step of the largest is some 0.2 TFLOP: seconds on a CPU core.
_MOST_WORK = 32 * 1000 * 512**2
_EXTRA = "B32-T200-H128-{0} B32-T200-H512-{0}"

SETS = {
    # For `--benchmark-disable`: does everything run?
    "smoke": Shapes(
        speed=_shapes("B2-T3-H8 B2-T3-H8-L2-D2"),
        inference=_shapes("B1-T3-H8"),
        memory=_shapes("B2-T3-H8"),
        auto=_shapes("B2-T3-H8"),
    ),
    # Under three minutes on two cores.
    "small": Shapes(
        speed=_shapes(
            "B32-T20-H32 B32-T20-H128 B32-T20-H512 B32-T60-H128 B32-T200-H128 "
            "B1-T200-H128 B32-T60-H128-L2-D2 B32-T20-H128-bf16"
        ),
        inference=_shapes("B1-T20-H128 B1-T200-H128 B1-T20-H512"),
        memory=_shapes("B32-T200-H128 B32-T200-H128-L2-D2"),
        auto=_AUTO,
    ),
    # Sizes that keep a GPU busy, in minutes.
    "gpu": Shapes(
        speed=_shapes(
            "B32-T200-H32 B32-T200-H128 B32-T200-H256 B32-T200-H512 B32-T200-H1024 B32-T20-H128 B32-T1000-H128 "
            "B1-T200-H128 B256-T200-H128 B32-T200-H128-L2-D2 "
            f"{_EXTRA.format('fp16')} {_EXTRA.format('bf16')} B16-T1024-H768-fp16 B16-T1024-H768-bf16"
        ),
        inference=_shapes("B1-T20-H128 B1-T200-H128 B1-T200-H512 B1-T200-H128-fp16"),
        memory=_shapes("B32-T1000-H256 B32-T1000-H256-L2-D2 B32-T1000-H256-fp16"),
        auto=_AUTO,
    ),
    "full": Shapes(
        speed=[
            Shape(b, t, h)
            for b in (1, 32, 128)
            for t in (20, 60, 200, 1000)
            for h in (32, 128, 512, 1024)
            if b * t * h**2 <= _MOST_WORK
        ]
        + _shapes(
            "B32-T200-H128-L2 B32-T200-H128-L3 B32-T200-H128-D2 B32-T200-H128-L2-D2 B32-T200-H128-fp64 "
            f"{_EXTRA.format('fp16')} {_EXTRA.format('bf16')}"
        ),
        inference=[Shape(1, t, h) for t in (1, 20, 200, 1000) for h in (32, 128, 512, 1024)],
        memory=_shapes("B32-T200-H128 B32-T200-H128-L2-D2 B32-T1000-H256 B8-T4096-H256 B32-T200-H128-bf16"),
        auto=_AUTO,
    ),
}


def choose(text: str) -> Shapes:
    """The set of that name, or the shapes listed (`B32-T200-H128,B1-T20-H32-bf16`) for every benchmark."""
    if text in SETS:
        return SETS[text]
    try:
        shapes = _shapes(text)
    except ValueError as error:
        raise ValueError(f"{error} (or name a set: {', '.join(SETS)})") from None
    if not shapes:
        raise ValueError(f"no shape in {text!r}")
    single = list(dict.fromkeys(replace(s, batch=1) for s in shapes))
    return Shapes(shapes, single, shapes, shapes)


def for_run(given: str | None, timed: bool) -> Shapes:
    """The shapes of a run of the benchmarks: those given, else few and small ones."""
    return choose(given or ("small" if timed else "smoke"))
