"""Compiled code of both directions sees the same bits of a cosine: a mask at the threshold is decided alike.

In the emulator, with the tiles that ship, where the forward's and the backward's differ (flash form) and where not. And
by the compiler's layouts, which decide the order in which a norm is added up, where there is nothing that executes.
"""

import re

import pytest
import torch

from fused_margin.kernels import gradients
from fused_margin.spec import Want

from ...test_primitive import ALL, check_masks_of_both_directions
from ..fake_driver import recorded
from ..resources import ARCHES, STEPS, SWEEPING
from ..steps import emulated, shaped_step

FORMS = {"flash": Want.DX | Want.STATS | Want.DSCALE, "chunk": ALL}
OPERANDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CASES = [
    (arch, operands, form)
    for arch in (80, 90, 120)
    for operands in OPERANDS
    for form in FORMS
    if (operands, form) != ("fp32", "flash")  # float32 has no flash form
]


def check(operands, form, ahead, **options):
    check_masks_of_both_directions("triton", OPERANDS[operands], ahead, 40, 200, 96, want=FORMS[form], **options)


@pytest.mark.parametrize(
    "arch, operands, form, ahead",
    [
        pytest.param(*case, number % 2, marks=pytest.mark.slow if number != 1 else ())
        for number, case in enumerate(CASES)
    ],
)
def test_both_directions(arch, operands, form, ahead):
    with emulated(arch):
        check(operands, form, ahead)


def layout_of_norms(launch):
    """In which threads the squares lie whose sum over the depth is a norm."""
    text = launch.compile().asm["ttgir"]
    shape = f"{launch.args['DEPTH']}x{launch.args['SLOTS']}"
    reduced = re.findall(rf'"tt\.reduce"\(%\w+\) <{{axis = 0.*?\(tensor<{shape}xf32, (#\w+)>\)', text, re.S)
    assert reduced, launch.name
    return {re.search(rf"^{name} = (.*)$", text, re.M)[1] for name in reduced}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES, ids=str)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_layouts_of_norms(step, arch):
    with recorded(arch) as launches:
        shaped_step(**step.options)
    by_kernel = {launch.name: layout_of_norms(launch) for launch in launches[:20] if launch.name in SWEEPING}
    forward, backward = (by_kernel[name] for name in SWEEPING)
    assert forward == backward


@pytest.mark.slow
def test_another_order_in_the_backward_is_found(monkeypatch):
    """Slices of half the depth add a norm up in another order."""
    constants = gradients.sweep_constants
    monkeypatch.setattr(gradients, "sweep_constants", lambda *args: constants(*args) | {"DEPTH": 16})
    with emulated(80), pytest.raises(AssertionError, match="comparison failed"):
        check("bf16", "chunk", 1)
