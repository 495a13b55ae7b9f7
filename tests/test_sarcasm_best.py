"""The sarcasm experiment's best recipe: its text, its two phases, whole runs on generated headlines."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from bench.sarcasm import best, best_report, best_text, data, published
from bench.sarcasm.__main__ import main
from bench.sarcasm.results import read_csv

CPU = torch.device("cpu")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> data.Headlines:
    """Few generated headlines, and few hash buckets for them: most of a step's time is in those."""
    headlines = data.generate(200)
    monkeypatch.setattr(data, "generate", lambda: headlines)
    monkeypatch.setattr(best, "BIGRAM_BUCKETS", 500)
    for module in (best, best_text):
        monkeypatch.setattr(module, "CHAR_BUCKETS", 200)
    return headlines


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many headlines each pass over the test split had, of all passes."""
    found: list[int] = []
    batches = best_text.Rows.batches

    def counted(self: best_text.Rows, order: np.random.Generator | None = None) -> Iterator[best_text.Batch]:
        if len(self) == 40:  # the training split has 160
            found.append(len(self))
        return batches(self, order)

    monkeypatch.setattr(best_text.Rows, "batches", counted)
    return found


def command(*arguments: object) -> int:
    return main(["--recipe", "best", "--data", "synthetic", *(str(argument) for argument in arguments)])


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("mom starting to fear", "mom starting to fear"),
        ("it's over, isn't it?", "it 's over , isn't it ?"),
        ("man's $5.50 u.s. trip", "man 's $ 0.00 u . s . trip"),
        ("well-known café_o'clock 1,000", "well - known café _ o'clock 0,000"),
        ("", ""),
    ],
)
def test_tokens(text: str, tokens: str) -> None:
    assert best_text.tokenize(text) == ["<s>", *tokens.split(), "</s>"]


def test_character_ngrams_are_of_the_marked_word() -> None:
    grams = best_text.char_ngrams("abc")
    assert len(grams) == 3 + 2 + 1 and all(1 <= k <= best_text.CHAR_BUCKETS for k in grams)
    assert grams[1:2] == best_text.char_ngrams("abcd")[1:2] and grams[0] == best_text.char_ngrams("ab")[0]
    assert len(best_text.char_ngrams("x" * 100)) == 60
    assert best_text.char_ngrams(best_text.START) == best_text.char_ngrams(best_text.END) == []


def test_vocabulary_is_by_frequency() -> None:
    vocabulary = best_text.Vocabulary([["b", "a", "c"], ["b", "a", "b", "d"]])
    assert vocabulary.indices == {"b": 2, "a": 3}
    assert vocabulary.size == 4 and vocabulary.targets == 3  # b alone is there three times


def test_batches_have_one_length_and_all_headlines(few: data.Headlines) -> None:
    rows = best.Corpus(few).train
    for order in (None, np.random.default_rng(0)):
        assert sorted(k for batch in rows.index_batches(order) for k in batch) == list(range(160))
    for indices, batch in zip(rows.index_batches(), rows.batches(), strict=True):
        assert len(indices) <= 64
        for k, words, types, label in zip(indices, batch.words, batch.types, batch.labels, strict=True):
            assert torch.equal(words, rows.words[k]) and label == rows.labels[k]
            for gram, whole in zip(batch.grams[types], rows.grams[rows.types[k]], strict=True):
                assert torch.equal(gram, whole[: len(gram)]) and not whole[len(gram) :].any()


def test_training_ignores_the_texts_of_the_test_split(few: data.Headlines) -> None:
    train, test = published.split(few.labels)
    texts = list(few.texts)
    for k in test:
        texts[k] = f"quite another headline number {k}, quite another one"
    corpora = [best.Corpus(few), best.Corpus(dataclasses.replace(few, texts=tuple(texts)))]
    first, second = (corpus.vocabulary for corpus in corpora)
    assert first.indices == second.indices and first.targets == second.targets
    assert "quite" not in second.indices
    losses = []
    for corpus in corpora:
        training = best.Training(corpus, 0, "auto", CPU, 1)
        losses.append([training.epoch(lambda: None)["train_loss"] for _ in range(best.LM_EPOCHS)])
    assert losses[0] == losses[1]


def test_model(few: data.Headlines) -> None:
    corpus = best.Corpus(few)
    model = best.Classifier(corpus.vocabulary, "eager").eval()
    assert model.lstm.bidirectional and model.lstm.backend == "eager"
    assert sum(p.numel() for p in model.parameters()) == corpus.facts["parameters"]
    batch = next(corpus.train.batches())
    reference = torch.nn.LSTM(best.EMBEDDING, best.HIDDEN, batch_first=True, bidirectional=True)
    reference.load_state_dict(model.lstm.state_dict())
    found = model(batch)
    assert found.shape == batch.labels.shape
    model.lstm = reference
    torch.testing.assert_close(found, model(batch))

    words = torch.tensor([[2, best_text.UNKNOWN, 3, 4]])
    assert model.bigrams(words).ne(0).any(dim=2).tolist() == [[False, False, False, True]]


def test_learning_rate() -> None:
    factors = [best.learning_rate_factor(step, 1000) for step in range(1001)]
    assert factors[0] == 0.02 and factors[49] == pytest.approx(0.5, rel=0.01) and factors[-1] == 0.02
    assert max(factors) == factors[99] > 0.97


def test_whole_run_on_generated_headlines(
    few: data.Headlines, passes: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--epochs", 2, "--backend", "eager", "--out", tmp_path, "--seeds")
    assert command(*arguments, 3, 1) == 0
    assert passes == [40, 40]  # once a seed
    lines = capsys.readouterr().out.splitlines()
    assert [", test " in line for line in lines if "(synthetic data), epoch" in line] == ([False] * 5 + [True]) * 2

    folder = tmp_path / "best"
    names = {"README.md", "training.png", "seed-1.csv", "seed-3.csv", "summary.json"}
    assert {path.name for path in folder.iterdir()} == names
    rows = read_csv(folder / "seed-1.csv")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["phase"] for row in rows] == [1, 1, 1, 1, 2, 2]
    assert ["train_accuracy" in row for row in rows] == [False] * 4 + [True] * 2
    assert ["test_accuracy" in row for row in rows] == [False] * 5 + [True]
    assert all(row["train_loss"] > 0 and row["seconds"] > 0 for row in rows)

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["recipe"] == "best" and summary["backend"] == "eager" and summary["data"] == "synthetic"
    assert summary["epochs"] == 2 and summary["language_model_epochs"] == 4 and summary["seeds"] == [1, 3]
    assert summary["best_accuracy"] == summary["last_accuracy"] and summary["best_epoch"] == [6, 6]
    assert summary["last_accuracy"][0] == rows[-1]["test_accuracy"]
    assert summary["mean_best_accuracy"] == summary["mean_last_accuracy"]
    assert summary["mean_last_accuracy"] == pytest.approx(sum(summary["last_accuracy"]) / 2)
    assert summary["sd_last_accuracy"] == summary["sd_best_accuracy"]
    assert summary["test_evaluations_per_seed"] == 1 and "once a seed" in summary["note"]
    assert summary["seconds_per_epoch"] > 0 and summary["majority_baseline"] >= 50
    assert summary["environment"]["command"].endswith("--backend eager --epochs 2 --seeds 1 3 --data synthetic")
    text = (folder / "README.md").read_text()
    assert "SYNTHETIC" in text.splitlines()[0] and "it is another recipe" in text and str(tmp_path) not in text
    assert (folder / "training.png").read_bytes()[16:20] == (800).to_bytes(4, "big")  # PNG's width

    # Finished seeds are not trained again; other options are refused.
    assert command(*arguments, 1) == 0 and passes == [40, 40]
    assert "seed 1: finished before" in capsys.readouterr().out
    assert command("--epochs", 3, *arguments[2:], 1) == 2
    assert "epochs 2 (now 3)" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [2, best.LM_EPOCHS, 5])
def test_resumed_run_is_bitwise_the_uninterrupted_one(
    cut: int,
    few: data.Headlines,
    passes: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Cut in phase 1, between the phases, and in phase 2."""

    class Interrupting(best.Training):
        def epoch(self, advance: Callable[[], None]) -> dict[str, float]:
            if self.done == cut:
                torch.rand(7)  # what an epoch cut short has drawn
                self.order.random(7)
                raise KeyboardInterrupt
            return super().epoch(advance)

    arguments = ("--epochs", 2, "--seeds", 5, "--backend", "eager", "--out")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    kept: list[dict[str, Any]] = []
    test = best.Training.test
    monkeypatch.setattr(best.Training, "test", lambda self: kept.append(self.model.state_dict()) or test(self))
    assert command(*arguments, whole) == 0
    with monkeypatch.context() as patch:
        patch.setattr(best, "Training", Interrupting)
        assert command(*arguments, broken) == 130
    assert passes == [40]
    assert command("--epochs", 3, *arguments[2:], broken) == 2
    assert "is a checkpoint of other options: epochs 2 (now 3)" in capsys.readouterr().err
    torch.manual_seed(99)
    assert command(*arguments, broken) == 0
    assert f"goes on after epoch {cut}" in capsys.readouterr().out
    assert passes == [40, 40] and not (broken / "best" / ".checkpoints").exists()
    found, expected = (read_csv(folder / "best" / "seed-5.csv") for folder in (broken, whole))
    for row in (*found, *expected):
        del row["seconds"]
    assert found == expected
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())


def test_report_shows_how_the_recipe_was_chosen() -> None:
    text = best_report.chosen()
    assert "| 89.61 | 89.89 | 89.75 |" in text and "88.30 %" in text
    for _, first, second, mean in best_report.CUTS:
        assert mean == pytest.approx((first + second) / 2, abs=0.011)


@pytest.mark.skipif(not os.environ.get("LSTM_TRITON_DATA"), reason="LSTM_TRITON_DATA names no data set")
def test_real_data_is_as_the_recipe_had_it() -> None:
    corpus = best.Corpus(data.load())
    assert (len(corpus.train), len(corpus.test)) == (21_367, 5_342)
    assert (corpus.vocabulary.size, corpus.vocabulary.targets) == (12_481, 8_935)
    assert len(corpus.train.index_batches()) == 358
    assert corpus.facts["parameters"] == 10_728_040 and corpus.facts["test_headlines_also_in_train"] == 37
