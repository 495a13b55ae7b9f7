"""`python -m bench.longterm`: the problems' data, the criterion, gradients by lag, runs that go on, the report."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from bench.longterm import gradients, plots, problems, report, train
from bench.longterm.__main__ import QUICK, QUICK_SIZE, main
from bench.longterm.cells import CELLS
from bench.longterm.problems import PROBLEMS, SYMBOLS, Batch
from bench.longterm.records import RUN_COLUMNS, Records, load, read_csv
from bench.longterm.train import Criterion, Job, Outcome, Row

ADDING, TEMPORAL = PROBLEMS["adding"], PROBLEMS["temporal-order"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(batch: Batch) -> list[Tensor]:
    """Each row's steps, (length, inputs)."""
    return [batch.input[:length, k] for k, length in enumerate(batch.lengths)]


# The problems


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
@pytest.mark.parametrize("length", [problems.SHORTEST, 100])
def test_lengths_are_from_t_to_eleven_tenths_of_it(problem: problems.Problem, length: int) -> None:
    batch = problem.draw(length, 400, generator())
    assert set(batch.lengths) == set(range(length, length + length // 10 + 1))
    assert batch.input.shape == (max(batch.lengths), 400, problem.inputs)
    assert batch.target.shape == (400, problem.outputs)
    assert batch.input.dtype == batch.target.dtype == torch.float32


@pytest.mark.parametrize("length", [problems.SHORTEST, 100])
def test_adding_marks_two_pairs_and_asks_for_their_sum(length: int) -> None:
    batch = ADDING.draw(length, 3000, generator())
    firsts, seconds, at_start = set(), set(), 0
    for pairs, target in zip(rows_of(batch), batch.target, strict=True):
        values, markers = pairs.T
        assert (values.abs() <= 1).all()
        assert markers[0] == markers[-1] == -1
        inner = markers[1:-1]
        marked = (inner == 1).nonzero().flatten() + 1
        assert ((inner == 0) | (inner == 1)).all()
        # One of the two may be the first pair, which then counts as zero.
        assert len(marked) in (1, 2)
        at_start += len(marked) == 1
        assert marked.max() < length // 2 - 1
        assert target == pytest.approx(0.5 + values[marked].sum().item() / 4, abs=1e-6)
        if len(marked) == 2:
            firsts.add(int(marked.min()))
            seconds.add(int(marked.max()))
    assert set(range(1, 9)) <= firsts <= set(range(1, 10)) and max(seconds) == length // 2 - 2
    expected = 1 / 10 + 9 / 10 / (length // 2 - 2)
    assert at_start / 3000 == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("length", [24, 200])
def test_answers_without_looking_have_the_error_that_is_said(length: int) -> None:
    for problem, answer in ((ADDING, 0.5), (TEMPORAL, 0.25)):
        target = problem.draw(length, 20000, generator()).target
        error = (target - answer).square().sum(1).mean().item()
        assert error == pytest.approx(problem.guess(length), rel=0.03)


@pytest.mark.parametrize("length", [problems.SHORTEST, 100])
def test_temporal_order_has_the_class_of_its_two_symbols(length: int) -> None:
    batch = TEMPORAL.draw(length, 2000, generator())
    places: tuple[set[int], set[int]] = (set(), set())
    classes = set()
    for symbols, target in zip(rows_of(batch), batch.target, strict=True):
        assert (symbols.sum(1) == 1).all() and target.sum() == 1
        text = "".join(SYMBOLS[k] for k in symbols.argmax(1))
        assert text[0] == "E" and text[-1] == "B" and set(text[1:-1]) <= set("abcdXY")
        found = [k for k, symbol in enumerate(text) if symbol in "XY"]
        assert len(found) == 2
        for k, place in enumerate(found):
            places[k].add(place)
        pair = text[found[0]] + text[found[1]]
        assert target.argmax() == ("XX", "XY", "YX", "YY").index(pair)
        classes.add(pair)
    assert places[0] == set(range(length // 10, length // 5 + 1))
    assert places[1] == set(range(length // 2, 3 * length // 5 + 1))
    assert len(classes) == 4


# The criterion


def test_criterion_wants_as_many_right_ones_as_its_window() -> None:
    criterion, target = Criterion(ADDING, 100), torch.full((10, 1), 0.5)
    for _ in range(9):
        criterion.add(target + 0.039, target)
        assert not criterion.met
    criterion.add(target - 0.039, target)
    assert criterion.met and criterion.correct == 1
    assert criterion.error == pytest.approx(0.039**2, rel=1e-4)


def test_one_wrong_sequence_is_remembered_for_a_window() -> None:
    criterion, target = Criterion(ADDING, 100), torch.full((10, 1), 0.5)
    wrong = target.clone()
    wrong[9] += 0.041
    criterion.add(wrong, target)
    for _ in range(9):
        criterion.add(target, target)
    assert not criterion.met and criterion.correct == pytest.approx(0.99)
    criterion.add(target, target)  # the wrong one is the 101st from the end
    assert criterion.met


def test_error_is_summed_over_output_units_and_bounded() -> None:
    target = torch.eye(4)
    wanted = Criterion(TEMPORAL, 4)
    assert wanted.add((target - 0.14).abs(), target) == pytest.approx(4 * 0.14**2)
    assert wanted.met
    # Every unit within 0.3, yet the average error is 4 · 0.2² > 0.1.
    wanted = Criterion(TEMPORAL, 4)
    wanted.add((target - 0.2).abs(), target)
    assert wanted.correct == 1 and not wanted.met
    # One unit of one sequence beyond 0.3.
    wanted = Criterion(TEMPORAL, 4)
    output = target.clone()
    output[2, 0] = 0.31
    wanted.add(output, target)
    assert wanted.error < 0.1 and wanted.correct == 0.75 and not wanted.met


# Gradients by lag


@pytest.mark.parametrize("name", ["rnn-1.5", "lstm-1", "gru"])
def test_norms_are_those_of_a_loop_of_pytorch_cells(name: str) -> None:
    size = gradients.Size(inputs=2, hidden=6, lags=7, warm_up=3, networks=1, batch=4)
    torch.manual_seed(3)
    module = gradients.CURVES[name].make(size, generator(3))
    make = {"rnn-1.5": nn.RNNCell, "lstm-1": nn.LSTMCell, "gru": nn.GRUCell}[name]
    cell = make(2, 6, dtype=torch.float64)
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in module.state_dict().items()})
    steps = size.warm_up + size.lags + 1
    input = torch.randn(steps, 4, 2, dtype=torch.float64, generator=generator(4))
    direction = torch.randn(4, 6, dtype=torch.float64, generator=generator(5))
    found = gradients.norms(module, input, direction, size.lags)
    count = 2 if name == "lstm-1" else 1
    for lag in range(size.lags + 1):
        state = [torch.zeros(4, 6, dtype=torch.float64) for _ in range(count)]
        leaves = state
        for t, x in enumerate(input):
            out = cell(x, tuple(state) if count == 2 else state[0])
            state = list(out) if count == 2 else [out]
            if t == steps - 1 - lag:
                leaves = state = [s.detach().requires_grad_() for s in state]
        loss = (direction * state[0]).sum()
        got = torch.autograd.grad(loss, leaves, allow_unused=True)
        expected = torch.cat([g for g in got if g is not None], 1).norm(dim=1)
        torch.testing.assert_close(found[lag], expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(found[0], direction.norm(dim=1))


@pytest.mark.parametrize("radius", [0.5, 1.5])
def test_recurrent_matrix_has_its_radius(radius: float) -> None:
    module = gradients.tanh_rnn(radius)(QUICK_SIZE, generator())
    eigenvalues = torch.linalg.eigvals(module.get_parameter("weight_hh_l0").detach())
    torch.testing.assert_close(eigenvalues.abs(), torch.full((8,), radius, dtype=torch.float64))


def test_summary_is_over_networks_and_inputs() -> None:
    rows = gradients.measure("rnn-0.5", QUICK_SIZE)
    assert [row["lag"] for row in rows] == list(range(QUICK_SIZE.lags + 1))
    assert all(row["log10_p10"] <= row["log10_mean"] <= row["log10_p90"] for row in rows)
    assert rows[0]["log10_mean"] == pytest.approx(0, abs=1e-9)
    assert all(row["log10_p90"] <= row["lag"] * math.log10(0.5) + 1e-9 for row in rows)


@pytest.mark.parametrize(
    "name, first, flipped", [("lstm", 8, False), ("lstm", 0, True), ("lstm1997", 0, True), ("gru", 8, False)]
)
def test_gates_begin_to_keep_for_up_to_the_longest_lag(name: str, first: int, flipped: bool) -> None:
    module = CELLS[name].make(2, 8)
    CELLS[name].begin(module, 50, generator())
    bias = module.get_parameter("bias_ih_l0") + module.get_parameter("bias_hh_l0")
    begun = bias[first : first + 8] * (-1 if flipped else 1)
    assert (begun >= 0).all() and (begun <= math.log(49)).all() and begun.std() > 0.3


def test_update_gate_that_is_open_keeps() -> None:
    size = QUICK_SIZE._replace(lags=10)
    input = torch.randn(11, 3, 2, dtype=torch.float64, generator=generator())
    kept = gradients.norms(gradients.gru(30.0)(size, generator()), input, torch.ones(3, 8, dtype=torch.float64), 10)
    torch.testing.assert_close(kept[-1], kept[0])


# Training


def test_training_ends_when_the_criterion_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROBLEMS, "adding", replace(ADDING, tolerance=2.0, error_limit=2.0))
    job, heard = Job("adding", 24, "lstm", 0), []
    settings = replace(QUICK, window=40)
    run, curve = train.train(job, settings, heard.append)
    assert (run["met"], run["steps"], run["sequences"]) == (1, 3, 48)  # 40 sequences are there after the third 16
    assert heard == [1, 2] and [row["step"] for row in curve] == [3]
    assert run["test_wrong"] == 0 and 0 < run["test_error"] < 1
    assert set(run) == set(RUN_COLUMNS)


def test_training_that_fails_uses_all_steps_and_repeats() -> None:
    job = Job("adding", 24, "rnn", 1)
    first, second = train.train(job, QUICK), train.train(job, QUICK)
    assert (first.run["met"], first.run["steps"]) == (0, 30)
    assert [row["step"] for row in first.curve] == [10, 20, 30]
    assert first.curve == second.curve
    assert "test_wrong" not in first.run


def test_training_learns() -> None:
    """The LSTM of a few units does on short sequences what guessing can't."""
    settings = replace(QUICK, steps=400, batch=32, every=100)
    curve = train.train(Job("temporal-order", 24, "lstm", 0), settings).curve
    assert curve[-1]["error"] < 0.6 * TEMPORAL.guess(24)


def test_a_gradient_that_overflowed_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    run, curve = train.train(Job("adding", 24, "rnn", 0), replace(QUICK, steps=2, every=1))
    assert run["skipped"] == 2 and all(math.isfinite(row["error"]) for row in curve)


def test_rows_of_a_network_dont_see_their_padding() -> None:
    batch = ADDING.draw(40, 5, generator())
    for cell in CELLS.values():
        network = train.Network(cell, ADDING, 8)
        together = network(batch)
        for k, row in enumerate(rows_of(batch)):
            alone = network(Batch(row[:, None], [len(row)], batch.target[k : k + 1]))
            torch.testing.assert_close(together[k : k + 1], alone)


# Whole runs

RUN = ["--quick", "--problems", "adding", "--lengths", "24", "--cells", "rnn", "lstm", "--workers", "1", "--out"]


def test_quick_run_goes_on_and_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, str(tmp_path)]) == 0
    names = {"README.md", "run.json", "gradients.csv", "runs.csv", "curves.csv"}
    images = {"gradients.png", "steps.png", "errors-adding.png"}
    assert {path.name for path in tmp_path.iterdir()} == names | images
    runs = read_csv(tmp_path / "runs.csv")
    assert {(r["problem"], r["length"], r["cell"], r["seed"]) for r in runs} == {
        ("adding", 24, "rnn", 0), ("adding", 24, "lstm", 0)
    }  # fmt: skip
    assert len(read_csv(tmp_path / "curves.csv")) == 6
    assert len(read_csv(tmp_path / "gradients.csv")) == len(gradients.CURVES) * (QUICK_SIZE.lags + 1)
    text = (tmp_path / "README.md").read_text()
    assert "quick run" in text and "Not measured" in text
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["sessions"][0]["command"] == " ".join(["python -m bench.longterm", *RUN, str(tmp_path)])

    # Again there is nothing to do; another seed is added; the report alone writes what it wrote.
    before = (tmp_path / "runs.csv").read_bytes()
    assert main([*RUN, str(tmp_path)]) == 0
    assert (tmp_path / "runs.csv").read_bytes() == before
    assert main([*RUN, str(tmp_path), "--seeds", "0", "5", "--cells", "rnn"]) == 0
    assert [(r["cell"], r["seed"]) for r in read_csv(tmp_path / "runs.csv")][2:] == [("rnn", 5)]
    assert len(load(tmp_path).sessions) == 3
    text = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").unlink()
    assert main(["--report", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "README.md").read_text() == text

    # Other settings don't mix with these.
    capsys.readouterr()
    assert main([*RUN, str(tmp_path), "--steps", "31"]) == 2
    assert "steps 30 (now 31)" in capsys.readouterr().err


def test_interrupted_run_loses_nothing_that_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add = Records.add

    def interrupted(self: Records, outcome: Outcome) -> None:
        add(self, outcome)
        raise KeyboardInterrupt

    monkeypatch.setattr(Records, "add", interrupted)
    assert main([*RUN, str(tmp_path)]) == 130
    assert "goes on" in capsys.readouterr().err
    (first,) = read_csv(tmp_path / "runs.csv")
    monkeypatch.setattr(Records, "add", add)
    assert main([*RUN, str(tmp_path)]) == 0
    runs = read_csv(tmp_path / "runs.csv")
    assert len(runs) == 2 and runs[0] == first


def test_report_without_a_run_and_damaged_files_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--report", "--out", str(tmp_path)]) == 2
    (tmp_path / "run.json").write_text("{")
    assert main(["--report", "--out", str(tmp_path)]) == 2
    assert "damaged" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--lengths", str(problems.SHORTEST - 1)])


# The report


def made_up(met: dict[str, list[int]], tmp_path: Path) -> Records:
    """Adding at T = 200: for each cell whether each seed met the criterion, after 1,000 steps."""
    runs: list[Row] = []
    for cell, seeds in met.items():
        for seed, got in enumerate(seeds):
            run = {**Job("adding", 200, cell, seed)._asdict(), "met": got, "steps": 1000 if got else 4000}
            run |= {"sequences": 32 * run["steps"], "error": 0.001 if got else 0.04, "correct": got, "skipped": 0}
            runs.append(run | {"seconds": 9.0} | ({"test_wrong": seed, "test_error": 1e-4} if got else {}))
    session = {name: "x" for name in ("command", "device", "torch", "triton", "python", "commit", "date")}
    session |= {"workers": 2, "jobs": len(runs), "quick": False}
    return Records(tmp_path, gradients.Size(), train.Settings(), [session], [], runs, [])


@pytest.mark.parametrize(
    "lstm, rnn, verdict",
    [
        ([1, 1, 1], [0, 0, 0], "**Reached**"),
        ([1, 0, 1], [0, 0, 0], "**Not reached**"),
        ([1, 1, 1], [0, 0, 1], "**Not reached**"),
        ([1, 1], [0, 0, 0], "**Not measured**"),
    ],
)
def test_claim_is_judged_by_the_runs(lstm: list[int], rnn: list[int], verdict: str, tmp_path: Path) -> None:
    assert verdict in report.claim(made_up({"lstm": lstm, "rnn": rnn}, tmp_path))


def test_table_says_how_many_met_it_and_how_wrong_they_are(tmp_path: Path) -> None:
    records = made_up({"lstm": [1, 0, 1], "rnn": [0, 0, 0]}, tmp_path)
    text = "\n".join(report.problem_text(records, "adding"))
    assert "| 2 of 3: 1,000 (1,000–1,000) |" in text and "0 of 3 |" in text and " 0, 2 |" in text


def test_plot_marks_what_was_not_met_hollow_at_the_limit(tmp_path: Path) -> None:
    figure = plots.steps_plot(made_up({"lstm": [1, 0, 1], "rnn": [0, 0, 0]}, tmp_path))
    marks = [line for line in figure.axes[0].lines if line.get_marker() not in ("None", "")]
    hollow = [line for line in marks if line.get_markerfacecolor() == "white"]
    assert len(hollow) == 2 and all(list(line.get_ydata()) == [4000] for line in hollow)
    assert [text.get_text() for text in figure.axes[0].texts] == ["3", "1"]
    full = [y for line in marks if line not in hollow for y in line.get_ydata()]
    assert full == [1000, 1000]
    assert "hollow: number of seeds not there in 4,000 steps" in [
        text.get_text() for text in figure.legends[0].get_texts()
    ]
