"""The sums x + f(x) of a graph, and what runs for the sake of f alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from torch.fx import Node

from torch_flowprune.channels.branches.running_graph import RunningGraph, shape_of
from torch_flowprune.channels.branches.vanishing import operands_of
from torch_flowprune.channels.rules import PRESERVING
from torch_flowprune.channels.tracing import handed_on, operator_name

_SUMS = ("add", "sub")
_SCALING = ("mul", "multiply", "div", "divide", "true_divide")


@dataclass(frozen=True, eq=False)
class Region:
    """One f of a sum x + f(x).

    Attributes:
        total: the sum.
        end: f(x), which is added.
        nodes: all that runs for it alone, and the parameters that only that reads.
    """

    total: Node
    end: Node
    nodes: frozenset[Node]


def regions_of(graph: RunningGraph) -> Iterator[Region]:
    """Every f, in the order of the sums."""
    for node in graph.nodes:
        if not is_sum(node) or any(_is_part(graph, node, user) for user in graph.users[node]):
            continue
        addends = sum_of(graph, node).addends
        for end in addends:
            others = [one for one in addends if one is not end]
            if end.op != "call_function" or not others or len(graph.users[end]) != 1:
                continue
            inside = graph.feeding(end)
            passed = [one for other in others for one in _scaled_from(graph, other)]
            outside = graph.read_from_outside(inside)
            if outside and graph.comes_of(outside, passed) and not graph.writes_outside(inside):
                yield Region(node, end, inside)


@dataclass(frozen=True, eq=False)
class SumOf:
    """A sum of several: what is added, and the operators that add it.

    Attributes:
        addends: in order.
        nodes: the sum, and those that are parts of it, each read by nothing else.
        is_plain: whether nothing is multiplied or subtracted.
    """

    addends: tuple[Node, ...]
    nodes: tuple[Node, ...]
    is_plain: bool


def sum_of(graph: RunningGraph, total: Node) -> SumOf:
    """A sum with the sums that are added in it and nowhere else."""
    waiting, addends, nodes = _operands(total), list[Node](), [total]
    while waiting:
        one = waiting.pop()
        if is_sum(one) and len(graph.users[one]) == 1:
            nodes.append(one)
            waiting += _operands(one)
        else:
            addends.append(one)
    plain = all(operator_name(one) == "add" and operands_of(one).get("alpha", 1) == 1 for one in nodes)
    return SumOf(tuple(addends), tuple(nodes), plain)


def _is_part(graph: RunningGraph, node: Node, user: Node) -> bool:
    return is_sum(user) and len(graph.users[node]) == 1


def _operands(node: Node) -> list[Node]:
    return [handed_on(one) for one in reversed(node.args[:2]) if isinstance(one, Node)]


def is_sum(node: Node) -> bool:
    """Of two tensors of its own shape."""
    if node.op != "call_function" or operator_name(node) not in _SUMS:
        return False
    operands = _operands(node)
    return len(operands) == 2 and all(shape_of(one) == shape_of(node) is not None for one in operands)


def _is_of_all(node: Node, read: Node) -> bool:
    """Whether a tensor has as many entries as what it is made of."""
    shapes = [shape_of(one) for one in (node, read)]
    return None not in shapes and prod(shapes[0] or ()) == prod(shapes[1] or ())


def _scaled_from(graph: RunningGraph, node: Node) -> Sequence[Node]:
    """A tensor, and those that it is a view or a multiple of, or is made of entry by entry."""
    found = [node]
    while node.op == "call_function":
        read = [one for one in graph.reads[node] if not graph.is_state(one)]
        if len(read) != 1 or operator_name(node) not in (*PRESERVING, *_SCALING) or not _is_of_all(node, read[0]):
            break
        node = read[0]
        found.append(node)
    return found
