"""RowSGD and RowAdamW as optimizers of torch: groups, schedules, state_dict, GradScaler, DTensors, bad input."""

import copy
import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fused_margin as fm
from bench import optim
from fused_margin.update_rules import Update

from .conftest import require
from .test_optim import choices, draw, sparse


def test_groups_schedules_and_closures():
    w, found = draw()
    p, q = (nn.Parameter(w.clone()) for _ in range(2))
    groups = [{"params": [p]}, {"params": [q], "lr": 0.5, "momentum": 0.0}]
    optimizer = fm.optim.RowSGD(groups, lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1)
    expected_p, expected_q = w.clone(), w.clone()
    momentum, lr = torch.zeros_like(w), 1.0
    for number, (rows, values) in enumerate(found):

        def closure(rows=rows, values=values):
            p.grad = q.grad = sparse(rows, values, w.shape)
            return torch.tensor(7.0)

        lr = 0.1 ** (number // 2)
        assert optimizer.step(closure) == 7
        schedule.step()
        momentum[rows] = 0.9 * momentum[rows] + values
        expected_p[rows] -= 0.1 * lr * momentum[rows]
        expected_q[rows] -= 0.5 * lr * values
    torch.testing.assert_close(p.detach(), expected_p, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(q.detach(), expected_q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@choices
def test_state_dict_goes_on_where_it_was(choice, dtype):
    ours, _, options = choice
    w, found = draw(6, dtype=dtype)

    def train(p, optimizer, steps):
        for rows, values in steps:
            p.grad = sparse(rows, values, w.shape)
            optimizer.step()

    whole = nn.Parameter(w.clone())
    train(whole, ours([whole], **options), found)
    first = nn.Parameter(w.clone())
    optimizer = ours([first], **options)
    train(first, optimizer, found[:3])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = nn.Parameter(first.detach().clone())
    other = ours([second], lr=9.0)
    other.load_state_dict(torch.load(file, weights_only=True))
    train(second, other, found[3:])
    assert torch.equal(second, whole)
    assert all(t.dtype != torch.bfloat16 for t in other.state[second].values())


@choices
def test_takes_over_from_torch(choice):
    """The state of torch.optim.SGD and AdamW, after three of six steps."""
    ours, theirs, options = choice
    w, _ = draw()
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(w.shape, generator=g, dtype=w.dtype) for _ in range(6)]
    p, q = nn.Parameter(w.clone()), nn.Parameter(w.clone())
    dense = theirs([q], **options)
    for number, grad in enumerate(grads):
        if number == 3:
            p.data = q.detach().clone()
            mine = ours([p], **options)
            mine.load_state_dict(copy.deepcopy(dense.state_dict()))
        q.grad = grad.clone()
        dense.step()
        if number >= 3:
            p.grad = grad
            mine.step()
    torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-13)


def test_grad_scaler():
    """Sparse gradients are unscaled, and a step with an infinite one is skipped."""
    w, found = draw(dtype=torch.float32)
    p = nn.Parameter(w.clone())
    optimizer = fm.optim.RowSGD([p], lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected, momentum, factor = w.clone(), torch.zeros_like(w), 1024.0
    for number, (rows, values) in enumerate(found):
        assert float(scaler.scale(torch.ones(()))) == factor
        p.grad = sparse(rows, values * factor, w.shape)
        if number == 2:
            p.grad = sparse(rows, values * torch.inf, w.shape)
            factor /= 2
        else:
            momentum[rows] = 0.9 * momentum[rows] + values
            expected[rows] -= 0.1 * momentum[rows]
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(p.detach(), expected)


def test_dtensor():
    """This rank's part is updated; state is sharded as the weight is."""
    distributed = pytest.importorskip("torch.distributed", reason="this torch has no distributed part")
    if not distributed.is_available():
        pytest.skip("this torch has no distributed part")
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    w, _ = draw()
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        p, q = nn.Parameter(DTensor.from_local(w.clone(), mesh, [Shard(0)])), nn.Parameter(w.clone())
        for t, optimizer in ((p, fm.optim.RowAdamW([p])), (q, torch.optim.AdamW([q]))):
            for _ in range(3):
                optimizer.zero_grad()
                t.square().sum().backward()
                optimizer.step()
            if t is p:
                names = {name: tuple(s.shape) for name, s in optimizer.state[p].items()}
                assert names == {"exp_avg": (23, 19), "exp_avg_sq": (23, 19), "step": (23,)}
                assert all(isinstance(s, DTensor) for s in optimizer.state[p].values())
        torch.testing.assert_close(p.to_local(), q, rtol=1e-12, atol=1e-13)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda p: fm.optim.RowSGD([p], lr=-1), r"lr = -1; expected a number of at least 0"),
        (lambda p: fm.optim.RowSGD([p], lr=torch.ones(2)), r"lr: got a tensor \[2\]"),
        (lambda p: fm.optim.RowSGD([p], momentum=-0.1), "momentum = -0.1"),
        (lambda p: fm.optim.RowSGD([p], dampening=2), "dampening = 2"),
        (lambda p: fm.optim.RowSGD([p], nesterov=True), "nesterov with momentum = 0"),
        (lambda p: fm.optim.RowAdamW([p], betas=(0.9, 1.0)), r"betas = \(0.9, 1.0\); expected two numbers"),
        (lambda p: fm.optim.RowAdamW([p], eps=-1), "eps = -1"),
    ],
)
def test_bad_hyperparameters(make, match):
    with pytest.raises(ValueError, match=match):
        make(nn.Parameter(torch.randn(3, 2)))


def test_bad_parameters_and_gradients():
    with pytest.raises(TypeError, match=r"a parameter is torch\.complex64; expected float32"):
        fm.optim.RowSGD([nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))])
    p = nn.Parameter(torch.randn(3, 2))
    optimizer = fm.optim.RowSGD([p])
    p.grad = torch.eye(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="2 sparse dimensions; expected 1: whole rows"):
        optimizer.step()
    p.grad = None
    optimizer.step()
    rows = torch.tensor([1, 0])
    for backend in ("cpu", "reference"):
        if fm.why_not(backend):
            continue
        with pytest.raises(RuntimeError, match="rows to update must rise"):
            torch.ops.fused_margin.update_rows(
                p.detach(), None, None, None, rows, torch.ones(2, 2), *Update("sgd", 0.1), backend
            )


def test_docs():
    """What docs/optim.md shows runs, and what it links to is there."""
    page = Path(__file__).parent.parent / "docs/optim.md"
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(snippets) == 2
    scope = {}
    for snippet in snippets:
        exec(snippet, scope)
    assert isinstance(scope["head"].weight.grad, fm.optim.DeferredGradient)
    assert "<!--" not in page.read_text()


@pytest.mark.parametrize("kind", optim.PAIRS)
def test_bench_compares_what_is_equal(kind, monkeypatch):
    """bench.optim: parity, times of a small case, and none where there is no parity."""
    require("cpu")
    assert optim.parity(kind) < 1e-10
    mine, theirs = optim.times(optim.Training(200, 16, 8, 0.1), kind, 2)
    assert len(mine) == len(theirs) == 2
    assert min(mine + theirs) > 0
    monkeypatch.setattr(optim, "parity", lambda kind: 1e-9)
    with pytest.raises(RuntimeError, match="no times before they agree"):
        optim.measure(kind, (200, 16, 8), None)
