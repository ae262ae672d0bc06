"""What the optimizers of this package share: hyperparameters, state of each row, state_dict.

State is float32 (float64 for float64 weights), of the weight's shape; "step" [R] counts the steps of each row.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..deferred import local
from ..margins.checks import number
from ..update_rules import State, Update

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _rate(lr: float | Tensor) -> None:
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr: got a tensor {list(lr.shape)}; expected a number, or a tensor with one")
        lr = float(lr)
    if isinstance(lr, bool) or not isinstance(lr, Real) or not 0 <= lr < math.inf:
        raise ValueError(f"lr = {lr!r}; expected a number of at least 0")


class RowOptimizer(torch.optim.Optimizer, abc.ABC):
    """Steps on rows of its parameters; a subclass says which rule, another what a gradient is."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step. `closure`, if given, evaluates the model again and returns the loss, as in torch.optim."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, local(parameter).detach(), local(parameter.grad), group)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
            for parameter in group["params"]:
                if parameter.dtype not in _FLOATS:
                    raise TypeError(f"a parameter is {parameter.dtype}; expected float32, float64, bfloat16 or float16")
        except Exception:
            self.param_groups.pop()
            raise

    @abc.abstractmethod
    def _step_one(self, parameter: Tensor, w: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """One step of one parameter; w and grad are this rank's part, w without gradient."""

    @abc.abstractmethod
    def _check(self, group: dict[str, Any]) -> None:
        """Raises for hyperparameters of a group that the rule cannot take."""

    @abc.abstractmethod
    def _update(self, group: dict[str, Any]) -> Update:
        """The numbers of a step."""

    @abc.abstractmethod
    def _names(self, group: dict[str, Any]) -> dict[str, str]:
        """The state's tensors: the field of `State` and the name in state_dict."""

    def _local_state(self, parameter: Tensor, group: dict[str, Any], dim: int) -> State:
        """This rank's part of the state, made where it is not there yet, as rows [R, dim]."""
        state, found = self.state[parameter], {}
        for field, name in self._names(group).items():
            if state.get(name) is None:
                state[name] = _zero_steps(parameter) if field == "step" else _zeros(parameter)
            t = local(state[name])
            found[field] = t if field == "step" else t.view(-1, dim)
        return State(**found)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim's, and takes the state_dict of torch.optim.SGD or AdamW too."""
        super().load_state_dict(state_dict)
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        parameters = [(p, group) for group in self.param_groups for p in group["params"]]
        for number_, (parameter, group) in zip(numbers, parameters, strict=True):
            given, state = state_dict["state"].get(number_, {}), self.state[parameter]
            for field, name in self._names(group).items():
                t = given.get(name)
                if field != "step" and isinstance(t, Tensor):  # torch has cast it to the parameter's dtype
                    state[name] = t.to(device=parameter.device, dtype=_acc(parameter))
                elif field == "step" and given:
                    state[name] = _steps(parameter, t)


def _acc(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=_acc(parameter), memory_format=torch.contiguous_format)


def _row_count(parameter: Tensor) -> int:
    return parameter.shape[0] if parameter.dim() else 1


def _zero_steps(parameter: Tensor) -> Tensor:
    mine = local(parameter)
    steps = torch.zeros(_row_count(mine), dtype=torch.float32, device=mine.device)
    if mine is parameter:
        return steps
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        steps, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape[:1], stride=(1,)
    )


def _steps(parameter: Tensor, given: Tensor | float | None) -> Tensor:
    """From a state_dict: one value a row as here, one for all as in torch.optim.AdamW, or none as in its SGD."""
    if isinstance(given, Tensor) and given.dim():
        return given.to(device=parameter.device, dtype=torch.float32)
    steps = _zero_steps(parameter)
    local(steps).fill_(1.0 if given is None else float(given))
    return steps


class SGDRule(RowOptimizer):
    """g += decay w; m = momentum m + (1 - dampening) g (a row's first time: m = g); w -= lr (nesterov ? ... : m)."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        _rate(group["lr"])
        for name in ("momentum", "weight_decay"):
            number(name, group[name], 0)
        number("dampening", group["dampening"], 0, 1)
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov with momentum = {group['momentum']}, dampening = {group['dampening']}; expected a momentum "
                "above 0, and dampening=0"
            )

    def _update(self, group: dict[str, Any]) -> Update:
        return Update(
            "sgd",
            float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            nesterov=bool(group["nesterov"]),
        )

    def _names(self, group: dict[str, Any]) -> dict[str, str]:
        if not group["momentum"]:
            return {}
        return {"m": "momentum_buffer"} | ({"step": "step"} if group["dampening"] else {})


class AdamWRule(RowOptimizer):
    """Adam with decoupled weight decay; t in the bias correction counts the steps that the row has seen."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _check(self, group: dict[str, Any]) -> None:
        _rate(group["lr"])
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(0 <= float(b) < 1 for b in betas):
            raise ValueError(f"betas = {betas!r}; expected two numbers from 0 up to, not including, 1")
        for name in ("eps", "weight_decay"):
            number(name, group[name], 0)

    def _update(self, group: dict[str, Any]) -> Update:
        beta1, beta2 = map(float, group["betas"])
        return Update(
            "adamw",
            float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            beta1=beta1,
            beta2=beta2,
            eps=float(group["eps"]),
        )

    def _names(self, group: dict[str, Any]) -> dict[str, str]:
        return {"m": "exp_avg", "v": "exp_avg_sq", "step": "step"}
