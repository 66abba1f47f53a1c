"""The numbers that code tells its operators in the dense model, and what they have to be in a smaller one.

The code runs with every place of interest watched, beside the graph that was read, which says what becomes of each
number.
"""

from __future__ import annotations

import ast
import operator
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from torch_flowprune.channels.shrinking.graphs import flat_numbers, resized_arguments
from torch_flowprune.channels.shrinking.own_code.code_source import MAKE_VALUES, Slot, name_called
from torch_flowprune.channels.shrinking.own_code.dense_spans import OVER
from torch_flowprune.channels.shrinking.own_code.edited_code import SPAN, Edit, Edits
from torch_flowprune.channels.shrinking.own_code.watched_code import CodeWatcher, Place, operation_named
from torch_flowprune.channels.tracing import Reading, operator_name
from torch_flowprune.inputs import same_randomness, settle
from torch_flowprune.torch_internals import BelowAutograd, OperatorMode, tree_map_only


class ToldNumbers(CodeWatcher, OperatorMode):
    """What each place has to say in the smaller model, by the graph that was read off the dense one.

    Attributes:
        calls: place -> call after call, the numbers in its arguments in order; None where the graph does not tell.
        scalars: place -> operation after operation, the number that takes part or comes out.
        spans: place -> the edit of a call that divides by a number of channels which changes.
    """

    def __init__(self, model: nn.Module, reading: Reading, dead: Tensor, only: Collection[str] | None = None) -> None:
        OperatorMode.__init__(self)
        CodeWatcher.__init__(self, model, only)
        self.reading, self.dead, self.at, self.lost = reading, dead, 0, False
        graph = reading.traced["eval"].graph
        self.nodes = [n for n in graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
        self.seen: dict[Place, list[tuple[list[list[int]], list[Node]]]] = defaultdict(list)
        self.calls: dict[Place, list[list[int | None] | None]] = {}
        self.scalars: dict[Place, list[tuple[Slot, Any] | None]] = defaultdict(list)
        self.spans: dict[Place, Edit] = {}
        self.spanning: list[tuple[Place, bool, list[Node]]] = []

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
            told = [flat_numbers(part) for _, part in self.parts(place, groups, keywords)]
            self.seen[place].append((told, self.nodes[start : self.at]))
            nodes = [node for node in self.nodes[start : self.at] if node in self.reading.spans]
            self.spanning.append((place, isinstance(getattr(what, "__self__", None), Tensor), nodes))
        return result

    def span_edits(self) -> dict[str, Edits]:
        """By module."""
        found: dict[str, Edits] = {}
        for (path, _, _), edit in self.spans.items():
            found[path] = (*found.get(path, ()), edit)
        return found

    def conclude(self) -> None:
        """Once nothing is watched any more: what becomes of the numbers that were seen."""
        for place, calls in self.seen.items():
            node = self.function(place).places[place[2]]
            expected = self._bounds if isinstance(node, ast.Subscript) else self._expected
            if isinstance(node, ast.Call) and name_called(node) in MAKE_VALUES:
                expected = self._as_they_are
            self.calls[place] = [expected(told, nodes) for told, nodes in calls]
        self._conclude_spans()

    def _conclude_spans(self) -> None:
        """The innermost call that runs an operator over channels some of which go is the one to tell."""
        spans, claimed = self.reading.spans, set[Node]()
        for place, is_method, nodes in self.spanning:  # inner calls end first
            found = [n for n in nodes if n not in claimed and bool(self.dead[spans[n][1]].any())]
            function = self.function(place)
            call = function.places[place[2]]
            name = name_called(call) if isinstance(call, ast.Call) else ""
            if len(found) == 1 and name in OVER:
                claimed.update(found)
                dim, labels = spans[found[0]]
                value = (name, is_method, dim, len(labels))
                self.spans[place] = Edit(place[1], function.digest, place[2], SPAN, value)

    def _as_they_are(self, told: Sequence[Sequence[int]], nodes: Sequence[Node]) -> list[int | None]:  # noqa: ARG002
        """Of what makes values of numbers."""
        return [number for part in told for number in part]

    def _bounds(self, told: Sequence[Sequence[int]], nodes: Sequence[Node]) -> list[int | None]:
        """Of an index: its slices are operators in the order of its parts; one that leaves all as it is, is none."""
        slices = [node for node in nodes if operator_name(node) == "slice"]
        expected: list[int | None] = []
        for lower, upper in zip(told[::2], told[1::2], strict=True):
            pairs = resized_arguments(slices[0], self.reading, self.dead) if slices else []
            if [old for old, _ in pairs] == [lower or [0], upper or [sys.maxsize]]:
                slices = slices[1:]
                expected += [*pairs[0][1] * len(lower), *pairs[1][1] * len(upper)]
            else:
                expected += [None] * len([*lower, *upper])
        return expected

    def _expected(self, parts: Sequence[Sequence[int]], nodes: Sequence[Node]) -> list[int | None] | None:
        told = [number for part in parts for number in part]
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
    model: nn.Module,
    reading: Reading,
    dead: Tensor,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    only: Collection[str] | None = None,
) -> ToldNumbers:
    """Run a copy of the dense model, which is used up, with its code watched, or that of some of its modules alone."""
    settle(model, "eval")
    told = ToldNumbers(model, reading, dead, only)
    args, kwargs = tree_map_only(Tensor, torch.clone, (args, dict(kwargs)))
    with same_randomness(model), torch.no_grad(), BelowAutograd(), told:
        model(*args, **kwargs)
    told.conclude()
    return told


def _scalar(left: Any, right: Any, result: Any) -> tuple[Slot, Any] | None:
    """The number in an operation with a tensor, or the fraction that comes of two numbers."""
    if isinstance(left, Tensor) and type(right) in (int, float):
        return ("right",), right
    if isinstance(right, Tensor) and type(left) in (int, float):
        return ("left",), left
    return (("all",), result) if type(result) is float else None
