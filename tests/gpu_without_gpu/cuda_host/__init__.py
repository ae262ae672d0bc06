"""CUDA C++ kernels on the host: compiled by g++ against a simulator, every CUDA thread a fiber (simulator/)."""

import shutil

import pytest

if shutil.which("g++") is None:
    pytest.skip("no g++ on PATH", allow_module_level=True)
