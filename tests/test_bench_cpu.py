"""`python -m bench.cpu`: what it measures, its floor, its report and its options."""

import json
import statistics

import pytest
import torch

from bench import cpu, cpu_report, providers
from bench.measure import Call
from bench.shapes import Shape
from lstm_triton import dispatch

RATES = cpu.Rates(flops=1e9, bandwidth=1e8, product="(2, 3) × (3, 4)")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No products of 1024³ and copies of 128 MiB; and two cores wherever the tests run."""
    measure = cpu.Rates.measure
    monkeypatch.setattr(cpu, "_PRODUCTS", ((8, 16, 32),))
    monkeypatch.setattr(cpu.Rates, "measure", lambda seconds: measure(0, copied=4096))
    monkeypatch.setattr(cpu.os, "cpu_count", lambda: 2)


def record(ratio: float, shape: str = "B1-T20-H32", group: str = "inference", **values: object) -> dict:
    """A made-up one."""
    s = Shape.parse(shape)
    found = {
        "threads": 1, "group": group, "backend": "auto", "chosen": "torch", "shape": shape, **vars(s),
        "error": 0.0, "pairs": 7, "floor_s_a_step": 1e-6,
    }  # fmt: skip
    for name, value in (("reference_s", 1e-3), ("ours_s", 1e-3 / ratio), ("ratio", ratio)):
        found |= {f"{name}_q1": 0.99 * value, name: value, f"{name}_q3": 1.01 * value}
    return found | values


def content(*records: dict) -> dict:
    rates = {"1": {"flops": 1e11, "bandwidth": 2e10, "product": "(1, 2) × (2, 3)"}}
    return {"environment": {"device": "Some CPU"}, "rates": rates, "records": list(records), "not_measured": []}


# Measuring


def test_all_cases_are_measured_and_reported(tmp_path, capsys):
    options = "--threads 1,2 --backends auto,eager --seconds 0 --pairs 1 --only B1-T2-H4,B2-T3-H8"
    before = torch.get_num_threads()
    assert cpu.main([*options.split(), "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == before
    found = json.loads((tmp_path / "cpu.json").read_text())
    cases = {(r["threads"], r["group"], r["shape"], r["backend"]) for r in found["records"]}
    assert len(cases) == len(found["records"]) == 2 * 2 * 2 * 2
    assert {r["chosen"] for r in found["records"] if r["backend"] == "eager"} == {"eager"}
    for r in found["records"]:
        assert r["pairs"] == 1 and r["error"] < 1e-4
        assert r["ratio"] == pytest.approx(r["reference_s"] / r["ours_s"])
        assert r["ratio_q1"] == r["ratio"] == r["ratio_q3"] and r["floor_s_a_step"] > 0
    assert set(found["rates"]) == {"1", "2"} and all(r["flops"] > 0 < r["bandwidth"] for r in found["rates"].values())
    assert found["environment"]["command"] == f"python -m bench.cpu {options}"
    names = {"cpu.json", "cpu.md"} | {f"cpu-{kind}-{b}.png" for kind in ("ratio", "time") for b in ("auto", "eager")}
    assert {path.name for path in tmp_path.iterdir()} == names
    text, printed = (tmp_path / "cpu.md").read_text(), capsys.readouterr().out
    for part in ('Backend "eager"', "2 threads", "geometric mean", "H = 8", "*derived*", "`eager` in every case"):
        assert part in text
    assert "geometric mean" in printed and str(tmp_path / "cpu.md") in printed


def test_full_run_has_the_cases_that_the_report_compares():
    assert len(cpu.SHAPES) == 4 * 2 * 6 and Shape(128, 100, 512) in cpu.SHAPES


def test_both_sides_share_weights_and_input(monkeypatch):
    seen = []
    monkeypatch.setattr(cpu, "interleave", lambda a, b, pairs: seen.append((a, b)) or ([2.0, 3.0], [1.0, 1.0]))
    found = cpu.measure(cpu.Case(1, "training step", Shape(2, 3, 4), "eager"), 0, 1)
    (a, b), *_ = seen
    assert a.input is b.input and a.doutput is b.doutput
    assert all(p is q for p, q in zip(a.module.parameters(), b.module.parameters(), strict=True))
    assert (a.provider, type(b.module).__name__, b.module.backend) == (providers.REFERENCE, "TritonLSTM", "eager")
    assert found["ratio"] == 2.5 and found["reference_s"] == 2.5 and found["ours_s"] == 1.0


@pytest.mark.parametrize("name", ["eager", "torch"])
def test_chosen_backend(monkeypatch, name):
    monkeypatch.setattr(dispatch, "why_auto", lambda call: (name, ""))
    for group in cpu_report.GROUPS:
        call = Call(providers.AUTO, Shape(2, 3, 4), group, cpu.CPU)
        assert cpu.chosen(call.module, call.input, group) == name


def test_a_case_that_fails_is_said_and_the_rest_kept(tmp_path, monkeypatch, capsys):
    measure = cpu.measure

    def failing(case, seconds, least):
        if case.group == "inference":
            raise AssertionError("output differs | a lot")
        return measure(case, seconds, least)

    monkeypatch.setattr(cpu, "measure", failing)
    options = ["--threads", "1", "--only", "B1-T2-H4", "--seconds", "0", "--pairs", "1", "--out", str(tmp_path)]
    assert cpu.main(options) == 1
    assert "B1-T2-H4, inference, auto, 1 thread" in capsys.readouterr().out
    assert "output differs \\| a lot" in (tmp_path / "cpu.md").read_text()


def test_of_two_measurements_the_calmer_counts(monkeypatch):
    noisy = record(9.0, "B1-T2-H4", ratio_q3=18.0)
    answers = iter([noisy, record(1.5, "B1-T2-H4", "training step"), record(2.0, "B1-T2-H4")])
    monkeypatch.setattr(cpu, "measure", lambda case, seconds, least: next(answers))
    found = cpu.run([Shape(1, 2, 4)], [1], ["auto"], 0, 1)
    assert [r["ratio"] for r in found["records"]] == [2.0, 1.5]


def test_an_interrupted_run_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cpu, "measure", interrupted)
    (tmp_path / "cpu.json").write_text("that of before")
    before = torch.get_num_threads()
    assert cpu.main(["--threads", "2", "--out", str(tmp_path)]) == 130
    assert [p.read_text() for p in tmp_path.iterdir()] == ["that of before"]
    assert "nothing written" in capsys.readouterr().err and torch.get_num_threads() == before


# The floor


def test_work_of_a_time_step():
    shape = Shape(3, 5, 7)
    assert cpu.work(shape, "inference") == (16 * 3 * 49, pytest.approx(4 * (2 * 3 * 7 + (8 * 49 + 56) / 5)))
    assert cpu.work(shape, "training step") == (48 * 3 * 49, pytest.approx(4 * (16 * 3 * 7 + 3 * (8 * 49 + 56) / 5)))


def test_floor_is_the_longer_of_products_and_memory():
    assert RATES.floor(Shape(100, 100, 64), "inference") == 16 * 100 * 64 * 64 / 1e9
    one = Shape(1, 1, 2)
    assert RATES.floor(one, "training step") == cpu.work(one, "training step")[1] / 1e8


def test_faster_rates():
    other = cpu.Rates(flops=2e9, bandwidth=1e7, product="other")
    assert RATES.or_faster(other) == other.or_faster(RATES) == cpu.Rates(2e9, 1e8, "other")


# The report


def test_summary_of_made_up_numbers():
    records = [
        record(2.0), record(8.0, threads=2), record(0.5, "B1-T20-H64", "training step"),
        record(4.0, "B1-T20-H512", "training step", threads=2),
    ]  # fmt: skip
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in cpu_report.summary(records).splitlines()[2:]]
    low = "B1-T20-H64, training step, 1 thread"
    assert rows == [
        ["all", "4", f"{32**0.25:.3f}", "0.500", low],
        ["inference", "2", "4.000", "2.000", "B1-T20-H32, inference, 1 thread"],
        ["training step", "2", "1.414", "0.500", low],
        ["1 thread", "2", "1.000", "0.500", low],
        ["2 threads", "2", "5.657", "4.000", "B1-T20-H512, training step, 2 threads"],
        ["training step, H ≤ 64", "1", "0.500", "0.500", low],
    ]


def test_noise_is_warned_of():
    calm, noisy = record(2.0), record(2.0, "B8-T20-H32", ratio_q1=1.9, ratio_q3=2.2)
    assert "nowhere above 10%" in cpu_report.noise([calm])
    assert "above 10% in 1 of 2 cases" in cpu_report.noise([calm, noisy])
    assert "B8-T20-H32, inference, 1 thread (15%)" in cpu_report.noise([calm, noisy])
    assert "2.00~" in cpu_report.markdown(content(calm, noisy))


def test_table_of_ratios_and_of_chosen_backends():
    records = [
        record(2.0), record(3.0, group="training step", chosen="triton"), record(0.5, "B8-T100-H64"),
    ]  # fmt: skip
    assert cpu_report.grid(records, lambda r: f"{r['ratio']:.2f}").splitlines()[2:] == [
        "| 1 |  20 | 2.00 / 3.00 |        – |",
        "| 8 | 100 |           – | 0.50 / – |",
    ]
    assert "torch / triton" in cpu_report.markdown(content(*records))


def test_quartiles():
    assert cpu.quartiles([3.0]) == [3.0, 3.0, 3.0]
    assert cpu.quartiles([1.0, 2.0, 3.0, 4.0, 9.0]) == [2.0, 3.0, 4.0]
    assert cpu.quartiles([5.0, 1.0])[1] == statistics.median([5.0, 1.0])


def test_report_is_drawn_again_from_the_file(tmp_path, capsys):
    records = [record(r, f"B{b}-T20-H32", g) for b, r in ((1, 0.2), (8, 9.0)) for g in cpu_report.GROUPS]
    (tmp_path / "cpu.json").write_text(json.dumps(content(*records)))
    (tmp_path / "cpu-ratio-triton.png").touch()
    assert cpu.main(["--draw", "--out", str(tmp_path)]) == 0
    assert "0.200" in capsys.readouterr().out
    for name in ("cpu-ratio-auto.png", "cpu-time-auto.png"):
        drawn = (tmp_path / name).read_bytes()
        assert drawn.startswith(b"\x89PNG") and len(drawn) > 10_000
        assert name in (tmp_path / "cpu.md").read_text()
    assert not (tmp_path / "cpu-ratio-triton.png").exists()  # one of an earlier run


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_report_without_a_result(tmp_path, text, capsys):
    if text is not None:
        (tmp_path / "cpu.json").write_text(text)
    assert cpu.main(["--draw", "--out", str(tmp_path)]) == 1
    assert "cpu.json" in capsys.readouterr().err


# Options


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--threads", "0", "numbers from 1 to 2"),
        ("--threads", "3", "numbers from 1 to 2"),
        ("--threads", "one", "numbers from 1 to 2"),
        ("--backends", "auto,cudnn", "auto, triton, eager, torch, got 'cudnn'"),
        ("--backends", "triton", "cannot be timed here"),
        ("--only", "B1-T2", "lacks H"),
        ("--only", "B1-T2-H3-L2", "one layer, one direction and fp32"),
        ("--seconds", "-1", "--seconds should be at least 0"),
        ("--seconds", "x", "--seconds"),
        ("--pairs", "0", "--pairs at least 1"),
    ],
)
def test_bad_options_are_named(option, value, message, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        cpu.main([f"{option}={value}"])
    assert message in capsys.readouterr().err
