"""The compiled PTX of the sweep's kernels for sm_80, sm_90 (wgmma), sm_120, through the launch code, in the emulator.

Losses and all gradients against the float64 oracle under the error rule, with bounds and race checks on; and each
planted error of the compiled code is reported, or changes no bit.
"""

import pytest
import torch

from ... import cases
from .. import mutations
from ..ptx import PTXError, launch
from ..steps import emulated, tiny

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
    used = []

    def execute(ptx, *args, **kwargs):
        used.append(ptx)
        return launch(ptx, *args, **kwargs)

    problem, got = step(arch, device, margin, mode, shape, execute, **options)
    rule = cases.ErrorRule()
    rule.add_all(got, cases.plain(problem), cases.exact(problem))
    rule.check()
    return "".join(used)


@pytest.mark.parametrize("arch", [80, 120])
@pytest.mark.parametrize(
    "device, margin, mode, shape, options",
    [
        (SMALL, "arcface_linear", "bf16", (33, 130, 50), {}),  # a tail in every dimension, rows not aligned to 16 bytes
        (SMALL, "cosface", "fp32", (33, 130, 64), {}),
        (THREE_PRODUCTS, "normface", "fp32", (33, 130, 64), {}),
        (FLASH, "arcface_linear", "bf16", (33, 130, 64), {}),
        (FLASH, "sv_arcface", "fp16", (20, 96, 48), {}),
        (SMALL, "arcface_linear", "bf16_weight", (33, 96, 64), {"bias": True}),
        (SMALL, "cosface", "fp32", (20, 65, 40), {"per": "sample"}),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) and len(value) == 3 else None,
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
@pytest.mark.parametrize("mode", ["bf16", "fp16", "fp32", "bf16_weight", "fp16_weight"])
def test_numbers_as_configured(arch, mode):
    """The tiles that ship."""
    check(arch, None, "arcface_linear", mode, (40, 270, 96))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("margin", sorted(cases.MARGINS))
def test_every_margin(arch, margin):
    check(arch, SMALL if arch == 80 else WARPGROUP, margin, "bf16", (20, 96, 64))


def test_same_bits_twice():
    first, second = (step(80, SMALL, "arcface_linear", "bf16", (33, 130, 64))[1] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def outcome(arch, device, shape, mutants_of="", which=None, less_shared=0, texts=None):
    """The step's tensors, or the emulator's complaint, with the `which`-th mutant of one kernel in its place."""

    def execute(ptx, grid, threads, args, smem):
        if f".entry {mutants_of}(" in ptx.replace("\n", ""):
            if texts is not None:
                texts.append(ptx)
            ptx = ptx if which is None else dict(mutations.mutants(ptx))[which]
            smem -= less_shared
        launch(ptx, grid, threads, args, smem=smem)

    try:
        return step(arch, device, "arcface_linear", "bf16", shape, execute)[1]
    except PTXError as e:
        return str(e)


def mutate(arch, device, kernel, shape):
    """{mutant: the complaint, or "" if no bit of any output changed}; a mutant that changes numbers unseen fails."""
    texts = []
    right = outcome(arch, device, shape, kernel, texts=texts)
    assert texts, f"{kernel} was not launched"
    found = {}
    for name, _ in mutations.mutants(texts[0]):
        result = outcome(arch, device, shape, kernel, name)
        found[name] = result if isinstance(result, str) else ""
        if not found[name]:
            assert all(torch.equal(right[t], result[t]) for t in right), f"{kernel}, {name}: other numbers, no report"
    return found


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("arch", [80, slow(90), slow(120)])
@pytest.mark.parametrize("kernel", ["sweep_kernel", slow("gradient_kernel")])
def test_mutants(arch, kernel):
    found = mutate(arch, WARPGROUP if arch == 90 else SMALL, kernel, (20, 130, 128))
    reported = [name for name, complaint in found.items() if complaint]
    assert any("barrier" in name for name in reported)
    assert any("wait" in name for name in reported)


@pytest.mark.parametrize("kernel", ["sweep_kernel", "gradient_kernel"])
def test_less_shared_memory(kernel):
    assert "out-of-bounds shared" in outcome(80, SMALL, (20, 130, 64), kernel, less_shared=512)


def test_a_weight_that_is_too_short():
    """Labels, index and launch say 130 rows; the last one is not there."""
    problem = cases.problem(cases.MARGINS["normface"], cases.MODES["bf16"], 20, 130, 64)

    def execute(ptx, grid, threads, args, smem):
        short = [a[:129] if hasattr(a, "shape") and a.shape == (130, 64) else a for a in args]
        launch(ptx, grid, threads, short, smem=smem)

    with emulated(80, SMALL, execute), pytest.raises(PTXError, match="out-of-bounds global"):
        cases.run(problem, "triton")
