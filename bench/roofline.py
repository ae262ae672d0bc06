"""A model of a training step on GPUs that are not there: `python -m bench.roofline [--write FILE...] [--output PNG]`.

    time >= sum over launches of max(bytes / memory rate, operations / product rate)      at data-sheet rates

Bytes and operations of the fused head come from its own launches (bench/cost.py), those of the others from the
operators that PyTorch dispatches. No GPU has run: every figure is a model, and a lower bound.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from head_cost import MARGIN, SCALE, plain_head
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_margin.spec import Need
from fused_margin.update_rules import Update

from .cost import Cost, Dispatched, of_fused_step
from .cuda_cost import of_cuda_step
from .results import FOLDER
from .table import write_sections

CUDA = "fused, CUDA C++"
UPDATES = {"SGD": Update("sgd", 0.1, momentum=0.9), "AdamW": Update("adamw", 1e-3)}


class Device(NamedTuple):
    """Rates of a data sheet: dense products, no sparsity."""

    arch: int | str
    memory: float  # bytes / s
    half: float  # operations / s of bf16 products with float32 sums
    full: float  # of float32
    source: str
    processors: int = 0  # and the L2 cache in MB, for the plan of the CUDA backend; 0: it does not run there
    cache: int = 0


DEVICES = {
    "A100": Device(80, 2.039e12, 312e12, 19.5e12, "NVIDIA A100 data sheet, SXM 80 GB", 108, 40),
    "H100": Device(90, 3.35e12, 989e12, 67e12, "NVIDIA H100 data sheet, SXM", 132, 50),
    "H200": Device(90, 4.8e12, 989e12, 67e12, "NVIDIA H200 data sheet, SXM", 132, 50),
    "B200": Device(100, 8.0e12, 2250e12, 75e12, "NVIDIA HGX B200 data sheet, an eighth of it", 148, 126),
    "RTX 5090": Device(120, 1.792e12, 209.5e12, 104.8e12, "NVIDIA RTX Blackwell architecture paper", 170, 96),
    "MI300X": Device("gfx942", 5.3e12, 1307e12, 163.4e12, "AMD Instinct MI300X data sheet"),
}
SHAPES = [  # B, C, D
    *((batch, 10**6, 512) for batch in (128, 512, 1024, 4096)),
    *((512, classes, 512) for classes in (10**4, 10**5, 10**7)),
    (512, 10**6, 128),
]
METHODS = ("fused", CUDA, "eager", "torch.compile", "InsightFace")


class _InsightFaceLoss(torch.autograd.Function):
    """The cross-entropy of arcface_torch, operator by operator: the softmax is made in place, and kept."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        top = logits.max(1, keepdim=True)[0]
        p = logits.sub_(top).exp_()
        p.div_(p.sum(1, keepdim=True))
        ctx.save_for_backward(p, labels)
        return p.gather(1, labels[:, None]).clamp_min(1e-30).log().mean().neg()

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        p, labels = ctx.saved_tensors
        hot = torch.zeros_like(p).scatter_(1, labels[:, None], 1)
        return p.sub_(hot).div_(len(p)).mul_(g), None


def _insightface(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """Its head in float32, angles of all classes in place (partial_fc_v2, losses), one process, no sampling."""
    logits = torch.nn.functional.linear(torch.nn.functional.normalize(x), torch.nn.functional.normalize(w)).clamp(-1, 1)
    with torch.no_grad():
        logits.arccos_()
        logits.scatter_add_(1, labels[:, None], torch.full_like(labels[:, None], 1, dtype=logits.dtype) * MARGIN)
        logits.cos_()
    return _InsightFaceLoss.apply(logits * SCALE, labels)


@cache
def dispatched(method: str, batch: int, classes: int, dim: int) -> list[Cost]:
    """A step of another head, forward and backward, with bf16 autocast (InsightFace's runs in float32)."""
    head = _insightface if method == "InsightFace" else plain_head
    with FakeTensorMode():
        x, w = torch.empty(batch, dim).requires_grad_(), torch.empty(classes, dim).requires_grad_()
        labels = torch.empty(batch, dtype=torch.int64)
        with Dispatched(fused=method == "torch.compile") as seen:
            with torch.autocast("cpu", torch.bfloat16, enabled=method != "InsightFace"):
                loss = head(x, w, labels)
            loss.backward()
    costs = seen.costs
    if seen.fused:  # what the last fused kernels read and write: both normalisations' gradients
        costs.append(Cost("gradients", 4.0 * dim * (batch + classes) * 2, 4.0 * dim * (batch + classes)))
    return costs


@cache
def fused(arch: int | str, batch: int, classes: int, dim: int) -> list[Cost]:
    return of_fused_step(arch, batch, classes, dim)


@cache
def fused_cuda(processors: int, cache_mb: int, batch: int, classes: int, dim: int) -> list[Cost]:
    return of_cuda_step(batch, classes, dim, processors, cache_mb << 20)


def floor(batch: int, classes: int, dim: int) -> list[Cost]:
    """What no algorithm that recomputes the cosines can do without: w twice in, dW once out, 8 B C D operations."""
    weight = 4.0 * classes * dim
    return [Cost("forward", weight, 0, 4.0 * batch * classes * dim, True),
            Cost("backward", weight, weight, 4.0 * batch * classes * dim, True)]  # fmt: skip


def costs_of(method: str, device: Device, shape: tuple[int, int, int]) -> list[Cost]:
    if method == "fused":
        return fused(device.arch, *shape)
    if method == CUDA:
        return fused_cuda(device.processors, device.cache, *shape) if device.processors else []
    return floor(*shape) if method == "floor" else dispatched(method, *shape)


def seconds(costs: list[Cost], device: Device) -> float:
    """By the model; nan where nothing runs."""
    if not costs:
        return math.nan
    return sum(max(c.bytes / device.memory, c.flops / (device.half if c.half else device.full)) for c in costs)


def _ms(value: float) -> str:
    return "-" if math.isnan(value) else f"{value * 1e3:.3g} ms"


def _title(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]} x {shape[1]:,} x {shape[2]}"


def time_table() -> str:
    head = ["batch x classes x dimension", "device", "floor", *METHODS]
    lines = ["Model, milliseconds a step at data-sheet rates (a lower bound; no GPU has run):", ""]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for shape in SHAPES:
        devices = DEVICES if shape == SHAPES[1] else {"H100": DEVICES["H100"]}
        for name, device in devices.items():
            times = [seconds(costs_of(method, device, shape), device) for method in ("floor", *METHODS)]
            lines.append(f"| {' | '.join([_title(shape), name, *map(_ms, times)])} |")
    return "\n".join(lines)


def _by_torch(kind: str, classes: int, dim: int, fused: bool) -> list[Cost]:
    """A step of torch.optim on a dense gradient; `fused`: w, gradient and state once each, else by operators."""
    weight = 4.0 * classes * dim
    if fused:
        states = 1 + (kind == "AdamW")
        return [Cost("update", (2 + states) * weight, (1 + states) * weight)]
    with FakeTensorMode():
        w = torch.nn.Parameter(torch.empty(classes, dim))
        optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9, foreach=False)
        for _ in range(2):  # the first one makes the momentum
            w.grad = torch.empty(classes, dim)
            with Dispatched() as seen:
                optimizer.step()
    return seen.costs


@cache
def trainings(arch: int | str, batch: int, classes: int, dim: int) -> dict[str, list[Cost]]:
    """The fused head with its optimizer's step, by what takes it."""
    dense = fused(arch, batch, classes, dim)
    found = {"dense dW, `torch.optim.SGD(foreach=True)`": dense + _by_torch("SGD", classes, dim, False)}
    for kind, update in UPDATES.items():
        found[f"dense dW, `torch.optim.{kind}(fused=True)`"] = dense + _by_torch(kind, classes, dim, True)
        found[f"`Sweep{kind}`"] = of_fused_step(arch, batch, classes, dim, need=Need.X, update=update)
    return found


def step_table() -> str:
    """A training step with the optimizer's, Triton, float32 weights."""
    rows = [(shape, name) for shape in SHAPES for name in (DEVICES if shape == SHAPES[1] else ("H100",))]
    by_row = [trainings(DEVICES[name].arch, *shape) for shape, name in rows]
    head = ["batch x classes x dimension", "device", *by_row[0]]
    lines = ["Model, milliseconds a step with the optimizer's, bf16 products (a lower bound; no GPU has run):", ""]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for (shape, name), found in zip(rows, by_row, strict=True):
        cells = [_ms(seconds(costs, DEVICES[name])) for costs in found.values()]
        lines.append(f"| {' | '.join([_title(shape), name, *cells])} |")
    return "\n".join(lines)


def launch_table(shape: tuple[int, int, int] = SHAPES[1], name: str = "H100") -> str:
    """Where the fused steps' bytes and operations are, kernel by kernel."""
    device = DEVICES[name]
    groups: dict[tuple[str, str], list[Cost]] = {}
    for backend, method in (("Triton", "fused"), ("CUDA C++", CUDA)):
        for cost in costs_of(method, device, shape):
            groups.setdefault((backend, cost.name), []).append(cost)
    title = f"{_title(shape)}, {name}, bf16 products, fp32 weights"
    lines = [f"Model of one step by kernel, {title}:", ""]
    lines += [
        "| backend | kernel | launches | read | written | operations | loaded by programs (L2) | model time |",
        "|" + "---|" * 8,
    ]
    for (backend, kernel), costs in groups.items():
        read, written, flops, loaded = (
            sum(getattr(c, f) for c in costs) for f in ("read", "written", "flops", "loaded")
        )
        cells = [
            backend,
            f"`{kernel}`" if "_" in kernel else kernel,
            len(costs),
            f"{read / 1e9:.3g} GB",
            f"{written / 1e9:.3g} GB",
        ]
        cells += [f"{flops / 1e12:.3g} T" if flops else "", f"{loaded / 1e9:.3g} GB" if loaded else ""]
        lines.append(f"| {' | '.join(map(str, [*cells, _ms(seconds(costs, device))]))} |")
    return "\n".join(lines)


def sources() -> str:
    lines = ["| device | memory | bf16 products | fp32 | source |", "|---|---|---|---|---|"]
    for name, d in DEVICES.items():
        rates = f"{d.memory / 1e12:.3g} TB/s | {d.half / 1e12:.4g} T/s | {d.full / 1e12:.4g} T/s"
        lines.append(f"| {name} | {rates} | {d.source} |")
    return "\n".join(lines)


def draw(path: Path) -> None:
    """Roofs of the devices, and where each kernel and each head lies under H100's."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from .plot import COLOURS, GRID, INK

    figure, (roofs, times) = plt.subplots(1, 2, figsize=(13, 5.2), facecolor="white")
    intensity = np.logspace(0, 4, 200)
    for name, d in DEVICES.items():
        roofs.plot(intensity, np.minimum(intensity * d.memory, d.half) / 1e12, linewidth=1.3, label=name)
    h100, shape = DEVICES["H100"], SHAPES[1]
    for kernel in ("sweep_kernel", "gradient_kernel", "library product"):
        costs = [c for c in fused(h100.arch, *shape) if c.name == kernel]
        x = sum(c.flops for c in costs) / sum(c.bytes for c in costs)
        y = min(x * h100.memory, h100.half) / 1e12
        roofs.plot(x, y, "o", color=COLOURS["fused"], zorder=5)
        roofs.annotate(kernel, (x, y), (6, -12), textcoords="offset points", fontsize=8.5, color=INK)
    roofs.set_xlabel("operations per byte of memory")
    roofs.set_ylabel("10^12 operations / s")
    roofs.set_title(
        f"model: roofs of the devices, kernels at {shape[0]} x {shape[1]:,} x {shape[2]}", loc="left", fontsize=11
    )
    batches = [s for s in SHAPES if s[1:] == (10**6, 512)]
    colours = {
        **COLOURS,
        CUDA: "#7a9e3f",
        "torch.compile": COLOURS["torch-compile"],
        "InsightFace": COLOURS["insightface"],
    }
    for method in ("floor", *METHODS):
        y = [seconds(costs_of(method, h100, s), h100) * 1e3 for s in batches]
        style = (
            {"linestyle": "--", "color": "#777777"} if method == "floor" else {"marker": "o", "color": colours[method]}
        )
        times.plot([s[0] for s in batches], y, label=method, **style)
    times.set_xlabel("batch")
    times.set_ylabel("ms a step")
    times.set_title("model: H100, 1,000,000 classes, dimension 512", loc="left", fontsize=11)
    for axes in (roofs, times):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(True, color=GRID)
        axes.legend(frameon=False, fontsize=8.5)
    times.set_xticks([s[0] for s in batches], [str(s[0]) for s in batches])
    times.minorticks_off()
    figure.text(
        0.01, 0.01, "A model from launch parameters and data sheets. No GPU has run.", fontsize=8.5, color="#666666"
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


SECTIONS = {"times": time_table, "steps": step_table, "kernels": launch_table, "devices": sources}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.split("\n")[0])
    parser.add_argument("--write", nargs="+", type=Path, metavar="FILE", default=[], help="replace the sections there")
    parser.add_argument("--output", type=Path, default=FOLDER / "roofline.png", help="the picture")
    args = parser.parse_args(argv)
    for path in args.write:
        write_sections(path, "roofline", SECTIONS)
    if not args.write:
        print("\n\n".join(make() for make in SECTIONS.values()))
    draw(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
