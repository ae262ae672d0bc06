"""The compiled PTX of the sweep's kernels for sm_80, sm_90 (wgmma), sm_120, through the launch code, in the emulator.

Losses and all gradients against the float64 oracle under the error rule, with bounds and race checks on; and each
planted error of the compiled code is reported, or changes no bit.
"""

import pytest
import torch

from ... import cases
from .. import mutations
from ..proof import record
from ..ptx import PTXError, launch
from ..resources import SWEEPING
from ..steps import emulated, tiny
from ..sweep_cases import hold_to_the_rule

SMALL = tiny()
FLASH = tiny(flash_width=128)
WARPGROUP = tiny(rows=64, depth=64)  # 64 rows and 4 warps: wgmma on sm_90
WARPGROUP_FLASH = tiny(rows=64, depth=64, flash_width=128)
THREE_PRODUCTS = tiny(precision="tf32x3")


def step(arch, device, margin, mode, shape, execute=launch, **options):
    """The problem, and its losses and gradients from the compiled kernels."""
    problem = cases.problem(cases.MARGINS[margin], cases.MODES[mode], *shape, **options)
    with emulated(arch, device, execute):
        return problem, cases.run(problem, "triton")


def check(arch, device, margin, mode, shape, **options):
    """The error rule on one draw, or on eight where that one fails: see sweep_cases. The PTX that ran."""
    used, errors = [], {}

    def execute(ptx, *args, **kwargs):
        used.append(ptx)
        return launch(ptx, *args, **kwargs)

    def draw(seed, rule):
        problem, got = step(arch, device, margin, mode, shape, execute, seed=seed, **options)
        rule.add_all(got, cases.plain(problem), cases.exact(problem))
        errors.update(rule.errors)

    hold_to_the_rule(cases.MODES[mode].operands, draw, draws=1, most=8)
    text = "".join(used)
    tile = "as shipped" if device is None else f"{device.half.sweep.rows}x{device.half.sweep.slots}x{device.half.depth}"
    row = {
        "device": f"sm_{arch}",
        "margin": margin,
        "mode": mode,
        "batch x classes x dimension": "x".join(map(str, shape)),
    }
    row |= {"options": ", ".join(options) or "-", "tile": tile, "products": products(text)}
    for name, (ours, plain) in errors.items():
        row |= {f"{name}: ours": f"{ours.max:.1e}", f"{name}: allowed": f"{2 * plain.max:.1e}"}
    record("numbers", {name: value for name, value in row.items() if not name.startswith(("d_bias", "d_scale", "d_m"))})
    return text


def products(text):
    """The instruction of the products in PTX text."""
    return next((op for op in ("wgmma", "mma.sync") if op in text), "fma")


NUMBERS = [
    (80, SMALL, "arcface_linear", "bf16", (33, 130, 50), {}),  # a tail in every dimension, rows not aligned to 16 bytes
    (80, SMALL, "arcface_linear", "bf16_weight", (20, 96, 64), {"bias": True}),
    (80, FLASH, "sv_arcface", "fp16", (20, 96, 48), {}),
    (120, FLASH, "arcface_linear", "bf16", (33, 70, 64), {}),
    (120, THREE_PRODUCTS, "normface", "fp32", (20, 130, 64), {}),
]
MORE = [
    (80, SMALL, "cosface", "fp32", (33, 130, 64), {}),
    (80, SMALL, "cosface", "fp32", (20, 65, 40), {"per": "sample"}),
    (80, SMALL, "cosface", "bf16", (33, 130, 64), {"per": "class"}),
]
MORE += [(120 if arch == 80 else 80, *rest) for arch, *rest in NUMBERS + MORE]


def name_of(case):
    arch, device, margin, mode, shape, options = case
    return "-".join([f"sm_{arch}", margin, mode, "x".join(map(str, shape)), *options, *["flash"] * (device is FLASH)])


@pytest.mark.parametrize(
    "arch, device, margin, mode, shape, options",
    [pytest.param(*case, id=name_of(case)) for case in NUMBERS]
    + [pytest.param(*case, id=name_of(case), marks=pytest.mark.slow) for case in MORE],
)
def test_numbers(arch, device, margin, mode, shape, options):
    text = check(arch, device, margin, mode, shape, **options)
    assert ("mma.sync" in text) == (mode != "fp32" or device is THREE_PRODUCTS)


@pytest.mark.parametrize(
    "device, margin, mode, shape",
    [
        (WARPGROUP, "arcface_linear", "bf16", (33, 130, 64)),
        (WARPGROUP, "cosface", "fp16", (70, 130, 50)),
        (WARPGROUP_FLASH, "sv_arcface", "bf16", (33, 96, 64)),
    ],
    ids=["lse", "tails", "flash"],
)
def test_numbers_on_hopper(device, margin, mode, shape):
    text = check(90, device, margin, mode, shape)
    assert "wgmma.mma_async" in text
    assert "mma.sync" not in text


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize("mode", ["bf16", "fp16", "fp32"])
def test_numbers_as_configured(arch, mode):
    """The tiles that ship."""
    check(arch, None, "arcface_linear", mode, (40, 270, 96))


@pytest.mark.slow
@pytest.mark.parametrize("margin", sorted(cases.MARGINS))
def test_every_margin(margin):
    check(90, WARPGROUP, margin, "bf16", (20, 96, 64))


def test_same_bits_twice():
    first, second = (step(80, SMALL, "arcface_linear", "bf16", (33, 130, 64))[1] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


MUTATED = [
    (arch, (WARPGROUP if arch == 90 else SMALL)._replace(programs=1), kernel)  # so that one program has several tiles
    for arch in (80, 90, 120)
    for kernel in SWEEPING
]
MUTATED_SHAPE = 20, 130, 128


def outcome(arch, device, mutants_of="", which=None, less_shared=0, texts=None):
    """The step's tensors, or the emulator's complaint, with a mutant of one kernel in its place."""

    def execute(ptx, grid, threads, args, smem):
        if f".entry {mutants_of}(" in ptx:
            if texts is not None:
                texts.append(ptx)
            ptx = ptx if which is None else dict(mutations.mutants(ptx))[which]
            smem -= less_shared
        launch(ptx, grid, threads, args, smem=smem)

    try:
        return step(arch, device, "arcface_linear", "bf16", MUTATED_SHAPE, execute)[1]
    except PTXError as e:
        return str(e)


def mutate(arch, device, kernel):
    """{mutant: the complaint, or "" if no bit of any output changed}; a mutant that changes numbers unseen fails."""
    texts = []
    right = outcome(arch, device, kernel, texts=texts)
    assert texts, f"{kernel} was not launched"
    found = {}
    for name, _ in mutations.mutants(texts[0]):
        result = outcome(arch, device, kernel, name)
        found[name] = result if isinstance(result, str) else ""
        if not found[name]:
            assert all(torch.equal(right[t], result[t]) for t in right), f"{kernel}, {name}: other numbers, no report"
    return found


@pytest.mark.parametrize(
    "arch, device, kernel",
    [pytest.param(*case, marks=[pytest.mark.slow] if number else []) for number, case in enumerate(MUTATED)],
    ids=[f"{arch}-{kernel}" for arch, _, kernel in MUTATED],
)
def test_mutants(arch, device, kernel):
    found = mutate(arch, device, kernel)
    reported = [name for name, complaint in found.items() if complaint]
    silent = ", ".join(name for name in found if name not in reported) or "-"
    row = {"kernel": f"`{kernel}`", "device": f"sm_{arch}", "mutants": len(found), "reported": len(reported)}
    record("mutants", {**row, "not needed here: no bit changes": silent})
    assert any("barrier" in name for name in reported)
    assert any("wait" in name for name in reported)


@pytest.mark.parametrize("kernel", ["sweep_kernel", "gradient_kernel"])
def test_less_shared_memory(kernel):
    assert "out-of-bounds shared" in outcome(80, SMALL, kernel, less_shared=512)


def test_a_weight_that_is_too_short():
    """Labels, index and launch say 130 rows; the last one is not there."""
    problem = cases.problem(cases.MARGINS["normface"], cases.MODES["bf16"], 20, 130, 64)

    def execute(ptx, grid, threads, args, smem):
        short = [a[:129] if hasattr(a, "shape") and a.shape == (130, 64) else a for a in args]
        launch(ptx, grid, threads, short, smem=smem)

    with emulated(80, SMALL, execute), pytest.raises(PTXError, match="out-of-bounds global"):
        cases.run(problem, "triton")
