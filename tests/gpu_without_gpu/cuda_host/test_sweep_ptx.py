"""nvcc's PTX of the CUDA C++ kernels for sm_80 and sm_120, through the operators, in the emulator.

Losses and all gradients against the float64 oracle under the error rule, with bounds and race checks on; and each
planted error of the compiled code is reported, or changes no bit.
"""

import functools
import re
from typing import NamedTuple

import pytest
import torch

import fused_margin as fm
from fused_margin import ops
from fused_margin.spec import Aux, Want

from ... import cases
from ...test_primitive import check_masks_of_both_directions
from .. import mutations
from ..proof import record
from ..ptx import PTXError
from . import builder
from .backend import emulated, execute, simulated
from .test_sweep_numbers import sweep

pytestmark = pytest.mark.skipif(builder.NVCC is None, reason="no nvcc on PATH")

NUMBERS = [
    (80, "arcface_linear", "bf16", (33, 150, 50), {}),  # a tail in every dimension, rows not aligned to 16 bytes
    (120, "sv_arcface", "fp16", (20, 140, 72), {}),
]
MORE = [
    (80, "arcface_linear", "bf16_weight", (20, 140, 64), {"bias": True}),
    (80, "normface", "fp32", (20, 130, 40), {}),
    (80, "cosface", "fp32", (20, 65, 33), {"per": "sample"}),
    (80, "combined_clamp", "bf16", (140, 130, 64), {"per": "class"}),
    (80, "sphereface_real", "fp32", (20, 65, 24), {}),
]
MORE += [(120 if arch == 80 else 80, *rest) for arch, *rest in NUMBERS + MORE[:3]]  # the other architecture


def name_of(case):
    arch, margin, mode, shape, options = case
    return "-".join([f"sm_{arch}", margin, mode, "x".join(map(str, shape)), *options])


@pytest.mark.parametrize(
    "arch, margin, mode, shape, options",
    [
        pytest.param(*case, id=name_of(case), marks=pytest.mark.slow if n else ())
        for n, case in enumerate(NUMBERS + MORE)
    ],
)
def test_numbers(arch, margin, mode, shape, options):
    problem = cases.problem(cases.MARGINS[margin], cases.MODES[mode], *shape, **options)
    with emulated(arch):
        got = cases.run(problem, "cuda")
    rule = cases.ErrorRule()
    rule.add_all(got, cases.plain(problem), cases.exact(problem))
    rule.check()
    row = {"device": f"sm_{arch}", "margin": margin, "mode": mode}
    row |= {"batch x classes x dimension": "x".join(map(str, shape)), "options": ", ".join(options) or "-"}
    for name, (ours, plain) in rule.errors.items():
        row |= {f"{name}: ours": f"{ours.max:.1e}", f"{name}: allowed": f"{2 * plain.max:.1e}"}
    shown = {name: value for name, value in row.items() if not name.startswith(("d_bias", "d_scale", "d_m"))}
    record("cuda_numbers", shown)


@pytest.mark.slow
def test_sums_that_tensor_cores_truncate():
    """Under the error rule in float32; and the emulator's tensor core is the simulator's, bit for bit."""
    s, best = sweep("identity", torch.float32, bias=False, dim=512, batch=5, classes=40), []
    run = functools.partial(execute, truncates=True)
    for place in (emulated(80, run), simulated(truncates=True)):
        with place:
            s.check()
            spec = s.spec("cuda", want=int(Want.STATS), compute_dtype=torch.float32)
            x, w, scale = (s.leaves[n].detach() for n in ("x", "w", "scale"))
            best.append(Aux(*ops.sweep(x, w, s.labels, scale, None, None, None, torch.zeros(0), spec)[3]).best)
    assert torch.equal(*best)


class Memory(NamedTuple):
    """All buffers of a launch, as they were."""

    buffers: list
    copies: list

    @classmethod
    def of(cls, buffers):
        return cls(buffers, [memory.copy() for _, memory in buffers])

    def restore(self):
        for (_, memory), copy in zip(self.buffers, self.copies, strict=True):
            memory[:] = copy

    def changed(self):
        """(buffer number, its last byte that is not as it was) of each that has changed."""
        found = []
        for number, ((_, memory), copy) in enumerate(zip(self.buffers, self.copies, strict=True)):
            differs = (memory != copy).nonzero()[0]
            if len(differs):
                found.append((number, int(differs[-1])))
        return found


def outcome(launch, text, buffers, smem):
    """ "" or the emulator's complaint."""
    name, _, grid, threads, argument, *_ = launch
    try:
        execute(name, text, grid, threads, argument, smem, buffers)
    except PTXError as e:
        return str(e)
    return ""


def mutate(launch):
    """{mutant: the complaint, or "" if no bit of memory is another}; a mutant that changes memory unseen fails."""
    name, text, *_, smem, buffers = launch
    before = Memory.of(buffers)
    execute(*launch)
    written, right = before.changed(), Memory.of(buffers)
    tried = [(mutant, changed, buffers, smem) for mutant, changed in mutations.mutants(text)]
    if smem:
        tried.append(("less shared memory", text, buffers, max(smem - 256, 0)))
    for number, last in written:
        short = [(at, m[:last] if k == number else m) for k, (at, m) in enumerate(buffers)]
        tried.append((f"output {number} shortened", text, short, smem))
    found = {}
    for mutant, changed, given, shared in tried:
        before.restore()
        found[mutant] = outcome(launch, changed, given, shared)
        if not found[mutant]:
            assert right.changed() == [], f"{name}, {mutant}: other numbers, no report"
    right.restore()
    return found


SHORT = re.compile(r"3gpu\d+([a-z_]+?)_kernel")
SWEEPS = ("forward", "gradient")


def mutating(found, kernels):
    """For `emulated`: puts {kernel: its mutants} of the first launch of each; kernels: short names, or None for all."""

    def run(name, *rest):
        short = SHORT.search(name)[1]
        if short in found or (kernels and short not in kernels):
            return execute(name, *rest)
        found[short] = mutate((name, *rest))
        return None

    return run


def mutated_step(arch, mode, kernels, margin="arcface_linear"):
    """{kernel: its mutants} of one step."""
    found = {}
    p = cases.problem(cases.MARGINS[margin], cases.MODES[mode], 20, 140, 104)
    x, w = (p.leaves()[name] for name in ("x", "w"))
    with emulated(arch, mutating(found, kernels), programs=1):  # so that one program has several tiles
        loss = fm.functional.margin_cross_entropy(
            x, w, p.labels, p.case.make(p.case.params), scale=p.scale, compute_dtype=p.mode.compute, backend="cuda"
        )  # the mean: rows are counted in shared memory
        loss.backward()
    return found


def check_mutants(found, arch, mode, recorded=True):
    for kernel, mutants in found.items():
        reported = [name for name, complaint in mutants.items() if complaint]
        silent = [name for name in mutants if name not in reported]
        row = {"kernel": f"`{kernel}`", "device": f"sm_{arch}", "mode": mode, "mutants": len(mutants)}
        row |= {"reported": len(reported), "not needed here: no bit changes": ", ".join(silent) or "-"}
        if recorded:
            record("cuda_mutants", row)
        assert [name for name in silent if name.startswith("output") or name == "less shared memory"] == []
        if kernel in SWEEPS:
            assert any("barrier" in name for name in reported)
            assert any("wait" in name for name in reported)


def test_mutants_of_the_forward():
    """Among those of the slow test, which makes the table."""
    check_mutants(mutated_step(80, "bf16", ("forward",)), 80, "bf16", recorded=False)


@pytest.mark.slow
@pytest.mark.parametrize("arch, mode", [(80, "bf16"), (80, "fp16"), (80, "fp32"), (120, "bf16")])
def test_mutants(arch, mode):
    check_mutants(mutated_step(arch, mode, None), arch, mode)


def test_a_weight_that_is_too_short():
    """Labels and launch say 140 rows; the last one is not there."""
    problem = cases.problem(cases.MARGINS["normface"], cases.MODES["bf16"], 20, 140, 64)
    w = problem.tensors["w"]

    def run(name, text, grid, threads, argument, smem, buffers):
        row = w.shape[1] * w.element_size()
        short = [(at, m[:-row] if len(m) == w.numel() * w.element_size() else m) for at, m in buffers]
        execute(name, text, grid, threads, argument, smem, short)

    with emulated(80, run), pytest.raises(PTXError, match="out-of-bounds global"):
        cases.run(problem, "cuda")


@pytest.mark.slow
def test_same_bits_twice():
    problem = cases.problem(cases.MARGINS["arcface_linear"], cases.MODES["bf16"], 20, 140, 64)
    found = []
    for _ in range(2):
        with emulated(80):
            found.append(cases.run(problem, "cuda"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 120])
@pytest.mark.parametrize("operands", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_masks_at_the_threshold_are_decided_alike_in_both_directions(arch, operands):
    with emulated(arch):
        check_masks_of_both_directions("cuda", operands, arch // 40 % 2, 20, 140, 104)
