"""The CUDA C++ backend: NVIDIA GPUs from sm_80 on, without Triton. Registers its operators' schemas, and calls them.

The kernels are in `_C.abi3.so` (csrc/cuda), if it was built where nvcc is; nothing is compiled or started on import.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ..spec import Spec
from ..update_rules import State, Update
from . import cpu, gpu
from .reference import check_labels

_KEY = "CUDA"  # of the devices that the kernels are registered for
_schemas = torch.library.Library("fused_margin_cuda", "DEF")
_OPERANDS = "int operand"
for _schema in (*cpu.sweep_schemas(_OPERANDS, lends=False), *cpu.step_schemas(_OPERANDS)):
    _schemas.define(_schema)
_ops = torch.ops.fused_margin_cuda


def _built() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("fused_margin_cuda::sweep", _KEY)


@functools.lru_cache(maxsize=16)
def _no_code(device: torch.device) -> str:
    """Why the library has nothing that runs on the device, "" if it has."""
    library = cpu._C
    library.fm_cuda_why_not.restype = library.fm_cuda_architectures.restype = ctypes.c_char_p
    with torch.cuda.device(device):
        reason = library.fm_cuda_why_not().decode()
    if not reason:
        return ""
    has = ".".join(map(str, torch.cuda.get_device_capability(device)))
    built = (f"{a[:-2]}.{a[-2]}" for a in library.fm_cuda_architectures().decode().split(","))
    return (
        f"{device} has compute capability {has}, and the extension, built for {', '.join(built)}, cannot run there "
        f"({reason}); from 8.0 on, build it with TORCH_CUDA_ARCH_LIST={has}"
    )


def why_not(x: Tensor | None, w: Tensor | None, spec: Spec) -> list[str]:
    reasons = []
    if torch.version.hip:
        reasons.append("this torch is built for AMD GPUs")
    if not _built():
        reasons.append(
            "the C++ extension has no CUDA kernels (install nvcc, then `pip install --no-build-isolation .` with "
            "FUSED_MARGIN_CUDA=1)"
        )
    device = _KEY.lower()
    if x is None and device == "cuda" and not torch.cuda.is_available():
        reasons.append("torch sees no GPU")
    reasons += gpu.why_not_input(x, w, spec, lambda d: d.type == device)
    if x is not None and x.is_cuda and _built() and _no_code(x.device):
        reasons.append(_no_code(x.device))
    return reasons


def path() -> str:
    """The path in use, for people."""
    return f"CUDA C++ (mma.sync), {torch.cuda.get_device_name()}"


def saves_o(x: Tensor, spec: Spec) -> bool:
    """Never: the gradient of x comes from the backward's chunks."""
    return False


def _pack(spec: Spec) -> tuple[int | bool, ...]:
    return cpu.pack(spec, gpu.DTYPES.index(spec.compute_dtype))


def target_cosine(x: Tensor, w: Tensor, labels: Tensor, index: Tensor | None, spec: Spec) -> Tensor:
    check_labels(labels, spec)
    return _ops.target_cosine.default(x, w, labels, _contiguous(index), *_pack(spec))


def sweep(x, w, labels, scale, tau, bias, index, rule_args, spec: Spec) -> tuple[Tensor, ...]:
    check_labels(labels, spec)
    return _ops.sweep.default(x, w, labels, scale, tau, bias, _contiguous(index), rule_args, *_pack(spec))


def sweep_loss(x, w, labels, scale, rule_args, spec: Spec, forms, loss_reduction) -> tuple[Tensor, ...]:
    check_labels(labels, spec)
    reduction = cpu.LOSS_REDUCTIONS.index(loss_reduction)
    return _ops.sweep_loss.default(x, w, labels, scale, rule_args, *_pack(spec), cpu.numbers(tuple(forms)), reduction)


def sweep_backward(
    g_red, g_cos_y, g_sum_u, x, w, labels, scale, tau, bias, index, rule_args, red, aux, o_red, o_sum, spec, need
) -> tuple[Tensor, ...]:
    return _ops.sweep_backward.default(
        g_red, g_cos_y, g_sum_u, x, w, labels, scale, tau, bias, _contiguous(index), rule_args, red, aux.contiguous(),
        o_red, o_sum, *_pack(spec), need,
    )  # fmt: skip


def update_rows(w: Tensor, state: State, index: Tensor | None, grad: Tensor, update: Update) -> None:
    _ops.update_rows.default(w, *state, _contiguous(index), grad, *cpu.pack_update(update))


def sweep_step(w: Tensor, state: State, index: Tensor | None, lists, spec: Spec, update: Update) -> None:
    _ops.sweep_step.default(w, *state, _contiguous(index), *lists, *_pack(spec), *cpu.pack_update(update))


def _contiguous(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.contiguous()
