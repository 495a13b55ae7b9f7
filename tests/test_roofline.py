"""`python -m bench.roofline`: predictions, floors, published and measured figures, which never mix."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from bench import roofline, roofline_report  # noqa: E402
from bench.results import Record  # noqa: E402
from lstm_triton.gpu import gpus  # noqa: E402

COLUMNS = ("predicted_us", "published_us", "measured_us")


def result(folder: Path, device: str = "NVIDIA H100 80GB HBM3", kind: str = "cuda") -> Path:
    """What `pytest bench` leaves."""
    shape = {"batch": 16, "steps": 1000, "hidden": 768, "layers": 1, "directions": 1, "dtype": "bf16"}
    records: list[Record] = [
        {"group": "forward", "provider": "nn.LSTM", "median_s": 3e-3, **shape},
        {"group": "training step", "provider": "TritonLSTM-auto", "median_s": 7e-3, **shape},
        {"group": "training step", "provider": "loop", "median_s": 1.0, **shape},
        {"group": "forward", "provider": "nn.LSTM", "median_s": 1.0, **shape, "layers": 2},
        {"group": "inference", "provider": "nn.LSTM", "median_s": 1.0, **shape},
    ]
    folder.mkdir(parents=True)
    environment = {"device": device, "device_type": kind}
    content = {"environment": environment, "records": records, "not_measured": []}
    (folder / "benchmarks.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes of two GPUs, with a result of one."""
    home, out = tmp_path_factory.mktemp("reports"), tmp_path_factory.mktemp("out")
    result(home / "nvidia-h100")
    result(home / "amd-epyc", "AMD EPYC", "cpu")
    assert roofline.main(["--gpus", "h100,l4", "--measured", str(home), "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"roofline.csv", "roofline.md", "roofline.png", "roofline-gpus.png"}
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    return out


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return (folder / "roofline.md").read_text()


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[Record]:
    with open(folder / "roofline.csv", newline="") as file:
        found: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in found:
        row |= {name: int(row[name]) for name in ("batch", "hidden", "steps")}
        row |= {name: float(row[name]) if row[name] else None for name in COLUMNS}
    return found


def test_no_figure_is_two_things(rows: list[Record]) -> None:
    for row in rows:
        assert sum(row[name] is not None for name in COLUMNS) == 1, row
    assert {row["gpu"] for row in rows} == {"h100", "l4"}
    assert {row["hidden"] for row in rows} >= {32, 768, 4096}


def test_measured_figures_appear(rows: list[Record], text: str) -> None:
    found = [(r["what"], r["run"], r["measured_us"], r["source"]) for r in rows if r["measured_us"] is not None]
    device = "NVIDIA H100 80GB HBM3"
    assert found == [
        ("nn.LSTM (cuDNN)", "forward", 3.0, device),
        ("TritonLSTM (auto)", "training step", 7.0, device),
    ]
    assert "| nn.LSTM (cuDNN)   | h100 | bf16  |" in text and "Nothing yet" not in text


def test_published_figures_have_predictions_beside(rows: list[Record], text: str) -> None:
    found = [r for r in rows if r["published_us"] is not None]
    assert [(r["what"], r["published_us"]) for r in found if r["run"] == "forward"] == [
        ("nn.LSTM (cuDNN)", 2.0), ("FlashRNN, fused", 4.8), ("Haste", 18.0)
    ]  # fmt: skip
    assert all("arXiv 2412.07752" in r["source"] for r in found)
    assert text.count("arXiv 2412.07752") == len(found) and "predicted / published" in text
    assert "**What is called predicted was not measured**" in text


def test_floors_lie_below_cooperative_plans(rows: list[Record]) -> None:
    plans = [r for r in rows if r["what"] == "cooperative" and r["batch"] == 16]
    assert plans
    for plan in plans:
        same = [r for r in rows if all(r[k] == plan[k] for k in ("gpu", "batch", "hidden", "run", "dtype"))]
        below = [r["predicted_us"] for r in same if r["what"].startswith("floor: ")]
        assert len(below) == 4 and all(0 < us < plan["predicted_us"] for us in below), plan


def test_each_kind_has_marks_of_its_own() -> None:
    marks = [*roofline_report._STRATEGIES.values(), *roofline_report._PUBLISHED.values()]
    marks += roofline_report._MEASURED.values()
    assert len(marks) == len(set(marks))


def test_plots_are_labelled(rows: list[Record]) -> None:
    for figure in (roofline_report.draw(rows, "h100"), roofline_report.draw_gpus(rows, ["h100", "l4"])):
        left, right = figure.axes
        assert left.get_ylabel() == "µs a time step" and left.get_xlabel() == right.get_xlabel() == "hidden size H"
        assert (left.get_title(), right.get_title()) == ("forward", "training step")
        assert "Predicted" in figure.get_suptitle()
    labels = labels_of(roofline_report.draw(rows, "h100"))
    assert "measured: nn.LSTM" in labels and "published: Haste, fp32, B = 16" in labels
    assert not any(label.startswith("measured") for label in labels_of(roofline_report.draw(rows, "l4")))


def labels_of(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_folders_without_results_are_passed_over(tmp_path: Path) -> None:
    result(tmp_path / "cpu", "AMD EPYC", "cpu")
    result(tmp_path / "other", "NVIDIA Something")
    (tmp_path / "empty").mkdir()
    assert roofline.measured(sorted(tmp_path.iterdir())) == []
    (tmp_path / "empty" / "benchmarks.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a result of"):
        roofline.measured([tmp_path / "empty"])


def test_unknown_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        roofline.main(["--gpus", "h100,h9", "--out", str(tmp_path)])
    assert ended.value.code == 2 and f"gpu should be one of {', '.join(gpus.GPUS)}, got 'h9'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
