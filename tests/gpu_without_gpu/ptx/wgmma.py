"""wgmma."""

from .formats import PTXError


class Asynchronous:
    def __init__(self, size, warps):
        pass

    def written(self, ix):
        pass


class Wgmma:
    """Of a Block."""

    def wgmma(self, op, a, m):
        raise PTXError("unsupported PTX")

    def fence(self, op, a, m):
        pass
