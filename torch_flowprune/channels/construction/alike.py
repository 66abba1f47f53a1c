"""Where in the modules of a class a tensor stands: the same place means that the class gave them the same size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torch import nn

from torch_flowprune.channels.construction.constructors import Shapes

Standing: TypeAlias = tuple[type[nn.Module], str]
_LISTS = (nn.ModuleList, nn.ModuleDict)


def sites_of(model: nn.Module) -> dict[str, Standing]:
    """Of every tensor the class of the module that holds its layer, and the path from there, without numbers.

    Containers hold no layer by themselves: of ``blocks.0.mlp.fc1.weight`` it is the MLP's class and ``fc1.weight``.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, Standing] = {}
    for path, module in modules.items():
        for name in (*module._parameters, *module._buffers):
            found[f"{path}.{name}" if path else name] = _site(modules, path, name)
    return found


def _site(modules: Mapping[str, nn.Module], path: str, leaf: str) -> Standing:
    way = [leaf]
    while path:
        path, _, last = path.rpartition(".")
        inside = _is_container(modules[path])
        way.append("*" if inside else last)
        if not inside:
            break
    return getattr(type(modules[path]), "code_base", type(modules[path])), ".".join(reversed(way))


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, _LISTS) or type(module) is nn.Sequential


def is_uniform(model: nn.Module, dense: Shapes, small: Shapes) -> bool:
    """Whether all tensors at one place that had one shape have one shape again."""
    made: dict[tuple[Standing, tuple[int, ...]], tuple[int, ...]] = {}
    sites = sites_of(model)
    return all(
        made.setdefault((sites[name], shape), small[name]) == small[name]
        for name, shape in dense.items()
        if name in sites and name in small
    )
