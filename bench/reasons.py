"""Why a row is lost: where the fused head is slower than a method, the tables say why."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .cases import Case

UNKNOWN = "the reason is not known yet"


class Reason(NamedTuple):
    """A reason, and the cases and methods that it is one for."""

    holds: Callable[[Case, str], bool]
    text: str


REASONS: list[Reason] = [
    Reason(
        lambda case, method: case.trains_weight and case.classes <= 2_000,
        "at so few classes the logits stay in the cache, and keeping them (6 operations a number) costs less than "
        "a second computation (8), which is what saves the memory at many; what is beyond 8 / 6 is not explained",
    ),
]


def reason(case: Case, method: str) -> str:
    """The first that holds."""
    return next((r.text for r in REASONS if r.holds(case, method)), UNKNOWN)
