"""No tensor of batch x classes: the peak memory of a child process, above what its inputs take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import require

CHILD = """
import json, sys
import torch
import fused_margin as fm

def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))

batch, classes, dim, dtype, backend = json.loads(sys.argv[1])
torch.set_num_threads(2)
x = torch.randn(batch, dim).to(getattr(torch, dtype)).requires_grad_()
w = torch.randn(classes, dim, requires_grad=True)
y = torch.randint(classes, (batch,))
fm.margin_cross_entropy(x[:8], w[:500], y[:8] % 500, fm.SVSoftmax(1.2, fm.ArcFace()), backend=backend).backward()
x.grad = w.grad = None
w.grad = torch.zeros_like(w)  # so that the peak holds one new gradient and no more
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
before = status("VmRSS")
fm.margin_cross_entropy(x, w, y, fm.SVSoftmax(1.2, fm.ArcFace()), backend=backend, return_stats=True)[0].backward()
print(json.dumps(status("VmHWM") - before))
"""
MIB = 2**20


def peak(batch, classes, dim, backend, dtype="float32", keep=0) -> int:
    """Bytes that one forward and backward took at most, beside its inputs and a gradient that was there before."""
    arguments = json.dumps([batch, classes, dim, dtype, backend])
    root = Path(__file__).parent.parent
    environment = os.environ | {"FUSED_MARGIN_KEEP_MIB": str(keep)}
    command = [sys.executable, "-c", CHILD, arguments]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(autouse=True)
def linux():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from /proc, which this system lacks")


@pytest.mark.parametrize(("dtype", "keep"), [("float32", 0), ("bfloat16", 0), ("float32", 48)])
def test_no_tensor_of_batch_by_classes(dtype, keep):
    """512 x 100,000 logits would be 195 MiB in float32; one weight gradient is 24 MiB."""
    require("cpu")
    batch, classes, dim = 512, 100_000, 64
    gradient = classes * dim * 4
    assert peak(batch, classes, dim, "cpu", dtype, keep) < gradient + (24 + keep) * MIB < batch * classes * 2


def test_work_space_does_not_grow_with_classes():
    """Eight times the classes: beyond the weights' gradient, no more than 4 bytes a class and noise."""
    require("cpu")
    batch, dim = 512, 16
    small, large = (peak(batch, classes, dim, "cpu") - classes * dim * 4 for classes in (25_000, 200_000))
    assert large - small < 8 * MIB, f"{small / MIB:.1f} MiB, then {large / MIB:.1f} MiB"


def test_the_measurement_sees_such_a_tensor():
    """The reference backend holds several of them."""
    batch, classes, dim = 256, 20_000, 16
    assert peak(batch, classes, dim, "reference") > 2 * batch * classes * 4
