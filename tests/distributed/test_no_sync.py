"""A step of a shard never waits for its device, where `max_local_batch` says how many rows may come.

On the meta device, which has no values, under the modes of tests/test_no_sync.py.
"""

import contextlib

import pytest
import torch

import fused_margin as fm

from ..test_no_sync import Waits, no_waiting
from .threads import run_threads

B, C, D = 6, 64, 8
MARGINS = {
    "arcface": lambda: fm.ArcFace(0.3),
    "sv": lambda: fm.SVSoftmax(1.2),
    "curricular": fm.CurricularFace,
    "by class": lambda: fm.ArcFace(torch.full((C,), 0.3)),
}


@pytest.fixture
def on_meta(monkeypatch):
    """It has no generators; what they give does not matter here."""
    monkeypatch.setattr("fused_margin.partial_fc.head._generator", lambda *args: None)
    monkeypatch.setattr("fused_margin.partial_fc.head.PartialFC._same_draws", lambda self: contextlib.nullcontext())
    monkeypatch.setattr("fused_margin.partial_fc.ranks.Ranks.from_first", lambda self, t: None)


def step(margin, max_local_batch=B, **options):
    described = {"backend": "reference", "compute_dtype": torch.float32}
    head = fm.PartialFC(D, C, MARGINS[margin](), device="meta", max_local_batch=max_local_batch, **described, **options)
    x = torch.empty(B, D, device="meta", requires_grad=True)
    labels = torch.empty(B, dtype=torch.int64, device="meta")
    with no_waiting():
        head(x, labels).backward()
    return x.grad.shape


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("sampling", ["stratified", "uniform", "hard", None])
@pytest.mark.parametrize("margin", MARGINS)
def test_no_wait(on_meta, margin, sampling, world):
    options = {"sample_rate": 0.3, "sampling": sampling} if sampling else {}
    shapes = run_threads(world, lambda: step(margin, **options)) if world > 1 else [step(margin, **options)]
    assert shapes == [(B, D)] * world


def test_the_exchange_of_sizes_waits(on_meta):
    with pytest.raises((Waits, NotImplementedError)):
        run_threads(2, lambda: step("arcface", None))
