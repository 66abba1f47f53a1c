"""What code comes to, and what it reads: names in it, without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from torch_flowprune.channels.shrinking.own_code.code_source import code_of_class, read_source


def names_reached(classes: Iterable[type[nn.Module]]) -> set[str]:
    """The names of the functions that a forward may come to: those that it says, that these say, and so on."""
    said: dict[str, set[str]] = {}
    for function in (one for cls in classes for one in code_of_class(cls).values()):
        names = _names_said(function.function.__code__) | _names_said(function.outer.__code__)
        said.setdefault(function.function.__name__, set()).update(names)
    reached = {"forward"}
    waiting = list(reached)
    while waiting:
        more = said.get(waiting.pop(), set()) & said.keys() - reached
        reached |= more
        waiting += more
    return reached


@cache
def attributes_of_parts_read(cls: Any) -> tuple[tuple[str, ...], ...]:
    """What a class's code reads of its parts: ("update", "width") where it says ``self.update.width``."""
    found: dict[tuple[str, ...], None] = {}
    for function in code_of_class(cls).values():
        arguments = function.tree.args.args
        if function.owner is not None and arguments:
            chains = (_names_chained(node) for node in ast.walk(function.tree) if isinstance(node, ast.Attribute))
            found.update((names[1:], None) for names in chains if names[:1] == (arguments[0].arg,) and len(names) > 2)
    return tuple(found)


@cache
def attributes_compared(cls: Any) -> tuple[str, ...]:
    """The attributes that a class's code, torch's too, holds a size against: ``x.shape[1] != self.channels``."""
    found: dict[str, None] = {}
    for function in filter(None, (read_source(f, cls) for f in _methods_of(cls))):
        own = next((argument.arg for argument in function.tree.args.args), "")
        for node in ast.walk(function.tree):
            if isinstance(node, ast.Compare):
                names = [_names_chained(side) for side in (node.left, *node.comparators)]
                of_module = [name for name in names if name[:1] == (own,)]
                if len(of_module) == 1 and len(of_module[0]) == 2:
                    found[of_module[0][1]] = None
    return tuple(found)


def _methods_of(cls: Any) -> list[FunctionType]:
    """Those that a class itself and its bases define, short of ``nn.Module``, and but for the making of it."""
    owners = [owner for owner in cls.__mro__ if owner not in nn.Module.__mro__]
    named = [
        (name, value) for owner in owners for name, value in vars(owner).items() if isinstance(value, FunctionType)
    ]
    return [value for name, value in named if not name.startswith("__")]


def _names_chained(node: ast.expr) -> tuple[str, ...]:
    """The names in a chain of attributes; none in what is no such chain."""
    if isinstance(node, ast.Attribute):
        before = _names_chained(node.value)
        return (*before, node.attr) if before else ()
    return (node.id,) if isinstance(node, ast.Name) else ()


def _names_said(code: CodeType) -> set[str]:
    """Names and words in a function, and in what is defined inside it."""
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    words = {const for const in code.co_consts if isinstance(const, str)}
    return words.union(code.co_names, code.co_freevars, *map(_names_said, inner))
