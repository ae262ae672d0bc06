"""Time and memory of one head, forward and backward, at many classes: plain PyTorch against the fused sweep.

Memory is measured in a fresh process for each head, which is this file run as a script.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_margin as fm

MARGIN, SCALE = 0.5, 64.0
DRAWN_ROWS = 131_072


def arcface(cos_y: Tensor) -> Tensor:
    """ArcFace's margin on the cosines of the targets."""
    return torch.cos(torch.acos(cos_y.clamp(-1 + 1e-7, 1 - 1e-7)) + MARGIN)


def plain_head(
    embeddings: Tensor, weight: Tensor, labels: Tensor, target: Callable[[Tensor], Tensor] = arcface
) -> Tensor:
    """A head with a margin on the target as most people write it today."""
    cosines = F.linear(F.normalize(embeddings), F.normalize(weight))
    cos_y = cosines.gather(1, labels[:, None])
    logits = SCALE * cosines.scatter(1, labels[:, None], target(cos_y))
    return F.cross_entropy(logits, labels)


def fused_head(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same by fused_margin."""
    return fm.functional.margin_cross_entropy(embeddings, weight, labels, fm.ArcFace(MARGIN), scale=SCALE)


HEADS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"plain": plain_head, "fused": fused_head}


@dataclass(frozen=True)
class Size:
    """Size of the measured head, and how often it is timed."""

    classes: int = 100_000
    batch: int = 128
    embedding_size: int = 512
    repeats: int = 9

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in float32, and of their gradient."""
        return self.classes * self.embedding_size * 4


@dataclass
class HeadCost:
    """What the two heads cost, by the keys of HEADS, and how far their results are apart."""

    size: Size
    loss_difference: float  # relative
    gradient_difference: float  # relative, in the 2-norm, the larger of the two gradients'
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in HEADS})
    memory: dict[str, int | None] = field(default_factory=dict)  # bytes beyond inputs and weights

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    @property
    def speedup(self) -> float:
        """The median of the ratios of neighbours in time."""
        return statistics.median(p / f for p, f in zip(self.seconds["plain"], self.seconds["fused"], strict=True))


def make_inputs(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Random embeddings [B, D], weight [C, D] and labels [B]."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(size.batch, size.embedding_size, generator=generator)
    weight = torch.empty(size.classes, size.embedding_size)
    block = weight[:DRAWN_ROWS].normal_(0, 0.01, generator=generator)
    for number, first in enumerate(range(DRAWN_ROWS, size.classes, DRAWN_ROWS), 1):
        rows = weight[first : first + DRAWN_ROWS]  # the rows drawn, turned: millions are slow to draw
        rows.copy_(block[: len(rows)].roll(number, dims=1))
    labels = torch.randint(size.classes, [size.batch], generator=generator)
    return embeddings.requires_grad_(), weight.requires_grad_(), labels


def step(name: str, embeddings: Tensor, weight: Tensor, labels: Tensor) -> tuple[float, float]:
    """Forward and backward into fresh gradients: the loss, and the seconds it took."""
    embeddings.grad = weight.grad = None
    start = time.perf_counter()
    loss = HEADS[name](embeddings, weight, labels)
    loss.backward()
    return loss.item(), time.perf_counter() - start


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def measure(size: Size, progress: Callable[[], object] = lambda: None) -> HeadCost:
    """Compare results, then time the heads in turns, then measure memory; `progress` is called repeats + 2 times."""
    inputs = make_inputs(size)
    results = {name: (step(name, *inputs)[0], inputs[0].grad, inputs[1].grad) for name in HEADS}
    plain, fused = results["plain"], results["fused"]
    cost = HeadCost(
        size,
        loss_difference=abs(fused[0] - plain[0]) / abs(plain[0]),
        gradient_difference=max(distance(fused[1], plain[1]), distance(fused[2], plain[2])),
    )
    del results, plain, fused
    for repeat in range(size.repeats):
        for name in HEADS if repeat % 2 else reversed(HEADS):
            cost.seconds[name].append(step(name, *inputs)[1])
        progress()
    del inputs
    for name in HEADS:
        cost.memory[name] = memory_in_child(name, size)
        progress()
    return cost


def memory_in_child(name: str, size: Size) -> int | None:
    """Peak bytes of one step beyond inputs and weights, in a process of its own; None where no one counts them."""
    numbers = (size.classes, size.batch, size.embedding_size, torch.get_num_threads())
    command = [sys.executable, __file__, name, *map(str, numbers)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    if child.returncode:
        raise RuntimeError(f"measuring the memory of the {name} head failed:\n{child.stderr}")
    return None if child.stdout.strip() == "unknown" else int(child.stdout)


class PeakMemory:
    """The largest resident memory of this process, in bytes, since `restart`."""

    def restart(self) -> int | None:
        """Start anew, where the system can (Linux), and read."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return self.read()

    def read(self) -> int | None:
        """The bytes; None where no one counts them (Windows)."""
        status = Path("/proc/self/status")
        if status.exists():
            line = next((x for x in status.read_text().splitlines() if x.startswith("VmHWM:")), None)
            if line:
                return int(line.split()[1]) * 1024
        try:
            import resource
        except ImportError:
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """The child: print the peak bytes of one step of a head."""
    name, *numbers = sys.argv[1:]
    classes, batch, embedding_size, threads = map(int, numbers)
    torch.set_num_threads(threads)
    step(name, *make_inputs(Size(classes=512, batch=8, embedding_size=64)))  # loads what is loaded once
    inputs = make_inputs(Size(classes, batch, embedding_size))
    peak = PeakMemory()
    before = peak.restart()
    step(name, *inputs)
    after = peak.read()
    print("unknown" if before is None or after is None else after - before)


if __name__ == "__main__":
    main()
