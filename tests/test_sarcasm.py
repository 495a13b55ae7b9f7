"""The sarcasm experiment: data in all its forms, the published recipe's parts, whole runs on generated headlines."""

import csv
import gzip
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from bench.sarcasm import data, published, report, review, run, step_time
from bench.sarcasm.__main__ import main
from bench.sarcasm.results import read_csv
from lstm_triton.cpu import build

# Line ends to Python's splitlines but not to the formats, quotes, and other than ASCII.
ODD = ["it's a\x85test", 'the "best", they say', "caf\u00e9 \u2028 o'clock", "plain"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> data.Headlines:
    """Generated headlines fewer than by default, which `--data synthetic` then takes, too."""
    headlines = data.generate(200)
    monkeypatch.setattr(data, "generate", lambda: headlines)
    return headlines


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """A small data set that stands for version 1."""
    texts, labels = tuple(ODD), (1, 0, 1, 0)
    monkeypatch.setattr(data, "VERSION_1", data.fingerprint(texts, labels))
    monkeypatch.setattr(data, "COUNT_1", len(texts))
    monkeypatch.delenv("LSTM_TRITON_DATA", raising=False)
    return texts, labels


def forms() -> dict[str, bytes]:
    """The four headlines in each form of file, each form under its name."""
    labels = (1, 0, 1, 0)
    records = [{"article_link": "x", "headline": t, "is_sarcastic": k} for t, k in zip(ODD, labels, strict=True)]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("headline", "is_sarcastic"), *zip(ODD, labels, strict=True)])
    plain = {
        "array.json": json.dumps(records).encode(),
        "lines.json": "\n".join(json.dumps(r, ensure_ascii=False) for r in records).encode(),
        "table.csv": text.getvalue().encode(),
    }
    return plain | {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in plain.items()}


def command(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("Mom Starting To Fear", "mom starting to fear"),
        ("it's over, isn't it?", "it ' s over , isn ' t it ?"),
        ('"no" (really)! u.s. news', "no ( really ) ! u . s . news"),
        ("area man: 3; women: 4<br />next", "area man 3 women 4 next"),
        ("  well-known\t\tfact\u00a0$5 ", "well-known fact $5"),
        ("", ""),
    ],
)
def test_tokens_follow_basic_english(text: str, tokens: str) -> None:
    assert published.tokenize(text) == tokens.split()


def test_vocabulary_is_by_frequency_then_token() -> None:
    lines = [["b", "a", "c", "a"], ["b", "d", "d", "e"]]
    assert published.build_vocabulary(lines) == {"<UNK>": 0, "a": 1, "b": 2, "d": 3}
    assert published.build_vocabulary(lines, size=3) == {"<UNK>": 0, "a": 1, "b": 2}


def test_batches_are_padded_to_their_own_longest_row(few: data.Headlines) -> None:
    corpus = published.Corpus(few)
    batches = list(corpus.batches(corpus.train))
    assert [len(labels) for _, labels in batches] == [32] * 5
    assert [len(labels) for _, labels in corpus.batches(corpus.test)] == [32, 8]
    for k, (tokens, labels) in enumerate(batches):
        indices = corpus.train[32 * k : 32 * k + 32]
        assert tokens.size(1) == max(len(corpus.rows[i]) for i in indices)
        for row, label, i in zip(tokens, labels, indices, strict=True):
            length = len(corpus.rows[i])
            assert torch.equal(row[:length], corpus.rows[i]) and not row[length:].any()
            assert label == few.labels[i]


def test_model_is_the_published_one() -> None:
    model = published.Classifier()
    assert sum(p.numel() for p in model.parameters()) == 30_914
    assert model.rnn.recurrent_dropout == 0.5 and model.rnn.recurrent_dropout_mode == "step"
    for name, parameter in model.rnn.named_parameters():
        if name.startswith("bias"):
            assert not parameter.any()
        else:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.9 * bound < parameter.abs().max() <= bound


def test_losses_in_both_units() -> None:
    meter = published.Meter()
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    meter.add(torch.tensor(0.5), logits, torch.tensor([0, 0]))
    meter.add(torch.tensor(0.2), logits[:1], torch.tensor([0]))
    found = meter.results("test")
    expected = {"test_loss": 1.2 / 3, "test_loss_review": 0.7 / 3, "test_accuracy": 200 / 3}
    assert found == pytest.approx(expected)


def test_per_step_loop_is_the_same_model(few: data.Headlines) -> None:
    result = step_time.measure(few, 3, 1, torch.device("cpu"))  # compares the logits first
    assert result["ratio"] > 0 and result["batches"] == 3


@pytest.mark.parametrize("name", forms())
def test_every_form_reads_alike(name: str, known: tuple[Any, Any], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(forms()[name])
    headlines = data.load(str(path))
    assert (headlines.texts, headlines.labels) == known
    assert headlines.name == "version 1" and not headlines.synthetic


def test_environment_variable_names_the_data(
    known: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "anything"
    path.write_bytes(forms()["lines.json"])
    monkeypatch.setenv("LSTM_TRITON_DATA", str(path))
    assert data.load().texts == known[0]
    assert data.load("synthetic").synthetic


@pytest.mark.parametrize(
    "content, problem",
    [
        (None, "No such file"),
        (b"", "truncated or another data set: 0 of 4 headlines"),
        (b"PK\x03\x04", "zip archive"),
        (forms()["array.json"][:-20], "truncated, damaged or of another form"),
        (forms()["lines.json"].rpartition(b"\n")[0], "truncated or another data set: 3 of 4 headlines"),
        (forms()["table.csv.gz"][:-20], "does not unpack"),
        (b"\x1f\x8bno gzip at all", "does not unpack"),
        (b"<html>no such page</html>\nx", "no field 'headline'"),
        (b"\xff\xfe", "no UTF-8 text"),
        (forms()["table.csv"].replace(b"plain", b"other"), "changed: 4 headlines with sha256"),
        (b"headline,is_sarcastic\n" + b"x,1\n" * 28_619, "is version 2 of the data set (28,619 headlines)"),
    ],
)
def test_wrong_file_is_one_line_that_says_what_to_do(
    content: bytes | None,
    problem: str,
    known: tuple[Any, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "headlines"
    if content is not None:
        path.write_bytes(content)
    assert command("--data", path, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert problem in error and data.URL in error and "--data synthetic" in error
    assert not (tmp_path / "out").exists()


def test_download_is_verified_kept_and_mended(
    known: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source.json"
    source.write_bytes(forms()["array.json"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "URL", source.as_uri())
    assert data.load().texts == known[0]
    kept = tmp_path / "cache" / "lstm_triton" / "sarcasm.json"
    assert list(kept.parent.iterdir()) == [kept]

    kept.write_bytes(kept.read_bytes()[:50])
    assert data.load().texts == known[0]  # fetched anew
    source.unlink()
    assert data.load().texts == known[0]  # from the cache
    kept.unlink()
    with pytest.raises(data.DataError, match="download from file:.* failed"):
        data.load()
    source.write_text("[]")
    with pytest.raises(data.DataError, match="is not version 1"):
        data.load()
    assert not list(kept.parent.iterdir())


def test_generated_headlines_are_always_the_same() -> None:
    first, second = data.generate(100), data.generate(100)
    assert first == second and first.synthetic
    assert data.generate(100, seed=1) != first
    assert 30 < sum(first.labels) < 60


def test_whole_run_on_generated_headlines(
    few: data.Headlines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("--data", "synthetic", "--epochs", 2, "--backend", "eager", "--seeds")
    assert command(*arguments, 3, 1) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("(synthetic data), epoch" in line for line in lines) == 4 and "Synthetic data" in lines[0]

    folder = tmp_path / "reports" / "sarcasm-synthetic" / "published"
    names = {"README.md", "accuracy.png", "loss.png", "seed-1.csv", "seed-3.csv", "summary.json"}
    assert {path.name for path in folder.iterdir()} == names
    rows = read_csv(folder / "seed-1.csv")
    splits = [f"{split}_{what}" for split in ("train", "test") for what in ("loss", "loss_review", "accuracy")]
    assert list(rows[0]) == ["epoch", *splits, "seconds"] and [row["epoch"] for row in rows] == [1, 2]

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["data"] == "synthetic" and summary["backend"] == "eager" and summary["recipe"] == "published"
    assert summary["epochs"] == 2 and summary["seeds"] == [1, 3]
    assert summary["best_accuracy"][0] == max(row["test_accuracy"] for row in rows)
    assert summary["last_accuracy"][0] == rows[-1]["test_accuracy"]
    assert summary["mean_best_accuracy"] == pytest.approx(sum(summary["best_accuracy"]) / 2)
    assert summary["sd_last_accuracy"] == pytest.approx(abs(float.__sub__(*summary["last_accuracy"])) / 2**0.5)
    assert summary["seconds_per_epoch"] > 0 and summary["majority_baseline"] >= 50
    assert {"cpu", "gpu", "torch", "triton", "python", "commit", "command"} <= set(summary["environment"])
    text = (folder / "README.md").read_text()
    assert "SYNTHETIC" in text and "0.0118" in text and "SYNTHETIC" in text.splitlines()[0]
    assert str(tmp_path) not in text

    # A third seed joins those finished; other options are refused.
    assert command(*arguments, 1, 2) == 0
    assert "seed 1: finished before" in capsys.readouterr().out
    assert json.loads((folder / "summary.json").read_text())["seeds"] == [1, 2, 3]
    assert command("--data", "synthetic", "--epochs", 1, "--backend", "eager") == 2
    assert "epochs 2 (now 1)" in capsys.readouterr().err


class Interrupting(published.Training):
    """Ctrl-C in the second epoch."""

    count = 0

    def epoch(self, advance: Any) -> dict[str, float]:
        Interrupting.count += 1
        if Interrupting.count == 2:
            torch.rand(7)  # what an epoch cut short has drawn
            raise KeyboardInterrupt
        return super().epoch(advance)


def test_resumed_run_is_bitwise_the_uninterrupted_one(
    few: data.Headlines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--data", "synthetic", "--epochs", 3, "--seeds", 5, "--backend", "eager", "--out")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert command(*arguments, whole) == 0
    with monkeypatch.context() as patch:
        patch.setattr(published, "Training", Interrupting)
        assert command(*arguments, cut) == 130
    assert f"python -m bench.sarcasm {' '.join(map(str, arguments))} {cut}" in capsys.readouterr().err
    checkpoints = cut / "published" / ".checkpoints"
    assert (checkpoints / ".gitignore").read_text() == "*\n"

    assert command(*arguments[:3], 4, *arguments[4:], cut) == 2
    assert "seed-5.pt is a checkpoint of other options: epochs 3 (now 4)" in capsys.readouterr().err
    torch.manual_seed(99)
    assert command(*arguments, cut) == 0
    assert "goes on after epoch 1" in capsys.readouterr().out and not checkpoints.exists()
    found, expected = (read_csv(folder / "published" / "seed-5.csv") for folder in (cut, whole))
    for row in (*found, *expected):
        del row["seconds"]
    assert found == expected


def test_damaged_checkpoint_is_refused(few: data.Headlines, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run.checkpoint_path(tmp_path / "published", 0)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no checkpoint")
    assert command("--data", "synthetic", "--epochs", 1, "--seeds", 0, "--out", tmp_path) == 2
    assert "seed-0.pt is damaged" in capsys.readouterr().err


def test_backends_have_the_same_batches_and_masks(few: data.Headlines) -> None:
    """auto is eager in training and PyTorch's operator in tests; what is drawn may not depend on it."""
    rows = []
    for backend in ("eager", "auto"):
        training = published.Training(published.Corpus(few), 0, backend, torch.device("cpu"))
        rows.append((training.epoch(lambda: None), torch.rand(1).item()))
    (eager, drawn), (auto, drawn_auto) = rows
    assert drawn == drawn_auto
    assert {k: v for k, v in auto.items() if k != "seconds"} == pytest.approx(
        {k: v for k, v in eager.items() if k != "seconds"}, rel=1e-5
    )


def no_compiler() -> build.Compiler:
    raise RuntimeError(build.NO_COMPILER.format(found="there is none"))


@pytest.mark.parametrize("backend, problem", [("torch", "has no recurrent dropout"), ("triton", "needs a C compiler")])
def test_backend_that_cannot_run_is_an_error(
    backend: str,
    problem: str,
    few: data.Headlines,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if backend == "triton":
        if torch.cuda.is_available():
            pytest.skip("runs on the GPU")
        monkeypatch.setattr(build, "compiler", no_compiler)
    assert command("--data", "synthetic", "--backend", backend, "--out", tmp_path) == 2
    assert problem in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_plots_and_tables_show_the_published_run(few: data.Headlines, tmp_path: Path) -> None:
    assert len(review.TEST_ACCURACY) == 30 and max(review.TEST_ACCURACY) == review.TEST_ACCURACY[23] == 83.25
    row = {"epoch": 1.0, "test_accuracy": 83.0, "test_loss": 0.38, "test_loss_review": 0.0119, "seconds": 1.0}
    row |= {"train_accuracy": 86.0, "train_loss": 0.31, "train_loss_review": 0.0099}
    runs = [[{**row, "epoch": float(k)} for k in range(1, 31)] for _ in range(2)]
    report.draw(tmp_path / "a.png", runs, "accuracy", "accuracy (%)", "", dict(enumerate(review.TEST_ACCURACY, 1)))
    assert (tmp_path / "a.png").read_bytes()[16:20] == (800).to_bytes(4, "big")  # PNG's width
    text = report.tables(runs)
    assert re.search(r"best test accuracy: review \| 24 \|.*\| 83.25 \|", text)
    assert "| best test accuracy: ours | 1 | 0.0099 ± 0.0000 |" in text


real = pytest.mark.skipif(not os.environ.get("LSTM_TRITON_DATA"), reason="LSTM_TRITON_DATA names no data set")


@pytest.fixture(scope="module")
def corpus() -> published.Corpus:
    return published.Corpus(data.load())  # asserts the split's hash


@real
def test_real_data_is_as_the_review_had_it(corpus: published.Corpus) -> None:
    assert published.split_hash(corpus.test) == published.SPLIT_SHA256
    assert (len(corpus.train), len(corpus.test)) == (21_367, 5_342)
    assert corpus.labels[corpus.test].bincount().tolist() == [2_997, 2_345]
    lengths = torch.tensor([len(row) for row in corpus.rows])
    assert lengths.max() == 60 and round(lengths.double().mean().item(), 1) == 10.9
    assert len(list(corpus.batches(corpus.train))) == 668 and len(list(corpus.batches(corpus.test))) == 167
    facts = {key: round(value, 2) for key, value in corpus.facts.items()}
    assert facts["unknown_tokens_percent"] == 36.35 and facts["vocabulary"] == 1000
    assert facts["test_headlines_also_in_train"] == 37 and facts["majority_baseline"] == 56.10
