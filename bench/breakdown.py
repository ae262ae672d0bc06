"""Where the time of the fused head goes, as Linux' perf samples it: `python -m bench.breakdown [--write FILE]`.

Samples are taken on every thread while steps (forward and backward, ArcFace, fresh gradients) repeat in this process,
and are sorted by the function that they fall into. With --write, what stands between `<!-- breakdown -->` and
`<!-- /breakdown -->` in FILE is replaced. It needs `perf` and the right to use it.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fused_margin as fm
from fused_margin.backends import cpu
from fused_margin.margins.forms import forms_of
from fused_margin.spec import Need, Spec, Want

from .cases import Case
from .heads import FUSED_MARGINS, OWN, Peers, Run, inputs_of
from .results import machine
from .table import seconds

CASES = [
    Case(64, 1_000),
    Case(128, 100_000),
    Case(512, 100_000),
    Case(128, 1_000_000),
    Case(128, 100_000, dtype="bf16"),
    Case(512, 100_000, dtype="bf16"),
]
# The first pattern that is found in a sample's "library function" names its part.
PARTS = [
    ("products, and what is done while they run", r"multiply_|add_gradient|add_share|compute_cosines"),
    ("rows of w: reading, norms, packing", r"load_tile|pack_row|::put_|sum_of_squares|Loading|Turning"),
    ("exponentials, rule, masks", r"forward_task|backward_task|weigh_"),
    ("page faults", r"\[k\]"),
    ("merging, dX, labels", r"_C\.abi3"),
    ("waiting for the other thread", r"gomp"),
    ("Python and the [B] path", r""),
]


def part_of(sample: str) -> str:
    return next(name for name, pattern in PARTS if re.search(pattern, sample))


def shares(report: str) -> dict[str, float]:
    """Percent of the samples in each part, from what `perf report` prints, a line a function."""
    found: Counter[str] = Counter()
    for line in report.splitlines():
        match = re.match(r"\s*([\d.]+)%\s+(.*)", line)
        if match:
            found[part_of(match[2])] += float(match[1])
    return {name: found[name] for name, _ in PARTS}


def repeat(run: Run, least: float) -> list[float]:
    """Seconds of each step, for about `least` seconds and three steps."""
    taken: list[float] = []
    while sum(taken) < least or len(taken) < 3:
        run.clear()
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return taken


def measure(case: Case, least: float) -> tuple[float, dict[str, float]]:
    """Median seconds of a step, and the percentages of its parts."""
    run = OWN["fused"].build(case, inputs_of(case), Peers())
    repeat(run, 0)
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/perf.data"
        record = ["perf", "record", "-q", "-o", data, "-p", str(os.getpid())]
        with subprocess.Popen(record, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as perf:
            time.sleep(0.5)  # until it samples
            taken = repeat(run, least)
            perf.send_signal(signal.SIGINT)
            complaint = perf.communicate()[1]
        report = ["perf", "report", "-i", data, "--stdio", "--no-children", "--sort", "dso,symbol"]
        said = subprocess.run(report, capture_output=True, text=True)
    found = shares(said.stdout)
    if not sum(found.values()):
        raise RuntimeError(f"perf took no samples: {complaint or said.stderr}")
    return statistics.median(taken), found


class _Empty(torch.autograd.Function):
    """What autograd itself takes for two inputs and one output."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, g):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


def overhead(least: float = 1.0) -> dict[str, float]:
    """Median microseconds of a step that has next to nothing to compute (8 x 16 x 8), and of what it is made of."""
    x, w, labels = inputs_of(Case(8, 16, 8))
    margin, spec = FUSED_MARGINS["arcface"], Spec(num_classes=16, want=Want.DX | Want.DW, backend="cpu")
    head = functools.partial(fm.functional.margin_cross_entropy, margin=margin)
    scale, args, forms = torch.full((8,), 64.0), x.new_empty(0), forms_of(margin).packed()
    with torch.no_grad():
        _, rows, aux, o_red, kept = cpu.sweep_loss(x, w, labels, scale, args, spec, forms, "mean")
    g, sums = rows[:3], (rows[5], None, None, args, rows[3], aux, o_red, o_red[:0, 0], kept)

    def kernels() -> None:
        with torch.no_grad():
            cpu.sweep_loss(x, w, labels, scale, args, spec, forms, "mean")
            cpu.sweep_backward(*g, x, w, labels, scale, *sums, spec, Need.X | Need.W)

    def step(loss: Callable[[], Tensor]) -> None:
        x.grad = w.grad = None
        loss().backward()

    parts = {
        "a step": lambda: step(lambda: head(x, w, labels)),
        "its forward": lambda: head(x, w, labels),
        "the two C++ operators": kernels,
        "an empty autograd function, both ways": lambda: step(lambda: _Empty.apply(x, w)),
    }
    taken: dict[str, list[float]] = {name: [] for name in parts}
    end = time.perf_counter() + least * len(parts)
    while time.perf_counter() < end:  # in turns
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            taken[name].append(time.perf_counter() - start)
    return {name: 1e6 * statistics.median(seconds) for name, seconds in taken.items()}


def table(measured: list[tuple[Case, float, dict[str, float]]]) -> str:
    head = [f"{case.batch} x {case.classes:,}{', bf16' * (case.dtype == 'bf16')}" for case, _, _ in measured]
    lines = [f"| part | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
    lines.append(f"| a step | {' | '.join(seconds(taken) for _, taken, _ in measured)} |")
    for name, _ in PARTS:
        lines.append(f"| {name} | {' | '.join(f'{found[name]:.1f} %' for _, _, found in measured)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.breakdown", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=6, help="of steps for each shape (default 6)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the document whose table is replaced")
    args = parser.parse_args(argv)
    if shutil.which("perf") is None:
        sys.exit("bench.breakdown: there is no perf on PATH; on Debian it is in the package linux-perf")
    measured = [(case, *measure(case, args.seconds)) for case in CASES]
    about = machine("cpu", CASES[0].threads)
    small = "\n".join(f"| {name} | {us:.0f} us |" for name, us in overhead().items())
    small = f"| 8 x 16 x 8, where there is nothing to compute | median |\n|---|---|\n{small}"
    text = f"{table(measured)}\n\n{small}\n\n{about['cpu']}, {CASES[0].threads} threads, commit {about['commit']}.\n"
    print(text)
    if args.write:
        document = args.write.read_text()
        pattern = re.compile(r"(<!-- breakdown -->\n).*?(<!-- /breakdown -->)", re.DOTALL)
        if not pattern.search(document):
            sys.exit(f"bench.breakdown: {args.write} lacks <!-- breakdown --> and <!-- /breakdown -->")
        args.write.write_text(pattern.sub(lambda match: match[1] + text + match[2], document))


if __name__ == "__main__":
    main()
