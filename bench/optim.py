"""`python -m bench.optim`: a training step of the head with its optimizer, SweepSGD beside the dense gradient and
torch.optim.SGD; and the step alone on sampled rows, RowSGD beside the same in torch's operators. Parity first.

Methods take turns, each on the same weight and momentum; memory is the peak of a step, in a process of its own.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import fused_margin as fm

from . import ROOT, results
from .stats import paired, spread
from .timing import timed

MOMENTUM = {"lr": 0.1, "momentum": 0.9}
ADAMW = {"lr": 1e-3, "eps": 1e-6}


class Where(NamedTuple):
    """The device, the backend of the head, and the dtype of its products (None: the weights')."""

    device: str = "cpu"
    backend: str = "cpu"
    operands: torch.dtype | None = None


ON_CPU = Where()


class Training:
    """One weight with its optimizer's state, and a batch; each method takes a step on them."""

    def __init__(
        self, classes: int, dim: int, batch: int, rate: float, dtype: torch.dtype = torch.float32, at: Where = ON_CPU
    ) -> None:
        g = torch.Generator().manual_seed(0)
        self.at = at
        self.w = nn.Parameter(torch.empty(classes, dim, dtype=dtype).normal_(std=0.01, generator=g).to(at.device))
        self.m = torch.zeros_like(self.w)
        self.v, self.steps = None, 0  # AdamW's second moment, made where it is wanted, and its steps
        self.x = torch.randn(batch, dim, generator=g, dtype=dtype).to(at.device).requires_grad_()
        self.labels = torch.randint(classes, (batch,), generator=g).to(at.device)
        self.rows = torch.randperm(classes, generator=g)[: max(1, int(rate * classes))].sort().values.to(at.device)
        self.values = torch.randn(len(self.rows), dim, generator=g, dtype=dtype).to(at.device)

    def _head(self, optimizer: torch.optim.Optimizer, steps: torch.Tensor | None = None) -> None:
        """`steps`: AdamW's count as the optimizer keeps it; without, it has a momentum alone."""
        state = {"momentum_buffer": self.m}
        if steps is not None:
            self.v = torch.zeros_like(self.m) if self.v is None else self.v
            self.steps += 1
            state = {"exp_avg": self.m, "exp_avg_sq": self.v, "step": steps}
        optimizer.state[self.w].update(state)
        fm.margin_cross_entropy(
            self.x, self.w, self.labels, fm.ArcFace(0.5), backend=self.at.backend, compute_dtype=self.at.operands
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
        self.x.grad = None

    def dense(self) -> None:
        self._head(torch.optim.SGD([self.w], foreach=True, **MOMENTUM))

    def sweep(self) -> None:
        self._head(fm.optim.SweepSGD([self.w], **MOMENTUM))

    def dense_adamw(self) -> None:
        self._head(torch.optim.AdamW([self.w], foreach=True, **ADAMW), torch.tensor(float(self.steps)))

    def sweep_adamw(self) -> None:
        steps = torch.full((len(self.w),), float(self.steps), device=self.w.device)
        self._head(fm.optim.SweepAdamW([self.w], **ADAMW), steps)

    def rows_fused(self) -> None:
        optimizer = fm.optim.RowSGD([self.w], **MOMENTUM)
        optimizer.state[self.w]["momentum_buffer"] = self.m
        self.w.grad = torch.sparse_coo_tensor(
            self.rows[None], self.values, self.w.shape, is_coalesced=True, check_invariants=False
        )
        optimizer.step()
        self.w.grad = None

    @torch.no_grad()
    def rows_torch(self) -> None:
        m = self.m.index_select(0, self.rows).mul_(MOMENTUM["momentum"]).add_(self.values)
        self.m.index_copy_(0, self.rows, m)
        self.w.index_add_(0, self.rows, m, alpha=-MOMENTUM["lr"])


PAIRS = {  # the method, and what it is compared with
    "step": ("SweepSGD", Training.sweep, "dense gradient + torch.optim.SGD(foreach)", Training.dense),
    "adamw": (
        "SweepAdamW", Training.sweep_adamw, "dense gradient + torch.optim.AdamW(foreach)", Training.dense_adamw
    ),
    "rows": ("RowSGD on sampled rows", Training.rows_fused, "index_select, index_copy, index_add", Training.rows_torch),
}  # fmt: skip


def parity(kind: str, dtype: torch.dtype = torch.float64, at: Where = ON_CPU, classes: int = 300) -> float:
    """How far the weights are apart after three steps, relative to how far they have gone."""
    ends = []
    for work in (PAIRS[kind][1], PAIRS[kind][3]):
        training = Training(classes, 40, 33, 0.1, dtype, at)
        start = training.w.detach().clone()
        for _ in range(3):
            work(training)
        ends.append((training.w.detach() - start).double())
    return float((ends[0] - ends[1]).norm() / ends[1].norm())


def times(training: Training, kind: str, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each round of the method and of what it is compared with, in turns; before each an untimed step."""
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for seconds, work in zip(found, (PAIRS[kind][1], PAIRS[kind][3]), strict=True):
            work(training)
            seconds.append(timed(lambda work=work: work(training), "cpu"))
    return found


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def peak(work: Callable[[Training], None], size: tuple[int, int, int], rate: float) -> int:
    """Bytes of the second step beyond what was there before it: weights, momentum, batch."""
    work(Training(1000, size[1], size[2], rate))
    training = Training(*size, rate)
    work(training)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work(training)
    return _status("VmHWM") - before


def peak_elsewhere(kind: str, place: int, size: tuple[int, int, int], rate: float, threads: int) -> int:
    job = json.dumps([kind, place, size, rate, threads])
    run = subprocess.run([sys.executable, "-m", "bench.optim", "--job", job], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"the process that measures memory failed: {run.stderr[-500:]}")
    return int(run.stdout)


def measure(kind: str, size: tuple[int, int, int], args: argparse.Namespace) -> list[dict[str, object]]:
    error = parity(kind)
    if not error < 1e-10:
        raise RuntimeError(f"{PAIRS[kind][0]} differs from {PAIRS[kind][2]} by {error:.1e}; no times before they agree")
    peaks = [peak_elsewhere(kind, place, size, args.sample_rate, args.threads) for place in (1, 3)]
    mine, theirs = times(Training(*size, args.sample_rate), kind, args.rounds)
    ratio = paired(theirs, mine)
    rows = []
    for name, seconds, memory, times_as_fast in (
        (PAIRS[kind][2], theirs, peaks[1], None),
        (PAIRS[kind][0], mine, peaks[0], ratio.median),
    ):
        time = spread(seconds)
        rows.append(
            {
                "batch": size[2],
                "classes": size[0],
                "dim": size[1],
                "method": name,
                "median_s": round(time.median, 5),
                "p20_s": round(time.p20, 5),
                "p80_s": round(time.p80, 5),
                "peak_mb": round(memory / 1e6),
                "times_as_fast": times_as_fast and round(times_as_fast, 2),
                "error": f"{error:.0e}",
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.optim", description=__doc__)
    parser.add_argument("--classes", type=lambda t: int(float(t)), nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--sample-rate", type=float, default=0.1, help="of RowSGD's rows (%(default)s)")
    parser.add_argument("--only", choices=PAIRS, nargs="+", default=["step", "rows"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    parser.add_argument("--output", type=Path, help="a CSV beside the table")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.job:
        kind, place, size, rate, threads = json.loads(args.job)
        torch.set_num_threads(threads)
        print(peak(PAIRS[kind][place], tuple(size), rate))
        return 0
    torch.set_num_threads(args.threads)
    header = results.machine("cpu", args.threads)
    print("; ".join(f"{name}: {value}" for name, value in header.items()))
    rows = []
    for classes in args.classes:
        for kind in args.only:
            rows += measure(kind, (classes, args.dim, args.batch), args)
            for row in rows[-2:]:
                print("  ".join(f"{name} {value}" for name, value in row.items() if value is not None), flush=True)
    if args.output:
        with args.output.open("w", newline="") as file:
            file.writelines(f"# {name}: {value}\n" for name, value in header.items())
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
