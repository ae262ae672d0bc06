"""Time of the fused head beside eager PyTorch and torch.compile: ArcFace, forward and backward, and memory.

    python -m bench.head            the table of the README; --smoke: small and quick

Repeats are interleaved, so that what disturbs one method disturbs all; ratios are medians of paired repeats. Before any
speed is printed, each method's loss and gradients must agree with eager float32 on the same data.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import fused_margin as fm

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from head_cost import HEADS, Size, distance, make_inputs, memory_in_child

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
CASES = [(128, 100_000, "fp32"), (128, 100_000, "bf16"), (512, 100_000, "fp32"), (512, 100_000, "bf16")]
SMOKE_CASES = [(32, 2_000, "fp32"), (32, 2_000, "bf16")]
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # relative, in the 2-norm, of loss and gradients


def methods() -> dict[str, Head]:
    plain = HEADS["plain"]
    return {"eager": plain, "torch.compile": torch.compile(plain, dynamic=False), "fused": HEADS["fused"]}


def step(head: Head, inputs: tuple[Tensor, Tensor, Tensor], dtype: str) -> tuple[float, list[Tensor]]:
    """Seconds of one forward and backward into fresh gradients; loss and gradients."""
    embeddings, weight, labels = inputs
    embeddings.grad = weight.grad = None
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        loss = head(embeddings, weight, labels)
    loss.backward()
    return time.perf_counter() - start, [loss.detach(), embeddings.grad, weight.grad]


def run_case(batch: int, classes: int, dtype: str, repeats: int) -> Iterator[str]:
    """The lines of the table of one case."""
    heads, size = methods(), Size(classes=classes, batch=batch)
    inputs = make_inputs(size)
    expected = step(heads["eager"], inputs, "fp32")[1]
    for name, head in heads.items():
        error = max(distance(g, e) for g, e in zip(step(head, inputs, dtype)[1], expected, strict=True))
        if not error < TOLERANCE[dtype]:
            raise SystemExit(
                f"{name}, {batch} x {classes} {dtype}: {error:.1e} off eager float32, so no speed is shown"
            )
    seconds: dict[str, list[float]] = {name: [] for name in heads}
    for _ in range(repeats):
        for name, head in heads.items():
            seconds[name].append(step(head, inputs, dtype)[0])
    memory = {"eager": "plain", "fused": "fused"} if dtype == "fp32" else {}
    for name in heads:
        ratio = statistics.median(a / b for a, b in zip(seconds["eager"], seconds[name], strict=True))
        beyond = memory_in_child(memory[name], size) if name in memory else None
        used = "" if beyond is None else f"{max(beyond - inputs[1].nbytes, 0) / 2**20:,.0f} MB"
        cells = [
            f"{batch} x {classes:,}",
            dtype,
            name,
            f"{statistics.median(seconds[name]):.3f} s",
            f"{ratio:.1f}x",
            used,
        ]
        yield f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.head", description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small and quick: does everything run?")
    parser.add_argument("--repeats", type=int, default=9, help="interleaved repeats (default 9)")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: expected at least 1")
    threads, path = torch.get_num_threads(), fm.backends.cpu.path()
    print(f"torch {torch.__version__}, {threads} threads, D = {Size().embedding_size}, {path}\n")
    print("| batch x classes | dtype | head | forward + backward | speed | memory beyond dW |")
    print("|---|---|---|---|---|---|")
    for case in SMOKE_CASES if args.smoke else CASES:
        for line in run_case(*case, repeats=2 if args.smoke else args.repeats):
            print(line, flush=True)


if __name__ == "__main__":
    main()
