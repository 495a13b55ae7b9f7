"""Every kernel stays within its tensors and writes all of what it returns.

Bounds are looked at in Triton's interpreter, which itself notices no access out of them; `test_cpu_sanitizers.py` has
the same kernels compiled. Stores that are missing leave the NaN with which PyTorch, when it is to be deterministic,
fills new memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from address_checker import Checked, OutOfBounds  # noqa: E402

from checks import Case, forced, results  # noqa: E402
from lstm_triton import TritonRNNBase, functional, kernels, launching, planning  # noqa: E402
from lstm_triton.cells import of  # noqa: E402
from lstm_triton.cpu import build  # noqa: E402
from lstm_triton.kernels import barrier  # noqa: E402
from lstm_triton.recurrence import Layer  # noqa: E402

MODULES = (*kernels.STRATEGIES.values(), kernels.cooperative_backward, kernels.rebuild, kernels.dropout)
CPU = torch.device("cpu")

interpreted = [
    pytest.mark.interpreted,
    pytest.mark.skipif(not kernels.INTERPRETED, reason="looks at the addresses of interpreted kernels"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of programs that go on without what others write
]


def natively(test: Callable[..., None]) -> Callable[..., None]:
    lacks = not torch.cuda.is_available() and not build.has_compiler()
    test = pytest.mark.skipif(lacks, reason="no C compiler")(test)
    return pytest.mark.skipif(kernels.INTERPRETED, reason="of compiled kernels")(test)


@dataclass(frozen=True)
class Call:
    """A call of a module whose layers are run by Triton kernels."""

    case: Case
    options: dict[str, Any] = field(default_factory=dict)  # of the module
    plan: dict[str, Any] = field(default_factory=dict)
    given: int = 0  # steps of a recurrent dropout mask that is given
    trains: bool = True
    dtype: torch.dtype = torch.float32
    cell: str = "lstm"

    def make(self, device: torch.device) -> Any:
        """The module, which takes and returns (h, c), whatever its cell has."""
        arguments: dict[str, Any] = self.case.arguments | self.options
        module = TritonRNNBase(of(self.cell), **arguments, device=device, backend="triton").to(self.dtype)
        if not module.cell.carries:
            call = module.forward

            def paired(x: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Any, tuple[Tensor, Tensor]]:
                y, hn = call(x, hx[0])
                return y, (hn, hx[1] * 1)

            module.forward = paired  # type: ignore[assignment, method-assign]
        return module

    def run(self, way: str, device: torch.device = CPU, small: bool = False) -> dict[str, Tensor]:
        """Outputs and gradients; small: in tiles of which a batch and, where it may be, H take several."""
        ours = self.make(device)
        x, h, c = self.case.inputs(device, self.dtype)
        if self.given:
            directions = 2 if self.case.bidirectional else 1
            mask = torch.randint(2, (directions, self.given, *h.shape[1:]), device=device).to(self.dtype)

            def masked(x: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
                weights: Any = ours._flat_weights
                y, hn, cn = functional.lstm(
                    x, hx, weights, bidirectional=self.case.bidirectional, recurrent_dropout_mask=mask, backend="triton"
                )
                return y, (hn, cn)

            ours.forward = masked  # type: ignore[assignment, method-assign]
        choose = launching.of

        def chosen(layer: Layer) -> planning.Plan:
            plan = choose(layer)
            tiles = {"block_b": 4, "block_h": 8, "block_k": 8} if plan.strategy == "step" else {"block_b": 4}
            if layer.cell.whole_rows:
                tiles.pop("block_h", None)
            return replace(plan, **(tiles | self.plan))

        with pytest.MonkeyPatch.context() as patch:
            if small:
                patch.setattr(launching, "of", chosen)
            with forced(way) if way != "wavefront" else planning.force(way):
                if self.trains:
                    return results(ours, self.case, (x, h, c), self.dtype)
                with torch.no_grad():
                    y, (hn, cn) = ours(x, (h, c))
                    return {"output": y, "hn": hn, "cn": cn}


# ---- Bounds ----

ODD: dict[str, Any] = dict(hidden_size=13, batch=5, steps=3, input_size=3)  # a tile begins with the batch's last row
CALLS = [
    Call(Case(steps=1, batch=1, hidden_size=1, input_size=1)),
    Call(Case(**ODD, bidirectional=True), given=3),
    Call(
        Case(**ODD, num_layers=2, bidirectional=True, form="packed"),
        {"dropout": 0.3, "recurrent_dropout": 0.4, "recompute": 2},
    ),
    Call(Case(**ODD, bidirectional=True, proj_size=6, form="packed"), {"recompute": 2}, dtype=torch.float16),
    Call(Case(**ODD, proj_size=9), given=1),
    Call(Case(**ODD, bidirectional=True, bias=False, form="packed"), trains=False),
]
# Zoneout and vectors of parameters, sums that begin with a bias or have no product with h, layer norm.
CELLS = [
    Call(Case(**ODD, bidirectional=True, form="packed"), {"zoneout": 0.3, "recompute": 2}, cell="lstm-peephole"),
    Call(Case(**ODD, bidirectional=True), {"recurrent_dropout": 0.4}, cell="gru"),
    Call(Case(**ODD, bidirectional=True), cell="lstm-norm"),
]
COOPERATIVE = [  # the inner dimension in two blocks, in slices, without tensor cores
    Call(Case(hidden_size=37, batch=5, steps=2, bidirectional=True), dtype=torch.bfloat16),
    Call(Case(hidden_size=72, batch=5, steps=2), plan={"slices": 2}),
    Call(Case(hidden_size=37, batch=2, steps=2), plan={"matvec": True}, trains=False),
]
WAVEFRONT = [
    Call(Case(**ODD, num_layers=3)),
    Call(Case(**ODD, num_layers=2, form="packed"), {"dropout": 0.3, "recurrent_dropout": 0.4}),
    Call(Case(hidden_size=37, batch=5, steps=2, num_layers=2, form="packed"), trains=False),
]
# Of each strategy: its kernels, and what runs them in the ways that there are.
STRATEGIES = {
    "persistent": (
        (kernels.persistent,),
        {"persistent": CALLS + CELLS, "fused": [call for call in CALLS if not call.case.proj_size] + CELLS},
    ),
    "step": ((kernels.step,), {"step": CALLS + CELLS}),
    "cooperative": (
        (kernels.cooperative, kernels.cooperative_backward),
        {"cooperative": CALLS + CELLS[:2] + COOPERATIVE, "wavefront": WAVEFRONT},
    ),
}
# Tensors of whose end a kernel has no use: the rows' lengths behind the steps' places, the last layer's own place.
NOT_TO_THE_END = {("rebuild.multiplied_kernel", "offsets_ptr"), ("cooperative.forward_kernel", "below_ptr")}


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Checked:
    """Launches all kernels, one program after the other: those that meet don't wait for each other, but go on."""
    launcher = Checked()
    for module in MODULES:
        monkeypatch.setattr(module, "start", launcher.start)
    monkeypatch.setattr(barrier, "_barriers", {})
    monkeypatch.setattr(barrier, "INTERPRETED_ROUNDS", 0)
    monkeypatch.setattr(barrier.Barriers, "check", lambda self: self.failed.zero_())
    return launcher


def pointers(module: Any) -> set[tuple[str, str]]:
    """The tensor arguments of a module's kernels."""
    found = {k: v for k, v in vars(module).items() if k.endswith("_kernel")}
    stem = Path(module.__file__).stem
    return {(f"{stem}.{k}", name) for k, v in found.items() for name in v.arg_names if name.endswith("_ptr")}


@triton.jit
def copy_kernel(x_ptr, y_ptr, count_ptr, n, FROM: tl.constexpr, LOADS: tl.constexpr, STORES: tl.constexpr):
    """y[i] = x[i] of n elements, but for what is out of bounds by so many elements."""
    at = FROM + tl.arange(0, 8)
    x = tl.load(x_ptr + at, mask=at < n + LOADS, other=0.0)
    tl.store(y_ptr + at, x, mask=at < n + STORES)
    tl.atomic_add(count_ptr + FROM, 1)


class TestBounds:
    pytestmark = interpreted

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_kernels(self, strategy: str, checked: Checked) -> None:
        """No access is out of bounds; that of one element more would be: all tensors' last elements are accessed."""
        modules, ways = STRATEGIES[strategy]
        for way, calls in ways.items():
            for call in calls:
                before = checked.launches
                call.run(way, small=True)
                assert checked.launches > before
        expected = set().union(*(pointers(module) for module in (*modules, kernels.rebuild, kernels.dropout)))
        assert expected - checked.reached == NOT_TO_THE_END & expected

    def test_mutants(self, checked: Checked) -> None:
        """An access of one element past a tensor's end or before its start is seen, whatever lies there."""

        def run(first: int = 0, loads: int = 0, stores: int = 0) -> Tensor:
            x, y, count = torch.arange(5.0), torch.zeros(5), torch.zeros(1, dtype=torch.int32)
            constants = {"FROM": first, "LOADS": loads, "STORES": stores}
            checked.start(copy_kernel, (1, 1, 1), [x, y, count, 5], constants)
            assert count.item() == 1
            return y

        assert torch.equal(run(), torch.arange(5.0))
        with pytest.raises(
            OutOfBounds, match=r"\(0, 0, 0\) of copy_kernel at test_bounds.py:\d+: 1 .* 4 .* end of x_ptr"
        ):
            run(loads=1)
        with pytest.raises(OutOfBounds, match="1 elements, the first of them 4 bytes past the end of y_ptr"):
            run(stores=1)
        with pytest.raises(OutOfBounds, match="1 elements, the first of them 4 bytes before the start of x_ptr"):
            run(first=-1)
        with pytest.raises(OutOfBounds, match="4 bytes past the end of count_ptr"):
            run(first=1)


# ---- Values that nobody writes ----

WAYS = ("persistent", "fused", "step", "cooperative", "wavefront")
RAGGED: dict[str, Any] = dict(hidden_size=13, batch=5, steps=7, input_size=3, form="packed")


def calls(way: str) -> list[Call]:
    """Windows that begin and end with other rows in each direction; all that is kept, too."""
    if way == "wavefront":
        return [Call(Case(**RAGGED, num_layers=3)), Call(Case(**RAGGED, num_layers=3), {"recurrent_dropout": 0.4})]
    case = Case(**RAGGED, bidirectional=True, num_layers=2)
    found = [Call(case, {"recompute": window, "dropout": 0.3}) for window in (False, 3)]
    if way != "fused":
        found += [replace(call, case=replace(case, proj_size=6)) for call in found]
    return found


@contextmanager
def poisoned() -> Iterator[None]:
    """Within this context new memory of floats is NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def unwritten(call: Call, way: str, device: torch.device) -> list[str]:
    """Of outputs, gradients and what is kept for backward, those that aren't all numbers."""
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with poisoned(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        found = call.run(way, device)
    assert kept
    tensors = found | {f"kept {k}": x for k, x in enumerate(kept)}
    return [name for name, x in tensors.items() if not x.isfinite().all()]


@natively
@pytest.mark.parametrize("way", WAYS)
def test_all_is_written(way: str, device: torch.device) -> None:
    for call in calls(way):
        assert unwritten(call, way, device) == [], call


@natively
@pytest.mark.parametrize("way", WAYS)
def test_what_is_unwritten_shows(way: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each kernel that doesn't run."""
    names: set[str] = set()
    left_out = ""

    def patch(module: Any) -> None:
        start = module.start

        def without(kernel: Any, *args: Any, **own: Any) -> None:
            names.add(kernel.fn.__name__)
            if kernel.fn.__name__ != left_out:
                start(kernel, *args, **own)

        monkeypatch.setattr(module, "start", without)

    for module in MODULES:
        patch(module)
    call = calls(way)[1]
    assert unwritten(call, way, device) == []
    expected = {"forward_kernel", "backward_kernel", "multiplied_kernel"}
    assert names == expected | ({"activate_kernel", "drop_kernel"} if way != "wavefront" else set())
    for left_out in sorted(names):
        assert unwritten(call, way, device) != [], left_out


@natively
@pytest.mark.parametrize("way", WAYS)
def test_rows_of_padding_are_written(way: str, device: torch.device) -> None:
    """Zeros in the output, and in the input's gradient."""
    lengths = [3, 7, 1, 4, 7]
    module = Case(input_size=3, hidden_size=13, bidirectional=way != "wavefront", num_layers=2)
    _, ours = module.modules(device, torch.float32, backend="triton")
    x = torch.randn(7, 5, 3, device=device, requires_grad=True)
    with poisoned(), forced(way) if way != "wavefront" else planning.force(way):
        y, states = ours(x, lengths=lengths)
        (gradient,) = torch.autograd.grad([y, *states], [x], [torch.ones_like(t) for t in (y, *states)])
    padding = torch.arange(7)[:, None] >= torch.tensor(lengths)
    for found in (y, gradient):
        assert found.isfinite().all()
        assert (found[padding] == 0).all() and (found[~padding] != 0).all()
