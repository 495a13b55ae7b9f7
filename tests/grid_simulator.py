"""Runs an interpreted kernel's programs interleaved, and finds races and deadlocks.

Triton's interpreter runs one program after the other: one that waits for a later one would wait forever, and a missing
barrier wouldn't show. Here each program is a greenlet that stops at every atomic, and a seed draws who goes on, while
`happens_before` looks for accesses that nothing orders. An atomic of scope "cta" orders nothing and is like a plain
store; Triton 3.9's atomic loads, stores and polls are taken for plain ones.

What this relies on in Triton's interpreter, the same in 3.6 to 3.9: it makes a `GridExecutor`, found by that name in
its module, which calls the hooks `pre_run_hooks` and then `fn` for one program after the other, and wraps exceptions in
`InterpreterError`; its `interpreter_builder` has `grid_dim`, `grid_idx`, `set_grid_idx` and the five methods that
`_Simulation.patched` replaces.
"""

import ctypes
import inspect
import math
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import triton
from greenlet import getcurrent, greenlet
from happens_before import Found, Lines, Memory, Order, Race, text
from triton.runtime import interpreter

__all__ = ["Deadlock", "OutOfBounds", "Race", "Run", "simulate", "simulated"]

NOT_KERNELS = (str(Path(triton.__file__).parent), __file__)  # where code is that is no part of a kernel
LOOK = 0.01  # what a load counts, where an atomic that changes nothing counts 1


class Deadlock(Found):
    """Each program that lives looks at atomics, or loads, again and again, and nothing changes."""


class OutOfBounds(Found):
    """A program accesses memory of no tensor argument."""


@dataclass
class Run:
    """A launch that was simulated."""

    kernel: str
    programs: int = 0
    turns: int = 0  # how often a program was chosen to go on


def simulate(kernel: Any, grid: tuple[int, ...], args: list[Any], constants: dict[str, Any], **options: Any) -> Run:
    """Launches `kernel[grid](*args, **constants)` within `simulated(**options)`."""
    with simulated(**options) as runs:
        kernel[grid](*args, **constants)
    return runs[0]


@contextmanager
def simulated(
    seed: int = 0,
    *,
    starve: tuple[int, ...] | int | None = None,
    preempt: bool = False,
    races: bool = True,
    patience: int = 100,
    cooperative: bool = False,
) -> Iterator[list[Run]]:
    """Within this context launches of interpreted kernels are simulated; yields a list that they are added to.

    Args:
        seed: of the order in which programs go on, and of how much more often some are chosen than others.
        starve: the `tl.program_id`s of a program that goes on only when all others wait or have ended.
        preempt: whether programs stop at loads and stores, too: wrong values may need it, races don't.
        races: whether to look for races.
        patience: how often each program that lives looks, all in vain, before it is a deadlock. A kernel that gives
            up after fewer looks does so; one that would after more doesn't get there.
        cooperative: whether to simulate only launches with `launch_cooperative_grid=True`.

    Raises (from a launch):
        Race: names both programs, what they did and where, the tensor argument and the index in it.
        Deadlock: names each program that lives, where it waits and for what.
        OutOfBounds: names the program, and where it is.
    """
    runs: list[Run] = []
    draw = random.Random(seed)
    original = interpreter.GridExecutor

    class Executor(original):  # type: ignore[misc, valid-type]
        fn: Any
        pre_run_hooks: list[Callable[..., None]]

        def __call__(self, *args: Any, **kwargs: Any) -> None:
            if cooperative and not kwargs.get("launch_cooperative_grid"):
                return super().__call__(*args, **kwargs)
            simulation = _Simulation(self.fn, draw, starve, preempt, races, patience)
            runs.append(simulation.run)
            self.pre_run_hooks = [*self.pre_run_hooks, simulation.remember]
            self.fn = simulation
            try:
                super().__call__(*args, **kwargs)
            except interpreter.InterpreterError as error:
                # Each interpreted function on the way has wrapped it in an error of its own.
                cause: BaseException = error
                while cause.__cause__ is not None:
                    cause = cause.__cause__
                if isinstance(cause, Found):
                    raise cause from None
                raise

    interpreter.GridExecutor = Executor
    try:
        yield runs
    finally:
        interpreter.GridExecutor = original


@dataclass(frozen=True)
class _Look:
    """What a program is about to do, or its last atomic if that changed nothing."""

    lines: Lines = ()
    places: tuple[tuple[int, int], ...] = ()  # an atomic's addresses and widths
    seen: tuple[bytes, ...] = ()

    def read(self) -> tuple[bytes, ...]:
        return tuple(ctypes.string_at(address, width) for address, width in self.places)


class _Simulation:
    """Takes the kernel's place: the interpreter calls it for each program, and its last call runs them all."""

    def __init__(
        self,
        fn: Callable[..., None],
        draw: random.Random,
        starve: tuple[int, ...] | int | None,
        preempt: bool,
        races: bool,
        patience: int,
    ):
        self.fn, self.draw, self.starve = fn, draw, starve
        self.preempt, self.races, self.patience = preempt, races, patience
        # The interpreter asks for these of what it takes for the kernel.
        self.__name__, self.__globals__, self.__signature__ = fn.__name__, fn.__globals__, inspect.signature(fn)
        self.builder = interpreter.interpreter_builder
        self.calls: list[tuple[tuple[int, ...], dict[str, Any]]] = []
        self.run = Run(fn.__name__)

    def remember(self, *args: Any, **kwargs: Any) -> None:
        """Before the launch: its arguments, in the host's memory."""
        self.memory = Memory(inspect.getcallargs(self.fn, *args, **kwargs))

    def __call__(self, **arguments: Any) -> None:
        self.calls.append((self.builder.grid_idx, arguments))
        if len(self.calls) == math.prod(self.builder.grid_dim):
            self.interleave()

    def interleave(self) -> None:
        P = self.run.programs = len(self.calls)
        self.names = [f"program {index}" for index, _ in self.calls]
        self.order = Order(self.memory, self.names)
        self.main, self.p = getcurrent(), 0  # who chooses, and the program that goes on
        self.next, self.last = [_Look()] * P, [_Look()] * P
        self.quiet = np.zeros(P)  # looks in vain since anything has changed
        starved = None
        if self.starve is not None:
            index = (self.starve,) if isinstance(self.starve, int) else tuple(self.starve)
            starved = [i for i, _ in self.calls].index((*index, 0, 0)[:3])
        speeds = [self.draw.choice((1, 1, 10)) for _ in range(P)]
        programs = [greenlet(lambda arguments=arguments: self.fn(**arguments)) for _, arguments in self.calls]
        try:
            with self.patched():
                while living := [p for p in range(P) if not programs[p].dead]:
                    able = [p for p in living if self.quiet[p] < self.patience]
                    eager = [p for p in able if not self.waits(p)]
                    choice = [p for p in eager if p != starved] or eager or able
                    if not choice:
                        self.deadlock(living)
                    self.p = self.draw.choices(choice, [speeds[p] for p in choice])[0]
                    self.builder.set_grid_idx(*self.calls[self.p][0])
                    self.run.turns += 1
                    programs[self.p].switch()
                    if programs[self.p].dead:
                        self.quiet.fill(0)
        finally:
            for program in programs:
                if not program.dead:
                    program.throw()

    def waits(self, p: int) -> bool:
        """Whether a program is about to repeat an atomic that changed nothing, and would see the same again."""
        next, last = self.next[p], self.last[p]
        return bool(last.places) and (next.lines, next.places, last.read()) == (last.lines, last.places, last.seen)

    def pause(self, look: _Look) -> None:
        self.next[self.p] = look
        self.main.switch()

    def deadlock(self, living: list[int]) -> NoReturn:
        waits = []
        for p in living:
            look = self.next[p]
            elements = self.memory.elements(np.array([address for address, _ in look.places], np.int64), 1)
            names = ", ".join(self.memory.name(element) for element in elements.tolist()) or "a load"
            waits.append(f"{self.names[p]} waits for {names} at {text(look.lines)}")
        raise Deadlock("no program goes on: " + "; ".join(waits))

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Programs stop before the interpreter's operations on memory, which are checked."""
        builder = self.builder
        load, store = builder.create_masked_load, builder.create_masked_store
        rmw, cas, barrier = builder.create_atomic_rmw, builder.create_atomic_cas, builder.create_barrier

        def checked_load(pointers: Any, mask: Any, *rest: Any) -> Any:
            self.load(pointers, mask)
            return load(pointers, mask, *rest)

        def checked_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.store(pointers, mask)
            return store(pointers, value, mask, *rest)

        def checked_rmw(op: Any, pointers: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
            return self.atomic(pointers, mask, sem, scope, lambda: rmw(op, pointers, value, mask, sem, scope))

        def checked_cas(pointers: Any, expected: Any, value: Any, sem: Any, scope: Any) -> Any:
            return self.atomic(pointers, None, sem, scope, lambda: cas(pointers, expected, value, sem, scope), expected)

        def checked_barrier(*args: Any) -> Any:
            self.order.barrier(self.p)
            return barrier(*args)

        methods = {
            "create_masked_load": checked_load,
            "create_masked_store": checked_store,
            "create_atomic_rmw": checked_rmw,
            "create_atomic_cas": checked_cas,
            "create_barrier": checked_barrier,
        }
        vars(builder).update(methods)
        try:
            yield
        finally:
            for name in methods:
                delattr(builder, name)

    def load(self, pointers: Any, mask: Any) -> None:
        lines = _lines()
        self.quiet[self.p] += LOOK
        if self.preempt or self.quiet[self.p] > 1:  # so that one that waits by plain loads doesn't wait forever
            self.pause(_Look(lines))
        self.last[self.p] = _Look()
        elements = self.elements(*_addresses(pointers, mask), lines)
        if self.races:
            self.order.load(self.p, elements, lines)

    def store(self, pointers: Any, mask: Any) -> None:
        lines = _lines()
        if self.preempt:
            self.pause(_Look(lines))
        self.last[self.p] = _Look()
        self.quiet.fill(0)
        elements = self.elements(*_addresses(pointers, mask), lines)
        if self.races:
            self.order.store(self.p, elements, lines)

    def atomic(
        self, pointers: Any, mask: Any, sem: Any, scope: Any, do: Callable[[], Any], expected: Any = None
    ) -> Any:
        """`do` and what comes with it; expected: of a compare-and-swap, which releases only where it swaps."""
        lines = _lines()
        addresses, width = _addresses(pointers, mask)
        look = _Look(lines, tuple((address, width) for address in addresses.tolist()))
        self.pause(look)
        elements, single = self.elements(addresses, width, lines), str(scope).endswith("CTA")
        if self.races:
            (self.order.store if single else self.order.atomic)(self.p, elements, lines)
        seen = look.read()
        result = do()
        if look.read() != seen:
            self.quiet.fill(0)
            self.last[self.p] = _Look()
        else:
            self.quiet[self.p] += 1
            self.last[self.p] = _Look(lines, look.places, seen)
        if self.races and not single:
            if "ACQUIRE" in str(sem):
                self.order.acquire(self.p, elements)
            if "RELEASE" in str(sem):
                swaps = slice(None) if expected is None else np.ravel(result.data == expected.data)
                self.order.release(self.p, elements[: len(addresses)][swaps])
        return result

    def elements(self, addresses: np.ndarray, width: int, lines: Lines) -> np.ndarray:
        elements = self.memory.elements(addresses, width)
        if (elements < 0).any():
            raise OutOfBounds(f"{self.names[self.p]} accesses memory of no tensor argument at {text(lines)}")
        return elements


def _addresses(pointers: Any, mask: Any) -> tuple[np.ndarray, int]:
    """The addresses that aren't masked off, and how many bytes are accessed at each."""
    chosen = pointers.data if mask is None else pointers.data[np.asarray(mask.data, bool)]
    return np.ravel(chosen), max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _lines() -> Lines:
    """Where the kernel is: in each of its functions that are being called."""
    found = []
    frame = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(NOT_KERNELS):
            found.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(found)
