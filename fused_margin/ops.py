"""The primitive as registered operators: one schema, one fake kernel, one autograd rule, whatever the backend.

    sweep(x [B, D], w [C, D], labels [B], scale [B], ...) -> red, cos_y, sum_u [B], aux [6, B], o_red, o_sum, kept
    red_i = log sum_{j != y_i} exp(u_ij)      u_ij = scale_i * N(cos_ij) + bias_j      (or sum of softplus(u_ij))

red, cos_y and sum_u are differentiable; o_red and o_sum [B, D] are what the backward needs for x, made in the forward;
kept: products with the first rows of w, which a backend may leave so that the backward for w need not make them again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import deferred
from .backends import BACKENDS
from .margins.forms import Forms
from .spec import SPEC_SCHEMA, Aux, Need, Rows, Spec, Want, acc_dtype

_INPUTS = "Tensor x, Tensor w, Tensor labels, Tensor scale, Tensor? tau, Tensor? bias, Tensor? index, Tensor rule_args"
# Tensors before the spec's fields in a schema.
_COSINE_INPUTS, _NUM_INPUTS, _LOSS_INPUTS = 4, 8, 5
_BACKWARD_INPUTS = 3 + _NUM_INPUTS + 5

_library = torch.library.Library("fused_margin", "DEF")
_library.define(f"target_cosine(Tensor x, Tensor w, Tensor labels, Tensor? index, {SPEC_SCHEMA}) -> Tensor")
_library.define(
    f"sweep({_INPUTS}, {SPEC_SCHEMA}) "
    "-> (Tensor red, Tensor cos_y, Tensor sum_u, Tensor aux, Tensor o_red, Tensor o_sum, Tensor kept)"
)
_library.define(
    f"sweep_backward(Tensor g_red, Tensor g_cos_y, Tensor g_sum_u, {_INPUTS}, Tensor red, Tensor aux, Tensor o_red, "
    f"Tensor o_sum, Tensor kept, {SPEC_SCHEMA}, int need) -> (Tensor d_x, Tensor d_w, Tensor d_scale, Tensor d_bias)"
)

_library.define(
    f"sweep_loss(Tensor x, Tensor w, Tensor labels, Tensor scale, Tensor rule_args, {SPEC_SCHEMA}, float[] forms, "
    "str loss_reduction) -> (Tensor loss, Tensor rows, Tensor aux, Tensor o_red, Tensor kept)"
)

_target_cosine = torch.ops.fused_margin.target_cosine.default
_sweep = torch.ops.fused_margin.sweep.default
_sweep_loss = torch.ops.fused_margin.sweep_loss.default
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


_AS_THEY_ARE = Delivery()


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
    delivery: Delivery = _AS_THEY_ARE,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(red, cos_y, sum_u [B], aux [6, B]) of one sweep; see the head of this file and `Spec`."""
    inputs = (x, w, labels, scale, tau, bias, index, rule_args)
    if delivery is not _AS_THEY_ARE and _asks_for_gradients(*inputs, delivery.rows):
        return _Sweep.apply(*inputs, spec, delivery, delivery.rows)[:4]
    return _sweep(*inputs, *spec)[:4]


def sweep_loss(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    scale: Tensor,
    rule_args: Tensor,
    spec: Spec,
    forms: Forms,
    loss_reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, rows [6, B], aux [6, B]), see `Rows` and `Aux`: a sweep and what follows, for a margin that kernels know.

    loss_reduction: "none", for [B] with 0 in ignored rows; "sum"; "mean", over the rows that are not ignored.
    """
    tensors, options = (x, w, labels, scale, rule_args), (forms.packed(), loss_reduction)
    if _plain(x, w, labels, scale):
        return _recorded_loss(_run_sweep_loss, *tensors, spec, *options)[:3]
    return _sweep_loss(*tensors, *spec, *options)[:3]


def _plain(*tensors: Tensor) -> bool:
    """Whether nothing but autograd wants to see an operator's call.

    Then the functions below run without the dispatcher, and take the spec whole: a pass through the dispatcher and back
    into Python costs 20 us, and a step would take three of them.
    """
    return (
        not torch.compiler.is_compiling()
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )


def _run_target_cosine(x, w, labels, index, spec):
    return BACKENDS[spec.backend].target_cosine(x, w, labels, index, spec)


def _run_sweep(*inputs_and_spec):
    spec = inputs_and_spec[-1]
    return _with_kept(BACKENDS[spec.backend].sweep(*inputs_and_spec), spec)


def _run_sweep_loss(x, w, labels, scale, rule_args, spec, forms, loss_reduction):
    found = BACKENDS[spec.backend].sweep_loss(x, w, labels, scale, rule_args, spec, forms, loss_reduction)
    return _with_kept(found, spec)


def _run_sweep_backward(*args):
    *tensors, kept, spec, need = args
    return BACKENDS[spec.backend].sweep_backward(*tensors, *([kept] if _keeps(spec) else []), spec, need)


def _keeps(spec: Spec) -> bool:
    """Whether the backend keeps products. On a GPU they are made anew in less time than memory takes to hold them."""
    return hasattr(BACKENDS[spec.backend], "kept_size")


def _with_kept(out, spec):
    return out if _keeps(spec) else (*out, out[0].new_empty(0))


def _implement(name: str, function: Callable, tensors: int, key: str = "CompositeExplicitAutograd") -> None:
    """Registers a function that takes a spec after so many tensors, where a schema lists the spec's fields."""
    end = tensors + len(Spec._fields)
    _library.impl(name, lambda *args: function(*args[:tensors], Spec(*args[tensors:end]), *args[end:]), key)


_implement("target_cosine", _run_target_cosine, _COSINE_INPUTS)
_implement("sweep", _run_sweep, _NUM_INPUTS)
_implement("sweep_loss", _run_sweep_loss, _LOSS_INPUTS)
_implement("sweep_backward", _run_sweep_backward, _BACKWARD_INPUTS)


def _kept_size(x, w, index, spec):
    return BACKENDS[spec.backend].kept_size(x, w, index, spec) if _keeps(spec) else 0


@torch.library.register_fake("fused_margin::target_cosine")
def _(x, w, labels, index, *fields):
    return x.new_empty(x.shape[0], dtype=acc_dtype(x))


@torch.library.register_fake("fused_margin::sweep")
def _(x, w, labels, scale, tau, bias, index, rule_args, *fields):
    spec = Spec(*fields)
    red = x.new_empty(x.shape[0], dtype=acc_dtype(x))
    cos_y, sum_u, aux = torch.empty_like(red), torch.empty_like(red), red.new_empty(len(Aux._fields), x.shape[0])
    flash = BACKENDS[spec.backend].saves_o(x, spec)
    o_red = red.new_empty(x.shape if flash else (0,))
    o_sum = red.new_empty(x.shape if flash and spec.want & Want.SUM else (0,))
    return red, cos_y, sum_u, aux, o_red, o_sum, red.new_empty(_kept_size(x, w, index, spec))


@torch.library.register_fake("fused_margin::sweep_loss")
def _(x, w, labels, scale, rule_args, *rest):
    spec, loss_reduction = Spec(*rest[:-2]), rest[-1]
    batch, of_row = x.shape[0], loss_reduction == "none"
    rows = x.new_empty(len(Rows._fields), batch, dtype=acc_dtype(x))
    loss, aux = rows.new_empty((batch,) if of_row else ()), rows.new_empty(len(Aux._fields), batch)
    o_red = rows.new_empty(x.shape if BACKENDS[spec.backend].saves_o(x, spec) else (0,))
    return loss, rows, aux, o_red, rows.new_empty(_kept_size(x, w, None, spec))


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
        *inputs, ctx.spec, ctx.delivery, _ = args
        output = _sweep_below(*inputs, ctx.spec)
        red, _, _, aux, o_red, o_sum, kept = output
        ctx.mark_non_differentiable(aux, o_red, o_sum, kept)
        ctx.set_materialize_grads(False)  # zeros of the size of each output
        ctx.save_for_backward(*inputs, red, aux, o_red, o_sum, kept)
        return output

    @staticmethod
    def backward(ctx, *upstream):
        inputs = ctx.saved_tensors  # once: where activations are checkpointed, they can be had a single time
        red = inputs[_NUM_INPUTS]
        return _backward(ctx, inputs, [torch.zeros_like(red) if g is None else g for g in upstream[:3]])


class _SweepLoss(torch.autograd.Function):
    """The same for `sweep_loss`, which leaves its own slopes by red, by the target's cosine and by the scale.

    run: `_run_sweep_loss`, or `_sweep_loss_below` where others want to see the operator.
    """

    @staticmethod
    def forward(ctx, run, *args):
        output = run(*args)
        _, rows, aux, o_red, kept = output
        ctx.spec = args[_LOSS_INPUTS]
        ctx.mark_non_differentiable(rows, aux, o_red, kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:_LOSS_INPUTS], rows, aux, o_red, kept)
        return output

    @staticmethod
    def backward(ctx, g, *_):
        if g is None:  # nobody's loss came from this one
            return (None,) * len(ctx.needs_input_grad)
        x, w, labels, scale, rule_args, rows, aux, o_red, kept = ctx.saved_tensors
        row = Rows(*rows.unbind())
        _, of_x, of_w, _, of_scale, *_ = ctx.needs_input_grad
        inputs = (x, w, labels, scale, row.tau, None, None, rule_args, row.red, aux, o_red, o_red.new_empty(0), kept)
        upstream = (g * row.by_red, g * row.by_cos_y, torch.zeros_like(row.by_red))
        d_x, d_w, d_scale, _ = _gradients(ctx.spec, upstream, inputs, (of_x, of_w, of_scale, False))
        if of_scale:
            d_scale = d_scale + (g * row.by_scale).to(d_scale.dtype)
        return None, d_x, d_w, None, d_scale, None, None, None, None  # run, x, w, labels, scale, rule_args, ...


def _asks_for_gradients(*tensors):
    if forward_ad._current_level >= 0:
        _refuse_tangents(tensors)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _refuse_tangents(tensors):
    """Without an autograd function around the sweep, derivatives in forward mode would be 0."""
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            "fused_margin has derivatives by backward() only; for forward mode (torch.func.jvp, jacfwd, dual tensors) "
            "write the loss in plain PyTorch"
        )


def _sweep_below(*args):
    *inputs, spec = args
    with torch._C._AutoDispatchBelowAutograd():
        return _sweep(*inputs, *spec)


def _sweep_autograd(*args):
    if _asks_for_gradients(*args[:_NUM_INPUTS]):
        return _Sweep.apply(*args, _AS_THEY_ARE, None)
    return _sweep_below(*args)


def _backward(ctx, inputs, upstream):
    of_rows = ctx.needs_input_grad[-1]
    asked = [ctx.needs_input_grad[i] or (i == 0 and of_rows) for i in (0, 1, 3, 5)]
    d_x, d_w, d_scale, d_bias = _gradients(ctx.spec, upstream, inputs, asked, ctx.delivery)
    d_rows, d_x = (d_x, None) if of_rows else (None, d_x)
    return d_x, d_w, None, d_scale, None, d_bias, None, None, None, None, d_rows  # inputs, spec, delivery, rows


def _gradients(spec, upstream, inputs, asked, delivery=_AS_THEY_ARE):
    """Those asked for of x, w, scale and bias, None in place of the others."""
    if torch.is_grad_enabled():  # create_graph=True: what comes out would pass for a constant
        raise RuntimeError("fused_margin has first derivatives only; for second ones write the loss in plain PyTorch")
    if (asked[0] and not spec.want & Want.DX) or (asked[2] and not spec.want & Want.DSCALE):
        raise RuntimeError("the gradient of x needs Want.DX in the forward, that of scale Want.DSCALE")
    w, index = inputs[1], inputs[6]
    parameter = deferred.home(w) if asked[1] else None  # whose optimizer runs the dW sweep itself
    now = [wanted and (k != 1 or parameter is None) for k, wanted in enumerate(asked)]
    need = sum(flag for flag, wanted in zip((Need.X, Need.W, Need.SCALE, Need.BIAS), now, strict=True) if wanted)
    plain = _plain(*upstream, inputs[0], inputs[1])

    def run(need):
        if plain:
            return _run_sweep_backward(*upstream, *inputs, spec, need)
        return _sweep_backward(*upstream, *inputs, *spec, need)

    if delivery.reduce is None:
        grads = list(run(need))
    else:
        d_x, _, d_scale, _ = run(need & (Need.X | Need.SCALE))
        finish = delivery.reduce(d_x if asked[0] else None, d_scale if asked[2] else None)
        rest = need & (Need.W | Need.BIAS)
        _, d_w, _, d_bias = run(rest) if rest else (None,) * 4
        d_x, d_scale = finish()
        grads = [d_x, d_w, d_scale, d_bias]
    if parameter is not None:
        x, _, labels, scale, tau, bias, _, rule_args, red, aux, _, _, kept = inputs
        call = deferred.Call(*upstream, x, labels, scale, tau, bias, rule_args, red, aux, kept)
        grads[1] = deferred.gradient(w, parameter, call, index, spec)
    elif asked[1] and index is not None and delivery.sparse:
        grads[1] = torch.sparse_coo_tensor(index[None], grads[1], w.shape, is_coalesced=True, check_invariants=False)
    elif asked[1] and index is not None:  # rows of a subset: zero elsewhere
        grads[1] = torch.zeros_like(w).index_copy(0, index, grads[1])
    return [grad if wanted else None for grad, wanted in zip(grads, asked, strict=True)]


def _recorded_loss(run, x, w, labels, scale, *rest):
    if _asks_for_gradients(x, w, scale):
        return _SweepLoss.apply(run, x, w, labels, scale, *rest)
    return run(x, w, labels, scale, *rest)


def _sweep_loss_below(x, w, labels, scale, rule_args, spec, *options):
    with torch._C._AutoDispatchBelowAutograd():
        return _sweep_loss(x, w, labels, scale, rule_args, *spec, *options)


def _sweep_loss_autograd(*args):
    return _recorded_loss(_sweep_loss_below, *args)


_implement("sweep", _sweep_autograd, _NUM_INPUTS, "Autograd")
_implement("sweep_loss", _sweep_loss_autograd, _LOSS_INPUTS, "Autograd")
