"""What code comes to, and what it reads: names in it, without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
from types import CodeType
from typing import Any

from torch import nn

from torch_flowprune.channels.shrinking.own_code.code_source import code_of_class


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
