"""What every margin is made of: the interface, margins with a state, and margins that change another one.

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
from ..state import KeepsPrecision, recomputing
from .checks import GRADIENTS, choice, scalar
from .parameters import PerClass, PerSample, RowParameter, gather_rows


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
    guards: ClassVar[bool] = False  # N only keeps cosines off +-1: the rule of a wrapper may take its place
    constants: ClassVar[bool] = False  # a factor of T or N depends on x or w, and is a constant in the gradient
    default_scale: float | str = 64.0  # s where none is given; "norm": the norm of each embedding
    norm_as_scale: bool | None = None  # True: s must be "norm"; False: it must not be; None: either
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

    def row_factor(self, out: Outcome) -> Tensor | float:
        """What `row_loss` multiplies the cross-entropy with: label smoothing's part gets it too."""
        return 1.0

    def smoothable(self) -> bool:
        """Whether `row_loss` is known to be the cross-entropy, times `row_factor`: one class defines both."""
        own = {"row_loss", "row_factor"}
        return next(own <= vars(kind).keys() for kind in type(self).__mro__ if own & vars(kind).keys())

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

    def check(self, name: str, value: float) -> None:
        """Raises what making the margin with this value would raise; `name` as `tensors()` has it."""
        first, _, rest = name.partition(".")
        if rest:
            getattr(self, first).check(rest, value)
        elif dataclasses.is_dataclass(self):
            dataclasses.replace(self, **{first: value})

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


class StatefulMargin(KeepsPrecision, Margin):
    """A margin with a state or with parameters: an nn.Module whose `prepare` returns the record for one batch.

    Its state stands in the state_dict of the head that holds it, and changes once a forward in training mode, by the
    rows of the whole batch; in eval mode never, nor where `torch.utils.checkpoint` runs a forward again. Without a
    gradient, except where a parameter learns. It stays float32 in a head that is made 16-bit.
    """

    by_class: tuple[str, ...] = ()  # parameters and buffers with a row for each class, which come and go with it

    def __init__(self, gradient: str = "exact") -> None:
        super().__init__()
        choice("gradient", gradient, GRADIENTS)
        self.gradient = gradient
        self._bounds: dict[str, tuple[float, float]] = {}  # of what `hold` keeps

    def prepare(self, rows: RowStats, labels: Tensor) -> Margin:
        raise NotImplementedError(f"{type(self).__name__} must define prepare(self, rows, labels)")

    @torch.no_grad()
    def moved(self, name: str, value: Tensor, rate: float, rows: RowStats) -> Tensor:
        """The state `name` for this batch: in training moved towards `value` by `rate`.

        It stands still where no row is valid, and where `value` is not finite: a GradScaler's overflow skips the step.
        """
        state = getattr(self, name)
        old = state.to(rows.dtype, copy=True)
        if not self.training or recomputing():
            return old
        new = torch.where(rows.valid.any() & value.isfinite(), old + rate * (value.detach() - old), old)
        state.copy_(new)
        return new

    def hold(self, name: str, value: float | Tensor, low: float, high: float) -> None:
        """Keeps a hyper-parameter: a number, or a 0-dim tensor, which becomes a buffer and may change in a training."""
        scalar(name, value, low, high)
        self._bounds[name] = (low, high)
        if isinstance(value, Tensor):
            self.register_buffer(name, value.clone())
        else:
            setattr(self, name, value)

    def check(self, name: str, value: float) -> None:
        if name in self._bounds:
            scalar(name, value, *self._bounds[name])

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

    @property
    def softmax(self) -> bool:
        return self.base.softmax

    @property
    def constants(self) -> bool:
        return self.base.constants

    @property
    def default_scale(self) -> float | str:
        return self.base.default_scale

    @property
    def norm_as_scale(self) -> bool | None:
        return self.base.norm_as_scale

    def prepare(self, rows: RowStats, labels: Tensor) -> Margin:
        base = self.base.prepare(rows, labels)
        _without_rule(base)
        return self.replaced(base=base)

    def after(self, hard_mean: Tensor) -> Margin:
        return self.replaced(base=self.base.after(hard_mean))

    def target(self, cos_y: Tensor) -> Tensor:
        return self.base.target(cos_y)

    def row_loss(self, out: Outcome) -> Tensor:
        return self.base.row_loss(out)

    def row_factor(self, out: Outcome) -> Tensor | float:
        return self.base.row_factor(out)

    def smoothable(self) -> bool:
        return super().smoothable() and self.base.smoothable()

    def penalty(self) -> Tensor | float:
        return self.base.penalty()

    def bias(self) -> Tensor | None:
        return self.base.bias()

    def _take_base(self, products: bool = False) -> None:
        """Makes the base a margin, and takes its gradient where none was given."""
        object.__setattr__(self, "base", as_margin(self.base))
        if self.base.products and not products:
            raise TypeError(f"base = {type(self.base).__name__} works on products of raw rows; expected one on cosines")
        _without_rule(self.base)
        if self.gradient is None:
            object.__setattr__(self, "gradient", self.base.gradient)
        choice("gradient", self.gradient, GRADIENTS)


def _without_rule(base: Margin) -> None:
    if base.masked or base.reduction != "logsumexp" or not (base.guards or base.rule() == IDENTITY):
        raise TypeError(
            f"base = {type(base).__name__} has a rival rule of its own, and a row's rivals have one rule; expected a "
            "base that changes the target alone, as ArcFace"
        )


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
