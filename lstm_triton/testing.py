"""`check_cell`: whether a cell of one's own is right, by every way in which it may run.

A cell says the same thing four times: forward and backward, each as a Triton function and in PyTorch operations. Its
`forward_torch` is what is meant; here all else is held against that, and its derivatives by autograd, in float64.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lstm_triton import dispatch, planning, reference
from lstm_triton.base import TritonRNNBase
from lstm_triton.cells.cell import Cell, register
from lstm_triton.gpu import gpus
from lstm_triton.recurrence import Direction, Layer, Layout, RecurrentDropout, Zoneout, present, state_dtype
from lstm_triton.tolerances import DTYPES, TOLERANCES

# Odd ones, so that kernels' tiles have rows and units that aren't there.
STEPS, BATCH, FEATURES, HIDDEN = 4, 3, 3, 5
LENGTHS = (2, 4, 1)  # of a packed batch's rows
SHARED_HIDDEN = 21  # units that several programs share
GPUS = ("h100", "mi300x")
SEED = 5

Tensors = tuple[Tensor, ...]


def check_cell(
    cell: Cell,
    *,
    checks: Iterable[str] | None = None,
    gpu_names: Sequence[str] = GPUS,
    told: Callable[[str], object] | None = None,
) -> None:
    """Checks a cell; takes some seconds, most of them to compile its kernels for this CPU, which runs them.

    On tiles, against autograd of `forward_torch` in float64, to 1e-9 relative to each tensor's 2-norm:

    - "signature": how many tensors of which shapes the functions return;
    - "backward_torch": its gradients, and that it is linear in dq and dc.

    On layers of random weights (4 time steps, 3 rows, 5 units, or 21 where programs share them) outputs and the
    gradients of input, states and all parameters, against the layer written plainly around `forward_torch`:

    - "eager": in PyTorch operations; "persistent", "step" and, of cells that look at no whole rows, "cooperative": by
      kernels of that strategy; each a dense batch, and a packed one of two layers and both directions;
    - "linear": that kernels' gradients are 10⁶ times as large where those of the outputs are;
    - "float32", "bf16": by kernels, to 2e-5 and 2e-2;
    - "recurrent dropout", and of cells that carry c "zoneout", in training and in evaluation: in PyTorch operations and
      by kernels;
    - "recompute": the same with gates rebuilt in backward; "projections": of cells that have `output_torch`;
    - "double backward": `torch.autograd.gradgradcheck`;
    - "machine code": the kernels compiled for GPUs that need not be there, in fp16: they compile, spill no registers,
      fit the shared memory, have tensor-core instructions, and no atomic additions of floats. Where Triton brings the
      compilers, which its interpreter's process doesn't use.

    Args:
        cell: one's own, or a built-in one; registered by its name, as modules do.
        checks: names of those to make, of `CHECKS`; None: all.
        gpu_names: for whose machine code to compile, as of `lstm_triton.plan`.
        told: called with the name of each check before it is made, such as `print`.

    Raises:
        AssertionError: the cell fails; the message names the check, what it ran, the tensor and its error.
        RuntimeError: kernels can't run here: Triton or a C compiler is missing.
        ValueError: another cell has the name, or no check or GPU is called so.
    """
    register(cell)
    names = list(CHECKS) if checks is None else list(checks)
    for name in names:
        if name not in CHECKS:
            raise ValueError(f"checks should be of {', '.join(CHECKS)}, got {name!r}")
    known = [gpus.named(name) for name in gpu_names]
    if set(names) - {"signature", "backward_torch", "eager", "double backward"}:
        dispatch.check_triton(torch.device("cpu"))
    with torch.random.fork_rng():
        for name in names:
            if told is not None:
                told(name)
            torch.manual_seed(SEED)
            if name == "machine code":
                _check_machine_code(cell, known)
            else:
                CHECKS[name](cell)


# -- on tiles ----------------------------------------------------------------------------------------------------------


def _tiles(count: int) -> Tensors:
    """(BATCH, HIDDEN) each."""
    return tuple(torch.randn(BATCH, HIDDEN, dtype=torch.float64) for _ in range(count))


def _check_signature(cell: Cell) -> None:
    what = f"cell {cell.name!r}, signature"
    sums, (c,), parameters = _tiles(cell.sums), _tiles(1), _vectors(cell)
    found = cell.forward_torch(sums, c, parameters)
    assert isinstance(found, tuple) and len(found) == 3, f"{what}: forward_torch should return (saved, c, q)"
    saved, c_new, q = found
    _check_tiles(f"{what}: saved of forward_torch", saved, cell.saved)
    _check_tiles(f"{what}: c and q of forward_torch", (c_new, q), ("c", "q"))
    assert cell.carries or torch.equal(c_new, q), f"{what}: c of forward_torch should be q, as the cell doesn't carry c"
    found = cell.backward_torch(saved, c_new, c, *_tiles(2), parameters)
    assert isinstance(found, tuple) and len(found) == 3, (
        f"{what}: backward_torch should return (dsums, dc_prev, dparameters)"
    )
    dsums, dc_prev, dparameters = found
    _check_tiles(f"{what}: dsums of backward_torch", dsums, range(cell.sums))
    _check_tiles(f"{what}: dc_prev of backward_torch", (dc_prev,), ("dc_prev",))
    _check_tiles(f"{what}: dparameters of backward_torch", dparameters, range(cell.vectors))


def _check_tiles(what: str, found: Any, names: Sequence[object]) -> None:
    assert isinstance(found, tuple), f"{what} should be a tuple, got {type(found).__name__}"
    assert len(found) == len(names), f"{what} should be {len(names)} tensors, got {len(found)}"
    for name, x in zip(names, found, strict=True):
        assert x.shape == (BATCH, HIDDEN), (
            f"{what}: number {name} should have the shape (rows, H), got {tuple(x.shape)}"
        )


def _check_backward_torch(cell: Cell) -> None:
    what = f"cell {cell.name!r}, backward_torch"
    sums, (c,), vectors = _tiles(cell.sums), _tiles(1), _vectors(cell)
    leaves = [x.requires_grad_() for x in (*sums, c)]
    own = [v.expand(BATCH, HIDDEN).detach().clone().requires_grad_() for v in vectors]  # gradients of each row
    saved, c_new, q = cell.forward_torch(tuple(leaves[:-1]), leaves[-1], tuple(own))
    dq, dc = _tiles(2)
    outputs, given = (c_new, q), (dc, dq)
    expected = torch.autograd.grad(outputs, leaves + own, given, allow_unused=True, materialize_grads=True)
    detached = tuple(x.detach() for x in saved)

    def found(dq: Tensor, dc: Tensor) -> dict[str, Tensor]:
        dsums, dc_prev, dparameters = cell.backward_torch(detached, c_new.detach(), c.detach(), dq, dc, vectors)
        named = {f"dsums[{k}]": x for k, x in enumerate(dsums)} | {"dc_prev": dc_prev}
        return named | {f"dparameters[{k}]": x for k, x in enumerate(dparameters)}

    once = found(dq, dc)
    _compare(f"{what} on tiles", once, dict(zip(once, expected, strict=True)), "fp64")
    zero = torch.zeros_like(dq)
    apart = (found(1e6 * dq, zero), found(zero, 1e6 * dc))
    together = {name: (apart[0][name] + apart[1][name]) / 1e6 for name in once}
    _compare(f"{what}, linear in dq and dc", together, once, "fp64")


def _vectors(cell: Cell) -> Tensors:
    """(HIDDEN,) each, that a cell's functions get."""
    return tuple(torch.randn(cell.vectors, HIDDEN, dtype=torch.float64).unbind(0))


# -- on layers ---------------------------------------------------------------------------------------------------------

_PLAIN: dict[str, Any] = {}
_PACKED: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "packed": True}


def _module(
    cell: Cell, dtype: torch.dtype, backend: str, packed: bool = False, hidden: int = HIDDEN, **options: Any
) -> TritonRNNBase:
    """Of random weights, exact in `dtype`; parameters that begin with a value are moved from it."""
    torch.manual_seed(SEED)
    module = TritonRNNBase(cell, FEATURES, hidden, backend=backend, **options)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if not name.startswith(("weight", "bias_ih", "bias_hh")):
                weight.add_(torch.randn_like(weight), alpha=0.3)
    return module.to(dtype)


def _inputs(module: TritonRNNBase, packed: bool) -> tuple[Tensor, list[Tensor], Tensor | None, Any]:
    """Input and states in the module's dtype, batch_sizes, and the input as the module is called with it."""
    count = module.num_layers * (1 + module.bidirectional)
    dtype = next(module.parameters()).dtype
    x = torch.randn(STEPS, BATCH, FEATURES).to(dtype)
    sizes = [module.proj_size or module.hidden_size, module.hidden_size][: 1 + module.cell.carries]
    states = [torch.randn(count, BATCH, n).to(dtype).requires_grad_() for n in sizes]
    if not packed:
        x.requires_grad_()
        return x, states, None, x
    order = torch.tensor(LENGTHS).argsort(descending=True)
    rows = pack_padded_sequence(x[:, order], torch.tensor(LENGTHS)[order])
    data = rows.data.requires_grad_()
    return data, states, rows.batch_sizes, PackedSequence(data, rows.batch_sizes)


def _results(outputs: Sequence[Tensor], leaves: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """Outputs and gradients, of a loss that weighs the outputs."""
    generator = torch.Generator().manual_seed(SEED)
    # In bfloat16's values, so that each dtype has the same loss.
    weights = [torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y.dtype) for y in outputs]
    found = torch.autograd.grad(
        outputs, list(leaves.values()), [scale * w for w in weights], allow_unused=True, materialize_grads=True
    )
    named = dict(zip(("output", "h_n", "c_n"), outputs, strict=False))
    return {
        k: x.detach() for k, x in (named | {f"d{k}": g / scale for k, g in zip(leaves, found, strict=True)}).items()
    }


def _leaves(module: TritonRNNBase, x: Tensor, states: list[Tensor]) -> dict[str, Tensor]:
    named = dict(zip(module._flat_weights_names, module._flat_weights, strict=True))
    return {"input": x, **dict(zip(("h_0", "c_0"), states, strict=False)), **named}  # type: ignore[dict-item]


def _ran(module: TritonRNNBase, packed: bool, scale: float = 1.0) -> dict[str, Tensor]:
    """What the module returns, and its gradients."""
    torch.manual_seed(SEED + 1)
    x, states, _, called = _inputs(module, packed)
    torch.manual_seed(SEED + 2)
    y, found = module(called, (states[0], states[1]) if module.cell.carries else states[0])
    y = y.data if isinstance(y, PackedSequence) else y
    return _results([y, *(found if module.cell.carries else [found])], _leaves(module, x, states), scale)


def _expected(module: TritonRNNBase, packed: bool) -> dict[str, Tensor]:
    """The same of the layers written plainly, in float64, under the same masks."""
    torch.manual_seed(SEED + 1)
    x, states, batch_sizes, _ = _inputs(module, packed)
    x, *states = (t.detach().double().requires_grad_() for t in (x, *states))
    weights = [w.detach().double().requires_grad_() for w in module._flat_weights]  # type: ignore[union-attr]
    torch.manual_seed(SEED + 2)
    seed, zoneout, mask = torch.randint(2**63 - 1, (1,)), None, None
    if module.recurrent_dropout:
        mask = RecurrentDropout(None, seed, module.recurrent_dropout).drawn(STEPS, states[0])
    if module.zoneout != (0.0, 0.0):
        zoneout = Zoneout(*module.zoneout, seed if module.training else None)
    found = reference.stack(
        module.cell, x, (states[0], states[-1]), weights, batch_sizes, module.num_layers, True, module.bidirectional,
        mask=mask, zoneout=zoneout,
    )  # fmt: skip
    leaves = {"input": x, **dict(zip(("h_0", "c_0"), states, strict=False))}
    leaves |= dict(zip(module._flat_weights_names, weights, strict=True))
    return _results(found[: 2 + module.cell.carries], leaves)


def _check_layers(
    cell: Cell, check: str, way: str, precision: str = "fp64", training: bool = True, scale: float = 1.0, **options: Any
) -> None:
    """A module's results by a way, "eager" or a strategy of kernels."""
    packed = bool(options.get("packed"))
    module = _module(cell, DTYPES[precision], "eager" if way == "eager" else "triton", **options).train(training)
    strategy: AbstractContextManager[None] = nullcontext() if way == "eager" else planning.force(way)
    with strategy:
        found = _ran(module, packed, scale)
    form = "packed batch" if packed else "dense batch"
    size = f"T={STEPS}, B={BATCH}, H={module.hidden_size}, {module.num_layers} layers"
    size += ", both directions" * module.bidirectional
    mode = "" if training else ", evaluation"
    what = f"cell {cell.name!r}, {check}: {precision} by {way}, {form} of {size}{mode}"
    _compare(what, found, _expected(module, packed), precision)


def _compare(what: str, found: dict[str, Tensor], expected: dict[str, Tensor], precision: str) -> None:
    """Each tensor to the tolerance, relative to its 2-norm."""
    _, tolerance = TOLERANCES[precision]
    for name, right in expected.items():
        ours = found[name]
        assert ours.shape == right.shape, (
            f"{what}: {name} has shape {tuple(ours.shape)}, should be {tuple(right.shape)}"
        )
        scale = right.double().norm().item() or 1.0
        error = (ours.double() - right.double()).norm().item() / scale
        # NaN is not within, either.
        assert error <= tolerance, f"{what}: relative error of {name} {error:.1e}, tolerated {tolerance:.0e}"


def _by(way: str) -> Callable[[Cell], None]:
    def check(cell: Cell) -> None:
        _check_layers(cell, way, way, **_PLAIN)
        _check_layers(cell, way, way, **_PACKED)

    return check


def _check_cooperative(cell: Cell) -> None:
    if not cell.whole_rows and not dispatch.interpreting():  # whose programs run one after the other, and would wait
        for options in (_PLAIN, _PACKED):
            _check_layers(cell, "cooperative", "cooperative", hidden=SHARED_HIDDEN, **options)


def _check_linear(cell: Cell) -> None:
    _check_layers(cell, "linear", "persistent", scale=1e6)
    _check_layers(cell, "linear", "persistent", scale=1e-6)


def _in(precision: str) -> Callable[[Cell], None]:
    def check(cell: Cell) -> None:
        for way in ("persistent", "step"):
            _check_layers(cell, precision, way, precision)

    return check


def _check_recurrent_dropout(cell: Cell) -> None:
    for way in ("eager", "persistent", "step"):
        _check_layers(cell, "recurrent dropout", way, recurrent_dropout=0.4, **_PACKED)


def _check_zoneout(cell: Cell) -> None:
    if cell.carries:
        for way in ("eager", "persistent", "step"):
            for training in (True, False):
                _check_layers(cell, "zoneout", way, training=training, zoneout=(0.4, 0.3), **_PACKED)


def _check_recompute(cell: Cell) -> None:
    for way in ("eager", "persistent"):
        _check_layers(cell, "recompute", way, recompute=3, **_PACKED)


def _check_projections(cell: Cell) -> None:
    if cell.output_torch is not None:
        for way in ("eager", "persistent", "step"):
            _check_layers(cell, "projections", way, proj_size=3, **_PACKED)


def _check_double_backward(cell: Cell) -> None:
    module = _module(cell, torch.float64, "eager")
    x, states, _, _ = _inputs(module, False)
    names = list(module._flat_weights_names)
    weights = [w.detach().requires_grad_() for w in module._flat_weights]  # type: ignore[union-attr]

    def function(*tensors: Tensor) -> Tensors:
        x, rest = tensors[0], tensors[1 + len(states) :]
        hx = tensors[1 : 1 + len(states)] if cell.carries else tensors[1]
        y, found = torch.func.functional_call(module, dict(zip(names, rest, strict=True)), (x, hx))
        return (y, *found) if cell.carries else (y, found)

    try:
        torch.autograd.gradgradcheck(function, (x, *states, *weights), fast_mode=True)
    except RuntimeError as error:  # GradcheckError, or of an operation that has no second derivative
        what = f"cell {cell.name!r}, double backward: T={STEPS}, B={BATCH}, H={HIDDEN}"
        raise AssertionError(f"{what}: {str(error).strip().splitlines()[0]}") from error


# -- as machine code ---------------------------------------------------------------------------------------------------

AUDITED_BATCH, AUDITED_HIDDEN = 32, 64


def _check_machine_code(cell: Cell, known: Sequence[gpus.Gpu]) -> None:
    if dispatch.interpreting():
        return
    from lstm_triton.gpu import machine_code

    layer = _audited(cell)
    for gpu in known:
        for plan in _plans(gpu, cell):
            for run in ("inference", "forward", "backward", "rebuild"):
                for call in machine_code.calls(plan, layer, run, gpu.target):
                    kernel = call.kernel.__name__
                    what = f"cell {cell.name!r}, machine code: {kernel} of {plan.strategy}, {run}, fp16, "
                    what += f"B={AUDITED_BATCH}, H={AUDITED_HIDDEN}, for {gpu.target}"
                    try:
                        usage = machine_code.usage(call)
                    except Exception as error:  # of the compiler, which raises many kinds
                        raise AssertionError(f"{what} doesn't compile: {error}") from error
                    limit = gpu.limits.shared_per_program
                    assert not usage.spills, f"{what} spills {usage.spill_bytes} bytes of each thread's registers"
                    assert usage.shared_bytes <= limit, (
                        f"{what} takes {usage.shared_bytes} bytes of {limit} shared ones"
                    )
                    assert not usage.float_atomics, f"{what} has {usage.float_atomics} atomic additions of floats"
                    multiplies = call.is_own and usage.weight_bytes
                    assert usage.tensor_core_ops or not multiplies, f"{what} has no tensor-core instructions"


def _plans(gpu: gpus.Gpu, cell: Cell) -> list[planning.Plan]:
    """Small ones, that leave a cell of some ten tiles the registers that it takes."""
    warps = 8 if gpu.is_nvidia else 4
    units = AUDITED_HIDDEN if cell.whole_rows else 32
    return [
        planning.Plan("persistent", 16, AUDITED_HIDDEN, AUDITED_HIDDEN, warps),
        planning.Plan("step", 16, units, 32, warps),
    ]


def _audited(cell: Cell) -> Layer:
    """A layer of tensors without memory."""
    batch, hidden, steps = AUDITED_BATCH, AUDITED_HIDDEN, 16

    def tensor(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    direction = Direction(
        tensor(cell.inputs * hidden, hidden), tensor(len(cell.recurrent) * hidden, hidden),
        tensor(cell.inputs * hidden), tensor(len(cell.biases) * hidden), None,
        tuple(tensor(p.vectors * hidden) for p in present(cell, True)),
    )  # fmt: skip
    states = tensor(1, batch, hidden), tensor(1, batch, hidden, dtype=state_dtype(torch.float16))
    layout = Layout.dense(steps, batch)
    return Layer(tensor(layout.total, hidden), *states, [direction], layout, RecurrentDropout(), cell)


CHECKS: dict[str, Callable[..., None]] = {
    "signature": _check_signature,
    "backward_torch": _check_backward_torch,
    "eager": _by("eager"),
    "persistent": _by("persistent"),
    "step": _by("step"),
    "cooperative": _check_cooperative,
    "linear": _check_linear,
    "float32": _in("fp32"),
    "bf16": _in("bf16"),
    "recurrent dropout": _check_recurrent_dropout,
    "zoneout": _check_zoneout,
    "recompute": _check_recompute,
    "projections": _check_projections,
    "double backward": _check_double_backward,
    "machine code": _check_machine_code,
}
