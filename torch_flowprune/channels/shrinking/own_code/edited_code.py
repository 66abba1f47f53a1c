"""A class whose code says other numbers in a few places, and else is the class."""

from __future__ import annotations

import ast
import copy
import operator
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from torch_flowprune.channels.shrinking.own_code.code_source import (
    BOUNDS,
    UNPACKED,
    Slot,
    SourceFunction,
    code_of_class,
    index_parts,
    rebuilt_functions,
)
from torch_flowprune.channels.shrinking.own_code.dense_spans import OVER
from torch_flowprune.channels.shrinking.own_code.said_numbers import (
    Turns,
    is_in_turn,
    is_said_anew,
    is_share,
    numbers_of_share,
    numbers_shown,
    value_over,
)
from torch_flowprune.masking import quiet_subclass


class Edit(NamedTuple):
    """One number, or several, in place of an expression.

    Attributes:
        function: that it stands in.
        digest: of the function's source.
        place: the number of the call or operation in its tree.
        slot: which part of that; ``SPAN`` for a call that divides by a number of channels.
        value: what it says instead (``said_numbers``); of several numbers, None for one that stays as the code has it.
            Of a ``SPAN`` the function's name, whether it is a tensor's method, the dimension and its dense size.
    """

    function: str
    digest: str
    place: int
    slot: Slot
    value: Any


Edits = tuple[Edit, ...]
SPAN = ("over",)
WHOLE = ("all",)
"""Of an operation: what it comes to."""
NAMES = {**{f"{name}_over__": function for name, function in OVER.items()}, "Turns__": Turns}
"""What stands in the code in the place of functions that divide by a number of channels."""


def _laid_on(before: Edit, edit: Edit) -> Edit:
    """An edit on top of one that stood there when it was made; the dense size stays that of the dense model."""
    return before if edit.slot == SPAN else Edit(*edit[:-1], value_over(before.value, edit.value))


_classes_made: dict[tuple[type[nn.Module], Edits], type[nn.Module]] = {}


def edits_of(cls: type) -> Edits:
    """What was changed in a class's code; nothing, in a user's own."""
    found: Edits = getattr(cls, "code_edits", ())
    return found


def own_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class as the user wrote it."""
    found: type[nn.Module] = getattr(cls, "code_base", cls)
    return found


def with_edits(cls: type[nn.Module], edits: Iterable[Edit]) -> type[nn.Module]:
    """A subclass of the same name with these edits, besides those that the class has.

    Raises:
        ValueError: where the code is another than the edits were made for.
    """
    places = {(e.function, e.place, e.slot): e for e in edits_of(cls)}
    for edit in edits:
        before = places.get((edit.function, edit.place, edit.slot))
        places[edit.function, edit.place, edit.slot] = edit if before is None else _laid_on(before, edit)
    return _edited(own_class(cls), tuple(sorted(places.values(), key=lambda e: (e.function, e.place, str(e.slot)))))


def _edited(base: type[nn.Module], edits: Edits) -> type[nn.Module]:
    if (base, edits) in _classes_made:
        return _classes_made[base, edits]
    functions = code_of_class(base)
    for edit in edits:
        known = functions.get(edit.function)
        if known is None or known.digest != edit.digest or edit.place not in known.places:
            raise ValueError(
                f"the code of {edit.function} has changed since {base.__name__} was shrunk: install the version of its "
                "library with which it was shrunk, or shrink again"
            )
    changed = list(dict.fromkeys(edit.function for edit in edits))
    methods = rebuilt_functions(functions, changed, partial(tree_with, edits=edits), NAMES)
    space = {one.function.__name__: new for one, new in methods}
    about = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    made = quiet_subclass(base, base.__name__, {**space, **about, **_KEPT, "code_base": base, "code_edits": edits})
    return _classes_made.setdefault((base, edits), made)


def _reduced(self: nn.Module, protocol: Any) -> Any:
    """Pickled as an object of the class that the user wrote, with the edits beside it."""
    above: Any = super(_laid_over(type(self)), self)
    plain: tuple[Any, ...] = above.__reduce_ex__(protocol)
    return (_revived, (own_class(type(self)), edits_of(type(self))), *plain[2:])


def _laid_over(cls: type) -> Any:
    """The class with edits among a class and those that it comes of."""
    return next(kind for kind in cls.__mro__ if "code_edits" in vars(kind))


def _revived(base: type[nn.Module], edits: Edits) -> nn.Module:
    cls = _edited(base, edits)
    return cls.__new__(cls)


_KEPT: dict[str, Callable[..., Any]] = {"__reduce_ex__": _reduced}


def tree_with(function: SourceFunction, edits: Iterable[Edit]) -> ast.FunctionDef:
    """A copy of a function's tree in which they stand."""
    tree = copy.deepcopy(function.tree)
    numbered: dict[int, Any] = dict(enumerate(ast.walk(tree)))
    for number, node in numbered.items():
        node.place = number
    own = [edit for edit in edits if edit.function == function.name]
    turns: list[Any] = []
    for edit in sorted(own, key=lambda edit: edit.slot == SPAN):  # which moves arguments
        node = numbered[edit.place]
        if edit.slot == SPAN:
            _put_span(node, tree, *edit.value)
        else:
            before = ast.Constant(None) if edit.slot == WHOLE else part_of(node, edit.slot)
            _put(node, edit.slot, _expression(edit.value, before, turns))
    if turns:
        state = ast.Call(ast.Name("Turns__", ast.Load()), [ast.Constant(said) for said in turns], [])
        tree.body = [ast.With([ast.withitem(state, ast.Name("turns__", ast.Store()))], tree.body)]
    return tree


def _put_span(call: ast.Call, tree: ast.FunctionDef, name: str, method: bool, dim: int, dense: int) -> None:
    """The function of the same name that is told the dense size of a dimension."""
    if method and isinstance(call.func, ast.Attribute):
        call.args.insert(0, call.func.value)
    elif name == "forward":
        call.args.insert(0, ast.Name(tree.args.args[0].arg, ast.Load()))
    call.args = [ast.Constant(dim), ast.Constant(dense), *call.args]
    call.func = ast.Name(f"{name}_over__", ast.Load())


def _expression(value: Any, before: ast.AST, turns: list[Any]) -> ast.expr:
    """The numbers as code; what stays, in whole or in part, is read off the expression that stood there, run once.

    turns: what is said in turn in the function, to which this is added.
    """
    assert isinstance(before, ast.expr)
    if is_share(value):
        new, old = map(ast.Constant, numbers_of_share(value))
        return ast.BinOp(ast.BinOp(before, ast.Mult(), new), ast.FloorDiv(), old)
    if is_in_turn(value):
        turns.append(tuple(_turn_checked(number) for number in value[1:]))
        call = ast.parse(f"turns__.next({len(turns) - 1}, 0)", mode="eval").body
        assert isinstance(call, ast.Call)
        call.args[1] = before
        return call
    if is_said_anew(value):
        return ast.parse(repr(value), mode="eval").body
    call = ast.parse("(lambda sizes: (0,))(0)", mode="eval").body
    assert isinstance(call, ast.Call)
    assert isinstance(call.func, ast.Lambda)
    call.args = [before]
    call.func.body = ast.Tuple([_element(at, number, turns) for at, number in enumerate(value)], ast.Load())
    return call


def _element(at: int, number: Any, turns: list[Any]) -> ast.expr:
    before = ast.parse(f"sizes[{at}]", mode="eval").body
    return before if number is None else _expression(number, before, turns)


def _turn_checked(number: Any) -> Any:
    """One of several in turn, in a file that somebody wrote too."""
    if is_share(number):
        return (number[0], *numbers_of_share(number))
    return number if number is None or isinstance(number, float) else operator.index(number)


def _put(node: ast.AST, slot: Slot, value: ast.expr) -> None:
    """In place of a part of a call; of an operation, of one side, or of all of it."""
    if isinstance(node, ast.BinOp):
        if slot == WHOLE:  # once the value, as the node has to stay one of its kind
            node.left, node.op, node.right = ast.Constant(1), ast.Mult(), value
        else:
            setattr(node, slot[0], value)
        return
    at, *inside = slot
    if isinstance(node, ast.Subscript):
        setattr(index_parts(node)[at], BOUNDS[inside[0]], value)
        return
    assert isinstance(node, ast.Call)
    if inside == [UNPACKED]:
        node.args[at].value = value  # type: ignore[attr-defined]
        return
    keyword = next((k for k in node.keywords if k.arg == at), None)
    if inside:
        held: Any = keyword.value if keyword is not None else node.args[at]
        held.elts[inside[0]] = value
    elif keyword is not None:
        keyword.value = value
    else:
        node.args[at] = value


def part_of(node: Any, slot: Slot) -> ast.AST:
    """What stands in a slot."""
    if slot == SPAN:
        return node  # type: ignore[no-any-return]
    if isinstance(node, ast.BinOp):
        return node if slot == WHOLE else getattr(node, slot[0])
    at, *inside = slot
    if isinstance(node, ast.Subscript):
        return getattr(index_parts(node)[at], BOUNDS[inside[0]])  # type: ignore[no-any-return]
    if inside == [UNPACKED]:
        return node.args[at].value  # type: ignore[no-any-return]
    held: Any = next((k.value for k in node.keywords if k.arg == at), None) or node.args[at]
    return held.elts[inside[0]] if inside else held  # type: ignore[no-any-return]


def lines_of(cls: type[nn.Module]) -> list[str]:
    """The edits of a class in words: which line, what stands there, and what is read in its place."""
    functions = code_of_class(own_class(cls))
    return [_line(functions[edit.function], edit) for edit in edits_of(cls)]


def _line(function: SourceFunction, edit: Edit) -> str:
    node = function.places[edit.place]
    if edit.slot == SPAN:
        return f"{function.line(edit.place)}: {ast.unparse(node)}: as over {edit.value[-1]} channels"
    was = ast.unparse(part_of(node, edit.slot))
    return f"{function.line(edit.place)}: {ast.unparse(node)}: {numbers_shown(edit.value)} in place of {was}"


def edits_from(data: Mapping[str, Any]) -> dict[str, Edits]:
    """Path -> edits, from what JSON made of them."""

    def plain(value: Any) -> Any:
        return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value

    return {path: tuple(Edit(*plain(edit)) for edit in edits) for path, edits in data.items()}
