"""Recurrent dropout: the masks, that every backend draws the same, and values under given masks."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch

import lstm_triton.functional as functional
from checks import WAYS, Case, assert_close, forced
from lstm_triton import TritonLSTM, dispatch, reference
from lstm_triton.cells import of
from lstm_triton.dropout import masks, philox
from lstm_triton.recurrence import RecurrentDropout


def words(*counter: int, seed: int = 0) -> list[int]:
    found = philox(torch.tensor([seed]), *(torch.tensor([c]) for c in counter))
    return [int(w) & 0xFFFFFFFF for w in found]


def test_philox_known_answers() -> None:
    """The published test vectors of philox4x32 with seven rounds (Random123's kat_vectors)."""
    ones = 0xFFFFFFFF
    assert words(0, 0, 0, 0) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert words(ones, ones, ones, ones, seed=-1) == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_mask_statistics(p: float) -> None:
    mask = masks(torch.tensor([7]), range(2), range(50), range(20), 30, p, torch.float64)
    dropped = (mask == 0).double().mean().item()
    assert abs(dropped - p) < 5 * (p * (1 - p) / mask.numel()) ** 0.5 + 1e-12
    kept = mask[mask > 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)), rtol=1e-4, atol=0)
    assert abs(mask.mean().item() - 1) < 5 * (p / (1 - p) / mask.numel()) ** 0.5 + 1e-6


def test_mask_depends_on_everything() -> None:
    """Another seed, stream, step, row or unit has another mask; the same ones the same."""

    def draw(seed: int = 7, streams: range = range(3, 5), steps: int = 20, batch: int = 20, units: int = 20):
        return masks(torch.tensor([seed]), streams, range(steps), range(batch), units, 0.5, torch.float32)

    mask = draw()
    assert torch.equal(mask, draw())
    assert torch.equal(mask[:1, :5, :7, :9], draw(streams=range(3, 4), steps=5, batch=7, units=9))
    assert torch.equal(mask[1:], draw(streams=range(4, 5)))
    assert not torch.equal(mask, draw(seed=8))
    assert not torch.equal(mask, draw(seed=7 + 2**32))
    for axis in range(4):
        slices = {tuple(x.flatten().tolist()) for x in mask.unbind(axis)}
        assert len(slices) == mask.size(axis)


def test_dropping_everything_and_nothing() -> None:
    def draw(p: float) -> torch.Tensor:
        return masks(torch.tensor([1]), range(1), range(30), range(30), 30, p, torch.float32)

    assert draw(1.0).eq(0).all()
    assert draw(0.0).eq(1).all()


def ways() -> list[Any]:
    """Parameters `way`, `mode`, `proj_size` and `form`; what is packed is interpreted, too."""
    axes = itertools.product(("eager", *WAYS), functional.MODES, (0, 3), ("batched", "packed"))
    return [
        pytest.param(way, mode, size, form, marks=pytest.mark.interpreted if form == "packed" else ())
        for way, mode, size, form in axes
        if way != "fused" or not size
    ]


@pytest.mark.parametrize("way,mode,proj_size,form", ways())
def test_values_under_drawn_and_given_masks(
    way: str, mode: str, proj_size: int, form: str, device: torch.device
) -> None:
    """The masks drawn are those of `recurrent_mask`; outputs and gradients are the plain layers' under them."""
    sizes = dict(proj_size=proj_size, input_size=2 * (proj_size or 7))  # both layers' are then one kernel
    case = Case(num_layers=2, bidirectional=True, form=form, steps=4, batch=18, **sizes)
    options = dict(num_layers=2, bidirectional=True, training=True, recurrent_dropout=0.4, recurrent_dropout_mode=mode)
    module = TritonLSTM(**case.arguments, device=device)
    x, h, c = case.inputs(device, torch.float32)
    packed = case.pack(x)
    data, sizes = (packed.data, packed.batch_sizes) if form == "packed" else (packed, None)
    weights = [p.detach() for p in module._flat_weights]

    def outcome(function, dtype, **extra) -> dict[str, torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (data, h, c, *weights)]
        outputs = function(leaves[0], (leaves[1], leaves[2]), leaves[3:], batch_sizes=sizes, **extra)
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
        found = [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]
        return {str(k): t.detach() for k, t in enumerate(found)}

    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, (1,), device=device)
    drawn_masks = RecurrentDropout(None, seed, 0.4, mode == "step", 0).drawn(4, h.double())
    expected = outcome(
        partial(reference.stack, of("lstm")), torch.float64, num_layers=2, bidirectional=True, mask=drawn_masks
    )
    with forced("step" if way == "eager" else way):
        backend = "eager" if way == "eager" else "triton"
        torch.manual_seed(5)
        drawn = outcome(functional.lstm, torch.float32, backend=backend, **options)
        given = outcome(
            functional.lstm, torch.float32, backend=backend, recurrent_dropout_mask=drawn_masks.float(), **options
        )
    assert_close(drawn, expected, torch.float32)
    assert_close(given, expected, torch.float32)


def test_half_precision_has_the_same_masks(device: torch.device) -> None:
    """The scale of kept elements is not rounded to float16."""
    modules = [TritonLSTM(5, 7, device=device, recurrent_dropout=0.3, backend=b).half() for b in ("eager", "triton")]
    modules[1].load_state_dict(modules[0].state_dict())
    x, zeros = torch.randn(6, 20, 5, device=device).half(), torch.zeros(1, 20, 7, device=device).half()
    found = []
    for module in modules:
        torch.manual_seed(2)
        found.append(module(x, (zeros, zeros))[0])
    torch.testing.assert_close(*found, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["auto", "eager", "triton"])
def test_only_in_training(backend: str, device: torch.device) -> None:
    module = TritonLSTM(5, 7, device=device, recurrent_dropout=0.5, backend=backend)
    x = torch.randn(4, 3, 5, device=device)
    plain = TritonLSTM(5, 7, device=device)
    plain.load_state_dict(module.state_dict())
    first, second = module(x)[0], module(x)[0]
    assert not torch.equal(first, second)
    torch.testing.assert_close(first[0], plain(x)[0][0])  # h_0 is zero: nothing to drop at the first step
    torch.testing.assert_close(module.eval()(x)[0], plain(x)[0])


def test_auto_runs_pytorch_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recurrent dropout that is not active is no reason to leave PyTorch's operator."""
    calls = []
    original = dispatch.torch_operator
    monkeypatch.setattr(dispatch, "torch_operator", lambda *a: calls.append(a) or original(*a))
    module = TritonLSTM(5, 7, recurrent_dropout=0.5, dtype=torch.float64)
    module.eval()(torch.randn(2, 1, 5, dtype=torch.float64))
    assert len(calls) == 1
    module.train()(torch.randn(2, 1, 5, dtype=torch.float64))
    assert len(calls) == 1
