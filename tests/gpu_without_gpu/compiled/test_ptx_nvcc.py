"""The PTX emulator on what nvcc emits: right numbers, and a planted missing barrier is found."""

import functools
import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from .. import ptxas
from ..ptx import PTXError, launch
from ..ptx.memory import buffer_of

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")


@functools.cache
def compiled(*flags, arch=80):
    command = [NVCC, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-ptx", *flags, "-o", "-", "example.cu"]
    return subprocess.run(command, cwd=Path(__file__).parent, text=True, check=True, stdout=subprocess.PIPE).stdout


def row_error(ptx, rows=16, threads=256):
    """Largest error of margin_ce_row against torch."""
    g = torch.Generator().manual_seed(0)
    c = torch.rand(rows, 1000, generator=g) * 2 - 1
    y = torch.randint(1000, (rows,), generator=g)
    loss, total = torch.zeros(rows), torch.zeros(1)
    launch(ptx, rows, threads, [c, y, loss, total, 1000, 64.0, 0.35], smem=128, name="margin_ce_row")
    z = c.double()
    z[torch.arange(rows), y] -= 0.35
    expect = torch.nn.functional.cross_entropy(64 * z, y, reduction="none")
    return max((loss - expect).abs().max().item(), (total - expect.sum()).abs().item() / rows)


def test_nvcc_block_reduction():
    assert row_error(compiled()) < 1e-4


def test_nvcc_removed_barrier():
    with pytest.raises(PTXError, match="race between warps"):
        row_error(compiled("-DBUG_NO_SYNC"))


def test_nvcc_tensor_core():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 64, 128, generator=g).bfloat16()
    d = torch.zeros(64, 64)
    launch(compiled(), (4, 8), 32, [a, b, d, 64, 128], name="gemm_bf16")
    torch.testing.assert_close(d.double(), a.double() @ b.double().T, rtol=0, atol=1e-4)


def test_nvcc_opcodes():
    """Opcodes that are easy to get silently wrong: directed rounding, 64-bit division, high halves, bf16."""
    n = 64
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, n, generator=g) * 4
    k = torch.randint(-(2**62), 2**62, (2, n), generator=g)
    k[1, ::2] >>= 40
    f, i = torch.zeros(7, n), torch.zeros(8, n, dtype=torch.int64)
    launch(compiled(), 1, n, [x, k, f, i], name="opcodes")
    a, b = x
    exact = torch.stack([a, b]).double().numpy()
    down = np.nextafter(np.float32(exact.sum(0)), np.float32(-np.inf))
    down = np.where(np.float32(exact.sum(0)) > exact.sum(0), down, np.float32(exact.sum(0)))
    product = np.float32(exact.prod(0))
    product = np.where(abs(product) > abs(exact.prod(0)), np.nextafter(product, np.float32(0)), product)
    expect = [
        a.exp(),
        a.floor() + b.ceil() + a.trunc() + b.round(),
        torch.from_numpy(down),
        torch.from_numpy(product),
        (a.bfloat16() + b.bfloat16()).float(),
        torch.minimum(a, b).clamp(min=0) / b,
        a.abs().log1p(),
    ]
    torch.testing.assert_close(f, torch.stack(expect), rtol=3e-7, atol=0)
    torch.testing.assert_close(f[2:5], torch.stack(expect[2:5]), rtol=0, atol=0)

    def low(v, bits):
        v &= (1 << bits) - 1
        return v - (1 << bits) if v >> bits - 1 else v

    def quotient(p, q):
        return abs(p) // abs(q) * (1 if (p < 0) == (q < 0) else -1)

    def permuted(p, q):
        data = (p & 2**32 - 1).to_bytes(4, "little") + (q & 2**32 - 1).to_bytes(4, "little")
        return int.from_bytes(bytes(data[s] for s in (5, 1, 7, 3)), "little")

    for t, (p, q) in enumerate(zip(*k.tolist(), strict=False)):
        clz = 32 - (q & 2**32 - 1).bit_length()
        assert i[:, t].tolist() == [
            quotient(p, q),
            p - q * quotient(p, q),
            p * q >> 64,
            low(p, 32) * low(q, 32) >> 32,
            (p & 2**64 - 1).bit_count() + clz,
            permuted(p, q),
            low((p >> t) ^ ((q & 2**64 - 1) >> 7) ^ (p << 3), 64),
            int(a[t]) + int(b[t]),
        ], t


@pytest.mark.parametrize("arch", [80, 120])
def test_nvcc_calls(arch):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(64, generator=g, dtype=torch.float64) * 4 - 2
    sine, power = torch.full((2, 64), torch.nan, dtype=torch.float64)
    votes = torch.zeros(64, dtype=torch.int32)
    given = struct.pack("4Qid", *(t.data_ptr() for t in (x, sine, power, votes)), 5, 3.0)
    buffers = [buffer_of(t) for t in (x, sine, power, votes)]
    launch(compiled(arch=arch), 1, 64, [given], name="calls", more_buffers=buffers)
    torch.testing.assert_close(sine, (3 * x).sin(), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(power, torch.where(x > 0, x**5 + 2 * x, 0), rtol=1e-14, atol=0)
    assert (votes == int((x > 1.9).any()) + 2 * int((x > 0).sum()) + 256).all()
    with pytest.raises(PTXError, match="out-of-bounds global"):
        launch(compiled(arch=arch), 1, 64, [given], name="calls", more_buffers=[*buffers[:3], buffer_of(votes[:63])])


def test_resources():
    """What ptxas says of each kernel and architecture: nothing spills, the reduction has its barriers."""
    command = [NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", "-cubin", "-arch=sm_90", "-o", os.devnull, "example.cu"]
    log = subprocess.run(command, cwd=Path(__file__).parent, text=True, check=True, stderr=subprocess.PIPE).stderr
    rows = {row["kernel"]: row for row in ptxas.parse(log)}
    assert len(rows) == 4
    assert all(row["arch"] == "sm_90" and 0 < row["regs"] < 64 for row in rows.values())
    assert all(row["spill_stores"] == row["spill_loads"] == 0 for row in rows.values())
    assert [row["barriers"] for name, row in sorted(rows.items()) if "margin_ce_row" in name] == [1]
