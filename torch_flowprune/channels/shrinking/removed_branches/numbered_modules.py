"""Modules that hold a number of their own, by which others find what they left: the layers of a cache, say."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

LayerNumbers = dict[str, dict[str, int]]
"""Module path -> attribute -> value."""


def closed_up(model: nn.Module, gone: Collection[str]) -> LayerNumbers:
    """LayerNumbers of modules of one kind such that those that stay have the first ones, once these are gone.

    Whoever asks the first of a kind (how many tokens a cache holds) then finds one. A kind is a class, and whatever
    else its modules hold.
    """
    kinds: dict[Any, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        kinds.setdefault(type(module), []).append((path, module))
    found: LayerNumbers = {}
    for modules in kinds.values():
        if len(modules) > 1 and any(_is_in(path, gone) for path, _ in modules):
            names = _numbering(modules)
            for alike in _of_one_kind(modules, names):
                for name in names:
                    _close_up(alike, name, gone, found)
    return found


def _close_up(modules: list[tuple[str, nn.Module]], name: str, gone: Collection[str], found: LayerNumbers) -> None:
    numbers = sorted(vars(module)[name] for _, module in modules)
    staying = sorted((vars(module)[name], path) for path, module in modules if not _is_in(path, gone))
    for new, (old, path) in zip(numbers, staying, strict=False):
        if new != old:
            found.setdefault(path, {})[name] = new


def _numbering(modules: list[tuple[str, nn.Module]]) -> list[str]:
    """The attributes in which each module of a class has a whole number of its own."""
    values = {
        name: [vars(one).get(name) for _, one in modules] for name, v in vars(modules[0][1]).items() if _is_whole(v)
    }
    return [name for name, held in values.items() if all(map(_is_whole, held)) and len(set(held)) == len(held)]


def _of_one_kind(modules: list[tuple[str, nn.Module]], names: Collection[str]) -> list[list[tuple[str, nn.Module]]]:
    groups: dict[Any, list[tuple[str, nn.Module]]] = {}
    for path, module in modules:
        plain = {n: v for n, v in vars(module).items() if isinstance(v, (bool, int, float, str)) and n not in names}
        groups.setdefault(tuple(sorted((n, repr(v)) for n, v in plain.items())), []).append((path, module))
    return list(groups.values())


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_in(path: str, gone: Collection[str]) -> bool:
    return any(path == one or path.startswith(f"{one}.") for one in gone)
