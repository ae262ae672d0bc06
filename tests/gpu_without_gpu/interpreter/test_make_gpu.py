"""`make gpu`, rehearsed: parity, then timing, CSV and picture, at tiny sizes; and nothing is timed that is wrong."""

import csv

import pytest

from bench import gate, gpu, optim
from fused_margin.kernels import gradients
from fused_margin.spec import Want

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
    for name in ("parity", "swept_parity", "step_parity", "measure_steps"):
        monkeypatch.setattr(gpu, name, lambda *args: [])
    monkeypatch.setattr(gate, "TOLERANCE", {"fp32": 1e-12, "bf16": 1e-12})
    assert gpu.main(["--rehearse", "--output", str(tmp_path / "gpu.csv")]) == 1
    assert all(row["status"].startswith("red gate") and not row["median_ms"] for row in rows_of(tmp_path / "gpu.csv"))


def test_wrong_steps_stop_all(tmp_path, monkeypatch, capsys):
    for name in ("parity", "swept_parity"):
        monkeypatch.setattr(gpu, name, lambda *args: [])
    monkeypatch.setitem(optim.PAIRS, "adamw", (*optim.PAIRS["adamw"][:3], optim.Training.dense))
    assert gpu.main(["--rehearse", "--output", str(tmp_path / "gpu.csv")]) == 1
    assert "SweepAdamW, products in torch.float32: error" in capsys.readouterr().out


def test_broken_parity_stops_all(tmp_path, monkeypatch):
    plain = cases.plain

    def without_error(p):  # no backend is as good
        return {name: cases.exact(p)[name].to(t.dtype) for name, t in plain(p).items()}

    monkeypatch.setattr(cases, "plain", without_error)
    for name in ("swept_parity", "step_parity"):
        monkeypatch.setattr(gpu, name, lambda *args: [])
    assert gpu.main(["--rehearse", "--output", str(tmp_path / "gpu.csv")]) == 1
    assert not (tmp_path / "gpu.csv").exists()


def test_parity_of_several_chunks(monkeypatch):
    """It has more than one, an index, sub-centres, an offset and the sum of label smoothing; and finds a lost chunk."""
    swept, sweep_chunks = [], gradients._sweep_chunks
    monkeypatch.setattr(gradients, "_sweep_chunks", lambda calls, to: swept.append(calls[0]) or sweep_chunks(calls, to))
    assert not any(failures for _, failures in gpu.swept_parity("cpu", True))
    for call in swept:
        assert call.plan.classes > gradients._CHUNK_ROWS[0]
        assert call.given.index is not None
        assert call.given.bias is not None
        assert call.plan.spec.sub_centers == 2
        assert call.plan.spec.want & Want.SUM
    multiply = gradients.multiply
    monkeypatch.setattr(gradients, "multiply", lambda a, b, out, add: multiply(a, b, out, False))
    assert all(failures for _, failures in gpu.swept_parity("cpu", True))
