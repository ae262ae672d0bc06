"""The model's bytes and operations of the CUDA backend (bench/cuda_cost.py) against what the emulator counts."""

import re

import pytest
import torch

import fused_margin as fm
from bench import cost, cuda_cost

from . import builder
from .backend import emulated, execute

MODELLED = ("forward", "gradient", "finish_weights", "unit_weights")  # O(C D)


@pytest.mark.skipif(builder.NVCC is None, reason="no nvcc on PATH")
def test_kernels_on_classes():
    """Operations of the tensor cores exactly; bytes up to what [B] and a row's last 32 numbers are."""
    batch, classes, dim, found = 20, 270, 64, {}

    def run(name, *rest):
        counts = execute(name, *rest)
        found[re.search(r"3gpu\d+([a-z_]+?)_kernel", name)[1]] = counts

    x = torch.randn(batch, dim).bfloat16().requires_grad_()
    w = torch.randn(classes, dim).requires_grad_()
    with emulated(80, run, programs=2):
        loss = fm.functional.margin_cross_entropy(x, w, torch.arange(batch), fm.ArcFace(), backend="cuda")
        torch.autograd.grad(loss, (x, w))
    model = {c.name: c for c in cuda_cost.of_cuda_step(batch, classes, dim, programs=2, l2_bytes=3 << 20)}
    for name in MODELLED:
        assert model[name].flops == found[name].flops, name
        assert model[name].read == pytest.approx(found[name].read, rel=0.15), name
        assert model[name].written == pytest.approx(found[name].written, rel=0.02), name


@pytest.mark.parametrize("classes", [10**5, 3 * 10**7])
def test_every_class_is_in_one_chunk(classes):
    launches = cuda_cost.launches(2, classes, programs=132, l2_bytes=48 << 20)
    tiles = sum(launch.numbers[-5] for launch in launches if launch.name == "gradient")
    assert tiles == -(-classes // 128)
    names = [launch.name for launch in launches]
    assert names[:5] == ["prologue", "forward", "merge", "loss", "sum"]
    chunks = names.count("gradient")
    of_chunk = ["gradient", "finish_weights", "unit_weights", "add"]
    assert names[5:] == ["backward_rows", "prologue", *of_chunk[:3], *of_chunk * (chunks - 1), "finish_x"]
    assert cost.GEMM not in names
