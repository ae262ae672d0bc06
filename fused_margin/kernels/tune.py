"""With FUSED_MARGIN_TRITON_TUNE=1, times the candidate tiles on the device, once for each kind of problem.

Without it nothing is timed and `configs.DEVICES` decides, so that equal devices get equal bits. The depth is not tuned,
and nothing that has a jump, as some rules and the choice of a sub-centre: both directions must see the same bits there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from triton import CompilationError
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from ..rules import RULES
from .configs import Tile
from .plan import Inputs, Plan, power_of_two

CANDIDATES = (
    Tile(64, 64, 4, 3),
    Tile(64, 128, 4, 3),
    Tile(128, 64, 4, 3),
    Tile(128, 64, 8, 2),
    Tile(128, 128, 8, 2),
    Tile(128, 128, 8, 3),
    Tile(256, 64, 8, 3),
    Tile(256, 128, 8, 3),
)
_best: dict[tuple, Tile] = {}
Result = TypeVar("Result")


def enabled() -> bool:
    return os.environ.get("FUSED_MARGIN_TRITON_TUNE") == "1"


def tuned(part: str, p: Plan, given: Inputs, go: Callable[[Plan], Result]) -> Result:
    """go(p), which may be called often, with the best tile in the place of p.cut's `part`."""
    if not enabled() or RULES[p.spec.rule].needs_tau or p.spec.rule == "filter" or p.spec.sub_centers > 1:
        return go(p)
    size = power_of_two(p.batch), p.dim  # not the classes, of which each shard and each step may have another number
    what = p.flash, p.biased, p.spec.rule, p.spec.reduction, p.spec.want
    key = part, given.x.device, given.w.dtype, p.operand, *size, *what
    if key not in _best:
        _best[key] = min(_candidates(p, part), key=lambda tile: _time(go, _with(p, part, tile)))
    return go(_with(p, part, _best[key]))


def _candidates(p: Plan, part: str) -> list[Tile]:
    """The first one for each tile that a plan makes of them: it may be narrower, or as wide as the forward's."""
    found: dict[Tile, Tile] = {}
    for tile in (p.cut._asdict()[part], *CANDIDATES):
        planned = _with(p, part, tile)
        found.setdefault(planned.backward_tile if part == "gradient" else planned.forward_tile, tile)
    return list(found.values())


def _with(p: Plan, part: str, tile: Tile) -> Plan:
    return p._replace(cut=p.cut._replace(**{part: tile}))


def _time(go: Callable[[Plan], object], p: Plan) -> float:
    try:
        return do_bench(lambda: go(p), warmup=5, rep=20)
    except (OutOfResources, CompilationError):
        return float("inf")
