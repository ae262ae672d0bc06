"""The shipped configurations, compiled for each architecture, held to a budget: no spill, tensor cores, wide loads."""

import pytest

from ..resources import ARCHES, STEPS, SWEEPING, rows_of, table

TENSOR_OPS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA", "gfx942": "MFMA"}
SPILL_BUDGET = {}  # (step, arch, kernel): bytes; what is not here may spill nothing


@pytest.fixture(scope="module")
def rows():
    found = []
    yield found
    print("\n" + table(found))


def check(step, arch, rows, only):
    for row in rows_of(step, arch, only):
        rows.append(row)
        assert row.shared <= row.limit, row
        assert row.spill <= SPILL_BUDGET.get((step.name, arch, row.kernel), 0), row
        if row.kernel in SWEEPING and "fp32" not in step.name:
            assert row.tensor_ops.startswith(TENSOR_OPS[arch]), row
            assert row.wide_loads, row


@pytest.mark.parametrize("arch", ARCHES, ids=str)
def test_budget_of_the_default(arch, rows):
    check(STEPS[0], arch, rows, SWEEPING)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES, ids=str)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_budget(step, arch, rows):
    check(step, arch, rows, None)
