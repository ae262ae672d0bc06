"""Instructions of a whole warp or block: shuffles, votes, ldmatrix, mma.sync, barriers."""

import re

import numpy as np

from .formats import PTXError, bf16_to_f32, f16, f32, f64, i64, round_float, truncate_tf32, u8, u16, u32, u64
from .parse import vector

LANES = np.arange(32)
REDUCE = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip

VOTES = {"or": np.any, "and": np.all, "popc": np.sum}


def truncated_product(left, right, acc):
    """acc + left @ right as a tensor core may have it: see truncated_sum of cuda_host/simulator/simulated_arch.h."""
    for columns in np.split(np.arange(left.shape[-1]), 2):
        products = left[..., columns, None].astype(f64) * right[:, None, columns]
        terms = np.concatenate([acc[:, :, None].astype(f64), products], 2)
        unit = np.ldexp(1.0, np.frexp(np.abs(terms).max(2))[1] - 25)
        with np.errstate(invalid="ignore"):
            acc = round_float(np.trunc(terms / unit[:, :, None]).sum(2) * unit, "f32", {"rz"})
    return acc


class Warp:
    """Of a Block."""

    def shfl(self, op, a, m):
        x, b, c = (self.warps(self.read(q, "b32")) for q in a[1:4])
        b, c = b.astype(i64), c.astype(i64)
        segment, clamp = (c >> 8) & 31, c & 31
        last = (LANES & segment) | (clamp & ~segment)
        source = {
            "bfly": LANES ^ b,
            "down": LANES + b,
            "up": LANES - b,
            "idx": (LANES & segment) | (b & ~segment & 31),
        }[op[2]]
        inside = source >= last if op[2] == "up" else source <= last
        source = np.where(inside, source, LANES)
        active = self.warps(m)
        if not np.take_along_axis(active, source, 1)[active].all():
            raise PTXError("shfl reads an inactive lane")
        for target, v in zip(a[0].split("|"), (np.take_along_axis(x, source, 1), inside), strict=False):
            self.write(target, v.reshape(-1), m)

    def vote(self, op, a, m):
        p, active = self.warps(self.read(a[1], "pred") & m), self.warps(m)
        mode = next(q for q in op if q in ("ballot", "any", "all"))
        r = {"ballot": lambda: self._mask(p), "any": lambda: p.any(1), "all": lambda: (p | ~active).all(1)}[mode]()
        self.write(a[0], np.repeat(r, 32), m)

    def redux(self, op, a, m):
        """redux.sync: one integer operation over a whole warp"""
        self.full_warps(m)
        x = self.warps(self.read(a[1], op[-1]))
        self.write(a[0], np.repeat(REDUCE[op[2]].reduce(x, 1, dtype=x.dtype), 32), m)

    @staticmethod
    def _mask(p):
        return (p * (u64(1) << LANES.astype(u64))).sum(1).astype(u32)

    def activemask(self, op, a, m):
        self.write(a[0], np.repeat(self._mask(self.warps(m)), 32), m)

    def _matrix_rows(self, i, warps, address):
        """Where the rows of 8 x 16 bytes of matrix i lie, [8 warps, 16]: lane 8 i + r holds the address of row r."""
        rows = address[warps, 8 * i : 8 * i + 8].reshape(-1)
        self.aligned(rows, slice(None), 16)
        ((buffer, who, offset),) = self.regions("shared", np.repeat(warps * 32, 8), rows, 16)
        return buffer, who, offset[:, None] + np.arange(16)

    def ldmatrix(self, op, a, m):
        warps, address = self.full_warps(m), self.warps(self.address(a[1]))
        for i, target in enumerate(vector(a[0])):
            buffer, who, ix = self._matrix_rows(i, warps, address)
            self.touch(buffer, ix, who, False)
            tile = buffer.memory[ix].reshape(-1).view(u16).reshape(-1, 8, 8)
            if "trans" in op:
                tile = np.ascontiguousarray(tile.transpose(0, 2, 1))
            out = np.zeros((self.W, 32), u32)
            out[warps] = tile.view(u32).reshape(-1, 32)
            self.write(target, out.reshape(-1), m)

    def stmatrix(self, op, a, m):
        warps, address = self.full_warps(m), self.warps(self.address(a[0]))
        for i, source in enumerate(vector(a[1])):
            buffer, who, ix = self._matrix_rows(i, warps, address)
            self.touch(buffer, ix, who, True)
            tile = np.ascontiguousarray(self.warps(self.read(source, "b32"))[warps]).view(u16).reshape(-1, 8, 8)
            if "trans" in op:
                tile = np.ascontiguousarray(tile.transpose(0, 2, 1))
            buffer.memory[ix] = tile.view(u8).reshape(-1, 16)

    def mma(self, op, a, m):
        """m16n8kK with fp32 sums; lane 4 g + t holds row g, columns 2 t and 2 t + 1 (tf32: t) of each 8-row fragment"""
        warps = self.full_warps(m)
        shape = next(q for q in op if re.fullmatch(r"m\d+n\d+k\d+", q))
        ty, K = op[-3], int(shape.split("k")[1])
        if op[-4:] != ["f32", ty, ty, "f32"] or ty not in ("bf16", "f16", "tf32") or shape[:6] != "m16n8k":
            raise PTXError("unsupported mma")
        D, A, B, C = map(vector, a)

        def fragment(o):  # [warps, 8 rows g, columns]
            bits = self.read(o, "b32")
            if ty == "tf32":
                v = truncate_tf32(bits.view(f32))
            else:
                v = bf16_to_f32(bits.view(u16)) if ty == "bf16" else bits.view(f16).astype(f32)
            return v.reshape(self.W, 8, -1)

        width = 4 if ty == "tf32" else 8
        left, right, acc = (np.zeros((self.W, *s), f32) for s in ((16, K), (K, 8), (16, 8)))
        for i, o in enumerate(A):
            row, col = 8 * (i % 2), width * (i // 2)
            left[:, row : row + 8, col : col + width] = fragment(o)
        for i, o in enumerate(B):
            right[:, width * i : width * (i + 1)] = fragment(o).transpose(0, 2, 1)
        part = [np.s_[:, 8 * (i // 2) : 8 * (i // 2) + 8, i % 2 :: 2] for i in range(4)]
        for i, o in enumerate(C):
            acc[part[i]] = self.read(o, "f32").reshape(self.W, 8, 4)
        acc = truncated_product(left, right, acc) if self.truncates else acc + left @ right
        self.flops += len(warps) * 2 * 16 * 8 * K
        for i, o in enumerate(D):
            self.write(o, np.ascontiguousarray(acc[part[i]]).reshape(-1), m)

    def bar(self, op, a, m):
        if "warp" in op:
            return
        reduction = next((q for q in op if q in VOTES), None) if "red" in op else None
        if len(a) != (3 if reduction else 1) or not (reduction or "sync" in op):
            raise PTXError("only whole-block bar.sync and bar.red are supported")
        if not np.array_equal(m, self.alive):
            raise PTXError("bar.sync reached by only part of the block (divergent barrier)")
        self.epoch += 1
        if reduction:
            votes = self.read(a[2], "pred")[m]
            self.write(a[0], np.full(self.T, VOTES[reduction](votes), np.bool_ if reduction != "popc" else u32), m)

    def nothing(self, op, a, m):
        pass
