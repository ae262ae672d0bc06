"""Do the plain and the fused head compute the same? Three answers, each with the largest difference that passes.

Same point: both heads get one head's weights and the same embeddings, now and then along the whole training. They may
differ by rounding only, at any step.
Loss curves, early: two trainings from the same seed stay together as long as the learning rate is small.
Loss curves and verification, late: training in float32 is chaotic, and a single rounding grows until two trainings
differ as much as two random ones. So a twin is trained for a while: plain PyTorch again, with one weight changed by the
smallest step a float32 can make. Late differences are that large with no error at all, and only gross ones count.

A margin wrong by 0.002 changes the loss by 1e-3 or more of itself from the first step on, rounding by 1e-7.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from head_cost import HeadCost, distance
from torch import Tensor
from torch.func import functional_call
from training import Recipe, Run
from verification import Verification

import fused_margin as fm

LOSS_TOLERANCE = 1e-4  # relative; at the same point, and of the early curves
GRADIENT_TOLERANCE = 1e-3  # relative, in the 2-norm
FINAL_TOLERANCE = 0.05  # relative, of the loss averaged over the last tenth of the steps
ACCURACY_TOLERANCE = 0.02
TAR_TOLERANCE = 0.15


@dataclass
class Agreement:
    """How far the two heads are apart."""

    early: int  # steps from the start in which the loss curves may differ by rounding only
    point_steps: list[int] = field(default_factory=list)
    point_loss: list[float] = field(default_factory=list)
    point_gradient: list[float] = field(default_factory=list)
    curve: np.ndarray = field(default_factory=lambda: np.zeros(0))  # |fused - plain| / plain of the losses, step by step
    twin: np.ndarray = field(default_factory=lambda: np.zeros(0))  # the same of the twin, for its steps
    final: float = 0.0  # of the mean losses over the last tenth

    def probe(self, step: int, plain: Run, fused: Run, embeddings: Tensor, labels: Tensor) -> None:
        """Compare the heads at the plain training's weights."""
        loss, gradient = same_point(plain.head, fused.head, embeddings, labels)
        self.point_steps.append(step)
        self.point_loss.append(loss)
        self.point_gradient.append(gradient)

    def finish(self, plain: Run, fused: Run, twin: Run) -> None:
        """Compare the loss curves."""
        a, b = np.array(plain.losses), np.array(fused.losses)
        self.curve = relative(b, a)
        self.twin = relative(np.array(twin.losses), a[: len(twin.losses)])
        tail = max(1, len(a) // 10)
        self.final = float(relative(b[-tail:].mean(), a[-tail:].mean()))


def relative(value: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """|value - reference| / |reference|, nan where that is not finite."""
    return np.abs(value - reference) / np.maximum(np.abs(reference), 1e-30)


def early_steps(recipe: Recipe) -> int:
    """The first sixth of the warm-up: the learning rate stays below 1/200 of its largest."""
    return max(1, round(recipe.warm_up * recipe.steps) // 6)


def same_point(plain: fm.MarginHead, fused: fm.MarginHead, embeddings: Tensor, labels: Tensor) -> tuple[float, float]:
    """Relative differences of loss and gradients between two heads, both with the weights of the first."""
    results = []
    for head in (plain, fused):
        x = embeddings.detach().clone().requires_grad_()
        w = plain.weight.detach().clone().requires_grad_()
        loss = functional_call(head, {"weight": w}, (x, labels))
        loss.backward()
        results.append((loss.item(), x.grad, w.grad))
    (loss, dx, dw), (other_loss, other_dx, other_dw) = results
    return float(relative(other_loss, loss)), max(distance(other_dx, dx), distance(other_dw, dw))


def nudge(weight: Tensor) -> None:
    """Change the first element by the smallest step that its dtype can make."""
    with torch.no_grad():
        weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(torch.inf))
