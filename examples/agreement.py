"""Do the plain and the fused head compute the same? Three answers, each with the largest difference that passes.

Same point: both heads get one head's weights and the same embeddings, now and then along the whole training. They may
differ by rounding only, at any step.
Losses, early: two trainings from the same seed stay together as long as the learning rate is small.
Losses and verification, late: training in float32 is chaotic, and a single rounding grows until two trainings
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
FINAL_TOLERANCE = 0.1  # in parts of the first loss, of the loss averaged over the end of the training
ACCURACY_TOLERANCE = 0.08
TAR_TOLERANCE = 0.2


@dataclass
class Agreement:
    """How far the trainings with the two heads are apart, relative to the plain one."""

    plain: Run
    fused: Run
    twin: Run  # as plain, nudged; may have fewer steps
    early: int  # steps from the start in which the losses may differ by rounding only
    point_loss: list[float] = field(default_factory=list)
    point_gradient: list[float] = field(default_factory=list)

    def probe(self, embeddings: Tensor, labels: Tensor) -> None:
        """Compare the heads at the plain training's weights."""
        loss, gradient = same_point(self.plain.head, self.fused.head, embeddings, labels)
        self.point_loss.append(loss)
        self.point_gradient.append(gradient)

    @property
    def curve(self) -> np.ndarray:
        """Of the fused head's losses, step by step."""
        return relative(np.array(self.fused.losses), np.array(self.plain.losses))

    @property
    def twin_curve(self) -> np.ndarray:
        """Of the twin's losses, for its steps."""
        return relative(np.array(self.twin.losses), np.array(self.plain.losses[: len(self.twin.losses)]))

    @property
    def final(self) -> float:
        """Of the losses averaged over the last tenth of the steps, 20 at least; in parts of the first loss."""
        tail = max(20, len(self.plain.losses) // 10)
        return abs(np.mean(self.fused.losses[-tail:]) - np.mean(self.plain.losses[-tail:])) / self.plain.losses[0]


def relative(value: np.ndarray | float, reference: np.ndarray | float) -> np.ndarray:
    """|value - reference| / |reference|."""
    return np.abs(value - reference) / np.maximum(np.abs(reference), 1e-30)


def early_steps(recipe: Recipe) -> int:
    """The first tenth of the warm-up, in which the learning rate is below a thousandth of its largest."""
    return max(1, recipe.rise // 10)


def same_point(plain: fm.MarginHead, fused: fm.MarginHead, embeddings: Tensor, labels: Tensor) -> tuple[float, float]:
    """Relative differences of loss and gradients between two heads, both with the weights of the first."""
    results, state = [], {k: v.detach() for k, v in plain.state_dict().items()}
    for head in (plain, fused):
        x = embeddings.detach().clone().requires_grad_()
        w = plain.weight.detach().clone().requires_grad_()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            # its state is a copy: what is only looked at moves nothing
            loss = functional_call(head, {k: v.clone() for k, v in state.items()} | {"weight": w}, (x, labels))
        loss.backward()
        results.append((loss.item(), x.grad, w.grad))
    (loss, dx, dw), (other_loss, other_dx, other_dw) = results
    return float(relative(other_loss, loss)), max(distance(other_dx, dx), distance(other_dw, dw))


def nudge(weight: Tensor) -> None:
    """Change the first element by the smallest step that its dtype can make."""
    with torch.no_grad():
        first = weight.view(-1)[:1]
        first.copy_(torch.nextafter(first, torch.full_like(first, torch.inf)))


def complaints(agreement: Agreement, plain: Verification, fused: Verification, cost: HeadCost) -> list[str]:
    """What differs by more than rounding explains, a sentence each; empty where the heads agree."""
    # A hard mask is a step: where a cosine is within rounding of it, one row may differ, once in a while.
    worst = np.median if agreement.plain.head.margin.masked else np.max
    checks = [
        ("losses given the same weights and embeddings", worst(agreement.point_loss), LOSS_TOLERANCE),
        ("gradients given the same weights and embeddings", worst(agreement.point_gradient), GRADIENT_TOLERANCE),
        (f"losses of the first {agreement.early} steps", worst(agreement.curve[: agreement.early]), LOSS_TOLERANCE),
        ("losses at the end of training", agreement.final, FINAL_TOLERANCE),
        ("verification accuracies", abs(fused.accuracy - plain.accuracy), ACCURACY_TOLERANCE),
        *((f"TARs at FAR {x:g}", abs(fused.tar_at[x] - plain.tar_at[x]), TAR_TOLERANCE) for x in plain.tar_at),
        (f"losses at {cost.size.classes:,} classes", cost.loss_difference, LOSS_TOLERANCE),
        (f"gradients at {cost.size.classes:,} classes", cost.gradient_difference, GRADIENT_TOLERANCE),
    ]
    return [
        f"{what} differ by {difference:.1e}; at most {allowed:g} is expected"
        for what, difference, allowed in checks
        if not difference <= allowed
    ]
