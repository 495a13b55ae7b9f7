"""The picture of the gates: the headline that it chooses, and what it shows."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from bench.sarcasm import data, gates, published
from bench.sarcasm.run import RunError


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> data.Headlines:
    """Generated headlines fewer than by default, which `--data synthetic` then takes, too."""
    headlines = data.generate(200)
    monkeypatch.setattr(data, "generate", lambda: headlines)
    return headlines


@pytest.fixture
def model() -> published.Classifier:
    torch.manual_seed(0)
    model = published.Classifier("eager").eval()
    with torch.no_grad():
        model.linear.weight.mul_(20)  # untrained, it is sure of nothing
    return model


def layer(model: published.Classifier, k: int, x: Tensor) -> dict[str, Tensor]:
    """Gates and states of layer k over the inputs (T, I), (T, 32) each, written as the formulas are."""
    w_ih, w_hh, b_ih, b_hh = (getattr(model.rnn, f"{n}_l{k}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h = c = torch.zeros(32)
    found: dict[str, list[Tensor]] = {name: [] for name in "ifgoch"}
    for x_t in x:
        i, f, g, o = (w_ih @ x_t + b_ih + w_hh @ h + b_hh).chunk(4)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        h = o * c.tanh()
        for name, value in zip("ifgoch", (i, f, g, o, c, h), strict=True):
            found[name].append(value)
    return {name: torch.stack(values) for name, values in found.items()}


def test_picture_shows_gates_sorted_by_their_part_in_the_verdict(
    few: data.Headlines, model: published.Classifier
) -> None:
    corpus = published.Corpus(few)
    headline = gates.read(model, corpus, few.texts[0] + " zzz")
    assert headline.words[-1] == "(zzz)"
    tokens = published.tokenize(few.texts[0])
    for word, token, index in zip(headline.words, tokens, headline.row.tolist(), strict=False):
        assert word == (token if index else f"({token})") and corpus.vocabulary.get(token, 0) == index
    figure = gates.picture(model, headline)
    with torch.no_grad():
        upper = layer(model, 1, layer(model, 0, model.embedding(headline.row))["h"])
        part = (model.linear.weight[1] - model.linear.weight[0]) * upper["h"][-1]
    order = sorted(range(32), key=lambda unit: -float(part[unit]))
    for axes, name in zip(figure.axes, "ifogc", strict=False):
        assert axes.get_title().startswith(name)
        shown = torch.tensor(axes.images[0].get_array())
        torch.testing.assert_close(shown, upper[name].t()[order], atol=1e-5, rtol=1e-5)
        assert [label.get_text() for label in axes.get_xticklabels()] == headline.words
    scales = [axes.images[0].get_clim() for axes in figure.axes[:4]]
    assert scales == [(0, 1)] * 3 + [(-1, 1)]
    bars = [bar.get_height() for bar in figure.axes[5].patches]
    with torch.no_grad():
        expected = [float(model(headline.row[None, : t + 1]).softmax(1)[0, 1]) for t in range(len(bars))]
    assert len(bars) == len(headline.words) and bars == pytest.approx(expected, abs=1e-5)


def test_chosen_headline_is_the_one_of_the_rule(
    few: data.Headlines, model: published.Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "UNKNOWN_SHARE", 0.3)
    monkeypatch.setattr(gates, "CONFIDENT", 0.4)
    corpus = published.Corpus(few)
    looked_at = []
    for k in corpus.test:
        row = corpus.rows[k]
        with torch.no_grad():
            course = [float(model(row[None, : t + 1]).softmax(1)[0, 1]) for t in range(len(row))]
        if few.labels[k] and 8 <= len(row) <= 14 and (row == 0).sum() <= 0.3 * len(row) and course[-1] >= 0.4:
            looked_at.append((min(course), few.texts[k]))
    assert len(looked_at) > 1
    assert gates.choose(model, corpus, few) == min(looked_at)[1]
    monkeypatch.setattr(gates, "CONFIDENT", 1.1)
    with pytest.raises(RunError, match="no sarcastic test headline"):
        gates.choose(model, corpus, few)


def test_command_draws_a_headline_of_ones_own(
    few: data.Headlines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", "synthetic", "--epochs", "1", "--backend", "eager", "--out", str(tmp_path), "--headline"]
    word = published.tokenize(few.texts[0])[0]
    assert gates.main([*arguments, f"{word}, xyzzy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-4:-1]] == [word, ",", "(xyzzy)"]
    assert (tmp_path / "gates.png").read_bytes()[16:20] == (900).to_bytes(4, "big")  # PNG's width
    assert gates.main([*arguments, ' "" ']) == 2
    assert "has no tokens" in capsys.readouterr().err
