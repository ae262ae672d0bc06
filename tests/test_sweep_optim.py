"""SweepSGD and SweepAdamW: the way of the weights is that of the dense gradient and torch.optim, typed in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_margin as fm
from fused_margin.backends import cpu
from fused_margin.update_rules import State, Update

from . import oracle
from .cases import MARGINS, MODES, problem, spread
from .conftest import require
from .error_rule import ErrorRule

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SGD = {"lr": 0.5, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}
CHOICES = {
    "sgd": (fm.optim.SweepSGD, torch.optim.SGD, {"lr": 0.5}),
    "momentum": (fm.optim.SweepSGD, torch.optim.SGD, SGD),
    "dampening": (fm.optim.SweepSGD, torch.optim.SGD, {"lr": 0.5, "momentum": 0.8, "dampening": 0.3}),
    "adamw": (fm.optim.SweepAdamW, torch.optim.AdamW, {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-2}),
}
choices = pytest.mark.parametrize("choice", CHOICES)
STEPS = 3


def train(optimizer, w, steps):
    """What is in `steps` is called with w, and gives a loss for each backward pass of the step."""
    for losses in steps:
        optimizer.zero_grad()
        for loss in losses:
            loss(w).backward()
        optimizer.step()
    return w.detach()


def moved(make, w, steps, dtype=None):
    """How far the weights have gone."""
    p = nn.Parameter(w.detach().to(dtype or w.dtype).clone())
    return train(make([p]), p, steps) - w.detach().to(p.dtype)


def compare(rule, choice, ours, exact, plain, w, mode):
    """Adds a training by the library and by the oracle to the error rule."""
    sweep, dense, options = CHOICES[choice]
    got = moved(lambda p: sweep(p, **options), w, ours)
    want = moved(lambda p: dense(p, **options), w, exact, torch.float64)
    other = None if mode.x == torch.float64 else moved(lambda p: dense(p, **options), w, plain)
    rule.add(choice, got, other, want)


def losses(p, backend):
    """Of one batch as functions of w: the library's, the oracle's in float64, and plain PyTorch's."""
    x, upstream = p.tensors["x"], p.upstream
    params = dict(p.case.params)
    head = p.case.head(params)

    def library(w):
        loss = fm.margin_cross_entropy(
            x, w, p.labels, p.case.make(params), scale=16.0, reduction="none", compute_dtype=p.mode.compute,
            backend=backend, **p.options,
        )  # fmt: skip
        return (loss * upstream.to(loss.dtype)).sum()

    def dense(dtype, operands):
        def loss(w):
            at = x.to(dtype) if dtype else x
            acc = torch.float64 if at.dtype == torch.float64 else torch.float32
            scale = torch.full((len(at),), 16.0, dtype=acc)
            rows = oracle.rows(at, w, p.labels, head, scale, None, operands=operands, **p.options)
            return (rows * upstream.to(rows.dtype)).sum()

        return loss

    return library, dense(torch.float64, None), dense(None, p.mode.operands)


def steps_of(problems, backend, passes=1):
    """Three lists of steps, each of `passes` batches."""
    kinds = zip(*(losses(p, backend) for p in problems), strict=True)
    return tuple([list(kind[i : i + passes]) for i in range(0, len(kind), passes)] for kind in kinds)


@choices
@pytest.mark.parametrize("margin", ["arcface_linear", "sv_cosface", "cosface", "sphereface_detached"])
def test_float64(backend, margin, choice):
    problems = [problem(MARGINS[margin], MODES["fp64"], 21, 150, 20, seed) for seed in range(STEPS)]
    rule = ErrorRule()
    compare(rule, choice, *steps_of(problems, backend), problems[0].tensors["w"], MODES["fp64"])
    rule.check()


@choices
@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp32_as_bf16"])
@pytest.mark.parametrize("shape", [(40, 300, 64), (600, 97, 33)], ids=["B40", "B600"])
def test_float32_weights(backend, mode, choice, shape):
    """Under the error rule, 16-bit operands too; 600 rows are two blocks of the kernel.

    AdamW divides by the gradient's size: where that is nearly 0 a single element decides the largest error, plain
    PyTorch's too (0.06 to 0.34 of the largest step from draw to draw in bfloat16). So many draws are taken as one.
    """
    rule = ErrorRule()
    for seed in range(8):
        problems = [
            problem(MARGINS["cosface"], MODES[mode], *shape, seed=10 * seed + k)
            for k in range(1 if shape[0] > 99 else 2)
        ]
        compare(rule, choice, *steps_of(problems, backend), problems[0].tensors["w"], MODES[mode])
    rule.check()


@choices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights(backend, choice, dtype):
    """As float32 arithmetic on the same values, rounded to nearest after each step; state stays in float32."""
    sweep, dense, options = CHOICES[choice]
    x, w, labels = spread(30, 90, 40, 0)
    x, w = x.to(dtype), w.to(dtype)
    p, q = nn.Parameter(w.clone()), nn.Parameter(w.float())
    optimizer, other = sweep([p], **options), dense([q], **options)
    for _ in range(STEPS):
        for at, o in ((p, optimizer), (q, other)):
            o.zero_grad()
            inputs = x if at is p else x.float()
            fm.margin_cross_entropy(
                inputs, at, labels, fm.CosFace(), scale=16.0, compute_dtype=torch.float32, backend=backend
            ).backward()
            o.step()
        q.data = q.data.to(dtype).float()
    assert p.dtype == dtype
    assert (p.float() != q).float().mean() < 0.01  # an arithmetic in another order rounds a few otherwise
    torch.testing.assert_close(p.detach().float(), q.detach(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert all(t.dtype == torch.float32 for t in optimizer.state[p].values())


@pytest.mark.parametrize("choice", ["momentum", "adamw"])
def test_accumulation(backend, choice):
    """Three backward passes a step, of 21, 5 and 1 rows, are one bigger batch."""
    problems = [
        problem(MARGINS["sv_arcface"], MODES["fp64"], batch, 150, 20, seed) for seed in range(2) for batch in (21, 5, 6)
    ]
    rule = ErrorRule()
    compare(rule, choice, *steps_of(problems, backend, 3), problems[0].tensors["w"], MODES["fp64"])
    rule.check()


def head(margin=None, classes=60, dim=12, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    made = fm.MarginHead(dim, classes, margin or fm.ArcFace(0.4), dtype=dtype, **{"scale": 16.0} | options)
    with torch.no_grad():
        made.weight.normal_(std=0.3)
    return made


def batch(rows=14, classes=60, dim=12, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=g, dtype=dtype), torch.randint(classes, (rows,), generator=g)


def twins(**options):
    first = head(**options)
    return first, copy.deepcopy(first)


def test_calls_that_move_a_rule_between_them(backend):
    """CurricularFace's t, a different scale and a bias: rows of one step with other arguments of the kernel."""
    for options in ({"margin": fm.CurricularFace()}, {"margin": fm.NormFace(), "bias": True}):
        ours, theirs = twins(**options, backend=backend)
        mine, dense = fm.optim.SweepSGD([ours.weight], **SGD), torch.optim.SGD([theirs.weight], **SGD)
        rest = [torch.optim.SGD([h.bias], lr=1.0) if h.bias is not None else None for h in (ours, theirs)]
        for step in range(2):
            for h, optimizer, other in ((ours, mine, rest[0]), (theirs, dense, rest[1])):
                h.zero_grad()
                for part in range(3):
                    h.scale = 16.0 + part
                    h(*batch(seed=10 * step + part)).backward()
                    if other is not None:
                        other.step()  # before the sweep: it must not see the new bias
                optimizer.step()
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-10, atol=1e-12)
        if ours.bias is not None:
            torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-10, atol=1e-12)


def test_two_heads_share_a_weight(backend):
    """Two margins on one weight, in one loss and in two backward passes."""
    ours, theirs = twins(backend=backend)
    mine, dense = fm.optim.SweepAdamW([ours.weight], lr=0.01), torch.optim.AdamW([theirs.weight], lr=0.01)
    for h, optimizer in ((ours, mine), (theirs, dense)):
        second = head(fm.CosFace(0.2), scale=9.0, backend=backend)
        second.weight = h.weight
        (h(*batch()) + 2 * second(*batch(9, seed=1))).backward()
        second(*batch(3, seed=2)).backward()
        optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("centers", [1, 3])
def test_other_parameters_learn_in_the_same_training(backend, centers):
    """Embeddings, bias and a learnable scale get the gradients they had, whatever the weight's optimizer."""
    results = []
    for sweep in (True, False):
        bias = {"bias": True} if centers == 1 else {"sub_centers": centers}
        h = head(fm.CosFace(0.2), scale=nn.Parameter(torch.tensor(16.0, dtype=torch.float64)), backend=backend, **bias)
        backbone = nn.Linear(12, 12, dtype=torch.float64)
        others = [*backbone.parameters(), h.scale] + ([h.bias] if h.bias is not None else [])
        kind = fm.optim.SweepSGD if sweep else torch.optim.SGD
        optimizers = [torch.optim.Adam(others, lr=0.01), kind([h.weight], **SGD)]
        for step in range(3):
            x, labels = batch(seed=step)
            for optimizer in optimizers:
                optimizer.zero_grad()
            h(backbone(x), labels).backward()
            for optimizer in optimizers:
                optimizer.step()
        results.append([p.detach() for p in [h.weight, *others]])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def subset_loss(w, x, labels, index, backend, centers=1):
    """NormFace on the classes that `index` holds; labels count in it."""
    from fused_margin import ops
    from fused_margin.rules import IDENTITY
    from fused_margin.spec import Spec, Want

    rows = (index[:, None] * centers + torch.arange(centers)).flatten()
    spec = Spec(compute_dtype=x.dtype, num_classes=len(index), want=int(Want.DX), backend=backend, sub_centers=centers)
    scale = torch.full((len(x),), 16.0, dtype=x.dtype)
    red, cos_y, *_ = ops.sweep(x, w, labels, scale, None, None, rows, IDENTITY.tensor(x), spec)
    return F.softplus(red - 16 * cos_y).sum()


@choices
@pytest.mark.parametrize("centers", [1, 2])
def test_sampled_classes(backend, choice, centers):
    """Only rows of the sample move, as with RowSGD; with sub-centres the parameter may hold a class a row."""
    sweep, dense, options = CHOICES[choice]
    g = torch.Generator().manual_seed(3)
    w = torch.randn(50, centers * 12, generator=g, dtype=torch.float64)
    p, alone = nn.Parameter(w.clone()), [nn.Parameter(row.clone()) for row in w]
    optimizer, single = sweep([p], **options), [dense([row], **options) for row in alone]
    for _ in range(4):
        index = torch.randperm(50, generator=g)[:20].sort().values
        x = torch.randn(9, 12, generator=g, dtype=torch.float64)
        labels = torch.randint(20, (9,), generator=g)
        before = p.detach().clone()
        for row in alone:
            row.grad = None
        optimizer.zero_grad()
        subset_loss(p.view(-1, 12), x, labels, index, backend, centers).backward()
        optimizer.step()
        chosen = torch.stack([alone[i] for i in index.tolist()])
        c = F.normalize(x) @ F.normalize(chosen.view(-1, 12)).T
        F.cross_entropy(16 * c.view(9, 20, centers).amax(2), labels, reduction="sum").backward()
        for i in index.tolist():
            single[i].step()
        others = torch.ones(50, dtype=torch.bool)
        others[index] = False
        assert torch.equal(p[others], before[others])
    torch.testing.assert_close(p.detach(), torch.stack(list(alone)).detach(), rtol=1e-9, atol=1e-11)
    if "step" in optimizer.state[p]:
        assert optimizer.state[p]["step"].shape == (50,)
        assert optimizer.state[p]["step"].max() <= 4


def test_samples_must_be_alike_and_rising(backend):
    w = nn.Parameter(torch.randn(9, 4, dtype=torch.float64))
    optimizer = fm.optim.SweepSGD([w])
    x, labels = torch.randn(2, 4, dtype=torch.float64), torch.tensor([0, 1])
    for index in (torch.tensor([0, 3]), torch.tensor([0, 4])):
        subset_loss(w, x, labels, index, backend).backward()
    with pytest.raises(RuntimeError, match="different sampled classes"):
        optimizer.step()
    optimizer.zero_grad()
    subset_loss(w, x, labels, torch.tensor([3, 3]), backend).backward()
    with pytest.raises(RuntimeError, match="rows to update must rise"):
        optimizer.step()


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(backend, rows):
    """An empty batch still decays; among others it changes nothing."""
    ours, theirs = twins(backend=backend)
    mine, dense = fm.optim.SweepSGD([ours.weight], **SGD), torch.optim.SGD([theirs.weight], **SGD)
    for passes in ((0,), (rows, 7), (7, rows)):
        for h, optimizer in ((ours, mine), (theirs, dense)):
            optimizer.zero_grad()
            for count in passes:
                h(*batch(count)).backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16_weight"])
@pytest.mark.parametrize("name", ["SweepSGD", "SweepAdamW"])
def test_same_bits_at_any_thread_count(name, mode):
    require("cpu")
    problems = [problem(MARGINS["sv_cosface"], MODES[mode], b, 2003, 65, 0) for b in (300, 7)]
    results = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        p = nn.Parameter(problems[0].tensors["w"].clone())
        optimizer = getattr(fm.optim, name)([p], lr=0.1)
        results.append(train(optimizer, p, [[losses(q, "cpu")[0] for q in problems]] * 2))
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("capability", cpu.CAPABILITIES)
def test_every_instruction_set(capability):
    require("cpu")
    try:
        block = cpu.capability(capability)
        block.__enter__()
    except ValueError as error:
        pytest.skip(str(error))
    try:
        for choice in ("momentum", "adamw"):
            rule = ErrorRule()
            for seed in range(2):
                problems = [
                    problem(MARGINS["arcface_linear"], MODES["fp32"], 40, 150, 44, 10 * seed + k) for k in range(2)
                ]
                compare(rule, choice, *steps_of(problems, "cpu"), problems[0].tensors["w"], MODES["fp32"])
            rule.check()
    finally:
        block.__exit__(None, None, None)


def test_non_contiguous_weight(backend):
    x, w, labels = spread(20, 40, 12, 0)
    p, q = nn.Parameter(w.T.contiguous().T), nn.Parameter(w.clone())
    for t, optimizer in ((p, fm.optim.SweepSGD([p], **SGD)), (q, torch.optim.SGD([q], **SGD))):
        for _ in range(2):
            optimizer.zero_grad()
            fm.margin_cross_entropy(x, t, labels, fm.ArcFace(), scale=16.0, backend=backend).backward()
            optimizer.step()
    torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_opcheck():
    """Not of the reference, which uses autograd inside: opcheck turns that off."""
    require("cpu")
    h = head(dtype=torch.float32, backend="cpu")
    optimizer = fm.optim.SweepSGD([h.weight], lr=0.1)
    h(*batch(dtype=torch.float32)).backward()
    data = h.weight.grad.calls[0]
    lists = [[t] if t is not None else [] for t in data.call]
    w = h.weight.detach().clone()
    state = State(torch.zeros_like(w), torch.zeros_like(w), torch.zeros(len(w)))
    for update in (Update("sgd", 0.1, 0.0, 0.9), Update("adamw", 0.1)):
        torch.library.opcheck(torch.ops.fused_margin.sweep_step.default, (w, *state, None, *lists, *data.spec, *update))
    del optimizer
