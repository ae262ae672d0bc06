"""The oracle: every head as a dense [B, C] function in float64, typed from the papers; nothing of fused_margin is used.

    z_i = s_i T(c_iy)    u_ij = s_i N(c_ij) + b_j, j != y_i    loss_i = log(1 + sum_j exp(u_ij - z_i))

Autograd gives the gradients; `.detach()` stands where a paper stops one. In float32 the same functions are "plain
PyTorch"; with `operands` they round x_hat, w_hat and G of the B x C product to 16 bit, and nothing else.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIGNIFICANT_BITS = {torch.bfloat16: 8, torch.float16: 11}


def normface(c: Tensor) -> Tensor:
    return c  # NormFace (1704.06369), with no margin


def cosface(c: Tensor, m: float | Tensor) -> Tensor:
    return c - m  # CosFace (1801.09414) eq. 4


def arcface(c: Tensor, m: float | Tensor, tail: str = "linear") -> Tensor:
    """cos(theta + m), ArcFace (1801.07698) eq. 3; `tail` says what stands where theta + m > pi."""
    theta, m = torch.acos(c), torch.as_tensor(m, dtype=c.dtype)
    value, past = torch.cos(theta + m), theta + m > math.pi
    if tail == "raw":
        return value
    if tail == "linear":  # InsightFace: th = cos(pi - m), mm = m sin(pi - m)
        return torch.where(past, c - m * torch.sin(math.pi - m), value)
    if tail == "continuous":  # meets cos(pi) = -1 at theta = pi - m
        return torch.where(past, c - (1 - torch.cos(m)), value)
    if tail == "clamp":  # AdaFace, OpenSphere: the angle stops at pi
        return torch.cos((theta + m).clamp_max(math.pi))
    if tail == "easy":
        return torch.where(c > 0, value, c)
    raise ValueError(tail)


def sphereface(c: Tensor, m: float | Tensor) -> Tensor:
    """psi(theta) = (-1)^k cos(m theta) - 2k on [k pi / m, (k + 1) pi / m]: SphereFace (1704.08063) eq. 7."""
    theta = torch.acos(c)
    k = torch.floor(m * theta / math.pi).detach()
    return torch.where(k % 2 == 0, 1.0, -1.0) * torch.cos(m * theta) - 2 * k


def combined(c: Tensor, m1: float | Tensor, m2: float | Tensor, m3: float | Tensor, tail: str) -> Tensor:
    """cos(m1 theta + m2) - m3, ArcFace (1801.07698) eq. 4, with the tails of `arcface`."""
    theta = torch.acos(c)
    m1, m2 = (torch.as_tensor(m, dtype=c.dtype) for m in (m1, m2))
    turned = m1 * theta + m2
    value, past = torch.cos(turned), turned > math.pi
    if tail == "linear":
        value = torch.where(past, c - m2 * torch.sin(math.pi - m2), value)
    elif tail == "continuous":
        joint = torch.cos((math.pi - m2) / m1)  # the cosine at which the angle reaches pi
        value = torch.where(past, -1 + (c - joint), value)
    elif tail == "clamp":
        value = torch.cos(turned.clamp_max(math.pi))
    elif tail == "easy":
        value = torch.where(c > 0, value, c)
    elif tail != "raw":
        raise ValueError(tail)
    return value - m3


def straight_through(t: Tensor, c: Tensor) -> Tensor:
    """The value of t, with slope 1: characteristic gradient detachment (SphereFace-R, 2109.05565; arcface_torch)."""
    return t.detach() + c - c.detach()


def _hard(c: Tensor, tau: Tensor, a: float, b: float) -> Tensor:
    return torch.where(c > tau, a * c + b, c)  # SV-Softmax (1812.11317) eqs. 5-7: a = t, b = t - 1


def _curricular(c: Tensor, tau: Tensor, t: float) -> Tensor:
    return torch.where(c > tau, c * (t + c), c)  # CurricularFace (2004.00288)


def _clip(c: Tensor, tau: None, low: float, high: float) -> Tensor:
    return torch.where(c < low, low, torch.where(c > high, high, c))


def _filter(c: Tensor, tau: None, threshold: float) -> Tensor:
    return torch.where(c > threshold, 0.0, c)  # Partial-FC's inter-class filtering: logit 0, gradient 0


def _gauss(c: Tensor, tau: Tensor, alpha: float, sigma: float) -> Tensor:
    q = (alpha * torch.exp(-((c - tau) ** 2) / sigma)).detach()  # ArcNegFace: the weight is a constant
    return q * c + q - 1


def _circle(c: Tensor, tau: None, m: float) -> Tensor:
    return (c + m).clamp_min(0).detach() * (c - m)  # Circle loss (2002.10857): the weight is a constant


def _power(c: Tensor, tau: None, t: float, m: float) -> Tensor:
    return 2 * ((c + 1) / 2) ** t - 1 + m  # SphereFace2 (2108.01513): g(c) + m


def _angle(c: Tensor, tau: None, b0: float, b1: float, b2: float) -> Tensor:
    theta = torch.acos(c)
    return b0 + b1 * theta + b2 * theta**2


def _angle_sigmoid(c: Tensor, tau: None, k: float) -> Tensor:
    """SphereNet (1711.03189): A (1 - e) / (1 + e) with e = exp(theta / k - pi / (2 k))."""
    e = torch.exp(torch.acos(c) / k - math.pi / (2 * k))
    edge = math.exp(-math.pi / (2 * k))
    return (1 + edge) / (1 - edge) * (1 - e) / (1 + e)


def _sigmoid_weight(c: Tensor, tau: None, k: float, b: float) -> Tensor:
    return (1 / (1 + torch.exp(k * (torch.acos(c) - b)))).detach() * c  # SFace (2205.12010): the weight is a constant


RIVALS: dict[str, Callable[..., Tensor]] = {
    "identity": lambda c, tau: c,
    "hard": _hard,
    "curricular": _curricular,
    "clip": _clip,
    "filter": _filter,
    "gauss": _gauss,
    "circle": _circle,
    "power": _power,
    "angle": _angle,
    "angle_fraction": lambda c, tau, m: torch.cos(torch.acos(c) / m),  # SphereFace-R v2
    "angle_sigmoid": _angle_sigmoid,
    "sigmoid_weight": _sigmoid_weight,
    "square": lambda c, tau: 0.5 * c**2,  # P2SGrad as a squared error
}


class _RoundedProduct(torch.autograd.Function):
    """x_hat @ w_hat.T with both operands, and in the backward G, rounded; sums in the dtype of x_hat.

    G keeps its exponent: a 16-bit tile of G may be scaled by a power of two, so that only its significand is lost.
    """

    @staticmethod
    def forward(ctx, x_hat: Tensor, w_hat: Tensor, operands: torch.dtype) -> Tensor:
        x_hat, w_hat = (t.to(operands).to(t.dtype) for t in (x_hat, w_hat))
        ctx.save_for_backward(x_hat, w_hat)
        ctx.bits = SIGNIFICANT_BITS[operands]
        return x_hat @ w_hat.T

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor, None]:
        x_hat, w_hat = ctx.saved_tensors
        significand, exponent = torch.frexp(g)
        g = torch.ldexp(torch.round(significand * 2**ctx.bits) / 2**ctx.bits, exponent)
        return g @ w_hat, g.T @ x_hat, None


def unit(t: Tensor) -> Tensor:
    """Rows over their norm, and over 1e-12 where they are shorter (as torch.nn.functional.normalize documents)."""
    norm = torch.linalg.vector_norm(t, dim=1, keepdim=True)
    return t / torch.where(norm < 1e-12, 1e-12, norm)


def _within_one(c: Tensor) -> Tensor:
    return c + (c.clamp(-1, 1) - c).detach()


class Cosines(NamedTuple):
    c_y: Tensor  # [B], 0 where the row has no target here
    c: Tensor  # [B, C]
    rival: Tensor  # [B, C] bool
    y: Tensor  # [B] the target's column, 0 where there is none


def cosines(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    *,
    index: Tensor | None = None,
    sub_centers: int = 1,
    normalize: tuple[bool, bool] = (True, True),
    first_class: int = 0,
    operands: torch.dtype | None = None,
) -> Cosines:
    """Target and all cosines (products, where a side is not normalised), in float64 for float64, else float32."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_hat, w_hat = x.to(acc), (w if index is None else w[index]).to(acc)
    x_hat, w_hat = (unit(t) if on else t for t, on in zip((x_hat, w_hat), normalize, strict=True))
    limit = _within_one if all(normalize) else lambda c: c
    classes = w_hat.shape[0] // sub_centers
    y = labels - first_class
    here = (y >= 0) & (y < classes)
    y = torch.where(here, y, 0)
    centers = w_hat.reshape(classes, sub_centers, -1)
    c_y = torch.einsum("bd,bkd->bk", x_hat, centers[y]).amax(1)
    product = x_hat @ w_hat.T if operands is None else _RoundedProduct.apply(x_hat, w_hat, operands)
    c = product.reshape(len(x), classes, sub_centers).amax(2)
    rival = (torch.arange(classes) != y[:, None]) | ~here[:, None]
    return Cosines(torch.where(here, limit(c_y), 0.0), limit(c), rival, y)


def logits(found: Cosines, scale: Tensor, tau: Tensor | None, bias: Tensor | None, rule: str, args, unit_slope: bool):
    """u [B, C] and N(c) [B, C]; the target's column holds what it would be as a rival."""
    n = RIVALS[rule](found.c, None if tau is None else tau[:, None], *args)
    n = straight_through(n, found.c) if unit_slope else n
    u = scale[:, None] * n
    return (u if bias is None else u + bias), n


class Swept(NamedTuple):
    red: Tensor
    cos_y: Tensor
    sum_u: Tensor
    best: Tensor
    masked_count: Tensor
    masked_sum: Tensor
    mean_n: Tensor  # d red / d scale without bias: sum_j A_j N_j
    sum_n: Tensor


def sweep(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    scale: Tensor,
    tau: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    rule: str = "identity",
    args: tuple[float, ...] = (),
    unit_slope: bool = False,
    reduction: str = "logsumexp",
    **options,
) -> Swept:
    """What one sweep over the classes yields, each a [B] vector; `options` go to `cosines`."""
    found = cosines(x, w, labels, **options)
    u, n = logits(found, scale, tau, bias, rule, args, unit_slope)
    if reduction == "logsumexp":
        none = ~found.rival.any(1)
        shifted = u.masked_fill(~found.rival, -math.inf)
        # a row without a rival: red = -inf, and no gradient
        red = torch.where(none, -math.inf, torch.logsumexp(torch.where(none[:, None], 0.0, shifted), 1))
        a = torch.where(found.rival, torch.exp(u - red[:, None]), 0.0)
    else:
        red = ((u.clamp_min(0) + torch.log1p(torch.exp(-u.abs()))) * found.rival).sum(1)
        a = torch.where(found.rival, 1 / (1 + torch.exp(-u)), 0.0)
    cos = found.c.detach()
    score = cos if bias is None else cos + (bias / scale[:, None]).detach()  # what the logits without margin rank by
    masked = found.rival & (cos > tau[:, None]) if tau is not None else torch.zeros_like(found.rival)
    return Swept(
        red=red,
        cos_y=found.c_y,
        sum_u=torch.where(found.rival, u, 0.0).sum(1),
        best=torch.where(found.rival, score, -math.inf).amax(1),
        masked_count=masked.sum(1).to(cos.dtype),
        masked_sum=torch.where(masked, cos, 0.0).sum(1),
        mean_n=(a * torch.where(found.rival, n, 0.0)).sum(1).detach(),
        sum_n=torch.where(found.rival, n, 0.0).sum(1).detach(),
    )


class Head(NamedTuple):
    """A loss of the field: T on [B], and the rule of the rivals; tau is the value of T ("hard" only)."""

    target: Callable[[Tensor], Tensor]
    t: float | None = None  # of SV-Softmax: N = t c + t - 1 where c > T(c_y)
    detached: bool = False


def rows(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    head: Head,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    **options,
) -> Tensor:
    """The loss of every row [B], 0 where it is ignored.

    In float64 exact from 1e-300 to 1e300, and 0 where there is no rival; in float32 as cross_entropy has it.
    """
    found = cosines(x, w, labels, **options)
    t_y = head.target(found.c_y.detach() if head.detached else found.c_y)  # a margin's own gradient is kept
    rule = ("identity", ()) if head.t is None else ("hard", (head.t, head.t - 1))
    u, _ = logits(found, scale, t_y.detach() if head.t is not None else None, bias, *rule, head.detached)
    z = scale * (t_y + found.c_y - found.c_y.detach() if head.detached else t_y)
    if bias is not None:
        z = z + bias[found.y]
    if z.dtype == torch.float32:
        loss = F.cross_entropy(torch.where(found.rival, u, z[:, None]), found.y, reduction="none")
    else:
        d = torch.where(found.rival, u, -math.inf) - z[:, None]
        top = d.detach().amax(1).clamp_min(0)
        loss = top + torch.log1p(torch.expm1(-top) + torch.exp(d - top[:, None]).sum(1))
    return torch.where(labels == ignore_index, 0.0, loss)


def reduce(loss: Tensor, labels: Tensor, reduction: str, ignore_index: int = -100) -> Tensor:
    """As torch.nn.functional.cross_entropy, but the mean over no row is 0."""
    if reduction == "none":
        return loss
    return loss.sum() / (max(int((labels != ignore_index).sum()), 1) if reduction == "mean" else 1)
