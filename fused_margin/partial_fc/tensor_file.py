"""One file for all tensors of all ranks, in the safetensors format: each rank writes and maps its own rows.

    8 bytes: n, little-endian | n bytes of JSON: {name: {"dtype", "shape", "data_offsets"}} | the tensors' bytes

Written by hand, as the safetensors package has a tensor whole in one process: 60 GB at 30 million classes.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .ranks import Ranks

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # as the safetensors package has it
_ALIGNMENT = 64


class Piece(NamedTuple):
    """A tensor [rows, ...], and the part of it that this rank has: rows `first` to `first + len(local)`."""

    local: Tensor
    rows: int
    first: int

    @property
    def shape(self) -> list[int]:
        return [self.rows, *self.local.shape[1:]]


class CheckpointError(RuntimeError):
    """A file or folder that is no checkpoint of this kind, or is damaged; nothing was loaded."""


def _header(pieces: dict[str, Piece | Tensor], metadata: dict[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The header, where in the file each tensor begins, and the file's length."""
    entries: dict[str, object] = {"__metadata__": metadata}
    place, begins = 0, {}
    for name in sorted(pieces, key=lambda n: (-_tensor(pieces[n]).element_size(), n)):
        tensor = _tensor(pieces[name])
        shape = pieces[name].shape if isinstance(pieces[name], Piece) else list(tensor.shape)
        end = place + math.prod(shape) * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(shape), "data_offsets": [place, end]}
        begins[name], place = place, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: start + b for n, b in begins.items()}, start + place


def _tensor(piece: Piece | Tensor) -> Tensor:
    return piece.local if isinstance(piece, Piece) else piece


def write(path: str | os.PathLike, ranks: Ranks, tensors: dict[str, Piece | Tensor], metadata: dict[str, str]) -> None:
    """Writes the file on all ranks together, on a file system that they share.

    The name appears when everything is there: a kill at any moment leaves what was there before.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    header, begins, length = _header(tensors, metadata)
    if ranks.rank == 0:
        with open(partial, "wb") as file:
            file.write(header)
            file.truncate(length)
    ranks.barrier()
    with open(partial, "r+b") as file:
        for name, piece in tensors.items():
            if isinstance(piece, Tensor) and ranks.rank:
                continue  # all ranks have it
            local = _tensor(piece).detach().contiguous().cpu()
            row = math.prod(local.shape[1:]) * local.element_size()
            file.seek(begins[name] + (piece.first * row if isinstance(piece, Piece) else 0))
            for part in local.reshape(-1).view(torch.uint8).split(1 << 28):
                file.write(part.numpy().data)
        file.flush()
        os.fsync(file.fileno())
    ranks.barrier()
    if ranks.rank == 0:
        os.replace(partial, path)
        sync_folder(path.parent)
    ranks.barrier()


def sync_folder(folder: Path) -> None:
    """Makes names that were changed in a folder last through a power cut, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def read(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, mapped and not read, and its metadata. Everything is checked first."""
    path = Path(path)
    try:
        length = path.stat().st_size
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if length < 8 or size > min(length - 8, _LONGEST_HEADER):
                raise CheckpointError(f"{path} is no safetensors file, or was cut off: {length} bytes, no whole header")
            text = file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        spans = {name: _span(entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is no safetensors file: its header does not parse ({error})") from None
    place = 0
    for name, (_, _, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != place:
            raise CheckpointError(f"{path}: tensor {name!r} begins at {begin}, expected {place}")
        place = end
    if 8 + size + place != length:
        raise CheckpointError(f"{path} has {length} bytes; its header says {8 + size + place}: it was cut off")
    data = torch.from_file(str(path), shared=False, size=length, dtype=torch.uint8) if length else torch.empty(0)
    return {name: _view(data, 8 + size, span) for name, span in spans.items()}, metadata


def _span(entry: dict) -> tuple[torch.dtype, list[int], int, int]:
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in [*shape, begin, end]):
        raise ValueError("a size or place is no number")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor's bytes do not fit its shape")
    return dtype, shape, begin, end


def _view(data: Tensor, start: int, span: tuple[torch.dtype, list[int], int, int]) -> Tensor:
    dtype, shape, begin, end = span
    part = data[start + begin : start + end]
    if (start + begin) % dtype.itemsize:
        part = part.clone()
    return part.view(dtype).view(shape)
