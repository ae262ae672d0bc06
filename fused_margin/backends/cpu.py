"""The C++ CPU backend: loads `_C.abi3.so`, registers its operators' schemas, and calls them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .. import memory
from ..rules import CODES, REDUCTIONS
from ..spec import Need, Spec, Want, acc_dtype
from ..update_rules import OPTIMIZERS, State, Update

# What FUSED_MARGIN_CPU_CAPABILITY takes, in rising order.
CAPABILITIES = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
LOSS_REDUCTIONS = ("mean", "sum", "none")  # as csrc/cpu/problem.h numbers them
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INPUTS = "Tensor x, Tensor w, Tensor labels, Tensor scale, Tensor? tau, Tensor? bias, Tensor? index, Tensor rule_args"


def _spec_schema(operands: str) -> str:
    return (
        f"int rule, bool unit_slope, int reduction, int sub_centers, bool normalize_x, bool normalize_w, {operands}, "
        "int num_classes, int first_class, int ignore_index, int want"
    )


def sweep_schemas(operands: str, lends: bool) -> list[str]:
    """Of the sweep's operators, here and in cuda.py; `operands`: what they are told of those of the products.

    lends: they are handed the memory of the products that are kept and of the weights' gradient.
    """
    spec = _spec_schema(operands)
    written, kept, d_w = (", Tensor(a!) kept", ", Tensor kept, Tensor(a!) d_w", "") if lends else ("", "", ", Tensor")
    return [
        f"target_cosine(Tensor x, Tensor w, Tensor labels, Tensor? index, {spec}) -> Tensor",
        f"sweep({_INPUTS}{written}, {spec}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        f"sweep_loss(Tensor x, Tensor w, Tensor labels, Tensor scale, Tensor rule_args{written}, {spec}, Tensor forms, "
        "int loss_reduction) -> (Tensor, Tensor, Tensor, Tensor)",
        f"sweep_backward(Tensor g_red, Tensor g_cos_y, Tensor g_sum_u, {_INPUTS}, Tensor red, Tensor aux, "
        f"Tensor o_red, Tensor o_sum{kept}, {spec}, int need) -> (Tensor{d_w}, Tensor, Tensor)",
    ]


def step_schemas(operands: str) -> list[str]:
    """Of the optimizers' operators, as `sweep_schemas`."""
    state = "Tensor(a!) w, Tensor(b!)? m, Tensor(c!)? v, Tensor(d!)? step, Tensor? index"
    update = (
        "int optimizer, float lr, float weight_decay, float momentum, float dampening, bool nesterov, float beta1, "
        "float beta2, float eps"
    )
    calls = (
        "Tensor[] g_red, Tensor[] g_cos_y, Tensor[] g_sum_u, Tensor[] x, Tensor[] labels, Tensor[] scale, "
        "Tensor[] tau, Tensor[] bias, Tensor[] rule_args, Tensor[] red, Tensor[] aux, Tensor[] kept"
    )
    return [
        f"update_rows({state}, Tensor grad, {update}) -> ()",
        f"sweep_step({state}, {calls}, {_spec_schema(operands)}, {update}) -> ()",
    ]


_OPERANDS = "bool bf16"
_library = torch.library.Library("fused_margin_cpu", "DEF")
for _schema in (*sweep_schemas(_OPERANDS, lends=True), *step_schemas(_OPERANDS)):
    _library.define(_schema)
_ops = torch.ops.fused_margin_cpu


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library if it is there, and why it cannot be used ("" if it can)."""
    path = Path(__file__).parent.parent / "_C.abi3.so"
    if not path.exists():
        return None, (
            "the C++ extension is not built (install torch and a C++ compiler first, then "
            "`pip install --no-build-isolation .`)"
        )
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"the C++ extension does not load: {error}"
    library.fm_cpu_error.restype = library.fm_cpu_path.restype = ctypes.c_char_p
    library.fm_set_capability.argtypes = [ctypes.c_char_p]
    library.fm_multiply_tiles.argtypes = [ctypes.c_int64, ctypes.c_bool]
    library.fm_multiply_tiles.restype = ctypes.c_int64
    return library, library.fm_cpu_error().decode()


_C, _reason = _load()


def why_not(x: Tensor | None, w: Tensor | None, spec: Spec) -> list[str]:
    reasons = [_reason] if _reason else []
    for name, t in (("embeddings", x), ("weight", w)):
        if t is None:
            continue
        if t.device.type != "cpu":
            reasons.append(f"{name} are on {t.device}")
        if t.dtype not in _DTYPES:
            reasons.append(f"{name} are {t.dtype}")
    return reasons


def saves_o(x: Tensor, spec: Spec) -> bool:
    """Whether a sweep makes o_red, the gradient of x but for factors of the row."""
    return bool(spec.want & Want.DX)


def _kept_bytes() -> int:
    text = os.environ.get("FUSED_MARGIN_KEEP_MIB", "48")
    try:
        return max(0, int(float(text) * 2**20))
    except (ValueError, OverflowError):
        raise ValueError(f"FUSED_MARGIN_KEEP_MIB={text!r}; expected a number of MiB, 0 to keep nothing") from None


KEPT_BYTES = _kept_bytes()  # at most, of products that a forward leaves for the backward of w, and copies of x beside
_PAD = 32  # rows of x are padded to a multiple of this (kPad in csrc/cpu/problem.h)
_COPIES = 3  # of the memory of x: what the layouts for products with x take in a backward, at most


def _padded(batch: int) -> int:
    return -(-batch // _PAD) * _PAD


def kept_rows(batch: int, dim: int, rows: int, itemsize: int) -> int:
    """Of so many rows of w, those whose products are kept: as many as KEPT_BYTES leave room for."""
    padded = _padded(batch)
    room = KEPT_BYTES // itemsize - _COPIES * padded * dim  # numbers
    return min(rows, max(0, room) // max(padded, 1))


def kept_size(x: Tensor, w: Tensor, index: Tensor | None, spec: Spec) -> int:
    """Numbers in `kept`: the products of all rows of x with the first rows of w."""
    if not spec.want & Want.DW:
        return 0
    batch, dim = x.shape
    rows = (w if index is None else index).shape[0]
    return _padded(batch) * kept_rows(batch, dim, rows, acc_dtype(x).itemsize)


def path() -> str:
    """The path in use, for people: instruction set, and what computes the products."""
    return _reason or _C.fm_cpu_path().decode()


def multiply_tiles(repeats: int, bf16: bool = False) -> int:
    """For benchmarks: the sweep's products of one tile's size, on the calling thread; the operations of one."""
    return _C.fm_multiply_tiles(repeats, bf16)


_forced: list[str] = []  # what the `capability` blocks that are open have asked for


@contextlib.contextmanager
def capability(name: str) -> Iterator[None]:
    """Within the block, the whole process uses this entry of CAPABILITIES: for tests.

    Not between a forward and its backward, which would read kept products that lie as another build has them.
    """
    if _C is None:
        raise RuntimeError(_reason)
    if not _C.fm_set_capability(name.encode()):
        raise ValueError(f"capability {name!r} is unknown, or this CPU lacks it; expected one of {CAPABILITIES}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
        _C.fm_set_capability((_forced[-1] if _forced else "").encode())


def pack(spec: Spec, operands: int | bool) -> tuple[int | bool, ...]:
    """A spec as the C++ operators take it, with what they are to know of the products' operands."""
    return (
        CODES[spec.rule],
        spec.unit_slope,
        REDUCTIONS[spec.reduction],
        spec.sub_centers,
        spec.normalize_x,
        spec.normalize_w,
        operands,
        spec.num_classes,
        spec.first_class,
        spec.ignore_index,
        spec.want,
    )


def _pack(spec: Spec) -> tuple[int | bool, ...]:
    return pack(spec, spec.compute_dtype == torch.bfloat16)


def target_cosine(x: Tensor, w: Tensor, labels: Tensor, index: Tensor | None, spec: Spec) -> Tensor:
    return _ops.target_cosine.default(x, w, labels, index, *_pack(spec))


def sweep(x, w, labels, scale, tau, bias, index, rule_args, spec: Spec) -> tuple[Tensor, ...]:
    kept = memory.numbers(kept_size(x, w, index, spec), acc_dtype(x), "products")
    return *_ops.sweep.default(x, w, labels, scale, tau, bias, index, rule_args, kept, *_pack(spec)), kept


def sweep_loss(x, w, labels, scale, rule_args, spec: Spec, forms, loss_reduction) -> tuple[Tensor, ...]:
    reduction = LOSS_REDUCTIONS.index(loss_reduction)
    kept = memory.numbers(kept_size(x, w, None, spec), acc_dtype(x), "products")
    packed = (*_pack(spec), numbers(tuple(forms)), reduction)
    return *_ops.sweep_loss.default(x, w, labels, scale, rule_args, kept, *packed), kept


@functools.lru_cache(maxsize=64)
def numbers(forms: tuple[float, ...]) -> Tensor:
    return torch.tensor(forms, dtype=torch.float64, device="cpu")


def sweep_backward(
    g_red, g_cos_y, g_sum_u, x, w, labels, scale, tau, bias, index, rule_args, red, aux, o_red, o_sum, kept, spec, need
) -> tuple[Tensor, ...]:
    rows = 0 if not need & Need.W else len(w if index is None else index)
    d_w = memory.numbers(rows * w.shape[1], w.dtype if need & Need.W else acc_dtype(x), "gradient")
    d_x, d_scale, d_bias = _ops.sweep_backward.default(
        g_red, g_cos_y, g_sum_u, x, w, labels, scale, tau, bias, index, rule_args, red, aux, o_red, o_sum,
        kept, d_w, *_pack(spec), need,
    )  # fmt: skip
    if need & Need.W:
        d_w = d_w.view(rows, w.shape[1])
    if need & Need.BIAS:
        d_bias = d_bias.to(bias.dtype)
    return d_x, d_w, d_scale.to(scale.dtype) if need & Need.SCALE else d_scale, d_bias


def pack_update(update: Update) -> tuple[int | float | bool, ...]:
    """The numbers of a step as the C++ operators take them."""
    return OPTIMIZERS[update.optimizer], *update[1:]


def update_rows(w: Tensor, state: State, index: Tensor | None, grad: Tensor, update: Update) -> None:
    _ops.update_rows.default(w, *state, index, grad, *pack_update(update))


def sweep_step(w: Tensor, state: State, index: Tensor | None, lists, spec: Spec, update: Update) -> None:
    _ops.sweep_step.default(w, *state, index, *lists, *_pack(spec), *pack_update(update))
