"""The optimizers' steps of the CUDA C++ backend on the simulator.

Trainings against float64 under the error rule, as on the CPU (test_sweep_optim.py, test_optim.py); single steps against
a gradient in memory and plain PyTorch's update.
"""

import ctypes
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fused_margin import step_ops
from fused_margin.backends import cuda
from fused_margin.deferred import Call
from fused_margin.rules import Rule
from fused_margin.spec import Spec, Want
from fused_margin.update_rules import State, Update, update_rows

from ... import test_optim, test_sweep_optim
from .backend import emulated, simulated

CLASSES, DIM = 300, 33  # three chunks of 128 classes; a tail in each dimension
UPDATES = {
    "sgd": Update("sgd", 0.1, 0.05),
    "momentum": Update("sgd", 0.1, 0.05, 0.9),
    "nesterov": Update("sgd", 0.1, 0.05, 0.9, nesterov=True),
    "dampening": Update("sgd", 0.1, 0.05, 0.8, 0.3),
    "adamw": Update("adamw", 0.01, 0.3, beta1=0.8, beta2=0.95, eps=1e-3),
    "adamw_without_memory": Update("adamw", 0.01, 0.3, beta1=0.0, beta2=0.0, eps=1e-3),
}


class Step(NamedTuple):
    """The arguments of a sweep step."""

    w: Tensor
    state: State
    index: Tensor | None
    calls: list[Call]
    spec: Spec
    update: Update

    def copy(self) -> "Step":
        return self._replace(w=self.w.clone(), state=State(*(None if t is None else t.clone() for t in self.state)))

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.w, *self.state) if t is not None]

    def run(self) -> None:
        step_ops.take_sweep_step(*self)

    def take(self) -> list[Tensor]:
        """What the backend makes of weights and state."""
        done = self.copy()
        done.run()
        return done.tensors()

    def expected(self) -> list[Tensor]:
        """The same by a gradient in memory, of weights in float32, and plain PyTorch."""
        done = self.copy()
        update_rows(done.w, done.state, done.index, step_ops.gradient(done.w.float(), *self[2:5]), done.update)
        return done.tensors()


def draw(
    update="adamw", operands=torch.float32, dtype=torch.float32, batches=(19,), sampled=False, centers=1, together=1,
    seed=0, classes=CLASSES, dim=DIM,
):  # fmt: skip
    """Calls of the rule "hard", each with a mask and a bias of its own; a state in the midst of training."""
    g = torch.Generator().manual_seed(seed)
    rows = classes * centers
    w = torch.randn(rows, dim, generator=g).to(dtype)
    m, v = torch.randn(rows, dim, generator=g), torch.rand(rows, dim, generator=g)
    step = torch.randint(0, 4, (rows // together,), generator=g).float()
    chosen = torch.arange(classes)
    if sampled:
        chosen = torch.randperm(classes, generator=g)[: classes * 4 // 7].sort().values
    count = len(chosen)
    calls = []
    for batch in batches:
        vectors = torch.randn(4, batch, generator=g)
        calls.append(
            Call(
                *vectors[:3], torch.randn(batch, dim, generator=g), torch.randint(count, (batch,), generator=g),
                torch.full((batch,), 16.0), vectors[3] / 4, torch.randn(count, generator=g),
                Rule("hard", (1.1 + 0.1 * len(calls), 0.1)).tensor(w.float()), torch.full((batch,), 12.0),
                torch.zeros(6, batch), torch.empty(0),
            )
        )  # fmt: skip
    spec = Spec(
        rule="hard", sub_centers=centers, compute_dtype=operands, num_classes=count, want=int(Want.NONE), backend="cuda"
    )
    index = (chosen[:, None] * centers + torch.arange(centers)).flatten() if sampled else None
    adamw, made = UPDATES[update].optimizer == "adamw", UPDATES[update]
    state = State(
        m if adamw or made.momentum else None, v if adamw else None, step if adamw or made.dampening else None
    )
    return Step(w, state, index, calls, spec, made)


def check(step: Step, got: list[Tensor] | None = None) -> None:
    """What the step made, here or elsewhere."""
    got, expected = got or step.take(), step.expected()
    rtol = 2 * torch.finfo(step.w.dtype).eps if step.w.dtype != torch.float32 else 1e-5
    torch.testing.assert_close(got[0].float(), expected[0].float(), rtol=rtol, atol=1e-6)
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    if step.w.dtype != torch.float32:  # an arithmetic in another order rounds a few otherwise
        assert (got[0] != expected[0]).float().mean() < 0.01


@pytest.mark.parametrize("update", UPDATES)
def test_step(update):
    with simulated(seed=1, programs=2, chunk=128):
        check(draw(update))


LAYOUTS = {
    "three calls": {"batches": (19, 1, 130), "update": "dampening"},
    "an empty call": {"batches": (0,)},
    "sampled": {"sampled": True, "batches": (19, 5)},
    "centers": {"centers": 3, "classes": 150, "batches": (5, 3)},
    "centers that count together": {"centers": 2, "together": 2, "sampled": True},
    "bf16 weights": {"dtype": torch.bfloat16, "operands": torch.bfloat16, "batches": (19, 5)},
    "fp16 weights": {"dtype": torch.float16, "operands": torch.float16, "update": "nesterov"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    with simulated(seed=3, programs=2, chunk=128):
        check(draw(**LAYOUTS[layout]))


@test_sweep_optim.choices
@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_trainings(mode, choice):
    with simulated(seed=2, programs=2, chunk=128):
        test_sweep_optim.test_float32_weights("cuda", mode, choice, (19, CLASSES, DIM))


@pytest.mark.parametrize("choice", ["momentum", "adamw"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_trainings_of_16_bit_weights(choice, dtype):
    with simulated(seed=2):
        test_sweep_optim.test_16_bit_weights("cuda", choice, dtype)


@pytest.fixture
def rows_on_cuda(monkeypatch):
    """Gradients in memory, which the CPU's kernel would take otherwise."""

    def take_step(w, state, index, grad, update):
        cuda.update_rows(w, state, index, grad, update)

    monkeypatch.setattr(step_ops, "take_step", take_step)
    with simulated(seed=4):
        yield


@test_optim.choices
def test_rows(rows_on_cuda, choice):
    test_optim.test_float32(None, choice)


@test_optim.choices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_of_16_bit(rows_on_cuda, choice, dtype):
    test_optim.test_16_bit_weights(None, choice, dtype)


def test_strides(rows_on_cuda):
    """A transposed weight, and one gradient for all rows."""
    w, grad, update = torch.randn(20, 7).T, torch.randn(1, 20).expand(7, 20), UPDATES["adamw"]
    both = [w.T.clone().T, w.contiguous()]
    states = [State(torch.zeros(7, 20), torch.zeros(7, 20), torch.zeros(7)) for _ in both]
    cuda.update_rows(both[0], states[0], None, grad, update)
    update_rows(both[1], states[1], None, grad, update)
    torch.testing.assert_close(both[0], both[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("t", [0.0, 1e3, 1e6])
def test_correction_of_a_first_and_of_a_late_step(rows_on_cuda, t):
    """1 - beta^t is 1e-3 at first, where float32 would keep four digits of it."""
    update, w = Update("adamw", 1.0, eps=0.0), torch.zeros(3, 5)
    state = State(torch.zeros(3, 5), torch.zeros(3, 5), torch.full((3,), t))
    cuda.update_rows(w, state, None, torch.ones(3, 5), update)
    mean = (1 - 0.9) / (1 - 0.9 ** (t + 1))
    root = ((1 - 0.999) / (1 - 0.999 ** (t + 1))) ** 0.5
    torch.testing.assert_close(w, torch.full((3, 5), -mean / root), rtol=1e-6, atol=0)


def test_same_bits_under_every_schedule():
    step = draw(batches=(19, 5), operands=torch.bfloat16, centers=2, together=2)
    found = []
    for seed in range(3):
        with simulated(seed, programs=1 + seed, chunk=128):
            found.append(step.take())
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_no_gradient_of_all_classes():
    """What the operator allocates is the same for a chunk of classes and for many chunks."""
    found, size = [], ctypes.c_int64()
    for classes in (128, 1500):
        step = draw(batches=(19, 5), classes=classes, dim=64)
        with emulated(None, lambda *launch: None, programs=1, chunk=128) as loaded:
            step.take()
            found.append([])
            for number in range(loaded.count_allocations()):
                loaded.allocation(number, ctypes.byref(size))
                found[-1].append(size.value)
    assert found[0] == found[1]
    assert max(found[0]) == 128 * 64 * 4


def test_errors(rows_on_cuda):
    w, grad, update = torch.randn(4, 3), torch.randn(4, 3), UPDATES["momentum"]

    def refused(match, m, v=None, step=None, index=None, update=update):
        with pytest.raises(RuntimeError, match=match):
            cuda.update_rows(w, State(m, v, step), index, grad, update)

    m = torch.zeros(4, 3)
    refused("contiguous, float32 and of the weights' shape", m.double())
    refused("contiguous, float32 and of the weights' shape", m.T.contiguous().T)
    refused("state is incomplete", None)
    refused("state is incomplete", m, m.clone(), update=UPDATES["adamw"])
    refused("expected 2 rows of gradient with 3 columns", m, index=torch.tensor([0, 2]))
    refused("index must be contiguous and int64", m, index=torch.tensor([0, 2], dtype=torch.int32))
    refused("one value for each row or class", m, step=torch.zeros(3))
    refused("one value for each row", m, step=torch.zeros(2))
