"""Margins and scales that a schedule changes: by hand, without compiling anew, and what is refused."""

import math
from functools import partial

import pytest
import torch

import fused_margin as fm
from fused_margin.functional import margin_cross_entropy
from fused_margin.schedules import Exponential, Linear, MarginSchedule, SphereFaceAnnealing

from .cases import spread
from .test_state import B, C, D, head


@pytest.fixture
def batch():
    x, _, labels = spread(B, C, D, 0)
    return x.float(), labels


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


def test_a_schedule_may_fall():
    """Lambda, temperature, scale: a start above the end is no mistake."""
    assert [Linear(1000.0, 5.0, 2)(k) for k in (0, 1, 2, 3)] == [1000, 502.5, 5, 5]
    assert [Exponential(1.0, 0.0, 10)(k) for k in (0, 10, 20)] == pytest.approx([1, 0, 0])


def test_a_step_count_that_was_loaded_is_written():
    """state_dict and load_state_dict: the head that goes on has the number of that step."""
    module = head(fm.ArcFace(torch.tensor(0.0)))
    warm_up = MarginSchedule(module, "m", Linear(0.0, 0.5, 10))
    warm_up.load_state_dict({"last_step": 4})
    assert module.margin_m.item() == pytest.approx(0.2)
    warm_up.step()
    assert module.margin_m.item() == pytest.approx(0.25)
    assert warm_up.state_dict() == {"last_step": 5}


def _tensor(value):
    return torch.tensor(float(value))


BAD = {
    "steps": (lambda: Linear(0, 1, -3), ValueError, "steps = -3; expected an integer, at least 1"),
    "half a step": (lambda: Exponential(0, 1, 2.5), ValueError, "steps = 2.5"),
    "start": (lambda: Linear(math.nan, 1, 3), ValueError, "start = nan"),
    "end": (lambda: Linear(0, "1", 3), TypeError, "end: got '1'; expected a plain number"),
    "tensor": (lambda: Linear(_tensor(0), 1, 3), TypeError, "start: got a Tensor; expected a plain number"),
    "rate": (lambda: Exponential(0, 1, 3, rate=0), ValueError, "rate = 0"),
    "annealing": (lambda: SphereFaceAnnealing(base=1.0), ValueError, "lambda falls from base to minimum"),
    "negative": (lambda: SphereFaceAnnealing(gamma=-1), ValueError, "gamma = -1"),
    "head": (
        lambda: MarginSchedule(fm.ArcFace(), "m", Linear(0, 1, 3)),
        TypeError,
        "head: got ArcFace; expected",
    ),
    "schedule": (
        lambda: MarginSchedule(head(fm.ArcFace(_tensor(0.5))), "m", 0.5),
        TypeError,
        r"schedule: got 0.5; expected a function of the step, as Linear",
    ),
    "per class": (
        lambda: MarginSchedule(head(fm.ArcFace(torch.full((C,), 0.3))), "m", Linear(0, 0.5, 3)),
        ValueError,
        r"m has shape \[\d+\]; .* expected a 0-dim tensor",
    ),
    "learnable": (
        lambda: MarginSchedule(head(fm.ArcFace(torch.nn.Parameter(_tensor(0.3)))), "m", Linear(0, 0.5, 3)),
        ValueError,
        "m learns, and a schedule would overwrite",
    ),
    "attribute": (
        lambda: MarginSchedule(head(fm.ArcFace(_tensor(0.5))), "margin", Linear(0, 0.5, 3)),
        ValueError,
        r"the head has no tensor 'margin' \(it has 'm'\)",
    ),
    "margin": (
        lambda: MarginSchedule(head(fm.ArcFace(_tensor(0.5))), "m", Linear(-0.1, 0.5, 3)),
        ValueError,
        r"m = -0.1; expected a finite number in \[0, 3.14",
    ),
    "margin of a base": (
        lambda: MarginSchedule(head(fm.SVSoftmax(1.2, fm.SphereFace(_tensor(2)))), "base.m", Linear(0.5, 2, 3)),
        ValueError,
        "m = 0.5",
    ),
    "margin of a module": (
        lambda: MarginSchedule(head(fm.AdaFace(_tensor(0.4))), "m", Linear(2.0, 0.4, 3)),
        ValueError,
        "m = 2.0",
    ),
    "t": (lambda: MarginSchedule(head(fm.SVSoftmax(_tensor(1.2))), "t", lambda k: 0.9), ValueError, "t = 0.9"),
    "not a number": (
        lambda: MarginSchedule(head(lambda c: c, scale=_tensor(30)), "scale", lambda k: math.nan),
        ValueError,
        "scale = nan",
    ),
    "scale": (
        lambda: MarginSchedule(head(fm.NormFace(), scale=_tensor(30)), "scale", Linear(0, 30, 3)),
        ValueError,
        "scale = 0",
    ),
    "loaded": (
        lambda: MarginSchedule(head(fm.ArcFace(_tensor(0))), "m", Linear(0, 1, 3)).load_state_dict({"last_step": -1}),
        ValueError,
        "last_step = -1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()


def test_a_number_out_of_range_leaves_the_margin_as_it_is():
    module = head(fm.ArcFace(torch.tensor(0.3)))
    warm_up = MarginSchedule(module, "m", lambda step: 0.3 if step < 1 else 5.0)
    with pytest.raises(ValueError, match=r"m = 5\.0"):
        warm_up.step()
    assert module.margin_m.item() == pytest.approx(0.3)


def test_repr_shows_what_the_schedule_wrote():
    module = head(fm.SVSoftmax(torch.tensor(1.0), fm.ArcFace(torch.tensor(0.0))), scale=torch.tensor(8.0))
    for name, end in (("base.m", 0.5), ("t", 1.2), ("scale", 32.0)):
        schedule = MarginSchedule(module, name, Linear(1.0 if name == "t" else 0.25, end, 1))
        schedule.step()
    assert "SVSoftmax(t=1.2, base=ArcFace(m=0.5, tail='linear'" in repr(module)
    assert "scale=32.0" in repr(module)
    module = head(fm.CurricularFace(torch.tensor(0.1)))
    MarginSchedule(module, "m", Linear(0.1, 0.5, 1)).step()
    assert "CurricularFace(m=0.5, rate=0.01)" in repr(module)
