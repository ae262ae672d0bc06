"""What README and docs show runs, and what they name exists."""

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fused_margin as fm
from fused_margin.check import all_margins

from . import test_hazards, test_losses
from .loss_table import LOSSES

ROOT = Path(__file__).parent.parent


def test_readme_snippets_run(capsys):
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(snippets) >= 3
    scope = {}
    for snippet in snippets:  # in one scope, as a reader would type them
        exec(snippet, scope)
    assert "torch.Size([32])" in capsys.readouterr().out
    assert scope["head"].weight.grad.shape == (100_000, 512)


@pytest.mark.parametrize(
    "document",
    ["README.md", "CONTRIBUTING.md", "docs/losses.md", "docs/adding_a_loss.md", "docs/partial_fc.md", "csrc/README.md"],
)
def test_links_lead_somewhere(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("http") or (path.parent / target).exists(), target


def test_losses_table_lists_every_margin():
    text = (ROOT / "docs/losses.md").read_text()
    for margin in all_margins():
        assert f"`{type(margin).__name__}(" in text


class Row(NamedTuple):
    """A row of the tables of docs/losses.md that name a test and a demo."""

    section: str
    loss: str
    tests: list[str]
    demos: list[str]


def loss_rows() -> list[Row]:
    rows, section, listed = [], "", False
    for line in (ROOT / "docs/losses.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        section = line.strip("# ") if line.startswith("#") else section
        if not line.startswith("|"):
            listed = False
        elif cells[-2:] == ["test", "demo"]:
            listed, width = True, len(cells)
        elif listed and set(line) != {"|", "-"}:
            assert len(cells) == width, line
            rows.append(Row(section, cells[0], *(re.findall(r"`([^`]+)`", cell) for cell in cells[-2:])))
    return rows


@pytest.fixture
def demo_losses(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    yield importlib.import_module("losses")
    sys.modules.pop("losses")


def test_every_row_of_the_losses_has_its_test():
    """Those of the tests' table are named once; the other names are functions of the tests."""
    rows = loss_rows()
    assert len({row.section for row in rows}) == 7
    assert all(row.tests for row in rows)
    named = [name for row in rows for name in row.tests]
    assert sorted(name for name in named if not name.startswith("test_")) == sorted(LOSSES)
    code = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in named:
        assert not name.startswith("test_") or f"\ndef {name}(" in code, name


def test_every_pair_loss_has_its_row():
    rows = [row.loss for row in loss_rows() if row.section.startswith("Pairs")]
    pairs = [n for n, f in vars(fm.pairs).items() if inspect.isfunction(f) and f.__module__ == fm.pairs.__name__]
    public = [f"pairs.{name}" for name in pairs if not name.startswith("_")]
    assert sorted(re.match(r"`([\w.]+)\(", row).group(1) for row in rows) == sorted(["CenterLoss", *public])


def test_every_row_of_the_losses_has_its_demo(demo_losses):
    """Each loss of the demo is named in one row; a name that tests and demo share stands in the same one."""
    rows = loss_rows()
    for row in rows:
        assert row.demos or row.section.startswith("Row extras"), row
        assert not {name for name in row.tests if name in demo_losses.LOSSES} - set(row.demos), row
    assert sorted(name for row in rows for name in row.demos) == sorted(demo_losses.LOSSES)


def test_every_loss_of_the_demo_has_its_figures(demo_losses):
    """With the numbers that it is trained with, as the demo has them now; `compare_losses.py --write` states them."""
    text = (ROOT / "docs/losses.md").read_text().partition("| loss | trained as |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `([a-z0-9+-]+)` \| `(.*)` \| (?:[\d.]+% \||not run)", text, re.MULTILINE)
    assert rows == [(name, demo_losses.Loss(name).described(600)) for name in demo_losses.LOSSES]


def test_parameters_that_learn_get_a_gradient():
    """Those that docs/losses.md names, one value a class; those that it says are one number refuse to."""
    text = (ROOT / "docs/losses.md").read_text().partition("**Parameters** of a target")[2].partition("\n## ")[0]
    listed, _, others = text.partition("- the scale")
    found = {name: re.findall(r"\w+", names) for name, names in re.findall(r"`(\w+)`: ([\w, ]+)", listed)}
    assert len(found) >= 13
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(7, 6, generator=g).double(), torch.randn(9, 6, generator=g).double()
    for name, parameters in found.items():
        for parameter in parameters:
            fixed = {"version": 1} if name == "SphereFaceR" else {}
            start = getattr(getattr(fm, name)(**fixed), parameter)
            learned = torch.full((9,), float(start) + 0.01, dtype=torch.float64, requires_grad=True)
            margin = getattr(fm, name)(**fixed, **{parameter: learned})
            raw = {"normalize_embeddings": False, "normalize_weight": False} if margin.products else {}
            loss = fm.margin_cross_entropy(
                x, w, torch.arange(7), margin, scale=1.0 if raw else 8.0, backend="reference", **raw
            )
            (grad,) = torch.autograd.grad(loss, learned)
            assert grad[:7].any(), (name, parameter)
    learned = torch.tensor(0.3, requires_grad=True)
    for name, options in (
        *((n, {"m": learned}) for n in ("CurricularFace", "AdaFace", "ElasticFace", "CircleLoss")),
        ("UniFace", {"num_classes": 9, "m": learned}),
        *(("EqM", {n: learned}) for n in ("t1", "t2", "offset")),
    ):
        assert f"`{name}`" in others
        with pytest.raises(TypeError, match="asks for a gradient"):
            getattr(fm, name)(**options)


def test_adding_a_loss_runs():
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adding_a_loss.md").read_text(), re.DOTALL)
    assert len(snippets) == 4
    try:
        exec("\n".join(snippets), {"__name__": "adding_a_loss"})
        for backend in [b for b in ("cpu", "reference") if not fm.why_not(b)]:
            for mode in test_losses.MODES.values():
                test_losses.check("shrinking", mode, backend, "exact", 1 if mode.operands is None else 4)
            test_losses.test_detached("shrinking", backend)
            test_losses.test_gradcheck("shrinking", backend)
        test_hazards.test_a_nan_row_shows_and_spoils_no_other("shrinking", torch.nan)
    finally:
        LOSSES.pop("shrinking", None)


def test_readme_names_what_exists():
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for name in re.findall(r"`fm\.(\w+)", text):
        assert hasattr(fm, name), name
