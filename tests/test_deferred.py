"""The gradient of a sweep optimizer's weights: what a training loop may do with it, and what it is told otherwise."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

import fused_margin as fm
from fused_margin import deferred
from fused_margin.optim import DeferredGradient
from fused_margin.spec import Want

from .cases import spread
from .test_sweep_optim import SGD, batch, head, twins

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_calls_that_are_not_alike():
    h = head()
    optimizer = fm.optim.SweepSGD([h.weight])
    second = head(fm.SVSoftmax(1.2, fm.ArcFace()))
    second.weight = h.weight
    (h(*batch()) + second(*batch())).backward()
    with pytest.raises(RuntimeError, match=r"must be alike .* different rule \w+ and \w+\. Call step\(\) after each"):
        optimizer.step()


def test_what_the_forward_was_asked_for(backend):
    """It is kept, as it decides tiles on a GPU, and makes no calls unlike."""
    h = head(backend=backend)
    optimizer = fm.optim.SweepSGD([h.weight], lr=0.1)
    x, labels = batch()
    h(x, labels).backward()
    h(x.requires_grad_(), labels, return_stats=True)[0].backward()
    wants = [c.spec.want for c in h.weight.grad.calls]
    assert not wants[0] & Want.DX
    assert wants[1] & Want.DX
    optimizer.step()


def test_grad_scaler(backend):
    """A scaled loss, an explicit unscale_, and a step that is skipped as a gradient is infinite."""
    ours, theirs = twins(dtype=torch.float32, backend=backend)
    results = []
    for h, kind in ((ours, fm.optim.SweepSGD), (theirs, torch.optim.SGD)):
        optimizer, scaler = kind([h.weight], **SGD), torch.amp.GradScaler("cpu", init_scale=4096.0)
        for step in range(5):
            optimizer.zero_grad()
            loss = h(*batch(dtype=torch.float32, seed=step))
            before = h.weight.detach().clone()
            scaler.scale(loss * (torch.inf if step == 2 else 1)).backward()
            if step % 2:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, h.weight) == (step == 2)
        results.append((h.weight.detach(), scaler.get_scale()))
    assert results[0][1] == results[1][1] == 2048
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)


def test_clipping_says_what_to_do():
    h = head()
    optimizer = fm.optim.SweepSGD(h.parameters(), lr=0.1)
    h(*batch()).backward()
    with pytest.raises(
        RuntimeError, match=r"To clip by norm, leave this weight out, .*grad\.to_dense\(\) makes an ordinary"
    ):
        nn.utils.clip_grad_norm_(h.parameters(), 1.0)
    with pytest.raises(RuntimeError, match="needs the numbers of a gradient that is never made"):
        h.weight.grad.isnan()
    assert repr(h.weight.grad) == "DeferredGradient(shape=[60, 12], 1 calls of the sweep with 14 rows)"
    assert h.weight.grad.shape == h.weight.shape
    optimizer.step()


def test_arithmetic_of_a_deferred_gradient(backend):
    """What a training loop may do with it, against the same with ordinary gradients."""
    ours, theirs = twins(backend=backend)
    optimizer = fm.optim.SweepSGD([ours.weight], lr=1.0)
    grads = []
    for h in (ours, theirs):
        h(*batch()).backward()
        h.weight.grad *= 3
        h.weight.grad /= torch.tensor(2.0)
        h.weight.grad.data.mul_(5)
        h.weight.grad.detach().div_(7)
        h.weight.grad.clone().mul_(11)
        h(*batch(seed=1)).backward()
        torch._foreach_mul_([h.weight.grad], 0.5)
        whole = h.weight.grad + h.weight.grad.clone().detach()
        grads.append(whole / 4 + h.weight.grad * 2)
    assert isinstance(grads[0], DeferredGradient)
    torch.testing.assert_close(grads[0].to_dense(), grads[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.weight.grad.to_dense(), theirs.weight.grad, rtol=1e-10, atol=1e-12)
    with pytest.raises(RuntimeError, match="multiplied with a number"):
        grads[0] * torch.ones(12)
    before = ours.weight.detach().clone()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert torch.equal(ours.weight, before)
    optimizer.zero_grad()
    assert ours.weight.grad is None


def test_a_zeroed_gradient_moves_by_momentum():
    ours, theirs = twins()
    for h, kind in ((ours, fm.optim.SweepSGD), (theirs, torch.optim.SGD)):
        optimizer = kind([h.weight], lr=0.1, momentum=0.9)
        h(*batch()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-12, atol=1e-13)


def test_a_weight_that_changed():
    """Between backward and step, or as zero_grad was forgotten."""
    h = head()
    optimizer = fm.optim.SweepSGD([h.weight])
    h(*batch()).backward()
    optimizer.step()
    match = r"has changed since the backward pass .* Call zero_grad\(\) after each step\(\)"
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    with pytest.raises(RuntimeError, match=match):
        h.weight.grad.to_dense()
    optimizer.zero_grad()
    h(*batch()).backward()
    with torch.no_grad():
        h.weight.mul_(2)
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()


def test_batches_may_be_overwritten_after_the_backward():
    ours, theirs = twins()
    mine, dense = fm.optim.SweepSGD([ours.weight], lr=1.0), torch.optim.SGD([theirs.weight], lr=1.0)
    for h, optimizer in ((ours, mine), (theirs, dense)):
        x, labels = batch()
        h(x, labels).backward()
        x.zero_(), labels.zero_()
        optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-10, atol=1e-12)


def test_gradients_from_elsewhere():
    h = head()
    h(*batch()).backward()
    optimizer = fm.optim.SweepSGD([h.weight])
    with pytest.raises(RuntimeError, match=r"is an ordinary tensor\. It comes from a backward pass before"):
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="got a gradient from outside of the fused sweep"):
        (h(*batch()) + h.weight.square().sum()).backward()
    h.weight.grad = None
    h(*batch()).backward()
    row = fm.optim.RowSGD([h.weight])
    with pytest.raises(RuntimeError, match="expected one optimizer for each parameter"):
        row.step()


def test_an_optimizer_that_is_gone_leaves_nothing():
    h = head()
    optimizer = fm.optim.SweepSGD([h.weight])
    other = head(seed=1)
    other(*batch()).backward()
    assert not isinstance(other.weight.grad, DeferredGradient)
    h(*batch()).backward()
    assert isinstance(h.weight.grad, DeferredGradient)
    h.weight.grad = None
    del optimizer
    gc.collect()
    h(*batch()).backward()
    assert not isinstance(h.weight.grad, DeferredGradient)


def test_copies_and_pickles_of_an_optimizer_work():
    h = head()
    for optimizer in (copy.deepcopy(fm.optim.SweepSGD([h.weight], **SGD)), pickle.loads(
        pickle.dumps(fm.optim.SweepSGD([h.weight], **SGD))
    )):  # fmt: skip
        twin = head()
        twin.weight = optimizer.param_groups[0]["params"][0]
        before = twin.weight.detach().clone()
        twin(*batch()).backward()
        assert isinstance(twin.weight.grad, DeferredGradient)
        optimizer.step()
        assert not torch.equal(before, twin.weight)


def test_state_is_that_of_the_row_optimizers():
    """A state_dict goes from one kind to the other, and to torch's SGD."""
    ours, theirs = twins()
    mine, dense = fm.optim.SweepAdamW([ours.weight], lr=0.01), torch.optim.AdamW([theirs.weight], lr=0.01)
    for step in range(6):
        if step == 2:
            found = copy.deepcopy(mine.state_dict())
            mine = fm.optim.RowAdamW([ours.weight], lr=1.0)
            mine.load_state_dict(found)
            gc.collect()
        if step == 4:
            found = copy.deepcopy(dense.state_dict())
            mine = fm.optim.SweepAdamW([ours.weight])
            mine.load_state_dict(found)
        for h, optimizer in ((ours, mine), (theirs, dense)):
            optimizer.zero_grad()
            h(*batch(seed=step)).backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-9, atol=1e-12)


def test_dtensor():
    """The shard of this rank is found behind a DTensor, and its gradient goes back through it."""
    distributed = pytest.importorskip("torch.distributed", reason="this torch has no distributed part")
    if not distributed.is_available():
        pytest.skip("this torch has no distributed part")
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    x, w, labels = spread(20, 40, 12, 0)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        p = nn.Parameter(DTensor.from_local(w.clone(), mesh, [Shard(0)]))
        q = nn.Parameter(w.clone())
        mine, dense = fm.optim.SweepAdamW([p], lr=0.01), torch.optim.AdamW([q], lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
        for _ in range(2):
            mine.zero_grad(), dense.zero_grad()
            for part in (slice(0, 9), slice(9, 20)):
                for t in (p.to_local(), q):
                    loss = fm.margin_cross_entropy(x[part], t, labels[part], fm.ArcFace(), scale=16.0)
                    scaler.scale(loss).backward()
            assert isinstance(p.grad.to_local(), DeferredGradient)
            with pytest.raises(RuntimeError, match="To clip by norm, leave this weight out"):
                nn.utils.clip_grad_norm_([p], 1.0)
            scaler.step(mine), scaler.step(dense), scaler.update()
        assert {tuple(s.shape) for s in mine.state[p].values()} == {(40, 12), (40,)}
        torch.testing.assert_close(p.to_local(), q, rtol=1e-10, atol=1e-12)
    finally:
        distributed.destroy_process_group()


def test_a_compiled_head_says_what_to_do():
    torch._dynamo.reset()
    h = head(dtype=torch.float32)
    optimizer = fm.optim.SweepSGD([h.weight], lr=0.1)
    compiled = torch.compile(h, backend="aot_eager")
    x, labels = batch(dtype=torch.float32)
    with pytest.raises(Exception, match=r"torch\.compiler\.disable\(head\)"):
        compiled(x.requires_grad_(), labels)
    del optimizer


def test_shapes_and_hyperparameters():
    with pytest.raises(ValueError, match=r"shape \[60\]; expected class weights \[C, D\] of a head only"):
        fm.optim.SweepSGD(head(fm.NormFace(), bias=True).parameters())
    with pytest.raises(ValueError, match="momentum = -1"):
        fm.optim.SweepSGD([head().weight], momentum=-1)
    assert deferred.home(torch.zeros(3, 3)) is None
