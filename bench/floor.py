"""The floor: the algorithm's floating-point operations at the best rate that a matrix product reaches here."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from fused_margin.backends import cpu
from fused_margin.spec import Spec

from .timing import timed

Candidate = Callable[[str, torch.dtype], tuple[Callable[[], object], float]]  # -> the work, and its operations


def _mm(rows: int, inner: int, columns: int) -> Candidate:
    def make(device: str, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
        a = torch.randn(rows, inner, device=device).to(dtype)
        b = torch.randn(inner, columns, device=device).to(dtype)
        out = a.new_empty(rows, columns)
        return lambda: torch.mm(a, b, out=out), 2.0 * rows * inner * columns

    return make


def _linear(rows: int, inner: int, columns: int) -> Candidate:
    """oneDNN's product, which is not what torch.mm takes in float32."""

    def make(device: str, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
        if device != "cpu" or not torch.backends.mkldnn.is_available():
            raise RuntimeError("oneDNN runs on the CPU")
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
        linear = torch.ops.mkldnn._linear_pointwise
        return lambda: linear(a, b, None, "none", [], ""), 2.0 * rows * inner * columns

    return make


def _tiles(repeats: int, *_: int, bf16: bool = False) -> Candidate:
    """The sweep's own product of a tile, one stream of them on each thread."""

    def make(device: str, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
        if device != "cpu" or cpu.why_not(None, None, Spec()):
            raise RuntimeError("the C++ kernels run on the CPU, where they are built")
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(threads)
        flops = cpu.multiply_tiles(1, bf16) * repeats * threads
        return lambda: list(pool.map(cpu.multiply_tiles, [repeats] * threads, [bf16] * threads)), flops

    return make


PROBE = (256, 256, 256)  # a product that is far from the record here (bf16 without instructions for it) ends here

# What may hold the record, by dtype of the operands.
CANDIDATES: dict[str, list[tuple[str, torch.dtype, Callable[..., Candidate], tuple[int, int, int]]]] = {
    "fp32": [
        (f"{name} {'x'.join(map(str, shape))} fp32", torch.float32, make, shape)
        for name, make in (("mm", _mm), ("oneDNN linear", _linear))
        for shape in ((2048, 2048, 2048), (4096, 512, 1024))
    ]
    + [("fused_margin's tile 96x512x128 fp32", torch.float32, _tiles, (200, 0, 0))],
}
CANDIDATES["bf16"] = [
    *CANDIDATES["fp32"],
    ("mm 2048x2048x2048 bf16", torch.bfloat16, _mm, (2048, 2048, 2048)),
    ("oneDNN linear 2048x2048x2048 bf16", torch.bfloat16, _linear, (2048, 2048, 2048)),
    ("fused_margin's tile 96x512x128 bf16", torch.bfloat16, functools.partial(_tiles, bf16=True), (200, 0, 0)),
]


def best_rate(dtype: str, device: str = "cpu", seconds: float = 0.5) -> tuple[float, str]:
    """Operations per second of the best candidate, in the best of its repeats, and its name."""
    best, winner = 0.0, "none"
    for name, operands, make, shape in CANDIDATES[dtype]:
        try:
            work, flops = make(*PROBE)(device, operands)
            work()
            if flops / timed(work, device) < best / 8:
                continue
            work, flops = make(*shape)(device, operands)
            work()
        except (RuntimeError, AttributeError):
            continue  # a product that this machine or this torch lacks
        end = time.perf_counter() + seconds
        while True:
            rate = flops / timed(work, device)
            if rate > best:
                best, winner = rate, name
            if time.perf_counter() > end:
                break
    if not best:
        raise RuntimeError(f"no product of {dtype} runs on {device}: expected at least torch.mm in float32")
    return best, winner
