"""The simulator: right kernels are right under every schedule, planted bugs give wrong numbers or a named error."""

import ctypes

import pytest
import torch

from .builder import load

SEEDS = range(6)
BF16, FP16 = torch.bfloat16, torch.float16
BUGS = ("none", "no_barrier", "no_wait", "early_fetch")  # as in examples.cuh
WRONG = (
    "divergent_barrier",
    "absent_lane",
    "exited_lane",
    "outside_its_mask",
    "misaligned_copy",
    "abandoned_copy",
    "overrun_global",
    "overrun_shared",
    "race_global",
    "race_shared",
    "race_between_blocks",
    "overflow",
)  # fmt: skip; as in examples.cpp


def run(name, *args, seed=0, flags=()):
    """Calls a function of examples.cpp; its error as a string, or ""."""
    library = load("examples.cpp", flags=flags)
    library.simulator_seed(seed)
    function = getattr(library, name)
    function.restype = ctypes.c_char_p
    given = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in args]
    return (function(*(ctypes.c_float(a) if isinstance(a, float) else a for a in given)) or b"").decode()


def row_lse_error(rows, classes, threads, bug="none", **options):
    g = torch.Generator().manual_seed(0)
    c = torch.rand(rows, classes, generator=g) * 2 - 1
    lse = torch.full((rows,), torch.nan)
    assert not run("run_row_lse", c, lse, rows, classes, 64.0, threads, BUGS.index(bug), **options)
    return (lse - torch.logsumexp(64 * c.double(), 1)).abs().max().item()


def product_error(m, n, k, dtype=BF16, transposed=False, bug="none", seed=0):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(m, k, generator=g).to(dtype), torch.randn(n, k, generator=g).to(dtype)
    given = b.T.contiguous() if transposed else b
    d = torch.full((m, n), torch.nan)
    failed = run("run_product", a, given, d, m, n, k, dtype == FP16, transposed, BUGS.index(bug), seed=seed)
    assert not failed, failed
    return (d - a.double() @ b.double().T).abs().nan_to_num(torch.inf).max().item()


@pytest.mark.parametrize("flags", [(), ("-DCUSIM_UCONTEXT",)], ids=["assembly", "ucontext"])
@pytest.mark.parametrize("rows, classes, threads", [(8, 1000, 256), (3, 33, 32), (2, 4096, 1024)])
def test_block_reduction(rows, classes, threads, flags):
    for seed in SEEDS:
        assert row_lse_error(rows, classes, threads, seed=seed, flags=flags) < 1e-4


def test_missing_barrier_of_a_reduction():
    """Wrong numbers under 0, 1 and the odd seeds; the even ones are close to lock-step and hide it."""
    errors = [row_lse_error(8, 1000, 256, "no_barrier", seed=seed) for seed in SEEDS]
    assert min(errors[0], errors[1], max(errors[3], errors[5])) > 0.1


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_pipelined_product(dtype, transposed):
    for seed in SEEDS:
        assert product_error(40, 72, 200, dtype, transposed, seed=seed) < 1e-4


@pytest.mark.parametrize("bug", ["no_barrier", "no_wait", "early_fetch"])
def test_broken_pipelines(bug):
    """A barrier or a wait that is missing, a fetch into what others still read: each under some seed."""
    errors = [product_error(40, 72, 200, bug=bug, seed=seed) for seed in SEEDS]
    assert max(errors) > 0.1


@pytest.mark.parametrize("rounded", [False, True])
def test_tf32(rounded):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 8, generator=g), torch.randn(8, 8, generator=g)
    d = torch.zeros(16, 8)
    assert not run("run_product_tf32", a, b, d, rounded)

    def operand(t):
        bits = t.view(torch.int32).long() & 0xFFFFFFFF
        return ((bits + 0x1000 * rounded) & 0xFFFFE000).to(torch.int32).view(torch.float32).double()

    torch.testing.assert_close(d.double(), operand(a) @ operand(b).T, rtol=0, atol=1e-6)
    assert (d - a.double() @ b.double().T).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_conversions(dtype):
    g = torch.Generator().manual_seed(0)
    special = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504.0, 65519.9, 65520.0, 1.00390625, 1.01171875]
    )
    x = torch.cat([special, torch.randn(502, generator=g) * 2.0 ** torch.randint(-30, 18, (502,), generator=g)])
    narrow, pairs = torch.zeros(512, dtype=dtype), torch.zeros(512, dtype=torch.int32)
    wide, e, log = torch.zeros(3, 512)
    assert not run("run_convert", 512, x, narrow, pairs, wide, e, log, dtype == FP16)
    expect = x.to(dtype)
    torch.testing.assert_close(narrow, expect, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide, expect.float(), rtol=0, atol=0, equal_nan=True)
    both = pairs.view(dtype).view(512, 2)
    torch.testing.assert_close(both, torch.stack([expect, (-x).to(dtype)], 1), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(e, x.exp2(), rtol=1e-6, atol=2**-126, equal_nan=True)
    torch.testing.assert_close(log, x.log2(), rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("which, message", [
    ("divergent_barrier", "wait at different __syncthreads"),
    ("absent_lane", "deadlock: thread 0 of block (0,0,0) waits in __shfl_xor_sync line"),
    ("exited_lane", "__shfl_down_sync: mask names a lane that does not exist or has exited"),
    ("outside_its_mask", "__shfl_sync: calling lane is not in its mask"),
    ("misaligned_copy", "an asynchronous copy of 16 bytes is not aligned to its size"),
    ("abandoned_copy", "a thread ends with asynchronous copies that nobody waited for"),
    ("overrun_shared", "a thread wrote beside dynamic shared memory"),
])  # fmt: skip
def test_misuse_is_named(which, message):
    for seed in SEEDS:
        assert message in run("run_wrong", WRONG.index(which), torch.zeros(64), seed=seed)
