"""Compiles CUDA C++ for the simulator: a shared object for each set of sources and flags, kept in build/cuda_host.

load("examples.cpp")                               # plain, for ctypes
build("examples.cpp", sanitizer="thread")          # for a process that preloads the sanitizer: sanitized.py
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_host"
GXX = shutil.which("g++")
# As a device has it: accesses of any type to one memory; float operations one by one.
FLAGS = (
    "-std=c++17", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-DFM_HOST_SIM=1",
    "-fvisibility=hidden", "-fno-gnu-unique",  # several such libraries are loaded into one process
)  # fmt: skip
SANITIZERS = {  # ASan and UBSan go together
    "": (),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"),
    "thread": ("-fsanitize=thread",),
}


def _gxx(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # see sanitized.py
    return subprocess.run([GXX, *arguments], capture_output=True, env=environment)


@functools.cache
def _headers() -> bytes:
    """What any source may include, and the compiler."""
    digest = hashlib.sha256(_gxx("--version").stdout)
    for folder in (HERE, CSRC):
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cuh")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.digest()


def _compile(source: Path, flags: tuple[str, ...]) -> Path:
    key = hashlib.sha256(_headers() + source.read_bytes() + "\n".join(flags).encode()).hexdigest()[:16]
    return _made(
        CACHE / f"{source.stem}-{key}.o",
        [*flags, f"-I{HERE / 'simulator'}", f"-I{CSRC}", "-x", "c++", "-c", str(source)],
    )


def _made(target: Path, arguments: list[str]) -> Path:
    """Runs g++ unless the target is there; several processes may do so at once."""
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=CACHE)
        os.close(handle)
        done = _gxx(*arguments, "-o", part)
        if done.returncode:
            os.unlink(part)
            raise RuntimeError(f"g++ failed:\n{done.stderr.decode()}")
        os.replace(part, target)
    return target


def build(*sources: str | Path, sanitizer: str = "", flags: tuple[str, ...] = (), link: tuple[str, ...] = ()) -> Path:
    """The shared object of these sources (relative to this folder)."""
    of_sanitizer = SANITIZERS[sanitizer]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda s: _compile(HERE / s, (*FLAGS, *of_sanitizer, *flags)), sources))
    key = hashlib.sha256("\n".join([*(o.name for o in objects), *of_sanitizer, *link]).encode()).hexdigest()[:16]
    target = CACHE / f"{Path(sources[0]).stem}-{key}.so"
    return _made(target, ["-shared", *of_sanitizer, *map(str, objects), *link])


def sanitizer_in_use() -> str:
    """The one that this process was started with, see sanitized.py."""
    return os.environ.get("FUSED_MARGIN_SANITIZER", "")


@functools.cache
def load(*sources: str | Path, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The library of these sources, built for the sanitizer in use."""
    return ctypes.CDLL(str(build(*sources, sanitizer=sanitizer_in_use(), flags=flags)))
