"""A parameter put back at the place that its module's constructor gave it, where torch's functions moved it."""

from __future__ import annotations

import dis
from collections.abc import Iterator

from torch import nn

from torch_flowprune.inputs import plain_name
from torch_flowprune.torch_internals import names_of_flat_weights


def place_as_constructed(module: nn.Module, name: str) -> None:
    """Before the first of the parameters that are made after it; where no order can be told, where it is."""
    order = _order(module)
    if name not in order:
        return
    entries = module._parameters
    others = [key for key in entries if key != name]
    later = (key for key in others if order.get(plain_name(key, module._buffers), -1) > order[name])
    before = next(later, None)
    place = len(others) if before is None else others.index(before)
    items = [(key, entries[key]) for key in (*others[:place], name, *others[place:])]
    entries.clear()
    entries.update(items)


def _order(module: nn.Module) -> dict[str, int]:
    """Names and their ranks. Recurrent layers put theirs together from parts, and keep a list of them."""
    names = names_of_flat_weights(module) if isinstance(module, nn.RNNBase) else _assigned(type(module))
    return {name: rank for rank, name in enumerate(names)}


def _assigned(kind: type[nn.Module]) -> tuple[str, ...]:
    """What the constructors of a class and its bases assign or register, in the order of their code, bases first."""
    codes = [vars(base)["__init__"].__code__ for base in reversed(kind.__mro__) if _has_code(base)]
    return tuple(dict.fromkeys(name for code in codes for name in _assigned_in(code)))


def _has_code(kind: type) -> bool:
    return hasattr(vars(kind).get("__init__"), "__code__")


def _assigned_in(code: object) -> Iterator[str]:
    for step in dis.get_instructions(code):  # type: ignore[arg-type]
        named = step.opname == "LOAD_CONST" and isinstance(step.argval, str) and step.argval.isidentifier()
        if step.opname == "STORE_ATTR" or named:
            yield step.argval
