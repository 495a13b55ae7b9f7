"""`python -m bench.ragged`: what it calls, checks and writes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import ragged, ragged_report
from lstm_triton import convert

CPU = torch.device("cpu")
SMALL = ragged.Rows(3, 4, 5, "uniform", 6)


@pytest.fixture(scope="module")
def content() -> dict:
    cases = [SMALL, replace(SMALL, kind="log-normal")]
    return ragged.run(cases, CPU, 1, 0, 2, False)


def test_lengths() -> None:
    """Unsorted, the same each time, one row the longest."""
    for rows in (*ragged.CASES, ragged.ONE_LONG):
        lengths = rows.lengths()
        assert torch.equal(lengths, rows.lengths()) and lengths.shape == (rows.batch,)
        assert lengths.max() == rows.longest and lengths.min() >= 1
        assert not torch.equal(lengths, lengths.sort(descending=True)[0])
        if rows.kind == "uniform":
            assert lengths.min() >= rows.longest // 2
        if rows.kind == "log-normal":
            assert 5 <= lengths.float().median() <= 20


@pytest.mark.parametrize("group", ragged.GROUPS)
def test_forms_are_the_same_rows(group: str) -> None:
    """Packed, padded with lengths, and padded, where no output past a row's end has a gradient."""
    reference = nn.LSTM(4, 5)
    packed = ragged.Call(reference, SMALL, "packed", group).results()
    lengths = ragged.Call(convert(reference), SMALL, "lengths", group).results()
    padded = ragged.Call(reference, SMALL, "padded", group).results()
    assert len(packed) == (6 if group == "training step" else 1)
    for a, b, c in zip(packed, lengths, padded, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    results = ragged.Call.results
    wrong = lambda self: [x + (self.form == "lengths") for x in results(self)]  # noqa: E731
    monkeypatch.setattr(ragged.Call, "results", wrong)
    content = ragged.run([SMALL], CPU, 1, 0, 2, False)
    assert not content["records"] and len(content["not_measured"]) == 2


def test_records(content: dict) -> None:
    assert not content["not_measured"] and len(content["records"]) == 4
    for r in content["records"]:
        assert r["rounds"] >= 2 and r["ratio"] > 0 and r["error"] < 1e-4
        assert r["chosen"] in ("torch", "eager", "triton") and f"backend: {r['chosen']} " in r["explained"]
        assert r["rows"] < r["padded_rows"]


def test_report(content: dict, tmp_path: Path) -> None:
    content = json.loads(json.dumps(content)) | {
        "memory": {k: {"peak_bytes": n, "peak_kind": "resident"} for k, n in (("ours", 10), ("padded", 4))}
    }
    (tmp_path / ragged_report.JSON).write_text(json.dumps(content))
    assert ragged.main(["--draw", "--out", str(tmp_path)]) == 0
    text = (tmp_path / ragged_report.TEXT).read_text()
    assert str(SMALL) in text and "aim: at most 2: missed" in text and "How the training steps ran" in text
    assert (tmp_path / ragged_report.PLOT).stat().st_size > 10_000


def test_aims(content: dict) -> None:
    """Each of them belongs to a case, which says whether it is reached."""
    records = [
        {**content["records"][0], **vars(rows), "group": group} for rows in ragged.CASES for group in ragged.GROUPS
    ]
    wanted = [ragged_report.aim(r) for r in records]
    assert [x for x in wanted if x is not None] == [1.3] * 3 + [20, 2, 20, 2, 40, 2] + [1] * 6
    for ratio, word in ((1e9, "reached"), (1e-9, "missed")):
        done = [r | {"ratio": ratio, "of_padded": 1 / ratio} for r in records]
        text = ragged_report.cases(done)
        other = {"reached", "missed"} - {word}
        assert word in text and not any(w in text for w in other)


def test_memory_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ragged, "ONE_LONG", replace(SMALL, kind="one", longest=50))
    for name in ("ours", "padded"):
        assert ragged.main(["--memory", name, "--device", "cpu"]) == 0
        assert json.loads(capsys.readouterr().out)["peak_bytes"] >= 0


@pytest.mark.parametrize(
    "arguments", [["--only", "B1"], ["--seconds", "-1"], ["--threads", "999"], ["--device", "tpu"]], ids=str
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ragged.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_nothing_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ragged.main(["--draw", "--out", str(tmp_path)]) == 1
    assert "python -m bench.ragged" in capsys.readouterr().err
