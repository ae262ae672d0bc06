"""Margins that change during a training: a schedule gives a number for each step, `MarginSchedule` puts it in place.

    margin = fm.ArcFace(torch.tensor(0.0))                               # a 0-dim tensor: what may change
    head = fm.MarginHead(512, 1000, margin)
    warm_up = fm.schedules.MarginSchedule(head, "m", fm.schedules.Linear(0.0, 0.5, steps=1000))
    ... optimizer.step(); warm_up.step()

The number is written into the head's own tensor: nothing is compiled anew, and no device is waited for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .margins.checks import count, number

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Linear:
    """From `start` to `end` in equal steps, then `end`.

    Equivalent to: `start + (end - start) * min(step / steps, 1)`
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        number("start", self.start)
        number("end", self.end)
        count("steps", self.steps)

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


@dataclass(frozen=True)
class Exponential:
    """From `start` to `end`, quickly at first, then `end`.

    Equivalent to: `start + (end - start) * (1 - exp(-rate * step / steps)) / (1 - exp(-rate))` until `steps`
    Args: rate > 0 (default 6.9 = log 1000).
    Source: WeSpeaker's margin warm-up, without the divisor: it comes to 0.999 of the way, and jumps the rest.
    """

    start: float
    end: float
    steps: int
    rate: float = math.log(1000)

    def __post_init__(self) -> None:
        number("start", self.start)
        number("end", self.end)
        count("steps", self.steps)
        number("rate", self.rate, 1e-6)

    def __call__(self, step: int) -> float:
        done = math.expm1(-self.rate * min(step / self.steps, 1.0)) / math.expm1(-self.rate)
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True)
class SphereFaceAnnealing:
    """The lambda of `Annealed`, from `base` down to `minimum`.

    Equivalent to: `max(minimum, base * (1 + gamma * step) ** -power)`
    Source: the Caffe prototxt of SphereFace (1000, 0.12, 1, 5); clcarwin's is (1500, 0.1, 1, 5).
    """

    base: float = 1000.0
    gamma: float = 0.12
    power: float = 1.0
    minimum: float = 5.0

    def __post_init__(self) -> None:
        for name in ("gamma", "power", "minimum"):
            number(name, getattr(self, name), 0)
        number("base", self.base, self.minimum, math.inf, "lambda falls from base to minimum")

    def __call__(self, step: int) -> float:
        return max(self.minimum, self.base * (1 + self.gamma * step) ** -self.power)


class MarginSchedule:
    """Writes a schedule's number into a tensor of a head's margin (or its scale) at each `step()`.

    Args: head: a MarginHead; name: the parameter as the margin calls it ("m", "t", "base.m", "lam"), or "scale";
        schedule: a function of the step, which starts at 0. Its state_dict is the step.
    Errors: a name that the head has no tensor of; a number that the margin would not take, when it is to be written; a
        tensor of more than one number, or one that learns. Numbers are checked by themselves, as other tensors are
        not read: that `EqM`'s t2 stays below a t1 that is a tensor too is the caller's to see to.
    """

    def __init__(self, head: nn.Module, name: str, schedule: Schedule) -> None:
        if not hasattr(head, "margin_module"):
            raise TypeError(f"head: got {type(head).__name__}; expected an fm.MarginHead or fm.PartialFC")
        if not callable(schedule):
            raise TypeError(f"schedule: got {schedule!r}; expected a function of the step, as Linear(0.0, 0.5, 1000)")
        self.head, self.name, self.schedule, self.last_step = head, name, schedule, 0
        self._write()

    def _tensor(self) -> Tensor:
        """Looked up each time: `.to(device)` makes new tensors."""
        held = self._of_module() | self.head.margin.tensors()
        held |= {"scale": self.head.scale} if isinstance(self.head.scale, Tensor) else {}
        if self.name not in held:
            raise ValueError(
                f"the head has no tensor {self.name!r} (it has {', '.join(map(repr, held)) or 'none'}); to change a "
                "number during a training, make it a tensor: fm.ArcFace(torch.tensor(0.5)) has 'm', and a head with "
                "scale=torch.tensor(64.0) has 'scale'"
            )
        return held[self.name]

    def _of_module(self) -> dict[str, Tensor]:
        module = self.head.margin_module
        return {} if module is None else dict(module.named_buffers())

    @torch.no_grad()
    def _write(self) -> None:
        tensor, value = self._tensor(), self.value
        if tensor.dim():
            raise ValueError(
                f"{self.name} has shape {list(tensor.shape)}; a schedule writes one number over all of them: "
                f"expected a 0-dim tensor, as in {self.name.rpartition('.')[2]}=torch.tensor(0.5)"
            )
        if tensor.requires_grad:
            raise ValueError(
                f"{self.name} learns, and a schedule would overwrite what it learned; expected a tensor without "
                "gradient: drop the schedule, or pass a tensor in place of the nn.Parameter"
            )
        if self.name == "scale":
            number("scale", value, 1e-9)
        else:
            number(self.name, value)
            inner = self.name in self._of_module() and self.name not in self.head.margin.tensors()
            (self.head.margin_module if inner else self.head.margin).check(self.name, value)
        tensor.fill_(value)

    @property
    def value(self) -> float:
        return float(self.schedule(self.last_step))

    def step(self) -> None:
        """Call it after the optimizer's."""
        self.last_step += 1
        self._write()

    def state_dict(self) -> dict[str, int]:
        return {"last_step": self.last_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        count("last_step", state["last_step"], 0)
        self.last_step = state["last_step"]
        self._write()
