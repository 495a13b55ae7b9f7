"""Training that rebuilds gates chunk by chunk: the same outputs, gradients and masks, and next to nothing kept."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from checks import WAYS, Case, assert_close, forced, matrix, results

# Every axis of the matrix, in sequences of several chunks.
CASES = [replace(case, steps=7, batch=1 if case.form == "unbatched" else 5) for case in matrix()[::5]]


def compare(
    case: Case, device: torch.device, dtype: torch.dtype, backend: str, chunk: bool | int, **options: Any
) -> None:
    reference, ours = case.modules(device, dtype, backend=backend, recompute=chunk, **options)
    inputs = case.inputs(device, dtype)
    assert_close(results(ours, case, inputs, dtype), results(reference, case, inputs, torch.float64), dtype)


@pytest.mark.parametrize("backend", ["eager", "torch", "auto"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64(case: Case, backend: str, device: torch.device) -> None:
    compare(case, device, torch.float64, backend, 3)


@pytest.mark.parametrize(
    "case,way", [(case, way) for case in CASES for way in WAYS if way != "fused" or not case.proj_size], ids=str
)
def test_kernels(case: Case, way: str, device: torch.device) -> None:
    with forced(way):
        compare(case, device, torch.float32, "triton", 3)


@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
@pytest.mark.parametrize("chunk", [1, 2, 6, 7, 100, True])
def test_chunk_lengths(chunk: bool | int, backend: str, device: torch.device) -> None:
    """One longer than the sequence is all of it."""
    case = Case(num_layers=2, bidirectional=True, form="packed", steps=7, batch=5)
    compare(case, device, torch.float32 if backend == "triton" else torch.float64, backend, chunk)
