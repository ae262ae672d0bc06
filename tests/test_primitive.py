"""The primitive itself, fused_margin.ops.sweep: every rule, reduction and option, all outputs and all gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fused_margin import ops
from fused_margin.backends import why_not
from fused_margin.rules import CODES, RULES, Rule
from fused_margin.spec import Aux, Spec, Want

from . import oracle
from .cases import BACKENDS, spread
from .conftest import require
from .error_rule import ErrorRule

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ARGS = {  # of each rule, chosen so that a good part of the cosines falls on either side
    "identity": (),
    "hard": (1.2, 0.2),
    "curricular": (0.3,),
    "clip": (-0.1, 0.15),
    "filter": (0.2,),
    "gauss": (1.2, 2.0),
    "circle": (0.25,),
    "power": (3.0, 0.4),
    "angle": (1.0, -0.6, 0.05),
    "angle_fraction": (1.4,),
    "angle_sigmoid": (0.4,),
    "sigmoid_weight": (5.0, 1.3),
    "square": (),
}
SMOOTH_RULES = (
    "identity",
    "gauss",
    "circle",
    "clip",
    "power",
)  # no jump, which float32 and the oracle may see on other sides
ALL = Want.DX | Want.SUM | Want.STATS | Want.DSCALE


class Inputs:
    """Tensors of one sweep in float64 or float32; those with gradient are leaves."""

    def __init__(self, batch=37, classes=150, dim=20, rule="identity", bias=True, dtype=torch.float64, seed=0):
        g = torch.Generator().manual_seed(seed + 9)
        x, w, self.labels = spread(batch, classes, dim, seed)
        self.leaves = {"x": x, "w": w, "scale": 10 + 30 * torch.rand(batch, generator=g, dtype=torch.float64)}
        if bias:
            self.leaves["bias"] = torch.randn(classes, generator=g, dtype=torch.float64)
        self.leaves = {n: t.to(dtype).requires_grad_() for n, t in self.leaves.items()}
        tau = 0.4 * torch.rand(batch, generator=g, dtype=torch.float64) - 0.2
        self.tau = tau.to(dtype) if RULES[rule].needs_tau else None
        self.rule, self.upstream = rule, torch.randn(3, batch, generator=g, dtype=torch.float64)

    def spec(self, backend, **changes) -> Spec:
        x = self.leaves["x"]
        fixed = {"rule": self.rule, "compute_dtype": x.dtype, "num_classes": 10**6, "want": ALL, "backend": backend}
        return Spec(**fixed | changes)

    def run(self, backend, index=None, **changes):
        x, w, scale = (self.leaves[n] for n in ("x", "w", "scale"))
        args = Rule(self.rule, ARGS[self.rule]).tensor(x)
        spec = self.spec(backend, **changes)
        return ops.sweep(x, w, self.labels, scale, self.tau, self.leaves.get("bias"), index, args, spec)

    def exact(self, dtype=torch.float64, **options):
        leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in self.leaves.items()}
        tau = None if self.tau is None else self.tau.to(dtype)
        swept = oracle.sweep(
            leaves["x"], leaves["w"], self.labels, leaves["scale"], tau, leaves.get("bias"),
            rule=self.rule, args=ARGS[self.rule], **options,
        )  # fmt: skip
        return swept, leaves

    def gradients(self, outputs, leaves, parts=(0, 1, 2)):
        """Of the upstream-weighted outputs that `parts` names (red, cos_y, sum_u)."""
        total = sum((self.upstream[k].to(outputs[k].dtype) * outputs[k]).sum() for k in parts)
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, retain_graph=True)
        return {
            f"d_{n}": torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), grads, strict=True)
        }


def outputs(red, cos_y, sum_u, aux, masks=True):
    aux = Aux(*aux)
    found = {"red": red, "cos_y": cos_y, "sum_u": sum_u, "best": aux.best, "mean_v": aux.mean_v, "sum_v": aux.sum_v}
    return found | ({"count": aux.masked_count, "masked": aux.masked_sum} if masks else {})


def expected_outputs(s: oracle.Swept, masks=True):
    found = {"red": s.red, "cos_y": s.cos_y, "sum_u": s.sum_u, "best": s.best, "mean_v": s.mean_n, "sum_v": s.sum_n}
    return found | ({"count": s.masked_count, "masked": s.masked_sum} if masks else {})


def check(inputs: Inputs, backend, oracle_options=None, parts=(0, 1, 2), **changes):
    """All outputs and gradients of one sweep under the error rule."""
    reasons = why_not(backend, spec=inputs.spec(backend))
    if reasons:
        pytest.skip(f"{backend}: {', '.join(reasons)}")
    masks = inputs.tau is not None
    got = inputs.run(backend, **changes)
    options = {"reduction": changes.get("reduction", "logsumexp")} | (oracle_options or {})
    exact, exact_leaves = inputs.exact(**options)
    rule = ErrorRule()
    have = outputs(*got, masks) | inputs.gradients(got, inputs.leaves, parts)
    want = expected_outputs(exact, masks) | inputs.gradients(exact[:3], exact_leaves, parts)
    plain = None
    if inputs.leaves["x"].dtype == torch.float32:
        swept, leaves = inputs.exact(torch.float32, **options)
        plain = expected_outputs(swept, masks) | inputs.gradients(swept[:3], leaves, parts)
    rule.add_all(have, plain, want)
    rule.check()


@pytest.mark.parametrize("reduction", ["logsumexp", "softplus"])
@pytest.mark.parametrize("rule", RULES)
def test_rules_and_reductions(backend, rule, reduction):
    check(Inputs(rule=rule), backend, reduction=reduction)


@pytest.mark.parametrize("rule", RULES)
def test_rules_with_unit_slope(backend, rule):
    check(Inputs(rule=rule), backend, {"unit_slope": True}, unit_slope=True)


@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0, 3.0, 4.7, 7.0, 12.5])
def test_powers(backend, exponent, monkeypatch):
    """Whole exponents by squaring, others by pow."""
    monkeypatch.setitem(ARGS, "power", (exponent, 0.2))
    check(Inputs(rule="power"), backend)
    check(Inputs(100, 300, 64, "power", dtype=torch.float32), backend, reduction="softplus")


@pytest.mark.parametrize("reduction", ["logsumexp", "softplus"])
@pytest.mark.parametrize("rule", SMOOTH_RULES)
def test_rules_in_float32(backend, rule, reduction):
    check(Inputs(100, 300, 64, rule, dtype=torch.float32), backend, reduction=reduction)


def test_every_rule_has_its_arguments_here():
    assert ARGS.keys() == RULES.keys() == oracle.RIVALS.keys()
    assert list(CODES) == [name for name, rule in RULES.items() if rule.kernel]
    assert {n: len(a) for n, a in ARGS.items()} == {n: len(d.args) for n, d in RULES.items()}


@pytest.mark.parametrize(
    "parts", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=["red", "cos_y", "sum_u", "red+sum", "cos+sum"]
)
def test_each_output_has_its_own_gradient(backend, parts):
    check(Inputs(rule="hard"), backend, parts=parts)


@pytest.mark.parametrize(
    "want",
    [Want.NONE, Want.DX, Want.SUM, Want.DX | Want.SUM, Want.DSCALE, Want.STATS],
    ids=["NONE", "DX", "SUM", "DX+SUM", "DSCALE", "STATS"],
)
def test_outputs_on_request(backend, want):
    """What is not wanted disturbs nothing: red, cos_y and the gradients that can be had are right."""
    inputs = Inputs(rule="hard")
    inputs.leaves["x"].requires_grad_(bool(want & Want.DX))
    inputs.leaves["scale"].requires_grad_(bool(want & Want.DSCALE))
    got = inputs.run(backend, want=want)
    exact, exact_leaves = inputs.exact()
    found, expected = outputs(*got), expected_outputs(exact)
    wanted = ["red", "cos_y"] + ["sum_u"] * bool(want & Want.SUM)
    wanted += ["best", "count", "masked"] if want & Want.STATS else []
    parts = (0, 1, 2) if want & Want.SUM else (0, 1)
    able = {n: t for n, t in inputs.leaves.items() if t.requires_grad}
    found |= inputs.gradients(got, able, parts)
    expected |= inputs.gradients(exact[:3], exact_leaves, parts)
    for name in (*wanted, *(f"d_{n}" for n in able)):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("leaf", ["x", "scale"])
def test_a_gradient_that_was_not_wanted_is_an_error(backend, leaf):
    inputs = Inputs()
    for name, t in inputs.leaves.items():
        t.requires_grad_(name == leaf)
    red = inputs.run(backend, want=0)[0]
    with pytest.raises(
        RuntimeError, match=r"the gradient of x needs Want\.DX in the forward, that of scale Want\.DSCALE"
    ):
        red.sum().backward()


@pytest.mark.parametrize(
    "normalize", list(itertools.product((True, False), repeat=2)), ids=["both", "x", "w", "neither"]
)
def test_normalize_either_side(backend, normalize):
    inputs = Inputs(dim=6)
    inputs.leaves["w"].data *= 0.3  # products, not cosines
    check(inputs, backend, {"normalize": normalize}, normalize_x=normalize[0], normalize_w=normalize[1])


@pytest.mark.parametrize("rule", ["identity", "hard"])
@pytest.mark.parametrize("centers", [2, 3, 5])
def test_sub_centers(backend, centers, rule):
    inputs = Inputs(classes=60 * centers, rule=rule, bias=False)
    inputs.labels %= 60
    check(inputs, backend, {"sub_centers": centers}, sub_centers=centers)


@pytest.mark.parametrize("centers", [1, 2])
def test_index_reads_a_subset_in_place(backend, centers):
    """Rows outside the subset get no gradient; labels count positions in the subset."""
    g = torch.Generator().manual_seed(5)
    index = torch.randperm(300, generator=g)[:150]
    inputs = Inputs(classes=300, bias=False)
    inputs.labels %= 150 // centers
    check(inputs, backend, {"index": index, "sub_centers": centers}, index=index, sub_centers=centers)


@pytest.mark.parametrize("cut", [1, 70, 149])
def test_two_shards_make_one(backend, cut):
    """The reds of two shards add as exponentials, cos_y is one shard's, gradients of x add up; see architecture.md."""
    inputs = Inputs(bias=False)
    whole, leaves = inputs.exact()
    x, w, scale = (inputs.leaves[n] for n in ("x", "w", "scale"))
    args, shards = Rule().tensor(x), []
    for first, part in ((0, w[:cut]), (cut, w[cut:])):
        spec = inputs.spec(backend, first_class=first)
        shards.append(ops.sweep(x, part, inputs.labels, scale, None, None, None, args, spec))
    red = torch.logaddexp(shards[0][0], shards[1][0])
    both = red, shards[0][1] + shards[1][1], shards[0][2] + shards[1][2]
    for got, exact in zip(both, whole[:3], strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(torch.maximum(shards[0][3][0], shards[1][3][0]), whole.best)
    ours, theirs = inputs.gradients(both, inputs.leaves), inputs.gradients(whole[:3], leaves)
    for name, got in ours.items():
        torch.testing.assert_close(got, theirs[name], rtol=1e-9, atol=1e-11)


def test_target_cosine(backend):
    inputs = Inputs(batch=40, rule="hard")
    inputs.labels[3] = -100
    x, w = inputs.leaves["x"], inputs.leaves["w"]
    got = ops.target_cosine(x, w, inputs.labels, None, inputs.spec(backend))
    assert not got.requires_grad
    torch.testing.assert_close(got, oracle.cosines(x, w, inputs.labels).c_y.detach(), rtol=0, atol=1e-14)
    index = torch.arange(100, 150)
    inputs.labels %= 50
    got = ops.target_cosine(x, w, inputs.labels, index, inputs.spec(backend))
    expected = oracle.cosines(x, w, inputs.labels, index=index).c_y.detach()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


def test_no_class_at_all(backend):
    """A shard of which no row was sampled: red is -inf, there is no target, all gradients are 0."""
    inputs = Inputs(batch=5, classes=9, dim=7, bias=False)
    got = inputs.run(backend, index=torch.empty(0, dtype=torch.long))
    assert (got[0] == -torch.inf).all()
    for t in got[1:3]:
        torch.testing.assert_close(t, torch.zeros_like(t))
    for name, g in inputs.gradients(got, inputs.leaves).items():
        torch.testing.assert_close(g, torch.zeros_like(g), msg=name)


def test_row_without_rival(backend):
    """One class: red is -inf, and no number turns into nan."""
    inputs = Inputs(batch=5, classes=1, dim=7)
    got = inputs.run(backend)
    assert (got[0] == -torch.inf).all()
    assert (Aux(*got[3]).best == -torch.inf).all()
    torch.testing.assert_close(got[2], torch.zeros_like(got[2]))
    grads = inputs.gradients(got, inputs.leaves, (0, 2))
    for name, g in grads.items():
        torch.testing.assert_close(g, torch.zeros_like(g), msg=name)


AHEAD = {"tau at the best rival": 0, "tau just below it": 1}


def check_masks_of_both_directions(backend, compute, ahead, batch=200, classes=1500, dim=64, **changes):
    """tau is a rival's cosine to the last bit: `c > tau` is strict, and the backward sees the same cosine.

    Otherwise the probabilities of the backward, which the bias' gradient adds up, would not add up to 1.
    """
    inputs = Inputs(batch, classes, dim, "hard", dtype=torch.float32)
    inputs.leaves["bias"].data.zero_()
    inputs.tau = torch.full((batch,), 2.0)  # nothing is masked
    unmasked, _, _, aux = inputs.run(backend, compute_dtype=compute, **changes)
    best = Aux(*aux).best
    inputs.tau = torch.nextafter(best, best - 1) if ahead else best
    red, _, _, aux = inputs.run(backend, compute_dtype=compute, **changes)
    assert bool((red > unmasked).all()) if ahead else torch.equal(red, unmasked)
    torch.testing.assert_close(Aux(*aux).masked_count, torch.full((batch,), float(ahead)))
    (d_bias,) = torch.autograd.grad(red.sum(), inputs.leaves["bias"])
    assert float(d_bias.double().sum()) == pytest.approx(batch, rel=1e-5)


@pytest.mark.parametrize("ahead", AHEAD.values(), ids=AHEAD)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_masks_are_decided_alike_in_both_directions(backend, compute, ahead):
    check_masks_of_both_directions(backend, compute, ahead)


def sweep_args(backend, rule, dtype=torch.float64, **changes):
    inputs = Inputs(batch=5, classes=9, dim=6, rule=rule, bias=rule != "hard", dtype=dtype)
    args = Rule(rule, ARGS[rule]).tensor(inputs.leaves["x"])
    leaves = inputs.leaves
    spec = inputs.spec(backend, **changes)
    return (leaves["x"], leaves["w"], inputs.labels, leaves["scale"], inputs.tau, leaves.get("bias"), None, args, *spec)


OPCHECKED = {  # rules, and what changes of the spec
    "identity": {},
    "hard": {"want": Want.DX | Want.DSCALE},
    "circle": {"reduction": "softplus"},
}


@pytest.mark.parametrize("rule", OPCHECKED)
def test_opcheck_sweep(backend, rule):
    torch.library.opcheck(torch.ops.fused_margin.sweep.default, sweep_args(backend, rule, **OPCHECKED[rule]))


def test_opcheck_target_cosine(backend):
    x, w, labels, _, _, _, index, _, *spec = (
        a.detach() if isinstance(a, torch.Tensor) else a for a in sweep_args(backend, "hard")
    )
    torch.library.opcheck(torch.ops.fused_margin.target_cosine.default, (x, w, labels, index, *spec))


@pytest.mark.parametrize("need", [1, 2, 15])
def test_opcheck_sweep_backward(need):
    """Not of the reference, which uses autograd inside: opcheck turns that off; its sweep is checked with gradients."""
    opcheck_sweep_backward(sweep_args(require("cpu"), "identity"), need)


def opcheck_sweep_backward(args, need):
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    red, cos_y, sum_u, *kept = torch.ops.fused_margin.sweep.default(*args)
    upstream = [torch.ones_like(t) for t in (red, cos_y, sum_u)]
    arguments = (*upstream, *args[:8], red, *kept, *args[8:], need)
    torch.library.opcheck(torch.ops.fused_margin.sweep_backward.default, arguments)


GRADCHECKED = {  # rules whose slope is the derivative of their value: the others hold a factor constant
    "identity": {},
    "hard": {},
    "curricular": {},
    "clip": {},
    "filter": {},
    "softplus": {"reduction": "softplus"},
    "sub_centers": {"sub_centers": 3},
    "products": {"normalize_x": False, "normalize_w": False},
}


@pytest.mark.parametrize("name", GRADCHECKED)
def test_gradcheck(backend, name):
    rule = name if name in RULES else "identity"
    inputs = Inputs(batch=4, classes=9, dim=5, rule=rule, bias=name != "sub_centers")
    inputs.labels %= 3
    inputs.leaves["scale"].data *= 0.1
    names = list(inputs.leaves)

    def run(*tensors):
        inputs.leaves = dict(zip(names, tensors, strict=True))
        return inputs.run(backend, **GRADCHECKED[name])[:3]

    assert torch.autograd.gradcheck(run, tuple(inputs.leaves.values()), atol=1e-6, rtol=1e-5)


def test_backends_agree_on_everything_at_once():
    """One sweep with every option on; the reference backend is held to the oracle above, the others to it."""
    index = torch.randperm(400, generator=torch.Generator().manual_seed(1))[:360]
    results = []
    for backend in BACKENDS:
        inputs = Inputs(batch=50, classes=400, dim=33, rule="curricular", bias=False)
        inputs.leaves["bias"] = torch.linspace(-1, 1, 120, dtype=torch.float64).requires_grad_()
        inputs.labels[::7] = -100
        got = inputs.run(require(backend), index=index, sub_centers=3, first_class=20, unit_slope=True)
        results.append(outputs(*got) | inputs.gradients(got, inputs.leaves))
    for name, expected in results[0].items():
        for other in results[1:]:
            torch.testing.assert_close(other[name], expected, rtol=1e-9, atol=1e-10, msg=name)


def test_plain_softmax_is_in_it(backend):
    """No normalisation, scale 1, a bias: -logsigmoid(z - red) is torch's own cross-entropy."""
    inputs = Inputs(batch=30, classes=40, dim=12)
    inputs.leaves["scale"].data.fill_(1)
    red, z, *_ = inputs.run(backend, normalize_x=False, normalize_w=False)
    x, w, bias = (inputs.leaves[n] for n in ("x", "w", "bias"))
    loss = -F.logsigmoid(z + bias[inputs.labels] - red)
    expected = F.cross_entropy(F.linear(x, w, bias), inputs.labels, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
