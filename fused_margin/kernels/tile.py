"""What both directions of the sweep share: which rows of w a tile has, its cosines c = x_hat . w_row / |w_row|, and
which of them are rivals. Norms come from the slices that feed the product; both directions get the same bits.

Block names: i_ rows of x, j_ slots of the tile (class x sub-centre), d_ dimensions.
"""

import triton
import triton.language as tl

EPS = tl.constexpr(1e-12)  # norms are clamped from below, as in torch.nn.functional.normalize
# Vectors with a number for each row of x, often a row of a matrix [n, B], whose address is a multiple of 16 bytes for
# some B only: kernels that were compiled for that would be compiled again for a ragged last batch.
ROW_VECTORS = ("labels", "scale", "tau", "cos_y", "g_red", "g_sum", "g_cos_y", "red", "red_low", "factors")
HALF_UNIT = tl.constexpr(1024.0)  # fp16 tiles of A N' hold this multiple: A ~ 1 / C would be subnormal


@triton.jit
def tile_rows(
    tile, classes, index, SLOTS: tl.constexpr, CENTERS: tl.constexpr, GROUP: tl.constexpr, INDEXED: tl.constexpr
):
    """Class and row number (in w, and among the rows read) of each slot, and whether there is one.

    A class takes GROUP slots, the power of two that holds its CENTERS rows. Slots without a row repeat the last one.
    """
    slot = tl.arange(0, SLOTS)
    j_class = tile * (SLOTS // GROUP) + slot // GROUP
    center = slot % GROUP
    valid = (j_class < classes) & (center < CENTERS)
    j_row = tl.minimum(j_class, classes - 1) * CENTERS + tl.minimum(center, CENTERS - 1)
    j_source = j_row.to(tl.int64)
    if INDEXED:
        j_source = tl.load(index + j_source).to(tl.int64)
    return j_class, j_row, j_source, valid


@triton.jit
def inverse_norm(square):
    norm = tl.sqrt_rn(square)
    return tl.div_rn(tl.full(square.shape, 1.0, tl.float32), tl.where(norm < EPS, EPS, norm))


@triton.jit
def power_of_two(top):
    """The power of two below `top`, and at least 2^-100."""
    bits = tl.maximum(top, 7.888609052210118e-31).to(tl.int32, bitcast=True)
    return (bits & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def load_slice(w, j_source, d, D, w_row, w_col, WHOLE: tl.constexpr):
    """Columns d of the tile's rows of w, [d, j]."""
    at = w + j_source[None, :] * w_row + d.to(tl.int64)[:, None] * w_col
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=d[:, None] < D, other=0.0)


@triton.jit
def cosines(
    x,
    i,
    x_row,
    w,
    j_source,
    D,
    w_row,
    w_col,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RANGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x . w / |w| [i, j] and 1 / |w| [j]; x is in the operands' dtype and padded with zeros in both dimensions.

    RANGE: rows of w are brought into the range of fp16 by powers of two that follow their largest entry so far.
    """
    acc = tl.zeros((ROWS, SLOTS), tl.float32)
    square = tl.zeros((SLOTS,), tl.float32)
    top = tl.zeros((SLOTS,), tl.float32)
    unit = power_of_two(top)
    x_at = x + i.to(tl.int64)[:, None] * x_row
    for first in range(0, D, DEPTH):
        d = first + tl.arange(0, DEPTH)
        b_x = tl.load(x_at + d[None, :])
        b_w = load_slice(w, j_source, d, D, w_row, w_col, WHOLE)
        if NORMALIZE:
            wide = b_w.to(tl.float32)
            square += tl.sum(wide * wide, 0)
        if RANGE:
            top = tl.maximum(top, tl.max(tl.abs(b_w.to(tl.float32)), 0))
            larger = power_of_two(top)
            acc *= (unit / larger)[None, :]
            unit = larger
            b_w = b_w.to(tl.float32) * (1 / unit)[None, :]
        acc = tl.dot(b_x, b_w.to(x.dtype.element_ty), acc, input_precision=PRECISION)
    inverse = tl.full((SLOTS,), 1.0, tl.float32)
    if NORMALIZE:
        inverse = inverse_norm(square)
    if RANGE:
        return acc * (inverse * unit)[None, :], inverse
    return acc * inverse[None, :], inverse


@triton.jit
def clamp(c):
    """To [-1, 1]; a NaN stays one."""
    return tl.where(c < -1, -1.0, tl.where(c > 1, 1.0, c))


@triton.jit
def rivals(c, j_class, valid, target, ROWS: tl.constexpr, SLOTS: tl.constexpr, GROUP: tl.constexpr):
    """Which cosines count: of classes, not the row's target, and of its sub-centres the first that is the maximum, as a
    NaN is: it is seen, not passed over."""
    keep = valid[None, :] & (j_class[None, :] != target[:, None])
    if GROUP > 1:
        groups = tl.where(c == c, c, float("inf"))
        groups = tl.reshape(tl.where(valid[None, :], groups, float("-inf")), (ROWS, SLOTS // GROUP, GROUP))
        center = tl.arange(0, GROUP)[None, None, :]
        first = tl.min(tl.where(groups == tl.max(groups, 2)[:, :, None], center, GROUP), 2)
        keep = keep & tl.reshape(first[:, :, None] == center, (ROWS, SLOTS))
    return keep
