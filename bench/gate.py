"""The parity gate: a method's loss and gradients against a reference in float64, before its speed counts.

The reference goes over chunks of classes, so that it fits where B x C numbers do not. With T the margin and N the rival
rule, G = dloss/dcos and |.| norms:

    dX = (G w_hat - <G w_hat, x_hat> x_hat) / |x|      dW = (G^T x_hat - <G^T x_hat, w_hat> w_hat) / |w|
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from head_cost import SCALE
from torch import Tensor

from .cases import Case
from .heads import SV_T, TARGETS, Inputs, Run

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # relative, in the 2-norm
CHUNK = 16_384
ALL_ROWS = 131_072  # up to here all rows of dW are compared, beyond the first, the last, some between, the labels'
FLOAT64_FLOPS = 2e10  # beyond, the products are float32 (their error is 1e-6), sums over classes still float64


class Expected(NamedTuple):
    """What the gate expects; gradients in the dtype of the reference."""

    loss: float
    d_x: Tensor  # [B, D]
    rows: Tensor  # [R]: the classes whose gradient is compared
    d_w: Tensor  # [R, D]


class _Reference:
    """Cosines and logits of a chunk of classes."""

    def __init__(self, case: Case, inputs: Inputs, detached: bool) -> None:
        flops = 8 * case.batch * case.classes * case.dim
        self.dtype = torch.float64 if flops <= FLOAT64_FLOPS else torch.float32
        self.case, self.weight, self.labels = case, inputs.weight.detach(), inputs.labels
        self.x = inputs.embeddings.detach().to(self.dtype)
        self.x_hat = F.normalize(self.x)
        rows = F.normalize(self.weight[self.labels].to(torch.float64))
        self.cos_y = (self.x_hat.double() * rows).sum(1).requires_grad_()
        target = TARGETS[case.margin](self.cos_y)
        slope = torch.ones_like(target) if detached else torch.autograd.grad(target.sum(), self.cos_y)[0]
        self.cos_y.requires_grad_(False)
        self.z, self.slope = SCALE * target.detach(), SCALE * slope

    def chunk(self, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """w_hat, its norms, logits [B, n] float64 and their slopes; rivals only, the target's logit is -inf."""
        w = self.weight[first : first + CHUNK].to(self.dtype)
        norm = torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min(1e-12)
        w_hat = w / norm
        cos = (self.x_hat @ w_hat.T).double()
        slope = torch.full_like(cos, SCALE)
        if self.case.margin == "svsoftmax":
            hard = cos > self.cos_y[:, None]
            cos = torch.where(hard, SV_T * cos + (SV_T - 1), cos)
            slope = torch.where(hard, SV_T * SCALE, slope)
        here, column = self.in_chunk(first, len(w))
        logits = SCALE * cos
        logits[here, column] = -torch.inf
        return w_hat, norm, logits, slope

    def in_chunk(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Rows whose target is in the chunk, and its place there."""
        column = self.labels - first
        here = ((column >= 0) & (column < count)).nonzero()[:, 0]
        return here, column[here]


def _project(gradient: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """Through the normalisation."""
    return (gradient - (gradient * unit).sum(1, keepdim=True) * unit) / norm


def expected(case: Case, inputs: Inputs, detached: bool = False) -> Expected:
    """Loss and gradients; `detached`: the slope of the margin is 1."""
    with torch.no_grad(), torch.autocast(case.device, enabled=False):
        return _expected(case, inputs, detached)


def _expected(case: Case, inputs: Inputs, detached: bool) -> Expected:
    with torch.enable_grad():
        ref = _Reference(case, inputs, detached)
    lse = ref.z.clone()
    firsts = range(0, case.classes, CHUNK)
    for first in firsts:
        lse = torch.logaddexp(lse, ref.chunk(first)[2].logsumexp(1))
    loss = float((lse - ref.z).mean())
    whole = set(firsts) if case.classes <= ALL_ROWS else {*firsts[:2], *firsts[-2:], firsts[len(firsts) // 2]}
    d_x_hat = torch.zeros_like(ref.x)
    rows, d_w = [], []
    for first in firsts if case.mode != "forward" else ():
        w_hat, norm, logits, slope = ref.chunk(first)
        g = logits.sub_(lse[:, None]).exp_().mul_(slope).div_(case.batch)
        here, column = ref.in_chunk(first, len(w_hat))
        g[here, column] = (ref.slope * torch.expm1(ref.z - lse) / case.batch)[here]
        g = g.to(ref.dtype)
        d_x_hat += g @ w_hat
        some = torch.arange(len(w_hat), device=g.device) if first in whole else column.unique()
        rows.append(some + first)
        d_w.append(_project(g[:, some].T @ ref.x_hat, w_hat[some], norm[some]))
    if not rows:
        return Expected(loss, d_x_hat, ref.labels[:0], ref.x[:0])
    d_x = _project(d_x_hat, ref.x_hat, torch.linalg.vector_norm(ref.x, dim=1, keepdim=True))
    return Expected(loss, d_x, torch.cat(rows), torch.cat(d_w))


def _distance(got: Tensor, want: Tensor) -> float:
    return float(torch.linalg.vector_norm(got.to(want.dtype) - want) / torch.linalg.vector_norm(want))


def errors(run: Run, want: Expected, loss: Tensor) -> dict[str, float]:
    """How far the run that has just been made is off, by what is compared."""
    found = {"loss": abs(float(loss) - want.loss) / abs(want.loss)}
    d_x, d_w = run.gradients()
    if run.case.mode != "forward":
        found["embeddings' gradient"] = float("inf") if d_x is None else _distance(d_x, want.d_x)
    if run.case.trains_weight:
        found["weights' gradient"] = float("inf") if d_w is None else _distance(d_w[want.rows], want.d_w)
    return found


def verdict(case: Case, found: dict[str, float]) -> tuple[float, str]:
    """The largest error, and the reason to print no speed ("" if there is none)."""
    name, error = max(found.items(), key=lambda item: item[1] if item[1] == item[1] else float("inf"))
    if error <= TOLERANCE[case.dtype]:  # False for nan
        return error, ""
    return error, f"its {name} is {error:.1e} off the reference, {TOLERANCE[case.dtype]:.0e} is allowed"
