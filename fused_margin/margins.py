"""The margins: the target transform T on [B] vectors, and the rival rule N where a loss has one.

    z_y = s * T(cos_y)      u_j = s * N(cos_j)      loss = log(exp(z_y) + sum_j exp(u_j)) - z_y

Every formula stands here once; slopes come from autograd, so a margin of your own is one function of cos_y.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from .rules import IDENTITY, Rule

SINE_FLOOR = 1e-3  # 1/sin(theta) is kept below 1000: cosines within 5e-7 of +-1, in every dtype
TAILS = ("raw", "linear", "continuous", "clamp", "easy")
GRADIENTS = ("exact", "detached")
_LARGEST_POLYNOMIAL = 16  # degree up to which SphereFace computes psi without an angle


@dataclass(frozen=True, eq=False)
class PerClass:
    """A row parameter given for each class: `values` [C]. Needed only where batch size and class count are equal."""

    values: Tensor


@dataclass(frozen=True, eq=False)
class PerSample:
    """A row parameter given for each row of the batch: `values` [B]; see `PerClass`."""

    values: Tensor


RowParameter = float | Tensor | PerClass | PerSample


def _with_slope(value: Tensor, slope: Tensor, c: Tensor) -> Tensor:
    """`value`, whose derivative with respect to `c` is `slope`."""
    return value.detach() + slope.detach() * (c - c.detach())


def safe_sine(c: Tensor) -> Tensor:
    """sin(acos(c)) for c in [-1, 1], with a finite gradient -c / max(sin, 1e-3) at c = +-1.

    Equivalent to: `torch.sqrt((1 - c) * (1 + c))`
    """
    sine = ((1 - c) * (1 + c)).clamp_min(0).sqrt()
    return _with_slope(sine, -c / sine.clamp_min(SINE_FLOOR), c)


def safe_angle(c: Tensor) -> Tensor:
    """The angle theta = acos(c) in radians for c in [-1, 1], with a finite gradient -1 / max(sin, 1e-3) at c = +-1.

    Equivalent to: `torch.acos(c)`. Build margins of your own with it: `lambda c: torch.cos(fm.safe_angle(c) + 0.5)`.
    """
    sine = ((1 - c) * (1 + c)).clamp_min(0).sqrt()
    return _with_slope(torch.acos(c), -1 / sine.clamp_min(SINE_FLOOR), c)


def gather_rows(value: RowParameter, labels: Tensor, num_classes: int, dtype: torch.dtype, name: str) -> float | Tensor:
    """A row parameter as a float, a 0-dim tensor or a [B] tensor of `dtype`; per-class values at each row's label.

    Labels outside [0, num_classes) (ignored rows) read class 0; their loss is dropped later.
    """
    batch = labels.shape[0]
    if isinstance(value, PerClass):
        value, axis = value.values, "class"
    elif isinstance(value, PerSample):
        value, axis = value.values, "sample"
    elif not isinstance(value, Tensor):
        return value
    elif value.dim() == 0:
        return value.to(dtype)
    elif value.shape == (batch,) and batch == num_classes:
        raise ValueError(
            f"{name}: a tensor of {batch} values could be per class or per sample, as both counts are {batch}; "
            f"wrap it: fm.PerClass({name}) or fm.PerSample({name})"
        )
    else:
        axis = "sample" if value.shape == (batch,) else "class"
    expected = batch if axis == "sample" else num_classes
    if value.shape != (expected,):
        raise ValueError(
            f"{name}: got a tensor of shape {list(value.shape)}; expected a float, a 0-dim tensor, "
            f"[{num_classes}] values (one a class) or [{batch}] values (one a sample)"
        )
    value = value.to(dtype)  # a cosine of a 16-bit margin would be a 16-bit cosine
    if axis == "sample":
        return value
    inside = (labels >= 0) & (labels < num_classes)
    return value[torch.where(inside, labels, 0)] if num_classes else value.new_zeros(batch)


def _number(name: str, value: RowParameter, low: float = -math.inf, high: float = math.inf) -> None:
    """A float parameter must be a finite number in [low, high]; tensors are values of a run, and are not read."""
    if isinstance(value, (Tensor, PerClass, PerSample)):
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}; expected a number, a tensor, fm.PerClass or fm.PerSample")
    if not (low <= value <= high and abs(value) < math.inf):  # False for nan
        bounds = "a finite number" + ("" if low == -math.inf and high == math.inf else f" in [{low:g}, {high:g}]")
        raise ValueError(f"{name} = {value!r}; expected {bounds}")


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r}; expected one of {', '.join(map(repr, allowed))}")


def _cos(m: float | Tensor) -> float | Tensor:
    return m.cos() if isinstance(m, Tensor) else math.cos(m)


def _sin(m: float | Tensor) -> float | Tensor:
    return m.sin() if isinstance(m, Tensor) else math.sin(m)


class Margin:
    """A loss of the family: `target` is T on [B] cosines; `rule` and `threshold` say what happens to the rivals.

    To write your own, subclass and define `target`, or pass any function of cos_y where a margin is expected.
    `gradient="exact"` differentiates T (and N) as written; "detached" takes T' = N' = 1, as InsightFace's
    arcface_torch and OpenSphere do.
    """

    gradient: str = "exact"
    additive: ClassVar[bool] = True  # T has a meaning for products that are no cosines; not so for margins on angles

    def target(self, cos_y: Tensor) -> Tensor:
        """T(cos_y), both [B]."""
        raise NotImplementedError(f"{type(self).__name__} must define target(self, cos_y)")

    def rule(self) -> Rule:
        """The rival rule N and its arguments."""
        return IDENTITY

    def threshold(self, cos_y: Tensor) -> Tensor | None:
        """tau [B], for a rule that needs one; computed without gradient, before the sweep."""
        return None

    def transform(self, cos_y: Tensor) -> Tensor:
        """T with the gradient convention applied."""
        if self.gradient == "detached":
            return self.target(cos_y.detach()) + (cos_y - cos_y.detach())
        return self.target(cos_y)

    def at(self, labels: Tensor, num_classes: int, dtype: torch.dtype) -> Margin:
        """This margin with its tensors in `dtype` and every per-class parameter read at the rows' labels."""
        return self.map(lambda name, value: gather_rows(value, labels, num_classes, dtype, name))

    def tensors(self) -> dict[str, Tensor]:
        """The parameters that are tensors, by name (those of a base margin as "base.m")."""
        found: dict[str, Tensor] = {}

        def visit(name: str, value: RowParameter) -> RowParameter:
            inner = value.values if isinstance(value, (PerClass, PerSample)) else value
            if isinstance(inner, Tensor):
                found[name] = inner
            return value

        self.map(visit)
        return found

    def with_tensors(self, tensors: dict[str, Tensor]) -> Margin:
        """A copy that holds these tensors in place of the ones that `tensors()` names."""

        def replace(name: str, value: RowParameter) -> RowParameter:
            if name not in tensors:
                return value
            wrapped = isinstance(value, (PerClass, PerSample))
            return type(value)(tensors[name]) if wrapped else tensors[name]

        return self.map(replace)

    def map(self, fn: Callable[[str, RowParameter], RowParameter], prefix: str = "") -> Margin:
        """A copy whose numeric parameters went through `fn(name, value)`."""
        if not dataclasses.is_dataclass(self):
            return self
        changed = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Margin):
                changed[f.name] = value.map(fn, f"{prefix}{f.name}.")
            elif isinstance(value, (Real, Tensor, PerClass, PerSample)):
                changed[f.name] = fn(prefix + f.name, value)
        copy = object.__new__(type(self))  # not through __init__: the values were checked when the user gave them
        copy.__dict__.update(self.__dict__ | changed)
        return copy


@dataclass(frozen=True, eq=False)
class CustomMargin(Margin):
    """A function of the target cosines, [B] -> [B], as a margin; what `margin=lambda c: ...` becomes."""

    fn: Callable[[Tensor], Tensor]
    gradient: str = field(default="exact", kw_only=True)

    def __post_init__(self) -> None:
        _choice("gradient", self.gradient, GRADIENTS)

    def target(self, cos_y: Tensor) -> Tensor:
        return self.fn(cos_y)


@dataclass(frozen=True, eq=False)
class NormFace(Margin):
    """No margin: the normalised softmax.

    Equivalent to: `T = c`
    Source: Wang et al. 2017, NormFace (arXiv 1704.06369); also called NSL and COCO.
    """

    gradient: str = field(default="exact", kw_only=True)

    def __post_init__(self) -> None:
        _choice("gradient", self.gradient, GRADIENTS)

    def target(self, cos_y: Tensor) -> Tensor:
        return cos_y


@dataclass(frozen=True, eq=False)
class CosFace(Margin):
    """Additive cosine margin.

    Equivalent to: `T = c - m`
    Args: m in cosine units (default 0.35): a float, [C] per class or [B] per sample, with gradient if it asks for one.
    Source: Wang et al. 2018, CosFace (arXiv 1801.09414) eq. 4; Wang et al. 2018, AM-Softmax (arXiv 1801.05599) eq. 6.
    """

    m: RowParameter = 0.35
    gradient: str = field(default="exact", kw_only=True)

    def __post_init__(self) -> None:
        _number("m", self.m)
        _choice("gradient", self.gradient, GRADIENTS)

    def target(self, cos_y: Tensor) -> Tensor:
        return cos_y - self.m


@dataclass(frozen=True, eq=False)
class ArcFace(Margin):
    """Additive angular margin.

    Equivalent to: `T = cos(theta + m)`, theta = acos(c), and for theta + m > pi the tail:
    raw: cos(theta + m) | linear (default): c - m sin m | continuous: c - (1 - cos m) | clamp: -1
    | easy: cos(theta + m) where c > 0, else c.
    Args: m in radians, 0 <= m <= pi (default 0.5): a float, [C] per class or [B] per sample, with gradient if asked.
    Source: Deng et al. 2019, ArcFace (arXiv 1801.07698) eq. 3; tails as in InsightFace, WeSpeaker and OpenSphere.
    """

    m: RowParameter = 0.5
    tail: str = "linear"
    gradient: str = field(default="exact", kw_only=True)
    additive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _number("m", self.m, 0, math.pi)
        _choice("tail", self.tail, TAILS)
        _choice("gradient", self.gradient, GRADIENTS)

    def target(self, cos_y: Tensor) -> Tensor:
        cos_m, sin_m = _cos(self.m), _sin(self.m)
        beyond = cos_y < -cos_m  # theta + m > pi
        return _tail(self.tail, cos_y, cos_y * cos_m - safe_sine(cos_y) * sin_m, beyond, -cos_m, self.m * sin_m)


def _tail(tail: str, c: Tensor, value: Tensor, beyond: Tensor, joint: float | Tensor, drop: float | Tensor) -> Tensor:
    """T past the angle where the margin's cosine would turn; `joint` is the cosine at which it does."""
    if tail == "raw":
        return value
    if tail == "easy":
        return torch.where(c > 0, value, c)
    if tail == "clamp":
        return torch.where(beyond, -1.0, value)
    return torch.where(beyond, c - drop if tail == "linear" else c - joint - 1, value)


def multiple_angle(c: Tensor, m: int) -> Tensor:
    """cos(m * acos(c)) as the Chebyshev polynomial T_m: no acos, so no singular slope at c = +-1."""
    previous, current = torch.ones_like(c), c
    for _ in range(m - 1):
        previous, current = current, 2 * c * current - previous
    return current


@dataclass(frozen=True, eq=False)
class SphereFace(Margin):
    """Multiplicative angular margin, made monotone.

    Equivalent to: `T = psi(theta) = (-1)^k cos(m theta) - 2 k`, k = floor(m theta / pi). An integer m (int or a whole
    float) is computed as a polynomial in c, without acos; any other m, and a tensor, from the angle.
    Args: m >= 1 (default 1.7): a float, [C] per class or [B] per sample, with gradient if asked.
    Source: Liu et al. 2017, SphereFace (arXiv 1704.08063) eq. 7; real m as in SphereFace-R (arXiv 2109.05565).
    A-Softmax proper is `SphereFace(4)` with `scale="norm"`.
    """

    m: RowParameter = 1.7
    gradient: str = field(default="exact", kw_only=True)
    additive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _number("m", self.m, 1)
        _choice("gradient", self.gradient, GRADIENTS)

    def target(self, cos_y: Tensor) -> Tensor:
        m = self.m
        if not isinstance(m, Tensor) and m == int(m) and m <= _LARGEST_POLYNOMIAL:
            k = sum((cos_y <= math.cos(i * math.pi / m)).to(cos_y.dtype) for i in range(1, int(m)))
            k = k if isinstance(k, Tensor) else torch.zeros_like(cos_y)
            value = multiple_angle(cos_y, int(m))
        else:
            angle = safe_angle(cos_y)
            k = torch.floor((angle * m / math.pi).detach())
            value = torch.cos(angle * m)
        return (1 - 2 * (k % 2)) * value - 2 * k


@dataclass(frozen=True, eq=False)
class CombinedMargin(Margin):
    """The three margins in one formula.

    Equivalent to: `T = cos(m1 theta + m2) - m3`, and where m1 theta + m2 > pi the tail (names as in `ArcFace`; the
    default is "linear" for m1 = 1 and "continuous" otherwise, as the linear tail is a formula of m2 alone).
    Args: m1 >= 1 a factor, m2 in [0, pi] radians, m3 in cosine units; each a float, [C] per class or [B] per sample.
    Source: InsightFace's combined margin, Deng et al. 2019 (arXiv 1801.07698) eq. 4.
    """

    m1: RowParameter = 1.0
    m2: RowParameter = 0.3
    m3: RowParameter = 0.2
    tail: str | None = None
    gradient: str = field(default="exact", kw_only=True)
    additive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _number("m1", self.m1, 1)
        _number("m2", self.m2, 0, math.pi)
        _number("m3", self.m3)
        plain = not isinstance(self.m1, (Tensor, PerClass, PerSample)) and self.m1 == 1
        if self.tail is None:
            object.__setattr__(self, "tail", "linear" if plain else "continuous")
        _choice("tail", self.tail, TAILS)
        if self.tail == "linear" and not plain:
            raise ValueError(f"tail='linear' is defined for m1 = 1, got m1 = {self.m1!r}; choose one of the others")
        _choice("gradient", self.gradient, GRADIENTS)

    def target(self, cos_y: Tensor) -> Tensor:
        angle = safe_angle(cos_y)
        turned = angle * self.m1 + self.m2
        joint = _cos((math.pi - self.m2) / self.m1)
        value = torch.cos(turned)
        return _tail(self.tail, cos_y, value, turned.detach() > math.pi, joint, self.m2 * _sin(self.m2)) - self.m3


@dataclass(frozen=True, eq=False)
class SVSoftmax(Margin):
    """Support-vector softmax: rivals that come closer than the target are pushed harder.

    Equivalent to: `T = base's T` and `N = t c + t - 1 where c > T(cos_y), else c`. Without a base it is SV-Softmax;
    with one, SV-X-Softmax. The mask carries no gradient; t = 1 masks nothing.
    Args: t >= 1 (default 1.2; the paper finds that t > 1.4 may not converge): a float or a 0-dim tensor.
    Source: Wang et al. 2018, Support Vector Guided Softmax Loss (arXiv 1812.11317) eqs. 5-7, 12, 13; s = 30 there.
    """

    t: float | Tensor = 1.2
    base: Margin = field(default_factory=NormFace)
    gradient: str | None = field(default=None, kw_only=True)  # None: the base's
    additive: ClassVar[bool] = False  # N's t - 1 is one of cosines

    def __post_init__(self) -> None:
        if isinstance(self.t, (PerClass, PerSample)) or (isinstance(self.t, Tensor) and self.t.dim()):
            raise TypeError("t is one number for all classes: a float or a 0-dim tensor")
        if isinstance(self.t, Tensor) and self.t.requires_grad:
            raise TypeError("t asks for a gradient, and SV-Softmax has none for it; expected t.detach()")
        _number("t", self.t, 1)
        object.__setattr__(self, "base", as_margin(self.base))
        if self.base.rule() != IDENTITY:
            raise TypeError(f"base = {type(self.base).__name__} has a rival rule of its own; expected one without")
        if self.gradient is None:
            object.__setattr__(self, "gradient", self.base.gradient)
        _choice("gradient", self.gradient, GRADIENTS)

    def target(self, cos_y: Tensor) -> Tensor:
        return self.base.target(cos_y)

    def rule(self) -> Rule:
        return Rule("hard", (self.t, self.t - 1))

    def threshold(self, cos_y: Tensor) -> Tensor:
        return self.base.target(cos_y)


def as_margin(margin: Margin | Callable[[Tensor], Tensor]) -> Margin:
    """A margin as given, or a function of cos_y made one."""
    if isinstance(margin, Margin):
        return margin
    if isinstance(margin, type) and issubclass(margin, Margin):
        raise TypeError(f"margin is the class {margin.__name__}; pass an instance, as in {margin.__name__}()")
    if callable(margin):
        return CustomMargin(margin)
    raise TypeError(
        f"margin: got {type(margin).__name__}; expected a margin of the library, as fm.ArcFace(0.5), "
        "or a function that maps the target cosines [B] to [B]"
    )
