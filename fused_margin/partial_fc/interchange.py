"""Heads to and from other programs: one safetensors file, InsightFace's file for each rank, matrices [C, D] and [D, C].

Also how classes come and go: build the new head, and import into it with `classes`, which says for each of its classes
which one of the file it was.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import optimizer_state, tensor_file
from .checkpoint import _agreed, _completed
from .head import PartialFC
from .layout import local_part
from .tensor_file import CheckpointError, Piece


def export_safetensors(
    path: str | os.PathLike, head: PartialFC, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Writes the head of all ranks to one file: `weight` [C * K, D] and what else its state_dict has, as a
    `fm.MarginHead` of the same options loads it; with an optimizer its state, as "optimizer.weight.momentum_buffer".

    All ranks must call it, with a path on a file system that they share; each writes its own rows.
    """
    layout, tensors = head.layout, {}
    state = {f"head.{n}": t for n, t in head.state_dict().items()}
    if optimizer is not None:
        found, _ = optimizer_state.tensors(optimizer, head, None)
        state |= _completed(found, head)
    for name, t in state.items():
        split = isinstance(t, DTensor) or (head.ranks.world == 1 and t.dim() and t.shape[0] == layout.num_classes)
        local = local_part(t, layout) if split else t
        k = head.sub_centers if name == "head.weight" else 1
        tensors[_outside(name)] = (
            Piece(local.reshape(-1, head.embedding_size) if k > 1 else local, layout.num_classes * k, layout.first * k)
            if split
            else local
        )
    described = {"num_classes": head.num_classes, "sub_centers": head.sub_centers, "margin": repr(head.margin)}
    described["optimizer"] = None if optimizer is None else optimizer_state.kind_of(optimizer)
    tensor_file.write(path, head.ranks, tensors, {"format": "pt", "fused_margin": json.dumps(described)})


def _outside(name: str) -> str:
    """A name without "head."."""
    return name.removeprefix("head.") if name.startswith("head.") else name.replace("optimizer.head.", "optimizer.", 1)


def _inside(name: str) -> str:
    """The name in a training of an optimizer's state."""
    return name.replace(optimizer_state.PREFIX, f"{optimizer_state.PREFIX}head.", 1)


def import_safetensors(
    path: str | os.PathLike,
    head: PartialFC,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    classes: Tensor | None = None,
) -> None:
    """Reads a file of `export_safetensors`, or of a `fm.MarginHead`'s state_dict, into a head of any number of ranks.

    classes [C]: for each class of this head its number in the file, -1 for a new one, which keeps the weight it has and
    starts with an optimizer's state of 0. None: all as they are. Each rank reads its own rows only.

    Raises `CheckpointError`, on all ranks and before anything is changed, where the file does not fit.
    """
    found, metadata = _agreed(head.ranks, lambda: tensor_file.read(path))
    state = _agreed(head.ranks, lambda: _rows_of_file(head, found, metadata, optimizer, classes, Path(path)))
    own = {name: t for name, t in state.items() if not name.startswith(optimizer_state.PREFIX)}
    fresh = head.state_dict()
    for name, t in own.items():
        if t is not None:
            local = local_part(fresh[name], head.layout) if name in head.sharded_names else fresh[name]
            with torch.no_grad():
                _assign(local, *t)
    if "sampler" in found:
        head.seed, head.step = (int(v) for v in found["sampler"])
    if optimizer is not None:
        values = {}
        for name, (t, kept) in ((n, t) for n, t in state.items() if n.startswith(optimizer_state.PREFIX)):
            values[_inside(name)] = (
                torch.where(kept.view(-1, *[1] * (t.dim() - 1)), t, 0) if kept is not None else t.clone()
            )
        optimizer_state.restore(optimizer, head, None, values, None)


def _assign(local: Tensor, values: Tensor, kept: Tensor | None) -> None:
    """Copies rows; those that are not kept stay."""
    values = values.view(-1, *local.shape[1:]) if local.dim() else values.view(())
    if kept is None:
        local.copy_(values)
    else:
        local[kept.to(local.device)] = values[kept].to(local)


def _rows_of_file(
    head: PartialFC,
    found: dict[str, Tensor],
    metadata: dict[str, str],
    optimizer: torch.optim.Optimizer | None,
    classes: Tensor | None,
    path: Path,
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """For each name, this rank's rows in the file (or the whole tensor), and which rows of them to take."""
    if "weight" not in found:
        raise CheckpointError(f"{path} has no weight; it has {', '.join(sorted(found)[:8])}")
    weight, k = found["weight"], head.sub_centers
    if weight.dim() != 2 or weight.shape[1] != head.embedding_size or weight.shape[0] % k:
        raise CheckpointError(
            f"{path}: weight is {list(weight.shape)}; expected [C * {k}, {head.embedding_size}]: one row a (sub-)centre"
        )
    old = weight.shape[0] // k
    wanted = torch.arange(old) if classes is None else classes.to("cpu", torch.int64)
    if wanted.shape != (head.num_classes,):
        raise CheckpointError(
            f"{path} has {old} classes, the head {head.num_classes}: pass classes [{head.num_classes}]"
        )
    if bool((wanted >= old).any()) or bool((wanted < -1).any()):
        raise CheckpointError(f"classes must lie in [-1, {old}), the classes of {path}")
    state = {}
    names = [n for n in head.state_dict() if n != "sampler"]
    missing = [n for n in names if n not in found]
    if missing:
        raise CheckpointError(f"{path} has no {', '.join(missing)}: was it saved from a head with other options?")
    more = [n for n in found if n not in (*names, "sampler") and not n.startswith(optimizer_state.PREFIX)]
    if more:
        raise CheckpointError(
            f"{path} has {', '.join(sorted(more))}, and the head has not: build it with the options it was saved with, "
            "or take the weight alone with load_weight"
        )
    _check_shapes(head, found, old, path)
    if optimizer is not None:
        states = [n for n in found if n.startswith(optimizer_state.PREFIX)]
        shapes = {_inside(n): list(found[n].shape) for n in states}
        kind = json.loads(metadata.get("fused_margin", "{}")).get("optimizer")
        optimizer_state.check(optimizer, head, None, shapes, None, old, kind)
        names += states
    for name in names:
        t = found[name].view(old, -1) if name == "weight" else found[name]
        state_of, _, _ = name.removeprefix(optimizer_state.PREFIX).rpartition(".")
        owner = state_of if name.startswith(optimizer_state.PREFIX) else name
        by_class = owner in head.class_names and t.dim() and t.shape[0] == old
        part = head.layout.part if owner in head.sharded_names else lambda rows: rows
        if by_class and classes is not None:
            taken = part(wanted)
            state[name] = (t[taken.clamp_min(0)], taken >= 0)
        else:
            state[name] = (part(t).clone() if by_class else t, None)
    return state


def _check_shapes(head: PartialFC, found: dict[str, Tensor], old: int, path: Path) -> None:
    """Of all but the weight. old: the file's number of classes."""
    for name, t in head.state_dict().items():
        if name == "weight" or name not in found:
            continue
        expected = [old, *t.shape[1:]] if name in head.class_names else list(t.shape)
        given = list(found[name].shape)
        if given != expected and (expected or found[name].numel() != 1):  # a number may come as [1]
            raise CheckpointError(
                f"{path}: {name} is {given}; expected {expected}: build the head with the options it was saved with"
            )


def load_weight(head: PartialFC, weight: Tensor | Sequence[Tensor], *, transposed: bool = False) -> None:
    """Sets a head's weights from a matrix [C, D] (sub-centres: [C * K, D]), or from several that follow one another.

    transposed: they are [D, C], as in pytorch-metric-learning's `W` and TFace's, FaceX-Zoo's and AdaFace's `kernel`.
    """
    parts = [weight] if isinstance(weight, Tensor) else list(weight)
    parts = [part.t() if transposed else part for part in parts]
    rows, dim, k = sum(part.shape[0] for part in parts), head.embedding_size, head.sub_centers
    if any(part.dim() != 2 or part.shape[1] != dim for part in parts) or rows != head.num_classes * k:
        hint = (
            "; they seem to be [D, C]: transposed=True" if parts and parts[0].shape[0] == dim and not transposed else ""
        )
        raise ValueError(
            f"weights are {[list(p.shape) for p in parts]}; expected {head.num_classes * k} rows of {dim} in all{hint}"
        )
    local = local_part(head.weight.detach(), head.layout).view(-1, dim)
    first, place = head.layout.first * k, 0
    for part in parts:
        begin, end = max(first, place), min(first + len(local), place + len(part))
        if begin < end:
            local[begin - first : end - first] = part[begin - place : end - place].to(local)
        place += len(part)


def insightface_weights(folder: str | os.PathLike) -> list[Tensor]:
    """The class weights in the files checkpoint_gpu_0.pt and so on of InsightFace's arcface_torch, in order.

    Use: `fm.partial_fc.load_weight(head, insightface_weights(folder))`. Its W ranks have C // W classes each, the first
    C % W of them one more.

    Tensors are mapped, and no code in the files runs.
    """
    folder = Path(folder)
    files = {int(m[1]): p for p in folder.glob("checkpoint_gpu_*.pt") if (m := re.search(r"_(\d+)\.pt$", p.name))}
    if not files or sorted(files) != list(range(len(files))):
        raise CheckpointError(f"{folder}: expected checkpoint_gpu_0.pt and so on without a gap, found {sorted(files)}")
    found = []
    for rank in range(len(files)):
        try:
            content = torch.load(files[rank], map_location="cpu", weights_only=True, mmap=True)
            weight = content["state_dict_softmax_fc"]["weight"]
        except (KeyError, TypeError, RuntimeError, OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{files[rank]} holds no state_dict_softmax_fc with a weight, or is damaged ({type(error).__name__})"
            ) from None
        found.append(weight)
    sizes = [len(weight) for weight in found]
    if sizes != [sum(sizes) // len(sizes) + (r < sum(sizes) % len(sizes)) for r in range(len(sizes))]:
        raise CheckpointError(f"{folder}: the files have {sizes} classes, which is no split of InsightFace's")
    return found
