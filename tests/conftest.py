"""Fixtures of the suite: backends that are not there are skipped with their reason, threads are restored."""

import pytest
import torch

import fused_margin as fm

from .cases import BACKENDS


def pytest_make_parametrize_id(val):
    """Names for what pytest would only number."""
    if isinstance(val, torch.dtype):
        return str(val).removeprefix("torch.")
    if isinstance(val, fm.Margin):
        return type(val).__name__
    return None


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
def poisoned_memory():
    """torch.empty gives nan, so that memory which is read before it is written shows."""
    torch.use_deterministic_algorithms(True)  # which fills it, see torch.utils.deterministic
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def threads():
    """Tests run on one thread, quicker on small tensors, and may choose otherwise; the value is the count before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield before
    torch.set_num_threads(before)
