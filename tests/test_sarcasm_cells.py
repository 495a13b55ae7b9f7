"""The sarcasm experiment with other cells: the models, and a comparison on generated headlines."""

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from bench.sarcasm import cells, compare, data, run
from bench.sarcasm.__main__ import main
from bench.sarcasm.results import read_csv

CPU = torch.device("cpu")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> data.Headlines:
    """Generated headlines fewer than by default, which `--data synthetic` then takes, too."""
    headlines = data.generate(200)
    monkeypatch.setattr(data, "generate", lambda: headlines)
    monkeypatch.setattr(compare, "BATCHES", 3)
    return headlines


@pytest.fixture
def few_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cells, of which the second draws its masks otherwise."""
    kept = {"lstm": cells.CELLS["lstm"]}
    other = cells.Cell("TritonLSTM", "Gal 2016", "a mask a sequence", {"recurrent_dropout_mode": "sequence"})
    for name in [name for name in cells.CELLS if name not in kept]:
        monkeypatch.delitem(cells.CELLS, name)
    monkeypatch.setitem(cells.CELLS, "sequence", other)


def command(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_cells_are_compared_in_one_report(
    few: data.Headlines, few_cells: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--data", "synthetic", "--epochs", 2, "--backend", "eager", "--out", tmp_path)
    assert command(*arguments, "--seeds", 1, 2, "--cell", "all") == 0
    folder = tmp_path / "cells"
    assert {path.name for path in folder.iterdir()} == {
        "lstm",
        "sequence",
        "README.md",
        "accuracy.png",
        "step_time.json",
    }
    assert (folder / "accuracy.png").read_bytes()[16:20] == (900).to_bytes(4, "big")  # PNG's width

    runs = {name: [read_csv(folder / name / f"seed-{seed}.csv") for seed in (1, 2)] for name in ("lstm", "sequence")}
    assert runs["lstm"][0][0]["train_loss"] != runs["sequence"][0][0]["train_loss"]
    summary = json.loads((folder / "sequence" / "summary.json").read_text())
    assert summary["cell"] == "sequence" and summary["seeds"] == [1, 2]
    assert "--recipe published --cell sequence --backend eager" in summary["environment"]["command"]
    text = (folder / "README.md").read_text()
    assert "SYNTHETIC" in text.splitlines()[0] and str(tmp_path) not in text
    lasts = [rows[-1]["test_accuracy"] for rows in runs["sequence"]]
    line = next(line for line in text.splitlines() if line.startswith("| [sequence]"))
    assert re.search(rf"\| 30,914 \| 2 \|.*\| {sum(lasts) / 2:.2f} ± .*\| eager \|$", line)
    assert "--cell lstm sequence --backend eager --epochs 2 --seeds 1 2 --data synthetic" in text

    # A seed more of one cell: the finished ones are not trained again, and the report keeps the other cell.
    capsys.readouterr()
    assert command(*arguments, "--seeds", 2, 3, "--cell", "sequence") == 0
    assert "seed 2: finished before" in capsys.readouterr().out
    text = (folder / "README.md").read_text()
    assert "| [lstm](lstm/) | 30,914 | 2 |" in text and "| [sequence](sequence/) | 30,914 | 3 |" in text


def test_results_that_name_no_cell_are_the_lstms() -> None:
    options = {option: "same" for option in run.OPTIONS}
    found = {option: value for option, value in options.items() if option != "cell"}
    run.refuse_others("they are", found, options | {"cell": "lstm"})
    with pytest.raises(run.RunError, match=r"they are of other options: cell lstm \(now gru\)"):
        run.refuse_others("they are", found, options | {"cell": "gru"})


def test_best_recipe_has_the_lstm_alone(
    few: data.Headlines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--data", "synthetic", "--recipe", "best", "--cell", "gru", "--out", tmp_path) == 2
    assert "'best' has no other cell" in capsys.readouterr().err and not list(tmp_path.iterdir())
