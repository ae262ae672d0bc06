"""The methods compared, by the names that --methods takes and the results carry."""

from dataclasses import replace

from .cases import Case
from .heads import OWN
from .peers import PEERS

METHODS = OWN | PEERS
PEERS_TO = 100_000  # classes: beyond, one step of some takes minutes


def compared(case: Case) -> list[str]:
    """Methods of a case unless --methods says: peers by the number of classes and without a margin, else our own three.

    Each method more is a process more for each case, and an hour more for all.
    """
    centre = replace(Case(classes=case.classes, batch=case.batch), threads=case.threads, device=case.device)
    everyone = case.margin == "normface" or (case == centre and 64 <= case.batch <= 512 and case.classes <= PEERS_TO)
    return [name for name in METHODS if name in OWN or everyone]


def check_names(names: list[str]) -> None:
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ValueError(f"methods {', '.join(unknown)} do not exist; expected some of {', '.join(METHODS)}")
