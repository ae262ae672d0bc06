"""Number formats of PTX: the numpy type of each PTX type, bf16 and tf32 on raw bits, the rounding modes."""

import numpy as np

u8, u16, u32, u64, i32, i64 = np.uint8, np.uint16, np.uint32, np.uint64, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64
# fmt: off
TYPES = {
    "b8": u8, "u8": u8, "s8": np.int8, "b16": u16, "u16": u16, "s16": np.int16, "f16": f16, "bf16": u16,
    "b32": u32, "u32": u32, "s32": i32, "f32": f32, "tf32": f32, "b64": u64, "u64": u64, "s64": i64, "f64": f64,
    "pred": np.bool_, "bf16x2": u32, "f16x2": u32, "f32x2": u64,
}
# fmt: on
DIRECTED = {"rz", "rm", "rp"}  # rounding modes other than to nearest


class PTXError(RuntimeError):
    """A bug of the kernel (bounds, race, divergence), or PTX that this emulator does not know."""


def is_float(ty):
    return ty[0] == "f" or ty[:2] == "bf"


def bf16_to_f32(bits):
    return (bits.astype(u32) << u32(16)).view(f32)


def f32_to_bf16(values):
    u = np.ascontiguousarray(values, f32).view(u32)
    rounded = ((u + ((u >> u32(16)) & u32(1)) + u32(0x7FFF)) >> u32(16)).astype(u16)
    return np.where(np.isnan(values), u16(0x7FFF), rounded)


def truncate_tf32(values):
    """What a tensor core sees of an fp32 register."""
    return (np.ascontiguousarray(values, f32).view(u32) & u32(0xFFFFE000)).view(f32)


def round_float(x, ty, op):
    """float64 -> a float type, by the rounding mode and .sat among the modifiers `op`."""
    if (ty[:2] == "bf" or ty == "f64") and DIRECTED & set(op):
        raise PTXError(f"directed rounding to {ty} is not supported")
    dtype = {"f16": f16, "f16x2": f16, "f64": f64}.get(ty, f32)
    r = x.astype(dtype)
    if "rm" in op:
        r = np.where(r > x, np.nextafter(r, dtype(-np.inf)), r)
    if "rp" in op:
        r = np.where(r < x, np.nextafter(r, dtype(np.inf)), r)
    if "rz" in op:
        r = np.where(np.abs(r) > np.abs(x), np.nextafter(r, dtype(0)), r)
    return np.clip(np.nan_to_num(r), dtype(0), dtype(1)) if "sat" in op else r
