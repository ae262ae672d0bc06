"""Bugs in the kernels themselves, planted in a copy of csrc, and what shows each: numbers, or a sanitizer.

python -m tests.gpu_without_gpu.cuda_host.planted NAME     # the seeds under which NAME gives wrong numbers, or the
                                                           # tests that it names, if they fail
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
    source: str = ""  # the file to compile, if it is not that of the mode's sweeps
    report: dict[str, str] = {}  # noqa: RUF012 (read only); sanitizer -> what it says
    test: str = ""  # in the place of seeds, the test that fails: FILE -k NAME


def edge(file: str, old: str, new: str, test: str, source: str = "rows.cu") -> Planted:
    return Planted(file, old, new, source=source, test=f"test_sweep_edges.py -k {test}")


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
        "tile.cuh", "fetch_next(stage ? stage - 1 : kStages - 1,", "fetch_next(stage,", report=RACE
    ),
    "store beyond the end": Planted(
        "forward.cuh", "to[k] = out[k];", "to[k + 1] = out[k];", report={"address": "heap-buffer-overflow"}
    ),
    "steps counted by each sub-centre": Planted(
        "update.cuh", "if (source % c.update.together == c.update.together - 1) ", "", source="rows.cu", report=RACE
    ),
    "gradients of earlier calls lost": Planted(
        "row_gradients.cuh", "earlier ? c.earlier + d_w : d_w", "d_w", source="rows.cu"
    ),
    "dampened at first": Planted("update.cuh", "else if (t == 1)", "else if (t == 0)", source="rows.cu"),
    "a weight that changes before the last call has read it": Planted(
        "ops.cpp", "if (made.update && c == calls.back()) {", "if (made.update) {", source="ops.cpp"
    ),
    "float32 sums in one accumulator": Planted(
        "tile.cuh", "float part[4] = {};",
        "float part[4]; for (int i = 0; i < 4; i++) part[i] = acc[m][n][i], acc[m][n][i] = 0;",
        mode="fp32", test="test_sweep_numbers.py -k truncate",
    ),
    "ignored rows take part": edge(
        "row.cuh", "const bool counts = label != p.ignore_index;", "const bool counts = true;", "ignored_rows_that_hold"
    ),
    "mean over all rows": edge("rows.cuh", "share = 1.0 / (valid > 0 ? valid : 1);", "share = 1.0 / p.batch;", "mean"),
    "no unit of the batch": edge(
        "row_gradients.cuh", "p.operand == Storage::f16 ? unit_of_batch(b) : 1.0f", "1.0f", "loss_scale"
    ),
    "no rescaling": edge(
        "tile.cuh", "} else if (top > kMostOverUnit * unit_[i])", "} else if (false)", "powers_of_ten", "sweep_f16.cu"
    ),
    "a clamped norm of w has a slope": edge(
        "row_gradients.cuh", "sqrtf(square) < kEps ? 0.0f : over_warp", "over_warp", "norms and w"
    ),
    "a clamped norm of x has a slope": edge("row.cuh", "sqrtf(square) >= kEps}", "true}", "norms and x"),
    "a signed unit of the batch": edge("row_gradients.cuh", "fabsf(at(b.p.scale, k))", "at(b.p.scale, k)", "negative"),
    "a NaN below all numbers": edge(
        "../codes.h", "return a > b || (a != a && b == b);", "return a > b || b != b;", "center", "sweep_f32.cu"
    ),
    "a row without rivals not set apart": edge(
        "row_gradients.cuh", "if (red == -INFINITY) {", "if (false) {", "minus_infinity"
    ),
    "chunks of 16 bits all at the first one's place": edge(
        "ops.cpp", "first_row * p.dim * size_of(d_w.storage);",
        "first_row * p.dim * (size_of(d_w.storage) & 4);", "several_chunks", "ops.cpp"
    ),
    "copies beyond a row": edge(
        "tile.cuh", "p.dim * size_ % 16 == 0 &&", "true &&", "gap", "sweep_f32.cu"
    ),
    "sums of tiles not compensated": edge(
        "rival.cuh", "low += (total - (sum - part)) + (value - part);", "", "many_tiles", "sweep_f32.cu"
    ),
    "the rest of a log-sum-exp dropped": edge(
        "row_gradients.cuh", " + at(b.red_low, i)))", "))", "large_scales"
    ),
    "the rest of a scale dropped": edge(
        "rows.cuh", "p.constants[p.padded + i] = folded_rest(s, hi);", "p.constants[p.padded + i] = 0;", "large_scales"
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
    source = planted.source or f"sweep_{planted.mode.replace('fp', 'f')}.cu"
    return {builder.CSRC / "cuda" / source: folder / "cuda" / source}


def failing(test: str) -> list[str]:
    """What `FILE -k NAME` names, if a test there fails."""
    import pytest

    file, name = test.split(" -k ")
    folder = "tests/gpu_without_gpu/cuda_host"
    code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--no-header", f"{folder}/{file}", "-k", name])
    assert code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), code
    return [test] if code == pytest.ExitCode.TESTS_FAILED else []


def wrong_head(mode: str, seed: int) -> bool:
    from ... import cases
    from ...error_rule import ErrorRule
    from .backend import simulated

    problem, rule = cases.problem(cases.MARGINS["normface"], cases.MODES[mode], 19, 150, 101), ErrorRule()
    with simulated(seed, programs=1):
        rule.add_all(cases.run(problem, "cuda"), cases.plain(problem), cases.exact(problem))
    return any(ours.max > 10 * theirs.max or ours.max != ours.max for ours, theirs in rule.errors.values())


def wrong_step(seed: int) -> bool:
    from .backend import simulated
    from .test_step_numbers import check, draw

    with simulated(seed, programs=1, chunk=64):
        try:
            check(draw("dampening", batches=(19, 5), classes=100, centers=2, together=2))
        except AssertionError:
            return True
    return False


def main(name: str) -> None:
    from . import backend

    backend.replaced.update(sources(name))
    planted = PLANTED[name]
    if planted.test:
        wrong = failing(planted.test)
    else:
        wrong = [s for s in range(6) if (wrong_step(s) if planted.source else wrong_head(planted.mode, s))]
    print("wrong under:", wrong)


if __name__ == "__main__":
    main(sys.argv[1])
