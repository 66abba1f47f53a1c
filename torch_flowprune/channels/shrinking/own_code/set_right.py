"""A smaller model's code set right: where it tells an operator another number than it has to, that is noted.

What it has to tell is known from the dense model (``told_numbers``). Numbers that stand in attributes of the module are
told from those that do not, so that the attribute can be set and the code be left alone.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from torch import nn

from torch_flowprune.channels.shrinking.graphs import flat_numbers
from torch_flowprune.channels.shrinking.own_code.code_source import (
    UNPACKED,
    Slot,
    SourceFunction,
    name_called,
)
from torch_flowprune.channels.shrinking.own_code.edited_code import WHOLE, Edit, part_of
from torch_flowprune.channels.shrinking.own_code.said_numbers import in_turn, is_in_turn, share, with_old_numbers
from torch_flowprune.channels.shrinking.own_code.told_numbers import ToldNumbers
from torch_flowprune.channels.shrinking.own_code.watched_code import CodeWatcher, Place, operation_named

_FREE = -1  # the size that follows from the others
_TAKE_FREE = ("view", "_unsafe_view", "reshape", "unflatten")


class Said(NamedTuple):
    """The numbers that a slot said in one run, those that it had to say, and in which call of its function that was."""

    own: list[Any]
    right: list[Any]
    entry: int


class SetRight(CodeWatcher):
    """The smaller model's code, in which each number that is not what it has to be is set right and noted.

    Attributes:
        shares: whether to say which share of a number is left, for one that grows with the batch too.
        noted: place -> slot -> run after run.
        entries: module and function -> how often it was called.
        kinds: whether a slot says one number, several, or such in one another, which are said anew as a whole.
        factors: module -> attribute that a number is a product of -> what it has to be.
    """

    def __init__(self, model: nn.Module, told: ToldNumbers, shares: bool = False) -> None:
        super().__init__(model)
        self.told, self.shares, self.seen = told, shares, defaultdict[Place, int](int)
        self.noted: dict[Place, dict[Slot, list[Said]]] = defaultdict(lambda: defaultdict(list))
        self.entries: dict[tuple[str, str], int] = defaultdict(int)
        self.kinds: dict[tuple[Place, Slot], str] = {}
        self.factors: dict[str, dict[str, int]] = defaultdict(dict)

    def entered(self, owner: Any, function: str) -> None:
        if (place := self.place(owner, function, 0)) is not None:
            self.entries[place[:2]] += 1

    def _note(self, place: Place, slot: Slot, own: list[Any], right: list[Any]) -> None:
        self.noted[place][slot].append(Said(own, right, self.entries[place[:2]]))

    def _next(self, table: Mapping[Place, Sequence[Any]], place: Place | None) -> Any:
        if place is None:
            return None
        at = self.seen[place]
        self.seen[place] += 1
        return table[place][at] if place in table and at < len(table[place]) else None

    def called(
        self, owner: Any, function: str, number: int, what: Callable[..., Any], groups: Any, keywords: Any
    ) -> Any:
        place = self.place(owner, function, number)
        expected = self._next(self.told.calls, place)
        arguments = [list(group) for group in groups]
        if expected is not None and place is not None:
            parts = self.parts(place, groups, keywords)
            if len(expected) == sum(len(flat_numbers(value)) for _, value in parts):
                self._set(place, parts, list(expected), arguments, keywords)
        return what(*(value for group in arguments for value in group), **keywords)

    def _set(self, place: Place, parts: Any, expected: list[int | None], arguments: Any, keywords: Any) -> None:
        for slot, value in parts:
            own = flat_numbers(value)
            wanted, expected = expected[: len(own)], expected[len(own) :]
            right = [o if e is None else e for o, e in zip(own, wanted, strict=True)]
            if not own or not slot:
                continue
            self._note(place, slot, own, right)
            self.kinds[place, slot] = _kind_of(value, own)
            if own != right:
                self._note_factor(place, slot, own, right)
                _put_in(arguments, keywords, slot, right[0] if type(value) is int else tuple(right))

    def worked_out(self, owner: Any, function: str, number: int, name: str, left: Any, right: Any) -> Any:
        place = self.place(owner, function, number)
        expected = self._next(self.told.scalars, place)
        if expected is None or place is None:
            return operation_named(name)(left, right)
        slot, value = expected
        own = {("left",): left, ("right",): right}.get(slot)
        if isinstance(own, (int, float)):
            self._note_scalar(place, slot, own, value)
        if isinstance(own, (int, float)) and own != value:
            left, right = (value, right) if slot == ("left",) else (left, value)
        result = operation_named(name)(left, right)
        if slot == WHOLE and isinstance(result, float):
            self._note_scalar(place, slot, result, value)
            return value
        return result

    def _note_scalar(self, place: Place, slot: Slot, own: Any, value: Any) -> None:
        self._note(place, slot, [own], [value])
        self.kinds[place, slot] = "one"

    def _note_factor(self, place: Place, slot: Slot, own: Sequence[int], right: Sequence[int]) -> None:
        """An attribute of the module that the number is a product of, with something that is no attribute of it."""
        path, _, number = place
        held, names = vars(self.modules[path]), _own_factors(self.function(place), number, slot)
        if len(names) == 1 and type(held.get(names[0])) is int and own[0]:
            new = Fraction(right[0], own[0]) * held[names[0]]
            if new.denominator == 1:
                self.factors[path][names[0]] = int(new)

    # What follows for the code.

    def code(self) -> dict[str, tuple[Edit, ...]]:
        """Module path -> what its code says instead."""
        found: dict[str, tuple[Edit, ...]] = {}
        for place in self.noted:
            edits = [Edit(place[1], self.function(place).digest, place[2], *said) for said in self._said_at(place)]
            if edits:
                found[place[0]] = (*found.get(place[0], ()), *edits)
        return found

    def attributes(self) -> dict[str, dict[str, Any]]:
        """The numbers that stand in attributes of the module itself: these can be set, and the code be left alone."""
        found: dict[str, dict[str, Any]] = defaultdict(dict)
        for path, factors in self.factors.items():
            found[path] |= factors
        for place in self.noted:
            held = vars(self.modules[place[0]])
            for slot, value in self._said_at(place):
                attribute = _own_attribute(self.function(place), place[2], slot)
                if attribute in held and not _is_of_code(value):
                    found[place[0]][attribute] = with_old_numbers(value, held[attribute])
        return found

    def _said_at(self, place: Place) -> Iterator[tuple[Slot, Any]]:
        """The slots that have to say something else, with that."""
        may_be_free = self._leaves_one_free(place)
        for slot, runs in self.noted[place].items():
            if any(own != right for own, right, _ in runs):
                part = part_of(self.function(place).places[place[2]], slot)
                shares, kind = self.shares and not isinstance(part, ast.Constant), self.kinds[place, slot]
                numbers = tuple(_number_said(one, shares, may_be_free, slot != WHOLE) for one in _each_number(runs))
                yield slot, {"one": numbers[0], "several": numbers, "nested": tuple(runs[-1].right)}[kind]

    def _leaves_one_free(self, place: Place) -> bool:
        """Whether a call takes a size that follows from the others, and needs no more than one."""
        node = self.function(place).places[place[2]]
        if not isinstance(node, ast.Call) or name_called(node) not in _TAKE_FREE:
            return False
        positions = [one for runs in self.noted[place].values() for one in _each_number(runs)]
        free = [
            _number_said(one, self.shares, free=True) == _FREE or any(own == _FREE for own, _, _ in one)
            for one in positions
        ]
        return free.count(True) == 1


def _kind_of(value: Any, numbers: Sequence[int]) -> str:
    if type(value) is int:
        return "one"
    return "several" if len(value) == len(numbers) else "nested"


def _each_number(runs: Sequence[Said]) -> Iterator[list[tuple[Any, Any, int]]]:
    """Of each number that a slot says what it was and what it had to be, run after run.

    Of sequences of other lengths those of the last.
    """
    alike = [one for one in runs if len(one.own) == len(runs[-1].own)]
    for at in range(len(runs[-1].own)):
        yield [(one.own[at], one.right[at], one.entry) for one in alike]


def _number_said(runs: Sequence[tuple[Any, Any, int]], shares: bool, free: bool, may_stay: bool = True) -> Any:
    """None for a number that stays. What is another each time follows from the other sizes, or is said in turn.

    may_stay: whether what stands there can be said again.
    """
    if all(own == right for own, right, _ in runs):
        return None
    said = list(dict.fromkeys(share(right, own) if shares else right for own, right, _ in runs))
    if len(said) == 1:
        return said[0]
    if free:
        return _FREE
    by_entry: dict[int, list[Any]] = defaultdict(list)
    for own, right, entry in runs:
        stays = may_stay and own == right
        by_entry[entry].append(None if stays else share(right, own) if shares else right)
    first, *others = by_entry.values()
    return in_turn(first) if all(other == first for other in others) else said[-1]


def _is_of_code(value: Any) -> bool:
    """Whether it can be said in code alone."""
    several = value if isinstance(value, tuple) else (value,)
    return any(number == _FREE or is_in_turn(number) for number in (value, *several))


def _own_attribute(function: SourceFunction, number: int, slot: Slot) -> str:
    """The attribute of the module itself that a slot says; nothing, where it says another expression."""
    return _attribute_said(function, part_of(function.places[number], slot))


def _attribute_said(function: SourceFunction, said: ast.AST) -> str:
    arguments = function.tree.args.args
    if function.owner is None or not arguments or not isinstance(said, ast.Attribute):
        return ""
    return said.attr if isinstance(said.value, ast.Name) and said.value.id == arguments[0].arg else ""


def _own_factors(function: SourceFunction, number: int, slot: Slot) -> list[str]:
    """The attributes of the module itself in a product that a slot says."""
    factors, names = [part_of(function.places[number], slot)], list[str]()
    for said in factors:
        if isinstance(said, ast.BinOp) and isinstance(said.op, ast.Mult):
            factors += [said.left, said.right]
        elif name := _attribute_said(function, said):
            names.append(name)
    return names if len(factors) > 1 else []


def _put_in(arguments: Any, keywords: dict[str, Any], slot: Slot, value: Any) -> None:
    at, *inside = slot
    held: Any = keywords if isinstance(at, str) else arguments[at]
    key: Any = at if isinstance(at, str) else 0
    if inside == [UNPACKED]:
        held[:] = value
        return
    if inside and isinstance(held, list) and len(held) > 1:  # bounds of a slice
        held[inside[0]] = value
        return
    if inside:
        elements = list(held[key])
        elements[inside[0]] = value
        value = tuple(elements)
    held[key] = value
