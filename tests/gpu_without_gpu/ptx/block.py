"""One thread block: its state, its execution, and which method carries out each opcode.

A modifier that would change the result and is not modelled is refused, never skipped; .ftz, .approx and cache hints
are skipped.
"""

import numpy as np

from .arithmetic import Arithmetic
from .formats import TYPES, PTXError, bf16_to_f32, f16, f32, f32_to_bf16, i32, i64, u8, u16, u32, u64
from .memory import Buffer, Memory, Tracker
from .movement import Movement
from .parse import parse_address
from .private import Private
from .warp import Warp
from .wgmma import Asynchronous, Wgmma

REFUSED = {"cc", "relu", "satfinite", "xorsign", "hilo"}


class Block(Arithmetic, Movement, Private, Warp, Wgmma, Memory):
    """The state of one thread block. `m` is everywhere the mask of executing threads."""

    def __init__(self, kernel, shape, shared_bytes, buffers, params, index, grid, check_races=True, truncates=False):
        self.kernel, self.buffers, self.index = kernel, buffers, index
        self.number = int(np.ravel_multi_index(index, grid[:3]))
        self.T = T = int(np.prod(shape))
        if T % 32:
            raise PTXError(f"a block of {T} threads is not whole warps")
        self.W = T // 32
        lin = np.arange(T, dtype=u32)
        self.warp = (lin // 32).astype(i32)
        self.special = {
            "%laneid": lin % u32(32),
            "%warpid": lin // u32(32),
            "%tid.x": lin % u32(shape[0]),
            "%tid.y": lin // u32(shape[0]) % u32(shape[1]),
            "%tid.z": lin // u32(shape[0] * shape[1]),
        }
        for what, value in (("ctaid", index), ("nctaid", grid), ("ntid", shape)):
            self.special.update({f"%{what}.{c}": np.full(T, value[i], u32) for i, c in enumerate("xyz")})
        self.reg = {name: np.zeros(T, dtype) for name, dtype in kernel.registers.items()}
        self.constants = {}
        self.pc, self.alive, self.count = np.full(T, kernel.start, i64), np.ones(T, bool), 0
        self.private = np.full((T, kernel.private_bytes), 0xFF, u8)
        for name, value in params.items():
            self.private[:, kernel.private[name] : kernel.private[name] + len(value)] = value
        self.returns = {}  # function -> where each thread goes on
        self.flops = 0
        self.truncates = truncates  # sums of mma.sync, see warp.py
        self.copies, self.copy_groups = [], []  # cp.async issued, and committed
        self.shared = Buffer(0, np.full(kernel.static_bytes + shared_bytes, 0xFF, u8))
        self.copying = np.zeros(len(self.shared), i32)  # cp.asyncs that may still write a byte
        self.check_races, self.epoch = check_races, 1  # an epoch lies between two barriers
        self.between_warps = Tracker(len(self.shared), "shared-memory race between warps (no barrier)")
        self.asynchronous = Asynchronous(len(self.shared), self.W)

    def run(self, limit=10**8):
        """Threads at the lowest program counter go first, so that branches meet again."""
        code, labels = self.kernel.code, self.kernel.labels
        while self.alive.any():
            pc = self.pc[self.alive].min()
            m = self.alive & (self.pc == pc)
            if pc >= len(code):
                self.alive[m] = False
                continue
            op, args, pred, self.text = code[pc]
            self.pc[m] = pc + 1
            self.count += 1
            if pred:
                p = self.reg[pred[0]]
                m = m & (~p if pred[1] else p)
                if not m.any():
                    continue
            try:
                if self.count > limit:
                    raise PTXError(f"more than {limit} instructions")
                if op[0] == "bra":
                    self.pc[m] = labels[args[0]]
                elif op[0] in ("ret", "exit"):
                    self.alive[m] = False
                elif op[0] not in HANDLERS or REFUSED & set(op):
                    raise PTXError("unsupported PTX")
                else:
                    HANDLERS[op[0]](self, op, args, m)
            except PTXError as e:
                raise PTXError(f"{e}: `{self.text}` in block {self.index}") from None
            except Exception as e:
                raise PTXError(f"cannot emulate `{self.text}`: {e!r}") from e

    def warps(self, v):
        return v.reshape(self.W, 32)

    def full_warps(self, m):
        mw = self.warps(m)
        if (mw.any(1) & ~mw.all(1)).any():
            raise PTXError("a warp-wide instruction is reached by only part of a warp")
        return np.flatnonzero(mw.all(1))

    def read(self, o, ty):
        """Operand as a vector of the type's bits."""
        dtype = np.dtype(TYPES[ty])
        if o in self.reg:
            a = self.reg[o]
            if o in self.asynchronous.in_flight:
                raise PTXError(f"{o} is read while a wgmma may still have it")
            if a.dtype == dtype:
                return a
            if a.dtype.itemsize == dtype.itemsize:
                return a.view(dtype)
            return (a.view(a.dtype.str.replace("u", "i")) if dtype.kind == "i" else a).astype(dtype)
        if o in self.special:
            return self.special[o].astype(dtype)
        if (o, ty) not in self.constants:
            self.constants[o, ty] = np.full(self.T, self._constant(o, dtype))
        return self.constants[o, ty]

    def _constant(self, o, dtype):
        for variables in (self.kernel.shared, self.kernel.private):
            if o in variables:
                return dtype.type(variables[o])
        if o in self.kernel.tables:
            return dtype.type(self.kernel.tables[o].ctypes.data)
        value = int(o[2:], 16) if o[:2].lower() in ("0f", "0d") else int(o.rstrip("U"), 0)
        if dtype.kind == "b":
            return bool(value)
        return np.array(value & (1 << 8 * dtype.itemsize) - 1, f"u{dtype.itemsize}").view(dtype)[()]

    def write(self, o, v, m):
        if o == "_":
            return
        a = self.reg[o]
        if o in self.asynchronous.in_flight:
            raise PTXError(f"{o} is written while a wgmma may still have it")
        self.asynchronous.unordered.add(o)
        if v.dtype != a.dtype:
            v = v.view(a.dtype) if v.dtype.itemsize == a.dtype.itemsize and v.dtype != bool else v.astype(a.dtype)
        np.copyto(a, v, where=m)

    def numbers(self, o, ty):
        """Operand as numbers: bf16 widened to float32, packed pairs as [threads, 2]."""
        v = self.read(o, ty)
        if ty[:2] == "bf":
            v = bf16_to_f32(v.view(u16))
        elif ty[-2:] == "x2":
            v = v.view(f16 if ty == "f16x2" else f32)
        return v.reshape(-1, 2) if ty[-2:] == "x2" else v

    def write_numbers(self, o, v, ty, m):
        if ty[:2] == "bf":
            v = f32_to_bf16(v)
        self.write(o, np.ascontiguousarray(v).reshape(-1).view(TYPES[ty]), m)

    def address(self, o):
        base, offset = parse_address(o)
        a = self.reg[base].astype(u64) if base in self.reg else self.read(base, "u64")
        return a + u64(offset) if offset >= 0 else a - u64(-offset)


FAMILIES = {
    "binary": "add sub mul min max and or xor div rem",
    "mad": "mad",
    "fma": "fma",
    "shift": "shl shr",
    "funnel": "shf",
    "unary": "ex2 lg2 rcp rsqrt sqrt sin cos tanh not neg abs",
    "bits": "bfe bfi prmt lop3",
    "count_bits": "popc clz",
    "selp": "selp",
    "setp": "setp",
    "cvt": "cvt",
    "cvta": "cvta",
    "mov": "mov",
    "ld": "ld ldu",
    "st": "st",
    "cp": "cp",
    "atom": "atom red",
    "shfl": "shfl",
    "vote": "vote",
    "activemask": "activemask",
    "ldmatrix": "ldmatrix",
    "stmatrix": "stmatrix",
    "redux": "redux",
    "mma": "mma",
    "wgmma": "wgmma",
    "fence": "fence",
    "bar": "bar barrier",
    "call": "call",
    "return_": "return",
    "result": "result",
    "nothing": "membar griddepcontrol prefetch nanosleep discard applypriority",
}
HANDLERS = {opcode: getattr(Block, family) for family, opcodes in FAMILIES.items() for opcode in opcodes.split()}
