"""RowSGD and RowAdamW against torch.optim: on all rows as they are, on sampled rows with an optimizer for each row."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fused_margin as fm
from fused_margin import update_rules
from fused_margin.backends import BACKENDS
from fused_margin.update_rules import State, Update

from .conftest import require
from .error_rule import ErrorRule

SGD = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True},
    {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.02},
]
ADAMW = [{}, {"betas": (0.7, 0.95), "eps": 1e-3, "weight_decay": 0.3}]
CHOICES = [(fm.optim.RowSGD, torch.optim.SGD, {"lr": 0.1} | o) for o in SGD] + [
    (fm.optim.RowAdamW, torch.optim.AdamW, {"lr": 0.01} | o) for o in ADAMW
]
NAMES = [f"{ours.__name__}-{'-'.join(options)}" for ours, _, options in CHOICES]
choices = pytest.mark.parametrize("choice", CHOICES, ids=NAMES)


@pytest.fixture(params=["cpu", "reference"])
def path(request, monkeypatch):
    """The kernel, and plain PyTorch, which is what runs without it."""
    if request.param == "cpu":
        require("cpu")
    else:
        monkeypatch.setattr(BACKENDS["cpu"], "why_not", lambda *_: ["not wanted here"])
        monkeypatch.setattr(update_rules, "_CHUNK", 100)  # several chunks
    return request.param


def sparse(rows: torch.Tensor, values: torch.Tensor, shape, coalesced=True) -> torch.Tensor:
    made = torch.sparse_coo_tensor(rows[None], values, shape, check_invariants=True)
    return made.coalesce() if coalesced else made


def draw(steps=5, rows=23, dim=19, dtype=torch.float64, seed=0):
    """A weight, and for each step rows with their gradients."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, dim, generator=g, dtype=torch.float64).to(dtype)
    found = []
    for _ in range(steps):
        chosen = torch.randperm(rows, generator=g)[: rows // 3].sort().values
        found.append((chosen, torch.randn(len(chosen), dim, generator=g, dtype=torch.float64).to(dtype)))
    return w, found


def row_by_row(make, w, found, options):
    """Each row as a parameter of its own with an optimizer of its own."""
    alone = [nn.Parameter(row.clone()) for row in w]
    optimizers = [make([row], **options) for row in alone]
    for rows, values in found:
        for r, value in zip(rows.tolist(), values, strict=True):
            alone[r].grad = value.clone()
            optimizers[r].step()
    return torch.stack([row.detach() for row in alone])


@choices
def test_sampled_rows(path, choice):
    ours, theirs, options = choice
    w, found = draw()
    p = nn.Parameter(w.clone())
    optimizer = ours([p], **options)
    for rows, values in found:
        before = p.detach().clone()
        p.grad = sparse(rows, values, w.shape)
        optimizer.step()
        others = torch.ones(len(w), dtype=torch.bool)
        others[rows] = False
        assert torch.equal(p[others], before[others])
    torch.testing.assert_close(p.detach(), row_by_row(theirs, w, found, options), rtol=1e-12, atol=1e-13)


@choices
@pytest.mark.parametrize("kind", ["sparse", "dense", "uncoalesced"])
def test_all_rows_are_the_dense_optimizer(path, choice, kind):
    ours, theirs, options = choice
    w, _ = draw()
    g = torch.Generator().manual_seed(1)
    p, q = nn.Parameter(w.clone()), nn.Parameter(w.clone())
    mine, dense = ours([p], **options), theirs([q], **options)
    everyone = torch.arange(len(w))
    for _ in range(4):
        grad = torch.randn(w.shape, generator=g, dtype=w.dtype)
        q.grad = grad.clone()
        if kind == "dense":
            p.grad = grad
        elif kind == "sparse":
            p.grad = sparse(everyone, grad, w.shape)
        else:
            twice = torch.cat([everyone.flip(0), everyone]), torch.cat([2 * grad.flip(0), -grad])
            p.grad = sparse(*twice, w.shape, False)
        dense.step(), mine.step()
    torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-13)


@choices
def test_float32(path, choice):
    """Under the error rule, of the way that the weights have gone."""
    ours, theirs, options = choice
    rule = ErrorRule()
    for seed in range(4):
        w, found = draw(8, dtype=torch.float32, seed=seed)
        p = nn.Parameter(w.clone())
        optimizer = ours([p], **options)
        for rows, values in found:
            p.grad = sparse(rows, values, w.shape)
            optimizer.step()
        plain = row_by_row(theirs, w, found, options) - w
        exact = row_by_row(theirs, w.double(), [(r, v.double()) for r, v in found], options) - w.double()
        rule.add("moved", p.detach() - w, plain, exact)
    rule.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@choices
def test_16_bit_weights(path, choice, dtype):
    """State in float32; after each step the weight is rounded to nearest, and so it goes into the next."""
    ours, theirs, options = choice
    w, found = draw(6, dtype=dtype)
    p, q = nn.Parameter(w.clone()), nn.Parameter(w.float())
    optimizer, other = ours([p], **options), theirs([q], **options)
    everyone = torch.arange(len(w))
    for _, values in found:
        grad = values.repeat(4, 1)[: len(w)]
        p.grad = sparse(everyone, grad, w.shape)
        q.grad = grad.float()
        optimizer.step(), other.step()
        q.data = q.data.to(dtype).float()
    wrong = (p.detach().float() != q.detach()).float().mean()
    assert wrong < 0.01, f"{wrong:.1%} of the numbers differ"  # an arithmetic in another order rounds a few otherwise
    torch.testing.assert_close(p.detach().float(), q.detach(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    state = [t for t in optimizer.state[p].values() if t.dim() == 2]
    assert all(t.dtype == torch.float32 for t in state)


def test_kernel_and_plain_pytorch_are_one_rule():
    require("cpu")
    w, found = draw(rows=300, dim=33)
    states = [State(torch.rand_like(w), torch.rand_like(w), torch.arange(300.0) % 5) for _ in range(2)]
    states[1] = State(*(t.clone() for t in states[0]))
    both = [w.clone(), w.clone()]
    for rows, values in found:
        for update in (
            Update("adamw", 0.01, 0.1),
            Update("sgd", 0.1, 0.1, 0.9, 0.2),
            Update("sgd", 0.1, 0.1, 0.9, nesterov=True),
        ):
            for name, at, state in zip(("cpu", "reference"), both, states, strict=True):
                torch.ops.fused_margin.update_rows(at, *state, rows, values, *update, name)
            for a, b in zip((both[0], *states[0]), (both[1], *states[1]), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_gradients_of_an_embedding(path):
    """As nn.Embedding(sparse=True) gives them, over two backward passes."""
    torch.manual_seed(0)
    table, twin = (nn.Embedding(50, 8, sparse=s, dtype=torch.float64) for s in (True, False))
    twin.load_state_dict(table.state_dict())
    mine, dense = fm.optim.RowSGD(table.parameters(), lr=0.3), torch.optim.SGD(twin.parameters(), lr=0.3)
    for step in range(3):
        for part in range(2):
            ids = torch.tensor([3, 7, 3, 41 - step, 7 * part])
            for t in (table, twin):
                t(ids).square().sum().backward()
        for o in (mine, dense):
            o.step(), o.zero_grad()
    torch.testing.assert_close(table.weight, twin.weight, rtol=1e-13, atol=0)


def test_other_shapes_and_strides(path):
    """0 to 3 dimensions, no rows, and a transposed weight."""
    g = torch.Generator().manual_seed(0)
    shapes = [(), (5,), (4, 3, 2), (0, 3), (6, 0)]
    parameters = [nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64)) for s in shapes]
    parameters.append(nn.Parameter(torch.randn(7, 4, generator=g, dtype=torch.float64).T))
    twins = [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in parameters]
    mine = fm.optim.RowAdamW(parameters, lr=0.1)
    dense = torch.optim.AdamW(twins, lr=0.1)
    for _ in range(3):
        for p, q in zip(parameters, twins, strict=True):
            p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
            q.grad = p.grad.clone()
        mine.step(), dense.step()
    for p, q in zip(parameters, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_same_bits_at_any_thread_count():
    require("cpu")
    w, found = draw(rows=1001, dim=70, dtype=torch.float32)
    results = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        p = nn.Parameter(w.clone())
        optimizer = fm.optim.RowAdamW([p])
        for rows, values in found:
            p.grad = sparse(rows, values, w.shape)
            optimizer.step()
        results.append(p.detach())
    assert all(torch.equal(r, results[0]) for r in results)


CHILD = """
import json, sys
import torch
import fused_margin as fm

def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))

torch.set_num_threads(2)
rows = torch.arange(0, 200_000, 100)
values = torch.randn(len(rows), 64)
peaks = {}
for name in ("RowSGD", "RowAdamW"):
    w = torch.nn.Parameter(torch.randn(200_000, 64))
    optimizer = getattr(fm.optim, name)([w], lr=0.1, **({"momentum": 0.9} if name == "RowSGD" else {}))
    for kind in ("first", "sparse", "dense"):
        w.grad = torch.sparse_coo_tensor(rows[None], values, w.shape, is_coalesced=True, check_invariants=True)
        if kind == "dense":
            w.grad = torch.randn_like(w)
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
        before = status("VmRSS")
        optimizer.step()
        peaks[f"{name} {kind}"] = status("VmHWM") - before
print(json.dumps(peaks))
"""


def test_no_temporary_of_the_weights_size():
    """They are 49 MiB, and so is each state that a first step makes; other steps take next to nothing."""
    require("cpu")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from /proc, which this system lacks")
    run = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    peaks = json.loads(run.stdout)
    assert len(peaks) == 6
    for name, peak in peaks.items():
        assert peak < (6 if "first" not in name else 110) * 2**20, f"{name}: {peak / 2**20:.1f} MiB"


def test_opcheck():
    w, found = draw(dtype=torch.float32)
    rows, values = found[0]
    state = State(torch.zeros_like(w), torch.zeros_like(w), torch.zeros(len(w)))
    for update, backend in itertools.product(
        (Update("sgd", 0.1, 0.0, 0.9), Update("adamw", 0.1)), ("cpu", "reference")
    ):
        if fm.why_not(backend):
            continue
        arguments = (w.clone(), *(t.clone() for t in state), rows, values, *update, backend)
        torch.library.opcheck(torch.ops.fused_margin.update_rows.default, arguments)


def test_weights_that_a_step_changed_are_not_differentiated(path):
    """Its version moves, so that autograd notices a backward through old values."""
    p = nn.Parameter(torch.randn(3, 2))
    loss = p.square().sum()
    p.grad = torch.ones(3, 2)
    fm.optim.RowSGD([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
