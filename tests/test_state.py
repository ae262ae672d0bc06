"""Margins with a state: when it moves, by which rows, where it is kept; schedules; learned parameters; sub-centres."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fused_margin as fm
from fused_margin.functional import margin_cross_entropy
from fused_margin.schedules import Exponential, Linear, MarginSchedule, SphereFaceAnnealing

from . import oracle
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
}


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


@pytest.mark.parametrize("name", [*STATEFUL, "elastic", "npc", "magface", "sphereface2", "sv of elastic"])
def test_compiles_without_graph_breaks_and_once(name, backend, batch):
    more = {
        "elastic": lambda: {"margin": fm.ElasticFace(sigma=0.0)},
        "npc": lambda: {"margin": fm.NPCFace()},
        "magface": lambda: {"margin": fm.MagFace(0.5, 1.5)},
        "sphereface2": lambda: {"margin": fm.SphereFace2(C)},
        "sv of elastic": lambda: {"margin": fm.SVSoftmax(1.2, fm.ElasticFace(sigma=0.0))},
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


def test_a_schedule_moves_the_margin_without_compiling_anew(backend, batch):
    module = head(fm.SVSoftmax(torch.tensor(1.0), fm.ArcFace(torch.tensor(0.0))), backend=backend)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    warm_up = MarginSchedule(module, "base.m", Linear(0.0, 0.5, 4))
    harder = MarginSchedule(module, "t", Linear(1.0, 1.2, 4))
    for step in range(6):
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            loss = compiled(*batch)
        m = 0.5 * min(step / 4, 1)
        margin = fm.SVSoftmax(1 + 0.2 * min(step / 4, 1), fm.ArcFace(m))
        torch.testing.assert_close(loss, margin_cross_entropy(batch[0], module.weight, batch[1], margin, scale=16.0))
        warm_up.step()
        harder.step()
    assert module.margin_base_m.item() == 0.5


@pytest.mark.parametrize(
    "make", [fm.CurricularFace, fm.AdaFace, partial(fm.ElasticFace, sigma=0.0), partial(fm.UniFace, C)]
)
def test_a_schedule_moves_the_margin_of_a_module(make, batch):
    """A margin with a state or parameters takes m as a tensor too, and keeps it as a buffer."""
    module = head(make(m=torch.tensor(0.0)))
    assert "margin_module.m" in module.state_dict()
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    warm_up = MarginSchedule(module, "m", Linear(0.0, 0.4, 2))
    for step in range(4):
        expected = head(make(m=0.2 * min(step, 2)))
        kept = {k: v for k, v in module.state_dict().items() if not k.endswith("module.m")}
        expected.load_state_dict(kept)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            torch.testing.assert_close(compiled(*batch), expected(*batch))
        warm_up.step()
    assert module.margin_module.m.item() == pytest.approx(0.4)


@pytest.mark.parametrize("make", [fm.SphereFace2, fm.UniFace, partial(fm.UniFace, per_class=True)])
def test_made_for_another_number_of_classes(make, batch):
    with pytest.raises(ValueError, match=f"was made for 5 classes, and the head has {C}"):
        head(make(5))(*batch)


def test_schedules_by_hand():
    assert [Linear(0.1, 0.5, 4)(k) for k in (0, 2, 4, 9)] == pytest.approx([0.1, 0.3, 0.5, 0.5])
    middle = 0.2 * (1 - math.exp(-math.log(1000) / 2)) / (1 - 1e-3)
    assert [Exponential(0, 0.2, 100)(k) for k in (0, 50, 100, 500)] == pytest.approx([0, middle, 0.2, 0.2])
    annealing = SphereFaceAnnealing()
    assert [annealing(k) for k in (0, 100, 10_000)] == pytest.approx([1000, 1000 / 13, 5])


def test_schedule_state_and_errors(batch):
    module = head(fm.Annealed(fm.SphereFace(4), torch.tensor(5.0)), scale=torch.tensor(30.0))
    lam = MarginSchedule(module, "lam", SphereFaceAnnealing())
    assert module.margin_lam.item() == 1000
    for _ in range(100):
        lam.step()
    other = head(fm.Annealed(fm.SphereFace(4), torch.tensor(5.0)))
    again = MarginSchedule(other, "lam", SphereFaceAnnealing())
    again.load_state_dict(lam.state_dict())
    assert other.margin_lam.item() == module.margin_lam.item() == pytest.approx(1000 / 13)
    MarginSchedule(module, "scale", Linear(10, 20, 2)).step()
    assert module.scale.item() == 15
    with pytest.raises(ValueError, match=r"no tensor 'm' \(it has none\); .* make it a tensor: fm.ArcFace"):
        MarginSchedule(head(fm.ArcFace(0.5)), "m", Linear(0, 0.5, 10))
    with pytest.raises(
        ValueError, match=r"no tensor 'scale' \(it has 't'\); .* scale=torch.tensor\(64.0\) has 'scale'"
    ):
        MarginSchedule(head(fm.CurricularFace()), "scale", Linear(1, 2, 3))
    with pytest.raises(ValueError, match="steps = 0"):
        Linear(0, 1, 0)


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
    margin = fm.ElasticFace(sigma=0.2, plus=True)
    c = torch.tensor([0.1, 0.9, 0.5])
    torch.manual_seed(3)
    m = margin.prepare(fm.RowStats(torch.ones(3, dtype=torch.bool), 5, c.dtype, c), torch.zeros(3).long()).m.values
    assert m[1] < m[2] < m[0]


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


@pytest.mark.parametrize("classes, kind", [(3, "C"), (1000, "C"), (1000, "A"), (10, "M")])
def test_sphereface2_starts_balanced(classes, kind):
    """At cosines of 0 the target pulls as hard as all rivals push."""
    margin = fm.SphereFace2(classes, kind)
    m = 0.4 if kind == "C" else 0.0
    b, g = margin.b.double(), 2 * 0.5**3 - 1
    pull = 0.7 * torch.sigmoid(-(40 * (g - m) + b))
    push = 0.3 * (classes - 1) * torch.sigmoid(40 * (g + m) + b)
    assert (pull / push).item() == pytest.approx(1, rel=1e-4)


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


def test_adacos_on_the_head(batch):
    module = head(fm.NormFace(), scale=fm.AdaCos(C))
    module(*batch)
    torch.testing.assert_close(
        module.logits(batch[0]), module.scale.s * F.linear(F.normalize(batch[0]), F.normalize(module.weight))
    )
    assert "AdaCos" in repr(module)


class TestSubCentres:
    K = 3

    @pytest.fixture
    def data(self):
        torch.manual_seed(0)
        w = F.normalize(torch.randn(C * self.K, D))
        labels = torch.arange(120) % C
        place = torch.where(torch.arange(120) % 5 == 0, 2, 1)  # most samples sit at the centre 1
        return w[labels * self.K + place] + 0.02 * torch.randn(120, D), w, labels, place

    def test_outliers(self, data):
        x, w, labels, place = data
        found = fm.find_outliers(x, w, labels, self.K, angle=20)
        assert found.main.tolist() == [1] * C
        assert found.counts.sum().item() == 120
        assert torch.equal(found.counts[:, 2], torch.bincount(labels[place == 2], minlength=C))
        expected = torch.rad2deg(torch.acos(F.cosine_similarity(x, w[labels * self.K + 1])))
        torch.testing.assert_close(found.angle, expected, rtol=1e-3, atol=1e-2)
        assert torch.equal(found.outlier, expected >= 20)
        torch.testing.assert_close(found.main_rows(w), w[1 :: self.K])

    def test_head(self, data, backend):
        x, w, labels, _ = data
        module = fm.MarginHead(D, C, fm.ArcFace(0.3), 16.0, sub_centers=self.K, backend=backend)
        assert module.weight.shape == (C * self.K, D)
        with torch.no_grad():
            module.weight.copy_(w)
        cos = oracle.cosines(x, w, labels, sub_centers=self.K).c
        torch.testing.assert_close(module.logits(x), 16 * cos)
        values, classes = module.topk(x, 3)
        torch.testing.assert_close(values, cos.topk(3).values)
        assert torch.equal(classes[:, 0], cos.argmax(1))
        assert module.outliers(x, labels, 20).outlier.sum() > 0
        assert "sub_centers=3" in repr(module)

    def test_no_tensor_of_all_centres(self):
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

    def test_errors(self, data):
        x, w, labels, _ = data
        with pytest.raises(ValueError, match="no multiple of sub_centers = 5"):
            fm.find_outliers(x, w, labels, 5)
        with pytest.raises(ValueError, match="weight has 36 rows, no multiple of sub_centers = 5"):
            margin_cross_entropy(x, w, labels, fm.ArcFace(), sub_centers=5)
        with pytest.raises(ValueError, match="sub_centers = 0; expected a positive integer"):
            fm.MarginHead(D, C, sub_centers=0)
        with pytest.raises(ValueError, match="angle = 200"):
            fm.find_outliers(x, w, labels, self.K, 200)
