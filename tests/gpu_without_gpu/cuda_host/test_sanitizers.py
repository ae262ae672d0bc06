"""The sanitizers over the example kernels: silent on the right ones, each planted bug reported with its kernel."""

import pytest

from . import sanitized
from .test_simulator import BUGS, SEEDS, WRONG

EXAMPLES = "tests/gpu_without_gpu/cuda_host/test_simulator.py"
MODULE = EXAMPLES.removesuffix(".py").replace("/", ".")
pytestmark = pytest.mark.slow


@pytest.fixture(params=["address", "thread"])
def sanitizer(request):
    if reason := sanitized.why_not(request.param):
        pytest.skip(reason)
    return request.param


def wrong(which):
    """Python that runs one of the kernels of examples.cpp that are wrong, on a vector of 64 numbers."""
    return f"run('run_wrong', {WRONG.index(which)}, torch.zeros(64));"


def in_python(sanitizer, code):
    return sanitized.run(sanitizer, "-c", f"import torch; from {MODULE} import run, product_error; {code}")


def test_silent_on_right_kernels(sanitizer):
    chosen = "pipelined or tf32 or conversions or (reduction and 33 and assembly)"
    report = sanitized.run(sanitizer, "-m", "pytest", "-q", "-p", "no:cacheprovider", EXAMPLES, "-k", chosen)
    assert report.code == 0, report.output
    assert not report.found
    assert " passed" in report.output


@pytest.mark.parametrize("sanitizer", ["address"], indirect=True)
@pytest.mark.parametrize(
    "which, complaint",
    [
        ("overrun_global", "heap-buffer-overflow"),
        ("overrun_shared", "use-after-poison"),
        ("overflow", "signed integer overflow"),
    ],
)
def test_overruns_and_overflows(sanitizer, which, complaint):
    report = in_python(sanitizer, wrong(which))
    assert report.code != 0
    assert complaint in report.found + report.output
    assert which in report.found + report.output


@pytest.mark.parametrize("sanitizer", ["thread"], indirect=True)
def test_races(sanitizer):
    """Of the planted ones, each; of pipelines under some of the schedules, as ThreadSanitizer's history is short."""
    races = [which for which in WRONG if which.startswith("race")]
    pipelines = f"[product_error(40, 72, 200, bug=bug, seed=seed) for bug in {BUGS[1:]} for seed in {list(SEEDS)}]"
    report = in_python(sanitizer, "".join(map(wrong, races)) + pipelines)
    assert report.code == sanitized.REPORTED
    stacks = report.found.split("WARNING: ThreadSanitizer: data race")
    kernels = [
        *races,
        *(f"product<__nv_bfloat16, false, (fused_margin::Bug){number}>" for number in range(1, len(BUGS))),
    ]
    assert [name for name in kernels if not any(name in stack for stack in stacks)] == []
