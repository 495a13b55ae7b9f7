"""Looks at the addresses of interpreted kernels: each has to be in a tensor argument.

A launch's tensors are copied into memory where they are far apart, so that no access past the end of one is in the
next. Relies on the same of Triton's interpreter as `grid_simulator`.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch import Tensor
from triton.runtime import interpreter

from lstm_triton.kernels import barrier

# What the interpreter accesses memory by, the same in Triton 3.6 to 3.9; where its arguments have pointers and mask.
OPERATIONS = (("create_masked_load", 0, 1), ("create_masked_store", 0, 2), ("create_atomic_rmw", 1, 3))


class OutOfBounds(Exception):
    """A program accesses memory of no tensor argument."""


GAP = 1 << 20  # bytes from the start of one tensor to the next's, far more than one takes


@dataclass
class Checked:
    """Launches interpreted kernels, each of whose addresses has to be in a tensor argument."""

    launches: int = 0
    reached: set[tuple[str, str]] = field(default_factory=set)  # kernels and the arguments whose last element they use

    def start(self, kernel: Any, grid: Any, args: list[Any], shared: dict[str, Any], **own: Any) -> None:
        """In the place of `lstm_triton.kernels.launch.start`; raises OutOfBounds."""
        self.launches += 1
        named = dict(zip(kernel.arg_names, args, strict=False))
        tensors = {name: x.detach() for name, x in named.items() if isinstance(x, Tensor)}
        if "counter_ptr" in tensors:  # the last counter has room after it, for nothing
            tensors["counter_ptr"] = tensors["counter_ptr"][: 1 - barrier.SPACING]
        assert all(x.is_contiguous() for x in tensors.values())
        self.names, sizes = list(tensors), np.array([x.nbytes for x in tensors.values()])
        places = GAP * np.arange(len(sizes))
        room = torch.empty(GAP * len(sizes), dtype=torch.uint8)
        copies = {
            name: room[at : at + x.nbytes].view(x.dtype).view(x.shape).copy_(x)
            for (name, x), at in zip(tensors.items(), places.tolist(), strict=True)
        }
        assert sizes.max() < GAP // 2
        self.starts = places + room.data_ptr()
        self.ends = self.starts + sizes
        self.stored, self.used = np.zeros((2, len(sizes)), bool)
        self.kernel = kernel.fn.__name__
        with self._looking():
            try:
                kernel[grid](*(copies.get(name, value) for name, value in named.items()), **shared, **own)
            except interpreter.InterpreterError as error:
                cause: BaseException = error
                while cause.__cause__ is not None:  # each interpreted function on the way has wrapped it
                    cause = cause.__cause__
                raise cause from None
        for k, (name, x) in enumerate(tensors.items()):
            if self.stored[k]:  # where an argument isn't needed another one stands in
                x.copy_(copies[name])
        which = f"{Path(kernel.fn.__code__.co_filename).stem}.{self.kernel}"
        self.reached |= {(which, name) for name, used in zip(self.names, self.used, strict=True) if used}

    @contextmanager
    def _looking(self) -> Iterator[None]:
        builder = interpreter.interpreter_builder

        def looked(name: str, pointers: int, mask: int) -> Callable[..., Any]:
            method = getattr(builder, name)

            def call(*operands: Any) -> Any:
                self._look(operands[pointers], operands[mask], stores=name != "create_masked_load")
                return method(*operands)

            return call

        with pytest.MonkeyPatch.context() as patch:
            for name, pointers, mask in OPERATIONS:
                patch.setattr(builder, name, looked(name, pointers, mask))
            yield

    def _look(self, pointers: Any, mask: Any, stores: bool) -> None:
        at = pointers.data[np.asarray(mask.data, bool)].astype(np.int64)
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        which = np.maximum(np.searchsorted(self.starts, at, side="right") - 1, 0)
        outside = (at < self.starts[which]) | (at + width > self.ends[which])
        if outside.any():
            first = at[outside][0]
            before, past = self.starts - first, first + width - self.ends
            k = np.maximum(before, past).argmin()
            where = f"{past[k]} bytes past the end" if past[k] > 0 else f"{before[k]} bytes before the start"
            raise OutOfBounds(
                f"program {interpreter.interpreter_builder.grid_idx} of {self.kernel} at {_line()}: {outside.sum()} "
                f"elements, the first of them {where} of {self.names[k]}"
            )
        self.used[which[at + width == self.ends[which]]] = True
        if stores:
            self.stored[which] = True


def _line() -> str:
    frame = sys._getframe(3)  # that which has called the interpreter's operation
    while frame.f_code.co_filename.startswith(str(Path(triton.__file__).parent)):
        assert frame.f_back is not None
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
