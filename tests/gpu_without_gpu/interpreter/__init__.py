"""Rung 1: Triton kernels in Triton's interpreter, on CPU tensors, with bf16 repaired and memory guarded."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported; conftest.py sees to it that it is not yet
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads cost up to 9x on busy cores

import pytest

pytest.importorskip("triton", reason="no triton (Linux: pip install triton)")

from .. import interp_bf16, oob_guard

interp_bf16.install()
oob_guard.install()
