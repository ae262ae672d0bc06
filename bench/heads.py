"""What a method of the bench is, its inputs, and our own ones: fused, plain PyTorch, and that compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from head_cost import MARGIN, SCALE, Size, arcface, make_inputs, plain_head
from torch import Tensor

import fused_margin as fm

from .cases import Case

COSFACE_M, SPHEREFACE_M, SV_T = 0.35, 1.7, 1.2
NEARNESS = 0.2


def sphereface(cos_y: Tensor) -> Tensor:
    angle = torch.acos(cos_y.clamp(-1 + 1e-7, 1 - 1e-7))
    k = torch.floor((SPHEREFACE_M * angle / math.pi).detach())
    return (1 - 2 * (k % 2)) * torch.cos(SPHEREFACE_M * angle) - 2 * k


TARGETS: dict[str, Callable[[Tensor], Tensor]] = {  # the margins on the target, in plain PyTorch
    "arcface": arcface,
    "cosface": lambda cos_y: cos_y - COSFACE_M,
    "sphereface": sphereface,
    "svsoftmax": lambda cos_y: cos_y,
    "normface": lambda cos_y: cos_y,
}
FUSED_MARGINS: dict[str, fm.Margin] = {
    "arcface": fm.ArcFace(MARGIN),
    "cosface": fm.CosFace(COSFACE_M),
    "sphereface": fm.SphereFace(SPHEREFACE_M),
    "svsoftmax": fm.SVSoftmax(SV_T),
    "normface": fm.NormFace(),
}


class Inputs(NamedTuple):
    embeddings: Tensor  # [B, D]
    weight: Tensor  # [C, D]
    labels: Tensor  # [B]


def inputs_of(case: Case) -> Inputs:
    """Embeddings a little near their classes' weights: cos_y is about 0.2.

    So a margin's slope shows, and neither does a loss vanish (NormFace) nor exceed what InsightFace clamps it to (69).
    """
    embeddings, weight, labels = make_inputs(Size(case.classes, case.batch, case.dim))
    with torch.no_grad():
        embeddings += NEARNESS * math.sqrt(case.dim) * F.normalize(weight[labels])
    if case.device != "cpu":
        embeddings, weight, labels = (t.detach().to(case.device) for t in (embeddings, weight, labels))
    return Inputs(embeddings.detach().requires_grad_(), weight.detach().requires_grad_(case.mode != "frozen"), labels)


@dataclass
class Run:
    """A method bound to the inputs of a case: `loss()` is its forward."""

    case: Case
    loss: Callable[[], Tensor]
    embeddings: Tensor  # [B, D]
    weight: Tensor  # [C, D], or [D, C] with `transposed`
    transposed: bool = False
    optimizer: torch.optim.Optimizer | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.case.mode == "step":
            # The rate leaves the weights, which the methods share, where they are; the work is the same.
            self.optimizer = torch.optim.SGD([self.weight], lr=1e-12, momentum=0.9)

    def clear(self) -> None:
        self.embeddings.grad = self.weight.grad = None

    def __call__(self) -> Tensor:
        """One repeat: what `case.mode` says, into fresh gradients if `clear` came before."""
        with torch.autocast(self.case.device, torch.bfloat16, enabled=self.case.dtype == "bf16"):
            if self.case.mode == "forward":
                with torch.no_grad():
                    return self.loss()
            loss = self.loss()
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        return loss.detach()

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of embeddings [B, D] and weight [C, D]; None where the mode makes none."""
        d_w = self.weight.grad
        return self.embeddings.grad, d_w.t() if self.transposed and d_w is not None else d_w


class Peers(NamedTuple):
    """Where the user says that code lies which cannot be installed."""

    insightface: str | None = None
    cut_cross_entropy: str | None = None


@dataclass(frozen=True)
class Method:
    """One way to compute a head.

    build: the run of a case on its inputs. why_not: in words, why this cannot run here or is not made for a case; empty
    if it can. compiles: its first step compiles, so the second one is measured. baseline: it is repeated even where it
    is slow. detached: its gradient takes the margin's slope as 1, so the gate compares it with that.
    """

    build: Callable[[Case, Inputs, Peers], Run]
    what: str
    why_not: Callable[[Case, Peers], str] = lambda case, peers: ""
    compiles: bool = False
    baseline: bool = False
    detached: bool = False


def plain_sv_head(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """SV-Softmax in plain PyTorch: rivals above the target are pushed harder."""
    cosines = F.linear(F.normalize(embeddings), F.normalize(weight))
    cos_y = cosines.gather(1, labels[:, None])
    pushed = torch.where(cosines > cos_y.detach(), SV_T * cosines + (SV_T - 1), cosines)
    return F.cross_entropy(SCALE * pushed.scatter(1, labels[:, None], cos_y), labels)


def plain(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if case.margin == "svsoftmax":
        return plain_sv_head
    return partial(plain_head, target=TARGETS[case.margin])


def _bind(case: Case, inputs: Inputs, head: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
    return Run(case, lambda: head(*inputs), inputs.embeddings, inputs.weight)


def _eager(case: Case, inputs: Inputs, peers: Peers) -> Run:
    return _bind(case, inputs, plain(case))


def _compiled(case: Case, inputs: Inputs, peers: Peers) -> Run:
    torch._dynamo.reset()  # shapes of other cases must not count as recompilations
    return _bind(case, inputs, torch.compile(plain(case), dynamic=False))


def _fused(case: Case, inputs: Inputs, peers: Peers) -> Run:
    margin = FUSED_MARGINS[case.margin]
    return _bind(case, inputs, partial(fm.functional.margin_cross_entropy, margin=margin, scale=SCALE))


def _slow_bf16(case: Case, peers: Peers) -> str:
    """torch's bfloat16 products without AVX-512: 128 x 100,000 took more than 10 minutes a step."""
    slow = case.dtype == "bf16" and case.device == "cpu" and not torch.cpu._is_avx512_supported()
    return "torch has no fast bfloat16 product on a CPU without AVX-512" if slow and case.classes > 10_000 else ""


OWN = {
    "fused": Method(_fused, "`fm.functional.margin_cross_entropy`", baseline=True),
    "eager": Method(_eager, "plain PyTorch: normalize, linear, margin, cross_entropy", _slow_bf16, baseline=True),
    "torch-compile": Method(_compiled, "`torch.compile` of the plain head", _slow_bf16, compiles=True, baseline=True),
}
