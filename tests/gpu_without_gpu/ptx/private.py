"""Memory of a single thread (.param and .local), and the calls of functions, whose parameters lie there."""

import numpy as np

from .formats import PTXError, i64


class Private:
    """Of a Block. Its `private` memory is [threads, bytes]; an address is an offset."""

    def _places(self, address, size, m):
        lanes = np.flatnonzero(m)
        offset = address[lanes].astype(i64)
        if len(offset) and not (offset.min() >= 0 and offset.max() + size <= self.private.shape[1]):
            raise PTXError(f"out-of-bounds access of {size} bytes of a thread's own memory")
        return lanes[:, None], offset[:, None] + np.arange(size)

    def load_private(self, address, dtype, m):
        out = np.zeros(self.T, dtype)
        lanes, ix = self._places(address, out.itemsize, m)
        out[m] = np.ascontiguousarray(self.private[lanes, ix]).reshape(-1).view(dtype)
        return out

    def store_private(self, address, v, m):
        lanes, ix = self._places(address, v.itemsize, m)
        self.private[lanes, ix] = np.ascontiguousarray(v[m]).view(np.uint8).reshape(-1, v.itemsize)

    def _copy_private(self, target, source, m):
        private = self.kernel.private
        ends = [*sorted(private.values()), self.private.shape[1]]
        to, start = private[target], private[source]
        size = min(min(e for e in ends if e > at) - at for at in (to, start))
        self.private[m, to : to + size] = self.private[m, start : start + size]

    def call(self, op, a, m):
        """A function is never entered again before it returns, so that its registers are one set."""
        name, *given = a
        function = self.kernel.functions.get(name)
        if function is None:
            raise PTXError(f"no function {name}")
        for formal, actual in zip(function.parameters, given, strict=True):
            self._copy_private(formal, actual, m)
        returns = self.returns.setdefault(name, np.full(self.T, -1, i64))
        if (returns[m] >= 0).any():
            raise PTXError(f"{name} calls itself")
        returns[m] = self.pc[m]
        self.pc[m] = function.start

    def return_(self, op, a, m):
        returns = self.returns[a[0]]
        self.pc[m] = returns[m]
        returns[m] = -1

    def result(self, op, a, m):
        self._copy_private(a[0], self.kernel.functions[a[1]].result, m)
