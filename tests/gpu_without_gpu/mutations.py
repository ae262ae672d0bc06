"""Planted errors for compiled PTX: each barrier removed, each wait weakened, less shared memory, shorter buffers.

    for name, mutant in mutants(ptx): ...     # PTX text
    launch(ptx, grid, threads, args, smem - 1024)

A test asks of each that the emulator reports it, or that it changes no bit (the barrier was not needed at this shape).
"""

import re

BARRIER = re.compile(r"bar(?:rier)?\.sync\s+0;")
WAIT = re.compile(r"(?P<op>(?:cp\.async|wgmma)\.wait_group(?:\.sync\.aligned)?\s+)(?P<count>\d+)")
VOTE = re.compile(r"bar\.red\.\w+\.pred\s+(?P<all>%?\w+),\s*0,\s*(?P<own>%?\w+);")
FENCE = re.compile(r"fence\.proxy\.async\S*;")


def _commented(ptx, found):
    return f"{ptx[: found.start()]}//{ptx[found.start() :]}"


def mutants(ptx):
    """Yield (name, PTX) for each mutant."""
    for kind, pattern in (("barrier", BARRIER), ("proxy fence", FENCE)):
        for i, found in enumerate(pattern.finditer(ptx)):
            yield f"{kind} {i} removed", _commented(ptx, found)
    for i, found in enumerate(VOTE.finditer(ptx)):  # each thread takes its own vote for that of the block
        own = f"mov.pred {found['all']}, {found['own']};"
        yield f"voting barrier {i} removed", ptx[: found.start()] + own + ptx[found.end() :]
    for i, found in enumerate(WAIT.finditer(ptx)):
        weaker = f"{found['op']}{int(found['count']) + 1}"
        yield f"wait {i} for one group less", ptx[: found.start()] + weaker + ptx[found.end() :]
