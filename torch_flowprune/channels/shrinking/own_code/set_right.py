"""A smaller model's code set right: where it tells an operator another number than it has to, that is noted.

What it has to tell is known from the dense model (``told_numbers``). Numbers that stand in attributes of the module are
told from those that do not, so that the attribute can be set and the code be left alone.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from torch import nn

from torch_flowprune.channels.shrinking.graphs import flat_numbers
from torch_flowprune.channels.shrinking.own_code.code_source import Slot, SourceFunction
from torch_flowprune.channels.shrinking.own_code.edited_code import Edit, part_of, share, with_old_numbers
from torch_flowprune.channels.shrinking.own_code.told_numbers import ToldNumbers
from torch_flowprune.channels.shrinking.own_code.watched_code import CodeWatcher, Place, operation_named


class SetRight(CodeWatcher):
    """The smaller model's code, in which each number that is not what it has to be is set right and noted.

    Attributes:
        shares: whether to say which share of a number is left, for one that grows with the batch too.
        edits: module -> what was set.
        factors: module -> attribute that a number is a product of -> what it has to be.
        refused: places whose numbers cannot be set, with the reason.
    """

    def __init__(self, model: nn.Module, told: ToldNumbers, shares: bool = False) -> None:
        super().__init__(model)
        self.told, self.shares, self.seen = told, shares, defaultdict[Place, int](int)
        self.factors: dict[str, dict[str, int]] = defaultdict(dict)
        self.edits: dict[str, dict[tuple[str, int, Slot], Edit]] = defaultdict(dict)
        self.refused: dict[Place, str] = {}

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
            else:
                self.refused[place] = "another number of sizes"
        return what(*(value for group in arguments for value in group), **keywords)

    def _set(self, place: Place, parts: Any, expected: list[int | None], arguments: Any, keywords: Any) -> None:
        for slot, value in parts:
            own = flat_numbers(value)
            wanted, expected = expected[: len(own)], expected[len(own) :]
            right = [o if e is None else e for o, e in zip(own, wanted, strict=True)]
            if own != right and not slot:
                self.refused[place] = "an unpacked value"
            elif own != right:
                literal = isinstance(part_of(self.function(place).places[place[2]], slot), ast.Constant)
                as_share = self.shares and not literal
                new = [share(n, o) if as_share else n for n, o in zip(right, own, strict=True)]
                self._note(place, slot, new[0] if type(value) is int else _numbers_changed(value, own, right, new))
                if type(value) is int:
                    self._note_factor(place, slot, Fraction(right[0], own[0] or 1))
                _put_in(arguments, keywords, slot, right[0] if type(value) is int else tuple(right))

    def worked_out(self, owner: Any, function: str, number: int, name: str, left: Any, right: Any) -> Any:
        place = self.place(owner, function, number)
        expected = self._next(self.told.scalars, place)
        if expected is None or place is None:
            return operation_named(name)(left, right)
        slot, value = expected
        own = {("left",): left, ("right",): right}.get(slot)
        if own is not None and own != value and isinstance(own, (int, float)):
            self._note(place, slot, value)
            left, right = (value, right) if slot == ("left",) else (left, value)
        result = operation_named(name)(left, right)
        if slot == ("all",) and isinstance(result, float) and result != value:
            self._note(place, slot, value)
            return value
        return result

    def code(self) -> dict[str, tuple[Edit, ...]]:
        """Module path -> what its code says instead."""
        return {path: tuple(edits.values()) for path, edits in self.edits.items() if edits}

    def attributes(self) -> dict[str, dict[str, Any]]:
        """The numbers that stand in attributes of the module itself: these can be set, and the code be left alone."""
        found: dict[str, dict[str, Any]] = defaultdict(dict)
        for path, factors in self.factors.items():
            found[path] |= factors
        for path, edits in self.edits.items():
            held = vars(self.modules[path])
            for (name, number, slot), edit in edits.items():
                attribute = _own_attribute(self.function((path, name, number)), number, slot)
                if attribute in held:
                    found[path][attribute] = with_old_numbers(edit.value, held[attribute])
        return found

    def _note_factor(self, place: Place, slot: Slot, left: Fraction) -> None:
        """An attribute of the module that the number is a product of, with something that is no attribute of it."""
        path, _, number = place
        held, names = vars(self.modules[path]), _own_factors(self.function(place), number, slot)
        if len(names) == 1 and type(held.get(names[0])) is int:
            new = left * held[names[0]]
            if new.denominator == 1:
                self.factors[path][names[0]] = int(new)

    def _note(self, place: Place, slot: Slot, value: Any) -> None:
        path, name, number = place
        before = self.edits[path].get((name, number, slot))
        if before is not None and before.value != value:
            self.refused[place] = "another number each time"
        self.edits[path][name, number, slot] = Edit(name, self.function(place).digest, number, slot, value)


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


def _numbers_changed(value: Any, own: Sequence[int], right: Sequence[int], new: Sequence[Any]) -> tuple[Any, ...]:
    """What of a sequence of numbers becomes another: None for those that stay, which may be a batch's."""
    if len(value) != len(own):  # numbers in numbers
        return tuple(right)
    return tuple(None if old == n else said for old, n, said in zip(own, right, new, strict=True))


def _put_in(arguments: Any, keywords: dict[str, Any], slot: Slot, value: Any) -> None:
    at, *inside = slot
    held: Any = keywords if isinstance(at, str) else arguments[at]
    key: Any = at if isinstance(at, str) else 0
    if inside and isinstance(held, list) and len(held) > 1:  # bounds of a slice
        held[inside[0]] = value
        return
    if inside:
        elements = list(held[key])
        elements[inside[0]] = value
        value = tuple(elements)
    held[key] = value
