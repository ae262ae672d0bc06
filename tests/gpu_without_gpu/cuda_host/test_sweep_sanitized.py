"""The real kernels, whole steps of heads, sweeps and optimizers, under the sanitizers: nothing is reported."""

import pytest

from . import sanitized

pytestmark = pytest.mark.slow
FILES = "tests/gpu_without_gpu/cuda_host/test_{}_numbers.py"
CHOSEN = {  # by name; the quick ones of each file
    ("address", "sweep"): "test_sweep or test_heads or several_blocks",
    ("thread", "sweep"): "test_heads or (test_sweep and (identity or hard))",
    ("address", "step"): "not trainings",
    ("thread", "step"): "layouts or test_rows or strides",
}


@pytest.mark.parametrize("sanitizer, kind", CHOSEN)
def test_silent(sanitizer, kind):
    if reason := sanitized.why_not(sanitizer):
        pytest.skip(reason)
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", FILES.format(kind), "-k", CHOSEN[sanitizer, kind])
    report = sanitized.run(sanitizer, *arguments, timeout=1200)
    assert report.code == 0, report.output + report.found
    assert not report.found
    assert " passed" in report.output
