"""Margins with a state: when it moves, by which rows, where it is kept; learned parameters."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import fused_margin as fm
from fused_margin.functional import margin_cross_entropy

from .cases import spread

B, C, D = 20, 12, 8


@pytest.fixture
def batch():
    x, _, labels = spread(B, C, D, 0)
    labels[[2, 5]] = -100
    return x.float(), labels


def head(margin, **options):
    torch.manual_seed(0)
    return fm.MarginHead(D, C, margin, **{"scale": 16.0} | options)


STATEFUL = {
    "curricularface": (lambda: {"margin": fm.CurricularFace()}, {"margin_module.t"}),
    "adaface": (lambda: {"margin": fm.AdaFace()}, {"margin_module.mean", "margin_module.std"}),
    "adacos": (lambda: {"margin": fm.NormFace(), "scale": fm.AdaCos(C)}, {"scale.s"}),
    "curricularface and adacos": (
        lambda: {"margin": fm.CurricularFace(), "scale": fm.AdaCos(C)},
        {"margin_module.t", "scale.s"},
    ),
}


def test_every_state_that_moves_is_tested():
    """KappaFace moves in `observe`; the buffers of the others are hyper-parameters, or there are none."""
    moving = {type(o) for make, _ in STATEFUL.values() for o in make().values()} - {fm.NormFace}
    still = {fm.ElasticFace, fm.AdaMSoftmax, fm.KappaFace, fm.SphereFace2, fm.UniFace}
    bases = (fm.StatefulMargin, fm.ScaleRule)
    public = {t for t in vars(fm).values() if isinstance(t, type) and issubclass(t, bases) and t not in bases}
    assert moving | still == public
    x, _, labels = spread(B, C, D, 0)
    for margin in (
        fm.ElasticFace(), fm.AdaMSoftmax(C), fm.KappaFace(torch.ones(C), D), fm.SphereFace2(C), fm.UniFace(C)
    ):  # fmt: skip
        module = head(margin)
        before = copy.deepcopy(module.state_dict())
        module(x.float(), labels)
        assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


@pytest.mark.parametrize("name", STATEFUL)
def test_state_moves_once_a_training_step_and_never_in_eval(name, backend, batch):
    make, keys = STATEFUL[name]
    module = head(**make(), backend=backend)
    assert set(module.state_dict()) == {"weight"} | keys
    before = copy.deepcopy(module.state_dict())
    module.eval()
    first = module(*batch)
    torch.testing.assert_close(module(*batch), first, rtol=0, atol=0)
    assert all(torch.equal(before[k], module.state_dict()[k]) for k in keys)
    module.train()
    loss, stats = module(*batch, return_stats=True)
    assert stats.correct >= 0
    after = {k: module.state_dict()[k].clone() for k in keys}
    assert all(not torch.equal(before[k], after[k]) for k in keys)
    loss.backward()
    assert all(torch.equal(after[k], module.state_dict()[k]) for k in keys), "the backward moves nothing"


@pytest.mark.parametrize("name", STATEFUL)
def test_state_travels_and_ignores_ignored_rows(name, batch):
    make, keys = STATEFUL[name]
    one, two, clean = head(**make()), head(**make()), head(**make())
    x, labels = batch
    one(x, labels)
    two.load_state_dict(one.state_dict())
    torch.testing.assert_close(two.eval()(x, labels), one.eval()(x, labels), rtol=0, atol=0)
    valid = labels >= 0
    clean(x[valid], labels[valid])
    for k in keys:
        torch.testing.assert_close(clean.state_dict()[k], one.state_dict()[k])
    kept = copy.deepcopy(one.train().state_dict())
    assert one(x, torch.full_like(labels, -100)).item() == 0
    assert all(torch.equal(kept[k], one.state_dict()[k]) for k in keys), "no valid row, no news"
    assert copy.deepcopy(one).state_dict().keys() == kept.keys()


def test_curricular_t_over_three_steps(batch):
    module, (x, labels) = head(fm.CurricularFace()), batch
    t = 0.0
    for _ in range(3):
        module(x, labels)
        c = F.cosine_similarity(x, module.weight[labels.clamp_min(0)])[labels >= 0]
        t = 0.99 * t + 0.01 * c.mean().item()
    assert module.margin_module.t.item() == pytest.approx(t, rel=1e-5)


@pytest.mark.parametrize(
    "name", [*STATEFUL, "elastic", "npc", "magface", "sphereface2", "sv of elastic", "sv of adaface"]
)
def test_compiles_without_graph_breaks_and_once(name, backend, batch):
    more = {
        "elastic": lambda: {"margin": fm.ElasticFace(sigma=0.0)},
        "npc": lambda: {"margin": fm.NPCFace()},
        "magface": lambda: {"margin": fm.MagFace(0.5, 1.5)},
        "sphereface2": lambda: {"margin": fm.SphereFace2(C)},
        "sv of elastic": lambda: {"margin": fm.SVSoftmax(1.2, fm.ElasticFace(sigma=0.0))},
        "sv of adaface": lambda: {"margin": fm.SVSoftmax(1.2, fm.AdaFace())},
    }
    module = head(**(STATEFUL[name][0] if name in STATEFUL else more[name])(), backend=backend)
    eager = copy.deepcopy(module)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        with torch.compiler.set_stance("fail_on_recompile" if _ else "default"):
            loss = compiled(*batch)
        torch.testing.assert_close(loss, eager(*batch))
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(module.state_dict()[key], value)


@pytest.mark.parametrize("make", [fm.SphereFace2, fm.UniFace, partial(fm.UniFace, per_class=True)])
def test_made_for_another_number_of_classes(make, batch):
    with pytest.raises(ValueError, match=f"was made for 5 classes, and the head has {C}"):
        head(make(5))(*batch)


def test_elastic_draws_are_repeated_by_the_seed(batch):
    for margin in (fm.ElasticFace(), fm.ElasticFace(kind="cos", plus=True)):
        module, losses = head(margin), []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            losses.append(module(*batch).item())
        assert losses[0] == losses[1] != losses[2]
        expected = fm.ArcFace(0.5, "raw") if margin.kind == "arc" else fm.CosFace(0.35)
        torch.testing.assert_close(
            module.eval()(*batch), margin_cross_entropy(batch[0], module.weight, batch[1], expected, scale=16.0)
        )


def test_elastic_plus_gives_small_margins_to_near_rows():
    """Of the margins that the same seed draws for the rows that count: the k-th nearest gets the k-th smallest."""
    c = torch.tensor([0.1, 0.95, 0.9, -0.3, 0.99, 0.5])
    valid = torch.tensor([True, False, True, True, False, True])
    found = fm.RowStats(valid, 5, c.dtype, c)
    margins = []
    for plus in (False, True):
        torch.manual_seed(3)
        margins.append(fm.ElasticFace(sigma=0.2, plus=plus).prepare(found, torch.zeros(6).long()).m.values)
    drawn = sorted(margins[0][valid].tolist())
    assert margins[1][[2, 5, 0, 3]].tolist() == drawn  # in falling order of their cosines
    assert not torch.equal(*margins)


@pytest.mark.parametrize(
    "options, sigma",
    [({}, 0.05), ({"kind": "cos"}, 0.05), ({"plus": True}, 0.0175), ({"plus": True, "kind": "cos"}, 0.02)],
)
def test_elastic_sigma_is_that_of_the_paper(options, sigma):
    margin = fm.ElasticFace(**options)
    assert margin.sigma == sigma
    rows = 20_000
    found = fm.RowStats(torch.ones(rows, dtype=torch.bool), 5, torch.float32, torch.linspace(-1, 1, rows))
    torch.manual_seed(0)
    drawn = margin.prepare(found, torch.zeros(rows).long()).m.values
    assert drawn.std().item() == pytest.approx(sigma, rel=0.02)
    assert drawn.mean().item() == pytest.approx(0.35 if "kind" in options else 0.5, abs=1e-3)


def test_learned_parameters_learn(backend, batch):
    for margin, scale in ((fm.AdaMSoftmax(C), 16.0), (fm.SphereFace2(C), 40.0), (fm.UniFace(C, per_class=True), 16.0)):
        module = head(margin, scale=scale, backend=backend)
        learned = [p for n, p in module.named_parameters() if n != "weight"]
        assert len(learned) == 1
        before, loss = learned[0].detach().clone(), module(*batch)
        loss.backward()
        torch.optim.SGD(module.parameters(), lr=1e-3).step()
        assert not torch.equal(learned[0], before)
        assert module(*batch).item() < loss.item()
    adam = head(fm.AdaMSoftmax(C), backend=backend)
    adam.margin_module.m.data.fill_(1.5)
    adam(*batch)
    assert adam.margin_module.m.max().item() == 1


@pytest.mark.parametrize("classes", [3, 40])
@pytest.mark.parametrize(
    "options", [{}, {"kind": "A"}, {"kind": "M"}, {"kind": "A", "m": 0.1}, {"kind": "C", "m": 0.1}]
)
@pytest.mark.parametrize("scale", [8.0, 40.0])
def test_sphereface2_starts_balanced(classes, options, scale, backend):
    """Where all cosines are 0 the loss is flat in b, with the margin in it; the loss itself is the oracle's in
    test_losses.py."""
    margin = fm.SphereFace2(classes, scale=scale, **options).double()
    w = torch.eye(classes, classes + 1, dtype=torch.float64)
    x = torch.eye(classes + 1, dtype=torch.float64)[-1:]
    loss = margin_cross_entropy(x, w, torch.tensor([1]), margin, scale=scale, backend=backend)
    (slope,) = torch.autograd.grad(loss, margin.b)
    alone = margin_cross_entropy(x, w[:1], torch.tensor([0]), margin_of_one(margin), scale=scale, backend=backend)
    (pull,) = torch.autograd.grad(alone, margin.b)
    assert abs(slope.item()) < 1e-4 * abs(pull.item())
    assert pull.item() < 0


def margin_of_one(margin):
    """The same with one class, so that nothing pushes."""
    margin.num_classes = 1
    return margin


def test_kappa_after_an_epoch():
    g = torch.Generator().manual_seed(0)
    counts = torch.tensor([5, 2, 9])
    margin = fm.KappaFace(counts, 4)
    x = torch.randn(60, 4, generator=g)
    labels = torch.arange(60) % 3
    x[labels == 1] = x[labels == 1] * 0.2 + torch.tensor([1.0, 0, 0, 0])
    for part in range(3):
        margin.observe(x[20 * part :][:20], labels[20 * part :][:20])
    margin.end_epoch()
    r = torch.stack([F.normalize(x[labels == j]).mean(0).norm() for j in range(3)])
    kappa = r * (4 - r**2) / (1 - r**2)
    standard = (kappa - kappa.mean()) / kappa.std()
    w = 0.7 * (1 - torch.sigmoid(0.4 * standard)) + 0.3 * (torch.cos(math.pi * counts / (1.05 * 9)) + 1) / 2
    torch.testing.assert_close(margin.margins(), 0.8 * w)


def test_kappa_leaves_out_rows_that_are_ignored_or_not_finite():
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(30, 4, generator=g), torch.arange(30) % 3
    one, two = (fm.KappaFace(torch.tensor([5, 2, 9]), 4) for _ in range(2))
    broken, marked, out = x.clone(), labels.int(), torch.tensor([3, 10, 20, 27])
    broken[3, 1], broken[10, 2], marked[20], marked[27], broken[27] = torch.inf, torch.nan, -100, -100, torch.nan
    rest = torch.ones(30, dtype=torch.bool).index_fill_(0, out, False)
    one.observe(broken, marked)
    two.observe(x[rest], labels[rest])
    assert one.seen.sum() == 26
    torch.testing.assert_close((one.sums, one.seen), (two.sums, two.seen), rtol=1e-6, atol=1e-6)


def test_kappa_of_one_class():
    margin = fm.KappaFace(torch.tensor([5]), 4)
    margin.observe(torch.randn(6, 4), torch.zeros(6, dtype=torch.long))
    margin.end_epoch()
    assert margin.kappa.tolist() == [0]
    expected = 0.8 * (0.7 * 0.5 + 0.3 * (math.cos(math.pi / 1.05) + 1) / 2)
    assert margin.margins().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "size, labels, error, message",
    [
        (5, [0, 1], ValueError, r"embeddings have shape \[2, 5\]; expected \[B, 4\]"),
        (4, [0, 3], RuntimeError, r"labels\[1\] = 3 is outside \[0, 3\)"),
        (4, [0.0, 1.0], TypeError, r"labels are torch\.float32; expected integers"),
        (4, [0], ValueError, r"labels have shape \[1\]; expected \[2\]"),
    ],
)
def test_kappa_refuses(size, labels, error, message):
    margin = fm.KappaFace(torch.tensor([5, 2, 9]), 4)
    with pytest.raises(error, match=message):
        margin.observe(torch.ones(2, size), torch.tensor(labels))
    assert not margin.seen.any()


def test_adacos_on_the_head(batch):
    module = head(fm.NormFace(), scale=fm.AdaCos(C))
    module(*batch)
    torch.testing.assert_close(
        module.logits(batch[0]), module.scale.s * F.linear(F.normalize(batch[0]), F.normalize(module.weight))
    )
    assert "AdaCos" in repr(module)
