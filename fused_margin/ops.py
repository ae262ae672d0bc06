"""The primitive as registered operators: one schema, one fake kernel, one autograd rule, whatever the backend.

    sweep(x [B, D], w [C, D], labels [B], scale [B], ...) -> red, cos_y, sum_u [B], aux [6, B], o_red, o_sum
    red_i = log sum_{j != y_i} exp(u_ij)      u_ij = scale_i * N(cos_ij) + bias_j      (or sum of softplus(u_ij))

red, cos_y and sum_u are differentiable; o_red and o_sum [B, D] are what the backward needs for x, made in the forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import BACKENDS
from .spec import SPEC_SCHEMA, Aux, Need, Spec, Want, acc_dtype

_INPUTS = "Tensor x, Tensor w, Tensor labels, Tensor scale, Tensor? tau, Tensor? bias, Tensor? index, Tensor rule_args"
_NUM_INPUTS = 8

_library = torch.library.Library("fused_margin", "DEF")
_library.define(f"target_cosine(Tensor x, Tensor w, Tensor labels, Tensor? index, {SPEC_SCHEMA}) -> Tensor")
_library.define(
    f"sweep({_INPUTS}, {SPEC_SCHEMA}) "
    "-> (Tensor red, Tensor cos_y, Tensor sum_u, Tensor aux, Tensor o_red, Tensor o_sum)"
)
_library.define(
    f"sweep_backward(Tensor g_red, Tensor g_cos_y, Tensor g_sum_u, {_INPUTS}, Tensor red, Tensor aux, Tensor o_red, "
    f"Tensor o_sum, {SPEC_SCHEMA}, int need) -> (Tensor d_x, Tensor d_w, Tensor d_scale, Tensor d_bias)"
)

_target_cosine = torch.ops.fused_margin.target_cosine.default
_sweep = torch.ops.fused_margin.sweep.default
_sweep_backward = torch.ops.fused_margin.sweep_backward.default


def target_cosine(x: Tensor, w: Tensor, labels: Tensor, index: Tensor | None, spec: Spec) -> Tensor:
    """cos_y [B], without gradient: B * D work, for what must be known before the sweep (tau, batch statistics)."""
    return _target_cosine(x.detach(), w.detach(), labels, index, *spec)


@dataclass(frozen=True, eq=False)
class Delivery:
    """How the gradients of a sweep leave, where that is not as tensors of the inputs' shapes."""

    sparse: bool = False  # that of w as the rows of `index`, in a coalesced sparse tensor
    rows: Tensor | None = None  # what gets a gradient in the place of x, which other shards sweep too
    # Starts the sums of d_x and d_scale (None: not asked for) over the shards, before the sweep that makes d_w; what it
    # returns waits for them, and gives the gradients of `rows` and scale.
    reduce: Callable[[Tensor | None, Tensor | None], Callable[[], tuple[Tensor | None, Tensor | None]]] | None = None


def sweep(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    scale: Tensor,
    tau: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None,
    rule_args: Tensor,
    spec: Spec,
    delivery: Delivery | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(red, cos_y, sum_u [B], aux [6, B]) of one sweep; see the head of this file and `Spec`."""
    args = (x, w, labels, scale, tau, bias, index, rule_args, *spec)
    if delivery is not None and _asks_for_gradients(*args, delivery.rows):
        return _Sweep.apply(*args, delivery, delivery.rows)[:4]
    return _sweep(*args)[:4]


def _run_target_cosine(x, w, labels, index, *fields):
    spec = Spec(*fields)
    return BACKENDS[spec.backend].target_cosine(x, w, labels, index, spec)


def _run_sweep(*args):
    spec = Spec(*args[_NUM_INPUTS:])
    return BACKENDS[spec.backend].sweep(*args[:_NUM_INPUTS], spec)


def _run_sweep_backward(*args):
    spec = Spec(*args[-1 - len(Spec._fields) : -1])
    return BACKENDS[spec.backend].sweep_backward(*args[: -1 - len(Spec._fields)], spec, args[-1])


_library.impl("target_cosine", _run_target_cosine, "CompositeExplicitAutograd")
_library.impl("sweep", _run_sweep, "CompositeExplicitAutograd")
_library.impl("sweep_backward", _run_sweep_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_margin::target_cosine")
def _(x, w, labels, index, *fields):
    return x.new_empty(x.shape[0], dtype=acc_dtype(x))


@torch.library.register_fake("fused_margin::sweep")
def _(x, w, labels, scale, tau, bias, index, rule_args, *fields):
    spec = Spec(*fields)
    red = x.new_empty(x.shape[0], dtype=acc_dtype(x))
    cos_y, sum_u, aux = torch.empty_like(red), torch.empty_like(red), red.new_empty(len(Aux._fields), x.shape[0])
    flash = spec.want & Want.DX and spec.backend != "reference"  # the reference keeps nothing for its backward
    o_red = red.new_empty(x.shape if flash else (0,))
    o_sum = red.new_empty(x.shape if flash and spec.want & Want.SUM else (0,))
    return red, cos_y, sum_u, aux, o_red, o_sum


@torch.library.register_fake("fused_margin::sweep_backward")
def _(g_red, g_cos_y, g_sum_u, x, w, labels, scale, tau, bias, index, rule_args, *rest):
    need = rest[-1]
    d_w = w if index is None else w.new_empty(index.shape[0], w.shape[1])
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if need & flag else g_red.new_empty(0)
        for flag, t in ((Need.X, x), (Need.W, d_w), (Need.SCALE, scale), (Need.BIAS, bias))
    )


class _Sweep(torch.autograd.Function):
    """The autograd rule. torch.library.register_autograd does the same, and reads the whole schema at each call: 0.1 ms
    on a step that takes 0.5 ms where there are few classes."""

    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            output = _sweep(*args[:-2])
        *args, delivery, _ = args
        red, _, _, aux, o_red, o_sum = output
        ctx.spec, ctx.delivery = Spec(*args[_NUM_INPUTS:]), delivery
        ctx.mark_non_differentiable(aux, o_red, o_sum)
        ctx.save_for_backward(*args[:_NUM_INPUTS], red, aux, o_red, o_sum)
        return output

    @staticmethod
    def backward(ctx, g_red, g_cos_y, g_sum_u, *_):
        return _backward(ctx, g_red, g_cos_y, g_sum_u)


def _asks_for_gradients(*args):
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)


def _sweep_autograd(*args):
    if _asks_for_gradients(*args[:_NUM_INPUTS]):
        return _Sweep.apply(*args, None, None)
    with torch._C._AutoDispatchBelowAutograd():
        return _sweep(*args)


def _backward(ctx, g_red, g_cos_y, g_sum_u):
    if torch.is_grad_enabled():  # create_graph=True: what comes out would pass for a constant
        raise RuntimeError("fused_margin has first derivatives only; for second ones write the loss in plain PyTorch")
    x, w, labels, scale, tau, bias, index, rule_args, red, aux, o_red, o_sum = ctx.saved_tensors
    *asked, of_rows = ctx.needs_input_grad
    delivery = ctx.delivery if ctx.delivery is not None else Delivery()
    for_x = asked[0] or of_rows
    need = Need.X * for_x | Need.W * asked[1] | Need.SCALE * asked[3] | Need.BIAS * asked[5]
    if (for_x and not ctx.spec.want & Want.DX) or (asked[3] and not ctx.spec.want & Want.DSCALE):
        raise RuntimeError("the gradient of x needs Want.DX in the forward, that of scale Want.DSCALE")

    def run(part):
        grads = _sweep_backward(
            g_red, g_cos_y, g_sum_u, x, w, labels, scale, tau, bias, index, rule_args, red, aux, o_red, o_sum,
            *ctx.spec, int(need & part),
        )  # fmt: skip
        flags = (Need.X, Need.W, Need.SCALE, Need.BIAS)
        return tuple(g if need & part & flag else None for g, flag in zip(grads, flags, strict=True))

    if delivery.reduce is None:
        d_x, d_w, d_scale, d_bias = run(need)
    else:
        d_x, _, d_scale, _ = run(Need.X | Need.SCALE)
        finish = delivery.reduce(d_x, d_scale)
        _, d_w, _, d_bias = run(Need.W | Need.BIAS)
        d_x, d_scale = finish()
    if asked[1] and index is not None:  # rows of a subset: zero elsewhere
        if delivery.sparse:
            d_w = torch.sparse_coo_tensor(index[None], d_w, w.shape, is_coalesced=True, check_invariants=False)
        else:
            d_w = torch.zeros_like(w).index_copy(0, index, d_w)
    d_rows, d_x = (d_x, None) if of_rows else (None, d_x)
    return (d_x, d_w, None, d_scale, None, d_bias, None, None, *(None for _ in Spec._fields), None, d_rows)


_library.impl("sweep", _sweep_autograd, "Autograd")
