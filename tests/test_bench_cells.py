"""`python -m bench.cells`: what it compares, measures and writes."""

import json
from pathlib import Path

import pytest
import torch

from bench import cell_loops, cells, cells_report
from lstm_triton import TritonGRU, TritonLSTM


@pytest.mark.parametrize("entry", cells.ENTRIES, ids=lambda entry: entry.name)
def test_all_ways_of_a_cell_agree(entry: cells.Entry) -> None:
    found = {name: call.values() for name, call in cells.ways(entry, 3, 5, 7).items()}
    assert {"loop", "auto", "eager"} <= found.keys()
    assert ("torch" in found) == (entry.name in ("LSTM", "GRU", "RNN, tanh", "RNN, relu"))
    for tensors in found.values():
        for a, b in zip(tensors, found["loop"], strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm()


def test_a_wrong_way_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that computes something else isn't compared."""
    entry = next(e for e in cells.ENTRIES if e.name == "LSTM")
    wrong = entry._replace(step=lambda *a: tuple(1.01 * x for x in cell_loops.lstm(*a)))
    with pytest.raises(AssertionError, match="LSTM, auto, tensor 0"):
        cells.measure(wrong, 1, 0.0, 1, (2, 3, 4))


def test_weight_dropout_of_the_loop_is_drawn_once_a_call() -> None:
    module = TritonLSTM(4, 8, weight_dropout=0.5)
    loop = cell_loops.WeightDropped(module, cell_loops.lstm)
    loop(torch.randn(3, 2, 4))
    share = (loop.w_hh == 0).float().mean()
    assert 0.3 < share < 0.7 and not any(name == "w_hh" for name, _ in loop.named_parameters())


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--threads", "1", "--only", "GRU;LSTM of 1997", "--sizes", "2", "3", "4", "--rounds", "2"]
    assert cells.main([*arguments, "--seconds", "0", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / cells_report.JSON).read_text())
    gru, carousel = (next(r for r in content["records"] if r["cell"] == name) for name in ("GRU", "LSTM of 1997"))
    assert gru["rounds"] == 2 and gru["torch_ratio"] > 0 and "torch_ratio" not in carousel
    assert "--sizes 2 3 4" in content["environment"]["command"]
    text = (tmp_path / cells_report.TEXT).read_text()
    assert "GRU" in text and f"{gru['loop_ratio']:.1f}" in text and "GRU" in capsys.readouterr().out
    assert (tmp_path / cells_report.PLOT).stat().st_size > 10_000
    assert cells.main(["--draw", "--out", str(tmp_path)]) == 0


def test_an_unknown_cell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cells.main(["--only", "LSTN"])
    assert "LSTN" in capsys.readouterr().err


def test_auto_beats_the_loop_of_pytorchs_operator() -> None:
    """Whatever the padding, up to as many weights as was measured."""
    chosen = {
        (batch, hidden): cells.chosen(TritonGRU(hidden, hidden), torch.randn(3, batch, hidden), "training step")
        for batch, hidden in ((8, 1), (33, 72), (128, 100), (8, 512), (8, 700))
    }
    assert chosen == {
        (8, 1): "triton", (33, 72): "triton", (128, 100): "triton", (8, 512): "triton", (8, 700): "torch",
    }  # fmt: skip
