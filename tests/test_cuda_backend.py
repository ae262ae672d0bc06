"""The CUDA C++ backend where there is no GPU: it says why it cannot run. Its numbers: gpu_without_gpu/cuda_host."""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fused_margin as fm
from fused_margin.backends import choose, cuda
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


@pytest.fixture
def library(monkeypatch):
    """A library that was built for a few GPUs, on a machine with some; .says: the driver's words for each."""
    made, current = SimpleNamespace(says=[b"", b"no kernel image is available for execution on the device"]), []

    @contextlib.contextmanager
    def enter(device):
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", enter)
    made.fm_cuda_why_not = lambda: made.says[current[-1]]
    made.fm_cuda_architectures = lambda: b"900,1000"
    monkeypatch.setattr(cuda.cpu, "_C", made)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (11, 0))
    cuda._no_code.cache_clear()
    yield made
    cuda._no_code.cache_clear()


@pytest.mark.usefixtures("library")
def test_of_a_gpu_without_code():
    assert cuda._no_code(torch.device("cuda", 0)) == ""
    assert cuda._no_code(torch.device("cuda", 1)) == (
        "cuda:1 has compute capability 11.0, and the extension, built for 9.0, 10.0, cannot run there (no kernel image "
        "is available for execution on the device); from 8.0 on, build it with TORCH_CUDA_ARCH_LIST=11.0"
    )


@pytest.mark.skipif(not cuda._built(), reason="the extension has no CUDA kernels")
def test_the_library_says_what_it_was_built_for():
    functions = [cuda.cpu._C[name] for name in ("fm_cuda_why_not", "fm_cuda_architectures")]  # no restype of others
    for function in functions:
        function.restype = ctypes.c_char_p
    assert all(800 <= int(a) < 2000 for a in functions[1]().split(b","))
    if not torch.cuda.is_available():
        assert functions[0]()  # no device, or no driver


GPU_BACKENDS = {"triton": fm.BACKENDS["triton"], "cuda": cuda}


@pytest.mark.parametrize(
    "can_run, chosen", [(("triton", "cuda"), "triton"), (("triton",), "triton"), (("cuda",), "cuda"), ((), "reference")]
)
@pytest.mark.filterwarnings("ignore::fused_margin.FallbackWarning")
def test_triton_goes_first(can_run, chosen, monkeypatch):
    """What `backend=None` takes on a GPU, where the CPU's kernels have no say."""
    monkeypatch.setattr(cuda.cpu, "why_not", lambda *args: ["embeddings are on a GPU"])
    for name, module in GPU_BACKENDS.items():
        monkeypatch.setattr(module, "why_not", lambda *args, name=name: [] if name in can_run else ["it is not there"])
    assert choose(None, X, W, Spec(), "") == chosen


def test_registered_where_built():
    """The extension's CUDA kernels, or none: never a part of them. They load where torch has no CUDA."""
    operators = ("target_cosine", "sweep", "sweep_loss", "sweep_backward", "update_rows", "sweep_step")
    found = {torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_margin_cuda::{op}", "CUDA") for op in operators}
    assert found == {cuda._built()}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.skipif(cuda.cpu._C is None, reason="the extension is not built")
@pytest.mark.skipif(os.environ.get("FUSED_MARGIN_CUDA") == "0", reason="FUSED_MARGIN_CUDA=0")
def test_built_where_nvcc_is():
    assert cuda._built()


def test_nothing_starts_on_import():
    code = "import torch, fused_margin; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)
