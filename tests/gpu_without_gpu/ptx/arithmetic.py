"""Instructions that compute, one lane a thread."""

import functools

import numpy as np

from .formats import DIRECTED, TYPES, PTXError, f32, f64, i64, is_float, round_float, u32, u64

# fmt: off
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
ROUND_TO_INT = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}
BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "min": np.fmin, "max": np.fmax, "rem": np.fmod,
}
UNARY = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "rsqrt": lambda v: 1 / np.sqrt(v), "sqrt": np.sqrt,
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "not": np.invert, "neg": np.negative, "abs": np.abs,
}
# fmt: on


def mixed(op):
    """Of sm_100 and up: all operands but the last are of 16 bit, and it and the result of 32."""
    return op[-2] == "f32" and op[-1] in ("f16", "bf16")


class Arithmetic:
    """Of a Block. Everywhere op is the name split at its dots, a the operands, m the mask of executing threads."""

    @np.errstate(all="ignore")
    def binary(self, op, a, m):
        o, ty = op[0], op[-1]
        if "wide" in op:
            return self.mad(op, a, m)
        operands = [self.numbers(q, ty) for q in a[1:]]
        if mixed(op):
            if o not in ("add", "sub"):
                raise PTXError("unsupported PTX")
            ty, operands = "f32", [operands[0].astype(f32), self.numbers(a[2], "f32")]
        if len(operands) != 2 and not (o in ("min", "max") and len(operands) == 3):  # 3 inputs: sm_100 and up
            raise PTXError("operand count")
        x, y = operands[:2]
        if is_float(ty):
            f = {"div": np.divide, **BINARY}[o]
            if o in ("min", "max") and "NaN" in op:
                f = {"min": np.minimum, "max": np.maximum}[o]
            if DIRECTED & set(op) or "sat" in op:
                operands = [v.astype(f64) for v in operands]
            r = functools.reduce(f, operands)
            return self.write_numbers(a[0], round_float(r, ty, op) if r.dtype == f64 else r, ty, m)
        if "sat" in op:
            raise PTXError("integer saturation is not supported")
        if "hi" in op:
            r = self._high(x, y)
        elif o == "div":
            y = np.where(y == 0, x.dtype.type(1), y)
            r = x // y
            r += ((x - r * y != 0) & ((x < 0) != (y < 0))).astype(x.dtype)  # numpy rounds down, PTX to zero
        elif o == "rem":
            r = np.fmod(x, np.where(y == 0, x.dtype.type(1), y))
        else:
            r = functools.reduce(BINARY[o], operands)
        self.write(a[0], r, m)

    @staticmethod
    def _high(x, y):
        wide = object if x.dtype.itemsize == 8 else i64 if x.dtype.kind == "i" else u64
        return (x.astype(wide) * y.astype(wide) >> 8 * x.dtype.itemsize).astype(x.dtype)

    @np.errstate(all="ignore")
    def mad(self, op, a, m):
        """mul.wide, mad.wide, mad.lo, mad.hi"""
        x, y = self.read(a[1], op[-1]), self.read(a[2], op[-1])
        ty = op[-1]
        if "wide" in op:
            ty = WIDER[ty]
            r = x.astype(TYPES[ty]) * y.astype(TYPES[ty])
        else:
            r = self._high(x, y) if "hi" in op else x * y
        self.write(a[0], r + self.read(a[3], ty) if len(a) > 3 else r, m)

    @np.errstate(all="ignore")
    def fma(self, op, a, m):
        ty = "f32" if mixed(op) else op[-1]
        x, y, z = (self.numbers(q, t).astype(f64) for q, t in zip(a[1:], (op[-1], op[-1], ty), strict=True))
        self.write_numbers(a[0], round_float(x * y + z, ty, op), ty, m)

    @np.errstate(all="ignore")
    def unary(self, op, a, m):
        x = self.numbers(a[1], op[-1])
        r = UNARY[op[0]](x).astype(x.dtype)
        if is_float(op[-1]) and (DIRECTED & set(op) or "sat" in op):
            r = round_float(UNARY[op[0]](x.astype(f64)), op[-1], op)
        self.write_numbers(a[0], r, op[-1], m)

    def shift(self, op, a, m):
        x, n = self.read(a[1], op[-1]), self.read(a[2], "u32")
        bits = x.dtype.itemsize * 8
        by = np.minimum(n, bits - 1).astype(x.dtype)
        r = x << by if op[0] == "shl" else x >> by
        if op[0] == "shl" or op[-1][0] != "s":
            r = np.where(n >= bits, x.dtype.type(0), r)
        self.write(a[0], r, m)

    def funnel(self, op, a, m):
        """shf.l, shf.r of 32 bit: two registers as one of 64, of which one half is kept"""
        low, high, n = (self.read(q, "u32").astype(u64) for q in a[1:4])
        n = np.minimum(n, u64(32)) if "clamp" in op else n & u64(31)
        both = high << u64(32) | low
        self.write(a[0], ((both << n) >> u64(32) if "l" in op else both >> n).astype(u32), m)

    def bits(self, op, a, m):
        """bfe.u32, bfe.s32, bfi.b32, prmt.b32, lop3.b32"""
        o = op[0]
        if op[1:] not in ([["u32"], ["s32"]] if o == "bfe" else [["b32"]]):
            raise PTXError("unsupported PTX")
        x, y, z = (self.read(q, "u32") for q in a[1:4])
        if o == "bfe":
            mask = ((u64(1) << z.astype(u64)) - u64(1)).astype(u32)
            r = (x >> y) & mask
            if op[1] == "s32":  # the field's highest bit fills what is above it
                r |= np.where(r & (mask ^ mask >> u32(1)), ~mask, u32(0))
        elif o == "bfi":
            mask = (((u64(1) << self.read(a[4], "u64")) - u64(1)) << z.astype(u64)).astype(u32)
            r = (y & ~mask) | ((x << z) & mask)
        elif o == "prmt":
            data = np.stack([v >> u32(8 * i) for v in (x, y) for i in range(4)]) & u32(255)
            r = np.zeros(self.T, u32)
            for i in range(4):
                selector = z >> u32(4 * i)
                byte = data[selector & u32(7), np.arange(self.T)]
                sign = (byte >> u32(7)) * u32(255)  # selector bit 3 asks for the byte's sign
                r |= np.where(selector & u32(8), sign, byte) << u32(8 * i)
        else:
            table, r = int(a[4], 0), np.zeros(self.T, u32)
            for i in range(8):
                if table >> i & 1:
                    r |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
        self.write(a[0], r, m)

    def count_bits(self, op, a, m):
        x = self.read(a[1], op[-1])
        width = x.dtype.itemsize * 8
        f = int.bit_count if op[0] == "popc" else lambda v: width - v.bit_length()
        self.write(a[0], np.array([f(int(v)) for v in x], u32), m)

    def selp(self, op, a, m):
        self.write(a[0], np.where(self.reg[a[3]], self.read(a[1], op[-1]), self.read(a[2], op[-1])), m)

    def setp(self, op, a, m):
        compare, ty = op[1], op[-1]
        if ty[-2:] == "x2":
            raise PTXError("unsupported PTX")
        x, y = self.numbers(a[1], ty), self.numbers(a[2], ty)
        if is_float(ty):
            nan = np.isnan(x) | np.isnan(y)
            if compare in ("num", "nan"):
                r = nan if compare == "nan" else ~nan
            else:
                r = COMPARE[compare[:2]](x, y)
                r = r | nan if len(compare) == 3 else r & ~nan  # equ, neu, ltu, ... are true for NaN
        else:
            r = COMPARE[compare](x, y)
        if len(a) > 3:
            p = ~self.reg[a[3][1:]] if a[3][0] == "!" else self.reg[a[3]]
            r = BINARY[op[2]](r, p)
        for target, v in zip(a[0].split("|"), (r, ~r), strict=False):
            self.write(target, v, m)

    @np.errstate(all="ignore")
    def cvt(self, op, a, m):
        target, source = op[-2], op[-1]
        if target in ("bf16x2", "f16x2") and len(a) == 3:  # the first source goes to the high half
            x = np.stack([self.read(a[2], source), self.read(a[1], source)], 1)
            return self.write_numbers(a[0], round_float(x.astype(f64), target, op), target, m)
        x = self.numbers(a[1], source)
        if target == "tf32":
            if op[1] != "rna":
                raise PTXError("unsupported rounding to tf32")
            return self.write(a[0], (x.view(u32) + u32(0x1000)) & u32(0xFFFFE000), m)
        for q in ROUND_TO_INT.keys() & set(op):
            x = ROUND_TO_INT[q](x)
        if is_float(target):
            return self.write_numbers(a[0], round_float(x.astype(f64), target, op), target, m)
        if is_float(source) or "sat" in op:
            limits = np.iinfo(TYPES[target])
            x = np.clip(np.nan_to_num(x.astype(f64)), limits.min, limits.max)
        self.write(a[0], x.astype(TYPES[target]), m)
