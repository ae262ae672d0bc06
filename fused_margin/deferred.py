"""The gradient of weights whose optimizer runs the dW sweep itself: O(B x D) numbers in the place of [C, D].

`fm.optim.SweepSGD` and `SweepAdamW` announce their weights here; the autograd rule of ops.py then gives a
`DeferredGradient` for them. It takes part in what a training loop does with gradients (accumulation, unscaling,
multiplication by a number, zero_grad), and says what to do where somebody wants its numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .rules import RULES
from .spec import Spec

_optimizers: list[weakref.ref] = []  # of live sweep optimizers


def announce(optimizer: torch.optim.Optimizer) -> None:
    """From now on, as long as the optimizer lives, its parameters get deferred gradients from the sweep."""
    alive = [ref for ref in _optimizers if ref() is not None and ref() is not optimizer]
    _optimizers[:] = [*alive, weakref.ref(optimizer)]


def local(t: Tensor) -> Tensor:
    """The shard here of a DTensor; any other tensor as it is."""
    return getattr(t, "_local_tensor", t)


def home(w: Tensor) -> Tensor | None:
    """The (local) parameter of a live sweep optimizer that lies where w does, or None."""
    for ref in tuple(_optimizers):
        optimizer = ref()
        for group in optimizer.param_groups if optimizer is not None else ():
            for parameter in group["params"]:
                mine = local(parameter)
                if mine.numel() == w.numel() and mine.dtype == w.dtype and _address(w, mine) == mine.data_ptr():
                    return mine
    return None


def _address(w: Tensor, mine: Tensor) -> int:
    try:
        return w.data_ptr()
    except RuntimeError:
        raise RuntimeError(
            f"a head with a weight of {list(w.shape)} is being compiled while a sweep optimizer owns one of "
            f"{list(mine.shape)}; a deferred gradient cannot be part of a compiled graph. Put the head's call outside "
            "(torch.compiler.disable(head)), or use RowSGD, RowAdamW or an optimizer of torch"
        ) from None


class Call(NamedTuple):
    """What one call of the sweep leaves for the step: its inputs but w and index, and what came from upstream."""

    g_red: Tensor  # [B]
    g_cos_y: Tensor  # [B]
    g_sum_u: Tensor  # [B]
    x: Tensor  # [B, D]
    labels: Tensor  # [B]
    scale: Tensor  # [B]
    tau: Tensor | None  # [B]
    bias: Tensor | None  # [C]
    rule_args: Tensor
    red: Tensor  # [B]
    aux: Tensor  # [6, B]
    kept: Tensor  # products of the forward, or none


def calls_of(lists: Sequence[list[Tensor]]) -> list[Call]:
    """From a list for each field, as an operator takes them: without a tensor where the calls have none."""
    return [Call(*(field[k] if field else None for field in lists)) for k in range(len(lists[0]))]


class RowData(NamedTuple):
    """A call with its spec, the rows of w that it read, and the parameter in the state it was in."""

    call: Call
    index: Tensor | None
    spec: Spec
    w: Tensor  # [R, D], as the sweep had it
    parameter: Tensor
    version: int

    def check(self) -> None:
        if self.parameter._version != self.version:
            raise RuntimeError(
                f"a weight of {list(self.parameter.shape)} has changed since the backward pass that its deferred "
                "gradient comes from; the sweep would find other cosines. Call zero_grad() after each step(), and "
                "change the weight at no time between backward() and step()"
            )

    def forget(self) -> RowData:
        """The same without products, so that the memory of several calls does not add up."""
        return self._replace(call=self.call._replace(kept=self.call.kept.new_empty(0)))

    def with_upstream(self, f: Callable[[list[Tensor]], Iterable[Tensor]]) -> RowData:
        """The same with f of the three upstream gradients."""
        g_red, g_cos_y, g_sum_u = f(list(self.call[:3]))
        return self._replace(call=self.call._replace(g_red=g_red, g_cos_y=g_cos_y, g_sum_u=g_sum_u))


def gradient(w: Tensor, parameter: Tensor, call: Call, index: Tensor | None, spec: Spec) -> DeferredGradient:
    """Of one backward. What is kept is cloned: until the step, the caller may do as he likes with his tensors.

    The spec stays as it is: on a GPU what the forward was asked for decides tiles, and with them the bits of a cosine.
    (A step over several passes takes the first one's.)
    """
    if not RULES[spec.rule].needs_tau:
        call = call._replace(tau=None)  # sweep_loss gives one in any case
    mine = Call(*(None if t is None else t.detach().clone() for t in call[:-1]), call.kept)
    index = None if index is None else index.clone()
    return DeferredGradient(w, [RowData(mine, index, spec, w.detach(), parameter, parameter._version)])


class DeferredGradient(Tensor):
    """A gradient that its optimizer makes tile by tile inside `step()`. No numbers are here; `to_dense()` makes them.

    Supported: `+` and `+=` with another one (gradient accumulation), multiplication and division by a number,
    `zero_()`, `GradScaler`, `clone`, `detach`, `view`. Everything else raises.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    calls: list[RowData]  # one list for a tensor and its views, so that what changes one in place changes all

    @staticmethod
    def __new__(cls, like: Tensor, calls: list[RowData], shape: torch.Size | None = None) -> DeferredGradient:
        made = Tensor._make_wrapper_subclass(
            cls, like.shape if shape is None else shape, dtype=like.dtype, device=like.device
        )
        made.calls = calls
        return made

    def __repr__(self) -> str:
        rows = sum(len(c.call.x) for c in self.calls)
        return f"DeferredGradient(shape={list(self.shape)}, {len(self.calls)} calls of the sweep with {rows} rows)"

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The gradient as an ordinary tensor of its shape: one sweep, and the memory that was to be saved."""
        from . import step_ops

        total = torch.zeros(self.shape, dtype=dtype or self.dtype, device=self.device)
        for c in self.calls:
            c.check()
            rows = total.view(c.w.shape)
            d_w = step_ops.gradient(c.w, c.index, [c.call], c.spec).to(total.dtype)
            rows.add_(d_w) if c.index is None else rows.index_add_(0, c.index, d_w)
        return total

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in _SUPPORTED:
            raise RuntimeError(
                f"{name} needs the numbers of a gradient that is never made: this weight's optimizer (SweepSGD, "
                "SweepAdamW) computes it tile by tile inside step(). To clip by norm, leave this weight out, as in "
                "clip_grad_norm_(backbone.parameters(), ...): rows of normalised weights need no clipping; or train "
                "the weight with an optimizer of torch, RowSGD or RowAdamW. grad.to_dense() makes an ordinary tensor"
            )
        return _SUPPORTED[name](*args, **(kwargs or {}))


def _alias(grad: DeferredGradient, *_, **__) -> DeferredGradient:
    return DeferredGradient(grad, grad.calls)


def _clone(grad: DeferredGradient, *_, **__) -> DeferredGradient:
    return DeferredGradient(grad, list(grad.calls))


def _empty(like: DeferredGradient, *_, **__) -> DeferredGradient:
    return DeferredGradient(like, [])


def _view(grad: DeferredGradient, size: list[int], *_) -> DeferredGradient:
    return DeferredGradient(grad, grad.calls, torch.empty(grad.shape, device="meta").view(size).shape)


def _sum(a: Tensor, b: Tensor, alpha: float = 1) -> list[RowData]:
    if not isinstance(a, DeferredGradient) or not isinstance(b, DeferredGradient):
        raise RuntimeError(
            "a weight of a sweep optimizer (SweepSGD, SweepAdamW) got a gradient from outside of the fused sweep "
            "too, as from a penalty on the weight or another use of it; expected calls of the head only. Use "
            "weight_decay for a penalty, or train this weight with an optimizer of torch, RowSGD or RowAdamW"
        )
    more = [c.with_upstream(lambda g: [alpha * t for t in g]) if alpha != 1 else c for c in b.calls]
    calls = a.calls + more
    return calls if len(calls) == 1 else [c.forget() for c in calls]


def _add_(a: DeferredGradient, b: Tensor, alpha: float = 1) -> DeferredGradient:
    a.calls[:] = _sum(a, b, alpha)
    return a


def _multiplied(grad: Tensor, factor: Tensor | float, divide: bool = False) -> list[RowData]:
    if not isinstance(grad, DeferredGradient) or (isinstance(factor, Tensor) and factor.dim()):
        raise RuntimeError(
            "a deferred gradient can be multiplied with a number, not with a tensor. "
            "grad.to_dense() makes an ordinary tensor"
        )
    return [c.with_upstream(lambda g: [t / factor if divide else t * factor for t in g]) for c in grad.calls]


def _scale_(grad: DeferredGradient, factor: Tensor | float, divide: bool = False) -> DeferredGradient:
    grad.calls[:] = _multiplied(grad, factor, divide)
    return grad


def _zero_(grad: DeferredGradient) -> DeferredGradient:
    grad.calls.clear()
    return grad


def _copy_(grad: DeferredGradient, other: Tensor, non_blocking: bool = False) -> DeferredGradient:
    grad.calls[:] = _sum(_empty(grad), other)
    return grad


def _for_each(f: Callable) -> Callable:
    def run(grads: list[Tensor], *args) -> None:
        for number, grad in enumerate(grads):
            f(grad, *(a[number] if isinstance(a, list) else a for a in args))

    return run


def _unscale(grads: list[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """What GradScaler does to gradients, done to the upstream gradients: dW is finite where they are."""

    def run(upstream: list[Tensor]) -> list[Tensor]:
        upstream = [t.clone() for t in upstream]
        torch._amp_foreach_non_finite_check_and_unscale_(upstream, found_inf, inv_scale)
        return upstream

    for grad in grads:
        if isinstance(grad, DeferredGradient):
            grad.calls[:] = [c.with_upstream(run) for c in grad.calls]
        else:
            torch._amp_foreach_non_finite_check_and_unscale_([grad], found_inf, inv_scale)


_SUPPORTED: dict[str, Callable] = {
    **dict.fromkeys(("detach", "alias"), _alias),
    "clone": _clone,
    **dict.fromkeys(("empty_like", "new_empty", "new_empty_strided"), _empty),
    **dict.fromkeys(("view", "_unsafe_view", "_reshape_alias"), _view),
    "add": lambda a, b, alpha=1: DeferredGradient(a, _sum(a, b, alpha)),
    "add_": _add_,
    "mul": lambda a, b: DeferredGradient(a, _multiplied(a, b)),
    "mul_": _scale_,
    "div": lambda a, b: DeferredGradient(a, _multiplied(a, b, True)),
    "div_": lambda a, b: _scale_(a, b, True),
    "zero_": _zero_,
    "copy_": _copy_,
    "_foreach_zero_": _for_each(_zero_),
    "_foreach_mul_": _for_each(_scale_),
    "_foreach_div_": _for_each(lambda a, b: _scale_(a, b, True)),
    "_amp_foreach_non_finite_check_and_unscale_": _unscale,
}
