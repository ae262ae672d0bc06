"""Every loss that jumps, in value or slope, at its jump: rows whose cosine lies there to within rounding.

Elsewhere such rows are left out, with a gap. Here each may fall on either side, but on one only: loss and gradients are
those of the formula with that side, under the error rule, so that a forward and a backward that decide apart show. And
of the rows some fall on each side: a threshold that is off by more than the band shows.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_margin as fm
from fused_margin.functional import margin_cross_entropy
from fused_margin.rules import RULES

from . import oracle
from .cases import BF16, FP32, FP64, Mode
from .error_rule import ErrorRule
from .loss_oracle import turn
from .oracle import arcface

ROWS, OTHERS, DIM, SCALE, DRAWS = 16, 8, 32, 8.0, 5
MODES = {"fp64": FP64, "fp32": FP32, "bf16": BF16}
BAND = {torch.float64: 1e-14, torch.float32: 1e-6}  # in a cosine: more than rounding to the dtype

Side = Callable[[Tensor], Tensor]


class Step(NamedTuple):
    """A loss with a jump, typed from its paper: what stands below it and above."""

    make: Callable[[], fm.Margin]
    target: Callable[..., Tensor]  # T(c_y), or T(c_y, mean cosine of the rivals above tau)
    tau: Side = lambda c_y: torch.full_like(c_y, 9.0)
    below: Side = lambda c: c
    above: Side = lambda c: c
    joint: float | None = None  # the target's cosine at which T jumps; None: it is N that does
    target_above: Callable[..., Tensor] | None = None
    of_mean: bool = False


def _constant(value: float) -> Side:
    return lambda c: torch.full_like(c, value)


def _hard(make: Callable[[], fm.Margin], f: Side, a: float, b: float, target: Side | None = None) -> Step:
    return Step(make, target or f, f, above=lambda c: a * c + b)


def _curricular() -> fm.Margin:
    margin = fm.CurricularFace().eval()
    margin.t.fill_(0.25)
    return margin


def _arc(c: Tensor) -> Tensor:
    return arcface(c, 0.5)


def _npc(c: Tensor, h: Tensor) -> Tensor:
    return torch.cos(torch.acos(c) + 0.4 + 0.2 * h)


def _am(c: Tensor) -> Tensor:
    return c - 0.35


_NPC = Step(fm.NPCFace, _npc, turn(0.5), above=lambda c: 1.1 * c + 0.2, of_mean=True)

RIVALS = {
    "sv": _hard(lambda: fm.SVSoftmax(1.2), lambda c: c, 1.2, 0.2),
    "sv-x-am": _hard(lambda: fm.SVSoftmax(1.2, fm.CosFace(0.35)), _am, 1.2, 0.2),
    "sv-x-arc": _hard(lambda: fm.SVSoftmax(1.2, fm.ArcFace(0.5)), _arc, 1.2, 0.2),
    "mv-am": _hard(lambda: fm.MVSoftmax(0.2, 0.35), _am, 1.2, 0.2),
    "mv-am-fixed": _hard(lambda: fm.MVSoftmax(0.2, 0.35, mode="fixed"), _am, 1.0, 0.2),
    "mv-arc": _hard(lambda: fm.MVSoftmax(0.2, 0.35, kind="arc"), turn(0.35), 1.2, 0.2),
    "npcface": _NPC,
    "curricularface": Step(_curricular, _arc, turn(0.5), above=lambda c: c * (0.25 + c)),
    "filter": Step(lambda: fm.InterclassFilter(0.3125, fm.CosFace(0.35)), _am, _constant(0.3125), above=_constant(0.0)),
    "eqm": Step(lambda: fm.EqM(0.95, 0.3), lambda c: c - 0.65, _constant(0.3), _constant(0.3)),
    "adaface": Step(lambda: fm.AdaFace(0.0, eps=0.1).eval(), lambda c: c, _constant(0.9), above=_constant(0.9)),
}
TARGETS = {
    "arcface-linear": Step(
        lambda: fm.ArcFace(0.5), lambda c: c - 0.5 * math.sin(0.5), joint=-math.cos(0.5), target_above=turn(0.5)
    ),
    "arcface-continuous": Step(
        lambda: fm.ArcFace(0.5, "continuous"),
        lambda c: c - (1 - math.cos(0.5)),
        joint=-math.cos(0.5),
        target_above=turn(0.5),
    ),
    "arcface-easy": Step(lambda: fm.ArcFace(0.5, "easy"), lambda c: c, joint=0.0, target_above=turn(0.5)),
    "combined-linear": Step(
        lambda: fm.CombinedMargin(1, 0.3, 0.2),
        lambda c: c - 0.3 * math.sin(0.3) - 0.2,
        joint=-math.cos(0.3),
        target_above=lambda c: turn(0.3)(c) - 0.2,
    ),
    "mv-am": Step(
        lambda: fm.MVSoftmax(0.2, 0.35), lambda c: c, _am, above=lambda c: 1.2 * c + 0.2, joint=0.0, target_above=_am
    ),
    "mv-am-easy-margin": Step(
        lambda: fm.MVSoftmax(0.2, 0.35, easy="margin"),
        lambda c: c,
        _am,
        above=lambda c: 1.2 * c + 0.2,
        joint=0.35,
        target_above=_am,
    ),
    "npcface": _NPC._replace(target=lambda c, h: c, joint=0.0, target_above=_npc),
    "eqm": Step(
        lambda: fm.EqM(0.6, -0.9), lambda c: c - 1.5, below=lambda c: c, joint=0.6, target_above=_constant(-0.9)
    ),
}


class Problem(NamedTuple):
    x: Tensor  # [ROWS, D]
    w: Tensor  # [2 ROWS + OTHERS, D]: the targets of the rows in their order, their twins, others
    mask: Tensor  # [ROWS, C] bool: rivals above tau; those of the twins are open

    @property
    def labels(self) -> Tensor:
        return torch.arange(ROWS)


def _lengths(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Powers of two: rounded as they are or over their length, rows have the same cosines."""
    return 2.0 ** torch.randint(-1, 3, (*shape, 1), generator=g).double()


def _at(x: Tensor, cosine: Tensor, g: torch.Generator) -> Tensor:
    """[R, n, D] at the cosines [R, n] from the rows of x (float64)."""
    x_hat = F.normalize(x.double())[:, None]
    side = torch.randn(*cosine.shape, x.shape[1], generator=g, dtype=torch.float64)
    side = F.normalize(side - (side * x_hat).sum(2, keepdim=True) * x_hat, dim=2)
    c = cosine[..., None]
    return (c * x_hat + (1 - c**2).sqrt() * side) * _lengths(cosine.shape, g)


def _cosine(x: Tensor, w: Tensor, mode: Mode) -> Tensor:
    """Of each row of x [R, D] with w [R, n, D], as the products' operands have it; summed in float64."""
    x, w = (F.normalize(t.to(mode.acc), dim=-1) for t in (x, w))
    if mode.operands:
        x, w = x.to(mode.operands), w.to(mode.operands)
    return (x[:, None].double() * w.double()).sum(2)


def _twins(x: Tensor, there: Tensor, mode: Mode, g: torch.Generator) -> Tensor:
    """[R, D] at the cosines `there`; with rounded operands the nearest of many."""
    tries, spread = (2048, 2e-3) if mode.operands else (1, 0.0)
    jitter = spread * (2 * torch.rand(len(x), tries, generator=g, dtype=torch.float64) - 1)
    drawn = _at(x, there[:, None] + jitter, g).to(mode.w)
    best = (_cosine(x, drawn, mode) - there[:, None]).abs().argmin(1)
    return drawn[range(len(x)), best]


@functools.cache
def problem(step: Step, mode: Mode, seed: int) -> Problem:
    """Rows at the jump, to either side of it; all else has a gap from it, or is drawn anew."""
    g, rows = torch.Generator().manual_seed(seed), torch.arange(ROWS)
    while True:
        offset = BAND[mode.acc] * (2 * torch.rand(ROWS, generator=g, dtype=torch.float64) - 1)
        x = torch.randn(ROWS, DIM, generator=g, dtype=torch.float64).to(mode.x)
        c_y = 0.6 + 0.3 * torch.rand(ROWS, generator=g, dtype=torch.float64)
        c_y = c_y if step.joint is None else step.joint + offset
        w = F.normalize(torch.randn(2 * ROWS + OTHERS, DIM, generator=g, dtype=torch.float64))
        w = (w * _lengths(w.shape[:1], g)).to(mode.w)
        w[:ROWS] = _at(x, c_y[:, None], g)[:, 0].to(mode.w)
        tau = step.tau((F.normalize(x.double()) * F.normalize(w[:ROWS].double())).sum(1))
        if step.joint is None:
            w[ROWS : 2 * ROWS] = _twins(x, tau + offset, mode, g)
        apart = _cosine(x, w.expand(ROWS, -1, -1), mode) - tau[:, None]
        apart[rows, rows] = -1.0
        far = apart.abs()
        if step.joint is None:
            far[rows, rows + ROWS] = 1.0
        if far.min() > mode.mask_gap(DIM):
            return Problem(x, w, apart > 0)


def dense(step: Step, p: Problem, above: Tensor, dtype: torch.dtype | None, mode: Mode) -> dict[str, Tensor]:
    """Losses and gradients with the rows' sides given, above [ROWS] bool."""
    x, w = (t.detach().to(dtype or t.dtype).requires_grad_() for t in (p.x, p.w))
    found = oracle.cosines(x, w, p.labels, operands=None if dtype else mode.operands)
    mask, of_rows = p.mask.clone(), (found.c_y,)
    if step.joint is None:
        mask[range(ROWS), range(ROWS, 2 * ROWS)] = above
    if step.of_mean:
        of_rows = (found.c_y, ((found.c * mask).sum(1) / mask.sum(1).clamp_min(1)).detach())
    t = step.target(*of_rows)
    if step.joint is not None:
        t = torch.where(above, step.target_above(*of_rows), t)
    n = torch.where(mask, step.above(found.c), step.below(found.c))
    loss = F.cross_entropy(SCALE * torch.where(found.rival, n, t[:, None]), p.labels, reduction="none")
    return {"loss": loss.detach()} | dict(zip(("d_x", "d_w"), torch.autograd.grad(loss.sum(), (x, w)), strict=True))


def library(step: Step, p: Problem, backend: str) -> dict[str, Tensor]:
    x, w = (t.detach().requires_grad_() for t in (p.x, p.w))
    margin = step.make()
    loss = margin_cross_entropy(x, w, p.labels, margin, scale=SCALE, reduction="none", backend=backend)
    return {"loss": loss.detach()} | dict(zip(("d_x", "d_w"), torch.autograd.grad(loss.sum(), (x, w)), strict=True))


def sides(step: Step, p: Problem, got: dict[str, Tensor], mode: Mode) -> Tensor:
    """[ROWS] bool, above: to which side's loss and gradient of the row the ones found are nearer."""
    apart = []
    for above in (False, True):
        there = dense(step, p, torch.full((ROWS,), above), None, mode)
        apart.append(sum(((got[n] - there[n]).double().reshape(ROWS, -1) ** 2).sum(1) for n in ("loss", "d_x")))
    return apart[1] < apart[0]


def check(step: Step, mode: Mode, backend: str) -> None:
    rule, above = ErrorRule(), []
    for seed in range(DRAWS):
        p = problem(step, mode, seed)
        got = library(step, p, backend)
        above.append(sides(step, p, got, mode))
        exact = dense(step, p, above[-1], torch.float64, mode)
        rule.add_all(got, None if mode == FP64 else dense(step, p, above[-1], None, mode), exact)
    rule.check()
    share = torch.cat(above).double().mean().item()
    assert 0.2 < share < 0.8, "the rows lie on both sides"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", RIVALS)
def test_rivals_at_the_jump(name, mode, backend):
    check(RIVALS[name], MODES[mode], backend)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TARGETS)
def test_targets_at_the_jump(name, mode, backend):
    check(TARGETS[name], MODES[mode], backend)


ARGS = {"gauss": (1.2, 2.0), "circle": (0.25,), "power": (3.0, 0.4), "angle": (1.0, -2 / math.pi, 0.0)}
ARGS |= {"angle_fraction": (1.4,), "angle_sigmoid": (0.5,), "sigmoid_weight": (80.0, 1.23)}


@pytest.mark.parametrize("rule", sorted(RULES.keys() - {"hard", "curricular", "clip", "filter"}))
def test_the_other_rules_do_not_jump(rule):
    """Of 20,001 cosines no two neighbours' values or slopes differ by much; a new rule that does belongs above."""
    c = torch.linspace(-0.9, 0.9, 20_001, dtype=torch.float64, requires_grad=True)
    value = RULES[rule].value(c, torch.tensor(0.3).double(), torch.tensor(ARGS.get(rule, ()), dtype=torch.float64))
    (slope,) = torch.autograd.grad(value.sum(), c)
    assert value.diff().abs().max() < 1e-3
    assert slope.diff().abs().max() < 3e-3
