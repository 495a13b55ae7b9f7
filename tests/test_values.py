"""Outputs and every gradient against `nn.LSTM` in float64, each backend over the whole matrix."""

import pytest
import torch

from checks import WAYS, Case, assert_close, cases_by_way, forced, matrix, results, shaped
from lstm_triton.recurrence import state_dtype


def compare(case: Case, device: torch.device, dtype: torch.dtype, backend: str) -> None:
    reference, ours = case.modules(device, dtype, backend=backend)
    inputs = case.inputs(device, dtype)
    expected = results(reference, case, inputs, torch.float64)
    assert_close(results(ours, case, inputs, dtype), expected, dtype)


@pytest.mark.parametrize("backend", ["eager", "torch", "auto"])
@pytest.mark.parametrize("case", matrix(), ids=str)
def test_float64(case: Case, backend: str, device: torch.device) -> None:
    compare(case, device, torch.float64, backend)


@pytest.mark.parametrize("case,way", cases_by_way(matrix(), interpreted=11))
def test_kernels_float32(case: Case, way: str, device: torch.device) -> None:
    with forced(way):
        compare(case, device, torch.float32, "triton")


# The kernels of a dtype differ in the types of their values alone: a part of the matrix, all axes of which it has.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case,way", cases_by_way(matrix()[::5], interpreted=2)[::4])
def test_kernels_half(case: Case, way: str, dtype: torch.dtype, device: torch.device) -> None:
    with forced(way):
        compare(case, device, dtype, "triton")


@pytest.mark.parametrize("case,way", cases_by_way(matrix()[::5], interpreted=2)[1::4])
def test_kernels_float64(case: Case, way: str, device: torch.device) -> None:
    with forced(way):
        compare(case, device, torch.float64, "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_eager_half(dtype: torch.dtype, device: torch.device) -> None:
    compare(shaped(num_layers=2, proj_size=3), device, dtype, "eager")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(steps=1, batch=1, hidden_size=1, input_size=1),
        dict(steps=1, batch=5, hidden_size=16),
        dict(steps=9, batch=1, hidden_size=33),
        dict(steps=2, batch=67, hidden_size=17),  # more than one tile of the batch
        dict(steps=2, batch=2, hidden_size=130, proj_size=65),  # more than one tile of units
        dict(steps=2, batch=2, hidden_size=100, input_size=1),
    ],
    ids=str,
)
def test_kernels_sizes(sizes: dict[str, int], way: str, device: torch.device) -> None:
    with forced(way):
        compare(shaped(**sizes), device, torch.float32, "triton")


@pytest.mark.interpreted
@pytest.mark.parametrize("way", WAYS)
def test_kernels_ragged_tiles(way: str, device: torch.device) -> None:
    """Ragged rows over several tiles of the batch, both directions."""
    case = Case(bidirectional=True, form="packed", steps=5, batch=70)
    with forced(way):
        compare(case, device, torch.float32, "triton")


@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
def test_noncontiguous(backend: str, device: torch.device) -> None:
    """Sliced, transposed and expanded inputs and gradients."""
    case = Case(num_layers=2, bidirectional=True)
    dtype = torch.float32
    reference, ours = case.modules(device, dtype, backend=backend)
    x = torch.randn(case.batch, 2 * case.input_size, case.steps, device=device).permute(2, 0, 1)[..., ::2]
    h = torch.randn(1, 1, case.hidden_size, device=device).expand(4, case.batch, -1)
    c = torch.randn(case.batch, 4, 2 * case.hidden_size, device=device).transpose(0, 1)[..., 1::2]

    def outcome(module: torch.nn.Module, kind: torch.dtype) -> dict[str, torch.Tensor]:
        leaf = x.to(kind).requires_grad_()
        y, (hn, cn) = module(leaf, (h.to(kind), c.to(kind)))
        (gradient,) = torch.autograd.grad(
            [y, cn], [leaf], [torch.ones((), device=device, dtype=kind).expand(y.shape), cn]
        )
        return {"output": y.detach(), "hn": hn.detach(), "dx": gradient}

    assert_close(outcome(ours, dtype), outcome(reference, torch.float64), dtype)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_only_some_gradients(backend: str, device: torch.device) -> None:
    """Outputs that nothing depends on and weights that are frozen."""
    case = Case(num_layers=2, bidirectional=True)
    reference, ours = case.modules(device, torch.float32, backend=backend)
    x, h, c = case.inputs(device, torch.float32)
    for module in (reference, ours):
        module.weight_hh_l0.requires_grad_(False)
        module.bias_ih_l1.requires_grad_(False)
        dtype = module.weight_ih_l0.dtype
        _, (_, cn) = module(x.to(dtype), (h.to(dtype), c.to(dtype)))
        cn.sum().backward()
    assert ours.weight_hh_l0.grad is None and ours.bias_ih_l1.grad is None
    grads = [{k: p.grad for k, p in m.named_parameters() if p.grad is not None} for m in (ours, reference)]
    assert_close(*grads, torch.float32)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_gradients_stay_apart(backend: str, device: torch.device) -> None:
    """No two parameters share a gradient, which clipping in place would scale twice."""
    _, ours = Case(bidirectional=True).modules(device, torch.float32, backend=backend)
    ours(torch.randn(3, 2, 5, device=device))[0].sum().backward()
    pointers = [p.grad.data_ptr() for p in ours.parameters()]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("way", WAYS)
def test_inference_keeps_nothing(way: str, device: torch.device) -> None:
    """Without gradients the same values, and neither gates nor cell states."""
    size = 0 if way == "fused" else 3
    case = Case(num_layers=2, bidirectional=True, proj_size=size, form="packed")
    _, ours = case.modules(device, torch.float32, backend="triton")
    x, h, c = case.inputs(device, torch.float32)
    with forced(way):
        trained, _ = ours(case.pack(x), (h, c))
        with torch.no_grad():
            inferred, _ = ours(case.pack(x), (h, c))
            *_, kept = torch.ops.lstm_triton.lstm(
                x.flatten(0, 1), None, h[:2], c[:2], ours._flat_weights[: 10 if size else 8], 1, True,
                0.0, None, None, 0.0, True, "triton", 0, False, "lstm", None, False,
            )  # fmt: skip
    assert torch.equal(trained.data, inferred.data)
    assert kept == []


@pytest.mark.interpreted
@pytest.mark.parametrize("way", WAYS)
def test_every_store_happens(way: str, device: torch.device) -> None:
    """Memory that comes poisoned with NaN shows each store that is missing."""
    size = 0 if way == "fused" else 3
    case = Case(num_layers=2, bidirectional=True, proj_size=size, form="packed", batch=5)
    reference, ours = case.modules(device, torch.float32, backend="triton", recurrent_dropout=0.5)
    inputs = case.inputs(device, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        with forced(way):
            found = results(ours, case, inputs, torch.float32)
            ours.recurrent_dropout = 0.0
            plain = results(ours, case, inputs, torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in found.values())
    assert_close(plain, results(reference, case, inputs, torch.float64), torch.float32)


@pytest.mark.interpreted
@pytest.mark.parametrize("way", WAYS)
def test_bitwise_the_same_each_run(way: str, device: torch.device) -> None:
    case = Case(num_layers=2, bidirectional=True, batch=20)
    _, ours = case.modules(device, torch.float32, backend="triton", recurrent_dropout=0.3)
    inputs = case.inputs(device, torch.float32)
    runs = []
    with forced(way):
        for _ in range(2):
            torch.manual_seed(3)
            runs.append(results(ours, case, inputs, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values(), strict=True))


def test_large_states_stay_finite(device: torch.device) -> None:
    """Gates far into saturation: no NaN from tanh or sigmoid, right values."""
    for backend in ("eager", "triton"):
        case = Case(steps=3)
        reference, ours = case.modules(device, torch.float32, backend=backend)
        x, h, c = case.inputs(device, torch.float32)
        inputs = (1e4 * x, h, 50 * c)
        found = results(ours, case, inputs, torch.float32)
        expected = results(reference, case, inputs, torch.float64)
        assert all(t.isfinite().all() for t in found.values())
        for name in ("output", "hn", "cn"):
            torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-6)


def test_cell_state_is_kept_in_float32(device: torch.device) -> None:
    """Many small steps: a float16 cell state would stop growing."""
    case = Case(steps=300, batch=1, hidden_size=2, input_size=1)
    reference, ours = case.modules(device, torch.float16, backend="triton")
    with torch.no_grad():
        for module in (reference, ours):
            for weight in module.parameters():
                weight.zero_()
            # i = 0.0005, f = 1, g = 1: c grows by 0.0005 a step, which at c = 2 float16 loses.
            module.bias_ih_l0.copy_(torch.tensor([-7.6, 12.0, 12.0, 0.0]).repeat_interleave(2))
        x, h, c = case.inputs(device, torch.float16)
        c = c * 0 + 2
        _, (_, cn) = ours(x, (h, c))
        _, (_, expected) = reference(x.double(), (h.double(), c.double()))
    assert state_dtype(torch.float16) == torch.float32
    torch.testing.assert_close(cn.double(), expected, rtol=1e-3, atol=0)
    assert (cn > 2.1).all()
