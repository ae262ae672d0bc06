"""A training step of a Partial-FC head, optimizer included, beside InsightFace's PartialFC_V2: one rank, gloo, CPU.

    python -m bench.partial_fc --insightface PATH/recognition/arcface_torch [--classes 200000 1000000] [--rates 1 0.1]

Both heads get the same embeddings and weights. First the losses and gradients must agree, ours taking the classes that
theirs has drawn; then steps are timed in turns, in one process. Memory is counted in a process for each method.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from head_cost import MARGIN, SCALE, PeakMemory
from torch import Tensor, nn

import fused_margin as fm

from . import ROOT
from .gate import TOLERANCE
from .peers import _cuda_is_here, _from_file
from .stats import paired, spread

BATCH, DIM = 128, 512
LR, MOMENTUM = 1e-3, 0.9


class Step:
    """One method's head and optimizer, and a step of both."""

    def __init__(self, head: nn.Module, optimizer: torch.optim.Optimizer, call: Callable[[Tensor, Tensor], Tensor]):
        self.head, self.optimizer, self.call = head, optimizer, call

    def backward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the embeddings' gradient; the weights' is in `head.weight.grad`."""
        self.optimizer.zero_grad(set_to_none=True)
        x = x.detach().requires_grad_()
        loss = self.call(x, labels)
        loss.backward()
        return loss.detach(), x.grad

    def __call__(self, x: Tensor, labels: Tensor) -> None:
        self.backward(x, labels)
        self.optimizer.step()


def ours(optimizer: str, classes: int, rate: float, sparse: bool | None = None) -> Step:
    margin = fm.ArcFace(MARGIN, "raw", gradient="detached")  # theirs computes the angle without gradient
    head = fm.PartialFC(DIM, classes, margin, SCALE, rate, sparse_grad=sparse)
    make = {
        "SweepSGD": lambda p: fm.optim.SweepSGD(p, LR, MOMENTUM),
        "RowSGD": lambda p: fm.optim.RowSGD(p, LR, MOMENTUM),
    }
    own = make.get(optimizer, lambda p: torch.optim.SGD(p, LR, MOMENTUM))
    return Step(head, own([head.weight]), head)


def theirs(folder: Path, classes: int, rate: float) -> Step:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    margin = _from_file(folder / "losses.py").CombinedMarginLoss(SCALE, 1.0, MARGIN, 0.0)
    with torch.device("meta"):
        head = _from_file(folder / "partial_fc_v2.py").PartialFC_V2(margin, DIM, classes, rate)
    head.weight = nn.Parameter(torch.empty(classes, DIM).normal_(std=0.01, generator=torch.Generator().manual_seed(0)))

    def call(x: Tensor, labels: Tensor) -> Tensor:
        with _cuda_is_here("cpu"):
            return head(x, labels.clone())  # it works on the labels in place

    return Step(head, torch.optim.SGD([head.weight], LR, MOMENTUM), call)


OPTIMIZERS = ("RowSGD", "SweepSGD", "SGD")


def methods(rate: float, folder: Path | None, wanted: Sequence[str]) -> dict[str, Callable[[int], Step]]:
    """The peer first, then ours with the optimizers that are wanted: made for it, or torch's on a dense gradient."""
    own = [name for name in (("SweepSGD", "SGD") if rate == 1 else ("RowSGD", "SweepSGD")) if name in wanted]
    found = {
        f"PartialFC, {'torch' if name == 'SGD' else 'fm'}.optim.{name}": partial(
            ours, name, rate=rate, sparse=False if name == "SGD" else None
        )
        for name in own
    }
    if folder is not None:
        found = {"InsightFace, torch.optim.SGD": lambda c: theirs(folder, c, rate)} | found
    return found


def inputs(classes: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, DIM, generator=g), torch.randint(classes, (BATCH,), generator=g)


def parity(peer: Step, own: Step, x: Tensor, labels: Tensor) -> float:
    """The largest relative difference of loss and gradients; raises where the gate is red."""
    loss, d_x = peer.backward(x, labels)
    with torch.no_grad():
        own.head.weight.copy_(peer.head.weight)
    index = getattr(peer.head, "weight_index", None)
    if index is not None:
        own.head._sample = lambda *_: index
    mine, mine_d_x = own.backward(x, labels)
    pairs = [(mine, loss), (mine_d_x, d_x)]
    grad = own.head.weight.grad
    if grad.is_sparse:
        rows = grad.coalesce()
        pairs.append((rows.values(), peer.head.weight.grad[rows.indices()[0]]))
    elif type(grad) is Tensor:
        pairs.append((grad, peer.head.weight.grad))
    found = [float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)) for a, b in pairs]
    if not max(found) <= TOLERANCE["fp32"]:
        raise SystemExit(f"red gate: loss and gradients differ by {found}; nothing is timed")
    own.optimizer.zero_grad(set_to_none=True)
    own.head.__dict__.pop("_sample", None)
    return max(found)


def timed(classes: int, rate: float, options: argparse.Namespace) -> None:
    """Prints the times of one case."""
    x, labels = inputs(classes)
    folder = options.insightface
    steps = {name: make(classes) for name, make in methods(rate, folder, options.optimizers).items()}
    names = list(steps)
    if folder is not None:
        for name in names[1:]:
            worst = parity(steps[names[0]], steps[name], x, labels)
            print(f"  gate: {name} is {worst:.1e} off InsightFace", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(options.rounds + 1):
        for name in names if number % 2 else reversed(names):
            start = time.perf_counter()
            steps[name](x, labels)
            if number:  # the first one makes the momentum
                seconds[name].append(time.perf_counter() - start)
    for name in names:
        ratio = ""
        if name != names[0] and folder is not None:
            low = paired(seconds[names[0]], seconds[name])
            ratio = f"  {low.median:5.1f}x as fast ({low.p20:.1f} to {low.p80:.1f})"
        print(f"  {name:32} {spread(seconds[name]).median:8.3f} s a step{ratio}", flush=True)


def peak(name: str, classes: int, rate: float, folder: Path | None) -> None:
    """The child: prints the bytes that a step takes beyond weights and momentum."""
    step, (x, labels) = methods(rate, folder, OPTIMIZERS)[name](classes), inputs(classes)
    step(x, labels)
    step.optimizer.zero_grad(set_to_none=True)
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    memory = PeakMemory()
    before = memory.restart()
    step(x, labels)
    print(json.dumps(memory.read() - before))


def peaks(classes: int, rate: float, options: argparse.Namespace) -> None:
    found = {}
    for name in methods(rate, options.insightface, options.optimizers):
        command = [
            sys.executable,
            "-m",
            "bench.partial_fc",
            "--peak",
            name,
            "--classes",
            str(classes),
            "--rates",
            str(rate),
        ]
        command += ["--insightface", str(options.insightface)] if options.insightface else []
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        found[name] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else math.nan
    first = next(iter(found.values()))
    for name, size in found.items():
        part = f"  {size / first:6.1%} of the first" if size is not first else ""
        print(f"  {name:32} {size / 1e6:8.0f} MB beyond weights and momentum{part}", flush=True)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--insightface", type=Path, metavar="PATH", help="its folder recognition/arcface_torch")
    p.add_argument("--classes", type=int, nargs="+", default=[200_000])
    p.add_argument("--rates", type=float, nargs="+", default=[1.0, 0.1])
    p.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS, help="of ours (default: all)")
    p.add_argument("--rounds", type=int, default=3, help="steps of each method (default: 3)")
    p.add_argument("--peak", help=argparse.SUPPRESS)
    options = p.parse_args(argv)
    if options.insightface is not None and not (options.insightface / "partial_fc_v2.py").exists():
        p.error(f"--insightface {options.insightface}: no partial_fc_v2.py there")
    if options.peak:
        peak(options.peak, options.classes[0], options.rates[0], options.insightface)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {BATCH}, dimension {DIM}, float32")
    for classes in options.classes:
        for rate in options.rates:
            print(f"{classes:,} classes, sample rate {rate:g}", flush=True)
            timed(classes, rate, options)
            peaks(classes, rate, options)


if __name__ == "__main__":
    main()
