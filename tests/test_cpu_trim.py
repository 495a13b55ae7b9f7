"""Padding that native kernels are rid of, and what they have to keep of it."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from lstm_triton import TritonLSTM, cpu, direct, kernels
from lstm_triton.cpu import frontend, ir, native, trim

pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="it looks at native kernels")

BLOCK = 32


@triton.jit
def rows_times_columns(a_ptr, b_ptr, out_ptr, M, N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """out (M, N) = a (M, K) @ b (K, N); the range of rows, columns and the inner dimension is one to the frontend."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK)
    inner = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + rows[:, None] * K + inner[None, :], mask=(rows < M)[:, None] & (inner < K)[None, :], other=0.0)
    b = tl.load(
        b_ptr + inner[:, None] * N + columns[None, :], mask=(inner < K)[:, None] & (columns < N)[None, :], other=0.0
    )
    found = tl.dot(a, b, tl.zeros((BLOCK, BLOCK), tl.float32), input_precision="ieee")
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], found, mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def total(x_ptr, out_ptr, N: tl.constexpr, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + at, mask=at < N, other=OTHER)))


@triton.jit
def largest(x_ptr, out_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.max(tl.load(x_ptr + at, mask=at < N, other=0.0)))


@triton.jit
def copied(x_ptr, out_ptr, N: tl.constexpr, STORED: tl.constexpr, BLOCK: tl.constexpr):
    """Twice over, in a loop that carries the tensor; stored up to STORED, where that isn't None."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < N, other=7.0)
    for _ in range(2):
        x += tl.where(at < N, 1.0, 0.0)
    if STORED is None:
        tl.store(out_ptr + at, x)
    else:
        tl.store(out_ptr + at, x, mask=STORED > at)  # noqa: SIM300, the other order is to be understood, too


@triton.jit
def from_ten(out_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    at = 10 + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, at.to(tl.float32), mask=at < N)


@triton.jit
def outer_inner(x_ptr, out_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    """x @ xᵀ of a matrix whose padding is 1, which counts in the inner dimension, and which isn't stored."""
    rows = tl.arange(0, BLOCK)
    mask = (rows < N)[:, None] & (rows < N)[None, :]
    x = tl.load(x_ptr + rows[:, None] * N + rows[None, :], mask=mask, other=1.0)
    found = tl.dot(x, tl.trans(x), tl.zeros((BLOCK, BLOCK), tl.float32), input_precision="ieee")
    tl.store(out_ptr + rows[:, None] * N + rows[None, :], found, mask=mask)


def lengths(kernel: Any, args: list[Any], **constants: Any) -> set[int]:
    """Those of all axes after trimming, single ones apart."""
    values = iter(args)
    signature = {p.name: "constexpr" if p.is_constexpr else native._kind(next(values), p.name) for p in kernel.params}
    function = ir.parse(frontend.ttir(kernel, signature, constants))
    trim.trim(function)
    return {n for op in ir.walk(function.body) for v in op.results for n in v.shape} - {1}


@pytest.mark.parametrize("m,n,k", [(32, 5, 9), (3, 17, 32), (1, 1, 1), (20, 24, 25), (32, 32, 32)])
def test_products(m: int, n: int, k: int) -> None:
    """Columns and the inner dimension are cut, the rows aren't, whose number isn't a constant."""
    a, b, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
    args, constants = [a, b, out, m], {"N": n, "K": k, "BLOCK": BLOCK}
    assert lengths(rows_times_columns, args, **constants) == {BLOCK, -(-n // 8) * 8, -(-k // 8) * 8}
    cpu.launch(rows_times_columns, (1,), *args, **constants)
    torch.testing.assert_close(out, a @ b)


@pytest.mark.parametrize("n", [1, 8, 13, 31])
def test_sums(n: int) -> None:
    x, out = torch.randn(n), torch.empty(1)
    assert lengths(total, [x, out], N=n, OTHER=0.0, BLOCK=BLOCK) == {-(-n // 8) * 8}
    assert lengths(total, [x, out], N=n, OTHER=1.0, BLOCK=BLOCK) == {BLOCK}
    for other in (0.0, 1.0):
        cpu.launch(total, (1,), x, out, N=n, OTHER=other, BLOCK=BLOCK)
        torch.testing.assert_close(out[0], x.sum() + other * (BLOCK - n))


def test_an_extremum_keeps_its_padding() -> None:
    x, out = torch.randn(5).abs().neg(), torch.empty(1)
    assert lengths(largest, [x, out], N=5, BLOCK=BLOCK) == {BLOCK}
    cpu.launch(largest, (1,), x, out, N=5, BLOCK=BLOCK)
    assert out[0] == 0


@pytest.mark.parametrize("stored,left", [(5, 8), (9, 16), (26, 32), (None, 32)])
def test_what_is_stored_counts(stored: int | None, left: int) -> None:
    x, out = torch.randn(5), torch.full((BLOCK,), -1.0)
    constants = {"N": 5, "STORED": stored, "BLOCK": BLOCK}
    assert lengths(copied, [x, out], **constants) == {left}
    cpu.launch(copied, (1,), x, out, **constants)
    end = BLOCK if stored is None else stored
    expected = torch.cat([x + 2, torch.full((BLOCK - 5,), 7.0)])
    torch.testing.assert_close(out[:end], expected[:end])
    assert (out[end:] == -1).all()


def test_an_axis_that_does_not_count_from_zero_is_kept() -> None:
    out = torch.zeros(40)
    assert lengths(from_ten, [out], N=17, BLOCK=BLOCK) == {BLOCK}
    cpu.launch(from_ten, (1,), out, N=17, BLOCK=BLOCK)
    assert out.tolist() == [float(k) if 10 <= k < 17 else 0.0 for k in range(40)]


def test_a_product_over_padding_that_is_not_zero_keeps_it() -> None:
    x, out = torch.randn(5, 5), torch.empty(5, 5)
    assert lengths(outer_inner, [x, out], N=5, BLOCK=BLOCK) == {BLOCK}
    cpu.launch(outer_inner, (1,), x, out, N=5, BLOCK=BLOCK)
    torch.testing.assert_close(out, x @ x.t() + (BLOCK - 5))


@pytest.mark.parametrize("hidden,batch", [(100, 3), (20, 32), (33, 64), (72, 64), (9, 9)])
def test_layers_are_as_long_as_they_should(
    hidden: int, batch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """The fused kernels of an LSTM: nothing but rows of the batch is longer than the next multiple of eight."""
    found: list[set[int]] = []
    parse = ir.parse

    def watched(text: str) -> ir.Function:
        function = parse(text)
        monkeypatch.setattr(trim, "trim", lambda f: original(f) or found.append(shapes(f)))
        return function

    def shapes(function: ir.Function) -> set[int]:
        return {n for op in ir.walk(function.body) for v in op.results for n in v.shape} - {1}

    original = trim.trim
    monkeypatch.setattr(ir, "parse", watched)
    monkeypatch.setattr("lstm_triton.cpu.build.read_checked", lambda *_: None)
    monkeypatch.setattr(native, "_prepared", {})
    monkeypatch.setattr(kernels.launch, "_prepared", {})
    direct.forget()
    module, reference = TritonLSTM(hidden, hidden, backend="triton"), torch.nn.LSTM(hidden, hidden)
    reference.load_state_dict(module.state_dict())
    x = torch.randn(3, batch, hidden)

    def run(module: Any) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = module(leaf)[0]
        y.square().sum().backward()
        return [y.detach(), leaf.grad, *(p.grad for p in module.parameters())]  # type: ignore[list-item]

    for ours, theirs in zip(run(module), run(reference), strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    assert len(found) == 2
    units, rows = -(-hidden // 8) * 8, {1 << k for k in range(7)}
    assert all(units in sizes and sizes <= {units} | rows for sizes in found)
    assert all(n in sizes or n <= batch for sizes in found for n in sizes)
