"""What `backend="auto"` is on a GPU: the fastest of PyTorch's operator and the kernels that are right there.

Measured for the first of all calls alike (`lstm_triton.gpu.tuning`), with kernels that small layers have shown to be
right on that GPU (`lstm_triton.gpu.qualification`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lstm_triton import cells
from lstm_triton.gpu import gpus, qualification, report, tuning
from lstm_triton.gpu.model import Work
from lstm_triton.gpu.tuning import EAGER, TORCH, Bucket, Candidate, Result, name_of
from lstm_triton.planning import Plan
from lstm_triton.tolerances import DTYPES, TOLERANCES

if TYPE_CHECKING:
    from lstm_triton.dispatch import Call

MOST_PLANS = 3  # of ours that are timed for a bucket
COMPARED = 2**22  # elements of a plan's results, about

Run = Callable[..., tuple[Tensor, Tensor, Tensor]]


def choose(call: "Call", run: Run) -> str:
    """The backend for a call on a GPU with Triton; by `lstm_triton.functional.run` it is tried what isn't known yet."""
    return _backend(_result(call, run))


def why(call: "Call") -> tuple[str, str]:
    """What `choose` would return and, in words, why or what it would try first."""
    result, lacks = _result(call, None), _operator_lacks(call)
    return _backend(result), f"PyTorch's operator has no {lacks}; {result}" if lacks else str(result)


def _operator_lacks(call: "Call") -> str:
    """What PyTorch's operator lacks for a call, in words; empty if nothing."""
    from lstm_triton import dispatch  # not at the top: it imports this

    return "recurrent dropout" if call.drops else dispatch.operator_lacks(call.options)


def _backend(result: Result) -> str:
    if result.plan is not None:
        return "triton"
    return "eager" if result.winner == EAGER else "torch"


def _result(call: "Call", run: Run | None) -> Result:
    device, dtype = call.input.device, call.input.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if dtype not in DTYPES.values():
        return Result(EAGER if _operator_lacks(call) else TORCH, None, f"there are no kernels here for {dtype}")
    o, packed = call.options, call.batch_sizes is not None
    steps = call.input.size(1 if o.batch_first else 0) if call.batch_sizes is None else call.batch_sizes.size(0)
    kind = call.save, packed, call.drops, bool(o.recompute)
    bucket = Bucket.of(dtype, call.input.size(-1), *call.hx, o.num_layers, steps, *kind, o.cell, o.zones)
    return tuning.known(device, bucket) or _found(call, run, bucket)


def proposals(bucket: Bucket, device: torch.device) -> list[tuple[Plan | None, float | None]]:
    """What to try for a bucket's calls, the one first that should be the fastest, and the seconds that are predicted.

    Plans, and None for PyTorch's operator, where there is one. Of those that are predicted to be slow the last are
    left out; there may be none.
    """
    name, steps, projected = bucket.precision, bucket.steps or tuning.MOST_STEPS, bucket.size != bucket.hidden
    # Of all calls in the bucket the one with the most rows: where its programs have room, all calls' have.
    sizes = bucket.batch, bucket.hidden, bucket.size, bucket.features, steps
    precision = "tf32" if name == "tf32" else "ieee"
    kind = bucket.directions, precision, bucket.training, cells.of(bucket.cell), bucket.zoneout
    work = Work(*sizes, DTYPES[name], *kind)
    ways = report.alternatives(gpus.of(device), work, bucket.layers)
    ours: list[tuple[Plan | None, float | None]] = [
        (way.plan, 1e-6 * way.total * steps)
        for way in ways
        if way.plan is not None
        and not (way.plan.layers > 1 and bucket.recompute)  # gates are rebuilt layer by layer
        and not (way.plan.strategy == "cooperative" and projected and bucket.drops)  # `launching.of` has why
    ]
    if bucket.drops or not work.has_operator:
        return ours[:MOST_PLANS]
    operator = next((way for way in ways if way.plan is None and way.forward is not None), None)
    return [*ours[:MOST_PLANS], (None, None if operator is None else 1e-6 * operator.total * steps)]


def _found(call: "Call", run: Run | None, bucket: Bucket) -> Result:
    """What the process doesn't know yet and, by `run`, knows from then on."""
    device = call.input.device
    odd, lacks = _untimable(call), bool(_operator_lacks(call))
    if odd:
        return _unmeasured(bucket, device, lacks, f"calls like this one were not measured yet, and {odd}")
    found = tuning.recall(device, bucket)
    if found is not None and _is_right(found.plan, bucket, device, run is not None):
        return found if run is None else tuning.remember(device, bucket, found)
    if run is None:
        return _intended(bucket, device, lacks)
    proposed = proposals(bucket, device)
    candidates = [
        Candidate(name_of(plan), plan, _again(call, run, "triton" if plan else "torch"), seconds)
        for plan, seconds in proposed
        if _is_right(plan, bucket, device, True)
    ]
    if len(candidates) < 2:
        name, plan = candidates[0][:2] if candidates else (EAGER, None)
        why = "nothing else is known to be right on this GPU" if proposed else "no kernel has room on this GPU"
        return tuning.remember(device, bucket, Result(name, plan, why))
    if not tuning.enabled():
        return tuning.remember(device, bucket, tuning.predicted(candidates))
    with _undisturbed(call):
        return tuning.tune(device, bucket, candidates, tuning.clock(device), _comparison(call, run, bucket))


def _unmeasured(bucket: Bucket, device: torch.device, lacks: bool, why: str) -> Result:
    """What runs while nothing can be tried: PyTorch, but kernels that are known to be right where its operator can't.

    lacks: whether it lacks anything.
    """
    if lacks:
        for plan, _ in proposals(bucket, device)[:1]:  # as layers choose by themselves
            if _is_right(plan, bucket, device, False):
                return Result(name_of(plan), plan, why)
    return Result(EAGER if lacks else TORCH, None, why)


def _intended(bucket: Bucket, device: torch.device, lacks: bool) -> Result:
    """What would be tried, in words."""
    names, new, proposed = [], [], proposals(bucket, device)
    if not proposed:
        return _unmeasured(bucket, device, lacks, "no kernel has room on this GPU")
    for plan, _ in proposed:
        state = qualification.PASSED if plan is None else qualification.state(*_way(plan, bucket, device))
        if state in (None, qualification.PASSED):
            names.append(name_of(plan))
        if state is None and plan is not None:
            new.append(plan.strategy)
    first = f"check the kernels of {' and '.join(dict.fromkeys(new))}, then " if new else ""
    then = f"time {' and '.join(names)}" if tuning.enabled() else "go by predicted times (LSTM_TRITON_TUNE=0)"
    return _unmeasured(bucket, device, lacks, f"not measured yet: a call would {first}{then}")


def _way(plan: Plan, bucket: Bucket, device: torch.device) -> tuple[str, str, bool, torch.device, str]:
    """What `qualification` asks about a plan."""
    strategy = "wavefront" if plan.layers > 1 else plan.strategy
    return strategy, bucket.precision, bucket.size != bucket.hidden, device, bucket.cell


def _is_right(plan: Plan | None, bucket: Bucket, device: torch.device, tries: bool) -> bool:
    """Whether a plan's kernels are right; where it isn't known, they are tried, or taken not to be."""
    if plan is None:
        return True
    way = _way(plan, bucket, device)
    return qualification.qualified(*way) if tries else qualification.state(*way) == qualification.PASSED


def _untimable(call: "Call") -> str:
    """Why nothing can be tried in a call, in words; empty if it can."""
    if call.input.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    if torch._C._are_functorch_transforms_active() or is_in_torch_dispatch_mode():
        return "a transform or a mode of PyTorch takes part in it"
    if any(type(x) not in (Tensor, Parameter) for x in (call.input, *call.hx, *call.weights)):
        return "its tensors are of a subclass"
    return ""


def _again(call: "Call", run: Run, backend: str, noise: float = 0.0) -> Callable[[], list[Tensor]]:
    """The call once more by a backend, with the steps that are timed: its output and gradients, which go nowhere.

    Without dropout between layers, for which cuDNN would set up its random numbers. `noise`: all numbers that go in are
    off by about so much of themselves.
    """
    input, batch_sizes, o = call.input, call.batch_sizes, call.options
    if batch_sizes is not None:
        batch_sizes = batch_sizes[: tuning.MOST_STEPS]
        input = input[: int(batch_sizes.sum())]
    else:
        axis = 1 if o.batch_first else 0
        input = input.narrow(axis, 0, min(input.size(axis), tuning.MOST_STEPS))
    given = (input, *call.hx, *call.weights)
    leaves = [qualification.nearby(x.detach(), noise).requires_grad_(x.requires_grad) for x in given]
    wanted = [x for x in leaves if x.requires_grad]
    device = input.device
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    # Where a backward may follow cuDNN wants to be told that it trains.
    p = (o.recurrent_dropout or 0.5) if call.drops else 0.0
    # Zoneout isn't the operator's, and other kernels in training.
    training = call.drops or (o.training if o.zones else call.save)
    options = o._replace(backend=backend, dropout=0.0, recurrent_dropout=p, training=training)

    def once() -> list[Tensor]:
        if call.drops or o.zones:  # all draw the same masks
            generator.manual_seed(0)
        x, h, c, *weights = leaves
        output = run(x, batch_sizes, (h, c), weights, options)[0]
        gradients = torch.autograd.grad(output, wanted, output.detach()) if call.save else ()
        return [output.detach(), *gradients]

    return once


def _comparison(call: "Call", run: Run, bucket: Bucket) -> Callable[[list[Tensor]], str]:
    """What says how a plan's results differ from PyTorch's: small layers have shown the strategy to be right, but by
    other tiles. Of the call's own weights and dtype, thus to ten times the tolerances and what PyTorch may round."""
    usual = "eager" if _operator_lacks(call) else "torch"
    again = _again(call, run, usual)
    name, steps = bucket.precision, bucket.steps or tuning.MOST_STEPS
    rounded = torch.finfo(DTYPES[name]).eps * steps**0.5  # sums over the steps, in the dtype itself

    def wrong(found: list[Tensor]) -> str:
        atol, rtol = (10 * tolerance + rounded for tolerance in TOLERANCES[name])
        for k, (x, expected) in enumerate(zip(found, again(), strict=True)):
            every = max(1, x.numel() // COMPARED)

            def some(t: Tensor, every: int = every) -> Tensor:
                return t.flatten()[::every].double()

            def apart(k: int = k, some: Callable[[Tensor], Tensor] = some) -> Tensor:
                return some(_again(call, run, usual, qualification.NOISE * TOLERANCES[name][0])()[k])

            x, expected = some(x), some(expected)
            error = qualification.error_of(x, expected, apart, atol, rtol) if expected.isfinite().all() else None
            if error is not None:
                what = "its output" if k == 0 else f"gradient {k}"
                return f"{what} is off by {error:.1e} of the largest element of PyTorch's"
        return ""

    return wrong


@contextmanager
def _undisturbed(call: "Call") -> Iterator[None]:
    """Within this context calls leave no trace: in random numbers, in autocast's cache, in hooks of the user's."""
    device = call.input.device
    kind, autocast = device.type, torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(kind)
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.set_grad_enabled(call.save),
        torch.autocast(kind, dtype, autocast, cache_enabled=False),
        qualification.plain_hooks(),
    ):
        yield
