"""A step on a device never waits for it: no value is read, no shape depends on one, nothing is copied from the host.

The step runs on the meta device, which has no values, under two modes that name what would wait on a GPU. The kernels
themselves do not run there; what is on [B], before and after the sweep, does.
"""

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fused_margin as fm
from fused_margin.schedules import Exponential, MarginSchedule

from .loss_table import LOSSES
from .test_losses import options

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.bincount.default,
    aten.histc.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # by a mask it counts
COPIES = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor, torch.from_numpy}  # of numbers on the host
ON_META = {"backend": "reference", "compute_dtype": torch.float32}  # it has no kernels, and no autocast
B, C, D = 12, 30, 8


class Waits(Exception):
    """An operation for which the host waits."""


class NoNumbers(TorchFunctionMode):
    """Raises `Waits` where numbers of the host become a tensor of a device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func in COPIES and not isinstance(args[-1], torch.Tensor) and out.device.type != "cpu":
            raise Waits(str(func))
        return out


class NoReads(TorchDispatchMode):
    """Raises `Waits` where a value is read, a shape depends on one, or a tensor goes to another device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in READS or (func in INDEXING and any(t is not None and t.dtype == torch.bool for t in args[1])):
            raise Waits(str(func))
        if func in (aten._to_copy.default, aten.copy_.default):
            source, to = (args[0], kwargs.get("device")) if func is aten._to_copy.default else (args[1], args[0].device)
            if to is not None and source.device != torch.device(to):
                raise Waits(f"{func} from {source.device} to {to}")
        return func(*args, **kwargs)


@contextlib.contextmanager
def no_waiting():
    with NoNumbers(), NoReads():
        yield


def head(name: str, **more) -> fm.MarginHead:
    loss = LOSSES[name]
    return fm.MarginHead(D, C, loss.make(C, D), **options(loss, C) | ON_META | more).to("meta")


def step(module: fm.MarginHead, **more) -> None:
    """Forward, backward and the optimizer's step, on the meta device under `no_waiting`."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    x = torch.empty(B, D, device="meta", requires_grad=True)
    labels = torch.empty(B, dtype=torch.long, device="meta")
    with no_waiting():
        loss, stats = module(x, labels, return_stats=True, **more)
        loss.backward()
        optimizer.step()
    assert x.grad.shape == x.shape
    assert stats.correct.device.type == "meta"


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_waits_for_nothing(name):
    step(head(name))


@pytest.mark.parametrize("mining", [fm.Focal(2), fm.HardRows(0.7)], ids=["focal", "hard rows"])
def test_row_work_waits_for_nothing(mining):
    module = head("arcface-linear", mining=mining, label_smoothing=0.1, class_weight=torch.ones(C))
    step(module, sample_weight=torch.empty(B, device="meta"))


def test_a_schedule_waits_for_nothing():
    module = fm.MarginHead(D, C, fm.SVSoftmax(torch.tensor(1.2), fm.ArcFace(torch.tensor(0.5))), **ON_META)
    module.to("meta")
    warm_up = MarginSchedule(module, "base.m", Exponential(0.0, 0.5, 10))
    for _ in range(3):
        step(module)
        with no_waiting():
            warm_up.step()


def test_centres_and_kappa_wait_for_nothing():
    centers, kappa = fm.CenterLoss(D, C).to("meta"), fm.KappaFace(torch.ones(C), D).to("meta")
    x, labels = torch.empty(B, D, device="meta", requires_grad=True), torch.empty(B, dtype=torch.long, device="meta")
    with no_waiting():
        centers(x, labels).backward()
        kappa.observe(x, labels)
        kappa.end_epoch()


def _reads(c):
    return c - float(c.mean())


def _branches(c):
    return c - 0.1 if (c > 0).any() else c


def _selects(c):
    return torch.zeros_like(c).index_put((c > 0,), c[c > 0])


def _brings_a_number(c):
    return c - torch.tensor(0.3, device=c.device)


def _goes_to_the_host(c):
    return (c.cpu() - 0.3).to(c.device)


@pytest.mark.parametrize("margin", [_reads, _branches, _selects, _brings_a_number, _goes_to_the_host])
def test_what_waits_is_found(margin):
    """The modes see it; the head is not the place to forbid it: a user's own margin may wait."""
    module = fm.MarginHead(D, C, margin, **ON_META).to("meta")
    with pytest.raises(Waits):
        step(module)
