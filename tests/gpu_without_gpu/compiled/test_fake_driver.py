"""The fake driver's own tests: an example kernel's resources against a budget, and what must not fit or must spill."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from .. import fake_driver, margin_ce

SMALL = {"BM": 32, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 3}
WIDE = {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}
HUGE = {"BM": 128, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 4}
CASES = [  # arch, precision, configuration, tensor-core opcode, bytes that may be spilled
    (80, "bf16", WIDE, "HMMA", 0),
    (90, "bf16", WIDE, "HGMMA", 0),
    (100, "bf16", WIDE, "UTCHMMA", 0),
    (120, "bf16", WIDE, "HMMA", 64),
    ("gfx942", "bf16", WIDE, "MFMA", 0),
    (80, "tf32x3", SMALL, "HMMA", 0),
    (120, "tf32x3", SMALL, "HMMA", 0),
    (90, "ieee", SMALL, None, 64),
]


def slow(values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def table(request):
    rows = []
    yield rows
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\narch    precision  tile                  registers  spill B  shared B  tensor-core opcodes")
        for prec, config, r in rows:
            tile = "{BM}x{BN}x{BK} w{num_warps} s{num_stages}".format(**config)
            arch = r["arch"] if isinstance(r["arch"], str) else f"sm_{r['arch']}"
            ops = " ".join(f"{op}:{n}" for op, n in r["tensor_ops"].items()) or "-"
            print(f"{arch:7} {prec:10} {tile:21} {r['regs']:9}  {r['spill']:7}  {r['shared']:8}  {ops}")


def build(arch, prec, config):
    """Go through the real launch code (compile only for HIP); returns the fake driver and the compiled kernel."""
    driver = fake_driver.FakeDriver(arch)
    triton.runtime.driver.set_active(driver)
    x, w, y = margin_ce.sample(256, 512, 4096, torch.bfloat16 if prec == "bf16" else torch.float32)
    config = {"prec": "ieee" if prec == "bf16" else prec, **config}
    return driver, margin_ce.run(x, w, y, warmup=isinstance(arch, str), **config)[3]


@pytest.mark.parametrize(
    "arch, prec, config, tensor_op, spill_budget",
    [slow(c) if c[0] in (100, 120) else c for c in CASES],
    ids=[f"{c[0]}-{c[1]}" for c in CASES],
)
def test_budget(table, arch, prec, config, tensor_op, spill_budget):
    driver, compiled = build(arch, prec, config)
    r = fake_driver.resources(compiled)
    table.append((prec, config, r))
    assert r["shared"] <= fake_driver.SHARED_LIMIT[arch]
    assert r["spill"] <= spill_budget
    assert set(r["tensor_ops"]) == ({tensor_op} if tensor_op else set())
    if not isinstance(arch, str):
        assert driver.launches == [("ce_fwd", (triton.cdiv(256, config["BM"]), 1, 1))]
        assert ("tt.divisibility", 16) in map(tuple, compiled.src.attrs[0,])  # else no 16-byte copies


def test_too_large_for_the_device():
    """Planted: 144 KiB of shared memory fit on sm_80, not on sm_120."""
    build(80, "bf16", HUGE)
    with pytest.raises(OutOfResources, match="shared memory, Required: 147456, Hardware limit: 101376"):
        build(120, "bf16", HUGE)


def test_register_pathology(table):
    """Planted: under heavy pressure ptxas falls back to 32 registers and spills kilobytes; only the budget sees it."""
    config = {"BM": 64, "BN": 128, "BK": 64, "num_warps": 4, "num_stages": 3}
    r = fake_driver.resources(build(80, "tf32x3", config)[1])
    table.append(("tf32x3", config, r))
    assert r["regs"] < 64
    assert r["spill"] > 8192


@triton.autotune([triton.Config({"B": 64}, num_warps=4), triton.Config({"B": 128}, num_warps=8)], key=["n"])
@triton.jit
def increment(X, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(X + i, tl.load(X + i, mask=i < n) + 1, mask=i < n)


def test_autotune():
    driver = fake_driver.FakeDriver(90)
    triton.runtime.driver.set_active(driver)
    increment[lambda meta: (triton.cdiv(1000, meta["B"]),)](torch.zeros(1000), 1000)
    assert {grid[0] for _, grid in driver.launches} == {16, 8}  # both configurations went through the launch code
    assert increment.best_config in increment.configs
