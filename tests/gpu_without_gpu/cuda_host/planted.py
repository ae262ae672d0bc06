"""Bugs in the kernels themselves, planted in a copy of csrc, and what shows each: numbers, or a sanitizer.

python -m tests.gpu_without_gpu.cuda_host.planted NAME     # the seeds under which NAME gives wrong numbers
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from . import builder


class Planted(NamedTuple):
    file: str  # of csrc/cuda
    old: str  # occurs once
    new: str
    mode: str = "bf16"
    numbers: bool = True  # wrong under some seed
    report: dict[str, str] = {}  # noqa: RUF012 (read only); sanitizer -> what it says


RACE = {"thread": "data race"}
PLANTED = {
    "none": Planted("tile.cuh", "copy_wait<kStages - 2>();", "copy_wait<kStages - 2>();", numbers=False),
    "barrier of a slice removed": Planted(
        "tile.cuh", "} else {\n        __syncthreads();\n", "} else {\n", report=RACE
    ),
    "voting barrier of a slice removed": Planted(
        "tile.cuh", "if (any_of_block(rescaled))", "if (rescaled)", mode="fp16", report=RACE
    ),
    "wait for one group less": Planted("tile.cuh", "copy_wait<kStages - 2>();", "copy_wait<kStages - 1>();"),
    "fetch into what is read": Planted(
        "tile.cuh", "fetch(int((step + kStages - 1) % kStages));", "fetch(stage);", report=RACE
    ),
    "store beyond the end": Planted(
        "forward.cuh", "to[k] = out[k];", "to[k + 1] = out[k];", report={"address": "heap-buffer-overflow"}
    ),
}  # fmt: skip


def sources(name: str) -> dict[Path, Path]:
    """Files of csrc/cuda that are replaced by others."""
    planted = PLANTED[name]
    text = (builder.CSRC / "cuda" / planted.file).read_text()
    assert text.count(planted.old) == 1, f"{planted.file} has {planted.old!r} {text.count(planted.old)} times"
    changed = text.replace(planted.old, planted.new)
    key = hashlib.sha256(builder.headers() + changed.encode()).hexdigest()[:16]
    folder = builder.CACHE / f"planted-{key}"
    shutil.copytree(builder.CSRC, folder, ignore=shutil.ignore_patterns("cpu"), dirs_exist_ok=True)
    (folder / "cuda" / planted.file).write_text(changed)
    operands = planted.mode.replace("fp", "f")
    return {builder.CSRC / "cuda" / f"sweep_{operands}.cu": folder / "cuda" / f"sweep_{operands}.cu"}


def main(name: str) -> None:
    from ... import cases
    from ...error_rule import ErrorRule
    from . import backend

    backend.replaced.update(sources(name))
    problem = cases.problem(cases.MARGINS["normface"], cases.MODES[PLANTED[name].mode], 19, 150, 101)
    exact, plain, wrong = cases.exact(problem), cases.plain(problem), []
    for seed in range(6):
        rule = ErrorRule()
        with backend.simulated(seed, programs=1):
            rule.add_all(cases.run(problem, "cuda"), plain, exact)
        if any(ours.max > 10 * theirs.max or ours.max != ours.max for ours, theirs in rule.errors.values()):
            wrong.append(seed)
    print("wrong under:", wrong)


if __name__ == "__main__":
    main(sys.argv[1])
