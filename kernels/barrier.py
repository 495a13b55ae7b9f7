"""A barrier between programs that share a counter: one arrival each, then a look at the counter until all are there.

The arrivals of one barrier add up to 2**31, so that the counter's top bit flips and its other bits are as before:
it needs no reset, neither between barriers nor between launches, whatever the number of programs. A program that has
waited in vain goes on arriving without waiting, so that a launch that failed leaves the counter as one that didn't.
"""

import triton
import triton.language as tl

SPACING = 32  # int32 counters from one barrier's to the next's, so that no two are in one line of a cache


@triton.jit
def arrive(counter_ptr, programs):
    """Says that what this program wrote may be read; returns the counter as it was.

    Args:
        counter_ptr: int32, shared by the programs that meet.
        programs: how many they are; their `tl.program_id(0)` are 0 … programs - 1.
    """
    tl.debug_barrier()
    adds = tl.where(tl.program_id(0) == 0, 2147483647 - (programs - 2), 1)
    return tl.atomic_add(counter_ptr, adds, sem="release")


@triton.jit
def wait(counter_ptr, arrived, rounds):
    """Returns once all have arrived, or after so many looks; what is left of them, 0 for too late.

    Args:
        counter_ptr: as of `arrive`.
        arrived: what `arrive` returned.
        rounds: int32; 0 doesn't wait.
    """
    while (rounds > 0) & ((tl.atomic_add(counter_ptr, 0, sem="acquire") ^ arrived) >= 0):
        rounds -= 1
    tl.debug_barrier()
    return rounds
