"""`python -m bench.long`: what it measures, its aims, its report and its options."""

import json
import subprocess

import pytest
import torch

from bench import long, long_report, memory, providers
from bench.measure import Call
from bench.shapes import Shape

CPU = torch.device("cpu")
QUICK = "--device cpu --threads 1 --seconds 0 --pairs 1"


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Few rows and units, two cores wherever the tests run, and no processes for peaks: those are tested apart."""
    monkeypatch.setattr(long, "BATCH", 2)
    monkeypatch.setattr(long, "HIDDEN", 8)
    monkeypatch.setattr(long.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(memory, "peak_bytes", lambda provider, shape, device: (2**20 * shape.steps, "resident"))
    step = {"seconds": 3.0, "peak_bytes": 2**22, "peak_kind": "resident", "finite": True}
    monkeypatch.setattr(memory, "alone", lambda provider, shape, device: dict(step))


def record(steps: int, provider: str, layers: int = 1, **values: object) -> dict:
    """A made-up one: ours take 1.2 times as long as `nn.LSTM`, recomputing keeps a 200th."""
    shape = Shape(8, steps, 256, layers)
    kept = {providers.REFERENCE: 1.0, providers.AUTO: 0.33, providers.RECOMPUTE: 0.005}[provider]
    size = 124_000 * steps * layers
    found = long._named(long.Case(shape, provider), CPU)
    found |= {"kept_bytes": int(kept * size), "peak_bytes": int((kept + 0.12) * size), "peak_kind": "resident"}
    if provider != providers.REFERENCE:
        found |= {"error": 1e-6, "chosen": "triton", "pairs": 5}
        for name, value in (("reference_s", 1e-4 * steps), ("ours_s", 1.2e-4 * steps), ("ratio", 1.2)):
            found |= {f"{name}_q1": 0.97 * value, name: value, f"{name}_q3": 1.02 * value}
    return found | values


def longest(**values: object) -> dict:
    found = long._named(long.Case(Shape(8, 65536, 256), providers.RECOMPUTE), CPU)
    found |= {"seconds": 31.0, "peak_bytes": 2**30, "peak_kind": "resident", "finite": True, "kept_bytes": 2**24}
    return found | {"predicted_reference": {"kept_bytes": 2**33, "from_steps": 16384}} | values


def content(*records: dict, **values: object) -> dict:
    found = {"environment": {"device": "Some CPU"}, "records": list(records), "longest": longest(), "not_measured": []}
    return found | values


FULL = [record(t, p, n) for t in long.STEPS for n in (1, 2) if n == 1 or t < 16384 for p in long_report.PROVIDERS]


# Measuring


def test_full_run_has_the_cases_that_the_report_compares():
    found = {(c.shape.steps, c.shape.layers, c.provider) for c in long.cases(long.STEPS)}
    wanted = [(256, 1), (256, 2), (1024, 1), (1024, 2), (4096, 1), (4096, 2), (16384, 1)]
    assert found == {(*case, provider) for case in wanted for provider in long_report.PROVIDERS}
    assert {(long_report.AIM_STEPS, aim.layers, aim.provider) for aim in long_report.AIMS} <= found


def test_all_cases_are_measured_and_reported(tmp_path, capsys):
    before = torch.get_num_threads()
    assert long.main([*QUICK.split(), "--only", "3,5", "--longest", "7", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == before
    found = json.loads((tmp_path / "long.json").read_text())
    cases = [(r["steps"], r["layers"], r["provider"]) for r in found["records"]]
    assert cases == [(t, n, p) for t in (3, 5) for n in (1, 2) for p in long_report.PROVIDERS]
    for r in found["records"]:
        assert (r["batch"], r["hidden"], r["peak_bytes"], r["peak_kind"]) == (2, 8, 2**20 * r["steps"], "resident")
        assert ("ratio" in r) == (r["provider"] != providers.REFERENCE)
        if "ratio" in r:
            assert r["pairs"] == 1 and r["error"] < 1e-4 and r["chosen"] in ("torch", "triton", "eager")
            assert r["ratio"] == pytest.approx(r["ours_s"] / r["reference_s"])
            assert r["ratio_q1"] == r["ratio"] == r["ratio_q3"]
    by_case = dict(zip(cases, found["records"], strict=True))
    assert by_case[5, 1, providers.REFERENCE]["kept_bytes"] > by_case[5, 1, providers.RECOMPUTE]["kept_bytes"] > 0
    assert found["longest"]["steps"] == 7 and found["longest"]["kept_bytes"] > 0 and found["longest"]["seconds"] == 3
    kept = by_case[5, 1, providers.REFERENCE]["kept_bytes"]
    assert found["longest"]["predicted_reference"] == {"kept_bytes": round(kept * 7 / 5), "from_steps": 5}
    assert found["environment"]["command"] == f"python -m bench.long {QUICK} --longest 7 --only 3,5"
    assert found["environment"]["threads"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"long.json", "long.md", "long.png"}
    printed = capsys.readouterr().out
    assert "not measured" in printed and str(tmp_path / "long.md") in printed  # no T = 4,096, so no aim


def test_both_sides_share_weights_and_input(monkeypatch):
    seen = []
    monkeypatch.setattr(long, "interleave", lambda a, b, pairs: seen.append((a, b)) or ([2.0, 2.0], [1.0, 4.0]))
    found = long.measure(long.Case(Shape(2, 3, 4), providers.RECOMPUTE), CPU, 0, 1)
    ((a, b),) = seen
    assert a.input is b.input and a.doutput is b.doutput
    assert all(p is q for p, q in zip(a.module.parameters(), b.module.parameters(), strict=True))
    assert (a.provider, type(b.module).__name__, b.module.recompute) == (providers.REFERENCE, "TritonLSTM", True)
    assert (found["ratio"], found["reference_s"], found["ours_s"]) == (1.25, 2.0, 2.5)


def test_recompute_is_measured_for_memory_alone():
    assert providers.RECOMPUTE in providers.available(CPU, providers.OF_MEMORY)
    assert providers.RECOMPUTE not in providers.available(CPU)
    assert providers.label(providers.RECOMPUTE, "cpu") == "TritonLSTM (auto, recompute)"


def test_recompute_passes_the_check(device):
    for group in ("training step", "inference"):
        Call(providers.RECOMPUTE, Shape(2, 5, 8, layers=2), group, device).check()


def test_a_step_in_a_fresh_process(monkeypatch):
    monkeypatch.undo()
    found = memory.alone(providers.RECOMPUTE, Shape(16, 300, 64), CPU)
    size = 16 * 300 * 64 * 4  # of the output, and of the gradient of the input
    assert found["finite"] and found["seconds"] > 0 and 1.5 * size < found["peak_bytes"] < 2**27


def test_what_fails_is_said_and_the_rest_kept(tmp_path, monkeypatch, capsys):
    measure = long.measure

    def failing(case, device, seconds, least):
        if case.provider == providers.AUTO:
            raise AssertionError("output differs | a lot")
        return measure(case, device, seconds, least)

    def hanging(provider, shape, device):
        raise subprocess.TimeoutExpired(["python"], 600)

    monkeypatch.setattr(long, "measure", failing)
    monkeypatch.setattr(memory, "alone", hanging)
    assert long.main([*QUICK.split(), "--only", "3", "--longest", "7", "--out", str(tmp_path)]) == 1
    assert "B2-T3-H8-L2, TritonLSTM-auto" in capsys.readouterr().out
    text = (tmp_path / "long.md").read_text()
    assert "output differs \\| a lot" in text and "T = 7 with recompute" in text and "timed out" in text
    assert len(json.loads((tmp_path / "long.json").read_text())["records"]) == 4


def test_without_time_nothing_is_started(tmp_path):
    assert long.main([*QUICK.split(), "--only", "3", "--time-limit", "-1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "long.json").read_text())
    assert not found["records"] and found["longest"] is None
    assert {(x["outcome"], x["why"]) for x in found["not_measured"]} == {("skipped", "no time left (--time-limit)")}
    assert {path.name for path in tmp_path.iterdir()} == {"long.json", "long.md"}


def test_an_interrupted_run_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(long, "measure", interrupted)
    (tmp_path / "long.json").write_text("that of before")
    before = torch.get_num_threads()
    assert long.main(["--device", "cpu", "--threads", "2", "--out", str(tmp_path)]) == 130
    assert [p.read_text() for p in tmp_path.iterdir()] == ["that of before"]
    assert "nothing written" in capsys.readouterr().err and torch.get_num_threads() == before


# The report


def verdicts(found: dict) -> list[str]:
    return [line.split("|")[-2].strip() for line in long_report.aims(found).splitlines()[2:]]


def test_aims_reached_missed_and_not_measured():
    assert verdicts(content(*FULL)) == ["yes"] * 9
    others = [r for r in FULL if (r["provider"], r["steps"], r["layers"]) != (providers.RECOMPUTE, 4096, 1)]
    slow = record(4096, providers.RECOMPUTE, ratio=1.36, kept_bytes=FULL[0]["kept_bytes"] * 16 // 99)
    assert verdicts(content(slow, *others))[::2] == ["**no**", "yes", "**no**", "yes", "yes"]
    assert verdicts(content(*others, longest=None)) == ["not measured", "yes"] * 3 + ["yes", "yes", "not measured"]
    assert verdicts(content(longest=longest(finite=False)))[-1] == "**no**"
    assert long_report.failed(content(longest=longest(finite=False))) and not long_report.failed(content(*FULL))


def test_predicted_and_measured_have_columns_of_their_own():
    text = long_report.markdown(content(*FULL))
    head, _, row = (line for line in text.split("## A longer sequence")[1].splitlines() if line.startswith("|"))
    cells = dict(zip(*([c.strip() for c in line.split("|")[1:-1]] for line in (head, row)), strict=True))
    assert cells["nn.LSTM would keep, MiB (*predicted*)"] == "8,192.0"
    assert (cells["peak resident, MiB"], cells["kept, MiB"], cells["gradients"]) == ("1,024.0", "16.0", "finite")
    assert text.count("8,192.0") == 1


def test_relative_to_the_reference_of_the_same_shape():
    one, two = record(256, providers.AUTO), record(256, providers.AUTO, 2)
    assert long_report.relative(FULL, one, "kept_bytes") == pytest.approx(0.33, abs=1e-4)
    assert long_report.relative(FULL, two, "ratio") == 1.2
    assert long_report.relative([one], one, "kept_bytes") is None
    assert long_report.relative(FULL, FULL[0], "ratio") is None


@pytest.mark.parametrize("found", [content(*FULL), content(*FULL[:3], longest=None), content(FULL[0])])
def test_report_is_drawn_again_from_the_file(tmp_path, found, capsys):
    (tmp_path / "long.json").write_text(json.dumps(found))
    assert long.main(["--draw", "--out", str(tmp_path)]) == 0
    assert "recompute=True" in capsys.readouterr().out
    drawn = (tmp_path / "long.png").read_bytes()
    assert drawn.startswith(b"\x89PNG") and len(drawn) > 10_000
    assert "long.png" in (tmp_path / "long.md").read_text()


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_report_without_a_result(tmp_path, text, capsys):
    if text is not None:
        (tmp_path / "long.json").write_text(text)
    assert long.main(["--draw", "--out", str(tmp_path)]) == 1
    assert "long.json" in capsys.readouterr().err


# Options


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--only", "256,0", "whole number of at least 1, got '0'"),
        ("--only", "", "whole number"),
        ("--longest", "-1", "--longest should be at least 0"),
        ("--seconds", "-1", "--seconds"),
        ("--pairs", "0", "whole number"),
        ("--threads", "3", "at most 2, this machine's cores"),
        ("--device", "tpu", "cpu or cuda, got 'tpu'"),
        ("--device", "cuda", "finds no GPU"),
    ],
)
def test_bad_options_are_named(option, value, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        long.main([f"{option}={value}"])
    assert message in capsys.readouterr().err
