"""What docstrings and README promise beside the loss: dtypes, padding, ignored rows, compilation, module state."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

import fused_margin as fm

from .conftest import require

mce = fm.functional.margin_cross_entropy


def data(batch=5, classes=20, dim=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, dim, generator=g).requires_grad_()
    return x, torch.randn(classes, dim, generator=g).requires_grad_(), torch.randint(classes, (batch,), generator=g)


PLAIN = {"scale": 1.0, "normalize_embeddings": False, "normalize_weight": False}


@pytest.mark.parametrize("value, dtype", [(88.7, torch.float32), (800.0, torch.float64)])
def test_a_large_bias_does_not_leak_from_padding_rows(backend, value, dtype):
    """A batch that fills no vector: what stands beyond it must not reach the gradients."""
    x, w, labels = data()
    x, w = (t.detach().to(dtype).requires_grad_() for t in (x, w))
    bias = torch.zeros(20, dtype=dtype).index_fill(0, torch.tensor(3), value).requires_grad_()
    mce(x, w, labels, fm.NormFace(), bias=bias, backend=backend, **PLAIN).backward()
    expected = torch.autograd.grad(F.cross_entropy(F.linear(x, w, bias), labels), (x, w, bias))
    for got, exact in zip((x.grad, w.grad, bias.grad), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-6)


def test_a_16_bit_bias_keeps_its_dtype_under_compile(backend):
    x, _, labels = data()
    head = fm.MarginHead(16, 50, fm.NormFace(), bias=True, dtype=torch.bfloat16, backend=backend)
    head(x, labels).backward()
    eager = head.bias.grad.clone()
    head.bias.grad = None
    torch.compile(head, fullgraph=True, backend="aot_eager_decomp_partition")(x, labels).backward()
    torch.testing.assert_close(head.bias.grad, eager)
    assert eager.dtype == torch.bfloat16


def test_a_second_derivative_raises(backend):
    x, w, labels = data()
    loss = mce(x, w, labels, fm.CosFace(0.2), backend=backend)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("margin", [fm.CosFace(0.2), lambda cos_y: cos_y - 0.2], ids=["kernel", "torch"])
def test_forward_mode_raises(backend, margin):
    """It would find derivatives of 0 where nothing asks for gradients."""
    x, w, labels = data()
    x, w = x.detach(), w.detach()

    def loss(x):
        return mce(x, w, labels, margin, backend=backend)

    with pytest.raises(RuntimeError, match=r"by backward\(\) only"):
        torch.func.jvp(loss, (x,), (x,))
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match=r"by backward\(\) only"):
            loss(forward_ad.make_dual(x, x))
        torch.testing.assert_close(loss(x), mce(x, w, labels, margin, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_margins_are_evaluated_in_the_dtype_of_the_cosines(dtype):
    """0.5 is exact in all of them, so nothing may change; and the loss stays float32."""
    x, w, labels = data()
    expected = mce(x, w, labels, fm.ArcFace(0.5), reduction="none")
    for m in (torch.tensor(0.5, dtype=dtype), torch.full((20,), 0.5, dtype=dtype)):
        got = mce(x, w, labels, fm.ArcFace(m), reduction="none")
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=0)
    assert mce(x, w, labels, lambda c: c.to(dtype)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_an_ignored_row_touches_nothing(backend, dtype):
    x, w, labels = data()
    labels[2] = -100
    kept = [0, 1, 3, 4]
    expected = mce(x[kept], w, labels[kept], fm.ArcFace(0.5), compute_dtype=dtype, backend=backend)
    d_x, d_w = torch.autograd.grad(expected, (x, w))
    broken = x.detach().clone().index_fill_(0, torch.tensor(2), torch.nan).requires_grad_()
    loss = mce(broken, w, labels, fm.ArcFace(0.5), compute_dtype=dtype, backend=backend)
    torch.testing.assert_close(loss, expected)
    for got, exact in zip(torch.autograd.grad(loss, (broken, w)), (d_x, d_w), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-7)


def test_topk_and_accuracy_follow_the_logits(backend):
    """Plain softmax: with a bias and raw products the order of the classes is that of the logits."""
    head = fm.MarginHead(16, 50, fm.NormFace(), bias=True, backend=backend, **PLAIN)
    nn.init.normal_(head.bias)
    nn.init.normal_(head.weight, std=0.5)
    x, _, labels = data(200, 50)
    best = head.logits(x).argmax(1)
    assert torch.equal(head.topk(x, 1)[1][:, 0], best)
    assert int(head(x, labels, return_stats=True)[1].correct) == int((best == labels).sum())


def test_cosines_of_16_bit_operands_are_float32():
    x, w, _ = data()
    rounded = F.normalize(x).bfloat16().float() @ F.normalize(w).bfloat16().float().T
    values, classes = fm.functional.topk(x, w, 3, compute_dtype=torch.bfloat16)
    expected = rounded.topk(3)
    torch.testing.assert_close(values, expected.values, rtol=0, atol=1e-6)
    assert torch.equal(classes, expected.indices)
    head = fm.MarginHead(16, 20)
    with torch.autocast("cpu", torch.bfloat16):
        assert head.logits(x).dtype == torch.float32
    half = fm.MarginHead(16, 20, fm.SphereFace(4), scale="norm")
    assert half.logits(torch.full((2, 16), 3e4).half()).isfinite().all()


def test_compile_with_dynamic_shapes_and_a_scale_that_changes(backend):
    x, _, labels = data()
    x = x.detach()
    torch._dynamo.reset()  # other tests have compiled the same function
    head = fm.MarginHead(16, 50, fm.ArcFace(0.5), backend=backend)
    compiled = torch.compile(head, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, scale in ((5, 64.0), (3, 64.0), (4, 32.0), (4, 16.0)):
        head.scale = scale
        torch.testing.assert_close(compiled(x[:rows], labels[:rows]), head(x[:rows], labels[:rows]))


def test_a_margin_per_class_in_a_batch_as_large_as_the_classes():
    m = nn.Parameter(torch.linspace(0.1, 0.6, 20))
    head = fm.MarginHead(16, 20, fm.ArcFace(m))
    x, _, labels = data(20, 20)
    expected = mce(x, head.weight, labels, fm.ArcFace(fm.PerSample(m.detach()[labels])))
    torch.testing.assert_close(head(x, labels), expected)


def test_modules_as_margins_are_trained():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = nn.Parameter(torch.tensor(0.3))

        def forward(self, cos_y):
            return cos_y - self.m

    head = fm.MarginHead(16, 20, Shift(), scale=nn.Parameter(torch.tensor(30.0)))
    assert {n for n, _ in head.named_parameters()} == {"weight", "scale", "margin_module.m"}
    x, _, labels = data()
    head(x, labels).backward()
    assert head.margin_module.m.grad != 0
    assert head.scale.grad is not None
    twin = copy.deepcopy(head)
    twin.margin_module.m.data.zero_()
    assert not torch.equal(twin(x, labels), head(x, labels))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"compute_dtype": "bf16"}, "compute_dtype = 'bf16'; expected torch.float32"),
        ({"scale": -1}, "scale = -1; expected a positive"),
        ({"reduction": "avg"}, "reduction = 'avg'; expected one of"),
        ({"backend": "cud"}, "backend='cud' cannot run: there is no backend 'cud'"),
        ({"scale": torch.ones(20)}, "a head has one scale for all"),
        ({"margin": fm.CosFace(torch.tensor(0.2, requires_grad=True))}, "margin_m asks for a gradient"),
    ],
)
def test_a_head_says_at_once_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        fm.MarginHead(16, 20, **options)


@pytest.mark.parametrize("name", ["bias", "normalize_embeddings", "normalize_weight"])
def test_a_head_takes_flags(name):
    with pytest.raises(TypeError, match=f"{name} = 'no'; expected True or False"):
        fm.MarginHead(16, 20, **{name: "no"})


def test_odd_arguments():
    x, w, labels = data()
    expected = mce(x, w, labels, fm.ArcFace(0.5), scale=64.0)
    torch.testing.assert_close(mce(x, w, labels, fm.ArcFace(np.float32(0.5)), scale=np.float32(64)), expected)
    with pytest.raises(TypeError, match="labels: got list; expected a tensor"):
        mce(x, w, [0, 1, 2, 3, 4], fm.ArcFace())
    with pytest.raises(TypeError, match="ignore_index = None; expected an integer"):
        mce(x, w, labels, fm.ArcFace(), ignore_index=None)
    with pytest.raises(ValueError, match=r"for one-hot rows use labels.argmax\(1\)"):
        mce(x, w, F.one_hot(labels, 20), fm.ArcFace())
    with pytest.raises(TypeError, match="t asks for a gradient"):
        fm.SVSoftmax(nn.Parameter(torch.tensor(1.2)))


def test_a_label_error_is_for_the_user(backend):
    require(backend)
    x, w, labels = data()
    labels[1] = 20
    message = r"^labels\[1\] = 20 is outside \[0, 20\) and is not ignore_index = -100$"
    with pytest.raises(RuntimeError, match=message):
        mce(x, w, labels, fm.ArcFace(), backend=backend)


def test_a_margin_that_works_in_place_leaves_the_statistics():
    x, w, labels = data()
    _, stats = mce(x, w, labels, lambda c: c.sub_(0.3) if not c.requires_grad else c - 0.3, return_stats=True)
    with torch.no_grad():
        loss, in_place = mce(x, w, labels, lambda c: c.sub_(0.3), return_stats=True)
    torch.testing.assert_close(in_place.target_cosine, stats.target_cosine)
    torch.testing.assert_close(loss, mce(x, w, labels, fm.CosFace(0.3)).detach())


def test_psi_of_a_large_whole_number_takes_the_angle():
    c = torch.linspace(-0.99, 0.99, 50, dtype=torch.float64)
    for m in (16, 17, 64):
        k = torch.floor(m * torch.acos(c) / torch.pi)
        expected = (-1) ** k * torch.cos(m * torch.acos(c)) - 2 * k
        torch.testing.assert_close(fm.SphereFace(m).target(c), expected, rtol=0, atol=1e-8)
