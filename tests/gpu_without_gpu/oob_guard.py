"""Guards for Triton's interpreter, which reads and writes any address it is given and skips tl.device_assert.

install(): a load, store or atomic outside the tensors passed to the launch raises IndexError (seen by the caller as
InterpreterError); tl.device_assert raises AssertionError. Call it after TRITON_INTERPRET=1 and the import of triton.
"""

import dataclasses

import numpy as np
from triton.runtime import interpreter as I

_ranges = []  # [(first byte, byte past the end)] of the tensors of the running launch
_installed = False


def extent(t):
    """Bytes from the first element of a tensor to past its last one, strides included."""
    if t.numel() == 0:
        return 0
    return (1 + sum((n - 1) * abs(stride) for n, stride in zip(t.shape, t.stride(), strict=False))) * t.element_size()


def _tensors(args):
    for a in args:
        if isinstance(a, tuple):
            yield from _tensors(a)
        elif hasattr(a, "data_ptr"):
            yield a
        elif hasattr(a, "base"):  # tensor descriptor
            yield a.base


def _check(what, pointers, mask):
    size = pointers.get_element_ty().primitive_bitwidth // 8
    address = np.atleast_1d(pointers.data)
    if mask is not None:
        address = address[np.broadcast_to(mask.data, address.shape).astype(bool)]
    inside = np.zeros(address.shape, bool)
    for begin, end in _ranges:
        inside |= (address >= begin) & (address + np.uint64(size) <= end)
    if not inside.all():
        bad = int(address[~inside][0])
        begin, end = min(_ranges, key=lambda r: abs(bad - r[0]), default=(0, 0))
        raise IndexError(
            f"{what} of {(~inside).sum()} elements out of bounds; the first is byte {bad - begin} "
            f"of the nearest tensor, which has {end - begin}"
        )


def install():
    """Patch the interpreter; a second call does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    B = I.InterpreterBuilder
    load, store, rmw, cas = B.create_masked_load, B.create_masked_store, B.create_atomic_rmw, B.create_atomic_cas
    init_args = I.GridExecutor._init_args_hst

    def create_masked_load(self, ptrs, mask, *rest):
        _check("load", ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def create_masked_store(self, ptrs, value, mask, *rest):
        _check("store", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def create_atomic_rmw(self, op, ptr, val, mask, *rest):
        _check("atomic", ptr, mask)
        return rmw(self, op, ptr, val, mask, *rest)

    def create_atomic_cas(self, ptr, *rest):
        _check("atomic", ptr, None)
        return cas(self, ptr, *rest)

    def _init_args_hst(self, args, kwargs):
        host_args, host_kwargs = init_args(self, args, kwargs)
        _ranges[:] = [(t.data_ptr(), t.data_ptr() + extent(t)) for t in _tensors([*host_args, *host_kwargs.values()])]
        return host_args, host_kwargs

    for f in (create_masked_load, create_masked_store, create_atomic_rmw, create_atomic_cas):
        setattr(B, f.__name__, f)
    I.GridExecutor._init_args_hst = _init_args_hst
    I.interpreter_builder.options = dataclasses.replace(I.interpreter_builder.options, debug=True)
