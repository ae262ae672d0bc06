"""Other people's heads, each called as its users call it. Nothing of their code is here: a package, or a path."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F
from head_cost import MARGIN, SCALE
from torch import Tensor, nn

from .cases import Case
from .heads import COSFACE_M, Inputs, Method, Peers, Run

PEERS: dict[str, Method] = {}


@cache
def _import(name: str, path: str | None = None) -> ModuleType | str:
    """The module, or in words why it is not there."""
    if path and path not in sys.path:
        sys.path.insert(0, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs to mend
            return importlib.import_module(name)
    except ImportError as error:
        return f"{name} cannot be imported ({error}): pip install {name.split('.')[0].replace('_', '-')}"


def _missing(name: str, path: str | None = None) -> str:
    module = _import(name, path)
    return module if isinstance(module, str) else ""


# pytorch-metric-learning


def _pml_why_not(case: Case, peers: Peers) -> str:
    if case.margin == "sphereface":
        return "its SphereFace is A-Softmax: an integer margin, times the embedding's norm"
    if case.margin == "svsoftmax":
        return "it has no such loss"
    return _missing("pytorch_metric_learning.losses")


def _pml(case: Case, inputs: Inputs, peers: Peers) -> Run:
    losses = _import("pytorch_metric_learning.losses")
    options = {"num_classes": case.classes, "embedding_size": case.dim, "weight_init_func": lambda weight: None}
    loss = {
        "arcface": lambda: losses.ArcFaceLoss(margin=math.degrees(MARGIN), scale=SCALE, **options),
        "cosface": lambda: losses.CosFaceLoss(margin=COSFACE_M, scale=SCALE, **options),
        "normface": lambda: losses.NormalizedSoftmaxLoss(temperature=1 / SCALE, **options),
    }[case.margin]()
    loss.W = nn.Parameter(inputs.weight.detach().t().contiguous(), requires_grad=inputs.weight.requires_grad)
    embeddings, labels = inputs.embeddings, inputs.labels
    return Run(case, lambda: loss(embeddings, labels), embeddings, loss.W, transposed=True)


PEERS["pytorch-metric-learning"] = Method(_pml, "its ArcFaceLoss, CosFaceLoss, NormalizedSoftmaxLoss", _pml_why_not)


# InsightFace


def wrong_insightface(path: str) -> str:
    """Why the path is not that of InsightFace; "" if it is."""
    if (Path(path) / "partial_fc_v2.py").exists():
        return ""
    return f"no partial_fc_v2.py in {path}: expected the folder recognition/arcface_torch of a clone"


def _insightface_why_not(case: Case, peers: Peers) -> str:
    if case.margin not in ("arcface", "cosface"):
        return "its CombinedMarginLoss has no such margin"
    if case.dtype != "fp32":
        return "its training runs the head in float32"
    if peers.insightface is None:
        return "needs --insightface PATH, the folder recognition/arcface_torch of a clone"
    if wrong := wrong_insightface(peers.insightface):
        return wrong
    if case.batch < 2:
        return "it takes no batch of one"
    return "" if torch.distributed.is_available() else "this torch has no torch.distributed"


def _from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"insightface_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _cuda_is_here(device: str) -> Iterator[None]:
    """Within, `.cuda()` leaves a tensor on the CPU: there is no other way to run that code without a GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.cuda.amp.autocast, which is old and off
        if device != "cpu":
            yield
            return
        with mock.patch.object(Tensor, "cuda", lambda self, *args, **kwargs: self):
            yield


def _insightface(case: Case, inputs: Inputs, peers: Peers) -> Run:
    folder = Path(peers.insightface)
    if not torch.distributed.is_initialized():
        backend = "gloo" if case.device == "cpu" else "nccl"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    margin = {"arcface": (1.0, MARGIN, 0.0), "cosface": (1.0, 0.0, COSFACE_M)}[case.margin]
    combined = _from_file(folder / "losses.py").CombinedMarginLoss(SCALE, *margin)
    with torch.device("meta"):  # its own weights, which are replaced, would take memory and time
        head = _from_file(folder / "partial_fc_v2.py").PartialFC_V2(combined, case.dim, case.classes)
    head.weight = nn.Parameter(inputs.weight.detach(), requires_grad=inputs.weight.requires_grad)

    def loss() -> Tensor:
        with _cuda_is_here(case.device):
            return head(inputs.embeddings, inputs.labels.clone())  # it works on the labels in place

    return Run(case, loss, inputs.embeddings, head.weight)


PEERS["insightface"] = Method(
    _insightface,
    "arcface_torch's PartialFC_V2 and CombinedMarginLoss, one process",
    _insightface_why_not,
    detached=True,
)


# Fused linear and cross-entropy: with normalised operands, NormFace


def _normface_only(case: Case) -> str:
    return "" if case.margin == "normface" else "it has no margin"


def _linear_cross_entropy(case: Case, inputs: Inputs, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
    x, w, labels = inputs

    def loss() -> Tensor:
        return function(SCALE * F.normalize(x), F.normalize(w), labels)

    return Run(case, loss, x, w)


def _torch_why_not(case: Case, peers: Peers) -> str:
    if not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy"
    return _normface_only(case)


def _add_torch(name: str, what: str, options: Callable[[int], object]) -> None:
    def build(case: Case, inputs: Inputs, peers: Peers) -> Run:
        chosen = options(case.batch)
        return _linear_cross_entropy(case, inputs, lambda x, w, y: F.linear_cross_entropy(x, w, y, options=chosen))

    PEERS[name] = Method(build, what, _torch_why_not)


def _chunks(batch: int) -> object:
    return nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=max(1, batch // 4))


_add_torch("torch-lce", "`F.linear_cross_entropy`, as it comes", lambda batch: None)
_add_torch("torch-lce-chunked", "the same, chunked as its options choose", lambda b: nn.LinearCrossEntropyOptions())
_add_torch("torch-lce-4-chunks", "the same, in 4 chunks of the batch", _chunks)


def _add_cce(name: str, what: str, impl: str, device: str) -> None:
    def why_not(case: Case, peers: Peers) -> str:
        if case.device != device:
            return f"it runs on {device}"
        return _normface_only(case) or _missing("cut_cross_entropy", peers.cut_cross_entropy)

    def build(case: Case, inputs: Inputs, peers: Peers) -> Run:
        function = _import("cut_cross_entropy", peers.cut_cross_entropy).linear_cross_entropy
        return _linear_cross_entropy(case, inputs, lambda x, w, y: function(x, w, y, impl=impl))

    PEERS[name] = Method(build, what, why_not, compiles=True)


_add_cce("cut-cross-entropy", "Apple's cut-cross-entropy, its implementation for the CPU", "torch_compile", "cpu")
_add_cce("cce-kernel", "its kernel for GPUs, small gradients left out", "cce", "cuda")
_add_cce("cce-exact-kernel", "the same, nothing left out", "cce_exact", "cuda")


def _liger_why_not(case: Case, peers: Peers) -> str:
    if case.device != "cuda":
        return "it runs on cuda"
    return _normface_only(case) or _missing("liger_kernel.transformers")


def _liger(case: Case, inputs: Inputs, peers: Peers) -> Run:
    function = _import("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return _linear_cross_entropy(case, inputs, lambda x, w, y: function(w, x, y))


PEERS["liger"] = Method(_liger, "Liger-Kernel's LigerFusedLinearCrossEntropyLoss", _liger_why_not, compiles=True)
