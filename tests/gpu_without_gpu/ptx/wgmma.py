"""wgmma (sm_90): D[64, N] += A[64, K] B[K, N] by a warpgroup of 128 threads, asynchronously.

A comes from registers or, as B does, from shared memory by a descriptor; 16 x 8-byte core matrices, swizzled or not, as
the PTX ISA's "asynchronous warpgroup level matrix" section has them. The product is computed where it is issued; until
its group is waited for, no instruction may touch its registers, nor write the shared memory that it reads.
"""

import re

import numpy as np

from .formats import PTXError, bf16_to_f32, f16, f32, truncate_tf32, u16, u32
from .parse import vector

WIDTH = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a row of the swizzle pattern, by the descriptor's mode
ROWS = 64


class Asynchronous:
    """What the asynchronous proxy may not see yet, what it still reads, and which registers are in flight."""

    def __init__(self, size, warps):
        self.unseen = np.zeros(size, bool)  # written by the generic proxy, no proxy fence since
        self.reads = np.zeros(size, np.int32)  # how many unfinished products read a byte
        self.issued = [[] for _ in range(-(-warps // 4))]  # by warpgroup: products that are not committed
        self.committed = [[] for _ in self.issued]  # and groups of them that are not waited for
        self.in_flight = {}  # register -> how many unfinished products have it
        self.unordered = set()  # registers written since the last wgmma.fence

    def written(self, ix):
        if self.reads[ix].any():
            raise PTXError("shared memory is overwritten while a wgmma may still read it")
        self.unseen[ix] = True

    def issue(self, group, ix, registers):
        self.issued[group].append((ix, registers))
        for i in ix:
            np.add.at(self.reads, i, 1)
        for register in registers:
            self.in_flight[register] = self.in_flight.get(register, 0) + 1

    def finish(self, product):
        ix, registers = product
        for i in ix:
            np.subtract.at(self.reads, i, 1)
        for register in registers:
            self.in_flight[register] -= 1
            if not self.in_flight[register]:
                del self.in_flight[register]


def operand_bytes(descriptor, lines, depth, size, transposed):
    """Shared-memory address of each element of an operand [lines, depth]: its lines are rows of A or columns of B.

    transposed: the lines, not the depth, lie contiguously in memory.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    mode, width = descriptor >> 62, WIDTH[descriptor >> 62]
    if descriptor >> 49 & 7:
        raise PTXError("a matrix descriptor with a base offset is not supported")
    line, k = np.arange(lines)[:, None], np.arange(depth)[None, :]
    if not transposed:
        along = k * size
        offset = line % 8 * width + line // 8 * stride + along % width + along // width * leading
    else:
        along = line * size
        across = (stride, leading) if mode == 0 else (leading, stride)
        offset = along % width + along // width * across[0] + k % 8 * width + k // 8 * across[1]
    address = start + offset
    return address ^ (address >> 7 & width // 16 - 1) << 4


def _values(raw, ty):
    if ty == "tf32":
        return truncate_tf32(raw.view(f32))
    return bf16_to_f32(raw.view(u16)) if ty == "bf16" else raw.view(f16).astype(f32)


class Wgmma:
    """Of a Block."""

    def wgmma(self, op, a, m):
        groups = self._warpgroups(m)
        asynchronous = self.asynchronous
        if op[1] == "fence":
            asynchronous.unordered.clear()
        elif op[1] == "commit_group":
            for group in groups:
                asynchronous.committed[group].append(asynchronous.issued[group])
                asynchronous.issued[group] = []
        elif op[1] == "wait_group":
            for group in groups:
                while len(asynchronous.committed[group]) > int(a[0]):
                    for product in asynchronous.committed[group].pop(0):
                        self._finish(group, product)
        elif op[1] == "mma_async":
            self._mma_async(op, a, m, groups)
        else:
            raise PTXError("unsupported PTX")

    def fence(self, op, a, m):
        """Only a proxy fence does something here: memory is always coherent, but a wgmma reads by another proxy."""
        if op[1:3] == ["proxy", "async"]:
            fencing = np.unique(self.warp[m])
            tracker = self.between_warps
            seen = (tracker.write_epoch < self.epoch) | np.isin(tracker.writer, fencing)
            self.asynchronous.unseen[seen] = False

    def _warpgroups(self, m):
        if self.W % 4:
            raise PTXError("wgmma needs whole warpgroups of 4 warps")
        by_group = m.reshape(-1, 128)
        if (by_group.any(1) & ~by_group.all(1)).any():
            raise PTXError("a wgmma instruction is reached by only part of a warpgroup")
        return np.flatnonzero(by_group.all(1))

    def _finish(self, group, product):
        self.asynchronous.finish(product)
        for ix in product[0]:  # the read lasted until now
            self._touch_as_group(group, ix)

    def _touch_as_group(self, group, ix):
        if self.check_races:
            self.between_warps.touch(ix.reshape(1, -1), 4 * group, self.epoch, False)

    def _mma_async(self, op, a, m, groups):
        shape = re.fullmatch(r"m64n(\d+)k(\d+)", op[4])
        ty = op[-1]
        if not shape or op[-3:] != ["f32", ty, ty] or ty not in ("bf16", "f16", "tf32"):
            raise PTXError("unsupported wgmma")
        columns, depth = map(int, shape.groups())
        size, from_registers = (4 if ty == "tf32" else 2), a[1][0] == "{"
        if depth * size != 32:
            raise PTXError("unsupported wgmma shape")
        targets, sources = vector(a[0]), vector(a[1]) if from_registers else ()
        signs, transposed = int(a[4]) * int(a[5]), [bool(int(flag)) for flag in a[6:]] or [False]
        self._check_registers(targets, sources)
        keep = self.read(a[3], "pred")
        acc = np.stack([self.reg[t].view(f32) for t in targets], 1)  # [threads, values]
        acc = np.where(keep[:, None], acc, f32(0))
        for group in groups:
            lanes = slice(128 * group, 128 * group + 128)
            reads = []
            if from_registers:
                left = self._fragment(sources, lanes, depth, ty)
            else:
                left = self._operand(group, a[1], ROWS, depth, size, ty, transposed[0], reads)
            right = self._operand(group, a[2], columns, depth, size, ty, transposed[-1], reads)
            product = signs * (left @ right.T)  # [64, N]
            self.flops += 2 * ROWS * columns * depth
            # thread 32 w + 4 g + t: rows 16 w + g and + 8, columns 8 j + 2 t and + 1
            product = product.reshape(4, 2, 8, columns // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5).reshape(128, -1)
            acc[lanes] += product
            self.asynchronous.issue(group, reads, (*targets, *sources))
        for i, target in enumerate(targets):
            np.copyto(self.reg[target], np.ascontiguousarray(acc[:, i]).view(u32), where=m)

    def _check_registers(self, targets, sources):
        asynchronous = self.asynchronous
        if not asynchronous.unordered.isdisjoint((*targets, *sources)):
            raise PTXError("registers of a wgmma were written since the last wgmma.fence")
        if not asynchronous.in_flight.keys().isdisjoint(sources):
            raise PTXError("an operand of a wgmma is still in flight")

    def _fragment(self, sources, lanes, depth, ty):
        """A from registers: in register i, thread 32 w + 4 g + t has row 16 w + g + 8 (i % 2), column group i // 2."""
        raw = np.stack([self.reg[s][lanes].view(u32) for s in sources], 1)  # [128, 4]
        values = _values(np.ascontiguousarray(raw).reshape(-1), ty).reshape(
            4, 8, 4, 2, 2, -1
        )  # w g t column row within
        return values.transpose(0, 4, 1, 3, 2, 5).reshape(ROWS, depth)

    def _operand(self, group, descriptor, lines, depth, size, ty, transposed, reads):
        values = self.read(descriptor, "b64")[128 * group : 128 * group + 128]
        if (values != values[0]).any():
            raise PTXError("the threads of a warpgroup have different matrix descriptors")
        address = operand_bytes(int(values[0]), lines, depth, size, transposed)
        ix = address[..., None] + np.arange(size)
        if ix.max() >= len(self.shared):
            raise PTXError(f"out-of-bounds shared access: a wgmma reads byte {ix.max()} of {len(self.shared)}")
        if self.asynchronous.unseen[ix].any():
            raise PTXError("a wgmma reads what was written without a fence.proxy.async since")
        self._touch_as_group(group, ix)
        reads.append(ix)
        return _values(self.shared.memory[ix].reshape(lines, -1), ty)
