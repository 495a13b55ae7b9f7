"""Ways to get `lstm_triton.kernels.barrier` wrong: programs that don't wait for all others, or forever."""

import pytest
import triton
import triton.language as tl

from lstm_triton.kernels import barrier

right_arrive, right_wait = barrier.arrive, barrier.wait
_SPACING = tl.constexpr(barrier.SPACING)


@triton.jit
def relaxed_arrive(counter_ptr, leads, programs):
    tl.debug_barrier()
    adds = tl.where(leads, 2147483647 - (programs - 2), 1)
    tl.atomic_add(counter_ptr, adds, sem="relaxed")


@triton.jit
def relaxed_wait(counter_ptr, before, rounds):
    while (rounds > 0) & ((tl.atomic_add(counter_ptr, 0, sem="relaxed") ^ before) >= 0):
        rounds -= 1
    tl.debug_barrier()
    return rounds


@triton.jit
def unfenced_arrive(counter_ptr, leads, programs):
    adds = tl.where(leads, 2147483647 - (programs - 2), 1)
    tl.atomic_add(counter_ptr, adds, sem="release")


@triton.jit
def no_wait(counter_ptr, before, rounds):
    return rounds


@triton.jit
def arrive_of_one_less(counter_ptr, leads, programs):
    right_arrive(counter_ptr, leads, programs - 1)


@triton.jit
def arrive_of_one_more(counter_ptr, leads, programs):
    right_arrive(counter_ptr, leads, programs + 1)


@triton.jit
def wait_for_others_group(counter_ptr, before, rounds):
    other = tl.where(tl.program_id(1) == 0, _SPACING, -_SPACING)
    return right_wait(counter_ptr + other, before, rounds)


@triton.jit
def arrive_with_all_groups(counter_ptr, leads, programs):
    right_arrive(counter_ptr - tl.program_id(1) * _SPACING, leads, programs)


@triton.jit
def wait_with_all_groups(counter_ptr, before, rounds):
    return right_wait(counter_ptr - tl.program_id(1) * _SPACING, before, rounds)


# What each has in the place of `arrive` and of `wait`. The last two are for two groups or more, along
# `tl.program_id(1)`, with the counter of each after that of the one before.
MUTANTS = {
    "relaxed arrival": (relaxed_arrive, right_wait),
    "relaxed wait": (right_arrive, relaxed_wait),
    "arrival before other warps' stores": (unfenced_arrive, right_wait),
    "no wait": (right_arrive, no_wait),
    "one arrival short": (arrive_of_one_less, right_wait),
    "another group's counter": (right_arrive, wait_for_others_group),
    "a counter for all groups": (arrive_with_all_groups, wait_with_all_groups),
}
ONE_TOO_MANY = "one arrival too many"  # not among them: a deadlock, where those are races


def put_in(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that call `barrier.arrive` and `barrier.wait` call the mutant's."""
    arrive, wait = (arrive_of_one_more, right_wait) if name == ONE_TOO_MANY else MUTANTS[name]
    monkeypatch.setattr(barrier, "arrive", arrive)
    monkeypatch.setattr(barrier, "wait", wait)
