"""Sub-centres: K rows a class, of which the nearest counts; the report of outliers, in every layout and dtype."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fused_margin as fm
from fused_margin.functional import margin_cross_entropy

from . import oracle

C, D, K = 12, 8, 3


@pytest.fixture
def data():
    torch.manual_seed(0)
    w = F.normalize(torch.randn(C * K, D))
    labels = torch.arange(120) % C
    place = torch.where(torch.arange(120) % 5 == 0, 2, 1)  # most samples sit at the centre 1
    return w[labels * K + place] + 0.02 * torch.randn(120, D), w, labels, place


def test_outliers(data):
    x, w, labels, place = data
    found = fm.find_outliers(x, w, labels, K, angle=20)
    assert found.main.tolist() == [1] * C
    assert found.counts.sum().item() == 120
    assert torch.equal(found.counts[:, 2], torch.bincount(labels[place == 2], minlength=C))
    expected = torch.rad2deg(torch.acos(F.cosine_similarity(x, w[labels * K + 1])))
    torch.testing.assert_close(found.angle, expected, rtol=1e-3, atol=1e-2)
    assert torch.equal(found.outlier, expected >= 20)
    torch.testing.assert_close(found.main_rows(w), w[1::K])


def test_head(data, backend):
    x, w, labels, _ = data
    module = fm.MarginHead(D, C, fm.ArcFace(0.3), 16.0, sub_centers=K, backend=backend)
    assert module.weight.shape == (C * K, D)
    with torch.no_grad():
        module.weight.copy_(w)
    cos = oracle.cosines(x, w, labels, sub_centers=K).c
    torch.testing.assert_close(module.logits(x), 16 * cos)
    values, classes = module.topk(x, 3)
    torch.testing.assert_close(values, cos.topk(3).values)
    assert torch.equal(classes[:, 0], cos.argmax(1))
    assert module.outliers(x, labels, 20).outlier.sum() > 0
    assert "sub_centers=3" in repr(module)


def test_no_tensor_of_all_centres(monkeypatch):
    monkeypatch.setattr(fm.backends.cpu, "KEPT_BYTES", 0)  # kept products are as many as fit in a limit
    if fm.why_not("cpu"):
        pytest.skip(f"cpu: {fm.why_not('cpu')}")
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **kwargs or {})
            made = out if isinstance(out, (tuple, list)) else (out,)
            largest = max([largest, *(t.numel() for t in made if isinstance(t, torch.Tensor))])
            return out

    w = torch.randn(3000, 4, requires_grad=True)
    x, labels = torch.randn(50, 4, requires_grad=True), torch.randint(1000, (50,))
    with Watch():
        margin_cross_entropy(x, w, labels, fm.ArcFace(), sub_centers=3, backend="cpu").backward()
    assert largest <= w.numel() < 50 * 1000 * 3


def test_errors(data):
    x, w, labels, _ = data
    with pytest.raises(ValueError, match="no multiple of sub_centers = 5"):
        fm.find_outliers(x, w, labels, 5)
    with pytest.raises(ValueError, match="weight has 36 rows, no multiple of sub_centers = 5"):
        margin_cross_entropy(x, w, labels, fm.ArcFace(), sub_centers=5)
    with pytest.raises(ValueError, match="sub_centers = 0; expected an integer, at least 1"):
        fm.MarginHead(D, C, sub_centers=0)
    with pytest.raises(ValueError, match="angle = 200"):
        fm.find_outliers(x, w, labels, K, 200)
    with pytest.raises(
        ValueError, match=r"weight has shape \[36, 9\]; expected \[C \* 3, 8\], \[C, 24\] or \[C, 3, 8\]"
    ):
        fm.find_outliers(x, torch.ones(36, 9), labels, K)
    with pytest.raises(RuntimeError, match=r"labels\[1\] = 12 is outside \[0, 12\)"):
        fm.find_outliers(x, w, labels.index_fill(0, torch.tensor(1), 12), K)
    with pytest.raises(TypeError, match=r"labels are torch\.float32; expected integers"):
        fm.find_outliers(x, w, labels.float(), K)
    with pytest.raises(ValueError, match=r"labels have shape \[3\]; expected \[120\]"):
        fm.find_outliers(x, w, labels[:3], K)


@pytest.mark.parametrize("shape", [(C, K * D), (C, K, D)])
def test_layouts(data, shape):
    """Of PartialFC and of three dimensions: the same report as of [C * K, D]."""
    x, w, labels, _ = data
    expected, got = (fm.find_outliers(x, t, labels, K, 20) for t in (w, w.view(shape)))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(got.main_rows(w.view(shape)), w[1::K])
    sharded = fm.PartialFC(D, C, sub_centers=K)
    fm.partial_fc.load_weight(sharded, w)
    assert torch.equal(fm.find_outliers(x, sharded.weight, labels, K, 20).outlier, expected.outlier)


@pytest.mark.parametrize("ignored", [-100, 255])
def test_ignored_samples_count_nowhere(data, ignored):
    x, w, labels, _ = data
    some = torch.arange(120) % 7 == 0
    with_ignored = torch.where(some, ignored, labels)
    x = torch.where(some[:, None], torch.nan, x)
    got = fm.find_outliers(x, w, with_ignored, K, 20, ignore_index=ignored)
    expected = fm.find_outliers(x[~some], w, labels[~some], K, 20)
    assert torch.equal(got.main, expected.main)
    assert torch.equal(got.counts, expected.counts)
    assert torch.equal(got.angle[~some], expected.angle)
    assert torch.equal(got.outlier[~some], expected.outlier)
    assert got.angle[some].isnan().all()
    assert not got.outlier[some].any()
    module = fm.MarginHead(D, C, sub_centers=K, ignore_index=ignored)
    assert module.outliers(x, with_ignored).angle[some].isnan().all()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.float64, torch.float16])
def test_dtypes(data, x_dtype, w_dtype):
    x, w, labels, _ = data
    x, w = x.to(x_dtype), w.to(w_dtype)
    got = fm.find_outliers(x, w, labels.to(torch.uint8), K, 20)
    double = torch.float64 in (x_dtype, w_dtype)
    assert got.angle.dtype == (torch.float64 if double else torch.float32)
    exact = torch.rad2deg(torch.acos(F.cosine_similarity(x.double(), w.double()[labels * K + 1])))
    torch.testing.assert_close(got.angle.double(), exact, rtol=0, atol=1e-6 if double else 2e-2)


def test_no_tensor_of_all_samples_and_centres(monkeypatch):
    """In chunks: the same, and the samples' centres [N, K, D] never stand together."""
    x, w = torch.randn(1000, D), torch.randn(C * K, D)
    labels, largest = torch.arange(1000) % C, 0
    expected = fm.find_outliers(x, w, labels, K)
    monkeypatch.setattr("fused_margin.subcenters._CHUNK", 64)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **kwargs or {})
            largest = max(largest, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Watch():
        got = fm.find_outliers(x, w, labels, K)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert largest == x.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("center", range(K))
def test_a_centre_that_is_nan_is_seen(backend, dtype, center):
    """By every row, as the target's class or as a rival: the largest of a class does not hide it."""
    x, w = torch.randn(9, D, dtype=dtype, requires_grad=True), torch.randn(C * K, D, dtype=dtype)
    w[2 * K + center] = torch.nan
    labels = torch.arange(9) % C
    loss = margin_cross_entropy(
        x, w.requires_grad_(), labels, fm.ArcFace(), sub_centers=K, backend=backend, reduction="none"
    )
    assert loss.isnan().all()
    loss.sum().backward()
    assert x.grad.isnan().any(1).all()
    assert w.grad[2 * K + center].isnan().all()
