"""The code of a class as trees, with the places in it where numbers are told to operators."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import CellType, FunctionType
from typing import Any

from torch import nn

from torch_flowprune.channels.shrinking.graphs import RESIZERS
from torch_flowprune.channels.shrinking.own_code.dense_spans import OVER

Slot = tuple[Any, ...]
"""Which part of a place: an argument by position or name, an element that is written out, a side of an operation."""

_code_read: dict[type[nn.Module], dict[str, SourceFunction]] = {}
_OF_TORCH = ("torch.", "torch_flowprune.")


@dataclass(frozen=True)
class SourceFunction:
    """One function of a class's code.

    Attributes:
        function: as it is, without what decorators put around it.
        outer: with that; the function itself where there is nothing.
        owner: the class that it stands in, none for a function that another calls by name.
        tree: of its source.
        places: the calls and operations of interest, by their number in the tree.
        digest: of the source.
    """

    function: FunctionType
    outer: FunctionType
    owner: type | None
    tree: ast.FunctionDef
    places: Mapping[int, ast.AST]
    digest: str

    @property
    def name(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"

    def line(self, place: int) -> str:
        """Where a place stands, in words."""
        node = self.places[place]
        first = self.function.__code__.co_firstlineno
        file = self.function.__code__.co_filename.rpartition("/")[2]
        return f"line {first + getattr(node, 'lineno', 1) - 1} of {file}"


def code_of_class(cls: type[nn.Module]) -> dict[str, SourceFunction]:
    """The functions of a class that is not torch's, and what they call by name, by name; those that have a source."""
    if cls in _code_read:
        return _code_read[cls]
    found: dict[str, SourceFunction] = {}
    seen: set[str] = set()
    for owner in cls.__mro__:
        if f"{owner.__module__}.".startswith(_OF_TORCH):
            continue
        for name, value in vars(owner).items():
            if isinstance(value, FunctionType) and name not in seen and not name.startswith("__"):
                _add(found, value, owner)
            seen.add(name)
    for function in list(found.values()):
        _add_called(found, function.function)
    return _code_read.setdefault(cls, found)


def _add_called(found: dict[str, SourceFunction], function: FunctionType) -> None:
    for name in function.__code__.co_names:
        called = function.__globals__.get(name)
        if not isinstance(called, FunctionType) or f"{called.__module__}.".startswith(_OF_TORCH):
            continue
        known = f"{called.__module__}.{called.__qualname__}" in found or called.__name__ != name
        if not known and _add(found, called, None):
            _add_called(found, called)


def _add(found: dict[str, SourceFunction], function: FunctionType, owner: type | None) -> bool:
    """Whether the source can be had, and means the same where it is compiled again."""
    one = read_source(function, owner)
    if one is not None:
        found[one.name] = one
    return one is not None


@cache
def read_source(function: FunctionType, owner: type | None) -> SourceFunction | None:
    """A function as a tree; None where its source cannot be had, or would mean something else in another place."""
    inner = inspect.unwrap(function)
    if not isinstance(inner, FunctionType) or not _can_be_taken_out(function, inner):
        return None
    try:
        text = textwrap.dedent(inspect.getsource(inner))
        (tree,) = ast.parse(text).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if not isinstance(tree, ast.FunctionDef) or _is_private_to(tree):
        return None
    tree.decorator_list, tree.returns = [], None
    places = {n: node for n, node in enumerate(ast.walk(tree)) if _is_place(node)}
    return SourceFunction(inner, function, owner, tree, places, hashlib.sha256(text.encode()).hexdigest()[:16])


def _can_be_taken_out(outer: FunctionType, inner: FunctionType) -> bool:
    """Whether each wrapper on the way holds the next one in its closure."""
    if outer is inner:
        return True
    held = [cell for cell in outer.__closure__ or () if _held_in(cell, inner) is not None]
    return len(held) == 1 and _can_be_taken_out(held[0].cell_contents, inner)


def _held_in(cell: CellType, inner: FunctionType) -> FunctionType | None:
    """The function in a closure's cell, if it is this one with or without wrappers."""
    try:
        value = cell.cell_contents
    except ValueError:  # empty
        return None
    return value if isinstance(value, FunctionType) and inspect.unwrap(value) is inner else None


def _in_wrappers(outer: FunctionType, inner: FunctionType, new: FunctionType) -> FunctionType:
    """A copy of the wrappers, with another function inside."""
    if outer is inner:
        return new
    held = [(cell, _held_in(cell, inner)) for cell in outer.__closure__ or ()]
    cells = [cell if value is None else CellType(_in_wrappers(value, inner, new)) for cell, value in held]
    made = FunctionType(outer.__code__, outer.__globals__, outer.__name__, outer.__defaults__, tuple(cells))
    made.__kwdefaults__ = outer.__kwdefaults__
    return functools.wraps(new)(made)  # type: ignore[return-value]


def _is_private_to(tree: ast.FunctionDef) -> bool:
    """Whether names in it are spelled otherwise inside a class."""
    names = [
        n.attr if isinstance(n, ast.Attribute) else n.id
        for n in ast.walk(tree)
        if isinstance(n, (ast.Attribute, ast.Name))
    ]
    return any(name.startswith("__") and not name.endswith("__") for name in names)


def _is_place(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        name = name_called(node)
        known = name in RESIZERS or name in OVER or name in MAKE_VALUES
        return known and not any(keyword.arg is None for keyword in node.keywords)
    if isinstance(node, ast.Subscript):
        parts = index_parts(node)
        bounds = [bound for part in parts if isinstance(part, ast.Slice) for bound in (part.lower, part.upper)]
        starred = any(isinstance(part, ast.Starred) for part in parts)
        return any(bounds) and not starred and isinstance(node.ctx, ast.Load)
    return isinstance(node, ast.BinOp)


def index_parts(node: ast.Subscript) -> list[ast.expr]:
    """What stands between the brackets, one for each comma."""
    return node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]


def name_called(node: ast.Call) -> str:
    """The name of a function or method; of a forward only where it is a parent's."""
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return "" if name == "forward" and not _is_of_parent(function) else name


def _is_of_parent(function: ast.expr) -> bool:
    return isinstance(function, ast.Attribute) and ast.unparse(function.value).startswith("super(")


# -- what a call is told, part by part ------------------------------------------


MAKE_VALUES = ("tensor", "as_tensor", "scalar_tensor")
"""What makes tensors of numbers: these are values, and stay what they are in the dense model."""

UNPACKED = "*"
"""In slots: all that an argument with a star is."""

BOUNDS = ("lower", "upper", "step")
"""Of a slice, as trees name them."""


def slots_told(
    call: ast.Call | ast.Subscript, groups: Sequence[Any], keywords: Mapping[str, Any]
) -> list[tuple[Slot, Any]]:
    """What each part of a call is told. groups: one for each positional argument, of one value, or of an unpacked many.

    Of an index, one for each part: the bounds of slices. An empty slot is a part that nothing can be put in place of.
    """
    if isinstance(call, ast.Subscript):
        slices = ((at, group) for at, group in enumerate(groups) if len(group) == len(BOUNDS))
        return [((at, side), group[side]) for at, group in slices for side in (0, 1)]
    told = [(at, argument, groups[at]) for at, argument in enumerate(call.args)]
    told += [(str(k.arg), k.value, (keywords[str(k.arg)],)) for k in call.keywords]  # type: ignore[misc]
    parts: list[tuple[Slot, Any]] = []
    for at, argument, group in told:
        if isinstance(argument, ast.Starred):
            numbers = bool(group) and all(type(value) is int for value in group)
            parts.append(((at, UNPACKED) if numbers else (), tuple(group)))
        elif _is_written_out(argument):
            parts += [((at, i), value) for i, value in enumerate(group[0])]
        else:
            parts.append(((at,), group[0]))
    return parts


def _is_written_out(argument: ast.expr) -> bool:
    """Whether the elements of a sequence stand in the code one by one."""
    elements = argument.elts if isinstance(argument, (ast.Tuple, ast.List)) else [ast.Starred(argument)]
    return not any(isinstance(element, ast.Starred) for element in elements)


def compiled(
    function: SourceFunction, tree: ast.FunctionDef, names: Mapping[str, Any], owner: type | None = None
) -> FunctionType:
    """The function of a tree, in the place of the one that it came of. names: that it sees besides, before all else."""
    closure = inspect.getclosurevars(function.function).nonlocals
    known = {**closure, "__class__": owner or function.owner, **names}
    factory = ast.parse(f"def made({', '.join(known)}):\n    return 0")
    definition = factory.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.body = [_without_annotations(tree), ast.Return(ast.Name(tree.name, ast.Load()))]
    ast.fix_missing_locations(factory)
    ast.increment_lineno(factory, function.function.__code__.co_firstlineno - 1)
    space: dict[str, Any] = {}
    exec(compile(factory, function.function.__code__.co_filename, "exec"), function.function.__globals__, space)  # noqa: S102 - the user's own source
    new: FunctionType = space["made"](**known)
    new.__defaults__, new.__kwdefaults__ = function.function.__defaults__, function.function.__kwdefaults__
    new.__qualname__, new.__doc__ = function.function.__qualname__, function.function.__doc__
    return _in_wrappers(function.outer, function.function, new)


def _without_annotations(tree: ast.FunctionDef) -> ast.FunctionDef:
    """And with defaults that are not computed again: those of the function are put in their place."""
    arguments = tree.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(None) for default in arguments.kw_defaults]
    return tree


def _callers_of(functions: Mapping[str, SourceFunction], changed: Sequence[str]) -> list[str]:
    """These functions, and those that call one of them by name, and so on."""
    names = list(dict.fromkeys(changed))
    for name in names:
        for other, function in functions.items():
            called = functions[name]
            if called.owner is None and called.function.__name__ in function.function.__code__.co_names:
                names += [other] if other not in names else []
    return names


def rebuilt_functions(
    functions: Mapping[str, SourceFunction],
    changed: Sequence[str],
    tree_of: Callable[[SourceFunction], ast.FunctionDef],
    names: Mapping[str, Any],
) -> Iterator[tuple[SourceFunction, FunctionType]]:
    """The methods among the changed functions and their callers, compiled anew, with the changed ones in reach."""
    anew = _callers_of(functions, changed)
    helpers: dict[str, FunctionType] = {}
    waiting = [functions[name] for name in anew if functions[name].owner is None]
    while waiting:
        ready = [f for f in waiting if not any(_calls_by_name(f, g) for g in waiting if g is not f)] or waiting
        for function in ready:
            helpers[function.function.__name__] = compiled(function, tree_of(function), {**names, **helpers})
        waiting = [function for function in waiting if function not in ready]
    for function in (functions[name] for name in anew):
        if function.owner is not None:
            yield function, compiled(function, tree_of(function), {**names, **helpers})


def _calls_by_name(function: SourceFunction, other: SourceFunction) -> bool:
    return other.function.__name__ in function.function.__code__.co_names
