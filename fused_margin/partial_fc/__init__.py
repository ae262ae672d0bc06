"""The head over many ranks: classes split between them, sampled, and kept in checkpoints that any number can read.

head.py    PartialFC, the module             shard.py        one rank's sweep, combined with the others'
batch.py   the rows of all ranks             sampling.py     which classes take part in a step
ranks.py   collectives, and their gradients  layout.py       which rank has which classes
checkpoint.py   save, load                   interchange.py  safetensors, InsightFace, matrices; classes come and go
"""

from .checkpoint import load, save
from .head import PartialFC
from .interchange import export_safetensors, import_safetensors, insightface_weights, load_weight
from .layout import Layout
from .tensor_file import CheckpointError

__all__ = [
    "CheckpointError",
    "Layout",
    "PartialFC",
    "export_safetensors",
    "import_safetensors",
    "insightface_weights",
    "load",
    "load_weight",
    "save",
]
