"""One training step of the fused head as the Triton backend launches it, for any architecture, without a GPU.

with recorded(90) as launches: shaped_step(512, 10**6, 512)  # meta tensors: no memory, no numbers
with emulated(90): cases.run(problem, "triton")              # CPU tensors: the compiled PTX runs
"""

import contextlib

import torch
import triton

from fused_margin.backends import triton as backend
from fused_margin.deferred import Call
from fused_margin.kernels import configs, gradients, launch
from fused_margin.kernels import steps as updates
from fused_margin.margins import ArcFace
from fused_margin.margins.forms import forms_of
from fused_margin.rules import RULES
from fused_margin.spec import Need, Spec, Want
from fused_margin.update_rules import State, Update

from . import ptx
from .fake_driver import FakeDriver


def tiny(rows=32, slots=64, depth=32, flash_width=0, precision="ieee"):
    """A cut for the emulator: the kernels are the same, the tiles small."""
    tile = configs.Tile(rows, slots, warps=4, stages=2)
    cut = configs.Cut(tile, tile, tile, depth, flash_width)
    return configs.Device(cut, cut, precision, programs=4, chunk_bytes=2**20)


def _new(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def _state(update: Update, rows: int, dim: int) -> State:
    adam = update.optimizer == "adamw"
    return State(
        _new(rows, dim) if adam or update.momentum else None,
        _new(rows, dim) if adam else None,
        _new(rows) if adam or update.dampening else None,
    )


def shaped_rows(rows, classes, dim, update, dtype=torch.float32, weight_dtype=torch.float32):
    """The step on `rows` of the class weights whose gradients are in memory, on meta tensors."""
    index = None if rows == classes else _new(rows, dtype=torch.int64)
    w, grad = _new(classes, dim, dtype=weight_dtype), _new(rows, dim, dtype=dtype)
    updates.update_rows(w, _state(update, classes, dim), index, grad, update)


@contextlib.contextmanager
def emulated(arch, device=None, execute=ptx.launch):
    """Within the block the Triton backend takes CPU tensors, and each launch runs in the emulator."""
    driver = FakeDriver(arch, execute=execute)
    triton.runtime.driver.set_active(driver)
    why_not, backend.why_not = backend.why_not, lambda *args: []
    try:
        with configs.use(device) if device else contextlib.nullcontext():
            yield driver
    finally:
        backend.why_not = why_not


def shaped_step(
    batch,
    classes,
    dim,
    dtype=torch.bfloat16,
    weight_dtype=torch.float32,
    rule="identity",
    reduction="logsumexp",
    sub_centers=1,
    bias=False,
    want=Want.DX,
    need=Need.X | Need.W,
    update=None,
    index=False,
):
    """Forward and backward of the sweep on meta tensors: only the launch code runs. With an update, its step too."""
    new = _new
    x, w = new(batch, dim, dtype=dtype), new(classes * sub_centers, dim, dtype=weight_dtype)
    labels, scale = new(batch, dtype=torch.int64), new(batch)
    tau, offsets = new(batch) if RULES[rule].needs_tau else None, new(classes) if bias else None
    spec = Spec(
        rule=rule, reduction=reduction, sub_centers=sub_centers, compute_dtype=dtype, num_classes=classes,
        want=int(want), backend="triton",
    )  # fmt: skip
    chosen = new(classes * sub_centers // 2, dtype=torch.int64) if index else None
    inputs = x, w, labels, scale, tau, offsets, chosen, new(max(len(RULES[rule].args), 1))
    if tau is None and not bias and not index and reduction == "logsumexp":
        _, _, aux, o_red = launch.sweep_loss(*inputs[:4], inputs[-1], spec, forms_of(ArcFace()).packed(), "mean")
    else:
        _, _, _, aux, o_red, _ = launch.sweep(*inputs, spec)
    vector = new(batch)
    if need:
        gradients.sweep_backward(vector, vector, vector, *inputs, vector, aux, o_red, new(0), spec, int(need))
    if update:
        call = Call(*[vector] * 3, x, *inputs[2:6], inputs[-1], vector, aux, new(0))
        gradients.sweep_step(w, _state(update, *w.shape), chosen, [call], spec, update)
