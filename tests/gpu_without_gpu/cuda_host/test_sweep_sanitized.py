"""The real kernels, whole steps of heads and sweeps, under the sanitizers: nothing is reported."""

import pytest

from . import sanitized

pytestmark = pytest.mark.slow
NUMBERS = "tests/gpu_without_gpu/cuda_host/test_sweep_numbers.py"
CHOSEN = {  # by name; the quick ones of the file
    "address": "test_sweep or test_heads or several_blocks",
    "thread": "test_heads or (test_sweep and (identity or hard))",
}


@pytest.mark.parametrize("sanitizer", CHOSEN)
def test_silent(sanitizer):
    if reason := sanitized.why_not(sanitizer):
        pytest.skip(reason)
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", NUMBERS, "-k", CHOSEN[sanitizer])
    report = sanitized.run(sanitizer, *arguments, timeout=1200)
    assert report.code == 0, report.output + report.found
    assert not report.found
    assert " passed" in report.output
