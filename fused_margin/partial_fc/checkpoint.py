"""Checkpoints by torch.distributed.checkpoint, which any number of ranks can read, whatever number wrote them.

    folder/latest          the name of the version that is whole
    folder/00000007/       .metadata, *.distcp (torch's), manifest.json (ours: sizes, checksums, the optimizer's groups)

A version is written beside the last one, and `latest` then replaced in one step: a kill at any moment leaves a whole
checkpoint. Reading checks every file first, and unpickles nothing but plain records of torch.distributed.checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from . import optimizer_state
from .head import PartialFC
from .layout import sharded
from .ranks import Ranks
from .tensor_file import CheckpointError, sync_folder

FORMAT = "fused_margin.partial_fc 1"
_OPTIONS = "it was saved with other options; build all as it was"
_LATEST, _MANIFEST, _METADATA = "latest", "manifest.json", ".metadata"


def save(
    folder: str | os.PathLike,
    head: PartialFC,
    optimizer: torch.optim.Optimizer | None = None,
    network: nn.Module | None = None,
    extra: dict[str, Tensor] | None = None,
    *,
    keep: int = 2,
) -> Path:
    """Saves a training: head, sampler, margin state, optimizer, and the network that all ranks have alike.

    All ranks must call it, with a folder on a file system that they share. extra: more tensors by name, the same on all
    ranks (a step's number, a schedule), numbers as `torch.tensor(3)`. keep: versions that stay, the new one among them.
    Returns: the folder of the version.
    """
    folder, ranks = Path(folder), head.ranks
    state = _module_state(head, network) | {f"extra.{name}": t for name, t in (extra or {}).items()}
    found, groups = ({}, None) if optimizer is None else optimizer_state.tensors(optimizer, head, network)
    _check_tensors(state | found, ranks)
    state |= _completed(found, head)
    version = folder / f"{ranks.objects(_next_version(folder))[0]:08d}"
    _on_first(ranks, lambda: _start(folder, version))
    with _over(ranks) as how:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(version), **how)
    manifest = {"format": FORMAT, "groups": groups, "files": _checksums(version, ranks)}
    manifest["optimizer"] = None if optimizer is None else optimizer_state.kind_of(optimizer)
    manifest["state"] = {name: _described(t) for name, t in state.items() if name.startswith(optimizer_state.PREFIX)}
    _on_first(ranks, lambda: _publish(folder, version, manifest, keep))
    return version


def load(
    folder: str | os.PathLike,
    head: PartialFC,
    optimizer: torch.optim.Optimizer | None = None,
    network: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Loads what `save` wrote, into a head of any number of ranks; returns the extra tensors.

    What was saved of an optimizer or a network stays unread where none is given. An optimizer of another class must go
    on from the same states, as RowSGD and SweepSGD do from torch.optim.SGD's.

    Raises `CheckpointError`, on all ranks and before anything is changed, where a file is missing, damaged or of
    another format, or where shapes or names differ.
    """
    ranks = head.ranks
    version, manifest, metadata = _agreed(ranks, lambda: _opened(Path(folder)))
    _agreed(ranks, lambda: _check_files(version, manifest["files"], ranks))
    state = _module_state(head, network)
    extra = _agreed(ranks, lambda: _empty(metadata, "extra."))
    found = {} if optimizer is None else _agreed(ranks, lambda: _empty_state(manifest["state"], head))

    def check() -> None:
        _check_shapes(state | extra | found, metadata, version)
        _check_names(state, metadata, version, ["head."] if network is None else ["head.", "network."])
        if optimizer is not None:
            if manifest["groups"] is None:
                raise CheckpointError(f"{version} has no optimizer's state; load it without one")
            shapes = {name: list(t.shape) for name, t in found.items()}
            kind = manifest.get("optimizer")
            optimizer_state.check(optimizer, head, network, shapes, manifest["groups"], head.num_classes, kind)

    _agreed(ranks, check)
    everything = state | extra | found
    with _over(ranks) as how:
        dcp.load(everything, storage_reader=_Reader(version), **how)
    head.seed, head.step = (int(value) for value in everything["head.sampler"])
    if optimizer is not None:
        local = {n: t.to_local() if isinstance(t, DTensor) else t for n, t in found.items()}
        optimizer_state.restore(optimizer, head, network, local, manifest["groups"])
    return {name.removeprefix("extra."): everything[name] for name in extra}


def _module_state(head: PartialFC, network: nn.Module | None) -> dict[str, Tensor]:
    state = {f"head.{name}": t for name, t in head.state_dict().items()}
    for name, t in network.state_dict().items() if network is not None else ():
        state[f"network.{name}"] = t
    return state


def _check_tensors(state: dict[str, object], ranks: Ranks) -> None:
    """Anything else would be pickled by torch, and refused by `load`; all ranks raise where one has such a value."""
    wrong = [f"{name} is {type(t).__name__}" for name, t in state.items() if not isinstance(t, Tensor)]
    everyone = ranks.objects(wrong)
    for rank, names in enumerate(everyone):
        if names:
            where = "" if ranks.world == 1 else f"rank {rank}: "
            raise TypeError(
                f"{where}{', '.join(names)}; a checkpoint holds tensors only: give numbers as torch.tensor(...)"
            )


def _completed(found: dict[str, Tensor], head: PartialFC) -> dict[str, Tensor]:
    """Split states as DTensors; a rank that has no class, and so no state, gets an empty one."""
    everyone = head.ranks.objects(
        {n: (str(t.dtype), list(t.shape[1:])) for n, t in found.items() if _split(n, t, head)}
    )
    state = dict(found)
    for name in dict.fromkeys(name for rank in everyone for name in rank):
        dtype, rest = next(rank[name] for rank in everyone if name in rank)
        if name not in state:
            dtype = getattr(torch, dtype.removeprefix("torch."))
            state[name] = torch.zeros(head.layout.count, *rest, dtype=dtype, device=head.weight.device)
        state[name] = sharded(state[name], head.layout, head.ranks)
    return state


def _split(full: str, t: Tensor, head: PartialFC) -> bool:
    name = full.removeprefix(optimizer_state.PREFIX).rpartition(".")[0]
    return optimizer_state.is_rows(head, name, t)


def _described(t: Tensor) -> dict[str, object]:
    return {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape), "split": isinstance(t, DTensor)}


def _empty_state(described: dict[str, dict], head: PartialFC) -> dict[str, Tensor]:
    """Tensors to load an optimizer's state into."""
    found = {}
    for name, entry in described.items():
        dtype, shape = getattr(torch, entry["dtype"]), entry["shape"]
        parameter = name.removeprefix(f"{optimizer_state.PREFIX}head.").rpartition(".")[0]
        if parameter in head.sharded_names and shape and shape[0] == head.num_classes:
            local = torch.zeros(head.layout.count, *shape[1:], dtype=dtype, device=head.weight.device)
            found[name] = sharded(local, head.layout, head.ranks)
        else:
            found[name] = torch.zeros(shape, dtype=dtype)
    return found


def _empty(metadata: Metadata, prefix: str) -> dict[str, Tensor]:
    entries = {n: m for n, m in metadata.state_dict_metadata.items() if n.startswith(prefix)}
    return {n: torch.zeros(m.size, dtype=m.properties.dtype) for n, m in entries.items()}


def _next_version(folder: Path) -> int:
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return 1 + max((int(name) for name in names if name.isdecimal()), default=0)


def _start(folder: Path, version: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    version.mkdir()


def _publish(folder: Path, version: Path, manifest: dict, keep: int) -> None:
    """Makes a version the latest, and removes older ones and what kills left behind."""
    (version / _MANIFEST).write_text(json.dumps(_signed(manifest)))
    for path in [version / _MANIFEST, version]:
        sync_folder(path)
    pointer = folder / (_LATEST + ".partial")
    pointer.write_text(version.name)
    sync_folder(pointer)
    os.replace(pointer, folder / _LATEST)
    sync_folder(folder)
    versions = sorted(p for p in folder.iterdir() if p.name.isdecimal() and p.name != version.name)
    whole = [p for p in versions if (p / _MANIFEST).exists()]
    for path in {*versions} - {*whole[len(whole) - max(keep - 1, 0) :]}:
        shutil.rmtree(path, ignore_errors=True)


def _signed(manifest: dict) -> dict:
    """As it is read again, with a checksum of its own beside those of the files."""
    manifest = json.loads(json.dumps(manifest))
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return content | {"checksum": zlib.crc32(json.dumps(content, sort_keys=True).encode())}


def _checksum(path: Path) -> list[int]:
    """Size and CRC-32."""
    crc = size = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def _checksums(version: Path, ranks: Ranks) -> dict[str, list[int]]:
    """Of all files but the manifest, each computed by one rank."""
    ranks.barrier()
    names = sorted(p.name for p in version.iterdir())
    mine = {name: _checksum(version / name) for name in names[ranks.rank :: ranks.world]}
    return {name: found for part in ranks.objects(mine) for name, found in part.items()}


def _opened(folder: Path) -> tuple[Path, dict, Metadata]:
    version = folder / (folder / _LATEST).read_text().strip()
    manifest = json.loads((version / _MANIFEST).read_text())
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{version} has format {manifest.get('format')!r}; expected {FORMAT!r}")
    if manifest != _signed(manifest):
        raise CheckpointError(f"{version / _MANIFEST} is damaged: its checksum differs from what was written")
    # Before the other files, as it is parsed first: damaged bytes may ask the unpickler for any amount of memory.
    _check_file(version / _METADATA, manifest["files"][_METADATA])
    return version, manifest, _Reader(version).read_metadata()


def _check_files(version: Path, files: dict[str, list[int]], ranks: Ranks) -> None:
    for name in sorted(files.keys() - {_METADATA})[ranks.rank :: ranks.world]:
        _check_file(version / name, files[name])


def _check_file(path: Path, written: list[int]) -> None:
    found = _checksum(path)
    if found[0] != written[0]:
        raise CheckpointError(f"{path} has {found[0]} bytes, and was written with {written[0]}")
    if found != written:
        raise CheckpointError(f"{path} is damaged: its checksum differs from what was written")


def _check_shapes(state: dict[str, Tensor], metadata: Metadata, version: Path) -> None:
    for name, t in state.items():
        entry = metadata.state_dict_metadata.get(name)
        if entry is None:
            raise CheckpointError(f"{version} has no {name}: {_OPTIONS}")
        if entry.size != t.shape:
            raise CheckpointError(f"{version}: {name} is {list(entry.size)} there, {list(t.shape)} here")


def _check_names(state: dict[str, Tensor], metadata: Metadata, version: Path, prefixes: list[str]) -> None:
    """Nothing that was saved of these modules may be left out: a bias that is dropped changes every logit."""
    more = [n for n in metadata.state_dict_metadata if n.startswith(tuple(prefixes)) and n not in state]
    if more:
        raise CheckpointError(
            f"{version} has {', '.join(sorted(more))}, and what it is loaded into has not: {_OPTIONS}"
        )


def _agreed(ranks: Ranks, work, otherwise: str = "no checkpoint of this kind, or a damaged one"):
    """What `work` gives; where it raises on any rank, all raise that rank's error.

    otherwise: how to name an error that is no CheckpointError. Any is caught: the others would wait for this rank.
    """
    result, problem, cause = None, None, None
    try:
        result = work()
    except CheckpointError as error:
        problem, cause = str(error), error
    except Exception as error:
        problem, cause = f"{otherwise} ({type(error).__name__}: {error})", error
    problems = ranks.objects(problem)
    for rank, text in enumerate(problems):
        if text is not None:
            raise CheckpointError(text if ranks.world == 1 else f"rank {rank}: {text}") from cause
    return result


@contextlib.contextmanager
def _over(ranks: Ranks) -> Iterator[dict[str, object]]:
    """What tells torch.distributed.checkpoint who takes part."""
    with warnings.catch_warnings():
        if ranks.group is None:
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is: nothing to warn of
        yield {"process_group": ranks.group, "no_dist": ranks.group is None}


def _on_first(ranks: Ranks, work) -> None:
    _agreed(ranks, work if ranks.rank == 0 else lambda: None, "the checkpoint could not be written")


_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}


class _Unpickler(pickle.Unpickler):
    """Builds the records of a checkpoint's metadata, and nothing else."""

    def find_class(self, module: str, name: str) -> object:
        plain = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if plain or name in _RECORDS.get(module, ()):
            return super().find_class(module, name)
        if module.partition(".")[0] == "pathlib":
            return lambda *parts: "/".join(map(str, parts))  # where it was written; not used
        raise CheckpointError(f"the metadata names {module}.{name}, which no checkpoint needs; nothing was loaded")


class _Reader(dcp.FileSystemReader):
    """Reads metadata without running code that it names. (Tensors are read with weights_only=True by torch.)"""

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        path = Path(self.path)
        with open(path / _METADATA, "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path / _METADATA} holds {type(metadata).__name__}, no metadata")
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):  # torch would unpickle it
                raise CheckpointError(f"{path}: {name} is no tensor, and only tensors are read")
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise CheckpointError(f"{path}: a file of it lies elsewhere, at {info.relative_path!r}")
        return metadata
