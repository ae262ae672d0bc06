"""Time and memory of the fused head beside eager PyTorch and torch.compile, ArcFace, forward and backward.

    python -m bench.head            the table of the README; --smoke: small and quick

Repeats are interleaved, so that what disturbs one method disturbs all; ratios are medians of paired repeats. Before any
speed is printed, every method's loss and gradients must agree with eager float32 on the same data.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_margin as fm

DIM, SCALE, MARGIN = 512, 64.0, 0.5
Head = Callable[[Tensor, Tensor, Tensor], Tensor]
CASES = [(128, 100_000, "fp32"), (128, 100_000, "bf16"), (512, 100_000, "fp32"), (512, 100_000, "bf16")]
SMOKE_CASES = [(32, 2_000, "fp32"), (32, 2_000, "bf16")]


def eager(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """The head as people write it today."""
    cos = F.linear(F.normalize(x), F.normalize(w))
    rows = torch.arange(len(labels))
    c = cos[rows, labels].float().clamp(-1 + 1e-6, 1 - 1e-6)
    target = torch.where(c > -math.cos(MARGIN), torch.cos(torch.acos(c) + MARGIN), c - MARGIN * math.sin(MARGIN))
    return F.cross_entropy(SCALE * cos.index_put((rows, labels), target.to(cos.dtype)), labels)


def fused(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return fm.functional.margin_cross_entropy(x, w, labels, fm.ArcFace(MARGIN), scale=SCALE, backend="cpu")


def methods() -> dict[str, Head]:
    return {"eager": eager, "torch.compile": torch.compile(eager, dynamic=False), "fused": fused}


def make(batch: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    w = (torch.randn(classes, DIM, generator=generator) * 0.01).requires_grad_()
    labels = torch.randint(classes, (batch,), generator=generator)
    x = (w.detach()[labels] * 50 + torch.randn(batch, DIM, generator=generator)).requires_grad_()
    return x, w, labels


def step(head: Head, data: tuple[Tensor, Tensor, Tensor], dtype: str) -> tuple[float, Tensor]:
    """Seconds of one forward and backward with fresh gradients, and the loss."""
    x, w, labels = data
    x.grad = w.grad = None
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        loss = head(x, w, labels)
    loss.backward()
    return time.perf_counter() - start, loss.detach()


def disagreement(head: Head, data: tuple[Tensor, Tensor, Tensor], dtype: str, expected: list[Tensor]) -> float:
    """The largest relative error (norm of the difference) of loss, d_x and d_w."""
    _, loss = step(head, data, dtype)
    got = [loss, data[0].grad, data[1].grad]
    return max(float((g.float() - e).norm() / e.norm()) for g, e in zip(got, expected, strict=True))


def rss(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes (Linux)."""
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").open() if line.startswith(key + ":"))


def measure_memory(method: str, batch: int, classes: int, dtype: str) -> float:
    """Peak bytes beyond inputs, weights and the weights' gradient, in a process that does nothing else."""
    head, data = methods()[method], make(batch, classes)
    step(head, make(batch, 1_000), dtype)  # the libraries' own memory
    if method == "torch.compile":
        step(head, data, dtype)  # the compiler's
        data[0].grad = data[1].grad = None
    before = rss("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    step(head, data, dtype)
    return rss("VmHWM") - before - data[1].nbytes


def memory(method: str, batch: int, classes: int, dtype: str) -> float | None:
    """`measure_memory` in a fresh process; None where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", "bench.head", "--memory", method, str(batch), str(classes), dtype]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=True)
    return float(run.stdout.split()[-1])


def run_case(batch: int, classes: int, dtype: str, repeats: int) -> Iterator[str]:
    """The lines of the table of one case."""
    heads, data = methods(), make(batch, classes)
    _, loss = step(eager, data, "fp32")
    expected = [loss, data[0].grad, data[1].grad]
    for name, head in heads.items():
        error = disagreement(head, data, dtype, expected)
        if not error < (1e-4 if dtype == "fp32" else 5e-2):
            raise SystemExit(f"{name}, {batch} x {classes} {dtype}: {error:.1e} off eager float32: no speed")
    times: dict[str, list[float]] = {name: [] for name in heads}
    for _ in range(repeats):
        for name, head in heads.items():
            times[name].append(step(head, data, dtype)[0])
    for name in heads:
        ratio = statistics.median(a / b for a, b in zip(times["eager"], times[name], strict=True))
        used = memory(name, batch, classes, dtype)
        size = "?" if used is None else f"{max(used, 0) / 2**20:.0f} MB"
        seconds = statistics.median(times[name])
        yield f"| {batch} x {classes:,} | {dtype} | {name} | {seconds * 1e3:.0f} ms | {ratio:.1f}x | {size} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.head", description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small and quick: does everything run?")
    parser.add_argument("--repeats", type=int, default=9, help="interleaved repeats (default 9)")
    parser.add_argument("--memory", nargs=4, metavar=("METHOD", "B", "C", "DTYPE"), help="measure one process's memory")
    args = parser.parse_args(argv)
    if args.memory:
        method, batch, classes, dtype = args.memory
        print(measure_memory(method, int(batch), int(classes), dtype))
        return
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: expected at least 1")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, D = {DIM}, {fm.backends.cpu.path()}")
    print("\n| batch x classes | dtype | head | forward + backward | speed | memory |\n|---|---|---|---|---|---|")
    for case in SMOKE_CASES if args.smoke else CASES:
        for line in run_case(*case, repeats=2 if args.smoke else args.repeats):
            print(line, flush=True)


if __name__ == "__main__":
    main()
