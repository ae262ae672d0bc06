"""The tool that plants errors: its table fits the sources, and it tells a caught error from one that survives."""

import pytest

from . import mutants
from .mutant_table import MUTANTS, TRITON_MUTANTS, Mutant

QUICK = ["tests/test_margins.py", "-k", "value_and_slope or by_hand"]


@pytest.mark.parametrize("mutant", [*MUTANTS, *TRITON_MUTANTS], ids=lambda m: m.name)
def test_place_is_found_once(mutant):
    text = (mutants.ROOT / mutant.file).read_text()
    assert text.count(mutant.old) == 1
    assert mutant.old != mutant.new


def test_names_are_unique():
    every = [*MUTANTS, *TRITON_MUTANTS]
    assert len({m.name for m in every}) == len(every) >= 26


def test_caught_survived_and_misplaced(capsys):
    by_name = {m.name: m for m in MUTANTS}
    harmless = Mutant(
        "harmless", "fused_margin/margins/softmax.py", '"""No margin: the normalised', '"""No margin: a normalised'
    )
    misplaced = Mutant("misplaced", "fused_margin/margins/softmax.py", "no such text", "")
    chosen = [by_name["margin_wrong_by_0_002"], by_name["tail_condition_flipped"], harmless, misplaced]
    assert mutants.survey(chosen, QUICK, check_first=False) == 2
    lines = capsys.readouterr().out.splitlines()
    assert "test_margins.py::test_value_and_slope[cosface]" in lines[0]
    assert "test_margins.py::test_value_and_slope[arcface" in lines[1]
    assert "SURVIVED" in lines[2]
    assert "its text is there 0 times" in lines[3]
    assert lines[4] == "4 planted errors, 2 not caught"


def test_unknown_name():
    with pytest.raises(SystemExit, match="no planted error is called nonsense"):
        mutants.main(["nonsense"])
