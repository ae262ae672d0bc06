"""Fixtures of the suite: backends that are not there are skipped with their reason, threads are restored."""

import pytest
import torch

import fused_margin as fm

from .cases import BACKENDS


def require(backend: str) -> str:
    """The backend's name, or a skip that says why it cannot run."""
    reasons = fm.why_not(backend)
    if reasons:
        pytest.skip(f"backend {backend}: {', '.join(reasons)}")
    return backend


@pytest.fixture(params=BACKENDS)
def backend(request):
    return require(request.param)


@pytest.fixture
def threads():
    """Restores the thread count after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
