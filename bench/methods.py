"""The methods compared, by the names that --methods takes and the results carry."""

from dataclasses import replace

from .cases import SMALL, Case
from .heads import OWN
from .peers import PEERS

METHODS = OWN | PEERS


def compared(case: Case) -> list[str]:
    """Methods of a case unless --methods says: peers at the centre, on small heads and without a margin, else three.

    Each method more is a process more in every case.
    """
    centre = Case(threads=case.threads, device=case.device)
    small = [replace(centre, batch=64, classes=classes) for classes in SMALL]
    everyone = case.margin == "normface" or case == centre or case in small
    return [name for name in METHODS if name in OWN or everyone]


def check_names(names: list[str]) -> None:
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ValueError(f"methods {', '.join(unknown)} do not exist; expected some of {', '.join(METHODS)}")
