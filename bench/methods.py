"""The methods compared, by the names that --methods takes and the results carry."""

from .heads import OWN
from .peers import PEERS

METHODS = OWN | PEERS


def check_names(names: list[str]) -> None:
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ValueError(f"methods {', '.join(unknown)} do not exist; expected some of {', '.join(METHODS)}")
