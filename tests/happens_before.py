"""What happens before what among the programs of a kernel, by vector clocks, and the accesses that nothing orders.

As in FastTrack (Flanagan and Freund, PLDI 2009), so that a race is found though the order that the programs happened to
run in gave the right values:

- A release publishes, at the atomic's address, what its program did before its last `tl.debug_barrier` and what the
  program knew of others; an acquire learns what is published there. Triton 3.6 and 3.7 have no barrier of their own
  before a release, so that another warp's stores may come after it.
- Further read-modify-writes continue a release sequence, whatever their order.
- Two atomics never race.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Lines = tuple[tuple[str, int], ...]  # files and lines of functions that are being called, the innermost's first


class Found(Exception):
    """A mistake in a kernel."""


class Race(Found):
    """Two programs access the same element, at least one of them stores, and nothing orders the two."""


def text(lines: Lines) -> str:
    return ", called at ".join(f"{Path(file).name}:{line}" for file, line in lines)


class Memory:
    """Numbers the elements of all tensor arguments: a storage's are consecutive.

    Where tensors with elements of several sizes share a storage, the smallest is taken for the size of all.
    """

    def __init__(self, arguments: dict[str, Any]):
        self.tensors = {name: t for name, t in arguments.items() if isinstance(t, Tensor) and t.numel()}
        sizes: dict[tuple[int, int], int] = {}
        for tensor in self.tensors.values():
            storage = tensor.untyped_storage()
            span = (storage.data_ptr(), storage.data_ptr() + storage.nbytes())
            sizes[span] = min(tensor.itemsize, sizes.get(span, tensor.itemsize))
        spans = sorted(sizes)
        self.starts, self.ends = np.array(spans, np.int64).reshape(-1, 2).T
        self.sizes = np.array([sizes[span] for span in spans], np.int64)
        counts = (self.ends - self.starts) // self.sizes
        self.first = np.cumsum(counts) - counts
        self.count = int(counts.sum())

    def elements(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """The elements at these addresses, `width` bytes from each on; -1 where that isn't in a tensor's memory."""
        addresses = addresses.astype(np.int64)
        storage = np.maximum(np.searchsorted(self.starts, addresses, side="right") - 1, 0)
        sizes = self.sizes[storage]
        inside = (addresses >= self.starts[storage]) & (addresses + width <= self.ends[storage])
        found = np.where(inside, (addresses - self.starts[storage]) // sizes + self.first[storage], -1)
        more = [found[inside & (sizes * k < width)] + k for k in range(1, width // int(self.sizes.min()))]
        return np.concatenate([found, *more]) if more else found

    def name(self, element: int) -> str:
        """The tensor argument that an element is of, and its index there; where several share it, all of them."""
        storage = int(np.searchsorted(self.first, element, side="right")) - 1
        address = int(self.starts[storage] + (element - self.first[storage]) * self.sizes[storage])
        names = []
        for name, tensor in self.tensors.items():
            if tensor.untyped_storage().data_ptr() == self.starts[storage]:
                extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                offsets = torch.arange(extent).as_strided(tensor.shape, tensor.stride())
                index = (offsets == (address - tensor.data_ptr()) // tensor.itemsize).nonzero()
                names += [f"{name}{index[0].tolist()}"] if len(index) else []
        return " = ".join(names) or "memory beside a tensor argument"


@dataclass
class _Access:
    program: int
    did: str
    lines: Lines


class _Atomic:
    """What is known of an element that atomics use."""

    def __init__(self, programs: int):
        self.published = np.zeros(programs, np.int64)  # the clock that an acquire joins
        self.last = np.zeros(programs, np.int64)  # each program's last atomic


class Order:
    """The accesses so far, numbered from 1 on as they happen, and what each program knows of them.

    A program's clock says of each program up to which number its accesses happened before: one with a higher number
    isn't ordered before what comes. All methods take elements as of `Memory.elements`, and raise Race.
    """

    def __init__(self, memory: Memory, programs: list[str]):
        P, n = len(programs), memory.count
        self.memory, self.programs = memory, programs
        self.clocks = np.zeros((P, P), np.int64)
        np.fill_diagonal(self.clocks, np.iinfo(np.int64).max)  # a program's own accesses are in order
        self.fenced = [0] * P  # the last access before a program's last barrier
        self.accesses = [_Access(0, "", ())]
        self.stored = np.zeros(n, np.int64)  # the last store's number
        self.storer = np.zeros(n, np.int64)  # and program
        self.loaded = np.zeros((P, n), np.int64)  # each program's last load
        self.is_atomic = np.zeros(n, bool)
        self.atomics: dict[int, _Atomic] = {}

    def load(self, p: int, elements: np.ndarray, lines: Lines) -> None:
        self.accesses.append(_Access(p, "loaded", lines))
        self._after_stores(p, elements, "loads")
        self._after_atomics(p, elements, "loads")
        self.loaded[p, elements] = len(self.accesses) - 1

    def store(self, p: int, elements: np.ndarray, lines: Lines) -> None:
        self.accesses.append(_Access(p, "stored to", lines))
        self._after_stores(p, elements, "stores to")
        self._after_loads(p, elements, "stores to")
        self._after_atomics(p, elements, "stores to")
        self.stored[elements] = len(self.accesses) - 1
        self.storer[elements] = p

    def atomic(self, p: int, elements: np.ndarray, lines: Lines) -> None:
        self.accesses.append(_Access(p, "did an atomic on", lines))
        self._after_stores(p, elements, "does an atomic on")
        self._after_loads(p, elements, "does an atomic on")
        self.is_atomic[elements] = True
        for element in elements.tolist():
            self.atomics.setdefault(element, _Atomic(len(self.programs))).last[p] = len(self.accesses) - 1

    def acquire(self, p: int, elements: np.ndarray) -> None:
        for element in elements.tolist():
            np.maximum(self.clocks[p], self.atomics[element].published, out=self.clocks[p])

    def release(self, p: int, elements: np.ndarray) -> None:
        known = self.clocks[p].copy()
        known[p] = self.fenced[p]
        for element in elements.tolist():
            published = self.atomics[element].published
            np.maximum(published, known, out=published)

    def barrier(self, p: int) -> None:
        self.fenced[p] = len(self.accesses) - 1

    def _after_stores(self, p: int, elements: np.ndarray, does: str) -> None:
        self._after(self.stored[elements], self.clocks[p][self.storer[elements]], elements, does)

    def _after_loads(self, p: int, elements: np.ndarray, does: str) -> None:
        self._after(self.loaded[:, elements], self.clocks[p][:, None], elements, does)

    def _after_atomics(self, p: int, elements: np.ndarray, does: str) -> None:
        for element in elements[self.is_atomic[elements]]:
            self._after(self.atomics[int(element)].last, self.clocks[p], element, does)

    def _after(self, numbers: np.ndarray, known: np.ndarray, elements: np.ndarray, does: str) -> None:
        """Checks that the last access comes after those with these numbers, of whose programs so much is known."""
        late = numbers > known
        if not late.any():
            return
        at = np.unravel_index(late.argmax(), late.shape)
        name = self.memory.name(int(np.broadcast_to(elements, late.shape)[at]))
        now, earlier = self.accesses[-1], self.accesses[int(numbers[at])]
        raise Race(
            f"{self.programs[now.program]} {does} {name} at {text(now.lines)}, and nothing orders it "
            f"after {self.programs[earlier.program]}, which {earlier.did} it at {text(earlier.lines)}"
        )
