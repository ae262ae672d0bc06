"""Edges of the Triton kernels, in the interpreter with memory guarded: those of sweep_edges.py, and Triton's own.

Offsets beyond 2^31, grids beyond 65,535, masks at their threshold, launches, waiting for the device.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import interpreter_builder

from fused_margin import ops
from fused_margin.kernels import configs, forward, gradients, launch, tune
from fused_margin.kernels.configs import use
from fused_margin.kernels.plan import Inputs, plan, splits_of
from fused_margin.spec import Aux, Spec, Want

from ... import oracle
from .. import sweep_edges
from ..sweep_cases import BATCH, CLASSES, Sweep
from ..sweep_edges import ring
from .test_sweep_numbers import chunks, device, form  # noqa: F401 (fixtures)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def tiny():
    with use(device()):
        yield


@pytest.fixture
def backend():
    return "triton"


class TestEdges(sweep_edges.Edges):
    pass


def loss_and_gradients(*args, **options):
    return sweep_edges.loss_and_gradients("triton", *args, **options)


def spec(**changes):
    fixed = {"num_classes": CLASSES, "want": int(Want.DX), "backend": "triton"}
    return Spec(**fixed | changes)


def test_same_bits_twice():
    x, w, labels = ring()
    labels[:] = labels[:4].repeat(5)[:BATCH]  # many rows add to one class
    for operands in (torch.float32, torch.bfloat16, torch.float16):
        first, second = (loss_and_gradients(x, w, labels, compute_dtype=operands) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("form", ["flash", "chunk"])
@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("far", ["w", "x"])
def test_offsets_beyond_31_bits(far, axis, form):  # noqa: F811 (the name of a fixture)
    """Five rows in a storage of more than 2^31 elements, of which only those are touched; or its columns."""
    dim, rows = 20, 5
    steps = (2**29 + 2**20, 1) if axis == "rows" else (1, 2**27 + 16)
    with torch.no_grad():
        torch.utils.deterministic.fill_uninitialized_memory = False  # which would touch it all
        try:
            storage = torch.empty((rows - 1) * steps[0] + (dim - 1) * steps[1] + 1, dtype=torch.bfloat16)
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = True
        given = {"x": torch.randn(rows, dim).bfloat16(), "w": torch.randn(rows, dim).bfloat16()}
        strided = storage.as_strided((rows, dim), steps)
        strided.copy_(given[far])
    assert storage.numel() > 2**31
    near = [t.requires_grad_() for t in given.values()]
    labels = torch.tensor([4, 0, 4, 2, 3])
    there = [strided.requires_grad_() if n == far else t.detach().requires_grad_() for n, t in given.items()]
    with use(device(form)):
        for a, b in zip(loss_and_gradients(*near, labels), loss_and_gradients(*there, labels), strict=True):
            assert torch.equal(a, b)


def test_more_tiles_than_a_grid_axis_has(monkeypatch):
    """The last two splits of 65,540 tiles of 16 classes; the last class is a target."""
    tiles, shown, programs = 65540, 2, 256
    splits = splits_of(tiles, 1, programs, False)
    assert splits >= programs
    classes, first = tiles * 16 - 3, (splits - shown) * tiles // splits * 16
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(16, 16, generator=g), torch.randn(classes, 16, generator=g)
    labels = torch.full((16,), classes - 1)
    labels[:8] = torch.arange(8) * 100003
    run = launch.run

    def last_programs(kernel, programs, *args, **constants):
        if kernel is not forward.sweep_kernel:
            return run(kernel, programs, *args, **constants)
        state = args[8]  # of the other splits: nothing seen
        state[:, 1:], state[:, 0], state[:, 3] = 0, forward.NO_POWER.value, -torch.inf
        with monkeypatch.context() as patched:
            patched.setattr(
                type(interpreter_builder), "set_grid_idx",
                lambda self, i, *rest: setattr(self, "grid_idx", (i + programs - shown, *rest)),
            )  # fmt: skip
            return run(kernel, shown, *args, **constants)

    monkeypatch.setattr(launch, "run", last_programs)
    with use(device(slots=16)._replace(programs=programs)):
        got = ops.sweep(
            x, w, labels, torch.full((16,), 20.0), None, None, None, torch.zeros(0), spec(num_classes=classes, want=0)
        )
    exact = oracle.sweep(
        x.double(), w[first:].double(), labels, torch.full((16,), 20.0, dtype=torch.float64), first_class=first
    )
    torch.testing.assert_close(got[0].double(), exact.red, rtol=1e-6, atol=0)
    cos_y = torch.nn.functional.cosine_similarity(x.double(), w[labels].double())
    torch.testing.assert_close(got[1].double(), cos_y, rtol=0, atol=1e-6)


def test_grid_is_one_axis_of_bounded_length(monkeypatch):
    """30 million classes: every launch has one axis, of less than 2^31 programs."""
    programs = []
    record = lambda kernel, count, *args, **constants: programs.append(count)  # noqa: E731
    for module in (launch, gradients):
        monkeypatch.setattr(module, "run", record)
    monkeypatch.setattr(gradients, "multiply", lambda *args, **options: None)
    x = torch.empty(4096, 512, device="meta")
    w, labels = torch.empty(30_000_000, 512, device="meta"), torch.empty(4096, dtype=torch.long, device="meta")
    row = torch.empty(4096, device="meta")
    with use(configs.DEVICES["cuda90"]):
        given = spec(num_classes=30_000_000)
        red, _, _, *kept = launch.sweep(x, w, labels, row, None, None, None, row, given)
        gradients.sweep_backward(row, row, row, x, w, labels, row, None, None, None, row, red, *kept, given, 3)
    assert len(programs) > 100
    assert max(programs) < 2**31


@pytest.mark.parametrize("ahead", [0, 1], ids=["tau at the best rival", "tau just below it"])
@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masks_are_decided_alike_in_both_directions(operands, ahead):
    """tau is a rival's cosine to the last bit; else the probabilities of the backward would not add up to 1."""
    sweep = Sweep("hard", operands, backend="triton")
    x, w, bias = sweep.leaves["x"], sweep.leaves["w"], sweep.leaves["bias"]
    bias.data.zero_()
    scale, args, given = torch.full((BATCH,), 30.0), torch.tensor([1.2, 0.2]), spec(rule="hard", compute_dtype=operands)
    run = lambda tau, given: ops.sweep(x, w, sweep.labels, scale, tau, bias, None, args, given)  # noqa: E731
    stats = given._replace(want=Want.DX | Want.STATS)
    unmasked, _, _, aux = run(torch.full((BATCH,), 2.0), stats)
    best = Aux(*aux).best
    red, _, _, aux = run(torch.nextafter(best, best - 1) if ahead else best, stats)
    assert bool((red > unmasked).all()) if ahead else torch.equal(red, unmasked)
    assert torch.equal(Aux(*aux).masked_count, torch.full((BATCH,), float(ahead)))
    (d_bias,) = torch.autograd.grad(red.sum(), bias)
    assert float(d_bias.double().sum()) == pytest.approx(BATCH, rel=1e-5)


class Waiting(TorchDispatchMode):
    """Fails at an operator that would wait for a GPU, or whose shape depends on values; lists what is launched."""

    WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "bincount")
    FREE = ("empty", "new_empty", "view", "detach", "slice", "select", "t", "unbind", "expand", "alias", "as_strided")

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(name.startswith(w) for w in self.WAITS), f"{name} waits for the device"
        if not func.is_view and name not in self.FREE and name != "empty_like":
            self.operators.append(name)
        return func(*args, **(kwargs or {}))


def launched(monkeypatch):
    """The names of kernels, as the launchers ask for them: nothing runs, and a chunk has 32 rows."""
    kernels = []
    for module in (launch, gradients):
        monkeypatch.setattr(module, "run", lambda kernel, *args, **constants: kernels.append(kernel.fn.__name__))
    monkeypatch.setattr(gradients, "_CHUNK_ROWS", (32, 32))
    return kernels


@pytest.mark.parametrize("kind, chunk_launches", [("flash", 3), ("chunk", 4)])
def test_launches_and_no_waiting(kind, chunk_launches, monkeypatch):
    """Forward: 4 launches. Backward: 3 of them, and at most 4 for each of 3 chunks. No operator reads a value."""
    kernels = launched(monkeypatch)
    x, w, labels = (t.detach() for t in ring())
    scale, g = torch.full((BATCH,), 30.0), torch.ones(BATCH)
    with use(device(kind)), Waiting() as seen:
        forms = [1.0, 1.0, 1.0, 0.5, 0.0]
        _, rows, aux, o_red = launch.sweep_loss(x, w, labels, scale, scale, spec(), forms, "mean")
        assert kernels == ["prologue", "sweep_kernel", "epilogue", "row_loss"]
        assert not seen.operators
        kernels.clear()
        gradients.sweep_backward(
            g, g, g, x, w, labels, scale, None, None, None, scale, rows[3], aux, o_red, o_red[:0], spec(), 3
        )
    tiles = -(-CLASSES // 32)
    assert kernels == ["backward_rows", "prologue", *["gradient_kernel", "finish_weights"] * tiles, "finish_x"]
    assert len(seen.operators) == (chunk_launches - 2) * tiles
    assert set(seen.operators) <= {"mm", "addmm"}


def test_a_waiting_operator_is_seen():
    with Waiting(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(3).nonzero()


def test_precision_on_request(monkeypatch):
    assert "tf32" not in {record.precision for record in configs.DEVICES.values()}
    monkeypatch.setenv("FUSED_MARGIN_TRITON_PRECISION", "tf32")
    assert configs.device_for(torch.zeros(1)).precision == "tf32"
    monkeypatch.setenv("FUSED_MARGIN_TRITON_PRECISION", "fp8")
    with pytest.raises(ValueError, match="expected one of"):
        configs.device_for(torch.zeros(1))


def test_tuning_times_each_candidate_once(monkeypatch):
    """FUSED_MARGIN_TRITON_TUNE=1 changes tiles, and numbers by rounding only."""
    timed = []
    monkeypatch.setattr(tune, "CANDIDATES", (device(slots=16).half.sweep, device(slots=64).half.sweep))
    monkeypatch.setattr(tune, "_best", {})
    monkeypatch.setattr(tune, "_time", lambda go, p: timed.append(p.cut) or -len(timed))
    expected = loss_and_gradients(*ring())
    assert not timed
    monkeypatch.setenv("FUSED_MARGIN_TRITON_TUNE", "1")
    for _ in range(2):
        for a, b in zip(loss_and_gradients(*ring()), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert [cut.sweep.slots for cut in timed[:3]] == [32, 16, 64]
    assert [cut.gradient.slots for cut in timed[3:]] == [32, 16, 64]


def test_tuning_tells_problems_apart(monkeypatch):
    """What a tile depends on is in the key; candidates that come to one tile are timed once; no jump is tuned."""
    timed = []
    monkeypatch.setattr(tune, "_best", {})
    monkeypatch.setattr(tune, "_time", lambda go, p: timed.append(p) or 0.0)
    monkeypatch.setenv("FUSED_MARGIN_TRITON_TUNE", "1")

    def count(part, form, bias=None, **changes):  # noqa: F811
        before = len(timed)
        x, w, labels = (t.detach() for t in ring())
        with use(device(form)):
            given = Inputs(x, w, labels, bias=bias)
            tune.tuned(part, plan(given, spec(**changes)), given, lambda p: p)
        return len(timed) - before

    every = len(tune.CANDIDATES) + 1
    assert count("sweep", "chunk") == count("gradient", "chunk") == every
    assert count("sweep", "chunk") == 0
    assert count("sweep", "chunk", want=Want.DX | Want.DSCALE) == every
    assert count("sweep", "chunk", reduction="softplus") == every
    assert count("sweep", "chunk", bias=torch.zeros(CLASSES)) == every
    as_in_the_forward = {(tile.rows, tile.stages) for tile in (device().half.sweep, *tune.CANDIDATES)}
    assert count("gradient", "flash") == len(as_in_the_forward) < every
    assert count("sweep", "chunk", sub_centers=3) == count("sweep", "chunk", rule="hard") == 0
