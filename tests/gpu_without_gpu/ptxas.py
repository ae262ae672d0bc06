"""Read the log of `nvcc -Xptxas -v`: one dict a kernel and architecture."""

import re


def parse(log):
    """[{kernel, arch, regs, stack, spill_stores, spill_loads, barriers, smem}]; bytes; kernel is the mangled name."""
    rows = []
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for '(sm_\w+)'", line):
            rows.append({"kernel": found[1], "arch": found[2]})
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if rows:
                rows[-1].update(zip(("stack", "spill_stores", "spill_loads"), map(int, found.groups()), strict=False))
        elif found := re.search(r"Used (\d+) registers", line):
            counts = {
                name: re.search(pattern, line)
                for name, pattern in (("barriers", r"used (\d+) barriers"), ("smem", r"(\d+) bytes smem"))
            }
            rows[-1].update(regs=int(found[1]), **{name: int(m[1]) if m else 0 for name, m in counts.items()})
    return rows
