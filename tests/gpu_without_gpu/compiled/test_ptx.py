"""The PTX emulator's own tests: what Triton and nvcc emit gives the right numbers, and breaking it is noticed."""

import pytest
import torch
import triton
import triton.language as tl

from .. import fake_driver, margin_ce, mutations
from ..ptx import PTXError, launch

TILE = {"BM": 32, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 3}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def execute_with(arch, launch=launch):
    triton.runtime.driver.set_active(fake_driver.FakeDriver(arch, execute=launch))


@pytest.mark.parametrize(
    "arch, dtype, prec, shape, low, high",
    [
        pytest.param(80, BF16, "ieee", (64, 64, 192), 0, 2e-5, marks=pytest.mark.slow),
        pytest.param(80, BF16, "ieee", (33, 64, 208), 0, 2e-5, marks=pytest.mark.slow),  # tails
        (80, BF16, "ieee", (33, 50, 130), 0, 2e-5),  # tails, and no 16-byte alignment
        (80, FP16, "ieee", (64, 64, 192), 0, 2e-5),
        pytest.param(80, FP32, "ieee", (64, 64, 192), 0, 2e-5, marks=pytest.mark.slow),
        (80, FP32, "tf32x3", (64, 64, 192), 0, 2e-5),
        (80, FP32, "tf32", (64, 64, 192), 5e-3, 5e-2),  # the real error of tf32 at s = 64
        pytest.param(120, BF16, "ieee", (64, 64, 192), 0, 2e-5, marks=pytest.mark.slow),
        (120, FP32, "tf32x3", (33, 64, 208), 0, 2e-5),
    ],
    ids=str,
)
def test_triton(arch, dtype, prec, shape, low, high):
    execute_with(arch)
    x, w, y = margin_ce.sample(*shape, dtype)
    loss, lse, count, _ = margin_ce.run(x, w, y, prec=prec, **TILE)
    ref_loss, ref_lse = margin_ce.reference(x, w, y)
    assert low <= (lse - ref_lse).abs().max() <= high
    assert abs(loss[0] - ref_loss) <= high * len(y)
    assert torch.equal(count, torch.bincount(y, minlength=shape[2]).int())


def test_tcgen05_is_refused_by_name():
    """Tiles for which Triton picks sm_100's tensor cores can only be compiled."""
    execute_with(100)
    with pytest.raises(PTXError, match=r"unsupported PTX.*tcgen05"):
        margin_ce.run(*margin_ce.sample(64, 64, 128, BF16), BM=64, BN=128, BK=64, num_warps=4)


@triton.jit
def half_ops(X, Y, OUT, n: tl.constexpr):
    i = tl.arange(0, n)
    x = tl.load(X + i)
    y = tl.load(Y + i)
    tl.store(OUT + 0 * n + i, x + y)
    tl.store(OUT + 1 * n + i, x * y)
    tl.store(OUT + 2 * n + i, -x)
    tl.store(OUT + 3 * n + i, tl.where(x < y, x, y))
    tl.store(OUT + 4 * n + i, tl.maximum(x, y))


@pytest.mark.parametrize("arch", [80, 120])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_half_arithmetic(arch, dtype):
    execute_with(arch)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 512, generator=g).to(dtype)
    out = torch.empty(5, 512, dtype=dtype)
    half_ops[(1,)](x, y, out, 512)
    expect = torch.stack([x + y, x * y, -x, torch.minimum(x, y), torch.maximum(x, y)])
    torch.testing.assert_close(out, expect, rtol=0, atol=0)


@triton.jit
def mixed_ops(X, Y, Z, OUT, n: tl.constexpr):
    i = tl.arange(0, n)
    x = tl.load(X + i).to(tl.float32)
    y = tl.load(Y + i).to(tl.float32)
    z = tl.load(Z + i)
    tl.store(OUT + 0 * n + i, x + z)
    tl.store(OUT + 1 * n + i, x - z)
    tl.store(OUT + 2 * n + i, z - x)
    tl.store(OUT + 3 * n + i, tl.fma(x, y, z))


@pytest.mark.parametrize("arch", [80, 120])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_arithmetic_of_two_widths(arch, dtype):
    """sm_100 and up have sums whose first operand is of 16 bit and whose second and result are of 32."""
    texts = []
    execute_with(arch, lambda ptx, *args, **options: texts.append(ptx) or launch(ptx, *args, **options))
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 512, generator=g).to(dtype)
    z, out = torch.randn(512, generator=g), torch.empty(4, 512)
    mixed_ops[(1,)](x, y, z, out, 512)
    a, b, c = x.double(), y.double(), z.double()
    assert torch.equal(out, torch.stack([a + c, a - c, c - a, a * b + c]).float())
    narrow = str(dtype).replace("torch.bfloat16", "bf16").replace("torch.float16", "f16")
    assert (f"sub.rn.f32.{narrow}" in texts[0]) == (arch == 120)


def outcome(arch=80, rows=None, less_shared=0, mutant=None, tile=TILE):
    """The emulator's complaint about the example kernel with something broken, or its loss and lse."""

    def broken(ptx, grid, threads, args, smem):
        launch(mutant or ptx, grid, threads, args, smem=smem - less_shared)

    execute_with(arch, broken)
    x, w, y = margin_ce.sample(64, 128, 192, BF16)
    try:
        loss, lse, _, _ = margin_ce.run(x, w, y, rows=rows, **tile)
    except PTXError as e:
        return str(e)
    return loss, lse


def test_mutants_of_the_code():
    """A barrier taken away is a race; some are not needed at this shape, and then no bit changes."""
    found = []
    execute_with(80, lambda ptx, *args, **options: found.append(ptx))
    margin_ce.run(*margin_ce.sample(64, 128, 192, BF16), **TILE)
    right = outcome()
    results = {name: outcome(mutant=mutant) for name, mutant in mutations.mutants(found[0])}
    reported = {name for name, result in results.items() if isinstance(result, str)}
    assert all("race" in results[name] or "may still write" in results[name] for name in reported)
    assert all(map(torch.equal, right, result) for name, result in results.items() if name not in reported)
    assert len(results) > 15
    assert len(reported) > len(results) / 2
    assert any("wait" in name for name in reported)


def test_shared_memory_too_small():
    assert "out-of-bounds shared" in outcome(less_shared=1024)


def test_output_too_short():
    assert "out-of-bounds global" in outcome(rows=40)


@triton.jit
def neighbours(X, n: tl.constexpr, SHIFT: tl.constexpr):
    i = tl.program_id(0) * n + tl.arange(0, n)
    tl.store(X + i, tl.load(X + i + SHIFT) + 1)


def test_race_between_blocks():
    """A block that reads what another one writes in the same launch."""
    execute_with(80)
    neighbours[(3,)](torch.zeros(512), 128, 0)
    with pytest.raises(PTXError, match="race between blocks"):
        neighbours[(3,)](torch.zeros(512), 128, 128)
