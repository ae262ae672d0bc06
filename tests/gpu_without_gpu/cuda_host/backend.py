"""The CUDA backend on CPU tensors: operators, launches and library products as they are, kernels on the host.

with simulated(seed=3): cases.run(problem, "cuda")       # every thread a fiber, see simulator/
with emulated(80): cases.run(problem, "cuda")            # nvcc's PTX, in the emulator
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils import cpp_extension

from fused_margin.backends import cuda as backend

from .. import ptx as emulator
from . import builder

_ASKS_A_DRIVER = builder.CSRC / "cuda" / "architectures.cu"
KERNELS = tuple(sorted({*(builder.CSRC / "cuda").glob("*.cu")} - {_ASKS_A_DRIVER}))
replaced: dict[Path, Path] = {}  # of the sources, see planted.py
_OPERATORS = builder.CSRC / "cuda" / "ops.cpp"
_ENTRIES = ("target_cosine", "sweep", "sweep_loss", "sweep_backward", "update_rows", "sweep_step")
_HOOK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p,
    ctypes.c_size_t,
)  # fmt: skip


def _torch_flags() -> tuple[str, ...]:
    includes = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    return (*includes, "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-DFM_DISPATCH_KEY=CPU")


@functools.cache
def path() -> Path:
    """The backend's library for the simulator and the sanitizer in use."""
    link = [f"-L{d}" for d in cpp_extension.library_paths()]
    flags = (*_torch_flags(), "-include", str(builder.HERE / "simulator" / "allocations.h"))
    of_torch = dict.fromkeys((replaced.get(_OPERATORS, _OPERATORS), builder.HERE / "backend.cpp"), flags)
    sources = [*of_torch, *(replaced.get(kernel, kernel) for kernel in KERNELS)]
    return builder.build(*sources, sanitizer=builder.sanitizer_in_use(), more=of_torch, link=(*link, "-ltorch_cpu"))


@functools.cache
def library() -> ctypes.CDLL:
    torch.ops.load_library(str(path()))
    loaded = ctypes.CDLL(str(path()))
    loaded.fm_cuda_cut.argtypes = [ctypes.c_int64, ctypes.c_int64]
    loaded.allocation.argtypes = [ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)]
    loaded.allocation.restype, loaded.count_allocations.restype = ctypes.c_void_p, ctypes.c_int64
    loaded.simulator_hook.argtypes = [ctypes.c_void_p]
    return loaded


@contextlib.contextmanager
def simulated(seed: int = 0, programs: int = 0, chunk: int = 0, truncates: bool = False) -> Iterator[ctypes.CDLL]:
    """Within the block the CUDA backend takes CPU tensors; programs, chunk: as fm_cuda_cut takes them.

    truncates: sums of tensor-core products are cut off, as on real ones.
    """
    loaded = library()
    why_not, backend.why_not = backend.why_not, lambda *args: []
    loaded.simulator_seed(seed)
    loaded.simulator_truncates(truncates)
    loaded.fm_cuda_cut(programs, chunk)
    try:
        yield loaded
    finally:
        loaded.fm_cuda_cut(0, 0)
        loaded.simulator_truncates(False)
        backend.why_not = why_not


# The compiled code

Execute = Callable[..., object]


@functools.cache
def _symbols() -> dict[int, str]:
    """Functions of the library by their address in this process."""
    listed = subprocess.run(["nm", str(path())], capture_output=True, text=True, check=True).stdout
    found = {name: int(at, 16) for at, name in re.findall(r"^([0-9a-f]+) [TtWw] (\S+)$", listed, re.M)}
    loaded = ctypes.cast(library().simulator_hook, ctypes.c_void_p).value
    return {at + loaded - found["simulator_hook"]: name for name, at in found.items()}


@functools.cache
def module_of(name: str, arch: int) -> str:
    """The PTX that has this kernel, without the other kernels of its file."""
    for source in KERNELS:
        text = builder.ptx(source, arch)
        if f".entry {name}(" in text:
            return re.sub(r"^\.visible \.entry (?!" + re.escape(name) + r"\().*?^\}$", "", text, flags=re.M | re.S)
    raise LookupError(f"no kernel {name} in {', '.join(map(str, KERNELS))}")


@functools.lru_cache(maxsize=256)
def parsed(text: str, name: str) -> emulator.Kernel:
    return emulator.Kernel(text, name)


def execute(name, text, grid, threads, argument, smem, buffers, **options):
    return emulator.launch(parsed(text, name), grid, threads, [argument], smem=smem, more_buffers=buffers, **options)


@contextlib.contextmanager
def emulated(arch: int | None, execute: Execute = execute, **options) -> Iterator[ctypes.CDLL]:
    """As `simulated`, but each launch goes to execute(name, ptx, grid, threads, argument, smem, buffers).

    Without an architecture there is no PTX, and nothing is computed: for a function that only looks at launches.
    """
    given: list[Tensor] = []
    failed: list[BaseException] = []

    def launch(kernel, grid, threads, smem, argument, size):
        try:
            name = _symbols()[kernel]
            buffers = [emulator.memory.buffer_of(t) for t in given if t.numel()] + _allocations(loaded)
            text = module_of(name, arch) if arch else ""
            execute(name, text, tuple(grid[:3]), threads, ctypes.string_at(argument, size), smem, buffers)
        except BaseException as e:  # it must not pass through C++
            failed.append(e)
            return 1
        return 0

    def entering(function):
        def call(*args):
            given[:] = _tensors(args)
            loaded.forget_allocations()
            try:
                return function(*args)
            except Exception:
                if failed:
                    raise failed.pop() from None
                raise

        return call

    hook = _HOOK(launch)
    before = {name: getattr(backend, name) for name in _ENTRIES}
    with simulated(**options) as loaded:
        loaded.simulator_hook(ctypes.cast(hook, ctypes.c_void_p))
        loaded.simulator_computes(arch is not None)
        for name, function in before.items():
            setattr(backend, name, entering(function))
        try:
            yield loaded
        finally:
            loaded.simulator_hook(None)
            loaded.simulator_computes(True)
            for name, function in before.items():
                setattr(backend, name, function)


def _tensors(arguments) -> list[Tensor]:
    """Also of lists of them, and of records."""
    found = []
    for a in arguments:
        found += [a] if isinstance(a, Tensor) else _tensors(a) if isinstance(a, (tuple, list)) else []
    return found


def _allocations(loaded: ctypes.CDLL) -> list[tuple[int, np.ndarray]]:
    found, size = [], ctypes.c_int64()
    for number in range(loaded.count_allocations()):
        address = loaded.allocation(number, ctypes.byref(size))
        if size.value:
            found.append((address, np.ctypeslib.as_array((ctypes.c_uint8 * size.value).from_address(address))))
    return found
