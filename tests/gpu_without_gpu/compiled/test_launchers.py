"""The launch code of the Triton backend: it waits for no value of the device, and a ragged batch compiles nothing anew.

The first on meta tensors, which have no values, under the modes of test_no_sync; launches are caught. The second on CPU
tensors, whose addresses count, up to the point where Triton would compile.
"""

import pytest
import torch
from triton import knobs

from fused_margin.functional import margin_cross_entropy
from fused_margin.kernels import gradients, launch, steps
from fused_margin.margins import ArcFace
from fused_margin.spec import Need, Want

from ...test_no_sync import Waits, no_waiting
from ..fake_driver import recorded
from ..resources import ADAMW, MOMENTUM
from ..steps import emulated, shaped_rows, shaped_step, tiny

SHAPE = {"batch": 48, "classes": 9000, "dim": 64}
EVERY = Need.X | Need.W | Need.SCALE | Need.BIAS
LAUNCHERS = {
    "loss": lambda: shaped_step(**SHAPE),
    "chunk form, statistics": lambda: shaped_step(**SHAPE, want=Want.DX | Want.SUM | Want.STATS, sub_centers=3),
    "mask, bias, scale": lambda: shaped_step(**SHAPE, rule="hard", bias=True, want=Want.DX | Want.DSCALE, need=EVERY),
    "softplus in fp16": lambda: shaped_step(**SHAPE, dtype=torch.float16, rule="power", reduction="softplus"),
    "index": lambda: shaped_step(**SHAPE, index=True),
    "step": lambda: shaped_step(**SHAPE, need=0, update=ADAMW),
    "step with an index": lambda: shaped_step(**SHAPE, need=0, update=ADAMW, index=True),
    "step of rows": lambda: shaped_rows(100, 9000, 64, MOMENTUM),
    "step of rows, counted": lambda: shaped_rows(100, 9000, 64, ADAMW),
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_wait_for_nothing(name):
    with recorded(90) as launches, no_waiting():
        LAUNCHERS[name]()
    assert launches


PLANTED = {
    "a copy to the host": lambda t: t.cpu(),
    "a value": lambda t: t.sum().item(),
    "a branch": lambda t: bool((t > 0).any()),
    "a list": lambda t: t.tolist(),
    "a shape": lambda t: t.nonzero(),
    "a number of the host": lambda t: torch.tensor([1.0], device=t.device),
}


@pytest.mark.parametrize("where, name", [(launch, "loss"), (gradients, "loss"), (steps, "step of rows")])
@pytest.mark.parametrize("what", PLANTED)
def test_what_waits_in_a_launcher_is_found(what, where, name, monkeypatch):
    run = where.run

    def waiting(kernel, programs, *args, **constants):
        PLANTED[what](args[0])
        run(kernel, programs, *args, **constants)

    monkeypatch.setattr(where, "run", waiting)
    with recorded(90), no_waiting(), pytest.raises((Waits, RuntimeError)):
        LAUNCHERS[name]()


def variants(batch: int, form: str) -> set[str]:
    """What Triton would compile for a training step: each kernel with what it is specialised on."""
    found = set()

    def instead_of_compiling(**about):
        found.add(f"{about['fn'].name} {about['key']}")
        return True

    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(batch, 64, generator=g).bfloat16().requires_grad_(), torch.randn(300, 64).requires_grad_()
    labels = torch.randint(300, (batch,), generator=g)
    with emulated(90, tiny(flash_width=128 if form == "flash" else 0)), knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = instead_of_compiling
        for reduction in ("mean", "none"):
            loss = margin_cross_entropy(x, w, labels, ArcFace(), backend="triton", reduction=reduction)
            loss.sum().backward()
    return found


@pytest.mark.parametrize("form", ["flash", "chunk"])
def test_a_ragged_batch_compiles_nothing_anew(form):
    whole = variants(128, form)
    assert len({name.split()[0] for name in whole}) == 8
    for batch in (127, 126, 125):
        assert variants(batch, form) == whole
