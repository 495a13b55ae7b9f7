"""`lstm_triton.testing.check_cell`: a cell of one's own and the built-in ones pass, each kind of mistake is caught."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from bench.own_cell import MGU, MinimalGatedUnit, backward, forward_torch
from lstm_triton import testing
from lstm_triton.cells import Cell, of
from lstm_triton.cells.cell import Parameter
from lstm_triton.cells.jit import normalized, tanh, through_norm, tl, triton
from lstm_triton.gpu import machine_code
from lstm_triton.testing import check_cell


def test_a_cell_of_ones_own() -> None:
    names: list[str] = []
    check_cell(MGU, told=names.append)
    assert names == list(testing.CHECKS)


def test_module_of_a_cell_of_ones_own(device: torch.device) -> None:
    """Against the formulas, stepped by hand; and what comes with every module."""
    module = MinimalGatedUnit(5, 7, num_layers=2, bidirectional=True, recurrent_dropout=0.2, device=device)
    x = torch.randn(4, 3, 5, device=device)
    y, h = module(x)
    assert y.shape == (4, 3, 14) and h.shape == (4, 3, 7)
    assert module.eval().explain(x).splitlines()[1].startswith("backend: ")
    one = MinimalGatedUnit(5, 7, device=device, dtype=torch.float64)
    x, h, expected = x.double(), x.new_zeros(3, 7, dtype=torch.float64), []
    for x_t in x:
        x_f, x_n = (x_t @ one.weight_ih_l0.T + one.bias_ih_l0).chunk(2, 1)
        h_f, h_n = (h @ one.weight_hh_l0.T + one.bias_hh_l0).chunk(2, 1)
        f = (x_f + h_f).sigmoid()
        h = (1 - f) * h + f * (x_n + f * h_n).tanh()
        expected.append(h)
    torch.testing.assert_close(one(x)[0], torch.stack(expected))


BUILT_IN = [
    "lstm", "lstm-peephole", "lstm-norm", "lstm-coupled", "lstm-coupled-peephole", "lstm-coupled-norm", "lstm-carousel",
    "lstm-carousel-peephole", "lstm-carousel-norm", "gru", "rnn-tanh", "rnn-relu",
]  # fmt: skip


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_cells(name: str) -> None:
    check_cell(of(name), checks=["signature", "backward_torch", "eager", "linear", "double backward"])


@pytest.mark.parametrize("name", ["lstm-norm", "lstm-coupled-peephole"])
def test_built_in_cells_with_options(name: str) -> None:
    check_cell(of(name), checks=["recurrent dropout", "zoneout", "projections"])


# -- mistakes ----------------------------------------------------------------------------------------------------------


def wrong_backward(saved, h, h_prev, dq, dc, parameters):
    f, n, h_n = saved
    da_n = (dq + dc) * f * (1 - n * n)
    da_f = (dq + dc) * (n - h_prev) * f * (1 - f)  # without the way through the reset product
    return (da_f, da_n, da_n * f), (dq + dc) * (1 - f), ()


def backward_without_dc(saved, h, h_prev, dq, dc, parameters):
    f, n, h_n = saved
    da_n = dq * f * (1 - n * n)
    da_f = (dq * (n - h_prev) + da_n * h_n) * f * (1 - f)
    return (da_f, da_n, da_n * f), dq * (1 - f), ()


@triton.jit
def wrong_forward(sums, h, parameters):
    f = tl.sigmoid(sums[0])
    n = tanh(sums[1] + f * sums[2])
    new = n + f * (h - n)  # f and 1 - f exchanged
    return (f, n, sums[2]), new, new


@triton.jit
def forward_that_keeps_a_wrong_tile(sums, h, parameters):
    f = tl.sigmoid(sums[0])
    n = tanh(sums[1] + f * sums[2])
    new = h + f * (n - h)
    return (f, n, sums[1]), new, new


@triton.jit
def forward_in_float32(sums, h, parameters):
    f = tl.sigmoid(sums[0].to(tl.float32))
    n = tanh(sums[1] + f * sums[2])
    new = h + f * (n - h)
    return (f.to(h.dtype), n, sums[2]), new, new


@triton.jit
def clipped_backward(saved, h, h_prev, dq, dc, parameters):
    f, n, h_n = saved
    dh = tl.minimum(tl.maximum(dq + dc, -1000.0), 1000.0)
    da_n = dh * f * (1 - n * n)
    da_f = (dh * (n - h_prev) + da_n * h_n) * f * (1 - f)
    return (da_f, da_n, da_n * f), dh * (1 - f), ()


def clipped_backward_torch(saved, h, h_prev, dq, dc, parameters):
    return backward(saved, h, h_prev, dq.clamp(-1000, 1000), dc.clamp(-1000, 1000), parameters)


def dividing_backward(saved, h, h_prev, dq, dc, parameters):
    """Right where there are rows and units, NaN where not: there n and h_n, as all else that is loaded, are 0."""
    f, n, h_n = saved
    da_n = (dq + dc) * f * (1 - n * n) * (h_n / h_n)
    da_f = ((dq + dc) * (n - h_prev) + da_n * h_n) * f * (1 - f)
    return (da_f, da_n, da_n * f), (dq + dc) * (1 - f), ()


def forward_torch_of_another_shape(sums, h, parameters):
    saved, c, q = forward_torch(sums, h, parameters)
    return saved[:2], c, q


def forward_torch_with_another_c(sums, h, parameters):
    saved, c, q = forward_torch(sums, h, parameters)
    return saved, c + h, q


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        return dy * (1 - y * y)


def forward_torch_once_differentiable(sums, h, parameters):
    f = sums[0].sigmoid()
    n = OnceDifferentiable.apply(sums[1] + f * sums[2])
    new = h + f * (n - h)
    return (f, n, sums[2]), new, new


@pytest.mark.parametrize(
    "changes,caught",
    [
        (dict(forward_torch=forward_torch_of_another_shape), "signature: saved of .* should be 3 tensors, got 2"),
        (dict(forward_torch=forward_torch_with_another_c), "signature: c of forward_torch should be q"),
        (dict(backward_torch=wrong_backward), r"backward_torch on tiles: relative error of dsums\[0\] \d"),
        (dict(backward_torch=backward_without_dc), r"backward_torch on tiles: relative error of dsums\[0\] \d"),
        (dict(backward_torch=clipped_backward_torch), r"backward_torch, linear in dq and dc: relative error"),
        (dict(forward=wrong_forward), r"persistent: .* dense batch of T=4, B=3, H=5, .*: relative error of output"),
        (dict(forward=forward_that_keeps_a_wrong_tile), "persistent: .*: relative error of d"),
        (dict(forward=forward_in_float32), "persistent: fp64 by persistent, .*: relative error of output .*e-0[78], "),
        (dict(backward=triton.jit(wrong_backward)), "persistent: .*: relative error of dinput"),
        (dict(backward=triton.jit(backward_without_dc)), "persistent: .*: relative error of d"),
        (dict(backward=triton.jit(dividing_backward)), "persistent: .*: relative error of d.* nan, tolerated 1e-09"),
    ],
    ids=lambda value: next(iter(value.values())).__name__ if isinstance(value, dict) else "",
)  # fmt: skip
def test_mistakes_are_caught(changes: dict[str, Any], caught: str) -> None:
    (function,) = changes.values()
    with pytest.raises(AssertionError, match=f"cell '.*', {caught}"):
        check_cell(replace(MGU, name=f"mgu-{next(iter(changes))}-{function.__name__}", **changes))


def test_clipping_is_caught() -> None:
    """By the one check that it is for: gradients so small aren't clipped."""
    cell = replace(MGU, name="mgu-clipped", backward=clipped_backward)
    check_cell(cell, checks=["persistent"])
    with pytest.raises(AssertionError, match="linear: fp64 by persistent, .*: relative error of d"):
        check_cell(cell, checks=["linear"])


def test_a_wrong_output_is_caught() -> None:
    """Of a cell with projections; without them nothing uses it."""
    cell = replace(of("lstm-peephole"), name="lstm-output", output_torch=lambda saved, c, parameters: saved[3] * c)
    check_cell(cell, checks=["eager"])
    with pytest.raises(AssertionError, match="projections: fp64 by eager, .*: relative error of dweight_hr_l0"):
        check_cell(cell, checks=["projections"])


def test_a_missing_second_derivative_is_caught() -> None:
    cell = replace(MGU, name="mgu-once", forward_torch=forward_torch_once_differentiable)
    check_cell(cell, checks=["backward_torch", "eager"])
    with pytest.raises(AssertionError, match="'mgu-once', double backward: T=4, B=3, H=5: Jacobian mismatch"):
        check_cell(cell, checks=["double backward"])


# A cell that looks at whole rows: a tanh of the normalized sum with a gain.


@triton.jit
def normed_forward(sums, h, parameters, units):
    n, _ = normalized(sums, units, 1e-5)
    new = tanh(n[0] * parameters[0])
    return sums, new, new


@triton.jit
def normed_backward(saved, h, h_prev, dq, dc, parameters, units):
    n, factor = normalized(saved, units, 1e-5)
    da = (dq + dc) * (1 - h * h)
    return through_norm((da * parameters[0],), n, factor, units), tl.zeros_like(dc), (da * n[0],)


@triton.jit
def unmasked_forward(sums, h, parameters, units):
    apart = sums[0] - tl.sum(sums[0], 1)[:, None] / units[1]
    variance = tl.sum(apart * apart, 1)[:, None] / units[1]  # of all that a tile has
    new = tanh(apart / tl.sqrt(variance + 1e-5) * parameters[0])
    return sums, new, new


@triton.jit
def normed_backward_without_gain(saved, h, h_prev, dq, dc, parameters, units):
    n, factor = normalized(saved, units, 1e-5)
    da = (dq + dc) * (1 - h * h)
    return through_norm((da * parameters[0],), n, factor, units), tl.zeros_like(dc), (da,)


def normed_forward_torch(sums, h, parameters):
    normed = nn.functional.layer_norm(sums[0], [h.size(1)])
    new = (normed * parameters[0]).tanh()
    return sums, new, new


def normed_backward_torch(saved, h, h_prev, dq, dc, parameters):
    (a,) = saved
    variance, mean = torch.var_mean(a, 1, correction=0, keepdim=True)
    n, da = (a - mean) / (variance + 1e-5).sqrt(), (dq + dc) * (1 - h * h)
    d = da * parameters[0]
    d = (d - d.mean(1, keepdim=True) - n * (d * n).mean(1, keepdim=True)) / (variance + 1e-5).sqrt()
    return (d,), torch.zeros_like(dc), (da * n,)


NORMED = Cell(
    "normed-rnn", sums=1, inputs=1, recurrent=(0,), saved=("a",), carries=False, whole_rows=True,
    parameters=(Parameter("gain", 1, 1.0),), forward=normed_forward, backward=normed_backward,
    forward_torch=normed_forward_torch, backward_torch=normed_backward_torch,
)  # fmt: skip


def test_a_cell_that_looks_at_whole_rows() -> None:
    check_cell(NORMED, checks=["signature", "backward_torch", "eager", "persistent", "step", "recompute"])


@pytest.mark.parametrize(
    "changes,caught",
    [
        (dict(forward=unmasked_forward), "relative error of output"),
        (dict(backward=normed_backward_without_gain), "relative error of dgain_l0"),
    ],
    ids=["unmasked", "gain"],
)
def test_mistakes_with_whole_rows_are_caught(changes: dict[str, Any], caught: str) -> None:
    cell = replace(NORMED, name=f"normed-{next(iter(changes))}", **changes)
    with pytest.raises(AssertionError, match=f"persistent: .*{caught}"):
        check_cell(cell, checks=["persistent"])


# -- machine code ------------------------------------------------------------------------------------------------------


@triton.jit
def forward_that_does_not_compile(sums, h, parameters):
    return sums, tl.no_such_function(h), h


def test_kernels_that_do_not_compile_for_a_gpu_are_caught() -> None:
    cell = replace(MGU, name="mgu-uncompiled", forward=forward_that_does_not_compile)
    with pytest.raises(AssertionError, match="forward_kernel of persistent, inference, .* sm_90 doesn't compile: "):
        check_cell(cell, checks=["machine code"], gpu_names=["h100"])


@pytest.mark.parametrize(
    "change,caught",
    [
        (dict(spills=3, spill_bytes=24), "for sm_90 spills 24 bytes of each thread's registers"),
        (dict(shared_bytes=2**20), "takes 1048576 bytes of 232448 shared ones"),
        (dict(float_atomics=1), "has 1 atomic additions of floats"),
        (dict(tensor_core_ops=0), "has no tensor-core instructions"),
    ],
    ids=str,
)
def test_rules_of_machine_code(change: dict[str, int], caught: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule alone: what a kernel uses is its own but for one number."""
    right = machine_code.Usage(4, 100, 0, 0, 0, 1024, 8, 0, 4096, 0)
    monkeypatch.setattr(machine_code, "usage", lambda call: right)
    check_cell(MGU, checks=["machine code"], gpu_names=["h100"])
    monkeypatch.setattr(machine_code, "usage", lambda call: replace(right, **change))
    with pytest.raises(AssertionError, match=caught):
        check_cell(MGU, checks=["machine code"], gpu_names=["h100"])


def test_errors() -> None:
    with pytest.raises(ValueError, match="checks should be of signature, .*, got 'values'"):
        check_cell(MGU, checks=["values"])
    with pytest.raises(ValueError, match="h1000"):
        check_cell(MGU, gpu_names=["h1000"])
    with pytest.raises(ValueError, match="another cell is called 'gru'"):
        check_cell(replace(of("gru")))


def test_random_numbers_stay_as_they_are() -> None:
    torch.manual_seed(4)
    before = torch.random.get_rng_state()
    check_cell(MGU, checks=["eager"])
    assert torch.equal(torch.random.get_rng_state(), before)
