"""The numbers that code tells its operators: what they are in the dense model, what they have to be in a smaller one.

The code runs with every place of interest watched, once in the dense model beside the graph that was read, which says
what becomes of each number, and once in the smaller one, where each that is another is set right and noted.
"""

from __future__ import annotations

import ast
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from torch_flowprune.channels.shrinking.graphs import flat_numbers, resized_arguments
from torch_flowprune.channels.shrinking.own_code.code_source import Slot, SourceFunction
from torch_flowprune.channels.shrinking.own_code.edited_code import Edit, part_of, with_old_numbers
from torch_flowprune.channels.shrinking.own_code.watched_code import CodeWatcher, Place, operation_named
from torch_flowprune.channels.tracing import Reading
from torch_flowprune.inputs import same_randomness, settle
from torch_flowprune.torch_internals import BelowAutograd, OperatorMode, tree_map_only

# -- the dense model ------------------------------------------


class ToldNumbers(CodeWatcher, OperatorMode):
    """What each place has to say in the smaller model, by the graph that was read off the dense one.

    Attributes:
        calls: place -> call after call, the numbers in its arguments in order; None where the graph does not tell.
        scalars: place -> operation after operation, the number that takes part or comes out.
    """

    def __init__(self, model: nn.Module, reading: Reading, dead: Tensor) -> None:
        OperatorMode.__init__(self)
        CodeWatcher.__init__(self, model)
        self.reading, self.dead, self.at, self.lost = reading, dead, 0, False
        graph = reading.traced["eval"].graph
        self.nodes = [n for n in graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
        self.seen: dict[Place, list[tuple[list[int], list[Node]]]] = defaultdict(list)
        self.calls: dict[Place, list[list[int | None] | None]] = {}
        self.scalars: dict[Place, list[tuple[Slot, Any] | None]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.lost = self.lost or self.at >= len(self.nodes) or self.nodes[self.at].target is not func
        self.at += 1
        return func(*args, **(kwargs or {}))

    def called(
        self, owner: Any, function: str, number: int, what: Callable[..., Any], groups: Any, keywords: Any
    ) -> Any:
        start, place = self.at, self.place(owner, function, number)
        result = what(*(value for group in groups for value in group), **keywords)
        if not self.lost and place is not None:
            told = [n for _, part in self.parts(place, groups, keywords) for n in flat_numbers(part)]
            self.seen[place].append((told, self.nodes[start : self.at]))
        return result

    def conclude(self) -> None:
        """Once nothing is watched any more: what becomes of the numbers that were seen."""
        for place, calls in self.seen.items():
            self.calls[place] = [self._expected(told, nodes) for told, nodes in calls]

    def _expected(self, told: Sequence[int], nodes: Sequence[Node]) -> list[int | None] | None:
        expected: list[int | None] = [None] * len(told)
        for node in nodes:
            for old, new in resized_arguments(node, self.reading, self.dead):
                found = [i for i in range(len(told)) if list(told[i : i + len(old)]) == old]
                if len(found) == 1:
                    expected[found[0] : found[0] + len(old)] = new
                elif old != new:
                    return None
        return expected

    def worked_out(self, owner: Any, function: str, number: int, name: str, left: Any, right: Any) -> Any:
        result = operation_named(name)(left, right)
        place = self.place(owner, function, number)
        if place is not None:
            self.scalars[place].append(_scalar(left, right, result))
        return result


def told_numbers(
    model: nn.Module, reading: Reading, dead: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> ToldNumbers:
    """Run a copy of the dense model, which is used up, with its code watched."""
    settle(model, "eval")
    told = ToldNumbers(model, reading, dead)
    args, kwargs = tree_map_only(Tensor, torch.clone, (args, dict(kwargs)))
    with same_randomness(model), torch.no_grad(), BelowAutograd(), told:
        model(*args, **kwargs)
    told.conclude()
    return told


# -- the smaller one ------------------------------------------


class SetRight(CodeWatcher):
    """The smaller model's code, in which each number that is not what it has to be is set right and noted.

    Attributes:
        edits: module -> what was set.
        refused: places whose numbers cannot be set, with the reason.
    """

    def __init__(self, model: nn.Module, told: ToldNumbers) -> None:
        super().__init__(model)
        self.told, self.seen = told, defaultdict[Place, int](int)
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
                self._note(place, slot, right[0] if type(value) is int else _numbers_changed(value, own, right))
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

    def attributes(self) -> dict[str, dict[str, Any]]:
        """The numbers that stand in attributes of the module itself: these can be set, and the code be left alone."""
        found: dict[str, dict[str, Any]] = defaultdict(dict)
        for path, edits in self.edits.items():
            held = vars(self.modules[path])
            for (name, number, slot), edit in edits.items():
                attribute = _own_attribute(self.function((path, name, number)), number, slot)
                if attribute in held:
                    found[path][attribute] = with_old_numbers(edit.value, held[attribute])
        return found

    def _note(self, place: Place, slot: Slot, value: Any) -> None:
        path, name, number = place
        before = self.edits[path].get((name, number, slot))
        if before is not None and before.value != value:
            self.refused[place] = "another number each time"
        self.edits[path][name, number, slot] = Edit(name, self.function(place).digest, number, slot, value)


def _own_attribute(function: SourceFunction, number: int, slot: Slot) -> str:
    """The attribute of the module itself that a slot says; nothing, where it says another expression."""
    said, arguments = part_of(function.places[number], slot), function.tree.args.args
    if function.owner is None or not arguments or not isinstance(said, ast.Attribute):
        return ""
    return said.attr if isinstance(said.value, ast.Name) and said.value.id == arguments[0].arg else ""


def _numbers_changed(value: Any, own: Sequence[int], right: Sequence[int]) -> tuple[int | None, ...]:
    """What of a sequence of numbers becomes another: None for those that stay, which may be a batch's."""
    if len(value) != len(own):  # numbers in numbers
        return tuple(right)
    return tuple(None if old == new else new for old, new in zip(own, right, strict=True))


def _put_in(arguments: Any, keywords: dict[str, Any], slot: Slot, value: Any) -> None:
    at, *inside = slot
    held: Any = keywords if isinstance(at, str) else arguments[at]
    key: Any = at if isinstance(at, str) else 0
    if inside:
        elements = list(held[key])
        elements[inside[0]] = value
        value = tuple(elements)
    held[key] = value


def _scalar(left: Any, right: Any, result: Any) -> tuple[Slot, Any] | None:
    """The number in an operation with a tensor, or the fraction that comes of two numbers."""
    if isinstance(left, Tensor) and type(right) in (int, float):
        return ("right",), right
    if isinstance(right, Tensor) and type(left) in (int, float):
        return ("left",), left
    return (("all",), result) if type(result) is float else None
