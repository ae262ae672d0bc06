"""Heads and margins as modules: 16-bit casts, tensors of the caller, forwards that a checkpoint runs again."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_margin as fm
from fused_margin.state import KeepsPrecision

from .cases import spread
from .test_state import STATEFUL, B, C, D, head


@pytest.fixture
def batch():
    x, _, labels = spread(B, C, D, 0)
    return x.float(), labels


HELD = {  # heads with buffers of every kind
    **{name: make for name, (make, _) in STATEFUL.items()},
    "kappaface": lambda: {"margin": fm.KappaFace(1 + torch.arange(C) % 3, D)},
    "margin": lambda: {"margin": fm.ArcFace(torch.tensor(0.35)), "scale": torch.tensor(30.1)},
    "per class": lambda: {"margin": fm.CosFace(torch.linspace(0.1, 0.4, C)), "class_weight": torch.linspace(0.1, 1, C)},
    "of a module": lambda: {"margin": fm.AdaFace(torch.tensor(0.35))},
}
CASTS = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "to": lambda m: m.to("cpu", torch.bfloat16),
    "inside a network": lambda m: nn.ModuleDict({"head": m}).half()["head"],
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", HELD)
def test_buffers_keep_their_precision(name, cast):
    """m = 0.35 is 0.3496 in bfloat16, and a mean that moves by a hundredth stands still."""
    module = head(**HELD[name]())
    before = {n: b.clone() for n, b in module.named_buffers()}
    assert before
    cast_to = CASTS[cast](module)
    assert cast_to.weight.dtype in (torch.bfloat16, torch.float16)
    for n, b in cast_to.named_buffers():
        assert b.dtype == before[n].dtype == torch.float32
        assert torch.equal(b, before[n])
    assert all(b.dtype == torch.float64 for b in module.double().buffers())
    assert all(b.dtype == torch.float64 for b in module.half().buffers()), "nor does double become single"
    assert all(b.dtype == torch.float32 for b in module.float().buffers())
    elsewhere = module.to("meta", torch.bfloat16)
    assert all((b.device.type, b.dtype) == ("meta", torch.float32) for b in elsewhere.buffers())


@pytest.mark.parametrize("name", STATEFUL)
def test_the_state_of_a_16_bit_head_moves(name, batch):
    """As in a float32 head on the same numbers: 0.01 of a distance is below bfloat16's last place."""
    make, keys = STATEFUL[name]
    one, two = head(**make(), compute_dtype=torch.float32), head(**make(), compute_dtype=torch.float32).bfloat16()
    with torch.no_grad():
        one.weight.copy_(two.weight)
    x, labels = batch
    x = x.bfloat16()
    for _ in range(3):
        one(x.float(), labels)
        two(x, labels)
    for key in keys:
        torch.testing.assert_close(two.state_dict()[key], one.state_dict()[key], rtol=1e-4, atol=1e-6)


def test_a_centre_loss_keeps_its_centres():
    loss = fm.CenterLoss(D, C)
    assert isinstance(loss, KeepsPrecision)
    assert loss.half().centers.dtype == torch.float32


def test_a_head_copies_the_tensors_it_is_given():
    """A schedule of one head must not move the caller's tensor, nor another head's."""
    given = {
        "m": torch.tensor(0.5),
        "scale": torch.tensor(30.0),
        "class_weight": torch.ones(C),
        "ada": torch.tensor(0.4),
    }
    heads = [
        fm.MarginHead(D, C, margin, given["scale"], class_weight=given["class_weight"])
        for margin in (fm.ArcFace(given["m"]), fm.ArcFace(given["m"]), fm.AdaFace(given["ada"]))
    ]
    before = {n: t.clone() for n, t in given.items()}
    for t in given.values():
        t.mul_(2)
    for module in heads:
        assert module.scale == before["scale"]
        assert torch.equal(module.class_weight, before["class_weight"])
    assert heads[0].margin.m == before["m"]
    assert heads[2].margin.m == before["ada"]
    fm.schedules.MarginSchedule(heads[0], "m", lambda step: 0.1)
    assert heads[1].margin.m == before["m"]
    assert given["m"] == 2 * before["m"]


def test_a_parameter_stays_the_callers():
    """So that an optimizer which has it goes on with it."""
    m = nn.Parameter(torch.full((C,), 0.3))
    assert fm.MarginHead(D, C, fm.CosFace(m)).margin_m is m


DRAWN = {
    **STATEFUL,
    "elasticface": (lambda: {"margin": fm.ElasticFace(plus=True)}, set()),
    "adam": (lambda: {"margin": fm.AdaMSoftmax(C)}, set()),
    "annealed elasticface": (lambda: {"margin": fm.Annealed(fm.ElasticFace())}, set()),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", DRAWN)
def test_activation_checkpointing_moves_the_state_once(name, reentrant, backend, batch):
    """The forward that the backward runs again sees the numbers of the first one, and gives the same gradients."""
    torch.manual_seed(0)
    plain = head(**DRAWN[name][0](), backend=backend)
    again = copy.deepcopy(plain)
    x, labels = batch
    for step in range(3):
        results = []
        for module in (plain, again):
            torch.manual_seed(step)
            leaf = x.clone().requires_grad_()
            module.zero_grad()
            wrapped = module is again
            loss = checkpoint(module, leaf, labels, use_reentrant=reentrant) if wrapped else module(leaf, labels)
            loss.backward()
            results.append([loss, leaf.grad, *(p.grad for p in module.parameters()), *module.state_dict().values()])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    start = head(**DRAWN[name][0]()).state_dict()
    assert all(not torch.equal(plain.state_dict()[k], start[k]) for k in DRAWN[name][1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_of_a_sampled_head(reentrant, batch):
    """The same classes are sampled when the forward runs again, and the steps are counted once."""
    x, labels = batch
    heads = [fm.PartialFC(D, 200, fm.ElasticFace(), 16.0, 0.3, sparse_grad=False, seed=4) for _ in range(2)]
    for step in range(2):
        results = []
        for module in heads:
            torch.manual_seed(step)
            leaf = x.clone().requires_grad_()
            module.zero_grad()
            run = module if module is heads[0] else lambda *a, m=module: checkpoint(m, *a, use_reentrant=reentrant)
            loss = run(leaf, labels)
            loss.backward()
            results.append([loss, leaf.grad, module.weight.grad])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert heads[0].step == heads[1].step == 2


def test_repr_of_a_scale_rule_and_of_values_for_each_class():
    assert "AdaCos(num_classes=12, dynamic=True)" in repr(head(fm.NormFace(), scale=fm.AdaCos(C)))
    assert "margin=CosFace(m=PerClass(values=tensor(" in repr(head(fm.CosFace(torch.linspace(0.1, 0.4, C))))
