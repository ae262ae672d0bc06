"""What shapes, options and architecture decide about a sweep: tiles, sizes, the constants that kernels are built with.

No value of a tensor is read here and no shape depends on one, so that nothing waits for the device.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..rules import RULES
from ..spec import Spec, Want
from .configs import Cut, Device, Tile, device_for

_ROWS, _ROW_ELEMENTS = 16, 2048  # of a program that works on single rows, at most
_MOST_SPLITS = 1024
_WAVES, _FLASH_WAVES = (8, 10), (0, 7)  # of programs in the forward: at least, where the splits allow it, and at most
_GOOD = 0.98  # of the best use of a device: more splits than this needs are not made


def ceil_div(n: int, by: int) -> int:
    return -(-n // by)


def power_of_two(n: int, least: int = 1) -> int:
    """The next one that is not less than n."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def step(t: Tensor | None) -> int:
    """Elements from one value of a vector to the next."""
    return 0 if t is None or not t.dim() else t.stride(0)


class Inputs(NamedTuple):
    """The tensors of a sweep, as the operator has them."""

    x: Tensor
    w: Tensor
    labels: Tensor
    scale: Tensor | None = None
    tau: Tensor | None = None
    bias: Tensor | None = None
    index: Tensor | None = None
    rule_args: Tensor | None = None

    @property
    def index_pointer(self) -> Tensor:  # any tensor stands for one that is not there and not read
        return self.labels if self.index is None else self.index.contiguous()

    def or_any(self, t: Tensor | None) -> Tensor:
        return self.x if t is None else t

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.x.new_empty(shape, dtype=dtype)


class Plan(NamedTuple):
    device: Device
    cut: Cut
    batch: int
    dim: int
    classes: int
    operand: torch.dtype
    spec: Spec
    ranged: bool  # whether rows of w are brought into the range of fp16
    biased: bool

    @property
    def flash(self) -> bool:
        """Whether the forward finishes what the gradient of x needs; else the backward's chunks do."""
        wanted = self.spec.want & Want.DX and not self.spec.want & Want.SUM
        return bool(wanted) and self.width <= self.cut.flash_width

    @property
    def width(self) -> int:  # of a row, as a power of two
        return power_of_two(self.dim, 16)

    @property
    def operand_row(self) -> int:  # of a row of x_hat, in whole steps of depth
        return ceil_div(self.dim, self.cut.depth) * self.cut.depth

    @property
    def whole(self) -> bool:  # steps of depth only
        return self.dim % self.cut.depth == 0

    @property
    def row_width(self) -> int:  # of such a row, as a power of two
        return power_of_two(self.operand_row, 16)

    @property
    def rows(self) -> int:  # of x, in a program that works on single rows
        return max(1, min(_ROWS, _ROW_ELEMENTS // self.row_width))

    @property
    def group(self) -> int:  # slots of a class
        return power_of_two(self.spec.sub_centers)

    @property
    def half(self) -> bool:
        return self.operand == torch.float16

    @property
    def forward_tile(self) -> Tile:
        return self._narrow(self.cut.flash if self.flash else self.cut.sweep)

    @property
    def backward_tile(self) -> Tile:
        """As many rows of w and warps as in the forward, so that a norm is added up in the same order."""
        tile = self.cut.gradient
        flash = self.cut.flash
        return self._narrow(tile._replace(slots=flash.slots, warps=flash.warps) if self.flash else tile)

    def _narrow(self, tile: Tile) -> Tile:
        """Half as wide where registers would not suffice: a spilled number is stored and loaded in every tile.

        For further sums of each row, offsets, sub-centres, a row of w that fills no power of two in the flash form, and
        two of: rows brought into the range of fp16, columns that are masked, a rule.
        """
        spec = self.spec
        sums = bool(spec.want & (Want.SUM | Want.STATS | Want.DSCALE)) or spec.reduction == "softplus"
        ragged = self.flash and self.dim != self.width
        two = self.ranged + (not self.whole) + (spec.rule != "identity") >= 2
        narrow = sums or self.biased or self.group > 1 or ragged or two
        return tile._replace(slots=max(tile.slots // 2, self.group, 16)) if narrow else tile

    def padded(self, tile: Tile) -> int:
        return max(ceil_div(self.batch, tile.rows), 1) * tile.rows

    def tile_classes(self, tile: Tile) -> int:
        return tile.slots // self.group


def plan(given: Inputs, spec: Spec) -> Plan:
    device = device_for(given.x)
    operand = spec.compute_dtype
    w_rows = (given.w if given.index is None else given.index).shape[0]
    cut = device.half if operand.itemsize == 2 else device.full
    ranged = operand == torch.float16 and given.w.dtype != torch.float16
    if ranged and device.ranged_depth:
        cut = cut._replace(depth=device.ranged_depth)
    batch, dim = given.x.shape
    return Plan(device, cut, batch, int(dim), w_rows // spec.sub_centers, operand, spec, ranged, given.bias is not None)


def row_constants(p: Plan, given: Inputs) -> dict:
    """Of the kernels that work on single rows."""
    return {
        "INDEXED": given.index is not None,
        "NORMALIZE_X": p.spec.normalize_x,
        "NORMALIZE_W": p.spec.normalize_w,
        "ROWS": p.rows,
    }


def use_of_device(tiles: int, blocks: int, splits: int, programs: int) -> float:
    """The part of the time that multiprocessors work, if `programs` at a time run in waves as long as their longest."""
    return blocks * tiles / (programs * ceil_div(blocks * splits, programs) * ceil_div(tiles, splits))


@functools.lru_cache(maxsize=4096)
def splits_of(tiles: int, blocks: int, programs: int, flash: bool) -> int:
    """Of the class tiles, in each of which every block of rows has a program; a multiprocessor runs one at a time.

    A grid a little above `programs` would leave most of them idle for a whole second wave. So there are at least eight
    waves, where there are tiles enough, of which the last one costs little on parts of the architecture with fewer
    multiprocessors too; a split's sums are small. What a program takes to begin is not looked at. In the flash form
    each split writes [padded, D] numbers: as few waves as waste little.
    """
    tiles = max(tiles, 1)
    most = min(tiles, _MOST_SPLITS)
    least_waves, most_waves = _FLASH_WAVES if flash else _WAVES
    first = min(least_waves, most * blocks // programs) * programs // blocks
    last = min(most, most_waves * programs // blocks + 1)
    first = max(1, min(first, last))
    uses = {n: use_of_device(tiles, blocks, n, programs) for n in range(first, last + 1)}
    return next(n for n, use in uses.items() if use >= _GOOD * max(uses.values()))


def sweep_constants(p: Plan, tile: Tile, given: Inputs) -> dict:
    """Of both sweeping kernels."""
    return {
        "RULE": p.spec.rule,
        "ARGS": len(RULES[p.spec.rule].args),
        "SOFTPLUS": p.spec.reduction == "softplus",
        "UNIT_SLOPE": p.spec.unit_slope,
        "BIAS": given.bias is not None,
        "INDEXED": given.index is not None,
        "CENTERS": p.spec.sub_centers,
        "GROUP": p.group,
        "NORMALIZE": p.spec.normalize_w,
        "CLAMP": p.spec.normalize_x and p.spec.normalize_w,
        "ROWS": tile.rows,
        "SLOTS": tile.slots,
        "DEPTH": p.cut.depth,
        "WHOLE": p.whole,
        "RANGE": p.ranged,
        "PRECISION": p.device.precision,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def on(x: Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the device of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def run(kernel, programs: int, *args, **constants) -> None:
    """One launch; the grid is one axis, as the others end at 65,535.

    No contraction to fma: across a warp's shuffles each lane contracts its own product, and copies of one sum differ.
    """
    if programs:
        kernel[(programs,)](*args, enable_fp_fusion=False, **constants)


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out (+)= a b, summed and stored in float32; one launch. On a CPU there is no product with another out_dtype."""
    if a.dtype == torch.float32 or a.device.type == "cpu":
        a, b = a.float(), b.float()
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
