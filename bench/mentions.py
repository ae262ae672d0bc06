"""Do the methods, axes, cases and modules of the bench exist that the documents and commands name?"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from . import ROOT, cases, results
from .methods import check_names
from .table import section

_COMMAND = re.compile(r"-m (bench(?:\.\w+)*)((?:[ \t]+(?!#)[^\s`;&|]+)*)")


def documents(root: Path = ROOT) -> list[Path]:
    """What may name a method."""
    found = [root / "Makefile", root / ".ci/run", *sorted(root.glob("*.md"))]
    for folder in ("bench", "csrc", "docs", "fused_margin", "tests"):
        found += sorted((root / folder).rglob("*.md"))
    return [path for path in found if path.exists()]


def _options(words: str) -> Iterator[tuple[str, list[str]]]:
    """Options of a command line with their values."""
    for part in re.split(r"(?:^|\s)(?=--)", words):
        name, *values = part.replace("=", " ", 1).split() or [""]
        if name.startswith("--"):
            yield name, [v.strip("'\"") for v in values if "$" not in v and not v.isupper()]


def _wrong_command(module: str, words: str) -> Iterator[str]:
    if importlib.util.find_spec(module) is None:
        yield f"module {module}"
        return
    checks = {
        "--methods": check_names,
        "--axis": lambda values: cases.select(cases.axes(), axis=values),
        "--only": lambda values: cases.select(cases.axes(), only=values),
    }
    for name, values in _options(words):
        try:
            if name in checks and values:
                checks[name](values)
        except ValueError as error:
            yield str(error).split(";")[0]


def _table_names(text: str) -> list[str]:
    """Names in tables of methods: those in the first column under `method`, and in the head of the generated ones."""
    names, in_methods = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            in_methods = False
        elif cells[0] == "method":
            in_methods = True
        elif in_methods:
            names += re.findall(r"^`([\w-]+)`$", cells[0])
    for name, body in section(r"\w+").findall(text):
        heads = re.findall(r"^(\|.*)\n\|[-|: ]+\|$", body, re.MULTILINE) if name in ("summary", "rows") else []
        names += [name for head in heads for name in re.findall(r"`([\w-]+)`", head)]
    return names


def wrong_mentions(root: Path = ROOT) -> list[str]:
    """What is named and not there, each with where."""
    wrong = []
    for path in documents(root):
        text = path.read_text()
        found = [problem for module, words in _COMMAND.findall(text) for problem in _wrong_command(module, words)]
        try:
            check_names(_table_names(text))
        except ValueError as error:
            found.append(str(error).split(";")[0])
        wrong += [f"{path.relative_to(root)}: {problem}" for problem in found]
    for path in sorted((root / "bench/results").glob("*.csv")):
        try:
            check_names(list(dict.fromkeys(row.method for row in results.read(path)[1])))
        except ValueError as error:
            wrong.append(f"{path.relative_to(root)}: {str(error).split(';')[0]}")
    return wrong
