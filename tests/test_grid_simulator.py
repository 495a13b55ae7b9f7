"""The simulator in `grid_simulator`: what it makes of small kernels that are right, and of ones with a mistake each."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from barrier_mutants import MUTANTS, ONE_TOO_MANY, put_in  # noqa: E402
from grid_simulator import Deadlock, OutOfBounds, Race, Run, simulate, simulated  # noqa: E402

from checks import Case, assert_close, forced, results  # noqa: E402
from lstm_triton import kernels  # noqa: E402
from lstm_triton.kernels import barrier  # noqa: E402

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(not kernels.INTERPRETED, reason="it simulates interpreted kernels"),
]


def line(mark: str) -> str:
    """This file's name and the line that ends with a comment."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [n for n, text in enumerate(lines, 1) if text.endswith(f"  # {mark}")]
    return f"{Path(__file__).name}:{number}"


def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


# ---- Programs that meet at a barrier ----


@triton.jit
def slot_of(step):
    return step % 2


@triton.jit
def slot_of_one(step):
    return 0


@triton.jit
def hand_over(x_ptr, value, counter_ptr, leads, programs):
    tl.store(x_ptr, value)
    barrier.arrive(counter_ptr, leads, programs)


@triton.jit
def hand_over_early(x_ptr, value, counter_ptr, leads, programs):
    barrier.arrive(counter_ptr, leads, programs)
    tl.store(x_ptr, value)


@triton.jit
def sums_kernel(
    y_ptr,  # (GROUPS, PROGRAMS) int32 in and out
    x_ptr,  # (2, GROUPS, PROGRAMS) int32 scratch
    counter_ptr, failed_ptr, steps, rounds, GROUPS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """In each step a program's number becomes its index and the sum of its group's."""
    p, group = tl.program_id(0), tl.program_id(1)
    counter_ptr += group * 32
    value = tl.load(y_ptr + group * PROGRAMS + p)
    before = barrier.before(counter_ptr)
    for step in range(steps):
        at = x_ptr + (slot_of(step) * GROUPS + group) * PROGRAMS
        hand_over(at + p, value, counter_ptr, p == 0, PROGRAMS)
        rounds = barrier.wait(counter_ptr, before, rounds)  # waits
        before = ~before
        value = p + tl.sum(tl.load(at + tl.arange(0, PROGRAMS)))
    tl.store(y_ptr + group * PROGRAMS + p, value)
    if rounds == 0:
        tl.atomic_add(failed_ptr, 1, sem="relaxed")


GROUPS, PROGRAMS, STEPS = 2, 4, 4
INDICES = [(p, group) for p in range(PROGRAMS) for group in range(GROUPS)]


def sums(rounds: int = 1000, **options: Any) -> tuple[Run, bool, int]:
    """The launch, whether its values are right, and how many of its programs gave up."""
    y = torch.arange(GROUPS * PROGRAMS, dtype=torch.int32).view(GROUPS, PROGRAMS)
    expected = y
    for _ in range(STEPS):
        expected = torch.arange(PROGRAMS) + expected.sum(1, keepdim=True)
    counters, failed = zeros(GROUPS, barrier.SPACING), zeros(1)
    run = simulate(
        sums_kernel, (PROGRAMS, GROUPS), [y, zeros(2, GROUPS, PROGRAMS), counters, failed, STEPS, rounds],
        {"GROUPS": GROUPS, "PROGRAMS": PROGRAMS}, **options,
    )  # fmt: skip
    return run, torch.equal(y, expected.int()), int(failed)


@pytest.mark.parametrize("preempt", [False, True])
def test_barrier(preempt: bool) -> None:
    """Right in whatever order; programs wait, rather than look, while others go on."""
    turns = set()
    for seed in range(20):
        run, right, failed = sums(seed=seed, preempt=preempt, rounds=30)
        assert right and failed == 0
        assert (run.kernel, run.programs) == ("sums_kernel", GROUPS * PROGRAMS)
        turns.add(run.turns)
    assert len(turns) > 1


@pytest.mark.parametrize("index", INDICES)
def test_barrier_with_a_starved_program(index: tuple[int, int]) -> None:
    for seed in range(3):
        _, right, failed = sums(seed=seed, starve=index)
        assert right and failed == 0


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_of_the_barrier(monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    put_in(mutant, monkeypatch)
    for seed in range(5):
        with pytest.raises(Race, match=r"loads x_ptr|stores to x_ptr"):
            sums(seed=seed)


@pytest.mark.parametrize("name,mutant", [("slot_of", slot_of_one), ("hand_over", hand_over_early)])
def test_mutants_of_the_kernel(monkeypatch: pytest.MonkeyPatch, name: str, mutant: Any) -> None:
    monkeypatch.setattr(sys.modules[__name__], name, mutant)
    for seed in range(5):
        with pytest.raises(Race, match=r"loads x_ptr|stores to x_ptr"):
            sums(seed=seed)


def test_same_seed_same_order() -> None:
    assert [sums(seed=3)[0] for _ in range(2)] == [sums(seed=3)[0]] * 2


# ---- Waiting in vain ----


def test_deadlock_before_the_kernel_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for an arrival that never comes; the message names all of them, where they are and for what."""
    put_in(ONE_TOO_MANY, monkeypatch)
    with pytest.raises(Deadlock) as caught:
        sums(rounds=1000)
    for p, group in INDICES:
        text = rf"program \({p}, {group}, 0\) waits for counter_ptr\[{group}, 0\] at barrier.py:\d+, called at "
        assert caught.match(text + line("waits"))


def test_kernel_gives_up_before_a_deadlock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer looks than it takes: what the kernel makes of it is seen, and is a race."""
    put_in(ONE_TOO_MANY, monkeypatch)
    _, right, failed = sums(rounds=50, races=False)
    assert not right and failed == GROUPS * PROGRAMS
    with pytest.raises(Race):
        sums(rounds=50)


@triton.jit
def crossed_kernel(flag_ptr):
    """Each program waits for the other's flag before it raises its own."""
    p = tl.program_id(0)
    while tl.atomic_add(flag_ptr + 1 - p, 0) == 0:
        pass
    tl.atomic_xchg(flag_ptr + p, 1)


@triton.jit
def either_kernel(flag_ptr):
    """Waits for one of two flags, which nobody raises, and loads a third meanwhile."""
    while (tl.atomic_add(flag_ptr, 0) == 0) & (tl.atomic_add(flag_ptr + 1, 0) == 0):
        tl.load(flag_ptr + 2)


@triton.jit
def loading_kernel(flag_ptr, raises):
    """Looks by plain loads at a flag, which program 0 raises or doesn't."""
    if (tl.program_id(0) == 0) & (raises > 0):
        tl.atomic_xchg(flag_ptr, 1)
    while tl.load(flag_ptr) == 0:
        pass


@triton.jit
def patient_kernel(flag_ptr, times):
    """Program 1 looks many times at a flag that program 0 raises at once."""
    if tl.program_id(0) == 0:
        tl.atomic_xchg(flag_ptr, times)
    else:
        for time in range(times):
            while tl.atomic_add(flag_ptr, 0) < time:
                pass


def test_deadlocks_without_a_barrier() -> None:
    with pytest.raises(Deadlock, match=r"program \(0, 0, 0\) waits for flag_ptr\[1\] .*program \(1, 0, 0\) waits for"):
        simulate(crossed_kernel, (2,), [zeros(2)], {})
    with pytest.raises(Deadlock, match=r"program \(0, 0, 0\) waits for (flag_ptr|a load) .*; program \(1,"):
        simulate(either_kernel, (2,), [zeros(3)], {})
    with pytest.raises(Deadlock, match=r"program \(1, 0, 0\) waits for a load at"):
        simulate(loading_kernel, (2,), [zeros(1), 0], {}, races=False)


def test_waiting_by_plain_loads() -> None:
    """Ends, and is a race."""
    simulate(loading_kernel, (3,), [zeros(1), 1], {}, races=False)
    for seed in range(5):
        with pytest.raises(Race, match="flag_ptr"):
            simulate(loading_kernel, (3,), [zeros(1), 1], {}, seed=seed)


def test_looks_that_repeat_are_no_deadlock() -> None:
    for seed in range(5):
        simulate(patient_kernel, (2,), [zeros(1), 90], {}, seed=seed)


# ---- What orders, and what doesn't ----


@triton.jit
def relay_kernel(x_ptr, flag_ptr, MISTAKE: tl.constexpr):
    """Program p adds 1 to x once program p - 1 has: each waits for the one before it alone."""
    p = tl.program_id(0)
    while tl.atomic_add(flag_ptr + p, 0, sem="acquire") == 0:
        pass
    tl.store(x_ptr, tl.load(x_ptr) + 1)
    if MISTAKE != "no barrier":
        tl.debug_barrier()
    if MISTAKE == "cta":
        tl.atomic_xchg(flag_ptr + p + 1, 1, sem="release", scope="cta")
    else:
        tl.atomic_xchg(flag_ptr + p + 1, 1, sem="release")


def relay(mistake: str = "", **options: Any) -> int:
    x, flags = zeros(1), zeros(5)
    flags[0] = 1
    simulate(relay_kernel, (4,), [x, flags], {"MISTAKE": mistake}, **options)
    return int(x)


@pytest.mark.parametrize("starve", [None, 0, 1, 2, 3])
def test_order_through_others(starve: int | None) -> None:
    for seed in range(5):
        assert relay(seed=seed, starve=starve) == 4


@pytest.mark.parametrize("mistake,name", [("no barrier", r"x_ptr\[0\]"), ("cta", r"flag_ptr\[1\]")])
def test_release_that_orders_nothing(mistake: str, name: str) -> None:
    for seed in range(5):
        with pytest.raises(Race, match=name):
            relay(mistake, seed=seed)


@triton.jit
def sequence_kernel(x_ptr, count_ptr, LOADS: tl.constexpr):
    """Program 0 releases, program 1 adds to that without; program 2 loads, after both, what program LOADS stored."""
    p = tl.program_id(0)
    if p < 2:
        tl.store(x_ptr + p, 1)
        tl.debug_barrier()
    if p == 0:
        tl.atomic_add(count_ptr, 1, sem="release")
    elif p == 1:
        while tl.atomic_add(count_ptr, 0, sem="relaxed") < 1:
            pass
        tl.atomic_add(count_ptr, 1, sem="relaxed")
    else:
        while tl.atomic_add(count_ptr, 0, sem="acquire") < 2:
            pass
        tl.store(x_ptr + 2, tl.load(x_ptr + LOADS))


def test_release_sequence() -> None:
    """A relaxed atomic in between passes on the release before it, and none of its own program's stores."""
    for seed in range(5):
        simulate(sequence_kernel, (3,), [zeros(3), zeros(1)], {"LOADS": 0}, seed=seed)
        with pytest.raises(Race, match=r"program \(2, 0, 0\) loads x_ptr\[1\] .* program \(1, 0, 0\), which stored"):
            simulate(sequence_kernel, (3,), [zeros(3), zeros(1)], {"LOADS": 1}, seed=seed)


@triton.jit
def lock_kernel(x_ptr, lock_ptr, TAKES: tl.constexpr, FREES: tl.constexpr):
    """Adds 1 to x three times, each while it holds a lock."""
    for _ in range(3):
        while tl.atomic_cas(lock_ptr, 0, 1, sem=TAKES) != 0:
            pass
        tl.store(x_ptr, tl.load(x_ptr) + 1)
        tl.debug_barrier()
        tl.atomic_xchg(lock_ptr, 0, sem=FREES)


def test_lock() -> None:
    for seed in range(10):
        x = zeros(1)
        simulate(lock_kernel, (4,), [x, zeros(1)], {"TAKES": "acquire", "FREES": "release"}, seed=seed, preempt=True)
        assert int(x) == 12


@pytest.mark.parametrize("takes,frees", [("acquire", "relaxed"), ("relaxed", "release"), ("release", "relaxed")])
def test_lock_that_orders_nothing(takes: str, frees: str) -> None:
    """Its values are right, and yet there is a race. A compare-and-swap that doesn't swap releases nothing."""
    x = zeros(1)
    simulate(lock_kernel, (4,), [x, zeros(1)], {"TAKES": takes, "FREES": frees}, races=False, preempt=True)
    assert int(x) == 12
    with pytest.raises(Race, match=r"x_ptr\[0\]"):
        simulate(lock_kernel, (4,), [x, zeros(1)], {"TAKES": takes, "FREES": frees})


@triton.jit
def counting_kernel(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + 1)


def test_wrong_values_need_preemption() -> None:
    """Programs that stop at loads and stores lose one another's additions; others that have no atomics don't."""

    def count(**options: Any) -> int:
        x = zeros(1)
        simulate(counting_kernel, (4,), [x], {}, races=False, **options)
        return int(x)

    assert [count(seed=seed) for seed in range(10)] == [4] * 10
    assert min(count(seed=seed, preempt=True) for seed in range(10)) < 4
    with pytest.raises(Race):
        simulate(counting_kernel, (4,), [zeros(1)], {})


@triton.jit
def ticket_kernel(ticket_ptr, y_ptr):
    p = tl.program_id(0)
    tl.store(y_ptr + p, tl.atomic_add(ticket_ptr, 1))


def test_orders() -> None:
    """By the seed any program can come first or last; a starved one comes last."""

    def order(**options: Any) -> tuple[int, ...]:
        y = zeros(4)
        simulate(ticket_kernel, (4,), [zeros(1), y], {}, **options)
        return tuple(y.tolist())

    found = [order(seed=seed) for seed in range(40)]
    assert all(sorted(tickets) == [0, 1, 2, 3] for tickets in found)
    for p in range(4):
        assert {0, 3} <= {tickets[p] for tickets in found}
        assert all(order(seed=seed, starve=p)[p] == 3 for seed in range(5))


# ---- What an access touches ----


NUMBERS = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9))  # as masks; 3.9 refuses them


@triton.jit
def pieces_kernel(x_ptr, y_ptr, n, FIRST: tl.constexpr, LENGTH: tl.constexpr):
    """Program p copies LENGTH elements from x[FIRST + p n] on to y[p n] on."""
    at = tl.program_id(0) * n + tl.arange(0, 8)
    mask = tl.arange(0, 8) < LENGTH
    if NUMBERS:
        none = 0
        mask = mask & (none == 0)  # interpreted, numbers rather than truth values
    x = tl.load(x_ptr + FIRST + at, mask=mask, other=0)  # copy loads
    tl.store(y_ptr + at, x, mask=mask)  # copy stores


def pieces(x: Tensor, y: Tensor, n: int = 5, first: int = 0, length: int = 5, **options: Any) -> Run:
    return simulate(pieces_kernel, (3,), [x, y, n], {"FIRST": first, "LENGTH": length}, **options)


def test_masked_lanes_touch_nothing() -> None:
    pieces(zeros(15), zeros(3, 5))
    for seed in range(5):
        with pytest.raises(Race, match=r"stores to y_ptr\[[12], 0\] .* stored to it"):
            pieces(zeros(21), zeros(4, 5), length=6, seed=seed)


def test_message_of_a_race() -> None:
    """Of a load before and after the store of another program that it should be ordered with."""
    shared = zeros(4, 6)
    for starve, text in (
        (0, r"^program \(0, 0, 0\) loads {x} at {load}, and nothing orders it after program \(1, 0, 0\), "
            r"which stored to it at {store}$"),
        (1, r"^program \(1, 0, 0\) stores to {y} at {store}, and nothing orders it after program \(0, 0, 0\), "
            r"which loaded it at {load}$"),
    ):  # fmt: skip
        names = {"load": line("copy loads"), "store": line("copy stores")}
        names |= {"x": r"x_ptr\[1, 2\] = y_ptr\[1, 2\]", "y": r"x_ptr\[1, 2\] = y_ptr\[1, 2\]"}
        with pytest.raises(Race, match=text.format(**names)):
            simulate(pieces_kernel, (2,), [shared, shared, 8], {"FIRST": 8, "LENGTH": 1}, starve=starve, preempt=True)


def test_views_of_a_storage() -> None:
    """Arguments that share memory share elements, whatever their strides and the sizes of their elements."""
    whole = zeros(8, 4)
    pieces(whole[:4].view(-1), whole[4:].view(-1))
    with pytest.raises(Race, match=r"x_ptr\[1, 0\] = y_ptr\[9\]"):
        simulate(pieces_kernel, (2,), [whole[3:].t(), whole[1:].view(-1), 9], {"FIRST": 1, "LENGTH": 1})
    wide = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(Race, match=r"x_ptr\[3\] = y_ptr\[1\]"):
        simulate(pieces_kernel, (2,), [wide.view(torch.int32), wide, 1], {"FIRST": 3, "LENGTH": 1})


def test_memory_of_no_argument() -> None:
    with pytest.raises(OutOfBounds, match=rf"program \(2, 0, 0\) accesses memory of no .* at {line('copy loads')}"):
        pieces(zeros(14), zeros(15), starve=2)


# ---- Launches by the library ----


@pytest.mark.parametrize("way", ["persistent", "step"])
def test_layers(way: str) -> None:
    """Values as without it, of each kernel of a forward and a backward pass; only cooperative launches if so asked."""
    case = Case(steps=3, batch=5, bidirectional=True)
    reference, ours = case.modules(torch.device("cpu"), torch.float32, backend="triton")
    inputs = case.inputs(torch.device("cpu"), torch.float32)
    expected = results(reference, case, inputs, torch.float64)
    with forced(way):
        with simulated() as runs:
            assert_close(results(ours, case, inputs, torch.float32), expected, torch.float32)
        assert {run.kernel for run in runs} >= {"forward_kernel", "backward_kernel"}
        with simulated(cooperative=True) as runs:
            assert_close(results(ours, case, inputs, torch.float32), expected, torch.float32)
        assert runs == []
    results(ours, case, inputs, torch.float32)
    assert runs == []  # none after its end


def test_cooperative_launches_alone() -> None:
    x = zeros(1)
    with simulated(cooperative=True) as runs:
        counting_kernel[(4,)](x)
        assert int(x) == 4 and runs == []
        with pytest.raises(Race):
            counting_kernel[(4,)](x, launch_cooperative_grid=True)
    assert [run.kernel for run in runs] == ["counting_kernel"]
