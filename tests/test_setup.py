"""setup.py where nvcc is broken: it matters only to who asks for CUDA."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="no setuptools")
ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
@pytest.mark.parametrize("cuda, code, says", [
    ("0", 0, "building without CUDA: FUSED_MARGIN_CUDA=0"),
    ("auto", 0, "nvcc does not say where it is"),
    ("1", 1, "FUSED_MARGIN_CUDA=1, but there is no nvcc that works on PATH"),
])  # fmt: skip
def test_broken_nvcc(cuda, code, says, tmp_path):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("CUDA", "FUSED"))}
    environment |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "FUSED_MARGIN_CUDA": cuda}
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert says in done.stderr
