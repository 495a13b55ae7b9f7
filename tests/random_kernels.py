"""Random Triton kernels, as source, with arguments and how far two ways of running them may differ.

    python tests/random_kernels.py SEED                     prints the kernel of a seed
    python tests/random_kernels.py MODULE OUT SEED...       runs kernels of a module in Triton's interpreter

While a kernel is written, each value of it carries a bound of its size and of the error it may have: 0 where both must
have the same bits. What may differ is never compared, cut off or rounded to an integer, so it stays small. Sums and
products are exact as long as their operands are multiples of a power of two (`grain`) that leave room for them.

Left out, because the interpreter has it wrong: arithmetic of bfloat16 (it takes raw bits), products of bfloat16,
minima of NaN that return the other operand, and roundings to bfloat16 (it cuts off, which the tolerance allows).
"""

import importlib.util
import math
import os
import random
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HEADER = "import triton\nimport triton.language as tl\n"
LENGTH = 4096  # of each input
UNTOUCHED = 77  # what outputs hold before

TYPES = {
    "f16": ("tl.float16", torch.float16), "bf16": ("tl.bfloat16", torch.bfloat16), "f32": ("tl.float32", torch.float32),
    "f64": ("tl.float64", torch.float64), "b": ("tl.int1", torch.bool), "i8": ("tl.int8", torch.int8),
    "i16": ("tl.int16", torch.int16), "i32": ("tl.int32", torch.int32), "i64": ("tl.int64", torch.int64),
}  # fmt: skip
DIGITS = {"f16": 11, "bf16": 8, "f32": 24, "f64": 53}
FLOATS = ("f16", "f32", "f64")  # with arithmetic
INTS = ("i8", "i16", "i32", "i64")
BITS = {"i8": 8, "i16": 16, "i32": 32, "i64": 64}
SCALARS = ("n0", "n1", "n2", "n3", "step", "flag", "seed", "f0")
TRIPS = 4  # n0 … n3 are at most this
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """A variable of the kernel. `grain`: it is a multiple of 2^-grain; None: of nothing in particular."""

    name: str
    dtype: str
    shape: Shape
    bound: float = math.inf
    grain: int | None = None
    error: float = 0.0
    positive: bool = False  # an integer of 0 or more


@dataclass(frozen=True)
class Region:
    """Elements of an output and how far they may be off."""

    output: str
    start: int
    end: int
    error: float


@dataclass
class Program:
    """A kernel and how to run it."""

    seed: int
    name: str
    source: str
    grid: Shape
    pointers: list[str]  # parameters, before the scalars
    scalars: list[int | float]
    regions: list[Region]
    sizes: dict[str, int]  # of outputs

    def arguments(self) -> tuple[list[Tensor | int | float], dict[str, Tensor]]:
        """The arguments, and those that the kernel writes by name."""
        data = inputs()
        written, arguments = {}, []
        for name in self.pointers:
            kind, dtype = name.split("_")
            if kind == "out":
                written[name] = torch.full((self.sizes[name],), UNTOUCHED, dtype=TYPES[dtype][1])
            elif kind == "io":
                written[name] = data["x_" + dtype].clone()
            elif kind == "count":
                written[name] = torch.arange(LENGTH, dtype=TYPES[dtype][1]) % 7
            arguments.append(written[name] if name in written else data[name])
        return [*arguments, *self.scalars], written


def inputs() -> dict[str, Tensor]:
    """x: multiples of 1/8 up to 4, or any integers; y: any numbers up to 4; odd: NaN, infinities, zeros, denormals.

    at: places in an input.
    """
    if not _inputs:
        generator = torch.Generator().manual_seed(5)
        made: dict[str, Tensor] = {}

        def integers(low: int, high: int) -> Tensor:
            return torch.randint(low, high, (LENGTH,), generator=generator)

        for name in ("f16", "bf16", "f32", "f64"):
            made["x_" + name] = (integers(-32, 33) / 8).to(TYPES[name][1])
        for name in FLOATS:
            some = torch.randn(LENGTH, dtype=torch.float64, generator=generator).clamp(-3.9, 3.9)
            made["y_" + name] = some.to(TYPES[name][1])
        for name, bits in BITS.items():
            low = -(2 ** (bits - 1))
            made["x_" + name] = integers(low, -low - 1).to(TYPES[name][1])
        made["x_b"] = integers(0, 2).bool()
        made["at_i32"] = integers(0, LENGTH).int()
        odd = torch.tensor(
            [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-41, 65519.0, 65520.0, 3e-6, -1.5, 1e30, 2049.5]
        )
        made["odd_f32"] = odd[integers(0, len(odd))]
        _inputs.update(made)  # at once: another thread may look
    return _inputs


_inputs: dict[str, Tensor] = {}


class Unfit(Exception):
    """A draw that would overflow, or differ by too much."""


class Writer:
    """Draws one kernel."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.lines: list[str] = []
        self.depth = 1
        self.count = 0
        self.known: list[Value] = []
        self.pointers: dict[str, None] = {}
        self.sizes: dict[str, int] = {}
        self.taken = {"io": 0, "count": 0}
        self.regions: list[Region] = []
        self.loops: list[tuple[str, int]] = []  # counters around this place, and how often they run
        self.branching = 0
        self.conditional = False
        self.grid = self.random.choice([(1,), (2,), (3,), (2, 2), (1, 3), (2, 1, 2), (1, 2, 3)])
        self.programs = math.prod(self.grid)

    def write(self) -> Program:
        pick = self.random
        self.scalars: list[int | float] = [pick.randint(0, TRIPS) for _ in range(4)]
        self.scalars += [pick.randint(1, 3), pick.randint(0, 1), pick.randint(0, 2**31 - 1), pick.choice([0.375, -1.5])]
        groups = [
            self.plain, self.plain, self.plain, self.loop, self.loop, self.swap, self.while_loop, self.branch,
            self.branch, self.in_place, self.exchange, self.atomics, self.philox, self.product_loop,
        ]  # fmt: skip
        for _ in range(pick.randint(2, 4)):
            self.group(pick.choice(groups))
        for value in pick.sample(self.known, min(2, len(self.known))):
            self.group(lambda value=value: self.store(value))
        name = f"kernel_{self.seed}"
        head = f"@triton.jit\ndef {name}({', '.join([*self.pointers, *SCALARS])}):\n"
        x, y, z = (f"tl.program_id({k})" for k in range(3))
        pid = {1: x, 2: f"{x} + {self.grid[0]} * {y}"}.get(
            len(self.grid), f"{x} + tl.num_programs(0) * ({y} + tl.num_programs(1) * {z})"
        )
        source = head + "\n".join(["    pid = " + pid, *self.lines]) + "\n"
        return Program(
            self.seed, name, source, self.grid, list(self.pointers), self.scalars, self.regions, dict(self.sizes)
        )

    # Lines and names

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def fresh(self, prefix: str = "v") -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def pointer(self, name: str) -> str:
        self.pointers.setdefault(name)
        return name

    def let(self, text: str, like: Value) -> Value:
        """A variable with this value, which may be used from here to the end of the block."""
        if like.dtype in DIGITS and like.error > 1e-3 * max(1.0, min(like.bound, 1e3)) and like.dtype != "bf16":
            raise Unfit
        value = replace(like, name=self.fresh())
        text = self.narrow(text, like.dtype, like.shape)
        if value.grain is not None and not _fits(value):
            value = replace(value, grain=None)
        self.line(f"{value.name} = {text}")
        self.known.append(value)
        return value

    def narrow(self, text: str, dtype: str, shape: Shape) -> str:
        """The text with this dtype: with a constant, a small scalar becomes 32 bits wide, unlike a tensor."""
        return text if shape or dtype not in ("f16", "i8", "i16") else f"({text}).to({TYPES[dtype][0]})"

    def group(self, write: Callable[[], None]) -> None:
        """Some statements, all or nothing."""
        for _ in range(20):
            state = (list(self.lines), list(self.known), dict(self.pointers), dict(self.sizes), dict(self.taken))
            regions = list(self.regions)
            depth, loops, conditional = self.depth, list(self.loops), self.conditional
            try:
                write()
                return
            except Unfit:
                self.lines, self.known, self.pointers, self.sizes, self.taken = state
                self.regions = regions
                self.depth, self.loops, self.conditional = depth, loops, conditional

    @contextmanager
    def block(self, head: str) -> Any:
        self.line(head)
        self.depth += 1
        before, length = list(self.known), len(self.lines)
        yield
        if len(self.lines) == length:
            self.line("pass")
        self.known = before
        self.depth -= 1

    # Shapes, places and masks

    def shape(self, rank: int | None = None, most: int = 1024) -> Shape:
        rank = rank or self.random.choice([1, 1, 2, 2, 2, 2, 3])
        while True:
            shape = tuple(2 ** self.random.randint(0, 6 if rank < 3 else 4) for _ in range(rank))
            if math.prod(shape) <= most:
                return shape

    def along(self, shape: Shape, d: int) -> str:
        """The index along a dimension, with the rank of the shape."""
        text = f"tl.arange(0, {shape[d]})"
        return text if len(shape) == 1 else f"{text}[{', '.join(':' if k == d else 'None' for k in range(len(shape)))}]"

    def places(self, shape: Shape, room: int, dense: bool = False) -> tuple[str, int]:
        """An expression of different places for all elements if `dense`, and one more than the largest place."""
        kind = self.random.choice(["rows", "rows", "columns", "apart"] + ([] if dense else ["strided", "run-time"]))
        order = list(range(len(shape)))
        if kind == "columns":
            order.reverse()
        elif kind == "apart":
            self.random.shuffle(order)
        strides = {}
        step = self.random.choice([1, 2, 3]) if kind == "apart" else 1
        for d in reversed(order):
            strides[d] = step
            step *= shape[d]
            if kind == "apart":
                step += self.random.choice([0, 0, 1])
        if kind == "strided":
            strides = {d: self.random.choice([0, 1, 1, 2, 5, 33]) for d in order}
        last = 1 + sum(strides[d] * (shape[d] - 1) for d in order)
        texts = [f"{self.along(shape, d)} * {strides[d]}" for d in range(len(shape))]
        if kind == "run-time":
            d = self.random.randrange(len(shape))
            texts[d] = f"{self.along(shape, d)} * step"
            last += 3 * (shape[d] - 1)
        if last > room:
            return self.places(shape, room, dense)
        return " + ".join(texts), last

    def mask(self, shape: Shape) -> str | None:
        kind = self.random.choice(["none", "none", "one", "both", "data"])
        if kind == "none" or not shape:
            return None
        if kind == "data":
            return self.truth(shape, 1).name
        dims = range(len(shape)) if kind == "both" else [self.random.randrange(len(shape))]
        limits = [self.random.choice([f"{shape[d] // 2 + 1}", f"n0 + {shape[d] // 2}", "n1"]) for d in dims]
        parts = [f"({self.along(shape, d)} < {limit})" for d, limit in zip(dims, limits, strict=True)]
        name = self.fresh("m")
        self.line(f"{name} = {' & '.join(parts)} & (tl.full({_text(shape)}, 1, tl.int1))")
        return name

    # Values of a dtype and shape

    def value(self, dtype: str, shape: Shape, depth: int = 3, exact: bool = False) -> Value:
        """A value, of the same bits in both ways to run the kernel if `exact`."""
        known = [v for v in self.known if v.dtype == dtype and v.shape == shape and not (exact and v.error)]
        if known and self.random.random() < (0.3 if depth > 0 else 0.7):
            return self.random.choice(known[-6:])
        if depth <= 0:
            return self.load(dtype, shape)
        for _ in range(8):
            mark = len(self.lines), len(self.known)
            try:
                value = self.random.choice(self.ways(dtype, shape))(dtype, shape, depth - 1, exact)
                if value.error and exact:
                    raise Unfit
                return value
            except Unfit:
                del self.lines[mark[0] :]
                del self.known[mark[1] :]
        return self.load(dtype, shape)

    def ways(self, dtype: str, shape: Shape) -> list[Callable[[str, Shape, int, bool], Value]]:
        if not shape:
            return [self.scalar_load, self.scalar, self.reduced, self.reduced, self.arithmetic]
        ways = [self.load_way, self.load_way, self.cast, self.where, self.broadcast, self.rearranged, self.rearranged]
        if dtype == "b":
            return [self.truth_way]
        if dtype == "bf16":
            return ways
        ways += [self.arithmetic, self.arithmetic, self.arithmetic, self.unary, self.unary]
        if dtype in ("f32", "f64", "i32", "i64"):
            ways += [self.reduced]
        if dtype in ("f32", "f64") and len(shape) == 2:
            ways += [self.dot, self.dot]
        if dtype in ("f32", "f64", "f16", "i32", "i64", "i16"):
            ways += [self.bits]
        return ways

    def load_way(self, dtype: str, shape: Shape, depth: int, exact: bool) -> Value:
        return self.load(dtype, shape)

    def load(self, dtype: str, shape: Shape) -> Value:
        if not shape:
            return self.scalar_load(dtype, shape, 0, True)
        kind, like = self.source(dtype)
        mask = self.mask(shape) if self.random.random() < 0.5 else None
        far = mask is None and self.random.random() < 0.15
        gathered = self.random.random() < 0.2
        text, last = self.places(shape, LENGTH)
        spare = LENGTH - last
        offset = f"{self.random.randint(0, spare)}"
        if spare > 200:
            offset = f"{self.random.randint(0, spare - 7 * self.programs)} + pid * 7"
        text = f"{text} + ({offset})"
        if gathered:
            text = f"tl.load({self.pointer('at_i32')} + {text})"
        if far:  # what the mask leaves out is at no address
            d = self.random.randrange(len(shape))
            index, limit = self.along(shape, d), self.random.choice(["n0", "n2", "1"])
            full = f"(tl.full({_text(shape)}, 1, tl.int1))"
            mask = self.fresh("m")
            self.line(f"{mask} = ({index} < {limit}) & {full}")
            text = f"tl.where({mask}, {text}, 1 << 29)"
        other = ""
        if mask and self.random.random() < 0.5:
            if self.random.random() < 0.5 or dtype == "b":
                # The interpreter takes the 1 for bits of a bfloat16.
                other = f", other={0 if dtype == 'bf16' else self.random.choice([0, 1])}"
            else:
                filling = self.value(dtype, shape, 0, True)
                other = f", other={filling.name}"
                like = _either(like, filling)
        text = f"{self.pointer(kind + '_' + dtype)} + {text}"
        return self.let(
            f"tl.load({text}{f', mask={mask}' if mask else ''}{other})", replace(like, dtype=dtype, shape=shape)
        )

    def source(self, dtype: str) -> tuple[str, Value]:
        """An input, and what is known of its elements."""
        draw = self.random.random()
        if dtype == "f32" and draw < 0.1:
            return "odd", Value("", dtype, ())
        if dtype in FLOATS and draw < 0.4:
            return "y", Value("", dtype, (), 4.0)
        if dtype in DIGITS:
            return "x", Value("", dtype, (), 4.0, 3)
        return "x", Value("", dtype, (), 2.0 ** (BITS.get(dtype, 1) - 1))

    def scalar_load(self, dtype: str, shape: Shape, depth: int, exact: bool) -> Value:
        if dtype == "b":
            return self.let(f"n{self.random.randrange(4)} > {self.random.randint(0, 3)}", Value("", "b", (), 1.0))
        kind, like = self.source(dtype)
        text = f"{self.pointer(kind + '_' + dtype)} + pid * {self.random.randint(0, 9)} + {self.random.randint(0, 999)}"
        return self.let(f"tl.load({text})", replace(like, dtype=dtype))

    def scalar(self, dtype: str, shape: Shape, depth: int, exact: bool) -> Value:
        pick = self.random
        if dtype == "b":
            a = self.value(pick.choice(["i32", "f32"]), (), depth, True)
            return self.let(f"{a.name} {pick.choice(['<', '>=', '!='])} {pick.randint(-2, 3)}", Value("", "b", (), 1.0))
        if dtype in INTS:
            text = pick.choice(["n0", "n1", "pid", "step", "seed", "flag", "tl.num_programs(0)"])
            if dtype == "i32" and self.loops and pick.random() < 0.5:
                return self.let(f"{pick.choice(self.loops)[0]} + n2", Value("", dtype, (), 2.0**31))
            return self.let(f"({text} + 0).to({TYPES[dtype][0]})", Value("", dtype, (), 2.0 ** (BITS[dtype] - 1)))
        if dtype == "bf16":
            return self.scalar_load(dtype, shape, depth, exact)
        return self.let(f"(f0 * n1).to({TYPES[dtype][0]})", Value("", dtype, (), 6.0, 3))

    def truth_way(self, dtype: str, shape: Shape, depth: int, exact: bool) -> Value:
        return self.truth(shape, depth)

    def truth(self, shape: Shape, depth: int) -> Value:
        """Booleans."""
        pick = self.random
        like = Value("", "b", shape, 1.0)
        kind = pick.choice(["compare", "compare", "compare", "logic", "load", "cast", "not", "unsigned", "view"])
        if depth <= 0 and kind in ("logic", "not", "view"):
            kind = "compare"
        if kind == "load" and shape:
            return self.load("b", shape)
        if kind == "logic":
            a, b = self.truth(shape, depth - 1), self.truth(shape, depth - 1)
            return self.let(f"{a.name} {pick.choice('&|^')} {b.name}", like)
        if kind == "not":
            return self.let(f"{self.truth(shape, depth - 1).name} == 0", like)
        if kind == "view" and shape:
            return self.rearranged("b", shape, depth - 1, True)
        dtype = "i32" if kind == "unsigned" else pick.choice([*FLOATS, *INTS])
        a = self.value(dtype, shape, depth, True)
        if kind == "cast":
            return self.let(f"{a.name}.to(tl.int1)", like)
        operator = pick.choice(["<", "<=", ">", ">=", "==", "!="])
        if pick.random() < 0.3:
            return self.let(f"{a.name} {operator} {pick.randint(-3, 3) if dtype != 'f64' else 0.1}", like)
        b = self.value(dtype, shape, depth, True)
        cast = ".to(tl.uint32, bitcast=True)" if kind == "unsigned" else ""
        return self.let(f"{a.name}{cast} {operator} {b.name}{cast}", like)

    def arithmetic(self, dtype: str, shape: Shape, depth: int, exact: bool) -> Value:
        """Two or three operands."""
        pick = self.random
        a = self.value(dtype, shape, depth, exact)
        other = shape
        if shape and pick.random() < 0.25:  # broadcast without saying so
            other = tuple(1 if pick.random() < 0.5 else n for n in shape) if len(shape) > 1 else ()
        b = self.value(dtype, other, depth, exact)
        if dtype == "b":
            return self.let(f"{a.name} {pick.choice('&|^')} {b.name}", replace(a, shape=shape))
        if dtype in INTS:
            return self.integer(dtype, shape, a, b)
        if dtype == "bf16":
            raise Unfit
        kind = pick.choice(["+", "+", "-", "*", "*", "/", "min", "max", "fma", "constant", "constant", "clamp"])
        if kind in ("min", "max"):
            odd = max(a.bound, b.bound) == math.inf or pick.random() < 0.5
            nan = ", propagate_nan=tl.PropagateNan.ALL" if odd else ""
            name = {"min": "minimum", "max": "maximum"}[kind]
            return self.let(f"tl.{name}({a.name}, {b.name}{nan})", replace(_either(a, b), shape=shape))
        limit = 500.0 if dtype == "f16" else 1e4
        if kind in ("+", "-"):
            like = replace(_sum(a, b), shape=shape)
            text = f"{a.name} {kind} {b.name}"
        elif kind == "*":
            like = replace(_product(a, b), shape=shape)
            text = f"{a.name} * {b.name}"
        elif kind == "fma":
            c = self.value(dtype, shape, depth, exact)
            if other != shape:
                raise Unfit
            like = _sum(_product(a, b), c)
            if dtype == "f16":  # rounded once here, twice there
                like = replace(like, error=like.error + (0 if _fits(like) else 4 * 2**-11 * like.bound))
            text = f"tl.fma({a.name}, {b.name}, {c.name})"
        elif kind == "/":
            error = 0.0
            if a.error or b.error or not _fits(b):
                error = (
                    2 * a.error + 4 * a.bound * (b.error + _epsilon(dtype) * b.bound) + _rounding(dtype, 2 * a.bound)
                )
            like = Value("", dtype, shape, 2 * a.bound, None, error)
            if dtype == "f16" and b.grain is None:
                raise Unfit
            if b.grain is not None and not _fits(replace(b, bound=b.bound + 1, grain=max(b.grain, 1))):
                raise Unfit
            text = f"{a.name} / (tl.abs({b.name}) + 0.5)"
            if dtype == "f16":
                text = f"({a.name} / (tl.abs({b.name}) + 0.5)).to(tl.float16)"  # a quotient is float32
        elif kind == "clamp":
            like = replace(a, bound=min(a.bound, 3.0), grain=max(a.grain, 1) if a.grain is not None else None)
            if a.bound == math.inf:
                raise Unfit
            text = f"tl.clamp({a.name}, -1.5, 3.0)" + (".to(tl.float16)" if dtype == "f16" else "")
        else:
            constant = pick.choice([0.5, 0.1, -3.0, 2.0, 1 / 3, -0.7])
            grain = {0.5: 1, -3.0: 0, 2.0: 0}.get(constant)
            number = Value("", dtype, shape, abs(constant), grain)
            times = pick.random() < 0.5
            like = _product(a, number) if times else _sum(a, number)
            text = f"{a.name} {'*' if times else '+'} {constant!r}"
        if not like.bound <= limit:
            raise Unfit
        return self.let(text, replace(like, dtype=dtype))

    def integer(self, dtype: str, shape: Shape, a: Value, b: Value) -> Value:
        pick = self.random
        like = Value("", dtype, shape, 2.0 ** (BITS[dtype] - 1))
        operators = ["+", "-", "*", "&", "|", "^", "//", "%", "<<", ">>", "min", "max", "low", "constant", "abs"]
        kind = pick.choice(operators + (["unsigned", "unsigned"] if dtype == "i32" else []))
        if kind == "low":
            most = pick.choice([1, 7, 63, 100])
            return self.let(
                f"{a.name} & {most}", replace(like, shape=a.shape, bound=float(most), grain=0, positive=True)
            )
        if kind == "constant":
            return self.let(f"{a.name} {pick.choice('+-*&|^')} {pick.randint(1, 99)}", replace(like, shape=a.shape))
        if kind == "abs":
            return self.let(f"tl.abs({a.name})", replace(like, shape=a.shape))
        if kind in ("min", "max"):
            return self.let(f"tl.{kind}imum({a.name}, {b.name})", like)
        if kind in ("//", "%"):
            return self.let(f"{a.name} {kind} (({b.name} & 15) + 1)", like)
        if kind in ("<<", ">>"):
            return self.let(f"{a.name} {kind} ({b.name} & 7)", like)
        if kind == "unsigned":
            u = ".to(tl.uint32, bitcast=True)"
            kind = pick.choice([">> 5", "// 7", "% 9", "// (other | 1)", "% (other | 1)", "* other", "max", "min"])
            other = f"{b.name}{u}"
            if kind in ("max", "min"):
                text = f"tl.{kind}imum({a.name}{u}, {other})"
            else:
                text = f"({a.name}{u} {kind.replace('other', other)})"
            return self.let(
                f"{text}.to(tl.int32, bitcast=True)",
                replace(like, shape=a.shape if "other" not in kind and kind not in ("max", "min") else shape),
            )
        return self.let(f"{a.name} {kind} {b.name}", like)

    def unary(self, dtype: str, shape: Shape, depth: int, exact: bool) -> Value:
        pick = self.random
        a = self.value(dtype, shape, depth, exact)
        if dtype in INTS:
            text = pick.choice([f"-{a.name}", f"~{a.name}", f"tl.abs({a.name})"])
            return self.let(text, Value("", dtype, shape, 2.0 ** (BITS[dtype] - 1)))
        kind = pick.choice(
            ["-", "abs", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sigmoid", "floor", "ceil", "sin", "cos", "erf"]
        )
        if kind == "-":
            return self.let(f"-{a.name}", a)
        if kind == "abs":
            return self.let(f"tl.abs({a.name})", a)
        if dtype == "f16" or a.bound == math.inf:
            raise Unfit
        if kind in ("floor", "ceil"):
            if a.error:
                raise Unfit
            return self.let(f"tl.{kind}({a.name})", replace(a, bound=a.bound + 1, grain=0))
        ulp = _epsilon(dtype) * 2
        if kind in ("exp", "exp2"):
            if a.bound > 6:
                raise Unfit
            bound = math.exp(a.bound)
            like = replace(a, bound=bound, grain=None, error=bound * (a.error + 3 * ulp))
            return self.let(f"tl.{kind}({a.name})", like)
        if kind == "sigmoid":
            return self.let(f"tl.sigmoid({a.name})", replace(a, bound=1.0, grain=None, error=a.error + 5 * ulp))
        if kind in ("sin", "cos", "erf"):
            if a.bound > 50:
                raise Unfit
            return self.let(f"tl.{kind}({a.name})", replace(a, bound=1.0, grain=None, error=2 * a.error + 3 * ulp))
        name = "tl.math.rsqrt" if kind == "rsqrt" else f"tl.{kind}"
        bound = {"log": 10.0, "log2": 14.0, "sqrt": math.sqrt(a.bound + 1), "rsqrt": 2.0}[kind]
        error = 3 * a.error + 3 * ulp * bound + ulp * (a.bound + 1)
        if (
            a.error == 0
            and _fits(replace(a, bound=a.bound + 1, grain=max(a.grain or 0, 2)))
            and a.grain is not None
            and kind == "sqrt"
        ):
            error = 0.0
        return self.let(f"{name}(tl.abs({a.name}) + 0.5)", replace(a, bound=bound, grain=None, error=error))

    def where(self, dtype: str, shape: Shape, depth: int, exact: bool) -> Value:
        condition = self.truth(shape, depth)
        a, b = self.value(dtype, shape, depth, exact), self.value(dtype, shape, depth, exact)
        return self.let(f"tl.where({condition.name}, {a.name}, {b.name})", _either(a, b))

    def cast(self, dtype: str, shape: Shape, depth: int, exact: bool) -> Value:
        pick = self.random
        source = pick.choice([t for t in TYPES if t != dtype and (dtype != "bf16" or t in ("f32", "f16"))])
        cast = f".to({TYPES[dtype][0]})"
        if source == "b":
            a = self.truth(shape, depth)
            return self.let(f"{a.name}{cast}", Value("", dtype, shape, 1.0, 0, positive=True))
        if source in INTS and dtype in INTS:
            a = self.value(source, shape, depth, True)
            return self.let(f"{a.name}{cast}", Value("", dtype, shape, 2.0 ** (BITS[dtype] - 1)))
        if source in INTS:
            a = self.value(source, shape, depth, True)
            if dtype == "f64" and pick.random() < 0.2:  # any integer
                return self.let(
                    f"{a.name}{cast} * 0x1p-{BITS[source] - 1}".replace("0x1p-", "2.0 ** -"),
                    Value("", dtype, shape, 1.0),
                )
            a = self.let(f"{a.name} & 63", replace(a, bound=63.0, grain=0, positive=True))
            return self.let(f"({a.name} - 20){cast}", Value("", dtype, shape, 43.0, 0))
        if dtype in INTS:
            a = self.value(source, shape, depth, True)
            if a.error or a.bound > 2.0 ** (BITS[dtype] - 1) - 1:
                raise Unfit
            return self.let(f"{a.name}{cast}", Value("", dtype, shape, a.bound))
        a = self.value(source, shape, depth, exact)
        if dtype == "f16" and 6e4 < a.bound < math.inf:
            raise Unfit
        if dtype == "bf16":
            error = 0.0 if _fits(replace(a, dtype="bf16")) else a.error + 2**-7 * a.bound
            if a.bound == math.inf:
                raise Unfit
            return self.let(f"{a.name}{cast}", replace(a, dtype=dtype, error=error))
        error = a.error
        if error and DIGITS[dtype] < DIGITS[source]:
            error += _rounding(dtype, a.bound)
        return self.let(f"{a.name}{cast}", replace(a, dtype=dtype, error=error))

    def bits(self, dtype: str, shape: Shape, depth: int, exact: bool) -> Value:
        """Numbers as their bits."""
        if dtype in INTS:
            kind = {"i64": "f64", "i32": "f32", "i16": "f16"}[dtype]
            source = f"{self.pointer('x_' + kind)} + {self.places(shape, LENGTH)[0]}"
            text = f"tl.load({source}).to({TYPES[dtype][0]}, bitcast=True)"
            return self.let(text, Value("", dtype, shape, 2.0 ** (BITS[dtype] - 1)))
        a = self.value({"f64": "i64", "f32": "i32", "f16": "i16"}[dtype], shape, depth, True)
        low, one = {"f64": (2**52 - 1, 1023 << 52), "f32": (2**23 - 1, 127 << 23), "f16": (2**10 - 1, 15 << 10)}[dtype]
        text = f"(({a.name} & {low}) | {one}).to({TYPES[dtype][0]}, bitcast=True)"
        return self.let(text, Value("", dtype, shape, 2.0, DIGITS[dtype] - 1))

    def broadcast(self, dtype: str, shape: Shape, depth: int, exact: bool) -> Value:
        pick = self.random
        axes = [d for d in range(len(shape)) if pick.random() < 0.5] or [pick.randrange(len(shape))]
        if len(axes) == len(shape) and pick.random() < 0.5:
            a = self.value(dtype, (), depth, exact)
            if pick.random() < 0.5 and dtype not in ("b", "bf16"):
                return self.let(f"tl.full({_text(shape)}, {a.name}, {TYPES[dtype][0]})", replace(a, shape=shape))
            return self.let(f"tl.broadcast_to({a.name}, {_text(shape)})", replace(a, shape=shape))
        axis = axes[0]
        if len(shape) > 1 and pick.random() < 0.6:
            a = self.value(dtype, shape[:axis] + shape[axis + 1 :], depth, exact)
            wide = shape[:axis] + (1,) + shape[axis + 1 :]
            index = ", ".join("None" if d == axis else ":" for d in range(len(shape)))
            text = pick.choice([f"tl.expand_dims({a.name}, {axis})", f"{a.name}[{index}]"])
            a = self.let(text, replace(a, shape=wide))
        else:
            a = self.value(dtype, tuple(1 if d in axes else n for d, n in enumerate(shape)), depth, exact)
        return self.let(f"tl.broadcast_to({a.name}, {_text(shape)})", replace(a, shape=shape))

    def rearranged(self, dtype: str, shape: Shape, depth: int, exact: bool) -> Value:
        pick = self.random
        kind = pick.choice(["trans", "reshape", "reshape", "join", "split", "split"])
        if kind == "trans" and len(shape) > 1:
            order = list(range(len(shape)))
            pick.shuffle(order)
            source: list[int] = [0] * len(shape)
            for d, n in zip(order, shape, strict=True):
                source[d] = n
            if len(shape) == 2:
                a = self.value(dtype, shape[::-1], depth, exact)
                return self.let(pick.choice([f"tl.trans({a.name})", f"{a.name}.T"]), replace(a, shape=shape))
            a = self.value(dtype, tuple(source), depth, exact)
            return self.let(f"tl.permute({a.name}, {_text(tuple(order))})", replace(a, shape=shape))
        if kind == "reshape":
            size = math.prod(shape)
            rank = pick.choice([1, 2, 2, 3])
            rest, other = size, []
            for _ in range(rank - 1):
                n = 2 ** pick.randint(0, int(math.log2(rest)))
                other.append(n)
                rest //= n
            a = self.value(dtype, (*other, rest), depth, exact)
            return self.let(f"tl.reshape({a.name}, {_text(shape)})", replace(a, shape=shape))
        if kind == "join" and len(shape) > 1 and shape[-1] == 2:
            a, b = (self.value(dtype, shape[:-1], depth, exact) for _ in range(2))
            return self.let(f"tl.join({a.name}, {b.name})", replace(_either(a, b), shape=shape))
        if kind == "join" and shape[-1] >= 2:  # and two dimensions made one
            half = (*shape[:-1], shape[-1] // 2)
            a, b = (self.value(dtype, half, depth, exact) for _ in range(2))
            text = f"tl.reshape(tl.join({a.name}, {b.name}), {_text(shape)})"
            return self.let(text, replace(_either(a, b), shape=shape))
        if kind == "split" and len(shape) < 3:
            a = self.value(dtype, (*shape, 2), depth, exact)
            first, second = replace(a, name=self.fresh(), shape=shape), replace(a, name=self.fresh(), shape=shape)
            self.line(f"{first.name}, {second.name} = tl.split({a.name})")
            self.known += [first, second]
            return pick.choice([first, second])
        raise Unfit

    def reduced(self, dtype: str, shape: Shape, depth: int, exact: bool) -> Value:
        """A sum or extremum along an axis; of all elements if the shape is ()."""
        pick = self.random
        kind = pick.choice(["sum", "sum", "max", "min", "xor"])
        if dtype not in ("f32", "f64", "i32", "i64"):
            raise Unfit
        source = dtype
        if dtype == "i32" and pick.random() < 0.4:
            source = pick.choice(["i8", "i16"]) if kind != "xor" else "i32"
        if dtype == "f32" and kind in ("max", "min") and pick.random() < 0.3:
            source = "f16"
        if not shape:
            a = self.value(source, self.shape(most=256), depth, exact)
            count, axis = math.prod(a.shape), ""
            if len(a.shape) == 1:
                axis = pick.choice(["", ", 0"])
        else:
            if len(shape) > 2:
                raise Unfit
            count, d = 2 ** pick.randint(0, 5), pick.randint(0, len(shape))
            if count * math.prod(shape) > 1024:
                raise Unfit
            a = self.value(source, shape[:d] + (count,) + shape[d:], depth, exact)
            axis = f", {d}"
        if kind == "xor":
            if dtype not in INTS or count * math.prod(shape) > 256 or not axis:
                raise Unfit
            return self.let(f"tl.xor_sum({a.name}{axis})", Value("", dtype, shape, 2.0 ** (BITS[dtype] - 1)))
        if kind != "sum":
            return self.let(f"tl.{kind}({a.name}{axis})", replace(a, shape=shape, dtype=dtype))
        if dtype in INTS:
            if dtype == source == "i32":  # the interpreter's sums have 64 bits, and it minds those that overflow
                a = self.let(f"{a.name} & 0xFFFFF", replace(a, bound=2.0**20, positive=True))
            return self.let(f"tl.sum({a.name}{axis})", Value("", dtype, shape, 2.0 ** (BITS[dtype] - 1)))
        like = _many(a, count)
        if not like.bound <= 1e4:
            raise Unfit
        return self.let(f"tl.sum({a.name}{axis})", replace(like, shape=shape, dtype=dtype))

    def factors(self, dtype: str, shape: Shape, depth: int, exact: bool) -> tuple[str, Value]:
        """Two factors of a product, as arguments of tl.dot, and what is known of the product."""
        pick = self.random
        inner = 2 ** pick.randint(0, 6)
        source = pick.choice(["f16", "f32", "f32"]) if dtype == "f32" else "f64"
        names = []
        values = []
        for left, right in ((shape[0], inner), (inner, shape[1])):
            transposed = pick.random() < 0.35
            a = self.value(source, (right, left) if transposed else (left, right), depth, exact)
            values.append(a)
            names.append(pick.choice([f"tl.trans({a.name})", f"{a.name}.T"]) if transposed else a.name)
        like = _many(_product(*(replace(v, dtype=dtype) for v in values)), inner)
        if not like.bound <= 1e4:
            raise Unfit
        return ", ".join(names), replace(like, shape=shape, dtype=dtype)

    def dot(self, dtype: str, shape: Shape, depth: int, exact: bool) -> Value:
        pick = self.random
        names, like = self.factors(dtype, shape, depth, exact)
        rest = f', input_precision="ieee", out_dtype={TYPES[dtype][0]})'
        if pick.random() < 0.5:
            start = f"tl.zeros({_text(shape)}, {TYPES[dtype][0]})"
            return self.let(f"tl.dot({names}{pick.choice(['', ', ' + start])}{rest}", like)
        start = self.value(dtype, shape, depth, exact)
        return self.let(f"tl.dot({names}, {start.name}{rest}", _finite(_added(like, start)))

    # Statements

    def anything(self, depth: int = 3) -> Value:
        return self.value(self.random.choice([*TYPES, "f32", "f32", "i32"]), self.shape(), depth)

    def plain(self) -> None:
        for _ in range(self.random.randint(1, 2)):
            self.store(self.anything(self.random.randint(2, 5)))

    def store(self, value: Value) -> None:
        """To places of its own: another one in each iteration of the loops around."""
        dtype, shape = value.dtype, value.shape
        name = self.pointer("out_" + dtype)
        start = self.sizes.get(name, 0)
        mask = self.mask(shape) if self.random.random() < 0.4 else None
        text, length = ("0", 1) if not shape else self.places(shape, 5000, dense=True)
        total, index = self.programs, "pid"
        for counter, most in self.loops:
            index, total = f"({index}) * {most} + {counter}", total * most
        if total * length > 30000:
            raise Unfit
        self.sizes[name] = start + total * length
        target = f"{name} + {start} + ({index}) * {length}" + (f" + ({text})" if shape else "")
        self.line(f"tl.store({target}, {value.name}{f', mask={mask}' if mask else ''})")
        self.regions.append(Region(name, start, start + total * length, value.error))

    def trips(self) -> tuple[str, int]:
        """The range of a loop, and one more than its counter's largest value."""
        text = self.random.choice(["n0", "n1", "n2", "n3", "0, n1", "1, n2", "0, n3, 2", "2"])
        return f"range({text})", TRIPS

    def loop(self) -> None:
        """A for loop that carries a few tensors and scalars, may store, and may have another one inside."""
        pick = self.random
        if self.branching > 1:
            raise Unfit
        if pick.random() < 0.25:
            return self.sequence(lambda: self.line("pass"))
        self.sequence(None)

    def sequence(self, extra: Callable[[], None] | None) -> None:
        pick = self.random
        carried = self.carry(pick.randint(1, 3))
        counter = self.fresh("t")
        trips, most = self.trips()
        before = len(self.known)
        self.branching += 1
        try:
            with self.block(f"for {counter} in {trips}:"):
                self.loops.append((counter, most))
                self.body(carried)
                if pick.random() < 0.4:
                    self.inner()
                self.loops.pop()
        finally:
            self.branching -= 1
        del self.known[before:]
        self.known += [v for v, _ in carried]
        for v, _ in carried:
            if pick.random() < 0.8:
                self.store(v)

    def inner(self) -> None:
        pick = self.random
        kind = pick.choice(["store", "loop", "branch", "while"])
        if kind == "store":
            self.store(self.anything(2))
        elif kind == "loop" and len(self.loops) < 2:
            self.loop()
        elif kind == "branch":
            self.branch()
        elif kind == "while" and self.branching < 2:
            self.while_loop()

    def carry(self, count: int) -> list[tuple[Value, str]]:
        """Variables that a loop changes, and how."""
        pick = self.random
        carried = []
        for _ in range(count):
            dtype = pick.choice(["f32", "f32", "f64", "f16", "i32", "i64", "i8"])
            shape = () if pick.random() < 0.25 else self.shape(most=512)
            a = self.value(dtype, shape, 1, True)
            if not a.bound <= 64 and dtype in FLOATS:
                raise Unfit
            name = self.fresh("c")
            self.line(f"{name} = {self.narrow(f'{a.name} + 0' if dtype in INTS else f'{a.name} * 1.0', dtype, shape)}")
            bound = 64.0 if dtype in FLOATS else 2.0 ** (BITS[dtype] - 1)
            how = "any" if dtype in INTS else pick.choice(["mean", "extremum", "where", "accumulate"])
            value = Value(name, dtype, shape, bound)
            if how != "accumulate":
                self.known.append(value)
            carried.append((value, how))
        return carried

    def body(self, carried: list[tuple[Value, str]]) -> None:
        """Changes each of the variables, once or more, in random order."""
        pick = self.random
        for k, (value, how) in pick.sample(list(enumerate(carried)), len(carried)):
            name, dtype, shape = value.name, value.dtype, value.shape
            if how == "any":
                new = self.value(dtype, shape, 2, True)
                operator = pick.choice("+-^")
                self.line(f"{name} = {self.narrow(f'{new.name} {operator} {name}', dtype, shape)}")
                continue
            new = self.value(dtype, shape, 2, how != "accumulate")
            if not new.bound <= 64:
                raise Unfit
            if how == "accumulate":  # nothing else reads it
                trips = TRIPS**2
                bound = 64 + trips * new.bound
                error = trips * (new.error + _rounding(dtype, bound))
                if dtype == "f16":
                    error = trips * (new.error + (_rounding(dtype, bound) if new.error else 0))
                self.line(f"{name} += {new.name}")
                carried[k] = (replace(value, bound=bound, error=error), how)
            elif how == "mean":
                self.line(f"{name} = {self.narrow(f'({name} + {new.name}) * 0.5', dtype, shape)}")
            elif how == "where":
                condition = self.truth(shape, 1)
                self.line(f"{name} = tl.where({condition.name}, {name}, {new.name})")
            else:
                self.line(f"{name} = tl.{pick.choice(['maximum', 'minimum'])}({name}, {new.name})")

    def product_loop(self) -> None:
        """Products summed over a loop."""
        pick = self.random
        dtype, shape = pick.choice(["f32", "f32", "f64"]), self.shape(2)
        start = self.value(dtype, shape, 1)
        if not start.bound <= 64:
            raise Unfit
        name = self.fresh("c")
        zero = pick.random() < 0.6
        self.line(f"{name} = tl.zeros({_text(shape)}, {TYPES[dtype][0]})" if zero else f"{name} = {start.name} + 0.0")
        counter = self.fresh("t")
        trips, most = self.trips()
        with self.block(f"for {counter} in {trips}:"):
            self.loops.append((counter, most))
            names, like = self.factors(dtype, shape, 2, False)
            rest = f', input_precision="ieee", out_dtype={TYPES[dtype][0]})'
            self.line(pick.choice([f"{name} = tl.dot({names}, {name}{rest}", f"{name} += tl.dot({names}{rest}"]))
            error = start.error + TRIPS * (like.error + _rounding(dtype, start.bound + TRIPS * like.bound))
            value = Value(name, dtype, shape, start.bound + TRIPS * like.bound, None, error)
            if pick.random() < 0.3:  # a product read inside, too
                self.store(value)
            self.loops.pop()
        if value.bound > 5e4:
            raise Unfit
        self.known.append(value)
        self.store(value)

    def swap(self) -> None:
        """Variables that change places in each iteration."""
        pick = self.random
        dtype, shape = pick.choice([*FLOATS, *INTS]), pick.choice([(), self.shape(1), self.shape(2, 256)])
        count = pick.choice([2, 2, 3])
        names = [self.fresh("c") for _ in range(count)]
        bound = 0.0
        for name in names:
            a = self.value(dtype, shape, 2, True)
            if not a.bound <= 64 and dtype in FLOATS:
                raise Unfit
            bound = max(bound, a.bound)
            self.line(f"{name} = {self.narrow(f'{a.name} + 0', dtype, shape)}")
        counter = self.fresh("t")
        trips, most = self.trips()
        with self.block(f"for {counter} in {trips}:"):
            self.loops.append((counter, most))
            turned = names[1:] + names[:1]
            if dtype in INTS and pick.random() < 0.5:
                turned[0] = f"{turned[0]} + {turned[-1]}"
            elif dtype in FLOATS and pick.random() < 0.5:
                turned[0] = f"({turned[0]} + {turned[-1]}) * 0.5"
            if len(shape) == 2 and shape[0] == shape[1] and pick.random() < 0.7:
                turned[1] = f"tl.trans({turned[1]})"
            if len(shape) == 1 and shape[0] > 1 and pick.random() < 0.3:
                turned[-1] = f"tl.reshape(tl.trans(tl.reshape({turned[-1]}, (2, {shape[0] // 2}))), ({shape[0]},))"
            turned = [self.narrow(text, dtype, shape) for text in turned]
            self.line(f"{', '.join(names)} = {', '.join(turned)}")
            if pick.random() < 0.4:
                self.store(Value(names[0], dtype, shape))
            self.loops.pop()
        for name in names:
            value = Value(name, dtype, shape, bound)
            self.known.append(value)
            self.store(value)

    def while_loop(self) -> None:
        pick = self.random
        if self.branching > 1:
            raise Unfit
        carried = self.carry(pick.randint(1, 2))
        name = self.fresh("w")
        before = len(self.known)
        if pick.random() < 0.5:
            self.line(f"{name} = n{pick.randrange(4)} + 0")
            head, end = f"while {name} > 0:", f"{name} -= 1"
        else:
            self.line(f"{name} = n{pick.randrange(4)} + flag")
            head, end = f"while {name} != 0:", f"{name} = {name} // 2"
        self.branching += 1
        self.loops.append((name, TRIPS + 2))
        try:
            with self.block(head):
                if pick.random() < 0.3:
                    self.store(self.anything(1))
                self.body(carried)
                self.line(end)
        finally:
            self.branching -= 1
        self.loops.pop()
        del self.known[before:]
        self.known += [v for v, _ in carried]
        for v, _ in carried:
            self.store(v)

    def branch(self) -> None:
        """An if on a scalar, with tensors assigned in both branches or changed in one."""
        pick = self.random
        if self.branching > 2:
            raise Unfit
        condition = pick.choice([f"n{pick.randrange(4)} > {pick.randint(0, 3)}", "flag", "pid % 2 == 0", ""])
        if not condition:
            a = self.value("i32", (), 1, True)
            condition = f"{a.name} % 3 != 0"
        results = []
        for _ in range(pick.randint(1, 2)):
            dtype, shape = pick.choice([*TYPES, "f32"]), self.shape(most=512) if pick.random() < 0.8 else ()
            if not shape and dtype in ("b", "bf16"):
                shape = (4,)
            results.append((self.fresh("c"), dtype, shape))
        before = pick.random() < 0.4
        drawn: dict[str, list[Value]] = {name: [] for name, _, _ in results}
        if before:
            for name, dtype, shape in results:
                drawn[name].append(self.value(dtype, shape, 1))
                self.line(f"{name} = {drawn[name][0].name}")
        both = not before or pick.random() < 0.5
        self.branching += 1
        try:
            for head in [f"if {condition}:", "else:"][: 1 + both]:
                with self.block(head):
                    for name, dtype, shape in results:
                        value = self.value(dtype, shape, 2)
                        drawn[name].append(value)
                        self.line(f"{name} = {value.name}")
                    if pick.random() < 0.3:
                        self.store(self.anything(1))
        finally:
            self.branching -= 1
        for name, _, _ in results:
            like = drawn[name][0]
            for other in drawn[name][1:]:
                like = _either(like, other)
            value = replace(like, name=name)
            self.known.append(value)
            if pick.random() < 0.8:
                self.store(value)

    def take(self, kind: str, length: int) -> int:
        """Room in what is read and written, the same for each program."""
        start = self.taken[kind]
        self.taken[kind] += length
        if self.taken[kind] > LENGTH or self.loops:
            raise Unfit
        return start

    def in_place(self) -> None:
        """Reads elements, writes them, and has a use for the old ones afterwards."""
        pick = self.random
        dtype, shape = pick.choice([*FLOATS, *INTS]), self.shape(most=256)
        text, length = self.places(shape, 600, dense=True)
        start = self.take("io", length * self.programs)
        name = self.pointer("io_" + dtype)
        places = f"{name} + {start} + pid * {length} + ({text})"
        like = Value("", dtype, shape, 4.0, 3) if dtype in FLOATS else Value("", dtype, shape)
        old = self.let(f"tl.load({places})", like)
        new = self.arithmetic(dtype, shape, 1, True)
        if pick.random() < 0.7:
            new = (
                self.let(f"{old.name} + {new.name}", _finite(_sum(old, new), 500))
                if dtype in FLOATS
                else self.let(f"{old.name} ^ {new.name}", new)
            )
        if new.error:
            raise Unfit
        mask = self.mask(shape)
        self.line(f"tl.store({places}, {new.name}{f', mask={mask}' if mask else ''})")
        self.regions.append(Region(name, start, start + length * self.programs, 0.0))
        if pick.random() < 0.6:
            both = (
                self.let(f"{old.name} + {new.name}", _finite(_sum(old, new), 500))
                if dtype in FLOATS
                else self.let(f"{old.name} - {new.name}", new)
            )
            self.store(both)
        if pick.random() < 0.6:
            self.line("tl.debug_barrier()")
            again = self.let(f"tl.load({places})", _either(old, new))
            self.store(again)

    def exchange(self) -> None:
        """Stores, a barrier, then reads other elements of what was stored."""
        pick = self.random
        dtype, shape = pick.choice([*FLOATS, *INTS]), self.shape(2, most=256)
        length = math.prod(shape)
        start = self.take("io", length * self.programs)
        name = self.pointer("io_" + dtype)
        base = f"{name} + {start} + pid * {length}"
        rows, columns = (self.along(shape, d) for d in range(2))
        value = self.value(dtype, shape, 2, True)
        if not value.bound <= 500 and dtype in FLOATS:
            raise Unfit
        self.line(f"tl.store({base} + {rows} * {shape[1]} + {columns}, {value.name})")
        self.regions.append(Region(name, start, start + length * self.programs, 0.0))
        self.line("tl.debug_barrier()")
        other = shape[::-1]
        rows, columns = (self.along(other, d) for d in range(2))
        text = pick.choice([
            f"{base} + {columns} * {other[0]} + {rows}",
            f"{base} + {length - 1} - ({rows} * {other[1]} + {columns})",
            f"{base} + (({rows} * {other[1]} + {columns}) * 5 + n1) % {length}",
        ])  # fmt: skip
        read = self.let(f"tl.load({text})", replace(value, shape=other))
        self.store(read)
        if pick.random() < 0.5:  # and back, changed, to elements that were read
            self.line("tl.debug_barrier()")
            self.line(f"tl.store({base} + {rows} * {other[1]} + {columns}, {read.name})")
            self.store(read)

    def atomics(self) -> None:
        pick = self.random
        dtype = pick.choice(["i32", "i64"])
        n = 2 ** pick.randint(0, 5)
        shape = pick.choice([(), (n,), (n,)])
        value = self.value(dtype, shape, 2, True)
        # The interpreter's atomics take every operand for contiguous: sums and comparisons are.
        value = self.let(f"{value.name} + 0", value)
        name = self.pointer("count_" + dtype)
        mask = ""
        if shape and pick.random() < 0.5:
            mask = self.truth(shape, 1).name
            mask = f", mask={self.let(f'({mask} == 0) == 0', Value('', 'b', shape, 1.0)).name}"
        index = self.along(shape, 0) if shape else "0"
        if pick.random() < 0.5:  # shared: only the end says something
            start = self.take("count", 8)
            kind = pick.choice(["add", "max", "min", "and", "or", "xor"])
            index = f"({index} * 3 + pid) % {pick.choice([1, 4, 8])}"
            self.line(f"tl.atomic_{kind}({name} + {start} + {index}, {value.name}{mask})")
            self.regions.append(Region(name, start, start + 8, 0.0))
            return
        length = math.prod(shape)
        start = self.take("count", length * self.programs)
        places = f"{name} + {start} + pid * {length} + {index}"
        kind = pick.choice(["add", "max", "min", "and", "or", "xor", "xchg", "cas"])
        if kind == "cas":
            expected = self.let(f"({value.name} * 0 + {pick.randint(0, 3)}).to({TYPES[dtype][0]})", value)
            old = self.let(f"tl.atomic_cas({places}, {expected.name}, {value.name})", replace(value, bound=math.inf))
        else:
            # The old value of an element that the mask leaves out is undefined.
            old = self.let(f"tl.atomic_{kind}({places}, {value.name}{mask})", Value("", dtype, shape, math.inf))
        if mask and kind != "cas":
            self.known.remove(old)
            old = self.let(f"tl.where({mask[7:]}, {old.name}, 0)", old)
        self.regions.append(Region(name, start, start + length * self.programs, 0.0))
        self.store(old)
        if pick.random() < 0.5:
            self.line("tl.debug_barrier()")
            self.store(self.let(f"tl.load({places})", Value("", dtype, shape, math.inf)))

    def philox(self) -> None:
        pick = self.random
        shape = self.shape(pick.choice([1, 2]), most=128)
        offsets = self.value("i32", shape, 1, True)
        kind = pick.choice(["rand", "randint", "randint4x", "philox", "randn"])
        like = Value("", "i32", shape, 2.0**31)
        if kind in ("rand", "randn"):
            number = Value("", "f32", shape, 1.0, None, 2.0**-22)
            if kind == "randn":
                number = replace(number, bound=8.0, error=1e-4)
            self.store(self.let(f"tl.{kind}(seed, {offsets.name})", number))
        elif kind == "randint":
            self.store(self.let(f"tl.randint(seed, {offsets.name}).to(tl.int32, bitcast=True)", like))
        else:
            names = [self.fresh() for _ in range(4)]
            if kind == "randint4x":
                self.line(f"{', '.join(names)} = tl.randint4x(seed, {offsets.name}, {pick.choice([4, 7, 10])})")
            else:
                more = self.value("i32", shape, 1, True)
                self.line(f"zero = {offsets.name} * 0")
                self.line(f"{', '.join(names)} = tl.philox(seed, {offsets.name}, {more.name}, zero + pid, zero + n0)")
            for name in pick.sample(names, 2):
                self.store(self.let(f"{name}.to(tl.int32, bitcast=True)", like))


def _text(shape: Shape) -> str:
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


def _epsilon(dtype: str) -> float:
    return 2.0 ** -DIGITS[dtype]


def _rounding(dtype: str, bound: float) -> float:
    """The most that two roundings of numbers up to `bound` add to their difference."""
    return 2 * _epsilon(dtype) * bound


def _fits(value: Value) -> bool:
    """Whether a number is exact because it has so few digits."""
    return (
        value.grain is not None and value.error == 0 and value.bound * 2.0**value.grain <= 2.0 ** DIGITS[value.dtype]
        if value.dtype in DIGITS
        else False
    )


def _grain(a: Value, b: Value) -> int | None:
    return None if a.grain is None or b.grain is None else max(a.grain, b.grain)


def _either(a: Value, b: Value) -> Value:
    return replace(a, bound=max(a.bound, b.bound), grain=_grain(a, b), error=max(a.error, b.error), positive=False)


def _sum(a: Value, b: Value) -> Value:
    bound = a.bound + b.bound
    error = a.error + b.error
    return (
        replace(a, bound=bound, grain=_grain(a, b), error=error + _rounding(a.dtype, bound) if error else 0.0)
        if a.dtype in DIGITS
        else a
    )


def _product(a: Value, b: Value) -> Value:
    bound = a.bound * b.bound
    grain = None if a.grain is None or b.grain is None else a.grain + b.grain
    like = replace(a, bound=bound, grain=grain, error=0.0)
    if not (a.error or b.error) and (_fits(like) or a.dtype == "f16"):
        return like  # float16 is rounded before anything is added to it
    # The compiler may add to it without rounding it first.
    return replace(like, grain=None, error=a.error * b.bound + b.error * a.bound + _rounding(a.dtype, bound))


def _many(a: Value, count: int) -> Value:
    """A sum of so many."""
    like = replace(a, bound=a.bound * count, error=a.error * count)
    return like if _fits(like) else replace(like, grain=None, error=like.error + count * _rounding(a.dtype, like.bound))


def _added(a: Value, b: Value) -> Value:
    like = _sum(a, b)
    return like if _fits(like) else replace(like, grain=None, error=a.error + b.error + _rounding(a.dtype, like.bound))


def _finite(value: Value, limit: float = 5e4) -> Value:
    if not value.bound <= limit and value.dtype in DIGITS:
        raise Unfit
    return value


def draw(seed: int) -> Program:
    """The kernel of a seed."""
    return Writer(seed).write()


def load_module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def interpret(path: Path, out: Path, seeds: list[int]) -> None:
    """Runs kernels in the interpreter and saves what they write."""
    torch.set_num_threads(1)
    module = load_module(path)
    results: dict[int, dict[str, Tensor] | str] = {}
    for seed in seeds:
        program = draw(seed)
        arguments, written = program.arguments()
        try:
            getattr(module, program.name)[program.grid](*arguments)
            results[seed] = written
        except Exception as error:  # compared by the test, which names the kernel
            results[seed] = f"{type(error).__name__}: {error}"
    torch.save(results, out)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(HEADER + "\n\n" + draw(int(sys.argv[1])).source)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
        import numpy

        numpy.seterr(all="ignore")
        interpret(Path(sys.argv[1]), Path(sys.argv[2]), [int(s) for s in sys.argv[3:]])
