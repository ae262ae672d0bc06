"""What ptxas made of the CUDA C++ kernels: read from the built library, for each architecture it holds.

rows() = [Row(arch="sm_80", kernel="forward<bf16, plain>", registers=..., ...)]
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from fused_margin.update_rules import OPTIMIZERS

from . import builder

LIBRARY = builder.ROOT / "fused_margin" / "_C.abi3.so"
THREADS_OF_BLOCK = 256
# Of a multiprocessor: bytes of shared memory, threads, blocks; and bytes of shared memory that one block may have.
MACHINES = {
    "sm_80": (164, 2048, 32, 163),
    "sm_86": (100, 1536, 16, 99),
    "sm_89": (100, 1536, 24, 99),
    "sm_90": (228, 2048, 32, 227),
    "sm_100": (228, 2048, 32, 227),
    "sm_120": (100, 1536, 24, 99),
}  # KB
REGISTERS, RESERVED = 65536, 1024  # of a multiprocessor; bytes of shared memory that each block takes beside its own
OPERANDS = {"f": "fp32", "13__nv_bfloat16": "bf16", "6__half": "fp16"}


class Row(NamedTuple):
    arch: str
    kernel: str
    symbol: str
    registers: int
    stack: int  # bytes a thread, spills among them
    tensor_ops: int  # HMMA instructions
    wide_loads: int  # 128-bit loads and asynchronous copies of global memory


@functools.cache
def _tool(name: str) -> str | None:
    """A tool of the toolkit, or of triton's wheel, which has what small toolkits lack."""
    if found := shutil.which(name):
        return found
    triton = importlib.util.find_spec("triton")
    bundled = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled and bundled.exists() else None


def _dump(*arguments: str) -> str:
    command = [_tool("cuobjdump"), *arguments, str(LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def why_not() -> str:
    """Why there is nothing to read, "" if there is."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} is not built"
    if _tool("cuobjdump") is None or _tool("nvdisasm") is None:
        return "no cuobjdump and nvdisasm (they come with the CUDA toolkit, and with triton)"
    listed = subprocess.run([_tool("cuobjdump"), "-lelf", str(LIBRARY)], capture_output=True, text=True)
    return "" if ".cubin" in listed.stdout else f"{LIBRARY.name} was built without CUDA"


def ptx() -> set[str]:
    """The architectures of its PTX, which a driver can build newer code from."""
    return set(re.findall(r"\.(sm_\d+)\.ptx", _dump("-lptx")))


def short(symbol: str) -> str:
    """A kernel's name for people."""
    found = re.search(
        r"3gpu\d+(\w+?)_kernel(?:I(f|13__nv_bfloat16|6__half)Lb([01])E)?(?:ILNS_9OptimizerE(\d)E)?", symbol
    )
    if found is None:
        return symbol
    if found[4]:
        return f"{found[1]}<{tuple(OPTIMIZERS)[int(found[4])]}>"
    return found[1] + (f"<{OPERANDS[found[2]]}{', plain' * (found[3] == '1')}>" if found[2] else "")


@functools.cache
def rows() -> tuple[Row, ...]:
    usage = {}
    arch = None
    for line in _dump("-res-usage").splitlines():
        if found := re.search(r"arch = (sm_\d+)", line):
            arch = found[1]
        elif found := re.search(r"Function (\S+):", line):
            symbol = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+)", line):
            usage[arch, symbol] = int(found[1]), int(found[2])
    counted = _instructions({arch for arch, _ in usage})
    found = [
        Row(arch, short(symbol), symbol, *numbers, *counted.get((arch, symbol), (0, 0)))
        for (arch, symbol), numbers in usage.items()
    ]
    held = {row.arch for row in found}
    for newer in ("sm_86", "sm_89"):
        if newer not in held:  # they run sm_80's code
            found += [row._replace(arch=newer) for row in found if row.arch == "sm_80"]
    return tuple(sorted(found, key=lambda row: (int(row.arch[3:]), row.kernel)))


def _instructions(architectures: set[str]) -> dict[tuple[str, str], tuple[int, int]]:
    """(tensor-core instructions, 128-bit loads) of each (architecture, kernel)."""
    found, arch, symbol = {}, None, None
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # an architecture each: most of a minute otherwise
        texts = list(pool.map(lambda name: _dump("-sass", "-arch", name), architectures))
    for line in "\n".join(texts).splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            symbol = match[1]
            found[arch, symbol] = (0, 0)
        elif symbol and re.search(r"\b(HMMA|(?:LDG|LDGSTS)\.\S*128)\b", line):
            tensor, wide = found[arch, symbol]
            found[arch, symbol] = (tensor + 1, wide) if "HMMA" in line else (tensor, wide + 1)
    return found


def blocks(row: Row, shared: int) -> int:
    """Blocks of THREADS_OF_BLOCK threads that a multiprocessor holds at a time."""
    memory, threads, most, _ = MACHINES[row.arch]
    of_warp = -(-row.registers * 32 // 256) * 256
    by_registers = REGISTERS // (of_warp * THREADS_OF_BLOCK // 32)
    return min(by_registers, memory * 1024 // (shared + RESERVED), threads // THREADS_OF_BLOCK, most)
