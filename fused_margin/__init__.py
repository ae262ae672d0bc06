"""fused_margin: the margin-softmax head in one sweep over the class weights."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from . import functional, optim, pairs, schedules
from .backends import BACKENDS, FallbackWarning
from .check import check_margin
from .functional import Stats, margin_cross_entropy, why_not
from .heads import MarginHead
from .margins import (
    AdaFace,
    AdaMSoftmax,
    Annealed,
    ArcFace,
    ArcNegFace,
    CircleLoss,
    CombinedMargin,
    CosFace,
    CurricularFace,
    CustomMargin,
    ElasticFace,
    EqM,
    GASoftmax,
    InterclassFilter,
    KappaFace,
    LiArcFace,
    LSoftmax,
    MagFace,
    Margin,
    MVSoftmax,
    NormFace,
    NPCFace,
    Outcome,
    P2SGrad,
    PerClass,
    PerSample,
    QAMFace,
    RowStats,
    SFace,
    SphereFace,
    SphereFace2,
    SphereFaceR,
    StatefulMargin,
    SVSoftmax,
    UniFace,
    X2Softmax,
    margins_by_count,
    safe_angle,
    safe_sine,
)
from .pairs import CenterLoss
from .rows import Focal, HardRows, Mining
from .scales import AdaCos, ScaleRule
from .subcenters import Outliers, find_outliers

try:
    __version__ = version("fused_margin")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "unknown"


def __getattr__(name: str) -> object:
    """PartialFC on first use: torch.distributed takes most of a second to import, and is not in every torch."""
    if name in ("PartialFC", "partial_fc"):
        module = import_module(".partial_fc", __name__)
        return module if name == "partial_fc" else module.PartialFC
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BACKENDS",
    "AdaCos",
    "AdaFace",
    "AdaMSoftmax",
    "Annealed",
    "ArcFace",
    "ArcNegFace",
    "CenterLoss",
    "CircleLoss",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "CustomMargin",
    "ElasticFace",
    "EqM",
    "FallbackWarning",
    "Focal",
    "GASoftmax",
    "HardRows",
    "InterclassFilter",
    "KappaFace",
    "LSoftmax",
    "LiArcFace",
    "MVSoftmax",
    "MagFace",
    "Margin",
    "MarginHead",
    "Mining",
    "NPCFace",
    "NormFace",
    "Outcome",
    "Outliers",
    "P2SGrad",
    "PartialFC",
    "PerClass",
    "PerSample",
    "QAMFace",
    "RowStats",
    "SFace",
    "SVSoftmax",
    "ScaleRule",
    "SphereFace",
    "SphereFace2",
    "SphereFaceR",
    "StatefulMargin",
    "Stats",
    "UniFace",
    "X2Softmax",
    "check_margin",
    "find_outliers",
    "functional",
    "margin_cross_entropy",
    "margins_by_count",
    "optim",
    "pairs",
    "partial_fc",
    "safe_angle",
    "safe_sine",
    "schedules",
    "why_not",
]
