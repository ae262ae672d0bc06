"""A head over ranks gives what one process gives: each loss of the table against the float64 oracle, sampled or not."""

import copy
import math

import pytest
import torch
import torch.distributed as dist

import fused_margin as fm

from ..cases import FP64
from ..conftest import require
from ..error_rule import ErrorRule
from ..loss_table import LOSSES
from ..test_losses import BATCH, CLASSES, MODES, data, dense
from .sharded import build, part, plain, step, together
from .threads import run_threads

SPLITS = {1: [41], 2: [20, 21], 3: [20, 0, 21], 4: [11, 11, 11, 8]}
DRAWN = {name for name in LOSSES if name.startswith("elastic")}  # from torch's generator, which threads share
NAMES = [name for name in LOSSES if name not in DRAWN]
THOROUGH = (
    "a-softmax",
    "arcface-linear",
    "sv-x-arc",
    "curricularface",
    "npcface",
    "magface",
    "sub-center",
    "uniface-bce",
)
EVERY_WORLD = [(name, world) for name in THOROUGH for world in SPLITS]
OTHERS = [(name, 2 + place % 3) for place, name in enumerate(n for n in NAMES if n not in THOROUGH)]


def backend_of(name):
    return require("cpu" if LOSSES[name].kernel else "reference")


def run(name, mode, inputs, world, splits=None, **more):
    splits, backend = splits or SPLITS[world], backend_of(name)

    def body():
        return step(build(name, mode, inputs, backend=backend, **more), inputs, splits)

    return run_threads(world, body) if world > 1 else [body()]


def exact(name, mode, inputs, gradient="exact", **more):
    return dense(name, mode, inputs, gradient, torch.float64, **more)


def compare(got, expected):
    rule = ErrorRule()
    rule.add_all(got, None, expected)
    rule.check()


@pytest.mark.parametrize("name, world", [*EVERY_WORLD, *OTHERS])
def test_loss(name, world):
    inputs = data(name, FP64, 0)
    compare(together(run(name, FP64, inputs, world), inputs[1]), exact(name, FP64, inputs))


@pytest.mark.parametrize("name, world", [*EVERY_WORLD, *OTHERS])
def test_sampled(name, world):
    """The same with the classes of the head's own sample; the gradient has only these rows."""
    if name == "label-smoothing":
        pytest.skip("the oracle smooths over all classes: see test_smoothing_over_the_sample")
    sparse = not name.startswith("l-softmax")  # whose weights get a gradient by their norm too
    inputs = data(name, FP64, 1)
    sampling = ("stratified", "uniform", "hard")[world % 3]
    outcomes = run(name, FP64, inputs, world, sample_rate=0.3, sampling=sampling, sparse_grad=sparse)
    chosen = torch.cat([o.swept for o in outcomes])
    swept = torch.zeros(CLASSES, dtype=torch.bool).index_fill_(0, chosen, True)
    assert all(o.sparse == sparse for o in outcomes)
    assert BATCH <= len(chosen) == int(swept.sum())
    if world < 3:
        assert len(chosen) < CLASSES
    got = together(outcomes, inputs[1])
    rows = got["d_w"].view(CLASSES, -1).any(1)
    assert not rows[~swept].any()
    compare(got, exact(name, FP64, inputs, swept=swept))


def test_smoothing_over_the_sample():
    inputs = x, w, labels = data("label-smoothing", FP64, 1)
    outcomes = run("label-smoothing", FP64, inputs, 2, sample_rate=0.3)
    chosen = torch.cat([o.swept for o in outcomes])
    valid = labels >= 0
    cos = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(w[chosen]).T
    place = torch.searchsorted(chosen, labels.clamp_min(chosen[0]))
    own = (torch.acos(cos.gather(1, place[:, None])) + 0.5).cos()
    beyond = cos.gather(1, place[:, None]) < -math.cos(0.5)
    own = torch.where(beyond, cos.gather(1, place[:, None]) - 0.5 * math.sin(0.5), own)
    logits = 16 * cos.scatter(1, place[:, None], own)
    expected = torch.nn.functional.cross_entropy(logits, place, label_smoothing=0.1, reduction="none")
    got = torch.cat([o.loss for o in outcomes])
    torch.testing.assert_close(got[valid], expected[valid], rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["arcface-linear", "sv-x-am", "magface"])
def test_detached_gradient(name):
    inputs = data(name, FP64, 0)
    got = together(run(name, FP64, inputs, 3, gradient="detached"), inputs[1])
    compare(got, exact(name, FP64, inputs, "detached"))


@pytest.mark.parametrize("name", ["curricularface", "sv-x-arc", "uniface", "a-softmax", "sub-center"])
def test_64_ranks(name):
    """131 classes: 20 ranks have none."""
    inputs = data(name, FP64, 2)
    splits = [1, 0, 2, 0, 0] * 13
    splits = [*splits[:63], BATCH - sum(splits[:63])]
    compare(together(run(name, FP64, inputs, 64, splits), inputs[1]), exact(name, FP64, inputs))


@pytest.mark.parametrize("name", ["arcface-linear", "curricularface", "npcface"])
def test_fewer_classes_than_ranks(name):
    inputs = data(name, FP64, 0, (8, 3, 16))
    got = together(run(name, FP64, inputs, 5, [2, 2, 2, 2, 0]), inputs[1])
    compare(got, exact(name, FP64, inputs))
    sampled = together(run(name, FP64, inputs, 5, [0, 2, 2, 2, 2], sample_rate=0.1), inputs[1])
    compare(sampled, exact(name, FP64, inputs))  # the batch is larger than the shards: all classes are swept


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["arcface-linear", "sv-x-am", "a-softmax", "label-smoothing"])
def test_error_rule(name, mode):
    """In less than float64, 3 ranks lose no more than the rule allows one process."""
    mode, rule = MODES[mode], ErrorRule()
    for seed in range(8):
        inputs = data(name, mode, seed)
        got = together(run(name, mode, inputs, 3), inputs[1])
        rule.add_all(got, dense(name, mode, inputs, "exact", None, mode.operands), exact(name, mode, inputs))
    rule.check()


@pytest.mark.parametrize("merged_by", ["gather", "all-reduce"])
@pytest.mark.parametrize("name", ["sv-x-arc", "uniface", "npcface", "label-smoothing"])
def test_both_ways_to_merge(name, merged_by, monkeypatch):
    """Where all ranks' results are too many to gather, two all-reduces give the same."""
    if merged_by == "all-reduce":
        monkeypatch.setattr("fused_margin.partial_fc.ranks.GATHERED_BYTES", 0)
    inputs = data(name, FP64, 3)
    compare(together(run(name, FP64, inputs, 3), inputs[1]), exact(name, FP64, inputs))
    few = data(name, FP64, 0, (8, 1, 16))  # no rival anywhere: all log-sum-exps are -inf
    compare(together(run(name, FP64, few, 3, [3, 3, 2]), few[1]), exact(name, FP64, few))


@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_same_bits_twice(rate):
    inputs = data("sv-x-arc", MODES["fp32"], 0)
    first, second = (run("sv-x-arc", MODES["fp32"], inputs, 3, sample_rate=rate) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.loss, b.loss)
        assert torch.equal(a.d_x, b.d_x)
        assert torch.equal(a.d_w, b.d_w)


def test_first_weights_do_not_depend_on_the_ranks():
    def weights():
        head = fm.PartialFC(6, 9000, seed=3)
        return plain(head.weight.detach())

    whole = fm.PartialFC(6, 9000, seed=3).weight.detach()
    assert torch.equal(torch.cat(run_threads(4, weights)), whole)
    assert 0.0098 < whole.std() < 0.0102
    assert abs(whole.mean()) < 2e-4
    assert not torch.equal(whole, fm.PartialFC(6, 9000, seed=4).weight)


class TestOptions:
    """What a head can be given besides a margin, on 3 ranks against a MarginHead in float64."""

    D, C, B = 12, 23, 17
    SPLITS = (5, 9, 3)

    def inputs(self):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(self.B, self.D, generator=g, dtype=torch.float64)
        labels = torch.randint(self.C, (self.B,), generator=g)
        labels[3] = -100
        weights = torch.rand(self.B, generator=g, dtype=torch.float64)
        return x, labels, weights, 0.5 + torch.rand(self.C, generator=g, dtype=torch.float64)

    def options(self, which):
        per_class = self.inputs()[3]
        m = torch.nn.Parameter(0.4 * per_class)
        return {
            "margins by class": {"margin": fm.ArcFace(0.4 * per_class)},
            "margins that learn": {"margin": fm.CosFace(m)},
            "in a base": {"margin": fm.SVSoftmax(1.2, fm.CosFace(m))},
            "scale that learns": {"scale": torch.nn.Parameter(torch.tensor(9.0, dtype=torch.float64))},
            "bias": {"margin": fm.NormFace(), "bias": True},
            "class weights": {"class_weight": per_class},
            "both": {"class_weight": per_class, "margin": fm.CosFace(m)},
            "smoothing": {"label_smoothing": 0.1},
            "focal": {"mining": fm.Focal(2.0), "reduction": "sum"},
            "hard rows": {"mining": fm.HardRows(0.5)},
        }[which]

    @pytest.mark.parametrize("sample_weight", [False, True])
    @pytest.mark.parametrize(
        "which",
        ["margins by class", "margins that learn", "in a base", "scale that learns", "bias", "class weights", "both",
         "smoothing", "focal", "hard rows"],
    )  # fmt: skip
    def test_against_one_process(self, which, sample_weight):
        x, labels, weights, _ = self.inputs()
        weights = weights if sample_weight else None

        def build(make):
            given = {"margin": fm.ArcFace(0.3), "scale": 8.0, "dtype": torch.float64} | self.options(which)
            head = make(self.D, self.C, **given)
            if head.bias is not None:
                with torch.no_grad():
                    full = torch.linspace(-1, 1, self.C, dtype=torch.float64)
                    plain(head.bias.data).copy_(head.layout.part(full) if make is fm.PartialFC else full)
            return head

        one = build(fm.MarginHead)
        first = fm.PartialFC(self.D, self.C, dtype=torch.float64).weight.detach()
        with torch.no_grad():
            one.weight.copy_(first)
        own = x.clone().requires_grad_()
        expected, known = one(own, labels, True, sample_weight=weights)
        expected.backward()

        def body():
            head, mine = build(fm.PartialFC), part(self.SPLITS)
            local = x[mine].clone().requires_grad_()
            loss, stats = head(local, labels[mine], True, sample_weight=None if weights is None else weights[mine])
            loss.backward()
            return loss.detach(), stats, local.grad, {n: plain(p.grad) for n, p in head.named_parameters()}

        out = run_threads(3, body)
        rule = ErrorRule()
        rule.add("d_x", torch.cat([o[2] for o in out]) / 3, None, own.grad)
        for name, p in one.named_parameters():
            grads = [o[3][name] for o in out]
            rule.add(name, torch.cat(grads) if p.shape[:1] == (self.C,) else grads[1], None, p.grad)
        for o in out:
            rule.add("loss", o[0], None, expected.detach())
            assert int(o[1].correct) == int(known.correct)
        for field in ("target_cosine", "best_rival_cosine", "lse", "hard_rivals"):
            got = torch.cat([getattr(o[1], field) for o in out])
            rule.add(field, got[labels >= 0], None, getattr(known, field)[labels >= 0])
        rule.check()

    def test_embedding_grad(self):
        """ "ddp" is "sum" times the number of ranks, for all paths by which embeddings get a gradient."""
        x, labels, _, _ = self.inputs()

        def body():
            found = []
            for kind in ("ddp", "sum"):
                head = fm.PartialFC(
                    self.D, self.C, fm.MagFace(1.0, 6.0), "norm", embedding_grad=kind, dtype=torch.float64
                )
                local = x[part(self.SPLITS)].clone().requires_grad_()
                head(local, labels[part(self.SPLITS)]).backward()
                found.append(local.grad)
            return found

        for ddp, total in run_threads(3, body):
            torch.testing.assert_close(ddp, 3 * total, rtol=1e-12, atol=0)

    def test_topk(self):
        x, _, _, _ = self.inputs()
        whole = fm.PartialFC(self.D, self.C, dtype=torch.float64)
        expected = fm.functional.topk(x, whole.weight.detach(), 9)

        def body():
            return fm.PartialFC(self.D, self.C, dtype=torch.float64).topk(x[part(self.SPLITS)], 9)

        out = run_threads(3, body)
        torch.testing.assert_close(torch.cat([o[0] for o in out]), expected[0])
        assert torch.equal(torch.cat([o[1] for o in out]), expected[1])

    @pytest.mark.parametrize("capacity", [9, 12])
    def test_rows_without_exchange_of_their_number(self, capacity):
        """max_local_batch: rows that fill up change nothing, not even in a margin's state."""
        x, labels, _, _ = self.inputs()

        def body(**more):
            head = fm.PartialFC(self.D, self.C, fm.CurricularFace(), dtype=torch.float64, **more)
            local = x[part(self.SPLITS)].clone().requires_grad_()
            head(local, labels[part(self.SPLITS)]).backward()
            return local.grad, plain(head.weight.grad), head.margin_module.t

        usual, fixed = run_threads(3, body), run_threads(3, lambda: body(max_local_batch=capacity))
        for a, b in zip(usual, fixed, strict=True):
            for one, other in zip(a, b, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)

    def test_gradients_add_up(self):
        """Two backwards: the sum, dense and sparse."""
        x, labels, _, _ = self.inputs()

        def body(sparse):
            head = fm.PartialFC(self.D, self.C, sparse_grad=sparse, dtype=torch.float64)
            mine = part(self.SPLITS)
            head(x[mine], labels[mine]).backward()
            once = plain(head.weight.grad).clone()
            head(x[mine], labels[mine]).backward()
            torch.testing.assert_close(plain(head.weight.grad), 2 * once, rtol=1e-12, atol=0)

        run_threads(3, lambda: body(True))
        run_threads(3, lambda: body(False))

    def test_eval_sweeps_all_classes_and_moves_nothing(self):
        x, labels, _, _ = self.inputs()
        classes = 20 * self.C  # so that a sample would not be all of them
        whole = fm.PartialFC(self.D, classes, fm.CurricularFace(), dtype=torch.float64).eval()

        def body():
            head = fm.PartialFC(self.D, classes, fm.CurricularFace(), sample_rate=0.1, dtype=torch.float64).eval()
            before = copy.deepcopy({k: plain(v) for k, v in head.state_dict().items()})
            loss = head(x[part(self.SPLITS)], labels[part(self.SPLITS)])
            assert all(torch.equal(plain(v), before[k]) for k, v in head.state_dict().items())
            return loss.item()

        assert run_threads(3, body) == pytest.approx([whole(x, labels).item()] * 3, rel=1e-12)


def test_two_groups_of_ranks():
    """Each group is a head of its own."""
    inputs = data("arcface-linear", FP64, 0)
    expected = exact("arcface-linear", FP64, inputs)

    def body():
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        group = groups[dist.get_rank() // 2]
        head = build("arcface-linear", FP64, inputs, process_group=group)
        mine = slice(0, 20) if head.ranks.rank == 0 else slice(20, 41)
        losses = head(inputs[0][mine], inputs[2][mine]).detach()
        return head.layout.first, losses

    out = run_threads(4, body)
    assert [first for first, _ in out] == [0, 66, 0, 66]
    for pair in (out[:2], out[2:]):
        torch.testing.assert_close(torch.cat([losses for _, losses in pair]), expected["loss"])
