"""The functional: reductions, ignored rows, scales, softmax with bias, stats, topk, autocast, frozen sides, compile."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fused_margin as fm
from fused_margin.backends import cpu
from fused_margin.functional import margin_cross_entropy, topk
from fused_margin.spec import Need

from . import cases, oracle
from .cases import BF16, FP32, FP64, MARGINS, problem
from .conftest import require
from .error_rule import ErrorRule

B, C, D = 12, 30, 16


def inputs(seed=0, batch=B, classes=C, dim=D, dtype=torch.float64):
    x, w, labels = cases.spread(batch, classes, dim, seed)
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), labels


def expected_rows(x, w, labels, head=oracle.Head(oracle.normface), scale=64.0, **options):  # noqa: B008 (a constant)
    scale = scale if isinstance(scale, torch.Tensor) else torch.full((len(x),), scale, dtype=x.dtype)
    return oracle.rows(x, w, labels, head, scale, **options)


def assert_same(got, expected, leaves, tolerance=1e-10):
    """Values, and gradients of every leaf, in float64."""
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    g = torch.linspace(0.5, 1.5, got.numel(), dtype=got.dtype).reshape(got.shape)
    ours, theirs = (torch.autograd.grad(loss, leaves, g, retain_graph=True) for loss in (got, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("ignored", [(), (3,), (0, 5, 11)], ids=["all", "one ignored", "three ignored"])
@pytest.mark.parametrize("ignore_index", [-100, 7])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(backend, reduction, ignore_index, ignored):
    x, w, labels = inputs()
    labels[labels == ignore_index] = 8
    labels[list(ignored)] = ignore_index
    got = margin_cross_entropy(
        x, w, labels, fm.CosFace(0.2), reduction=reduction, ignore_index=ignore_index, backend=backend
    )
    head = oracle.Head(lambda c: oracle.cosface(c, 0.2))
    rows = expected_rows(x, w, labels, head, ignore_index=ignore_index)
    assert_same(got, oracle.reduce(rows, labels, reduction, ignore_index), (x, w))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_other_integer_labels(backend, dtype):
    x, w, labels = inputs()
    got = margin_cross_entropy(x, w, labels.to(dtype), fm.NormFace(), backend=backend)
    torch.testing.assert_close(got, expected_rows(x, w, labels).mean())


@pytest.mark.parametrize("kind", ["sample", "class", "scalar", "bare sample", "bare class"])
def test_scale_tensors(backend, kind):
    x, w, labels = inputs()
    count = {"sample": B, "class": C, "scalar": 1}[kind.split()[-1]]
    scale = torch.linspace(10, 60, count, dtype=torch.float64).reshape(() if kind == "scalar" else (count,))
    scale.requires_grad_()
    given = {"sample": fm.PerSample, "class": fm.PerClass}.get(kind, lambda t: t)(scale)
    at_rows = scale[labels] if "class" in kind else scale.expand(B)
    got = margin_cross_entropy(x, w, labels, fm.ArcFace(0.3), scale=given, reduction="none", backend=backend)
    head = oracle.Head(lambda c: oracle.arcface(c, 0.3))
    assert_same(got, expected_rows(x, w, labels, head, at_rows), (x, w, scale))


def test_a_softmax(backend):
    """|x| as the scale, with its gradient: SphereFace (1704.08063) eq. 7."""
    x, w, labels = inputs()
    x = (10 * x.detach()).requires_grad_()
    got = margin_cross_entropy(x, w, labels, fm.SphereFace(4), scale="norm", reduction="none", backend=backend)
    head = oracle.Head(lambda c: oracle.sphereface(c, 4))
    assert_same(got, expected_rows(x, w, labels, head, x.norm(dim=1)), (x, w))


def test_plain_softmax_with_bias(backend):
    """Without normalisation, scale 1: torch's own linear and cross_entropy."""
    x, w, labels = inputs()
    bias = torch.linspace(-2, 2, C, dtype=torch.float64).requires_grad_()
    labels[2] = -100
    for reduction in ("mean", "sum", "none"):
        got = margin_cross_entropy(
            x, w, labels, fm.NormFace(), scale=1.0, bias=bias, reduction=reduction,
            normalize_embeddings=False, normalize_weight=False, backend=backend,
        )  # fmt: skip
        assert_same(got, F.cross_entropy(F.linear(x, w, bias), labels, reduction=reduction), (x, w, bias))


def test_additive_margin_on_products(backend):
    """AM without normalised embeddings: the margin is subtracted from the product."""
    x, w, labels = inputs()
    got = margin_cross_entropy(
        x, w, labels, fm.CosFace(0.4), scale=1.5, reduction="none", normalize_embeddings=False, backend=backend
    )
    head = oracle.Head(lambda c: oracle.cosface(c, 0.4))
    assert_same(got, expected_rows(x, w, labels, head, 1.5, normalize=(False, True)), (x, w))


@pytest.mark.parametrize("margin", ["arcface_linear", "sv_cosface"])
def test_stats(backend, margin):
    p = problem(MARGINS[margin], FP64, 40, 20, 8)
    p.labels[[4, 9]] = -100
    x, w = p.leaves().values()
    case = MARGINS[margin]
    loss, stats = margin_cross_entropy(
        x, w, p.labels, case.make(case.params), scale=64.0, return_stats=True, reduction="none", backend=backend
    )
    found = oracle.cosines(x, w, p.labels)
    valid = p.labels != -100
    rivals = torch.where(found.rival, found.c, -math.inf).amax(1)
    t = case.target(found.c_y, case.params)
    torch.testing.assert_close(stats.target_cosine, torch.where(valid, found.c_y, 0).detach())
    torch.testing.assert_close(stats.best_rival_cosine[valid], rivals[valid].detach())
    torch.testing.assert_close(stats.lse[valid], (64 * t + loss)[valid].detach())  # loss = lse - z
    correct = valid & (found.c.argmax(1) == p.labels)
    assert int(stats.correct) == int(correct.sum())
    assert 0 < int(stats.correct) < int(valid.sum())
    assert not any(t.requires_grad for t in stats)


@pytest.mark.parametrize("k", [1, 5, 33_000])
def test_topk(k):
    """Across the chunks in which cosines are made."""
    x, w, _ = inputs(batch=4, classes=33_000, dim=8)
    cos, ids = topk(x, w, k)
    expected, expected_ids = oracle.cosines(x, w, torch.zeros(4, dtype=torch.long)).c.detach().topk(k)
    torch.testing.assert_close(cos, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(ids, expected_ids)
    assert not cos.requires_grad


@pytest.mark.parametrize(
    ("k", "expected"), [(0, "an integer, at least 1"), (31, "1 <= k <= 30, the number of classes")]
)
def test_topk_out_of_range(k, expected):
    x, w, _ = inputs()
    with pytest.raises(ValueError, match=f"k = {k}; expected {expected}"):
        topk(x, w, k)


def _autocast_losses(p, backend, dtype):
    leaves = p.leaves()
    with torch.autocast("cpu", dtype=dtype):
        loss = margin_cross_entropy(
            leaves["x"], leaves["w"], p.labels, p.case.make(p.case.params), reduction="none", backend=backend
        )
    assert loss.dtype == torch.float32
    return cases.gradients(p, leaves, loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_compute_dtype(backend, dtype):
    """Under autocast: operands of that dtype and nothing else, so the same numbers as with compute_dtype."""
    p = problem(MARGINS["arcface_linear"], FP32, 128, 300, 64)
    got = _autocast_losses(p, backend, dtype)
    p.mode = FP32._replace(compute=dtype, operands=dtype)
    rule = ErrorRule()
    rule.add_all(got, cases.plain(p), cases.exact(p))
    rule.check()
    for name, t in cases.run(p, backend).items():
        torch.testing.assert_close(got[name], t, rtol=0, atol=0)
    differs = (
        cases.run(p, backend)["loss"]
        != cases.run(problem(MARGINS["arcface_linear"], FP32, 128, 300, 64), backend)["loss"]
    )
    in_float32 = backend == "cpu" and (dtype == torch.float16 or "computed in float32" in cpu.path())
    assert bool(differs.any()) != in_float32


@pytest.mark.parametrize("mode", ["bf16", "fp32"])
def test_the_error_rule_catches_a_margin_wrong_by_0_002(mode):
    """s * 0.002 moves every loss by 0.1; what rounding moves averages out over 1,000 rivals. reduction="none"."""
    rule = ErrorRule()
    p = problem(MARGINS["cosface"], cases.MODES[mode], 128, 1000, 512)
    plain, exact = cases.plain(p), cases.exact(p)
    p.case = p.case._replace(params={"m": 0.352})
    rule.add_all(cases.run(p, "reference"), plain, exact)
    assert any(text.startswith("loss: max") for text in rule.failures())
    assert any(text.startswith("loss: rms") for text in rule.failures())
    assert any(text.startswith("d_w") for text in rule.failures())


@pytest.mark.parametrize("mode", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("wrong", [0.9, 3.0, math.nan])
def test_the_error_rule_catches_single_entries(mode, wrong):
    p = problem(MARGINS["cosface"], mode, 16, 40, 32)
    plain, exact = cases.plain(p), cases.exact(p)
    place = int(exact["d_w"].abs().argmax())
    broken = {n: t.clone() for n, t in plain.items()}
    rule = ErrorRule()
    rule.add_all(broken, plain, exact)
    assert not rule.failures()
    broken["d_w"].view(-1)[place] *= wrong
    rule.add_all(broken, plain, exact)
    assert rule.failures()[0].startswith("d_w: ")


class Calls(TorchDispatchMode):
    """Notes which operators of the library run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fused_margin":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", ["x", "w"])
def test_only_needed_gradients(backend, frozen, monkeypatch):
    x, w, labels = inputs()
    expected = torch.autograd.grad(expected_rows(x, w, labels).mean(), (x, w))
    (x if frozen == "x" else w).requires_grad_(False)
    needs, module = [], fm.backends.BACKENDS[backend]
    backward = module.sweep_backward
    monkeypatch.setattr(module, "sweep_backward", lambda *a: needs.append(a[-1]) or backward(*a))
    margin_cross_entropy(x, w, labels, fm.NormFace(), backend=backend).backward()
    assert needs == [Need.W if frozen == "x" else Need.X]
    got, want = (w.grad, expected[1]) if frozen == "x" else (x.grad, expected[0])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert (x if frozen == "x" else w).grad is None


def test_no_gradient_no_work(backend):
    """Nothing is kept for a backward; without a kernel for the rows, a mask takes the target's cosine first."""
    x, w, labels = inputs()
    with torch.no_grad(), Calls() as calls:
        loss = margin_cross_entropy(x, w, labels, fm.NormFace(), backend=backend)
        sv = margin_cross_entropy(x, w, labels, fm.SVSoftmax(1.2), scale=64.0, backend=backend)
    by_torch = ["sweep", "target_cosine", "sweep"]
    assert calls.names == (["sweep_loss"] * 2 if backend == "cpu" else by_torch)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected_rows(x, w, labels).mean().detach())
    torch.testing.assert_close(sv, expected_rows(x, w, labels, oracle.Head(oracle.normface, 1.2)).mean().detach())
    out = torch.ops.fused_margin.sweep.default
    assert all(t.numel() == 0 for t in _sweep_outputs(out, x, w, labels, backend)[4:])


def _sweep_outputs(op, x, w, labels, backend):
    spec = fm.ops.Spec(compute_dtype=torch.float64, num_classes=C, backend=backend)
    with torch.no_grad():
        return op(x, w, labels, torch.full((B,), 64.0, dtype=x.dtype), None, None, None, x.new_zeros(0), *spec)


def test_second_backward_accumulates_in_place(backend):
    x, w, labels = inputs()
    (expected,) = torch.autograd.grad(expected_rows(x, w, labels).mean(), w)
    margin_cross_entropy(x, w, labels, fm.NormFace(), backend=backend).backward()
    place = w.grad.data_ptr()
    torch.testing.assert_close(w.grad, expected, rtol=1e-10, atol=1e-12)
    margin_cross_entropy(x, w, labels, fm.NormFace(), backend=backend).backward()
    assert w.grad.data_ptr() == place
    torch.testing.assert_close(w.grad, 2 * expected, rtol=1e-10, atol=1e-12)


def test_backward_twice_through_one_graph(backend):
    x, w, labels = inputs()
    loss = margin_cross_entropy(x, w, labels, fm.ArcFace(), backend=backend)
    first, second = (torch.autograd.grad(loss, (x, w), retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_default_backend():
    """The fused one where it can run; else the reference, with a warning that says why. Nothing falls back silently."""
    x, w, labels = inputs(dtype=torch.float32)
    expected = margin_cross_entropy(x, w, labels, fm.CosFace(), backend=require("cpu"))
    assert torch.equal(margin_cross_entropy(x, w, labels, fm.CosFace()), expected)


def test_fallback_warns(monkeypatch):
    monkeypatch.setattr(fm.backends.cpu, "why_not", lambda *_: ["it is Sunday"])
    x, w, labels = inputs(dtype=torch.float32)
    expected = margin_cross_entropy(x, w, labels, fm.CosFace(), backend="reference")
    with pytest.warns(fm.FallbackWarning, match="cpu: it is Sunday"):
        assert torch.equal(margin_cross_entropy(x, w, labels, fm.CosFace()), expected)
    with pytest.raises(ValueError, match="backend='cpu' cannot run this: it is Sunday"):
        margin_cross_entropy(x, w, labels, fm.CosFace(), backend="cpu")


OWN = {
    "lambda": (lambda c: torch.cos(fm.safe_angle(c) + 0.4) - 0.1, lambda c: torch.cos(torch.acos(c) + 0.4) - 0.1),
    "x2": (lambda c: -0.9 * fm.safe_angle(c) ** 2 + 0.65, lambda c: -0.9 * torch.acos(c) ** 2 + 0.65),
    "sine": (lambda c: c - 0.2 * fm.safe_sine(c), lambda c: c - 0.2 * torch.sqrt(1 - c**2)),
}


@pytest.mark.parametrize("name", OWN)
def test_own_margin(backend, name):
    own, plain = OWN[name]
    x, w, labels = inputs()
    assert_same(
        margin_cross_entropy(x, w, labels, own, reduction="none", backend=backend),
        expected_rows(x, w, labels, oracle.Head(plain)),
        (x, w),
    )
    sv = fm.SVSoftmax(1.1, own)
    assert_same(
        margin_cross_entropy(x, w, labels, sv, scale=64.0, reduction="none", backend=backend),
        expected_rows(x, w, labels, oracle.Head(plain, 1.1)),
        (x, w),
    )


def test_own_margin_as_a_class(backend):
    class Quarter(fm.Margin):
        def target(self, cos_y):
            return cos_y - 0.25

    x, w, labels = inputs()
    got = margin_cross_entropy(x, w, labels, Quarter(), reduction="none", backend=backend)
    assert_same(got, expected_rows(x, w, labels, oracle.Head(lambda c: c - 0.25)), (x, w))


def test_gradcheck(backend):
    """Of the whole function, by every tensor that it takes."""
    x, w, labels = inputs(batch=4, classes=6, dim=5)
    scale, m = (torch.full((n,), v, dtype=torch.float64).requires_grad_() for n, v in ((4, 5.0), (6, 0.3)))
    bias = torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()

    def run(x, w, scale, m, bias):
        margin = fm.SVSoftmax(1.2, fm.ArcFace(fm.PerClass(m)))
        return margin_cross_entropy(x, w, labels, margin, scale=fm.PerSample(scale), bias=bias, backend=backend)

    assert torch.autograd.gradcheck(run, (x, w, scale, m, bias), atol=1e-6, rtol=1e-5)


COMPILED = {
    "normface": lambda x, w, y, m, **k: margin_cross_entropy(x, w, y, fm.NormFace(), **k),
    "arcface per class": lambda x, w, y, m, **k: margin_cross_entropy(x, w, y, fm.ArcFace(fm.PerClass(m)), **k),
    "sv": lambda x, w, y, m, **k: margin_cross_entropy(x, w, y, fm.SVSoftmax(1.2, fm.CosFace(0.2)), **k),
    "a-softmax": lambda x, w, y, m, **k: margin_cross_entropy(x, w, y, fm.SphereFace(3), scale="norm", **k),
    "own": lambda x, w, y, m, **k: margin_cross_entropy(x, w, y, lambda c: torch.cos(fm.safe_angle(c) + 0.3), **k),
    "bias": lambda x, w, y, m, **k: margin_cross_entropy(x, w, y, fm.CosFace(0.1), bias=m, reduction="none", **k).sum(),
    "stats": lambda x, w, y, m, **k: sum(
        t.sum()
        for t in (lambda r: (r[0], r[1].lse))(margin_cross_entropy(x, w, y, fm.ArcFace(), return_stats=True, **k))
    ),
}


def _compare_compiled(function, compiler, backend):
    torch.compiler.reset()
    x, w, labels = inputs(dtype=torch.float32)
    labels[1] = -100
    m = torch.linspace(0.1, 0.5, C).requires_grad_()
    results = []
    for run in (function, torch.compile(function, backend=compiler, fullgraph=True)):
        loss = run(x, w, labels, m, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, (x, w, m), allow_unused=True)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", COMPILED)
def test_compile(backend, name):
    _compare_compiled(COMPILED[name], "aot_eager", backend)


def test_compile_inductor(backend):
    _compare_compiled(COMPILED["arcface per class"], "inductor", backend)
