"""Instructions that move data: loads, stores, asynchronous copies, atomics, register moves."""

import functools

import numpy as np

from .formats import TYPES, PTXError, i64, u32, u64
from .parse import vector

SPACES = ("param", "global", "shared", "const", "local")


class Movement:
    """Of a Block."""

    def ld(self, op, a, m):
        space, dtype = next((q for q in op if q in SPACES), "global"), TYPES[op[-1]]
        size, targets, address = np.dtype(dtype).itemsize, vector(a[0]), self.address(a[1])
        self.aligned(address, m, size * len(targets))
        if space in ("param", "local"):
            loaded = [self.load_private(address + u64(i * size), dtype, m) for i in range(len(targets))]
        else:
            loaded = [self.load(space, address + u64(i * size), dtype, m) for i in range(len(targets))]
        for target, v in zip(targets, loaded, strict=False):
            self.write(target, v, m)

    def st(self, op, a, m):
        space, ty = next((q for q in op if q in SPACES), "global"), op[-1]
        size, sources, address = np.dtype(TYPES[ty]).itemsize, vector(a[1]), self.address(a[0])
        self.aligned(address, m, size * len(sources))
        for i, source in enumerate(sources):
            if space in ("param", "local"):
                self.store_private(address + u64(i * size), self.read(source, ty), m)
            else:
                self.store(space, address + u64(i * size), self.read(source, ty), m)

    def cp(self, op, a, m):
        if op[1] != "async" or "bulk" in op or "mbarrier" in op:
            raise PTXError("unsupported PTX")
        if "commit_group" in op or "wait_all" in op:
            self.copy_groups.append(self.copies)
            self.copies = []
        if "wait_group" in op or "wait_all" in op:
            while len(self.copy_groups) > (int(a[0]) if a else 0):
                for copy in self.copy_groups.pop(0):
                    copy()
        elif "commit_group" not in op:
            target, source, size = self.address(a[0]), self.address(a[1]), int(a[2], 0)
            valid = self.read(a[3], "u32").copy() if len(a) > 3 else np.full(self.T, size, u32)
            self.aligned(target, m, size)
            self.aligned(source, m & (valid > 0), size)
            self.copying[self._copied(target, size, m)] += 1
            self.copies.append(functools.partial(self._land, target, source, size, valid, m.copy(), self.text))

    def _copied(self, target, size, m):
        """The bytes of shared memory that a cp.async writes; one beyond the end is reported when it lands."""
        ix = (target[m].astype(i64)[:, None] + np.arange(size)).ravel()
        return ix[ix < len(self.shared)]

    def _land(self, target, source, size, valid, m, text):
        """Do one cp.async: `valid` bytes from global memory, the rest zeros."""
        self.text = text
        self.copying[self._copied(target, size, m)] -= 1
        for i in range(0, size, 4):
            v = self.load("global", source + u64(i), u32, m & (valid > i))
            self.store("shared", target + u64(i), v, m)

    def atom(self, op, a, m):
        ty, space = op[-1], "shared" if "shared" in op else "global"
        if ty in ("bf16", "bf16x2", "f16x2", "f32x2") or {"v2", "v4", "v8"} & set(op):
            raise PTXError("unsupported atomic type")
        returns = op[0] == "atom"
        address, v = self.address(a[returns]), self.read(a[1 + returns].strip("{} "), ty)
        size = v.dtype.itemsize
        swap = self.read(a[3], ty) if "cas" in op else None
        update = {
            "add": lambda c, x: c + x,
            "max": max,
            "min": min,
            "exch": lambda c, x: x,
            "and": lambda c, x: c & x,
            "or": lambda c, x: c | x,
            "xor": lambda c, x: c ^ x,
            "cas": None,
        }
        f = update[next(q for q in op if q in update)]
        old = np.zeros(self.T, TYPES[ty])
        self.aligned(address, m, size)
        with np.errstate(all="ignore"):
            for lane in np.flatnonzero(m):
                ((buffer, _, (offset,)),) = self.regions(space, np.array([lane]), address[lane : lane + 1], size)
                cell = buffer.memory[offset : offset + size].view(v.dtype)
                old[lane] = cell[0]
                cell[0] = f(cell[0], v[lane]) if f else swap[lane] if cell[0] == v[lane] else cell[0]
        if returns:
            self.write(a[0].strip("{} "), old, m)

    def mov(self, op, a, m):
        ty = op[-1]
        if a[0][0] == "{":  # unpack
            targets = vector(a[0])
            part = self.reg[next(t for t in targets if t != "_")].dtype
            parts = self.read(a[1], ty).reshape(-1, 1).view(part)
            for i, target in enumerate(targets):
                self.write(target, np.ascontiguousarray(parts[:, i]), m)
        elif a[1][0] == "{":  # pack
            sources = vector(a[1])
            part = f"b{8 * np.dtype(TYPES[ty]).itemsize // len(sources)}"
            self.write(a[0], np.stack([self.read(s, part) for s in sources], 1).view(TYPES[ty]).reshape(-1), m)
        else:
            self.write(a[0], self.read(a[1], ty), m)

    def cvta(self, op, a, m):
        self.write(a[0], self.read(a[1], "u64"), m)
