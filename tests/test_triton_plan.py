"""What the Triton backend decides from shapes alone: tiles, how the forward is split, which product the library is
asked for. No kernel runs, Triton is not needed.
"""

import heapq
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_margin.kernels.configs import DEVICES, use
from fused_margin.kernels.plan import Inputs, ceil_div, multiply, plan, splits_of, use_of_device
from fused_margin.rules import RULES
from fused_margin.spec import Spec, Want

GPUS = [name for name in DEVICES if name != "interpreter"]
BATCHES = (1, 64, 128, 129, 256, 500, 512, 777, 1024, 1500, 2048, 3000, 4096, 8192, 8500, 16384, 20000, 30000)
CLASSES = (10**5, 10**6, 10**7)
SMALLER = {"cuda80": (56, 72, 84), "cuda90": (78, 114), "cuda120": (48, 84), "hip": (110, 228)}  # parts that are sold


def cuts():
    """(device, classes, tile, form, blocks, tiles) of each kind of sweep."""
    for name in GPUS:
        for cut in (DEVICES[name].half, DEVICES[name].full):
            for form in ("sweep", "flash") if cut.flash_width else ("sweep",):
                tile = getattr(cut, form)
                for batch in BATCHES:
                    for classes in CLASSES:
                        yield name, tile, form == "flash", ceil_div(batch, tile.rows), ceil_div(classes, tile.slots)


def in_order(tiles: int, blocks: int, splits: int, programs: int) -> float:
    """The part of the time that multiprocessors work, if each takes the next program when it has done one."""
    sizes = [(k + 1) * tiles // splits - k * tiles // splits for k in range(splits) for _ in range(blocks)]
    ends = [0] * programs
    for size in sizes:
        heapq.heapreplace(ends, ends[0] + size)
    return sum(sizes) / (programs * max(ends))


def test_no_wave_runs_almost_empty():
    """In lockstep on the device of the record; as they are done, on parts of it that have fewer multiprocessors too."""
    for name, _, flash, blocks, tiles in dict.fromkeys(cuts()):
        programs = DEVICES[name].programs
        splits = splits_of(tiles, blocks, programs, flash)
        if tiles >= 5000:
            assert use_of_device(tiles, blocks, splits, programs) >= 0.85, (name, flash, blocks, tiles)
        for part in (programs, *(() if flash else SMALLER.get(name, ()))):
            if blocks * splits <= 4000:
                assert in_order(tiles, blocks, splits, part) >= 0.85, (name, flash, blocks, tiles, part)


def test_what_was_almost_twice_as_slow():
    """136 programs on 132 multiprocessors."""
    assert use_of_device(7813, 8, 17, 132) < 0.53
    assert use_of_device(7813, 8, splits_of(7813, 8, 132, False), 132) > 0.95


def test_splits_are_bounded():
    """And so are the partial sums of each, [9, padded] or, in the flash form, [padded, D]."""
    for name, tile, flash, blocks, tiles in cuts():
        splits = splits_of(tiles, blocks, DEVICES[name].programs, flash)
        assert 1 <= splits <= min(tiles, 1024)
        states = splits * blocks * tile.rows * 9 * 4
        assert splits == 1 or states <= (6 if flash else 14) * 2**20, (name, blocks, states)


@pytest.mark.parametrize("flash", [False, True])
def test_few_tiles(flash):
    assert [splits_of(tiles, 1, 132, flash) for tiles in (0, 1, 2)] == [1, 1, 2]


class Named(TorchDispatchMode):
    """Lists the operators that are dispatched, but for views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_on_a_device_are_one_operator(dtype, add):
    """As the backward asks for them: a transposed slice of G with one of x_hat. Meta tensors take the GPU's branch."""
    g, x = torch.empty(64, 96, dtype=dtype, device="meta"), torch.empty(64, 32, dtype=dtype, device="meta")
    out = torch.empty(80, 24, device="meta")
    with Named() as seen:
        multiply(g[:60, :80].t(), x[:60, :24], out, add)
    name = "addmm" if add else "mm"
    assert seen.names == [f"aten.{name}.out" if dtype == torch.float32 else f"aten.{name}.dtype_out"]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_on_a_cpu(dtype, add):
    g, x, out = torch.randn(9, 7).to(dtype), torch.randn(9, 5).to(dtype), torch.randn(7, 5)
    exact = g.double().t() @ x.double() + (out.double() if add else 0)
    multiply(g.t(), x, out, add)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def tiles(device, dtype, dim, rule="identity", bias=False, centers=1, want=Want.DX, reduction="logsumexp"):
    """(forward's, backward's) for float32 weights."""
    x, w = torch.empty(512, dim, device="meta"), torch.empty(9000 * centers, dim, device="meta")
    spec = Spec(rule=rule, reduction=reduction, sub_centers=centers, compute_dtype=dtype, want=int(want))
    with use(DEVICES[device]):
        p = plan(Inputs(x, w, x, bias=x if bias else None), spec)
        return p.forward_tile, p.backward_tile


@pytest.mark.parametrize("device", GPUS)
def test_both_directions_have_the_same_slots_and_warps(device):
    """So norms are added up in the same order, and masks decided alike; a tile has all sub-centres of a class."""
    dtypes, wants = (torch.bfloat16, torch.float16, torch.float32), (Want.DX, Want.DX | Want.SUM, Want.DX | Want.STATS)
    cases = itertools.product(dtypes, (128, 200, 500, 512), RULES, (False, True), (1, 3, 16), wants)
    for case in cases:
        forward, backward = tiles(device, *case)
        assert (forward.slots, forward.warps) == (backward.slots, backward.warps), case
        assert forward.slots >= 16, case


@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.bfloat16, {"centers": 3}),
        (torch.bfloat16, {"bias": True}),
        (torch.bfloat16, {"dim": 500, "rule": "gauss"}),
        (torch.bfloat16, {"want": Want.DX | Want.STATS}),
        (torch.bfloat16, {"reduction": "softplus"}),
        (torch.float16, {"dim": 500}),
        (torch.float16, {"rule": "hard"}),
        (torch.bfloat16, {"dim": 200}),
    ],
    ids=str,
)
def test_tiles_that_would_spill_are_half_as_wide(dtype, options):
    dim = options.pop("dim", 512)
    plain, _ = tiles("cuda80", dtype, 512 if dim > 256 else 256)
    narrow, _ = tiles("cuda80", dtype, dim, **options)
    assert narrow.slots == plain.slots // 2
