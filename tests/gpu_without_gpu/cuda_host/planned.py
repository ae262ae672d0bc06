"""The plan of csrc/cuda/problem.h: how a sweep is cut."""

import ctypes
from typing import NamedTuple

from .builder import load

OPERANDS = {"fp32": 0, "bf16": 1}  # as csrc/cuda/problem.h numbers them


class Plan(NamedTuple):
    padded: int
    operand_row: int
    blocks: int
    tile_classes: int
    tiles: int
    splits: int
    chunk: int


def cache_for_chunk(l2_bytes) -> int:
    """Of an L2 cache, what a chunk of G may take."""
    function = load("plan.cpp").cache_of
    function.restype = ctypes.c_int64
    return function(ctypes.c_int64(l2_bytes))


def splits_of(tiles, blocks, programs) -> int:
    function = load("plan.cpp").splits
    function.restype = ctypes.c_int64
    return function(*(ctypes.c_int64(n) for n in (tiles, blocks, programs)))


def plan(batch, dim, classes, centers=1, operands="bf16", programs=132, cache_bytes=16 << 20) -> Plan:
    found = (ctypes.c_int64 * 7)()
    given = (ctypes.c_int64(n) for n in (batch, dim, classes))
    function = load("plan.cpp").plan_of
    function.restype = None
    function(*given, centers, OPERANDS[operands], ctypes.c_int64(programs), ctypes.c_int64(cache_bytes), found)
    return Plan(*found)
