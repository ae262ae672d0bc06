"""What every margin is made of: the interface, row parameters, checks of hyper-parameters.

    z_y = s * T(cos_y)      u_j = s * N(cos_j)      loss = log(exp(z_y) + sum_j exp(u_j)) - z_y

A margin says what T is, which rule N is, and, where it differs, what the loss of a row is. Slopes come from autograd.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..angles import softplus
from ..rules import IDENTITY, Rule

GRADIENTS = ("exact", "detached")


@dataclass(frozen=True, eq=False)
class PerClass:
    """A row parameter given for each class: `values` [C]. Needed only where batch size and class count are equal."""

    values: Tensor


@dataclass(frozen=True, eq=False)
class PerSample:
    """A row parameter given for each row of the batch: `values` [B]; see `PerClass`."""

    values: Tensor


@dataclass(frozen=True, eq=False)
class Whole:
    """A tensor in a record that is not read at the rows' labels."""

    values: Tensor


RowParameter = float | Tensor | PerClass | PerSample


class RowStats(NamedTuple):
    """What is known of the rows before the sweep; a margin's `prepare` gets it. None: the margin's `needs` lacks it."""

    valid: Tensor  # [B] bool: not ignored
    num_classes: int
    dtype: torch.dtype  # of the cosines
    cos_y: Tensor | None = None  # [B], no gradient
    norm: Tensor | None = None  # [B] |x|, with its gradient; 0 in ignored rows
    weight_norm: Tensor | None = None  # [B] |w_y|, with its gradient

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the rows that are not ignored, 0-dim; 0 where there is none."""
        return torch.where(self.valid, values, 0).sum() / self.valid.sum().clamp_min(1)


class Outcome(NamedTuple):
    """What a sweep leaves for the loss of its rows, each [B] and differentiable."""

    scale: Tensor
    z: Tensor  # the target's logit, s T(cos_y) + bias_y
    red: Tensor  # log-sum-exp of the rivals' logits, or their sum of softplus
    sum_u: Tensor  # the sum of the rivals' logits, where the margin's `needs` has it


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


def number(name: str, value: RowParameter, low: float = -math.inf, high: float = math.inf, why: str = "") -> None:
    """A float parameter must be a finite number in [low, high]; tensors are values of a run, and are not read."""
    if isinstance(value, (Tensor, PerClass, PerSample)):
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}; expected a number, a tensor, fm.PerClass or fm.PerSample")
    if not (low <= value <= high and abs(value) < math.inf):  # False for nan
        bounds = "a finite number" + ("" if low == -math.inf and high == math.inf else f" in [{low:g}, {high:g}]")
        raise ValueError(f"{name} = {value!r}; expected {bounds}{f': {why}' if why else ''}")


def count(name: str, value: int, low: int = 1, why: str = "") -> None:
    """A number of classes or dimensions."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} = {value!r}; expected an integer, at least {low}{f': {why}' if why else ''}")


def class_counts(counts: Tensor) -> Tensor:
    """The number of samples of each class, as floats [C]."""
    counts = torch.as_tensor(counts).to(torch.get_default_dtype())
    if counts.dim() != 1 or not counts.numel():
        raise ValueError(f"counts have shape {list(counts.shape)}; expected [C], the number of samples of each class")
    return counts


def one_for_all(name: str, value: float | Tensor) -> None:
    """A parameter of the rivals has one value for all classes and rows, and gets no gradient."""
    if isinstance(value, (PerClass, PerSample)) or (isinstance(value, Tensor) and value.dim()):
        raise TypeError(f"{name} is one number for all classes: a float or a 0-dim tensor")
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{name} asks for a gradient, and the loss has none for it; expected {name}.detach()")


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r}; expected one of {', '.join(map(repr, allowed))}")


def cos_of(m: float | Tensor) -> float | Tensor:
    return m.cos() if isinstance(m, Tensor) else math.cos(m)


def sin_of(m: float | Tensor) -> float | Tensor:
    return m.sin() if isinstance(m, Tensor) else math.sin(m)


class Margin:
    """A loss of the family: `target` is T on [B] cosines; `rule` and `threshold` say what happens to the rivals.

    To write your own, subclass and define `target`, or pass any function of cos_y where a margin is expected.
    `gradient="exact"` differentiates T (and N) as written; "detached" takes T' = N' = 1, as InsightFace's
    arcface_torch and OpenSphere do.

    One that knows more than cos_y says so in `needs` and defines `prepare`, which is called before the sweep and
    returns the margin of this batch; one with a state is an nn.Module too (see `StatefulMargin`).
    """

    gradient: str = "exact"
    additive: ClassVar[bool] = True  # T has a meaning for products that are no cosines; not so for margins on angles
    reduction: ClassVar[str] = "logsumexp"  # of the rivals; "softplus": no softmax couples the classes
    softmax: ClassVar[bool] = True  # the loss of a row is a cross-entropy over the classes
    products: ClassVar[bool] = False  # works on raw products x . w, not on cosines
    masked: ClassVar[bool] = False  # N jumps at a threshold
    constants: ClassVar[bool] = False  # a factor of T or N depends on x or w, and is a constant in the gradient
    needs: tuple[str, ...] = ()  # "cos_y", "norm", "weight_norm" of RowStats; "hard_mean" for `after`; "sum_u"

    def prepare(self, rows: RowStats, labels: Tensor) -> Margin:
        """The margin of this batch."""
        return self

    def target(self, cos_y: Tensor) -> Tensor:
        """T(cos_y), both [B]."""
        raise NotImplementedError(f"{type(self).__name__} must define target(self, cos_y)")

    def rule(self) -> Rule:
        """The rival rule N and its arguments."""
        return IDENTITY

    def threshold(self, cos_y: Tensor) -> Tensor | None:
        """tau [B], for a rule that needs one; computed without gradient, before the sweep."""
        return None

    def after(self, hard_mean: Tensor) -> Margin:
        """The margin once the sweep knows each row's mean cosine of the rivals above tau, [B], 0 where none is."""
        return self

    def row_loss(self, out: Outcome) -> Tensor:
        """The loss of each row, [B]."""
        return softplus(out.red - out.z)

    def penalty(self) -> Tensor | float:
        """What is added to the loss of each row, [B] or one number."""
        return 0.0

    def bias(self) -> Tensor | None:
        """A bias of the logits that the loss brings, 0-dim or [C]."""
        return None

    def transform(self, cos_y: Tensor) -> Tensor:
        """T with the gradient convention applied."""
        if self.gradient == "detached":
            return self.target(cos_y.detach()) + (cos_y - cos_y.detach())
        return self.target(cos_y)

    def at(self, labels: Tensor, num_classes: int, dtype: torch.dtype) -> Margin:
        """This margin with its tensors in `dtype` and every per-class parameter read at the rows' labels."""
        return self.map(lambda name, value: gather_rows(value, labels, num_classes, dtype, name))

    def module(self) -> nn.Module | None:
        """The nn.Module that this margin is or holds: a head makes its parameters and state its own."""
        held = (
            [self, *(getattr(self, f.name) for f in dataclasses.fields(self))]
            if dataclasses.is_dataclass(self)
            else [self]
        )
        inner = (v.module() if isinstance(v, Margin) and v is not self else v for v in held)
        return next((v for v in inner if isinstance(v, nn.Module)), None)

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
        return self.replaced(**changed)

    def replaced(self, **values: object) -> Margin:
        """A copy with other values, which are not checked again: the user's were."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__ | values)
        return copy


class StatefulMargin(nn.Module, Margin):
    """A margin with a state or with parameters: an nn.Module whose `prepare` returns the record for one batch.

    Its state stands in the state_dict of the head that holds it, and changes once a forward in training mode, by the
    rows of the whole batch; in eval mode never. Without a gradient, except where a parameter learns.
    """

    def __init__(self, gradient: str = "exact") -> None:
        super().__init__()
        choice("gradient", gradient, GRADIENTS)
        self.gradient = gradient

    def prepare(self, rows: RowStats, labels: Tensor) -> Margin:
        raise NotImplementedError(f"{type(self).__name__} must define prepare(self, rows, labels)")

    @torch.no_grad()
    def moved(self, name: str, value: Tensor, rate: float, rows: RowStats) -> Tensor:
        """The state `name` for this batch: in training moved towards `value` by `rate`, unless no row is valid."""
        state = getattr(self, name)
        old = state.to(rows.dtype, copy=True)
        if not self.training:
            return old
        new = torch.where(rows.valid.any(), old + rate * (value.detach() - old), old)
        state.copy_(new)
        return new

    def hold(self, name: str, value: float | Tensor, low: float, high: float) -> None:
        """Keeps a hyper-parameter: a number, or a 0-dim tensor, which becomes a buffer and may change in a training."""
        one_for_all(name, value)
        number(name, value, low, high)
        if isinstance(value, Tensor):
            self.register_buffer(name, value)
        else:
            setattr(self, name, value)

    def same_classes(self, made_for: int, rows: RowStats) -> None:
        """Raises where the margin was made for another number of classes."""
        if made_for != rows.num_classes:
            name = type(self).__name__
            raise ValueError(f"{name} was made for {made_for} classes, and the head has {rows.num_classes}")

    def forward(self, *args: object) -> None:
        raise TypeError(f"{type(self).__name__} is a margin: pass it to a head or to margin_cross_entropy")


class Wrapper(Margin):
    """A record that changes a `base` margin; all that it does not define itself is the base's."""

    base: Margin

    @property
    def needs(self) -> tuple[str, ...]:
        return self.base.needs

    def prepare(self, rows: RowStats, labels: Tensor) -> Margin:
        return self.replaced(base=self.base.prepare(rows, labels))

    def target(self, cos_y: Tensor) -> Tensor:
        return self.base.target(cos_y)

    def penalty(self) -> Tensor | float:
        return self.base.penalty()

    def _take_base(self, products: bool = False) -> None:
        """Makes the base a margin, and takes its gradient where none was given."""
        object.__setattr__(self, "base", as_margin(self.base))
        if self.base.products and not products:
            raise TypeError(f"base = {type(self.base).__name__} works on products of raw rows; expected one on cosines")
        if self.base.masked or self.base.reduction != "logsumexp" or self.base.rule() != IDENTITY:
            raise TypeError(f"base = {type(self.base).__name__} has a rival rule of its own; expected one without")
        if self.gradient is None:
            object.__setattr__(self, "gradient", self.base.gradient)
        choice("gradient", self.gradient, GRADIENTS)


@dataclass(frozen=True, eq=False)
class CustomMargin(Margin):
    """A function of the target cosines, [B] -> [B], as a margin; what `margin=lambda c: ...` becomes."""

    fn: Callable[[Tensor], Tensor]
    gradient: str = field(default="exact", kw_only=True)

    def __post_init__(self) -> None:
        choice("gradient", self.gradient, GRADIENTS)

    def target(self, cos_y: Tensor) -> Tensor:
        return self.fn(cos_y)


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
