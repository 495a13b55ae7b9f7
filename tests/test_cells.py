"""GRU, RNN and the LSTM's variants: outputs and every gradient against references written from the papers' formulas."""

import copy
import pickle
from collections.abc import Iterable
from typing import Any, NamedTuple

import cell_references as references
import pytest
import torch
from cell_references import Reference
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from checks import WAYS, Case, assert_close, forced, matrix, shaped
from lstm_triton import TritonGRU, TritonLSTM, TritonRNN, TritonRNNBase, cells, convert, functional, planning, revert
from lstm_triton.recurrence import RecurrentDropout, Zoneout, rounded


class Kind(NamedTuple):
    make: Any
    options: dict[str, Any]
    step: references.Step

    @property
    def carries(self) -> bool:
        return self.make is TritonLSTM


KINDS = {
    "peephole": Kind(TritonLSTM, dict(peephole=True), references.lstm_peephole),
    "norm": Kind(TritonLSTM, dict(layer_norm=True), references.lstm_norm),
    "coupled": Kind(TritonLSTM, dict(coupled_gates=True), references.coupled),
    "coupled-peephole": Kind(TritonLSTM, dict(coupled_gates=True, peephole=True), references.coupled_peephole),
    "coupled-norm": Kind(TritonLSTM, dict(coupled_gates=True, layer_norm=True), references.coupled_norm),
    "1997": Kind(TritonLSTM, dict(forget_gate=False), references.carousel),
    "1997-peephole": Kind(TritonLSTM, dict(forget_gate=False, peephole=True), references.carousel_peephole),
    "1997-norm": Kind(TritonLSTM, dict(forget_gate=False, layer_norm=True), references.carousel_norm),
    "gru": Kind(TritonGRU, {}, references.gru),
    "rnn-tanh": Kind(TritonRNN, {}, references.rnn_tanh),
    "rnn-relu": Kind(TritonRNN, dict(nonlinearity="relu"), references.rnn_relu),
}
LSTM = Kind(TritonLSTM, {}, references.lstm)
VARIANTS = [name for name, kind in KINDS.items() if kind.carries]
CASES = [case for case in matrix() if not case.proj_size]
# A cell of each sort, where all would be much of the same: each sort of parameters, and a cell without a state c.
SOME = ("norm", "coupled-peephole", "gru")


def built(kind: Kind, case: Case, device: torch.device, dtype: torch.dtype, **options: Any) -> TritonRNNBase:
    """A module in `dtype`, whose gains and biases are none that make no difference."""
    arguments = dict(case.arguments)
    if not kind.carries:
        del arguments["proj_size"]
    module = kind.make(**arguments, **kind.options, **options, device=device)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith(("gain", "bias_c")):
                parameter += 0.3 * torch.randn_like(parameter)
    return module.to(dtype)


def inputs_of(kind: Kind, case: Case, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Input and states."""
    return list(case.inputs(device, dtype))[: 2 + kind.carries]


def results(module: nn.Module, case: Case, inputs: Iterable[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs of a module and the gradients of all its inputs and parameters."""
    x, *hx = (t.detach().to(dtype, copy=True).requires_grad_() for t in inputs)
    y, states = module(case.pack(x), tuple(hx) if len(hx) == 2 else hx[0])
    y = y.data if isinstance(y, PackedSequence) else y
    outputs = [y, *(states if isinstance(states, tuple) else (states,))]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator) for t in outputs]
    # Weighted in bfloat16's values, so that each dtype has the same loss.
    weights = [w.to(torch.bfloat16).to(t) for w, t in zip(weights, outputs, strict=True)]
    wanted = {"input": x, "h": hx[0], "c": hx[-1], **dict(module.named_parameters())}
    gradients = torch.autograd.grad(outputs, list(wanted.values()), weights)
    found = dict(zip(("output", "hn", "cn"), outputs, strict=False))
    found |= {f"d{name}": g for name, g in zip(wanted, gradients, strict=True)}
    return {name: t.detach() for name, t in found.items()}


def run(module: nn.Module, call: str, case: Case, inputs: Iterable[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """`results`, by a backend or, on "triton", in a way."""
    module.backend = "triton" if call in WAYS else call
    if call not in WAYS:
        return results(module, case, inputs, dtype)
    with forced(call):
        return results(module, case, inputs, dtype)


def compare(kind: Kind, case: Case, call: str, device: torch.device, dtype: torch.dtype, **options: Any) -> None:
    ours = built(kind, case, device, dtype, **options)
    reference, inputs = Reference(kind.step, ours, kind.carries), inputs_of(kind, case, device, dtype)
    expected = results(reference, case, inputs, torch.float64)
    assert_close(run(ours, call, case, inputs, dtype), expected, dtype)


def by_way(cases: list[Case], interpreted: int) -> list[Any]:
    """Parameters `name`, `way` and `case`: each cell in each of its ways takes one of the cases after the other.

    One of so many, `interpreted`, is interpreted, too.
    """
    pairs = [(name, way) for name in KINDS for way in WAYS]
    return [
        pytest.param(
            name, way, cases[k % len(cases)], id=f"{name}-{way}-{cases[k % len(cases)]}",
            marks=pytest.mark.interpreted if k % interpreted == 0 else (),
        )
        for k, (name, way) in enumerate(pairs)
    ]  # fmt: skip


# How far the references themselves are to be trusted: those that PyTorch has agree with it.
@pytest.mark.parametrize("form", ["batched", "packed"])
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn-tanh", "rnn-relu"])
def test_references_agree_with_pytorch(name: str, form: str, device: torch.device) -> None:
    kind, case = KINDS.get(name, LSTM), Case(2, True, form=form)
    ours = built(kind, case, device, torch.float64)
    theirs = revert(copy.deepcopy(ours))
    assert type(theirs) in (nn.LSTM, nn.GRU, nn.RNN)
    inputs = inputs_of(kind, case, device, torch.float64)
    expected = results(theirs, case, inputs, torch.float64)
    assert_close(
        results(Reference(kind.step, ours, kind.carries), case, inputs, torch.float64), expected, torch.float64
    )


@pytest.mark.parametrize("name,case", [(name, case) for k, name in enumerate(KINDS) for case in CASES[k % 5 :: 5]])
def test_eager_float64(name: str, case: Case, device: torch.device) -> None:
    compare(KINDS[name], case, "eager", device, torch.float64)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("name,case", [(name, case) for name in ("gru", "rnn-tanh", "rnn-relu") for case in CASES[::3]])
def test_pytorchs_operator_and_auto_float64(name: str, case: Case, backend: str, device: torch.device) -> None:
    compare(KINDS[name], case, backend, device, torch.float64)


@pytest.mark.parametrize("name", KINDS)
def test_auto(name: str, device: torch.device) -> None:
    compare(KINDS[name], Case(2, form="packed"), "auto", device, torch.float32)


# Both directions of a packed batch, and one of a dense one: the kernels of the other cases are made of their parts.
@pytest.mark.parametrize("name,way,case", by_way([case for case in CASES if case.bidirectional][::2], 5))
def test_kernels_float32(name: str, way: str, case: Case, device: torch.device) -> None:
    compare(KINDS[name], case, way, device, torch.float32)


@pytest.mark.parametrize("name,way,case", by_way([case for case in CASES if not case.bidirectional][::2], 7))
def test_kernels_float64(name: str, way: str, case: Case, device: torch.device) -> None:
    compare(KINDS[name], case, way, device, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
# Layer norm divides by what may be small: three layers of it make 2.1e-2 of the rounding of bfloat16's h.
@pytest.mark.parametrize("name,way,case", by_way([case for case in CASES[1::5] if case.num_layers < 3], 100)[::4])
def test_kernels_half(name: str, way: str, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    compare(KINDS[name], case, way, device, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", KINDS)
def test_eager_half(name: str, dtype: torch.dtype, device: torch.device) -> None:
    compare(KINDS[name], Case(2, True, form="packed"), "eager", device, dtype)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(steps=1, batch=1, hidden_size=2, input_size=1),
        dict(steps=2, batch=67, hidden_size=33, input_size=3),  # more than one tile of the batch and, by step, of units
    ],
    ids=str,
)
def test_kernels_sizes(sizes: dict[str, int], way: str, name: str, device: torch.device) -> None:
    compare(KINDS[name], shaped(**sizes), way, device, torch.float32)


@pytest.mark.parametrize("name", KINDS)
def test_eager_sizes(name: str, device: torch.device) -> None:
    for sizes in (dict(steps=1, batch=1, hidden_size=1, input_size=1), dict(steps=9, batch=1, hidden_size=130)):
        compare(KINDS[name], shaped(**sizes), "eager", device, torch.float64)


@pytest.mark.parametrize("name", VARIANTS)
def test_projections(name: str, device: torch.device) -> None:
    calls = ("eager", "persistent", "step") if name in ("1997-peephole", "coupled-norm") else ("eager", "persistent")
    for call in calls:
        compare(KINDS[name], Case(2, proj_size=3), call, device, torch.float64)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("name", SOME)
def test_noncontiguous(name: str, backend: str, device: torch.device) -> None:
    """Sliced, transposed and expanded inputs and gradients."""
    kind, case = KINDS[name], Case(2, True)
    ours = built(kind, case, device, torch.float32, backend=backend)
    x = torch.randn(case.batch, 2 * case.input_size, case.steps, device=device).permute(2, 0, 1)[..., ::2]
    h = torch.randn(1, 1, case.hidden_size, device=device).expand(4, case.batch, -1)
    found = []
    for module in (ours, Reference(kind.step, ours, kind.carries)):
        dtype = next(module.parameters()).dtype
        leaf, state = x.to(dtype).requires_grad_(), h.to(dtype)
        y, states = module(leaf, (state, state) if kind.carries else state)
        gradients = torch.autograd.grad(y, [leaf, *module.parameters()], y.new_ones(()).expand(y.shape))
        last = states[-1] if kind.carries else states
        found.append({str(k): t.detach() for k, t in enumerate((y, last, *gradients))})
    assert_close(*found, torch.float32)


@pytest.mark.parametrize("backend,names", [("eager", KINDS), ("triton", (*SOME, "rnn-tanh")), ("torch", ["gru"])])
def test_recompute(backend: str, names: Iterable[str], device: torch.device) -> None:
    """Gates that are rebuilt in backward, chunk by chunk."""
    for name in names:
        for case in (Case(2, True, form="packed", steps=5), Case(2, steps=5, bias=False)):
            compare(KINDS[name], case, backend, device, torch.float64, recompute=2)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("mode", functional.MODES)
@pytest.mark.parametrize("name", KINDS)
def test_recurrent_dropout(name: str, mode: str, backend: str, device: torch.device) -> None:
    """The masks of the seed that a call draws."""
    kind, case = KINDS[name], Case(2, True, form="packed")
    dtype = torch.float64
    way = WAYS[list(KINDS).index(name) % 3] if backend == "triton" else "eager"
    ours = built(kind, case, device, dtype, recurrent_dropout=0.4, recurrent_dropout_mode=mode)
    inputs = inputs_of(kind, case, device, dtype)
    torch.manual_seed(3)
    found = run(ours, way, case, inputs, dtype)
    mask = RecurrentDropout(seed=drawn_seed(3, device), p=0.4, per_step=mode == "step").drawn(
        case.steps, inputs[1].new_empty(4, case.batch, case.hidden_size)
    )
    assert mask is not None and 0 < (mask == 0).sum() < mask.numel()
    reference = Reference(kind.step, ours, kind.carries, dropped=mask)
    assert_close(found, results(reference, case, inputs, dtype), dtype)


def drawn_seed(seed: int, device: torch.device) -> Tensor:
    """What a call draws first."""
    torch.manual_seed(seed)
    return torch.randint(2**63 - 1, (1,), device=device)


@pytest.mark.parametrize("name", SOME)
def test_given_mask(name: str, device: torch.device) -> None:
    """`functional.recurrent` with a mask of one's own, in which one state or two are given."""
    kind, case = KINDS[name], Case(2, True)
    ours = built(kind, case, device, torch.float64)
    x, *hx = inputs_of(kind, case, device, torch.float64)
    mask = torch.rand(4, case.steps, case.batch, case.hidden_size, device=device)
    found = functional.recurrent(
        ours.cell, x, tuple(hx), list(ours._flat_weights), num_layers=2, bidirectional=True,
        recurrent_dropout_mask=mask, backend="eager",
    )  # fmt: skip
    y, states = Reference(kind.step, ours, kind.carries, dropped=mask)(x, tuple(hx) if kind.carries else hx[0])
    assert len(found) == 2 + kind.carries
    for a, b in zip(found, (y, *(states if kind.carries else (states,))), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


ZONES = {"lstm": LSTM, **{name: KINDS[name] for name in VARIANTS}}


@pytest.mark.parametrize("name", ["lstm", "coupled-peephole", "norm"])
@pytest.mark.parametrize("call", WAYS)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_zoneout(name: str, call: str, training: bool, device: torch.device) -> None:
    """In evaluation the expectation, in training the masks of the seed that a call draws."""
    zoneout(ZONES[name], call, training, device)


@pytest.mark.parametrize("name", ZONES)
def test_zoneout_eager(name: str, device: torch.device) -> None:
    for training in (False, True):
        zoneout(ZONES[name], "eager", training, device)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_zoneout_recompute(backend: str, device: torch.device) -> None:
    for training in (False, True):
        zoneout(KINDS["coupled"], backend, training, device, recompute=2)


def zoneout(kind: Kind, call: str, training: bool, device: torch.device, **options: Any) -> None:
    case, dtype, p = Case(2, True, form="packed", steps=4), torch.float64, (0.3, 0.6)
    ours = built(kind, case, device, dtype, zoneout=p, **options).train(training)
    inputs = inputs_of(kind, case, device, dtype)
    stays: tuple[Any, Any] = (rounded(p[0]), rounded(p[1]))
    if training:
        masks = []
        for k in range(4):
            zone = Zoneout(*p, drawn_seed(3, device), k - k % 2)
            masks.append(zone.of_steps(k % 2, 0, case.steps, inputs[1][0]))
        stays = tuple(torch.stack(of) for of in zip(*masks, strict=True))
        assert all(0 < of.mean() < 1 for of in stays)
    torch.manual_seed(3)
    found = run(ours, call, case, inputs, dtype)
    assert_close(found, results(Reference(kind.step, ours, kind.carries, stays=stays), case, inputs, dtype), dtype)


def test_zoneout_masks(device: torch.device) -> None:
    """As often as asked for, h and c apart, anew in each step, and none at all where the probability is 0."""
    module = TritonLSTM(3, 64, zoneout=(0.2, 0.0), device=device)
    x = torch.randn(40, 50, 3, device=device)
    y, (_, c) = module(x)
    stays = (y[1:] - y[:-1]).abs() < 1e-6  # of h, whose new value is another one nearly always
    assert abs(stays.double().mean() - 0.2) < 0.005
    assert (stays.double().mean((1, 2)) > 0.15).all() and not torch.equal(stays[0], stays[1])
    assert not module(x[:1], (x.new_zeros(1, 50, 64), x.new_zeros(1, 50, 64)))[1][1].eq(0).any()
    module = TritonLSTM(3, 64, zoneout=(0.0, 0.3), device=device)
    _, (h, c) = module(x[:1])
    assert abs((c == 0).double().mean() - 0.3) < 0.03 and not (h == 0).any()  # h comes of the cell's own c


@pytest.mark.parametrize("call", ["eager", "persistent"])
@pytest.mark.parametrize("name", ["lstm", "norm", "gru", "rnn-tanh"])
def test_weight_dropout(name: str, call: str, device: torch.device) -> None:
    """Elements of weight_hh dropped for all time steps, by PyTorch's own generator; those dropped have no gradient."""
    kind, case, dtype = KINDS.get(name, LSTM), Case(2, True, form="packed"), torch.float64
    ours = built(kind, case, device, dtype, weight_dropout=0.4)
    reference = Reference(kind.step, ours, kind.carries)
    inputs, masks = inputs_of(kind, case, device, dtype), {}
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if name.startswith("weight_hh"):
                masks[f"d{name}"] = F.dropout(torch.ones_like(weight), 0.4)
                weight *= masks[f"d{name}"]
    torch.manual_seed(3)
    found = run(ours, call, case, inputs, dtype)
    expected = results(reference, case, inputs, dtype)
    assert_close(found, expected | {name: expected[name] * mask for name, mask in masks.items()}, dtype)
    ours.eval()
    whole = results(Reference(kind.step, ours, kind.carries), case, inputs, dtype)
    assert_close(run(ours, call, case, inputs, dtype), whole, dtype)


@pytest.mark.parametrize("name", SOME)
def test_dropout_between_layers(name: str, device: torch.device) -> None:
    """The same masks by each backend; in evaluation none."""
    kind, case = KINDS[name], Case(3, form="packed")
    ours = built(kind, case, device, torch.float64, dropout=0.5)
    inputs, found = inputs_of(kind, case, device, torch.float64), []
    for call in ("eager", "persistent"):
        torch.manual_seed(3)
        found.append(run(ours, call, case, inputs, torch.float64))
    assert_close(*found, torch.float64)
    expected = results(Reference(kind.step, ours, kind.carries), case, inputs, torch.float64)
    assert not torch.allclose(found[0]["output"], expected["output"])
    assert_close(run(ours.eval(), "eager", case, inputs, torch.float64), expected, torch.float64)


@pytest.mark.parametrize(
    "name,call", [(name, call) for name in ("lstm", *KINDS) for call in ("eager", "persistent")] + [("gru", "step")]
)
def test_gradients_of_gradients(name: str, call: str, device: torch.device) -> None:
    """gradcheck and gradgradcheck, under what draws from the seed where the cell has it."""
    kind, case = KINDS.get(name, LSTM), Case(1, name in SOME, input_size=2, hidden_size=3, batch=2, steps=2)
    zones = dict(zoneout=(0.3, 0.3)) if kind.carries else {}
    module = built(kind, case, device, torch.float64, recurrent_dropout=0.3, **zones)
    module.backend = "eager" if call == "eager" else "triton"
    names = [name for name, _ in module.named_parameters()]
    x, *hx = (t.requires_grad_() for t in inputs_of(kind, case, device, torch.float64))

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        states, weights = tensors[1 : 1 + len(hx)], tensors[1 + len(hx) :]
        arguments = tensors[0], states if kind.carries else states[0]
        y, found = torch.func.functional_call(module, dict(zip(names, weights, strict=True)), arguments)
        return y, *(found if kind.carries else (found,))

    tensors = [x, *hx, *(p.detach().requires_grad_() for p in module.parameters())]
    with planning.force("step" if call == "step" else "persistent"):
        assert torch.autograd.gradcheck(function, tensors, fast_mode=call != "eager")
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize(
    "name,backend", [*((name, "triton") for name in ("lstm", *KINDS)), *((name, "auto") for name in SOME)]
)
def test_compile(name: str, backend: str, device: torch.device) -> None:
    """torch.compile(fullgraph=True), forward and backward, under zoneout where the cell has it."""
    kind, case = KINDS.get(name, LSTM), Case(2, True, batch_first=True)
    zones = dict(zoneout=0.3) if kind.carries else {}
    ours = built(kind, case, device, torch.float32, backend=backend, **zones).eval()
    inputs = inputs_of(kind, case, device, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="inductor" if name == "gru" else "aot_eager")

    class Compiled(nn.Module):
        def named_parameters(self, *_: Any, **__: Any) -> Any:
            return ours.named_parameters()

        def forward(self, *arguments: Any) -> Any:
            return compiled(*arguments)

    found = results(Compiled(), case, inputs, torch.float32)
    for name, expected in results(ours, case, inputs, torch.float32).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name,form,backend",
    [
        *((name, form, "eager") for name in KINDS for form in ("batched", "packed")),
        *((name, "batched", "triton") for name in SOME),
    ],
)
def test_autocast(name: str, form: str, backend: str, device: torch.device) -> None:
    """bfloat16 throughout, as PyTorch's own operators."""
    kind, case = KINDS[name], Case(2, form=form)
    ours = built(kind, case, device, torch.float32, backend=backend)
    inputs = inputs_of(kind, case, device, torch.float32)
    expected = results(Reference(kind.step, ours, kind.carries), case, inputs, torch.float64)
    with torch.autocast(device.type, torch.bfloat16):
        x, *hx = inputs
        y, states = ours(case.pack(x), tuple(hx) if kind.carries else hx[0])
    y = y.data if form == "packed" else y
    if not kind.carries:  # the dtypes that PyTorch's has
        theirs = revert(copy.deepcopy(ours))
        with torch.autocast(device.type, torch.bfloat16):
            their_y, their_h = theirs(case.pack(x), hx[0])
        assert y.dtype == (their_y.data if form == "packed" else their_y).dtype
        assert states.dtype == their_h.dtype
    error = (y.double() - expected["output"]).norm() / expected["output"].norm()
    assert 1e-5 < error < 2e-2


@pytest.mark.parametrize("name", ["gru", "norm"])
def test_lengths(name: str, device: torch.device) -> None:
    """A padded batch with `lengths=` is what a packed one is, one state or two."""
    kind, case = KINDS[name], Case(2, True, form="packed", batch_first=True)
    ours = built(kind, case, device, torch.float64)
    x, *hx = inputs_of(kind, case, device, torch.float64)
    packed = case.pack(x)
    padded, lengths = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
    states = tuple(hx) if kind.carries else hx[0]
    y, found = ours(padded, states, lengths=lengths)
    expected_y, expected = ours(packed, states)
    torch.testing.assert_close(y, nn.utils.rnn.pad_packed_sequence(expected_y, batch_first=True)[0])
    for a, b in zip(found if kind.carries else (found,), expected if kind.carries else (expected,), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", KINDS)
def test_copies_and_state_dicts(name: str, device: torch.device) -> None:
    kind, case = KINDS[name], Case(2, True)
    zones = dict(zoneout=(0.1, 0.2)) if kind.carries else {}
    ours = built(kind, case, device, torch.float32, recurrent_dropout=0.1, weight_dropout=0.2, **zones).eval()
    inputs = inputs_of(kind, case, device, torch.float32)
    expected = results(ours, case, inputs, torch.float32)
    loaded = built(kind, case, device, torch.float32, **zones).eval()
    assert not torch.equal(loaded.weight_hh_l0, ours.weight_hh_l0)
    loaded.load_state_dict(ours.state_dict())
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), loaded):
        assert other.cell is ours.cell and repr(other.cell) == f"Cell({ours.cell.name!r})"
        assert other.weight_hh_l0 is not ours.weight_hh_l0
        found = results(other, case, inputs, torch.float32)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert repr(copy.deepcopy(ours)) == repr(ours)


PARAMETERS = {
    "peephole": dict(weight_ih=(28, 5), weight_hh=(28, 7), bias_ih=(28,), bias_hh=(28,), weight_ch=(21,)),
    "coupled-peephole": dict(weight_ih=(21, 5), weight_hh=(21, 7), bias_ih=(21,), bias_hh=(21,), weight_ch=(14,)),
    "norm": dict(
        weight_ih=(28, 5), weight_hh=(28, 7), bias_ih=(28,), bias_hh=(28,), gain_ih=(28,), gain_hh=(28,), gain_c=(7,),
        bias_c=(7,),
    ),
    "1997": dict(weight_ih=(21, 5), weight_hh=(21, 7), bias_ih=(21,), bias_hh=(21,)),
    "gru": dict(weight_ih=(21, 5), weight_hh=(21, 7), bias_ih=(21,), bias_hh=(21,)),
    "rnn-relu": dict(weight_ih=(7, 5), weight_hh=(7, 7), bias_ih=(7,), bias_hh=(7,)),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    kind = KINDS[name]
    for bias in (True, False):
        module = kind.make(5, 7, num_layers=2, bidirectional=True, bias=bias, **kind.options)
        found = {name: tuple(p.shape) for name, p in module.named_parameters()}
        first = {k: v for k, v in PARAMETERS[name].items() if bias or not k.startswith("bias")}
        expected: dict[str, tuple[int, ...]] = {}
        for suffix in ("_l0", "_l0_reverse", "_l1", "_l1_reverse"):
            deep = first | ({"weight_ih": (first["weight_ih"][0], 14)} if "l1" in suffix else {})
            expected |= {k + suffix: v for k, v in deep.items()}
        assert found == expected and module._flat_weights_names == list(expected)
        assert module.all_weights[0][0] is module.weight_ih_l0


def test_initial_values() -> None:
    """Uniform within ± 1 / √H but for gains and shifts of layer norm."""
    module = TritonLSTM(5, 16, layer_norm=True)
    for name, parameter in module.named_parameters():
        if name.startswith("gain"):
            assert (parameter == 1).all()
        elif name.startswith("bias_c"):
            assert (parameter == 0).all()
        else:
            assert parameter.abs().max() <= 0.25 and parameter.std() > 0.1
    peephole = TritonLSTM(5, 16, peephole=True).weight_ch_l0
    assert peephole.abs().max() <= 0.25 and peephole.std() > 0.1
    with torch.no_grad():
        module.gain_c_l0.zero_()
    module.reset_parameters()
    assert (module.gain_c_l0 == 1).all()


@pytest.mark.parametrize("options", [{}, dict(coupled_gates=True), dict(layer_norm=True), dict(peephole=True)], ids=str)
def test_forget_bias(options: dict[str, Any]) -> None:
    """Of both biases together; those of the other gates are as PyTorch draws them."""
    torch.manual_seed(1)
    module = TritonLSTM(5, 8, num_layers=2, bidirectional=True, forget_bias=1.5, **options)
    torch.manual_seed(1)
    plain = TritonLSTM(5, 8, num_layers=2, bidirectional=True, **options)
    forget = slice(0, 8) if options.get("coupled_gates") else slice(8, 16)
    for suffix in ("_l0", "_l0_reverse", "_l1", "_l1_reverse"):
        total = getattr(module, "bias_ih" + suffix) + getattr(module, "bias_hh" + suffix)
        assert (total[forget] == 1.5).all()
        for name in ("bias_ih", "bias_hh"):
            ours, theirs = getattr(module, name + suffix).clone(), getattr(plain, name + suffix).clone()
            ours[forget] = theirs[forget] = 0
            assert torch.equal(ours, theirs)
    assert torch.equal(module.weight_hh_l1, plain.weight_hh_l1)


def test_repr() -> None:
    text = repr(TritonLSTM(5, 7, layer_norm=True, coupled_gates=True, zoneout=0.1, weight_dropout=0.2))
    assert text == "TritonLSTM(5, 7, zoneout=(0.1, 0.1), weight_dropout=0.2, layer_norm=True, coupled_gates=True)"
    assert repr(TritonLSTM(5, 7, peephole=True, forget_gate=False)) == (
        "TritonLSTM(5, 7, peephole=True, forget_gate=False)"
    )
    for ours, theirs in ((TritonGRU, nn.GRU), (TritonRNN, nn.RNN)):
        assert repr(ours(5, 7, num_layers=2, bidirectional=True)) == "Triton" + repr(
            theirs(5, 7, num_layers=2, bidirectional=True)
        )


@pytest.mark.parametrize(
    "module", [nn.GRU(5, 7, 2, bidirectional=True), nn.RNN(5, 7, 2), nn.RNN(5, 7, nonlinearity="relu")], ids=str
)
def test_convert_and_revert(module: nn.Module, device: torch.device) -> None:
    module, model = copy.deepcopy(module), nn.Sequential()
    model.append(module.to(device))
    x = torch.randn(3, 2, 5, device=device)
    expected = module(x)
    assert convert(model, recurrent_dropout=0.25, backend="eager") is model
    ours = model[0]
    assert type(ours) in (TritonGRU, TritonRNN) and ours.cell is cells.of(
        {"GRU": "gru", "RNN_TANH": "rnn-tanh", "RNN_RELU": "rnn-relu"}[module.mode]
    )
    assert ours.weight_hh_l0 is module.weight_hh_l0
    assert ours.recurrent_dropout == 0.25 and ours.zoneout == (0.0, 0.0)
    assert not torch.allclose(ours(x)[0], expected[0])
    for a, b in zip(ours.eval()(x), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert "recurrent_dropout=0.25" in repr(pickle.loads(pickle.dumps(ours)))
    with pytest.raises(ValueError, match="recurrent_dropout=0.25"):
        revert(model)
    ours.recurrent_dropout = 0.0
    again = revert(model)[0]
    assert type(again) is type(module) and again.weight_hh_l0 is module.weight_hh_l0
    torch.testing.assert_close(again(x)[0], expected[0])
    assert repr(again) == repr(module)


def test_variants_are_not_reverted() -> None:
    for options in (kind.options for kind in KINDS.values() if kind.carries):
        with pytest.raises(ValueError, match="which nn.LSTM lacks"):
            revert(nn.Sequential(TritonLSTM(3, 4, **options)))
    for option in (dict(zoneout=0.1), dict(weight_dropout=0.1)):
        with pytest.raises(ValueError, match=f"{next(iter(option))}=.* which nn.LSTM lacks"):
            revert(nn.Sequential(TritonLSTM(3, 4, **option)))


@pytest.mark.parametrize(
    "make,options,error,message",
    [
        (TritonLSTM, dict(layer_norm=True, peephole=True), ValueError, "layer_norm and peephole don't go together"),
        (TritonLSTM, dict(coupled_gates=True, forget_gate=False), ValueError, "coupled_gates .* forget_gate=False"),
        (TritonLSTM, dict(zoneout=0.1, proj_size=3), ValueError, "zoneout=0.1 and proj_size=3"),
        (TritonLSTM, dict(zoneout=(0.1, 1.5)), ValueError, "zoneout of c .* got 1.5"),
        (TritonLSTM, dict(zoneout=(0.1,)), ValueError, r"zoneout should be a number or a pair .* got \(0.1,\)"),
        (TritonLSTM, dict(zoneout="0.1"), ValueError, "zoneout of h .* got '0.1'"),
        (TritonLSTM, dict(weight_dropout=-0.1), ValueError, "weight_dropout .* got -0.1"),
        (TritonLSTM, dict(weight_dropout=True), ValueError, "weight_dropout .* got True"),
        (TritonLSTM, dict(layer_norm=1), TypeError, "layer_norm should be of type bool, got: int"),
        (TritonLSTM, dict(peephole="yes"), TypeError, "peephole should be of type bool, got: str"),
        (TritonLSTM, dict(coupled_gates=None), TypeError, "coupled_gates should be of type bool, got: NoneType"),
        (TritonLSTM, dict(forget_gate=0), TypeError, "forget_gate should be of type bool, got: int"),
        (TritonLSTM, dict(forget_bias="1"), TypeError, "forget_bias should be a number or None, got '1'"),
        (TritonLSTM, dict(forget_bias=True), TypeError, "forget_bias should be a number or None, got True"),
        (TritonLSTM, dict(forget_bias=1.0, forget_gate=False), ValueError, "forget_bias=1.0 .* forget_gate=False"),
        (TritonLSTM, dict(forget_bias=1.0, bias=False), ValueError, "forget_bias=1.0 .* bias=False"),
        (TritonLSTM, dict(peephole=True, backend="torch"), ValueError, "'torch' has no cell 'lstm-peephole'"),
        (TritonLSTM, dict(layer_norm=True, backend="torch"), ValueError, "'torch' has no cell 'lstm-norm'"),
        (TritonLSTM, dict(zoneout=0.1, backend="torch"), ValueError, "'torch' has no zoneout"),
        (TritonGRU, dict(recurrent_dropout=0.1, backend="torch"), ValueError, "'torch' has no recurrent dropout"),
        (TritonGRU, dict(proj_size=3), TypeError, "proj_size"),
        (TritonGRU, dict(zoneout=0.1), TypeError, "zoneout"),
        (TritonGRU, dict(backend="cudnn"), ValueError, "backend should be one of .* got 'cudnn'"),
        (TritonRNN, dict(nonlinearity="gelu"), ValueError, "Unknown nonlinearity 'gelu'"),
        (TritonRNN, dict(recompute=0), ValueError, "recompute .* got 0"),
        (TritonRNN, dict(num_layers=1.0), TypeError, "num_layers should be of type int, got: float"),
    ],
)  # fmt: skip
def test_errors_of_constructors(make: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(5, 7, **options)


def test_errors_of_the_base() -> None:
    with pytest.raises(TypeError, match=r"cell should be a lstm_triton.cells.Cell, got str"):
        TritonRNNBase("gru", 5, 7)
    with pytest.raises(ValueError, match="cell 'gru' has no projections, got proj_size=3"):
        TritonRNNBase(cells.of("gru"), 5, 7, proj_size=3)
    # A cell whose state is h alone has no c that could stay while h doesn't.
    with pytest.raises(ValueError, match="zoneout goes with cells that carry c, got 0.1 with 'gru'"):
        TritonRNNBase(cells.of("gru"), 5, 7, zoneout=0.1)
    with pytest.raises(ValueError, match="no cell is registered as 'gruu'; known: gru, lstm"):
        cells.of("gruu")


def test_errors_of_calls(device: torch.device) -> None:
    """Those of `nn.GRU` and `nn.RNN`, word for word."""
    x, h = torch.randn(3, 2, 5, device=device), torch.randn(1, 2, 7, device=device)
    wrong: list[tuple[Any, ...]] = [
        (x[None],), (x[0, 0],), (x[..., :4],), (x.double(),), (x, h[0]), (x[:, 0], h), (x, h[:, :1]), (x, h[..., :6]),
        (x[:0],),
    ]  # fmt: skip
    for ours, theirs in ((TritonGRU, nn.GRU), (TritonRNN, nn.RNN)):
        a, b = ours(5, 7, device=device, backend="eager"), theirs(5, 7, device=device)
        for arguments in wrong:
            messages = []
            for module in (a, b):
                with pytest.raises((RuntimeError, ValueError)) as raised:
                    module(*arguments)
                messages.append((raised.type, str(raised.value)))
            assert messages[0] == messages[1]


def test_errors_of_the_functional_form(device: torch.device) -> None:
    module = TritonGRU(5, 7, device=device)
    x, h = torch.randn(3, 2, 5, device=device), torch.randn(1, 2, 7, device=device)
    weights = list(module._flat_weights)
    with pytest.raises(ValueError, match="hx should be 1 tensors for the cell 'gru', got 2"):
        functional.recurrent(module.cell, x, (h, h), weights)
    with pytest.raises(ValueError, match="weights should be 4 tensors for each of 1 layers and directions, got 3"):
        functional.recurrent(module.cell, x, (h,), weights[:3])
    with pytest.raises(RuntimeError, match=r"weights\[1\] should have shape \(21, 7\), got \(28, 7\)"):
        functional.recurrent(module.cell, x, (h,), [weights[0], torch.randn(28, 7, device=device), *weights[2:]])
    norm = TritonLSTM(5, 7, layer_norm=True, device=device)
    with pytest.raises(RuntimeError, match=r"weights\[7\] should have shape \(7,\), got \(8,\)"):
        functional.recurrent(norm.cell, x, (h, h), [*list(norm._flat_weights)[:-1], torch.randn(8, device=device)])
    with pytest.raises(ValueError, match=r"zoneout goes with cells that carry c, got zoneout=\(0.1, 0.0\) with 'gru'"):
        functional.recurrent(module.cell, x, (h,), weights, zoneout=(0.1, 0.0))
    with pytest.raises(ValueError, match="backend='torch' has no"):
        functional.recurrent(norm.cell, x, (h, h), list(norm._flat_weights), backend="torch")
