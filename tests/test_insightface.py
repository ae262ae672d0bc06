"""2,000 steps of training against InsightFace's own losses, in float64: the same curve in both gradient conventions.

Needs its code: FUSED_MARGIN_INSIGHTFACE=.../recognition/arcface_torch pytest -m slow tests/test_insightface.py
Its ArcFace computes the angle under torch.no_grad, which is "detached"; with that lifted, the same code is "exact".
"""

import contextlib
import importlib.util
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fused_margin as fm

from .conftest import require

pytestmark = pytest.mark.slow
STEPS, BATCH, CLASSES, INPUTS, DIM = 2000, 48, 60, 40, 24
CASES = {
    "arcface": ("ArcFace", {"s": 32.0, "margin": 0.5}, lambda g: fm.ArcFace(0.5, "raw", gradient=g)),
    "combined": (
        "CombinedMarginLoss",
        {"s": 32.0, "m1": 1.0, "m2": 0.4, "m3": 0.0},
        lambda g: fm.ArcFace(0.4, "raw", gradient=g),
    ),
    "cosface": ("CosFace", {"s": 32.0, "m": 0.35}, lambda g: fm.CosFace(0.35, gradient=g)),
    "filter": (
        "CombinedMarginLoss",
        {"s": 32.0, "m1": 1.0, "m2": 0.0, "m3": 0.3, "interclass_filtering_threshold": 0.3},
        lambda g: fm.InterclassFilter(0.3, fm.CosFace(0.3), gradient="exact"),  # it keeps this gradient in any case
    ),
}


@pytest.fixture(scope="module")
def insightface():
    path = os.environ.get("FUSED_MARGIN_INSIGHTFACE")
    if not path:
        pytest.skip("FUSED_MARGIN_INSIGHTFACE names no folder with InsightFace's losses.py")
    spec = importlib.util.spec_from_file_location("insightface_losses", Path(path, "losses.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(loss_of) -> torch.Tensor:
    """The losses of a linear map and its head on noisy clusters, SGD with momentum."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, INPUTS, generator=g, dtype=torch.float64)
    body = (torch.randn(DIM, INPUTS, generator=g, dtype=torch.float64) / INPUTS**0.5).requires_grad_()
    weight = (0.01 * torch.randn(CLASSES, DIM, generator=g, dtype=torch.float64)).requires_grad_()
    optimizer = torch.optim.SGD([{"params": [body], "lr": 0.02}, {"params": [weight], "lr": 1e-5}], momentum=0.9)
    losses = []
    for _ in range(STEPS):
        labels = torch.randint(CLASSES, (BATCH,), generator=g)
        x = centres[labels] + torch.randn(BATCH, INPUTS, generator=g, dtype=torch.float64)
        optimizer.zero_grad()
        loss = loss_of(F.linear(x, body), weight, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def theirs(loss, lifted):
    def run(x, w, labels):
        logits = F.linear(F.normalize(x), F.normalize(w)).clamp(-1, 1)
        with pytest.MonkeyPatch.context() as patch:
            if lifted:
                patch.setattr(torch, "no_grad", contextlib.nullcontext)
            logits = loss(logits, labels[:, None])
        return F.cross_entropy(logits, labels)

    return run


@pytest.mark.parametrize("gradient", ["detached", "exact"])
@pytest.mark.parametrize("name", CASES)
def test_the_same_curve(name, gradient, insightface):
    require("cpu")
    kind, arguments, make = CASES[name]
    loss, margin = getattr(insightface, kind)(**arguments), make(gradient)
    expected = train(theirs(loss, gradient == "exact" and name in ("arcface", "combined")))
    got = train(lambda x, w, y: fm.margin_cross_entropy(x, w, y, margin, scale=32.0, backend="cpu"))
    difference = ((got - expected).abs() / expected.abs().clamp_min(1e-3)).max().item()
    print(f"{name}, {gradient}: first {got[0]:.3f}, last {got[-100:].mean():.3f}, apart {difference:.1e}")
    assert got[-100:].mean() < 0.7 * got[0]
    assert difference < 1e-6


def test_the_conventions_train_differently():
    curves = [
        train(lambda x, w, y, g=g: fm.margin_cross_entropy(x, w, y, fm.ArcFace(0.5, "raw", gradient=g), scale=32.0))
        for g in ("exact", "detached")
    ]
    assert ((curves[0] - curves[1]).abs() / curves[0]).max().item() > 0.02
