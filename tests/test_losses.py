"""Every loss of docs/losses.md on every backend against its dense formula: error rule, both gradient conventions."""

import contextlib
import functools

import pytest
import torch

import fused_margin as fm
from fused_margin.functional import margin_cross_entropy

from . import oracle
from .cases import BF16, FP32, FP64, Mode, spread
from .error_rule import ErrorRule
from .loss_oracle import Dense
from .loss_table import LOSSES, Loss

BATCH, CLASSES, DIM = 41, 131, 32
MODES = {"fp64": FP64, "fp32": FP32, "bf16": BF16}


@functools.lru_cache(maxsize=64)
def data(name: str, mode: Mode, seed: int, shape: tuple[int, int, int] = (BATCH, CLASSES, DIM)):
    """x, w and labels; rows with a cosine near a step of N, and one other, are ignored."""
    loss, (batch, classes, dim) = LOSSES[name], shape
    x, w, labels = spread(batch, classes * loss.centres, dim, seed)
    labels = labels // loss.centres
    x, w = x.to(mode.x), w.to(mode.w)
    if loss.scale == "norm":
        x = x * 8
    labels[1] = -100
    if loss.tau is not None:
        found = oracle.cosines(x.double(), w.double(), labels.clamp_min(0))
        near = (found.c - loss.tau(found.c_y)[:, None]).abs() < mode.mask_gap(dim)
        labels[(near & found.rival).any(1)] = -100
        assert int((labels >= 0).sum()) >= batch // 4
    return x, w, labels


def upstream(batch: int) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, batch, dtype=torch.float64)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    """States and parameters are made in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def options(loss: Loss, classes: int) -> dict:
    normalize = {"normalize_embeddings": False, "normalize_weight": False} if loss.products else {}
    return {"scale": loss.scale} | normalize | loss.options(classes)


def parameters(margin: fm.Margin) -> dict[str, torch.Tensor]:
    return dict(margin.named_parameters()) if isinstance(margin, torch.nn.Module) else {}


def library(name, mode, inputs, backend, gradient, **more):
    """Losses and all gradients, the margin's parameters' too."""
    loss = LOSSES[name]
    x, w, labels = inputs
    torch.manual_seed(5)
    classes = len(w) // loss.centres
    with default_dtype(mode.acc):
        margin, given = loss.make(classes, x.shape[1], gradient=gradient), options(loss, classes)
    x, w = (t.detach().requires_grad_() for t in (x, w))
    torch.manual_seed(6)
    rows = margin_cross_entropy(x, w, labels, margin, reduction="none", backend=backend, **given, **more)
    return with_gradients(rows, {"x": x, "w": w} | parameters(margin))


def with_gradients(rows, leaves):
    grads = torch.autograd.grad(rows, list(leaves.values()), upstream(len(rows)).to(rows.dtype))
    return {"loss": rows.detach()} | {f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}


def dense(name, mode, inputs, gradient, dtype=None, operands=None, *, swept=None, seed=6, smoothing=0.0):
    """The same from the oracle, on the tensors as they are or as `dtype`. swept [C] bool: rivals that take part."""
    loss = LOSSES[name]
    x, w, labels = inputs
    torch.manual_seed(5)
    with default_dtype(mode.acc):
        given = parameters(loss.make(len(w) // loss.centres, x.shape[1], gradient=gradient))
    leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in ({"x": x, "w": w} | given).items()}
    valid, y = labels >= 0, labels.clamp_min(0)
    acc = torch.float64 if leaves["x"].dtype == torch.float64 else torch.float32
    on = (not loss.products,) * 2
    found = oracle.cosines(leaves["x"], leaves["w"], y, sub_centers=loss.centres, normalize=on, operands=operands)
    norm = leaves["x"].to(acc).norm(dim=1)
    s = norm if loss.scale == "norm" else torch.full((len(x),), float(loss.scale), dtype=acc)
    w_norm = leaves["w"].to(acc)[y].norm(dim=1)
    p = {n: leaves[n].to(acc) for n in given}
    torch.manual_seed(seed)
    found = found if swept is None else found._replace(rival=found.rival & swept)
    d = Dense(*found, valid, s, norm, w_norm, p, mode.acc, gradient == "detached", smoothing)
    return with_gradients(torch.where(valid, loss.rows(d), 0.0), leaves)


def check(name, mode, backend, gradient, draws):
    if backend != "reference" and not LOSSES[name].kernel:
        pytest.skip(f"{backend}: {name} is a loss of the reference backend")
    rule = ErrorRule()
    for first, last in ((0, draws), (draws, 4 * draws), (4 * draws, 16 * draws)):
        for seed in range(first, last):
            inputs = data(name, mode, seed)
            exact = dense(name, mode, inputs, gradient, torch.float64)
            plain = None if mode.x == torch.float64 else dense(name, mode, inputs, gradient, None, mode.operands)
            rule.add_all(library(name, mode, inputs, backend, gradient), plain, exact)
        if not rule.failures() or mode.x == torch.float64:
            break  # else plain PyTorch may have been lucky: more draws decide, not a wider limit
    rule.check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_loss(name, mode, backend):
    check(name, MODES[mode], backend, "exact", 1 if mode == "fp64" else 4)


@pytest.mark.parametrize("name", LOSSES)
def test_detached(name, backend):
    check(name, FP64, backend, "detached", 1)


@pytest.mark.parametrize("name", LOSSES)
def test_row_extras_of_every_loss(name, backend):
    """Weights of samples and of classes, ignored rows, both reductions, and statistics from the same sweep."""
    loss = LOSSES[name]
    if backend != "reference" and not loss.kernel:
        pytest.skip(f"{backend}: {name} is a loss of the reference backend")
    inputs, exact = data(name, FP64, 2), dense(name, FP64, data(name, FP64, 2), "exact")
    x, w, labels = inputs
    a, b = torch.linspace(0.5, 2, len(x)).double(), torch.linspace(2, 0.1, CLASSES).double()
    weights = {"sample_weight": a, "class_weight": b}
    weighted = a * b[labels.clamp_min(0)] * exact["loss"]
    torch.testing.assert_close(library(name, FP64, inputs, backend, "exact", **weights)["loss"], weighted)
    torch.manual_seed(5)
    with default_dtype(torch.float64):
        margin, given = loss.make(CLASSES, DIM, gradient="exact"), options(loss, CLASSES)
    torch.manual_seed(6)
    total, stats = margin_cross_entropy(
        x, w, labels, margin, reduction="sum", return_stats=True, backend=backend, **weights, **given
    )
    torch.testing.assert_close(total, weighted.sum())
    found = oracle.cosines(x, w, labels.clamp_min(0), sub_centers=loss.centres, normalize=(not loss.products,) * 2)
    valid = labels >= 0
    torch.testing.assert_close(stats.target_cosine, torch.where(valid, found.c_y, 0.0))
    best = found.c.masked_fill(~found.rival, -torch.inf).amax(1)
    if margin.bias() is None or margin.bias().dim() == 0:
        assert int(stats.correct) == int((valid & (found.c_y >= best)).sum())


SMOOTHED = [
    n
    for n, loss in LOSSES.items()
    if loss.make(8, 5).softmax and not loss.options(8).keys() & {"mining", "label_smoothing"}
]


@pytest.mark.parametrize("name", SMOOTHED)
def test_label_smoothing_of_every_softmax(name):
    """On the reference backend: the smoothed part takes what the loss multiplies its cross-entropy with."""
    inputs = data(name, FP64, 0)
    rule = ErrorRule()
    got = library(name, FP64, inputs, "reference", "exact", label_smoothing=0.2)
    rule.add_all(got, None, dense(name, FP64, inputs, "exact", torch.float64, smoothing=0.2))
    rule.check()


@pytest.mark.parametrize("name", [n for n, loss in LOSSES.items() if loss.exact])
def test_gradcheck(name, backend):
    """Where the gradient is the slope of the loss: by x, w and the margin's parameters."""
    loss = LOSSES[name]
    if backend != "reference" and not loss.kernel:
        pytest.skip(f"{backend}: {name} is a loss of the reference backend")
    x, w, labels = data(name, FP64, 3, (6, 8, 5))
    margin = loss.make(8, 5, gradient="exact")
    if isinstance(margin, torch.nn.Module):
        margin.double()

    def run(x, w, *learned):
        torch.manual_seed(6)
        return margin_cross_entropy(x, w, labels, margin, reduction="none", backend=backend, **options(loss, 8))

    learned = parameters(margin).values()
    leaves = (x.clone().requires_grad_(), w.clone().requires_grad_(), *learned)
    assert torch.autograd.gradcheck(run, leaves, atol=1e-6, rtol=1e-4)


def test_why_not_names_the_losses_of_the_reference_backend():
    """Those that docs/losses.md lists as such; the words say which loss, which rule, and how a kernel is asked for."""
    made = {name: loss.make(CLASSES, DIM) for name, loss in LOSSES.items()}
    assert not any(fm.why_not("reference", margin) for margin in made.values())
    present = fm.why_not("cpu")
    reasons = {name: fm.why_not("cpu", margin)[len(present) :] for name, margin in made.items()}
    assert {name for name in made if reasons[name]} == {name for name, loss in LOSSES.items() if not loss.kernel}
    (reason,) = reasons["sface"]
    assert reason.startswith("no kernel has the rival rule 'sigmoid_weight' of SFace; csrc/README.md says how one is")
    assert reason.endswith("or ask for it in an issue that names the rule and your B, C and D")


def test_why_not_of_tensors():
    """What is known of the call can be told, as to `margin_cross_entropy`."""
    x, w = torch.zeros(2, 3), torch.zeros(4, 3)
    assert fm.why_not("reference", fm.CosFace(), x, w) == []
    assert fm.why_not("cpu", lambda c: c, x, w) == fm.why_not("cpu")
    assert "embeddings are on cpu, not on a GPU" in fm.why_not("cuda", fm.CosFace(), x, w)
    assert "sub_centers is 17; the kernels take at most 16" in fm.why_not("triton", sub_centers=17)
    assert "compute_dtype is torch.float64" in fm.why_not("triton", None, x.double(), w)
    with pytest.raises(TypeError, match=r"pass an instance, as in SFace\(\)"):
        fm.why_not("cpu", fm.SFace)


def test_a_rule_without_a_kernel_that_only_prepare_brings():
    class Late(fm.StatefulMargin):
        def prepare(self, rows, labels):
            return fm.P2SGrad()

    class Said(Late):
        def rule(self):
            return fm.P2SGrad().rule()

    if fm.why_not("cpu"):
        pytest.skip(f"cpu: {fm.why_not('cpu')}")
    x, w, labels = data("p2sgrad", FP32, 0)
    words = r"Late\.prepare\(\) made .*'cpu' cannot run: no kernel has .* of P2SGrad; .* Define rule\(\) of Late too"
    for backend in ("cpu", None):
        with pytest.raises(ValueError, match=words):
            margin_cross_entropy(x, w, labels, Late(), backend=backend)
    margin_cross_entropy(x, w, labels, Late(), backend="reference")
    with pytest.warns(fm.FallbackWarning, match="of Said"):
        margin_cross_entropy(x, w, labels, Said())


@pytest.mark.parametrize("name", [n for n, loss in LOSSES.items() if not loss.kernel])
def test_reference_only_losses_say_so(name):
    if fm.why_not("cpu"):
        pytest.skip(f"cpu: {fm.why_not('cpu')}")
    loss = LOSSES[name]
    x, w, labels = data(name, FP32, 0)
    margin = loss.make(CLASSES, DIM)
    words = rf"no kernel has the rival rule '.*' of {type(margin).__name__}; csrc/README\.md says how one is added"
    with pytest.raises(ValueError, match=words):
        fm.MarginHead(DIM, CLASSES, margin, scale=loss.scale, backend="cpu")
    with pytest.raises(ValueError, match=words):
        margin_cross_entropy(x, w, labels, margin, backend="cpu", **options(loss, CLASSES))
    with pytest.warns(fm.FallbackWarning, match="no kernel has the rival rule"):
        margin_cross_entropy(x, w, labels, margin, **options(loss, CLASSES))
