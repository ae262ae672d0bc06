"""What the CPU forward keeps for the backward: less work, the same bits, and memory that nobody else writes to."""

import contextlib
import os
import pickle
import subprocess
import sys

import pytest
import torch

import fused_margin as fm
from fused_margin import memory
from fused_margin.backends import cpu
from fused_margin.spec import Spec, Want

from . import cases
from .cases import MARGINS, MODES, problem
from .conftest import require
from .test_chunks import path  # noqa: F401 (a fixture)
from .test_primitive import ALL, SMOOTH_RULES, Inputs

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def _cpu():
    require("cpu")


@contextlib.contextmanager
def keeping(rows: int, batch: int, dim: int, itemsize: int):
    """Within the block, products with so many rows of w are kept."""
    old = cpu.KEPT_BYTES
    cpu.KEPT_BYTES = (rows + cpu._COPIES * dim) * itemsize * -(-batch // 32) * 32 if rows else 0
    try:
        yield
    finally:
        cpu.KEPT_BYTES = old


def same_bits(run, batch: int, rows: int, dim: int, itemsize: int) -> None:
    with keeping(0, batch, dim, itemsize):
        expected = run()
    for kept in (1, rows // 2 + 1, rows - 1, rows):
        with keeping(kept, batch, dim, itemsize):
            for key, value in run().items():
                assert torch.equal(value, expected[key]), f"{key} with {kept} of {rows} rows kept"


@pytest.mark.parametrize("mode", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("batch", [1, 33, 130, 550])
def test_same_bits(path, mode, batch):  # noqa: F811
    """None, one, half, all but one, all: tiles of the forward and of the backward end at other rows."""
    p = problem(MARGINS["sv_arcface"], MODES[mode], batch, 300, 40, bias=True)
    same_bits(lambda: cases.run(p, "cpu"), batch, 300, 40, MODES[mode].acc.itemsize)


WANT = int(ALL | Want.DW)


@pytest.mark.parametrize("rule", SMOOTH_RULES)
@pytest.mark.parametrize("reduction", ["logsumexp", "softplus"])
@pytest.mark.parametrize(("sub_centers", "sampled"), [(1, False), (3, False), (1, True), (3, True)])
def test_same_bits_of_every_rule(rule, reduction, sub_centers, sampled):
    inputs = Inputs(40, 150, 20, rule=rule, bias=sub_centers == 1 and not sampled)
    index = torch.arange(0, 150, 2) if sampled else None

    def run():
        out = inputs.run("cpu", index, reduction=reduction, sub_centers=sub_centers, want=WANT)
        return inputs.gradients(out, inputs.leaves)

    same_bits(run, 40, 75 if sampled else 150, 20, 8)


def test_nothing_is_kept_where_no_weight_learns():
    x, w, y = torch.randn(8, 16, requires_grad=True), torch.randn(200, 16), torch.arange(8)
    spec = Spec(num_classes=200, want=int(Want.DX), backend="cpu")
    assert cpu.kept_size(x, w, None, spec) == 0
    assert cpu.kept_size(x, w, None, spec._replace(want=WANT)) == 32 * 200
    assert cpu.kept_size(x, w, y, spec._replace(want=WANT)) == 32 * 8
    assert cpu.kept_size(x[:0], w, None, spec._replace(want=WANT)) == 0


def test_as_many_as_there_is_room_for(monkeypatch):
    """Beside three copies of the embeddings; none where these alone are more than the limit."""
    monkeypatch.setattr(cpu, "KEPT_BYTES", 48 * 2**20)
    x, spec = torch.randn(8, 16), Spec(num_classes=200, want=WANT, backend="cpu")
    assert cpu.kept_size(x, torch.empty(400_000, 16, device="meta"), None, spec) == 32 * 393_168
    assert cpu.kept_rows(1024, 512, 10**6, 4) == 10_752
    assert cpu.kept_rows(10**5, 512, 10**6, 4) == 0


def loss_of(x, w, y):
    return fm.margin_cross_entropy(x, w, y, fm.ArcFace(), scale=32.0, backend="cpu")


def large(seed: int):
    """What is kept is beyond `memory.SPARE`: one block of it is held."""
    g = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(n, 8, generator=g, requires_grad=True) for n in (64, 30_000))
    assert memory.SPARE < 64 * 30_000 * 4
    return x, w, torch.randint(30_000, (64,), generator=g)


def test_two_forwards_before_two_backwards():
    """What one keeps is not the other's, and a second backward of the same graph finds it as it was."""
    first, second = large(0), large(1)
    expected = [torch.autograd.grad(loss_of(*inputs), inputs[:2]) for inputs in (first, second)]
    losses = [loss_of(*inputs) for inputs in (first, second)]
    for _ in range(2):
        for inputs, loss, grads in zip((first, second), losses, expected, strict=True):
            for got, want in zip(torch.autograd.grad(loss, inputs[:2], retain_graph=True), grads, strict=True):
                assert torch.equal(got, want)


def test_memory_is_used_again_and_can_be_released():
    memory.release()
    lent = memory.numbers(2**21, torch.float32, "gradient")
    address, shared = lent.data_ptr(), lent[5:]
    del lent
    assert memory.numbers(2**21, torch.float32, "gradient").data_ptr() != address, "a view of it was alive"
    memory.release()
    del shared  # comes back now
    assert memory.numbers(2**21, torch.float32, "products").data_ptr() != address, "of another use"
    again = memory.numbers(2**21, torch.float32, "gradient")
    assert again.data_ptr() == address
    assert memory.numbers(2**21, torch.float64, "gradient").shape == (2**21,)  # of another size, beside it
    del again
    memory.release()
    assert not memory._spare
    assert memory.numbers(0, torch.float32, "gradient").shape == (0,)
    with torch.device("meta"):
        assert all(memory.numbers(n, torch.float32, "gradient").device.type == "cpu" for n in (1, 2**21))
    memory.release()


def test_no_memory_is_said():
    with pytest.raises(MemoryError, match=r"no memory for gradient of 4,398,046,511,104 MiB .*; expected that much"):
        memory.numbers(2**60, torch.float32, "gradient")


def held() -> list[list]:
    """What is held for "test": the small blocks, and the large ones."""
    return [memory._spare.get(("test", large), []) for large in (False, True)]


def test_small_blocks_of_several_sizes_are_held_beside_a_large_one():
    """Heads of a few sizes take turns, two of them alike; what is held is bounded, the oldest block goes first."""
    sizes = [2**19, 2**20, 2**20, 2**18, 2**23]  # in bytes; the last one is large
    rounds = []
    for _ in range(2):
        lent = [memory.numbers(n, torch.uint8, "test") for n in sizes]
        assert held() == [[], []]
        del lent
        small, large = held()
        assert sorted(map(len, small)) == sorted(sizes[:-1])
        assert [len(block) for block in large] == sizes[-1:]
        rounds.append({id(block) for block in small + large})
    assert rounds[0] == rounds[1]

    sizes = [2**20 + n for n in range(20)]
    for n in sizes:
        memory.numbers(n, torch.uint8, "test")
    assert [len(block) for block in held()[0]] == sizes[-3:]  # four are more than `SPARE`
    for n in range(2**23 + 1, 2**23 + 5):
        lent = memory.numbers(n, torch.uint8, "test")
        assert not held()[1], "the one before goes first"
        del lent
        assert [len(block) for block in held()[1]] == [n]
    assert len(held()[0]) == 3
    memory.release()


def test_a_gradient_that_is_dropped_lends_its_memory_to_the_next():
    """And one that somebody holds stays what it is."""
    memory.release()
    x, w, y = large(0)
    w = torch.randn(300_000, 8, requires_grad=True)
    loss_of(x, w, y).backward()
    held, address = w.grad, w.grad.data_ptr()
    first = held.clone()
    w.grad = None
    loss_of(2 * x + 1, w, y).backward()
    assert w.grad.data_ptr() != address
    assert not torch.equal(w.grad, first)
    assert torch.equal(held, first)
    address = w.grad.data_ptr()
    w.grad = None
    loss_of(x, w, y).backward()
    assert w.grad.data_ptr() == address
    assert torch.equal(w.grad, first)
    memory.release()
    loss_of(x, w, y).backward()  # adds up
    torch.testing.assert_close(w.grad, 2 * first)
    assert torch.equal(pickle.loads(pickle.dumps(w.grad)), w.grad)
    memory.release()


@pytest.mark.parametrize("optimizer", [fm.optim.SweepSGD, fm.optim.SweepAdamW])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_sweep_optimizers_take_the_same_steps(optimizer, accumulate):
    def train():
        torch.manual_seed(0)
        head = fm.MarginHead(12, 200, fm.ArcFace())
        made = optimizer(head.parameters(), lr=0.1)
        for _ in range(3):
            for _ in range(accumulate):
                head(torch.randn(40, 12), torch.randint(200, (40,))).backward()
            calls = head.weight.grad.calls
            assert len(calls) == accumulate
            assert all((c.call.kept.numel() > 0) == (accumulate == 1 and cpu.KEPT_BYTES > 0) for c in calls)
            made.step()
            made.zero_grad()
        return {"w": head.weight.detach()}

    same_bits(train, 40, 200, 12, 4)


def test_compiled():
    x, w, y = large(0)
    expected = torch.autograd.grad(loss_of(x, w, y), (x, w))
    got = torch.autograd.grad(torch.compile(loss_of, backend="aot_eager", fullgraph=True)(x, w, y), (x, w))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_an_operator_refuses_memory_of_another_size():
    x, w, y, scale = torch.randn(4, 8), torch.randn(50, 8), torch.arange(4), torch.full((4,), 16.0)
    spec = Spec(num_classes=50, backend="cpu")
    for kept in (
        torch.empty(33),
        torch.empty(32 * 51),
        torch.empty(32 * 50, dtype=torch.float64),
        torch.empty(64)[::2],
    ):
        with pytest.raises(RuntimeError, match="32 numbers for each row of w"):
            torch.ops.fused_margin_cpu.sweep(x, w, y, scale, None, None, None, x.new_empty(0), kept, *cpu._pack(spec))


@pytest.mark.parametrize(
    ("text", "expected"), [("0", 0), ("1.5", 3 * 2**19), ("-3", 0), ("", None), ("much", None), ("inf", None)]
)
def test_limit_from_the_environment(text, expected):
    code = "from fused_margin.backends import cpu; print(cpu.KEPT_BYTES)"
    environment = os.environ | {"FUSED_MARGIN_KEEP_MIB": text}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if expected is None:
        assert run.returncode
        assert f"FUSED_MARGIN_KEEP_MIB={text!r}; expected a number of MiB" in run.stderr
    else:
        assert run.stdout.strip() == str(expected), run.stderr
