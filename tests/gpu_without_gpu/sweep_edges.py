"""Edges that every GPU kernel is tested with: what has broken other people's kernels before.

A file of tests derives TestEdges from Edges, and has three fixtures: `backend`, the name; `form`, under which the
backend runs in each of its forms; `chunks`, under which a backward of 300 classes has several chunks.
"""

import math

import pytest
import torch

import fused_margin as fm
from fused_margin import ops
from fused_margin.functional import margin_cross_entropy
from fused_margin.spec import Aux, Spec, Want

from .. import cases, oracle, test_edges
from ..cases import FP32, MARGINS, MODES, Mode, problem
from ..error_rule import ErrorRule
from .sweep_cases import BATCH, CLASSES, OPERANDS, Sweep


def ring(batch=BATCH, classes=CLASSES, dim=20, seed=0):
    x, w, labels = cases.spread(batch, classes, dim, seed)
    return x.float().requires_grad_(), w.float().requires_grad_(), labels


def loss_and_gradients(backend, x, w, labels, margin="arcface_linear", **options):
    case = MARGINS[margin]
    loss = margin_cross_entropy(x, w, labels, case.make(case.params), backend=backend, **options)
    return [loss, *torch.autograd.grad(loss.sum(), (x, w))]


def mode_of(operands):
    """float32 tensors, multiplied in this type."""
    return Mode(torch.float32, torch.float32, operands, None if operands == torch.float32 else operands)


def check_by_rows(problems, backend, side):
    """The error rule, in which each row of the gradient of `side` is relative to its own largest entry."""
    rule, name = ErrorRule(), f"d_{side}"
    for p in problems:
        got, plain, exact = cases.run(p, backend), cases.plain(p), cases.exact(p)
        rule.add_all(*({n: t for n, t in found.items() if n != name} for found in (got, plain, exact)))
        rule.add_all(*(test_edges._by_rows({name: found[name]}, exact) for found in (got, plain, exact)))
    rule.check()


def uneven(seed, operands):
    """Entries of a row of w, and of one slice of its columns and the next, that are powers of ten apart."""
    p = problem(MARGINS["cosface"], mode_of(operands), 20, CLASSES, 72, seed)
    w = p.tensors["w"].clone()
    w[::3, 32:64] *= 1e4
    w[1::3, :32] *= 1e-7
    w[1::6, 64:] *= 1e6
    w[5, :32] = 0
    p.tensors["w"] = w
    return p


class Edges:
    def test_label_in_the_last_padded_tile(self, backend):
        """75 classes fill tiles of 32 up to column 95, of 128 up to 127. Labels: the last class, and columns beyond."""
        sweep = Sweep("identity", torch.float32, "shard", bias=False, backend=backend)
        sweep.labels[:7] = 11 + torch.tensor([CLASSES - 1, CLASSES, 95, 96, 127, 128, 0])
        sweep.check()

    def test_labels_outside_and_ignored_rows_that_hold_nan(self, backend):
        x, w, labels = ring()
        labels[3:6] = -100
        clean = loss_and_gradients(backend, x, w, labels)
        with torch.no_grad():
            x[3:6] = float("nan")
        for got, expected in zip(loss_and_gradients(backend, x, w, labels), clean, strict=True):
            assert torch.equal(got, expected)
        assert not clean[1][3:6].any()
        with pytest.raises(RuntimeError, match=rf"labels\[0\] = {CLASSES} is outside"):
            loss_and_gradients(backend, x, w, torch.full_like(labels, CLASSES))

    @pytest.mark.parametrize("margin", ["arcface_linear", "sv"])
    def test_ignored_rows_with_scales_and_a_bias(self, backend, margin):
        test_edges.test_ignored_rows_take_no_part(backend, margin, "bf16", math.nan)

    def test_mean_over_the_rows_that_count(self, backend):
        x, w, labels = ring()
        counts = torch.arange(BATCH) % 3 > 0
        some = loss_and_gradients(backend, x[counts].detach().requires_grad_(), w, labels[counts])
        loss, d_x, d_w = loss_and_gradients(backend, x, w, labels.where(counts, -100))
        for got, expected in zip((loss, d_x[counts], d_w), some, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("batch", [0, BATCH], ids=["empty batch", "all ignored"])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_no_row_counts(self, backend, form, batch, reduction):
        x, w, labels = ring(BATCH)
        x = x[:batch].detach().requires_grad_()
        ignored = torch.full_like(labels[:batch], -100)
        for t in loss_and_gradients(backend, x, w, ignored, reduction=reduction):
            assert torch.equal(t, torch.zeros_like(t))

    def test_shard_without_a_class(self, backend, form):
        sweep = Sweep("hard", torch.float32, bias=False, backend=backend)
        x, w, scale = (sweep.leaves[n] for n in ("x", "w", "scale"))
        want = int(Want.DX | Want.DSCALE | Want.STATS | (Want.SUM if form == "chunk" else 0))
        empty = torch.empty(0, dtype=torch.long)
        args = torch.tensor([1.2, 0.2])
        got = ops.sweep(x, w, sweep.labels, scale, sweep.tau, None, empty, args, sweep.spec(backend, want=want))
        assert (got[0] == -torch.inf).all()
        assert (Aux(*got[3]).best == -torch.inf).all()
        for t in (*got[1:3], *sweep.gradients(got, sweep.leaves).values()):
            assert torch.equal(t, torch.zeros_like(t))

    def test_row_without_a_rival(self, backend):
        x, w, labels = ring(5, 1)
        for t in loss_and_gradients(backend, x, w, labels * 0):
            assert torch.equal(t, torch.zeros_like(t))

    @pytest.mark.parametrize("open_classes", [7, 1], ids=["some", "all rivals"])
    def test_bias_of_minus_infinity(self, backend, open_classes):
        test_edges.test_bias_of_minus_infinity(backend, FP32, open_classes)

    def test_gradient_without_stride_is_that_with_it(self, backend):
        x, w, labels = ring()
        spec = Spec(num_classes=CLASSES, want=int(Want.DX), backend=backend)
        red, cos_y, _, _ = ops.sweep(x, w, labels, torch.full((BATCH,), 30.0), None, None, None, torch.zeros(0), spec)
        ones = torch.ones(BATCH)
        dense = torch.autograd.grad((red, cos_y), (x, w), (ones, ones), retain_graph=True)
        expanded = torch.autograd.grad((red, cos_y), (x, w), (torch.ones(1).expand(BATCH),) * 2)
        for a, b in zip(dense, expanded, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("factor", [1.0, 65536.0, 1e-6])
    def test_loss_scale_in_fp16(self, backend, factor):
        """A GradScaler's factor, which alone would fill fp16's range, changes gradients by a rounding of it at most."""
        found = []
        for f in (1.0, factor):
            x, w, labels = ring()
            loss = margin_cross_entropy(x, w, labels, fm.ArcFace(0.5), backend=backend, compute_dtype=torch.float16)
            found.append([g / f for g in torch.autograd.grad(f * loss, (x, w))])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * float(a.abs().max()))
            assert a.isfinite().all()

    @pytest.mark.parametrize("operands", OPERANDS, ids=str)
    @pytest.mark.parametrize("side", ["x", "w"])
    @pytest.mark.parametrize("norms", test_edges.NORMS)
    def test_norms(self, backend, norms, side, operands):
        """Rows of w and x of any length, though fp16 holds numbers from 6e-8 to 65504 only."""
        p = problem(MARGINS["cosface"], mode_of(operands), 20, 40, 24)
        given = oracle.unit(p.tensors[side].double())
        factors = torch.tensor(test_edges.NORMS[norms], dtype=torch.float64).repeat(10)[: len(given), None]
        p.tensors[side] = (given * factors).float()
        check_by_rows([p], backend, side)

    def test_entries_of_a_row_that_differ_by_powers_of_ten(self, backend):
        """Beyond the range of fp16, which is the one that could lose them."""
        check_by_rows((uneven(seed, torch.float16) for seed in range(6)), backend, "w")

    @pytest.mark.parametrize("mode", ["fp32", "bf16_weight", "fp16_weight"])
    def test_rows_with_a_gap_between_them(self, backend, mode):
        """Rows of 33 numbers at strides of 40, which are whole 16 bytes: the last copy of a row must not read on."""
        p = problem(MARGINS["cosface"], MODES[mode], 20, 150, 33)
        for name in ("x", "w"):
            wide = torch.full((len(p.tensors[name]), 40), math.nan, dtype=p.tensors[name].dtype)
            wide[:, :33] = p.tensors[name]
            p.tensors[name] = wide[:, :33]
            assert p.leaves()[name].stride() == (40, 1)
        rule = ErrorRule()
        rule.add_all(cases.run(p, backend), cases.plain(p), cases.exact(p))
        rule.check()

    @pytest.mark.usefixtures("chunks")
    @pytest.mark.parametrize("mode", ["bf16_weight", "fp16_weight"])
    def test_weights_of_16_bits_in_several_chunks(self, backend, mode):
        cases.check((problem(MARGINS["cosface"], MODES[mode], BATCH, 300, 40, seed) for seed in range(2)), backend)

    @pytest.mark.parametrize("labels", [[5] * 40, [0, 1] * 20, [139] * 40], ids=["one class", "two", "the last"])
    def test_duplicate_labels(self, backend, labels):
        test_edges.test_duplicate_labels(backend, FP32, labels)

    def test_negative_scales_in_fp16(self, backend):
        p = problem(MARGINS["cosface"], mode_of(torch.float16), BATCH, CLASSES, 20)
        p.tensors["scale"], p.per = torch.full((BATCH,), -8.0), "sample"
        p.tensors["m"] = torch.full((BATCH,), 0.35)
        check_by_rows([p], backend, "w")

    @pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # numpy's, in Triton's interpreter
    @pytest.mark.parametrize("operands", OPERANDS, ids=str)
    @pytest.mark.parametrize("centers", [2, 3, pytest.param(16, marks=pytest.mark.slow)])
    def test_a_center_that_is_nan_is_seen(self, backend, centers, operands):
        """By every row: it is the rival, or the target, of each."""
        x, w, labels = ring(classes=30 * centers)
        labels %= 30
        labels[0] = 4
        with torch.no_grad():
            w[5 * centers - 1] = math.nan  # the last one of class 4
        options = {"sub_centers": centers, "compute_dtype": operands, "reduction": "none"}
        loss, d_x, _ = loss_and_gradients(backend, x, w, labels, **options)
        assert loss.isnan().all()
        assert d_x.isnan().any(1).all()
