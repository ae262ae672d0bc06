"""The shipped configurations, compiled for each architecture, held to a budget: no spill, tensor cores, wide loads.

Of the corners a small spill is allowed, rather than half of a tile once more, which loads x twice as often.
"""

import pytest

from ..proof import markdown, record
from ..resources import ARCHES, CORNERS, STEPS, SWEEPING, UPDATES, UPDATING, rows_of, shown

TENSOR_OPS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA", "gfx942": "MFMA"}

SPILLED = 64  # bytes stored and loaded, a thread, in a corner


@pytest.fixture(scope="module")
def rows():
    found = []
    yield found
    print("\n" + markdown(list(map(shown, found))))


def check(step, arch, only, rows=None, spilled=0):
    for row in rows_of(step, arch, only):
        if rows is not None:
            rows.append(row)
            record("resources", shown(row))
        assert row.shared <= row.limit, row
        assert row.spill <= spilled, row
        if row.kernel in SWEEPING and "fp32" not in step.name:
            assert row.tensor_ops.startswith(TENSOR_OPS[arch]), row
        if row.kernel in (*SWEEPING, *UPDATING):
            assert row.wide_loads, row


@pytest.mark.parametrize("arch", [80, 90, "gfx942"], ids=str)
def test_sweep_of_the_default(arch):
    check(STEPS[0], arch, ("sweep_kernel",))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES, ids=str)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_budget(step, arch, rows):
    check(step, arch, None if step is STEPS[0] else SWEEPING, rows)


@pytest.mark.slow
@pytest.mark.parametrize("step, where", CORNERS, ids=lambda value: getattr(value, "name", ""))
def test_corners(step, where, rows):
    for arch, kernel in where:
        check(step, arch, (kernel,), rows, SPILLED)


@pytest.mark.parametrize(
    "step, arch",
    [
        pytest.param(step, arch, marks=() if arch in (80, 90) and step in UPDATES[1::3] else pytest.mark.slow)
        for step in UPDATES
        for arch in ARCHES
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_updates(step, arch, rows):
    check(step, arch, UPDATING, rows)
