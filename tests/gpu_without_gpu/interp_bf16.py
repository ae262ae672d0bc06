"""bf16 for Triton's interpreter (3.8, 3.9), which otherwise computes on the raw 16 bits.

Equivalent to: every bf16 operation done in fp32 and rounded to nearest even; tl.dot of bf16 done in fp32.
Call install() once, after TRITON_INTERPRET=1 and the import of triton. uninstall() gives Triton's own code back.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as I

Handle = I.TensorHandle
_patched = []


def to_f32(bits):
    """bf16 bits (uint16) -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values):
    """float32 -> bf16 bits (uint16), round to nearest even, NaN kept."""
    u = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((u + (((u >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), ((u >> 16) | 0x40).astype(np.uint16), rounded)


def truncate_tf32(values):
    """What a tensor core sees of float32."""
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def is_bf16(handle):
    return hasattr(handle, "dtype") and handle.dtype.scalar == tl.bfloat16


def widen(handle):
    return Handle(to_f32(handle.data), tl.float32) if is_bf16(handle) else handle


def _cast_impl(original):
    def cast_impl(self, src, dst):
        if src.dtype.scalar == dst.scalar:
            return original(self, src, dst)
        if dst.scalar == tl.bfloat16:
            return Handle(to_bf16(src.data.astype(np.float32)), tl.bfloat16)
        return original(self, widen(src), dst)

    return cast_impl


def _fp_to_fp(original):
    def create_fp_to_fp(self, src, dst, rounding):
        nearest = rounding in (None, I._ir.ROUNDING_MODE.RTNE)
        if nearest and tl.bfloat16 in (src.dtype.scalar, dst.scalar):
            return self.cast_impl(src, dst)
        return original(self, src, dst, rounding)

    return create_fp_to_fp


def _arithmetic(operands):
    """Wrap a builder method whose first `operands` arguments may be bf16; comparisons keep their bool result."""

    def wrap(original):
        def op(self, *args):
            if not any(is_bf16(a) for a in args[:operands]):
                return original(self, *args)
            out = original(self, *map(widen, args[:operands]), *args[operands:])
            return Handle(to_bf16(out.data), tl.bfloat16) if out.data.dtype == np.float32 else out

        return op

    return wrap


def _dot(original, tf32):
    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = widen(a), widen(b)
        if tf32 and a.dtype.scalar == tl.float32 and input_precision == I._ir.INPUT_PRECISION.TF32:
            a, b = (Handle(truncate_tf32(h.data), tl.float32) for h in (a, b))
        elif a.data.dtype == np.float16 and d.data.dtype == np.float32:  # numpy's mixed-dtype matmul is slow
            a, b = (Handle(h.data.astype(np.float32), tl.float32) for h in (a, b))
        a, b = (Handle(np.ascontiguousarray(h.data), h.dtype) for h in (a, b))
        return original(self, a, b, d, input_precision, max_num_imprecise_acc)

    return create_dot


def _tensor(data, dtype, block):
    return tl.core.tensor(Handle(data, dtype), tl.block_type(dtype, list(data.shape)) if block else dtype)


def _reduction(original):
    """Wrap a reduction or scan: fp32 inside, one rounding at the end."""

    def narrow(t):
        if t.dtype.scalar != tl.float32:
            return t
        return _tensor(to_bf16(t.handle.data), tl.bfloat16, t.type.is_block())

    def reduce(self, input, *args, **kwargs):
        value = input[0] if isinstance(input, tuple) else input
        if value.dtype.scalar != tl.bfloat16:
            return original(self, input, *args, **kwargs)
        out = original(self, _tensor(to_f32(value.handle.data), tl.float32, True), *args, **kwargs)
        return type(out)(map(narrow, out)) if isinstance(out, (tuple, list)) else narrow(out)

    return reduce


def install(tf32=False):
    """Patch the interpreter; a second call does nothing.

    tf32: truncate the operands of fp32 dots with input_precision="tf32", as a tensor core does; Triton keeps full fp32.
    """
    if _patched:
        return
    patches = [
        (I.InterpreterBuilder, "cast_impl", _cast_impl),
        (I.InterpreterBuilder, "create_fp_to_fp", _fp_to_fp),
        (I.InterpreterBuilder, "create_dot", lambda original: _dot(original, tf32)),
    ]
    patches += [
        (I.InterpreterBuilder, name, _arithmetic(n))
        for name, n in (("unary_op", 1), ("binary_op", 2), ("ternary_op", 3), ("create_fma", 3))
    ]
    patches += [(I.ReduceOps, name, _reduction) for name in ("sum", "min_max")]
    patches += [(I.ScanOps, name, _reduction) for name in ("cumsum", "cumprod")]
    for cls, name, wrap in patches:
        original = getattr(cls, name)
        _patched.append((cls, name, original))
        setattr(cls, name, wrap(original))


def uninstall():
    """Undo install()."""
    while _patched:
        setattr(*_patched.pop())
