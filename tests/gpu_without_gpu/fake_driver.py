"""A Triton driver without a GPU: real specialization, compilation and resource checks; the launch itself is recorded.

    triton.runtime.driver.set_active(FakeDriver(90))              # or 80, 100, 120, ...; "gfx942": kernel.warmup only
    resources(kernel[grid](*cpu_tensors, BLOCK=64, num_warps=8))  # registers, spills, shared bytes, tensor-core opcodes
FakeDriver(80, execute=ptx.launch) also runs the compiled PTX on the CPU tensors (ptx/).
    with recorded(90) as launches: step(meta_tensors)           # what is launched, with every argument; no compilation
"""

import contextlib
import inspect
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

# cudaDevAttrMaxSharedMemoryPerBlockOptin, and the LDS of one workgroup
# fmt: off
SHARED_LIMIT = {
    75: 65536, 80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 110: 232448,
    120: 101376, 121: 101376, "gfx90a": 65536, "gfx942": 65536, "gfx950": 163840, "gfx1100": 65536,
}
# fmt: on


def _tool(command, content, suffix):
    """Output of `command + [file]` for a temporary file with this content."""
    with tempfile.NamedTemporaryFile(suffix=suffix) as f:
        f.write(content)
        f.flush()
        r = subprocess.run([*command, f.name], capture_output=True, text=True)
    if r.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{r.stdout}{r.stderr}")
    return r.stdout + r.stderr


def _find(pattern, text):
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def cubin_usage(cubin):
    """Registers and stack bytes per thread (Triton's shared memory is dynamic: see metadata.shared)."""
    text = _tool([knobs.nvidia.cuobjdump.path, "-res-usage"], cubin, ".cubin")
    return _find(r"REG:(\d+)", text), _find(r"STACK:(\d+)", text)


def resources(compiled):
    """What a compiled kernel needs: arch, regs, spill (bytes stored + loaded), shared, opcode counts, 128-bit loads."""
    arch, asm = compiled.metadata.target.arch, compiled.asm
    if "amdgcn" in asm:
        text = asm["amdgcn"]
        regs, spill = _find(r"\.vgpr_count:\s+(\d+)", text), _find(r"\.vgpr_spill_count:\s+(\d+)", text)
        tensor_ops = {"MFMA": len(re.findall(r"v_mfma_|v_wmma_", text))}
        wide = len(re.findall(r"\b(?:global|buffer|flat)_load_(?:dwordx4|b128)\b", text))
    else:
        ptxas = knobs.nvidia.ptxas if arch < 90 else knobs.nvidia.ptxas_blackwell
        name = f"sm_{arch}{'a' if arch >= 90 else ''}"
        text = _tool([ptxas.path, "-v", f"--gpu-name={name}", "-o", os.devnull], asm["ptx"].encode(), ".ptx")
        regs = _find(r"Used (\d+) registers", text)
        spill = _find(r"(\d+) bytes spill stores", text) + _find(r"(\d+) bytes spill loads", text)
        sass = _tool([knobs.nvidia.nvdisasm.path, "-c"], asm["cubin"], ".cubin")
        tensor_ops = {op: len(re.findall(rf"\b{op}\b", sass)) for op in ("HMMA", "HGMMA", "UTCHMMA")}
        wide = len(re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]*\b128\b", sass))
    return {
        "arch": arch,
        "regs": regs,
        "spill": spill,
        "shared": compiled.metadata.shared,
        "tensor_ops": {op: n for op, n in tensor_ops.items() if n},
        "wide_loads": wide,
    }


class _Utils:
    """The part of the driver's C module that Triton's launch path asks for."""

    def __init__(self, arch):
        self.arch = arch

    def get_device_properties(self, device):
        return {
            "max_shared_mem": SHARED_LIMIT[self.arch],
            "multiprocessor_count": 108,
            "max_num_regs": 65536,
            "warpSize": 32,
            "sm_clock_rate": 1,
            "mem_clock_rate": 1,
            "mem_bus_width": 1,
        }

    def load_binary(self, name, cubin, shared, device):
        """module, function, registers, spilled words, threads a block may have with that many registers

        Without a module Triton would ask again at each launch.
        """
        regs, stack = cubin_usage(cubin)
        return name, name, regs, stack // 4, min(1024, 65536 // (max(regs, 1) * 32) * 32)

    def unload_module(self, module):
        pass


class FakeDriver:
    """arch: 80, 90, ... or "gfx942", ...; execute(ptx, grid, threads, args, smem=bytes) runs a launch if given.

    launches: [(kernel name, grid)] in order. `recorded` has the arguments too, and compiles nothing.
    """

    def __init__(self, arch=90, execute=None):
        self.arch = arch
        self.execute = execute
        self.launches = []
        self.utils = _Utils(arch)

    def get_current_target(self):
        if isinstance(self.arch, int):
            return GPUTarget("cuda", self.arch, 32)
        return GPUTarget("hip", self.arch, 64 if self.arch.startswith("gfx9") else 32)

    def get_current_device(self):
        return self.arch  # Triton caches kernels and limits per device: one device per architecture

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        raise RuntimeError("a fake driver has no device to synchronise or time")

    def get_benchmarker(self):
        def bench(fn, quantiles=None, **kwargs):
            fn()
            return [1.0] * len(quantiles or [1])

        return bench

    def get_empty_cache_for_benchmark(self):
        return None

    def clear_cache(self, cache):
        pass

    def launcher_cls(self, src, metadata):
        def launch(grid_x, grid_y, grid_z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *args):
            grid = (grid_x, grid_y, grid_z)
            active = triton.runtime.driver.active  # a kernel may outlive its first driver
            active.launches.append((metadata.name, grid))
            if active.execute is not None:
                ptx = get_cache_manager(metadata.hash).get_file(f"{src.name[:150]}.ptx")
                runtime = [a for a, kind in zip(args, src.signature.values(), strict=False) if kind != "constexpr"]
                active.execute(Path(ptx).read_text(), grid, metadata.num_warps * 32, runtime, smem=metadata.shared)

        return launch


class Launch(NamedTuple):
    """A launch that did not happen: the kernel, its grid, its arguments by name, and num_warps, num_stages."""

    kernel: object
    grid: tuple
    args: dict
    options: dict
    arch: int | str

    @property
    def name(self):
        return self.kernel.fn.__name__

    def compile(self):
        triton.runtime.driver.set_active(FakeDriver(self.arch))
        return self.kernel.warmup(**self.args, grid=self.grid, **self.options)


@contextlib.contextmanager
def recorded(arch):
    """The list of launches within the block, as the launch code makes them for this architecture."""
    launches = []

    def run(self, *args, grid, warmup, **kwargs):
        names = inspect.signature(self.fn).parameters
        options = {name: value for name, value in kwargs.items() if name not in names}
        named = {name: value for name, value in kwargs.items() if name in names}
        bound = inspect.signature(self.fn).bind(*args, **named)
        launches.append(
            Launch(self, grid(bound.arguments) if callable(grid) else grid, dict(bound.arguments), options, arch)
        )

    original, driver = triton.runtime.jit.JITFunction.run, triton.runtime.driver._active
    triton.runtime.driver.set_active(FakeDriver(arch))
    triton.runtime.jit.JITFunction.run = run
    try:
        yield launches
    finally:
        triton.runtime.jit.JITFunction.run = original
        triton.runtime.driver._active = driver
