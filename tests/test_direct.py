"""Calls that are prepared for their kind: which are, that they are what they would be otherwise, and what they keep."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from checks import assert_close
from lstm_triton import TritonGRU, TritonLSTM, TritonRNN, cpu, direct, dispatch, kernels, launching, planning
from lstm_triton.cells import lstm as lstm_cells
from lstm_triton.cpu import native
from lstm_triton.functional import lstm

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or kernels.INTERPRETED, reason="calls are prepared for native kernels on a CPU"
)

Ran = list[str]


@triton.jit
def doubled(x_ptr):
    at = tl.arange(0, 4)
    tl.store(x_ptr + at, 2 * tl.load(x_ptr + at, mask=at < 3), mask=at < 3)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ran]:
    """What ran: "direct" or "anew" of kernels' passes, "torch"."""
    found: Ran = []

    def watch(owner: Any, name: str, label: Callable[..., str]) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: found.append(label(*a)) or original(*a, **k))

    run, forward = launching.Kernels.forward, direct.Direct.forward

    def anew(*arguments: Any) -> Any:
        if not native.records():  # in which nothing runs
            found.append("anew")
        return run(*arguments)

    def prepared(call: direct.Direct, *arguments: Any) -> Any:
        found.extend(["direct"] * call.count)
        return forward(call, *arguments)

    monkeypatch.setattr(launching.Kernels, "forward", anew)
    monkeypatch.setattr(direct.Direct, "forward", prepared)
    watch(dispatch, "_operator", lambda *_: "torch")
    yield found


def trained(module: nn.Module, x: Tensor, states: Any = None) -> dict[str, Tensor]:
    """Results and all gradients, from a fixed gradient of all results."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    y, hn = module(x, states)
    outputs = [y, *(hn if isinstance(hn, tuple) else (hn,))]
    generator = torch.Generator().manual_seed(7)
    sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs).backward()
    found = {f"output {k}": o.detach() for k, o in enumerate(outputs)} | {"dinput": x.grad}
    return found | {name: p.grad for name, p in module.named_parameters()}  # type: ignore[dict-item]


def once_without(module: nn.Module, x: Tensor, states: Any = None) -> dict[str, Tensor]:
    """The same by way of `lstm_triton.ops`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "of", lambda *_: None)
        return trained(module, x, states)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: TritonLSTM(5, 7, backend="triton"),
    "three layers": lambda: TritonLSTM(5, 7, 3, backend="triton"),
    "no bias": lambda: TritonLSTM(5, 7, 2, bias=False, backend="triton"),
    "batch first": lambda: TritonLSTM(5, 7, batch_first=True, backend="triton"),
    "dropout": lambda: TritonLSTM(5, 7, 3, dropout=0.4, backend="triton"),
    "recurrent dropout": lambda: TritonLSTM(5, 7, 2, recurrent_dropout=0.4, backend="triton"),
    "both dropouts": lambda: TritonLSTM(
        5, 7, 2, dropout=0.3, recurrent_dropout=0.4, recurrent_dropout_mode="sequence", backend="triton"
    ),
    "coupled": lambda: TritonLSTM(5, 7, coupled_gates=True, backend="triton"),
    "gru": lambda: TritonGRU(5, 7, 2, backend="triton"),
    "rnn": lambda: TritonRNN(5, 7, nonlinearity="relu", backend="triton"),
    "float64": lambda: TritonLSTM(5, 7, 2, backend="triton", dtype=torch.float64),
    "one of everything": lambda: TritonRNN(1, 1, backend="triton"),  # whose tensors have shapes in common
    "of one unit": lambda: TritonLSTM(5, 1, 2, backend="triton"),
}


@pytest.mark.parametrize("steps,batch", [(1, 1), (7, 7), (4, 70)])
@pytest.mark.parametrize("name", MODULES)
def test_prepared_calls_are_what_they_would_be_otherwise(name: str, steps: int, batch: int, ran: Ran) -> None:
    """Bit by bit, forward and every gradient; 70 rows are several tiles of the batch."""
    module = MODULES[name]()
    dtype = module.weight_hh_l0.dtype
    x = torch.randn(steps, batch, module.input_size, dtype=dtype)
    if getattr(module, "batch_first", False):
        x = x.transpose(0, 1)
    expected = once_without(module, x)
    assert ran and set(ran) == {"anew"}
    for k in range(3):
        ran.clear()
        found = trained(module, x)
        assert ran == ["direct" if k else "anew"] * module.num_layers
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=0, msg=lambda m, key=key: f"{key}: {m}")


def test_states_and_parts_of_the_gradients(ran: Ran) -> None:
    """Given states get gradients; where only some of the results or parameters want any, the others get none."""
    module = TritonLSTM(5, 7, 2, backend="triton")
    x, states = torch.randn(4, 3, 5), [torch.randn(2, 3, 7, requires_grad=True) for _ in range(2)]
    expected = once_without(module, x, tuple(states))
    expected |= {"dh": states[0].grad, "dc": states[1].grad}  # type: ignore[dict-item]
    for _ in range(2):
        for state in states:
            state.grad = None
        found = trained(module, x, tuple(states)) | {"dh": states[0].grad, "dc": states[1].grad}
        assert_close(found, expected, torch.float32)
    assert ran[-2:] == ["direct"] * 2
    module.zero_grad()
    module(x)
    module(x)[1][1].sum().backward()  # of c_n alone
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
    module.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    module(leaf)[0].sum().backward()
    assert leaf.grad is not None and ran[-2:] == ["direct"] * 2
    module.weight_hh_l1.requires_grad_()
    module.zero_grad()
    module(x)[0].sum().backward()
    assert module.weight_hh_l1.grad is not None and module.weight_hh_l0.grad is None
    assert ran[-2:] == ["direct"] * 2


def test_backward_under_other_circumstances() -> None:
    """Threads and forced strategies of forward count, as its plan may be another one than what backward would have."""
    module, x = TritonLSTM(16, 128, 2, backend="triton"), torch.randn(3, 6, 16)
    expected = once_without(module, x)
    torch.set_num_threads(1)
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    module(leaf)
    torch.manual_seed(3)
    y, (hn, cn) = module(leaf)
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(7)
    loss = sum((o * torch.randn(o.shape, generator=generator)).sum() for o in (y, hn, cn))
    with planning.force("step"):
        loss.backward()  # type: ignore[union-attr]
    found = {"dinput": leaf.grad} | {name: p.grad for name, p in module.named_parameters()}
    assert_close(found, {name: expected[name] for name in found}, torch.float32)


def test_gradients_of_gradients() -> None:
    module = TritonLSTM(3, 4, 2, backend="triton", dtype=torch.float64)
    inputs = [torch.randn(3, 2, 3), torch.randn(2, 2, 4), torch.randn(2, 2, 4)]
    inputs = [x.double().requires_grad_() for x in inputs]
    run = lambda x, h, c: module(x, (h, c))[0]  # noqa: E731
    run(*inputs)
    assert direct.of(inputs[0], None, (inputs[1], inputs[2]), module._flat_weights, module._options(), None)
    assert torch.autograd.gradcheck(run, inputs) and torch.autograd.gradgradcheck(run, inputs)


def test_what_isnt_prepared_runs_anew(ran: Ran) -> None:
    """Each of these is right without: by the calls made anew that other tests compare."""
    x = torch.randn(4, 3, 5)
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 5) for n in (4, 2)])
    made = lambda **options: TritonLSTM(5, 7, backend="triton", **options)  # noqa: E731
    calls: dict[str, Callable[[], Any]] = {
        "packed": lambda: made()(packed),
        "two directions": lambda: made(bidirectional=True)(x),
        "projections": lambda: made(proj_size=3)(x),
        "peepholes": lambda: made(peephole=True)(x),
        "zoneout": lambda: made(zoneout=0.2)(x),
        "recompute": lambda: made(recompute=2)(x),
        "half": lambda: made(dtype=torch.bfloat16)(x.bfloat16()),
        "views of weights": lambda: lstm(
            x, (x.new_zeros(1, 3, 7),) * 2, [torch.randn(k, 28).t() for k in (5, 7)], bias=False, backend="triton"
        ),
        "torch.func": lambda: torch.func.grad(lambda x: made()(x)[0].sum())(x),
    }  # fmt: skip
    for what, call in calls.items():
        ran.clear()
        call()
        call()
        assert ran and set(ran) == {"anew"}, what
    for strategy in ("step", "cooperative"):
        with planning.force(strategy):
            ran.clear()
            made()(x), made()(x)
            assert ran == ["anew"] * 2
    with torch.autocast("cpu"):
        ran.clear()
        made()(x), made()(x)
        assert ran == ["anew"] * 2


def test_a_replay_wants_one_native_launch() -> None:
    x = torch.ones(3)
    for launch in (lambda: None, lambda: [cpu.launch(doubled, (1,), x) for _ in range(2)]):
        with pytest.raises(ValueError, match="native launches, not one"):
            native.Replay(launch, (x,))
    assert not native.records() and x.tolist() == [1, 1, 1]
    replay = native.Replay(lambda: cpu.launch(doubled, (1,), x), (x,))
    assert x.tolist() == [1, 1, 1]  # recorded, not run
    other = torch.full((3,), 5.0)
    assert replay(other) == [] and other.tolist() == [10, 10, 10] and x.tolist() == [1, 1, 1]


def test_auto_is_asked_twice_a_kind(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    auto = dispatch.auto
    monkeypatch.setattr(dispatch, "auto", lambda *a: asked.append(auto(*a)) or asked[-1])
    small, large = TritonLSTM(16, 16), TritonLSTM(8, 1024)
    with torch.no_grad():
        for _ in range(3):
            small(torch.randn(20, 8, 16))
            large(torch.randn(2, 1, 8))
    assert asked == ["triton", "torch"] * 2 and ran == ["anew", "torch"] + ["direct", "torch"] * 2
    small(torch.randn(20, 8, 16))  # one that records
    small(torch.randn(21, 8, 16))
    small.eval()(torch.randn(20, 8, 16))
    torch.set_num_threads(2)
    small(torch.randn(20, 8, 16))
    assert len(asked) == 8


def test_a_prepared_call_keeps_no_tensors() -> None:
    """Of the first call, whose input and weights may be large, nor those of any other."""
    module = TritonLSTM(16, 16, 2, backend="triton")
    x = torch.randn(20, 8, 16, requires_grad=True)
    kept = [weakref.ref(t) for t in (x, module.weight_hh_l0, module.weight_ih_l1)]
    for _ in range(2):
        module(x)[0].sum().backward()
    del module, x
    gc.collect()
    assert len(direct._prepared) == 1 and [ref() for ref in kept] == [None] * 3


def test_kinds_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "KINDS", 3)
    module = TritonLSTM(4, 4, backend="triton")
    with torch.no_grad():
        for steps in range(1, 9):
            for _ in range(2):
                module(torch.randn(steps, 2, 4))
            assert 1 <= len(direct._prepared) <= 3 and 1 <= len(direct._seen) <= 3


def test_inference_mode_comes_first() -> None:
    """What is prepared there serves training, too."""
    module = TritonLSTM(4, 4, backend="triton")
    x = torch.randn(3, 2, 4)
    with torch.inference_mode():
        module(x)
        y = module(x)[0]
    assert y.is_inference()
    leaf = x.clone().requires_grad_()
    for _ in range(2):
        module(leaf)[0].sum().backward()
    torch.testing.assert_close(module(leaf)[0].detach(), y.clone(), rtol=0, atol=0)


def test_hooks_of_saved_tensors_see_them_all() -> None:
    module, x = TritonLSTM(4, 4, 2, backend="triton"), torch.randn(3, 2, 4, requires_grad=True)
    expected = trained(module, x)
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        found = trained(module, x)
    assert len(packed) >= 4 + 8 + 5  # input, states, output; weights; the lower layer's output, gates and c of both
    assert_close(found, expected, torch.float32)


def test_a_changed_weight_is_noticed_by_autograd() -> None:
    module, x = TritonLSTM(4, 4, backend="triton"), torch.randn(3, 2, 4)
    y = [module(x)[0].sum() for _ in range(2)][-1]
    with torch.no_grad():
        module.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_variants_have_kinds_of_their_own(ran: Ran) -> None:
    """Cells are told apart where all else is the same."""
    x = torch.randn(4, 3, 5)
    full, coupled = (TritonLSTM(5, 5, coupled_gates=c, backend="triton") for c in (False, True))
    assert lstm_cells.variant("coupled") is coupled.cell
    full(x), coupled(x)
    a, b = full(x)[0], coupled(x)[0]
    assert ran == ["anew"] * 2 + ["direct"] * 2 and a.shape == b.shape and not torch.equal(a, b)
