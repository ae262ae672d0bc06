"""The optimizers' steps by Triton, in the interpreter with memory guarded: the sweep's gradient used up chunk by chunk.

Against the float64 oracle under the error rule; rows with their gradients in memory against update_rules.py in float64.
"""

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_margin as fm
from fused_margin import step_ops, update_rules
from fused_margin.deferred import Call
from fused_margin.functional import margin_cross_entropy
from fused_margin.kernels import gradients, launch, steps, update
from fused_margin.kernels.configs import use
from fused_margin.update_rules import State, Update

from ... import cases
from ...error_rule import ErrorRule
from ...test_sweep_optim import CHOICES, compare, steps_of
from ..step_cases import UPDATES, SweepStep, copied, moved, new_state
from ..sweep_cases import BATCH, CLASSES, OPERANDS, hold_to_the_rule
from .test_sweep_edges import Waiting, launched
from .test_sweep_numbers import chunks, device  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def tiny():
    with use(device()):
        yield


def check(name, operands=FP32, form="chunk", **options):
    def draw(seed, rule):
        SweepStep(name, operands=operands, seed=seed, backend="triton", **options).add_to(rule)

    with use(device(form)):
        hold_to_the_rule(operands, draw)


@pytest.mark.parametrize("name", UPDATES)
def test_updates(name):
    check(name)


@pytest.mark.parametrize(
    "name, options",
    [
        ("momentum", {"layout": "index"}),
        ("adamw", {"layout": "index", "weight": BF16}),
        ("dampening", {"layout": "2 centers"}),
        ("adamw", {"layout": "3 centers"}),
        ("momentum", {"layout": "strided"}),
        ("sgd", {"layout": "shard", "weight": FP16}),
        ("nesterov", {"weight": BF16}),
        ("adamw", {"weight": FP16}),
        ("momentum", {"rule": "hard", "form": "flash"}),
        ("adamw", {"rule": "power", "bias": True, "dim": 37}),
        ("momentum", {"dim": 32}),
        ("momentum", {"operands": BF16}),
        ("adamw", {"operands": FP16, "weight": FP16, "form": "flash"}),
    ],
    ids=str,
)
def test_options(name, options):
    check(name, **options)


SEVERAL = [(name, operands) for operands in OPERANDS for name in ("sgd", "momentum", "dampening", "adamw")]
QUICK = (("sgd", FP32), ("dampening", BF16), ("adamw", FP16))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(
    "name, operands", [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in SEVERAL]
)
def test_several_calls_and_chunks(name, operands):
    """Three calls of different batches, scales and biases; an empty one changes nothing. Chunks of one tile."""
    check(name, operands, batches=(BATCH, 5, 0), bias=True)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("layout", ["index", "3 centers"])
def test_chunks_of_other_layouts(layout):
    check("adamw", layout=layout, batches=(BATCH, 33), weight=BF16)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("mode", ["fp32", pytest.param("fp32_as_bf16", marks=pytest.mark.slow)])
def test_training(choice, mode):
    """Heads and optimizers as they are used: three steps of three batches, against torch.optim on the oracle."""

    def draw(seed, rule):
        problems = [
            cases.problem(cases.MARGINS["cosface"], cases.MODES[mode], BATCH, CLASSES, 20, 10 * seed + k)
            for k in range(3)
        ]
        compare(rule, choice, *steps_of(problems, "triton"), problems[0].tensors["w"], cases.MODES[mode])

    hold_to_the_rule(cases.MODES[mode].operands, draw)


def test_unnormalised_weights():
    """Plain softmax: there is no Jacobian, for which the weights would have been read."""
    x, w, labels = cases.spread(BATCH, CLASSES, 20, 0)
    ends = []
    for dtype, backend in ((FP32, "triton"), (torch.float64, "reference")):
        p = nn.Parameter(w.to(dtype))
        optimizer = fm.optim.SweepSGD([p], lr=0.5, momentum=0.9, weight_decay=0.1)
        margin_cross_entropy(
            x.to(dtype), p, labels, fm.CosFace(0.0), scale=1.0, normalize_embeddings=False, normalize_weight=False,
            backend=backend, compute_dtype=dtype,
        ).backward()  # fmt: skip
        optimizer.step()
        ends.append(p.detach().double())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [0, BATCH], ids=["empty batch", "all ignored"])
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_no_row_counts(batch, name):
    """The weights decay and the momentum moves, as with a gradient of zeros."""
    case = SweepStep(name, backend="triton", batches=(batch,))
    case.sweeps[0].labels.fill_(-100)
    _, w, state = case.run()
    expected, at = copied(case.state, FP32), case.w.clone()
    update_rules.update_rows(at, expected, None, torch.zeros_like(at), case.update)
    for got, exact in zip((w, *state), (at, *expected), strict=True):
        if got is not None:
            torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-7)


def test_no_class():
    case = SweepStep("adamw", layout="index", backend="triton")
    case.index = torch.empty(0, dtype=torch.long)
    _, w, state = case.run()
    assert torch.equal(w, case.w)
    assert all(torch.equal(a, b) for a, b in zip(state, case.state, strict=True))


def test_same_bits_twice():
    case = SweepStep("adamw", operands=BF16, batches=(BATCH, 7), backend="triton")
    first, second = case.run()[0], case.run()[0]
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_infinity_reaches_its_rows_alone():
    """As in plain PyTorch: an upstream gradient of one target's cosine spoils the rows of its class, and no other."""
    case = SweepStep("momentum", backend="triton", batches=(3,))
    case.sweeps[0].upstream[1, 0] = torch.inf
    _, w, _ = case.run()
    bad = ~w.isfinite().all(1)
    assert bad.nonzero().flatten().tolist() == [int(case.sweeps[0].labels[0])]


ROWS = [(23, 19), (7, 1), (300, 33), (3, 1030), (64, 16)]
GRADS = {
    "float32": lambda g: g,
    "bfloat16": lambda g: g.bfloat16(),
    "float16": lambda g: g.half(),
    "transposed": lambda g: g.T.contiguous().T,
    "expanded": lambda g: g[:1].expand(g.shape),
}


def check_rows(name, shape, grad="float32", weight=FP32, index=False, transposed=False):
    rule, update, g = ErrorRule(), UPDATES[name], torch.Generator().manual_seed(1)
    for seed in range(2):
        w = torch.randn(shape, generator=g).to(weight)
        w = w.T.contiguous().T if transposed else w
        rows = torch.randperm(shape[0], generator=g)[: shape[0] // 3 + 1].sort().values if index else None
        given = GRADS[grad](torch.randn(shape if rows is None else (len(rows), shape[1]), generator=g))
        before, found = new_state(update, *shape, seed=seed), []
        for backend, dtype in (("triton", FP32), ("reference", FP32), ("reference", torch.float64)):
            at, state = w.to(weight if dtype == FP32 else dtype, copy=True), copied(before, dtype)
            torch.ops.fused_margin.update_rows(at, *state, rows, given, *update, backend)
            found.append(moved(w, at, state) | ({} if state.step is None else {"steps": state.step}))
        counts = [f.pop("steps", torch.zeros(0)) for f in found]
        assert torch.equal(counts[0], counts[1])
        rule.add_all(*found)
    rule.check()


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("index", [False, True], ids=["all rows", "index"])
def test_rows(name, index):
    check_rows(name, (23, 19), index=index)


@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_shapes_of_rows(shape):
    check_rows("adamw", shape, weight=BF16, index=True)


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("weight", [FP32, FP16])
def test_gradients_of_rows(grad, weight):
    check_rows("momentum", (23, 19), grad, weight, transposed=weight == FP32)


def test_row_optimizers_take_the_kernel(monkeypatch):
    """Where no backend before it can: the operator is told "triton", and does as on the CPU."""
    monkeypatch.setattr(step_ops.BACKENDS["cpu"], "why_not", lambda *_: ["not wanted here"])
    kernels, g = [], torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        steps, "run", lambda kernel, *args, **more: kernels.append(kernel) or launch.run(kernel, *args, **more)
    )
    w, values = torch.randn(23, 19, generator=g), torch.randn(4, 19, generator=g)
    index = torch.tensor([0, 3, 9, 22])
    ends = []
    for dtype in (FP32, torch.float64):
        p = nn.Parameter(w.to(dtype, copy=True))
        optimizer = fm.optim.RowAdamW([p], lr=0.1)
        for _ in range(2):
            p.grad = torch.sparse_coo_tensor(
                index[None], values.to(dtype), p.shape, is_coalesced=True, check_invariants=True
            )
            optimizer.step()
        ends.append(p.detach().double())
    assert kernels == [update.update_rows] * 2  # of the float32 weights; no kernel takes float64
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_state_that_is_not_there():
    w, grad = torch.zeros(4, 3), torch.zeros(4, 3)
    for state, words in ((State(), "incomplete"), (State(w.double(), w.double(), torch.zeros(4)), "float32")):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.fused_margin.update_rows(w, *state, None, grad, *UPDATES["adamw"], "triton")
    with pytest.raises(RuntimeError, match="must rise"):
        torch.ops.fused_margin.update_rows(w, *State(), torch.tensor([2, 2]), grad[:2], *UPDATES["sgd"], "triton")


@triton.jit
def power_kernel(T, log_base, OUT, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(OUT + i, update.one_minus_power(tl.load(T + i), log_base))


@pytest.mark.parametrize("beta", [0.0, 1e-300, 0.3, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.9999999])
def test_bias_correction(beta):
    """1 - beta^t to 3 units in the last place of float32, from the first step to the millionth."""
    t = torch.cat([torch.arange(1.0, 1025), torch.linspace(1100, 2**20, 1024).round()])
    out = torch.full_like(t, torch.nan)
    numbers = steps._numbers(Update("adamw", 1.0, beta1=beta))
    power_kernel[(1,)](t, numbers[6], out, len(t))
    exact = -torch.expm1(t.double() * math.log(beta)) if beta else torch.ones_like(t).double()
    torch.testing.assert_close(out.double(), exact, rtol=3 * 2**-23, atol=0)


class Largest(TorchDispatchMode):
    """The largest tensor that an operator returns."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view and func.overloadpacket.__name__[-1] != "_":
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("batches", [(BATCH,), (BATCH, 5)], ids=["one call", "two calls"])
def test_launches_memory_and_no_waiting(batches, monkeypatch):
    """Two launches for a call, then at most 4 for each chunk and call; nothing of the weights' size, no value read."""
    kernels = launched(monkeypatch)
    classes, dim = 320, 20
    w = torch.zeros(classes, dim)
    empty = torch.zeros(0)
    of_rows = [(torch.zeros(n, dim), torch.ones(n), torch.zeros(n).long(), torch.zeros(6, n)) for n in batches]
    calls = [Call(g, g, g, x, labels, g, None, None, empty, g, aux, empty) for x, g, labels, aux in of_rows]
    spec = SweepStep("adamw", backend="triton").spec
    state, update = new_state(UPDATES["adamw"], classes, dim), UPDATES["adamw"]
    with Waiting() as seen, Largest() as largest:
        gradients.sweep_step(w, state, None, calls, spec, update)
    of_chunk = ["gradient_kernel", "finish_weights"] * len(batches)
    assert kernels == ["backward_rows", "prologue"] * len(batches) + of_chunk * 10
    assert seen.operators == ["add_", *["mm"] * 10 * len(batches)]  # first the steps are counted
    assert largest.numbers < classes * dim / 4
