"""The sarcasm experiment with other cells: the models, and a comparison on generated headlines."""

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from bench.sarcasm import cells, compare, data, published, run
from bench.sarcasm.__main__ import main
from bench.sarcasm.results import read_csv
from lstm_triton import TritonLSTM

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
    other = cells.Cell(TritonLSTM, "Gal 2016", "a mask a sequence", {"recurrent_dropout_mode": "sequence"})
    for name in [name for name in cells.CELLS if name not in kept]:
        monkeypatch.delitem(cells.CELLS, name)
    monkeypatch.setitem(cells.CELLS, "sequence", other)


# Embedding and Linear, and a layer's rows of H = 32 over 16 + 32 or 32 + 32 inputs and two biases; gains, peepholes.
REST, LAYERS = 16_000 + 66, 32 * (16 + 32 + 2) + 32 * (32 + 32 + 2)
PARAMETERS = {
    "lstm": REST + 4 * LAYERS,
    "rnn": REST + LAYERS,
    "gru": REST + 3 * LAYERS,
    "lstm-1997": REST + 3 * LAYERS,
    "layer-norm": REST + 4 * LAYERS + 2 * (8 + 2) * 32,
    "peephole": REST + 4 * LAYERS + 2 * 3 * 32,
    "coupled": REST + 3 * LAYERS,
    "zoneout": REST + 4 * LAYERS,
    "weight-dropout": REST + 4 * LAYERS,
}


def test_every_cell_is_tried() -> None:
    assert list(PARAMETERS) == list(cells.CELLS)


@pytest.mark.parametrize("cell", PARAMETERS)
def test_cell_in_the_published_model(cell: str, few: data.Headlines) -> None:
    corpus = published.Corpus(few)
    training = published.Training(corpus, 0, "eager", CPU, cell=cell)
    model = training.model
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[cell]
    assert model.rnn.recurrent_dropout == 0.5 and model.rnn.num_layers == 2
    for name, parameter in model.rnn.named_parameters():
        if name.startswith("bias"):
            assert not parameter.any()
        elif name.startswith("gain"):
            assert (parameter == 1).all()
        else:
            bound = (6 / sum(parameter.shape)) ** 0.5 if parameter.dim() == 2 else 32**-0.5
            assert 0.9 * bound < parameter.abs().max() <= bound

    # It learns a batch by heart, with all its parameters, and in evaluation nothing is random.
    tokens, labels = corpus.batch(corpus.train[:8])
    training.optimizer.param_groups[0]["lr"] = 0.02
    training.step(tokens, labels)
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    for _ in range(60):
        training.step(tokens, labels)
    model.eval()
    with torch.no_grad():
        logits = model(tokens)
        assert torch.equal(logits, model(tokens))
    assert torch.nn.functional.cross_entropy(logits, labels) < 0.3  # log 2 is 0.69


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
