"""Steps of the optimizers with which GPU kernels are tested: the sweep's gradient used up on the weights, and rows.

What a step makes of weights and state is compared with the oracle's gradient and update_rules.py, both in float64,
under the error rule; plain PyTorch does the same in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_margin import ops, step_ops
from fused_margin.deferred import Call
from fused_margin.rules import Rule
from fused_margin.spec import Want
from fused_margin.update_rules import State, Update, update_rows

from .. import oracle
from ..error_rule import ErrorRule
from .sweep_cases import BATCH, CLASSES, Sweep

UPDATES = {
    "sgd": Update("sgd", 0.3),
    "momentum": Update("sgd", 0.3, weight_decay=0.1, momentum=0.9),
    "nesterov": Update("sgd", 0.3, weight_decay=0.1, momentum=0.9, nesterov=True),
    "dampening": Update("sgd", 0.3, momentum=0.8, dampening=0.3),
    "adamw": Update("adamw", 0.02, weight_decay=0.5, beta1=0.8, beta2=0.95, eps=1e-3),
    "adamw, betas of the default": Update("adamw", 0.02, weight_decay=0.5),
    "adamw, no mean": Update("adamw", 0.02, beta1=0.0, beta2=0.0, eps=1e-2),
}


def new_state(update: Update, rows: int, dim: int, together: int = 1, seed: int = 0) -> State:
    """Of rows that have seen 0 to 3 steps; without any, there is nothing yet."""
    g = torch.Generator().manual_seed(seed)
    steps = torch.arange(rows // together) % 4
    seen = (steps > 0).repeat_interleave(together)[:, None]
    m, v = (torch.where(seen, f(torch.randn(rows, dim, generator=g)), 0) for f in (lambda t: t, torch.square))
    if update.optimizer == "adamw":
        return State(0.1 * m, 0.01 * v, steps.float())
    return State(m if update.momentum else None, None, steps.float() if update.dampening else None)


def copied(state: State, dtype: torch.dtype) -> State:
    """m and v in another dtype; `step` is float32 in any case."""
    m, v = (None if t is None else t.detach().to(dtype, copy=True) for t in state[:2])
    return State(m, v, None if state.step is None else state.step.clone())


def moved(before: Tensor, w: Tensor, state: State) -> dict[str, Tensor]:
    found = {"moved": w - before.to(w.dtype), "m": state.m, "v": state.v}
    return {name: t for name, t in found.items() if t is not None}


class SweepStep:
    """A step with the gradient of calls of the sweep on one weight."""

    def __init__(
        self, name, rule="identity", operands=torch.float32, layout="plain", *, backend, batches=(BATCH,),
        classes=CLASSES, dim=20, weight=torch.float32, bias=False, seed=0,
    ):  # fmt: skip
        self.update, self.operands = UPDATES[name], operands
        self.sweeps = [
            Sweep(rule, operands, layout, bias, dim, seed + k, backend=backend, batch=batch, classes=classes)
            for k, batch in enumerate(batches)
        ]
        first = self.sweeps[0]
        if "index" in first.options:  # a sweep takes its rows in any order, a step in rising order
            first.options["index"] = first.changes["index"] = first.options["index"].sort().values
        self.options, self.w = first.options, first.leaves["w"].detach().to(weight)
        changes = dict(first.changes)
        self.index = changes.pop("index", None)
        self.spec = first.spec(backend, want=int(Want.DX), **changes)
        self.state = new_state(self.update, *self.w.shape, self.spec.sub_centers, seed)

    def _call(self, s: Sweep, w: Tensor) -> Call:
        x, scale, bias = (None if t is None else t.detach() for t in map(s.leaves.get, ("x", "scale", "bias")))
        args = Rule(s.rule, tuple(s.args)).tensor(x)
        red, _, _, aux = ops.sweep(x, w, s.labels, scale, s.tau, bias, self.index, args, self.spec)
        g_red, g_cos_y, _ = s.upstream.float()
        return Call(
            g_red, g_cos_y, torch.zeros_like(g_red), x, s.labels, scale, s.tau, bias, args, red, aux, red.new_empty(0)
        )

    def calls(self, w: Tensor) -> list[Call]:
        return [self._call(s, w) for s in self.sweeps]

    def run(self) -> tuple[dict[str, Tensor], Tensor, State]:
        """What has moved, the weights and the state, of kernels that work in place on copies as they lie."""
        w = torch.empty_strided(self.w.shape, self.w.stride(), dtype=self.w.dtype).copy_(self.w)
        state = copied(self.state, torch.float32)
        step_ops.take_sweep_step(w, state, self.index, self.calls(w), self.spec, self.update)
        return moved(self.w, w, state), w, state

    def expected(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], State]:
        """In float64 the exact step, else that of plain PyTorch, with operands rounded as the kernels' are."""
        w, state = self.w.to(dtype, copy=True).contiguous(), copied(self.state, dtype)
        at = w.clone().requires_grad_()
        rounded = self.operands if dtype == torch.float32 and self.operands != torch.float32 else None
        total = 0.0
        for s in self.sweeps:
            tau, bias = (None if t is None else t.detach().to(dtype) for t in (s.tau, s.leaves.get("bias")))
            swept = oracle.sweep(
                s.leaves["x"].detach().to(dtype), at, s.labels, s.leaves["scale"].detach().to(dtype), tau, bias,
                rule=s.rule, args=tuple(s.args), operands=rounded, **self.options,
            )  # fmt: skip
            total = total + sum((s.upstream[k].to(dtype) * swept[k].to(dtype)).sum() for k in (0, 1))
        (grad,) = torch.autograd.grad(total, at)
        chosen = slice(None) if self.index is None else self.index
        update_rows(w, state, self.index, grad[chosen], self.update)
        if dtype == torch.float32:
            w = w.to(self.w.dtype)
        return moved(self.w, w, state), state

    def add_to(self, rule: ErrorRule) -> None:
        got, w, state = self.run()
        exact, exact_state = self.expected(torch.float64)
        plain, _ = self.expected(torch.float32)
        rule.add_all(got, plain, exact)
        if state.step is not None:
            assert torch.equal(state.step, exact_state.step)
        if self.index is not None:
            still = torch.ones(len(self.w), dtype=torch.bool)
            still[self.index] = False
            assert torch.equal(w[still], self.w[still])
