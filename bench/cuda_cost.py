"""Bytes and operations of a step of the CUDA C++ backend, without a GPU: a model, like bench/cost.py.

Its operators run on the host with every launch caught (tests/gpu_without_gpu/cuda_host): which kernels, how many
programs, which tiles and chunks is what the real code asks for. A test holds the figures to what the emulator counts.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

import torch

from .cost import GEMM, Cost

_TILE = 128  # rows of x and slots of w, csrc/cuda/problem.h
_STATES, _PARTS = 9, 2
_HALF, _FULL = 2, 4  # bytes


class Launch(NamedTuple):
    """A launch by its kernel's short name, its programs, and the last numbers of its argument."""

    name: str
    programs: int
    numbers: tuple[int, ...]


def launches(batch: int, classes: int, programs: int, l2_bytes: int, dim: int = 8) -> list[Launch]:
    """Of a step with bf16 operands and float32 weights; no dimension decides any of them, so a small one will do."""
    import fused_margin as fm
    from tests.gpu_without_gpu.cuda_host.backend import emulated
    from tests.gpu_without_gpu.cuda_host.planned import cache_for_chunk, plan

    found: list[Launch] = []

    def caught(name, text, grid, threads, argument, smem, buffers):
        short = re.search(r"3gpu\d+([a-z_]+?)_kernel", name)[1]
        found.append(Launch(short, grid[0], struct.unpack(f"{len(argument) // 8}q", argument)[-15:]))

    chunk = plan(batch, dim, classes, programs=programs, cache_bytes=cache_for_chunk(l2_bytes)).chunk
    x = torch.ones(batch, dim, dtype=torch.bfloat16, requires_grad=True)
    w = torch.ones(1, dim).expand(classes, dim).requires_grad_()
    with emulated(None, caught, programs=programs, chunk=chunk):
        labels = torch.zeros(batch, dtype=torch.int64)
        loss = fm.functional.margin_cross_entropy(x, w, labels, fm.ArcFace(), backend="cuda")
        torch.autograd.grad(loss, (x, w))
    return found


def of_cuda_step(batch: int, classes: int, dim: int, programs: int, l2_bytes: int) -> list[Cost]:
    """Each launch of a step, in order, and the library products between them."""
    costs = []
    for launch in launches(batch, classes, programs, l2_bytes):
        costs += _of_launch(launch, batch, classes, dim)
        if launch.name == "unit_weights":  # the product that follows in run_chunks of csrc/cuda/ops.cpp
            rows = launch.numbers[-2]
            size = batch * rows * _HALF + rows * dim * _HALF
            costs.append(Cost(GEMM, size, batch * dim * _FULL, 2.0 * batch * rows * dim, True))
    return costs


def _of_launch(launch: Launch, batch: int, classes: int, dim: int) -> list[Cost]:
    numbers, w_row = launch.numbers, dim * _FULL
    padded = -(-batch // _TILE) * _TILE
    depth = -(-dim // 32) * 32  # of a row of x_hat, in whole slices
    x_hat, rows_of_x = padded * depth * _HALF, batch * dim * _HALF
    if launch.name == "forward":
        tiles, splits = numbers[-3:-1]
        read = x_hat + classes * w_row + padded * 4 * 3  # targets and scales
        return [_sweep("forward", read, padded * _PARTS * splits * _STATES * 4, padded, tiles, depth, w_row)]
    if launch.name == "gradient":
        first_tile, tiles = numbers[-6:-4]
        rows = min(tiles * _TILE, classes - first_tile * _TILE)
        read = x_hat + rows * w_row + padded * 4 * 6  # targets, scales, power, rest and p
        gradient = _sweep("gradient", read, batch * rows * _HALF, padded, tiles, depth, w_row)
        read = batch * rows * _HALF + rows_of_x
        return [gradient, Cost(GEMM, read, rows * w_row, 2.0 * batch * rows * dim, True)]
    if launch.name == "finish_weights":
        rows = numbers[-15]  # six pointers, a vector, a pointer and a matrix follow
        return [Cost("finish_weights", 2 * rows * w_row, rows * w_row)]
    if launch.name == "unit_weights":
        rows = numbers[-2]
        return [Cost("unit_weights", rows * w_row, rows * dim * _HALF)]
    if launch.name == "add":
        return [Cost("add", 2 * batch * dim * _FULL, batch * dim * _FULL)]
    if launch.name == "merge":
        return [Cost("merge", padded * 4 * launch.numbers[-4] * _STATES, 8 * 4 * batch)]
    rows_of_w = batch * w_row
    moved = {
        "prologue": (rows_of_x + rows_of_w, x_hat),
        "backward_rows": (rows_of_x, x_hat),
        "finish_x": (3 * rows_of_x + rows_of_w, rows_of_x),
    }
    return [Cost(launch.name, *moved.get(launch.name, (8 * 4 * batch, 8 * 4 * batch)))]


def _sweep(name: str, read: float, written: float, padded: int, tiles: int, depth: int, w_row: int) -> Cost:
    loads = padded // _TILE * tiles * _TILE * (w_row + depth * _HALF)
    return Cost(name, read, written, 2.0 * padded * tiles * _TILE * depth, True, loads)
