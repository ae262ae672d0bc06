"""What the demo does beyond calling a head: KappaFace's epochs, the losses that are added to a head's."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fused_margin as fm

EXAMPLES = Path(__file__).parent.parent / "examples"
CLASSES, BATCH, EPOCH = 4, 8, 6  # 12 faces of 4 characters are 6 batches of 8


@pytest.fixture(scope="module")
def demo():
    """Its module `training`; the examples import each other by name, which must not outlive these tests."""
    for name in ("matplotlib", "PIL"):
        pytest.importorskip(name, reason=f"the demo needs {name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        names = [path.stem for path in EXAMPLES.glob("*.py")]
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module("training")
        for name in names:
            sys.modules.pop(name, None)


def run_of(demo, name):
    run = demo.make_run(demo.Recipe(demo.Loss(name), batch=BATCH), CLASSES, backend="reference")
    g = torch.Generator().manual_seed(0)
    return run, torch.rand(BATCH, 1, 32, 32, generator=g), torch.arange(BATCH) % CLASSES


def test_kappa_on_the_head_before_and_after_an_epoch(demo):
    """Until the first end of an epoch the margins come from the class sizes alone."""
    run, images, labels = run_of(demo, "kappaface")
    assert run.epoch == EPOCH
    counts = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def expected(x, kappa):
        w = 0.7 * (1 - torch.sigmoid(0.4 * kappa)) + 0.3 * (torch.cos(math.pi * counts / (1.05 * 4)) + 1) / 2
        margin = fm.ArcFace(fm.PerClass(0.8 * w))
        return fm.margin_cross_entropy(x, run.head.weight, labels, margin, scale=20.0, backend="reference")

    shown = []
    for _ in range(EPOCH - 1):
        shown.append(run.step(images, labels, 0.1))
    x, before = shown[-1], torch.zeros(CLASSES)
    torch.testing.assert_close(run.head(x, labels), expected(x, before))
    shown.append(run.step(images, labels, 0.1))
    unit, many = F.normalize(torch.cat(shown)), labels.repeat(EPOCH)
    r = torch.stack([unit[many == j].mean(0).norm() for j in range(CLASSES)])
    kappa = r * (128 - r**2) / (1 - r**2)
    after = (kappa - kappa.mean()) / kappa.std()
    torch.testing.assert_close(run.head(x, labels), expected(x, after), rtol=1e-4, atol=1e-4)
    assert abs(expected(x, after) - expected(x, before)) > 1e-3
    assert not run.head.margin.seen.any()


def test_centres_are_added_to_the_heads_loss(demo):
    run, images, labels = run_of(demo, "center")
    plain, _, _ = run_of(demo, "softmax")
    x = run.step(images, labels, 0.1)
    torch.testing.assert_close(plain.step(images, labels, 0.1), x)
    centred = 0.003 / 2 * (x**2).sum(1).mean()  # the centres start at 0
    assert run.losses[0] == pytest.approx(plain.losses[0] + centred.item(), rel=1e-6)
    assert centred > 1e-2
