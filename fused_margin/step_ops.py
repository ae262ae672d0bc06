"""The optimizers' operators, declared as the sweep is in ops.py: weights and state are updated in place.

update_rows(w, state, index, grad, update)    a step on the rows `index` (all, without) with their gradient [rows, D]
sweep_step(w, state, index, calls, update)    the same with the gradient of calls of the sweep, which is never whole:
                                              each tile's is made and used up before the next

A backend without `sweep_step` makes the gradient in memory; without `update_rows`, plain PyTorch takes the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops  # noqa: F401 (defines the library that this is a part of)
from .backends import BACKENDS
from .deferred import Call, calls_of
from .spec import SPEC_SCHEMA, Need, Spec
from .update_rules import UPDATE_SCHEMA, State, Update, update_rows

_STATE = "Tensor(a!) w, Tensor(b!)? m, Tensor(c!)? v, Tensor(d!)? step, Tensor? index"
_CALLS = (
    "Tensor[] g_red, Tensor[] g_cos_y, Tensor[] g_sum_u, Tensor[] x, Tensor[] labels, Tensor[] scale, Tensor[] tau, "
    "Tensor[] bias, Tensor[] rule_args, Tensor[] red, Tensor[] aux, Tensor[] kept"
)
_library = torch.library.Library("fused_margin", "FRAGMENT")
_library.define(f"update_rows({_STATE}, Tensor grad, {UPDATE_SCHEMA}, str backend) -> ()")
_library.define(f"sweep_step({_STATE}, {_CALLS}, {SPEC_SCHEMA}, {UPDATE_SCHEMA}) -> ()")


def take_step(w: Tensor, state: State, index: Tensor | None, grad: Tensor, update: Update) -> None:
    """See `update_rows` above; in one pass where a backend has it and the state is contiguous."""
    tensors = (w, *(t for t in state if t is not None))
    able = (name for name, b in BACKENDS.items() if hasattr(b, "update_rows") and not b.why_not(grad, w, Spec()))
    fused = all(t.is_contiguous() for t in tensors[1:])
    torch.ops.fused_margin.update_rows(
        w, *state, index, grad, *update, next(able, "reference") if fused else "reference"
    )
    torch.autograd.graph.increment_version(tensors)


def take_sweep_step(
    w: Tensor, state: State, index: Tensor | None, calls: Sequence[Call], spec: Spec, update: Update
) -> None:
    """See `sweep_step` above. The calls differ in their rows and tensors only; all have a tau and a bias, or none."""
    lists = ([t for t in field if t is not None] for field in zip(*calls, strict=True))
    torch.ops.fused_margin.sweep_step(w, *state, index, *lists, *spec, *update)
    torch.autograd.graph.increment_version((w, *(t for t in state if t is not None)))


def gradient(w: Tensor, index: Tensor | None, calls: Sequence[Call], spec: Spec) -> Tensor:
    """The rows' gradient [rows, D] in memory, the sum over the calls."""
    total = None
    for c in calls:
        empty = c.red.new_empty(0)
        d_w = torch.ops.fused_margin.sweep_backward(
            c.g_red, c.g_cos_y, c.g_sum_u, c.x, w, c.labels, c.scale, c.tau, c.bias, index, c.rule_args, c.red, c.aux,
            empty, empty.clone(), c.kept, *spec, int(Need.W),
        )[1]  # fmt: skip
        total = d_w if total is None else total.add_(d_w)
    return total


def _run_update_rows(w, m, v, step, index, grad, *fields):
    update, state = Update(*fields[:-1]), State(m, v, step)
    if fields[-1] == "reference":
        update_rows(w, state, index, grad, update)
    else:
        BACKENDS[fields[-1]].update_rows(w, state, index, grad, update)


def _run_sweep_step(w, m, v, step, index, *rest):
    lists, fields = rest[: len(Call._fields)], rest[len(Call._fields) :]
    spec, update = Spec(*fields[: len(Spec._fields)]), Update(*fields[len(Spec._fields) :])
    fused, state = getattr(BACKENDS[spec.backend], "sweep_step", None), State(m, v, step)
    if fused is not None and all(t is None or t.is_contiguous() for t in state):
        fused(w, state, index, lists, spec, update)
        return
    wide = w if w.dtype == torch.float64 else w.float()  # so that the gradient is not rounded to 16 bit
    update_rows(w, state, index, gradient(wide, index, calls_of(lists), spec), update)


_library.impl("update_rows", _run_update_rows, "CompositeExplicitAutograd")
_library.impl("sweep_step", _run_sweep_step, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_margin::update_rows")
def _(*args):
    return None


@torch.library.register_fake("fused_margin::sweep_step")
def _(*args):
    return None
