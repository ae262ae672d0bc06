"""The reference backend: plain PyTorch that materialises the cosines. Any device, any dtype; in float64 the oracle.

Gradients come from autograd of the forward, so that nothing here repeats a formula of the fused kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rules import RULES
from ..spec import EPS, Aux, Need, Spec, Want, acc_dtype


def why_not(x: Tensor | None, w: Tensor | None, spec: Spec) -> list[str]:
    return []


def saves_o(x: Tensor, spec: Spec) -> bool:
    return False  # nothing is kept for the backward


def _round(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as an operand of `dtype` has them, gradients as if nothing had been rounded."""
    if dtype in (torch.float32, torch.float64):
        return t
    return t + (t.to(dtype).to(t.dtype) - t).detach()


def _round_slopes(g: Tensor, dtype: torch.dtype) -> Tensor:
    """The upstream gradient of the cosines as an operand of the backward's products has it.

    Each row in units of its largest entry, so that neither a loss scale nor a small probability leaves float16's range.
    """
    if not g.shape[1]:
        return g
    unit = g.abs().amax(1, keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)
    return _round(g / unit, dtype) * unit


def _rows(x: Tensor, w: Tensor, index: Tensor | None, spec: Spec) -> tuple[Tensor, Tensor]:
    """x_hat [B, D] and w_hat [C * K, D], normalised where the spec says so, in the accumulation dtype."""
    acc = acc_dtype(x)
    x, w = x.to(acc), (w if index is None else w[index]).to(acc)
    x_hat = F.normalize(x, dim=1, eps=EPS) if spec.normalize_x else x
    return x_hat, F.normalize(w, dim=1, eps=EPS) if spec.normalize_w else w


def check_labels(labels: Tensor, spec: Spec) -> None:
    """An error for a label that is no class; on a CPU only."""
    if labels.device.type != "cpu":
        return  # would wait for the device
    bad = ((labels < 0) | (labels >= spec.num_classes)) & (labels != spec.ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise RuntimeError(
            f"labels[{row}] = {int(labels[row])} is outside [0, {spec.num_classes}) "
            f"and is not ignore_index = {spec.ignore_index}"
        )


def _local(labels: Tensor, classes: int, spec: Spec) -> tuple[Tensor, Tensor]:
    """Class positions here (0 where there is none) and whether the row's target is here, both [B]."""
    position = labels - spec.first_class
    here = (position >= 0) & (position < classes) & (labels != spec.ignore_index)
    return torch.where(here, position, 0), here


def _target(x_hat: Tensor, w_hat: Tensor, position: Tensor, here: Tensor, spec: Spec) -> Tensor:
    """cos_y [B], 0 where the target is not here; clamped to [-1, 1] with the gradient passed through."""
    if not w_hat.shape[0]:
        return x_hat.sum(1) * 0
    rows = w_hat.unflatten(0, (-1, spec.sub_centers))[position]  # [B, K, D]
    c = _clamp((rows * x_hat[:, None]).sum(2).max(1).values, spec)
    return torch.where(here, c, 0)


def _clamp(c: Tensor, spec: Spec) -> Tensor:
    return c + (c.clamp(-1, 1) - c).detach() if spec.normalize_x and spec.normalize_w else c


@torch.no_grad()
def target_cosine(x: Tensor, w: Tensor, labels: Tensor, index: Tensor | None, spec: Spec) -> Tensor:
    check_labels(labels, spec)
    classes = (w if index is None else index).shape[0] // spec.sub_centers
    x = torch.where((labels == spec.ignore_index)[:, None], 0, x)
    position, here = _local(labels, classes, spec)
    return _target(*_rows(x, w, index, spec), position, here, spec)


def _cosines(x: Tensor, w: Tensor, labels: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Of the target [B], and of all classes [B, C] from rounded operands."""
    x = torch.where((labels == spec.ignore_index)[:, None], 0, x)  # ignored rows take no part, even with NaN
    x_hat, w_hat = _rows(x, w, None, spec)
    classes = w_hat.shape[0] // spec.sub_centers
    cos_y = _target(x_hat, w_hat, *_local(labels, classes, spec), spec)
    c = _round(x_hat, spec.compute_dtype) @ _round(w_hat, spec.compute_dtype).T  # [B, C * K]
    if spec.sub_centers > 1:
        c = c.unflatten(1, (classes, spec.sub_centers)).max(2).values
    return cos_y, _clamp(c, spec)


def _logits(
    c: Tensor, scale: Tensor, bias: Tensor | None, tau: Tensor | None, rule_args: Tensor, spec: Spec
) -> tuple[Tensor, Tensor]:
    """N(c) and u, both [B, C]."""
    v = RULES[spec.rule].value(c, None if tau is None else tau[:, None], rule_args)
    if spec.unit_slope:
        v = v.detach() + (c - c.detach())
    u = scale[:, None] * v
    return v, u if bias is None else u + bias


def _rivals(c: Tensor, labels: Tensor, spec: Spec) -> Tensor:
    """[B, C]: all classes but the row's target."""
    position, here = _local(labels, c.shape[1], spec)
    return torch.arange(c.shape[1], device=c.device) != torch.where(here, position, -1)[:, None]


def _reduce(u: Tensor, rival: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """red [B] and A = d red / d u [B, C]; red is -inf and A is 0 where a row has no rival."""
    if reduction == "softplus":
        return (-F.logsigmoid(-u) * rival).sum(1), torch.sigmoid(u) * rival
    if not u.shape[1]:
        return u.new_full(u.shape[:1], -torch.inf), u
    u = u.masked_fill(~rival, -torch.inf)
    red = u.logsumexp(1)
    return red, u.softmax(1).masked_fill(~rival | (red == -torch.inf)[:, None], 0)


def path() -> str:
    """What runs, for people."""
    return "plain PyTorch, holds [B, C] tensors"


@torch.no_grad()
def sweep(x, w, labels, scale, tau, bias, index, rule_args, spec: Spec) -> tuple[Tensor, ...]:
    check_labels(labels, spec)
    with torch.autocast(x.device.type, enabled=False):
        cos_y, c = _cosines(x, w if index is None else w[index], labels, spec)
        v, u = _logits(c, scale, bias, tau, rule_args, spec)
        rival = _rivals(c, labels, spec)
        red, a = _reduce(u, rival, spec.reduction)
        aux = cos_y.new_zeros(len(Aux._fields), len(labels))
        score = c if bias is None else c + bias / scale[:, None]
        aux[0] = score.masked_fill(~rival, -torch.inf).amax(1) if c.shape[1] else -torch.inf
        if tau is not None:
            masked = rival & (c > tau[:, None])
            aux[1], aux[2] = masked.sum(1), (c * masked).sum(1)
        aux[3], aux[4] = (a * v.masked_fill(~rival, 0)).sum(1), (v * rival).sum(1)
        sum_u = u.masked_fill(~rival, 0).sum(1) if spec.want & Want.SUM else torch.zeros_like(red)
    empty = cos_y.new_empty(0)
    return red, cos_y, sum_u, aux, empty, empty.clone()


def sweep_backward(
    g_red, g_cos_y, g_sum_u, x, w, labels, scale, tau, bias, index, rule_args, red, aux, o_red, o_sum, spec, need
) -> tuple[Tensor, ...]:
    w = w if index is None else w[index]  # the gradient asked for is that of the rows read
    asked = ((Need.X, x), (Need.W, w), (Need.SCALE, scale), (Need.BIAS, bias))
    leaves = {flag: t.detach().requires_grad_() for flag, t in asked if need & flag}
    x, w, scale, bias = (leaves.get(flag, t) for flag, t in asked)
    rows, parameters = ([f for f in pair if f in leaves] for pair in ((Need.X, Need.W), (Need.SCALE, Need.BIAS)))
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        cos_y, c = _cosines(x, w, labels, spec)
        c_leaf = c.detach().requires_grad_()  # two steps, with the rounding of G between them
        u = _logits(c_leaf, scale, bias, tau, rule_args, spec)[1]
    with torch.no_grad():
        rival = _rivals(c, labels, spec)
        a = _reduce(u, rival, spec.reduction)[1]  # d red / d u
        g_u = (g_red[:, None] * a + g_sum_u[:, None]).masked_fill(~rival, 0)
    g_c, *found = torch.autograd.grad(u, [c_leaf, *(leaves[f] for f in parameters)], g_u)
    if rows:
        g_c = _round_slopes(g_c, spec.compute_dtype)
        found = [*torch.autograd.grad((cos_y, c), [leaves[f] for f in rows], (g_cos_y, g_c)), *found]
    grads = dict(zip([*rows, *parameters], found, strict=True))
    return tuple(grads.get(flag, red.new_empty(0)) for flag, _ in asked)
