"""The error rule: what a backend may lose against the float64 oracle.

    float64         max |got - exact| <= 1e-10 max |exact|
    float32         max and rms error <= 2 x those of plain PyTorch in float32, + 4 and 1 float32 ulps of max |exact|
    16-bit operands the same against the operand-rounded reference (x_hat, w_hat, G rounded, the rest float32)

Errors are relative to a tensor's largest entry. Several draws of a problem count as one tensor, so that no lucky draw
of a small one decides.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

FACTOR = 2.0
FP64_LIMIT = 1e-10
ULP = torch.finfo(torch.float32).eps
FLOOR_MAX, FLOOR_RMS = 4 * ULP, 1 * ULP  # plain PyTorch may hit a small tensor exactly; nobody can be asked to


@dataclass
class _Error:
    """Errors of one tensor over the draws, and the largest entry that it has in any of them."""

    worst: float = 0.0
    squares: float = 0.0
    count: int = 0
    largest: float = 0.0

    def add(self, got: Tensor, exact: Tensor) -> None:
        got, exact = got.detach().double(), exact.detach()
        error, largest = got - exact, float(exact.abs().max())
        if not error.isfinite().all():  # inf and nan must stand where the oracle has them; they have no distance
            same = (got == exact) | (got.isnan() & exact.isnan())
            error = torch.where(same, 0.0, error).nan_to_num(math.inf, math.inf, math.inf)
            largest = float(torch.where(exact.isfinite(), exact.abs(), 0.0).max())
        error = error.flatten()
        self.worst = max(self.worst, float(error.abs().max()))
        self.squares += float(error @ error)
        self.count += error.numel()
        self.largest = max(self.largest, largest)

    @property
    def max(self) -> float:
        return self._relative(self.worst)

    @property
    def rms(self) -> float:
        return self._relative(math.sqrt(self.squares / self.count))

    def _relative(self, error: float) -> float:
        if not self.largest:  # the exact result is 0 everywhere
            return math.inf if error else 0.0
        return error / self.largest


@dataclass
class ErrorRule:
    """Takes in each tensor as computed, as plain PyTorch (or the rounded reference) has it, and exactly."""

    errors: dict[str, tuple[_Error, _Error]] = field(default_factory=dict)
    exact_mode: bool = True  # all that came in was float64

    def add(self, name: str, got: Tensor, plain: Tensor | None, exact: Tensor) -> None:
        assert got.shape == exact.shape, f"{name}: shape {list(got.shape)}, the oracle has {list(exact.shape)}"
        self.exact_mode &= plain is None
        if not exact.numel():
            return
        ours, theirs = self.errors.setdefault(name, (_Error(), _Error()))
        ours.add(got, exact)
        if plain is not None:
            assert got.dtype == plain.dtype, f"{name}: {got.dtype}, expected {plain.dtype}"
            theirs.add(plain, exact)

    def add_all(self, got: dict[str, Tensor], plain: dict[str, Tensor] | None, exact: dict[str, Tensor]) -> None:
        assert got.keys() == exact.keys()
        for name, tensor in got.items():
            self.add(name, tensor, None if plain is None else plain[name], exact[name])

    def failures(self) -> list[str]:
        """Each broken limit in words; empty if the rule holds."""
        found = []
        for name, (ours, theirs) in self.errors.items():
            if self.exact_mode:
                limits = [("max", ours.max, FP64_LIMIT, "")]
            else:
                limits = [
                    ("max", ours.max, FACTOR * theirs.max + FLOOR_MAX, f", plain has {theirs.max:.2e}"),
                    ("rms", ours.rms, FACTOR * theirs.rms + FLOOR_RMS, f", plain has {theirs.rms:.2e}"),
                ]
            found += [
                f"{name}: {kind} error {error:.2e} exceeds {limit:.2e}{against}"
                for kind, error, limit, against in limits
                if not error <= limit < math.inf
            ]
        return found

    def check(self) -> None:
        failures = self.failures()
        assert not failures, "; ".join(failures)
