"""`fm.check_margin` finds what is wrong with a margin, and the command line says what is there."""

import subprocess
import sys

import pytest
import torch

import fused_margin as fm
from fused_margin.__main__ import main
from fused_margin.check import all_margins, table


def failed(margin):
    return {(r.backend, r.check) for r in fm.check_margin(margin, quick=True) if not r.ok}


def test_a_right_margin_passes():
    results = fm.check_margin(lambda c: torch.cos(fm.safe_angle(c) + 0.3) - 0.1)
    assert {r.check for r in results} == {"gradient", "ends", "float64", "float32", "bfloat16", "float16"}
    assert all(r.ok for r in results), table(results)


def test_a_wrong_slope_is_found():
    """Right values, half of the slope: on every backend, as the slope is the margin's."""
    found = failed(lambda c: 0.5 * c + 0.5 * c.detach() - 0.35)
    assert found >= {(b, "gradient") for b in fm.BACKENDS if not fm.why_not(b)}


def test_a_slope_that_is_infinite_at_the_ends_is_found():
    def plain(cos_y):
        return torch.cos(torch.acos(cos_y) + 0.3)

    bad = [r for r in fm.check_margin(plain, quick=True) if not r.ok]
    assert bad
    assert {r.check for r in bad} == {"ends"}


def test_nan_is_a_failure():
    assert failed(lambda c: torch.where(c > 0, c, torch.nan))


def test_a_missing_backend_is_an_error():
    with pytest.raises(ValueError, match="backend 'tpu' is not present: there is no backend 'tpu'"):
        fm.check_margin(fm.NormFace(), backends=["tpu"])


def test_every_exported_margin_is_checked():
    exported = {getattr(fm, n) for n in fm.__all__ if isinstance(getattr(fm, n), type)}
    margins = {m for m in exported if issubclass(m, fm.Margin)} - {fm.Margin, fm.CustomMargin, fm.StatefulMargin}
    assert margins == {type(m) for m in all_margins()}


def test_command_line_says_what_runs(capsys):
    assert main(["--require", "reference"]) == 0
    out = capsys.readouterr().out
    for name in fm.BACKENDS:
        reasons = fm.why_not(name)
        assert f"{name:10} " + (f"not here: {reasons[0]}" if reasons else "runs: ") in out
    assert main(["--require", "tpu"]) == 1
    assert "required backend tpu cannot run: there is no backend 'tpu'" in capsys.readouterr().err


def test_check_command(capsys, monkeypatch):
    monkeypatch.setattr("fused_margin.__main__.all_margins", lambda: [fm.CosFace(0.35), fm.SVSoftmax(1.2)])
    assert main(["check", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["margin", "backend", "gradient", "ends", "float64", "float32"]
    assert lines[-1].startswith(f"{len(fm.check_margin(fm.CosFace(), quick=True)) * 2} checks, 0 failed.")
    wrong = fm.CustomMargin(lambda c: c.detach())
    monkeypatch.setattr("fused_margin.__main__.all_margins", lambda: [wrong])
    assert main(["check", "--quick"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_console_entry_and_bad_arguments():
    run = subprocess.run([sys.executable, "-m", "fused_margin", "chekc"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "invalid choice: 'chekc'" in run.stderr


@pytest.mark.parametrize("capability", ["portable", "nonsense"])
def test_capability_from_the_environment(capability):
    if fm.why_not("cpu"):
        pytest.skip(f"cpu: {fm.why_not('cpu')}")
    code = "from fused_margin.backends import cpu; print(cpu.path())"
    env = {"FUSED_MARGIN_CPU_CAPABILITY": capability, "PATH": ""}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    expected = "portable, float32: products in float32" if capability == "portable" else "'nonsense' is unknown"
    assert expected in run.stdout
