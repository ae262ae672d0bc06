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
GXX, NVCC = shutil.which("g++"), shutil.which("nvcc")
NVCC_FLAGS = ("-std=c++17", "-O3", "--fmad=false")
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


def _run(*command: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # see sanitized.py
    return subprocess.run(command, capture_output=True, env=environment)


@functools.cache
def headers() -> bytes:
    """What any source may include, and the compiler."""
    digest = hashlib.sha256(_run(GXX, "--version").stdout)
    for folder in (HERE, CSRC):
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cuh")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.digest()


def _compile(source: Path, flags: tuple[str, ...]) -> Path:
    key = hashlib.sha256(headers() + source.read_bytes() + "\n".join((str(source), *flags)).encode()).hexdigest()[:16]
    return _made(
        CACHE / f"{source.stem}-{key}.o",
        [*flags, f"-I{HERE / 'simulator'}", f"-I{CSRC}", "-x", "c++", "-c", str(source)],
    )


def _made(target: Path, arguments: list[str], compiler: str = GXX) -> Path:
    """Runs the compiler unless the target is there; several processes may do so at once."""
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=CACHE)
        os.close(handle)
        done = _run(compiler, *arguments, "-o", part)
        if done.returncode:
            os.unlink(part)
            raise RuntimeError(f"{compiler} failed:\n{done.stderr.decode()}")
        os.replace(part, target)
    return target


def build(
    *sources: str | Path,
    sanitizer: str = "",
    flags: tuple[str, ...] = (),
    more: dict[Path, tuple[str, ...]] = {},  # noqa: B006 (read only)
    link: tuple[str, ...] = (),
) -> Path:
    """The shared object of these sources (relative to this folder); `more`: flags of single ones."""
    of_sanitizer = SANITIZERS[sanitizer]

    def compiled(source):
        return _compile(HERE / source, (*FLAGS, *of_sanitizer, *flags, *more.get(source, ())))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    key = hashlib.sha256("\n".join([*(o.name for o in objects), *of_sanitizer, *link]).encode()).hexdigest()[:16]
    target = CACHE / f"{Path(sources[0]).stem}-{key}.so"
    return _made(target, ["-shared", *of_sanitizer, *map(str, objects), *link])


def ptx(source: Path, arch: int) -> str:
    """What nvcc makes of a .cu file, with the flags of setup.py."""
    flags = (f"-arch=sm_{arch}", *NVCC_FLAGS)
    version = _run(NVCC, "--version").stdout
    key = hashlib.sha256(headers() + version + source.read_bytes() + "\n".join(flags).encode()).hexdigest()[:16]
    return _made(CACHE / f"{source.stem}-{key}.ptx", [*flags, "-ptx", str(source)], NVCC).read_text()


def sanitizer_in_use() -> str:
    """The one that this process was started with, see sanitized.py."""
    return os.environ.get("FUSED_MARGIN_SANITIZER", "")


@functools.cache
def load(*sources: str | Path, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The library of these sources, built for the sanitizer in use."""
    return ctypes.CDLL(str(build(*sources, sanitizer=sanitizer_in_use(), flags=flags)))
