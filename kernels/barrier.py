"""A barrier between programs that share a counter: one arrival each, then a look at the counter until all are there.

The arrivals of one barrier add up to 2**31, so that the counter's top bit flips and its other bits are as before:
it needs no reset, neither between barriers nor between launches, whatever the number of programs. A program that has
waited in vain goes on arriving without waiting, so that a launch that failed leaves the counter as one that didn't.
"""

import threading
from collections import deque

import torch
import triton
import triton.language as tl
from torch import Tensor

SPACING = 32  # int32 counters from one barrier's to the next's, so that no two are in one line of a cache
# How often a program looks at the counter at one barrier before it gives up: seconds, where a step takes microseconds.
ROUNDS = 2**22
INTERPRETED_ROUNDS = 2**12  # in Triton's interpreter, which runs no two programs at once


@triton.jit
def arrive(counter_ptr, leads, programs):
    """Says that what this program wrote may be read.

    Args:
        counter_ptr: int32, shared by the programs that meet.
        leads: whether this is a certain one of them.
        programs: how many they are.
    """
    tl.debug_barrier()
    adds = tl.where(leads, 2147483647 - (programs - 2), 1)
    tl.atomic_add(counter_ptr, adds, sem="release")  # whose result nobody waits for


@triton.jit
def before(counter_ptr):
    """The counter before a program's first arrival, without which the top bit stays as it is; `~` of it at each next.

    Args:
        counter_ptr: as of `arrive`.
    """
    return tl.atomic_add(counter_ptr, 0, sem="relaxed")


@triton.jit
def wait(counter_ptr, before, rounds):
    """Returns once all have arrived, or after so many looks; what is left of them, 0 for too late.

    Args:
        counter_ptr: as of `arrive`.
        before: a number with the counter's top bit from before this barrier.
        rounds: int32; 0 doesn't wait.
    """
    while (rounds > 0) & ((tl.atomic_add(counter_ptr, 0, sem="acquire") ^ before) >= 0):
        rounds -= 1
    tl.debug_barrier()
    return rounds


class Barriers:
    """What the barriers of launches that come one after the other need: those of a stream or, on a CPU, a thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.counters = torch.zeros(0, dtype=torch.int32, device=device)
        # Written by kernels, read here without waiting for the GPU: the number of a launch that failed.
        self.failed = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.launches: deque[tuple[int, str]] = deque(maxlen=256)
        self.launched = 0

    def begin(self, count: int, what: str) -> tuple[Tensor, Tensor, int]:
        """Counters for `count` barriers, the flag, and what a launch that fails writes there.

        Args:
            count: of groups of programs that meet.
            what: the launch in words, for an error.

        Raises:
            RuntimeError: a launch before this one failed.
        """
        self.check()
        if self.counters.numel() < count * SPACING:  # launches before this one keep theirs until they have ended
            self.counters = torch.zeros(count * SPACING, dtype=torch.int32, device=self.device)
        self.launched = self.launched % 2**30 + 1
        self.launches.append((self.launched, what))
        return self.counters, self.failed, self.launched

    def check(self) -> None:
        """Raises RuntimeError where the programs of a launch waited for each other in vain."""
        number = int(self.failed)
        if number == 0:
            return
        self.failed.zero_()
        what = next((text for n, text in self.launches if n == number), "a launch before the last 256")
        raise RuntimeError(
            f"the programs of a cooperative launch waited for each other in vain, and its results are NaN: {what}; "
            f"is another process or stream holding {self.device} with programs that wait, too? "
            "backend='torch' or 'eager' needs no such launch"
        )


_barriers: dict[tuple[torch.device, int], Barriers] = {}


def of(device: torch.device) -> Barriers:
    """Those of the current stream of a GPU, or of this thread."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else threading.get_ident()
    found = _barriers.get((device, stream))
    if found is None:
        found = _barriers[device, stream] = Barriers(device)
    return found
