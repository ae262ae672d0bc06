"""An optimizer's state by the names of its parameters, so that another process, with other ranks, finds it again.

{"optimizer.head.weight.momentum_buffer": tensor, ...} and, in plain numbers, its parameter groups
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..optim.base import RowOptimizer
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
    kind: str | None,
) -> None:
    """Raises where `restore` could not put these states back, and changes nothing; before any weight is written.

    shapes: of the whole states, by name. rows: of the parameters with a row for each class, when they were saved.
    kind: the optimizer's class when it was saved, None: not known.
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
    saved_states: dict[str, dict[str, list[int]]] = {}
    for full, shape in shapes.items():
        name, _, key = full.removeprefix(PREFIX).rpartition(".")
        saved_states.setdefault(name, {})[key] = shape
    for number, (group, named) in enumerate(zip(optimizer.param_groups, members, strict=True)):
        options = group if groups is None else group | groups[number]["options"]
        for name, _ in named:
            _check_kind(optimizer, options, name, saved_states.get(name, {}), kind)
    for full, shape in shapes.items():
        name = full.removeprefix(PREFIX).rpartition(".")[0]
        if name not in by_name:
            raise CheckpointError(
                f"the state {full} is of no parameter of the optimizer, which has {', '.join(sorted(by_name))}; "
                "build it as it was, or load without it"
            )
        whole = list(by_name[name].shape)
        if name.startswith("head.") and name.removeprefix("head.") in head.class_names:
            whole[0] = rows
        # States of fewer dimensions (a step's number, one for all or for each row) are the optimizer's own business.
        if len(shape) == len(whole) and any(n not in (1, m) for n, m in zip(shape, whole, strict=True)):
            raise CheckpointError(f"the state {full} is {list(shape)}; its parameter is {whole}: of another head?")


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    return type(optimizer).__qualname__


def _check_kind(
    optimizer: torch.optim.Optimizer, options: dict, name: str, saved: dict[str, list[int]], kind: str | None
) -> None:
    """Raises where another class of optimizer wrote a parameter's states, and this one would not go on from them."""
    if not saved or kind == kind_of(optimizer):
        return
    made, ours = _state_names(optimizer, options), isinstance(optimizer, RowOptimizer)
    if made is None:
        fits = kind is None  # nothing is known of either
    elif ours:  # from torch's too, which counts steps in one number, or not at all
        fits = saved.keys() | {"step"} == made | {"step"}
    else:  # torch's optimizers cannot go on from a count for each row
        fits = saved.keys() == made and not saved.get("step")
    if not fits:
        had = [f"{key} of each row" if key == "step" and shape else key for key, shape in sorted(saved.items())]
        has = "states of other names or shapes" if made is None else ", ".join(sorted(made)) or "no state"
        raise CheckpointError(
            f"{name}'s optimizer was saved by {kind or 'an optimizer'} with {', '.join(had)}; "
            f"{kind_of(optimizer)} has {has}: build the optimizer that was saved, or load without it"
        )


def _state_names(optimizer: torch.optim.Optimizer, options: dict) -> set[str] | None:
    """Of the states that an optimizer makes for a parameter; None: not known before it has taken a step."""
    if isinstance(optimizer, RowOptimizer):
        return set(optimizer._names(options).values())
    if type(optimizer) is torch.optim.SGD:
        return {"momentum_buffer"} if options["momentum"] else set()
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        return {"exp_avg", "exp_avg_sq", "step"} | ({"max_exp_avg_sq"} if options["amsgrad"] else set())
    return None


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
