"""Bugs planted in the real kernels are found: by wrong numbers under some schedule, or by a sanitizer's report."""

import pytest

from . import sanitized
from .planted import PLANTED

pytestmark = pytest.mark.slow
MODULE = "tests.gpu_without_gpu.cuda_host.planted"


@pytest.mark.parametrize("name", PLANTED)
def test_numbers(name):
    report = sanitized.run("", "-m", MODULE, name)
    assert report.code == 0, report.output
    assert ("wrong under: []" not in report.output) == PLANTED[name].numbers


REPORTS = [(name, sanitizer) for name, planted in PLANTED.items() for sanitizer in planted.report]


@pytest.mark.parametrize("name, sanitizer", [("none", "address"), ("none", "thread"), *REPORTS])
def test_reports(name, sanitizer):
    if reason := sanitized.why_not(sanitizer):
        pytest.skip(reason)
    report = sanitized.run(sanitizer, "-m", MODULE, name)
    assert report.code == (sanitized.REPORTED if name != "none" else 0), report.output
    assert PLANTED[name].report.get(sanitizer, "") in report.found
    assert bool(report.found) == (name != "none")
