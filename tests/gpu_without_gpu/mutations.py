"""Planted errors for compiled PTX: each barrier removed, each wait weakened, less shared memory, shorter buffers.

    for name, mutant in mutants(ptx): ...     # PTX text
    launch(ptx, grid, threads, args, smem - 1024)

A test asks of each that the emulator reports it, or that it changes no bit (the barrier was not needed at this shape).
"""

import re

BARRIER = re.compile(r"bar(?:rier)?\.sync\s+0;")
WAIT = re.compile(r"(?P<op>(?:cp\.async|wgmma)\.wait_group(?:\.sync\.aligned)?\s+)(?P<count>\d+)")
FENCE = re.compile(r"fence\.proxy\.async\S*;")


def _commented(ptx, found):
    return f"{ptx[: found.start()]}//{ptx[found.start() :]}"


def mutants(ptx):
    """Yield (name, PTX) for each mutant."""
    for kind, pattern in (("barrier", BARRIER), ("proxy fence", FENCE)):
        for i, found in enumerate(pattern.finditer(ptx)):
            yield f"{kind} {i} removed", _commented(ptx, found)
    for i, found in enumerate(WAIT.finditer(ptx)):
        weaker = f"{found['op']}{int(found['count']) + 1}"
        yield f"wait {i} for one group less", ptx[: found.start()] + weaker + ptx[found.end() :]
