"""Fixtures of the suite: backends that are not there are skipped with their reason, threads are restored."""

import pytest
import torch

import fused_margin as fm

from .cases import BACKENDS


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs with --slow")
    if "s" not in config.option.reportchars:
        config.option.reportchars += "s"  # every skip prints its reason


def pytest_collection_modifyitems(config, items):
    if config.option.slow or "slow" in config.option.markexpr:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in set(slow)]


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
