"""The CUDA C++ backend where there is no GPU: it says why it cannot run. Its numbers: gpu_without_gpu/cuda_host."""

import subprocess
import sys

import pytest
import torch

import fused_margin as fm
from fused_margin.backends import cuda
from fused_margin.spec import Spec

X, W = torch.zeros(4, 8), torch.zeros(5, 8)


def reasons(x=X, w=W, **spec):
    return "; ".join(cuda.why_not(x, w, Spec(**spec)))


def test_why_not(monkeypatch):
    monkeypatch.setattr(cuda, "_built", lambda: True)
    assert reasons() == "embeddings are on cpu, not on a GPU; weight are on cpu, not on a GPU"
    if not torch.cuda.is_available():
        assert reasons(None, None) == "torch sees no GPU"
    monkeypatch.setattr(cuda, "_built", lambda: False)
    assert reasons().startswith("the C++ extension has no CUDA kernels (install nvcc")
    with pytest.raises(ValueError, match="cuda: the C\\+\\+ extension has no CUDA kernels"):
        fm.functional.margin_cross_entropy(X, W, torch.zeros(4).long(), fm.CosFace(), backend="cuda")


def test_why_not_of_an_input(monkeypatch):
    monkeypatch.setattr(cuda, "_built", lambda: True)
    monkeypatch.setattr(cuda, "_KEY", "CPU")
    assert reasons() == ""
    assert reasons(X.double()) == "embeddings are torch.float64; the kernels take float32, bfloat16 and float16"
    assert reasons(compute_dtype=torch.float64) == "compute_dtype is torch.float64"
    assert reasons(sub_centers=17) == "sub_centers is 17; the kernels take at most 16"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert reasons() == "this torch is built for AMD GPUs"


def test_of_an_old_gpu(monkeypatch):
    cuda._too_old.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert cuda._too_old(torch.device("cuda")) == "cuda has compute capability (7, 5); the kernels need (8, 0)"
    cuda._too_old.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert cuda._too_old(torch.device("cuda")) == ""
    cuda._too_old.cache_clear()


def test_triton_goes_first():
    """What `backend=None` takes on a GPU."""
    assert list(fm.BACKENDS) == ["cpu", "triton", "cuda", "reference"]


def test_registered_where_built():
    """The extension's CUDA kernels, or none: never a part of them. They load where torch has no CUDA."""
    operators = ("target_cosine", "sweep", "sweep_loss", "sweep_backward", "update_rows", "sweep_step")
    found = {torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_margin_cuda::{op}", "CUDA") for op in operators}
    assert found == {cuda._built()}


def test_nothing_starts_on_import():
    code = "import torch, fused_margin; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)
