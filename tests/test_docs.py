"""What README and docs show runs, and what they name exists."""

import re
from pathlib import Path

import pytest

import fused_margin as fm
from fused_margin.check import all_margins

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
    "document", ["README.md", "docs/losses.md", "docs/adding_a_loss.md", "docs/partial_fc.md", "csrc/README.md"]
)
def test_links_lead_somewhere(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("http") or (path.parent / target).exists(), target


def test_losses_table_lists_every_margin():
    text = (ROOT / "docs/losses.md").read_text()
    for margin in all_margins():
        assert f"`{type(margin).__name__}(" in text


def test_every_row_of_the_losses_has_its_test():
    """The last column names rows of the tests' table, and every one of them is named once."""
    named = []
    for line in (ROOT / "docs/losses.md").read_text().splitlines():
        cells = line.strip("|").split("|")
        if line.startswith("| ") and len(cells) == 7 and cells[0].strip() != "loss":
            tests = re.findall(r"`([^`]+)`", cells[-1])
            assert tests, line
            named += tests
    assert sorted(named) == sorted(LOSSES)


def test_every_loss_of_the_demo_has_its_figures():
    names = re.findall(r'^    "([a-z0-9+-]+)": Entry', (ROOT / "examples/losses.py").read_text(), re.MULTILINE)
    rows = re.findall(r"^\| `([a-z0-9+-]+)` \| [\d.]+% \|", (ROOT / "docs/losses.md").read_text(), re.MULTILINE)
    assert rows == names
    assert len(names) >= 50


def test_adding_a_loss_runs():
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adding_a_loss.md").read_text(), re.DOTALL)
    assert len(snippets) == 3
    exec("\n".join(snippets), {"__name__": "adding_a_loss"})


def test_readme_names_what_exists():
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for name in re.findall(r"`fm\.(\w+)", text):
        assert hasattr(fm, name), name
