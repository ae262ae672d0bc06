"""The Triton backend where there is no GPU: it says why it cannot run. Its numbers: gpu_without_gpu."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_margin as fm
from fused_margin.backends import triton
from fused_margin.kernels import configs
from fused_margin.spec import Spec

X, W = torch.zeros(4, 8), torch.zeros(5, 8)


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def reasons(x=X, w=W, **spec):
    return "; ".join(triton.why_not(x, w, Spec(**spec)))


def test_why_not(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert reasons().startswith("embeddings are on cpu, not on a GPU")
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in reasons(None, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed (pip install triton)" in reasons(None, None)
    assert "triton: Triton is not installed" in _error(backend="triton")


def _error(**options):
    with pytest.raises(ValueError, match="cannot run this") as caught:
        fm.functional.margin_cross_entropy(X, W, torch.zeros(4).long(), fm.CosFace(), **options)
    return str(caught.value)


@pytest.mark.usefixtures("interpreted")
def test_why_not_of_an_input():
    assert "embeddings are torch.float64; the kernels take float32, bfloat16 and float16" in reasons(X.double())
    assert "compute_dtype is torch.float64" in reasons(compute_dtype=torch.float64)
    assert "the dimension is 8200; the kernels take at most 8192" in reasons(torch.zeros(1, 8200), torch.zeros(1, 8200))
    assert "sub_centers is 17; the kernels take at most 16" in reasons(sub_centers=17)
    if importlib.util.find_spec("triton"):
        assert reasons() == ""


@pytest.mark.parametrize(
    "has, said", [((7, 5), "cuda:0 has compute capability (7, 5); the kernels need (8, 0)"), ((8, 0), "")]
)
def test_why_not_of_an_old_gpu(has, said, monkeypatch):
    with FakeTensorMode():
        x, w = torch.empty(4, 8, device="cuda"), torch.empty(5, 8, device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: has)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert reasons(x, w) == said


@pytest.mark.parametrize("value", ["1", "true", "ON", "y", "Yes", "0", ""])
def test_the_interpreter_is_asked_for_in_tritons_words(value, monkeypatch):
    """The backend and the choice of tiles read the switch as Triton does."""
    meant = value not in ("0", "")
    monkeypatch.setenv("TRITON_INTERPRET", value)
    if importlib.util.find_spec("triton"):
        from triton import knobs

        assert knobs.runtime.interpret == meant
        assert (reasons() == "") == meant
    if meant:
        assert configs.device_for(X) is configs.DEVICES["interpreter"]


def test_import_brings_no_triton():
    code = "import sys, fused_margin; assert fm_free(), [n for n in sys.modules if n.startswith('triton')]"
    code = "import sys; fm_free = lambda: 'triton' not in sys.modules\n" + code
    subprocess.run([sys.executable, "-c", code], check=True)
