"""What the tests compare: each margin of the library beside its formula in the oracle, inputs, and the two runs.

A `Problem` holds tensors as a user has them (dtype and all). `run` puts them through the library, `exact` through the
oracle in float64, `plain` through the oracle in the precision that the error rule measures a backend by.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import fused_margin as fm

from . import oracle
from .error_rule import ErrorRule

BACKENDS = ("reference", "cpu")


class Case(NamedTuple):
    """A margin: how the library makes it from its parameters, and what it means."""

    make: Callable[[dict], fm.Margin]
    target: Callable[[Tensor, dict], Tensor]
    params: dict[str, float] = {}  # noqa: RUF012 (read only)
    t: float | None = None
    detached: bool = False

    def head(self, params: dict) -> oracle.Head:
        return oracle.Head(lambda c: self.target(c, params), self.t, self.detached)


def _arc(tail: str) -> Case:
    return Case(lambda p: fm.ArcFace(p["m"], tail), lambda c, p: oracle.arcface(c, p["m"], tail), {"m": 0.5})


def _psi(m: int) -> Case:
    return Case(lambda p: fm.SphereFace(m), lambda c, p: oracle.sphereface(c, m))


def _combined(tail: str | None, m1: float = 1.3) -> Case:
    params = {"m2": 0.3, "m3": 0.2} | ({"m1": m1} if m1 != 1 else {})
    expected = tail or ("linear" if m1 == 1 else "continuous")
    return Case(
        lambda p: fm.CombinedMargin(**p, tail=tail),
        lambda c, p: oracle.combined(c, p.get("m1", 1.0), p["m2"], p["m3"], expected),
        params,
    )


def _based(case: Case, t: float) -> Case:
    """SV-X-Softmax on a base; the parameters of the base keep their names."""
    return case._replace(make=lambda p: fm.SVSoftmax(t, case.make(p)), t=t)


MARGINS: dict[str, Case] = {
    "normface": Case(lambda p: fm.NormFace(), lambda c, p: oracle.normface(c)),
    "cosface": Case(lambda p: fm.CosFace(p["m"]), lambda c, p: oracle.cosface(c, p["m"]), {"m": 0.35}),
    **{f"arcface_{tail}": _arc(tail) for tail in ("raw", "linear", "continuous", "clamp", "easy")},
    **{f"sphereface_{m}": _psi(m) for m in (2, 3, 4)},
    "sphereface_real": Case(lambda p: fm.SphereFace(p["m"]), lambda c, p: oracle.sphereface(c, p["m"]), {"m": 1.7}),
    "combined_default": _combined(None, m1=1),
    **{f"combined_{tail}": _combined(tail) for tail in ("raw", "continuous", "clamp", "easy")},
    "arcface_detached": _arc("linear")._replace(make=lambda p: fm.ArcFace(p["m"], gradient="detached"), detached=True),
    "sphereface_detached": _psi(4)._replace(make=lambda p: fm.SphereFace(4, gradient="detached"), detached=True),
    "sv": _based(Case(lambda p: fm.NormFace(), lambda c, p: c), 1.2),
    "sv_cosface": _based(Case(lambda p: fm.CosFace(p["m"]), lambda c, p: oracle.cosface(c, p["m"]), {"m": 0.35}), 1.12),
    "sv_arcface": _based(_arc("linear"), 1.2),
    "sv_sphereface": _based(_psi(3), 1.3),
    "sv_detached": _based(_arc("linear"), 1.2)._replace(
        make=lambda p: fm.SVSoftmax(1.2, fm.ArcFace(p["m"]), gradient="detached"), detached=True
    ),
}


class Mode(NamedTuple):
    """Dtypes of a run: of the tensors, what is asked for as compute_dtype, and what the operands then have."""

    x: torch.dtype
    w: torch.dtype
    compute: torch.dtype | None = None
    operands: torch.dtype | None = None

    @property
    def acc(self) -> torch.dtype:
        return torch.float64 if self.x == torch.float64 else torch.float32

    def mask_gap(self, dim: int) -> float:
        """How far a rival's cosine stays from a mask's threshold, so that every precision decides the mask alike.

        One entry on the other side changes a row's numbers by so much that nothing else could be seen.
        """
        rounding = 2 ** -oracle.SIGNIFICANT_BITS[self.operands] if self.operands else 0  # twice the standard error
        return max(2 * rounding / dim**0.5, 4e-6)


FP64 = Mode(torch.float64, torch.float64)
FP32 = Mode(torch.float32, torch.float32)
BF16 = Mode(torch.bfloat16, torch.float32, None, torch.bfloat16)
MODES: dict[str, Mode] = {
    "fp64": FP64,
    "fp32": FP32,
    "bf16": BF16,
    "fp16": Mode(torch.float16, torch.float32, None, torch.float16),
    "bf16_weight": Mode(torch.bfloat16, torch.bfloat16, None, torch.bfloat16),
    "fp16_weight": Mode(torch.float16, torch.float16, None, torch.float16),
    "fp32_as_bf16": Mode(torch.float32, torch.float32, torch.bfloat16, torch.bfloat16),
}


@dataclass
class Problem:
    """Inputs of one head; `tensors` gets gradients: x, w, and where they are there scale, bias and the margin's."""

    case: Case
    mode: Mode
    labels: Tensor
    tensors: dict[str, Tensor]
    upstream: Tensor  # [B] float64, the gradient that reaches the losses
    scale: float = 64.0  # where "scale" is not among the tensors
    per: str = ""  # "sample" or "class": what a parameter tensor has one value for
    options: dict = field(default_factory=dict)

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        return {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in self.tensors.items()}

    def at_rows(self, t: Tensor) -> Tensor:
        return t[self.labels.clamp(0)] if self.per == "class" else t


def spread(batch: int, classes: int, dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, D], w [C, D] (float64) and labels: target cosines from -0.95 to 0.9, norms from 0.7 to 1.4."""
    g = torch.Generator().manual_seed(seed)
    w = torch.nn.functional.normalize(torch.randn(classes, dim, generator=g, dtype=torch.float64))
    labels = torch.randint(classes, (batch,), generator=g)
    labels[:1], labels[1:2] = 0, classes - 1
    pull = 2 * torch.rand(batch, 1, generator=g, dtype=torch.float64) - 0.2
    pull[2::8] = -3  # beyond the angle where a margin's tail begins
    x = torch.randn(batch, dim, generator=g, dtype=torch.float64) / dim**0.5 + pull * w[labels]
    x *= 0.7 + 0.7 * torch.rand(batch, 1, generator=g, dtype=torch.float64)
    w *= 0.7 + 0.7 * torch.rand(classes, 1, generator=g, dtype=torch.float64)
    return x, w, labels


def _balance(x: Tensor, w: Tensor, labels: Tensor, scale: Tensor, target: Callable, g: torch.Generator) -> Tensor:
    """x turned towards or from its class until the target's logit is within 3 of the rivals' log-sum-exp.

    Rows of probability 0 or 1 hide errors: their loss is linear or their gradient 0.
    """
    w_hat = oracle.unit(w)
    y = w_hat[labels]
    side = oracle.unit(x - (x * y).sum(1, keepdim=True) * y)
    offset = 6 * torch.rand(len(x), generator=g, dtype=torch.float64) - 3
    grid = torch.linspace(-0.98, 0.98, 197, dtype=torch.float64)[:, None]
    z = scale * target(grid.expand(-1, len(x)))  # [197, B]
    c = torch.full_like(offset, 0.3)
    for _ in range(2):
        turned = c[:, None] * y + (1 - c[:, None] ** 2).sqrt() * side
        found = oracle.cosines(turned, w, labels)
        lse = torch.where(found.rival, scale[:, None] * found.c, -1e3).logsumexp(1)
        c = grid[(z - lse - offset).abs().argmin(0), 0]
    turned = c[:, None] * y + (1 - c[:, None] ** 2).sqrt() * side
    return turned * torch.linalg.vector_norm(x, dim=1, keepdim=True)


def _clear_of_masks(
    x: Tensor, w: Tensor, labels: Tensor, threshold: Callable[[Tensor], Tensor], batch: int, gap: float, seed: int
) -> tuple[Tensor, Tensor]:
    """`batch` of the rows, and w, such that no rival's cosine lies within `gap` of a row's threshold.

    Rows that are near it with a class that is somebody's target are dropped; other classes are drawn anew.
    """
    g = torch.Generator().manual_seed(seed + 1)
    found = oracle.cosines(x.double(), w.double(), labels)
    tau = threshold(found.c_y)[:, None]
    near = ((found.c - tau).abs() < gap) & found.rival
    rows = (~near[:, labels].any(1)).nonzero().squeeze(1)[:batch]
    assert len(rows) == batch, "draw more rows"
    free = torch.ones(len(w), dtype=torch.bool)
    free[labels] = False
    classes, x_hat = (near[rows].any(0) & free).nonzero().squeeze(1), oracle.unit(x[rows].double())
    while len(classes):
        w[classes] = torch.randn(len(classes), w.shape[1], generator=g, dtype=torch.float64).to(w.dtype)
        cos = x_hat @ oracle.unit(w[classes].double()).T
        classes = classes[((cos - tau[rows]).abs() < gap).any(0)]
    return rows, w


def problem(
    case: Case, mode: Mode, batch: int, classes: int, dim: int, seed: int = 0, per: str = "", bias: bool = False
) -> Problem:
    """A head's inputs; three of four rows are balanced. `per`: scale and margin are tensors with gradient."""
    drawn = batch if case.t is None else 2 * batch + 6
    x, w, labels = spread(drawn, classes, dim, seed)
    if case.t is not None:
        labels = labels % 24 * (classes // 24) if classes > 24 else labels  # few targets, see _clear_of_masks
    g = torch.Generator().manual_seed(seed + 2)
    count = {"sample": drawn, "class": classes, "": 0}[per]
    tensors = {}
    if per:
        values = {"scale": 40.0, **case.params}
        jitter = {name: 0.9 + 0.2 * torch.rand(count, generator=g, dtype=torch.float64) for name in values}
        tensors = {name: (value * jitter[name]).to(mode.acc) for name, value in values.items()}
    if bias:
        tensors["bias"] = torch.randn(classes, generator=g, dtype=torch.float64).to(mode.acc)
    upstream = 0.5 + torch.rand(drawn, generator=g, dtype=torch.float64)
    made = Problem(case, mode, labels, tensors, upstream, per=per)

    params = {n: made.at_rows(tensors[n].double()) if per else v for n, v in case.params.items()}
    scale = made.at_rows(tensors["scale"].double()) if per else torch.full((drawn,), made.scale, dtype=torch.float64)
    balanced = _balance(x, w, labels, scale, lambda c: case.target(c, params), g)
    rows = (torch.arange(drawn) + seed) % 4 != 2
    x, w = torch.where(rows[:, None], balanced, x).to(mode.x), w.to(mode.w)
    made.tensors |= {"x": x, "w": w}
    if case.t is None:
        return made
    keep, made.tensors["w"] = _clear_of_masks(
        x, w, labels, lambda c: case.target(c, params), batch, mode.mask_gap(dim), seed
    )
    made.labels, made.upstream, made.tensors["x"] = labels[keep], upstream[keep], x[keep]
    for name in tensors.keys() - {"x", "w", "bias"} if per == "sample" else ():
        made.tensors[name] = tensors[name][keep]
    return made


def gradients(p: Problem, leaves: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad((loss * p.upstream.to(loss.dtype)).sum(), list(leaves.values()))
    return {"loss": loss.detach()} | {f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}


def run(p: Problem, backend: str) -> dict[str, Tensor]:
    """The losses [B] and all gradients from the library."""
    leaves = p.leaves()
    wrap = {"sample": fm.PerSample, "class": fm.PerClass, "": None}[p.per]
    params = {n: wrap(leaves[n]) if p.per else v for n, v in p.case.params.items()}
    loss = fm.functional.margin_cross_entropy(
        leaves["x"],
        leaves["w"],
        p.labels,
        p.case.make(params),
        scale=wrap(leaves["scale"]) if p.per else p.scale,
        bias=leaves.get("bias"),
        reduction="none",
        compute_dtype=p.mode.compute,
        backend=backend,
        **p.options,
    )
    return gradients(p, leaves, loss)


def _oracle(p: Problem, leaves: dict[str, Tensor], operands: torch.dtype | None) -> dict[str, Tensor]:
    params = {n: p.at_rows(leaves[n]) if p.per else v for n, v in p.case.params.items()}
    acc = torch.float64 if leaves["x"].dtype == torch.float64 else torch.float32
    scale = p.at_rows(leaves["scale"]) if p.per else torch.full((len(p.labels),), p.scale, dtype=acc)
    loss = oracle.rows(
        leaves["x"], leaves["w"], p.labels, p.case.head(params), scale, leaves.get("bias"), operands=operands,
        **p.options,
    )  # fmt: skip
    return gradients(p, leaves, loss)


def exact(p: Problem) -> dict[str, Tensor]:
    """The same from the oracle, in float64 on the tensors as they are."""
    return _oracle(p, p.leaves(torch.float64), None)


def plain(p: Problem) -> dict[str, Tensor] | None:
    """The same from plain PyTorch in float32, with rounded operands in a 16-bit mode; None in float64."""
    return None if p.mode.x == torch.float64 else _oracle(p, p.leaves(), p.mode.operands)


def check(problems: Iterator[Problem], backend: str) -> None:
    """The error rule over several draws of one problem."""
    rule = ErrorRule()
    for p in problems:
        rule.add_all(run(p, backend), plain(p), exact(p))
    rule.check()


def covering(*axes: list, cost: Callable[..., float]) -> list[tuple]:
    """Combinations of the axes in which every pair of values of two axes occurs, and all pairs of the first two.

    A greedy choice: for each pair of the first two, the rest that brings the most pairs not seen before; of equal ones
    one that was chosen least, and then the cheapest.
    """
    seen: set = set()
    chosen = []
    uses = dict.fromkeys(sorted(itertools.product(*axes[2:]), key=lambda rest: cost(*rest)), 0)
    for turn, head in itertools.product(range(2), itertools.product(*axes[:2])):
        best = max(uses, key=lambda rest: (len(_pairs(head + rest) - seen), -uses[rest]))
        if turn and not _pairs(head + best) - seen:
            continue  # the second turn only fills gaps
        uses[best] += 1
        seen |= _pairs(head + best)
        chosen.append(head + best)
    return chosen


def _pairs(values: tuple) -> set:
    return {(a, b) for a, b in itertools.combinations(enumerate(values), 2)}
