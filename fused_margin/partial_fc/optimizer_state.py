"""An optimizer's state by the names of its parameters, so that another process, with other ranks, finds it again.

{"optimizer.head.weight.momentum_buffer": tensor, ...} and, in plain numbers, its parameter groups
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .head import PartialFC
from .layout import local_part, sharded
from .tensor_file import CheckpointError

PREFIX = "optimizer."


def parameter_names(head: PartialFC, network: nn.Module | None) -> dict[nn.Parameter, str]:
    """Of all parameters that are saved."""
    names = {p: f"head.{name}" for name, p in head.named_parameters()}
    return names | {p: f"network.{name}" for name, p in (network.named_parameters() if network is not None else ())}


def is_rows(head: PartialFC, name: str, value: Tensor) -> bool:
    """A state of a parameter whose rows are split: has these rows itself."""
    if not name.startswith("head.") or name.removeprefix("head.") not in head.sharded_names or not value.dim():
        return False
    return isinstance(value, DTensor) or value.shape[0] == head.layout.count


def _named(optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str]) -> list[list[tuple[str, nn.Parameter]]]:
    groups = [[(names.get(p, ""), p) for p in group["params"]] for group in optimizer.param_groups]
    unknown = sum(not name for group in groups for name, _ in group)
    if unknown:
        raise ValueError(
            f"{unknown} parameters of the optimizer are not of the head: save and load with network=, the module they "
            "are of; a file of the head alone takes an optimizer of the head alone"
        )
    return groups


def tensors(
    optimizer: torch.optim.Optimizer, head: PartialFC, network: nn.Module | None
) -> tuple[dict[str, Tensor], list[dict]]:
    """State by name (local rows of split tensors), and the groups as plain values with names.

    Numbers come as tensors; what is neither comes as it is, for the caller to refuse.
    """
    found: dict[str, Tensor] = {}
    groups = []
    for group, members in zip(optimizer.param_groups, _named(optimizer, parameter_names(head, network)), strict=True):
        options = {key: _plain(value) for key, value in group.items() if key != "params"}
        groups.append({"params": [name for name, _ in members], "options": options})
        for name, p in members:
            for key, value in optimizer.state.get(p, {}).items():
                t = torch.tensor(value) if isinstance(value, bool | int | float) else value
                split = isinstance(t, Tensor) and is_rows(head, name, t)
                found[f"{PREFIX}{name}.{key}"] = local_part(t, head.layout) if split else t
    return found, groups


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def check(
    optimizer: torch.optim.Optimizer,
    head: PartialFC,
    network: nn.Module | None,
    shapes: dict[str, list[int]],
    groups: list[dict] | None,
    rows: int,
) -> None:
    """Raises where `restore` could not put these states back, and changes nothing; before any weight is written.

    shapes: of the whole states, by name. rows: how many the parameters split by classes had when they were saved.
    """
    try:
        members = _named(optimizer, parameter_names(head, network))
    except ValueError as error:  # no fault of the file, which callers would name with a ValueError
        raise CheckpointError(str(error)) from None
    if groups is not None:
        saved, now = [g["params"] for g in groups], [[name for name, _ in group] for group in members]
        if saved != now:
            raise CheckpointError(f"the optimizer's groups were {saved}, and are {now}; build it as it was")
        if not all(isinstance(g["options"], dict) for g in groups):
            raise CheckpointError("the options of the optimizer's groups are no names with values; a damaged manifest")
    by_name = {name: p for group in members for name, p in group}
    for full, shape in shapes.items():
        name = full.removeprefix(PREFIX).rpartition(".")[0]
        if name not in by_name:
            raise CheckpointError(
                f"the state {full} is of no parameter of the optimizer, which has {', '.join(sorted(by_name))}; "
                "build it as it was, or load without it"
            )
        whole = list(by_name[name].shape)
        if name.removeprefix("head.") in head.sharded_names and name.startswith("head."):
            whole[0] = rows
        # States of fewer dimensions (a step's number, one for all or for each row) are the optimizer's own business.
        if len(shape) == len(whole) and any(n not in (1, m) for n, m in zip(shape, whole, strict=True)):
            raise CheckpointError(f"the state {full} is {list(shape)}; its parameter is {whole}: of another head?")


def restore(
    optimizer: torch.optim.Optimizer,
    head: PartialFC,
    network: nn.Module | None,
    found: dict[str, Tensor],
    groups: list[dict] | None,
) -> None:
    """Puts state tensors (local rows of split ones) and the groups' options back, after `check`."""
    members = _named(optimizer, parameter_names(head, network))
    by_name = {name: p for group in members for name, p in group}
    states: dict[nn.Parameter, dict[str, Tensor]] = {}
    for full, value in found.items():
        name, _, key = full.removeprefix(PREFIX).rpartition(".")
        p = by_name[name]
        if isinstance(p, DTensor) and is_rows(head, name, value):
            value = sharded(value, head.layout, head.ranks)
        states.setdefault(p, {})[key] = value
    numbers = {p: i for i, p in enumerate(p for group in members for _, p in group)}
    packed = optimizer.state_dict()
    packed["state"] = {numbers[p]: state for p, state in states.items()}
    for group, saved_group in zip(packed["param_groups"], groups or [], strict=False):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved_group["options"].items()})
    optimizer.load_state_dict(packed)
