"""The emulator's wgmma (sm_90): Triton's own code for tiles of 64 rows, every operand layout, planted errors."""

import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from .. import fake_driver, margin_ce, mutations
from ..ptx import PTXError, launch
from ..ptx.wgmma import operand_bytes

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def execute_with(execute=launch):
    triton.runtime.driver.set_active(fake_driver.FakeDriver(90, execute=execute))


@pytest.mark.parametrize(
    "dtype, prec, shape, tile, warps, low, high",
    [
        (BF16, "ieee", (64, 64, 128), (64, 128, 64), 4, 0, 2e-5),
        (BF16, "ieee", (100, 96, 208), (128, 64, 32), 8, 0, 2e-5),  # two warpgroups, tails
        slow(BF16, "ieee", (100, 50, 130), (64, 128, 16), 4, 0, 2e-5),  # tails, and no 16-byte alignment
        slow(FP16, "ieee", (64, 64, 128), (64, 128, 64), 8, 0, 2e-5),
        (FP32, "tf32x3", (64, 64, 128), (64, 64, 32), 4, 0, 2e-5),
        (FP32, "tf32", (64, 64, 128), (64, 64, 32), 4, 5e-3, 5e-2),
    ],
    ids=str,
)
def test_margin_ce(dtype, prec, shape, tile, warps, low, high):
    execute_with()
    x, w, y = margin_ce.sample(*shape, dtype)
    loss, lse, _, compiled = margin_ce.run(
        x, w, y, prec=prec, BM=tile[0], BN=tile[1], BK=tile[2], num_warps=warps, num_stages=3
    )
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    ref_loss, ref_lse = margin_ce.reference(x, w, y)
    assert low <= (lse - ref_lse).abs().max() <= high
    assert abs(loss[0] - ref_loss) <= high * len(y)


@triton.jit
def product(A, B, D, sam, sak, sbk, sbn, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N), tl.arange(0, K)
    a = tl.load(A + m * sam + k[None, :] * sak)
    b = tl.load(B + k[:, None] * sbk + n[None, :] * sbn)
    if SCALE:  # what is computed comes from registers, so A does not pass through shared memory
        a = (a.to(tl.float32) * 2).to(A.dtype.element_ty)
    tl.store(D + m * N + n[None, :], tl.dot(a, b, input_precision="ieee"))


def multiply(a, b, scale=False, warps=4):
    d = torch.full((a.shape[0], b.shape[1]), float("nan"))
    shape = {"M": a.shape[0], "N": b.shape[1], "K": a.shape[1]}
    compiled = product[(1,)](a, b, d, *a.stride(), *b.stride(), **shape, SCALE=scale, num_warps=warps)
    return d, compiled.asm["ptx"]


@pytest.mark.parametrize(
    "columns, depth", [(32, 32), (16, 64), slow(64, 16), slow(64, 128)]
)  # rows of 32, 64, 128 bytes
@pytest.mark.parametrize("a_contiguous, b_contiguous", [("k", "k"), ("k", "n"), ("m", "k"), ("m", "n")])
def test_layouts(a_contiguous, b_contiguous, columns, depth):
    """Each operand along the depth or across it in memory, by descriptor and from registers."""
    execute_with()
    g = torch.Generator().manual_seed(depth)
    a, b = torch.randn(64, depth, generator=g).to(BF16), torch.randn(depth, columns, generator=g).to(BF16)
    a = a.T.contiguous().T if a_contiguous == "m" else a
    b = b.T.contiguous().T if b_contiguous == "k" else b
    for scale in (False, True):
        d, ptx = multiply(a, b, scale)
        assert "wgmma.mma_async" in ptx
        registers = re.search(r"wgmma\.mma_async\S+ \{[^}]*\}, \{", ptx)  # A, after the sums
        assert bool(registers) == scale
        torch.testing.assert_close(d.double(), (1 + scale) * a.double() @ b.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_an_operand_covers_its_bytes_once(mode, transposed):
    """64 lines of 16 bytes-pairs fill 2048 bytes without gap or overlap, where the strides say that it is dense."""
    width = {0: 16, 1: 128, 2: 64, 3: 32}[mode]
    if transposed:
        leading, stride = (1024, 128) if mode == 0 else (16 * width, 8 * width)
    else:
        leading, stride = (128, 256) if mode == 0 else (0, 8 * width)
    descriptor = mode << 62 | stride >> 4 << 32 | leading >> 4 << 16
    lines = 64
    address = operand_bytes(descriptor, lines, 16, 2, transposed)
    taken = np.concatenate([address.ravel(), address.ravel() + 1])
    assert len(np.unique(taken)) == lines * 32
    if mode == 3 or transposed or mode == 0:  # else the rows are longer than one product's depth
        assert taken.max() == lines * 32 - 1


def outcome(mutant=None):
    execute_with(lambda ptx, *args, **options: launch(mutant or ptx, *args, **options))
    try:
        return margin_ce.run(*margin_ce.sample(64, 192, 128, BF16), BM=64, BN=64, BK=64, num_warps=4)[:2]
    except PTXError as e:
        return str(e)


def test_mutants_of_the_code():
    """Barriers, proxy fences and waits: each reported, or not needed at this shape, and then no bit changes."""
    found = []
    execute_with(lambda ptx, *args, **options: found.append(ptx))
    margin_ce.run(*margin_ce.sample(64, 192, 128, BF16), BM=64, BN=64, BK=64, num_warps=4)
    right = outcome()
    results = {name: outcome(mutant) for name, mutant in mutations.mutants(found[0])}
    reported = {name: result for name, result in results.items() if isinstance(result, str)}
    assert all(map(torch.equal, right, result) for name, result in results.items() if name not in reported)
    assert "fence.proxy.async" in reported["proxy fence 0 removed"]
    assert any("may still" in text for text in reported.values())  # a register, or shared memory, of a wgmma in flight
    assert any("race" in text for text in reported.values())
    assert len(reported) > len(results) / 2


def test_missing_wgmma_fence():
    """Registers that are written before a wgmma need a wgmma.fence."""
    execute_with(lambda ptx, *args, **options: launch(re.sub(r"wgmma\.fence\S*;", ";", ptx), *args, **options))
    with pytest.raises(PTXError, match=r"since the last wgmma\.fence"):
        multiply(torch.zeros(64, 64, dtype=BF16), torch.zeros(64, 64, dtype=BF16), scale=True)
