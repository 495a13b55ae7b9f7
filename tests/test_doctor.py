"""`python -m lstm_triton doctor` on the CPU, and what it would say of a GPU."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lstm_triton import doctor, eager, kernels
from lstm_triton.cpu import build
from lstm_triton.gpu import kept, qualification, tuning

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU"),
    pytest.mark.skipif(kernels.INTERPRETED, reason="slow in Triton's interpreter"),
]

MACHINE = kept.Machine("Some GPU, 8 SMs", "1.2", "2.13", "3.7", "0.1", "cafe")


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "folder", lambda: tmp_path)  # compiled kernels stay where they are
    monkeypatch.setattr(qualification, "_states", {})
    monkeypatch.setattr(kept, "_said", set())


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = doctor.main(arguments)
    return status, capsys.readouterr().out


def test_says_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = said(capsys)
    assert status == 0 and out.endswith("\nall that should work here does\n")
    for expected in (
        f"torch {torch.__version__}",
        f"Python {sys.version.split()[0]}",
        "no GPU that PyTorch can use",
        build.compiler().version,
        "-O3",
        "torch: works\n",
        "eager: works\n",
        "triton: works\n",
        "auto: works, a small layer by ",
        str(build.cache_folder()),
    ):
        assert expected in out
    assert out.count("not run") == 4 * len(doctor.WAYS) and "\x1b" not in out and not list(tmp_path.iterdir())


def test_qualifies(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def check(case: Any, strategy: str, name: str, device: torch.device, cell: str) -> str | None:
        return "h_n of T=1: off by 1.0e+00" if (strategy, name) == ("step", "bf16") and not case.size else None

    monkeypatch.setattr(qualification, "check", check)
    with pytest.warns(RuntimeWarning, match="'step' in bf16 are switched off"):
        status, out = said(capsys, "--qualify")
    assert status == 1 and out.endswith("\nnot all that should work here does\n")
    assert "\n  step in bf16 failed: h_n of T=1: off by 1.0e+00\n" in out
    assert out.count(" passed") == 4 * len(doctor.WAYS) - 1
    monkeypatch.setattr(qualification, "_states", {})
    assert said(capsys)[0] == 1  # it is known from then on


def test_other_cells(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their kernels by the strategies that they have."""
    checked: set[tuple[str, str]] = set()
    monkeypatch.setattr(qualification, "check", lambda case, strategy, *rest: checked.add((strategy, rest[-1])))
    status, out = said(capsys, "--qualify", "--cells", "gru,lstm-norm")
    assert status == 0 and "kernels on cpu for gru, checked" in out and "kernels on cpu for lstm-norm, checked" in out
    of_gru = {(strategy, "gru") for strategy in ("persistent", "cooperative", "step")}
    assert checked == of_gru | {(strategy, "lstm-norm") for strategy in ("persistent", "step")}
    assert out.count(" passed") == 4 * (3 + 4)  # those with projections, too
    assert said(capsys)[1].count("not run") == 4 * len(doctor.WAYS)
    with pytest.raises(SystemExit):
        doctor.main(["--cells", "gru,grue"])
    assert "no cell is registered as 'grue'" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["values", "error"])
def test_a_backend_that_does_not_work(
    wrong: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = eager.Eager.forward

    def broken(self: eager.Eager, window: Any, output: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if wrong == "error":
            raise RuntimeError("no such thing\nat all")
        found = forward(self, window, output, *arguments, **options)
        output *= 1.001
        return found

    monkeypatch.setattr(eager.Eager, "forward", broken)
    status, out = said(capsys)
    words = {"values": "runs, but its results are not", "error": "does not work: RuntimeError: no such thing\n"}[wrong]
    assert status == 1 and f"eager: {words}" in out and "torch: works\n" in out


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lstm_triton", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


def test_without_a_compiler() -> None:
    answer = run(CC="nothing-like-this")
    assert answer.returncode == 1, answer.stderr
    assert "CC=nothing-like-this doesn't run" in answer.stdout
    assert "triton: does not work: RuntimeError: backend='triton' on a CPU needs a C compiler" in answer.stdout
    assert "auto: works" in answer.stdout and "none can run" in answer.stdout


def test_help_and_bad_arguments() -> None:
    assert "--qualify" in run("--help").stdout
    assert run("--everything").returncode == 2


# A GPU, played.


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name="Some GPU", total_memory=80 * 2**30, multi_processor_count=8, major=9, minor=0, gcnArchName=""
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(kept, "gpu_driver", lambda: "1.2.3")
    line, _ = doctor._devices([torch.device("cuda", 1)])
    assert line == "cuda:1: Some GPU, 80.0 GiB, 8 SMs, sm_90, driver 1.2.3"


def test_what_was_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "machine", lambda device: MACHINE)
    bucket = tuning.Bucket("fp16", 64, 64, 32, 1, 2, 16, 0, True, False, True, False)
    result = {"winner": "one", "plan": None, "microseconds": {"one": 41, "other": 1063}, "failed": {}}
    kept.write("tuned", MACHINE, bucket._asdict(), result)
    kept.write("tuned", MACHINE._replace(driver="1.1"), bucket._asdict(), result)
    (tmp_path / "tuned-damaged.json").write_text("// \n{")
    _, _, counts, entry = doctor._cache([torch.device("cuda", 0)])
    assert counts == "kinds of calls that were timed: 1 here, 1 elsewhere or by other versions"
    kind = "fp16, I=32 H=64 K=64 L=2 D=1 B≤16 T>256, training, dense, recurrent dropout"
    assert entry == f"{kind}: one (one 41 µs, other 1.06 ms)"


def test_the_version_of_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "version"
    path.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n")
    monkeypatch.setattr(kept, "_DRIVERS", (str(tmp_path / "none"), str(path)))
    assert kept.gpu_driver() == "535.183.01"
    path.write_text("nothing")
    assert kept.gpu_driver() == "unknown"


def test_a_machine_is_known_by_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change in a kernel makes it another one."""
    file = Path(kernels.__file__).parent / "step.py"
    read = Path.read_bytes
    first = kept._source.__wrapped__()
    assert kept._source.__wrapped__() == first
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) + b"#" * self.samefile(file))
    assert kept._source.__wrapped__() != first
