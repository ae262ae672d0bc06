"""Rung 2: Triton's own compiler and launch code under a fake driver, and the compiled PTX executed in an emulator."""

import os

assert os.environ.get("TRITON_INTERPRET", "0") != "1", "TRITON_INTERPRET=1 rules out compiling: unset it"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 warns, 3.10 will turn it off
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads cost up to 9x on busy cores

import pytest  # noqa: E402 (the switches above must come first)

pytest.importorskip("triton", reason="no triton (Linux: pip install triton)")
