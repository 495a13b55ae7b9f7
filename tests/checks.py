"""What tests compare with: tolerances, the matrix of cases, and `nn.LSTM` in float64."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lstm_triton import TritonLSTM, direct, launching, planning
from lstm_triton.recurrence import Layer
from lstm_triton.tolerances import TOLERANCES

# How Triton kernels run a layer: by each strategy, "persistent" without and with what it can fuse.
WAYS = ("persistent", "fused", "step")

# Largest relative error, |ours - reference| / |reference| in the 2-norm over a tensor, by dtype.
TOLERANCE = {
    dtype: TOLERANCES[name][1]
    for dtype, name in (
        (torch.float64, "fp64"),
        (torch.float32, "fp32"),
        (torch.float16, "fp16"),
        (torch.bfloat16, "bf16"),
    )
}


def cases_by_way(cases: Sequence["Case"], interpreted: int) -> list[Any]:
    """Parameters `case` and `way`: each case in all ways, one with projections in those that aren't fused.

    One case of so many, `interpreted`, is interpreted, too; which ones is another in each way.
    """
    return [
        pytest.param(case, way, id=f"{case}-{way}", marks=pytest.mark.interpreted if index % interpreted == k else ())
        for index, case in enumerate(cases)
        for k, way in enumerate(WAYS)
        if way != "fused" or not case.proj_size
    ]


@contextmanager
def forced(way: str) -> Iterator[None]:
    """Within this context layers on backend "triton" run in this way, one of `WAYS`.

    Nothing is fused on a GPU, nor where there are projections: "fused" is "persistent" there.
    """
    choose = launching.of

    def chosen(layer: Layer) -> planning.Plan:
        fused = way == "fused" and not layer.input.is_cuda and layer.hx.size(2) == layer.cx.size(2)
        return replace(choose(layer), fused=fused)

    launching.of = chosen
    direct.forget()
    try:
        with planning.force("persistent" if way == "fused" else way):
            yield
    finally:
        launching.of = choose
        direct.forget()


@dataclass(frozen=True)
class Case:
    """An LSTM and an input for it."""

    num_layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    proj_size: int = 0
    form: str = "batched"  # or "unbatched" or "packed"
    input_size: int = 5
    hidden_size: int = 7
    steps: int = 3  # interpreted kernels are slow
    batch: int = 3

    def __str__(self) -> str:
        flags = [f"L{self.num_layers}", f"P{self.proj_size}", self.form]
        flags += [name for name in ("bidirectional", "bias", "batch_first") if getattr(self, name)]
        return "-".join(flags)

    @property
    def arguments(self) -> dict[str, object]:
        names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional", "proj_size")
        return {name: getattr(self, name) for name in names}

    def modules(self, device: torch.device, dtype: torch.dtype, **options: object) -> tuple[nn.LSTM, TritonLSTM]:
        """`nn.LSTM` in float64 and ours in `dtype`, with the same weights, all exact in `dtype`."""
        ours = TritonLSTM(**self.arguments, device=device, **options).to(dtype)  # type: ignore[arg-type]
        reference = nn.LSTM(**self.arguments, device=device, dtype=torch.float64)  # type: ignore[arg-type]
        reference.load_state_dict(ours.state_dict())
        return reference, ours

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Input, h and c."""
        count = self.num_layers * (2 if self.bidirectional else 1)
        shape = [self.steps] if self.form == "unbatched" else [self.steps, self.batch]
        if self.batch_first and self.form != "unbatched":
            shape.reverse()
        state = [count] if self.form == "unbatched" else [count, self.batch]
        x = torch.randn(*shape, self.input_size, device=device)
        h = torch.randn(*state, self.proj_size or self.hidden_size, device=device)
        c = torch.randn(*state, self.hidden_size, device=device)
        return x.to(dtype), h.to(dtype), c.to(dtype)

    def pack(self, x: Tensor) -> Tensor | PackedSequence:
        """`x` as the module takes it; a packed batch has ragged, unsorted lengths."""
        if self.form != "packed":
            return x
        lengths = torch.arange(self.batch).mul(2).remainder(self.steps).add(1)
        lengths[self.batch // 2] = self.steps
        return pack_padded_sequence(x, lengths, self.batch_first, enforce_sorted=False)


def matrix() -> list[Case]:
    """Layers × directions × bias × batch_first × projections × forms of input."""
    axes = itertools.product(
        (1, 2, 3), (False, True), (False, True), (False, True), (0, 3), ("batched", "unbatched", "packed")
    )
    return [Case(*values) for values in axes]


def shaped(**sizes: int) -> Case:
    return replace(Case(), **sizes)  # type: ignore[arg-type]


def results(module: nn.Module, case: Case, inputs: Iterable[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs of a module and the gradients of all its inputs and parameters."""
    x, h, c = (t.detach().to(dtype, copy=True).requires_grad_() for t in inputs)
    y, (hn, cn) = module(case.pack(x), (h, c))
    if isinstance(y, PackedSequence):
        y = y.data
    outputs = {"output": y, "hn": hn, "cn": cn}
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator).to(t.device) for t in outputs.values()]
    # Weighted in bfloat16's values, so that each dtype has the same loss.
    weights = [w.to(torch.bfloat16).to(t.dtype) for w, t in zip(weights, outputs.values(), strict=True)]
    wanted = {"input": x, "h": h, "c": c, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(list(outputs.values()), list(wanted.values()), weights)
    named = {f"d{name}": g for name, g in zip(wanted, gradients, strict=True)}
    return {name: t.detach() for name, t in (outputs | named).items()}


def assert_close(ours: dict[str, Tensor], reference: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Each tensor within `TOLERANCE`, with the shape of the reference and the dtype asked for."""
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        found = ours[name]
        assert found.shape == expected.shape, name
        assert found.dtype == dtype, name
        scale = expected.double().norm()
        error = (found.double() - expected.double()).norm() / torch.where(scale > 0, scale, torch.ones_like(scale))
        assert error.item() <= TOLERANCE[dtype], f"{name}: relative error {error.item():.2e}"
