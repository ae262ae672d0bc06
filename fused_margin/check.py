"""Checks a margin on every backend: gradients by finite differences, finite ones where a target cosine is 1 or -1, and
parity with the float64 reference.

The rule: in float64 within 1e-10; in float32 at most twice the error of plain PyTorch in float32; with bfloat16 or
float16 operands at most twice the error of plain PyTorch with the same operands rounded. Errors are relative to the
largest entry of a tensor, and those of a few seeds together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import margins
from .backends import BACKENDS
from .functional import margin_cross_entropy, why_not
from .margins import Margin, Outcome, RowStats, as_margin
from .rules import RULES

_ROWS, _CLASSES, _DIM, _SCALE = 33, 131, 24, 16.0
_GAP = 0.005  # in a cosine: what rounding both operands to bfloat16 may change
_FACTOR, _FLOOR = 2.0, 4e-7  # the floor: a few units in the last place, where plain PyTorch is lucky


class Result(NamedTuple):
    """One line of the table: what was checked, the error found and the error allowed."""

    margin: str
    backend: str
    check: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # False for nan


def _data(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings around their class centres, so that target cosines cover most of [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(_CLASSES, _DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(_CLASSES, (_ROWS,), generator=generator)
    noise = 0.4 * torch.randn(_ROWS, _DIM, generator=generator, dtype=torch.float64)
    return torch.linspace(-1.5, 3, _ROWS, dtype=torch.float64)[:, None] * w[labels] + noise, w, labels


def _with_gap(margin: Margin, data: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Ignores the rows with a rival so close to a step of N that a 16-bit operand may put it on the other side."""
    if not margin.masked:
        return data
    x, w, labels = data
    cos = F.normalize(x) @ F.normalize(w).T
    c, rule = cos.gather(1, labels[:, None])[:, 0], margin.rule()
    if rule.name == "filter":
        tau = torch.full_like(c, float(rule.args[0]))
    else:
        found = RowStats(labels >= 0, len(w), c.dtype, c, x.norm(dim=1))
        tau = margin.prepare(found, labels).at(labels, len(w), c.dtype).threshold(c)
    distance = (cos - tau[:, None]).abs().scatter(1, labels[:, None], torch.inf).amin(1)
    return x, w, torch.where(distance > _GAP, labels, -100)


def _options(margin: Margin) -> dict[str, float | bool]:
    raw = margin.products
    return {"scale": 1.0 if raw else _SCALE, "normalize_embeddings": not raw, "normalize_weight": not raw}


def _run(margin: Margin, data: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, backend: str) -> list[Tensor]:
    """Losses and both gradients; 16-bit dtypes are those of the products' operands."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x, w = (t.to(acc).requires_grad_() for t in data[:2])
    losses = margin_cross_entropy(
        x, w, data[2], margin, reduction="none", compute_dtype=dtype, backend=backend, **_options(margin)
    )
    return _with_gradients(losses, x, w)


def _plain(margin: Margin, data: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The same by plain PyTorch, as one would write it: what the reference, too, is held against."""
    x, w = (t.to(dtype).requires_grad_() for t in data[:2])
    valid, labels = data[2] >= 0, data[2].clamp_min(0)
    cos = F.linear(x, w) if margin.products else F.linear(F.normalize(x), F.normalize(w))
    c = cos.gather(1, labels[:, None])[:, 0]
    found = RowStats(valid, len(w), dtype, c.detach(), x.norm(dim=1), w[labels].norm(dim=1))
    margin, scale = margin.prepare(found, labels), _options(margin)["scale"]
    rule, bias = margin.rule(), margin.bias()
    bias = cos.new_zeros(len(w)) if bias is None else bias.expand(len(w))
    margin = margin.at(labels, len(w), dtype)
    tau = margin.threshold(c.detach())
    v = RULES[rule.name].value(cos, None if tau is None else tau[:, None], rule.tensor(x))
    if margin.gradient == "detached":
        v = v.detach() + (cos - cos.detach())
    rival = torch.ones_like(cos, dtype=torch.bool).scatter(1, labels[:, None], False)
    if "hard_mean" in margin.needs:
        hit = rival & (cos.detach() > tau[:, None])
        margin = margin.after((cos.detach() * hit).sum(1) / hit.sum(1).clamp_min(1))
    z, u = scale * margin.transform(c) + bias[labels], scale * v + bias
    if margin.reduction == "softplus":
        red = (F.softplus(u, threshold=torch.inf) * rival).sum(1)
    else:
        red = u.masked_fill(~rival, -torch.inf).logsumexp(1)
    if type(margin).row_loss is Margin.row_loss:
        losses = F.cross_entropy(torch.where(rival, u, z[:, None]), labels, reduction="none")
    else:
        losses = margin.row_loss(Outcome(torch.full_like(z, scale), z, red, (u * rival).sum(1)))
    return _with_gradients(torch.where(valid, losses + margin.penalty(), 0), x, w)


def _with_gradients(losses: Tensor, x: Tensor, w: Tensor) -> list[Tensor]:
    weights = torch.linspace(0.5, 1.5, _ROWS, dtype=losses.dtype)
    return [losses.detach().double(), *(g.double() for g in torch.autograd.grad(losses @ weights, (x, w)))]


def _worst(errors: Iterable[float]) -> float:
    return float(torch.tensor(list(errors), dtype=torch.float64).max())  # keeps a nan, as max() does not


def _error(got: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(got, expected, strict=True)
    return _worst(((g - e).abs().max() / e.abs().max().clamp_min(1e-30)).item() for g, e in pairs)


def _gradcheck(margin: Margin, backend: str) -> float:
    """The largest relative difference of a directional derivative from central differences, in float64."""
    x, w, labels = _data(0)
    options = _options(margin) | {"backend": backend}
    leaves = [x.requires_grad_(), w.requires_grad_()]
    grads = torch.autograd.grad(margin_cross_entropy(x, w, labels, margin, **options), leaves)
    errors = []
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for leaf, grad in zip(leaves, grads, strict=True):
            for _ in range(4):
                direction = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
                ends = []
                for step in (1e-6, -1e-6):
                    x_moved, w_moved = (t + step * direction if t is leaf else t for t in leaves)
                    ends.append(margin_cross_entropy(x_moved, w_moved, labels, margin, **options))
                analytic = (grad * direction).sum()
                numeric = (ends[0] - ends[1]) / 2e-6
                errors.append(((numeric - analytic).abs() / analytic.abs().clamp_min(1e-3)).item())
    return _worst(errors)


def _at_the_ends(margin: Margin, backend: str) -> float:
    """0 if losses and gradients are finite where x is +-w_y, else infinite: acos has no slope there."""
    _, w, labels = _data(0)
    x = w[labels] * torch.where(torch.arange(_ROWS) % 2 == 0, 1.0, -1.0)[:, None]
    found = [_run(margin, (x, w, labels), dtype, backend) for dtype in (torch.float64, torch.float32)]
    return 0.0 if all(t.isfinite().all() for run in found for t in run) else math.inf


def check_margin(
    margin: Margin | Callable[[Tensor], Tensor], backends: Iterable[str] | None = None, quick: bool = False
) -> list[Result]:
    """Checks a margin (yours or the library's) on the backends given, by default on all that are present.

    Args:
        margin: a margin, or a function that maps target cosines [B] to [B]; parameters float or 0-dim.
        quick: fewer seeds and no 16-bit operands.
    Returns: one `Result` for each check; all are fine if `all(r.ok for r in results)`. Where the gradient is not the
        slope of the loss, by `gradient="detached"` or by the paper, it is compared with the reference only. One with a
        state is checked in eval mode. Backends that have no kernel for its rule are left out, if none were named.
    """
    margin = as_margin(margin)
    module = margin.module()
    if module is not None and module.training:
        module.eval()
        try:
            return check_margin(margin, backends, quick)
        finally:
            module.train()
    name = _describe(margin)
    present = [b for b in BACKENDS if not why_not(b, margin)] if backends is None else list(backends)
    for backend in present:
        if why_not(backend):
            raise ValueError(f"backend {backend!r} is not present: {', '.join(why_not(backend))}")
    data = [_with_gap(margin, _data(seed)) for seed in range(2 if quick else 5)]
    exact = [_plain(margin, d, torch.float64) for d in data]
    results = []

    def worst(run: Callable[[tuple[Tensor, Tensor, Tensor]], list[Tensor]]) -> float:
        return _worst(_error(run(d), e) for d, e in zip(data, exact, strict=True))

    for backend in present:
        if margin.gradient == "exact" and not margin.constants:
            results.append(Result(name, backend, "gradient", _gradcheck(margin, backend), 1e-6))
        results.append(Result(name, backend, "ends", _at_the_ends(margin, backend), 0.0))
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)[: 2 if quick else 4]:
            if backend == "reference" and dtype.itemsize == 2:
                continue  # it is the measure of the others there
            error = worst(lambda d, dtype=dtype, backend=backend: _run(margin, d, dtype, backend))
            if dtype == torch.float64:
                allowed = 1e-10
            elif dtype == torch.float32:
                allowed = _FACTOR * max(worst(lambda d: _plain(margin, d, torch.float32)), _FLOOR)
            else:
                allowed = _FACTOR * max(worst(lambda d, dtype=dtype: _run(margin, d, dtype, "reference")), _FLOOR)
            results.append(Result(name, backend, str(dtype).removeprefix("torch."), error, allowed))
    return results


def _describe(margin: Margin) -> str:
    text = str(margin).replace(", gradient='exact'", "").replace("gradient='exact'", "")
    return text.replace("gradient='detached'", "detached")


def all_margins() -> list[Margin]:
    """The margins of the library, as `python -m fused_margin check` runs them: the same in each run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for those that draw their first values
        return _all_margins()


def _all_margins() -> list[Margin]:
    m = margins
    exact = [
        m.NormFace(),
        m.CosFace(0.35),
        *(m.ArcFace(0.5, tail) for tail in m.TAILS),
        *(m.SphereFace(k) for k in (1, 2, 3, 4, 1.7)),
        m.CombinedMargin(1.0, 0.3, 0.2),
        m.CombinedMargin(1.2, 0.3, 0.2),
        m.X2Softmax(),
        m.Annealed(m.SphereFace(4)),
        m.LSoftmax(4),
        m.SVSoftmax(1.2),
        m.SVSoftmax(1.2, m.CosFace(0.35)),
        m.SVSoftmax(1.2, m.ArcFace(0.5)),
        m.SVSoftmax(1.2, m.ElasticFace()),
        m.SVSoftmax(1.2, m.AdaFace()),
        m.MVSoftmax(),
        m.MVSoftmax(kind="arc", mode="fixed"),
        m.CurricularFace(),
        m.NPCFace(),
        m.ArcNegFace(),
        m.EqM(),
        m.InterclassFilter(),
        m.CircleLoss(),
        m.AdaFace(),
        m.MagFace(0.5, 12.0),
        m.ElasticFace(),
        m.AdaMSoftmax(_CLASSES),
        m.KappaFace(1 + torch.arange(_CLASSES) % 7, _DIM),
        *(m.SphereFace2(_CLASSES, kind) for kind in "CAM"),
        m.UniFace(_CLASSES),
        *(m.GASoftmax(kind) for kind in ("linear", "cosine", "sigmoid")),
        *(m.LiArcFace(rivals=rivals) for rivals in ("angle", "cosine")),
        m.QAMFace(),
        *(m.SphereFaceR(version=version) for version in (0, 1, 2)),
        m.SFace(),
        m.P2SGrad(),
    ]
    return [*exact, m.ArcFace(0.5, gradient="detached"), m.SVSoftmax(1.2, gradient="detached")]


def table(results: list[Result]) -> str:
    """The results as lines of text: a row a margin and backend, a column a check, errors with what is allowed."""
    checks = list(dict.fromkeys(r.check for r in results))
    rows = {}
    for r in results:
        cell = f"{r.error:.1e} {'ok' if r.ok else f'> {r.allowed:.1e} FAILED'}"
        rows.setdefault((r.margin, r.backend), {})[r.check] = cell
    lines = [["margin", "backend", *checks]]
    lines += [[*key, *(cells.get(c, "-") for c in checks)] for key, cells in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)).rstrip() for line in lines)
