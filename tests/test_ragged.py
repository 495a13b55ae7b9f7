"""Ragged batches: `lengths=`, packed batches of very different lengths, and how they are run."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bench.memory import saved_bytes
from checks import WAYS, Case, assert_close, forced
from lstm_triton import TritonLSTM, dispatch, kernels, launching, planning
from lstm_triton.cells import of
from lstm_triton.recurrence import Layout, Window

LENGTHS = [3, 9, 1, 9, 5]  # unsorted


def outcome(
    module: nn.Module, x: Tensor, states: Sequence[Tensor], lengths: Any, batch_first: bool
) -> dict[str, Tensor]:
    """Outputs (T, B, ·) and gradients; by `lengths=`, or of a module that lacks it by packing and padding."""
    x, h, c = (t.detach().clone().requires_grad_() for t in (x, *states))
    if isinstance(module, TritonLSTM):
        y, (hn, cn) = module(x, (h, c), lengths=lengths)
    else:
        y, (hn, cn) = module(pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first, enforce_sorted=False), (h, c))
        y, _ = pad_packed_sequence(y, batch_first, total_length=x.size(1 if batch_first else 0))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator).to(t) for t in (y, hn, cn)]
    wanted = {"x": x, "h": h, "c": c, **dict(module.named_parameters())}
    gradients = torch.autograd.grad([y, hn, cn], list(wanted.values()), weights)
    found = {"y": y, "hn": hn, "cn": cn} | {f"d{n}": g for n, g in zip(wanted, gradients, strict=True)}
    return {name: t.detach() for name, t in found.items()}


@pytest.mark.parametrize("recompute", [False, 4])
@pytest.mark.parametrize("batch_first,bidirectional,proj_size", [(False, False, 0), (True, True, 0), (False, True, 3)])
@pytest.mark.parametrize("way", ["auto", "eager", "torch", *WAYS])
def test_lengths(
    way: str, batch_first: bool, bidirectional: bool, proj_size: int, recompute: bool | int, device: torch.device
) -> None:
    """Equal to packing and padding; what stands past a row's end is not read, and has no gradient."""
    case = Case(
        num_layers=2, bidirectional=bidirectional, batch_first=batch_first, proj_size=proj_size, steps=11, batch=5
    )
    dtype = torch.float32 if way in WAYS else torch.float64
    reference, ours = case.modules(device, dtype, backend="triton" if way in WAYS else way, recompute=recompute)
    x, *states = case.inputs(device, dtype)
    rows = x if batch_first else x.transpose(0, 1)
    for row, length in enumerate(LENGTHS):
        rows[row, length:] = float("nan")
    expected = outcome(reference, x.double(), [s.double() for s in states], None, batch_first)
    for lengths in (LENGTHS, torch.tensor(LENGTHS), torch.tensor(LENGTHS, dtype=torch.int32)):
        with forced(way if way in WAYS else "step"):
            found = outcome(ours, x, states, lengths, batch_first)
        assert_close(found, expected, dtype)
        for name in ("y", "dx"):
            for row, length in enumerate(LENGTHS):
                assert found[name].transpose(0, int(not batch_first))[row, length:].eq(0).all()


def test_lengths_that_are_all_of_it(device: torch.device) -> None:
    module, x = TritonLSTM(5, 7, device=device), torch.randn(4, 3, 5, device=device)
    torch.testing.assert_close(module(x, lengths=[4, 4, 4]), module(x))


def test_lengths_to_any_order() -> None:
    """Gradients of gradients, function transforms."""
    module = TritonLSTM(2, 3, backend="eager", dtype=torch.float64)
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return module(x, lengths=[2, 4, 1])[0]

    torch.autograd.gradcheck(function, (x,))
    torch.autograd.gradgradcheck(function, (x,))
    gradient = torch.func.grad(lambda x: function(x).pow(2).sum())(x.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(function(x).pow(2).sum(), x)[0])


@pytest.mark.parametrize("mode", ["step", "sequence"])
def test_lengths_under_recurrent_dropout(mode: str, device: torch.device) -> None:
    """Every backend draws a row's mask by its place in the sorted batch, as for a packed one."""
    x, found = torch.randn(9, 5, 5, device=device), []
    options = dict(recurrent_dropout=0.5, recurrent_dropout_mode=mode, bidirectional=True, device=device)
    modules = [TritonLSTM(5, 7, backend=backend, **options) for backend in ("eager", "triton")]  # type: ignore[arg-type]
    modules[1].load_state_dict(modules[0].state_dict())
    for module in modules:
        torch.manual_seed(2)
        found.append(module(x, lengths=LENGTHS)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("recompute", [False, 16])
@pytest.mark.parametrize("way", ["eager", *WAYS])
def test_one_long_row_among_short_ones(way: str, recompute: bool | int, device: torch.device) -> None:
    """Tiles of the batch that end long before others, in both directions."""
    if kernels.INTERPRETED:
        pytest.skip("too slow in the interpreter")
    lengths = [1 + k % 7 for k in range(40)]
    lengths[17] = 90
    reference = nn.LSTM(5, 9, 2, bidirectional=True, dtype=torch.float64, device=device)
    dtype = torch.float64 if way == "eager" else torch.float32
    ours = TritonLSTM(
        5, 9, 2, bidirectional=True, backend="eager" if way == "eager" else "triton", recompute=recompute,
        device=device, dtype=dtype,
    )  # fmt: skip
    ours.load_state_dict(reference.state_dict())
    x, found = torch.randn(90, 40, 5, device=device), []
    with forced("step" if way == "eager" else way):
        for module, kind in ((ours, dtype), (reference, torch.float64)):
            packed = pack_padded_sequence(x.to(kind), lengths, enforce_sorted=False)
            data = packed.data.requires_grad_()
            y, (hn, cn) = module(packed._replace(data=data))
            gradients = torch.autograd.grad((y.data * y.data).sum() + cn.sum(), [data, *module.parameters()])
            named = [y.data, hn, cn, *gradients]
            found.append({str(k): t.detach() for k, t in enumerate(named)})
    assert_close(found[0], found[1], dtype)


def test_long_rows_take_no_more_memory_than_the_padded_batch() -> None:
    """One row of 1,000 steps and 63 of 5: what is kept is that of the rows that there are."""
    lengths = torch.tensor([1000] + [5] * 63)
    packed = pack_padded_sequence(torch.randn(1000, 64, 8), lengths)
    for backend in ("eager", "triton"):
        module = TritonLSTM(8, 8, backend=backend)
        kept = saved_bytes(lambda m=module: [m(packed)[0].data], [packed.data, *module.parameters()])  # type: ignore[misc]
        assert kept <= 6 * 8 * 4 * int(lengths.sum())


def test_tiles_follow_the_lengths() -> None:
    """Rows that end early share no tile with one that goes on; equally long ones share as dense ones do."""
    sizes = (32, 64, 64, 64, 1, 2)
    dense = planning.choose_on_cpu(of("lstm"), *sizes)
    assert planning.choose_on_cpu(of("lstm"), *sizes, None, (100,) * 32) == dense
    ragged = planning.choose_on_cpu(of("lstm"), *sizes, None, (500,) + (10,) * 31)
    assert ragged.block_b < dense.block_b and dense.fused and not ragged.fused


def test_programs_run_the_steps_of_their_rows(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """`explain` says how many rows are run for each that is there: few, for the tiles that were chosen."""
    if device.type != "cpu" or kernels.INTERPRETED:
        pytest.skip("the CPU's tiles")
    module = TritonLSTM(64, 64, backend="triton")
    text = module.explain(torch.randn(500, 32, 64), lengths=[500] + [10] * 31)
    ratio = float(text.split("; ")[-1].split(" rows run for each")[0].split()[-1])
    assert 1 <= ratio < 2, text  # of tiles of 16 rows it would be 10
    assert "end after 10 to 500 steps" in text


def test_explain(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """The backend that it names is the one that runs; it computes nothing."""
    ran = []
    for owner, name, label in (
        (dispatch, "_operator", "torch"), (launching.Kernels, "forward", "triton"),
    ):  # fmt: skip
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _o=original, _l=label: ran.append(_l) or _o(*a))
    for backend in ("auto", "torch", "triton"):
        module = TritonLSTM(16, 16, batch_first=True, backend=backend, device=device)
        x = torch.randn(32, 20, 16, device=device)
        text = module.explain(x)
        assert not ran and "training, dense batch of 32 rows and 20 time steps, 640 rows" in text
        module(x)
        assert f"backend: {ran.pop()} " in text and not ran
    assert "asked for" in text and "gates and c of every step" in text
    with torch.no_grad():
        assert "inference" in module.explain(x) and "kept" not in module.explain(x)
    module.recompute = 7
    assert "c at the borders of 3 chunks of 7 steps" in module.explain(x)
    assert "10 time steps, 320 rows" in module.explain(x, lengths=[10] * 32)
    eager = TritonLSTM(5, 7, 2, backend="eager", device=device).explain(torch.zeros(3, 5, device=device))
    assert "layer 1: PyTorch operations" in eager and "outputs between layers" in eager


@pytest.mark.parametrize(
    "lengths,error,message",
    [
        ([3, 0, 4], ValueError, "lengths should be 3 integers from 1 to 4 .* got 0"),
        ([3, -1, 4], ValueError, "got -1"),
        ([3, 5, 4], ValueError, "got 5"),
        ([3, 4], ValueError, r"got the shape \(2,\)"),
        ([[3, 4, 4]], TypeError, "lengths should be"),
        ([1.0, 2.0, 3.0], TypeError, r"got \[1.0, 2.0, 3.0\]"),
        (torch.tensor([1.0, 2.0, 3.0]), TypeError, "got the dtype torch.float32"),
        (torch.tensor([True, True, True]), TypeError, "got the dtype torch.bool"),
        (torch.ones(3, dtype=torch.int64, device="meta"), ValueError, "on the CPU, got them on meta"),
        (4, TypeError, "got 4"),
    ],
    ids=repr,
)
def test_wrong_lengths(lengths: Any, error: type[Exception], message: str) -> None:
    module = TritonLSTM(5, 7)
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(error, match=message):
        module(torch.randn(4, 3, 5), lengths=lengths)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(module.parameters(), before, strict=True))


def test_lengths_go_with_a_padded_batch() -> None:
    module, x = TritonLSTM(5, 7), torch.randn(4, 3, 5)
    with pytest.raises(ValueError, match="lengths goes with a padded batch .* got it with a PackedSequence"):
        module(pack_padded_sequence(x, [4, 3, 1]), lengths=[4, 3, 1])
    with pytest.raises(ValueError, match="lengths goes with a padded batch .* got it with 2-D input"):
        module(x[:, 0], lengths=[4])


def test_lengths_need_no_order() -> None:
    """Where PyTorch is told that they have one, it says so; `lengths=` sorts by itself."""
    x = torch.randn(4, 3, 5)
    with pytest.raises(RuntimeError, match="`lengths` array must be sorted in decreasing order when `enforce_sorted`"):
        pack_padded_sequence(x, [1, 4, 3])
    assert TritonLSTM(5, 7)(x, lengths=[1, 4, 3])[0].shape == (4, 3, 7)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("sizes", [[1, 2], [2, 0], [2, 2], [3]], ids=repr)
def test_batch_sizes_of_no_packed_batch(sizes: list[int], backend: str) -> None:
    """Made by hand, they would send kernels beyond their tensors."""
    packed = PackedSequence(torch.randn(3, 5), torch.tensor(sizes))
    hx = (torch.zeros(1, 2, 7),) * 2
    with pytest.raises((ValueError, RuntimeError), match="batch_sizes should be positive numbers|Expected hidden"):
        TritonLSTM(5, 7, backend=backend)(packed, hx)


def test_layout() -> None:
    layout = Layout.of(8, 3, torch.tensor([3, 3, 1, 1]))
    assert layout.lengths == [4, 2, 2] and list(layout.starts) == [0, 3, 6, 7]
    window = Window(layout, 1, 3)
    assert window.steps(0) == (1, 3) and window.steps(1) == (1, 3)
    assert window.rows(0) == slice(3, 7) and window.size(2) == 4
    assert layout.part(1, 4) == Layout([0, 3, 4], [3, 1, 1], 3)
    order = layout.reversal(torch.device("cpu"))
    assert order.tolist() == [7, 4, 5, 6, 1, 2, 3, 0] and torch.equal(order[order], torch.arange(8))


@pytest.mark.parametrize("sizes", [[3, 3, 1, 1], [4], [2, 2, 2], [5, 4, 4, 2, 2, 2, 1]], ids=repr)
@pytest.mark.parametrize("reverse", [False, True])
def test_previous(reverse: bool, sizes: list[int]) -> None:
    """The state before each step, against a walk over the steps."""
    layout = Layout.of(sum(sizes), sizes[0], torch.tensor(sizes))
    flat, state = torch.randn(sum(sizes), 2), torch.randn(sizes[0], 2)
    expected = torch.empty_like(flat)
    found = layout.previous(flat, state, reverse)
    for t in layout.order(reverse):
        rows = slice(layout.starts[t], layout.starts[t] + sizes[t])
        expected[rows] = state[: sizes[t]]
        state = torch.cat([flat[rows], state[sizes[t] :]])
    assert torch.equal(found, expected)
