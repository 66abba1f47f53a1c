"""What an optimizer keeps of a parameter, cut as the parameter is; where it is not told what goes, an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from torch_flowprune.channels.shrinking.surgery import ShrinkError, Surgery
from torch_flowprune.inputs import tensors_kept
from torch_flowprune.torch_internals import tree_map_only

_OWN = ("state", "param_groups", "params", "param_names")
"""What is handed on by itself."""

_Way: TypeAlias = "tuple[Tensor | None, ...]"
"""For each axis of a tensor of the state, which positions stay; None: all."""


def cut_state(
    optimizer: Optimizer, parameter: nn.Parameter, names: Mapping[nn.Parameter, str], surgery: Surgery
) -> dict[str, Any]:
    """The state of one parameter after the cut.

    Tensors of the parameter's shape (momentum) are cut like it; those that lack some of its axes, or have one position
    there (factored second moments), along the others; numbers stay. ``LBFGS`` keeps its history of all parameters with
    the first, laid end to end.

    Raises:
        ShrinkError: for a tensor that is none of these.
    """
    state = optimizer.state[parameter]
    if isinstance(optimizer, LBFGS):
        return _flat_state(optimizer, state, names, surgery)
    if (name := names[parameter]) not in surgery.keep:
        return dict(state)
    smaller = {key: _cut_state(value, parameter, name, surgery) for key, value in state.items()}
    if unclear := [key for key, value in smaller.items() if value is NotImplemented]:
        raise ShrinkError(
            f"{type(optimizer).__name__} keeps {', '.join(map(repr, unclear))} of {name!r}, and it is unknown which "
            "part belongs to its channels: leave optimizer= out, and make a new one for the smaller model"
        )
    return smaller


def check_nothing_beside(optimizer: Optimizer, names: Mapping[nn.Parameter, str], surgery: Surgery) -> None:
    """An error where an optimizer keeps parameters, or tensors like those that are cut, outside its state.

    Raises:
        ShrinkError: naming what keeps them.
    """
    lists = [group["params"] for group in optimizer.param_groups]
    held = {**vars(optimizer), **{key: value for group in optimizer.param_groups for key, value in group.items()}}
    cut = {parameter.shape for parameter, name in names.items() if name in surgery.keep}

    def is_theirs(one: Tensor) -> bool:
        return (isinstance(one, nn.Parameter) and one in names) or (one.numel() > 1 and one.shape in cut)

    if unclear := [
        key
        for key, value in held.items()
        if key not in _OWN and not any(value is one for one in lists) and any(map(is_theirs, _kept_in(value)))
    ]:
        raise ShrinkError(
            f"{type(optimizer).__name__} keeps parameters of this model, or tensors like them, in "
            f"{', '.join(map(repr, unclear))} beside its state, which is all that shrink hands on: leave optimizer= "
            "out, and make a new one for the smaller model"
        )


def _kept_in(value: Any) -> Iterator[Tensor]:
    """Tensors in a value, and those that a mapping is by."""
    if not isinstance(value, Optimizer):
        yield from tensors_kept([list(value), value] if isinstance(value, Mapping) else value)


def _cut_state(value: Any, parameter: nn.Parameter, name: str, surgery: Surgery) -> Any:
    """A value of the state after the cut; NotImplemented where it is not clear what goes."""
    if not isinstance(value, Tensor):
        return NotImplemented if any(one.numel() > 1 for one in tensors_kept(value)) else value
    if value.shape == parameter.shape:
        return surgery.cut(name, value)
    if value.numel() <= 1:
        return value
    ways = {tuple(map(id, way)): way for way in _ways(value, parameter, surgery.keep[name])}
    return _cut_along(value, *ways.values()) if len(ways) == 1 else NotImplemented


def _ways(value: Tensor, parameter: nn.Parameter, keep: Mapping[int, Tensor]) -> Iterator[_Way]:
    """How the axes of a smaller tensor may be those of the parameter."""
    if value.ndim == parameter.ndim:
        sizes = list(zip(value.shape, parameter.shape, strict=True))
        if all(own in (1, whole) for own, whole in sizes):
            yield tuple(keep.get(axis) if own == whole else None for axis, (own, whole) in enumerate(sizes))
        return
    for axes in combinations(range(parameter.ndim), value.ndim):
        if tuple(parameter.shape[axis] for axis in axes) == value.shape:
            yield tuple(keep.get(axis) for axis in axes)


def _cut_along(value: Tensor, way: _Way) -> Tensor:
    for axis, kept in enumerate(way):
        if kept is not None:
            value = value.index_select(axis, kept.nonzero().flatten().to(value.device))
    return value


def _flat_state(
    optimizer: Optimizer, state: Mapping[str, Any], names: Mapping[nn.Parameter, str], surgery: Surgery
) -> dict[str, Any]:
    """``LBFGS``: gradients and steps of all parameters as vectors."""
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    sizes = [one.numel() for one in parameters]

    def cut(vector: Tensor) -> Tensor:
        if vector.shape != (sum(sizes),):
            return vector
        parts = zip(vector.split(sizes), parameters, strict=True)
        small = [surgery.cut(names[one], part.view(one.shape)) if one in names else part for part, one in parts]
        return torch.cat([part.reshape(-1) for part in small])

    return {key: tree_map_only(Tensor, cut, value) for key, value in state.items()}
