"""The modules beside a model that a user's function runs: a teacher, the critic of a GAN, the network of a loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

_DEEPEST, _LONGEST = 5, 64  # what a function reads is near it; long lists are data


def modules_beside(model: nn.Module, functions: Iterable[object]) -> list[nn.Module]:
    """Every module that these functions can reach and that is no part of the model.

    >>> model, teacher = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
    >>> modules_beside(model, [lambda model, batch: model(batch) - teacher(batch)])
    [Sequential(
      (0): Linear(in_features=2, out_features=2, bias=True)
    ), Linear(in_features=2, out_features=2, bias=True)]
    """
    own = {id(module) for module in model.modules()}
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    for function in functions:
        for top in _reached(function, seen, 0):
            found |= {id(module): module for module in top.modules() if id(module) not in own}
    return list(found.values())


def _reached(value: Any, seen: set[int], depth: int) -> Iterator[nn.Module]:
    if id(value) in seen or depth > _DEEPEST:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield value
    for held in _held_by(value):
        yield from _reached(held, seen, depth + 1)


def _held_by(value: Any) -> Iterable[Any]:
    if isinstance(value, FunctionType):
        return _held_by_function(value)
    if isinstance(value, MethodType):
        return value.__self__, value.__func__
    if isinstance(value, partial):
        return value.func, *value.args, *value.keywords.values()
    if isinstance(value, (type, ModuleType, nn.Module, str)):
        return ()
    if isinstance(value, (list, tuple, set, Mapping)):
        return () if len(value) > _LONGEST else value.values() if isinstance(value, Mapping) else value
    called = type(value).__call__ if isinstance(getattr(type(value), "__call__", None), FunctionType) else None  # noqa: B004
    return (*getattr(value, "__dict__", {}).values(), called)


def _held_by_function(function: FunctionType) -> list[Any]:
    """What its closure holds, its defaults, and the globals that it names; not those of a library's own functions."""
    cells = [one for cell in function.__closure__ or () for one in _contents(cell)]
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    named = [function.__globals__[name] for name in _names_in(function.__code__) if name in function.__globals__]
    library = function.__module__ is not None and function.__module__.partition(".")[0] == "torch"
    return [*cells, *defaults, *([] if library else named)]


def _contents(cell: CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # nothing was put in it yet
        return []


def _names_in(code: CodeType) -> set[str]:
    inner = [_names_in(one) for one in code.co_consts if isinstance(one, CodeType)]
    return {*code.co_names}.union(*inner)
