"""The benchmarks' own machinery: shapes, checks, memory, reports and the plan of a run on a GPU."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import gpu, measure, memory, providers, report, shapes, tables
from bench.environment import slug
from bench.measure import Call
from bench.results import CSV, PART, Results
from bench.shapes import Shape
from lstm_triton import dispatch

ROOT = Path(__file__).resolve().parents[1]
SMALL = Shape(2, 3, 8)


# Shapes


@pytest.mark.parametrize("text", ["B1-T20-H32", "B32-T200-H128-L2", "B4-T1-H7-D2-fp16", "B2-T3-H8-L3-D2-bf16"])
def test_shape_reads_its_own_name(text):
    assert str(Shape.parse(text)) == text


def test_shape_fields():
    assert Shape.parse("bf16-H128-T200-B32-L2-D2") == Shape(32, 200, 128, 2, 2, "bf16")
    assert Shape.parse(" B1-T2-H3 ").torch_dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("B32-T200", "lacks H"),
        ("B1-T2-H3-H4", "gives hidden twice"),
        ("B0-T2-H3", "at least 1"),
        ("B1-T2-H3-D3", "directions should be 1 or 2"),
        ("B1-T2-H3-int8", "one of fp32"),
        ("tiny", "lacks B, T, H"),
        ("", "no shape"),
    ],
)
def test_bad_shapes_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        shapes.choose(text)


def test_choosing_shapes():
    assert shapes.for_run(None, timed=True) is shapes.SETS["small"]
    assert shapes.for_run(None, timed=False) is shapes.SETS["smoke"]
    chosen = shapes.for_run("B4-T5-H6,B2-T5-H6", timed=True)
    assert chosen.speed == [Shape(4, 5, 6), Shape(2, 5, 6)]
    assert chosen.inference == [Shape(1, 5, 6)]


@pytest.mark.parametrize("name", ["small", "gpu", "full"])
def test_sets_have_what_the_report_compares(name):
    chosen = shapes.SETS[name]
    assert {(s.batch, s.steps, s.hidden) for s in chosen.auto} == {
        (b, t, h) for b in (1, 32) for t in (20, 200) for h in (32, 128, 512)
    }
    assert all(s.batch == 1 for s in chosen.inference)
    assert len({s.hidden for s in chosen.speed}) > 2 and len({s.steps for s in chosen.speed}) > 2


# Calls and their check


@pytest.mark.parametrize("group", measure.GROUPS)
@pytest.mark.parametrize("shape", [SMALL, Shape(2, 3, 8, 2, 2), Shape(3, 2, 5, dtype="bf16")], ids=str)
def test_every_provider_passes_the_check(shape, group, device):
    for provider in providers.available(device):
        Call(provider, shape, group, device).check()


def test_interpreted_kernels_are_never_timed(monkeypatch):
    native = dispatch.has_native()
    assert ("TritonLSTM-triton" in providers.available(torch.device("cpu"))) == native
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    dispatch.has_native.cache_clear()
    try:
        assert "TritonLSTM-triton" not in providers.available(torch.device("cpu"))
    finally:
        dispatch.has_native.cache_clear()


@pytest.mark.parametrize("group", measure.GROUPS)
def test_check_catches_a_wrong_output(group, device):
    call = Call(providers.LOOP, SMALL, group, device)
    with torch.no_grad():
        call.module.cells[0].bias_hh[3] += 0.01
    with pytest.raises(AssertionError, match="B2-T3-H8: output differs from nn.LSTM's"):
        call.check()


def test_check_catches_a_wrong_gradient(device):
    call = Call(providers.REFERENCE, SMALL, "training step", device)
    call.module.weight_hh_l0.register_hook(lambda gradient: 1.001 * gradient)
    with pytest.raises(AssertionError, match="gradient of parameter 1 differs"):
        call.check()


def test_check_catches_a_missing_gradient(device):
    call = Call(providers.AUTO, SMALL, "training step", device)
    call.module.bias_ih_l0.requires_grad_(False)
    with pytest.raises(AssertionError, match="without a gradient"):
        call.check()


def test_each_round_begins_without_gradients(device):
    call = Call(providers.REFERENCE, SMALL, "training step", device)
    call()
    call.clear()
    assert all(x.grad is None for x in (call.input, *call.module.parameters()))


def test_interleaving_measures_as_many_of_each(device):
    a, b = (Call(name, SMALL, "forward", device) for name in (providers.REFERENCE, providers.AUTO))
    times = measure.interleave(a, b, 4)
    assert [len(t) for t in times] == [4, 4] and min(map(min, times)) > 0
    assert measure.median_ratio([1.0, 2.0, 4.0], [2.0, 3.0, 4.0]) == 1.5


# Memory


def test_saved_bytes_counts_each_storage_once():
    x = torch.randn(8, 16, requires_grad=True)

    def forward() -> Tensor:
        y = x.exp()  # saves its own result
        return (y * y[:, :3].sum()).sum()  # saves y again, and a number

    assert memory.saved_bytes(forward, [x]) == 8 * 16 * 4 + 4


def test_saved_bytes_leaves_out_inputs_and_outputs():
    x = torch.randn(8, 16, requires_grad=True)
    assert memory.saved_bytes(x.exp, [x]) == 0
    assert memory.saved_bytes(lambda: (x * x,), [x]) == 0
    assert memory.saved_bytes(lambda: x.exp().sum(), [x]) == 8 * 16 * 4


def test_saved_bytes_sees_what_a_custom_operator_saves(device):
    shape = Shape(4, 5, 8)
    call = Call("TritonLSTM-eager", shape, "training step", device)
    states = 4 * 8 * 4  # the zeros that the module starts from are one tensor
    assert memory.kept_for_backward(call) == 5 * 4 * (4 + 1) * 8 * 4 + states


def test_peak_of_a_training_step(device):
    shape = Shape(32, 100, 64)
    peak, kind = memory.peak_bytes(providers.LOOP, shape, device)
    assert kind == ("allocated" if device.type == "cuda" else "resident")
    assert 3 * 32 * 100 * 64 * 4 < peak < 2**28


# Reports


@pytest.fixture
def folder(tmp_path) -> Path:
    """A result with made-up numbers, where the eager backend takes twice as long as nn.LSTM."""
    environment = {"device": "Some CPU", "device_type": "cpu", "torch": "2.13.0", "gpu": None}
    results = Results(environment)
    names = (providers.REFERENCE, "TritonLSTM-auto", "TritonLSTM-eager")

    def add(group: str, shape: Shape, provider: str, **values: object) -> None:
        label = providers.label(provider, "cpu")
        record = {"group": group, "provider": provider, "label": label, "shape": str(shape), **vars(shape)}
        results.records.append(record | values)

    for shape in (Shape(32, t, h) for t, h in ((20, 32), (20, 128), (200, 128))):
        for k, name in enumerate(names):
            for group in ("forward", "training step"):
                add(group, shape, name, median_s=1e-6 * shape.steps * max(k, 1), rounds=5)
    add("inference", Shape(1, 20, 32), names[0], median_s=1e-3, rounds=5)
    for k, name in enumerate(names):
        add("memory", Shape(32, 200, 128), name, kept_bytes=2**20 * (k + 1), kept_hidden_vectors=k + 1.5,
            peak_bytes=3 * 2**20, peak_kind="resident", median_s=1.0)  # fmt: skip
    add("auto", Shape(1, 20, 32), "TritonLSTM-auto", step="forward", pairs=9, ratio=1.017,
        auto_median_s=2e-3, reference_median_s=1.9e-3, median_s=1.0)  # fmt: skip
    results.not_measured.append({"name": "test_speed[x]", "outcome": "skipped", "why": "no time | left"})
    results.write(tmp_path)
    return tmp_path


def test_report_is_drawn_from_the_file(folder, capsys):
    for name in ("README.md", CSV):
        (folder / name).unlink(missing_ok=True)
    assert report.main([str(folder)]) == 0
    assert "README.md" in capsys.readouterr().out
    for name in ("throughput-hidden", "throughput-steps", "speedup", "memory"):
        content = (folder / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000
    text = (folder / "README.md").read_text()
    for part in ("# Benchmarks on Some CPU", "0.04 (0.50×)", "1.017", "nn.LSTM (oneDNN)", "no time \\| left", "y.png"):
        assert part in text
    with open(folder / CSV) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(Results.read(folder).records)
    times = [float(row["median_s"]) for row in rows if row["group"] == "forward" and row["steps"] == "200"]
    assert times == pytest.approx([2e-4, 2e-4, 4e-4])


def test_report_of_a_run_that_was_killed(folder):
    results = Results.read(folder)
    results.records = results.group("memory")
    results.write(folder, finished=False)
    (folder / "speedup.png").touch()
    report.draw(folder)
    assert not (folder / PART).exists() and not (folder / "speedup.png").exists()
    assert "## Forward" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("content", [None, "[]", "{}", "{"])
def test_report_without_a_result(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / "benchmarks.json").write_text(content)
    assert report.main([str(tmp_path)]) == 1
    assert "benchmarks.json" in capsys.readouterr().err


def test_table():
    assert tables.table(("a", "bb"), [("xyz", 1)]) == "| a   | bb |\n| --- | -: |\n| xyz |  1 |"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100"),
        ("NVIDIA A100-SXM4-40GB", "nvidia-a100"),
        ("AMD EPYC 9B14 96-Core Processor", "amd-epyc-9b14"),
        ("Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz", "intel-xeon-platinum-8488c"),
        ("", "unknown"),
    ],
)
def test_slug(name, expected):
    assert slug(name) == expected


def test_a_run_writes_its_report(tmp_path):
    # As by itself, not as a part of a run in several processes, in which benchmarks are off.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [
        sys.executable, "-m", "pytest", "bench/test_speed.py", "-q", "-p", "no:cacheprovider",
        "--benchmark-only", "--shapes", "B2-T3-H8", "--report-dir", str(tmp_path), "-k", "nn.LSTM",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    results = Results.read(tmp_path)
    assert {r["group"] for r in results.records} == {"forward", "training step", "inference"}
    assert all(r["median_s"] > 0 and r["machine"] == results.environment["device"] for r in results.records)
    assert results.environment["command"].startswith("pytest bench/test_speed.py")
    assert not results.not_measured
    assert "2-T3-H8" in (tmp_path / "README.md").read_text()


# A run on a GPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_run_without_a_gpu(capsys):
    assert gpu.main([]) == 2
    out = capsys.readouterr().out
    assert "No GPU" in out and "pip install" in out


def stage(name: str, share: float, failed: bool = False, needs: tuple[str, ...] = ()) -> gpu.Stage:
    return gpu.Stage(name, share, needs, lambda seconds: [name], lambda: (f"{name} found", failed))


def test_gpu_stages(tmp_path):
    stages = gpu.plan(tmp_path, "gpu", tmp_path)
    names = ["tests", "kernels checked", "benchmarks", "long sequences", "ragged batches", "reports"]
    assert [s.name for s in stages] == names
    assert sum(s.share for s in stages) == pytest.approx(1)
    assert stages[1].command(100.0)[1:] == ["-m", "lstm_triton", "doctor", "--qualify"]
    del stages[1]
    command = stages[1].command(100.0)
    assert "--benchmark-only" in command and "--time-limit=70" in command and f"--report-dir={tmp_path}" in command
    for stage, module in zip(stages[2:4], ("bench.long", "bench.ragged"), strict=True):
        command = stage.command(100.0)
        assert command[1:3] == ["-m", module] and {"--device=cuda", f"--out={tmp_path}", "--seconds=0.5"} <= {*command}
    assert "--time-limit=70" in stages[2].command(100.0)
    assert [stage.found() for stage in stages[:4]] == [("no result", True)] * 4


def test_gpu_stages_get_the_time_that_others_leave():
    given = []
    outcomes = gpu.run([stage("a", 0.5), stage("b", 0.5)], 100, lambda command, s: given.append(s) or "passed")
    assert given == pytest.approx([50, 100], abs=1)
    assert [o.status for o in outcomes] == ["passed", "passed"]


def test_gpu_stages_without_time_or_packages_are_said():
    def execute(command: list[str], seconds: float) -> str:
        time.sleep(0.5 if command == ["a"] else 0)
        return "cut off"

    stages = [stage("a", 0.4), stage("b", 0.1), stage("c", 0.5, failed=True), stage("d", 0, needs=("no_such_package",))]
    outcomes = gpu.run(stages, 1.0, execute)
    assert [o.status for o in outcomes] == ["cut off", "skipped", "failed", "failed"]
    text = gpu.summary(outcomes)
    assert "no time left" in text and "no_such_package" in text and "c found" in text


@pytest.mark.parametrize(
    ("code", "seconds", "grace", "status"),
    [
        ("pass", 60, 1, "passed"),
        ("raise SystemExit(1)", 60, 1, "failed"),
        ("import time; time.sleep(600)", 62, 60, "cut off"),  # a busy machine's Python may take long to answer
        ("import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)", 8, 2, "failed"),
    ],
)
def test_gpu_process_is_stopped_in_time(code, seconds, grace, status):
    start = time.monotonic()
    assert gpu.run_process([sys.executable, "-c", code], seconds, grace) == status
    assert time.monotonic() - start < 300  # of the 600


def test_gpu_results_in_words(folder, tmp_path):
    detail, failed = gpu.benchmarks_found(folder)
    assert detail.startswith("23 measured, 0 failed, 1 skipped") and "TritonLSTM (eager) 0.50×" in detail and not failed
    junit = tmp_path / "tests.xml"
    junit.write_text('<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"/></testsuites>')
    assert gpu.tests_found(junit) == ("5 passed, 2 failed, 2 skipped", True)


def test_gpu_results_of_an_earlier_run_are_not_this_ones(tmp_path):
    path, start = tmp_path / "long.json", time.time()
    outcomes = [{"name": "a", "outcome": "skipped", "why": ""}, {"name": "b", "why": "differs"}]
    path.write_text(json.dumps({"records": [{}, {}], "not_measured": outcomes}))
    assert gpu.records_found(path, start - 9) == ("2 measured, 1 failed, 1 skipped", True)
    assert gpu.records_found(path, start + 9) == ("no result", True)
    path.write_text(json.dumps({"records": [{}], "not_measured": outcomes[:1]}))
    assert gpu.records_found(path, start - 9) == ("1 measured, 0 failed, 1 skipped", False)
    path.write_text("{")
    assert gpu.records_found(path, start - 9) == ("no result", True)
