"""Optimizers that run the dW sweep: the backward pass leaves O(B x D) numbers, `step()` makes the weights' gradient
tile by tile and updates weight and state with it at once. There is no gradient tensor of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import step_ops
from ..deferred import Call, DeferredGradient, RowData, announce
from .base import AdamWRule, RowOptimizer, SGDRule


class _Sweep(RowOptimizer):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        announce(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        announce(self)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        for parameter in group["params"]:
            if parameter.dim() != 2:
                raise ValueError(
                    f"got a parameter of shape {list(parameter.shape)}; expected class weights [C, D] of a head only. "
                    "The head's other parameters (bias, scale, a margin's) go to another optimizer"
                )

    def _step_one(self, parameter: Tensor, w: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if not w.numel():
            return
        if not isinstance(grad, DeferredGradient):
            raise RuntimeError(
                f"the gradient of a weight {list(w.shape)} is an ordinary tensor. It comes from a backward pass before "
                "this optimizer was made (call zero_grad()), or the head did not give the weight itself to the sweep "
                "but a copy of it (a cast, a parametrization), or the weight was used otherwise; RowSGD, RowAdamW and "
                "torch.optim take such gradients"
            )
        update = self._update(group)
        if not grad.calls:  # set to zero
            state = self._local_state(parameter, group, w.shape[1])
            step_ops.take_step(w, state, None, w.new_zeros(1, w.shape[1]).expand(w.shape), update)
            return
        for data in grad.calls:
            data.check()
        first = grad.calls[0]
        rows = w if first.w.shape == w.shape else w.view(first.w.shape)
        state = self._local_state(parameter, group, rows.shape[1])
        step_ops.take_sweep_step(rows, state, first.index, merged(grad.calls), first.spec, update)


def merged(calls: list[RowData]) -> list[Call]:
    """Calls whose rows can be one bigger batch as one, the others in turn. Raises where they differ in more."""
    first = calls[0]
    found: list[list[Call]] = []
    for data in calls:
        if data is not first:
            _check_alike(first, data)
        same = (group for group in found if _same_tensors(group[0], data.call))
        group = next(same, None)
        if group is None:
            found.append([data.call])
        elif len(data.call.x):
            group.append(data.call)
    found = [g for g in found if len(g[0].x)] or found[:1]
    return [group[0] if len(group) == 1 else _joined(group) for group in found]


def _joined(group: list[Call]) -> Call:
    rows = {name: torch.cat([getattr(c, name) for c in group]) for name in Call._fields[:6]}
    tau = None if group[0].tau is None else torch.cat([c.tau for c in group])
    red, aux = torch.cat([c.red for c in group]), torch.cat([c.aux for c in group], 1)
    return group[0]._replace(**rows, tau=tau, red=red, aux=aux)


def _same_tensors(a: Call, b: Call) -> bool:
    """Whether what is not of single rows is the same: the rule's arguments (they may move each step), the bias."""
    return (
        a.x.dtype == b.x.dtype
        and _same_numbers(a.rule_args, b.rule_args)
        and (a.bias is None or _same_numbers(a.bias, b.bias))
        and len(a.x) > 0
    )


def _same_numbers(a: Tensor, b: Tensor) -> bool:
    """On a GPU only of none: to look at others would wait for it, longer than two calls in turn take."""
    return torch.equal(a, b) if a.device.type == "cpu" else not a.numel()


def _check_alike(a: RowData, b: RowData) -> None:
    differ = [f"{name} {getattr(a.spec, name)} and {getattr(b.spec, name)}" for name in a.spec._fields
              if getattr(a.spec, name) != getattr(b.spec, name) and name != "want"]  # fmt: skip
    if (a.call.bias is None) != (b.call.bias is None):
        differ.append("a bias and none")
    if a.w.shape != b.w.shape:
        differ.append(f"weights {list(a.w.shape)} and {list(b.w.shape)}")
    if (a.index is None) != (b.index is None) or (a.index is not None and not torch.equal(a.index, b.index)):
        differ.append("sampled classes")
    if differ:
        raise RuntimeError(
            "backward passes of one step must be alike for a sweep optimizer, but they have different "
            f"{'; '.join(differ)}. Call step() after each of them, or use an optimizer of torch, RowSGD or RowAdamW"
        )


class SweepSGD(_Sweep, SGDRule):
    """SGD whose `step()` computes the class weights' gradient and uses it up tile by tile.

    Equivalent to: `torch.optim.SGD` on the gradient of the fused head, within rounding. With sampled classes, only
    their rows move, as in `RowSGD`.

    Between backward() and step() the weight's `.grad` is a `DeferredGradient`, which holds what the sweep needs:
    O(B x D) numbers. Several backward passes add up, whatever their scales and margins, if they have the same rival
    rule, dtypes and sampled classes; GradScaler works; clipping by norm raises. Do not change the weight between
    backward and step, and call `zero_grad()` after each step.

    Args: params: weights [C, D] of fused heads, and nothing else; the rest as `torch.optim.SGD`'s.
        Weights may be float32, float64, bfloat16 or float16, plain or DTensors; momentum is float32 (float64 for
        float64), and 16-bit weights are rounded to nearest, ties to even.
    """


class SweepAdamW(_Sweep, AdamWRule):
    """AdamW whose `step()` computes the class weights' gradient and uses it up tile by tile.

    Equivalent to: `torch.optim.AdamW` on the gradient of the fused head, within rounding; with sampled classes,
    `RowAdamW`. What `SweepSGD` says holds here too.
    """
