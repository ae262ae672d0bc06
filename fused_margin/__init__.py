"""fused_margin: the margin-softmax head in one sweep over the class weights."""

from importlib.metadata import PackageNotFoundError, version

from . import functional
from .backends import BACKENDS, FallbackWarning, why_not
from .check import check_margin
from .functional import Stats, margin_cross_entropy
from .heads import MarginHead
from .margins import (
    ArcFace,
    CombinedMargin,
    CosFace,
    CustomMargin,
    Margin,
    NormFace,
    PerClass,
    PerSample,
    SphereFace,
    SVSoftmax,
    safe_angle,
    safe_sine,
)

try:
    __version__ = version("fused_margin")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "unknown"

__all__ = [
    "BACKENDS",
    "ArcFace",
    "CombinedMargin",
    "CosFace",
    "CustomMargin",
    "FallbackWarning",
    "Margin",
    "MarginHead",
    "NormFace",
    "PerClass",
    "PerSample",
    "SVSoftmax",
    "SphereFace",
    "Stats",
    "check_margin",
    "functional",
    "margin_cross_entropy",
    "safe_angle",
    "safe_sine",
    "why_not",
]
