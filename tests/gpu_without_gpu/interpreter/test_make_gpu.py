"""`make gpu`, rehearsed: parity, then timing, CSV and picture, at tiny sizes; and nothing is timed that is wrong."""

import csv

import pytest

from bench import gate, gpu, optim

from ... import cases

pytestmark = pytest.mark.slow


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(line for line in file if line[0] != "#"))


def test_from_parity_to_picture(tmp_path, capsys):
    assert gpu.main(["--rehearse", "--output", str(tmp_path / "gpu.csv")]) == 0
    rows = rows_of(tmp_path / "gpu.csv")
    names = [f"{pair[place]}, triton" for pair in optim.PAIRS.values() for place in (0, 2)]
    assert [(row["dtype"], row["method"], row["status"]) for row in rows] == [
        ("bf16", "fused", "ok"), ("fp32", "fused", "ok"), *(("bf16", name, "ok") for name in names),
    ]  # fmt: skip
    assert all(float(row["median_ms"]) > 0 for row in rows)
    assert all(float(row["gb_per_s"]) > 0 for row in rows[:2])
    assert (tmp_path / "gpu.png").stat().st_size > 5000
    assert "a rehearsal, no result" in capsys.readouterr().out


def test_wrong_gradients_get_no_time(tmp_path, monkeypatch):
    for name in ("parity", "step_parity", "measure_steps"):
        monkeypatch.setattr(gpu, name, lambda *args: [])
    monkeypatch.setattr(gate, "TOLERANCE", {"fp32": 1e-12, "bf16": 1e-12})
    assert gpu.main(["--rehearse", "--output", str(tmp_path / "gpu.csv")]) == 1
    assert all(row["status"].startswith("red gate") and not row["median_ms"] for row in rows_of(tmp_path / "gpu.csv"))


def test_wrong_steps_stop_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "parity", lambda *args: [])
    monkeypatch.setitem(optim.PAIRS, "adamw", (*optim.PAIRS["adamw"][:3], optim.Training.dense))
    assert gpu.main(["--rehearse", "--output", str(tmp_path / "gpu.csv")]) == 1
    assert "SweepAdamW, products in torch.float32: error" in capsys.readouterr().out


def test_broken_parity_stops_all(tmp_path, monkeypatch):
    plain = cases.plain

    def without_error(p):  # no backend is as good
        return {name: cases.exact(p)[name].to(t.dtype) for name, t in plain(p).items()}

    monkeypatch.setattr(cases, "plain", without_error)
    monkeypatch.setattr(gpu, "step_parity", lambda *args: [])
    assert gpu.main(["--rehearse", "--output", str(tmp_path / "gpu.csv")]) == 1
    assert not (tmp_path / "gpu.csv").exists()
