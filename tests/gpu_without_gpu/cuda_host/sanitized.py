"""Runs Python with a sanitizer in it, so that simulated kernels built for that sanitizer can be called there.

report = run("thread", "-m", "pytest", "tests/...")
report.code, report.found        # found: what the sanitizer said, "" if nothing
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from .builder import GXX, ROOT

# Threads of torch's own would only add false reports; memory that Python never frees is none of ours.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
REPORTED = 66


class Report(NamedTuple):
    code: int
    output: str
    found: str


def _library(name: str) -> str:
    done = subprocess.run([GXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def why_not(sanitizer: str) -> str:
    """Why it cannot be used here, "" if it can."""
    name = f"lib{sanitizer[0]}san.so"
    if not Path(_library(name)).is_absolute():
        return f"g++ has no {name}"
    return "" if shutil.which("setarch") else "no setarch, and the sanitizers want fixed addresses"


def run(sanitizer: str, *arguments: str, timeout: int = 600) -> Report:
    """`python ARGUMENTS` from the root of the repository; builder takes libraries of the sanitizer ("": none) there."""
    # libstdc++ beside it, as Python does not bring it before the sanitizer looks for it.
    preload = f"{_library(f'lib{sanitizer[0]}san.so')} {_library('libstdc++.so.6')}" if sanitizer else ""
    with tempfile.TemporaryDirectory() as folder:
        log = f"{folder}/report"
        options = {
            "ASAN_OPTIONS": f"detect_leaks=0:exitcode={REPORTED}:log_path={log}",
            "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={log}",
            # Memory that a race was found on may have been freed since: a later race there is another one.
            "TSAN_OPTIONS": f"exitcode={REPORTED}:log_path={log}:suppress_equal_addresses=0",
        }
        variables = {**ENVIRONMENT, **options, "FUSED_MARGIN_SANITIZER": sanitizer, "LD_PRELOAD": preload}
        fixed = ["setarch", "-R"] if sanitizer else []
        command = [*fixed, "env", *(f"{k}={v}" for k, v in variables.items()), sys.executable, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=timeout)
        found = "\n".join(p.read_text(errors="replace") for p in sorted(Path(folder).glob("report*")))
    return Report(done.returncode, done.stdout + done.stderr, found)
