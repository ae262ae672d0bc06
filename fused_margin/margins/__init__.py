"""The margins, one file a family: the target transform T on [B] vectors, and the rival rule N where a loss has one.

    softmax.py   c, c - m                          mining.py          rivals that come too close count more
    angular.py   functions of the angle            bounds.py          cosines stop counting at a bound
    adaptive.py  margins that depend on the data   uncoupled.py       no softmax between the classes
    base.py      what they are made of             reference_only.py  rules that no kernel has
    checks.py    of hyper-parameters               parameters.py      a value for all, a class or a sample

Every formula stands here once; slopes come from autograd, so a margin of your own is one function of cos_y.
"""

from ..angles import SINE_FLOOR, safe_angle, safe_sine
from .adaptive import AdaFace, AdaMSoftmax, ElasticFace, KappaFace, MagFace, margins_by_count
from .angular import TAILS, Annealed, ArcFace, CombinedMargin, LSoftmax, SphereFace, X2Softmax
from .base import CustomMargin, Margin, Outcome, RowStats, StatefulMargin, Wrapper, as_margin
from .bounds import CircleLoss, EqM, InterclassFilter
from .checks import GRADIENTS
from .mining import ArcNegFace, CurricularFace, MVSoftmax, NPCFace, SVSoftmax
from .parameters import PerClass, PerSample, RowParameter, gather_rows
from .reference_only import GASoftmax, LiArcFace, P2SGrad, QAMFace, SFace, SphereFaceR
from .softmax import CosFace, NormFace
from .uncoupled import SphereFace2, UniFace

__all__ = [
    "GRADIENTS",
    "SINE_FLOOR",
    "TAILS",
    "AdaFace",
    "AdaMSoftmax",
    "Annealed",
    "ArcFace",
    "ArcNegFace",
    "CircleLoss",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "CustomMargin",
    "ElasticFace",
    "EqM",
    "GASoftmax",
    "InterclassFilter",
    "KappaFace",
    "LSoftmax",
    "LiArcFace",
    "MVSoftmax",
    "MagFace",
    "Margin",
    "NPCFace",
    "NormFace",
    "Outcome",
    "P2SGrad",
    "PerClass",
    "PerSample",
    "QAMFace",
    "RowParameter",
    "RowStats",
    "SFace",
    "SVSoftmax",
    "SphereFace",
    "SphereFace2",
    "SphereFaceR",
    "StatefulMargin",
    "UniFace",
    "Wrapper",
    "X2Softmax",
    "as_margin",
    "gather_rows",
    "margins_by_count",
    "safe_angle",
    "safe_sine",
]
