"""Rival rules N: what a rival's cosine becomes before it is scaled. u = s * N(c; tau, args)

One rule is one row of `RULES`, used by the reference backend. The position of one that kernels have is its code there
(csrc/rules.h), where N and its slope N' stand once more, for C++ and CUDA; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .angles import safe_angle


def _identity(c: Tensor, tau: Tensor | None, args: Tensor) -> Tensor:
    return c


def _hard(c: Tensor, tau: Tensor, args: Tensor) -> Tensor:
    return torch.where(c > tau, args[0] * c + args[1], c)


def _curricular(c: Tensor, tau: Tensor, args: Tensor) -> Tensor:
    return torch.where(c > tau, c * (args[0] + c), c)


def _clip(c: Tensor, tau: Tensor | None, args: Tensor) -> Tensor:
    return torch.where(c <= args[0], args[0], torch.where(c >= args[1], args[1], c))  # at a bound the slope is 0


def _filter(c: Tensor, tau: Tensor | None, args: Tensor) -> Tensor:
    return torch.where(c > args[0], torch.zeros_like(c), c)


def _gauss(c: Tensor, tau: Tensor, args: Tensor) -> Tensor:
    weight = args[0] * torch.exp(-((c - tau) ** 2) / args[1])
    return weight.detach() * (c + 1) - 1


def _circle(c: Tensor, tau: Tensor | None, args: Tensor) -> Tensor:
    return torch.relu(c + args[0]).detach() * (c - args[0])


def _power(c: Tensor, tau: Tensor | None, args: Tensor) -> Tensor:
    return 2 * ((c + 1) / 2) ** args[0] - 1 + args[1]


def _angle(c: Tensor, tau: Tensor | None, args: Tensor) -> Tensor:
    angle = safe_angle(c)
    return args[0] + (args[1] + args[2] * angle) * angle


def _angle_fraction(c: Tensor, tau: Tensor | None, args: Tensor) -> Tensor:
    return torch.cos(safe_angle(c) / args[0])


def _angle_sigmoid(c: Tensor, tau: Tensor | None, args: Tensor) -> Tensor:
    return torch.tanh((torch.pi / 2 - safe_angle(c)) / (2 * args[0])) / torch.tanh(torch.pi / (4 * args[0]))


def _sigmoid_weight(c: Tensor, tau: Tensor | None, args: Tensor) -> Tensor:
    return torch.sigmoid(args[0] * (args[1] - safe_angle(c.detach()))) * c


def _square(c: Tensor, tau: Tensor | None, args: Tensor) -> Tensor:
    return c * c / 2


class _Definition(NamedTuple):
    value: Callable[[Tensor, Tensor | None, Tensor], Tensor]  # N(c [B, C], tau [B, 1], args [n])
    args: tuple[str, ...]
    needs_tau: bool
    kernel: bool = True  # csrc/rules.h has it too; without, it runs on the reference backend only


RULES: dict[str, _Definition] = {
    "identity": _Definition(_identity, (), False),  # c
    "hard": _Definition(_hard, ("a", "b"), True),  # c > tau ? a c + b : c         SV, MV, NPC
    "curricular": _Definition(_curricular, ("t",), True),  # c > tau ? c (t + c) : c
    "clip": _Definition(_clip, ("lo", "hi"), False),  # min(max(c, lo), hi)        EqM, AdaFace
    "filter": _Definition(_filter, ("threshold",), False),  # c > threshold ? 0 : c
    "gauss": _Definition(_gauss, ("alpha", "sigma"), True),  # q c + q - 1, q = alpha exp(-(c - tau)^2 / sigma)
    "circle": _Definition(_circle, ("m",), False),  # [c + m]_+ (c - m), the factor a constant
    "power": _Definition(_power, ("t", "m"), False),  # 2 ((c + 1) / 2)^t - 1 + m    SphereFace2
    "angle": _Definition(_angle, ("b0", "b1", "b2"), False, False),  # b0 + b1 theta + b2 theta^2   GA, Li-ArcFace, QAM
    "angle_fraction": _Definition(_angle_fraction, ("m",), False, False),  # cos(theta / m)   SphereFace-R v2
    "angle_sigmoid": _Definition(_angle_sigmoid, ("k",), False, False),  # GA-Softmax
    "sigmoid_weight": _Definition(_sigmoid_weight, ("k", "b"), False, False),  # sigmoid(k (b - theta)) c   SFace
    "square": _Definition(_square, (), False, False),  # c^2 / 2   P2SGrad
}
CODES = {name: code for code, name in enumerate(name for name, d in RULES.items() if d.kernel)}
REDUCTIONS = {"logsumexp": 0, "softplus": 1}


class Rule(NamedTuple):
    """A rule by name and its run-time arguments: floats, or 0-dim tensors that change without recompilation."""

    name: str = "identity"
    args: tuple[float | Tensor, ...] = ()

    def tensor(self, like: Tensor) -> Tensor:
        """The arguments as one small tensor [n] of `like`'s device, float64 where `like` is, else float32."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        if not self.args:
            return like.new_empty(0, dtype=dtype)
        if like.device.type == "cpu" and not any(isinstance(a, Tensor) for a in self.args):
            return torch.tensor(self.args, dtype=dtype)

        def value(a: float | Tensor) -> Tensor:
            if isinstance(a, Tensor):
                return a.to(like.device, dtype)
            return torch.full((), a, dtype=dtype, device=like.device)  # torch.tensor copies, and waits for the device

        return torch.stack([value(a) for a in self.args])


IDENTITY = Rule()
