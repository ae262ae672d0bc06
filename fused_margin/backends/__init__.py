"""The backends: which are there, why one cannot run a given sweep, and which one is chosen."""

from __future__ import annotations

import warnings
from types import ModuleType

import torch
from torch import Tensor

from ..rules import RULES
from ..spec import Spec
from . import cpu, cuda, reference, triton

# By preference: of two that can run the first is taken. On a GPU that is Triton, where it is installed and takes the
# input; else the CUDA C++ kernels. No time of either is known yet.
BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "triton": triton, "cuda": cuda, "reference": reference}


class FallbackWarning(UserWarning):
    """No fused backend can run this input, so the reference backend, which materialises [B, C], does."""


def why_not(
    name: str, x: Tensor | None = None, w: Tensor | None = None, spec: Spec | None = None, loss: str = ""
) -> list[str]:
    """Why the backend cannot run (this input), in words; an empty list means that it can.

    Without tensors: why it cannot run at all. loss: what has the spec's rule, for the words.
    """
    if name not in BACKENDS:
        return [f"there is no backend {name!r}"]
    spec = spec if spec is not None else Spec()
    reasons = BACKENDS[name].why_not(x, w, spec)
    if name != "reference" and not RULES[spec.rule].kernel:
        of = f" of {loss}" if loss else ""
        lacks = f"no kernel has the rival rule {spec.rule!r}{of}; csrc/README.md says how one is added"
        reasons = [*reasons, f"{lacks}, or ask for it in an issue that names the rule and your B, C and D"]
    return reasons


def _report(x: Tensor, w: Tensor, spec: Spec, loss: str) -> str:
    reasons = {name: why_not(name, x, w, spec, loss) for name in BACKENDS}
    return "; ".join(f"{name}: {', '.join(r) if r else 'can run'}" for name, r in reasons.items())


def choose(name: str | None, x: Tensor, w: Tensor, spec: Spec, loss: str) -> str:
    """The backend asked for, if it can run this input, else an error that says why not; None: the first that can."""
    if name is not None:
        reasons = why_not(name, x, w, spec, loss)
        if reasons:
            rest = _report(x, w, spec, loss)
            raise ValueError(f"backend={name!r} cannot run this: {', '.join(reasons)}. Backends: {rest}")
        return name
    chosen = next(name for name in BACKENDS if not why_not(name, x, w, spec))
    if chosen == "reference" and not torch.compiler.is_compiling():
        warnings.warn(
            f"no fused backend can run this input, so plain PyTorch does, which holds [B, C] tensors; "
            f"backend='reference' silences this. {_report(x, w, spec, loss)}",
            FallbackWarning,
            stacklevel=4,
        )
    return chosen
