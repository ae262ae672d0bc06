"""Checks of hyper-parameters: what a value was, what is expected, and why.

number     a plain number, fixed for the life of its record
scalar     one value for all classes and rows: a number, or a 0-dim tensor that may change in a training
parameter  a value for all, for each class or for each sample, with gradient where it asks for one
"""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from .parameters import PerClass, PerSample, RowParameter

GRADIENTS = ("exact", "detached")
LARGEST_FACTOR = 64  # of the angle in psi; papers stop at 4


def number(name: str, value: float, low: float = -math.inf, high: float = math.inf, why: str = "") -> None:
    """A finite number in [low, high]; a tensor is refused, as nothing would follow its value or its device."""
    if isinstance(value, bool) or not isinstance(value, Real):
        tensors = isinstance(value, (Tensor, PerClass, PerSample))
        got = f"a {type(value).__name__}" if tensors else repr(value)
        raise TypeError(f"{name}: got {got}; expected a plain number, as in {name}=float(...)")
    parameter(name, value, low, high, why)


def scalar(name: str, value: float | Tensor, low: float = -math.inf, high: float = math.inf, why: str = "") -> None:
    """A finite number in [low, high] or a 0-dim tensor without gradient, whose value is not read."""
    if isinstance(value, (PerClass, PerSample)) or (isinstance(value, Tensor) and value.dim()):
        raise TypeError(f"{name} is one number for all classes: a float or a 0-dim tensor")
    without_gradient(name, value)
    parameter(name, value, low, high, why)


def without_gradient(name: str, value: RowParameter) -> None:
    inner = value.values if isinstance(value, (PerClass, PerSample)) else value
    if isinstance(inner, Tensor) and inner.requires_grad:
        raise TypeError(f"{name} asks for a gradient, and the loss has none for it; expected {name}.detach()")


def parameter(name: str, value: RowParameter, low: float = -math.inf, high: float = math.inf, why: str = "") -> None:
    """A float must be a finite number in [low, high]; tensors are values of a run, and are not read."""
    if isinstance(value, (Tensor, PerClass, PerSample)):
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}; expected a number, a tensor, fm.PerClass or fm.PerSample")
    if not (low <= value <= high and abs(value) < math.inf):  # False for nan
        bounds = "a finite number" + ("" if low == -math.inf and high == math.inf else f" in [{low:g}, {high:g}]")
        raise ValueError(f"{name} = {value!r}; expected {bounds}{f': {why}' if why else ''}")


def psi_factor(name: str, value: RowParameter) -> None:
    """The m of psi(m theta)."""
    parameter(name, value, 1, LARGEST_FACTOR, "psi has as many folds, and T falls by 2 at each")


def count(name: str, value: int, low: int = 1, why: str = "") -> int:
    """A number of classes, dimensions or steps: the value itself, an int where it was another library's integer."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise ValueError(f"{name} = {value!r}; expected an integer, at least {low}{f': {why}' if why else ''}")
    return int(value)


def flag(name: str, value: bool) -> None:
    """A bool, also another library's, or 0 or 1."""
    if value not in (False, True):
        raise TypeError(f"{name} = {value!r}; expected True or False")


def tensor(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}; expected a tensor, as torch.as_tensor({name}) gives")


def class_counts(counts: Tensor) -> Tensor:
    """The number of samples of each class, as floats [C]."""
    counts = torch.as_tensor(counts).to(torch.get_default_dtype())
    if counts.dim() != 1 or not counts.numel():
        raise ValueError(f"counts have shape {list(counts.shape)}; expected [C], the number of samples of each class")
    if counts.is_meta:  # no values to read
        return counts
    bad = ~(counts.isfinite() & (counts >= 0))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"counts[{row}] = {counts[row].item():g}; expected the number of samples of class {row}, 0 or more"
        )
    if not counts.any():
        raise ValueError(
            f"counts are all 0; expected samples of at least one of the {len(counts)} classes: "
            "use torch.bincount(labels, minlength=C)"
        )
    return counts


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r}; expected one of {', '.join(map(repr, allowed))}")
