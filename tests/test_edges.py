"""Edges: bad input and what its message says; empty, ignored, zero, huge and tiny rows; +-1, inf, nan; odd strides."""

import math

import pytest
import torch

import fused_margin as fm
from fused_margin.functional import margin_cross_entropy

from . import cases, oracle
from .cases import FP32, FP64, MARGINS, MODES, problem
from .error_rule import ErrorRule

pytestmark = pytest.mark.usefixtures("poisoned_memory")

X, W, Y = torch.zeros(4, 8), torch.ones(5, 8), torch.tensor([0, 1, 2, 3])

BAD = {  # what is changed, the error, and what it must say: what was got, what is expected, what to do
    "rank of x": ({"embeddings": X[0]}, ValueError, ["embeddings have shape [8]", "expected two dimensions, [B, D]"]),
    "rank of w": (
        {"weight": W[None]},
        ValueError,
        ["weight", "have shape [1, 5, 8]", "expected two dimensions, [C, D]"],
    ),
    "other D": ({"weight": W[:, :7]}, ValueError, ["[4, 8]", "[5, 7]", "expected [B, D] and [C, D]"]),
    "transposed": ({"weight": torch.ones(8, 5)}, ValueError, ["[8, 5]", "weight seems to be [D, C]: pass weight.T"]),
    "no class": ({"weight": W[:0]}, ValueError, ["shape [0, 8]", "at least one class"]),
    "no dimension": ({"embeddings": X[:, :0], "weight": W[:, :0]}, ValueError, ["[5, 0]", "one dimension"]),
    "int x": ({"embeddings": X.long()}, TypeError, ["embeddings are torch.int64", "expected float32", ".float()"]),
    "complex x": ({"embeddings": X.cfloat()}, TypeError, ["embeddings are torch.complex64", "expected float32"]),
    "int w": ({"weight": W.int()}, TypeError, ["weight", "are torch.int32", "expected float32"]),
    "float64 x": ({"embeddings": X.double()}, TypeError, ["torch.float64", "torch.float32", "convert one of them"]),
    "float labels": (
        {"labels": Y.float()},
        TypeError,
        ["labels are torch.float32", "expected integers", "labels.long()"],
    ),
    "bool labels": ({"labels": Y > 1}, TypeError, ["labels are torch.bool", "expected integers"]),
    "mixup": (
        {"labels": torch.rand(4, 5)},
        TypeError,
        ["a matrix [4, 5] of torch.float32", "class numbers [B]", "lam * loss(e, a) + (1 - lam) * loss(e, b)"],
    ),
    "one-hot": (
        {"labels": torch.eye(5).long()[:4]},
        ValueError,
        ["shape [4, 5]", "expected [4], one a row", "labels.argmax(1)"],
    ),
    "column": ({"labels": Y[:, None]}, ValueError, ["shape [4, 1]", "expected [4]", "labels.squeeze(1)"]),
    "few labels": ({"labels": Y[:3]}, ValueError, ["shape [3]", "expected [4]"]),
    "device of w": ({"weight": W.to("meta")}, ValueError, ["weight on meta", "embeddings on cpu", "weight.to("]),
    "device of labels": ({"labels": Y.to("meta")}, ValueError, ["labels on meta", "embeddings on cpu", "labels.to("]),
    "sparse x": ({"embeddings": X.to_sparse()}, TypeError, ["a torch.sparse_coo tensor", "embeddings.to_dense()"]),
    "sparse w": ({"weight": W.to_sparse()}, TypeError, ["weight are a torch.sparse_coo", "weight.to_dense()"]),
    "nested x": (
        {"embeddings": torch.nested.nested_tensor([X[:1], X[1:]], layout=torch.jagged)},
        TypeError,
        ["embeddings are a nested tensor", "expected a dense one"],
    ),
    "flag": ({"normalize_weight": "no"}, TypeError, ["normalize_weight = 'no'", "expected True or False"]),
    "ignore_index": ({"ignore_index": 2**70}, TypeError, ["ignore_index = 118", "an integer of 64 bits"]),
    "no smoothing": ({"label_smoothing": None}, TypeError, ["label_smoothing: got None", "expected a plain number"]),
    "bias": ({"bias": torch.zeros(4)}, ValueError, ["bias is torch.float32 [4]", "expected floats [5], one a class"]),
    "int bias": ({"bias": torch.zeros(5).int()}, ValueError, ["bias is torch.int32", "expected floats [5]"]),
    "scale 0": ({"scale": 0.0}, ValueError, ["scale = 0.0", "expected a positive finite number, a tensor, or 'norm'"]),
    "negative scale": ({"scale": -64}, ValueError, ["scale = -64", "expected a positive finite number"]),
    "nan scale": ({"scale": math.nan}, ValueError, ["scale = nan", "expected a positive finite number"]),
    "scale of no kind": (
        {"scale": [64]},
        TypeError,
        ["scale = [64]", "expected a positive number, a tensor, 'norm', or None for the margin's own"],
    ),
    "scale rule as a class": ({"scale": fm.AdaCos}, TypeError, ["AdaCos", "pass an instance, as in AdaCos(num_cl"]),
    "scale by name": ({"scale": "auto"}, ValueError, ["scale = 'auto'", "a tensor, or 'norm'"]),
    "many scales": (
        {"scale": torch.ones(7)},
        ValueError,
        ["scale: got a tensor of shape [7]", "[5] values", "[4] values"],
    ),
    "many margins": ({"margin": fm.CosFace(torch.ones(7))}, ValueError, ["m: got a tensor of shape [7]", "[5] values"]),
    "reduction": ({"reduction": "avg"}, ValueError, ["reduction = 'avg'", "expected one of 'mean', 'sum', 'none'"]),
    "backend": (
        {"backend": "gpu"},
        ValueError,
        ["backend='gpu' cannot run this", "there is no backend 'gpu'", "Backends: cpu:", "reference: can run"],
    ),
    "compute dtype": ({"compute_dtype": torch.int8}, ValueError, ["compute_dtype = torch.int8", "torch.bfloat16"]),
    "compute dtype by name": ({"compute_dtype": "bf16"}, ValueError, ["compute_dtype = 'bf16'", "torch.bfloat16"]),
    "compute in float64": ({"compute_dtype": torch.float64}, ValueError, ["torch.float64 with torch.float32 emb"]),
    "compute in float32": (
        {"embeddings": X.double(), "weight": W.double(), "compute_dtype": torch.float32},
        ValueError,
        ["compute_dtype = torch.float32 with float64 embeddings", "expected None or torch.float64"],
    ),
    "angles without norms": (
        {"margin": fm.ArcFace(), "normalize_weight": False},
        ValueError,
        ["ArcFace is a margin on angles", "needs normalize_embeddings and normalize_weight"],
    ),
    "own margin's shape": (
        {"margin": lambda c: c.sum()},
        ValueError,
        ["target() gave a tensor of shape []", "expected a tensor [4], one value a row"],
    ),
    "own margin's type": ({"margin": lambda c: 1.0}, ValueError, ["target() gave float", "expected a tensor [4]"]),
}


def call(backend=None, **changes):
    given = {"embeddings": X, "weight": W, "labels": Y, "margin": fm.NormFace(), "backend": backend} | changes
    return margin_cross_entropy(**given)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(backend, name):
    changes, error, parts = BAD[name]
    with pytest.raises(error) as caught:
        call(**{"backend": backend} | changes)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("margin", [fm.NormFace(), fm.SVSoftmax(), fm.CosFace(fm.PerClass(torch.ones(5)))])
@pytest.mark.parametrize(("row", "value"), [(0, 5), (2, -1), (3, 10**12)])
def test_label_out_of_range(backend, row, value, margin):
    labels = Y.clone()
    labels[row] = value
    with pytest.raises(RuntimeError) as caught:
        call(backend, labels=labels, margin=margin)
    message = f"labels[{row}] = {value} is outside [0, 5) and is not ignore_index = -100"
    assert message in str(caught.value)


@pytest.mark.parametrize("rows", [0, 4], ids=["empty batch", "all ignored"])
@pytest.mark.parametrize(("reduction", "expected"), [("mean", 0.0), ("sum", 0.0), ("none", None)])
@pytest.mark.parametrize("margin", ["arcface_linear", "sv"])
def test_no_row_counts(backend, margin, reduction, expected, rows):
    """The loss is 0 and so are the gradients (F.cross_entropy's mean is nan here)."""
    x, w = torch.randn(rows, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    labels = torch.full((rows,), -100)
    case = MARGINS[margin]
    loss, stats = margin_cross_entropy(
        x, w, labels, case.make(case.params), reduction=reduction, return_stats=True, backend=backend
    )
    torch.testing.assert_close(loss, torch.zeros(rows) if expected is None else torch.tensor(expected))
    assert int(stats.correct) == 0
    loss.sum().backward()
    torch.testing.assert_close(x.grad, torch.zeros_like(x))
    torch.testing.assert_close(w.grad, torch.zeros_like(w))


def _by_rows(found, exact):
    """Each row relative to its own largest entry, as rows differ by powers of ten."""
    return {n: t.double() / exact[n].abs().amax(-1, keepdim=True) for n, t in found.items() if t.dim() == 2}


NORMS = {
    "zero": [0, 1, 0, 1],
    "tiny": [1e-18, 1e-13, 1e-11, 1e-6],
    "huge": [1e6, 1e12, 1e17, 1e18],
    "mixed": [1e-18, 1e18, 0, 1],
}


@pytest.mark.parametrize("side", ["x", "w"])
@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("mode", ["fp64", "fp32", "fp32_as_bf16"])
@pytest.mark.parametrize("dim", [24, 150])  # less than the sums of a kernel take at once, and more
def test_norms(backend, dim, mode, norms, side):
    """As F.normalize with eps = 1e-12: a shorter row is divided by 1e-12, and its norm has no gradient."""
    rule = ErrorRule()
    for seed in range(4):
        p = problem(MARGINS["cosface"], MODES[mode], 20, 40, dim, seed=seed)
        given = oracle.unit(p.tensors[side].double())
        factors = torch.tensor(NORMS[norms], dtype=torch.float64).repeat(10)[: len(given), None]
        p.tensors[side] = (given * factors).to(p.mode.x)
        got, plain, exact = cases.run(p, backend), cases.plain(p), cases.exact(p)
        rule.add("loss", got["loss"], plain and plain["loss"], exact["loss"])
        rule.add_all(_by_rows(got, exact), plain and _by_rows(plain, exact), _by_rows(exact, exact))
    rule.check()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("mode", [FP64, FP32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", MARGINS)
def test_cosine_of_exactly_one(backend, name, mode, sign):
    """x = +- w_y: moving x changes c_y only in second order, so that the slope of T plays no part in the gradients."""
    case, p = MARGINS[name], problem(MARGINS["normface"], mode, 4, 9, 8)
    p.labels = torch.tensor([0, 3, 3, 8])
    x, w = p.tensors["x"], p.tensors["w"]
    w[p.labels] = 0
    w[0, 0], w[3, 5], w[8, 2] = 3, 0.5, 1.0
    x.copy_(sign * 2 * w[p.labels])
    p.case = case
    got = cases.run(p, backend)
    p.case = case._replace(target=lambda c, params: case.target(c.detach(), params), detached=False)
    exact = cases.exact(p)
    tolerance = 1e-10 if mode is FP64 else 1e-4
    torch.testing.assert_close(got["loss"].double(), exact["loss"], rtol=tolerance, atol=tolerance)
    if not case.detached or case.t is None:  # with N' = 1, the rivals' slopes differ
        for name in ("d_x", "d_w"):
            torch.testing.assert_close(got[name].double(), exact[name], rtol=0, atol=tolerance * 64)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("mode", [FP64, FP32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", ["sphereface_real", "combined_default", "arcface_linear"])
def test_cosines_that_round_beyond_one(backend, name, mode, sign):
    """x a multiple of w_y: some cosines come out as 1 + eps, of which acos is nan."""
    p = problem(MARGINS[name], mode, 300, 20, 33)
    p.tensors["x"] = sign * torch.linspace(0.5, 2, 300)[:, None].to(mode.x) * p.tensors["w"][p.labels]
    got = cases.run(p, backend)
    p.case = p.case._replace(target=lambda c, params: MARGINS[name].target(c.detach(), params))
    tolerance = 1e-7 if mode is FP64 else 2e-2  # the angle of 1 - eps is sqrt(2 eps)
    torch.testing.assert_close(got["loss"].double(), cases.exact(p)["loss"], rtol=tolerance, atol=64 * tolerance)
    for name in ("d_x", "d_w"):
        assert got[name].isfinite().all()


@pytest.mark.parametrize("mode", [FP64, FP32], ids=["fp64", "fp32"])
def test_one_dimension(backend, mode):
    """D = 1: every cosine is 1 or -1, and nothing can turn, so that all gradients are 0."""
    p = problem(MARGINS["cosface"], mode, 12, 30, 1)
    got, exact = cases.run(p, backend), cases.exact(p)
    tolerance = 1e-10 if mode is FP64 else 1e-4
    torch.testing.assert_close(got["loss"].double(), exact["loss"], rtol=tolerance, atol=tolerance)
    for name in ("d_x", "d_w"):
        torch.testing.assert_close(got[name], torch.zeros_like(got[name]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", ["fp64", "fp32"])
@pytest.mark.parametrize(("exponent", "loss"), [(-50.7, 9.58e-23), (-13.0, 2.26e-6), (1000.0, 1000.0)])
def test_losses_far_from_one(backend, mode, exponent, loss):
    """Two classes at a known distance u - z: the loss is log(1 + exp(u - z)) to the last digits, with its gradient."""
    s = 500.0
    rival = 1 + exponent / s if exponent < 0 else -1.0
    w = torch.tensor([[1.0, 0.0], [rival, math.sqrt(1 - rival**2)]], dtype=torch.float64)
    x = w[:1] if exponent < 0 else -w[:1]
    p = cases.Problem(
        MARGINS["normface"], MODES[mode], torch.tensor([0]), {"x": x, "w": w}, torch.ones(1, dtype=torch.float64), s
    )
    p.tensors = {"x": x.to(p.mode.x), "w": w.to(p.mode.w)}
    got, exact = cases.run(p, backend), cases.exact(p)
    tolerance = 1e-10 if mode == "fp64" else 5e-4  # of exp(u - z), where u - z carries s * eps
    assert float(exact["loss"]) == pytest.approx(loss, rel=2e-2)
    torch.testing.assert_close(got["loss"].double(), exact["loss"], rtol=tolerance, atol=0)
    for name in ("d_x", "d_w"):
        size = float(exact[name].abs().max())
        torch.testing.assert_close(got[name].double(), exact[name], rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("factor", [65536.0, 2.0**-24], ids=["GradScaler", "tiny"])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_scaled_gradients(backend, mode, factor):
    """A power of two on the loss is a power of two on the weights' gradient, in fp16 too; architecture.md section 4."""
    p = problem(MARGINS["cosface"], MODES[mode], 64, 200, 32)
    p.tensors["x"] = p.tensors["x"] * 64  # so that d_x, which is 16-bit too, stays in range
    plain, exact = cases.plain(p), cases.exact(p)
    p.upstream *= factor
    got = cases.run(p, backend)
    rule = ErrorRule()
    rule.add("d_w", got["d_w"] / factor, plain["d_w"], exact["d_w"])
    rule.check()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("mode", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("margin", ["arcface_linear", "sphereface_4", "sv"])
def test_nan_stays_in_its_row(backend, margin, mode, value):
    clean = problem(MARGINS[margin], MODES[mode], 19, 140, 24)
    exact = cases.run(clean, backend)
    broken = cases.Problem(clean.case, clean.mode, clean.labels, dict(clean.tensors), clean.upstream)
    broken.tensors["x"] = clean.tensors["x"].clone()
    broken.tensors["x"][4, 3] = value
    got = cases.run(broken, backend)
    others = torch.arange(19) != 4
    assert got["loss"][4].isnan()
    assert got["d_x"][4].isnan().all()
    torch.testing.assert_close(got["loss"][others], exact["loss"][others], rtol=0, atol=0)
    torch.testing.assert_close(got["d_x"][others], exact["d_x"][others], rtol=0, atol=0)
    assert got["d_w"].isnan().any(1).all()  # every class is a rival of that row, or its target


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("mode", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("margin", ["arcface_linear", "sv"])
def test_ignored_rows_take_no_part(backend, margin, mode, value):
    """Whatever an ignored row holds: its loss and gradient are 0, and the weights' gradient is that of the others."""
    p = problem(MARGINS[margin], MODES[mode], 19, 140, 24, per="sample", bias=True)
    p.labels[[4, 11]] = -100
    expected = cases.run(p, backend)
    p.tensors["x"] = p.tensors["x"].clone()
    p.tensors["x"][4, 3] = p.tensors["x"][11] = value
    got = cases.run(p, backend)
    for name, t in got.items():
        torch.testing.assert_close(t, expected[name], rtol=0, atol=0)
    assert not got["loss"][[4, 11]].any()
    assert not got["d_x"][[4, 11]].any()


@pytest.mark.parametrize("open_classes", [7, 1], ids=["some", "all rivals"])
@pytest.mark.parametrize("mode", [FP64, FP32], ids=["fp64", "fp32"])
def test_bias_of_minus_infinity(backend, mode, open_classes):
    """Such a class is not there: no share of the loss, no gradient."""
    p = problem(MARGINS["cosface"], mode, 6, 12, 8, bias=True)
    p.labels = torch.zeros_like(p.labels)
    p.tensors["bias"][open_classes:] = -math.inf
    rule = ErrorRule()
    rule.add_all(cases.run(p, backend), cases.plain(p), cases.exact(p))
    rule.check()
    assert not cases.run(p, backend)["d_w"][open_classes:].any()


LAYOUTS = {  # a view of the same values, of a [n, d] tensor
    "transposed": lambda t: t.T.contiguous().T,
    "every second column": lambda t: torch.stack([t, t + 1], 2).flatten(1)[:, ::2],
    "every second row": lambda t: torch.stack([t, t + 1], 1).flatten(0, 1)[::2],
    "reversed storage": lambda t: torch.cat([torch.ones_like(t), t], 1)[:, t.shape[1] :],
    "row repeated": lambda t: t[:1].expand_as(t),
    "column repeated": lambda t: t[:, :1].expand_as(t),
}


@pytest.mark.parametrize("mode", ["fp64", "fp32", "bf16_weight"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", ["x", "w"])
def test_strides_of_inputs(backend, side, layout, mode):
    p = problem(MARGINS["arcface_linear"], MODES[mode], 18, 35, 20)
    view = LAYOUTS[layout](p.tensors[side])
    leaves = p.leaves() | {side: view.detach().requires_grad_()}
    assert leaves[side].stride() == view.stride()
    loss = margin_cross_entropy(leaves["x"], leaves["w"], p.labels, fm.ArcFace(0.5), reduction="none", backend=backend)
    got = cases.gradients(p, leaves, loss)
    p.tensors[side] = view.contiguous()
    expected = cases.exact(p) if mode == "fp64" else cases.run(p, backend)  # which test_parity.py holds to the oracle
    tolerance = {"fp64": 1e-10, "fp32": 1e-5, "bf16_weight": 1e-2}[mode]
    for name, t in got.items():
        size = float(expected[name].abs().max())
        torch.testing.assert_close(t, expected[name], rtol=0, atol=tolerance * size, msg=name)


@pytest.mark.parametrize("mode", [FP64, FP32], ids=["fp64", "fp32"])
def test_strides_of_vectors(backend, mode):
    """Labels, scale, bias and the upstream gradient with strides 2 and 0."""
    p = problem(MARGINS["cosface"], mode, 18, 35, 20, per="sample", bias=True)
    exact = cases.run(p, backend)
    leaves = p.leaves()
    double = {n: torch.stack([t, t + 1], 1).flatten()[::2] for n, t in leaves.items() if t.dim() == 1}
    labels = torch.stack([p.labels, p.labels], 1).flatten()[::2]
    loss = margin_cross_entropy(
        leaves["x"], leaves["w"], labels, fm.CosFace(fm.PerSample(double["m"])),
        scale=fm.PerSample(double["scale"]), bias=double["bias"], reduction="none", backend=backend,
    )  # fmt: skip
    upstream = torch.stack([p.upstream, p.upstream], 1).flatten()[::2].to(loss.dtype)
    got = torch.autograd.grad(loss, list(leaves.values()), upstream, retain_graph=True)
    for (name, _), g in zip(leaves.items(), got, strict=True):
        torch.testing.assert_close(g, exact[f"d_{name}"], rtol=1e-6, atol=1e-6)
    p.upstream = torch.full_like(p.upstream, 1.5)
    got = torch.autograd.grad(loss, list(leaves.values()), loss.new_tensor(1.5).expand(18))
    for (name, _), g in zip(leaves.items(), got, strict=True):
        torch.testing.assert_close(g, cases.run(p, backend)[f"d_{name}"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("labels", [[5] * 40, [0, 1] * 20, [139] * 40], ids=["one class", "two classes", "last class"])
@pytest.mark.parametrize("mode", [FP64, FP32], ids=["fp64", "fp32"])
def test_duplicate_labels(backend, mode, labels):
    p = problem(MARGINS["arcface_linear"], mode, 40, 140, 16)
    p.labels = torch.tensor(labels)
    rule = ErrorRule()
    rule.add_all(cases.run(p, backend), cases.plain(p), cases.exact(p))
    rule.check()
