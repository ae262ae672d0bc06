"""What the shipped kernels need on each architecture, compiled ahead of time in their default configurations.

test_resources.py holds the rows to a budget, docs/gpu.md shows them. Of what is seldom asked for, or spills, CORNERS.
"""

from typing import NamedTuple

import torch

from fused_margin.spec import Need, Want
from fused_margin.update_rules import Update

from . import fake_driver
from .steps import shaped_rows, shaped_step

ARCHES = (80, 90, 100, 120, "gfx942")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SWEEPING = ("sweep_kernel", "gradient_kernel")  # the O(B C D) kernels
UPDATING = ("finish_weights", "update_rows")  # of an optimizer's step


class Step(NamedTuple):
    """A step whose kernels are compiled: its name in the table, and `shaped_step`'s arguments."""

    name: str
    options: dict


SHAPE = {"batch": 512, "classes": 10**6, "dim": 512}
STEPS = (
    Step("bf16", {**SHAPE, "dtype": BF16}),
    Step("fp16", {**SHAPE, "dtype": FP16}),
    Step("bf16, w bf16", {**SHAPE, "dtype": BF16, "weight_dtype": BF16}),
    Step("fp32", {**SHAPE, "dtype": FP32}),
    Step("bf16, D=128", {**SHAPE, "dim": 128, "dtype": BF16}),
    Step("bf16, hard mask", {**SHAPE, "dtype": BF16, "rule": "hard", "want": Want.DX | Want.STATS}),
    Step(
        "bf16, softplus",
        {
            **SHAPE, "dtype": BF16, "rule": "power", "reduction": "softplus", "bias": True,
            "want": Want.DX | Want.DSCALE, "need": Need.X | Need.W | Need.SCALE | Need.BIAS,
        },
    ),
)  # fmt: skip


def _corner(name: str, *where: tuple[int | str, str], **options) -> tuple[Step, tuple[tuple[int | str, str], ...]]:
    return Step(name, {**SHAPE, **options}), where


SWEEP, GRADIENT = SWEEPING
BIASED = {"bias": True, "need": Need.X | Need.W | Need.BIAS}
SUMS = {"want": Want.DX | Want.SUM | Want.STATS | Want.DSCALE}
SOFTPLUS = {**BIASED, "rule": "power", "reduction": "softplus", "want": Want.DX | Want.DSCALE}
CORNERS = (  # on the architectures, and of the kernels, that have the fewest registers to spare
    _corner("bf16, K=3", (80, GRADIENT), (90, GRADIENT), dtype=BF16, sub_centers=3),
    _corner("fp16, K=3", (80, GRADIENT), (120, GRADIENT), dtype=FP16, sub_centers=3),
    _corner("fp32, K=3", (120, SWEEP), dtype=FP32, sub_centers=3),
    _corner("fp16, D=500", (80, SWEEP), (80, GRADIENT), (120, SWEEP), ("gfx942", SWEEP), dtype=FP16, dim=500),
    _corner("bf16, D=500, gauss", (80, SWEEP), dtype=BF16, dim=500, rule="gauss"),
    _corner("bf16, D=200", (80, SWEEP), dtype=BF16, dim=200),
    _corner("fp16, D=256", (120, GRADIENT), dtype=FP16, dim=256),
    _corner("fp16, D=256, gauss", (80, SWEEP), (120, SWEEP), dtype=FP16, dim=256, rule="gauss"),
    _corner("bf16, D=256, hard mask", (120, SWEEP), dtype=BF16, dim=256, rule="hard"),
    _corner("fp16, hard mask", (80, GRADIENT), dtype=FP16, rule="hard"),
    _corner("fp16, gauss", (80, GRADIENT), (120, SWEEP), dtype=FP16, rule="gauss"),
    _corner("fp16, bias", (90, GRADIENT), (120, SWEEP), dtype=FP16, **BIASED),
    _corner("bf16, bias", (100, SWEEP), dtype=BF16, **BIASED),
    _corner("fp16, softplus", (120, SWEEP), dtype=FP16, **SOFTPLUS),
    _corner("bf16, gauss, every sum", (90, SWEEP), dtype=BF16, rule="gauss", **BIASED, **SUMS),
)


MOMENTUM, ADAMW = Update("sgd", 0.1, weight_decay=5e-4, momentum=0.9), Update("adamw", 1e-3, weight_decay=0.1)
UPDATES = (
    Step("SweepSGD", {**SHAPE, "dtype": BF16, "need": 0, "update": MOMENTUM}),
    Step("SweepAdamW", {**SHAPE, "dtype": BF16, "need": 0, "update": ADAMW}),
    Step("SweepAdamW, w bf16", {**SHAPE, "dtype": BF16, "weight_dtype": BF16, "need": 0, "update": ADAMW}),
    Step("SweepAdamW, D=8192", {**SHAPE, "classes": 10**5, "dim": 8192, "dtype": BF16, "need": 0, "update": ADAMW}),
    Step("RowSGD", {"rows": 10**5, "classes": 10**6, "dim": 512, "update": MOMENTUM}),
    Step("RowAdamW, w bf16", {"rows": 10**5, "classes": 10**6, "dim": 512, "update": ADAMW, "weight_dtype": BF16}),
)


class Row(NamedTuple):
    step: str
    arch: str
    kernel: str
    tile: str
    regs: int
    spill: int  # bytes stored and loaded, a thread; on AMD registers
    shared: int
    limit: int
    tensor_ops: str
    wide_loads: int  # 128-bit loads and asynchronous copies of global memory


def name_of(arch):
    return arch if isinstance(arch, str) else f"sm_{arch}"


def tile_of(launch):
    """Rows x slots x depth (or the width of a row), warps and stages."""
    a, options = launch.args, launch.options
    names = ("ROWS", "SLOTS", "DEPTH") if "DEPTH" in a else ("ROWS", "SLOTS", "WIDTH")
    sizes = [a[name] for name in names if name in a]
    return f"{'x'.join(map(str, sizes))} w{options.get('num_warps', 4)} s{options.get('num_stages', 3)}"


def rows_of(step, arch, only=None):
    """Compile each kernel of the step once."""
    with fake_driver.recorded(arch) as launches:
        (shaped_rows if "rows" in step.options else shaped_step)(**step.options)
    seen = set()
    for launch in launches:
        key = launch.name, str([(n, v) for n, v in launch.args.items() if n.isupper()])
        if key in seen or (only and launch.name not in only):
            continue
        seen.add(key)
        r = fake_driver.resources(launch.compile())
        ops = " ".join(f"{op} {n}" for op, n in r["tensor_ops"].items())
        limit = fake_driver.SHARED_LIMIT[arch]
        yield Row(
            step.name, name_of(arch), launch.name, tile_of(launch), r["regs"], r["spill"], r["shared"], limit, ops,
            r["wide_loads"],
        )  # fmt: skip


def shown(row):
    """As the table in docs/gpu.md has it."""
    return {
        "operands": row.step,
        "device": row.arch,
        "kernel": f"`{row.kernel}`",
        "tile": row.tile,
        "registers": row.regs,
        "spilled": row.spill,
        "shared": f"{row.shared / 1024:.0f} of {row.limit / 1024:.0f} KB",
        "tensor cores": row.tensor_ops or "-",
        "128-bit loads": row.wide_loads,
    }
