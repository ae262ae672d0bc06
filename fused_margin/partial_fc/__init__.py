"""The head over many ranks: classes split between them, sampled, and kept in checkpoints that any number can read.

head.py    PartialFC, the module             shard.py       one rank's sweep, combined with the others'
batch.py   the rows of all ranks             sampling.py    which classes take part in a step
ranks.py   collectives, and their gradients  layout.py      which rank has which classes
"""

from .head import PartialFC
from .layout import Layout

__all__ = ["Layout", "PartialFC"]
