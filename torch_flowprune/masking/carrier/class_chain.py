"""Classes made at run time between a module and its class, so that nobody who counts subclasses hears of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn
from torch.nn.utils import parametrize


def quiet_subclass(base: type[nn.Module], name: str, namespace: Mapping[str, Any], said: str = "") -> type[nn.Module]:
    """A subclass that no ``__init_subclass__`` and no metaclass is told of: registries keep the class they know.

    said: what a message that prints the class says of it, where a table of exact classes has none for it.
    """
    meta: Any = type(base)
    return _quiet_class(_saying(meta, said) if said else meta, name, (base,), namespace)


@cache
def _saying(meta: Any, said: str) -> Any:
    def shown(kind: Any) -> str:
        return f"{meta.__repr__(kind)} {said}"

    return type(meta.__name__, (meta,), {"__repr__": shown})


def _quiet_class(meta: Any, name: str, bases: tuple[type, ...], namespace: Mapping[str, Any]) -> type[nn.Module]:
    """Made as a subclass of what has no such hook, and given its bases afterwards."""
    made: type[nn.Module] = type.__new__(meta, name, (nn.Module,), dict(namespace))
    try:
        made.__bases__ = bases
    except TypeError:  # slots of their own, beside which there is no room for another layout
        made = type.__new__(meta, name, bases, dict(namespace))
    return made


def under_parametrizations(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that torch laid the class of a parametrized module over; any other class itself."""
    while kind.__module__ == parametrize.__name__ and kind is not parametrize.ParametrizationList:
        (kind,) = kind.__bases__
    return kind


def relaid(kind: type[nn.Module], old: type[nn.Module], new: type[nn.Module]) -> type[nn.Module]:
    """``kind``, a class laid over ``old`` by whomever, laid over ``new`` instead; itself where that is the same.

    Raises:
        ValueError: where its methods are bound to the class that it is.
    """
    if kind is old or old is new:
        return new if kind is old else kind
    if any("__class__" in _free_names(value) for value in vars(kind).values()):
        raise ValueError(
            f"{kind.__name__} was made a subclass of a masked module's class, by code that is bound to that class: "
            "change masks before that is done, or after it is undone"
        )
    bases = tuple(relaid(base, old, new) if issubclass(base, old) else base for base in kind.__bases__)
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return _quiet_class(type(kind), kind.__name__, bases, own)


def _free_names(value: object) -> tuple[str, ...]:
    code = getattr(getattr(value, "__func__", value), "__code__", None)
    return getattr(code, "co_freevars", ())
