"""Bytes and operations of a training step, without running it.

Of the fused head: from each launch as the real launch code makes it (grid, tiles, tensors), caught by the fake driver
of tests/gpu_without_gpu; a test holds these figures to what the emulator counts. Of other heads: from the operators
that PyTorch dispatches, on tensors without data.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import ROOT

GEMM = "library product"


class Cost(NamedTuple):
    """Of one launch, or one operator."""

    name: str
    read: float  # bytes, each tensor once
    written: float
    flops: float = 0.0
    half: bool = False  # whether the operations are 16-bit products with float32 sums
    loaded: float = 0.0  # bytes that all programs of a sweeping kernel load, most of them from the L2 cache

    @property
    def bytes(self) -> float:
        return self.read + self.written


def _size(t: torch.Tensor) -> int:
    """Bytes of memory, of an expanded tensor once."""
    kept = [n for n, stride in zip(t.shape, t.stride(), strict=True) if stride]
    return math.prod(kept) * t.element_size() if t.numel() else 0


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _sweeping(a: dict, rows_of_w: int, programs: int, tiles: int) -> tuple[float, float, float]:
    """Read, operations and loads of what both sweeping kernels begin with: cosines of `programs` x `tiles` tiles."""
    w, x = a["w"], a["x"]
    depth = _up(a["D"], a["DEPTH"])
    products = 3 if a["PRECISION"] == "tf32x3" and x.dtype == torch.float32 else 1
    flops = 2.0 * programs * tiles * a["ROWS"] * a["SLOTS"] * depth * products
    loads = programs * tiles * (a["SLOTS"] * a["D"] * w.element_size() + a["ROWS"] * depth * x.element_size())
    needs_tau = a["RULE"] in ("hard", "curricular", "gauss")
    constants = 2 if not a["SOFTPLUS"] else 0
    constants += needs_tau + (a["SOFTPLUS"] or (a.get("STATS", False) and a["BIAS"]))
    read = _size(x) + rows_of_w * a["D"] * w.element_size() + a["padded"] * 4 * (1 + constants) + 4 * a["ARGS"]
    if a["INDEXED"]:
        read += rows_of_w * 8
    if a["BIAS"]:
        read += rows_of_w // a["CENTERS"] * a["bias"].element_size()
    return read, flops, loads


def _sweep_kernel(a: dict, grid: int) -> Cost:
    blocks = a["padded"] // a["ROWS"]
    read, flops, loads = _sweeping(a, a["classes"] * a["CENTERS"], blocks, a["tiles"])
    written = a["splits"] * 9 * a["padded"] * 4
    if a["FLASH"]:
        written += a["splits"] * a["padded"] * a["D"] * 4
        flops += 2.0 * blocks * a["tiles"] * a["ROWS"] * a["SLOTS"] * a["WIDTH"]
        loads *= 1 + a["w"].element_size() * a["SLOTS"] / (a["w"].element_size() * a["SLOTS"] + 2 * a["ROWS"])
    return Cost("sweep_kernel", read, written, flops, a["x"].element_size() == 2, loads)


def _gradient_kernel(a: dict, grid: int) -> Cost:
    blocks = a["padded"] // a["ROWS"]
    tiles = grid // blocks
    tile_classes = a["SLOTS"] // a["GROUP"]
    first = a["first_tile"] * tile_classes
    classes = min(tiles * tile_classes, a["classes"] - first)
    rows = classes * a["CENTERS"]
    read, flops, loads = _sweeping(a, rows, grid, 1)
    read += a["padded"] * 4 * (4 + a["TO_BIAS"])
    written = 0
    if a["TO_GRADIENT"]:
        written += a["batch"] * rows * a["gradient"].element_size()
    if a["TO_W_HAT"]:
        written += rows * a["D"] * a["w_hat"].element_size()
    if a["TO_BIAS"]:
        written += blocks * classes * 4
    return Cost("gradient_kernel", read, written, flops, a["x"].element_size() == 2, loads)


def _state(a: dict, rows: int) -> tuple[float, float]:
    """Read and written of an optimizer's state of some rows."""
    moments = 4 * rows * a["D"] * (a["MOMENTUM"] + (a["OPTIMIZER"] == "adamw"))
    index = 8 * rows if a["INDEXED"] else 0
    return moments + index + (4 * rows // a["together"] if a["COUNTED"] else 0), moments


def _update_rows(a: dict, grid: int) -> Cost:
    numbers = a["rows"] * a["D"]
    read, written = _state(a, a["rows"])
    read += numbers * (a["grad"].element_size() + a["w"].element_size())
    return Cost("update_rows", read, written + numbers * a["w"].element_size())


def _finish_weights(a: dict, grid: int) -> Cost:
    classes = a["classes"] - a["first_class"]
    rows = classes * a["CENTERS"]
    read = written = 0
    if a["TO_W"]:
        updates, numbers = a["OPTIMIZER"] != "", rows * a["D"]
        read += numbers * 4 + (numbers * a["w"].element_size() if a["NORMALIZE"] or updates else 0)
        read += _size(a["x"]) + 5 * 4 * a["batch"] + (numbers * 4 if a["ADD"] else 0)
        written += numbers * (a["w"] if updates else a["d_w"]).element_size()
        if updates:
            read, written = read + _state(a, rows)[0], written + _state(a, rows)[1]
    if a["TO_BIAS"]:
        read += a["blocks"] * classes * 4
        written += classes * a["d_bias"].element_size()
    return Cost("finish_weights", read, written)


def _row_kernel(name: str, a: dict) -> Cost:
    """Work on [B, D]: every tensor once, of w as many rows as x has."""
    batch = a["labels"].shape[0] if "labels" in a else a["batch"]
    inputs = 0
    for key in ("x", "labels", "state", "o", "g_red", "scale"):
        if torch.is_tensor(a.get(key)):
            inputs += _size(a[key])
    if torch.is_tensor(a.get("w")) and (name != "backward_rows" or a["CENTERS"] > 1):
        inputs += batch * a["D"] * a["w"].element_size()
    written = ("operand", "target", "constants", "cos_y", "o_red", "loss", "rows", "d_x")
    outputs = sum(_size(a[key]) for key in written if torch.is_tensor(a.get(key)))
    return Cost(name, inputs, outputs)


def _epilogue(a: dict) -> Cost:
    fields = 3 + 3 * a["STATS"] + a["MEAN"] + 2 * a["SUM"]
    read = a["splits"] * a["batch"] * 4 * (fields + a["FLASH"] * a["D"])
    return Cost("epilogue", read, sum(_size(a[key]) for key in ("red", "aux", "sum_u", "o_red")))


KERNELS: dict[str, Callable[[dict, int], Cost]] = {
    "sweep_kernel": _sweep_kernel,
    "gradient_kernel": _gradient_kernel,
    "finish_weights": _finish_weights,
    "update_rows": _update_rows,
}


def of_launch(launch) -> Cost:
    """The cost of a launch of tests.gpu_without_gpu.fake_driver."""
    if launch.name in KERNELS:
        return KERNELS[launch.name](launch.args, launch.grid[0])
    return _epilogue(launch.args) if launch.name == "epilogue" else _row_kernel(launch.name, launch.args)


def of_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool) -> Cost:
    """out (+)= a b as the backward asks `multiply` to."""
    flops = 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
    read = _size(a) + _size(b) + (_size(out) if add else 0)
    return Cost(GEMM, read, _size(out), flops, a.element_size() == 2)


def of_fused_step(arch: int | str, *shape: int, **options) -> list[Cost]:
    """Each launch of a step of the Triton backend, in order; arguments as `steps.shaped_step`."""
    from fused_margin.kernels import gradients
    from tests.gpu_without_gpu.fake_driver import recorded
    from tests.gpu_without_gpu.steps import shaped_step

    products: list[tuple[int, Cost]] = []
    multiply = gradients.multiply
    with recorded(arch) as launches:
        gradients.multiply = lambda a, b, out, add: products.append((len(launches), of_product(a, b, out, add)))
        try:
            shaped_step(*shape, **options)
        finally:
            gradients.multiply = multiply
    costs = [of_launch(launch) for launch in launches]
    for place, cost in reversed(products):
        costs.insert(place, cost)
    return costs


_PRODUCTS = {"mm", "addmm", "bmm"}
_PICKING = {"gather", "index", "embedding", "nll_loss_forward"}  # read no more than they return
_MAKING = {"zeros_like", "new_zeros", "full_like", "nll_loss_backward"}  # read next to nothing
_REDUCING = {
    "sum", "amax", "max", "logsumexp", "_log_softmax", "_log_softmax_backward_data", "linalg_vector_norm", "norm",
    "nll_loss_forward", "nll_loss_backward", "mean",
}  # fmt: skip


class Dispatched(TorchDispatchMode):
    """Collects the cost of each operator that PyTorch dispatches. `fused`: as a compiler that fuses all it can.

    Then only products and reductions move data: a product its operands and its result, where each operand was written
    once before; a reduction reads what it reduces.
    """

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.fused, self.costs, self.made = fused, [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
        results = [t for t in tree_leaves(out) if torch.is_tensor(t)]
        if func.is_view or not tensors or not results or name in ("detach", "empty_like", "new_empty"):
            return out
        read = sum(_size(t) for t in ({id(t): t for t in tensors}).values())
        written = sum(map(_size, results))
        if name in _PICKING:
            read = written
        if name in _MAKING:
            read = 0
        flops = 0.0
        if name in _PRODUCTS:
            a, b = tensors[-2:]
            flops = 2.0 * a.shape[-2] * a.shape[-1] * b.shape[-1] * (a.shape[0] if a.dim() == 3 else 1)
        elif self.fused:
            if name not in _REDUCING:
                read = 0
            # what is as large as its input is fused into its reader, or is that reader's operand
            written = 0 if written > read / 2 else written
        if self.fused and flops:
            storages = {t.untyped_storage()._cdata: t for t in (a, b)}
            written += sum(_size(t) for key, t in storages.items() if key not in self.made)
            self.made |= storages.keys()
        if read + written:
            self.costs.append(Cost(name, read, written, flops, bool(flops) and results[0].element_size() == 2))
        return out


def totals_elsewhere(arch: int | str, *shape: int, half: bool) -> tuple[float, float]:
    """Bytes and operations of a fused step, from a process of its own: the launches are caught by a fake driver."""
    command = [sys.executable, "-m", "bench.cost", str(arch), *map(str, shape), *(["--half"] if half else [])]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr}")
    moved, flops = json.loads(done.stdout)
    return moved, flops


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cost", description="Bytes and operations of a fused step.")
    parser.add_argument("arch", help="80, 90, ... or gfx942")
    parser.add_argument("shape", nargs=3, type=int, metavar=("B", "C", "D"))
    parser.add_argument("--half", action="store_true", help="products of bfloat16; else of float32")
    args = parser.parse_args()
    arch = int(args.arch) if args.arch.isdigit() else args.arch
    costs = of_fused_step(arch, *args.shape, dtype=torch.bfloat16 if args.half else torch.float32)
    print(json.dumps([sum(c.bytes for c in costs), sum(c.flops for c in costs)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
