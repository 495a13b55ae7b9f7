"""`gpu.machine_code` and `python -m bench.audit`: kernels as machine code for GPUs that need not be there."""

import csv
import dataclasses
import os
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from bench import audit, audit_cases, audit_report
from lstm_triton import TritonLSTM, cells, dispatch, launching
from lstm_triton.gpu import gpus
from lstm_triton.planning import Plan

pytest.importorskip("triton")
if dispatch.interpreting():
    pytest.skip("there is nothing to compile in Triton's interpreter", allow_module_level=True)

import triton
import triton.language as tl

from lstm_triton.gpu import machine_code
from lstm_triton.kernels import launch

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
STRATEGIES = {
    "persistent": Plan("persistent", 16, 32, 32, 4),
    "cooperative": Plan("cooperative", 16, 16, 32, 4),
    "step": Plan("step", 16, 32, 32, 4, num_stages=2),
}


# Kernels that are wrong on purpose


@triton.jit(do_not_specialize=["T"])
def weights_kernel(x_ptr, w_hh_ptr, y_ptr, T, SIZE: tl.constexpr, LOADED: tl.constexpr):
    """h = h @ w in each of T steps, with w loaded in some place."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    h = tl.load(x_ptr + at)
    w_at = w_hh_ptr + at
    w = tl.load(w_at)
    later = w_at
    if LOADED == "in a while loop":
        t = 0
        while t < T:
            h = tl.dot(h, tl.load(later)).to(h.dtype)
            later += SIZE
            t += 1
    for t in range(T):
        if LOADED == "in the loop":
            w = tl.load(w_at + t)
        elif LOADED == "by a carried pointer":
            later += SIZE
            w = tl.load(later)
        elif LOADED == "by a chosen pointer":
            chosen = x_ptr + at if t % 2 == 0 else w_at
            w = tl.load(chosen + t)
        elif LOADED == "in a loop in the loop":
            for k in range(0, SIZE * T, SIZE):
                w += tl.load(w_at + k + t)
        h = tl.dot(h, w).to(h.dtype)
        tl.store(y_ptr + t * SIZE * SIZE + at, h)
    tl.store(y_ptr + at, h)


@triton.jit(do_not_specialize=["T"])
def elementwise_kernel(x_ptr, w_hh_ptr, y_ptr, T, SIZE: tl.constexpr, ATOMIC: tl.constexpr):
    """h = h * w in each of T steps: no tensor core does that, and few registers hold it."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    h = tl.load(x_ptr + at)
    w = tl.load(w_hh_ptr + at)
    for _ in range(T):
        h = h * w + tl.trans(h)
    if ATOMIC:
        tl.atomic_add(y_ptr + at, h)
    else:
        tl.store(y_ptr + at, h)


def used_by(kernel: Any, target: str, dtype: torch.dtype = torch.float16, **constants: Any) -> machine_code.Usage:
    tensors = [torch.empty(2**16, dtype=dtype, device="meta") for _ in range(3)]
    constants = {"num_warps": 4, "num_stages": 1} | constants
    return machine_code.usage(machine_code.Call(kernel, (1, 1, 1), [*tensors, 7], constants, target))


def record(used: machine_code.Usage | None = None, **changes: Any) -> dict[str, Any]:
    """One of the audit; without changes one in which all is well."""
    good = machine_code.Usage(4, 100, 0, 0, 0, 30_000, 8, 0, 2048, 0)
    found = {"dtype": "fp16", "strategy": "persistent", "own": True, "cooperative": False, "programs": 4}
    found |= {"shared_limit": 101_376, "shared_computed": 101_376, "programs_per_sm": 2, "sms": 72}
    return found | dataclasses.asdict(used or good) | changes


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize(
    "loaded",
    ["in the loop", "by a carried pointer", "by a chosen pointer", "in a loop in the loop", "in a while loop"],
)
def test_weights_loaded_in_the_time_loop_are_found(loaded: str, stages: int, target: str) -> None:
    used = used_by(weights_kernel, target, SIZE=32, LOADED=loaded, num_stages=stages)
    assert used.weight_bytes_in_loops == 32 * 32 * 2 or (stages > 1 and used.weight_bytes_in_loops > 0)
    assert any("weights in the time loop" in why for why in audit.violations(record(used)))


@pytest.mark.parametrize("target", TARGETS)
def test_weights_loaded_before_the_time_loop_are_no_violation(target: str) -> None:
    used = used_by(weights_kernel, target, SIZE=32, LOADED="before")
    assert (used.weight_bytes, used.weight_bytes_in_loops) == (32 * 32 * 2, 0)
    assert used.tensor_core_ops > 0 and used.shared_bytes > 0 and used.registers > 16
    assert audit.violations(record(used)) == []


@pytest.mark.parametrize("target", TARGETS)
def test_spills_are_found(target: str) -> None:
    size = 128 if target.startswith("gfx") else 64  # of 512 and 255 registers
    used = used_by(elementwise_kernel, target, torch.float32, SIZE=size, ATOMIC=False, num_warps=1)
    assert used.spills >= used.spills_in_loops > 0 and used.spill_bytes > 0
    assert any("spills" in why for why in audit.violations(record(used)))
    roomy = used_by(elementwise_kernel, target, torch.float32, SIZE=32, ATOMIC=False)
    assert (roomy.spills, roomy.spill_bytes) == (0, 0)


@pytest.mark.parametrize("target", TARGETS)
def test_products_without_tensor_cores_are_found(target: str) -> None:
    used = used_by(elementwise_kernel, target, SIZE=32, ATOMIC=False)
    assert audit.violations(record(used)) == ["has no tensor-core instructions"]
    assert audit.violations(record(used, dtype="fp32")) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("target", TARGETS)
def test_float_atomics_are_found(target: str, dtype: torch.dtype) -> None:
    used = used_by(elementwise_kernel, target, dtype, SIZE=16, ATOMIC=True)
    assert used.float_atomics == 1
    assert any("atomic" in why for why in audit.violations(record(used)))


def test_shared_memory_beyond_the_limit_is_found() -> None:
    used = used_by(weights_kernel, "sm_86", SIZE=256, LOADED="before", num_warps=8)
    limit = gpus.named("a10").limits.shared_per_program
    assert used.shared_bytes > limit
    assert any("shared memory" in why for why in audit.violations(record(used, shared_limit=limit)))
    more = record(shared_computed=29_999)
    assert audit.violations(more) == ["needs 30000 bytes of shared memory, the plan has 29999"]
    assert audit.violations(more | {"own": False}) == []


def test_programs_that_wait_fit_on_the_gpu() -> None:
    assert audit.violations(record(cooperative=True, programs=144)) == []
    assert len(audit.violations(record(cooperative=True, programs=145))) == 1
    assert audit.violations(record(cooperative=False, programs=145)) == []


def test_a_launch_each_step_may_load_weights_in_its_loop() -> None:
    assert audit.violations(record(strategy="step", weight_bytes_in_loops=64)) == []
    assert len(audit.violations(record(strategy="cooperative", weight_bytes_in_loops=64))) == 1


# What is compiled is what is launched


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What launches are given from now on."""
    found: list[tuple[Any, ...]] = []
    start = launch.start

    def spy(kernel: Any, grid: Any, args: list[Any], shared: dict[str, Any], **own: Any) -> None:
        found.append(described(kernel, grid, args, shared | own))
        start(kernel, grid, args, shared, **own)

    for name, module in list(sys.modules.items()):
        if name.startswith("lstm_triton.kernels") and getattr(module, "start", None) is start:
            monkeypatch.setattr(module, "start", spy)
    return found


def described(kernel: Any, grid: Any, args: list[Any], constants: dict[str, Any]) -> tuple[Any, ...]:
    kinds = tuple(str(a.dtype) if isinstance(a, torch.Tensor) else type(a).__name__ for a in args)
    return kernel.__module__, kernel.__name__, grid, kinds, tuple(constants.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="precisions are those of a CPU here")
@pytest.mark.parametrize("form", ["", "D2", "ragged", "dropout", "projection"])
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_calls_are_those_of_a_launch(strategy: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = STRATEGIES[strategy]
    if form == "projection":
        plan = dataclasses.replace(plan, block_k=16)
    monkeypatch.setattr(launching, "of", lambda layer: plan)
    launched = spied(monkeypatch)
    case = audit_cases.Case("forward", 3, 32, "fp32", form)
    layer = case.layer()
    lstm = TritonLSTM(
        32, 32, proj_size=16 if form == "projection" else 0, bidirectional=form == "D2", backend="triton",
        **{"recurrent_dropout": 0.25} if form == "dropout" else {},
    )  # fmt: skip
    x: Any = torch.randn(audit_cases.STEPS, 3, 32)
    if form == "ragged":
        x = torch.nn.utils.rnn.PackedSequence(torch.randn(layer.input.shape), audit_cases.batch_sizes(3))
    output = lstm(x)[0]
    (output.data if form == "ragged" else output).sum().backward()
    seen = set(launched)
    assert len(seen) > 1
    listed = [c for run in ("forward", "backward") for c in machine_code.calls(plan, layer, run, "sm_90")]
    assert {described(c.kernel, c.grid, c.args, c.constants) for c in listed} == seen
    for call in listed:
        assert call.times == launched.count(described(call.kernel, call.grid, call.args, call.constants))


@pytest.mark.parametrize("run", ["forward", "backward"])
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_strategies_own_the_kernels_that_multiply_with_weights(strategy: str, run: str) -> None:
    listed = machine_code.calls(STRATEGIES[strategy], audit_cases.CASES[0].layer(), run, "sm_90")
    for call in listed:
        assert call.is_own == bool(machine_code.usage(call).weight_bytes), call.kernel
    assert any(call.is_own for call in listed)


def test_other_layers_run_while_calls_are_listed() -> None:
    lstm = TritonLSTM(8, 8, backend="triton")
    x = torch.randn(3, 2, 8)
    wanted = lstm(x)[0]
    with machine_code._recorded("sm_90", "ieee") as found:
        assert torch.equal(lstm(x)[0], wanted)
    assert found == []


def test_layers_with_memory_are_refused() -> None:
    layer = audit_cases.CASES[0].layer()._replace(input=torch.zeros(2, 32))
    with pytest.raises(ValueError, match="meta"):
        machine_code.calls(STRATEGIES["step"], layer, "forward", "sm_90")
    with pytest.raises(ValueError, match="inference, forward, backward, rebuild, drop"):
        machine_code.calls(STRATEGIES["step"], audit_cases.CASES[0].layer(), "training", "sm_90")


def test_calls_of_cells_are_those_of_their_functions() -> None:
    """Of the case's cell, zoneout and strategy, where it has room."""
    h100 = gpus.named("h100")
    for cell, strategy in (("gru", "step"), ("rnn-tanh", "persistent"), ("lstm-coupled", "cooperative")):
        case = audit_cases.Case("backward", 3, 32, "fp16", "", cell, strategy)
        plan = audit_cases.plan_of(case, h100)
        assert plan.strategy == strategy and str(case).endswith(f"fp16-{cell}-{strategy}")
        listed = machine_code.calls(plan, case.layer(), case.run, "sm_90")
        own = [call for call in listed if call.is_own]
        assert own and all(call.constants["CELL"] is cells.of(cell).backward for call in own)
        assert all(call.constants["ZONEOUT"] == "none" for call in own)
    zoned = audit_cases.Case("forward", 3, 32, "fp16", "zoneout")
    listed = machine_code.calls(audit_cases.plan_of(zoned, h100), zoned.layer(), zoned.run, "sm_90")
    assert {call.constants["ZONEOUT"] for call in listed} == {"drawn"}
    large = audit_cases.Case("forward", 32, 2048, "fp16", "", "gru", "persistent")
    assert audit_cases.plan_of(large, h100).strategy != "persistent"


# The command


def test_all_targets_have_all_cases() -> None:
    jobs = audit_cases.jobs_of(audit_cases.GPUS)
    of_cells = audit_cases.jobs_of(audit_cases.GPUS, cells=True)
    assert {job for job in jobs if job[0].of_cells} == set(of_cells) and len(of_cells) >= 40
    assert len(set(audit_cases.CASES)) == len(audit_cases.CASES) >= 40
    assert len({str(case) for case in audit_cases.CASES}) == len(audit_cases.CASES)
    targets = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942"}
    assert {(str(case), gpu.target) for case, gpu in jobs} == {(str(c), t) for c in audit_cases.CASES for t in targets}


def test_sample_has_something_of_everything() -> None:
    jobs = audit_cases.jobs_of(audit_cases.GPUS, sample=True)
    assert {gpu.name for _, gpu in jobs} == set(audit_cases.GPUS)
    for field in ("run", "dtype", "form", "batch", "cell"):
        assert {getattr(case, field) for case, _ in jobs} == {getattr(case, field) for case in audit_cases.CASES}
    every = {audit_cases.plan_of(case, gpu).strategy for case, gpu in audit_cases.jobs_of(audit_cases.GPUS)}
    assert {audit_cases.plan_of(case, gpu).strategy for case, gpu in jobs} == every


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Any]:
    folder = tmp_path_factory.mktemp("audit")
    done = subprocess.run(
        [sys.executable, "-m", "bench.audit", "--sample", "--out", str(folder)],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    return done, folder


def test_kernels_of_the_sample_keep_to_the_rules(sampled: Any) -> None:
    done, folder = sampled
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader((folder / "audit.csv").read_text().splitlines()))
    assert {(r["case"], r["gpu"]) for r in rows} == {
        (str(case), gpu.name) for case, gpu in audit_cases.jobs_of(audit_cases.GPUS, sample=True)
    }
    assert not [r for r in rows if r["violations"]]
    assert all(int(r["registers"]) > 0 for r in rows)


def test_the_report_says_that_nothing_ran(sampled: Any) -> None:
    text = (sampled[1] / "README.md").read_text()
    assert "Compiled for these GPUs, not run on them" in text
    assert triton.__version__ in text and "--sample" in text and "cases on 8 targets" in text
    assert (sampled[1] / "audit.png").stat().st_size > 10_000


@pytest.mark.parametrize("broken", [False, True])
def test_exit_status_says_whether_a_rule_is_broken(broken: bool, monkeypatch: Any, capsys: Any) -> None:
    case, gpu = audit_cases.CASES[0], gpus.named("a100")
    found = audit._named(case, gpu) | {"kernel": "forward_kernel", "violations": ["spills a lot"] * broken}
    monkeypatch.setattr(audit, "run", lambda *_: [found])
    assert audit.main(["--targets", "sm_80"]) == int(broken)
    assert (f"sm_80 {case}: forward_kernel spills a lot" in capsys.readouterr().out) == broken


@pytest.mark.parametrize("options", ["--targets sm_75", "--only nothing-like-it", "--jobs 0", "--time-limit 0"])
def test_options_that_make_no_sense_are_refused(options: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        audit.main(options.split())
    assert stopped.value.code == 2


def test_a_case_that_takes_too_long_or_does_not_compile_is_a_violation(monkeypatch: Any) -> None:
    jobs = audit_cases.jobs_of(["a100"])[:2]
    monkeypatch.setattr(audit, "audit", time.sleep)  # takes a number, which a case isn't
    (first,), (second,) = (audit.run([job], 1, 60.0) for job in jobs)
    assert first["case"] == str(jobs[0][0]) and "does not compile" in first["violations"][0]
    assert audit_report.broken([first, second])[1][:2] == (str(jobs[1][0]), "sm_80")


def test_why_a_kernel_does_not_compile_is_in_its_violation(monkeypatch: Any) -> None:
    monkeypatch.setattr(audit, "precision_of", lambda *_: "tf32")  # which gfx90a hasn't
    case = audit_cases.Case("forward", 32, 32, "fp16")
    (found,) = audit.audit(case, gpus.named("mi250x"))
    assert "does not compile: input_precision must be one of" in found["violations"][0]


def test_a_worker_that_hangs_or_dies_is_replaced() -> None:
    worker = audit._Worker()
    assert worker.call(abs, (-3,), 60.0) == 3
    first = worker.process.pid
    with pytest.raises(TimeoutError, match="0.2 seconds"):
        worker.call(time.sleep, (60,), 0.2)
    assert worker.call(abs, (-4,), 60.0) == 4 and worker.process.pid != first
    with pytest.raises(RuntimeError, match="crashed"):
        worker.call(os._exit, (1,), 60.0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        worker.call(divmod, (1, 0), 60.0)
    worker._end()
