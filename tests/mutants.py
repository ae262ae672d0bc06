"""Planted errors: each one must make the suite fail.  python -m tests.mutants [NAME ...]

Copies the tree to a temporary directory, edits one text of one file there, rebuilds the extension if that is C++, and
runs the quick tests until one fails; on a CPU without AMX on the AMX build too, where that can be emulated. Ends with 1
if an error survives, or if its place is not found exactly once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from . import amx_without_amx
from .mutant_table import MUTANTS, TRITON_MUTANTS, Mutant

ROOT = Path(__file__).parent.parent
# The quickest to fail first; compiling with inductor, other processes and the tests of this tool find nothing more.
TESTS = [
    "kept",
    "tiles",
    "margins",
    "forms",
    "rows",
    "hyper_parameters",
    "scales",
    "schedules",
    "subcenters",
    "wrappers",
    "modules",
    "pairs",
    "hazards",
    "discontinuities",
    "losses",
    "primitive",
    "heads",
    "state",
    "no_sync",
    "edges",
    "chunks",
    "invariants",
    "functional",
    "promises",
    "determinism",
    "parity",
    "optim",
    "optim_use",
    "deferred",
    "sweep_optim",
    "plan",
]
SELECTION = [*(f"tests/test_{name}.py" for name in TESTS), "-k", "not inductor"]
_INTERPRETED = "tests/gpu_without_gpu/interpreter/test_sweep"
TRITON_SELECTION = [f"{_INTERPRETED}_{name}.py" for name in ("formulas", "edges", "numbers")]
TRITON_SELECTION += ["tests/gpu_without_gpu/interpreter/test_steps.py"]
DISTRIBUTED = [f"tests/distributed/test_{name}.py" for name in ("sharded", "sampling", "collectives", "checkpoints")]
DISTRIBUTED += ["tests/distributed/test_optimizers.py", "tests/distributed/test_processes.py"]
IGNORED = shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", ".*_cache", "*.egg-info")


class Verdict(NamedTuple):
    caught: bool
    how: str  # the test that failed, or what went wrong
    seconds: float


def run(command: list[str], tree: Path, **env: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"} | env
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)


def build(tree: Path, **env: str) -> str:
    """Compiles what changed; the compiler's errors, or ""."""
    done = run([sys.executable, "setup.py", "-q", "build_ext", "--force", "--inplace"], tree, **env)
    errors = re.findall(r".*error.*", done.stdout + done.stderr)
    return "" if done.returncode == 0 else "does not build: " + (errors[0] if errors else done.stderr[-200:])


def first_failure(tree: Path, selection: list[str]) -> str:
    """The first test that fails, "" if all pass, or how pytest ended otherwise."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", "-rfE"]
    done = run([sys.executable, "-m", "pytest", *options, *selection], tree)
    if done.returncode == 0:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if found:
        return found[1]
    if done.returncode < 0 or done.returncode > 5:
        return f"the process ends with {done.returncode}"
    sys.exit(f"pytest did not run (exit {done.returncode}):\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


@contextmanager
def planted(tree: Path, mutant: Mutant) -> Iterator[str]:
    """The tree with the error in it; the value says what is wrong with the table, if anything."""
    path = tree / mutant.file
    text = path.read_text()
    count = text.count(mutant.old)
    if count != 1:
        yield f"its text is there {count} times in {mutant.file}, expected once"
        return
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        yield ""
    finally:
        path.write_text(text)


def judge(tree: Path, mutant: Mutant, selection: list[str]) -> Verdict:
    start = time.monotonic()
    with planted(tree, mutant) as problem:
        if not problem and mutant.file.startswith("csrc/"):
            problem = build(tree)
        how = problem or first_failure(tree, selection)
        if not how and mutant.file.startswith("csrc/cpu/") and not amx_without_amx.why_not():
            problem = build(tree, **amx_without_amx.BUILD)  # the error may be in what only a CPU with AMX runs
            how = problem or first_failure(tree, selection)
    return Verdict(bool(how) and not problem, how or "SURVIVED", time.monotonic() - start)


@contextmanager
def copy_of_the_tree() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fused_margin_mutants_") as folder:
        tree = Path(folder, "tree")
        shutil.copytree(ROOT, tree, ignore=IGNORED)
        setup = tree / "setup.py"
        setup.write_text(setup.read_text().replace('"-O3"', '"-O1"'))  # compiles in half of the time
        yield tree


def survey(mutants: list[Mutant], selection: list[str], check_first: bool = True) -> int:
    """Plants each of the errors in turn and prints what became of it; the number that were not caught."""
    width = max(len(m.name) for m in mutants)
    mutants = sorted(mutants, key=lambda m: m.file.startswith("csrc/"))  # last: an extension stays as it was built
    missed = 0
    with copy_of_the_tree() as tree:
        if any(m.file.startswith("csrc/") for m in mutants):
            print("building the extension of the copy ...", flush=True)
            if problem := build(tree):
                sys.exit(problem)
        if check_first:
            print("running the tests on the copy as it is ...", flush=True)
            if failure := first_failure(tree, selection):
                sys.exit(f"without any planted error {failure} fails: nothing can be learned from the rest")
        for number, mutant in enumerate(mutants, 1):
            its_own = mutant.file.startswith("fused_margin/partial_fc/") and selection is SELECTION
            verdict = judge(tree, mutant, DISTRIBUTED if its_own else selection)
            missed += not verdict.caught
            place = f"{number:3}/{len(mutants)}  {mutant.name:{width}}  {verdict.seconds:5.0f} s"
            print(f"{place}  {verdict.how.removeprefix('tests/')}", flush=True)
    print(f"{len(mutants)} planted errors, {missed} not caught")
    return missed


def main(names: list[str]) -> int:
    known = [m.name for m in (*MUTANTS, *TRITON_MUTANTS)]
    if unknown := set(names) - set(known):
        sys.exit(f"no planted error is called {', '.join(sorted(unknown))}; they are {', '.join(known)}")
    missed = 0
    for mutants, selection in ((MUTANTS, SELECTION), (TRITON_MUTANTS, TRITON_SELECTION)):
        chosen = [m for m in mutants if not names or m.name in names]
        missed += survey(chosen, selection) if chosen else 0
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
